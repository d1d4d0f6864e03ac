"""Certified accuracy against minutes of training: one recipe in schedules of several lengths, each
trained to its own end and certified.

    python -m benchmarks.minutes --config=configs/mnist_dense.py --epochs=3,6,12,24,48
    python -m benchmarks.minutes --config=configs/cifar10_cpu.py --epochs=10,20,40 --examples=1000

Everything that a configuration counts in epochs is scaled. Runs are in --out, one a length, kept
and not repeated; prints and stores a Markdown table (table.md) and a picture (minutes.svg). Minutes
are those of the steps (`seconds` in metrics.jsonl), without compilation and evaluations: leave the
machine alone meanwhile. Certificates are of bound local, tier probabilistic with delta 1e-6, after
an attack of 10 steps, a weak one: its figures are upper bounds, and not those of an evaluation of
attacks.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from lipjax.cli import common, train
from lipjax.training.metrics import read_metrics

SCALED = ("schedule.warmup", "schedule.ramp", "optimizer.rise", "optimizer.decay_start")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--epochs", default="25,50,100", help="lengths, separated by commas")
    parser.add_argument("--examples", type=int, help="of the test split, to certify; default: all")
    parser.add_argument("--arithmetic", default="float64", help="that certificates are about")
    parser.add_argument("--out", type=Path, default=Path("runs/minutes"))
    parser.add_argument("extra", nargs="*", help="further flags of train.py, after --")
    options = parser.parse_args(arguments)

    lengths = [int(length) for length in options.epochs.split(",")]
    found = [(length, *run(options, length)) for length in lengths]
    facts = statement(options, found[0][2])
    points = [(f"{length}", minutes, *accuracies(summary)) for length, minutes, summary in found]
    lines = [
        "| epochs | minutes of steps | clean | PGD | certified |",
        "|---|---|---|---|---|",
        *(
            f"| {label} | {' | '.join(f'{value:.1f}' for value in values)} |"
            for label, *values in points
        ),
        "",
        facts,
    ]
    print("\n".join(lines))
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    picture(points, facts).savefig(options.out / "minutes.svg", metadata={"Date": None})


def run(options, length: int) -> tuple[float, dict]:
    """Minutes of steps and the certification's summary of a schedule of `length` epochs, trained
    and certified if it is not there yet."""
    workdir = options.out / str(length)
    summary = workdir / "certification" / "summary.json"
    if not summary.exists():
        flags = [f"--config={options.config}", *options.extra]
        config = common.parsed(["minutes", *flags], train).config
        share = length / config.schedule.epochs
        flags.append(f"--config.schedule.epochs={length}")
        flags.append(f"--config.schedule.first={round(share * config.schedule.first)}")
        flags.append(f"--config.evaluation.every={length}")
        for name in SCALED:
            group, field = name.split(".")
            flags.append(f"--config.{name}={share * config[group][field]}")
        certify = ["--modes=local", "--nocurve", "--early", f"--arithmetic={options.arithmetic}"]
        certify += ["--pgd_steps=10", "--pgd_restarts=1"]
        certify += [f"--examples={options.examples}"] if options.examples else []
        for command in (["train.py", *flags], ["certify.py", *certify]):
            full = [sys.executable, *command, f"--workdir={workdir}"]
            subprocess.run(full, check=True, stdout=subprocess.DEVNULL)
    seconds = sum(line.get("seconds", 0.0) for line in read_metrics(workdir / "metrics.jsonl"))
    return seconds / 60, json.loads(summary.read_text())


def accuracies(summary: dict) -> tuple[float, float, float]:
    """Clean, under attack, certified; in percent."""
    certified = summary["modes"]["local"]["certified_accuracy"]
    return tuple(100 * x for x in (summary["clean_accuracy"], summary["pgd_accuracy"], certified))


def statement(options, summary: dict) -> str:
    """What the figures are about and rest on."""
    run = summary["run"]
    return (
        f"{Path(options.config).stem}, {run['split']} split, {run['examples']} images, "
        f"ε = {run['epsilon']:.4g}, bound local, tier {run['tier']}, "
        f"δ = {run['failure_probability']:g} a run, {run['arithmetic']}, training seed "
        f"{run['training_seed']}"
    )


def picture(points: list[tuple], facts: str):
    """Matplotlib's figure of the accuracies against minutes, which are on a logarithmic scale.

    Args:
        points: each a label, minutes, and the accuracies clean, under attack and certified, in
            percent.
        facts: what they are about and rest on.
    """
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "lipjax"
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    labels, minutes, *values = zip(*points, strict=True)
    names = ("clean", "PGD of 10 steps (upper bound)", "certified")
    for name, colour, line in zip(names, ("#9e9e9e", "#c62828", "#00796b"), values, strict=True):
        axes.plot(minutes, line, "o-", color=colour, label=name)
    for label, *place in zip(labels, minutes, values[-1], strict=True):
        below = {"xytext": (0, -12), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{label} epochs", place, fontsize=7, **below)
    axes.set(xlabel="minutes of training steps", ylabel="accuracy, %", xscale="log")
    axes.set_xticks(minutes, [f"{x:.2g}" for x in minutes])
    axes.minorticks_off()
    axes.margins(0.08, 0.12)
    axes.set_title(facts, fontsize=7, wrap=True)
    axes.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
