"""The checker's margins in modes "linear", "rows" and "tight": rows carried back through slopes,
and what the slopes' errors can add.

Part of `lipjax.check`; shares nothing with the bounds that it checks. The claim (METHOD 5): with D
the change of a quantity from its center, an activation is ``D a = M D z + e``, M elementwise (or on
pairs) and ``|e| <= width |D z|``; then for every layer j ``<d, D h> = <P_j^T d, D h_j> + sum_{i >
j} <P_i^T d, e_i>``. Here the extreme slopes of the chords are found by trying every point at which
a chord of a piecewise linear function can be extreme: its kinks, the ends of the box, and the
    center itself, from both sides.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lipjax.check import onesided
from lipjax.check.layers import Activation, Add, Affine, Move, Nonlinear
from lipjax.check.norms import TINY, U, gamma, up, up_norm


@dataclasses.dataclass(frozen=True)
class Piece:
    """One step of an activation on ``(rows, n)`` arrays of rows: its errors, and its map.

    Attributes:
        along: rows to the coordinates of e that they meet.
        back: rows g to ``M^T g``.
        reach: bounds of the coordinates of e.
        radius: bound of their l2 norm, where they matter.
    """

    along: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]
    reach: np.ndarray
    radius: float


def linear_gains(
    walked: Any,
    start: int,
    rows: np.ndarray,
    gains: np.ndarray,
    worst_gains: Callable,
    rule: Callable | None = None,
) -> np.ndarray:
    """At most `gains`: upper bounds of ``max <d, D h>`` for each row d, h being one of the values.

    At every moment ``<d, D h> <= sum over the live values v of <g_v, D v> + spent``. The last live
    value is passed on to those that it was made of, until only the image is left.

    Args:
        walked: what is known of all values up to h, a `check_walk.Walk`.
        start: the number of h.
        rows: ``(rivals, n)``, zero where h does not vary; each entry may be a rounded difference.
        gains: ``(rivals,)``, the bounds from the region of h alone.
        worst_gains: ``(directions, low, high, radius)`` to the largest products over a ball and a
            box.
        rule: of slopes for one-sided errors (`lipjax.check.onesided`); None: errors by `pieces`.
    """
    best, live = gains, {start: rows}
    spent = 4 * U * _lengths(rows) * walked.values[start].radius
    while max(live) > 0:
        number = max(live)
        g, node = live.pop(number), walked.nodes[number - 1]
        before = walked.values[node.inputs[-1]]
        steps = None
        if isinstance(node.step, Nonlinear):
            # With a slope above 1, and where an entry stands in several places, more is rounded.
            length = up_norm(before.offset()) * max(1.0, node.step.growth(before)) ** 3
            if np.any(slack := walked.slack[number]):
                spent = up(spent + np.abs(g) @ slack, g.shape[1])
            if rule is not None:
                known = before, walked.values[number], walked.rows[number]
                steps = onesided.steps_of(node.step, *known)
        if rule is not None and steps is not None:
            for step in reversed(steps):
                met = step.met(g)
                taken = rule(step, met, walked.moving[number])
                cost = step.cost(met, taken, walked.moving[number])
                spent = up(spent + cost + 16 * U * _lengths(g) * length)
                g = step.back(g, taken)
        elif isinstance(node.step, Nonlinear):
            for piece in reversed(pieces(node.step, before, walked.moving[number])):
                met = piece.along(g)
                open_ = piece.reach > 0
                cost = worst_gains(
                    met[:, open_], -piece.reach[open_], piece.reach[open_], piece.radius
                )
                spent = up(spent + cost + 16 * U * _lengths(g) * length)
                g = piece.back(g)
        elif not isinstance(node.step, Move):
            spent = up(spent + np.abs(g) @ walked.slack[number], g.shape[1])
        parts = [g]
        if isinstance(node.step, Affine):
            outputs, inside = g.shape[1], before.varies
            sizes = node.step.absolute.T @ np.abs(g).T
            parts = [(node.step.matrix.T @ g.T).T * inside]
            # (TINY: `up_norm` is 0 where all sizes have underflowed.)
            rounded = 2 * gamma(outputs + 8) * (_lengths(sizes.T[:, inside]) + TINY)
            spent = up(spent + rounded * before.radius)
        elif isinstance(node.step, Add):
            parts = [sign * g for sign in node.step.signs]
        elif isinstance(node.step, Move):
            parts = node.step.back(g)
            if node.step.copies > 1:  # what meets in one entry is added up, and that is rounded
                unit = 2 * gamma(node.step.copies + 4)
                for taken, sizes in zip(node.inputs, node.step.back(np.abs(g)), strict=True):
                    offset = walked.values[taken].offset()
                    spent = up(spent + up(unit * (sizes @ offset), offset.size))
        for taken, part in zip(node.inputs, parts, strict=True):
            if taken in live:  # both ways lead here, and their sum is rounded
                live[taken] = live[taken] + part
                spent = up(
                    spent + 4 * U * _lengths(live[taken]) * up_norm(walked.values[taken].offset())
                )
            else:
                live[taken] = part
        value = max(live)
        if len(live) == 1 and value not in walked.kept:  # of those only the box is known
            best = np.minimum(
                best, up(_of_value(live[value], walked.values[value], worst_gains) + spent)
            )
    return best


def _of_value(g: np.ndarray, known: Any, worst_gains: Callable) -> np.ndarray:
    """The largest ``<g, D v>`` by what is known of the value v itself."""
    inside, offset = known.varies, known.offset()
    low, high = known.lower - known.center, known.upper - known.center
    varying = worst_gains(g[:, inside], low[inside], high[inside], known.radius)
    return up(varying + np.abs(g[:, ~inside]) @ offset[~inside], offset.size)


def _lengths(rows: np.ndarray) -> np.ndarray:
    return np.array([up_norm(row) for row in rows])


def pieces(step: Nonlinear, known, moving: float) -> list[Piece]:
    """The steps of an activation, in order, on what is known of its input.

    Args:
        moving: bound of ``||z - center||_2`` over the inputs that can move an output, and of what
            is not known of those that do not vary.
    """
    if not isinstance(step, Activation):
        return step.pieces(known, moving)
    if not step.pairs:
        ends = (step.bottom, step.top)
        kinks = tuple(np.broadcast_to(end, step.shape).reshape(-1) for end in ends)
        return [elementwise(step, kinks, known.center, known.lower, known.upper, moving)]
    (a, b), (lower_a, lower_b), (upper_a, upper_b) = (
        step.halves(end) for end in (known.center, known.lower, known.upper)
    )
    first = _pair(
        step,
        a,
        b,
        lower_a - upper_b,
        upper_a - lower_b,
        lower_a >= upper_b,
        lower_b >= upper_a,
        moving,
    )

    def order(p, q):
        return step.joined(np.maximum(p, q), np.minimum(p, q))

    half = (*step.shape[:-1], step.shape[-1] // 2)
    bottom = step.joined(np.full(half, -np.inf), np.broadcast_to(step.bottom, half))
    top = step.joined(np.broadcast_to(step.top, half), np.full(half, np.inf))

    def clip(z):
        return np.maximum(np.minimum(z, top), bottom)

    return [
        first,
        elementwise(
            clip,
            (bottom, top),
            order(a, b),
            order(lower_a, lower_b),
            order(upper_a, upper_b),
            moving,
        ),
    ]


def extremes(function, kinks, z, lower, upper) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest slope of the chords from z of a function that is linear between its
    kinks.

    On each linear part the chord's slope is monotone in its far end, so that the extremes are at
    the kinks inside the box, at its ends, or, in the limit, at z: there it is the slope between z
    and the nearest of the other points.
    """
    points = [lower, upper, *(np.clip(kink, lower, upper) for kink in kinks)]
    slopes = [
        np.where(p == z, np.nan, (function(p) - function(z)) / np.where(p == z, 1.0, p - z))
        for p in points
    ]
    # The limit at z from each side, with the nearest point on that side at the other end of the
    # linear part.
    for side in (-1.0, 1.0):
        distance = np.min(
            [np.where((p - z) * side > 0, np.abs(p - z), np.inf) for p in points], axis=0
        )
        near = np.where(np.isfinite(distance), z + side * distance, z)
        slopes.append(
            np.where(
                near == z,
                np.nan,
                (function(near) - function(z)) / np.where(near == z, 1.0, near - z),
            )
        )
    nothing = np.all(np.isnan(slopes), axis=0)
    low = np.where(nothing, 0.0, np.nanmin(np.where(np.isnan(slopes), np.inf, slopes), axis=0))
    high = np.where(nothing, 0.0, np.nanmax(np.where(np.isnan(slopes), -np.inf, slopes), axis=0))
    return low, high


def elementwise(function, kinks, z, lower, upper, moving) -> Piece:
    """Of a piecewise linear function of slopes -1, 0 and 1."""
    low, high = extremes(function, kinks, z, lower, upper)
    # No kink strictly inside: one slope, exactly 0 or 1.
    straight = np.all([(kink <= lower) | (kink >= upper) for kink in kinks], axis=0)
    low, high = np.where(straight, np.round(low), low), np.where(straight, np.round(high), high)
    return between(low, high, straight, z, lower, upper, moving)


def between(low, high, straight, z, lower, upper, moving, size: float = 1.0) -> Piece:
    """Of an elementwise function whose chords from z have slopes from `low` to `high`.

    Args:
        straight: where both are the same, and exact.
        size: bound of the size of the slopes.
    """
    middle = (low + high) / 2
    width = np.where(straight, 0.0, (high - low) / 2 + 64 * U * size)
    reach = np.where(width > 0, up(width * np.maximum(upper - z, z - lower)), 0.0)
    radius = float(np.minimum(up(np.max(width, initial=0.0) * moving), up_norm(reach)))
    return Piece(lambda g: g, lambda g: g * middle, reach, radius)


def _pair(step, a, b, least, most, a_leads, b_leads, moving) -> Piece:
    """(a, b) to (max, min) is (a + b) / 2 +- |a - b| / 2: the chords are those of the absolute
    value."""
    t = a - b
    room = 8 * U * np.maximum(np.abs(least), np.abs(most))
    least, most = np.minimum(least - room, t), np.maximum(most + room, t)
    low, high = extremes(np.abs, (np.zeros(t.shape),), t, least, most)
    fixed = a_leads | b_leads
    sign = np.where(a_leads, 1.0, -1.0)
    low, high = np.where(fixed, sign, low), np.where(fixed, sign, high)
    middle, width = (low + high) / 2, np.where(fixed, 0.0, (high - low) / 2 + 64 * U)
    reach = np.where(
        width > 0, up(width * np.maximum(most - t, t - least) / math.sqrt(2)), 0.0
    ).reshape(-1)
    radius = float(np.minimum(up(np.max(width, initial=0.0) * moving), up_norm(reach)))

    def halves(g):
        g = g.reshape(len(g), *step.shape)
        return np.split(g, 2, axis=-1)

    def along(g):
        first, second = halves(g)
        return ((first - second) / math.sqrt(2)).reshape(len(g), -1)

    def back(g):
        first, second = halves(g)
        kept, turned = (first + second) / 2, middle * (first - second) / 2
        return np.concatenate([kept + turned, kept - turned], axis=-1).reshape(len(g), -1)

    return Piece(along, back, reach + TINY * (reach > 0), radius)
