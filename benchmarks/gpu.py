"""One program for the few minutes in which there is a GPU: what only a GPU can answer.

    python -m benchmarks.gpu --minutes=8 --out=DIR
    python -m benchmarks.gpu --minutes=4 --out=DIR --small --parts=executed,algorithms,steps

Parts, in this order, each of them with what is left of the minutes:

- *executed*: networks executed on the device in float32, TF32 and bfloat16, eager and compiled,
  against the same function in float64 on the host: no margin may be further from it than the
  certificate allows;
- *algorithms*: which convolutions the compiled program calls, and by which of cuDNN's engines.
  Winograd's and Fourier's are no inner products, so the error model does not cover them
  (`lipjax.rounding`). cuDNN numbers its engines and does not say what they do: only a program
  without such calls is inner products for certain;
- *tests*: the core tests on the device; *hunt*: certificates attacked there (`benchmarks.hunt`);
- *steps*: seconds of training steps by network and mode, their ratio to the plain step, memory, and
  what `lipjax plan` predicted (`benchmarks.step`);
- *recipe*: the CIFAR-10 recipe, checkpointed, for all that is left, then certified. It needs
  --data=npz:TRAIN,TEST or a set that TFDS finds.

Written to DIR as each part ends: gpu.json, gpu.md, and a log of each program. --small: a rehearsal
of the whole program at the size of a CPU.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

# Before JAX starts: the programs that this one starts want memory of the device, too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lipjax
from lipjax import models
from lipjax.cli.networks import notes, of_run

ROOT = Path(__file__).resolve().parents[1]
# Of the minutes: no part may take more than its share, so that every part is seen.
SHARES = {
    "executed": 0.25,
    "algorithms": 0.05,
    "tests": 0.3,
    "hunt": 0.3,
    "steps": 0.5,
    "recipe": 1.0,
}
# Left for certifying the recipe's network.
CERTIFY = 0.3
POINTS = 64
# Of what `benchmarks.step` says.
STEP_FACTS = (
    *("bound_seconds", "plain_seconds", "ratio", "peak_memory_bytes"),
    *("compile_seconds", "planned_seconds", "device"),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(SHARES))
    parser.add_argument("--data", default="cifar10", help="of the recipe: config.data.name")
    parser.add_argument("--config", default="configs/cifar10_fast.py", help="the recipe")
    parser.add_argument(
        "--set", action="append", default=[], help="of the recipe: FIELD=VALUE of its configuration"
    )
    parser.add_argument("--small", action="store_true", help="a rehearsal on a CPU")
    options = parser.parse_args(arguments)
    unknown = {*options.parts.split(",")} - SHARES.keys()
    if unknown:
        parser.error(f"unknown parts: {', '.join(unknown)}. Known are {', '.join(SHARES)}.")

    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    found: dict = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "parts": {}}
    for part in options.parts.split(","):
        began = time.monotonic()
        limit = max(10.0, min(60 * options.minutes * SHARES[part], end - began))
        print(f"{part}: at most {limit:.0f} s", flush=True)
        try:
            rows = PARTS[part](options, limit)
        except Exception as error:  # the other parts are worth having
            rows = [{"error": f"{type(error).__name__}: {error}"}]
        seconds = round(time.monotonic() - began, 1)
        found["parts"][part] = {"seconds": seconds, "rows": rows}
        (options.out / "gpu.json").write_text(json.dumps(found, indent=1))
        (options.out / "gpu.md").write_text(page(found))
    print(page(found))
    return 0


def page(found: dict) -> str:
    """What was found, as Markdown."""
    lines = [f"# {found['device']}, JAX {found['jax']}"]
    for part, facts in found["parts"].items():
        lines += ["", f"## {part} ({facts['seconds']} s)", ""]
        names = list(dict.fromkeys(name for row in facts["rows"] for name in row))
        lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        lines += [
            f"| {' | '.join(str(row.get(name, '')) for name in names)} |" for row in facts["rows"]
        ]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------- in this process


def networks(small: bool):
    """Name, network, shape of an image; random weights."""
    wanted = [("small_conv", (8, 8, 1))]
    if not small:
        wanted += [("conv4_dense3", (28, 28, 1)), ("conv6_dense2", (32, 32, 3))]
    for name, shape in wanted:
        given = {"activation": "maxmin", "input_shape": shape, "classes": 10}
        yield name, models.build(name, **given, rngs=nnx.Rngs(0)), shape


def executed(options, limit: float) -> list[dict]:
    """How far margins on the device are from exact ones, beside what the certificate allows."""
    rows = []
    end = time.monotonic() + limit
    epsilon = 0.1
    for name, network, shape in networks(options.small):
        rng = np.random.default_rng(0)
        x = rng.random((1, *shape), np.float32)
        moves = rng.normal(size=(POINTS, *shape))
        lengths = np.linalg.norm(moves.reshape(POINTS, -1), axis=1)
        points = x + epsilon * moves / lengths.reshape(-1, *[1] * len(shape))
        points = points.astype(np.float32)
        exact = in_float64(network, points)
        label = int(np.argmax(in_float64(network, x)))
        for arithmetic, precision in (("float32", "highest"), ("tf32", "default")):
            certificate = lipjax.certify(
                network, x, None, epsilon, tier="probabilistic", seed=0, arithmetic=arithmetic
            )
            allowed = float(certificate.allowance[0])
            for way, run in (("eager", network), ("compiled", nnx.jit(network))):
                with jax.default_matmul_precision(precision):
                    logits = np.asarray(run(jnp.asarray(points)), np.float64)
                off = float(np.max(np.abs(margins(logits, label) - margins(exact, label))))
                rows.append(
                    {
                        "network": name,
                        "arithmetic": arithmetic,
                        "way": way,
                        "off": f"{off:.3g}",
                        "allowed": f"{allowed:.3g}",
                        "within": off <= allowed,
                    }
                )
            if time.monotonic() > end:
                return rows
    return rows


def margins(logits: np.ndarray, label: int) -> np.ndarray:
    """Of each point: the label's logit less the largest other one."""
    return logits[:, label] - np.max(np.delete(logits, label, axis=1), axis=1)


def in_float64(network, points: np.ndarray) -> np.ndarray:
    """Logits of the real-number function, but for rounding in float64 on the host."""
    host = jax.devices("cpu")[0]
    with jax.enable_x64(True), jax.default_device(host):
        graph, state = nnx.split(network)
        wide = jax.tree.map(
            lambda leaf: (
                jnp.asarray(np.asarray(leaf), jnp.float64)
                if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
                else leaf
            ),
            state,
        )
        return np.asarray(nnx.merge(graph, wide)(jnp.asarray(points, jnp.float64)))


def algorithms(options, limit: float) -> list[dict]:
    """The custom calls of each compiled network, and the engines of convolutions that they name."""
    rows = []
    for name, network, shape in networks(options.small):
        for batch in (1, 256):
            graph, state = nnx.split(network)

            def run(state, x, graph=graph):
                return nnx.merge(graph, state)(x)

            like = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
            text = jax.jit(run).lower(state, like).compile().as_text()
            (options.out / f"{name}_{batch}.hlo.txt").write_text(text[: 2**20])
            targets = sorted(set(re.findall(r'custom_call_target="([^"]+)"', text)))
            engines = sorted(set(re.findall(r'"algo_id":"?(\d+)"?', text)), key=int)
            rows.append(
                {
                    "network": name,
                    "batch": batch,
                    "calls": ", ".join(targets) or "none",
                    "engines of cuDNN": ", ".join(engines) or "none",
                    "inner products for certain": not any("cudnn" in name for name in targets),
                }
            )
    return rows


# ------------------------------------------------------------------------------ other programs


def program(options, name: str, limit: float, *command: str) -> tuple[int | None, str]:
    """Runs a program of the checkout up to a limit: status, None where time was up, and text."""
    told = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    }
    if jax.default_backend() != "cpu":
        told |= {"JAX_PLATFORMS": "cuda,cpu"}
    log = options.out / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=told, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.terminate()
            status = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)  # a run of train.py saves its state
            process.kill()
    return status, log.read_text(errors="replace")


def tests(options, limit: float) -> list[dict]:
    which = ["tests/test_linear.py"] if options.small else ["-m", "core"]
    status, text = program(
        options, "tests", limit, "-m", "pytest", "-q", "-p", "no:cacheprovider", *which
    )
    last = text.strip().splitlines()[-1:] or [""]
    failed = re.findall(r"^FAILED (\S+)", text, re.MULTILINE)
    return [{"status": status, "said": last[0], "failed": ", ".join(failed)}]


def hunt(options, limit: float) -> list[dict]:
    status, text = program(options, "hunt", limit, "-m", "benchmarks.hunt", "--quick", "--json")
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [{"status": status, "rows": len(rows)}, *rows]


def steps(options, limit: float) -> list[dict]:
    """Networks by modes, the cheapest first, until the time is up."""
    end = time.monotonic() + limit
    wanted = [("conv4_dense3", "local", 256), ("conv6_dense2", "local", 256)]
    wanted += [("conv6_dense2", mode, 256) for mode in ("global", "paper", "linear", "tight")]
    wanted += [("conv8_dense2", "local", 128), ("conv8_dense2", "global", 128)]
    extra: list[str] = []
    if options.small:
        wanted = [("small_conv", "local", 32), ("small_conv", "global", 32)]
        extra = ["--rounds=2", "--steps=2"]
    rows = []
    for network, mode, batch in wanted:
        left = end - time.monotonic()
        if left < 10:
            break
        given = [f"--network={network}", f"--mode={mode}", f"--batch={batch}", *extra]
        status, text = program(
            options, f"steps_{network}_{mode}", left, "-m", "benchmarks.step", "--json", *given
        )
        found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        facts = {name: found[-1].get(name) for name in STEP_FACTS} if found else {}
        rows.append({"network": network, "mode": mode, "batch": batch, "status": status, **facts})
    return rows


def recipe(options, limit: float) -> list[dict]:
    """Trains until the time is up, but for a share, and certifies the best network so far."""
    workdir = options.out / "recipe"
    config, more = options.config, [f"data.name={options.data}", *options.set]
    if options.small:
        config, more = "configs/digits.py", ["schedule.epochs=3", "optimizer.decay_start=1.0"]
    given = [f"--config={config}", f"--workdir={workdir}"]
    given += [f"--config.{setting}" for setting in more]
    status, _ = program(options, "train", limit * (1 - CERTIFY), "train.py", *given)
    rows: list[dict] = [{"program": "train", "status": status}]
    metrics = workdir / "metrics.jsonl"
    if metrics.exists():
        last = json.loads(metrics.read_text().splitlines()[-1])
        rows[0] |= {k: v for k, v in last.items() if isinstance(v, int | float)}
        shutil.copy(metrics, options.out / "recipe.jsonl")
    flags = ["--examples=1000", "--nocurve", "--early", "--modes=local", "--arithmetic=float32"]
    if options.small:
        flags[0] = "--examples=50"
    status, text = program(
        options, "certify", limit * CERTIFY, "certify.py", f"--workdir={workdir}", *flags
    )
    summary = workdir / "certification" / "summary.json"
    facts = json.loads(summary.read_text()) if summary.exists() else {}
    keep(workdir, options.out / "recipe.safetensors")
    rows.append(
        {
            "program": "certify",
            "status": status,
            "clean": facts.get("clean_accuracy"),
            "PGD": facts.get("pgd_accuracy"),
            "certified": {
                mode: row["certified_accuracy"] for mode, row in facts.get("modes", {}).items()
            },
            "said": "" if facts else "\n".join(text.splitlines()[-3:]),
        }
    )
    return rows


def keep(workdir: Path, path: Path) -> None:
    """Writes the network that a run selected."""
    given = of_run(workdir, examples=1)  # of the images the shape is wanted
    shape = given.test.images.shape[1:]
    lipjax.save(given.network, path, input_shape=shape, notes=notes(given))


PARTS = {
    "executed": executed,
    "algorithms": algorithms,
    "tests": tests,
    "hunt": hunt,
    "steps": steps,
    "recipe": recipe,
}

if __name__ == "__main__":
    sys.exit(main())
