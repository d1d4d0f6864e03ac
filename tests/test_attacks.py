"""Attacks: within their radius always, near the nearest boundary where it is known, and never wrong
about what broke."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_net
from flax import nnx

import lipjax
from benchmarks import hunt, unsound
from benchmarks.attacks import boundary, targeted
from lipjax.attacks import SCHEDULES, pgd, smallest

SIZE, CLASSES = 6, 4
ROWS = 8
WITHIN = {"pgd": functools.partial(pgd, restarts=3), "targeted": targeted}
NEAREST = {
    "smallest": smallest,
    "boundary": functools.partial(boundary, steps=1000, restarts=CLASSES),
}


def linear(seed=0, scale=1.0):
    """A linear classifier of `SIZE` inputs, and images away from the ends of the pixels' range."""
    rng = np.random.default_rng(seed)
    net = nnx.Sequential(nnx.Linear(SIZE, CLASSES, rngs=nnx.Rngs(seed)))
    net.layers[0].bias[...] = jnp.asarray(rng.normal(0, 0.1, CLASSES), jnp.float32)
    net = jax.tree.map(lambda leaf: jnp.asarray(scale, leaf.dtype) * leaf, net)
    x = rng.uniform(0.3, 0.7, (ROWS, SIZE)).astype(np.float32)
    return net, x, np.asarray(jnp.argmax(net(x), axis=1))


def boundary_distances(net, x, labels):
    """Distance of each image to the nearest boundary of a linear classifier: that of
    hyperplanes."""
    kernel = np.asarray(net.layers[0].kernel[...], np.float64)
    logits = x.astype(np.float64) @ kernel + np.asarray(net.layers[0].bias[...], np.float64)
    own, direction = logits[np.arange(len(x)), labels], kernel[:, labels]
    with np.errstate(invalid="ignore"):  # the label against itself: 0 / 0
        to_each = np.stack(
            [
                (own - logits[:, j]) / np.linalg.norm(direction - kernel[:, [j]], axis=0)
                for j in range(kernel.shape[1])
            ]
        )
    return np.nanmin(to_each, axis=0)


def distance(adversarial, x):
    return np.linalg.norm((adversarial.astype(np.float64) - x).reshape(len(x), -1), axis=1)


def lost(net, x, labels):
    """What a forward pass says, in NumPy's order: the label is not strictly the largest."""
    logits = np.asarray(jax.jit(jax.vmap(net))(x))
    rivals = np.where(np.arange(logits.shape[1]) == labels[:, None], -np.inf, logits)
    return ~(logits[np.arange(len(x)), labels] > rivals.max(axis=1))


def constant_net():
    net = nnx.Sequential(nnx.Linear(SIZE, CLASSES, rngs=nnx.Rngs(0)))
    net.layers[0].kernel[...] = jnp.zeros((SIZE, CLASSES))
    net.layers[0].bias[...] = jnp.arange(float(CLASSES))
    return net


# ----------------------------------------------------------------------------------------- strength


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("attack", WITHIN)
def test_the_nearest_boundary_of_a_linear_classifier_is_crossed_just_outside_it_and_never_inside(
    attack, schedule
):
    net, x, labels = linear()
    truth = boundary_distances(net, x, labels)
    run = functools.partial(WITHIN[attack], net, x, labels, clip=None, schedule=schedule)
    # A constant step of a quarter of the radius jumps from side to side; one that shrinks settles.
    assert run(truth * (1.05 if schedule == "constant" else 1.005)).broken.all()
    assert not run(truth * 0.999).broken.any()


@pytest.mark.parametrize("attack, excess", [("smallest", 1.001), ("boundary", 1.03)])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e15])
def test_the_smallest_perturbation_of_a_linear_classifier_is_found(attack, excess, scale):
    net, x, labels = linear(1, scale)
    truth = boundary_distances(net, x, labels)
    found = NEAREST[attack](net, x, labels, clip=None)
    assert np.all(found.distance >= truth * (1 - 1e-6)) and np.all(found.distance <= truth * excess)
    assert np.array_equal(found.distance, distance(found.adversarial, x))
    assert lost(net, found.adversarial, labels).all()


def relu_net(first, shift, second, bias):
    """``second relu(first x + shift) + bias``, `SIZE` inputs and hidden units; matrices as
    ``(outputs, inputs)``."""
    net = nnx.Sequential(
        nnx.Linear(SIZE, SIZE, rngs=nnx.Rngs(0)),
        lipjax.ReLU(),
        nnx.Linear(SIZE, CLASSES, rngs=nnx.Rngs(0)),
    )
    for layer, matrix, offset in ((net.layers[0], first, shift), (net.layers[2], second, bias)):
        layer.kernel[...] = jnp.asarray(np.asarray(matrix).T, jnp.float32)
        layer.bias[...] = jnp.asarray(offset, jnp.float32)
    return net


def random_net(seed, x):
    rng = np.random.default_rng(seed)
    net = relu_net(
        *[rng.normal(size=size) for size in ((SIZE, SIZE), SIZE, (CLASSES, SIZE), CLASSES)]
    )
    return net, np.asarray(jnp.argmax(net(x), axis=1))


def test_on_a_network_with_kinks_the_attacks_agree_on_what_is_near():
    _, x, _ = linear()
    net, labels = random_net(11, x)
    assert len(set(labels.tolist())) == 3
    near, walked = smallest(net, x, labels), NEAREST["boundary"](net, x, labels)
    for found in (near, walked):
        assert lost(net, found.adversarial, labels).all() and np.array_equal(
            found.predicted, labels
        )
        assert np.array_equal(found.distance, distance(found.adversarial, x))
        assert found.adversarial.min() >= 0 and found.adversarial.max() <= 1
    np.testing.assert_allclose(walked.distance, near.distance, rtol=0.05)
    least = np.minimum(near.distance, walked.distance)
    for name, attack in WITHIN.items():
        broken = attack(net, x, labels, least * 1.1, schedule="cosine").broken
        # The margin to the largest rival can have its maximum in the ball below 0, beside another
        # rival's that has not.
        assert broken.all() if name == "targeted" else broken.mean() > 0.8
        assert not attack(net, x, labels, least * 0.97, schedule="cosine").broken.any()


def test_a_search_that_ends_in_a_corner_of_the_range_starts_elsewhere():
    _, x, _ = linear()
    # from most images the gradient leads to corners where the label still wins
    net, labels = random_net(6, x)
    assert np.all(smallest(net, x, labels).distance < 1)


def test_a_rival_that_is_hidden_behind_another_one_is_found_by_aiming_at_it():
    # With h = relu(0.5 - x_0): the label's logit is 0, rival 1's at most -0.5, and falls with h;
    # rival 2's starts far below and wins where h > 0.95. Up to h = 0.85 rival 1 is the larger one,
    # and leads away from there.
    first, shift, second = np.zeros((SIZE, SIZE)), np.zeros(SIZE), np.zeros((CLASSES, SIZE))
    first[0, 0], shift[0], second[1, 0], second[2, 0] = -1.0, 0.5, -1.9, 21.0
    net = relu_net(first, shift, second, [0.0, -0.5, -20.0, -100.0])
    x, labels = np.full((ROWS, SIZE), 0.5, np.float32), np.zeros(ROWS, int)
    assert not pgd(net, x, labels, 1.0, clip=None, restarts=4).broken.any()
    found = targeted(net, x, labels, 1.0, clip=None, schedule="constant")
    assert found.broken.all() and np.all(found.adversarial[:, 0] < 0.5 - 0.95)


# --------------------------------------------------------------------------------- what is promised


@pytest.mark.parametrize("attack", WITHIN)
@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3, 0.4, 1e30, 1e300])
def test_images_stay_within_their_own_ball_and_range(attack, size):
    net, x, labels = linear()
    radii = size * np.linspace(0, 1, len(x))
    for clip in ((0.25, 0.75), None):
        found = WITHIN[attack](net, x, labels, radii, clip=clip, steps=5)
        assert np.all(distance(found.adversarial, x) <= radii)
        assert clip is None or (
            found.adversarial.min() >= clip[0] and found.adversarial.max() <= clip[1]
        )
        assert np.array_equal(found.broken, lost(net, found.adversarial, labels))
    assert found.adversarial.dtype == np.float32


def test_ranges_that_float32_does_not_hold_are_kept():
    net, x, labels = linear()
    x = np.clip(x, np.float32(0.4), np.float32(0.6) - np.float32(1e-6))
    clip = (0.39999999, 0.6)  # the nearest float32 of 0.6 is above it
    for found in (
        pgd(net, x, labels, 1.0, clip=clip, restarts=2, steps=5),
        boundary(net, x, labels, clip=clip, steps=5),
    ):
        assert found.adversarial.astype(np.float64).min() >= clip[0]
        assert found.adversarial.astype(np.float64).max() <= clip[1]


@pytest.mark.parametrize("attack", WITHIN)
def test_epsilon_zero_breaks_only_what_is_wrong_already(attack):
    net, x, labels = linear()
    wrong = labels.copy()
    wrong[:3] = (wrong[:3] + 1) % CLASSES
    found = WITHIN[attack](net, x, wrong, 0.0)
    assert np.array_equal(found.adversarial, x)
    assert np.array_equal(found.broken, np.arange(len(x)) < 3) and np.array_equal(
        found.predicted, labels
    )


@pytest.mark.parametrize("search", NEAREST)
def test_an_image_that_is_wrong_already_has_distance_zero(search):
    net, x, labels = linear()
    found = NEAREST[search](net, x, (labels + 1) % CLASSES, steps=5)
    assert np.all(found.distance == 0) and np.array_equal(found.adversarial, x)
    assert np.array_equal(found.predicted, labels)


@pytest.mark.parametrize("clip", [(0.0, 1.0), None])
def test_a_constant_network_is_never_broken(clip):
    net, (_, x, _) = constant_net(), linear()
    labels = np.full(len(x), CLASSES - 1)
    for attack in WITHIN.values():
        assert not attack(net, x, labels, 1e6, clip=clip, steps=5).broken.any()
    for search in NEAREST.values():
        found = search(net, x, labels, clip=clip, steps=5)
        assert np.all(np.isinf(found.distance)) and np.array_equal(found.adversarial, x)


def test_a_tie_and_a_nan_count_as_broken():
    net, (_, x, _) = constant_net(), linear()
    labels = np.full(len(x), CLASSES - 1)
    for value in (float(CLASSES - 1), np.nan):  # another logit is as large, or no number
        net.layers[0].bias[...] = net.layers[0].bias[...].at[0].set(value)
        for attack in WITHIN.values():
            assert attack(net, x, labels, 0.1, steps=5).broken.all()
        for search in NEAREST.values():
            assert np.all(search(net, x, labels, steps=5).distance == 0)


def test_a_nan_that_appears_on_the_way_counts_as_broken():
    # Overflow to infinity minus infinity where the first pixel is above one half.
    first, shift, second = np.zeros((SIZE, SIZE)), np.zeros(SIZE), np.zeros((CLASSES, SIZE))
    first[0, 0], shift[0], second[:, 0] = 1e38, -0.5e38, 1e38
    net, (_, x, _) = relu_net(first, shift, second, np.arange(CLASSES)), linear()
    x[:, 0] = 0.4
    labels = np.full(len(x), CLASSES - 1)
    assert not lost(net, x, labels).any()
    found = pgd(net, x, labels, 0.3, restarts=2)
    assert found.broken.all() and np.all(found.adversarial[:, 0] > 0.5)
    assert np.all(boundary(net, x, labels, steps=50).distance < 0.5)


def test_the_key_decides_and_batch_mates_do_not():
    net, x, labels = linear()
    for search in (*NEAREST.values(), functools.partial(WITHIN["pgd"], epsilon=0.5)):
        run = functools.partial(search, net, x, labels, steps=7)
        first, again, other = (run(key=jax.random.key(k)) for k in (1, 1, 2))
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        if search is not NEAREST["smallest"]:  # deterministic until the rivals are through
            assert not np.array_equal(first.adversarial, other.adversarial)
    whole = smallest(net, x, labels, clip=None)
    parts = smallest(net, x, labels, clip=None, batch_size=3)
    np.testing.assert_allclose(parts.distance, whole.distance, rtol=1e-3)


def test_a_float64_network_under_x64_is_attacked_too(x64):
    net, x, labels = linear()
    net = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), net)
    truth = boundary_distances(net, x, labels)
    found = smallest(net, x, labels, clip=None)
    assert np.all(found.distance <= truth * 1.001) and np.all(found.distance >= truth * (1 - 1e-6))


# ------------------------------------------------------------------------------------------- errors


def test_bad_arguments_are_errors_that_name_the_value():
    net, x, labels = linear()
    for attack in (*WITHIN.values(), *NEAREST.values()):
        run = functools.partial(attack, epsilon=0.1) if attack in WITHIN.values() else attack
        with pytest.raises(ValueError, match=r"\(7,\)"):
            run(net, x, labels[:7])
        with pytest.raises(ValueError, match="float64"):
            run(net, x, labels.astype(float))
        with pytest.raises(ValueError, match=r"0\.\.3.*9"):
            run(net, x, np.full(ROWS, 9))
        with pytest.raises(ValueError, match=r"within clip.*\d\d\d\.\d"):
            run(net, x * 255, labels)
        with pytest.raises(ValueError, match="nan"):
            run(net, np.where(np.arange(SIZE) == 0, np.nan, x), labels, clip=None)
        with pytest.raises(ValueError, match="non-empty"):
            run(net, x[:0], labels[:0])
        with pytest.raises(ValueError, match=r"clip.*\(1, 0\)"):
            run(net, x, labels, clip=(1, 0))
        with pytest.raises(ValueError, match=r"steps.*0"):
            run(net, x, labels, steps=0)
        with pytest.raises(ValueError, match=r"batch_size.*0"):
            run(net, x, labels, batch_size=0)
        with pytest.raises(ValueError, match=r"2 logits.*\(1,\)"):
            run(nnx.Linear(SIZE, 1, rngs=nnx.Rngs(0)), x, labels * 0)
    for attack in WITHIN.values():
        for bad in (-0.1, np.nan, np.inf):
            with pytest.raises(ValueError, match=str(bad)):
                attack(net, x, labels, bad)
        with pytest.raises(ValueError, match=r"one radius or 8.*\(3,\)"):
            attack(net, x, labels, np.zeros(3))
        with pytest.raises(ValueError, match=r"restarts.*0"):
            attack(net, x, labels, 0.1, restarts=0)
        with pytest.raises(ValueError, match=r"step_size.*-1"):
            attack(net, x, labels, 0.1, step_size=-1)
        with pytest.raises(ValueError, match="'linear'"):
            attack(net, x, labels, 0.1, schedule="linear")
    with pytest.raises(ValueError, match=r"starts.*\(2, 5\)"):
        boundary(net, x, labels, starts=np.zeros((2, 5)))


# ----------------------------------------------------------------------------------------- the hunt


def test_the_quick_hunt_breaks_no_certificate_and_every_unsound_one():
    for net, tier in (("quick_0", "deterministic"), ("quick_1", "probabilistic")):
        (row,) = hunt.sound_rows(hunt.parse(["--quick", f"--nets={net}", f"--tiers={tier}"]))
        json.dumps(row)
        assert not row["alarm"], row
        assert row["certified"] == row["tried"] and row["norms_compared"] > 0
        # The attacks come near enough to mean something.
        assert 0.1 < row["median_ratio"] <= row["largest_ratio"] < 1
    for row in hunt.unsound_rows(hunt.parse(["--quick"])):
        assert not row["alarm"], row
        assert (
            row["certified"] == row["pgd"] == row["targeted"] == row["precise"] == row["tried"] > 0
        )


def test_the_hunt_sees_certificates_that_reach_too_far(monkeypatch):
    options = hunt.parse(["--quick", "--nets=quick_0", "--tiers=deterministic"])
    certified_radius = lipjax.certified_radius

    def too_far(*arguments, **options):
        found = certified_radius(*arguments, **options)
        return dataclasses.replace(found, radius=3 * found.radius)

    monkeypatch.setattr(lipjax, "certified_radius", too_far)
    (row,) = hunt.sound_rows(options)
    assert row["alarm"] and row["largest_ratio"] > 1
    assert (
        row["pgd"]
        and row["targeted"]
        and row["boundary"]
        and row["smallest"] == row["precise"] == row["tried"]
    )


@pytest.mark.parametrize(
    "alarms, status", [((False, False), 0), ((True, False), 1), ((False, True), 1)]
)
def test_the_hunts_exit_status_tells_whether_anything_broke(monkeypatch, capsys, alarms, status):
    for table, alarm in zip(("sound_rows", "unsound_rows"), alarms, strict=True):
        monkeypatch.setattr(hunt, table, lambda options, alarm=alarm: iter([{"alarm": alarm}]))
    assert hunt.main(["--json"]) == status
    assert [json.loads(line)["alarm"] for line in capsys.readouterr().out.splitlines()] == list(
        alarms
    )


def test_the_hunt_sees_a_norm_that_is_too_small_and_an_image_that_only_precise_logits_break():
    trap = unsound.traps()[0]
    precise = hunt.PreciseNetwork(trap.network, trap.images.shape[1:])
    (truth,) = precise.masked_norms(trap.images[0], trap.epsilon)
    # I + v v^T; the layer's weights are rounded to float32
    assert truth == pytest.approx(2.0, abs=1e-3)
    for certified, wrong in ((truth, 0), (truth * 0.999, 1), (np.nan, 1)):
        found = hunt.norms_below_svd(
            precise, trap.images[:1], [trap.epsilon], np.array([[certified]])
        )
        assert found == {"norms": wrong, "norms_compared": 1}
    net, x, labels = linear()
    precise = hunt.PreciseNetwork(net, (SIZE,))
    distance_to_each = precise.margins(x, labels)
    assert np.all(distance_to_each > 0) and np.all(precise.margins(x, (labels + 1) % CLASSES) < 0)
    logits = x.astype(np.float64) @ np.asarray(net.layers[0].kernel[...], np.float64)
    logits = np.sort(logits + np.asarray(net.layers[0].bias[...], np.float64), axis=1)
    np.testing.assert_allclose(
        np.asarray(distance_to_each, float), logits[:, -1] - logits[:, -2], rtol=1e-12
    )


def test_the_hunts_masks_are_those_of_the_bounds():
    net = tiny_net("clipped_maxmin", seed=5)
    x = np.random.default_rng(1).uniform(0, 1, (1, 6, 6, 2)).astype(np.float32)
    norms = hunt.PreciseNetwork(net, x.shape[1:]).masked_norms(x[0], 0.2)
    estimate = lipjax.estimate(net, x, np.zeros(1, int), 0.2, iterations=300)
    np.testing.assert_allclose(norms, estimate.norms[0], rtol=2e-3)
    whole = [np.linalg.norm(matrix.toarray(), 2) for matrix in _matrices(net, x.shape[1:])]
    assert np.prod(norms) < 0.9 * np.prod(whole)  # something is masked
    seen = hunt.PreciseNetwork(net, x.shape[1:]).masked_norms(x[0], 0.2, sampled=True)
    assert np.all(np.array(seen) <= np.array(norms) * (1 + 1e-9)) and np.prod(seen) > 0.5 * np.prod(
        norms
    )


def _matrices(net, shape):
    steps = hunt.PreciseNetwork(net, shape).steps
    return [step.matrix for step in steps if isinstance(step, hunt.check_layers.Affine)][:-1]


def test_the_hunts_options_are_checked(capsys):
    for bad in ("--nets=random_gelu", "--tiers=estimate", "--examples=0"):
        with pytest.raises(SystemExit):
            hunt.parse([bad])
        assert bad.split("=")[1] in capsys.readouterr().err
