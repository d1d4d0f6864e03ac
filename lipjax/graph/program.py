"""A plain description of a graph as a function again, which JAX traces to that description."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Described = Sequence[Mapping[str, Any]]


@jax.tree_util.register_static
class Program:
    """A function that computes what a description says, equation by equation, in its types.

    To JAX a value without arrays, so that it can be an argument under `jit` as a network can.

    Attributes:
        nodes: as `lipjax.graph.description.described` writes them.
        activations: by the kind of a node: ``(x, node) -> value``.
    """

    def __init__(self, nodes: Described, activations: Mapping[str, Callable]):
        self.nodes = list(nodes)
        self.activations = activations

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.nodes[0]["shape"])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Of one example, or of a batch on the first axis.

        Raises:
            TypeError, ValueError: x is of another type or shape than the function was traced on.
        """
        x = jnp.asarray(x)
        if str(x.dtype) != self.nodes[0]["dtype"]:
            raise TypeError(f"expected {self.nodes[0]['dtype']}, got an input of type {x.dtype}.")
        if x.shape == self.input_shape:
            return self._one(x)
        if x.shape[1:] == self.input_shape:
            return jax.vmap(self._one)(x)
        raise ValueError(
            f"expected an input of shape {self.input_shape}, or a batch of such, got {x.shape}."
        )

    def _one(self, x: jax.Array) -> jax.Array:
        values: list[Any] = []
        for node in self.nodes:
            inputs = [values[i] for i in node["inputs"]]
            kind = node["kind"]
            if kind == "input":
                values.append(x)
            elif kind in _COMPUTE:
                values.append(_COMPUTE[kind](node, *inputs))
            else:
                values.append(self.activations[kind](*inputs, node))
        return values[-1]

    def __repr__(self) -> str:
        return f"Program({len(self.nodes)} nodes, on {self.input_shape})"


def _affine(node, y):
    """The bias, and the shape of the node."""
    if node["bias"] is not None:
        bias = node["bias"]
        if bias.ndim and y.shape != tuple(node["shape"]):
            bias = np.broadcast_to(bias, node["shape"]).reshape(y.shape)
        subtracted = node["executed"][-1][0] == "sub"
        y = y - (-bias) if subtracted else y + bias
    return _shaped(node, y)


def _shaped(node, y):
    shape = tuple(node["shape"])
    return y if y.shape == shape else lax.reshape(y, shape)


def _algorithm(precision: str | None):
    """A precision as JAX takes it."""
    if precision is None:
        return None
    if precision.startswith("algorithm"):
        return jax.lax.DotAlgorithmPreset[precision.rpartition(" ")[2].rpartition(".")[2]]
    found = tuple(jax.lax.Precision[name] for name in precision.split("/"))
    return found[0] if len(found) == 1 else found


def _settings(node) -> dict[str, Any]:
    *_, precision, accumulate = node["executed"][0]
    kept = None if accumulate is None else jnp.dtype(accumulate)
    return {"precision": _algorithm(precision), "preferred_element_type": kept}


def _product(node, x):
    operands = (node["kernel"], x) if node["kernel_first"] else (x, node["kernel"])
    numbers = tuple(tuple(tuple(axes) for axes in pair) for pair in node["numbers"])
    return _affine(node, lax.dot_general(*operands, numbers, **_settings(node)))


def _convolution(node, x):
    kernel = node["kernel"]
    axes = "".join("0123456789"[i] for i in range(kernel.ndim - 2))
    y = lax.conv_general_dilated(
        lax.reshape(x, (1, *x.shape)),
        kernel,
        node["strides"],
        [tuple(pair) for pair in node["padding"]],
        lhs_dilation=node["input_dilation"],
        rhs_dilation=node["dilation"],
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        feature_group_count=node["groups"],
        **_settings(node),
    )
    return _affine(node, lax.reshape(y, y.shape[1:]))


def _scaled(x, kernel, equation: str):
    """Times the kernel; by a division where the program divided and that gives the same kernel."""
    divisor = (1 / kernel).astype(kernel.dtype)
    if equation == "div" and np.array_equal((1 / divisor).astype(kernel.dtype), kernel):
        return x / divisor
    return x * kernel


def _scale(node, x):
    executed = [equation[0] for equation in node["executed"]]
    if not executed:  # the identity behind a function that ends otherwise
        return x
    return _affine(node, _scaled(x, node["kernel"], executed[0]))


def _sum(node, x):
    executed = [equation[0] for equation in node["executed"]]
    zero = np.zeros((), x.dtype)
    if executed[0] == "reduce_sum":
        axes = [k for k, width in enumerate(node["window"]) if width > 1 or x.shape[k] == 1]
        y = lax.reduce(x, zero, lax.add, axes)
    else:
        y = lax.reduce_window(
            x,
            zero,
            lax.add,
            node["window"],
            node["strides"],
            [tuple(pair) for pair in node["padding"]],
            node["base_dilation"],
            node["dilation"],
        )
    y = _shaped({"shape": node["shape"]}, y) if y.size == math.prod(node["shape"]) else y
    if len(executed) > 1 and executed[1] in ("mul", "div"):
        y = _scaled(y, node["kernel"], executed[1])
    return _affine(node, y)


def _move(node, *values):
    """Positions in all values, one behind the other; what fills stands behind them."""
    index, fill = node["index"], node["fill"]
    if index.size and np.all(index < 0):
        return fill.reshape(index.shape)  # nothing of the example
    flat = [lax.reshape(value, (value.size,)) for value in map(jnp.asarray, values)]
    joined = flat[0] if len(flat) == 1 else lax.concatenate(flat, 0)
    if np.array_equal(index.reshape(-1), np.arange(joined.size)):
        return lax.reshape(joined, index.shape)
    filled = index < 0
    places = index.copy()
    if fill.size:
        numbers, which = np.unique(fill, return_inverse=True)
        places[filled] = joined.size + which.reshape(-1)
        for number in numbers:
            joined = lax.pad(joined, number, ((0, 1, 0),))
    return joined.at[places].get(mode="promise_in_bounds")


def _add(node, *values):
    constant, executed = node["constant"], [equation[0] for equation in node["executed"]]
    if len(values) == 1 and constant is None:
        (value,) = values
        value = value if node["signs"][0] == 1 else -value
        return value.astype(jnp.dtype(node["dtype"]))
    if constant is None:
        first, second = values
        if node["signs"][0] == -1:
            first = -first
        return first + second if node["signs"][1] == 1 else first - second
    (value,) = values
    if node["signs"][0] == -1:
        return constant - value
    if not executed:  # a constant of the program
        return np.broadcast_to(constant, node["shape"])
    return value - (-constant) if executed[0] == "sub" else value + constant


_COMPUTE: dict[str, Callable] = {
    "product": _product,
    "conv": _convolution,
    "scale": _scale,
    "sum": _sum,
    "move": _move,
    "add": _add,
}
KNOWN = ("input", *_COMPUTE)
