"""The scripts as a user runs them: train, kill, resume, certify; and schedules, data order and non-finite losses."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

from lipjax import data, training
from lipjax.checkpoints import CheckpointError, ConfigMismatch, open_workdir
from lipjax.reporting import Metrics, read_metrics

SMALL = [
    "--config=configs/digits.py",
    "--config.data.train_examples=128",
    "--config.schedule.epochs=4",
    "--config.schedule.ramp=2.0",
    "--config.optimizer.decay_start=2.0",
    "--config.evaluation.every=2",
    "--config.checkpoints.every=1",
]


def command(script, *flags):
    return [sys.executable, script, *flags]


def run(script, *flags, check=True):
    done = subprocess.run(command(script, *flags), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done


def deterministic(path):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(path / "metrics.jsonl")]


@pytest.mark.parametrize("mode", ["paper"])
def test_a_killed_run_continues_bit_for_bit_and_can_be_certified(tmp_path, mode):
    flags = [*SMALL, f"--config.bound.mode={mode}"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run("train.py", *flags, f"--workdir={straight}")
    process = subprocess.Popen(command("train.py", *flags, f"--workdir={broken}"), cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while len(read_metrics(broken / "metrics.jsonl")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run("train.py", *flags, f"--workdir={broken}")
    assert len(deterministic(straight)) == 4
    assert deterministic(straight) == deterministic(broken)

    other = run("train.py", *flags, "--config.seed=1", f"--workdir={broken}", check=False)
    assert other.returncode and "seed: stored 0, now 1" in other.stderr and "Traceback" not in other.stderr

    run("certify.py", f"--workdir={broken}", "--examples=16", "--pgd_restarts=1", "--pgd_steps=5")
    summary = json.loads((broken / "certification" / "summary.json").read_text())
    assert summary["run"]["tier"] == "probabilistic" and summary["run"]["examples"] == 16
    file = np.load(broken / "certification" / "examples.npz")
    assert len(file["certified_local"]) == 16 and not np.any(file["certified_local"] & file["broken_by_pgd"])
    assert (broken / "certification" / "curve.png").stat().st_size > 10_000


def test_certifying_what_was_never_trained_says_what_to_do(tmp_path):
    done = run("certify.py", f"--workdir={tmp_path}", check=False)
    assert done.returncode and "train first" in done.stderr and "Traceback" not in done.stderr


def test_a_workdir_of_another_configuration_is_refused_with_the_fields_that_differ(tmp_path):
    open_workdir(tmp_path, {"a": {"b": 1}, "c": (1, 2)})
    open_workdir(tmp_path, {"a": {"b": 1}, "c": [1, 2]})
    with pytest.raises(ConfigMismatch, match=r"a\.b: stored 1, now 2"):
        open_workdir(tmp_path, {"a": {"b": 2}, "c": [1, 2]})
    open_workdir(tmp_path, {"a": {"b": 2}, "c": [1, 2]}, volatile=("a.b",))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError):
        open_workdir(tmp_path / "file", {})


def test_metrics_of_undone_work_and_cut_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    Metrics(path, after_step=2).write(step=3, loss=np.float32(0.5), bad=float("nan"))
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5, "bad": None}]


def test_each_epoch_is_a_permutation_of_its_own_and_a_function_of_the_seed():
    first, second = (training.epoch_order(0, epoch, 100, 32) for epoch in (0, 1))
    assert first.shape == (3, 32) and len(np.unique(first)) == 96
    assert not np.array_equal(first, second)
    assert np.array_equal(first, training.epoch_order(0, 0, 100, 32))
    with pytest.raises(ValueError, match="128"):
        training.epoch_order(0, 0, 100, 128)


def test_the_ramp_waits_rises_and_stays():
    found = [float(training.ramp(10 * epoch, 10, 1.0, 2.0)) for epoch in range(6)]
    assert found == [0, 0, 0.5, 1, 1, 1]


def test_a_non_finite_loss_stops_training_and_names_the_step():
    good, bad = {"loss": 1.0, "gradient_norm": 1.0}, {"loss": 1.0, "gradient_norm": float("nan")}
    training.check_finite([good, good], 5)
    with pytest.raises(training.NonFiniteError, match="gradient_norm is nan at step 6"):
        training.check_finite([good, bad], 5)


def test_digits_splits_are_disjoint_and_do_not_depend_on_anything():
    splits = data.load("digits")
    parts = [set(part.indices.tolist()) for part in (splits.train, splits.validation, splits.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797
    assert data.fingerprint(splits.test) == data.fingerprint(data.load("digits", validation_seed=3).test)
    images = splits.train.unit_images(slice(None))
    assert images.dtype == np.float32 and images.min() == 0 and images.max() == 1


def test_data_that_is_missing_or_out_of_range_is_an_error_that_says_so(tmp_path):
    with pytest.raises(data.DataError, match="not there"):
        data.load(f"npz:{tmp_path}/none.npz")
    labels = np.array([0, 1] * 5)
    np.savez(tmp_path / "bad.npz", images=np.full((10, 4, 4), 255.0), labels=labels)
    with pytest.raises(data.DataError, match=r"\[0, 1\]"):
        data.load(f"npz:{tmp_path}/bad.npz,{tmp_path}/bad.npz")
    np.savez(tmp_path / "good.npz", images=np.full((10, 4, 4), 255, np.uint8), labels=labels)
    assert data.load(f"npz:{tmp_path}/good.npz,{tmp_path}/good.npz").train.images.shape == (9, 4, 4, 1)
    with pytest.raises(data.DataError, match="asked for 99"):
        data.load("npz:" + ",".join([f"{tmp_path}/good.npz"] * 2), train_examples=99)
