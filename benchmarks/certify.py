"""Images a second that are certified, by tier, beside the power iteration that proves nothing, in
one run.

    python -m benchmarks.certify --network=conv6_dense2 --activation=clipped_relu --json
    python -m benchmarks.certify --file=cifar10-maxmin --data=npz:test.npz --examples=128 --json

Without --workdir or --file: fresh weights, random images, their predictions as labels. One JSON
line (or plain text): seconds an image of each tier and of `lipjax.estimate` with 20 and with 2000
iterations (as many as the published evaluation has), each the median of --rounds rounds in turn,
compilation apart; the smallest and largest ratio of each one's Lipschitz constants to those of the
estimate with most iterations; certified shares; peak memory.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import lipjax
from benchmarks.step import SHAPES, peak_memory
from lipjax import bounds, models
from lipjax.cli import networks


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="conv6_dense2", choices=models.NETWORKS)
    parser.add_argument("--activation", default="clipped_relu", choices=models.ACTIVATIONS)
    parser.add_argument("--workdir", help="a run of train.py instead: its network and test images")
    parser.add_argument("--file", help="a network as certify.py's --network names it")
    parser.add_argument("--data", default="", help="with --file: the test images, as certify.py")
    parser.add_argument("--mode", default="local", choices=bounds.MODES)
    parser.add_argument("--tiers", default="probabilistic,deterministic")
    parser.add_argument("--epsilon", type=float, default=36 / 255)
    parser.add_argument("--failure_probability", type=float, default=1e-6)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--iterations", default="20,2000", help="of the estimates; empty: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args(arguments)
    network, images, labels = subject(options)

    def certifier(tier):
        how = {
            "tier": tier,
            "mode": options.mode,
            "batch_size": options.batch_size,
            "seed": options.seed,
        }
        how["failure_probability"] = options.failure_probability
        return lambda: lipjax.certify(network, images, labels, options.epsilon, **how)

    def estimator(iterations):
        how = {"mode": options.mode, "iterations": iterations, "batch_size": options.batch_size}
        return lambda: lipjax.estimate(network, images, labels, options.epsilon, **how)

    iterations = [int(n) for n in options.iterations.split(",") if n]
    runs = {f"estimate_{n}": estimator(n) for n in iterations}
    runs |= {tier: certifier(tier) for tier in options.tiers.split(",") if tier}
    results, first, times = {}, {}, {name: [] for name in runs}
    for name, run in runs.items():
        began = time.perf_counter()
        results[name] = run()
        first[name] = time.perf_counter() - began
    for _ in range(options.rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    found = {
        "network": options.workdir
        or options.file
        or f"{options.network}, {options.activation}, fresh weights",
        "mode": options.mode,
        "epsilon": options.epsilon,
        "failure_probability": options.failure_probability,
        "seed": options.seed,
        "split": "test" if options.workdir or options.file else "random images",
        "examples": len(images),
        "seconds_per_image": {
            name: round(value / len(images), 4) for name, value in seconds.items()
        },
        "images_per_second": {
            name: round(len(images) / value, 2) for name, value in seconds.items()
        },
        "compile_seconds": {name: round(first[name] - seconds[name], 1) for name in runs},
        "share": {
            name: float(np.mean(r.likely_robust if name.startswith("estimate") else r.certified))
            for name, r in results.items()
        },
        "peak_memory_bytes": peak_memory(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    if iterations:
        reference = results[f"estimate_{max(iterations)}"].lipschitz
        found["lipschitz_over_estimate"] = {
            name: [round(float(f(r.lipschitz / reference)), 4) for f in (np.min, np.max)]
            for name, r in results.items()
        }
    print(
        json.dumps(found)
        if options.json
        else "\n".join(f"{name}: {value}" for name, value in found.items())
    )


def subject(options):
    """Network, images and labels."""
    if options.workdir or options.file:
        given = (
            networks.of_run(Path(options.workdir), examples=options.examples)
            if options.workdir
            else networks.of_network(options.file, options.data, examples=options.examples)
        )
        return given.network, given.test.unit_images(slice(None)), given.test.labels
    shape, classes = SHAPES[options.network]
    network = models.build(
        options.network,
        activation=options.activation,
        input_shape=shape,
        classes=classes,
        rngs=nnx.Rngs(options.seed),
    )
    images = (
        np.random.default_rng(options.seed)
        .uniform(size=(options.examples, *shape))
        .astype(np.float32)
    )
    return network, images, None


if __name__ == "__main__":
    main()
