"""Certificates: predictions proved not to change on an l2 ball, and estimates that monitor them,
kept apart by name.

Two tiers of proof, which differ only in how the norms are bounded from above: "probabilistic" by
`spectral.probabilistic_norm_bound`, "deterministic" by `deterministic.norm_bound`. Everything else
is the same for both, and rounding is part of it twice over (`lipjax.rounding`): the bounds are
computed in float64 and rounded outwards, and what the network's own arithmetic can do to its logits
anywhere in the ball is taken off the margin.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import operator
import secrets
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipjax import bounds, rounding
from lipjax.formats import certificate_files
from lipjax.graph import Activation, Graph
from lipjax.graph.joining import rejoined
from lipjax.norms import deterministic, power
from lipjax.runtime import cpu

TIERS = ("probabilistic", "deterministic")
# Inflation of each norm that the probabilistic bound aims at, and the part of it by which the scale
# is raised.
INFLATION = 0.01
SCALE_SLACK = 0.002
RADIUS_ITERATIONS = 15
# Of a seed: what JAX takes as one integer, where it has 64 bits.
SEED_BITS = 63
# Entries up to which a layer's matrix is written out (float64: 16 MB).
SMALL_MATRIX = 2**21
# Pixels in all images up to which compiling without LLVM's optimizer is the quicker way (two CPU
# cores: 1500 digits or 130 MNIST images).
FEW_PIXELS = 100_000
# certified_radius tries these shares of the radius that the estimate gives, largest first.
RADIUS_SHARES = (0.998, 0.99, 0.97, 0.94, 0.88, 0.7)


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Per-example verdicts of one call of `certify`, NumPy arrays of shape ``(N,)`` unless said.

    `certified[i]` is True only if the prediction is right (equals the label that was given) and
    *every* image within l2 distance `epsilon` of image i has that same prediction: by the
    real-number function of the network, and by the network as executed in `arithmetic`. All
    statements of one certificate hold together (`statement`).

    Of images that were not examined (`certify`) nothing is claimed: margin is -inf, and allowance,
    lipschitz and norms are inf.

    Attributes:
        predicted: class of the largest logit, computed in float64.
        correct: ``predicted == label``.
        certified: the verdict.
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
        epsilon, mode, tier, failure_probability, seed: what the verdicts are for and rest on. In
            tier "deterministic" failure_probability is 0 and the seed has no influence on what is
            proved.
        seed_from: "system", drawn from the operating system for this call; "given" by the caller:
            then the proof assumes that network and images were chosen independently of it; "unused"
            (seed 0) in tier "deterministic", where none was given.
        precision: of the bounds' own computation.
        arithmetic: of the network as executed, the least precise of its layers; a name in
            `rounding.ARITHMETICS`.
    """

    predicted: np.ndarray
    correct: np.ndarray
    certified: np.ndarray
    margin: np.ndarray
    allowance: np.ndarray
    lipschitz: np.ndarray
    norms: np.ndarray
    constant: np.ndarray
    stable: np.ndarray
    epsilon: float
    mode: str
    tier: str
    failure_probability: float
    seed: int
    seed_from: str
    precision: str
    arithmetic: str

    @property
    def statement(self) -> str:
        """What is proved, in words."""
        return certificate_files.statement(vars(self))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What `estimate` found: as `Certificate`, but `likely_robust` proves nothing: its norms are
    lower bounds."""

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


@dataclasses.dataclass(frozen=True)
class CertifiedRadius:
    """Per-example radii of one call of `certified_radius`, NumPy arrays of shape ``(N,)`` unless
    said.

    A `Certificate` in which each image has its own epsilon, `radius[i]`; all of them hold together,
    and `certificate_files.save` takes it. `radius[i]` is 0 where nothing was certified (a wrong
    prediction, or an open region that the tool cannot prove); there margin is -inf, and allowance,
    lipschitz and norms are inf: nothing is claimed.
    """

    predicted: np.ndarray
    correct: np.ndarray
    radius: np.ndarray
    margin: np.ndarray
    allowance: np.ndarray
    lipschitz: np.ndarray
    norms: np.ndarray
    mode: str
    tier: str
    failure_probability: float
    seed: int
    seed_from: str
    precision: str
    arithmetic: str

    @property
    def certified(self) -> np.ndarray:
        """``radius > 0``."""
        return self.radius > 0

    @property
    def epsilon(self) -> np.ndarray:
        """Each image's own: `radius`."""
        return self.radius

    @property
    def statement(self) -> str:
        """What is proved, in words."""
        return certificate_files.statement({**vars(self), "epsilon": None})


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
    """Monitors robustness with power-iteration estimates from fixed fresh starts. **Not a
    certificate.**

    They are the starts of `bound` without a key, which refuses to be trained with them.

    Arguments and errors as in `certify`; works at the default precision and in float32, for use
    during training.
    """
    images = _check_images(images)
    graph = bounds.graph_of(network, _example(images, None))
    labels = _check_labels(graph, images, labels)
    bounds.check_epsilon(epsilon)
    options = {"mode": mode, "iterations": iterations}
    compiled = _compiled(_estimate_batch, *options, optimize=images.size > FEW_PIXELS)
    run = functools.partial(compiled, (graph, jnp.float32(epsilon)), **options)
    out = _batched(run, min(batch_size, len(images)), images.astype(np.float32), labels)
    ok = out.pop("ok")
    del out["allowance"]
    return Estimate(likely_robust=ok, epsilon=float(epsilon), mode=mode, **out)


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
    budget: float = deterministic.BUDGET,
    seed: int | None = None,
    batch_size: int = 64,
    examine: np.ndarray | None = None,
) -> Certificate:
    """Proves, image by image, that no l2 perturbation of norm <= epsilon changes the network's
    (right) prediction.

    **Guarantee**, tier "probabilistic": with probability >= 1 - failure_probability over the tool's
    own draws, *all* certificates of the call hold, whatever the weights and images, as long as
    these were chosen independently of the seed. Nobody can have known the one that is drawn by
    default. Each norm is bounded from above by `spectral.probabilistic_norm_bound` with fresh
    starts; failure_probability is split evenly over layers and images
    (`split_failure_probability`), and the number of steps follows from it, the layer's size and the
    wanted `INFLATION`. Tier "deterministic": they hold, without any probability; each norm is
    bounded by `deterministic.norm_bound`.

    Both: the bounds are computed in float64 (on the host, where the device has none), rounded
    outwards, and hold for the real-number function of the network as well as for the network as
    executed in `arithmetic`, by the error model of `lipjax.rounding`. A certificate of one image
    does not depend on the other images, except through the split of
    failure_probability. Strict: ties, NaN and infinities are never certified.

    | case | verdict |
    |---|---|
    | wrong prediction | not certified |
    | epsilon = 0 | certified iff the prediction is right and no rival is within rounding of it |
    | a NaN, an infinity or a number above 1e100 anywhere in the walk | not certified |
    | NaN or infinite weights or pixels, pixels outside [0, 1], an operation without a bound | error
    |
    | a dtype that the error model does not know; a layer of `lipjax.orthogonal` (certify its
    `plain`) | error |

    Args:
        network: an nnx.Sequential of registered layers.
        images: ``(N, ...)`` floats in [0, 1].
        labels: ``(N,)`` integers, or None: then the predictions themselves are certified.
        epsilon: l2 radius on the pixels as given, >= 0.
        tier: "probabilistic" or "deterministic".
        failure_probability: delta in (0, 1), of the whole call; of no meaning in tier
            "deterministic".
        mode: "global", "bcp", "paper", "local", "linear" or "rows", each at least as tight as the
            one before ("rows": as "local"); what they cost says `bound`.
        arithmetic: a name in `rounding.ARITHMETICS`: how the network will be executed. None: as
            this process's device executes it (`rounding.arithmetics_of`), e.g. float32 on a CPU,
            TF32 on a GPU at default precision.
        budget: floating-point operations, per norm and image, that tier "deterministic" may spend
            on a masked convolution; where `deterministic.masked_convolution_cost` is above it the
            convolution's global norm is used.
        seed: of the draws, 0 .. 2^63 - 1. None: drawn from the operating system, and recorded. One
            that is given makes the call repeatable, and adds an assumption that the certificate
            states: whoever made the network and the images did not know the seed. A network can be
                made against
            a known one, so that its certificates are false.
        batch_size: images at once; no influence on the result.
        examine: boolean ``(N,)``, or None for all: the images to decide. The others are reported as
            not certified, with margin -inf, constant and stable 0 and allowance, lipschitz and
            norms inf: nothing is claimed. To save time on images that an attack has broken or that
                are misclassified; the verdicts of the rest are the same.

    Raises:
        TypeError, ValueError: as the table and `bound` say, naming the value.
    """
    bounds.check_epsilon(epsilon)
    images = _check_images(images)
    graph = _certifiable(network, images, tier, failure_probability, arithmetic)
    with _as_executed(arithmetic):
        labels = _check_labels(graph, images, labels)
    rows = _examined(examine, len(images))
    with _Prover(
        graph, images, tier, failure_probability, mode, arithmetic, budget, seed, batch_size
    ) as prover:
        if len(rows) == len(images):
            out = prover.verdicts(images, labels, np.full(len(images), float(epsilon)))
        else:
            out = prover.nothing(images, labels)
            if len(rows):
                found = prover.verdicts(
                    images[rows], labels[rows], np.full(len(rows), float(epsilon)), rows
                )
                for name, column in out.items():
                    column[rows] = found[name]
    return Certificate(
        certified=out.pop("ok"), epsilon=float(epsilon), mode=mode, **prover.facts, **out
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
    budget: float = deterministic.BUDGET,
    seed: int | None = None,
    max_radius: float = 4.0,
    batch_size: int = 64,
    examine: np.ndarray | None = None,
) -> CertifiedRadius:
    """A certified radius per image: bisection on estimates finds a candidate, a certificate at the
    tier decides.

    Guarantee and arguments as in `certify`; failure_probability covers all attempts (at most
    ``len(RADIUS_SHARES)`` an image). The radius is a lower bound of the largest certifiable one, by
    1 % to a few % below it.

    Args:
        max_radius: no radius above it is looked for.
        examine: as in `certify`; the radius of the others is 0.
    """
    if not (max_radius > 0 and math.isfinite(max_radius)):
        raise ValueError(f"max_radius must be positive and finite, got {max_radius}.")
    images = _check_images(images)
    graph = _certifiable(network, images, tier, failure_probability, arithmetic)
    with _as_executed(arithmetic):
        labels = _check_labels(graph, images, labels)
    examined = _examined(examine, len(images))
    attempts = len(RADIUS_SHARES)
    with _Prover(
        graph,
        images,
        tier,
        failure_probability,
        mode,
        arithmetic,
        budget,
        seed,
        batch_size,
        attempts,
    ) as prover:
        out, candidate = prover.nothing(images, labels), np.zeros(len(images))
        if len(examined):
            candidate[examined] = prover.candidates(images[examined], labels[examined], max_radius)[
                "radius"
            ]
        candidate = np.where(out["correct"], candidate, 0)
        facts = {"radius": np.zeros(len(images))} | {
            name: out[name] for name in ("margin", "allowance", "lipschitz", "norms")
        }
        for attempt, portion in enumerate(RADIUS_SHARES):
            rows = np.flatnonzero((candidate > 0) & (facts["radius"] == 0))
            if not len(rows):
                break
            trial = candidate[rows] * portion
            found = prover.verdicts(images[rows], labels[rows], trial, rows, attempt) | {
                "radius": trial
            }
            for name, column in facts.items():
                column[rows[found["ok"]]] = found[name][found["ok"]]
    return CertifiedRadius(out["predicted"], out["correct"], **facts, mode=mode, **prover.facts)


def drawn_seed() -> int:
    """A seed of `SEED_BITS` bits from the operating system, which nobody can have known before."""
    return secrets.randbits(SEED_BITS)


def split_failure_probability(
    failure_probability: float,
    images: int,
    layers: int,
    attempts: int = 1,
) -> float:
    """The failure probability of each norm bound, so that all together fail with at most the whole.

    In one attempt a call bounds, for every layer, the norm of each image and one that all images
    share (the global norm, in the modes that have one): ``layers * (images + 1)`` bounds, of which
        fewer are
    used where images are not examined. Each has draws of its own (`_certify_batch`: the key is that
    of the seed, the attempt, the image's place in the call, the layer), and fails with probability
    at most the share given everything that was drawn before: an attempt's radius may depend on how
        the one
    before ended. The probability that any of them fails is at most the sum of theirs.

    Args:
        failure_probability: of the whole call.
        images: of the whole call, examined or not.
        layers: whose norms are bounded.
        attempts: at most so many radii are tried for an image.
    """
    count = max(1, layers) * (images + 1) * attempts
    # The next number below, so that no rounding brings the sum above the whole.
    return math.nextafter(failure_probability / count, 0)


def _checked_seed(seed) -> int:
    try:
        found = operator.index(seed)
    except TypeError:
        raise TypeError(
            f"seed must be an integer, or None to have one drawn, got {seed!r}."
        ) from None
    if not 0 <= found < 2**SEED_BITS:
        raise ValueError(f"seed must lie in 0 .. 2^{SEED_BITS} - 1, got {seed}.")
    return found


class _Prover:
    """What certificates of one network share: checks, the split of delta, arithmetic, global norms.
    A context."""

    def __init__(
        self,
        graph: Graph,
        images,
        tier,
        failure_probability,
        mode,
        arithmetic,
        budget,
        seed,
        batch_size,
        attempts=1,
    ):
        if not budget >= 0:
            raise ValueError(f"budget must be >= 0 floating-point operations, got {budget}.")
        arithmetics = rounding.arithmetics_of(graph, arithmetic)
        self.graph = graph
        if seed is not None:
            self.seed, seed_from = _checked_seed(seed), "given"
        elif tier == "probabilistic":
            self.seed, seed_from = drawn_seed(), "system"
        else:
            self.seed, seed_from = 0, "unused"
        self._size = min(batch_size, len(images))
        self._optimize = images.size > FEW_PIXELS
        self.norms = len(graph.linear) - 1
        self.activations = sum(isinstance(node, Activation) for node in graph.nodes)
        share = split_failure_probability(failure_probability, len(images), self.norms, attempts)
        self._options = {
            "mode": mode,
            "tier": tier,
            "failure_probability": share if tier == "probabilistic" else 0.5,
            "arithmetics": arithmetics,
            "budget": float(budget),
        }
        self.facts = {
            "tier": tier,
            "failure_probability": failure_probability if tier == "probabilistic" else 0.0,
            "seed": self.seed,
            "seed_from": seed_from,
            "precision": "float64",
            "arithmetic": rounding.least_precise(arithmetics),
        }

    def __enter__(self):
        with contextlib.ExitStack() as stack:  # left again if anything here fails
            stack.enter_context(_exact())
            self._prepare()
            self._context = stack.pop_all()
        return self

    def _prepare(self) -> None:
        self.graph = rejoined(jax.tree.map(_in_float64, self.graph))
        # In 64 bits, where no bit of the seed is lost, and by the generator whose draws are meant.
        self._key = jax.random.key(self.seed, impl="threefry2x32")
        self._global = _global_norms(self.graph)

    def __exit__(self, *error):
        self._context.close()

    def verdicts(self, images, labels, radii, indices=None, attempt=None):
        """`_verdict` of each image at its own radius; `indices` are the images' positions in the
        whole call."""
        indices = np.arange(len(images)) if indices is None else indices
        key = self._key if attempt is None else jax.random.fold_in(self._key, attempt)
        compiled = _compiled(_certify_batch, *self._options, optimize=self._optimize)
        run = functools.partial(compiled, (self.graph, self._global, key), **self._options)
        return self._batched(run, images, labels, radii, indices)

    def _batched(self, run, images, *columns):
        return _batched(run, self._size, images.astype(np.float64), *columns, context=_exact)

    def nothing(self, images, labels) -> dict[str, np.ndarray]:
        """What is reported of images that are not examined: predictions, and no claim."""
        count = len(images)
        predicted = self._batched(
            lambda columns: {"predicted": _predict(self.graph, *columns)}, images
        )["predicted"]
        unknown = np.full(count, np.inf)
        return {
            "predicted": predicted,
            "correct": predicted == labels,
            "ok": np.zeros(count, bool),
            "margin": -unknown,
            "allowance": unknown.copy(),
            "lipschitz": unknown.copy(),
            "norms": np.full((count, self.norms), np.inf),
            "constant": np.zeros((count, self.activations)),
            "stable": np.zeros((count, self.activations)),
        }

    def candidates(self, images, labels, max_radius):
        """For each image the largest radius at which its verdict would be positive if estimates
        were norms."""
        options = {name: self._options[name] for name in ("mode", "arithmetics")}
        compiled = _compiled(_radius_batch, *options, optimize=self._optimize)
        run = functools.partial(
            compiled, (self.graph, self._global, jnp.float64(max_radius)), **options
        )
        return self._batched(run, images, labels)


# -------------------------------------------------------------------------------------- one example


def _facts(bound, label, worst, extra):
    """Verdict and figures of one example; `worst` with everything taken off that is known of
    rounding."""
    margin = bounds.margin(worst, label)
    predicted = jnp.argmax(bound.logits)
    # An overflow or NaN anywhere, even one that a mask or a minimum hides later, is a reason not to
    # certify.
    largest = min(rounding.LARGEST, float(jnp.finfo(margin.dtype).max))
    numbers = jax.tree.leaves((bound.regions, bound.norms, bound.graph))
    numbers = [leaf for leaf in numbers if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    sound = jnp.array([jnp.all(jnp.abs(leaf) < largest) for leaf in numbers])
    constant, stable = [], []
    for node, after in zip(bound.graph.nodes, bound.regions, strict=True):
        if isinstance(node, Activation):
            before = bound.regions[node.inputs[0]]
            constant.append(~after.varies)
            stable.append(node.rule.stable(before.lower, before.upper) & after.varies)
    return {
        "predicted": predicted,
        "correct": predicted == label,
        "ok": (predicted == label) & (margin > 0) & jnp.all(sound) & jnp.isfinite(margin),
        "margin": margin,
        "allowance": extra,
        "lipschitz": bound.lipschitz,
        "norms": jnp.stack(bound.norms) if bound.norms else jnp.zeros((0,), margin.dtype),
        "constant": _shares(constant, margin.dtype),
        "stable": _shares(stable, margin.dtype),
    }


def _shares(masks, dtype):
    """The share of each mask that is True."""
    return (
        jnp.stack([jnp.mean(mask.astype(dtype)) for mask in masks])
        if masks
        else jnp.zeros((0,), dtype)
    )


def _verdict(graph, x, label, epsilon, mode, arithmetics, global_norms, local_norm, global_norm):
    """The verdict by bounds in float64, rounded outwards: a proof iff the norm functions bound from
    above."""
    outward = rounding.OUTWARD
    walk = bounds.Walk(graph, bounds.mode_of(mode), local_norm, global_norm, _view, outward)
    bound = walk(x, epsilon)
    boxes = [outward.widened(x - epsilon, x + epsilon, 0.0)]
    boxes += [(region.lower, region.upper) for region in bound.regions[1:]]
    executed = rounding.forward_error(graph, boxes, arithmetics, global_norms, _view)
    head = graph.linear_nodes[-1]
    lower, upper = boxes[head.inputs[0]]
    own = outward.slack(_view(head.operator, lower), lower, upper)
    worst = bounds.worst_logits(bound, label, outward, _view)
    # The two sums below round once more each.
    own = own + 8 * rounding.DOUBLE * (jnp.abs(worst) + own + executed)

    def taken_off(allowance):
        return jnp.where(jnp.arange(worst.shape[0]) == label, worst - allowance, worst + allowance)

    ideal, real = taken_off(own), taken_off(own + executed)
    return _facts(bound, label, real, bounds.margin(ideal, label) - bounds.margin(real, label))


def _view(operator, like):
    """The map as an explicit matrix, which compiles and runs quickly, where that is small."""
    outputs = jax.eval_shape(operator, like).size
    return operator.materialized(like) if like.size * outputs <= SMALL_MATRIX else operator


def probabilistic_norm(operator, key, failure_probability, like, mask_in, mask_out):
    """The norm of tier "probabilistic": `spectral.probabilistic_norm_bound` with scale and steps
    for `INFLATION`."""
    # The polynomial grows fast above its scale: that is taken a little above the estimate, which is
    # from below.
    scale = (1 + SCALE_SLACK) * deterministic.norm_estimate(operator, like, mask_in, mask_out)
    steps = power.chebyshev_steps(like.size, failure_probability, INFLATION - SCALE_SLACK)
    return power.probabilistic_norm_bound(
        operator, key, scale, steps, failure_probability, like, mask_in, mask_out
    )


# ------------------------------------------------------------------------------------------ batches


@functools.cache
def _compiled(function, *static: str, optimize: bool = True):
    """`function` under `jit`.

    On CPU, LLVM's optimizer takes most of the time and gains little if there is little work.
    """
    level = 1 if optimize else 0
    options = {"xla_backend_optimization_level": level} if jax.default_backend() == "cpu" else None
    return jax.jit(function, static_argnames=static, compiler_options=options)


def _devices() -> list[jax.Device]:
    """Those of this process that work on one batch together."""
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    return [chosen] if chosen else jax.local_devices()


@cpu.for_cpu
def _estimate_batch(shared, columns, *, mode, iterations):
    graph, epsilon = shared

    def one(x, label):
        bound = bounds.bound(graph, x, epsilon, mode=mode, iterations=iterations)
        return _facts(bound, label, bounds.worst_logits(bound, label), 0.0)

    return jax.vmap(one)(*columns)


def _global_norms(graph: Graph):
    """Proven upper bounds of the linear nodes' whole norms, in order. Compiled one by one: nets
    share them."""
    compiled = _compiled(deterministic.global_norm_bound, optimize=False)
    return tuple(
        compiled(node.operator, jnp.zeros(graph.nodes[node.inputs[0]].shape))
        for node in graph.linear_nodes
    )


def _certify_batch(shared, columns, *, mode, tier, failure_probability, arithmetics, budget):
    graph, global_norms, key = shared
    # Global norms are drawn once and shared, so their key must not depend on the example; indices
    # make the others independent of how the images are batched.
    global_key, local_key = jax.random.split(key)

    def norm_function(salt):
        def norm(k, operator, like, mask_in, mask_out):
            if tier == "deterministic":
                sigma = deterministic.norm_bound(
                    operator, like, mask_in, mask_out, global_bound=global_norms[k], budget=budget
                )
            else:
                fresh = jax.random.fold_in(salt, k)
                sigma = probabilistic_norm(
                    operator, fresh, failure_probability, like, mask_in, mask_out
                )
                for other in (
                    global_norms[k],
                    deterministic.schur_bound(operator, like, mask_in, mask_out),
                ):
                    sigma = jnp.minimum(sigma, other)
            return sigma, None

        return norm

    def one(x, label, epsilon, index):
        local_norm = norm_function(jax.random.fold_in(local_key, index))
        global_norm = norm_function(global_key)
        return _verdict(
            graph, x, label, epsilon, mode, arithmetics, global_norms, local_norm, global_norm
        )

    return jax.vmap(one)(*columns)


def _radius_batch(shared, columns, *, mode, arithmetics):
    """The largest radius, to about 1 %, at which the verdict is positive with estimates in place of
    norms."""
    graph, global_norms, max_radius = shared

    def norm(k, operator, like, mask_in, mask_out):
        start = jax.random.normal(jax.random.fold_in(jax.random.key(0), k), like.shape, like.dtype)
        return power.power_iteration(operator, start, RADIUS_ITERATIONS, mask_in, mask_out)

    def one(x, label):
        def robust(epsilon):
            return _verdict(graph, x, label, epsilon, mode, arithmetics, global_norms, norm, norm)[
                "ok"
            ]

        def halve(_, bracket):
            low, high = bracket
            # Halved in the logarithm once something is known to hold, so that small radii are as
            # precise as large ones.
            middle = jnp.where(low > 0, jnp.sqrt(jnp.maximum(low, 1e-12) * high), high / 4)
            good = robust(middle)
            return jnp.where(good, middle, low), jnp.where(good, high, middle)

        low, _ = jax.lax.fori_loop(0, 12, halve, (jnp.zeros_like(max_radius), max_radius))
        return {"radius": low}

    return jax.vmap(one)(*columns)


def _batched(run, size, *columns, context=contextlib.nullcontext) -> dict[str, Any]:
    """Runs ``run(columns)`` in batches of `size` rows, one device of this process beside the other;
    NumPy out, in order.

    Each device has a thread, and JAX's precision and types are a thread's own: `context` makes what
    they have to be there. The last batch is padded, for one shape.
    """
    count, devices = len(columns[0]), _devices()
    batches = [
        np.minimum(np.arange(first, first + size), count - 1) for first in range(0, count, size)
    ]

    def work(device):
        # One program over all devices would be compiled once only, but hangs on CPU: jax 0.10.2,
        # two devices.
        with context(), jax.default_device(device):
            mine = batches[devices.index(device) :: len(devices)]
            return [jax.device_get(run(tuple(column[rows] for column in columns))) for rows in mine]

    if len(devices) == 1:
        parts = [jax.device_get(run(tuple(column[rows] for column in columns))) for rows in batches]
    else:
        with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
            found = list(pool.map(work, devices))
        parts = [found[i % len(devices)][i // len(devices)] for i in range(len(batches))]
    return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """IEEE float64, on the host where the accelerator has none, and never TF32 or bfloat16
    products."""
    host = jax.devices("cpu")[0] if jax.default_backend() == "tpu" else None
    with jax.enable_x64(True), jax.default_matmul_precision("highest"), jax.default_device(host):
        yield


# ---------------------------------------------------------------------------------------- bad input


def _certifiable(network, images, tier, failure_probability, arithmetic) -> Graph:
    """The graph of a network, traced in the types in which it will be executed.

    Raises:
        ValueError, TypeError: arguments that prove nothing; what has no bound; parameters that are
            no numbers.
    """
    if tier not in TIERS:
        raise ValueError(
            f"tier must be one of {', '.join(TIERS)}, got {tier!r}. (An estimate is no "
            "certificate: see lipjax.estimate.)"
        )
    if not 0 < failure_probability < 1:
        raise ValueError(f"failure_probability must lie in (0, 1), got {failure_probability}.")
    _check_finite(network)
    with _as_executed(arithmetic):
        graph, again = (bounds.graph_of(network, _example(images, arithmetic)) for _ in range(2))
    for node in graph.nodes:
        for leaf in jax.tree.leaves(node):
            if not np.all(np.isfinite(np.asarray(leaf, np.float64))):
                raise ValueError(f"{node.where}: a parameter holds NaN or infinity.")
    if not _same(graph, again):
        raise ValueError(
            "the network computes something else each time it is traced (a parameter that changes "
            "when it is read, random numbers of Python): what will be executed is not known."
        )
    return graph


def _as_executed(arithmetic: str | None):
    """With JAX's 64 bits where float64 is declared, else as this process has them."""
    wide = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    return jax.enable_x64(arithmetic == "float64" or wide)


def _check_finite(network) -> None:
    """Raises a ValueError that names the parameter of a module that holds NaN or infinity."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(network):
        if not isinstance(leaf, jax.Array | np.ndarray):
            continue
        real = jnp.issubdtype(leaf.dtype, jnp.floating)
        if real and not np.all(np.isfinite(np.asarray(leaf, np.float64))):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(f"parameter {name} of the network holds NaN or infinity.")


def _same(first: Graph, second: Graph) -> bool:
    """Do two graphs compute the same, bit for bit?"""
    ours, form = jax.tree.flatten(first)
    theirs, other = jax.tree.flatten(second)
    if form is None or form != other:
        return False
    return all(map(np.array_equal, ours, theirs))


def _example(images: np.ndarray, arithmetic: str | None) -> jax.ShapeDtypeStruct:
    """One image as it is given to the network: by this process, or in the arithmetic that is
    declared."""
    dtype = (
        np.dtype(arithmetic)
        if arithmetic == "float64"
        else jax.dtypes.canonicalize_dtype(images.dtype)
    )
    return jax.ShapeDtypeStruct(images.shape[1:], dtype)


def _in_float64(leaf):
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        return leaf
    return jnp.asarray(np.asarray(leaf).astype(np.float64))


def _examined(examine, count: int) -> np.ndarray:
    """Positions of the images to decide."""
    examine = np.ones(count, bool) if examine is None else np.asarray(examine)
    if examine.shape != (count,) or examine.dtype != bool:
        raise ValueError(
            f"examine must be {count} booleans, got {examine.dtype} of shape {examine.shape}."
        )
    return np.flatnonzero(examine)


def _check_images(images) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim < 2 or len(images) == 0:
        raise ValueError(f"images must be a non-empty batch (N, ...), got shape {images.shape}.")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"images must be floats in [0, 1], got {images.dtype}: divide 0..255 integers by 255."
        )
    if images.dtype not in (np.float32, np.float64):
        raise TypeError(
            f"images must be float32 or float64, got {images.dtype}: layers would compute in "
            "that type, and what is certified is the network on float32 images. Give it, and "
            "execute it on, images.astype(np.float32)."
        )
    low, high = images.min(), images.max()
    if not (low >= 0 and high <= 1):  # a NaN fails too
        raise ValueError(
            f"images must lie in [0, 1], got {low} to {high}: epsilon is an l2 radius on pixels in "
            "[0, 1]. Divide 0..255 "
            "images by 255; do not normalise before the network."
        )
    return images


def _check_labels(graph: Graph, images, labels) -> np.ndarray:
    if labels is None:
        labels = np.asarray(_predict(graph, jnp.asarray(images)))
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be {len(images)} integers, got {labels.dtype} of shape {labels.shape}."
        )
    (classes,) = graph.shape
    if classes < 2:
        raise ValueError(
            f"a network of {classes} class has no rival class to exclude: nothing to certify."
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels must lie in 0..{classes - 1}, got {labels.min()} to {labels.max()}."
        )
    return labels.astype(np.int32)


@jax.jit
def _predict(graph: Graph, images):
    return jax.vmap(lambda x: jnp.argmax(graph(x)))(images)
