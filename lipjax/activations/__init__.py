"""Activations: one file a kind, with the function, the module and everything that is known of
it."""

import jax.numpy as jnp
from flax import nnx

from lipjax.activations.absolute import Absolute, AbsoluteValue
from lipjax.activations.base import Relaxation, Rule, register, rule, varies
from lipjax.activations.clip import Clip, ClippedReLU, ReLU, clipped_relu
from lipjax.activations.groupsort import GroupSort, Sort, groupsort
from lipjax.activations.leaky import Leaky
from lipjax.activations.maxmin import ClippedMaxMin, MaxMin, Pairs, clipped_maxmin, maxmin
from lipjax.activations.pieces import Pieces
from lipjax.activations.pooling import MaxPool
from lipjax.activations.smooth import Elu, Smooth
from lipjax.activations.softmax import Softmax

__all__ = [
    "Absolute",
    "AbsoluteValue",
    "Clip",
    "ClippedMaxMin",
    "ClippedReLU",
    "Elu",
    "GroupSort",
    "Leaky",
    "MaxMin",
    "MaxPool",
    "Pairs",
    "Pieces",
    "ReLU",
    "Relaxation",
    "Rule",
    "Smooth",
    "Softmax",
    "Sort",
    "clipped_maxmin",
    "clipped_relu",
    "groupsort",
    "maxmin",
    "project",
    "register",
    "rule",
    "varies",
]


def project(network: nnx.Module) -> nnx.Module:
    """A copy of the network with every ClippedReLU threshold projected to >= 0.

    Apply it after each optimizer step.
    """
    graph, state = nnx.split(network)
    network = nnx.merge(graph, state)
    for _, module in nnx.iter_graph(network):
        if type(module) is ClippedReLU:
            module.threshold[...] = jnp.maximum(module.threshold[...], 0)
    return network
