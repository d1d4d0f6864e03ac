"""What `certify`, `certified_radius` and `estimate` return."""

import dataclasses
from typing import Any

import numpy as np

from lipjax.formats import certificate_files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proof:
    """What every proof says that it rests on.

    Attributes:
        mode: of the bound, as given.
        tier, failure_probability, seed: in tier "deterministic" failure_probability is 0 and the
            seed has no influence on what is proved.
        seed_from: "system", drawn from the operating system for this call; "given" by the caller:
            then the proof assumes that network and inputs were chosen independently of it; "unused"
            (seed 0) in tier "deterministic", where none was given.
        arithmetic: of the network as executed, the least precise of its layers; a name in
            `rounding.ARITHMETICS`.
        backend: "cpu" where there are smooth activations: how XLA rounds them was measured on CPUs,
            and the proof is about an execution there; else "".
    """

    mode: str
    tier: str
    failure_probability: float
    seed: int
    seed_from: str
    arithmetic: str
    backend: str = ""


def said(certificate: Proof) -> str:
    """The tier of a proof, and what it rests on, in words."""
    executed = f"as executed in {certificate.arithmetic}"
    if certificate.backend:
        executed += " on a CPU, by XLA"
    if certificate.tier == "deterministic":
        return f"proved, tier deterministic, {executed}"
    return (
        f"proved, tier probabilistic, all together but for a probability of "
        f"{certificate.failure_probability:g}, {executed}"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Verdicts(Proof):
    """The fields that `Certificate`, which explains them, and `CertifiedRadius` share."""

    predicted: np.ndarray
    correct: np.ndarray
    margin: np.ndarray
    allowance: np.ndarray
    lipschitz: np.ndarray
    norms: np.ndarray
    precision: str
    left_out: str = ""

    def save(self, path, network, images, labels, **about: Any) -> None:
        """Writes the certificate file, as `lipjax.formats.certificate_files.save`."""
        certificate_files.save(path, self, network, images, labels, **about)

    def _shown(self, what: str) -> str:
        """Two lines: what was found, and what it rests on."""
        right = f"{int(np.sum(self.correct))} of {len(self.correct)} images predicted right"
        return f"{type(self).__name__}({right}, {what}, mode {self.mode}:\n  {self._basis()})"

    def _basis(self) -> str:
        """The tier and what it rests on, the seed of its draws included."""
        drawn = "" if self.tier == "deterministic" else f", seed {self.seed} ({self.seed_from})"
        logits = f", about the logits in front of the {self.left_out}" if self.left_out else ""
        return said(self) + drawn + logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRun:
    """What one stage of mode "auto", or of gradient steps, came to.

    Attributes:
        name: "local", "tight", "steps" or "tight_rows".
        passes: rows that it carries back through the network for an image, at most; a gradient
            counts as two (`certificates.stages`).
        images, certified: positions of those that it was tried on, and that it certified.
        seconds: of all these images together, on this machine, without compiling.
    """

    name: str
    passes: int
    images: np.ndarray
    certified: np.ndarray
    seconds: float

    def counted(self) -> dict[str, Any]:
        """Its fields as plain numbers: how many images, in the place of their positions."""
        return {
            "name": self.name,
            "passes": self.passes,
            "images": len(self.images),
            "certified": len(self.certified),
            "seconds": self.seconds,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate(_Verdicts):
    """Per-example verdicts of one call of `certify`, NumPy arrays of shape ``(N,)`` unless said.

    `certified[i]` is True only if the prediction is right (equals the label that was given) and
    *every* image within l2 distance `epsilon` of image i has that same prediction: by the
    real-number function of the network, and by the network as executed in `arithmetic`. All
    statements of one certificate hold together (`statement`).

    Of images that were not examined (`certify`) nothing is claimed: margin is -inf, and allowance,
    lipschitz and norms are inf.

    Attributes:
        certified: the verdict.
        predicted: class of the largest logit, computed in float64.
        correct: ``predicted == label``.
        margin: label's logit minus the largest worst-case rival, all rounding taken off; certified
            needs it > 0.
        allowance: what the rounding of the network as executed has taken off the margin.
        lipschitz: product of the norm bounds (of a Residual, 1 + that of its layers), from the
            input to the penultimate activation.
        norms: ``(N, affine layers - 1)``, the norm bounds.
        constant: ``(N, activations)``, share of neurons that are constant on the ball; zeros in
            mode "global".
        stable: ``(N, activations)``, share of neurons that vary, but are one and the same input on
            the whole ball (`activations.Rule.stable`): no kink, no threshold, no change of order.
            As `constant` it rests on the norms.
        epsilon: as given.
        precision: of the bounds' own computation.
        left_out: "softmax" where the network ends in one: what is proved is about the logits in
            front of it, whose order it keeps; else "".
        mode, tier, failure_probability, seed, seed_from, arithmetic, backend: as of a `Proof`.
        slopes_of: ``(n, 2)``, image and rival class of each row of `slopes`.
        slopes: ``(n, slopes)``, int8 (`bounds.tight.flattened`): the slopes that verdicts of mode
            "tight" rest on where gradient steps found them.
        stages: what each stage came to, the cheapest first, where there were several; not part of
            a file.
    """

    certified: np.ndarray
    constant: np.ndarray
    stable: np.ndarray
    epsilon: float
    slopes_of: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 2), np.int32))
    slopes: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.int8))
    stages: tuple[StageRun, ...] = ()

    def __repr__(self) -> str:
        return self._shown(f"{int(np.sum(self.certified))} certified at epsilon {self.epsilon:g}")

    def summary(self) -> str:
        """A table, row by row: what the images came to, and averages of the bounds."""
        count = len(self.correct)
        examined = np.isfinite(self.lipschitz)
        rows = {
            "images": str(count),
            "predicted right": _share(self.correct),
            f"certified at epsilon {self.epsilon:g}": _share(self.certified),
            "bounded by mode": self.mode,
            **({"certified by stage": self.by_stage} if self.stages else {}),
            "Lipschitz bound, median": _median(self.lipschitz[examined]),
            "margin of what is right, median": _median(self.margin[examined & self.correct]),
            "taken off for rounding, at most": f"{np.max(self.allowance[examined], initial=0):.2g}",
            "neurons constant on the ball": _percents(self.constant[examined]),
            "neurons stable on the ball": _percents(self.stable[examined]),
            "tier": self._basis(),
        }
        wide = max(map(len, rows))
        return "\n".join(f"{name:{wide}}  {value}" for name, value in rows.items())

    @property
    def by_stage(self) -> str:
        """How many images each stage has certified, of those that it was tried on."""
        return ", ".join(
            f"{run.name} {len(run.certified)} of {len(run.images)}" for run in self.stages
        )

    @property
    def statement(self) -> str:
        """What is proved, in words."""
        return certificate_files.statement(vars(self))

    def report(self, path, network=None, images=None, labels=None, **about: Any) -> None:
        """Writes the certificate as a page for people, as `lipjax.report.write`."""
        # Here, since the page stands above what it is about, and only this call needs it.
        from lipjax import report

        report.write(path, self, network, images, labels, **about)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertifiedRadius(_Verdicts):
    """Per-example radii of one call of `certified_radius`, NumPy arrays ``(N,)`` unless said.

    A `Certificate` in which each image has its own epsilon, `radius[i]`; all of them hold together,
    and `certificate_files.save` takes it. `radius[i]` is 0 where nothing was certified (a wrong
    prediction, or an open region that the tool cannot prove); there margin is -inf, and allowance,
    lipschitz and norms are inf: nothing is claimed.
    """

    radius: np.ndarray

    @property
    def certified(self) -> np.ndarray:
        """``radius > 0``."""
        return self.radius > 0

    def __repr__(self) -> str:
        some = self.radius[self.radius > 0]
        return self._shown(f"{len(some)} with a certified radius, median {_median(some)}")

    def report(self, path, network=None, images=None, labels=None, **about: Any) -> None:
        """Writes the radii as a page for people, as `lipjax.report.write`, at an `epsilon` that is
        named: what has a radius of at least that is certified there."""
        from lipjax import report  # as in `Certificate`

        report.write(path, self, network, images, labels, **about)

    @property
    def epsilon(self) -> np.ndarray:
        """Each image's own: `radius`."""
        return self.radius

    @property
    def statement(self) -> str:
        """What is proved, in words."""
        return certificate_files.statement({**vars(self), "epsilon": None})


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What `estimate` found: as `Certificate`, but `likely_robust` proves nothing.

    Its norms are lower bounds.
    """

    predicted: np.ndarray
    correct: np.ndarray
    likely_robust: np.ndarray
    margin: np.ndarray
    lipschitz: np.ndarray
    norms: np.ndarray
    constant: np.ndarray
    stable: np.ndarray
    epsilon: float
    mode: str
    tier: str = "estimate"


def _share(mask: np.ndarray) -> str:
    count = len(mask)
    return f"{int(np.sum(mask))} of {count}" + (f" ({np.mean(mask):.1%})" if count else "")


def _median(values: np.ndarray) -> str:
    return f"{np.median(values):.4g}" if len(values) else "none"


def _percents(shares: np.ndarray) -> str:
    """Of each activation, averaged over the images."""
    if not shares.size:
        return "none"
    return "  ".join(f"{share:.0%}" for share in np.mean(shares, axis=0))


def stored_slopes(slopes: dict[tuple[int, int], np.ndarray]) -> dict[str, Any]:
    """As the fields of a `Certificate`, in order of image and rival."""
    if not slopes:
        return {}
    order = sorted(slopes)
    return {
        "slopes_of": np.array(order, np.int32),
        "slopes": np.stack([slopes[place] for place in order]),
    }
