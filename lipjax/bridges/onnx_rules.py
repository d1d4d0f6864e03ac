"""What each kind of ONNX node computes, as operations of `lipjax.bridges.operations`.

A rule reads every attribute of its kind, in the opsets in which that stands elsewhere too: an
attribute, a type or a node without a meaning here is an error.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from lipjax.bridges import operations
from lipjax.bridges.program import Constant, Operand, Value, held

# Nodes without a value of their own to fold: each run gives another one.
RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"}
TYPES = ("float32", "float64")


class Node:
    """A node of a file, and what its attributes and operands are."""

    def __init__(self, reader, position: int, proto):
        self.reader, self.proto = reader, proto
        self.builder, self.opset = getattr(reader, "builder", None), reader.opset
        self.where = f"node {position}, {proto.op_type} '{proto.name or proto.output[0]}'"
        attributes = {a.name: reader.onnx.helper.get_attribute_value(a) for a in proto.attribute}
        self.attributes = attributes
        self.count = len(proto.input)

    def fail(self, message: str, error: type[Exception] = ValueError) -> NoReturn:
        raise error(f"{self.where}, {message}")

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute, which is then read."""
        value = self.attributes.pop(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def expect(self, name: str, *allowed) -> None:
        """Reads an attribute that may have these values, the first one if it is absent."""
        value = self.attribute(name, allowed[0])
        if value not in allowed:
            self.fail(f"has {name} {value!r}, expected {' or '.join(map(repr, allowed))}.")

    def finish(self, results: int) -> None:
        """Every attribute must have been read, and every result be there."""
        if self.attributes:
            self.fail(f"has settings that are not known: {', '.join(self.attributes)}.")
        more = [name for name in self.proto.output[results:] if name]
        if more:
            self.fail(f"gives {', '.join(more)} too, which is not known.")

    def has(self, i: int) -> bool:
        return i < self.count and bool(self.proto.input[i])

    def __getitem__(self, i: int) -> Operand:
        """An operand."""
        if not self.has(i):
            self.fail(f"has no input {i}.")
        return self.reader.values[self.proto.input[i]]

    def value(self, i: int = 0) -> Value:
        """An operand that depends on the example."""
        found = self[i]
        if not isinstance(found, Value):
            self.fail(f"has a constant as its input {i}, which is not known.")
        return found

    def weight(self, i: int) -> Constant:
        """An operand that does not."""
        found = self[i]
        if not isinstance(found, Constant):
            self.fail(
                f"takes {self.proto.input[i]}, its input {i}, from something that depends on the "
                "image: of a product of two such quantities no bound is known."
            )
        return found

    def numbers(self, i: int) -> np.ndarray:
        """A setting that is given as an operand."""
        found = self[i]
        if not isinstance(found, Constant):
            self.fail(f"takes its setting {self.proto.input[i]} from the image.")
        return found.array

    def setting(self, name: str, i: int, since: int) -> list[int] | None:
        """Whole numbers: an attribute before that opset, an operand after it; None: absent."""
        if self.opset < since:
            found = self.attribute(name)
            return None if found is None else list(found)
        return [int(n) for n in self.numbers(i).reshape(-1)] if self.has(i) else None

    def axis(self, axis: int, rank: int | None = None) -> int:
        rank = len(self.value().shape) if rank is None else rank
        if not -rank <= axis < rank:
            self.fail(f"has axis {axis}, of a value of {rank} axes.")
        return axis % rank

    def add(self, kind: str, *operands, **settings) -> Value:
        return self.reader.builder.add(kind, *operands, **settings)

    def folded(self) -> list[Constant]:
        """Its results in NumPy, by ONNX's own definition."""
        if self.proto.op_type in RANDOM:
            self.fail("is random: what is certified must be a function.")
        from onnx.reference import ReferenceEvaluator

        feeds = {name: self.numbers(i) for i, name in enumerate(self.proto.input) if name}
        try:
            evaluator = ReferenceEvaluator(self.proto, opsets=dict(self.reader.opsets))
            results = evaluator.run(None, feeds)
        except Exception as error:  # of any kind: whatever an operation of another's package raises
            self.fail(f"could not be computed: {error!r}")
        return [
            Constant(name, np.asarray(array))
            for name, array in zip(self.proto.output, results, strict=False)
        ]


Rule = Callable[[Node], Any]
RULES: dict[str, Rule] = {}


def _rule(*kinds: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds, rule))
        return rule

    return register


# ------------------------------------------------------------------------------------------ affine


def _geometry(node: Node, window: Sequence[int]) -> tuple[list[int], Any, list[int]]:
    """Strides, padding and dilation of a window on the node's value."""
    sizes = node.value().shape[2:]
    count = len(window)
    strides = list(node.attribute("strides", [1] * count))
    dilation = list(node.attribute("dilations", [1] * count))
    pads = list(node.attribute("pads", [0] * 2 * count))
    auto = node.attribute("auto_pad", "NOTSET")
    if not len(strides) == len(dilation) == len(pads) // 2 == len(sizes) == count:
        node.fail(
            f"has a window {tuple(window)}, strides {strides}, dilations {dilation} and pads "
            f"{pads} on a value with {len(sizes)} axes of space."
        )
    padding: Any = tuple(zip(pads[:count], pads[count:], strict=True))
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        padding = operations.same_padding(sizes, window, strides, dilation, auto == "SAME_UPPER")
    elif auto == "VALID":
        padding = ((0, 0),) * count
    elif auto != "NOTSET":
        node.fail(f"has auto_pad {auto!r}.")
    return strides, padding, dilation


def _kernel(node: Node) -> tuple[Constant, list[Constant]]:
    """Kernel and bias of a convolution."""
    node.value()
    kernel = node.weight(1)
    window = kernel.array.shape[2:]
    if list(node.attribute("kernel_shape", window)) != list(window):
        node.fail(f"has another kernel_shape than that of its kernel, {window}.")
    return kernel, [node.weight(2)] if node.has(2) else []


@_rule("Conv")
def _conv(node: Node):
    kernel, bias = _kernel(node)
    strides, padding, dilation = _geometry(node, kernel.array.shape[2:])
    groups = node.attribute("group", 1)
    settings = {"strides": tuple(strides), "dilation": tuple(dilation), "groups": groups}
    builder = node.reader.builder
    return builder.convolution(node[0], kernel, *bias, padding=padding, **settings)


@_rule("ConvTranspose")
def _conv_transpose(node: Node):
    kernel, bias = _kernel(node)
    sizes, window = node.value().shape[2:], kernel.array.shape[2:]
    more = tuple(node.attribute("output_padding", [0] * len(window)))
    wanted = node.attribute("output_shape")
    auto = node.attributes.get("auto_pad", b"NOTSET").decode()
    strides, padding, dilation = _geometry(node, window)
    if wanted is not None or auto.startswith("SAME"):
        # So much is cut that this size is left; an odd one at the end, or in front for SAME_LOWER.
        if wanted is None:
            wanted = [n * s for n, s in zip(sizes, strides, strict=True)]
        pairs = []
        rows = zip(sizes, window, strides, dilation, more, list(wanted)[-len(sizes) :], strict=True)
        for n, k, s, d, end, target in rows:
            total = max((n - 1) * s + d * (k - 1) + 1 + end - target, 0)
            small = total // 2
            pairs.append((total - small, small) if auto != "SAME_UPPER" else (small, total - small))
        padding = tuple(pairs)
    settings = {"strides": tuple(strides), "dilation": tuple(dilation), "more": more}
    groups = node.attribute("group", 1)
    operands = node[0], kernel, *bias
    return node.add("transposed_convolution", *operands, padding=padding, groups=groups, **settings)


@_rule("Gemm")
def _gemm(node: Node):
    alpha, beta = node.attribute("alpha", 1.0), node.attribute("beta", 1.0)
    sides = [
        _turned(node, i, node.attribute(name, 0)) for i, name in ((0, "transA"), (1, "transB"))
    ]
    y = node.add("matmul", *sides)
    y = y if alpha == 1 else node.add("mul", y, alpha)
    if not node.has(2):
        return y
    bias = node[2]
    bias = bias if beta == 1 else _scaled(node, bias, beta)
    return node.add("add", y, bias)


def _turned(node: Node, i: int, turn: int) -> Operand:
    operand = node[i]
    if not turn:
        return operand
    if isinstance(operand, Constant):
        return Constant(operand.name, np.ascontiguousarray(operand.array.T), operand.trained)
    return node.add("transpose", operand, order=(1, 0))


def _scaled(node: Node, operand: Operand, factor: float) -> Operand:
    if isinstance(operand, Constant):
        scaled = operand.array * operand.array.dtype.type(factor)
        return Constant(operand.name, scaled, operand.trained)
    return node.add("mul", operand, factor)


@_rule("MatMul")
def _matmul(node: Node):
    return node.add("matmul", node[0], node[1])


@_rule("BatchNormalization")
def _batch_normalization(node: Node):
    node.expect("training_mode", 0)
    node.attribute("momentum")
    epsilon = node.attribute("epsilon", 1e-5)
    scale, shift = node.weight(1), node.weight(2)
    mean, variance = (Constant(w.name, w.array, trained=False) for w in map(node.weight, (3, 4)))
    if not np.all(variance.array + epsilon > 0):
        node.fail(f"has variances + epsilon <= 0: {np.min(variance.array) + epsilon}.")
    return node.add("batch_norm", node.value(), mean, variance, scale, shift, epsilon=epsilon)


def _arithmetic(kind: str) -> Rule:
    return lambda node: node.add(kind, node[0], node[1])


RULES.update({kind: _arithmetic(kind.lower()) for kind in ("Add", "Sub", "Mul", "Div")})


def _folded(kind: str) -> Rule:
    """Of any number of operands: constants together first."""

    def rule(node: Node):
        result = node[0]
        for i in range(1, node.count):
            result = node.add(kind, result, node[i])
        return result

    return rule


RULES["Sum"] = _folded("add")


@_rule("Max", "Min")
def _extreme(node: Node):
    kind = "maximum" if node.proto.op_type == "Max" else "minimum"
    # The constants last: the value of the example is what is cut.
    operands = sorted((node[i] for i in range(node.count)), key=lambda o: isinstance(o, Constant))
    result = operands[0]
    for operand in operands[1:]:
        cut = operand.array if isinstance(operand, Constant) else None
        if cut is not None and cut.size == 1 and cut.reshape(-1)[0] == 0 and kind == "maximum":
            result = node.reader.builder.relu(result)
        else:
            result = node.add(kind, result, operand)
    return result


# ----------------------------------------------------------------------------------------- pooling


@_rule("MaxPool")
def _max_pool(node: Node):
    node.expect("storage_order", 0)
    return node.add("max_pool", node.value(), **_pooling(node))


@_rule("AveragePool")
def _average_pool(node: Node):
    include = node.attribute("count_include_pad", 0)
    settings = _pooling(node, given=True)
    given = settings.pop("given")
    counted = given if include else ((0, 0),) * len(given)
    return node.add("average_pool", node.value(), counted=counted, **settings)


def _pooling(node: Node, given: bool = False) -> dict[str, Any]:
    window = node.attribute("kernel_shape")
    strides, padding, dilation = _geometry(node, window)
    ceil = bool(node.attribute("ceil_mode", 0))
    sizes = node.value().shape[2:]
    full = operations.pooled_padding(sizes, window, strides, padding, dilation, ceil)
    found = {"window": tuple(window), "strides": tuple(strides), "dilation": tuple(dilation)}
    return {**found, "padding": full, **({"given": padding} if given else {})}


@_rule("GlobalAveragePool")
def _global_average_pool(node: Node):
    axes = tuple(range(2, len(node.value().shape)))
    return node.add("mean", node.value(), axes=axes, keep=True)


@_rule("GlobalMaxPool")
def _global_max_pool(node: Node):
    window = node.value().shape[2:]
    none = ((0, 0),) * len(window)
    ones = (1,) * len(window)
    return node.add(
        "max_pool", node.value(), window=window, strides=ones, padding=none, dilation=ones
    )


# --------------------------------------------------------------------------------- moves and sums


@_rule("Identity")
def _identity(node: Node):
    return node[0]


@_rule("Dropout")
def _dropout(node: Node):
    node.attribute("ratio")
    node.attribute("seed")
    if node.has(2) and bool(node.numbers(2).reshape(-1)[0]):
        node.fail("is in training mode: export the network in inference mode.")
    return node.value()


@_rule("Cast")
def _cast(node: Node):
    dtype = node.reader.onnx.helper.tensor_dtype_to_np_dtype(node.attribute("to"))
    node.attribute("saturate")
    node.attribute("round_mode")
    wanted = held(np.zeros((), dtype)).dtype
    if wanted.name not in TYPES:
        node.fail(f"casts to {dtype.name}, expected {' or '.join(TYPES)}.")
    value = node.value()
    return value if value.dtype == wanted else node.add("cast", value, dtype=wanted.name)


@_rule("Shape")
def _shape(node: Node):
    sizes = node.value().shape
    start, end = node.attribute("start", 0), node.attribute("end", len(sizes))
    return Constant(node.proto.output[0], np.asarray(sizes[start:end], np.int64))


@_rule("Size")
def _size(node: Node):
    return Constant(node.proto.output[0], np.asarray(math.prod(node.value().shape), np.int64))


@_rule("Flatten")
def _flatten(node: Node):
    sizes = node.value().shape
    axis = node.attribute("axis", 1)
    axis = axis + len(sizes) if axis < 0 else axis
    shape = (math.prod(sizes[:axis]), math.prod(sizes[axis:]))
    return _reshaped(node, shape)


@_rule("Reshape")
def _reshape(node: Node):
    sizes = node.value().shape
    keep = not node.attribute("allowzero", 0)
    wanted = [int(n) for n in node.numbers(1).reshape(-1)]
    wanted = [sizes[i] if n == 0 and keep and i < len(sizes) else n for i, n in enumerate(wanted)]
    return _reshaped(node, wanted)


def _reshaped(node: Node, shape: Sequence[int]):
    value = node.value()
    known = math.prod(n for n in shape if n != -1)
    found = tuple(math.prod(value.shape) // max(known, 1) if n == -1 else n for n in shape)
    if math.prod(found) != math.prod(value.shape):
        node.fail(
            f"makes {tuple(shape)} of a value of shape {value.shape} (one example): a file that "
            "was exported for a batch of another size has to be exported for one."
        )
    return value if found == value.shape else node.add("reshape", value, shape=found)


@_rule("Transpose")
def _transpose(node: Node):
    rank = len(node.value().shape)
    order = tuple(node.attribute("perm", list(reversed(range(rank)))))
    return node.add("transpose", node.value(), order=order)


@_rule("Squeeze")
def _squeeze(node: Node):
    sizes = node.value().shape
    axes = node.setting("axes", 1, 13)
    chosen = (
        {i for i, n in enumerate(sizes) if n == 1}
        if axes is None
        else {node.axis(axis) for axis in axes}
    )
    if any(sizes[axis] != 1 for axis in chosen):
        node.fail(f"takes away the axes {sorted(chosen)} of a value of shape {sizes}.")
    return _reshaped(node, [n for i, n in enumerate(sizes) if i not in chosen])


@_rule("Unsqueeze")
def _unsqueeze(node: Node):
    sizes = node.value().shape
    axes = node.setting("axes", 1, 13) or []
    rank = len(sizes) + len(axes)
    chosen = {node.axis(axis, rank) for axis in axes}
    own = iter(sizes)
    return _reshaped(node, [1 if i in chosen else next(own) for i in range(rank)])


@_rule("Expand")
def _expand(node: Node):
    value = node.value()
    try:
        shape = np.broadcast_shapes(value.shape, tuple(int(n) for n in node.numbers(1)))
    except ValueError as error:
        node.fail(f"does not fit: {error}")
    return value if shape == value.shape else node.add("broadcast", value, shape=shape)


@_rule("Concat")
def _concat(node: Node):
    parts = [node[i] for i in range(node.count)]
    first = next(part for part in parts if isinstance(part, Value))
    axis = node.axis(node.attribute("axis"), len(first.shape))
    return node.reader.builder.concatenate(parts, axis)


@_rule("Split")
def _split(node: Node):
    axis = node.axis(node.attribute("axis", 0))
    whole, count = node.value().shape[axis], len(node.proto.output)
    sizes = node.setting("split", 1, 13)
    if node.attribute("num_outputs", count) != count:
        node.fail(f"has another num_outputs than its {count} outputs.")
    if sizes is None:
        size = -(-whole // count)
        sizes = [size] * (count - 1) + [whole - size * (count - 1)]
    ends = np.cumsum(sizes)
    return [
        node.add("slice", node.value(), axis=axis, start=int(end - n), stop=int(end), step=1)
        for end, n in zip(ends, sizes, strict=True)
    ]


@_rule("Slice")
def _slice(node: Node):
    starts, ends = node.setting("starts", 1, 10), node.setting("ends", 2, 10)
    axes, steps = node.setting("axes", 3, 10), node.setting("steps", 4, 10)
    assert starts is not None and ends is not None
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    value = node.value()
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = node.axis(axis)
        first, stop, step = slice(start, end, step).indices(value.shape[axis])
        if (first, stop, step) != (0, value.shape[axis], 1):
            value = node.add("slice", value, axis=axis, start=first, stop=stop, step=step)
    return value


@_rule("Gather")
def _gather(node: Node):
    axis, indices = node.axis(node.attribute("axis", 0)), node.numbers(1)
    size = node.value().shape[axis]
    if np.any(indices < -size) or np.any(indices >= size):
        node.fail(f"takes entries {indices.tolist()} of an axis of {size}.")
    flat = tuple(int(i) % size for i in indices.reshape(-1))
    return node.add("take", node.value(), indices=flat, shape=indices.shape, axis=axis)


@_rule("Pad")
def _pad(node: Node):
    mode = node.attribute("mode", "constant")
    if mode not in ("constant", "reflect", "edge", "wrap"):
        node.fail(f"has mode {mode!r}, expected constant, reflect, edge or wrap.")
    widths = node.setting("pads", 1, 11)
    assert widths is not None
    filling = node.attribute("value", 0.0) if node.opset < 11 else 0.0
    if node.opset >= 11 and node.has(2):
        filling = float(node.numbers(2).reshape(-1)[0])
    rank = len(node.value().shape)
    axes = [int(n) for n in node.numbers(3)] if node.has(3) else list(range(rank))
    pairs = [(0, 0)] * rank
    for axis, low, high in zip(axes, widths[: len(axes)], widths[len(axes) :], strict=True):
        pairs[node.axis(axis)] = (low, high)
    if mode != "constant" and any(low < 0 or high < 0 for low, high in pairs):
        node.fail(f"has mode {mode!r} and cuts, which is not known together.")
    return node.add("pad", node.value(), widths=tuple(pairs), mode=mode, value=filling)


@_rule("ReduceMean", "ReduceSum")
def _reduce(node: Node):
    kind = node.proto.op_type.removeprefix("Reduce").lower()
    axes = node.setting("axes", 1, 18 if kind == "mean" else 13)
    keep = bool(node.attribute("keepdims", 1))
    nothing = node.attribute("noop_with_empty_axes", 0)
    rank = len(node.value().shape)
    if not axes and nothing:
        return node.value()
    chosen = tuple(sorted(node.axis(axis) for axis in axes)) if axes else tuple(range(rank))
    return node.add(kind, node.value(), axes=chosen, keep=keep)


# -------------------------------------------------------------------------------------- activations


@_rule("Relu")
def _relu(node: Node):
    return node.reader.builder.relu(node.value())


@_rule("Clip")
def _clip(node: Node):
    if node.opset < 11:
        low, high = node.attribute("min"), node.attribute("max")
    else:
        ends = (node.numbers(i) if node.has(i) else None for i in (1, 2))
        low, high = (None if end is None else float(end.reshape(-1)[0]) for end in ends)
    # The largest number of the type stands for no end.
    limit = float(np.finfo(np.float32).max)
    low = None if low is None or low <= -limit else low
    high = None if high is None or high >= limit else high
    if low is None and high is None:
        return node.value()
    if low == 0 and high is None:
        return node.reader.builder.relu(node.value())
    return node.add("clip", node.value(), low=low, high=high)


@_rule("PRelu")
def _prelu(node: Node):
    return node.add("prelu", node.value(), node.weight(1))


@_rule("Pow")
def _pow(node: Node):
    exponent = node.numbers(1)
    if exponent.size != 1:
        node.fail(f"has exponents of shape {exponent.shape}, expected one number.")
    return node.add("power", node.value(), exponent=float(exponent.reshape(-1)[0]))


@_rule("Softmax", "LogSoftmax")
def _softmax(node: Node):
    rank = len(node.value().shape)
    # Before opset 13 all axes from this one on are one.
    axis = node.axis(node.attribute("axis", 1 if node.opset < 13 else -1))
    if node.opset < 13 and axis != rank - 1:
        node.fail(f"has axis {axis} of {rank}, expected the last one.")
    kind = "softmax" if node.proto.op_type == "Softmax" else "log_softmax"
    return node.add(kind, node.value(), axis=axis)


@_rule("Gelu")
def _gelu(node: Node):
    node_mode = node.attribute("approximate", "none")
    if node_mode not in ("none", "tanh"):
        node.fail(f"has approximate {node_mode!r}, expected none or tanh.")
    return node.add("gelu", node.value(), approximate=node_mode == "tanh")


# Elementwise functions: the operation, and its settings as (name here, name there, default).
FUNCTIONS: dict[str, tuple[str, tuple[tuple[str, str, float], ...]]] = {
    "Abs": ("abs", ()),
    "Celu": ("celu", (("alpha", "alpha", 1.0),)),
    "Elu": ("elu", (("alpha", "alpha", 1.0),)),
    "Erf": ("erf", ()),
    "Exp": ("exp", ()),
    "HardSigmoid": ("hard_sigmoid", (("alpha", "alpha", 0.2), ("beta", "beta", 0.5))),
    "HardSwish": ("hard_swish", ()),
    "LeakyRelu": ("leaky_relu", (("negative_slope", "alpha", 0.01),)),
    "Log": ("log", ()),
    "Mish": ("mish", ()),
    "Neg": ("neg", ()),
    "Reciprocal": ("reciprocal", ()),
    "Sigmoid": ("sigmoid", ()),
    "Softplus": ("softplus", ()),
    "Softsign": ("softsign", ()),
    "Sqrt": ("sqrt", ()),
    "Tanh": ("tanh", ()),
}


def _function(node: Node):
    kind, settings = FUNCTIONS[node.proto.op_type]
    given = {ours: node.attribute(theirs, default) for ours, theirs, default in settings}
    return node.add(kind, node.value(), **given)


RULES.update(dict.fromkeys(FUNCTIONS, _function))
