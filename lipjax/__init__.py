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
from lipjax.bounds import (
    Bound,
    LipschitzEstimate,
    Region,
    bound,
    initial_vectors,
    local_lipschitz,
    worst_logits,
)
from lipjax.certificates import (
    Certificate,
    CertifiedRadius,
    Estimate,
    LipschitzCertificate,
    RangeCertificate,
    certified_radius,
    certify,
    certify_lipschitz,
    certify_range,
    estimate,
)
from lipjax.graph import Graph, TraceError, trace
from lipjax.layers import AveragePool, Flatten, Normalize, Residual, Shift, SpaceToDepth
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
    "LipschitzCertificate",
    "LipschitzEstimate",
    "MaxMin",
    "Normalize",
    "RangeCertificate",
    "ReLU",
    "Region",
    "Residual",
    "Shift",
    "SpaceToDepth",
    "TraceError",
    "activations",
    "attacks",
    "bound",
    "bounds",
    "bridges",
    "certificates",
    "certified_radius",
    "certify",
    "certify_lipschitz",
    "certify_range",
    "estimate",
    "for_cpu",
    "formats",
    "graph",
    "initial_vectors",
    "layers",
    "load",
    "local_lipschitz",
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
