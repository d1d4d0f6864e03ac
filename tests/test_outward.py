"""Each step of outward rounding by itself, in exact rational arithmetic: never below what it
covers, and no larger than its own margin."""

import itertools
import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import operator_of, outward_bound, rational
from flax import nnx

from lipjax import activations, rounding
from lipjax.graph import Activation, Graph, Input
from lipjax.rounding import OUTWARD

pytestmark = pytest.mark.usefixtures("x64")
U = Fraction(1, 2**53)
TINY = Fraction(1e-149)  # more than is added against underflow
SIZES = (1e-140, 1e-9, 1.0, 12345.6, 1e60)


def exact_gamma(n) -> Fraction:
    return n * U / (1 - n * U)


def test_gamma_ends_where_the_model_says_nothing():
    assert rounding.gamma(10, 0.05) == 0.5 / 0.5
    assert rounding.gamma(10, 0.1) == rounding.gamma(11, 0.1) == math.inf


def test_bounds_are_given_up_long_before_they_overflow_and_not_before_they_are_of_no_use():
    assert rounding.LARGEST >= 1e30 and math.isfinite(rounding.LARGEST**3)


@pytest.mark.parametrize("terms", [1, 10**3, 10**9])
def test_up_covers_the_rounding_of_so_many_terms_and_of_eight_operations_more(terms):
    for x in SIZES:
        found = Fraction(float(OUTWARD.up(jnp.float64(x), terms)))
        # What was computed as x is at least the exact value times 1 - gamma.
        assert found >= Fraction(x) / (1 - exact_gamma(terms + 8))
        assert found <= Fraction(x) * (1 + 3 * exact_gamma(terms + 8)) + TINY
    # A 0 may be what underflow has left of a million terms, each multiplied once more.
    assert OUTWARD.up(jnp.float64(0.0), terms) >= 1e6 * 2.0**-1022 * rounding.outward.LARGEST
    assert OUTWARD.up(jnp.float64(1.0)) == OUTWARD.up(jnp.float64(1.0), 1)


def boxes():
    """Ends of all sizes and signs, also equal ones, those that cancel, and 0."""
    ends = [sign * size for size in SIZES for sign in (-1, 1)] + [0.0, 1 + 2**-52, 0.1]
    pairs = [(low, high) for low, high in itertools.product(ends, repeat=2) if low <= high]
    return (np.array(column) for column in zip(*pairs, strict=True))


def test_middle_and_half_width_contain_both_ends():
    lower, upper = boxes()
    found = OUTWARD.around(jnp.asarray(lower), jnp.asarray(upper))
    middle, half = (rational(part) for part in found)
    size = np.maximum(abs(rational(lower)), abs(rational(upper)))
    assert np.all(middle - half <= rational(lower)) and np.all(rational(upper) <= middle + half)
    wide = (rational(upper) - rational(lower)) / 2
    assert np.all(half <= wide + 64 * U * size + TINY)


@pytest.mark.parametrize("slack", [0.0, 1e-100, 1e-3, 1e20])
def test_a_widened_box_covers_its_slack_and_ends_that_were_rounded_themselves(slack):
    lower, upper = boxes()
    found = OUTWARD.widened(jnp.asarray(lower), jnp.asarray(upper), jnp.full(lower.shape, slack))
    found_lower, found_upper = (rational(part) for part in found)
    low, high = rational(lower), rational(upper)
    size = np.maximum(abs(low), abs(high))
    assert np.all(found_lower <= low - U * abs(low) - Fraction(slack))
    assert np.all(found_upper >= high + U * abs(high) + Fraction(slack))
    widest = Fraction(slack) * (1 + 64 * U) + 16 * U * size + TINY
    assert np.all(low - found_lower <= widest) and np.all(found_upper - high <= widest)
    still = (low == 0) & (high == 0) & (slack == 0)
    moved = (found_lower < low) & (found_upper > high)
    # Where the margin is below half a unit in the last place of a number it is gone.
    assert np.all(still | moved | (size > Fraction(slack)))
    assert np.all(~still | ((found_lower == 0) & (found_upper == 0)))


def least_slack(operator, kernel, offset, lower, upper):
    """Slack of a box over four times the error model's share, of each output; 1 is needed."""
    found = rational(OUTWARD.slack(operator, jnp.asarray(lower), jnp.asarray(upper)))
    largest = np.maximum(abs(rational(lower)), abs(rational(upper)))
    magnitude = abs(rational(kernel)).T @ largest + abs(rational(offset))
    needed = 4 * exact_gamma(len(kernel) + 2) * magnitude
    return (found - Fraction(1e-150)) / needed


@pytest.mark.parametrize("inputs", [1, 3, 60])
@pytest.mark.parametrize("bias", [True, False])
def test_slack_covers_products_absolute_products_and_two_sums_on_the_whole_box(inputs, bias):
    """``W x + b``, ``|W| x`` and two sums of them, each wrong by a share of the products' sizes."""
    layer = nnx.Linear(inputs, 2, use_bias=bias, rngs=nnx.Rngs(0))
    kernel = np.tile([[1.0, -2.0], [-0.5, 1e-3], [3.0, 7.0]], (20, 1))[:inputs]
    layer.kernel[...] = jnp.asarray(kernel, jnp.float32)
    kernel = np.asarray(layer.kernel[...], np.float64)
    offset = np.array([-500.0, 100.0]) if bias else np.zeros(2)
    if bias:
        layer.bias[...] = jnp.asarray(offset, jnp.float32)
    operator = operator_of(layer, (inputs,))
    near, far = np.full(inputs, 1.0), np.tile([900.0, 400.0, 200.0], 20)[:inputs]
    # The end of largest size: the upper, the lower, each once; on one side of 0 and on both.
    first = np.arange(inputs) == 0
    mixed = np.where(first, -far, -near), np.where(first, near, far)
    ends = (near, far), (-near, far), (-far, near), (-far, -near), (-near, near), mixed
    for lower, upper in ends:
        shares = least_slack(operator, kernel, offset, lower, upper)
        assert np.all(shares >= 1) and np.all(shares <= 8)
    if not bias:
        nothing = OUTWARD.slack(operator, jnp.zeros(inputs), jnp.zeros(inputs))
        assert np.all(np.asarray(nothing) > 0)  # a product may have underflowed


def test_lengths_are_rounded_up_and_only_nothing_has_none():
    rng = np.random.default_rng(0)
    for size in (1e-160, 1e-3, 1.0, 1e50):
        for n in (1, 7, 1000):
            x = rng.normal(size=n) * size
            for length in (OUTWARD.length, OUTWARD.norm):
                found = Fraction(float(length(jnp.asarray(x))))
                exact = sum(rational(x) ** 2)
                assert found > 0
                assert (
                    exact
                    <= found**2
                    <= exact * (1 + 8 * exact_gamma(n + 8))
                    + TINY**2
                    + 10**4 * TINY * Fraction(size)
                )
    for length in (OUTWARD.length, OUTWARD.norm):
        assert length(jnp.zeros(3)) == 0 and length(jnp.array([0.0, 1e-300])) > 0
        assert jnp.isnan(length(jnp.array([0.0, jnp.nan])))


def test_the_distance_of_two_slopes_covers_the_rounding_of_both():
    """Each is a ratio of rounded differences, so three roundings of a number of at most 1."""
    for width in (0.0, 1e-9, 0.5, 1.0):
        found = Fraction(float(OUTWARD.slope_width(jnp.float64(width))))
        assert Fraction(width) + 6 * U <= found <= Fraction(width) + 128 * U


def test_what_is_left_over_of_a_row_covers_its_share_of_every_product():
    rng = np.random.default_rng(0)
    g = rng.normal(size=9)
    size = sum(rational(g) ** 2)
    for relative, length in itertools.product((2.0**-50, 1e-3, 1.0), (1e-9, 1.0, 1e20)):
        found = Fraction(float(OUTWARD.left_over(relative, jnp.asarray(g), jnp.float64(length))))
        exact = (Fraction(relative) * Fraction(length)) ** 2 * size
        assert found > 0 and exact <= found**2 <= exact * Fraction(1 + 1e-12)
    # A share that is 0 may have underflowed; so much of what is large is not nothing.
    share = Fraction(float(OUTWARD.left_over(0.0, jnp.full(4, 1e90), jnp.float64(1e90))))
    assert Fraction(2.0**-1001) * 2 * Fraction(1e90) ** 2 <= share <= Fraction(1e-100)


@activations.rule()
class Third(activations.Rule):
    """A kind of one's own, with the defaults."""

    def __call__(self, z):
        return z / 3


@pytest.mark.parametrize("mode", ["local", "linear"])
def test_regions_of_a_kind_of_ones_own_contain_its_exact_values(mode):
    x = np.array([1.0, 0.1, -7.0, 1e-307, 12345.6, 0.0])
    common = {"shape": x.shape, "dtype": "float64"}
    nodes = Input(inputs=(), **common), Activation(inputs=(0,), rule=Third(), **common)
    exact = rational(x) / 3
    for radius in (0.0, 0.25):
        region = outward_bound(Graph(nodes).with_head(), x, radius, mode).regions[1]
        away = np.array([Fraction(radius), *[0] * 5]) / 3
        assert np.all(rational(region.lower) <= exact - away)
        assert np.all(exact + away <= rational(region.upper))
    # Estimates are not widened.
    estimate = outward_bound(Graph(nodes).with_head(), x, 0.0, mode, rounding.EXACT)
    np.testing.assert_array_equal(estimate.regions[1].lower, estimate.regions[1].upper)
