"""What a plan says before a run is what the run then has: bytes of a real state, counted
operations; what it cannot know it says."""

import dataclasses
import math
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from conftest import ROOT, run_lipjax

from lipjax import bounds, training
from lipjax.configs import baselines, cifar10_maxmin, digits, imagenet, tiny_imagenet_maxmin
from lipjax.data import sets
from lipjax.training import config as configuration
from lipjax.training import feeding, plan
from lipjax.training.data_sheets import DEVICES, device_of

SHAPE, CLASSES, EXAMPLES = (8, 8, 1), 10, 100


def small(mode="local", **vectors):
    config = digits.get_config()
    config.batch_size = 32
    config.model.widths, config.model.dense = (4,), 8
    config.bound.mode = mode
    for name, value in vectors.items():
        config.vectors[name] = value
    return config


def planned(config, devices=1, device="h200", examples=EXAMPLES, pixels="uint8", **more):
    device = device_of(device, devices) if isinstance(device, str) else device
    sizes = plan.Sizes(SHAPE, CLASSES, examples, pixels)
    return plan.plan(config, sizes, devices, device, **more)


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def with_memory(size, **changes):
    """A device of that many bytes."""
    return dataclasses.replace(DEVICES["v5e"], memory=int(size), **changes)


# -------------------------------------------------------------------------------------- exact parts


@pytest.mark.parametrize("store", training.STORES)
@pytest.mark.parametrize("dtype", training.VECTOR_TYPES)
@pytest.mark.parametrize("mode", ["local", "paper"])
def test_parameters_optimizer_and_vectors_are_those_of_a_real_state(store, dtype, mode):
    config = small(mode, store=store, dtype=dtype)
    config.optimizer.average = 0.9 if mode == "paper" else 0.0
    found = planned(config)
    network = training.build_network(config, SHAPE, CLASSES)
    transform = optax.adam(training.learning_rate(config, found.steps_per_epoch))
    mesh = training.device_mesh()
    store = training.VectorStore(config, EXAMPLES, mesh, feeding.MAX_STEPS)
    state = training.initial_state(network, transform, config, store.rows_for, SHAPE)
    assert found.part("parameters").each == nbytes(state.network)
    assert found.part("gradients").each == nbytes(state.network)
    assert found.part("optimizer state").each == nbytes(state.optimizer)
    assert found.part("vectors").each == nbytes(state.vectors)
    whole = store.whole_state(state)
    kept = (whole.network, whole.average, whole.optimizer, whole.vectors)
    assert found.checkpoint == sum(map(nbytes, kept))
    if mode == "paper":
        assert found.part("average").each == nbytes(state.average) == nbytes(state.network)


def test_rows_are_equal_stripes_and_images_and_vectors_have_so_many():
    found = planned(small())
    rows = 32 * 4  # 100 examples in 32 stripes of 4 rows
    network = training.build_network(small(), SHAPE, CLASSES)
    entries = sum(math.prod(shape) for shape in bounds.vector_shapes(network, SHAPE))
    assert found.part("vectors").total == rows * entries * 4
    assert found.part("training images").total == rows * (64 + 4)
    assert planned(small(), pixels="float32").part("training images").total == rows * (256 + 4)


def test_a_store_on_the_host_keeps_all_rows_there_and_those_of_one_call_on_the_devices():
    config = small(store="host")
    found, example = (planned(c, examples=32 * 100, devices=4) for c in (config, small()))
    of_one_call = example.part("vectors").total * feeding.MAX_STEPS // 100
    assert found.part("vectors").total == of_one_call
    assert found.part("all vectors").total == example.part("vectors").total
    assert not [part for part in example.host_parts if part.name == "all vectors"]


def test_a_plan_allocates_nothing_where_vectors_of_terabytes_stay_on_the_hosts():
    config = imagenet.get_config()
    config.model.stem, config.model.widths = 0, (16, 32, 64, 128, 256)
    config.vectors.store = "host"
    found = plan.planned(config, plan.sizes_of(config), 64, "v5e")
    assert found.part("all vectors").total > 2e12 and found.left > 0
    assert found.checkpoint > found.part("all vectors").total


def test_twice_the_devices_halve_vectors_and_images_on_each_and_nothing_else():
    one, two = planned(small(), devices=1), planned(small(), devices=2)
    for name in ("vectors", "training images"):
        assert one.part(name).each == 2 * two.part(name).each
        assert one.part(name).total == two.part(name).total
    for name in ("parameters", "gradients", "optimizer state"):
        assert one.part(name).each == two.part(name).each == two.part(name).total // 2


def test_mode_global_has_no_vectors_of_examples():
    local, common = planned(small()).part("vectors"), planned(small("global")).part("vectors")
    assert common.each < local.each / 50
    assert common == planned(small("global", store="host")).part("vectors")


def test_a_training_set_above_the_limit_is_on_the_devices_for_two_calls_alone(monkeypatch):
    monkeypatch.setattr(feeding, "RESIDENT_BYTES", 100)
    found = planned(small(), examples=32 * 100, devices=2)
    assert found.part("training images").each == 2 * feeding.MAX_STEPS * 32 * (64 + 4) // 2


def test_large_sets_of_tfds_stay_on_disk_and_files_are_in_the_memory_of_each_host(monkeypatch):
    config = small()
    for name, kept in (("npz:a.npz", EXAMPLES * 64), ("imagenet2012", 0)):
        config.data.name = name
        monkeypatch.setattr(sets, "IN_MEMORY_BYTES", EXAMPLES * 64 - 1)
        assert planned(config).part("images").each == kept
        monkeypatch.setattr(sets, "IN_MEMORY_BYTES", EXAMPLES * 64)
        assert planned(config).part("images").each == EXAMPLES * 64


def test_parameters_that_lie_split_over_the_devices_are_counted_as_a_real_state_has_them():
    config = small()
    config.model.widths, config.model.dense = (64, 64), 256
    whole = planned(config, devices=8)
    config.devices.shard_parameters = True
    split = planned(config, devices=8)
    network = jax.eval_shape(lambda: training.build_network(config, SHAPE, CLASSES))
    mesh = jax.sharding.AbstractMesh((8,), ("data",))
    transform = optax.adam(training.learning_rate(config, split.steps_per_epoch))
    state = jax.eval_shape(
        lambda n: training.initial_state(n, transform, config, EXAMPLES, SHAPE), network
    )
    shardings = training.state_shardings(state, config, mesh)

    def held(part):
        leaves = jax.tree.leaves(getattr(state, part))
        pairs = zip(leaves, jax.tree.leaves(getattr(shardings, part)), strict=True)
        return sum(math.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, s in pairs)

    moments = split.part("optimizer state").each
    assert moments == held("optimizer") < whole.part("optimizer state").each / 4
    # Beside its own share each device gathers all of them for a step.
    gathered = whole.part("parameters").each
    assert split.part("parameters").each == held("network") + gathered


def test_the_compiled_step_takes_what_the_exact_parts_say():
    """XLA's own figure of the arguments: state, images, labels, and the slots of a call."""
    config = small()
    sizes = plan.Sizes(SHAPE, CLASSES, EXAMPLES)
    analysis = plan.compiled_step(config, sizes).memory_analysis()
    found = plan.planned(config, sizes, 1, "cpu")
    names = ("parameters", "optimizer state", "vectors", "training images")
    state = sum(found.part(name).each for name in names)
    slots = 2 * 4 * feeding.MAX_STEPS * 32
    # Beside them a few scalars, each with the padding of a buffer.
    assert 0 <= analysis.argument_size_in_bytes - state - slots < 1000


# ------------------------------------------------------------------------------------------- counts


def test_operations_equal_a_count_by_hand():
    config = small()
    config.model.name, config.model.widths, config.model.activation = "small_dense", (5,), "relu"
    del config.model.dense
    config.bound.iterations = 3
    # 64 x 5: forwards, gradient, and 3 forwards, 3 backwards, 1 gradient of the power iteration; 5
    # x 10 as the plain step.
    assert planned(config).operations == 32 * 2 * (64 * 5 * (2 + 7) + 5 * 10 * 3)
    # Whole norms are no example's: of each iteration one product forwards, one backwards.
    config.bound.mode, config.bound.shared_iterations = "global", 7
    whole = 2 * 64 * 5 * 2 * 7
    assert planned(config).operations == 32 * 2 * (64 * 5 * 2 + 5 * 10 * 3) + whole
    # A quarter of the epochs with another mode.
    operations = {"global": planned(config).operations}
    config.bound.mode = "local"
    operations["local"] = planned(config).operations
    config.schedule.first = config.schedule.epochs // 4
    assert planned(config).operations == pytest.approx(
        0.25 * operations["global"] + 0.75 * operations["local"]
    )
    assert "mode global, then local" in planned(config).title


def test_a_convolution_counts_each_entry_of_its_output_times_those_of_its_window():
    config = small()
    n = config.bound.iterations
    first, strided, dense = 8 * 8 * 4 * 9, 4 * 4 * 4 * (16 * 4), 4 * 4 * 4 * 8
    expected = first * (2 * n + 3) + (strided + dense) * (2 * n + 12) + 8 * 10 * 3
    assert planned(config).operations == 32 * 2 * expected


def test_steps_are_those_of_the_order_of_an_epoch():
    found = planned(small())
    assert found.steps_per_epoch == len(feeding.epoch_order(0, 0, EXAMPLES, 32)) == 3
    assert found.epochs == small().schedule.epochs


# ------------------------------------------------------------------------------------------- times


# On two CPU cores, benchmarks/README.md: 6C2F at batch 256, clipped ReLU and clipped MaxMin.
@pytest.mark.parametrize("measured", [1.73, 2.02])
def test_a_step_that_was_measured_lies_in_the_range(measured):
    config = cifar10_maxmin.get_config()
    found = plan.planned(config, plan.Sizes((32, 32, 3), 10, 45_000), 1, "cpu")
    assert found.operations == pytest.approx(282e9, rel=0.01)
    shortest, longest = found.step_seconds
    assert shortest < measured < longest


def test_no_accelerator_is_said_to_be_faster_than_it_can_start_operations():
    """Small networks take as long as their operations take to start, on the fastest device too."""
    device = with_memory(1e12, peak=1e30, bandwidth=1e30)
    shortest, longest = planned(small(), device=device).step_seconds
    layers = 4
    assert shortest > 2 * layers * plan.LAUNCHES[0] * plan.LAUNCH_SECONDS[0]
    assert longest > 10 * shortest
    config = small()
    config.examples_at_once = 8  # four parts, each with its own operations
    assert planned(config, device=device).step_seconds[0] == pytest.approx(4 * shortest)


def test_the_text_gives_times_as_a_range_and_says_once_that_none_was_measured():
    config = cifar10_maxmin.get_config()
    text = " ".join(str(plan.planned(config, plan.sizes_of(config), 8, "h200")).split())
    assert text.count("on a TPU none") == 1
    assert "a guess:" in text and text.count(" to ") >= 3


# ---------------------------------------------------------------------------------------- what fits


def test_exact_parts_that_are_larger_than_the_memory_do_not_fit():
    needed = planned(small()).each
    assert planned(small(), device=with_memory(needed)).left == 0
    found = planned(small(), device=with_memory(needed - 1000))
    assert found.left == -1000 and "It does NOT fit: 1 kB too much" in str(found)
    half = planned(small(), device=with_memory(needed, usable=0.5))
    assert half.left == pytest.approx(-needed / 2)


def test_without_the_compiler_a_plan_does_not_say_that_everything_fits():
    text = " ".join(str(planned(small())).split())
    assert "It fits" not in text
    assert "temporary memory, which grows with examples_at_once and is not estimated here" in text
    found = planned(small(), temporary=10**9)
    assert found.part("temporary").each + found.part("gradients").each == 10**9
    assert "It fits, with" in str(found)


def test_imagenet_with_a_row_for_each_example_fits_with_patches_and_not_without():
    config = imagenet.get_config()
    sizes = plan.sizes_of(config)
    assert sizes == plan.Sizes((224, 224, 3), 1000, 1_281_167 - 12_812)
    for devices, device in ((64, "v5e"), (8, "h200")):
        assert plan.planned(config, sizes, devices, device).left > 0
    config.model.stem, config.model.widths = 0, (16, 32, 64, 128, 256)
    found = plan.planned(config, sizes, 64, "v5e")
    assert found.left < 0 and found.part("vectors").total > 2e12


# ------------------------------------------------------------------------------------------- errors


def test_an_unknown_device_is_an_error_that_lists_the_known_ones():
    known = "there are h100, h200, a100, v4, v5e, v5p, cpu"
    with pytest.raises(ValueError, match=f"no device is called 'h300'; {known}"):
        planned(small(), device="h300")


@pytest.mark.parametrize("device", [*DEVICES, "cpu"])
def test_every_device_has_a_plan(device):
    found = planned(small(), devices=2, device=device)
    shortest, longest = found.step_seconds
    assert 0 < shortest < longest < np.inf
    assert found.device.name in " ".join(str(found).split())


def test_a_batch_must_divide_over_the_devices_and_be_no_larger_than_the_data():
    wanted = r"batch_size 32 does not divide over 3 devices: .*--config.batch_size=33"
    with pytest.raises(ValueError, match=wanted):
        planned(small(), devices=3)
    wanted = "batch_size 32 is larger than the training set of 20 examples"
    with pytest.raises(ValueError, match=wanted):
        planned(small(), examples=20)
    config = small()
    config.examples_at_once = 8
    with pytest.raises(ValueError, match=r"multiple of the devices \(16\), got 8"):
        planned(config, devices=16)


def test_a_configuration_that_makes_no_sense_has_no_plan():
    with pytest.raises(ValueError, match="one of example, host, got 'disk'"):
        planned(small(store="disk"))


def test_the_compiler_is_asked_for_the_devices_here_alone():
    config = digits.get_config()
    with pytest.raises(ValueError, match=r"only the compiler of the devices here .* 64 x v5e"):
        plan.planned(config, plan.sizes_of(config), 64, "v5e", compiled=True)


# ---------------------------------------------------------------------------------------- data sets


def test_the_digits_are_planned_as_they_are_loaded():
    config = digits.get_config()
    for examples in (0, 300):
        config.data.train_examples = examples
        train = training.load_data(config).train
        shape, dtype = train.images.shape[1:], train.images.dtype.name
        assert plan.sizes_of(config) == plan.Sizes(shape, train.classes, len(train.labels), dtype)


def test_known_data_sets_and_given_sizes_are_planned_without_data(monkeypatch):
    def refuse(config):
        raise AssertionError("loaded")

    monkeypatch.setattr(configuration, "load_data", refuse)
    assert plan.sizes_of(cifar10_maxmin.get_config()).examples == 45_000
    assert plan.sizes_of(tiny_imagenet_maxmin.get_config()) == plan.Sizes((64, 64, 3), 200, 90_000)
    config = digits.get_config()
    config.data.name = "npz:nowhere.npz"
    assert plan.sizes_of(config, 1000, ("9", "8", "7"), 5) == plan.Sizes((9, 8, 7), 5, 900)
    with pytest.raises(AssertionError, match="loaded"):
        plan.sizes_of(config, 1000, None, 5)


@pytest.mark.parametrize("shape", [("8", "8"), ("8", "x", "1"), ("0", "8", "1")])
def test_a_shape_that_is_none_is_an_error(shape):
    wanted = "a shape is height,width,channels, for instance 224,224,3"
    with pytest.raises(ValueError, match=wanted):
        plan.sizes_of(digits.get_config(), shape=shape)


# ----------------------------------------------------------------------------------- other networks


@pytest.mark.parametrize("method", ["orthogonal", "gloro", "paper"])
def test_other_methods_and_residual_networks_have_plans(method):
    assert planned(baselines.get_config(method), examples=1293).left > 0
    config = digits.get_config()
    config.model.name = "small_residual"
    assert planned(config, examples=1293).operations > 0


# ------------------------------------------------------------------------------------- the commands


def test_train_prints_the_plan_that_the_command_prints_and_leaves_nothing_behind(tmp_path):
    flags = ["--config=configs/cifar10_maxmin.py", "--plan", "--plan_device=h200"]
    command = [sys.executable, "train.py", *flags, "--plan_devices=8", f"--workdir={tmp_path}/run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "8 x NVIDIA H200 SXM" in " ".join(done.stdout.split())
    assert list(tmp_path.iterdir()) == []
    asked = ("--config=cifar10_maxmin", "--device=h200", "--devices=8")
    assert run_lipjax("plan", *asked) == done.stdout
