"""Writes folders of records: sets of one's own that stay on disk, in array_record shards.

    python -m lipjax.data.records folder:tiny-imagenet-200 --out=tiny  # once
    python -m lipjax.data.records imagenet2012 --manual_dir=<archives>

The first is trained with as ``--config.data.name=records:tiny``. TFDS keeps such shards itself: the
second prepares and indexes them. The format is described in `lipjax.data.stored`.
"""

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lipjax.data import stored, tfds
from lipjax.data.errors import DataError
from lipjax.data.folders import image_files, unreadable
from lipjax.data.images import Images, Undecodable, decode, pixels

__all__ = ["Images", "convert", "main", "summary", "verify"]

# Shards of about this size can be copied and hashed one by one, and even ImageNet needs few files.
SHARD_BYTES = 2**28


def convert(root: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> dict:
    """Writes a folder of images as records; returns their description.

    Every image is decoded once, which finds the damaged ones.
    `out` appears complete or not at all: everything is written to ``<out>.partial``, which is
    renamed at the end.

    Raises:
        DataError: as `folders.image_files`; a damaged image; `out` or its ``.partial`` exists.
    """
    found = image_files(root)
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
            split: _write_split(partial, split, files, shapes, shard_bytes)
            for split, files in sorted(found.splits.items())
        }
        description = {
            "format": stored.FORMAT,
            "name": root.expanduser().absolute().name,
            "classes": found.classes,
            "note": found.note,
            "image_shape": list(shapes.pop()) if len(shapes) == 1 else "varies",
            "splits": splits,
        }
        (partial / stored.DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return description


def _write_split(folder: Path, split: str, files, shapes: set, shard_bytes: int) -> dict:
    """Writes labels and shards; returns what the description says of them, and fills `shapes`."""
    from array_record.python.array_record_module import ArrayRecordWriter

    labels = np.array([label for _, label in files], np.int32)
    np.save(folder / f"{split}-labels.npy", labels)
    shards: list[dict] = []
    writer: Any = None
    written = 0
    for position, (path, label) in enumerate(files):
        try:
            encoded = path.read_bytes()
            shapes.add(pixels(decode(encoded, as_seen=True)).shape)
        except (OSError, Undecodable) as error:
            raise unreadable(path, error) from error
        if writer is None or written > shard_bytes:
            if writer is not None:
                writer.close()
            shards.append({"file": f"{split}-{len(shards):05d}.array_record", "examples": 0})
            # One record a chunk, for random access; JPEGs do not compress.
            path_of_shard = str(folder / shards[-1]["file"])
            writer = ArrayRecordWriter(path_of_shard, "group_size:1,uncompressed")
            written = 0
        writer.write(stored.HEADER.pack(position, label) + encoded)
        shards[-1]["examples"] += 1
        written += len(encoded)
    writer.close()
    labels_entry = {"file": f"{split}-labels.npy", "examples": len(labels)}
    for entry in (labels_entry, *shards):
        path = folder / entry["file"]
        entry |= {"bytes": path.stat().st_size, "sha256": stored.sha256(path)}
    return {"examples": len(labels), "labels": labels_entry, "shards": shards}


def verify(folder: Path) -> dict:
    """The description of a folder of records, after every file was read and its SHA-256 compared.

    Raises:
        DataError: as `stored.open_folder`; a file whose hash is not the recorded one.
    """
    stored.open_folder(folder, image_size=1)
    folder = folder.expanduser().absolute()
    description = stored.description(folder)
    for about in description["splits"].values():
        for entry in about["shards"]:
            stored.check_hash(folder, entry)
    return description


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
    parser.add_argument("name", help="folder:<path>, or a TFDS name")
    parser.add_argument("--out", type=Path, help="the new folder of records")
    parser.add_argument("--data_dir", help="where TFDS keeps its sets")
    parser.add_argument("--manual_dir", help="a folder that holds a TFDS set's original archives")
    options = parser.parse_args(None if arguments is None else list(arguments))
    if not options.name.startswith("folder:"):
        builder = tfds.tfds_builder(options.name, options.data_dir, options.manual_dir)
        for split in builder.info.splits:
            tfds.open_tfds(builder, split, image_size=1)
        print(
            f"{builder.data_path} is prepared and indexed; train with "
            f"--config.data.name={options.name}"
        )
        return
    if options.out is None:
        parser.error("folder: needs --out, the new folder of records")
    if (options.out.expanduser() / stored.DESCRIPTION).exists():
        print(f"{options.out} is complete, all hashes are right; {summary(verify(options.out))}")
        return
    description = convert(Path(options.name.removeprefix("folder:")), options.out)
    print(f"{summary(description)}; train with --config.data.name=records:{options.out}")


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as error:
        raise SystemExit(f"lipjax.data.records: {error}") from None
