"""Records on disk: the same images as the folder they come from, lazily; what is damaged or
half-written is named."""

import dataclasses
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from lipjax.data import folders, records, sets
from lipjax.data import images as on_disk
from lipjax.data import stored as stored_records
from lipjax.data.sets import DataError


def write_folder(root, sizes=((20, 16),), count=6):
    """TinyImageNet's layout: two classes, `count` training images each, 5 test images, noisy JPEGs
    of the given sizes."""
    rng = np.random.default_rng(0)
    number = 0

    def write(path, mode="RGB"):
        nonlocal number
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = sizes[number % len(sizes)]
        number += 1
        # Coarse noise: neither flat, nor so fine that JPEG loses it.
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).convert(mode).save(path, format="JPEG")

    for wnid in ("n02", "n01"):
        for i in range(count):
            write(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", "L" if i == 2 else "RGB")
    for i in range(5):
        write(root / "val" / "images" / f"val_{i}.JPEG")
    lines = [f"val_{i}.JPEG\t{('n02', 'n01')[i % 2]}\t0\t0\t8\t8\n" for i in range(5)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("n02\nn01\n")
    return root


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "tiny")


@pytest.fixture
def stored(folder, tmp_path):
    """`folder` as records, three training images a shard."""
    records.convert(folder, tmp_path / "records", shard_bytes=1000)
    return tmp_path / "records"


def same(a: sets.Dataset, b: sets.Dataset):
    np.testing.assert_array_equal(a.images[:], b.images[:])
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_array_equal(a.indices, b.indices)
    assert (a.split, a.levels, a.classes, a.labels.dtype) == (
        b.split,
        b.levels,
        b.classes,
        b.labels.dtype,
    )


# ---------------------------------------------------------------------------------- the same images


@pytest.mark.parametrize("image_size", [None, 12])
@pytest.mark.parametrize(
    "arguments", [{}, {"train_examples": 4, "test_examples": 3, "validation_fraction": 0.3}]
)
def test_records_hold_the_folders_examples_in_its_order_pixel_for_pixel(
    folder, stored, image_size, arguments
):
    assert len(list(stored.glob("train-*.array_record"))) > 2
    expected = sets.load(f"folder:{folder}", image_size=image_size, **arguments)
    found = sets.load(f"records:{stored}", image_size=image_size, **arguments)
    for split in ("train", "validation", "test"):
        same(getattr(found, split), getattr(expected, split))
        assert isinstance(getattr(found, split).images, on_disk.Images)


def test_the_real_tiny_imagenet_is_the_same_from_records(shared, tmp_path):
    import tarfile

    with tarfile.open(shared / "data" / "tiny_imagenet" / "tiny-imagenet-200-subset.tar") as tar:
        names = [
            name
            for name in tar.getnames()
            if "/train/" not in name or name.split("/")[2].startswith("n017")
        ]
        tar.extractall(tmp_path, [tar.getmember(name) for name in names], filter="data")
    root = tmp_path / "tiny-imagenet-200"
    records.convert(root, tmp_path / "records")
    expected, found = (
        sets.load(f"{kind}") for kind in (f"folder:{root}", f"records:{tmp_path}/records")
    )
    same(found.train, expected.train)
    same(found.test, expected.test)
    assert (
        found.test.images.shape == (2000, 64, 64, 3)
        and found.test.classes == 200
        and len(found.train.labels) > 200
    )


def test_records_show_images_as_their_folder_does(tmp_path):
    """Turned as EXIF says, and over white; of a folder a class, with what is to be said of it."""
    turned = Image.Exif()
    turned[0x0112] = 6
    for split, name in (("train", "a"), ("train", "b"), ("test", "a")):
        path = tmp_path / "tree" / split / name / "1.png"
        path.parent.mkdir(parents=True)
        rng = np.random.default_rng(len(name + split))
        Image.fromarray(rng.integers(0, 256, (6, 4, 4), dtype=np.uint8)).save(path, exif=turned)
    records.convert(tmp_path / "tree", tmp_path / "records")
    expected = sets.load(f"folder:{tmp_path}/tree", validation_fraction=0.4)
    found = sets.load(f"records:{tmp_path}/records", validation_fraction=0.4)
    assert found.test.images.shape == (1, 4, 6, 3)
    same(found.train, expected.train)
    same(found.test, expected.test)
    assert found.test.note == expected.test.note == "no test image of 1 classes: b"


def test_the_original_bytes_are_stored(folder, stored):
    files = folders.image_files(folder).splits
    for split, (images, labels) in stored_records.open_folder(stored).splits.items():
        assert [path.read_bytes() for path, _ in files[split]] == [
            images.source.read(i)[0] for i in range(len(images))
        ]
        assert [label for _, label in files[split]] == labels.tolist()
        assert labels.tolist() == [images.source.read(i)[1] for i in range(len(images))]


# ------------------------------------------------------------------------------------ like an array


def test_images_index_as_the_decoded_array_does_and_only_what_is_asked_for_is_read(stored):
    images = sets.load(f"records:{stored}").train.images
    array = images[:]
    assert (images.shape, images.dtype, images.ndim, images.nbytes) == (
        array.shape,
        array.dtype,
        4,
        array.nbytes,
    )
    assert len(images) == len(array) == 11 and images.shape[1:] == (16, 20, 3)
    mask = np.arange(11) % 3 == 0
    for rows in (
        3,
        -1,
        np.int64(2),
        slice(2, 9, 3),
        slice(0),
        [4, 4, 0],
        np.array([[1, 2], [3, -4]]),
        mask,
        [],
    ):
        rows = np.array(rows, int) if isinstance(rows, list) and not rows else rows
        np.testing.assert_array_equal(images[rows], array[rows])
        if np.ndim(array[rows]) == 4:
            np.testing.assert_array_equal(images.subset(rows)[:], array[rows])
    np.testing.assert_array_equal(np.asarray(images), array)
    with pytest.raises(IndexError):
        images[11]
    unread = sets.load(f"records:{stored}").train.images
    for path in stored.glob("train-*.array_record"):
        path.unlink()
    assert unread.subset(slice(3)).shape == (3, 16, 20, 3)
    with pytest.raises(
        DataError,
        match=r"train-0000\d\.array_record, record \d, is missing or damaged: .*No such file",
    ):
        unread[0]


def test_images_travel_to_other_processes(stored):
    images = sets.load(f"records:{stored}").train.images
    again = pickle.loads(pickle.dumps(images))
    np.testing.assert_array_equal(again[:], images[:])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(
            pool.apply(images.subset([3, 1]).__getitem__, (slice(None),)), images[[3, 1]]
        )


def test_the_fingerprint_changes_with_pixels_choice_order_labels_and_size_and_decodes_nothing(
    folder, stored, tmp_path, monkeypatch
):
    whole = sets.load(f"records:{stored}").train
    rows = np.arange(len(whole.labels))
    labels = whole.labels.copy()
    labels[3] = 1 - labels[3]
    different = [
        whole,
        whole.take(rows[::-1]),
        whole.take(rows[:5]),
        dataclasses.replace(whole, labels=labels),
    ]
    first, second = np.flatnonzero(whole.labels == 0)[:2]
    exchanged = rows.copy()
    exchanged[[first, second]] = second, first  # the labels stay
    different += [whole.take(exchanged)]
    different += [sets.load(f"records:{stored}", image_size=size).train for size in (8, 9)]
    path = next((folder / "train" / "n01" / "images").iterdir())
    with Image.open(path) as image:
        image.rotate(180).save(path, format="JPEG")
    records.convert(folder, tmp_path / "other")
    different.append(sets.load(f"records:{tmp_path}/other").train)

    def refuse(*_, **__):
        raise AssertionError("decoded")

    monkeypatch.setattr(on_disk, "decode", refuse)
    assert len({sets.fingerprint(one) for one in different}) == len(different)
    assert sets.fingerprint(whole.take(rows)) == sets.fingerprint(whole)
    again = sets.load(f"records:{stored}").train
    assert sets.fingerprint(again) == sets.fingerprint(whole)


# -------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (33, 33), (7, 50), (16, 16)])
def test_resizing_keeps_the_aspect_and_the_centre(size):
    """On a linear gradient (which bilinear resizing keeps) each pixel says where it comes from."""
    width, height = size
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    image = Image.fromarray(
        np.stack([255 * x / width, 255 * y / height, 0 * x], -1).round().astype(np.uint8)
    )
    out = on_disk.pixels(image, 14).astype(float)
    assert out.shape == (14, 14, 3)
    # 14 of 16 pixels of the shorter side: positions relative to the centre, in units of the
    # original's pixels.
    expected = (np.arange(14) - 6.5) * min(size) / 16
    for channel, axis, side in ((0, 0, width), (1, 1, height)):
        line = out[..., channel].mean(axis=axis) / 255 * side - side / 2
        # One pixel of rounding of the crop's place and of the longer side, and the borders, where
        # the filter is cut off.
        np.testing.assert_allclose(line[2:-2], expected[2:-2], atol=min(size) / 16 * 1.1)
        np.testing.assert_allclose(np.diff(line[2:-2]).mean(), min(size) / 16, rtol=0.07)
    np.testing.assert_array_equal(on_disk.pixels(image), np.asarray(image))


def test_images_of_several_sizes_need_an_image_size(tmp_path):
    folder = write_folder(tmp_path / "tiny", sizes=((20, 16), (9, 30), (64, 64)))
    records.convert(folder, tmp_path / "records")
    assert (
        json.loads((tmp_path / "records" / "records.json").read_text())["image_shape"] == "varies"
    )
    with pytest.raises(DataError, match=r"several sizes: give the size .*image_size=224"):
        sets.load(f"records:{tmp_path}/records")
    with pytest.raises(DataError, match=r"resize them to one size, or give an image_size"):
        sets.load(f"folder:{folder}")
    found = sets.load(f"records:{tmp_path}/records", image_size=10)
    assert found.train.images.shape == (11, 10, 10, 3)
    same(found.test, sets.load(f"folder:{folder}", image_size=10).test)
    for name in ("digits", "npz:a.npz"):
        with pytest.raises(
            DataError, match="image_size must be at least 1, and is for sets of encoded images"
        ):
            sets.load(name, image_size=10)
    with pytest.raises(DataError, match="image_size must be at least 1"):
        sets.load(f"folder:{folder}", image_size=0)


# ------------------------------------------------------------------------------------------- damage


CHANGES = {
    "a bit": lambda raw, at: raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :],
    "zeros": lambda raw, at: raw[:at] + bytes(200) + raw[at + 200 :],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_record_is_an_error_that_names_file_record_and_remedy_and_the_others_are_read(
    stored, change
):
    images, _ = stored_records.open_folder(stored).splits["train"]
    good = images[:]
    position = 4
    encoded, _ = images.source.read(position)
    (path,) = [path for path in stored.glob("train-*") if encoded in path.read_bytes()]
    inside = [i for i in range(len(images)) if images.source.read(i)[0] in path.read_bytes()]
    raw = path.read_bytes()
    path.write_bytes(CHANGES[change](raw, raw.index(encoded) + 30))
    again, _ = stored_records.open_folder(stored).splits["train"]  # the file's size is right
    with pytest.raises(
        DataError,
        match=rf"{path}, record {inside.index(position)}, is missing or damaged: .*convert again",
    ):
        again[[0, position]]
    rest = [i for i in range(len(good)) if i not in inside]
    np.testing.assert_array_equal(again[rest], good[rest])
    with pytest.raises(DataError, match=rf"{path} is damaged: its SHA-256"):
        records.verify(stored)


def test_records_that_do_not_belong_where_they_are_or_are_no_images_are_errors(stored):
    images, _ = stored_records.open_folder(stored).splits["train"]
    first, second = (path for path, _, _ in images.source.shards[:2])
    count = images.source.shards[0][2]
    assert count == images.source.shards[1][2]
    os.replace(first, f"{first}.kept")
    os.replace(second, first)
    with pytest.raises(
        DataError,
        match=rf"{first}, record 1, .* it says that it is number {count + 1} .* expected 1",
    ):
        on_disk.Images(
            on_disk.Source(images.source.shards, stored_records.parse_record, "", ""),
            np.arange(9),
            (16, 20, 3),
        )[1]
    for record, message in (
        (b"short", "it holds 5 bytes"),
        (stored_records.HEADER.pack(7, 0), "it says that it is number 7"),
    ):
        with pytest.raises(ValueError, match=message):
            stored_records.parse_record(record, 3)
    for encoded in (b"", b"no image", b"\xff\xd8\xff\xe0" + bytes(50)):
        with pytest.raises(on_disk.Undecodable):
            on_disk.decode(encoded)


def test_a_folder_that_is_incomplete_or_of_another_format_is_an_error_that_says_what_to_do(
    stored, tmp_path
):
    with pytest.raises(
        DataError,
        match=r"nothing holds no records .* python -m lipjax\.data\.records folder:<path> --out=",
    ):
        sets.load(f"records:{tmp_path}/nothing")
    description = stored / "records.json"
    good = description.read_text()
    for text, message in (
        (good.replace('"format": 1', '"format": 9'), "has records of format 9, expected 1"),
        (good[:100], r"records\.json is damaged"),
        ("[]", r"records\.json is damaged"),
    ):
        description.write_text(text)
        with pytest.raises(DataError, match=message):
            sets.load(f"records:{stored}")
    description.write_text(good)
    shard = stored / "test-00000.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        DataError, match=rf"{shard} has {len(whole) // 2} bytes, expected {len(whole)} bytes. Copy"
    ):
        sets.load(f"records:{stored}")
    shard.unlink()
    with pytest.raises(DataError, match=rf"{shard} is not there"):
        sets.load(f"records:{stored}")
    shard.write_bytes(whole)
    labels = stored / "test-labels.npy"
    raw = bytearray(labels.read_bytes())
    raw[-4] ^= 1
    labels.write_bytes(raw)
    with pytest.raises(
        DataError, match=rf"{labels} is damaged: its SHA-256 is not the recorded one"
    ):
        sets.load(f"records:{stored}")


# --------------------------------------------------------------------------------------- conversion


def test_the_command_converts_once_and_says_when_it_is_complete(folder, tmp_path, capsys):
    arguments = [f"folder:{folder}", f"--out={tmp_path}/out"]
    records.main(arguments)
    said = capsys.readouterr().out
    assert "tiny: 5 test, 12 train images of 16x20x3, 2 classes" in said and "records:" in said
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    records.main(arguments)
    assert "is complete, all hashes are right; tiny: 5 test, 12 train" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    # It is a function of the folder alone: another conversion is the same set, with the same
    # fingerprint.
    records.convert(folder, tmp_path / "again")
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_damaged_image_ends_the_conversion_and_leaves_nothing(folder, tmp_path):
    bad = folder / "val" / "images" / "val_3.JPEG"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(DataError, match=r"val_3\.JPEG is damaged: .*Replace or remove it"):
        records.convert(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="out exists: give another --out"):
        records.convert(folder, tmp_path / "out")


def test_a_kill_leaves_nothing_that_looks_complete(tmp_path):
    folder = write_folder(tmp_path / "tiny", count=40)
    # The process stops itself in the middle of the training images (test images come first).
    program = (
        "import os, signal, sys\n"
        "from lipjax.data import records\n"
        "decode, calls = records.decode, []\n"
        "def kill_at_30(encoded, **how):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 30: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return decode(encoded, **how)\n"
        "records.decode = kill_at_30\n"
        "records.main(sys.argv[1:])\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", program, f"folder:{folder}", f"--out={out}"]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    partial = tmp_path / "out.partial"
    assert partial.is_dir() and not out.exists() and not (partial / "records.json").exists()
    with pytest.raises(DataError, match="holds no records"):
        sets.load(f"records:{partial}")
    with pytest.raises(DataError, match=r"out\.partial exists: .* Remove it and run again"):
        records.convert(folder, out)
    records.shutil.rmtree(partial)
    records.convert(folder, out)
    records.verify(out)
