"""Worst-case logits: against sampling, a generic solver, and the traps of cancellation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import largest_by_bisection
from hypothesis import given, settings
from hypothesis import strategies as st

from lipjax import rounding
from lipjax.bounds import Region, ascent, margin, relaxed


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), radius=st.floats(1e-3, 10), constant=st.floats(0, 0.9))
def test_ascent_is_the_maximum_and_never_below_a_sample(seed, radius, constant):
    rng = np.random.default_rng(seed)
    n = 12
    d = rng.normal(size=n)
    low, high = -np.abs(rng.normal(size=n)), np.abs(rng.normal(size=n))
    low[rng.uniform(size=n) < constant] = 0
    high[rng.uniform(size=n) < constant] = 0
    with jax.enable_x64(True):
        region = Region(jnp.zeros(n), jnp.asarray(radius), jnp.asarray(low), jnp.asarray(high))
        found = float(ascent(jnp.asarray(d), region))
    truth = largest_by_bisection(d, radius, low, high)
    np.testing.assert_allclose(found, truth, rtol=1e-6, atol=1e-12)
    t = rng.normal(size=(200, n))
    t *= radius / np.linalg.norm(t, axis=1, keepdims=True)
    assert found - np.max(np.clip(t, low, high) @ d) >= -1e-12


@pytest.mark.core
def test_no_cancellation_where_nearly_all_weight_is_clipped():
    """float32: live weight 1e-4 of the dead; a difference of squares would lose the live part."""
    n, live = 100, 1e-4
    d = np.full(n, 1.0, np.float32)
    d[0] = live
    high = np.full(n, 1e-6, np.float32)
    high[0] = 10.0
    region = Region(jnp.zeros(n), jnp.float32(1.0), jnp.asarray(-high), jnp.asarray(high))
    truth = largest_by_bisection(
        d.astype(np.float64), 1.0, -high.astype(np.float64), high.astype(np.float64)
    )
    found = float(ascent(jnp.asarray(d), region))
    assert truth * (1 - 1e-5) <= found <= truth * 1.001


def test_degenerate_regions_and_directions_have_finite_values_and_gradients():
    box = jnp.array([0.0, 0.5, 1.0])
    for d in (jnp.zeros(3), jnp.array([1.0, 0.0, -2.0])):
        for radius in (0.0, 1e-8, 1.0, 1e6):
            for low, high in ((-box, box), (0 * box, 0 * box)):

                def value(d, radius, low=low, high=high):
                    return ascent(d, Region(jnp.zeros(3), radius, low, high))

                result, slopes = jax.value_and_grad(value, argnums=(0, 1))(d, jnp.float32(radius))
                assert np.isfinite(result) and result >= -1e-6
                assert all(np.all(np.isfinite(s)) for s in slopes)
                if radius == 0:
                    np.testing.assert_allclose(result, 0, atol=1e-9)


@pytest.mark.core
def test_a_nan_in_the_region_gives_a_nan():
    good = jnp.ones(3)
    for region in (
        Region(0 * good, jnp.nan, -good, good),
        Region(0 * good, jnp.float32(1), -good, good.at[1].set(jnp.nan)),
        Region((0 * good).at[0].set(jnp.nan), jnp.float32(1), -good, good),
    ):
        assert np.isnan(ascent(good, region))


@pytest.mark.core
def test_margin_is_positive_only_for_a_strict_winner():
    assert margin(jnp.array([1.0, 2.0, 0.0]), 1) == 1
    assert margin(jnp.array([2.0, 2.0, 0.0]), 1) == 0
    assert not margin(jnp.array([jnp.nan, 2.0]), 1) > 0


def of_ascent(d, reach, radius):
    return ascent(d, Region(jnp.zeros(5), radius, -reach, reach))


def of_largest_product(d, reach, radius):
    return relaxed.largest_product(d, reach, radius, rounding.EXACT)


@pytest.mark.parametrize("function", [of_ascent, of_largest_product])
def test_value_and_gradient_of_the_largest_product_are_finite_at_extreme_sizes(function):
    """A stable layer's error has radius 0 in front of rows of any length: the first steps of a ramp
    met it."""

    @jax.jit
    @jax.value_and_grad
    def gain(arguments):
        d, radius, reach = arguments
        return function(d, reach, radius)

    for size in (0.0, 1e-20, 1.0, 30.0, 1e6):
        for radius, reach in (
            (0.0, 0.0),
            (0.0, 1.0),
            (1e-30, 1e-30),
            (1e-12, 1.0),
            (1.0, 0.0),
            (1e6, 1e6),
        ):
            d, ends = jnp.arange(5.0) * size, jnp.full(5, reach)
            value, gradient = gain((d, jnp.float32(radius), ends))
            assert 0 <= value <= radius * np.linalg.norm(d) * (1 + 1e-5), (size, radius, reach)
            assert all(np.all(np.isfinite(leaf)) for leaf in gradient), (size, radius, reach)
