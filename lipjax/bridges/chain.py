"""Layers of other frameworks, one after the other, as an nnx.Sequential of lipjax's layers.

Batch normalisation is folded (`folding`). The result is compared with the original on a few random
images: other logits are an error, for then a layer computes something else than its type and
parameters say.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipjax import storage
from lipjax.activations import MaxMin, ReLU
from lipjax.bridges.folding import PerChannel, batch_norm, folded
from lipjax.bridges.operations import OPERATIONS
from lipjax.bridges.program import INPUT, Network, Step, compared
from lipjax.layers import AveragePool, Flatten


class Chain:
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

    def maxmin(self, where: str) -> None:
        if self.order is not None or self.shape[-1] % 2:
            raise ValueError(
                f"{where} pairs an even number of channels and stands before the Flatten, got "
                f"{self.shape}."
            )
        self.items.append(MaxMin())

    def flatten(self, channels_first: bool = True) -> None:
        if len(self.shape) == 3:
            moved = channels_first and self.shape[:2] != (1, 1)
            self.order = flat_order(self.shape) if moved else None
            self._add("Flatten", Flatten(3))

    def _thresholds(self, where, array, shape) -> np.ndarray:
        found = (
            array.reshape(array.shape[1:])
            if array.shape[:1] == (1,) and array.ndim == len(shape) + 1
            else array
        )
        if found.shape != first_shape(shape):
            raise ValueError(
                f"{where} has thresholds of shape {array.shape}, expected "
                f"{(1, *first_shape(shape))}."
            )
        return channels_last(found) if self.order is None else found[self.order]

    def _add(self, where: str, layer) -> None:
        try:
            self.shape = jax.eval_shape(layer, jax.ShapeDtypeStruct(self.shape, jnp.float32)).shape
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} cannot take {self.shape}: {error}") from error
        self.items.append(layer)


def finished(
    items: Sequence[Any], input_shape: Sequence[int], reference: Callable[[np.ndarray], Any]
) -> nnx.Sequential:
    """The network of these layers, if it takes the shape, ends in logits and computes what the
    reference does."""
    network = nnx.Sequential(*folded(items))
    compared(network, input_shape, reference)
    return network


def sequential(network: Network) -> nnx.Sequential:
    """As `Network.sequential`."""
    reader = _Steps(network)
    for step in network.steps:
        reader.read(step)
    reader.close()
    return finished(reader.chain.items, network.input_shape, jax.jit(network.__call__))


class _Steps:
    """Turns the steps of a network into layers, channels last.

    Attributes:
        last: the number of the value behind the last layer; nothing else may be read.
        constants: weights, and what is computed from weights alone.
        dense: a matrix that waits for its bias.
        turned: are the channels of an image the first axis, as where convolutions are?
    """

    def __init__(self, network: Network):
        self.chain = Chain(network.input_shape)
        self.turned = network._moved
        self.last: Any = INPUT
        self.dense: tuple[str, np.ndarray] | None = None
        self.constants: dict[Any, np.ndarray] = {
            name: np.asarray(weight[...]) for name, weight in network.weights.items()
        }

    def read(self, step: Step) -> None:
        values = [o for o in step.operands if isinstance(o, int) and o not in self.constants]
        if not values:
            operands = [self.constant(o) for o in step.operands]
            found = OPERATIONS[step.kind](*operands, **step.settings)
            self.constants[step.result] = np.asarray(found)
            return
        rule = getattr(self, f"on_{step.kind}", None)
        if values != [self.last] or step.operands[0] != self.last or rule is None:
            why = "has branches" if rule is not None else "has no such layer"
            raise TypeError(
                f"{step.where}: {step.kind} {why}, so there is no nnx.Sequential of this network: "
                "use it as it is."
            )
        constants = [self.constant(o) for o in step.operands[1:]]
        if self.dense is not None and step.kind != "add":
            self.close()
        rule(f"{step.where},", *constants, **step.settings)
        self.last = step.result

    def constant(self, operand: Any) -> Any:
        return operand if isinstance(operand, float) else self.constants[operand]

    def close(self) -> None:
        """A dense layer without a bias."""
        if self.dense is not None:
            where, kernel = self.dense
            self.dense = None
            self.chain.dense(where, kernel.T, None)

    def refuse(self, where: str, what: str):
        raise TypeError(
            f"{where} {what}, so there is no nnx.Sequential of this network: use it as it is."
        )

    def on_convolution(self, where, kernel, bias=None, *, strides, padding, dilation, groups):
        if kernel.ndim != 4 or not self.turned:
            self.refuse(where, f"is a convolution with a kernel of shape {kernel.shape}")
        settings = {"strides": strides, "padding": padding, "kernel_dilation": dilation}
        self.chain.conv(where, kernel, bias, feature_group_count=groups, **settings)

    def on_matmul(self, where, kernel):
        if kernel.ndim != 2 or len(self.chain.shape) != 1:
            self.refuse(where, f"is a product with an array of shape {kernel.shape}")
        self.dense = where, kernel

    def on_add(self, where, other):
        if self.dense is None:
            return self.scaled(where, 1.0, other)
        first, kernel = self.dense
        self.dense = None
        self.chain.dense(first, kernel.T, np.broadcast_to(other, (1, kernel.shape[1]))[0])

    def on_sub(self, where, other):
        self.scaled(where, 1.0, -np.asarray(other))

    def on_mul(self, where, other):
        self.scaled(where, other, 0.0)

    def on_div(self, where, other):
        self.scaled(where, 1 / np.asarray(other, np.float64), 0.0)

    def scaled(self, where, scale, shift):
        """``scale * x + shift``, one number per channel each."""
        channels = self.chain.shape[-1]
        rank = len(self.chain.shape)
        rows = []
        for array in (scale, shift):
            axes = np.asarray(array, np.float64)
            axes = axes.reshape((1,) * (rank + 1 - axes.ndim) + axes.shape)[0]
            axes = np.moveaxis(axes, 0, -1) if self.turned and rank == 3 else axes
            if axes.size not in (1, axes.shape[-1]) or axes.shape[-1] not in (1, channels):
                self.refuse(where, f"scales or shifts with an array of shape {np.shape(array)}")
            rows.append(np.broadcast_to(axes.reshape(-1), (channels,)))
        self.chain.per_channel(where, PerChannel(*rows))

    def on_batch_norm(self, where, mean, variance, scale=None, shift=None, *, epsilon):
        self.chain.per_channel(where, batch_norm(mean, variance, epsilon, scale, shift, where))

    def on_relu(self, where):
        self.chain.relu(where)

    def on_clip(self, where, *, low, high):
        if low != 0:
            self.refuse(where, f"clips between {low} and {high}")
        threshold = np.full(first_shape(self.chain.shape), high, np.float32)
        self.chain.clipped_relu(where, threshold)

    def on_minimum(self, where, threshold):
        items = self.chain.items
        if not items or type(items[-1]) is not ReLU:
            self.refuse(where, "is a minimum without a ReLU in front")
        items.pop()
        self.chain.clipped_relu(where, np.asarray(threshold))

    def on_paired(self, where, *thresholds, axis):
        if axis != 1:
            self.refuse(where, f"pairs along axis {axis}")
        if thresholds:
            self.chain.clipped_maxmin(where, *thresholds)
        else:
            self.chain.maxmin(where)

    def on_average_pool(self, where, *, window, strides, padding, dilation, counted, divisor=None):
        plain = not np.any(padding) and set(dilation) == {1} and divisor is None
        if not plain or not self.turned:
            self.refuse(where, "is an average pooling with padding, dilation or a divisor")
        self.chain.pool(where, window, strides)

    def on_mean(self, where, *, axes, keep):
        if axes != (2, 3) or not self.turned:
            self.refuse(where, f"is a mean over the axes {axes}")
        self.chain.pool(where, self.chain.shape[:-1], None)
        if not keep:
            self.chain.flatten()

    def on_reshape(self, where, *, shape):
        if tuple(shape) != (1, math.prod(self.chain.shape)):
            self.refuse(where, f"makes another shape, {shape}")
        self.chain.flatten(self.turned)

    def on_transpose(self, where, *, order):
        expected = (0, 2, 3, 1) if self.turned else (0, 3, 1, 2)
        if len(self.chain.shape) != 3 or tuple(order) != expected:
            self.refuse(where, f"moves axes, {order}")
        self.turned = not self.turned


def flat_order(shape: Sequence[int]) -> np.ndarray:
    """Where each entry of a flattened ``(height, width, channels)`` is in the flattened
    ``(channels, height, width)``."""
    return channels_last(np.arange(math.prod(shape)).reshape(first_shape(shape))).reshape(-1)


def channels_last(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, 0, -1)


def channels_first(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(images, -1, 1)) if images.ndim == 4 else images


def first_shape(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[-1], *shape[:-1])


def type_name(value) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def function_name(value) -> str:
    name = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{name}" if name else type_name(value)
