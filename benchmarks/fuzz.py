"""Forges certificate files at random and shows them to the checker: no crash, and nothing confirmed
that is not true.

    python -m benchmarks.fuzz --files=10000 --seed=0
    python -m benchmarks.fuzz --files=300 --seed=1 --json

Three true files about a network of two inputs (tier probabilistic in mode "local", tier
deterministic in modes "linear" and "tight") are changed, and one about a network of many kinds of
nodes: header fields and the header's text, array values, types, shapes and rows, whole consistent
forgeries, bytes of the file, the zip around it, and the description of the second network itself,
of which the file then claims a share of what it leaves (`benchmarks.fuzz_descriptions`); most of
them with statement, digest and hashes computed anew, as who knows the format does. Each is read by
`certificate_files.load`, its images are found by its index, and `check.check` derives it again.

**A crash** is an exception other than `CertificateFileError` (of `load`) and `CannotCheck`, or a
report that cannot be printed.

**A false claim** is a confirmed file of which one of these holds:

- a row is about an image that its index does not lead to, has another label than the data, another
  prediction than the network makes when it is executed (where its description was changed: if the
  row is certified), or a `correct` that does not say whether
  the two agree;
- a recorded margin is above what is left at some point of the ball of that row's epsilon, found by
  a search of circles in the plane; for a certified row that includes every counterexample to its
  verdict;
- a recorded margin is above the one derived by more than a tenth of the true file's allowance for
  rounding and 1e-6, which is more than the checker's tolerance for this network, or a certified
  row's derived margin is not positive;
- a recorded allowance of a certified row is less than what float32 takes off the image's margin;
- the arithmetic is less precise than the true file's and something is certified in it;
- the tier is "deterministic", the confirmation rests on chance, and the first line does not say so;
- the statement is not the one that the other fields give, or the digest, the network's or the
  data's hash do not fit;
- not exactly one line of the report, the first, begins with CONFIRMED, or a line is not plain
  ASCII;
- a field that no derivation leads back to is not shown as written, in quotes, among what is "taken
  on trust": tier, failure probability, seed, mode, names of data and split, precision, command,
  versions. What they say may be anything that their types allow: whether it is true, no check can
  know.

A weaker claim (a smaller epsilon or margin, a verdict taken back where the margin is, too) is no
false one. One JSON line or a table: per kind of change the files that could not be read, were not
checked, rejected, confirmed as true, confirmed though false, and crashed. Exit code 1 if there was
a false claim or a crash; `--keep` has such files.
"""

import argparse
import collections
import contextlib
import copy
import functools
import io
import json
import math
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import lipjax
from benchmarks import fuzz_descriptions
from lipjax.check import checker
from lipjax.formats import certificate_files
from lipjax.formats.certificate_files import CertificateFileError

POOL = 9  # images that an index can lead to
PRECISION = (
    "float64",
    "float32",
    "tf32",
    "bfloat16_products",
    "bfloat16",
)  # of arithmetics, in this order
OUTCOMES = ("unreadable", "not checked", "rejected", "true", "FALSE", "CRASH")

# What no derivation leads back to.
TRUSTED = (
    "tier",
    "failure_probability",
    "seed",
    "mode",
    "data_name",
    "split",
    "precision",
    "command",
    "versions",
)

Members = list[tuple[str, bytes]]


# ----------------------------------------------------------------------------------- the true files


class Subject:
    """A network, the images that an index can lead to, a true file about some of them, and what is
    true beyond it."""

    # Is it another network than the file was made about?
    changed = False

    def __init__(
        self, folder: Path, tier: str, mode: str, seed: int = 3, epsilon: float = 0.05, steps=None
    ):
        rngs = nnx.Rngs(seed)
        bias = jax.nn.initializers.normal(0.3)
        self.network = nnx.Sequential(
            nnx.Linear(2, 6, rngs=rngs, bias_init=bias),
            lipjax.MaxMin(),
            nnx.Linear(6, 3, rngs=rngs, bias_init=bias),
        )
        self.images = np.random.default_rng(seed).uniform(0.1, 0.9, (POOL, 2)).astype(np.float32)
        self.layers = certificate_files.describe(self.network, self.images[0])
        self.images[-1] = self.images[0]  # another position, the same image
        self.logits = np.asarray(jax.vmap(self.network)(self.images))
        self.predicted = np.argmax(self.logits, axis=1).astype(np.int32)
        self.labels = self.predicted.copy()
        self.labels[1] = (self.labels[1] + 1) % 3
        index = np.arange(0, POOL - 1, 2)
        index[-1] = 1
        images, labels = self.images[index], self.labels[index]
        certificate = lipjax.certify(
            self.network, images, labels, epsilon, tier=tier, mode=mode, steps=steps
        )
        path = folder / f"{tier}-{mode}.npz"
        data = {"name": "plane", "split": "test"}
        options: dict[str, Any] = {"indices": index, "data": data, "command": "certify.py --x"}
        certificate_files.save(path, certificate, self.network, images, labels, **options)
        self.content = path.read_bytes()
        self.header, self.arrays = certificate_files.load(path)
        angles = np.linspace(0, 2 * math.pi, 361)[:-1]
        self.circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)

    def members(self) -> Members:
        with zipfile.ZipFile(io.BytesIO(self.content)) as archive:
            return [(name, archive.read(name)) for name in archive.namelist()]

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def left(self, position: int, epsilon: float) -> float:
        """At most so much of the margin is left somewhere in the ball, in real numbers."""
        x = self.images[position].astype(np.float64)
        radii = min(epsilon, 1e6) * (1 - 1e-12) * np.array([0.0, 0.5, 1.0])
        points = np.concatenate([x + radius * self.circle for radius in radii])
        logits = self.logits_at(points)
        label = self.labels[position]
        return float(np.min(logits[:, label] - np.max(np.delete(logits, label, axis=1), axis=1)))

    def deviation(self, position: int) -> float:
        """How far float32 takes the label's logit and that of a rival apart at an image, at least;
        0 where something says that it computes in another type."""
        if "float64" in json.dumps(
            [(n.get("dtype"), n.get("executed")) for n in self.layers], default=str
        ):
            return 0.0
        x, label = self.images[position : position + 1], self.labels[position]
        (off,) = np.abs(self.logits_at(x).astype(np.float64) - self.logits_at(x.astype(np.float64)))
        return float(off[label] + np.min(np.delete(off, label)))

    def logits_at(self, points: np.ndarray) -> np.ndarray:
        """NaN where the description makes no sense."""
        try:
            with np.errstate(all="ignore"):
                return fuzz_descriptions.logits(self.layers, points).reshape(len(points), 3)
        except Exception:  # whatever a changed description raises
            return np.full((len(points), 3), np.nan)

    def about(
        self, layers, share: float, mode: str, allowance: float, changed: bool = True
    ) -> "Subject":
        """Of another description, with a file that claims this share of every margin left."""
        found = copy.copy(self)
        found.layers, found.changed = layers, changed
        logits = found.logits_at(self.images.astype(np.float64))
        found.predicted = np.argmax(np.nan_to_num(logits), axis=1).astype(np.int32)
        found.labels = found.predicted
        index, epsilon = self.arrays["index"], 0.01
        left = np.array([found.left(position, epsilon) for position in index.tolist()])
        affine = [node.get("kind") in ("product", "scale") for node in layers]
        joined = [node.get("joined") is True for node in layers]
        norms = max(sum(affine) - sum(a and j for a, j in zip(affine, joined, strict=True)) - 1, 0)
        margin = share * np.where(np.isfinite(left), left, 1.0)
        found.arrays = self.arrays | {
            "label": found.labels[index],
            "predicted": found.predicted[index],
            "correct": np.ones(len(index), bool),
            "certified": margin > 0,
            "margin": margin,
            "allowance": np.full(len(index), allowance),
            "lipschitz": np.full(len(index), 1e29),
            "norms": np.full((len(index), norms), 1e6),
            "epsilon": np.full(len(index), epsilon),
        }
        network = "0" * 64
        with contextlib.suppress(Exception):
            network = certificate_files.network_hash(layers)
        found.header = self.header | {"network": network, "mode": mode, "epsilon": epsilon}
        with contextlib.suppress(Exception):
            if certificate_files.measured(layers):
                found.header["backend"] = certificate_files.MEASURED
        found.header = refitted(found, found.header, found.arrays)
        found.content = written(found.header, found.arrays)
        return found


def false_claims(subject: Subject, header, arrays, report) -> list[str]:
    """What of a confirmed file is not true, by the definition in this module's text."""
    found = []
    ranks = [PRECISION.index(h["arithmetic"]) for h in (header, subject.header)]
    if ranks[0] > ranks[1] and np.any(arrays["certified"]):
        found.append("arithmetic")
    # Slopes have rows of their own.
    columns = {name: array for name, array in arrays.items() if not name.startswith("slopes")}
    for row, position in enumerate(arrays["index"].tolist()):
        item = {name: array[row] for name, array in columns.items()}
        if not 0 <= position < POOL or item["label"] != subject.labels[position]:
            found.append("label")
            continue
        if item["predicted"] != subject.predicted[position] and (
            item["certified"] or not subject.changed
        ):
            found.append("predicted")
        if item["correct"] != (item["predicted"] == item["label"]):
            found.append("correct")
        left = subject.left(position, float(item["epsilon"]))
        if not item["margin"] <= left + 1e-12 or (
            item["certified"] and not (item["correct"] and left > 0)
        ):
            found.append("margin or verdict")
        derived = report.margin[row] + 0.1 * np.max(subject.arrays["allowance"]) + 1e-6
        above = item["margin"] > max(derived, 0.0) and not subject.changed
        if item["certified"] and not subject.deviation(position) <= 1.03 * item["allowance"]:
            found.append("allowance")
        if above or (item["certified"] and not report.margin[row] > 0):
            found.append("more than was derived")
    text = str(report)
    lines = text.split("\n")
    if (
        header["tier"] == "deterministic"
        and report.random_norms
        and "NOT deterministically" not in lines[0]
    ):
        found.append("tier")
    if header["statement"] != certificate_files.statement(header):
        found.append("statement")
    images, labels = subject.images[arrays["index"]], subject.labels[arrays["index"]]
    hashes = (
        certificate_files.network_hash(subject.layers),
        certificate_files.data_hash(images, labels),
    )
    if (header["network"], header["data"]) != hashes or header[
        "digest"
    ] != certificate_files.digest(header, arrays):
        found.append("hashes")
    if [line.startswith("CONFIRMED") for line in text.splitlines()] != [True] + [False] * (
        len(lines) - 1
    ):
        found.append("lines")
    if not text.replace("\n", "").isascii() or not text.replace("\n", "").isprintable():
        found.append("text")
    trusted = next((line for line in lines if line.startswith("taken on trust: ")), "")
    if any(ascii(header[field])[:80] not in trusted for field in TRUSTED):
        found.append("trust")
    return found


# ------------------------------------------------------------------------------------------ changes


def npy(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def packed(members: Members, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=method)
    return stream.getvalue()


def written(header, arrays) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header, sort_keys=True)
    return packed(
        [
            ("header.npy", npy(np.array(text))),
            *((f"{name}.npy", npy(a)) for name, a in arrays.items()),
        ]
    )


def refitted(subject: Subject, header, arrays):
    """With statement, hashes and digest as they follow from the rest, where they can be made of
    it."""
    header = dict(header)
    for field, value in (
        ("statement", lambda: certificate_files.statement(header)),
        (
            "data",
            lambda: certificate_files.data_hash(
                *(a[arrays["index"]] for a in (subject.images, subject.labels))
            ),
        ),
        ("digest", lambda: certificate_files.digest(header, arrays)),
    ):
        try:
            header[field] = value()
        except Exception:  # whatever strange values raise here, in the forger's own program
            continue
    return header


STRANGE: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        8,
        10**9,
        2**31,
        2**63,
        2**64,
        -(2**63),
        10**40,
        0.0,
        -0.0,
        0.05,
        0.5,
        1.0,
    ),
    *(
        1e-6,
        1e-9,
        1e-300,
        5e-324,
        0.999999999,
        1e308,
        -1.0,
        math.inf,
        -math.inf,
        math.nan,
        "",
        " ",
        "0",
        "x" * 5000,
    ),
    *(
        "float32",
        "float64",
        "tf32",
        "bfloat16",
        "float16",
        "local",
        "rows",
        "global",
        "probabilistic",
        "deterministic",
    ),
    *(
        "estimate",
        "train",
        "a\nCONFIRMED: all",
        "\r\nCONFIRMED",
        "\u2028CONFIRMED",
        "\x00",
        "\ud800",
        "\u202e",
        "{}",
    ),
    *(
        [],
        {},
        [0.05],
        {"a": 1},
        {"lipjax": "9"},
        [[[[]]]],
        "0" * 64,
        "f" * 64,
        "lipjax certificate",
    ),
]


def change_header_field(subject, dice):
    header = dict(subject.header)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        field = dice.choice(sorted(header))
        other = dice.choice(list(header.values()))
        header[field] = dice.choice([*STRANGE, other, _nudged(header[field], dice)])
    arrays = subject.arrays
    return written(refitted(subject, header, arrays) if dice.random() < 0.8 else header, arrays)


def _nudged(value, dice):
    if isinstance(value, str) and value:
        at = dice.randrange(len(value))
        return (
            value[:at]
            + chr(dice.choice((dice.randrange(32, 127), dice.randrange(0x3000))))
            + value[at + 1 :]
        )
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return dice.choice(
            (
                value + 1,
                -value,
                value * 2,
                value / 2,
                value * (1 + 1e-9),
                value * 1.01,
                float(value),
            )
        )
    return [value]


def change_header_names(subject, dice):
    header = dict(subject.header)
    name = dice.choice(sorted(header))
    value = header.pop(name)
    if dice.random() < 0.6:
        header[dice.choice((name.upper(), name + " ", "more", "a\nCONFIRMED", "digest2", ""))] = (
            value
        )
    return written(refitted(subject, header, subject.arrays), subject.arrays)


def change_header_text(subject, dice):
    header = refitted(subject, subject.header, subject.arrays)
    text = json.dumps(header, sort_keys=True)
    depth = dice.choice((10, 1000, 100_000))
    name = dice.choice(sorted(header))
    twice = json.dumps(dice.choice([*STRANGE, 0.5]))
    at, end = sorted(dice.randrange(len(text) + 1) for _ in range(2))
    text = dice.choice(
        (
            "[" * depth + text + "]" * depth,
            '{"a":' * depth + text + "}" * depth,
            text[:-1] + f', "{name}": {twice}}}',
            "{" + f'"{name}": {twice}, ' + text[1:],
            text[:at],
            text[:at] + text[end:],
            text[:end] + text[at:],
            text[:at] + dice.choice('"{}[],:0e\\\n\u2028\0') + text[at:],
            text + " " * dice.choice((1, 10**6)),
            text.replace(":", ": " + "9" * 6000, 1),
        )
    )
    return written(text, subject.arrays)


def change_values(subject, dice):
    header, arrays = (
        dict(subject.header),
        {name: array.copy() for name, array in subject.arrays.items()},
    )
    for _ in range(dice.choice((1, 1, 2, 3))):
        name = dice.choice(sorted(name for name in arrays if arrays[name].size))
        array = arrays[name].reshape(-1)
        at = dice.randrange(len(array))
        if array.dtype == bool:
            array[at] = not array[at]
        elif array.dtype.kind == "i":
            chosen = dice.choice(
                (0, 1, 2, 3, -1, POOL - 1, POOL, 2**31 - 1, -(2**31), array[at] + 1)
            )
            limits = np.iinfo(array.dtype)
            array[at] = min(max(int(chosen), limits.min), limits.max)
        else:
            size = dice.choice((1e-15, 1e-12, 1e-9, 1e-6, 1e-3, 0.1, 1.0, 10.0))
            was = float(array[at])
            moved = was * (1 + size), was * (1 - size), was + size, was - size
            array[at] = dice.choice(
                (*moved, 0.0, -0.0, math.nan, math.inf, -math.inf, 1e308, 5e-324, -array[at])
            )
        if name == "epsilon" and dice.random() < 0.7:
            arrays[name][:] = array[at]
            header["epsilon"] = float(array[at])
        elif name == "epsilon" and dice.random() < 0.7:
            header["epsilon"] = None
        if name in ("label", "predicted") and dice.random() < 0.5:
            arrays["correct"] = arrays["predicted"] == arrays["label"]
    return written(refitted(subject, header, arrays) if dice.random() < 0.9 else header, arrays)


def change_consistently(subject, dice):
    """Forgeries in which all numbers agree with each other."""
    header, arrays = (
        dict(subject.header),
        {name: array.copy() for name, array in subject.arrays.items()},
    )
    kind = dice.randrange(7)
    if kind == 0:  # every image is certified
        arrays["predicted"], arrays["correct"][:], arrays["certified"][:] = (
            arrays["label"].copy(),
            True,
            True,
        )
        arrays["margin"] = np.abs(arrays["margin"]) + dice.choice((0.0, 1e-12, 0.1))
    elif kind == 1:  # a larger ball, perhaps with smaller margins
        factor = dice.choice((1 + 1e-12, 1 + 1e-6, 1.01, 1.5, 3.0, 100.0))
        arrays["epsilon"] *= factor
        header["epsilon"] = header["epsilon"] * factor
        arrays["epsilon"][:] = header["epsilon"]
        arrays["margin"] = np.where(
            arrays["certified"], arrays["margin"] * dice.choice((1.0, 0.9, 1e-9)), arrays["margin"]
        )
    elif kind == 2:  # larger margins
        arrays["margin"] = arrays["margin"] + dice.choice(
            (1e-12, 1e-9, 1e-7, 1e-6, 1e-5, 1e-3, 0.1)
        )
        arrays["certified"] = arrays["correct"] & (arrays["margin"] > 0)
    elif kind == 3:  # smaller norms
        factor = 1 - dice.choice((1e-12, 1e-9, 1e-6, 1e-3, 0.1))
        arrays["norms"], arrays["lipschitz"] = (
            arrays["norms"] * factor,
            arrays["lipschitz"] * factor,
        )
    elif kind == 4:  # another tier
        other = {
            "probabilistic": ("deterministic", 0.0),
            "deterministic": ("probabilistic", dice.choice((1e-9, 0.5))),
        }
        header["tier"], header["failure_probability"] = other[header["tier"]]
    elif kind == 5:  # another arithmetic, perhaps with a larger allowance
        header["arithmetic"] = dice.choice(PRECISION)
        arrays["allowance"] = arrays["allowance"] * dice.choice((1.0, 0.5, 1e4))
    else:  # other images
        arrays["index"] = np.array(dice.sample(range(POOL), len(arrays["index"])))
        arrays["label"] = subject.labels[arrays["index"]]
        arrays["predicted"] = subject.predicted[arrays["index"]]
        arrays["correct"] = arrays["predicted"] == arrays["label"]
        arrays["certified"] = arrays["correct"] & (arrays["margin"] > 0)
    return written(refitted(subject, header, arrays), arrays)


def change_rows(subject, dice):
    header, arrays = (
        dict(subject.header),
        {name: array.copy() for name, array in subject.arrays.items()},
    )
    count = len(arrays["index"])
    rows = dice.choice(
        (
            dice.sample(range(count), count),
            [dice.randrange(count) for _ in range(count)],
            list(range(count - 1)),
            [*range(count), 0],
            [],
        )
    )
    names = sorted(name for name in arrays if len(arrays[name]) == count)
    if dice.random() < 0.5:
        names = dice.sample(names, dice.choice((1, 2, 3)))
    for name in names:
        arrays[name] = arrays[name][rows]
    if dice.random() < 0.7:
        header["examples"] = len(arrays["index"])
    return written(refitted(subject, header, arrays), arrays)


def change_types(subject, dice):
    arrays = dict(subject.arrays)
    name = dice.choice(sorted(arrays))
    types = (
        "float32",
        "float64",
        ">f8",
        "int8",
        "int64",
        "uint64",
        "bool",
        "complex64",
        "O",
        "U7",
        "S3",
        "M8[s]",
        "f2",
    )
    try:
        arrays[name] = arrays[name].astype(dice.choice(types))
    except (TypeError, ValueError):
        arrays[name] = np.array(list(map(str, arrays[name].tolist())))
    return written(refitted(subject, subject.header, arrays), arrays)


def change_shapes(subject, dice):
    arrays = dict(subject.arrays)
    name = dice.choice(sorted(arrays))
    array = arrays[name]
    arrays[name] = dice.choice(
        (
            array[None],
            array[..., None],
            array.reshape(-1)[0] if array.size else np.zeros((), array.dtype),
            array[:0],
            np.repeat(array, 2, axis=0),
            array.T,
            array[::-1],
        )
    )
    return written(refitted(subject, subject.header, arrays), arrays)


def change_npy(subject, dice):
    """The few bytes in front of an array, or the array's own, behind the back of `numpy.save`."""
    members = subject.members()
    at = dice.randrange(len(members))
    name, content = members[at]
    shape = dice.choice(
        (
            "(3, 10000000000000)",
            "(-1,)",
            "(5,)",
            "()",
            "(0,)",
            "(1e3,)",
            "(" * 200,
            "(99999999999999999999,)",
        )
    )
    dtype = dice.choice(("<f8", "|O", "|b1", "<f16", "<U1000000000", "|V0", "<i8", "", "\0"))
    start = (
        f"{{'descr': '{dtype}', 'fortran_order': {dice.choice((True, False, 7))}, 'shape': "
        f"{shape}, }}\n"
    ).encode()
    where = dice.randrange(len(content))
    content = dice.choice(
        (
            b"\x93NUMPY\1\0" + struct.pack("<H", len(start)) + start + content[128:],
            b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + start,
            content[:where],
            content[:where] + bytes([dice.randrange(256)]) + content[where + 1 :],
            content + b"\0" * dice.choice((1, 8, 10**6)),
            b"",
        )
    )
    members[at] = (name, content)
    return packed(members)


def change_bytes(subject, dice):
    content = bytearray(subject.content)
    for _ in range(dice.choice((1, 1, 2, 8))):
        at, end = sorted(dice.randrange(len(content) + 1) for _ in range(2))
        end = min(end, at + dice.choice((1, 4, 64, len(content))))
        match dice.randrange(5):
            case 0:
                content[at:end] = bytes(b ^ dice.choice((1, 128, 255)) for b in content[at:end])
            case 1:
                del content[at:end]
            case 2:
                content[at:at] = content[at:end]
            case 3:
                content[at:end] = dice.randbytes(end - at)
            case _:
                content = content[:at] or content
    return bytes(content)


def change_zip(subject, dice):
    members = subject.members()
    at = dice.randrange(len(members))
    name, content = members[at]
    kind = dice.randrange(8)
    if kind == 0:
        del members[at]
    elif kind == 1:
        members.append(
            (dice.choice(("more.npy", "../x.npy", "a\nCONFIRMED.npy", "header", "margin")), content)
        )
    elif kind == 2:
        members.append(("bomb.npy", npy(np.zeros(10**6))))
    elif kind == 3:
        members[at] = (dice.choice(("x.npy", name.upper(), name + "/", name[:-4])), content)
    elif kind == 4:
        members = dice.sample(members, len(members))
    elif kind == 5:
        members += [(f"{i}.npy", b"") for i in range(1100)]
    method = dice.choice(
        (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    )
    forged = bytearray(packed(members, method if kind >= 6 else zipfile.ZIP_DEFLATED))
    if kind >= 6:  # a number in one of the places where the zip says what it holds
        places = [
            i
            for i in range(len(forged) - 3)
            if forged[i : i + 4] in (b"PK\1\2", b"PK\3\4", b"PK\5\6")
        ]
        start = dice.choice(places) + dice.randrange(4, 40)
        forged[start : start + 4] = struct.pack("<I", dice.choice((0, 1, 2**16, 2**31, 2**32 - 1)))
    return bytes(forged)


def change_description(subject, dice):
    """Another network, and a file about it."""
    layers = fuzz_descriptions.changed(subject.layers, dice)
    share = dice.choice((1e-6, 1e-3, 0.1, 0.3, 0.6, 0.8, 0.9, 0.99, 1.01))
    allowance = 10.0 ** dice.choice((-8, -6, -5, -4, -2, 20, 20, 20))
    mode = dice.choice(("local", "linear", "rows", "rows", "tight"))
    return subject.about(layers, share, mode, allowance)


def change_nothing(subject, dice):
    """The true file, packed again: it has to be confirmed."""
    return packed(
        dice.sample(subject.members(), len(subject.members())),
        dice.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED)),
    )


CHANGES: dict[str, tuple[int, Callable]] = {
    "header field": (22, change_header_field),
    "header names": (3, change_header_names),
    "header text": (8, change_header_text),
    "array values": (20, change_values),
    "consistent forgery": (14, change_consistently),
    "array rows": (6, change_rows),
    "array types": (4, change_types),
    "array shapes": (3, change_shapes),
    "npy bytes": (6, change_npy),
    "file bytes": (8, change_bytes),
    "zip members": (5, change_zip),
    "description": (20, change_description),
    "nothing": (1, change_nothing),
}


# ------------------------------------------------------------------------------------------ the run


def outcome(subject: Subject, path: Path) -> tuple[str, str]:
    """What becomes of a file, one of `OUTCOMES`, and why."""
    try:
        header, arrays = certificate_files.load(path)
    except CertificateFileError as error:
        return "unreadable", str(error)
    except BaseException:
        return "CRASH", traceback.format_exc()
    index = arrays["index"]
    if np.any((index < 0) | (index >= POOL)):
        return "not checked", "no such image"
    try:
        rng = np.random.default_rng(0)
        report = checker.check(
            subject.layers, subject.images[index], subject.labels[index], header, arrays, rng
        )
        text = str(report)
    except checker.CannotCheck as error:
        return "not checked", str(error)
    except BaseException:
        return "CRASH", traceback.format_exc()
    if not report.confirmed:
        return "rejected" if text.startswith("REJECTED") else "FALSE", text
    wrong = false_claims(subject, header, arrays, report)
    return ("FALSE", f"{', '.join(sorted(set(wrong)))}\n{text}") if wrong else ("true", text)


def fuzz(
    files: int, seed: int, keep: Path | None = None
) -> tuple[dict[str, collections.Counter], list[str], int]:
    """Outcomes per kind of change, what happened where it should not, and by how many MiB the most
    memory in use grew."""
    dice = random.Random(seed)
    found: dict[str, collections.Counter] = {name: collections.Counter() for name in CHANGES}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        subjects = [
            Subject(where, "probabilistic", "local"),
            Subject(where, "deterministic", "linear"),
            # With images that stay open, of which the file holds slopes.
            Subject(where, "deterministic", "tight", epsilon=0.33, steps=8),
        ]
        subjects.append(subjects[0].about(fuzz_descriptions.varied(), 1e-3, "local", 1e-3, False))
        before = peak_memory()
        weights = [weight for weight, _ in CHANGES.values()]
        path = where / "forged.npz"
        for i in range(files):
            (name,) = dice.choices(list(CHANGES), weights)
            subject = subjects[-1] if name == "description" else dice.choice(subjects)
            with np.errstate(all="ignore"):  # of the forger
                forged = CHANGES[name][1](subject, dice)
            if isinstance(forged, Subject):
                subject, forged = forged, forged.content
            path.write_bytes(forged)
            became, why = outcome(subject, path)
            found[name][became] += 1
            if became in ("FALSE", "CRASH") or (name == "nothing" and became != "true"):
                wrong.append(f"file {i}, {name}, {became}: {why}")
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{seed}-{i}.npz").write_bytes(path.read_bytes())
    return found, wrong, peak_memory() - before


def peak_memory() -> int:
    """In MiB, of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder for files that crash the checker or are confirmed though false",
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    found, wrong, memory = fuzz(options.files, options.seed, options.keep)
    seconds = round(time.monotonic() - began, 1)
    facts = {
        "files": options.files,
        "seed": options.seed,
        "seconds": seconds,
        "memory_grew_MiB": memory,
    }
    if options.json:
        print(
            json.dumps(
                {**facts, **{name: dict(counts) for name, counts in found.items()}, "wrong": wrong}
            )
        )
    else:
        print(f"{'':20}" + "".join(f"{word:>13}" for word in OUTCOMES))
        for name, counts in [*found.items(), ("all", sum(found.values(), collections.Counter()))]:
            print(f"{name:20}" + "".join(f"{counts[word]:13}" for word in OUTCOMES))
        print(", ".join(f"{name} {value}" for name, value in facts.items()))
        print("\n".join(wrong[:20]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
