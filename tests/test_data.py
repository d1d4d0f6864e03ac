"""Data sets: TFDS's own MNIST offline, CIFAR-10 from npz, image folders, splits, augmentation, and
what is refused."""

import gzip
import importlib.util
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from lipjax.data import dataset, sets
from lipjax.data import images as on_disk
from lipjax.data import tfds as tfds_sets
from lipjax.data.sets import DataError


def write_npz(path, images, labels, **more):
    np.savez(path, images=images, labels=labels, **more)
    return path


@pytest.fixture
def ten(tmp_path):
    """Ten 4x4 images of two classes, image i of value i."""
    images = np.repeat(np.arange(10, dtype=np.uint8), 16).reshape(10, 4, 4)
    return write_npz(tmp_path / "ten.npz", images, np.arange(10) % 2)


# ------------------------------------------------------------------------------------------- splits


def test_digits_splits_are_disjoint_and_do_not_depend_on_anything():
    splits = sets.load("digits")
    parts = [set(part.indices.tolist()) for part in (splits.train, splits.validation, splits.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797
    assert sets.fingerprint(splits.test) == sets.fingerprint(
        sets.load("digits", validation_seed=3).test
    )
    images = splits.train.unit_images(slice(None))
    assert images.dtype == np.float32 and images.min() == 0 and images.max() == 1


def test_the_validation_split_is_held_out_of_training_and_never_of_test(ten):
    splits = sets.load(f"npz:{ten},{ten}", validation_fraction=0.3)
    assert [len(part.labels) for part in (splits.train, splits.validation, splits.test)] == [
        7,
        3,
        10,
    ]
    assert [part.split for part in (splits.train, splits.validation, splits.test)] == [
        "train",
        "validation",
        "test",
    ]
    assert sorted([*splits.train.indices, *splits.validation.indices]) == list(range(10))
    # an index names its image: image i has value i
    for part in (splits.train, splits.validation, splits.test):
        np.testing.assert_array_equal(part.images[:, 0, 0, 0], part.indices)
        np.testing.assert_array_equal(part.labels, part.indices % 2)
    again = sets.load(f"npz:{ten},{ten}", validation_fraction=0.3)
    np.testing.assert_array_equal(splits.validation.indices, again.validation.indices)
    other = sets.load(f"npz:{ten},{ten}", validation_fraction=0.3, validation_seed=1)
    assert set(splits.validation.indices) != set(other.validation.indices)


def test_fewer_examples_are_a_fixed_choice_and_more_than_there_are_is_an_error(ten):
    name = f"npz:{ten},{ten}"
    few, more = (sets.load(name, train_examples=n, test_examples=n) for n in (3, 5))
    assert set(few.train.indices) < set(more.train.indices) and set(few.test.indices) < set(
        more.test.indices
    )
    assert len(few.test.labels) == 3
    np.testing.assert_array_equal(few.validation.indices, more.validation.indices)
    with pytest.raises(DataError, match="has 9 training images, asked for 99"):
        sets.load(name, train_examples=99)
    with pytest.raises(DataError, match="has 10 test images, asked for 11"):
        sets.load(name, test_examples=11)
    for fraction in (0.0, 1.0, float("nan")):
        with pytest.raises(DataError, match=r"must lie in \(0, 1\)"):
            sets.load(name, validation_fraction=fraction)
    with pytest.raises(DataError, match="too few to hold"):
        sets.load(name, validation_fraction=0.99)
    with pytest.raises(DataError, match="validation_seed must be at least 0, got -1"):
        sets.load(name, validation_seed=-1)


def test_the_fingerprint_changes_with_every_pixel_label_and_order(ten):
    whole = sets.load(f"npz:{ten},{ten}").test
    rows = np.arange(10)
    seen = {
        sets.fingerprint(whole),
        sets.fingerprint(whole.take(rows[::-1])),
        sets.fingerprint(whole.take(rows[:9])),
    }
    images, labels = whole.images.copy(), whole.labels.copy()
    images[3, 2, 1, 0] += 1
    labels[5] = 1 - labels[5]
    seen.add(sets.fingerprint(dataset.in_memory("a", "test", images, whole.labels)))
    seen.add(sets.fingerprint(dataset.in_memory("a", "test", whole.images, labels)))
    assert len(seen) == 5
    assert sets.fingerprint(whole.take(rows)) == sets.fingerprint(whole)


# ---------------------------------------------------------------------------------------------- npz


def test_pixels_are_scaled_to_the_unit_interval_by_what_was_stored(tmp_path):
    values = np.array([0, 51, 255], np.uint8)
    images = np.zeros((6, 3, 1), np.uint8)
    images[0, :, 0] = values
    path = write_npz(tmp_path / "whole.npz", images, np.arange(6) % 2)
    first = sets.load(f"npz:{path},{path}").test.unit_images([0])
    np.testing.assert_array_equal(first.ravel(), np.float32([0, 0.2, 1]))
    path = write_npz(tmp_path / "float.npz", images / 255, np.arange(6) % 2)
    np.testing.assert_allclose(
        sets.load(f"npz:{path},{path}").test.unit_images([0]), first, rtol=1e-7
    )


def test_one_file_with_four_arrays_is_read_too(tmp_path):
    images = np.full((10, 4, 4, 3), 255, np.uint8)
    np.savez(
        tmp_path / "a.npz",
        x_train=images,
        y_train=np.arange(10),
        x_test=images[:5],
        y_test=np.arange(5),
    )
    splits = sets.load(f"npz:{tmp_path}/a.npz")
    assert splits.train.classes == splits.test.classes == 10 and splits.test.images.shape == (
        5,
        4,
        4,
        3,
    )
    np.savez(tmp_path / "b.npz", x_train=images)
    with pytest.raises(
        DataError, match="alone must hold x_train, y_train, x_test, y_test; it holds x_train"
    ):
        sets.load(f"npz:{tmp_path}/b.npz")


IMAGES, LABELS = np.full((10, 4, 4), 255, np.uint8), np.arange(10)


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (IMAGES * 1.0, LABELS, r"must lie in \[0, 1\], got 255\.0 to 255\.0.*divide by 255"),
        (IMAGES * 0.0 - 0.5, LABELS, r"must lie in \[0, 1\], got -0\.5 to -0\.5.*do not normalise"),
        (np.full(IMAGES.shape, np.nan), LABELS, r"must lie in \[0, 1\], got nan"),
        (IMAGES // 255, LABELS, "no uint8 pixel is above 1, and white is 255"),
        (IMAGES.astype(np.int64), LABELS, "must be uint8 or floats .* got int64"),
        (IMAGES.astype(np.uint16) * 257, LABELS, r"got uint16\. Of 16 bits: \(images / 65535\)"),
        (np.asarray(jnp.ones((10, 4, 4), jnp.bfloat16)), LABELS, "If they are bfloat16"),
        (IMAGES / np.float32(255**2), LABELS, r"above 0\.00392, and white is 1: .*once more"),
        (IMAGES[:, :0], LABELS, r"images of shape \(10, 0, 4, 1\)"),
        (np.full((10, 3, 8, 9), 255, np.uint8), LABELS, r"channels first; .*np\.moveaxis"),
        (np.full((10, 1, 8, 8), 0.5), LABELS, r"have their 1 channels first"),
        (IMAGES, LABELS / 10, "labels must be integers from 0 on, got float64"),
        (IMAGES, LABELS - 1, "labels must be integers from 0 on, got int64, -1"),
        (IMAGES, np.eye(10, dtype=int), r"\(10, 10\) look like one-hot ones; .*np\.argmax"),
        (IMAGES, LABELS.reshape(1, 10, 1), r"labels of shape \(1, 10, 1\); expected \(N,\)"),
        (IMAGES, LABELS + 2**40 * (LABELS == 3), f"the label {2**40 + 3}, of image 3, is none"),
        (IMAGES, LABELS * 10**8, "the label 900000000, of image 9, is none of 100000 classes"),
        (IMAGES, LABELS.astype(np.uint64) - np.uint64(1), "the label 18446744073709551615, of ima"),
        (IMAGES, np.array([*"abcdefghij"]), r"labels are text .*\['a'\] first.*np\.unique"),
        (IMAGES, LABELS.astype(object), "an array in it is of Python objects"),
        (IMAGES, LABELS[:5], "do not fit 5 labels"),
        (IMAGES, LABELS * 0, "only one class"),
        (IMAGES[:, 0, 0], LABELS, r"images of shape \(10,\); expected \(N, height"),
        (IMAGES[:0], LABELS[:0], "there are no images"),
        (IMAGES > 1, LABELS, r"got bool\. Of black and white: images\.astype"),
        (IMAGES, LABELS.astype("m8[s]"), r"integers from 0 on, got timedelta64\[s\]"),
    ],
)
def test_images_and_labels_that_make_no_sense_are_refused(tmp_path, images, labels, message):
    path = write_npz(tmp_path / "bad.npz", images, labels)
    with pytest.raises(DataError, match=message):
        sets.load(f"npz:{path},{path}")


def test_labels_are_read_whatever_integers_they_are_and_as_a_column(tmp_path):
    for labels in (LABELS.astype(np.uint64), LABELS.astype(np.int8)[:, None]):
        path = write_npz(tmp_path / "a.npz", IMAGES, labels, other=np.array([None]))
        found = sets.load(f"npz:{path},{path}").test
        assert found.labels.dtype == np.int32 and found.labels.tolist() == list(range(10))


def test_classes_without_a_training_image_are_named_beside_figures(tmp_path):
    train = write_npz(tmp_path / "train.npz", IMAGES, LABELS % 2 * 4)
    test = write_npz(tmp_path / "test.npz", IMAGES, LABELS)
    splits = sets.load(f"npz:{train},{test}")
    assert splits.train.classes == 10
    assert splits.test.note == "no training image of 8 of 10 classes: 1, 2, 3, 5, 6, ..."
    assert splits.test.note in dataset.described(splits)


def test_a_test_file_alone_is_a_test_split_with_the_classes_that_are_said(tmp_path, ten):
    for names in (("images", "labels"), ("x", "y")):
        np.savez(tmp_path / "test.npz", **dict(zip(names, (IMAGES, LABELS % 3), strict=True)))
        found = sets.load_test(f"npz:{tmp_path}/test.npz", classes=10, test_examples=7)
        assert (found.split, found.classes, len(found.labels)) == ("test", 10, 7)
        whole = sets.load(f"npz:{tmp_path}/test.npz,{tmp_path}/test.npz", test_examples=7).test
        np.testing.assert_array_equal(found.indices, whole.indices)
        assert sets.fingerprint(found) == sets.fingerprint(whole)
    assert sets.load_test(f"npz:{tmp_path}/test.npz").classes == 3
    with pytest.raises(DataError, match=r"the label 2, of image 2, is none of 2 classes"):
        sets.load_test(f"npz:{tmp_path}/test.npz", classes=2)
    with pytest.raises(DataError, match="test file alone can be certified"):
        sets.load(f"npz:{tmp_path}/test.npz")
    # All other names are as ever.
    name = f"npz:{ten},{ten}"
    assert sets.fingerprint(sets.load_test(name)) == sets.fingerprint(sets.load(name).test)


def test_files_that_are_missing_damaged_or_do_not_fit_together_are_named(tmp_path, ten):
    with pytest.raises(DataError, match=r"none\.npz is not there"):
        sets.load(f"npz:{tmp_path}/none.npz")
    with pytest.raises(DataError, match=r"expected npz:<train\.npz>,<test\.npz>"):
        sets.load("npz:a,b,c")
    whole = ten.read_bytes()
    cut = tmp_path / "cut.npz"
    for damaged in (
        whole[:-200],
        whole[:50],
        b"",
        b"no zip at all",
        whole[:300] + b"\xff" * 20 + whole[320:],
    ):
        cut.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cut\.npz cannot be read as npz"):
            sets.load(f"npz:{cut},{ten}")
    with open(cut, "wb") as file:
        np.save(file, IMAGES)
    with pytest.raises(DataError, match=r"cut\.npz cannot be read as npz: it is a single array"):
        sets.load(f"npz:{cut},{ten}")
    np.savez(cut, pictures=IMAGES, labels=LABELS)
    with pytest.raises(
        DataError, match=r"must hold images and labels \(or x and y\); it holds pictures, labels"
    ):
        sets.load(f"npz:{cut},{ten}")
    np.savez(cut, images=IMAGES, labels=LABELS, x=IMAGES // 2, y=LABELS)
    with pytest.raises(DataError, match="holds images and labels, and x and y too"):
        sets.load(f"npz:{cut},{ten}")
    write_npz(cut, np.full((10, 5, 4), 255, np.uint8), LABELS)
    with pytest.raises(DataError, match=r"\(4, 4, 1\) differ from test images \(5, 4, 1\)"):
        sets.load(f"npz:{ten},{cut}")


def test_cifar10_is_unpacked_and_loaded_and_its_disclosure_is_carried(shared, tmp_path):
    unpack = [sys.executable, shared / "data" / "unpack.py", "cifar10", tmp_path]
    subprocess.run(unpack, check=True, timeout=120)
    splits = sets.load(
        f"npz:{tmp_path}/cifar10_train.npz,{tmp_path}/cifar10_test.npz", test_examples=1000
    )
    assert splits.train.images.shape == (45000, 32, 32, 3) and splits.train.images.dtype == np.uint8
    assert (
        len(splits.validation.labels) == 5000
        and splits.train.classes == 10
        and splits.train.levels == 255
    )
    whole = np.concatenate([splits.train.labels, splits.validation.labels])
    assert np.bincount(whole).tolist() == [5000] * 10
    # The mean pixel of the training set, a well-known fact of CIFAR-10.
    everything = np.concatenate([splits.train.images, splits.validation.images])
    np.testing.assert_allclose(
        everything.mean((0, 1, 2)) / 255, [0.4914, 0.4822, 0.4465], atol=1e-4
    )
    assert (
        splits.test.note
        == "20 of the file's 10000 test images are not exact copies of the official ones"
    )
    assert splits.train.note == splits.validation.note == ""


# ------------------------------------------------------------------------------------------- folder


@pytest.fixture
def folder(tmp_path):
    """TinyImageNet's layout: two classes, three training images each, a subset of the listed test
    images."""
    root = tmp_path / "tiny"
    (root / "val" / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(path, color, mode="RGB"):
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 3, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(np.uint8(color) + noise).convert(mode).save(path, format="JPEG", quality=95)

    for number, wnid in enumerate(("n02", "n01")):
        for i in range(3):
            mode = "L" if i == 2 else "RGB"  # some of TinyImageNet's images are grey
            write(
                root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", [200 * number, 100, 50], mode
            )
    for i in range(3):
        write(root / "val" / "images" / f"val_{i}.JPEG", [200 * (i % 2), 100, 50])
    lines = [f"val_{i}.JPEG\t{('n02', 'n01')[i % 2]}\t0\t0\t8\t8\n" for i in range(5)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("n02\nn01\n")
    return root


def test_a_folder_in_tiny_imagenets_layout_is_read_with_its_labels(folder):
    splits = sets.load(f"folder:{folder}")
    parts = (splits.train, splits.validation, splits.test)
    assert [len(part.labels) for part in parts] == [5, 1, 3]
    for part in parts:
        assert (
            part.images.shape[1:] == (8, 8, 3)
            and part.images.dtype == np.uint8
            and part.classes == 2
        )
        colored = np.ptp(part.images.astype(int), axis=-1).max((1, 2)) > 5
        # Classes are numbered in the order of their names; n01 has the strong red.
        red = part.images[..., 0].mean((1, 2)) > 100
        np.testing.assert_array_equal(part.labels[colored], np.where(red, 0, 1)[colored])
    (folder / "wnids.txt").unlink()  # the folders' names are enough
    again = sets.load(f"folder:{folder}")
    assert sets.fingerprint(again.train) == sets.fingerprint(splits.train)


def test_a_damaged_image_is_an_error_that_names_it(folder):
    file = folder / "train" / "n01" / "images" / "n01_1.JPEG"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a picture"):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"n01_1\.JPEG is damaged: .*Replace or remove it"):
            sets.load(f"folder:{folder}")


def test_a_folder_that_does_not_fit_the_layout_is_an_error_that_says_what_does(folder, tmp_path):
    with pytest.raises(DataError, match=r"nothing is no folder; expected one with train/<class>"):
        sets.load(f"folder:{tmp_path}/nothing")
    with pytest.raises(DataError, match=rf"no train/, but {folder} has: give folder:{folder}\."):
        sets.load(f"folder:{tmp_path}")
    said = (
        r"has no train/: expected .*TinyImageNet's layout .*It holds images, val_annotations\.txt"
    )
    with pytest.raises(DataError, match=said):
        sets.load(f"folder:{folder}/val")
    annotations = folder / "val" / "val_annotations.txt"
    good = annotations.read_text()
    annotations.write_text(good + "val_9.JPEG\tn77\n")
    with pytest.raises(DataError, match="names the class n77"):
        sets.load(f"folder:{folder}")
    annotations.write_text(good + "val_9.JPEG n01\n")
    with pytest.raises(
        DataError, match=r"line 6 of val_annotations\.txt is not <file>, tab, <class>"
    ):
        sets.load(f"folder:{folder}")
    annotations.write_text(good)
    odd = folder / "val" / "images" / "val_1.JPEG"
    Image.new("RGB", (9, 8)).save(odd, format="JPEG")
    with pytest.raises(
        DataError, match=r"val_1\.JPEG is \(8, 9, 3\), .*val_0\.JPEG is \(8, 8, 3\)"
    ):
        sets.load(f"folder:{folder}")
    for file in (folder / "val" / "images").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="no test images found"):
        sets.load(f"folder:{folder}")


def test_a_byte_order_mark_drops_no_image(folder):
    expected = sets.load(f"folder:{folder}")
    for file in (folder / "wnids.txt", folder / "val" / "val_annotations.txt"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    found = sets.load(f"folder:{folder}")
    for split in ("train", "test"):
        assert sets.fingerprint(getattr(found, split)) == sets.fingerprint(getattr(expected, split))
    for content in ("nö1\n".encode("latin1"), "n01\n".encode("utf-16")):
        (folder / "wnids.txt").write_bytes(content)
        with pytest.raises(DataError, match=r"wnids\.txt is no UTF-8 text .*iconv"):
            sets.load(f"folder:{folder}")


def test_a_test_image_that_no_line_names_is_an_error_that_names_it(folder):
    images = folder / "val" / "images"
    (images / "more.JPEG").write_bytes((images / "val_0.JPEG").read_bytes())
    with pytest.raises(DataError, match=r"does not say of which class more\.JPEG is"):
        sets.load(f"folder:{folder}")


# ------------------------------------------------------------------- folders of one folder a class

COLORS = {"cat": 40, "dog": 120, "eel": 200}


def paint(path, value, mode="RGB", **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (value, 100, 50)).convert(mode).save(path, **how)


@pytest.fixture
def tree(tmp_path):
    """Three classes as people keep them; the images of a class have its value of `COLORS`."""
    root = tmp_path / "tree"
    for name, value in COLORS.items():
        for file in ("a.png", "b.JPG", "sub/c.jpeg", "sub/deep/d.webp"):
            paint(root / "train" / name / file, value)
        paint(root / "val" / name / "x.png", value)
    return root


def right(dataset, count):
    """Whether there are so many images, and each has the label of its colour."""
    reds = dataset.images[:, 2, 2, 0].astype(int)
    assert len(reds) == count and dataset.classes == 3
    nearest = np.argmin(np.abs(reds[:, None] - np.array([*COLORS.values()])), axis=1)
    np.testing.assert_array_equal(dataset.labels, nearest)


def all_right(root, train=12, test=3):
    splits = sets.load(f"folder:{root}", validation_fraction=0.25)
    right(splits.train, train - train // 4)
    right(splits.validation, train // 4)
    right(splits.test, test)
    return splits


@pytest.mark.parametrize("name", ["val", "test", "valid", "validation"])
def test_a_folder_a_class_is_read_at_any_depth_with_any_ending(tree, name):
    (tree / "val").rename(tree / name)
    splits = all_right(tree)
    assert splits.test.images.shape == (3, 5, 6, 3) and splits.test.note == ""


def test_hidden_files_and_folders_are_no_data(tree):
    """A hidden folder in train/ was class 0, and moved every label by one."""
    for split in ("train", "val"):
        paint(tree / split / ".ipynb_checkpoints" / "a-checkpoint.png", 0)
        paint(tree / split / "cat" / ".ipynb_checkpoints" / "a-checkpoint.png", 0)
        (tree / split / ".DS_Store").write_bytes(b"junk")
        (tree / split / "dog" / "._a.png").write_bytes(b"junk")
        (tree / split / "dog" / "boxes.txt").write_text("1 2 3")
    all_right(tree)


def test_links_to_images_and_to_folders_are_followed(tree, tmp_path):
    """A class behind a link was read as empty."""
    for place in ("train/cat/sub", "train/dog", "val"):
        elsewhere = tmp_path / place.replace("/", "-")
        (tree / place).rename(elsewhere)
        (tree / place).symlink_to(elsewhere)
    all_right(tree)
    for place in ("train/eel/gone.png", "train/gone", "val/dog/gone"):
        link = tree / place
        link.symlink_to(tmp_path / "nowhere")
        with pytest.raises(DataError, match=rf"{place} is a link to nothing"):
            sets.load(f"folder:{tree}")
        link.unlink()
    os.mkfifo(tree / "train" / "eel" / "pipe.png")
    with pytest.raises(DataError, match=r"eel/pipe\.png is called as an image is, and is no file"):
        sets.load(f"folder:{tree}")
    os.remove(tree / "train" / "eel" / "pipe.png")
    (tree / "train" / "eel" / "up").symlink_to(tree / "train" / "eel")
    with pytest.raises(DataError, match=r"train/eel/up is .*/train/eel once more, by a link"):
        sets.load(f"folder:{tree}")


def test_images_without_a_class_and_classes_without_images_are_named(tree):
    def refused(message):
        with pytest.raises(DataError, match=message):
            sets.load(f"folder:{tree}")

    paint(tree / "train" / "loose.png", 0)
    refused(r"train/loose\.png belongs to no class: expected train/<class>/loose\.png")
    (tree / "train" / "loose.png").unlink()
    paint(tree / "val" / "fox" / "a.png", 0)
    refused(r"val: fox is no class of the training set, which has cat, dog, eel")
    (tree / "val" / "fox" / "a.png").unlink()
    (tree / "val" / "fox").rmdir()
    (tree / "train" / "ant").mkdir()
    refused(r"train/ant: no images found .*A class is a folder in train/: remove one that is none")
    (tree / "train" / "ant").rmdir()
    paint(tree / "train" / "cat" / "a.tga", 0)
    refused(r"a\.tga is not read, only .*: convert it")
    (tree / "train" / "cat" / "a.tga").unlink()
    (tree / "val" / "dog" / "x.png").unlink()
    note = all_right(tree, test=2).test.note
    assert note == "no test image of 1 classes: dog"
    paint(tree / "test" / "dog" / "y.png", COLORS["dog"])
    assert (
        "the test images are those of test/, val/ is not read" in all_right(tree, test=1).test.note
    )
    for name in ("val", "test"):
        (tree / name).rename(tree / f".{name}")
    refused(r"has no test images: expected train/<class>/\*\.png and test/<class>")


def test_an_image_is_read_as_people_see_it_or_refused(tree):
    """16 bits were clipped to white; what is transparent had whatever colour lies below."""
    turned = Image.Exif()
    turned[0x0112] = 6  # shown a quarter to the right
    left = np.zeros((6, 5, 3), np.uint8)
    left[5:] = 255
    file = tree / "train" / "cat" / "a.png"
    Image.fromarray(left).save(file, exif=turned)
    shown = local_pixels(file)
    assert shown.shape == (5, 6, 3) and shown[:, 0].min() == 255 and shown[:, 1:].max() == 0

    clear = np.zeros((5, 6, 4), np.uint8)
    clear[..., :] = 200, 0, 0, 255
    clear[0, 0, 3], clear[0, 1, 3] = 0, 128
    Image.fromarray(clear).save(file)
    shown = local_pixels(file)
    assert shown[0, 0].tolist() == [255, 255, 255] and shown[1, 1].tolist() == [200, 0, 0]
    assert abs(shown[0, 1].astype(int) - [227, 127, 127]).max() <= 1
    Image.fromarray(clear).quantize(4).save(file)
    assert local_pixels(file)[0, 0].tolist() == [255, 255, 255]
    for mode in ("P", "L", "1", "LA", "CMYK"):
        ending = {"CMYK": "tiff"}.get(mode, "png")
        paint(tree / "other" / f"a.{ending}", 255, mode)
        grey = mode in ("L", "1", "LA")
        expected = [140, 140, 140] if grey else [255, 100, 50]
        if mode != "1":
            found = local_pixels(tree / "other" / f"a.{ending}")[2, 2].astype(int)
            assert abs(found - expected).max() <= 4, mode

    for deep in (np.full((5, 6), 40000, np.uint16), np.full((5, 6), 0.5, np.float32)):
        file = tree / "train" / "cat" / "deep.tif"
        Image.fromarray(deep).save(file)
        with pytest.raises(DataError, match=r"deep\.tif cannot be read right: .*more than 8 bits"):
            sets.load(f"folder:{tree}")


def local_pixels(path):
    from lipjax.data import folders

    return folders._pixels(path, None)


def test_the_real_tiny_imagenet_images_are_read(shared, tmp_path):
    import tarfile

    # Two of the 200 classes: what is read is the same code, and decoding all takes its time.
    with tarfile.open(shared / "data" / "tiny_imagenet" / "tiny-imagenet-200-subset.tar") as tar:
        members = tar.getmembers()
        classes = sorted(
            {m.name.split("/")[2] for m in members if "/train/" in m.name and m.name.count("/") > 2}
        )[:2]
        wanted = [
            m
            for m in members
            if "/val/" in m.name or any(f"/train/{c}/" in m.name for c in classes)
        ]
        wanted += [m for m in members if m.name.endswith("wnids.txt")]
        tar.extractall(tmp_path, wanted, filter="data")
    splits = sets.load(f"folder:{tmp_path}/tiny-imagenet-200")
    assert len(classes) == 2 and splits.train.classes == 200
    assert splits.train.images.shape == (90, 64, 64, 3) and len(splits.validation.labels) == 10
    assert splits.test.images.shape == (2000, 64, 64, 3)
    assert np.bincount(splits.test.labels).tolist() == [10] * 200


# --------------------------------------------------------------------------------------------- TFDS


def idx(path):
    """An idx file of unsigned bytes: two zero bytes, 8, the number of axes, their lengths, the
    bytes."""
    raw = gzip.decompress(path.read_bytes())
    kind, axes = struct.unpack(">HBB", raw[:4])[1:]
    shape = struct.unpack(f">{axes}I", raw[4 : 4 + 4 * axes])
    assert kind == 8
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


@pytest.mark.slow
def test_tfds_prepares_its_own_mnist_offline_from_the_original_archives(
    shared, tmp_path, capfd, monkeypatch
):
    pytest.importorskip("tensorflow_datasets")
    source = shared / "data" / "mnist"
    # Nothing is downloaded: with these, every connection would fail.
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    splits = sets.load("mnist", data_dir=str(tmp_path / "prepared"), manual_dir=str(source))
    assert "preparing mnist" in capfd.readouterr().err
    assert "tensorflow" not in sys.modules  # it was a child's
    images = np.concatenate([splits.train.images, splits.validation.images])
    labels = np.concatenate([splits.train.labels, splits.validation.labels])
    assert images.shape == (60000, 28, 28, 1) and splits.test.images.shape == (10000, 28, 28, 1)
    assert splits.train.levels == 255 and splits.train.classes == 10

    def sorted_rows(images, labels):  # TFDS shuffles
        rows = np.concatenate(
            [images.reshape(len(images), -1), labels[:, None].astype(np.uint8)], axis=1
        )
        return rows[np.lexsort(rows.T)]

    for found, part in (
        ((images, labels), "train"),
        ((splits.test.images, splits.test.labels), "t10k"),
    ):
        original = (
            idx(source / f"{part}-images-idx3-ubyte.gz"),
            idx(source / f"{part}-labels-idx1-ubyte.gz"),
        )
        np.testing.assert_array_equal(sorted_rows(*found), sorted_rows(*original))

    # Prepared once, it is read again without archives, without TensorFlow and without a child.
    def refuse(*_, **__):
        raise AssertionError("prepared a second time")

    monkeypatch.setattr(tfds_sets.subprocess, "run", refuse)
    again = sets.load("mnist", data_dir=str(tmp_path / "prepared"))
    assert sets.fingerprint(again.train) == sets.fingerprint(splits.train)


def prepare_own_set(
    name,
    folder,
    sizes=((4, 5),),
    splits=("train", "test"),
    label="label",
    channels=1,
    count=6,
    shape=(None, None),
):
    """A TFDS set of our own, `count` images a split, image i of value 40 i and class i % 3; without
    TensorFlow.

    The split "withheld" is called "test" and has the label -1, as ImageNet's has.
    """
    tfds = pytest.importorskip("tensorflow_datasets")

    def info(self):
        image = tfds.features.Image(shape=(*shape, channels))
        features = {"image": image, label: tfds.features.ClassLabel(num_classes=3)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def examples(self, withheld):
        for i in range(count):
            png = io.BytesIO()
            Image.new(
                "L" if channels == 1 else "RGB", sizes[i % len(sizes)], (40 * i,) * channels
            ).save(png, "PNG")
            png.seek(0)
            yield i, {"image": png, label: -1 if withheld else i % 3}

    members = dict(
        VERSION=tfds.core.Version("1.0.0"),
        __module__=__name__,
        _info=info,
        _generate_examples=examples,
        _split_generators=lambda self, _: {
            split.replace("withheld", "test"): self._generate_examples(split == "withheld")
            for split in splits
        },
    )
    # TFDS registers the class under its name
    kind = type(name, (tfds.core.GeneratorBasedBuilder,), members)
    kind(data_dir=str(folder), file_format="array_record").download_and_prepare()


@pytest.mark.parametrize("shape", [(5, 4), (None, None)])
def test_a_prepared_tfds_set_is_loaded_by_name_without_tensorflow(tmp_path, shape):
    """Whether it says its images' size or not."""
    name = "LipjaxGrey" if shape[0] else "LipjaxGrey2"
    prepare_own_set(name, tmp_path, splits=("train", "validation"), shape=shape)
    splits = sets.load("lipjax_grey" if shape[0] else "lipjax_grey2", data_dir=str(tmp_path))
    # else nothing had to be looked for
    assert bool(list(tmp_path.rglob("lipjax-*.npz"))) == (shape == (None, None))
    assert [len(part.labels) for part in (splits.train, splits.validation, splits.test)] == [
        5,
        1,
        6,
    ]
    # without a test split, TFDS's validation split is it
    for part in (splits.train, splits.validation, splits.test):
        assert (
            part.images.shape[1:] == (5, 4, 1)
            and part.classes == 3
            and isinstance(part.images, np.ndarray)
        )
        np.testing.assert_array_equal(part.labels, part.images[:, 0, 0, 0] // 40 % 3)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("channels", [1, 3])
def test_a_large_tfds_set_stays_on_disk_with_the_same_images_and_is_read_through_once(
    tmp_path, monkeypatch, channels
):
    name = f"LipjaxLarge{channels}"
    prepare_own_set(name, tmp_path, channels=channels)
    name = f"lipjax_large{channels}"
    small = sets.load(name, data_dir=str(tmp_path))
    monkeypatch.setattr(tfds_sets, "IN_MEMORY_BYTES", 12 * 20 * channels - 1)

    read = on_disk.Source.read

    def first_alone(self, position):  # the first label says whether the labels are withheld
        assert position == 0, "read through a second time"
        return read(self, position)

    monkeypatch.setattr(on_disk.Source, "read", first_alone)
    large = sets.load(name, data_dir=str(tmp_path))
    fingerprints = {sets.fingerprint(part) for part in (large.train, large.validation, large.test)}
    assert len(fingerprints) == 3
    monkeypatch.undo()
    for split in ("train", "validation", "test"):
        found, expected = getattr(large, split), getattr(small, split)
        assert isinstance(found.images, on_disk.Images) and isinstance(expected.images, np.ndarray)
        assert (
            found.images.nbytes == expected.images.nbytes and found.levels == expected.levels == 255
        )
        for images in (found.images, pickle.loads(pickle.dumps(found.images))):
            np.testing.assert_array_equal(images[:], expected.images)
        np.testing.assert_array_equal(found.labels, expected.labels)
        np.testing.assert_array_equal(found.indices, expected.indices)
    # What was kept belongs to files of one size: others are read through anew.
    (kept,) = tmp_path.rglob("lipjax-train.npz")
    for content in (b"", kept.with_name("lipjax-test.npz").read_bytes()):
        kept.write_bytes(content)
        again = sets.load(name, data_dir=str(tmp_path), image_size=5)
        np.testing.assert_array_equal(again.train.labels, small.train.labels)
    assert "tensorflow" not in sys.modules


def test_tfds_images_of_several_sizes_are_brought_to_one(tmp_path):
    prepare_own_set("LipjaxSizes", tmp_path, sizes=((4, 5), (15, 9)))
    with pytest.raises(
        DataError,
        match=r"lipjax_sizes/1\.0\.0 has images of several sizes: give the size .*image_size=",
    ):
        sets.load("lipjax_sizes", data_dir=str(tmp_path))
    splits = sets.load("lipjax_sizes", data_dir=str(tmp_path), image_size=7)
    assert splits.test.images.shape == (6, 7, 7, 1)
    np.testing.assert_array_equal(
        np.unique(splits.test.images[:], axis=0)[:, 3, 3, 0], np.arange(6) * 40
    )


def test_a_damaged_tfds_record_is_an_error_that_names_it(tmp_path):
    prepare_own_set("LipjaxDamaged", tmp_path, shape=(5, 4))
    name, where = "lipjax_damaged", {"data_dir": str(tmp_path), "image_size": 4}
    images = sets.load(name, **where).test.images
    (file,) = tmp_path.rglob("*-test.array_record*")
    whole = file.read_bytes()
    stored = [images.source.reader[number] for number in range(6)]
    for number in (0, 3):
        at = whole.index(stored[number])
        file.write_bytes(whole[:at] + bytes(8) + whole[at + 8 :])
        said = (
            rf"{file}, record {number}, is missing or damaged: .*Remove {file.parent} to have "
            r"TFDS prepare the set again"
        )
        with pytest.raises(DataError, match=said):
            sets.load(name, **where).test.images[:]
        with pytest.raises(DataError, match=said):
            sets.load(name, data_dir=str(tmp_path))
        with pytest.raises(DataError, match=said):
            pickle.loads(pickle.dumps(images))[:]
    for bad in (b"", stored[2][:-1]):
        with pytest.raises(ValueError, match=r"Error parsing|holds no image"):
            images.source.parse(bad, 0)


def test_of_a_set_with_one_split_a_fixed_fifth_is_the_test_split_and_that_is_said(tmp_path):
    prepare_own_set("LipjaxOneSplit", tmp_path, splits=("train",), count=20)
    splits, other = (
        sets.load("lipjax_one_split", data_dir=str(tmp_path), validation_seed=n) for n in (0, 1)
    )
    assert [len(part.labels) for part in (splits.train, splits.validation, splits.test)] == [
        14,
        2,
        4,
    ]
    rows = np.concatenate([part.indices for part in (splits.train, splits.validation, splits.test)])
    np.testing.assert_array_equal(np.sort(rows), np.arange(20))  # no image is in two of them
    np.testing.assert_array_equal(splits.test.indices, other.test.indices)
    assert not np.array_equal(splits.validation.indices, other.validation.indices)
    assert (
        splits.test.note == splits.train.note
        and "only a train split: its test images here are 4 of" in other.test.note
    )
    lazy = sets.load("lipjax_one_split", data_dir=str(tmp_path), image_size=4).test
    np.testing.assert_array_equal(lazy.labels, splits.test.labels)


def test_a_test_split_without_labels_is_not_the_test_split(tmp_path):
    prepare_own_set("LipjaxWithheld", tmp_path, splits=("train", "validation", "withheld"))
    splits = sets.load("lipjax_withheld", data_dir=str(tmp_path))
    assert splits.test.labels.tolist() == (splits.test.images[:, 0, 0, 0] // 40 % 3).tolist()


def test_a_tfds_set_that_is_not_image_classification_is_refused(tmp_path):
    prepare_own_set("LipjaxOddSplit", tmp_path, splits=("odd",))
    with pytest.raises(DataError, match="lipjax_odd_split has no train split: odd"):
        sets.load("lipjax_odd_split", data_dir=str(tmp_path))
    prepare_own_set("LipjaxNames", tmp_path, label="species")
    with pytest.raises(
        DataError, match="lipjax_names is not image classification: it has image, species"
    ):
        sets.load("lipjax_names", data_dir=str(tmp_path))


def test_well_known_sets_have_the_names_that_one_tries(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    asked = []

    def child(command, **_):
        asked.append(command[3])
        return subprocess.CompletedProcess(command, 1, "", "not here\n")

    monkeypatch.setattr(tfds_sets.subprocess, "run", child)
    monkeypatch.setattr(tfds_sets, "reachable", lambda url: True)
    own = {"svhn": "svhn_cropped", "fashion-mnist": "fashion_mnist", "imagenet": "imagenet2012"}
    names = [
        "mnist",
        "fashion_mnist",
        "fashion-mnist",
        "cifar10",
        "cifar100",
        "svhn",
        "eurosat",
        "imagenet",
        "imagenet2012",
    ]
    for name in names:
        with pytest.raises(DataError, match="could not prepare"):
            sets.load(name, data_dir=str(tmp_path), image_size=8)
    assert asked == [own.get(name, name) for name in names]


def test_imagenet_is_prepared_offline_from_its_archives(tmp_path, capfd, monkeypatch):
    """TFDS's own builder, in a child with TensorFlow, on archives with the official names and
    layout.

    Faked: they hold three classes of two images and three validation images in place of 1,281,167
    and 50,000. The builder has the lists of 1000 classes and 50,000 validation labels with it and
    asks for neither checksums nor all images; it gives the validation images its labels in the
    order of their names.
    """
    pytest.importorskip("tensorflow_datasets")
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("TensorFlow is not installed")
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing is downloaded
    manual = tmp_path / "archives"
    manual.mkdir()

    def tar(files):
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return raw.getvalue()

    def jpeg(value, width, height, mode="RGB"):
        raw = io.BytesIO()
        Image.new("RGB", (width, height), (value, 100, 50)).convert(mode).save(
            raw, "JPEG", quality=95
        )
        return raw.getvalue()

    classes = {"n01440764": 0, "n01443537": 1, "n15075141": 999}
    images = {
        wnid: {
            f"{wnid}_{i}.JPEG": jpeg(200 * i, 60 + 10 * number, 50 + 20 * i, ("RGB", "L")[i])
            for i in range(2)
        }
        for number, wnid in enumerate(classes)
    }
    (manual / "ILSVRC2012_img_train.tar").write_bytes(
        tar({f"{wnid}.tar": tar(found) for wnid, found in images.items()})
    )
    validation = {f"ILSVRC2012_val_0000000{i}.JPEG": jpeg(80 * i, 70, 50 + i) for i in (1, 2, 3)}
    (manual / "ILSVRC2012_img_val.tar").write_bytes(tar(validation))

    where = {"data_dir": str(tmp_path / "prepared"), "manual_dir": str(manual)}
    with pytest.raises(DataError, match=r"imagenet2012/5\.1\.0 has images of several sizes"):
        sets.load("imagenet2012", **where)
    assert "preparing imagenet2012" in capfd.readouterr().err and "tensorflow" not in sys.modules
    splits = sets.load("imagenet2012", image_size=32, **where)
    assert splits.train.classes == 1000 and splits.train.images.shape == (5, 32, 32, 3)
    assert sorted([*splits.train.labels, *splits.validation.labels]) == [0, 0, 1, 1, 999, 999]
    source = splits.test.images.source
    kept = {source.read(i) for i in range(3)}  # TFDS shuffles
    # The first three of the official list of validation labels: n01751748, n09193705, n02105855.
    assert kept == set(zip(validation.values(), (65, 970, 230), strict=True))
    assert {tuple(image[16, 16] // 20) for image in splits.test.images[:]} == {
        (4, 5, 2),
        (8, 5, 2),
        (12, 5, 2),
    }


def test_an_unknown_name_is_an_error_with_the_nearest_known_one():
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(DataError, match=r"no data set called 'cifar_10'.* Did you mean 'cifar10'"):
        sets.load("cifar_10")
    with pytest.raises(DataError, match="Did you mean 'digits'"):
        sets.load("digit")


def test_what_tfds_cannot_prepare_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")

    def fail(command, **_):
        assert command[1:4] == ["-m", "lipjax.data", "mnist"]
        return subprocess.CompletedProcess(command, 1, "", said)

    monkeypatch.setattr(tfds_sets.subprocess, "run", fail)
    monkeypatch.setattr(tfds_sets, "reachable", lambda url: True)
    said = "Traceback\nConnectionError: no route to host\n"
    with pytest.raises(
        DataError, match=r"(?s)could not prepare mnist: ConnectionError: no route.*manual_dir"
    ):
        sets.load("mnist", data_dir=str(tmp_path))
    said = "Traceback\nModuleNotFoundError: No module named 'tensorflow'\n"
    with pytest.raises(DataError, match=r"need TensorFlow: pip install"):
        sets.load("mnist", data_dir=str(tmp_path))


def test_without_internet_it_is_said_at_once_what_is_tried_and_what_manual_dir_does(
    tmp_path, monkeypatch, capsys
):
    """TFDS itself goes on for minutes, without a word."""
    pytest.importorskip("tensorflow_datasets")

    def never(*_, **__):
        raise AssertionError("TFDS was started")

    monkeypatch.setattr(tfds_sets.subprocess, "run", never)
    monkeypatch.setattr(tfds_sets.urllib.request, "getproxies", dict)
    # Nobody answers, and looking up the name takes longer than anybody waits.
    monkeypatch.setattr(tfds_sets, "REACH_SECONDS", 0.05)
    slow = threading.Event()

    def look_up(*_, **__):
        slow.wait(20)
        raise OSError("no such host")

    monkeypatch.setattr(tfds_sets.socket, "create_connection", look_up)
    said = r"mnist: storage\.googleapis\.com cannot be reached .*\(t10k-images.*manual_dir=<folder>"
    with pytest.raises(DataError, match=said):
        sets.load("mnist", data_dir=str(tmp_path))
    slow.set()
    assert "downloading from storage.googleapis.com into" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"nowhere is no folder; .*archives of mnist, t10k-images"):
        sets.load("mnist", data_dir=str(tmp_path), manual_dir=str(tmp_path / "nowhere"))
    # Archives that are there are tried, and no server.
    (tmp_path / "archives").mkdir()
    with pytest.raises(AssertionError, match="TFDS was started"):
        sets.load("mnist", data_dir=str(tmp_path), manual_dir=str(tmp_path / "archives"))
    assert f"once, from {tmp_path}/archives into" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- augmentation


def test_random_crops_and_flips_are_among_the_possible_ones_and_reach_them_all():
    """Each output is one of the 2 (2 p + 1)^2 possible images, and over many draws all of them come
    up."""
    padding, shape = 1, (3, 4, 2)
    image = 1 + np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    padded = np.pad(image, [(padding, padding), (padding, padding), (0, 0)])
    possible = {}
    for row in range(2 * padding + 1):
        for column in range(2 * padding + 1):
            crop = padded[row : row + shape[0], column : column + shape[1]]
            possible[crop.tobytes()] = possible[crop[:, ::-1].tobytes()] = 0
    assert len(possible) == 18
    images = jnp.asarray(np.repeat(image[None], 2000, axis=0))
    out = np.asarray(sets.random_crop_and_flip(images, jax.random.key(0), padding=padding))
    for one in out:
        possible[one.tobytes()] += 1  # a KeyError: an image that cannot be
    expected = 2000 / 18
    assert all(abs(count - expected) < 5 * np.sqrt(expected) for count in possible.values())


def quarter_turns(images, key, **place):
    return sets.random_rotation(images, key, 90.0, **place)


@pytest.mark.parametrize("augmented", [sets.random_crop_and_flip, quarter_turns])
def test_augmentation_is_a_function_of_its_key_and_of_each_image_alone(augmented):
    images = jax.random.uniform(jax.random.key(1), (8, 5, 5, 1))
    key = jax.random.key(2)
    out = augmented(images, key)
    assert out.shape == images.shape and out.dtype == images.dtype
    np.testing.assert_allclose(out, jax.jit(augmented)(images, key), atol=1e-6)
    assert not np.array_equal(out, augmented(images, jax.random.key(3)))
    changed = augmented(images.at[0].set(0), key)
    np.testing.assert_array_equal(out[1:], changed[1:])
    # What becomes of an image depends on its place in the whole batch.
    np.testing.assert_array_equal(out[3:], augmented(images[3:], key, first=3))


def test_rotations_are_those_of_scipy_by_angles_up_to_the_largest_either_way():
    image = np.random.default_rng(0).random((6, 5, 2)).astype(np.float32)
    key = jax.random.key(4)
    out = np.asarray(sets.random_rotation(jnp.asarray([image] * 40), key, 30.0))
    angles = [
        30 * float(jax.random.uniform(jax.random.fold_in(key, place), minval=-1.0))
        for place in range(40)
    ]
    assert -30 <= min(angles) < -25 and 25 < max(angles) <= 30
    for found, angle in zip(out, angles, strict=True):
        wanted = scipy.ndimage.rotate(
            image, angle, (1, 0), reshape=False, order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert out.min() >= 0 and out.max() <= 1
