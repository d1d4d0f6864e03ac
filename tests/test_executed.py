"""What is certified is what is executed: types, precisions, settings, parameters of every layer."""

import contextlib
import functools
import inspect
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import cast64, proven_norm, rational
from flax import nnx

import lipjax
from lipjax import certificate_files, check, executed, operators, regions, rounding, storage

certify = functools.partial(lipjax.certify, tier="deterministic")
BF16 = jnp.bfloat16


def linear(kernel, bias=None, **settings) -> nnx.Linear:
    kernel = jnp.asarray(kernel, jnp.float32)
    layer = nnx.Linear(*kernel.shape, use_bias=bias is not None, rngs=nnx.Rngs(0), **settings)
    layer.kernel[...] = kernel.astype(layer.kernel[...].dtype)
    if bias is not None:
        layer.bias[...] = jnp.asarray(bias, layer.bias[...].dtype)
    return layer


def conv(**settings) -> nnx.Conv:
    layer = nnx.Conv(1, 1, (1, 1), rngs=nnx.Rngs(0), **settings)
    layer.kernel[...] = jnp.ones_like(layer.kernel[...])
    return layer


# ------------------------------------------------------------ layers without parameters


def pooled() -> nnx.Sequential:
    """Logits 1 and 0.5 on ones, unless the pool's sum of 1024 ones ends at 256, as in bfloat16."""
    pool, head = lipjax.AveragePool(32), linear([[1.0, 0.0]], [0.0, 0.5])
    return nnx.Sequential(conv(dtype=BF16), lipjax.ReLU(), pool, lipjax.Flatten(), head)


def rescaled() -> nnx.Sequential:
    """Logits 1.03 and 1.005 on ones, unless all steps round what 1 becomes to a bfloat16: to 1."""
    steps = [lipjax.Normalize.of([1.0038], [0.0038]) for _ in range(4)]
    head = linear([[1.0, 0.0]], [0.0, 1.005])
    return nnx.Sequential(linear([[1.0]], dtype=BF16), *steps, head)


@pytest.mark.parametrize("make, shape", [(pooled, (32, 32, 1)), (rescaled, (1,))])
@pytest.mark.parametrize("arithmetic", [None, "bfloat16"])
def test_a_certified_class_is_the_executed_one_behind_a_bfloat16_layer(make, shape, arithmetic):
    net, x = make(), np.ones((1, *shape), np.float32)
    found = certify(net, x, np.array([0]), 1e-4, arithmetic=arithmetic, mode="global")
    assert found.arithmetic == "bfloat16"
    for run in (net, jax.jit(lambda x: net(x))):
        assert not found.certified[0] or np.argmax(run(x)) == 0
    assert bool(found.certified[0]) == (make is pooled)  # not because nothing is certified


def test_a_mean_of_16_bit_numbers_is_taken_in_float32():
    for dtype in (jnp.float16, BF16):
        ones = jnp.ones((64, 64, 1), dtype)
        for pool in (lipjax.AveragePool(64), jax.jit(lambda x: lipjax.AveragePool(64)(x))):
            assert pool(ones) == 1 and pool(ones).dtype == dtype
        scaled = lipjax.Normalize.of([1.0], [0.5])(ones * 0.25)
        assert scaled[0, 0, 0] == 0.75 and scaled.dtype == dtype
    for layer in (lipjax.AveragePool(2), lipjax.Normalize([0.5], [0.5])):
        with pytest.raises(TypeError, match=r"uint8.*255"):
            layer(np.ones((2, 2, 1), np.uint8))


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.longdouble])
def test_images_of_a_type_that_layers_would_compute_in_are_errors(dtype):
    net, x = nnx.Sequential(linear(np.eye(2))), np.array([[0.75, 0.25]], dtype)
    for call in (certify, lipjax.estimate, lambda *a: lipjax.certified_radius(*a[:3])):
        with pytest.raises(TypeError, match=rf"{np.dtype(dtype)}.*astype\(np.float32\)"):
            call(net, x, np.array([0]), 0.1)


SQUARE = np.arange(16).reshape(4, 4) / 7
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8}
KINDS = {
    "linear": lambda: linear(SQUARE, [0.1, 0.2, 0.3, 0.4]),
    "linear bfloat16": lambda: linear(SQUARE, dtype=BF16),
    "linear float32": lambda: linear(SQUARE, dtype=jnp.float32),
    "linear of bfloat16": lambda: linear(SQUARE, param_dtype=BF16),
    "linear to bfloat16": lambda: linear(SQUARE, [1] * 4, preferred_element_type=BF16),
    "conv": lambda: nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)),
    "conv bfloat16": lambda: nnx.Conv(4, 4, (3, 3), dtype=BF16, rngs=nnx.Rngs(0)),
    "circular conv": lambda: nnx.Conv(4, 4, (3, 3), padding="CIRCULAR", rngs=nnx.Rngs(0)),
    "pool": lambda: lipjax.AveragePool(3),
    "normalize": lambda: lipjax.Normalize([0.1, 0.2, 0.3, 0.4], [0.3, 0.5, 0.7, 3.0]),
    "flatten": lipjax.Flatten,
    "relu": lipjax.ReLU,
    "clipped_relu": lambda: lipjax.ClippedReLU(4, threshold=0.3),
    "maxmin": lipjax.MaxMin,
    "clipped_maxmin": lambda: lipjax.ClippedMaxMin(4, upper=0.3, lower=-0.1),
    "residual": lambda: lipjax.Residual(lipjax.MaxMin()),
    "residual bfloat16": lambda: lipjax.Residual(linear(np.eye(4) / 3, dtype=BF16)),
}


def with_head(*layers):
    return regions.layers_of(nnx.Sequential(*layers, linear(np.eye(4))))


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_layer_behind_each_type_rounds_at_most_as_its_arithmetic_says(name, dtype):
    layer, shape = KINDS[name](), (3, 3, 4)
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, shape), dtype)
        layers = with_head(layer)[:-1]
        traced = executed.trace(layers, shape, x.dtype)
        out = jax.eval_shape(lambda x: layer(x), x)
        assert traced[-1].output == out
        found = rounding.arithmetics_of(layers, None, traced)
        got = np.asarray(layer(x)).astype(np.float64)
    with jax.enable_x64(True):
        start, wide = jnp.asarray(x, jnp.float64), cast64(layer)
        if found and len(layers) == 1:
            view = operators.linear_operator(wide)
            exact, size = view.affine(start), view.absolute(jnp.abs(start))
            size = size if view.bias is None else size + jnp.abs(view.bias)
            allowed = found[0].relative(rounding.terms_of(view, start)) * size
            assert rounding.coarsest((found[0].name, str(out.dtype))) == found[0].name
        elif len(layers) == 1:
            exact, allowed = wide(start), 0.0  # activations round nothing
        else:
            unit = max(UNIT[dtype], *(a.output for a in found), 0.0)
            exact = regions.through(with_head(wide)[:-1], start)
            allowed = 8 * unit * (jnp.abs(start) + jnp.abs(exact) + 1)
        assert np.all(np.abs(got - exact) <= allowed), (name, dtype, found)


def test_types_that_the_model_lacks_are_errors_wherever_they_come_from():
    def names(*layers, dtype=np.float32):
        net = nnx.Sequential(*layers)
        found = executed.arithmetics_of(net, regions.layers_of(net), None, (4, 4, 1), dtype)
        return [a.name for a in found]

    head = lipjax.Flatten(), linear(np.ones((4, 2)))
    behind = names(conv(dtype=BF16), lipjax.AveragePool(2), *head)
    assert behind == ["bfloat16", "bfloat16", "float32"]
    assert names(lipjax.AveragePool(2), *head) == ["float32"] * 2
    with pytest.raises(ValueError, match=r"layer 0, AveragePool, uses float16"):
        names(lipjax.AveragePool(2), *head, dtype=np.float16)
    with pytest.raises(ValueError, match=r"layer 0, Conv, uses float16"):
        names(conv(dtype=jnp.float16), lipjax.AveragePool(2), *head)


def test_the_sum_of_a_residual_in_a_narrower_type_than_all_layers_is_an_error(x64):
    net = cast64(nnx.Sequential(lipjax.Residual(lipjax.MaxMin()), linear(np.eye(2))))
    x = np.array([[0.75, 0.25]], np.float32)
    with pytest.raises(ValueError, match=r"layer 2, JOIN.*float32.*float64"):
        certify(net, x, np.array([0]), 1e-3)
    assert certify(net, x.astype(np.float64), np.array([0]), 1e-3).arithmetic == "float64"
    assert certify(net, x, np.array([0]), 1e-3, arithmetic="float32").arithmetic == "float32"


class Own(nnx.Module):
    """A layer of somebody's own, ``scale * x`` as `function` computes it."""

    def __init__(self, function, scale=1.0):
        self.function, self.scale = function, scale

    def __call__(self, x):
        return self.function(self.scale * x)


@contextlib.contextmanager
def registered(rules):
    """A new type with these rules."""
    kind = type("Own", (Own,), {})
    for registry, rule in rules.items():
        registry.register(kind, rule)
    yield kind


def view(layer):
    return lipjax.LinearOperator(jnp.multiply, jnp.full(4, layer.scale))


IDENTITY = {operators.linear_operator: view}
ONE_LIPSCHITZ = {
    lipjax.activations.box_image: lambda layer, lower, upper: (lower, upper),
    lipjax.activations.live_rows: lambda layer, lower, upper, mode: jnp.ones(lower.shape, bool),
    lipjax.activations.error_image: lambda layer, error: error,
}


@pytest.mark.parametrize("rules, function, expected", [
    (IDENTITY, lambda x: jax.lax.reduce_precision(x, 8, 7), "uses reduce_precision"),
    (IDENTITY, lambda x: (x * 127).astype(jnp.int8) / 127, "uses int8"),
    (IDENTITY, lambda x: jnp.cumsum(x.astype(BF16))[-1] * 0 + x, "cumsum.* in bfloat16"),
    (IDENTITY, lambda x: sum([x.astype(BF16)] * 9), "add in bfloat16"),
    (ONE_LIPSCHITZ, lambda x: x.astype(BF16), "rounds to bfloat16"),
    (ONE_LIPSCHITZ, lambda x: x.astype(BF16).astype(jnp.float32), "rounds to bfloat16"),
    (ONE_LIPSCHITZ, lambda x: x.astype(jnp.int32), "one floating array"),
    (ONE_LIPSCHITZ, lambda x: x[0] @ x[1], "cannot be executed"),
])  # fmt: skip
def test_a_layer_of_ones_own_that_rounds_beyond_the_model_is_an_error(rules, function, expected):
    with registered(rules) as kind:
        net = nnx.Sequential(linear(np.eye(4)), kind(function), linear(np.eye(4)))
        with pytest.raises(ValueError, match=f"layer 1, Own.*{expected}"):
            executed.arithmetics_of(net, regions.layers_of(net), None, (4,), np.float32)


def test_a_layer_of_ones_own_that_computes_in_bfloat16_is_counted_in_bfloat16():
    with registered(IDENTITY) as kind:
        net = nnx.Sequential(kind(lambda x: x.astype(BF16)), linear(np.eye(4)))
        found = executed.arithmetics_of(net, regions.layers_of(net), None, (4,), np.float32)
        assert [a.name for a in found] == ["bfloat16", "float32"]
        with pytest.raises(ValueError, match=r"layer 0, Own, computes in bfloat16.*d float32"):
            executed.arithmetics_of(net, regions.layers_of(net), "float32", (4,), np.float32)


# ------------------------------------------------------------ float64 without 64 bits


def wide_kernels():
    """Kernels whose second column is larger by 1e-9: NumPy's, and made where JAX has 64 bits."""
    numbers = np.array([[1.0, 1.0 + 1e-9]])
    of_numpy = linear(np.ones((1, 2)))
    of_numpy.kernel = nnx.Param(numbers)
    with jax.enable_x64(True):
        of_jax = linear(np.ones((1, 2)))
        of_jax.kernel = nnx.Param(jnp.asarray(numbers))
    return [nnx.Sequential(of_numpy), nnx.Sequential(of_jax)]


@pytest.mark.parametrize("k", [0, 1])
def test_float64_parameters_are_not_certified_as_such_where_float32_is_executed(k):
    net, x, label = wide_kernels()[k], np.array([[1.0]], np.float32), np.array([1])
    rounds = r"layer 0, Linear.*kernel.* of float64 numbers that float32.*jax_enable_x64"
    with pytest.raises(ValueError, match=rounds):
        certify(net, x, label, 1e-12)
    with jax.enable_x64(True):
        assert np.argmax(net(x.astype(np.float64))) == 1
        found = certify(net, x, label, 1e-12)
        assert found.certified[0] and found.arithmetic == "float64"
    assert certify(net, x, label, 1e-12, arithmetic="float64").certified[0]
    with pytest.raises(ValueError, match=r"kernel.* of float64 numbers that tf32"):
        certify(net, x, label, 1e-12, arithmetic="tf32")
    described = certificate_files.describe(net)
    check._check_precision(described, "float64")
    with pytest.raises(check.CannotCheck, match=r"layer 0, linear.*float64 numbers as kernel"):
        check._check_precision(described, "float32")


def test_float64_parameters_that_float32_holds_are_certified_in_float32():
    layer = linear(np.eye(2))
    layer.kernel = nnx.Param(np.array([[1.0, 0.25], [0.5, 1.0]]))
    found = certify(nnx.Sequential(layer), np.array([[1.0, 0.0]], np.float32), np.array([0]), 0.1)
    assert found.arithmetic == "float32" and found.certified[0]
    layer.kernel = nnx.Param(np.array([[1.0, 1e300], [0.5, 1.0]]))
    with pytest.raises(ValueError, match="float64 numbers that float32"):
        certify(nnx.Sequential(layer), np.array([[0.0, 1.0]], np.float32), np.array([1]), 0.0)


def test_float64_thresholds_are_errors_where_float32_is_executed():
    activation = lipjax.ClippedReLU(2)
    activation.threshold = nnx.Param(np.array([0.1, 0.2]))
    net = nnx.Sequential(linear(np.eye(2)), activation, linear(np.eye(2)))
    with pytest.raises(ValueError, match=r"layer 1, ClippedReLU.*float64 thresholds"):
        certify(net, np.array([[1.0, 0.0]], np.float32), np.array([1]), 0.0)


# ------------------------------------------------------------ settings of Flax's layers

SIZES = {nnx.Linear: (2, 2), nnx.Conv: (2, 2, (3, 3))}
# Arguments and attributes that lipjax understands or compares; a new one in Flax is refused.
KNOWN = {
    "self", "rngs", "in_features", "out_features", "kernel_init", "bias_init", "kernel_metadata",
    "bias_metadata", "kernel", "bias", "use_bias", "dtype", "param_dtype", "precision",
    "kernel_size", "kernel_shape", "strides", "padding", "input_dilation", "kernel_dilation",
    "feature_group_count", "mask", "preferred_element_type", "dot_general", "conv_general_dilated",
    "promote_dtype",
    "_pytree__state", "_pytree__nodes",
}  # fmt: skip


@pytest.mark.parametrize("kind", SIZES)
def test_every_argument_and_attribute_of_flax_layers_is_known(kind):
    layer = kind(*SIZES[kind], rngs=nnx.Rngs(0))
    assert not ({*inspect.signature(kind.__init__).parameters} | {*vars(layer)}) - KNOWN
    assert certificate_files.unusual(layer) == []


def tenth(arrays, dtype=None):
    inputs, kernel, bias = arrays
    return inputs, 0.1 * kernel, bias


def in_bfloat16(arrays, dtype=None):
    rounded = [None if a is None else a.astype(BF16).astype(jnp.float32) for a in arrays]
    return tuple(rounded)


CHANGES = [
    (nnx.Linear, "promote_dtype", tenth),
    (nnx.Linear, "promote_dtype", in_bfloat16),
    (nnx.Conv, "promote_dtype", tenth),
    (nnx.Linear, "dot_general", lambda *a, **k: 2 * jax.lax.dot_general(*a, **k)),
    (nnx.Conv, "conv_general_dilated", lambda *a, **k: 2 * jax.lax.conv_general_dilated(*a, **k)),
    (nnx.Linear, "use_bias", False),
    (nnx.Conv, "use_bias", False),
    (nnx.Conv, "use_bias", None),
    (nnx.Conv, "kernel_size", (5, 5)),
    (nnx.Conv, "kernel_shape", (3, 3, 2, 1)),
    (nnx.Linear, "kernel", nnx.Param(jnp.ones((2, 2), jnp.int32))),
    (nnx.Linear, "bias", nnx.Param(jnp.ones(2, jnp.int32))),
    (nnx.Linear, "bias", None),
    (nnx.Linear, "of_a_later_flax", "fast"),
    (nnx.Conv, "of_a_later_flax", None),
]


@pytest.mark.parametrize("kind, name, value", CHANGES)
def test_a_setting_that_changes_what_a_layer_computes_is_refused(kind, name, value, tmp_path):
    layer = kind(*SIZES[kind], bias_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    setattr(layer, name, nnx.data(value) if name == "bias" and value is None else value)
    # Flax executes a layer whose bias was taken away only under python -O.
    named = "use_bias" if name == "bias" and value is None else name
    with pytest.raises(ValueError, match=f"{kind.__name__} has a {named} of its own"):
        lipjax.linear_operator(layer)
    assert named in certificate_files.describe(nnx.Sequential(layer))[0]["unusual"]
    shape = (2, 2, 2) if kind is nnx.Conv else (1, 1, 2)
    net = nnx.Sequential(layer, lipjax.Flatten(), linear(np.ones((np.prod(shape), 2))))
    with pytest.raises((ValueError, TypeError, AssertionError)):
        storage.save(net, tmp_path / "network.safetensors", input_shape=shape)
    with pytest.raises(ValueError, match=named):
        certify(net, np.full((1, *shape), 0.5, np.float32), np.array([0]), 0.1)


def test_a_mask_belongs_to_the_network_and_has_zeros_and_ones():
    mask = np.ones((1, 1, 1, 1), np.float32)
    plain, masked = (certificate_files.describe(nnx.Sequential(conv(mask=m))) for m in (None, mask))
    other = certificate_files.describe(nnx.Sequential(conv(mask=0 * mask)))
    assert len({certificate_files.network_hash(layers) for layers in (plain, masked, other)}) == 3
    net = nnx.Sequential(conv(mask=0.3 * mask), lipjax.Flatten(), linear(np.ones((1, 2))))
    with pytest.raises(ValueError, match=r"layer 0, Conv.*mask"):
        certify(net, np.ones((1, 1, 1, 1), np.float32), np.array([0]), 0.0)


@pytest.mark.parametrize("kind", [nnx.Linear, nnx.Sequential, lipjax.ReLU, lipjax.AveragePool])
def test_a_class_whose_call_was_replaced_is_an_error(monkeypatch, kind):
    front = lipjax.AveragePool(1), lipjax.Flatten(), linear(np.eye(2)), lipjax.ReLU()
    net = nnx.Sequential(*front, linear(np.eye(2)))
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, x: call(self, x)[..., ::-1])
    with pytest.raises(ValueError, match=f"{kind.__name__}.* has another __call__"):
        certify(net, np.array([[[[0.75, 0.25]]]], np.float32), np.array([0]), 0.1)


class Halved(nnx.Param):
    """Half of what it holds."""

    def __getitem__(self, index):
        return super().__getitem__(index) / 2


@pytest.mark.parametrize("how", ["hook", "type"])
def test_a_parameter_that_changes_when_it_is_read_is_an_error(how):
    layer = linear(np.eye(2))
    if how == "hook":
        with pytest.warns(UserWarning, match="hooks are deprecated"):
            layer.kernel = nnx.Param(jnp.eye(2), on_get_value=lambda variable, value: value / 2)
    else:
        layer.kernel = Halved(jnp.eye(2))
    with pytest.raises(ValueError, match=r"layers\.0\.kernel.*changes when it is read"):
        certify(nnx.Sequential(layer), np.array([[0.75, 0.25]], np.float32), np.array([0]), 0.1)


def test_constants_of_a_normalize_that_float32_rounds_are_errors():
    normalize = lipjax.Normalize([0.5], [0.5])
    normalize.scale = (1.0 + 1e-9,)
    net = nnx.Sequential(normalize, linear(np.eye(2)))
    with pytest.raises(ValueError, match=r"layer 0, Normalize.*no float32 numbers"):
        certify(net, np.array([[0.75, 0.25]], np.float32), np.array([0]), 0.1)
    with pytest.raises(check.CannotCheck, match=r"layer 0, normalize.*scale"):
        check._check_precision(certificate_files.describe(net), "float64")


# ------------------------------------------------------------ precisions

# What each algorithm of JAX's enumeration is certified as; None: refused.
ALGORITHMS = {
    "DEFAULT": "float32",
    "F64_F64_F64": "float32",
    "F32_F32_F32": "float32",
    "TF32_TF32_F32": "tf32",
    "BF16_BF16_F32": "bfloat16_products",
    **dict.fromkeys((
        "ANY_F8_ANY_F8_F32", "ANY_F8_ANY_F8_F32_FAST_ACCUM", "ANY_F8_ANY_F8_ANY",
        "ANY_F8_ANY_F8_ANY_FAST_ACCUM", "F16_F16_F16", "F16_F16_F32", "BF16_BF16_BF16",
        "BF16_BF16_F32_X3", "BF16_BF16_F32_X6", "BF16_BF16_F32_X9", "TF32_TF32_F32_X3",
    )),
}  # fmt: skip


@pytest.mark.parametrize("algorithm", jax.lax.DotAlgorithmPreset)
@pytest.mark.parametrize("where", ["layer", "layer by name", "default"])
def test_every_algorithm_for_products_is_counted_or_refused(algorithm, where):
    if where == "default" and algorithm.name == "DEFAULT":
        pytest.skip("JAX's default matmul precision cannot be that")
    expected = ALGORITHMS.get(algorithm.name)  # a new one must be refused
    own = {"layer": algorithm, "layer by name": algorithm.name, "default": None}[where]
    layer = linear(np.eye(2), precision=own)
    net = nnx.Sequential(layer)
    find = functools.partial(executed.arithmetics_of, net, net.layers)
    with jax.default_matmul_precision(algorithm.name if where == "default" else None):
        if expected is None:
            with pytest.raises(ValueError, match=f"layer 0, Linear.*{algorithm.name}"):
                find(None, (2,), np.float32)
        else:
            assert find(None, (2,), np.float32)[0].name == expected
        if where == "default":  # says how this process executes, not another one
            assert find("float32", (2,), np.float32)[0].name == "float32"
        elif expected != "float32":
            with pytest.raises(ValueError, match="layer 0, Linear"):
                find("float32", (2,), np.float32)
    described = certificate_files.describe(net)
    if where == "default" or expected == "float32":
        check._check_precision(described, "float32")
    else:
        assert described[0]["precision"] == algorithm.name
        with pytest.raises(check.CannotCheck, match=algorithm.name):
            check._check_precision(described, "float32")
        if expected is not None:
            check._check_precision(described, expected)


@pytest.mark.parametrize("precision, expected", [
    (None, "tf32"),
    ("default", "tf32"),
    (("highest", "default"), "tf32"),
    (["highest", "highest"], "float32"),
    (jax.lax.Precision.HIGH, "tf32"),
    (jax.lax.Precision.HIGHEST, "float32"),
    ("BF16_BF16_F32", "bfloat16_products"),
    ("F32_F32_F32", "float32"),
    ("F64_F64_F64", "tf32"),
])  # fmt: skip
def test_precisions_of_a_gpu_are_counted(monkeypatch, precision, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    net = nnx.Sequential(linear(np.eye(2), precision=precision))
    assert executed.arithmetics_of(net, net.layers, None, (2,), np.float32)[0].name == expected


def test_an_algorithm_of_ones_own_is_an_error():
    own = jax.lax.DotAlgorithm(BF16, BF16, BF16)
    net = nnx.Sequential(linear(np.eye(2), precision=own))
    with pytest.raises(ValueError, match=r"layer 0, Linear.*DotAlgorithm"):
        executed.arithmetics_of(net, net.layers, None, (2,), np.float32)
    with pytest.raises(check.CannotCheck, match="DotAlgorithm"):
        check._check_precision(certificate_files.describe(net), "bfloat16")


# ------------------------------------------------------------ rules registered anew


def test_a_rule_that_is_registered_anew_is_the_one_that_certifies():
    with registered(IDENTITY) as kind:
        net = nnx.Sequential(kind(lambda x: x, 1.0), linear(np.eye(4)))
        x = np.array([[0.75, 0.25, 0.0, 0.0]], np.float32)
        assert certify(net, x, None, 0.1).certified[0]
        whole = lipjax.estimate(net, x, np.array([0]), 0.1)
        kind.__call__ = lambda self, x: 0.1 * x

        def other(layer):
            return lipjax.LinearOperator(jnp.multiply, jnp.array([-1.0, 1.0, 1.0, 1.0]))

        operators.linear_operator.register(kind, other)
        assert not certify(net, x, np.array([0]), 0.1).certified[0]
        assert certify(net, x, None, 0.1).predicted[0] == 1
        assert whole.correct[0] and not lipjax.estimate(net, x, np.array([0]), 0.1).correct[0]


def test_a_box_that_is_registered_anew_is_the_one_that_certifies():
    with registered(ONE_LIPSCHITZ) as kind:
        net = nnx.Sequential(linear(np.eye(2)), kind(lambda x: x), linear(np.eye(2)))
        x = np.array([[0.75, 0.25]], np.float32)
        # Wrong: constant on every box.
        box_image = lipjax.activations.box_image
        box_image.register(kind, lambda layer, lower, upper: ((lower + upper) / 2,) * 2)
        wrong = certify(net, x, np.array([0]), 2.0)
        box_image.register(kind, lambda layer, lower, upper: (lower, upper))
        assert wrong.certified[0] and not certify(net, x, np.array([0]), 2.0).certified[0]


# ------------------------------------------------------------ sums of a Residual


@pytest.mark.parametrize("mode", ["global", "local"])
def test_the_radius_behind_a_residual_covers_the_rounding_of_the_sum(x64, mode):
    net = cast64(nnx.Sequential(lipjax.Residual(linear([[1e-17]])), linear([[1.0, 0.0]])))
    kernel = net.layers[0].branch.layers[0].kernel[...]
    layers, norms = regions.layers_of(net), (proven_norm, proven_norm)
    outward = rounding.OUTWARD
    bound = regions.walk(layers, jnp.ones(1), 0.0, mode, *norms, arithmetic=outward)
    region = bound.regions[2]  # behind the sum: one is too large for 1e-17 to be added to it
    away = 1 + rational(kernel)[0, 0] - rational(region.center)[0]
    assert 0 < away <= Fraction(float(region.radius))


def test_the_executed_error_covers_the_rounding_of_the_sums_of_residuals():
    blocks = [lipjax.Residual(linear([[2.9e-8]])) for _ in range(200)]
    net = nnx.Sequential(*blocks, linear([[1.0, 0.0]]))
    got = float(net(jnp.ones(1))[0])
    exact = (1 + rational(blocks[0].branch.layers[0].kernel[...])[0, 0]) ** 200
    assert got == 1 and exact - 1 > 90 * 2.0**-24  # float32 does not move
    with jax.enable_x64(True):
        layers, x, boxes = regions.layers_of(cast64(net)), jnp.ones(1), []
        for layer in layers:  # of the exact activations, as far as float64 knows them
            boxes.append((x, x))
            if layer is operators.FORK:
                before = x
            elif layer is operators.JOIN:
                x = before + x
            else:
                x = operators.linear_operator(layer).affine(x)
        arithmetics = rounding.arithmetics_of(regions.layers_of(net), "float32")
        error = rounding.forward_error(layers, [*boxes, (x, x)], arithmetics, [1.0] * 201)
    assert abs(exact - Fraction(got)) <= Fraction(float(error[0]))
