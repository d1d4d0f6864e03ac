"""Attacks certificates, just inside what they certify, and reports whether anything broke. Nothing
may.

    python -m benchmarks.hunt [--nets=random_relu,digits_maxmin,...] [--workdirs=runs/a,runs/b]
                              [--examples=32] [--tiers=probabilistic,deterministic]
                              [--mode=local] [--seed=0] [--json] [--quick]

Random networks, networks trained on scikit-learn's digits here and now, and runs of train.py. Radii
are certified at each tier, and the certified images attacked on the whole ball (pixels may leave
[0, 1]), at `SHARE` of each radius:

- *sampling*: random points on the sphere, the worst of them;
- *pgd*, *targeted*: the second on every rival class (`benchmarks.attacks`);
- *boundary*, *smallest*: the nearest adversarial image that they find must not lie within the
  certified radius;
- *precise*: every image that these found, evaluated once more as the real-number function of the
  network, in NumPy's longdouble, through matrices that are written down from the layers'
  description and not by the library;
- *norms*: certified norms against the SVD of the explicitly masked matrices (layers with a side of
  at most `SVD_LIMIT`), at each image's radius; for mode "rows" of what random points of the ball
  reach.

Each column counts the images whose certificate was broken. One Markdown row per network and tier;
epsilon is each image's certified radius, of which the row says the median; *certified / found*
compares it with the smallest perturbation that *boundary* and *smallest* have found: 1 would be a
certificate that touches what is broken. delta is the failure probability of each row by itself.

A second table shows that the opposition bites: the same attacks on certifiers that are unsound
(`benchmarks.unsound`) must find violations. Exit status 1 if a certificate was broken, or an
unsound one was not.

All of it takes about ten minutes on two cores, most of it compilation; --quick half a minute.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

import lipjax
from benchmarks import attacks as more_attacks
from benchmarks import unsound
from lipjax import attacks, training
from lipjax.check import layers as check_layers
from lipjax.configs import digits
from lipjax.formats.certificate_files import describe
from lipjax.training import feeding
from lipjax.training.checkpoints import Checkpoints, load_config

ACTIVATIONS = ("relu", "clipped_relu", "maxmin", "clipped_maxmin")
SHARE = 0.9999
SVD_LIMIT = 1100
MASK_SAMPLES = 400
OPPONENTS = ("sampling", "pgd", "targeted", "boundary", "smallest")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network and the images on which its certificates are attacked.

    Attributes:
        labels: the true classes, or what the network predicts where there are none.
        split: what the images are.
    """

    name: str
    activation: str
    network: nnx.Sequential
    images: np.ndarray
    labels: np.ndarray
    split: str


@dataclasses.dataclass(frozen=True)
class Effort:
    """How hard the opposition tries; numbers per image."""

    samples: int = 1000
    pgd_restarts: int = 6
    steps: int = 100
    walk: int = 1500
    searches: int = 12
    svd_images: int = 4
    traps_at_tiers: bool = True


QUICK = Effort(100, 2, 40, 200, 4, 2, traps_at_tiers=False)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = parse(arguments)
    device = jax.devices()[0].device_kind
    if not options.json:
        print(
            f"{device}, JAX {jax.__version__}, seed {options.seed}, radii attacked at {SHARE} of "
            "their size\n"
        )
    broken = False
    for table, fields in ((sound_rows, SOUND_FIELDS), (unsound_rows, UNSOUND_FIELDS)):
        if not options.json:
            print("| " + " | ".join(fields) + " |\n|" + "---|" * len(fields), flush=True)
        for row in table(options):
            broken |= row["alarm"]
            if options.json:
                print(json.dumps({**row, "seed": options.seed, "device": device}), flush=True)
            else:
                print(
                    "| " + " | ".join(show(row[field]) for field in fields.values()) + " |",
                    flush=True,
                )
        if not options.json:
            print()
    if not options.json:
        print(
            "BROKEN: see the rows above"
            if broken
            else "no certificate was broken; every unsound certifier was"
        )
    return int(broken)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command, checked."""
    known = list(SUBJECTS)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hunt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nets", help=f"of {', '.join(known)}; default all, none with --workdirs")
    parser.add_argument("--workdirs", default="", help="runs of train.py, separated by commas")
    parser.add_argument(
        "--data_dir", help="where TFDS keeps its sets, if not where training found them"
    )
    parser.add_argument("--examples", type=int, help="images per network; default 32")
    parser.add_argument("--tiers", default=",".join(lipjax.certificates.TIERS))
    parser.add_argument(
        "--mode", default="local", choices=lipjax.bounds.MODES, help="bound of the certificates"
    )
    parser.add_argument(
        "--failure_probability",
        type=float,
        default=1e-6,
        help="of each row of a probabilistic tier",
    )
    parser.add_argument(
        "--batch_size", type=int, default=16, help="of certification; no influence on the result"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of networks, images, draws and attacks"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per row instead of the tables"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two random networks of a few hundred weights, little effort",
    )
    options = parser.parse_args(arguments)
    options.effort = QUICK if options.quick else Effort()
    if options.examples is None:
        options.examples = 8 if options.quick else 32
    options.workdirs = [name for name in options.workdirs.split(",") if name]
    default = (
        []
        if options.workdirs
        else ["quick_0", "quick_1"]
        if options.quick
        else [n for n in known if "quick" not in n]
    )
    options.nets = (
        default if options.nets is None else [name for name in options.nets.split(",") if name]
    )
    options.tiers = options.tiers.split(",")
    for chosen, allowed in ((options.nets, known), (options.tiers, lipjax.certificates.TIERS)):
        if strange := set(chosen) - set(allowed):
            parser.error(f"unknown {', '.join(sorted(strange))}; there are {', '.join(allowed)}.")
    if options.examples < 1:
        parser.error(f"--examples must be at least 1, got {options.examples}.")
    return options


def show(value) -> str:
    """A field of a table."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {show(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


# ------------------------------------------------------------------------------------- certificates

SOUND_FIELDS = {
    "net": "net",
    "activation": "activation",
    "split": "split",
    "bound": "mode",
    "tier": "tier",
    "delta": "failure_probability",
    "seed": "seed",
    "tried": "tried",
    "certified": "certified",
    "median epsilon": "median_epsilon",
    **{name: name for name in (*OPPONENTS, "precise", "norms")},
    "norms compared": "norms_compared",
    "certified / found, median": "median_ratio",
    "largest": "largest_ratio",
    "s": "seconds",
}


def sound_rows(options: argparse.Namespace) -> Iterator[dict]:
    """One row per network and tier: how often each opponent broke a certificate. Alarm: at all."""
    for subject in subjects(options):
        started = time.monotonic()
        effort, key = options.effort, jax.random.key(options.seed)
        target = (subject.network, subject.images, subject.labels)
        precise = PreciseNetwork(subject.network, subject.images.shape[1:])
        # What is nearest does not depend on any certificate.
        nearest = distances(*target, effort, key)
        for tier in options.tiers:
            certify = {
                "tier": tier,
                "mode": options.mode,
                "seed": options.seed,
                "batch_size": options.batch_size,
            }
            found = lipjax.certified_radius(
                *target, failure_probability=options.failure_probability, **certify
            )
            rows = np.flatnonzero(found.radius > 0)
            row = {
                "net": subject.name,
                "activation": subject.activation,
                "split": subject.split,
                "mode": options.mode,
                "tier": tier,
                "failure_probability": found.failure_probability,
                "seed": options.seed,
                "arithmetic": found.arithmetic,
                "tried": len(subject.images),
                "certified": len(rows),
            }
            if len(rows):
                part = tuple(
                    column[rows] for column in (subject.images, subject.labels, found.radius)
                )
                near = {
                    name: attacks.Nearest(*(column[rows] for column in result))
                    for name, result in nearest.items()
                }
                row["median_epsilon"] = float(np.median(part[2]))
                row.update(violations(subject.network, *part, near, effort, key, precise))
                some = rows[: effort.svd_images]
                row.update(
                    norms_below_svd(
                        precise,
                        subject.images[some],
                        found.radius[some],
                        found.norms[some],
                        options.mode == "rows",
                    )
                )
                ratios = part[2] / np.min([result.distance for result in near.values()], axis=0)
                row.update(
                    median_ratio=float(np.median(ratios)), largest_ratio=float(np.max(ratios))
                )
            else:
                row.update(dict.fromkeys((*OPPONENTS, "precise", "norms", "norms_compared"), 0))
                row.update(median_epsilon=None, median_ratio=None, largest_ratio=None)
            row["seconds"] = round(time.monotonic() - started, 1)
            row["alarm"] = any(row[name] > 0 for name in (*OPPONENTS, "precise", "norms"))
            yield row
            started = time.monotonic()
        # Each compiled program takes some of the memory maps that Linux allows a process: a hunt of
        # all nets ran out of them.
        jax.clear_caches()


def distances(network, images, labels, effort: Effort, key) -> dict[str, attacks.Nearest]:
    """The opponents that look for the smallest perturbation."""
    return {
        "boundary": more_attacks.boundary(
            network, images, labels, steps=effort.walk, clip=None, key=key
        ),
        "smallest": attacks.smallest(
            network, images, labels, restarts=effort.searches, clip=None, key=key
        ),
    }


def violations(
    network, images, labels, radii, nearest, effort: Effort, key, precise
) -> dict[str, int]:
    """How many of the claims "no image within its radius is misclassified" each opponent
    refutes."""
    inside = SHARE * radii
    options = {"clip": None, "steps": effort.steps, "key": key}
    found = {
        "sampling": sampling(network, images, labels, inside, effort.samples, key),
        "pgd": attacks.pgd(
            network,
            images,
            labels,
            inside,
            restarts=effort.pgd_restarts,
            schedule="cosine",
            **options,
        ),
        "targeted": more_attacks.targeted(network, images, labels, inside, **options),
    }
    counts, refuted = {}, np.zeros(len(images), bool)
    for name in OPPONENTS:
        result = found[name] if name in found else nearest[name]
        distance = np.linalg.norm(
            (result.adversarial.astype(np.float64) - images).reshape(len(images), -1), axis=1
        )
        lost = result.broken if name in found else np.isfinite(result.distance)
        counts[name] = int(np.sum(lost & (distance <= radii)))
        refuted |= ~(precise.margins(result.adversarial, labels) > 0) & (distance <= radii)
    return {**counts, "precise": int(np.sum(refuted))}


def sampling(network, images, labels, radii, count: int, key) -> attacks.Attack:
    """The worst of `count` random points on each sphere."""
    x, y = jnp.asarray(images), jnp.asarray(labels)
    worst, margin, clean, predicted = _sampled(
        network, x, y, jnp.asarray(radii, jnp.float32), count, key
    )
    return attacks.Attack(
        np.asarray(worst), ~(np.minimum(margin, clean) > 0), np.asarray(predicted)
    )


@jax.jit
def _sampled(network, x, y, radii, count, key):
    def margins(x):
        logits = jax.vmap(network)(x)
        rivals = jnp.where(jnp.arange(logits.shape[1]) == y[:, None], -jnp.inf, logits)
        own = jnp.take_along_axis(logits, y[:, None], axis=1)
        margin = jnp.min(own - rivals, axis=1)  # NaN if any is
        return jnp.where(jnp.isnan(margin), -jnp.inf, margin), jnp.argmax(logits, axis=1)

    def draw(i, carry):
        worst, least = carry
        noise = jax.random.normal(jax.random.fold_in(key, i), x.shape)
        size = jnp.sqrt(jnp.sum(jnp.square(noise), axis=tuple(range(1, x.ndim)), keepdims=True))
        candidate = x + radii.reshape(size.shape) * noise / size
        margin, _ = margins(candidate)
        better = margin < least
        return jnp.where(better.reshape(size.shape), candidate, worst), jnp.where(
            better, margin, least
        )

    clean, predicted = margins(x)
    worst, least = jax.lax.fori_loop(0, count, draw, (x, jnp.full_like(clean, jnp.inf)))
    return worst, least, clean, predicted


# --------------------------------------------------------------------------------- a second opinion


class PreciseNetwork:
    """The network as a function of real numbers, in longdouble, by matrices that the library did
    not write down."""

    def __init__(self, network: nnx.Sequential, shape: tuple[int, ...]):
        self.nodes = check_layers.nodes_of(
            describe(network, jax.ShapeDtypeStruct(shape, np.float32)), shape
        )
        self.steps = [node.step for node in self.nodes]
        self.adds = any(isinstance(step, check_layers.Add) for step in self.steps)

    def margins(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The label's logit minus the largest of the others; ``(N,)``."""
        values = [images.reshape(len(images), -1).astype(np.longdouble)]
        for node in self.nodes:
            x = values[node.inputs[-1]]
            if isinstance(node.step, check_layers.Affine):
                x = (node.step.matrix.astype(np.longdouble) @ x.T).T + node.step.bias
            elif isinstance(node.step, check_layers.Add):
                signed = zip(node.step.signs, node.inputs, strict=True)
                x = sum(sign * values[i] for sign, i in signed)
                x = x if node.step.constant is None else x + node.step.constant
            elif isinstance(node.step, check_layers.Move):
                taken = zip(*(values[i] for i in node.inputs), strict=True)
                x = np.stack([node.step(*rows) for rows in taken])
            else:
                x = np.stack([node.step(row) for row in x])
            values.append(x)
        rivals = np.where(np.arange(x.shape[1]) == labels[:, None], -np.inf, x)
        return x[np.arange(len(x)), labels] - rivals.max(axis=1)

    def masked_norms(
        self, image: np.ndarray, epsilon: float, sampled: bool = False
    ) -> list[float | None]:
        """Norms of the affine layers but the last, masked as METHOD 1 says for mode "local", by
        SVD; None if too large, or all None where the network adds anything up.

        Boxes and radii by these norms, so they are at most those of any certificate, and so are the
        masks. `sampled`: boxes of what `MASK_SAMPLES` random points of the sphere reach instead,
        for modes whose boxes are narrower.
        """
        if self.adds:
            return [None] * (sum(isinstance(step, check_layers.Affine) for step in self.steps) - 1)
        if sampled:
            return self._sampled_norms(image, epsilon)
        center = image.astype(np.float64).reshape(-1)
        low, high, radius, norms = center - epsilon, center + epsilon, epsilon, []
        for step, following in zip(self.steps[:-1], self.steps[1:], strict=True):
            if isinstance(step, check_layers.Affine):
                varies = high > low
                middle = step.matrix @ ((low + high) / 2) + step.bias
                half = step.absolute @ ((high - low) / 2)
                reach = radius * np.sqrt(step.squared @ varies.astype(np.float64))
                center = step.matrix @ center + step.bias
                low = np.minimum(np.maximum(middle - half, center - reach), center)
                high = np.maximum(np.minimum(middle + half, center + reach), center)
                rows = _live_rows(following, low, high)
                if max(step.matrix.shape) > SVD_LIMIT:
                    return norms + [None] * (
                        sum(isinstance(s, check_layers.Affine) for s in self.steps) - 1 - len(norms)
                    )
                block = step.matrix[rows][:, varies].toarray()
                norms.append(float(np.linalg.norm(block, 2)) if block.size else 0.0)
                radius *= norms[-1]
            else:
                center, low, high = step(center), step(low), step(high)
            if not (
                isinstance(step, check_layers.Affine)
                and isinstance(following, check_layers.Activation)
            ):
                radius = min(radius, float(np.linalg.norm(np.maximum(high - center, center - low))))
        return norms

    def _sampled_norms(self, image, epsilon):
        center, norms = image.astype(np.float64).reshape(1, -1), []
        steps = np.random.default_rng(0).normal(size=(MASK_SAMPLES, center.size))
        points = center + epsilon * steps / np.linalg.norm(steps, axis=1, keepdims=True)
        points = np.concatenate([center, points])
        for step, following in zip(self.steps[:-1], self.steps[1:], strict=True):
            if isinstance(step, check_layers.Affine):
                varies = np.ptp(points, axis=0) > 0
                points = (step.matrix @ points.T).T + step.bias
                rows = _live_rows(following, points.min(axis=0), points.max(axis=0))
                small = max(step.matrix.shape) <= SVD_LIMIT
                block = step.matrix[rows][:, varies].toarray() if small else np.zeros((0, 0))
                norms.append(
                    (float(np.linalg.norm(block, 2)) if block.size else 0.0) if small else None
                )
            else:
                points = np.stack([step(point) for point in points])
        return norms


def _live_rows(activation, low, high) -> np.ndarray:
    """Inputs of an activation that can move one of its outputs."""
    if isinstance(activation, check_layers.Affine):
        return np.ones(low.shape, bool)
    varies = activation(high) > activation(low)
    if not activation.pairs:
        return varies
    first, second = activation.halves(varies)
    (low_a, low_b), (high_a, high_b) = activation.halves(low), activation.halves(high)
    either = first | second
    a_leads, b_leads = low_a >= high_b, low_b >= high_a
    keep_a = np.where(a_leads, first, np.where(b_leads, second, either))
    keep_b = np.where(b_leads, first, np.where(a_leads, second, either))
    return activation.joined(keep_a, keep_b)


def norms_below_svd(
    precise: PreciseNetwork, images, epsilons, certified: np.ndarray, sampled: bool = False
) -> dict[str, int]:
    """In how many of the images a norm certified at the image's own epsilon is below the one that
    the SVD gives, and how many norms were compared."""
    wrong, compared = 0, 0
    for image, epsilon, norms in zip(images, epsilons, certified, strict=True):
        pairs = [
            (c, n)
            for c, n in zip(norms, precise.masked_norms(image, epsilon, sampled), strict=True)
            if n is not None
        ]
        compared += len(pairs)
        wrong += any(not c >= n * (1 - 1e-10) for c, n in pairs)
    return {"norms": wrong, "norms_compared": compared}


# ------------------------------------------------------------------------------------- unsound ones

UNSOUND_FIELDS = {
    "unsound certifier": "net",
    "epsilon": "epsilon",
    "split": "split",
    "seed": "seed",
    "tried": "tried",
    "claimed": "certified",
    **{name: name for name in (*OPPONENTS, "precise")},
    "certified at sound tiers": "tiers",
    "s": "seconds",
}


def unsound_rows(options: argparse.Namespace) -> Iterator[dict]:
    """One row per unsound certifier: how many of its claims each opponent refuted. Alarm: none, or
    a tier agrees with it."""
    effort, key = options.effort, jax.random.key(options.seed)
    for trap in unsound.traps(options.seed):
        started = time.monotonic()
        target = (trap.network, trap.images, trap.labels)
        claimed = np.flatnonzero(trap.claims(*target, trap.epsilon))
        part = trap.images[claimed], trap.labels[claimed], np.full(len(claimed), trap.epsilon)
        row = dict.fromkeys((*OPPONENTS, "precise"), 0)
        if len(claimed):
            precise = PreciseNetwork(trap.network, trap.images.shape[1:])
            near = distances(trap.network, *part[:2], effort, key)
            row = violations(trap.network, *part, near, effort, key, precise)
        tiers = {}
        for tier in options.tiers if effort.traps_at_tiers else ():
            certificate = lipjax.certify(
                *target,
                trap.epsilon,
                tier=tier,
                failure_probability=options.failure_probability,
                seed=options.seed,
            )
            tiers[tier] = int(np.sum(certificate.certified))
        refuting = (*OPPONENTS, "precise") if trap.of_real_numbers else OPPONENTS
        yield {
            "net": trap.name,
            "epsilon": trap.epsilon,
            "split": "made for it",
            "seed": options.seed,
            "tried": len(trap.images),
            "certified": len(claimed),
            **row,
            "tiers": tiers,
            "seconds": round(time.monotonic() - started, 1),
            "alarm": not any(row[name] for name in refuting) or any(tiers.values()),
        }


# ----------------------------------------------------------------------------------------- networks


def subjects(options: argparse.Namespace) -> Iterator[Subject]:
    """The networks that were asked for, made or trained when their turn comes."""
    for name in options.nets:
        yield SUBJECTS[name](name, options)
    for workdir in options.workdirs:
        yield from_workdir(workdir, options)


def random_subject(activation: str, shape, convolutions, dense, number=0) -> Callable[..., Subject]:
    """A network with random weights and biases on uniform random images."""

    def make(name, options):
        rngs = nnx.Rngs(1000 * number + options.seed)
        bias = jax.nn.initializers.normal(0.3)
        layers: list = []
        size = shape
        for channels, kernel, stride in convolutions:
            layers.append(
                nnx.Conv(
                    size[-1],
                    channels,
                    (kernel, kernel),
                    strides=stride,
                    padding=1,
                    rngs=rngs,
                    bias_init=bias,
                )
            )
            size = jax.eval_shape(layers[-1], jnp.zeros(size)).shape
            layers.append(_activation(activation, size))
        layers.append(lipjax.Flatten())
        features = int(np.prod(size))
        for width in dense:
            layers += [
                nnx.Linear(features, width, rngs=rngs, bias_init=bias),
                _activation(activation, (width,)),
            ]
            features = width
        layers.append(nnx.Linear(features, 4, rngs=rngs, bias_init=bias))
        network = nnx.Sequential(*layers)
        images = np.random.default_rng([options.seed, number]).uniform(
            0, 1, (options.examples, *shape)
        )
        images = images.astype(np.float32)
        labels = np.asarray(jnp.argmax(jax.vmap(network)(jnp.asarray(images)), axis=1))
        return Subject(name, activation, network, images, labels, "random, labels as predicted")

    return make


def _activation(name, shape):
    return {
        "relu": lipjax.ReLU,
        "maxmin": lipjax.MaxMin,
        "clipped_relu": lambda: lipjax.ClippedReLU(shape, threshold=0.3),
        "clipped_maxmin": lambda: lipjax.ClippedMaxMin(shape, upper=0.3, lower=-0.3),
    }[name]()


def trained_on_digits(activation: str) -> Callable[..., Subject]:
    """`small_conv`, trained for a minute as configs/digits.py says, but on fewer channels and for
    fewer epochs."""

    def make(name, options):
        config = digits.get_config()
        config.seed = options.seed
        config.model.activation, config.model.widths, config.model.dense = activation, (8, 16), 32
        config.schedule.epochs, config.schedule.ramp, config.optimizer.decay_start = 24, 12.0, 16.0
        splits = training.load_data(config)
        train, shape = splits.train, splits.train.images.shape[1:]
        network = training.build_network(config, shape, train.classes)
        steps = feeding.steps_per_epoch(config, len(train.labels))
        transform = optax.adam(training.learning_rate(config, steps))
        state = training.initial_state(network, transform, config, len(train.labels), shape)
        # One device: the networks are small, and the hunt itself runs on one.
        mesh = jax.make_mesh(
            (1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1]
        )
        run = training.make_steps(config, transform, steps, train, mesh, state, steps)
        feed = feeding.Feeder(train, config, mesh, steps)
        for epoch in range(config.schedule.epochs):
            state, _ = run(state, *feed(epoch * steps, steps), steps)
        return _on_test_images(name, activation, state.network, splits.test, options)

    return make


def from_workdir(workdir: str, options) -> Subject:
    """The selected parameters of a run of train.py, on its test images."""
    config = ConfigDict(load_config(workdir))
    if options.data_dir is not None:
        config.data.data_dir = options.data_dir
    test = training.load_data(config).test
    with Checkpoints(workdir) as checkpoints:
        network, _ = training.selected_network(
            checkpoints, config, test.images.shape[1:], test.classes
        )
    name = f"{config.model.name} on {config.data.name}"
    return _on_test_images(name, config.model.activation, network, test, options)


def _on_test_images(name, activation, network, test, options) -> Subject:
    count = min(options.examples, len(test.labels))
    rows = np.sort(np.random.default_rng(options.seed).permutation(len(test.labels))[:count])
    return Subject(
        name,
        activation,
        network,
        test.unit_images(rows),
        test.labels[rows].astype(np.int32),
        "test",
    )


SUBJECTS: dict[str, Callable[..., Subject]] = {
    **{
        f"quick_{i}": random_subject("clipped_maxmin", (4, 4, 2), [(4, 3, 2)], [], i)
        for i in range(2)
    },
    **{
        f"random_{a}": random_subject(a, (6, 6, 2), [(4, 3, 1), (6, 4, 2)], [12], 2)
        for a in ACTIVATIONS
    },
    "random_dense": random_subject("relu", (4, 4, 1), [], [24, 24, 16], 3),
    **{f"digits_{a}": trained_on_digits(a) for a in ACTIVATIONS},
}


if __name__ == "__main__":
    sys.exit(main())
