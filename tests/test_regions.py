"""Regions and bounds: against explicit matrices, sampling, the golden cases, and the order of the
modes."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ACTIVATIONS, cast64, dense_matrix, tiny_net
from flax import nnx

import lipjax
from lipjax import bounds, losses
from lipjax.graph import Activation, TraceError

CONVERGED = 400
KEY = jax.random.key(5)
# Each mode with the activations whose rules it treats in its own way; compiling is what these tests
# cost.
CASES = [
    *((a, "local") for a in ACTIVATIONS),
    ("clipped_relu", "paper"),
    ("clipped_maxmin", "paper"),
    ("clipped_maxmin", "bcp"),
    ("relu", "global"),
]


@functools.partial(jax.jit, static_argnames=("mode", "iterations"))
def jitted_bound(net, x, epsilon, *, mode="local", iterations=CONVERGED):
    return lipjax.bound(net, x, epsilon, mode=mode, iterations=iterations)


jitted_worst = jax.jit(lipjax.worst_logits)


def images(count, seed=0, shape=(6, 6, 2)):
    return np.random.default_rng(seed).uniform(0, 1, (count, *shape))


@pytest.mark.parametrize("activation, mode", CASES)
def test_each_norm_is_the_spectral_norm_of_the_explicit_masked_matrix(x64, activation, mode):
    net, x, epsilon = cast64(tiny_net(activation)), jnp.asarray(images(1)[0]), 0.15
    bound = jitted_bound(net, x, epsilon, mode=mode, iterations=4000)
    nodes = bound.graph.nodes
    for k, i in enumerate(bound.graph.linear[:-1]):
        before = bound.regions[nodes[i].inputs[0]]
        matrix = dense_matrix(nodes[i].operator, before.center.shape)
        if mode not in ("global", "bcp"):
            columns = np.asarray(before.varies).reshape(-1)
            assert isinstance(nodes[i + 1], Activation)
            rows = naive_rows(activation, bound.regions[i], nodes[i + 1].rule, mode)
            matrix = matrix[rows][:, columns]
        expected = np.linalg.svd(matrix, compute_uv=False)[0] if matrix.size else 0.0
        np.testing.assert_allclose(bound.norms[k], expected, rtol=1e-6)
    np.testing.assert_allclose(bound.lipschitz, np.prod(bound.norms), rtol=1e-12)


def naive_rows(activation, region, layer, mode):
    """Which rows matter, found one neuron at a time from the definition."""
    lower, upper = np.asarray(region.lower), np.asarray(region.upper)
    varies = np.asarray(layer(region.lower)) != np.asarray(layer(region.upper))
    if "relu" in activation:
        return varies.reshape(-1)
    if mode == "paper":
        return np.ones(lower.size, bool)
    rows, half = np.zeros(lower.shape, bool), lower.shape[-1] // 2
    for index in np.ndindex(*lower.shape[:-1], half):
        a, b = index, (*index[:-1], index[-1] + half)
        if lower[a] >= upper[b]:
            rows[a], rows[b] = varies[a], varies[b]
        elif lower[b] >= upper[a]:
            rows[b], rows[a] = varies[a], varies[b]
        else:
            rows[a] = rows[b] = varies[a] | varies[b]
    return rows.reshape(-1)


@pytest.mark.parametrize("activation, mode", CASES)
def test_every_region_contains_what_sampling_reaches(x64, activation, mode):
    net, epsilon = cast64(tiny_net(activation, seed=1)), 0.3
    rng = np.random.default_rng(2)
    for x in jnp.asarray(images(3, seed=1)):
        bound = jitted_bound(net, x, epsilon, mode=mode)
        directions = rng.normal(size=(300, *x.shape))
        directions *= (
            epsilon / np.linalg.norm(directions.reshape(300, -1), axis=1)[:, None, None, None]
        )
        h = x + jnp.asarray(directions)
        for layer, region in zip(net.layers, bound.regions[1:], strict=True):
            h = jax.vmap(layer)(h)
            moved = np.linalg.norm(np.asarray(h - region.center).reshape(300, -1), axis=1)
            assert np.all(region.radius * (1 + 1e-6) - moved >= 0)
            assert np.all(np.asarray(h) >= np.asarray(region.lower) - 1e-12)
            assert np.all(np.asarray(h) <= np.asarray(region.upper) + 1e-12)


@pytest.mark.parametrize("activation", ["relu", "clipped_maxmin"])
def test_local_is_at_most_paper_is_at_most_bcp_is_at_most_global(x64, activation):
    net = cast64(tiny_net(activation, seed=3))
    for x, epsilon in itertools.product(jnp.asarray(images(4, seed=4)), [0.01, 0.1, 0.5, 2.0]):
        found = [jitted_bound(net, x, epsilon, mode=m) for m in ("local", "paper", "bcp", "global")]
        margins = [jitted_worst(b, 0) for b in found]
        for smaller, larger, tight, loose in zip(
            found, found[1:], margins, margins[1:], strict=False
        ):
            assert smaller.lipschitz <= larger.lipschitz * (1 + 1e-6)
            assert smaller.penultimate.radius <= larger.penultimate.radius * (1 + 1e-6)
            assert np.all(tight <= loose + 1e-6 * np.abs(loose).max())


def test_masks_bite_in_the_nets_of_these_tests(x64):
    """Otherwise the tests above would compare equal things."""
    for activation in ("clipped_relu", "clipped_maxmin"):
        net, x = cast64(tiny_net(activation)), jnp.asarray(images(1)[0])
        local, glob = (jitted_bound(net, x, 0.15, mode=m) for m in ("local", "global"))
        assert local.lipschitz < 0.9 * glob.lipschitz


@pytest.mark.parametrize("mode", ["paper", "rows"])
def test_gradient_of_the_bound_is_that_of_finite_differences(x64, mode):
    net, x = cast64(tiny_net("clipped_relu", seed=5)), jnp.asarray(images(1, seed=5)[0])

    @jax.jit
    def objective(net):
        bound = lipjax.bound(net, x, 0.1, mode=mode, iterations=800, key=KEY)
        return jnp.max(lipjax.worst_logits(bound, 1)) + bound.lipschitz + losses.sparsity(bound)

    gradient = jax.grad(objective)(net)
    leaves, structure = jax.tree.flatten(net)
    slopes = jax.tree.leaves(gradient)
    rng = np.random.default_rng(0)
    for i, (leaf, slope) in enumerate(zip(leaves, slopes, strict=True)):
        direction = jnp.asarray(rng.normal(size=leaf.shape))
        h = 1e-6

        def shifted(sign, i=i, direction=direction, h=h):
            moved = [v + sign * h * direction if j == i else v for j, v in enumerate(leaves)]
            return objective(jax.tree.unflatten(structure, moved))

        numeric = (shifted(1) - shifted(-1)) / (2 * h)
        np.testing.assert_allclose(jnp.sum(slope * direction), numeric, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize(
    "activation, mode",
    [
        # "linear" and "rows" walk as "local" does.
        *(
            ("clipped_relu", "local"),
            ("maxmin", "local"),
            ("clipped_maxmin", "paper"),
            ("clipped_relu", "global"),
        ),
        *(("clipped_maxmin", "linear"), ("relu", "rows")),
    ],
)
def test_value_and_gradient_are_finite_in_degenerate_cases(activation, mode):
    plain, x = tiny_net(activation), jnp.asarray(images(1)[0], jnp.float32)
    masked = tiny_net(activation)
    for layer in masked.layers:  # far below 0: every ReLU is off, every clipped pair half constant
        if hasattr(layer, "bias"):
            layer.bias[...] = layer.bias[...] - 100.0
    zero = jax.tree.map(jnp.zeros_like, plain)

    def objective(net, epsilon):
        bound = lipjax.bound(net, x, epsilon, mode=mode, iterations=2, key=KEY)
        loss = losses.bcp(bound, 0, 0.3) + losses.gloro(bound, 1) + losses.sparsity(bound)
        return loss, (bound, lipjax.worst_logits(bound, 0))

    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    for case, net, epsilon in (
        ("epsilon 0", plain, 0.0),
        ("all masked", masked, 0.2),
        ("zero weights", zero, 0.2),
        ("huge epsilon", plain, 1e4),
        # Where no box meets a kink: the first steps of a ramp.
        *(("small epsilon", plain, epsilon) for epsilon in (1e-9, 1e-6, 1e-4, 1e-3)),
    ):
        (value, (bound, worst)), gradient = run(net, epsilon)
        assert np.isfinite(value), case
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient)), case
        if case == "epsilon 0":
            np.testing.assert_allclose(worst, bound.logits, atol=1e-5)
        if mode != "global" and (
            case == "epsilon 0" or (case == "all masked" and "relu" in activation)
        ):
            assert bound.lipschitz == 0, case


@pytest.mark.core
def test_bound_goes_through_jit_vmap_and_grad():
    net, batch = tiny_net("clipped_maxmin"), jnp.asarray(images(3), jnp.float32)
    together = jax.jit(jax.vmap(lambda x: lipjax.bound(net, x, 0.1)))(batch)
    one = jax.jit(lambda x: lipjax.bound(net, x, 0.1))
    alone = [one(x) for x in batch]
    np.testing.assert_allclose(together.lipschitz, [b.lipschitz for b in alone], rtol=1e-4)
    np.testing.assert_allclose(together.logits, jax.vmap(net)(batch), rtol=1e-4, atol=1e-5)


@functools.partial(jax.jit, static_argnames=("mode", "iterations"))
@functools.partial(jax.vmap, in_axes=(None, 0, None, None, None))
def batch_of_bounds(net, x, epsilon, mode, iterations):
    return lipjax.bound(net, x, epsilon, mode=mode, iterations=iterations)


@jax.jit
@jax.vmap
def golden_values(bound, label):
    return {
        "worst_bcp": lipjax.worst_logits(bound, label),
        "worst_gloro": losses.gloro_logits(bound, label),
        "loss_bcp": losses.bcp(bound, label, 0.0),
        "loss_gloro": losses.gloro(bound, label),
        "sparse": losses.sparsity(bound),
    }


@pytest.mark.parametrize(
    "case", ["tiny_relux", pytest.param("tiny_clmaxmin", marks=pytest.mark.core), "tiny_standrelu"]
)
def test_paper_mode_equals_the_golden_cases_of_the_papers_code(x64, shared, case):
    for suffix in ("", "_scaled"):
        equals_golden(np.load(shared / "golden" / f"{case}{suffix}.npz"))


def equals_golden(file):
    meta, net = json.loads(str(file["meta"])), golden_net(file)
    x, y = jnp.asarray(nhwc(file["x"].astype(np.float64))), jnp.asarray(file["y"])
    bound = batch_of_bounds(net, x, float(file["eps"]), "paper", 3000)

    def equal(ours, theirs):
        ours, theirs = np.asarray(ours), np.asarray(theirs, np.float64)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())

    equal(bound.logits, file["logits"])
    equal(bound.lipschitz, file["lip"])
    equal(bound.penultimate.radius, file["r_pen"])
    equal(bound.penultimate.center, file["pen_mu"])
    equal((bound.penultimate.lower + bound.penultimate.upper) / 2, file["pen_ibp_mu"])
    equal((bound.penultimate.upper - bound.penultimate.lower) / 2, file["pen_ibp_r"])
    glob = jitted_bound(net, x[0], 0.1, mode="global", iterations=3000)
    k = 0
    for position, entry in enumerate(meta["layers"]):
        i = entry["i"]
        if f"ibpmu{i}" not in file:
            continue
        region = bound.regions[i + 1]
        equal((region.lower + region.upper) / 2, nhwc(file[f"ibpmu{i}"]))
        equal((region.upper - region.lower) / 2, nhwc(file[f"ibpr{i}"]))
        equal(bound.norms[k], file[f"lsn{i}"])
        equal(glob.norms[k], file[f"gsn{i}"])
        mask = next(name for name in (f"mask{i}", f"mask{i + 1}") if name in file)
        assert np.array_equal(bound.regions[position + 2].varies, nhwc(file[mask]).astype(bool))
        k += 1

    for name, values in golden_values(bound, y).items():
        if name in file:
            equal(jnp.mean(values) if name.startswith(("loss", "sparse")) else values, file[name])
    assert {"worst_bcp", "worst_gloro", "loss_bcp", "loss_gloro"} <= set(file)


def nhwc(array):
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def golden_net(file) -> nnx.Sequential:
    """The net of a golden case, from PyTorch's layout to ours."""
    layers, flattened = [], None

    def param(name):
        return jnp.asarray(nhwc(file[name].astype(np.float64))[0])

    for entry in json.loads(str(file["meta"]))["layers"]:
        i, kind = entry["i"], entry["type"]
        if kind == "Conv2d":
            size = (entry["kernel"],) * 2
            geometry = {"strides": entry["stride"], "padding": entry["padding"]}
            layer = nnx.Conv(entry["in"][0], entry["cout"], size, **geometry, rngs=nnx.Rngs(0))
            layer.kernel = nnx.Param(
                jnp.asarray(file[f"w{i}"].astype(np.float64).transpose(2, 3, 1, 0))
            )
        elif kind == "Linear":
            weight = file[f"w{i}"].astype(np.float64)
            if flattened:
                weight = weight.reshape(-1, *flattened).transpose(0, 2, 3, 1).reshape(weight.shape)
                flattened = None
            layer = nnx.Linear(weight.shape[1], weight.shape[0], rngs=nnx.Rngs(0))
            layer.kernel = nnx.Param(jnp.asarray(weight.T))
        elif kind == "Flatten":
            layer, flattened = lipjax.Flatten(), entry["in"]
        elif kind == "ReLU_x":
            layer = lipjax.ClippedReLU(1)
            layer.threshold = nnx.Param(param(f"thr{i}"))
        elif kind == "ClampGroupSort":
            layer = lipjax.ClippedMaxMin(2)
            layer.upper, layer.lower = nnx.Param(param(f"max{i}")), nnx.Param(param(f"min{i}"))
        else:
            assert kind == "ReLU"
            layer = lipjax.ReLU()
        if kind in ("Conv2d", "Linear"):
            layer.bias = nnx.Param(jnp.asarray(file[f"b{i}"].astype(np.float64)))
        layers.append(layer)
    return nnx.Sequential(*layers)


# ----------------------------------------------------------------------------- training with bounds


def rise(net, x, epsilon=0.1, **how):
    """Everything of a bound that one trains with."""
    bound = lipjax.bound(net, x, epsilon, **how)
    return bound.lipschitz + jnp.sum(lipjax.worst_logits(bound, 1))


def batch_rise(net, batch):
    return jnp.sum(jax.vmap(rise, (None, 0))(net, batch))


@pytest.mark.parametrize("mode", bounds.MODES)
def test_to_train_with_norms_from_the_same_starts_in_every_step_is_an_error(mode):
    net, x = tiny_net("clipped_relu"), jnp.full((6, 6, 2), 0.4)
    alone = functools.partial(rise, mode=mode)
    with pytest.raises(ValueError, match=r"key=.*vectors=.*docs/regulariser\.md"):
        jax.eval_shape(jax.grad(alone), net, x)
    slopes = jax.eval_shape(jax.grad(functools.partial(alone, key=KEY)), net, x)
    assert jax.tree.structure(slopes) == jax.tree.structure(net)
    vectors = lipjax.initial_vectors(net, x.shape, mode)
    for how in ({"vectors": vectors}, {"vectors": vectors, "key": KEY}):
        jax.eval_shape(jax.grad(functools.partial(alone, **how)), net, x)
    # Where no norm is differentiated, in x and epsilon, there is nothing to hide.
    jax.eval_shape(jax.jit(jax.grad(alone, argnums=(1, 2))), net, x, 0.1)


@pytest.mark.parametrize(
    "way",
    [
        lambda net, batch: jax.jit(jax.value_and_grad(batch_rise))(net, batch),
        lambda net, batch: jax.grad(jax.jit(batch_rise))(net, batch),
        lambda net, batch: jax.vmap(jax.grad(rise), (None, 0))(net, batch),
        lambda net, batch: jax.grad(jax.checkpoint(batch_rise))(net, batch),
        lambda net, batch: jax.jvp(lambda n: batch_rise(n, batch), (net,), (net,)),
        lambda net, batch: jax.jit(lipjax.for_cpu(jax.grad(batch_rise)))(net, batch),
        lambda net, batch: jax.grad(lipjax.for_cpu(batch_rise))(net, batch),
        lambda net, batch: nnx.grad(batch_rise)(net, batch),
        lambda net, batch: jax.grad(
            lambda n: jax.lax.scan(lambda total, x: (total + rise(n, x), None), 0.0, batch)[0]
        )(net),
    ],
)
def test_no_way_to_differentiate_gets_around_that_error(way):
    net, batch = tiny_net("clipped_relu"), jnp.full((2, 6, 6, 2), 0.4)
    with pytest.raises(ValueError, match="neither key= nor vectors="):
        jax.eval_shape(way, net, batch)

    def watched(net):
        return jnp.sum(net(batch[0])), batch_rise(jax.lax.stop_gradient(net), batch)

    jax.eval_shape(jax.grad(watched, has_aux=True), net)


def test_starts_come_from_the_key_and_none_that_one_can_train_with_is_that_of_a_plain_call():
    rngs, x = nnx.Rngs(0), jnp.full(8, 0.4)
    layers = [nnx.Linear(n, m, rngs=rngs) for n, m in itertools.pairwise((8, 9, 7, 3))]
    net = nnx.Sequential(layers[0], lipjax.ReLU(), layers[1], lipjax.ReLU(), layers[2])

    @functools.partial(jax.jit, static_argnames="iterations")
    def norms(iterations=0, **how):
        how |= {"mode": "paper", "iterations": iterations}
        return jnp.stack(lipjax.bound(net, x, 0.2, **how).norms)

    vectors = lipjax.initial_vectors(net, x.shape, "paper", KEY)
    np.testing.assert_allclose(norms(key=KEY), norms(vectors=vectors), rtol=1e-6)
    # With both, the vectors that were kept get a fresh part: zeros start to move.
    zeros = jax.tree.map(jnp.zeros_like, vectors)
    assert not np.any(norms(vectors=zeros)) and np.all(norms(vectors=zeros, key=KEY) > 0)
    nearly = norms(vectors=vectors, key=KEY)
    np.testing.assert_allclose(nearly, norms(vectors=vectors), rtol=0.1)
    plain = norms()
    begun = {"vectors": lipjax.initial_vectors(net, x.shape, "paper")}
    for how in ({"key": KEY}, {"key": jax.random.key(0)}, begun):
        assert np.all(np.abs(norms(**how) / plain - 1) > 1e-3)
    # By default there are so many iterations as each start needs.
    few, many = bounds.estimate.WARM_ITERATIONS, bounds.estimate.FRESH_ITERATIONS
    for how, iterations in (({}, many), ({"key": KEY}, many), ({"vectors": vectors}, few)):
        np.testing.assert_array_equal(norms(None, **how), norms(iterations, **how))


RATE = 0.3
WEIGHT = 0.05


def trained_with(kind, steps=1000):
    """The mean estimate of the last steps of training with it, and the mean of the true norms then.

    16 inputs, 24 hidden neurons, 48 examples; cross-entropy plus the local Lipschitz estimate.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(0, 1, (48, 16)), jnp.float32)
    y = jnp.argmax(x @ rng.normal(size=(16, 3)), axis=1)
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(nnx.Linear(16, 24, rngs=rngs), lipjax.ReLU(), nnx.Linear(24, 3, rngs=rngs))
    fixed = lipjax.initial_vectors(net, (16,))
    vectors = jax.tree.map(lambda v: jnp.tile(v, (48, 1)), fixed)

    def step(carried, number):
        net, vectors = carried
        key = jax.random.fold_in(KEY, number)
        how = {"key": key, "iterations": 10 if kind == "key" else 2}
        if kind == "fixed":
            del how["key"]

        def mean(net):
            def one(x, y, start):
                start = None if kind == "key" else start
                bound = lipjax.bound(net, x, 0.1, vectors=start, **how)
                loss = losses.cross_entropy(bound.logits, y) + WEIGHT * bound.lipschitz
                return loss, (bound.lipschitz, bound.vectors)

            each, (estimate, after) = jax.vmap(one)(x, y, vectors)
            return each.mean(), (estimate.mean(), after)

        (_, (estimate, after)), slopes = jax.value_and_grad(mean, has_aux=True)(net)
        net = jax.tree.map(lambda leaf, slope: leaf - RATE * slope, net, slopes)
        return (net, vectors if kind == "fixed" else after), estimate

    run = jax.jit(lambda carried: jax.lax.scan(step, carried, jnp.arange(steps)))
    (net, _), estimates = run((net, vectors))
    varies = jax.jit(jax.vmap(lambda x: lipjax.bound(net, x, 0.1).regions[2].varies))(x)
    kernel = np.asarray(net.layers[0].kernel[...])
    norms = [np.linalg.norm(kernel[:, row], 2) for row in np.asarray(varies)]
    return float(estimates[-10:].mean()), float(np.mean(norms))


@pytest.mark.parametrize("kind", ["key", "kept"])
def test_a_net_trained_with_fresh_keys_or_kept_vectors_cannot_hide_its_norm(kind):
    estimate, truth = trained_with(kind)
    assert truth == pytest.approx(estimate, rel=0.05)


def test_a_net_trained_from_fixed_starts_hides_its_norm():
    """Otherwise the test above would show nothing."""
    estimate, truth = trained_with("fixed")
    assert truth > 1.5 * estimate, (estimate, truth)


class Doubled(nnx.Linear):
    """A subclass that computes something else than its parent."""

    def __call__(self, x, **kwargs):
        return 2 * super().__call__(x, **kwargs)


def test_what_is_bounded_is_what_is_computed_whatever_its_class_is(x64):
    layer = cast64(Doubled(3, 3, use_bias=False, rngs=nnx.Rngs(0)))
    last = cast64(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    bound = lipjax.bound(
        nnx.Sequential(layer, lipjax.ReLU(), last), jnp.ones(3), 0.1, mode="global", iterations=300
    )
    truth = 2 * np.linalg.norm(np.asarray(layer.kernel[...]), 2)
    np.testing.assert_allclose(np.prod(bound.norms), truth, rtol=1e-9)


@pytest.mark.parametrize(
    "function", [jnp.sin, lambda x: x * x, lambda x: x / jnp.sum(x), jnp.argsort]
)
def test_what_has_no_bound_is_an_error_that_names_it_and_the_line(function):
    net = nnx.Sequential(
        nnx.Linear(3, 3, rngs=nnx.Rngs(0)), function, nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    )
    with pytest.raises(
        TraceError, match=r"no bound for `(sin|mul|div|iota|sort|integer_pow|square)`"
    ):
        lipjax.bound(net, jnp.ones(3), 0.1)


def test_bad_arguments_are_errors_that_name_the_value():
    net, x = tiny_net("relu"), jnp.ones((6, 6, 2))
    for epsilon in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=str(epsilon)):
            lipjax.bound(net, x, epsilon)
    with pytest.raises(ValueError, match=r"neither one example of shape \(6, 6, 3\)"):
        lipjax.bound(net, jnp.ones((6, 6, 3)), 0.1)
    with pytest.raises(ValueError, match=r"batch of 5.*vmap"):
        lipjax.bound(net, jnp.ones((5, 6, 6, 2)), 0.1)
    with pytest.raises(ValueError, match="'locale'"):
        lipjax.bound(net, x, 0.1, mode="locale")
    with pytest.raises(ValueError, match="-1"):
        lipjax.bound(net, x, 0.1, iterations=-1)
    with pytest.raises(TypeError, match="int32"):
        lipjax.bound(net, jnp.ones((6, 6, 2), jnp.int32), 0.1)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        lipjax.worst_logits(lipjax.bound(net, x, 0.1), 4)


def test_a_nan_in_the_input_spreads_and_is_never_masked_away():
    net = tiny_net("clipped_relu")
    bound = lipjax.bound(net, jnp.full((6, 6, 2), jnp.nan), 0.1)
    assert np.isnan(lipjax.worst_logits(bound, 0)[1:]).all()
    # so nothing was removed from any norm
    assert all(np.all(region.varies) for region in bound.regions)


def test_nested_sequences_and_a_flatten_in_front_of_the_activation_change_nothing(x64):
    first, act = cast64(tiny_net("clipped_relu", seed=2)).layers[:2]
    flat = cast64(lipjax.ClippedReLU(144, threshold=0.3))
    flat.threshold[...] = act.threshold[...].reshape(-1)
    short = nnx.Sequential(first, act, lipjax.Flatten(), nnx.Linear(144, 3, rngs=nnx.Rngs(1)))
    other = nnx.Sequential(
        nnx.Sequential(first, lipjax.Flatten()), flat, *cast64(short).layers[-1:]
    )
    x = jnp.asarray(images(1, seed=2)[0])
    for mode in ("paper", "local", "linear"):
        ours, theirs = (jitted_bound(n, x, 0.2, mode=mode) for n in (other, cast64(short)))
        np.testing.assert_allclose(ours.norms, theirs.norms, rtol=1e-9)
        np.testing.assert_allclose(jitted_worst(ours, 0), jitted_worst(theirs, 0), rtol=1e-9)


@pytest.mark.parametrize("mode", ["paper", "local"])
def test_two_affine_layers_in_a_row_are_bounded(x64, mode):
    rngs = nnx.Rngs(0)
    linear = functools.partial(nnx.Linear, rngs=rngs, param_dtype=jnp.float64)
    net = nnx.Sequential(linear(5, 6), linear(6, 7), lipjax.ReLU(), linear(7, 3))
    x, epsilon = jnp.asarray(np.random.default_rng(0).uniform(0, 1, 5)), 0.3
    bound = jitted_bound(net, x, epsilon, mode=mode)
    steps = np.random.default_rng(1).normal(size=(500, 5))
    h = x + jnp.asarray(epsilon * steps / np.linalg.norm(steps, axis=1, keepdims=True))
    for layer, region in zip(net.layers, bound.regions[1:], strict=True):
        h = layer(h)
        moved = np.linalg.norm(np.asarray(h - region.center), axis=1)
        assert np.all(region.radius * (1 + 1e-9) - moved >= 0)
        assert np.all((h >= region.lower - 1e-12) & (h <= region.upper + 1e-12))
    first = np.linalg.svd(np.asarray(net.layers[0].kernel[...]), compute_uv=False)[0]
    np.testing.assert_allclose(bound.norms[0], first, rtol=1e-6)


def test_logits_with_more_than_one_axis_are_an_error():
    net = nnx.Sequential(
        nnx.Conv(2, 3, (3, 3), rngs=nnx.Rngs(0)),
        lipjax.ReLU(),
        nnx.Conv(3, 4, (1, 1), rngs=nnx.Rngs(0)),
    )
    with pytest.raises((TypeError, ValueError), match=r"\(6, 6, 4\)"):
        lipjax.bound(net, jnp.ones((6, 6, 2)), 0.1)
    with pytest.raises(ValueError, match="'locale'"):
        bounds.mode_of("locale")


@pytest.mark.parametrize("mode, shared", [("global", True), ("local", False)])
def test_shared_iterations_are_those_of_the_norms_that_examples_share(x64, mode, shared):
    net, x = cast64(tiny_net("relu")), jnp.asarray(images(1)[0])

    def norms(**counts):
        return np.asarray(lipjax.bound(net, x, 0.15, mode=mode, key=KEY, **counts).norms)

    few, many = norms(iterations=1), norms(iterations=60)
    assert np.all(many[:-1] > few[:-1])
    found = norms(iterations=1, shared_iterations=60)
    np.testing.assert_array_equal(found, many if shared else few)
    with pytest.raises(ValueError, match="got 1 and -1 shared"):
        norms(iterations=1, shared_iterations=-1)
