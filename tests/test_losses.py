"""The losses against naive NumPy formulas, and their gradients against finite differences."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ACTIVATIONS, make_activation
from flax import nnx

import lipjax
from lipjax import losses

EPSILON, KAPPA, LABEL = 0.2, 0.3, 2


def small_net(activation, threshold=0.3):
    """4x4x1 images, one convolution, one hidden dense layer, random biases; four classes."""
    rngs, bias = nnx.Rngs(0), jax.nn.initializers.normal(0.3)

    def act(shape):
        return make_activation(activation, shape, threshold)

    return nnx.Sequential(
        nnx.Conv(1, 4, (3, 3), strides=2, padding=1, rngs=rngs, bias_init=bias),
        act((2, 2, 4)),
        lipjax.Flatten(),
        nnx.Linear(16, 6, rngs=rngs, bias_init=bias),
        act((6,)),
        nnx.Linear(6, 4, rngs=rngs, bias_init=bias),
    )


def image():
    return jax.random.uniform(jax.random.key(0), (4, 4, 1))


@functools.partial(jax.jit, static_argnames="iterations")
def everything(net, x, epsilon, kappa, label, iterations=30):
    """The losses as one vector, and what the naive formulas start from."""
    bound = lipjax.bound(net, x, epsilon, iterations=iterations, key=jax.random.key(1))
    found = [
        losses.bcp(bound, label, kappa),
        losses.gloro(bound, label),
        losses.sparsity(bound),
        losses.stability(bound),
        losses.lmt(bound, label),
        losses.trades(bound, label, 0.7),
        losses.calibrated(bound, label, kappa, 3.0),
        losses.offset(bound, label, 1.5, 0.3),
        losses.annealing(bound, label, 1.5, 0.3, 2.5),
        losses.crm(bound, label, 2.0, 3.0, 4.0),
    ]
    return jnp.stack(found), bound, lipjax.worst_logits(bound, label)


def naive_cross_entropy(logits, label):
    return -np.log(np.exp(logits[label]) / np.sum(np.exp(logits)))


def naive_sparsity(net, bound):
    total = 0.0
    for layer, before in zip(net.layers[1:], bound.regions[1:], strict=False):
        low, high = np.asarray(before.lower, np.float64), np.asarray(before.upper, np.float64)
        terms = []
        if type(layer) in (lipjax.ReLU, lipjax.ClippedReLU):
            terms.append([max(u, 0) for u in high.ravel()])
        if type(layer) is lipjax.ClippedReLU:
            threshold = np.asarray(layer.threshold[...], np.float64)
            terms.append(
                [
                    0.1 * max(end - bottom, 0)
                    for end, bottom in zip(threshold.ravel(), low.ravel(), strict=True)
                ]
            )
        if type(layer) is lipjax.ClippedMaxMin:
            half = low.shape[-1] // 2
            upper, lower = (
                np.asarray(layer.upper[...], np.float64),
                np.asarray(layer.lower[...], np.float64),
            )
            first, second = [], []
            for index in np.ndindex(upper.shape):
                other = (*index[:-1], index[-1] + half)
                first.append(max(upper[index] - max(low[index], low[other]), 0))
                second.append(max(min(high[index], high[other]) - lower[index], 0))
            terms += [first, second]
        total += sum(np.mean(term) for term in terms)
    return total


def naive_stability(net, bound):
    """One kink of one neuron at a time: the way out of the box that is shorter."""
    total = 0.0
    for i, layer in enumerate(net.layers):
        if i == 0 or type(layer) is nnx.Linear or isinstance(layer, (nnx.Conv, lipjax.Flatten)):
            continue
        low, high = np.asarray(bound.regions[i].lower), np.asarray(bound.regions[i].upper)
        groups = []

        def add(cases, groups=groups):
            groups.append([max(min(top - kink, kink - bottom), 0) for bottom, top, kink in cases])

        if type(layer) in (lipjax.ReLU, lipjax.ClippedReLU):
            add([(b, t, 0.0) for b, t in zip(low.ravel(), high.ravel(), strict=True)])
        if type(layer) is lipjax.ClippedReLU:
            add(
                zip(
                    low.ravel(), high.ravel(), np.asarray(layer.threshold[...]).ravel(), strict=True
                )
            )
        if type(layer) in (lipjax.MaxMin, lipjax.ClippedMaxMin):
            half = low.shape[-1] // 2
            pairs = [
                (index, (*index[:-1], index[-1] + half))
                for index in np.ndindex(*low.shape[:-1], half)
            ]
            add([(low[a] - high[b], high[a] - low[b], 0.0) for a, b in pairs])
        if type(layer) is lipjax.ClippedMaxMin:
            upper, lower = np.asarray(layer.upper[...]), np.asarray(layer.lower[...])
            add([(max(low[a], low[b]), max(high[a], high[b]), upper[a]) for a, b in pairs])
            add([(min(low[a], low[b]), min(high[a], high[b]), lower[a]) for a, b in pairs])
        total += sum(np.mean(group) for group in groups)
    return total


def naive_offset(logits, worst, factor, temperature, power):
    """The loss with offset and temperature, and logit annealing, of logits in distances."""
    per_distance = max(worst - logits) / EPSILON / np.sqrt(2)
    scores = [z / per_distance for z in logits]
    scores[LABEL] -= factor * np.sqrt(2) * EPSILON
    scores = np.exp(np.array(scores) / temperature)
    p = scores[LABEL] / sum(scores)
    loss = -temperature * np.log(p)
    return loss, (1 - p) ** power * loss


def naive_crm(logits, worst, weight, sharpness, reach):
    """One rival at a time: its margin over its own Lipschitz constant."""
    radii = [
        (logits[LABEL] - logits[j]) / ((worst[j] - logits[j]) / EPSILON)
        for j in range(4)
        if j != LABEL
    ]
    clean = naive_cross_entropy(logits, LABEL)
    if not 0 < min(radii) < reach * EPSILON:
        return clean
    return clean + weight / sharpness * np.log(sum(np.exp(-sharpness * r) for r in radii))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_losses_are_their_formulas(x64, activation):
    net = small_net(activation, threshold=0.3)
    found, bound, worst = everything(net, image().astype(jnp.float64), EPSILON, KAPPA, LABEL)
    logits, worst = np.asarray(bound.logits), np.asarray(worst)
    robust = naive_cross_entropy(worst, LABEL)
    rival = max(worst[j] for j in range(4) if j != LABEL)
    bcp = KAPPA * naive_cross_entropy(logits, LABEL) + (1 - KAPPA) * robust
    gloro = naive_cross_entropy(np.append(logits, rival), LABEL)
    sparsity = naive_sparsity(net, bound)
    # the bound matters here, else this would show little
    assert robust > naive_cross_entropy(logits, LABEL) + 0.01
    assert (sparsity > 0) == (activation != "maxmin")
    assert naive_stability(net, bound) > 0
    last = np.linalg.svd(np.asarray(net.layers[-1].kernel[...], np.float64), compute_uv=False)[0]
    raised = logits + np.sqrt(2) * last * float(bound.penultimate.radius) * (np.arange(4) != LABEL)
    lmt = naive_cross_entropy(raised, LABEL)
    predicted = int(np.argmax(logits))
    rivals = np.asarray(lipjax.worst_logits(bound, predicted))
    extended = np.append(logits, max(rivals[j] for j in range(4) if j != predicted))
    clean, robust = (
        np.exp(logits) / np.sum(np.exp(logits)),
        np.exp(extended) / np.sum(np.exp(extended)),
    )
    trades = naive_cross_entropy(logits, LABEL) + 0.7 * sum(
        p * np.log(p / q) for p, q in zip(clean, robust, strict=False)
    )
    scaled = 3.0 * (1 - KAPPA) * worst / max(worst - logits)
    calibrated = KAPPA * naive_cross_entropy(logits, LABEL)
    calibrated += (1 - KAPPA) * naive_cross_entropy(scaled, LABEL)
    offset, annealing = naive_offset(logits, worst, 1.5, 0.3, 2.5)
    crm = naive_crm(logits, worst, 2.0, 3.0, 4.0)
    expected = [bcp, gloro, sparsity, naive_stability(net, bound), lmt, trades, calibrated]
    expected += [offset, annealing, crm]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_kappa_goes_from_the_clean_to_the_worst_case_loss(x64):
    net, x = small_net("clipped_relu"), image().astype(jnp.float64)
    (clean, *_), bound, worst = everything(net, x, EPSILON, 1.0, LABEL)
    np.testing.assert_allclose(
        clean, naive_cross_entropy(np.asarray(bound.logits), LABEL), rtol=1e-12
    )
    (robust, *_), _, worst = everything(net, x, EPSILON, 0.0, LABEL)
    np.testing.assert_allclose(robust, naive_cross_entropy(np.asarray(worst), LABEL), rtol=1e-12)
    # With no perturbation there is nothing between the two.
    (still, *_), _, _ = everything(net, x, 0.0, 0.0, LABEL)
    np.testing.assert_allclose(still, clean, rtol=1e-12)


def test_the_extra_logit_of_gloro_is_the_best_rival_whatever_the_label(x64):
    net, x = small_net("clipped_relu"), image().astype(jnp.float64)
    extend = jax.jit(losses.gloro_logits)
    for label in range(4):
        _, bound, worst = everything(net, x, EPSILON, KAPPA, label)
        extended = np.asarray(extend(bound, label))
        np.testing.assert_array_equal(extended[:4], np.asarray(bound.logits))
        np.testing.assert_allclose(
            extended[4], max(worst[j] for j in range(4) if j != label), rtol=1e-12
        )


@pytest.mark.parametrize("activation", ["clipped_relu", "clipped_maxmin"])
def test_gradients_are_those_of_finite_differences(x64, activation):
    graph, params = nnx.split(small_net(activation, threshold=0.3))
    params = jax.tree.map(lambda a: a.astype(jnp.float64), params)
    x = image().astype(jnp.float64)

    # 400 iterations: converged, as the gradient of a norm with its vectors held fixed is right at
    # convergence only.
    @jax.jit
    def values(params):
        return everything(nnx.merge(graph, params), x, EPSILON, KAPPA, LABEL, iterations=400)[0]

    found = jax.jit(jax.jacrev(values))(params)
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    directions = [
        jax.random.normal(k, a.shape) for k, a in zip(keys, jax.tree.leaves(params), strict=True)
    ]
    step = 1e-6
    # each parameter on its own: none can hide behind a larger one
    for i, leaf in enumerate(jax.tree.leaves(found)):

        def moved(sign, i=i):
            leaves = jax.tree.leaves(params)
            leaves[i] = leaves[i] + sign * step * directions[i]
            return np.asarray(values(jax.tree.unflatten(jax.tree.structure(params), leaves)))

        difference = (moved(1) - moved(-1)) / (2 * step)
        slope = np.asarray(jnp.sum(leaf * directions[i], axis=tuple(range(1, leaf.ndim))))
        np.testing.assert_allclose(slope, difference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("activation", ["clipped_relu", "clipped_maxmin"])
def test_values_and_gradients_are_finite_where_nothing_varies(activation):
    """At the start of the ramp (epsilon 0), and where thresholds make every neuron constant (METHOD
    7)."""
    net = small_net(activation)
    dead = small_net(activation, threshold=0.0)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=0, has_aux=True)
    def total(net, epsilon):
        found, bound, _ = everything(net, image(), epsilon, 0.5, LABEL, iterations=2)
        return jnp.sum(found), (found, bound.norms)

    for network, epsilon in ((net, 0.0), (dead, 0.0), (dead, 0.2)):
        (value, (found, norms)), gradient = total(network, epsilon)
        assert np.isfinite(value) and np.all(np.isfinite(found)) and np.all(np.isfinite(norms))
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    assert float(norms[-1]) == 0 or activation != "clipped_relu"  # the case is what it claims to be


def test_emma_raises_each_rival_to_the_label_and_no_further_with_the_share_held_fixed(x64):
    net, x = small_net("clipped_relu"), image().astype(jnp.float64)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def emma(net, label):
        bound = lipjax.bound(net, x, 3 * EPSILON, iterations=30, key=jax.random.key(1))
        return losses.emma(bound, label), (bound.logits, lipjax.worst_logits(bound, label))

    @jax.jit
    @jax.grad
    def fixed(net, label, share):
        bound = lipjax.bound(net, x, 3 * EPSILON, iterations=30, key=jax.random.key(1))
        worst = lipjax.worst_logits(bound, label)
        return losses.cross_entropy(bound.logits + share * (worst - bound.logits), label)

    shares = []
    for label in range(4):
        (value, (logits, worst)), slopes = emma(net, label)
        logits, gain = np.asarray(logits), np.asarray(worst - logits)
        raised = np.array(
            [
                z if j == label or z > logits[label] else min(z + g, logits[label])
                for j, (z, g) in enumerate(zip(logits, gain, strict=True))
            ]
        )
        np.testing.assert_allclose(value, naive_cross_entropy(raised, label), rtol=1e-10)
        shares.append((raised - logits) / np.where(gain > 0, gain, 1))
        for found, wanted in zip(
            *map(jax.tree.leaves, (slopes, fixed(net, label, shares[-1]))), strict=True
        ):
            np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert np.any((np.array(shares) > 0) & (np.array(shares) < 1))  # neither all nor nothing


def bound_of(logits, gains, epsilon):
    """What the losses read of a bound: a last layer of which rival j gains ``gains[j]`` on the
    label, whatever the region."""
    return SimpleNamespace(
        logits=jnp.asarray(logits),
        worst=jnp.asarray(logits) + jnp.asarray(gains),
        input=SimpleNamespace(radius=jnp.asarray(epsilon)),
    )


@pytest.fixture
def given_gains(monkeypatch):
    monkeypatch.setattr(losses, "worst_logits", lambda bound, label: bound.worst)


def test_the_logits_of_a_network_of_constant_1_with_orthonormal_rows_are_distances(given_gains):
    """As the formula is published: on the logits themselves."""
    logits, epsilon = np.array([0.3, 1.1, -0.2]), 0.2
    gains = np.sqrt(2) * epsilon * np.array([1.0, 0.0, 1.0])
    found = losses.offset(bound_of(logits, gains, epsilon), 1)
    scores = (logits - 2 * np.sqrt(2) * epsilon * np.array([0, 1, 0])) / 0.25
    np.testing.assert_allclose(found, 0.25 * naive_cross_entropy(scores, 1), rtol=1e-6)
    # Another size of the weights is no other loss.
    larger = losses.offset(bound_of(7 * logits, 7 * gains, epsilon), 1)
    np.testing.assert_allclose(larger, found, rtol=1e-6)


@pytest.mark.parametrize("label, reach, pushed", [(1, 4.0, True), (1, 2.9, False), (0, 4.0, False)])
def test_radii_of_images_that_are_wrong_or_far_inside_are_left_alone(
    given_gains, label, reach, pushed
):
    """The rivals of class 1 draw level at 3 and 5 epsilon; class 0 is not the prediction."""
    gains = np.where(np.arange(3) == label, 0.0, 0.2)
    bound = bound_of(np.array([0.4, 1.0, 0.0]), gains, 0.1)
    plain = float(losses.cross_entropy(bound.logits, label))
    found = float(losses.crm(bound, label, weight=2.0, sharpness=3.0, reach=reach))
    soft = 2 / 3 * np.log(np.exp(-3 * 0.3) + np.exp(-3 * 0.5))
    assert found == pytest.approx(plain + soft if pushed else plain, rel=1e-5)


def test_cross_entropy_does_not_overflow():
    assert float(losses.cross_entropy(jnp.array([0.0, 1e4]), 0)) == 1e4
    assert float(losses.cross_entropy(jnp.array([0.0, 1e4]), 1)) == 0


def test_a_network_without_a_box_in_front_of_an_activation_is_refused():
    net = nnx.Sequential(lipjax.ReLU(), nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match="begins with an activation"):
        losses.sparsity(lipjax.bound(net, jnp.ones(3), 0.1))
    with pytest.raises(TypeError, match="begins with an activation"):
        losses.stability(lipjax.bound(net, jnp.ones(3), 0.1))
