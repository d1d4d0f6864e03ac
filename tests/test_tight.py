"""One-sided errors: pieces against the functions, their maxima against brute force and exact
rationals, margins against sampling and finite differences."""

import dataclasses
import functools
import itertools
import sys
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import cast64, make_activation, outward_bound, tiny_net
from hypothesis import given, settings
from hypothesis import strategies as st

import lipjax
from lipjax import rounding
from lipjax.bounds import margins, tight
from lipjax.graph import trace

groupsort = sys.modules["lipjax.activations.groupsort"]  # (the package calls a function so)
N = 6
KINDS = ("relu", "clipped_relu", "maxmin", "clipped_maxmin", "abs", "leaky", "steep")
# Few values, so that ends, centers and kinks often coincide.
GRID = st.sampled_from([-1.0, -0.5, -0.3, 0.0, 0.2, 0.5, 0.7, 1.0])
BOXES = st.lists(st.tuples(GRID, GRID, GRID), min_size=N, max_size=N)


def function(kind):
    others = {
        "abs": jnp.abs,
        "leaky": lambda z: jax.nn.leaky_relu(z, 0.3),
        "steep": lambda z: jnp.where(z > 0, 1.7 * z, -0.4 * z),
    }
    return others.get(kind) or cast64(make_activation(kind, N, threshold=0.5))


@functools.cache
def rule(kind):
    with jax.enable_x64(True):
        graph = lipjax.trace(function(kind), jax.ShapeDtypeStruct((N,), jnp.float64))
    return graph.nodes[-1].rule


def steps_of(kind, box, arithmetic=rounding.EXACT):
    """Lower end, center and upper end of a box, and the pieces there."""
    lower, center, upper = (jnp.asarray(end) for end in np.sort(np.array(box), axis=1).T)
    return (lower, center, upper), rule(kind).pieces(center, lower, upper, arithmetic)


def stages(kind, steps):
    """The function of each step, on its own input."""
    if len(steps) == 1:
        return [function(kind)]
    return [lipjax.MaxMin(), function(kind)]


def inside(ends, count, seed):
    """Points of a box: its ends, its center and random ones, as rows."""
    lower, center, upper = (np.asarray(end) for end in ends)
    share = np.random.default_rng(seed).choice([0.0, 0.1, 0.4, 0.5, 0.77, 1.0], (count, N))
    return np.concatenate([[lower, center, upper], lower + share * (upper - lower)])


@settings(max_examples=60)
@given(kind=st.sampled_from(KINDS), box=BOXES, seed=st.integers(0, 10**6))
def test_an_activation_is_slopes_and_errors_by_its_pieces(kind, box, seed):
    with jax.enable_x64(True):
        ends, steps = steps_of(kind, box)
        rng = np.random.default_rng(seed)
        points, center = jnp.asarray(inside(ends, 50, seed)), ends[1]
        for act, pieces in zip(stages(kind, steps), steps, strict=True):
            g = jnp.asarray(rng.normal(size=N))
            chosen = jnp.asarray(rng.uniform(-1, 1.5, pieces.center.shape))
            slope = jnp.where(pieces.free, chosen, pieces.exact)
            t = points
            if pieces.paired:
                a, b = jnp.split(points, 2, axis=-1)
                t = a - b
            rises = jax.vmap(lambda t, p=pieces: p.rise(t, p.rising))(t)
            errors = (rises - slope * (t - pieces.center)) @ pieces.weights(g)
            changes = jax.vmap(act)(points) - act(center)
            carried = (points - center) @ pieces.transposed(slope, g)
            # Where a slope is not free, the inputs that do not count move nothing.
            counted = rule(kind).active(ends[0], ends[2])
            if bool(jnp.all(counted)):
                np.testing.assert_allclose(changes @ g, carried + errors, atol=1e-12)
            points, center = jax.vmap(act)(points), act(center)


SMOOTH = {
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "hard_swish": jax.nn.hard_swish,
    "elu": lambda z: jax.nn.elu(z, -0.5),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_functions_stay_between_their_pieces_and_errors_within_their_cost(x64, name):
    graph = lipjax.trace(SMOOTH[name], jax.ShapeDtypeStruct((N,), jnp.float64))
    rule = graph.nodes[-1].rule
    near = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        center = rng.choice([-4.0, -1.3, -0.4, 0.0, 0.6, 2.5], N)
        lower, upper = center - rng.uniform(0, 2, N), center + rng.uniform(0, 2, N)
        lower[0] = upper[0] = center[0]  # one is still
        (pieces,) = rule.pieces(*map(jnp.asarray, (center, lower, upper)), rounding.OUTWARD)
        points = lower + rng.uniform(0, 1, (400, N)) * (upper - lower)
        rises = np.asarray(SMOOTH[name](points) - SMOOTH[name](center))
        above, below = (
            np.asarray(jax.vmap(lambda t, p=pieces, s=s: p.rise(t, s))(jnp.asarray(points)))
            for s in (pieces.rising, pieces.falling)
        )
        assert np.all(below - 1e-12 <= rises) and np.all(rises <= above + 1e-12)

        radius = rng.uniform(0.1, 2.0)
        w = np.where(np.asarray(pieces.free), rng.normal(size=N), 0.0)
        slope = rng.uniform(-0.5, 1.2, N)
        cost = tight.error_cost(pieces, *map(jnp.asarray, (w, slope, radius)), rounding.OUTWARD)
        inside = np.linalg.norm(points - center, axis=1) <= radius
        errors = (rises - slope * (points - center)) @ w
        most = np.max(errors[inside], initial=0.0)
        assert most <= cost
        near += most > 0.3 * cost
    assert near > 2


@settings(max_examples=80)
@given(
    kind=st.sampled_from(KINDS),
    box=BOXES,
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-3, 0.1, 1.0, 7.0, 1e3]),
)
def test_no_point_of_the_box_is_above_the_closed_maximum_and_one_is_near(kind, box, seed, scale):
    with jax.enable_x64(True):
        _, steps = steps_of(kind, box)
        rng = np.random.default_rng(seed)
        for pieces in steps:
            w = jnp.asarray(rng.normal(size=pieces.center.shape))
            slope = jnp.asarray(rng.uniform(-1, 1.5, pieces.center.shape))
            values, place = pieces.largest(w, slope, scale)
            share = jnp.linspace(0, 1, 4001)[:, None]
            t = pieces.lower + share * (pieces.upper - pieces.lower)
            step = t - pieces.center
            rises = jax.vmap(lambda t, p=pieces: p.rise(t, p.rising))(t)
            found = w * (rises - slope * step) - scale * (pieces.unit * step) ** 2 / 2
            most = jnp.max(found, axis=0)
            assert np.all(most <= values + 1e-12)
            np.testing.assert_allclose(values, jnp.maximum(most, 0), atol=2e-3 * (1 + scale))
            assert np.all(pieces.lower - 1e-12 <= place + pieces.center)
            assert np.all(place + pieces.center <= pieces.upper + 1e-12)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    box=BOXES,
    seed=st.integers(0, 10**6),
    radius=st.sampled_from([1e-3, 0.1, 0.6, 3.0]),
)
def test_no_error_in_ball_and_box_is_above_its_cost(kind, box, seed, radius):
    with jax.enable_x64(True):
        _, steps = steps_of(kind, box)
        rng = np.random.default_rng(seed)
        for pieces in steps:
            w = jnp.where(pieces.free, jnp.asarray(rng.normal(size=pieces.center.shape)), 0.0)
            slope = jnp.asarray(rng.uniform(-0.5, 1.5, pieces.center.shape))
            cost = tight.error_cost(pieces, w, slope, radius, rounding.EXACT)
            step = rng.normal(size=(3000, *pieces.center.shape))
            step *= rng.uniform(0, 1.2, (3000, 1)) * radius / np.linalg.norm(step, axis=1)[:, None]
            step = np.clip(step / pieces.unit, pieces.lower - pieces.center, None)
            step = np.minimum(step, pieces.upper - pieces.center)
            step = step[pieces.unit * np.linalg.norm(step, axis=1) <= radius]
            rises = jax.vmap(lambda t, p=pieces: p.rise(t, p.rising))(pieces.center + step)
            errors = (rises - slope * step) @ w
            assert np.max(np.asarray(errors), initial=0.0) <= cost + 1e-12


COMPARED = {
    "sort": lipjax.activations.Sort(0),
    # Entries are in up to three windows; the first and the last hold what pads.
    "pool": lipjax.activations.MaxPool((N,), (3,), (1,), ((1, 1),), (1,)),
}


@pytest.mark.parametrize("kind", COMPARED)
def test_what_comparators_say_of_a_row_holds_in_ball_and_box_for_any_slopes(x64, kind):
    """The value's change is what the row in front says of the input's, and the cost of stages."""
    rule = COMPARED[kind]

    @jax.jit
    def carried(center, lower, upper, g, radius, given):
        steps = rule.pieces(center, lower, upper, rounding.OUTWARD)
        total = 0.0
        for pieces in reversed(steps):
            shape = pieces.center.shape
            slope = jnp.where(pieces.free, given[: pieces.center.size].reshape(shape), pieces.exact)
            w = pieces.weights(g)
            total += tight.error_cost(pieces, w, slope, radius, rounding.OUTWARD)
            g = pieces.transposed(slope, g)
        return g, total

    near = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        center = rng.choice([-0.5, -0.2, 0.0, 0.1, 0.4], N)
        width = rng.choice([0.1, 0.5])
        still = rng.uniform(size=N) < 0.25
        lower, upper = (
            np.where(still, center, center + side * rng.uniform(0, width, N)) for side in (-1, 1)
        )
        g = rng.normal(size=rule(center).shape)
        g = np.abs(g) if seed % 2 else g
        radius = rng.choice([0.02, 0.2, 0.6])
        row, cost = carried(center, lower, upper, g, radius, rng.uniform(-1, 1.2, 4 * N))
        moves = rng.normal(size=(2000, N))
        moves *= radius * rng.uniform(0, 2, (2000, 1)) / np.linalg.norm(moves, axis=1)[:, None]
        # One entry alone moves all of its windows; and groups of entries all at once.
        moves[: 2 * N] = radius * np.concatenate([np.eye(N), -np.eye(N)])
        signs = np.array(list(itertools.product([-1, 0, 1], repeat=N)))[1:]
        moves[2 * N :][: len(signs)] = radius * signs / np.sqrt(N)
        points = np.clip(center + moves, lower, upper)
        counted = np.asarray(rule.active(jnp.asarray(lower), jnp.asarray(upper)))
        points = points[np.linalg.norm((points - center)[:, counted], axis=1) <= radius]
        values = np.asarray(jax.vmap(rule)(points)) - np.asarray(rule(jnp.asarray(center)))
        errors = values @ g - (points - center) @ np.asarray(row)
        assert np.max(errors) <= cost + 1e-12
        near += np.max(errors) > 0.5 * cost
    assert near > 6


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_comparators_sort_whatever_a_block_holds(size):
    """By the 0-1 principle (Knuth, TAOCP 3, 5.3.4): what sorts zeros and ones sorts all."""
    for held in range(1, size + 1):
        z = np.array(list(itertools.product([0, 1], repeat=held)))
        for merged, distance in groupsort.stages(size):
            (starts,) = np.nonzero(groupsort.comparators(np.arange(held), merged, distance))
            for i in (i for i in starts if i + distance < held):
                z[:, [i, i + distance]] = np.sort(z[:, [i, i + distance]], axis=1)
        assert np.all(np.diff(z, axis=1) >= 0)


def exact_cost(pieces, w, slope, radius, scale, weight=1):
    """The right-hand side of METHOD 8 in rationals, pieces of exact numbers, not paired.

    Args:
        weight: whole, of each coordinate: one over the square of its unit.
    """
    total = scale * radius**2 / 2
    z, lower, upper, weight, *kinks = (
        np.broadcast_to(end, np.shape(w)).reshape(-1)
        for end in (pieces.center, pieces.lower, pieces.upper, weight, *pieces.kinks)
    )
    rising = [np.broadcast_to(p, np.shape(w)).reshape(-1) for p in pieces.rising]
    for i, (own, taken) in enumerate(zip(w.reshape(-1), slope.reshape(-1), strict=True)):
        if own == 0:
            continue
        some = [Fraction(float(k[i])) for k in kinks if np.isfinite(k[i])]
        slopes = [Fraction(float(p[i])) for p in rising][: len(some) + 1]
        ends = (Fraction(float(end[i])) for end in (z, lower, upper))
        total += exact_largest(*ends, some, slopes, own, taken, scale / int(weight[i]))
    return total


def exact_largest(z, low, high, kinks, slopes, w, slope, scale):
    """The largest ``w e(t) - scale t^2 / 2`` over one coordinate's box."""

    def rise(t):
        ends = [min(z, t) - 1, *kinks, max(z, t) + 1]
        total = Fraction(0)
        for start, end, p in zip(ends[:-1], ends[1:], slopes, strict=True):
            total += p * (min(max(t, start), end) - min(max(z, start), end))
        return total

    best = Fraction(0)
    cuts = sorted({low, high, *(k for k in kinks if low < k < high)})
    for start, end in itertools.pairwise(cuts):
        p = (rise(end) - rise(start)) / (end - start)
        step = min(max(w * (p - slope) / scale, start - z), end - z)
        best = max(best, w * (rise(z + step) - slope * step) - scale * step**2 / 2)
    return best


@settings(max_examples=60)
@given(
    kind=st.sampled_from(("relu", "clipped_relu", "abs", "leaky", "steep", *COMPARED)),
    box=BOXES,
    seed=st.integers(0, 10**6),
    radius=st.sampled_from([1e-9, 0.1, 0.7, 1e3]),
    size=st.sampled_from([1e-8, 1.0, 1e9]),
)
def test_the_cost_rounded_outwards_is_at_least_the_exact_one(kind, box, seed, radius, size):
    with jax.enable_x64(True):
        if kind in COMPARED:
            lower, center, upper = (jnp.asarray(end) for end in np.sort(np.array(box), axis=1).T)
            stages = COMPARED[kind].pieces(center, lower, upper, rounding.OUTWARD)
        else:
            _, stages = steps_of(kind, box, rounding.OUTWARD)
        rng = np.random.default_rng(seed)
        for pieces in stages:
            shape = pieces.center.shape
            w = jnp.where(pieces.free, jnp.asarray(size * rng.normal(size=shape)), 0.0)
            slope = jnp.asarray(rng.uniform(-0.5, 1.5, shape))
            cost = float(tight.error_cost(pieces, w, slope, radius, rounding.OUTWARD))
            scale = Fraction(float(tight.best_scale(pieces, w, slope, jnp.asarray(radius))))
            exact = np.vectorize(lambda v: Fraction(float(v)), otypes=[object])
            # Of comparators the sum of two numbers of windows.
            weight = np.round(1 / np.square(np.asarray(pieces.unit, float)))
            wanted = exact_cost(pieces, exact(w), exact(slope), Fraction(radius), scale, weight)
            assert Fraction(cost) >= wanted
            assert Fraction(cost) <= wanted * (1 + Fraction(1, 10**9)) + Fraction(size) / 10**9


@settings(max_examples=40)
@given(kind=st.sampled_from(KINDS), box=BOXES, seed=st.integers(0, 10**6))
def test_sizes_cover_all_that_is_added_up_in_a_value(kind, box, seed):
    """Of each piece that the values at its ends pass: its rise, the slope over the whole step."""
    with jax.enable_x64(True):
        _, steps = steps_of(kind, box)
        rng = np.random.default_rng(seed)
        for pieces in steps:
            w, slope = rng.normal(size=(2, *pieces.center.shape))
            found = np.asarray(pieces.sizes(jnp.asarray(w), jnp.asarray(slope)))
            reach = np.maximum(pieces.upper - pieces.center, pieces.center - pieces.lower)
            rises = sum(np.abs(p) * reach for p in pieces.rising)
            assert np.all(found >= np.abs(w) * (rises + np.abs(slope) * reach) * (1 - 1e-12))


# ------------------------------------------------------------------------------------------ margins


def gains(net, x, epsilon, label, *, mode="tight", arithmetic=rounding.EXACT):
    bound = lipjax.bound(net, x, epsilon, mode=mode, iterations=200)
    return lipjax.worst_logits(bound, label, arithmetic) - bound.logits


@functools.cache
def compiled(mode):
    return jax.jit(functools.partial(gains, mode=mode))


@pytest.mark.parametrize("kind", ["relu", "clipped_relu", "maxmin", "clipped_maxmin"])
def test_margins_hold_on_samples_and_are_at_most_those_of_local_and_linear(x64, kind):
    net, rng = cast64(tiny_net(kind, seed=4)), np.random.default_rng(0)
    smaller = 0
    for x in jnp.asarray(rng.uniform(0, 1, (3, 6, 6, 2))):
        for epsilon in (0.01, 0.1, 0.4):
            found, local, linear = (
                np.asarray(compiled(mode)(net, x, epsilon, 2))
                for mode in ("tight", "local", "linear")
            )
            assert np.all(found <= np.minimum(local, linear) + 1e-12) and found[2] == 0
            smaller += np.sum(found < 0.9 * local)
            steps = rng.normal(size=(400, 6, 6, 2))
            # The worst direction to first order, and random ones.
            gradient = jax.jacobian(lambda x: net(x) - net(x)[2])(x)
            steps[:4] = np.asarray(gradient) + 1e-12
            steps *= epsilon / np.linalg.norm(steps.reshape(400, -1), axis=1)[:, None, None, None]
            logits = jax.vmap(net)(x + jnp.asarray(steps))
            moved = (logits - logits[:, 2:3]) - (net(x) - net(x)[2])
            assert np.all(np.max(np.asarray(moved), axis=0) <= found + 1e-9)
    assert smaller >= 9  # of 27: they are not only never worse


@pytest.mark.parametrize("kind", ["relu", "clipped_relu", "maxmin", "clipped_maxmin"])
def test_boxes_by_rows_with_one_sided_errors_hold_on_samples_and_are_smaller(x64, kind):
    net, rng = cast64(tiny_net(kind, seed=4)), np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(0, 1, (6, 6, 2)))
    for epsilon in (0.02, 0.2):
        graph = trace(net, x)
        found = outward_bound(graph, x, epsilon, "tight_rows")
        local = outward_bound(graph, x, epsilon, "local")
        steps = rng.normal(size=(600, 6, 6, 2))
        gradient = jax.jacobian(net)(x)
        steps[:4], steps[4:8] = gradient, -gradient
        steps *= epsilon / np.linalg.norm(steps.reshape(600, -1), axis=1)[:, None, None, None]
        for k, (region, other) in enumerate(zip(found.regions, local.regions, strict=True), 1):
            points = jax.vmap(dataclasses.replace(graph, nodes=graph.nodes[:k]))(x + steps)
            assert np.all(points >= region.lower) and np.all(points <= region.upper)
            assert np.all(region.lower >= other.lower - 1e-9)
            assert np.all(region.upper <= other.upper + 1e-9)
        # Both ends by themselves: a convex function's error has one sign.
        place = graph.linear[-2]
        region = found.regions[place]
        up, down = region.upper - region.center, region.center - region.lower
        assert kind == "maxmin" or np.max(np.abs(up - down)) > 1e-3 * np.max(up)


def test_gains_rounded_outwards_are_above_the_others_and_close(x64):
    net = cast64(tiny_net("clipped_maxmin", seed=8))
    x = jnp.asarray(np.random.default_rng(2).uniform(0, 1, (6, 6, 2)))
    outward = jax.jit(functools.partial(gains, arithmetic=rounding.OUTWARD))
    for epsilon in (1e-3, 0.2):
        plain = compiled("tight")(net, x, epsilon, 0)
        above = outward(net, x, epsilon, 0)
        assert np.all(above[1:] > plain[1:])
        assert np.all(above <= plain * (1 + 1e-6) + 1e-10)


def test_any_slopes_give_margins_that_hold_and_their_gradient_is_that_of_differences(x64):
    # (At a kink of the dual in the scale, which nets of MaxMin meet, it is one of several.)
    net, rng = cast64(tiny_net("relu", seed=5)), np.random.default_rng(3)
    x, epsilon = jnp.asarray(rng.uniform(0, 1, (6, 6, 2))), 0.2
    bound = lipjax.bound(net, x, epsilon, mode="tight", iterations=200)
    row = margins.directions(bound.graph, bound.penultimate, 1)[0]
    (end,) = bound.graph.nodes[-1].inputs
    parts = (bound.graph, lambda operator, like: operator, rounding.EXACT)
    parts = (*parts, bound.regions, bound.radii, end)

    def gain(slopes):
        return tight.OneSided(*parts, given=slopes).gain(row)

    first = tight.OneSided(*parts)
    least = float(first.gain(row))
    worst = -np.inf
    for step in rng.normal(size=(300, 6, 6, 2)):
        moved = x + jnp.asarray(epsilon * step / np.linalg.norm(step))
        change = net(moved) - net(x)
        worst = max(worst, float(change[0] - change[1]))

    value = jax.jit(jax.value_and_grad(gain))
    for _ in range(5):
        slopes = jax.tree.map(lambda s: jnp.asarray(rng.uniform(0, 1, s.shape)), first.taken)
        found, gradient = value(slopes)
        assert found >= worst
        way = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), slopes)
        ahead, behind = (
            gain(jax.tree.map(lambda s, d, h=h: s + h * d, slopes, way)) for h in (1e-6, -1e-6)
        )
        slope = sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), gradient, way)))
        np.testing.assert_allclose((ahead - behind) / 2e-6, slope, rtol=2e-2, atol=1e-4)
    assert least >= worst


def test_a_nan_spreads_to_the_margin_and_epsilon_zero_is_exact(x64):
    net = cast64(tiny_net("relu", seed=4))
    x = jnp.full((6, 6, 2), 0.5)
    assert np.all(np.isnan(np.asarray(compiled("tight")(net, x.at[0].set(jnp.nan), 0.1, 0))[1:]))
    np.testing.assert_allclose(compiled("tight")(net, x, 0.0, 0), 0, atol=1e-12)
    assert np.all(np.isfinite(compiled("tight")(net, x, 50.0, 0)))


@pytest.mark.parametrize("steep", [1.0, 10.0])
def test_what_rounds_pays_for_its_center_and_a_steep_one_leaves_over_more(x64, steep):
    first, last = np.random.default_rng(0).normal(size=(2, 3, 3))
    shares = []

    def f(x):
        h = first @ x
        return last @ jnp.where(h > 0, steep * h, 0.3 * h)

    class Recording(rounding.Outward):
        def left_over(self, relative, g, length):
            shares.append(relative)
            return super().left_over(relative, g, length)

    graph = lipjax.trace(f, jnp.zeros(3))
    bound = outward_bound(graph, np.full(3, 0.2), 0.0, "local")
    (end,) = graph.nodes[-1].inputs
    parts = (graph, lambda operator, like: operator, Recording(), bound.regions, bound.radii, end)
    back = tight.OneSided(*parts)
    row = jnp.full(3, 1e12)
    found = back.gain(row)
    assert end in back.taken
    # Nothing moves, but what is the center was rounded by that much.
    rule, center = graph.nodes[end].rule, bound.regions[end].center
    assert found >= jnp.sum(row * rule.evaluation_error(center)) > 0
    # A row carried back through it is longer by that much, and so is what is rounded of it.
    assert 8 * rounding.DOUBLE * steep**3 in shares
