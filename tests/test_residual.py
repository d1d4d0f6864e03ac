"""Residual blocks through every bound: against sampling, the gradient, exact arithmetic, and as the
network is executed."""

import dataclasses
import functools
import operator
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    cast64,
    exact_layers,
    make_activation,
    outward_bound,
    proven_norms,
    rational,
)
from flax import nnx

import lipjax
from lipjax import bounds, rounding
from lipjax.bounds import walk
from lipjax.certificates import setup
from lipjax.certificates.randomness import split_failure_probability
from lipjax.check import checker
from lipjax.check import walk as check_walk
from lipjax.formats import certificate_files
from lipjax.graph import Add, trace
from lipjax.graph.linear import LinearOperator

EPSILON = 0.2


def residual_net(kind="clipped_relu", seed=0):
    """6 inputs, a block behind an activation and one inside the other, 3 classes."""
    rngs, bias = nnx.Rngs(seed), jax.nn.initializers.normal(0.3)

    def dense(n, m):
        return nnx.Linear(n, m, rngs=rngs, bias_init=bias)

    return nnx.Sequential(
        dense(6, 8),
        make_activation(kind, 8, 0.8),
        lipjax.Residual(
            dense(8, 8),
            make_activation(kind, 8, 0.8),
            lipjax.Residual(make_activation(kind, 8, 0.8), dense(8, 8)),
        ),
        make_activation(kind, 8, 0.8),
        dense(8, 3),
    )


def image(seed=0):
    return np.random.default_rng(seed).uniform(0, 1, 6)


@functools.partial(jax.jit, static_argnames="mode")
def found(net, x, epsilon, mode):
    bound = lipjax.bound(net, x, epsilon, mode=mode, iterations=300)
    return bound, lipjax.worst_logits(bound, 1)


def test_the_bounds_walk_the_same_function_that_the_network_computes():
    net, x = residual_net(), jnp.asarray(image(), jnp.float32)
    graph = trace(net, x)
    np.testing.assert_allclose(graph(x), net(x), rtol=1e-6)
    assert [len(node.inputs) for node in graph.nodes if isinstance(node, Add)] == [2, 2]


@pytest.mark.parametrize(
    "kind, mode", [("clipped_relu", mode) for mode in bounds.MODES] + [("clipped_maxmin", "rows")]
)
def test_regions_margins_and_lipschitz_constants_hold_on_samples(x64, kind, mode):
    net, rng = cast64(residual_net(kind)), np.random.default_rng(1)
    x = jnp.asarray(image())
    bound, worst = found(net, x, EPSILON, mode)
    steps = rng.normal(size=(600, 6))
    steps[:3] = np.asarray(jax.jacobian(net)(x))
    h = x + jnp.asarray(EPSILON * steps / np.linalg.norm(steps, axis=1, keepdims=True))
    graph = bound.graph
    for k, region in enumerate(bound.regions, 1):
        points = jax.vmap(dataclasses.replace(graph, nodes=graph.nodes[:k]))(h)
        assert np.all(points >= region.lower - 1e-12) and np.all(points <= region.upper + 1e-12)
        assert np.all(np.linalg.norm(points - region.center, axis=1) <= region.radius * (1 + 1e-9))
    inner = dataclasses.replace(graph, nodes=graph.nodes[:-1])
    moved = np.linalg.norm(jax.vmap(inner)(h) - bound.penultimate.center, axis=1)
    assert np.max(moved) <= bound.lipschitz * EPSILON * (1 + 1e-9)
    logits = jax.vmap(net)(h)
    lead = np.asarray(logits - logits[:, 1:2])
    assert np.all(np.max(lead, axis=0) <= worst - worst[1] + 1e-9)


def test_the_constant_of_a_block_is_one_plus_that_of_its_layers(x64):
    rngs = nnx.Rngs(0)
    inner, outer, last = (nnx.Linear(4, n, rngs=rngs) for n in (4, 4, 2))
    net = cast64(nnx.Sequential(outer, lipjax.Residual(inner), last))
    bound, _ = found(net, jnp.full(4, 0.5), 0.1, "global")
    norms = [
        np.linalg.norm(np.asarray(layer.kernel[...], np.float64), 2) for layer in (outer, inner)
    ]
    np.testing.assert_allclose(bound.norms, norms, rtol=1e-6)
    np.testing.assert_allclose(bound.lipschitz, norms[0] * (1 + norms[1]), rtol=1e-6)
    np.testing.assert_allclose(bound.penultimate.radius, 0.1 * norms[0] * (1 + norms[1]), rtol=1e-6)


@pytest.mark.parametrize("mode", ["linear", "rows"])
def test_on_a_small_ball_rows_go_through_both_ways_at_once(x64, mode):
    net, x = cast64(residual_net(seed=3)), jnp.asarray(image(3))
    bound, worst = found(net, x, 1e-6, mode)
    gradient = jax.jacobian(lambda x: net(x) - net(x)[1])(x)
    np.testing.assert_allclose(
        (worst - bound.logits) / 1e-6, np.linalg.norm(gradient, axis=1), rtol=1e-3, atol=1e-6
    )


def test_exact_and_executed_logits_lie_within_what_rounding_is_said_to_do(x64):
    net = residual_net(seed=5)
    for cast in (jnp.float32, jnp.bfloat16):
        executed = jax.tree.map(lambda leaf, cast=cast: jnp.asarray(leaf, cast), net)
        held = cast64(executed)
        traced = trace(executed, jax.ShapeDtypeStruct((6,), cast))
        arithmetics = rounding.arithmetics_of(traced)
        graph = cast64(traced)
        norms = proven_norms(graph)
        for seed in range(4):
            x = image(seed).astype(cast)
            bound = outward_bound(graph, x, 0.0, "local")
            boxes = [(r.lower, r.upper) for r in bound.regions]
            error = rounding.forward_error(graph, boxes, arithmetics, norms)
            truth = exact_layers(held, rational(x))[-1]
            last = bound.regions[-1]
            assert all(map(operator.le, map(float, last.lower), truth))
            assert all(map(operator.le, truth, map(float, last.upper)))
            away = np.abs(
                np.asarray(executed(jnp.asarray(x)), np.float64) - truth.astype(np.float64)
            )
            assert np.all(away <= np.asarray(error)) and np.any(away > 1e-4 * np.asarray(error))


def test_a_network_of_blocks_is_certified_and_not_broken():
    net = residual_net("maxmin", seed=2)
    x = np.random.default_rng(2).uniform(0, 1, (12, 6)).astype(np.float32)
    found = lipjax.certify(net, x, None, EPSILON / 4, mode="linear", arithmetic="tf32")
    assert found.arithmetic == "tf32" and np.all(found.allowance > 1e-4)
    assert np.sum(found.certified) >= 4
    rows = found.certified
    attack = lipjax.attacks.pgd(
        net, x[rows], found.predicted[rows], EPSILON / 4, restarts=10, clip=None
    )
    assert not attack.broken.any()
    assert lipjax.attacks.pgd(
        net, x[rows], found.predicted[rows], 8 * EPSILON, clip=None
    ).broken.any()


def shortcut(scale=1.0, seed=0, turned=False):
    """Two linear maps meet: of an activation, and of what was in front of it; the first turned
    around."""
    rng = np.random.default_rng(seed)
    first, inner, last = (jnp.asarray(rng.normal(size=(8, 8)) / 3, jnp.float32) for _ in range(3))
    beside = jnp.asarray(scale * rng.normal(size=(8, 8)) / 3, jnp.float32)
    head = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)

    def network(x):
        h = jax.nn.relu(first.astype(x.dtype) @ x)
        inside = last.astype(x.dtype) @ jax.nn.relu(inner.astype(x.dtype) @ h)
        inside = jnp.flip(inside) if turned else inside
        return head.astype(x.dtype) @ jax.nn.relu(inside - beside.astype(x.dtype) @ h)

    return network


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
def test_the_radius_where_two_maps_meet_is_that_of_their_matrices_side_by_side(x64, scale, turned):
    network = shortcut(scale, turned=turned)
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, 8))
    epsilon = 0.05
    graph = cast64(trace(network, x.astype(jnp.float32)))
    bound = outward_bound(graph, x, epsilon, "local")
    (place,) = (i for i, node in enumerate(graph.nodes) if isinstance(node, Add))
    maps = [i for i in graph.linear if i < place][-2:]
    inputs = [bound.regions[graph.nodes[j].inputs[0]] for j in maps]
    matrices = [
        np.asarray(graph.nodes[j].operator.materialized(x).kernel) * np.asarray(region.varies)
        for j, region in zip(maps, inputs, strict=True)
    ]
    matrices[0] = matrices[0][::-1] if turned else matrices[0]
    radii = [float(region.radius) for region in inputs]
    norms = [np.linalg.norm(m, 2) for m in matrices]
    t = np.sqrt(norms[0] * radii[1] / (norms[1] * radii[0]))
    length = np.hypot(radii[0], radii[1] / t)
    side_by_side = np.linalg.norm(np.hstack([matrices[0], t * matrices[1]]), 2) * length
    added = norms[0] * radii[0] + norms[1] * radii[1]
    radius = float(bound.regions[place].radius)
    assert radius <= side_by_side * (1 + 1e-6)
    assert side_by_side <= added * (1 + 1e-9)
    assert scale != 1 or side_by_side < 0.9 * added

    steps = np.random.default_rng(1).normal(size=(4000, 8))
    gradient = jax.jacobian(dataclasses.replace(graph, nodes=graph.nodes[: place + 1]))(x)
    steps[0] = np.linalg.svd(gradient)[2][0]
    steps *= epsilon / np.linalg.norm(steps, axis=1, keepdims=True)
    points = jax.vmap(dataclasses.replace(graph, nodes=graph.nodes[: place + 1]))(x + steps)
    moved = np.linalg.norm(points - bound.regions[place].center, axis=1)
    assert np.max(moved) <= radius


def in_a_row(seed=0):
    """A linear map of another one's value, turned around, with nothing bent between them."""
    rng = np.random.default_rng(seed)
    first, inner, last = (jnp.asarray(rng.normal(size=(8, 8)) / 3, jnp.float32) for _ in range(3))
    head = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)

    def network(x):
        h = jax.nn.relu(first.astype(x.dtype) @ x)
        inside = jnp.flip(inner.astype(x.dtype) @ h)
        return head.astype(x.dtype) @ jax.nn.relu(last.astype(x.dtype) @ inside)

    return network


@pytest.mark.parametrize("mode", ["local", "tight"])
def test_the_radius_behind_two_maps_in_a_row_is_that_of_their_product(x64, mode):
    network = in_a_row()
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, 8))
    epsilon = 0.05
    graph = cast64(trace(network, x.astype(jnp.float32)))
    bound = outward_bound(graph, x, epsilon, mode)
    inner, last = graph.linear[1:3]
    region = bound.regions[graph.nodes[inner].inputs[0]]
    first, second = (
        np.asarray(graph.nodes[i].operator.materialized(x).kernel) for i in (inner, last)
    )
    active = np.asarray(bound.regions[last].upper) > 0
    product = (second @ first[::-1])[active][:, np.asarray(region.varies)]
    expected = np.linalg.norm(product, 2) * float(region.radius)
    radius = float(bound.radii[2])
    np.testing.assert_allclose(radius, expected, rtol=1e-6)
    assert expected < 0.85 * float(bound.norms[2]) * float(bound.regions[inner].radius)

    steps = np.random.default_rng(1).normal(size=(4000, 8))
    gradient = jax.jacobian(dataclasses.replace(graph, nodes=graph.nodes[: last + 1]))(x)
    steps[0] = np.linalg.svd(gradient)[2][0]
    steps *= epsilon / np.linalg.norm(steps, axis=1, keepdims=True)
    points = jax.vmap(dataclasses.replace(graph, nodes=graph.nodes[: last + 1]))(x + steps)
    moved = np.linalg.norm((points - bound.regions[last].center)[:, active], axis=1)
    assert np.max(moved) <= radius


def test_a_product_of_maps_pays_for_the_rounding_of_its_entries(x64):
    rng = np.random.default_rng(0)
    columns, rows = rng.normal(size=(2, 40))
    first = LinearOperator.from_matrix(jnp.asarray(columns[:, None]), (1,), (40,))
    second = LinearOperator.from_matrix(jnp.asarray(rows[None]), (40,), (1,))
    composed, off = walk.product(first, second, jnp.zeros(1), rounding.OUTWARD)
    exact = sum(a * b for a, b in zip(map(Fraction, columns), map(Fraction, rows), strict=True))
    error = abs(exact - Fraction(float(composed.kernel[0, 0])))
    assert 0 < error <= Fraction(float(off)) < Fraction(1, 2**40)


@pytest.mark.parametrize("made", [shortcut, in_a_row])
@pytest.mark.parametrize("tier", ["probabilistic", "deterministic"])
def test_certificates_where_two_maps_meet_are_confirmed_and_rest_on_their_common_norm(
    made, tier, tmp_path, monkeypatch
):
    network = made(turned=tier == "probabilistic") if made is shortcut else made()
    x = np.random.default_rng(0).uniform(0, 1, (6, 8)).astype(np.float32)
    labels = np.argmax(jax.vmap(network)(x), axis=1)
    found = lipjax.certify(network, x, labels, 0.04, tier=tier, seed=0)
    certificate_files.save(tmp_path / "x.npz", found, network, x, labels)
    file = certificate_files.load(tmp_path / "x.npz")
    described = certificate_files.describe(network, x[0])

    def checked():
        return checker.check(described, x, labels, *file, np.random.default_rng(0))

    report = checked()
    assert report.confirmed and report.certified == np.sum(found.certified) >= 1, report
    monkeypatch.setattr(check_walk, "_side_by_side", lambda *arguments: None)
    monkeypatch.setattr(check_walk, "_chained", lambda *arguments: np.inf)
    assert any("recorded margin" in problem for problem in checked().problems)


def test_norms_of_two_maps_as_one_take_their_share_of_the_failure_probability():
    x = np.full((2, 8), 0.5, np.float32)
    for network, norms in ((shortcut(), 5), (in_a_row(), 4)):
        found = set_up_of(network, x).options["failure_probability"]
        assert found == split_failure_probability(1e-6, 2, norms)


def set_up_of(network, x):
    return setup.set_up(
        network,
        x,
        None,
        tier="probabilistic",
        failure_probability=1e-6,
        mode="local",
        arithmetic=None,
        budget=1e9,
        seed=0,
        batch_size=2,
        examine=None,
    )


def test_blocks_that_change_the_shape_are_refused_and_may_end_a_network():
    rngs = nnx.Rngs(0)
    wrong = nnx.Sequential(
        lipjax.Residual(nnx.Linear(3, 2, rngs=rngs)), nnx.Linear(2, 2, rngs=rngs)
    )
    for call in (lambda: wrong(jnp.ones(3)), lambda: lipjax.bound(wrong, jnp.ones(3), 0.1)):
        with pytest.raises(ValueError, match=r"keep the shape: \(3,\) became \(2,\)"):
            call()
    ends = nnx.Sequential(lipjax.Residual(nnx.Linear(3, 3, rngs=rngs)))
    assert lipjax.bound(ends, jnp.ones(3), 0.1).logits.shape == (3,)
