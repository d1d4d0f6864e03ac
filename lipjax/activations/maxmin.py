"""MaxMin: channels in two halves ``(a, b)``, sorted pair by pair, and cut at thresholds."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lipjax.activations.base import Rule, clip_above, hinge, ratio, register, relaxed, rule, varies
from lipjax.activations.clip import clip_pieces, clip_relaxation, clip_slopes
from lipjax.activations.pieces import Pieces
from lipjax.activations.slopes import PairSlopes
from lipjax.graph.linear import larger, smaller


@jax.jit
def maxmin(z: jax.Array) -> jax.Array:
    """``concat(max(a, b), min(a, b))`` of the two halves of the last axis."""
    a, b = halves(z)
    return jnp.concatenate([larger(a, b), smaller(a, b)], axis=-1)


@jax.jit
def clipped_maxmin(z: jax.Array, upper: jax.Array, lower: jax.Array) -> jax.Array:
    """``concat(min(max(a, b), upper), max(min(a, b), lower))``; a batch may stand in front."""
    a, b = halves(z)
    first = clip_above(larger(a, b), upper)
    second = -clip_above(-smaller(a, b), -lower)
    return jnp.concatenate([first, second], axis=-1)


class MaxMin(nnx.Module):
    """``concat(max(a, b), min(a, b))``. Never constant on a box that varies."""

    def __call__(self, z: jax.Array) -> jax.Array:
        return maxmin(z)


class ClippedMaxMin(nnx.Module):
    """``concat(min(max(a, b), upper), max(min(a, b), lower))`` with learnable thresholds.

    The first output of a pair is constant on the box iff ``max(lower_a, lower_b) >= upper``, the
    second iff ``min(upper_a, upper_b) <= lower``.

    Args:
        shape: shape of one example's activation, an even number of channels.
        upper, lower: initial thresholds; the parameters have shape ``(..., channels / 2)``.
    """

    def __init__(self, shape: int | Sequence[int], upper: float = 1.0, lower: float = -1.0):
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if shape[-1] % 2:
            raise ValueError(
                f"ClippedMaxMin pairs channels and needs an even number of them, got shape {shape}."
            )
        half = (*shape[:-1], shape[-1] // 2)
        self.upper = nnx.Param(jnp.full(half, upper, jnp.float32))
        self.lower = nnx.Param(jnp.full(half, lower, jnp.float32))

    def __call__(self, z: jax.Array) -> jax.Array:
        return clipped_maxmin(z, self.upper[...], self.lower[...])


def halves(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two halves of the last axis.

    Raises:
        ValueError: its size is odd.
    """
    if z.shape[-1] % 2:
        raise ValueError(
            f"MaxMin pairs channels and needs an even number of them, got an input of {z.shape}."
        )
    a, b = jnp.split(z, 2, axis=-1)
    return a, b


@rule("top", "bottom")
class Pairs(Rule):
    """MaxMin; `top` cuts the larger, `bottom` the smaller of each pair, None cuts nothing."""

    top: Any
    bottom: Any

    @property
    def kind(self) -> str:
        return "MaxMin" if self.top is None and self.bottom is None else "ClippedMaxMin"

    @property
    def selects(self) -> bool:
        return True

    def __call__(self, z: jax.Array) -> jax.Array:
        a, b = halves(z)
        first, second = larger(a, b), smaller(a, b)
        if self.top is not None:
            first = smaller(first, jnp.broadcast_to(self.top, first.shape).astype(z.dtype))
        if self.bottom is not None:
            bottom = jnp.broadcast_to(self.bottom, second.shape).astype(z.dtype)
            second = -smaller(-second, -bottom)
        return jnp.concatenate([first, second], axis=-1)

    def active(self, lower, upper, as_paper=False):
        if as_paper:  # the paper's code drops no row in front of a MaxMin
            return jnp.ones(lower.shape, bool)
        first, second = halves(varies(*self.interval(lower, upper)))
        lower_a, lower_b = halves(lower)
        upper_a, upper_b = halves(upper)
        # Where the order is fixed the pair is a permutation: a row feeds one output, goes with it.
        # A tie for sure makes both orders true; either reading is a permutation of constants.
        a_is_max = lower_a >= upper_b
        b_is_max = lower_b >= upper_a
        either = first | second
        keep_a = jnp.where(a_is_max, first, jnp.where(b_is_max, second, either))
        keep_b = jnp.where(b_is_max, first, jnp.where(a_is_max, second, either))
        return jnp.concatenate([keep_a, keep_b], axis=-1)

    def stable(self, lower, upper):
        lower_a, lower_b = halves(lower)
        upper_a, upper_b = halves(upper)
        ordered = (lower_a >= upper_b) | (lower_b >= upper_a)
        first = second = ordered
        if self.top is not None:
            first = ordered & (larger(upper_a, upper_b) <= self.top)
        if self.bottom is not None:
            second = ordered & (smaller(lower_a, lower_b) >= self.bottom)
        return jnp.concatenate([first, second], axis=-1)

    def relaxations(self, center, lower, upper, radius, after, arithmetic):
        first = _pair_relaxation(center, lower, upper, radius, arithmetic)
        if self.top is None and self.bottom is None:
            return (first,)
        sort = Pairs(None, None)
        bottoms, tops = self._ends(center)
        center, lower, upper = sort(center), sort(lower), sort(upper)
        return (
            first,
            clip_relaxation(center, lower, upper, bottoms, tops, radius, arithmetic),
        )

    def pieces(self, center, lower, upper, arithmetic):
        keep_a, keep_b = halves(self.active(lower, upper))
        first = _pair_pieces(center, lower, upper, keep_a & keep_b, arithmetic)
        if self.top is None and self.bottom is None:
            return (first,)
        sort = Pairs(None, None)
        ends = self._ends(center)
        return first, clip_pieces(sort(center), sort(lower), sort(upper), *ends)

    def jacobian(self, lower, upper, arithmetic):
        lower_a, lower_b = halves(lower)
        upper_a, upper_b = halves(upper)
        low = jnp.where(lower_a >= upper_b, jnp.ones_like(lower_a), -1.0)
        high = jnp.where((upper_a <= lower_b) & (low < 0), -jnp.ones_like(lower_a), 1.0)
        pairs = PairSlopes.between(low, high, arithmetic)
        if self.top is None and self.bottom is None:
            return (pairs,)
        sort = Pairs(None, None)
        return pairs, clip_slopes(sort(lower), sort(upper), *self._ends(lower), arithmetic)

    def _ends(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where sorted pairs of z's shape are cut: from below, and from above."""
        a, b = halves(jnp.ones_like(z))
        top = jnp.inf * a if self.top is None else jnp.broadcast_to(self.top, a.shape)
        bottom = -jnp.inf * b if self.bottom is None else jnp.broadcast_to(self.bottom, b.shape)
        bottoms = jnp.concatenate([-jnp.inf * a, bottom.astype(a.dtype)], axis=-1)
        tops = jnp.concatenate([top.astype(a.dtype), jnp.inf * b], axis=-1)
        return bottoms, tops

    def rounding(self, error):
        either = jnp.maximum(*halves(error))
        return jnp.concatenate([either, either], axis=-1)

    def sparsity(self, lower, upper):
        total = jnp.zeros((), lower.dtype)
        if self.top is not None:
            total += jnp.mean(jax.nn.relu(self.top - jnp.maximum(*halves(lower))))
        if self.bottom is not None:
            total += jnp.mean(jax.nn.relu(jnp.minimum(*halves(upper)) - self.bottom))
        return total

    def instability(self, lower, upper):
        lower_a, lower_b = halves(lower)
        upper_a, upper_b = halves(upper)
        total = hinge(lower_a - upper_b, upper_a - lower_b, 0.0)
        if self.top is not None:
            largest = jnp.maximum(upper_a, upper_b)
            total += hinge(jnp.maximum(lower_a, lower_b), largest, self.top)
        if self.bottom is not None:
            largest = jnp.minimum(upper_a, upper_b)
            total += hinge(jnp.minimum(lower_a, lower_b), largest, self.bottom)
        return total

    def described(self):
        if type(self) is not Pairs:  # what another class computes is not known
            return super().described()
        return {"kind": "maxmin", "top": self.top, "bottom": self.bottom}


def _pair_relaxation(z, lower, upper, radius, arithmetic):
    """``(a, b) -> ((a + b) + |a - b|, (a + b) - |a - b|) / 2``, by the slopes of ``|a - b|``."""
    a, b = halves(z)
    lower_a, lower_b = halves(lower)
    upper_a, upper_b = halves(upper)
    t = a - b
    least, most = arithmetic.widened(lower_a - upper_b, upper_a - lower_b, 0.0)
    # From t >= 0: slope 1 up to the kink, then falling towards the far end. t < 0: its mirror
    # image.
    far = jnp.where(t >= 0, jnp.maximum(-least, 0.0), jnp.maximum(most, 0.0))
    inner = ratio(jnp.abs(t) - far, jnp.abs(t) + far)
    sign = jnp.where(t >= 0, 1.0, -1.0)
    a_first = lower_a >= upper_b
    b_first = lower_b >= upper_a
    fixed = a_first | b_first
    one = jnp.where(a_first, 1.0, jnp.where(b_first, -1.0, sign))
    other = jnp.where(fixed, one, sign * inner)
    low = jnp.minimum(one, other)
    high = jnp.maximum(one, other)
    unit = 1 / math.sqrt(2)
    return relaxed(low, high, fixed, t, least, most, unit, radius, arithmetic, paired=True)


def _pair_pieces(z, lower, upper, free, arithmetic) -> Pieces:
    """``|a - b|`` of each pair; of a fixed order, where not both count in the ball, its sign."""
    a, b = halves(z)
    lower_a, lower_b = halves(lower)
    upper_a, upper_b = halves(upper)
    t = a - b
    least, most = arithmetic.widened(lower_a - upper_b, upper_a - lower_b, 0.0)
    none = jnp.zeros_like(t)
    exact = jnp.where(lower_a >= upper_b, 1.0, jnp.where(lower_b >= upper_a, -1.0, none))
    slopes = (-1.0, 1.0)
    return Pieces(t, least, most, (none,), slopes, slopes, free, exact, paired=True)


register(maxmin, lambda: Pairs(None, None))
register(clipped_maxmin, Pairs)
