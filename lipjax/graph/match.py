"""Is a traced function the same as a reference? Jaxprs are compared, names prove nothing."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Calls that compute what their body says, and the parameter that holds it.
BODIES = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
# Equations whose value is that of their operand.
IDENTITIES = ("copy", "copy_p", "optimization_barrier", "sharding_constraint", "name")


def body_of(equation) -> tuple[Jaxpr, Sequence[Any]] | None:
    """The jaxpr of a call and its constants; None if the equation is no call."""
    parameter = BODIES.get(equation.primitive.name)
    inner = None if parameter is None else equation.params.get(parameter)
    if inner is None and parameter == "call_jaxpr":
        inner = equation.params.get("fun_jaxpr")
    if isinstance(inner, ClosedJaxpr):
        return inner.jaxpr, inner.consts
    return (inner, ()) if isinstance(inner, Jaxpr) else None


def fingerprint(closed: ClosedJaxpr) -> tuple | None:
    """All that a jaxpr computes, as a value that can be compared; None if that cannot be said.

    Calls are replaced by their bodies. Equal fingerprints: the same primitives with the same
    parameters on the same operands, in the same types. It cannot be said of what holds arrays, or
    has parameters that do not print in full, such as the bodies of loops.
    """
    names: dict[Any, Any] = {}
    for i, variable in enumerate(closed.jaxpr.invars):
        names[variable] = ("in", i, str(variable.aval))
    for variable, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        if np.ndim(value):
            return None
        names[variable] = ("number", str(np.asarray(value).dtype), np.asarray(value).item())
    return _printed(closed.jaxpr.eqns, names, closed.jaxpr.outvars)


def fingerprint_of_part(equations: Sequence, variable) -> tuple | None:
    """`fingerprint` of some equations as a function of one variable, to what the last one makes;
    None also if they read another variable."""
    names = {variable: ("in", 0, str(variable.aval))}
    return _printed(equations, names, equations[-1].outvars)


def _printed(equations: Sequence, names: dict, results: Sequence) -> tuple | None:
    lines: list[tuple] = []
    try:
        for line in _flat(equations, names, lines):
            lines.append(line)
        return tuple(lines), tuple(_name(v, names) for v in results)
    except (_Unprintable, KeyError):
        return None


class _Unprintable(Exception):
    """There is more in an equation than its text says."""


def _flat(equations: Sequence, names: dict, lines: list) -> Iterator[tuple]:
    """Equations with calls spelled out; what each variable is goes into `names`."""
    for equation in equations:
        operands = [_name(v, names) for v in equation.invars]
        found = body_of(equation)
        if found is not None:
            inner, consts = found
            if consts:
                raise _Unprintable
            local = dict(zip(inner.invars, operands, strict=True))
            yield from _flat(inner.eqns, local, lines)
            names.update(
                (v, _name(w, local)) for v, w in zip(equation.outvars, inner.outvars, strict=True)
            )
            continue
        for k, variable in enumerate(equation.outvars):
            names[variable] = ("line", len(lines), k)
        parameters = tuple((key, _text(value)) for key, value in sorted(equation.params.items()))
        types = tuple(str(v.aval) for v in equation.outvars)
        yield equation.primitive.name, parameters, tuple(operands), types


def _text(value) -> str:
    """A parameter in full. Jaxprs print without their arrays, and large arrays without the
    middle."""
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_text, value))})"
    if isinstance(value, Jaxpr | ClosedJaxpr | np.ndarray | jax.Array):
        raise _Unprintable
    if callable(value) and not isinstance(value, type):
        raise _Unprintable
    return repr(value)


def _name(variable, names: dict):
    if isinstance(variable, Literal):
        value = np.asarray(variable.val)
        if value.ndim:
            raise _Unprintable
        return "number", str(value.dtype), value.item()
    return names[variable]
