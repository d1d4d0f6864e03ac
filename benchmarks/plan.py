"""The plan (`lipjax.training.plan`) against what XLA and the operating system say, one line of JSON
for each case.

    python -m benchmarks.plan                       # nets, modes and batches of `CASES`: compiled,
    nothing runs JAX_NUM_CPU_DEVICES=8 python -m benchmarks.plan --cases=4C3F
    python -m benchmarks.plan --run --exact --cases=6C2F    # creates the state, takes steps, looks
    at the process's peak

`planned` and `compiled` are bytes on each device: all of it (arguments, results that are not
donated, temporary memory), and temporary memory alone, gradients included. With --run,
`peak_growth` is what the process's largest resident set grew by from before the state was there to
after two calls; it holds the compiler's own memory unless the program was compiled before (run it
twice).
"""

import argparse
import functools
import json
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.step import SHAPES, random_images
from lipjax import training
from lipjax.configs import digits
from lipjax.data import sets
from lipjax.runtime import cpu
from lipjax.training import feeding, plan

_SMALL = {"network": "small_conv", "image": (16, 16, 1), "widths": (16, 32), "batch": 64}
_6C2F = {"network": "conv6_dense2", "batch": 256}
CASES = {
    "small": _SMALL,
    "small, clipped MaxMin": {**_SMALL, "activation": "clipped_maxmin"},
    "small, 16 at once": {**_SMALL, "at_once": 16},
    "small, batch 256": {**_SMALL, "batch": 256, "at_once": 256},
    "small, 100 classes": {**_SMALL, "classes": 100},
    "small, dense 1024": {**_SMALL, "dense": 1024},
    "small, global": {**_SMALL, "mode": "global"},
    "small, global, dense 1024": {**_SMALL, "mode": "global", "dense": 1024},
    "small, bcp": {**_SMALL, "mode": "bcp"},
    "small, paper": {**_SMALL, "mode": "paper"},
    "small, linear": {**_SMALL, "mode": "linear"},
    "small, linear, 3 rivals": {**_SMALL, "mode": "linear", "rivals": 3},
    "small, float8": {**_SMALL, "dtype": "float8_e4m3fn"},
    "small, layer": {**_SMALL, "store": "layer"},
    "small, none": {**_SMALL, "store": "none"},
    "dense 1024-1024": {
        "network": "small_dense",
        "image": (16, 16, 1),
        "widths": (1024, 1024),
        "batch": 64,
    },
    "residual": {"network": "small_residual", "image": (16, 16, 1), "batch": 64},
    "4C3F": {"network": "conv4_dense3", "batch": 256, "iterations": 5, "loss": "gloro"},
    "6C2F": _6C2F,
    "6C2F, clipped MaxMin": {**_6C2F, "activation": "clipped_maxmin"},
    "6C2F, whole batch": {**_6C2F, "at_once": 256},
    "6C2F, global": {**_6C2F, "mode": "global"},
    "6C2F, bcp": {**_6C2F, "mode": "bcp"},
    "6C2F, paper": {**_6C2F, "mode": "paper"},
    "8C2F": {"network": "conv8_dense2", "batch": 64},
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases",
        default="",
        help=f"those that begin so, separated by semicolons: {'; '.join(CASES)}",
    )
    parser.add_argument("--exact", action="store_true", help="the cases of exactly these names")
    parser.add_argument("--run", action="store_true")
    options = parser.parse_args(arguments)
    cpu.keep_compiled()
    wanted = options.cases.split(";")
    chosen = [
        name
        for name in CASES
        if (name in wanted if options.exact else name.startswith(tuple(wanted)))
    ]
    if options.run and len(chosen) != 1:
        parser.error(
            "--run takes one case, as a process has one peak; these are "
            f"{', '.join(chosen) or 'none'}."
        )
    for name, case in ((name, CASES[name]) for name in chosen):
        print(
            json.dumps({"case": name, **compared(*configured(**case), run=options.run)}), flush=True
        )


def configured(
    network,
    batch,
    *,
    image=None,
    classes=None,
    activation="clipped_relu",
    mode="local",
    loss="bcp",
    iterations=2,
    at_once=0,
    widths=(),
    dense=0,
    rivals=0,
    store="example",
    dtype="float32",
):
    """The configuration and the sizes of a case; 16 batches of images."""
    config = digits.get_config()
    config.model.name, config.model.activation = network, activation
    if network.startswith("conv"):
        del config.model.threshold  # published thresholds
    if widths:
        config.model.widths = widths
    if dense:
        config.model.dense = dense
    config.bound.mode, config.bound.loss, config.bound.iterations = mode, loss, iterations
    config.bound.rivals = rivals
    config.batch_size, config.examples_at_once = batch, at_once
    config.vectors.store, config.vectors.dtype = store, dtype
    shape, its_classes = SHAPES.get(network, ((8, 8, 1), 10))
    return config, plan.Sizes(image or shape, classes or its_classes, 16 * batch)


def compared(config, sizes, run: bool) -> dict:
    """Planned and measured bytes of one case, on each device."""
    began = time.monotonic()
    compiled = plan.compiled_step(config, sizes).memory_analysis()
    found = plan.planned(config, sizes)
    temporary = found.part("temporary").per_device + found.part("gradients").per_device
    whole = compiled.argument_size_in_bytes + compiled.temp_size_in_bytes
    whole += compiled.output_size_in_bytes - compiled.alias_size_in_bytes
    return {
        "devices": jax.device_count(),
        "at_once": found.examples_at_once,
        "planned_temporary": temporary,
        "compiled_temporary": compiled.temp_size_in_bytes,
        "temporary_error": round(temporary / compiled.temp_size_in_bytes - 1, 3),
        "planned": found.per_device,
        "compiled": whole,
        "error": round(found.per_device / whole - 1, 3),
        **({"peak_growth": peak_growth(config, sizes, found.steps_per_epoch)} if run else {}),
        "seconds": round(time.monotonic() - began, 1),
    }


def peak_growth(config, sizes, steps_per_epoch) -> int:
    """What this process's largest resident set grows by when the state is created and two calls of
    two steps are taken."""
    mesh = training.device_mesh()
    transform = optax.adam(training.learning_rate(config, steps_per_epoch))
    network = training.build_network(config, sizes.input_shape, sizes.classes)
    create = functools.partial(
        training.initial_state,
        transform=transform,
        config=config,
        examples=sizes.examples,
        input_shape=sizes.input_shape,
    )
    abstract = jax.eval_shape(create, network)
    images, labels = random_images(
        np.random.default_rng(0), sizes.examples, sizes.input_shape, sizes.classes
    )
    split = sets.Dataset(
        "random", "train", images, labels, 255.0, sizes.classes, np.arange(sizes.examples)
    )
    before = _peak()
    steps = plan.compiled_step(config, sizes)
    state = jax.jit(create, out_shardings=training.state_shardings(abstract, config, mesh))(network)
    feed = feeding.Feeder(split, config, mesh, plan.CALL)
    for first in (0, 2):
        state, metrics = steps(state, *feed(first, 2), jnp.int32(2))
        jax.block_until_ready(metrics)
    return _peak() - before


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


if __name__ == "__main__":
    main()
