"""Several processes train and certify as one does; what happens when one of them dies, or is told
to stop."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, SHARED

from lipjax import report
from lipjax.runtime import hosts
from lipjax.training import checkpoints
from lipjax.training.metrics import read_metrics

SMALL = [
    "--config=configs/mnist_small.py",
    "--config.model.activation=clipped_maxmin",
    "--config.bound.mode=local",
    "--config.bound.loss=bcp",
    "--config.data.name=digits",
    "--config.data.train_examples=100",
    "--config.model.widths=(4,)",
    "--config.model.dense=16",
    "--config.batch_size=32",
    "--config.epsilon.train=0.3",
    "--config.epsilon.test=0.2",
    "--config.schedule.epochs=6",
    "--config.schedule.ramp=3.0",
    "--config.optimizer.decay_start=3.0",
    "--config.evaluation.every=3",
]
CERTIFY = [
    "--pgd_steps=5",
    "--pgd_restarts=1",
    "--nocurve",
    "--modes=global,local",
    "--epsilon=0.1",
    "--examples=60",
]
CERTIFY += ["--seed=0"]  # so that runs can be compared


def start(count, devices, script, *flags):
    """A job of so many local processes, or the script alone."""
    launcher = ["-m", "lipjax.runtime.hosts", str(count)] if count > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, script, *flags],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments):
    process = start(*arguments)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out


def metrics_of(workdir):
    return [
        {k: v for k, v in line.items() if k != "seconds"}
        for line in read_metrics(workdir / "metrics.jsonl")
    ]


def same_up_to_rounding(found, wanted):
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    for line, other in zip(found, wanted, strict=True):
        assert line.pop("tier") == other.pop("tier") == "estimate"
        assert line == pytest.approx(other, rel=2e-3, abs=2e-3)


def mnist_subset(path):
    """The first images of the original archives beside the checkout, as an npz file."""
    if not (SHARED / "data" / "mnist").is_dir():
        pytest.skip(f"{SHARED} is not here: no MNIST to test with")
    arrays = {}
    for name, split in (("train", "train"), ("test", "t10k")):
        for letter, kind, header in (("x", "images-idx3", 16), ("y", "labels-idx1", 8)):
            raw = gzip.decompress(
                (SHARED / "data" / "mnist" / f"{split}-{kind}-ubyte.gz").read_bytes()
            )[header:]
            values = np.frombuffer(raw, np.uint8)
            arrays[f"{letter}_{name}"] = (
                values.reshape(-1, 28, 28)[:400] if letter == "x" else values[:400]
            )
    np.savez(path, **arrays)
    return f"npz:{path}"


@pytest.fixture(scope="module", params=["digits", pytest.param("mnist", marks=pytest.mark.slow)])
def trained(request, tmp_path_factory):
    """The same run by one process with one device, and by two processes with four devices each."""
    folder = tmp_path_factory.mktemp("runs")
    flags = (
        [*SMALL]
        if request.param == "digits"
        else [*SMALL, f"--config.data.name={mnist_subset(folder / 'm.npz')}"]
    )
    for name, count, devices in (("one", 1, 1), ("two", 2, 4)):
        out = run(count, devices, "train.py", *flags, f"--workdir={folder / name}")
        assert out.count("done: 6 epochs") == 1  # process 0 alone speaks
    assert "8 cpu device(s) of 2 processes" in out
    return folder


def test_two_processes_of_four_devices_train_as_one_of_one_does(trained):
    wanted = metrics_of(trained / "one")
    assert len(wanted) == 6 and wanted[-1]["accuracy"] > wanted[0]["accuracy"]
    same_up_to_rounding(metrics_of(trained / "two"), wanted)


@pytest.fixture(scope="module")
def certified(trained):
    """What certify.py says of one run, by one process, by two, and early: per-image results,
    summary, verdicts by file."""
    folder, found = trained / "two" / "certification", {}
    for name, count, more in (("one", 1, []), ("two", 2, []), ("early", 1, ["--early"])):
        run(count, 1, "certify.py", f"--workdir={trained / 'two'}", *CERTIFY, *more)
        page = (folder / "report.html").read_text()
        assert report.build(folder).read_text() == page and ("Decided early" in page) == (
            name == "early"
        )
        files = {path.name: np.load(path)["certified"] for path in folder.glob("certificate*.npz")}
        with np.load(folder / "examples.npz") as examples:
            found[name] = dict(examples), json.loads((folder / "summary.json").read_text()), files
    return found


def test_two_processes_certify_what_one_does_each_image_once(certified):
    (one, summary, files), (two, other, others) = certified["one"], certified["two"]
    assert (
        summary["run"]["examples"]
        == other["run"]["examples"]
        == len(one["index"])
        == len(set(two["index"]))
        == 60
    )
    assert one["certified_local"].any() and files.keys() == others.keys() == {"certificate.npz"}
    np.testing.assert_array_equal(files["certificate.npz"], others["certificate.npz"])
    for name in one:
        if name not in ("run", "broken_by_pgd"):  # an attack's random starts depend on who makes it
            np.testing.assert_array_equal(two[name], one[name], err_msg=name)


def test_decided_early_the_verdicts_are_the_same_and_each_rests_on_one_of_the_files(certified):
    (plain, _, _), (early, summary, files) = certified["one"], certified["early"]
    # The looser bound's certificates count too, so there may be more, by the slack of the norms'
    # bounds.
    assert (
        np.all(early["certified_local"] >= plain["certified_local"])
        and plain["certified_local"].any()
    )
    assert np.sum(early["certified_local"]) <= np.sum(plain["certified_local"]) + 1
    assert not np.any(early["certified_local"] & early["broken_by_pgd"])
    by_global, by_local = files["certificate_global.npz"], files["certificate.npz"]
    np.testing.assert_array_equal(by_global | by_local, early["certified_local"])
    assert by_global.any() and not np.any(by_global & by_local)
    stood = np.sum(~early["broken_by_pgd"])
    assert summary["modes"]["global"]["examined"] == stood
    assert summary["modes"]["local"]["examined"] == stood - np.sum(by_global)


def test_a_second_run_in_a_workdir_is_refused_until_the_first_has_ended(tmp_path):
    with checkpoints.locked(tmp_path):
        process = start(1, 1, "train.py", *SMALL, f"--workdir={tmp_path}")
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 1 and "Traceback" not in errors
        assert f"is in use by another training process (process {os.getpid()} on" in errors
    with checkpoints.locked(tmp_path):
        pass  # free again


def until(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def processes_of(launcher):
    """Process numbers of the job's processes."""
    children = subprocess.run(
        ["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True
    ).stdout
    return sorted(map(int, children.split()))


LONG = [
    *SMALL,
    "--config.schedule.epochs=2000",
    "--config.evaluation.every=2000",
    "--config.checkpoints.every=1",
]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_of_two_processes_is_killed_the_job_ends_with_an_error_and_resumes(
    tmp_path, victim
):
    process = start(2, 1, "train.py", *LONG, f"--workdir={tmp_path}")
    until(lambda: len(read_metrics(tmp_path / "metrics.jsonl")) > 3, process)
    os.kill(processes_of(process)[victim], signal.SIGKILL)
    process.communicate(timeout=hosts.SILENCE_SECONDS + hosts.GRACE_SECONDS)
    assert process.returncode not in (0, None)
    before = len(read_metrics(tmp_path / "metrics.jsonl"))
    # On another number of devices: one process, one device.
    out = run(1, 1, "train.py", *LONG, f"--stop_after={before + 2}", f"--workdir={tmp_path}")
    assert "continuing after epoch" in out and f"stopped after epoch {before + 2} of" in out
    assert [line["epoch"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(
        range(1, before + 3)
    )


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_saves_in_the_middle_of_an_epoch_and_the_run_ends_as_one_never_stopped(
    tmp_path, count
):
    flags = [
        *SMALL,
        "--config.batch_size=2",
        "--config.schedule.epochs=2",
        "--config.evaluation.every=2",
    ]
    flags += [
        "--config.data.train_examples=1200",
        "--config.schedule.ramp=1.0",
        "--config.optimizer.decay_start=1.0",
    ]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run(count, 1, "train.py", *flags, f"--workdir={straight}")
    process = start(count, 1, "train.py", *flags, f"--workdir={stopped}")
    for line in process.stdout:
        if line.startswith("compiled"):
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "SIGTERM: saved after step" in out
    step = int(out.split("saved after step ")[1].split(";")[0])
    assert 0 < step < 1200 and step % 600 != 0
    out = run(count, 1, "train.py", *flags, f"--workdir={stopped}")
    assert f"step {step}" in out
    assert metrics_of(stopped) == metrics_of(straight)  # bit for bit


def test_a_state_saved_with_the_last_step_of_an_epoch_writes_its_line_once(trained, tmp_path):
    name = json.loads((trained / "one" / "config.json").read_text())["data"]["name"]
    saving = "--config.checkpoints.minutes=1e-9"  # after every call
    flags = [*SMALL, f"--config.data.name={name}", saving, f"--workdir={tmp_path}"]
    for last in (2, 3):
        run(1, 1, "train.py", *flags, f"--stop_after={last}")
    lines = [line for line in metrics_of(trained / "one") if line["epoch"] <= 3]
    assert metrics_of(tmp_path) == lines


@pytest.mark.parametrize(
    "value, message",
    [
        ("localhost", "hosts must be as in --hosts=auto, or"),
        ("localhost:1234,2,2", "process 2 is not one of 0 to 1"),
        ("auto", "did not come together"),
    ],
)
def test_hosts_that_make_no_sense_are_an_error_that_shows_how(value, message):
    with pytest.raises(ValueError, match=message):
        hosts.join(value)


def test_arrays_are_gathered_bit_for_bit_where_there_is_one_process():
    array = np.array([np.pi, -np.inf])
    np.testing.assert_array_equal(hosts.gather(array), [array])
    assert hosts.maximum(1.5, 2) == (1.5, 2)


@pytest.mark.parametrize("failing", ["0", "1"])
def test_a_local_job_ends_with_the_status_of_the_first_that_fails_also_if_the_others_wait_for_ever(
    tmp_path, monkeypatch, failing
):
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys, time\nsys.exit(3) if os.environ['LIPJAX_HOSTS'].endswith(',{failing}') "
        "else time.sleep(600)\n"
    )
    monkeypatch.setattr(hosts, "GRACE_SECONDS", 0.2)
    began = time.monotonic()
    assert hosts.launch(2, [str(script)]) == 3
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_processes_go_back_together_to_the_checkpoint_before_when_one_cannot_read_the_newest(
    tmp_path,
):
    run(2, 1, "train.py", *SMALL, "--stop_after=4", f"--workdir={tmp_path}")
    newest = tmp_path / "checkpoints" / "last" / "12"  # three steps an epoch
    files = [path for path in (newest / "state" / "ocdbt.process_1").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 3)
    process = start(2, 1, "train.py", *SMALL, f"--workdir={tmp_path}")
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "is damaged and skipped" in errors and "continuing after epoch 3, step 9" in out


@pytest.mark.parametrize(
    "visible, expected",
    [(None, ["0", "1"]), ("6,3,1", ["6", "3"]), ("", ["", ""])],
    ids=["all", "some", "none"],
)
def test_each_process_of_a_local_job_gets_a_gpu_of_its_own(
    tmp_path, monkeypatch, visible, expected
):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "number = os.environ['LIPJAX_HOSTS'].split(',')[-1]\n"
        "pathlib.Path(sys.argv[1], number).write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hosts.launch(2, [str(script), str(tmp_path)]) == 0
    assert [(tmp_path / str(number)).read_text() for number in range(2)] == expected


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    with pytest.raises(ValueError, match="names 1 GPUs"):
        hosts.launch(2, ["script.py"])
