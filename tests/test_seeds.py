"""The draws of a certificate: where their seed comes from, how the failure probability is split, no
draw used twice."""

import dataclasses
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lipjax
from lipjax import norms
from lipjax.bounds import relaxed
from lipjax.certificates import batches, prover, randomness, setup, verdicts
from lipjax.check import checker
from lipjax.formats import certificate_files

SIZE, BUMP, EPSILON = 64, 0.3, 0.1


def seen(seed: int) -> np.ndarray:
    """All that the bound of the first layer of the first image sees at a seed: starts of its
    Chebyshev recurrence, and that of the estimate that scales it; rows."""
    with jax.enable_x64(True):
        _, local = jax.random.split(jax.random.key(seed, impl="threefry2x32"))
        (starts,) = map(np.asarray, norms.chebyshev.starts(jax.random.fold_in(local, 0), [SIZE]))
    chirp = np.cos(0.5 * np.sqrt(5) * np.square(np.arange(SIZE, dtype=np.float64)))
    return np.concatenate([starts, chirp[None]])


def hidden_from(seed: int):
    """A network whose top direction is orthogonal to what a seed draws, ``W = I + 0.3 v v^T``, and
    v.

    Beside it rows that no input of the ball switches on: they keep the proven norm of the whole
    layer loose.
    """
    v = np.random.default_rng(1).choice([-1.0, 1.0], SIZE)
    draws = seen(seed)
    for _ in range(3):  # to the last digit
        v = v - draws.T @ np.linalg.lstsq(draws.T, v, rcond=None)[0]
    v = v / np.linalg.norm(v)
    rows = SIZE + 2
    like = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    net = nnx.Sequential(nnx.Linear(SIZE, rows, **like), lipjax.ReLU(), nnx.Linear(rows, 2, **like))
    matrix = np.concatenate([np.eye(SIZE) + BUMP * np.outer(v, v), np.full((2, SIZE), 0.5)])
    net.layers[0].kernel[...] = jnp.asarray(matrix.T)
    net.layers[0].bias[...] = jnp.asarray(
        np.concatenate([np.full(SIZE, 10.0), np.full(2, -1000.0)])
    )
    head = np.concatenate([np.stack([v, -v], axis=1), np.zeros((2, 2))])
    net.layers[2].kernel[...] = jnp.asarray(head)
    # The margin is a little less than what the true norm can take.
    x = np.full((1, SIZE), 0.5)
    gap = float(head[:, 0] @ np.maximum(matrix @ x[0] + np.asarray(net.layers[0].bias[...]), 0))
    wanted = 1.2 * EPSILON
    net.layers[2].bias[...] = jnp.asarray([wanted - gap, gap - wanted])
    return net, x, v


def test_a_network_made_against_one_seed_is_not_certified_by_default(x64):
    net, x, v = hidden_from(0)
    assert np.argmax(net(jnp.asarray(x[0]))) == 0
    assert np.argmax(net(jnp.asarray(x[0] - 0.99 * EPSILON * v))) == 1
    label = np.array([0])
    found = lipjax.certify(net, x, label, EPSILON)
    assert found.correct[0] and not found.certified[0]
    assert lipjax.certified_radius(net, x, label).radius[0] < 0.99 * EPSILON
    # The network is no straw man: with the seed that it was made for it passes, so such a seed must
    # not be the default.
    assert lipjax.certify(net, x, label, EPSILON, seed=0).certified[0]


def small_net(layers=3):
    rngs = nnx.Rngs(0)
    found = []
    for _ in range(layers - 1):
        found += [nnx.Linear(3, 3, rngs=rngs), lipjax.ReLU()]
    return nnx.Sequential(*found, nnx.Linear(3, 3, rngs=rngs))


def images(count=3):
    return np.random.default_rng(0).uniform(0, 1, (count, 3)).astype(np.float32)


def same(one, other) -> bool:
    return all(np.array_equal(value, getattr(other, name)) for name, value in vars(one).items())


def test_a_seed_is_drawn_by_default_recorded_and_repeats_the_certificate_when_given():
    certify = functools.partial(lipjax.certify, small_net(), images(), None, 1e-3)
    first, second = certify(), certify()
    assert first.seed != second.seed and first.seed_from == second.seed_from == "system"
    assert not np.array_equal(first.norms, second.norms)
    again = certify(seed=first.seed)
    assert again.seed_from == "given" and same(
        dataclasses.replace(again, seed_from="system"), first
    )
    radius = functools.partial(lipjax.certified_radius, small_net(), images(), None)
    drawn = radius()
    again = radius(seed=drawn.seed)
    assert drawn.seed_from == "system" and same(
        dataclasses.replace(again, seed_from="system"), drawn
    )
    sure = certify(tier="deterministic")
    assert (sure.seed, sure.seed_from) == (0, "unused") and same(
        sure, certify(tier="deterministic")
    )


def test_the_statement_of_a_given_seed_says_what_it_assumes(tmp_path):
    net, x = small_net(), images()
    given, drawn = (lipjax.certify(net, x, None, 1e-3, seed=seed) for seed in (0, None))
    radius = lipjax.certified_radius(net, x, None, seed=0)
    for found in (given, radius):
        assert (
            "(seed 0, given: network and images are assumed to be chosen independently of it)"
            in found.statement
        )
    assert (
        f"(seed {drawn.seed}, from the operating system)" in drawn.statement
        and "assumed" not in drawn.statement
    )
    for found in (given, drawn):
        path = tmp_path / "certificate.npz"
        certificate_files.save(path, found, net, x, found.predicted)
        header, _ = certificate_files.load(path)
        assert (header["version"], header["seed"], header["seed_from"]) == (
            certificate_files.VERSION,
            found.seed,
            found.seed_from,
        )
        assert header["statement"] == found.statement


def test_files_of_version_1_stay_readable_and_say_what_they_said(tmp_path):
    net, x = small_net(), images()
    found, path = lipjax.certify(net, x, None, 1e-3, seed=5), tmp_path / "certificate.npz"
    certificate_files.save(path, found, net, x, found.predicted)
    header, arrays = certificate_files.load(path)
    later = {name for name, field in certificate_files.HEADER.items() if field.since > 1}
    old = {name: value for name, value in header.items() if name not in later} | {"version": 1}
    arrays = {name: arrays[name] for name in certificate_files.ARRAYS}
    old["statement"] = certificate_files.statement(old)
    certificate_files.write(path, old, arrays)
    read, _ = certificate_files.load(path)
    assert (
        "seed_from" not in read
        and "over the tool's own draws (seed 5), all certificates" in read["statement"]
    )
    report = checker.check(
        certificate_files.describe(net, x[0]),
        *(x, found.predicted, read, arrays, np.random.default_rng(0)),
    )
    assert report.confirmed, report
    certificate_files.write(path, {**header, "version": 1}, arrays)
    with pytest.raises(certificate_files.CertificateFileError, match=r"not known: .*seed_from"):
        certificate_files.load(path)


def test_no_bit_of_a_seed_is_lost(x64):
    def key(seed):
        found = setup.set_up(
            small_net(),
            images(),
            None,
            tier="probabilistic",
            failure_probability=0.1,
            mode="local",
            arithmetic=None,
            budget=1.0,
            seed=seed,
            batch_size=1,
            examine=None,
        )
        return tuple(jax.random.key_data(found.key).tolist())

    seeds = [0, *(2**bit for bit in range(randomness.SEED_BITS)), 2**63 - 1]
    assert len({key(seed) for seed in seeds}) == len(seeds)
    drawn = {randomness.drawn_seed() for _ in range(100)}
    assert len(drawn) == 100 and all(0 <= seed < 2**63 for seed in drawn)
    assert max(drawn) > 2**61 and len({seed % 2 for seed in drawn}) == 2


@pytest.mark.parametrize(
    "seed, error", [(-1, ValueError), (2**63, ValueError), (0.5, TypeError), ("1", TypeError)]
)
@pytest.mark.parametrize("function", ["certify", "certified_radius"])
def test_seeds_that_are_no_integers_of_63_bits_are_errors(function, seed, error):
    arguments = [small_net(), images(), None, *([0.1] if function == "certify" else [])]
    with pytest.raises(error, match=rf"seed must .*{seed}"):
        getattr(lipjax, function)(*arguments, seed=seed)


def test_a_seed_of_63_bits_is_taken_as_it_is():
    for seed in (0, 1, 2**62 + 1, 2**63 - 1, np.int64(7)):
        assert randomness.checked_seed(seed) == seed


# ---------------------------------------------------------------------------------------- the split


def test_a_call_that_says_nothing_of_attempts_makes_one():
    assert randomness.split_failure_probability(0.5, 3, 2) == randomness.split_failure_probability(
        0.5, 3, 2, 1
    )


@pytest.mark.parametrize("delta", [1e-6, 0.3, 1 / 3, 0.999])
@pytest.mark.parametrize(
    "images_, layers, attempts", [(1, 1, 1), (3, 2, 6), (10_000, 7, 6), (49, 3, 1), (1, 0, 1)]
)
def test_the_shares_of_all_bounds_add_up_to_at_most_the_whole(delta, images_, layers, attempts):
    share = randomness.split_failure_probability(delta, images_, layers, attempts)
    whole = Fraction(share) * max(1, layers) * (images_ + 1) * attempts
    assert Fraction(delta) * (1 - Fraction(1, 10**12)) <= whole <= Fraction(delta)


@pytest.fixture
def draws(monkeypatch):
    """Every call of the probabilistic bound, as it runs: what it drew and its share.

    Nothing is compiled here, as that would be kept for other tests; the bounds are so large that
    every attempt fails."""
    found = []

    def record(operator, start, failure_probability, like, mask_in, mask_out):
        def note(data):
            found.append((tuple(np.ravel(data).tolist()), failure_probability))

        jax.debug.callback(note, start)
        return jnp.asarray(1e90)

    def eager(function, *static, optimize=True):
        return function

    monkeypatch.setattr(norms.chebyshev, "inflated_norm_bound", record)
    monkeypatch.setattr(batches, "compiled", eager)
    monkeypatch.setattr(batches, "compile_for", lambda *_: None)

    # So that what was recorded is what counts.
    def unknown(graph):
        return (norms.best.WholeNorm(jnp.asarray(1e90), jnp.zeros((), bool)),) * 3

    monkeypatch.setattr(setup, "whole_norms_of", unknown)
    monkeypatch.setattr(norms.closed, "schur_bound", lambda *_: jnp.asarray(1e90))
    monkeypatch.setattr(relaxed.Reverse, "gain", lambda *_: jnp.asarray(1e90))
    return found


@pytest.mark.parametrize(
    "mode, kinds",
    [("paper", "both"), ("global", "global"), ("local", "local"), ("auto", "local anew")],
)
def test_no_draw_is_used_twice_and_their_shares_are_within_the_failure_probability(
    draws, mode, kinds
):
    """Three images, two layers with norms; whatever the batches, and independent of them. At this
    radius nothing is decided early."""
    keys = {}
    for size in (3, 2):
        draws.clear()
        lipjax.certify(
            small_net(),
            images(),
            None,
            3.0,
            mode=mode,
            failure_probability=0.3,
            seed=1,
            batch_size=size,
            **({"seconds_per_image": np.inf, "steps": 0} if mode == "auto" else {}),
        )
        jax.effects_barrier()
        keys[size] = {key for key, _ in draws}
        # One for each layer and image, and one for each layer that all images share.
        counts = {"both": 3 + 1, "global": 1, "local": 3, "local anew": 3 + 3}
        assert len(keys[size]) == 2 * counts[kinds]
        (share,) = {share for _, share in draws}
        assert len(keys[size]) * Fraction(share) <= Fraction(0.3)
    assert keys[3] == keys[2]


def test_every_attempt_of_a_radius_draws_anew_and_all_shares_are_within_the_failure_probability(
    draws, monkeypatch
):
    monkeypatch.setattr(
        verdicts,
        "radius_batch",
        lambda shared, columns, **_: {"radius": jnp.full(len(columns[0]), 0.1)},
    )
    found = lipjax.certified_radius(
        small_net(), images(), None, mode="paper", failure_probability=0.3, seed=1, batch_size=2
    )
    jax.effects_barrier()
    assert not found.certified.any()
    keys, attempts = {key for key, _ in draws}, len(prover.RADIUS_SHARES)
    assert len(keys) == 2 * (3 + 1) * attempts
    (share,) = {share for _, share in draws}
    assert Fraction(0.29) <= len(keys) * Fraction(share) <= Fraction(0.3)


def test_images_that_are_not_examined_leave_the_draws_of_the_others_as_they_are(draws):
    def keys_of(examine):
        draws.clear()
        lipjax.certify(small_net(), images(), None, 1e-3, seed=1, examine=np.asarray(examine))
        jax.effects_barrier()
        return {key for key, _ in draws}

    whole, parts = keys_of([True] * 3), [keys_of(np.arange(3) == i) for i in range(3)]
    assert len(whole) == 6 and set.union(*parts) == whole and all(len(part) == 2 for part in parts)
