"""Attacks: what is certainly not robust. They bound from above what any certificate can claim."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipjax.regions import check_epsilon


class Attack(NamedTuple):
    """Outcome per example, NumPy arrays.

    Attributes:
        adversarial: ``(N, ...)`` the image nearest to, or beyond, the decision boundary that was found; within epsilon.
        broken: ``(N,)`` the network does not predict the label there, or not at the image itself (a NaN counts too).
        predicted: ``(N,)`` class predicted at the unperturbed image.
    """

    adversarial: np.ndarray
    broken: np.ndarray
    predicted: np.ndarray


def pgd(
    network: nnx.Module,
    images,
    labels,
    epsilon: float,
    *,
    steps: int = 100,
    restarts: int = 20,
    step_size: float | None = None,
    clip: tuple[float, float] | None = (0.0, 1.0),
    key: jax.Array | None = None,
    batch_size: int = 256,
) -> Attack:
    """l2 projected gradient descent with random starts; cross-entropy and margin loss in turn over the restarts.

    Every image returned lies within epsilon (checked after rounding, as float64 norms) and within `clip`. An example
    that is broken stops using restarts when all of its batch is.

    Args:
        network: any module that maps one example to logits ``(classes,)``.
        images: ``(N, ...)`` floats; labels: ``(N,)`` integers.
        epsilon: l2 radius >= 0, or one radius per example, ``(N,)``.
        step_size: length of a step; ``epsilon / 4`` by default.
        clip: range of valid pixels, or None to search the whole ball.
        key: randomness; ``jax.random.key(0)`` by default.

    Raises:
        ValueError: negative or NaN epsilon, images and labels that do not fit, steps or restarts < 1.
    """
    images, labels = np.asarray(images, np.float32), np.asarray(labels)
    if len(images) != len(labels) or labels.ndim != 1:
        raise ValueError(f"images of shape {images.shape} do not fit labels of shape {labels.shape}.")
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps and restarts must be at least 1, got {steps} and {restarts}.")
    radii = np.broadcast_to(np.asarray(epsilon, np.float64), labels.shape)
    for radius in np.unique(radii):
        check_epsilon(radius)
    key = jax.random.key(0) if key is None else key
    lengths = radii / 4 if step_size is None else np.full(labels.shape, step_size)

    parts = []
    for first in range(0, len(images), batch_size):
        rows = np.minimum(np.arange(first, first + batch_size), len(images) - 1)
        kept = min(batch_size, len(images) - first)
        x, y = jnp.asarray(images[rows]), jnp.asarray(labels[rows])
        radius, length = (jnp.asarray(a[rows], jnp.float32) for a in (radii, lengths))
        predicted, best_margin = _clean(network, x, y)
        best = x
        for restart in range(restarts):
            if not np.any(np.asarray(best_margin)[:kept] > 0):
                break
            draw = jax.random.fold_in(jax.random.fold_in(key, first), restart)
            found, margin = _restart(network, x, y, radius, length, draw, steps, clip, restart % 2 == 1)
            better = margin < best_margin
            best = jnp.where(_column(better, x), found, best)
            best_margin = jnp.where(better, margin, best_margin)
        parts.append([np.asarray(a)[:kept] for a in (best, ~(best_margin > 0), predicted)])
    adversarial, broken, predicted = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return Attack(_inside(adversarial, images, radii), broken, predicted)


def _inside(adversarial, images, radii):
    distance = np.linalg.norm((adversarial.astype(np.float64) - images).reshape(len(images), -1), axis=1)
    if np.any(distance > radii):
        raise AssertionError(f"an attack left the ball by {np.max(distance - radii)}: this is a bug.")
    return adversarial


def _column(values, like):
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def _margins(network, x, y):
    logits = jax.vmap(network)(x)
    own = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
    others = jnp.where(jnp.arange(logits.shape[1])[None] == y[:, None], -jnp.inf, logits)
    margin = own - jnp.max(others, axis=1)
    return logits, jnp.where(jnp.isnan(margin), -jnp.inf, margin)


@jax.jit
def _clean(network, x, y):
    logits, margin = _margins(network, x, y)
    return jnp.argmax(logits, axis=1), margin


@functools.partial(jax.jit, static_argnames=("steps", "clip", "by_margin"))
def _restart(network, x, y, radius, length, key, steps, clip, by_margin):
    """One random start; the worst image met on the way and its margin."""
    start_key, direction_key = jax.random.split(key)
    size = x[0].size
    # A hair inside, so that rounding cannot push the projected image out of the ball.
    radius = _column(radius * (1 - 1e-5), x)
    length = _column(length, x)

    def norm(v):
        return jnp.sqrt(jnp.sum(jnp.square(v), axis=tuple(range(1, v.ndim)), keepdims=True))

    def unit(v):
        n = norm(v)
        return v / jnp.where(n > 0, n, 1.0)

    def project(candidate):
        offset = candidate - x
        offset = offset * jnp.minimum(1.0, radius / jnp.maximum(norm(offset), 1e-30))
        # Clipping to a range that holds x only shortens the offset, so the ball still holds it.
        return x + offset if clip is None else jnp.clip(x + offset, clip[0], clip[1])

    def objective(candidate):
        logits, margin = _margins(network, candidate, y)
        entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)[:, 0]
        return jnp.sum(-margin if by_margin else entropy), margin

    def keep(current, margin, best, best_margin):
        better = margin < best_margin
        return jnp.where(_column(better, x), current, best), jnp.where(better, margin, best_margin)

    def step(i, carry):
        current, best, best_margin = carry
        gradient, margin = jax.grad(objective, has_aux=True)(current)
        best, best_margin = keep(current, margin, best, best_margin)
        noise = jax.random.normal(jax.random.fold_in(direction_key, i), x.shape)
        flat = ~(norm(gradient) > 0)  # also where it is NaN
        return project(current + length * unit(jnp.where(flat, noise, gradient))), best, best_margin

    direction = unit(jax.random.normal(start_key, x.shape))
    share = jax.random.uniform(jax.random.fold_in(start_key, 1), (len(x),)) ** (1 / size)
    start = project(x + direction * radius * _column(share, x))
    last, best, best_margin = jax.lax.fori_loop(0, steps, step, (start, x, jnp.full(len(x), jnp.inf)))
    return keep(last, _margins(network, last, y)[1], best, best_margin)
