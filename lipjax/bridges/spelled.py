"""Activations that exporters spell out in simpler operations, found again.

A product or quotient of two values of the example has no bound; these have.
"""

import math

import numpy as np

from lipjax.bridges.program import Builder, Operand, Step, Value


def recognised(builder: Builder, kind: str, operands: tuple) -> Value | None:
    """What "mul" or "div" of two values is as one activation; None: it is none that is known.

    - ``x sigmoid(x)``: SiLU; ``x hard_sigmoid(x)``, by 1/6 and 1/2: hard swish.
    - ``x (1 + erf(x / sqrt(2))) / 2``, factors 1/2 anywhere: GELU.
    - ``x / (1 + |x|)``: softsign.
    """
    if len(operands) != 2 or not all(isinstance(operand, Value) for operand in operands):
        return None
    first, second = operands
    if kind == "div":
        return _softsign(builder, first, second)
    return _gated(builder, first, second) or _gated(builder, second, first)


def _gated(builder: Builder, x: Value, gate: Value) -> Value | None:
    step = builder.step_of(gate)
    if step is not None and step.operands[0] == x.number:
        if step.kind == "sigmoid":
            return builder.add("silu", x)
        sixth = abs(step.settings.get("alpha", 0.0) - 1 / 6) < 1e-7
        if step.kind == "hard_sigmoid" and sixth and step.settings["beta"] == 0.5:
            return builder.add("hard_swish", x)

    # What is left of the factor 2 when both have given up their halves.
    x, factor = _unhalved(builder, x, 2.0)
    gate, factor = _unhalved(builder, gate, factor)
    erf = _one_more(builder, gate)
    if erf is None or erf.kind != "erf" or not _over_root_two(builder, erf.operands[0], x):
        return None
    gelu = builder.add("gelu", x, approximate=False)
    return gelu if factor == 1 else builder.add("mul", gelu, factor)


def _softsign(builder: Builder, x: Value, below: Value) -> Value | None:
    size = _one_more(builder, below)
    found = size is not None and size.kind == "abs" and size.operands[0] == x.number
    return builder.add("softsign", x) if found else None


def _unhalved(builder: Builder, value: Value, factor: float) -> tuple[Value, float]:
    """The value without a factor 1/2 in front of it, which goes into the factor."""
    found = _by_number(builder, builder.step_of(value))
    if found is None or found[1] != 0.5:
        return value, factor
    return found[0], factor / 2


def _one_more(builder: Builder, value: Value) -> Step | None:
    """The operation that makes u, of a value ``u + 1``."""
    step = builder.step_of(value)
    if step is None or step.kind != "add":
        return None
    for u, one in (step.operands, step.operands[::-1]):
        if _number(builder, one) == 1 and isinstance(u, int):
            return builder.steps.get(u)
    return None


def _over_root_two(builder: Builder, operand, x: Operand) -> bool:
    """Is it ``x / sqrt(2)``, to the last bits of its type?"""
    found = _by_number(builder, builder.steps.get(operand))
    if found is None or found[0] != x:
        return False
    return abs(found[1] * math.sqrt(2) - 1) < 4 * np.finfo(found[0].dtype).eps


def _by_number(builder: Builder, step: Step | None) -> tuple[Value, float] | None:
    """A value and the number that a step multiplies it by."""
    if step is None or step.kind not in ("mul", "div"):
        return None
    first, second = step.operands
    if step.kind == "mul" and isinstance(second, int):
        first, second = second, first
    number = _number(builder, second)
    if not isinstance(first, int) or not number:
        return None
    return builder.values[first], number if step.kind == "mul" else 1 / number


def _number(builder: Builder, operand: int | str | float) -> float | None:
    """The one number that an operand of a step is."""
    if isinstance(operand, str):
        array = builder.weights[operand].array
        return float(array.reshape(-1)[0]) if array.size == 1 else None
    return operand if isinstance(operand, float) else None
