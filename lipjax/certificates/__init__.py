"""Certificates: what is proved of a function around an image, and the tier of the proof."""

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

__all__ = [
    "TIERS",
    "Certificate",
    "CertifiedRadius",
    "Estimate",
    "certified_radius",
    "certify",
    "drawn_seed",
    "estimate",
    "split_failure_probability",
]
