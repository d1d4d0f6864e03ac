"""Attacks: what is certainly not robust. They bound from above what any certificate can claim.

Within a given radius: `pgd`. At the smallest distance that it can find: `smallest`.

Own code and not foolbox: that (3.3.4, its last release) runs beside JAX 0.10 and NumPy 2.4, but it
steps outside `jit`, wants a pixel range where certificates speak of the whole ball, and imports
what SciPy has deprecated.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipjax.bounds import check_epsilon
from lipjax.runtime import cpu

__all__ = ["Attack", "Nearest", "pgd", "smallest"]

# How the length of a step falls, as a function of the share of the steps that is done.
SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "constant": jnp.ones_like,
    "cosine": lambda done: (1 + jnp.cos(jnp.pi * done)) / 2,
    "halving": lambda done: 0.5 ** jnp.floor(8 * done),
}
# Halvings of a segment between the image and an adversarial one: 2^-20 of its length is about
# float32's resolution.
BISECTIONS = 20
# Share by which `smallest` lets the radius of its search grow or shrink in a step, and what remains
# of it in the last.
RADIUS_SHARE = 0.1
LAST_SHARE = 0.01
# Beyond it float32's squares overflow: an attack within a larger radius looks no farther.
LARGEST_RADIUS = 1e15
# A boundary point found in one program may be on the other side in another, by rounding: it is
# moved out by these shares of its distance until a forward pass confirms it.
STRETCHES = (0.0, 1e-6, 1e-4, 1e-2)

ENTROPY, MARGIN, RIVAL = range(3)  # what a gradient step makes larger, see `_gradient`


class Attack(NamedTuple):
    """Outcome per example of an attack within a radius, NumPy arrays.

    Attributes:
        adversarial: ``(N, ...)`` the image nearest to, or beyond, the decision boundary that was
            found; within epsilon.
        broken: ``(N,)`` the label's logit is not strictly the largest there, or at the image itself
            (a NaN counts too).
        predicted: ``(N,)`` class predicted at the unperturbed image.
    """

    adversarial: np.ndarray
    broken: np.ndarray
    predicted: np.ndarray


class Nearest(NamedTuple):
    """Outcome per example of a search for the smallest perturbation, NumPy arrays.

    Attributes:
        adversarial: ``(N, ...)`` the nearest image found at which the label's logit is not strictly
            the largest (a NaN counts too); the image itself where none was found.
        distance: ``(N,)`` its l2 distance, of float64; 0 where the image itself is one, infinity
            where none was found.
        predicted: ``(N,)`` class predicted at the unperturbed image.
    """

    adversarial: np.ndarray
    distance: np.ndarray
    predicted: np.ndarray


# ---------------------------------------------------------------------------------- within a radius


def pgd(
    network: nnx.Module,
    images,
    labels,
    epsilon: float,
    *,
    steps: int = 100,
    restarts: int = 20,
    step_size: float | None = None,
    schedule: str = "constant",
    clip: tuple[float, float] | None = (0.0, 1.0),
    key: jax.Array | None = None,
    batch_size: int = 256,
) -> Attack:
    """l2 projected gradient descent with random starts.

    The restarts follow cross-entropy and the margin in turn. Every image returned lies within
    epsilon of the image as float32 (as a float64 norm) and within `clip`, and `broken` is what one
    more forward pass says of it. When all of a batch is broken it uses no more restarts.

    Args:
        network: any module that maps one example to logits ``(classes,)``.
        images: ``(N, ...)`` floats, rounded to float32; labels: ``(N,)`` integers.
        epsilon: l2 radius >= 0, or one radius per example, ``(N,)``.
        step_size: length of the first step; ``epsilon / 4`` by default.
        schedule: how it falls: "constant", "cosine" (to 0) or "halving" (seven times).
        clip: range of valid pixels, or None to search the whole ball.
        key: randomness; ``jax.random.key(0)`` by default. The same key and batch_size give the same
            result.

    Raises:
        ValueError: negative or NaN epsilon, images and labels that do not fit the network or each
            other, pixels outside `clip`, steps or restarts < 1, a step_size that is not positive,
            an unknown schedule.
    """
    losses = (ENTROPY, MARGIN)
    searches = [(losses[i % 2], 1) for i in range(at_least_one(restarts, "restarts"))]
    problem = Problem(network, images, labels, clip, key, batch_size)
    return within(problem, searches, epsilon, steps, step_size, schedule)


def within(
    problem: "Problem", searches: Sequence[tuple[int, int]], epsilon, steps, step_size, schedule
) -> Attack:
    """Projected descent, by one search after the other.

    Args:
        problem: the checked arguments.
        searches: a loss, and how far behind the label, cyclically, its rival class comes.
        epsilon, steps, step_size, schedule: as in `pgd`.

    Raises:
        ValueError: as `pgd` says of them.
    """
    at_least_one(steps, "steps")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}.")
    if step_size is not None and not (step_size > 0 and math.isfinite(step_size)):
        raise ValueError(f"step_size must be positive and finite, got {step_size}.")
    radii = np.asarray(epsilon, np.float64)
    if radii.ndim and radii.shape != problem.labels.shape:
        raise ValueError(
            f"epsilon must be one radius or {len(problem.labels)}, got an array of shape "
            f"{radii.shape}."
        )
    radii = np.broadcast_to(radii, problem.labels.shape)
    for radius in np.unique(radii):
        check_epsilon(radius)
    lengths = radii / 4 if step_size is None else np.full(radii.shape, float(step_size))

    def search(x, y, margin, key, rows, kept):
        best = x
        best_margin = margin
        radius = jnp.asarray(np.minimum(radii[rows], LARGEST_RADIUS), x.dtype)
        length = jnp.asarray(np.minimum(lengths[rows], LARGEST_RADIUS), x.dtype)
        for i, (loss, behind) in enumerate(searches):
            if not np.any(np.asarray(best_margin)[:kept] > 0):
                break
            rival = (y + behind) % problem.classes
            ways = (rival, loss, radius, length, jax.random.fold_in(key, i), steps)
            found, margin = _descend(
                problem.network, x, y, *ways, *problem.range, schedule=schedule
            )
            better = margin < best_margin
            best = jnp.where(column(better, x), found, best)
            best_margin = jnp.where(better, margin, best_margin)
        return best

    found, predicted, clean = problem.searched(search)
    adversarial = _pulled_inside(found, problem.images, radii)
    return Attack(adversarial, problem.fooled(adversarial) | clean, predicted)


@functools.partial(jax.jit, static_argnames="schedule")
def _descend(network, x, y, rival, loss, radius, length, key, steps, low, high, *, schedule):
    """One random start; the worst image met on the way and its margin."""
    start_key, direction_key = jax.random.split(key)
    # A hair inside, so that few images need to be pulled back into the ball.
    radius = column(radius * (1 - 1e-5), x)
    length = column(length, x)

    def project(candidate):
        """To the nearest point of ball and range at once.

        Clipping what was first put on the ball would fall short.
        """
        offset = candidate - x
        # The projection is a clipped multiple of the offset, the largest that the ball holds.
        share = jnp.minimum(1.0, radius / jnp.maximum(norm(offset), 1e-30))

        def halve(_, bracket):
            small, large = bracket
            middle = (small + large) / 2
            fits = norm(jnp.clip(x + middle * offset, low, high) - x) <= radius
            return jnp.where(fits, middle, small), jnp.where(fits, large, middle)

        share, _ = jax.lax.fori_loop(0, BISECTIONS, halve, (share, jnp.ones_like(share)))
        return jnp.clip(x + share * offset, low, high)

    def keep(current, margin, best, best_margin):
        better = margin < best_margin
        return jnp.where(column(better, x), current, best), jnp.where(better, margin, best_margin)

    def step(i, carry):
        current, best, best_margin = carry
        direction, _, _, margin = _gradient(
            network, current, y, rival, loss, jax.random.fold_in(direction_key, i)
        )
        best, best_margin = keep(current, margin, best, best_margin)
        share = SCHEDULES[schedule](i / jnp.asarray(steps, x.dtype))
        return project(current + length * share * direction), best, best_margin

    direction = unit(jax.random.normal(start_key, x.shape, x.dtype))
    draw = jax.random.uniform(jax.random.fold_in(start_key, 1), (len(x),), x.dtype)
    share = draw ** (1 / x[0].size)
    start = project(x + direction * radius * column(share, x))
    first = (start, x, jnp.full(len(x), jnp.inf, x.dtype))
    last, best, best_margin = jax.lax.fori_loop(0, steps, step, first)
    return keep(last, margins(network, last, y)[1], best, best_margin)


# -------------------------------------------------------------------------------- smallest distance


def smallest(
    network: nnx.Module,
    images,
    labels,
    *,
    steps: int = 200,
    restarts: int = 4,
    clip: tuple[float, float] | None = (0.0, 1.0),
    key: jax.Array | None = None,
    batch_size: int = 256,
) -> Nearest:
    """The nearest adversarial image that gradients find.

    Each example searches at a radius of its own. Direction and norm are decoupled (Rony et al.,
    *Decoupling Direction and Norm*, CVPR 2019): the offset follows the gradient on a sphere that
    shrinks while the label has lost and grows while it has not. The first sphere is where the
    boundary would be if the network were linear. The first start follows the margin to whatever
    rival is largest, the others go for the rivals one by one, the one with the largest logit first;
    when they are through it starts again from random offsets. Bisection towards the image ends
    each.

    An upper bound of the distance to the decision boundary; guarantee, arguments and errors
    otherwise as in `pgd`.
    """
    at_least_one(steps, "steps")
    at_least_one(restarts, "restarts")
    problem = Problem(network, images, labels, clip, key, batch_size)

    def search(x, y, margin, key, rows, kept):
        ranked = _ranked(problem.network, x, y)
        best = x
        best_distance = jnp.full(len(x), jnp.inf, x.dtype)
        for restart in range(restarts):
            loss = MARGIN if restart == 0 else RIVAL
            rival = ranked[:, max(0, restart - 1) % (problem.classes - 1)]
            draw = jax.random.fold_in(key, restart)
            spread = float(restart >= problem.classes)
            found, distance = _approach(
                problem.network, x, y, rival, loss, spread, draw, steps, *problem.range
            )
            better = distance < best_distance
            best = jnp.where(column(better, x), found, best)
            best_distance = jnp.where(better, distance, best_distance)
        return best

    return problem.nearest(search)


@jax.jit
def _ranked(network, x, y):
    """The other classes, largest logit first."""
    logits, _ = margins(network, x, y)
    own = jnp.arange(logits.shape[1]) == y[:, None]
    return jnp.argsort(jnp.where(own, jnp.inf, logits), descending=True)[:, 1:]


@jax.jit
def _approach(network, x, y, rival, loss, spread, key, steps, low, high):
    """One start; the nearest adversarial image met on the way and its distance, or infinity.

    It starts at x, or with spread = 1 somewhere on the first sphere.
    """
    start_key, key = jax.random.split(key)
    _, slope, value, _ = _gradient(network, x, y, rival, loss, key)
    radius = jnp.where(slope > 0, column(jnp.abs(value), x) / jnp.where(slope > 0, slope, 1), 0)
    radius = jnp.where((radius > 0) & (radius < 1e8), radius, 1.0)
    # No image of the range is farther away than this.
    farthest = jnp.minimum(norm(jnp.maximum(high - x, x - low)), LARGEST_RADIUS)

    def random_offset(key, radius):
        return jnp.clip(x + radius * unit(jax.random.normal(key, x.shape, x.dtype)), low, high) - x

    def step(i, carry):
        offset, radius, best, best_distance = carry
        draw = jax.random.fold_in(key, i)
        direction, _, _, margin = _gradient(network, x + offset, y, rival, loss, draw)
        distance = norm(offset)
        adversarial = column(~(margin > 0), x)
        better = adversarial & (distance < best_distance)
        best = jnp.where(better, offset, best)
        best_distance = jnp.where(better, distance, best_distance)
        share = LAST_SHARE + (1 - LAST_SHARE) * SCHEDULES["cosine"](i / jnp.asarray(steps, x.dtype))
        # While nothing adversarial is known the radius is only a guess, and grows at full pace.
        change = RADIUS_SHARE * jnp.where(jnp.isinf(best_distance), 1.0, share)
        radius = jnp.where(
            adversarial, jnp.minimum(radius, distance) * (1 - change), radius * (1 + change)
        )
        offset = jnp.clip(x + radius * unit(offset + radius * share * direction), low, high) - x
        # At the end of the range and still nothing: somewhere else.
        stuck = jnp.isinf(best_distance) & (radius > farthest)
        share_of_range = jax.random.uniform(jax.random.fold_in(draw, 1), radius.shape, x.dtype)
        radius = jnp.where(stuck, farthest * share_of_range, radius)
        offset = jnp.where(stuck, random_offset(jax.random.fold_in(draw, 2), radius), offset)
        return offset, radius, best, best_distance

    start = spread * random_offset(start_key, radius)
    carry = (start, radius, jnp.zeros_like(x), jnp.full_like(radius, jnp.inf))
    _, _, best, best_distance = jax.lax.fori_loop(0, steps + 1, step, carry)
    known = jnp.isfinite(best_distance)
    end = bisected(network, x, y, jnp.where(known, x + best, x), BISECTIONS)
    return end, jnp.where(known, norm(end - x), jnp.inf).reshape(-1)


def bisected(network, x, y, adversarial, halvings):
    """The last point, nearly, at which the label is lost on the way from `adversarial` to x."""

    def halve(_, bracket):
        near, far = bracket
        middle = (near + far) / 2
        lost = column(~(margins(network, x + middle * (adversarial - x), y)[1] > 0), x)
        return jnp.where(lost, near, middle), jnp.where(lost, middle, far)

    share = jnp.ones_like(norm(x))
    _, far = jax.lax.fori_loop(0, halvings, halve, (jnp.zeros_like(share), share))
    # At the far end itself exactly that image, which rounding of x + (adversarial - x) may miss.
    return jnp.where(far < 1, x + far * (adversarial - x), adversarial)


# ---------------------------------------------------------------------------------- what they share


class Problem:
    """Checked arguments, batches, and what is computed anew of what an attack has found."""

    def __init__(self, network, images, labels, clip, key, batch_size):
        self.network = network
        self.images = np.asarray(images, np.float32)
        self.labels = np.asarray(labels)
        if self.images.ndim < 2 or not len(self.images):
            raise ValueError(
                f"images must be a non-empty batch (N, ...), got shape {self.images.shape}."
            )
        fits = self.labels.shape == self.images.shape[:1]
        if not fits or not np.issubdtype(self.labels.dtype, np.integer):
            raise ValueError(
                f"labels must be {len(self.images)} integers, got {self.labels.dtype} of shape "
                f"{self.labels.shape}: images have shape {self.images.shape}."
            )
        like = jax.ShapeDtypeStruct(self.images.shape[1:], jnp.float32)
        logits = jax.eval_shape(lambda x: network(x), like)
        if len(logits.shape) != 1 or logits.shape[0] < 2:
            raise ValueError(
                f"the network must give at least 2 logits on one axis, got shape {logits.shape}."
            )
        self.classes = logits.shape[0]
        if self.labels.min() < 0 or self.labels.max() >= self.classes:
            raise ValueError(
                f"labels must lie in 0..{self.classes - 1}, got {self.labels.min()} to "
                f"{self.labels.max()}."
            )
        self.range = _float32_range(clip)
        self.check_pixels(self.images, "images")
        self.key = jax.random.key(0) if key is None else key
        self.batch_size = at_least_one(batch_size, "batch_size")

    def check_pixels(self, images, name):
        """Raises a ValueError for pixels that are not finite or outside the range."""
        low = images.min()
        high = images.max()
        # a NaN fails too
        if not (low >= self.range[0] and high <= self.range[1] and np.isfinite(high - low)):
            raise ValueError(
                f"{name} must be finite and within clip, {self.range[0]} to {self.range[1]}: {low} "
                f"to {high}."
            )

    def _batches(self) -> Iterator[tuple[np.ndarray, int]]:
        """Rows of equal batches, and how many are meant: the last one is padded."""
        # A power of two, so that attacks on changing subsets of some images compile a few times
        # only.
        size = min(self.batch_size, 1 << (len(self.images) - 1).bit_length())
        for first in range(0, len(self.images), size):
            rows = np.minimum(np.arange(first, first + size), len(self.images) - 1)
            yield rows, min(size, len(self.images) - first)

    def searched(self, search) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``search(x, y, margin, key, rows, kept)`` of each batch; predictions; which are lost."""
        parts = []
        for rows, kept in self._batches():
            x = jnp.asarray(self.images[rows])
            y = jnp.asarray(self.labels[rows], jnp.int32)
            predicted, margin = _clean(self.network, x, y)
            found = search(x, y, margin, jax.random.fold_in(self.key, int(rows[0])), rows, kept)
            parts.append([np.asarray(a)[:kept] for a in (found, predicted, ~(margin > 0))])
        found, predicted, lost = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return found, predicted, lost

    def fooled(self, images: np.ndarray) -> np.ndarray:
        """Is the label's logit not strictly the largest?"""
        parts = []
        for rows, kept in self._batches():
            x = jnp.asarray(images[rows])
            y = jnp.asarray(self.labels[rows], jnp.int32)
            _, margin = _clean(self.network, x, y)
            parts.append(~(np.asarray(margin)[:kept] > 0))
        return np.concatenate(parts)

    def nearest(self, search) -> Nearest:
        """The images that a search has found, confirmed, and their distances."""
        found, predicted, confirmed = self.searched(search)
        adversarial = self.images.copy()  # right where the image itself is one
        for stretch in STRETCHES:
            if confirmed.all():
                break
            candidates = found
            if stretch:
                candidates = self.images + np.float32(1 + stretch) * (found - self.images)
            candidates = np.clip(candidates, *self.range)
            new = self.fooled(candidates) & ~confirmed
            adversarial[new] = candidates[new]
            confirmed = confirmed | new
        distance = np.where(confirmed, _distances(adversarial, self.images), np.inf)
        return Nearest(adversarial, distance, predicted)


def at_least_one(value: int, name: str) -> int:
    """The value; a ValueError if it is no integer of at least 1."""
    if value != int(value) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value}.")
    return int(value)


def _float32_range(clip) -> tuple[np.float32, np.float32]:
    """The smallest and the largest float32 in the range; infinities for None."""
    if clip is None:
        return np.float32(-np.inf), np.float32(np.inf)
    low = np.float32(clip[0])
    high = np.float32(clip[1])
    if not clip[0] <= clip[1]:
        raise ValueError(f"clip must be (lowest, highest) or None, got {clip}.")
    low = np.nextafter(low, np.float32(np.inf)) if float(low) < clip[0] else low
    high = np.nextafter(high, np.float32(-np.inf)) if float(high) > clip[1] else high
    return low, high


def _distances(candidates: np.ndarray, images: np.ndarray) -> np.ndarray:
    return np.linalg.norm((candidates.astype(np.float64) - images).reshape(len(images), -1), axis=1)


def _pulled_inside(candidates: np.ndarray, images: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """The candidates; those outside their balls are moved in until no rounding is left outside."""
    distances = _distances(candidates, images)
    outside = np.flatnonzero(distances > radii)
    x = images[outside]
    shares = radii[outside] / distances[outside] * (1 - 1e-12)
    moved = x + column(shares, x) * (candidates[outside].astype(np.float64) - x)
    rounded = moved.astype(np.float32)
    # Rounded towards the image, pixel by pixel: it is a float32 itself, so nothing ends beyond it.
    beyond = np.abs(rounded.astype(np.float64) - x) > np.abs(moved - x)
    result = candidates.copy()
    result[outside] = np.where(beyond, np.nextafter(rounded, x), rounded)
    excess = np.max(_distances(result, images) - radii)
    if excess > 0:
        raise AssertionError(f"an attack left the ball by {excess}: this is a bug.")
    return result


def column(values, like):
    """Per-example values, shaped to be multiplied with the examples."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def norm(v):
    """Of each example, with its axes."""
    return jnp.sqrt(jnp.sum(jnp.square(v), axis=tuple(range(1, v.ndim)), keepdims=True))


def unit(v):
    """``v / ||v||``, example by example, and 0 for 0."""
    n = norm(v)
    return v / jnp.where(n > 0, n, 1.0)


def margins(network, x, y):
    """Logits, and the label's minus the largest of the others; minus infinity for a NaN."""
    logits = jax.vmap(network)(x)
    own = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
    others = jnp.where(jnp.arange(logits.shape[1])[None] == y[:, None], -jnp.inf, logits)
    margin = (own - jnp.max(others, axis=1)).astype(x.dtype)
    return logits, jnp.where(jnp.isnan(margin), -jnp.inf, margin)


@jax.jit
def _clean(network, x, y):
    logits, margin = margins(network, x, y)
    return jnp.argmax(logits, axis=1), margin


def _gradient(network, x, y, rival, loss, key):
    """Direction in which the loss grows, slope, loss, and the margin.

    The direction is random where there is no slope. `loss` may be traced: cross-entropy, or minus
    the margin to the largest rival, or minus that to `rival`.
    """

    def objective(candidate):
        logits, margin = margins(network, candidate, y)
        own = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
        goal = jnp.take_along_axis(logits, rival[:, None], axis=1)[:, 0]
        entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)[:, 0]
        value = jnp.stack([entropy, -margin, goal - own])[loss].astype(x.dtype)
        return jnp.sum(value), (value, margin)

    gradient, (value, margin) = cpu.for_cpu(jax.grad(objective, has_aux=True))(x)
    # Scaled first: the squares of a tiny or huge gradient under- or overflow, and would hide the
    # way.
    largest = jnp.max(jnp.abs(gradient), axis=tuple(range(1, x.ndim)), keepdims=True)
    usable = (largest > 0) & jnp.isfinite(largest)  # False also for NaN
    noise = jax.random.normal(key, x.shape, x.dtype)
    direction = jnp.where(usable, gradient / jnp.where(usable, largest, 1.0), noise)
    return unit(direction), jnp.where(usable, largest * norm(direction), 0.0), value, margin
