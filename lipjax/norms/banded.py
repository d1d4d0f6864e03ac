"""The masked norm of a zero-padded convolution, by a block Cholesky factorisation along the image.

Within a per mille or two, at `masked_convolution_cost`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lipjax.graph.linear import Convolution, LinearOperator
from lipjax.norms.cholesky import factor_with_error, first_success, one_by_one
from lipjax.norms.closed import closed_form
from lipjax.norms.lanczos import ritz_value
from lipjax.norms.scaled import (
    ROUND_UP,
    Problem,
    application_flops,
    chunked,
    frobenius_up,
    norm_from_gram,
    or_infinity,
    problem_of,
)
from lipjax.rounding import gamma

# Few kept coordinates are gathered into smaller blocks, of these shares of the block, where they
# fit.
SHARES = (0.3, 0.6, 1.0)


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
    kernel's reach. Cut into slabs as thick as that, G is block tridiagonal, and so is
    ``tau I - G = L L^T + E``. L comes from the usual recursion, and its blocks are multiplied out
    again: E is block tridiagonal, hence ``||E||_2 <= max_i ||E_ii|| + 2 max_i ||E_{i+1,i}||``, and
    ``lambda_max(G) <= tau + ||E||_2``. Nothing is assumed of the factorisation.

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
        A scalar that satisfies the guarantee of `lipjax.norms` if the fallback is a bound, at most
        the fallback and `schur_bound`; the smaller of these for a map that is no zero-padded
        convolution.

    Raises:
        ValueError: as `schur_bound`.
    """
    problem = problem_of(operator, like, mask_in, mask_out)
    closed = closed_form(problem)
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
    return problem.bound(norm_from_gram(problem, value, closed), closed, known=fallback)


def masked_convolution_cost(
    operator: LinearOperator, like: jax.Array | jax.ShapeDtypeStruct
) -> float:
    """Flops of `masked_convolution_norm_bound` with one attempt and nothing masked, for one
    example; inf: not available.

    With slabs of b coordinates, B of them, ``22/3 B b^3``, of which ``6 B b^3`` are matrix
    products, and the forming of the Gram matrix: one convolution for each of
    ``channels * prod(2 bandwidth + 1)`` probes (another one for a whole batch).
    Memory, in numbers: the number of probes times the sum of the two sides' sizes (on one side
    these are all the entries of the Gram matrix that can differ from zero), and about ``10 b^2``.
    Masked coordinates save work, see `masked_convolution_norm_bound`.
    """
    bands = _bands(operator, like)
    return math.inf if bands is None else bands.flops(bands.block)


@dataclasses.dataclass(frozen=True)
class _Bands:
    """How the Gram matrix of one side of a convolution falls into bands: static, before any number
    is known.

    Attributes:
        side: "in": W^T W on the input's coordinates; "out": W W^T on the output's.
        shape: of that side, channels last.
        bandwidth: per spatial axis, how far apart two pixels may be whose entry is not zero.
        axis: the blocks are slabs across this axis.
        forming: flops of the Gram matrix of one example.
    """

    side: str
    shape: tuple[int, ...]
    bandwidth: tuple[int, ...]
    axis: int
    forming: float

    @property
    def thickness(self) -> int:
        """Pixels of a slab along the axis: slabs that are no neighbours do not interact."""
        return max(1, self.bandwidth[self.axis])

    @property
    def block(self) -> int:
        """Coordinates in a slab."""
        return self.thickness * math.prod(self.shape) // self.shape[self.axis]

    @property
    def blocks(self) -> int:
        return -(-self.shape[self.axis] // self.thickness)

    def flops(self, capacity: int) -> float:
        """Of one attempt; a block takes a Cholesky (1/3), a solve (1), three products (2 each)."""
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
        bandwidth = tuple(
            min(span // step, n - 1) for span, step, n in zip(spans, steps, shape[:-1], strict=True)
        )
        probes = shape[-1] * math.prod(
            min(2 * r + 1, n) for r, n in zip(bandwidth, shape[:-1], strict=True)
        )
        forming = probes * application_flops(operator, like, out)
        candidates += [_Bands(side, shape, bandwidth, axis, forming) for axis in range(len(window))]
    return min(candidates, key=lambda bands: bands.flops(bands.block))


def _banded_largest(
    problem: Problem, bands: _Bands, capacity: int, images: jax.Array, square: jax.Array
) -> jax.Array:
    """A bound of the largest eigenvalue of the computed Gram matrix, infinity where there is
    none."""
    forward, backward = problem.maps()
    inwards = bands.side == "in"
    near = problem.mask_in
    far = problem.mask_out
    if not inwards:
        near, far = far, near

    def gram(x):
        return backward(forward(x)) if inwards else forward(backward(x))

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
        estimate = jnp.maximum(square, ritz_value(gram, bands.shape))

        def attempt_of(c):
            indices = jnp.take_along_axis(jnp.asarray(slabs), order[:, :c], axis=1)
            valid = jnp.take_along_axis(kept, order[:, :c], axis=1)
            return lambda tau: _banded_attempt(entries, indices, valid, tau)

        attempts = [attempt_of(c) for c in capacities]
        return first_success(lambda tau: lax.switch(level, attempts, tau), estimate)

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

    Pixels of one probe differ by at least ``2 bandwidth + 1`` along some axis, so no pixel
    interacts with two of them.
    """
    *pixels, channels = np.unravel_index(np.arange(math.prod(bands.shape)), bands.shape)
    periods = [min(2 * r + 1, n) for r, n in zip(bands.bandwidth, bands.shape[:-1], strict=True)]
    color = np.ravel_multi_index(
        [p % period for p, period in zip(pixels, periods, strict=True)], periods
    )
    return color * bands.shape[-1] + channels, list(pixels), math.prod(periods) * bands.shape[-1]


def _images(problem: Problem, bands: _Bands) -> jax.Array:
    """What the unmasked map makes of every probe, exactly: each entry is one of the kernel, or
    zero."""
    apply = problem.operator if bands.side == "in" else problem.operator.transpose(problem.like)
    probe, _, count = _probes(bands)

    def image(k):
        return apply((jnp.asarray(probe) == k).astype(jnp.float64).reshape(bands.shape))

    return chunked(image, jnp.arange(count), max(problem.like.size, problem.out.size))


def _banded_entries(
    problem: Problem, bands: _Bands, images: jax.Array, far: jax.Array | None
) -> Callable:
    """``entries(rows, columns)`` of the Gram matrix at flat coordinates that the near mask
    keeps."""
    apply = problem.operator.transpose(problem.like) if bands.side == "in" else problem.operator
    probe, pixels, _ = _probes(bands)

    def back(image):
        return apply(image if far is None else jnp.where(far, image, 0)).reshape(-1)

    columns_of = chunked(back, images, max(problem.like.size, problem.out.size))
    probe_of = jnp.asarray(probe)
    where = [jnp.asarray(p) for p in pixels]

    def entries(rows, columns):
        near = [
            jnp.abs(p[rows][:, None] - p[columns][None, :]) <= r
            for p, r in zip(where, bands.bandwidth, strict=True)
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
        factor, error = factor_with_error(tau * identity - block(here, here), update, update_size)
        beside = -block(following, here)
        solve = functools.partial(
            lax.linalg.triangular_solve, left_side=False, lower=True, transpose_a=True
        )
        below = one_by_one(solve)(factor, beside)
        sizes = frobenius_up(beside) + frobenius_up(below) * frobenius_up(factor)
        error_beside = (
            frobenius_up(beside - below @ factor.T) + gamma(capacity + 16) * sizes
        ) * ROUND_UP
        return (below @ below.T, jnp.square(frobenius_up(below)) * ROUND_UP), (error, error_beside)

    last = jnp.zeros((1, capacity), indices.dtype), jnp.zeros((1, capacity), bool)
    following = tuple(
        jnp.concatenate([x[1:], end]) for x, end in zip((indices, valid), last, strict=True)
    )
    start = (jnp.zeros((capacity, capacity)), jnp.zeros((), jnp.float64))
    _, (errors, errors_beside) = lax.scan(step, start, ((indices, valid), following))
    largest = jnp.max(or_infinity(errors)) + 2 * jnp.max(or_infinity(errors_beside))
    return or_infinity((tau + largest) * ROUND_UP)
