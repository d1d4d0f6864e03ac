"""Max pooling: its constant, boxes, candidates and relaxation against brute force on samples."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import dense_matrix, outward_bound
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lipjax
from lipjax import rounding
from lipjax.activations import MaxPool
from lipjax.bounds import Region
from lipjax.bounds.relaxed import largest_product
from lipjax.graph import Activation, TraceError, trace
from lipjax.graph.linear import larger
from lipjax.graph.nodes import evaluate

SHAPE = (4, 5, 2)
NONE = ((0, 0),) * 3
POOLS = {
    "apart": MaxPool(SHAPE, (2, 2, 1), (2, 2, 1), NONE, (1, 1, 1)),
    "overlapping": MaxPool(SHAPE, (3, 2, 1), (1, 1, 1), NONE, (1, 1, 1)),
    "padded": MaxPool(SHAPE, (3, 3, 1), (2, 2, 1), ((1, 1), (1, 0), (0, 0)), (1, 1, 1)),
    "dilated": MaxPool(SHAPE, (2, 3, 1), (1, 1, 1), NONE, (2, 1, 1)),
    "over channels": MaxPool(SHAPE, (1, 2, 2), (1, 1, 1), NONE, (1, 1, 1)),
}


def by_hand(pool, z):
    """The maxima, by loops."""
    pads = [(max(low, 0), max(high, 0)) for low, high in pool.padding]
    z = np.pad(z, pads, constant_values=-np.inf)
    extent = [(w - 1) * d + 1 for w, d in zip(pool.window, pool.dilation, strict=True)]
    counts = [(n - e) // s + 1 for n, e, s in zip(z.shape, extent, pool.strides, strict=True)]
    found = np.zeros(counts)
    for at in np.ndindex(*counts):
        parts = tuple(
            slice(k * s, k * s + e, d)
            for k, s, e, d in zip(at, pool.strides, extent, pool.dilation, strict=True)
        )
        found[at] = np.max(z[parts])
    return found


@pytest.mark.parametrize("name", POOLS)
def test_the_value_is_the_maximum_of_each_window(x64, name):
    z = np.random.default_rng(0).normal(size=SHAPE)
    np.testing.assert_array_equal(POOLS[name](jnp.asarray(z)), by_hand(POOLS[name], z))
    z[1, 2, 1] = np.nan
    found = POOLS[name](jnp.asarray(z))
    assert np.isnan(found).any()
    np.testing.assert_array_equal(found, by_hand(POOLS[name], z))


@pytest.mark.parametrize(
    ("name", "most"),
    [("apart", 1), ("overlapping", 4), ("padded", 4), ("dilated", 3), ("over channels", 2)],
)
def test_the_constant_is_the_root_of_the_windows_of_an_entry_and_is_reached(x64, name, most):
    pool, flat = POOLS[name], np.zeros(SHAPE)
    assert pool.lipschitz**2 >= most and pool.lipschitz == pytest.approx(most**0.5)
    moved = [
        np.linalg.norm(by_hand(pool, spike)) for spike in np.eye(flat.size).reshape(-1, *SHAPE)
    ]
    assert np.max(moved) == pytest.approx(pool.lipschitz)
    rng = np.random.default_rng(1)
    for _ in range(50):
        z, step = np.round(rng.normal(size=SHAPE), 1), rng.normal(size=SHAPE) ** 3
        away = np.linalg.norm(by_hand(pool, z + step) - by_hand(pool, z))
        assert away <= pool.lipschitz * np.linalg.norm(step)


@functools.partial(jax.jit, static_argnums=0)
def on_box(pool, center, lower, upper, radius, rows):
    """All that the rule says of a box; `radius` counts the active inputs alone."""
    ends = pool.interval(lower, upper)
    active = pool.active(lower, upper)
    growth = pool.lipschitz_on(lower, upper)
    far = jnp.where(active, larger(center - lower, upper - center), 0.0)
    radius = jnp.linalg.norm(far) if radius is None else radius
    after = Region(pool(center), growth * radius + 1e-12, *ends)
    (found,) = pool.relaxations(center, lower, upper, radius, after, rounding.OUTWARD)
    carried = jax.vmap(found.transposed)(rows)
    costs = jax.vmap(lambda g: largest_product(g, found.reach, found.radius, rounding.OUTWARD))(
        rows
    )
    return ends, active, growth, carried, costs, pool.stable(lower, upper)


def violations(pool, seed, width) -> int:
    """How many guarantees of the rule are broken on points of a box."""
    rng, broken = np.random.default_rng(seed), 0
    center = np.round(rng.normal(size=SHAPE), 1)
    below, above = (rng.uniform(0, width, SHAPE) * rng.integers(0, 2, SHAPE) for _ in range(2))
    lower, upper = center - below, center + above
    start = by_hand(pool, center)
    rows = rng.normal(size=(3, *start.shape))
    said = jax.tree.map(np.asarray, on_box(pool, center, lower, upper, None, rows))
    ends, active, growth, carried, costs, stable = said
    inputs = np.sort(np.unique(center))
    for k in range(24):
        z = np.where(rng.integers(0, 2, SHAPE), lower, upper)
        if k % 3 == 1:
            z = np.clip(rng.choice(inputs, SHAPE), lower, upper)
        if k % 3 == 2:
            z = lower + rng.uniform(size=SHAPE) * (upper - lower)
        value = by_hand(pool, z)
        broken += np.any(value < ends[0]) + np.any(value > ends[1])
        # Inputs that are not active move nothing.
        broken += np.any(by_hand(pool, np.where(active, z, center)) != value)
        away = np.linalg.norm(value - start)
        broken += away > growth * np.linalg.norm((z - center)[active]) + 1e-12
        broken += np.any(~np.isin(value[stable], z))
        for g, back, cost in zip(rows, carried, costs, strict=True):
            broken += np.sum(g * (value - start)) > np.sum(back * (z - center)) + cost + 1e-12
    return int(broken)


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), width=st.sampled_from([0.05, 0.3, 1.0, 3.0]))
@pytest.mark.parametrize("name", POOLS)
def test_what_the_rule_says_holds_on_samples(name, seed, width):
    with jax.enable_x64(True):
        assert violations(POOLS[name], seed, width) == 0


class OneWindow(MaxPool):
    """Counts one window for each entry."""

    def lipschitz_on(self, lower, upper):
        return 1.0


class TooFew(MaxPool):
    """Takes only what leads at some end of the box for a candidate."""

    def _candidates(self, lower, upper):
        found, floor = super()._candidates(lower, upper)
        return found & (self._taps((lower + upper) / 2, -jnp.inf) > floor), floor


class LeaderOnly(MaxPool):
    """Says that the leader at the center leads everywhere."""

    def relaxations(self, *arguments):
        (found,) = super().relaxations(*arguments)
        return (dataclasses.replace(found, reach=0 * found.reach, radius=0 * found.radius),)


class HalfReach(MaxPool):
    """Says half of the error."""

    def relaxations(self, *arguments):
        (found,) = super().relaxations(*arguments)
        return (dataclasses.replace(found, reach=found.reach / 2, radius=found.radius / 2),)


@pytest.mark.parametrize("wrong", [OneWindow, TooFew, LeaderOnly, HalfReach])
def test_a_rule_that_is_wrong_on_purpose_is_caught(x64, wrong):
    pool = wrong(**{f.name: getattr(POOLS["padded"], f.name) for f in dataclasses.fields(MaxPool)})
    assert sum(violations(pool, seed, 1.0) for seed in range(12)) > 0


def test_where_the_order_is_fixed_pooling_is_a_selection_and_only_winners_are_active(x64):
    """Distances of 1 and boxes of 0.2: each window has one candidate, which lies in few windows."""
    pool = POOLS["overlapping"]
    center = jnp.asarray(np.random.default_rng(0).permutation(40).reshape(SHAPE)) * 1.0
    lower, upper = center - 0.1, center + 0.1
    assert pool.stable(lower, upper).all()
    winners = np.isin(np.asarray(center), by_hand(pool, np.asarray(center)))
    np.testing.assert_array_equal(pool.active(lower, upper), winners)
    assert pool.active(lower, upper, as_paper=True).all()
    after = Region(pool(center), 1.0, *pool.interval(lower, upper))
    (found,) = pool.relaxations(center, lower, upper, 1.0, after, rounding.OUTWARD)
    assert not np.any(found.reach) and found.radius < 1e-140
    jacobian = dense_matrix(lambda d: jnp.sum(found.slope * pool._taps(d, 0.0), axis=0), SHAPE)
    np.testing.assert_array_equal(jacobian.sum(axis=1), 1)
    assert pool.lipschitz_on(lower, upper) == pytest.approx(np.linalg.norm(jacobian, 2))


def test_an_end_that_is_not_known_spreads(x64):
    pool, lower = POOLS["padded"], jnp.zeros(SHAPE).at[1, 1, 0].set(jnp.nan)
    after = Region(pool(jnp.zeros(SHAPE)), 1.0, *pool.interval(lower, jnp.ones(SHAPE)))
    (found,) = pool.relaxations(jnp.zeros(SHAPE), lower, lower + 1, 1.0, after, rounding.OUTWARD)
    assert np.isnan(after.lower).sum() == 2 * 2 == np.isnan(found.reach).sum()
    assert np.isnan(found.radius)


# ---------------------------------------------------------------------------------- in networks


def rules(f, shape=(6, 6, 2)):
    graph = trace(f, jax.ShapeDtypeStruct(shape, jnp.float32))
    return [node.rule for node in graph.nodes if isinstance(node, Activation)]


def test_pooling_is_read_from_flax_and_from_maxima_along_axes():
    def flat(pool):
        return lambda x: pool(x).reshape(-1)

    (found,) = rules(flat(lambda x: nnx.max_pool(x, (3, 3), (2, 2), "SAME")))
    assert found.window[-3:] == (3, 3, 1) and found.padding[-3:] == ((0, 1), (0, 1), (0, 0))
    (found,) = rules(lambda x: jnp.max(x, axis=(0, 1)))
    assert found.window[-3:] == (6, 6, 1) and found.lipschitz == 1
    with pytest.raises(TraceError, match="reduce_window_max"):
        rules(flat(lambda x: nnx.max_pool(x, (1, 1), (1, 1), ((1, 1), (0, 0)))))


def small_net(seed=0):
    rngs, bias = nnx.Rngs(seed), jax.nn.initializers.normal(0.3)
    conv = nnx.Conv(1, 3, (3, 3), padding=1, rngs=rngs, bias_init=bias)
    return nnx.Sequential(
        conv,
        nnx.relu,
        lambda x: nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))),
        lambda x: x.reshape(x.shape[0], -1) if x.ndim == 4 else x.reshape(-1),
        nnx.Linear(27, 3, rngs=rngs, bias_init=bias),
    )


@pytest.mark.parametrize("mode", ["global", "local", "rows"])
def test_regions_and_margins_hold_on_samples(x64, mode):
    net, epsilon = small_net(), 0.3
    graph = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float64),
        trace(net, jax.ShapeDtypeStruct((6, 6, 1), jnp.float32)),
    )
    rng = np.random.default_rng(2)
    x = rng.uniform(size=(6, 6, 1))
    bound = outward_bound(graph, x, epsilon, mode)
    worst = np.asarray(lipjax.worst_logits(bound, 0, rounding.OUTWARD))
    steps = [*rng.normal(size=(20, 6, 6, 1)), *np.asarray(jax.jacobian(graph)(jnp.asarray(x)))]
    for step in steps:
        point = x + epsilon * step / np.linalg.norm(step)
        values = []
        for node in graph.nodes:
            taken = [values[i] for i in node.inputs]
            values.append(evaluate(node, taken, jnp.asarray(point)))
        for h, region in zip(values, bound.regions, strict=True):
            assert np.all(region.lower <= h + 1e-12) and np.all(h <= region.upper + 1e-12)
            assert np.linalg.norm(h - region.center) <= region.radius + 1e-12
        assert np.all((values[-1] - values[-1][0])[1:] <= (worst - worst[0])[1:] + 1e-12)


def test_certified_images_are_not_broken_and_bounds_are_differentiated():
    net = small_net(1)
    x = np.random.default_rng(5).uniform(0, 1, (12, 6, 6, 1)).astype(np.float32)
    found = lipjax.certify(net, x, None, 0.04, mode="linear", tier="deterministic")
    rows = found.certified
    assert np.sum(rows) >= 3
    labels = found.predicted[rows]
    attack = lipjax.attacks.pgd(net, x[rows], labels, 0.04, restarts=3, clip=None)
    assert not attack.broken.any()
    assert lipjax.attacks.pgd(net, x[rows], labels, 2.0, clip=None).broken.any()

    @jax.jit
    @nnx.grad
    def gradient(net):
        bound = lipjax.bound(net, jnp.asarray(x[0]), 0.1, mode="linear", key=jax.random.key(0))
        return lipjax.worst_logits(bound, 0)[1] + bound.lipschitz

    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient(net)))
