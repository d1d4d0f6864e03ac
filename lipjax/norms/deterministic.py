"""Upper bounds of masked norms, ``||D_out W D_in||_2``, without chance and including the rounding
of their computation.

**Guarantee of every function here.** The value returned is at least the exact norm of the matrix
with the given float64 entries, whatever the guess of the norm, the masks and the entries; where the
arithmetic breaks down (NaN, overflow) it is infinity. Exactly 0 is returned where a mask keeps
nothing, and only there.

Assumed: IEEE float64 with unit roundoff u = 2^-53 (underflow may flush to zero), and products of
matrices and convolutions that are inner products, summed in any order, with or without fused
multiply-adds (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed. 2002, section 3.1):
n terms err by at most ``gamma(n) sum |a_i b_i|``. No Strassen, Winograd or Fourier products.
*Nothing* is assumed of Cholesky factorisations and triangular solves: their results are multiplied
out and what is left over is added to the bound.

The ways to a bound, and what one costs (k: the smaller side of the matrix, N: the larger):

| bound | what it knows | cost |
|---|---|---|
| `schur_bound`, `frobenius_bound` | closed forms in ``abs(W)``; loose | 2 products with W |
| `convolution_norm_bound` | unmasked, once per network | 8 STEPS C^3 flops per frequency |
| `dense_norm_bound` | masked, within a per mille or two | 2 k^2 N + 7/3 k^3 flops per attempt |
| `masked_convolution_norm_bound` | masked, within a per mille or two | `masked_convolution_cost` |

All work on one example and go through `jit` and `vmap`. Where one example fills the device, `vmap`
takes one after the other (as `jax.lax.map` does), so that memory is that of one example and no
example waits for another's attempts.

Internally the entries are scaled by a power of two so that the largest of the kernel's is about 1.
This is exact, and
makes what underflows negligible: it is covered by absolute terms of at most 2^-500 relative to that
entry.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lipjax.graph.linear import Convolution, LinearOperator
from lipjax.norms import power
from lipjax.rounding import DOUBLE, gamma

# Largest side of an explicit Gram matrix in `norm_bound`: 4096^2 float64 numbers are 134 MB.
DENSE_LIMIT = 4096
# Flops for one example and layer that `norm_bound` spends by default: about a second on a laptop's
# two cores.
BUDGET = 2e10
# Squarings of Gram iteration: its bound is within a factor k^(2^-(STEPS+1)) of the norm, 1.003 for
# k = 512.
STEPS = 10
# Attempts: the largest eigenvalue is tried at its estimate times these. The estimate is a Ritz
# value, from below.
INFLATIONS = (1.002, 1.01, 1.04, 1.2)
# Lanczos steps of that estimate.
RITZ_STEPS = 60
# Explicit matrices up to this many entries; beyond, the Gram matrix is formed by applying the map,
# in chunks.
EXPLICIT_ENTRIES = 2**25
# Matrices up to this many entries are taken by vmap all at once, larger ones one after the other.
VECTORISED_ENTRIES = 2**16
# Entries of one intermediate result of a chunk. On a CPU it must fit the cache: measured, 2.5 times
# as fast as 2^23.
CPU_CHUNK_ENTRIES, CHUNK_ENTRIES = 2**16, 2**23
# Few kept coordinates are gathered into smaller blocks, of these shares of the block, where they
# fit.
SHARES = (0.3, 0.6, 1.0)

_ROUND_UP = 1 + 16 * DOUBLE  # covers a handful of operations on a bound itself
_TINY = 2.0**-500  # covers underflow in a bound of an eigenvalue, at unit scale


# -------------------------------------------------------------------------------------- the problem


class _Problem(NamedTuple):
    """A masked map at unit scale, and the way back."""

    operator: LinearOperator
    like: jax.ShapeDtypeStruct
    out: jax.ShapeDtypeStruct
    mask_in: jax.Array | None
    mask_out: jax.Array | None
    scale: jax.Array  # power of two: operator = scale * the one given
    back: jax.Array  # 1 / scale

    @property
    def terms(self) -> int:
        """No inner product of a forward or backward pass, nor a sum over a side, has more terms."""
        return self.like.size + self.out.size

    def with_kernel(self, kernel: jax.Array) -> "_Problem":
        """The same with another kernel at unit scale."""
        return self._replace(operator=dataclasses.replace(self.operator, kernel=kernel))

    def maps(self) -> tuple[Callable, Callable]:
        """``D_out W D_in`` and its transpose."""
        return power.masked(self.operator, jnp.zeros(self.like.shape), self.mask_in, self.mask_out)

    def square(self, guess) -> jax.Array:
        """Square of a guess of the norm, at unit scale; 0 for one that is missing or is no
        number."""
        guess = jnp.asarray(0.0 if guess is None else guess, jnp.float64) * self.scale
        return jnp.where((guess > 0) & (guess < 1e150), jnp.square(guess), 0.0)

    def bound(self, *values: jax.Array, known: jax.Array | float = math.inf) -> jax.Array:
        """The smallest of these bounds, `values` at unit scale and `known` not; see the module's
        guarantee."""
        usable = jnp.all(jnp.isfinite(self.operator.kernel))
        smallest = (
            functools.reduce(jnp.minimum, [_or_infinity(value) for value in values]) * self.back
        )
        # A norm below the normal range may have been flushed to zero on the way.
        floor = 2.0**-1022 * 2 ** math.ceil(math.log2(self.like.size * self.out.size) / 2)
        smallest = jnp.minimum(
            jnp.maximum(smallest, floor), _or_infinity(jnp.asarray(known, jnp.float64))
        )
        bound = jnp.where(usable, smallest, jnp.inf)
        nothing = jnp.zeros((), bool)
        for mask in (self.mask_in, self.mask_out):
            if mask is not None:
                nothing |= ~jnp.any(mask)
        return jnp.where(nothing, 0.0, bound)


def _problem(operator, like, mask_in, mask_out) -> _Problem:
    like = jax.ShapeDtypeStruct(like.shape, like.dtype)
    for name, dtype in (("kernel", operator.kernel.dtype), ("input", like.dtype)):
        if dtype != jnp.float64:
            raise ValueError(
                f"deterministic bounds are computed in float64, got a {name} of {dtype}: enable "
                "x64 and cast to float64 "
                "(the cast of a float32 kernel is exact)."
            )
    out = jax.eval_shape(operator, like)
    for name, mask, shape in (("mask_in", mask_in, like.shape), ("mask_out", mask_out, out.shape)):
        if mask is not None and (mask.shape != shape or mask.dtype != jnp.bool_):
            raise ValueError(
                f"{name} must be boolean of shape {shape}, got {mask.dtype} of shape {mask.shape}."
            )
    scale, back = _power_of_two(operator.kernel)
    unit = LinearOperator(operator.apply, operator.kernel * scale)
    return _Problem(unit, like, out, mask_in, mask_out, scale, back)


def _power_of_two(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``s`` and ``1 / s``, normal powers of two, s about ``1 / max|x|``: scaling is exact, but for
    what underflows."""
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x)) for x in arrays])
    exponent = jnp.clip(lax.bitcast_convert_type(largest, jnp.int64) >> 52, 1, 2045)
    scale, back = (
        lax.bitcast_convert_type(e << 52, jnp.float64) for e in (2046 - exponent, exponent)
    )
    return scale, back


def _chunked(function: Callable, xs, entries: int):
    """``vmap(function)(xs)`` a chunk at a time; `entries`: of an intermediate result for one x."""
    length = len(jax.tree.leaves(xs)[0])
    most = CPU_CHUNK_ENTRIES if jax.default_backend() == "cpu" else CHUNK_ENTRIES
    return lax.map(function, xs, batch_size=max(1, min(length, most // entries)))


def _or_infinity(x: jax.Array) -> jax.Array:
    """A breakdown of the arithmetic is no bound. (A minimum may drop a NaN, depending on the
    backend.)"""
    return jnp.where(jnp.isnan(x), jnp.inf, x)


def _norm(*arrays: jax.Array) -> jax.Array:
    """Not below the Frobenius norm of all entries together; squares that underflow are below 2^-510
    each."""
    count = sum(x.size for x in arrays)
    total = sum(jnp.sum(jnp.square(x)) for x in arrays)
    return jnp.sqrt(total) * (1 + gamma(count + 16)) + math.sqrt(count) * 2.0**-510


# ------------------------------------------------------------------------------------- closed forms


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
        A scalar that satisfies the module's guarantee.

    Raises:
        ValueError: not float64; a mask of another shape or type.
    """
    problem = _problem(operator, like, mask_in, mask_out)
    return problem.bound(_schur(problem), _frobenius(problem))


def frobenius_bound(
    operator: LinearOperator,
    like: jax.Array | jax.ShapeDtypeStruct,
    mask_in: jax.Array | None = None,
    mask_out: jax.Array | None = None,
) -> jax.Array:
    """``||D_out W D_in||_F``; arguments, result and errors as of `schur_bound`."""
    problem = _problem(operator, like, mask_in, mask_out)
    return problem.bound(_frobenius(problem))


def _closed_form(problem: _Problem) -> jax.Array:
    return jnp.minimum(_or_infinity(_schur(problem)), _or_infinity(_frobenius(problem)))


def _schur(problem: _Problem) -> jax.Array:
    forward, backward = problem.with_kernel(jnp.abs(problem.operator.kernel)).maps()
    rows, columns = forward(jnp.ones(problem.like.shape)), backward(jnp.ones(problem.out.shape))
    root = jnp.sqrt(jnp.max(rows) + 2.0**-960) * jnp.sqrt(jnp.max(columns) + 2.0**-960)
    return root * (1 + gamma(problem.terms + 16))


def _frobenius(problem: _Problem) -> jax.Array:
    forward, _ = problem.with_kernel(jnp.square(problem.operator.kernel)).maps()
    rows = forward(jnp.ones(problem.like.shape))
    underflow = math.sqrt(problem.like.size * problem.out.size) * 2.0**-510
    return jnp.sqrt(jnp.sum(rows)) * (1 + gamma(problem.terms + 16)) + underflow


# ----------------------------------------------------------------------------------- Gram iteration


# A real matrix is a tuple of one array, a complex one a tuple of its real and imaginary part.
_Parts = tuple[jax.Array, ...]


def _gram(parts: _Parts) -> _Parts:
    """``M^H M`` by real inner products of at most ``len(parts) * rows`` terms."""
    if len(parts) == 1:
        return (parts[0].T @ parts[0],)
    real, imaginary = parts
    stacked = jnp.concatenate([real, imaginary])
    turned = jnp.concatenate([imaginary, -real])
    product = stacked.T @ jnp.concatenate([stacked, turned], axis=1)
    return product[:, : real.shape[1]], product[:, real.shape[1] :]


def _gram_iteration(parts: _Parts, steps: jax.Array | int = STEPS) -> jax.Array:
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
        scale, back = _power_of_two(*parts)
        parts = tuple(part * scale for part in parts)
        return _gram(parts), frobenius.at[t].set(_norm(*parts)), backs.at[t].set(back)

    carry = (parts, jnp.zeros(STEPS), jnp.ones(STEPS))
    first = 0
    if rows != columns:  # the only step that changes the shape, hence not in the loop
        carry, first = square(0, carry), 1
    parts, frobenius, backs = lax.fori_loop(first, steps, square, carry)
    scale, back = _power_of_two(*parts)
    last = _norm(*(part * scale for part in parts)) * back

    def root(t, bound):
        t = steps - 1 - t
        return (
            jnp.sqrt(bound + 2 * gamma(terms) * jnp.square(frobenius[t]) + _TINY)
            * _ROUND_UP
            * backs[t]
        )

    return lax.fori_loop(0, steps, root, last)


# ----------------------------------------------------------------------------------------- attempts


def _ritz_value(gram: Callable, shape: tuple[int, ...], steps: int = RITZ_STEPS) -> jax.Array:
    """Largest Ritz value of a symmetric map: an estimate of its largest eigenvalue from below, or
    0.

    Lanczos without reorthogonalisation, from a fixed start: a chirp, whose weight is spread over
    all frequencies.
    """
    size = math.prod(shape)
    index = jnp.arange(size, dtype=jnp.float64)
    start = jnp.cos(0.5 * math.sqrt(5) * jnp.square(index)).reshape(shape)

    def step(carry, _):
        previous, current, off = carry
        image = gram(current)
        size = jnp.sqrt(jnp.sum(jnp.square(image)))
        diagonal = jnp.sum(current * image)
        image = image - diagonal * current - off * previous
        off = jnp.sqrt(jnp.sum(jnp.square(image)))
        # In an invariant subspace what is left is noise.
        off = jnp.where(off > 1e-10 * size, off, 0.0)
        following = jnp.where(off > 0, image / jnp.where(off > 0, off, 1.0), 0.0)
        return (current, following, off), (diagonal, off)

    # The start may have weight on what is masked: an eigenvector of the eigenvalue 0, which does no
    # harm.
    first = power.normalize(start)
    begin = jnp.zeros(shape), first, jnp.zeros((), jnp.float64)
    _, (diagonal, off) = lax.scan(step, begin, length=min(steps, size))
    last = (len(diagonal) - 1,) * 2
    # By bisection, in JAX: no routine of LAPACK (`_one_by_one`).
    (value,) = jax.scipy.linalg.eigh_tridiagonal(
        diagonal, off[:-1], eigvals_only=True, select="i", select_range=last
    )
    return jnp.where(jnp.isfinite(value) & (value > 0), value, 0.0)


def norm_estimate(
    operator: LinearOperator,
    like: jax.Array | jax.ShapeDtypeStruct,
    mask_in: jax.Array | None = None,
    mask_out: jax.Array | None = None,
) -> jax.Array:
    """An **estimate** of ``||D_out W D_in||_2`` from below, by `RITZ_STEPS` steps of Lanczos; 0
    where that breaks down.

    At the cost of as many power iterations it is far closer to the norm (Kuczynski and Wozniakowski
    1992): a good scale for a bound, and no bound itself.
    """
    forward, backward = power.masked(operator, jnp.zeros(like.shape), mask_in, mask_out)
    return jnp.sqrt(_ritz_value(lambda x: backward(forward(x)), like.shape))


def _first_success(attempt: Callable[[jax.Array], jax.Array], estimate: jax.Array) -> jax.Array:
    """``attempt(tau)``, an upper bound or infinity, at growing tau until it is finite."""
    inflations = jnp.asarray(INFLATIONS)

    def body(carry):
        i, _ = carry
        return i + 1, attempt(estimate * inflations[i])

    def unfinished(carry):
        i, bound = carry
        return (i < len(INFLATIONS)) & ~jnp.isfinite(bound)

    return lax.while_loop(unfinished, body, (jnp.zeros((), int), jnp.asarray(jnp.inf)))[1]


def _one_by_one(routine: Callable) -> Callable:
    """A routine of LAPACK that `vmap` calls for one matrix after the other on CPU.

    For a batch of them jaxlib 0.10 hands the matrices to the pool of threads that the program
    itself runs in, and waits: as many such calls at once as there are threads (two layers on two
        cores) wait for each other for ever. From 0.11 on
    it goes through a batch like this by itself.
    """
    return (
        jax.custom_batching.sequential_vmap(routine) if jax.default_backend() == "cpu" else routine
    )


def _factor(
    block: jax.Array, update: jax.Array, update_size: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A factor L of ``block - update``, and a bound of ``||block - X X^T - L L^T||_F`` for ``update
    = fl(X X^T)``.

    `update_size` is ``||X||_F^2``. The block's own entries count as rounded once (they are ``tau -
    g`` on the diagonal).
    """
    schur = block - update
    # Whatever the routine returns is checked: NaN where the matrix is not positive definite.
    factor = _one_by_one(functools.partial(lax.linalg.cholesky, symmetrize_input=False))(schur)
    left_over = _norm(schur - factor @ factor.T)
    sizes = _norm(block) + _norm(schur) + jnp.square(_norm(factor)) + update_size
    return factor, (left_over + gamma(block.shape[0] + 16) * sizes) * _ROUND_UP


def _attempt(gram: jax.Array, tau: jax.Array) -> jax.Array:
    """``lambda_max(G) <= tau + ||E||`` for ``tau I - G = L L^T + E``; infinity where there is no
    factor L."""
    size = gram.shape[0]
    shifted = tau * jnp.eye(size) - gram
    zero = jnp.zeros((), jnp.float64)
    _, error = _factor(shifted, jnp.zeros_like(gram), zero)
    return _or_infinity((tau + error) * _ROUND_UP)


# -------------------------------------------------------------------------------- explicit matrices


def largest_eigenvalue_bound(gram: jax.Array, guess: jax.Array | None = None) -> jax.Array:
    """An upper bound of ``max x^T G x / x^T x`` of a nearly symmetric, nearly semidefinite matrix,
    as it is given.

    Accepted Cholesky factorisations ``tau I - G = L L^T + E`` with tau a little above an estimate
    (the largest Ritz value, or the guess), and Gram iteration where none succeeds. ``x^T G x = tau
    - |L^T x|^2 - x^T E x <= tau + ||E||`` needs no symmetry of G, so that it may come from a matrix
      product whose two halves round differently.

    Args:
        gram: ``(k, k)``, float64.
        guess: of the eigenvalue; used where it is above the Ritz value. Only the tightness depends
            on it.

    Returns:
        A scalar, not negative; infinity where the arithmetic broke down.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.dtype != jnp.float64:
        raise ValueError(
            f"expected a square float64 matrix, got {gram.dtype} of shape {gram.shape}."
        )
    scale, back = _power_of_two(gram)
    usable = jnp.all(jnp.isfinite(gram))
    gram = gram * scale
    estimate = _ritz_value(lambda x: gram @ x, (gram.shape[0],))
    if guess is not None:
        guess = jnp.asarray(guess, jnp.float64) * scale
        estimate = jnp.where((guess > estimate) & jnp.isfinite(guess), guess, estimate)
    accepted = _first_success(functools.partial(_attempt, gram), estimate)
    # Without any steps this is the Frobenius norm: a success costs no squaring, also under vmap.
    otherwise = _gram_iteration((gram,), jnp.where(jnp.isfinite(accepted), 0, STEPS))
    bound = (jnp.minimum(accepted, _or_infinity(otherwise)) + _TINY) * back
    return jnp.where(usable, _or_infinity(jnp.maximum(bound, 2.0**-1022 * gram.shape[0])), jnp.inf)


def gram_norm_bound(matrix: jax.Array, guess: jax.Array | None = None) -> jax.Array:
    """An upper bound of ``||M||_2`` of an explicit float64 matrix ``(m, n)``, from its Gram matrix
    on the smaller side.

    The guess is of the norm; only the tightness depends on it. The module's guarantee holds.
    """
    if matrix.ndim != 2:
        raise ValueError(f"expected a matrix, got shape {matrix.shape}.")
    rows, columns = matrix.shape
    return dense_norm_bound(
        LinearOperator.from_matrix(matrix, (columns,), (rows,)),
        jax.ShapeDtypeStruct((columns,), jnp.float64),
        guess=guess,
    )


def dense_norm_bound(
    operator: LinearOperator,
    like: jax.Array | jax.ShapeDtypeStruct,
    mask_in: jax.Array | None = None,
    mask_out: jax.Array | None = None,
    guess: jax.Array | None = None,
) -> jax.Array:
    """Bounds ``||D_out W D_in||_2`` by the explicit masked Gram matrix on the smaller side, for any
    kind of map.

    With k the smaller side and N the larger, forming the Gram matrix takes ``2 k^2 N`` flops (for a
    matrix of more than
    `EXPLICIT_ENTRIES` entries: k applications of the map and its transpose) and an attempt ``7/3
    k^3``; usually there is
    one. Memory: about ``5 k^2 + 2 k N`` numbers (the second term: not beyond `EXPLICIT_ENTRIES`).

    Rounding: a column of the identity goes through W exactly (one product with 1), and then through
    W^T with an error of at most ``gamma |W|^T |W|`` in each entry of the Gram matrix, whose norm is
    at most gamma times the square of the Schur bound.

    Args:
        operator, like, mask_in, mask_out: as in `schur_bound`.
        guess: of the norm, e.g. from a power iteration. Only the tightness depends on it.

    Returns:
        A scalar that satisfies the module's guarantee, at most `schur_bound`.

    Raises:
        ValueError: as `schur_bound`.
    """
    problem = _problem(operator, like, mask_in, mask_out)
    closed = _closed_form(problem)
    forming, matrix = _explicit_gram(problem)

    def largest(kernel, mask_in, mask_out, matrix, square):
        this = problem.with_kernel(kernel)._replace(mask_in=mask_in, mask_out=mask_out)
        return largest_eigenvalue_bound(forming(this, matrix), square)

    if problem.like.size * problem.out.size > VECTORISED_ENTRIES:
        largest = jax.custom_batching.sequential_vmap(largest)
    value = largest(problem.operator.kernel, mask_in, mask_out, matrix, problem.square(guess))
    return problem.bound(_root(problem, value, closed), closed)


def _root(problem: _Problem, largest: jax.Array, closed: jax.Array) -> jax.Array:
    """The norm's bound from one of the computed Gram matrix, whose entries each err by gamma times
    ``|W|^T |W|``."""
    return jnp.sqrt(largest + gamma(problem.terms + 16) * jnp.square(closed) + _TINY) * _ROUND_UP


def _explicit_gram(problem: _Problem) -> tuple[Callable, jax.Array | None]:
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
        return _chunked(gram, identity, large.size).reshape(small.size, small.size)

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
    return by_product, _chunked(apply, identity, large.size).reshape(small.size, large.size)


def dense_cost(operator: LinearOperator, like: jax.Array | jax.ShapeDtypeStruct) -> float:
    """Flops of `dense_norm_bound` with one attempt, for one example."""
    out = jax.eval_shape(operator, jax.ShapeDtypeStruct(like.shape, like.dtype))
    small, large = sorted((like.size, out.size))
    explicit = small * large <= EXPLICIT_ENTRIES
    forming = (
        2.0 * small**2 * large
        if explicit
        else 2.0 * small * _application_flops(operator, like, out)
    )
    return forming + (7 / 3) * small**3 + 2.0 * RITZ_STEPS * small**2


def _application_flops(operator, like, out) -> float:
    if isinstance(operator.apply, Convolution):
        return 2.0 * out.size * operator.kernel.size / operator.kernel.shape[-1]
    return 2.0 * like.size * out.size


# ----------------------------------------------------------------------------- convolutions: global


def convolution_norm_bound(
    operator: LinearOperator, like: jax.Array | jax.ShapeDtypeStruct
) -> jax.Array:
    """Bounds the unmasked ``||W||_2`` of a convolution by that of a circular one (Sedghi et al.,
    ICLR 2019).

    *Grid.* A row of W reads taps ``q, q + d, .. q + (k-1) d`` of the (dilated) input of size n,
    zero outside it. On a circle of ``N >= n + (k-1) d`` points, rows that see any input start at
    different points, and what they read outside the input lies outside it on the circle too. So W
    is, but for rows of zeros, a submatrix of the circular convolution, whatever the padding. A
    circularly padded convolution is the circle of N = n itself.

    *Stride s.* N is taken as a multiple of s. The frequencies ``w + 2 pi a / s``, a < s, of the
    input meet in one of the output, and the norm is the largest ``||[K(w + 2 pi a / s)]_a||_2 /
    sqrt(s)`` per axis, K(w) the kernel's Fourier sum. (Circular padding whose size is no multiple
    of s: the rows are some of those of stride 1.)

    Each K(w) is an inner product with a table of cosines and sines, so that its rounding is that of
    one, and its norm comes from Gram iteration, over half of the frequencies (the others are
    conjugates).

    Args:
        operator: the view of a convolution (`apply` is a lipjax.graph.linear.Convolution), in 1, 2,
            3 .. dimensions.
        like: an array or a jax.ShapeDtypeStruct of the input's shape, float64.

    Returns:
        A scalar that satisfies the module's guarantee, at most `schur_bound`. Above the norm of a
        zero-padded convolution by what the border takes away: little for large images.

    Raises:
        TypeError: not a convolution. ValueError: as `schur_bound`.
    """
    if not isinstance(operator.apply, Convolution):
        raise TypeError(
            f"expected the view of a convolution, got one by {operator.apply!r}: use "
            "dense_norm_bound."
        )
    problem = _problem(operator, like, None, None)
    closed = _closed_form(problem)
    convolution = operator.apply
    if convolution.padding == "CIRCULAR" and max(convolution.input_dilation) > 1:
        # zeros come between the pixels after the image is wrapped: no plain circle
        return problem.bound(closed)
    *window, channels, features = operator.kernel.shape
    cosines, sines, strides = _tables(convolution, window, like.shape[:-1])
    groups = convolution.groups
    kernels = problem.operator.kernel.reshape(
        math.prod(window), channels, groups, features // groups
    )
    aliases = math.prod(strides)
    # Each part of K(w) errs by the inner product's gamma and the table's 32 u (see _tables),
    # relative to sum |K_t|.
    relative = 2 * math.sqrt(aliases) * (gamma(math.prod(window) + 16) + 40 * DOUBLE)

    def of_frequency(tables):
        parts = [
            jnp.einsum("at,tigo->gaio", table, kernels).reshape(groups, -1, features // groups)
            for table in tables
        ]
        # the transpose of a complex matrix has the same norm
        if parts[0].shape[1] < parts[0].shape[2]:
            parts = [jnp.swapaxes(part, 1, 2) for part in parts]
        return jnp.max(_or_infinity(jax.vmap(_gram_iteration)(tuple(parts))))

    norms = _chunked(
        of_frequency, (jnp.asarray(cosines), jnp.asarray(sines)), 4 * aliases * channels * features
    )
    largest = jnp.max(norms) + relative * _norm(jnp.sum(jnp.abs(kernels), axis=0))
    return problem.bound(largest * (_ROUND_UP / math.sqrt(aliases)), closed)


def _tables(
    convolution: Convolution, window, shape
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Cosines and sines ``(output frequencies, aliases, taps)`` on the circle, and the strides that
    it takes exactly.

    The angles are whole multiples of ``2 pi / L`` and are reduced to [0, 2 pi) as such: less than
    20 u off after rounding, so the entries are within 32 u if NumPy's cosine and sine are within 4
    units in the last place.
    """
    strides = convolution.strides
    if convolution.padding == "CIRCULAR":
        grid = tuple(shape)
        if any(n % s for n, s in zip(grid, strides, strict=True)):
            strides = (1,) * len(grid)
    else:
        reads = [
            (n - 1) * spread + 1 + (k - 1) * d
            for n, spread, k, d in zip(
                shape, convolution.input_dilation, window, convolution.dilation, strict=True
            )
        ]
        grid = tuple(-(-n // s) * s for n, s in zip(reads, strides, strict=True))
    outputs = [n // s for n, s in zip(grid, strides, strict=True)]
    whole = math.lcm(*grid)
    half = [*outputs[:-1], outputs[-1] // 2 + 1]
    low = np.array(list(np.ndindex(*half)), np.int64)
    aliases = np.array(list(np.ndindex(*strides)), np.int64) * np.array(outputs)
    taps = np.array(list(np.ndindex(*window)), np.int64) * np.array(convolution.dilation)
    frequencies = (low[:, None] + aliases[None]) * np.array([whole // n for n in grid])
    angles = 2 * math.pi * (np.einsum("fax,tx->fat", frequencies, taps) % whole) / whole
    return np.cos(angles), np.sin(angles), strides


# ----------------------------------------------------------------------------- convolutions: masked


@dataclasses.dataclass(frozen=True)
class _Bands:
    """How the Gram matrix of one side of a convolution falls into bands: static, before any number
    is known.

    Attributes:
        side: "in": W^T W on the input's coordinates; "out": W W^T on the output's.
        shape: of that side, channels last.
        reach: per spatial axis, how far apart two pixels may be whose entry is not zero.
        axis: the blocks are slabs across this axis.
        forming: flops of the Gram matrix of one example.
    """

    side: str
    shape: tuple[int, ...]
    reach: tuple[int, ...]
    axis: int
    forming: float

    @property
    def thickness(self) -> int:
        """Pixels of a slab along the axis: slabs that are no neighbours do not interact."""
        return max(1, self.reach[self.axis])

    @property
    def block(self) -> int:
        """Coordinates in a slab."""
        return self.thickness * math.prod(self.shape) // self.shape[self.axis]

    @property
    def blocks(self) -> int:
        return -(-self.shape[self.axis] // self.thickness)

    def flops(self, capacity: int) -> float:
        """Of one attempt: per block a Cholesky (1/3), a triangular solve (1) and three products (2
        each)."""
        return self.forming + self.blocks * (22 / 3) * float(capacity) ** 3

    def capacity(self, budget: float) -> int:
        """The largest block that the budget allows; 0 if that is below the smallest of `SHARES`."""
        if self.flops(self.block) <= budget:
            return self.block
        largest = math.floor((max(0.0, budget - self.forming) / (self.blocks * 22 / 3)) ** (1 / 3))
        return largest if largest >= min(SHARES) * self.block else 0


def _bands(operator: LinearOperator, like) -> _Bands | None:
    """The cheaper side's bands; None for what is no zero-padded convolution."""
    convolution = operator.apply
    if not isinstance(convolution, Convolution) or convolution.padding == "CIRCULAR":
        return None
    out = jax.eval_shape(operator, jax.ShapeDtypeStruct(like.shape, like.dtype))
    window = operator.kernel.shape[:-2]
    spans = [(k - 1) * d for k, d in zip(window, convolution.dilation, strict=True)]
    candidates = []
    for side, shape, steps in (
        ("in", like.shape, convolution.input_dilation),
        ("out", out.shape, convolution.strides),
    ):
        # Two inputs share an output, or two outputs an input, only within the kernel's span of the
        # dilated grid.
        reach = tuple(
            min(span // step, n - 1) for span, step, n in zip(spans, steps, shape[:-1], strict=True)
        )
        probes = shape[-1] * math.prod(
            min(2 * r + 1, n) for r, n in zip(reach, shape[:-1], strict=True)
        )
        forming = probes * _application_flops(operator, like, out)
        candidates += [_Bands(side, shape, reach, axis, forming) for axis in range(len(window))]
    return min(candidates, key=lambda bands: bands.flops(bands.block))


def masked_convolution_cost(
    operator: LinearOperator, like: jax.Array | jax.ShapeDtypeStruct
) -> float:
    """Flops of `masked_convolution_norm_bound` with one attempt and nothing masked, for one
    example; inf: not available.

    With slabs of b coordinates, B of them, ``22/3 B b^3``, of which ``6 B b^3`` are matrix
    products, and the forming of
    the Gram matrix: one convolution for each of ``channels * prod(2 reach + 1)`` probes (another
    one for a whole batch).
    Memory, in numbers: the number of probes times the sum of the two sides' sizes (on one side
    these are all the entries of the Gram matrix that can differ from zero), and about ``10 b^2``.
    Masked coordinates save work, see `masked_convolution_norm_bound`.
    """
    bands = _bands(operator, like)
    return math.inf if bands is None else bands.flops(bands.block)


def masked_convolution_norm_bound(
    operator: LinearOperator,
    like: jax.Array | jax.ShapeDtypeStruct,
    mask_in: jax.Array | None = None,
    mask_out: jax.Array | None = None,
    guess: jax.Array | None = None,
    fallback: jax.Array | float = math.inf,
    budget: float = math.inf,
) -> jax.Array:
    """Bounds ``||D_out W D_in||_2`` of a zero-padded convolution by a block Cholesky factorisation
    along the image.

    Pixels interact in ``G = W^T W`` (or ``W W^T``: the cheaper side is taken) only within the
    kernel's reach. Cut into slabs as thick as the reach, G is block tridiagonal, and so is ``tau I
    - G = L L^T + E``. L comes from the usual recursion, and its blocks are multiplied out again: E
      is block tridiagonal, hence ``||E||_2 <= max_i ||E_ii|| + 2
    max_i ||E_{i+1,i}||``, and ``lambda_max(G) <= tau + ||E||_2``. Nothing is assumed of the
    factorisation.

    The entries of G come from probes: identities on pixels that do not interact share one (their
    images do not overlap), and pass through W exactly, for all examples at once. The transposed
    pass, with an example's mask in between, errs as in `dense_norm_bound`.

    Masked coordinates are left out: the kept ones of each slab are gathered into the smallest of
    the blocks of `SHARES` of a slab that holds those of every slab. Where not even the largest
    block within the budget does, or that is smaller than the smallest share, the fallback is
    returned.

    Args:
        operator, like, mask_in, mask_out: as in `schur_bound`.
        guess: of the norm, e.g. from a power iteration. Only the tightness depends on it.
        fallback: an upper bound that is already known, e.g. from `convolution_norm_bound`.
        budget: flops for one example, with one attempt.

    Returns:
        A scalar that satisfies the module's guarantee if the fallback is a bound, at most the
        fallback and `schur_bound`; the smaller of these for a map that is no zero-padded
        convolution.

    Raises:
        ValueError: as `schur_bound`.
    """
    problem = _problem(operator, like, mask_in, mask_out)
    closed = _closed_form(problem)
    bands = _bands(operator, like)
    capacity = 0 if bands is None else bands.capacity(budget)
    near = None if bands is None else (mask_in if bands.side == "in" else mask_out)
    if bands is None or capacity == 0 or (near is None and capacity < bands.block):
        return problem.bound(closed, known=fallback)

    @jax.custom_batching.sequential_vmap
    def largest(kernel, mask_in, mask_out, images, square):
        this = problem.with_kernel(kernel)._replace(mask_in=mask_in, mask_out=mask_out)
        return _banded_largest(this, bands, capacity, images, square)

    images = _images(problem, bands)
    value = largest(problem.operator.kernel, mask_in, mask_out, images, problem.square(guess))
    return problem.bound(_root(problem, value, closed), closed, known=fallback)


def _banded_largest(
    problem: _Problem, bands: _Bands, capacity: int, images: jax.Array, square: jax.Array
) -> jax.Array:
    """A bound of the largest eigenvalue of the computed Gram matrix, infinity where there is
    none."""
    forward, backward = problem.maps()
    gram: Callable = lambda x: backward(forward(x))  # noqa: E731
    near, far = problem.mask_in, problem.mask_out
    if bands.side == "out":
        gram, near, far = lambda x: forward(backward(x)), far, near
    capacities = sorted({min(capacity, math.ceil(share * bands.block)) for share in SHARES})
    slabs = _slabs(bands)
    kept = jnp.asarray(slabs >= 0)
    if near is not None:
        kept &= near.reshape(-1)[slabs]
    level = jnp.sum(jnp.max(jnp.sum(kept, axis=1)) > jnp.asarray(capacities))
    # The kept coordinates of every slab first; the sort is stable, so they stay in order.
    order = jnp.argsort(~kept, axis=1, stable=True)

    def factorise():
        entries = _banded_entries(problem, bands, images, far)
        estimate = jnp.maximum(square, _ritz_value(gram, bands.shape))

        def attempt_of(c):
            indices = jnp.take_along_axis(jnp.asarray(slabs), order[:, :c], axis=1)
            valid = jnp.take_along_axis(kept, order[:, :c], axis=1)
            return lambda tau: _banded_attempt(entries, indices, valid, tau)

        attempts = [attempt_of(c) for c in capacities]
        return _first_success(lambda tau: lax.switch(level, attempts, tau), estimate)

    return lax.cond(level < len(capacities), factorise, lambda: jnp.asarray(jnp.inf))


def _slabs(bands: _Bands) -> np.ndarray:
    """Flat coordinates of each slab, ``(blocks, block)``; -1 where the last slab is thinner."""
    along = np.moveaxis(np.arange(math.prod(bands.shape)).reshape(bands.shape), bands.axis, 0)
    flat = along.reshape(along.shape[0], -1)
    missing = bands.blocks * bands.thickness - flat.shape[0]
    flat = np.pad(flat, ((0, missing), (0, 0)), constant_values=-1)
    return flat.reshape(bands.blocks, bands.block)


def _probes(bands: _Bands) -> tuple[np.ndarray, list[np.ndarray], int]:
    """For each coordinate its probe and its pixel, and the number of probes.

    Pixels of one probe differ by at least ``2 reach + 1`` along some axis, so no pixel is within
    reach of two of them.
    """
    *pixels, channels = np.unravel_index(np.arange(math.prod(bands.shape)), bands.shape)
    periods = [min(2 * r + 1, n) for r, n in zip(bands.reach, bands.shape[:-1], strict=True)]
    color = np.ravel_multi_index(
        [p % period for p, period in zip(pixels, periods, strict=True)], periods
    )
    return color * bands.shape[-1] + channels, list(pixels), math.prod(periods) * bands.shape[-1]


def _images(problem: _Problem, bands: _Bands) -> jax.Array:
    """What the unmasked map makes of every probe, exactly: each entry is one of the kernel, or
    zero."""
    apply = problem.operator if bands.side == "in" else problem.operator.transpose(problem.like)
    probe, _, count = _probes(bands)

    def image(k):
        return apply((jnp.asarray(probe) == k).astype(jnp.float64).reshape(bands.shape))

    return _chunked(image, jnp.arange(count), max(problem.like.size, problem.out.size))


def _banded_entries(
    problem: _Problem, bands: _Bands, images: jax.Array, far: jax.Array | None
) -> Callable:
    """``entries(rows, columns)`` of the Gram matrix at flat coordinates that the near mask
    keeps."""
    apply = problem.operator.transpose(problem.like) if bands.side == "in" else problem.operator
    probe, pixels, _ = _probes(bands)

    def back(image):
        return apply(image if far is None else jnp.where(far, image, 0)).reshape(-1)

    columns_of = _chunked(back, images, max(problem.like.size, problem.out.size))
    probe_of, where = jnp.asarray(probe), [jnp.asarray(p) for p in pixels]

    def entries(rows, columns):
        near = [
            jnp.abs(p[rows][:, None] - p[columns][None, :]) <= r
            for p, r in zip(where, bands.reach, strict=True)
        ]
        values = columns_of[probe_of[columns][None, :], rows[:, None]]
        return jnp.where(functools.reduce(jnp.logical_and, near), values, 0)

    return entries


def _banded_attempt(
    entries: Callable, indices: jax.Array, valid: jax.Array, tau: jax.Array
) -> jax.Array:
    """`_attempt` on a block tridiagonal matrix: its blocks are ``entries(indices[i], indices[j])``
    where valid."""
    capacity = indices.shape[1]
    identity = jnp.eye(capacity)

    def block(rows, columns):
        kept = rows[1][:, None] & columns[1][None, :]
        return jnp.where(kept, entries(rows[0], columns[0]), 0)

    def step(carry, pair):
        update, update_size = carry
        here, following = pair
        factor, error = _factor(tau * identity - block(here, here), update, update_size)
        beside = -block(following, here)
        solve = functools.partial(
            lax.linalg.triangular_solve, left_side=False, lower=True, transpose_a=True
        )
        below = _one_by_one(solve)(factor, beside)
        sizes = _norm(beside) + _norm(below) * _norm(factor)
        error_beside = (_norm(beside - below @ factor.T) + gamma(capacity + 16) * sizes) * _ROUND_UP
        return (below @ below.T, jnp.square(_norm(below)) * _ROUND_UP), (error, error_beside)

    last = jnp.zeros((1, capacity), indices.dtype), jnp.zeros((1, capacity), bool)
    following = tuple(
        jnp.concatenate([x[1:], end]) for x, end in zip((indices, valid), last, strict=True)
    )
    start = (jnp.zeros((capacity, capacity)), jnp.zeros((), jnp.float64))
    _, (errors, errors_beside) = lax.scan(step, start, ((indices, valid), following))
    largest = jnp.max(_or_infinity(errors)) + 2 * jnp.max(_or_infinity(errors_beside))
    return _or_infinity((tau + largest) * _ROUND_UP)


# ------------------------------------------------------------------------------- the best available


def norm_bound(
    operator: LinearOperator,
    like: jax.Array | jax.ShapeDtypeStruct,
    mask_in: jax.Array | None = None,
    mask_out: jax.Array | None = None,
    *,
    guess: jax.Array | None = None,
    global_bound: jax.Array | float = math.inf,
    budget: float = BUDGET,
) -> jax.Array:
    """The smallest bound of ``||D_out W D_in||_2`` that the budget allows: the deterministic tier's
    norm.

    Candidates: `schur_bound`; the global bound given; the explicit Gram matrix where the smaller
    side is at most `DENSE_LIMIT` and `dense_cost` within the budget; or
    `masked_convolution_norm_bound` with blocks as large as the budget allows, where that holds a
    whole slab or the explicit one is not available.

    Args:
        operator, like, mask_in, mask_out: as in `schur_bound`.
        guess: of the norm, e.g. from a power iteration. Only the tightness depends on it.
        global_bound: an upper bound of the norm of W without masks, e.g. of `global_norm_bound`,
            once per network.
        budget: flops for this example and layer, with one attempt.

    Returns:
        A scalar that satisfies the module's guarantee if the global bound is one.

    Raises:
        ValueError: as `schur_bound`.
    """
    problem = _problem(operator, like, mask_in, mask_out)
    known = problem.bound(_closed_form(problem), known=global_bound)
    dense, banded = dense_cost(operator, like), masked_convolution_cost(operator, like)
    fits = dense <= budget and min(like.size, problem.out.size) <= DENSE_LIMIT
    if fits and (dense <= banded or banded > budget):
        return jnp.minimum(known, dense_norm_bound(operator, like, mask_in, mask_out, guess))
    return masked_convolution_norm_bound(operator, like, mask_in, mask_out, guess, known, budget)


def global_norm_bound(
    operator: LinearOperator, like: jax.Array | jax.ShapeDtypeStruct, *, budget: float = BUDGET
) -> jax.Array:
    """An upper bound of the unmasked ``||W||_2``, once per network: `norm_bound` and the circular
    convolution's."""
    known: jax.Array | float = math.inf
    if isinstance(operator.apply, Convolution):
        known = convolution_norm_bound(operator, like)
    return norm_bound(operator, like, global_bound=known, budget=budget)
