"""What lipjax can do with each kind of layer, asked of the code: the table of docs/supported.md.

    python -m benchmarks.supported            # prints the page
    python -m benchmarks.supported --write    # writes it

A layer stands in the table because a small function with it was traced, its graph was read by the
checker, and an ONNX file of it was asked for; nothing is entered by hand but the function itself.
"""

import argparse
import dataclasses
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import lipjax
from lipjax import bounds
from lipjax.activations import smooth
from lipjax.bridges import onnx_out, onnx_rules, operations, torch_rules
from lipjax.check.layers import CannotCheck, nodes_of
from lipjax.formats import certificate_files
from lipjax.graph import Activation, Rearrange

PAGE = Path(__file__).resolve().parents[1] / "docs" / "supported.md"
IMAGE = (4, 4, 2)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One row.

    Attributes:
        name: for people.
        function: of one image of shape `IMAGE`, of any shape.
        onnx, torch: names of the operation in an ONNX file and in PyTorch's ATen; "" for none.
        last: does it stand at the end only?
    """

    name: str
    function: Callable
    onnx: str = ""
    torch: str = ""
    last: bool = False


def _kernel(*shape):
    return np.random.default_rng(0).normal(0, 0.3, shape).astype(np.float32)


def _conv(x, **options):
    dimensions = ("NHWC", "HWIO", "NHWC")
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    kernel = _kernel(3, 3, 2, 2)
    return lax.conv_general_dilated(x[None], kernel, dimension_numbers=dimensions, **options)[0]


def _window(x, start, reduce, stride=2):
    return lax.reduce_window(x, start, reduce, (2, 2, 1), (stride, stride, 1), "VALID")


def _around(x, mode):
    return jnp.pad(x, ((1, 1), (1, 1), (0, 0)), mode=mode)


LAYERS = (
    Layer("dense", lambda x: x.reshape(-1) @ _kernel(32, 5), "Gemm", "addmm"),
    Layer("convolution, any stride, dilation, zero padding", _conv, "Conv", "convolution"),
    Layer(
        "transposed convolution",
        lambda x: _conv(x, lhs_dilation=(2, 2), padding=((1, 2), (1, 2))),
        "ConvTranspose",
        "convolution",
    ),
    Layer("convolution along one axis", lambda x: _line(x), "Conv", "convolution"),
    Layer("average pooling", lambda x: _window(x, 0.0, lax.add) / 4, "AveragePool", "avg_pool2d"),
    Layer("adaptive average pooling", lambda x: _adaptive(x), "", "adaptive_avg_pool2d"),
    Layer("global mean", lambda x: jnp.mean(x, axis=(0, 1)), "GlobalAveragePool", "mean"),
    Layer("scale and shift, batch norm in inference", lambda x: 1.5 * x - 0.2, "Mul", "mul"),
    Layer("zero padding", lambda x: jnp.pad(x, ((1, 0), (0, 2), (0, 0))), "Pad", "constant_pad_nd"),
    Layer("reflecting padding", lambda x: _around(x, "reflect"), "Pad", "reflection_pad2d"),
    Layer("repeating padding", lambda x: _around(x, "edge"), "Pad", "replication_pad2d"),
    Layer("circular padding", lambda x: _around(x, "wrap"), "Pad"),
    Layer(
        "reshape, transpose", lambda x: jnp.transpose(x, (2, 0, 1)).reshape(-1), "Reshape", "view"
    ),
    Layer("slices", lambda x: x[1:, ::2], "Slice", "slice"),
    Layer("concatenation", lambda x: jnp.concatenate([x, 2 * x], axis=-1), "Concat", "cat"),
    Layer("sum of branches, residual", lambda x: x + _conv(x), "Add", "add"),
    Layer("ReLU", jax.nn.relu, "Relu", "relu"),
    Layer("clip, hard tanh, ReLU6", lambda x: jnp.clip(x, -0.4, 0.6), "Clip", "hardtanh"),
    Layer("leaky ReLU, PReLU", jax.nn.leaky_relu, "LeakyRelu", "leaky_relu"),
    Layer("hard sigmoid", jax.nn.hard_sigmoid, "HardSigmoid", "hardsigmoid"),
    Layer("absolute value", jnp.abs, "Abs", "abs"),
    Layer("MaxMin", lipjax.activations.maxmin),
    Layer(
        "clipped MaxMin",
        lambda x: lipjax.activations.clipped_maxmin(x, _kernel(4, 4, 1), _kernel(4, 4, 1) - 1),
    ),
    Layer("GroupSort", lambda x: lipjax.activations.GroupSort(2)(x)),
    Layer("sort", lambda x: jnp.sort(x.reshape(-1))),
    Layer(
        "max pooling, windows apart",
        lambda x: _window(x, -jnp.inf, lax.max),
        "MaxPool",
        "max_pool2d",
    ),
    Layer(
        "max pooling, overlapping windows",
        lambda x: _window(x, -jnp.inf, lax.max, stride=1),
        "MaxPool",
        "max_pool2d",
    ),
    Layer("sigmoid", jax.nn.sigmoid, "Sigmoid", "sigmoid"),
    Layer("tanh", jnp.tanh, "Tanh", "tanh"),
    Layer("softplus", jax.nn.softplus, "Softplus", "softplus"),
    Layer("softsign", jax.nn.soft_sign, "Softsign", "div"),
    Layer("ELU", jax.nn.elu, "Elu", "elu"),
    Layer("CELU", lambda x: operations.celu(x, alpha=0.7), "Celu", "celu"),
    Layer("SiLU, swish", jax.nn.silu, "Sigmoid", "silu"),
    Layer("hard swish", jax.nn.hard_swish, "HardSwish", "hardswish"),
    Layer("GELU", lambda x: jax.nn.gelu(x, approximate=False), "Gelu", "gelu"),
    Layer("GELU, by tanh", jax.nn.gelu, "Gelu", "gelu"),
    Layer(
        "softmax at the end", lambda x: jax.nn.softmax(x.reshape(-1)), "Softmax", "_softmax", True
    ),
)


def _adaptive(x):
    return operations.adaptive_average_pool(jnp.moveaxis(x, -1, 0)[None], sizes=(3, 2))


def _softmax(x):
    return jax.nn.softmax(_head(x))


def _line(x):
    kernel = _kernel(3, 2, 2)
    dimensions = ("NHC", "HIO", "NHC")
    flat = x.reshape(1, 16, 2)
    return lax.conv_general_dilated(flat, kernel, (1,), "SAME", dimension_numbers=dimensions)[0]


def row(layer: Layer) -> list[str]:
    """What the code says of one layer, as cells of the table."""

    def network(x):
        return _head(layer.function(x - 0.5))

    example = jnp.zeros(IMAGE)
    function = layer.function if layer.last else network
    graph = bounds.graph_of(function, example)
    checked = _checker_reads(function, example)
    rules = [node.rule for node in graph.nodes if isinstance(node, Activation)]
    rearranged = [node.copies for node in graph.nodes if isinstance(node, Rearrange)]
    copies = max(rearranged, default=1)
    linear = "exactly" if copies == 1 else f"times the root of {copies} copies"
    certified = "CPU" if any(isinstance(rule, smooth.Rounded) for rule in rules) else "any"
    written = all(
        onnx_out.rules.dispatch(type(rule)) is not onnx_out.rules.dispatch(object) for rule in rules
    )
    return [
        layer.name,
        ", ".join(dict.fromkeys(rule.bounded for rule in rules)) or linear,
        certified,
        certified,
        _said(checked),
        _said(bool(layer.torch) and layer.torch in torch_rules.RULES),
        _said(bool(layer.onnx) and layer.onnx in onnx_rules.RULES),
        _said(written and _writes(function)),
    ]


def _head(value):
    value = value.reshape(-1)
    return value @ _kernel(value.size, 3)


def _checker_reads(network, example) -> bool:
    try:
        nodes_of(certificate_files.describe(network, example), IMAGE)
    except (CannotCheck, TypeError):
        return False
    return True


def _writes(network) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            onnx_out.to_onnx(network, Path(folder) / "network.onnx", input_shape=IMAGE)
        except (TypeError, ValueError, NotImplementedError):
            return False
    return True


def _said(yes: bool) -> str:
    return "yes" if yes else "–"


def page() -> str:
    """The page, in Markdown."""
    head = (
        *("layer", "bounded by", "deterministic", "probabilistic", "checker"),
        *("PyTorch in", "ONNX in", "ONNX out"),
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the softmax, which is left out
        lines += ["| " + " | ".join(row(layer)) + " |" for layer in LAYERS]
    return f"""# What is supported

Made by `python -m benchmarks.supported` from the code; a test compares this page with it.

{chr(10).join(lines)}

*Bounded by*: linear layers exactly, by their own matrices; padding that copies pixels (with a
convolution behind it too) by the root of how often it copies one; of an activation its Lipschitz
constant, its box, and where known its slopes. The numbers of pooling and padding are those of a
small example: windows that overlap further, and wider padding, have larger ones.
*deterministic*, *probabilistic*: certificates, in the arithmetics in which the layer may be
executed: "any" that lipjax knows, or "CPU", float32 and float64 on a CPU, where XLA's error in this
function was measured. *checker*: `lipjax check` derives certificates with it again. A function that
is not here is an error that names it and the line; [an activation of your own](your-model.md) is
one file.

A softmax at the end is left out: `certify` is then about the logits in front of it, whose order it
keeps, and its statement says so; `certify_lipschitz` and `certify_range`, which are about values,
refuse it. SiLU, hard swish, softsign and GELU (by erf) are also read where a file spells them out,
as ``x * Sigmoid(x)``.
"""


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description="The table of supported layers, from the code.")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    if parser.parse_args(arguments).write:
        PAGE.write_text(page())
        return
    print(page())


if __name__ == "__main__":
    main()
