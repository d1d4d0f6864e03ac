"""How far below the norm power iteration from random starts ends, by the number of iterations.

    python -m benchmarks.starts

For each network and mode: the estimate of each norm over the same norm after 2000 iterations, over
the layers, 4 images and 8 keys; the mean and the least. It is why `lipjax.bound` iterates 50 times
where it is given no vectors.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lipjax

ITERATIONS = (10, 20, 50, 100)
CONVERGED = 2000
IMAGES, KEYS, EPSILON = 4, 8, 0.3


def networks() -> dict:
    """Networks by name, with the shape of their images."""

    def convolutions(size, channels):
        rngs = nnx.Rngs(0)
        return nnx.Sequential(
            nnx.Conv(channels, 16, (3, 3), padding=1, rngs=rngs),
            lipjax.ReLU(),
            nnx.Conv(16, 16, (4, 4), strides=2, padding=1, rngs=rngs),
            lipjax.ReLU(),
            lipjax.Flatten(),
            nnx.Linear(4 * size**2, 10, rngs=rngs),
        )

    def dense(*widths):
        return lipjax.models.small_dense(activation="relu", widths=widths, rngs=nnx.Rngs(0))

    return {
        "dense 64-64-64, new": (dense(64, 64), (8, 8, 1)),
        "2 convolutions, 8x8, new": (convolutions(8, 1), (8, 8, 1)),
        "2 convolutions, 16x16x3, new": (convolutions(16, 3), (16, 16, 3)),
        "digits-maxmin, trained": (lipjax.load("digits-maxmin"), (8, 8, 1)),
    }


@functools.partial(jax.jit, static_argnames=("mode", "iterations"))
def norms(network, images, keys, mode, iterations):
    """``(keys, images, layers)``."""

    def one(key, x):
        how = {"mode": mode, "iterations": iterations, "key": key}
        return jnp.stack(lipjax.bound(network, x, EPSILON, **how).norms)

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(keys, images)


def main() -> None:
    print("| network | mode | " + " | ".join(map(str, ITERATIONS)) + " |")
    print("|---" * (2 + len(ITERATIONS)) + "|")
    for name, (network, shape) in networks().items():
        images = jax.random.uniform(jax.random.key(0), (IMAGES, *shape))
        keys = jax.random.split(jax.random.key(1), KEYS)
        for mode in ("local", "global"):
            converged = norms(network, images, keys[:1], mode, CONVERGED)
            cells = []
            for iterations in ITERATIONS:
                share = np.asarray(norms(network, images, keys, mode, iterations) / converged)
                cells.append(f"{share.mean():.3f}, {share.min():.3f}")
            print(f"| {name} | {mode} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
