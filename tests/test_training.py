"""The scripts as a user runs them: train, kill, resume, certify, and what goes wrong; schedules,
order, stored vectors."""

import dataclasses
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT
from flax import nnx

import lipjax
from lipjax import report, training
from lipjax.bounds import vector_shapes
from lipjax.configs import baselines, digits
from lipjax.data import sets
from lipjax.training import feeding, step
from lipjax.training.metrics import read_metrics

SMALL = [
    "--config=configs/mnist_small.py",
    "--config.model.activation=clipped_maxmin",
    "--config.bound.mode=local",
    "--config.bound.loss=bcp",
    "--config.data.name=digits",
    "--config.data.train_examples=96",
    "--config.model.widths=(4,)",
    "--config.model.dense=16",
    "--config.batch_size=32",
    "--config.epsilon.train=0.55",
    "--config.epsilon.test=0.5",
    "--config.schedule.epochs=10",
    "--config.schedule.ramp=5.0",
    "--config.optimizer.decay_start=5.0",
    "--config.evaluation.every=2",
    "--config.checkpoints.every=1",
]
# What a step carries along beyond that, for runs that are stopped.
RECIPE = ["--config.schedule.first=4", "--config.optimizer.average=0.9"]


def command(script, *flags):
    return [sys.executable, script, *flags]


def run(script, *flags, check=True):
    done = subprocess.run(
        command(script, *flags), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def refused(done, code=1) -> str:
    """What a script said that ended with an error of ours: a message, no traceback."""
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done.stderr


# ---------------------------------------------------------------------------------- kill and resume


def deterministic(path):
    return [
        {k: v for k, v in line.items() if k != "seconds"}
        for line in read_metrics(path / "metrics.jsonl")
    ]


def stored(workdir, kind):
    """Step, meta and every leaf of the newest checkpoint of a kind, as Orbax reads it without being
    told what to expect."""
    folder = workdir / "checkpoints" / kind
    step = max(int(path.name) for path in folder.iterdir())
    with ocp.CheckpointManager(folder) as manager:
        items = ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore())
        found = manager.restore(step, args=items)
    return step, found.meta, found.state


def half_done_saves(workdir):
    return [*(workdir / "checkpoints").glob("*/*tmp*")]


def kill_in_the_middle(process, workdir, epochs, inside_a_save, delay):
    """Kills -9 once so many epochs are written: inside the next save, or after `delay` seconds.
    False if it ended before."""
    # by the kill before; the run removes them when it starts
    left_over = set(half_done_saves(workdir))
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
        if len(read_metrics(workdir / "metrics.jsonl")) < epochs:
            continue
        if not inside_a_save:
            time.sleep(delay)
            break
        if not left_over >= set(half_done_saves(workdir)):
            # frozen, so that it cannot finish the save before it is killed
            os.kill(process.pid, signal.SIGSTOP)
            if not left_over >= set(half_done_saves(workdir)):
                break
            os.kill(process.pid, signal.SIGCONT)
    if process.poll() is not None:
        return False
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return True


def test_a_run_killed_again_and_again_ends_bit_for_bit_as_one_never_stopped(tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run("train.py", *SMALL, *RECIPE, f"--workdir={straight}")
    dice, kills = random.Random(0), 0
    for epochs, inside_a_save in ((2, True), (0, False), (7, True)):
        train = command("train.py", *SMALL, *RECIPE, f"--workdir={broken}")
        process = subprocess.Popen(
            train, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        killed = kill_in_the_middle(
            process, broken, epochs, inside_a_save, dice.uniform(0, 0.1 if epochs else 4.0)
        )
        assert killed or process.returncode == 0
        if killed and inside_a_save:
            assert half_done_saves(broken)
        kills += killed
    assert kills >= 2
    last = run("train.py", *SMALL, *RECIPE, f"--workdir={broken}")
    assert "continuing after epoch" in last.stdout

    assert [line["epoch"] for line in deterministic(straight)] == list(range(1, 11))
    assert deterministic(straight) == deterministic(broken)
    for kind in ("last", "best"):
        (step, meta, state), found = stored(straight, kind), stored(broken, kind)
        assert (step, meta) == found[:2] and state.keys() == found[2].keys()
        for name, value in state.items():
            assert value.dtype == found[2][name].dtype
            assert np.asarray(value).tobytes() == np.asarray(found[2][name]).tobytes(), name
        if kind == "last":
            names = [name for name in state if name.startswith("network.")]
            means = [state[name.replace("network.", "average.", 1)] for name in names]
            pairs = zip((state[name] for name in names), means, strict=True)
            assert not all(np.array_equal(a, b) for a, b in pairs)
            assert step == int(state["step"]) == 30
            for part in ("network.", "average.", "optimizer.", "vectors.local.", "vectors.global."):
                assert any(name.startswith(part) for name in state)
    assert not half_done_saves(broken)

    other = refused(
        run("train.py", *SMALL, *RECIPE, "--config.seed=1", f"--workdir={broken}", check=False)
    )
    assert "seed: stored 0, now 1" in other and "Give another --workdir" in other

    few = ["--examples=16", "--pgd_restarts=1", "--pgd_steps=5", "--modes=local"]
    run("certify.py", f"--workdir={broken}", *few)
    summary = json.loads((broken / "certification" / "summary.json").read_text())
    assert summary["run"]["tier"] == "probabilistic" and summary["run"]["examples"] == 16
    file = np.load(broken / "certification" / "examples.npz")
    assert len(file["certified_local"]) == 16 and not np.any(
        file["certified_local"] & file["broken_by_pgd"]
    )
    assert (broken / "certification" / "curve.png").stat().st_size > 10_000
    page = (broken / "certification" / "report.html").read_text()
    assert (
        "16 test images of digits" in page
        and "python train.py --config=configs/mnist_small.py" in page
    )
    assert report.build(broken / "certification").read_text() == page
    assert (broken / "curves.png").read_bytes().startswith(b"\x89PNG")
    certificate = broken / "certification" / "certificate.npz"
    confirmed = run("-m", "lipjax.check", str(certificate), f"--workdir={broken}").stdout
    assert "CONFIRMED: certificates of 16 images, 'digits', split 'test'" in confirmed


def test_a_loss_that_overflows_ends_training_with_the_step_and_leaves_a_good_checkpoint(tmp_path):
    flags = [
        *SMALL,
        "--config.batch_size=96",
        "--config.optimizer.learning_rate=1e30",
        f"--workdir={tmp_path}/run",
    ]
    message = refused(run("train.py", *flags, check=False))
    assert (
        "is nan at step 1: training stopped" in message
        or "is inf at step 1: training stopped" in message
    )
    assert "lower optimizer.learning_rate" in message
    step, meta, state = stored(tmp_path / "run", "last")
    assert step == int(state["step"]) == meta["epoch"] == 1
    assert all(
        np.all(np.isfinite(v))
        for name, v in state.items()
        if name.startswith(("network.", "optimizer."))
    )
    assert [line["epoch"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1]


# ----------------------------------------------------------------------------------------- mistakes


def test_certifying_what_was_never_trained_says_what_to_do(tmp_path):
    assert "train first" in refused(run("certify.py", f"--workdir={tmp_path}", check=False))


@pytest.mark.parametrize(
    "flag, code, message",
    [
        ("--config.bound.mod=local", 2, "no such field: 'mod'\nDid you mean \"mode\""),
        ("--config.optimizer.decay_start=100.0", 1, "decay_start <= schedule.epochs, got"),
    ],
)
def test_a_start_that_fails_says_why_and_does_not_claim_the_workdir(tmp_path, flag, code, message):
    done = run("train.py", *SMALL, flag, f"--workdir={tmp_path}/run", check=False)
    assert message in refused(done, code)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", baselines.METHODS)
def test_every_baseline_is_a_configuration_whose_loss_can_be_taken(method):
    config = baselines.get_config(method)
    config.model.widths, config.model.dense = (4,), 8
    training.check_config(config)
    network = training.build_network(config, (8, 8, 1), 10)
    vectors = lipjax.initial_vectors(network, (8, 8, 1), config.bound.mode)
    loss, _ = jax.eval_shape(
        lambda net, x: training.example_loss(net, x, 3, 0.1, 0.5, vectors, config),
        network,
        jnp.zeros((8, 8, 1)),
    )
    assert loss.shape == ()
    assert baselines.get_config(f"{method}/cifar10_maxmin").model.name == "conv6_dense2"
    with pytest.raises(ValueError, match=r"glora.*gloro"):
        baselines.get_config("glora")
    with pytest.raises(ValueError, match=r"cifar_maxmin.*cifar10_maxmin"):
        baselines.get_config(f"{method}/cifar_maxmin")


@pytest.mark.parametrize(
    "field, value, message",
    [
        (
            "bound.mode",
            "lokal",
            "bound.mode must be one of global, bcp, paper, local, linear, rows, tight, tight_rows, "
            "unmasked, got 'lokal'",
        ),
        (
            "bound.loss",
            "trade",
            "bound.loss must be one of bcp, gloro, trades, lmt, emma, calibrated, offset, "
            "annealing, crm, got 'trade'",
        ),
        (
            "vectors.store",
            "disk",
            "vectors.store must be one of example, host, got 'disk'",
        ),
        ("vectors.store", "layer", "vectors.store 'layer' is no more: networks trained with it"),
        ("vectors.store", "none", 'Give "example", or "host" and a narrow vectors.dtype'),
        (
            "vectors.dtype",
            "float16",
            "vectors.dtype must be one of float32, bfloat16, float8_e4m3fn, got 'float16'",
        ),
        ("batch_size", 0, "batch_size must be finite and at least 1, got 0"),
        ("schedule.epochs", -1, "schedule.epochs must be finite and at least 1, got -1"),
        ("evaluation.every", 0, "evaluation.every must be"),
        ("bound.iterations", 0, "bound.iterations must be"),
        ("checkpoints.keep", 1, "checkpoints.keep must be finite and at least 2, got 1"),
        ("epsilon.train", -0.1, "epsilon.train must be finite and at least 0, got -0.1"),
        ("epsilon.test", float("inf"), "epsilon.test must be finite"),
        ("epsilon.test", float("nan"), "epsilon.test must be finite"),
        ("schedule.ramp", -1.0, "schedule.ramp must be"),
        ("seed", -1, "seed must be"),
        ("optimizer.average", 1.0, "optimizer.average must be below 1, such as 0.999, got 1.0"),
        ("schedule.first", 100, "schedule.first must be below schedule.epochs, 100, got 100"),
        ("bound.first", "", "bound.first must be one of global, bcp,"),
    ],
)
def test_a_field_with_a_value_that_makes_no_sense_is_named(field, value, message):
    config = digits.get_config()
    training.check_config(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError) as caught:
        training.check_config(config)
    assert message in str(caught.value)


def test_a_configuration_without_a_field_is_an_error_that_names_it():
    config = training.default_config()
    del config.bound.rivals
    with pytest.raises(ValueError, match=r"has no bound\.rivals: begin with .*default_config"):
        training.check_config(config)


def test_the_default_configuration_has_every_field_that_is_described_and_passes():
    config = training.default_config()
    training.check_config(config)
    for name, field in training.FIELDS.items():
        assert functools.reduce(getattr, name.split("."), config) == field.default


def test_the_configuration_of_a_run_with_a_store_that_is_no_more_still_gives_its_network():
    """Certifying needs the network of an old run, and none of its vectors."""
    config = digits.get_config()
    config.vectors.store = "layer"
    network = training.build_network(config, (8, 8, 1), 10)
    assert jax.eval_shape(network, jnp.zeros((1, 8, 8, 1))).shape == (1, 10)


def test_a_non_finite_loss_stops_training_and_names_the_step():
    good, bad = {"loss": 1.0, "gradient_norm": 1.0}, {"loss": 1.0, "gradient_norm": float("nan")}
    training.check_finite([good, good], 5)
    with pytest.raises(training.NonFiniteError, match="gradient_norm is nan at step 6"):
        training.check_finite([good, bad], 5)


# --------------------------------------------------------------------------------- schedules, order


def test_the_ramp_waits_rises_and_stays():
    found = [float(training.ramp(10 * epoch, 10, 1.0, 2.0)) for epoch in range(6)]
    assert found == [0, 0, 0.5, 1, 1, 1]
    # no ramp: a jump
    assert [float(training.ramp(step, 10, 1.0, 0.0)) for step in (10, 11)] == [0, 1]


def test_the_learning_rate_is_constant_then_falls_exponentially_to_its_final_value():
    config = digits.get_config()
    config.schedule.epochs, config.optimizer.decay_start = 20, 10.0
    config.optimizer.learning_rate, config.optimizer.final_learning_rate = 1e-2, 1e-4
    schedule = training.learning_rate(config, steps_per_epoch=5)
    found = [float(schedule(5 * epoch)) for epoch in (0, 10, 15, 20, 30)]
    np.testing.assert_allclose(found, [1e-2, 1e-2, 1e-3, 1e-4, 1e-4], rtol=1e-5)
    config.optimizer.final_learning_rate = 1.0
    with pytest.raises(ValueError, match=r"final_learning_rate=1\.0"):
        training.learning_rate(config, 5)


def test_the_learning_rate_rises_linearly_and_falls_on_half_a_cosine():
    config = digits.get_config()
    config.schedule.epochs, config.optimizer.decay_start, config.optimizer.rise = 20, 8.0, 4.0
    config.optimizer.learning_rate, config.optimizer.final_learning_rate = 1e-2, 1e-4
    config.optimizer.decay = "cosine"
    schedule = training.learning_rate(config, steps_per_epoch=5)
    found = [float(schedule(step)) for step in (0, 9, 19, 39, 70, 100)]
    middle = (1e-2 + 1e-4) / 2
    np.testing.assert_allclose(found, [5e-4, 5e-3, 1e-2, 1e-2, middle, 1e-4], rtol=1e-5)
    config.optimizer.rise = 9.0
    with pytest.raises(ValueError, match=r"0 <= rise <= decay_start"):
        training.learning_rate(config, 5)


# ----------------------------------------------------------------------------------- stored vectors


@pytest.mark.parametrize("dtype", training.VECTOR_TYPES)
def test_stored_vectors_keep_their_direction_and_zero_and_are_always_finite(dtype):
    def kept(vector):
        return np.asarray(
            training.unpack_vector(training.pack_vector(jnp.asarray(vector), dtype), dtype),
            np.float64,
        )

    size = 64 * 64 * 64  # the largest activation of the published networks
    spread = np.random.default_rng(0).normal(size=size).astype(np.float32)
    spread /= np.linalg.norm(spread)
    back = kept(spread)
    assert back @ spread / np.linalg.norm(back) > 0.999
    assert not np.any(kept(np.zeros(size, np.float32)))
    # All weight on one entry of many is beyond the range of float8, whose overflow would be NaN.
    one = np.zeros(size, np.float32)
    one[7] = -1
    back = kept(one)
    assert back[7] < 0 and np.all(np.isfinite(back)) and np.count_nonzero(back) == 1


MOST = 20  # steps of the trainer's longest call


def small_net(threshold):
    """4x4x1 images, one convolution, one hidden dense layer, clipped ReLU, random biases; four
    classes."""
    rngs, bias = nnx.Rngs(0), jax.nn.initializers.normal(0.3)
    return nnx.Sequential(
        nnx.Conv(1, 4, (3, 3), strides=2, padding=1, rngs=rngs, bias_init=bias),
        lipjax.ClippedReLU((2, 2, 4), threshold=threshold),
        lipjax.Flatten(),
        nnx.Linear(16, 6, rngs=rngs, bias_init=bias),
        lipjax.ClippedReLU(6, threshold=threshold),
        nnx.Linear(6, 4, rngs=rngs, bias_init=bias),
    )


@pytest.fixture(scope="module")
def trainer():
    return make_trainer()


def make_trainer(**fields):
    """Eight random images, ``start(network)``, a state, and ``steps(state, n)``: n steps at full
    epsilon, last metrics.

    Learning rate 0: nothing changes but the vectors.
    """
    config = digits.get_config()
    config.batch_size, config.epsilon.train, config.schedule.ramp = 8, 0.3, 0.0
    config.update_from_flattened_dict(fields)
    images = jax.random.uniform(jax.random.key(0), (8, 4, 4, 1))
    labels = jnp.arange(8) % 4
    transform = optax.sgd(0.0)

    def start(network):
        state = training.initial_state(network, transform, config, 8, (4, 4, 1))
        # epsilon is 0 in the very first step
        return dataclasses.replace(state, step=jnp.asarray(1, jnp.int32))

    train = sets.Dataset(
        "random", "train", np.asarray(images), np.asarray(labels), 1.0, 4, np.arange(8)
    )
    run = training.make_steps(
        config, transform, 1, train, training.device_mesh(), start(small_net(0.5)), MOST
    )
    slots = jnp.zeros((MOST, 8), jnp.int32)  # one example for each place

    def steps(state, count):
        state, metrics = run(state, images, labels, slots, slots, count)
        return state, {name: float(values[count - 1]) for name, values in metrics.items()}

    return images, start, steps


@functools.partial(jax.jit, static_argnames="iterations")
def lipschitz(network, images, iterations, vectors):
    def one(x, vectors):
        return lipjax.bound(network, x, 0.3, iterations=iterations, vectors=vectors).lipschitz

    return jax.vmap(one)(images, vectors)


def test_estimates_recover_when_what_was_all_masked_opens_again(trainer):
    """The absorbing zero of METHOD 7: a vector that was masked to zero must not stay there, its
    norm estimated as 0."""
    images, start, steps = trainer
    network, dead = small_net(0.5), small_net(0.0)
    starts = tuple(
        jax.random.normal(jax.random.key(1), (8, *s)) for s in vector_shapes(network, (4, 4, 1))
    )
    converged = np.asarray(lipschitz(network, images, 300, {"local": starts}))
    assert converged.min() > 0.1

    state, metrics = steps(start(dead), 2)
    assert metrics["lipschitz_estimate"] == 0
    # all masked: all vectors are zero
    assert not any(np.any(vectors) for vectors in state.vectors["local"])
    # The trap is real: from the stored vectors alone the norms stay 0, though they are not.
    assert not np.any(lipschitz(network, images, 300, state.vectors))

    state, _ = steps(dataclasses.replace(state, network=network), 1)  # the masks open again
    for vectors in state.vectors["local"]:
        assert np.all(np.linalg.norm(np.asarray(vectors).reshape(8, -1), axis=1) > 0)
    state, metrics = steps(state, 10)
    assert metrics["lipschitz_estimate"] == pytest.approx(converged.mean(), rel=0.02)
    each = np.asarray(lipschitz(state.network, images, 0, state.vectors))
    assert np.all(each > 0.9 * converged) and np.all(each < 1.001 * converged)


def test_estimates_come_close_to_the_norms_with_one_iteration_a_step():
    images, start, steps = make_trainer(**{"bound.iterations": 1})
    network = small_net(0.5)
    starts = tuple(
        jax.random.normal(jax.random.key(1), (8, *s)) for s in vector_shapes(network, (4, 4, 1))
    )
    converged = np.asarray(lipschitz(network, images, 300, {"local": starts})).mean()
    state, metrics = steps(start(network), MOST)
    assert 0.9 * converged < metrics["lipschitz_estimate"] < 1.001 * converged
    assert {name: len(v[0].shape) for name, v in state.vectors.items()} == {"local": 4}


def test_the_stored_vectors_belong_to_their_examples(trainer):
    images, start, steps = trainer
    state, _ = steps(start(small_net(0.5)), 20)
    right = np.asarray(lipschitz(state.network, images, 0, state.vectors))
    turned = jax.tree.map(lambda v: jnp.roll(v, 1, axis=0), state.vectors)
    wrong = np.asarray(lipschitz(state.network, images, 0, turned))
    # Without an iteration the norm is that of the image of the vector itself: an example's own fits
    # it best.
    assert np.all(right > wrong)


# ---------------------------------------------------------------------------------- steps and calls


def steps_on_digits(calls, stop_before=None, **fields):
    """State and metrics after the calls, each of so many steps, of a small net on 24 digits."""
    config = digits.get_config()
    config.batch_size, config.model.widths, config.model.dense, config.schedule.ramp = (
        12,
        (4,),
        8,
        1.0,
    )
    config.data.augment = True
    config.update_from_flattened_dict(fields)
    train = training.load_data(config).train.take(np.arange(36))
    mesh, transform = training.device_mesh(), optax.sgd(0.05, momentum=0.9)
    network = training.build_network(config, (8, 8, 1), 10)
    store = training.VectorStore(config, 36, mesh, 3)
    state = training.initial_state(network, transform, config, store.rows_for, (8, 8, 1))
    steps = training.make_steps(config, transform, 3, train, mesh, state, 3)
    feed, metrics, first = feeding.Feeder(train, config, mesh, 3), [], 0
    for count in calls:
        if stop_before == first:  # as a run that goes on from a checkpoint
            saved = store.whole_state(state)
            store = training.VectorStore(config, 36, mesh, 3)
            state = store.restored(jax.tree.map(np.array, saved))
        state, values = steps(store.load(state, first, count), *feed(first, count), count)
        store.save(state, first, count)
        metrics += [
            {name: float(column[i]) for name, column in values.items()} for i in range(count)
        ]
        first += count
    return store.whole_state(state), metrics


def test_neither_calls_nor_where_images_and_vectors_lie_nor_a_restart_changes_a_bit(monkeypatch):
    beyond = {"optimizer.average": 0.7, "data.rotation": 20.0}
    state, metrics = steps_on_digits([3, 3], **beyond)
    assert metrics[-1]["epsilon"] > 0
    for elsewhere, calls in ((False, [2, 1, 1, 2]), (True, [1, 1, 1, 1, 2])):
        fields = dict(beyond)
        if elsewhere:  # each call brings its images, and takes its vectors along and back
            monkeypatch.setattr(feeding, "RESIDENT_BYTES", 0)
            fields["vectors.store"] = "host"
        other, others = steps_on_digits(calls, stop_before=3, **fields)
        assert isinstance(other.vectors["local"][0], np.ndarray) == elsewhere
        assert others == metrics
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_the_average_is_the_mean_at_first_and_then_forgets_and_it_is_what_is_evaluated():
    """Written out: with a decay of 0.75 the first four count alike, whatever there was before."""
    networks = [{"kernel": jnp.asarray([float(n), -(n**2)])} for n in (3, 1, 4, 1, 5, 9)]
    before = {"kernel": jnp.asarray([1e3, 1e3])}
    state = training.State(0, before, None, {}, 0, before)
    for network in networks:
        average = step._averaged(state, network, 0.75)
        state = training.State(state.step + 1, network, None, {}, 0, average)
        wanted = np.mean([n["kernel"] for n in networks[:4]], axis=0)
        if state.step == 4:
            np.testing.assert_allclose(state.evaluated["kernel"], wanted, rtol=1e-6)
    for network in networks[4:]:
        wanted = 0.75 * wanted + 0.25 * np.asarray(network["kernel"])
    np.testing.assert_allclose(state.evaluated["kernel"], wanted, rtol=1e-6)
    without = training.State(0, before, None, {}, 0)
    assert step._averaged(without, networks[0], 0.0) is None and without.evaluated is before


def test_modes_follow_one_another_and_leave_each_others_vectors_alone():
    config = digits.get_config()
    config.schedule.epochs, config.schedule.first, config.bound.first = 4, 3, "paper"
    assert [training.mode_at(config, epoch) for epoch in range(4)] == ["paper"] * 3 + ["local"]
    assert training.modes_of(config) == ["paper", "local"]
    config.schedule.first = 0
    assert training.modes_of(config) == ["local"]
    changed = training.with_mode(config, "rows")
    assert changed.bound.mode == "rows" and config.bound.mode == "local"

    both = {"schedule.first": 1, "bound.first": "local", "bound.mode": "global"}
    state, _ = steps_on_digits([1], **both)  # makes the steps of bound.mode
    assert sorted(state.vectors) == ["global", "local"]
    assert not any(np.any(v) for v in state.vectors["local"])
    assert all(np.any(v) for v in state.vectors["global"])


@pytest.mark.parametrize("mode", ["local", "paper"])
def test_a_batch_in_parts_is_the_same_up_to_rounding(mode):
    whole, metrics = steps_on_digits([3], **{"bound.mode": mode, "examples_at_once": 12})
    parts, others = steps_on_digits([3], **{"bound.mode": mode, "examples_at_once": 4})
    for one, other in zip(metrics, others, strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-3 * max(np.max(np.abs(a)), 1e-3))


def test_parts_that_do_not_divide_the_batch_are_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"examples_at_once must divide batch_size \(12\).*got 5"):
        steps_on_digits([1], examples_at_once=5)


def test_on_cpu_so_many_examples_go_at_once_as_stay_in_the_cache():
    config = digits.get_config()
    mesh = training.device_mesh()

    def chosen(largest, size):
        config.batch_size = size
        vectors = {"local": (jnp.zeros((1, *largest)), jnp.zeros((1, 8)))}
        return training.examples_at_once(config, mesh, dataclasses.replace(empty, vectors=vectors))

    empty = training.State(0, None, None, {}, 0)
    assert chosen((32, 32, 32), 256) == 32 and chosen((8, 8, 16), 64) == 64
    assert chosen((64, 64, 64), 256) == 16  # no fewer
    assert chosen((64, 64, 64), 7) == 7 and chosen((64, 64, 64), 26) == 13


# ------------------------------------------------------------------------------------ shared norms


@pytest.mark.parametrize("mode", ["global", "paper"])
def test_iterations_of_shared_norms_go_on_where_those_before_the_parts_ended(mode):
    """One more in the loss makes as many as the configuration says, for whatever image."""
    config = digits.get_config()
    config.bound.mode, config.bound.shared_iterations = mode, 7
    network = training.build_network(config, (8, 8, 1), 10)
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 1))
    starts = lipjax.bounds.initial_vectors(network, (8, 8, 1), mode)
    shared = {"global": starts["global"]}
    found = step._iterate_shared(config, network, images[0], shared)

    def after(vectors, count):
        bound = lipjax.bound(
            network,
            images[1],
            0.1,
            vectors={**starts, **vectors},
            mode=mode,
            iterations=1,
            shared_iterations=count,
        )
        return bound.vectors["global"]

    for one, all_ in zip(after(found, 1), after(shared, 7), strict=True):
        np.testing.assert_allclose(one, all_, rtol=1e-4, atol=1e-5)
    few = after(shared, 1)
    assert any(not np.allclose(a, b, atol=1e-2) for a, b in zip(few, after(found, 1), strict=True))
    assert step._iterate_shared(config, network, images[0], {}) == {}


def test_training_begins_with_the_weights_of_a_file_and_refuses_those_of_another_network(tmp_path):
    config = training.default_config()
    config.seed, config.start = 1, str(tmp_path / "first.safetensors")
    trained = lipjax.models.build(
        "small_conv", input_shape=(8, 8, 1), activation="maxmin", rngs=nnx.Rngs(7)
    )
    lipjax.save(trained, config.start, input_shape=(8, 8, 1))
    with pytest.raises(ValueError, match=r"start: .*first.safetensors holds another network.*None"):
        training.first_network(config, training.build_network(config, (8, 8, 1), 10))

    config.model.activation = "maxmin"
    fresh = training.build_network(config, (8, 8, 1), 10)
    begun = training.first_network(config, fresh)
    x = np.random.default_rng(0).random((3, 8, 8, 1), np.float32)
    assert np.array_equal(begun(x), trained(x)) and not np.array_equal(begun(x), fresh(x))
    # The activations are those of the configuration; the weights alone are the file's.
    config.model.activation = "relu"
    relu = training.build_network(config, (8, 8, 1), 10)
    assert isinstance(training.first_network(config, relu).layers[1], lipjax.ReLU)
