"""Batch normalisation and input normalisation, multiplied into the affine layers beside them where
that is exact.

``s * x + t`` per channel, after an affine layer, is an affine layer: rows times s, bias times s
plus t. In front of one it is columns times s, and the layer's image of t goes to the bias; but not
where the layer pads with zeros, for the padding is not shifted. There the scale is multiplied in
and ``x + t / s`` stays as a `lipjax.Normalize`, a layer of norm 1; where t is too large against s
for that, all of it stays.

Exact means: in real numbers. The new kernels are rounded once to their own type, so the folded
network computes other last bits than the one that it came from. It is the folded network that one
certifies and runs. Its inputs are those of the given one: epsilon stays a radius on pixels in
[0, 1].
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from lipjax import storage
from lipjax.layers import AveragePool, Flatten, Normalize, Residual

# A shift of more than so many times the scale is not divided by it.
LARGEST_RATIO = 1e6


class PerChannel(NamedTuple):
    """``scale * x + shift``, float64; one number per channel each, or one for all."""

    scale: np.ndarray
    shift: np.ndarray


def batch_norm(
    mean, variance, epsilon: float, scale=None, shift=None, where: str = "BatchNorm"
) -> PerChannel:
    """``(x - mean) / sqrt(variance + epsilon) * scale + shift``, scale and shift optional.

    Raises:
        ValueError: numbers that are not finite, variances + epsilon that are not positive.
    """
    mean, variance = (np.asarray(array, np.float64).reshape(-1) for array in (mean, variance))
    if not np.all(variance + epsilon > 0):
        raise ValueError(
            f"{where}: expected variances + epsilon > 0, got {np.min(variance + epsilon)}."
        )
    factor = 1 / np.sqrt(variance + epsilon)
    factor = factor if scale is None else factor * np.asarray(scale, np.float64).reshape(-1)
    offset = (
        -mean * factor
        if shift is None
        else np.asarray(shift, np.float64).reshape(-1) - mean * factor
    )
    if not (np.all(np.isfinite(factor)) and np.all(np.isfinite(offset))):
        raise ValueError(f"{where} has parameters that are not finite.")
    return PerChannel(factor, offset)


def fold(network: nnx.Sequential) -> nnx.Sequential:
    """The network without its nnx.BatchNorm layers, and without those `lipjax.Normalize` that can
    be folded exactly.

    Neighbours are looked for through AveragePool and, towards the output, through Flatten; nested
    sequences are spliced in, and nothing is moved into or out of a Residual. What has no affine
    neighbour stays as a `lipjax.Normalize`.

    Args:
        network: an nnx.Sequential; it is not changed.

    Raises:
        TypeError: the network is no nnx.Sequential.
        ValueError: a BatchNorm that still takes statistics of its batch, or that normalises another
            axis than the last.
    """
    if type(network) is not nnx.Sequential:
        raise TypeError(
            "expected a flax.nnx.Sequential, got "
            f"{type(network).__module__}.{type(network).__qualname__}."
        )
    return nnx.Sequential(*folded(_items(network)))


def _items(network: nnx.Sequential) -> Iterable[Any]:
    for i, layer in enumerate(network.layers):
        if type(layer) is nnx.Sequential:
            yield from _items(layer)
        elif type(layer) is Residual:
            yield Residual(*folded(_items(layer.branch)))
        elif type(layer) is Normalize:
            yield PerChannel(
                np.asarray(layer.scale, np.float64), np.asarray(layer.shift, np.float64)
            )
        elif type(layer) is nnx.BatchNorm:
            if not layer.use_running_average or layer.axis != -1:
                raise ValueError(
                    f"layer {i}, BatchNorm: expected use_running_average=True and axis=-1, got "
                    f"{layer.use_running_average} "
                    f"and {layer.axis}. While it takes statistics of its batch, an image's logits "
                    "depend on the others."
                )
            scale, shift = (None if p is None else p[...] for p in (layer.scale, layer.bias))
            yield batch_norm(
                layer.mean[...],
                layer.var[...],
                layer.epsilon,
                scale,
                shift,
                f"layer {i}, BatchNorm",
            )
        else:
            yield layer


def folded(items: Iterable[Any]) -> list[Any]:
    """Layers and `PerChannel` maps in order, as layers alone."""
    found: list[Any] = []
    for item in items:
        k = len(found)
        if type(item) is PerChannel:
            while k and type(found[k - 1]) is AveragePool:  # the mean of a window commutes with it
                k -= 1
            before = found[k - 1] if k else None
            if type(before) is PerChannel:
                found[k - 1] = _then(before, item)
                continue
            if before is not None and _has_kernel(before):
                found[k - 1] = _scaled_rows(before, item)
                continue
        found.insert(k, item)
    for k in reversed(range(len(found))):
        if type(found[k]) is not PerChannel:
            continue
        ahead = k + 1
        while ahead < len(found) and type(found[ahead]) in (AveragePool, Flatten):
            ahead += 1
        item = found.pop(k)
        if ahead <= len(found) and _has_kernel(found[ahead - 1]):
            found[ahead - 1], item = _scaled_columns(found[ahead - 1], item)
        if item is not None:
            found.insert(k, Normalize.of(item.scale.tolist(), item.shift.tolist()))
    return found


def _then(first: PerChannel, second: PerChannel) -> PerChannel:
    return PerChannel(
        *np.broadcast_arrays(second.scale * first.scale, second.scale * first.shift + second.shift)
    )


def _has_kernel(layer) -> bool:
    """Is it an affine layer whose matrix is its kernel, by exact type and with nothing unusual?"""
    if type(layer) not in (nnx.Conv, nnx.Linear):
        return False
    return not storage.unusual(layer)


def _parameters(layer) -> tuple[np.ndarray, np.ndarray]:
    kernel = np.asarray(layer.kernel[...]).astype(np.float64)
    return kernel, np.zeros(kernel.shape[-1]) if layer.bias is None else np.asarray(
        layer.bias[...]
    ).astype(np.float64)


def _changed(layer, kernel: np.ndarray, bias: np.ndarray):
    """The layer with another kernel and bias, of the kernel's type."""
    dtype = layer.kernel[...].dtype
    settings: Any = {name: getattr(layer, name) for name in storage.SETTINGS[type(layer)]}
    make = storage.convolution if type(layer) is nnx.Conv else storage.dense
    return make(kernel.astype(dtype), bias.astype(dtype), **settings)


def _scaled_rows(layer, item: PerChannel):
    """The layer followed by the map."""
    kernel, bias = _parameters(layer)
    if len(item.scale) not in (1, kernel.shape[-1]):
        raise _misfit(item, kernel.shape[-1])
    return _changed(layer, kernel * item.scale, bias * item.scale + item.shift)


def _scaled_columns(layer, item: PerChannel) -> tuple[Any, PerChannel | None]:
    """The layer with as much as possible of the map in front of it, and what is left of the map, or
    None."""
    kernel, bias = _parameters(layer)
    groups = layer.feature_group_count if type(layer) is nnx.Conv else 1
    inputs = kernel.shape[-2] * groups
    # One number may stand for all channels, and a flattened image has its channels side by side,
    # again and again.
    repeats = inputs // len(item.scale) if type(layer) is nnx.Linear or len(item.scale) == 1 else 1
    if repeats * len(item.scale) != inputs:
        raise _misfit(item, inputs)
    scale, shift = (np.tile(array, repeats) for array in item)
    left = None
    if np.any(shift) and _pads_with_zeros(layer):
        if np.any(np.abs(shift) > LARGEST_RATIO * np.abs(scale)):
            return layer, item
        ratio = np.divide(
            item.shift, item.scale, out=np.zeros_like(item.shift), where=item.scale != 0
        )
        left, shift = PerChannel(np.ones_like(ratio), ratio), np.zeros_like(shift)
    per_column, constant = (_by_column(array, groups, kernel.shape[-1]) for array in (scale, shift))
    bias = bias + np.sum(kernel * constant, axis=tuple(range(kernel.ndim - 1)))
    return _changed(layer, kernel * per_column, bias), left


def _by_column(array: np.ndarray, groups: int, outputs: int) -> np.ndarray:
    """One number per input channel as ``(inputs / groups, outputs)``, as the last axes of a kernel
    have them."""
    return np.repeat(array.reshape(groups, -1), outputs // groups, axis=0).T


def _pads_with_zeros(layer) -> bool:
    if type(layer) is nnx.Linear:
        return False
    if np.any(np.not_equal(layer.input_dilation or 1, 1)):
        return True
    padding = layer.padding
    if isinstance(padding, str):
        alone = set(layer.kernel_size) == {1} and np.all(np.equal(layer.strides or 1, 1))
        return padding.upper() not in ("VALID", "CIRCULAR") and not alone
    return any(np.any(each) for each in (padding if isinstance(padding, Sequence) else [padding]))


def _misfit(item: PerChannel, channels: int) -> ValueError:
    return ValueError(
        f"{len(item.scale)} channels are normalised beside a layer that has {channels}."
    )
