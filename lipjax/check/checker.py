"""Checks a certificate file: derives every verdict once more, in NumPy and SciPy, with none of the
code that made it.

    python -m lipjax.check runs/digits/certification/local.npz --workdir=runs/digits
    python -m lipjax.check FILE --workdir=RUN --images=mine.npz --examples=100

Exit codes: 0 confirmed; 1 rejected: something in the file is wrong or could not be derived again,
and the report says what; 2 could not be checked: a file that cannot be read, a layer or setting
that this checker does not know.

For a network or a function of your own, which is described by the nodes of its graph as it is
traced on an image::

    header, arrays = lipjax.formats.certificate_files.load("mine.npz")
    described = lipjax.check.describe(f, images[0], arithmetic=header["arithmetic"])
    report = lipjax.check.check(described, images, labels, header, arrays, np.random.default_rng())
    print(report)      # report.confirmed, report.problems, report.margin

**What is shared with the tool**: the file's format and hashes (`lipjax.formats.certificate_files`),
in `load_subject` alone what reads a run's parameters and data, and the way from the program to its
description: what `lipjax.graph` reads from the jaxpr, the kernels of linear maps and the equations
that round included; an error there misleads both. (Files of versions 1 and 2 describe an
nnx.Sequential by its layers instead.) Nothing of its bounds: matrices (`lipjax.check.layers`,
`check.nodes`), norms (`check.norms`), masks, margins and the rounding of the executed network
(`check.walk`, `check.slopes`, `check.onesided`) are derived in other words, from METHOD 1 to 5 and
8 (docs/method.md), in float64 with every rounding error turned outwards. Modes "global", "bcp" and
"paper" are at least as loose as "local", so one walk in mode "local" confirms the verdicts of all
four, and carries those of modes "linear", "rows", "tight" and "tight_rows"; the boxes of the last
are derived where those of "tight" do not confirm a row.

**What a confirmation says.** Each verdict "certified" follows for a second time, from the network
and the images of the recorded hashes. Norms of matrices with a side of at most `check_norms.SMALL`
(`check_norms.AFFORDABLE` for a file of tier "deterministic") are proved without chance; larger ones
by a randomised upper bound that fails with probability at most the file's failure probability, or
`LARGEST_DELTA` if that is less, in all (`DETERMINISTIC_FILE_DELTA` if the file has none) over the
checker's own draws: fresh ones, from the operating system unless a seed is given. The first line of
a report says which of the two it was. A rejected verdict is not proved to be false: it could not be
derived.

**What is taken on trust**, because no derivation leads back to it: the tool's own tier, failure
probability, seed and mode, its precision, command and versions, the names of data and split; and
the index, for who hands over images himself (the command finds the images by it). A report shows
these as the file writes them, in quotes and apart from what was verified.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lipjax.check import nodes as check_nodes
from lipjax.check import onesided
from lipjax.check.layers import (
    Add,
    Affine,
    CannotCheck,
    Move,
    Node,
    Nonlinear,
    by_nodes,
    nodes_of,
    of_stored,
)
from lipjax.check.norms import Norms, U
from lipjax.check.walk import ARITHMETICS, Derived, Network, Tight, derive
from lipjax.formats import network_files
from lipjax.formats.certificate_files import (
    ARRAYS,
    BY_NODES,
    CertificateFileError,
    claim,
    data_hash,
    describe,
    digest,
    faults,
    load,
    measured,
    network_hash,
    statement,
)
from lipjax.formats.files import Npz, Unreadable, quoted

# Failure probability of the checker's own draws for a file that claims none.
DETERMINISTIC_FILE_DELTA = 1e-9
# And bounds of it, whatever the file claims.
SMALLEST_DELTA, LARGEST_DELTA = 1e-12, 1e-6
# Relative tolerance where the checker compares a recorded number with one that it knows precisely.
TOLERANCE = 1e-9
# The share of the allowance for the executed network's rounding that two derivations of it may
# differ by. Where the network is executed in float64, the derivations themselves round as it does.
ALLOWANCE_TOLERANCE = 0.02
FLOAT64_ALLOWANCE_TOLERANCE = 0.5
HUGE = 1e30
# The share of what was taken off up to which margins of modes "tight" and "tight_rows" agree: a
# rule chooses slopes by boxes and balls, the checker's are a little smaller, and chosen slopes need
# not be better for that ("tight": 1.2e-3 at most, 1,152 rows of 24 small nets). A verdict is
# confirmed by the derived margin alone.
SLOPES_TOLERANCE = 5e-3
# The rules of slopes by which modes cut the boxes of neurons; None: errors of both signs.
ROWS = {"rows": (None,), "tight_rows": (None, *onesided.RULES)}
# Bytes of an array of an --images file, unpacked.
MOST_IMAGE_BYTES = 2**33

# ----------------------------------------------------------------------------------------- the file


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check` found.

    Attributes:
        problems: each a sentence; empty iff the file is confirmed.
        header: of the file.
        checked: rows of the file that were derived again.
        margin: ``(checked,)``, the re-derived margins.
        certified, derived: of the checked rows, how many the file calls certified and how many were
            derived as such.
        random_norms: norm bounds that rest on the checker's own draws.
        delta: their failure probability, of all together; 0.0 if there are none.
    """

    problems: tuple[str, ...]
    header: Mapping[str, Any]
    checked: np.ndarray
    margin: np.ndarray
    certified: int
    derived: int
    random_norms: int
    delta: float

    @property
    def confirmed(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        header, count = self.header, len(self.checked)
        rows = header.get("examples")
        part = f", as far as {count} of them go" if self.confirmed and count != rows else ""
        lines = [
            f"{self._verdict()}: certificates of {quoted(rows)} images, "
            f"{quoted(header.get('data_name'))}, split "
            f"{quoted(header.get('split'))}{part}"
        ]
        if self.confirmed:
            chance = f", with probability >= 1 - {self.delta!r}" if self.random_norms else ""
            lines += [
                f"verified{chance}: for each of the {self.certified} images marked certified of "
                f"the {count} derived again, {claim(header)}; network {header['network'][:16]}, "
                f"images {header['data'][:16]}",
            ]
        if count:
            lines.append(
                f"derived again: {count} of {rows} verdicts; {self.certified} recorded as "
                f"certified, {self.derived} derived "
                "as certified"
            )
            lines.append(
                f"{self.random_norms} norm bounds are randomised: fail with probability <= "
                f"{self.delta!r} in all, over "
                "the checker's own draws"
                if self.random_norms
                else "no norm bound rests on chance"
            )
        lines.append(
            "taken on trust: "
            + ", ".join(f"{name} {quoted(header.get(key))}" for name, key in TRUSTED.items())
        )
        lines.append(f"the file says: {quoted(header.get('statement'), 4000)}")
        shown = self.problems[:10]
        lines += [f"- {problem}" for problem in shown]
        if len(shown) < len(self.problems):
            lines.append(f"- and {len(self.problems) - len(shown)} more")
        return "\n".join(lines)

    def _verdict(self) -> str:
        if not self.confirmed:
            return "REJECTED"
        if self.random_norms and self.header["tier"] == "deterministic":
            return (
                f"CONFIRMED by randomised norms, with probability >= 1 - {self.delta!r}, NOT "
                "deterministically"
            )
        return "CONFIRMED"


# What no derivation leads back to: how a report calls it, and the header's field.
TRUSTED = {
    **{"tier": "tier", "delta": "failure_probability", "seed": "seed", "seed from": "seed_from"},
    **{"mode": "mode", "data": "data_name"},
    **{"split": "split", "precision": "precision", "command": "command", "versions": "versions"},
}


def check(
    layers: Sequence[Mapping[str, Any]],
    images: np.ndarray,
    labels: np.ndarray,
    header: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    rng: np.random.Generator,
    *,
    examples: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Checks a certificate file's content against the network and the data.

    First what the file says of itself: digest, hashes of network and data, verdicts that follow
    from margins. If that holds, every example is derived again, and these must hold of it: a
    recorded certificate is derived as one; the recorded prediction is right (up to rounding of the
    executed network); a recorded norm is not below the true norm inside the checker's own masks,
    which are at most the tool's; the recorded margin is not above the derived one, nor the recorded
    allowance for rounding below it. Differences are let pass in the recorded margin up to 1e-9 of
    what was taken off it (`SLOPES_TOLERANCE` in the modes "tight"), 2 % of the allowance, and what
    the checker itself does not know of the norms (about 0.1 % each where it uses the randomised
    bound), however large the logits are; where the network is executed in float64, in which two
    derivations differ by as much as the network
    itself, up to three allowances.

    Args:
        layers: the network as `describe` writes it; for a file of version 1 or 2 about an
            nnx.Sequential its layers (`lipjax.check.layers.of_stored`).
        images, labels: ``(N, ...)`` floats in [0, 1] and ``(N,)`` integers, the rows of the file in
            its order.
        header, arrays: as `lipjax.formats.certificate_files.load` returns them.
        rng: of the checker's own draws; it must be independent of the file.
        examples: derive only so many rows, chosen at random.
        progress: called with the rows done and the rows in all.

    Raises:
        CannotCheck: a layer, a setting or an arithmetic that this checker does not know.
        ValueError: `examples` is not between 1 and N.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if (
        images.dtype.kind != "f"
        or images.ndim < 2
        or labels.dtype.kind not in "iu"
        or labels.ndim != 1
    ):
        raise ValueError(
            f"images must be floats (N, ...) and labels integers (N,), got {images.dtype} of shape "
            f"{images.shape} and "
            f"{labels.dtype} of shape {labels.shape}."
        )

    def rejected(problems: list[str]) -> Report:
        return Report(tuple(problems), header, np.zeros(0, int), np.zeros(0), 0, 0, 0, 0.0)

    if problems := faults(header, arrays):
        return rejected(problems)
    count = header["examples"]
    if examples is not None and not 1 <= examples <= count:
        raise ValueError(f"examples must lie in 1..{count}, the rows of the file, got {examples}.")
    if header["arithmetic"] not in ARITHMETICS:
        raise CannotCheck(
            f"arithmetic {header['arithmetic']!r} is not one of {', '.join(ARITHMETICS)}."
        )
    if problems := _contradictions(layers, images, labels, header, arrays):
        return rejected(problems)
    if images.dtype not in (np.float32, np.float64):
        raise CannotCheck(
            f"the images are {images.dtype}: a network would compute in that type. A certificate "
            "is about float32 images, float64 in float64 arithmetic: give images.astype('float32')."
        )
    chosen = (
        np.arange(count)
        if examples is None
        else np.sort(rng.choice(count, examples, replace=False))
    )
    nodes = nodes_of(layers, images.shape[1:])
    affine = [node.step for node in nodes if isinstance(node.step, Affine)]
    if by_nodes(layers):
        order = list(ARITHMETICS)
        check_nodes.check_arithmetic(layers, header["arithmetic"], images, order, ALGORITHMS)
    else:
        _check_precision(layers, header["arithmetic"])
    if problems := _misfits(header, arrays, nodes, affine):
        return rejected(problems)
    delta = header["failure_probability"] or DETERMINISTIC_FILE_DELTA
    delta = min(max(delta, SMALLEST_DELTA), LARGEST_DELTA)
    network = Network(nodes, [], header["arithmetic"])
    bounded = len(affine) + len(network.meeting) + len(network.chained)
    linear, rows = header["mode"] in ("linear", "rows"), ROWS.get(header["mode"], ())
    kept = _slopes_by_row(header, arrays) if header["mode"].startswith("tight") else None
    # Walks of a row, the cheaper first: most of a file of mode "auto" needs no smaller boxes.
    walks = ((), rows) if rows and kept is not None else (rows,)
    share = delta / (bounded * (len(walks) * len(chosen) + 1))
    norms = Norms(share, rng, patient=header["tier"] == "deterministic")
    network.whole.extend(norms(layer.matrix) for layer in affine)
    margins = np.full(len(chosen), -math.inf)
    for i, row in enumerate(chosen):
        tight = None
        if kept is not None:
            tight = Tight(float(arrays["margin"][row]), kept.get(int(row), {}))
        epsilon = float(arrays["epsilon"][row])
        label = int(labels[row])
        recorded = {name: arrays[name][row] for name in ARRAYS}
        for rules in walks:
            derived = derive(
                network, images[row], label, epsilon, norms, linear=linear, rows=rules, tight=tight
            )
            different = _differences(derived, network, header, recorded)
            if not different:
                break
        margins[i] = derived.margin
        problems += [
            f"image {arrays['index'][row]} (row {row}): {problem}" for problem in different
        ]
        if progress is not None:
            progress(i + 1, len(chosen))
    return Report(
        tuple(problems),
        header,
        chosen,
        margins,
        int(np.sum(arrays["certified"][chosen])),
        int(np.sum((margins > 0) & arrays["correct"][chosen])),
        norms.random,
        delta if norms.random else 0.0,
    )


def _slopes_by_row(header, arrays) -> dict[int, dict[int, np.ndarray]]:
    """The slopes that a file holds, by row and rival."""
    found: dict[int, dict[int, np.ndarray]] = {}
    if header.get("slopes"):
        for (row, rival), slopes in zip(arrays["slopes_of"], arrays["slopes"], strict=True):
            found.setdefault(int(row), {})[int(rival)] = slopes
    return found


def _contradictions(layers, images, labels, header, arrays) -> list[str]:
    """What is wrong with the file before anything is derived."""
    problems = []
    if header["digest"] != digest(header, arrays):
        problems.append(
            "the digest does not fit the content: the file was changed after it was written."
        )
    found = network_hash(layers)
    if header["network"] != found:
        problems.append(
            f"the file is about the network {header['network'][:16]}, this one is {found[:16]}."
        )
    if len(images) != header["examples"] or header["data"] != data_hash(images, labels):
        problems.append(
            f"the file is about the data {header['data'][:16]}, these are "
            f"{data_hash(images, labels)[:16]}."
        )
    try:
        claimed = statement(header)
    except ValueError as error:
        problems.append(str(error))
    else:
        if header["statement"] != claimed:
            problems.append(
                "the statement does not follow from the header: it should read "
                f"{quoted(claimed, 4000)}."
            )
    if measured(layers) and not header.get("backend"):
        problems.append(
            "the network has smooth functions, whose rounding was measured on a CPU, by XLA: the "
            "file has to say that its claim is about that."
        )
    if not np.all((images >= 0) & (images <= 1)):
        problems.append(
            "images have pixels outside [0, 1], or NaN: the statement is about pixels in [0, 1]."
        )
    epsilon, margin, certified = arrays["epsilon"], arrays["margin"], arrays["certified"]
    if np.any(wrong := ~((epsilon >= 0) & np.isfinite(epsilon))):
        problems.append(f"epsilon is negative, infinite or NaN in rows {_rows(wrong)}.")
    if header["epsilon"] is not None and not np.all(epsilon == header["epsilon"]):
        problems.append(
            f"the header says epsilon {header['epsilon']!r}, the examples say otherwise."
        )
    if len(labels) == len(arrays["label"]) and np.any(wrong := arrays["label"] != labels):
        problems.append(f"the labels differ from the data's in rows {_rows(wrong)}.")
    if np.any(wrong := arrays["correct"] != (arrays["predicted"] == arrays["label"])):
        problems.append(f"correct is not predicted == label in rows {_rows(wrong)}.")
    with np.errstate(all="ignore"):
        numbers = np.column_stack(
            [margin, arrays["allowance"], arrays["lipschitz"], arrays["norms"]]
        )
        follows = arrays["correct"] & (margin > 0)
        if np.any(wrong := certified & ~(follows & np.all(np.isfinite(numbers), axis=1))):
            problems.append(
                f"certified without correct, margin > 0 and finite numbers in rows {_rows(wrong)}."
            )
        # The tool refuses what comes near to overflow anywhere in its walk, whatever the margin.
        if np.any(wrong := ~certified & follows & np.all(np.abs(numbers) < HUGE, axis=1)):
            problems.append(
                f"not certified, although correct and margin > 0, in rows {_rows(wrong)}."
            )
    return problems


def _rows(wrong: np.ndarray) -> str:
    rows = np.flatnonzero(wrong)
    return ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")


# Algorithms that a layer's products can be fixed to, by the arithmetic that covers them.
ALGORITHMS = {
    "F64_F64_F64": "float64",
    "F32_F32_F32": "float32",
    "TF32_TF32_F32": "tf32",
    "BF16_BF16_F32": "bfloat16_products",
}


def _check_precision(layers, arithmetic: str) -> None:
    """Refuses a layer that rounds more than the recorded arithmetic says.

    Images are float32, in float64 arithmetic float64, so a narrower type can only come from a
    layer's dtype or parameters; all layers are taken to compute in the recorded arithmetic, also
    those without either, which compute in the type of what is in front of them.
    """
    order = list(ARITHMETICS)
    for i, layer in enumerate(layers):
        where = f"layer {i}, {layer['kind']},"
        used = {
            layer.get("dtype"),
            *(layer[name].dtype.name for name in ("kernel", "bias") if layer.get(name) is not None),
        }
        coarser = "bfloat16" in used and arithmetic != "bfloat16"
        if coarser or (layer.get("dtype") == "float32" and arithmetic == "float64"):
            raise CannotCheck(
                f"{where} computes in {'bfloat16' if coarser else 'float32'}, which rounds more "
                f"than the recorded arithmetic, {arithmetic}."
            )
        algorithm = layer.get("precision")
        covered = order[: order.index(arithmetic) + 1]
        if algorithm is not None and ALGORITHMS.get(algorithm) not in covered:
            raise CannotCheck(
                f"{where} computes its products by {algorithm}, whose rounding is not known to be "
                f"that of the recorded arithmetic, {arithmetic}."
            )
        for name in ("kernel", "bias", "threshold", "upper", "lower", "scale", "shift"):
            value = layer.get(name)
            if value is None or (arithmetic == "float64" and name not in ("scale", "shift")):
                continue
            exact = np.asarray(value, np.float64)
            with np.errstate(over="ignore"):
                single = exact.astype(np.float32)
            if not np.array_equal(exact, single):
                raise CannotCheck(
                    f"{where} has float64 numbers as {name}: {arithmetic} would round them, so "
                    "what is executed is another function."
                )


def _misfits(header, arrays, nodes: Sequence[Node], affine: Sequence[Affine]) -> list[str]:
    """What in the file cannot belong to this network."""
    problems, classes = [], len(affine[-1].bias)
    if header["classes"] not in (None, classes):
        problems.append(f"the file says {header['classes']} classes, the network has {classes}.")
    if arrays["norms"].shape[1] != len(affine) - 1:
        problems.append(
            f"there are {arrays['norms'].shape[1]} norms an image, the network has "
            f"{len(affine) - 1}."
        )
    else:
        with np.errstate(all="ignore"):
            least = _constant(nodes, arrays["norms"]) * (1 - TOLERANCE)
            if np.any(wrong := arrays["certified"] & ~(arrays["lipschitz"] >= least)):
                problems.append(
                    f"lipschitz is below what follows from the norms in rows {_rows(wrong)}."
                )
    for name in ("label", "predicted"):
        if np.any(wrong := (arrays[name] < 0) | (arrays[name] >= classes)):
            problems.append(f"{name} is outside 0..{classes - 1} in rows {_rows(wrong)}.")
    if classes < 2:
        problems.append(
            "the network has one class only: there is no rival, and nothing to certify."
        )
    return problems


def _constant(nodes: Sequence[Node], norms: np.ndarray) -> np.ndarray:
    """The Lipschitz constant up to the last affine layer: products along the graph, sums where it
    adds, roots of the sum of squares where it puts values beside each other."""
    found, used = [np.ones(len(norms))], 0
    for node in nodes[:-1]:
        first = found[node.inputs[0]]
        if isinstance(node.step, Affine):
            first, used = first * norms[:, used], used + 1
        elif isinstance(node.step, Add):
            first = sum((found[number] for number in node.inputs[1:]), first)
        elif isinstance(node.step, Move):
            squares = sum(np.square(found[number]) for number in node.inputs)
            first = np.sqrt(node.step.copies * squares)
        elif isinstance(node.step, Nonlinear):
            first = first * node.step.lipschitz
        found.append(first)
    return found[nodes[-1].inputs[0]]


@np.errstate(all="ignore")
def _differences(derived: Derived, network: Network, header, row) -> list[str]:
    """What of one recorded row does not agree with what was derived."""
    problems = []
    # Rounding of two derivations: of the logits in float64 (whatever the network is executed in,
    # this is less than the executed network's by the ratio of the unit roundoffs), of sums of their
    # sizes, and in what both say of the network's.
    single = network.arithmetic != "float64"
    own = derived.rounding * (U * 2.0**24 if single else 1.0)
    sums = 16 * U * (float(np.max(np.abs(derived.logits))) + derived.taken)
    share = ALLOWANCE_TOLERANCE if single else FLOAT64_ALLOWANCE_TOLERANCE
    # The largest logit as executed may differ from the exact one only where rounding can close the
    # gap.
    reach = derived.rounding + own
    behind = np.max(np.delete(derived.logits - reach, row["predicted"]))
    if behind > derived.logits[row["predicted"]] + reach[row["predicted"]] + sums:
        problems.append(
            f"recorded prediction {row['predicted']}, derived {int(np.argmax(derived.logits))}."
        )
    if row["certified"] and not derived.margin > 0:
        problems.append(
            f"recorded as certified with margin {row['margin']:.6g}, derived margin "
            f"{derived.margin:.6g}."
        )
    # What the checker does not know of the norms: its own bounds of them lie so far apart, in all.
    lower, upper = derived.norms[:, 0], derived.norms[:, 1]
    width = float(np.sum(upper[lower > 0] / lower[lower > 0] - 1))
    least = lower * (1 - TOLERANCE - 4 * width)
    if header["mode"] in ("global", "bcp"):  # the file's norms are those without masks
        least = np.array([bounds[0] for bounds in network.whole[:-1]]) * (1 - TOLERANCE)
    for k in np.flatnonzero(row["norms"] < least):
        problems.append(
            f"recorded norm {k} is {row['norms'][k]:.9g}, the true one is at least {least[k]:.9g}."
        )
    pair = [row["label"], derived.rival]
    spare = (TOLERANCE + 2 * width) * derived.taken + sums
    if header["mode"].startswith("tight"):
        spare += SLOPES_TOLERANCE * derived.taken
    spare += float(np.sum(2 * own[pair])) + 2 * share * derived.differences[derived.rival]
    # Where nothing can be derived, no number is below it.
    if row["margin"] > derived.margin + (spare if math.isfinite(derived.margin) else 0.0):
        problems.append(
            f"recorded margin {row['margin']:.9g} is above the derived one, {derived.margin:.9g}."
        )
    needed = np.min(np.delete(derived.differences, row["label"]))
    if row["certified"] and not row["allowance"] >= (1 - share) * needed - sums:
        problems.append(
            f"recorded allowance {row['allowance']:.4g}, but rounding can take {needed:.4g} off "
            "the margin."
        )
    return problems


# ------------------------------------------------------------------------------------------ command


def load_subject(given: argparse.Namespace, header, arrays):
    """What the file is about: the description of the network, and its images and labels,
    ``(layers, images, labels)``.

    The only part that uses the library, to read parameters and data.
    """
    from lipjax.cli import networks

    if given.images is not None:
        images, labels = _from_npz(given.images, arrays["index"])
        if given.workdir is None:
            network, expected, _ = networks.opened(given.network)
            network = networks.on_images(network, tuple(expected), images.shape[1:]) or network
        else:  # the number of classes is only to build the network: its hash is compared
            network, _ = networks.selected(given.workdir, images.shape[1:], header["classes"])
        return _described(given, network, images, header), images, labels
    if header["split"] not in (None, "test"):
        raise CannotCheck(
            f"the file is about the {header['split']} split: give its images with --images."
        )
    if given.workdir is None:
        name = given.data or header["data_name"]
        if name is None:
            raise CannotCheck(
                "the file does not say which data set it is about: give --data or --images."
            )
        subject = networks.of_network(
            given.network, name, data_dir=given.data_dir, image_size=given.image_size
        )
    else:
        # All images: the file says which of them it is about.
        subject = networks.of_run(given.workdir, examples=0, data_dir=given.data_dir)
    test = subject.test
    place = {int(index): i for i, index in enumerate(test.indices)}
    missing = [int(index) for index in arrays["index"] if int(index) not in place]
    if missing:
        raise CannotCheck(
            f"the test split of {test.name} has no images {missing[:5]}, which the file is about."
        )
    rows = np.array([place[int(index)] for index in arrays["index"]])
    images = test.unit_images(rows)
    return _described(given, subject.network, images, header), images, test.labels[rows]


def _described(given, network, images: np.ndarray, header) -> list[dict[str, Any]]:
    """The network in the terms of the file's version; a function's stored nodes as they stand."""
    from lipjax import storage

    if given.workdir is None and given.network.endswith(".safetensors"):
        head, arrays = network_files.read(given.network)
        # (A network of vectors that was certified on images is described anew.)
        if "nodes" in head and tuple(head["input_shape"]) == images.shape[1:]:
            return network_files.joined(head["nodes"], arrays)
    if header["version"] < BY_NODES:
        try:
            return of_stored(*storage.layers_of(network))
        except (TypeError, ValueError):
            pass  # any other function was described by nodes
    return describe(network, images[0], arithmetic=header["arithmetic"])


def _from_npz(path: str, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open(path, "rb") as file:
            npz = Npz(file)
            names = next(
                (n for n in (("images", "labels"), ("x", "y")) if {*n} <= {*npz.names}), None
            )
            if names is None:
                held = ", ".join(map(quoted, npz.names[:10]))
                raise CannotCheck(
                    f"{path} must hold images and labels (or x and y); it holds {held}."
                )
            labels = npz.read(names[1], MOST_IMAGE_BYTES).reshape(-1)
            count, highest = npz.member(names[0]).shape[:1], int(np.max(index))
            if count != labels.shape or highest >= len(labels):
                raise CannotCheck(
                    f"{path} holds images of shape {npz.member(names[0]).shape} and {len(labels)} "
                    "labels; the file asks for "
                    f"image {highest}."
                )
            images = npz.read(names[0], MOST_IMAGE_BYTES)
    except (OSError, Unreadable, MemoryError) as error:
        raise CannotCheck(f"{path} cannot be read: {error}") from error
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / np.float32(255)
    if images.dtype.kind != "f" or labels.dtype.kind not in "iu":
        raise CannotCheck(
            f"{path} holds images of type {images.dtype} and labels of type {labels.dtype}; "
            "expected uint8 or floats, and "
            "integers."
        )
    if images.ndim == 3:
        images = images[..., None]
    return images[index], labels[index].astype(np.int32)


def parser(program: str = "python -m lipjax.check") -> argparse.ArgumentParser:
    """The flags of the command."""
    found = argparse.ArgumentParser(
        prog=program,
        description="Derives the verdicts of a certificate file once more, independently of the "
        "code that made them.",
        epilog="Exit codes: 0 confirmed, 1 rejected, 2 could not be checked.",
    )
    found.add_argument("file", help="the certificate file")
    source = found.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="the run of train.py whose network was certified")
    source.add_argument(
        "--network", help="the .safetensors or .onnx file, or the name of a network of lipjax's"
    )
    found.add_argument(
        "--data", help="with --network: the data set; default: the one that the file names"
    )
    found.add_argument("--image_size", type=int, help="with --network: of sets of encoded images")
    found.add_argument("--images", help="npz of images and labels, if not the test split")
    found.add_argument(
        "--examples", type=int, help="derive only so many, chosen at random; default all"
    )
    found.add_argument(
        "--seed", type=int, help="of the checker's draws; default: from the operating system"
    )
    found.add_argument(
        "--data_dir", help="where TFDS keeps its sets, if not where training found them"
    )
    return found


def main(arguments: Sequence[str] | None = None, program: str = "python -m lipjax.check") -> int:
    """The command; returns the exit code."""
    given = parser(program).parse_args(arguments)
    spoke = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal spoke
        spoke = spoke or time.monotonic()
        if time.monotonic() - spoke > 15:
            spoke = time.monotonic()
            print(f"{done} of {total} images", file=sys.stderr, flush=True)

    try:
        header, arrays = load(given.file)
        layers, images, labels = load_subject(given, header, arrays)
        rng = np.random.default_rng(given.seed)
        report = check(
            layers, images, labels, header, arrays, rng, examples=given.examples, progress=progress
        )
    except (CertificateFileError, CannotCheck) as error:
        print(f"lipjax.check: could not be checked: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        # Whatever reading a run raises (checkpoints, data sets): exit code 1, Python's own, would
        # say "rejected".
        print(
            f"lipjax.check: could not be checked: {type(error).__name__}: {error}", file=sys.stderr
        )
        return 2
    print(report)
    return 0 if report.confirmed else 1
