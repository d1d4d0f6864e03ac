"""Worst-case logits over the region in front of the last linear node: ball and box at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lipjax import rounding
from lipjax.bounds import relaxed, tight
from lipjax.bounds.modes import mode_of
from lipjax.bounds.regions import Bound, Region
from lipjax.graph import Graph, Linear
from lipjax.graph.linear import safe_norm

# Each halving of the bracket of log(1/mu) halves its error, and the bound's relative error is about
# the square of that: with these it is below the rounding of each type.
BISECTION_STEPS = {"float32": 16, "float64": 35}
# The largest ratio between the scaling of d at the optimum and that of the ball alone.
WIDEST = 1e12


def ascent(
    direction: jax.Array, region: Region, arithmetic: rounding.Rounding = rounding.EXACT
) -> jax.Array:
    """Upper bound of ``max <direction, t>`` over ball and box.

    The ball is ``||t||_2 <= radius``, the box ``lower - center <= t <= upper - center``. By duality
    every ``mu >= 0`` gives an upper bound ``<d, t> + mu / 2 (radius^2 - ||t||^2)`` at
    ``t = clip(d / mu, lower - center, upper - center)``; bisection on mu makes it tight (METHOD 3).
    Nothing large is subtracted from something large, so it stays right when nearly all of d sits on
    clipped coordinates. The result is never above the box alone, nor above the ball alone,
    ``radius * ||d||``. The mu of the bisection is held fixed in the gradient, which is right by the
    envelope theorem.

    Args:
        direction: of the region's shape.
        region: what is known of the penultimate value.
        arithmetic: `rounding.OUTWARD` (in float64) makes the computed value an upper bound of the
            exact one, also where each entry of `direction` is itself a rounded difference.

    Returns:
        A scalar >= 0 up to rounding; NaN if anything is NaN.
    """
    d = direction
    up = arithmetic.up
    # The center lies in the box, so the ends have signs and can be rounded outwards one by one.
    low = -up(region.center - region.lower)
    high = up(region.upper - region.center)
    norm = safe_norm(d)
    ball = up(region.radius * arithmetic.length(d))
    corner = jnp.where(d > 0, high, jnp.where(d < 0, low, 0.0))
    box = up(jnp.sum(d * corner), d.size)

    tiny = jnp.finfo(d.dtype).tiny ** 0.5
    frozen_d, frozen_low, frozen_high, radius, unit = jax.lax.stop_gradient(
        (d, low, high, region.radius, norm)
    )

    def too_short(log_scale):
        t = jnp.clip(frozen_d * jnp.exp(log_scale), frozen_low, frozen_high)
        return safe_norm(t) <= radius

    # 1/mu lies between that of the ball alone and the one at which every coordinate met its end.
    start = jnp.log(jnp.maximum(radius, tiny)) - jnp.log(jnp.maximum(unit, tiny))
    bracket = (start, start + jnp.log(jnp.asarray(WIDEST, d.dtype)))

    def halve(_, bracket):
        left, right = bracket
        middle = (left + right) / 2
        short = too_short(middle)
        return jnp.where(short, middle, left), jnp.where(short, right, middle)

    steps = BISECTION_STEPS.get(d.dtype.name, 35)
    left, right = jax.lax.fori_loop(0, steps, halve, bracket)
    scale = jax.lax.stop_gradient(jnp.exp((left + right) / 2))
    return jnp.minimum(
        jnp.minimum(box, ball),
        relaxed.dual(d, low, high, region.radius, scale, arithmetic),
    )


def directions(graph: Graph, penultimate: Region, label: jax.Array) -> jax.Array:
    """``w_j - w_label`` for every class j: ``(classes, *penultimate shape)``, rows of the last
    node."""
    head = graph.nodes[-1]
    assert isinstance(head, Linear)
    classes = head.size
    transposed = head.operator.transpose(penultimate.center)
    basis = jnp.eye(classes, dtype=penultimate.center.dtype).reshape(classes, *head.shape)
    rows = jax.vmap(transposed)(basis)
    return rows - jax.lax.dynamic_index_in_dim(rows, label, axis=0, keepdims=True)


def passes(
    bound: Bound,
    arithmetic: rounding.Rounding = rounding.EXACT,
    view: Callable = lambda operator, like: operator,
) -> list[tuple[relaxed.Reverse, int]]:
    """The reverse passes of a bound's mode, and how many rivals each is worth, the worst first.

    Each makes upper bounds of ``max <d, h' - h>`` over the ball, h the penultimate value; as
    epsilon tends to 0 those of modes "linear" and "rows" are the exact norm of the gradient times
    epsilon.
    """
    mode = mode_of(bound.mode)
    rivals = bound.logits.shape[0] - 1
    if bound.rivals is not None:
        rivals = min(bound.rivals, rivals)
    found: list[tuple[relaxed.Reverse, int]] = []
    if mode.relaxed_margins:
        found.append((reverse_of(bound, arithmetic, view), rivals))
    if mode.one_sided:
        # Another choice of slopes only where it can change the verdict.
        counts = [rivals, *(min(tight.RETRIED, rivals) for _ in tight.CHOICES[1:])]
        made = (tight.one_sided(bound, arithmetic, view, by=by) for by in tight.CHOICES)
        found += zip(made, counts, strict=True)
    return found


def reverse_of(
    bound: Bound,
    arithmetic: rounding.Rounding = rounding.EXACT,
    view: Callable = lambda operator, like: operator,
) -> relaxed.Reverse:
    """The pass that propagates rows back from what is in front of the last node."""
    (end,) = bound.graph.nodes[-1].inputs
    return relaxed.Reverse(bound.graph, view, arithmetic, bound.regions, bound.radii, end)


def worst_logits(
    bound: Bound,
    label,
    arithmetic: rounding.Rounding = rounding.EXACT,
    view: Callable = lambda operator, like: operator,
) -> jax.Array:
    """``logits[j] + max (w_j - w_label)^T (h' - h)`` over the penultimate region; ``(classes,)``.

    No x' in the ball has a logit j that exceeds logit `label` by more than entry j minus entry
    `label` says, if the region holds (see `bound` for when it is an estimate). The entry of `label`
    is its clean logit. The class cannot change iff entry `label` is *strictly* the largest.

    Args:
        bound: what `lipjax.bound` returned for one example.
        label: the true class, an integer scalar (may be traced).
        arithmetic: as in `ascent`; the rounding of the clean logits themselves is not in the
            result.
        view: of the walk.

    Raises:
        ValueError: for a concrete label outside ``0 .. classes - 1``.
    """
    classes = bound.logits.shape[0]
    if not isinstance(label, jax.core.Tracer) and not 0 <= int(label) < classes:
        raise ValueError(f"label must lie in 0..{classes - 1}, got {label}.")
    rivals = directions(bound.graph, bound.penultimate, label)
    gains = jax.vmap(lambda d: ascent(d, bound.penultimate, arithmetic))(rivals)
    own = jnp.arange(classes) == label
    worst = bound.logits + jnp.where(own, 0.0, gains)
    return tightened(bound, label, worst, arithmetic, view)


def tightened(
    bound: Bound,
    label,
    worst: jax.Array,
    arithmetic: rounding.Rounding = rounding.EXACT,
    view: Callable = lambda operator, like: operator,
) -> jax.Array:
    """Worst-case logits, none above `worst`, by the reverse passes of the bound's mode.

    Args:
        bound, label, arithmetic, view: as in `worst_logits`.
        worst: ``(classes,)``, worst-case logits that were found before.
    """
    classes = bound.logits.shape[0]
    own = jnp.arange(classes) == label
    gains = worst - bound.logits
    for reverse, count in passes(bound, arithmetic, view):
        rivals = directions(bound.graph, bound.penultimate, label)
        if count >= classes - 1:
            gains = jnp.minimum(gains, jax.vmap(reverse.gain)(rivals))
            continue
        order = jax.lax.stop_gradient(jnp.where(own, -jnp.inf, bound.logits + gains))
        _, chosen = jax.lax.top_k(order, count)
        fewer = jnp.minimum(gains[chosen], jax.vmap(reverse.gain)(rivals[chosen]))
        gains = gains.at[chosen].set(fewer)
    return bound.logits + jnp.where(own, 0.0, gains)


def margin(worst: jax.Array, label: jax.Array) -> jax.Array:
    """``worst[label] - max of the others``: positive iff no rival can reach the label.

    NaN if any entry is NaN.
    """
    others = jnp.where(jnp.arange(worst.shape[0]) == label, -jnp.inf, worst)
    return worst[label] - jnp.max(others)
