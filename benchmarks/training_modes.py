"""Certified accuracy after training with each bound, at equal epochs and seeds: trains and certifies a grid.

    python -m benchmarks.training_modes --config=configs/digits.py --seeds=3 --out=runs/modes [-- extra train.py flags]

Prints one Markdown row per mode of training: mean and spread over the seeds of clean, PGD and certified accuracy on the
test set, certified with the `local` bound (and, for comparison, with the bound that it was trained with). Runs that are
already there are not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

MODES = ("linear", "local", "paper", "global")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/modes"))
    parser.add_argument("extra", nargs="*", help="further flags of train.py, after --")
    arguments = parser.parse_args()

    print(
        "| trained with | clean | PGD | certified by `local` | certified by the bound of training | median Lipschitz |"
    )
    print("|---|---|---|---|---|---|")
    for mode in MODES:
        found = [run(arguments, mode, seed) for seed in range(arguments.seeds)]
        columns = [
            [s["clean_accuracy"] for s in found],
            [s["pgd_accuracy"] for s in found],
            [s["modes"]["local"]["certified_accuracy"] for s in found],
            [s["modes"][mode]["certified_accuracy"] for s in found],
        ]
        lipschitz = statistics.mean(s["modes"]["local"]["median_lipschitz"] for s in found)
        print(f"| `{mode}` | " + " | ".join(map(spread, columns)) + f" | {lipschitz:.2f} |", flush=True)


def run(arguments, mode: str, seed: int) -> dict:
    """Summary of one run, trained and certified if it is not there yet."""
    workdir = arguments.out / f"{mode}-{seed}"
    summary = workdir / "certification" / "summary.json"
    if not summary.exists():
        flags = [f"--config={arguments.config}", f"--config.bound.mode={mode}", f"--config.seed={seed}"]
        for command in (
            ["train.py", *flags, f"--workdir={workdir}", *arguments.extra],
            ["certify.py", f"--workdir={workdir}", "--nocurve", "--modes=global,paper,local,linear"],
        ):
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return json.loads(summary.read_text())


def spread(values: list[float]) -> str:
    """Mean and range in percent."""
    low, high = 100 * min(values), 100 * max(values)
    return f"{100 * statistics.mean(values):.1f} ({low:.1f}-{high:.1f})"


if __name__ == "__main__":
    main()
