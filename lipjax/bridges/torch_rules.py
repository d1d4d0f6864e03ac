"""What PyTorch's operations on tensors compute, as operations of `lipjax.bridges.operations`.

A rule gets the reader, and the arguments by their names in PyTorch's own signatures.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lipjax.bridges import operations
from lipjax.bridges.program import Constant, Value, held

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _each(numbers, count: int) -> list[int]:
    """One number for every axis of space."""
    numbers = [numbers] if isinstance(numbers, int) else list(numbers)
    return numbers * count if len(numbers) == 1 else numbers


def _axes(value: Value, dim) -> tuple[int, ...]:
    rank = len(value.shape)
    if dim is None or dim == []:
        return tuple(range(rank))
    return tuple(sorted(axis % rank for axis in _each(dim, 1)))


# ------------------------------------------------------------------------------------------ affine


@_rule("convolution", "_convolution")
def _convolution(
    r, input, weight, bias, stride, padding, dilation, transposed, output_padding, groups, **_
):
    kernel = r.weight(weight)[0]
    count = kernel.array.ndim - 2
    settings: dict[str, Any] = {
        "strides": tuple(_each(stride, count)),
        "padding": tuple((p, p) for p in _each(padding, count)),
        "dilation": tuple(_each(dilation, count)),
        "groups": groups,
    }
    operands = r.value(input), kernel, *r.weight(bias)
    if not transposed:
        return r.builder.convolution(*operands, **settings)
    more = tuple(_each(output_padding, count))
    return r.add("transposed_convolution", *operands, more=more, **settings)


@_rule("mm", "matmul", "bmm")
def _matmul(r, mat2=None, self=None, other=None, **_):
    return r.add("matmul", self, other if mat2 is None else mat2)


@_rule("addmm")
def _addmm(r, self, mat1, mat2, beta, alpha):
    y = r.add("matmul", mat1, mat2)
    y = y if alpha == 1 else r.add("mul", y, float(alpha))
    return r.add("add", y, self if beta == 1 else r.add("mul", self, float(beta)))


@_rule("linear")
def _linear(r, input, weight, bias):
    (kernel,) = r.weight(weight)
    turned = Constant(kernel.name, np.ascontiguousarray(kernel.array.T), kernel.trained)
    y = r.add("matmul", input, turned)
    return y if bias is None else r.add("add", y, bias)


@_rule(
    *("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit"),
    *("cudnn_batch_norm", "batch_norm"),
)
def _batch_norm(r, input, weight, bias, running_mean, running_var, training=False, **rest):
    if training:
        r.fail("is in training mode: call .eval() on the network first.")
    epsilon = rest.get("eps", rest.get("epsilon"))
    mean, variance = r.weight(running_mean)[0], r.weight(running_var)[0]
    if not np.all(variance.array + epsilon > 0):
        r.fail(f"has variances + epsilon <= 0: {np.min(variance.array) + epsilon}.")
    channels = len(mean.array)
    scale = r.weight(weight) or [Constant("ones", np.ones(channels, mean.array.dtype), False)]
    return r.add("batch_norm", input, mean, variance, *scale, *r.weight(bias), epsilon=epsilon)


def _arithmetic(kind: str) -> Rule:
    def rule(r, self, other, alpha=1, **_):
        if alpha != 1:
            other = (
                r.add("mul", other, float(alpha))
                if not isinstance(other, (int, float))
                else (other * alpha)
            )
        return r.add(kind, self, other)

    return rule


RULES.update({kind: _arithmetic(kind) for kind in ("add", "sub", "mul")})


@_rule("div")
def _div(r, self, other, rounding_mode=None):
    if rounding_mode is not None:
        r.fail(f"has rounding_mode {rounding_mode!r}: it jumps, so it has no bound.")
    return r.add("div", self, other)


@_rule("rsub")
def _rsub(r, self, other, alpha=1):
    if alpha != 1:
        self = r.add("mul", self, float(alpha))
    return r.add("sub", other, self)


# ----------------------------------------------------------------------------------------- pooling


def _window(value: Value, kernel_size, stride, padding, dilation, ceil_mode) -> dict[str, Any]:
    count = len(value.shape) - 2
    window = _each(kernel_size, count)
    strides = _each(stride, count) if stride else window
    pads = tuple((p, p) for p in _each(padding, count))
    dilations = _each(dilation, count)
    sizes = value.shape[2:]
    full = operations.pooled_padding(sizes, window, strides, pads, dilations, bool(ceil_mode))
    settings = {"window": tuple(window), "strides": tuple(strides), "dilation": tuple(dilations)}
    return {**settings, "padding": full}


@_rule(*(f"max_pool{n}d{end}" for n in (1, 2, 3) for end in ("", "_with_indices")))
def _max_pool(r, self, kernel_size, stride, padding, dilation, ceil_mode):
    window = _window(r.value(self), kernel_size, stride, padding, dilation, ceil_mode)
    return r.add("max_pool", self, **window)


@_rule("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _average_pool(
    r,
    self,
    kernel_size,
    stride,
    padding,
    ceil_mode,
    count_include_pad,
    divisor_override=None,
):
    value = r.value(self)
    settings = _window(value, kernel_size, stride, padding, 1, ceil_mode)
    count = len(value.shape) - 2
    given = _each(padding, count) if count_include_pad else [0] * count
    counted = tuple((p, p) for p in given)
    return r.add("average_pool", self, counted=counted, divisor=divisor_override, **settings)


@_rule(*(f"{start}adaptive_avg_pool{n}d" for n in (1, 2, 3) for start in ("", "_")))
def _adaptive_average_pool(r, self, output_size):
    value = r.value(self)
    axes = tuple(range(2, len(value.shape)))
    sizes = tuple(_each(output_size, len(axes)))
    if all(n == 1 for n in sizes):
        return r.add("mean", value, axes=axes, keep=True)
    return r.add("adaptive_average_pool", value, sizes=sizes)


# --------------------------------------------------------------------------------- moves and sums


@_rule("view", "_unsafe_view", "_reshape_alias", "reshape")
def _view(r, self, size=None, shape=None, **_):
    return r.reshaped(self, size if shape is None else shape)


@_rule("flatten")
def _flatten(r, self, start_dim, end_dim):
    sizes = r.value(self).shape
    start, end = start_dim % len(sizes), end_dim % len(sizes)
    return r.reshaped(self, (*sizes[:start], math.prod(sizes[start : end + 1]), *sizes[end + 1 :]))


@_rule("detach", "alias", "clone", "contiguous", "lift_fresh_copy", "lift_fresh")
def _same(r, self, **_):
    return r.value(self)


@_rule("_to_copy")
def _to_copy(r, self, dtype=None, **_):
    value = r.value(self)
    name = str(value.dtype if dtype is None else dtype).removeprefix("torch.")
    if name not in ("float32", "float64"):
        r.fail(f"casts to {name}, expected float32 or float64.")
    wanted = held(np.zeros((), name)).dtype
    return value if wanted == value.dtype else r.add("cast", value, dtype=wanted.name)


@_rule("t")
def _t(r, self):
    rank = len(r.value(self).shape)
    return self if rank < 2 else r.add("transpose", self, order=(1, 0))


@_rule("transpose")
def _transpose(r, self, dim0, dim1):
    order = list(range(len(r.value(self).shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return r.add("transpose", self, order=tuple(order))


@_rule("permute")
def _permute(r, self, dims):
    rank = len(r.value(self).shape)
    return r.add("transpose", self, order=tuple(axis % rank for axis in dims))


@_rule("squeeze")
def _squeeze(r, self, dim=None):
    value = r.value(self)
    chosen = _axes(value, dim)
    return r.reshaped(value, [n for i, n in enumerate(value.shape) if n != 1 or i not in chosen])


@_rule("unsqueeze")
def _unsqueeze(r, self, dim):
    sizes = list(r.value(self).shape)
    sizes.insert(dim % (len(sizes) + 1), 1)
    return r.reshaped(self, sizes)


@_rule("expand")
def _expand(r, self, size, **_):
    own = r.value(self).shape
    missing = len(size) - len(own)
    pairs = zip(size, (*(1 for _ in range(missing)), *own), strict=True)
    shape = tuple(n if m == -1 else m for m, n in pairs)
    return self if shape == own else r.add("broadcast", self, shape=shape)


@_rule("slice")
def _slice(r, self, dim, start, end, step):
    value = r.value(self)
    axis = dim % len(value.shape)
    first, stop, step = slice(start, end, step).indices(value.shape[axis])
    if (first, stop, step) == (0, value.shape[axis], 1):
        return value
    return r.add("slice", value, axis=axis, start=first, stop=stop, step=step)


@_rule("select")
def _select(r, self, dim, index):
    value = r.value(self)
    axis = dim % len(value.shape)
    return r.add("take", value, indices=(index % value.shape[axis],), shape=(), axis=axis)


@_rule("index_select")
def _index_select(r, self, dim, index):
    value = r.value(self)
    axis = dim % len(value.shape)
    indices = tuple(int(i) for i in index.tolist())
    return r.add("take", value, indices=indices, shape=(len(indices),), axis=axis)


def _parts(r, value: Value, sizes: Sequence[int], dim: int) -> list[Value]:
    axis = dim % len(value.shape)
    ends = np.cumsum(sizes)
    return [
        r.add("slice", value, axis=axis, start=int(end - n), stop=int(end), step=1)
        for end, n in zip(ends, sizes, strict=True)
    ]


@_rule("split")
def _split(r, self, split_size, dim):
    value = r.value(self)
    whole = value.shape[dim]
    sizes = [min(split_size, whole - start) for start in range(0, whole, split_size)]
    return _parts(r, value, sizes, dim)


@_rule("split_with_sizes")
def _split_with_sizes(r, self, split_sizes, dim):
    return _parts(r, r.value(self), split_sizes, dim)


@_rule("chunk")
def _chunk(r, self, chunks, dim):
    return _split(r, self, -(-r.value(self).shape[dim] // chunks), dim)


@_rule("unbind")
def _unbind(r, self, dim):
    return [_select(r, self, dim, i) for i in range(r.value(self).shape[dim])]


@_rule("cat")
def _cat(r, tensors, dim):
    rank = max(len(each.shape) for each in tensors)
    return r.builder.concatenate([r.operand(each) for each in tensors], dim % rank)


@_rule("stack")
def _stack(r, tensors, dim):
    rank = len(tensors[0].shape) + 1
    rows = []
    for each in tensors:
        sizes = list(each.shape)
        sizes.insert(dim % rank, 1)
        whole = isinstance(each, Value)
        rows.append(r.reshaped(each, sizes) if whole else r.operand(each.reshape(sizes)))
    return r.builder.concatenate(rows, dim % rank)


@_rule("flip")
def _flip(r, self, dims):
    value = r.value(self)
    for dim in dims:
        axis = dim % len(value.shape)
        value = r.add("slice", value, axis=axis, start=value.shape[axis] - 1, stop=-1, step=-1)
    return value


def _widths(value: Value, pad: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """PyTorch gives them from the last axis on."""
    pairs = list(zip(pad[::2], pad[1::2], strict=True))[::-1]
    return (*((0, 0) for _ in range(len(value.shape) - len(pairs))), *pairs)


@_rule("constant_pad_nd")
def _constant_pad(r, self, pad, value):
    widths = _widths(r.value(self), pad)
    return r.add("pad", self, widths=widths, mode="constant", value=float(value))


def _mirrored(mode: str) -> Rule:
    def rule(r, self, padding):
        return r.add("pad", self, widths=_widths(r.value(self), padding), mode=mode)

    return rule


for _n in (1, 2, 3):
    RULES[f"reflection_pad{_n}d"] = _mirrored("reflect")
    RULES[f"replication_pad{_n}d"] = _mirrored("edge")


def _reduction(kind: str) -> Rule:
    def rule(r, self, dim=None, keepdim=False, **_):
        value = r.value(self)
        return r.add(kind, value, axes=_axes(value, dim), keep=bool(keepdim))

    return rule


RULES.update({kind: _reduction(kind) for kind in ("mean", "sum")})


# -------------------------------------------------------------------------------------- activations


@_rule("relu")
def _relu(r, self):
    return r.builder.relu(r.value(self))


def _two(kind: str) -> Rule:
    def rule(r, self, other=None, **_):
        if other is None:
            r.fail("of one tensor is not known.")
        # The constant last: the value of the image is what is cut.
        first, second = (self, other) if isinstance(self, Value) else (other, self)
        return r.add(kind, first, second)

    return rule


RULES.update({"maximum": _two("maximum"), "minimum": _two("minimum")})


@_rule("clamp", "clamp_min", "clamp_max", "hardtanh")
def _clamp(r, self, min=None, max=None, min_val=None, max_val=None):
    low, high = (min, max) if min_val is None else (min_val, max_val)
    value = r.value(self)
    if low == 0 and high is None:
        return r.builder.relu(value)
    if not any(isinstance(end, (Value, r.torch.Tensor)) for end in (low, high)):
        ends = (None if end is None else float(end) for end in (low, high))
        return r.add("clip", value, **dict(zip(("low", "high"), ends, strict=True)))
    value = value if low is None else r.add("maximum", value, low)
    return value if high is None else r.add("minimum", value, high)


@_rule("elu")
def _elu(r, self, alpha, scale, input_scale):
    if input_scale != 1:
        r.fail(f"has input_scale {input_scale}, expected 1.")
    y = r.add("elu", self, alpha=float(alpha))
    return y if scale == 1 else r.add("mul", y, float(scale))


@_rule("softplus")
def _softplus(r, self, beta, threshold):
    # Above 20 both forms are one float32 number.
    if beta != 1 or threshold < 20:
        r.fail(f"has beta {beta} and threshold {threshold}, expected 1 and at least 20.")
    return r.add("softplus", self)


@_rule("gelu")
def _gelu(r, self, approximate="none"):
    return r.add("gelu", self, approximate=approximate == "tanh")


@_rule("leaky_relu")
def _leaky_relu(r, self, negative_slope):
    return r.add("leaky_relu", self, negative_slope=float(negative_slope))


@_rule("prelu", "_prelu_kernel")
def _prelu(r, self, weight):
    value = r.value(self)
    (slope,) = r.weight(weight)
    array = slope.array
    if array.ndim == 1:
        array = array.reshape(1, -1, *(1 for _ in value.shape[2:]))
    return r.add("prelu", value, Constant(slope.name, array, slope.trained))


@_rule("celu")
def _celu(r, self, alpha):
    return r.add("celu", self, alpha=float(alpha))


@_rule("hardsigmoid")
def _hardsigmoid(r, self):
    return r.add("hard_sigmoid", self, alpha=1 / 6, beta=0.5)


@_rule("pow")
def _pow(r, self, exponent):
    if not isinstance(exponent, (int, float)):
        r.fail("has an exponent that is no number.")
    return r.add("power", r.value(self), exponent=float(exponent))


def _normalised(kind: str) -> Rule:
    return lambda r, self, dim, **_: r.add(kind, self, axis=dim % len(r.value(self).shape))


RULES.update({"_softmax": _normalised("softmax"), "_log_softmax": _normalised("log_softmax")})


FUNCTIONS = {
    **{name: name for name in ("abs", "erf", "exp", "log", "mish", "neg", "reciprocal", "selu")},
    **{name: name for name in ("sigmoid", "silu", "sqrt", "tanh")},
    "hardswish": "hard_swish",
}


def _function(kind: str) -> Rule:
    return lambda r, self: r.add(kind, self)


RULES.update({name: _function(kind) for name, kind in FUNCTIONS.items()})
