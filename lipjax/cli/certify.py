"""Certifies a trained network on the test set: which predictions are proved not to change.

    python certify.py --workdir=runs/digits
    python certify.py --workdir=runs/cifar10 --epsilon=0.141 --examples=1000
    python certify.py --network=net.safetensors --data=npz:train.npz,test.npz --epsilon=0.5
    --workdir=runs/own

Prints accuracies (clean, under PGD attack, certified by the bounds of --modes side by side) and
writes to workdir/certification: report.html (a page of all of it; lipjax/report/page.py),
summary.json, examples.npz and examples.csv (per image), gallery.npz (some images with adversarial
ones near them), curve.png (certified accuracy against epsilon, below the PGD curve), and
certificate.npz, which `python -m lipjax.check` derives once more with other code. With --early each
image is certified by the cheapest bound that can: "certified" then means by the bound named or by a
    looser one of --modes, and certificate_<bound>.npz has the other bounds' certificates.
"""

import dataclasses
import os
import platform
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags, logging

import lipjax
from lipjax import report
from lipjax.cli import common, networks
from lipjax.data import sets
from lipjax.runtime import hosts
from lipjax.training import metrics
from lipjax.training.checkpoints import CheckpointError

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of a run of train.py, or, with --network, for the results; default runs/digits, or "
    "runs/<network>.",
)
_NETWORK = flags.DEFINE_string(
    "network",
    None,
    "Instead of a run: a .safetensors file of lipjax.save, or the name of a network that comes "
    "with lipjax.",
)
_DATA = flags.DEFINE_string(
    "data", None, "With --network: the data set, as --config.data.name takes it."
)
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "With --network: of sets of encoded images, as data.image_size."
)
_EPSILON = flags.DEFINE_float(
    "epsilon", None, "l2 radius on pixels in [0, 1]; the configuration's epsilon.test if unset."
)
_TIER = flags.DEFINE_enum("tier", "probabilistic", lipjax.certificates.TIERS, "Kind of proof.")
_DELTA = flags.DEFINE_float(
    "failure_probability", 1e-6, "Of all certificates of this run together, in tier probabilistic."
)
_MODES = flags.DEFINE_list(
    "modes",
    ["global", "paper", "local"],
    "Bounds to certify with, side by side, some of global, bcp, paper, local, linear, rows, from "
    "the loosest to the "
    "tightest; the last one also makes the curve and the certificate file. linear and rows pay on "
    "networks that were not "
    "trained with local; rows costs a reverse pass for each neuron.",
)
_ARITHMETIC = flags.DEFINE_enum(
    "arithmetic",
    None,
    list(lipjax.rounding.ARITHMETICS),
    "How the network will be executed; its rounding is taken off the margins. Unset: as this "
    "machine executes it.",
)
_BUDGET = flags.DEFINE_float(
    "budget",
    lipjax.norms.best.BUDGET,
    "Tier deterministic: floating-point operations per norm and image, above which a masked "
    "convolution's norm is its "
    "global one.",
)
_EXAMPLES = flags.DEFINE_integer(
    "examples",
    None,
    "Certify so many test images, a fixed random choice; default all.",
    lower_bound=1,
)
_SEED = flags.DEFINE_integer(
    "seed",
    None,
    "Of the certificates' draws and the attack's starts; unset: from the operating system. One "
    "that is given makes the run "
    "repeatable, and its certificates assume that network and images were chosen independently of "
    "it.",
    lower_bound=0,
    upper_bound=2**63 - 1,
)
_BATCH = flags.DEFINE_integer("batch_size", 64, "Images at once; no influence on the result.")
_STEPS = flags.DEFINE_integer("pgd_steps", 100, "Steps of each attack, each of epsilon / 4.")
_RESTARTS = flags.DEFINE_integer("pgd_restarts", 5, "Random starts of each attack at epsilon.")
_CURVE = flags.DEFINE_bool(
    "curve", True, "Certified radii and the curve; without it only the verdicts at epsilon."
)
_EARLY = flags.DEFINE_bool(
    "early",
    False,
    "Attack first; each bound of --modes decides only what is predicted right, stands the attack "
    "and was not certified by the "
    "bound before it (global is nearly free). Less time, no figures of the others.",
)
_HOSTS = flags.DEFINE_string(
    "hosts",
    os.environ.get("LIPJAX_HOSTS", ""),
    f"For several processes as one: {hosts.EXAMPLE}; or LIPJAX_HOSTS.",
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where TFDS keeps its sets, if not where training found them."
)

# The curve's PGD points are for orientation: one restart, where at epsilon itself there are more.
CURVE_RESTARTS = 1
CURVE_POINTS = 6
# Of the attack that looks for the nearest adversarial image of the few in the report's gallery.
GALLERY_STEPS, GALLERY_RESTARTS = 200, 4


def main(_):
    hosts.join(_HOSTS.value)
    lipjax.runtime.cpu.keep_compiled()
    logging.set_verbosity(logging.ERROR)
    started = time.monotonic()

    # ------------------------------------------------------------------ run, data, network
    subject = opened()
    network, test = subject.network, subject.test
    workdir = _WORKDIR.value or f"runs/{Path(_NETWORK.value).stem if _NETWORK.value else 'digits'}"
    epsilon = subject.epsilon if _EPSILON.value is None else _EPSILON.value
    if epsilon is None:
        raise ValueError(
            "--network needs --epsilon, the l2 radius on pixels in [0, 1]: a file says nothing of "
            "it."
        )
    lipjax.bounds.check_epsilon(epsilon)
    diameter = float(np.sqrt(np.prod(test.images.shape[1:])))
    if epsilon >= diameter:
        raise ValueError(
            f"epsilon {epsilon:g} is a radius on pixels in [0, 1], where no two images of "
            f"{tuple(test.images.shape[1:])} are "
            f"further apart than {diameter:g}: divide one that is meant for pixels in [0, 255] by "
            "255."
        )
    if not 0 < _DELTA.value < 1:
        raise ValueError(f"failure_probability must lie in (0, 1), got {_DELTA.value}.")
    modes = [mode for mode in lipjax.bounds.MODES if mode in _MODES.value]
    if not modes or len(modes) < len(_MODES.value):
        raise ValueError(
            f"modes must be some of {', '.join(lipjax.bounds.MODES)}, got "
            f"{', '.join(_MODES.value)}."
        )
    images, labels = test.unit_images(slice(None)), test.labels
    say(
        f"{subject.facts['network']}: epoch {subject.facts['epoch']}; {len(labels)} test images of "
        f"{test.name}"
    )

    # ------------------------------------------------------------------ certificates at epsilon,
    # attack
    # One statement for the whole run: each call below gets an equal share of the failure
    # probability.
    share = _DELTA.value / (len(modes) + (1 if _CURVE.value else 0))
    arguments = {
        "tier": _TIER.value,
        "failure_probability": share,
        "arithmetic": _ARITHMETIC.value,
        "budget": _BUDGET.value,
        "batch_size": _BATCH.value,
    }
    # One seed for all processes: the draws behind the global norms are shared.
    drawn = _SEED.value is None
    seed = lipjax.certificates.drawn_seed() if drawn else _SEED.value
    seed = int(hosts.gather(np.asarray(seed, np.int64))[0])
    # Each process takes its share of the images, one after the other in turn.
    mine = np.arange(len(labels)) % jax.process_count() == jax.process_index()
    say(f"attacking, PGD with {_STEPS.value} steps and {_RESTARTS.value} restarts ...")
    key = jax.random.fold_in(jax.random.key(seed), jax.process_index())
    broken = attacked(network, images, labels, epsilon, mine, restarts=_RESTARTS.value, key=key)
    left = ~broken if _EARLY.value else np.ones(len(labels), bool)
    certificates, certified, examined = {}, {}, {}
    for i, mode in enumerate(modes):
        say(f"certifying {np.sum(left)} images, {mode} bound ...")
        # Independent draws for each call, as the union bound over them needs fresh ones.
        certificate = lipjax.certify(
            network,
            images,
            labels,
            epsilon,
            mode=mode,
            seed=draw_seed(seed, i),
            examine=left & mine,
            **arguments,
        )
        if drawn:
            certificate = dataclasses.replace(certificate, seed_from="system")
        certificates[mode], examined[mode] = together(certificate), left
        certified[mode] = certificates[mode].certified
        if _EARLY.value:
            certified[mode] = certified[mode] | (certified[modes[i - 1]] if i else False)
            left = left & ~certified[mode]
    for mode, certificate in certificates.items():
        refuse_contradictions(mode, test.indices[certificate.certified & broken])
    tightest = certificates[modes[-1]]

    # ------------------------------------------------------------------ radii and curve
    run = {
        "tier": _TIER.value,
        "failure_probability": _DELTA.value if _TIER.value == "probabilistic" else 0.0,
        "arithmetic": tightest.arithmetic,
        "epsilon": epsilon,
        "data": test.name,
        "split": "test",
        "examples": len(labels),
        "early": _EARLY.value,
        "data_fingerprint": sets.fingerprint(test),
        "note": test.note,
        "seed": seed,
        "seed_from": "system" if drawn else "given",
        **subject.facts,
        "precision": tightest.precision,
        "pgd_steps": _STEPS.value,
        "pgd_restarts": _RESTARTS.value,
        "curve_mode": modes[-1],
        "gallery_steps": GALLERY_STEPS,
        "gallery_restarts": GALLERY_RESTARTS,
        "versions": {
            **lipjax.formats.certificate_files.versions(),
            "python": platform.python_version(),
        },
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "command": common.line("certify", sys.argv[1:]),
    }
    columns = {
        "index": test.indices,
        "label": labels,
        "predicted": tightest.predicted,
        "broken_by_pgd": broken,
        **{f"certified_{mode}": verdicts for mode, verdicts in certified.items()},
        **{f"margin_{mode}": c.margin for mode, c in certificates.items()},
        **{f"lipschitz_{mode}": c.lipschitz for mode, c in certificates.items()},
    }
    if _CURVE.value:
        say("certified radii for the curve ...")
        found = lipjax.certified_radius(
            network,
            images,
            labels,
            mode=modes[-1],
            seed=draw_seed(seed, len(modes)),
            max_radius=8 * max(epsilon, 0.01),
            examine=mine,
            **arguments,
        )
        radii = together(found).radius
        # All are certificates of the same statement, so the largest radius holds.
        radii = np.where(certified[modes[-1]], np.maximum(radii, epsilon), radii)
        columns["certified_radius"] = radii
        top = max(1.6 * epsilon, float(np.quantile(radii, 0.98)), 1e-3)
        pgd_curve = {0.0: float(np.mean(tightest.correct))}
        standing = tightest.correct.copy()
        points = {float(f"{point:.3g}") for point in np.linspace(0, top, CURVE_POINTS)}
        for point in sorted((points | {epsilon}) - {0.0}):
            if point >= epsilon:
                standing &= ~broken
            if point != epsilon:  # what broke within a smaller radius is broken
                more = attacked(
                    network,
                    images,
                    labels,
                    point,
                    standing & mine,
                    restarts=CURVE_RESTARTS,
                    key=key,
                )
                standing &= ~more
            pgd_curve[point] = float(np.mean(standing))

    # ------------------------------------------------------------------ what is written
    if not hosts.is_writer():
        return
    say("adversarial images for the report ...")
    chosen = report.select(columns, modes[-1], modes)
    steps = {"steps": GALLERY_STEPS, "restarts": GALLERY_RESTARTS}
    gallery = report.gallery(network, images, labels, chosen, seed=seed, **steps)
    proved = report.proved_radii(columns, run)[gallery["row"]]
    nearer = (proved > 0) & (gallery["distance"] <= proved)
    refuse_contradictions(f"{modes[-1]} (certified radius)", test.indices[gallery["row"][nearer]])
    folder = Path(workdir) / "certification"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / report.NAME).unlink(missing_ok=True)  # no page of other files, whatever happens now
    if _CURVE.value:
        at_epsilon = {mode: float(np.mean(verdicts)) for mode, verdicts in certified.items()}
        metrics.plot_curve(folder / "curve.png", run, radii, pgd_curve, at_epsilon)
    # Early, the verdicts are those of all bounds together, each in a file of its own.
    files = {modes[-1]: "certificate.npz"}
    if _EARLY.value:
        files = {mode: f"certificate_{mode}.npz" for mode in modes[:-1]} | files
    for mode, name in files.items():
        lipjax.formats.certificate_files.save(
            folder / name,
            certificates[mode],
            network,
            images,
            labels,
            indices=test.indices,
            data={"name": test.name, "split": "test"},
            command=run["command"],
        )
    shown = {mode: rows if np.any(rows) else ~rows for mode, rows in examined.items()}
    source = (
        [f"--network={_NETWORK.value}", f"--data={_DATA.value}"]
        if _NETWORK.value
        else [f"--workdir={workdir}"]
    )
    more = {"data_dir": _DATA_DIR.value, "image_size": _IMAGE_SIZE.value}
    source += [f"--{name}={value}" for name, value in more.items() if value is not None]
    command = Path(workdir) / "command.txt"
    summary = {
        "run": {**run, "seconds": round(time.monotonic() - started, 1)},
        "clean_accuracy": float(np.mean(tightest.correct)),
        "pgd_accuracy": float(np.mean(~broken)),
        "modes": {
            mode: {
                "certified_accuracy": float(np.mean(certified[mode])),
                "examined": int(np.sum(examined[mode])),
                "median_lipschitz": float(np.median(c.lipschitz[shown[mode]])),
                "constant_share": np.mean(c.constant[shown[mode]], axis=0).tolist(),
                "stable_share": np.mean(c.stable[shown[mode]], axis=0).tolist(),
            }
            for mode, c in certificates.items()
        },
        "pgd_curve": sorted(pgd_curve.items()) if _CURVE.value else None,
        "classes": test.classes,
        "activations": report.activation_layers(network, images.shape[1:]),
        "config": subject.config,
        "commands": {
            "train": command.read_text().strip()
            if command.exists() and not _NETWORK.value
            else None,
            "certify": run["command"],
            "check": [report.check_command(folder / name, *source) for name in files.values()],
        },
        "files": {name: metrics.hashes(folder / name) for name in files.values()},
    }
    metrics.write_summary(folder / "summary.json", summary)
    metrics.write_examples(folder, run, columns)
    metrics.write_arrays(folder / "gallery.npz", run, gallery)
    page = report.build(folder)
    metrics.print_table(summary)
    curve = ["curve.png"] if _CURVE.value else []
    written = [
        page.name,
        *files.values(),
        "summary.json",
        "examples.csv",
        "examples.npz",
        "gallery.npz",
        *curve,
    ]
    print("written: " + ", ".join(str(folder / name) for name in written))


def opened() -> networks.Subject:
    """What the flags say is certified."""
    if _NETWORK.value is None:
        if _DATA.value is not None or _IMAGE_SIZE.value is not None:
            raise ValueError(
                "--data and --image_size belong to --network: a run has its own data set."
            )
        workdir = _WORKDIR.value or "runs/digits"
        return networks.of_run(workdir, examples=_EXAMPLES.value, data_dir=_DATA_DIR.value)
    if _DATA.value is None:
        raise ValueError(
            "--network needs --data, the data set to certify it on: `lipjax data list` lists the "
            "names."
        )
    return networks.of_network(
        _NETWORK.value,
        _DATA.value,
        examples=_EXAMPLES.value,
        data_dir=_DATA_DIR.value,
        image_size=_IMAGE_SIZE.value,
    )


def refuse_contradictions(bound: str, indices: np.ndarray) -> None:
    """Ends the program if there are test images that a certificate speaks of and that an attack
    broke nevertheless."""
    if len(indices):
        raise SystemExit(
            f"certify.py: the {bound} bound certified test images {indices.tolist()} and the "
            "attack broke them: do not trust "
            "this run, and please report it."
        )


def attacked(network, images, labels, epsilon, rows, *, restarts, key) -> np.ndarray:
    """Which of all images PGD breaks; each process attacks its `rows`, boolean, and learns of the
    others."""
    broken = np.zeros(len(labels), bool)
    if np.any(rows):
        attack = lipjax.attacks.pgd(
            network,
            images[rows],
            labels[rows],
            epsilon,
            steps=_STEPS.value,
            restarts=restarts,
            key=key,
        )
        broken[rows] = attack.broken
    return np.any(hosts.gather(broken), axis=0)


def together(found):
    """Certificates, each image's from the process that examined it."""
    if jax.process_count() == 1:
        return found
    owner = np.arange(len(found.predicted)) % jax.process_count()
    arrays = {name: value for name, value in vars(found).items() if isinstance(value, np.ndarray)}
    gathered = {
        name: hosts.gather(value)[owner, np.arange(len(owner))] for name, value in arrays.items()
    }
    return dataclasses.replace(found, **gathered)


def draw_seed(seed: int, call: int) -> int:
    """A seed of its own for each of this run's calls, of as many bits as `certify` takes."""
    return int(np.random.SeedSequence([seed, call]).generate_state(1, np.uint64)[0] >> 1)


def say(message: str) -> None:
    if hosts.is_writer():
        print(message, file=sys.stderr, flush=True)


# These say what is wrong and what to do.
ERRORS = (sets.DataError, CheckpointError, ValueError, TypeError)
