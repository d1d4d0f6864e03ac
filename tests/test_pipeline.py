"""The input pipeline: the same batches whatever the workers and wherever it starts; errors arrive,
nothing is left behind."""

import dataclasses
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_records import write_folder

from lipjax import training
from lipjax.configs import digits
from lipjax.data import pipeline, records, sets
from lipjax.data.sets import DataError


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    """Records of 60 training images of 20x16."""
    root = tmp_path_factory.mktemp("pipeline")
    records.convert(write_folder(root / "tiny", count=30), root / "records", shard_bytes=4000)
    return f"records:{root}/records"


@pytest.fixture(scope="module")
def train(name):
    return sets.load(name, image_size=12).train


ROWS = np.random.default_rng(0).integers(0, 54, (7, 5)).astype(np.int32)


def collect(dataset, rows=ROWS, *, seed=3, first_step=100, **options):
    with pipeline.batches(dataset, rows, seed=seed, first_step=first_step, **options) as iterator:
        return list(iterator)


def same(found, expected):
    for (images, labels), (images_, labels_) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(images, images_)
        np.testing.assert_array_equal(labels, labels_)


def workers_of_this_process(count):
    """Them, as soon as there are so many: they start in the background."""
    deadline = time.monotonic() + 30
    while len(multiprocessing.active_children()) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    children = multiprocessing.active_children()
    assert len(children) == count
    return children


# --------------------------------------------------------------------------------- the same batches


def test_batches_are_the_images_at_their_rows_in_order(train):
    found = collect(train)
    assert len(found) == 7
    for (images, labels), rows in zip(found, ROWS, strict=True):
        np.testing.assert_array_equal(images, train.images[rows])
        np.testing.assert_array_equal(labels, train.labels[rows])
        assert type(images) is np.ndarray and images.dtype == np.uint8 and labels.dtype == np.int32


def test_neither_workers_nor_where_one_starts_change_a_batch(train):
    """With augmentation: the rest from any step on, with and without workers, and however far they
    read ahead."""
    expected = collect(train, augment=True)
    for workers, read_ahead, start in ((0, 0, 0), (0, 3, 4), (0, 1, 7), (2, 3, 2)):
        options = {
            "workers": workers,
            "read_ahead": read_ahead,
            "augment": True,
            "first_step": 100 + start,
        }
        same(collect(train, ROWS[start:], **options), expected[start:])
    assert not multiprocessing.active_children()


def test_rows_may_be_a_sequence_that_makes_them_when_they_are_asked_for(train):
    same(collect(train, Lazy()), collect(train, np.array([Lazy()[i] for i in range(4)])))


class Lazy:
    """Rows of four steps, none of them stored."""

    def __len__(self):
        return 4

    def __getitem__(self, step):
        return [step, 2 * step, 30 - step]


def test_an_iterator_ends_for_good_and_has_a_length(train):
    iterator = pipeline.batches(train, ROWS[:2], seed=0, first_step=0)
    assert len(iterator) == 2 and len(list(iterator)) == 2
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(iterator)


def test_images_in_memory_are_taken_in_this_process(train):
    memory = dataclasses.replace(train, images=train.images[:])
    iterator = pipeline.batches(memory, ROWS, seed=3, first_step=0, workers=2)
    assert not multiprocessing.active_children()
    same(list(iterator), collect(train))


def test_what_makes_no_sense_is_refused(name, train):
    as_stored = sets.load(name).train
    assert pipeline.augments(train) and not pipeline.augments(as_stored)
    memory = dataclasses.replace(train, images=train.images[:])
    for dataset in (as_stored, memory):
        assert not pipeline.augments(dataset)
        with pytest.raises(
            ValueError, match=r"no image_size: its crops and flips are made on the device"
        ):
            pipeline.batches(dataset, ROWS, seed=0, first_step=0, augment=True)
    for field in ("workers", "read_ahead"):
        with pytest.raises(ValueError, match=f"{field} must be at least 0, got -1"):
            pipeline.batches(train, ROWS, seed=0, first_step=0, **{field: -1})


# ------------------------------------------------------------------------------------- augmentation


def test_the_randomness_of_an_example_is_that_of_seed_step_and_position_alone(train):
    ((images, _),) = collect(train, ROWS[:1], augment=True)
    ((turned, _),) = collect(train, ROWS[:1, ::-1], augment=True)
    np.testing.assert_array_equal(turned, images[::-1])
    for change in ({"seed": 4}, {"first_step": 101}):
        ((other, _),) = collect(train, ROWS[:1], augment=True, **change)
        assert all((a != b).any() for a, b in zip(images, other, strict=True))
    row = int(ROWS[0, 2])
    generator = np.random.default_rng([3, 100, row])
    crop = pipeline.random_resized_crop(train.images.picture(row), generator, 12)
    np.testing.assert_array_equal(images[2], np.asarray(crop))


@pytest.mark.parametrize("size", [(90, 60), (40, 200), (64, 64)])
def test_crops_have_the_stated_areas_and_aspects_and_lie_everywhere(size):
    """An image whose pixels are their coordinates says which box was resized; mirrored ones run
    from right to left."""
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    boxes, mirrored = [], []
    for i in range(300):
        array = np.asarray(pipeline.random_resized_crop(image, np.random.default_rng(i), 16), float)
        assert array.shape == (16, 16, 3)
        line, column = array[..., 0].mean(0), array[..., 1].mean(1)
        mirrored.append(line[0] > line[-1])
        (left, right), (top, bottom) = sorted((line[0], line[-1])), (column[0], column[-1])
        # The outermost of 16 pixels are centred half a pixel inside, 1/32 of the box.
        w, h = (right - left) * 16 / 15, (bottom - top) * 16 / 15
        boxes.append((left - w / 32, top - h / 32, w, h))
    left, top, w, h = np.array(boxes).T
    area, aspect = w * h / (width * height), w / h
    assert 100 < sum(mirrored) < 200
    assert np.all(area < 1.15) and np.all(area > 0.06) and area.min() < 0.15
    assert (
        np.all(aspect > 0.75 / 1.25)
        and np.all(aspect < 4 / 3 * 1.25)
        and aspect.min() < 0.85
        and aspect.max() > 1.2
    )
    assert (
        np.all(left > -2)
        and np.all(top > -2)
        and np.all(left + w < width + 2)
        and np.all(top + h < height + 2)
    )
    for start, length, side in ((left, w, width), (top, h, height)):
        centre = (start + length / 2) / side
        assert abs(centre.mean() - 0.5) < 0.05 and centre.std() > 0.04


def test_an_image_that_no_crop_fits_gives_its_centre():
    # 200 x 2: every crop is higher than 2
    image = Image.fromarray(np.arange(200, dtype=np.uint8)[None].repeat(2, 0))
    found = {
        pipeline.random_resized_crop(image, np.random.default_rng(i), 3).tobytes()
        for i in range(40)
    }
    expected = image.crop((98, 0, 101, 2)).resize((3, 3), Image.Resampling.BILINEAR)
    assert found == {
        expected.tobytes(),
        expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes(),
    }


def test_the_largest_crop_of_a_square_is_all_of_it():
    class Largest:
        """In place of a generator: whole area, aspect 1, no mirroring."""

        def uniform(self, low, high):
            return high if high == pipeline.AREAS[1] else 0.0

        def integers(self, high):
            return high - 1

        def random(self):
            return 0.9

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    expected = image.resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(
        pipeline.random_resized_crop(image, Largest(), 16), np.asarray(expected)
    )
    assert math.isclose(pipeline.ASPECTS[0] * pipeline.ASPECTS[1], 1)


# -------------------------------------------------------------------------------------------- ahead


class Counting:
    """Images that count how often they were asked; in this process."""

    shape = (10, 1, 1, 1)

    def __init__(self):
        self.asked = 0

    def __getitem__(self, rows):
        self.asked += 1
        return np.zeros((len(rows), 1, 1, 1), np.uint8)


@pytest.mark.parametrize("read_ahead", [0, 1, 3])
def test_batches_are_decoded_before_they_are_asked_for_and_not_more_of_them(train, read_ahead):
    images = Counting()
    dataset = dataclasses.replace(train, images=images)
    with pipeline.batches(dataset, ROWS, seed=0, first_step=0, read_ahead=read_ahead) as iterator:
        for taken in range(3):
            deadline = time.monotonic() + 20
            while images.asked < taken + read_ahead and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.05)
            assert images.asked == taken + read_ahead
            next(iterator)


# ---------------------------------------------------------------------------------- errors and ends


class Probe:
    """Images whose pixels say what a worker is like: its process, its JAX platform, its backends,
    whether it has threads."""

    shape = (10, 1, 1, 5)

    def __getitem__(self, rows):
        backends = sys.modules["jax._src.xla_bridge"]._backends
        platform = jax.config.jax_platforms
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        if rows[0] == 9:
            time.sleep(0.5)  # the batches before it are on their way
            os.kill(os.getpid(), signal.SIGKILL)
        pid = os.getpid()
        facts = [pid % 256, pid // 256 % 256, platform == "cpu", len(backends), ignored]
        return np.broadcast_to(np.array(facts, np.uint8), (len(rows), 1, 1, 5)).copy()


def test_workers_start_no_accelerator_and_one_that_dies_is_an_error(train, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "")  # as for a trainer on a GPU
    dataset = dataclasses.replace(train, images=Probe())
    rows = np.array([[1], [2], [3], [9], [4]])
    iterator = pipeline.batches(dataset, rows, seed=0, first_step=0, workers=1)
    (worker,) = workers_of_this_process(1)
    for _ in range(3):
        images, _ = next(iterator)
        assert images.reshape(-1).tolist() == [
            worker.pid % 256,
            worker.pid // 256 % 256,
            True,
            0,
            True,
        ]
    with pytest.raises(
        DataError,
        match=r"a worker of the input pipeline died: .*exit code -9.*fewer --config\.data\.workers",
    ):
        for _ in range(2):
            next(iterator)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_record_reaches_the_caller_with_its_file_after_the_batches_before_it(
    tmp_path, workers
):
    records.convert(write_folder(tmp_path / "tiny"), tmp_path / "records")
    dataset = sets.load(f"records:{tmp_path}/records", image_size=8).train
    encoded, _ = dataset.images.source.read(int(dataset.images.rows[4]))
    file = tmp_path / "records" / "train-00000.array_record"
    raw = file.read_bytes()
    at = raw.index(encoded) + 50
    rows = np.array([[0, 1], [2, 3], [5, 6], [4, 7], [0, 1], [8, 9]])
    expected = collect(dataset, rows[:3])
    file.write_bytes(raw[:at] + bytes(40) + raw[at + 40 :])
    dataset = sets.load(f"records:{tmp_path}/records", image_size=8).train
    iterator = pipeline.batches(dataset, rows, seed=3, first_step=0, workers=workers)
    same([next(iterator) for _ in range(3)], expected)
    number = int(dataset.images.rows[4])
    with pytest.raises(
        DataError, match=rf"{file}, record {number}, is missing or damaged: .*convert again"
    ):
        next(iterator)
    assert not multiprocessing.active_children()


def test_no_worker_is_left_of_an_iterator_that_is_closed_early(train):
    iterator = pipeline.batches(train, ROWS, seed=0, first_step=0, workers=2)
    workers_of_this_process(2)
    images, _ = next(iterator)
    copy = images.copy()
    for _ in range(2):
        iterator.close()
    assert not multiprocessing.active_children()
    np.testing.assert_array_equal(images, copy)  # what was handed out stays
    with pytest.raises(ValueError, match="the batches were closed"):
        next(iterator)


PROGRAM = """
import multiprocessing, sys, time
import numpy as np
from lipjax import data
from lipjax.data import pipeline

if __name__ == "__main__":
    train = data.load(sys.argv[1], image_size=12).train
    rows = np.zeros((1000, 4), int)
    iterator = pipeline.batches(train, rows, seed=0, first_step=0, workers=2)
    next(iterator), next(iterator)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_a_program_that_ends_in_the_middle_leaves_nothing_and_says_nothing(name):
    """No shared memory either: Python's resource tracker would warn of it."""
    command = [sys.executable, "-c", PROGRAM, name, "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stderr == ""
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2 and not any(running(pid) for pid in pids)


def test_workers_end_with_a_parent_that_is_killed(name):
    parent = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, name, "60"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(running(pid) for pid in pids):
        time.sleep(0.05)
    assert not any(running(pid) for pid in pids)


def running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


# --------------------------------------------------------------------------------------- evaluation


def test_a_set_on_disk_is_evaluated_as_one_in_memory(train):
    config = digits.get_config()
    config.batch_size = 10
    config.model.name, config.model.activation = "small_dense", "relu"
    network = training.build_network(config, (12, 12, 3), train.classes)
    in_memory = dataclasses.replace(train, images=np.asarray(train.images))
    mesh = training.device_mesh()
    first, second = (
        training.evaluate(network, dataset, config, mesh) for dataset in (train, in_memory)
    )
    assert first == second
