"""Trains and certifies a grid of settings: what training with each bound is worth, by each bound.

    python -m benchmarks.ablation --modes=global,paper,local,linear --seeds=3
    python -m benchmarks.ablation --modes=local,linear --activations=relu,clipped_maxmin \\
        --stability=0,0.01 -- --config.schedule.epochs=60
    python -m benchmarks.ablation --seeds=3 \\
        --configs=configs/baselines.py:gloro,configs/baselines.py:bcp

Runs of one command in --out, one per combination and seed, kept and not repeated; prints and stores
a Markdown table (table.md) and a picture (table.png): certified accuracy at the configuration's
epsilon by each of --bounds, beside clean and PGD accuracy, mean (range) over the seeds, and the
mean of the median Lipschitz constants of the last bound. Every run certifies at tier probabilistic
with delta 1e-6.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from lipjax import bounds

FIELDS = {
    "modes": "bound.mode",
    "iterations": "bound.iterations",
    "activations": "model.activation",
    "thresholds": "model.threshold",
    "orthogonal": "model.orthogonal",
    "losses": "bound.loss",
    "sparsity": "bound.sparsity",
    "stability": "bound.stability",
    "rivals": "bound.rivals",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--configs", default="configs/digits.py", help="configurations, separated by commas"
    )
    for name, field in FIELDS.items():
        parser.add_argument(
            f"--{name}",
            help=f"values of {field}, separated by commas; the configuration's if unset",
        )
    parser.add_argument(
        "--bounds", default=",".join(bounds.MODES), help="to certify with, from the loosest"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pgd_steps", type=int, default=100, help="of the attack")
    parser.add_argument("--pgd_restarts", type=int, default=5, help="of the attack")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("extra", nargs="*", help="further flags of train.py, after --")
    options = parser.parse_args(arguments)
    options.bounds, options.config = options.bounds.split(","), None

    names = ["configs", *FIELDS]
    chosen = {
        name: values.split(",") for name in names if (values := getattr(options, name)) is not None
    }
    if len(chosen["configs"]) == 1 < len(chosen):
        (options.config,) = chosen.pop("configs")
    head = [
        *chosen,
        "clean",
        "PGD",
        *(f"certified, {mode}" for mode in options.bounds),
        "median Lipschitz",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    print("\n".join(lines))
    rows = []
    for combination in itertools.product(*chosen.values()):
        settings = dict(zip(chosen, combination, strict=True))
        found = [run(options, settings, seed) for seed in range(options.seeds)]
        columns = {
            "clean": [s["clean_accuracy"] for s in found],
            "PGD": [s["pgd_accuracy"] for s in found],
            **{
                mode: [s["modes"][mode]["certified_accuracy"] for s in found]
                for mode in options.bounds
            },
        }
        rows.append((combination, columns))
        lipschitz = statistics.mean(
            s["modes"][options.bounds[-1]]["median_lipschitz"] for s in found
        )
        lines.append(
            "| "
            + " | ".join(
                [*map(short, combination), *map(spread, columns.values()), f"{lipschitz:.2f}"]
            )
            + " |"
        )
        print(lines[-1], flush=True)
    facts = statement(found[0]["run"], options.seeds)
    print(facts)
    (options.out / "table.md").write_text("\n".join([*lines, "", facts]) + "\n")
    picture(options.out / "table.png", rows, options.bounds, facts)


def run(options, settings: dict[str, str], seed: int) -> dict:
    """Summary of one run, trained and certified if it is not there yet."""
    workdir = options.out / "-".join([*map(short, settings.values()), str(seed)])
    summary = workdir / "certification" / "summary.json"
    if not summary.exists():
        flags = [
            f"--config.{FIELDS[name]}={value}" for name, value in settings.items() if name in FIELDS
        ]
        # All runs compile the same programs.
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(options.out.absolute() / "compiled"),
            **os.environ,
        }
        for command in (
            [
                "train.py",
                f"--config={settings.get('configs', options.config)}",
                *flags,
                f"--config.seed={seed}",
                *options.extra,
            ],
            [
                "certify.py",
                "--nocurve",
                f"--modes={','.join(options.bounds)}",
                f"--pgd_steps={options.pgd_steps}",
                f"--pgd_restarts={options.pgd_restarts}",
            ],
        ):
            full = [sys.executable, *command, f"--workdir={workdir}"]
            subprocess.run(full, check=True, stdout=subprocess.DEVNULL, env=environment)
    return json.loads(summary.read_text())


def short(value: str) -> str:
    """A setting's value as tables and folders carry it: a configuration by its name."""
    return (
        value.removeprefix("configs/")
        .replace(".py", "")
        .replace("baselines:", "")
        .replace("/", "-")
    )


def spread(values: list[float]) -> str:
    """Mean and range in percent."""
    low, high = 100 * min(values), 100 * max(values)
    return f"{100 * statistics.mean(values):.1f} ({low:.1f}-{high:.1f})"


def statement(run: dict, seeds: int) -> str:
    """What the figures are about and rest on."""
    return (
        f"{run['data']}, {run['split']} split, {run['examples']} images, ε = {run['epsilon']:g}, "
        f"tier {run['tier']}, "
        f"δ = {run['failure_probability']:g} a run, {run['arithmetic']}, training seeds 0 to "
        f"{seeds - 1}; PGD of {run['pgd_steps']} steps, {run['pgd_restarts']} restarts"
    )


def picture(path: Path, rows: list, bounds: list[str], facts: str) -> None:
    """Bars of certified accuracy by each bound, their range over the seeds, and the PGD accuracy as
    a line above them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(2 + 1.6 * len(rows), 4.5), layout="constrained")
    width = 0.8 / len(bounds)
    for k, mode in enumerate(bounds):
        means = [statistics.mean(columns[mode]) for _, columns in rows]
        below = [mean - min(columns[mode]) for mean, (_, columns) in zip(means, rows, strict=True)]
        above = [max(columns[mode]) - mean for mean, (_, columns) in zip(means, rows, strict=True)]
        places = [i + (k - (len(bounds) - 1) / 2) * width for i in range(len(rows))]
        axes.bar(places, means, width, yerr=(below, above), capsize=2, label=f"certified, {mode}")
    for i, (_, columns) in enumerate(rows):
        for name, style in (("PGD", "-"), ("clean", ":")):
            label = f"{name}{' (upper bound)' if name == 'PGD' else ''}" if i == 0 else None
            axes.hlines(
                statistics.mean(columns[name]),
                i - 0.45,
                i + 0.45,
                color="black",
                linestyle=style,
                label=label,
            )
    axes.set_xticks(
        range(len(rows)), ["\n".join(map(short, combination)) for combination, _ in rows]
    )
    axes.set(ylabel="accuracy", ylim=(0, 1.02), xlabel="trained with")
    axes.set_title(facts, fontsize=7, wrap=True)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
