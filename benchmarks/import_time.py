"""How long `import lipjax` takes, beside the import of what it is made of.

    python -m benchmarks.import_time --rounds=15 --json

Each import has a fresh process, and they take turns, so that what else the machine does falls on
all of them. Seconds are those of the import statement alone (without the interpreter's start), once
as they pass and once as the processor works; medians over the rounds, after one round that warms
the disk's cache.
"""

import argparse
import json
import statistics
import subprocess
import sys

STATEMENTS = {"jax and flax.nnx": "import jax, flax.nnx", "lipjax": "import lipjax"}
TIMED = (
    "from time import *; t, c = perf_counter(), process_time(); {}; print(perf_counter() - t, "
    "process_time() - c)"
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}.")
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in STATEMENTS}
    for _ in range(options.rounds + 1):
        for name, statement in STATEMENTS.items():
            command = [sys.executable, "-c", TIMED.format(statement)]
            wall, cpu = map(float, subprocess.check_output(command, text=True).split())
            taken[name].append((wall, cpu))
    medians = {
        name: dict(
            zip(
                ("seconds", "cpu_seconds"),
                map(statistics.median, zip(*times[1:], strict=True)),
                strict=True,
            )
        )
        for name, times in taken.items()
    }
    if options.json:
        print(json.dumps({"rounds": options.rounds, **medians}))
        return
    for name, found in medians.items():
        print(
            f"import {name}: {found['seconds']:.3f} s, {found['cpu_seconds']:.3f} s of processor "
            "time"
        )
    more = medians["lipjax"]["cpu_seconds"] - medians["jax and flax.nnx"]["cpu_seconds"]
    print(f"lipjax's own: {more:.3f} s of processor time (medians of {options.rounds})")


if __name__ == "__main__":
    main()
