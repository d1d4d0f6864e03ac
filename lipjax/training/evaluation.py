"""The evaluation that selects checkpoints, and the network that it selected."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lipjax import bounds, orthogonal
from lipjax.data import pipeline, records, sets
from lipjax.runtime import cpu
from lipjax.training import feeding
from lipjax.training.config import build_network
from lipjax.training.sharding import device_mesh


def evaluate(network, dataset: sets.Dataset, config, mesh: Mesh) -> dict[str, float]:
    """Accuracy and *estimated* robust accuracy at ``config.epsilon.test``; every example exactly
    once.

    Power iteration starts afresh here and runs `config.evaluation.iterations` times: a stored
    vector that has gone wrong in training cannot flatter the selection. The starts are the same in
    each evaluation, which makes epochs comparable, and nothing is trained with them: weights cannot
    hide norms from them.
    """
    size, count = config.batch_size, len(dataset.labels)
    split = PartitionSpec("data")

    # The last batch is filled up with examples of weight 0.
    positions = np.arange(-(-count // size) * size).reshape(-1, size)
    rows = np.minimum(positions, count - 1)
    weights = (positions < count).astype(np.float32)

    totals = np.zeros(3)
    batches = zip(_images_of(dataset, rows, config, mesh), rows, weights, strict=True)
    for images, batch, weight in batches:
        found = _evaluate_batch(
            network,
            images,
            feeding.put(dataset.labels[batch], mesh, split),
            feeding.put(weight, mesh, split),
            config.epsilon.test,
            mode=config.bound.mode,
            iterations=config.evaluation.iterations,
        )
        totals += np.array(jax.device_get(found))

    clean, robust, lipschitz = (totals / count).tolist()
    return {
        "validation_accuracy": clean,
        "validation_robust_accuracy_estimate": robust,
        "validation_lipschitz_estimate": lipschitz,
    }


@functools.partial(jax.jit, static_argnames=("mode", "iterations"))
@cpu.for_cpu
def _evaluate_batch(network, images, labels, weights, epsilon, *, mode, iterations):
    def one(x, label):
        bound = bounds.bound(network, x, epsilon, mode=mode, iterations=iterations)
        correct = jnp.argmax(bound.logits) == label
        robust = bounds.margin(bounds.worst_logits(bound, label), label) > 0
        return correct, correct & robust, bound.lipschitz

    correct, robust, lipschitz = jax.vmap(one)(images, labels)
    return (correct * weights).sum(), (robust * weights).sum(), (lipschitz * weights).sum()


def _images_of(dataset, rows, config, mesh) -> Iterator[jax.Array]:
    """The images at each of ``(batches, size)`` rows, floats in [0, 1], over the devices."""
    split = PartitionSpec("data")
    if not isinstance(dataset.images, records.Images):
        for batch in rows:
            yield feeding.put(dataset.unit_images(batch), mesh, split)
        return

    # Sets on disk are read ahead, and each process reads what its own devices need.
    size = rows.shape[1]
    mine = feeding.places(size, mesh)
    options = {"workers": config.data.workers, "read_ahead": config.data.read_ahead}
    with pipeline.batches(dataset, rows[:, mine], seed=0, first_step=0, **options) as batches:
        for images, _ in batches:
            whole = np.zeros((size, *images.shape[1:]), np.float32)
            whole[mine] = images.astype(np.float32) / np.float32(dataset.levels)
            yield feeding.put(whole, mesh, split)


def selected_network(checkpoints, config, input_shape, classes) -> tuple[nnx.Sequential, dict]:
    """The network that training selected, as one certifies and executes it (`orthogonal.plain`),
    and what is known of it.

    Args:
        checkpoints: `lipjax.training.checkpoints.Checkpoints` of the run.
        config: the run's.

    Raises:
        CheckpointError: as `Checkpoints.restore_best`.
    """
    graph, state = nnx.split(build_network(config, input_shape, classes))

    # Restored by all processes onto all devices, whatever they were saved from.
    everywhere = NamedSharding(device_mesh(), PartitionSpec())
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
        nnx.to_pure_dict(state),
    )
    parameters, selected = checkpoints.restore_best(abstract)

    # Each process goes on with its own copy.
    parameters = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), parameters)
    nnx.replace_by_pure_dict(state, parameters)
    return orthogonal.plain(nnx.merge(graph, state)), selected
