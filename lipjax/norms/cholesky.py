"""Factorisations that are not believed: what they leave over is computed and added to the bound."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lipjax.norms.scaled import ROUND_UP, frobenius_up
from lipjax.rounding import gamma

# Attempts: the largest eigenvalue is tried at its estimate times these. The estimate is a Ritz
# value, from below.
INFLATIONS = (1.002, 1.01, 1.04, 1.2)


def first_success(attempt: Callable[[jax.Array], jax.Array], estimate: jax.Array) -> jax.Array:
    """``attempt(tau)``, an upper bound or infinity, at growing tau until it is finite."""
    inflations = jnp.asarray(INFLATIONS)

    def body(carry):
        i, _ = carry
        return i + 1, attempt(estimate * inflations[i])

    def unfinished(carry):
        i, bound = carry
        return (i < len(INFLATIONS)) & ~jnp.isfinite(bound)

    return lax.while_loop(unfinished, body, (jnp.zeros((), int), jnp.asarray(jnp.inf)))[1]


def factor_with_error(
    block: jax.Array, update: jax.Array, update_size: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A factor L of ``block - update``, and a bound of ``||block - X X^T - L L^T||_F``.

    `update` is ``fl(X X^T)`` and `update_size` ``||X||_F^2``. The block's own entries count as
    rounded once (they are ``tau - g`` on the diagonal).
    """
    schur = block - update
    # Whatever the routine returns is checked: NaN where the matrix is not positive definite.
    factor = one_by_one(functools.partial(lax.linalg.cholesky, symmetrize_input=False))(schur)
    left_over = frobenius_up(schur - factor @ factor.T)
    sizes = (
        frobenius_up(block) + frobenius_up(schur) + jnp.square(frobenius_up(factor)) + update_size
    )
    return factor, (left_over + gamma(block.shape[0] + 16) * sizes) * ROUND_UP


def one_by_one(routine: Callable) -> Callable:
    """A routine of LAPACK that `vmap` calls for one matrix after the other on CPU.

    For a batch of them jaxlib 0.10 hands the matrices to the pool of threads that the program
    itself runs in, and waits: as many such calls at once as there are threads (two layers on two
    cores) wait for each other for ever. From 0.11 on it goes through a batch like this by itself.
    """
    if jax.default_backend() == "cpu":
        return jax.custom_batching.sequential_vmap(routine)
    return routine
