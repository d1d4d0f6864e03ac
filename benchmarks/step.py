"""What a training step costs, as a ratio to the plain step (cross-entropy, no bound) of the same
network, in one run.

    python -m benchmarks.step --network=conv6_dense2 --activation=clipped_relu --mode=local \\
        --iterations=2 --batch=256 --json

Random images, Adam, full epsilon. The plain step is taken twice: by the same means as the bound's
(`plain_seconds`, what `ratio` refers to), and as JAX compiles it if nothing is done for it
(`untuned_plain_seconds`). They take turns with the bound's step, round by round, and medians are
compared, so that what else the machine does falls on all of them. Compilation apart.
`counted_gflop` is the number of operations by hand (`lipjax.training.plan.counted`),
`lowered_gflop` XLA's own.
"""

import argparse
import dataclasses
import functools
import json
import math
import resource
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lipjax import activations, bounds, losses, models, training
from lipjax.configs import digits
from lipjax.data import sets
from lipjax.training import feeding, plan
from lipjax.training.plan import counted

SHAPES = {
    "conv4_dense3": ((28, 28, 1), 10),
    "conv6_dense2": ((32, 32, 3), 10),
    "conv8_dense2": ((64, 64, 3), 200),
    **dict.fromkeys(("small_conv", "small_dense", "small_residual", "shifted"), ((8, 8, 1), 10)),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="conv6_dense2", choices=models.NETWORKS)
    parser.add_argument("--activation", default="clipped_relu", choices=models.ACTIVATIONS)
    parser.add_argument("--mode", default="local", choices=bounds.MODES)
    parser.add_argument("--loss", default="bcp", choices=training.LOSSES)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument(
        "--image",
        type=int,
        help="height and width of the images; default: those of the network's data",
    )
    parser.add_argument("--classes", type=int, help="likewise")
    parser.add_argument("--widths", default="", help="of small_conv and small_dense, e.g. 16,32")
    parser.add_argument("--vectors", default="float32", choices=training.VECTOR_TYPES)
    parser.add_argument("--examples_at_once", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7, help="of --steps steps each")
    parser.add_argument("--steps", type=int, default=4, help="in one call of the device")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args(arguments)

    config = configured(options)
    (height, width, channels), classes = SHAPES[options.network]
    shape = (options.image or height, options.image or width, channels)
    classes = options.classes or classes
    runs = {
        "bound": Steps(config, shape, classes, options.steps, training.example_loss),
        "plain": Steps(config, shape, classes, options.steps, plain_loss),
        "untuned_plain": Untuned(config, shape, classes, options.steps),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) / options.steps)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    network = training.build_network(config, shape, classes)
    found = {
        **{
            name: getattr(options, name)
            for name in ("network", "activation", "mode", "loss", "iterations", "batch")
        },
        "image": shape,
        "classes": classes,
        "vectors": options.vectors,
        "examples_at_once": runs["bound"].at_once,
        **{f"{name}_seconds": round(value, 4) for name, value in seconds.items()},
        "ratio": round(seconds["bound"] / seconds["plain"], 2),
        "ratio_to_untuned": round(seconds["bound"] / seconds["untuned_plain"], 2),
        "bound_seconds_range": [round(min(times["bound"]), 4), round(max(times["bound"]), 4)],
        "peak_memory_bytes": peak_memory(),
        "temporary_bytes": {name: run.temporary for name, run in runs.items()},
        "compile_seconds": {name: round(run.compile_seconds, 1) for name, run in runs.items()},
        "counted_gflop": {
            mode: round(counted(network, shape, mode, options.iterations) * options.batch / 1e9, 1)
            for mode in ("plain", options.mode)
        },
        "lowered_gflop": {
            name: round(lowered_flops(config, shape, classes, loss) / 1e9, 1)
            for name, loss in (("plain", plain_loss), (options.mode, training.example_loss))
        },
        "planned_seconds": planned_seconds(config, shape, classes, options.steps),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
    }
    if options.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name}: {value}" for name, value in found.items()))


def configured(options):
    """The configuration of the options; epsilon and thresholds as for CIFAR-10, full epsilon at
    once."""
    config = digits.get_config()
    config.model.name, config.model.activation = options.network, options.activation
    if options.network.startswith("conv"):
        del config.model.threshold  # published thresholds
    if options.widths:
        config.model.widths = tuple(map(int, options.widths.split(",")))
    config.bound.mode, config.bound.loss, config.bound.iterations = (
        options.mode,
        options.loss,
        options.iterations,
    )
    config.batch_size, config.examples_at_once = options.batch, options.examples_at_once
    config.vectors.dtype = options.vectors
    config.epsilon.train, config.schedule.ramp = 0.15, 0.0
    return config


def planned_seconds(config, shape, classes, count) -> list[float] | None:
    """The range in which `lipjax plan` expects the step; None on a device that it does not know."""
    try:
        found = plan.planned(config, plan.Sizes(shape, classes, count * config.batch_size))
    except ValueError:
        return None
    return [round(seconds, 4) for seconds in found.step_seconds]


def plain_loss(network, x, label, epsilon, kappa, vectors, config):
    """Cross-entropy of the clean logits, in the form of `training.example_loss`."""
    logits = network(x)
    return losses.cross_entropy(logits, label), ({}, jnp.argmax(logits) == label, jnp.zeros(()))


class Steps:
    """Calls of `training.make_steps` on random images; all state stays inside."""

    def __init__(self, config, shape, classes, count, loss):
        mesh, transform = training.device_mesh(), optax.adam(1e-3)
        examples = count * config.batch_size
        state = training.initial_state(
            training.build_network(config, shape, classes), transform, config, examples, shape
        )
        # The very first step has epsilon 0.
        state = dataclasses.replace(state, step=jnp.ones((), jnp.int32))
        self.at_once = training.examples_at_once(config, mesh, state)
        if loss is plain_loss:
            state = dataclasses.replace(state, vectors={})
            config = config.copy_and_resolve_references()
            config.examples_at_once = self.at_once
        self.state = jax.device_put(state, training.state_shardings(state, config, mesh))
        self.count, self.done = count, 0
        images, labels = random_images(np.random.default_rng(0), examples, shape, classes)
        split = sets.Dataset("random", "train", images, labels, 255.0, classes, np.arange(examples))
        self.feed = feeding.Feeder(split, config, mesh, count)
        steps = training.make_steps(config, transform, 1, split, mesh, self.state, count, loss)
        began = time.perf_counter()
        self.steps = steps.lower(self.state, *self.feed.shapes(), np.int32(1)).compile()
        self.compile_seconds = time.perf_counter() - began
        self.temporary = self.steps.memory_analysis().temp_size_in_bytes
        self()

    def _arguments(self):
        return *self.feed(self.done, self.count), np.int32(self.count)

    def __call__(self):
        self.state, metrics = self.steps(self.state, *self._arguments())
        self.done += self.count
        jax.block_until_ready((self.state, metrics))


class Untuned:
    """The plain step as JAX compiles it: the whole batch at once, one step a call."""

    def __init__(self, config, shape, classes, count):
        transform = optax.adam(1e-3)
        network = training.build_network(config, shape, classes)
        self.carried, self.count = (network, transform.init(network)), count
        self.images, self.labels = random_images(
            np.random.default_rng(0), config.batch_size, shape, classes
        )

        def step(carried, images, labels):
            network, optimizer = carried

            def loss_of(network):
                logits = jax.vmap(network)(images.astype(jnp.float32) / 255.0)
                return jnp.mean(jax.vmap(losses.cross_entropy)(logits, labels))

            _, gradient = jax.value_and_grad(loss_of)(network)
            updates, optimizer = transform.update(gradient, optimizer, network)
            return activations.project(optax.apply_updates(network, updates)), optimizer

        began = time.perf_counter()
        self.step = (
            jax.jit(step, donate_argnums=0).lower(self.carried, self.images, self.labels).compile()
        )
        self.compile_seconds = time.perf_counter() - began
        self.temporary = self.step.memory_analysis().temp_size_in_bytes
        self()

    def __call__(self):
        for _ in range(self.count):
            self.carried = self.step(self.carried, self.images, self.labels)
        jax.block_until_ready(self.carried)


def random_images(rng, count, shape, classes):
    """``(count, *shape)`` uint8 and labels."""
    return rng.integers(0, 256, (count, *shape)).astype(np.uint8), rng.integers(
        0, classes, count
    ).astype(np.int32)


def lowered_flops(config, shape, classes, loss) -> float:
    """XLA's own count of the gradient of one batch, before anything is rewritten or put into loops
    (their length is unknown to it). The loops of the margin count once."""
    network = training.build_network(config, shape, classes)
    size = config.batch_size
    shapes = bounds.vector_shapes(network, shape)
    vectors = {
        name: tuple(jnp.zeros(((size,) if name == "local" else ()) + s) for s in shapes)
        for name in bounds.mode_of(config.bound.mode).vectors
    }
    axes = {name: 0 if name == "local" else None for name in vectors}

    def total(network, images, labels):
        one = functools.partial(loss, network, config=config)
        values, _ = jax.vmap(one, in_axes=(0, 0, None, None, axes))(
            images, labels, 0.1, 0.5, vectors
        )
        return jnp.sum(values)

    images = jax.ShapeDtypeStruct((size, *shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((size,), jnp.int32)
    # Of what is lowered XLA knows no costs on GPUs.
    costs = jax.jit(jax.grad(total)).lower(network, images, labels).cost_analysis() or {}
    return costs.get("flops", math.nan)


def peak_memory() -> int:
    """Bytes on the device where it tells, else of this process (which holds the compiler and all
    three steps)."""
    statistics_ = jax.devices()[0].memory_stats() or {}
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return statistics_.get("peak_bytes_in_use", whole)


if __name__ == "__main__":
    main()
