"""Activations as a slope plus a bounded error, seen from the center of a box: what is linear stays linear.

Let ``D`` be the change of a quantity from its value at x. For every x' of the ball an activation a does

    D a = M D z + e,    M a known linear map, the error e in a known ball and box,

where M is the middle of the slopes of the chords from the center z to any point of the box in front of a. A neuron whose
box does not meet a kink has e = 0; one whose box barely crosses it has a small e, as only chords *from the center* count:
a certificate compares with the prediction at x, not any two points of the ball.

What follows for a row d on the output of several layers, with ``P_i`` the product of all that is linear behind activation i
(of the input, i = 0): as D of that output is ``P_0 D x + sum_i P_i e_i``,

    <d, D h> <= ||P_0^T d|| epsilon + sum_i max <P_i^T d, e_i>,

one reverse pass and no norm of anything, and the exact norm of the gradient times epsilon as epsilon tends to 0 (`gain`).
Rows of rivals make margins (`margins.linear_gains`), rows of neurons make boxes (`reaches`).

Source: METHOD 5; the idea is LipLT's (Fazlyab et al. 2023, arXiv 2310.00116), which takes the slopes globally, in [0, 1].
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lipjax import activations, deterministic, operators, rounding
from lipjax.activations import ClippedMaxMin, ClippedReLU, MaxMin, ReLU
from lipjax.operators import safe_norm

# The scaling that `largest_product` tries beside ball and box, as a multiple of that of the ball alone. Measured on an
# ordinarily trained net: five scales give margins 1 % smaller than this one, none 16 % larger.
SCALE = 2.5
# Rows that `reaches` carries back at once.
ROWS = 64


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["slope", "width", "reach", "radius"], meta_fields=["paired"]
)
@dataclasses.dataclass(frozen=True)
class Chord:
    """``D a(z) = M D z + e`` on a box, seen from its center.

    Attributes:
        slope: M, elementwise; with `paired` (MaxMin) that of ``|a - b|``, one per pair of channels ``(a, b)``, and M
            keeps ``a + b`` and multiplies ``a - b``.
        width: >= 0, how far the slope of any chord can be from `slope`: ``|e| <= width |D z|``.
        reach: bound of each coordinate of e. With `paired` e lies along ``(1, -1) / sqrt(2)`` of each pair, and this
            bounds its length there.
        radius: scalar, ``||e||_2 <= radius`` over the coordinates that can still move an output.
    """

    slope: jax.Array
    width: jax.Array
    reach: jax.Array
    radius: jax.Array
    paired: bool

    def transposed(self, g: jax.Array) -> jax.Array:
        """``M^T g``; M is symmetric."""
        if not self.paired:
            return self.slope * g
        a, b = jnp.split(g, 2, axis=-1)
        kept, turned = (a + b) / 2, self.slope * (a - b) / 2
        return jnp.concatenate([kept + turned, kept - turned], axis=-1)

    def along(self, g: jax.Array) -> jax.Array:
        """The coordinates of g that e meets: ``<g, e> = <along(g), coordinates of e>``."""
        if not self.paired:
            return g
        a, b = jnp.split(g, 2, axis=-1)
        return (a - b) / math.sqrt(2)


def chords_of(
    layer, center: jax.Array, lower: jax.Array, upper: jax.Array, radius: jax.Array, after, arithmetic
) -> tuple[Chord, ...]:
    """The chords of an activation on a box, in the order of application (two of a ClippedMaxMin, else one).

    **Guarantee**: each is what `Chord` says, for every z of the box with ``||z - center||_2 <= radius`` over the inputs that
    can move an output. An activation that has no rule here is all error, within its region.

    Args:
        layer: a registered activation.
        center, lower, upper: what is known of its input, of one example's shape; the center lies in the box.
        radius: bound of ``||D z||_2`` over the inputs that can move an output (`activations.live_rows`).
        after: the region of its output.
        arithmetic: `rounding.OUTWARD` makes width, reach and radius bounds of the exact ones.
    """
    if type(layer) in (ReLU, ClippedReLU):
        top = layer.threshold[...] if type(layer) is ClippedReLU else jnp.inf
        return (_clip_chord(center, lower, upper, 0.0, top, radius, arithmetic),)
    if type(layer) in (MaxMin, ClippedMaxMin):
        first = _pair_chord(center, lower, upper, radius, arithmetic)
        if type(layer) is MaxMin:
            return (first,)
        between = MaxMin()
        a, b = jnp.split(jnp.ones_like(center), 2, axis=-1)
        bottom = jnp.concatenate([-jnp.inf * a, jnp.broadcast_to(layer.lower[...], b.shape)], axis=-1)
        top = jnp.concatenate([jnp.broadcast_to(layer.upper[...], a.shape), jnp.inf * b], axis=-1)
        center, lower, upper = between(center), between(lower), between(upper)
        return (first, _clip_chord(center, lower, upper, bottom, top, radius, arithmetic))
    # Of any other activation only its region is known: all of it is error.
    reach = arithmetic.up(jnp.maximum(after.upper - after.center, after.center - after.lower))
    zero = jnp.zeros_like(after.center)
    return (Chord(zero, zero + 1, reach, after.radius, paired=False),)


def _ratio(above, below):
    """``above / below``, and 0 where below is 0; its gradient is 0 there."""
    return jnp.where(below == 0, 0.0, above / jnp.where(below == 0, 1.0, below))


def _clip_chord(z, lower, upper, bottom, top, radius, arithmetic) -> Chord:
    """Of ``clip(z, bottom, top)``: on each side of the center the extreme slopes are at the center, at the end of the box,
    or at the corner of the clip beyond a flat part."""

    def clip(t):
        return jnp.minimum(jnp.maximum(t, bottom), top)

    def extremes(end, near, far):
        """Smallest and largest slope to points between z and `end`; `near` is the corner behind which it is flat on z's
        own side, `far` the other one."""
        at_end = _ratio(clip(end) - clip(z), end - z)
        toward = jnp.sign(end - z)
        flat = (z - near) * toward < 0  # z lies before the first corner: flat, then steep, then flat
        beyond = (z - far) * toward >= 0  # z lies behind the last corner: flat for ever
        corner = jnp.where((end - far) * toward > 0, far, end)
        steepest = _ratio(clip(corner) - clip(z), corner - z)
        low = jnp.where(flat | beyond, 0.0, at_end)
        high = jnp.where(beyond, 0.0, jnp.where(flat, steepest, 1.0))
        none = end == z
        return jnp.where(none, jnp.inf, low), jnp.where(none, -jnp.inf, high)

    right, left = extremes(upper, bottom, top), extremes(lower, top, bottom)
    low, high = jnp.minimum(right[0], left[0]), jnp.maximum(right[1], left[1])
    constant, linear = clip(lower) == clip(upper), (lower >= bottom) & (upper <= top)
    low = jnp.where(constant, 0.0, jnp.where(linear, 1.0, low))
    high = jnp.where(constant, 0.0, jnp.where(linear, 1.0, high))
    return _chord(low, high, constant | linear, z, lower, upper, 1.0, radius, arithmetic, paired=False)


def _pair_chord(z, lower, upper, radius, arithmetic) -> Chord:
    """Of MaxMin, ``(a, b) -> ((a + b) + |a - b|, (a + b) - |a - b|) / 2``, through the chords of ``|a - b|``."""
    (a, b), (lower_a, lower_b), (upper_a, upper_b) = (jnp.split(end, 2, axis=-1) for end in (z, lower, upper))
    t = a - b
    least, most = arithmetic.widened(lower_a - upper_b, upper_a - lower_b, 0.0)
    # From t >= 0: slope 1 up to the kink, then falling towards the far end. From t < 0 the mirror image.
    far = jnp.where(t >= 0, jnp.maximum(-least, 0.0), jnp.maximum(most, 0.0))
    inner = _ratio(jnp.abs(t) - far, jnp.abs(t) + far)
    sign = jnp.where(t >= 0, 1.0, -1.0)
    a_first, b_first = lower_a >= upper_b, lower_b >= upper_a
    fixed = a_first | b_first
    one = jnp.where(a_first, 1.0, jnp.where(b_first, -1.0, sign))
    other = jnp.where(fixed, one, sign * inner)
    low, high = jnp.minimum(one, other), jnp.maximum(one, other)
    return _chord(low, high, fixed, t, least, most, 1 / math.sqrt(2), radius, arithmetic, paired=True)


def _chord(low, high, exact, z, lower, upper, unit, radius, arithmetic, paired) -> Chord:
    slope = (low + high) / 2
    # A ratio of rounded differences errs by a few units; where the slope is the same for all chords nothing is rounded.
    width = jnp.where(exact, 0.0, arithmetic.slope_width((high - low) / 2))
    reach = arithmetic.up(unit * width * jnp.maximum(upper - z, z - lower))
    corner = arithmetic.length(reach)
    return Chord(slope, width, reach, jnp.minimum(corner, arithmetic.up(jnp.max(width) * radius)), paired)


# ---------------------------------------------------------------------------------------------------- rows carried back


def dual(d, low, high, radius, scale, arithmetic) -> jax.Array:
    """``max <d, t>`` over ``||t|| <= radius, low <= t <= high`` from above, by duality with ``mu = 1 / scale`` (METHOD 3).

    Any scale > 0 is right. ``low <= 0 <= high``.
    """
    t = jnp.clip(d * scale, low, high)
    # Every term of the sums is >= 0, the difference is not: its rounding is bounded by that of the sum of its parts.
    # (Squares that underflow, too: FLOOR is in the excess before that is divided by the scale, which
    # can be far smaller.)
    room, used = jnp.square(radius), jnp.sum(jnp.square(t))
    excess = arithmetic.up(room + used, d.size) - (room + used)
    return arithmetic.up(jnp.sum(d * t), d.size) + (room - used + 2 * excess) / (2 * scale)


def largest_product(d: jax.Array, reach: jax.Array, radius: jax.Array, arithmetic) -> jax.Array:
    """Upper bound of ``max <d, e>`` over ``|e| <= reach, ||e||_2 <= radius``, of the box, the ball and one dual.

    Not the tightest bound, which needs a search (`margins.ascent`), but there are many of these, differentiated in training.
    """
    norm = safe_norm(d)
    ball = arithmetic.up(radius * arithmetic.length(d))
    box = arithmetic.up(jnp.sum(jnp.abs(d) * reach), d.size)
    # It is not the best scale, so the envelope theorem does not hold: it is differentiated too. Where that of the ball is
    # extreme (nothing can move, or d is 0) any does, and 1 has a gradient.
    least = jnp.finfo(d.dtype).tiny ** 0.25
    usual = (norm > least) & (radius > least * norm)
    scale = jnp.where(usual, SCALE * radius / jnp.where(usual, norm, 1.0), 1.0)
    return jnp.minimum(jnp.minimum(box, ball), dual(d, -reach, reach, radius, scale, arithmetic))


def stages_of(layers: Sequence, inputs: Sequence, norms: Sequence[jax.Array], arithmetic, view: Callable) -> list[Any]:
    """How a row goes back through each layer: ``g -> (M^T g, what that costs)``, in the order of the layers; at the two ends
    of a Residual the mark itself, and what the sum costs.

    Args:
        layers: the first layers of a network, as `regions.layers_of` returns them.
        inputs: the region in front of each of them, and the one behind.
        norms: of their affine layers, as the walk has taken them.
        arithmetic, view: of the walk.
    """
    stages: list[Any] = []
    k, moving = 0, None
    for i, layer in enumerate(layers):
        before = inputs[i]
        if layer is operators.FORK or layer is operators.JOIN:
            # Rows are added up at the fork, activations at the join, and each sum is rounded.
            moving = None
            stages.append((layer, functools.partial(_through_sum, layer, before, inputs[i + 1], arithmetic)))
        elif type(layer) is operators.Flatten:
            stages.append(lambda g, shape=before.center.shape: (g.reshape(shape), 0.0))
        elif activations.is_activation(layer):
            # The rows that move an output are those whose norm the walk has taken.
            radius = before.radius if moving is None else jnp.minimum(moving, before.radius)
            moving = None
            region = (before.center, before.lower, before.upper)
            chords = chords_of(layer, *region, radius, inputs[i + 1], arithmetic)
            stages.append(functools.partial(_through_activation, chords, before.radius, arithmetic))
        else:
            operator = view(layer, before.center)
            slack = arithmetic.slack(operator, before.lower, before.upper)
            moving = arithmetic.up(norms[k] * before.radius + arithmetic.norm(slack))
            stages.append(functools.partial(_through_affine, operator, before, slack, arithmetic))
            k += 1
    return stages


def gain(stages: Sequence[Any], d: jax.Array, first, last, arithmetic) -> jax.Array:
    """Upper bound of ``<d, D h>``, h the output of the layers that `stages_of` was given; a scalar, NaN if anything is.

    Args:
        d: of h's shape; each entry may be a rounded difference.
        first, last: the ball around the input, and what is known of h.
        arithmetic: `rounding.OUTWARD` (in float64) makes the computed value an upper bound of the exact one. A row that
            was computed serves as well as the exact one, once what it leaves over is counted.
    """
    up = arithmetic.up
    row, spent = carried_back(stages, d, arithmetic)
    spent = up(spent + arithmetic.left_over(4 * rounding.DOUBLE, d, last.radius), 2)
    return up(up(first.radius * arithmetic.length(row)) + spent, 2)


def carried_back(stages: Sequence[Any], d: jax.Array, arithmetic) -> tuple[jax.Array, jax.Array]:
    """``P_0^T d``, of the input's shape, and an upper bound of what the errors on the way can add to ``<d, D h>``."""
    up, g, spent = arithmetic.up, d, jnp.zeros((), d.dtype)
    ways: list[jax.Array] = []  # rows that go past the layers of a Residual
    for stage in reversed(stages):
        mark, stage = stage if isinstance(stage, tuple) else (None, stage)
        if mark is operators.JOIN:
            ways.append(g)
        elif mark is operators.FORK and ways:  # none where the pass began between the two
            g = g + ways.pop()
        g, cost = stage(g)
        spent = up(spent + cost, 2)
    return g, spent


def reaches(
    layers: Sequence, inputs: Sequence, norms: Sequence[jax.Array], operator: operators.LinearOperator, arithmetic, view
) -> jax.Array:
    """How far each output of an affine layer can move, by its own row: of the output's shape.

    One reverse pass for every output, through all layers in front; arguments as those of `stages_of`, the affine layer
    being the one behind them. What the rounding of its own center does is not in it.
    """
    stages = stages_of(layers, inputs, norms, arithmetic, view)
    like = inputs[-1].center
    transposed = operator.transpose(like)
    shape = jax.eval_shape(operator, jax.ShapeDtypeStruct(like.shape, like.dtype)).shape
    count = math.prod(shape)

    def one(index):
        # Exact: every entry of the row is 0 or one entry of the kernel.
        row = transposed((jnp.arange(count) == index).astype(like.dtype).reshape(shape))
        return gain(stages, row, inputs[0], inputs[-1], arithmetic)

    return jax.lax.map(one, jnp.arange(count), batch_size=ROWS).reshape(shape)


def _through_sum(mark, before, after, arithmetic, g):
    """g itself, and what the rounding of the sum at this end of a Residual can add."""
    if arithmetic is rounding.EXACT:
        return g, 0.0
    if mark is operators.FORK:
        return g, arithmetic.left_over(4 * rounding.DOUBLE, g, before.radius)
    return g, arithmetic.up(4 * rounding.DOUBLE * jnp.sum(jnp.abs(g) * jnp.abs(after.center)), g.size)


def _through_activation(chords, length, arithmetic, g):
    """``M^T g`` and what the errors can add: the largest ``<g, e>``."""
    total = 0.0
    for chord in reversed(chords):
        cost = largest_product(chord.along(g), chord.reach, chord.radius, arithmetic)
        total = arithmetic.up(total + cost, 2)
        total = arithmetic.up(total + arithmetic.left_over(8 * rounding.DOUBLE, g, length), 2)
        g = chord.transposed(g)
    return g, total


def _through_affine(operator, before, slack, arithmetic, g):
    """``W^T g`` and what rounding can add."""
    row = operator.transpose(before.center)(g)
    if arithmetic is rounding.EXACT:
        return row, 0.0
    terms = rounding.transposed_terms_of(operator, before.center)
    relative = 2 * rounding.gamma(terms + 8) * deterministic.schur_bound(operator, before.center, None, None)
    cost = arithmetic.up(jnp.sum(jnp.abs(g) * slack), g.size)
    return row, arithmetic.up(cost + arithmetic.left_over(relative, g, before.radius), 2)
