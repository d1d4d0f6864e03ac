"""Runs the core tests on the oldest versions that the library supports, and on the newest where
there is a newer Python.

    python tests/versions.py FOLDER

Makes a virtual environment for each in FOLDER, with what `import lipjax` and the checker need and
no more, and runs them side by side. Exit status 1 if any of them fails. Newer jax wants a newer
Python than 3.11: the newest is looked for as python3.14, python3.13 and python3.12, on the path and
    among pyenv's; if there is none this is said, and the oldest versions alone are run.
"""

import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ["jax", "flax", "numpy", "safetensors", "scipy"]
TOOLS = ["pytest", "hypothesis"]
VERSIONS = (
    "import sys, jax, flax; print('Python', sys.version.split()[0], 'jax', "
    "jax.__version__, "
    "'flax', flax.__version__)"
)
FILES = [
    f"tests/test_{name}.py" for name in ("certificates", "check", "margins", "regions", "spectral")
]
NEWER = ["python3.14", "python3.13", "python3.12"]


def main(folder: Path) -> int:
    constraints = ["-c", str(ROOT / "tests" / "oldest.txt")]
    jobs = {"oldest": (sys.executable, constraints)}
    if newer := newest_python():
        jobs["newest"] = (newer, [])
    else:
        print(f"newest: no {', '.join(NEWER)} here, so the newest jax is not tried", flush=True)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = {name: pool.submit(run, folder / name, *job) for name, job in jobs.items()}
    for name, future in runs.items():
        status, output = future.result()
        print(f"---- {name}: {'passed' if status == 0 else 'FAILED'}\n{output}", flush=True)
    return int(any(future.result()[0] for future in runs.values()))


def newest_python() -> str | None:
    """The newest interpreter after the one that is running, or None."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for name in NEWER:
        if name == f"python3.{sys.version_info.minor}":
            return None
        for command in [name, *map(str, sorted(pyenv.glob(f"*/bin/{name}")))]:
            try:  # a command on the path may be one that only says that it is not there
                subprocess.run([command, "-c", "import venv"], check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                continue
            return command
    return None


def run(environment: Path, python: str, constraints: list[str]) -> tuple[int, str]:
    """Exit status and output of the core tests in a new environment; of the step that failed, if
    one did."""
    own = str(environment / "bin" / "python")
    requirements = [
        line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()
    ]
    wanted = [line for line in requirements if line.split(">=")[0] in LIBRARY]
    output = ""
    for command in (
        [python, "-m", "venv", str(environment)],
        [
            own,
            "-m",
            "pip",
            "install",
            "-qq",
            "--no-compile",
            "--disable-pip-version-check",
            *constraints,
            *wanted,
            *TOOLS,
        ],
        [own, "-c", VERSIONS],
        [own, "-m", "pytest", "-q", "-m", "core", "-p", "no:cacheprovider", *FILES],
    ):
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        output += done.stdout
        if done.returncode:
            break
    return done.returncode, output


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
