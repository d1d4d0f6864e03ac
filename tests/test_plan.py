"""What a plan says before a run is what the run then has: bytes of a real state, counted
operations, what fits."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import jax
import optax
import pytest
from conftest import ROOT

from lipjax import bounds, training
from lipjax.configs import baselines, cifar10_maxmin, digits, imagenet, tiny_imagenet_maxmin
from lipjax.data import sets
from lipjax.training import feeding, plan

SHAPE, CLASSES, EXAMPLES = (8, 8, 1), 10, 100


def small(mode="local", **vectors):
    config = digits.get_config()
    config.batch_size = 32
    config.model.widths, config.model.dense = (4,), 8
    config.bound.mode = mode
    for name, value in vectors.items():
        config.vectors[name] = value
    return config


def planned(config, devices=1, device="h200", examples=EXAMPLES, **more):
    return plan.plan(config, SHAPE, CLASSES, examples, devices, device, **more)


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def with_memory(gigabytes, **changes):
    """A device of that much memory."""
    return dataclasses.replace(plan.DEVICES["v5e"], memory=int(gigabytes * plan.GB), **changes)


# -------------------------------------------------------------------------------------- exact parts


@pytest.mark.parametrize("store", training.STORES)
@pytest.mark.parametrize("dtype", training.VECTOR_TYPES)
@pytest.mark.parametrize("mode", ["local", "paper"])
def test_parameters_optimizer_and_vectors_are_those_of_a_real_state(store, dtype, mode):
    config = small(mode, store=store, dtype=dtype)
    found = planned(config)
    network = training.build_network(config, SHAPE, CLASSES)
    transform = optax.adam(training.learning_rate(config, found.steps_per_epoch))
    keeper = feeding.Keeper(config, found.rows, training.device_mesh(), feeding.CALL)
    state = training.initial_state(network, transform, config, keeper.rows_for, SHAPE)
    assert found.part("parameters").per_device == nbytes(state.network)
    assert found.part("gradients").per_device == nbytes(state.network)
    assert found.part("optimizer state").per_device == nbytes(state.optimizer)
    assert found.part("vectors").per_device == nbytes(state.vectors)
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.network))
    assert all(part.exact for part in found.parts if part.name != "temporary")
    assert not found.part("temporary").exact


def test_rows_are_equal_stripes_and_images_and_vectors_have_so_many():
    found = planned(small())
    assert found.rows == 32 * 4  # 100 examples in 32 stripes of 4 rows
    entries = sum(jax.numpy.zeros(shape).size for shape in _shapes(small()))
    assert found.part("vectors").total == 128 * entries * 4
    assert found.part("training images").total == 128 * (64 + 4)
    assert planned(small(), pixels="float32").part("training images").total == 128 * (256 + 4)


def _shapes(config):
    return bounds.vector_shapes(training.build_network(config, SHAPE, CLASSES), SHAPE)


def test_a_store_on_the_host_keeps_all_rows_there_and_those_of_one_call_on_the_devices():
    config = small(store="host")
    found, example = (planned(c, examples=32 * 100, devices=4) for c in (config, small()))
    assert found.part("vectors").total == example.part("vectors").total * feeding.CALL // 100
    assert [part.total for part in found.host_parts if part.name == "vectors"] == [
        example.part("vectors").total
    ]
    assert not [part for part in example.host_parts if part.name == "vectors"]


def test_twice_the_devices_halve_vectors_and_images_on_each_and_nothing_else_that_is_exact():
    one, two = planned(small(), devices=1), planned(small(), devices=2)
    for name in ("vectors", "training images"):
        assert one.part(name).per_device == 2 * two.part(name).per_device
        assert one.part(name).total == two.part(name).total
    for name in ("parameters", "gradients", "optimizer state"):
        assert one.part(name).per_device == two.part(name).per_device == two.part(name).total // 2
    assert two.part("temporary").per_device < one.part("temporary").per_device


def test_mode_global_has_no_vectors_of_examples():
    found = planned(small("global"))
    assert (
        found.part("vectors").per_device
        == planned(small("global", store="none")).part("vectors").per_device
    )
    assert found.part("vectors").per_device < planned(small()).part("vectors").per_device / 50
    assert found.options == ()


def test_a_training_set_above_the_limit_is_on_the_devices_for_one_call_alone(monkeypatch):
    monkeypatch.setattr(feeding, "RESIDENT_BYTES", 100)
    found = planned(small(), examples=32 * 100, devices=2)
    assert found.part("training images").per_device == 2 * feeding.CALL * 32 * (64 + 4) // 2
    rate = 32 / found.step_seconds["tf32"]
    assert found.unknown == (f"reading and decoding images, {rate:,.0f} a second at this speed",)


def test_large_sets_of_tfds_stay_on_disk_and_files_are_in_the_memory_of_each_host(monkeypatch):
    config = small()
    for name, bytes_ in (("npz:a.npz", 100 * 64), ("imagenet2012", 0)):
        config.data.name = name
        monkeypatch.setattr(sets, "IN_MEMORY_BYTES", 100 * 64 - 1)
        assert planned(config).host_parts[0].per_device == bytes_
        monkeypatch.setattr(sets, "IN_MEMORY_BYTES", 100 * 64)
        assert planned(config).host_parts[0].per_device == 100 * 64


def test_a_checkpoint_holds_all_rows_wherever_they_are():
    parts = planned(small())
    expected = sum(parts.part(name).total for name in ("parameters", "optimizer state", "vectors"))
    assert parts.checkpoint == planned(small(store="host")).checkpoint == expected


# ------------------------------------------------------------------------------------------- counts


def test_operations_equal_a_count_by_hand():
    config = small()
    config.model.name, config.model.widths, config.model.activation = "small_dense", (5,), "relu"
    del config.model.dense
    config.bound.iterations = 3
    # 64 x 5: forwards, gradient, and 3 forwards, 3 backwards, 1 gradient of the power iteration; 5
    # x 10 as the plain step.
    assert planned(config).operations == 32 * 2 * (64 * 5 * (2 + 7) + 5 * 10 * 3)
    config.bound.mode = "global"
    assert planned(config).operations == 32 * 2 * (64 * 5 * 2 + 5 * 10 * 3)


def test_a_convolution_counts_each_entry_of_its_output_times_those_of_its_window():
    config = small()
    n = config.bound.iterations
    first, strided, dense = 8 * 8 * 4 * 9, 4 * 4 * 4 * (16 * 4), 4 * 4 * 4 * 8
    expected = first * (2 * n + 3) + (strided + dense) * (2 * n + 12) + 8 * 10 * 3
    assert planned(config).operations == 32 * 2 * expected


def test_steps_are_those_of_the_order_of_an_epoch():
    found = planned(small())
    assert found.steps_per_epoch == len(feeding.epoch_order(0, 0, EXAMPLES, 32)) == 3
    assert found.steps == 3 * small().schedule.epochs


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_gradients_travel_once_around_a_ring_and_back(devices):
    found = planned(small(), devices=devices)
    assert found.interconnect == round(
        2 * (devices - 1) / devices * found.part("parameters").per_device
    )


def test_time_is_the_floor_over_the_share_and_the_exchange():
    device = with_memory(16, bandwidth=None)
    found = planned(small(), devices=2, device=device)
    floor = found.operations / 2 / 197e12
    assert found.floor_seconds == {"bfloat16": pytest.approx(floor)}
    exchange = found.interconnect / device.link
    assert found.step_seconds == {"bfloat16": pytest.approx(floor / device.share + exchange)}
    assert found.epoch_seconds == pytest.approx(3 * (floor / device.share + exchange))


def test_the_measured_step_is_the_estimate_of_a_cpu():
    config = cifar10_maxmin.get_config()
    found = plan.plan(config, (32, 32, 3), 10, 45_000, 1, "cpu")
    # 6C2F at batch 256: counted 282 GFlop, measured 1.73 s (clipped ReLU) and 2.02 s (clipped
    # MaxMin).
    assert found.operations == pytest.approx(282e9, rel=0.01)
    assert 1.6 < found.step_seconds["float32"] < 2.1
    assert found.device.share_is == "measured" and plan.DEVICES["h200"].share_is == "assumed"


def test_what_the_estimate_of_time_leaves_out_is_said():
    assert planned(small("linear")).unknown == ("the reverse passes of mode 'linear'",)
    assert planned(small(), devices=16).unknown == ("the network between hosts",)
    assert planned(small(store="host"), device="v5e").unknown == (
        "the vectors' way between host and device",
    )
    assert "the gradients' way between devices" in planned(small(), devices=2, device="cpu").unknown


# --------------------------------------------------------------------------------- temporary memory


def compared(*cases):
    """`benchmarks.plan.compared` in a process with XLA's ordinary settings: the tests' own keep it
    from reusing memory."""
    program = (
        "from benchmarks import plan; import json, sys;"
        "print(json.dumps([plan.compared(*plan.configured(**case), run=False) for case in "
        "json.loads(sys.argv[1])]))"
    )
    command, environment = (
        [sys.executable, "-c", program, json.dumps(cases)],
        {**os.environ, "XLA_FLAGS": ""},
    )
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_model_of_temporary_memory_follows_the_compiled_step():
    (found,) = compared(
        {
            "network": "small_dense",
            "batch": 256,
            "at_once": 256,
            "image": (16, 16, 1),
            "widths": (256, 256),
        }
    )
    assert abs(found["temporary_error"]) < plan.ERROR, found
    assert abs(found["error"]) < plan.ERROR, found


@pytest.mark.slow
def test_the_model_of_temporary_memory_follows_the_compiled_step_of_convolutions():
    case = {"network": "small_conv", "batch": 64, "image": (16, 16, 1), "widths": (8, 16)}
    modes = ("global", "bcp", "paper", "local", "linear")
    cases = [
        {**case, "mode": mode, "activation": a}
        for mode in modes
        for a in ("clipped_relu", "clipped_maxmin")
    ]
    for asked, found in zip(cases, compared(*cases), strict=True):
        assert abs(found["temporary_error"]) < plan.ERROR, (asked, found)
        assert abs(found["error"]) < plan.ERROR, (asked, found)


def test_temporary_memory_grows_with_the_examples_at_once_and_with_the_mode():
    config = small()
    sizes = []
    for at_once in (8, 16, 32):
        config.examples_at_once = at_once
        found = planned(config)
        assert found.examples_at_once == at_once
        sizes.append(found.part("temporary").per_device)
    assert sizes[0] < sizes[1] < sizes[2]
    by_mode = [
        planned(small(mode)).part("temporary").per_device
        for mode in ("global", "bcp", "paper", "local", "linear")
    ]
    assert by_mode == sorted(by_mode)


def test_a_figure_of_the_compiler_takes_the_place_of_the_model():
    found = planned(small(), temporary=10**9)
    assert found.part("temporary").exact
    assert found.part("temporary").per_device + found.part("gradients").per_device == 10**9


# ---------------------------------------------------------------------------------------- what fits


def applied(config, settings):
    """The configuration with a suggestion, and the number of devices if it says one."""
    config = config.copy_and_resolve_references()
    flat = {name: value for name, value in settings.items() if name != "devices"}
    config.update_from_flattened_dict(flat)
    return config, settings.get("devices")


@pytest.mark.parametrize("gigabytes", [16, 4, 0.5])
def test_what_does_not_fit_says_so_and_each_suggestion_fits(gigabytes):
    config, device = cifar10_maxmin.get_config(), with_memory(gigabytes)
    config.vectors.dtype = "float32"  # 20.5 GB
    found = plan.plan(config, (32, 32, 3), 10, 45_000, 1, device)
    assert not found.fits and found.per_device > device.memory
    assert "does NOT fit" in str(found)
    assert found.suggestions
    for option in found.suggestions:
        changed, devices = applied(config, option.settings)
        then = plan.plan(changed, (32, 32, 3), 10, 45_000, devices or 1, device)
        assert then.fits, option
        assert then.per_device == option.per_device
        assert then.part("vectors").per_device == option.vectors


def test_no_more_devices_are_suggested_than_take_an_example_each_of_a_part():
    config = small()
    config.examples_at_once = 4
    needed = planned(config, devices=4).per_device
    found = planned(config, device=with_memory(needed * 0.99 / plan.GB))
    assert not found.fits
    assert all(o.settings.get("devices", 1) <= 4 for o in found.suggestions)


def test_nothing_is_suggested_where_nothing_helps():
    found = planned(small(), device=with_memory(1e-6))
    assert not found.fits and found.suggestions == ()
    assert "No change of these settings fits" in str(found)


def test_a_plan_that_fits_suggests_nothing_and_the_options_tell_every_store_and_dtype():
    found = planned(small())
    assert found.fits and found.suggestions == ()
    settings = {(o.settings["vectors.store"], o.settings["vectors.dtype"]) for o in found.options}
    assert settings == {
        (store, dtype) for store in training.STORES for dtype in training.VECTOR_TYPES
    }
    for option in found.options:
        changed, _ = applied(small(), option.settings)
        assert planned(changed).per_device == option.per_device


def test_a_host_that_cannot_hold_the_rows_does_not_fit():
    config = small(store="host")
    assert planned(config, device=with_memory(16, host_memory=10**9)).fits
    assert not planned(config, device=with_memory(16, host_memory=10**4)).fits


def test_the_error_of_the_model_is_added_before_it_fits():
    found = planned(small())
    exact = sum(part.per_device for part in found.parts if part.exact)
    needed = exact + found.part("temporary").per_device * (1 + plan.ERROR)
    assert planned(small(), device=with_memory((needed + 1) / plan.GB)).fits
    assert not planned(small(), device=with_memory((needed - 2) / plan.GB)).fits


def test_imagenet_fits_on_the_devices_that_its_configuration_names_and_without_patches_does_not():
    config = imagenet.get_config()
    sizes = plan.sizes_of(config)
    assert sizes == plan.Sizes((224, 224, 3), 1000, 1_281_167 - 12_812)
    for devices, device in ((64, "v5e"), (8, "h200")):
        assert plan.planned(config, sizes, devices, device).fits
    config.model.stem, config.model.widths = 0, (16, 32, 64, 128, 256)
    found = plan.planned(config, sizes, 64, "v5e")
    assert not found.fits and found.part("vectors").total > 2e12
    assert {o.settings["vectors.store"] for o in found.options if o.fits} == {
        "host",
        "layer",
        "none",
    }


# ------------------------------------------------------------------------------------------- errors


def test_an_unknown_device_is_an_error_that_lists_the_known_ones():
    with pytest.raises(
        ValueError,
        match="no device is called 'h300'; there are h100, h200, a100, v4, v5e, v5p, cpu",
    ):
        planned(small(), device="h300")


@pytest.mark.parametrize("device", [*plan.DEVICES, "cpu"])
def test_every_device_has_a_plan(device):
    found = planned(small(), devices=2, device=device)
    assert found.device.arithmetic in found.step_seconds
    assert min(found.step_seconds.values()) > 0 and "estimate" in str(found)
    assert json.loads(json.dumps(found.as_dict()))["per_device"] == found.per_device


def test_a_batch_must_divide_over_the_devices_and_be_no_larger_than_the_data():
    with pytest.raises(
        ValueError, match=r"batch_size 32 does not divide over 3 devices: .*--config.batch_size=33"
    ):
        planned(small(), devices=3)
    with pytest.raises(
        ValueError, match="batch_size 32 is larger than the training set of 20 examples"
    ):
        planned(small(), examples=20)
    config = small()
    config.examples_at_once = 8
    with pytest.raises(ValueError, match=r"multiple of the devices \(16\), got 8"):
        planned(config, devices=16)


def test_a_store_that_there_is_not_is_an_error_that_lists_those_there_are():
    with pytest.raises(ValueError, match="one of example, host, layer, none, got 'disk'"):
        planned(small(store="disk"))


# ---------------------------------------------------------------------------------------- data sets


def test_the_digits_are_planned_as_they_are_loaded():
    config = digits.get_config()
    for examples in (0, 300):
        config.data.train_examples = examples
        train = training.load_data(config).train
        expected = plan.Sizes(
            train.images.shape[1:], train.classes, len(train.labels), train.images.dtype.name
        )
        assert plan.sizes_of(config) == expected


def test_known_data_sets_and_given_sizes_are_planned_without_data(monkeypatch):
    def refuse(config):
        raise AssertionError("loaded")

    monkeypatch.setattr(training, "load_data", refuse)
    assert plan.sizes_of(cifar10_maxmin.get_config()).examples == 45_000
    assert plan.sizes_of(tiny_imagenet_maxmin.get_config()) == plan.Sizes((64, 64, 3), 200, 90_000)
    config = digits.get_config()
    config.data.name = "npz:nowhere.npz"
    assert plan.sizes_of(config, 1000, ("9", "8", "7"), 5) == plan.Sizes((9, 8, 7), 5, 900)
    with pytest.raises(AssertionError, match="loaded"):
        plan.sizes_of(config, 1000, None, 5)


@pytest.mark.parametrize("shape", [("8", "8"), ("8", "x", "1"), ("0", "8", "1")])
def test_a_shape_that_is_none_is_an_error(shape):
    with pytest.raises(
        ValueError, match="a shape is height,width,channels, for instance 224,224,3"
    ):
        plan.sizes_of(digits.get_config(), shape=shape)


# ----------------------------------------------------------------------------------- other networks


@pytest.mark.parametrize("method", ["orthogonal", "gloro", "paper"])
def test_other_methods_and_residual_networks_have_plans(method):
    assert planned(baselines.get_config(method), examples=1293).fits
    config = digits.get_config()
    config.model.name = "small_residual"
    assert planned(config, examples=1293).operations > 0


# ---------------------------------------------------------------------------------- train.py --plan


def test_train_prints_the_plan_and_leaves_nothing_behind(tmp_path):
    flags = [
        "--config=configs/cifar10_maxmin.py",
        "--plan",
        "--plan_device=h200",
        "--plan_devices=8",
    ]
    command = [sys.executable, "train.py", *flags, f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "8 x NVIDIA H200 SXM" in done.stdout and "It fits" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_compiler_is_asked_for_the_devices_here_alone():
    config = digits.get_config()
    with pytest.raises(ValueError, match="--plan_compile asks this machine's compiler"):
        plan.planned(config, plan.sizes_of(config), 64, "v5e", compile_step=True)


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
        pairs = zip(
            jax.tree.leaves(getattr(state, part)),
            jax.tree.leaves(getattr(shardings, part)),
            strict=True,
        )
        return sum(math.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, s in pairs)

    assert (
        split.part("optimizer state").per_device
        == held("optimizer")
        < whole.part("optimizer state").per_device / 4
    )
    # Beside its own share each device gathers all of them for a step.
    assert (
        split.part("parameters").per_device == held("network") + whole.part("parameters").per_device
    )
