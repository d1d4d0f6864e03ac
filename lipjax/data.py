"""Image-classification data sets in memory: bundled digits, TFDS sets by name, npz files, image folders.

Images stay as they are stored (uint8 where they are) and become floats in [0, 1] only batch by batch. The test set is
never touched by anything that selects: a validation split is held out of the training set.

TFDS's stock builders need TensorFlow to download and prepare a set, and nothing else here does. So preparing runs in a
child process, once per set, and TensorFlow enters neither training nor the accelerator's memory:
``python -m lipjax.data NAME [--data_dir=...] [--manual_dir=...]`` does the same by hand.
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

import jax
import jax.numpy as jnp
import numpy as np

DIGITS_TEST = 360  # of scikit-learn's 1797 digits


class DataError(ValueError):
    """A data set is missing, damaged or not what it should be; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One split in memory.

    Attributes:
        name: as given to `load`.
        split: "train", "validation" or "test".
        images: ``(N, H, W, C)`` as stored, uint8 or float32.
        labels: ``(N,)`` int32.
        levels: the stored value that means 1.0: 255 for uint8, 16 for digits, 1 for floats.
        classes: number of classes.
        indices: ``(N,)`` position of each example in its source split, so that a result names its image.
        note: a disclosure to print beside figures; mostly empty.
    """

    name: str
    split: str
    images: np.ndarray
    labels: np.ndarray
    levels: float
    classes: int
    indices: np.ndarray
    note: str = ""

    def unit_images(self, rows) -> np.ndarray:
        """The images at `rows` (anything that indexes axis 0) as float32 in [0, 1]."""
        return self.images[rows].astype(np.float32) / np.float32(self.levels)

    def take(self, rows: np.ndarray, split: str | None = None) -> "Dataset":
        """The examples at `rows`, in that order."""
        return dataclasses.replace(
            self,
            split=split or self.split,
            images=self.images[rows],
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
) -> Splits:
    """Loads a data set by name; everything is a function of the arguments.

    Args:
        name: "digits" (comes with scikit-learn, no download), "npz:<train>,<test>" or "npz:<one file>",
            "folder:<path>" in TinyImageNet's layout, or the name of a TFDS image-classification set such as "mnist".
        data_dir: where TFDS keeps prepared sets; its own default (~/tensorflow_datasets) if None.
        manual_dir: a folder that already holds the original archives of a TFDS set: nothing is downloaded then.
        validation_fraction: share of the training set that is held out to select checkpoints; in (0, 1).
        validation_seed: which examples; one value for all runs that are compared.
        train_examples, test_examples: take only so many, the first of a fixed shuffle; None for all.

    Raises:
        DataError: missing or damaged data, with what to install or download and where to put it; more examples asked
            for than there are; a fraction outside (0, 1).
    """
    if not 0 < validation_fraction < 1:
        raise DataError(
            f"validation_fraction must lie in (0, 1), got {validation_fraction}: a checkpoint is selected on held-out "
            "training images, never on the test set."
        )
    if name == "digits":
        train, test = _digits()
    elif name.startswith("npz:"):
        train, test = _npz(name)
    elif name.startswith("folder:"):
        train, test = _folder(name)
    else:
        train, test = _tfds(name, data_dir, manual_dir)
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
    """The first 16 hex digits of the SHA-256 of images and labels: which data a figure is about."""
    digest = hashlib.sha256()
    for array in (dataset.images, dataset.labels):
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def random_crop_and_flip(images: jax.Array, key: jax.Array, *, padding: int = 4, first=0) -> jax.Array:
    """Each image zero-padded by `padding`, cropped at random to its size and mirrored with probability 1/2.

    Args:
        images: ``(batch, height, width, channels)``.
        key: randomness of the whole batch; the same key gives the same result.
        first: place in the batch of the first of these images: what becomes of an image depends on its place, not on
            which others are here. May be traced.
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
        raise DataError(f"{name}, {split}: images of shape {images.shape} do not fit {len(labels)} labels.")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise DataError(
            f"{name}, {split}: labels must be integers from 0 on, got {labels.dtype}, {labels.min()} first."
        )
    if images.dtype == np.uint8:
        levels = levels or 255.0
        if images.max() <= 1:
            raise DataError(
                f"{name}, {split}: no uint8 pixel is above {images.max()}, and white is 255: floats in [0, 1] lose "
                "everything when they are cast to uint8; store them as floats, or times 255."
            )
    elif np.issubdtype(images.dtype, np.floating):
        levels, images = levels or 1.0, images.astype(np.float32)
        low, high = images.min(), images.max()
        if not (low >= 0 and high <= levels):
            raise DataError(
                f"{name}, {split}: float images must lie in [0, 1], got {low} to {high}. Store 0..255 as uint8, or divide "
                "by 255; do not normalise: epsilon is a radius on pixels in [0, 1]."
            )
    else:
        raise DataError(f"{name}, {split}: images must be uint8 or floats in [0, 1], got {images.dtype}.")
    labels = labels.astype(np.int32)
    classes = classes or int(labels.max()) + 1
    if classes < 2:
        raise DataError(f"{name}, {split}: only one class.")
    return Dataset(name, split, images, labels, float(levels), classes, np.arange(len(labels)), note)


def _pair(name, train, test) -> tuple[Dataset, Dataset]:
    if train.images.shape[1:] != test.images.shape[1:] or train.levels != test.levels:
        raise DataError(
            f"{name}: training images {train.images.shape[1:]} differ from test images {test.images.shape[1:]}."
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
    # One stratified split for ever, whatever the seeds of a run: figures of different runs are about the same images.
    rows = np.arange(len(digits.target))
    train, test = train_test_split(rows, test_size=DIGITS_TEST, random_state=0, stratify=digits.target)
    images = digits.images.astype(np.float32)
    whole = _dataset("digits", "train", images, digits.target, levels=16.0)
    return whole.take(np.sort(train), "train"), whole.take(np.sort(test), "test")


def _npz(name):
    paths = [Path(p).expanduser() for p in name.removeprefix("npz:").split(",")]
    if len(paths) > 2:
        raise DataError(f"{name}: expected npz:<train.npz>,<test.npz> or npz:<file.npz>.")
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path.absolute()} is not there; npz: takes paths of files that np.savez wrote.")
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
                f"{paths[0]} alone must hold {', '.join(wanted)}; it holds {', '.join(files[0])}. Two files are given as "
                "npz:<train.npz>,<test.npz>."
            )
        parts = [(files[0]["x_train"], files[0]["y_train"]), (files[0]["x_test"], files[0]["y_test"])]
    else:
        parts = []
        for path, file in zip(paths, files, strict=True):
            names = next((n for n in (("images", "labels"), ("x", "y")) if n[0] in file and n[1] in file), None)
            if names is None:
                raise DataError(f"{path} must hold images and labels (or x and y); it holds {', '.join(file)}.")
            parts.append((file[names[0]], file[names[1]]))
    lossy = files[-1].get("lossy")
    test = _dataset(name, "test", *parts[1])
    if lossy is not None:
        note = (
            f"{np.size(lossy)} of the file's {len(test.labels)} test images are not exact copies of the official ones"
        )
        test = dataclasses.replace(test, note=note)
    return _pair(name, _dataset(name, "train", *parts[0]), test)


def _folder(name):
    root = Path(name.removeprefix("folder:")).expanduser()
    if not (root / "train").is_dir() or not (root / "val" / "val_annotations.txt").is_file():
        raise DataError(
            f"{root.absolute()} has not TinyImageNet's layout (train/<class>/images/*, val/images/*, "
            "val/val_annotations.txt). For TinyImageNet itself download tiny-imagenet-200.zip from cs231n.stanford.edu, "
            f"unpack it and give the folder as folder:<path>."
        )
    listed = root / "wnids.txt"
    names = (
        listed.read_text().split() if listed.is_file() else [p.name for p in (root / "train").iterdir() if p.is_dir()]
    )
    number = {wnid: i for i, wnid in enumerate(sorted(names))}
    train_files = [
        (path, number[wnid]) for wnid in sorted(number) for path in sorted((root / "train" / wnid).rglob("*.JPEG"))
    ]
    test_files = []
    for number_of_line, line in enumerate((root / "val" / "val_annotations.txt").read_text().splitlines(), 1):
        if "\t" not in line:
            raise DataError(
                f"{root}: line {number_of_line} of val_annotations.txt is not <file>, tab, <class>: {line!r}."
            )
        file, wnid = line.split("\t")[:2]
        path = root / "val" / "images" / file
        if wnid not in number:
            raise DataError(f"{root}: val_annotations.txt names the class {wnid}, which wnids.txt does not.")
        if path.is_file():  # a subset of the images keeps the full list
            test_files.append((path, number[wnid]))
    parts = []
    for split, files in (("train", train_files), ("test", test_files)):
        if not files:
            where = "train/<class>/images/*.JPEG" if split == "train" else "val/images/, named in val_annotations.txt"
            raise DataError(f"{root}: no {split} images found ({where}).")
        images = [_decode(path) for path, _ in files]
        for (path, _), image in zip(files, images, strict=True):
            if image.shape != images[0].shape:
                raise DataError(
                    f"{path} is {image.shape}, {files[0][0]} is {images[0].shape}: resize them to one size."
                )
        labels = np.array([label for _, label in files])
        parts.append(_dataset(name, split, np.stack(images), labels, classes=len(number)))
    return _pair(name, *parts)


def _decode(path: Path) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DataError(f"{path} is damaged: {error}. Replace or remove it.") from error


def _tfds(name, data_dir, manual_dir):
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"{name!r} is looked up in TFDS, which is not installed: pip install -r requirements.txt."
        ) from error
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record", try_gcs=False)
    except tfds.core.registered.DatasetNotFoundError as error:
        near = difflib.get_close_matches(name, ["digits", *tfds.list_builders(with_community_datasets=False)], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DataError(
            f"there is no data set called {name!r} (digits, npz:, folder: or a TFDS name).{hint}"
        ) from error
    if not builder.is_prepared():
        _prepare_in_child(name, data_dir, manual_dir)
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record", try_gcs=False)
    features = builder.info.features
    if "image" not in features or "label" not in features:
        raise DataError(f"TFDS's {name} is not image classification: it has {', '.join(features)}.")
    parts = []
    for split in ("train", "test"):
        source_split = split if split in builder.info.splits else "validation"
        if source_split not in builder.info.splits:
            raise DataError(f"TFDS's {name} has no test or validation split: {', '.join(builder.info.splits)}.")
        source = builder.as_data_source(split=source_split)
        examples = [source[i] for i in range(len(source))]
        shapes = {example["image"].shape for example in examples}
        if len(shapes) > 1:
            raise DataError(f"TFDS's {name} has images of several sizes, e.g. {sorted(shapes)[:3]}: resize them first.")
        images = np.stack([example["image"] for example in examples])
        labels = np.array([int(example["label"]) for example in examples])
        parts.append(_dataset(name, split, images, labels, classes=features["label"].num_classes))
    return _pair(name, *parts)


def _prepare_in_child(name, data_dir, manual_dir):
    print(f"preparing {name} through TFDS, once ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "lipjax.data", name]
    command += [f"--data_dir={data_dir}"] if data_dir else []
    command += [f"--manual_dir={manual_dir}"] if manual_dir else []
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        tail = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        missing = "tensorflow" in done.stderr and "ModuleNotFoundError" in done.stderr
        raise DataError(
            f"TFDS could not prepare {name}: {tail[0]}. "
            + (
                "Its builders need TensorFlow: pip install -r requirements.txt (or tensorflow-cpu)."
                if missing
                else "Without internet, download the original archives elsewhere, put them in one folder and give it as "
                "--config.data.manual_dir; or use npz:<files>."
            )
        )


def _prepare(name: str, data_dir: str | None, manual_dir: str | None) -> None:
    """Downloads (or takes from `manual_dir`) and prepares a TFDS set as array_record. Imports TensorFlow."""
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record", try_gcs=False)
    config = tfds.download.DownloadConfig(
        manual_dir=str(Path(manual_dir).expanduser().absolute()) if manual_dir else None, try_download_gcs=False
    )
    builder.download_and_prepare(download_config=config)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=_prepare.__doc__)
    parser.add_argument("name")
    parser.add_argument("--data_dir")
    parser.add_argument("--manual_dir")
    arguments = parser.parse_args()
    _prepare(arguments.name, arguments.data_dir, arguments.manual_dir)
