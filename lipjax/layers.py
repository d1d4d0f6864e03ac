"""Layers that Flax has not: flattening, sums of branches, average pooling, rearrangements of
pixels, normalisation."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Flatten(nnx.Module):
    """Flattens the last `ndim` axes: one example ``(H, W, C) -> (H*W*C,)`` or a batch of them,
    row-major."""

    def __init__(self, ndim: int = 3):
        self.ndim = ndim

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.ndim < self.ndim:
            raise ValueError(
                f"Flatten(ndim={self.ndim}) needs at least {self.ndim} axes, got shape {x.shape}."
            )
        return x.reshape(*x.shape[: x.ndim - self.ndim], math.prod(x.shape[x.ndim - self.ndim :]))


class Residual(nnx.Module):
    """``x + f(x)``, f the given layers in order, which keep the shape. Bounds go through f and
    through the sum.

    A ball of radius r becomes one of r plus what f makes of it, a box the sum of the boxes, and in
    modes "linear" and "rows" a row goes back through both ways at once.

    Args:
        layers: modules or functions that keep the shape; other Residuals, too.

    Raises:
        ValueError: when called, if they change the shape.
    """

    def __init__(self, *layers):
        self.branch = nnx.Sequential(*layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        return joined(x, self.branch(x))


def joined(x: jax.Array, y: jax.Array) -> jax.Array:
    """Their sum.

    Raises:
        ValueError: if they differ in shape.
    """
    if x.shape != y.shape:
        raise ValueError(
            f"the layers of a Residual must keep the shape: {x.shape} became {y.shape}."
        )
    return x + y


class AveragePool(nnx.Module):
    """Mean over windows of the two axes before the channels. No padding.

    Computed in float32 at least, whatever the input's type, and returned in that type: a sum of
    ones that is kept in bfloat16 ends at 256.

    Args:
        window: ``(height, width)`` or one number for both.
        strides: likewise; the window's size by default.
    """

    def __init__(self, window: int | Sequence[int], strides: int | Sequence[int] | None = None):
        self.window = (window, window) if isinstance(window, int) else tuple(window)
        strides = self.window if strides is None else strides
        self.strides = (strides, strides) if isinstance(strides, int) else tuple(strides)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = _widened(x)
        scale = jnp.asarray(1 / math.prod(self.window), wide.dtype)
        return _window_sum(self.window, self.strides, scale, wide).astype(x.dtype)


def _widened(x):
    """x in float32 at least, in which sums are kept.

    Raises:
        TypeError: x is not floating.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"expected a floating input, got {x.dtype}: divide 0..255 integers by 255.")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _window_sum(window, strides, scale, x):
    if x.ndim < 3 or x.shape[-3] < window[0] or x.shape[-2] < window[1]:
        raise ValueError(f"a pooling window of {window} does not fit an input of shape {x.shape}.")
    batch = (1,) * (x.ndim - 3)
    # of NumPy: under `jit` a JAX constant hides that this is a sum, which has a transpose
    zero = np.zeros((), x.dtype)
    total = jax.lax.reduce_window(
        x, zero, jax.lax.add, (*batch, *window, 1), (*batch, *strides, 1), [(0, 0)] * x.ndim
    )
    return scale.astype(x.dtype) * total


class SpaceToDepth(nnx.Module):
    """Patches become pixels: ``(.., H, W, C) -> (.., H / p, W / p, p p C)``, also known as
    PixelUnshuffle. Moves numbers only, so its norm is 1.

    Args:
        patch: p, the side of a patch.

    Raises:
        ValueError: when called, if patches do not tile the image.
    """

    def __init__(self, patch: int):
        self.patch = patch

    def __call__(self, x: jax.Array) -> jax.Array:
        *batch, height, width, channels = x.shape
        p = self.patch
        if height % p or width % p:
            raise ValueError(f"patches of {p} do not tile images of {height} by {width}.")
        patches = x.reshape(*batch, height // p, p, width // p, p, channels)
        patches = jnp.moveaxis(patches, -4, -3)
        return patches.reshape(*batch, height // p, width // p, p * p * channels)


class Shift(nnx.Module):
    """Four fifths of the channels of ``(.., H, W, C)`` moved by one pixel, a fifth each way; what
    leaves the image comes in on the other side. Moves numbers only, so its norm is 1.

    Between products with the channels of one pixel (`CayleyLinear`) it does what a convolution's
    window does, after LipNeXt (Hu, Hu and Fredrikson 2026, arXiv 2601.18513).

    Raises:
        ValueError: when called, with fewer than 5 channels, of which none would move.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        share = x.shape[-1] // 5
        if not share:
            raise ValueError(f"Shift moves fifths of the channels, got {x.shape[-1]} of them.")
        moves = ((1, -3), (-1, -3), (1, -2), (-1, -2))
        cut = [share * i for i in range(1, 5)]
        *parts, rest = jnp.split(x, cut, axis=-1)
        moved = [jnp.roll(part, by, axis) for part, (by, axis) in zip(parts, moves, strict=True)]
        return jnp.concatenate([*moved, rest], axis=-1)


class Normalize(nnx.Module):
    """``(x - mean) / deviation`` per channel, inside the network: epsilon stays a radius on pixels
    in [0, 1].

    Computed as ``x * scale + shift`` with float32 constants, in float32 at least, and returned in
    the input's type. No parameters: nothing here is trained.

    Args:
        mean, deviation: one number per channel, or one for all of them.

    Raises:
        ValueError: numbers that are not finite, deviations that are not positive, lengths that
            differ.
    """

    def __init__(self, mean: Sequence[float], deviation: Sequence[float]):
        mean = tuple(mean)
        deviation = tuple(deviation)
        if len(mean) != len(deviation) or not mean:
            raise ValueError(
                f"mean and deviation need one number per channel each, got {mean} and {deviation}."
            )
        if not (
            np.all(np.isfinite(mean)) and np.all(np.isfinite(deviation)) and min(deviation) > 0
        ):
            raise ValueError(
                f"expected finite means and deviations > 0, got {mean} and {deviation}."
            )
        self.scale = tuple(float(np.float32(1 / d)) for d in deviation)
        self.shift = tuple(float(np.float32(-m / d)) for m, d in zip(mean, deviation, strict=True))

    @classmethod
    def of(cls, scale: Sequence[float], shift: Sequence[float]) -> "Normalize":
        """``x * scale + shift``, numbers of any sign, rounded to float32: what a BatchNorm is that
        has stopped learning.

        Raises:
            ValueError: numbers that float32 cannot hold, lengths that differ.
        """
        with np.errstate(over="ignore"):
            rounded = [
                tuple(float(np.float32(number)) for number in numbers) for numbers in (scale, shift)
            ]
        if len(rounded[0]) != len(rounded[1]) or not rounded[0] or not np.all(np.isfinite(rounded)):
            raise ValueError(
                f"expected one finite scale and shift per channel, got {scale} and {shift}."
            )
        layer = cls(mean=(0.0,), deviation=(1.0,))
        layer.scale, layer.shift = rounded
        return layer

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = _widened(x)
        scale, shift = (jnp.asarray(numbers, wide.dtype) for numbers in (self.scale, self.shift))
        return (_scaled(scale, wide) + shift).astype(x.dtype)


def _scaled(scale, x):
    if x.shape[-1] != scale.shape[0] and scale.shape[0] != 1:
        raise ValueError(
            f"{scale.shape[0]} channels are normalised, got an input of shape {x.shape}."
        )
    return x * jax.lax.broadcast_in_dim(scale, x.shape, (x.ndim - 1,))
