"""The norm of a masked linear map, ``||D_out W D_in||_2``: an estimate to train with, and an upper
bound to certify with.

Both work on one example and need only the map and its transpose; `vmap` makes the batch. The two
are different
functions with different names: no flag turns an estimate into a certificate.
"""

import math

import jax
import jax.numpy as jnp

from lipjax.graph.linear import LinearOperator, safe_norm
from lipjax.rounding import gamma, terms_of, transposed_terms_of

# Share of a fresh random direction in every warm start. Without it a vector that was masked to
# zero, or has no weight on coordinates that open later, stays there for ever and the norm is
# estimated far too small. Its price is small: after two iterations its weight on lesser directions
# has shrunk by (sigma_i / sigma_1)^4.
FRESH_SHARE = 0.1

# Gaussian start vectors of one probabilistic bound. One would do in exact arithmetic; see its text.
STARTS = 4


def masked(
    operator: LinearOperator, x: jax.Array, mask_in: jax.Array | None, mask_out: jax.Array | None
):
    """``D_out W D_in`` and its transpose as a pair of functions, for inputs like `x`. A mask of
    None keeps everything.

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
            keep (in
            particular: everything is masked) the estimate is 0.
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
        low, high = masked(frozen, start.astype(products), mask_in, mask_out), start.dtype
        # Vectors are scaled in their own type: only the products are short.
        forward, backward = (lambda v, f=f: f(v.astype(products)).astype(high) for f in low)
    else:
        forward, backward = masked(frozen, start, mask_in, mask_out)

    def step(_, u):
        # twice: the square of a small norm would underflow
        return normalize(backward(normalize(forward(u))))

    u = normalize(_keep(mask_in, jax.lax.stop_gradient(start)))
    if iterations == 0:
        image = _keep(mask_out, operator(u))
        return jnp.sum(normalize(jax.lax.stop_gradient(image)) * image), u
    if iterations <= 5:  # unrolled: one call less deep, and XLA may fuse across them
        for i in range(iterations - 1):
            u = step(i, u)
    else:
        u = jax.lax.fori_loop(0, iterations - 1, step, u)
    # The last half of the last product is the estimate: <u, W^T v> is <v, W u>, and no further
    # product is needed.
    v = normalize(forward(u))
    image = _keep(mask_in, operator.transpose(start)(jax.lax.stop_gradient(v)))
    u = normalize(jax.lax.stop_gradient(image))
    return jnp.sum(u * image), u


def refresh(vector: jax.Array, key: jax.Array) -> jax.Array:
    """A warm start: the stored vector, scaled to 1, plus a fresh random direction of length
    `FRESH_SHARE`."""
    fresh = normalize(jax.random.normal(key, vector.shape, vector.dtype))
    return normalize(vector) + FRESH_SHARE * fresh


def chebyshev_steps(size: int, failure_probability: float, inflation: float) -> int:
    """Steps that `probabilistic_norm_bound` needs for a relative `inflation` of the norm when its
    scale is right.

    Args:
        size: number of inputs of the map.
        failure_probability: of this one bound.
        inflation: of the norm, e.g. 0.01.

    Raises:
        ValueError: failure_probability outside (0, 1), inflation <= 0.
    """
    if not inflation > 0:
        raise ValueError(f"inflation must be positive, got {inflation}.")
    excess = (1 + inflation) ** 2 - 1  # on the eigenvalue
    # about the norm of the start block, which the recurrence does not enlarge
    observed = math.sqrt(STARTS * size)
    log_ratio = math.log(4 * observed / smallest_start(failure_probability))
    return max(4, math.ceil(log_ratio / math.acosh(1 + 2 * excess)))


def smallest_start(failure_probability: float) -> float:
    """The t for which `STARTS` standard normal numbers have l2 norm below t with probability <=
    failure_probability.

    The density of chi-squared with m degrees of freedom is at most ``x^(m/2 - 1) / (2^(m/2)
    Gamma(m/2))``, so ``P(chi_m < t) <= t^m / (2^(m/2) Gamma(m/2 + 1))``.
    """
    if not 0 < failure_probability < 1:
        raise ValueError(f"failure_probability must lie in (0, 1), got {failure_probability}.")
    return (failure_probability * 2 ** (STARTS / 2) * math.gamma(STARTS / 2 + 1)) ** (1 / STARTS)


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
    """An upper bound of ``||D_out W D_in||_2`` that fails with probability <=
    `failure_probability`.

    **Guarantee.** Let ``A = (D_out W D_in)^T (D_out W D_in)`` on the kept inputs, lambda its
    largest eigenvalue with unit eigenvector v, ``tau = scale^2``, ``B = 2 A / tau - I``, and G a
    block of m = `STARTS` standard normal columns drawn from `key`. The m entries of ``v^T G`` are
    standard normal: their norm is below ``t = smallest_start`` with probability at most
        `failure_probability`. Otherwise, if ``lambda = (1 + s) tau`` with s > 0,

        ||T_k(B) G||_F >= T_k(1 + 2 s) t        for the Chebyshev polynomial T_k,

    so the norm that is observed bounds s. This holds for *every* scale, even one that depends on G:
    a bad scale makes the bound loose, never wrong. It depends on neither W nor the masks nor the
    input, as long as `key` is fresh, i.e. was not used in choosing them. (Kuczynski and
    Wozniakowski 1992 analyse such random starts.)

    **Rounding.** Let ``e_j`` be the Frobenius norm of the error made in computing the j-th block.
    In the recurrence it grows like ``U_{k-j}(1+2s) <= (k-j+1) T_k(1+2s) / T_j(1+2s)``, hence

        t <= ||computed block k||_F / T_k(1 + 2s) + sum_j (k - j + 1) e_j / T_j(1 + 2s).

    Both terms fall with s. The s that is returned makes the first at most t/2 and is used only if
    it makes the second at most t/2 too (else the bound is infinite). The e_j follow from the model
    of `lipjax.rounding`. With one start t would be of the size of `failure_probability`, and drown
    in e_j; with four it is its fourth root.

    Args:
        operator: the map W; float64.
        key: fresh randomness, for this bound alone.
        scale: a guess of the norm, best a few per mille above it (see `chebyshev_steps` for the
            tightness then).
        steps: degree k of the polynomial, fixed in advance, >= 1.
        failure_probability: in (0, 1).
        like: an array of the input's shape and type.
        mask_in, mask_out: boolean, of the input's and the output's shape, or None for everything.

    Returns:
        A scalar. Exactly 0 when a mask keeps nothing; NaN or infinity when the arithmetic broke
        down.
    """
    least = smallest_start(failure_probability)
    forward, backward = masked(operator, like, mask_in, mask_out)
    dtype = like.dtype
    unit = float(jnp.finfo(dtype).eps) / 2
    image = jax.eval_shape(operator, like)
    # A scale that is zero, negative or NaN is only a bad guess; any positive one is sound.
    scale = jnp.where(scale > 0, scale, 1.0).astype(dtype)

    # The norm of D_out |W| D_in by Schur's test: an inner product errs by gamma times its terms'
    # sizes.
    absolute = jax.linear_transpose(operator.absolute, jax.ShapeDtypeStruct(like.shape, dtype))
    rows = _keep(mask_out, operator.absolute(_keep(mask_in, jnp.ones(like.shape, dtype))))
    columns = _keep(mask_in, absolute(_keep(mask_out, jnp.ones(image.shape, dtype)))[0])
    # Two roots, as their product might underflow.
    size = jnp.sqrt(jnp.max(rows)) * jnp.sqrt(jnp.max(columns)) / scale
    relative = gamma(terms_of(operator, like) + 4, unit) + gamma(
        transposed_terms_of(operator, like) + 4, unit
    )
    error_of_gram = 2 * relative * jnp.square(size)  # times ||u||

    def gram(u: jax.Array) -> jax.Array:
        # without squaring the scale
        return jax.vmap(lambda column: backward(forward(column / scale) / scale))(u)

    def frobenius(u: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.square(u)))

    def error_of(current, previous):
        sizes = (1 + jnp.square(size)) * frobenius(current) + frobenius(previous)
        return 2 * (4 * error_of_gram * frobenius(current) + 16 * unit * sizes)

    def step(carry, _):
        previous, current, log_scale = carry
        following = 2 * (2 * gram(current) - current) - previous
        log_error = jnp.log(error_of(current, previous)) + log_scale
        # Rescaled at every step, so that a scale far too small ends in a loose bound and not in an
        # overflow.
        largest = jnp.maximum(jnp.max(jnp.abs(following)), jnp.asarray(1, dtype))
        return (current / largest, following / largest, log_scale + jnp.log(largest)), log_error

    start = jax.random.normal(key, (STARTS, *like.shape), dtype)
    start = _keep(mask_in, start)
    first = 2 * gram(start) - start
    (_, last, log_scale), log_errors = jax.lax.scan(
        step, (start, first, jnp.zeros((), dtype)), length=steps - 1
    )
    log_errors = jnp.concatenate([jnp.log(error_of(start, start))[None], log_errors])

    # arccosh(R) <= log(2 R): the larger value gives the larger, hence sound, bound. R <= 1 proves
    # lambda <= tau. The logarithms' own rounding is far below what is added for it here.
    log_ratio = jnp.log(frobenius(last)) + log_scale - math.log(least / 2) + 1e-9
    angle = jnp.maximum(log_ratio + math.log(2), 0) / steps
    angle = jnp.where(jnp.isnan(log_ratio), jnp.nan, angle)
    index = jnp.arange(1, steps + 1)
    # T_j(cosh angle) = cosh(j angle) >= max(1, exp(j angle) / 2)
    grown = log_errors - jnp.maximum(index * angle - math.log(2), 0)
    accumulated = jnp.sum((steps - index + 1) * jnp.exp(grown + 1e-9))
    bound = scale * jnp.sqrt((1 + jnp.cosh(angle)) / 2) * (1 + 1e-12)
    bound = jnp.where(
        accumulated <= least / 2, bound, jnp.where(jnp.isnan(accumulated), jnp.nan, jnp.inf)
    )
    nothing = jnp.zeros((), bool)
    if mask_in is not None:
        nothing |= ~jnp.any(mask_in)
    if mask_out is not None:
        nothing |= ~jnp.any(mask_out)
    return jnp.where(nothing, 0.0, bound)
