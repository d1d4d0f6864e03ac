"""ReLU, clipped ReLU and clipping: ``min(max(z, bottom), top)``, entry by entry."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipjax.activations.base import Rule, clip_above, hinge, ratio, register, relaxed, rule, varies
from lipjax.activations.pieces import Pieces
from lipjax.activations.slopes import Slopes
from lipjax.graph import register_primitive
from lipjax.graph.linear import larger, smaller
from lipjax.graph.trace import Known, Ref

# Weight of the upper threshold's hinge in the sparsity loss (METHOD 3, docs/method.md).
UPPER_SHARE = 0.1


@jax.jit
def clipped_relu(z: jax.Array, threshold: jax.Array) -> jax.Array:
    """``min(max(z, 0), threshold)``; a batch may stand in front.

    Raises:
        ValueError: thresholds that do not fit the last axes of z.
    """
    return clip_above(jax.nn.relu(z), threshold)


class ReLU(nnx.Module):
    """``max(z, 0)``. Constant on the box iff ``upper <= 0``."""

    def __call__(self, z: jax.Array) -> jax.Array:
        return jax.nn.relu(z)


class ClippedReLU(nnx.Module):
    """``min(max(z, 0), threshold)`` with one learnable threshold per neuron.

    Constant on the box iff ``upper <= 0`` or ``lower >= threshold``.

    Args:
        shape: shape of one example's activation, e.g. ``(height, width, channels)``.
        threshold: initial value of every threshold; must be >= 0. Training keeps them >= 0
            (`project`).
    """

    def __init__(self, shape: int | Sequence[int], threshold: float = 1.0):
        if not threshold >= 0:
            raise ValueError(f"ClippedReLU needs a threshold >= 0, got {threshold}.")
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.threshold = nnx.Param(jnp.full(shape, threshold, jnp.float32))

    def __call__(self, z: jax.Array) -> jax.Array:
        return clipped_relu(z, self.threshold[...])


@rule("bottom", "top")
class Clip(Rule):
    """``min(max(z, bottom), top)``; an end that is None does not clip.

    Attributes:
        bottom, top: broadcastable to z, or None. The float 0.0 as bottom makes it a ReLU.
        rectifies: is the bottom the number 0?
    """

    bottom: Any
    top: Any
    rectifies: bool = False

    @property
    def kind(self) -> str:
        if not self.rectifies:
            return "Clip"
        return "ReLU" if self.top is None else "ClippedReLU"

    @property
    def selects(self) -> bool:
        return True

    def __call__(self, z: jax.Array) -> jax.Array:
        if self.rectifies:
            z = jax.nn.relu(z)
        elif self.bottom is not None:
            z = larger(z, jnp.broadcast_to(self.bottom, z.shape).astype(z.dtype))
        if self.top is None:
            return z
        return smaller(z, jnp.broadcast_to(self.top, z.shape).astype(z.dtype))

    def _ends(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        bottom = -jnp.inf if self.bottom is None else self.bottom
        top = jnp.inf if self.top is None else self.top
        return jnp.asarray(0.0 if self.rectifies else bottom, z.dtype), jnp.asarray(top, z.dtype)

    def active(self, lower, upper, as_paper=False):
        return varies(*self.interval(lower, upper))

    def stable(self, lower, upper):
        bottom, top = self._ends(lower)
        return (lower >= bottom) & (upper <= top) & (upper >= lower)

    def relaxations(self, center, lower, upper, radius, after, arithmetic):
        bottom, top = self._ends(center)
        return (clip_relaxation(center, lower, upper, bottom, top, radius, arithmetic),)

    def pieces(self, center, lower, upper, arithmetic):
        return (clip_pieces(center, lower, upper, *self._ends(center)),)

    def jacobian(self, lower, upper, arithmetic):
        return (clip_slopes(lower, upper, *self._ends(lower), arithmetic),)

    def rounding(self, error):
        return error  # comparing and selecting round nothing, and no output moves further

    def sparsity(self, lower, upper):
        total = jnp.zeros((), lower.dtype)
        bottom, top = self._ends(lower)
        if self.rectifies or self.bottom is not None:
            total += jnp.mean(jax.nn.relu(upper - bottom))
        if self.top is not None:
            total += UPPER_SHARE * jnp.mean(jax.nn.relu(top - lower))
        return total

    def instability(self, lower, upper):
        total = jnp.zeros((), lower.dtype)
        bottom, top = self._ends(lower)
        if self.rectifies or self.bottom is not None:
            total += hinge(lower, upper, bottom)
        if self.top is not None:
            total += hinge(lower, upper, top)
        return total

    def described(self):
        if type(self) is not Clip:  # what another class computes is not known
            return super().described()
        bottom = 0.0 if self.rectifies else self.bottom
        return {"kind": "clip", "bottom": bottom, "top": self.top}

    def then(self, following):
        if type(following) is not Clip:
            return None
        if following.bottom is None and not following.rectifies:
            if self.top is None:
                return Clip(self.bottom, following.top, self.rectifies)
            if following.top is None:
                return self
            return Clip(self.bottom, jnp.minimum(self.top, following.top), self.rectifies)
        if self == Clip(None, None):
            return following
        return None


def clip_relaxation(z, lower, upper, bottom, top, radius, arithmetic):
    """Of ``clip(z, bottom, top)`` on a box, seen from z.

    On each side of the center the extreme slopes are at the center, at the end of the box, or at
    the corner of the clip beyond a flat part.
    """

    def clip(t):
        return jnp.minimum(jnp.maximum(t, bottom), top)

    def extremes(end, near, far):
        """Smallest and largest slope between z and `end`; behind `near` it is flat on z's side."""
        at_end = ratio(clip(end) - clip(z), end - z)
        toward = jnp.sign(end - z)
        flat = (z - near) * toward < 0  # z lies before the first corner: flat, then steep
        beyond = (z - far) * toward >= 0  # z lies behind the last corner: flat for ever
        corner = jnp.where((end - far) * toward > 0, far, end)
        steepest = ratio(clip(corner) - clip(z), corner - z)
        low = jnp.where(flat | beyond, 0.0, at_end)
        high = jnp.where(beyond, 0.0, jnp.where(flat, steepest, 1.0))
        none = end == z
        return jnp.where(none, jnp.inf, low), jnp.where(none, -jnp.inf, high)

    right = extremes(upper, bottom, top)
    left = extremes(lower, top, bottom)
    low = jnp.minimum(right[0], left[0])
    high = jnp.maximum(right[1], left[1])
    constant = clip(lower) == clip(upper)
    linear = (lower >= bottom) & (upper <= top)
    low = jnp.where(constant, 0.0, jnp.where(linear, 1.0, low))
    high = jnp.where(constant, 0.0, jnp.where(linear, 1.0, high))
    return relaxed(low, high, constant | linear, z, lower, upper, 1.0, radius, arithmetic)


def clip_pieces(center, lower, upper, bottom, top) -> Pieces:
    """``clip(z, bottom, top)`` on a box; where that is constant the slope is 0."""
    first = jnp.broadcast_to(bottom, center.shape)
    second = larger(jnp.broadcast_to(top, center.shape), first)
    clipped = (smaller(larger(end, first), second) for end in (lower, upper))
    slopes = (0.0, 1.0, 0.0)
    none = jnp.zeros_like(center)
    return Pieces(
        center, lower, upper, (first, second), slopes, slopes, varies(*clipped), exact=none
    )


def clip_slopes(lower, upper, bottom, top, arithmetic) -> Slopes:
    """Of ``clip(z, bottom, top)`` between any two points of a box."""
    constant = (upper <= bottom) | (lower >= top) | (bottom >= top)
    linear = (lower >= bottom) & (upper <= top) & ~constant
    low = jnp.where(linear, jnp.ones_like(lower), 0.0)
    high = jnp.where(constant, jnp.zeros_like(lower), 1.0)
    return Slopes.between(low, high, arithmetic)


register(clipped_relu, lambda threshold: Clip(None, threshold, rectifies=True))


def _is_zero(value) -> bool:
    return not isinstance(value, jax.core.Tracer) and not jnp.ndim(value) and float(value) == 0


@register_primitive("max", "min")
def _extreme(reader, equation, inputs):
    """With a number or an array a clip; of two values of the example a pair of MaxMin."""
    from lipjax.activations.maxmin import Pairs

    first, second = inputs
    largest = equation.primitive.name == "max"
    out = equation.outvars[0].aval
    if isinstance(first, Known):
        first, second = second, first
    if isinstance(first, Ref) and isinstance(second, Known):
        if tuple(reader.shape(first)) != tuple(out.shape):
            return None
        if largest and _is_zero(second.value):
            made = Clip(None, None, rectifies=True)
        else:
            made = Clip(second.value, None) if largest else Clip(None, second.value)
        return reader.activation(made, first, out.shape, out.dtype, second.roundings)
    if not (isinstance(first, Ref) and isinstance(second, Ref)) or not out.shape:
        return None
    size = out.shape[-1]
    both = (*out.shape[:-1], 2 * size)
    first, second = sorted((first, second), key=lambda ref: ref.node)  # one pair for max and min
    joined = reader.moved([first, second], both, "concatenate", dimension=len(both) - 1)
    key = ("pairs", joined.node)
    if key not in reader.seen:
        reader.seen[key] = reader.activation(Pairs(None, None), joined, both, out.dtype)
    start = (*(0 for _ in both[:-1]), 0 if largest else size)
    limit = (*both[:-1], size if largest else 2 * size)
    bounds = {"start_indices": start, "limit_indices": limit, "strides": None}
    return reader.moved([reader.seen[key]], out.shape, "slice", **bounds)


@register_primitive("clamp")
def _clamped(reader, equation, inputs):
    bottom, value, top = inputs
    if not (isinstance(bottom, Known) and isinstance(value, Ref) and isinstance(top, Known)):
        return None
    out = equation.outvars[0].aval
    made = Clip(bottom.value, top.value)
    return reader.activation(
        made, value, out.shape, out.dtype, max(bottom.roundings, top.roundings)
    )


@register_primitive("select_n")
def _selected(reader, equation, inputs):
    """``where(z > c, z, c)`` and its like: a clip that is written as a choice."""
    from lipjax.graph.trace import Test

    if len(inputs) != 3 or not isinstance(inputs[0], Test):
        return None
    test, otherwise, chosen = inputs
    node = Ref(test.node)
    out = equation.outvars[0].aval
    if isinstance(chosen, Known) == isinstance(otherwise, Known):
        return None
    constant = chosen if isinstance(chosen, Known) else otherwise
    kept = otherwise if isinstance(chosen, Known) else chosen
    if not _same(constant.value, test.threshold.value):
        return None
    # where(z > c, z, c) and where(z < c, c, z) are max; the other two are min.
    largest = test.above == (kept is chosen)
    if kept != node and not _clips(reader, kept, node, constant.value, largest):
        return None
    node = kept
    if largest and _all_zero(constant.value):
        made = Clip(None, None, rectifies=True)
    else:
        made = Clip(constant.value, None) if largest else Clip(None, constant.value)
    roundings = max(constant.roundings, test.threshold.roundings)
    return reader.activation(made, node, out.shape, out.dtype, roundings)


def _clips(reader, kept, node: Ref, end, largest: bool) -> bool:
    """Is a value that node, clipped at its other side, at a number that `end` leaves as it is?

    So that ``where(z > 1, 1, where(z < -1, -1, z))`` is ``min(max(z, -1), 1)``.
    """
    found = reader.nodes[kept.node]
    rule = getattr(found, "rule", None)
    if type(rule) is not Clip or found.inputs != (node.node,):
        return False
    bottom = 0.0 if rule.rectifies else rule.bottom
    other, free = (rule.top, bottom) if largest else (bottom, rule.top)
    if other is None or free is not None or isinstance(other, jax.core.Tracer):
        return False
    fits = np.asarray(end) <= np.asarray(other) if largest else np.asarray(end) >= other
    return bool(np.all(fits))


def _same(first, second) -> bool:
    if isinstance(first, jax.core.Tracer) or isinstance(second, jax.core.Tracer):
        return first is second
    with jax.ensure_compile_time_eval():
        return bool(jnp.all(jnp.asarray(first) == jnp.asarray(second)))


def _all_zero(value) -> bool:
    return not isinstance(value, jax.core.Tracer) and _same(value, 0.0)
