"""Training on eight devices is training on one: the same parameters, vectors and metrics, only
shared out.

The eight CPU devices need a process of their own; it runs this file as a program and reports to the
tests.
"""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import tempfile

import jax
import numpy as np
import optax
import pytest
from conftest import ROOT
from flax import nnx
from jax.sharding import AxisType

import lipjax
from lipjax import models, training
from lipjax.certificates import batches
from lipjax.configs import digits
from lipjax.data import sets
from lipjax.training import feeding, sharding
from lipjax.training.checkpoints import Checkpoints

DEVICES, BATCH, STEPS = 8, 16, 4


# -------------------------------------------------------------------------------------- the program


def experiment(mode):
    config = digits.get_config()
    # in two parts, each over all devices
    config.batch_size, config.examples_at_once = BATCH, DEVICES
    config.model.widths, config.model.dense = (4,), 8
    config.schedule.ramp = 1.0  # of two steps: epsilon is there before the end
    config.bound.mode, config.bound.iterations = mode, 1
    config.data.augment, config.data.rotation = True, 20.0
    config.optimizer.average = 0.6
    config.devices.shard_parameters = mode == "paper"
    return config


def train(config, train_set, mesh):
    """STEPS steps, as train.py takes them; the last state and all metrics."""
    shape = train_set.images.shape[1:]
    network = training.build_network(config, shape, train_set.classes)
    # Adam divides by gradients that are rounding alone, where all else is 0
    transform = optax.sgd(0.05, momentum=0.9)
    create = functools.partial(
        training.initial_state,
        transform=transform,
        config=config,
        examples=len(train_set.labels),
        input_shape=shape,
    )
    abstract = jax.eval_shape(create, network)
    shardings = training.state_shardings(abstract, config, mesh)
    state = jax.jit(create, out_shardings=shardings)(network)
    steps = training.make_steps(config, transform, 2, train_set, mesh, abstract, 2)
    feed, metrics = feeding.Feeder(train_set, config, mesh, 2), []
    for first in range(0, STEPS, 2):
        state, values = steps(state, *feed(first, 2), 2)
        metrics += [{name: float(value[i]) for name, value in values.items()} for i in range(2)]
    abstract = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )
    return state, metrics, abstract


def furthest(first, second):
    """The largest difference between two trees, relative to the largest entry of each leaf."""
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    gaps = [np.max(np.abs(np.subtract(a, b))) / max(np.max(np.abs(a)), 1e-6) for a, b in pairs]
    return float(np.max(gaps))  # NaN if any is


def report(mode):
    config = experiment(mode)
    splits = sets.load("digits", train_examples=2 * BATCH)
    meshes = [
        jax.make_mesh((n,), ("data",), devices=jax.devices()[:n], axis_types=(AxisType.Auto,))
        for n in (1, DEVICES)
    ]
    (one, one_metrics, abstract), (many, many_metrics, _) = (
        train(config, splits.train, mesh) for mesh in meshes
    )
    found = {
        "devices": len(jax.devices()),
        "epsilon": many_metrics[-1]["epsilon"],
        "metrics": furthest(one_metrics, many_metrics),
        **{
            name: furthest(getattr(one, name), getattr(many, name))
            for name in ("network", "optimizer", "vectors", "average")
        },
        "moved": furthest(training.build_network(config, (8, 8, 1), 10), many.network),
        "vector_sizes": [np.abs(np.asarray(v)).mean().item() for v in many.vectors["local"]],
        "shards": {
            name: sorted(
                {(s.data.shape[0], a.shape[0]) for a in leaves for s in a.addressable_shards}
            )
            for name, leaves in many.vectors.items()
        },
        "parameters": {
            part: [
                (leaf.shape, leaf.size // max(s.data.size for s in leaf.addressable_shards))
                for leaf in jax.tree.leaves(getattr(many, part))
            ]
            for part in ("network", "optimizer", "average")
        },
    }
    if mode == "local":
        few = splits.validation.take(np.arange(27))  # the last batch is not full
        found["evaluations"] = [
            training.evaluate(state.network, few, config, mesh)
            for state, mesh in zip((one, many), meshes, strict=True)
        ]
        with tempfile.TemporaryDirectory() as workdir:
            with Checkpoints(workdir) as writer:
                writer.save_last(STEPS, many, {"epoch": 2})
            with Checkpoints(workdir) as reader:  # from eight devices onto one
                restored, _ = reader.restore_last(abstract)
        found["certified"] = certified_by(1, splits.test) == certified_by(2, splits.test)
        finite = [dataclasses.replace(state, best=np.zeros(())) for state in (many, restored)]
        found["restored"] = furthest(*finite)
        found["restored_devices"] = max(
            len(leaf.sharding.device_set) for leaf in jax.tree.leaves(restored)
        )
    return found


def certified_by(devices, test):
    """Certificates of more batches than devices, the last one not full, as bytes; and that some are
    positive."""
    batches.devices = lambda: jax.devices()[:devices]
    network = models.build("small_dense", input_shape=(8, 8, 1), widths=(6,), rngs=nnx.Rngs(0))
    found = lipjax.certify(
        network, test.unit_images(np.arange(13)), None, 1e-3, batch_size=4, seed=0
    )
    assert found.certified.any()
    return [
        getattr(found, name).tobytes() for name in ("predicted", "certified", "margin", "norms")
    ]


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    sharding.SPLIT_ENTRIES = 32  # the network is small
    print(json.dumps({mode: report(mode) for mode in ("local", "paper")}))


# ---------------------------------------------------------------------------------------- the tests


def run(*command, **environment):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    command = [sys.executable, *command]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def found():
    done = run(__file__)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("mode", ["local", "paper"])
def test_eight_devices_train_as_one_does(found, mode):
    result = found[mode]
    assert result["devices"] == DEVICES and result["epsilon"] > 0.5
    # something was learnt and kept
    assert result["moved"] > 1e-2 and min(result["vector_sizes"]) > 0.05
    assert result["metrics"] < 1e-4
    for part in ("network", "optimizer", "vectors", "average"):
        assert result[part] < 1e-4


@pytest.mark.parametrize("mode", ["local", "paper"])
def test_each_device_holds_its_share_of_the_vectors(found, mode):
    shards = found[mode]["shards"]
    assert shards["local"] == [[2 * BATCH // DEVICES, 2 * BATCH]]
    assert all(part == whole for part, whole in shards.get("global", []))
    assert set(shards) == ({"local", "global"} if mode == "paper" else {"local"})


def test_each_device_holds_all_parameters_or_its_share_of_the_large_ones_and_of_their_momentum(
    found,
):
    for part in ("network", "optimizer", "average"):
        assert all(devices == 1 for _, devices in found["local"]["parameters"][part])
        for shape, devices in found["paper"]["parameters"][part]:
            large = math.prod(shape) >= 32 and any(n % DEVICES == 0 for n in shape)
            assert devices == (DEVICES if large else 1)
        assert any(devices > 1 for _, devices in found["paper"]["parameters"][part])


def test_eight_devices_evaluate_as_one_does(found):
    one, many = found["local"]["evaluations"]
    assert one.keys() == many.keys()
    for name in one:
        assert many[name] == pytest.approx(one[name], rel=1e-4)


def test_a_state_of_eight_devices_is_restored_onto_one(found):
    assert found["local"]["restored"] == 0 and found["local"]["restored_devices"] == 1


def test_two_devices_certify_as_one_does_in_the_same_order(found):
    assert found["local"]["certified"]


def test_a_batch_that_does_not_divide_over_the_devices_is_an_error_that_names_one_that_does(
    tmp_path,
):
    flags = ["--config=configs/digits.py", "--config.batch_size=60", f"--workdir={tmp_path}/run"]
    done = run("train.py", *flags, JAX_NUM_CPU_DEVICES=str(DEVICES))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "batch_size 60 does not divide over 8 devices: give a multiple, --config.batch_size=64."
        in done.stderr
    )
    assert not (tmp_path / "run").exists()
