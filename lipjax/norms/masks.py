"""Masked linear maps, ``D_out W D_in``: what every norm here is of."""

import jax
import jax.numpy as jnp

from lipjax.graph.linear import LinearOperator, safe_norm


def masked(
    operator: LinearOperator, x: jax.Array, mask_in: jax.Array | None, mask_out: jax.Array | None
):
    """``D_out W D_in`` and its transpose as a pair of functions, for inputs like `x`. A mask of
    None keeps everything.

    Masks select with `where`: a NaN or infinity behind a mask cannot leak through as 0 * NaN.
    """
    transposed = operator.transpose(x)

    def forward(u: jax.Array) -> jax.Array:
        return keep(mask_out, operator(keep(mask_in, u)))

    def backward(v: jax.Array) -> jax.Array:
        return keep(mask_in, transposed(keep(mask_out, v)))

    return forward, backward


def keep(mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """x where the mask keeps it, else 0."""
    return x if mask is None else jnp.where(mask, x, 0)


def normalize(x: jax.Array) -> jax.Array:
    """``x / ||x||_2``, and 0 for 0."""
    norm = safe_norm(x)
    return x / jnp.where(norm == 0, 1.0, norm)
