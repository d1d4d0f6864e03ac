"""An upper bound of ``||D_out W D_in||_2`` that fails with a probability that is chosen.

A Chebyshev recurrence on Gaussian start vectors: the norm of tier "probabilistic".
"""

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lipjax.graph.linear import LinearOperator
from lipjax.norms.lanczos import norm_estimate
from lipjax.norms.masks import keep, masked
from lipjax.rounding import gamma, terms_of, transposed_terms_of

# Gaussian start vectors of one probabilistic bound. One would do in exact arithmetic; see its text.
STARTS = 4
# Inflation of each norm that `inflated_norm_bound` aims at, and the part of it by which the scale
# is raised.
INFLATION = 0.01
SCALE_SLACK = 0.002


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

    Raises:
        ValueError: failure_probability not in (0, 1).
    """
    if not 0 < failure_probability < 1:
        raise ValueError(f"failure_probability must lie in (0, 1), got {failure_probability}.")
    return (failure_probability * 2 ** (STARTS / 2) * math.gamma(STARTS / 2 + 1)) ** (1 / STARTS)


def starts(key: jax.Array, sizes: Sequence[int], dtype=jnp.float64) -> list[jax.Array]:
    """Fresh start blocks ``(STARTS, size)`` of several bounds, standard normal.

    Drawn at once and in a loop: the generator is more code than a bound, and would be compiled for
    each block, fused into what uses it.
    """
    keys = jax.random.split(key, STARTS)
    drawn = jax.lax.map(lambda each: jax.random.normal(each, (sum(sizes),), dtype), keys)
    ends = list(itertools.accumulate(sizes))
    return jnp.split(drawn, ends[:-1], axis=1)


def probabilistic_norm_bound(
    operator: LinearOperator,
    start: jax.Array,
    scale: jax.Array,
    steps: int,
    failure_probability: float,
    like: jax.Array,
    mask_in: jax.Array | None = None,
    mask_out: jax.Array | None = None,
) -> jax.Array:
    """Bounds ``||D_out W D_in||_2`` from above; fails with probability <= `failure_probability`.

    **Guarantee.** Let ``A = (D_out W D_in)^T (D_out W D_in)`` on the kept inputs, lambda its
    largest eigenvalue with unit eigenvector v, ``tau = scale^2``, ``B = 2 A / tau - I``, and G a
    block of m = `STARTS` standard normal columns, `start`. The m entries of ``v^T G`` are
    standard normal: their norm is below ``t = smallest_start`` with probability at most
    `failure_probability`. Otherwise, if ``lambda = (1 + s) tau`` with s > 0,

        ||T_k(B) G||_F >= T_k(1 + 2 s) t        for the Chebyshev polynomial T_k,

    so the norm that is observed bounds s. This holds for *every* scale, even one that depends on G:
    a bad scale makes the bound loose, never wrong. It depends on neither W nor the masks nor the
    input, as long as `start` is fresh, i.e. was not used in choosing them. (Kuczynski and
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
        start: a block of `starts`, for this bound alone.
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
    dtype = like.dtype
    unit = float(jnp.finfo(dtype).eps) / 2
    # A scale that is zero, negative or NaN is only a bad guess; any positive one is sound.
    scale = jnp.where(scale > 0, scale, 1.0).astype(dtype)
    forward, backward = masked(operator, like, mask_in, mask_out)
    size = _schur_size(operator, like, mask_in, mask_out) / scale
    terms = terms_of(operator, like)
    transposed_terms = transposed_terms_of(operator, like)
    relative = gamma(terms + 4, unit) + gamma(transposed_terms + 4, unit)
    error_of_gram = 2 * relative * jnp.square(size)  # times ||u||

    def gram(u: jax.Array) -> jax.Array:
        # without squaring the scale
        return jax.vmap(lambda column: backward(forward(column / scale) / scale))(u)

    def error_of(current, previous):
        sizes = (1 + jnp.square(size)) * _frobenius(current) + _frobenius(previous)
        return 2 * (4 * error_of_gram * _frobenius(current) + 16 * unit * sizes)

    start = keep(mask_in, start.astype(dtype).reshape(STARTS, *like.shape))
    log_norm, log_errors = _recurrence(gram, error_of, start, steps)
    least = smallest_start(failure_probability)
    bound = scale * _largest_growth(log_norm, log_errors, steps, least) * (1 + 1e-12)
    nothing = jnp.zeros((), bool)
    for mask in (mask_in, mask_out):
        if mask is not None:
            nothing |= ~jnp.any(mask)
    return jnp.where(nothing, 0.0, bound)


def _schur_size(operator: LinearOperator, like: jax.Array, mask_in, mask_out) -> jax.Array:
    """The norm of ``D_out |W| D_in`` by Schur's test.

    An inner product errs by gamma times its terms' sizes.
    """
    image = jax.eval_shape(operator, like)
    absolute = jax.linear_transpose(operator.absolute, jax.ShapeDtypeStruct(like.shape, like.dtype))
    rows = keep(mask_out, operator.absolute(keep(mask_in, jnp.ones(like.shape, like.dtype))))
    columns = keep(mask_in, absolute(keep(mask_out, jnp.ones(image.shape, like.dtype)))[0])
    # Two roots, as their product might underflow.
    return jnp.sqrt(jnp.max(rows)) * jnp.sqrt(jnp.max(columns))


def _frobenius(u: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(u)))


def _recurrence(
    gram: Callable, error_of: Callable, start: jax.Array, steps: int
) -> tuple[jax.Array, jax.Array]:
    """``T_k(B) G`` for k = `steps`: the logarithms of its norm, and of the errors of the blocks."""
    dtype = start.dtype

    def step(carry, _):
        previous, current, log_scale = carry
        following = 2 * (2 * gram(current) - current) - previous
        log_error = jnp.log(error_of(current, previous)) + log_scale
        # Rescaled at every step, so that a scale far too small ends in a loose bound and not in an
        # overflow.
        largest = jnp.maximum(jnp.max(jnp.abs(following)), jnp.asarray(1, dtype))
        return (current / largest, following / largest, log_scale + jnp.log(largest)), log_error

    first = 2 * gram(start) - start
    carry = (start, first, jnp.zeros((), dtype))
    (_, last, log_scale), log_errors = jax.lax.scan(step, carry, length=steps - 1)
    log_errors = jnp.concatenate([jnp.log(error_of(start, start))[None], log_errors])
    return jnp.log(_frobenius(last)) + log_scale, log_errors


def _largest_growth(
    log_norm: jax.Array, log_errors: jax.Array, steps: int, least: float
) -> jax.Array:
    """``sqrt(1 + s)`` for the largest s that the observed norm allows; infinity if errors hide it.

    Args:
        log_norm: of the last block.
        log_errors: ``(steps,)``, of the norms of the errors.
        steps: degree of the polynomial.
        least: t, as `smallest_start` gives it.
    """
    # arccosh(R) <= log(2 R): the larger value gives the larger, hence sound, bound. R <= 1 proves
    # lambda <= tau. The logarithms' own rounding is far below what is added for it here.
    log_ratio = log_norm - math.log(least / 2) + 1e-9
    angle = jnp.maximum(log_ratio + math.log(2), 0) / steps
    angle = jnp.where(jnp.isnan(log_ratio), jnp.nan, angle)
    index = jnp.arange(1, steps + 1)
    # T_j(cosh angle) = cosh(j angle) >= max(1, exp(j angle) / 2)
    grown = log_errors - jnp.maximum(index * angle - math.log(2), 0)
    accumulated = jnp.sum((steps - index + 1) * jnp.exp(grown + 1e-9))
    growth = jnp.sqrt((1 + jnp.cosh(angle)) / 2)
    hidden = jnp.where(jnp.isnan(accumulated), jnp.nan, jnp.inf)
    return jnp.where(accumulated <= least / 2, growth, hidden)


def inflated_norm_bound(
    operator: LinearOperator,
    start: jax.Array,
    failure_probability: float,
    like: jax.Array,
    mask_in: jax.Array | None = None,
    mask_out: jax.Array | None = None,
) -> jax.Array:
    """`probabilistic_norm_bound`, its scale and steps chosen for `INFLATION`: the tier's norm."""
    # The polynomial grows fast above its scale: that is taken a little above the estimate, which is
    # from below.
    scale = (1 + SCALE_SLACK) * norm_estimate(operator, like, mask_in, mask_out)
    steps = chebyshev_steps(like.size, failure_probability, INFLATION - SCALE_SLACK)
    return probabilistic_norm_bound(
        operator, start, scale, steps, failure_probability, like, mask_in, mask_out
    )
