"""Certificates of any function: its graph as plain data, in files and under the checker."""

import copy
import functools
from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_net
from flax import nnx

import lipjax
from lipjax import storage
from lipjax.check import checker, onesided, walk
from lipjax.check import layers as check_layers
from lipjax.check import norms as check_norms
from lipjax.check.layers import Activation, Add, Affine, CannotCheck, Move
from lipjax.formats import certificate_files

EPSILON = 0.03
COUNT = 4
BIAS = jax.nn.initializers.normal(0.2)


class Shortcut(nnx.Module):
    """A strided block beside a 1x1 convolution, and Flax's own pooling: nothing of lipjax."""

    def __init__(self):
        rngs = nnx.Rngs(1)
        self.first = nnx.Conv(2, 4, (3, 3), rngs=rngs, bias_init=BIAS)
        self.second = nnx.Conv(4, 4, (3, 3), strides=2, rngs=rngs, bias_init=BIAS)
        self.short = nnx.Conv(4, 4, (1, 1), strides=2, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs, bias_init=BIAS)

    def __call__(self, x):
        h = nnx.relu(self.first(x))
        h = nnx.relu(self.second(h) + self.short(h))
        h = nnx.avg_pool(h.reshape(1, *h.shape), (2, 2), strides=(2, 2))
        return self.head(h.reshape(-1))


def _weights(*shape):
    return (np.random.default_rng(sum(shape)).normal(size=shape) / 2).astype(np.float32)


def plain(x):
    """Clipping at other ends than 0, and pairs that nobody called MaxMin."""
    h = jnp.clip(x @ _weights(6, 8).astype(x.dtype), -0.2, 0.6)
    h = jnp.concatenate([jnp.maximum(h[:4], h[4:]), jnp.minimum(h[:4], h[4:])])
    return h @ _weights(8, 3).astype(x.dtype)


class Batched(nn.Module):
    """A Linen module of a batch."""

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Conv(4, (2, 2), strides=2, bias_init=BIAS)(x))
        h = nn.relu(nn.Dense(6, bias_init=BIAS)(h.reshape(len(h), -1)))
        return nn.Dense(3, bias_init=BIAS)(h)


def _linen():
    module = Batched()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)))
    return lambda x: module.apply(variables, x)


SHAPES = {"module": (4, 4, 2), "function": (6,), "linen": (4, 4, 2)}


@functools.cache
def subject(name):
    """A function, images and the labels that it gives them."""
    f = {"module": Shortcut, "function": lambda: plain, "linen": _linen}[name]()
    images = np.random.default_rng(0).uniform(0, 1, (COUNT, *SHAPES[name])).astype(np.float32)
    graph = lipjax.trace(f, images[0])
    labels = np.array([np.argmax(graph(x)) for x in images], np.int32)
    return f, images, labels


@functools.cache
def certified(name, mode="local"):
    f, images, labels = subject(name)
    return lipjax.certify(f, images, labels, EPSILON, tier="deterministic", mode=mode)


class File:
    """The file of a certificate, with what it is about, to be tampered with."""

    def __init__(self, folder, name, mode="local"):
        f, self.images, self.labels = subject(name)
        path = folder / "x.npz"
        certificate_files.save(path, certified(name, mode), f, self.images, self.labels)
        self.header, self.arrays = certificate_files.load(path)
        self.described = copy.deepcopy(_described(name))

    def report(self, rehash=True):
        if rehash:
            self.header["network"] = certificate_files.network_hash(self.described)
            self.header["digest"] = certificate_files.digest(self.header, self.arrays)
        rng = np.random.default_rng(0)
        return checker.check(
            self.described, self.images, self.labels, self.header, self.arrays, rng
        )


@functools.cache
def _described(name):
    f, images, _ = subject(name)
    return checker.describe(f, images[0])


# ---------------------------------------------------------------------- confirmed


@pytest.mark.parametrize(
    "name, mode", [*((name, "local") for name in SHAPES), (list(SHAPES)[-1], "linear")]
)
def test_certificates_of_any_function_are_saved_loaded_and_confirmed(tmp_path, name, mode):
    file = File(tmp_path, name, mode)
    report, certificate = file.report(rehash=False), certified(name, mode)
    assert report.confirmed and report.random_norms == 0, report
    assert report.certified == certificate.certified.sum() >= 2 and file.header["classes"] == 3
    assert np.all(report.margin >= certificate.margin)
    assert np.all(report.margin <= certificate.margin + 0.02 * np.abs(certificate.margin) + 2e-3)


def of_kind(file, kind):
    return next(node for node in file.described if node["kind"] == kind)


def forge_weight(file):
    kernel = next(node for node in file.described if "kernel" in node)["kernel"]
    kernel.reshape(-1)[::2] *= np.float32(1.5)


def forge_margin(file):
    file.arrays["margin"] += 0.02


def forge_index(file):
    """Two channels change places at one pixel."""
    index = of_kind(file, "move")["index"].reshape(-1)
    index[0], index[1] = index[1], index[0]


def forge_threshold(file):
    node = of_kind(file, "clip")
    node["top"] = np.array(0.1, np.float32)


def forge_filling(file):
    node = of_kind(file, "move")
    node["index"].reshape(-1)[0] = -1
    node["fill"] = np.array([-20.0], np.float32)


@pytest.mark.parametrize(
    "forge", [forge_weight, forge_margin, forge_index, forge_threshold, forge_filling]
)
def test_a_forged_certificate_of_a_function_is_rejected(tmp_path, forge):
    file = File(tmp_path, "module")
    forge(file)
    naive = file.report(rehash=False)
    assert "digest" in str(naive) or "about the network" in str(naive)
    report = file.report()
    assert not report.confirmed and len(report.checked) == COUNT, report


def test_what_a_function_computes_is_in_its_hash():
    """Of each entry of each node."""
    whole = _described("module")
    own = certificate_files.network_hash(whole)
    for i, node in enumerate(whole):
        for field, value in node.items():
            changed = copy.deepcopy(whole)
            is_array = isinstance(value, np.ndarray) and value.size
            changed[i][field] = np.asarray(value + 1) if is_array else [value, "another"]
            if not isinstance(value, np.ndarray) or is_array:
                assert certificate_files.network_hash(changed) != own, (i, field)


def test_hashes_of_networks_by_layers_stay_as_they_are():
    """Files of 0.2.0 are about this network by this hash."""
    network = lipjax.load("digits-maxmin")
    layers = check_layers.of_stored(*storage.layers_of(network))
    assert certificate_files.network_hash(layers) == GOLDEN


GOLDEN = "c117ee7c0c857f3f36af163160461f1fe4d327b078b30d2066a353f6b486933a"


def test_a_sequential_with_functions_in_it_is_described_by_nodes(tmp_path):
    """By layers two functions of one name would have one hash."""
    images = np.random.default_rng(0).uniform(0, 1, (2, 2)).astype(np.float32)

    def net(factor):
        first, last = (nnx.Linear(2, 2, rngs=nnx.Rngs(seed)) for seed in (0, 1))
        return nnx.Sequential(first, lambda x: factor * x, nnx.relu, last)

    certificate = lipjax.certify(net(2.0), images, None, 0.01, tier="deterministic")
    hashes = []
    for factor in (2.0, 3.0):
        network = net(factor)
        labels = certificate.predicted
        certificate_files.save(tmp_path / "x.npz", certificate, network, images, labels)
        header, _ = certificate_files.load(tmp_path / "x.npz")
        hashes.append(header["network"])
    assert hashes[0] != hashes[1]


# ---------------------------------------------------------------------- the same


def test_layers_and_nodes_of_one_network_give_the_same_margins():
    network = tiny_net("clipped_maxmin", seed=2)
    image = np.random.default_rng(0).uniform(0, 1, (6, 6, 2)).astype(np.float32)
    margins = []
    for described in (
        check_layers.of_stored(*storage.layers_of(network)),
        checker.describe(network, image),
    ):
        nodes = check_layers.nodes_of(described, image.shape)
        walked, norms = network_of(nodes, "float64")
        for linear in (False, True):
            derived = walk.derive(walked, image, 1, 0.05, norms, linear=linear)
            margins.append(derived.margin)
    np.testing.assert_allclose(margins[:2], margins[2:], rtol=1e-11)
    assert np.all(np.isfinite(margins))


def network_of(nodes, arithmetic="float32"):
    norms = check_norms.Norms(1e-9, np.random.default_rng(0))
    layers = [node.step for node in nodes if isinstance(node.step, Affine)]
    return walk.Network(nodes, [norms(layer.matrix) for layer in layers], arithmetic), norms


def several(x):
    """Copies, other signs, constants, padding, a part that is read past a layer."""
    wide = jnp.concatenate([x, x[::-1], jnp.pad(0.5 - x, (1, 2), constant_values=0.25)])
    h = jnp.clip(wide @ _weights(15, 6), -0.3, 0.5)
    h = jnp.concatenate([h, jnp.asarray([0.5, -1.0], jnp.float32), -x])
    h = h.reshape(3, 4).T.reshape(-1)
    pairs = jnp.concatenate([jnp.maximum(h[:6], h[6:]), jnp.minimum(h[:6], h[6:])])
    return jnp.minimum(pairs - h, 0.4) @ _weights(12, 3)


def run(nodes, points):
    """All values for points ``(n, count)``, floats or Fractions."""
    values = [points]
    for node in nodes:
        step, taken = node.step, [values[j] for j in node.inputs]
        exact = points.dtype == object
        if isinstance(step, Affine):
            matrix, bias = _numbers(step.matrix.toarray(), exact), _numbers(step.bias, exact)
            values.append(matrix @ taken[0] + bias[:, None])
        elif isinstance(step, Add):
            total = sum(sign * value for sign, value in zip(step.signs, taken, strict=True))
            if step.constant is not None:
                total = total + _numbers(step.constant, exact)[:, None]
            values.append(total)
        elif isinstance(step, Move):
            joined = np.concatenate(taken)
            rows = [
                joined[j] if j >= 0 else np.repeat(_numbers(np.array([c]), exact), points.shape[1])
                for j, c in zip(step.index, step.fill, strict=True)
            ]
            values.append(np.stack(rows))
        else:
            assert isinstance(step, Activation)
            values.append(np.stack([_activated(step, column) for column in taken[0].T], axis=1))
    return values


def _numbers(array, exact):
    if not exact:
        return array
    finite = np.vectorize(lambda n: Fraction(n) if np.isfinite(n) else n, otypes=[object])
    return finite(array)


def _activated(step, column):
    exact = column.dtype == object
    shape = (*step.shape[:-1], step.shape[-1] // 2) if step.pairs else step.shape
    bottom = _numbers(np.broadcast_to(step.bottom, shape), exact)
    top = _numbers(np.broadcast_to(step.top, shape), exact)
    z = column.reshape(step.shape)
    if not step.pairs:
        return np.minimum(np.maximum(z, bottom), top).reshape(-1)
    a, b = np.split(z, 2, axis=-1)
    first, second = np.minimum(np.maximum(a, b), top), np.maximum(np.minimum(a, b), bottom)
    return np.concatenate([first, second], axis=-1).reshape(-1)


def ball(x, epsilon, count=300):
    noise = np.random.default_rng(3).normal(size=(x.size, count))
    noise[:, : 2 * x.size] = np.concatenate([np.eye(x.size), -np.eye(x.size)], axis=1)[:, :count]
    return x.reshape(-1, 1).astype(np.float64) + epsilon * noise / np.linalg.norm(noise, axis=0)


def nodes_of(name):
    if name == "several":
        image = np.array([0.9, 0.2, 0.6, 0.4], np.float32)
        return check_layers.nodes_of(checker.describe(several, image), image.shape), image
    _, images, _ = subject(name)
    return check_layers.nodes_of(_described(name), images.shape[1:]), images[0]


@pytest.mark.parametrize("name", [*SHAPES, "several"])
@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.6])
@pytest.mark.parametrize("by_rows", [(), (None,), onesided.RULES[1:]])
def test_every_value_stays_in_its_region_and_every_margin_above_its_bound(name, epsilon, by_rows):
    nodes, x = nodes_of(name)
    network, norms = network_of(nodes)
    walked = walk.walk(network, x, epsilon, norms, by_rows)
    *values, logits = run(nodes, ball(x, epsilon))
    for known, value in zip(walked.values, values, strict=True):
        assert np.all(known.lower[:, None] <= value + 1e-14)
        assert np.all(value <= known.upper[:, None] + 1e-14)
        moved = np.linalg.norm((value - known.center[:, None])[known.varies], axis=0)
        assert np.all(moved <= known.radius * (1 + 1e-12) + 1e-14)
        assert np.all(np.ptp(value[~known.varies], axis=1) <= 1e-14)
    for label in range(len(logits)):
        local = walk.derive(network, x, label, epsilon, norms)
        linear = walk.derive(network, x, label, epsilon, norms, linear=True, rows=by_rows)
        lost = linear.differences
        real = np.delete(np.min(logits[label] - logits, axis=1) - lost, label)
        assert local.margin <= linear.margin + 1e-9 and linear.margin <= np.min(real)
        if epsilon == 0:
            assert linear.margin >= np.min(real) - 1e-9


@pytest.mark.parametrize("epsilon", [0.0, 2.0**-40])
def test_exact_values_lie_in_their_regions_where_only_rounding_is_left(epsilon):
    """In rationals: a term of rounding that is left out shows here."""
    nodes, x = nodes_of("several")
    network, norms = network_of(nodes)
    walked = walk.walk(network, x, epsilon, norms)
    moved = np.array([Fraction(float(n)) for n in x], object)
    moved[1] += Fraction(epsilon)
    exact = run(nodes, moved[:, None])
    for known, value in zip(walked.values, exact[:-1], strict=True):
        for low, number, high in zip(known.lower, value[:, 0], known.upper, strict=True):
            assert Fraction(low) <= number <= Fraction(high)
        centers = np.array([Fraction(n) for n in known.center.tolist()])
        away = (value[:, 0] - centers)[known.varies]
        assert sum(away**2) <= Fraction(known.radius) ** 2


def test_on_a_small_ball_the_slopes_are_the_gradient():
    nodes, x = nodes_of("several")
    network, norms = network_of(nodes, "float64")
    derived = walk.derive(network, x, 0, 1e-6, norms, linear=True)
    steps = 1e-8 * np.concatenate([np.eye(4), -np.eye(4)], axis=1)
    logits = run(nodes, x[:, None].astype(np.float64) + steps)[-1]
    jacobian = (logits[:, :4] - logits[:, 4:]) / 2e-8
    gradient = np.linalg.norm(jacobian[derived.rival] - jacobian[0])
    assert derived.taken - 2 * np.max(derived.rounding) <= 1e-6 * gradient * (1 + 1e-4)


# ---------------------------------------------------------------------- the matrices


def _conv(x, window=(3, 2), **options):
    kernel = _weights(*window, x.shape[-1] // options.get("feature_group_count", 1), 4)
    numbers = ("NHWC", "HWIO", "NHWC")
    padding = options.pop("padding", "SAME")
    strides = options.pop("strides", (1, 1))
    return jax.lax.conv_general_dilated(
        x.reshape(1, *x.shape), kernel, strides, padding, dimension_numbers=numbers, **options
    )


FUNCTIONS = {
    "matrix first": ((4,), lambda x: _weights(3, 4) @ x),
    "axes in front": ((2, 4), lambda x: x @ _weights(4, 3)),
    "einsum": ((2, 3, 4), lambda x: jnp.einsum("abc,bcd->ad", x, _weights(3, 4, 5))),
    "shared axes": ((2, 3), lambda x: jnp.einsum("ab,acb->ac", x, _weights(2, 4, 3))),
    "shared, kernel first": ((2, 3), lambda x: jnp.einsum("acb,ab->ca", _weights(2, 4, 3), x)),
    "strides": ((5, 4, 2), lambda x: _conv(x, strides=(2, 1))),
    "groups": ((4, 3, 2), lambda x: _conv(x, feature_group_count=2, padding="VALID")),
    "dilation": ((6, 5, 2), lambda x: _conv(x, rhs_dilation=(2, 1), padding=[(1, 0), (2, 1)])),
    "sum": ((3, 4, 2), lambda x: jnp.sum(x, axis=(0, 2))),
    "mean": ((3, 4), lambda x: jnp.mean(x, axis=1)),
    "windows": (
        (5, 4, 2),
        lambda x: jax.lax.reduce_window(
            x, 0.0, jax.lax.add, (2, 3, 1), (2, 1, 1), [(1, 0), (0, 2), (0, 0)]
        ),
    ),
    "scale": ((3, 2), lambda x: x * jnp.asarray([2.0, -3.0]) + jnp.ones((3, 1))),
}


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_matrices_are_those_of_the_function(name):
    shape, f = FUNCTIONS[name]
    x = np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)

    def flat(x):
        return f(x).reshape(-1)

    nodes = check_layers.nodes_of(checker.describe(flat, x), shape)
    found = run(nodes, x.reshape(-1, 1).astype(np.float64))[-1][:, 0]
    np.testing.assert_allclose(found, flat(x), atol=1e-5)


# ---------------------------------------------------------------------- what is executed


def confirmed(tmp_path, f, images, epsilon=0.01, **options):
    labels = np.array([np.argmax(f(jnp.asarray(x))) for x in images], np.int32)
    certificate = lipjax.certify(f, images, labels, epsilon, tier="deterministic", **options)
    certificate_files.save(tmp_path / "x.npz", certificate, f, images, labels)
    header, arrays = certificate_files.load(tmp_path / "x.npz")
    described = checker.describe(f, images[0], arithmetic=header["arithmetic"])
    report = checker.check(described, images, labels, header, arrays, np.random.default_rng(0))
    assert report.confirmed and report.certified, report
    return described, header, arrays


def narrow(x):
    h = x.astype(jnp.bfloat16) @ jnp.asarray(_weights(6, 8), jnp.bfloat16)
    h = jnp.sum(jax.nn.relu(h.reshape(4, 2)), axis=1)
    return (h @ jnp.asarray(_weights(4, 3), jnp.bfloat16)).astype(jnp.float32)


def normalised(x):
    """Parameters that the program computes at every call, as a folded BatchNorm's are."""
    gain = jnp.asarray(_weights(6))
    scale = gain / jnp.sqrt(gain * gain + 0.1)
    return jax.nn.relu(scale * (x / 3) + scale) @ _weights(6, 3)


@pytest.mark.parametrize("name", ["float64", "bfloat16", "computed parameters"])
def test_other_arithmetics_and_parameters_that_are_rounded_are_confirmed(tmp_path, name):
    images = np.random.default_rng(5).uniform(0, 1, (2, 6)).astype(np.float32)
    f, options = {
        "float64": (plain, {"arithmetic": "float64"}),
        "bfloat16": (narrow, {}),
        "computed parameters": (normalised, {}),
    }[name]
    described, header, _ = confirmed(tmp_path, f, images, **options)
    assert header["arithmetic"] == {"float64": "float64", "bfloat16": "bfloat16"}.get(
        name, "float32"
    )
    assert any(node["roundings"] for node in described) == (name == "computed parameters")


def test_copies_lengthen_what_is_known_and_rows_count_if_any_of_their_places_does():
    step = Move(np.array([1, 0, 1, -1]), np.array([0.0, 0.0, 0.0, 7.0]), (2,))
    center, half = np.array([0.0, 5.0]), np.array([0.1, 0.2])
    length = float(np.linalg.norm(half))
    known = walk.Known(
        center, center - half, center + half, np.array([True, True]), length, half, length
    )
    moved = walk.move(step, [known])
    assert moved.lower[3] == moved.center[3] == moved.upper[3] == 7
    assert moved.varies.tolist() == [True, True, True, False] and moved.error[3] == 0
    for bound in (moved.radius, moved.distance):
        assert np.linalg.norm([0.2, 0.1, 0.2]) <= bound <= np.sqrt(2) * length * (1 + 1e-12)
    # Of entry 1 one place is clipped for good, the other is open.
    top = np.array([1.0, 9.0, 9.0, 9.0])
    clip = Activation(False, (4,), top, np.array(0.0))
    assert walk._moving_rows([step], clip, known).tolist() == [True, True]
    shut = Activation(False, (4,), np.array([1.0, 9.0, 1.0, 9.0]), np.array(0.0))
    assert walk._moving_rows([step], shut, known).tolist() == [True, False]


def test_the_allowance_counts_computed_parameters_and_sums_in_their_own_type():
    def error(f, arithmetic, kind=None, **changes):
        x = np.full(64, 0.5, np.float32)
        described = checker.describe(lambda x: f(x).reshape(-1), x)
        for node in described:
            if node["kind"] == kind:
                node.update(changes)
        network, norms = network_of(check_layers.nodes_of(described, x.shape), arithmetic)
        return walk.derive(network, x, 0, 0.0, norms).rounding

    unit = 2.0**-24
    scaled = functools.partial(error, lambda x: x * np.float32(3.0), "float32")
    assert np.all(scaled() < 10 * unit * 1.5)
    assert np.all(scaled("scale", roundings=50.0) >= 100 * unit * 1.5)
    shifted = functools.partial(error, lambda x: jax.nn.relu(x) + np.float32(3.0), "float32")
    assert np.all(shifted() < 10 * unit * 4)
    assert np.all(shifted("add", roundings=50.0) >= 100 * unit * 3)

    def summed(x):
        return jnp.sum(x.astype(jnp.bfloat16).reshape(2, 32), axis=1, dtype=jnp.bfloat16)

    def total(x):
        return jnp.sum(x.reshape(2, 32), axis=1)

    # 32 terms of 0.5, summed in bfloat16; in float32, whatever the device makes of products.
    own = checker.describe(summed, np.zeros(64, np.float32))
    if own[-1]["executed"][0][1] == ["bfloat16"]:
        assert np.all(error(summed, "bfloat16") >= 31 * 2.0**-9 * 16)
    assert np.all(error(total, "tf32") < 50 * unit * 16)
    product = error(lambda x: x @ np.ones((64, 2), np.float32), "tf32")
    assert np.all(product >= 2 * 2.0**-10 * 32)


def edited(name="function", **changes):
    """The description of a function with some nodes changed, by their kind."""
    described = copy.deepcopy(_described(name))
    for kind, change in changes.items():
        node = next(node for node in described if node["kind"] == kind)
        node.update(change(node) if callable(change) else change)
    return described


def as_read(described, arithmetic="float32", images=None):
    """What the checker makes of it."""
    shape = tuple(described[0]["shape"])
    nodes = check_layers.nodes_of(described, shape)
    images = np.zeros((1, *shape), np.float32) if images is None else images
    order = list(walk.ARITHMETICS)
    checker.check_nodes.check_arithmetic(described, arithmetic, images, order, checker.ALGORITHMS)
    return nodes


def executing(**changes):
    """Another first equation of a node."""
    names = ("primitive", "operands", "result", "precision", "accumulate")

    def change(node):
        first, *rest = node["executed"]
        found = dict(zip(names, first, strict=True)) | changes
        return {"executed": [[found[n] for n in names], *rest]}

    return change


def test_a_description_that_nobody_changed_is_read():
    for name in SHAPES:
        assert as_read(_described(name))


HALF = {"operands": ["bfloat16", "bfloat16"], "result": "float32", "accumulate": None}


@pytest.mark.parametrize(
    ("described", "said"),
    [
        (lambda: edited(product=executing(operands=["float32", "bfloat16"])), "more digits"),
        (lambda: edited(product=executing(accumulate="bfloat16")), "rounds more"),
        (lambda: edited(product=executing(operands=["float32", "float16"])), "float16"),
        (lambda: edited(product=executing(accumulate="float16")), "float16"),
        (lambda: edited(product=executing(result="float64")), "other types"),
        (lambda: edited(product=executing(primitive="fft")), "'fft'"),
        (lambda: edited(product=executing(precision="algorithm X.F16_F16_F16")), "not known"),
        (lambda: edited(product={"executed": []}), "more than its 0 equations"),
        (
            lambda: edited("module", conv=lambda node: {"executed": node["executed"][:1]}),
            "more than",
        ),
        (
            lambda: edited("module", sum=lambda node: {"executed": node["executed"][:1]}),
            "more than",
        ),
        (lambda: edited("module", add={"executed": []}), "no equation says so"),
        (lambda: edited(product={"roundings": float("inf")}), "inf roundings"),
        (lambda: edited(clip={"roundings": 1.0}), "computed anew"),
        (lambda: edited("module", move={"roundings": 1.0}), "computed anew"),
        (
            lambda: edited(product=lambda node: {"kernel": node["kernel"] / np.float64(3)}),
            "more digits",
        ),
        (lambda: edited(clip={"top": np.array(0.1)}), "more digits"),
        (lambda: edited(clip={"top": np.array(np.inf, np.float32)}), "infinity"),
        (lambda: edited(clip={"dtype": "bfloat16"}), "another type"),
        (lambda: edited(clip={"dtype": "float16"}), "float16"),
    ],
)
def test_what_rounds_more_than_it_says_or_is_not_known_to_round_is_refused(described, said):
    with pytest.raises(CannotCheck, match=said):
        as_read(described())


def test_an_example_of_a_narrower_type_than_the_images_is_refused():
    images = np.full((1, 6), 0.1)
    with pytest.raises(CannotCheck, match="more digits than the example"):
        as_read(_described("function"), images=images)
    with pytest.raises(CannotCheck, match="rounds more than the recorded arithmetic, float64"):
        as_read(_described("function"), "float64")


def _index(change):
    def edit(node):
        index = node["index"].copy()
        return {"index": change(index)}

    return edit


def _set(index, value):
    index.reshape(-1)[0] = value
    return index


@pytest.mark.parametrize(
    ("described", "said"),
    [
        (lambda: edited(clip={"kind": "sine"}), "not known"),
        (lambda: edited(clip={"slope": 0.1}), "slope"),
        (lambda: edited(clip={"inputs": [3]}), r"reads \[3\]"),
        (lambda: edited(clip={"inputs": [-1]}), "reads"),
        (lambda: edited(clip={"inputs": []}), "reads"),
        (lambda: edited(clip={"shape": [4]}), "cannot take"),
        (lambda: edited(clip={"shape": [2**40]}), "shape"),
        (lambda: edited(clip={"top": np.ones(3, np.float32)}), "do not fit"),
        (lambda: edited(clip={"top": 0.5}), "type float"),
        (lambda: edited(maxmin={"top": np.ones(8, np.float32)}), "do not fit"),
        (lambda: edited(product={"numbers": [[[1], [0]], [[], []]]}), "do not fit"),
        (lambda: edited(product={"numbers": [[[0], [1]], [[], []]]}), "cannot take"),
        (lambda: edited(product={"shape": [9]}), "another type|makes the shape|cannot take"),
        (lambda: edited(input={"shape": [5]}), "example|cannot take"),
        (lambda: edited("module", move=_index(lambda i: _set(i, 16))), "leads nowhere"),
        (lambda: edited("module", move=_index(lambda i: _set(i, -2))), "leads nowhere"),
        (lambda: edited("module", move=_index(lambda i: _set(i, -1))), "filling"),
        (lambda: edited("module", move=_index(lambda i: i.astype(np.float64))), "64-bit"),
        (lambda: edited("module", move=_index(lambda i: i[:, :1])), "leads nowhere"),
        (lambda: edited("module", conv={"input_dilation": [2, 1]}), "makes the shape"),
        (lambda: edited("module", conv={"groups": 0}), "groups"),
        (lambda: edited("module", conv={"strides": [0, 1]}), "strides"),
        (lambda: edited("module", conv={"padding": [[2**19, 2**19], [2**19, 2**19]]}), "entries"),
        (lambda: edited("module", add={"signs": [1, 0]}), "signs"),
        (lambda: edited("module", sum={"window": [1, 9, 9, 1]}), "window"),
        (lambda: _described("function")[:-1], "does not end"),
        (lambda: _described("function")[1:], "stands where|reads"),
    ],
)
def test_descriptions_that_do_not_fit_together_are_refused(described, said):
    with pytest.raises(CannotCheck, match=said):
        as_read(described())


# ---------------------------------------------------------------------- what has none


def test_a_function_without_a_plain_description_is_refused_with_a_reason():
    @lipjax.activations.rule()
    class Softer(lipjax.activations.Clip):
        """Another function than what it is derived from."""

    rule = Softer(None, None, rectifies=True)
    with pytest.raises(TypeError, match="no plain description of the activation"):
        rule.described()
    with pytest.raises(TypeError, match="no plain description of the activation Rule"):
        lipjax.activations.Rule().described()
