"""Lanczos: an **estimate** of a norm from below, where a bound needs a good scale."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lipjax.graph.linear import LinearOperator
from lipjax.norms.masks import masked, normalize

# Steps of an estimate.
RITZ_STEPS = 60


def norm_estimate(
    operator: LinearOperator,
    like: jax.Array | jax.ShapeDtypeStruct,
    mask_in: jax.Array | None = None,
    mask_out: jax.Array | None = None,
) -> jax.Array:
    """An **estimate** of ``||D_out W D_in||_2`` from below; 0 where that breaks down.

    At the cost of as many power iterations it is far closer to the norm (Kuczynski and Wozniakowski
    1992): a good scale for a bound, and no bound itself.
    """
    forward, backward = masked(operator, jnp.zeros(like.shape), mask_in, mask_out)
    return jnp.sqrt(ritz_value(lambda x: backward(forward(x)), like.shape))


def ritz_value(gram: Callable, shape: tuple[int, ...], steps: int = RITZ_STEPS) -> jax.Array:
    """Largest Ritz value of a symmetric map: its largest eigenvalue, estimated from below, or 0.

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
    first = normalize(start)
    begin = jnp.zeros(shape), first, jnp.zeros((), jnp.float64)
    _, (diagonal, off) = lax.scan(step, begin, length=min(steps, size))
    value = largest_eigenvalue(diagonal, off[:-1])
    return jnp.where(jnp.isfinite(value) & (value > 0), value, 0.0)


# Halvings of the interval around an eigenvalue: an estimate needs no more digits.
HALVINGS = 40


def largest_eigenvalue(diagonal: jax.Array, off: jax.Array) -> jax.Array:
    """Of a symmetric tridiagonal matrix, to about 12 digits of the size of its entries.

    By bisection: x is above all eigenvalues if every pivot of ``T - x I`` is negative (Sturm). A
    tenth of the code of `jax.scipy.linalg.eigh_tridiagonal`, and no routine of LAPACK, which may
    not run side by side (`cholesky.one_by_one`).
    """
    squares = jnp.pad(jnp.square(off), (1, 0))
    beside = jnp.abs(jnp.pad(off, 1))
    # Gershgorin's discs, and the largest entry of the diagonal, which no eigenvalue stays below.
    top = jnp.max(diagonal + beside[1:] + beside[:-1])
    bottom = jnp.max(diagonal)

    def above(x):
        def pivot(state, row):
            entry, square = row
            before, negative = state
            now = entry - x - square / before
            # (A pivot of 0 is no negative one: infinities and NaN may follow, and change nothing.)
            return (now, negative & (now < 0)), None

        (_, negative), _ = lax.scan(
            pivot, (jnp.ones((), diagonal.dtype), True), (diagonal, squares)
        )
        return negative

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        below = above(middle)
        return jnp.where(below, low, middle), jnp.where(below, middle, high)

    low, _ = lax.fori_loop(0, HALVINGS, halve, (bottom, top))
    return low
