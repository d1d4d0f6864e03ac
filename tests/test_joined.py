"""Scales and shifts behind a linear node are one linear node with it, executed in its parts."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import cast64, rational
from flax import nnx

import lipjax
from lipjax import rounding
from lipjax.bridges import fold
from lipjax.check import checker
from lipjax.check import layers as check_layers
from lipjax.check import nodes as check_nodes
from lipjax.check import walk as check_walk
from lipjax.formats import certificate_files
from lipjax.graph import Linear, trace
from lipjax.graph.description import described
from lipjax.graph.joining import rejoined

SHAPE = (4, 4, 2)
X = np.random.default_rng(1).uniform(0, 1, SHAPE).astype(np.float32)


def norm(size, seed=0, dtype=None, spread=1.0):
    """A BatchNorm in inference with statistics and parameters of both signs."""
    rng = np.random.default_rng(seed)
    layer = nnx.BatchNorm(size, use_running_average=True, dtype=dtype, rngs=nnx.Rngs(0))
    layer.mean[...] = jnp.asarray(spread * rng.normal(size=size), jnp.float32)
    layer.var[...] = jnp.asarray(rng.uniform(0.1, 3, size), jnp.float32)
    layer.scale[...] = jnp.asarray(rng.normal(size=size), jnp.float32)
    layer.bias[...] = jnp.asarray(rng.normal(size=size), jnp.float32)
    return layer


def net(seed=0):
    rngs = nnx.Rngs(seed)
    return nnx.Sequential(
        nnx.Conv(2, 4, (3, 3), rngs=rngs),
        norm(4, seed),
        nnx.relu,
        lipjax.Flatten(),
        nnx.Linear(64, 5, rngs=rngs),
        norm(5, seed + 1),
        nnx.relu,
        nnx.Linear(5, 3, rngs=rngs),
    )


class Batched(nnx.Module):
    """The same on a batch alone: reshapes stand between a convolution and its BatchNorm."""

    def __init__(self, network):
        self.network = network

    def __call__(self, x):
        assert x.ndim == 4
        return self.network(x)


def linear_nodes(f, x=X):
    return [node for node in trace(f, x).nodes if isinstance(node, Linear)]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("mode", ["global", "local", "linear"])
def test_batch_norm_behind_a_linear_layer_has_the_bound_of_the_folded_network(mode, batched):
    network = net()
    folded = fold(network)
    given = Batched(network) if batched else network
    assert len(linear_nodes(given)) == len(linear_nodes(folded)) == 3
    key = jax.random.key(0)
    one, other = (lipjax.bound(f, X, 0.1, mode=mode, key=key) for f in (given, folded))
    np.testing.assert_allclose(one.lipschitz, other.lipschitz, rtol=1e-5)
    # A node of its own would cost the largest factor.
    assert one.lipschitz > 0


def test_certified_norms_are_those_of_the_folded_network():
    network = net()
    found, folded = (
        lipjax.certify(f, X[None], None, 0.01, tier="deterministic")
        for f in (network, fold(network))
    )
    np.testing.assert_allclose(found.norms, folded.norms, rtol=1e-5)


@pytest.mark.parametrize("f", [net(), Batched(net(3))], ids=["example", "batch"])
def test_a_graph_computes_the_parts_as_the_program_does(f):
    graph = trace(f, X)
    expected = f(X[None])[0] if graph.batched else f(X)
    np.testing.assert_array_equal(graph(X), expected)
    np.testing.assert_array_equal(graph.spelled_out()(X), expected)
    assert graph.with_head().shape == (3,)


OWN = {
    "conv": lambda dtype: [
        nnx.Conv(2, 4, (3, 3), dtype=dtype, rngs=nnx.Rngs(0)),
        norm(4, 0, dtype),
    ],
    "far from zero": lambda dtype: [
        nnx.Conv(2, 4, (3, 3), dtype=dtype, rngs=nnx.Rngs(0)),
        lambda x: x + jnp.asarray([3e3, -3e3, 1e3, 7e3], x.dtype),
        lambda x: (x - jnp.asarray([3e3, -3e3, 1e3, 7e3], x.dtype)) * jnp.asarray(0.7, x.dtype),
    ],
    "two norms": lambda dtype: [
        nnx.Linear(2, 4, dtype=dtype, rngs=nnx.Rngs(0)),
        norm(4, 2, dtype, 100.0),
        norm(4, 3, dtype, 100.0),
    ],
    "large factor": lambda dtype: [
        nnx.Linear(2, 4, dtype=dtype, rngs=nnx.Rngs(0)),
        lambda x: x / jnp.asarray(3e-5, x.dtype) + jnp.asarray(1.0, x.dtype),
    ],
}


def exact(graph, x):
    """The function in rational numbers, of the parameters of the program as they stand."""
    values = []
    for node in graph.spelled_out().nodes:
        taken = [values[i] for i in node.inputs]
        if not taken:
            values.append(rational(np.asarray(x, np.float64)))
        elif isinstance(node, Linear):
            wide = cast64(node)
            like = jax.ShapeDtypeStruct(taken[0].shape, jnp.float64)
            matrix = np.asarray(wide.operator.materialized(like).kernel)
            value = (rational(matrix) @ taken[0].reshape(-1)).reshape(node.shape)
            bias = wide.operator.bias
            values.append(value if bias is None else value + rational(np.asarray(bias)))
        elif hasattr(node, "signs"):
            shift = 0 if node.constant is None else rational(np.asarray(node.constant, np.float64))
            values.append(node.signs[0] * taken[0] + shift)
        else:
            assert node.pure
            values.append(taken[0].reshape(node.shape))
    return values[-1]


def executed_error(graph, x):
    """How far an executed value at x may be from the exact one."""
    arithmetics = rounding.arithmetics_of(graph)
    with jax.enable_x64(True):
        wide = rejoined(cast64(graph))
        values = [np.asarray(x, np.float64)]
        for node in wide.nodes[1:]:
            before = [jnp.asarray(values[i]) for i in node.inputs]
            values.append(np.asarray(lipjax.graph.nodes.evaluate(node, before, before[0])))
        boxes = [(jnp.asarray(v), jnp.asarray(v)) for v in values]
        norms = [1e60] * len(wide.linear)
        return np.asarray(rounding.forward_error(wide, boxes, arithmetics, norms))


LARGE = jnp.asarray([[1e30, 2e30], [3e30, 1e30]])
TINY = 2.0**-80
FOLDED = {
    "in a row": lambda x: (x @ LARGE) * 1e-25 * 1e-25 * 1e20,
    "turned around": lambda x: jnp.flip((x @ LARGE) * 1e-25) * 1e-25 * 1e20,
    "negated": lambda x: -((x @ LARGE) * 1e-25) * 1e-25 * 1e20,
    "added": lambda x: (x @ LARGE * TINY + x[::-1] @ LARGE * TINY) * TINY * 2.0**60,
    "copied": lambda x: (jnp.broadcast_to((x @ LARGE) * 1e-25, (3, 2)) * 1e-25).reshape(-1) * 1e20,
    "overflow": lambda x: (x @ (1e-35 * LARGE * 1e-25)) * 1e25 * 1e25,
}


@pytest.mark.parametrize("case", FOLDED)
def test_the_executed_error_covers_compilers_that_multiply_constants_first(case):
    f, x = FOLDED[case], jnp.asarray([0.25, 0.5])
    error = executed_error(trace(f, x), x)
    one_by_one, compiled = (np.asarray(run(x), np.float64) for run in (f, jax.jit(f)))
    assert np.all(np.abs(compiled - one_by_one) <= error)
    # As XLA does it today; a compiler may leave the order as it is.
    assert np.all(np.abs(one_by_one) <= error)
    # And the checker's own.
    nodes = check_nodes.read(described(trace(f, x).with_head()), x.shape)
    whole = [(0.0, 1e60) for node in nodes if isinstance(node.step, check_layers.Affine)]
    network = check_walk.Network(nodes, whole, "float32")
    derived = check_walk.derive(network, np.asarray(x), 0, 0.0, lambda matrix: whole[0])
    assert np.all(np.abs(one_by_one) <= derived.rounding)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OWN)
def test_the_forward_error_is_never_below_that_of_the_executed_parts(name, dtype):
    kind = jnp.dtype(dtype)
    network = nnx.Sequential(*OWN[name](kind))
    for seed in range(3):
        x = jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, SHAPE), dtype)
        graph = trace(network, x, batched=False)
        assert any(node.parts for node in graph.nodes if isinstance(node, Linear))
        runs = [np.asarray(run(x), np.float64) for run in (network, jax.jit(lambda x: network(x)))]
        with jax.enable_x64(True):
            true = exact(graph, x)
        error = executed_error(graph, x)
        for got in runs:
            away = np.abs(rational(got) - true).astype(np.float64)
            assert np.all(away <= error), np.max(away / error)
        assert np.all(
            error < 1e4 * max(float(jnp.finfo(kind).eps), 1e-7) * (1 + np.max(away) + 1e4)
        )


def test_a_value_that_overflows_between_the_parts_is_not_certified():
    """Scaled back, the bound of the whole node says nothing of it."""
    weights = jnp.full((2, 2), 1e30).at[0, 1].set(-1e30)

    def f(x):
        return ((1e8 * x) @ weights) * 1e-38 + jnp.array([0.5, 0.0])

    x = np.array([[0.75, 0.25]], np.float32)
    certificate = lipjax.certify(f, x, None, 1e-6, tier="deterministic")
    assert not certificate.certified.any()


def test_where_a_scale_is_one_number_an_entry_it_is_a_node_of_its_own():
    factors = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (4, 4, 4)), jnp.float32)
    conv = nnx.Conv(2, 4, (3, 3), rngs=nnx.Rngs(0))
    assert len(linear_nodes(lambda x: (conv(x) * factors).reshape(-1))) == 2
    assert len(linear_nodes(lambda x: (conv(x) * factors[0, 0]).reshape(-1))) == 1
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), jnp.float32)
    vector = X[0, 0]
    for g in (lambda x: (kernel @ x) * factors[0, 0, :3], lambda x: (x @ kernel.T) / 3.0):
        (node,) = linear_nodes(g, vector)
        np.testing.assert_allclose(node.operator.affine(vector), g(vector), rtol=1e-6)


def test_scales_whose_product_underflows_are_not_lost():
    """In float32 1e-25 * 1e-25 is 0, and so is all that is multiplied with it."""
    for f in (
        lambda x: jnp.sum(x) * 1e-25 * 1e-25 * 1e20,
        lambda x: (x @ jnp.full((2, 1), 1e-25)) * 1e-25 * 1e20,
    ):
        with jax.enable_x64(True):
            wide = rejoined(cast64(trace(f, X[0, 0])))
            (node,) = wide.linear_nodes
            np.testing.assert_allclose(node.operator.kernel, 1e-30, rtol=1e-6)


def test_a_head_that_is_joined_and_reshaped_is_one_node_where_its_kernel_has_the_entries():
    rng = np.random.default_rng(0)
    kernel, image = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in ((2, 3), (3, 3, 2, 4)))

    def dense(x):
        return ((x[None] @ kernel) * kernel[0] + kernel[1]).reshape(-1)

    def conv(x):
        window = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x[None], image, (1, 1), "SAME", dimension_numbers=window)
        return (y * image[0, 0, 0] + image[0, 0, 1]).reshape(-1)

    for f, x, count in ((dense, X[0, 0], 1), (conv, X, 2)):
        graph = trace(f, x).with_head()
        assert len(graph.linear) == count
        np.testing.assert_allclose(graph(x), f(x), rtol=1e-5, atol=1e-5)
        with jax.enable_x64(True):
            value = jnp.asarray(x, jnp.float64)
            for node in rejoined(cast64(graph)).nodes[1:]:
                value = node.operator.affine(value) if isinstance(node, Linear) else node(value)
            assert value.shape == graph.shape
            np.testing.assert_allclose(value, f(x), rtol=1e-5, atol=1e-5)


def test_certificates_of_joined_nodes_are_confirmed_and_their_forgeries_are_not(tmp_path):
    network, path = net(), tmp_path / "x.npz"
    certificate = lipjax.certify(network, X[None], None, 0.001, tier="deterministic", mode="linear")
    assert certificate.certified.all()
    labels = certificate.predicted
    certificate_files.save(path, certificate, network, X[None], labels)
    header, arrays = certificate_files.load(path)
    described = checker.describe(network, X)

    def report():
        header["network"] = certificate_files.network_hash(described)
        header["digest"] = certificate_files.digest(header, arrays)
        rng = np.random.default_rng(0)
        return checker.check(described, X[None], labels, header, arrays, rng)

    assert report().confirmed, report()
    arrays["allowance"] /= 2
    assert any("recorded allowance" in problem for problem in report().problems)
    arrays["allowance"] *= 2
    (scale, *_) = [i for i, node in enumerate(described) if node["kind"] == "scale"]
    whole = copy.deepcopy(described)
    described[scale]["kernel"] = described[scale]["kernel"] * np.float32(1.1)
    assert not report().confirmed

    # Joined with something that others read, or that is no linear node.
    described = copy.deepcopy(whole)
    described[scale + 1]["inputs"] = [scale - 1]
    with pytest.raises(checker.CannotCheck, match="joined with another"):
        report()
    described = copy.deepcopy(whole)
    described[scale]["joined"] = False
    described[scale + 1] = {**described[scale], "inputs": [scale - 1], "joined": True}
    with pytest.raises(checker.CannotCheck, match="others read too"):
        report()
    described = copy.deepcopy(whole)
    described[scale]["joined"] = "yes"
    with pytest.raises(checker.CannotCheck, match="expected true or false"):
        report()
