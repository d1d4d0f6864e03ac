"""Sets of TFDS: prepared in a child process, read from its shards or kept in memory.

TFDS's stock builders need TensorFlow to download and prepare a set, and nothing else here does. So
preparing runs in a child process, once per set, and TensorFlow enters neither training nor the
accelerator's memory: ``python -m lipjax.data NAME [--data_dir=...] [--manual_dir=...]`` does the
same by hand.

Its shards are read where they are. Labels and sizes are found in one pass over the records and kept
beside them, where that folder can be written to.
"""

import argparse
import dataclasses
import difflib
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from lipjax.data.dataset import Dataset, in_memory, on_disk, pair
from lipjax.data.errors import DataError
from lipjax.data.images import MODES, Images, Source, images_of

# TFDS sets of up to this many decoded bytes, both splits together, are kept in memory.
IN_MEMORY_BYTES = 2**31

# Share of the images that becomes the test split of a TFDS set that has none.
HELD_OUT = 0.2

# How long a server is waited for before a download is given up.
REACH_SECONDS = 5.0

# Other names of TFDS sets.
ALIASES = {"svhn": "svhn_cropped", "fashion-mnist": "fashion_mnist", "imagenet": "imagenet2012"}


def load(
    name: str, data_dir: str | None, manual_dir: str | None, image_size: int | None
) -> tuple[Dataset, Dataset]:
    """Training and test split of a TFDS set; arguments and errors as of `sets.load`."""
    builder = tfds_builder(name, data_dir, manual_dir)
    features = builder.info.features
    splits = builder.info.splits
    if "image" not in features or "label" not in features:
        raise DataError(f"TFDS's {name} is not image classification: it has {', '.join(features)}.")
    if "train" not in splits:
        raise DataError(f"TFDS's {name} has no train split: {', '.join(splits)}.")
    parts = {"train": "train"}
    for split in ("validation", "test"):
        # ImageNet's test labels are withheld: TFDS has -1 in their place.
        if split in splits and tfds_source(builder, split).read(0)[1] >= 0:
            parts["test"] = split

    examples = sum(splits[split].num_examples for split in parts.values())
    shape = features["image"].shape
    if None not in shape and examples * np.prod(shape) <= IN_MEMORY_BYTES and image_size is None:
        found = [_whole(name, builder, *part) for part in parts.items()]
    else:
        found = [_from_shards(name, builder, *part, image_size) for part in parts.items()]
        small = sum(part.images.nbytes for part in found) <= IN_MEMORY_BYTES
        if small and image_size is None:
            found = [dataclasses.replace(part, images=part.images[:]) for part in found]
    if len(found) == 1:
        found = [*_hold_out(found[0])]
    return pair(name, *found)


def _hold_out(whole: Dataset) -> tuple[Dataset, Dataset]:
    """A fixed test split, for ever, whatever the seeds of a run.

    So figures of different runs are about the same images.
    """
    order = np.random.default_rng(0).permutation(len(whole.labels))
    held_out = max(1, round(len(order) * HELD_OUT))
    note = (
        f"the set has only a train split: its test images here are {held_out} of its "
        f"{len(order)} images, a fixed choice"
    )
    whole = dataclasses.replace(whole, note=note)
    train = whole.take(np.sort(order[held_out:]), "train")
    return train, whole.take(np.sort(order[:held_out]), "test")


def _whole(name, builder, split, source_split) -> Dataset:
    """A split, decoded by TFDS, in memory."""
    source = builder.as_data_source(split=source_split)
    classes = builder.info.features["label"].num_classes
    images = []
    labels = np.empty(len(source), np.int64)
    for i in range(len(source)):
        try:
            example = source[i]
        except (RuntimeError, ValueError, OSError) as error:
            raise tfds_source(builder, source_split).damaged(i, error) from error
        images.append(example["image"])
        labels[i] = example["label"]
    return in_memory(name, split, np.stack(images), labels, classes=classes)


def _from_shards(name, builder, split, source_split, image_size) -> Dataset:
    """A split that stays on disk."""
    images, labels = open_tfds(builder, source_split, image_size)
    return on_disk(name, split, images, labels, builder.info.features["label"].num_classes)


# --------------------------------------------------------------------------------- preparing


def tfds_builder(name: str, data_dir: str | None, manual_dir: str | None):
    """The TFDS builder of a set, after it was prepared (in a child process) if it was not yet.

    Raises:
        DataError: TFDS is not installed, does not know the name, or cannot prepare the set.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"{name!r} is looked up in TFDS, which is not installed: pip install -r "
            "requirements.txt."
        ) from error
    name = ALIASES.get(name, name)
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record", try_gcs=False)
    except tfds.core.registered.DatasetNotFoundError as error:
        known = ["digits", *ALIASES, *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DataError(
            f"there is no data set called {name!r} (digits, npz:, folder:, records: or a TFDS "
            f"name).{hint}"
        ) from error
    if not builder.is_prepared():
        _say_what_is_tried(builder, manual_dir)
        _prepare_in_child(builder, name, data_dir, manual_dir)
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record", try_gcs=False)
    return builder


def _say_what_is_tried(builder, manual_dir: str | None) -> None:
    """Says where a set is to come from.

    Raises:
        DataError: it is to be downloaded, and there is no way to its first server. TFDS itself
            would go on trying for minutes, without a word.
    """
    name = builder.name
    if manual_dir:
        folder = Path(manual_dir).expanduser().absolute()
        if not folder.is_dir():
            raise DataError(
                f"manual_dir: {folder} is no folder; expected one with the original archives of "
                f"{name}, {_archives(builder)}."
            )
        text = f"preparing {name} through TFDS, once, from {folder} into {builder.data_path} ..."
        print(text, file=sys.stderr, flush=True)
        return

    urls = list(builder.url_infos)
    hosts = sorted({urllib.parse.urlsplit(url).hostname or url for url in urls})
    source = f"from {', '.join(hosts)} " if hosts else ""
    print(
        f"preparing {name} through TFDS, once: downloading {source}into {builder.data_path} ...",
        file=sys.stderr,
        flush=True,
    )
    # With a proxy, or with archives of an earlier try, TFDS may do without the server.
    kept = Path(builder.data_path).parents[1] / "downloads"
    downloads = any(path.is_file() for path in kept.rglob("*")) if kept.is_dir() else False
    if hosts and not urllib.request.getproxies() and not downloads and not reachable(urls[0]):
        raise DataError(
            f"{name}: {urllib.parse.urlsplit(urls[0]).hostname} cannot be reached within "
            f"{REACH_SECONDS:g} s. {_without_internet(builder)}"
        )


def reachable(url: str) -> bool:
    """Whether the server of an address takes a connection within `REACH_SECONDS`."""
    parts = urllib.parse.urlsplit(url)
    port = parts.port or {"http": 80, "ftp": 21}.get(parts.scheme, 443)
    found = []

    def connect():
        try:
            with socket.create_connection((parts.hostname, port), timeout=REACH_SECONDS):
                found.append(True)
        except OSError:
            pass

    # In a thread, since looking up a name has no time limit.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    return bool(found)


def _archives(builder) -> str:
    """The names of the first archives of a set."""
    names = [info.filename or url.rpartition("/")[2] for url, info in builder.url_infos.items()]
    return ", ".join(names[:4]) + (f", ... ({len(names)} files)" if len(names) > 4 else "")


def _without_internet(builder) -> str:
    archives = _archives(builder)
    which = f" ({archives})" if archives else ""
    return (
        f"Without internet, download the original archives{which} elsewhere, put them in one "
        "folder and give it as --config.data.manual_dir=<folder>, or run `lipjax data prepare "
        f"{builder.name} --manual_dir=<folder>` once: they are read from there and nothing is "
        "downloaded. Or use npz:<files>."
    )


def _prepare_in_child(builder, name, data_dir, manual_dir):
    command = [sys.executable, "-m", "lipjax.data", name]
    command += [f"--data_dir={data_dir}"] if data_dir else []
    command += [f"--manual_dir={manual_dir}"] if manual_dir else []
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if not done.returncode:
        return
    tail = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
    if "tensorflow" in done.stderr and "ModuleNotFoundError" in done.stderr:
        remedy = (
            "Its builders need TensorFlow: pip install -r requirements.txt (or tensorflow-cpu)."
        )
    else:
        remedy = _without_internet(builder)
    raise DataError(f"TFDS could not prepare {name}: {tail[0]}. {remedy}")


def _prepare(name: str, data_dir: str | None, manual_dir: str | None) -> None:
    """Downloads (or takes from `manual_dir`) and prepares a TFDS set. Imports TensorFlow."""
    import tensorflow_datasets as tfds

    name = ALIASES.get(name, name)
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record", try_gcs=False)
    archives = str(Path(manual_dir).expanduser().absolute()) if manual_dir else None
    config = tfds.download.DownloadConfig(manual_dir=archives, try_download_gcs=False)
    builder.download_and_prepare(download_config=config)


def main():
    """The command ``python -m lipjax.data NAME``: prepares a set of TFDS in this process."""
    parser = argparse.ArgumentParser(description=_prepare.__doc__)
    parser.add_argument("name")
    parser.add_argument("--data_dir")
    parser.add_argument("--manual_dir")
    arguments = parser.parse_args()
    _prepare(arguments.name, arguments.data_dir, arguments.manual_dir)


# ---------------------------------------------------------------------------- TFDS's records


def open_tfds(builder, split: str, image_size: int | None = None) -> tuple[Images, np.ndarray]:
    """Images, on disk, and labels ``(N,)`` of a split of a prepared TFDS set.

    The first call reads all records, for labels, sizes and a hash, and keeps these beside them.

    Raises:
        DataError: no 8-bit images of 1, 3 or 4 channels; several sizes without an image_size;
            damaged records.
    """
    import tensorflow_datasets as tfds

    image = builder.info.features["image"]
    name = builder.info.full_name
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
    return images_of(f"TFDS's {name}", source, (*size, image.shape[-1]), image_size), labels


def tfds_source(builder, split: str) -> Source:
    """The records of a split of a prepared set of images and labels; without a digest."""
    import tensorflow_datasets as tfds

    features = {name: builder.info.features[name] for name in ("image", "label")}
    instructions = builder.info.splits[split].file_instructions
    shards = tuple((os.fspath(part.filename), part.skip, part.take) for part in instructions)
    remedy = f"Remove {builder.data_path} to have TFDS prepare the set again."
    return Source(shards, ParseExample(tfds.features.FeaturesDict(features)), "", remedy)


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


def _index(source: Source, name: str, split: str, folder: Path):
    """Labels ``(N,)``, heights and widths ``(N, 2)`` and a hash of a source.

    From the file that keeps them, or from all records.
    """
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

    count = len(source)
    if count > 10_000:
        text = f"indexing {name}, {split}, {count} records, once ..."
        print(text, file=sys.stderr, flush=True)
    labels, sizes, digest = _read_all(source)
    try:
        written = kept.with_name(f"{kept.name}.{os.getpid()}")
        with open(written, "wb") as raw:
            np.savez(raw, labels=labels, sizes=sizes, digest=digest, stamp=stamp)
        written.replace(kept)
    except OSError as error:
        print(f"the index of {name} cannot be kept in {folder}: {error.strerror}", file=sys.stderr)
    return labels, sizes, digest


def _read_all(source: Source) -> tuple[np.ndarray, np.ndarray, str]:
    """As `_index`, from the records."""
    from PIL import Image

    labels = np.empty(len(source), np.int32)
    sizes = np.empty((len(source), 2), np.int32)
    digest = hashlib.sha256()
    for position in range(len(source)):
        encoded, labels[position] = source.read(position)
        digest.update(hashlib.sha256(encoded).digest())
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                sizes[position] = image.size[::-1]
        except (OSError, SyntaxError, ValueError) as error:
            raise source.damaged(position, "no image") from error
    return labels, sizes, digest.hexdigest()
