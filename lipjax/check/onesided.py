"""The checker's margins in mode "tight": rows carried back with one-sided errors.

Part of `lipjax.check`; shares nothing with the bounds that it checks. The claim (METHOD 8): where a
coordinate t of an activation f moves by D, ``f(t + D) - f(t) = s D + e(D)`` for any slope s. For a
row w on the errors, ``||D|| <= r`` over the coordinates that count, a box, and every ``scale > 0``:

    max <w, e> <= scale r^2 / 2 + sum_i max over the box of (w_i e_i(D_i) - scale D_i^2 / 2).

f is linear between the ends of the box and its kinks inside, so the inner maximum is the largest of
those of a few parabolas. The scale is looked for by golden section. Slopes come from a rule or from
the file; neither has to be trusted.

Where entries of a row are sorted, or their maximum is taken, comparators do it stage by stage
(`Rows`). An entry of weight c in k rows moves so that the sum of ``D^2 / c`` over all k is at most
``k D^2 / c``: with c = k the ball is that of the input. A comparator of weights c and d meets
``t = D_j - D_i`` with ``t^2 <= (c + d) (D_i^2 / c + D_j^2 / d)``, and both of its outputs have
weight ``max(c, d)``, as the two together move no further than its inputs.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lipjax.check.layers import Activation, Nonlinear
from lipjax.check.norms import TINY, U, up

# Of slopes that a file holds, as whole numbers.
UNIT = 100
SECTIONS = 36
GOLDEN = (math.sqrt(5) - 1) / 2
# Below the scale of the ball alone, in its logarithm.
WIDTH = 16.0


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of an activation: a function of single coordinates on a box.

    Attributes:
        points: ``(ends, n)`` in rising order: of the box, and its kinks inside.
        rise: ``(ends, n)``, of the function from the center to each; or of a bound from above.
        fall: the same of a bound from below, linear between the same points, 0 at the center.
        center: ``(n,)``, in the box.
        counts: where the ball bounds how far the coordinate moves; there the slope is free.
        fixed: the slope elsewhere.
        unit: length in the ball of a step of 1, of all or of each.
        met: rows on the values to rows on the errors.
        back: those rows, and slopes, to the rows in front.
    """

    points: np.ndarray
    rise: np.ndarray
    fall: np.ndarray
    center: np.ndarray
    counts: np.ndarray
    fixed: np.ndarray
    unit: float | np.ndarray
    met: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray, np.ndarray], np.ndarray]

    def cost(self, w: np.ndarray, slopes: np.ndarray, radius: float) -> np.ndarray:
        """Upper bounds of the largest ``<w, e>``, one a row."""
        away = self.points - self.center
        both = np.concatenate([self.rise - self.fixed * away, self.fall - self.fixed * away])
        alone = np.abs(both).max(axis=0, initial=0.0)
        spent = up(np.abs(w) @ np.where(self.counts, 0.0, alone), w.shape[1])
        w = w[:, self.counts]
        if w.shape[1] == 0 or not np.any(w):
            return spent
        free = self.counts
        bounds = self.rise[:, free], self.fall[:, free]
        unit = np.broadcast_to(self.unit, free.shape)[free]
        part = _Parabolas(away[:, free], *bounds, w, slopes[:, free], unit)
        return up(spent + part.bound(max(float(radius), 2.0**-400)))


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of entries in the rising order of their centers, and what is compared in them.

    Attributes:
        center, lower, upper: ``(rows, size)``.
        weight: the same, as the module's text has them; 0 of an entry that is one number.
        stages: of each the distance of the entries that are compared, and which are the first of
            two. Entries of the value stand as they do behind the last stage.
        places: ``(rows, size)``, the numbers of the entries in the order of slopes.
        entered: rows on the value, ``(k, outputs)``, to ``(k, rows, size)``.
        left: those in front of the first stage to rows on the input.
    """

    center: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    weight: np.ndarray
    stages: Sequence[tuple[int, np.ndarray]]
    places: np.ndarray
    entered: Callable[[np.ndarray], np.ndarray]
    left: Callable[[np.ndarray], np.ndarray]


class _Parabolas:
    """``w e(D) - scale (unit D)^2 / 2`` on the parts of a box, for each row and coordinate."""

    def __init__(self, away, rise, fall, w, slopes, unit):
        self.away, self.w, self.unit = away, w, unit
        # A row > 0 meets the bound from above, a row < 0 that from below.
        reached = np.where(w > 0, rise[:, None], fall[:, None])
        away = away[:, None]
        # At an end of a part, for each row: w times the error there.
        self.errors = w * (reached - slopes * away)
        length = np.diff(away, axis=0)
        own = np.diff(reached, axis=0) / np.where(length > 0, length, 1.0)
        self.pulls = w * (own - slopes) * (length > 0)
        steep = np.abs(own).max(axis=0) + np.abs(slopes)
        self.sizes = np.abs(w) * (steep * np.abs(away).max(axis=0) + np.abs(reached).max(axis=0))

    def most(self, scale: np.ndarray) -> np.ndarray:
        """Upper bounds of the largest values, ``(rows, n)``."""
        scale = scale[:, None] * self.unit**2
        best = np.zeros_like(self.w)
        for k, pull in enumerate(self.pulls):
            first, last = self.away[k], self.away[k + 1]
            top = np.clip(pull / scale, first, last)
            # A parabola lies below its tangent at any point: a line, largest at an end.
            for end, error in ((first, self.errors[k]), (last, self.errors[k + 1])):
                best = np.maximum(best, error - scale * top * (end - top / 2))
        return best

    def bound(self, radius: float) -> np.ndarray:
        """The sum over the coordinates and the ball, rounded up, at the best scale found."""

        def value(logarithm):
            scale = np.exp(logarithm)
            return scale * radius**2 / 2 + self.most(scale).sum(axis=1)

        steepest = np.max(np.abs(self.pulls), axis=0)
        high = np.log(np.maximum(np.linalg.norm(steepest, axis=1), 1e-80)) - math.log(radius)
        low = high - WIDTH
        inner = [high - GOLDEN * (high - low), low + GOLDEN * (high - low)]
        found = [value(at) for at in inner]
        for _ in range(SECTIONS):
            left = found[0] <= found[1]
            low, high = np.where(left, low, inner[0]), np.where(left, inner[1], high)
            fresh = np.where(left, high - GOLDEN * (high - low), low + GOLDEN * (high - low))
            there = value(fresh)
            inner = [np.where(left, fresh, inner[1]), np.where(left, inner[0], fresh)]
            found = [np.where(left, there, found[1]), np.where(left, found[0], there)]
        scale = np.clip(np.exp((low + high) / 2), 1e-90, 1e90)
        count = self.w.shape[1]
        total = up(self.most(scale).sum(axis=1), count)
        total = total + up(64 * U * self.sizes.sum(axis=1), count) + count * TINY
        return up(up(scale * radius**2 / 2) + total)


def by_rule(spread: float, local: float | None, kept: float) -> Callable[..., np.ndarray]:
    """A rule for slopes: ``(step, w, radius)`` to ``(rows, n)``.

    A row that is spread evenly over the ball moves coordinate i by ``radius |w_i| / ||w||``. Where
    the error is of the sign that costs, the slope is that of the chord over so much, divided by
    `spread`, to both sides (of 0: over the box). Where it is of the other sign, it is `local` of
    the slope at the center and the rest of the middle of all slopes (of None: the smallest or the
    largest, as the chord over the box is nearer). Where the function is straight on the box, it is
    `kept` of its slope.
    """

    def rule(step: Step, w: np.ndarray, radius: float) -> np.ndarray:
        w = w * step.counts
        z, (lower, upper) = step.center, (step.points[0], step.points[-1])
        middle = (step.rise + step.fall) / 2

        def chord(low, high):
            """Of the function, from its values at the ends of the parts."""
            rises = [_at(step, middle, end) for end in (low, high)]
            gap = high - low
            return np.where(gap > 0, (rises[1] - rises[0]) / np.where(gap > 0, gap, 1.0), central)

        length = np.diff(step.points, axis=0)
        above, below = (
            np.diff(rise, axis=0) / np.where(length > 0, length, 1.0)
            for rise in (step.rise, step.fall)
        )
        own = (above + below) / 2
        least = np.where(length > 0, np.minimum(above, below), np.inf).min(axis=0)
        most = np.where(length > 0, np.maximum(above, below), -np.inf).max(axis=0)
        still = least > most
        least, most = np.where(still, 0.0, least), np.where(still, 0.0, most)
        here = (length > 0) & (step.points[:-1] <= z) & (z <= step.points[1:])
        central = (own * here).sum(axis=0) / np.maximum(here.sum(axis=0), 1)

        whole = chord(lower, upper)
        near = whole
        if spread:
            norm = np.maximum(np.linalg.norm(w, axis=1, keepdims=True), 1e-80)
            half = np.maximum(radius * np.abs(w) / norm / spread, 1e-80)
            near = chord(np.maximum(lower, z - half), np.minimum(upper, z + half))
        if local is None:
            cheap = np.where(2 * whole > least + most, most, least)
        else:
            cheap = local * central + (1 - local) * (least + most) / 2
        costly = w * (chord(z, upper) - chord(lower, z)) >= 0
        slopes = np.where(costly, near, cheap)
        straight = np.abs(most - least) <= 1e-9
        slopes = np.where(straight, kept * least, slopes)
        return np.where(step.counts, slopes, step.fixed)

    return rule


# The rules that are tried, the best for each rival.
RULES = (by_rule(0.4, 0.75, 0.8), by_rule(0.0, None, 1.0))


def _at(step: Step, rise: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The rise from the center to t, a point of the box, from that to the points."""
    total = np.zeros(np.broadcast_shapes(t.shape, step.center.shape))
    for first, last, low, high in zip(
        step.points[:-1], step.points[1:], rise[:-1], rise[1:], strict=True
    ):
        gap = last - first
        share = np.where(gap > 0, (np.clip(t, first, last) - first) / np.where(gap > 0, gap, 1), 0)
        total = total + share * (high - low)
    return total + rise[0]


def from_file(slopes: Sequence[np.ndarray]) -> Callable[..., np.ndarray]:
    """As `by_rule`, from the slopes of one activation step after the other, whole numbers.

    To be asked in that order reversed, as rows are carried back.
    """
    left = list(slopes)

    def rule(step: Step, w: np.ndarray, radius: float) -> np.ndarray:
        given = left.pop().astype(np.float64) / UNIT
        return np.where(step.counts, given, step.fixed) + np.zeros(w.shape)

    return rule


def steps_of(activation: Any, before, after, rows: np.ndarray) -> list[Step] | None:
    """The steps of an activation, in order; None if this knows nothing of its kind.

    Args:
        before, after: what is known of its input and of its value.
        rows: the inputs that the ball counts.
    """
    if hasattr(activation, "compared"):
        found = activation.compared(before)
        return None if found is None else _comparators(found)
    if hasattr(activation, "chords"):
        left, right = activation.chords(before)
        return [_smooth(before, left, right, rows)]
    if not isinstance(activation, Activation):
        if not hasattr(activation, "kinks"):
            return None
        kinks = [np.broadcast_to(kink, before.center.shape) for kink in activation.kinks]
        return [_elementwise(activation.rise, kinks, before, rows)]
    if not activation.pairs:
        ends = (activation.bottom, activation.top)
        kinks = [np.broadcast_to(end, activation.shape).reshape(-1) for end in ends]
        return [_elementwise(activation.rise, kinks, before, rows)]

    # MaxMin: sorts the pairs, then cuts.
    def order(values):
        p, q = activation.halves(values)
        return activation.joined(np.maximum(p, q), np.minimum(p, q))

    half = (*activation.shape[:-1], activation.shape[-1] // 2)
    bottom = activation.joined(np.full(half, -np.inf), np.broadcast_to(activation.bottom, half))
    top = activation.joined(np.broadcast_to(activation.top, half), np.full(half, np.inf))

    def clipped(start, end):
        start, end = (np.maximum(np.minimum(z, top), bottom) for z in (start, end))
        return end - start

    known = (before.center, before.lower, before.upper)
    center, lower, upper = (order(end) for end in known)
    sorted_ = dataclasses.replace(before, center=center, lower=lower, upper=upper)
    center_halves, lower_halves, upper_halves = map(activation.halves, known)
    first = _pair(activation, center_halves, lower_halves, upper_halves, rows)
    if not np.any(np.isfinite(activation.top)) and not np.any(np.isfinite(activation.bottom)):
        return [first]
    return [first, _elementwise(clipped, [bottom, top], sorted_, after.varies)]


def sizes(walked) -> list[int]:
    """The coordinates of each step of each activation in front of the last layer, in order."""
    found = []
    for number, node in enumerate(walked.nodes[:-1], 1):
        if isinstance(node.step, Nonlinear):
            before, after = walked.values[node.inputs[-1]], walked.values[number]
            steps = steps_of(node.step, before, after, walked.rows[number]) or []
            found += [len(step.center) for step in steps]
    return found


def _elementwise(rise_of, kinks, before, counts) -> Step:
    lower, upper = before.lower, before.upper
    points = np.sort([lower, *(np.clip(kink, lower, upper) for kink in kinks), upper], axis=0)
    rise = np.array([rise_of(before.center, point) for point in points])
    return _alone(points, rise, rise, before.center, counts)


def _smooth(before, left, right, counts) -> Step:
    """Between the smallest and the largest slopes of chords from the center, on either side."""
    points = np.array([before.lower, before.center, before.upper])
    none = np.zeros(len(before.center))
    down, above = points[0] - points[1], points[2] - points[1]
    rise = np.array([left[0] * down, none, right[1] * above])
    fall = np.array([left[1] * down, none, right[0] * above])
    return _alone(points, rise, fall, before.center, counts)


def _alone(points, rise, fall, center, counts) -> Step:
    """A step of coordinates each by itself."""
    none = np.zeros(len(center))
    return Step(
        *(points, rise, fall, center, counts, none, 1.0),
        *(lambda g: g, lambda g, slopes: g * slopes),
    )


def _pair(activation: Activation, center, lower, upper, rows: np.ndarray) -> Step:
    """(a, b) to (a + b) / 2 +- |a - b| / 2: the sum is kept, the difference meets ``|t|``."""
    (a, b), (lower_a, lower_b), (upper_a, upper_b) = center, lower, upper
    t = (a - b).reshape(-1)
    least, most = (lower_a - upper_b).reshape(-1), (upper_a - lower_b).reshape(-1)
    room = 8 * U * np.maximum(np.abs(least), np.abs(most))
    least, most = np.minimum(least - room, t), np.maximum(most + room, t)
    points = np.sort([least, np.clip(0.0, least, most), most], axis=0)
    # Where not both inputs count the order is fixed, or nothing is carried back here.
    sign = np.where(lower_a >= upper_b, 1.0, np.where(lower_b >= upper_a, -1.0, 0.0)).reshape(-1)
    row_a, row_b = (half.reshape(-1) for half in activation.halves(rows))

    def halves(g):
        return np.split(g.reshape(len(g), *activation.shape), 2, axis=-1)

    def met(g):
        first, second = halves(g)
        return (first - second).reshape(len(g), -1) / 2

    def back(g, slopes):
        first, second = halves(g)
        kept = (first + second) / 2
        turned = slopes.reshape(kept.shape) * (first - second) / 2
        return np.concatenate([kept + turned, kept - turned], axis=-1).reshape(len(g), -1)

    rise = np.abs(points) - np.abs(t)
    return Step(points, rise, rise, t, row_a & row_b, sign, 1 / math.sqrt(2), met, back)


def _comparators(rows: Rows) -> list[Step]:
    """Stages of comparators; of each, what is known of it stands at its first entry."""
    lower, upper, weight = rows.lower.copy(), rows.upper.copy(), rows.weight.copy()
    found = []
    for number, (distance, first) in enumerate(rows.stages):
        row, i = np.nonzero(first)
        one, other = (row, i), (row, i + distance)
        t = rows.center[other] - rows.center[one]
        least, most = lower[other] - upper[one], upper[other] - lower[one]
        room = 8 * U * np.maximum(np.abs(least), np.abs(most))
        least, most = np.minimum(least - room, t), np.maximum(most + room, t)
        points = np.zeros((3, rows.places.size))
        points[:, rows.places[one]] = np.sort([least, np.clip(0.0, least, most), most], axis=0)
        center, both = np.zeros((2, rows.places.size))
        center[rows.places[one]] = t
        both[rows.places[one]] = weight[one] + weight[other]
        rise = np.abs(points) - np.abs(center)
        counts = both > 0
        unit = np.sqrt(1 / np.where(counts, both, 1.0)) * (1 - 8 * U)
        last = number == len(rows.stages) - 1
        maps = _carried(rows, one, other, number == 0, last)
        ones = np.ones(center.shape)
        found.append(Step(points, rise, rise, center, counts, ones, unit, *maps))
        for ends in (lower, upper):
            ends[one], ends[other] = (
                np.minimum(ends[one], ends[other]),
                np.maximum(ends[one], ends[other]),
            )
        weight[one] = weight[other] = np.maximum(weight[one], weight[other])
    return found


def _carried(rows: Rows, one, other, first: bool, last: bool) -> tuple[Callable, Callable]:
    """`Step.met` and `Step.back` of a stage: sums are kept, differences meet ``|t|``."""

    def entries(g):
        return rows.entered(g) if last else g.reshape(len(g), *rows.places.shape)

    def met(g):
        g = entries(g)
        w = np.zeros((len(g), rows.places.size))
        w[:, rows.places[one]] = (g[:, *other] - g[:, *one]) / 2
        return w

    def back(g, slopes):
        g = entries(g)
        kept = (g[:, *other] + g[:, *one]) / 2
        turned = slopes[:, rows.places[one]] * (g[:, *other] - g[:, *one]) / 2
        row = g.copy()
        row[:, *one] = kept - turned
        row[:, *other] = kept + turned
        return rows.left(row) if first else row.reshape(len(row), -1)

    return met, back
