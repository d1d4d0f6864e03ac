"""The checker's reading of a description by nodes, of any function: into explicit sparse matrices,
moves, sums and activations.

Part of `lipjax.check`; shares nothing with the bounds that it checks. The description
(`lipjax.graph.description`) may be anybody's: types, shapes, positions and sizes are looked at
before anything is made of them. What is not known is refused, and never guessed.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse  # type: ignore[import-untyped]

from lipjax.check import kinds
from lipjax.check.layers import (
    Activation,
    Add,
    Affine,
    CannotCheck,
    Executed,
    Move,
    Node,
    _affine,
    _convolution,
    _gather,
)

# From the most to the least precise.
TYPES = ("float64", "float32", "bfloat16")
# Entries of one value or matrix, and nodes.
MOST_ENTRIES = 2**28
MOST_NODES = 10_000
# Roundings that parameters may be off by; the tool certifies nothing beyond a few.
MOST_ROUNDINGS = 1000.0

COMMON = {"kind", "inputs", "shape", "dtype", "executed", "roundings"}
# What else a node of each kind has.
FIELDS = {
    "input": set(),
    "product": {"kernel", "bias", "numbers", "kernel_first"},
    "conv": {"kernel", "bias", "strides", "padding", "dilation", "input_dilation", "groups"},
    "scale": {"kernel", "bias", "joined"},
    "sum": {"kernel", "bias", "window", "strides", "padding", "dilation", "base_dilation"},
    "move": {"index", "fill"},
    "add": {"signs", "constant", "joined"},
    "clip": {"bottom", "top"},
    "maxmin": {"bottom", "top"},
    **{kind: set(reader.fields) for kind, reader in kinds.READERS.items()},
}
# Numbers of a node, each an array or None.
PARAMETERS = ("kernel", "bias", "constant", "fill", "bottom", "top", *kinds.PARAMETERS)
# The equation that a node begins with, where it computes anything; elementwise ones may follow.
FIRST = {
    "product": {"dot_general"},
    "conv": {"conv_general_dilated"},
    "scale": {"mul", "div"},
    "sum": {"reduce_sum", "reduce_window_sum"},
    "add": {"add", "sub", "add_any", "convert_element_type"},
    **{kind: set(reader.first) for kind, reader in kinds.READERS.items()},
}
FOLLOWING = {"add", "sub", "add_any", "mul", "div"}


def read(described: Sequence[Mapping[str, Any]], shape: tuple[int, ...]) -> list[Node]:
    """The function as a graph on flattened arrays, for one example of this shape; the last node
    makes the logits.

    Nodes that only give a value another shape or a wider type are left out.

    Raises:
        CannotCheck: what this checker does not know, or what contradicts itself.
    """
    if len(described) > MOST_NODES:
        raise CannotCheck(f"a network of {len(described)} nodes; this checker takes {MOST_NODES}.")
    nodes: list[Node] = []
    places: list[int] = []  # the value that each described node makes
    last = 0  # the described node that made the last value
    # How many read each described node; of one that is joined with the one behind it nobody else.
    read_by = [0.0] * len(described)
    for i, node in enumerate(described):
        name = f"node {i}, {str(node.get('kind'))[:40]!r},"
        _check_form(name, i, node)
        if node["kind"] == "input":
            if i > 0 or tuple(node["shape"]) != tuple(shape):
                raise CannotCheck(
                    f"{name} is an example of shape {node['shape']}; expected one, {list(shape)}."
                )
            places.append(0)
            continue
        if i == 0:
            raise CannotCheck(f"{name} stands where the example should.")
        for j in node["inputs"]:
            read_by[j] += 1
            if read_by[j] == math.inf:
                raise CannotCheck(f"{name} reads node {j}, which is joined with another.")
        before = [described[j] for j in node["inputs"]]
        executed = _executed(name, node, before)
        step = READERS[node["kind"]](name, node, before, executed)
        if step is None:
            places.append(places[node["inputs"][0]])
            continue
        if node.get("joined", False):
            if not nodes or node["inputs"] != [last] or read_by[last] != 1:
                raise CannotCheck(f"{name} is joined with a node that others read too.")
            read_by[last] = math.inf
            nodes[-1] = Node(_joined(name, nodes[-1].step, step), nodes[-1].inputs)
        else:
            nodes.append(Node(step, tuple(places[j] for j in node["inputs"])))
        places.append(len(nodes))
        last = i
    if 0 in read_by[:-1]:
        raise CannotCheck(f"node {read_by.index(0)} leads nowhere: no node reads it.")
    if not nodes or places[-1] != len(nodes) or not isinstance(nodes[-1].step, Affine):
        raise CannotCheck("the function does not end in an affine node, whose values are logits.")
    if len(described[-1]["shape"]) != 1:
        raise CannotCheck(
            f"the function ends in shape {described[-1]['shape']}: expected one axis."
        )
    return nodes


# ---------------------------------------------------------------------- what is written


def _check_form(name: str, position: int, node: Mapping[str, Any]) -> None:
    """Are all entries there, known, of their types and within their bounds?"""
    kind = node.get("kind")
    if type(kind) is not str or kind not in FIELDS:
        raise CannotCheck(f"{name} is not known to this checker, so nothing can be derived of it.")
    if set(node) != COMMON | FIELDS[kind]:
        strange = sorted(map(str, set(node) ^ (COMMON | FIELDS[kind])))
        raise CannotCheck(f"{name} has entries that are missing or unknown: {', '.join(strange)}.")
    # Without a value of no entries, what is bounded below is at least as large as each part of it.
    if not _are_integers(node["shape"], 1) or math.prod(node["shape"]) > MOST_ENTRIES:
        raise CannotCheck(f"{name} has the shape {node['shape']}, which this checker cannot take.")
    if node["dtype"] not in TYPES:
        raise CannotCheck(f"{name} is of type {node['dtype']}: expected {', '.join(TYPES)}.")
    inputs, wanted = node["inputs"], {"input": 0, "add": None, "move": None}.get(kind, 1)
    if not _are_integers(inputs, 0, position - 1) or (
        len(inputs) != wanted if wanted is not None else not inputs
    ):
        raise CannotCheck(f"{name} reads {inputs}: expected {wanted or 'some'} nodes before it.")
    if type(node.get("joined", False)) is not bool:
        raise CannotCheck(f"{name} is joined: {node['joined']}; expected true or false.")
    roundings = node["roundings"]
    if type(roundings) is not float or not 0 <= roundings <= MOST_ROUNDINGS:
        raise CannotCheck(f"{name} has parameters that are off by {roundings} roundings.")
    for field in PARAMETERS:
        value = node.get(field)
        if value is not None:
            _check_array(f"{name} has {field}", value)


def _check_array(name: str, value) -> None:
    if not isinstance(value, np.ndarray) or value.dtype.name not in TYPES:
        raise CannotCheck(
            f"{name} of type {getattr(value, 'dtype', type(value).__name__)}: expected {TYPES}."
        )
    if value.size > MOST_ENTRIES or not np.all(np.isfinite(value.astype(np.float64))):
        raise CannotCheck(f"{name} with NaN, infinity or too many numbers: nothing can be derived.")


def _are_integers(values, low: int, high: int = 2**31) -> bool:
    return type(values) in (list, tuple) and all(
        type(n) is int and low <= n <= high for n in values
    )


def _integers(name: str, node, field: str, count: int, low: int) -> list[int]:
    values = node[field]
    if not _are_integers(values, low) or len(values) != count:
        raise CannotCheck(f"{name} has {field} {values}: expected {count} integers >= {low}.")
    return values


def _pads(name: str, node, count: int) -> list[list[int]]:
    values = node["padding"]
    fits = type(values) is list and len(values) == count
    if not fits or not all(
        _are_integers(pair, -(2**20), 2**20) and len(pair) == 2 for pair in values
    ):
        raise CannotCheck(f"{name} has padding {values}: expected {count} pairs of integers.")
    return values


def _bounded(name: str, entries: int) -> None:
    if entries > MOST_ENTRIES:
        raise CannotCheck(
            f"{name} has a matrix of {entries} entries; this checker takes {MOST_ENTRIES}."
        )


def held(values: np.ndarray, dtype: str) -> bool:
    """Are these numbers all of this type?"""
    exact = values.astype(np.float64)
    if dtype == "float64":
        return True
    with np.errstate(over="ignore"):
        single = exact.astype(np.float32)
    if not np.array_equal(single, exact):
        return False
    return dtype == "float32" or not np.any(single.view(np.uint32) & 0xFFFF)


# ---------------------------------------------------------------------- what is executed


def _executed(name: str, node, before) -> Executed:
    """How a node computes, once it is known that what is written of it fits together."""
    kind, equations = node["kind"], node["executed"]
    if type(equations) is not list or len(equations) > 8:
        raise CannotCheck(f"{name} has no list of at most 8 equations.")
    types: set[str] = set()
    for k, equation in enumerate(equations):
        types |= _types(name, equation)
        allowed = FIRST.get(kind, set()) if k == 0 else FOLLOWING
        if equation[0] not in allowed:
            raise CannotCheck(
                f"{name} computes {equation[0]!r}, which this checker does not know there."
            )
    dtypes = {each["dtype"] for each in before}
    if equations:
        if equations[-1][2] != node["dtype"] or not dtypes <= set(equations[0][1]):
            raise CannotCheck(f"{name} computes in other types than it and what it reads have.")
    elif kind == "add" and len(before) == 1 and node["constant"] is None:
        if TYPES.index(node["dtype"]) > TYPES.index(before[0]["dtype"]):
            raise CannotCheck(f"{name} is a narrower type, but nothing is said of its rounding.")
    elif dtypes != {node["dtype"]}:
        raise CannotCheck(f"{name} is of another type than what it reads.")
    _check_parameters(name, node, equations)
    results = len(equations) + 2 * node["roundings"]
    return Executed(frozenset(types), kind in ("product", "conv"), results)


def _types(name: str, equation) -> set[str]:
    """All types of an equation."""
    if type(equation) is not list or len(equation) != 5 or type(equation[1]) is not list:
        raise CannotCheck(f"{name} has an equation that is none.")
    primitive, operands, result, precision, accumulate = equation
    words = [primitive, *operands, result, *(w for w in (precision, accumulate) if w is not None)]
    if not all(type(word) is str for word in words) or not operands:
        raise CannotCheck(f"{name} has an equation that is none.")
    found = {*operands, result} | ({accumulate} if accumulate is not None else set())
    if not found <= set(TYPES):
        strange = ", ".join(sorted(found - set(TYPES)))[:200]
        raise CannotCheck(f"{name} computes in {strange}: expected {', '.join(TYPES)}.")
    return found


def _check_parameters(name: str, node, equations) -> None:
    """Refuses parameters that the program would round before it computes with them."""
    operands = equations[0][1] if equations else [node["dtype"]]
    narrowest = max(operands, key=TYPES.index)
    for field in PARAMETERS:
        value = node.get(field)
        if value is not None and not held(value, narrowest if field == "kernel" else node["dtype"]):
            raise CannotCheck(
                f"{name} has a {field} of more digits than the type that it computes in: what is "
                "executed is another function."
            )
    if node["kind"] not in ("product", "conv", "scale", "sum", "add") and node["roundings"]:
        raise CannotCheck(f"{name} has parameters that are computed anew, with rounding.")


def check_arithmetic(
    described: Sequence[Mapping[str, Any]],
    arithmetic: str,
    images: np.ndarray,
    order: Sequence[str],
    algorithms: Mapping[str, str],
) -> None:
    """Refuses a function that rounds more than the recorded arithmetic says; after `read`.

    Args:
        arithmetic: of the file's header, one of `order`, each of which covers those before it.
        images: which the example is to be.
        algorithms: that products can be fixed to, and the arithmetic that covers each.
    """
    if not held(images, described[0]["dtype"]):
        raise CannotCheck(
            f"the images have more digits than the example of type {described[0]['dtype']}, as "
            "which they are executed."
        )
    covered = order[: order.index(arithmetic) + 1]
    for i, node in enumerate(described):
        if arithmetic not in kinds.MEASURED.get(node["kind"], order):
            raise CannotCheck(
                f"node {i}, {node['kind']!r}, is executed in a network in {arithmetic} arithmetic: "
                f"its rounding is known in {' and '.join(kinds.MEASURED[node['kind']])}."
            )
        for primitive, operands, result, precision, accumulate in node["executed"]:
            types = {*operands, result, *([accumulate] if accumulate else [])}
            coarser = "bfloat16" in types and arithmetic != "bfloat16"
            if coarser or (arithmetic == "float64" and types != {"float64"}):
                raise CannotCheck(
                    f"node {i}, {node['kind']!r}, computes {primitive!r} in "
                    f"{', '.join(sorted(types))}, which rounds more than the recorded arithmetic, "
                    f"{arithmetic}."
                )
            levels = {"DEFAULT", "HIGH", "HIGHEST"}
            if precision is None or set(precision.split("/")) <= levels:
                continue
            algorithm = precision.removeprefix("algorithm ").rpartition(".")[2]
            if algorithms.get(algorithm) not in covered:
                raise CannotCheck(
                    f"node {i}, {node['kind']!r}, computes its products by "
                    f"{precision[:100]}, whose rounding is not known to be that of the recorded "
                    f"arithmetic, {arithmetic}."
                )


# ---------------------------------------------------------------------- affine nodes


def _linear(
    name: str, node, matrix, found: tuple[int, ...], executed: Executed, needed: int
) -> Affine:
    """A matrix with the node's bias; `needed` equations at least stand for what it does."""
    shape = tuple(node["shape"])
    # Axes of one, and the axes of the last node, may be written otherwise: the order is the same.
    if [n for n in found if n != 1] != [n for n in shape if n != 1] and (
        len(shape) != 1 or math.prod(found) != shape[0]
    ):
        raise CannotCheck(f"{name} makes the shape {found}, but says {shape}.")
    bias = node["bias"]
    if bias is not None:
        _fitting(name, bias, shape)
        needed += 1
    if len(node["executed"]) < needed:
        raise CannotCheck(f"{name} computes more than its {len(node['executed'])} equations say.")
    return _affine(matrix, bias, shape, executed=executed)


def _fitting(name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """In float64, if it can be broadcast to this shape."""
    axes = zip(reversed(value.shape), reversed(shape), strict=False)
    if value.ndim > len(shape) or any(n not in (1, wanted) for n, wanted in axes):
        raise CannotCheck(
            f"{name} has parameters of shape {value.shape}, which do not fit {shape}."
        )
    return value.astype(np.float64)


def _product(name: str, node, before, executed) -> Affine:
    """``dot_general``: which entry of the kernel meets which entry of the value, by positions."""
    kernel, shape = _kernel(name, node).astype(np.float64), tuple(before[0]["shape"])
    first = node["kernel_first"]
    numbers = node["numbers"]
    pairs = (
        type(numbers) is list
        and len(numbers) == 2
        and all(type(pair) is list and len(pair) == 2 for pair in numbers)
    )
    if type(first) is not bool or not pairs:
        raise CannotCheck(f"{name} has dimension numbers {numbers}, which are none.")
    axes = {}
    for side, operand in enumerate((kernel.shape, shape) if first else (shape, kernel.shape)):
        contracted, shared = numbers[0][side], numbers[1][side]
        used = [*contracted, *shared] if type(contracted) is type(shared) is list else [-1]
        if not _are_integers(used, 0, len(operand) - 1) or len(set(used)) < len(used):
            raise CannotCheck(
                f"{name} has dimension numbers {numbers}, which do not fit {operand}."
            )
        free = [axis for axis in range(len(operand)) if axis not in used]
        axes[side] = shared, free, contracted
    (shared_k, free_k, with_k), (shared_x, free_x, with_x) = axes[1 - first], axes[int(first)]

    def sizes(of, chosen):
        return [of[axis] for axis in chosen]

    batch, inner = sizes(shape, shared_x), sizes(shape, with_x)
    if sizes(kernel.shape, shared_k) != batch or sizes(kernel.shape, with_k) != inner:
        raise CannotCheck(f"{name} with a kernel of {kernel.shape} cannot take shape {shape}.")
    outer_x, outer_k = sizes(shape, free_x), sizes(kernel.shape, free_k)
    block = (math.prod(batch), math.prod(outer_x), math.prod(outer_k), math.prod(inner))
    _bounded(name, math.prod(block))
    places = np.arange(math.prod(shape)).reshape(shape).transpose([*shared_x, *free_x, *with_x])
    entries = kernel.transpose([*shared_k, *free_k, *with_k])
    places = places.reshape(block[0], block[1], 1, block[3])
    entries = entries.reshape(block[0], 1, block[2], block[3])
    columns, values = np.broadcast_arrays(places, entries)
    if first:  # free axes come in the order of the operands
        columns, values = columns.swapaxes(1, 2), values.swapaxes(1, 2)
    rows = math.prod(block[:3])
    starts = np.arange(rows + 1) * block[3]
    data = (values.reshape(-1), columns.reshape(-1), starts)
    matrix = scipy.sparse.csr_array(data, shape=(rows, math.prod(shape)))
    found = (*batch, *outer_k, *outer_x) if first else (*batch, *outer_x, *outer_k)
    return _linear(name, node, matrix, found, executed, 1)


def _kernel(name: str, node) -> np.ndarray:
    if node["kernel"] is None or node["kernel"].size == 0:
        raise CannotCheck(f"{name} has no kernel.")
    return node["kernel"]


def _conv(name: str, node, before, executed) -> Affine:
    kernel, shape = _kernel(name, node), tuple(before[0]["shape"])
    rank = kernel.ndim - 2
    if rank < 1:
        raise CannotCheck(f"{name} has a kernel of shape {kernel.shape}.")
    for field in ("strides", "dilation", "input_dilation"):
        _integers(name, node, field, rank, 1)
    pads = _pads(name, node, rank)
    if not _are_integers([node["groups"]], 1):
        raise CannotCheck(f"{name} has {node['groups']} groups.")
    # Each entry of the kernel stands once in every place of the output, of which there are at most
    # as many as of the padded input.
    apart = node["input_dilation"]
    dilated = [(n - 1) * d + 1 for n, d in zip(shape, apart, strict=False)]
    places = (
        max(size + low + high, size) // stride + 1
        for size, (low, high), stride in zip(dilated, pads, node["strides"], strict=False)
    )
    _bounded(name, math.prod(max(place, 0) for place in places) * kernel.size)
    matrix, found = _convolution(name, node, shape)
    return _linear(name, node, matrix, found, executed, 1)


def _scale(name: str, node, before, executed) -> Affine:
    shape = tuple(before[0]["shape"])
    entries = np.broadcast_to(_fitting(name, _kernel(name, node), shape), shape).reshape(-1)
    # Behind a function that ends otherwise stands the identity, which computes nothing.
    needed = 0 if np.all(entries == 1) and node["bias"] is None and not node["roundings"] else 1
    return _linear(name, node, scipy.sparse.diags_array(entries), shape, executed, needed)


def _joined(name: str, front, step) -> Affine:
    """An affine map and a scale or a shift behind it as one, executed in these parts."""
    shift = isinstance(step, Add) and len(step.signs) == 1 and step.signs[0] == 1
    if shift and step.constant is not None:
        assert step.executed is not None
        identity = scipy.sparse.eye_array(len(step.constant))
        once = dataclasses.replace(step.executed, results=1 + step.roundings)
        step = _affine(identity, step.constant, step.constant.shape, executed=once)
    if not isinstance(front, Affine) or not isinstance(step, Affine):
        raise CannotCheck(f"{name} is no scale or shift behind an affine node.")
    # The kernel and the bias that the tool joins are off by two roundings.
    assert step.executed is not None
    step = dataclasses.replace(
        step, executed=dataclasses.replace(step.executed, results=step.executed.results + 4)
    )
    factors = step.matrix.diagonal()
    bias = front.bias * factors + step.bias
    whole = _affine(scipy.sparse.diags_array(factors) @ front.matrix, bias, bias.shape)
    parts = (*(front.parts or (front,)), step)
    return dataclasses.replace(whole, executed=front.executed, parts=parts)


def _sum(name: str, node, before, executed) -> Affine:
    kernel, shape = _kernel(name, node), tuple(before[0]["shape"])
    rank = len(shape)
    window, strides, dilation = (
        _integers(name, node, field, rank, 1) for field in ("window", "strides", "dilation")
    )
    if kernel.size != 1 or any(d != 1 for d in _integers(name, node, "base_dilation", rank, 1)):
        raise CannotCheck(f"{name} is a sum of another kind than this checker knows.")
    places = []
    for size, width, step, apart, (low, high) in zip(
        shape, window, strides, dilation, _pads(name, node, rank), strict=True
    ):
        count = (size + low + high - (width - 1) * apart - 1) // step + 1
        if count < 1 or width > MOST_ENTRIES or count > MOST_ENTRIES:
            raise CannotCheck(f"{name} with a window of {window} cannot take shape {shape}.")
        places.append((np.arange(count) * step - low, width, apart))
    counts = tuple(len(start) for start, *_ in places)
    _bounded(name, math.prod(counts) * math.prod(window))
    taps = [[start + tap * apart for tap in range(width)] for start, width, apart in places]
    value = float(kernel.reshape(-1)[0])
    matrix, found = _gather(np.full((*window, 1, 1), value), taps, (*shape, 1), groups=1)
    return _linear(name, node, matrix, found[:-1], executed, 1 if value == 1 else 2)


# ---------------------------------------------------------------------- the others


def _move(name: str, node, before, executed) -> Move | None:
    index, fill = node["index"], node["fill"]
    shapes = [tuple(each["shape"]) for each in before]
    sizes = tuple(math.prod(shape) for shape in shapes)
    if not isinstance(index, np.ndarray) or index.dtype != np.int64:
        raise CannotCheck(f"{name} has no index of 64-bit integers.")
    if index.shape != tuple(node["shape"]) or np.any((index < -1) | (index >= sum(sizes))):
        raise CannotCheck(f"{name} has an index of shape {index.shape} that leads nowhere.")
    index = index.reshape(-1)
    if fill is None or fill.shape != (np.count_nonzero(index < 0),):
        raise CannotCheck(f"{name} has not one filling value for each place that is filled.")
    if len(sizes) == 1 and np.array_equal(index, np.arange(sizes[0])):
        return None  # another shape
    filling = np.zeros(len(index))
    filling[index < 0] = fill.astype(np.float64)
    return Move(index, filling, sizes)


def _add(name: str, node, before, executed) -> Add | Move | None:
    signs, constant, shape = node["signs"], node["constant"], tuple(node["shape"])
    if not _are_integers(signs, -1, 1) or 0 in signs or len(signs) != len(before):
        raise CannotCheck(f"{name} has the signs {signs}.")
    if any(tuple(each["shape"]) != shape for each in before):
        raise CannotCheck(f"{name} adds arrays of other shapes than {shape}.")
    addends = len(before) + (constant is not None)
    if addends > 2 or len(node["executed"]) > 1:
        raise CannotCheck(f"{name} adds {addends} arrays by {len(node['executed'])} equations.")
    casts = [equation[0] == "convert_element_type" for equation in node["executed"]]
    if any(casts) != (addends == 1 and bool(casts)):
        raise CannotCheck(f"{name} adds {addends} arrays by another equation than a sum.")
    if constant is not None:
        constant = np.broadcast_to(_fitting(name, constant, shape), shape).reshape(-1)
    elif node["roundings"]:
        raise CannotCheck(f"{name} has roundings of no parameter.")
    if addends == 1 and not node["executed"]:
        return None if signs[0] == 1 else Add((-1,), executed=executed)
    if not node["executed"]:
        # A constant of the program, written as a sum with nothing of the example.
        nothing = before[0]["kind"] == "move" and np.all(before[0]["index"] == -1)
        if len(before) > 1 or not nothing or np.any(before[0]["fill"]) or node["roundings"]:
            raise CannotCheck(f"{name} adds, but no equation says so.")
        size = math.prod(shape)
        return Move(np.full(size, -1), constant, (size,))
    rounded = Executed(executed.types, False, 1)
    return Add(tuple(signs), constant, 2 * node["roundings"], rounded)


def _clip(name: str, node, before, executed) -> Activation:
    return _activation(name, node, before, False)


def _maxmin(name: str, node, before, executed) -> Activation:
    return _activation(name, node, before, True)


def _activation(name: str, node, before, pairs: bool) -> Activation:
    shape = tuple(node["shape"])
    if tuple(before[0]["shape"]) != shape or (pairs and (not shape or shape[-1] % 2)):
        raise CannotCheck(f"{name} cannot take an input of shape {before[0]['shape']}.")
    half = (*shape[:-1], shape[-1] // 2) if pairs else shape
    ends = {"top": np.array(np.inf), "bottom": np.array(-np.inf)}
    for end in ends:
        if node[end] is not None:
            ends[end] = _fitting(name, node[end], half)
    return Activation(pairs, shape, **ends)


READERS: dict[str, Callable] = {
    "product": _product,
    "conv": _conv,
    "scale": _scale,
    "sum": _sum,
    "move": _move,
    "add": _add,
    "clip": _clip,
    "maxmin": _maxmin,
    **{kind: reader.read for kind, reader in kinds.READERS.items()},
}
