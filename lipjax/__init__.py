"""Local Lipschitz bounds for JAX: train and certify networks whose predictions provably do not
change in an l2 ball."""

from lipjax import (
    activations,
    attacks,
    bounds,
    bridges,
    certificates,
    formats,
    graph,
    layers,
    losses,
    models,
    norms,
    orthogonal,
    pretrained,
    rounding,
    runtime,
    storage,
)
from lipjax.activations import ClippedMaxMin, ClippedReLU, MaxMin, ReLU
from lipjax.bounds import Bound, Region, bound, initial_vectors, worst_logits
from lipjax.certificates import (
    Certificate,
    CertifiedRadius,
    Estimate,
    certified_radius,
    certify,
    estimate,
)
from lipjax.graph import Graph, TraceError, trace
from lipjax.layers import AveragePool, Flatten, Normalize, Residual
from lipjax.orthogonal import AOLConv, CayleyLinear
from lipjax.pretrained import load
from lipjax.runtime.cpu import for_cpu
from lipjax.storage import save

__version__ = "0.2.0"

__all__ = [
    "AOLConv",
    "AveragePool",
    "Bound",
    "CayleyLinear",
    "Certificate",
    "CertifiedRadius",
    "ClippedMaxMin",
    "ClippedReLU",
    "Estimate",
    "Flatten",
    "Graph",
    "MaxMin",
    "Normalize",
    "ReLU",
    "Region",
    "Residual",
    "TraceError",
    "activations",
    "attacks",
    "bound",
    "bounds",
    "bridges",
    "certificates",
    "certified_radius",
    "certify",
    "estimate",
    "for_cpu",
    "formats",
    "graph",
    "initial_vectors",
    "layers",
    "load",
    "losses",
    "models",
    "norms",
    "orthogonal",
    "pretrained",
    "rounding",
    "runtime",
    "save",
    "storage",
    "trace",
    "worst_logits",
]
