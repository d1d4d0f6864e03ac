"""What is certified is what is executed: types, precisions, settings, parameters of every layer.

Each false certificate that was found by guessing them is a test here.
"""

import contextlib
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import cast64, outward_bound, proven_norms, rational
from flax import nnx

import lipjax
from lipjax import activations, rounding
from lipjax.graph import trace

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


def arithmetics(f, shape=(2,), declared=None, dtype=jnp.float32) -> list[str]:
    graph = trace(f, jax.ShapeDtypeStruct(shape, dtype), batched=False)
    return [a.name for each in rounding.arithmetics_of(graph, declared) for a in each]


# ------------------------------------------------------------ layers without parameters


def pooled(pool) -> nnx.Sequential:
    """Logits 1 and 0.5 on ones, unless the pool's sum of 1024 ones ends at 256, as in bfloat16."""
    head = linear([[1.0, 0.0]], [0.0, 0.5])
    return nnx.Sequential(conv(dtype=BF16), lipjax.ReLU(), pool, lipjax.Flatten(), head)


def rescaled() -> nnx.Sequential:
    """Logits 1.03 and 1.005 on ones, unless all steps round what 1 becomes to a bfloat16: to 1."""
    steps = [lipjax.Normalize.of([1.0038], [0.0038]) for _ in range(4)]
    head = linear([[1.0, 0.0]], [0.0, 1.005])
    return nnx.Sequential(linear([[1.0]], dtype=BF16), *steps, head)


@pytest.mark.parametrize("arithmetic", [None, "bfloat16"])
def test_a_certified_class_is_the_executed_one_behind_a_bfloat16_layer(arithmetic):
    image, one = np.ones((1, 32, 32, 1), np.float32), np.ones((1, 1), np.float32)

    def plain_pool(x):
        return (
            jax.lax.reduce_window(
                x, np.zeros((), x.dtype), jax.lax.add, (32, 32, 1), (1, 1, 1), "VALID"
            )
            / 1024
        )

    cases = [
        (pooled(lipjax.AveragePool(32)), image),
        (pooled(plain_pool), image),
        (rescaled(), one),
    ]
    decided = []
    for net, x in cases:
        found = certify(net, x, np.array([0]), 1e-4, arithmetic=arithmetic, mode="global")
        assert found.arithmetic == "bfloat16"
        for run in (net, jax.jit(lambda x, net=net: net(x))):
            assert not found.certified[0] or np.argmax(run(x[0])) == 0
        decided.append(bool(found.certified[0]))
    assert decided == [arithmetic is None, False, False]  # not because nothing is certified


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
TYPES = ("float64", "float32", "bfloat16")
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
    "sum in its own type": lambda: lambda x: jnp.sum(x, axis=0, dtype=x.dtype) / 3,
    "normalize": lambda: lipjax.Normalize([0.1, 0.2, 0.3, 0.4], [0.3, 0.5, 0.7, 3.0]),
    "a cast": lambda: lambda x: x.astype(BF16),
    "flatten": lipjax.Flatten,
    "relu": lipjax.ReLU,
    "clipped_relu": lambda: lipjax.ClippedReLU(4, threshold=0.3),
    "maxmin": lipjax.MaxMin,
    "clipped_maxmin": lambda: lipjax.ClippedMaxMin(4, upper=0.3, lower=-0.1),
    "residual": lambda: lipjax.Residual(lipjax.MaxMin()),
    "residual bfloat16": lambda: lipjax.Residual(linear(np.eye(4) / 3, dtype=BF16)),
    "batch norm": lambda: nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_layer_behind_each_type_rounds_at_most_as_is_said(name, dtype):
    """The layer as it is executed, against its graph in float64, far above any rounding there."""
    shape = (3, 3, 4)
    with jax.enable_x64(dtype == "float64"):
        layer = KINDS[name]()
        x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, shape), dtype)
        graph = trace(layer, x, batched=False)
        found = rounding.arithmetics_of(graph)
        got = [
            np.asarray(run(x)).astype(np.float64) for run in (layer, jax.jit(lambda x: layer(x)))
        ]
    with jax.enable_x64(True):
        wide = cast64(graph)
        start = jnp.asarray(x, jnp.float64)
        boxes = [(values, values) for values in every_value(wide, start)]
        error = rounding.forward_error(wide, boxes, found, [jnp.inf] * len(wide.linear))
        for values in got:
            assert np.all(np.abs(values - boxes[-1][0]) <= error + 1e-14), (name, dtype)
        assert np.all(error <= 0.2)


def every_value(graph, x):
    values = []
    for node in graph.nodes:
        values.append(lipjax.graph.nodes.evaluate(node, [values[i] for i in node.inputs], x))
    return values


def test_types_that_the_model_lacks_are_errors_wherever_they_come_from():
    head = lipjax.Flatten(), linear(np.ones((4, 2)))
    half = nnx.Sequential(conv(dtype=jnp.float16), lipjax.AveragePool(2), *head)
    for net, dtype in (
        (half, np.float32),
        (nnx.Sequential(lipjax.AveragePool(2), *head), np.float16),
    ):
        with pytest.raises(TypeError, match="float16"):
            arithmetics(net, (4, 4, 1), dtype=dtype)


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


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")  # JAX says it, too
@pytest.mark.parametrize("k", [0, 1])
def test_float64_parameters_are_certified_as_this_process_executes_them(k):
    net, x, label = wide_kernels()[k], np.array([[1.0]], np.float32), np.array([1])
    # In float32 the columns are equal, so the first class is the answer and a tie.
    assert np.argmax(net(jnp.asarray(x[0]))) == 0
    for labels in (label, np.array([0])):
        assert not certify(net, x, labels, 1e-12).certified[0]
    with jax.enable_x64(True):
        assert np.argmax(net(x.astype(np.float64))) == 1
        found = certify(net, x.astype(np.float64), label, 1e-12)
        assert found.certified[0] and found.arithmetic == "float64"
    assert certify(net, x, label, 1e-12, arithmetic="float64").certified[0]


def test_float64_thresholds_are_those_that_are_executed():
    activation = lipjax.ClippedReLU(2)
    activation.threshold = nnx.Param(np.array([0.5, 0.5 + 1e-9]))
    net = nnx.Sequential(linear(np.eye(2)), activation, linear(np.eye(2)))
    found = certify(net, np.array([[1.0, 1.0]], np.float32), np.array([1]), 1e-12)
    assert not found.certified[0]  # 0.5 and 0.5 in float32: a tie


# ------------------------------------------------------------ settings of Flax's layers


def tenth(arrays, **_):
    inputs, kernel, *bias = arrays
    return inputs, 0.1 * kernel, *bias


def in_bfloat16(arrays, **_):
    return tuple(None if a is None else a.astype(BF16).astype(jnp.float32) for a in arrays)


CHANGES = [
    (nnx.Linear, "promote_dtype", tenth),
    (nnx.Linear, "promote_dtype", in_bfloat16),
    (nnx.Conv, "promote_dtype", tenth),
    (nnx.Linear, "dot_general", lambda *a, **k: 2 * jax.lax.dot_general(*a, **k)),
    (nnx.Conv, "conv_general_dilated", lambda *a, **k: 2 * jax.lax.conv_general_dilated(*a, **k)),
    (nnx.Conv, "use_bias", False),
    (
        nnx.Conv,
        "mask",
        nnx.data(jnp.asarray(np.random.default_rng(0).uniform(size=(3, 3, 2, 2)), jnp.float32)),
    ),
    (nnx.Linear, "kernel", nnx.Param(jnp.ones((2, 2), jnp.int32))),
    (nnx.Linear, "of_a_later_flax", "fast"),
]


@pytest.mark.parametrize("kind, name, value", CHANGES)
def test_a_setting_that_changes_what_a_layer_computes_changes_what_is_bounded(kind, name, value):
    size = (2, 2) if kind is nnx.Linear else (2, 2, (3, 3))
    layer = kind(*size, bias_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    setattr(layer, name, value)
    x = jnp.asarray(
        np.random.default_rng(0).uniform(size=(2,) if kind is nnx.Linear else (3, 3, 2)),
        jnp.float32,
    )
    graph = trace(layer, x, batched=False)
    np.testing.assert_allclose(graph(x), layer(x), rtol=1e-2 if value is in_bfloat16 else 1e-6)
    if value is in_bfloat16:  # the kernel is cast anew at each call, or is not: XLA may drop it
        with pytest.raises(TypeError, match="computed anew"):
            arithmetics(layer)


@pytest.mark.parametrize("kind", [nnx.Linear, lipjax.ReLU, lipjax.AveragePool])
def test_a_class_whose_call_was_replaced_is_bounded_as_it_computes(monkeypatch, kind):
    layer = {
        "Linear": lambda: linear(np.eye(2)),
        "ReLU": lipjax.ReLU,
        "AveragePool": lambda: lipjax.AveragePool(1),
    }
    net = nnx.Sequential(layer[kind.__name__](), lambda x: x.reshape(-1), linear(np.eye(2)))
    monkeypatch.setattr(kind, "__call__", lambda self, x: 3 * x)
    x = jnp.ones((1, 1, 2) if kind is lipjax.AveragePool else 2)
    np.testing.assert_allclose(trace(net, x, batched=False)(x), net(x), rtol=1e-6)


# ------------------------------------------------------------ algorithms of products

ALGORITHMS = {
    "DEFAULT": None,
    "F64_F64_F64": "float64",
    "F32_F32_F32": "float32",
    "TF32_TF32_F32": "tf32",
    "BF16_BF16_F32": "bfloat16_products",
}


@pytest.mark.parametrize("algorithm", jax.lax.DotAlgorithmPreset)
@pytest.mark.parametrize("where", ["layer", "default"])
def test_every_algorithm_for_products_is_counted_or_refused(algorithm, where):
    """A new one of a later JAX must be refused too."""
    if algorithm.name == "DEFAULT":
        pytest.skip("no algorithm: the device's own")
    expected = ALGORITHMS.get(algorithm.name)
    layer = linear(np.eye(2), precision=algorithm if where == "layer" else None)
    default = jax.default_matmul_precision(algorithm.name if where == "default" else None)
    with default if where == "default" else contextlib.nullcontext():
        if expected is None:
            with pytest.raises(TypeError, match=algorithm.name):
                arithmetics(layer)
        else:
            coarser = {"float64": "float32"}.get(expected, expected)  # of numbers in float32
            assert arithmetics(layer)[0] == coarser
        if expected in ("tf32", "bfloat16_products"):
            with pytest.raises(ValueError, match="declared float32"):
                arithmetics(layer, declared="float32")


@pytest.mark.parametrize("precision, expected", [
    (None, "tf32"),
    ("default", "tf32"),
    (("highest", "default"), "tf32"),
    (("highest", "highest"), "float32"),
    (jax.lax.Precision.HIGH, "tf32"),
    (jax.lax.Precision.HIGHEST, "float32"),
    ("BF16_BF16_F32", "bfloat16_products"),
    ("F32_F32_F32", "float32"),
])  # fmt: skip
def test_precisions_of_a_gpu_are_counted(monkeypatch, precision, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert arithmetics(linear(np.eye(2), precision=precision))[0] == expected


def test_an_algorithm_of_ones_own_is_an_error():
    own = jax.lax.DotAlgorithm(BF16, BF16, BF16)
    with pytest.raises(TypeError, match="which the error model does not know"):
        arithmetics(linear(np.eye(2), precision=own))


# ------------------------------------------------------------ functions and rules defined anew


def test_a_function_and_a_rule_that_are_defined_anew_are_the_ones_that_certify():
    """As when a notebook's cell is run twice."""
    x = np.array([[0.75, 0.25]], np.float32)
    verdicts = []
    for shrinks in (True, False):

        @jax.jit
        def mine(z):
            return jnp.tanh(z)

        @activations.rule()
        class Mine(activations.Rule):
            def __call__(self, z):
                return jnp.tanh(z)

            def interval(self, lower, upper, shrinks=shrinks):
                # Wrong at first: constant on every box.
                middle = jnp.tanh((lower + upper) / 2)
                return (middle, middle) if shrinks else (jnp.tanh(lower), jnp.tanh(upper))

            def rounding(self, error):
                return error + 1e-5

        activations.register(mine, Mine)
        net = nnx.Sequential(linear(np.eye(2)), mine, linear(np.eye(2)))
        verdicts.append(bool(certify(net, x, np.array([0]), 2.0).certified[0]))
    assert verdicts == [True, False]


# ------------------------------------------------------------ sums of branches


@pytest.mark.parametrize("mode", ["global", "local"])
def test_the_radius_behind_a_residual_covers_the_rounding_of_the_sum(x64, mode):
    net = cast64(nnx.Sequential(lipjax.Residual(linear([[1e-17]])), linear([[1.0, 0.0]])))
    kernel = net.layers[0].branch.layers[0].kernel[...]
    graph = trace(net, jnp.ones(1))
    region = outward_bound(graph, np.ones(1), 0.0, mode).regions[2]  # behind the sum
    away = 1 + rational(kernel)[0, 0] - rational(region.center)[0]
    assert 0 < away <= Fraction(float(region.radius))


def test_the_executed_error_covers_the_rounding_of_the_sums_of_residuals():
    blocks = [lipjax.Residual(linear([[2.9e-8]])) for _ in range(200)]
    net = nnx.Sequential(*blocks, linear([[1.0, 0.0]]))
    got = float(net(jnp.ones(1))[0])
    exact = (1 + rational(blocks[0].branch.layers[0].kernel[...])[0, 0]) ** 200
    assert got == 1 and exact - 1 > 90 * 2.0**-24  # float32 does not move
    graph = trace(net, jnp.ones(1))
    found = rounding.arithmetics_of(graph)
    with jax.enable_x64(True):
        wide = cast64(graph)
        boxes = [(value, value) for value in every_value(wide, jnp.ones(1))]
        error = rounding.forward_error(wide, boxes, found, proven_norms(wide))
    assert abs(exact - Fraction(got)) <= Fraction(float(error[0]))


def test_parameters_that_were_changed_since_the_last_call_are_the_ones_that_certify():
    parameters = {"kernel": jnp.eye(2)}
    x = np.array([[0.75, 0.25]], np.float32)

    def net(x):
        return x @ parameters["kernel"]

    assert certify(net, x, np.array([0]), 0.1).certified[0]
    parameters["kernel"] = jnp.eye(2)[::-1]
    found = certify(net, x, np.array([0]), 0.1)
    assert found.predicted[0] == 1 and not found.certified[0]


def test_a_parameter_that_changes_when_it_is_read_is_an_error():
    layer = linear(np.eye(2))
    reads = iter(range(100))

    def net(x):
        return x @ (layer.kernel[...] * float(next(reads)))

    with pytest.raises(ValueError, match="each time it is traced"):
        certify(net, np.array([[0.75, 0.25]], np.float32), np.array([0]), 0.1)


def test_the_rounding_of_an_activation_of_ones_own_is_in_the_length_of_the_error():
    """Not only in each coordinate: a length that forgets it would cut the coordinates behind."""

    @jax.jit
    def coarse(z):
        return jnp.tanh(z) * 1.0

    @activations.rule()
    class Coarse(activations.Rule):
        def __call__(self, z):
            return jnp.tanh(z)

        def rounding(self, error):
            return error + 0.25

    activations.register(coarse, Coarse)
    net = nnx.Sequential(linear(np.eye(2)), coarse, linear(np.eye(2)))
    graph = trace(net, jnp.ones(2))
    found = rounding.arithmetics_of(graph)
    with jax.enable_x64(True):
        wide = cast64(graph)
        boxes = [(value, value) for value in every_value(wide, jnp.ones(2))]
        error = rounding.forward_error(wide, boxes, found, proven_norms(wide))
    assert np.all(np.asarray(error) >= 0.25)


def test_a_constant_beside_the_example_that_is_computed_anew_is_refused():
    """No equation stands for it, so no rounding of it is in the allowance."""
    gain = jnp.asarray([0.3, 0.7])

    def f(x):
        return jnp.concatenate([x, gain * gain / 3]) @ np.ones((4, 2), np.float32)

    with pytest.raises(TypeError, match="computed anew"):
        arithmetics(f)
    # A slope by a division is 1 / c, rounded: what to do about that is another thing.
    with pytest.raises(TypeError, match=r"numbers of a Leaky.*Multiply instead of dividing"):
        arithmetics(lambda x: jnp.where(x > 0, x, x / 3) @ np.ones((2, 2), np.float32))


def test_a_number_in_the_program_is_that_of_its_type():
    """0.1 is more in float32 than in float64, and the end of a clip is met exactly."""
    graph = trace(lambda x: jnp.clip(x, -0.1, 0.1) * 0.7 + 0.3, jnp.ones(2))
    for leaf in jax.tree.leaves(graph):
        held = np.asarray(leaf)
        assert held.dtype == np.float32 or np.array_equal(held, held.astype(np.float32))
    (clip,) = (node for node in graph.nodes if hasattr(node, "rule"))
    assert float(np.asarray(clip.rule.top, np.float64)) == float(np.float32(0.1))


@pytest.mark.parametrize(
    "pool", [lipjax.AveragePool(32), lambda x: jnp.mean(x, axis=(0, 1), keepdims=True)]
)
def test_a_mean_whose_sum_overflows_is_not_certified(pool):
    """The mean of 1024 numbers of 1e37 is one, their sum is none."""
    first = conv()
    first.kernel[...] = jnp.full((1, 1, 1, 1), 1e37)
    head = linear([[1e-37, 0.0]], [0.0, 0.5])
    net = nnx.Sequential(first, pool, lipjax.Flatten(), head)
    graph = trace(net, jnp.ones((32, 32, 1)))
    found = rounding.arithmetics_of(graph)
    assert not np.all(np.isfinite(net(jnp.ones((32, 32, 1)))))
    with jax.enable_x64(True):
        wide = cast64(graph)
        boxes = [(value, value) for value in every_value(wide, jnp.ones((32, 32, 1)))]
        error = rounding.forward_error(wide, boxes, found, [jnp.asarray(1e38)] * len(wide.linear))
    assert not np.any(np.isfinite(np.asarray(error)))
