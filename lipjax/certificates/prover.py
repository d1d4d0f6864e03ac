"""Certificates: predictions proved not to change on an l2 ball, and estimates that monitor them,
kept apart by name.

Two tiers of proof, which differ only in how the norms are bounded from above: "probabilistic" by
`norms.chebyshev`, "deterministic" by `norms.best`. Everything else is the same for both, and
rounding is part of it twice over (`lipjax.rounding`): the bounds are computed in float64 and
rounded outwards, and what the network's own arithmetic can do to its logits anywhere in the ball is
taken off the margin.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipjax import bounds
from lipjax.certificates import batches, verdicts
from lipjax.certificates.checks import checked_images, checked_labels, example_of
from lipjax.certificates.results import (
    Certificate,
    CertifiedRadius,
    Estimate,
    StageRun,
    stored_slopes,
)
from lipjax.certificates.setup import candidates, decided, set_up, unexamined
from lipjax.certificates.stages import AUTO, DEAREST
from lipjax.norms.best import BUDGET

# certified_radius tries these shares of the radius that the estimate gives, largest first.
RADIUS_SHARES = (0.998, 0.99, 0.97, 0.94, 0.88, 0.7)


def certify(
    network: nnx.Module,
    images,
    labels,
    epsilon: float,
    *,
    tier: str = "probabilistic",
    failure_probability: float = 1e-6,
    mode: str = "local",
    arithmetic: str | None = None,
    budget: float = BUDGET,
    seed: int | None = None,
    batch_size: int = 64,
    examine: np.ndarray | None = None,
    steps: int | None = None,
    seconds_per_image: float | None = None,
) -> Certificate:
    """Proves, image by image, that no l2 change of norm <= epsilon changes a (right) prediction.

    **Guarantee**, tier "probabilistic": with probability >= 1 - failure_probability over the tool's
    own draws, *all* certificates of the call hold, whatever the weights and images, as long as
    these were chosen independently of the seed. Nobody can have known the one that is drawn by
    default. Each norm is bounded from above by `norms.chebyshev.inflated_norm_bound` with fresh
    starts; failure_probability is split evenly over layers and images
    (`split_failure_probability`). Tier "deterministic": they hold, without any probability; each
    norm is bounded by `norms.best.norm_bound`. Where nothing of a layer is masked both take the
    whole matrix's norm, bounded once a call without chance, if that is close
    (`norms.best.WholeNorm`).

    Both: the bounds are computed in float64 (on the host, where the device has none), rounded
    outwards, and hold for the real-number function of the network as well as for the network as
    executed in `arithmetic`, by the error model of `lipjax.rounding`. A certificate of one image
    does not depend on the other images, except through the split of failure_probability. Strict:
    ties, NaN and infinities are never certified.

    | case | verdict |
    |---|---|
    | wrong prediction | not certified |
    | epsilon = 0 | certified iff the prediction is right and no rival is within rounding of it |
    | a NaN, an infinity or a number above 1e100 anywhere in the walk | not certified |
    | NaN or infinite weights or pixels, pixels outside [0, 1] | error |
    | float64 images that are no float32 numbers, while JAX has 64 bits off | error |
    | an operation without a bound, a dtype that the error model does not know | error |

    Args:
        network: a function of one example or of a batch that JAX traces (`lipjax.trace`). A
            function of a batch is certified for batches of one: if it mixes its images, as
            ``X - X.mean(0)`` or a sort along axis 0, nothing is said of larger ones. A softmax at
            its end is left out, and the statement says so.
        images: ``(N, ...)`` floats in [0, 1], exact in the type in which they are executed: float64
            images only where JAX has 64 bits, or where `arithmetic` is "float64".
        labels: ``(N,)`` integers, or None: then the predictions themselves are certified.
        epsilon: l2 radius on the pixels as given, >= 0.
        tier: "probabilistic" or "deterministic".
        failure_probability: delta in (0, 1), of the whole call; of no meaning in tier
            "deterministic".
        mode: "global", "bcp", "paper", "local", "linear" or "rows", each at least as tight as the
            one before ("rows": as "local"), or "tight", at least as tight as "linear", or
            "tight_rows", as "local"; what they cost says `bound`. "auto": each image by the
            cheapest that decides it, "local", then "tight", then gradient steps, and with
            `seconds_per_image` at last "tight_rows"; the certificate says "tight", since what
            "local" decides, "tight" does, or "tight_rows" if that has certified an image. How many
            each stage has: its `stages`.
        arithmetic: a name in `rounding.ARITHMETICS`: how the network will be executed. None: as
            this process's device executes it (`rounding.arithmetics_of`), e.g. float32 on a CPU,
            TF32 on a GPU at default precision.
        budget: floating-point operations, per norm and image, that tier "deterministic" may spend
            on a masked convolution; where `norms.banded.masked_convolution_cost` is above it the
            convolution's global norm is used.
        seed: of the draws, 0 .. 2^63 - 1. None: drawn from the operating system, and recorded. One
            that is given makes the call repeatable, and adds an assumption that the certificate
            states: whoever made the network and the images did not know the seed. A network can be
            made against a known one, so that its certificates are false.
        batch_size: images at once; no influence on the result.
        examine: boolean ``(N,)``, or None for all: the images to decide. The others are reported as
            not certified, with margin -inf, constant and stable 0 and allowance, lipschitz and
            norms inf: nothing is claimed. To save time on images that an attack has broken or that
            are misclassified; the verdicts of the rest are the same.
        steps: modes "tight", "tight_rows" and "auto": at most so many gradient steps on the slopes
            of the rivals that are left undecided, of images that are right; each costs about as
            much as three bounds of mode "tight". None: `stages.AUTO_STEPS` in mode "auto", else 0.
        seconds_per_image: mode "auto": the seconds that may have gone into an image for another
            stage to begin; infinity: all stages, None: all but "tight_rows". Of the images of a
            batch that are still undecided it counts what the stages before have taken, and what
            the next is expected to take, by the reverse passes that it makes; compiling is not
            counted. A stage that has begun ends on all of them. So a finite budget makes it depend
            on the machine, its load and batch_size *which stages were run*, and what is certified;
            the verdicts of a stage do not, and each is a proof. In tier "probabilistic" the norms
            of "tight_rows" are drawn anew, and failure_probability is split over both, run or not.

    Raises:
        TypeError, ValueError: as the table and `bound` say, naming the value.
    """
    bounds.check_epsilon(epsilon)
    setup = set_up(
        network,
        images,
        labels,
        tier=tier,
        failure_probability=failure_probability,
        mode=mode,
        arithmetic=arithmetic,
        budget=budget,
        seed=seed,
        batch_size=batch_size,
        examine=examine,
        steps=steps,
        seconds_per_image=seconds_per_image,
    )
    rows = setup.examined
    radii = np.full(len(rows), float(epsilon))
    slopes: dict[tuple[int, int], np.ndarray] = {}
    stages: tuple[StageRun, ...] = ()
    if len(rows) == len(setup.images):
        found, slopes, stages = decided(setup, rows, radii)
    else:
        found = unexamined(setup)
        if len(rows):
            examined, slopes, stages = decided(setup, rows, radii)
            for name, column in found.items():
                column[rows] = examined[name]
    certified = found.pop("ok")
    if mode == AUTO:
        dearest = any(run.name == DEAREST and len(run.certified) for run in stages)
        mode = DEAREST if dearest else "tight"
    return Certificate(
        certified=certified,
        epsilon=float(epsilon),
        mode=mode,
        stages=stages,
        **stored_slopes(slopes),
        **setup.facts,
        **found,
    )


def certified_radius(
    network: nnx.Module,
    images,
    labels,
    *,
    tier: str = "probabilistic",
    failure_probability: float = 1e-6,
    mode: str = "local",
    arithmetic: str | None = None,
    budget: float = BUDGET,
    seed: int | None = None,
    max_radius: float = 4.0,
    batch_size: int = 64,
    examine: np.ndarray | None = None,
) -> CertifiedRadius:
    """A certified radius per image: estimates propose a candidate, a certificate decides.

    Guarantee and arguments as in `certify`; failure_probability covers all attempts (at most
    ``len(RADIUS_SHARES)`` an image). The radius is a lower bound of the largest certifiable one, by
    1 % to a few % below it.

    Args:
        mode: as in `certify`, but for "auto", which decides at one epsilon.
        max_radius: no radius above it is looked for.
        examine: as in `certify`; the radius of the others is 0.

    Raises:
        TypeError, ValueError: as `certify`; mode "auto"; max_radius not positive and finite.
    """
    if mode == AUTO:
        raise ValueError('mode "auto" decides at one epsilon: for radii give mode="tight".')
    if not (max_radius > 0 and math.isfinite(max_radius)):
        raise ValueError(f"max_radius must be positive and finite, got {max_radius}.")
    setup = set_up(
        network,
        images,
        labels,
        tier=tier,
        failure_probability=failure_probability,
        mode=mode,
        arithmetic=arithmetic,
        budget=budget,
        seed=seed,
        batch_size=batch_size,
        examine=examine,
        attempts=len(RADIUS_SHARES),
    )
    nothing = unexamined(setup)
    candidate = np.zeros(len(setup.images))
    if len(setup.examined):
        candidate[setup.examined] = candidates(setup, setup.examined, max_radius)
    candidate = np.where(nothing["correct"], candidate, 0)

    kept = {name: nothing[name] for name in ("margin", "allowance", "lipschitz", "norms")}
    kept["radius"] = np.zeros(len(candidate))
    for attempt, portion in enumerate(RADIUS_SHARES):
        rows = np.flatnonzero((candidate > 0) & (kept["radius"] == 0))
        if not len(rows):
            break
        trial = candidate[rows] * portion
        found, *_ = decided(setup, rows, trial, attempt)
        found["radius"] = trial
        for name, column in kept.items():
            column[rows[found["ok"]]] = found[name][found["ok"]]
    return CertifiedRadius(
        predicted=nothing["predicted"],
        correct=nothing["correct"],
        mode=mode,
        **setup.facts,
        **kept,
    )


def estimate(
    network: nnx.Module,
    images,
    labels,
    epsilon: float,
    *,
    mode: str = "local",
    iterations: int = 20,
    batch_size=256,
) -> Estimate:
    """Monitors robustness with power-iteration estimates. **Not a certificate.**

    Their starts are the starts of `bound` without a key, which refuses to be trained with them.

    Arguments and errors as in `certify`; works at the default precision and in float32, for use
    during training.
    """
    images = checked_images(images)
    graph = bounds.graph_of(network, example_of(images, None))
    labels = checked_labels(graph, images, labels)
    bounds.check_epsilon(epsilon)
    options = {"mode": mode, "iterations": iterations}
    compiled = batches.compiled(
        verdicts.estimate_batch, *options, optimize=images.size > batches.FEW_PIXELS
    )
    run = functools.partial(compiled, (graph, jnp.float32(epsilon)), **options)
    out = batches.batched(run, min(batch_size, len(images)), images.astype(np.float32), labels)
    ok = out.pop("ok")
    del out["allowance"]
    return Estimate(likely_robust=ok, epsilon=float(epsilon), mode=mode, **out)
