"""Norms of masked maps: estimates from below, certified bounds from above, the paper's traps."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import dense_matrix, operator_of
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lipjax import norms, rounding
from lipjax.graph.linear import LinearOperator

DELTA = 1e-9
estimated = jax.jit(norms.power.power_iteration, static_argnames="iterations")
short = jax.jit(
    functools.partial(norms.power.power_iteration, products="bfloat16"),
    static_argnames="iterations",
)


@functools.partial(jax.jit, static_argnames=("shape", "steps"))
def certified(operator, shape, scale, mask_in=None, mask_out=None, seed=0, steps=150):
    return norms.chebyshev.probabilistic_norm_bound(
        operator,
        norms.chebyshev.starts(jax.random.key(seed), [math.prod(shape)], jnp.zeros(()).dtype)[0],
        jnp.asarray(scale),
        steps,
        DELTA,
        jnp.zeros(shape),
        mask_in,
        mask_out,
    )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    stride=st.integers(1, 2),
    share=st.floats(0.1, 1.0),
    guess=st.floats(0.3, 3.0),
)
def test_estimate_is_at_most_and_certified_bound_at_least_the_norm_of_the_masked_matrix(
    seed, stride, share, guess
):
    with jax.enable_x64(True):
        layer = nnx.Conv(2, 3, (3, 3), strides=stride, padding=1, rngs=nnx.Rngs(seed))
        operator = operator_of(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), layer))
        rng = np.random.default_rng(seed)
        shape = (5, 5, 2)
        out = operator(jnp.zeros(shape)).shape
        mask_in, mask_out = rng.uniform(size=shape) < share, rng.uniform(size=out) < share
        matrix = dense_matrix(operator, shape) * mask_in.reshape(-1) * mask_out.reshape(-1, 1)
        truth = np.linalg.norm(matrix, 2)
        masks = jnp.asarray(mask_in), jnp.asarray(mask_out)
        start = jnp.asarray(rng.normal(size=shape))
        estimate, vector = estimated(operator, start, 10, *masks)
        assert estimate <= truth * (1 + 1e-9)
        assert np.all(np.asarray(vector)[~mask_in] == 0)
        # Sound whatever the scale, tight when it is right.
        assert certified(operator, shape, guess * truth, *masks) >= truth * (1 - 1e-9)
        # a scale of 0 is no scale: masks may leave nothing but zeros
        guess = max(1.001 * truth, 1e-12)
        assert (
            truth * (1 - 1e-9)
            <= certified(operator, shape, guess, *masks)
            <= 1.01 * truth + 1.1e-12
        )


def test_the_norms_gradient_is_that_of_the_singular_vectors(x64):
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)))
    start = jnp.asarray(np.random.default_rng(1).normal(size=5))

    def sigma(matrix):
        operator = LinearOperator.from_matrix(matrix, (5,), (6,))
        return norms.power.power_iteration(operator, start, 500)[0]

    u, s, vt = np.linalg.svd(matrix)
    value, gradient = jax.value_and_grad(sigma)(matrix)
    np.testing.assert_allclose(value, s[0], rtol=1e-9)
    np.testing.assert_allclose(gradient, np.outer(u[:, 0], vt[0]), atol=1e-6)


class Hidden:
    """``W = I + u u^T`` with a u of equal entries in size: one direction of norm s, all others of
    norm 1."""

    def __init__(self, n, s):
        signs = np.random.default_rng(0).choice([-1.0, 1.0], n)
        self.kernel = jnp.asarray(np.sqrt((s - 1) / n) * signs)

    def apply(self, kernel, x):
        return x + kernel * (kernel @ x)

    def __call__(self, x):
        return self.apply(self.kernel, x)

    def absolute(self, x):
        return self.apply(jnp.abs(self.kernel), x)

    def transpose(self, x):
        return self  # symmetric


jax.tree_util.register_pytree_node(Hidden, lambda h: ((), h), lambda h, _: h)


@pytest.mark.parametrize("n", [512, 3072, 8192])
@pytest.mark.parametrize("s", [2.0, 1.01])
def test_hidden_direction_deceives_the_estimate_and_not_the_bound(x64, n, s):
    start = jnp.asarray(np.random.default_rng(1).normal(size=n))
    estimate, _ = norms.power.power_iteration(Hidden(n, s), start, 2)
    assert estimate < 0.99 * s or s < 1.02
    steps = norms.chebyshev.chebyshev_steps(n, DELTA, 0.01)
    assert s <= certified(Hidden(n, s), (n,), estimate, steps=steps) <= 1.15 * s


def test_an_absorbed_zero_recovers_when_the_masks_open():
    matrix = jnp.diag(jnp.array([0.5, 0.5, 3.0]))
    operator = LinearOperator.from_matrix(matrix, (3,), (3,))
    nothing = jnp.zeros(3, bool)
    estimate, stored = norms.power.power_iteration(operator, jnp.ones(3), 2, nothing)
    assert estimate == 0 and np.all(stored == 0)
    # A plain warm start would stay at 0; the fresh share brings it back at once.
    assert norms.power.power_iteration(operator, stored, 2)[0] == 0
    for seed in range(20):
        start = norms.power.refresh(stored, jax.random.key(seed))
        assert norms.power.power_iteration(operator, start, 2)[0] > 0.45


def test_a_vector_without_weight_on_the_opened_coordinates_recovers():
    operator = LinearOperator.from_matrix(jnp.diag(jnp.array([0.5, 3.0])), (2,), (2,))
    stored = jnp.array([1.0, 0.0])
    assert norms.power.power_iteration(operator, stored, 50)[0] == 0.5
    vector, estimate = stored, 0.0
    for step in range(4):
        start = norms.power.refresh(vector, jax.random.key(step))
        estimate, vector = norms.power.power_iteration(operator, start, 2)
    assert estimate > 2.99


@pytest.mark.core
@pytest.mark.parametrize("function", ["estimate", "certified"])
def test_degenerate_maps(x64, function):
    zero = LinearOperator.from_matrix(jnp.zeros((3, 4)), (4,), (3,))
    one = LinearOperator.from_matrix(jnp.ones((3, 4)), (4,), (3,))
    bad = LinearOperator.from_matrix(jnp.full((3, 4), jnp.nan), (4,), (3,))

    def norm(operator, mask_in=None, mask_out=None):
        if function == "estimate":
            return norms.power.power_iteration(operator, jnp.ones(4), 3, mask_in, mask_out)[0]
        return certified(operator, (4,), 1e-3, mask_in, mask_out)

    assert norm(zero) <= 1.1e-3
    assert norm(one, jnp.zeros(4, bool)) == 0
    assert norm(one, None, jnp.zeros(3, bool)) == 0
    assert np.isnan(norm(bad))
    # nothing varies: no NaN leaks through a mask
    assert norm(bad, jnp.zeros(4, bool), jnp.zeros(3, bool)) == 0


def test_a_scale_that_is_no_number_only_loosens_the_bound(x64):
    operator = LinearOperator.from_matrix(jnp.diag(jnp.array([0.5, 0.9])), (2,), (2,))
    for scale in (jnp.nan, -1.0, 0.0, 1e-30, 1e30):
        # a NaN, which certifies nothing, is as good
        assert not certified(operator, (2,), scale) < 0.9


def test_failure_probability_must_be_one():
    operator = LinearOperator.from_matrix(jnp.eye(2), (2,), (2,))
    start = jnp.ones((norms.chebyshev.STARTS, 2))
    for delta in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match=str(delta)):
            norms.chebyshev.probabilistic_norm_bound(
                operator, start, jnp.ones(()), 5, delta, jnp.zeros(2)
            )


@pytest.mark.core
def test_the_stated_failure_probability_is_an_upper_bound_of_the_observed_one(x64):
    """With delta = 0.9 and few steps, failures must be seen, and at most that often."""
    matrix = jnp.diag(jnp.array([1.0, 0.2, 0.1]))
    operator = LinearOperator.from_matrix(matrix, (3,), (3,))

    def one(key):
        return norms.chebyshev.probabilistic_norm_bound(
            operator, *norms.chebyshev.starts(key, [3]), jnp.asarray(0.3), 8, 0.9, jnp.zeros(3)
        )

    failed = np.mean(np.asarray(jax.vmap(one)(jax.random.split(jax.random.key(0), 4000))) < 1.0)
    assert 0.0 < failed <= 0.9


def test_a_start_block_is_as_small_as_stated_with_at_most_the_stated_probability():
    draws = np.linalg.norm(
        np.random.default_rng(0).normal(size=(200_000, norms.chebyshev.STARTS)), axis=1
    )
    for delta in (0.5, 1e-2, 1e-3):
        seen = np.mean(draws < norms.chebyshev.smallest_start(delta))
        assert 0.3 * delta <= seen <= delta + 3 * np.sqrt(delta / len(draws))


@pytest.mark.core
def test_rounding_that_could_hide_the_top_direction_makes_the_bound_infinite():
    """In float32, at a probability that asks for more digits than it has: refused, not guessed."""
    operator = LinearOperator.from_matrix(jnp.eye(64), (64,), (64,))
    steps = norms.chebyshev.chebyshev_steps(64, 1e-30, 0.01)
    (start,) = norms.chebyshev.starts(jax.random.key(0), [64], jnp.float32)
    found = norms.chebyshev.probabilistic_norm_bound(
        operator, start, jnp.float32(1.001), steps, 1e-30, jnp.zeros(64)
    )
    assert np.isinf(found)


def test_more_certainty_and_less_inflation_take_more_steps_and_bad_wishes_are_errors():
    assert norms.chebyshev.chebyshev_steps(1000, 1e-12, 0.01) > norms.chebyshev.chebyshev_steps(
        1000, 1e-6, 0.01
    )
    assert norms.chebyshev.chebyshev_steps(1000, 1e-6, 0.001) > norms.chebyshev.chebyshev_steps(
        1000, 1e-6, 0.01
    )
    with pytest.raises(ValueError, match="inflation"):
        norms.chebyshev.chebyshev_steps(1000, 1e-6, 0.0)


def test_the_estimate_of_a_tiny_norm_is_not_lost_to_underflow():
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)), jnp.float32)
    estimates = []
    for scale in (1.0, 1e-15):
        operator = LinearOperator.from_matrix(scale * matrix, (8,), (6,))
        estimates.append(
            float(norms.power.power_iteration(operator, jnp.ones(8, jnp.float32), 50)[0]) / scale
        )
    assert estimates[1] == pytest.approx(estimates[0], rel=1e-4) and estimates[0] > 1


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.2, 1.0))
def test_iterating_in_bfloat16_is_still_from_below_and_hardly_worse(seed, share):
    operator = operator_of(nnx.Conv(3, 4, (3, 3), padding=1, rngs=nnx.Rngs(seed)))
    rng = np.random.default_rng(seed)
    mask_in, mask_out = rng.uniform(size=(6, 6, 3)) < share, rng.uniform(size=(6, 6, 4)) < share
    truth = np.linalg.norm(
        dense_matrix(operator, (6, 6, 3)) * mask_in.reshape(-1) * mask_out.reshape(-1, 1), 2
    )
    start = jnp.asarray(rng.normal(size=(6, 6, 3)), jnp.float32)
    masks = jnp.asarray(mask_in), jnp.asarray(mask_out)
    estimate, vector = short(operator, start, 30, *masks)
    assert (
        0.98 * estimated(operator, start, 30, *masks)[0] <= estimate <= truth * (1 + 1e-5) + 1e-30
    )
    assert vector.dtype == estimate.dtype == jnp.float32


def test_only_the_iteration_is_in_bfloat16_and_the_gradient_is_not():
    layer = nnx.Linear(12, 9, use_bias=False, rngs=nnx.Rngs(0))
    start = jnp.asarray(np.random.default_rng(0).normal(size=12), jnp.float32)

    def norm(kernel, products):
        layer = nnx.merge(graph, {"kernel": nnx.Param(kernel)})
        return norms.power.power_iteration(operator_of(layer), start, 20, products=products)[0]

    graph = nnx.graphdef(layer)
    kernel = layer.kernel[...]
    short, full = (jax.grad(norm)(kernel, products) for products in ("bfloat16", "float32"))
    assert short.dtype == jnp.float32
    np.testing.assert_allclose(short, full, atol=0.02)
    assert not np.array_equal(short, full)  # it was used
    types = [
        v.aval.dtype
        for e in jax.make_jaxpr(lambda k: norm(k, "bfloat16"))(kernel).eqns
        for v in e.outvars
    ]
    assert jnp.bfloat16 in types


class Machine(Hidden):
    """Computes `Hidden` as badly as the error model allows: the direction is rounded away, as far
    as it may be."""

    def __init__(self, n, s):
        super().__init__(n, s)
        self.kernel = self.kernel.astype(jnp.float32)
        terms = n + 1
        self.allowed = 0.9 * float(rounding.gamma(terms, 2.0**-24))

    def __call__(self, x):
        hidden = self.kernel * (self.kernel @ x)
        allowed = self.allowed * self.absolute(jnp.abs(x))
        return x + hidden - jnp.clip(hidden, -allowed, allowed)


jax.tree_util.register_pytree_node(Machine, lambda h: ((), h), lambda h, _: h)


@pytest.mark.core
def test_products_that_round_the_top_direction_away_are_not_taken_at_their_word():
    """In float32, whose products of 4096 terms may be wrong by 2e-4: an inflation below that must
    be refused."""
    n, s, delta, steps = 4096, 1.005, 0.3, 36
    key, scale = jax.random.key(1), jnp.float32(1.0002)

    def bound(operator, dtype):
        return norms.chebyshev.probabilistic_norm_bound(
            operator,
            *norms.chebyshev.starts(key, [n], dtype),
            scale,
            steps,
            delta,
            jnp.zeros(n, dtype),
        )

    with jax.enable_x64(True):
        honest = float(bound(Hidden(n, s), jnp.float64))
    assert s <= honest < 1.02  # this draw is no unlucky one
    assert not bound(Machine(n, s), jnp.float32) < s


@pytest.mark.parametrize("delta", [1e-12, 1e-3, 0.3])
@pytest.mark.parametrize("norm", [1.001, 1.3, 40.0])
def test_what_was_observed_is_at_most_half_of_the_least_start_in_exact_arithmetic(x64, norm, delta):
    """``||T_k(B) G|| <= T_k(1 + 2 s) t / 2``: the other half is for rounding. Of a multiple of the
    identity both sides are
    known: B is a number b, and ``T_k(B) G = T_k(b) G``."""
    steps, size = 25, 6
    (start,) = norms.chebyshev.starts(jax.random.key(3), [size])
    operator = LinearOperator.from_matrix(norm * jnp.eye(size), (size,), (size,))
    found = norms.chebyshev.probabilistic_norm_bound(
        operator, start, jnp.ones(()), steps, delta, jnp.zeros(size)
    )
    length = sum(Fraction(float(g)) ** 2 for g in np.ravel(start))
    observed = chebyshev(2 * Fraction(norm) ** 2 - 1, steps) ** 2 * length
    grown = chebyshev(2 * Fraction(float(found)) ** 2 - 1, steps)
    allowed = (grown * Fraction(norms.chebyshev.smallest_start(delta)) / 2) ** 2
    # And not a thousandth more than that and arccosh(R) <= log(2 R) ask for, where R is large.
    assert observed <= allowed <= observed * Fraction(1001, 1000)


def chebyshev(x: Fraction, degree: int) -> Fraction:
    """``T_degree(x)``, exactly."""
    before, now = Fraction(1), x
    for _ in range(degree - 1):
        before, now = now, 2 * x * now - before
    return now
