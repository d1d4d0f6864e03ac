"""What people look at while a network trains, and after it is certified.

Of training: metrics as JSON lines, curves, progress. Of certificates: a table, files, a picture;
their page is `lipjax.report`.
"""

import contextlib
import csv
import hashlib
import importlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from lipjax.formats import certificate_files
from lipjax.formats.certificate_files import statement
from lipjax.formats.files import replaced

# ----------------------------------------------------------------------------------------- training


def read_metrics(path) -> list[dict]:
    """The complete lines of a metrics file; [] if there is none. A last line that a kill cut short
    is left out."""
    path = Path(path)
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


ROBUST = "validation_robust_accuracy_estimate"


class Metrics:
    """Appends JSON lines to a file.

    Args:
        path: the file.
        after_step: steps done by the state that training goes on from. Later lines, of work that a
            kill undid, are dropped, so that the file of a continued run is that of one never
            stopped.
    """

    def __init__(self, path, *, after_step: int):
        self.path = Path(path)
        kept = [line for line in read_metrics(self.path) if line.get("step", 0) <= after_step]
        with replaced(self.path, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)

    def write(self, **fields) -> dict:
        """Writes and returns one line. Numbers that are not finite become null; NumPy and JAX
        scalars are accepted."""
        line = {name: _plain(value) for name, value in fields.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return line


class Curves:
    """A picture of a metrics file that is drawn again while the file grows, and once more at the
    end; a context.

    Args:
        path: the picture, PNG; a kill leaves the old one or the new, never a part.
        metrics: the metrics file.
        share: of the time since the start, so much at most goes into drawing. The last one, at the
            end, is always drawn.
    """

    def __init__(self, path, metrics, *, share: float = 0.02):
        self.path, self.metrics, self.share = Path(path), Path(metrics), share
        self._began, self._spent, self._drawn = time.monotonic(), 0.0, 0
        # seconds that a drawing takes: of the first, which imports Matplotlib, a guess
        self._last = 2.0

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None or issubclass(kind, Exception):
            self._draw()

    @property
    def due(self) -> bool:
        """Whether a drawing fits into the share of the time."""
        return self._spent + self._last <= self.share * (time.monotonic() - self._began)

    def refresh(self) -> None:
        """Draws, if that is due."""
        if self.due:
            self._draw()

    def _draw(self):
        began, lines = time.monotonic(), read_metrics(self.metrics)
        if len(lines) > self._drawn:
            try:
                plot_metrics(self.path, lines)
            except (ImportError, OSError) as error:  # no reason to end training
                print(f"{self.path} is not drawn: {error}", file=sys.stderr, flush=True)
            self._drawn, self._last = len(lines), time.monotonic() - began
            self._spent += self._last


def best_of(lines: list[dict]) -> dict | None:
    """The line of the epoch whose parameters training selected, the first of equally good ones;
    None if nothing was evaluated yet.

    Args:
        lines: as `read_metrics` returns them.
    """
    evaluated = [line for line in lines if line.get(ROBUST) is not None]
    return max(evaluated, key=score, default=None)


def score(found: dict) -> float:
    """What checkpoints are selected by: the estimated robust accuracy on the validation split.
    Clean accuracy only breaks ties: it weighs less than one validation example. In float32, as the
    state keeps the best, so that an equal one is not taken for a better one."""
    return float(np.float32(found[ROBUST] + 1e-6 * found["validation_accuracy"]))


def plot_metrics(path, lines: list[dict]) -> None:
    """Losses, accuracies, schedules and learning rate of a run against the epoch, as PNG, written
    atomically.

    Robust accuracies are estimates, and the picture says so: nothing in it is certified.

    Args:
        lines: as `read_metrics` returns them; a figure that a line lacks, or that is null, is left
            out.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    facts = lines[-1]
    figure, grid = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained", sharex=True)
    for axes, (title, curves) in zip(grid.flat, _panels(facts).items(), strict=True):
        axes.set_ylabel(title)
        axes.grid(color="0.9")
        for (name, label), (color, dash) in zip(curves.items(), LINES, strict=False):
            points = [(line["epoch"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                marker = "o" if name.startswith("validation") else ""
                style = {"color": color, "marker": marker, "markersize": 3, "label": label}
                axes.plot(*zip(*points, strict=True), dash, **style)
        if axes.lines:
            axes.legend(fontsize=8)

    grid[0, 1].set_ylim(-0.02, 1.02)
    if grid[1, 1].lines:
        grid[1, 1].set_yscale("log")
    for axes in grid[1]:
        axes.set_xlabel("epoch")
    tier = facts.get("tier", "estimate")
    figure.suptitle(f"after epoch {facts['epoch']}: tier {tier}, seed {facts.get('seed')}")
    with replaced(path) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


# Curves are told apart by dash and marker as well as by colour.
LINES = [("#0072b2", "-"), ("#555555", "--"), ("#d55e00", "-")]


def _panels(facts: dict) -> dict[str, dict[str, str]]:
    """Titles of the panels; of each the figures that it shows, with their labels."""
    radius = "ε of the configuration"
    if "validation_epsilon" in facts:
        radius = f"ε = {facts['validation_epsilon']:g}"
    return {
        "loss": {"loss": "training loss, mean of the epoch"},
        "accuracy": {
            "accuracy": "training, clean, mean of the epoch",
            "validation_accuracy": "validation, clean",
            "validation_robust_accuracy_estimate": f"validation, robust at {radius}: an estimate, "
            "no certificate",
        },
        "schedule": {
            "epsilon": "ε of training (ℓ2, mean of the epoch)",
            "kappa": "κ (weight of the clean loss)",
        },
        "learning rate": {"learning_rate": "learning rate at the end of the epoch"},
    }


def tensorboard_writer():
    """tensorboardX's SummaryWriter, an optional package.

    Raises:
        ValueError: it is not installed; with what to do.
    """
    try:
        return importlib.import_module("tensorboardX").SummaryWriter
    except ImportError:
        raise ValueError(
            "--tensorboard needs the package tensorboardX: pip install tensorboardX (or leave the "
            "flag out: curves.png and metrics.jsonl hold the same figures)."
        ) from None


class TensorBoard:
    """The lines of a metrics file as scalars for TensorBoard, each step once; close it at the end
    (a context).

    What an earlier start has left in the folder is written anew from the lines that are kept: the
    file of a continued run is that of one never stopped, and it has all epochs even if earlier
    starts wrote none.

    Args:
        folder: for event files of this run alone.
        lines: the lines that are there, as `read_metrics` returns them.

    Raises:
        ValueError: as `tensorboard_writer`.
    """

    def __init__(self, folder, lines: list[dict]):
        for old in Path(folder).glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = tensorboard_writer()(str(folder))
        for line in lines:
            self.write(line)

    def write(self, line: dict) -> None:
        """One line: its numbers under their names, with the tier in front, at its step."""
        tier = line.get("tier", "estimate")
        for name, value in line.items():
            if name not in ("step", "seed", "tier") and value is not None:
                self._writer.add_scalar(
                    f"{tier}_seed_{line.get('seed')}/{name}", value, global_step=line["step"]
                )
        self._writer.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._writer.close()


def _plain(value):
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    number = np.asarray(value).item()
    return None if isinstance(number, float) and not math.isfinite(number) else number


class Progress:
    """Progress of a long loop: a bar with the time left on a terminal or in a notebook, a quiet
    line now and then in a log.

    The time left is told by what came after the first update, since what came before it was
    compiling and reading, which do not come again; only before the second update it counts all.
    What else is done for the first time is left out likewise: see `once`.

    Args:
        total: steps in all.
        description: what is going on.
        start: steps that were done before, which say nothing of this machine's speed.
        stream: where to; stderr by default.
        quiet_seconds: at most one line in so many seconds when the stream is no terminal.
    """

    def __init__(
        self,
        total: int,
        description: str,
        *,
        start: int = 0,
        stream=None,
        quiet_seconds: float = 15.0,
    ):
        self.total, self.description, self.start = total, description, start
        self.stream = sys.stderr if stream is None else stream
        self.quiet_seconds = quiet_seconds
        self._began = self._spoke = time.monotonic()
        self._from = start
        self._updates = 0
        self._seen: set[str] = set()
        self._bar = None
        notebook = stream is None and Console().is_jupyter
        if notebook or self.stream.isatty():
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}"),
                console=Console(file=None if notebook else self.stream),
            )
            self._task = self._bar.add_task(description, total=total, completed=start, shown="")

    def __enter__(self):
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_):
        if self._bar:
            self._bar.stop()

    @contextlib.contextmanager
    def once(self, what: str) -> Iterator[None]:
        """The first time that `what` is done it compiles and imports: that does not count in the
        time left."""
        began = time.monotonic()
        yield
        if what not in self._seen:
            self._seen.add(what)
            self._began += time.monotonic() - began

    @property
    def is_bar(self) -> bool:
        """Whether it is a bar, which people watch, and not lines in a log."""
        return self._bar is not None

    def update(self, done: int, **shown) -> None:
        """`done` steps of the total are done; `shown` are figures to show beside it."""
        text = ", ".join(f"{name} {value}" for name, value in shown.items())
        if self._bar:
            self._bar.update(self._task, completed=done, shown=text)
            return
        now = time.monotonic()
        if now - self._spoke >= self.quiet_seconds or done >= self.total:
            self._spoke = now
            left = (now - self._began) / max(done - self._from, 1) * (self.total - done)
            share = 100 * done / max(self.total, 1)
            said = f"{self.description}: {share:.0f} %, {duration(left)} left"
            print(f"{said}; {text}" if text else said, file=self.stream, flush=True)
        self._updates += 1
        if self._updates == 1:
            self._began = now
            self._from = done


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {seconds} s"
    return f"{seconds} s"


# ------------------------------------------------------------------------------------ certification


def print_table(summary: dict, stream=None) -> None:
    """The summary that certify.py stores, as a table for people."""
    console = Console(file=stream or sys.stdout, width=100)
    run = summary["run"]
    title = (
        f"{run['data']}, {run['split']} split, {run['examples']} images, epsilon "
        f"{run['epsilon']:g} (l2, pixels in [0, 1]), training seed {run['training_seed']}"
    )
    table = Table(title=title)
    for column in (
        "bound",
        "clean",
        "PGD",
        "certified",
        "Lipschitz (median)",
        "constant neurons per layer",
    ):
        table.add_column(column)
    for mode, row in summary["modes"].items():
        constant = " ".join(f"{100 * share:.0f}" for share in row["constant_share"]) + " %"
        table.add_row(
            mode,
            f"{100 * summary['clean_accuracy']:.2f} %",
            f"{100 * summary['pgd_accuracy']:.2f} %",
            f"{100 * row['certified_accuracy']:.2f} %",
            f"{row['median_lipschitz']:.4g}",
            constant if mode != "global" else "-",
        )
    console.print(table)
    console.print(
        f"certified, tier {run['tier']}, seed {run['seed']}: {statement(run)} "
        f"PGD: {run['pgd_steps']} steps, {run['pgd_restarts']} restarts, an upper bound.",
        soft_wrap=True,
    )
    if run.get("early"):
        examined = ", ".join(
            f"{row['examined']} by {mode}" for mode, row in summary["modes"].items()
        )
        console.print(
            f"Decided early: {examined} bound. The others are misclassified or broken by PGD, and "
            "not certified, or certified by a bound in a line above, and counted here too. "
            "Lipschitz constants and constant neurons are of those decided."
        )
    if run["note"]:
        console.print(f"note: {run['note']}")


def write_summary(path: Path, summary: dict) -> None:
    """The summary as JSON."""
    with replaced(path, "w") as file:
        file.write(json.dumps(_plain(summary), indent=2) + "\n")


def write_arrays(path: Path, run: dict, arrays: dict[str, np.ndarray]) -> None:
    """Arrays as npz, with the run's facts as JSON in `run`."""
    facts = np.array(json.dumps(_plain(run)))
    with replaced(path) as file:
        np.savez_compressed(file, run=facts, **arrays)  # type: ignore[arg-type]


def hashes(path: Path) -> dict:
    """Of a certificate file: SHA-256 of its bytes, and the digest and hashes of network and data in
    its header."""
    header, _ = certificate_files.load(path)
    inside = {name: header[name] for name in ("digest", "network", "data")}
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **inside}


def write_examples(folder: Path, run: dict, columns: dict[str, np.ndarray]) -> None:
    """Per-example results, ``examples.npz`` (with the run's facts as JSON in `run`) and
    ``examples.csv``.

    Args:
        columns: name to array of shape ``(N,)``.
    """
    write_arrays(folder / "examples.npz", run, columns)
    with replaced(folder / "examples.csv", "w") as file:
        facts = (
            "tier",
            "failure_probability",
            "arithmetic",
            "epsilon",
            "data",
            "split",
            "seed",
            "training_seed",
        )
        file.write("# " + ", ".join(f"{name}={run[name]}" for name in facts) + "\n")
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(array.tolist() for array in columns.values()), strict=True))


def plot_curve(
    path: Path, run: dict, radii: np.ndarray, pgd: dict[float, float], points: dict[str, float]
) -> None:
    """Certified accuracy against epsilon, the PGD accuracy above it, and the accuracy of each mode
    at the run's epsilon.

    Args:
        radii: certified radius of each example, 0 where none.
        pgd: epsilon to PGD accuracy.
        points: mode to certified accuracy at ``run["epsilon"]``.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    grid = np.linspace(0, max(pgd), 400)
    certified = [float(np.mean(radii >= max(epsilon, 1e-12))) for epsilon in grid]
    label = f"certified, {run['curve_mode']} ({run['tier']}, δ = {run['failure_probability']:g})"
    axes.plot(list(pgd), list(pgd.values()), "o-", color="tab:orange", label="PGD (upper bound)")
    axes.plot(grid, certified, color="tab:blue", label=label)
    axes.fill_between(
        grid,
        certified,
        np.interp(grid, list(pgd), list(pgd.values())),
        color="0.92",
        label="undecided",
    )
    looser = ""
    for marker, (mode, accuracy) in zip("sD^v", points.items(), strict=False):
        label = f"certified at ε, {mode}{looser}: {100 * accuracy:.1f} %"
        axes.plot(run["epsilon"], accuracy, marker, color="black", label=label)
        looser = " or looser" if run.get("early") else ""
    axes.axvline(run["epsilon"], color="0.6", linestyle=":")
    axes.set(
        xlabel="ε (ℓ2 radius, pixels in [0, 1])",
        ylabel="accuracy",
        ylim=(0, 1.02),
        xlim=(0, max(pgd)),
    )
    axes.set_title(
        f"{run['data']}, {run['split']} split, {run['examples']} images, training seed "
        f"{run['training_seed']}"
    )
    axes.legend(fontsize=8)
    with replaced(path) as file:
        figure.savefig(file, dpi=150, format="png")
    plt.close(figure)
