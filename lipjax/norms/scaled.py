"""The problem that all deterministic bounds start from: a masked map at unit scale.

The entries are scaled by a power of two so that the largest of the kernel's is about 1. This is
exact, and makes what underflows negligible: it is covered by absolute terms of at most 2^-500
relative to that entry.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lipjax.graph.linear import Convolution, LinearOperator
from lipjax.norms.masks import masked
from lipjax.rounding import DOUBLE, gamma

# Entries of one intermediate result of a chunk. On a CPU it must fit the cache: measured, 2.5 times
# as fast as 2^23.
CPU_CHUNK_ENTRIES = 2**16
CHUNK_ENTRIES = 2**23

ROUND_UP = 1 + 16 * DOUBLE  # covers a handful of operations on a bound itself
TINY = 2.0**-500  # covers underflow in a bound of an eigenvalue, at unit scale


class Problem(NamedTuple):
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

    def with_kernel(self, kernel: jax.Array) -> "Problem":
        """The same with another kernel at unit scale."""
        return self._replace(operator=dataclasses.replace(self.operator, kernel=kernel))

    def maps(self) -> tuple[Callable, Callable]:
        """``D_out W D_in`` and its transpose."""
        return masked(self.operator, jnp.zeros(self.like.shape), self.mask_in, self.mask_out)

    def square(self, guess) -> jax.Array:
        """Square of a guess of the norm, at unit scale; 0 for one that is missing or no number."""
        guess = jnp.asarray(0.0 if guess is None else guess, jnp.float64) * self.scale
        return jnp.where((guess > 0) & (guess < 1e150), jnp.square(guess), 0.0)

    def bound(self, *values: jax.Array, known: jax.Array | float = math.inf) -> jax.Array:
        """The smallest of these bounds, `values` at unit scale and `known` not.

        It satisfies the guarantee of `lipjax.norms`.
        """
        usable = jnp.all(jnp.isfinite(self.operator.kernel))
        values_or_infinity = [or_infinity(value) for value in values]
        smallest = functools.reduce(jnp.minimum, values_or_infinity) * self.back
        # A norm below the normal range may have been flushed to zero on the way.
        floor = 2.0**-1022 * 2 ** math.ceil(math.log2(self.like.size * self.out.size) / 2)
        known = or_infinity(jnp.asarray(known, jnp.float64))
        smallest = jnp.minimum(jnp.maximum(smallest, floor), known)
        bound = jnp.where(usable, smallest, jnp.inf)
        nothing = jnp.zeros((), bool)
        for mask in (self.mask_in, self.mask_out):
            if mask is not None:
                nothing |= ~jnp.any(mask)
        return jnp.where(nothing, 0.0, bound)


def problem_of(operator, like, mask_in, mask_out) -> Problem:
    """The arguments of a bound, checked and scaled; the errors are those of `schur_bound`."""
    like = jax.ShapeDtypeStruct(like.shape, like.dtype)
    for name, dtype in (("kernel", operator.kernel.dtype), ("input", like.dtype)):
        if dtype != jnp.float64:
            raise ValueError(
                f"deterministic bounds are computed in float64, got a {name} of {dtype}: enable "
                "x64 and cast to float64 (the cast of a float32 kernel is exact)."
            )
    out = jax.eval_shape(operator, like)
    for name, mask, shape in (("mask_in", mask_in, like.shape), ("mask_out", mask_out, out.shape)):
        if mask is not None and (mask.shape != shape or mask.dtype != jnp.bool_):
            raise ValueError(
                f"{name} must be boolean of shape {shape}, got {mask.dtype} of shape {mask.shape}."
            )
    scale, back = power_of_two(operator.kernel)
    unit = LinearOperator(operator.apply, operator.kernel * scale)
    return Problem(unit, like, out, mask_in, mask_out, scale, back)


def power_of_two(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``s`` and ``1 / s``, normal powers of two, s about ``1 / max|x|``: scaling is exact, but for
    what underflows."""
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x)) for x in arrays])
    exponent = jnp.clip(lax.bitcast_convert_type(largest, jnp.int64) >> 52, 1, 2045)
    scale = lax.bitcast_convert_type((2046 - exponent) << 52, jnp.float64)
    back = lax.bitcast_convert_type(exponent << 52, jnp.float64)
    return scale, back


def chunked(function: Callable, xs, entries: int):
    """``vmap(function)(xs)`` a chunk at a time; `entries`: of an intermediate result for one x."""
    length = len(jax.tree.leaves(xs)[0])
    entries_at_once = CPU_CHUNK_ENTRIES if jax.default_backend() == "cpu" else CHUNK_ENTRIES
    return lax.map(function, xs, batch_size=max(1, min(length, entries_at_once // entries)))


def or_infinity(x: jax.Array) -> jax.Array:
    """A breakdown of the arithmetic is no bound. (A minimum may drop a NaN, depending on the
    backend.)"""
    return jnp.where(jnp.isnan(x), jnp.inf, x)


def frobenius_up(*arrays: jax.Array) -> jax.Array:
    """Not below the Frobenius norm of all entries together.

    Squares that underflow are those of numbers below 2^-510 each.
    """
    count = sum(x.size for x in arrays)
    total = sum(jnp.sum(jnp.square(x)) for x in arrays)
    return jnp.sqrt(total) * (1 + gamma(count + 16)) + math.sqrt(count) * 2.0**-510


def norm_from_gram(problem: Problem, largest: jax.Array, closed: jax.Array) -> jax.Array:
    """The norm's bound from one of the computed Gram matrix, whose entries each err by gamma times
    ``|W|^T |W|``."""
    return jnp.sqrt(largest + gamma(problem.terms + 16) * jnp.square(closed) + TINY) * ROUND_UP


def application_flops(operator, like, out) -> float:
    """Flops of one product with W."""
    if isinstance(operator.apply, Convolution):
        return 2.0 * out.size * operator.kernel.size / operator.kernel.shape[-1]
    return 2.0 * like.size * out.size
