"""Certificates: predictions proved not to change on an l2 ball, and estimates that monitor them, kept apart by name."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipjax import margins, operators, regions, spectral

TIERS = ("probabilistic",)
# Aimed-at inflation of each norm by the probabilistic bound. The guess of its scale is taken this much above the
# estimate, because a polynomial scaled to less than the true norm grows fast.
INFLATION = 0.01
SCALE_SLACK = 1.002
SCALE_ITERATIONS = 60
RADIUS_ITERATIONS = 15
# Entries up to which a layer's matrix is written out (float64: 16 MB).
SMALL_MATRIX = 2**21
# certified_radius tries these shares of the radius that the estimate gives, largest first.
RADIUS_SHARES = (0.99, 0.97, 0.9, 0.7)


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Per-example verdicts of one call of `certify`, NumPy arrays of shape ``(N,)`` unless said.

    `certified[i]` is True only if the prediction is right (equals the label that was given) and *every* image within
    l2 distance `epsilon` of image i has that same prediction, by the real-number function of the network. All
    statements of one certificate hold together with probability >= 1 - failure_probability over the draws of `seed`.

    Attributes:
        predicted: class of the largest logit.
        correct: ``predicted == label``.
        certified: the verdict.
        margin: label's logit minus the largest worst-case rival; certified needs it strictly positive.
        lipschitz: product of the norm bounds, from the input to the penultimate activation.
        norms: ``(N, affine layers - 1)``, the norm bounds.
        constant: ``(N, activations)``, share of neurons that are constant on the ball; zeros in mode "global".
        epsilon, mode, tier, failure_probability, seed, precision: what the verdicts are for and rest on.
    """

    predicted: np.ndarray
    correct: np.ndarray
    certified: np.ndarray
    margin: np.ndarray
    lipschitz: np.ndarray
    norms: np.ndarray
    constant: np.ndarray
    epsilon: float
    mode: str
    tier: str
    failure_probability: float
    seed: int
    precision: str


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What `estimate` found: as `Certificate`, but `likely_robust` proves nothing: its norms are lower bounds."""

    predicted: np.ndarray
    correct: np.ndarray
    likely_robust: np.ndarray
    margin: np.ndarray
    lipschitz: np.ndarray
    norms: np.ndarray
    constant: np.ndarray
    epsilon: float
    mode: str
    tier: str = "estimate"


@dataclasses.dataclass(frozen=True)
class CertifiedRadius:
    """Per-example radii of one call of `certified_radius`, of shape ``(N,)``.

    `radius[i]` is 0 where nothing was certified (a wrong prediction, or an open region that the tool cannot prove).
    All radii hold together with probability >= 1 - failure_probability.
    """

    predicted: np.ndarray
    correct: np.ndarray
    radius: np.ndarray
    mode: str
    tier: str
    failure_probability: float
    seed: int
    precision: str


def estimate(
    network: nnx.Module, images, labels, epsilon: float, *, mode: str = "local", iterations: int = 20, batch_size=256
) -> Estimate:
    """Monitors robustness with power-iteration estimates from fixed fresh starts. **Not a certificate.**

    Arguments and errors as in `certify`; works at the default precision and in float32, for use during training.
    """
    images, labels = _check(network, images, labels)
    regions.check_epsilon(epsilon)
    run = functools.partial(_compiled(_estimate_batch, "mode", "iterations"), mode=mode, iterations=iterations)
    out = _batched(lambda x, y, _: run(network, x, y, jnp.float32(epsilon)), images, labels, batch_size, np.float32)
    ok = out.pop("ok")
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
    seed: int = 0,
    batch_size: int = 64,
) -> Certificate:
    """Proves, image by image, that no l2 perturbation of norm <= epsilon changes the network's (right) prediction.

    **Guarantee** (tier "probabilistic"): with probability >= 1 - failure_probability over the tool's own draws, *all*
    certificates of the call hold, whatever the weights and images. Each norm is bounded from above by
    `spectral.probabilistic_norm_bound` with a fresh start; failure_probability is split evenly over layers and images
    (union bound). Computed in float64 where the device has it (CPU, GPU), else float32, at the highest matmul
    precision. It is about the network as a function of real numbers with these weights: the rounding of a forward pass
    in lower precision is not yet part of it.

    A certificate of one image does not depend on the other images, except through the split of failure_probability.
    Strict: ties, NaN and infinities are never certified.

    | case | verdict |
    |---|---|
    | wrong prediction | not certified |
    | epsilon = 0 | certified iff the prediction is right and no rival ties |
    | a NaN or infinity anywhere in the walk | not certified |
    | NaN or infinite weights or pixels, pixels outside [0, 1], unknown layer, low-precision layer | error |

    Args:
        network: an nnx.Sequential of registered layers.
        images: ``(N, ...)`` floats in [0, 1].
        labels: ``(N,)`` integers, or None: then the predictions themselves are certified.
        epsilon: l2 radius on the pixels as given, >= 0.
        tier: "probabilistic".
        failure_probability: delta in (0, 1), of the whole call.
        mode: "global", "paper" or "local", the tightest.
        seed: of the draws. The draws must be independent of the network and the images: do not choose weights or images
            by looking at the outcome for one seed.
        batch_size: images at once; no influence on the result.

    Raises:
        TypeError, ValueError: as the table and `bound` say, naming the value.
    """
    regions.check_epsilon(epsilon)
    layers = _check_certifiable(network, tier, failure_probability)
    images, labels = _check(network, images, labels)
    share = failure_probability / (_norms_of(layers) * (len(images) + 1))
    with _exact() as dtype:
        network64 = _cast(network, dtype)
        run = functools.partial(
            _compiled(_certify_batch, "mode", "failure_probability"), mode=mode, failure_probability=share
        )
        key = jax.random.key(seed)
        out = _batched(
            lambda x, y, i: run(network64, x, y, jnp.full(len(x), epsilon, dtype), key, i),
            images,
            labels,
            batch_size,
            dtype,
        )
    ok = out.pop("ok")
    return Certificate(
        certified=ok,
        epsilon=float(epsilon),
        mode=mode,
        tier=tier,
        failure_probability=failure_probability,
        seed=seed,
        precision=np.dtype(dtype).name,
        **out,
    )


def certified_radius(
    network: nnx.Module,
    images,
    labels,
    *,
    tier: str = "probabilistic",
    failure_probability: float = 1e-6,
    mode: str = "local",
    seed: int = 0,
    max_radius: float = 4.0,
    batch_size: int = 64,
) -> CertifiedRadius:
    """A certified radius per image: bisection on estimates finds a candidate, a certificate at the tier decides.

    Guarantee and arguments as in `certify`; failure_probability covers all attempts (at most ``len(RADIUS_SHARES)`` an
    image). The radius is a lower bound of the largest certifiable one, usually 1 to 3 % below it.

    Args:
        max_radius: no radius above it is looked for.
    """
    if not (max_radius > 0 and math.isfinite(max_radius)):
        raise ValueError(f"max_radius must be positive and finite, got {max_radius}.")
    layers = _check_certifiable(network, tier, failure_probability)
    images, labels = _check(network, images, labels)
    share = failure_probability / (_norms_of(layers) * (len(images) + 1) * len(RADIUS_SHARES))
    with _exact() as dtype:
        network64 = _cast(network, dtype)
        key = jax.random.key(seed)
        find = functools.partial(_compiled(_radius_batch, "mode"), mode=mode)
        out = _batched(
            lambda x, y, _: find(network64, x, y, jnp.asarray(max_radius, dtype)), images, labels, batch_size, dtype
        )
        candidate = np.where(out["correct"], out["radius"], 0)
        radius = np.zeros(len(images))
        run = functools.partial(
            _compiled(_certify_batch, "mode", "failure_probability"), mode=mode, failure_probability=share
        )
        for attempt, portion in enumerate(RADIUS_SHARES):
            open_ = np.flatnonzero((candidate > 0) & (radius == 0))
            if not len(open_):
                break
            trial = candidate[open_] * portion
            attempt_key = jax.random.fold_in(key, attempt)

            def step(x, y, i, trial=trial, attempt_key=attempt_key, open_=open_):
                positions = np.minimum(np.asarray(i), len(trial) - 1)
                return run(network64, x, y, jnp.asarray(trial[positions]), attempt_key, jnp.asarray(open_[positions]))

            ok = _batched(step, images[open_], labels[open_], batch_size, dtype)["ok"]
            radius[open_[ok]] = trial[ok]
    return CertifiedRadius(
        out["predicted"], out["correct"], radius, mode, tier, failure_probability, seed, np.dtype(dtype).name
    )


# ---------------------------------------------------------------------------------------------------- one example


def _facts(network, bound, label):
    worst = margins.worst_logits(network, bound, label)
    margin = margins.margin(worst, label)
    predicted = jnp.argmax(bound.logits)
    # An overflow or NaN anywhere, even one that a mask or a minimum hides later, is a reason not to certify.
    finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((bound.regions, bound.norms))]))
    layers = regions.layers_of(network)
    constant = [
        1 - jnp.mean(region.varies.astype(margin.dtype))
        for layer, region in zip(layers, bound.regions, strict=True)
        if regions.activations.is_activation(layer)
    ]
    return {
        "predicted": predicted,
        "correct": predicted == label,
        "ok": (predicted == label) & (margin > 0) & finite & jnp.isfinite(margin),
        "margin": margin,
        "lipschitz": bound.lipschitz,
        "norms": jnp.stack(bound.norms) if bound.norms else jnp.zeros((0,), margin.dtype),
        "constant": jnp.stack(constant) if constant else jnp.zeros((0,), margin.dtype),
    }


def _certified_walk(network, x, label, epsilon, key, mode, failure_probability):
    layers = regions.layers_of(network)

    def norm_function(salt):
        def norm(k, operator, like, mask_in, mask_out):
            # The guess of the scale uses its own randomness: the certified start must be fresh.
            scale_key, fresh = jax.random.split(jax.random.fold_in(jax.random.fold_in(salt, k), 7))
            start = jax.random.normal(scale_key, like.shape, like.dtype)
            guess, vector = spectral.power_iteration(operator, start, SCALE_ITERATIONS, mask_in, mask_out)
            steps = spectral.chebyshev_steps(like.size, failure_probability, INFLATION * 0.8)
            sigma = spectral.probabilistic_norm_bound(
                operator, fresh, SCALE_SLACK * guess, steps, failure_probability, like, mask_in, mask_out
            )
            return sigma, vector

        return norm

    global_key, example_key = key
    return regions.walk(layers, x, epsilon, mode, norm_function(example_key), norm_function(global_key), _view)


def _view(layer, like):
    """The layer's linear view; as an explicit matrix, which compiles and runs quickly, where that is small."""
    operator = operators.linear_operator(layer)
    outputs = jax.eval_shape(operator, like).size
    return operator.materialized(like) if like.size * outputs <= SMALL_MATRIX else operator


# ---------------------------------------------------------------------------------------------------- batches


@functools.cache
def _compiled(function, *static: str):
    """`function` under `jit`. On CPU LLVM's optimizer took most of the time and gained nothing: the work is in products."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, static_argnames=static, compiler_options=options)


def _estimate_batch(network, images, labels, epsilon, *, mode, iterations):
    def one(x, label):
        return _facts(network, regions.bound(network, x, epsilon, mode=mode, iterations=iterations), label)

    return jax.vmap(one)(images, labels)


def _certify_batch(network, images, labels, epsilon, key, indices, *, mode, failure_probability):
    # Global norms are drawn once and shared, so their key must not depend on the example; indices make the others
    # independent of how the images are batched.
    global_key, local_key = jax.random.split(key)

    def one(x, label, epsilon, index):
        keys = (global_key, jax.random.fold_in(local_key, index))
        bound = _certified_walk(network, x, label, epsilon, keys, mode, failure_probability)
        return _facts(network, bound, label)

    return jax.vmap(one)(images, labels, epsilon, indices)


def _radius_batch(network, images, labels, max_radius, *, mode):
    """The largest radius, to about 1 %, at which the estimate's margin is positive."""

    def one(x, label):
        def norm(k, operator, like, mask_in, mask_out):
            start = jax.random.normal(jax.random.fold_in(jax.random.key(0), k), like.shape, like.dtype)
            return spectral.power_iteration(operator, start, RADIUS_ITERATIONS, mask_in, mask_out)

        def robust(epsilon):
            bound = regions.walk(regions.layers_of(network), x, epsilon, mode, norm, norm, _view)
            return _facts(network, bound, label)["ok"]

        def halve(_, bracket):
            low, high = bracket
            # Halved in the logarithm once something is known to hold, so that small radii are as precise as large ones.
            middle = jnp.where(low > 0, jnp.sqrt(jnp.maximum(low, 1e-12) * high), high / 4)
            good = robust(middle)
            return jnp.where(good, middle, low), jnp.where(good, high, middle)

        low, _ = jax.lax.fori_loop(0, 12, halve, (jnp.zeros_like(max_radius), max_radius))
        logits = regions.apply(network, x)
        predicted = jnp.argmax(logits)
        return {"radius": low, "predicted": predicted, "correct": predicted == label}

    return jax.vmap(one)(images, labels)


def _batched(run, images, labels, batch_size, dtype) -> dict[str, Any]:
    """Runs ``run(images, labels, indices)`` in batches of one shape (the last one padded); NumPy arrays out."""
    parts = []
    for first in range(0, len(images), batch_size):
        indices = np.arange(first, first + min(batch_size, len(images)))
        rows = np.minimum(indices, len(images) - 1)
        kept = min(batch_size, len(images) - first)
        x, y = jnp.asarray(images[rows].astype(dtype)), jnp.asarray(labels[rows])
        out = jax.device_get(run(x, y, jnp.asarray(indices)))
        parts.append({name: value[:kept] for name, value in out.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@contextlib.contextmanager
def _exact() -> Iterator[type]:
    """float64 where the device has it, and never TF32 or bfloat16 products."""
    wide = jax.default_backend() != "tpu"
    with jax.enable_x64(wide), jax.default_matmul_precision("highest"):
        yield np.float64 if wide else np.float32


def _cast(network: nnx.Module, dtype) -> nnx.Module:
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, network
    )


def _norms_of(layers) -> int:
    return max(1, sum(operators.is_affine(layer) for layer in layers) - 1)


# ---------------------------------------------------------------------------------------------------- bad input


def _check_certifiable(network, tier, failure_probability):
    if tier not in TIERS:
        raise ValueError(
            f"tier must be one of {', '.join(TIERS)}, got {tier!r}. (An estimate is no certificate: see lipjax.estimate.)"
        )
    if not 0 < failure_probability < 1:
        raise ValueError(f"failure_probability must lie in (0, 1), got {failure_probability}.")
    layers = regions.layers_of(network)
    for i, layer in enumerate(layers):
        for name in ("dtype", "preferred_element_type"):
            used = getattr(layer, name, None)
            if used is not None and jnp.dtype(used) not in (jnp.dtype(np.float32), jnp.dtype(np.float64)):
                raise ValueError(
                    f"layer {i}, {type(layer).__name__}, computes in {jnp.dtype(used).name}: what rounding at that "
                    "precision does is not covered by the certificate. Give the layer dtype float32."
                )
    for path, leaf in jax.tree_util.tree_leaves_with_path(network):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 32:
            raise ValueError(
                f"parameter {_name(path)} is stored in {leaf.dtype}: certify a float32 copy of the network."
            )
    return layers


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _check(network, images, labels):
    for path, leaf in jax.tree_util.tree_leaves_with_path(network):
        if not np.all(np.isfinite(np.asarray(leaf))):
            raise ValueError(f"parameter {_name(path)} of the network holds NaN or infinity.")
    images = np.asarray(images)
    if images.ndim < 2 or len(images) == 0:
        raise ValueError(f"images must be a non-empty batch (N, ...), got shape {images.shape}.")
    if not np.issubdtype(images.dtype, np.floating):
        raise TypeError(f"images must be floats in [0, 1], got {images.dtype}: divide 0..255 integers by 255.")
    low, high = images.min(), images.max()
    if not (low >= 0 and high <= 1):  # a NaN fails too
        raise ValueError(
            f"images must lie in [0, 1], got {low} to {high}: epsilon is an l2 radius on pixels in [0, 1]. Divide 0..255 "
            "images by 255; do not normalise before the network."
        )
    if labels is None:
        labels = np.asarray(_predict(network, jnp.asarray(images)))
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be {len(images)} integers, got {labels.dtype} of shape {labels.shape}.")
    classes = jax.eval_shape(regions.apply, network, jax.ShapeDtypeStruct(images.shape[1:], jnp.float32)).shape[0]
    if classes < 2:
        raise ValueError(f"a network of {classes} class has no rival class to exclude: nothing to certify.")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}, got {labels.min()} to {labels.max()}.")
    return images, labels.astype(np.int32)


@jax.jit
def _predict(network, images):
    return jax.vmap(lambda x: jnp.argmax(regions.apply(network, x)))(images)
