"""Certifies a trained network on the test set: which predictions are proved not to change.

    python certify.py --workdir=runs/digits
    python certify.py --workdir=runs/cifar10 --epsilon=0.141 --examples=1000
    python certify.py --network=net.onnx --data=npz:test.npz --epsilon=0.5

`lipjax certify` is the same. It prints accuracies (clean, under PGD attack, certified by the bounds
of --modes side by side) and writes to workdir/certification, or --out: report.html (a page of it;
lipjax/report/page.py), summary.json, examples.npz and examples.csv (per image), gallery.npz (some
images with adversarial ones near them), curve.png (certified accuracy against epsilon, below the
PGD curve), and certificate.npz, which `python -m lipjax.check` derives once more with other code.
With --early each image is certified by the cheapest bound that can: "certified" then means by the
bound named or by a looser one of --modes, and certificate_<bound>.npz has the other bounds'
certificates.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import math
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging

import lipjax
from lipjax import pretrained, report
from lipjax.certificates import batches
from lipjax.certificates.stages import AUTO
from lipjax.cli import common, networks
from lipjax.data import sets
from lipjax.formats import certificate_files
from lipjax.runtime import cpu, hosts
from lipjax.training import metrics
from lipjax.training.checkpoints import CheckpointError, load_config

# The curve's PGD points are for orientation: one restart, where at epsilon itself there are more.
CURVE_RESTARTS = 1
CURVE_POINTS = 6

# Of the attack that looks for the nearest adversarial image of the few in the report's gallery.
GALLERY_STEPS = 200
GALLERY_RESTARTS = 4

# Modes that improve slopes by gradient steps.
STEPPING = ("tight", "tight_rows", AUTO)

# These say what is wrong and what to do.
ERRORS = (sets.DataError, CheckpointError, ValueError, TypeError, OSError)


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    own = {"flag_values": values}

    # ------------------------------------------------------------------ what is certified
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of a run of train, or, with --network, for the results; default runs/digits, or "
        "runs/<network>.",
        **own,
    )
    flags.DEFINE_string(
        "out", None, "Folder for the results; default <workdir>/certification.", **own
    )
    flags.DEFINE_string(
        "network",
        None,
        "Instead of a run: a .safetensors file of lipjax.save, an .onnx file of anybody's (on "
        "pixels in [0, 1]), or the name of a network that comes with lipjax.",
        **own,
    )
    flags.DEFINE_string(
        "data",
        None,
        "With --network: the data set, as --config.data.name takes it, or npz:<test.npz> alone.",
        **own,
    )
    flags.DEFINE_integer(
        "image_size", None, "With --network: of sets of encoded images, as data.image_size.", **own
    )
    flags.DEFINE_string(
        "data_dir", None, "Where TFDS keeps its sets, if not where training found them.", **own
    )
    flags.DEFINE_integer(
        "examples",
        None,
        "Certify so many test images, a fixed random choice; default all.",
        lower_bound=1,
        **own,
    )

    # ------------------------------------------------------------------ how
    flags.DEFINE_float(
        "epsilon",
        None,
        "l2 radius on pixels in [0, 1]; the configuration's epsilon.test if unset.",
        **own,
    )
    tiers = list(lipjax.certificates.TIERS)
    flags.DEFINE_enum("tier", "probabilistic", tiers, "Kind of proof.", **own)
    flags.DEFINE_float(
        "failure_probability",
        1e-6,
        "Of all certificates of this run together, in tier probabilistic.",
        **own,
    )
    flags.DEFINE_list(
        "modes",
        ["global", "paper", "local"],
        "Bounds to certify with, side by side, some of global, bcp, paper, local, linear, rows, "
        "tight, auto; the last one named also makes the curve and the certificate file. tight "
        "costs a reverse pass for each rival class; rows, one for each neuron, pays on networks "
        "that were not trained for certificates. auto takes for each image the cheapest that "
        "decides it: local, tight, gradient steps on its slopes; within --seconds_per_image also "
        "tight_rows.",
        **own,
    )
    flags.DEFINE_integer(
        "steps",
        None,
        "Gradient steps of modes tight, tight_rows and auto, at most, for each image that is still "
        "open; default 20 for auto, else 0.",
        lower_bound=0,
        **own,
    )
    flags.DEFINE_float(
        "seconds_per_image",
        None,
        "Mode auto: seconds that may have gone into an image for another stage to begin, the last "
        "of which is tight_rows; compiling is not counted. What is certified depends on the "
        "machine, then; inf runs all stages.",
        **own,
    )
    flags.DEFINE_enum(
        "arithmetic",
        None,
        list(lipjax.rounding.ARITHMETICS),
        "How the network will be executed; its rounding is taken off the margins. Unset: as this "
        "machine executes it.",
        **own,
    )
    flags.DEFINE_float(
        "budget",
        lipjax.norms.best.BUDGET,
        "Tier deterministic: floating-point operations per norm and image, above which a masked "
        "convolution's norm is its global one.",
        **own,
    )
    flags.DEFINE_integer(
        "seed",
        None,
        "Of the certificates' draws and the attack's starts; unset: from the operating system. One "
        "that is given makes the run repeatable, and its certificates assume that network and "
        "images were chosen independently of it.",
        lower_bound=0,
        upper_bound=2**63 - 1,
        **own,
    )
    for name, default, meaning in (
        ("batch_size", 64, "Images at once; no influence on the result."),
        ("pgd_steps", 100, "Steps of each attack, each of epsilon / 4."),
        ("pgd_restarts", 5, "Random starts of each attack at epsilon."),
    ):
        flags.DEFINE_integer(name, default, meaning, lower_bound=1, **own)
    flags.DEFINE_bool(
        "curve",
        True,
        "Certified radii and the curve; without it only the verdicts at epsilon.",
        **own,
    )
    flags.DEFINE_bool(
        "early",
        False,
        "Attack first; each bound of --modes decides only what is predicted right, stands the "
        "attack and was not certified by the bound before it (global is nearly free). Less time, "
        "no figures of the others.",
        **own,
    )
    common.define_hosts(values)


def main(options: flags.FlagValues) -> None:
    """Certifies as the flags say; each station below is a function with its name."""
    hosts.join(options.hosts)
    cpu.keep_compiled()
    logging.set_verbosity(logging.ERROR)
    started = time.monotonic()

    # ------------------------------------------------------------------ before anything is loaded
    workdir = named(options)
    folder = Path(options.out or workdir / "certification")
    pictures = hosts.is_writer() and probe(folder)

    # ------------------------------------------------------------------ network, data, settings
    given = open_network(options, workdir)
    task = settle(options, given, workdir)
    facts = given.facts
    count = len(task.labels)
    say(f"{facts['network']}: epoch {facts['epoch']}; {count} test images of {given.test.name}")

    # ------------------------------------------------------------------ attack, certificates
    say(f"attacking, PGD with {options.pgd_steps} steps and {options.pgd_restarts} restarts ...")
    broken = attack(task, task.epsilon, task.mine, options.pgd_restarts)
    verdicts = certify_modes(task, broken)
    for mode, certificate in verdicts.certificates.items():
        contradicted = certificate.certified & broken
        refuse_contradictions(mode, given.test.indices[contradicted])
    hint_at_arithmetic(task, verdicts.tightest)

    # ------------------------------------------------------------------ what is proved is kept
    # At once: whatever fails from here on, it is on the disk.
    run = run_facts(task, verdicts)
    files: dict[str, str] = {}
    if hosts.is_writer():
        folder, files = write_certificates(task, verdicts, run, folder)

    # ------------------------------------------------------------------ radii and curve
    curve = trace_curve(task, verdicts, broken) if options.curve else None
    if not hosts.is_writer():
        return

    # ------------------------------------------------------------------ tables, then pictures
    columns = columns_of(task, verdicts, broken, curve)
    seconds = round(time.monotonic() - started, 1)
    timed = {**run, "seconds": seconds}
    summary = summarise(task, verdicts, broken, curve, timed, folder, files)
    write_tables(folder, run, summary, columns)
    gallery = find_gallery(task, run, columns, [folder / name for name in files.values()])
    metrics.write_arrays(folder / "gallery.npz", run, gallery)
    page = report.build(folder)
    names = [page.name, *files.values(), "summary.json", "examples.csv", "examples.npz"]
    names.append("gallery.npz")
    if curve and pictures:
        at_epsilon = {mode: float(np.mean(rows)) for mode, rows in verdicts.certified.items()}
        metrics.plot_curve(folder / "curve.png", run, curve.radii, curve.pgd, at_epsilon)
        names.append("curve.png")
    print("written: " + ", ".join(str(folder / name) for name in names))


# ------------------------------------------------------------------- what can be known beforehand


def named(options) -> Path:
    """The folder of the run or, of a network, for its results, after the names and numbers on the
    command line were looked at; no data is read.

    Raises:
        ValueError: one that is unknown or makes no sense, with what there is.
        CheckpointError: no run there.
    """
    modes_of(options)
    if not 0 < options.failure_probability < 1:
        raise ValueError(
            f"failure_probability must lie in (0, 1), got {options.failure_probability}."
        )
    if options.epsilon is not None:
        lipjax.bounds.check_epsilon(options.epsilon)
    if options.network is None:
        if options.data is not None or options.image_size is not None:
            raise ValueError(
                "--data and --image_size belong to --network: a run has its own data set."
            )
        workdir = Path(options.workdir or "runs/digits")
        load_config(workdir)
        return workdir

    if options.data is None:
        raise ValueError(
            "--network needs --data, the data set to certify it on: `lipjax data list` lists the "
            "names."
        )
    if options.epsilon is None:
        raise ValueError(
            "--network needs --epsilon, the l2 radius on pixels in [0, 1]: a file says nothing of "
            "it."
        )
    network = Path(options.network)
    if network.is_dir():
        raise ValueError(f"--network={network} is a folder: give a run as --workdir={network}.")
    if network.suffix not in (".safetensors", ".onnx"):
        pretrained.card(options.network)
    elif not network.is_file():
        raise ValueError(f"--network: {network.absolute()} is not there.")
    return Path(options.workdir or f"runs/{network.stem}")


def modes_of(options) -> list[str]:
    """The bounds of --modes, in the order in which they were named."""
    modes = list(dict.fromkeys(options.modes))
    known = (*lipjax.bounds.MODES, AUTO)
    if not modes or not {*modes} <= {*known} or len(modes) < len(options.modes):
        raise ValueError(
            f"modes must be some of {', '.join(known)}, got {', '.join(options.modes)}."
        )
    if options.steps is not None and not {*modes} & {*STEPPING}:
        raise ValueError(
            f"--steps={options.steps} belongs to modes {', '.join(STEPPING)}, and --modes names "
            f"{', '.join(modes)}."
        )
    seconds = options.seconds_per_image
    if seconds is not None and not (AUTO in modes and seconds > 0):
        raise ValueError(
            f"--seconds_per_image={seconds} must be > 0 and belongs to mode {AUTO}, and --modes "
            f"names {', '.join(modes)}."
        )
    if jax.process_count() > 1 and (AUTO in modes or options.steps):
        raise ValueError("gradient steps on slopes run in one process: leave out --hosts.")
    return modes


def probe(folder: Path) -> bool:
    """Makes sure, before minutes of work, that the results can be written.

    Returns:
        whether curve.png can be drawn, which needs Matplotlib; the page has the curve too.

    Raises:
        ValueError: the folder cannot be written to, or the page needs a package that is missing.
    """
    common.writable(folder)
    if importlib.util.find_spec("PIL") is None:
        raise ValueError("the page's pictures need Pillow: pip install pillow.")
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        say(f"there will be no curve.png ({error}): pip install matplotlib. All else is made.")
        return False
    return True


# ------------------------------------------------------------------------------------ the settings


@dataclasses.dataclass(frozen=True)
class Task:
    """What is certified, and how.

    Attributes:
        images, labels: ``(N, H, W, C)`` floats in [0, 1], ``(N,)``.
        workdir: for the results.
        modes: as they were named; the last one makes the curve and the certificate file.
        arguments: of each call of `lipjax.certify` and `lipjax.certified_radius`.
        seed, drawn: of all draws; whether it came from the operating system.
        mine: which images this process examines, boolean ``(N,)``.
    """

    options: flags.FlagValues
    given: networks.NetworkWithData
    images: np.ndarray
    labels: np.ndarray
    workdir: Path
    epsilon: float
    modes: list[str]
    arguments: dict[str, Any]
    seed: int
    drawn: bool
    mine: np.ndarray


def open_network(options, workdir: Path) -> networks.NetworkWithData:
    """What the flags say is certified."""
    if options.network is None:
        return networks.of_run(workdir, examples=options.examples, data_dir=options.data_dir)
    return networks.of_network(
        options.network,
        options.data,
        examples=options.examples,
        data_dir=options.data_dir,
        image_size=options.image_size,
    )


def settle(options, given: networks.NetworkWithData, workdir: Path) -> Task:
    """The settings, checked before anything takes long.

    Raises:
        ValueError: one that makes no sense.
    """
    test = given.test
    epsilon = checked_epsilon(options, given, tuple(test.images.shape[1:]))
    modes = modes_of(options)

    # One statement for the whole run: each call gets an equal share of the failure probability.
    calls = len(modes) + (1 if options.curve else 0)
    # One seed for all processes: the draws behind the global norms are shared.
    drawn = options.seed is None
    seed = lipjax.certificates.drawn_seed() if drawn else options.seed
    seed = int(hosts.gather(np.asarray(seed, np.int64))[0])
    return Task(
        options=options,
        given=given,
        images=test.unit_images(slice(None)),
        labels=test.labels,
        workdir=workdir,
        epsilon=epsilon,
        modes=modes,
        arguments={
            "tier": options.tier,
            "failure_probability": options.failure_probability / calls,
            "arithmetic": options.arithmetic,
            "budget": options.budget,
            "batch_size": options.batch_size,
        },
        seed=seed,
        drawn=drawn,
        # Each process takes its share of the images, one after the other in turn.
        mine=np.arange(len(test.labels)) % jax.process_count() == jax.process_index(),
    )


def checked_epsilon(options, given, shape) -> float:
    """The radius, by flag or by the run's configuration."""
    epsilon = given.epsilon if options.epsilon is None else options.epsilon
    assert epsilon is not None  # `named` refuses a network without one
    lipjax.bounds.check_epsilon(epsilon)
    diameter = float(np.sqrt(np.prod(shape)))
    if epsilon >= diameter:
        raise ValueError(
            f"epsilon {epsilon:g} is a radius on pixels in [0, 1], where no two images of {shape} "
            f"are further apart than {diameter:g}: divide one that is meant for pixels in [0, 255] "
            "by 255."
        )
    return epsilon


# ------------------------------------------------------------------------- attack and certificates


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """What was found at epsilon, by mode.

    Attributes:
        certificates: of `lipjax.certify`.
        certified: which images are certified, with --early by a looser bound too; boolean ``(N,)``.
        examined: which images were examined, boolean ``(N,)``.
    """

    certificates: dict[str, lipjax.Certificate]
    certified: dict[str, np.ndarray]
    examined: dict[str, np.ndarray]

    @property
    def tightest(self) -> lipjax.Certificate:
        """The certificate of the last mode."""
        return list(self.certificates.values())[-1]


def attack(task: Task, epsilon: float, rows: np.ndarray, restarts: int) -> np.ndarray:
    """Which of all images PGD breaks; each process attacks its `rows`, boolean, and learns of the
    others."""
    key = jax.random.fold_in(jax.random.key(task.seed), jax.process_index())
    broken = np.zeros(len(task.labels), bool)
    if np.any(rows):
        found = lipjax.attacks.pgd(
            task.given.network,
            task.images[rows],
            task.labels[rows],
            epsilon,
            steps=task.options.pgd_steps,
            restarts=restarts,
            key=key,
        )
        broken[rows] = found.broken
    return np.any(hosts.gather(broken), axis=0)


def hint_at_arithmetic(task: Task, certificate: lipjax.Certificate) -> None:
    """Says what a coarse arithmetic costs, where it was the device's choice."""
    if task.options.arithmetic is None and certificate.arithmetic not in ("float32", "float64"):
        say(
            f"these certificates are about products in {certificate.arithmetic}, as JAX makes them "
            "here unless it is told otherwise, and its rounding may take all of a margin. A "
            'network that is executed under jax.default_matmul_precision("highest") is certified '
            "by --arithmetic=float32."
        )


def certify_modes(task: Task, broken: np.ndarray) -> Verdicts:
    """Certificates by each mode in turn; with --early of what is not decided yet."""
    early = task.options.early
    left = ~broken if early else np.ones(len(task.labels), bool)
    before = np.zeros(len(task.labels), bool)
    verdicts = Verdicts({}, {}, {})
    for i, mode in enumerate(task.modes):
        say(f"certifying {np.sum(left)} images, {mode} bound ...")
        with progress(f"certifying, {mode}"):
            # Independent draws for each call, as the union bound over them needs fresh ones.
            certificate = lipjax.certify(
                task.given.network,
                task.images,
                task.labels,
                task.epsilon,
                mode=mode,
                seed=draw_seed(task.seed, i),
                examine=left & task.mine,
                steps=task.options.steps if mode in STEPPING else None,
                seconds_per_image=task.options.seconds_per_image if mode == AUTO else None,
                **task.arguments,
            )
        if certificate.stages:
            say(f"certified by stage: {certificate.by_stage}")
        if task.drawn:
            certificate = dataclasses.replace(certificate, seed_from="system")
        certificate = together(certificate)
        verdicts.certificates[mode] = certificate
        verdicts.examined[mode] = left
        verdicts.certified[mode] = certificate.certified
        if early:
            before = before | certificate.certified
            verdicts.certified[mode] = before
            left = left & ~before
    return verdicts


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Shows how far the passes over images within are, and the time left: a bar for each of them,
    or now and then a line in a log."""
    bars: list[metrics.Progress] = []
    before = math.inf

    def watcher(done: int, total: int) -> None:
        nonlocal before
        if done <= before:  # another pass
            stack.close()
            bars[:] = [stack.enter_context(metrics.Progress(total, what))]
        before = done
        # A log is told that it goes on, not that each pass is over.
        if done < total or bars[0].is_bar:
            bars[0].update(done)

    with contextlib.ExitStack() as stack:
        if hosts.is_writer():
            with batches.watched(watcher):
                yield
        else:
            yield


def together(found):
    """Certificates, each image's from the process that examined it."""
    if jax.process_count() == 1:
        return found
    owner = np.arange(len(found.predicted)) % jax.process_count()
    # (Slopes there are none of: they come from gradient steps.)
    arrays = {
        name: value
        for name, value in vars(found).items()
        if isinstance(value, np.ndarray) and not name.startswith("slopes")
    }
    gathered = {
        name: hosts.gather(value)[owner, np.arange(len(owner))] for name, value in arrays.items()
    }
    return dataclasses.replace(found, **gathered)


def draw_seed(seed: int, call: int) -> int:
    """A seed of its own for each of this run's calls, of as many bits as `certify` takes."""
    return int(np.random.SeedSequence([seed, call]).generate_state(1, np.uint64)[0] >> 1)


def refuse_contradictions(bound: str, indices: np.ndarray, files: Sequence[Path] = ()) -> None:
    """Ends the program if there are test images that a certificate speaks of and that an attack
    broke nevertheless; certificate files of such a run are removed."""
    if len(indices):
        for file in files:
            file.unlink()
        raise SystemExit(
            f"{common.program()}: the {bound} bound certified test images {indices.tolist()} and "
            "the attack broke them: do not trust this run, and please report it."
        )


# --------------------------------------------------------------------------------- radii and curve


@dataclasses.dataclass(frozen=True)
class Curve:
    """Certified radii of the images, and PGD accuracy by radius."""

    radii: np.ndarray
    pgd: dict[float, float]


def trace_curve(task: Task, verdicts: Verdicts, broken: np.ndarray) -> Curve:
    """Certified radii by the tightest mode, and what PGD leaves at some radii."""
    say("certified radii for the curve ...")
    epsilon, mode = task.epsilon, task.modes[-1]
    with progress("certified radii"):
        found = lipjax.certified_radius(
            task.given.network,
            task.images,
            task.labels,
            mode="tight" if mode == AUTO else mode,
            seed=draw_seed(task.seed, len(task.modes)),
            max_radius=8 * max(epsilon, 0.01),
            examine=task.mine,
            **task.arguments,
        )
    radii = together(found).radius
    # All are certificates of the same statement, so the largest radius holds.
    radii = np.where(verdicts.certified[mode], np.maximum(radii, epsilon), radii)

    standing = verdicts.tightest.correct.copy()
    pgd = {0.0: float(np.mean(standing))}
    top = max(1.6 * epsilon, float(np.quantile(radii, 0.98)), 1e-3)
    points = {float(f"{point:.3g}") for point in np.linspace(0, top, CURVE_POINTS)}
    for point in sorted((points | {epsilon}) - {0.0}):
        if point >= epsilon:
            standing &= ~broken
        if point != epsilon:  # what broke within a smaller radius is broken
            standing &= ~attack(task, point, standing & task.mine, CURVE_RESTARTS)
        pgd[point] = float(np.mean(standing))
    return Curve(radii, pgd)


# --------------------------------------------------------------------------------- what is written


def run_facts(task: Task, verdicts: Verdicts) -> dict[str, Any]:
    """What has to be known of a run to read its results, or to repeat it."""
    options, test, tightest = task.options, task.given.test, verdicts.tightest
    probabilistic = options.tier == "probabilistic"
    return {
        "tier": options.tier,
        "failure_probability": options.failure_probability if probabilistic else 0.0,
        "arithmetic": tightest.arithmetic,
        "backend": tightest.backend,
        "left_out": tightest.left_out,
        "epsilon": task.epsilon,
        "data": test.name,
        "split": "test",
        "examples": len(task.labels),
        "early": options.early,
        "data_fingerprint": sets.fingerprint(test),
        "note": test.note,
        "seed": task.seed,
        "seed_from": "system" if task.drawn else "given",
        **task.given.facts,
        "precision": tightest.precision,
        "pgd_steps": options.pgd_steps,
        "pgd_restarts": options.pgd_restarts,
        "curve_mode": task.modes[-1],
        "gallery_steps": GALLERY_STEPS,
        "gallery_restarts": GALLERY_RESTARTS,
        "versions": {**certificate_files.versions(), "python": platform.python_version()},
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "command": common.line("certify", sys.argv[1:]),
    }


def columns_of(task: Task, verdicts: Verdicts, broken, curve: Curve | None) -> dict:
    """What is known of each image, by name."""
    columns = {
        "index": task.given.test.indices,
        "label": task.labels,
        "predicted": verdicts.tightest.predicted,
        "broken_by_pgd": broken,
    }
    found = verdicts.certificates
    columns |= {f"certified_{mode}": rows for mode, rows in verdicts.certified.items()}
    columns |= {f"margin_{mode}": certificate.margin for mode, certificate in found.items()}
    columns |= {f"lipschitz_{mode}": certificate.lipschitz for mode, certificate in found.items()}
    if curve:
        columns["certified_radius"] = curve.radii
    return columns


def find_gallery(
    task: Task, run: dict, columns: dict, certificates: Sequence[Path]
) -> dict[str, np.ndarray]:
    """Adversarial images near some of the images, for the report.

    Args:
        certificates: their files, which are removed if an adversarial image contradicts a radius.
    """
    say("adversarial images for the report ...")
    tightest = task.modes[-1]
    gallery = report.gallery(
        task.given.network,
        task.images,
        task.labels,
        report.select(columns, tightest, task.modes),
        seed=task.seed,
        steps=GALLERY_STEPS,
        restarts=GALLERY_RESTARTS,
    )
    proved = report.proved_radii(columns, run)[gallery["row"]]
    nearer = (proved > 0) & (gallery["distance"] <= proved)
    indices = task.given.test.indices[gallery["row"][nearer]]
    refuse_contradictions(f"{tightest} (certified radius)", indices, certificates)
    return gallery


def write_certificates(
    task: Task, verdicts: Verdicts, run: dict, folder: Path
) -> tuple[Path, dict[str, str]]:
    """Writes the certificate files.

    Returns:
        the folder, which is another one if that one has become unwritable meanwhile; and their
        names by mode.
    """
    # Early, the verdicts are those of all bounds together, each in a file of its own.
    *looser, tightest = task.modes
    files = {mode: f"certificate_{mode}.npz" for mode in looser} if task.options.early else {}
    files[tightest] = "certificate.npz"

    def write(folder: Path) -> None:
        # No page of other files, whatever happens now.
        (folder / report.NAME).unlink(missing_ok=True)
        for mode, name in files.items():
            certificate_files.save(
                folder / name,
                verdicts.certificates[mode],
                task.given.network,
                task.images,
                task.labels,
                indices=task.given.test.indices,
                data={"name": task.given.test.name, "split": "test"},
                command=run["command"],
            )

    try:
        write(folder)
    except OSError as error:
        # The proofs have taken their time: better elsewhere than nowhere.
        elsewhere = Path(tempfile.mkdtemp(prefix="lipjax-certification-"))
        say(f"cannot write to {folder} any more ({error}); the results go to {elsewhere}")
        folder = elsewhere
        write(folder)
    return folder, files


def summarise(
    task: Task, verdicts, broken, curve: Curve | None, run, folder: Path, files
) -> dict[str, Any]:
    """What summary.json says."""
    trained = task.workdir / "command.txt"
    of_run = trained.exists() and not task.options.network
    source = source_flags(task)
    return {
        "run": run,
        "clean_accuracy": float(np.mean(verdicts.tightest.correct)),
        "pgd_accuracy": float(np.mean(~broken)),
        "modes": {mode: figures_of_mode(verdicts, mode) for mode in task.modes},
        "pgd_curve": sorted(curve.pgd.items()) if curve else None,
        "classes": task.given.test.classes,
        "activations": report.activation_layers(task.given.network, task.images.shape[1:]),
        "config": task.given.config,
        "commands": {
            "train": trained.read_text(encoding="utf-8").strip() if of_run else None,
            "certify": run["command"],
            "check": [report.check_command(folder / name, *source) for name in files.values()],
        },
        "files": {name: metrics.hashes(folder / name) for name in files.values()},
    }


def figures_of_mode(verdicts: Verdicts, mode: str) -> dict[str, Any]:
    """Accuracy by a mode, and averages over the images that it examined."""
    certificate, examined = verdicts.certificates[mode], verdicts.examined[mode]
    rows = examined if np.any(examined) else ~examined
    return {
        "certified_accuracy": float(np.mean(verdicts.certified[mode])),
        "examined": int(np.sum(examined)),
        "median_lipschitz": float(np.median(certificate.lipschitz[rows])),
        "constant_share": np.mean(certificate.constant[rows], axis=0).tolist(),
        "stable_share": np.mean(certificate.stable[rows], axis=0).tolist(),
        "stages": [run.counted() for run in certificate.stages],
    }


def source_flags(task: Task) -> list[str]:
    """The flags with which `lipjax check` finds network and data again."""
    options = task.options
    found = [f"--workdir={task.workdir}"]
    if options.network:
        found = [f"--network={options.network}", f"--data={options.data}"]
    for name in ("data_dir", "image_size"):
        if options[name].value is not None:
            found.append(f"--{name}={options[name].value}")
    return found


def write_tables(folder: Path, run: dict, summary: dict, columns: dict) -> None:
    """Prints the table, and writes summary and results of each image."""
    metrics.print_table(summary)
    metrics.write_summary(folder / "summary.json", summary)
    metrics.write_examples(folder, run, columns)


def say(message: str) -> None:
    """Prints a line to stderr, in the one process that does."""
    if hosts.is_writer():
        print(message, file=sys.stderr, flush=True)
