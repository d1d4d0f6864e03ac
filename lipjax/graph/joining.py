"""Scales and shifts behind a linear node become one linear node with it.

Batch normalisation in inference costs no norm of its own in that way: that of ``diag(s) W`` is
taken, not ``max |s|`` times that of W. What the program executes stays known, as `Linear.parts`.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from lipjax.graph.linear import Convolution, LinearOperator, Product, Reshaped, Scale
from lipjax.graph.nodes import Add, Executed, Graph, Linear


def shifted(
    node: Linear, constant, executed: tuple[Executed, ...], roundings: float, where: str
) -> Linear:
    """A linear node and ``+ constant`` behind it; the constant is broadcastable to its shape."""
    last = node.parts[-1] if node.parts else node
    if isinstance(last, Linear) and last.operator.bias is None:
        ended = dataclasses.replace(
            last,
            operator=dataclasses.replace(last.operator, bias=constant),
            executed=(*last.executed, *executed),
            roundings=max(last.roundings, roundings),
        )
        return _required((*node.parts[:-1], ended)) if node.parts else ended
    step = Add(
        inputs=(0,),
        shape=node.shape,
        dtype=node.dtype,
        where=where,
        executed=executed,
        signs=(1,),
        constant=constant,
        roundings=roundings,
        joined=True,
    )
    return _required((*(node.parts or (node,)), step))


def scaled(
    node: Linear, factor, executed: tuple[Executed, ...], roundings: float, where: str
) -> Linear | None:
    """A linear node and ``* factor`` behind it; None: the product is not made of one kernel."""
    step = Linear(
        inputs=(0,),
        shape=node.shape,
        dtype=node.dtype,
        where=where,
        executed=executed,
        operator=LinearOperator(Scale(), factor),
        roundings=roundings,
        joined=True,
    )
    return composed((*(node.parts or (node,)), step))


def rejoined(graph: Graph) -> Graph:
    """The same with all that is joined computed anew, in the types that its parts have now."""
    nodes = [
        dataclasses.replace(node, operator=_required(node.parts).operator)
        if isinstance(node, Linear) and node.parts
        else node
        for node in graph.nodes
    ]
    return dataclasses.replace(graph, nodes=tuple(nodes))


def _required(parts: tuple[Linear | Add, ...]) -> Linear:
    found = composed(parts)
    assert found is not None  # these parts were joined before
    return found


def composed(parts: tuple[Linear | Add, ...]) -> Linear | None:
    """One linear node for a linear one and the scales and shifts behind it; None: the product is
    not made of one kernel."""
    first = parts[0]
    assert isinstance(first, Linear)
    operator = first.operator
    for part in parts[1:]:
        if isinstance(part, Linear):
            product = _times(operator, part.operator.kernel, first.shape)
            if product is None:
                return None
            operator, shift = product, part.operator.bias
        else:
            assert isinstance(part, Add)
            shift = part.constant
        if shift is not None:
            bias = shift if operator.bias is None else operator.bias + shift
            operator = dataclasses.replace(operator, bias=bias)
    return dataclasses.replace(
        first,
        executed=tuple(equation for part in parts for equation in part.executed),
        roundings=max(part.roundings for part in parts),
        operator=operator,
        parts=parts,
    )


def _times(operator: LinearOperator, factor, shape: tuple[int, ...]) -> LinearOperator | None:
    """``diag(factor) W`` by one kernel, and the bias; None where it would need more entries than
    the kernel has."""
    across = _across(operator, factor, shape)
    if across is None:
        return None
    bias, norms = operator.bias, operator.kernel_row_norms
    return dataclasses.replace(
        operator,
        kernel=operator.kernel * across,
        bias=None if bias is None else bias * factor,
        kernel_row_norms=None if norms is None else norms * jnp.abs(factor),
    )


def _across(operator: LinearOperator, factor, shape: tuple[int, ...]):
    """The factor, one number an output, as it multiplies the kernel."""
    apply, kernel = operator.apply, operator.kernel
    if np.size(factor) == 1:
        return jnp.reshape(factor, ())
    if type(apply) is Reshaped:
        factor = jnp.broadcast_to(factor, shape).reshape(apply.before)
        inner = dataclasses.replace(operator, apply=apply.inner)
        return _across(inner, factor, apply.before)
    if type(apply) is Scale:
        return factor
    # The axes of the output that are axes of the kernel.
    if type(apply) is Convolution:
        free = [kernel.ndim - 1]
    elif type(apply) is Product and not apply.numbers[1][0]:
        contracted = apply.numbers[0][0 if apply.kernel_first else 1]
        free = [axis for axis in range(kernel.ndim) if axis not in contracted]
    else:
        return None
    start = 0 if isinstance(apply, Product) and apply.kernel_first else len(shape) - len(free)
    sizes = (1,) * (len(shape) - np.ndim(factor)) + np.shape(factor)
    own = sizes[start : start + len(free)]
    if np.prod(own) != np.size(factor):
        return None
    placed = [1] * kernel.ndim
    for axis, size in zip(free, own, strict=True):
        placed[axis] = size
    return jnp.reshape(factor, placed)
