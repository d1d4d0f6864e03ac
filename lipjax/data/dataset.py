"""One split of a data set, and what is known of it: fingerprint, sizes, ranges."""

import dataclasses
import hashlib

import numpy as np

from lipjax.data.errors import DataError
from lipjax.data.images import MODES, Images

# No set has more classes (ImageNet-21k has 21,841): a larger label is no number of a class.
MOST_CLASSES = 100_000


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

    Args:
        images: ``(N, H, W, C)`` or ``(N, H, W)``, uint8 or floats from 0 to `levels`.
        labels: ``(N,)`` integers from 0 on, of any type.
        levels: of `Dataset`; 255 for uint8 and 1 for floats if None.
        classes: how many; if None, as many as the largest label says.

    Raises:
        DataError: shapes, types or ranges that are not those of images and labels, with what makes
            them so.
    """
    what = f"{name}, {split}"
    images = _four_axes(what, np.asarray(images))
    labels = _numbers(what, np.asarray(labels))
    if len(images) == len(labels) == 0:
        raise DataError(f"{what}: there are no images.")
    if len(images) != len(labels) or images.size == 0:
        raise DataError(f"{what}: images of shape {images.shape} do not fit {len(labels)} labels.")
    largest = int(labels.max())
    if largest >= (classes or MOST_CLASSES):
        place = int(np.argmax(labels))
        raise DataError(
            f"{what}: the label {largest}, of image {place}, is none of {classes or MOST_CLASSES} "
            "classes; expected numbers from 0 on, without gaps "
            "(np.unique(labels, return_inverse=True)[1] makes such)."
        )
    images, levels = _levels(what, images, levels)
    labels = labels.astype(np.int32)
    classes = classes or largest + 1
    if classes < 2:
        raise DataError(f"{what}: only one class.")
    return Dataset(name, split, images, labels, levels, classes, np.arange(len(labels)))


def _four_axes(what: str, images: np.ndarray) -> np.ndarray:
    """Images as ``(N, H, W, C)``."""
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4:
        raise DataError(
            f"{what}: images of shape {images.shape}; expected (N, height, width, channels), or "
            "(N, height, width) of grey ones."
        )
    # No image is three pixels high with a dozen channels.
    if images.shape[1] in MODES and min(images.shape[2:]) > max(MODES):
        raise DataError(
            f"{what}: images of shape {images.shape} have their {images.shape[1]} channels first; "
            "expected (N, height, width, channels): np.moveaxis(images, 1, -1)."
        )
    return images


def _numbers(what: str, labels: np.ndarray) -> np.ndarray:
    """Labels as ``(N,)`` integers, of whatever type they were stored in."""
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise DataError(
            f"{what}: labels of shape {labels.shape} look like one-hot ones; expected one number "
            "for each image: np.argmax(labels, axis=1)."
        )
    if labels.ndim != 1 and labels.shape != (len(labels), 1):
        raise DataError(
            f"{what}: labels of shape {labels.shape}; expected (N,), one for each image."
        )
    labels = labels.reshape(-1)
    if labels.dtype.kind in "USO":
        raise DataError(
            f"{what}: labels are text or objects ({labels[:1].tolist()} first), expected integers "
            "from 0 on: names, labels = np.unique(labels, return_inverse=True)."
        )
    first = labels.min() if len(labels) else 0
    if labels.dtype.kind not in "iu" or first < 0:
        raise DataError(
            f"{what}: labels must be integers from 0 on, got {labels.dtype}, {first} first."
        )
    return labels


def _levels(what: str, images: np.ndarray, levels: float | None) -> tuple[np.ndarray, float]:
    """Images as uint8 or float32, and the value that means 1.0."""
    if images.dtype == np.uint8:
        if images.max() <= 1:
            raise DataError(
                f"{what}: no uint8 pixel is above {images.max()}, and white is 255: floats in [0, "
                "1] lose everything when they are cast to uint8; store them as floats, or times "
                "255."
            )
        return images, float(levels or 255.0)
    if not np.issubdtype(images.dtype, np.floating):
        remedy = {
            "b": "Of black and white: images.astype(np.float32).",
            "u": "Of 16 bits: (images / 65535).astype(np.float32).",
            "V": "If they are bfloat16, which NumPy does not store: images.astype(np.float32).",
        }.get(images.dtype.kind, "")
        raise DataError(
            f"{what}: images must be uint8 or floats in [0, 1], got {images.dtype}. {remedy}"
        )
    levels = levels or 1.0
    images = images.astype(np.float32)
    low = images.min()
    high = images.max()
    if not (low >= 0 and high <= levels):
        raise DataError(
            f"{what}: float images must lie in [0, 1], got {low} to {high}. Store 0..255 as uint8, "
            "or divide by 255; do not normalise: epsilon is a radius on pixels in [0, 1]."
        )
    if 0 < high <= 1 / 255:
        raise DataError(
            f"{what}: no float pixel is above {high:.3g}, and white is 1: images in [0, 1] that "
            "were divided by 255 once more?"
        )
    return images, float(levels)


def on_disk(
    name: str, split: str, images: Images, labels: np.ndarray, classes: int, note: str = ""
) -> Dataset:
    """A split whose images stay on disk; a DataError for labels that are no classes."""
    if not (labels.min() >= 0 and labels.max() < classes):
        raise DataError(
            f"{name}, {split}: labels from {labels.min()} to {labels.max()} do not fit {classes} "
            "classes."
        )
    labels = labels.astype(np.int32)
    return Dataset(name, split, images, labels, 255.0, classes, np.arange(len(labels)), note)


def pair(name: str, train: Dataset, test: Dataset) -> tuple[Dataset, Dataset]:
    """Both splits with as many classes; a DataError if their images differ in shape or range."""
    if train.images.shape[1:] != test.images.shape[1:] or train.levels != test.levels:
        raise DataError(
            f"{name}: training images {train.images.shape[1:]} differ from test images "
            f"{test.images.shape[1:]}."
        )
    classes = max(train.classes, test.classes)
    return dataclasses.replace(train, classes=classes), dataclasses.replace(test, classes=classes)
