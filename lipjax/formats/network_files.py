"""Network files: plain named arrays in one safetensors file, with a description of what they make.

The file's metadata holds, under "lipjax", a JSON text: format and version, the shape of an input,
the caller's notes, a SHA-256 over all of it, which finds damage (it is no signature: it needs no
key), and one of two descriptions. "layers" (version 1): an nnx.Sequential of layers that can be
built and trained (`lipjax.storage`). "nodes" (version 2): a function as its graph
(`lipjax.graph.description`); the checker of certificates reads it too. Nothing in a file is
executed.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lipjax.formats import certificate_files
from lipjax.formats.files import Unreadable, parsed, quoted, replaced

FORMAT = "lipjax network"
# By what describes the network.
VERSIONS = {1: "layers", 2: "nodes"}
COMMON = ("format", "version", "versions", "input_shape", "notes", "digest")
# Bytes of the list of arrays in front of them, the description with it, that are read.
HEAD_BYTES = 2**24
# Entries of an input, and of what a node makes of it.
MOST_ENTRIES = 2**28


class StorageError(ValueError):
    """The file is no network that this version can read; the message says why."""


def write(
    path,
    parts: Sequence[Mapping[str, Any]],
    arrays: Mapping[str, np.ndarray],
    *,
    version: int,
    input_shape: Sequence[int],
    notes: Mapping[str, Any] | None,
) -> None:
    """Writes a file; a kill leaves the old one or the new, never a part.

    Args:
        parts: its layers or nodes, as JSON values.
        version: which of the two, by `VERSIONS`.

    Raises:
        TypeError: notes that JSON cannot hold.
        OSError: the file cannot be written.
    """
    import safetensors.numpy

    try:
        kept = json.loads(json.dumps(dict(notes or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"notes must be a dict of what JSON can hold, numbers finite: {error}"
        ) from error
    header: dict[str, Any] = {
        "format": FORMAT,
        "version": version,
        "versions": certificate_files.versions(),
        "input_shape": [int(n) for n in input_shape],
        "notes": kept,
        VERSIONS[version]: list(parts),
    }
    header["digest"] = certificate_files.digest(header, arrays)
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    with replaced(path) as file:
        file.write(safetensors.numpy.save(dict(arrays), metadata={"lipjax": text}))


def read(path, arrays: bool = True) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header of a file and its arrays; without `arrays` the header alone, unverified.

    Raises:
        StorageError: not there, no such file, damaged, or of a newer version.
    """
    import safetensors

    path = Path(path)
    if not path.is_file():
        raise StorageError(f"{path.absolute()} is not there, or no file.")
    try:
        with open(path, "rb") as start:
            length = int.from_bytes(start.read(8), "little")
        if length > HEAD_BYTES:
            raise StorageError(
                f"{path} is damaged, cut short, or no safetensors file: a list of arrays of "
                f"{length} bytes, expected at most {HEAD_BYTES}."
            )
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            names = list(file.keys()) if arrays else []
            found = {name: np.asarray(file.get_tensor(name)) for name in names}
    except (OSError, safetensors.SafetensorError, AttributeError, TypeError) as error:
        # (The last two: of arrays of types that NumPy does not have, such as float8.)
        raise StorageError(
            f"{path} is damaged, cut short, or no safetensors file: {error}"
        ) from error
    header = _header(path, metadata)
    if arrays and header["digest"] != certificate_files.digest(header, found):
        raise StorageError(
            f"{path} is damaged: its contents do not fit the digest that it was written with."
        )
    return header, found


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if "lipjax" not in metadata:
        raise StorageError(
            f"{path} is a safetensors file of something else: lipjax.save did not write it, so "
            "which layers its arrays belong to is not known. Build the network and set its "
            "parameters, or see lipjax.bridges."
        )
    try:
        header = parsed(metadata["lipjax"], HEAD_BYTES)
    except Unreadable as error:
        raise StorageError(f"{path}: the description is no JSON that is read: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise StorageError(f"{path}: the description does not say format {FORMAT!r}.")
    version = header.get("version")
    if type(version) is not int or version not in VERSIONS:
        raise StorageError(
            f"{path} has format version {quoted(version)}, this lipjax reads up to "
            f"{max(VERSIONS)}: use a newer lipjax."
        )
    fields = {*COMMON, VERSIONS[version]}
    if set(header) != fields:
        raise StorageError(
            f"{path}: expected the fields {', '.join(sorted(fields))}, got "
            f"{', '.join(map(quoted, sorted(header)[:20]))}."
        )
    shape = header["input_shape"]
    if not (
        isinstance(shape, list)
        and all(type(n) is int and n > 0 for n in shape)
        and isinstance(header[VERSIONS[version]], list)
        and isinstance(header["notes"], dict)
    ):
        raise StorageError(
            f"{path}: input_shape (of positive numbers) and {VERSIONS[version]} must be lists and "
            "notes a dict."
        )
    shapes: list[Any] = [shape]
    if version == 2:
        # What else they may be is for those who make something of them to refuse.
        shapes += [node.get("shape") for node in header["nodes"] if isinstance(node, dict)]
    for shape in shapes:
        sizes = [n for n in shape if type(n) is int] if isinstance(shape, list) else []
        if math.prod(max(abs(n), 1) for n in sizes) > MOST_ENTRIES:
            raise StorageError(
                f"{path}: a value of shape {quoted(shape)}, expected at most {MOST_ENTRIES} "
                "entries."
            )
    return header


def split(
    nodes: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """A description by nodes as JSON values and arrays by name; `joined` is the inverse."""
    plain: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    for i, node in enumerate(nodes):
        own = {name: value for name, value in node.items() if isinstance(value, np.ndarray)}
        arrays |= {f"nodes.{i}.{name}": value for name, value in own.items()}
        plain.append({name: value for name, value in node.items() if name not in own})
    return plain, arrays


def joined(
    plain: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """The description that was `split`.

    Raises:
        StorageError: arrays of no node, nodes that are none.
    """
    if not all(isinstance(node, dict) for node in plain):
        raise StorageError("a node that is described by no dict.")
    nodes = [dict(node) for node in plain]
    for name, array in arrays.items():
        prefix, _, field = name.rpartition(".")
        number = prefix.removeprefix("nodes.")
        if f"nodes.{number}" != prefix or not number.isdecimal() or int(number) >= len(nodes):
            raise StorageError(f"no node takes {name}.")
        if field in nodes[int(number)]:
            raise StorageError(f"{name} is there twice.")
        nodes[int(number)][field] = array
    return nodes
