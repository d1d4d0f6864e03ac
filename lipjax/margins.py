"""Worst-case logits over the penultimate region: the ball and the box at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lipjax import operators, rounding, slopes
from lipjax.operators import safe_norm
from lipjax.regions import Bound, Region, layers_of

# Each halving of the bracket of log(1/mu) halves its error, and the bound's relative error is about the square of that:
# with these it is below the rounding of each type.
BISECTION_STEPS = {"float32": 16, "float64": 35}
# The largest ratio between the scaling of d at the optimum and that of the ball alone that the bracket covers.
WIDEST = 1e12


def ascent(direction: jax.Array, region: Region, arithmetic: rounding.Rounding = rounding.EXACT) -> jax.Array:
    """Upper bound of ``max <direction, t>`` over ``||t||_2 <= radius, lower - center <= t <= upper - center``.

    By duality every ``mu >= 0`` gives an upper bound ``<d, t> + mu / 2 (radius^2 - ||t||^2)`` at
    ``t = clip(d / mu, lower - center, upper - center)``; bisection on mu makes it tight (METHOD 3). Nothing large is
    subtracted from something large, so it stays right when nearly all of d sits on clipped coordinates. The result is
    never above the box alone, nor above the ball alone, ``radius * ||d||``. The mu of the bisection is held fixed in the
    gradient, which is right by the envelope theorem.

    Args:
        direction: of the region's shape.
        region: what is known of the penultimate activation.
        arithmetic: `rounding.OUTWARD` (in float64) makes the computed value an upper bound of the exact one, also where
            each entry of `direction` is itself a rounded difference.

    Returns:
        A scalar >= 0 up to rounding; NaN if anything is NaN.
    """
    d, up = direction, arithmetic.up
    # The center lies in the box, so the ends have signs and can be rounded outwards one by one.
    low, high = -up(region.center - region.lower), up(region.upper - region.center)
    norm = safe_norm(d)
    ball = up(region.radius * arithmetic.length(d))
    corner = jnp.where(d > 0, high, jnp.where(d < 0, low, 0.0))
    box = up(jnp.sum(d * corner), d.size)

    tiny = jnp.finfo(d.dtype).tiny ** 0.5
    frozen_d, frozen_low, frozen_high, radius, unit = jax.lax.stop_gradient((d, low, high, region.radius, norm))

    def too_short(log_scale):
        t = jnp.clip(frozen_d * jnp.exp(log_scale), frozen_low, frozen_high)
        return safe_norm(t) <= radius

    # The scale 1/mu lies between that of the ball alone and the one at which every coordinate has met its end.
    start = jnp.log(jnp.maximum(radius, tiny)) - jnp.log(jnp.maximum(unit, tiny))
    bracket = (start, start + jnp.log(jnp.asarray(WIDEST, d.dtype)))

    def halve(_, bracket):
        left, right = bracket
        middle = (left + right) / 2
        short = too_short(middle)
        return jnp.where(short, middle, left), jnp.where(short, right, middle)

    left, right = jax.lax.fori_loop(0, BISECTION_STEPS.get(d.dtype.name, 35), halve, bracket)
    scale = jax.lax.stop_gradient(jnp.exp((left + right) / 2))
    return jnp.minimum(jnp.minimum(box, ball), slopes.dual(d, low, high, region.radius, scale, arithmetic))


def directions(network: nnx.Module, penultimate: Region, classes: int, label: jax.Array) -> jax.Array:
    """``w_j - w_label`` for every class j, of shape ``(classes, *penultimate shape)``: rows of the last layer."""
    layers = layers_of(network)
    head = [layer for layer in layers if operators.is_affine(layer)][-1]
    operator = operators.linear_operator(head)
    transposed = operator.transpose(penultimate.center)
    shape = jax.eval_shape(operator, penultimate.center).shape
    basis = jnp.eye(classes, dtype=penultimate.center.dtype).reshape(classes, *shape)
    rows = jax.vmap(transposed)(basis)
    return rows - jax.lax.dynamic_index_in_dim(rows, label, axis=0, keepdims=True)


def linear_gains(
    network: nnx.Module,
    bound: Bound,
    rows: jax.Array,
    gains: jax.Array,
    arithmetic: rounding.Rounding = rounding.EXACT,
    view: Callable = lambda layer, like: operators.linear_operator(layer),
) -> jax.Array:
    """Upper bounds of ``max <d, h' - h>`` over the ball, h the penultimate activation, linear where the network is linear.

    The smaller of `gains` and `slopes.gain`: never looser than mode "local", and as epsilon tends to 0 the exact norm of the
    gradient times epsilon.

    Args:
        network: the network that `bound` was computed of.
        bound: what `lipjax.bound` knows of one example, in mode "rows", "linear" or "local".
        rows: ``(n, *penultimate shape)``, the directions d; each entry may be a rounded difference.
        gains: ``(n,)``, the bounds from the region of the penultimate activation, `ascent`.
        arithmetic: `rounding.OUTWARD` (in float64) makes the computed values upper bounds of the exact ones.
        view: layer and example to linear view.

    Returns:
        ``(n,)``, at most `gains`.
    """
    layers = layers_of(network)
    last = max(i for i, layer in enumerate(layers) if operators.is_affine(layer))
    inputs = (bound.input, *bound.regions[:last])
    stages = slopes.stages_of(layers[:last], inputs, bound.norms, arithmetic, view)
    ends = (bound.input, bound.penultimate, arithmetic)
    return jnp.minimum(gains, jax.vmap(lambda d: slopes.gain(stages, d, *ends))(rows))


def worst_logits(
    network: nnx.Module,
    bound: Bound,
    label,
    arithmetic: rounding.Rounding = rounding.EXACT,
    view: Callable = lambda layer, like: operators.linear_operator(layer),
) -> jax.Array:
    """``logits[j] + max (w_j - w_label)^T (h' - h)`` over the penultimate region of one example; ``(classes,)``.

    No x' in the ball has a logit j that exceeds logit `label` by more than entry j minus entry `label` says, if the
    region holds (see `bound` for when it is an estimate). The entry of `label` itself is its clean logit. The class
    cannot change iff entry `label` is *strictly* the largest.

    Args:
        network: the network that `bound` was computed of.
        bound: what `lipjax.bound` returned for one example.
        label: the true class, an integer scalar (may be traced).
        arithmetic: as in `ascent`; the rounding of the clean logits themselves is not in the result.
        view: layer and example to linear view.

    Raises:
        ValueError: for a concrete label outside ``0 .. classes - 1``.
    """
    classes = bound.logits.shape[0]
    if not isinstance(label, jax.core.Tracer) and not 0 <= int(label) < classes:
        raise ValueError(f"label must lie in 0..{classes - 1}, got {label}.")
    rivals = directions(network, bound.penultimate, classes, label)
    gains = jax.vmap(lambda d: ascent(d, bound.penultimate, arithmetic))(rivals)
    own = jnp.arange(classes) == label
    if bound.mode in ("linear", "rows"):
        if bound.rivals is None or bound.rivals >= classes - 1:
            gains = linear_gains(network, bound, rivals, gains, arithmetic, view)
        else:
            worst = jax.lax.stop_gradient(jnp.where(own, -jnp.inf, bound.logits + gains))
            _, chosen = jax.lax.top_k(worst, bound.rivals)
            smaller = linear_gains(network, bound, rivals[chosen], gains[chosen], arithmetic, view)
            gains = gains.at[chosen].set(smaller)
    return bound.logits + jnp.where(own, 0.0, gains)


def margin(worst: jax.Array, label: jax.Array) -> jax.Array:
    """``worst[label] - max of the others``: positive iff no rival can reach the label. NaN if any entry is NaN."""
    others = jnp.where(jnp.arange(worst.shape[0]) == label, -jnp.inf, worst)
    return worst[label] - jnp.max(others)
