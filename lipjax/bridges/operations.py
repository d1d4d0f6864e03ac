"""The operations of ONNX and PyTorch in JAX: one table for both.

The arrays are as in these formats: a batch axis in front, then the channels, then the axes of
space. Every setting is a plain number or a tuple of numbers, found when a file is read. What stands
here is made of operations that `lipjax.trace` can read wherever there is a choice: a flipped kernel
instead of a transposed convolution, slices instead of an index, a product instead of a loop.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lipjax.activations import clipped_maxmin, maxmin

Pairs = Sequence[tuple[int, int]]


# ------------------------------------------------------------------------------------------ affine


def convolution(x, kernel, bias=None, *, strides, padding: Pairs, dilation, groups: int):
    """Kernel ``(outputs, inputs / groups, *window)``; of one axis of space or more."""
    y = lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=_layout(x.ndim),
        feature_group_count=groups,
    )
    return y if bias is None else y + _per_channel(bias, y.ndim)


def transposed_convolution(
    x, kernel, bias=None, *, strides, padding: Pairs, dilation, groups: int, more: Sequence[int]
):
    """The transpose of a convolution, kernel ``(inputs, outputs / groups, *window)``.

    Args:
        padding: of the convolution that it is the transpose of: so much is cut off the result.
        more: places that are added at the end of each axis of space.
    """
    inputs, outputs, *window = kernel.shape
    space = tuple(range(2, x.ndim))
    flipped = jnp.flip(kernel, space).reshape(groups, inputs // groups, outputs, *window)
    flipped = jnp.swapaxes(flipped, 1, 2).reshape(groups * outputs, inputs // groups, *window)
    extents = [d * (k - 1) for d, k in zip(dilation, window, strict=True)]
    around = [
        (extent - low, extent - high + end)
        for extent, (low, high), end in zip(extents, padding, more, strict=True)
    ]
    y = lax.conv_general_dilated(
        x,
        flipped,
        (1,) * len(window),
        around,
        lhs_dilation=strides,
        rhs_dilation=dilation,
        dimension_numbers=_layout(x.ndim),
        feature_group_count=groups,
    )
    return y if bias is None else y + _per_channel(bias, y.ndim)


def _layout(rank: int) -> tuple[str, str, str]:
    space = "DHW"[-(rank - 2) :]
    return f"NC{space}", f"OI{space}", f"NC{space}"


def _per_channel(array, rank: int):
    return jnp.reshape(array, (1, -1, *(1 for _ in range(rank - 2))))


def batch_norm(x, mean, variance, scale=None, shift=None, *, epsilon: float):
    """``(x - mean) / sqrt(variance + epsilon) * scale + shift``, per channel, in inference."""
    factor = lax.rsqrt(variance + epsilon)
    factor = factor if scale is None else factor * scale
    y = (x - _per_channel(mean, x.ndim)) * _per_channel(factor, x.ndim)
    return y if shift is None else y + _per_channel(shift, x.ndim)


# ----------------------------------------------------------------------------------------- pooling


def pooled_padding(
    sizes: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    padding: Pairs,
    dilation: Sequence[int],
    ceil: bool,
) -> tuple[tuple[int, int], ...]:
    """The padding with what rounding up adds at the end.

    A last window that would begin behind the given padding is left out, as in PyTorch and ONNX.
    """
    found = []
    for n, k, s, (low, high), d in zip(sizes, window, strides, padding, dilation, strict=True):
        extent = d * (k - 1) + 1
        room = n + low + high - extent
        count = room // s + 1
        if ceil:
            count = -(-room // s) + 1
            count -= (count - 1) * s >= n + low
        found.append((low, max(high, (count - 1) * s + extent - n - low)))
    return tuple(found)


def max_pool(x, *, window, strides, padding: Pairs, dilation):
    """Padding never wins."""
    return lax.reduce_window(
        x,
        -jnp.inf,
        lax.max,
        (1, 1, *window),
        (1, 1, *strides),
        ((0, 0), (0, 0), *padding),
        window_dilation=(1, 1, *dilation),
    )


def average_pool(
    x, *, window, strides, padding: Pairs, dilation, counted: Pairs, divisor: int | None = None
):
    """Sums of windows, divided by how many places of each count.

    Args:
        padding: all of it, with what rounding up adds.
        counted: so much of the padding counts as places.
        divisor: divides instead.
    """
    total = lax.reduce_window(
        x,
        0.0,
        lax.add,
        (1, 1, *window),
        (1, 1, *strides),
        ((0, 0), (0, 0), *padding),
        window_dilation=(1, 1, *dilation),
    )
    if divisor is not None:
        return total / divisor
    counts: np.ndarray = np.ones(())
    for axis, (k, s, (low, _), d, (first, last)) in enumerate(
        zip(window, strides, padding, dilation, counted, strict=True)
    ):
        n = x.shape[axis + 2]
        places = np.arange(total.shape[axis + 2])[:, None] * s + np.arange(k) * d - low
        own = np.sum((places >= -first) & (places < n + last), axis=1)
        counts = counts[..., None] * own
    if np.all(counts == counts.flat[0]):
        return total / float(counts.flat[0])
    return total / jnp.asarray(counts, total.dtype)


def adaptive_average_pool(x, *, sizes: Sequence[int]):
    """Means of windows that share each axis of space as evenly as whole numbers can."""
    for axis, m in enumerate(sizes, start=2):
        n = x.shape[axis]
        if n == m:
            continue
        starts = np.arange(m) * n // m
        ends = -(-(np.arange(m) + 1) * n // m)
        places = np.arange(n)
        inside = (places >= starts[:, None]) & (places < ends[:, None])
        weights = jnp.asarray(inside / (ends - starts)[:, None], x.dtype)
        y = lax.dot_general(x, weights, (((axis,), (1,)), ((), ())))
        x = jnp.moveaxis(y, -1, axis)
    return x


# ------------------------------------------------------------------------------- moves and sums


def padded(x, *, widths: Pairs, mode: str, value: float = 0.0):
    """`mode` as ONNX names it: constant, reflect, edge or wrap. Constants cut where negative."""
    if mode == "constant":
        return lax.pad(x, jnp.asarray(value, x.dtype), [(low, high, 0) for low, high in widths])
    return jnp.pad(x, widths, mode=mode)


def sliced(x, *, axis: int, start: int, stop: int, step: int):
    """``x[start:stop:step]`` of an axis; from `start` downwards where the step is negative."""
    if step > 0:
        return lax.slice_in_dim(x, start, max(stop, start), step, axis)
    count = max(-((start - stop) // step), 0)
    last = start + (count - 1) * step
    return lax.rev(lax.slice_in_dim(x, last, start + 1, -step, axis), (axis,))


def taken(x, *, indices: tuple, shape: tuple[int, ...], axis: int):
    """Entries of an axis at these places, which get the axes `shape`."""
    if not shape:
        return lax.index_in_dim(x, indices[0], axis, keepdims=False)
    return jnp.take(x, np.reshape(np.asarray(indices, np.int32), shape), axis, mode="clip")


def concatenated(*parts, axis: int):
    return jnp.concatenate(parts, axis)


def summed(x, *, axes: tuple[int, ...], keep: bool):
    return jnp.sum(x, axes, keepdims=keep)


def mean(x, *, axes: tuple[int, ...], keep: bool):
    average = jnp.sum(x, axes) / math.prod(x.shape[axis] for axis in axes)
    kept = tuple(1 if axis in axes else n for axis, n in enumerate(x.shape))
    return jnp.reshape(average, kept) if keep else average


# -------------------------------------------------------------------------------- activations


def clip(x, *, low: float | None, high: float | None):
    """Between two numbers, either of which may be absent."""
    if low == 0 and high is None:
        return jax.nn.relu(x)
    return jnp.clip(x, low, high)


def prelu(x, slope):
    """``slope * x`` below 0, as a sum that lipjax has bounds for whatever the slopes are."""
    return jax.nn.relu(x) + slope * jnp.minimum(x, 0.0)


def celu(x, *, alpha: float):
    """``max(x, 0) + min(alpha (exp(x / alpha) - 1), 0)``, as an ELU between two scales.

    Raises:
        ValueError: alpha <= 0, where that is another function.
    """
    if not alpha > 0:
        raise ValueError(f"a CELU has alpha > 0, got {alpha}.")
    return alpha * jax.nn.elu(x / alpha)


def hard_sigmoid(x, *, alpha: float, beta: float):
    return jnp.clip(alpha * x + beta, 0.0, 1.0)


def power(x, *, exponent: float):
    return x ** (int(exponent) if float(exponent).is_integer() else exponent)


def paired(x, *thresholds, axis: int):
    """MaxMin of the two halves of an axis; with thresholds the clipped one."""
    last = jnp.moveaxis(x, axis, -1)
    ends = [jnp.moveaxis(end, axis, -1)[0] for end in thresholds]
    y = clipped_maxmin(last, *ends) if ends else maxmin(last)
    return jnp.moveaxis(y, -1, axis)


def _cast(x, *, dtype: str):
    return x.astype(dtype)


def _reshape(x, *, shape):
    return jnp.reshape(x, shape)


def _transpose(x, *, order):
    return jnp.transpose(x, order)


def _broadcast(x, *, shape):
    return jnp.broadcast_to(x, shape)


# What a step of a program may do, by name.
OPERATIONS: dict[str, Callable] = {
    "abs": jnp.abs,
    "adaptive_average_pool": adaptive_average_pool,
    "add": jnp.add,
    "average_pool": average_pool,
    "batch_norm": batch_norm,
    "broadcast": _broadcast,
    "cast": _cast,
    "celu": celu,
    "clip": clip,
    "concatenate": concatenated,
    "convolution": convolution,
    "div": jnp.divide,
    "elu": jax.nn.elu,
    "erf": lax.erf,
    "exp": jnp.exp,
    "gelu": jax.nn.gelu,
    "hard_sigmoid": hard_sigmoid,
    "hard_swish": jax.nn.hard_swish,
    "leaky_relu": jax.nn.leaky_relu,
    "log": jnp.log,
    "log_softmax": jax.nn.log_softmax,
    "matmul": jnp.matmul,
    "max_pool": max_pool,
    "maximum": jnp.maximum,
    "mean": mean,
    "minimum": jnp.minimum,
    "mish": jax.nn.mish,
    "mul": jnp.multiply,
    "neg": jnp.negative,
    "pad": padded,
    "paired": paired,
    "power": power,
    "prelu": prelu,
    "reciprocal": jnp.reciprocal,
    "relu": jax.nn.relu,
    "reshape": _reshape,
    "selu": jax.nn.selu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "slice": sliced,
    "softmax": jax.nn.softmax,
    "softplus": jax.nn.softplus,
    "softsign": jax.nn.soft_sign,
    "sqrt": jnp.sqrt,
    "sub": jnp.subtract,
    "sum": summed,
    "take": taken,
    "tanh": jnp.tanh,
    "transpose": _transpose,
    "transposed_convolution": transposed_convolution,
}


def same_padding(
    sizes: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
    upper: bool,
) -> tuple[tuple[int, int], ...]:
    """The padding with which ``ceil(n / stride)`` places are left; an odd one at the end if
    `upper`."""
    found = []
    for n, k, s, d in zip(sizes, window, strides, dilation, strict=True):
        total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        small = total // 2
        found.append((small, total - small) if upper else (total - small, small))
    return tuple(found)
