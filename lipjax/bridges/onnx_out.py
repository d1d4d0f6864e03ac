"""A network as an ONNX file: one node for each operation, written layer by layer, so that it can be
read beside the network.

Input "images", ``(N, height, width, channels)``, pixels in [0, 1], not normalised (a
`lipjax.Normalize` goes along as nodes); output "logits", ``(N, classes)``. An affine layer becomes
Conv or MatMul with its own kernel (an average pool a Conv with the kernel of its matrix) and an Add
or the Conv's bias; activations become comparisons (Relu, Max, Min).

**What a certificate says of the file.** A certificate is about the network as executed in a stated
arithmetic. With float32, its margin allows for every execution that follows the model of
`lipjax.rounding`: each affine layer an inner product of the stored float32 numbers, summed in any
    order, with or without fused multiply-adds, each operation with a relative error
of at most 2^-24, underflow to zero; activations without rounding. A runtime that executes the nodes
of this file in that way is covered, whatever its order of summation. One is *not* covered that
computes convolutions otherwise (Winograd, Fourier), in TF32, float16 or bfloat16 (where the
certificate does not state that arithmetic), quantised, or that rewrites weights before it starts
(fusing a scale into a kernel makes other numbers); nor one that gets pixels outside [0, 1], in
another layout, or resized. The file says so in its metadata. Which of these a runtime does on a
machine, only the runtime can say.

Written by hand, not with jax2onnx, which was tried and gives the right logits: that writes what JAX
traces, several nodes for each of these, and depends on a viewer with a web server, a client of a
model hub and a checkpoint library.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipjax import orthogonal, storage
from lipjax.activations import ClippedMaxMin, ClippedReLU, MaxMin, ReLU
from lipjax.formats import certificate_files
from lipjax.formats.files import replaced
from lipjax.graph.linear import Convolution
from lipjax.layers import AveragePool, Flatten, Normalize, Residual

OPSET = 17
# What the metadata says; see the module's text.
METADATA = {
    "input": "images (N, height, width, channels), pixels in [0, 1], not normalised",
    "output": "logits (N, classes)",
    "certificates": (
        "Certificates of lipjax are about the network as executed in the arithmetic that they "
        "state. One that states float32 "
        "covers executions of these nodes in which every affine layer is an inner product of the "
        "stored float32 numbers, in "
        "any order of summation, with or without fused multiply-adds, with relative errors of at "
        "most 2^-24 an operation. It "
        "does not cover Winograd or Fourier convolutions, TF32, float16, bfloat16 or quantised "
        "execution, or weights that a "
        "runtime rewrites (fusion of scales into kernels)."
    ),
}


def to_onnx(network: nnx.Sequential, path, *, input_shape: Sequence[int]) -> None:
    """Writes a network as an ONNX file (opset 17). Needs the package onnx.

    Args:
        network: an nnx.Sequential of known layers, or of your own with a rule in `nodes`; all
            parameters of one type, float32 or float64, which becomes that of the input.
        path: the file, by custom ``*.onnx``.
        input_shape: of one image, ``(height, width, channels)``, or of what else the first layer
            takes.

    Raises:
        ImportError: onnx is not installed.
        TypeError: a layer without a rule, by its exact type.
        ValueError: settings or types that have no rule; layers that do not fit the input shape.
        OSError: the file cannot be written.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("to_onnx needs the package onnx: pip install onnx") from error
    layers = list(_spliced(network))
    types = {np.dtype(leaf.dtype).name for leaf in jax.tree.leaves(network)} or {"float32"}
    if len(types) != 1 or not types <= {"float32", "float64"}:
        raise ValueError(
            f"the parameters are {', '.join(sorted(types))}, expected all of them float32, or all "
            "float64."
        )
    graph = Graph(np.dtype(types.pop()))
    shape, name = tuple(int(n) for n in input_shape), "images"
    forks: list[str] = []
    for i, layer in enumerate(layers):
        if layer is FORK:
            forks.append(name)
            continue
        if layer is JOIN:
            name = graph.add("Add", forks.pop(), name)
            continue
        kind = type(layer)
        where = f"layer {i}, {getattr(layer, '__qualname__', kind.__name__)},"
        if kind in orthogonal.KINDS:
            raise TypeError(
                f"{where} computes its kernel at every call: export "
                "lipjax.orthogonal.plain(network)."
            )
        if kind not in nodes.registry or kind is object:
            raise TypeError(
                f"{where} has no rule for ONNX: register one with "
                "lipjax.bridges.onnx_out.nodes.register."
            )
        own = getattr(layer, "dtype", None)
        if own is not None and np.dtype(own) != graph.dtype:
            raise ValueError(
                f"{where} computes in {np.dtype(own).name}, its parameters are {graph.dtype.name}."
            )
        try:
            following = jax.eval_shape(layer, jax.ShapeDtypeStruct(shape, jnp.float32)).shape
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} cannot take an input of shape {shape}: {error}") from error
        name, shape = nodes(layer, graph, name, shape), following
    if len(shape) != 1:
        raise ValueError(
            f"the logits must have one axis, got shape {shape}: a lipjax.Flatten is missing."
        )
    graph.add("Identity", name, output="logits")
    model = graph.model(onnx, input_shape, shape)
    onnx.checker.check_model(model, full_check=True)
    with replaced(path) as file:
        file.write(model.SerializeToString())


# Where the two ways through a Residual part, and where they are added.
FORK, JOIN = object(), object()


def _spliced(network):
    if type(network) is not nnx.Sequential:
        raise TypeError(
            "expected a flax.nnx.Sequential, got "
            f"{type(network).__module__}.{type(network).__qualname__}."
        )
    for layer in network.layers:
        if type(layer) is nnx.Sequential:
            yield from _spliced(layer)
        elif type(layer) is Residual:
            yield FORK
            yield from _spliced(layer.branch)
            yield JOIN
        else:
            yield layer


class Graph:
    """Nodes and constants as they are added; what `nodes` writes to."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype
        self._nodes: list[tuple[str, tuple[str, ...], tuple[str, ...], dict[str, Any]]] = []
        self._constants: dict[str, np.ndarray] = {}

    def add(self, operation: str, *inputs: str, output: str | None = None, **attributes) -> str:
        """Adds a node with one output and returns the output's name. Operations and attributes are
        those of ONNX, opset 17."""
        return self.add_many(
            operation, *inputs, outputs=[output] if output else None, **attributes
        )[0]

    def add_many(
        self,
        operation: str,
        *inputs: str,
        outputs: Sequence[str] | None = None,
        count: int = 1,
        **attributes,
    ):
        """The same with several outputs; returns their names."""
        stem = f"{operation.lower()}_{len(self._nodes)}"
        names = (
            tuple(outputs)
            if outputs
            else tuple(f"{stem}_{k}" if count > 1 else stem for k in range(count))
        )
        self._nodes.append((operation, inputs, names, attributes))
        return names

    def constant(self, array) -> str:
        """Adds a constant and returns its name; floats become the network's type."""
        array = np.asarray(array)
        array = array.astype(self.dtype) if np.issubdtype(array.dtype, np.floating) else array
        name = f"constant_{len(self._constants)}"
        self._constants[name] = np.ascontiguousarray(array)
        return name

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


@functools.singledispatch
def nodes(layer, graph: Graph, x: str, shape: tuple[int, ...]) -> str:
    """Adds a layer's nodes to the graph. Register your own types, exact ones::

        @lipjax.bridges.onnx_out.nodes.register(MyLinear)
        def _(layer, graph, x, shape):
            return graph.add("MatMul", x, graph.constant(layer.weight.T))

    Args:
        layer: the layer.
        graph: what to add to.
        x: name of the layer's input, ``(N, *shape)``.
        shape: of one example's input.

    Returns:
        The name of the output.

    Raises:
        TypeError: for a type that nobody registered.
    """
    raise TypeError(
        f"no rule for {type(layer).__name__}: register it with "
        "lipjax.bridges.onnx_out.nodes.register."
    )


@nodes.register
def _(layer: nnx.Linear, graph, x, shape):
    _standard(layer)
    y = graph.add("MatMul", x, graph.constant(layer.kernel[...]))
    return y if layer.bias is None else graph.add("Add", y, graph.constant(layer.bias[...]))


@nodes.register
def _(layer: nnx.Conv, graph, x, shape):
    _standard(layer)
    geometry = _geometry(layer)
    if any(d != 1 for d in geometry.input_dilation):
        raise ValueError(
            f"a Conv with input_dilation {geometry.input_dilation} has no rule for ONNX."
        )
    extents = [(k - 1) * d + 1 for k, d in zip(layer.kernel_size, geometry.dilation, strict=True)]
    padding: Any = geometry.padding
    if padding == "CIRCULAR":
        for axis, (extent, size) in enumerate(zip(extents, shape, strict=False)):
            places = np.arange(-((extent - 1) // 2), size + extent // 2) % size
            x = graph.add("Gather", x, graph.constant(places.astype(np.int64)), axis=axis + 1)
        padding = "VALID"
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(shape[:-1], extents, geometry.strides, padding)
    if any(p < 0 for pair in padding for p in pair):
        raise ValueError(
            f"a Conv with padding {padding} has no rule for ONNX: expected numbers >= 0."
        )
    kernel = layer.kernel[...] if layer.mask is None else layer.kernel[...] * layer.mask
    bias = None if layer.bias is None else layer.bias[...]
    return _convolution(graph, x, kernel, bias, geometry, padding)


def _standard(layer) -> None:
    """Refuses a Flax layer with settings that may change what it computes, and have no nodes."""
    unusual = set(storage.unusual(layer)) - {"mask"}
    if unusual:
        settings = ", ".join(sorted(unusual))
        raise ValueError(
            f"{type(layer).__name__} with a {settings} of its own has no rule for ONNX."
        )


def _geometry(layer: nnx.Conv) -> Convolution:
    """Strides, padding and dilations as Flax understands them."""

    def each(value) -> tuple[int, ...]:
        rank = len(layer.kernel_size)
        value = 1 if value is None else value
        return (value,) * rank if isinstance(value, int) else tuple(value)

    dilation = each(layer.kernel_dilation)
    padding: Any = layer.padding
    if isinstance(padding, str):
        padding = padding.upper()
    elif isinstance(padding, int):
        padding = ((padding, padding),) * len(layer.kernel_size)
    else:
        padding = tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in padding)
    if padding == "CAUSAL":
        padding = ((dilation[0] * (layer.kernel_size[0] - 1), 0),)
    if isinstance(padding, str) and padding not in ("SAME", "VALID", "CIRCULAR"):
        raise ValueError(
            f"a Conv with padding={layer.padding!r} has no rule for ONNX: expected SAME, VALID, "
            "CAUSAL, CIRCULAR or numbers."
        )
    groups = layer.feature_group_count
    return Convolution(each(layer.strides), padding, each(layer.input_dilation), dilation, groups)


@nodes.register
def _(layer: AveragePool, graph, x, shape):
    # A Conv of the very numbers that its matrix has, where ONNX's AveragePool divides by the size
    # of the window.
    kernel = np.full((*layer.window, 1, shape[-1]), 1 / math.prod(layer.window))
    ones = (1, 1)
    geometry = Convolution(layer.strides, "VALID", ones, ones, shape[-1])
    return _convolution(graph, x, kernel, None, geometry, ((0, 0), (0, 0)))


def _convolution(graph, x, kernel, bias, geometry, padding) -> str:
    """Channels last to channels first, the convolution, and back."""
    rank = len(geometry.strides)
    weight = graph.constant(np.moveaxis(np.asarray(kernel), (-1, -2), (0, 1)))
    more = [] if bias is None else [graph.constant(bias)]
    y = graph.add("Transpose", x, perm=[0, rank + 1, *range(1, rank + 1)])
    y = graph.add(
        "Conv",
        *(y, weight, *more),
        strides=list(geometry.strides),
        pads=[int(low) for low, _ in padding] + [int(high) for _, high in padding],
        dilations=list(geometry.dilation),
        group=geometry.groups,
    )
    return graph.add("Transpose", y, perm=[0, *range(2, rank + 2), 1])


@nodes.register
def _(layer: Normalize, graph, x, shape):
    scaled = graph.add("Mul", x, graph.constant(np.asarray(layer.scale)))
    return graph.add("Add", scaled, graph.constant(np.asarray(layer.shift)))


@nodes.register
def _(layer: Flatten, graph, x, shape):
    kept = len(shape) - layer.ndim  # 0 copies an axis
    return graph.add("Reshape", x, graph.constant(np.array([0] * (kept + 1) + [-1], np.int64)))


@nodes.register
def _(layer: ReLU, graph, x, shape):
    return graph.add("Relu", x)


@nodes.register
def _(layer: ClippedReLU, graph, x, shape):
    return graph.add("Min", graph.add("Relu", x), graph.constant(layer.threshold[...]))


@nodes.register
def _(layer: MaxMin, graph, x, shape):
    return graph.add("Concat", *_sorted(graph, x, shape), axis=-1)


@nodes.register
def _(layer: ClippedMaxMin, graph, x, shape):
    top, bottom = _sorted(graph, x, shape)
    top = graph.add("Min", top, graph.constant(layer.upper[...]))
    bottom = graph.add("Max", bottom, graph.constant(layer.lower[...]))
    return graph.add("Concat", top, bottom, axis=-1)


def _sorted(graph, x, shape) -> tuple[str, str]:
    half = shape[-1] // 2
    a, b = graph.add_many(
        "Split", x, graph.constant(np.array([half, half], np.int64)), count=2, axis=-1
    )
    return graph.add("Max", a, b), graph.add("Min", a, b)
