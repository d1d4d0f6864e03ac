"""The error model against exact rational arithmetic: boxes, radii, worst-case gains and the network
as executed."""

import dataclasses
import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    ACTIVATIONS,
    cast64,
    exact_layers,
    make_activation,
    outward_bound,
    proven_norms,
    rational,
)
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lipjax
from lipjax import activations, bounds, rounding
from lipjax.bounds import Region, ascent
from lipjax.graph import trace
from lipjax.graph.linear import Convolution


def dense_net(activation, sizes=(6, 8, 8, 3), seed=0, spread=1.0) -> nnx.Sequential:
    """A dense net; `spread` > 1 makes weights of very different size and sign, whose products
    cancel."""
    rng, layers = np.random.default_rng(seed), []
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        layer = nnx.Linear(n, m, rngs=nnx.Rngs(0))
        size = spread ** rng.uniform(-1, 1, (n, m))
        weights = rng.normal(size=(n, m)) * size / np.sqrt(n)
        if spread > 1:  # each second row nearly cancels the one before
            weights[1::2] = -weights[0 : 2 * (n // 2) : 2] * (
                1 + 1e-6 * rng.normal(size=weights[1::2].shape)
            )
        layer.kernel[...] = jnp.asarray(weights, jnp.float32)
        layer.bias[...] = jnp.asarray(rng.normal(size=m) * 0.1, jnp.float32)
        layers.append(layer)
        if i < len(sizes) - 2:
            layers.append(make_activation(activation, m, threshold=0.5))
    return nnx.Sequential(*layers)


def traced64(net, size):
    """The graph of a net as it is executed in float32, its arrays in float64."""
    return cast64(trace(net, jax.ShapeDtypeStruct((size,), jnp.float32)))


def points(x, epsilon, count, seed):
    """float32 points of the ball, near its surface, checked exactly."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        step = rng.normal(size=x.shape)
        point = (x + step * 0.999999 * epsilon / np.linalg.norm(step)).astype(np.float32)
        if sum((rational(point) - rational(x)) ** 2) <= Fraction(float(epsilon)) ** 2:
            found.append(point)
    return found


# without those that walk as "local" does
@pytest.mark.parametrize("mode", [mode for mode in bounds.MODES if mode not in ("linear", "tight")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_exact_activations_lie_in_boxes_and_balls_rounded_outwards(x64, activation, mode, spread):
    net, rng = dense_net(activation, spread=spread), np.random.default_rng(1)
    graph = traced64(net, 6)
    for epsilon in (1e-9, 0.05):
        x = rng.uniform(0, 1, 6).astype(np.float32)
        bound = outward_bound(graph, x, epsilon, mode)
        for point in [x, *points(x, epsilon, 6, seed=2)]:
            for h, region in zip(
                exact_layers(net, rational(point)), bound.regions[1:], strict=True
            ):
                assert np.all(rational(region.lower) <= h) and np.all(h <= rational(region.upper))
                away = sum((h - rational(region.center)) ** 2)
                assert away <= Fraction(float(region.radius)) ** 2


def test_without_outward_rounding_the_boxes_do_fail(x64):
    """Else the test above would say nothing: a net of pure cancellation, at radius 0."""
    net = cast64(dense_net("relu", spread=1e6, seed=3))
    graph = trace(net, jax.ShapeDtypeStruct((6,), jnp.float64))
    failed = 0
    for seed in range(20):
        x = np.random.default_rng(seed).uniform(0, 1, 6).astype(np.float32)
        for arithmetic in (rounding.EXACT, rounding.OUTWARD):
            bound = outward_bound(graph, x, 0.0, "local", arithmetic)
            h, region = exact_layers(net, rational(x))[0], bound.regions[1]
            inside = np.all(rational(region.lower) <= h) and np.all(h <= rational(region.upper))
            if arithmetic is rounding.OUTWARD:
                assert inside
            else:
                failed += not inside
    assert failed > 0


def tf32(x):
    """float32 with the ten bits of mantissa that TF32 keeps, cut off as some hardware does."""
    bits = np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
    return bits.view(np.float32)


def executed_logits(net, x, arithmetic):
    """The logits as a machine of that arithmetic computes them, in float64 for the comparison."""
    if arithmetic == "tf32":
        h = np.asarray(x, np.float32)
        for layer in net.layers:
            if type(layer) is nnx.Linear:
                products = tf32(layer.kernel[...]).T * tf32(h)
                total = np.zeros(products.shape[0], np.float32)
                for column in products.T:  # one after the other: the worst order
                    total = (total + column).astype(np.float32)
                h = total + np.asarray(layer.bias[...])
            else:
                h = np.asarray(layer(jnp.asarray(h)))
        return h.astype(np.float64)
    if arithmetic == "bfloat16":
        graph, state = nnx.split(net)
        net = nnx.merge(graph, state)
        for layer in net.layers:
            if type(layer) is nnx.Linear:
                layer.dtype = jnp.bfloat16
    return np.asarray(net(jnp.asarray(x, jnp.float32)), np.float64)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("arithmetic", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_executed_logits_are_within_the_forward_error_of_the_exact_ones(
    activation, arithmetic, spread
):
    net, epsilon = dense_net(activation, sizes=(24, 32, 16, 3), spread=spread, seed=4), 0.02
    x = np.random.default_rng(5).uniform(0, 1, 24).astype(np.float32)
    with jax.enable_x64(True):
        graph = traced64(net, 24)
        bound = outward_bound(graph, x, epsilon, "local")
        boxes = [(r.lower, r.upper) for r in bound.regions]
        arithmetics = rounding.arithmetics_of(graph, arithmetic)
        error = np.asarray(rounding.forward_error(graph, boxes, arithmetics, proven_norms(graph)))
    worst = 0.0
    for point in [x, *points(x, epsilon, 5, seed=6)]:
        exact = exact_layers(net, rational(point))[-1]
        off = np.array(
            [float(abs(e)) for e in rational(executed_logits(net, point, arithmetic)) - exact]
        )
        assert np.all(off <= error)
        worst = max(worst, float(np.max(off / error)))
    # With weights in all sizes, clipping can hide nearly every error.
    assert worst > 1e-4 or spread > 1, (
        "a bound that is never within four digits of the truth would be of no use"
    )


def cancelling_net() -> nnx.Sequential:
    """Logits of 0.01 and 0 for every input, in exact arithmetic: the products of the first row
    cancel. In float32 1e7 + 0.01 - 1e7 leaves 0, 1 or nothing like 0.01."""
    net = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    net.layers[0].kernel[...] = jnp.array([[1e7, 0.0], [0.01, 0.0], [-1e7, 0.0]], jnp.float32)
    return net


def test_a_margin_that_float32_loses_is_certified_for_float64_only():
    net, x = cancelling_net(), np.array([[1.0, 1.0, 1.0]], np.float32)
    ideal = lipjax.certify(net, x, np.array([0]), 0.0, arithmetic="float64", tier="deterministic")
    real = lipjax.certify(net, x, np.array([0]), 0.0, arithmetic="float32", tier="deterministic")
    assert ideal.certified[0] and not real.certified[0]
    assert real.allowance[0] > 0.009 > 1e-3 > ideal.allowance[0]
    orders = [np.float32(sum_) for sum_ in _float32_sums([1e7, 0.01, -1e7])]
    assert 0.0 in orders  # in one order at least, the margin is gone: refusing is right


def _float32_sums(terms):
    for order in itertools.permutations(np.array(terms, np.float32)):
        total = np.float32(0)
        for term in order:
            total = np.float32(total + term)
        yield total


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 40),
    radius=st.floats(1e-6, 10),
    tilt=st.floats(-6, 6),
)
def test_the_rounded_gain_is_at_least_that_of_any_point_in_exact_arithmetic(seed, n, radius, tilt):
    rng = np.random.default_rng(seed)
    d = rng.normal(size=n) * 10 ** (tilt * rng.uniform(-1, 1, n))
    low, high = (
        -np.abs(rng.normal(size=n)),
        np.abs(rng.normal(size=n)) * 10 ** rng.uniform(-3, 1, n),
    )
    with jax.enable_x64(True):
        region = Region(jnp.zeros(n), jnp.asarray(radius), jnp.asarray(low), jnp.asarray(high))
        found = Fraction(float(ascent(jnp.asarray(d), region, rounding.OUTWARD)))
    scale = 1.0
    # points that are nearly optimal: scaled to the ball, then checked to be in it exactly
    for _ in range(60):
        t = np.clip(d * scale, low, high)
        size = np.linalg.norm(t)
        if size <= radius * (1 - 1e-12):
            assert sum(rational(t) ** 2) <= Fraction(radius) ** 2
            assert sum(rational(d) * rational(t)) <= found
        scale *= 0.7 if size > radius else 1.3


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 300), spread=st.floats(0, 8))
def test_up_covers_the_rounding_of_a_sum_of_products(seed, n, spread):
    rng = np.random.default_rng(seed)
    a, b = (np.abs(rng.normal(size=n)) * 10 ** rng.uniform(-spread, spread, n) for _ in range(2))
    with jax.enable_x64(True):
        found = float(rounding.OUTWARD.up(jnp.sum(jnp.asarray(a) * jnp.asarray(b)), n))
        nothing = float(rounding.OUTWARD.up(jnp.zeros(())))
    truth = sum(rational(a) * rational(b))
    assert truth <= Fraction(found) <= truth * (1 + Fraction(1, 10**9)) + Fraction(1, 10**100)
    assert 0 < nothing <= rounding.FLOOR  # a 0 may be what underflow has left of a product


def test_a_length_whose_squares_underflow_is_not_zero(x64):
    for size in (1e-200, 1e-160, 1e-100, 1.0):
        assert rounding.OUTWARD.length(jnp.full(100, size)) >= 10 * size
    assert rounding.OUTWARD.length(jnp.zeros(3)) == 0


def test_terms_are_the_entries_of_the_fullest_row_and_column():
    def counts(layer, shape):
        graph = trace(layer, jax.ShapeDtypeStruct(shape, jnp.float32), batched=False)
        (node,) = (graph.nodes[i] for i in graph.linear)
        like = jax.ShapeDtypeStruct(graph.nodes[node.inputs[0]].shape, jnp.float32)
        return rounding.terms_of(node.operator, like), rounding.transposed_terms_of(
            node.operator, like
        )

    rngs = nnx.Rngs(0)
    assert counts(nnx.Linear(7, 3, rngs=rngs), (7,)) == (7, 3)
    assert counts(nnx.Conv(2, 5, (3, 3), padding=1, rngs=rngs), (6, 6, 2)) == (18, 45)
    assert counts(nnx.Conv(2, 6, (4, 4), strides=2, padding=1, rngs=rngs), (8, 8, 2)) == (32, 24)
    assert counts(
        nnx.Conv(4, 4, (3, 3), padding=0, feature_group_count=2, rngs=rngs), (5, 5, 4)
    ) == (18, 18)
    assert counts(lipjax.AveragePool(2), (4, 4, 3)) == (4, 1)


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", ((0, 2), (3, 1))])
@pytest.mark.parametrize("strides, step", [((1, 1), (1, 1)), ((2, 1), (1, 1)), ((3, 2), (1, 2))])
def test_terms_of_a_convolution_are_those_of_its_matrix(padding, strides, step):
    apart = (1, 1) if isinstance(padding, str) else (1, 2)
    apply = Convolution(strides, padding, apart, step, 2)
    for shape, window in (((5, 6), (3, 2)), ((3, 4), (3, 2))):
        kernel = jnp.ones((*window, 3, 4))
        x = jnp.zeros((*shape, 6))
        matrix = np.asarray(jax.jacobian(lambda x, k=kernel: apply(k, x))(x)).reshape(-1, x.size)
        assert apply.terms(kernel.shape, x.shape, False) == np.max(np.sum(matrix, axis=1))
        assert apply.terms(kernel.shape, x.shape, True) == np.max(np.sum(matrix, axis=0))


def test_gamma_is_the_worst_growth_of_rounding_errors():
    unit = Fraction(1, 2**53)
    for n in (1, 10, 1000):
        assert (1 + unit) ** n - 1 <= Fraction(rounding.gamma(n))
    assert rounding.gamma(2**24, 2.0**-24) == math.inf


def arithmetics(layer, declared=None, dtype=jnp.float32):
    """Of the equations of one layer of two inputs."""
    graph = trace(layer, jax.ShapeDtypeStruct((2,), dtype))
    return [a for each in rounding.arithmetics_of(graph, declared) for a in each]


def test_arithmetic_is_read_from_equations_and_device_and_unknown_ones_are_errors():
    def dense(**arguments):
        return nnx.Linear(2, 2, rngs=nnx.Rngs(0), **arguments)

    assert {a.name for a in arithmetics(dense())} == {"float32"}
    assert {a.name for a in arithmetics(dense(dtype=jnp.bfloat16))} == {"bfloat16"}
    # Parameters of bfloat16 meet an input of float32 in float32.
    assert {a.name for a in arithmetics(dense(param_dtype=jnp.bfloat16))} == {"float32"}
    with pytest.raises(TypeError, match="float16"):
        arithmetics(dense(dtype=jnp.float16))
    with pytest.raises(ValueError, match=r"computes in bfloat16.*declared float32"):
        arithmetics(dense(dtype=jnp.bfloat16), "float32")
    with pytest.raises(ValueError, match="'float8'"):
        arithmetics(dense(), "float8")
    graph = trace(dense(dtype=jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.float32))
    assert rounding.least_precise(rounding.arithmetics_of(graph)) == "bfloat16"


def test_float64_parameters_compute_in_float64_and_are_not_rounded_to_less(x64):
    layer = cast64(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    assert {a.name for a in arithmetics(layer, dtype=jnp.float64)} == {"float64"}
    with pytest.raises(ValueError, match=r"float64.*float32.*rounded"):
        arithmetics(layer, "float32", jnp.float64)


@pytest.mark.parametrize("platform, precision, expected", [
    ("gpu", None, "tf32"),
    ("gpu", "highest", "float32"),
    ("tpu", "highest", "bfloat16_products"),
    ("cpu", None, "float32"),
    # A TPU is taken at its word only where it rounds no less than it says.
    ("gpu", jax.lax.DotAlgorithmPreset.F32_F32_F32, "float32"),
    ("tpu", jax.lax.DotAlgorithmPreset.F32_F32_F32, "bfloat16_products"),
    ("tpu", jax.lax.DotAlgorithmPreset.TF32_TF32_F32, "bfloat16_products"),
])  # fmt: skip
def test_accelerators_round_their_products_unless_told_otherwise(
    monkeypatch, platform, precision, expected
):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0), precision=precision)
    assert arithmetics(layer)[0].name == expected


def test_sums_are_kept_in_their_own_type():
    """A pool in bfloat16 adds up in bfloat16, where a product would be summed in float32."""
    (pooled,) = arithmetics(lambda x: jax.lax.reduce_sum(x, (0,)), dtype=jnp.bfloat16)[:1]
    assert pooled.accumulate == 2.0**-8


def test_a_sum_that_may_overflow_has_an_infinite_error(x64):
    graph = trace(lambda x: x + x[::-1], jax.ShapeDtypeStruct((2,), jnp.float32))
    arithmetics = rounding.arithmetics_of(graph)
    for size, fits in ((1.4e38, True), (2e38, False)):
        value = jnp.full(2, size)
        boxes = [(value, value)] * (len(graph.nodes) - 1) + [(2 * value, 2 * value)]
        error = rounding.forward_error(graph, boxes, arithmetics, [])
        assert np.all(np.isfinite(error)) == fits


def test_overflow_of_the_executed_network_is_an_infinite_error(x64):
    net = dense_net("relu")
    net.layers[0].kernel[...] = net.layers[0].kernel[...] * 1e38
    net.layers[2].kernel[...] = net.layers[2].kernel[...] * 1e2
    graph = traced64(net, 6)
    bound = outward_bound(graph, np.full(6, 0.5), 0.1, "local")
    boxes = [(r.lower, r.upper) for r in bound.regions]
    error = rounding.forward_error(graph, boxes, rounding.arithmetics_of(graph), [jnp.inf] * 3)
    assert np.all(np.isinf(error))


def test_an_activation_without_a_rounding_rule_cannot_be_certified():
    @jax.jit
    def halved(z):
        return z / 2 * jnp.tanh(1e9 * z)

    @activations.rule()
    class Halved(activations.Rule):
        def __call__(self, z):
            return halved(z)

    activations.register(halved, Halved)
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), halved, nnx.Linear(2, 2, rngs=rngs))
    lipjax.bound(net, jnp.ones(2), 0.1)
    with pytest.raises(TypeError, match=r"rounding rule for Halved"):
        lipjax.certify(net, np.ones((1, 2), np.float32), None, 0.1)


def test_the_model_is_data():
    for arithmetic in rounding.ARITHMETICS.values():
        few, many = (rounding.executed.shares([arithmetic], terms) for terms in (1, 1000))
        assert few[0] < many[0] and few[1] < many[1]
        with pytest.raises(dataclasses.FrozenInstanceError):
            arithmetic.name = "other"


def allowed_for_a_sum(terms: list[Fraction]) -> Fraction:
    """What the error model allows for a sum of terms that are added up in float32."""
    of_sizes, of_sums = rounding.executed.shares([rounding.ARITHMETICS["float32"]], len(terms))
    sizes, total = sum(abs(t) for t in terms), abs(sum(terms))
    sums = rounding.executed.partial_sum(jnp.float64(sizes), jnp.float64(total))
    return Fraction(of_sizes) * sizes + Fraction(of_sums) * Fraction(float(sums))


def test_no_order_of_a_sum_errs_by_more_than_allowed_and_one_nearly_does():
    """Each addition rounds up by nearly half a unit of the partial sum, which is the largest that
    these terms have; then they cancel."""
    many = 4000
    terms = [1.0, *[2.0**-24 * (1 + 2.0**-10)] * many, -1.0]
    exact = [Fraction(float(np.float32(t))) for t in terms]
    with jax.enable_x64(True):
        allowed = allowed_for_a_sum(exact)
    found = np.float32(0)
    for term in terms:
        found = np.float32(found + np.float32(term))
    off = abs(Fraction(float(found)) - sum(exact))
    assert 0.97 * allowed < off <= allowed


@pytest.mark.parametrize("seed", range(8))
def test_sums_in_random_and_sorted_orders_err_by_less_than_allowed(seed):
    rng = np.random.default_rng(seed)
    terms = (rng.normal(size=300) * 10.0 ** rng.uniform(-3, 3, 300)).astype(np.float32)
    with jax.enable_x64(True):
        allowed = allowed_for_a_sum([Fraction(float(t)) for t in terms])
    exact = sum(Fraction(float(t)) for t in terms)
    orders = [rng.permutation(terms), np.sort(terms), np.sort(terms)[::-1]]
    orders.append(terms[np.argsort(-np.abs(terms))])
    for ordered in orders:
        # One after the other, and in pairs.
        assert abs(Fraction(float(np.add.accumulate(ordered)[-1])) - exact) <= allowed
        while len(ordered) > 1:
            rest = ordered[len(ordered) // 2 * 2 :]
            ordered = np.concatenate([ordered[0:-1:2][: len(ordered) // 2] + ordered[1::2], rest])
        assert abs(Fraction(float(ordered[0])) - exact) <= allowed


@pytest.mark.parametrize("roundings", [1, 10, 100])
def test_parameters_that_are_computed_twice_may_be_off_to_both_sides(roundings):
    """The certified kernel and that of the program as it runs each err by so many units from what
    they stand for; the product of one term is rounded once."""
    unit = Fraction(2) ** -24
    certified, executed = (1 - unit) ** roundings, (1 + unit) ** roundings
    away = executed * (1 + unit) / certified - 1
    arithmetic = rounding.ARITHMETICS["float32"]
    assert Fraction(rounding.executed.shares([arithmetic], 1, float(roundings))[0]) >= away
