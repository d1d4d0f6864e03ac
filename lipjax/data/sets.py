"""Image-classification data sets by name: digits, TFDS, npz files, image folders, records on disk.

Images stay as they are stored (uint8 where they are) and become floats in [0, 1] only batch by
batch. Sets that fit are kept in memory; large ones, and those with images of several sizes, stay
encoded on disk and are decoded when they are indexed (`lipjax.data.images`). The test set is never
touched by anything that selects: a validation split is held out of the training set.
"""

import os
from pathlib import Path

import numpy as np

from lipjax.data import folders, local, stored, tfds
from lipjax.data.augmentation import random_crop_and_flip, random_rotation
from lipjax.data.dataset import Dataset, Splits, described, fingerprint
from lipjax.data.errors import DataError
from lipjax.data.local import DIGITS_TEST
from lipjax.data.tfds import IN_MEMORY_BYTES

__all__ = [
    "DIGITS_TEST",
    "IN_MEMORY_BYTES",
    "DataError",
    "Dataset",
    "Splits",
    "described",
    "fingerprint",
    "listed",
    "load",
    "load_test",
    "random_crop_and_flip",
    "random_rotation",
]

# What `listed` says of the names.
NAMES = """\
digits              scikit-learn's 8x8 digits, bundled, no download
npz:<train>,<test>  two files of images (N, H, W, C) and labels (N,), or one of x_train, y_train,\
 ...
folder:<path>       image files: train/<class>/* and test/<class>/*, or val/<class>/*
records:<path>      as `lipjax data prepare folder:<path> --out=<path>` writes it: large sets, read\
 lazily
<TFDS name>         mnist, cifar10, cifar100, svhn, imagenet, ...: downloaded and prepared on first\
 use, or by
                    `lipjax data prepare <name>`, with --manual_dir from archives that are here"""


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
            file>", "folder:<path>" (see `lipjax.data.folders`), "records:<path>" as ``python -m
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
            "selected on held-out training images, never on the test set."
        )
    if validation_seed < 0:
        raise DataError(f"validation_seed must be at least 0, got {validation_seed}.")
    _check_image_size(name, image_size)
    if name == "digits":
        train, test = local.digits()
    elif name.startswith("npz:"):
        train, test = local.npz(name)
    elif name.startswith("folder:"):
        train, test = folders.load(name, image_size)
    elif name.startswith("records:"):
        train, test = stored.load(name, image_size)
    else:
        train, test = tfds.load(name, data_dir, manual_dir, image_size)

    order = np.random.default_rng(validation_seed).permutation(len(train.labels))
    held_out = max(1, round(len(order) * validation_fraction))
    if held_out >= len(order):
        raise DataError(f"{name}: {len(order)} training images are too few to hold {held_out} out.")
    validation = train.take(np.sort(order[:held_out]), "validation")
    train = train.take(_first(order[held_out:], train_examples, name, "training"))
    return Splits(train, validation, _chosen(test, test_examples, validation_seed))


def load_test(
    name: str,
    *,
    data_dir: str | None = None,
    test_examples: int | None = None,
    image_size: int | None = None,
    classes: int | None = None,
) -> Dataset:
    """The test split of a data set: as `load` gives it, or a test file alone, "npz:<file>" with
    images and labels (or x and y) of one split.

    Args:
        classes: of a test file alone, which need not show all of them; if None, as many as its
            labels say.
        data_dir, test_examples, image_size: as in `load`.

    Raises:
        DataError: as `load`; labels of a test file that are none of `classes`.
    """
    alone = local.lone_test(name, classes)
    if alone is None:
        splits = load(name, data_dir=data_dir, test_examples=test_examples, image_size=image_size)
        return splits.test
    _check_image_size(name, image_size)
    return _chosen(alone, test_examples, validation_seed=0)


def _check_image_size(name: str, image_size: int | None) -> None:
    if image_size is not None and (image_size < 1 or name == "digits" or name.startswith("npz:")):
        raise DataError(
            "image_size must be at least 1, and is for sets of encoded images (records:, folder:, "
            f"TFDS); got {image_size} for {name}. Leave it out (data.image_size=0) to take images "
            "as they are stored."
        )


def _chosen(test: Dataset, examples: int | None, validation_seed: int) -> Dataset:
    """The first examples of a fixed shuffle of a test split."""
    shuffled = np.random.default_rng(validation_seed + 1).permutation(len(test.labels))
    return test.take(_first(shuffled, examples, test.name, "test"))


def _first(rows: np.ndarray, wanted: int | None, name: str, what: str) -> np.ndarray:
    """The first of these rows, as many as are wanted, in order."""
    if wanted is not None and not 0 < wanted <= len(rows):
        raise DataError(f"{name} has {len(rows)} {what} images, asked for {wanted}.")
    return np.sort(rows[:wanted])


def listed(data_dir: str | None = None) -> str:
    """The names that `load` takes, and the TFDS sets that are prepared, as text.

    Args:
        data_dir: where TFDS keeps them; its own default if None.
    """
    # Not Path.expanduser, which is an error where there is no home.
    root = Path(
        os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    )
    found = {
        info.relative_to(root).parts[0]
        for info in root.glob("*/**/dataset_info.json")
        if any(info.parent.glob("*.array_record*"))
    }
    return f"{NAMES}\nprepared in {root}: {', '.join(sorted(found)) or 'none'}"
