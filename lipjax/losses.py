"""Losses of certified training, of one example each, written on bounds. `vmap` makes the batch, the mean is yours."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from lipjax import activations, operators
from lipjax.margins import worst_logits
from lipjax.regions import Bound, layers_of

# Weight of the pull towards the upper constant range of a clipped ReLU (the paper's code's choice).
UPPER_SHARE = 0.1


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    """``-log softmax(logits)[label]`` of one example; a scalar >= 0."""
    return -jax.nn.log_softmax(logits)[label]


def bcp(network: nnx.Module, bound: Bound, label: jax.Array, kappa) -> jax.Array:
    """``kappa CE(logits) + (1 - kappa) CE(worst logits)``, the loss of BCP (Lee et al. 2020)."""
    robust = cross_entropy(worst_logits(network, bound, label), label)
    return kappa * cross_entropy(bound.logits, label) + (1 - kappa) * robust


def gloro_logits(network: nnx.Module, bound: Bound, label: jax.Array) -> jax.Array:
    """The logits and, as class number `classes`, the largest worst-case rival: ``(classes + 1,)``."""
    worst = worst_logits(network, bound, label)
    rival = jnp.max(jnp.where(jnp.arange(worst.shape[0]) == label, -jnp.inf, worst))
    return jnp.concatenate([bound.logits, rival[None]])


def gloro(network: nnx.Module, bound: Bound, label: jax.Array) -> jax.Array:
    """Cross-entropy over the logits and the "not robust" class of GloRo (Leino et al. 2021)."""
    return cross_entropy(gloro_logits(network, bound, label), label)


def trades(network: nnx.Module, bound: Bound, label: jax.Array, weight=1.0) -> jax.Array:
    """``CE(logits) + weight KL(softmax(logits), softmax(gloro_logits of the predicted class))``: TRADES (Zhang et al. 2019) with
    a bound in the place of its attack, as in GloRo's code.

    Both distributions are the same up to a factor on the classes, so that the divergence is that factor's logarithm:
    minus the logarithm of what the "not robust" class leaves to the others.
    """
    extended = gloro_logits(network, bound, jnp.argmax(bound.logits))
    rest = jax.nn.logsumexp(bound.logits)
    return cross_entropy(bound.logits, label) + weight * jax.nn.softplus(extended[-1] - rest)


def lmt(network: nnx.Module, bound: Bound, label: jax.Array) -> jax.Array:
    """Cross-entropy with ``sqrt(2) ||W|| r`` added to every rival's logit (Lipschitz-margin training, Tsuzuku et al. 2018).

    W is the last layer, r the penultimate radius; with mode "global" that is LMT, which knows the Lipschitz constant of the
    whole network and nothing of the pairs of classes.
    """
    *_, last = (layer for layer in layers_of(network) if operators.is_affine(layer))
    operator = operators.linear_operator(last)
    matrix = operator.materialized(bound.penultimate.center).kernel
    gain = math.sqrt(2) * jnp.linalg.norm(matrix, 2) * bound.penultimate.radius
    rivals = jnp.arange(bound.logits.shape[0]) != label
    return cross_entropy(bound.logits + jnp.where(rivals, gain, 0.0), label)


def emma(network: nnx.Module, bound: Bound, label: jax.Array) -> jax.Array:
    """Cross-entropy on rivals raised only as far as to the label's logit (EMMA: Hu et al., NeurIPS 2023).

    Each rival's gain is multiplied by the share of the ball at which it would draw level with the label, in [0, 1] and
    held fixed: the loss works at the boundary of what is robust already, not beyond it.
    """
    gain = worst_logits(network, bound, label) - bound.logits
    ahead = bound.logits[label] - bound.logits
    share = jnp.where(gain > ahead, jnp.maximum(ahead, 0.0) / jnp.where(gain > 0, gain, 1.0), 1.0)
    return cross_entropy(bound.logits + jax.lax.stop_gradient(share) * gain, label)


@functools.singledispatch
def sparsity_of(layer, lower: jax.Array, upper: jax.Array) -> jax.Array:
    """How far one activation's inputs are from its constant ranges, given their box. Register your own types.

    Raises:
        TypeError: for an activation that nobody registered.
    """
    raise TypeError(
        f"no sparsity loss for {type(layer).__name__}: register it with lipjax.losses.sparsity_of.register."
    )


@sparsity_of.register
def _(layer: activations.ReLU, lower, upper):
    return jnp.mean(jax.nn.relu(upper))


@sparsity_of.register
def _(layer: activations.ClippedReLU, lower, upper):
    return jnp.mean(jax.nn.relu(upper)) + UPPER_SHARE * jnp.mean(jax.nn.relu(layer.threshold[...] - lower))


@sparsity_of.register
def _(layer: activations.MaxMin, lower, upper):
    return jnp.zeros((), lower.dtype)  # never constant: there is nothing to pull towards


@sparsity_of.register
def _(layer: activations.ClippedMaxMin, lower, upper):
    lower_a, lower_b = jnp.split(lower, 2, axis=-1)
    upper_a, upper_b = jnp.split(upper, 2, axis=-1)
    to_upper = layer.upper[...] - jnp.maximum(lower_a, lower_b)
    to_lower = jnp.minimum(upper_a, upper_b) - layer.lower[...]
    return jnp.mean(jax.nn.relu(to_upper)) + jnp.mean(jax.nn.relu(to_lower))


def sparsity(network: nnx.Module, bound: Bound) -> jax.Array:
    """The hinge that pushes neurons into their constant ranges, summed over the activations; a scalar >= 0.

    It reads the boxes in front of the activations, so mode "global", whose boxes are balls, is a poor guide.

    Raises:
        TypeError: for an activation without a registered `sparsity_of`, or one at the very start of the network.
    """
    return _over_activations(sparsity_of, network, bound)


def stability(network: nnx.Module, bound: Bound) -> jax.Array:
    """The hinge that pushes boxes off the kinks of their activation, whichever way is shorter; a scalar >= 0.

    Mode "linear" pays only for neurons whose box has a kink strictly inside. For each kink c in a box ``[l, u]`` the hinge
    is ``min(u - c, c - l)``; the kinks of a ReLU are 0 and its threshold, a pair of MaxMin has one in ``a - b`` and those of
    its thresholds. Mean over the neurons, summed over the activations; of other activations nothing is known: 0.

    Raises:
        TypeError: a network that begins with an activation.
    """
    return _over_activations(_instability, network, bound)


def _over_activations(hinge, network, bound):
    """The sum of ``hinge(layer, lower, upper)`` over the activations and the boxes in front of them."""
    total = jnp.zeros((), bound.logits.dtype)
    for i, layer in enumerate(layers_of(network)):
        if activations.is_activation(layer):
            if i == 0:
                raise TypeError("the network begins with an activation: it has no pre-activation box.")
            total += hinge(layer, bound.regions[i - 1].lower, bound.regions[i - 1].upper)
    return total


def _instability(layer, lower, upper):
    def hinge(low, high, kink):
        return jnp.mean(jax.nn.relu(jnp.minimum(high - kink, kink - low)))

    if type(layer) in (activations.ReLU, activations.ClippedReLU):
        total = hinge(lower, upper, 0.0)
        return total + hinge(lower, upper, layer.threshold[...]) if type(layer) is activations.ClippedReLU else total
    if type(layer) in (activations.MaxMin, activations.ClippedMaxMin):
        (lower_a, lower_b), (upper_a, upper_b) = jnp.split(lower, 2, axis=-1), jnp.split(upper, 2, axis=-1)
        total = hinge(lower_a - upper_b, upper_a - lower_b, 0.0)
        if type(layer) is activations.ClippedMaxMin:
            total += hinge(jnp.maximum(lower_a, lower_b), jnp.maximum(upper_a, upper_b), layer.upper[...])
            total += hinge(jnp.minimum(lower_a, lower_b), jnp.minimum(upper_a, upper_b), layer.lower[...])
        return total
    return jnp.zeros((), lower.dtype)
