"""A graph as plain data, JSON values and NumPy arrays: what certificate files and their checker
take for the function that was certified."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lipjax.graph.linear import Convolution, Product, Reshaped, Scale, Sum
from lipjax.graph.nodes import Activation, Add, Graph, Input, Linear, Node, Rearrange
from lipjax.graph.trace import trace


def describe(f, example, arithmetic: str | None = None) -> list[dict[str, Any]]:
    """The function as `lipjax.certify` certifies it, as plain data.

    Args:
        f: a function of one example, or of a batch, that JAX traces, or its graph.
        example: one example, or its shape and type, in the type of the images that `certify` was
            given. Without influence on a graph.
        arithmetic: that of the certificate: in "float64" all is traced in 64 bits.

    Raises:
        TypeError: what has no bound, or no plain description; parameters that are traced.
    """
    if isinstance(f, Graph):
        return described(f.with_head())
    wide = arithmetic == "float64"
    with jax.enable_x64(wide or jax.config.jax_enable_x64):  # type: ignore[attr-defined]
        dtype = np.dtype(np.float64) if wide else jax.dtypes.canonicalize_dtype(example.dtype)
        graph = trace(f, jax.ShapeDtypeStruct(tuple(example.shape), dtype))
    return described(graph.with_head())


def described(graph: Graph) -> list[dict[str, Any]]:
    """One dict a node, in order.

    Every dict has "kind", "inputs" (positions of nodes in front), "shape", "dtype", "executed" (the
    equations that round: ``[primitive, types of operands, type of result, precision, type that sums
    are kept in]``, None where the program leaves it open) and "roundings" (of its parameters, as in
    `Linear`). The kinds, and what else they have:

    - "input": the example.
    - "product": `kernel`, `bias` or None, `numbers` of ``dot_general``, `kernel_first`.
    - "conv": `kernel` ``(*window, inputs / groups, outputs)``, `bias`, `strides`, `padding`,
      `dilation`, `input_dilation`, `groups`; one example, channels last.
    - "scale": `kernel` and `bias`, both broadcast; `joined`: is it one linear node with that in
      front, whose norm is taken of both together?
    - "sum": over windows, times the one number `kernel`: `bias`, `window`, `strides`, `padding`,
      `dilation`, `base_dilation`; an axis that is summed away has the window of its size.
    - "move": `index`, of the value's shape: positions in the flattened inputs, one behind the
      other; -1 where a value of `fill` stands, in order.
    - "add": `signs`, `constant` or None; `joined`, of a constant.
    - "clip": `bottom`, `top`, either may be None; "maxmin": the same of the pairs.
    - Other activations: what `Rule.described` of the kind says (`lipjax.activations`).

    Raises:
        TypeError: an activation or a map without a plain description; parameters that are traced.
    """
    nodes = graph.spelled_out().nodes
    return [_described(node, nodes) for node in nodes]


def _described(node: Node, nodes: Sequence[Node]) -> dict[str, Any]:
    executed = [
        [e.primitive, list(e.operands), e.result, e.precision, e.accumulate] for e in node.executed
    ]
    return {
        **_own(node, [nodes[i] for i in node.inputs]),
        "inputs": list(node.inputs),
        "shape": list(node.shape),
        "dtype": node.dtype,
        "executed": executed,
        "roundings": float(getattr(node, "roundings", 0.0)),
    }


def _own(node: Node, before: Sequence[Node]) -> dict[str, Any]:
    """The kind of a node, and what only this kind has."""
    if isinstance(node, Input):
        return {"kind": "input"}
    if isinstance(node, Linear):
        found = _map(node.operator.apply, node.where, before[0].shape)
        if found["kind"] == "scale":
            found["joined"] = node.joined
        return {
            **found,
            "kernel": _array(node.operator.kernel, node.dtype),
            "bias": _array(node.operator.bias, node.dtype),
        }
    if isinstance(node, Rearrange):
        index, fill = positions(node, [each.shape for each in before])
        return {"kind": "move", "index": index, "fill": fill}
    if isinstance(node, Add):
        constant = _array(node.constant, node.dtype)
        return {
            "kind": "add",
            "signs": list(node.signs),
            "constant": constant,
            "joined": node.joined,
        }
    assert isinstance(node, Activation)
    found = node.rule.described()
    return {
        name: value if isinstance(value, str | int | list) else _array(value, node.dtype)
        for name, value in found.items()
    }


def _map(apply, where: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """How a linear node's kernel makes its matrix."""
    while type(apply) is Reshaped:  # of which the node's shape tells
        apply = apply.inner
    if type(apply) is Product:
        numbers = [[list(axes) for axes in pair] for pair in apply.numbers]
        return {"kind": "product", "numbers": numbers, "kernel_first": apply.kernel_first}
    if type(apply) is Convolution:
        padding = apply.padding
        return {
            "kind": "conv",
            "strides": list(apply.strides),
            "padding": padding if isinstance(padding, str) else [list(pair) for pair in padding],
            "dilation": list(apply.dilation),
            "input_dilation": list(apply.input_dilation),
            "groups": apply.groups,
        }
    if type(apply) is Scale:
        return {"kind": "scale"}
    if type(apply) is Sum:
        return {"kind": "sum", **windows(apply, where, shape)}
    raise TypeError(
        f"{where}: no plain description of a linear map by {type(apply).__name__}: it cannot be "
        "written to a certificate file. Write it with matrix products, convolutions or sums."
    )


def windows(apply: Sum, where: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """What a node "sum" has beside its kernel and bias, of an input of this shape.

    Raises:
        TypeError: a sum that is neither over axes nor over windows.
    """
    parameters, name = dict(apply.parameters), apply.primitive.name
    ones = [1] * len(shape)
    if name == "reduce_sum" and set(parameters) <= {"axes", "out_sharding"}:
        window = [n if axis in parameters["axes"] else 1 for axis, n in enumerate(shape)]
        return {
            "window": window,
            "strides": ones,
            "padding": [[0, 0] for _ in shape],
            "dilation": ones,
            "base_dilation": ones,
        }
    names = {
        "window": "window_dimensions",
        "strides": "window_strides",
        "padding": "padding",
        "dilation": "window_dilation",
        "base_dilation": "base_dilation",
    }
    if name != "reduce_window_sum" or set(parameters) != set(names.values()):
        raise TypeError(f"{where}: no plain description of a sum by {name} of {parameters}.")
    found: dict[str, Any] = {
        k: [int(n) for n in parameters[v]] for k, v in names.items() if k != "padding"
    }
    return {**found, "padding": [[int(low), int(high)] for low, high in parameters["padding"]]}


def positions(node: Rearrange, shapes: Sequence[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Where each entry comes from, and what fills: `index` and `fill` of a node "move".

    Found by running the node on positions in its inputs, which have these shapes.
    """
    starts = np.cumsum([0, *(math.prod(shape) for shape in shapes)])
    # Counted from 1, as 0 is what stands where something fills.
    numbers = [
        np.arange(1 + start, 1 + start + math.prod(shape), dtype=np.float64).reshape(shape)
        for start, shape in zip(starts, shapes, strict=False)
    ]
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        seen = np.asarray(node.linear(*(jax.numpy.asarray(p) for p in numbers)))
        filled = np.asarray(node(*(jax.numpy.zeros(shape, "float64") for shape in shapes)))
    if not np.all((seen >= 0) & (seen <= starts[-1]) & (seen == np.round(seen))):
        raise TypeError(f"{node.where}: {node.steps} does more than move entries.")
    index = seen.astype(np.int64) - 1
    fill = _array(filled[index < 0], node.dtype, cast=True)
    assert fill is not None
    return index, fill


def _array(value, dtype: str, cast: bool = False) -> np.ndarray | None:
    """A parameter as an array, in its own type; a plain number in that of the node."""
    if value is None:
        return None
    own = getattr(value, "dtype", None)
    return np.asarray(value, jax.numpy.dtype(dtype if own is None or cast else own))
