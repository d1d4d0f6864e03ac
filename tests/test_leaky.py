"""Leaky ReLU, PReLU and hard tanh: rules in exact arithmetic, and how they are read."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import outward_bound, rational
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lipjax
from lipjax import rounding
from lipjax.activations import Leaky
from lipjax.bounds import Region
from lipjax.bounds.relaxed import largest_product
from lipjax.graph import Activation, Linear, TraceError, trace

SIZE = 6
RULES = {
    "leaky": (0.1, 1.0),
    "rising to both sides": (-0.75, 2.0),
    "one slope a neuron": (np.array([0.3, -1.0, 0.0, 1.0, 7.0, -0.1]), 1.0),
}


def rule_of(name) -> Leaky:
    return Leaky(*(jnp.asarray(slope) for slope in RULES[name]))


def exact_value(rule, z):
    below, above = (np.broadcast_to(rational(s), z.shape) for s in (rule.below, rule.above))
    return np.where(z < 0, below * z, above * z)


def violations(rule, seed, width) -> int:
    """How many guarantees of the rule are broken on a box, in exact arithmetic."""
    rng, broken = np.random.default_rng(seed), 0
    center = np.round(rng.normal(size=SIZE), 1)
    below, above = (rng.uniform(0, width, SIZE) * rng.integers(0, 2, SIZE) for _ in range(2))
    lower, upper = center - below, center + above
    touched = rng.uniform(size=SIZE) < 0.2
    lower, upper = (
        np.where(touched, np.minimum(lower, 0), lower),
        np.where(touched & (center <= 0), np.maximum(center, 0), upper),
    )
    ends = rule.interval(jnp.asarray(lower), jnp.asarray(upper))
    radius = float(np.linalg.norm(np.maximum(center - lower, upper - center)) * (1 + 1e-12))
    after = Region(rule(jnp.asarray(center)), jnp.asarray(radius), *ends)
    held = (jnp.asarray(a) for a in (center, lower, upper, radius))
    (found,) = rule.relaxations(*held, after, rounding.OUTWARD)
    most = largest_product(jnp.ones(SIZE), found.reach, found.radius, rounding.OUTWARD)
    growth = Fraction(float(rule.lipschitz_on(jnp.asarray(lower), jnp.asarray(upper))))
    active = np.asarray(rule.active(jnp.asarray(lower), jnp.asarray(upper)))
    start, middle = rational(after.center), exact_value(rule, rational(center))
    for _ in range(16):
        z = np.where(rng.integers(0, 2, SIZE), lower, upper)
        if rng.integers(0, 2):
            z = np.clip(rng.choice([0.0, 1e-300, -1e-300, 0.3, -0.3], SIZE), lower, upper)
        z = rational(z)
        value = exact_value(rule, z)
        broken += np.any(value < rational(ends[0])) + np.any(value > rational(ends[1]))
        broken += np.any((value != middle) & ~active)
        broken += np.sum((value - middle) ** 2) > growth**2 * np.sum((z - rational(center)) ** 2)
        # From the center as it was computed: what is not known of it is error too.
        error = value - start - rational(found.slope) * (z - rational(center))
        broken += np.sum(error**2) > Fraction(float(found.radius)) ** 2
        broken += np.any(np.abs(error) > rational(found.reach))
        broken += np.sum(error) > Fraction(float(most))
    return int(broken)


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), width=st.sampled_from([0.1, 0.5, 2.0]))
@pytest.mark.parametrize("name", RULES)
def test_values_lie_in_the_box_and_errors_in_what_the_relaxation_says(name, seed, width):
    with jax.enable_x64(True):
        assert violations(rule_of(name), seed, width) == 0


class Exact(Leaky):
    """Forgets that products are rounded."""

    def evaluation_error(self, value):
        return jnp.zeros_like(value)


class Ends(Leaky):
    """Forgets the kink."""

    def interval(self, lower, upper):
        ends = self(lower), self(upper)
        return jnp.minimum(*ends) - 1e-9, jnp.maximum(*ends) + 1e-9


class FarSlope(Leaky):
    """Takes the center's slope for that of the whole box."""

    def relaxations(self, center, lower, upper, *others):
        lower = jnp.where(center >= 0, jnp.maximum(lower, 0.0), lower)
        upper = jnp.where(center < 0, jnp.minimum(upper, 0.0), upper)
        return super().relaxations(center, lower, upper, *others)


class HalfReach(Leaky):
    """Says half of the error."""

    def relaxations(self, *arguments):
        (found,) = super().relaxations(*arguments)
        return (dataclasses.replace(found, reach=found.reach / 2, radius=found.radius / 2),)


class LeastGrowth(Leaky):
    """Takes the smaller slope for the constant."""

    def lipschitz_on(self, lower, upper):
        low, high = self._extremes(lower, upper)
        return jnp.min(jnp.maximum(jnp.abs(low), jnp.abs(high)))


@pytest.mark.parametrize("wrong", [Exact, Ends, FarSlope, HalfReach, LeastGrowth])
def test_a_rule_that_is_wrong_on_purpose_is_caught(x64, wrong):
    rule = wrong(*(jnp.asarray(slope) for slope in RULES["one slope a neuron"]))
    assert sum(violations(rule, seed, 1.0) for seed in range(12)) > 0


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_executed_is_within_what_the_rule_says(x64, name, dtype):
    rng, rule = np.random.default_rng(0), rule_of(name)
    rule = jax.tree.map(lambda s: jnp.asarray(s, dtype).astype(jnp.float64), rule)
    narrow = jax.tree.map(lambda s: jnp.asarray(s, dtype), rule)
    for _ in range(50):
        z = rng.normal(size=SIZE) * 10.0 ** rng.uniform(-3, 3)
        moved = jnp.asarray(z * (1 + 1e-6 * rng.normal(size=SIZE)), dtype)
        error = jnp.abs(moved.astype(jnp.float64) - z)
        box = jnp.asarray(z), jnp.asarray(z)
        allowed = rule.executed(error, *box, (rounding.ARITHMETICS[dtype],))
        off = np.abs(np.asarray(narrow(moved), np.float64) - exact_value(rule, rational(z)))
        assert np.all(off.astype(np.float64) <= np.asarray(allowed))
    huge = jnp.full(SIZE, 1e38)
    allowed = Leaky(10.0, 1.0).executed(0 * huge, huge, huge, (rounding.ARITHMETICS[dtype],))
    assert np.all(np.isinf(allowed))
    # The narrower of two types overflows first, and the steeper side counts whatever its sign.
    both = rounding.ARITHMETICS["float64"], rounding.ARITHMETICS[dtype]
    assert np.all(np.isinf(Leaky(10.0, 1.0).executed(0 * huge, huge, huge, both)))
    one = jnp.ones(SIZE)
    for slopes in ((-3.0, 0.5), (0.5, -3.0)):
        assert np.all(Leaky(*slopes).executed(one, -one, one, both[1:]) >= 3)


def test_the_hinge_is_zero_off_the_kink_and_outputs_of_slope_one_are_stable():
    rule, lower = Leaky(0.1, 1.0), jnp.asarray([-1.0, 0.0, -2.0])
    upper = jnp.asarray([1.0, 1.0, -1.0])
    assert rule.instability(lower, upper) > 0 == rule.instability(lower[1:], upper[1:])
    assert rule.stable(lower, upper).tolist() == [False, True, False]
    assert Leaky(0.0, 1.0).active(lower, upper).tolist() == [True, True, False]


# ---------------------------------------------------------------------------------- how it is read


def rules(f, shape=(3,)):
    graph = trace(f, jax.ShapeDtypeStruct(shape, jnp.float32))
    return [node.rule for node in graph.nodes if isinstance(node, Activation)]


@pytest.mark.parametrize(
    "f",
    [
        lambda x: jax.nn.leaky_relu(x, 0.25),
        lambda x: nnx.leaky_relu(x, 0.25),
        lambda x: jnp.where(x > 0, x, 0.25 * x),
        lambda x: jnp.where(x < 0, x * 0.25, x),
        lambda x: jnp.where(x >= 0, x, x / 4),
        nnx.PReLU(negative_slope_init=0.25),
    ],
)
def test_leaky_relus_are_read_however_they_are_written(f):
    (found,) = rules(f)
    assert type(found) is Leaky and found.kind == "Leaky"
    assert (float(found.below), float(found.above)) == (0.25, 1.0)
    assert found.lipschitz == 1.0 and "1-Lipschitz" in found.bounded


PLACES = jnp.asarray([0, 2, 1])


def filled(x):
    return jnp.pad(x, 1, constant_values=-5.0)


def test_other_choices_between_multiples_are_read_and_jumps_refused():
    (found,) = rules(lambda x: jnp.where(x > 0, 2 * x, x * -jnp.asarray([1.0, 2.0, 3.0])))
    np.testing.assert_array_equal(found.below, [-1.0, -2.0, -3.0])
    assert found.lipschitz == 3.0
    for jump in (
        lambda x: jnp.where(x > 0.5, x, 0.1 * x),
        lambda x: jnp.where(x > 0, x, 0.1 * x + 1),
        lambda x: jnp.where(x > 0, x, 0.1 * x[::-1]),
        lambda x: jnp.where(x[PLACES] > 0, x[PLACES], (0.1 * x)[PLACES[::-1]]),
        lambda x: jnp.where(jnp.pad(x, 1) > 0, jnp.pad(x, 1), filled(0.1 * x)),
    ):
        with pytest.raises(TraceError):
            rules(jump)


def test_hard_tanh_and_clips_between_numbers_are_clips():
    for f in (
        jax.nn.hard_tanh,
        lambda x: jnp.clip(x, -1, 1),
        lambda x: jnp.minimum(jnp.maximum(x, -1.0), 1.0),
        lambda x: jax.lax.clamp(-1.0, x, 1.0),
        lambda x: jnp.where(x > 1, 1, jnp.where(x < -1, -1, x)),
    ):
        (found,) = rules(f)
        assert found.kind == "Clip"
        assert np.all(found.bottom == -1) and np.all(found.top == 1)


def test_slopes_are_learned_through_the_bound():
    net = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.PReLU(), nnx.Linear(4, 2, rngs=nnx.Rngs(1))
    )
    x = jnp.asarray([0.3, 0.6, 0.9])

    @jax.jit
    @nnx.grad
    def gradient(net):
        return lipjax.worst_logits(lipjax.bound(net, x, 0.3, key=jax.random.key(0)), 0)[1]

    found = gradient(net)["layers"][1]["negative_slope"]
    assert np.isfinite(found[...]) and found[...] != 0


@pytest.mark.parametrize("mode", ["local", "rows"])
def test_regions_and_margins_hold_in_exact_arithmetic_on_samples(x64, mode):
    rngs, bias = nnx.Rngs(1), jax.nn.initializers.normal(0.3)
    first, second, head = (
        nnx.Linear(n, m, rngs=rngs, bias_init=bias) for n, m in ((5, 6), (6, 6), (6, 3))
    )
    slope = jnp.asarray(RULES["one slope a neuron"][0], jnp.float32)

    def f(x):
        h = second(jax.nn.leaky_relu(first(x), 0.1))
        return head(jnp.where(h > 0, 1.5 * h, slope * h))

    traced = trace(f, jax.ShapeDtypeStruct((5,), jnp.float32))
    graph = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), traced)
    rng, epsilon = np.random.default_rng(2), 0.4
    x = rng.normal(size=5)
    bound = outward_bound(graph, x, epsilon, mode)
    worst = lipjax.worst_logits(bound, 0, rounding.OUTWARD)
    for step in (*rng.normal(size=(8, 5)), *np.asarray(jax.jacobian(graph)(jnp.asarray(x)))):
        h = rational(x + 0.999999 * epsilon * step / np.linalg.norm(step))
        for node, region in zip(graph.nodes, bound.regions, strict=True):
            if isinstance(node, Linear):
                h = rational(node.operator.kernel).T @ h + rational(node.operator.bias)
            elif isinstance(node, Activation):
                h = exact_value(node.rule, h)
            assert np.all(rational(region.lower) <= h) and np.all(h <= rational(region.upper))
            assert np.sum((h - rational(region.center)) ** 2) <= Fraction(float(region.radius)) ** 2
        assert np.all((h - h[0])[1:] <= rational(worst - worst[0])[1:])
