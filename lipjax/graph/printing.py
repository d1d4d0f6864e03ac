"""A graph as the table that people know from model summaries."""

import jax
import numpy as np

from lipjax.graph.nodes import Activation, Add, Graph, Input, Linear, Node, Rearrange


def table(graph: Graph) -> str:
    """One line a node: position, kind, what it reads, shape, arithmetic, parameters, source."""
    head = ("", "node", "reads", "shape", "computed in", "parameters", "where")
    rows = [head, *(_row(i, node) for i, node in enumerate(graph.nodes))]
    total = sum(_parameters(node) for node in graph.nodes)
    widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    kinds = f"{len(graph.linear)} linear nodes, {total:,} parameters"
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], kinds])


def _row(position: int, node: Node) -> tuple[str, ...]:
    return (
        str(position),
        _kind(node),
        ", ".join(map(str, node.inputs)),
        "×".join(map(str, node.shape)) or "()",
        node.dtype,
        f"{_parameters(node):,}" if _parameters(node) else "",
        node.where,
    )


def _kind(node: Node) -> str:
    if isinstance(node, Linear):
        return f"Linear ({type(node.operator.apply).__name__})"
    if isinstance(node, Activation):
        return f"Activation ({node.rule.kind})"
    if isinstance(node, Rearrange):
        return f"Rearrange ({', '.join(map(repr, node.steps))})"
    if isinstance(node, Add):
        return "Add" if len(node.inputs) > 1 else "Add (constant)" if node.constant is not None else "Cast"
    assert isinstance(node, Input)
    return "Input"


def _parameters(node: Node) -> int:
    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(node))
