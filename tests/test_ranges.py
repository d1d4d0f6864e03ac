"""Intervals of the outputs: every value on the region lies in them, as executed too."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rational
from two_point_cases import KINDS, exact_pieces, random_net, random_points, regions, walked

import lipjax

pytestmark = pytest.mark.core

MODES = ("local", "linear", "rows")


def ranges_of(net, centers, mode="rows", **options):
    return lipjax.certify_range(
        net, np.asarray(centers, np.float32), tier="deterministic", mode=mode, **options
    )


def extremes(net, centers, radii, halves, steps: int = 40, count: int = 32):
    """Of each region the smallest and largest value of each output that gradient steps find."""
    rng = np.random.default_rng(0)
    cells = list(zip(np.asarray(centers, np.float64), radii, halves, strict=True))
    starts = np.stack([random_points(rng, *cell, count) for cell in cells])

    def climb(center, radius, half, x, sign, output):
        def inside(x):
            step = jnp.clip(x - center, -half, half)
            return center + step * jnp.minimum(1, radius / jnp.linalg.norm(step))

        def step(x, _):
            slope = jax.grad(lambda x: sign * net(x)[output])(x)
            size = jnp.maximum(jnp.linalg.norm(slope), 1e-300)
            return inside(x + 0.2 * radius * slope / size), None

        x, _ = jax.lax.scan(step, x, length=steps)
        return net(x)[output]

    with jax.enable_x64(True):
        each = jax.vmap(climb, in_axes=(None, None, None, 0, None, None))
        each = jax.vmap(each, in_axes=(None, None, None, None, None, 0))
        each = jax.vmap(each, in_axes=(None, None, None, None, 0, None))
        each = jax.vmap(each, in_axes=(0, 0, 0, 0, None, None))
        signs, outputs = jnp.asarray([-1.0, 1.0]), jnp.arange(3)
        centers = jnp.asarray(centers, jnp.float64)
        found = np.asarray(
            jax.jit(each)(centers, radii, halves, jnp.asarray(starts), signs, outputs)
        )
    return np.min(found[:, 0], axis=2), np.max(found[:, 1], axis=2)


@pytest.mark.parametrize("kind", KINDS)
def test_no_point_of_a_ball_or_box_leaves_its_interval(kind):
    net, _ = random_net(kind, 1)
    smallest, largest = extremes(net, *regions(2))
    centers, radii, half = regions(2)
    widths = []
    for mode in MODES:
        found = walked(net, centers, radii, half, mode)
        assert np.all(found["lower"] <= smallest + 1e-13), mode
        assert np.all(largest <= found["upper"] + 1e-13), mode
        widths.append(found["upper"] - found["lower"])
    for wider, narrower in itertools.pairwise(widths):
        assert np.mean(narrower) <= np.mean(wider) * 1.0001
    if kind != "shrink":
        # On the smallest regions the interval is nearly what is there.
        assert np.median(((largest - smallest) / widths[2])[:2]) > 0.75


def test_no_point_of_a_region_leaves_what_is_proved():
    net, _ = random_net("squash", 7)
    smallest, largest = extremes(net, *regions(2))
    centers, radii, half = regions(2)
    found = ranges_of(net, centers, epsilon=radii, box=half)
    assert np.all(found.lower + found.rounding <= smallest)
    assert np.all(largest <= found.upper - found.rounding)


@pytest.mark.parametrize("kind", ("relu", "clip", "abs", "maxmin", "clipped_maxmin", "groupsort"))
def test_with_one_input_every_exact_value_is_in_the_interval(kind):
    net, parameters = random_net(kind, 3, inputs=1)
    centers = np.linspace(-1.5, 1.5, 6, dtype=np.float32)[:, None]
    radius = 0.25
    found = walked(net, centers, np.full(6, radius), np.full((6, 1), radius), "rows")
    for i, center in enumerate(centers.astype(np.float64)):
        pieces = exact_pieces(kind, parameters, center - radius, center + radius)
        for j in range(3):
            values = [value[j] for _, value in pieces]
            low, high = (Fraction(float(found[end][i, j])) for end in ("lower", "upper"))
            assert low <= min(values) and max(values) <= high


def test_at_a_single_point_the_interval_holds_the_executed_value_and_little_more():
    net, parameters = random_net("relu", 4)
    centers, _, _ = regions(5)
    found = ranges_of(net, centers, epsilon=0.0, box=0.0)
    executed = np.asarray(jax.jit(jax.vmap(net))(centers)).astype(np.float64)
    assert np.all((found.lower <= executed) & (executed <= found.upper))
    for center, low, high in zip(centers, found.lower, found.upper, strict=True):
        (_, exact), _ = exact_pieces("relu", parameters, center, rational(center))[:2]
        for value, a, b in zip(exact, low, high, strict=True):
            assert Fraction(float(a)) <= value <= Fraction(float(b))
    assert np.all(found.upper - found.lower < 1e-4)
    assert np.all(found.upper - found.lower >= 2 * found.rounding)
    assert np.all(found.rounding > 0)


def test_a_regression_within_its_tolerance_is_proved_and_one_outside_is_not():
    slope = np.array([[0.5, -0.25], [0.5, 0.25]], np.float32)

    def model(x):
        return slope @ x  # on the box |x_i| <= 1 both outputs lie in [-0.75, 0.75]

    found = ranges_of(model, np.zeros((1, 2)), box=1.0)
    assert np.all(found.upper < 0.7501) and np.all(found.lower > -0.7501)
    assert np.all(found.upper >= 0.75) and np.all(found.lower <= -0.75)


def test_a_range_says_its_tier_in_two_lines_and_what_overflows_is_infinite():
    net, _ = random_net("relu", 6)
    x = np.zeros((2, 2), np.float32)
    found = lipjax.certify_range(net, x, 0.1, failure_probability=1e-4)
    assert "tier probabilistic" in repr(found) and "0.0001" in repr(found)
    assert len(repr(found).splitlines()) == 2
    large = np.full((2, 2), 1e30, np.float32)

    def overflows(x):
        for _ in range(4):
            x = jax.nn.relu(large @ x)
        return x

    found = ranges_of(overflows, x + 1, epsilon=0.1)
    assert np.all(found.lower == -np.inf) and np.all(found.upper == np.inf)
    with pytest.raises(ValueError, match="no certificate"):
        lipjax.certify_range(net, x, 0.1, tier="estimate")
