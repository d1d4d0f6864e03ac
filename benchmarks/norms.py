"""Tightness and cost of every bound of a masked norm, at the real sizes of the published networks.

    python -m benchmarks.norms [--networks=conv4_dense3,conv6_dense2,conv8_dense2] [--json]

For each affine layer but the last, with fresh weights and random masks that keep each input and
output with probability 1/2. One Markdown row per layer and way:

- *inflation*: largest of bound / norm - 1 over the examples, the norm being that of a power
  iteration of --steps steps (from below, so an inflation is not understated). Negative for an
  estimate: its deficit.
- *ms*: median wall time of one example by itself, without compilation; the guess that a bound needs
  is included. Of the global bound: once per network.
- *GFlop*: what `deterministic` counts for one example with one attempt and nothing masked; a bound
  that costs more than the budget is computed with blocks as large as the budget allows, or falls
  back on the global one.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipjax import bounds, models, norms

SHAPES = {
    "conv4_dense3": (28, 28, 1),
    "conv6_dense2": (32, 32, 3),
    "conv8_dense2": (64, 64, 3),
    "small_conv": (8, 8, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--networks", default="conv4_dense3,conv6_dense2,conv8_dense2", help=", ".join(SHAPES)
    )
    parser.add_argument(
        "--layers", default="", help="only these affine layers, counted from 0, e.g. 0,2"
    )
    parser.add_argument("--examples", type=int, default=3, help="pairs of masks per layer")
    parser.add_argument("--steps", type=int, default=2000, help="of the reference power iteration")
    parser.add_argument(
        "--failure_probability", type=float, default=1e-9, help="of each probabilistic bound"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=norms.best.BUDGET,
        help="flops of each deterministic bound",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per row instead of the table"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.networks.split(",")) - set(SHAPES)
    if unknown:
        parser.error(
            f"unknown networks {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}."
        )

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    device = jax.devices()[0]
    if not arguments.json:
        print(
            f"{device.device_kind}, JAX {jax.__version__}, seed {arguments.seed}, "
            f"{arguments.examples} examples\n"
        )
        print("| network | layer | bound | tier | delta | inflation | ms | GFlop |")
        print("|---|---|---|---|---|---|---|---|")
    for name in arguments.networks.split(","):
        for row in rows(name, arguments):
            if arguments.json:
                print(
                    json.dumps({**row, "seed": arguments.seed, "device": device.device_kind}),
                    flush=True,
                )
            else:
                cost = "" if row["gflop"] is None else f"{row['gflop']:.3g}"
                delta = (
                    "" if row["failure_probability"] is None else f"{row['failure_probability']:g}"
                )
                print(
                    f"| {row['network']} | {row['layer']} | {row['bound']} | {row['tier']} | "
                    f"{delta} "
                    f"| {100 * row['inflation']:+.2f} % | {row['milliseconds']:.3g} | {cost} |",
                    flush=True,
                )


def rows(name: str, arguments: argparse.Namespace) -> Iterator[dict]:
    network = models.build(name, rngs=nnx.Rngs(arguments.seed), input_shape=SHAPES[name])
    chosen = [int(k) for k in arguments.layers.split(",") if k]
    for k, (label, operator, like) in enumerate(affine_layers(network, SHAPES[name])):
        if chosen and k not in chosen:
            continue
        rng = np.random.default_rng([arguments.seed, k])
        out = jax.eval_shape(operator, like)
        masks = [
            tuple(jnp.asarray(rng.uniform(size=shape) < 0.5) for shape in (like.shape, out.shape))
            for _ in range(arguments.examples)
        ]

        def converged(operator, key, mask_in, mask_out, like=like):
            start = jax.random.normal(key, like.shape)
            return norms.power.power_iteration(operator, start, arguments.steps, mask_in, mask_out)[
                0
            ]

        key = jax.random.fold_in(jax.random.key(arguments.seed), k)
        references, _ = measure(converged, operator, key, masks)
        reached, took = measure(
            lambda operator, *_, like=like: norms.best.global_norm_bound(operator, like),
            operator,
            key,
            masks[:1],
        )
        global_bound = reached[0]
        for bound, tier, delta, gflop, function in ways(operator, like, global_bound, arguments):
            if function is None:
                values, milliseconds = [global_bound] * len(masks), took
            else:
                values, milliseconds = measure(
                    function, operator, jax.random.fold_in(key, 1), masks
                )
            yield {
                "network": name,
                "layer": f"{k}: {label}",
                "bound": bound,
                "tier": tier,
                "failure_probability": delta,
                "inflation": max(
                    (v / r - 1 for v, r in zip(values, references, strict=True)), key=abs
                ),
                "milliseconds": milliseconds,
                "gflop": gflop,
            }


def ways(operator, like, global_bound: float, arguments: argparse.Namespace) -> Iterator[tuple]:
    """What is compared: name, tier, failure probability, GFlop, ``function(operator, key, mask_in,
    mask_out)``."""
    delta = arguments.failure_probability

    def estimate(operator, key, mask_in, mask_out, iterations=20):
        start = jax.random.normal(key, like.shape)
        return norms.power.power_iteration(operator, start, iterations, mask_in, mask_out)[0]

    def probabilistic(operator, key, mask_in, mask_out):
        (start,) = norms.chebyshev.starts(key, [like.size])
        return norms.chebyshev.inflated_norm_bound(operator, start, delta, like, mask_in, mask_out)

    def schur(operator, _, mask_in, mask_out):
        return norms.closed.schur_bound(operator, like, mask_in, mask_out)

    def local(operator, _, mask_in, mask_out):
        return norms.best.norm_bound(
            operator, like, mask_in, mask_out, global_bound=global_bound, budget=arguments.budget
        )

    banded = norms.banded.masked_convolution_cost(operator, like)
    dense = norms.gram.dense_cost(operator, like)
    yield "power iteration, 20 steps", "estimate", None, None, estimate
    yield "Chebyshev", "probabilistic", delta, None, probabilistic
    yield "Schur", "deterministic", None, None, schur
    yield "global", "deterministic", None, None, None
    yield "local", "deterministic", None, min(banded, dense) / 1e9, local


def measure(function: Callable, operator, key: jax.Array, masks: list) -> tuple[list[float], float]:
    """The values for each pair of masks, and the median time of one in milliseconds."""
    compiled = jax.jit(function).lower(operator, key, *masks[0]).compile()
    values, times = [], []
    for i, pair in enumerate(masks):
        start = time.perf_counter()
        values.append(float(compiled(operator, jax.random.fold_in(key, i), *pair)))
        times.append(1e3 * (time.perf_counter() - start))
    return values, statistics.median(times)


def affine_layers(network: nnx.Module, shape: tuple[int, ...]) -> Iterator[tuple]:
    """Label, float64 map and input of each linear node but the last."""
    in_float64 = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), network)
    graph = bounds.graph_of(in_float64, jnp.zeros(shape))
    for i in graph.linear[:-1]:
        node = graph.nodes[i]
        like = jnp.zeros(graph.nodes[node.inputs[0]].shape)
        shapes = node.operator.kernel.shape, like.shape, node.shape
        kernel, before, after = ("x".join(map(str, shape)) for shape in shapes)
        kind = type(node.operator.apply).__name__
        yield f"{kind} {kernel}, {before} to {after}", node.operator, like


if __name__ == "__main__":
    main()
