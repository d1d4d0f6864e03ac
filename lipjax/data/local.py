"""Scikit-learn's digits, and arrays in npz files."""

import dataclasses
import zipfile
import zlib
from pathlib import Path

import numpy as np

from lipjax.data.dataset import Dataset, in_memory, pair
from lipjax.data.errors import DataError

DIGITS_TEST = 360  # of scikit-learn's 1797 digits


def digits() -> tuple[Dataset, Dataset]:
    """Scikit-learn's digits, training and test.

    Raises:
        DataError: scikit-learn is not installed.
    """
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


# Names of images and labels of one split, and of the splits in one file.
ONE_SPLIT = (("images", "labels"), ("x", "y"))
BOTH_SPLITS = ("x_train", "y_train", "x_test", "y_test")


def npz(name: str) -> tuple[Dataset, Dataset]:
    """The set of "npz:<train.npz>,<test.npz>" or "npz:<file.npz>"."""
    paths = _paths(name)
    files = [_read(path) for path in paths]
    if len(files) == 1:
        train_arrays, test_arrays = _both_splits(paths[0], files[0])
    else:
        train_arrays, test_arrays = map(_one_split, paths, files)

    test = _with_note(in_memory(name, "test", *test_arrays), files[-1])
    train, test = pair(name, in_memory(name, "train", *train_arrays), test)
    counts = np.bincount(train.labels, minlength=train.classes)
    empty = np.flatnonzero(counts == 0).tolist()
    if empty:
        more = ", ..." if len(empty) > 5 else ""
        note = (
            f"no training image of {len(empty)} of {train.classes} classes: "
            f"{', '.join(map(str, empty[:5]))}{more}"
        )
        train = dataclasses.replace(train, note=note)
        test = dataclasses.replace(test, note="; ".join(filter(None, [test.note, note])))
    return train, test


def lone_test(name: str, classes: int | None) -> Dataset | None:
    """The test split of "npz:<file.npz>" whose file holds images and labels of one split; None if
    the name is another, or the file holds both splits.

    Args:
        classes: how many there are, which one split need not show; if None, as many as its labels
            say.
    """
    if not name.startswith("npz:") or len(paths := _paths(name)) > 1:
        return None
    file = _read(paths[0])
    if set(BOTH_SPLITS) <= set(file):
        return None
    arrays = _one_split(paths[0], file)
    return _with_note(in_memory(name, "test", *arrays, classes=classes), file)


def _with_note(test: Dataset, file: dict[str, np.ndarray]) -> Dataset:
    """The test split with what its file discloses."""
    lossy = file.get("lossy")
    if lossy is None:
        return test
    note = (
        f"{np.size(lossy)} of the file's {len(test.labels)} test images are not exact copies "
        "of the official ones"
    )
    return dataclasses.replace(test, note=note)


def _paths(name: str) -> list[Path]:
    """The files of an npz: name, which are there."""
    paths = [Path(p).expanduser() for p in name.removeprefix("npz:").split(",")]
    if len(paths) > 2:
        raise DataError(f"{name}: expected npz:<train.npz>,<test.npz> or npz:<file.npz>.")
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"{path.absolute()} is not there; npz: takes paths of files that np.savez wrote."
            )
    return paths


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name. Those that are not asked for may be anything, and are empty."""
    wanted = {*BOTH_SPLITS, *ONE_SPLIT[0], *ONE_SPLIT[1], "lossy"}
    try:
        with open(path, "rb") as raw:
            file = np.load(raw)
            if isinstance(file, np.ndarray):
                raise ValueError("it is a single array (npy)")
            return {key: file[key] if key in wanted else np.empty(0) for key in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error)
        if "allow_pickle" in reason and "pickle" in reason and "Object arrays" in reason:
            reason = (
                "an array in it is of Python objects, which are not read: store images of one "
                "shape as uint8, labels as integers"
            )
        raise DataError(f"{path} cannot be read as npz: {reason}") from error


def _both_splits(path: Path, file: dict[str, np.ndarray]):
    """Images and labels of both splits, which lie in one file."""
    if not all(key in file for key in BOTH_SPLITS):
        raise DataError(
            f"{path} alone must hold {', '.join(BOTH_SPLITS)}; it holds {', '.join(file)}. Two "
            "files are given as npz:<train.npz>,<test.npz>; a test file alone can be certified "
            "(lipjax certify --network=... --data=npz:<test.npz>)."
        )
    return (file["x_train"], file["y_train"]), (file["x_test"], file["y_test"])


def _one_split(path: Path, file: dict[str, np.ndarray]):
    """Images and labels of the split in a file."""
    found = [names for names in ONE_SPLIT if all(name in file for name in names)]
    if len(found) > 1:
        raise DataError(
            f"{path} holds images and labels, and x and y too: which are meant is not said. Store "
            "one of them alone."
        )
    for images, labels in found:
        return file[images], file[labels]
    raise DataError(f"{path} must hold images and labels (or x and y); it holds {', '.join(file)}.")
