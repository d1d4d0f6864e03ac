"""An activation piece by piece, as a row meets it that is carried back (`lipjax.bounds.tight`)."""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lipjax.activations.base import ratio, rule
from lipjax.graph.linear import larger, smaller


@rule("center", "lower", "upper", "kinks", "rising", "falling", "free", "exact")
class Pieces:
    """``a(t) - a(center)`` on a box, linear between kinks, coordinate by coordinate.

    With `paired` the coordinate is ``t = a - b`` of each pair of channels and the function is that
    of the difference of the outputs; their sum is kept.

    Attributes:
        center, lower, upper: of t, arrays of one shape; the center lies in the box.
        kinks: in rising order, arrays of that shape.
        rising, falling: one slope more than kinks, numbers or arrays: of the function, or of a
            bound of it from above (for rows > 0) and from below (for rows < 0) that meets it at
            the center.
        free: where the slope that the row is carried on with may be any number: all inputs of the
            coordinate count in the ball.
        exact: the slope everywhere else; there the error is 0.
        paired: as above.
    """

    center: jax.Array
    lower: jax.Array
    upper: jax.Array
    kinks: tuple[Any, ...]
    rising: tuple[Any, ...]
    falling: tuple[Any, ...]
    free: jax.Array
    exact: jax.Array
    paired: bool = False

    @property
    def unit(self) -> float | jax.Array:
        """Length in the ball of a step of 1 in t."""
        return 1 / math.sqrt(2) if self.paired else 1.0

    def weights(self, g: jax.Array) -> jax.Array:
        """What multiplies the errors in ``<g, e>``; 0 where there is none."""
        if self.paired:
            a, b = jnp.split(g, 2, axis=-1)
            g = (a - b) / 2
        return jnp.where(self.free, g, 0.0)

    def transposed(self, slope: jax.Array, g: jax.Array) -> jax.Array:
        """The row in front, with these slopes."""
        if not self.paired:
            return slope * g
        a, b = jnp.split(g, 2, axis=-1)
        kept = (a + b) / 2
        turned = slope * (a - b) / 2
        return jnp.concatenate([kept + turned, kept - turned], axis=-1)

    def parts(self):
        """Lower and upper end of each piece inside the box; empty where they are out of order."""
        ends = [self.lower, *self.kinks, self.upper]
        for low, high in itertools.pairwise(ends):
            yield larger(low, self.lower), smaller(high, self.upper)

    def rise(self, t: jax.Array, slopes) -> jax.Array:
        """``a(t) - a(center)``."""
        total = jnp.zeros_like(self.center)
        ends = [-jnp.inf, *self.kinks, jnp.inf]
        for low, high, slope in zip(ends[:-1], ends[1:], slopes, strict=True):
            length = jnp.clip(t, low, high) - jnp.clip(self.center, low, high)
            total = total + slope * jnp.where(low < high, length, 0.0)
        return total

    def largest(self, w: jax.Array, slope: jax.Array, scale) -> tuple[jax.Array, jax.Array]:
        """Upper bound of ``max w e(t) - scale (unit t)^2 / 2`` over the box, and where it is.

        t is the step from the center. On a piece of slope p the maximum is at
        ``t0 = w (p - slope) / scale``, cut to the piece; ``t^2 >= 2 t t0 - t0^2`` leaves a linear
        function there, an upper bound for any t0, whose maximum is at an end of the piece.
        """
        scale = scale * self.unit**2
        slopes = [jnp.where(w > 0, r, f) for r, f in zip(self.rising, self.falling, strict=True)]
        best = jnp.zeros_like(w)
        place = jnp.zeros_like(w)
        for (low, high), own in zip(self.parts(), slopes, strict=True):
            some = low <= high
            # Kinks may be infinite: an empty piece must not reach the gradient.
            low = jnp.where(some, low, self.center)
            high = jnp.where(some, high, self.center)
            first = low - self.center
            last = high - self.center
            t = jnp.clip(w * (own - slope) / scale, first, last)
            values = [
                w * (self.rise(end, slopes) - slope * step) - scale * t * (step - t / 2)
                for end, step in ((low, first), (high, last))
            ]
            value = larger(*values)
            better = some & ~(value <= best)
            place = jnp.where(better, t, place)
            best = jnp.where(better, value, best)
        return best, place

    def sizes(self, w: jax.Array, slope: jax.Array) -> jax.Array:
        """Bound of the sizes of all that is added up in `largest`, for its rounding."""
        steepest = jnp.zeros_like(w)
        for own in (*self.rising, *self.falling):
            steepest = larger(steepest, jnp.abs(own) + jnp.zeros_like(w))
        reach = larger(self.upper - self.center, self.center - self.lower)
        return 4 * len(self.rising) * jnp.abs(w) * (steepest + jnp.abs(slope)) * reach

    def extremes(self) -> tuple[jax.Array, jax.Array]:
        """The smallest and the largest slope on the box; both 0 where it is a point."""
        least = jnp.full_like(self.center, jnp.inf)
        most = -least
        for (low, high), up, down in zip(self.parts(), self.rising, self.falling, strict=True):
            some = low < high
            least = jnp.where(some, jnp.minimum(least, jnp.minimum(up, down)), least)
            most = jnp.where(some, jnp.maximum(most, jnp.maximum(up, down)), most)
        none = least > most
        return jnp.where(none, 0.0, least), jnp.where(none, 0.0, most)

    def chord(self, low: jax.Array, high: jax.Array) -> jax.Array:
        """The mean slope from low to high, around the center; that at the center if they meet."""
        slopes = [(r + f) / 2 for r, f in zip(self.rising, self.falling, strict=True)]
        mean = ratio(self.rise(high, slopes) - self.rise(low, slopes), high - low)
        return jnp.where(low < high, mean, self.at_center())

    def at_center(self) -> jax.Array:
        """The slope at the center; of a kink there, the mean of both sides."""
        slopes = [(r + f) / 2 for r, f in zip(self.rising, self.falling, strict=True)]
        ends = [-jnp.inf, *self.kinks, jnp.inf]
        total = jnp.zeros_like(self.center)
        count = jnp.zeros_like(self.center)
        for low, high, own in zip(ends[:-1], ends[1:], slopes, strict=True):
            here = (low <= self.center) & (self.center <= high)
            total = total + jnp.where(here, own, 0.0)
            count = count + here
        return total / jnp.maximum(count, 1)


class Entries(NamedTuple):
    """Entries on their way through stages of comparators, in the rising order of their centers.

    Attributes:
        center, lower, upper: of one shape.
        weight: of that shape: the sum of ``D^2 / weight`` over the entries is at most the square of
            the ball's radius; 0 of an entry that is constant.
    """

    center: jax.Array
    lower: jax.Array
    upper: jax.Array
    weight: jax.Array


@rule(
    *("center", "lower", "upper", "kinks", "rising", "falling", "free", "exact"),
    *("first", "length"),
)
class Compared(Pieces):
    """A stage of comparators: of entries i and ``i + distance`` along an axis the larger goes
    behind.

    As of a pair of MaxMin, the coordinate is ``t = z[i + distance] - z[i]``, the function ``|t|``;
    all that is said of a comparator stands at its first entry. By Cauchy
    ``t^2 <= (c + d) (D_i^2 / c + D_j^2 / d)``, c and d the weights of the two (`Entries`): the unit
    is ``1 / sqrt(c + d)``. Neither output moves by more than the larger of what the inputs do, nor
    the two together in l2, so ``max(c, d)`` is a weight of both outputs. (Of one constant and
    another entry too: then the two outputs together move by at most what the other one does.)

    Attributes:
        first: the first entries of comparators; all others but their partners pass as they are.
        length: the unit.
        axis, distance: of the comparators.
    """

    first: jax.Array = dataclasses.field(kw_only=True)
    length: jax.Array = dataclasses.field(kw_only=True)
    axis: int = dataclasses.field(kw_only=True)
    distance: int = dataclasses.field(kw_only=True)

    @property
    def unit(self) -> float | jax.Array:
        return self.length

    def weights(self, g: jax.Array) -> jax.Array:
        return jnp.where(self.free, (self._behind(g) - g) / 2, 0.0)

    def transposed(self, slope: jax.Array, g: jax.Array) -> jax.Array:
        kept = (self._behind(g) + g) / 2
        turned = slope * (self._behind(g) - g) / 2
        second = jnp.roll(self.first, self.distance, self.axis)
        row = jnp.where(second, jnp.roll(kept + turned, self.distance, self.axis), g)
        return jnp.where(self.first, kept - turned, row)

    def _behind(self, x: jax.Array) -> jax.Array:
        """At the first entry of a comparator, its second."""
        return jnp.roll(x, -self.distance, self.axis)


def compared(
    entries: Entries, first: jax.Array, axis: int, distance: int, arithmetic
) -> tuple[dict[str, Any], Entries]:
    """The fields of a stage of comparators (`Compared`), and the entries behind it.

    Args:
        entries: in front of it.
        first: mask of the first entries of comparators; no entry is in two.
        axis, distance: of the comparators.
        arithmetic: turns rounding to the safe side.
    """
    behind = Entries(*(jnp.roll(x, -distance, axis) for x in entries))
    none = jnp.zeros_like(entries.center)
    # The centers are in order, so that no comparator changes them.
    t = jnp.where(first, behind.center - entries.center, none)
    least = jnp.where(first, behind.lower - entries.upper, none)
    most = jnp.where(first, behind.upper - entries.lower, none)
    least, most = arithmetic.widened(least, most, 0.0)
    both = jnp.where(first, entries.weight + behind.weight, none)
    free = both > 0
    # (The rounding of the unit is in what `Pieces.sizes` counts.)
    length = jnp.sqrt(1 / jnp.where(free, both, 1.0))
    names = ("center", "lower", "upper", "kinks", "rising", "falling", "free", "exact")
    slopes = (-1.0, 1.0)
    values = (t, least, most, (none,), slopes, slopes, free, none + 1)
    fields = dict(zip(names, values, strict=True))
    fields.update(first=first, length=length, axis=axis, distance=distance)

    second = jnp.roll(first, distance, axis)
    before = Entries(*(jnp.roll(x, distance, axis) for x in entries))

    def passed(name, at_first, at_second):
        own = getattr(entries, name)
        found = jnp.where(second, at_second(own, getattr(before, name)), own)
        return jnp.where(first, at_first(own, getattr(behind, name)), found)

    after = Entries(
        entries.center,
        passed("lower", smaller, larger),
        passed("upper", smaller, larger),
        passed("weight", larger, larger),
    )
    return fields, after
