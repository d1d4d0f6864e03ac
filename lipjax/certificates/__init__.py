"""Certificates: what is proved of a function around an image, and the tier of the proof."""

from lipjax.certificates.checks import TIERS
from lipjax.certificates.lipschitz import LipschitzCertificate, certify_lipschitz
from lipjax.certificates.prover import certified_radius, certify, estimate
from lipjax.certificates.randomness import drawn_seed, split_failure_probability
from lipjax.certificates.ranges import RangeCertificate, certify_range
from lipjax.certificates.results import Certificate, CertifiedRadius, Estimate

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
