"""Bounds of one example on a ball: regions, relaxations, margins, `bound`."""

from lipjax.bounds.estimate import PRODUCTS, bound, graph_of, initial_vectors, vector_shapes
from lipjax.bounds.lipschitz import LipschitzEstimate, local_lipschitz
from lipjax.bounds.margins import ascent, margin, worst_logits
from lipjax.bounds.modes import CONTROLS, MODES, Mode, mode_of
from lipjax.bounds.regions import Bound, Region, check_epsilon
from lipjax.bounds.walk import Walk, joined_sizes, joints

__all__ = [
    "CONTROLS",
    "MODES",
    "PRODUCTS",
    "Bound",
    "LipschitzEstimate",
    "Mode",
    "Region",
    "Walk",
    "ascent",
    "bound",
    "check_epsilon",
    "graph_of",
    "initial_vectors",
    "joined_sizes",
    "joints",
    "local_lipschitz",
    "margin",
    "mode_of",
    "vector_shapes",
    "worst_logits",
]
