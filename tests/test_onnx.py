"""ONNX files: onnxruntime computes from them what the network computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
from flax import nnx
from jax import lax

import lipjax
from lipjax import storage
from lipjax.bridges import onnx_out

SHAPE = (7, 6, 4)


def conv(inputs=4, outputs=4, window=(3, 2), **arguments) -> nnx.Conv:
    bias = jax.nn.initializers.normal(0.3)
    return nnx.Conv(inputs, outputs, window, bias_init=bias, rngs=nnx.Rngs(0), **arguments)


def thresholds(layer):
    """The activation with thresholds that differ from neuron to neuron."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(rng.uniform(-0.2, 0.2, leaf.shape), leaf.dtype), layer
    )


LAYERS = {
    "conv": lambda: conv(),
    "conv of stride 2, padding SAME": lambda: conv(strides=2),
    "conv without bias, padding in numbers": lambda: conv(padding=((0, 2), (1, 0)), use_bias=False),
    "conv with dilation and groups": lambda: conv(
        feature_group_count=2, kernel_dilation=(2, 1), padding="VALID"
    ),
    "conv with a mask": lambda: conv(mask=jnp.arange(96.0).reshape(3, 2, 4, 4) % 3),
    "circular conv": lambda: conv(window=(3, 4), padding="CIRCULAR"),
    "linear on the channels": lambda: nnx.Linear(4, 6, use_bias=False, rngs=nnx.Rngs(0)),
    "average pool": lambda: lipjax.AveragePool((3, 2), strides=(2, 1)),
    "normalize": lambda: lipjax.Normalize([0.1, 0.2, 0.3, 0.4], [0.5, 2.0, 1.0, 3.0]),
    "normalize by one number": lambda: lipjax.Normalize([0.1], [0.5]),
    "relu": lipjax.ReLU,
    "clipped relu": lambda: thresholds(lipjax.ClippedReLU(SHAPE, threshold=0.3)),
    "maxmin": lipjax.MaxMin,
    "clipped maxmin": lambda: thresholds(lipjax.ClippedMaxMin(SHAPE, upper=0.3, lower=-0.3)),
    "flatten of two axes": lambda: lipjax.Flatten(2),
    "residual": lambda: lipjax.Residual(conv(), lipjax.MaxMin(), lipjax.Residual(conv())),
}


def around(layer) -> nnx.Sequential:
    """A network with that layer in the middle; values of both signs in front of it."""
    shape = jax.eval_shape(layer, jnp.zeros(SHAPE)).shape
    flatten = [lipjax.Flatten(len(shape))] if len(shape) > 1 else []
    return nnx.Sequential(
        conv(window=(1, 1)), layer, *flatten, nnx.Linear(int(np.prod(shape)), 3, rngs=nnx.Rngs(1))
    )


def computed(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].name == "images" and session.get_outputs()[0].name == "logits"
    return session.run(["logits"], {"images": images})[0]


def test_every_layer_that_is_stored_is_compared_here():
    kinds = {type(layer()) for layer in LAYERS.values()}
    assert kinds >= {kind.type for kind in storage.KINDS.values()}


@pytest.mark.parametrize("name", LAYERS)
def test_onnxruntime_gives_the_logits_of_the_network(tmp_path, name):
    network, path = around(LAYERS[name]()), tmp_path / "network.onnx"
    onnx_out.to_onnx(network, path, input_shape=SHAPE)
    for count in (1, 5):  # the number of images is free
        images = np.random.default_rng(count).uniform(0, 1, (count, *SHAPE)).astype(np.float32)
        logits = np.asarray(jax.jit(lambda network, x: network(x))(network, images))
        np.testing.assert_allclose(
            computed(path, images), logits, rtol=1e-5, atol=1e-5 * np.abs(logits).max()
        )


def test_convolutions_of_other_ranks_and_float64(tmp_path):
    path = tmp_path / "network.onnx"
    with jax.enable_x64(True):
        rngs = nnx.Rngs(0)
        network = nnx.Sequential(
            nnx.Conv(2, 3, (3,), padding="CAUSAL", param_dtype=jnp.float64, rngs=rngs),
            lipjax.Flatten(2),
            functools.partial(jax.nn.leaky_relu, negative_slope=0.1),
            nnx.Linear(15, 2, param_dtype=jnp.float64, rngs=rngs),
        )
        onnx_out.to_onnx(network, path, input_shape=(5, 2))
        images = np.random.default_rng(0).uniform(0, 1, (2, 5, 2))
        logits = np.asarray(network(images))
    # onnxruntime has no convolution in float64; ONNX's own evaluator does.
    found = onnx.reference.ReferenceEvaluator(onnx.load(path)).run(None, {"images": images})[0]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, logits, rtol=1e-12)


def test_a_network_that_ends_in_an_activation_is_exported_as_it_is(tmp_path):
    network = nnx.Sequential(lipjax.Flatten(), nnx.Linear(168, 4, rngs=nnx.Rngs(0)), lipjax.ReLU())
    path = tmp_path / "network.onnx"
    onnx_out.to_onnx(network, path, input_shape=SHAPE)
    images = np.random.default_rng(0).uniform(0, 1, (2, *SHAPE)).astype(np.float32)
    np.testing.assert_allclose(computed(path, images), network(images), rtol=1e-5, atol=1e-6)


def test_the_file_says_what_it_takes_and_what_certificates_say_of_it(tmp_path):
    path = tmp_path / "network.onnx"
    onnx_out.to_onnx(around(lipjax.ReLU()), path, input_shape=SHAPE)
    model = onnx.load(path)
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert "[0, 1]" in said["input"] and "not normalised" in said["input"]
    assert (
        "does not cover" in said["certificates"]
        and "arithmetic that they state" in said["certificates"]
    )
    assert model.producer_name == "lipjax" and model.producer_version == lipjax.__version__
    assert [entry.version for entry in model.opset_import] == [onnx_out.OPSET]
    weights = [onnx.numpy_helper.to_array(constant) for constant in model.graph.initializer]
    assert {w.dtype for w in weights} == {np.dtype(np.float32), np.dtype(np.int64)}


WEIGHTS = np.sin(np.arange(36, dtype=np.float32))


class Own(nnx.Module):
    """A block with a `__call__` of its own: two branches, pooling, BatchNorm, GroupSort."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = conv(strides=2)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.norm.mean[...] = jnp.array([0.1, -0.2, 0.3, 0.0])
        self.norm.var[...] = jnp.array([0.5, 1.5, 2.0, 1.0])
        self.head = nnx.Linear(24, 3, rngs=rngs)

    def __call__(self, x):
        h = self.norm(self.first(x))
        h = lipjax.activations.groupsort(h, 2) - nnx.avg_pool(h, (3, 3), padding="SAME")
        h = jnp.concatenate([jnp.abs(h[:, :2]), nnx.relu(0.5 - h[:, 1:])], axis=1)
        return self.head(h.sum(axis=0).mean(axis=0, keepdims=True).repeat(6, 0).reshape(-1))


class Batched(Own):
    """The same on a batch only, with its result computed in other ways."""

    def __call__(self, x):
        h = nnx.relu(self.norm(self.first(x)))
        h = jnp.pad(h, ((0, 0), (1, 0), (0, 0), (0, 0)), constant_values=0.25)
        h = jnp.einsum("nijc,jcd->ndi", h, WEIGHTS[:36].reshape(3, 4, 3))
        return jnp.clip(jnp.flip(h, 2).sum(2) / 3.0, -0.5, 0.8)


def plain(x):
    kernel = WEIGHTS[:30].reshape(10, 3)
    wide = jnp.concatenate([x[::-1], jnp.asarray([0.3, -0.2]), 1.0 - x[1:], x]) @ kernel
    return jnp.maximum(kernel[:3] @ wide, -0.4) - wide


def pooled(x):
    """Leaky ReLU and overlapping max pooling with padding, in plain JAX."""
    y = jax.nn.leaky_relu(x - 0.5, 0.2)
    y = lax.reduce_window(y, -jnp.inf, lax.max, (3, 3, 1), (2, 2, 1), ((1, 0), (1, 1), (0, 0)))
    return y.reshape(-1) @ np.linspace(-1, 1, 3 * y.size, dtype=np.float32).reshape(-1, 3)


def smoothed(x):
    """Every smooth function that there is."""
    names = (jax.nn.sigmoid, jnp.tanh, jax.nn.softplus, jax.nn.soft_sign, jax.nn.silu)
    names += (jax.nn.gelu, lambda z: jax.nn.gelu(z, approximate=False), jax.nn.hard_swish)
    names += (lambda z: jax.nn.elu(z, 0.7), jax.nn.selu)
    return jnp.concatenate([f(6 * x - 3) for f in names])


FUNCTIONS = {
    "smooth": (lambda: smoothed, (5,)),
    "own": (Own, SHAPE),
    "batched": (Batched, SHAPE),
    "plain": (lambda: plain, (3,)),
    "pooled": (lambda: pooled, SHAPE),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_onnxruntime_gives_what_any_function_gives(tmp_path, name):
    make, shape = FUNCTIONS[name]
    f, path = make(), tmp_path / "function.onnx"
    onnx_out.to_onnx(f, path, input_shape=shape)
    images = np.random.default_rng(0).uniform(0, 1, (5, *shape)).astype(np.float32)
    one = (lambda x: f(x[None])[0]) if name == "batched" else f
    expected = np.stack([np.asarray(one(x)) for x in images])
    assert np.ptp(expected, axis=0).max() > 1e-3
    np.testing.assert_allclose(computed(path, images), expected, rtol=1e-5, atol=1e-6)


@jax.jit
def softened(z):
    return jnp.sinh(z)


class Softened(lipjax.activations.Rule):
    """An activation of one's own."""

    def __call__(self, z):
        return softened(z)


lipjax.activations.rule()(Softened)


def test_an_activation_of_ones_own_needs_a_rule_and_is_exported_with_one(tmp_path):
    lipjax.activations.register(softened, Softened)
    path = tmp_path / "network.onnx"
    network = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), softened)
    with pytest.raises(TypeError, match=r"the activation Softened has no rule.*rules\.register"):
        onnx_out.to_onnx(network, path, input_shape=(3,))
    assert not path.exists()

    @onnx_out.rules.register(Softened)
    def _(rule, writer, x, shape):
        return writer.add("Sinh", x)

    onnx_out.to_onnx(network, path, input_shape=(3,))
    images = np.random.default_rng(0).uniform(0, 1, (2, 3)).astype(np.float32)
    np.testing.assert_allclose(computed(path, images), network(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "network, shape, expected",
    [
        (
            lambda: around(lipjax.AOLConv(4, 4, (3, 3), rngs=nnx.Rngs(0))),
            SHAPE,
            r"lipjax\.orthogonal\.plain",
        ),
        (lambda: around(conv(input_dilation=2, padding=1)), SHAPE, "input_dilation"),
        (lambda: around(conv(padding=((-1, 0), (0, 0)))), SHAPE, "padding"),
        (lambda: around(conv(dtype=jnp.bfloat16)), SHAPE, "computes in bfloat16"),
        (lambda: around(lipjax.ReLU()), (7, 6, 3), "shape"),
        (lambda: nnx.Sequential(conv()), SHAPE, "one axis"),
        (lambda: around(lambda x: x * x), SHAPE, "`mul` of two quantities"),
    ],
)
def test_what_cannot_be_exported_is_an_error_and_writes_nothing(tmp_path, network, shape, expected):
    with pytest.raises((TypeError, ValueError), match=expected):
        onnx_out.to_onnx(network(), tmp_path / "network.onnx", input_shape=shape)
    assert not list(tmp_path.iterdir())
