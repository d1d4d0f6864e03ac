"""Certificates: never broken, never given in doubt, independent of batch-mates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_net
from flax import nnx

import lipjax


def batch(count=12, seed=0, shape=(6, 6, 2)):
    return np.random.default_rng(seed).uniform(0, 1, (count, *shape)).astype(np.float32)


def linear_net(scale=1.0, bias=(0.0, 0.0)):
    """Logits (x0, x1) behind an identity layer with plain ReLU: the radius is known exactly."""
    net = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), lipjax.ReLU(), nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    net.layers[0].kernel[...] = jnp.eye(2)
    net.layers[2].kernel[...] = scale * jnp.eye(2)
    net.layers[2].bias[...] = jnp.array(bias)
    return net


@pytest.mark.parametrize("activation", ["clipped_relu", "clipped_maxmin"])
def test_certified_examples_are_never_broken_by_attack_or_sampling(activation):
    net, x = tiny_net(activation, seed=7, scale=0.8), batch(24)
    radius = lipjax.certified_radius(net, x, None)
    assert np.sum(radius.radius > 0) > 10
    rows = np.flatnonzero(radius.radius > 0)
    attack = lipjax.attacks.pgd(
        net, x[rows], radius.predicted[rows], radius.radius[rows] * 0.9999, steps=100, restarts=5, clip=None
    )
    assert not attack.broken.any()
    noise = np.random.default_rng(0).normal(size=(200, *x[rows].shape)).astype(np.float32)
    noise *= (radius.radius[rows] * 0.9999)[:, None, None, None] / np.linalg.norm(
        noise.reshape(200, len(rows), -1), axis=2
    )[:, :, None, None, None]
    logits = jax.jit(jax.vmap(jax.vmap(net)))(x[rows] + noise)
    assert np.all(np.argmax(logits, axis=-1) == radius.predicted[rows])


def test_radius_of_a_linear_decision_is_found_to_a_few_percent():
    x = np.array([[0.9, 0.1], [0.6, 0.5], [0.2, 0.9]], np.float32)
    found = lipjax.certified_radius(linear_net(), x, np.array([0, 0, 1]))
    truth = np.abs(x[:, 0] - x[:, 1]) / np.sqrt(2)
    assert np.all(found.radius <= truth)
    assert np.all(found.radius >= 0.93 * truth)
    wrong = lipjax.certified_radius(linear_net(), x, np.array([1, 1, 0]))
    assert np.all(wrong.radius == 0)


def test_certified_norms_are_at_least_converged_estimates_and_close():
    net, x = tiny_net("clipped_relu"), batch(6)
    for mode in lipjax.regions.MODES:
        c = lipjax.certify(net, x, None, 0.1, mode=mode)
        e = lipjax.estimate(net, x, None, 0.1, mode=mode, iterations=3000)
        assert np.all(c.norms >= e.norms * (1 - 1e-5))
        assert np.all(c.norms <= e.norms * 1.1 + 1e-9)
        assert c.tier == "probabilistic" and c.precision == "float64" and e.tier == "estimate"


def test_ties_are_not_certified_even_at_epsilon_zero():
    x = np.array([[0.5, 0.5], [0.6, 0.5]], np.float32)
    c = lipjax.certify(linear_net(), x, None, 0.0)
    assert c.certified.tolist() == [False, True]


def test_wrong_predictions_are_not_certified():
    x = np.array([[0.9, 0.1]], np.float32)
    c = lipjax.certify(linear_net(), x, np.array([1]), 0.01)
    assert not c.correct[0] and not c.certified[0]


def test_a_certificate_does_not_depend_on_batch_mates():
    net, x = tiny_net("clipped_maxmin"), batch(7)
    whole = lipjax.certify(net, x, np.zeros(7, int), 0.05, batch_size=7)
    parts = lipjax.certify(net, x, np.zeros(7, int), 0.05, batch_size=3)
    np.testing.assert_allclose(whole.norms, parts.norms, rtol=1e-9)
    assert np.array_equal(whole.certified, parts.certified)


def test_overflow_and_nan_inside_the_walk_are_not_certified():
    net = linear_net(scale=1e38)
    net.layers[0].kernel[...] = 1e38 * jnp.eye(2)
    net.layers[0].bias[...] = jnp.array([0.0, 0.0])
    x = np.array([[0.9, 0.1]], np.float32)
    huge = jax.tree.map(lambda leaf: leaf, net)
    for _ in range(5):  # 1e38 to the sixth is beyond float64
        huge.layers.insert(0, nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
        huge.layers[0].kernel[...] = 1e38 * jnp.eye(2)
        huge.layers.insert(1, lipjax.ReLU())
    huge = nnx.Sequential(*huge.layers)
    c = lipjax.certify(huge, x, np.array([0]), 1e-3)
    assert not c.certified[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_and_pixels_that_are_no_numbers_are_errors(bad):
    x = np.array([[0.9, 0.1]], np.float32)
    net = linear_net()
    net.layers[0].kernel[...] = net.layers[0].kernel[...].at[0, 0].set(bad)
    with pytest.raises(ValueError, match=r"layers\.0\.kernel"):
        lipjax.certify(net, x, None, 0.1)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        lipjax.certify(linear_net(), np.array([[bad, 0.1]]), None, 0.1)


def test_bad_arguments_are_errors_that_name_the_value():
    net, x = linear_net(), np.array([[0.9, 0.1]], np.float32)
    with pytest.raises(ValueError, match="255"):
        lipjax.certify(net, x * 255, None, 0.1)
    with pytest.raises(TypeError, match="int64"):
        lipjax.certify(net, np.array([[1, 0]]), None, 0.1)
    with pytest.raises(ValueError, match=r"-0\.1"):
        lipjax.certify(net, x, None, -0.1)
    with pytest.raises(ValueError, match="'estimate'"):
        lipjax.certify(net, x, None, 0.1, tier="estimate")
    with pytest.raises(ValueError, match=r"2\.0"):
        lipjax.certify(net, x, None, 0.1, failure_probability=2.0)
    with pytest.raises(ValueError, match=r"0\.\.1"):
        lipjax.certify(net, x, np.array([2]), 0.1)
    with pytest.raises(ValueError, match="1 integers"):
        lipjax.certify(net, x, np.array([0, 1]), 0.1)
    with pytest.raises(ValueError, match="1 class"):
        one = nnx.Sequential(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
        lipjax.certify(one, x, None, 0.1)
    with pytest.raises(ValueError, match="max_radius"):
        lipjax.certified_radius(net, x, None, max_radius=0)


@pytest.mark.parametrize("kind", ["dtype", "param_dtype"])
def test_low_precision_networks_are_refused(kind):
    net = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0), **{kind: jnp.bfloat16}))
    with pytest.raises(ValueError, match="bfloat16"):
        lipjax.certify(net, np.array([[0.9, 0.1]], np.float32), None, 0.1)
