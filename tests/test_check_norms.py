"""Rounding as the checker counts it, each step by itself, in exact rational arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
from conftest import rational

from lipjax.check import norms

U = Fraction(1, 2**53)


def exact_gamma(n) -> Fraction:
    return n * U / (1 - n * U)


def test_gamma_is_that_of_the_model_and_ends_where_the_model_says_nothing():
    for terms in (1, 10, 10**6):
        found = Fraction(norms.gamma(terms))
        assert abs(found / exact_gamma(terms) - 1) <= 4 * U
    assert norms.gamma(10, 0.05) == 1
    assert norms.gamma(10, 0.1) == norms.gamma(11, 0.1) == math.inf


@pytest.mark.parametrize("terms", [1, 16, 10**4])
def test_up_covers_a_sum_of_so_many_terms_and_four_operations_more(terms):
    for x in (1e-200, 1e-9, 1.0, 1.9999, 1e60):
        found = Fraction(float(norms.up(x, terms)))
        assert Fraction(x) / (1 - exact_gamma(terms + 4)) <= found
        assert found <= Fraction(x) * (1 + 3 * exact_gamma(terms + 4)) + Fraction(2.0**-999)
    # What underflow takes from a million products, each below the least number that is not
    # subnormal.
    assert norms.up(0.0, terms) >= 1e6 * 2.0**-1022
    assert norms.up(1.0) == norms.up(1.0, 16)


def test_lengths_are_rounded_up_whatever_their_size_and_keep_what_is_no_number():
    rng = np.random.default_rng(0)
    for size in (1e-250, 1e-3, 1.0, 1e250):
        for n in (1, 7, 1000):
            x = rng.normal(size=n) * size
            found = Fraction(norms.up_norm(x))
            exact = sum(rational(x) ** 2)
            assert found > 0 and exact <= found**2 <= exact * (1 + 8 * exact_gamma(n + 8)) * (
                1 + 8 * U
            )
    tiny = np.full(1000, 1e-310)  # subnormal
    assert sum(rational(tiny) ** 2) <= Fraction(norms.up_norm(tiny)) ** 2
    assert 0 < norms.up_norm(tiny) < 1e-295
    assert norms.up_norm(np.zeros(3)) == norms.up_norm(np.zeros(0)) == 0
    assert norms.up_norm(np.array([1.0, -np.inf])) == math.inf
    assert math.isnan(norms.up_norm(np.array([1.0, np.nan, np.inf])))
