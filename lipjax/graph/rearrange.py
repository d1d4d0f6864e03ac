"""Rearrangements: several parts of one node as one, and which two are equal."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lipjax.graph.nodes import Node, Positions, Rearrange, Step

Steps = tuple[Step, ...]
Constants = tuple[tuple[Any, ...], ...]


def only_reshapes(steps: Steps) -> bool:
    """Do they keep the entries in their order?"""
    return all(step.primitive.name in ("reshape", "squeeze") for step in steps)


def shortened(steps: Steps, constants: Constants) -> tuple[Steps, Constants]:
    """Reshapes in a row as one, transpositions likewise."""
    kept: list = []
    for step, constant in zip(steps, constants, strict=True):
        name = step.primitive.name
        before = kept[-1][0] if kept else None
        if name == "reshape" and before is not None and before.primitive.name == "reshape":
            kept.pop()
        elif name == "transpose" and before is not None and before.primitive.name == "transpose":
            first = dict(before.parameters)["permutation"]
            order = tuple(first[axis] for axis in dict(step.parameters)["permutation"])
            kept.pop()
            if order == tuple(range(len(order))):
                continue
            step = Step(step.primitive, (("permutation", order),))
        kept.append((step, constant))
    return tuple(step for step, _ in kept), tuple(constant for _, constant in kept)


def identity(constants: Sequence[Any]) -> tuple:
    """Equal for equal constants, so that equal nodes are made once."""
    found: list[tuple] = []
    for constant in constants:
        if isinstance(constant, Positions):
            found.append(("positions", constant))
        elif isinstance(constant, jax.core.Tracer):
            found.append(("traced", id(constant)))
        else:
            array = np.asarray(constant)
            found.append((array.shape, str(array.dtype), array.tobytes()))
    return tuple(found)


def together(
    nodes: Sequence[Node], parts: Sequence[int], axis: int
) -> tuple[int, Steps, Constants] | None:
    """Parts of one node, concatenated, as one rearrangement of it.

    So it is known how often an entry occurs in all parts together.

    Args:
        nodes: of the graph.
        parts: positions of those that are concatenated along `axis`.

    Returns:
        The node that they come from, the steps and their constants; no steps where it is the whole
        node as it stands. None: they come from several nodes, or something fills them.
    """
    sources = {_source(nodes[i], i) for i in parts}
    if len(sources) != 1 or None in sources:
        return None

    (source,) = sources
    assert source is not None
    shape, size = nodes[source].shape, nodes[source].size
    numbers = np.arange(size, dtype=np.int32).reshape(shape)
    seen = [numbers if i == source else _moved(nodes[i], numbers) for i in parts]
    positions = np.concatenate(seen, axis)
    if positions.size == 0 or positions.min() < 0 or positions.max() >= size:
        return None  # out of bounds, where JAX may fill

    flat = Step(lax.reshape_p, _parameters(new_sizes=(size,), dimensions=None, sharding=None))
    if np.array_equal(positions.reshape(-1), numbers.reshape(-1)):
        if positions.shape == shape:
            return source, (), ()
        sizes = _parameters(new_sizes=positions.shape, dimensions=None, sharding=None)
        return source, (Step(lax.reshape_p, sizes),), ((),)

    gather = Step(
        lax.gather_p,
        _parameters(
            dimension_numbers=lax.GatherDimensionNumbers((), (0,), (0,)),
            slice_sizes=(1,),
            indices_are_sorted=False,
            unique_indices=False,
            mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
            fill_value=None,
        ),
    )
    return source, (flat, gather), ((), (Positions(positions[..., None]),))


def _parameters(**named) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(named.items()))


def _source(node: Node, position: int) -> int | None:
    """The node that its entries come from; None where there are several, or something fills."""
    if not isinstance(node, Rearrange):
        return position
    if len(node.inputs) != 1 or node.roundings > 0:
        return None
    if not all(isinstance(c, Positions) for constants in node.constants for c in constants):
        return None
    return node.inputs[0]


def _moved(node: Node, numbers: np.ndarray) -> np.ndarray:
    assert isinstance(node, Rearrange)
    with jax.ensure_compile_time_eval():
        return np.asarray(node(jnp.asarray(numbers)))
