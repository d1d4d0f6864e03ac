"""What a training step costs by each bound, as a ratio to the plain step (cross-entropy, no bound), in one run.

    python -m benchmarks.steps [--config=configs/digits.py] [--modes=global,bcp,paper,local,linear,rows] [--rounds=7]

The configuration's network and batch size; Adam at a constant rate, on random images of the data's shape. The steps
take turns, round by round, and the medians are compared, so that what else the machine does falls on all of them.
Compilation apart. One Markdown row per mode.
"""

import argparse
import dataclasses
import importlib.util
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lipjax import activations, losses, regions, training

SHAPES = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "cifar10": (32, 32, 3)}
EXAMPLES, STEPS = 1024, 3


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/digits.py"))
    parser.add_argument("--model", help="config.model.name, if not the configuration's")
    parser.add_argument("--activation", help="config.model.activation, likewise")
    parser.add_argument("--modes", default=",".join(regions.MODES))
    parser.add_argument("--rounds", type=int, default=7, help=f"of {STEPS} steps each")
    options = parser.parse_args(arguments)
    spec = importlib.util.spec_from_file_location("configuration", options.config)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.model.name = options.model or config.model.name
    config.model.activation = options.activation or config.model.activation
    modes = options.modes.split(",")

    runs = {mode: prepared(config, mode) for mode in ("plain", *modes)}
    times: dict[str, list[float]] = {mode: [] for mode in runs}
    for _ in range(options.rounds):
        for mode, run in runs.items():
            start = time.perf_counter()
            run()
            times[mode].append((time.perf_counter() - start) / STEPS)
    device = jax.devices()[0].device_kind
    print(
        f"{config.model.name}, {config.model.activation}, batch {config.batch_size}, {device}, JAX {jax.__version__}\n"
    )
    print("| bound | ms a step, median | range | ratio to plain |\n|---|---|---|---|")
    plain = statistics.median(times["plain"])
    for mode, values in times.items():
        low, middle, high = (1e3 * value for value in (min(values), statistics.median(values), max(values)))
        print(f"| {mode} | {middle:.1f} | {low:.1f}-{high:.1f} | {middle / 1e3 / plain:.1f} |")


def prepared(config, mode: str):
    """A function that runs `STEPS` compiled steps; all state stays inside."""
    config = config.copy_and_resolve_references()
    config.bound.mode = "global" if mode == "plain" else mode
    shape = SHAPES[config.data.name]
    network = training.build_network(config, shape, 10)
    transform = optax.adam(1e-3)
    state = training.initial_state(network, transform, config, EXAMPLES, shape)
    # Far down the ramp, where epsilon is what it is for most of training.
    state = dataclasses.replace(state, step=jnp.asarray(10**6, jnp.int32))
    rng, size = np.random.default_rng(0), config.batch_size
    images = rng.integers(0, 256, (size, *shape)).astype(np.uint8)
    labels, rows = rng.integers(0, 10, size).astype(np.int32), np.arange(size, dtype=np.int32)
    if mode == "plain":
        step = plain_step(transform)
    else:
        step = training.make_step(config, transform, 1, 255.0, training.device_mesh(), state)
    held = [state]

    def run():
        for _ in range(STEPS):
            held[0], _ = step(held[0], images, labels, rows)
        jax.block_until_ready(held[0])

    run()
    return run


def plain_step(transform):
    """The same step without a bound."""

    @jax.jit
    def step(state, images, labels, rows):
        def loss_of(network):
            logits = jax.vmap(lambda x: regions.apply(network, x))(images.astype(jnp.float32) / 255.0)
            return jnp.mean(jax.vmap(losses.cross_entropy)(logits, labels))

        loss, gradient = jax.value_and_grad(loss_of)(state.network)
        updates, optimizer = transform.update(gradient, state.optimizer, state.network)
        network = activations.project(optax.apply_updates(state.network, updates))
        return dataclasses.replace(state, network=network, optimizer=optimizer), loss

    return step


if __name__ == "__main__":
    main()
