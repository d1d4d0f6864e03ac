"""Activations whose outputs can be constant on a whole ball, and what the bounds need to know of them.

Every activation here is 1-Lipschitz in the l2 norm and monotone in each coordinate, so that a box is mapped end by
end, and clipping returns *the very same number* for both ends of a constant coordinate. That is why no mask is ever
stored: a coordinate varies iff its lower and its upper end differ.

To use an activation of your own, register rules for its exact type (the third is needed to certify)::

    @lipjax.activations.box_image.register(MyActivation)
    def _(layer, lower, upper):                # the smallest box you can prove to contain the outputs
        return layer(lower), layer(upper)      # (right when it is monotone in each coordinate)

    @lipjax.activations.live_rows.register(MyActivation)
    def _(layer, lower, upper, mode):          # False where that input cannot move any output inside the box
        return jnp.ones(lower.shape, bool)     # (always right)

    @lipjax.activations.error_image.register(MyActivation)
    def _(layer, error):                       # |computed output - exact output|, given that of the inputs
        return error                           # (right for elementwise 1-Lipschitz maps that round nothing)

By registering it you assert that it is 1-Lipschitz in the l2 norm. An activation that is not registered raises.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lipjax.operators import larger, smaller


class ReLU(nnx.Module):
    """``max(z, 0)``. Constant on the box iff ``upper <= 0``."""

    def __call__(self, z: jax.Array) -> jax.Array:
        return jax.nn.relu(z)


class ClippedReLU(nnx.Module):
    """``min(max(z, 0), threshold)`` with one learnable threshold per neuron.

    Constant on the box iff ``upper <= 0`` or ``lower >= threshold``.

    Args:
        shape: shape of one example's activation, e.g. ``(height, width, channels)``.
        threshold: initial value of every threshold; must be >= 0. Training keeps them >= 0 (`project`).
    """

    def __init__(self, shape: int | Sequence[int], threshold: float = 1.0):
        if not threshold >= 0:
            raise ValueError(f"ClippedReLU needs a threshold >= 0, got {threshold}.")
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.threshold = nnx.Param(jnp.full(shape, threshold, jnp.float32))

    def __call__(self, z: jax.Array) -> jax.Array:
        return _clip_above(jax.nn.relu(z), self.threshold[...])


class MaxMin(nnx.Module):
    """Channels in two halves ``(a, b)``: ``concat(max(a, b), min(a, b))``. Never constant on a box that varies."""

    def __call__(self, z: jax.Array) -> jax.Array:
        a, b = _halves(z)
        return jnp.concatenate([larger(a, b), smaller(a, b)], axis=-1)


class ClippedMaxMin(nnx.Module):
    """Channels in two halves ``(a, b)``: ``concat(min(max(a, b), upper), max(min(a, b), lower))``.

    The first output of a pair is constant on the box iff ``max(lower_a, lower_b) >= upper``, the second iff
    ``min(upper_a, upper_b) <= lower``.

    Args:
        shape: shape of one example's activation, e.g. ``(height, width, channels)``; an even number of channels.
        upper, lower: initial thresholds; the parameters have shape ``(..., channels / 2)``.
    """

    def __init__(self, shape: int | Sequence[int], upper: float = 1.0, lower: float = -1.0):
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if shape[-1] % 2:
            raise ValueError(f"ClippedMaxMin pairs channels and needs an even number of them, got shape {shape}.")
        half = (*shape[:-1], shape[-1] // 2)
        self.upper = nnx.Param(jnp.full(half, upper, jnp.float32))
        self.lower = nnx.Param(jnp.full(half, lower, jnp.float32))

    def __call__(self, z: jax.Array) -> jax.Array:
        a, b = _halves(z)
        first = _clip_above(larger(a, b), self.upper[...])
        second = -_clip_above(-smaller(a, b), -self.lower[...])
        return jnp.concatenate([first, second], axis=-1)


def _halves(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    if z.shape[-1] % 2:
        raise ValueError(f"MaxMin pairs channels and needs an even number of them, got an input of shape {z.shape}.")
    a, b = jnp.split(z, 2, axis=-1)
    return a, b


def _clip_above(z: jax.Array, threshold: jax.Array) -> jax.Array:
    """``min(z, threshold)``, the threshold broadcast over leading (batch) axes."""
    if z.shape[z.ndim - threshold.ndim :] != threshold.shape:
        raise ValueError(f"thresholds of shape {threshold.shape} do not fit an activation of shape {z.shape}.")
    return smaller(z, jax.lax.broadcast(threshold, z.shape[: z.ndim - threshold.ndim]))


def varies(lower: jax.Array, upper: jax.Array) -> jax.Array:
    """Mask of the coordinates that can change. A NaN counts as varying: it must spread, never be masked away."""
    return ~(lower == upper)


@functools.singledispatch
def box_image(layer, lower: jax.Array, upper: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A box that contains ``layer(z)`` for every ``lower <= z <= upper``; same shapes. Register your own types.

    Raises:
        TypeError: for a type that nobody registered.
    """
    raise TypeError(f"no box rule for {type(layer).__name__}: register it with lipjax.activations.box_image.register.")


@functools.singledispatch
def live_rows(layer, lower: jax.Array, upper: jax.Array, mode: str) -> jax.Array:
    """Boolean mask over the *inputs* of an activation: False only where that input cannot move any output in the box.

    Args:
        layer: the activation.
        lower, upper: box of its inputs, of one example.
        mode: "paper" drops only what the paper drops, "local" everything that is proved to be droppable.

    Raises:
        TypeError: for a type that nobody registered.
    """
    raise TypeError(f"no row rule for {type(layer).__name__}: register it with lipjax.activations.live_rows.register.")


@functools.singledispatch
def error_image(layer, error: jax.Array) -> jax.Array:
    """Bound of ``|computed - exact|`` of each output of an activation as executed, given that of each input.

    Args:
        layer: the activation.
        error: of the shape of one example's inputs, >= 0.

    Raises:
        TypeError: for a type that nobody registered.
    """
    raise TypeError(
        f"no rounding rule for {type(layer).__name__}: what its arithmetic does is part of a certificate. Register it "
        "with lipjax.activations.error_image.register."
    )


@functools.singledispatch
def passes_through(layer, lower: jax.Array, upper: jax.Array) -> jax.Array:
    """Boolean mask over the *outputs* of an activation: True only where that output is one and the same input on the whole box.

    Neither a kink nor a threshold is crossed there: the neuron is stable, and linear. To report how many are; no bound
    rests on it. Of a type without a rule nothing is known: all False.

    Args:
        layer: the activation.
        lower, upper: box of its inputs, of one example; the outputs have the same shape.
    """
    return jnp.zeros(lower.shape, bool)


# What is registered for a type of activation.
RULES = (box_image, live_rows, error_image, passes_through)


def is_activation(layer) -> bool:
    """Is this exact type registered as an activation? (A subclass may compute something else, so it is not.)"""
    return type(layer) in box_image.registry and type(layer) is not object


def _monotone_box_image(layer, lower, upper):
    return layer(lower), layer(upper)


for _kind in (ReLU, ClippedReLU, MaxMin, ClippedMaxMin):
    box_image.register(_kind, _monotone_box_image)


@live_rows.register(ReLU)
@live_rows.register(ClippedReLU)
def _(layer, lower, upper, mode):
    return varies(*box_image(layer, lower, upper))


@passes_through.register(ReLU)
def _(layer, lower, upper):
    return (lower >= 0) & (upper >= lower)


@passes_through.register(ClippedReLU)
def _(layer, lower, upper):
    return (lower >= 0) & (upper <= layer.threshold[...])


@passes_through.register(MaxMin)
def _(layer, lower, upper):
    (lower_a, lower_b), (upper_a, upper_b) = _halves(lower), _halves(upper)
    ordered = (lower_a >= upper_b) | (lower_b >= upper_a)
    return jnp.concatenate([ordered, ordered], axis=-1)


@passes_through.register(ClippedMaxMin)
def _(layer, lower, upper):
    largest, least = larger(*_halves(upper)), smaller(*_halves(lower))
    unclipped = jnp.concatenate([largest <= layer.upper[...], least >= layer.lower[...]], axis=-1)
    return unclipped & passes_through(MaxMin(), lower, upper)


@error_image.register(ReLU)
@error_image.register(ClippedReLU)
def _(layer, error):
    return error  # comparing and selecting round nothing, and no output moves further than its input


@live_rows.register(MaxMin)
@live_rows.register(ClippedMaxMin)
def _(layer, lower, upper, mode):
    if mode == "paper":  # the paper's code drops no row in front of a MaxMin
        return jnp.ones(lower.shape, bool)
    first, second = _halves(varies(*box_image(layer, lower, upper)))
    (lower_a, lower_b), (upper_a, upper_b) = _halves(lower), _halves(upper)
    # Where the order is fixed the pair is a permutation: each row feeds one output and goes with it.
    a_is_max, b_is_max = lower_a >= upper_b, lower_b >= upper_a
    either = first | second
    keep_a = jnp.where(a_is_max, first, jnp.where(b_is_max, second, either))
    keep_b = jnp.where(b_is_max, first, jnp.where(a_is_max, second, either))
    # A tie for sure (all four ends equal) makes both orders true; either reading is a permutation of constants.
    return jnp.concatenate([keep_a, keep_b], axis=-1)


@error_image.register(MaxMin)
@error_image.register(ClippedMaxMin)
def _(layer, error):
    either = jnp.maximum(*_halves(error))
    return jnp.concatenate([either, either], axis=-1)


def project(network: nnx.Module) -> nnx.Module:
    """A copy of the network with every ClippedReLU threshold projected to >= 0. Apply after each optimizer step."""
    graph, state = nnx.split(network)
    network = nnx.merge(graph, state)
    for _, module in nnx.iter_graph(network):
        if type(module) is ClippedReLU:
            module.threshold[...] = jnp.maximum(module.threshold[...], 0)
    return network
