"""Attacks for the hunt alone: one on every rival class in turn, and one that sees no gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipjax.attacks import (
    BISECTIONS,
    LARGEST_RADIUS,
    RIVAL,
    Attack,
    Nearest,
    Problem,
    at_least_one,
    bisected,
    column,
    margins,
    norm,
    unit,
    within,
)

# Starts that `boundary` tries per example: so many of the images to start from, and so many of
# noise, in strengths from a twentieth of the range to six times it (then clipped: nearly all pixels
# black or white).
START_IMAGES = 32
START_NOISES = 192
STRENGTHS = 8


def targeted(
    network: nnx.Module,
    images,
    labels,
    epsilon: float,
    *,
    steps: int = 100,
    restarts: int = 1,
    step_size: float | None = None,
    schedule: str = "cosine",
    clip: tuple[float, float] | None = (0.0, 1.0),
    key: jax.Array | None = None,
    batch_size: int = 256,
) -> Attack:
    """PGD that makes ``z_label - z_j`` small for every rival class j in turn.

    The largest logit of the rivals changes on the way, and with it the goal of
    `lipjax.attacks.pgd`; here each goal stays, for `restarts` random starts. Arguments, guarantee
    and errors as there. Cost: ``(classes - 1) * restarts`` runs.
    """
    problem = Problem(network, images, labels, clip, key, batch_size)
    searches = [
        (RIVAL, rival)
        for _ in range(at_least_one(restarts, "restarts"))
        for rival in range(1, problem.classes)
    ]
    return within(problem, searches, epsilon, steps, step_size, schedule)


def boundary(
    network: nnx.Module,
    images,
    labels,
    *,
    steps: int = 3000,
    restarts: int = 3,
    starts=None,
    clip: tuple[float, float] | None = (0.0, 1.0),
    key: jax.Array | None = None,
    batch_size: int = 256,
) -> Nearest:
    """The nearest adversarial image that a walk along the decision boundary finds.

    It uses predicted classes only.
    Blind to gradients, hence to whatever hides them (Brendel, Rauber and Bethge, *Decision-Based
    Adversarial Attacks*, ICLR 2018). It starts from the nearest it can find among images of other
    classes and noise, and bisects the way to the boundary; the next starts are of a certain rival
    class each, as each may have a nearest point of its own. Each step is random and orthogonal to
    the offset, on the sphere around the image, and then inward; both lengths adapt per example, so
    that about half of the first and a quarter of the second find the label lost. Only steps that
    come nearer are taken. Bisection towards the image ends it.

    An upper bound of the distance to the decision boundary, weaker than `lipjax.attacks.smallest`
    where gradients tell the way; guarantee, arguments and errors otherwise as in
    `lipjax.attacks.pgd`.

    Args:
        steps: random steps of each start, two forward passes each.
        starts: ``(M, ...)`` images to start from; the given `images` by default.
    """
    at_least_one(steps, "steps")
    at_least_one(restarts, "restarts")
    problem = Problem(network, images, labels, clip, key, batch_size)
    pool = problem.images if starts is None else np.asarray(starts, np.float32)
    if pool.shape[1:] != problem.images.shape[1:] or not len(pool):
        raise ValueError(
            f"starts of shape {pool.shape} do not fit images of shape {problem.images.shape}."
        )
    problem.check_pixels(pool, "starts")

    def search(x, y, margin, key, rows, kept):
        best = x
        best_distance = jnp.full(len(x), jnp.inf, x.dtype)
        for restart in range(restarts):
            behind = restart % problem.classes
            rival = (y + behind) % problem.classes if behind else jnp.full_like(y, -1)
            draw = jax.random.fold_in(key, restart)
            found, distance = _walk(
                problem.network, x, y, rival, jnp.asarray(pool), draw, steps, *problem.range
            )
            better = distance < best_distance
            best = jnp.where(column(better, x), found, best)
            best_distance = jnp.where(better, distance, best_distance)
        return best

    return problem.nearest(search)


@jax.jit
def _walk(network, x, y, rival, pool, key, steps, low, high):
    """One start, where possible in class `rival` (-1: any); the nearest image found and its
    distance, or infinity."""
    start_key, walk_key = jax.random.split(key)
    span = jnp.where(jnp.isfinite(high - low), high - low, 1.0)

    def lost(candidate):
        return column(~(margins(network, candidate, y)[1] > 0), x)

    def begin(i, carry):
        best, least = carry
        draw = jax.random.fold_in(start_key, i)
        image = pool[jax.random.randint(draw, (len(x),), 0, len(pool))]
        strength = 0.05 * span * 2.0 ** jnp.asarray(i % STRENGTHS, x.dtype)
        noise = jnp.clip(x + strength * jax.random.normal(draw, x.shape, x.dtype), low, high)
        candidate = jnp.where(i < START_IMAGES, image, noise)
        logits, margin = margins(network, candidate, y)
        wanted = column(jnp.argmax(logits, axis=1) == rival, x)
        # Behind the distances of all candidates of the wanted class come those of the others.
        rank = norm(candidate - x) + jnp.where(wanted | (rival[0] < 0), 0.0, LARGEST_RADIUS)
        rank = jnp.where(column(~(margin > 0), x), rank, jnp.inf)
        better = rank < least
        return jnp.where(better, candidate, best), jnp.where(better, rank, least)

    def step(i, carry):
        current, along, inward = carry
        offset = current - x
        distance = norm(offset)
        outward = unit(offset)
        random = jax.random.normal(jax.random.fold_in(walk_key, i), x.shape, x.dtype)
        axes = tuple(range(1, x.ndim))
        tangent = unit(random - outward * jnp.sum(random * outward, axis=axes, keepdims=True))
        around = unit(offset + along * distance * tangent) * distance
        sideways = jnp.clip(x + around, low, high)
        nearer = jnp.clip(x + around * (1 - inward), low, high)
        still = lost(sideways)
        success = lost(nearer)
        success = success & (norm(nearer - x) < distance)
        current = jnp.where(success, nearer, current)
        along = jnp.clip(along * jnp.exp(0.1 * (still - 0.5)), 1e-6, 1.0)
        inward = jnp.clip(
            inward * jnp.where(still, jnp.exp(0.1 * (success - 0.25)), 1.0), 1e-7, 0.5
        )
        return current, along, inward

    nothing = jnp.full_like(norm(x), jnp.inf)
    start, least = jax.lax.fori_loop(0, START_IMAGES + START_NOISES, begin, (x, nothing))
    start = bisected(network, x, y, start, BISECTIONS)
    shares = jnp.full_like(nothing, 0.1)
    last, _, _ = jax.lax.fori_loop(0, steps, step, (start, shares, shares))
    end = bisected(network, x, y, last, BISECTIONS)
    return end, jnp.where(jnp.isfinite(least), norm(end - x), jnp.inf).reshape(-1)
