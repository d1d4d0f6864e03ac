"""Slopes and what is made of them: chords against every chord, rows against the gradient, margins
against sampling."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ACTIVATIONS, cast64, largest_by_bisection, make_activation, tiny_net
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lipjax
from benchmarks import gap
from lipjax import activations, bounds, rounding
from lipjax.bounds import relaxed

N = 6


def activation(kind):
    return cast64(make_activation(kind, N, threshold=0.5))


def rule(kind):
    """What is known of that activation."""
    (_, node) = lipjax.trace(activation(kind), jax.ShapeDtypeStruct((N,), jnp.float64)).nodes
    return node.rule


@functools.partial(jax.jit, static_argnames="outward")
def chords(act, center, lower, upper, radius, outward=False):
    after = bounds.Region(act(center), radius, *act.interval(lower, upper))
    arithmetic = rounding.OUTWARD if outward else rounding.EXACT
    return act.relaxations(center, lower, upper, radius, after, arithmetic)


def errors(act, found, center, points):
    """The coordinates of e for each piece, and what of the last piece's error lies outside of
    them."""
    inside = (
        [(lipjax.MaxMin(), found[0]), (act, found[-1])] if len(found) == 2 else [(act, found[0])]
    )
    z, z0, result = points, center, []
    for function, chord in inside:
        # The clipped MaxMin is the identity on what a MaxMin has put in order, but for its
        # clipping.
        out, out0 = jax.vmap(function)(z), function(z0)
        e = (out - out0) - jax.vmap(chord.transposed)(z - z0)
        along = jax.vmap(chord.error_weights)(e)
        back = along if not chord.paired else jnp.concatenate([along, -along], axis=-1) / np.sqrt(2)
        np.testing.assert_allclose(back, e, atol=1e-12)
        result.append(np.asarray(along))
        z, z0 = out, out0
    return result


# Few values, so that ends, centers and kinks often coincide.
GRID = st.sampled_from([-1.0, -0.5, -0.3, 0.0, 0.2, 0.5, 0.7, 1.0])


@settings(max_examples=60)
@given(
    kind=st.sampled_from(ACTIVATIONS),
    ends=st.lists(st.tuples(GRID, GRID, GRID), min_size=N, max_size=N),
)
def test_no_chord_of_the_box_is_further_from_the_slope_than_the_width_and_one_is_that_far(
    kind, ends
):
    with jax.enable_x64(True):
        lower, center, upper = (jnp.asarray(end) for end in np.sort(np.array(ends), axis=1).T)
        farthest = jnp.linalg.norm(jnp.maximum(upper - center, center - lower))
        found = chords(rule(kind), center, lower, upper, farthest)
        steps = np.random.default_rng(0).choice([0.0, 0.02, 0.3, 0.5, 0.77, 1.0], (400, N))
        points = lower + jnp.asarray(steps) * (upper - lower)
        pieces = errors(activation(kind), found, center, points)
        for chord, along in zip(found, pieces, strict=True):
            assert np.all(np.abs(along) <= chord.reach + 1e-12)
            assert np.all(np.linalg.norm(along, axis=1) <= chord.radius + 1e-12)
            assert np.all((chord.width >= 0) & (chord.width <= 1) & (np.abs(chord.slope) <= 1))
        (first, *_), along = found, pieces[0]
        if first.paired:
            a, b = jnp.split(points - center, 2, axis=-1)
            change = (a - b) / np.sqrt(2)
        else:
            change = points - center
        slope = np.where(
            np.abs(change) > 1e-9, np.abs(along) / np.maximum(np.abs(change), 1e-9), 0.0
        )
        # its steepest chord may end at the corner of the clip, which no sample hits
        if kind != "clipped_relu":
            np.testing.assert_allclose(
                np.max(slope, axis=0),
                np.where(np.max(np.abs(change), axis=0) > 0, first.width, 0),
                atol=0.03,
            )


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), radius=st.floats(1e-3, 10))
def test_the_quick_largest_product_is_never_below_the_maximum_nor_above_ball_and_box(seed, radius):
    rng = np.random.default_rng(seed)
    d, reach = rng.normal(size=12), rng.uniform(0, 1, 12) * (rng.uniform(size=12) < 0.7)
    with jax.enable_x64(True):
        found = float(
            relaxed.largest_product(jnp.asarray(d), jnp.asarray(reach), radius, rounding.EXACT)
        )
    least = largest_by_bisection(d, radius, -reach, reach)
    most = min(radius * np.linalg.norm(d), np.abs(d) @ reach)
    assert least * (1 - 1e-9) <= found <= most * (1 + 1e-9)


def test_a_chord_from_the_flat_part_is_steepest_at_the_far_corner(x64):
    z, lower, upper = (jnp.full(N, value) for value in (-0.25, -0.5, 2.0))
    (chord,) = chords(rule("clipped_relu"), z, lower, upper, 10.0)
    # To 0.5, the corner: 0.5 / 0.75; to 2: 0.5 / 2.25; to the left: 0.
    np.testing.assert_allclose(chord.slope, 1 / 3)
    np.testing.assert_allclose(chord.width, 1 / 3)
    np.testing.assert_allclose(chord.reach, 2.25 / 3)


def test_of_an_activation_that_only_has_a_box_rule_all_is_error(x64):
    @jax.jit
    def my_tanh(z):
        return jnp.tanh(z)

    @activations.rule()
    class Tanh(activations.Rule):
        def __call__(self, z):
            return jnp.tanh(z)

    activations.register(my_tanh, Tanh)
    rngs = nnx.Rngs(0)
    net = cast64(nnx.Sequential(nnx.Linear(4, 5, rngs=rngs), my_tanh, nnx.Linear(5, 3, rngs=rngs)))
    x = jnp.asarray([0.1, 0.5, 0.3, 0.9])
    found = {
        mode: lipjax.bound(net, x, 0.1, mode=mode, iterations=200) for mode in ("local", "linear")
    }
    worst = {mode: lipjax.worst_logits(bound, 1) for mode, bound in found.items()}
    np.testing.assert_allclose(worst["linear"], worst["local"], rtol=1e-9)


# ------------------------------------------------------------------------------------------ margins


def gains(net, x, epsilon, label, *, mode="linear", iterations=400, arithmetic=rounding.EXACT):
    bound = lipjax.bound(net, x, epsilon, mode=mode, iterations=iterations)
    return lipjax.worst_logits(bound, label, arithmetic) - bound.logits


@functools.cache
def compiled(mode):
    return jax.jit(functools.partial(gains, mode=mode))


@pytest.mark.parametrize("kind", ["clipped_relu", "clipped_maxmin"])
def test_margins_hold_on_samples_and_are_at_most_those_of_local(x64, kind):
    net, rng = cast64(tiny_net(kind, seed=4)), np.random.default_rng(0)
    smaller, smallest = 0, 0
    for x in jnp.asarray(rng.uniform(0, 1, (3, 6, 6, 2))):
        for epsilon in (0.01, 0.1, 0.4):
            rows, linear, local = (
                np.asarray(compiled(mode)(net, x, epsilon, 2))
                for mode in ("rows", "linear", "local")
            )
            assert (
                np.all(linear <= local + 1e-12)
                and np.all(rows <= local + 1e-12)
                and rows[2] == linear[2] == 0
            )
            smaller += np.sum(linear < 0.9 * local)
            smallest += np.sum(rows < 0.97 * linear)
            steps = rng.normal(size=(400, 6, 6, 2))
            # The worst direction to first order, and random ones.
            gradient = jax.jacobian(lambda x: net(x) - net(x)[2])(x)
            steps[:4] = np.asarray(gradient) + 1e-12
            steps *= epsilon / np.linalg.norm(steps.reshape(400, -1), axis=1)[:, None, None, None]
            logits = jax.vmap(net)(x + jnp.asarray(steps))
            moved = (logits - logits[:, 2:3]) - (net(x) - net(x)[2])
            assert np.all(np.max(np.asarray(moved), axis=0) <= np.minimum(rows, linear) + 1e-9)
    assert smaller >= 6 and smallest >= 6  # of 27: they are not only never worse


def test_with_few_rivals_the_strongest_are_tightened_and_the_others_left(x64):
    net, x = (
        cast64(tiny_net("relu", seed=4)),
        jnp.asarray(np.random.default_rng(0).uniform(0, 1, (6, 6, 2))),
    )

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def worst(mode, rivals=None):
        bound = lipjax.bound(net, x, 0.05, mode=mode, iterations=100, rivals=rivals)
        return lipjax.worst_logits(bound, 2)

    every, some, none = (
        np.asarray(worst(*which)) for which in (("linear",), ("linear", 2), ("local",))
    )
    strongest = np.argsort(np.where(np.arange(4) == 2, -np.inf, none))[-2:]
    for k in range(4):
        np.testing.assert_allclose(some[k], every[k] if k in strongest else none[k], rtol=1e-12)
    assert np.all(every[strongest] < none[strongest])
    with pytest.raises(ValueError, match=r"rivals.*0"):
        worst("linear", 0)


@pytest.mark.parametrize("kind", ["relu", "clipped_maxmin"])
def test_on_a_small_ball_the_margin_is_the_exact_norm_of_the_gradient(x64, kind):
    net, x = (
        cast64(tiny_net(kind, seed=6)),
        jnp.asarray(np.random.default_rng(1).uniform(0, 1, (6, 6, 2))),
    )
    epsilon = 1e-5
    gradient = jax.jacobian(lambda x: net(x) - net(x)[1])(x)
    wanted = np.linalg.norm(np.asarray(gradient).reshape(4, -1), axis=1)
    for mode in ("linear", "rows"):
        np.testing.assert_allclose(compiled(mode)(net, x, epsilon, 1) / epsilon, wanted, rtol=1e-3)
    local = compiled("local")(net, x, epsilon, 1) / epsilon
    # which the product of norms is not
    assert np.max(local / np.maximum(wanted, 1e-9) * (wanted > 0)) > 1.5


def test_gains_rounded_outwards_are_above_the_others_and_close(x64):
    net, x = (
        cast64(tiny_net("clipped_maxmin", seed=8)),
        jnp.asarray(np.random.default_rng(2).uniform(0, 1, (6, 6, 2))),
    )
    outward = jax.jit(functools.partial(gains, arithmetic=rounding.OUTWARD))
    for epsilon in (1e-3, 0.2):
        plain, above = compiled("linear")(net, x, epsilon, 0), outward(net, x, epsilon, 0)
        assert np.all(above[1:] > plain[1:]) and np.all(above <= plain * (1 + 1e-6) + 1e-10)


def test_on_a_ball_as_large_as_everything_the_margin_is_finite_and_at_most_that_of_local():
    net, x = tiny_net("relu", seed=9), jnp.full((6, 6, 2), 0.5)
    linear, local = (np.asarray(compiled(mode)(net, x, 50.0, 0)) for mode in ("linear", "local"))
    assert np.all(linear <= local) and np.all(np.isfinite(linear))


@pytest.mark.parametrize("kind", ["clipped_relu", "clipped_maxmin"])
def test_no_neuron_leaves_the_box_that_its_own_row_has_cut(x64, kind):
    net, rng = cast64(tiny_net(kind, seed=4)), np.random.default_rng(1)
    bound = jax.jit(
        lambda mode, x, epsilon: lipjax.bound(net, x, epsilon, mode=mode, iterations=400),
        static_argnums=0,
    )
    narrower = []
    for epsilon in (0.05, 0.4):
        x = jnp.asarray(rng.uniform(0, 1, (6, 6, 2)))
        local, rows = bound("local", x, epsilon), bound("rows", x, epsilon)
        h = [
            x + jnp.asarray(epsilon * step / np.linalg.norm(step))
            for step in rng.normal(size=(300, 6, 6, 2))
        ]
        # For each neuron of the second convolution and for the hidden layer, the ways that change
        # it most to first order.
        for depth in (3, 6):
            first = nnx.Sequential(*net.layers[:depth])
            slopes_ = jax.jacobian(lambda x, first=first: first(x))(x)
            for slope in np.asarray(slopes_).reshape(-1, 6, 6, 2):
                h += [
                    x + side * epsilon * slope / max(np.linalg.norm(slope), 1e-9)
                    for side in (-1, 1)
                ]
        h = jnp.stack(h)
        for layer, wide, cut in zip(
            net.layers[:-1], local.regions[1:], rows.regions[1:], strict=False
        ):
            h = jax.vmap(layer)(h)
            assert np.all(cut.lower - 1e-9 <= h) and np.all(h <= cut.upper + 1e-9)
            assert np.all(cut.upper - cut.lower <= wide.upper - wide.lower + 1e-12)
            assert cut.radius <= wide.radius * (1 + 1e-9)
        narrower.append(jnp.mean(cut.upper - cut.lower) / jnp.mean(wide.upper - wide.lower))
    assert min(narrower) < 0.9


def test_more_is_certified_of_a_net_that_was_not_trained_for_masks():
    rngs = nnx.Rngs(3)
    sizes = (12, 24, 24, 4)
    layers = [
        nnx.Linear(n, m, rngs=rngs, bias_init=jax.nn.initializers.normal(0.3))
        for n, m in itertools.pairwise(sizes)
    ]
    net = nnx.Sequential(layers[0], lipjax.ReLU(), layers[1], lipjax.ReLU(), layers[2])
    x, epsilon = np.random.default_rng(3).uniform(0, 1, (60, 12)).astype(np.float32), 0.1
    local, linear, rows = (
        lipjax.certify(net, x, None, epsilon, tier="deterministic", mode=mode)
        for mode in ("local", "linear", "rows")
    )
    assert np.all(linear.margin >= local.margin - 1e-9) and np.all(
        rows.margin >= local.margin - 1e-9
    )
    counts = [np.sum(found.certified) for found in (local, linear, rows)]
    assert counts[0] + 5 < counts[1] < counts[2], counts
    certified = rows.certified | linear.certified
    attack = lipjax.attacks.pgd(
        net, x[certified], rows.predicted[certified], epsilon, restarts=10, clip=None
    )
    assert not attack.broken.any()
    assert np.all(
        lipjax.attacks.smallest(net, x, rows.predicted, clip=None).distance[certified] > epsilon
    )


def test_no_bound_is_below_what_an_attack_finds_and_the_linear_part_is_at_most_the_product():
    rngs, bias = nnx.Rngs(5), jax.nn.initializers.normal(0.2)
    net = nnx.Sequential(
        nnx.Linear(5, 8, rngs=rngs, bias_init=bias),
        lipjax.MaxMin(),
        nnx.Linear(8, 8, rngs=rngs, bias_init=bias),
        lipjax.ReLU(),
        nnx.Linear(8, 3, rngs=rngs),
    )
    x = np.random.default_rng(5).uniform(0, 1, (6, 5)).astype(np.float32)
    found = gap.gaps(net, x, np.zeros(6, np.int32), 0.1, jax.random.key(0))
    ratios = [value for name, value in found.items() if name.startswith(("Lipschitz", "margin"))]
    assert (
        len(ratios) == 2 + len(bounds.MODES)
        and min(ratios) >= 1 - 1e-3
        and found["lower bound"] > 0
    )
    assert found["linear part"] <= 1 + 1e-3
    assert found["margin, global"] > found["margin, local"] > found["margin, rows"]


def test_a_nan_spreads_to_the_margin_and_epsilon_zero_is_exact(x64):
    net, x = (
        cast64(tiny_net("clipped_relu")),
        jnp.asarray(np.random.default_rng(5).uniform(0, 1, (6, 6, 2))),
    )
    assert np.all(np.asarray(compiled("linear")(net, x, 0.0, 0)) == 0)
    assert np.all(
        np.isnan(np.asarray(compiled("linear")(net, x.at[0, 0, 0].set(jnp.nan), 0.1, 0))[1:])
    )
    assert np.isnan(bounds.margin(jnp.array([1.0, jnp.nan]), 0))
