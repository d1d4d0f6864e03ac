"""Small functions with every kind of node, for tests of what is derived of them."""

import jax
import jax.numpy as jnp
import numpy as np

import lipjax

SIZE = 6


def weights(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    """Normal, about 1 in norm, and the same everywhere."""
    drawn = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(scale * drawn / np.sqrt(np.prod(shape[:-1])), jnp.float32)


def dense(seed: int, outputs: int = SIZE, scale: float = 1.0):
    kernel = weights(seed, SIZE, outputs, scale=scale)
    bias = weights(seed + 1000, outputs) / 2
    return lambda x: x @ kernel + bias


def sums(x):
    """Values that are taken twice, sums of two maps, a difference, a constant, a branch around
    all."""
    first, second, third = dense(1), dense(2), dense(3)
    h = first(x)
    a = jnp.clip(h, 0, 0.4)
    b = lipjax.activations.maxmin(h)
    c = jax.nn.relu(second(a + b))
    d = jax.nn.relu(first(c)[::-1] + third(x))
    return dense(4, 3)(c - d + jnp.float32(0.3) + a)


def images(x):
    """Convolutions, scales and shifts, pools that overlap and that average."""
    x = (x.reshape(1, 4, 4, 1) - 0.4) / 0.3
    dimensions = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(
        x, weights(5, 3, 3, 1, 2), (1, 1), "SAME", dimension_numbers=dimensions
    )
    h = jax.nn.relu(h * weights(6, 2, scale=2.0) + weights(7, 2))
    h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "SAME")
    h = jax.lax.reduce_window(h, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "VALID") / 4
    h = jax.lax.conv_general_dilated(
        h, weights(8, 2, 2, 2, 6), (2, 2), "VALID", dimension_numbers=dimensions
    )
    return dense(9, 3)(jnp.clip(h.reshape(-1), 0, 0.5))


def smooth(x):
    """Activations that are rounded, one behind the other."""
    h = jnp.tanh(dense(10)(x))
    h = jax.nn.leaky_relu(dense(11)(h), 0.2)
    h = jax.nn.gelu(dense(12)(h)) + jnp.abs(x)
    return dense(13, 3)(jax.nn.elu(dense(14)(h), 0.7))


def moved(x):
    """Entries that are sorted, copied, cut and put together."""
    h = lipjax.activations.groupsort(dense(15)(x), 3)
    h = jnp.concatenate([h[:3], h[3:] * 2, h[:2]])
    h = jnp.pad(h, (1, 0))[:SIZE]
    h = jnp.broadcast_to(jax.nn.sigmoid(dense(16)(h))[None], (2, SIZE)).reshape(-1)
    h = h[:SIZE] + h[SIZE:]
    return dense(17, 3)(lipjax.activations.clipped_maxmin(h, jnp.float32(0.9), jnp.float32(0.1)))


def narrow(x):
    """Products and sums in bfloat16, and casts."""
    h = x.astype(jnp.bfloat16) @ weights(18, SIZE, SIZE).astype(jnp.bfloat16)
    h = jax.nn.relu(h + weights(19, SIZE).astype(jnp.bfloat16))
    h = lipjax.activations.maxmin(dense(20)(h.astype(jnp.float32)))
    return dense(21, 3)(h)


FUNCTIONS = {f.__name__: f for f in (sums, images, smooth, moved, narrow)}


def example(name: str) -> np.ndarray:
    """The point around which the function is looked at."""
    count = 16 if name == "images" else SIZE
    return np.random.default_rng(30).uniform(0, 1, count).astype(np.float32)
