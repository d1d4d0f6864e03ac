"""The checker's activations beside clipping and MaxMin: one class a kind, with all of its rules.

Part of `lipjax.check`; shares nothing with the bounds that it checks. A kind says what is known of
its value, given that of its input (`activated`), and how it is relaxed (`pieces`, see
`lipjax.check.slopes`). To add one: its class, what reads it, and a line in `READERS`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import scipy.sparse  # type: ignore[import-untyped]
import scipy.special  # type: ignore[import-untyped]

from lipjax.check.layers import CannotCheck, Nonlinear
from lipjax.check.norms import TINY, U, up, up_norm
from lipjax.check.onesided import Rows
from lipjax.check.slopes import Piece, between, elementwise, extremes

# Entries of the windows of a pooling, and numbers that describe them.
MOST = 2**28
# Longer groups are not sorted by comparators.
LONGEST = 8
# Of results that are rounded entry by entry, by their type: unit roundoff, what underflow can take,
# and the largest number.
UNITS = {
    "float64": (2.0**-53, 2.0**-1020, 2.0**1023),
    "float32": (2.0**-24, 2.0**-125, 2.0**127),
    "bfloat16": (2.0**-8, 2.0**-125, 2.0**127),
}


@dataclasses.dataclass(frozen=True)
class Absolute(Nonlinear):
    """``|z|``, exact, and 1-Lipschitz."""

    # Between them it is linear (`lipjax.check.onesided`).
    kinks: ClassVar[tuple[float, ...]] = (0.0,)

    def __call__(self, z: np.ndarray) -> np.ndarray:
        return np.abs(z)

    def activated(self, known):
        ends = np.abs(known.lower), np.abs(known.upper)
        turns = (known.lower <= 0) & (known.upper >= 0)
        lower = np.where(turns, 0.0, np.minimum(*ends))
        found = dataclasses.replace(
            known, center=np.abs(known.center), lower=lower, upper=np.maximum(*ends)
        )
        return found, known.varies

    def pieces(self, known, moving: float) -> list[Piece]:
        kinks = (np.zeros(known.center.shape),)
        return [elementwise(np.abs, kinks, known.center, known.lower, known.upper, moving)]


@dataclasses.dataclass(frozen=True)
class Sort(Nonlinear):
    """Groups of entries in ascending order; exact, and 1-Lipschitz.

    Attributes:
        places: ``(groups, size)``, where the entries of each group stand. Sorted they stand there
            again.
    """

    places: np.ndarray

    def __call__(self, z: np.ndarray) -> np.ndarray:
        return self._back(np.sort(z[self.places], axis=1))

    def _back(self, grouped: np.ndarray) -> np.ndarray:
        """From ``(..., groups, size)`` to flattened arrays."""
        found = np.empty((*grouped.shape[:-2], grouped.shape[-2] * grouped.shape[-1]))
        found[..., self.places] = grouped
        return found

    def activated(self, known):
        lower, upper = self(known.lower), self(known.upper)
        # A NaN would only go to the end of its group: it must spread.
        lost = np.isnan(known.lower + known.upper)[self.places].any(axis=1, keepdims=True)
        lost = self._back(np.broadcast_to(lost, self.places.shape)) > 0
        _, single, _, order = self._blocks(known)
        sources = np.take_along_axis(known.varies[self.places], order, axis=1)
        either = np.broadcast_to(sources.any(axis=1, keepdims=True), sources.shape)
        own = np.where(single, sources, either)
        varies = self._back(own) > 0
        # What shares a block with one that varies counts too: it is known only so far.
        rows = np.zeros_like(known.varies)
        rows[np.take_along_axis(self.places, order, axis=1)] = own
        worst = np.max(known.error[self.places], axis=1, keepdims=True)
        found = dataclasses.replace(
            known,
            center=self(known.center),
            lower=np.where(lost, np.nan, lower),
            upper=np.where(lost, np.nan, upper),
            varies=varies & (lower != upper) | lost,
            error=self._back(np.broadcast_to(worst, self.places.shape)),
        )
        return found, rows

    def _blocks(self, known):
        """Neighbours in the order of the centers that no point of the box takes out of it.

        A block ends where nothing before can get above anything behind. Returned are, each
        ``(groups, size)`` in that order: the number of the block, whether it has one entry, whether
        an entry is the first of a block of two; and the order.
        """
        order = np.argsort(known.center[self.places], axis=1, kind="stable")
        lower = np.take_along_axis(known.lower[self.places], order, axis=1)
        upper = np.take_along_axis(known.upper[self.places], order, axis=1)
        highest = np.maximum.accumulate(upper, axis=1)[:, :-1]
        lowest = np.minimum.accumulate(lower[:, ::-1], axis=1)[:, ::-1][:, 1:]
        starts = np.ones(order.shape, bool)
        starts[:, 1:] = highest <= lowest
        number = np.cumsum(starts, axis=1)
        size = np.sum(number[:, :, None] == number[:, None, :], axis=2)
        return number, size == 1, starts & (size == 2), order

    def pieces(self, known, moving: float) -> list[Piece]:
        _, single, first, order = self._blocks(known)
        places = np.take_along_axis(self.places, order, axis=1)  # in the order of the centers
        second = np.zeros_like(first)
        second[:, 1:] = first[:, :-1]
        rest = ~(single | first | second)
        ahead = np.minimum(np.arange(order.shape[1]) + 1, order.shape[1] - 1)

        # Of a pair: the chords of the absolute value of its difference.
        z, lower, upper = (end[places] for end in (known.center, known.lower, known.upper))
        t = z[:, ahead] - z
        room = 8 * U * (np.abs(lower) + np.abs(upper) + np.abs(lower[:, ahead] + upper[:, ahead]))
        least = np.minimum(lower[:, ahead] - upper - room, t)
        most = np.maximum(upper[:, ahead] - lower + room, t)
        low, high = extremes(np.abs, (np.zeros(t.shape),), t, least, most)
        middle = (low + high) / 2
        width = (high - low) / 2 + 64 * U
        along = width * np.maximum(most - t, t - least) / math.sqrt(2)

        # In a larger block all is error, each output by its own box.
        ends = np.sort(known.lower[self.places], axis=1), np.sort(known.upper[self.places], axis=1)
        alone = np.maximum(ends[1] - z, z - ends[0])
        reach = np.where(first, up(along), np.where(rest, up(alone), 0.0))
        widest = np.max(np.where(first, width, np.where(rest, 1.0, 0.0)), initial=0.0)
        radius = float(np.minimum(up(widest * moving), up_norm(reach)))

        def met(g):
            sorted_ = g[:, self.places]
            pair = (sorted_[:, :, ahead] - sorted_) / math.sqrt(2)
            return np.where(first, pair, np.where(rest, sorted_, 0.0)).reshape(len(g), -1)

        def back(g):
            sorted_ = g[:, self.places]
            kept = (sorted_[:, :, ahead] + sorted_) / 2
            turned = middle * (sorted_[:, :, ahead] - sorted_) / 2
            row = np.where(single, sorted_, 0.0) + np.where(first, kept - turned, 0.0)
            row[:, :, 1:] += np.where(first, kept + turned, 0.0)[:, :, :-1]
            found = np.empty(g.shape)
            found[:, places] = row
            return found

        return [Piece(met, back, reach.reshape(-1), radius)]

    def compared(self, known) -> Rows | None:
        """Each block sorted by the network of `sorting`, which begins where the block does."""
        size = self.places.shape[1]
        if not 1 < size <= LONGEST:
            return None
        number, _, _, order = self._blocks(known)
        places = np.take_along_axis(self.places, order, axis=1)
        # Of each entry, how many of its block are in front of it.
        own = np.sum(np.tril(number[:, :, None] == number[:, None, :], -1), axis=2)
        stages = []
        for distance, starts in sorting(size):
            first = np.isin(own, starts)
            first[:, size - distance :] = False
            first[:, : size - distance] &= number[:, distance:] == number[:, : size - distance]
            stages.append((distance, first))

        def left(g):
            found = np.empty((len(g), self.places.size))
            found[:, places] = g
            return found

        center, lower, upper = (end[places] for end in (known.center, known.lower, known.upper))
        weight = (lower != upper).astype(np.float64)
        maps = (lambda g: g[:, self.places]), left
        return Rows(center, lower, upper, weight, stages, self.places, *maps)


def sorting(size: int) -> list[tuple[int, list[int]]]:
    """Odd-even merging (Batcher 1968): stages that sort any number of entries up to `size`, of each
    the distance of the two that are compared and where the first of them stand."""
    stages: dict[tuple[int, int], list[int]] = {}

    def merge(start: int, length: int, step: int, half: int):
        """Two sorted halves, of those entries that are `step` apart."""
        if 2 * step == length:
            stages.setdefault((half, step), []).append(start)
            return
        merge(start, length, 2 * step, half)
        merge(start + step, length, 2 * step, half)
        firsts = range(start + step, start + length - step, 2 * step)
        stages.setdefault((half, step), []).extend(firsts)

    half = 1
    while half < size:
        for start in range(0, size, 2 * half):
            merge(start, 2 * half, 1, half)
        half *= 2
    # Merges rise, and in each the distances fall.
    return [(key[1], stages[key]) for key in sorted(stages, key=lambda key: (key[0], -key[1]))]


@dataclasses.dataclass(frozen=True)
class Leaky(Nonlinear):
    """``below z`` where z < 0, ``above z`` elsewhere.

    Attributes:
        below, above: slopes, one an entry.
        dtype: in which the products are rounded.
    """

    kinks: ClassVar[tuple[float, ...]] = (0.0,)

    below: np.ndarray
    above: np.ndarray
    dtype: str

    def __call__(self, z: np.ndarray) -> np.ndarray:
        return np.where(z < 0, self.below, self.above) * z

    @property
    def lipschitz(self) -> float:  # type: ignore[override]
        return float(np.max([np.abs(self.below), np.abs(self.above)], initial=0.0))

    def growth(self, known) -> float:
        return float(np.max(np.abs(self._sides(known)), initial=0.0))

    def rise(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        down = np.minimum(end, 0.0) - np.minimum(start, 0.0)
        return self.below * down + self.above * (np.maximum(end, 0.0) - np.maximum(start, 0.0))

    def _sides(self, known) -> tuple[np.ndarray, np.ndarray]:
        """The slopes at the lower and at the upper end."""
        return (
            np.where(known.lower >= 0, self.above, self.below),
            np.where(known.upper <= 0, self.below, self.above),
        )

    def off(self, value: np.ndarray) -> np.ndarray:
        return 4 * U * np.abs(value) + TINY

    def activated(self, known):
        values = [self(known.lower), self(known.upper)]
        values.append(np.where((known.lower < 0) & (known.upper > 0), 0.0, values[0]))
        low, high = np.min(values, axis=0), np.max(values, axis=0)
        # The largest slope multiplies what the input is off, and the product is rounded.
        unit, smallest, largest = UNITS[self.dtype]
        slope = np.maximum(np.abs(self.below), np.abs(self.above))
        sizes = np.abs([self.below, self.above])
        rounds = np.max(np.where(sizes == 1, 0.0, sizes), axis=0)  # a factor 1 rounds nothing
        size = np.maximum(np.abs(known.lower), np.abs(known.upper)) + known.error
        # A slope or an input that is subnormal may count as 0, and is multiplied by the other.
        own = up(unit * rounds * size) + 4 * smallest * (1 + slope + size)
        error = np.where(slope * size < largest, up(slope * known.error + own), np.inf)
        distance = up(self.lipschitz * known.distance + up_norm(own))
        first, last = self._sides(known)
        moves = known.varies & ~((first == 0) & (last == 0))
        found = dataclasses.replace(
            known,
            center=self(known.center),
            lower=low - self.off(low),
            upper=high + self.off(high),
            varies=moves,
            error=error,
            distance=float(np.minimum(distance, up_norm(error))),
        )
        return found, moves

    def pieces(self, known, moving: float) -> list[Piece]:
        z, lower, upper = known.center, known.lower, known.upper
        straight = (lower >= 0) | (upper <= 0)
        own = np.where(z >= 0, self.above, self.below)
        own = np.where(straight, np.where(lower >= 0, self.above, self.below), own)
        # To the far end on the other side: a mean of both slopes, by how far it is from the kink.
        beyond = np.where(z >= 0, -lower, upper) * ~straight
        share = beyond / np.where(beyond + np.abs(z) > 0, beyond + np.abs(z), 1.0)
        chord = (1 - share) * own + share * np.where(z >= 0, self.below, self.above)
        chord = np.where(straight, own, chord)
        ends = np.minimum(own, chord), np.maximum(own, chord)
        size = max(1.0, self.lipschitz)
        return [between(*ends, straight, z, lower, upper, moving, size)]


@dataclasses.dataclass(frozen=True)
class MaxPool(Nonlinear):
    """The maximum of each window. Exact.

    Attributes:
        places: ``(outputs, taps)``, positions in the input; its size stands for what pads.
        size: of the input.
    """

    places: np.ndarray
    size: int

    def __call__(self, z: np.ndarray) -> np.ndarray:
        return np.max(self._held(z), axis=1)

    def _held(self, z: np.ndarray, filling: float = -np.inf) -> np.ndarray:
        """``(outputs, taps)``: what the windows hold."""
        return np.append(z, filling)[self.places]

    def _most(self, mask: np.ndarray | bool) -> float:
        """The root of the number of windows, of those in the mask, that an entry lies in."""
        counted = self.places[np.broadcast_to(mask, self.places.shape)]
        counts = np.bincount(counted, minlength=self.size + 1)[: self.size]
        return math.sqrt(np.max(counts, initial=0))

    @property
    def lipschitz(self) -> float:  # type: ignore[override]
        return up(self._most(True)) if self._most(True) != 1 else 1.0

    def growth(self, known) -> float:
        found = self._most(self._candidates(known)[0])
        return up(found) if found > 1 else found

    def _candidates(self, known):
        """Which entries can be above all that their window has at least; and that least value."""
        floor = self(known.lower)
        candidate = self._held(known.upper) > floor[:, None]
        lost = np.isnan(self._held(known.lower + known.upper, 0.0)).any(axis=1)
        return candidate | lost[:, None] & (self.places < self.size), floor

    def activated(self, known):
        candidate, _ = self._candidates(known)
        moving = candidate & np.append(known.varies, False)[self.places]
        rows = np.zeros(self.size + 1, bool)
        # What shares a window with one that varies counts too: it is known only so far.
        rows[self.places[candidate & moving.any(axis=1, keepdims=True)]] = True
        lower, upper = self(known.lower), self(known.upper)
        error = np.max(self._held(known.error, 0.0), axis=1)
        distance = up(self.lipschitz * known.distance) if self.lipschitz != 1 else known.distance
        found = dataclasses.replace(
            known,
            center=self(known.center),
            lower=lower,
            upper=upper,
            varies=moving.any(axis=1) & (lower != upper),
            error=error,
            distance=float(np.minimum(distance, up_norm(error))),
        )
        return found, rows[: self.size]

    def pieces(self, known, moving: float) -> list[Piece]:
        """The leader a at the center, plus the positive part of what the largest other value, the
        least one among them, is ahead of it: t."""
        candidate, floor = self._candidates(known)
        low, high, z = (self._held(end) for end in (known.lower, known.upper, known.center))
        row = np.arange(len(z))
        a = np.argmax(np.where(candidate, z, -np.inf), axis=1)
        lead = np.zeros(z.shape, bool)
        lead[row, a] = True
        lead &= candidate
        rest, still = candidate & ~lead, ~candidate.any(axis=1)
        count = rest.sum(axis=1)
        # Two candidates, of which one has the floor: they are all that there is.
        pair = (count == 1) & np.any(candidate & (low >= floor[:, None]), axis=1)

        def ahead(of, lead_end):
            others = np.max(np.where(rest, of, -np.inf), axis=1)
            others = np.where(pair, others, np.maximum(others, floor))
            return others - np.where(still, floor, lead_end[row, a])

        t, least, most = ahead(z, z), ahead(low, high), ahead(high, low)
        certain = still | (most <= 0)  # a difference has the sign of the exact one
        room = 8 * U * np.maximum(np.abs(least), np.abs(most))
        least, most = np.minimum(least - room, t), np.maximum(most + room, t)

        linear = (count == 0) | pair
        kinks = (np.zeros(t.shape),)
        slopes = extremes(lambda p: np.maximum(p, 0.0), kinks, t, least, most)
        slope, width = (slopes[0] + slopes[1]) / 2, (slopes[1] - slopes[0]) / 2 + 64 * U

        part = np.maximum(t, 0.0)
        chosen = np.maximum(np.maximum(most, 0.0) - part, part - np.maximum(least, 0.0))
        value = self(known.center)
        whole = np.maximum(self(known.upper) - value, value - self(known.lower))
        reach = np.where(linear, width * np.maximum(most - t, t - least), np.minimum(chosen, whole))
        reach = np.where(certain, 0.0, up(reach))
        # How far t can move, in units of how far the window's entries do.
        unit = np.where(linear, width * np.where(count == 0, 1.0, math.sqrt(2)), math.sqrt(2))
        nothing = ~linear & ~certain & (whole <= chosen)
        unit = np.where(certain, 0.0, np.where(nothing, 1.0, unit))
        share = np.where(linear & ~certain, slope, 0.0)[:, None]
        weights = np.where(nothing[:, None], 0.0, lead * (1 - share) + rest * share)
        radius = up(up(np.max(unit, initial=0.0) * moving) * self.growth(known))
        radius = float(np.minimum(radius, up_norm(reach)))
        entries = (weights.reshape(-1), (self.places.reshape(-1), np.repeat(row, z.shape[1])))
        back = scipy.sparse.csr_array(entries, shape=(self.size + 1, len(z)))
        return [Piece(lambda g: g, lambda g: (back @ g.T).T[:, : self.size], reach, radius)]

    def compared(self, known) -> Rows | None:
        """A tournament of each window's candidates; the winner is the last entry. If none of them
        has the floor, one entry has that is constant, and takes part."""
        count = self.places.shape[1]
        if count == 1:
            return None
        candidate, floor = self._candidates(known)
        low, high, z = (self._held(end) for end in (known.lower, known.upper, known.center))
        row = np.arange(len(z))
        has_it = low >= floor[:, None]
        plays = candidate.copy()
        still = ~np.any(candidate & has_it, axis=1)
        plays[row[still], np.argmax(has_it, axis=1)[still]] = True
        windows = np.bincount(self.places[candidate], minlength=self.size + 1)
        weight = np.where(candidate, windows[self.places], 0).astype(np.float64)

        order = np.argsort(np.where(plays, z, -np.inf), axis=1, kind="stable")

        def ordered(x):
            return np.take_along_axis(x, order, axis=1)

        z, low, high = (ordered(np.where(plays, x, 0.0)) for x in (z, low, high))
        plays = ordered(plays)
        behind = count - 1 - np.arange(count)  # how many entries are
        stages = []
        distance = 1
        while distance < count:
            stages.append((distance, (behind % (2 * distance) == distance) & plays))
            distance *= 2

        def entered(g):
            found = np.zeros((len(g), *z.shape))
            found[:, :, -1] = g
            return found

        sources = ordered(self.places).reshape(-1)
        columns = np.arange(sources.size)
        shape = (self.size + 1, sources.size)
        back = scipy.sparse.csr_array((np.ones(sources.size), (sources, columns)), shape=shape)

        def left(g):
            return (back @ g.reshape(len(g), -1).T).T[:, : self.size]

        places = np.arange(z.size).reshape(count, len(z)).T  # a tap of all windows, then the next
        return Rows(z, low, high, ordered(weight), stages, places, entered, left)


# Of smooth functions as XLA executes them on CPUs, in float32 or float64: units of roundoff.
EXECUTED_UNITS = 16
# Largest size of an input that was measured.
MEASURED_TO = 1e18
ROOT = math.sqrt(2 / math.pi)


def _logistic_density(z):
    return scipy.special.expit(z) * scipy.special.expit(-z)


# Functions that rise everywhere.
PLAIN = ("sigmoid", "tanh", "softplus", "softsign")
# z g(z): the gate g, its derivative; where the derivative of z g(z) is largest for z > 0, between
# two numbers, and how large at most; where z g(z) is least, and how small.
GATED = {
    "gelu": (
        scipy.special.ndtr,
        lambda z: np.exp(-z * z / 2) / math.sqrt(2 * math.pi),
        (1.414213562372, 1.414213562374, 1.128904145186),
        (-0.751791524695, -0.751791524693, -0.169971207481),
    ),
    "gelu_tanh": (
        lambda z: scipy.special.expit(2 * ROOT * (z + 0.044715 * z**3)),
        lambda z: (
            2
            * ROOT
            * (1 + 3 * 0.044715 * z * z)
            * _logistic_density(2 * ROOT * (z + 0.044715 * z**3))
        ),
        (1.418504008790, 1.418504008792, 1.128993068660),
        (-0.752461422072, -0.752461422070, -0.170040750572),
    ),
    "silu": (
        scipy.special.expit,
        _logistic_density,
        (2.399357280514, 2.399357280516, 1.099839320130),
        (-1.278464542762, -1.278464542760, -0.278464542762),
    ),
    "hard_swish": (
        lambda z: np.clip(z + 3, 0.0, 6.0) / 6,
        lambda z: np.where(np.abs(z) <= 3, 1 / 6, 0.0),
        (3.0, 3.0, 1.5),
        (-1.5, -1.5, -0.375),
    ),
}


@dataclasses.dataclass(frozen=True)
class Smooth(Nonlinear):
    """An elementwise function with a derivative, all rounded.

    Attributes:
        kind: its name.
        dtype: in which it is executed.
        alpha: of "elu", one number an entry.
    """

    kind: str
    dtype: str
    alpha: Any = None

    def __call__(self, z: np.ndarray) -> np.ndarray:
        match self.kind:
            case "sigmoid":
                return scipy.special.expit(z)
            case "tanh":
                return np.tanh(z)
            case "softplus":
                return np.maximum(z, 0.0) + np.log1p(np.exp(-np.abs(z)))
            case "softsign":
                return z / (1 + np.abs(z))
            case "elu":
                return np.where(z > 0, z, self.alpha * np.expm1(np.minimum(z, 0.0)))
        return z * GATED[self.kind][0](z)

    def _slope(self, z: np.ndarray) -> np.ndarray:
        z = np.clip(z, -40.0, 40.0)
        match self.kind:
            case "sigmoid":
                return _logistic_density(z)
            case "tanh":
                return 4 * _logistic_density(2 * z)
            case "softplus":
                return scipy.special.expit(z)
            case "softsign":
                return 1 / np.square(1 + np.abs(z))
        gate, density = GATED[self.kind][:2]
        return gate(z) + z * density(z)

    @property
    def lipschitz(self) -> float:  # type: ignore[override]
        if self.kind == "elu":
            return float(np.max(np.abs(self.alpha), initial=1.0))
        if self.kind in GATED:
            return GATED[self.kind][2][2]
        return 0.25 if self.kind == "sigmoid" else 1.0

    def _slopes(self, known) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest slope on the box."""
        lower, upper = known.lower, known.upper
        if self.kind == "elu":
            below = [self.alpha * np.exp(np.minimum(end, 0.0)) for end in (lower, upper)]
            parts = [np.where(lower < 0, slope, 1.0) for slope in below]
            parts.append(np.where(upper > 0, 1.0, parts[0]))
        else:
            parts = [self._slope(lower), self._slope(upper)]
            if self.kind in GATED:
                first, last, most = GATED[self.kind][2]
                parts.append(np.where((lower <= last) & (upper >= first), most, parts[0]))
                parts.append(np.where((lower <= -first) & (upper >= -last), 1 - most, parts[0]))
            elif self.kind != "softplus":  # both are steepest at 0
                around = (lower <= 0) & (upper >= 0)
                parts.append(np.where(around, self.lipschitz, parts[0]))
        room = 2.0**-44 * max(1.0, self.lipschitz)
        return np.min(parts, axis=0) - room, np.max(parts, axis=0) + room

    def chords(self, known) -> list[tuple[np.ndarray, np.ndarray]]:
        """Smallest and largest slopes of chords from the center, to the left and to the right."""
        left = dataclasses.replace(known, upper=known.center)
        right = dataclasses.replace(known, lower=known.center)
        return [self._slopes(left), self._slopes(right)]

    def growth(self, known) -> float:
        return float(np.max(np.abs(self._slopes(known)), initial=0.0))

    def off(self, value: np.ndarray) -> np.ndarray:
        return 64 * U * (1 + np.abs(value)) * max(1.0, self.lipschitz)

    def activated(self, known):
        values = [self(known.lower), self(known.upper)]
        if self.kind == "elu":  # may turn at its kink
            values.append(np.where((known.lower < 0) & (known.upper > 0), 0.0, values[0]))
        if self.kind in GATED:
            first, last, least = GATED[self.kind][3]
            inside = (known.lower <= last) & (known.upper >= first)
            values.append(np.where(inside, least, values[0]))
        low, high = np.min(values, axis=0), np.max(values, axis=0)
        size = np.maximum(np.abs(known.lower), np.abs(known.upper)) + known.error
        scale = np.full(size.shape, max(1.0, self.lipschitz) if self.kind == "elu" else 1.0)
        if self.kind in GATED:
            scale = size
        elif self.kind == "softplus":
            scale = 1 + size
        unit, smallest, _ = UNITS[self.dtype]
        own = up(EXECUTED_UNITS * unit * scale) + 4 * smallest * (1 + self.lipschitz)
        error = np.where(size < MEASURED_TO, up(self.lipschitz * known.error + own), np.inf)
        distance = up(self.lipschitz * known.distance + up_norm(own))
        found = dataclasses.replace(
            known,
            center=self(known.center),
            lower=low - self.off(low),
            upper=high + self.off(high),
            error=error,
            distance=float(np.minimum(distance, up_norm(error))),
        )
        return found, known.varies

    def pieces(self, known, moving: float) -> list[Piece]:
        low, high = self._slopes(known)
        box = (known.center, known.lower, known.upper)
        return [between(low, high, False, *box, moving, max(1.0, self.lipschitz))]


# ------------------------------------------------------------------------ how they are described


def _same_shape(name: str, node, before) -> tuple[int, ...]:
    shape = tuple(node["shape"])
    if tuple(before[0]["shape"]) != shape:
        raise CannotCheck(f"{name} cannot take an input of shape {before[0]['shape']}.")
    return shape


def _absolute(name: str, node, before, executed) -> Absolute:
    _same_shape(name, node, before)
    return Absolute()


def _sort(name: str, node, before, executed) -> Sort:
    shape, axis = _same_shape(name, node, before), node["axis"]
    if type(axis) is not int or not 0 <= axis < len(shape):
        raise CannotCheck(f"{name} sorts along axis {axis} of an input of shape {shape}.")
    if math.prod(shape) * shape[axis] > MOST:
        raise CannotCheck(f"{name} sorts {shape} along axis {axis}: too much for this checker.")
    places = np.moveaxis(np.arange(math.prod(shape)).reshape(shape), axis, -1)
    return Sort(places.reshape(-1, shape[axis]))


def _leaky(name: str, node, before, executed) -> Leaky:
    shape = _same_shape(name, node, before)
    if executed.types - {node["dtype"]} or executed.results > 2:
        # One product a side, in its own type: no other way of writing it is known.
        raise CannotCheck(f"{name} is computed by other equations than one product a side.")
    below, above = (_fitting(name, node[side], shape) for side in ("below", "above"))
    return Leaky(below, above, node["dtype"])


def _max_pool(name: str, node, before, executed) -> MaxPool:
    shape = tuple(before[0]["shape"])
    columns = [node[field] for field in ("window", "strides", "dilation", "padding")]
    if not all(type(column) is list and len(column) == len(shape) for column in columns):
        raise CannotCheck(f"{name} says its windows of other axes than those of {shape}.")
    axes = []
    for n, size, step, apart, pad in zip(shape, *columns, strict=True):
        pair = pad if type(pad) is list and len(pad) == 2 else [None]
        fits = all(type(k) is int and 1 <= k <= MOST for k in (size, step, apart))
        if not fits or not all(type(k) is int and abs(k) <= MOST for k in pair):
            raise CannotCheck(f"{name} has windows {columns}, which are none.")
        count = (n + sum(pair) - (size - 1) * apart - 1) // step + 1
        if count < 1 or count * size > MOST:
            raise CannotCheck(f"{name} with windows {columns} cannot take an input of {shape}.")
        axes.append(np.arange(count)[:, None] * step - pair[0] + np.arange(size) * apart)
    found = tuple(len(axis) for axis in axes)
    taps = math.prod(columns[0])
    if found != tuple(node["shape"]) or math.prod(found) * taps > MOST:
        raise CannotCheck(f"{name} makes the shape {found}, but says {node['shape']}.")
    places = np.zeros((*found, *columns[0]), np.int64)
    inside = np.ones(places.shape, bool)
    for k, (n, axis) in enumerate(zip(shape, axes, strict=True)):
        spread = [1] * places.ndim
        spread[k], spread[k + len(shape)] = axis.shape
        axis = axis.reshape(spread)
        inside &= (axis >= 0) & (axis < n)
        places = places * n + axis
    size = math.prod(shape)
    places = np.where(inside, places, size).reshape(-1, taps)
    if not np.all(np.any(places < size, axis=1)):
        raise CannotCheck(f"{name} has a window that holds nothing of its input.")
    return MaxPool(places, size)


def _smooth(name: str, node, before, executed) -> Smooth:
    shape, dtype = _same_shape(name, node, before), node["dtype"]
    if dtype not in ("float32", "float64") or executed.types != {dtype}:
        raise CannotCheck(
            f"{name} is executed in {', '.join(sorted(executed.types)) or 'no arithmetic'}: its "
            "rounding is known in float32 and float64, and where an equation says which."
        )
    if executed.results > 1:
        raise CannotCheck(f"{name} is computed by more than one equation.")
    alpha = _fitting(name, node["alpha"], shape) if node["kind"] == "elu" else None
    return Smooth(node["kind"], dtype, alpha)


def _fitting(name: str, value, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter in float64, one number an entry."""
    if value is None:
        raise CannotCheck(f"{name} has a parameter missing.")
    try:
        return np.broadcast_to(value.astype(np.float64), shape).reshape(-1)
    except ValueError:
        raise CannotCheck(
            f"{name} has parameters of shape {value.shape}, which do not fit {shape}."
        ) from None


@dataclasses.dataclass(frozen=True)
class Reader:
    """How a kind is described.

    Attributes:
        read: ``(name, node, nodes before it, how it computes)`` to the step.
        fields: what else a description has.
        first: the equations that it may begin with; none if nothing is rounded.
    """

    read: Callable[..., Nonlinear]
    fields: tuple[str, ...] = ()
    first: tuple[str, ...] = ()


READERS: Mapping[str, Reader] = {
    "abs": Reader(_absolute),
    "sort": Reader(_sort, ("axis",)),
    "max_pool": Reader(_max_pool, ("window", "strides", "dilation", "padding")),
    "leaky": Reader(_leaky, ("below", "above"), ("mul", "div")),
    "elu": Reader(_smooth, ("alpha",), ("elu",)),
    **{kind: Reader(_smooth, (), (kind,)) for kind in (*PLAIN, *GATED)},
}
# Of their fields those that hold numbers, as arrays.
PARAMETERS = ("below", "above", "alpha")
# Kinds of which it is known how they are executed in these arithmetics alone.
MEASURED = {
    kind: ("float32", "float64") for kind, reader in READERS.items() if reader.read is _smooth
}
