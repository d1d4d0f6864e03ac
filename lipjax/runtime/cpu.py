"""Rewrites convolutions and sums into forms that XLA's CPU backend runs fast.

That backend is fast at convolutions of float32 images whose channels are the last axis. It is slow
at what differentiation makes of them. Kernel gradients come as a convolution over the examples: it
transposes them first, and within a loop it leaves the fast path altogether. Transposed strided
convolutions multiply with the zeros between the pixels. `for_cpu` rewrites both in a function that
was already differentiated and batched: the first as matrix products, the second as an ordinary
convolution to more channels, which are then laid side by side. It also rewrites sums over the
examples, and numbers of an example that are used for every pixel (see below).

Elsewhere, and in float64, nothing is changed. The sums are the same in another order: results
differ by rounding only.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from lipjax.runtime import kept

# Entries of a kernel per output up to which its gradient is one matrix product: more would take
# memory.
COLUMNS = 64

# How often a number must be used for it to be computed once.
MANY = 256


def for_cpu(function: Callable) -> Callable:
    """`function` rewritten, if the default device is a CPU; else as it is.

    Its positional arguments are pytrees of arrays, its keyword arguments are fixed. Apply it last:
    outside `grad` and `vmap`, inside `jit`. What it returns is not to be differentiated.
    """

    @functools.wraps(function)
    def rewritten(*arguments, **fixed):
        if jax.default_backend() != "cpu":
            return function(*arguments, **fixed)
        closed, shapes = jax.make_jaxpr(functools.partial(function, **fixed), return_shape=True)(
            *arguments
        )
        results = _evaluate(closed.jaxpr, closed.consts, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return rewritten


def keep_compiled() -> None:
    """Keeps compiled programs on disk from now on, so that the next start of a script need not
    compile them again.

    In `kept.folder`, or where the environment's JAX_COMPILATION_CACHE_DIR says;
    JAX_ENABLE_COMPILATION_CACHE=false turns it off. Where there is no home, or it cannot be
    written, nothing is kept.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = kept.folder()
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _evaluate(jaxpr: Jaxpr, consts: Sequence, *arguments) -> list:
    """The results of `jaxpr`, what is slow in it by other means."""
    values = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(
        zip(jaxpr.invars, arguments, strict=True)
    )
    for equation in jaxpr.eqns:
        inputs = [v.val if isinstance(v, Literal) else values[v] for v in equation.invars]
        name, parameters = equation.primitive.name, equation.params
        if name == "conv_general_dilated":
            results = [_convolution(*inputs, **parameters)]
        elif name == "broadcast_in_dim" and _of_examples(equation.invars[0].aval, **parameters):
            results = _bind(equation, [_settled(inputs[0]), *inputs[1:]], parameters)
        elif name == "reduce_sum" and _over_examples(equation.invars[0].aval, **parameters):
            results = [_sum_over_examples(*inputs)]
        elif not _has_work(equation):
            results = _bind(equation, inputs, parameters)
        elif name in ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call"):
            inner = parameters["jaxpr"] if "jaxpr" in parameters else parameters["call_jaxpr"]
            results = _evaluate(inner.jaxpr, inner.consts, *inputs)
        else:  # loops, branches, rematerialisation: they stay, with other bodies
            changed = {key: _rewritten(value) for key, value in parameters.items()}
            results = _bind(equation, inputs, changed)
        values.update(zip(equation.outvars, results, strict=True))
    return [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]


def _bind(equation, inputs, parameters) -> list:
    # a pair in some versions of JAX, a dict in others
    bound = equation.primitive.get_bind_params(parameters)
    functions, named = bound if isinstance(bound, tuple) else ((), bound)
    results = equation.primitive.bind(*functions, *inputs, **named)
    return list(results) if equation.primitive.multiple_results else [results]


def _rewritten(value):
    """`value` with the jaxprs in it rewritten; anything else as it is."""
    if isinstance(value, tuple | list):
        changed = map(_rewritten, value)
        # named tuples too
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    if not isinstance(value, ClosedJaxpr | Jaxpr):
        return value
    inner, consts = (value.jaxpr, value.consts) if isinstance(value, ClosedJaxpr) else (value, ())
    found = jax.make_jaxpr(functools.partial(_evaluate, inner, consts))(
        *(v.aval for v in inner.invars)
    )
    if isinstance(value, ClosedJaxpr):
        return found
    # where constants have no place, it stays as it was
    return value if found.consts else found.jaxpr


def _has_work(equation) -> bool:
    """Is there anything in the bodies of this loop, branch or call that may be rewritten?"""
    return any(
        inner.primitive.name in ("conv_general_dilated", "reduce_sum", "broadcast_in_dim")
        or _has_work(inner)
        for jaxpr in jaxprs_in(tuple(equation.params.values()))
        for inner in jaxpr.eqns
    )


def jaxprs_in(value):
    """The jaxprs in a parameter of an equation, or in a tuple of such."""
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from jaxprs_in(part)


# --------------------------------------------------------------------------------------------- sums


def _of_examples(x, shape, broadcast_dimensions, **_) -> bool:
    """Is this one number an example, spread over many?"""
    return (
        x.dtype == jnp.float32
        and x.ndim > 0
        and x.size == x.shape[0] > 1
        and broadcast_dimensions[0] == 0
        and math.prod(shape) >= MANY * x.size
    )


def _settled(x):
    """`x`, computed once.

    It becomes a sum over itself and nothing, because XLA fuses no such sum into what uses it.
    (Radii and their gradients are long chains of operations on one number an example. Fused, XLA
    goes through them for every pixel.)
    """
    alone = jax.lax.reduce_window(
        x.reshape(-1, 1), np.float32(0), jax.lax.add, (1, 2), (1, 1), ((0, 0), (1, 0))
    )
    return alone.reshape(x.shape)


def _over_examples(x, axes, **_) -> bool:
    return tuple(axes) == (0,) and x.ndim > 1 and x.dtype == jnp.float32


def _sum_over_examples(x):
    """``sum(x, 0)`` as a product with ones, which is quick (the backend's own sum over the slowest
    axis is not)."""
    ones = jnp.ones((1, x.shape[0]), x.dtype)
    product = jax.lax.dot_general(
        ones, x.reshape(x.shape[0], -1), (((1,), (0,)), ((), ())), precision="highest"
    )
    return product.reshape(x.shape[1:])


# ------------------------------------------------------------------------------------- convolutions


def _convolution(images, kernel, **parameters):
    """`lax.conv_general_dilated`, by other means where that is quicker."""
    lhs, rhs, out = (tuple(spec) for spec in parameters["dimension_numbers"])
    rank = len(lhs) - 2
    spatial = tuple(range(1, rank + 1))
    plain = parameters["feature_group_count"] == parameters["batch_group_count"] == 1
    if plain and rank and images.dtype == kernel.dtype == jnp.float32:
        # What transposing a convolution with respect to its kernel gives: it contracts the
        # examples.
        over_examples = (rank + 1, 0, *spatial)
        if lhs == rhs == over_examples:
            found = _kernel_gradient(images, kernel, parameters)  # (*window, channels, outputs)
            return jnp.transpose(
                found, [(rank, rank + 1, *range(rank))[out.index(axis)] for axis in range(rank + 2)]
            )
        # What transposing a strided one with respect to its images gives: zeros between the pixels.
        last = (0, rank + 1, *spatial)
        dilated = any(d > 1 for d in parameters["lhs_dilation"])
        if lhs == out == last:
            kernel = jnp.transpose(kernel, (*rhs[2:], rhs[1], rhs[0]))  # (*window, inputs, outputs)
            if dilated and all(s == 1 for s in parameters["window_strides"]):
                return _transposed_strided(images, kernel, parameters)
            return _quick(images, kernel, parameters)
    return jax.lax.conv_general_dilated_p.bind(images, kernel, **parameters)


def _kernel_gradient(images, cotangent, parameters):
    """``(*window, channels, outputs)`` from ``(examples, *size, channels)`` and ``(examples,
    *count, outputs)``.

    At kernel position t the sum over examples and pixels of ``images[t + strides * pixel]
    cotangent[pixel]``: a matrix product of what the position sees with the cotangent. One position
    after the other, or all of them would be in memory at once; and by whole strides, as a loop
    cannot slice otherwise.
    """
    rank = images.ndim - 2
    pads = [
        (low, high, d - 1)
        for (low, high), d in zip(parameters["padding"], parameters["lhs_dilation"], strict=True)
    ]
    images = jax.lax.pad(images, np.float32(0), [(0, 0, 0), *pads, (0, 0, 0)])
    examples, *sizes, channels = images.shape
    counts, strides, steps = (
        cotangent.shape[1:-1],
        parameters["rhs_dilation"],
        parameters["window_strides"],
    )
    window = [
        (n - (c - 1) * s - 1) // q + 1
        for n, c, s, q in zip(sizes, counts, strides, steps, strict=True)
    ]
    right = cotangent.reshape(-1, cotangent.shape[-1])

    def product(part):
        left = part.reshape(-1, part.shape[-1])
        return jax.lax.dot_general(
            left, right, (((0,), (0,)), ((), ())), precision=parameters["precision"]
        )

    if math.prod(window) * channels <= COLUMNS:  # thin images: one product is quicker
        seen = []
        for position in itertools.product(*map(range, window)):
            first = [t * q for t, q in zip(position, steps, strict=True)]
            last = [f + (c - 1) * s + 1 for f, c, s in zip(first, counts, strides, strict=True)]
            seen.append(
                jax.lax.slice(images, [0, *first, 0], [examples, *last, channels], [1, *strides, 1])
            )
        found = product(jnp.concatenate(seen, axis=-1))
    else:
        # Pixels with the same residue by the strides lie together: (*strides, examples, *blocks,
        # channels).
        images = jnp.pad(
            images, [(0, 0), *((0, -n % s) for n, s in zip(sizes, strides, strict=True)), (0, 0)]
        )
        blocks = [-(-n // s) for n, s in zip(sizes, strides, strict=True)]
        split = [size for pair in zip(blocks, strides, strict=True) for size in pair]
        order = (*range(2, 2 * rank + 1, 2), 0, *range(1, 2 * rank, 2), 2 * rank + 1)
        images = images.reshape(examples, *split, channels).transpose(order)

        def at_position(i, found):
            position = jnp.unravel_index(i, window)
            offsets = [t * q for t, q in zip(position, steps, strict=True)]
            residues = [o % s for o, s in zip(offsets, strides, strict=True)]
            first = [o // s for o, s in zip(offsets, strides, strict=True)]
            shape = (*(1,) * rank, examples, *counts, channels)
            part = jax.lax.dynamic_slice(images, (*residues, 0, *first, 0), shape)
            return found.at[i].set(product(part))

        found = jnp.zeros((math.prod(window), channels, cotangent.shape[-1]), jnp.float32)
        found = jax.lax.fori_loop(0, math.prod(window), at_position, found)
    return found.reshape(*window, channels, cotangent.shape[-1])


def _quick(images, kernel, parameters):
    """The convolution of channels-last images with a kernel ``(*window, inputs, outputs)``.

    The barrier keeps XLA from taking a reversed or transposed kernel for an operand as it was
    before: such a convolution is slow.
    """
    rank = images.ndim - 2
    spatial = tuple(range(1, rank + 1))
    layout = jax.lax.ConvDimensionNumbers(
        (0, rank + 1, *spatial), (rank + 1, rank, *range(rank)), (0, rank + 1, *spatial)
    )
    changed = {**parameters, "dimension_numbers": layout}
    return jax.lax.conv_general_dilated_p.bind(
        images, jax.lax.optimization_barrier(kernel), **changed
    )


def _transposed_strided(images, kernel, parameters):
    """A convolution of images with ``s - 1`` zeros between their pixels: output pixel ``s q + r``
    meets the kernel only at every s-th position, beginning at r, so all residues r are one
    convolution to ``s^rank`` times the channels."""
    rank = images.ndim - 2
    *window, inputs, outputs = kernel.shape
    apart, spread = parameters["lhs_dilation"], parameters["rhs_dilation"]
    if any(d > 1 for d in spread):
        zero_filled = [(0, 0, d - 1) for d in spread]
        kernel = jax.lax.pad(kernel, np.float32(0), [*zero_filled, (0, 0, 0), (0, 0, 0)])
        window = list(kernel.shape[:rank])
    # now output pixel y of the full result meets it at y - s * pixel
    kernel = jnp.flip(kernel, tuple(range(rank)))
    taps = [-(-k // s) for k, s in zip(window, apart, strict=True)]
    kernel = jnp.pad(
        kernel,
        [*((0, n * s - k) for n, s, k in zip(taps, apart, window, strict=True)), (0, 0), (0, 0)],
    )
    split = [size for pair in zip(taps, apart, strict=True) for size in pair]
    order = (*range(0, 2 * rank, 2), 2 * rank, *range(1, 2 * rank, 2), 2 * rank + 1)
    kernel = kernel.reshape(*split, inputs, outputs).transpose(order)
    kernel = jnp.flip(kernel.reshape(*taps, inputs, -1), tuple(range(rank)))
    ones = (1,) * rank
    found = _quick(
        images,
        kernel,
        {
            **parameters,
            "padding": tuple((n - 1, n - 1) for n in taps),
            "lhs_dilation": ones,
            "rhs_dilation": ones,
        },
    )
    blocks = found.shape[1:-1]
    found = found.reshape(found.shape[0], *blocks, *apart, outputs)
    order = (0, *(axis for i in range(rank) for axis in (1 + i, 1 + rank + i)), 2 * rank + 1)
    found = found.transpose(order).reshape(
        found.shape[0], *map(math.prod, zip(blocks, apart, strict=True)), outputs
    )
    # The full result begins window - 1 pixels before the first image pixel; the padding that was
    # asked for, elsewhere.
    cut = []
    for size, k, n, s, (low, high) in zip(
        images.shape[1:-1], window, blocks, apart, parameters["padding"], strict=True
    ):
        wanted = (size - 1) * s + 1 + low + high - k + 1
        cut.append((low - (k - 1), wanted - (n * s + low - (k - 1)), 0))
    return jax.lax.pad(found, np.float32(0), [(0, 0, 0), *cut, (0, 0, 0)])
