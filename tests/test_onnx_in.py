"""Networks read from ONNX files compute what onnxruntime computes from the file, or are refused."""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from flax import nnx
from onnx import TensorProto, helper, numpy_helper

import lipjax
from lipjax import bridges
from lipjax.check import checker
from lipjax.cli import networks
from lipjax.formats import certificate_files

IMAGE = (6, 7, 4)  # as lipjax takes it; the files have channels first
RNG = np.random.default_rng(0)


def array(*shape, low=None) -> np.ndarray:
    drawn = RNG.normal(0, 0.5, shape) if low is None else RNG.uniform(low, 1, shape)
    return drawn.astype(np.float32)


def model(nodes, constants=(), shape=("N", 4, 6, 7), opset=17, outputs=("y",), **changed):
    """A file of these nodes, from x to y; the shape of y is left open."""
    inputs = [helper.make_tensor_value_info("x", changed.get("type", TensorProto.FLOAT), shape)]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    weights = [numpy_helper.from_array(np.asarray(a), name) for name, a in dict(constants).items()]
    graph = helper.make_graph(nodes, "graph", inputs, results, weights)
    opsets = [helper.make_opsetid("", opset)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    made = onnx.shape_inference.infer_shapes(made, data_prop=True)
    for entry in made.graph.output:
        entry.type.tensor_type.shape.SetInParent()  # where it could not be found out
    return made


def node(kind, inputs="x", outputs="y", **attributes):
    name = attributes.pop("name", f"a {kind}")
    return helper.make_node(kind, inputs.split(), outputs.split(), name=name, **attributes)


def computed(file, examples) -> np.ndarray:
    """What onnxruntime computes, one example at a time."""
    session = onnxruntime.InferenceSession(
        file.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    rows = [session.run(None, {"x": x[None]})[0] for x in examples]
    return np.stack([row[0] for row in rows])


def check(file, shape=IMAGE, spread=1.0, rtol=1e-5, **arguments) -> bridges.Network:
    """Both give the same of a few random examples, alone and as a batch."""
    network = bridges.from_onnx(file, **arguments)
    assert network.input_shape == tuple(shape)
    examples = np.random.default_rng(1).uniform(-spread, spread, (3, *shape)).astype(np.float32)
    turned = len(shape) == 3 and arguments.get("layout") != "NHWC"
    theirs = computed(file, np.moveaxis(examples, -1, 1) if turned else examples)
    ours = np.asarray(jax.jit(lambda network, x: network(x))(network, examples))
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    size = np.abs(theirs).max()
    assert size > 0
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * size)
    np.testing.assert_allclose(network(examples[0]), ours[0], rtol=1e-4, atol=1e-5 * size)
    return network


# ------------------------------------------------------------------------------- every operation


def conv(kind="Conv", *, weight, bias=None, opset=17, **attributes):
    constants = {"w": weight} if bias is None else {"w": weight, "b": bias}
    inputs = " ".join(("x", *constants))
    return model([node(kind, inputs, **attributes)], constants, opset=opset)


def one(kind, opset=17, constants=(), inputs=None, outputs="y", **attributes):
    """One node, whose further inputs are the constants."""
    inputs = " ".join(("x", *dict(constants))) if inputs is None else inputs
    nodes = [node(kind, inputs, outputs, **attributes)]
    return model(nodes, constants, opset=opset, outputs=outputs.split()[:1])


def ints(*values):
    return np.asarray(values, np.int64)


NUMBERS = {
    name: np.float32(number)
    for name, number in (
        ("one", 1),
        ("half", 0.5),
        ("two", 2),
        ("root", 2**0.5),
        ("less", 0.5**0.5),
    )
}


def spelled(*lines):
    """Nodes as lines "result kind operands"."""
    parts = [line.split(maxsplit=2) for line in lines]
    return model([node(kind, inputs, to, name=to) for to, kind, inputs in parts], NUMBERS)


# As exporters write them, the constants in front and behind.
SPELLED_GELUS = {
    "x (1 + erf) half": ("a Div x root", "b Erf a", "c Add b one", "d Mul x c", "y Mul d half"),
    "(x half) (1 + erf)": ("a Mul x less", "b Erf a", "c Add one b", "d Mul half x", "y Mul d c"),
    "x (half (1 + erf))": ("a Div x root", "b Erf a", "c Add b one", "d Mul c half", "y Mul d x"),
    "x (1 + erf) / 2": ("a Mul less x", "b Erf a", "c Add b one", "d Mul c x", "y Div d two"),
}
PAIR = {"pads": [1, 0, 2, 1]}
CASES = {
    # affine
    "Conv": conv(weight=array(3, 4, 3, 2), bias=array(3)),
    "Conv, stride, pads, dilations": conv(
        weight=array(3, 4, 2, 2), strides=[2, 1], dilations=[1, 2], kernel_shape=[2, 2], **PAIR
    ),
    "Conv, groups": conv(weight=array(6, 2, 3, 3), bias=array(6), group=2),
    "Conv, depthwise": conv(weight=array(4, 1, 3, 3), group=4, auto_pad="VALID"),
    "Conv, SAME_UPPER": conv(weight=array(3, 4, 2, 4), strides=[2, 3], auto_pad="SAME_UPPER"),
    "Conv, SAME_LOWER": conv(weight=array(3, 4, 2, 4), strides=[2, 3], auto_pad="SAME_LOWER"),
    "Conv, opset 9": conv(weight=array(3, 4, 1, 1), bias=array(3), opset=9),
    "Conv behind Pad": model(
        [node("Pad", "x p", "h"), node("Conv", "h w", pads=[1, 0, 0, 2])],
        {"p": ints(0, 0, 1, 0, 0, 0, 0, 2), "w": array(3, 4, 3, 3)},
    ),
    "Conv behind Pad of other numbers": model(
        [node("Pad", "x p v", "h"), node("Conv", "h w")],
        {"p": ints(0, 0, 1, 0, 0, 0, 0, 2), "v": np.float32(0.5), "w": array(3, 4, 3, 3)},
    ),
    "ConvTranspose": conv("ConvTranspose", weight=array(4, 3, 3, 2), bias=array(3)),
    "ConvTranspose, settings": conv(
        "ConvTranspose",
        weight=array(4, 3, 3, 3),
        group=2,
        strides=[2, 3],
        dilations=[2, 1],
        output_padding=[1, 0],
        **PAIR,
    ),
    "ConvTranspose, output_shape": conv(
        "ConvTranspose", weight=array(4, 3, 3, 3), strides=[2, 2], output_shape=[12, 13]
    ),
    "ConvTranspose, SAME_UPPER": conv(
        "ConvTranspose", weight=array(4, 3, 4, 3), strides=[3, 2], auto_pad="SAME_UPPER"
    ),
    "ConvTranspose, SAME_LOWER": conv(
        "ConvTranspose", weight=array(4, 3, 4, 3), strides=[3, 2], auto_pad="SAME_LOWER"
    ),
    "BatchNormalization": one(
        "BatchNormalization",
        constants={"s": array(4), "b": array(4), "m": array(4), "v": array(4, low=0.3)},
        epsilon=1e-3,
        momentum=0.7,
    ),
    "BatchNormalization, opset 9": one(
        "BatchNormalization",
        opset=9,
        constants={"s": array(4), "b": array(4), "m": array(4), "v": array(4, low=0.3)},
    ),
    "Gemm": model(
        [node("Flatten", "x", "h"), node("Gemm", "h w b", transB=1, alpha=0.5, beta=2.0)],
        {"w": array(5, 168), "b": array(5)},
    ),
    "Gemm, plain": model(
        [node("Flatten", "x", "h"), node("Gemm", "h w")], {"w": array(168, 5)}, opset=11
    ),
    "Gemm, bias from the image": model(
        [node("Flatten", "x", "h"), node("Gemm", "h w h", beta=0.5)], {"w": array(168, 168)}
    ),
    "MatMul": one("MatMul", constants={"w": array(7, 5)}),
    "MatMul, kernel first": one("MatMul", constants={"w": array(5, 6)}, inputs="w x"),
    "Add": one("Add", constants={"c": array(4, 1, 1)}),
    "Sub": one("Sub", constants={"c": array(1, 4, 6, 7)}),
    "Sub from a constant": one("Sub", constants={"c": array(7)}, inputs="c x"),
    "Mul": one("Mul", constants={"c": array(4, 1, 1)}),
    "Div": one("Div", constants={"c": array(4, 1, 1, low=0.3)}),
    "Add of two branches": model(
        [node("Neg", "x", "h"), node("Exp", "x", "g"), node("Add", "h g")]
    ),
    "Sub of two branches": model([node("Tanh", "x", "h"), node("Sub", "h x")]),
    "Mul of two branches": model([node("Tanh", "x", "h"), node("Mul", "h x")]),
    "Div by a scalar constant": one("Div", constants={"c": np.float32(0.3)}),
    "Sum": one("Sum", constants={"c": array(4, 1, 1)}, inputs="x c x"),
    "Neg": one("Neg"),
    # pooling
    "MaxPool": one("MaxPool", kernel_shape=[2, 3]),
    "MaxPool, settings": one(
        "MaxPool", kernel_shape=[2, 2], strides=[2, 1], dilations=[2, 3], pads=[1, 1, 0, 1]
    ),
    "MaxPool, ceil": one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "MaxPool, ceil, last window in the padding": one(
        "MaxPool", kernel_shape=[1, 2], strides=[3, 2], ceil_mode=1, pads=[0, 1, 0, 1]
    ),
    "MaxPool, SAME_UPPER": one(
        "MaxPool", kernel_shape=[2, 3], strides=[2, 2], auto_pad="SAME_UPPER"
    ),
    "AveragePool": one("AveragePool", kernel_shape=[2, 3], strides=[2, 1]),
    "AveragePool, pads": one("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 0]),
    "AveragePool, pads counted": one(
        "AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 0], count_include_pad=1
    ),
    "AveragePool, ceil": one("AveragePool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "AveragePool, ceil, pads counted": one(
        "AveragePool",
        opset=19,
        kernel_shape=[3, 3],
        strides=[2, 2],
        pads=[1, 1, 0, 1],
        ceil_mode=1,
        count_include_pad=1,
    ),
    "AveragePool, dilations": one(
        "AveragePool", opset=19, kernel_shape=[2, 2], dilations=[2, 3], pads=[1, 0, 0, 1]
    ),
    "GlobalAveragePool": one("GlobalAveragePool"),
    "GlobalMaxPool": one("GlobalMaxPool"),
    # moves
    "Flatten": one("Flatten"),
    "Flatten, axis 2": model([node("Flatten", "x", "h", axis=2), node("Transpose", "h")]),
    "Reshape": one("Reshape", constants={"s": ints(0, -1, 7)}),
    "Reshape from Shape": model(
        [
            node("Shape", "x", "s"),
            node("Gather", "s i", "n"),
            node("Unsqueeze", "n a", "m"),
            node("Concat", "m r", "t", axis=0),
            node("Reshape", "x t"),
        ],
        {"i": np.int64(0), "a": ints(0), "r": ints(-1)},
    ),
    "Transpose": one("Transpose", perm=[0, 2, 3, 1]),
    "Squeeze, opset 9": model(
        [node("GlobalAveragePool", "x", "h"), node("Squeeze", "h", axes=[2, 3])], opset=9
    ),
    "Squeeze": model(
        [node("GlobalAveragePool", "x", "h"), node("Squeeze", "h a")], {"a": ints(-1)}
    ),
    "Unsqueeze, opset 9": one("Unsqueeze", opset=9, axes=[1, 3]),
    "Unsqueeze": one("Unsqueeze", constants={"a": ints(-1, 1)}),
    "Expand": model(
        [node("GlobalAveragePool", "x", "h"), node("Expand", "h s")], {"s": ints(1, 4, 2, 3)}
    ),
    "Concat": one("Concat", inputs="x c x", constants={"c": array(1, 2, 6, 7)}, axis=1),
    "Split, opset 9": model(
        [node("Split", "x", "a b", axis=1, split=[1, 3]), node("Concat", "b a", axis=1)], opset=9
    ),
    "Split": model(
        [node("Split", "x s", "a b", axis=-1), node("Concat", "b a", axis=3)], {"s": ints(5, 2)}
    ),
    "Split, opset 18": model(
        [node("Split", "x", "a b", axis=3, num_outputs=2), node("Concat", "b a", axis=3)], opset=18
    ),
    "Slice, opset 9": one("Slice", opset=9, axes=[1, 3], starts=[1, -3], ends=[3, 2**40]),
    "Slice": one(
        "Slice",
        constants={"s": ints(-1, 1), "e": ints(-6, 2**62), "a": ints(3, 2), "t": ints(-2, 3)},
    ),
    "Pad, opset 9": one("Pad", opset=9, pads=[0, 0, 1, 0, 0, 0, 2, 3], value=0.5),
    "Pad": one("Pad", constants={"p": ints(0, 0, 1, -1, 0, 0, 2, 3), "v": np.float32(-0.7)}),
    "Pad, reflect": one("Pad", constants={"p": ints(0, 0, 1, 2, 0, 0, 2, 3)}, mode="reflect"),
    "Pad, edge": one("Pad", constants={"p": ints(0, 0, 1, 2, 0, 0, 2, 3)}, mode="edge"),
    "Pad, wrap, axes": model(
        [helper.make_node("Pad", ["x", "p", "", "a"], ["y"], mode="wrap")],
        {"p": ints(1, 2, 2, 0), "a": ints(2, 3)},
        opset=19,
    ),
    "Gather": one("Gather", constants={"i": ints(2, -1, 0, 2)}, axis=1),
    "Gather of one": one("Gather", constants={"i": np.int64(-2)}, axis=3),
    "ReduceMean, opset 9": one("ReduceMean", opset=9, axes=[2, 3], keepdims=0),
    "ReduceMean": one("ReduceMean", opset=18, constants={"a": ints(-1, 1)}),
    "ReduceSum, opset 11": one("ReduceSum", opset=11, axes=[1]),
    "ReduceSum": one("ReduceSum", constants={"a": ints(3, 2)}, keepdims=0),
    "Identity": model([node("Identity", "x", "h"), node("Relu", "h")]),
    "Dropout, opset 9": one("Dropout", opset=9, ratio=0.5),
    "Dropout": one("Dropout", constants={"r": np.float32(0.5), "t": np.bool_(False)}),
    "Cast": one("Cast", to=TensorProto.FLOAT),
    # activations
    "Relu": one("Relu"),
    "LeakyRelu": one("LeakyRelu", alpha=0.2),
    "PRelu": one("PRelu", constants={"s": array(4, 1, 1)}),
    "Sigmoid": one("Sigmoid"),
    "Tanh": one("Tanh"),
    "Softplus": one("Softplus"),
    "Elu": one("Elu", alpha=0.7),
    "Celu": one("Celu", alpha=0.7),
    "Gelu": one("Gelu", opset=20),
    "Gelu, tanh": one("Gelu", opset=20, approximate="tanh"),
    **{f"GELU as {name}": spelled(*lines) for name, lines in SPELLED_GELUS.items()},
    "SiLU as Sigmoid and Mul": spelled("h Sigmoid x", "y Mul h x"),
    "hard swish as HardSigmoid and Mul": model(
        [node("HardSigmoid", "x", "h", alpha=1 / 6), node("Mul", "x h")]
    ),
    "Softsign as Abs, Add, Div": spelled("h Abs x", "g Add h one", "y Div x g"),
    "HardSigmoid": one("HardSigmoid", alpha=0.3),
    "HardSwish": one("HardSwish"),
    "Mish": one("Mish", opset=18),
    "Softsign": one("Softsign"),
    "Erf": one("Erf"),
    "Exp": one("Exp"),
    "Log": model(
        [node("Exp", "x", "h"), node("Add", "h c", "g"), node("Log", "g")], {"c": array(1)}
    ),
    "Sqrt": model([node("Exp", "x", "h"), node("Sqrt", "h")]),
    "Reciprocal": model([node("Exp", "x", "h"), node("Reciprocal", "h")]),
    "Pow": one("Pow", constants={"e": np.float32(2)}),
    "Clip, opset 9": one("Clip", opset=9, min=-0.2, max=0.5),
    "Clip": one("Clip", constants={"a": np.float32(-0.2), "b": np.float32(0.5)}),
    "Clip above": model([helper.make_node("Clip", ["x", "", "b"], ["y"])], {"b": np.float32(-0.1)}),
    "Abs": one("Abs"),
    "Min with a constant": one("Min", constants={"c": array(1, 4, 1, 1)}),
    "Max with a constant": one("Max", constants={"c": array(7)}, inputs="c x"),
    "Max with 0": one("Max", constants={"c": np.zeros(1, np.float32)}),
    "Max of two branches": model([node("Neg", "x", "h"), node("Max", "h x")]),
    "Softmax, not at the end": model([node("Softmax", "x", "h", axis=3), node("Neg", "h")]),
    # what is computed when the file is read
    "Constant": model(
        [
            node("Constant", "", "c", value=numpy_helper.from_array(array(4, 1, 1))),
            node("ConstantOfShape", "s", "o"),
            node("Sqrt", "e", "r"),
            node("Pow", "r e", "q"),
            node("Neg", "q", "n"),
            node("Transpose", "w", "v"),
            node("Conv", "x v", "h"),
            node("Add", "h c", "g"),
            node("Concat", "g o", "k", axis=1),
            node("Mul", "k n"),
        ],
        {"s": ints(1, 1, 6, 7), "e": np.float32(2), "w": array(1, 1, 4, 4)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_operation_computes_what_onnxruntime_computes(case):
    check(CASES[case])


def test_every_operation_that_is_known_is_compared_here():
    from lipjax.bridges.onnx_rules import RULES

    seen = {each.op_type for file in CASES.values() for each in file.graph.node}
    assert {*RULES} <= seen | {"LogSoftmax", "Size"}


def test_activations_that_exporters_spell_out_are_read_as_what_they_are():
    kinds = {"GELU": "gelu", "SiLU": "silu", "hard": "hard_swish", "Softsign": "softsign"}
    for name in (name for name in CASES if " as " in name):
        graph = lipjax.trace(bridges.from_onnx(CASES[name]), jnp.zeros(IMAGE), batched=False)
        (found,) = [node.rule.kind for node in graph.nodes if hasattr(node, "rule")]
        assert found == kinds[name.split()[0]]
    # Another number, or another value beside it, is another function.
    for changed in (("a Mul x half", "b Erf a"), ("n Neg x", "a Div n root", "b Erf a")):
        file = spelled(*changed, "c Add b one", "d Mul x c", "y Mul d half")
        with pytest.raises(lipjax.TraceError, match="erf"):
            lipjax.trace(bridges.from_onnx(file), jnp.zeros(IMAGE), batched=False)
    for alpha, bounded in ((0.7, True), (-1.0, False)):
        file = one("Celu", alpha=alpha)
        if bounded:
            lipjax.trace(bridges.from_onnx(file), jnp.zeros(IMAGE), batched=False)
        else:
            with pytest.raises(ValueError, match="alpha > 0"):
                bridges.from_onnx(file)


# --------------------------------------------------------------------- layouts, batches, ends


def dense_file(shape=("N", 168), **arguments):
    nodes = [node("MatMul", "x w", "h"), node("Add", "h b")]
    return model(nodes, {"w": array(168, 3), "b": array(3)}, shape=shape, **arguments)


def test_the_newest_opset_and_the_oldest_are_read():
    for opset in (9, 13, onnx.defs.onnx_opset_version()):
        network = bridges.from_onnx(conv(weight=array(3, 4, 3, 2), opset=opset))
        assert network.input_shape == IMAGE
    with pytest.raises(ValueError, match="opset 8, expected 9 to"):
        bridges.from_onnx(one("Relu", opset=8))


def test_images_of_files_with_channels_last_go_in_as_they_are():
    nodes = [node("Transpose", "x", "h", perm=[0, 3, 1, 2]), node("Conv", "h w", "g")]
    nodes.append(node("Flatten", "g"))
    file = model(nodes, {"w": array(3, 4, 2, 2)}, shape=("N", *IMAGE))
    network = bridges.from_onnx(file)
    images = array(2, *IMAGE)
    np.testing.assert_allclose(network(images), computed(file, images), rtol=1e-4, atol=1e-5)

    file = model([node("Flatten", "x", "h"), node("Softplus", "h")], shape=("N", *IMAGE))
    check(file, layout="NHWC")
    assert bridges.from_onnx(file).input_shape == (7, 4, 6)  # read as (N, 6, 7, 4) with channels 6
    with pytest.raises(ValueError, match="layout must be"):
        bridges.from_onnx(file, layout="HWC")


def test_vectors_and_single_examples_without_a_batch_axis():
    check(dense_file(), (168,))
    file = model([node("MatMul", "w x", "h"), node("Relu", "h")], {"w": array(3, 5)}, shape=(5,))
    network = bridges.from_onnx(file)
    x = array(5)
    session = onnxruntime.InferenceSession(file.SerializeToString())
    np.testing.assert_allclose(network(x), session.run(None, {"x": x})[0], rtol=1e-5)
    assert network(array(2, 5)).shape == (2, 3)
    assert lipjax.trace(network, x).nodes[-1].shape == (3,)


def test_open_sizes_have_to_be_said():
    file = model(
        [node("GlobalAveragePool", "x", "h"), node("Flatten", "h")], shape=("N", 4, "h", "w")
    )
    with pytest.raises(ValueError, match=r"leaves sizes open.*input_shape="):
        bridges.from_onnx(file)
    check(file, (5, 6, 4), input_shape=(5, 6, 4))
    with pytest.raises(ValueError, match=r"got input_shape \(5, 6, 3\)"):
        bridges.from_onnx(file, input_shape=(5, 6, 3))


def test_other_shapes_and_types_of_examples_are_errors():
    network = bridges.from_onnx(one("Relu"))
    with pytest.raises(ValueError, match=r"\(6, 7, 4\), or a batch.*got \(4, 6, 7\).*last"):
        network(jnp.zeros((4, 6, 7)))
    with pytest.raises(TypeError, match="floating"):
        network(jnp.zeros(IMAGE, jnp.int32))


@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("opset", [11, 13])
def test_a_softmax_at_the_end_is_left_out(kind, opset):
    nodes = [node("MatMul", "x w", "h"), node(kind, "h")]
    file = model(nodes, {"w": array(168, 3)}, shape=("N", 168), opset=opset)
    network = bridges.from_onnx(file)
    assert kind in network.left_out
    x = array(2, 168)
    ours = getattr(jax.nn, {"Softmax": "softmax"}.get(kind, "log_softmax"))(network(x))
    np.testing.assert_allclose(ours, computed(file, x), rtol=1e-4, atol=1e-5)
    assert bridges.from_onnx(dense_file()).left_out is None


# ----------------------------------------------------------------------------------------- refusals


def renamed(file, domain):
    file.graph.node[0].domain = domain
    file.opset_import.append(helper.make_opsetid(domain, 1))
    return file


def training(opset):
    constants = {"s": array(4), "b": array(4), "m": array(4), "v": array(4, low=0.3)}
    more = {"training_mode": 1} if opset > 13 else {}
    return one("BatchNormalization", opset=opset, constants=constants, **more)


REFUSED = {
    "node 0, ArgMax 'a ArgMax', is not known. Known are Abs": one("ArgMax"),
    "domain 'com.microsoft'": renamed(one("Relu"), "com.microsoft"),
    "training_mode 1": training(15),
    "is in training mode": one("Dropout", constants={"r": np.float32(0.5), "t": np.bool_(True)}),
    "gives i too": one("MaxPool", outputs="y i", kernel_shape=[2, 2]),
    "takes x, its input 1, from something that depends on the image": one(
        "Conv", inputs="x x", auto_pad="VALID"
    ),
    "takes its setting s from the image": model(
        [
            node("ReduceSum", "x", "g", keepdims=0),
            node("Cast", "g", "i", to=TensorProto.DOUBLE),
            node("Identity", "i", "s"),
            node("Pow", "x s"),
        ]
    ),
    "casts to float16": one("Cast", to=TensorProto.FLOAT16),
    "w is float16, expected float32": model(
        [node("Cast", "x", "h", to=TensorProto.FLOAT), node("Add", "h w")],
        {"w": array(4, 1, 1).astype(np.float16)},
    ),
    "is random": model([node("RandomNormal", "", "r", shape=[1]), node("Add", "x r")]),
    "expected one of each": model([node("Relu"), node("Neg", "x", "z")], outputs=("y", "z")),
    "is a batch of 5": model([node("Relu")], shape=(5, 4, 6, 7)),
    "is uint8": model([node("Identity")], type=TensorProto.UINT8),
    "does not depend on the input": model(
        [node("Identity", "c"), node("Relu", "x", "h")], {"c": array(3)}
    ),
    "do not fit": one("Conv", constants={"w": array(3, 5, 2, 2)}),
    "makes (2, 85) of a value of shape (1, 4, 6, 7)": one("Reshape", constants={"s": ints(2, 85)}),
    "mode 'reflect' and cuts": one(
        "Pad", constants={"p": ints(0, 0, -1, 0, 0, 0, 0, 1)}, mode="reflect"
    ),
    "variances + epsilon <= 0": one(
        "BatchNormalization",
        constants={"s": array(4), "b": array(4), "m": array(4), "v": -array(4, low=0.3)},
    ),
}


@pytest.mark.parametrize("expected", REFUSED)
def test_what_is_not_known_is_an_error_that_names_it(expected):
    with pytest.raises((TypeError, ValueError)) as raised:
        bridges.from_onnx(REFUSED[expected])
    assert expected in str(raised.value)


def test_a_file_that_is_none_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is not there"):
        bridges.from_onnx(tmp_path / "a.onnx")
    (tmp_path / "a.onnx").write_bytes(b"no network")
    with pytest.raises(ValueError, match="is no ONNX file, or damaged"):
        bridges.from_onnx(tmp_path / "a.onnx")
    broken = one("Relu")
    broken.graph.node[0].input[0] = "nowhere"
    with pytest.raises(ValueError, match="not valid"):
        bridges.from_onnx(broken)


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install onnx.*'\.\[onnx\]'"):
        bridges.from_onnx("a.onnx")


# ----------------------------------------------------------------------------------- what follows


def branched():
    """Convolutions with a strided shortcut, a normalisation, and a MaxMin written in ONNX."""
    nodes = [
        node("Conv", "x w b", "c", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("BatchNormalization", "c s t m v", "n"),
        node("Conv", "x u", "d", strides=[2, 2], name="shortcut"),
        node("Add", "n d", "a"),
        node("Split", "a", "p q", axis=1),
        node("Max", "p q", "o"),
        node("Min", "p q", "l"),
        node("Concat", "o l", "k", axis=1),
        node("Flatten", "k", "f"),
        node("Gemm", "f g h", "y"),
    ]
    constants = {
        **{"w": array(6, 4, 3, 3), "b": array(6), "u": array(6, 4, 1, 1), "g": array(72, 3) / 4},
        **{"s": array(6), "t": array(6), "m": array(6), "v": array(6, low=0.3), "h": array(3)},
    }
    return model(nodes, constants)


def test_a_network_is_traced_with_the_names_of_the_file_and_bounds_hold():
    network = check(branched())
    example = np.random.default_rng(0).uniform(0, 1, IMAGE).astype(np.float32)
    graph = lipjax.trace(network, example)
    places = {entry.where for entry in graph.nodes}
    assert "node 0, Conv 'a Conv'" in places and "node 9, Gemm 'a Gemm'" in places
    kinds = [entry.rule.kind for entry in graph.nodes if hasattr(entry, "rule")]
    assert kinds == ["MaxMin"]

    # Inside of the certified radius no direction changes the prediction.
    labels = np.argmax(network(example[None]), axis=-1)
    found = lipjax.certified_radius(network, example[None], labels, tier="deterministic")
    radius = float(found.radius[0])
    steps = np.random.default_rng(1).normal(size=(200, *IMAGE))
    steps *= radius / np.linalg.norm(steps.reshape(200, -1), axis=1)[:, None, None, None]
    moved = np.asarray(network((example + steps).astype(np.float32)))
    assert radius > 0 and (np.argmax(moved, axis=-1) == labels[0]).all()


def test_an_operation_without_a_bound_is_named_as_in_the_file():
    network = bridges.from_onnx(
        model([node("Tanh", "x", "h"), node("Mul", "h x", "g"), node("Flatten", "g")])
    )
    with pytest.raises(TypeError, match=r"'a (Tanh|Mul)'"):
        lipjax.trace(network, np.zeros(IMAGE, np.float32))


def test_weights_are_parameters_and_statistics_are_not():
    network = bridges.from_onnx(branched())
    state = nnx.state(network, nnx.Param)
    assert {*state["weights"]} == {*"wbugsth"}
    assert {*nnx.state(network, nnx.BatchStat)["weights"]} == {"m", "v"}
    x = jnp.ones(IMAGE)
    slope = jax.grad(lambda state: network_of(network, state)(x).sum())(state)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(slope))


def network_of(network, state):
    graph, _, others = nnx.split(network, nnx.Param, ...)
    return nnx.merge(graph, state, others)


def test_a_chain_of_layers_becomes_a_sequential_that_can_be_saved(tmp_path):
    constants = {
        **{"w": array(6, 4, 3, 3), "b": array(6), "g": array(36, 3), "h": array(3)},
        **{"s": array(6), "t": array(6), "m": array(6), "v": array(6, low=0.3)},
        "c": array(4, 1, 1),
    }
    nodes = [
        node("Sub", "x c", "n"),
        node("Conv", "n w b", "d", pads=[1, 1, 1, 1]),
        node("BatchNormalization", "d s t m v", "e"),
        node("Relu", "e", "r"),
        node("AveragePool", "r", "p", kernel_shape=[2, 3], strides=[2, 3]),
        node("Flatten", "p", "f"),
        node("MatMul", "f g", "k"),
        node("Add", "k h"),
    ]
    network = check(model(nodes, constants))
    layers = network.sequential()
    names = ["Normalize", "Conv", "ReLU", "AveragePool", "Flatten", "Linear"]
    assert [type(layer).__name__ for layer in layers.layers] == names
    x = array(2, *IMAGE)
    np.testing.assert_allclose(layers(x), network(x), rtol=1e-4, atol=1e-4)
    lipjax.save(layers, tmp_path / "a.safetensors", input_shape=IMAGE)
    with pytest.raises(TypeError, match=r"has branches.*use it as it is"):
        bridges.from_onnx(branched()).sequential()


def test_the_files_of_others_have_the_logits_of_onnxruntime_and_are_traced(shared):
    files = sorted((shared / "external").glob("*.onnx"))
    if not files:
        pytest.skip(f"{shared}/external has no ONNX files")
    for path in files:
        network = bridges.from_onnx(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        given = session.get_inputs()[0]
        for x in np.random.default_rng(0).uniform(0, 1, (3, *network.input_shape)):
            x = x.astype(np.float32)
            turned = len(given.shape) == 4 and given.shape[1:] != list(x.shape)
            fed = np.moveaxis(x, -1, 0) if turned else x
            fed = fed[None] if len(given.shape) > x.ndim else fed
            theirs = session.run(None, {given.name: fed})[0].reshape(-1)
            atol = 3e-6 * np.abs(theirs).max()
            np.testing.assert_allclose(network(x), theirs, rtol=1e-5, atol=atol)
        assert lipjax.trace(network, x).linear


def test_a_file_is_a_network_of_the_command_line(tmp_path):
    path = str(tmp_path / "flat.onnx")
    net = nnx.Sequential(nnx.Linear(64, 10, rngs=nnx.Rngs(0)))
    lipjax.bridges.onnx_out.to_onnx(net, path, input_shape=(64,))
    found = networks.of_network(path, "digits", examples=3)
    images = found.test.unit_images(slice(None))
    expected = net(images.reshape(3, 64))
    np.testing.assert_allclose(found.network(images), expected, atol=1e-6)
    np.testing.assert_allclose(found.network(images[0]), expected[0], atol=1e-6)
    # The checker describes it on images as well, though the file's own nodes take vectors.
    stored = str(tmp_path / "flat.safetensors")
    lipjax.save(lambda x: net(x), stored, input_shape=(64,))
    found = networks.of_network(stored, "digits", examples=3)
    header = {"version": 3, "arithmetic": "float32"}
    given = argparse.Namespace(workdir=None, network=stored)
    described = checker._described(given, found.network, images, header)
    expected = certificate_files.describe(found.network, images[0])
    assert certificate_files.network_hash(described) == certificate_files.network_hash(expected)
    # Of colours nobody can tell in which order they stand.
    assert networks.on_images(net, (192,), (8, 8, 3)) is None
