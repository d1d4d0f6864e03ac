"""Unsound certifiers, and networks that they get wrong. **Nothing here proves anything; never use
it to certify.**

Each makes one mistake that has been seen in published code, so that `benchmarks.hunt` can show that
it would notice: an opposition that finds nothing is worth something only if it finds these. All
networks have the same architecture, ``W2 relu(W1 x + b1) + b2`` with `SIZE` inputs, as many hidden
units and two classes. (METHOD 7 tells where the first three come from; the fourth is what a tool
does that runs at a GPU's default precision.)
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lipjax
from lipjax import bounds

SIZE = 256
COPIES = 4


@dataclasses.dataclass(frozen=True)
class Trap:
    """A network, ``(COPIES, SIZE)`` images and a radius at which `claims` says "robust", and is
    wrong.

    Attributes:
        claims: ``(network, images, labels, epsilon) -> (COPIES,)`` booleans.
        of_real_numbers: it is the real-number function that has another class in the ball; where
            the device rounds as the certifier believes, no attack on the executed one can find it.
    """

    name: str
    network: nnx.Sequential
    images: np.ndarray
    labels: np.ndarray
    epsilon: float
    claims: Callable[..., np.ndarray]
    of_real_numbers: bool = False


def traps(seed: int = 0) -> list[Trap]:
    """Each unsound certifier with a network that it gets wrong."""
    rng = np.random.default_rng(seed)
    zeros = np.zeros(COPIES, np.int32)

    # W1 = I + (s - 1) v v^T, all units on: an input moved along v moves the margin 2 s times as
    # far. Images that agree along v have one margin, a little less than the radius can move it.
    scale, epsilon = 2.0, 0.1
    v = rng.choice([-1.0, 1.0], SIZE) / np.sqrt(SIZE)
    images = rng.uniform(0.3, 0.7, (COPIES, SIZE))
    images = (images - np.outer((images - 0.5) @ v, v)).astype(np.float32)
    hidden = two_layers(
        np.eye(SIZE) + (scale - 1) * np.outer(v, v),
        np.full(SIZE, 10.0),
        np.stack([v, -v]),
        np.zeros(2),
    )
    margin = float(np.mean(np.asarray(hidden(images) @ jnp.array([1.0, -1.0]), np.float64)))
    hidden.layers[2].bias[...] = jnp.array(
        [2 * epsilon * scale * 0.9995 - margin, 0.0], jnp.float32
    )

    # The label wins by relu(x_0 - 0.5): in a part of the ball both logits are 0 and class 0 is
    # predicted.
    head = np.zeros((2, SIZE))
    head[1, 0] = 1.0
    shift = np.zeros(SIZE)
    shift[0] = -0.5
    plateau = two_layers(np.eye(SIZE), shift, head, np.zeros(2))
    on = rng.uniform(0.3, 0.7, (COPIES, SIZE)).astype(np.float32)
    on[:, 0] = 0.6

    # Weights 1 + 2^-11 and -1 on pairs of equal pixels: TF32 rounds the first to 1, and they
    # cancel.
    weights = np.where(np.arange(SIZE) % 2, -1.0, 1 + 2.0**-11 * 0.98)
    pixels = np.repeat(128 + rng.integers(-20, 20, (COPIES, SIZE // 2)), 2, axis=1) / 256
    # Without rounding the label's margin is this much smaller than with it.
    lost = np.max(pixels @ np.where(np.arange(SIZE) % 2, 0.0, weights - 1))
    cancelling = two_layers(
        np.eye(SIZE),
        np.zeros(SIZE),
        np.stack([weights, np.zeros(SIZE)]),
        np.array([0, 1.02 * lost]),
    )
    return [
        Trap(
            "two steps of power iteration",
            hidden,
            images,
            zeros,
            epsilon,
            takes_two_power_steps_for_the_norm,
        ),
        Trap(
            "NaN is no perturbation", hidden, images, zeros, epsilon, takes_nan_for_no_perturbation
        ),
        Trap("ties count", plateau, on, zeros + 1, 0.3, takes_a_tie_for_a_win),
        Trap(
            "TF32",
            cancelling,
            pixels.astype(np.float32),
            zeros + 1,
            1e-3,
            forgets_that_tf32_rounds,
            of_real_numbers=True,
        ),
    ]


def two_layers(first, shift, second, bias) -> nnx.Sequential:
    """``second relu(first x + shift) + bias``; matrices as ``(outputs, inputs)``."""
    network = nnx.Sequential(
        nnx.Linear(SIZE, SIZE, rngs=nnx.Rngs(0)),
        lipjax.ReLU(),
        nnx.Linear(SIZE, 2, rngs=nnx.Rngs(0)),
    )
    for layer, matrix, offset in (
        (network.layers[0], first, shift),
        (network.layers[2], second, bias),
    ):
        layer.kernel[...] = jnp.asarray(matrix.T, jnp.float32)
        layer.bias[...] = jnp.asarray(offset, jnp.float32)
    return network


# ------------------------------------------------------------------------------------- the mistakes


def takes_two_power_steps_for_the_norm(network, images, labels, epsilon) -> np.ndarray:
    """UNSOUND: power iteration is a lower bound of a norm."""
    return lipjax.estimate(network, images, labels, epsilon, iterations=2).likely_robust


def takes_nan_for_no_perturbation(network, images, labels, epsilon) -> np.ndarray:
    """UNSOUND: a stored vector that a dead layer has left behind as 0 makes the norm 0/0, and that
    counts as nothing."""

    def norm(k, operator, like, mask_in, mask_out):
        stored = jnp.zeros(like.shape, like.dtype)
        image = operator(stored / jnp.linalg.norm(stored))
        return jnp.linalg.norm(image), stored

    def claim(bound, worst, label):
        return bounds.margin(jnp.where(jnp.isnan(worst), bound.logits, worst), label) > 0

    return _claims(network, images, labels, epsilon, norm, claim)


def takes_a_tie_for_a_win(network, images, labels, epsilon) -> np.ndarray:
    """UNSOUND: which of two equal logits is predicted depends on their order, and on rounding."""

    def claim(_, worst, label):
        return bounds.margin(worst, label) >= 0

    return _claims(network, images, labels, epsilon, _norm, claim)


def forgets_that_tf32_rounds(network, images, labels, epsilon) -> np.ndarray:
    """UNSOUND: computes norms and logits from operands rounded to 10 bits, and claims it of the
    network as given."""
    graph, state = nnx.split(network)
    state = jax.tree.map(
        lambda leaf: tf32(leaf) if leaf.ndim == 2 else leaf, state
    )  # only products round their operands
    rounded = nnx.merge(graph, state)

    def claim(_, worst, label):
        return bounds.margin(worst, label) > 0

    return _claims(rounded, tf32(jnp.asarray(images)), labels, epsilon, _norm, claim)


def tf32(x: jax.Array) -> jax.Array:
    """float32 rounded to the 10 explicit bits of TF32's mantissa, to nearest, halves away from
    zero."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jax.lax.bitcast_convert_type(
        (bits + jnp.uint32(0x1000)) & jnp.uint32(0xFFFFE000), jnp.float32
    )


def _norm(k, operator, like, mask_in, mask_out):
    matrix = operator.materialized(like).kernel
    matrix = jnp.where(mask_out.reshape(-1, 1), jnp.where(mask_in.reshape(1, -1), matrix, 0), 0)
    return jnp.linalg.norm(matrix, 2), like


def _claims(network, images, labels, epsilon, norm, claim) -> np.ndarray:
    def one(x, label):
        walk = bounds.Walk(bounds.graph_of(network, x), bounds.mode_of("local"), norm, norm)
        bound = walk(x, jnp.float32(epsilon))
        return claim(bound, bounds.worst_logits(bound, label), label)

    return np.asarray(jax.jit(jax.vmap(one))(jnp.asarray(images), jnp.asarray(labels)))
