"""Reads what JAX traces: ``trace(f, example)`` is the `Graph` of a function of one example.

`jax.make_jaxpr` writes the function down as equations, each with its types and its precision. What
does not depend on the example (weights, folded statistics, kernels that are computed from free
parameters) is computed here, by JAX as always, so `jit`, `grad` and `vmap` reach the parameters.
What does depend on it becomes nodes. No layer object is asked anything, so nothing can be
overlooked; an equation without a rule is an error that names it and the user's own line.
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import Jaxpr, Literal

from lipjax.graph import joining, linear, match, rearrange, source
from lipjax.graph.known import Known, is_concrete, roundings_of
from lipjax.graph.nodes import (
    Activation,
    Add,
    Executed,
    Graph,
    Input,
    Linear,
    Node,
    Positions,
    Rearrange,
    Step,
    most_copies,
)

# Loops of at most so many rounds are written out.
LONGEST_LOOP = 256


class TraceError(TypeError):
    """The function does something of which lipjax knows no bound; the message says what and
    where."""


@dataclasses.dataclass(frozen=True)
class Ref:
    """The value of a node."""

    node: int


@dataclasses.dataclass(frozen=True)
class Test:
    """``node > threshold`` (or < where `above` is False), entry by entry; a tie is either."""

    node: int
    threshold: Known
    above: bool


Value = Known | Ref | Test


def trace(f: Callable, example, *, batched: bool | None = None) -> Graph:
    """The graph of a function of one example.

    Args:
        f: anything that JAX traces: an nnx, Linen (with its variables bound) or Equinox module, a
            closure, a plain function. It takes one example, or a batch of them on its first axis.
        example: an array, or its shape and type, as the function is given it when it is executed.
        batched: does f want a batch axis? None: found out. Without it first, then with an axis of
            one; the first that gives one axis of results.

    Raises:
        TraceError: an operation that has no rule, by name, with the line of the program.
        TypeError, ValueError: what f itself raises.
    """
    shape, dtype = tuple(example.shape), jax.dtypes.canonicalize_dtype(example.dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"the example must be floating, got {dtype}.")
    call, state = _pure(f)
    attempts = [False, True] if batched is None else [batched]
    failures = []
    for with_axis in attempts:
        like = jax.ShapeDtypeStruct((1, *shape) if with_axis else shape, dtype)
        try:
            jaxpr, (out, changed) = jax.make_jaxpr(call, return_shape=True)(like)
        except Exception as error:  # of whatever kind the user's function raises
            _explain(error)
            if len(attempts) == 1:
                raise
            failures.append(error)
            continue
        if not hasattr(out, "shape"):
            raise TypeError(f"the function must return one array, got {jax.tree.structure(out)}.")
        if with_axis and (not out.shape or out.shape[0] != 1):
            failures.append(ValueError(f"a batch of one became an array of shape {out.shape}."))
            continue
        if batched is None and not with_axis and len(out.shape) > 1:
            failures.append(
                ValueError(f"one example of shape {shape} became an array of shape {out.shape}.")
            )
            continue
        before = {path: state[path] for path in sorted(changed)}
        return _Reader(shape, dtype, with_axis).read(jaxpr, before)
    raise ValueError(
        f"the function takes neither one example of shape {shape}: {failures[0]}\n"
        f"nor a batch of one of shape {(1, *shape)}: {failures[-1]}"
    ) from failures[0]


def _explain(error: Exception) -> None:
    """Raises a clearer error in the place of some."""
    line = source.line_of_error(error)
    where = f"{line}: " if line else ""
    if isinstance(error, jax.errors.ConcretizationTypeError):
        raise TraceError(
            f"{where}Python asks for the value of something that depends on the example, as in "
            "`if x[0] > 0`: which way is taken may change inside the ball. Write it with jnp.where "
            f"or jnp.clip. JAX says: {error}"
        ) from error
    if isinstance(error, flax.errors.TraceContextError):
        raise TraceError(
            f"{where}the function changes a module that it holds, as BatchNorm and Dropout do in "
            "training mode. Put it into inference, network.eval(), or trace the module itself. "
            f"Flax says: {error}"
        ) from error


def _literal(variable: Literal) -> Known:
    """A number in an equation, in the type in which it is computed with, and rounded to it."""
    aval: Any = variable.aval
    return Known(np.asarray(variable.val, aval.dtype))


def _held(value):
    """A constant of a trace in the type in which JAX computes with it."""
    return value if isinstance(value, jax.core.Tracer) else jnp.asarray(value)


def _pure(f: Callable) -> tuple[Callable, dict[str, Any]]:
    """``x -> (f(x), changed)``, and what f holds, both by path, if it is an nnx module.

    `changed` holds what f has put in the place of it. (nnx.jit puts everything anew.)
    """
    if not isinstance(f, nnx.Module):
        # A function of its own each time: JAX keeps what it has traced of a function, and what that
        # one closes over (a dict of parameters) may have changed since.
        return lambda x: (f(x), {}), {}

    definition, state = nnx.split(f)

    def call(x):
        # A copy that belongs to the trace: a module may not be changed from inside another one.
        module = nnx.merge(definition, state, copy=True)
        before = _leaves(module)
        y = module(x)
        after = _leaves(module)
        return y, {path: after[path] for path in before if after[path] is not before[path]}

    return call, _leaves(f)


def _leaves(module: nnx.Module) -> dict[str, Any]:
    """All that it computes with, by path; not what it only writes down (`nnx.Intermediate`)."""
    state = nnx.state(module, nnx.Not(nnx.Intermediate))
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _equal(first, second) -> bool:
    if first is second:
        return True
    if not (is_concrete(first) and is_concrete(second)) or first.dtype != second.dtype:
        return False
    if jnp.issubdtype(first.dtype, jax.dtypes.prng_key):
        first, second = jax.random.key_data(first), jax.random.key_data(second)
    return np.array_equal(np.asarray(first), np.asarray(second), equal_nan=first.dtype != bool)


class _Reader:
    """Reads one jaxpr into nodes."""

    def __init__(self, shape: tuple[int, ...], dtype, batched: bool):
        self.nodes: list[Node] = [
            Input(inputs=(), shape=shape, dtype=str(dtype), where="the example")
        ]
        self.batched = batched
        self.where = ""
        self.seen: dict[Any, Ref] = {}

    # -------------------------------------------------------------------------------- the walk

    def read(self, closed, state: dict[str, Any]) -> Graph:
        """The graph; `state` holds, by path, what the function may have changed."""
        start: Value = Ref(0)
        if self.batched:
            shape = (1, *self.nodes[0].shape)
            start = self.moved([start], shape, "reshape", new_sizes=shape)
        consts = [Known(_held(c)) for c in closed.consts]
        result, *changed = self.jaxpr(closed.jaxpr, consts, [start])
        for (path, before), after in zip(state.items(), changed, strict=True):
            if not (isinstance(after, Known) and _equal(before, after.value)):
                raise TraceError(
                    f"the network changes its own state, {path}, when it is called: the next call "
                    "is another function. Put it into inference: network.eval()."
                )
        if isinstance(result, Known):
            raise TraceError("the value does not depend on the example: there is nothing to bound.")
        result, left_out = self.leading(self.ref(result))
        if self.batched:
            shape = self.nodes[result.node].shape[1:]
            result = self.moved([result], shape, "reshape", new_sizes=shape)
        graph = _pruned(Graph(tuple(self.nodes), self.batched, left_out), result.node)
        for node in graph.nodes:
            if isinstance(node, Activation) and node.rule.keeps_order:
                raise TraceError(
                    f"{node.where}: a {node.rule.kind.lower()} has no bound but at the end of the "
                    "function and along its only axis, where it keeps the order of the logits and "
                    "is left out."
                )
        return graph

    def leading(self, result: Ref) -> tuple[Ref, str]:
        """What stands in front of a softmax at the end, with a warning, and what is left out; else
        the result itself and nothing."""
        node = self.nodes[result.node]
        if not isinstance(node, Activation) or not node.rule.keeps_order:
            return result, ""
        if not node.shape or node.size != node.shape[-1]:
            return result, ""
        kind = node.rule.kind.lower()
        warnings.warn(
            f"{node.where}: the {kind} at the end is left out: bounds and "
            "certificates are about the logits in front of it, whose order it keeps. As executed "
            "it may round different logits to the same probability; compare the logits.",
            stacklevel=2,
        )
        return Ref(node.inputs[0]), kind

    def jaxpr(self, jaxpr: Jaxpr, consts: Sequence[Value], arguments: Sequence[Value]) -> list:
        values: dict[Any, Value] = {}
        values.update(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, arguments, strict=True))
        outside = self.where
        passed = 0  # equations of what is written out in several
        for position, equation in enumerate(jaxpr.eqns):
            self.where = source.line_of(equation, outside)
            if position < passed:
                continue
            found = _written_out(jaxpr, position, values)
            if found is not None:
                rule, variable, equations = found
                (last,) = equations[-1].outvars
                ref = self.ref(values[variable])
                values[last] = self.composite(rule, ref, last.aval, equations)
                passed = position + len(equations)
                continue
            inputs = [_literal(v) if isinstance(v, Literal) else values[v] for v in equation.invars]
            results = self.equation(equation, inputs)
            values.update(zip(equation.outvars, results, strict=True))
        self.where = outside
        return [_literal(v) if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]

    def equation(self, equation, inputs: list[Value]) -> list[Value]:
        name = equation.primitive.name
        if all(isinstance(value, Known) for value in inputs):
            return _computed(equation, inputs)  # type: ignore[arg-type]
        if name in match.IDENTITIES:
            return list(inputs)
        if match.body_of(equation) is not None:
            return self.call(equation, inputs)
        if name == "cond":
            return self.branch(equation, inputs)
        if name == "scan":
            return self.loop(equation, inputs)
        found = None
        for rule in _RULES.get(name, ()):
            found = rule(self, equation, inputs)
            if found is not None:
                break
        if found is None:
            for value in inputs:
                if isinstance(value, Test):
                    self.ref(value)  # says what is wrong with it
            raise TraceError(_unknown(equation, inputs, self.where))
        return found if isinstance(found, list) else [found]

    def call(self, equation, inputs: list[Value]) -> list[Value]:
        """A composite function that is registered, or its body."""
        body = match.body_of(equation)
        assert body is not None
        inner, consts = body
        found = _composite(inner, consts, inputs)
        if found is not None:
            rule, ref, roundings = found
            out = equation.outvars[0].aval
            return [self.composite(rule, self.ref(ref), out, inner.eqns, roundings)]
        return self.jaxpr(inner, [Known(c) for c in consts], inputs)

    def composite(self, rule, ref: Ref, out, equations: Sequence, roundings: float = 0.0) -> Ref:
        """An activation that these equations compute; if they round, in all of their types."""
        executed: tuple[Executed, ...] = ()
        if not rule.selects:
            types = tuple(sorted(_types(equations)))
            executed = (Executed(primitive=rule.kind, operands=types, result=str(out.dtype)),)
        return self.activation(rule, ref, out.shape, out.dtype, roundings, executed)

    def branch(self, equation, inputs: list[Value]) -> list[Value]:
        index, *operands = inputs
        if not isinstance(index, Known) or not is_concrete(index.value):
            raise TraceError(
                f"{self.where}: a branch (`cond`) that depends on the example, or on traced "
                "parameters, has no bound: which way is taken may change inside the ball."
            )
        if index.roundings > 0:
            raise TraceError(
                f"{self.where}: a branch (`cond`) on a number that is random, or computed with "
                "rounding: the next call may take another way. Choose the branch beforehand, or "
                "put the network into inference: network.eval()."
            )
        branches = equation.params["branches"]
        chosen = branches[int(np.clip(int(index.value), 0, len(branches) - 1))]
        return self.jaxpr(chosen.jaxpr, [Known(c) for c in chosen.consts], operands)

    def loop(self, equation, inputs: list[Value]) -> list[Value]:
        params = equation.params
        if not 0 < params["length"] <= LONGEST_LOOP:
            raise TraceError(
                f"{self.where}: a loop of {params['length']} rounds; 1 to {LONGEST_LOOP} are "
                "written out."
            )
        # JAX counts them in its parameters, by other names in each version. A stream, or what is
        # stacked, has one axis more outside of the loop than in it.
        body = params["jaxpr"]
        inside = zip(equation.invars, body.jaxpr.invars, strict=True)
        streamed = sum(_rank(outer) != _rank(inner) for outer, inner in inside)
        returned = zip(equation.outvars, body.jaxpr.outvars, strict=True)
        carried = sum(_rank(outer) == _rank(inner) for outer, inner in returned)
        fixed = len(inputs) - streamed - carried
        consts, carry = inputs[:fixed], inputs[fixed : fixed + carried]
        streams = inputs[fixed + carried :]
        outputs: list[list[Value]] = []
        order = range(params["length"])
        for i in reversed(order) if params["reverse"] else order:
            rows = [self.row(stream, i) for stream in streams]
            results = self.jaxpr(
                body.jaxpr, [Known(c) for c in body.consts], [*consts, *carry, *rows]
            )
            carry = results[:carried]
            outputs.append(results[carried:])
        if params["reverse"]:
            outputs.reverse()
        stacked = [self.stack(column) for column in zip(*outputs, strict=True)]
        return [*carry, *stacked]

    def row(self, stream: Value, i: int) -> Value:
        if isinstance(stream, Known):
            return Known(stream.value[i], stream.roundings)
        shape = self.shape(stream)
        start, limit = (i, *(0 for _ in shape[1:])), (i + 1, *shape[1:])
        sizes = {"start_indices": start, "limit_indices": limit, "strides": None}
        part = self.moved([stream], (1, *shape[1:]), "slice", **sizes)
        return self.moved([part], shape[1:], "reshape", new_sizes=shape[1:])

    def stack(self, column: Sequence[Value]) -> Value:
        known = [value for value in column if isinstance(value, Known)]
        if len(known) == len(column):
            roundings = max(value.roundings for value in known)
            return Known(jnp.stack([value.value for value in known]), roundings)
        refs = [self.ref(value) for value in column]
        shape = self.shape(refs[0])
        rows = [self.moved([r], (1, *shape), "reshape", new_sizes=(1, *shape)) for r in refs]
        return self.moved(rows, (len(rows), *shape), "concatenate", dimension=0)

    # -------------------------------------------------------------------------------- nodes

    def shape(self, value: Value) -> tuple[int, ...]:
        return self.nodes[value.node].shape if not isinstance(value, Known) else value.value.shape

    def dtype(self, ref: Ref) -> str:
        return self.nodes[ref.node].dtype

    def ref(self, value: Value) -> Ref:
        """The node of a value that has to be one."""
        if isinstance(value, Ref):
            return value
        if isinstance(value, Test):
            raise TraceError(
                f"{self.where}: a comparison is used for something else than "
                "jnp.where(z > 0, a * z, b * z) with the very z that is compared, such as a mask "
                "or a branch; the result may jump inside the ball, so it has no bound."
            )
        raise TraceError(f"{self.where}: a constant stands where a value of the example should.")

    def add(self, node: Node) -> Ref:
        self.nodes.append(node)
        return Ref(len(self.nodes) - 1)

    def linear(self, ref: Ref, operator, shape, dtype, executed=(), roundings=0.0) -> Ref:
        return self.add(
            Linear(
                inputs=(ref.node,),
                shape=tuple(shape),
                dtype=str(dtype),
                where=self.where,
                executed=tuple(executed),
                operator=operator,
                roundings=roundings,
            )
        )

    def activation(self, rule, ref: Ref, shape, dtype, roundings=0.0, executed=()) -> Ref:
        before = self.nodes[ref.node]
        if isinstance(before, Activation) and before.rule.then(rule) is not None:
            rule = before.rule.then(rule)  # two clips in a row are one
            roundings = max(roundings, before.roundings)
            executed = (*before.executed, *executed)
            ref = Ref(before.inputs[0])
        return self.add(
            Activation(
                inputs=(ref.node,),
                shape=tuple(shape),
                dtype=str(dtype),
                where=self.where,
                executed=tuple(executed),
                rule=rule,
                roundings=roundings,
            )
        )

    def moved(
        self, refs: Sequence[Value], shape, primitive, constants=(), roundings=0.0, /, **parameters
    ) -> Ref:
        """A Rearrange by one primitive, joined with the one in front; equal ones are made once.

        Args:
            constants, roundings: further operands, and `Known.roundings` of them.
        """
        nodes = [self.ref(value).node for value in refs]
        if isinstance(primitive, str):
            defaults = {"reshape": {"dimensions": None, "sharding": None}}.get(primitive, {})
            parameters = {**defaults, **parameters}
            primitive = _primitive(primitive)
        step = Step(primitive, tuple(sorted(parameters.items())))
        like = self.nodes[nodes[0]]
        inputs = tuple(nodes)
        steps: rearrange.Steps = (step,)
        extra: rearrange.Constants = (tuple(constants),)
        if len(nodes) == 1 and isinstance(like, Rearrange):
            inputs, steps = like.inputs, (*like.steps, step)
            extra = (*like.constants, tuple(constants))
            roundings = max(roundings, like.roundings)
        elif len(nodes) > 1 and primitive.name == "concatenate":
            together = rearrange.together(self.nodes, nodes, parameters["dimension"])
            if together is not None:
                source, steps, extra = together
                inputs = (source,)
        steps, extra = rearrange.shortened(steps, extra)
        sources = [self.nodes[i].shape for i in inputs]
        if len(inputs) == 1 and sources[0] == tuple(shape) and rearrange.only_reshapes(steps):
            return Ref(inputs[0])

        key = ("moved", inputs, steps, tuple(map(rearrange.identity, extra)))
        if key in self.seen:
            return self.seen[key]
        node = Rearrange(
            inputs=inputs,
            shape=tuple(shape),
            dtype=like.dtype,
            where=self.where,
            steps=steps,
            constants=extra,
            roundings=roundings,
        )
        if not rearrange.only_reshapes(steps):
            node = dataclasses.replace(node, copies=most_copies(node, sources))
        self.seen[key] = self.add(node)
        return self.seen[key]

    def pulled(self, node: Rearrange, constant) -> Any | None:
        """A broadcastable constant behind a Rearrange as one in front of it; None: impossible."""
        if any(node.constants):
            return None
        shape = node.shape
        value = jnp.reshape(constant, (1,) * (len(shape) - np.ndim(constant)) + np.shape(constant))
        shapes = [self.nodes[node.inputs[0]].shape]
        for step in node.steps:
            like = jax.ShapeDtypeStruct(shapes[-1], jnp.float32)
            shapes.append(jax.eval_shape(step, like).shape)
        for step, before, after in zip(
            reversed(node.steps), reversed(shapes[:-1]), reversed(shapes[1:]), strict=True
        ):
            name, parameters = step.primitive.name, dict(step.parameters)
            if name == "transpose":
                value = jnp.transpose(value, tuple(np.argsort(parameters["permutation"])))
            elif name in ("reshape", "squeeze", "broadcast_in_dim"):
                if [n for n in before if n != 1] != [n for n in after if n != 1]:
                    return None
                sizes = iter(size for size, n in zip(value.shape, after, strict=True) if n != 1)
                value = value.reshape([1 if n == 1 else next(sizes) for n in before])
            else:
                return None
        return value

    def behind(self, join: Callable, ref: Ref, constant, shape, *more) -> Ref | None:
        """What `join` makes of the Linear node in front, also through a Rearrange, and a constant;
        None: nothing.

        Args:
            join: ``(node, constant, *more)``, the constant as it stands right behind the node.
            shape: of the value.
        """
        node, value, moves = self.nodes[ref.node], constant, None
        if tuple(shape) != node.shape:
            return None
        if isinstance(node, Rearrange) and len(node.inputs) == 1:
            moves, node = node, self.nodes[node.inputs[0]]
        if not isinstance(node, Linear):
            return None
        if moves is not None:
            value = self.pulled(moves, constant)
        if value is None:
            return None
        value = jnp.reshape(value, np.shape(value)[_units(np.shape(value)) :])
        found = join(node, value, *more, self.where)
        if found is None:
            return None
        ref = self.add(found)
        if moves is None:
            return ref
        return self.add(dataclasses.replace(moves, inputs=(ref.node,)))

    def shifted(self, ref: Ref, constant, shape, dtype, executed, roundings) -> Ref:
        """``value + constant``: with a Linear node in front, else a node of its own."""
        if self.dtype(ref) == str(dtype):
            more = (tuple(executed), roundings)
            found = self.behind(joining.shifted, ref, constant, shape, *more)
            if found is not None:
                return found
        return self.add(
            Add(
                inputs=(ref.node,),
                shape=tuple(shape),
                dtype=str(dtype),
                where=self.where,
                executed=tuple(executed),
                signs=(1,),
                constant=constant,
                roundings=roundings,
            )
        )


def _units(shape) -> int:
    """Leading axes of one."""
    count = 0
    while count < len(shape) - 1 and shape[count] == 1:
        count += 1
    return count


# ------------------------------------------------------------------------------------ the rules

# Of each primitive the latest first.
_RULES: dict[str, list[Callable]] = {}
_COMPOSITES: list[tuple[Callable, Callable]] = []


def register_primitive(*names: str):
    """Says how an equation becomes nodes: ``rule(reader, equation, inputs)``, None if it cannot.

    Of several rules for one primitive the latest is asked first.
    """

    def register(rule: Callable) -> Callable:
        for name in names:
            _RULES.setdefault(name, []).insert(0, rule)
        return rule

    return register


def register_composite(reference: Callable, build: Callable) -> None:
    """Makes a function known as an activation: calls whose jaxpr equals that of `reference`.

    Args:
        reference: ``reference(z, *parameters)``, elementwise or on pairs; what users call.
        build: ``build(*parameters) -> rule``.

    Raises:
        TypeError: a reference of which Python does not say what it takes.
    """
    _arity(reference)
    _COMPOSITES[:] = [pair for pair in _COMPOSITES if pair[0] is not reference]
    _COMPOSITES.append((reference, build))
    _reference.cache_clear()
    _equations.cache_clear()


def _composite(inner: Jaxpr, consts, inputs: Sequence[Value]):
    """The registered rule of a call and its operands; None if nobody registered its jaxpr."""
    if not isinstance(inputs[0], Ref) or len(inner.outvars) != 1 or consts:
        return None
    parameters = [value for value in inputs[1:] if isinstance(value, Known)]
    if len(parameters) != len(inputs) - 1:
        return None
    own = None
    for reference, build in reversed(_COMPOSITES):  # a function that is defined anew is the last
        if _arity(reference) != len(inputs):
            continue
        own = match.fingerprint(_closed(inner)) if own is None else own
        if own is not None and own == _reference(
            reference,
            tuple(map(_aval, inner.invars)),
            jax.dtypes.canonicalize_dtype(float) == jnp.float64,
        ):
            rule = build(*(known.value for known in parameters))
            return rule, inputs[0], max((known.roundings for known in parameters), default=0.0)
    return None


def _written_out(jaxpr: Jaxpr, position: int, values: dict):
    """A registered function that begins at an equation, not called but written out, as
    `jax.nn.gelu` is: its rule, the variable that it takes, its equations. None if there is none."""
    read = [v for v in jaxpr.eqns[position].invars if not isinstance(v, Literal)]
    if len(read) != 1 or not isinstance(values[read[0]], Ref):
        return None
    variable = read[0]
    for reference, build in reversed(_COMPOSITES):
        if _arity(reference) != 1:
            continue
        wide = jax.dtypes.canonicalize_dtype(float) == jnp.float64
        names, own = _equations(reference, _aval(variable), wide)
        equations = jaxpr.eqns[position : position + len(names)]
        if len(names) < 2 or names != tuple(e.primitive.name for e in equations):
            continue
        if match.fingerprint_of_part(equations, variable) != own:
            continue
        inner = {v for e in equations[:-1] for v in e.outvars}
        after = [v for e in jaxpr.eqns[position + len(names) :] for v in e.invars]
        if not any(v in inner for v in (*after, *jaxpr.outvars) if not isinstance(v, Literal)):
            return build(), variable, equations
    return None


@functools.cache
def _equations(reference: Callable, aval, wide: bool) -> tuple[tuple[str, ...], tuple | None]:
    """The primitives that a function of one array begins its work with, and its fingerprint."""
    own = _reference(reference, (aval,), wide)
    if own is None:
        return (), None
    shape, dtype, weak = aval
    like = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), weak_type=weak)
    body = jax.make_jaxpr(getattr(reference, "__wrapped__", reference))(like)
    return tuple(equation.primitive.name for equation in body.jaxpr.eqns), own


def _types(equations: Sequence) -> set[str]:
    """The floating types of all that equations read and make, calls included."""
    found = {v.aval.dtype for e in equations for v in (*e.invars, *e.outvars)}
    named = {str(dtype) for dtype in found if jnp.issubdtype(dtype, jnp.floating)}
    for equation in equations:
        body = match.body_of(equation)
        named |= set() if body is None else _types(body[0].eqns)
    return named


def _closed(inner: Jaxpr):
    from jax.extend.core import ClosedJaxpr

    return ClosedJaxpr(inner, ())


def _rank(variable) -> int:
    return len(variable.aval.shape)


def _aval(variable) -> tuple:
    return variable.aval.shape, str(variable.aval.dtype), bool(variable.aval.weak_type)


@functools.cache
def _arity(reference: Callable) -> int:
    """How many arrays it takes, those with a default included."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = dict(inspect.signature(reference).parameters)
    except (TypeError, ValueError):  # of things without a signature
        parameters = {}
    count = sum(parameter.kind in positional for parameter in parameters.values())
    if count == 0:
        raise TypeError(
            f"{reference!r} cannot be registered: expected a function reference(z, *parameters) "
            "with its parameters by name, got one without any. Write it with `def` or `lambda`."
        )
    return count


@functools.cache
def _reference(reference: Callable, avals, wide: bool) -> tuple | None:
    """Its fingerprint at these types; `wide`: are there 64 bits?"""
    likes = [
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), weak_type=weak)
        for shape, dtype, weak in avals
    ]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of types that it is not for
            return match.fingerprint(jax.make_jaxpr(reference)(*likes))
    except Exception:  # of whatever kind: it is not for these shapes or types
        return None


def _computed(equation, inputs: Sequence[Known]) -> list[Value]:
    """The results of an equation that does not depend on the example."""
    values = [known.value for known in inputs]
    roundings = roundings_of(equation, inputs)
    if all(map(is_concrete, values)):
        # Also inside of `jit`: positions, for one, have to be numbers.
        with jax.ensure_compile_time_eval():
            results = _bind(equation, values)
    else:
        results = _bind(equation, values)
    return [Known(result, r) for result, r in zip(results, roundings, strict=True)]


def _bind(equation, inputs) -> list:
    bound = equation.primitive.get_bind_params(equation.params)
    functions, named = bound if isinstance(bound, tuple) else ((), bound)
    results = equation.primitive.bind(*functions, *inputs, **named)
    return list(results) if equation.primitive.multiple_results else [results]


def _primitive(name: str):
    return getattr(jax.lax, f"{name}_p")


def _unknown(equation, inputs: Sequence[Value], where: str) -> str:
    name = equation.primitive.name
    what = f"{where or 'unknown line'}: lipjax knows no bound for `{name}`"
    if source.is_in(equation, "BatchNorm.__call__"):
        return (
            f"{what} inside of a BatchNorm in training mode, which divides by statistics of the "
            "batch. Put it into inference: network.eval(), or use_running_average=True."
        )
    if source.is_in(equation, "Dropout.__call__"):
        return (
            f"{what} inside of a Dropout that is on: its result is random. Put it into inference: "
            "network.eval(), or deterministic=True."
        )
    varying = sum(not isinstance(value, Known) for value in inputs)
    if varying > 1 and name in ("mul", "div", "dot_general", "conv_general_dilated"):
        return (
            f"{what} of two quantities that both depend on the example, such as statistics of the "
            "example itself, or attention. Only one of them may."
        )
    if name.startswith(("random", "threefry")):
        return f"{what}: a random number that depends on the example."
    return (
        f"{what} of a quantity that depends on the example. Write it with operations that have one "
        "(linear maps, relu, clip, where, max pooling, ...) or register it: "
        "lipjax.activations.register."
    )


def _executed(equation, product: bool = False) -> Executed:
    accumulate = equation.params.get("preferred_element_type")
    precision = equation.params.get("precision")
    return Executed(
        primitive=equation.primitive.name,
        operands=tuple(str(v.aval.dtype) for v in equation.invars),
        result=str(equation.outvars[0].aval.dtype),
        precision=_precision(precision),
        accumulate=None if accumulate is None else str(jnp.dtype(accumulate)),
        product=product,
    )


def _precision(value) -> str | None:
    """A precision by name; anything but JAX's own levels is an algorithm."""
    if value is None:
        return None
    both = value if isinstance(value, tuple) else (value,)
    if all(isinstance(each, jax.lax.Precision) for each in both):
        return "/".join(sorted({each.name for each in both}))
    return f"algorithm {value}"


def _pruned(graph: Graph, last: int) -> Graph:
    """Without the nodes that nothing reads."""
    needed = {0}
    stack = [last]
    while stack:
        position = stack.pop()
        if position not in needed or position == last:
            needed.add(position)
            stack += [i for i in graph.nodes[position].inputs if i not in needed]
    order = sorted(needed)
    place = {old: new for new, old in enumerate(order)}
    nodes = [
        dataclasses.replace(graph.nodes[i], inputs=tuple(place[j] for j in graph.nodes[i].inputs))
        for i in order
    ]
    return dataclasses.replace(graph, nodes=tuple(nodes))


@register_primitive("reshape", "transpose", "squeeze", "slice", "rev", "broadcast_in_dim", "tile")
def _move(reader: _Reader, equation, inputs):
    value, *rest = inputs
    if rest or not isinstance(value, Ref):
        return None
    out = equation.outvars[0].aval
    return reader.moved([value], out.shape, equation.primitive, **equation.params)


@register_primitive("split")
def _split(reader: _Reader, equation, inputs):
    (value,), axis = inputs, equation.params["axis"]
    if not isinstance(value, Ref):
        return None
    found, start, shape = [], 0, reader.shape(value)
    for variable in equation.outvars:
        size = variable.aval.shape[axis]
        first = tuple(start if k == axis else 0 for k in range(len(shape)))
        last = tuple(start + size if k == axis else n for k, n in enumerate(shape))
        bounds = {"start_indices": first, "limit_indices": last, "strides": None}
        found.append(reader.moved([value], variable.aval.shape, "slice", **bounds))
        start += size
    return found


@register_primitive("unstack")
def _unstacked(reader: _Reader, equation, inputs):
    (value,), axis = inputs, equation.params["axis"]
    if not isinstance(value, Ref):
        return None
    found, shape = [], reader.shape(value)
    axis = axis % len(shape)
    for i, variable in enumerate(equation.outvars):
        part = {
            "start_indices": tuple(i if k == axis else 0 for k in range(len(shape))),
            "limit_indices": tuple(i + 1 if k == axis else n for k, n in enumerate(shape)),
            "strides": None,
        }
        sizes = tuple(1 if k == axis else n for k, n in enumerate(shape))
        row = reader.moved([value], sizes, "slice", **part)
        out = variable.aval.shape
        found.append(reader.moved([row], out, "reshape", new_sizes=out))
    return found


@register_primitive("pad")
def _pad(reader: _Reader, equation, inputs):
    value, filling = inputs
    if not (isinstance(value, Ref) and isinstance(filling, Known)):
        return None
    out = equation.outvars[0].aval
    return reader.moved(
        [value],
        out.shape,
        equation.primitive,
        (filling.value,),
        filling.roundings,
        **equation.params,
    )


@register_primitive("gather", "dynamic_slice")
def _gather(reader: _Reader, equation, inputs):
    value, *indices = inputs
    if not isinstance(value, Ref) or not all(isinstance(i, Known) for i in indices):
        return None
    if not all(is_concrete(i.value) for i in indices):
        return None
    constants = tuple(Positions(np.asarray(i.value)) for i in indices)
    roundings = max(i.roundings for i in indices)
    out = equation.outvars[0].aval
    return reader.moved(
        [value], out.shape, equation.primitive, constants, roundings, **equation.params
    )


@register_primitive("concatenate")
def _concatenate(reader: _Reader, equation, inputs):
    out = equation.outvars[0].aval
    refs = [_as_node(reader, value, out.dtype) for value in inputs]
    return reader.moved(refs, out.shape, equation.primitive, **equation.params)


@register_primitive("stack")
def _stacked(reader: _Reader, equation, inputs):
    """As a concatenation."""
    out = equation.outvars[0].aval
    axis = equation.params["axis"] % len(out.shape)
    row = tuple(1 if k == axis else n for k, n in enumerate(out.shape))
    refs = [_as_node(reader, value, out.dtype) for value in inputs]
    rows = [reader.moved([ref], row, "reshape", new_sizes=row) for ref in refs]
    return reader.moved(rows, out.shape, "concatenate", dimension=axis)


def _as_node(reader: _Reader, value: Value, dtype) -> Ref:
    return _constant(reader, value, dtype) if isinstance(value, Known) else reader.ref(value)


def _constant(reader: _Reader, known: Known, dtype) -> Ref:
    """A constant as a node: the constant plus nothing of the example."""
    size = reader.nodes[0].size
    nothing = reader.moved([Ref(0)], (size,), "reshape", new_sizes=(size,))
    bounds = {"start_indices": (0,), "limit_indices": (0,), "strides": None}
    empty = reader.moved([nothing], (0,), "slice", **bounds)
    value = jnp.asarray(known.value)
    config = ((0, value.size, 0),)
    zeros = reader.moved(
        [empty], (value.size,), "pad", (np.zeros((), dtype),), padding_config=config
    )
    shaped = reader.moved([zeros], value.shape, "reshape", new_sizes=value.shape)
    return reader.add(
        Add(
            inputs=(shaped.node,),
            shape=tuple(value.shape),
            dtype=str(dtype),
            where=reader.where,
            signs=(1,),
            constant=value,
            roundings=known.roundings,
        )
    )


@register_primitive("convert_element_type", "reduce_precision")
def _cast(reader: _Reader, equation, inputs):
    (value,) = inputs
    out = equation.outvars[0].aval
    if not isinstance(value, Ref) or not jnp.issubdtype(out.dtype, jnp.floating):
        return None
    if equation.primitive.name == "reduce_precision":
        return None
    if reader.dtype(value) == str(out.dtype):
        return value
    # The same real number, rounded where the type is narrower.
    widens = jnp.promote_types(reader.dtype(value), out.dtype) == out.dtype
    return reader.add(
        Add(
            inputs=(value.node,),
            shape=tuple(out.shape),
            dtype=str(out.dtype),
            where=reader.where,
            executed=() if widens else (_executed(equation),),
            signs=(1,),
        )
    )


@register_primitive("neg")
def _negated(reader: _Reader, equation, inputs):
    return _sum(reader, equation, [(-1, inputs[0])])


@register_primitive("add", "add_any")
def _added(reader: _Reader, equation, inputs):
    return _sum(reader, equation, [(1, inputs[0]), (1, inputs[1])])


@register_primitive("sub")
def _subtracted(reader: _Reader, equation, inputs):
    return _sum(reader, equation, [(1, inputs[0]), (-1, inputs[1])])


def _sum(reader: _Reader, equation, terms):
    out = equation.outvars[0].aval
    executed = () if equation.primitive.name == "neg" else (_executed(equation),)
    known = [(sign, value) for sign, value in terms if isinstance(value, Known)]
    refs = [
        (sign, _broadcast(reader, reader.ref(value), out.shape))
        for sign, value in terms
        if not isinstance(value, Known)
    ]
    if known:
        ((sign, constant),) = known
        value = constant.value if sign == 1 else -jnp.asarray(constant.value)
        ((own, ref),) = refs
        if own == 1:
            return reader.shifted(ref, value, out.shape, out.dtype, executed, constant.roundings)
        constant_of_node, roundings = value, constant.roundings
    else:
        constant_of_node, roundings = None, 0.0
    return reader.add(
        Add(
            inputs=tuple(ref.node for _, ref in refs),
            shape=tuple(out.shape),
            dtype=str(out.dtype),
            where=reader.where,
            executed=executed,
            signs=tuple(sign for sign, _ in refs),
            constant=constant_of_node,
            roundings=roundings,
        )
    )


def _broadcast(reader: _Reader, ref: Ref, shape) -> Ref:
    """The value with axes of one spread out to this shape."""
    own = reader.shape(ref)
    if tuple(own) == tuple(shape):
        return ref
    dimensions = tuple(range(len(shape) - len(own), len(shape)))
    parameters = {"shape": tuple(shape), "broadcast_dimensions": dimensions, "sharding": None}
    return reader.moved([ref], shape, "broadcast_in_dim", **parameters)


@register_primitive("mul", "div")
def _scaled(reader: _Reader, equation, inputs):
    first, second = inputs
    if isinstance(first, Known) and equation.primitive.name == "mul":
        first, second = second, first
    if not (isinstance(first, Ref) and isinstance(second, Known)):
        return None
    out = equation.outvars[0].aval
    first = _broadcast(reader, first, out.shape)
    scale = jnp.asarray(second.value, reader.dtype(first))
    roundings = second.roundings
    if equation.primitive.name == "div":
        scale = 1 / scale
        roundings += 0 if _power_of_two(second.value) else 1
    before = reader.nodes[first.node]
    executed = _executed(equation)
    if isinstance(before, Linear) and _is_plain_sum(before) and np.size(scale) == 1:
        # A sum that is scaled, as in average pooling, is one map with one number as its kernel. A
        # second scale is a part of its own: the product of both may underflow in their type.
        kernel = jnp.reshape(scale, ()).astype(out.dtype)
        return reader.add(
            dataclasses.replace(
                before,
                operator=dataclasses.replace(before.operator, kernel=kernel),
                executed=(*before.executed, executed),
                roundings=roundings,
            )
        )
    if reader.dtype(first) == str(out.dtype):
        more = ((executed,), roundings)
        found = reader.behind(joining.scaled, first, scale, out.shape, *more)
        if found is not None:
            return found
    operator = linear.LinearOperator(linear.Scale(), scale)
    return reader.linear(first, operator, out.shape, out.dtype, [executed], roundings)


def _power_of_two(value) -> bool:
    if not is_concrete(value):
        return False
    mantissa, _ = np.frexp(np.abs(np.asarray(value, np.float64)))
    return bool(np.all(mantissa == 0.5))


def _is_plain_sum(node: Linear) -> bool:
    """Is it a sum as `_summed` makes it, of kernel 1, and nothing behind it?"""
    alone = node.operator.bias is None and len(node.executed) == 1
    return alone and isinstance(node.operator.apply, linear.Sum)


@register_primitive("dot_general")
def _product(reader: _Reader, equation, inputs):
    left, right = inputs
    out = equation.outvars[0].aval
    numbers = _hashable(equation.params["dimension_numbers"])
    if isinstance(left, Ref) and isinstance(right, Known):
        ref, known, first = left, right, False
    elif isinstance(left, Known) and isinstance(right, Ref):
        ref, known, first = right, left, True
    else:
        return None
    apply = linear.Product(numbers, kernel_first=first)
    operator = linear.LinearOperator(apply, jnp.asarray(known.value))
    executed = [_executed(equation, product=True)]
    return reader.linear(ref, operator, out.shape, out.dtype, executed, known.roundings)


def _hashable(value):
    return tuple(map(_hashable, value)) if isinstance(value, tuple | list) else int(value)


@register_primitive("conv_general_dilated")
def _convolution(reader: _Reader, equation, inputs):
    image, kernel = inputs
    params, out = equation.params, equation.outvars[0].aval
    if not (isinstance(image, Ref) and isinstance(kernel, Known)):
        return None
    if params["batch_group_count"] != 1:
        return None
    numbers = params["dimension_numbers"]
    shape = reader.shape(image)
    batch, channel, *spatial = numbers.lhs_spec
    if shape[batch] != 1:
        raise ValueError(
            f"{reader.where}: a convolution over a batch of {shape[batch]}: give one example; "
            "jax.vmap makes the batch."
        )

    # To one example, channels last; the kernel to (window, inputs, outputs); and back.
    order = (batch, *spatial, channel)
    ref = _transposed(reader, image, order)
    inner = tuple(shape[axis] for axis in order[1:])
    ref = reader.moved([ref], inner, "reshape", new_sizes=inner)
    outputs, inputs_, *window = numbers.rhs_spec
    weights = jnp.transpose(jnp.asarray(kernel.value), (*window, inputs_, outputs))
    apply = linear.Convolution(
        tuple(params["window_strides"]),
        tuple((int(low), int(high)) for low, high in params["padding"]),
        tuple(params["lhs_dilation"]),
        tuple(params["rhs_dilation"]),
        params["feature_group_count"],
    )
    squares = jnp.square(linear.raised(weights))
    norms = linear.safe_sqrt(jnp.sum(squares, axis=tuple(range(weights.ndim - 1))))
    operator = linear.LinearOperator(apply, weights, None, norms)
    batch_out, channel_out, *spatial_out = numbers.out_spec
    found = tuple(out.shape[axis] for axis in (*spatial_out, channel_out))
    executed = [_executed(equation, product=True)]
    ref = reader.linear(ref, operator, found, out.dtype, executed, kernel.roundings)
    ref = reader.moved([ref], (1, *found), "reshape", new_sizes=(1, *found))
    back = np.argsort((batch_out, *spatial_out, channel_out))
    return _transposed(reader, ref, tuple(int(axis) for axis in back))


def _transposed(reader: _Reader, ref: Ref, order) -> Ref:
    if tuple(order) == tuple(range(len(order))):
        return ref
    shape = tuple(reader.shape(ref)[axis] for axis in order)
    return reader.moved([ref], shape, "transpose", permutation=tuple(order))


@register_primitive("reduce_sum", "reduce_window_sum")
def _summed(reader: _Reader, equation, inputs):
    (value,) = inputs
    if not isinstance(value, Ref):
        return None
    out = equation.outvars[0].aval
    parameters = tuple(sorted((k, v) for k, v in equation.params.items()))
    apply = linear.Sum(equation.primitive, parameters)
    operator = linear.LinearOperator(apply, jnp.ones((), reader.dtype(value)))
    return reader.linear(value, operator, out.shape, out.dtype, [_executed(equation, product=True)])


@register_primitive("gt", "ge", "lt", "le")
def _compared(reader: _Reader, equation, inputs):
    above = equation.primitive.name in ("gt", "ge")
    first, second = inputs
    if isinstance(first, Ref) and isinstance(second, Known):
        return Test(first.node, second, above)
    if isinstance(first, Known) and isinstance(second, Ref):
        return Test(second.node, first, not above)
    return None
