"""What is certified: a network with the test images it is about, from a run of train.py or from a
file."""

import dataclasses
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lipjax import bridges, pretrained, storage, training
from lipjax.data import sets
from lipjax.training.checkpoints import Checkpoints, load_config

UNKNOWN = "not recorded"


@dataclasses.dataclass(frozen=True)
class NetworkWithData:
    """A network, and the test images that its certificates are about.

    Attributes:
        network: as it is certified and executed.
        test: the test split, or a fixed random choice of it.
        epsilon: the run's ``epsilon.test``; None of a file, which says nothing of it.
        facts: what is known of its training, to print and store beside results: ``network`` (where
            it is from), ``training_seed``, ``trained_with``, ``epoch``, each `UNKNOWN` where the
            file does not say.
        config: of its training; {} where the file does not say.
    """

    network: nnx.Sequential
    test: sets.Dataset
    epsilon: float | None
    facts: dict[str, Any]
    config: dict[str, Any]


def of_run(workdir, *, examples: int | None = None, data_dir: str | None = None) -> NetworkWithData:
    """The network that a run of train.py selected, and its test images.

    Args:
        examples: take only so many, the first of a fixed shuffle; 0: all; None: as the
            configuration says.
        data_dir: where TFDS keeps its sets, if not where training found them.

    Raises:
        CheckpointError: no run there, or nothing selected yet. DataError: its data set is not here.
    """
    stored = load_config(workdir)
    config = training.completed(stored)
    if examples is not None:
        config.data.test_examples = examples
    if data_dir is not None:
        config.data.data_dir = data_dir
    test = training.load_data(config).test
    network, epoch = selected(workdir, test.images.shape[1:], test.classes)
    facts = {"network": os.fspath(workdir), **_facts({"config": stored, "epoch": epoch})}
    return NetworkWithData(network, test, config.epsilon.test, facts, stored)


def selected(workdir, input_shape, classes: int) -> tuple[nnx.Sequential, int]:
    """The network that a run of train.py selected, for images of that shape, and of which epoch; no
    data is needed.

    Raises:
        CheckpointError: no run there, nothing selected yet, or a network of another shape.
    """
    with Checkpoints(workdir) as checkpoints:
        config = training.completed(load_config(workdir))
        network, known = training.selected_network(checkpoints, config, input_shape, classes)
    return network, known["epoch"]


def notes(run: NetworkWithData) -> dict[str, Any]:
    """What to store with the network of a run, so that `of_network` finds it in the file."""
    return {"config": run.config, "epoch": run.facts["epoch"]}


def _facts(notes) -> dict[str, Any]:
    config = notes.get("config")
    if not config:
        return dict.fromkeys(("training_seed", "trained_with", "epoch"), UNKNOWN)
    bound = config["bound"]
    return {
        "training_seed": config["seed"],
        "trained_with": f"mode {bound['mode']}, loss {bound['loss']}",
        "epoch": notes.get("epoch", UNKNOWN),
    }


def of_network(
    name: str,
    data_name: str,
    *,
    examples: int | None = None,
    data_dir: str | None = None,
    image_size: int | None = None,
) -> NetworkWithData:
    """A network from a file or one that comes with lipjax, and the test images of a data set.

    Args:
        name: as `opened` takes it.
        data_name, data_dir, image_size: as `lipjax.data.load_test` takes them.
        examples: take only so many, the first of a fixed shuffle; None: all.

    Raises:
        ValueError: no such network, or one for images of another shape or for another number of
            classes.
        DataError: the data set is not here.
    """
    network, expected, notes = opened(name)
    logits = jax.eval_shape(network, jax.ShapeDtypeStruct((1, *expected), "float32")).shape[-1]
    test = sets.load_test(
        data_name, data_dir=data_dir, test_examples=examples, image_size=image_size, classes=logits
    )
    shape = tuple(test.images.shape[1:])
    network = on_images(network, expected, shape)
    if network is None:
        raise ValueError(
            f"{name} takes images of {expected}, and those of {data_name} are {shape}."
        )
    if logits != test.classes:
        raise ValueError(f"{name} has {logits} logits, and {data_name} has {test.classes} classes.")
    return NetworkWithData(
        network, test, None, {"network": name, **_facts(notes)}, notes.get("config", {})
    )


def opened(name: str) -> tuple[Any, tuple[int, ...], dict[str, Any]]:
    """The network or function of a file or of a name, the shape of its inputs, and what was noted
    of its training.

    Args:
        name: a path that ends in ".safetensors" (of `lipjax.save`) or ".onnx" (anybody's), or a
            name of `lipjax.pretrained.names`.

    Raises:
        ValueError, TypeError: as `lipjax.load` and `lipjax.bridges.from_onnx`.
        ImportError: an ONNX file, and the package onnx is not installed.
    """
    if name.endswith(".onnx"):
        network = bridges.from_onnx(name)
        return network, network.input_shape, {}
    path = name if name.endswith(".safetensors") else pretrained.path(name)
    description = storage.description(path)
    return storage.load(path), tuple(description["input_shape"]), description["notes"]


def on_images(network, expected: tuple[int, ...], shape: tuple[int, ...]):
    """The network on images ``(H, W, C)``; None if it takes others.

    One of vectors takes gray images row by row, as everybody flattens them. (Of colours there are
    two orders, and the file does not say which.)
    """
    if expected == shape:
        return network
    if len(shape) == 3 and shape[-1] == 1 and expected == (math.prod(shape),):
        return RowByRow(network)
    return None


class RowByRow(nnx.Module):
    """A network of vectors, on images ``(..., H, W, 1)``."""

    def __init__(self, network):
        self.network = network

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.network(jnp.reshape(x, (*x.shape[:-3], -1)))
