"""Networks from ONNX files, as functions that JAX traces.

What does not depend on the input is computed when the file is read, by the definitions of the ONNX
package in NumPy. Each other node becomes operations of `lipjax.bridges.operations`, by a rule of
`onnx_rules`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lipjax.bridges.onnx_rules import RULES, TYPES, Node
from lipjax.bridges.program import Builder, Constant, Network, Operand, Value, held, image_shape

OLDEST = 9


def from_onnx(
    file, *, layout: str | None = None, input_shape: Sequence[int] | None = None
) -> Network:
    """The network of an ONNX file, opset 9 or later. Needs the package onnx.

    It takes one example, or a batch of them on its first axis, and computes in the order of the
    file's nodes with the file's numbers; `lipjax.trace`, `certify` and the rest take it as it
    stands. Images are given with channels last. A softmax at the very end is left out: logits are
    what is certified (`Network.left_out` says so).

    The file's batch axis is the first one, of size 1 or of a free size; an input with one axis is
    one example. The network is the function of one example, also where the file ties those of a
    batch together.

    Args:
        file: a path, or an onnx.ModelProto.
        layout: of the file's images, if its input has four axes: "NCHW", what ONNX's convolutions
            take: examples ``(height, width, channels)`` are turned round at the entry; or "NHWC",
            as files from TensorFlow have it: examples go in as they are. None: "NHWC" where all
            that the file does with its input is to move the last axis to the front, else "NCHW".
        input_shape: of one example as it is given here, where the file leaves sizes open.

    Raises:
        ImportError: onnx is not installed.
        TypeError: an operation that is not known, by its name.
        ValueError: not there, no ONNX file, damaged; an opset before 9; several inputs or outputs;
            a size that is open; settings that have no counterpart; parameters that are neither
            float32 nor float64.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            "from_onnx needs the package onnx: pip install onnx, or, in a checkout, pip install "
            "'.[onnx]'."
        ) from error
    model = _loaded(onnx, file)
    reader = _Reader(onnx, model, layout, input_shape)
    for position, proto in enumerate(model.graph.node):
        reader.read(position, proto)
    return reader.network()


def _loaded(onnx, file):
    """The file's model, checked by ONNX's own rules, its functions spelled out."""
    model = file
    if not isinstance(file, onnx.ModelProto):
        path = Path(file)
        if not path.is_file():
            raise ValueError(f"{path.absolute()} is not there, or no file.")
        try:
            model = onnx.load(path)
        except Exception as error:  # protobuf's own, of several kinds
            raise ValueError(f"{path} is no ONNX file, or damaged: {error}") from error
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ValueError(f"the file is not valid: {error}") from error
    if model.functions:
        from onnx import inliner

        model = inliner.inline_local_functions(model)
    return model


class _Reader:
    """Reads one model, node by node.

    Attributes:
        values: by their names in the file.
    """

    def __init__(self, onnx, model, layout: str | None, input_shape):
        self.onnx = onnx
        graph = model.graph
        self.opsets = {entry.domain: entry.version for entry in model.opset_import}
        self.opset = self.opsets.get("", self.opsets.get("ai.onnx", 0))
        newest = onnx.defs.onnx_opset_version()
        if not OLDEST <= self.opset <= newest:
            raise ValueError(
                f"the file is in opset {self.opset}, expected {OLDEST} to {newest}, as the "
                "installed package onnx knows them: convert it with onnx.version_converter, or "
                "install a newer onnx."
            )
        if graph.sparse_initializer:
            raise ValueError("the file has sparse weights: write them as dense ones.")

        self.values: dict[str, Operand] = {}
        for tensor in graph.initializer:
            array = onnx.numpy_helper.to_array(tensor)
            self.values[tensor.name] = Constant(tensor.name, array)
        inputs = [entry for entry in graph.input if entry.name not in self.values]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise ValueError(
                f"the file has {len(inputs)} inputs ({_names(inputs)}) and {len(graph.output)} "
                f"outputs ({_names(graph.output)}), expected one of each: write a file with the "
                "logits alone (onnx.utils.extract_model)."
            )
        self.output = graph.output[0].name
        self._begin(graph, inputs[0], layout, input_shape)

    def _begin(self, graph, entry, layout: str | None, input_shape) -> None:
        """The input: its layout, its shape and its batch axis."""
        if layout not in (None, "NCHW", "NHWC"):
            raise ValueError(f"layout must be 'NCHW', 'NHWC' or None, got {layout!r}.")
        tensor = entry.type.tensor_type
        dtype = self.onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if dtype.name not in TYPES:
            raise ValueError(
                f"the input {entry.name} is {dtype.name}, expected {' or '.join(TYPES)}: what is "
                "certified are images of floating numbers in [0, 1]."
            )
        if not tensor.HasField("shape") or not tensor.shape.dim:
            raise ValueError(f"the input {entry.name} has no shape in the file.")
        # 0 stands for a size that is left open.
        sizes = [max(dim.dim_value, 0) for dim in tensor.shape.dim]
        batch_axis = len(sizes) > 1
        if batch_axis and sizes.pop(0) > 1:
            raise ValueError(
                f"the input {entry.name} is a batch of {tensor.shape.dim[0].dim_value}, expected "
                "1 or a free size: export it for one example."
            )
        moved = len(sizes) == 3
        if moved:
            moved = not _turns(graph, entry.name) if layout is None else layout == "NCHW"
        shape = (*sizes[1:], sizes[0]) if moved else tuple(sizes)
        if input_shape is not None:
            shape = _filled(shape, image_shape(input_shape), layout)
        if 0 in shape:
            raise ValueError(
                f"the input {entry.name} leaves sizes open ({shape}, 0 is open): say which one "
                "example has, input_shape=(height, width, channels)."
            )

        self.input_shape = shape
        inner = (shape[-1], *shape[:-1]) if moved else shape
        full = (1, *inner) if batch_axis else inner
        dtype = held(np.zeros((), dtype)).dtype
        self.builder = Builder(full, dtype, batch_axis=batch_axis, moved=moved)
        self.values[entry.name] = self.builder.input

    def read(self, position: int, proto) -> None:
        """One more node."""
        node = Node(self, position, proto)
        self.builder.where = node.where
        if proto.domain not in ("", "ai.onnx"):
            node.fail(
                f"of the domain {proto.domain!r} is not known, only ONNX's own operations are: "
                "export the network without a runtime's optimisations.",
                TypeError,
            )
        inputs = [self.values.get(name) for name in proto.input if name]
        if None in inputs:
            node.fail("reads what no node in front of it gives.")
        if not any(isinstance(value, Value) for value in inputs):
            results: Sequence[Operand] = node.folded()
        else:
            rule = RULES.get(proto.op_type)
            if rule is None:
                node.fail(
                    "is not known. Known are " + ", ".join(sorted(RULES)) + ". Export the network "
                    "without it, or write that part in JAX (lipjax.bridges.state_dict has the "
                    "weights of a .pth file).",
                    TypeError,
                )
            found = rule(node)
            results = found if isinstance(found, list) else [found]
            node.finish(len(results))
        self.values.update(zip(proto.output, results, strict=False))

    def network(self) -> Network:
        return self.builder.network(self.values[self.output], self.input_shape)


def _names(entries) -> str:
    return ", ".join(entry.name for entry in entries)


def _turns(graph, name: str) -> bool:
    """Is all that the file does with this input to move its last axis to the front?"""
    readers = [node for node in graph.node if name in node.input]
    orders = [
        [list(a.ints) for a in node.attribute if a.name == "perm"]
        for node in readers
        if node.op_type == "Transpose"
    ]
    return (
        bool(readers) and len(orders) == len(readers) and all(o == [[0, 3, 1, 2]] for o in orders)
    )


def _filled(shape: Sequence[int], given: tuple[int, ...], layout) -> tuple[int, ...]:
    fits = len(shape) == len(given) and all(n in (0, m) for n, m in zip(shape, given, strict=True))
    if not fits:
        raise ValueError(
            f"the file takes examples of shape {tuple(shape)} as they are given here (0 is open, "
            f"layout {layout}), got input_shape {given}."
        )
    return given
