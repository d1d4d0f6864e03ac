"""Closed forms: Schur's test and the Frobenius norm. Loose, at two products with ``abs(W)``."""

import math

import jax
import jax.numpy as jnp

from lipjax.graph.linear import LinearOperator
from lipjax.norms.scaled import Problem, or_infinity, problem_of
from lipjax.rounding import gamma


def schur_bound(
    operator: LinearOperator,
    like: jax.Array | jax.ShapeDtypeStruct,
    mask_in: jax.Array | None = None,
    mask_out: jax.Array | None = None,
) -> jax.Array:
    """``sqrt(largest row sum * largest column sum)`` of the masked ``|W|`` (Schur), and at most
    `frobenius_bound`.

    Args:
        operator: the map W, its kernel in float64.
        like: an array or a jax.ShapeDtypeStruct of the input's shape, float64.
        mask_in, mask_out: boolean, of the input's and the output's shape, or None for everything.

    Returns:
        A scalar that satisfies the guarantee of `lipjax.norms`.

    Raises:
        ValueError: not float64; a mask of another shape or type.
    """
    problem = problem_of(operator, like, mask_in, mask_out)
    return problem.bound(_schur(problem), _frobenius(problem))


def frobenius_bound(
    operator: LinearOperator,
    like: jax.Array | jax.ShapeDtypeStruct,
    mask_in: jax.Array | None = None,
    mask_out: jax.Array | None = None,
) -> jax.Array:
    """``||D_out W D_in||_F``; arguments, result and errors as of `schur_bound`."""
    problem = problem_of(operator, like, mask_in, mask_out)
    return problem.bound(_frobenius(problem))


def closed_form(problem: Problem) -> jax.Array:
    """The smaller of the two, at unit scale."""
    return jnp.minimum(or_infinity(_schur(problem)), or_infinity(_frobenius(problem)))


def _schur(problem: Problem) -> jax.Array:
    forward, backward = problem.with_kernel(jnp.abs(problem.operator.kernel)).maps()
    rows = forward(jnp.ones(problem.like.shape))
    columns = backward(jnp.ones(problem.out.shape))
    root = jnp.sqrt(jnp.max(rows) + 2.0**-960) * jnp.sqrt(jnp.max(columns) + 2.0**-960)
    return root * (1 + gamma(problem.terms + 16))


def _frobenius(problem: Problem) -> jax.Array:
    forward, _ = problem.with_kernel(jnp.square(problem.operator.kernel)).maps()
    rows = forward(jnp.ones(problem.like.shape))
    underflow = math.sqrt(problem.like.size * problem.out.size) * 2.0**-510
    return jnp.sqrt(jnp.sum(rows)) * (1 + gamma(problem.terms + 16)) + underflow
