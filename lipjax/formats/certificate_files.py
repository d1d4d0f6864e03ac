"""Certificate files: the verdicts of one call of `lipjax.certify` with all that is needed to derive
them once more.

`save` writes one npz: a JSON header (what the verdicts are about and rest on, in words and in
hashes) and per-example arrays. `python -m lipjax.check` reads it, the network and the data, and
re-derives every verdict with other code.

**What the digest is, and is not.** The header holds a SHA-256 over the rest of the header and all
arrays. It finds damage and careless edits. It is no signature: it needs no key, so whoever edits
the file can compute it again. Such an edit is only found by re-derivation, and only where it
matters: a verdict, margin, norm, epsilon or hash that does not fit the network and the data is
found; the recorded seed, failure probability, command or versions, which no derivation leads back
to, are taken on trust. If it matters who wrote a file, sign it with a tool made for that.

This module imports nothing of the bounds, so that the checker can use it and stay independent.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lipjax.formats.files import Npz, Unreadable, parsed, quoted, replaced

FORMAT = "lipjax certificate"
# Up to version 2 an nnx.Sequential was described by its layers (`lipjax.check.layers`).
VERSION = 3
BY_NODES = 3
# Where the seed of the draws comes from; in tier "deterministic", which draws nothing, a seed that
# nobody gave is "unused".
SEEDS_FROM = ("system", "given", "unused")

# Arrays of a file: the type that is stored and the number of axes. One row an example, but for the
# slopes, of which a file of version 3 has as many rows as its header says.
ARRAYS = {
    "index": (np.int64, 1),
    "label": (np.int32, 1),
    "predicted": (np.int32, 1),
    "correct": (np.bool_, 1),
    "certified": (np.bool_, 1),
    "margin": (np.float64, 1),
    "allowance": (np.float64, 1),
    "lipschitz": (np.float64, 1),
    "norms": (np.float64, 2),
    "epsilon": (np.float64, 1),
}
SLOPES = {
    "slopes_of": (np.int32, 2),
    "slopes": (np.int8, 2),
}
FIELDS = (
    *(
        "predicted",
        "correct",
        "certified",
        "margin",
        "allowance",
        "lipschitz",
        "norms",
        "epsilon",
        "mode",
        "tier",
    ),
    *("failure_probability", "seed", "seed_from", "arithmetic", "precision"),
)
MODES = ("global", "bcp", "paper", "local", "linear", "rows", "tight", "tight_rows")
TIERS = ("probabilistic", "deterministic")
# Functions whose rounding was measured, and the backend on which: XLA's for CPUs.
SMOOTH = (
    *("sigmoid", "tanh", "softplus", "softsign", "gelu", "gelu_tanh", "silu", "hard_swish"),
    "elu",
)
MEASURED = "cpu"

NO_SLOPES = {"slopes_of": np.zeros((0, 2), np.int32), "slopes": np.zeros((0, 0), np.int8)}

# The largest file that is written or read: characters of its header, columns of norms, bytes of all
# arrays unpacked.
HEADER_LENGTH = 2**19
MOST_NORMS = 10_000
MOST_SLOPES = 2**26
MOST_BYTES = 2**29


class Field(NamedTuple):
    """What a header field may be.

    Attributes:
        since: the first format version that has it.
        optional: may a file leave it out?
    """

    allows: Callable[[Any], bool]
    expected: str
    since: int = 1
    optional: bool = False


def _one_of(*values: str) -> Field:
    return Field(
        lambda value: type(value) is str and value in values, " or ".join(map(repr, values))
    )


def _matching(pattern: str, expected: str) -> Field:
    return Field(
        lambda value: type(value) is str and re.fullmatch(pattern, value) is not None, expected
    )


def _integer(low: int, high: int) -> Field:
    return Field(
        lambda value: type(value) is int and low <= value <= high,
        f"an integer from {low} to {high}",
    )


def _words(length: int, printable: bool = True) -> Field:
    def allows(value) -> bool:
        return (
            type(value) is str and len(value) <= length and (value.isprintable() or not printable)
        )

    return Field(allows, f"at most {length} {'printable ' if printable else ''}characters")


def _or_none(field: Field) -> Field:
    return Field(
        lambda value: value is None or field.allows(value), f"null or {field.expected}", field.since
    )


def _is_versions(value) -> bool:
    name = _words(100)
    return (
        type(value) is dict
        and len(value) <= 20
        and all(name.allows(word) for pair in value.items() for word in pair)
    )


_HASH = _matching("[0-9a-f]{64}", "a SHA-256 in hexadecimal digits")
_WORD = _matching("[a-z0-9_]{1,40}", "a word of at most 40 of a-z, 0-9 and _")

# Each field of a header, when it is read as when it is written.
HEADER = {
    "format": _one_of(FORMAT),
    "version": _integer(1, VERSION),
    "versions": Field(_is_versions, "at most 20 names and versions"),
    "network": _HASH,
    "classes": _or_none(_integer(1, 2**31 - 1)),
    "data": _HASH,
    "data_name": _or_none(_words(1000)),
    "split": _or_none(_words(1000)),
    "examples": _integer(1, 2**31 - 1),
    "epsilon": _or_none(
        Field(
            lambda value: type(value) is float and 0 <= value < math.inf,
            "a finite decimal number >= 0",
        )
    ),
    "mode": _one_of(*MODES),
    "tier": _one_of(*TIERS),
    "failure_probability": Field(
        lambda value: type(value) is float and 0 <= value < 1, "a decimal number in [0, 1)"
    ),
    "seed": _integer(-(2**63), 2**64 - 1),
    "seed_from": _one_of(*SEEDS_FROM)._replace(since=2),
    "arithmetic": _WORD,
    # Only where there is something to say: the backend on which the rounding of a function was
    # measured, and the function at the end that was left out.
    "backend": _one_of(MEASURED)._replace(since=3, optional=True),
    "left_out": _WORD._replace(since=3, optional=True),
    "precision": _WORD,
    "slopes": _integer(0, 2**31 - 1)._replace(since=3),
    "command": _or_none(_words(2**16, printable=False)),
    "statement": _words(4000),
    "digest": _HASH,
}


class CertificateFileError(ValueError):
    """The file is no certificate file that this version can read; the message says why."""


# ----------------------------------------------------------------------------------- write and read


def save(
    path,
    certificate,
    network,
    images,
    labels,
    *,
    indices=None,
    data: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> None:
    """Writes a certificate and what it is about to one npz file; a kill leaves the old file or the
    new, never a part.

    Args:
        path: the file, by custom ``*.npz``.
        certificate: what `lipjax.certify` returned. Read by field name; `epsilon` may be a number
            or ``(N,)``.
        network: what was certified, as it was given to `certify`, or its graph; described by the
            nodes of its graph, as it is traced on an image.
        images, labels: ``(N, ...)`` and ``(N,)``, as they were given to `certify`; where the
            predictions themselves were certified (labels None there), the predictions.
        indices: ``(N,)`` positions of the images in their source split; 0 .. N - 1 if None.
        data: what the images are: "name" and "split", as strings.
        command: the command line that made the certificate.

    Raises:
        TypeError: `certificate` lacks a field of a certificate (an estimate, for one, is none);
            a function without a plain description.
        ValueError: shapes that do not fit each other; a tier that proves nothing; verdicts that
            contradict the labels; a field that is not what `HEADER` says (a name with a line break,
            say), repeated indices, more than `load` reads.
        OSError: the file cannot be written.
    """
    fields = {name: _field(certificate, name) for name in FIELDS}
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(
            f"labels must have shape (N,), got {labels.shape}; for labels None save the "
            "predictions."
        )
    count = len(labels)
    columns = {name: fields[name] for name in ARRAYS if name in fields}
    columns |= {
        "index": np.arange(count) if indices is None else indices,
        "label": labels,
        "epsilon": np.broadcast_to(np.asarray(fields["epsilon"], np.float64), (count,)),
    }
    arrays = {name: _stored(name, columns[name], count, kind) for name, kind in ARRAYS.items()}
    slopes = {
        name: np.asarray(getattr(certificate, name, none)) for name, none in NO_SLOPES.items()
    }
    rows = len(slopes["slopes"])
    arrays |= {name: _stored(name, slopes[name], rows, kind) for name, kind in SLOPES.items()}
    if len(np.asarray(images)) != count:
        raise ValueError(f"{len(np.asarray(images))} images do not fit {count} labels.")
    if not np.array_equal(arrays["correct"], arrays["predicted"] == arrays["label"]):
        raise ValueError(
            "certificate.correct is not predicted == label: pass the labels that certify was given."
        )
    same = count > 0 and bool(np.all(arrays["epsilon"] == arrays["epsilon"][0]))
    data = dict(data or {})
    one = np.empty(np.shape(images)[1:], np.asarray(images).dtype)
    nodes = describe(network, one, arithmetic=str(fields["arithmetic"]))
    header = {
        "format": FORMAT,
        "version": VERSION,
        "versions": versions(),
        "network": network_hash(nodes),
        "classes": int(nodes[-1]["shape"][-1]),
        "data": data_hash(images, labels),
        "data_name": _text(data.pop("name", None)),
        "split": _text(data.pop("split", None)),
        "examples": count,
        "epsilon": float(arrays["epsilon"][0]) if same else None,
        "mode": str(fields["mode"]),
        "tier": str(fields["tier"]),
        "failure_probability": float(fields["failure_probability"]),
        "seed": int(fields["seed"]),
        "seed_from": str(fields["seed_from"]),
        "arithmetic": str(fields["arithmetic"]),
        "precision": str(fields["precision"]),
        "slopes": rows,
        "command": _text(command),
    }
    backend = getattr(certificate, "backend", "")
    if measured(nodes) or backend:
        header["backend"] = MEASURED
    left_out = str(getattr(certificate, "left_out", ""))
    if left_out:
        header["left_out"] = left_out
    if data:
        raise ValueError(f'data takes "name" and "split", got also {", ".join(map(repr, data))}.')
    header["statement"] = statement(header)
    problems = faults({**header, "digest": digest(header, arrays)}, arrays)
    if problems:
        raise ValueError(f"this cannot be written to a certificate file: {' '.join(problems)}")
    write(path, header, arrays)


def write(path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a header (its digest is computed here) and arrays as they are; `save` is the way to
    write a certificate."""
    header = {**header, "digest": digest(header, arrays)}
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    with replaced(path) as file:
        np.savez_compressed(file, header=np.array(text), **arrays)  # type: ignore[arg-type]


def load(path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header and the arrays of a certificate file, each of the right type and within its
    bounds; nothing is verified yet.

    The file may be anybody's: all sizes are looked at before something is unpacked.

    Raises:
        CertificateFileError: not there, not a certificate file, damaged, forged, or of a newer
            version.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return _loaded(path, file)
    except FileNotFoundError:
        raise CertificateFileError(f"{path.absolute()} is not there.") from None
    except (OSError, Unreadable) as error:
        raise CertificateFileError(
            f"{path} is damaged, cut short, or no certificate file: {error}"
        ) from error


def _loaded(path: Path, file) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    npz = Npz(file)
    if "header" not in npz.names:
        names = ", ".join(map(quoted, npz.names[:10]))
        raise CertificateFileError(f"{path} is no certificate file: it has no header, but {names}.")
    text = npz.member("header")
    if text.shape != () or text.dtype[:2] != "<U":
        raise CertificateFileError(f"{path}: the header is no text.")
    header = parsed(str(npz.read("header", 4 * HEADER_LENGTH)), HEADER_LENGTH)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CertificateFileError(
            f"{path} is no certificate file: its header does not say format {FORMAT!r}."
        )
    version = header.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise CertificateFileError(
            f"{path} has format version {quoted(version)}, this lipjax reads 1 to {VERSION}: use a "
            "newer lipjax."
        )
    problems = _header_faults(header)
    wanted = {} if problems else _arrays_of(header)
    problems = problems or _differing("arrays", set(wanted), set(npz.names) - {"header"})
    members = {} if problems else {name: npz.member(name) for name in wanted}
    for name, member in members.items():
        dtype, axes, rows = wanted[name]
        if member.dtype != np.dtype(dtype).newbyteorder("<").str or not _fits(
            name, member.shape, axes, rows
        ):
            problems.append(_misshapen(name, np.dtype(member.dtype), member.shape, wanted[name]))
    if sum(member.size for member in members.values()) > MOST_BYTES:
        problems.append(f"its arrays have more than {MOST_BYTES} bytes.")
    arrays: dict[str, np.ndarray] = {}
    if not problems:
        arrays = {
            name: npz.read(name, MOST_BYTES).astype(dtype, copy=False)
            for name, (dtype, _, _) in wanted.items()
        }
        problems = faults(header, arrays)
    if problems:
        raise CertificateFileError(f"{path}: {' '.join(problems)}")
    return header, arrays


def faults(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[str]:
    """What in a file's content is not of its type or outside its bounds, a sentence each; none:
    `check` can work with it."""
    problems = _header_faults(header)
    if problems:
        return problems
    wanted = _arrays_of(header)
    problems = _differing("arrays", set(wanted), set(arrays))
    if problems:
        return problems
    for name, (dtype, axes, rows) in wanted.items():
        array = arrays[name]
        if array.dtype != np.dtype(dtype) or not _fits(name, array.shape, axes, rows):
            problems.append(_misshapen(name, array.dtype, array.shape, wanted[name]))
    if sum(array.nbytes for array in arrays.values()) > MOST_BYTES:
        problems.append(f"the arrays have more than {MOST_BYTES} bytes.")
    if not problems and (
        np.min(arrays["index"]) < 0 or len(np.unique(arrays["index"])) < header["examples"]
    ):
        problems.append("index holds negative or repeated positions.")
    if not problems and header.get("slopes"):
        problems += _slope_faults(header, arrays["slopes_of"])
    return problems


def _slope_faults(header: Mapping[str, Any], places: np.ndarray) -> list[str]:
    """What is wrong with the images and rivals that slopes are said to be of."""
    if places.shape[1] != 2:
        return [f"slopes_of has {places.shape[1]} columns, expected 2: image and rival."]
    rows = places[:, 0]
    if np.min(places) < 0 or np.max(rows) >= header["examples"]:
        return ["slopes_of names images or classes that are not there."]
    if len(np.unique(places, axis=0)) < len(places):
        return ["slopes_of holds the same image and rival twice."]
    return []


def _arrays_of(header: Mapping[str, Any]) -> dict[str, tuple[Any, int, int]]:
    """The arrays of a file with a header without faults: type, axes and rows."""
    found = {name: (*kind, header["examples"]) for name, kind in ARRAYS.items()}
    if header["version"] >= HEADER["slopes"].since:
        found |= {name: (*kind, header["slopes"]) for name, kind in SLOPES.items()}
    return found


def _header_faults(header: Mapping[str, Any]) -> list[str]:
    version = header.get("version")
    wanted = {
        name for name, field in HEADER.items() if type(version) is not int or field.since <= version
    }
    wanted -= {name for name in wanted - set(header) if HEADER[name].optional}
    return _differing("header fields", wanted, set(header)) or [
        f"{name} is {quoted(header[name])}, expected {HEADER[name].expected}."
        for name in sorted(wanted)
        if not HEADER[name].allows(header[name])
    ]


def _fits(name: str, shape: tuple[int, ...], axes: int, rows: int) -> bool:
    most = MOST_SLOPES if name == "slopes" else MOST_NORMS
    return len(shape) == axes and shape[0] == rows and all(n <= most for n in shape[1:])


def _misshapen(name: str, dtype: np.dtype, shape: tuple[int, ...], wanted) -> str:
    kind, axes, rows = wanted
    return (
        f"{name} is {dtype} of shape {shape}, expected {np.dtype(kind)} with {axes} axes and "
        f"{rows} rows."
    )


def _differing(what: str, wanted: set[str], found: set[str]) -> list[str]:
    if wanted == found:
        return []
    missing, unknown = (
        sorted(wanted - found) or "none",
        sorted(map(quoted, found - wanted))[:10] or "none",
    )
    return [f"{what} missing: {missing}, not known: {unknown}."]


def _field(certificate, name):
    try:
        return getattr(certificate, name)
    except AttributeError:
        raise TypeError(
            f"{type(certificate).__name__} has no field {name!r}: expected what lipjax.certify "
            "returns (an estimate is no "
            "certificate)."
        ) from None


def _stored(name, value, count, kind):
    dtype, axes = kind
    array = np.asarray(value)
    if array.ndim != axes or len(array) != count:
        raise ValueError(f"{name} has shape {array.shape}, expected {count} rows and {axes} axes.")
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise ValueError(f"{name} is {array.dtype}, expected {np.dtype(dtype)}.")
    return array.astype(dtype)


def _text(value):
    return None if value is None else str(value)


# ------------------------------------------------------------------------------------- what it says


def statement(header: Mapping[str, Any]) -> str:
    """The file's claim in one sentence, from the header's other fields.

    Raises:
        ValueError: a tier that proves nothing, or a failure probability that does not belong to the
            tier; a seed of which it is not said where it comes from.
    """
    # Files of version 1 do not say it.
    draws = {
        None: "",
        "system": ", from the operating system",
        "given": ", given: network and images are assumed to be chosen independently of it",
    }
    tier, delta = header["tier"], header["failure_probability"]
    origin = header.get("seed_from")
    if tier == "probabilistic" and origin not in draws:
        raise ValueError(
            'the draws of a probabilistic certificate have a seed from "system" or "given", got '
            f"{origin!r}."
        )
    if tier == "probabilistic" and 0 < delta < 1:
        condition = (
            f"with probability >= 1 - {delta!r} over the tool's own draws (seed "
            f"{header['seed']}{draws[origin]}), all "
            "certificates of this file hold together"
        )
    elif tier == "deterministic" and delta == 0:
        condition = "all certificates of this file hold, without any probability of failure"
    else:
        raise ValueError(
            "a certificate's tier is probabilistic with a failure probability in (0, 1), or "
            "deterministic with 0; got "
            f"tier {tier!r} with {delta!r}."
        )
    return f"{condition}: for each image marked certified, {claim(header)}."


def claim(header: Mapping[str, Any]) -> str:
    """What is claimed of one certified image, from the header's other fields."""
    radius = "its epsilon" if header["epsilon"] is None else f"epsilon = {header['epsilon']!r}"
    network = "the network"
    if header.get("left_out"):
        network = (
            f"the network without the {header['left_out']} at its end, that is by its logits in "
            "front of it"
        )
    backend = " on a CPU, by XLA, and" if header.get("backend") else ""
    return (
        f"{network}, executed in {header['arithmetic']} arithmetic{backend} by lipjax's error "
        f"model, gives every image within l2 distance {radius} of it (pixels in [0, 1]) the "
        "image's label"
    )


def measured(nodes: Sequence[Mapping[str, Any]]) -> bool:
    """Does a network, described by its nodes, have functions whose rounding was measured?"""
    return any(node["kind"] in SMOOTH for node in nodes)


def versions() -> dict[str, str]:
    """Versions of what computed a certificate."""
    import flax
    import jax

    import lipjax

    return {
        "lipjax": lipjax.__version__,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "numpy": np.__version__,
    }


# ------------------------------------------------------------------------------------------- hashes


def digest(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 (hex) over the header without its "digest" and all arrays. No signature: see the
    module's text."""
    sha = hashlib.sha256()
    rest = {name: value for name, value in header.items() if name != "digest"}
    sha.update(json.dumps(rest, sort_keys=True, allow_nan=False).encode())
    for name in sorted(arrays):
        _feed(sha, name, np.asarray(arrays[name]))
    return sha.hexdigest()


def data_hash(images, labels) -> str:
    """SHA-256 (hex) over images as float32 and labels as int32. Images that float32 does not hold
    count as float64."""
    sha = hashlib.sha256()
    images = np.asarray(images)
    with np.errstate(over="ignore"):
        single = images.astype(np.float32)
    _feed(sha, "images", single if np.array_equal(single, images) else images.astype(np.float64))
    _feed(sha, "labels", np.asarray(labels).astype(np.int32))
    return sha.hexdigest()


def network_hash(described: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 (hex) over what `describe` returns, every parameter's bytes included."""
    sha = hashlib.sha256()
    for i, part in enumerate(described):
        for name in sorted(part):
            if isinstance(part[name], np.ndarray):
                _feed(sha, f"{i}.{name}", part[name])
            else:
                sha.update(json.dumps([i, name, part[name]], sort_keys=True).encode())
    return sha.hexdigest()


def _feed(sha, name: str, array: np.ndarray) -> None:
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
        array = array.astype(array.dtype.newbyteorder("<"))
    sha.update(json.dumps([name, array.dtype.name, list(array.shape)]).encode())
    sha.update(np.ascontiguousarray(array).tobytes())


# -------------------------------------------------------------------------------------- the network


def describe(network, example, *, arithmetic: str | None = None) -> list[dict[str, Any]]:
    """A network as plain data: one dict per node of its graph, as `lipjax.graph.description` says.

    Such a description, and so its hash, is of the program as this version of JAX traces it and
    computes what does not depend on the example.

    Args:
        network: any function that `lipjax.certify` takes.
        example: one image, as `lipjax.certify` was given it; only shape and type count.
        arithmetic: that of the certificate.

    Raises:
        TypeError: the function has no bound, or no plain description.
    """
    # Of the tool: to check what is described it is not needed.
    from lipjax.graph import description

    return description.describe(network, example, arithmetic)
