"""The nodes of a graph: what a traced function does to one example.

A graph is a pytree. The arrays in it (weights, biases, thresholds) are its leaves, so it goes
through `jit`, `grad` and `vmap`; what is static is compared by value.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from lipjax.graph.linear import LinearOperator, Reshaped, Scale


@dataclasses.dataclass(frozen=True)
class Executed:
    """The arithmetic of one equation, as JAX has written it down.

    Attributes:
        primitive: its name, e.g. "dot_general".
        operands: types of what goes in.
        result: type of what comes out.
        precision: of a product, as `repr` writes it; None for the device's default.
        accumulate: type that a product was asked to be summed in; None if nothing was asked.
        product: is it a sum of products (else it rounds entry by entry, or a sum once an addend)?
    """

    primitive: str
    operands: tuple[str, ...]
    result: str
    precision: str | None = None
    accumulate: str | None = None
    product: bool = False


@dataclass_transform(frozen_default=True, kw_only_default=True)
def _node(*data: str):
    """A frozen dataclass that is a pytree with these fields as children."""

    def register(cls):
        cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        static = [field.name for field in dataclasses.fields(cls) if field.name not in data]
        jax.tree_util.register_dataclass(cls, data_fields=list(data), meta_fields=static)
        return cls

    return register


@_node()
class Node:
    """One step of a graph.

    Attributes:
        inputs: positions of the nodes that it reads.
        shape: of its value, for one example.
        dtype: of its value, as executed.
        where: the line of the user's program that it comes from.
        executed: the equations that it stands for and that round.
    """

    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    where: str = ""
    executed: tuple[Executed, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@_node()
class Input(Node):
    """The example."""


@_node("operator", "parts")
class Linear(Node):
    """``W x + b`` with W and b that do not depend on the example.

    Attributes:
        operator: the map.
        parts: what the program executes, if that is a linear node and scales and shifts behind it
            (`lipjax.graph.joining`): `Linear` and `Add` nodes in order, each reads the one before.
            Empty: the operator as it stands.
        joined: is it such a scale itself?
        roundings: of kernel and bias: 0 if they are parameters as they stand, only moved and cast;
            else how many units of roundoff they may differ by, entry by entry, when the program
            computes them anew; infinity where nothing is known.
    """

    operator: LinearOperator
    roundings: float = 0.0
    parts: "tuple[Linear | Add, ...]" = ()
    joined: bool = False


@dataclasses.dataclass(frozen=True)
class Step:
    """One JAX primitive that only moves entries, with its parameters."""

    primitive: Any
    parameters: tuple[tuple[str, Any], ...]

    def __call__(self, *values: jax.Array) -> jax.Array:
        found = self.primitive.bind(*values, **dict(self.parameters))
        return found[0] if self.primitive.multiple_results else found

    def __repr__(self) -> str:
        return self.primitive.name


@jax.tree_util.register_static
class Positions:
    """Where a Rearrange takes entries from: integers, compared by value. No leaf of the graph, so
    that nothing casts them."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self._key = (array.shape, str(array.dtype), array.tobytes())

    def __eq__(self, other) -> bool:
        return isinstance(other, Positions) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@_node("constants")
class Rearrange(Node):
    """Entries of its inputs in other places, some several times, some not at all: exact.

    Attributes:
        steps: in order of application; the first takes all inputs, each other the result before it.
        constants: per step a tuple of further operands: `Positions`, and what fills (of a pad).
        copies: in how many places the most frequent entry of the inputs ends.
        roundings: of the constants, as in `Linear`.
    """

    steps: tuple[Step, ...]
    constants: tuple[tuple[Any, ...], ...]
    copies: int = 1
    roundings: float = 0.0

    def __call__(self, *values: jax.Array) -> jax.Array:
        return _rearranged(self.steps, self.constants, values)

    @property
    def pure(self) -> bool:
        """Is it only another shape of its one input?"""
        names = [step.primitive.name for step in self.steps]
        return all(name in ("reshape", "squeeze") for name in names)

    def transposed(self, values: jax.Array, *shapes: tuple[int, ...]) -> tuple[jax.Array, ...]:
        """What values behind it add up to on each of its inputs, which have these shapes."""
        if self.pure:
            return (values.reshape(shapes[0]),)
        likes = [jax.ShapeDtypeStruct(shape, values.dtype) for shape in shapes]
        return tuple(jax.linear_transpose(self.linear, *likes)(values))

    def reached(self, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Mask over its one input, of this shape: the entries that come to where `mask` is True."""
        if self.pure:
            return mask.reshape(shape)
        return self.transposed(mask.astype(jnp.float32), shape)[0] > 0

    def linear(self, *values: jax.Array) -> jax.Array:
        """The same without what fills: only what moves."""
        for step, constants in zip(self.steps, self.constants, strict=True):
            nothing = (_like(values[0], c, filling=0) for c in constants)
            values = (step(*values, *nothing),)
        return values[0]


@dataclasses.dataclass(frozen=True)
class Moved:
    """``(kernel, x)`` to the image of x by another map, its entries in other places. Hashable, as
    all maps of `LinearOperator`, and so with nothing traced: 0 in the place of what fills.

    Attributes:
        apply: the other map.
        steps, constants: of a `Rearrange`.
    """

    apply: Callable[[jax.Array, jax.Array], jax.Array]
    steps: tuple[Step, ...]
    constants: tuple[tuple[Any, ...], ...]

    def __call__(self, kernel: jax.Array, x: jax.Array) -> jax.Array:
        return _rearranged(self.steps, self.constants, (self.apply(kernel, x),))


def moved(operator: LinearOperator, node: Rearrange) -> LinearOperator:
    """The map and the rearrangement of its image, without what fills."""
    constants = tuple(
        tuple(c if isinstance(c, Positions) else 0.0 for c in each) for each in node.constants
    )
    return LinearOperator(Moved(operator.apply, node.steps, constants), operator.kernel)


@_node("constant")
class Add(Node):
    """The sum of its inputs, each with a sign, and of a constant (0 if there is none).

    Attributes:
        signs: 1 or -1, one for each input.
        constant: broadcastable to the shape, or None.
        roundings: of the constant, as in `Linear`.
        joined: is it a part of a linear node?
    """

    signs: tuple[int, ...]
    constant: Any = None
    roundings: float = 0.0
    joined: bool = False


@_node("rule")
class Activation(Node):
    """A nonlinear function.

    Attributes:
        rule: everything that is known of it (`lipjax.activations`).
        roundings: of its parameters, as in `Linear`.
    """

    rule: Any
    roundings: float = 0.0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["nodes"],
    meta_fields=["batched", "left_out"],
)
@dataclasses.dataclass(frozen=True)
class Graph:
    """A function of one example, as nodes in the order of evaluation; the last one is its value.

    Attributes:
        nodes: the first is the `Input`.
        batched: was the function traced with a batch axis of one?
        left_out: "softmax" where the function ends in one: the value is that in front of it.
    """

    nodes: tuple[Node, ...]
    batched: bool = False
    left_out: str = ""

    def __call__(self, x: jax.Array) -> jax.Array:
        """The value at x, node by node, in the types of x and of the graph's arrays."""
        values: list[jax.Array] = []
        for node in self.nodes:
            values.append(evaluate(node, [values[i] for i in node.inputs], x))
        return values[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return self.nodes[-1].shape

    @property
    def linear(self) -> tuple[int, ...]:
        """Positions of the Linear nodes."""
        return tuple(i for i, node in enumerate(self.nodes) if isinstance(node, Linear))

    def with_head(self) -> "Graph":
        """The same function as a graph whose last node is Linear, its value with one axis.

        Margins are taken over what is in front of that node.
        """
        nodes, last = list(self.nodes), self.nodes[-1]
        if isinstance(last, Linear) and len(last.shape) == 1:
            return self
        reads = [i for node in nodes for i in node.inputs]
        if (
            isinstance(last, Rearrange)
            and last.pure
            and len(last.shape) == 1
            and isinstance(head := nodes[last.inputs[0]], Linear)
            and reads.count(last.inputs[0]) == 1
        ):
            # Only the shape of the result differs: the linear node gives it at once.
            from lipjax.graph.joining import composed

            parts = tuple(_reshaped(part, last.shape) for part in head.parts)
            ended = composed(parts) if parts else _reshaped(head, last.shape)
            if ended is not None and last.inputs[0] == len(nodes) - 2:
                ended = dataclasses.replace(ended, inputs=head.inputs)
                return dataclasses.replace(self, nodes=(*nodes[:-2], ended))
        if len(last.shape) != 1:
            raise TypeError(
                f"the value has shape {last.shape}: expected one axis, of logits or outputs. "
                "Flatten it."
            )
        identity = LinearOperator(Scale(), jnp.ones((), last.dtype))
        head = Linear(
            inputs=(len(nodes) - 1,), shape=last.shape, dtype=last.dtype, operator=identity
        )
        return dataclasses.replace(self, nodes=(*nodes, head))

    def spelled_out(self) -> "Graph":
        """The same with the parts of joined linear nodes as nodes of their own: the program as it
        is executed."""
        nodes: list[Node] = []
        places: list[int] = []
        for node in self.nodes:
            inputs = tuple(places[i] for i in node.inputs)
            parts = node.parts if isinstance(node, Linear) else ()
            for part in parts or (node,):
                nodes.append(dataclasses.replace(part, inputs=inputs))
                inputs = (len(nodes) - 1,)
            places.append(len(nodes) - 1)
        return dataclasses.replace(self, nodes=tuple(nodes))

    @property
    def linear_nodes(self) -> list[Linear]:
        """The Linear nodes, in order."""
        return [node for node in self.nodes if isinstance(node, Linear)]

    def readers(self, position: int) -> Iterator[int]:
        """Positions of the nodes that read this one."""
        return (i for i, node in enumerate(self.nodes) if position in node.inputs)

    def __str__(self) -> str:
        from lipjax.graph.printing import table

        return table(self)


def evaluate(node: Node, inputs: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    """The value of one node, given those of its inputs; x is the example."""
    if isinstance(node, Input):
        return x
    if isinstance(node, Linear):
        for part in node.parts:
            inputs = [evaluate(part, inputs, x)]
        return inputs[0] if node.parts else node.operator.affine(*inputs)
    if isinstance(node, Rearrange):
        return node(*inputs)
    if isinstance(node, Add):
        total = inputs[0] if node.signs[0] == 1 else -inputs[0]
        for sign, value in zip(node.signs[1:], inputs[1:], strict=True):
            total = total + value if sign == 1 else total - value
        if node.constant is None:
            return total
        return total + jnp.broadcast_to(node.constant, total.shape).astype(total.dtype)
    assert isinstance(node, Activation)
    return node.rule(*inputs)


def _reshaped(node: Node, shape: tuple[int, ...]):
    """A linear node, or a part of one behind the first, with a result of another shape."""

    def flat(value):
        if value is None or jnp.ndim(value) == 0:
            return value
        return jnp.broadcast_to(value, node.shape).reshape(shape)

    if isinstance(node, Add):
        return dataclasses.replace(node, constant=flat(node.constant), shape=shape)
    assert isinstance(node, Linear)
    operator = dataclasses.replace(node.operator, bias=flat(node.operator.bias))
    if node.joined:
        operator = dataclasses.replace(operator, kernel=flat(operator.kernel))
    else:
        apply = Reshaped(operator.apply, node.shape, shape)
        operator = dataclasses.replace(operator, apply=apply, kernel_row_norms=None)
    return dataclasses.replace(node, operator=operator, shape=shape)


def _rearranged(steps, constants, values: tuple[jax.Array, ...]) -> jax.Array:
    """The steps of a `Rearrange`, one behind the other."""
    for step, operands in zip(steps, constants, strict=True):
        values = (step(*values, *(_like(values[0], c) for c in operands)),)
    return values[0]


def _like(value: jax.Array, constant, filling=None):
    """Positions as they are; what fills in the type of what it fills, or `filling` in its place."""
    if isinstance(constant, Positions):
        return jnp.asarray(constant.array)
    return jnp.asarray(constant if filling is None else filling, value.dtype)


def most_copies(node: Rearrange, shapes: Sequence[tuple[int, ...]]) -> int:
    """How often the most frequent entry of the inputs occurs in the value of a Rearrange."""
    with jax.ensure_compile_time_eval():
        likes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        counts = jax.linear_transpose(node.linear, *likes)(jnp.ones(node.shape, jnp.float32))
        return int(max((np.max(np.asarray(count), initial=0.0) for count in counts), default=0))
