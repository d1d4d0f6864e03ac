"""Certificates: never broken, never given in doubt, independent of batch-mates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ACTIVATIONS, make_activation, tiny_net
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lipjax
from lipjax.formats import certificate_files

TIERS = lipjax.certificates.TIERS


def batch(count=24, seed=0, shape=(6, 6, 2)):
    """Random images. Tests that share the count, and the layers' shapes, share compiled
    programs."""
    return np.random.default_rng(seed).uniform(0, 1, (count, *shape)).astype(np.float32)


def linear_net(scale=1.0, bias=(0.0, 0.0)):
    """Logits (x0, x1) behind an identity layer with plain ReLU: the radius is known exactly."""
    net = nnx.Sequential(
        nnx.Linear(2, 2, rngs=nnx.Rngs(0)), lipjax.ReLU(), nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    )
    net.layers[0].kernel[...] = jnp.eye(2)
    net.layers[2].kernel[...] = scale * jnp.eye(2)
    net.layers[2].bias[...] = jnp.array(bias)
    return net


def sampled(net, x, radii, count, seed=0):
    """Classes predicted at `count` random points on the sphere of each image's radius; ``(count,
    N)``."""
    noise = np.random.default_rng(seed).normal(size=(count, *x.shape))
    noise *= (
        radii[:, None, None, None]
        / np.linalg.norm(noise.reshape(count, len(x), -1), axis=2)[..., None, None, None]
    )
    return np.argmax(jax.jit(jax.vmap(jax.vmap(net)))((x + noise).astype(np.float32)), axis=-1)


@pytest.mark.parametrize(
    "activation, tier", [("clipped_relu", "probabilistic"), ("clipped_maxmin", "deterministic")]
)
def test_certified_examples_are_never_broken_by_attack_or_sampling(activation, tier):
    net, x = tiny_net(activation, seed=7, scale=0.8), batch()
    radius = lipjax.certified_radius(net, x, None, tier=tier)
    assert np.sum(radius.radius > 0) > 10
    rows = np.flatnonzero(radius.radius > 0)
    inside = radius.radius[rows] * 0.9999
    attack = lipjax.attacks.pgd(
        net, x[rows], radius.predicted[rows], inside, steps=100, restarts=20, clip=None
    )
    assert not attack.broken.any()
    assert np.all(sampled(net, x[rows], inside, 200) == radius.predicted[rows])
    # The opposition bites: not far outside it does find other classes.
    assert lipjax.attacks.pgd(
        net, x[rows], radius.predicted[rows], 8 * inside, clip=None, restarts=2
    ).broken.any()


ARCHITECTURES = dict(
    seed=st.integers(0, 10**6),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 2),
    padding=st.sampled_from(["SAME", "VALID", 1, ((0, 2), (1, 0))]),
    channels=st.sampled_from([2, 4]),
    activation=st.sampled_from(ACTIVATIONS),
    tier=st.sampled_from(TIERS),
    mode=st.sampled_from(sorted(lipjax.bounds.MODES)),
    hidden=st.booleans(),
)
# A net whose neurons are all off for most images: ties.
DEAD = dict(
    seed=1023,
    kernel=1,
    stride=2,
    padding="VALID",
    channels=2,
    activation="clipped_relu",
    tier="deterministic",
    mode="local",
    hidden=False,
)


@settings(max_examples=1)
@given(**ARCHITECTURES)
@example(**DEAD)
def test_certificates_of_random_architectures_hold(**architecture):
    certificates_hold(**architecture)


@pytest.mark.slow
@settings(max_examples=30)
@given(**ARCHITECTURES)
def test_certificates_of_many_random_architectures_hold(**architecture):
    certificates_hold(**architecture)


def certificates_hold(seed, kernel, stride, padding, channels, activation, tier, mode, hidden):
    rngs, x = nnx.Rngs(seed), batch(6, seed, (5, 6, 2))
    first = nnx.Conv(2, channels, (kernel, kernel), strides=stride, padding=padding, rngs=rngs)
    shape = jax.eval_shape(first, x[0]).shape
    layers, size = (
        [first, make_activation(activation, shape), lipjax.Flatten()],
        int(np.prod(shape)),
    )
    if hidden:
        layers += [nnx.Linear(size, 6, rngs=rngs), make_activation(activation, 6)]
        size = 6
    net = nnx.Sequential(*layers, nnx.Linear(size, 3, rngs=rngs))
    found = lipjax.certified_radius(net, x, None, tier=tier, mode=mode)
    # A tie (a net that answers 0 everywhere is one) has no radius; all else has.
    logits = np.sort(np.asarray(jax.vmap(net)(x), np.float64), axis=1)
    gaps = logits[:, -1] - logits[:, -2]
    assert np.all(found.radius[gaps > 1e-3] > 0) and np.all(found.radius[gaps == 0] == 0)
    rows = np.flatnonzero(found.radius > 0)
    if len(rows) == 0:
        return
    attack = lipjax.attacks.pgd(
        net, x[rows], found.predicted[rows], found.radius[rows] * 0.9999, clip=None, restarts=4
    )
    assert not attack.broken.any()
    assert np.all(
        sampled(net, x[rows], found.radius[rows] * 0.9999, 100, seed) == found.predicted[rows]
    )


def hidden_direction_net(n, s):
    """``W = I + (s - 1) v v^T``, all units on, logits +-v^T h: moving the input along v moves the
    margin 2 s times as far. (METHOD 7: two steps of power iteration see a norm of 1.)"""
    v = np.random.default_rng(0).choice([-1.0, 1.0], n) / np.sqrt(n)
    net = nnx.Sequential(
        nnx.Linear(n, n, rngs=nnx.Rngs(0)), lipjax.ReLU(), nnx.Linear(n, 2, rngs=nnx.Rngs(0))
    )
    net.layers[0].kernel[...] = jnp.asarray(np.eye(n) + (s - 1) * np.outer(v, v), jnp.float32)
    net.layers[0].bias[...] = jnp.full(n, 10.0)
    net.layers[2].kernel[...] = jnp.asarray(np.stack([v, -v], axis=1), jnp.float32)
    net.layers[2].bias[...] = jnp.zeros(2)
    return net, v


@pytest.mark.parametrize(
    "n, s",
    [
        (512, 2.0),
        (512, 1.01),
        *(pytest.param(n, 1.01, marks=pytest.mark.slow) for n in (3072, 8192)),
    ],
)
@pytest.mark.parametrize("tier", TIERS)
def test_a_hidden_direction_is_not_certified(n, s, tier):
    net, v = hidden_direction_net(n, s)
    x, epsilon = np.full((1, n), 0.5, np.float32), 0.1
    logits = np.asarray(net(x[0]), np.float64)
    wanted = 2 * epsilon * s * 0.999  # the margin that an input at 0.999 epsilon along v uses up
    net.layers[2].bias[...] = jnp.asarray([(wanted - (logits[0] - logits[1])), 0.0], jnp.float32)
    broken = net(jnp.asarray(x[0] - 0.9999 * epsilon * v, jnp.float32))
    assert np.argmax(net(x[0])) == 0 and np.argmax(broken) == 1
    found = lipjax.certify(net, x, np.array([0]), epsilon, tier=tier)
    assert found.correct[0] and not found.certified[0]
    if s == 2.0:  # what the paper's code does: two steps from a random start, taken as the norm
        naive = lipjax.bound(net, jnp.asarray(x[0]), epsilon, iterations=2)
        assert np.argmax(lipjax.worst_logits(naive, 0)) == 0
    # A third of the radius is certified: it is not refused for being strange.
    assert lipjax.certify(net, x, np.array([0]), epsilon / 3, tier=tier).certified[0] or n > 512


@pytest.mark.core
def test_radius_of_a_linear_decision_is_found_to_a_few_percent():
    x = np.array([[0.9, 0.1], [0.6, 0.5], [0.2, 0.9]], np.float32)
    found = lipjax.certified_radius(linear_net(), x, np.array([0, 0, 1]))
    truth = np.abs(x[:, 0] - x[:, 1]) / np.sqrt(2)
    assert np.all(found.radius <= truth)
    assert np.all(found.radius >= 0.93 * truth)
    assert np.all(found.certified) and np.all(found.margin > 0) and found.norms.shape == (3, 1)
    assert "its epsilon" in found.statement and "1e-06" in found.statement
    wrong = lipjax.certified_radius(linear_net(), x, np.array([1, 1, 0]))
    assert np.all(wrong.radius == 0) and not np.any(wrong.certified)
    assert np.all(wrong.margin == -np.inf) and np.all(wrong.norms == np.inf)  # nothing is claimed


@pytest.mark.parametrize(
    "tier, mode, inflation",
    # A norm a little larger opens boxes a little wider, hence masks: in mode local inflation adds
    # up along the layers.
    [
        ("probabilistic", "local", 1.1),
        ("deterministic", "paper", 1.02),
        ("deterministic", "global", 1.02),
    ],
)
def test_certified_norms_are_at_least_converged_estimates_and_close(tier, mode, inflation):
    net, x = tiny_net("clipped_relu"), batch()
    c = lipjax.certify(net, x, None, 0.1, mode=mode, tier=tier)
    e = lipjax.estimate(net, x, None, 0.1, mode=mode, iterations=3000)
    assert np.all(c.norms >= e.norms * (1 - 1e-5))
    assert np.all(c.norms <= e.norms * inflation + 1e-9)
    assert c.tier == tier and c.precision == "float64" and e.tier == "estimate"
    assert c.arithmetic == "float32" and np.all(c.allowance > 0)


def test_the_statement_names_tier_delta_epsilon_and_arithmetic():
    net, x = linear_net(), np.array([[0.9, 0.1]], np.float32)
    chance = lipjax.certify(net, x, None, 0.25, failure_probability=1e-3)
    sure = lipjax.certify(net, x, None, 0.25, tier="deterministic", arithmetic="float64")
    assert "probability >= 1 - 0.001" in chance.statement and "0.25" in chance.statement
    assert "float32" in chance.statement and chance.failure_probability == 1e-3
    assert "without any probability of failure" in sure.statement and "float64" in sure.statement
    assert sure.failure_probability == 0 and sure.arithmetic == "float64"
    assert chance.certified.all() and sure.certified.all()


@pytest.mark.core
@pytest.mark.parametrize("tier", TIERS)
def test_ties_are_not_certified_even_at_epsilon_zero(tier):
    x = np.array([[0.5, 0.5], [0.6, 0.5]], np.float32)
    c = lipjax.certify(linear_net(), x, None, 0.0, tier=tier)
    assert c.certified.tolist() == [False, True]


@pytest.mark.core
@pytest.mark.parametrize("tier", TIERS)
def test_degenerate_networks_images_and_radii(tier):
    certify = functools.partial(lipjax.certify, tier=tier)
    x = np.array([[0.0, 0.0], [1.0, 1.0], [0.9, 0.1]], np.float32)
    label = np.zeros(3, int)
    assert certify(linear_net(), x, label, 1e-300).certified.tolist() == [False, False, True]
    assert certify(linear_net(), x, label, 1e-12).certified.tolist() == [False, False, True]
    for huge in (10.0, 1e30, 1e200):
        assert not certify(linear_net(), x, label, huge).certified.any()
    zero = jax.tree.map(jnp.zeros_like, linear_net())
    assert not certify(zero, x, label, 0.1).certified.any()  # all logits tie
    zero.layers[2].bias[...] = jnp.array([1.0, 0.0])
    found = certify(zero, x, label, 5.0)  # a constant network is robust at every radius
    assert found.certified.all() and np.all(found.lipschitz < 1e-100)


def test_wrong_predictions_are_not_certified():
    x = np.array([[0.9, 0.1]], np.float32)
    c = lipjax.certify(linear_net(), x, np.array([1]), 0.01)
    assert not c.correct[0] and not c.certified[0]


def test_a_certificate_does_not_depend_on_batch_mates():
    rngs, x = nnx.Rngs(0), batch(7, shape=(5,))
    net = nnx.Sequential(
        nnx.Linear(5, 8, rngs=rngs), lipjax.ClippedMaxMin(8), nnx.Linear(8, 3, rngs=rngs)
    )
    whole = lipjax.certify(net, x, np.zeros(7, int), 0.05, seed=1, batch_size=7)
    parts = lipjax.certify(net, x, np.zeros(7, int), 0.05, seed=1, batch_size=3)
    np.testing.assert_allclose(whole.norms, parts.norms, rtol=1e-9)
    assert np.array_equal(whole.certified, parts.certified)


def test_what_is_not_examined_claims_nothing_and_the_rest_is_the_same():
    net, x = tiny_net("clipped_relu", seed=7, scale=0.8), batch()
    labels = np.asarray(lipjax.certify(net, x, None, 0.01).predicted)
    labels[0] = (labels[0] + 1) % 3
    whole = lipjax.certify(net, x, labels, 0.02, seed=1)
    examine = np.tile([True, True, False, True, False, True, True, False], 3)
    part = lipjax.certify(net, x, labels, 0.02, seed=1, examine=examine)
    assert whole.certified.sum() > 3 and part.certified[examine].sum() > 1 and not part.certified[0]
    for name in (
        "predicted",
        "correct",
        "certified",
        "margin",
        "allowance",
        "lipschitz",
        "norms",
        "constant",
    ):
        np.testing.assert_array_equal(getattr(part, name)[examine], getattr(whole, name)[examine])
    np.testing.assert_array_equal(part.predicted, whole.predicted)
    np.testing.assert_array_equal(part.correct, whole.correct)
    left = ~examine
    assert not part.certified[left].any() and np.all(part.margin[left] == -np.inf)
    assert np.all(np.isposinf(part.norms[left])) and np.all(np.isposinf(part.lipschitz[left]))
    assert part.failure_probability == whole.failure_probability
    none = lipjax.certify(net, x, labels, 0.02, examine=np.zeros(24, bool))
    assert not none.certified.any() and np.all(none.predicted == whole.predicted)
    radii, some = (
        lipjax.certified_radius(net, x, labels, seed=1, examine=rows) for rows in (None, examine)
    )
    np.testing.assert_array_equal(some.radius[examine], radii.radius[examine])
    assert np.any(radii.radius[left] > 0) and not np.any(some.radius[left])
    np.testing.assert_array_equal(some.predicted, radii.predicted)
    with pytest.raises(
        ValueError, match=r"examine must be 24 booleans, got int64 of shape \(24,\)"
    ):
        lipjax.certify(net, x, labels, 0.02, examine=np.arange(24))


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


@pytest.mark.core
def test_images_that_the_device_would_round_are_an_error():
    net, x = linear_net(), np.array([[0.9, 0.1]])
    for call in (
        lambda: lipjax.certify(net, x, None, 0.1),
        lambda: lipjax.certified_radius(net, x, None),
    ):
        with pytest.raises(ValueError, match=r"Give images\.astype\(np\.float32\)"):
            call()
    # Numbers of float32 are executed as they are, and float64 executes all.
    same = x.astype(np.float32).astype(np.float64)
    for found in (
        lipjax.certify(net, same, None, 0.1, tier="deterministic"),
        lipjax.certify(net, x, None, 0.1, tier="deterministic", arithmetic="float64"),
    ):
        assert found.certified.all()


@pytest.mark.core
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
    with pytest.raises(ValueError, match=r"budget.*-1"):
        lipjax.certify(net, x, None, 0.1, budget=-1)
    with pytest.raises(ValueError, match=r"'locale'"):
        lipjax.certify(net, x, None, 0.1, mode="locale")
    with pytest.raises(ValueError, match=r"'float8'"):
        lipjax.certify(net, x, None, 0.1, arithmetic="float8")
    with pytest.raises(ValueError, match="max_radius"):
        lipjax.certified_radius(net, x, None, max_radius=0)


def test_a_negative_threshold_is_certified_as_it_computes():
    """Whatever comes in, the second neuron answers -0.5."""
    net = nnx.Sequential(
        linear_net().layers[0], lipjax.ClippedReLU(2), nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    )
    net.layers[1].threshold[...] = jnp.array([1.0, -0.5])
    net.layers[2].kernel[...] = jnp.array([[0.0, 0.0], [1.0, 0.0]])
    x = np.array([[0.9, 0.1]], np.float32)
    np.testing.assert_allclose(net(x[0]), [-0.5, 0.0])
    found = lipjax.certify(net, x, None, 0.9)
    assert found.predicted[0] == 1 and found.certified[0]


def test_images_of_another_shape_and_normalisation_in_the_network_are_errors():
    with pytest.raises(ValueError, match=r"neither one example of shape \(3,\)"):
        lipjax.certify(linear_net(), np.full((1, 3), 0.5, np.float32), None, 0.1)
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(
        nnx.Linear(2, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs), nnx.Linear(2, 2, rngs=rngs)
    )
    with pytest.raises(TypeError, match="BatchNorm"):
        lipjax.certify(net, np.array([[0.9, 0.1]], np.float32), None, 0.1)


@pytest.mark.parametrize("kind", ["dtype", "param_dtype"])
def test_a_low_precision_network_pays_for_its_rounding_and_unknown_precisions_are_errors(kind):
    def net(dtype):
        layers = [nnx.Linear(2, 2, rngs=nnx.Rngs(0), **{kind: dtype}) for _ in range(2)]
        layers[0].kernel[...] = layers[1].kernel[...] = jnp.eye(
            2, dtype=layers[0].kernel[...].dtype
        )
        return nnx.Sequential(layers[0], lipjax.ReLU(), layers[1])

    x = np.array([[0.9, 0.1], [0.505, 0.5]], np.float32)
    single, half = (
        lipjax.certify(net(dtype), x, np.zeros(2, int), 1e-3)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    if kind == "param_dtype":  # such parameters meet float32 images in float32
        assert half.arithmetic == "float32" and half.certified.all()
        return
    assert single.certified.tolist() == [True, True] and half.certified.tolist() == [True, False]
    assert half.arithmetic == "bfloat16" and np.all(half.allowance > 1000 * single.allowance)
    with pytest.raises(TypeError, match=r"float16.*error model"):
        lipjax.certify(net(jnp.float16), x, None, 0.1)


def test_a_certificate_prints_what_it_proves_and_saves_itself(tmp_path):
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 2, rngs=rngs))
    x = np.random.default_rng(0).random((5, 3), np.float32)
    found = lipjax.certify(net, x, None, 0.01, seed=7)
    certified = int(np.sum(found.certified))
    first, second = repr(found).splitlines()
    assert f"5 of 5 images predicted right, {certified} certified at epsilon 0.01" in first
    assert "tier probabilistic" in second and "1e-06" in second and "seed 7 (given)" in second
    table = found.summary()
    for text in (f"{certified} of 5", "local", "tier probabilistic", "seed 7", "neurons constant"):
        assert text in table
    found.save(tmp_path / "proof.npz", net, x, found.predicted)
    header, arrays = certificate_files.load(tmp_path / "proof.npz")
    assert header["seed"] == 7 and np.array_equal(arrays["certified"], found.certified)
