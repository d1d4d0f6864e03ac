"""The error model of floating-point arithmetic: what rounding can do to a network as executed, and
to its bounds.

**Model** (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed. 2002, sections 2.2 and
3.1). An operation returns the exact result times ``1 + d``, ``|d| <= u``. An inner product of n
terms, summed in any order, with or without fused multiply-adds, errs by at most ``gamma(n) sum |a_i
b_i|``, ``gamma(n) = n u / (1 - n u)``. Results that underflow may be flushed to zero, as may
subnormal operands. Not covered: products that are no inner products (Winograd or Fourier
    convolutions, Strassen), and faults of the hardware.

Where the operands are first rounded to a narrower format (TF32, bfloat16) that adds a factor ``(1 +
u_in)^2``, and the format of the result another ``1 + u_out``. Tensor cores truncate and keep few
guard bits (Fasi, Higham, Mikaitis and Pranesh, *Numerical behavior of NVIDIA tensor cores*, 2021),
so their accumulation is counted with ``u_acc = 2^-22`` and the conversion to TF32, which some do by
truncation, with ``u_in = 2^-10``.

Two things are made of it. `OUTWARD` turns every rounding error of a bound, computed in float64, to
the safe side; `EXACT` does nothing and serves estimates, which are differentiated. `forward_error`
bounds how far the logits of the network *as executed*, in its own arithmetic, can be from those of
the real-number function, for every input of a ball.
"""

import functools
import math

import jax
import jax.numpy as jnp

from lipjax.graph.linear import Convolution, LinearOperator, Matrix, raised, safe_norm

DOUBLE = 2.0**-53
# What underflow can do to one bound in float64: what is lost is below 2^-1022 a term, is multiplied
# by at most one more number, of up to `LARGEST`, and there are millions of terms. It does not cover
# a square root, a division or a second factor behind an underflow: what is squared for a root is
# `graph.linear.raised` first, so that there is none.
FLOOR = 1e-150
# Bounds with a number above this are given up: below it nothing overflows, and FLOOR covers all
# that underflows.
LARGEST = 1e100
# Stands for a share of something that may have underflowed itself.
LEAST_SHARE = 2.0**-1000


def gamma(n, unit: float = DOUBLE) -> float:
    """``n u / (1 - n u)``: relative error of an inner product of n terms; infinity where the model
    says nothing."""
    return n * unit / (1 - n * unit) if n * unit < 1 else math.inf


# --------------------------------------------------------------------------- rounding of the bounds


class Exact:
    """Bounds as if arithmetic were exact: for estimates."""

    def up(self, x: jax.Array, terms: int = 1) -> jax.Array:
        return x

    def around(self, lower: jax.Array, upper: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (lower + upper) / 2, (upper - lower) / 2

    def widened(self, lower: jax.Array, upper: jax.Array, slack) -> tuple[jax.Array, jax.Array]:
        return lower, upper

    def slack(self, operator: LinearOperator, lower: jax.Array, upper: jax.Array):
        return 0.0

    def norm(self, slack) -> jax.Array | float:
        return 0.0

    def length(self, x: jax.Array) -> jax.Array:
        return safe_norm(x)

    def slope_width(self, width: jax.Array) -> jax.Array:
        return width

    def left_over(self, relative, g: jax.Array, length) -> jax.Array | float:
        return 0.0


class Outward:
    """Bounds in float64, every rounding error turned to the safe side; see the module's text for
    the model."""

    def up(self, x: jax.Array, terms: int = 1) -> jax.Array:
        """At least the exact value of what was computed as x >= 0 by sums of `terms` products of
        numbers >= 0, with up to eight further multiplications, divisions or square roots.

        Also where products underflowed (see FLOOR), and therefore never 0: a 0 may be all that
        underflow has left.
        """
        return x * (1 + 2 * gamma(terms + 8)) + FLOOR

    def around(self, lower: jax.Array, upper: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Middle and half-width whose interval contains ``[lower, upper]``."""
        middle, half_width = (lower + upper) / 2, (upper - lower) / 2
        return middle, self.up(half_width) + 4 * DOUBLE * jnp.abs(middle)

    def widened(self, lower: jax.Array, upper: jax.Array, slack) -> tuple[jax.Array, jax.Array]:
        """The box widened by `slack` and by the rounding of doing so; 0 and 0 stay, as a sum or
        difference that is 0 was not rounded."""
        exact = (slack == 0) & (lower == 0) & (upper == 0)
        margin = self.up(slack + 4 * DOUBLE * jnp.maximum(jnp.abs(lower), jnp.abs(upper)))
        margin = jnp.where(exact, 0.0, margin)
        return lower - margin, upper + margin

    def slack(self, operator: LinearOperator, lower: jax.Array, upper: jax.Array) -> jax.Array:
        """At least the rounding error, entry by entry, of each of ``W x + b``, ``|W| x`` and two
        sums of them, for every x of size at most that of the box.

        Each errs by at most ``gamma(n + 2) (|W| |x| + |b|)``; a factor 8 covers their sum and this
        computation's own.
        """
        magnitude = operator.absolute(jnp.maximum(jnp.abs(lower), jnp.abs(upper)))
        if operator.bias is not None:
            magnitude = magnitude + jnp.abs(jnp.broadcast_to(operator.bias, magnitude.shape))
        return 8 * gamma(terms_of(operator, lower) + 8) * magnitude + FLOOR

    def norm(self, slack: jax.Array) -> jax.Array:
        """Its l2 norm, rounded up."""
        return self.length(slack)

    def length(self, x: jax.Array) -> jax.Array:
        """``||x||_2`` rounded up; 0 only for 0."""
        size = self.up(safe_norm(raised(x)), x.size)
        return jnp.where(jnp.all(x == 0), 0.0, size)  # a NaN is no 0

    def slope_width(self, width: jax.Array) -> jax.Array:
        """Half the distance of two slopes in [-1, 1], each computed as a ratio of two rounded
        differences, rounded up."""
        return width + 32 * DOUBLE

    def left_over(self, relative, g: jax.Array, length: jax.Array) -> jax.Array:
        """At least ``|<f, v>|`` for every ``||v|| <= length`` and ``||f|| <= relative ||g||``: for
        what is left over when a row computed from g, `relative` of it wrong, takes the place of the
        exact one."""
        # In this order: where the inner product underflows, the exact one is far below FLOOR.
        return self.up(jnp.maximum(relative, LEAST_SHARE) * (self.length(g) * length))


EXACT, OUTWARD = Exact(), Outward()
Rounding = Exact | Outward


def terms_of(operator: LinearOperator, like: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Entries of the kernel in the fullest row of W, for inputs like `like`: the terms of one inner
    product. Static."""
    return _count(operator, like, transposed=False)


def transposed_terms_of(operator: LinearOperator, like: jax.Array | jax.ShapeDtypeStruct) -> int:
    """The same for the fullest column: the terms of one inner product of the transposed map."""
    return _count(operator, like, transposed=True)


def _count(operator, like, transposed) -> int:
    return _counted(operator.apply, operator.kernel.shape, like.shape, transposed)


@functools.lru_cache(maxsize=4096)
def _counted(apply, kernel_shape, shape, transposed) -> int:
    if isinstance(apply, Matrix | Convolution):
        return apply.terms(kernel_shape, shape, transposed)
    # Counted by running the map on ones, outside of any trace; float32 counts exactly up to 2^24.
    with jax.ensure_compile_time_eval():
        kernel = jnp.ones(kernel_shape, jnp.float32)
        x = jax.ShapeDtypeStruct(shape, jnp.float32)

        def run(x):
            return apply(kernel, x)

        if transposed:
            image = jax.eval_shape(run, x)
            counts = jax.linear_transpose(run, x)(jnp.ones(image.shape, jnp.float32))[0]
        else:
            counts = run(jnp.ones(shape, jnp.float32))
        return math.ceil(float(jnp.max(counts)))
