"""Layers whose norm is at most 1 by construction, for training, and what becomes of them to
certify: ordinary layers.

Each computes its kernel from free parameters at every call. `plain` writes the kernels down, once,
into nnx.Linear and nnx.Conv, which is what one certifies and executes: a proof then rests on the
numbers themselves, rounding included, and not on the construction (a kernel computed again
elsewhere may differ in its last bits). The norm of the written-down layer is bounded like that of
any other; it is 1 up to rounding, or less.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lipjax import layers


class CayleyLinear(nnx.Module):
    """A dense layer with orthonormal rows or columns, whichever are fewer: ``||W|| = 1``, all
    singular values 1.

    The kernel is the Cayley transform of a free square part and a free remainder (Trockman and
    Kolter, *Orthogonalizing Convolutional Layers with the Cayley Transform*, 2021): with ``A = U -
    U^T + R^T R``, ``((I - A) (I + A)^-1, -2 R (I + A)^-1)``. Costs one solve of the smaller side at
    each call.

    Args:
        inputs, outputs: numbers of features.
    """

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        deviation = min(inputs, outputs) ** -0.5
        self.free = nnx.Linear(
            inputs, outputs, kernel_init=jax.nn.initializers.normal(deviation), rngs=rngs
        )

    def plain(self) -> nnx.Linear:
        """The nnx.Linear of the same map."""
        free = self.free.kernel[...]
        wide = free.shape[0] < free.shape[1]
        tall = free.T if wide else free
        side = tall.shape[1]
        square = tall[:side]
        rest = tall[side:]
        skew = square - square.T + rest.T @ rest
        identity = jnp.eye(side, dtype=free.dtype)
        # (I + A)^T = the system from the left: X (I + A) = B.
        parts = jnp.concatenate([identity - skew, -2 * rest])
        kernel = jnp.linalg.solve((identity + skew).T, parts.T).T
        return _with_kernel(self.free, kernel.T if wide else kernel)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.plain()(x)


class AOLConv(nnx.Module):
    """A convolution with ``||W|| <= 1``, nearly orthogonal after training (AOL: Prach and Lampert
    2022).

    Every input entry's column is divided by the root of its row sum in ``|P^T P|``, P the free
    convolution without end. With strides that is done for each position of a tap modulo the stride,
    which is exact for them: the matrix is that of an ordinary convolution behind a space-to-depth.

    Args:
        inputs, outputs: channels.
        kernel_size: per spatial axis; two of them.
        strides: one number for both axes.
        padding: zeros on each side; with them the map is a part of the endless one, so the bound
            holds.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: tuple[int, int],
        *,
        strides: int = 1,
        padding: int = 0,
        rngs: nnx.Rngs,
    ):
        self.free = nnx.Conv(
            inputs,
            outputs,
            kernel_size,
            strides=strides,
            padding=padding,
            kernel_init=_start(strides),
            rngs=rngs,
        )

    def plain(self) -> nnx.Conv:
        """The nnx.Conv of the same map."""
        kernel = self.free.kernel[...]
        stride = int(self.free.strides)  # type: ignore[arg-type]
        height, width, inputs, outputs = kernel.shape
        tall = -(-height // stride)
        broad = -(-width // stride)
        padded = jnp.pad(
            kernel, ((0, tall * stride - height), (0, broad * stride - width), (0, 0), (0, 0))
        )
        apart = padded.reshape(tall, stride, broad, stride, inputs, outputs)
        deep = apart.transpose(0, 2, 1, 3, 4, 5).reshape(tall, broad, stride**2 * inputs, outputs)
        # Entry (shift, i, j) of P^T P is the correlation of the kernels of inputs i and j.
        products = jax.lax.conv_general_dilated(
            deep.transpose(2, 0, 1, 3),
            deep.transpose(0, 1, 3, 2),
            (1, 1),
            [(tall - 1, tall - 1), (broad - 1, broad - 1)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        sums = jnp.sum(jnp.abs(products), axis=(1, 2, 3))
        factors = jnp.where(sums > 0, jax.lax.rsqrt(jnp.where(sums > 0, sums, 1.0)), 0.0)
        factors = jnp.tile(factors.reshape(stride, stride, inputs, 1), (tall, broad, 1, 1))[
            :height, :width
        ]
        return _with_kernel(self.free, kernel * factors)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.plain()(x)


KINDS = (CayleyLinear, AOLConv)


def _start(stride: int):
    """An orthogonal matrix on the taps in the middle, zero elsewhere: near that, AOL rescales by
    nearly 1."""

    def initialise(key, shape, dtype=jnp.float32):
        *window, inputs, outputs = shape
        first = [(size - stride) // 2 for size in window]
        if min(first) < 0:
            raise ValueError(
                f"AOLConv needs a kernel of at least its stride, {stride}, got {tuple(window)}."
            )
        matrix = jax.nn.initializers.orthogonal()(key, (stride**2 * inputs, outputs), dtype)
        taps = matrix.reshape(stride, stride, inputs, outputs)
        return (
            jnp.zeros(shape, dtype)
            .at[first[0] : first[0] + stride, first[1] : first[1] + stride]
            .set(taps)
        )

    return initialise


def _with_kernel(layer, kernel):
    graph, state = nnx.split(layer)
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(state) | {"kernel": kernel})
    return nnx.merge(graph, state)


def plain(network: Any) -> Any:
    """The network with every layer of this module written down as an ordinary one: certify, save
    and execute that one.

    The kernels are computed by this machine; another one may round them otherwise, so keep the
    result, not the recipe.

    Args:
        network: an nnx.Sequential, perhaps with others and Residuals inside; it is not changed.
    """
    if type(network) is nnx.Sequential:
        return nnx.Sequential(*(plain(layer) for layer in network.layers))
    if type(network) is layers.Residual:
        return layers.Residual(*(plain(layer) for layer in network.branch.layers))
    return network.plain() if type(network) in KINDS else network
