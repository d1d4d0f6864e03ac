"""The checker's activations beside clipping and MaxMin: one class a kind, with all of its rules.

Part of `lipjax.check`; shares nothing with the bounds that it checks. A kind says what is known of
its value, given that of its input (`activated`), and how it is relaxed (`pieces`, see
`lipjax.check.slopes`). To add one: its class, and a line in `READERS`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from lipjax.check.layers import CannotCheck, Nonlinear
from lipjax.check.norms import U, up, up_norm
from lipjax.check.slopes import Piece, elementwise, extremes


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
        varies = self._back(np.where(single, sources, either)) > 0
        worst = np.max(known.error[self.places], axis=1, keepdims=True)
        found = dataclasses.replace(
            known,
            center=self(known.center),
            lower=np.where(lost, np.nan, lower),
            upper=np.where(lost, np.nan, upper),
            varies=varies & (lower != upper) | lost,
            error=self._back(np.broadcast_to(worst, self.places.shape)),
        )
        return found, known.varies

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
    places = np.moveaxis(np.arange(math.prod(shape)).reshape(shape), axis, -1)
    return Sort(places.reshape(-1, shape[axis]))


# By the kind of a described node: what else it says of itself, and what reads it.
READERS: Mapping[str, tuple[set[str], Callable[..., Any]]] = {
    "abs": (set(), _absolute),
    "sort": ({"axis"}, _sort),
}
