"""Networks from PyTorch checkpoints, without PyTorch: the paper's, and those of a given
architecture."""

import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipjax import models, storage
from lipjax.activations import ClippedMaxMin, ClippedReLU
from lipjax.bridges.chain import channels_last, first_shape, flat_order
from lipjax.bridges.folding import PerChannel, batch_norm, folded
from lipjax.bridges.program import held
from lipjax.bridges.torch_files import state_dict
from lipjax.layers import Flatten

# The paper's networks by the names that it gives them.
ARCHITECTURES = {"4C3F": "conv4_dense3", "6C2F": "conv6_dense2", "8C2F": "conv8_dense2"}


def from_pth(
    path,
    architecture: str | nnx.Sequential,
    *,
    activation: str | None = None,
    input_shape: Sequence[int] | None = None,
    classes: int | None = None,
) -> nnx.Sequential:
    """The network of a checkpoint: one of the paper's, or of an architecture that is given.

    PyTorch is not needed, and nothing in the file is executed (`state_dict`). Where images were
    normalised before they reached the network, as the paper's code does with --normalization, put
    `lipjax.Normalize` in front, ``nnx.Sequential(lipjax.Normalize(mean, deviation),
    *network.layers)``, so that epsilon is a radius on pixels. Thresholds below 0 act in the paper's
    code as 0, and become 0.

    Args:
        path: what ``torch.save`` wrote: ``{"state_dict": ...}`` or the state_dict alone.
        architecture: "4C3F", "6C2F" or "8C2F"; or an nnx.Sequential, whose layers nnx.Conv,
            nnx.Linear, nnx.BatchNorm, `lipjax.ClippedReLU` and `ClippedMaxMin` get the file's
            parameters in the file's order, as ``torch.nn.Sequential`` has them: kernels are
            transposed, and the columns behind a `lipjax.Flatten` of images put into lipjax's order.
            It is not changed; only its shapes count.
        activation: of the paper's networks: one of `lipjax.models.ACTIVATIONS`. None:
            "clipped_relu" or "clipped_maxmin" as the file's thresholds say; without thresholds it
            has to be given.
        input_shape: ``(height, width, channels)`` or ``(features,)``; needed with an architecture
            of one's own. None: that of `lipjax.models`: MNIST for 4C3F, CIFAR-10 for 6C2F,
            TinyImageNet for 8C2F. 4C3F for CIFAR-10 needs ``(32, 32, 3)``.
        classes: of the paper's networks. None: that of `lipjax.models`.

    Raises:
        TorchFileError: as `state_dict`.
        ValueError: unknown architecture or activation; a file of another network; no thresholds and
            no activation; keys that are missing or left over; a shape that does not fit, with key,
            shape found and shape expected; parameters that are not finite.
    """
    if isinstance(architecture, nnx.Sequential):
        if input_shape is None or activation is not None or classes is not None:
            raise ValueError(
                "with an architecture of your own give its input_shape, and no activation or "
                "classes: its layers say these."
            )
        reader = _Reader(path, state_dict(path), "the given network", tuple(input_shape))
        return reader.filled(architecture, by_position=False)

    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture must be one of {', '.join(ARCHITECTURES)}, or an nnx.Sequential, got "
            f"{architecture!r}."
        )
    arrays = state_dict(path)
    make = models.NETWORKS[ARCHITECTURES[architecture]]
    _check_published(path, arrays, architecture, make)
    if activation is None:
        endings = {name.rpartition(".")[2] for name in arrays}
        if "threshold" not in endings and "max" not in endings:
            raise ValueError(
                f"{path} has no thresholds: say activation='relu' or activation='maxmin'."
            )
        activation = "clipped_relu" if "threshold" in endings else "clipped_maxmin"
    arguments: dict[str, Any] = {
        "activation": activation,
        "input_shape": input_shape,
        "classes": classes,
    }
    given = {name: value for name, value in arguments.items() if value is not None}
    # shapes alone: nothing is drawn
    network = nnx.eval_shape(lambda: make(**given, rngs=nnx.Rngs(0)))
    shape = tuple(input_shape or inspect.signature(make).parameters["input_shape"].default)
    reader = _Reader(path, arrays, f"{architecture} with {activation}", shape)
    return reader.filled(network, by_position=True)


def _check_published(path, arrays: dict[str, np.ndarray], architecture: str, make) -> None:
    """Raises an error where the file's layers are those of no network of the paper."""
    network = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    expected = [
        4 if type(layer) is nnx.Conv else 2
        for layer in network.layers
        if type(layer) in (nnx.Conv, nnx.Linear)
    ]
    found = [array.ndim for name, array in arrays.items() if name.endswith("weight")]
    if found != expected:
        raise ValueError(
            f"{path} is no {architecture} of the paper: it has {found.count(4)} convolutions and "
            f"{found.count(2)} dense layers, expected {expected.count(4)} and {expected.count(2)} "
            f"(names: {_some(arrays)}). For a network of your own give its layers, "
            "from_pth(path, nnx.Sequential(...), input_shape=...), or take the arrays from "
            "lipjax.bridges.state_dict(path)."
        )


def _some(names) -> str:
    names = list(names)
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


class _Reader:
    """Puts the arrays of a file into layers.

    Attributes:
        left: what no layer has taken yet.
        flattened: ``(height, width, channels)`` in front of the first dense layer.
    """

    def __init__(self, path, arrays: dict[str, np.ndarray], what: str, shape: tuple[int, ...]):
        self.path, self.arrays, self.what, self.shape = path, arrays, what, shape
        self.left = {n: a for n, a in arrays.items() if not n.endswith("num_batches_tracked")}
        self.flattened: tuple[int, ...] | None = None

    def filled(self, network: nnx.Sequential, by_position: bool) -> nnx.Sequential:
        """The layers with the file's parameters, by their numbers or in the file's order."""
        items: list[Any] = []
        example = jax.ShapeDtypeStruct(self.shape, jnp.float32)
        for i, layer in enumerate(_layers(network)):
            prefix = str(i)
            if not by_position:
                # An empty prefix: nothing is left, and `take` says so.
                prefix = next(iter(self.left), "").rpartition(".")[0]
            items.append(self.layer(layer, prefix, example.shape))
            if type(items[-1]) is PerChannel:
                continue
            try:
                example = jax.eval_shape(items[-1], example)
            except (TypeError, ValueError) as error:
                raise ValueError(f"layer {i} cannot take {example.shape}: {error}") from error
        if self.left:
            raise ValueError(f"{self.path}: {self.what} has no place for {', '.join(self.left)}.")
        return nnx.Sequential(*folded(items))

    def layer(self, layer, prefix: str, shape: tuple[int, ...]) -> Any:
        kind = type(layer)
        if kind is nnx.Conv:
            *window, inputs, outputs = layer.kernel_shape
            weight = self.take(f"{prefix}.weight", (outputs, inputs, *window))
            settings = {name: getattr(layer, name) for name in storage.SETTINGS[nnx.Conv]}
            kernel = weight.transpose(*range(2, weight.ndim), 1, 0)
            return storage.convolution(kernel, self.bias(layer, prefix, outputs), **settings)
        if kind is nnx.Linear:
            weight = self.take(f"{prefix}.weight", (layer.out_features, layer.in_features))
            if self.flattened:
                weight = weight[:, flat_order(self.flattened)]
                self.flattened = None
            return storage.dense(weight.T, self.bias(layer, prefix, layer.out_features))
        if kind is nnx.BatchNorm:
            channels = shape[-1:]
            names = ("running_mean", "running_var", "weight", "bias")
            mean, variance, scale, shift = (self.take(f"{prefix}.{n}", channels) for n in names)
            return batch_norm(mean, variance, layer.epsilon, scale, shift, f"{prefix}, BatchNorm")
        if kind is ClippedReLU:
            threshold = self.take(f"{prefix}.threshold", first_shape(shape), leading=True)
            return storage.clipped_relu(np.maximum(channels_last(threshold), 0))
        if kind is ClippedMaxMin:
            half = (*shape[:-1], shape[-1] // 2)
            pair = (
                self.take(f"{prefix}.{end}", first_shape(half), leading=True)
                for end in ("max", "min")
            )
            return storage.clipped_maxmin(*map(channels_last, pair))
        if jax.tree.leaves(nnx.state(layer)) if isinstance(layer, nnx.Module) else False:
            raise TypeError(
                f"layer {kind.__name__} has parameters, and no known place in a file of PyTorch."
            )
        if kind is Flatten and len(shape) == 3:
            self.flattened = shape
        return layer

    def bias(self, layer, prefix: str, outputs: int) -> np.ndarray | None:
        return None if layer.bias is None else self.take(f"{prefix}.bias", (outputs,))

    def take(self, key: str, expected: Sequence[int], leading: bool = False) -> np.ndarray:
        if key not in self.left:
            raise ValueError(
                f"{self.path}: {key} is missing for {self.what}; there are "
                f"{', '.join(self.arrays)}."
            )
        array = self.left.pop(key)
        found = array.shape[1:] if leading and array.shape[:1] == (1,) else array.shape
        if found != tuple(expected):
            raise ValueError(
                f"{self.path}: {key} has shape {array.shape}, expected "
                f"{(1, *expected) if leading else tuple(expected)} for {self.what} on images of "
                f"{self.shape}: give the input_shape, classes and activation that it was trained "
                "with."
            )
        if not np.issubdtype(array.dtype, np.floating) and array.dtype.name != "bfloat16":
            raise ValueError(f"{self.path}: {key} is {array.dtype}, expected floating numbers.")
        array = held(array if array.dtype == np.float64 else array.astype(np.float32))
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{self.path}: {key} has NaN or infinite entries.")
        return array.reshape(found)


def _layers(network: nnx.Sequential):
    for layer in network.layers:
        if type(layer) is nnx.Sequential:
            yield from _layers(layer)
        else:
            yield layer
