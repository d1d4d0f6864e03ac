"""Lipschitz constants between any two points of a region: never below what is there."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rational, tiny_net
from two_point_cases import (
    KINDS,
    certificates_of,
    exact_pieces,
    random_net,
    random_points,
    strongest_rates,
)

import lipjax
from lipjax import bounds, rounding
from lipjax.activations import slopes
from lipjax.bounds.two_points import TwoPointWalk

PIECEWISE = ("relu", "clip", "abs", "maxmin", "clipped_maxmin", "groupsort")
MODES = ("local", "linear", "rows")
# What measuring a rate in float64 can add to it: pairs are at least 1e-7 of the region apart.
MEASURED = 1e-7

pytestmark = pytest.mark.core


def regions(seed, count=6):
    """Centers, and radii or half-widths that leave some neurons stable and others not."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(0, 1, (count, 2)).astype(np.float32)
    return centers, np.geomspace(0.01, 0.6, count)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_two_points_of_a_ball_or_box_change_faster_than_is_proved(kind, mode):
    net, _ = random_net(kind, 1)
    centers, radii = regions(2)
    half = radii[:, None] * np.array([1.0, 0.5])
    ball = certificates_of(net, centers, mode, epsilon=radii)
    box = certificates_of(net, centers, mode, box=half)
    both = certificates_of(net, centers, mode, epsilon=radii, box=half)
    # A part of a region is no faster than the whole, but for what norms are inflated by.
    assert np.all(both.lipschitz <= np.minimum(ball.lipschitz, box.lipschitz) * 1.01)
    for i, center in enumerate(centers.astype(np.float64)):
        for found, epsilon, widths in (
            (ball, radii[i], None),
            (box, None, half[i]),
            (both, radii[i], half[i]),
        ):
            together, each = strongest_rates(net, center, epsilon, widths, seed=i)
            assert together <= found.lipschitz[i] * (1 + MEASURED), (i, epsilon, widths)
            assert np.all(each <= found.per_output[i] * (1 + MEASURED)), (i, epsilon, widths)


@pytest.mark.parametrize("kind", PIECEWISE)
def test_every_linear_piece_in_exact_arithmetic_is_within_the_proof(kind):
    net, parameters = random_net(kind, 3, width=4)
    centers, radii = regions(4, count=4)
    rng = np.random.default_rng(5)
    found = {mode: certificates_of(net, centers, mode, epsilon=radii) for mode in MODES}
    reached = 0.0
    for i, center in enumerate(centers.astype(np.float64)):
        for _ in range(4):
            a, b = random_points(rng, center, radii[i], None, 2)
            step = sum(v * v for v in rational(b) - rational(a))
            pieces = exact_pieces(kind, parameters, a, b)
            assert [t for t, _ in pieces] == sorted(t for t, _ in pieces)
            for (t, low), (s, high) in zip(pieces[:-1], pieces[1:], strict=True):
                if s == t:
                    continue
                rates = [(v - u) / (s - t) for u, v in zip(low, high, strict=True)]
                square = sum(r * r for r in rates)
                for certificate in found.values():
                    proved = Fraction(float(certificate.lipschitz[i]))
                    assert square <= proved * proved * step
                    for rate, bound in zip(rates, certificate.per_output[i], strict=True):
                        assert rate * rate <= Fraction(float(bound)) ** 2 * step
                largest = float(found["rows"].lipschitz[i])
                reached = max(reached, float(square / step) ** 0.5 / largest)
    assert reached > 0.5  # so that a bound far above everything would be noticed


@pytest.mark.parametrize("kind", PIECEWISE)
def test_with_one_input_the_proof_lies_above_the_exact_constant_and_not_far(kind):
    net, parameters = random_net(kind, 6, inputs=1, width=4, outputs=2)
    centers = np.linspace(-1.5, 1.5, 7, dtype=np.float32)[:, None]
    radius = 0.05
    found = certificates_of(net, centers, box=radius)
    ratios = []
    for center, bound in zip(centers.astype(np.float64), found.lipschitz, strict=True):
        pieces = exact_pieces(kind, parameters, center - radius, center + radius)
        width = rational(center + radius)[0] - rational(center - radius)[0]
        square = max(
            sum(((v - u) / ((s - t) * width)) ** 2 for u, v in zip(low, high, strict=True))
            for (t, low), (s, high) in zip(pieces[:-1], pieces[1:], strict=True)
            if s > t
        )
        assert square <= Fraction(float(bound)) ** 2
        ratios.append(bound / float(square) ** 0.5)
    assert np.median(ratios) < 1.3, ratios
    assert np.min(ratios) < 1.0011  # where nothing turns: the slope, and a norm's inflation


@pytest.mark.parametrize("kind", ("relu", "maxmin", "squash"))
def test_as_the_region_shrinks_the_constant_becomes_the_norm_of_the_gradient(kind):
    net, _ = random_net(kind, 7)
    centers, _ = regions(8)
    with jax.enable_x64(True):
        jacobians = np.asarray(jax.vmap(jax.jacobian(net))(jnp.asarray(centers, jnp.float64)))
    exact = np.linalg.norm(jacobians, 2, axis=(1, 2))
    for mode in ("linear", "rows"):
        found = certificates_of(net, centers, mode, epsilon=1e-5)
        assert np.all(found.lipschitz >= exact * (1 - 1e-12))
        np.testing.assert_allclose(found.lipschitz, exact, rtol=2e-3)
        np.testing.assert_allclose(found.per_output, np.linalg.norm(jacobians, axis=2), rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_each_mode_is_at_least_as_tight_as_the_one_before(kind):
    net, _ = random_net(kind, 9)
    centers, radii = regions(10)
    local, linear, rows = (certificates_of(net, centers, mode, epsilon=radii) for mode in MODES)
    # Each norm has an inflation of its own.
    assert np.all(linear.lipschitz <= local.lipschitz * 1.002)
    assert np.all(rows.lipschitz <= linear.lipschitz * 1.002)
    assert np.all(linear.per_output <= local.per_output * 1.002)
    assert np.all(rows.per_output <= linear.per_output * 1.002)


@pytest.mark.parametrize("tier", ("probabilistic", "deterministic"))
def test_convolutions_a_residual_and_a_flattened_image_hold_too(tier):
    conv = tiny_net("clipped_relu", seed=2)
    image = np.random.default_rng(0).uniform(size=(6, 6, 2)).astype(np.float32)
    found = {}
    for mode in ("local", "linear"):
        certificate = lipjax.certify_lipschitz(conv, image[None], 0.3, mode=mode, tier=tier)
        found[mode] = certificate

    def flat(x):
        return conv(x.reshape(6, 6, 2))

    center = image.reshape(-1).astype(np.float64)
    together, each = strongest_rates(flat, center, 0.3, None, seed=0)
    for certificate in found.values():
        assert together <= certificate.lipschitz[0] * (1 + MEASURED)
        assert np.all(each <= certificate.per_output[0] * (1 + MEASURED))
    assert found["linear"].lipschitz[0] < 0.9 * found["local"].lipschitz[0]
    assert together > 0.05 * found["linear"].lipschitz[0]


def executed_pairs(net, center, count=4000):
    """Points of float32 a few units of roundoff apart, and what net makes of them in float32."""
    rng = np.random.default_rng(0)
    near = center + rng.integers(-3, 4, (2, count, len(center))).astype(np.float32) * 2**-22
    near = near.astype(np.float32)
    values = [np.asarray(jax.jit(jax.vmap(net))(p)).astype(np.float64) for p in near]
    apart = np.linalg.norm(near[0].astype(np.float64) - near[1].astype(np.float64), axis=1)
    return np.abs(values[0] - values[1]), apart


def test_the_network_as_executed_keeps_within_the_constant_and_twice_its_rounding():
    net, _ = random_net("relu", 11)
    center = np.array([0.3, -0.4], np.float32)
    change, apart = executed_pairs(net, center)
    for output_norm in ("l2", "linf"):
        found = certificates_of(net, center[None], box=1e-5, output_norm=output_norm)
        allowed = found.per_output[0] * apart[:, None]
        assert np.all(change <= allowed + found.rounding_per_output[0])
        # Without what rounding adds it would be false: that is what the number is for.
        assert np.any(change > allowed)
        size = np.linalg.norm(change, axis=1) if output_norm == "l2" else np.max(change, axis=1)
        assert np.all(size <= found.lipschitz[0] * apart + found.rounding[0])
        assert found.rounding[0] < 1e-4


# ------------------------------------------------------------------------------------- the estimate


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("output_norm", ("l2", "linf"))
def test_the_estimate_is_what_the_proof_proves_but_for_norms_and_rounding(mode, output_norm):
    net, _ = random_net("clip", 12)
    centers, radii = regions(13)
    proof = certificates_of(net, centers, mode, epsilon=radii, output_norm=output_norm)
    for x, radius, value in zip(centers, radii, proof.lipschitz, strict=True):
        found = lipjax.local_lipschitz(net, x, radius, mode=mode, output_norm=output_norm)
        # Boxes in float32 and norms from below may turn a slope that is within rounding of fixed.
        np.testing.assert_allclose(found.lipschitz, value, rtol=5e-3)


def test_thousands_of_cells_by_vmap_are_a_loop_over_them():
    net, _ = random_net("relu", 14)
    rng = np.random.default_rng(15)
    centers = rng.normal(size=(2000, 2)).astype(np.float32)
    half = rng.uniform(0, 0.2, (2000, 2)).astype(np.float32)

    def one(x, half):
        return lipjax.local_lipschitz(net, x, box=half, mode="rows")

    together = jax.jit(jax.vmap(one))(centers, half)
    assert together.lipschitz.shape == (2000,) and together.per_output.shape == (2000, 3)
    for i in (0, 700, 1999):
        alone = one(centers[i], half[i])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[i], rtol=1e-4), alone, together)


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_of_the_estimate_is_that_of_finite_differences(mode, x64):
    rng = np.random.default_rng(16)
    weights = [jnp.asarray(rng.normal(0, 0.6, s)) for s in ((4, 2), (4, 4), (3, 4))]
    x = jnp.asarray([0.4, -0.2])

    def constant(weights, x, epsilon):
        def net(x):
            h = jnp.clip(weights[0] @ x, -0.5, 0.6)
            return weights[2] @ jax.nn.relu(weights[1] @ h + 0.1)

        key = jax.random.key(0)
        return lipjax.local_lipschitz(net, x, epsilon, mode=mode, iterations=300, key=key).lipschitz

    constant = jax.jit(constant)
    slope = jax.grad(constant)(weights, x, 0.2)
    for k in range(3):
        step = jnp.asarray(rng.normal(size=weights[k].shape))
        moved = [
            constant([w + s * step * (j == k) for j, w in enumerate(weights)], x, 0.2)
            for s in (1e-6, -1e-6)
        ]
        difference = (moved[0] - moved[1]) / 2e-6
        np.testing.assert_allclose(jnp.sum(slope[k] * step), difference, rtol=1e-4, atol=1e-7)


def test_a_norm_that_always_starts_alike_is_not_differentiated():
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), jnp.float32)

    def constant(weights):
        return lipjax.local_lipschitz(lambda x: weights @ x, jnp.ones(2), 0.1).lipschitz

    with pytest.raises(ValueError, match="without key="):
        jax.grad(constant)(weights)


# ------------------------------------------------------------------------- what is no ordinary case


def test_where_nothing_can_move_nothing_changes():
    net, _ = random_net("relu", 17)
    x = np.array([0.5, -0.5], np.float32)
    for mode in MODES:
        for region in ({"epsilon": 0.0}, {"box": 0.0}):
            found = lipjax.local_lipschitz(net, x, mode=mode, **region)
            assert found.lipschitz == 0 and not np.any(found.per_output)
            proof = certificates_of(net, x[None], mode, **region)
            assert proof.lipschitz[0] < 1e-100


def test_a_coordinate_of_half_width_0_is_held_fixed():
    net, _ = random_net("squash", 18)
    x = np.array([0.5, -0.5], np.float32)

    def first_alone(t):
        return net(jnp.stack([t[0], jnp.asarray(x[1], t.dtype)]))

    both = certificates_of(net, x[None], box=np.array([0.1, 0.0]))
    alone = certificates_of(first_alone, x[None, :1], box=0.1)
    np.testing.assert_allclose(both.lipschitz, alone.lipschitz, rtol=3e-3)
    freed = certificates_of(net, x[None], box=np.array([0.1, 0.1]))
    assert freed.lipschitz[0] > 1.05 * both.lipschitz[0]


def test_of_a_constant_the_constant_is_0_and_of_the_identity_1():
    x = np.ones((1, 3), np.float32)
    zero = np.zeros((2, 3), np.float32)
    for mode in MODES:
        still = certificates_of(lambda x: zero @ x + 1, x, mode, epsilon=0.5)
        assert still.lipschitz[0] < 1e-100
        same = certificates_of(lambda x: x, x, mode, epsilon=0.5)
        assert 1 <= same.lipschitz[0] < 1.01
        assert np.all((same.per_output >= 1) & (same.per_output < 1.0001))


def test_what_overflows_is_infinite_and_a_nan_an_error():
    x = np.ones((1, 2), np.float32)
    large = np.full((2, 2), 1e30, np.float32)

    def overflows(x):
        for _ in range(4):
            x = jax.nn.relu(large @ x)
        return x

    for mode in MODES:
        found = certificates_of(overflows, x, mode, epsilon=0.1)
        assert np.all(np.isinf(found.lipschitz)) and np.all(np.isinf(found.rounding))
    with pytest.raises(ValueError, match="NaN or infinity"):
        certificates_of(lambda x: np.array([[np.nan, 1]], np.float32) @ x, x, epsilon=0.1)
    with pytest.raises(ValueError, match="NaN or infinity"):
        certificates_of(lambda x: x, x * np.nan, epsilon=0.1)
    nan = lipjax.local_lipschitz(lambda x: jax.nn.relu(np.nan * x), x[0], 0.1)
    assert np.isnan(nan.lipschitz)


@pytest.mark.parametrize(
    "arguments, error, said",
    (
        ({}, ValueError, "the region is missing"),
        ({"epsilon": -1.0}, ValueError, "epsilon must be finite and >= 0"),
        ({"box": np.nan}, ValueError, "box must be finite"),
        ({"epsilon": 0.1, "mode": "paper"}, ValueError, "mode must be one of local, linear, rows"),
        ({"epsilon": 0.1, "output_norm": "l1"}, ValueError, "output_norm must be one of l2, linf"),
    ),
)
def test_a_wrong_argument_is_an_error_that_says_what_was_expected(arguments, error, said):
    net, _ = random_net("relu", 19)
    x = np.zeros((1, 2), np.float32)
    with pytest.raises(error, match=said):
        lipjax.local_lipschitz(net, x[0], **arguments)
    with pytest.raises(error, match=said):
        certificates_of(net, x, **arguments)


def test_points_that_are_no_batch_or_outputs_that_are_no_vector_are_errors():
    net, _ = random_net("relu", 19)
    with pytest.raises(ValueError, match=r"give x\[None\]"):
        certificates_of(net, np.zeros(2), epsilon=0.1)
    with pytest.raises(TypeError, match="expected one axis"):
        lipjax.local_lipschitz(lambda x: net(x)[0], np.zeros(2, np.float32), 0.1)
    with pytest.raises(ValueError, match="does not fit"):
        certificates_of(net, np.zeros((3, 2)), box=np.ones((2, 2)))


def test_an_estimate_and_a_proof_are_different_functions_and_say_their_tier():
    net, _ = random_net("relu", 20)
    x = np.zeros((2, 2), np.float32)
    assert "estimate, no proof" in repr(lipjax.local_lipschitz(net, x[0], 0.1))
    with pytest.raises(ValueError, match="no certificate"):
        lipjax.certify_lipschitz(net, x, 0.1, tier="estimate")
    proof = lipjax.certify_lipschitz(net, x, 0.1, failure_probability=1e-5)
    assert "tier probabilistic" in repr(proof) and "1e-05" in repr(proof)
    assert len(repr(proof).splitlines()) == 2
    assert proof.seed_from == "system" and proof.failure_probability == 1e-5
    deterministic = certificates_of(net, x, epsilon=0.1)
    assert "tier deterministic" in repr(deterministic) and deterministic.failure_probability == 0
    assert deterministic.arithmetic == "float32"


# ------------------------------------------------------------------------------- one rule, one walk


@pytest.mark.parametrize("kind", KINDS)
def test_between_any_two_points_of_a_box_an_activation_is_within_its_slopes(kind, x64):
    net, _ = random_net(kind, 21, width=4)
    graph = lipjax.trace(net, jax.ShapeDtypeStruct((2,), jnp.float64))
    (rule, *_) = (node.rule for node in graph.nodes if hasattr(node, "rule"))
    rng = np.random.default_rng(22)
    for _ in range(20):
        center = rng.normal(0, 0.4, 4)
        half = rng.choice([0.0, 0.05, 0.5], 4)
        lower, upper = jnp.asarray(center - half), jnp.asarray(center + half)
        stages = rule.jacobian(lower, upper, rounding.OUTWARD)
        u, v = (jnp.asarray(rng.uniform(lower, upper)) for _ in range(2))
        change = u - v
        reach, moved = jnp.abs(change)[:, None], change
        for stage in stages:
            # With M = N + B E, a row g sees <N^T g, d> and at most <|B^T g|, reach>.
            errors = stage.reach(reach)[..., 0]
            assert jnp.linalg.norm(errors) >= 0
            reach = stage.forward(reach)
        assert np.all(np.abs(rule(u) - rule(v)) <= reach[..., 0] + 1e-12)
        if len(stages) == 1:
            (stage,) = stages
            g = jnp.asarray(rng.normal(size=reach.shape[0]))
            exact = jnp.sum(g * (rule(u) - rule(v)))
            known = jnp.sum(stage.transposed(g) * moved)
            errors = stage.reach(jnp.abs(change)[:, None])[..., 0]
            slack = jnp.sum(jnp.abs(stage.error_weights(g)) * errors)
            assert jnp.abs(exact - known) <= slack + 1e-12
            length = stage.error_gain * jnp.linalg.norm(change)
            weights = jnp.linalg.norm(stage.error_weights(g))
            assert jnp.abs(exact - known) <= weights * length + 1e-12


def test_a_sort_whose_order_is_known_passes_its_entries_on():
    rule = lipjax.activations.Sort(0)
    lower = jnp.asarray([3.0, 1.0, 2.0])
    (stage,) = rule.jacobian(lower, lower + 0.5, rounding.EXACT)
    np.testing.assert_array_equal(stage.width, 0)
    np.testing.assert_array_equal(stage.transposed(jnp.asarray([1.0, 2.0, 3.0])), [3.0, 1.0, 2.0])
    assert isinstance(stage, slopes.SortSlopes)


def test_variations_of_every_node_hold_between_two_points(x64):
    net, _ = random_net("clipped_maxmin", 23)
    center, epsilon = np.array([0.2, 0.4]), 0.3
    graph = lipjax.trace(net, jax.ShapeDtypeStruct((2,), jnp.float64))
    graph = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), graph)

    def norm(k, operator, like, mask_in, mask_out):
        return jnp.linalg.norm(operator.materialized(like).kernel) * (1 + 1e-12)

    walk = TwoPointWalk(graph, bounds.mode_of("rows"), norm, arithmetic=rounding.OUTWARD)
    known = walk(jnp.asarray(center), epsilon, None)["variations"]
    rng = np.random.default_rng(24)
    pairs = zip(*(random_points(rng, center, epsilon, None, 200) for _ in range(2)), strict=True)
    for a, b in pairs:
        apart = np.linalg.norm(a - b)
        for i, v in enumerate(known):
            cut = dataclasses.replace(graph, nodes=graph.nodes[: i + 1])
            first, second = np.asarray(cut(jnp.asarray(a))), np.asarray(cut(jnp.asarray(b)))
            assert np.all((v.lower <= first) & (first <= v.upper)), i
            assert np.all(np.abs(first - second) <= v.rates * apart + 1e-13), i
            assert np.linalg.norm(first - second) <= v.rate * apart + 1e-13, i
            if v.entries is not None:
                assert np.all(np.abs(first - second) <= v.entries @ np.abs(a - b) + 1e-13), i
