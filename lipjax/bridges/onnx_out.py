"""A function as an ONNX file, written node by node from its graph.

Input "images", ``(N, height, width, channels)``, pixels in [0, 1], not normalised (what the
function itself normalises goes along as nodes); output "logits", ``(N, classes)``. A linear node
becomes MatMul, Einsum, Conv or Mul with its own kernel (a sum over windows a Conv with the kernel
of its matrix) and an Add or the Conv's bias; activations become comparisons (Relu, Max, Min, Abs)
and sorts (TopK).

**What a certificate says of the file.** A certificate is about the network as executed in a stated
arithmetic. With float32, its margin allows for every execution that follows the model of
`lipjax.rounding`: each linear node an inner product of the stored float32 numbers, summed in any
order, with or without fused multiply-adds, each operation with a relative error of at most 2^-24,
underflow to zero; activations without rounding. A runtime that executes the nodes of this file in
that way is covered, whatever its order of summation. One is *not* covered that computes
convolutions otherwise (Winograd, Fourier), in TF32, float16 or bfloat16 (where the certificate does
not state that arithmetic), quantised, or that rewrites weights before it starts (fusing a scale
into a kernel makes other numbers); nor one that gets pixels outside [0, 1], in another layout, or
resized. The file says so in its metadata. Which of these a runtime does on a machine, only the
runtime can say.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lipjax.activations.absolute import AbsoluteValue
from lipjax.activations.clip import Clip
from lipjax.activations.groupsort import Sort
from lipjax.activations.leaky import Leaky
from lipjax.activations.maxmin import Pairs
from lipjax.activations.pooling import MaxPool
from lipjax.activations.smooth import Elu, Smooth
from lipjax.formats import certificate_files
from lipjax.formats.files import replaced
from lipjax.graph import Activation, Add, Graph, Input, Linear, Node, Rearrange, trace
from lipjax.graph.description import positions, windows
from lipjax.graph.linear import Convolution, Product, Reshaped, Scale, Sum

OPSET = 17
# What the metadata says; see the module's text.
METADATA = {
    "input": "images (N, height, width, channels), pixels in [0, 1], not normalised",
    "output": "logits (N, classes)",
    "certificates": (
        "Certificates of lipjax are about the network as executed in the arithmetic that they "
        "state. One that states float32 covers executions of these nodes in which every linear "
        "node is an inner product of the stored float32 numbers, in any order of summation, with "
        "or without fused multiply-adds, with relative errors of at most 2^-24 an operation. It "
        "does not cover Winograd or Fourier convolutions, TF32, float16, bfloat16 or quantised "
        "execution, or weights that a runtime rewrites (fusion of scales into kernels)."
    ),
}


def to_onnx(f: Callable, path, *, input_shape: Sequence[int]) -> None:
    """Writes a function as an ONNX file (opset 17). Needs the package onnx.

    Args:
        f: any function that `lipjax.trace` takes. It is traced on float32, or, if all floating
            parameters of a module are float64, on that; all of it must compute in that type, which
            becomes that of the input.
        path: the file, by custom ``*.onnx``.
        input_shape: of one image, ``(height, width, channels)``, or of what else f takes.

    Raises:
        ImportError: onnx is not installed.
        TypeError: an operation that has no bound, or none in ONNX, with the line of the program.
        ValueError: another type on the way; shapes that do not fit f.
        OSError: the file cannot be written.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("to_onnx needs the package onnx: pip install onnx") from error

    shape = tuple(int(n) for n in input_shape)
    types = {str(leaf.dtype) for leaf in jax.tree.leaves(f) if hasattr(leaf, "dtype")}
    floating = {name for name in types if "float" in name}
    dtype = np.dtype("float64" if floating == {"float64"} else "float32")
    graph = f if isinstance(f, Graph) else trace(f, jax.ShapeDtypeStruct(shape, dtype))
    graph = graph.spelled_out()
    if len(graph.shape) != 1:
        raise ValueError(
            f"the logits must have one axis, got shape {graph.shape}: a lipjax.Flatten is missing."
        )

    writer = Writer(dtype)
    names: list[str] = []
    for node in graph.nodes:
        _check(node, dtype)
        before = [graph.nodes[i] for i in node.inputs]
        names.append(_written(writer, node, [names[i] for i in node.inputs], before))
    writer.add("Identity", names[-1], output="logits")

    model = writer.model(onnx, shape, graph.shape)
    onnx.checker.check_model(model, full_check=True)
    with replaced(path) as file:
        file.write(model.SerializeToString())


def _check(node: Node, dtype: np.dtype) -> None:
    """Refuses what an ONNX file of this type would compute otherwise."""
    types = {node.dtype}
    for equation in node.executed:
        types |= {*equation.operands, equation.result}
    if types != {dtype.name}:
        raise ValueError(
            f"{node.where} computes in {', '.join(sorted(types - {dtype.name}))}: expected all of "
            f"it in {dtype.name}."
        )
    if math.isinf(getattr(node, "roundings", 0.0)):
        raise TypeError(
            f"{node.where}: parameters that are computed anew at every call, as by layers of "
            "lipjax.orthogonal: export lipjax.orthogonal.plain(network)."
        )


class Writer:
    """Nodes and constants of an ONNX file as they are added."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype
        self._nodes: list[tuple[str, tuple[str, ...], tuple[str, ...], dict[str, Any]]] = []
        self._constants: dict[str, np.ndarray] = {}

    def add(self, operation: str, *inputs: str, output: str | None = None, **attributes) -> str:
        """Adds a node with one output and returns the output's name. Operations and attributes are
        those of ONNX, opset 17."""
        outputs = [output] if output else None
        return self.add_many(operation, *inputs, outputs=outputs, **attributes)[0]

    def add_many(
        self,
        operation: str,
        *inputs: str,
        outputs: Sequence[str] | None = None,
        count: int = 1,
        **attributes,
    ) -> tuple[str, ...]:
        """The same with several outputs; returns their names."""
        stem = f"{operation.lower()}_{len(self._nodes)}"
        made = [f"{stem}_{k}" if count > 1 else stem for k in range(count)]
        names = tuple(outputs or made)
        self._nodes.append((operation, inputs, names, attributes))
        return names

    def constant(self, array) -> str:
        """Adds a constant and returns its name; floats become the file's type."""
        array = np.asarray(array)
        array = array.astype(self.dtype) if np.issubdtype(array.dtype, np.floating) else array
        name = f"constant_{len(self._constants)}"
        self._constants[name] = np.ascontiguousarray(array)
        return name

    def integers(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def reshaped(self, x: str, shape: Sequence[int]) -> str:
        """Of each example."""
        return self.add("Reshape", x, self.integers(-1, *shape))

    def model(self, onnx, input_shape: Sequence[int], output_shape: Sequence[int]):
        """The ModelProto."""
        helper, kind = onnx.helper, onnx.helper.np_dtype_to_tensor_dtype(self.dtype)
        graph = helper.make_graph(
            [
                helper.make_node(o, i, names, name=names[0], **attributes)
                for o, i, names, attributes in self._nodes
            ],
            "lipjax",
            [helper.make_tensor_value_info("images", kind, ["N", *input_shape])],
            [helper.make_tensor_value_info("logits", kind, ["N", *output_shape])],
            [onnx.numpy_helper.from_array(array, name) for name, array in self._constants.items()],
        )
        version = certificate_files.versions()["lipjax"]
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(
            graph, opset_imports=[opset], producer_name="lipjax", producer_version=version
        )
        model.ir_version = 8  # that of opset 17: older runtimes read it too
        helper.set_model_props(model, METADATA)
        return model


def _written(writer: Writer, node: Node, inputs: list[str], before: list[Node]) -> str:
    """Adds a node of the graph; returns the name of its value, ``(N, *shape)``."""
    if isinstance(node, Input):
        return "images"
    if isinstance(node, Linear):
        return _linear(writer, node, inputs[0], before[0].shape)
    if isinstance(node, Rearrange):
        return _rearranged(writer, node, inputs, before)
    if isinstance(node, Add):
        return _added(writer, node, inputs)
    assert isinstance(node, Activation)
    if type(node.rule) not in rules.registry:
        raise TypeError(
            f"{node.where}: the activation {node.rule.kind} has no rule for ONNX: register one "
            "with lipjax.bridges.onnx_out.rules.register."
        )
    return rules(node.rule, writer, inputs[0], node.shape)


# ------------------------------------------------------------------------------------ linear nodes


def _linear(writer: Writer, node: Linear, x: str, shape: tuple[int, ...]) -> str:
    apply, kernel = node.operator.apply, np.asarray(node.operator.kernel)
    bias = None if node.operator.bias is None else np.asarray(node.operator.bias)
    while type(apply) is Reshaped:
        apply = apply.inner
    if type(apply) is Convolution:
        # As one of its own where there is one number per channel.
        own = [bias] if bias is not None and bias.shape == kernel.shape[-1:] else []
        bias = None if own else bias
        y = _convolved(writer, apply, kernel, own, x, node.where)
    elif type(apply) is Product:
        y = _multiplied(writer, apply, kernel, x, shape)
    elif type(apply) is Scale:
        y = writer.add("Mul", x, writer.constant(kernel)) if np.any(kernel != 1) else x
    elif type(apply) is Sum:
        y = _summed(writer, node, float(kernel.reshape(())), x, shape)
    else:
        raise TypeError(
            f"{node.where}: a linear map by {type(apply).__name__} has no rule for ONNX. Write it "
            "with matrix products, convolutions or sums."
        )
    if node.operator.apply is not apply or type(apply) is Sum:
        y = writer.reshaped(y, node.shape)
    return y if bias is None else writer.add("Add", y, writer.constant(bias))


def _multiplied(writer: Writer, apply: Product, kernel, x: str, shape) -> str:
    """A MatMul over the last axis, else an Einsum."""
    contracted, shared = apply.numbers
    axes = (contracted[1], contracted[0]) if apply.kernel_first else contracted
    last = tuple(axes[0]) == (len(shape) - 1,) and tuple(axes[1]) == (0,)
    if kernel.ndim == 2 and last and not shared[0] and not apply.kernel_first:
        return writer.add("MatMul", x, writer.constant(kernel))

    letters = iter("abcdefghijklmopqrstuvwxyz")  # n: the images
    ranks = (kernel.ndim, len(shape)) if apply.kernel_first else (len(shape), kernel.ndim)
    names = [[next(letters) for _ in range(rank)] for rank in ranks]
    for pairs in (contracted, shared):
        for left, right in zip(*pairs, strict=True):
            names[1][right] = names[0][left]
    common = [names[0][axis] for axis in shared[0]]
    free = [
        name
        for own, with_, also in zip(names, contracted, shared, strict=True)
        for axis, name in enumerate(own)
        if axis not in (*with_, *also)
    ]
    value, weights = (names[1], names[0]) if apply.kernel_first else (names[0], names[1])
    equation = f"n{''.join(value)},{''.join(weights)}->n{''.join([*common, *free])}"
    return writer.add("Einsum", x, writer.constant(kernel), equation=equation)


def _convolved(writer: Writer, apply: Convolution, kernel, bias, x: str, where: str) -> str:
    """Channels last to channels first, the convolution, and back."""
    rank = len(apply.strides)
    if any(d != 1 for d in apply.input_dilation):
        raise ValueError(
            f"{where}: a convolution with input_dilation {apply.input_dilation} has no rule for "
            "ONNX."
        )
    assert not isinstance(apply.padding, str)  # of a traced convolution
    pads = [*(low for low, _ in apply.padding), *(high for _, high in apply.padding)]
    if any(p < 0 for p in pads):
        raise ValueError(
            f"{where}: a convolution with padding {apply.padding} has no rule for ONNX: expected "
            "numbers >= 0."
        )
    y = writer.add("Transpose", x, perm=[0, rank + 1, *range(1, rank + 1)])
    y = writer.add(
        "Conv",
        *(y, writer.constant(np.moveaxis(kernel, (-1, -2), (0, 1)))),
        *(writer.constant(each) for each in bias),
        strides=list(apply.strides),
        pads=pads,
        dilations=list(apply.dilation),
        group=apply.groups,
    )
    return writer.add("Transpose", y, perm=[0, *range(2, rank + 2), 1])


def _summed(writer: Writer, node: Linear, number: float, x: str, shape) -> str:
    """A Conv of the very number that the matrix has, over the axes that are summed: ONNX's own
    averages divide by the size of the window."""
    apply = node.operator.apply
    assert isinstance(apply, Sum)
    found = windows(apply, node.where, shape)
    if any(d != 1 for d in found["base_dilation"]):
        raise ValueError(f"{node.where}: a sum with base_dilation has no rule for ONNX.")
    plain = (1, 1, [0, 0])
    each = list(zip(found["window"], found["strides"], found["padding"], strict=True))
    summed = [axis for axis, entry in enumerate(each) if entry != plain]
    others = [axis for axis in range(len(shape)) if axis not in summed]
    if not summed:
        return writer.add("Mul", x, writer.constant(np.float64(number)))

    order = [*others, *summed]
    y = writer.add("Transpose", x, perm=[0, *(1 + axis for axis in order)])
    y = writer.reshaped(y, (1, *(shape[axis] for axis in summed)))
    kernel = np.full((1, 1, *(found["window"][axis] for axis in summed)), number)
    pads = [found["padding"][axis] for axis in summed]
    y = writer.add(
        "Conv",
        *(y, writer.constant(kernel)),
        strides=[found["strides"][axis] for axis in summed],
        pads=[*(low for low, _ in pads), *(high for _, high in pads)],
        dilations=[found["dilation"][axis] for axis in summed],
    )
    counts = [
        (shape[k] + sum(found["padding"][k]) - (found["window"][k] - 1) * found["dilation"][k] - 1)
        // found["strides"][k]
        + 1
        for k in summed
    ]
    y = writer.reshaped(y, [*(shape[axis] for axis in others), *counts])
    return writer.add("Transpose", y, perm=[0, *(1 + int(axis) for axis in np.argsort(order))])


# ------------------------------------------------------------------------- sums and rearrangements


def _added(writer: Writer, node: Add, inputs: list[str]) -> str:
    total = inputs[0] if node.signs[0] == 1 else writer.add("Neg", inputs[0])
    for sign, name in zip(node.signs[1:], inputs[1:], strict=True):
        total = writer.add("Add" if sign == 1 else "Sub", total, name)
    if node.constant is None:
        return total
    return writer.add("Add", total, writer.constant(np.asarray(node.constant)))


def _rearranged(writer: Writer, node: Rearrange, inputs: list[str], before: list[Node]) -> str:
    """Reshape, Transpose and Concat as they are; all else by positions."""
    moves = {"reshape", "squeeze", "transpose", "concatenate"}
    if {step.primitive.name for step in node.steps} <= moves:
        likes = [jax.ShapeDtypeStruct(each.shape, np.float32) for each in before]
        for step in node.steps:
            name, parameters = step.primitive.name, dict(step.parameters)
            shape = jax.eval_shape(step, *likes).shape
            if name == "concatenate":
                inputs = [writer.add("Concat", *inputs, axis=1 + parameters["dimension"])]
            elif name == "transpose":
                order = [0, *(1 + axis for axis in parameters["permutation"])]
                inputs = [writer.add("Transpose", inputs[0], perm=order)]
            else:
                inputs = [writer.reshaped(inputs[0], shape)]
            likes = [jax.ShapeDtypeStruct(shape, np.float32)]
        return inputs[0]

    index, fill = positions(node, [each.shape for each in before])
    flat = [writer.reshaped(name, (each.size,)) for name, each in zip(inputs, before, strict=True)]
    y = flat[0] if len(flat) == 1 else writer.add("Concat", *flat, axis=1)
    if fill.size:  # an entry of 0 behind the others, in the place of what fills
        y = writer.add("Pad", y, writer.integers(0, 0, 0, 1))
        index = np.where(index < 0, sum(each.size for each in before), index)
    y = writer.add("Gather", y, writer.constant(index.reshape(-1)), axis=1)
    if np.any(fill):
        filling = np.zeros(index.size, node.dtype)
        filling[index.reshape(-1) == index.max()] = fill
        y = writer.add("Add", y, writer.constant(filling))
    return writer.reshaped(y, node.shape)


# ------------------------------------------------------------------------------------- activations


@functools.singledispatch
def rules(rule, writer: Writer, x: str, shape: tuple[int, ...]) -> str:
    """Adds an activation. Register your own rules, exact types::

        @lipjax.bridges.onnx_out.rules.register(MyRule)
        def _(rule, writer, x, shape):
            return writer.add("Tanh", x)

    Args:
        rule: the activation's `lipjax.activations.Rule`, with its parameters.
        writer: what to add to.
        x: name of its input, ``(N, *shape)``.
        shape: of one example's input.

    Returns:
        The name of the output.
    """
    raise TypeError(f"no rule for {type(rule).__name__}.")


@rules.register
def _(rule: Clip, writer, x, shape):
    if rule.rectifies:
        x = writer.add("Relu", x)
    elif rule.bottom is not None:
        x = writer.add("Max", x, writer.constant(np.asarray(rule.bottom)))
    return x if rule.top is None else writer.add("Min", x, writer.constant(np.asarray(rule.top)))


@rules.register
def _(rule: Pairs, writer, x, shape):
    half = shape[-1] // 2
    a, b = writer.add_many("Split", x, writer.integers(half, half), count=2, axis=-1)
    first, second = writer.add("Max", a, b), writer.add("Min", a, b)
    if rule.top is not None:
        first = writer.add("Min", first, writer.constant(np.asarray(rule.top)))
    if rule.bottom is not None:
        second = writer.add("Max", second, writer.constant(np.asarray(rule.bottom)))
    return writer.add("Concat", first, second, axis=-1)


@rules.register
def _(rule: AbsoluteValue, writer, x, shape):
    return writer.add("Abs", x)


@rules.register
def _(rule: Sort, writer, x, shape):
    size = writer.integers(shape[rule.axis])
    found = writer.add_many("TopK", x, size, count=2, axis=1 + rule.axis % len(shape), largest=0)
    return found[0]


@rules.register
def _(rule: Leaky, writer, x, shape):
    zero = writer.constant(np.zeros((), writer.dtype))
    parts = []
    for operation, slope in (("Max", rule.above), ("Min", rule.below)):
        part = writer.add(operation, x, zero)
        slope = np.asarray(slope, writer.dtype)
        parts.append(
            part if np.all(slope == 1) else writer.add("Mul", part, writer.constant(slope))
        )
    return writer.add("Add", *parts)


@rules.register
def _(rule: MaxPool, writer, x, shape):
    rank = len(shape) - 1
    channels_last = (rule.window[-1], rule.strides[-1], rule.dilation[-1], *rule.padding[-1])
    if rank < 1 or channels_last != (1, 1, 1, 0, 0):
        raise TypeError("ONNX pools along axes of space, this max pooling over channels.")
    space = slice(0, rank)
    first = writer.add("Transpose", x, perm=[0, rank + 1, *range(1, rank + 1)])
    pooled = writer.add(
        "MaxPool",
        first,
        kernel_shape=list(rule.window[space]),
        strides=list(rule.strides[space]),
        dilations=list(rule.dilation[space]),
        pads=[low for low, _ in rule.padding[space]] + [high for _, high in rule.padding[space]],
    )
    return writer.add("Transpose", pooled, perm=[0, *range(2, rank + 2), 1])


# Of the smooth functions that are one operation of ONNX (opset 17).
OPERATIONS = {
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "softplus": "Softplus",
    "softsign": "Softsign",
    "hard_swish": "HardSwish",
}


@rules.register
def _(rule: Smooth, writer, x, shape):
    if rule.name in OPERATIONS:
        return writer.add(OPERATIONS[rule.name], x)
    if rule.name == "silu":
        return writer.add("Mul", x, writer.add("Sigmoid", x))

    def times(y, number):
        return writer.add("Mul", y, writer.constant(np.asarray(number, writer.dtype)))

    if rule.name == "gelu":
        inner = writer.add("Erf", times(x, math.sqrt(0.5)))
    elif rule.name == "gelu_tanh":
        cube = writer.add("Mul", writer.add("Mul", x, x), x)
        sum_ = writer.add("Add", x, times(cube, 0.044715))
        inner = writer.add("Tanh", times(sum_, math.sqrt(2 / math.pi)))
    else:
        raise TypeError(f"the activation {rule.name} has no rule for ONNX.")
    one = writer.constant(np.ones((), writer.dtype))
    return writer.add("Mul", times(x, 0.5), writer.add("Add", inner, one))


@rules.register
def _(rule: Elu, writer, x, shape):
    zero = writer.constant(np.zeros((), writer.dtype))
    below = writer.add("Elu", writer.add("Min", x, zero), alpha=1.0)
    alpha = writer.constant(np.asarray(rule.alpha, writer.dtype))
    return writer.add("Add", writer.add("Max", x, zero), writer.add("Mul", below, alpha))
