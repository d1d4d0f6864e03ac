"""What a first use costs in processor time, with no compiled programs on disk, and then with them.

    python -m benchmarks.cold_start
    python -m benchmarks.cold_start --only=bound,help

Each case is a fresh process with a new, empty cache folder (XDG_CACHE_HOME), then one that finds
there what the first has kept. Prints processor seconds, user and system, of the whole process, of
`import lipjax` within it, and of the first and the second call. They are no waiting time: where
there are cores to spare, compiling takes fewer seconds than these.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile

PREPARE = """
import time
began = time.process_time()
import lipjax
print(time.process_time() - began)
import numpy as np
from flax import nnx
from lipjax import data
images = data.load("digits").test.unit_images(slice(100))
labels = data.load("digits").test.labels[:100]
"""
MLP = """
net = nnx.Sequential(
    lipjax.Flatten(),
    nnx.Linear(64, 100, rngs=nnx.Rngs(0)),
    lipjax.ReLU(),
    nnx.Linear(100, 100, rngs=nnx.Rngs(1)),
    lipjax.ReLU(),
    nnx.Linear(100, 10, rngs=nnx.Rngs(2)),
)
"""
TIMED = """
for _ in range(2):
    began = time.process_time()
    {}
    print(time.process_time() - began)
"""
SHIPPED = 'net = lipjax.load("digits-maxmin")\n'
CERTIFY = "lipjax.certify(net, images, labels, 0.5{})"
BOUND = "lipjax.bound(net, images[0], 0.5).lipschitz.block_until_ready()"

PYTHON = {
    "certify": PREPARE + SHIPPED + TIMED.format(CERTIFY.format("")),
    "mlp": PREPARE + MLP + TIMED.format(CERTIFY.format(', tier="deterministic"')),
    "bound": PREPARE + SHIPPED + TIMED.format(BOUND),
    "import": "import lipjax",
}
CASES = {
    "certify": "100 digits, digits-maxmin, tier probabilistic",
    "mlp": "100 digits, new MLP 100-100, tier deterministic",
    "bound": "eager lipjax.bound, digits-maxmin, one digit",
    "import": "import lipjax",
    "help": "lipjax certify --help",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(CASES), help=f"some of {', '.join(CASES)}")
    options = parser.parse_args(arguments)

    measured([sys.executable, "-m", "lipjax", "certify", "--help"], os.devnull)
    for name in options.only.split(","):
        command = [sys.executable, "-c", PYTHON[name]] if name in PYTHON else None
        command = command or [sys.executable, "-m", "lipjax", "certify", "--help"]
        with tempfile.TemporaryDirectory() as cache:
            for state in ("empty", "filled"):
                seconds, said = measured(command, cache)
                parts = [f"{float(part):.2f}" for part in said.split()] if name in PYTHON else []
                words = ("import", "first call", "second call")
                shown = ", ".join(f"{w} {p}" for w, p in zip(words, parts, strict=False))
                print(
                    f"{CASES[name]}; cache {state}: {seconds:.2f} s"
                    + (f" ({shown})" if shown else ""),
                    flush=True,
                )


def measured(command: list[str], cache: str) -> tuple[float, str]:
    """Processor seconds of a command, children included, and what it printed."""
    environment = {**os.environ, "XDG_CACHE_HOME": cache}
    # What would be used in the place of that folder.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    # Python's own cache is no part of this: it is filled once for all, by the process before.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return spent, said.stdout


if __name__ == "__main__":
    main()
