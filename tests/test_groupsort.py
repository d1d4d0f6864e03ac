"""GroupSort and the absolute value: every rule against brute force in exact rational arithmetic."""

import dataclasses
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import outward_bound, proven_norms, rational
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lipjax
from lipjax import activations, rounding
from lipjax.activations import AbsoluteValue, Sort
from lipjax.activations.groupsort import SortRelaxation
from lipjax.bounds import Region
from lipjax.bounds.relaxed import largest_product
from lipjax.graph import Activation, Linear, Rearrange, TraceError, trace

SORT, ABSOLUTE = Sort(1), AbsoluteValue()
SHAPE = (2, 4)  # two groups of four


def exact_value(rule, z):
    """Of an object array of Fractions."""
    return np.abs(z) if isinstance(rule, AbsoluteValue) else np.sort(z, axis=rule.axis)


def exact_slopes(relaxation, z):
    """``M z`` in exact arithmetic."""
    slope = rational(relaxation.slope)
    if not isinstance(relaxation, SortRelaxation):
        return slope * z
    z = np.take_along_axis(z, np.asarray(relaxation.order), axis=1)
    found = np.where(relaxation.single, z, Fraction(0))
    for i, p in np.argwhere(np.asarray(relaxation.first)):
        mean = (z[i, p] + z[i, p + 1]) / 2
        turned = slope[i, p] * (z[i, p + 1] - z[i, p]) / 2
        found[i, p], found[i, p + 1] = mean - turned, mean + turned
    return found


def box(seed, width=1.0):
    """A center, and a box around it with ends that coincide, touch 0 or are the center's."""
    rng = np.random.default_rng(seed)
    center = np.round(rng.normal(size=SHAPE), 1)
    below, above = (rng.uniform(0, width, SHAPE) * rng.integers(0, 2, SHAPE) for _ in range(2))
    lower, upper = center - below, center + above
    lower = np.where(rng.uniform(size=SHAPE) < 0.1, np.minimum(center, 0), lower)
    upper = np.where(rng.uniform(size=SHAPE) < 0.1, np.maximum(center, 0), upper)
    return center, lower, upper


def points(center, lower, upper, seed):
    """Of the box: its corners in part, ties, kinks, and between."""
    rng = np.random.default_rng(seed)
    yield center
    for _ in range(12):
        yield np.where(rng.integers(0, 2, SHAPE), lower, upper)
    for _ in range(8):
        yield np.clip(np.broadcast_to(rng.normal(), SHAPE), lower, upper)
    yield np.clip(np.zeros(SHAPE), lower, upper)
    for _ in range(8):
        yield np.clip(lower + rng.uniform(size=SHAPE) * (upper - lower), lower, upper)


def violations(rule, seed, width=1.0) -> int:
    """How many guarantees of the rule's box and relaxation are broken, in exact arithmetic."""
    center, lower, upper = box(seed, width)
    ends = rule.interval(jnp.asarray(lower), jnp.asarray(upper))
    radius = float(np.linalg.norm(np.maximum(center - lower, upper - center)) * (1 + 1e-12))
    after = Region(rule(jnp.asarray(center)), jnp.asarray(radius), *ends)
    held = (jnp.asarray(a) for a in (center, lower, upper, radius))
    (found,) = rule.relaxations(*held, after, rounding.OUTWARD)
    rng, broken = np.random.default_rng(seed + 1), 0
    row = rng.normal(size=SHAPE)
    weights = found.error_weights(jnp.asarray(row))
    most = float(largest_product(weights, found.reach, found.radius, rounding.OUTWARD))
    start = exact_value(rule, rational(center))
    for z in points(center, lower, upper, seed):
        z = rational(z)
        value = exact_value(rule, z)
        broken += np.any(value < rational(ends[0])) + np.any(value > rational(ends[1]))
        error = value - start - exact_slopes(found, z - rational(center))
        broken += np.sum(error**2) > Fraction(float(found.radius)) ** 2
        # A little for the rounding of the weights themselves, which the reverse pass accounts for.
        slack = Fraction(1e-14) * Fraction(radius + 1) * 64
        broken += np.sum(error * rational(row)) > Fraction(most) + slack
    return int(broken)


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), width=st.sampled_from([0.1, 0.5, 2.0]))
@pytest.mark.parametrize("rule", [SORT, ABSOLUTE], ids=["sort", "absolute"])
def test_values_lie_in_the_box_and_errors_in_what_the_relaxation_says(rule, seed, width):
    with jax.enable_x64(True):
        assert violations(rule, seed, width) == 0


class NarrowBox(AbsoluteValue):
    """Forgets that the value is 0 inside of a box over 0."""

    def interval(self, lower, upper):
        first, second = jnp.abs(lower), jnp.abs(upper)
        return jnp.minimum(first, second), jnp.maximum(first, second)


class OneSlope(AbsoluteValue):
    """Takes the slope at the center for that of the box."""

    def relaxations(self, center, lower, upper, radius, after, arithmetic):
        end = jnp.where(center >= 0, jnp.maximum(lower, 0), lower)
        return super().relaxations(center, end, upper, radius, after, arithmetic)


class ShortReach(Sort):
    """Says half of the error."""

    def relaxations(self, *arguments):
        (found,) = super().relaxations(*arguments)
        return (dataclasses.replace(found, reach=found.reach / 2, radius=found.radius / 2),)


class LooseBlocks(Sort):
    """Takes neighbours in the order of the center for ordered on the box."""

    def _cuts(self, lower, upper):
        begins, ends = super()._cuts(lower, upper)
        return jnp.ones_like(begins), jnp.ones_like(ends)


class OnlyNeighbours(Sort):
    """Compares each entry with its neighbours only."""

    def _cuts(self, lower, upper):
        ends = upper <= self._next(lower, jnp.inf)
        return self._previous(ends, True), ends


@pytest.mark.parametrize("wrong", [NarrowBox, OneSlope, ShortReach, LooseBlocks, OnlyNeighbours])
def test_a_rule_that_is_wrong_on_purpose_is_caught(x64, wrong):
    rule = wrong() if issubclass(wrong, AbsoluteValue) else wrong(1)
    assert sum(violations(rule, seed) for seed in range(40)) > 0


def test_a_pair_is_relaxed_as_tightly_as_by_maxmin(x64):
    rng = np.random.default_rng(0)
    pair, sort = activations.Pairs(None, None), Sort(0)
    for _ in range(10):
        center = jnp.asarray(rng.normal(size=2))
        lower, upper = center - rng.uniform(0, 1, 2), center + rng.uniform(0, 1, 2)
        radii = []
        for rule in (pair, sort):
            after = Region(rule(center), 1.0, *rule.interval(lower, upper))
            (found,) = rule.relaxations(center, lower, upper, 1.0, after, rounding.OUTWARD)
            radii.append(float(found.radius))
        np.testing.assert_allclose(radii[1], radii[0], rtol=1e-9)


def test_only_entries_that_vary_are_active_and_the_order_is_seen(x64):
    lower, upper = jnp.asarray([[0.0, 1.0, 1.0, 5.0]]), jnp.asarray([[0.5, 1.0, 2.0, 6.0]])
    assert SORT.active(lower, upper).tolist() == [[True, False, True, True]]
    assert SORT.stable(lower, upper).tolist() == [[True] * 4]
    assert SORT.stable(lower, upper + jnp.asarray([0, 0, 4.0, 0])).tolist() == [
        [True, True, False, False]
    ]
    assert ABSOLUTE.stable(lower - 1, upper - 1).tolist() == [[False, True, True, True]]
    assert ABSOLUTE.active(lower - 1, upper - 1).tolist() == [[True, False, True, True]]


def test_hinges_are_zero_off_the_kinks_and_positive_on_them(x64):
    lower = jnp.asarray([[0.0, 2.0]])
    assert SORT.instability(lower, lower + 1) == 0 < SORT.instability(lower, lower + 3)
    assert ABSOLUTE.instability(lower, lower + 1) == 0 < ABSOLUTE.instability(lower - 1, lower + 1)
    assert SORT.sparsity(lower, lower + 1) == 0 == ABSOLUTE.sparsity(lower, lower + 1)
    one = jnp.ones((1, 1))
    assert Sort(1).instability(one, one) == 0


def test_a_box_that_is_not_known_spreads(x64):
    lower, upper = jnp.asarray([[0.0, jnp.nan, 3.0]]), jnp.asarray([[1.0, 2.0, 4.0]])
    for end in SORT.interval(lower, upper):
        assert np.all(np.isnan(end))
    after = Region(jnp.asarray([[0.5, 1.0, 3.0]]), 1.0, *SORT.interval(lower, upper))
    (found,) = SORT.relaxations(after.center, lower, upper, 1.0, after, rounding.OUTWARD)
    assert not np.any(found.single) and np.isnan(found.reach).any()
    assert np.isnan(ABSOLUTE.interval(lower, upper)[1]).tolist() == [[False, True, False]]


@pytest.mark.parametrize("rule", [SORT, ABSOLUTE], ids=["sort", "absolute"])
def test_no_output_moves_further_than_rounding_says(x64, rule):
    rng = np.random.default_rng(0)
    for _ in range(50):
        z, error = rng.normal(size=SHAPE), rng.uniform(0, 1, SHAPE) ** 4
        moved = z + error * rng.choice([-1, 1], SHAPE)
        away = np.abs(rule(jnp.asarray(moved)) - rule(jnp.asarray(z)))
        assert np.all(away <= rule.rounding(jnp.asarray(error)) + 1e-15)


# ----------------------------------------------------------------------------------- in networks


def test_groups_of_two_are_maxmin_in_another_order():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)), jnp.float32)
    paired = lipjax.MaxMin()(jnp.concatenate([z[:, 0::2], z[:, 1::2]], axis=-1))
    found = activations.GroupSort(2)(z)
    np.testing.assert_array_equal(found[:, 1::2], paired[:, :3])
    np.testing.assert_array_equal(found[:, 0::2], paired[:, 3:])
    for wrong in (lambda: activations.GroupSort(0), lambda: activations.groupsort(z, 4)):
        with pytest.raises(ValueError, match=r"group size"):
            wrong()


def kinds(f, shape=(6,)):
    graph = trace(f, jax.ShapeDtypeStruct(shape, jnp.float32))
    return [node.rule.kind for node in graph.nodes if isinstance(node, Activation)]


def test_sorts_and_absolute_values_are_read_from_plain_jax():
    assert kinds(jnp.sort) == ["Sort"] == kinds(activations.GroupSort(3))
    assert kinds(lambda x: jnp.sort(x, descending=True)) == ["Sort"]
    assert kinds(lambda x: jnp.sort(x.reshape(2, 3), axis=0).reshape(-1)) == ["Sort"]
    assert kinds(jnp.abs) == ["Absolute"] == kinds(activations.Absolute())
    assert kinds(lambda x: abs(x)) == ["Absolute"]
    with pytest.raises(TraceError, match="sort"):
        kinds(jnp.argsort)
    graph = trace(activations.GroupSort(2), jax.ShapeDtypeStruct((6,), jnp.float32))
    assert [type(node) for node in graph.nodes[1:]] == [Rearrange, Activation, Rearrange]


def net_of(activation, seed=0):
    rngs, bias = nnx.Rngs(seed), jax.nn.initializers.normal(0.3)
    first, second, head = (
        nnx.Linear(n, m, rngs=rngs, bias_init=bias) for n, m in ((5, 8), (8, 8), (8, 3))
    )
    return nnx.Sequential(first, activation, second, activation, head)


ACTIVATIONS = {"groups of four": activations.GroupSort(4), "absolute": activations.Absolute()}


@pytest.mark.parametrize("mode", ["local", "rows"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_regions_and_margins_hold_in_exact_arithmetic_on_samples(x64, kind, mode):
    net, epsilon = net_of(ACTIVATIONS[kind], seed=1), 0.4
    graph = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float64), trace(net, jnp.ones(5, jnp.float32))
    )
    rng = np.random.default_rng(2)
    x = rng.normal(size=5)
    bound = outward_bound(graph, x, epsilon, mode)
    worst = lipjax.worst_logits(bound, 0, rounding.OUTWARD)
    for step in (*rng.normal(size=(8, 5)), *np.asarray(jax.jacobian(graph)(jnp.asarray(x)))):
        point = rational(x + 0.999999 * epsilon * step / np.linalg.norm(step))
        values = exact_nodes(graph, point)
        for h, region in zip(values, bound.regions, strict=True):
            assert np.all(rational(region.lower) <= h) and np.all(h <= rational(region.upper))
            assert np.sum((h - rational(region.center)) ** 2) <= Fraction(float(region.radius)) ** 2
        lead = values[-1] - values[-1][0]
        assert np.all(lead[1:] <= rational(worst - worst[0])[1:])


def exact_nodes(graph, point):
    """The value of each node of a dense net, exactly."""
    values = [point]
    for node in graph.nodes[1:]:
        (h,) = (values[i] for i in node.inputs)
        if isinstance(node, Linear):
            h = rational(node.operator.kernel).T @ h + rational(node.operator.bias)
        elif isinstance(node, Rearrange):
            h = h.reshape(node.shape)
        else:
            h = exact_value(node.rule, h)
        values.append(h)
    return values


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_executed_logits_are_within_the_forward_error(kind):
    net = net_of(ACTIVATIONS[kind], seed=3)
    x = np.random.default_rng(4).normal(size=5).astype(np.float32)
    with jax.enable_x64(True):
        traced = trace(net, jax.ShapeDtypeStruct((5,), jnp.float32))
        graph = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), traced)
        bound = outward_bound(graph, x, 0.0, "local")
        boxes = [(r.lower, r.upper) for r in bound.regions]
        arithmetics = rounding.arithmetics_of(traced)
        error = np.asarray(rounding.forward_error(graph, boxes, arithmetics, proven_norms(graph)))
        exact = exact_nodes(graph, rational(x))[-1]
    off = np.abs(np.asarray(net(jnp.asarray(x)), np.float64) - exact.astype(np.float64))
    assert np.all(off <= error) and np.any(off > 1e-4 * error)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_certified_images_are_not_broken(kind):
    net = net_of(ACTIVATIONS[kind], seed=2)
    x = np.random.default_rng(5).uniform(0, 1, (12, 5)).astype(np.float32)
    epsilon = 0.05
    found = lipjax.certify(net, x, None, epsilon, mode="linear", tier="deterministic")
    rows = found.certified
    assert np.sum(rows) >= 4
    labels = found.predicted[rows]
    attack = lipjax.attacks.pgd(net, x[rows], labels, epsilon, restarts=5, clip=None)
    assert not attack.broken.any()
    assert lipjax.attacks.pgd(net, x[rows], labels, 40 * epsilon, clip=None).broken.any()


def test_every_order_of_a_group_gives_the_same_value():
    z = np.array([3.0, 1.0, 2.0, 1.0], np.float32)
    for order in itertools.permutations(range(4)):
        found = activations.groupsort(jnp.asarray(z[list(order)]), 4)
        np.testing.assert_array_equal(found, np.sort(z))
