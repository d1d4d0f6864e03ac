"""A folder of records, read: shards of encoded images, their labels, and a description of both.

A folder of images becomes a folder of shards and a ``records.json``: name, classes,
counts, image shape or "varies", size and SHA-256 of every file, version of the format. A record is
the original file, byte for byte, behind 16 bytes: its position in the split and its label, two
little-endian int64. The labels lie once more together, as .npy, so that opening a set reads no
images. `lipjax.data.records` writes such folders.
"""

import dataclasses
import hashlib
import json
import struct
from pathlib import Path

import numpy as np

from lipjax.data.dataset import Dataset, on_disk, pair
from lipjax.data.errors import DataError
from lipjax.data.images import Images, Source, images_of

FORMAT = 1
DESCRIPTION = "records.json"
DECODED = "turned as EXIF says, transparency over white"
HEADER = struct.Struct("<qq")  # position in the split, label


@dataclasses.dataclass(frozen=True)
class Stored:
    """A folder of records, opened: number of classes, images and labels of "train" and "test", and
    a disclosure as of `dataset.Dataset`."""

    classes: int
    splits: dict[str, tuple[Images, np.ndarray]]
    note: str


def load(name: str, image_size: int | None) -> tuple[Dataset, Dataset]:
    """The set of "records:<path>"; errors as of `open_folder`."""
    stored = open_folder(Path(name.removeprefix("records:")), image_size)
    parts = [
        on_disk(name, split, *stored.splits[split], classes=stored.classes, note=stored.note)
        for split in ("train", "test")
    ]
    return pair(name, *parts)


def open_folder(folder: Path, image_size: int | None = None) -> Stored:
    """The sets in a folder of records.

    Reads descriptions and labels; of images only the files' sizes.

    Raises:
        DataError: no such folder, another format, files missing or of the wrong size, labels whose
            hash is wrong.
    """
    folder = folder.expanduser().absolute()
    about = description(folder)
    shape = about["image_shape"]
    shape = (None, None, 3) if shape == "varies" else tuple(shape)
    splits = {}
    for split, facts in about["splits"].items():
        labels = facts["labels"]
        for entry in (labels, *facts["shards"]):
            _check_size(folder, entry)
        check_hash(folder, labels)

        shards = tuple((str(folder / e["file"]), 0, e["examples"]) for e in facts["shards"])
        hashes = "".join(entry["sha256"] for entry in facts["shards"])
        # The hash is of the pixels that training sees, and so names how files become pixels.
        digest = hashlib.sha256(f"{DECODED} {hashes}".encode()).hexdigest()
        source = Source(shards, parse_record, digest, _remedy(folder))
        images = images_of(f"records:{folder}", source, shape, image_size, as_seen=True)
        splits[split] = images, np.load(folder / labels["file"])
    return Stored(len(about["classes"]), splits, about.get("note", ""))


def parse_record(record: bytes, position: int) -> tuple[bytes, int]:
    """Encoded image and label of a record; ValueError if it is not the one at `position`."""
    if len(record) < HEADER.size:
        raise ValueError(f"it holds {len(record)} bytes")
    found, label = HEADER.unpack_from(record)
    if found != position:
        raise ValueError(f"it says that it is number {found} of its split, expected {position}")
    return record[HEADER.size :], label


def description(folder: Path) -> dict:
    """The content of a folder's ``records.json``.

    Raises:
        DataError: there is none, it is damaged, or of another format.
    """
    try:
        about = json.loads((folder / DESCRIPTION).read_text())
        found = about["format"]
    except OSError as error:
        raise DataError(
            f"{folder} holds no records ({DESCRIPTION} cannot be read: {error.strerror}). Make "
            "them once from a folder of images: python -m lipjax.data.records "
            f"folder:<path> --out={folder}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / DESCRIPTION} is damaged: {error}. {_remedy(folder)}") from error
    if found != FORMAT:
        raise DataError(
            f"{folder} has records of format {found}, expected {FORMAT}. {_remedy(folder)}"
        )
    return about


def _check_size(folder: Path, entry: dict) -> None:
    path = folder / entry["file"]
    if path.is_file() and path.stat().st_size == entry["bytes"]:
        return
    size = f"has {path.stat().st_size} bytes" if path.is_file() else "is not there"
    raise DataError(f"{path} {size}, expected {entry['bytes']} bytes. {_remedy(folder)}")


def check_hash(folder: Path, entry: dict) -> None:
    """Raises a DataError if a file's SHA-256 is not the recorded one."""
    path = folder / entry["file"]
    if sha256(path) != entry["sha256"]:
        raise DataError(
            f"{path} is damaged: its SHA-256 is not the recorded one. {_remedy(folder)}"
        )


def sha256(path: Path) -> str:
    """Of a file, in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remedy(folder) -> str:
    return (
        f"Copy the folder again, or remove {folder} and convert again (python -m "
        "lipjax.data.records)."
    )
