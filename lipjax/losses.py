"""Losses of certified training, of one example each, written on bounds. `vmap` makes the batch, the
mean is yours."""

import math

import jax
import jax.numpy as jnp

from lipjax.bounds import Bound, worst_logits
from lipjax.graph import Activation, Input


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    """``-log softmax(logits)[label]`` of one example; a scalar >= 0."""
    return -jax.nn.log_softmax(logits)[label]


def bcp(bound: Bound, label: jax.Array, kappa) -> jax.Array:
    """``kappa CE(logits) + (1 - kappa) CE(worst logits)``, the loss of BCP (Lee et al. 2020)."""
    robust = cross_entropy(worst_logits(bound, label), label)
    return kappa * cross_entropy(bound.logits, label) + (1 - kappa) * robust


def gloro_logits(bound: Bound, label: jax.Array) -> jax.Array:
    """The logits and, as class number `classes`, the largest worst-case rival: ``(classes +
    1,)``."""
    worst = worst_logits(bound, label)
    rival = jnp.max(jnp.where(jnp.arange(worst.shape[0]) == label, -jnp.inf, worst))
    return jnp.concatenate([bound.logits, rival[None]])


def gloro(bound: Bound, label: jax.Array) -> jax.Array:
    """Cross-entropy over the logits and the "not robust" class of GloRo (Leino et al. 2021)."""
    return cross_entropy(gloro_logits(bound, label), label)


def trades(bound: Bound, label: jax.Array, weight=1.0) -> jax.Array:
    """``CE(logits) + weight KL(softmax(logits), softmax(gloro_logits of the predicted class))``:
    TRADES (Zhang et al. 2019) with a bound in the place of its attack, as in GloRo's code.

    Both distributions are the same up to a factor on the classes, so that the divergence is that
    factor's logarithm: minus the logarithm of what the "not robust" class leaves to the others.
    """
    extended = gloro_logits(bound, jnp.argmax(bound.logits))
    rest = jax.nn.logsumexp(bound.logits)
    return cross_entropy(bound.logits, label) + weight * jax.nn.softplus(extended[-1] - rest)


def lmt(bound: Bound, label: jax.Array) -> jax.Array:
    """Cross-entropy with ``sqrt(2) ||W|| r`` added to every rival's logit (Lipschitz-margin
    training, Tsuzuku et al. 2018).

    W is the last layer, r the penultimate radius; with mode "global" that is LMT, which knows the
    Lipschitz constant of the whole network and nothing of the pairs of classes.
    """
    operator = bound.graph.linear_nodes[-1].operator
    matrix = operator.materialized(bound.penultimate.center).kernel
    gain = math.sqrt(2) * jnp.linalg.norm(matrix, 2) * bound.penultimate.radius
    rivals = jnp.arange(bound.logits.shape[0]) != label
    return cross_entropy(bound.logits + jnp.where(rivals, gain, 0.0), label)


def emma(bound: Bound, label: jax.Array) -> jax.Array:
    """Cross-entropy on rivals raised only as far as to the label's logit (EMMA: Hu et al., NeurIPS
    2023).

    Each rival's gain is multiplied by the share of the ball at which it would draw level with the
    label, in [0, 1] and held fixed: the loss works at the boundary of what is robust already, not
    beyond it.
    """
    gain = worst_logits(bound, label) - bound.logits
    ahead = bound.logits[label] - bound.logits
    share = jnp.where(gain > ahead, jnp.maximum(ahead, 0.0) / jnp.where(gain > 0, gain, 1.0), 1.0)
    return cross_entropy(bound.logits + jax.lax.stop_gradient(share) * gain, label)


def calibrated(bound: Bound, label: jax.Array, kappa, slope=4.0) -> jax.Array:
    """As `bcp`, with the worst logits in units of distance: ``slope`` of them are the epsilon that
    training ends with.

    Growing weights raise a margin and the Lipschitz constant alike, and cross-entropy sees the
    margin alone: how far beyond epsilon it pushes images depends on the size of the weights.
    Divided by the largest gain of a rival it does not. After CLL (Losch et al. 2023, arXiv
    2309.06166), which divides by the global constant: ``slope = log(1/p - 1)`` of its p.

    Args:
        kappa: as of `bcp`; the bound's epsilon is ``1 - kappa`` of the last one, as training has
            it.
    """
    worst = worst_logits(bound, label)
    gain = jnp.max(worst - bound.logits)
    scale = slope * (1 - kappa) / jnp.where(gain > 0, gain, 1.0)
    robust = cross_entropy(scale * worst, label)
    return kappa * cross_entropy(bound.logits, label) + (1 - kappa) * robust


def _in_distances(bound: Bound, label: jax.Array) -> jax.Array:
    """The logits divided by what the bound says of them: the rival that can gain most on the label
    gains ``sqrt(2)`` in a distance of 1.

    So do the logits of a network of Lipschitz constant 1 whose last layer has orthonormal rows,
    which are returned as they are. At epsilon 0, where nothing is known, the logits as they are.
    """
    gain = jnp.max(worst_logits(bound, label) - bound.logits)
    scale = math.sqrt(2) * bound.input.radius / jnp.where(gain > 0, gain, 1.0)
    return bound.logits * jnp.where(gain > 0, scale, 1.0)


def offset(bound: Bound, label: jax.Array, factor=2.0, temperature=0.25) -> jax.Array:
    """``T CE((logits - factor sqrt(2) epsilon onehot(label)) / T)`` on logits in distances.

    The loss of networks of Lipschitz constant 1 (Prach and Lampert 2022, arXiv 2208.03160; with
    this offset and this temperature Prach et al. 2024, arXiv 2311.16833). There a margin of
    ``sqrt(2) epsilon`` is what is certified, so the default factor asks for twice as much. Other
    networks' logits are divided by the bound first: the largest gain of a rival is ``sqrt(2)`` for
    a distance of 1 then, as there.

    Args:
        factor: of the offset; 1 is the margin that is certified at epsilon.
        temperature: T > 0, in units of distance: it does not grow with epsilon.
    """
    return temperature * _cross_entropy_with_offset(bound, label, factor, temperature)


def annealing(bound: Bound, label: jax.Array, factor=2.0, temperature=0.75, power=5.0) -> jax.Array:
    """``(1 - p)^power`` times `offset`, p the probability that its softmax gives the label: logit
    annealing (Lai et al. 2025, arXiv 2505.15174).

    What is far inside its class gets no more gradient, so that others get the network's capacity.
    Temperature and power are its authors'; their offset is the same for all epsilon. For networks
    of other Lipschitz constants than 1 they raise rivals as `emma` does; here logits are divided
    by the bound.

    Args:
        factor, temperature: as of `offset`.
        power: >= 0; with 0 it is `offset`.
    """
    loss = _cross_entropy_with_offset(bound, label, factor, temperature)
    return temperature * (-jnp.expm1(-loss)) ** power * loss


def _cross_entropy_with_offset(bound, label, factor, temperature) -> jax.Array:
    own = jnp.arange(bound.logits.shape[0]) == label
    asked = factor * math.sqrt(2) * bound.input.radius
    raised = _in_distances(bound, label) - jnp.where(own, asked, 0.0)
    return cross_entropy(raised / temperature, label)


def crm(bound: Bound, label: jax.Array, weight=15.0, sharpness=5.0, reach=1.4) -> jax.Array:
    """``CE(logits) + weight / t log sum exp(-t r_j)``: cross-entropy, and a soft minimum of the
    radii that is to grow (certified radius maximisation, Fazlyab et al. 2023, arXiv 2310.00116).

    ``r_j`` is the distance at which rival j draws level with the label if its gain grows linearly
    with the distance: in mode "global" it does; with local bounds the radius is right at epsilon,
    too small below and too large above. The second term is of images alone that are right and
    whose smallest radius is below ``reach`` times epsilon. The defaults are its authors' for
    CIFAR-10; for MNIST the weight is 30, and the reach is 1.4 epsilon likewise.

    Args:
        weight: of the second term.
        sharpness: t, in 1 / distance.
        reach: radii beyond so many epsilon are left alone; a rival that cannot gain counts as
            there.
    """
    rivals = jnp.arange(bound.logits.shape[0]) != label
    gain = worst_logits(bound, label) - bound.logits
    ahead = bound.logits[label] - bound.logits
    epsilon = bound.input.radius
    far = reach * epsilon
    radii = jnp.where(gain > 0, epsilon * ahead / jnp.where(gain > 0, gain, 1.0), far)
    nearest = jnp.min(radii, where=rivals, initial=jnp.inf)
    soft = jax.nn.logsumexp(-sharpness * radii, where=rivals) / sharpness
    pushed = (nearest > 0) & (nearest < far)
    return cross_entropy(bound.logits, label) + weight * jnp.where(pushed, soft, 0.0)


def sparsity(bound: Bound) -> jax.Array:
    """The hinge that pushes neurons into their constant ranges, summed over the activations; >= 0.

    It reads the boxes in front of the activations, so mode "global", whose boxes are balls, is a
    poor guide.

    Raises:
        TypeError: a network that begins with an activation.
    """
    return _over_activations(bound, lambda rule, box: rule.sparsity(*box))


def stability(bound: Bound) -> jax.Array:
    """The hinge that pushes boxes off the kinks of their activation, whichever way is shorter; >=
    0.

    Mode "linear" pays only for neurons whose box has a kink strictly inside. For each kink c in a
    box ``[l, u]`` the hinge is ``min(u - c, c - l)``; the kinks of a ReLU are 0 and its threshold,
    a pair of MaxMin has one in ``a - b`` and those of its thresholds. Mean over the neurons, summed
    over the activations; of other activations nothing is known: 0.

    Raises:
        TypeError: a network that begins with an activation.
    """
    return _over_activations(bound, lambda rule, box: rule.instability(*box))


def _over_activations(bound: Bound, hinge) -> jax.Array:
    total = jnp.zeros((), bound.logits.dtype)
    for node in bound.graph.nodes:
        if isinstance(node, Activation):
            (source,) = node.inputs
            if isinstance(bound.graph.nodes[source], Input):
                raise TypeError("the network begins with an activation: it has no box in front.")
            before = bound.regions[source]
            total += hinge(node.rule, (before.lower, before.upper))
    return total
