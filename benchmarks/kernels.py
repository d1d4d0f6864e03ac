"""What each convolution of a network costs: forwards, to its images, to its kernel; as JAX has it
and as `for_cpu` rewrites it.

    python -m benchmarks.kernels [--network=conv6_dense2] [--batch=32] [--rounds=5]

Within a loop, as in training: kernel gradients and transposed strided convolutions that were not
rewritten leave the quick path of XLA's CPU backend there. Milliseconds, medians, in turn; and GFlop
a second.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lipjax
from benchmarks.step import SHAPES
from lipjax import bounds, models
from lipjax.graph.linear import Convolution

REPEATS = 3


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="conv6_dense2", choices=models.NETWORKS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    shape, classes = SHAPES[options.network]
    network = models.build(
        options.network, activation="relu", input_shape=shape, classes=classes, rngs=nnx.Rngs(0)
    )
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, batch {options.batch}\n")
    print(
        "| input, kernel, stride | product | as it is, ms | rewritten, ms | GFlop/s as it is | "
        "rewritten |"
    )
    print("|---|---|---|---|---|---|")
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    graph = bounds.graph_of(network, x)
    for node in (graph.nodes[i] for i in graph.linear):
        if isinstance(node.operator.apply, Convolution):
            report(node.operator, graph.nodes[node.inputs[0]].shape, options)


def report(operator, shape, options) -> None:
    """Three rows of the table."""
    rng, batch = np.random.default_rng(0), options.batch

    def random(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    images = random(batch, *shape)
    forwards = jax.vmap(operator.apply, in_axes=(None, 0))
    outputs = random(*forwards(operator.kernel, images).shape)

    def to_images(kernel, y):
        return jax.linear_transpose(lambda x: forwards(kernel, x), images)(y)[0]

    def to_kernel(x, y):
        return jax.linear_transpose(lambda kernel: forwards(kernel, x), operator.kernel)(y)[0]

    flops = 2 * outputs.size * operator.kernel.size / operator.kernel.shape[-1]
    what = (
        f"{'x'.join(map(str, shape))}, {'x'.join(map(str, operator.kernel.shape))}, "
        f"{operator.apply.strides[0]}"
    )
    products = {
        "forwards": (forwards, operator.kernel, images),
        "to the images": (to_images, operator.kernel, outputs),
        "to the kernel": (to_kernel, images, outputs),
    }
    for name, (function, *operands) in products.items():
        runs = [in_a_loop(function, *operands), in_a_loop(lipjax.for_cpu(function), *operands)]
        times: list[list[float]] = [[], []]
        for _ in range(options.rounds):
            for run, values in zip(runs, times, strict=True):
                began = time.perf_counter()
                jax.block_until_ready(run(*operands))
                values.append((time.perf_counter() - began) / REPEATS)
        before, after = map(statistics.median, times)
        row = f"| {what} | {name} | {1e3 * before:.1f} | {1e3 * after:.1f} "
        print(row + f"| {flops / before / 1e9:.0f} | {flops / after / 1e9:.0f} |", flush=True)


def in_a_loop(function, *operands):
    """`REPEATS` calls in one compiled loop, each on operands that depend on the one before."""

    def run(first, second):
        result = jax.eval_shape(function, first, second)

        def again(_, total):
            return total + function(first + 1e-30 * total.ravel()[0], second)

        return jax.lax.fori_loop(0, REPEATS, again, jnp.zeros(result.shape))

    compiled = jax.jit(run)
    jax.block_until_ready(compiled(*operands))
    return compiled


if __name__ == "__main__":
    main()
