"""The unmasked norm of a convolution, from the symbols of a circular one.

Once per network: ``8 STEPS C^3`` flops per frequency, C channels (`gram.STEPS`).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lipjax.graph.linear import Convolution, LinearOperator
from lipjax.norms.closed import closed_form
from lipjax.norms.gram import gram_iteration
from lipjax.norms.scaled import ROUND_UP, chunked, frobenius_up, or_infinity, problem_of
from lipjax.rounding import DOUBLE, gamma


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
        A scalar that satisfies the guarantee of `lipjax.norms`, at most `schur_bound`. Above the
        norm of a zero-padded convolution by what the border takes away: little for large images.

    Raises:
        TypeError: not a convolution. ValueError: as `schur_bound`.
    """
    if not isinstance(operator.apply, Convolution):
        raise TypeError(
            f"expected the view of a convolution, got one by {operator.apply!r}: use "
            "dense_norm_bound."
        )
    problem = problem_of(operator, like, None, None)
    closed = closed_form(problem)
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
        return jnp.max(or_infinity(jax.vmap(gram_iteration)(tuple(parts))))

    norms = chunked(
        of_frequency, (jnp.asarray(cosines), jnp.asarray(sines)), 4 * aliases * channels * features
    )
    largest = jnp.max(norms) + relative * frobenius_up(jnp.sum(jnp.abs(kernels), axis=0))
    return problem.bound(largest * (ROUND_UP / math.sqrt(aliases)), closed)


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
