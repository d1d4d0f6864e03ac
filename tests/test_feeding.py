"""What each step gets: every example in its turn, the same wherever images lie, on any number of
threads."""

import threading

import numpy as np
import pytest
from test_pipeline import same
from test_records import write_folder

from lipjax import training
from lipjax.configs import digits
from lipjax.data import records, sets
from lipjax.training import feeding


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Records of 54 training images of 20x16, resized to 12x12."""
    root = tmp_path_factory.mktemp("feeding")
    records.convert(write_folder(root / "tiny", count=30), root / "records", shard_bytes=4000)
    return sets.load(f"records:{root}/records", image_size=12).train


@pytest.mark.parametrize("examples", [96, 100, 127, 32])
def test_each_epoch_takes_every_example_once_but_for_less_than_a_batch(examples):
    stripes = feeding.stripes(0, examples, 32)
    assert sorted(stripes[stripes >= 0]) == list(range(examples))
    seen = set()
    for epoch in range(20):
        slots = feeding.epoch_order(0, epoch, examples, 32)
        chosen = stripes[np.arange(32), slots]
        assert chosen.shape == (examples // 32, 32) and chosen.min() >= 0
        assert len(np.unique(chosen)) == chosen.size
        seen |= set(chosen.reshape(-1).tolist())
    assert seen == set(range(examples))  # those who sit out take turns


def test_the_order_is_a_function_of_seed_and_epoch():
    first, second, other = (
        feeding.epoch_order(seed, epoch, 100, 32) for seed, epoch in ((0, 0), (0, 1), (1, 0))
    )
    assert not np.array_equal(first, second) and not np.array_equal(first, other)
    assert np.array_equal(first, feeding.epoch_order(0, 0, 100, 32))
    assert not np.array_equal(feeding.stripes(0, 100, 32), feeding.stripes(1, 100, 32))


def test_a_batch_larger_than_the_training_set_is_an_error_that_names_both():
    config = digits.get_config()
    config.batch_size = 128
    with pytest.raises(ValueError, match="batch_size 128 is larger than the training set of 100"):
        feeding.steps_per_epoch(config, 100)


def test_a_call_does_not_reach_into_the_next_epoch():
    config = digits.get_config()
    config.batch_size = 12
    feed = feeding.Feeder(
        training.load_data(config).train.take(np.arange(36)), config, training.device_mesh(), 3
    )
    with pytest.raises(ValueError, match="expected 1 to 1 steps from step 5 on, got 2"):
        feed(5, 2)


def configured(augment):
    config = digits.get_config()
    config.batch_size, config.data.augment, config.schedule.epochs = 10, augment, 4
    return config


def fed(train, config, calls, **options):
    """Images and labels of each step, of calls ``(step, count)`` one after the other, as a step of
    training finds them."""
    found, mesh = {}, training.device_mesh()
    with feeding.Feeder(train, config, mesh, 3, **options) as feed:
        for step, count in calls:
            given = feed(step, count)
            assert [(a.shape, a.dtype) for a in given] == [
                (a.shape, a.dtype) for a in feed.shapes()
            ]
            images, labels, slots, _ = map(np.asarray, given)
            for i in range(count):
                rows = np.arange(10) * (len(labels) // 10) + slots[i]
                found[step + i] = images[rows], labels[rows]
    return found


CALLS = [(0, 3), (3, 2), (5, 1), (6, 3), (9, 1)]  # 54 examples: five steps an epoch


@pytest.mark.parametrize("resident", [True, False])
def test_training_gets_the_examples_of_its_stripes_wherever_they_lie(train, monkeypatch, resident):
    if not resident:
        monkeypatch.setattr(feeding, "RESIDENT_BYTES", 0)
    found = fed(train, configured(augment=False), CALLS)
    table = feeding.stripes(0, 54, 10)
    for step, (images, labels) in found.items():
        rows = table[np.arange(10), feeding.epoch_order(0, step // 5, 54, 10)[step % 5]]
        np.testing.assert_array_equal(images, train.images[rows])
        np.testing.assert_array_equal(labels, train.labels[rows])


def test_augmented_images_are_the_same_however_training_is_cut_into_calls_and_starts(train):
    whole = fed(train, configured(augment=True), CALLS)
    cut = fed(train, configured(augment=True), [(0, 2), (2, 3)]) | fed(
        train, configured(augment=True), [(5, 3), (8, 2)]
    )
    assert whole.keys() == cut.keys()
    same(whole.values(), cut.values())
    plain = fed(train, configured(augment=False), CALLS)
    assert not np.array_equal(whole[0][0], plain[0][0])
    np.testing.assert_array_equal(whole[0][1], plain[0][1])


def test_positions_are_those_of_their_step_whichever_threads_ask(train):
    config = configured(augment=False)
    with feeding.Feeder(train, config, training.device_mesh(), 3) as feed:
        positions = feeding._Positions(feed, 1)
    table, wrong = feeding.stripes(0, 54, 10), []
    assert len(positions) == 19

    def ask(first):
        for step in [*range(first, 20), *range(1, first)] * 20:
            expected = table[np.arange(10), feeding.epoch_order(0, step // 5, 54, 10)[step % 5]]
            if not np.array_equal(positions[step - 1], expected):
                wrong.append(step)

    threads = [threading.Thread(target=ask, args=(first,)) for first in (1, 4, 9, 14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
