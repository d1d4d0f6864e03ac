"""Power iteration: an **estimate** of ``||D_out W D_in||_2`` from below, to train with.

It works on one example and needs only the map and its transpose; `vmap` makes the batch.
"""

import jax
import jax.numpy as jnp

from lipjax.graph.linear import LinearOperator
from lipjax.norms.masks import keep, masked, normalize

# Share of a fresh random direction in every warm start. Without it a vector that was masked to
# zero, or has no weight on coordinates that open later, stays there for ever and the norm is
# estimated far too small. Its price is small: after two iterations its weight on lesser directions
# has shrunk by (sigma_i / sigma_1)^4.
FRESH_SHARE = 0.1


def power_iteration(
    operator: LinearOperator,
    start: jax.Array,
    iterations: int,
    mask_in: jax.Array | None = None,
    mask_out: jax.Array | None = None,
    products: str = "float32",
) -> tuple[jax.Array, jax.Array]:
    """Estimates ``||D_out W D_in||_2`` from below, with the gradient of the norm at the last
    vectors.

    **An estimate, never a certificate**: it is at most the norm, whatever the start, and may be far
    below it.

    Nothing is differentiated through the iteration. With the unit vectors u, v held fixed, ``sigma
    = <u, W^T v>`` has the gradient ``v u^T``, which is that of the norm at convergence. For n
    iterations W is applied n times and W^T n times.

    Args:
        operator: the map W.
        start: first vector, of the input's shape; any scale. Where it is zero on all that the masks
            keep (in particular: everything is masked) the estimate is 0.
        iterations: products with ``W^T W``; 0 gives ``||W u||`` of the start itself.
        mask_in, mask_out: boolean, of the input's and the output's shape, or None for everything.
        products: "bfloat16": the products of the iteration, but for the half one that estimate and
            gradient come from, are in that type, which some devices multiply faster. Still at most
            the norm, up to rounding of that half product. Else all are in the types of `operator`
            and `start`.

    Returns:
        The estimate, a scalar, and the last unit vector, of the input's shape (zero if the estimate
        met a zero).
    """
    frozen = jax.lax.stop_gradient(operator)
    if products == "bfloat16":
        frozen = jax.tree.map(lambda a: a.astype(products), frozen)
        low = masked(frozen, start.astype(products), mask_in, mask_out)
        high = start.dtype
        # Vectors are scaled in their own type: only the products are short.
        forward, backward = (lambda v, f=f: f(v.astype(products)).astype(high) for f in low)
    else:
        forward, backward = masked(frozen, start, mask_in, mask_out)

    def step(_, u):
        # twice: the square of a small norm would underflow
        return normalize(backward(normalize(forward(u))))

    u = normalize(keep(mask_in, jax.lax.stop_gradient(start)))
    if iterations == 0:
        image = keep(mask_out, operator(u))
        return jnp.sum(normalize(jax.lax.stop_gradient(image)) * image), u
    if iterations <= 5:  # unrolled: one call less deep, and XLA may fuse across them
        for i in range(iterations - 1):
            u = step(i, u)
    else:
        u = jax.lax.fori_loop(0, iterations - 1, step, u)
    # The last half of the last product is the estimate: <u, W^T v> is <v, W u>, and no further
    # product is needed.
    v = normalize(forward(u))
    image = keep(mask_in, operator.transpose(start)(jax.lax.stop_gradient(v)))
    u = normalize(jax.lax.stop_gradient(image))
    return jnp.sum(u * image), u


def refresh(vector: jax.Array, key: jax.Array) -> jax.Array:
    """A warm start: the stored vector, scaled to 1, plus a fresh random direction of length
    `FRESH_SHARE`."""
    fresh = normalize(jax.random.normal(key, vector.shape, vector.dtype))
    return normalize(vector) + FRESH_SHARE * fresh
