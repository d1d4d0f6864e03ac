"""Norms of masked maps: estimates from below, certified bounds from above, the paper's traps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import dense_matrix
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lipjax
from lipjax import spectral

DELTA = 1e-9


def certified(operator, shape, scale, mask_in=None, mask_out=None, seed=0, steps=150):
    return spectral.probabilistic_norm_bound(
        operator, jax.random.key(seed), jnp.asarray(scale), steps, DELTA, jnp.zeros(shape), mask_in, mask_out
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), stride=st.integers(1, 2), share=st.floats(0.1, 1.0), guess=st.floats(0.3, 3.0))
def test_estimate_is_at_most_and_certified_bound_at_least_the_norm_of_the_masked_matrix(seed, stride, share, guess):
    with jax.enable_x64(True):
        layer = nnx.Conv(2, 3, (3, 3), strides=stride, padding=1, rngs=nnx.Rngs(seed))
        operator = lipjax.linear_operator(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), layer))
        rng = np.random.default_rng(seed)
        shape = (5, 5, 2)
        out = operator(jnp.zeros(shape)).shape
        mask_in, mask_out = rng.uniform(size=shape) < share, rng.uniform(size=out) < share
        matrix = dense_matrix(operator, shape) * mask_in.reshape(-1) * mask_out.reshape(-1, 1)
        truth = np.linalg.norm(matrix, 2)
        masks = jnp.asarray(mask_in), jnp.asarray(mask_out)
        start = jnp.asarray(rng.normal(size=shape))
        estimate, vector = spectral.power_iteration(operator, start, 10, *masks)
        assert estimate <= truth * (1 + 1e-9)
        assert np.all(np.asarray(vector)[~mask_in] == 0)
        # Sound whatever the scale, tight when it is right.
        assert certified(operator, shape, guess * truth, *masks) >= truth * (1 - 1e-9)
        assert truth * (1 - 1e-9) <= certified(operator, shape, 1.001 * truth, *masks) <= 1.01 * truth + 1e-12


def test_the_norms_gradient_is_that_of_the_singular_vectors(x64):
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)))
    start = jnp.asarray(np.random.default_rng(1).normal(size=5))

    def sigma(matrix):
        operator = lipjax.LinearOperator.from_matrix(matrix, (5,), (6,))
        return spectral.power_iteration(operator, start, 500)[0]

    u, s, vt = np.linalg.svd(matrix)
    value, gradient = jax.value_and_grad(sigma)(matrix)
    np.testing.assert_allclose(value, s[0], rtol=1e-9)
    np.testing.assert_allclose(gradient, np.outer(u[:, 0], vt[0]), atol=1e-6)


@pytest.mark.parametrize("n", [512, 3072, 8192])
@pytest.mark.parametrize("s", [2.0, 1.01])
def test_hidden_direction_deceives_the_estimate_and_not_the_bound(x64, n, s):
    v = np.random.default_rng(0).choice([-1.0, 1.0], n) / np.sqrt(n)

    def apply(kernel, x):
        return x + (s - 1) * kernel * (kernel @ x)

    class Hidden:
        kernel = jnp.asarray(v)

        def __call__(self, x):
            return apply(self.kernel, x)

        def transpose(self, x):
            return self  # symmetric

    jax.tree_util.register_pytree_node(Hidden, lambda h: ((), None), lambda *_: Hidden())
    start = jnp.asarray(np.random.default_rng(1).normal(size=n))
    estimate, _ = spectral.power_iteration(Hidden(), start, 2)
    assert estimate < 0.99 * s or s < 1.02
    steps = spectral.chebyshev_steps(n, DELTA, 0.01)
    assert s <= certified(Hidden(), (n,), estimate, steps=steps) <= 1.15 * s


def test_an_absorbed_zero_recovers_when_the_masks_open():
    matrix = jnp.diag(jnp.array([0.5, 0.5, 3.0]))
    operator = lipjax.LinearOperator.from_matrix(matrix, (3,), (3,))
    nothing = jnp.zeros(3, bool)
    estimate, stored = spectral.power_iteration(operator, jnp.ones(3), 2, nothing)
    assert estimate == 0 and np.all(stored == 0)
    # A plain warm start would stay at 0; the fresh share brings it back at once.
    assert spectral.power_iteration(operator, stored, 2)[0] == 0
    for seed in range(20):
        start = spectral.refresh(stored, jax.random.key(seed))
        assert spectral.power_iteration(operator, start, 2)[0] > 0.45


def test_a_vector_without_weight_on_the_opened_coordinates_recovers():
    operator = lipjax.LinearOperator.from_matrix(jnp.diag(jnp.array([0.5, 3.0])), (2,), (2,))
    stored = jnp.array([1.0, 0.0])
    assert spectral.power_iteration(operator, stored, 50)[0] == 0.5
    vector, estimate = stored, 0.0
    for step in range(4):
        start = spectral.refresh(vector, jax.random.key(step))
        estimate, vector = spectral.power_iteration(operator, start, 2)
    assert estimate > 2.99


@pytest.mark.parametrize("function", ["estimate", "certified"])
def test_degenerate_maps(function):
    zero = lipjax.LinearOperator.from_matrix(jnp.zeros((3, 4)), (4,), (3,))
    one = lipjax.LinearOperator.from_matrix(jnp.ones((3, 4)), (4,), (3,))
    bad = lipjax.LinearOperator.from_matrix(jnp.full((3, 4), jnp.nan), (4,), (3,))

    def norm(operator, mask_in=None, mask_out=None):
        if function == "estimate":
            return spectral.power_iteration(operator, jnp.ones(4), 3, mask_in, mask_out)[0]
        return certified(operator, (4,), 1e-3, mask_in, mask_out)

    assert norm(zero) <= 1.1e-3
    assert norm(one, jnp.zeros(4, bool)) == 0
    assert norm(one, None, jnp.zeros(3, bool)) == 0
    assert np.isnan(norm(bad))
    assert norm(bad, jnp.zeros(4, bool), jnp.zeros(3, bool)) == 0  # nothing varies: no NaN leaks through a mask


def test_a_scale_that_is_no_number_only_loosens_the_bound():
    operator = lipjax.LinearOperator.from_matrix(jnp.diag(jnp.array([0.5, 0.9])), (2,), (2,))
    for scale in (jnp.nan, -1.0, 0.0, 1e-30, 1e30):
        assert not certified(operator, (2,), scale) < 0.9  # a NaN, which certifies nothing, is as good


def test_failure_probability_must_be_one():
    operator = lipjax.LinearOperator.from_matrix(jnp.eye(2), (2,), (2,))
    for delta in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match=str(delta)):
            spectral.probabilistic_norm_bound(operator, jax.random.key(0), jnp.ones(()), 5, delta, jnp.zeros(2))


def test_the_stated_failure_probability_is_an_upper_bound_of_the_observed_one(x64):
    """With delta = 0.3 and one step too few to be certain, failures must be seen at most that often."""
    matrix = jnp.diag(jnp.array([1.0, 0.2, 0.1]))
    operator = lipjax.LinearOperator.from_matrix(matrix, (3,), (3,))

    def one(key):
        return spectral.probabilistic_norm_bound(operator, key, jnp.asarray(0.3), 8, 0.3, jnp.zeros(3))

    failed = np.mean(np.asarray(jax.vmap(one)(jax.random.split(jax.random.key(0), 4000))) < 1.0)
    assert 0.0 < failed <= 0.3 + 0.03
