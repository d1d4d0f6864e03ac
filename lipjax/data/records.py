"""Image sets that stay on disk: encoded images in array_record shards, decoded when they are
indexed.

    python -m lipjax.data.records folder:tiny-imagenet-200 --out=tiny   # once; then
    --config.data.name=records:tiny python -m lipjax.data.records imagenet2012
    --manual_dir=<archives>  # TFDS keeps such shards itself: prepared and indexed

A folder in TinyImageNet's layout becomes a folder of shards and a ``records.json``: name, classes,
counts, image shape or "varies", size and SHA-256 of every file, version of the format. A record is
the original file, byte for byte, behind 16
bytes: its position in the split and its label, two little-endian int64. The labels lie once more
together, as .npy, so that opening a set reads no images.

TFDS's own shards are read where they are. Their labels and sizes are found in one pass over the
records and kept beside them, where that folder can be written to.
"""

import argparse
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lipjax.data import sets
from lipjax.data.sets import DataError

FORMAT = 1
DESCRIPTION = "records.json"

# Shards of about this size can be copied and hashed one by one, and even ImageNet needs few files.
SHARD_BYTES = 2**28

HEADER = struct.Struct("<qq")  # position in the split, label

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by channels


class Undecodable(ValueError):
    """Bytes that are no image, or a damaged one."""


# ------------------------------------------------------------------------------------------- images


def decode(encoded: bytes, channels: int = 3):
    """The Pillow image of `channels` channels that the bytes of a file encode.

    Raises:
        Undecodable: damaged bytes.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return image.convert(MODES[channels])
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        # Pillow names the buffer by its address, which says nothing.
        raise Undecodable(
            re.sub(r" <_io\.BytesIO object at \w+>", "", str(error)) or type(error).__name__
        ) from error


def pixels(image, image_size: int | None = None) -> np.ndarray:
    """A Pillow image as ``(H, W, C)`` uint8: as it is, or its central square after resizing.

    With `image_size` the shorter side becomes image_size * 256 / 224, rounded (bilinear,
    antialiased), as is usual for evaluation on ImageNet.
    """
    if image_size is not None:
        from PIL import Image

        scale = round(image_size * 256 / 224) / min(image.size)
        width, height = (max(image_size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - image_size) // 2, (height - image_size) // 2
        image = image.crop((left, top, left + image_size, top + image_size))
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


@dataclasses.dataclass(frozen=True)
class Source:
    """Records of encoded images in shards.

    Attributes:
        shards: ``(path, first, count)``: so many records of the file from `first` on.
        parse: the encoded image and the label in a record, given its bytes and its position;
            picklable. It raises a ValueError for bytes that are no such record.
        digest: hash of all that is stored.
        remedy: what to do when a shard is damaged.
        reader: opens files when it reads them, in each process anew.
    """

    shards: tuple[tuple[str, int, int], ...]
    parse: Callable[[bytes, int], tuple[bytes, int]]
    digest: str
    remedy: str
    reader: Any = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        try:
            from array_record.python.array_record_data_source import ArrayRecordDataSource
        except ImportError as error:
            raise DataError(
                "records are read with array_record: pip install -r requirements.txt."
            ) from error
        # With the range in its name a file is not opened before it is read.
        paths = [f"{path}[{first}:{first + count}]" for path, first, count in self.shards]
        object.__setattr__(self, "reader", ArrayRecordDataSource(paths))

    def __len__(self):
        return sum(count for _, _, count in self.shards)

    def read(self, position: int) -> tuple[bytes, int]:
        """The encoded image and the label at `position`.

        Raises:
            DataError: a damaged record or a missing shard, with file, number of the record in it,
                and what to do.
        """
        try:
            return self.parse(self.reader[position], position)
        except (RuntimeError, ValueError, OSError) as error:
            raise self.damaged(position, error) from error

    def damaged(self, position: int, reason) -> DataError:
        """The error about the record at `position`."""
        ends = list(itertools.accumulate(count for _, _, count in self.shards))
        shard = int(np.searchsorted(ends, position, side="right"))
        path, first, count = self.shards[shard]
        number = first + position - (ends[shard] - count)
        return DataError(
            f"{path}, record {number}, is missing or damaged: {str(reason).rstrip('.')}. "
            f"{self.remedy}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """``(N, H, W, C)`` uint8 images on disk: what is indexed is read and decoded. Picklable; files
    are opened anew.

    Attributes:
        source: the records.
        rows: ``(N,)`` positions in `source`.
        stored_shape: ``(H, W, C)`` of what is stored; H and W are None where they vary.
        image_size: as `pixels` takes it.
    """

    source: Source
    rows: np.ndarray
    stored_shape: tuple[int | None, int | None, int]
    image_size: int | None = None

    dtype = np.dtype(np.uint8)
    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        height, width, channels = self.stored_shape
        if self.image_size is not None:
            height = width = self.image_size
        assert height is not None and width is not None  # `_images` refuses this
        return len(self.rows), height, width, channels

    @property
    def nbytes(self) -> int:
        """Bytes of all images, decoded."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, rows) -> "Images":
        """The images at `rows` (anything that indexes axis 0), still on disk."""
        return dataclasses.replace(self, rows=self.rows[rows])

    def __getitem__(self, rows) -> np.ndarray:
        """The images at `rows` (an int, slice, integer array or boolean mask), decoded: ``(*rows,
        H, W, C)`` uint8.

        Raises:
            DataError: as `Source.read`, and for an image that cannot be decoded.
            IndexError: as NumPy's.
        """
        positions = self.rows[rows]
        out = np.empty((*np.shape(positions), *self.shape[1:]), np.uint8)
        flat = out.reshape(-1, *self.shape[1:])
        for i, position in enumerate(np.ravel(positions)):
            array = pixels(self._decoded(int(position)), self.image_size)
            if array.shape != flat.shape[1:]:
                raise self.source.damaged(
                    int(position), f"the image is {array.shape}, not {flat.shape[1:]}"
                )
            flat[i] = array
        return out

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def picture(self, row: int):
        """The whole Pillow image at `row`, whatever the image_size; for augmentation."""
        return self._decoded(int(self.rows[row]))

    def _decoded(self, position):
        encoded, _ = self.source.read(position)
        try:
            return decode(encoded, self.stored_shape[2])
        except Undecodable as error:
            raise self.source.damaged(position, error) from error

    def identity(self) -> np.ndarray:
        """A short array that stands for the pixels in a fingerprint: other pixels, another
        array."""
        digest = hashlib.sha256(f"{self.source.digest} {self.shape}".encode())
        digest.update(np.asarray(self.rows, np.int64).tobytes())
        return np.frombuffer(digest.digest(), np.uint8)


def _images(what, source, stored_shape, image_size) -> Images:
    if image_size is None and None in stored_shape:
        raise DataError(
            f"{what} has images of several sizes: give the size that they are brought to, "
            "--config.data.image_size=224 "
            "(image_size=224 of data.load)."
        )
    return Images(source, np.arange(len(source)), stored_shape, image_size)


# ------------------------------------------------------------------------------- records of our own


@dataclasses.dataclass(frozen=True)
class Stored:
    """A folder of records, opened: number of classes, and images and labels of "train" and
    "test"."""

    classes: int
    splits: dict[str, tuple[Images, np.ndarray]]


def parse_record(record: bytes, position: int) -> tuple[bytes, int]:
    """Encoded image and label of a record of `convert`; ValueError if it is not the one at
    `position`."""
    if len(record) < HEADER.size:
        raise ValueError(f"it holds {len(record)} bytes")
    found, label = HEADER.unpack_from(record)
    if found != position:
        raise ValueError(f"it says that it is number {found} of its split, expected {position}")
    return record[HEADER.size :], label


def open_folder(folder: Path, image_size: int | None = None) -> Stored:
    """The sets in a folder that `convert` wrote. Reads descriptions and labels; of images only the
    files' sizes.

    Raises:
        DataError: no such folder, another format, files missing or of the wrong size, labels whose
            hash is wrong.
    """
    folder = folder.expanduser().absolute()
    description = _description(folder)
    splits = {}
    for split, about in description["splits"].items():
        for entry in (about["labels"], *about["shards"]):
            path = folder / entry["file"]
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                size = f"has {path.stat().st_size} bytes" if path.is_file() else "is not there"
                raise DataError(
                    f"{path} {size}, expected {entry['bytes']} bytes. {_remedy(folder)}"
                )
        path = folder / about["labels"]["file"]
        if _sha256(path) != about["labels"]["sha256"]:
            raise DataError(
                f"{path} is damaged: its SHA-256 is not the recorded one. {_remedy(folder)}"
            )
        shards = tuple(
            (str(folder / entry["file"]), 0, entry["examples"]) for entry in about["shards"]
        )
        digest = hashlib.sha256(
            "".join(entry["sha256"] for entry in about["shards"]).encode()
        ).hexdigest()
        source = Source(shards, parse_record, digest, _remedy(folder))
        shape = description["image_shape"]
        stored = (None, None, 3) if shape == "varies" else tuple(shape)
        splits[split] = _images(f"records:{folder}", source, stored, image_size), np.load(path)
    return Stored(len(description["classes"]), splits)


def _remedy(folder) -> str:
    return (
        f"Copy the folder again, or remove {folder} and convert again (python -m "
        "lipjax.data.records)."
    )


def _description(folder: Path) -> dict:
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        found = description["format"]
    except OSError as error:
        raise DataError(
            f"{folder} holds no records ({DESCRIPTION} cannot be read: {error.strerror}). Make "
            "them once from a folder in "
            f"TinyImageNet's layout: python -m lipjax.data.records folder:<path> --out={folder}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / DESCRIPTION} is damaged: {error}. {_remedy(folder)}") from error
    if found != FORMAT:
        raise DataError(
            f"{folder} has records of format {found}, expected {FORMAT}. {_remedy(folder)}"
        )
    return description


def verify(folder: Path) -> dict:
    """The description of a folder of records, after every file was read and its SHA-256 compared.

    Raises:
        DataError: as `open_folder`; a file whose hash is not the recorded one.
    """
    open_folder(folder, image_size=1)
    folder = folder.expanduser().absolute()
    description = _description(folder)
    for about in description["splits"].values():
        for entry in about["shards"]:
            if _sha256(folder / entry["file"]) != entry["sha256"]:
                raise DataError(
                    f"{folder / entry['file']} is damaged: its SHA-256 is not the recorded one. "
                    f"{_remedy(folder)}"
                )
    return description


def convert(root: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> dict:
    """Writes a folder in TinyImageNet's layout as records; returns their description. Every image
    is decoded once.

    `out` appears complete or not at all: everything is written to ``<out>.partial``, which is
    renamed at the end.

    Raises:
        DataError: as `data.folder_files`; a damaged image; `out` or its ``.partial`` exists.
    """
    classes, files = sets.folder_files(root)
    out = out.expanduser().absolute()
    partial = out.with_name(out.name + ".partial")
    if out.exists():
        raise DataError(f"{out} exists: give another --out, or remove it.")
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        raise DataError(
            f"{partial} exists: another conversion is writing it, or one was stopped. Remove it "
            "and run again if none is."
        ) from None
    try:
        shapes: set[tuple[int, ...]] = set()
        splits = {
            split: _write_split(partial, split, found, shapes, shard_bytes)
            for split, found in sorted(files.items())
        }
        description = {
            "format": FORMAT,
            "name": root.expanduser().absolute().name,
            "classes": classes,
            "image_shape": list(shapes.pop()) if len(shapes) == 1 else "varies",
            "splits": splits,
        }
        (partial / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return description


def _write_split(folder, split, files, shapes, shard_bytes) -> dict:
    from array_record.python.array_record_module import ArrayRecordWriter

    labels = np.array([label for _, label in files], np.int32)
    np.save(folder / f"{split}-labels.npy", labels)
    shards: list[dict] = []
    writer: Any = None
    written = 0
    for position, (path, label) in enumerate(files):
        try:
            encoded = path.read_bytes()
            shapes.add(pixels(decode(encoded)).shape)
        except (OSError, Undecodable) as error:
            raise DataError(f"{path} is damaged: {error}. Replace or remove it.") from error
        if writer is None or written > shard_bytes:
            if writer is not None:
                writer.close()
            shards.append({"file": f"{split}-{len(shards):05d}.array_record", "examples": 0})
            # One record a chunk, for random access; JPEGs do not compress.
            writer, written = (
                ArrayRecordWriter(str(folder / shards[-1]["file"]), "group_size:1,uncompressed"),
                0,
            )
        writer.write(HEADER.pack(position, label) + encoded)
        shards[-1]["examples"] += 1
        written += len(encoded)
    writer.close()
    labels_entry = {"file": f"{split}-labels.npy", "examples": len(labels)}
    for entry in (labels_entry, *shards):
        path = folder / entry["file"]
        entry |= {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return {"examples": len(labels), "labels": labels_entry, "shards": shards}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------- TFDS's records


@dataclasses.dataclass(frozen=True)
class ParseExample:
    """Encoded image and label of a TFDS example; `features` holds these two."""

    features: Any

    def __call__(self, record: bytes, position: int) -> tuple[bytes, int]:
        import tensorflow_datasets as tfds
        from google.protobuf.message import DecodeError

        try:
            example = self.features.deserialize_example_np(
                record, decoders={"image": tfds.decode.SkipDecoding()}
            )
        except DecodeError as error:
            raise ValueError(str(error)) from error
        if example["image"] is None or example["label"] is None:
            raise ValueError("it holds no image and label")
        return example["image"], int(example["label"])


def tfds_source(builder, split: str) -> Source:
    """The records of a split of a prepared TFDS set that has "image" and "label"; without a
    digest."""
    import tensorflow_datasets as tfds

    features = {name: builder.info.features[name] for name in ("image", "label")}
    instructions = builder.info.splits[split].file_instructions
    shards = tuple((os.fspath(part.filename), part.skip, part.take) for part in instructions)
    remedy = f"Remove {builder.data_path} to have TFDS prepare the set again."
    return Source(shards, ParseExample(tfds.features.FeaturesDict(features)), "", remedy)


def open_tfds(builder, split: str, image_size: int | None = None) -> tuple[Images, np.ndarray]:
    """Images, on disk, and labels ``(N,)`` of a split of a prepared TFDS set.

    The first call reads all records, for labels, sizes and a hash, and keeps these beside them.

    Raises:
        DataError: no 8-bit images of 1, 3 or 4 channels; several sizes without an image_size;
            damaged records.
    """
    import tensorflow_datasets as tfds

    image, name = builder.info.features["image"], builder.info.full_name
    if (
        not isinstance(image, tfds.features.Image)
        or image.np_dtype != np.uint8
        or image.shape[-1] not in MODES
    ):
        raise DataError(
            f"TFDS's {name} cannot be read from disk: expected 8-bit images of 1, 3 or 4 channels, "
            f"got {image}."
        )
    source = tfds_source(builder, split)
    labels, sizes, digest = _index(source, name, split, Path(builder.data_path))
    source = dataclasses.replace(source, digest=digest)
    size = tuple(map(int, sizes[0])) if np.all(sizes == sizes[0]) else (None, None)
    return _images(f"TFDS's {name}", source, (*size, image.shape[-1]), image_size), labels


def _index(source, name, split, folder) -> tuple[np.ndarray, np.ndarray, str]:
    """Labels ``(N,)``, heights and widths ``(N, 2)`` and a hash of a source, from the file that
    keeps them or from all."""
    from PIL import Image

    kept = folder / f"lipjax-{split}.npz"
    stamp = json.dumps(
        [[os.path.basename(path), os.path.getsize(path), *rest] for path, *rest in source.shards]
    )
    try:
        with np.load(kept, allow_pickle=False) as file:
            if str(file["stamp"]) == stamp:
                return file["labels"], file["sizes"], str(file["digest"])
    except (OSError, ValueError, KeyError, EOFError):
        pass  # not there, or not whole: it is made anew
    if len(source) > 10_000:
        print(
            f"indexing {name}, {split}, {len(source)} records, once ...",
            file=sys.stderr,
            flush=True,
        )
    labels, sizes, digest = (
        np.empty(len(source), np.int32),
        np.empty((len(source), 2), np.int32),
        hashlib.sha256(),
    )
    for position in range(len(source)):
        encoded, labels[position] = source.read(position)
        digest.update(hashlib.sha256(encoded).digest())
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                sizes[position] = image.size[::-1]
        except (OSError, SyntaxError, ValueError) as error:
            raise source.damaged(position, "no image") from error
    try:
        written = kept.with_name(f"{kept.name}.{os.getpid()}")
        with open(written, "wb") as raw:
            np.savez(raw, labels=labels, sizes=sizes, digest=digest.hexdigest(), stamp=stamp)
        written.replace(kept)
    except OSError as error:
        print(f"the index of {name} cannot be kept in {folder}: {error.strerror}", file=sys.stderr)
    return labels, sizes, digest.hexdigest()


# ------------------------------------------------------------------------------------------ command


def summary(description: dict) -> str:
    """One line about a folder of records."""
    counts = ", ".join(
        f"{about['examples']} {split}" for split, about in description["splits"].items()
    )
    shape = description["image_shape"]
    shape = "several sizes" if shape == "varies" else "x".join(map(str, shape))
    return (
        f"{description['name']}: {counts} images of {shape}, {len(description['classes'])} classes"
    )


def main(arguments: Iterable[str] | None = None) -> None:
    """Converts a folder, or prepares and indexes a TFDS set."""
    parser = argparse.ArgumentParser(prog="python -m lipjax.data.records", description=main.__doc__)
    parser.add_argument("name", help="folder:<path> in TinyImageNet's layout, or a TFDS name")
    parser.add_argument("--out", type=Path, help="the new folder of records")
    parser.add_argument("--data_dir", help="where TFDS keeps its sets")
    parser.add_argument("--manual_dir", help="a folder that holds a TFDS set's original archives")
    options = parser.parse_args(None if arguments is None else list(arguments))
    if not options.name.startswith("folder:"):
        builder = sets.tfds_builder(options.name, options.data_dir, options.manual_dir)
        for split in builder.info.splits:
            open_tfds(builder, split, image_size=1)
        print(
            f"{builder.data_path} is prepared and indexed; train with "
            f"--config.data.name={options.name}"
        )
        return
    if options.out is None:
        parser.error("folder: needs --out, the new folder of records")
    if (options.out.expanduser() / DESCRIPTION).exists():
        print(f"{options.out} is complete, all hashes are right; {summary(verify(options.out))}")
        return
    description = convert(Path(options.name.removeprefix("folder:")), options.out)
    print(f"{summary(description)}; train with --config.data.name=records:{options.out}")


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as error:
        raise SystemExit(f"lipjax.data.records: {error}") from None
