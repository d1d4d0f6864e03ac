"""Kills training at random moments, many times, and compares the end with that of a run that was
never stopped.

    python -m benchmarks.faults --rounds=50 --json
    python -m benchmarks.faults --rounds=10 --fault=sigterm --processes=2 --json

A small net on digits, a checkpoint each epoch. Each round starts train.py in the same workdir,
waits for a random moment, from the start of the process to some seconds after its first epoch, and
kills it (--fault=kill), tells it to stop (sigterm), or kills one of its processes (one). Then the
run goes on to its end. One JSON line: rounds, in how many of them training had begun, epochs of
finished work that the next start did again (most; the last lines of metrics against where it
continued), seconds from start to the first new epoch (median), whether metrics and checkpoints at
the end are those of the run never stopped, bit for bit.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from lipjax.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--fault", choices=("kill", "sigterm", "one"), default="kill")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--epochs", type=int, default=0, help="of the run; default 30 for each round"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args(arguments)
    if options.fault == "one" and options.processes < 2:
        parser.error("--fault=one needs --processes=2 or more")
    folder = Path(tempfile.mkdtemp())
    dice, found = random.Random(options.seed), []
    epochs = options.epochs or 30 * options.rounds
    straight, broken = folder / "straight", folder / "broken"
    finish(start(straight, epochs, options.processes, folder))
    for _ in range(options.rounds):
        found.append(one_round(broken, epochs, options, dice, folder))
        if found[-1]["ended"]:
            break
    finish(start(broken, epochs, options.processes, folder))
    begun = [round_ for round_ in found if round_["recovery"] is not None]
    result = {
        "fault": options.fault,
        "processes": options.processes,
        "rounds": sum(not round_["ended"] for round_ in found),
        "in_training": len(begun),
        "epochs_done_again_most": max((round_["again"] for round_ in found), default=0),
        "recovery_seconds_median": round(statistics.median([r["recovery"] for r in begun]), 1)
        if begun
        else None,
        "end_seconds_most": round(max((round_["end"] for round_ in found), default=0), 1),
        "same_metrics": metrics_of(straight) == metrics_of(broken),
        "same_checkpoints": all(same(straight, broken, kind) for kind in ("last", "best")),
        "left_over": len(list((broken / "checkpoints").glob("*/*tmp*"))),
        "epochs": epochs,
        "seed": options.seed,
    }
    shutil.rmtree(folder)
    print(
        json.dumps(result)
        if options.json
        else "\n".join(f"{name}: {value}" for name, value in result.items())
    )


def start(workdir, epochs, processes, folder):
    flags = [
        "--config=configs/mnist_small.py",
        "--config.model.activation=clipped_maxmin",
        "--config.bound.mode=local",
        "--config.bound.loss=bcp",
        "--config.data.name=digits",
        "--config.data.train_examples=128",
        "--config.model.widths=(4,)",
        "--config.model.dense=16",
        "--config.batch_size=32",
        "--config.epsilon.train=0.3",
        "--config.epsilon.test=0.2",
        f"--config.schedule.epochs={epochs}",
        "--config.schedule.ramp=5.0",
        "--config.optimizer.decay_start=5.0",
        "--config.evaluation.every=10",
        f"--workdir={workdir}",
    ]
    launcher = ["-m", "lipjax.runtime.hosts", str(processes)] if processes > 1 else []
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, *launcher, "train.py", *flags],
        cwd=ROOT,
        env={**os.environ, **cache},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def one_round(workdir, epochs, options, dice, folder) -> dict:
    before, began = steps_done(workdir), time.monotonic()
    process, recovery, least = start(workdir, epochs, options.processes, folder), None, before
    # Half of the rounds end before or soon after training goes on, half of them later.
    moment = dice.uniform(0, 6) if dice.random() < 0.5 else dice.uniform(0, 2)
    after_first = moment if dice.random() < 0.8 else None
    while process.poll() is None:
        time.sleep(0.002)
        steps = steps_done(workdir)
        least = min(least, steps)  # a start drops the metrics of what it does again
        if recovery is None and steps > before:
            recovery = time.monotonic() - began
        since = (
            time.monotonic() - began
            if after_first is None
            else (time.monotonic() - began - (recovery or 1e9))
        )
        if since > moment or time.monotonic() - began > 120:
            break
    if process.poll() is not None:
        return {"ended": True, "recovery": recovery, "again": (before - least) // 4, "end": 0.0}
    told = time.monotonic()
    if options.fault == "kill":
        os.killpg(process.pid, signal.SIGKILL)
    elif options.fault == "sigterm":
        process.send_signal(signal.SIGTERM)
    else:
        children: list[str] = []
        while not children:
            children = subprocess.run(
                ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
            ).stdout.split()
        os.kill(int(dice.choice(children)), signal.SIGKILL)
    process.wait(timeout=180)
    return {
        "ended": False,
        "recovery": recovery,
        "again": (before - least) // 4,
        "end": time.monotonic() - told,
    }


def finish(process):
    if process.wait(timeout=1800):
        raise SystemExit(f"train.py ended with {process.returncode}")


def steps_done(workdir) -> int:
    lines = read_metrics(workdir / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def metrics_of(workdir):
    return [
        {k: v for k, v in line.items() if k != "seconds"}
        for line in read_metrics(workdir / "metrics.jsonl")
    ]


def same(first, second, kind) -> bool:
    """Whether the newest checkpoints of a kind are the same, bit for bit."""
    found = []
    for workdir in (first, second):
        folder = workdir / "checkpoints" / kind
        step = max(int(path.name) for path in folder.iterdir())
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        with ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
            # Onto the device here, whatever they were saved from.
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            wanted = {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
                for name, leaf in manager.item_metadata(step).state.items()
            }
            items = ocp.args.Composite(
                state=ocp.args.StandardRestore(wanted), meta=ocp.args.JsonRestore()
            )
            restored = manager.restore(step, args=items)
        state = {name: np.asarray(value).tobytes() for name, value in restored.state.items()}
        found.append((step, restored.meta, state))
    return found[0] == found[1]


if __name__ == "__main__":
    main()
