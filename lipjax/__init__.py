"""Local Lipschitz bounds for JAX: train and certify networks whose predictions provably do not change in an l2 ball."""

from lipjax import (
    activations,
    attacks,
    bridges,
    certificate_files,
    deterministic,
    folding,
    losses,
    lowering,
    margins,
    models,
    onnx_export,
    operators,
    orthogonal,
    pretrained,
    regions,
    rounding,
    spectral,
    storage,
    torch_files,
)
from lipjax.activations import ClippedMaxMin, ClippedReLU, MaxMin, ReLU
from lipjax.certificates import Certificate, CertifiedRadius, Estimate, certified_radius, certify, estimate
from lipjax.lowering import for_cpu
from lipjax.margins import worst_logits
from lipjax.operators import AveragePool, Flatten, LinearOperator, Normalize, Residual, linear_operator
from lipjax.orthogonal import AOLConv, CayleyLinear
from lipjax.pretrained import load
from lipjax.regions import Bound, Region, bound, initial_vectors
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
    "LinearOperator",
    "MaxMin",
    "Normalize",
    "ReLU",
    "Region",
    "Residual",
    "activations",
    "attacks",
    "bound",
    "bridges",
    "certificate_files",
    "certified_radius",
    "certify",
    "deterministic",
    "estimate",
    "folding",
    "for_cpu",
    "initial_vectors",
    "linear_operator",
    "load",
    "losses",
    "lowering",
    "margins",
    "models",
    "onnx_export",
    "operators",
    "orthogonal",
    "pretrained",
    "regions",
    "rounding",
    "save",
    "spectral",
    "storage",
    "torch_files",
    "worst_logits",
]
