"""Certificates: what is proved of a function around an image, and the tier of the proof."""

from lipjax.certificates.lipschitz import LipschitzCertificate, certify_lipschitz
from lipjax.certificates.prover import (
    TIERS,
    Certificate,
    CertifiedRadius,
    Estimate,
    certified_radius,
    certify,
    drawn_seed,
    estimate,
    split_failure_probability,
)
from lipjax.certificates.ranges import RangeCertificate, certify_range

__all__ = [
    "TIERS",
    "Certificate",
    "CertifiedRadius",
    "Estimate",
    "LipschitzCertificate",
    "RangeCertificate",
    "certified_radius",
    "certify",
    "certify_lipschitz",
    "certify_range",
    "drawn_seed",
    "estimate",
    "split_failure_probability",
]
