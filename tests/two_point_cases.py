"""Networks of every kind for the tests of Lipschitz constants and ranges, an exact oracle, and an
attack. None of it uses the library's bounds."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from conftest import rational

import lipjax
from lipjax import activations, bounds, rounding
from lipjax.activations.slopes import Slopes
from lipjax.bounds.two_points import TwoPointWalk

# Far more than what the value of a smooth function is rounded by here.
ROUNDED = 1e-14


@jax.jit
def squash(z):
    """Two units of tanh: registered below with the range of its slopes."""
    return 2 * jnp.tanh(z / 2)


@activations.rule()
class Squash(activations.Rule):
    def __call__(self, z):
        return squash(z)

    def interval(self, lower, upper):
        low, high = squash(lower), squash(upper)
        return low - ROUNDED * jnp.abs(low), high + ROUNDED * jnp.abs(high)

    def jacobian(self, lower, upper, arithmetic):
        def slope(z):
            return 1 - jnp.square(jnp.tanh(z / 2))

        nearest = jnp.where((lower <= 0) & (upper >= 0), 0.0, jnp.minimum(abs(lower), abs(upper)))
        farthest = jnp.maximum(abs(lower), abs(upper))
        low = jnp.maximum(slope(farthest) - ROUNDED, 0.0)
        return (Slopes.between(low, slope(nearest) + ROUNDED, arithmetic),)

    def rounding(self, error):
        return error + 1e-5


activations.register(squash, Squash)


@jax.jit
def shrink(z):
    """``z / sqrt(1 + |z|^2)``, 1-Lipschitz; every output depends on every input. Registered with
    nothing but what a rule needs."""
    return z / jnp.sqrt(1 + jnp.sum(z * z))


@activations.rule()
class Shrink(activations.Rule):
    def __call__(self, z):
        return shrink(z)

    def interval(self, lower, upper):
        size = jnp.minimum(jnp.maximum(jnp.abs(lower), jnp.abs(upper)), 1.0) * (1 + ROUNDED)
        return -size, size

    def rounding(self, error):
        return jnp.full(error.shape, jnp.sqrt(jnp.sum(error**2)) + 1e-5)


activations.register(shrink, Shrink)


def kinds(size: int) -> dict:
    """Activations on vectors of this (even) size, by name."""
    half = size // 2
    top, bottom = jnp.linspace(0.1, 0.6, half), jnp.linspace(-0.5, 0.1, half)
    return {
        "relu": jax.nn.relu,
        "clip": lambda z: jnp.clip(z, np.float32(-0.2), np.float32(0.3)),
        "abs": jnp.abs,
        "maxmin": activations.maxmin,
        "clipped_maxmin": lambda z: activations.clipped_maxmin(z, top, bottom),
        "groupsort": lambda z: activations.groupsort(z, half),
        "squash": squash,
        "shrink": shrink,
    }


KINDS = tuple(kinds(4))


def random_net(kind: str, seed: int, inputs: int = 2, width: int = 4, outputs: int = 3):
    """``x -> W_3 a(W_2 a(W_1 x + b_1) + b_2) + b_3 + V x``: float32, and its parameters."""
    rng = np.random.default_rng(seed)
    shapes = ((width, inputs), (width, width), (outputs, width))
    weights = [rng.normal(0, 1.2 / np.sqrt(s[1]), s).astype(np.float32) for s in shapes]
    shifts = [rng.normal(0, 0.3, s[0]).astype(np.float32) for s in shapes]
    skip = rng.normal(0, 0.2, (outputs, inputs)).astype(np.float32)
    act = kinds(width)[kind]

    def net(x):
        h = act(weights[0] @ x + shifts[0])
        h = act(weights[1] @ h + shifts[1])
        return weights[2] @ h + shifts[2] + skip @ x

    return net, (weights, shifts, skip)


def regions(seed: int):
    """Six centers in the plane, radii and half-widths: two balls, two boxes, and two of both, from
    small to large. One shape, so that each kind of net is compiled once."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(0, 1, (6, 2)).astype(np.float32)
    half = np.geomspace(0.01, 0.6, 6)[:, None] * np.array([1.0, 0.5])
    corner = np.linalg.norm(half, axis=1)
    radii = np.array([1, 2, 0.8, 1, 2, 0.8]) * corner
    half[[0, 3]] = radii[[0, 3], None]  # a box around the ball: the ball alone counts
    return centers, radii, half


def random_points(rng, center, radius, half, count):
    """Points of the ball and the box, many of them at its edge: float64, ``(count, inputs)``."""
    inputs = len(center)
    step = rng.normal(size=(count, inputs))
    step /= np.linalg.norm(step, axis=1, keepdims=True)
    step *= rng.uniform(size=(count, 1)) ** rng.choice([0.0, 1 / inputs], size=(count, 1))
    step = np.clip(step * radius, -half, half)
    # Not all in the same corner of a box: no two points are one.
    return center + step * rng.uniform(0.98, 1 - 1e-12, size=(count, 1))


def strongest_rates(net, centers, radii, halves, seed=0, steps: int = 30, count: int = 64):
    """For each region the largest ``|f(a) - f(b)|_2 / |a - b|`` and, per output, ``|f_i(a) -
    f_i(b)| / |a - b|`` that gradient ascent over pairs of its points finds, in float64."""
    rng = np.random.default_rng(seed)
    regions = list(zip(np.asarray(centers, np.float64), radii, halves, strict=True))
    first = np.stack([random_points(rng, *region, count) for region in regions])
    second = np.stack([random_points(rng, *region, count) for region in regions])
    # Half of the pairs are close to each other: derivatives.
    second[:, ::2] = first[:, ::2] + 1e-4 * (second[:, ::2] - first[:, ::2])

    def rates(pair):
        change = net(pair[0]) - net(pair[1])
        return jnp.abs(change) / jnp.linalg.norm(pair[0] - pair[1])

    def climb(center, radius, half, pair):
        def inside(points):
            step = jnp.clip(points - center, -half, half)
            size = jnp.linalg.norm(step, axis=-1, keepdims=True)
            return center + step * jnp.minimum(1, radius / jnp.maximum(size, 1e-300))

        def step(pair, _):
            slope = jax.grad(lambda p: jnp.sum(rates(p) ** 2))(pair)
            slope = slope / jnp.maximum(jnp.linalg.norm(slope), 1e-300)
            moved = inside(pair + 0.1 * radius * slope)
            apart = jnp.linalg.norm(moved[0] - moved[1]) > 1e-7 * radius
            better = jnp.sum(rates(moved) ** 2) > jnp.sum(rates(pair) ** 2)
            return jnp.where(apart & better, moved, pair), None

        pair, _ = jax.lax.scan(step, pair, length=steps)
        return rates(pair)

    with jax.enable_x64(True):
        each = jax.vmap(climb, in_axes=(None, None, None, 0))
        pairs = jnp.asarray(np.stack([first, second], axis=2))
        found = jax.jit(jax.vmap(each))(jnp.asarray(centers, jnp.float64), radii, halves, pairs)
        found = np.asarray(found)
    return np.max(np.linalg.norm(found, axis=2), axis=1), np.max(found, axis=1)


# ------------------------------------------------------------------- piecewise linear nets, exactly


def _applied(kind: str, z: list, width: int) -> list:
    """The activation of a list of Fractions."""
    half = width // 2
    if kind == "relu":
        return [max(v, Fraction(0)) for v in z]
    if kind == "clip":
        low, high = Fraction(float(np.float32(-0.2))), Fraction(float(np.float32(0.3)))
        return [min(max(v, low), high) for v in z]
    if kind == "abs":
        return [abs(v) for v in z]
    if kind == "groupsort":
        return sorted(z[:half]) + sorted(z[half:])
    pairs = list(zip(z[:half], z[half:], strict=True))
    tops, bottoms = [max(p) for p in pairs], [min(p) for p in pairs]
    if kind == "clipped_maxmin":
        top = rational(jnp.linspace(0.1, 0.6, half))
        bottom = rational(jnp.linspace(-0.5, 0.1, half))
        tops = [min(v, t) for v, t in zip(tops, top, strict=True)]
        bottoms = [max(v, t) for v, t in zip(bottoms, bottom, strict=True)]
    return tops + bottoms


def _corners(kind: str, low: list, high: list, width: int) -> set:
    """Where, in (0, 1), the activation of ``low + t (high - low)`` can have a corner."""
    half = width // 2
    levels = {
        "relu": [Fraction(0)],
        "abs": [Fraction(0)],
        "clip": [Fraction(float(np.float32(v))) for v in (-0.2, 0.3)],
    }
    lines = []  # (value at 0, value at 1): corners are zeros
    for k in range(width):
        for level in levels.get(kind, []):
            lines.append((low[k] - level, high[k] - level))
    if kind not in levels:
        for i in range(width):
            for j in range(i):
                lines.append((low[i] - low[j], high[i] - high[j]))
    if kind == "clipped_maxmin":
        ends = [rational(jnp.linspace(0.1, 0.6, half)), rational(jnp.linspace(-0.5, 0.1, half))]
        for k in range(width):
            for end in ends:
                lines.append((low[k] - end[k % half], high[k] - end[k % half]))
    return {a / (a - b) for a, b in lines if (a < 0 < b) or (b < 0 < a)}


def exact_pieces(kind: str, parameters, a, b) -> list:
    """The net of `random_net` on the segment from a to b, exactly: ``(t, value)`` at the ends of
    its linear pieces, t from 0 to 1. For kinds that are piecewise linear."""
    weights, shifts, skip = ([rational(w) for w in p] for p in (*parameters[:2], [parameters[2]]))
    a, b = rational(a), rational(b)
    width = len(shifts[0])

    def dot(matrix, vector, shift):
        return [sum(m * v for m, v in zip(row, vector, strict=True)) + s
                for row, s in zip(matrix, shift, strict=True)]  # fmt: skip

    def layer(points, k):
        """Pieces of the hidden values behind layer k, from those of its input."""
        before = [(t, dot(weights[k], v, shifts[k])) for t, v in points]
        refined = []
        for (t, low), (s, high) in itertools.pairwise(before):
            refined.append((t, low))
            for c in sorted(_corners(kind, low, high, width)):
                middle = [u + c * (v - u) for u, v in zip(low, high, strict=True)]
                refined.append((t + c * (s - t), middle))
        refined.append(before[-1])
        return [(t, _applied(kind, v, width)) for t, v in refined]

    points = layer([(Fraction(0), list(a)), (Fraction(1), list(b))], 0)
    points = layer(points, 1)
    found = []
    for t, h in points:
        x = [u + t * (v - u) for u, v in zip(a, b, strict=True)]
        straight = dot(skip[0], x, [Fraction(0)] * len(shifts[2]))
        value = dot(weights[2], h, shifts[2])
        found.append((t, [v + s for v, s in zip(value, straight, strict=True)]))
    return found


# ----------------------------------------------------------------------------- what is compared


def certificates_of(net, centers, mode="rows", **options):
    """In tier "deterministic"."""
    options = {"tier": "deterministic", "mode": mode, **options}
    return lipjax.certify_lipschitz(net, np.asarray(centers, np.float32), **options)


def walked(net, centers, radii, halves, mode) -> dict[str, np.ndarray]:
    """The same bounds, rounded outwards, with norms by an SVD: these compile in little time."""

    def norm(k, operator, like, mask_in, mask_out):
        matrix = operator.materialized(like).kernel * jnp.ravel(mask_in)
        if mask_out is not None:
            matrix = matrix * jnp.ravel(mask_out)[:, None]
        return jnp.linalg.norm(matrix, 2) * (1 + 1e-12)

    graph = lipjax.trace(net, jax.ShapeDtypeStruct(centers.shape[1:], jnp.float32))
    with jax.enable_x64(True):
        graph = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), graph)
        walk = TwoPointWalk(graph, bounds.mode_of(mode), norm, arithmetic=rounding.OUTWARD)

        def one(x, radius, half):
            found = walk(x, radius, half)
            del found["variations"]
            return found

        centers = jnp.asarray(centers, jnp.float64)
        return jax.device_get(jax.jit(jax.vmap(one))(centers, radii, halves))
