"""Sets in files of one's own: bundled digits, npz files, image folders."""

import dataclasses
import zipfile
import zlib
from pathlib import Path

import numpy as np

from lipjax.data.dataset import Dataset, in_memory, pair
from lipjax.data.errors import DataError
from lipjax.data.images import Undecodable, decode, pixels

DIGITS_TEST = 360  # of scikit-learn's 1797 digits


def digits() -> tuple[Dataset, Dataset]:
    """Scikit-learn's digits, training and test."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("the digits come with scikit-learn: pip install scikit-learn.") from error
    found = load_digits()
    # One stratified split for ever, whatever the seeds of a run: figures of different runs are
    # about the same images.
    rows = np.arange(len(found.target))
    train, test = train_test_split(
        rows, test_size=DIGITS_TEST, random_state=0, stratify=found.target
    )
    images = found.images.astype(np.float32)
    whole = in_memory("digits", "train", images, found.target, levels=16.0)
    return whole.take(np.sort(train), "train"), whole.take(np.sort(test), "test")


# ---------------------------------------------------------------------------------- npz files


def npz(name: str) -> tuple[Dataset, Dataset]:
    """The set of "npz:<train.npz>,<test.npz>" or "npz:<file.npz>"."""
    paths = [Path(p).expanduser() for p in name.removeprefix("npz:").split(",")]
    if len(paths) > 2:
        raise DataError(f"{name}: expected npz:<train.npz>,<test.npz> or npz:<file.npz>.")
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"{path.absolute()} is not there; npz: takes paths of files that np.savez wrote."
            )
    files = [_read(path) for path in paths]
    if len(files) == 1:
        train_arrays, test_arrays = _both_splits(paths[0], files[0])
    else:
        train_arrays, test_arrays = map(_one_split, paths, files)

    test = in_memory(name, "test", *test_arrays)
    lossy = files[-1].get("lossy")
    if lossy is not None:
        note = (
            f"{np.size(lossy)} of the file's {len(test.labels)} test images are not exact copies "
            "of the official ones"
        )
        test = dataclasses.replace(test, note=note)
    return pair(name, in_memory(name, "train", *train_arrays), test)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as raw:
            file = np.load(raw)
            if isinstance(file, np.ndarray):
                raise ValueError("it is a single array (npy)")
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as npz: {error}") from error


def _both_splits(path: Path, file: dict[str, np.ndarray]):
    """Images and labels of both splits, which lie in one file."""
    wanted = ("x_train", "y_train", "x_test", "y_test")
    if not all(key in file for key in wanted):
        raise DataError(
            f"{path} alone must hold {', '.join(wanted)}; it holds {', '.join(file)}. Two files "
            "are given as npz:<train.npz>,<test.npz>."
        )
    return (file["x_train"], file["y_train"]), (file["x_test"], file["y_test"])


def _one_split(path: Path, file: dict[str, np.ndarray]):
    """Images and labels of the split in a file."""
    for images, labels in (("images", "labels"), ("x", "y")):
        if images in file and labels in file:
            return file[images], file[labels]
    raise DataError(f"{path} must hold images and labels (or x and y); it holds {', '.join(file)}.")


# ------------------------------------------------------------------------------- image folders


def folder(name: str, image_size: int | None) -> tuple[Dataset, Dataset]:
    """The set of "folder:<path>", in memory."""
    classes, files = folder_files(Path(name.removeprefix("folder:")))
    parts = []
    for split, found in files.items():
        images: list[np.ndarray] = []
        for path, _ in found:
            images.append(_pixels(path, image_size))
            if images[-1].shape != images[0].shape:
                raise DataError(
                    f"{path} is {images[-1].shape}, {found[0][0]} is {images[0].shape}: resize "
                    "them to one size, or give an image_size (--config.data.image_size=64)."
                )
        labels = [label for _, label in found]
        parts.append(in_memory(name, split, np.stack(images), labels, classes=len(classes)))
    return pair(name, *parts)


def _pixels(path: Path, image_size: int | None) -> np.ndarray:
    try:
        return pixels(decode(path.read_bytes()), image_size)
    except (OSError, Undecodable) as error:
        raise DataError(f"{path} is damaged: {error}. Replace or remove it.") from error


def folder_files(root: Path) -> tuple[list[str], dict[str, list[tuple[Path, int]]]]:
    """What a folder in TinyImageNet's layout holds.

    Returns:
        The names of the classes; and for "train" and "test" (the official validation images), in
        the order of `sets.load`, ``(path, label)`` of each image.

    Raises:
        DataError: another layout, an unknown class, a split without images.
    """
    root = root.expanduser()
    annotations = root / "val" / "val_annotations.txt"
    if not (root / "train").is_dir() or not annotations.is_file():
        raise DataError(
            f"{root.absolute()} has not TinyImageNet's layout (train/<class>/images/*, "
            "val/images/*, val/val_annotations.txt). For TinyImageNet itself download "
            "tiny-imagenet-200.zip from cs231n.stanford.edu, unpack it and give the folder as "
            "folder:<path>."
        )
    listed = root / "wnids.txt"
    if listed.is_file():
        names = sorted(listed.read_text().split())
    else:
        names = sorted(p.name for p in (root / "train").iterdir() if p.is_dir())
    number = {wnid: i for i, wnid in enumerate(names)}

    train = [
        (path, number[wnid])
        for wnid in names
        for path in sorted((root / "train" / wnid).rglob("*.JPEG"))
    ]
    if not train:
        raise DataError(f"{root}: no train images found (train/<class>/images/*.JPEG).")
    test = []
    for position, line in enumerate(annotations.read_text().splitlines(), 1):
        file, label = _annotation(root, position, line, number)
        path = root / "val" / "images" / file
        if path.is_file():  # a subset of the images keeps the full list
            test.append((path, label))
    if not test:
        raise DataError(
            f"{root}: no test images found (val/images/, named in val_annotations.txt)."
        )
    return names, {"train": train, "test": test}


def _annotation(root: Path, position: int, line: str, number: dict[str, int]) -> tuple[str, int]:
    """File and label in a line of val_annotations.txt."""
    if "\t" not in line:
        raise DataError(
            f"{root}: line {position} of val_annotations.txt is not <file>, tab, <class>: {line!r}."
        )
    file, wnid = line.split("\t")[:2]
    if wnid not in number:
        raise DataError(
            f"{root}: val_annotations.txt names the class {wnid}, which wnids.txt does not."
        )
    return file, number[wnid]
