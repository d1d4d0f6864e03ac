"""One split of a data set, and what is known of it: fingerprint, sizes, ranges."""

import dataclasses
import hashlib

import numpy as np

from lipjax.data.errors import DataError
from lipjax.data.images import Images


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One split.

    Attributes:
        name: as given to `load`.
        split: "train", "validation" or "test".
        images: ``(N, H, W, C)`` as stored, uint8 or float32: an array, or a `images.Images`, which
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
    images: np.ndarray | Images
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
        whole = self.images
        return dataclasses.replace(
            self,
            split=split or self.split,
            images=whole[rows] if isinstance(whole, np.ndarray) else whole.subset(rows),
            labels=self.labels[rows],
            indices=self.indices[rows],
        )


@dataclasses.dataclass(frozen=True)
class Splits:
    """Training, validation and test data; the first two share no example."""

    train: Dataset
    validation: Dataset
    test: Dataset


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


def described(splits: Splits) -> str:
    """Sizes, shape, classes, range and fingerprints of a data set, as text for people."""
    lines = [splits.train.name]
    for part in (splits.train, splits.validation, splits.test):
        counts = np.bincount(part.labels, minlength=part.classes)
        lines.append(
            f"{part.split:11}{len(part.labels)} images, {counts.min()} to {counts.max()} of each "
            f"class, fingerprint {fingerprint(part)}"
        )
    test = splits.test
    values = test.unit_images(slice(0, 1000))
    lines.append(
        f"images of {tuple(test.images.shape[1:])}, {test.classes} classes; stored "
        f"{test.images.dtype}, {test.levels:g} means 1.0; the first test images go from "
        f"{values.min():.3g} to {values.max():.3g}, mean {values.mean():.3g}"
    )
    if test.note:
        lines.append(f"note: {test.note}")
    lines.append(
        "validation images are held out of the training set; epsilon is a radius on pixels in [0, "
        "1]"
    )
    return "\n".join(lines)


def in_memory(
    name: str, split: str, images, labels, *, levels: float | None = None, classes=None
) -> Dataset:
    """A split whose images and labels are arrays, after they were checked.

    Raises:
        DataError: shapes, types or ranges that are not those of images and labels.
    """
    images = np.asarray(images)
    labels = np.asarray(labels).reshape(-1)
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
                "floats in [0, 1] lose everything when they are cast to uint8; store them as "
                "floats, or times 255."
            )
    elif np.issubdtype(images.dtype, np.floating):
        levels = levels or 1.0
        images = images.astype(np.float32)
        low = images.min()
        high = images.max()
        if not (low >= 0 and high <= levels):
            raise DataError(
                f"{name}, {split}: float images must lie in [0, 1], got {low} to {high}. Store "
                "0..255 as uint8, or divide by 255; do not normalise: epsilon is a radius on "
                "pixels in [0, 1]."
            )
    else:
        raise DataError(
            f"{name}, {split}: images must be uint8 or floats in [0, 1], got {images.dtype}."
        )
    labels = labels.astype(np.int32)
    classes = classes or int(labels.max()) + 1
    if classes < 2:
        raise DataError(f"{name}, {split}: only one class.")
    return Dataset(name, split, images, labels, float(levels), classes, np.arange(len(labels)))


def on_disk(name: str, split: str, images: Images, labels: np.ndarray, classes: int) -> Dataset:
    """A split whose images stay on disk; a DataError for labels that are no classes."""
    if not (labels.min() >= 0 and labels.max() < classes):
        raise DataError(
            f"{name}, {split}: labels from {labels.min()} to {labels.max()} do not fit {classes} "
            "classes."
        )
    labels = labels.astype(np.int32)
    return Dataset(name, split, images, labels, 255.0, classes, np.arange(len(labels)))


def pair(name: str, train: Dataset, test: Dataset) -> tuple[Dataset, Dataset]:
    """Both splits with as many classes; a DataError if their images differ in shape or range."""
    if train.images.shape[1:] != test.images.shape[1:] or train.levels != test.levels:
        raise DataError(
            f"{name}: training images {train.images.shape[1:]} differ from test images "
            f"{test.images.shape[1:]}."
        )
    classes = max(train.classes, test.classes)
    return dataclasses.replace(train, classes=classes), dataclasses.replace(test, classes=classes)
