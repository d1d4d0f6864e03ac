"""Values that do not depend on the example, and how exactly a program computes them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from lipjax.graph import match

# Equations that only move what they are given, or choose among it by what is known exactly.
MOVES = frozenset(
    (
        *("reshape", "transpose", "squeeze", "broadcast_in_dim", "slice", "rev", "concatenate"),
        *("pad", "copy", "split", "neg", "gather", "expand_dims", "dynamic_slice", "iota", "abs"),
        *("tile", "stack", "unstack"),
        *("select_n", "stop_gradient", "reduce_precision", "max", "min", "clamp"),
    )
)
# Operands of them that say where, not what.
POSITIONS = {"select_n": slice(0, 1), "gather": slice(1, None), "dynamic_slice": slice(1, None)}
COMPARISONS = frozenset(("gt", "ge", "lt", "le", "eq", "ne"))
# Exact on integers and truth values.
INTEGER = frozenset(("add", "sub", "mul", "div", "rem", "sign", "and", "or", "not", "xor"))


@dataclasses.dataclass(frozen=True)
class Known:
    """A value that does not depend on the example.

    Attributes:
        value: an array, or a tracer of the parameters.
        roundings: units of roundoff of its type by which an entry may differ from the value here,
            as the program computes it; 0 for parameters and numbers as they stand, or moved;
            infinity where nothing is known, as of random numbers, which are new in every call.
    """

    value: Any
    roundings: float = 0.0


def is_concrete(value) -> bool:
    """Is it a number or an array, and no tracer?"""
    return not isinstance(value, jax.core.Tracer)


def roundings_of(equation, inputs: Sequence[Known]) -> list[float]:
    """`Known.roundings` of the results of an equation on known operands."""
    body = match.body_of(equation)
    if body is None:
        return [_roundings(equation, inputs)] * len(equation.outvars)

    jaxpr, consts = body
    values: dict[Any, Known] = dict(zip(jaxpr.constvars, map(Known, consts), strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def read(variable) -> Known:
        return Known(variable.val) if isinstance(variable, Literal) else values[variable]

    for inner in jaxpr.eqns:
        found = roundings_of(inner, [read(v) for v in inner.invars])
        results = (Known(None, roundings) for roundings in found)
        values.update(zip(inner.outvars, results, strict=True))
    return [read(v).roundings for v in jaxpr.outvars]


def _roundings(equation, inputs: Sequence[Known]) -> float:
    """Operands that err by a share of themselves: products and quotients add up; a root halves; a
    sum of numbers >= 0 keeps the larger. A reciprocal root is off by a few units on some devices.
    """
    name = equation.primitive.name
    own = [value.roundings for value in inputs]
    result = equation.outvars[0].aval.dtype
    if name in MOVES:
        positions = POSITIONS.get(name, slice(0, 0))
        return max(own, default=0.0) if max(own[positions], default=0.0) == 0 else math.inf
    if name == "convert_element_type":
        return _cast(own[0], equation.invars[0].aval.dtype, result)
    integers = not jnp.issubdtype(result, jnp.floating)
    if name in COMPARISONS or (name in INTEGER and integers):
        return 0.0 if max(own) == 0 else math.inf
    if name in ("mul", "div"):
        return sum(own) + 1
    if name in ("sqrt", "rsqrt"):
        return own[0] / 2 + 4
    if name == "add" and all(_not_negative(value.value) for value in inputs):
        return max(own) + 1
    return math.inf


def _cast(own: float, before, after) -> float:
    """A cast counts in units of the new type. To a narrower type it is one more: a compiler may
    keep the digits (XLA drops casts to bfloat16 and back), so what is multiplied may be either."""
    if not jnp.issubdtype(before, jnp.floating):
        return own
    if not jnp.issubdtype(after, jnp.floating):
        return 0.0 if own == 0 else math.inf
    old, new = float(jnp.finfo(before).eps), float(jnp.finfo(after).eps)
    return own * old / new + (1.0 if new > old else 0.0)


def _not_negative(value) -> bool:
    return value is not None and is_concrete(value) and bool(np.all(np.asarray(value) >= 0))
