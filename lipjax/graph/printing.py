"""A graph as the table that people know from model summaries."""

import jax
import numpy as np

from lipjax.graph.nodes import Activation, Add, Graph, Input, Linear, Node, Rearrange

HEAD = ("", "node", "reads", "shape", "computed in", "parameters", "bounded by", "where")


def table(graph: Graph) -> str:
    """One line a node: position, kind, what it reads, shape, arithmetic, parameters, the way in
    which it is bounded, and the line of the program."""
    rows = [HEAD, *(_row(i, node) for i, node in enumerate(graph.nodes))]
    widths = [max(len(row[k]) for row in rows) for k in range(len(HEAD))]
    lines = [_line(row, widths) for row in rows]
    total = sum(_parameters(node) for node in graph.nodes)
    kinds = f"{len(graph.linear)} linear nodes, {total:,} parameters"
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], kinds])


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()


def _row(position: int, node: Node) -> tuple[str, ...]:
    return (
        str(position),
        _kind(node),
        ", ".join(map(str, node.inputs)),
        "×".join(map(str, node.shape)) or "()",
        node.dtype,
        f"{_parameters(node):,}" if _parameters(node) else "",
        _bounded(node),
        node.where,
    )


def _bounded(node: Node) -> str:
    if isinstance(node, Linear):
        return "norm of W"
    if isinstance(node, Activation):
        return node.rule.bounded
    if isinstance(node, Rearrange):
        return "exact" if node.copies <= 1 else f"exact, {node.copies} copies"
    if isinstance(node, Add):
        return "sum of bounds" if len(node.inputs) > 1 else "exact"
    return "the ball"


def _kind(node: Node) -> str:
    if isinstance(node, Linear):
        more = f", {len(node.parts) - 1} joined" if node.parts else ""
        return f"Linear ({type(node.operator.apply).__name__}{more})"
    if isinstance(node, Activation):
        return f"Activation ({node.rule.kind})"
    if isinstance(node, Rearrange):
        return f"Rearrange ({', '.join(map(repr, node.steps))})"
    if isinstance(node, Add) and len(node.inputs) == 1:
        return "Cast" if node.constant is None and node.signs == (1,) else "Add (constant)"
    if isinstance(node, Add):
        return "Add"
    assert isinstance(node, Input)
    return "Input"


def _parameters(node: Node) -> int:
    if isinstance(node, Rearrange):
        return 0  # positions
    held = node.parts if isinstance(node, Linear) and node.parts else node
    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(held))
