"""The norm of a masked linear map, ``||D_out W D_in||_2``: an estimate to train with, and an upper bound to certify with.

Both work on one example and need only the map and its transpose; `vmap` makes the batch. The two are different
functions with different names: no flag turns an estimate into a certificate.
"""

import math

import jax
import jax.numpy as jnp

from lipjax.operators import LinearOperator, safe_norm

# Share of a fresh random direction in every warm start. Without it a vector that was masked to zero, or has no weight
# on coordinates that open later, stays there for ever and the norm is estimated far too small. Its price is small: after
# two iterations its weight on lesser directions has shrunk by (sigma_i / sigma_1)^4.
FRESH_SHARE = 0.1


def masked(operator: LinearOperator, x: jax.Array, mask_in: jax.Array | None, mask_out: jax.Array | None):
    """``D_out W D_in`` and its transpose as a pair of functions, for inputs like `x`. A mask of None keeps everything.

    Masks select with `where`: a NaN or infinity behind a mask cannot leak through as 0 * NaN.
    """
    transposed = operator.transpose(x)

    def forward(u: jax.Array) -> jax.Array:
        return _keep(mask_out, operator(_keep(mask_in, u)))

    def backward(v: jax.Array) -> jax.Array:
        return _keep(mask_in, transposed(_keep(mask_out, v)))

    return forward, backward


def _keep(mask: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if mask is None else jnp.where(mask, x, 0)


def normalize(x: jax.Array) -> jax.Array:
    """``x / ||x||_2``, and 0 for 0."""
    norm = safe_norm(x)
    return x / jnp.where(norm == 0, 1.0, norm)


def power_iteration(
    operator: LinearOperator,
    start: jax.Array,
    iterations: int,
    mask_in: jax.Array | None = None,
    mask_out: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Estimates ``||D_out W D_in||_2`` from below, with the gradient of the norm at the last vectors.

    **An estimate, never a certificate**: it is at most the norm, whatever the start, and may be far below it.

    Nothing is differentiated through the iteration. With the unit vectors u, v held fixed, ``sigma = <v, W u>`` has the
    gradient ``v u^T``, which is that of the norm at convergence.

    Args:
        operator: the map W.
        start: first vector, of the input's shape; any scale. Where it is zero on all that the masks keep (in
            particular: everything is masked) the estimate is 0.
        iterations: products with ``W^T W``; 0 gives ``||W u||`` of the start itself.
        mask_in, mask_out: boolean, of the input's and the output's shape, or None for everything.

    Returns:
        The estimate, a scalar, and the last unit vector, of the input's shape (zero if the estimate met a zero).
    """
    frozen = jax.lax.stop_gradient(operator)
    forward, backward = masked(frozen, start, mask_in, mask_out)

    def step(_, u):
        return normalize(backward(normalize(forward(u))))

    u = normalize(_keep(mask_in, jax.lax.stop_gradient(start)))
    if iterations <= 5:  # unrolled: XLA's CPU backend runs convolutions inside a while loop slowly
        for i in range(iterations):
            u = step(i, u)
    else:
        u = jax.lax.fori_loop(0, iterations, step, u)
    u = jax.lax.stop_gradient(u)
    image = _keep(mask_out, operator(u))
    v = normalize(jax.lax.stop_gradient(image))
    return jnp.sum(v * image), u


def refresh(vector: jax.Array, key: jax.Array) -> jax.Array:
    """A warm start: the stored vector, scaled to 1, plus a fresh random direction of length `FRESH_SHARE`."""
    fresh = normalize(jax.random.normal(key, vector.shape, vector.dtype))
    return normalize(vector) + FRESH_SHARE * fresh


def chebyshev_steps(size: int, failure_probability: float, inflation: float) -> int:
    """Steps that `probabilistic_norm_bound` needs for a relative `inflation` of the norm when its scale is right.

    Args:
        size: number of inputs of the map.
        failure_probability: of this one bound.
        inflation: of the norm, e.g. 0.01.
    """
    excess = (1 + inflation) ** 2 - 1  # on the eigenvalue
    log_ratio = math.log(2 * math.sqrt(size) / failure_probability)
    return max(4, math.ceil(log_ratio / math.acosh(1 + 2 * excess)))


def probabilistic_norm_bound(
    operator: LinearOperator,
    key: jax.Array,
    scale: jax.Array,
    steps: int,
    failure_probability: float,
    like: jax.Array,
    mask_in: jax.Array | None = None,
    mask_out: jax.Array | None = None,
) -> jax.Array:
    """An upper bound of ``||D_out W D_in||_2`` that fails with probability <= `failure_probability`.

    **Guarantee.** Let ``A = (D_out W D_in)^T (D_out W D_in)`` on the m kept inputs, `lambda` its largest eigenvalue, g
    the standard normal start drawn from `key`, and ``tau = scale^2``. The component of g along a top eigenvector is a
    standard normal, smaller in size than ``t = failure_probability * sqrt(pi / 2)`` with probability at most
    `failure_probability`. Otherwise, if ``lambda = (1 + s) tau`` with s > 0, then ``||T_k(2 A / tau - I) g|| >=
    t * T_k(1 + 2 s)`` for the Chebyshev polynomial T_k; so the norm that is observed bounds s. This holds for *every*
    scale, even one that depends on g: a bad scale makes the bound loose, never wrong. It does not depend on W, the
    masks or the input, as long as `key` is fresh, i.e. was not used in choosing them. (Kuczynski and Wozniakowski 1992
    analyse such random starts.)

    The statement is about exact arithmetic; rounding of the recurrence itself is not part of it.

    Args:
        operator: the map W.
        key: fresh randomness, for this bound alone.
        scale: a guess of the norm, best a few per mille above it (see `chebyshev_steps` for the tightness then).
        steps: degree k of the polynomial, fixed in advance.
        failure_probability: in (0, 1).
        like: an array of the input's shape and type.
        mask_in, mask_out: boolean, of the input's and the output's shape, or None for everything.

    Returns:
        A scalar. Exactly 0 when a mask keeps nothing; NaN or infinity when the arithmetic broke down.
    """
    if not 0 < failure_probability < 1:
        raise ValueError(f"failure_probability must lie in (0, 1), got {failure_probability}.")
    forward, backward = masked(operator, like, mask_in, mask_out)
    dtype = like.dtype
    # A scale that is zero, negative or NaN is only a bad guess; any positive one is sound.
    scale = jnp.where(scale > 0, scale, 1.0).astype(dtype)

    def gram(u: jax.Array) -> jax.Array:
        return backward(forward(u / scale) / scale)  # A / tau without squaring a tiny or a huge scale

    def step(_, carry):
        previous, current, log_scale = carry
        following = 2 * (2 * gram(current) - current) - previous
        # Rescaled at every step, so that a scale far too small ends in a loose bound and not in an overflow.
        size = jnp.maximum(jnp.max(jnp.abs(following)), jnp.asarray(1, dtype))
        return current / size, following / size, log_scale + jnp.log(size)

    start = _keep(mask_in, jax.random.normal(key, like.shape, dtype))
    first = 2 * gram(start) - start
    _, last, log_scale = jax.lax.fori_loop(1, steps, step, (start, first, jnp.zeros((), dtype)))
    threshold = failure_probability * math.sqrt(math.pi / 2)
    # arccosh(R) <= log(2 R): the larger value gives the larger, hence sound, bound. R <= 1 proves lambda <= tau.
    log_ratio = jnp.log(2 * jnp.linalg.norm(last.reshape(-1))) + log_scale - math.log(threshold)
    excess = (jnp.cosh(jnp.maximum(log_ratio, 0) / steps) - 1) / 2
    excess = jnp.where(jnp.isnan(log_ratio), jnp.nan, excess)
    bound = scale * jnp.sqrt(1 + excess)
    nothing = jnp.zeros((), bool)
    if mask_in is not None:
        nothing |= ~jnp.any(mask_in)
    if mask_out is not None:
        nothing |= ~jnp.any(mask_out)
    return jnp.where(nothing, 0.0, bound)
