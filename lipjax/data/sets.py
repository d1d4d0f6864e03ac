"""Image-classification data sets: bundled digits, TFDS sets by name, npz files, image folders,
records on disk.

Images stay as they are stored (uint8 where they are) and become floats in [0, 1] only batch by
batch. Sets that fit are kept in memory; large ones, and those with images of several sizes, stay
encoded on disk and are decoded when they are indexed (`lipjax.data.records`). The test set is never
touched by anything that selects: a validation split is held out of the training set.

TFDS's stock builders need TensorFlow to download and prepare a set, and nothing else here does. So
preparing runs in a child process, once per set, and TensorFlow enters neither training nor the
accelerator's memory: ``python -m lipjax.data NAME [--data_dir=...] [--manual_dir=...]`` does the
same by hand.
"""

import argparse
import dataclasses
import difflib
import hashlib
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:  # lipjax.data.records builds on this module
    from lipjax.data import records

DIGITS_TEST = 360  # of scikit-learn's 1797 digits

# TFDS sets of up to this many decoded bytes, both splits together, are kept in memory.
IN_MEMORY_BYTES = 2**31

# Share of the images that becomes the test split of a TFDS set that has none.
HELD_OUT = 0.2

# Other names of TFDS sets.
ALIASES = {"svhn": "svhn_cropped", "fashion-mnist": "fashion_mnist", "imagenet": "imagenet2012"}


class DataError(ValueError):
    """A data set is missing, damaged or not what it should be; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One split.

    Attributes:
        name: as given to `load`.
        split: "train", "validation" or "test".
        images: ``(N, H, W, C)`` as stored, uint8 or float32: an array, or a `records.Images`, which
            decodes what it is indexed with.
        labels: ``(N,)`` int32.
        levels: the stored value that means 1.0: 255 for uint8, 16 for digits, 1 for floats.
        classes: number of classes.
        indices: ``(N,)`` position of each example in its source split, so that a result names its
            image.
        note: a disclosure to print beside figures; mostly empty.
    """

    name: str
    split: str
    images: "np.ndarray | records.Images"
    labels: np.ndarray
    levels: float
    classes: int
    indices: np.ndarray
    note: str = ""

    def unit_images(self, rows) -> np.ndarray:
        """The images at `rows` (anything that indexes axis 0) as float32 in [0, 1]."""
        return self.images[rows].astype(np.float32) / np.float32(self.levels)

    def take(self, rows: np.ndarray, split: str | None = None) -> "Dataset":
        """The examples at `rows`, in that order; nothing is decoded."""
        return dataclasses.replace(
            self,
            split=split or self.split,
            images=self.images[rows]
            if isinstance(self.images, np.ndarray)
            else self.images.subset(rows),
            labels=self.labels[rows],
            indices=self.indices[rows],
        )


@dataclasses.dataclass(frozen=True)
class Splits:
    """Training, validation and test data; the first two share no example."""

    train: Dataset
    validation: Dataset
    test: Dataset


def load(
    name: str,
    *,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    validation_fraction: float = 0.1,
    validation_seed: int = 0,
    train_examples: int | None = None,
    test_examples: int | None = None,
    image_size: int | None = None,
) -> Splits:
    """Loads a data set by name; everything is a function of the arguments.

    Args:
        name: "digits" (comes with scikit-learn, no download), "npz:<train>,<test>" or "npz:<one
            file>", "folder:<path>" in TinyImageNet's layout, "records:<path>" as ``python -m
            lipjax.data.records`` writes it, or the name of a TFDS image-classification set such as
            "mnist", "svhn" or "imagenet2012".
        data_dir: where TFDS keeps prepared sets; its own default (~/tensorflow_datasets) if None.
        manual_dir: a folder that already holds the original archives of a TFDS set: nothing is
            downloaded then.
        validation_fraction: share of the training set that is held out to select checkpoints; in
            (0, 1).
        validation_seed: which examples; one value for all runs that are compared.
        train_examples, test_examples: take only so many, the first of a fixed shuffle; None for
            all.
        image_size: every image is resized so that its shorter side is image_size * 256 / 224
            (rounded), and its central square of image_size is taken; None for images as they are
            stored. Only for sets of encoded images: records, folders and TFDS. Records and TFDS
                sets are then decoded when they are indexed, whatever their size.

    Raises:
        DataError: missing or damaged data, with what to install or download and where to put it;
            more examples asked for than there are; a fraction outside (0, 1); images of several
            sizes without an image_size.
    """
    if not 0 < validation_fraction < 1:
        raise DataError(
            f"validation_fraction must lie in (0, 1), got {validation_fraction}: a checkpoint is "
            "selected on held-out "
            "training images, never on the test set."
        )
    if image_size is not None and (image_size < 1 or name == "digits" or name.startswith("npz:")):
        raise DataError(
            "image_size must be at least 1, and is for sets of encoded images (records:, folder:, "
            f"TFDS); got {image_size} "
            f"for {name}. Leave it out (data.image_size=0) to take images as they are stored."
        )
    if name == "digits":
        train, test = _digits()
    elif name.startswith("npz:"):
        train, test = _npz(name)
    elif name.startswith("folder:"):
        train, test = _folder(name, image_size)
    elif name.startswith("records:"):
        train, test = _records(name, image_size)
    else:
        train, test = _tfds(name, data_dir, manual_dir, image_size)
    order = np.random.default_rng(validation_seed).permutation(len(train.labels))
    held_out = max(1, round(len(order) * validation_fraction))
    if held_out >= len(order):
        raise DataError(f"{name}: {len(order)} training images are too few to hold {held_out} out.")
    validation = train.take(np.sort(order[:held_out]), "validation")
    kept = order[held_out:]
    train = train.take(np.sort(kept[: _at_most(train_examples, len(kept), name, "training")]))
    shuffled = np.random.default_rng(validation_seed + 1).permutation(len(test.labels))
    test = test.take(np.sort(shuffled[: _at_most(test_examples, len(shuffled), name, "test")]))
    return Splits(train, validation, test)


def _at_most(wanted, there, name, what):
    if wanted is None:
        return there
    if not 0 < wanted <= there:
        raise DataError(f"{name} has {there} {what} images, asked for {wanted}.")
    return wanted


def fingerprint(dataset: Dataset) -> str:
    """The first 16 hex digits of the SHA-256 of images and labels: which data a figure is about.

    Of images on disk nothing is decoded: the hashes of what is stored, the choice and the size
    stand for them. So one set has one fingerprint in memory and another on disk.
    """
    digest = hashlib.sha256()
    images = dataset.images if isinstance(dataset.images, np.ndarray) else dataset.images.identity()
    for array in (images, dataset.labels):
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def random_crop_and_flip(
    images: jax.Array, key: jax.Array, *, padding: int = 4, first=0
) -> jax.Array:
    """Each image zero-padded by `padding`, cropped at random to its size and mirrored with
    probability 1/2.

    Args:
        images: ``(batch, height, width, channels)``.
        key: randomness of the whole batch; the same key gives the same result.
        first: place in the batch of the first of these images: what becomes of an image depends on
            its place, not on which others are here. May be traced.
    """
    height, width, channels = images.shape[1:]
    padded = jnp.pad(images, [(0, 0), (padding, padding), (padding, padding), (0, 0)])

    def one(image, place):
        offset_key, flip_key = jax.random.split(jax.random.fold_in(key, place))
        offset = jax.random.randint(offset_key, (2,), 0, 2 * padding + 1)
        crop = jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, channels))
        return jnp.where(jax.random.bernoulli(flip_key), crop[:, ::-1], crop)

    return jax.vmap(one)(padded, first + jnp.arange(len(images)))


def _dataset(name, split, images, labels, levels=None, note="", classes=None) -> Dataset:
    images, labels = np.asarray(images), np.asarray(labels).reshape(-1)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or len(images) != len(labels) or len(labels) == 0:
        raise DataError(
            f"{name}, {split}: images of shape {images.shape} do not fit {len(labels)} labels."
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise DataError(
            f"{name}, {split}: labels must be integers from 0 on, got {labels.dtype}, "
            f"{labels.min()} first."
        )
    if images.dtype == np.uint8:
        levels = levels or 255.0
        if images.max() <= 1:
            raise DataError(
                f"{name}, {split}: no uint8 pixel is above {images.max()}, and white is 255: "
                "floats in [0, 1] lose "
                "everything when they are cast to uint8; store them as floats, or times 255."
            )
    elif np.issubdtype(images.dtype, np.floating):
        levels, images = levels or 1.0, images.astype(np.float32)
        low, high = images.min(), images.max()
        if not (low >= 0 and high <= levels):
            raise DataError(
                f"{name}, {split}: float images must lie in [0, 1], got {low} to {high}. Store "
                "0..255 as uint8, or divide "
                "by 255; do not normalise: epsilon is a radius on pixels in [0, 1]."
            )
    else:
        raise DataError(
            f"{name}, {split}: images must be uint8 or floats in [0, 1], got {images.dtype}."
        )
    labels = labels.astype(np.int32)
    classes = classes or int(labels.max()) + 1
    if classes < 2:
        raise DataError(f"{name}, {split}: only one class.")
    return Dataset(
        name, split, images, labels, float(levels), classes, np.arange(len(labels)), note
    )


def _pair(name, train, test) -> tuple[Dataset, Dataset]:
    if train.images.shape[1:] != test.images.shape[1:] or train.levels != test.levels:
        raise DataError(
            f"{name}: training images {train.images.shape[1:]} differ from test images "
            f"{test.images.shape[1:]}."
        )
    classes = max(train.classes, test.classes)
    return dataclasses.replace(train, classes=classes), dataclasses.replace(test, classes=classes)


def _digits():
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("the digits come with scikit-learn: pip install scikit-learn.") from error
    digits = load_digits()
    # One stratified split for ever, whatever the seeds of a run: figures of different runs are
    # about the same images.
    rows = np.arange(len(digits.target))
    train, test = train_test_split(
        rows, test_size=DIGITS_TEST, random_state=0, stratify=digits.target
    )
    images = digits.images.astype(np.float32)
    whole = _dataset("digits", "train", images, digits.target, levels=16.0)
    return whole.take(np.sort(train), "train"), whole.take(np.sort(test), "test")


def _npz(name):
    paths = [Path(p).expanduser() for p in name.removeprefix("npz:").split(",")]
    if len(paths) > 2:
        raise DataError(f"{name}: expected npz:<train.npz>,<test.npz> or npz:<file.npz>.")
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"{path.absolute()} is not there; npz: takes paths of files that np.savez wrote."
            )
    files = []
    for path in paths:
        try:
            with open(path, "rb") as raw:
                file = np.load(raw)
                if isinstance(file, np.ndarray):
                    raise ValueError("it is a single array (npy)")
                files.append({key: file[key] for key in file.files})
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path} cannot be read as npz: {error}") from error
    if len(files) == 1:
        wanted = ("x_train", "y_train", "x_test", "y_test")
        if not all(key in files[0] for key in wanted):
            raise DataError(
                f"{paths[0]} alone must hold {', '.join(wanted)}; it holds {', '.join(files[0])}. "
                "Two files are given as "
                "npz:<train.npz>,<test.npz>."
            )
        parts = [
            (files[0]["x_train"], files[0]["y_train"]),
            (files[0]["x_test"], files[0]["y_test"]),
        ]
    else:
        parts = []
        for path, file in zip(paths, files, strict=True):
            names = next(
                (n for n in (("images", "labels"), ("x", "y")) if n[0] in file and n[1] in file),
                None,
            )
            if names is None:
                raise DataError(
                    f"{path} must hold images and labels (or x and y); it holds {', '.join(file)}."
                )
            parts.append((file[names[0]], file[names[1]]))
    lossy = files[-1].get("lossy")
    test = _dataset(name, "test", *parts[1])
    if lossy is not None:
        note = (
            f"{np.size(lossy)} of the file's {len(test.labels)} test images are not exact "
            "copies of the official ones"
        )
        test = dataclasses.replace(test, note=note)
    return _pair(name, _dataset(name, "train", *parts[0]), test)


def folder_files(root: Path) -> tuple[list[str], dict[str, list[tuple[Path, int]]]]:
    """What a folder in TinyImageNet's layout holds: names of the classes, and ``(path, label)`` of
    each image.

    The images are those of "train" and "test" (the official validation images), in the order of
    `load`.

    Raises:
        DataError: another layout, an unknown class, a split without images.
    """
    root = root.expanduser()
    if not (root / "train").is_dir() or not (root / "val" / "val_annotations.txt").is_file():
        raise DataError(
            f"{root.absolute()} has not TinyImageNet's layout (train/<class>/images/*, "
            "val/images/*, "
            "val/val_annotations.txt). For TinyImageNet itself download tiny-imagenet-200.zip from "
            "cs231n.stanford.edu, "
            f"unpack it and give the folder as folder:<path>."
        )
    listed = root / "wnids.txt"
    names = sorted(
        listed.read_text().split()
        if listed.is_file()
        else [p.name for p in (root / "train").iterdir() if p.is_dir()]
    )
    number = {wnid: i for i, wnid in enumerate(names)}
    files: dict[str, list[tuple[Path, int]]] = {"train": [], "test": []}
    for wnid in names:
        files["train"] += [
            (path, number[wnid]) for path in sorted((root / "train" / wnid).rglob("*.JPEG"))
        ]
    for number_of_line, line in enumerate(
        (root / "val" / "val_annotations.txt").read_text().splitlines(), 1
    ):
        if "\t" not in line:
            raise DataError(
                f"{root}: line {number_of_line} of val_annotations.txt is not <file>, tab, "
                f"<class>: {line!r}."
            )
        file, wnid = line.split("\t")[:2]
        path = root / "val" / "images" / file
        if wnid not in number:
            raise DataError(
                f"{root}: val_annotations.txt names the class {wnid}, which wnids.txt does not."
            )
        if path.is_file():  # a subset of the images keeps the full list
            files["test"].append((path, number[wnid]))
    for split, found in files.items():
        if not found:
            where = (
                "train/<class>/images/*.JPEG"
                if split == "train"
                else "val/images/, named in val_annotations.txt"
            )
            raise DataError(f"{root}: no {split} images found ({where}).")
    return names, files


def _folder(name, image_size):
    from lipjax.data import records

    classes, files = folder_files(Path(name.removeprefix("folder:")))
    parts = []
    for split, found in files.items():
        images = []
        for path, _ in found:
            try:
                images.append(records.pixels(records.decode(path.read_bytes()), image_size))
            except (OSError, records.Undecodable) as error:
                raise DataError(f"{path} is damaged: {error}. Replace or remove it.") from error
            if images[-1].shape != images[0].shape:
                raise DataError(
                    f"{path} is {images[-1].shape}, {found[0][0]} is {images[0].shape}: resize "
                    "them to one size, or give "
                    "an image_size (--config.data.image_size=64)."
                )
        parts.append(
            _dataset(
                name, split, np.stack(images), [label for _, label in found], classes=len(classes)
            )
        )
    return _pair(name, *parts)


def _records(name, image_size):
    from lipjax.data import records

    stored = records.open_folder(Path(name.removeprefix("records:")), image_size)
    parts = [
        _on_disk(name, split, *stored.splits[split], classes=stored.classes)
        for split in ("train", "test")
    ]
    return _pair(name, *parts)


def _on_disk(name, split, images, labels, classes, note="") -> Dataset:
    if not (labels.min() >= 0 and labels.max() < classes):
        raise DataError(
            f"{name}, {split}: labels from {labels.min()} to {labels.max()} do not fit {classes} "
            "classes."
        )
    return Dataset(
        name, split, images, labels.astype(np.int32), 255.0, classes, np.arange(len(labels)), note
    )


def _tfds(name, data_dir, manual_dir, image_size):
    from lipjax.data import records

    builder = tfds_builder(name, data_dir, manual_dir)
    features, splits = builder.info.features, builder.info.splits
    if "image" not in features or "label" not in features:
        raise DataError(f"TFDS's {name} is not image classification: it has {', '.join(features)}.")
    if "train" not in splits:
        raise DataError(f"TFDS's {name} has no train split: {', '.join(splits)}.")
    parts = {"train": "train"}
    for split in ("validation", "test"):
        # ImageNet's test labels are withheld: TFDS has -1 in their place.
        if split in splits and records.tfds_source(builder, split).read(0)[1] >= 0:
            parts["test"] = split
    examples = sum(splits[split].num_examples for split in parts.values())
    shape = features["image"].shape
    if None not in shape and examples * np.prod(shape) <= IN_MEMORY_BYTES and image_size is None:
        found = [_in_memory(name, builder, *part) for part in parts.items()]
    else:
        found = [_from_tfds(name, builder, *part, image_size) for part in parts.items()]
        small = sum(part.images.nbytes for part in found) <= IN_MEMORY_BYTES
        if small and image_size is None:
            found = [dataclasses.replace(part, images=part.images[:]) for part in found]
    if len(found) == 1:
        found = _hold_out(found[0])
    return _pair(name, *found)


def _hold_out(whole: Dataset) -> tuple[Dataset, Dataset]:
    """A fixed test split, for ever, whatever the seeds of a run: figures of different runs are
    about the same images."""
    order = np.random.default_rng(0).permutation(len(whole.labels))
    held_out = max(1, round(len(order) * HELD_OUT))
    note = (
        f"the set has only a train split: its test images here are {held_out} of its "
        f"{len(order)} images, a fixed choice"
    )
    whole = dataclasses.replace(whole, note=note)
    return whole.take(np.sort(order[held_out:]), "train"), whole.take(
        np.sort(order[:held_out]), "test"
    )


def _in_memory(name, builder, split, source_split) -> Dataset:
    from lipjax.data import records

    source = builder.as_data_source(split=source_split)
    images, labels = [], np.empty(len(source), np.int64)
    for i in range(len(source)):
        try:
            example = source[i]
        except (RuntimeError, ValueError, OSError) as error:
            raise records.tfds_source(builder, source_split).damaged(i, error) from error
        images.append(example["image"])
        labels[i] = example["label"]
    return _dataset(
        name, split, np.stack(images), labels, classes=builder.info.features["label"].num_classes
    )


def _from_tfds(name, builder, split, source_split, image_size) -> Dataset:
    from lipjax.data import records

    images, labels = records.open_tfds(builder, source_split, image_size)
    return _on_disk(name, split, images, labels, builder.info.features["label"].num_classes)


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
        _prepare_in_child(name, data_dir, manual_dir)
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record", try_gcs=False)
    return builder


def _prepare_in_child(name, data_dir, manual_dir):
    print(f"preparing {name} through TFDS, once ...", file=sys.stderr, flush=True)
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
    if done.returncode:
        tail = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        missing = "tensorflow" in done.stderr and "ModuleNotFoundError" in done.stderr
        raise DataError(
            f"TFDS could not prepare {name}: {tail[0]}. "
            + (
                "Its builders need TensorFlow: pip install -r requirements.txt (or tensorflow-cpu)."
                if missing
                else "Without internet, download the original archives elsewhere, put them in one "
                "folder and give it as "
                "--config.data.manual_dir; or use npz:<files>."
            )
        )


def _prepare(name: str, data_dir: str | None, manual_dir: str | None) -> None:
    """Downloads (or takes from `manual_dir`) and prepares a TFDS set as array_record. Imports
    TensorFlow."""
    import tensorflow_datasets as tfds

    builder = tfds.builder(
        ALIASES.get(name, name), data_dir=data_dir, file_format="array_record", try_gcs=False
    )
    config = tfds.download.DownloadConfig(
        manual_dir=str(Path(manual_dir).expanduser().absolute()) if manual_dir else None,
        try_download_gcs=False,
    )
    builder.download_and_prepare(download_config=config)


def listed(data_dir: str | None = None) -> str:
    """The names that `load` takes, and the TFDS sets that are prepared in `data_dir` (its own
    default if None), as text."""
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    found = {
        info.relative_to(root).parts[0]
        for info in root.glob("*/**/dataset_info.json")
        if _readable(info.parent)
    }
    return "\n".join(
        [
            "digits              scikit-learn's 8x8 digits, bundled, no download",
            "npz:<train>,<test>  two files of images (N, H, W, C) and labels (N,), or one of "
            "x_train, y_train, ...",
            "folder:<path>       image files in TinyImageNet's layout",
            "records:<path>      as `lipjax data prepare folder:<path> --out=<path>` writes it: "
            "large sets, read lazily",
            "<TFDS name>         mnist, cifar10, cifar100, svhn, imagenet, ...: downloaded and "
            "prepared on first use, or by",
            "                    `lipjax data prepare <name>`, with --manual_dir from archives "
            "that are here",
            f"prepared in {root}: {', '.join(sorted(found)) or 'none'}",
        ]
    )


def _readable(folder: Path) -> bool:
    return any(folder.glob("*.array_record*"))


def described(splits: Splits) -> str:
    """Sizes, shape, classes, range and fingerprints of a data set, as text for people."""
    lines = [splits.train.name]
    for part in (splits.train, splits.validation, splits.test):
        counts = np.bincount(part.labels, minlength=part.classes)
        lines.append(
            f"{part.split:11}{len(part.labels)} images, {counts.min()} to {counts.max()} of each "
            "class, "
            f"fingerprint {fingerprint(part)}"
        )
    test = splits.test
    values = test.unit_images(slice(0, 1000))
    lines.append(
        f"images of {tuple(test.images.shape[1:])}, {test.classes} classes; stored "
        f"{test.images.dtype}, {test.levels:g} means "
        f"1.0; the first test images go from {values.min():.3g} to {values.max():.3g}, mean "
        f"{values.mean():.3g}"
    )
    if test.note:
        lines.append(f"note: {test.note}")
    lines.append(
        "validation images are held out of the training set; epsilon is a radius on pixels in [0, "
        "1]"
    )
    return "\n".join(lines)


def main():
    """The command ``python -m lipjax.data NAME``: prepares a set of TFDS in this process."""
    parser = argparse.ArgumentParser(description=_prepare.__doc__)
    parser.add_argument("name")
    parser.add_argument("--data_dir")
    parser.add_argument("--manual_dir")
    arguments = parser.parse_args()
    _prepare(arguments.name, arguments.data_dir, arguments.manual_dir)
