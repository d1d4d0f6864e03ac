"""Rows carried back with one-sided errors: tighter than a semidefinite relaxation, for one pass.

An activation does ``D a = s D z + e`` for any slopes s, D the change from the center. Its error
``e_i(D_i) = a(z_i + D_i) - a(z_i) - s_i D_i`` is known piece by piece and is zero at the center.
For a row w on it, a ball ``||D z|| <= r`` over the active inputs, a box, and every ``scale > 0``:

    max <w, e> <= scale r^2 / 2 + sum_i max over the box of (w_i e_i(t) - scale t^2 / 2).

The inner maximum is closed (`Pieces.largest`). Any scale and any slopes are sound, so both are
chosen in ordinary arithmetic, and only the end is evaluated outwards.

The slopes are free on *every* active input, also where the activation is linear on the box: a
smaller one there carries less of the row on and pays with a ball that is paid for anyway. Slopes 0
are the product of norms (METHOD 1), slopes 1 the linear pass (METHOD 5); the best lie between.

Source: METHOD 8 (docs/method.md). Without box, and for ReLU, the inequality is Theorem 4.1 of
SDP-CROWN (Chiu et al., ICML 2025, arXiv 2506.06665).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lipjax import rounding
from lipjax.activations import Pieces
from lipjax.bounds.regions import Bound, Region
from lipjax.bounds.relaxed import Reverse
from lipjax.graph import Activation
from lipjax.graph.linear import safe_norm

# The scale is looked for by bisection of its logarithm, in this many halvings of this width below
# that of the ball alone: to one part in a thousand, of which the bound sees the square.
HALVINGS = 14
WIDTH = 14.0
# Scales beyond this, or below its inverse, could meet an underflow that `rounding.FLOOR` does not
# cover.
LARGEST_SCALE = 1e90


@dataclasses.dataclass(frozen=True)
class Choice:
    """How slopes are chosen, from the row, the ball and the box; any choice is sound.

    Of the change of norm r, an even spread over the row w gives input i the share
    ``h_i = r |w_i| / ||w||``.

    Attributes:
        spread: where w_i makes the error costly, the chord over ``h_i / spread`` to both sides; 0:
            over the whole box.
        local: where it makes it cheap, this much of the slope at the center, the rest of the middle
            of all slopes; None: the smallest or the largest slope, to which the chord over the box
            is nearer.
        kept: this much of the slope where the activation is linear on the box.
    """

    spread: float
    local: float | None
    kept: float


# Measured on networks that others trained (`python -m benchmarks.foreign`): the first is best on
# most, the second, which are CROWN's slopes (Zhang et al., NeurIPS 2018, arXiv 1811.00866), where
# nearly all neurons are stable.
CHOICES = (Choice(0.4, 0.75, 0.8), Choice(0.0, None, 1.0))
# For the boxes of neurons: there the second is the better one, and both together gain nothing.
BOXES = CHOICES[1]
# Rivals, the worst, for which the others than the first are tried.
RETRIED = 3
# Slopes that are kept are whole multiples of 1 / UNIT, from -128 to 127 of them: one byte each.
UNIT = 100


def chosen(pieces: Pieces, w: jax.Array, radius: jax.Array, by: Choice) -> jax.Array:
    """Slopes by a rule, of the shape of w.

    Any are sound; with a NaN in w or in the box the bound that follows is NaN (`error_cost`).
    """
    center, lower, upper = pieces.center, pieces.lower, pieces.upper
    least, most = pieces.extremes()
    whole = pieces.chord(lower, upper)

    near = whole
    if by.spread:
        tiny = jnp.finfo(w.dtype).tiny ** 0.25
        free = jnp.where(pieces.free, w, 0.0)
        share = radius * jnp.abs(free) / jnp.maximum(safe_norm(free), tiny)
        half = jnp.maximum(share / by.spread, tiny)
        near = pieces.chord(jnp.maximum(lower, center - half), jnp.minimum(upper, center + half))
    if by.local is None:
        cheap = jnp.where(2 * whole > least + most, most, least)
    else:
        cheap = by.local * pieces.at_center() + (1 - by.local) * (least + most) / 2

    # Convex as seen from the center: errors are >= 0, and cheap for a row that pulls downwards.
    costly = w * (pieces.chord(center, upper) - pieces.chord(lower, center)) >= 0
    slope = jnp.where(costly, near, cheap)
    slope = jnp.where(least == most, by.kept * least, slope)
    return jnp.where(pieces.free, slope, pieces.exact)


def best_scale(pieces: Pieces, w: jax.Array, slope: jax.Array, radius: jax.Array) -> jax.Array:
    """The scale at which the sum of the squares of the maximisers is the ball's."""
    least, most = pieces.extremes()
    pull = safe_norm(w * jnp.maximum(jnp.abs(most - slope), jnp.abs(least - slope)))
    tiny = jnp.finfo(w.dtype).tiny ** 0.25
    start = jnp.log(jnp.maximum(pull, tiny)) - jnp.log(jnp.maximum(radius, tiny))

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        _, t = pieces.largest(w, slope, jnp.exp(middle))
        longer = safe_norm(pieces.unit * t) > radius
        return jnp.where(longer, middle, low), jnp.where(longer, high, middle)

    _, high = jax.lax.fori_loop(0, HALVINGS, halve, (start - WIDTH, start))
    # In float32 both are numbers of that type.
    largest = min(LARGEST_SCALE, float(jnp.finfo(w.dtype).max) ** 0.5)
    return jnp.clip(jnp.exp(high), 1 / largest, largest)


def error_cost(
    pieces: Pieces, w: jax.Array, slope: jax.Array, radius: jax.Array, arithmetic
) -> jax.Array:
    """Upper bound of ``<w, e>`` over ball and box, >= 0; NaN if anything is.

    Args:
        pieces: of the activation.
        w: the row on its error, of the shape of the pieces' center; 0 counts for nothing.
        slope: s, of that shape; held fixed in the gradient, as is the scale.
        radius: of the ball, over the active inputs.
        arithmetic: turns rounding to the safe side.
    """
    frozen = jax.lax.stop_gradient((pieces, w, slope, radius))
    scale = jax.lax.stop_gradient(best_scale(*frozen))
    values, _ = pieces.largest(w, slope, scale)
    up = arithmetic.up
    total = up(jnp.sum(values), w.size)
    if arithmetic is not rounding.EXACT:
        # Each value is a sum of few products; its rounding is a few units of their sizes.
        total = total + up(16 * rounding.DOUBLE * jnp.sum(pieces.sizes(w, slope)), w.size)
    return up(up(scale * jnp.square(radius) / 2) + total, 2)


class OneSided(Reverse):
    """`Reverse` with one-sided errors, by chosen slopes or by given ones.

    Attributes:
        by: the rule, where no slopes are given.
        given: slopes for each activation, by its position in the graph: a tuple, one for each of
            its steps.
        taken: those that the last pass took, in the same form.
    """

    def __init__(self, *arguments, by: Choice = CHOICES[0], given: dict | None = None):
        super().__init__(*arguments)
        self.by = by
        self.given = given
        self.taken: dict[int, tuple[jax.Array, ...]] = {}

    def ball(self, i: int) -> jax.Array:
        """Radius of the change in front of activation i, over its active inputs."""
        (before,) = self.graph.nodes[i].inputs
        active = self._active_radius(before)
        radius = self.regions[before].radius
        return radius if active is None else jnp.minimum(active, radius)

    def pieces(self, i: int) -> tuple[Pieces, ...] | None:
        """Of activation i, in order of application."""
        node = self.graph.nodes[i]
        assert isinstance(node, Activation)
        before = self.regions[node.inputs[0]]
        return node.rule.pieces(before.center, before.lower, before.upper, self.arithmetic)

    def limits(self):
        """Smallest and largest slopes worth looking at, in the form of `taken`."""
        ends = {}
        for i in self.taken:
            steps = self.pieces(i)
            assert steps is not None
            ends[i] = [pieces.extremes() for pieces in steps]
        low = {i: tuple(jnp.minimum(least, 0) for least, _ in ends[i]) for i in ends}
        high = {i: tuple(jnp.maximum(most, 0) for _, most in ends[i]) for i in ends}
        return low, high

    def _through_activation(self, i: int, before: Region, g: jax.Array):
        steps = self.pieces(i)
        node = self.graph.nodes[i]
        assert isinstance(node, Activation)
        if steps is None:
            return super()._through_activation(i, before, g)
        radius = self.ball(i)
        size = jnp.maximum(1.0, node.rule.lipschitz) ** 3
        total = jnp.zeros((), g.dtype)
        if self.arithmetic is not rounding.EXACT and not node.rule.selects:
            # Errors are those from the exact value of the center, and the region's was rounded.
            off = node.rule.evaluation_error(self.regions[i].center)
            total = self.arithmetic.up(jnp.sum(jnp.abs(g) * off), g.size)
        taken: list[jax.Array] = []
        for k, pieces in reversed(list(enumerate(steps))):
            w = pieces.weights(g)
            if self.given is None:
                slope = jax.lax.stop_gradient(chosen(pieces, w, radius, self.by))
            else:
                slope = jnp.where(pieces.free, self.given[i][k], pieces.exact)
            taken.insert(0, slope)
            cost = error_cost(pieces, w, slope, radius, self.arithmetic)
            left = self.arithmetic.left_over(8 * rounding.DOUBLE * size, g, before.radius)
            total = self.arithmetic.up(total + cost + left, 3)
            g = pieces.transposed(slope, g)
        self.taken[i] = tuple(taken)
        return (g,), total


def one_sided(
    bound: Bound, arithmetic: rounding.Rounding, view: Callable, **slopes: Any
) -> OneSided:
    """The pass that propagates rows back from what is in front of the last node.

    Args:
        bound: of one example.
        arithmetic, view: of the walk.
        slopes: `by` or `given`, as `OneSided` takes them.
    """
    (end,) = bound.graph.nodes[-1].inputs
    return OneSided(bound.graph, view, arithmetic, bound.regions, bound.radii, end, **slopes)


# ------------------------------------------------------------------------------ better slopes


def improved(
    bound: Bound, rows: jax.Array, goals: jax.Array, steps: int, view: Callable
) -> tuple[jax.Array, jax.Array]:
    """Slopes improved by gradient steps in ordinary arithmetic, and the bounds that they prove.

    Args:
        bound: of one example, proved and rounded outwards.
        rows: ``(n, *penultimate shape)``, directions d.
        goals: ``(n,)``: no more steps once the gain is below; infinity: none at all.
        steps: at most so many.
        view: of the walk.

    Returns:
        ``(n,)``, upper bounds of ``max <d, h' - h>`` over the ball, rounded outwards, and
        ``(n, slopes)``, their slopes as int8 multiples of 1 / UNIT, all activations after each
        other (`flattened`).
    """

    def one(row, goal):
        first = one_sided(bound, rounding.EXACT, view)
        least = first.gain(row)
        slopes = ascended(
            lambda given: one_sided(bound, rounding.EXACT, view, given=given).gain(row),
            (first.taken, least),
            first.limits(),
            goal,
            steps,
        )
        kept = flattened(slopes)
        proved = one_sided(bound, rounding.OUTWARD, view, given=unflattened(kept, slopes))
        return proved.gain(row), kept

    return jax.vmap(one)(rows, goals)


def flattened(slopes: dict[int, tuple[jax.Array, ...]]) -> jax.Array:
    """Slopes as int8 multiples of 1 / UNIT, in the order of the nodes and of their steps."""
    parts = [slope.reshape(-1) for i in sorted(slopes) for slope in slopes[i]]
    if not parts:
        return jnp.zeros((0,), jnp.int8)
    kept = jnp.clip(jnp.round(UNIT * jnp.concatenate(parts)), -128, 127)
    return jnp.where(jnp.isnan(kept), 0, kept).astype(jnp.int8)


def unflattened(kept: jax.Array, like: dict[int, tuple[jax.Array, ...]]):
    """What `flattened` was given, rounded."""
    found: dict[int, tuple[jax.Array, ...]] = {}
    place = 0
    for i in sorted(like):
        parts = []
        for slope in like[i]:
            part = kept[place : place + slope.size].reshape(slope.shape)
            parts.append(part.astype(slope.dtype) / UNIT)
            place += slope.size
        found[i] = tuple(parts)
    return found


def ascended(gain, start, limits, goal, steps: int, rate: float = 0.1):
    """Better slopes for one row: Adam on ``gain(slopes)``, which any slopes make a bound.

    Args:
        gain: of a pytree of slopes.
        start: where to begin, and the gain there.
        limits: two such pytrees, the smallest and the largest slopes to look among.
        goal: it stops where the gain is below this.
        steps: at most so many.
        rate: of the first step; it falls to 0 along a cosine.

    Returns:
        The best slopes that were seen.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, max(steps, 1)))
    low, high = limits

    def goes_on(state):
        count, *_, least = state
        return (count < steps) & (least >= goal)

    def step(state):
        count, slopes, moments, best, least = state
        found, gradient = jax.value_and_grad(gain)(slopes)
        better = found < least
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), slopes, best)
        # Where a gradient is no number nothing is learned; the bound itself says so.
        gradient = jax.tree.map(lambda d: jnp.where(jnp.isfinite(d), d, 0.0), gradient)
        moves, moments = optimizer.update(gradient, moments)
        slopes = jax.tree.map(lambda s, d, a, b: jnp.clip(s + d, a, b), slopes, moves, low, high)
        return count + 1, slopes, moments, best, jnp.where(better, found, least)

    slopes, least = start
    first = (jnp.zeros((), int), slopes, optimizer.init(slopes), slopes, least)
    return jax.lax.while_loop(goes_on, step, first)[-2]
