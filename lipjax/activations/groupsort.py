"""GroupSort: channels sorted in groups (Anil, Lucas and Grosse, ICML 2019). One group: a sort.

On a box the sorted order of a group may be known in part. Entries in the order of the center fall
into *blocks*: every entry of one block is <= every entry of the next, for every z of the box.
A block of one entry is passed on as it is. A block of two is a pair as in MaxMin. In a larger one
all is error.

One-sided errors need less: a block of k entries is sorted by a network of comparators (Batcher,
*Sorting networks and their applications*, AFIPS 1968), each of which is a pair as in MaxMin. The
stages are steps one after the other, each 1-Lipschitz, so that the ball is that of the input, on
boxes that are interval images of the stage before. Networks begin where their block begins: all
blocks of two are in the first stage, and share its ball.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from lipjax.activations.base import Relaxation, Rule, hinge, ratio, rule, varies
from lipjax.activations.pieces import Compared, Entries, compared
from lipjax.activations.slopes import SortSlopes
from lipjax.graph import register_primitive
from lipjax.graph.linear import larger
from lipjax.graph.trace import Ref

# Longer groups have no one-sided errors: six stages take long enough to compile.
LONGEST = 8


def groupsort(z: jax.Array, size: int) -> jax.Array:
    """Each group of `size` neighbours along the last axis in ascending order.

    Raises:
        ValueError: the last axis is no multiple of `size`.
    """
    if size < 1 or not z.ndim or z.shape[-1] % size:
        raise ValueError(
            f"GroupSort needs a last axis that is a multiple of its group size {size}, got an "
            f"input of {z.shape}."
        )
    groups = z.reshape(*z.shape[:-1], z.shape[-1] // size, size)
    return jnp.sort(groups, axis=-1).reshape(z.shape)


class GroupSort(nnx.Module):
    """`groupsort`: with groups of two that is MaxMin, its outputs in another order.

    Args:
        size: of the groups; it divides the last axis.
    """

    def __init__(self, size: int):
        if size < 1:
            raise ValueError(f"GroupSort needs a group size of at least 1, got {size}.")
        self.size = size

    def __call__(self, z: jax.Array) -> jax.Array:
        return groupsort(z, self.size)


@rule()
class Sort(Rule):
    """Ascending order along one axis, as `jnp.sort`.

    Attributes:
        axis: >= 0.
    """

    axis: int

    @property
    def selects(self) -> bool:
        return True

    def __call__(self, z: jax.Array) -> jax.Array:
        return jnp.sort(z, axis=self.axis)

    def interval(self, lower, upper):
        # No output falls when an input rises. A NaN would only go to the end: it must spread.
        lost = jnp.any(jnp.isnan(lower) | jnp.isnan(upper), axis=self.axis, keepdims=True)
        return jnp.where(lost, jnp.nan, self(lower)), jnp.where(lost, jnp.nan, self(upper))

    def active(self, lower, upper, as_paper=False):
        if as_paper:  # the paper's code drops no row in front of a MaxMin
            return jnp.ones(lower.shape, bool)
        return varies(lower, upper)

    def stable(self, lower, upper):
        _, lower, upper = self._ordered((lower + upper) / 2, lower, upper)
        before, after = self._cuts(lower, upper)
        return before & after & (upper >= lower)

    def relaxations(self, center, lower, upper, radius, after, arithmetic):
        order, lower, upper = self._ordered(center, lower, upper)
        z = after.center
        cut_before, cut_after = self._cuts(lower, upper)
        single = cut_before & cut_after
        # The first of two: the block begins at it, and ends at its neighbour.
        first = cut_before & ~cut_after & self._next(cut_after, True)

        # Of the difference t >= 0 of a pair, slope 1 up to the kink, then falling to the far end.
        t = self._next(z, 0.0) - z
        least, most = arithmetic.widened(
            self._next(lower, 0.0) - upper, self._next(upper, 0.0) - lower, 0.0
        )
        far = jnp.maximum(-least, 0.0)
        inner = ratio(t - far, t + far)
        slope = jnp.where(first, (1 + inner) / 2, 0.0)
        width = jnp.where(first, arithmetic.slope_width((1 - inner) / 2), 0.0)

        second = self._previous(first)
        rest = ~(single | first | second)
        along = width * larger(most - t, t - least) / math.sqrt(2)
        alone = larger(after.upper - z, z - after.lower)
        reach = arithmetic.up(jnp.where(first, along, jnp.where(rest, alone, 0.0)))
        # In each block the error is at most that share of how far its inputs move.
        width = jnp.where(rest, 1.0, width)
        ball = arithmetic.up(jnp.max(width) * radius)
        length = jnp.minimum(arithmetic.length(reach), ball)
        return (SortRelaxation(slope, width, reach, length, False, order, single, first, self),)

    def pieces(self, center, lower, upper, arithmetic):
        size = lower.shape[self.axis]
        if size > LONGEST:
            return None
        order, lower, upper = self._ordered(center, lower, upper)
        begins, _ = self._cuts(lower, upper)
        place = jax.lax.broadcasted_iota(jnp.int32, lower.shape, self.axis)
        start = jax.lax.cummax(jnp.where(begins, place, 0), axis=self.axis)

        center = jnp.take_along_axis(center, order, axis=self.axis)
        # What can change has weight 1, a constant none.
        entries = Entries(center, lower, upper, varies(lower, upper).astype(lower.dtype))
        steps: list[SortPieces] = []
        for merged, distance in stages(size):
            same = jnp.roll(start, -distance, self.axis) == start
            first = comparators(place - start, merged, distance) & same
            first = first & (place < size - distance)  # what was rolled in is of the other end
            fields, entries = compared(entries, first, self.axis, distance, arithmetic)
            steps.append(SortPieces(**fields, order=None if steps else order))
        return tuple(steps)

    def jacobian(self, lower, upper, arithmetic):
        order, lower, upper = self._ordered((lower + upper) / 2, lower, upper)
        begins, ends = self._cuts(lower, upper)
        single = begins & ends
        passed = jnp.where(single, jnp.ones_like(lower), 0.0)
        return (SortSlopes(passed, 1 - passed, order, self.axis),)

    def rounding(self, error):
        # As a map between largest entries it has Lipschitz constant 1, group by group.
        worst = jnp.max(error, axis=self.axis, keepdims=True)
        return jnp.broadcast_to(worst, error.shape)

    def instability(self, lower, upper):
        _, lower, upper = self._ordered((lower + upper) / 2, lower, upper)
        size = lower.shape[self.axis]
        if size < 2:
            return jnp.zeros((), lower.dtype)

        def cut(x, start, stop):
            return jax.lax.slice_in_dim(x, start, stop, axis=self.axis)

        nearest = cut(lower, 1, size) - cut(upper, 0, size - 1)
        farthest = cut(upper, 1, size) - cut(lower, 0, size - 1)
        return hinge(nearest, farthest, 0.0)

    def described(self):
        if type(self) is not Sort:  # what another class computes is not known
            return super().described()
        return {"kind": "sort", "axis": self.axis}

    # ------------------------------------------------------- entries in the order of the center

    def _ordered(self, center, lower, upper):
        """The order, and both ends in it."""
        order = jnp.argsort(center, axis=self.axis)
        lower = jnp.take_along_axis(lower, order, axis=self.axis)
        upper = jnp.take_along_axis(upper, order, axis=self.axis)
        return order, lower, upper

    def _cuts(self, lower, upper):
        """Does a block begin at an entry? Does one end at it?"""
        reached = jax.lax.cummax(upper, axis=self.axis)
        needed = jax.lax.cummin(lower, axis=self.axis, reverse=True)
        ends = reached <= self._next(needed, jnp.inf)
        begins = self._previous(ends, True)
        # A NaN keeps its whole group together.
        lost = jnp.any(jnp.isnan(lower) | jnp.isnan(upper), axis=self.axis, keepdims=True)
        return begins & ~lost, ends & ~lost

    def _next(self, x, end):
        """Of each entry the one behind it; `end` behind the last."""
        return self._shifted(x, end, (-1, 1))

    def _previous(self, x, end=False):
        return self._shifted(x, end, (1, -1))

    def _shifted(self, x, end, pads):
        padding = [(*pads, 0) if k == self.axis else (0, 0, 0) for k in range(x.ndim)]
        return jax.lax.pad(x, jnp.asarray(end, x.dtype), padding)


@rule("slope", "width", "reach", "radius", "order", "single", "first")
class SortRelaxation(Relaxation):
    """`Relaxation` of a sort. M and e are those of the sorted outputs.

    The error of a pair lies along ``(-1, 1) / sqrt(2)``; its length there stands at the first of
    the two, and 0 at the second.

    Attributes:
        slope: of the difference of a pair, at the first of the two.
        order: where the entries come from, sorted by the center.
        single: entries that are passed on as they are.
        first: the first entries of pairs.
        sort: the rule.
    """

    order: jax.Array
    single: jax.Array
    first: jax.Array
    sort: Sort

    def transposed(self, g: jax.Array) -> jax.Array:
        later = self.sort._next(g, 0.0)
        kept = (g + later) / 2
        turned = self.slope * (later - g) / 2
        at_first = jnp.where(self.first, kept - turned, 0.0)
        at_second = self.sort._previous(jnp.where(self.first, kept + turned, 0.0), 0.0)
        row = jnp.where(self.single, g, at_first + at_second)
        back = jnp.argsort(self.order, axis=self.sort.axis)
        return jnp.take_along_axis(row, back, axis=self.sort.axis)

    def error_weights(self, g: jax.Array) -> jax.Array:
        difference = (self.sort._next(g, 0.0) - g) / math.sqrt(2)
        second = self.sort._previous(self.first)
        alone = ~(self.single | self.first | second)
        return jnp.where(self.first, difference, jnp.where(alone, g, 0.0))


@rule(
    *("center", "lower", "upper", "kinks", "rising", "falling", "free", "exact"),
    *("first", "length", "order"),
)
class SortPieces(Compared):
    """A stage of the networks that sort the blocks.

    Attributes:
        order: of the first stage: where the entries come from, sorted by the center.
    """

    order: jax.Array | None = dataclasses.field(kw_only=True)

    def transposed(self, slope: jax.Array, g: jax.Array) -> jax.Array:
        row = super().transposed(slope, g)
        if self.order is None:
            return row
        return jnp.take_along_axis(row, jnp.argsort(self.order, axis=self.axis), axis=self.axis)


def stages(size: int) -> list[tuple[int, int]]:
    """Of Batcher's merge exchange for `size` entries: half the length that is merged, and the
    distance of the entries that are compared."""
    found = []
    merged = 1
    while merged < size:
        distance = merged
        while distance:
            found.append((merged, distance))
            distance //= 2
        merged *= 2
    return found


def comparators(place: jax.Array, merged: int, distance: int) -> jax.Array:
    """Does a comparator of a stage begin at a place? Those that end behind the last entry do
    nothing, as if there were infinities."""
    from_there = place - distance % merged
    begins = (from_there >= 0) & (from_there % (2 * distance) < distance)
    return begins & (place // (2 * merged) == (place + distance) // (2 * merged))


@register_primitive("sort")
def _sorted(reader, equation, inputs):
    """Of one operand; `argsort` and sorts by keys have no bound."""
    if len(inputs) != 1 or not isinstance(inputs[0], Ref):
        return None
    out = equation.outvars[0].aval
    made = Sort(equation.params["dimension"])
    return reader.activation(made, inputs[0], out.shape, out.dtype)
