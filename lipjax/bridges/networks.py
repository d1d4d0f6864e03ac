"""From networks of other frameworks to networks of lipjax: PyTorch, the paper's checkpoints, Flax
Linen, Equinox.

Each function returns an nnx.Sequential on images ``(height, width, channels)`` that computes the
same logits up to rounding, with batch normalisation folded (`fold`). Layers are known by their
*exact* type; anything else is an error that names it. Then both networks are run on a few random
images: if their logits differ by more than `TOLERANCE` that is an error too, for then a layer
    computes something else than its type and parameters say. What is certified is the network that
    is returned, as
lipjax executes it, not the one that it came from.

No framework is imported here. Parameters become float32, or stay float64 where JAX has 64 bits.
"""

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipjax import models, storage
from lipjax.activations import ReLU
from lipjax.bridges.folding import PerChannel, batch_norm, fold, folded
from lipjax.bridges.torch_files import TorchFileError, state_dict
from lipjax.layers import AveragePool, Flatten

__all__ = [
    "ARCHITECTURES",
    "TorchFileError",
    "fold",
    "from_equinox",
    "from_linen",
    "from_pth",
    "from_torch",
    "state_dict",
]

# Largest difference of the logits, as a share of the largest logit, on the random images of the
# final comparison.
TOLERANCE = 1e-3
IMAGES = 4

# The paper's networks by the names that it gives them.
ARCHITECTURES = {"4C3F": "conv4_dense3", "6C2F": "conv6_dense2", "8C2F": "conv8_dense2"}


# ------------------------------------------------------------------------------------------ PyTorch


def from_torch(sequential, input_shape: Sequence[int]) -> nnx.Sequential:
    """The network of a ``torch.nn.Sequential`` of known layers, nested ones included.

    Known are Conv2d (padding mode zeros), Linear, ReLU, ReLU6, Flatten, AvgPool2d and
    AdaptiveAvgPool2d(1) without padding, BatchNorm1d and 2d, Dropout and Identity; and, by class
    name and parameters, the modules of the paper's code: ReLU_x, ClampGroupSort and its Flatten.

    Args:
        sequential: on images ``(N, channels, height, width)`` or vectors ``(N, features)``; pixels
            in [0, 1], without any normalisation outside of it. It is run on random images, and not
            changed.
        input_shape: of one image as lipjax takes it, ``(height, width, channels)``; or
            ``(features,)``.

    Raises:
        TypeError: no ``torch.nn.Sequential``, or a layer that is not known, by name.
        ValueError: a setting that is not known; BatchNorm or Dropout in training mode; hooks;
            parameters that are neither float32 nor float64; layers that do not fit the input shape;
            other logits than the given network's.
    """
    torch = sys.modules.get("torch")
    if torch is None or type(sequential) is not torch.nn.Sequential:
        raise TypeError(f"expected a torch.nn.Sequential, got {_type_name(sequential)}.")
    chain = _Chain(input_shape)
    _add_torch(torch, sequential, chain, "")

    def reference(images):
        parameter = next(iter(sequential.parameters()))
        with torch.no_grad():
            logits = sequential(torch.from_dlpack(_channels_first(images)).to(parameter))
        return _from_tensor(logits, "the output")

    return _finished(chain.items, input_shape, reference)


def _add_torch(torch, sequential, chain: "_Chain", prefix: str) -> None:
    nn = torch.nn
    for i, module in enumerate(sequential):
        kind = type(module)
        where = f"layer {prefix}{i}, {kind.__name__},"
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(
                f"{where} has hooks, which may change what it computes: remove them "
                "(remove_weight_norm, ...)."
            )
        own = {
            name: _from_tensor(p, f"{where} parameter {name}")
            for name, p in module.named_parameters(recurse=False)
        }
        if module.training and isinstance(
            module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
        ):
            raise ValueError(f"{where} is in training mode: call .eval() on the network first.")
        if kind is nn.Sequential:
            _add_torch(torch, module, chain, f"{prefix}{i}.")
        elif kind is nn.Conv2d:
            if module.padding_mode != "zeros":
                raise ValueError(
                    f"{where} has padding mode {module.padding_mode!r}, expected 'zeros'."
                )
            settings = {
                "strides": module.stride,
                "padding": _torch_padding(module),
                "kernel_dilation": module.dilation,
            }
            chain.conv(
                where, own["weight"], own.get("bias"), feature_group_count=module.groups, **settings
            )
        elif kind is nn.Linear:
            chain.dense(where, own["weight"], own.get("bias"))
        elif kind in (nn.BatchNorm1d, nn.BatchNorm2d):
            if module.running_mean is None:
                raise ValueError(
                    f"{where} keeps no statistics (track_running_stats=False): its logits depend "
                    "on the batch."
                )
            mean, variance = (
                _from_tensor(t, where) for t in (module.running_mean, module.running_var)
            )
            item = batch_norm(mean, variance, module.eps, own.get("weight"), own.get("bias"), where)
            chain.per_channel(where, item)
        elif kind is nn.AvgPool2d:
            if (
                module.padding not in (0, (0, 0))
                or module.ceil_mode
                or module.divisor_override is not None
            ):
                raise ValueError(
                    f"{where} needs padding 0, ceil_mode False and no divisor_override."
                )
            chain.pool(where, module.kernel_size, module.stride)
        elif kind is nn.AdaptiveAvgPool2d:
            if module.output_size not in (1, (1, 1)):
                raise ValueError(f"{where} has output size {module.output_size}, expected 1.")
            chain.pool(where, chain.shape[:-1], None)
        elif kind is nn.ReLU:
            chain.relu(where)
        elif kind is nn.ReLU6:
            chain.clipped_relu(where, np.full(_channels_first_shape(chain.shape), 6, np.float32))
        elif kind is nn.Flatten:
            if (module.start_dim, module.end_dim) != (1, -1):
                raise ValueError(
                    f"{where} has dimensions {module.start_dim} to {module.end_dim}, expected 1 to "
                    "-1."
                )
            chain.flatten()
        elif kind in (nn.Identity, nn.Dropout, nn.Dropout2d):
            pass
        elif kind.__name__ == "ReLU_x" and _only(module, own, {"threshold"}):
            chain.clipped_relu(where, own["threshold"])
        elif kind.__name__ == "ClampGroupSort" and _only(module, own, {"max", "min"}):
            chain.clipped_maxmin(where, own["max"], own["min"])
        elif kind.__name__ == "Flatten" and _only(module, own, set()):
            chain.flatten()
        else:
            raise TypeError(
                f"{where} of {kind.__module__} is not known. Known are Sequential, Conv2d, Linear, "
                "ReLU, ReLU6, Flatten, "
                "AvgPool2d, AdaptiveAvgPool2d, BatchNorm1d, BatchNorm2d, Dropout, Identity, by "
                "exact type, and ReLU_x, "
                "ClampGroupSort and Flatten of the paper's code. Leave a softmax at the end out: "
                "logits are what is certified."
            )


def _only(module, own: Mapping[str, Any], names: set[str]) -> bool:
    """Has the module these parameters, and no others, no buffers and no children?"""
    return set(own) == names and not list(module.buffers()) and not list(module.children())


def _torch_padding(module):
    if module.padding == "valid":
        return "VALID"
    if module.padding == "same":
        extents = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple((extent // 2, extent - extent // 2) for extent in extents)
    return tuple((p, p) for p in module.padding)


def _from_tensor(tensor, where: str) -> np.ndarray:
    """A copy of a PyTorch tensor, by DLPack: also where PyTorch was built for another NumPy."""
    array = np.array(np.from_dlpack(tensor.detach().cpu().contiguous()))
    if array.dtype not in (np.float32, np.float64):
        raise ValueError(
            f"{where} is {array.dtype}, expected float32 or float64: call .float() on the network "
            "first."
        )
    return _as_held(array)


def from_pth(
    path,
    architecture: str,
    *,
    activation: str | None = None,
    input_shape: Sequence[int] | None = None,
    classes: int | None = None,
) -> nnx.Sequential:
    """The network of a checkpoint of the paper's code: a network of `lipjax.models` with the
    weights of the file.

    PyTorch is not needed, and nothing in the file is executed (`state_dict`). The code can be told
    to normalise images before they reach the network (its --normalization): a network trained that
    way needs `lipjax.Normalize` in front, ``nnx.Sequential(lipjax.Normalize(mean, deviation),
    *network.layers)``, so that epsilon is a radius on pixels. Thresholds below 0 act in that code
    as 0, and become 0.

    Args:
        path: what ``torch.save`` wrote: ``{"state_dict": ...}`` or the state_dict alone.
        architecture: "4C3F", "6C2F" or "8C2F".
        activation: one of `lipjax.models.ACTIVATIONS`. None: "clipped_relu" or "clipped_maxmin" as
            the file's thresholds say; without thresholds it has to be given.
        input_shape: ``(height, width, channels)``; None: that of `lipjax.models`: MNIST for 4C3F,
            CIFAR-10 for 6C2F, TinyImageNet for 8C2F. 4C3F for CIFAR-10 needs ``(32, 32, 3)``.
        classes: None: that of `lipjax.models`.

    Raises:
        TorchFileError: as `state_dict`.
        ValueError: unknown architecture or activation; no thresholds and no activation; keys that
            are missing or left over; a shape that does not fit, with key, shape found and shape
            expected; parameters that are not finite.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}."
        )
    arrays = state_dict(path)
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
    make = models.NETWORKS[ARCHITECTURES[architecture]]
    # shapes alone: nothing is drawn
    network = nnx.eval_shape(lambda: make(**given, rngs=nnx.Rngs(0)))
    left = dict(arrays)
    layers: list[Any] = []
    flattened = None  # (height, width, channels) in front of the first dense layer
    shape = tuple(input_shape or inspect.signature(make).parameters["input_shape"].default)

    def take(key: str, expected: Sequence[int], leading: bool = False) -> np.ndarray:
        if key not in left:
            raise ValueError(
                f"{path}: {key} is missing for {architecture} with {activation}; there are "
                f"{', '.join(arrays)}."
            )
        array = left.pop(key)
        found = array.shape[1:] if leading and array.shape[:1] == (1,) else array.shape
        if found != tuple(expected):
            raise ValueError(
                f"{path}: {key} has shape {array.shape}, expected "
                f"{(1, *expected) if leading else tuple(expected)} for "
                f"{architecture} with {activation} on images of {shape}: give the input_shape, "
                "classes and activation that it "
                "was trained with."
            )
        if not np.issubdtype(array.dtype, np.floating) and array.dtype.name != "bfloat16":
            raise ValueError(f"{path}: {key} is {array.dtype}, expected floating numbers.")
        array = _as_held(array if array.dtype == np.float64 else array.astype(np.float32)).reshape(
            found
        )
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{path}: {key} has NaN or infinite entries.")
        return array

    example = jax.ShapeDtypeStruct(shape, jnp.float32)
    for i, layer in enumerate(network.layers):
        if type(layer) is nnx.Conv:
            *window, inputs, outputs = layer.kernel_shape
            weight = take(f"{i}.weight", (outputs, inputs, *window)).transpose(2, 3, 1, 0)
            settings = {name: getattr(layer, name) for name in storage.SETTINGS[nnx.Conv]}
            made: Any = storage.convolution(weight, take(f"{i}.bias", (outputs,)), **settings)
        elif type(layer) is nnx.Linear:
            weight = take(f"{i}.weight", (layer.out_features, layer.in_features))
            if flattened:
                weight = weight[:, _order(flattened)]
                flattened = None
            made = storage.dense(weight.T, take(f"{i}.bias", (layer.out_features,)))
        elif activation == "clipped_relu" and type(layer) is not Flatten:
            threshold = take(f"{i}.threshold", _channels_first_shape(example.shape), leading=True)
            made = storage.clipped_relu(np.maximum(_channels_last(threshold), 0))
        elif activation == "clipped_maxmin" and type(layer) is not Flatten:
            half = (*example.shape[:-1], example.shape[-1] // 2)
            pair = (
                take(f"{i}.{end}", _channels_first_shape(half), leading=True)
                for end in ("max", "min")
            )
            made = storage.clipped_maxmin(*map(_channels_last, pair))
        else:
            made = layer
            flattened = example.shape if type(layer) is Flatten else flattened
        layers.append(made)
        example = jax.eval_shape(made, example)
    if left:
        raise ValueError(
            f"{path}: {architecture} with {activation} has no place for {', '.join(left)}."
        )
    return nnx.Sequential(*layers)


# ------------------------------------------------------------------------------------------ Equinox


def from_equinox(sequential, input_shape: Sequence[int], state=None) -> nnx.Sequential:
    """The network of an ``equinox.nn.Sequential`` of known layers, nested ones included.

    Known are Conv2d (padding mode ZEROS), Linear, AvgPool2d without padding, BatchNorm, Dropout and
    Identity; and Lambda of jax.nn.relu and of jnp.ravel, by identity.

    Args:
        sequential: on one image ``(channels, height, width)`` or vector, pixels in [0, 1], in
            inference mode (``equinox.nn.inference_mode``).
        input_shape: of one image as lipjax takes it, ``(height, width, channels)``; or
            ``(features,)``.
        state: the ``equinox.nn.State`` that BatchNorm keeps its statistics in; None: there is no
            BatchNorm.

    Raises:
        TypeError: no ``equinox.nn.Sequential``, or a layer or function that is not known, by name.
        ValueError: as `from_torch`; BatchNorm without a state.
    """
    equinox = sys.modules.get("equinox")
    if equinox is None or type(sequential) is not equinox.nn.Sequential:
        raise TypeError(f"expected an equinox.nn.Sequential, got {_type_name(sequential)}.")
    chain = _Chain(input_shape)
    _add_equinox(equinox.nn, sequential, state, chain, "")

    def reference(images):
        more = {} if state is None else {"state": state}
        logits = jax.jit(jax.vmap(lambda x: sequential(x, **more)))(_channels_first(images))
        return logits if state is None else logits[0]

    return _finished(chain.items, input_shape, reference)


def _add_equinox(nn, sequential, state, chain: "_Chain", prefix: str) -> None:
    for i, module in enumerate(sequential.layers):
        kind = type(module)
        where = f"layer {prefix}{i}, {kind.__name__},"
        if kind is nn.Sequential:
            _add_equinox(nn, module, state, chain, f"{prefix}{i}.")
        elif kind is nn.Conv2d:
            if module.padding_mode != "ZEROS":
                raise ValueError(
                    f"{where} has padding mode {module.padding_mode!r}, expected 'ZEROS'."
                )
            bias = None if module.bias is None else _as_held(module.bias).reshape(-1)
            settings = {
                "strides": module.stride,
                "padding": module.padding,
                "kernel_dilation": module.dilation,
            }
            chain.conv(
                where, _as_held(module.weight), bias, feature_group_count=module.groups, **settings
            )
        elif kind is nn.Linear:
            bias = None if module.bias is None else _as_held(module.bias).reshape(-1)
            chain.dense(where, _as_held(module.weight), bias)
        elif kind is nn.BatchNorm:
            chain.per_channel(where, _equinox_batch_norm(module, state, where))
        elif kind is nn.AvgPool2d:
            if any(p != (0, 0) for p in module.padding) or module.use_ceil:
                raise ValueError(f"{where} needs padding 0 and use_ceil False.")
            chain.pool(where, module.kernel_size, module.stride)
        elif kind is nn.Dropout and not module.inference:
            raise ValueError(
                f"{where} is in training mode: use equinox.nn.inference_mode(network)."
            )
        elif kind in (nn.Dropout, nn.Identity):
            pass
        elif kind is nn.Lambda and module.fn is jax.nn.relu:
            chain.relu(where)
        elif kind is nn.Lambda and module.fn is jnp.ravel:
            chain.flatten()
        else:
            what = _function_name(module.fn) if kind is nn.Lambda else kind.__module__
            raise TypeError(
                f"{where} of {what} is not known. Known are Sequential, Conv2d, Linear, AvgPool2d, "
                "BatchNorm, Dropout, Identity, "
                "by exact type, and Lambda of jax.nn.relu or jnp.ravel themselves: of another "
                "function nothing is known."
            )


def _equinox_batch_norm(module, state, where: str) -> PerChannel:
    if state is None or not module.inference:
        raise ValueError(
            f"{where} needs the state with its statistics, and inference mode "
            "(equinox.nn.inference_mode)."
        )
    if module.mode == "ema":
        mean, variance = state.get(module.ema_state_index)
    else:
        mean, variance = state.get(module.batch_state_index)
        count = int(state.get(module.batch_counter))
        warm = 1 - float(module.momentum) ** count if count else 1.0  # its averages start at 0
        mean, variance = (np.asarray(array, np.float64) / warm for array in (mean, variance))
    return batch_norm(mean, variance, module.eps, module.weight, module.bias, where)


# --------------------------------------------------------------------------------------- Flax Linen


def from_linen(
    sequential, variables: Mapping[str, Any], input_shape: Sequence[int]
) -> nnx.Sequential:
    """The network of a ``flax.linen.Sequential`` of known layers, nested ones included, with these
    variables.

    Known are Conv, Dense, BatchNorm with use_running_average=True, Dropout with deterministic=True,
    the functions nn.relu and jax.nn.relu by identity, and lipjax's own layers, which are callables
    as Linen wants them: use `lipjax.Flatten()` and `lipjax.AveragePool` for what Linen has as
        functions alone.

    Args:
        sequential: on images ``(N, height, width, channels)`` or vectors, pixels in [0, 1].
        variables: as its ``init`` returned them: "params" and, with BatchNorm, "batch_stats".
        input_shape: of one image, ``(height, width, channels)``; or ``(features,)``.

    Raises:
        TypeError: no ``flax.linen.Sequential``, or a layer or function that is not known, by name.
        ValueError: as `from_torch`.
    """
    from flax import linen

    if type(sequential) is not linen.Sequential:
        raise TypeError(f"expected a flax.linen.Sequential, got {_type_name(sequential)}.")
    items: list[Any] = []
    _add_linen(linen, sequential.bind(variables), items, "")
    return _finished(
        items, input_shape, lambda images: jax.jit(sequential.apply)(variables, images)
    )


def _add_linen(linen, bound, items: list[Any], prefix: str) -> None:
    known = {kind.type for kind in storage.KINDS.values()} - {nnx.Conv, nnx.Linear}
    for i, module in enumerate(bound.layers):
        kind = type(module)
        where = f"layer {prefix}{i}, {kind.__name__},"
        if kind is linen.Sequential:
            _add_linen(linen, module, items, f"{prefix}{i}.")
        elif kind is linen.Conv:
            _expect_usual(
                where,
                module,
                ("mask", "conv_general_dilated", "conv_general_dilated_cls", "promote_dtype"),
            )
            settings = {name: getattr(module, name) for name in storage.SETTINGS[nnx.Conv]}
            items.append(storage.convolution(*_linen_parameters(module), **settings))
        elif kind is linen.Dense:
            _expect_usual(where, module, ("dot_general", "dot_general_cls", "promote_dtype"))
            settings = {name: getattr(module, name) for name in storage.SETTINGS[nnx.Linear]}
            items.append(storage.dense(*_linen_parameters(module), **settings))
        elif kind is linen.BatchNorm:
            if module.use_running_average is not True or module.axis != -1:
                raise ValueError(
                    f"{where} needs use_running_average=True and axis=-1, as fields of the module."
                )
            mean, variance = (module.variables["batch_stats"][name] for name in ("mean", "var"))
            own = module.variables.get("params", {})
            items.append(
                batch_norm(mean, variance, module.epsilon, own.get("scale"), own.get("bias"), where)
            )
        elif kind is linen.Dropout:
            if module.deterministic is not True:
                raise ValueError(f"{where} needs deterministic=True, as a field of the module.")
        elif module is jax.nn.relu:
            items.append(ReLU())
        elif kind in known:
            items.append(module)
        else:
            raise TypeError(
                f"layer {prefix}{i}, {_function_name(module)}, is not known. Known are Sequential, "
                "Conv, Dense, BatchNorm and "
                "Dropout by exact type, nn.relu itself, and lipjax's layers. A lambda says nothing "
                "of what it computes: for "
                "x.reshape(...) put lipjax.Flatten() there, for nn.avg_pool lipjax.AveragePool."
            )


def _linen_parameters(module) -> tuple[np.ndarray, np.ndarray | None]:
    own = module.variables["params"]
    return _as_held(own["kernel"]), _as_held(own["bias"]) if "bias" in own else None


def _expect_usual(where: str, module, fields: Sequence[str]) -> None:
    for name in fields:
        if getattr(module, name) is not getattr(type(module), name):
            raise ValueError(f"{where} has a {name} of its own, so its matrix is not known.")


# ------------------------------------------------------------------------------------------- shared


class _Chain:
    """Channels-first layers, one after the other, as lipjax's: `items`, for `folding.folded`.

    `shape` is that of one example behind the last layer, channels last. Where an image was
    flattened, the other framework has its entries in the order (channel, row, column) and lipjax in
    (row, column, channel): `order` says for each entry here where it is there, and the columns of
        the next dense layer are taken in that order.
    """

    def __init__(self, input_shape: Sequence[int]):
        self.shape = tuple(int(n) for n in input_shape)
        if len(self.shape) not in (1, 3) or min(self.shape) < 1:
            raise ValueError(
                f"input_shape must be (height, width, channels) or (features,), got {input_shape}."
            )
        self.order: np.ndarray | None = None
        self.items: list[Any] = []

    def conv(self, where: str, weight, bias, **settings) -> None:
        channels = weight.shape[1] * settings["feature_group_count"]
        if len(self.shape) != 3 or self.shape[-1] != channels:
            raise ValueError(
                f"{where} takes (height, width, {channels}), got {self.shape}: lipjax has channels "
                "last."
            )
        self._add(where, storage.convolution(weight.transpose(2, 3, 1, 0), bias, **settings))

    def dense(self, where: str, weight, bias) -> None:
        if self.shape != weight.shape[1:]:
            raise ValueError(
                f"{where} takes {weight.shape[1]} features, got {self.shape}: is a Flatten missing?"
            )
        if self.order is not None:
            weight, self.order = weight[:, self.order], None
        self._add(where, storage.dense(weight.T, bias))

    def per_channel(self, where: str, item: PerChannel) -> None:
        if len(item.scale) != self.shape[-1]:
            raise ValueError(f"{where} normalises {len(item.scale)} channels, got {self.shape}.")
        self.items.append(
            item if self.order is None else PerChannel(*(array[self.order] for array in item))
        )

    def pool(self, where: str, window, strides) -> None:
        if len(self.shape) != 3:
            raise ValueError(f"{where} takes images, got {self.shape}.")
        self._add(where, AveragePool(window, strides))

    def relu(self, where: str) -> None:
        self.items.append(ReLU())

    def clipped_relu(self, where: str, threshold: np.ndarray) -> None:
        # A threshold below 0 acts as 0 where the other framework cuts at 0 last.
        self.items.append(
            storage.clipped_relu(np.maximum(self._thresholds(where, threshold, self.shape), 0))
        )

    def clipped_maxmin(self, where: str, upper: np.ndarray, lower: np.ndarray) -> None:
        if self.order is not None or self.shape[-1] % 2:
            raise ValueError(
                f"{where} pairs an even number of channels and stands before the Flatten, got "
                f"{self.shape}."
            )
        half = (*self.shape[:-1], self.shape[-1] // 2)
        self.items.append(
            storage.clipped_maxmin(
                *(self._thresholds(where, array, half) for array in (upper, lower))
            )
        )

    def flatten(self) -> None:
        if len(self.shape) == 3:
            self.order = _order(self.shape) if self.shape[:2] != (1, 1) else None
            self._add("Flatten", Flatten(3))

    def _thresholds(self, where, array, shape) -> np.ndarray:
        found = (
            array.reshape(array.shape[1:])
            if array.shape[:1] == (1,) and array.ndim == len(shape) + 1
            else array
        )
        if found.shape != _channels_first_shape(shape):
            raise ValueError(
                f"{where} has thresholds of shape {array.shape}, expected "
                f"{(1, *_channels_first_shape(shape))}."
            )
        return _channels_last(found) if self.order is None else found[self.order]

    def _add(self, where: str, layer) -> None:
        try:
            self.shape = jax.eval_shape(layer, jax.ShapeDtypeStruct(self.shape, jnp.float32)).shape
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} cannot take {self.shape}: {error}") from error
        self.items.append(layer)


def _finished(
    items: Sequence[Any], input_shape: Sequence[int], reference: Callable[[np.ndarray], Any]
) -> nnx.Sequential:
    """The network of these layers, if it takes the shape, ends in logits and computes what the
    reference does."""
    network = nnx.Sequential(*folded(items))
    images = np.random.default_rng(0).uniform(0, 1, (IMAGES, *input_shape)).astype(np.float32)
    try:
        ours = np.asarray(jax.jit(lambda network, images: network(images))(network, images))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"images of shape {tuple(input_shape)} do not go through: {error}"
        ) from error
    if ours.ndim != 2:
        raise ValueError(
            f"the logits must have one axis, got shape {ours.shape[1:]}: a Flatten is missing."
        )
    theirs = np.asarray(reference(images))
    size = np.max(np.abs(theirs), initial=0.0)
    if theirs.shape != ours.shape or not np.max(np.abs(ours - theirs)) <= TOLERANCE * size + 1e-6:
        difference = (
            np.max(np.abs(ours - theirs)) if theirs.shape == ours.shape else f"shape {theirs.shape}"
        )
        raise ValueError(
            f"the network that was built computes other logits, of shape {ours.shape}, than the "
            f"given one on {IMAGES} random "
            f"images: they differ by {difference}, the largest is {size}. A layer computes "
            "something else than its type and "
            "parameters say, or numbers are not finite."
        )
    return network


def _as_held(array) -> np.ndarray:
    """As NumPy array of a type that JAX holds now: float64 becomes float32 where it has no 64
    bits."""
    array = np.asarray(array)
    narrow = array.dtype == np.float64 and not jax.config.jax_enable_x64  # type: ignore[attr-defined]
    return array.astype(np.float32) if narrow else array


def _order(shape: Sequence[int]) -> np.ndarray:
    """Where each entry of a flattened ``(height, width, channels)`` is in the flattened
    ``(channels, height, width)``."""
    return _channels_last(
        np.arange(math.prod(shape)).reshape(_channels_first_shape(shape))
    ).reshape(-1)


def _channels_last(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, 0, -1)


def _channels_first(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(images, -1, 1)) if images.ndim == 4 else images


def _channels_first_shape(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[-1], *shape[:-1])


def _type_name(value) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _function_name(value) -> str:
    name = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{name}" if name else _type_name(value)
