"""Bounds from an explicit Gram matrix: accepted Cholesky factorisations, and Gram iteration.

For any kind of map, masked, within a per mille or two: ``2 k^2 N + 7/3 k^3`` flops an attempt, k
the smaller side of the matrix and N the larger.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lipjax.graph.linear import LinearOperator
from lipjax.norms.cholesky import factor_with_error, first_success
from lipjax.norms.closed import closed_form
from lipjax.norms.lanczos import RITZ_STEPS, ritz_value
from lipjax.norms.scaled import (
    ROUND_UP,
    TINY,
    Problem,
    application_flops,
    chunked,
    frobenius_up,
    norm_from_gram,
    or_infinity,
    power_of_two,
    problem_of,
)
from lipjax.rounding import gamma

# Squarings of Gram iteration: its bound is within a factor k^(2^-(STEPS+1)) of the norm, 1.003 for
# k = 512.
STEPS = 10
# Explicit matrices up to this many entries; beyond, the Gram matrix is formed by applying the map,
# in chunks.
EXPLICIT_ENTRIES = 2**25
# Matrices up to this many entries are taken by vmap all at once, larger ones one after the other.
VECTORISED_ENTRIES = 2**16

# A real matrix is a tuple of one array, a complex one a tuple of its real and imaginary part.
_Parts = tuple[jax.Array, ...]


def dense_norm_bound(
    operator: LinearOperator,
    like: jax.Array | jax.ShapeDtypeStruct,
    mask_in: jax.Array | None = None,
    mask_out: jax.Array | None = None,
    guess: jax.Array | None = None,
) -> jax.Array:
    """Bounds ``||D_out W D_in||_2`` of any map by the explicit masked Gram matrix, smaller side.

    With k the smaller side and N the larger, forming the Gram matrix takes ``2 k^2 N`` flops (for a
    matrix of more than `EXPLICIT_ENTRIES` entries: k applications of the map and its transpose) and
    an attempt ``7/3 k^3``; usually there is one. Memory: about ``5 k^2 + 2 k N`` numbers (the
    second term: not beyond `EXPLICIT_ENTRIES`).

    Rounding: a column of the identity goes through W exactly (one product with 1), and then through
    W^T with an error of at most ``gamma |W|^T |W|`` in each entry of the Gram matrix, whose norm is
    at most gamma times the square of the Schur bound.

    Args:
        operator, like, mask_in, mask_out: as in `schur_bound`.
        guess: of the norm, e.g. from a power iteration. Only the tightness depends on it.

    Returns:
        A scalar that satisfies the guarantee of `lipjax.norms`, at most `schur_bound`.

    Raises:
        ValueError: as `schur_bound`.
    """
    problem = problem_of(operator, like, mask_in, mask_out)
    closed = closed_form(problem)
    forming, matrix = _explicit_gram(problem)

    def largest(kernel, mask_in, mask_out, matrix, square):
        this = problem.with_kernel(kernel)._replace(mask_in=mask_in, mask_out=mask_out)
        return largest_eigenvalue_bound(forming(this, matrix), square)

    if problem.like.size * problem.out.size > VECTORISED_ENTRIES:
        largest = jax.custom_batching.sequential_vmap(largest)
    value = largest(problem.operator.kernel, mask_in, mask_out, matrix, problem.square(guess))
    return problem.bound(norm_from_gram(problem, value, closed), closed)


def gram_norm_bound(matrix: jax.Array, guess: jax.Array | None = None) -> jax.Array:
    """`dense_norm_bound` of an explicit float64 matrix ``(m, n)``; the guess is of its norm.

    Raises:
        ValueError: no matrix.
    """
    if matrix.ndim != 2:
        raise ValueError(f"expected a matrix, got shape {matrix.shape}.")
    rows, columns = matrix.shape
    return dense_norm_bound(
        LinearOperator.from_matrix(matrix, (columns,), (rows,)),
        jax.ShapeDtypeStruct((columns,), jnp.float64),
        guess=guess,
    )


def dense_cost(operator: LinearOperator, like: jax.Array | jax.ShapeDtypeStruct) -> float:
    """Flops of `dense_norm_bound` with one attempt, for one example."""
    out = jax.eval_shape(operator, jax.ShapeDtypeStruct(like.shape, like.dtype))
    small, large = sorted((like.size, out.size))
    explicit = small * large <= EXPLICIT_ENTRIES
    forming = (
        2.0 * small**2 * large if explicit else 2.0 * small * application_flops(operator, like, out)
    )
    return forming + (7 / 3) * small**3 + 2.0 * RITZ_STEPS * small**2


def largest_eigenvalue_bound(gram: jax.Array, guess: jax.Array | None = None) -> jax.Array:
    """Bounds ``max x^T G x / x^T x`` of a nearly symmetric, nearly semidefinite matrix as given.

    Accepted Cholesky factorisations ``tau I - G = L L^T + E`` with tau a little above an estimate
    (the largest Ritz value, or the guess), and Gram iteration where none succeeds.
    ``x^T G x = tau - |L^T x|^2 - x^T E x <= tau + ||E||`` needs no symmetry of G, so that it may
    come from a matrix product whose two halves round differently.

    Args:
        gram: ``(k, k)``, float64.
        guess: of the eigenvalue; used where it is above the Ritz value. Only the tightness depends
            on it.

    Returns:
        A scalar, not negative; infinity where the arithmetic broke down.

    Raises:
        ValueError: not square, or not float64.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.dtype != jnp.float64:
        raise ValueError(
            f"expected a square float64 matrix, got {gram.dtype} of shape {gram.shape}."
        )
    scale, back = power_of_two(gram)
    usable = jnp.all(jnp.isfinite(gram))
    gram = gram * scale
    estimate = ritz_value(lambda x: gram @ x, (gram.shape[0],))
    if guess is not None:
        guess = jnp.asarray(guess, jnp.float64) * scale
        estimate = jnp.where((guess > estimate) & jnp.isfinite(guess), guess, estimate)
    accepted = first_success(functools.partial(_attempt, gram), estimate)
    # Without any steps this is the Frobenius norm: a success costs no squaring, also under vmap.
    otherwise = gram_iteration((gram,), jnp.where(jnp.isfinite(accepted), 0, STEPS))
    bound = (jnp.minimum(accepted, or_infinity(otherwise)) + TINY) * back
    return jnp.where(usable, or_infinity(jnp.maximum(bound, 2.0**-1022 * gram.shape[0])), jnp.inf)


def _attempt(gram: jax.Array, tau: jax.Array) -> jax.Array:
    """``lambda_max(G) <= tau + ||E||`` for ``tau I - G = L L^T + E``; infinity where there is no
    factor L."""
    size = gram.shape[0]
    shifted = tau * jnp.eye(size) - gram
    zero = jnp.zeros((), jnp.float64)
    _, error = factor_with_error(shifted, jnp.zeros_like(gram), zero)
    return or_infinity((tau + error) * ROUND_UP)


def _explicit_gram(problem: Problem) -> tuple[Callable, jax.Array | None]:
    """A function ``(problem, matrix) -> G`` and the matrix without masks: under vmap one for the
    whole batch.

    A matrix of too many entries is None. Else it has the smaller side's coordinates as rows.
    """
    inwards = problem.like.size <= problem.out.size
    small, large = (problem.like, problem.out) if inwards else (problem.out, problem.like)
    identity = jnp.eye(small.size).reshape(small.size, *small.shape)

    def by_application(problem, _):
        forward, backward = problem.maps()
        gram = (lambda x: backward(forward(x))) if inwards else (lambda x: forward(backward(x)))
        return chunked(gram, identity, large.size).reshape(small.size, small.size)

    def by_product(problem, matrix):
        masks = (
            (problem.mask_in, problem.mask_out) if inwards else (problem.mask_out, problem.mask_in)
        )
        for mask, shape in zip(masks, ((-1, 1), (1, -1)), strict=True):
            if mask is not None:
                matrix = jnp.where(mask.reshape(shape), matrix, 0)
        return matrix @ matrix.T

    if small.size * large.size > EXPLICIT_ENTRIES:
        return by_application, None
    apply = problem.operator if inwards else problem.operator.transpose(problem.like)
    return by_product, chunked(apply, identity, large.size).reshape(small.size, large.size)


def gram_iteration(parts: _Parts, steps: jax.Array | int = STEPS) -> jax.Array:
    """Not below ``||M||_2`` of a square or tall matrix of any scale (Delattre et al., ICML 2023),
    `steps` <= STEPS.

    ``M_{t+1} = fl(M_t^H M_t)``, each rescaled by a power of two. Backwards, ``||M_t||^2 = ||M_t^H
    M_t|| <= ||M_{t+1}|| + 2 gamma ||M_t||_F^2``, and ``||M_T|| <= ||M_T||_F`` ends it. (Each part
    of an entry of the product errs by at most gamma times the product of two columns' norms: in the
    Frobenius norm sqrt(2) gamma ``||M_t||_F^2`` in all.)
    """
    rows, columns = parts[0].shape
    terms = len(parts) * max(rows, columns) + 16

    def square(t, carry):
        parts, frobenius, backs = carry
        scale, back = power_of_two(*parts)
        parts = tuple(part * scale for part in parts)
        return _gram(parts), frobenius.at[t].set(frobenius_up(*parts)), backs.at[t].set(back)

    carry = (parts, jnp.zeros(STEPS), jnp.ones(STEPS))
    first = 0
    if rows != columns:  # the only step that changes the shape, hence not in the loop
        carry = square(0, carry)
        first = 1
    parts, frobenius, backs = lax.fori_loop(first, steps, square, carry)
    scale, back = power_of_two(*parts)
    last = frobenius_up(*(part * scale for part in parts)) * back

    def root(t, bound):
        t = steps - 1 - t
        return (
            jnp.sqrt(bound + 2 * gamma(terms) * jnp.square(frobenius[t]) + TINY)
            * ROUND_UP
            * backs[t]
        )

    return lax.fori_loop(0, steps, root, last)


def _gram(parts: _Parts) -> _Parts:
    """``M^H M`` by real inner products of at most ``len(parts) * rows`` terms."""
    if len(parts) == 1:
        return (parts[0].T @ parts[0],)
    real, imaginary = parts
    stacked = jnp.concatenate([real, imaginary])
    turned = jnp.concatenate([imaginary, -real])
    product = stacked.T @ jnp.concatenate([stacked, turned], axis=1)
    return product[:, : real.shape[1]], product[:, real.shape[1] :]
