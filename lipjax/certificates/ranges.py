"""Proved intervals of a function's outputs on a region: a regression that stays within a
tolerance, a state that stays within its limits."""

import dataclasses
from collections.abc import Callable

import numpy as np

from lipjax.bounds import lipschitz
from lipjax.certificates.lipschitz import RegionProof
from lipjax.certificates.results import Proof, said
from lipjax.norms.best import BUDGET


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class RangeCertificate(Proof):
    """What is proved of each of N regions. NumPy arrays; all statements of one hold together.

    For every point a of region n ``lower[n, i] <= f_i(a) <= upper[n, i]``: of the real-number
    function, and of f as executed in `arithmetic`, by the error model of `lipjax.rounding`. Where
    nothing could be proved the ends are infinite.

    Attributes:
        lower, upper: ``(N, outputs)``.
        rounding: ``(N, outputs)``, what of it the execution can round, on either side.
    """

    lower: np.ndarray
    upper: np.ndarray
    rounding: np.ndarray

    def __repr__(self) -> str:
        count, outputs = self.lower.shape
        width = np.max(self.upper - self.lower)
        return (
            f"RangeCertificate({said(self)}; {count} regions, {outputs} outputs, mode {self.mode}:"
            f"\n  values in [{self.lower.min():.4g}, {self.upper.max():.4g}], intervals at most "
            f"{width:.4g} wide)"
        )


def certify_range(
    f: Callable,
    x,
    epsilon=None,
    *,
    box=None,
    tier: str = "probabilistic",
    failure_probability: float = 1e-6,
    mode: str = "linear",
    arithmetic: str | None = None,
    budget: float = BUDGET,
    seed: int | None = None,
    batch_size: int = 256,
) -> RangeCertificate:
    """Proves, region by region, which values each output can take.

    **Guarantee**: that of `RangeCertificate`, by tier as in `certify_lipschitz`. Arguments and
    errors as there.
    """
    lipschitz.check_options("linf", mode)
    proof = RegionProof(
        f, x, epsilon, box, tier, failure_probability, mode, arithmetic, budget, seed
    )
    out = proof.run(batch_size)
    return RangeCertificate(
        lower=np.nextafter(out["lower"] - out["executed"], -np.inf),
        upper=np.nextafter(out["upper"] + out["executed"], np.inf),
        rounding=out["executed"],
        **proof.facts,
    )
