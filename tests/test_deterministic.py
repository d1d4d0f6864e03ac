"""Deterministic bounds of norms: never below the norm, not even by rounding, and within what is
promised above it.

Oracles: the SVD of the explicit masked matrix where a relative 1e-12 does not matter, and exact
rational arithmetic
where it does: ``bound >= ||M||_2`` iff ``bound^2 I - M^T M`` is positive semidefinite, which
elimination in fractions decides.
"""

import subprocess
import sys
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, operator_of
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lipjax import norms
from lipjax.graph.linear import Convolution, LinearOperator, Product

# What an accepted first attempt inflates the norm by, and what Gram iteration may.
ATTEMPT = norms.cholesky.INFLATIONS[0] ** 0.5 + 1e-6
GRAM = 1.004

BANDED = {
    "3x3, stride 2": (dict(kernel_size=(3, 3), padding=1, strides=2), (9, 8, 2)),
    "groups and dilation, other axis": (
        dict(
            kernel_size=(2, 3),
            padding=((0, 2), (1, 1)),
            kernel_dilation=(2, 1),
            feature_group_count=2,
        ),
        (4, 9, 4),
    ),
    "1-d, input dilated": (dict(kernel_size=(4,), padding=2, input_dilation=2, strides=3), (11, 3)),
}


def convolution(settings, shape, features=4):
    """The view of a layer, with a random kernel, and its input."""
    zeros = nnx.initializers.zeros
    layer = nnx.Conv(
        shape[-1],
        features,
        rngs=nnx.Rngs(0),
        param_dtype=jnp.float64,
        kernel_init=zeros,
        **settings,
    )
    kernel = np.random.default_rng(0).normal(size=layer.kernel.shape)
    return with_kernel(operator_of(layer, shape), kernel), jax.ShapeDtypeStruct(shape, jnp.float64)


def with_kernel(operator, kernel):
    return LinearOperator(operator.apply, jnp.asarray(kernel))


def explicit(matrix):
    """A map with this matrix."""
    rows, columns = matrix.shape
    like = jax.ShapeDtypeStruct((columns,), jnp.float64)
    return LinearOperator.from_matrix(jnp.asarray(matrix), (columns,), (rows,)), like


@jax.jit
def _columns(operator, identity):
    return jax.vmap(operator)(identity)


def matrix_of(operator, like) -> np.ndarray:
    """The explicit matrix."""
    return (
        np.asarray(_columns(operator, jnp.eye(like.size).reshape(like.size, *like.shape)))
        .reshape(like.size, -1)
        .T
    )


def positive_semidefinite(a) -> bool:
    """Exactly, of a symmetric matrix of fractions."""
    a = [list(row) for row in a]
    for k in range(len(a)):
        if a[k][k] < 0 or (a[k][k] == 0 and any(a[k][j] != 0 for j in range(k + 1, len(a)))):
            return False
        if a[k][k] > 0:
            for i in range(k + 1, len(a)):
                factor = a[i][k] / a[k][k]
                a[i] = [x - factor * y for x, y in zip(a[i], a[k], strict=True)]
    return True


def exceeds_eigenvalues(bound, gram) -> bool:
    """Is this bound, exactly, at least the largest eigenvalue of the symmetric part of the
    matrix?"""
    g = [[Fraction(float(x)) for x in row] for row in gram]
    n = range(len(g))
    return positive_semidefinite(
        [[Fraction(float(bound)) * (i == j) - (g[i][j] + g[j][i]) / 2 for j in n] for i in n]
    )


def exceeds_norm(bound, matrix) -> bool:
    """Is this bound, exactly, at least the norm of the matrix?"""
    m = [[Fraction(float(x)) for x in row] for row in matrix]
    n = range(len(m[0]))
    square = Fraction(float(bound)) ** 2
    return positive_semidefinite(
        [[square * (i == j) - sum(row[i] * row[j] for row in m) for j in n] for i in n]
    )


def test_the_exact_oracle_tells_the_last_bit():
    matrix = np.array([[3.0, 0.0], [4.0, 0.0]])
    assert exceeds_norm(5.0, matrix) and not exceeds_norm(np.nextafter(5, 0), matrix)
    assert exceeds_eigenvalues(0.0, -np.eye(2)) and not exceeds_eigenvalues(
        0.0, np.diag([0.0, 1e-300])
    )


# ---------------------------------------------------------------------------------- against the SVD


def times(guess, truth):
    """A guess relative to the truth, or none at all."""
    return guess * truth if np.isfinite(guess) else guess


@pytest.mark.parametrize("name", BANDED)
def test_bounds_of_masked_convolutions_are_at_least_the_norm_and_tight_whatever_the_guess(
    x64, name
):
    operator, like = convolution(*BANDED[name])
    shape_out = jax.eval_shape(operator, like).shape
    assert norms.banded.masked_convolution_cost(operator, like) < 1e9

    @jax.jit
    def bounds(operator, *arguments):
        *masks, guess = arguments
        return {
            "schur": norms.closed.schur_bound(operator, like, *masks),
            "frobenius": norms.closed.frobenius_bound(operator, like, *masks),
            "banded": norms.banded.masked_convolution_norm_bound(operator, like, *masks, guess),
        }

    @settings(max_examples=20, deadline=None)
    @given(
        seed=st.integers(0, 10**6),
        shares=st.tuples(*[st.sampled_from([0.0, 0.1, 0.4, 0.8, 1.0])] * 2),
        scale=st.sampled_from([1.0, 1e-150, 1e150]),
        guess=st.sampled_from([1.0, 0.9, 1e-3, 0.0, -1.0, np.nan, np.inf, 3.0, 1e100]),
    )
    def check(seed, shares, scale, guess):
        rng = np.random.default_rng(seed)
        kernel = scale * rng.normal(size=operator.kernel.shape)
        masks = [
            rng.uniform(size=s) < share
            for s, share in zip((like.shape, shape_out), shares, strict=True)
        ]
        matrix = (
            matrix_of(with_kernel(operator, kernel), like)
            * masks[0].reshape(-1)
            * masks[1].reshape(-1, 1)
        )
        truth = np.linalg.norm(matrix / scale, 2) * scale
        found = bounds(with_kernel(operator, kernel), *map(jnp.asarray, masks), times(guess, truth))
        if not all(mask.any() for mask in masks):
            assert all(value == 0 for value in found.values())
            return
        if truth == 0:
            assert all(0 < value <= 1e-100 * scale for value in found.values())
            return
        assert all(value >= truth * (1 - 1e-12) for value in found.values())
        assert found["schur"] <= found["frobenius"]
        np.testing.assert_allclose(
            found["frobenius"], np.linalg.norm(matrix / scale) * scale, rtol=1e-9
        )
        sums = [np.max(np.sum(np.abs(matrix / scale), axis=axis)) for axis in (0, 1)]
        assert found["schur"] <= np.sqrt(sums[0] * sums[1]) * scale * (1 + 1e-9)
        if not 1 < guess < np.inf:  # a guess that is too large makes the bound loose
            assert found["banded"] <= ATTEMPT * truth

    check()


@pytest.mark.parametrize("sizes", [(9, 5), (5, 9)])
def test_dense_bounds_are_at_least_the_norm_and_tight_whatever_the_guess(x64, sizes):
    columns, rows = sizes
    operator, like = explicit(np.zeros((rows, columns)))

    @jax.jit
    def bound(matrix, *arguments):
        return norms.gram.dense_norm_bound(with_kernel(operator, matrix), like, *arguments)

    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 10**6),
        share=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
        scale=st.sampled_from([1.0, 1e-150, 1e150]),
        guess=st.sampled_from([1.0, 1e-3, -1.0, np.nan, np.inf, 1.5, 1e100]),
    )
    def check(seed, share, scale, guess):
        rng = np.random.default_rng(seed)
        matrix = rng.normal(size=(rows, columns)) * scale
        keep_in, keep_out = rng.uniform(size=columns) < share, rng.uniform(size=rows) < share
        truth = np.linalg.norm(matrix / scale * keep_in * keep_out[:, None], 2) * scale
        found = bound(
            jnp.asarray(matrix), jnp.asarray(keep_in), jnp.asarray(keep_out), times(guess, truth)
        )
        assert found >= truth * (1 - 1e-12)
        if not (keep_in.any() and keep_out.any()):
            assert found == 0
        elif not 1 < guess < np.inf:
            assert found <= ATTEMPT * truth

    check()


def test_the_hidden_direction_does_not_deceive_the_dense_bound(x64):
    n = 512
    v = np.random.default_rng(0).choice([-1.0, 1.0], n) / np.sqrt(n)
    bound = jax.jit(norms.gram.gram_norm_bound)
    for s in (2.0, 1.01):
        # the guess is what an estimate sees
        found = bound(jnp.asarray(np.eye(n) + (s - 1) * np.outer(v, v)), 1.0)
        assert s <= found <= ATTEMPT * s


def test_an_estimate_that_misses_the_largest_value_falls_back_on_gram_iteration(x64, monkeypatch):
    monkeypatch.setattr(norms.gram, "ritz_value", lambda gram, shape: jnp.asarray(1e-3))
    matrix = np.random.default_rng(0).normal(size=(12, 12))
    truth = np.linalg.norm(matrix, 2)
    found = jax.jit(lambda m: norms.gram.gram_norm_bound(m))(jnp.asarray(matrix))
    assert truth <= found <= GRAM * truth


# ---------------------------------------------------------------------------------- circular bounds


@pytest.mark.parametrize(
    ("settings_", "shape"),
    [
        (dict(kernel_size=(3, 4), padding=1), (6, 7, 2)),
        (
            dict(
                kernel_size=(4, 3), padding=((1, 2), (0, 3)), strides=(2, 3), kernel_dilation=(1, 2)
            ),
            (8, 7, 2),
        ),
        (
            dict(kernel_size=(5,), padding=7, input_dilation=2, strides=2, feature_group_count=2),
            (9, 4),
        ),
        (dict(kernel_size=(2, 1, 3), padding="VALID", strides=(1, 1, 2)), (3, 2, 5, 2)),
    ],
)
def test_the_circular_bound_is_the_norm_of_the_circle_that_contains_the_convolution(
    x64, settings_, shape
):
    operator, like = convolution(settings_, shape)
    bound = jax.jit(lambda operator: norms.fourier.convolution_norm_bound(operator, like))
    apply = operator.apply
    extents = [(k - 1) * d for k, d in zip(operator.kernel.shape, apply.dilation, strict=False)]
    grid = [
        -(-((n - 1) * spread + 1 + e) // s) * s
        for n, spread, e, s in zip(
            shape, apply.input_dilation, extents, apply.strides, strict=False
        )
    ]
    circle = Convolution(
        apply.strides, "CIRCULAR", (1,) * len(grid), apply.dilation, groups=apply.groups
    )
    on_circle = jax.ShapeDtypeStruct((*grid, shape[-1]), jnp.float64)
    for seed in range(3):
        kernel = np.random.default_rng(seed).normal(size=operator.kernel.shape)
        found = bound(with_kernel(operator, kernel))
        around = matrix_of(LinearOperator(circle, jnp.asarray(kernel)), on_circle)
        inside = matrix_of(with_kernel(operator, kernel), like)
        truth = np.linalg.norm(around, 2)
        assert np.linalg.norm(inside, 2) * (1 - 1e-12) <= found <= GRAM * truth
        schur = np.sqrt(np.abs(inside).sum(axis=0).max() * np.abs(inside).sum(axis=1).max())
        assert min(truth, schur, np.linalg.norm(inside)) * (1 - 1e-12) <= found


@pytest.mark.parametrize(("size", "exact"), [(6, True), (7, False)])
def test_circular_padding_is_its_own_circle_where_the_stride_divides_it(x64, size, exact):
    apply = Convolution((2, 2), "CIRCULAR", (1, 1), (1, 1), groups=1)
    kernel = np.random.default_rng(0).normal(size=(3, 2, 2, 4))
    operator, like = (
        LinearOperator(apply, jnp.asarray(kernel)),
        jax.ShapeDtypeStruct((size, size, 2), jnp.float64),
    )
    truth = np.linalg.norm(matrix_of(operator, like), 2)
    found = jax.jit(lambda operator: norms.fourier.convolution_norm_bound(operator, like))(operator)
    assert found >= truth * (1 - 1e-12)
    assert (found <= GRAM * truth) == exact


def test_the_circular_bound_is_close_for_large_images(x64):
    operator, like = convolution(dict(kernel_size=(3, 3), padding=1), (24, 24, 1), 2)
    truth = np.linalg.norm(matrix_of(operator, like), 2)
    found = jax.jit(lambda operator: norms.fourier.convolution_norm_bound(operator, like))(operator)
    assert truth <= found <= 1.02 * truth


# ----------------------------------------------------------------------------------------- rounding


def around(value, count=60):
    """The floating-point numbers next to a value."""
    return value * (1 + np.arange(-count, count + 1) * 2.0**-52)


def block_attempts(gram, taus):
    """Attempts on four blocks of a matrix of 8 rows that is block tridiagonal."""

    def entries(rows, columns):
        return gram[rows[:, None], columns[None, :]]

    indices, valid = jnp.arange(8).reshape(4, 2), jnp.ones((4, 2), bool)
    return jax.vmap(lambda tau: norms.banded._banded_attempt(entries, indices, valid, tau))(taus)


def block_gram(seed):
    band = np.abs(np.subtract.outer(range(8), range(8))) <= 1
    matrix = np.random.default_rng(seed).normal(size=(8, 8)) * band
    return matrix.T @ matrix


def full_gram(seed):
    matrix = np.random.default_rng(seed).normal(size=(7, 6))
    return matrix.T @ matrix


def dense_attempts(gram, taus):
    return jax.vmap(lambda tau: norms.gram._attempt(gram, tau))(taus)


def compiled(attempts):
    """Never from the cache of another test: they replace what is called inside."""
    return jax.jit(lambda gram, taus: attempts(gram, taus))


@pytest.mark.parametrize(
    ("attempts", "gram_of"), [(dense_attempts, full_gram), (block_attempts, block_gram)]
)
def test_a_factorisation_accepted_below_the_largest_eigenvalue_still_bounds_it(
    x64, monkeypatch, attempts, gram_of
):
    # Without the general allowance: what the factors leave over must be enough by itself.
    monkeypatch.setattr(norms.cholesky, "ROUND_UP", 1.0)
    run, below = compiled(attempts), 0
    for gram in map(gram_of, range(8)):
        taus = around(np.linalg.eigvalsh(gram)[-1])
        for tau, bound in zip(
            taus, np.asarray(run(jnp.asarray(gram), jnp.asarray(taus))), strict=True
        ):
            assert exceeds_eigenvalues(bound, gram) if np.isfinite(bound) else bound == np.inf
            below += np.isfinite(bound) and not exceeds_eigenvalues(tau, gram)
    assert below > 0  # else nothing was tested: rounding did let a factorisation through


WRONG_FACTORS = {
    "of another matrix": lambda a: jnp.linalg.cholesky(
        a + 10 * jnp.max(jnp.abs(a)) * jnp.eye(len(a))
    ),
    "zero": jnp.zeros_like,
    "not triangular": lambda a: jnp.abs(a) + 0.1,
}


@pytest.mark.parametrize("attempts", [dense_attempts, block_attempts])
@pytest.mark.parametrize("factor", WRONG_FACTORS)
def test_nothing_is_assumed_of_the_factorisation(x64, monkeypatch, attempts, factor):
    monkeypatch.setattr(jax.lax.linalg, "cholesky", lambda a, **_: WRONG_FACTORS[factor](a))
    run, finite = compiled(attempts), 0
    for gram in map(block_gram, range(5)):
        largest = np.linalg.eigvalsh(gram)[-1]
        bounds = np.asarray(run(jnp.asarray(gram), largest * jnp.array([0.1, 0.5, 0.9])))
        assert np.all(bounds >= largest)
        finite += np.sum(np.isfinite(bounds))
    # there the solve divides by zero
    assert finite > 0 or (factor == "zero" and attempts is block_attempts)


def test_nothing_is_assumed_of_the_triangular_solve(x64, monkeypatch):
    def solve(a, b, **_):
        return 0.5 * jnp.linalg.solve(a, b.T).T

    monkeypatch.setattr(jax.lax.linalg, "triangular_solve", solve)
    run = compiled(block_attempts)
    for gram in map(block_gram, range(5)):
        largest = np.linalg.eigvalsh(gram)[-1]
        below, far = np.split(
            np.asarray(run(jnp.asarray(gram), largest * jnp.array([0.6, 0.8, 0.95, 3.0]))), [3]
        )
        assert np.all(below >= largest)
        # noticed, though this factorisation would be accepted
        assert 3 * largest * (1 + 1e-9) < far < np.inf


def test_a_gram_matrix_as_wrong_as_the_error_model_allows_does_not_lower_the_bound(
    x64, monkeypatch
):
    """One column of many entries: its Gram matrix is one sum of squares, whose rounding is all
    there is."""
    rows = 4096
    matrix = np.full((rows, 1), 2.0**-6)  # of norm 1, exactly
    honest = norms.gram.largest_eigenvalue_bound
    worst = 1 - (rows - 1) * 2.0**-53  # less than gamma of so many terms

    def rounded(gram, guess=None):
        return honest(gram * worst, guess)

    monkeypatch.setattr(norms.gram, "largest_eigenvalue_bound", rounded)
    bound = float(norms.gram.gram_norm_bound(jnp.asarray(matrix), 1.0))
    assert exceeds_norm(bound, matrix) and bound < 1 + 1e-9


def test_what_a_factor_leaves_over_counts_the_rounding_of_multiplying_it_out(x64, monkeypatch):
    """A = tau I - G and L agree to the last digit as ``fl(L L^T)`` is computed, and yet A is not
    semidefinite: L is one
    column of two values, p and q, whose squares round down and whose product rounds up."""
    half = 64
    p, q = _values_that_round_apart()
    column = np.concatenate([np.full(half, p), np.full(half, q)])
    rounded = np.outer(column, column)
    factor = np.zeros_like(rounded)
    factor[:, 0] = column
    gram = np.eye(2 * half) - rounded
    assert np.array_equal(np.eye(2 * half) - gram, rounded)  # nothing else is rounded
    monkeypatch.setattr(jax.lax.linalg, "cholesky", lambda a, **_: jnp.asarray(factor))
    bound = float(norms.gram._attempt(jnp.asarray(gram), jnp.asarray(1.0)))
    # A Rayleigh quotient, exactly: x is q on the first half and -p on the second, orthogonal to the
    # column.
    x = [Fraction(q)] * half + [Fraction(-p)] * half
    square = sum(v * v for v in x)
    exact_gram = [[Fraction(v) for v in row] for row in gram]
    image = [sum(g * v for g, v in zip(row, x, strict=True)) for row in exact_gram]
    largest = sum(v * w for v, w in zip(x, image, strict=True)) / square
    # more than the general allowance of 16 units covers
    assert largest > 1 + 20 * Fraction(1, 2**53)
    assert Fraction(bound) >= largest


def _values_that_round_apart():
    """p and q in (0.75, 1), whose squares round down and whose product rounds up, each by most of
    half a unit."""
    rng = np.random.default_rng(0)

    def excess(a, b):
        """What rounding adds to ``a b``, in units of 2^-54: -1 to 1."""
        return float((Fraction(a * b) - Fraction(a) * Fraction(b)) * 2**54)

    down = [v for v in rng.uniform(0.75, 0.99, 400) if excess(v, v) < -0.8]
    return max(((p, q) for p in down for q in down), key=lambda pair: excess(*pair))


def test_gram_iteration_of_matrices_on_which_it_is_exact_is_not_rounded_below_the_norm(x64):
    """Rank one: every iterate's Frobenius norm is its norm, so nothing but the allowance for
    rounding is between."""
    real = jax.jit(lambda m: norms.gram.gram_iteration((m,)))
    doubled = jax.jit(lambda a, b: norms.gram.gram_iteration((a, b)))
    for seed in range(10):
        rng = np.random.default_rng(seed)
        left, right = rng.uniform(size=5) * 10.0 ** rng.integers(-100, 100), rng.uniform(size=4)
        matrix = np.outer(left, right)
        bound = real(jnp.asarray(matrix))
        assert exceeds_norm(bound, matrix)
        assert bound <= np.linalg.norm(left) * np.linalg.norm(right) * (1 + 1e-12)
        imaginary = np.outer(left, rng.normal(size=4))
        bound = doubled(jnp.asarray(matrix), jnp.asarray(imaginary))
        assert exceeds_norm(bound, np.block([[matrix, -imaginary], [imaginary, matrix]]))
        assert bound <= np.linalg.norm(matrix + 1j * imaginary, 2) * (1 + 1e-12)


def test_closed_forms_of_matrices_on_which_they_are_exact_are_not_rounded_below_the_norm(x64):
    operator, like = explicit(np.zeros((5, 4)))
    schur = jax.jit(lambda m: norms.closed.schur_bound(with_kernel(operator, m), like))
    frobenius = jax.jit(lambda m: norms.closed.frobenius_bound(with_kernel(operator, m), like))
    for value in (0.1, 1 / 3, 7e-151, 3e150, 1e-320):
        matrix = np.full((5, 4), value)
        assert exceeds_norm(schur(matrix), matrix)
        assert schur(matrix) <= np.sqrt(20) * value * (1 + 1e-12) or value < 1e-300
    for seed in range(10):
        rng = np.random.default_rng(seed)
        matrix = np.outer(rng.normal(size=5), rng.normal(size=4))
        assert exceeds_norm(frobenius(matrix), matrix)


def test_a_circular_convolution_with_a_positive_kernel_is_not_rounded_below_its_sum(x64):
    operator, like = convolution(dict(kernel_size=(3, 2), padding="CIRCULAR"), (5, 4, 1), 1)
    bound = jax.jit(lambda operator: norms.fourier.convolution_norm_bound(operator, like))
    for seed in range(10):
        kernel = np.random.default_rng(seed).uniform(size=operator.kernel.shape)
        exact = sum(Fraction(float(k)) for k in kernel.reshape(-1))
        found = bound(with_kernel(operator, kernel))
        assert exact <= Fraction(float(found)) <= exact * (1 + Fraction(1, 10**12))


def test_cancellation_and_nearly_equal_singular_values_are_covered(x64):
    bound = jax.jit(norms.gram.gram_norm_bound)
    rng = np.random.default_rng(0)
    parallel = np.outer(rng.normal(size=6), np.ones(5)) + 1e-12 * rng.normal(size=(6, 5))
    q, _ = np.linalg.qr(rng.normal(size=(6, 5)))
    equal = q * (1 - 1e-15 * np.arange(5)) @ np.linalg.qr(rng.normal(size=(5, 5)))[0]
    wide = q * 10.0 ** -(60 * np.arange(5.0))
    for matrix in (parallel, equal, wide, np.eye(6, 5)):
        for guess in (0.5, 1.0, np.linalg.norm(matrix, 2) * (1 - 1e-15)):
            found = bound(jnp.asarray(matrix), guess)
            assert exceeds_norm(found, matrix)
            assert found <= 1.01 * np.linalg.norm(matrix, 2)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_bounds_of_entries_of_any_size_are_at_least_the_exact_norm(seed):
    """Sizes between 1e-300 and 1e100 in one kernel, behind masks that may keep only the small
    ones."""
    rng = np.random.default_rng(seed)
    whole = rng.choice([-1, 1], (3, 3)) * 10.0 ** rng.uniform(-300, 100, (3, 3))
    whole = np.where(rng.uniform(size=(3, 3)) < 0.2, 0.0, whole)
    masks = [rng.uniform(size=3) < 0.7 for _ in range(2)]
    kernel = whole[0].reshape(3, 1, 1)
    with jax.enable_x64(True):
        by_matrix, of_convolution = jax.tree.map(float, _bounds_of_any_size(whole, kernel, *masks))
        layer, like = convolution(dict(kernel_size=(3,), padding=1), (3, 1), 1)
        band = matrix_of(with_kernel(layer, kernel), like)
    kept = masks[0] * masks[1][:, None]
    for matrix, found in ((whole, by_matrix), (band, of_convolution)):
        for value in found:
            assert exceeds_norm(value, matrix * kept)


@jax.jit
def _bounds_of_any_size(whole, kernel, mask_in, mask_out):
    dense, like = explicit(jnp.zeros((3, 3)))
    layer, image = convolution(dict(kernel_size=(3,), padding=1), (3, 1), 1)
    kinds = [
        norms.closed.schur_bound,
        norms.closed.frobenius_bound,
        norms.gram.dense_norm_bound,
    ]
    dense = with_kernel(dense, whole)
    layer = with_kernel(layer, kernel)
    kinds_of_layer = [*kinds, norms.banded.masked_convolution_norm_bound]
    return (
        [bound(dense, like, mask_in, mask_out) for bound in kinds],
        [
            *(bound(layer, image, mask_in[:, None], mask_out[:, None]) for bound in kinds_of_layer),
            norms.best.global_norm_bound(layer, image),
        ],
    )


# ----------------------------------------------------------------------- masks that keep everything


def examples_of_masks(shape, *, masked):
    """Masks ``(4, *shape)`` that keep everything, but for those of the examples named."""
    masks = np.ones((4, *shape), bool)
    for i in masked:
        masks[i].flat[: masks[i].size // 2] = False
    return jnp.asarray(masks)


@pytest.mark.parametrize("masked, computed", [([], 0), ([2], 4)])
@pytest.mark.parametrize("side", ["in", "out"])
def test_a_norm_is_bounded_anew_only_for_a_batch_in_which_a_mask_takes_something_away(
    x64, masked, computed, side
):
    matrix = np.random.default_rng(0).normal(size=(6, 6))
    operator, like = explicit(jnp.asarray(matrix))
    whole = norms.best.whole_norm(operator, like)
    calls = []

    def bound(operator, mask_in, mask_out):
        found = norms.gram.dense_norm_bound(operator, like, mask_in, mask_out)
        jax.debug.callback(calls.append, found)
        return found

    masks = {"in": None, "out": None, side: examples_of_masks((6,), masked=masked)}

    @jax.jit
    @jax.vmap
    def run(masks):
        return whole.unless_masked(bound, operator, masks["in"], masks["out"])

    found = run(masks)
    jax.effects_barrier()
    assert len(calls) == computed
    for value, kept in zip(found, masks[side], strict=True):
        part = matrix * np.asarray(kept)[None if side == "in" else (slice(None), None)]
        exact = np.linalg.norm(part, 2)
        assert exact * (1 - 1e-12) <= value <= exact * ATTEMPT


def test_a_bound_that_is_not_needed_is_not_computed_in_front_of_the_loop_either(x64):
    """What does not change in a loop XLA moves in front of it, where it runs whether or not the
    loop does."""
    operator, like = convolution(dict(kernel_size=(3, 3), padding=1), (6, 6, 2))
    whole = norms.best.whole_norm(operator, like)
    start = jnp.ones((norms.chebyshev.STARTS, like.size))

    def bound(operator, mask_in, mask_out):
        drawn = norms.chebyshev.inflated_norm_bound
        return drawn(operator, start, 1e-6, like, mask_in, mask_out)

    run = jax.jit(jax.vmap(lambda mask: whole.unless_masked(bound, operator, mask, None)))
    program = run.lower(examples_of_masks(like.shape, masked=[0])).compile().as_text()
    entry = program[program.index("\nENTRY") :]
    assert entry.count(" while(") == 1
    assert " dot(" not in entry


def test_a_whole_norm_that_is_not_close_never_stands_for_that_of_an_example(x64):
    """Schur's test is all there is of a matrix too large to factor."""
    matrix = np.random.default_rng(0).normal(size=(5, 5))
    operator, like = explicit(jnp.asarray(matrix))
    loose = norms.closed.schur_bound(operator, like)
    exact = np.linalg.norm(matrix, 2)
    assert loose > norms.best.CLOSE * exact
    close = loose <= norms.best.CLOSE * norms.lanczos.norm_estimate(operator, like)
    whole = norms.best.WholeNorm(loose, close)
    found = whole.unless_masked(
        lambda operator, *masks: norms.gram.dense_norm_bound(operator, like, *masks),
        operator,
        jnp.ones(5, bool),
        None,
    )
    assert exact * (1 - 1e-12) <= found <= exact * ATTEMPT
    assert norms.best.whole_norm(operator, like).close


def test_a_product_at_every_position_has_the_norm_of_its_matrix_however_many_positions(x64):
    rng = np.random.default_rng(0)
    # (numbers of dot_general, is the kernel first, kernel, example), and the matrices
    one, each = rng.normal(size=(7, 5)), rng.normal(size=(3, 7, 5))
    cases = [
        ((((2,), (0,)), ((), ())), False, one, (4, 3, 7), [one]),
        ((((1,), (1,)), ((), ())), True, one, (4, 5), [one]),
        ((((2,), (1,)), ((1,), (0,))), False, each, (4, 3, 7), each),
    ]
    for numbers, first, kernel, shape, matrices in cases:
        operator = LinearOperator(Product(numbers, first), jnp.asarray(kernel))
        like = jax.ShapeDtypeStruct(shape, jnp.float64)
        exact = max(np.linalg.norm(matrix, 2) for matrix in matrices)
        assert exact == pytest.approx(np.linalg.norm(matrix_of(operator, like), 2))
        many = jax.ShapeDtypeStruct((5000, *shape[1:]), jnp.float64)
        for size in (like, many):
            bound = norms.best.global_norm_bound(operator, size)
            assert exact * (1 - 1e-12) <= bound <= exact * ATTEMPT


# ---------------------------------------------------------------------------------- degenerate maps


def test_degenerate_kernels_and_masks_never_give_a_number_too_small(x64):
    operator, like = convolution(dict(kernel_size=(3,), padding=1), (5, 1), 1)
    mask = jnp.ones((5, 1), bool)

    @jax.jit
    def bounds(operator, mask_in, mask_out):
        masks = mask_in, mask_out
        return (
            norms.closed.schur_bound(operator, like, *masks),
            norms.closed.frobenius_bound(operator, like, *masks),
            norms.gram.dense_norm_bound(operator, like, *masks),
            norms.banded.masked_convolution_norm_bound(operator, like, *masks),
            jnp.where(
                jnp.all(mask_in & mask_out), norms.fourier.convolution_norm_bound(operator, like), 0
            ),
        )

    def of(kernel, mask_in=mask, mask_out=mask):
        return np.asarray(
            bounds(with_kernel(operator, np.reshape(kernel, (3, 1, 1))), mask_in, mask_out)
        )

    for bad in (np.nan, np.inf, -np.inf):
        assert np.all(of([0.0, bad, 1.0]) == np.inf)
        assert np.all(of([0.0, bad, 1.0], ~mask) == 0)
    assert np.all(of([1.7e308, 1.7e308, 1.7e308]) == np.inf)  # the norm overflows
    assert np.all(of([0.0, 0.0, 0.0]) < 1e-250) and np.all(of([0.0, 0.0, 0.0]) >= 0)
    for tiny in (5e-324, 1e-310, 3e-308):
        assert np.all(of([0.0, tiny, 0.0]) >= tiny)
    for huge in (8e307, 1.7e308):
        assert np.all(of([0.0, huge, 0.0]) >= huge)
    # A single entry is kept, and it is far below the others: out 0 sees in 0 through the middle tap
    # only.
    first = jnp.zeros((5, 1), bool).at[0].set(True)
    for small in (1e-9, 1e-160, 1e-300):
        assert np.all(of([1e150, small, 1e150], first, first)[:4] >= small)
    assert np.all(of([1.0, 1e-9, 1.0], first, first)[:4] <= 1e-9 * ATTEMPT)


@pytest.mark.parametrize(
    "bound",
    [
        norms.closed.schur_bound,
        norms.gram.dense_norm_bound,
        norms.banded.masked_convolution_norm_bound,
        norms.best.norm_bound,
    ],
)
def test_unsuitable_arguments_are_errors(bound):
    single = operator_of(nnx.Conv(1, 1, (3,), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"float32.*enable x64"):
        bound(single, jnp.zeros((5, 1)))
    with jax.enable_x64(True):
        operator, like = convolution(dict(kernel_size=(3,), padding=1), (5, 1), 1)
        with pytest.raises(
            ValueError,
            match=r"mask_out must be boolean of shape \(5, 1\), got bool of shape \(4, 1\)",
        ):
            bound(operator, like, None, jnp.ones((4, 1), bool))
        with pytest.raises(ValueError, match="mask_in must be boolean"):
            bound(operator, like, jnp.ones((5, 1)))


def test_unsuitable_matrices_and_maps_are_errors(x64):
    with pytest.raises(ValueError, match=r"square float64 matrix, got float64 of shape \(3, 2\)"):
        norms.gram.largest_eigenvalue_bound(jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="expected a matrix"):
        norms.gram.gram_norm_bound(jnp.zeros(3))
    with pytest.raises(TypeError, match="expected the view of a convolution"):
        norms.fourier.convolution_norm_bound(*explicit(np.eye(2)))
    assert norms.banded.masked_convolution_cost(*explicit(np.eye(2))) == np.inf


# ----------------------------------------------------------------------------------- what is chosen


@pytest.mark.parametrize(
    "function", [norms.gram.dense_norm_bound, norms.banded.masked_convolution_norm_bound]
)
def test_examples_taken_one_after_the_other_under_vmap_keep_their_own_masks(
    x64, monkeypatch, function
):
    monkeypatch.setattr(norms.gram, "VECTORISED_ENTRIES", 1)
    operator, like = convolution(dict(kernel_size=(3,), padding=1), (6, 2), 3)
    rng = np.random.default_rng(0)
    masks = [rng.uniform(size=(4, 6, channels)) < 0.5 for channels in (2, 3)]
    bound = lambda operator, *masks: function(operator, like, *masks)  # noqa: E731
    found = jax.jit(jax.vmap(bound, in_axes=(None, 0, 0)))(operator, *map(jnp.asarray, masks))
    matrix = matrix_of(operator, like)
    for value, keep_in, keep_out in zip(found, *masks, strict=True):
        truth = np.linalg.norm(matrix * keep_in.reshape(-1) * keep_out.reshape(-1, 1), 2)
        assert truth <= value <= ATTEMPT * truth


@pytest.mark.parametrize("channels", [1, 4])
def test_a_gram_matrix_formed_by_application_in_chunks_is_the_explicit_one(
    x64, monkeypatch, channels
):
    operator, like = convolution(dict(kernel_size=(3,), padding=1), (9, channels), 2)
    keep_in, keep_out = (np.random.default_rng(0).uniform(size=(9, c)) < 0.6 for c in (channels, 2))
    truth = np.linalg.norm(
        matrix_of(operator, like) * keep_in.reshape(-1) * keep_out.reshape(-1, 1), 2
    )
    monkeypatch.setattr(norms.gram, "EXPLICIT_ENTRIES", 1)
    # does not divide the number of columns
    monkeypatch.setattr(norms.scaled, "CPU_CHUNK_ENTRIES", 100)
    found = jax.jit(lambda *masks: norms.gram.dense_norm_bound(operator, like, *masks))(
        keep_in, keep_out
    )
    assert truth <= found <= ATTEMPT * truth


def test_a_budget_below_the_whole_still_serves_examples_with_few_kept_coordinates(x64):
    operator, like = convolution(dict(kernel_size=(3, 3), padding=1), (12, 6, 2), 2)
    budget = 0.5 * norms.banded.masked_convolution_cost(operator, like)
    bound = jax.jit(
        lambda mask: norms.banded.masked_convolution_norm_bound(
            operator, like, mask, None, fallback=50.0, budget=budget
        )
    )
    rng = np.random.default_rng(0)
    matrix = matrix_of(operator, like)
    for share, local in ((0.15, True), (0.9, False)):
        mask = rng.uniform(size=like.shape) < share
        truth = np.linalg.norm(matrix * mask.reshape(-1), 2)
        found = bound(jnp.asarray(mask))
        assert truth <= found <= 50.0
        assert (found <= ATTEMPT * truth) == local


def test_the_best_bound_is_at_most_every_candidate_within_the_budget(x64):
    rng = np.random.default_rng(0)
    dense, like = explicit(rng.normal(size=(6, 9)))
    truth = np.linalg.norm(dense.kernel, 2)

    def best(**options):
        return float(jax.jit(lambda: norms.best.norm_bound(dense, like, **options))())

    assert truth <= best() <= ATTEMPT * truth
    cheap = best(budget=0.0)
    np.testing.assert_allclose(cheap, norms.closed.schur_bound(dense, like), rtol=1e-12)
    assert cheap > 1.1 * truth
    assert best(budget=0.0, global_bound=1.0001 * truth) == 1.0001 * truth
    assert best(budget=0.0, global_bound=np.nan) == cheap  # a NaN is no bound


def test_the_global_bound_is_tight_within_the_budget_and_circular_beyond_it(x64):
    operator, like = convolution(dict(kernel_size=(4,), padding=1), (5, 2), 2)
    truth = np.linalg.norm(matrix_of(operator, like), 2)
    whole, circular, expected = jax.jit(
        lambda operator: (
            norms.best.global_norm_bound(operator, like),
            norms.best.global_norm_bound(operator, like, budget=0.0),
            norms.fourier.convolution_norm_bound(operator, like),
        )
    )(operator)
    assert truth <= whole <= ATTEMPT * truth < circular
    np.testing.assert_allclose(circular, expected, rtol=1e-12)


def test_batches_of_several_layers_at_once_do_not_wait_for_each_other_for_ever():
    """jaxlib 0.10's batched LAPACK calls did, on as many threads as there are calls
    (`norms.cholesky.one_by_one`)."""
    program = """
import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax, jax.numpy as jnp
from lipjax import norms
jax.config.update("jax_enable_x64", True)
factors = [jax.random.normal(jax.random.key(i), (64, 30, 30)) for i in range(4)]

def layer(factor):
    gram = factor @ factor.T
    attempt = norms.gram._attempt(gram, jnp.asarray(200.0))
    return attempt, norms.lanczos.ritz_value(lambda x: gram @ x, (30,))

run = jax.jit(lambda factors: [jax.vmap(layer)(factor) for factor in factors])
for _ in range(300):
    found = jax.block_until_ready(run(factors))
for (bound, value), factor in zip(found, factors):
    truth = jnp.linalg.eigvalsh(factor @ factor.swapaxes(1, 2))[:, -1]
    assert jnp.all(bound >= truth)
    assert jnp.all(value <= truth * (1 + 1e-9)) and jnp.all(value > 0.999 * truth)
print("ended")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "ended\n", done.stderr


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 12), scale=st.sampled_from([1e-8, 1.0, 1e6]))
def test_the_largest_eigenvalue_of_a_tridiagonal_matrix_is_that_of_numpy(seed, size, scale):
    rng = np.random.default_rng(seed)
    diagonal, off = scale * rng.normal(size=size), scale * rng.normal(size=size - 1)
    off[rng.random(size - 1) < 0.3] = 0
    matrix = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
    with jax.enable_x64(True):
        found = float(norms.lanczos.largest_eigenvalue(jnp.asarray(diagonal), jnp.asarray(off)))
    assert abs(found - np.linalg.eigvalsh(matrix)[-1]) <= 1e-10 * np.abs(matrix).max()
