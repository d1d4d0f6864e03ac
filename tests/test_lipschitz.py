"""Lipschitz constants between any two points of a region: never below what is there."""

import dataclasses
import itertools
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
    regions,
    strongest_rates,
    walked,
)

import lipjax
from lipjax import bounds, rounding
from lipjax.activations import slopes
from lipjax.bounds.two_points import TwoPointWalk

PIECEWISE = ("relu", "clip", "abs", "maxmin", "clipped_maxmin", "groupsort")
MODES = ("local", "linear", "rows")
# What measuring a rate in float64 can add to it: pairs are at least 1e-7 of the region apart.
MEASURED = 1e-7


def bounds_of(net, seed, mode):
    """The bounds on the regions of a seed."""
    return walked(net, *regions(seed), mode)


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_no_two_points_of_a_ball_or_box_change_faster_than_the_bound(kind):
    net, _ = random_net(kind, 1)
    together, each = strongest_rates(net, *regions(1))
    found = [bounds_of(net, 1, mode) for mode in MODES]
    for one in found:
        assert np.all(together <= one["l2"] * (1 + MEASURED))
        assert np.all(np.max(each, axis=1) <= one["linf"] * (1 + MEASURED))
        assert np.all(each <= one["per_output"] * (1 + MEASURED))
    for looser, tighter in itertools.pairwise(found):
        # Not of each region: where a box is tighter other slopes are taken as known.
        assert np.mean(tighter["l2"]) <= np.mean(looser["l2"]) * 1.0001
        assert np.mean(tighter["per_output"]) <= np.mean(looser["per_output"]) * 1.0001
    # The bounds are not far above everything.
    assert np.max(together / found[-1]["l2"]) > (0.15 if kind == "shrink" else 0.99)


@pytest.mark.parametrize(
    "kind, tier", [("clipped_maxmin", "deterministic"), ("squash", "probabilistic")]
)
def test_no_two_points_change_faster_than_is_proved(kind, tier):
    net, _ = random_net(kind, 2)
    centers, radii, half = regions(2)
    together, each = strongest_rates(net, centers, radii, half)
    found = certificates_of(net, centers, epsilon=radii, box=half, tier=tier)
    assert np.all(together <= found.lipschitz * (1 + MEASURED))
    assert np.all(each <= found.per_output * (1 + MEASURED))
    # What is proved is the bound with exact norms, but for what each norm is inflated by.
    exact = bounds_of(net, 2, "rows")
    assert np.all(found.lipschitz >= exact["l2"] * (1 - 1e-9))
    assert np.all(found.lipschitz <= exact["l2"] * 1.03)


@pytest.mark.parametrize("kind", PIECEWISE)
def test_every_linear_piece_in_exact_arithmetic_is_within_the_bound(kind):
    net, parameters = random_net(kind, 3)
    rng = np.random.default_rng(5)
    found = [bounds_of(net, 4, mode) for mode in ("linear", "rows")]
    for i, (center, radius, half) in enumerate(zip(*regions(4), strict=True)):
        for _ in range(3):
            a, b = random_points(rng, center.astype(np.float64), radius, half, 2)
            step = sum(v * v for v in rational(b) - rational(a))
            pieces = exact_pieces(kind, parameters, a, b)
            assert [t for t, _ in pieces] == sorted(t for t, _ in pieces)
            for (t, low), (s, high) in itertools.pairwise(pieces):
                if s == t:
                    continue
                rates = [(v - u) / (s - t) for u, v in zip(low, high, strict=True)]
                for one in found:
                    whole = Fraction(float(one["l2"][i]))
                    assert sum(r * r for r in rates) <= whole**2 * step
                    for rate, bound in zip(rates, one["per_output"][i], strict=True):
                        assert rate * rate <= Fraction(float(bound)) ** 2 * step


@pytest.mark.parametrize("kind", PIECEWISE)
def test_with_one_input_the_bound_lies_above_the_exact_constant_and_not_far(kind):
    net, parameters = random_net(kind, 6, inputs=1)
    centers = np.linspace(-1.5, 1.5, 12, dtype=np.float32)[:, None]
    radius = 0.05
    found = walked(net, centers, np.full(12, radius), np.full((12, 1), radius), "rows")
    ratios = []
    for center, bound in zip(centers.astype(np.float64), found["l2"], strict=True):
        pieces = exact_pieces(kind, parameters, center - radius, center + radius)
        width = rational(center + radius)[0] - rational(center - radius)[0]
        # Between two points of a line the largest slope of a piece is the constant itself.
        square = max(
            sum(((v - u) / ((s - t) * width)) ** 2 for u, v in zip(low, high, strict=True))
            for (t, low), (s, high) in itertools.pairwise(pieces)
            if s > t
        )
        assert square <= Fraction(float(bound)) ** 2
        ratios.append(bound / float(square) ** 0.5)
    assert np.median(ratios) < 1.3, ratios
    assert np.min(ratios) < 1 + 1e-9  # where nothing turns it is the slope


@pytest.mark.parametrize("kind", ("relu", "maxmin", "squash"))
def test_as_the_region_shrinks_the_constant_becomes_the_norm_of_the_gradient(kind):
    net, _ = random_net(kind, 7)
    centers, radii, half = regions(8)
    with jax.enable_x64(True):
        jacobians = np.asarray(jax.vmap(jax.jacobian(net))(jnp.asarray(centers, jnp.float64)))
    exact = np.linalg.norm(jacobians, 2, axis=(1, 2))
    for mode in ("linear", "rows"):
        found = walked(net, centers, 1e-5 * radii, 1e-5 * half, mode)
        np.testing.assert_allclose(found["l2"], exact, rtol=1e-3)
        np.testing.assert_allclose(
            found["per_output"], np.linalg.norm(jacobians, axis=2), rtol=1e-3
        )


@pytest.mark.parametrize("tier", ("probabilistic", "deterministic"))
def test_convolutions_hold_too(tier):
    conv = tiny_net("maxmin", seed=2)
    image = np.random.default_rng(0).uniform(size=(6, 6, 2)).astype(np.float32)
    found = lipjax.certify_lipschitz(conv, image[None], 0.3, tier=tier)

    def flat(x):
        return conv(x.reshape(6, 6, 2))

    half = np.full((1, 72), 0.3)
    together, each = strongest_rates(flat, image.reshape(1, 72), np.array([0.3]), half)
    assert together <= found.lipschitz * (1 + MEASURED)
    assert np.all(each <= found.per_output * (1 + MEASURED))
    assert together > 0.02 * found.lipschitz


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
def test_the_estimate_is_the_bound_but_for_norms_from_below_and_rounding(mode, output_norm):
    net, _ = random_net("clip", 12)
    centers, radii, half = regions(13)
    exact = walked(net, centers, radii, half, mode)[output_norm]

    def one(x, radius, half):
        return lipjax.local_lipschitz(
            net, x, radius, box=half, mode=mode, output_norm=output_norm
        ).lipschitz

    np.testing.assert_allclose(jax.vmap(one)(centers, radii, half), exact, rtol=5e-3)


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
        same = jax.tree.map(lambda value, i=i: value[i], together)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), alone, same)


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
            constant([w + s * step if j == k else w for j, w in enumerate(weights)], x, 0.2)
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
    for region in ({"epsilon": 0.0}, {"box": 0.0}):
        for mode in MODES:
            found = lipjax.local_lipschitz(net, x, mode=mode, **region)
            assert found.lipschitz == 0 and not np.any(found.per_output)
        proof = certificates_of(net, x[None], **region)
        assert proof.lipschitz[0] < 1e-100


def test_a_coordinate_of_half_width_0_is_held_fixed():
    net, _ = random_net("squash", 18)
    x = np.array([0.5, -0.5], np.float32)

    def first_alone(t):
        return net(jnp.stack([t[0], jnp.asarray(x[1], t.dtype)]))

    half = np.array([[0.1, 0.0]])
    both = walked(net, x[None], np.ones(1), half, "rows")
    alone = walked(first_alone, x[None, :1], np.ones(1), half[:, :1], "rows")
    np.testing.assert_allclose(both["l2"], alone["l2"], rtol=1e-6)
    freed = walked(net, x[None], np.ones(1), half + 0.1, "rows")
    assert freed["l2"] > 1.05 * both["l2"]


def test_a_radius_below_the_normal_numbers_is_not_taken_for_0():
    # XLA flushes it to 0, which would hold the coordinates fixed.
    x = np.zeros((1, 2), np.float32)
    for region in ({"epsilon": 5e-324}, {"box": 1e-310}):
        found = certificates_of(lambda x: 3 * x, x, **region)
        assert np.all(found.lipschitz >= 3) and np.all(found.per_output >= 3), region


def test_of_a_constant_the_constant_is_0_and_of_the_identity_1():
    x = np.ones((1, 3), np.float32)
    zero = np.zeros((2, 3), np.float32)
    still = certificates_of(lambda x: zero @ x + 1, x, epsilon=0.5)
    assert still.lipschitz[0] < 1e-100
    same = certificates_of(lambda x: x, x, epsilon=0.5)
    assert 1 <= same.lipschitz[0] < 1.01
    assert np.all((same.per_output >= 1) & (same.per_output < 1.0001))


def test_what_overflows_is_infinite_and_a_nan_an_error():
    x = np.ones((1, 2), np.float32)
    large = np.full((2, 2), 1e30, np.float32)

    def overflows(x):
        for _ in range(4):
            x = jax.nn.relu(large @ x)
        return x

    found = certificates_of(overflows, x, "linear", epsilon=0.1)
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
    net, _ = random_net(kind, 21)
    graph = lipjax.trace(net, jax.ShapeDtypeStruct((2,), jnp.float64))
    node = next(node for node in graph.nodes if hasattr(node, "rule"))
    rule, shape = node.rule, graph.nodes[node.inputs[0]].shape
    rng = np.random.default_rng(22)
    for _ in range(20):
        center = rng.normal(0, 0.4, shape)
        half = rng.choice([0.0, 0.05, 0.5], shape)
        lower, upper = jnp.asarray(center - half), jnp.asarray(center + half)
        u, v = (jnp.asarray(rng.uniform(lower, upper)) for _ in range(2))
        change = u - v
        moved = rule(u) - rule(v)
        stages = rule.jacobian(lower, upper, rounding.OUTWARD)

        reach = jnp.abs(change)[..., None]
        for stage in stages:
            before, reach = reach, stage.forward(reach)
        assert np.all(np.abs(moved) <= reach[..., 0] + 1e-12)
        if len(stages) > 1:
            continue
        # With M = N + B E a row g sees <N^T g, d>, and an error <B^T g, e>.
        g = jnp.asarray(rng.normal(size=moved.shape))
        error = jnp.abs(jnp.sum(g * moved) - jnp.sum(stage.transposed(g) * change))
        weights = jnp.abs(stage.error_weights(g))
        assert error <= jnp.sum(weights * stage.reach(before)[..., 0]) + 1e-12
        length = stage.error_gain * jnp.linalg.norm(change)
        assert error <= jnp.linalg.norm(weights) * length + 1e-12


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
    half = np.full(2, epsilon)
    a, b = (random_points(rng, center, epsilon, half, 200) for _ in range(2))
    apart = np.linalg.norm(a - b, axis=1)
    for i, v in enumerate(known):
        cut = jax.vmap(dataclasses.replace(graph, nodes=graph.nodes[: i + 1]))
        first, second = np.asarray(cut(jnp.asarray(a))), np.asarray(cut(jnp.asarray(b)))
        change = np.abs(first - second)
        assert np.all((v.lower <= first) & (first <= v.upper)), i
        assert np.all(change <= v.rates * apart[:, None] + 1e-13), i
        assert np.all(np.linalg.norm(change, axis=1) <= v.rate * apart + 1e-13), i
        if v.entries is not None:
            assert np.all(change <= np.abs(a - b) @ v.entries.T + 1e-13), i
    assert sum(v.entries is not None for v in known) == 3
