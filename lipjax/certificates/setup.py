"""What all certificates of one call share, as a plain value, and what is decided with it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipjax import bounds, rounding
from lipjax.activations.smooth import Rounded
from lipjax.certificates import batches, verdicts
from lipjax.certificates.checks import (
    as_executed,
    certifiable,
    checked_images,
    checked_labels,
    examined_rows,
    normal,
    predict,
)
from lipjax.certificates.randomness import checked_seed, drawn_seed, split_failure_probability
from lipjax.graph import Activation, Graph
from lipjax.graph.joining import rejoined
from lipjax.norms.best import global_norm_bound

# The mode that decides each image by the cheapest bound that does, and its gradient steps.
AUTO = "auto"
AUTO_STEPS = 20
# Images at once in the stages behind the first pass, which few images reach.
STAGE_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all certificates of one call share.

    Attributes:
        images, labels: of the whole call, checked.
        examined: positions of the images to decide.
        graph: of the network, in float64.
        global_norms: proven upper bounds of the linear nodes' whole norms, in order.
        key: of all draws of the call.
        options: static arguments of `verdicts.certify_batch`.
        stages: what follows on images that are right and undecided: for each stage, in mode
            "tight", at most so many gradient steps.
        batch_size: images at once.
        optimize: is there enough work for LLVM's optimizer to pay?
        facts: what a certificate says of its proof.
    """

    images: np.ndarray
    labels: np.ndarray
    examined: np.ndarray
    graph: Graph
    global_norms: tuple[jax.Array, ...]
    key: jax.Array
    options: dict[str, Any]
    stages: tuple[int, ...]
    batch_size: int
    optimize: bool
    facts: dict[str, Any]


def set_up(
    network,
    images,
    labels,
    *,
    tier: str,
    failure_probability: float,
    mode: str,
    arithmetic: str | None,
    budget: float,
    seed: int | None,
    batch_size: int,
    examine: np.ndarray | None,
    attempts: int = 1,
    steps: int | None = 0,
) -> Setup:
    """Checks the arguments of `certify` and prepares what its images share.

    Args:
        attempts: at most so many radii are tried for an image.
        steps: as in `certify`.

    Raises:
        TypeError, ValueError: as `certify`.
    """
    mode, stages = _stages_of(mode, steps)
    images = checked_images(images)
    graph = certifiable(network, images, tier, failure_probability, arithmetic)
    with as_executed(arithmetic):
        labels = checked_labels(graph, images, labels)
    examined = examined_rows(examine, len(images))
    options, facts = agreed(
        graph,
        (len(images), len(graph.linear) - 1 + len(bounds.stacks(graph)), attempts),
        tier=tier,
        failure_probability=failure_probability,
        mode=mode,
        arithmetic=arithmetic,
        budget=budget,
        seed=seed,
    )
    with batches.exact():
        graph = in_float64(graph)
        return Setup(
            images=images,
            labels=labels,
            examined=examined,
            graph=graph,
            global_norms=global_norms_of(graph),
            # In 64 bits, where no bit of the seed is lost, by the generator that is meant.
            key=jax.random.key(facts["seed"], impl="threefry2x32"),
            options=options,
            stages=stages,
            batch_size=min(batch_size, len(images)),
            optimize=images.size > batches.FEW_PIXELS,
            facts={**facts, "precision": "float64", "left_out": graph.left_out},
        )


def agreed(
    graph: Graph,
    counts: tuple[int, int, int],
    *,
    tier: str,
    failure_probability: float,
    mode: str,
    arithmetic: str | None,
    budget: float,
    seed: int | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What all proofs of one call rest on. Reads the process's own precision.

    Args:
        graph: as it will be executed.
        counts: regions, norms of each, and attempts at each.
        tier, failure_probability, mode, arithmetic, budget, seed: as in `certify`.

    Returns:
        Static arguments of the program that proves, and the fields of a `Proof` but its mode.

    Raises:
        TypeError, ValueError: as `certify` says of them.
    """
    if not budget >= 0:
        raise ValueError(f"budget must be >= 0 floating-point operations, got {budget}.")
    arithmetics = rounding.arithmetics_of(graph, arithmetic)
    seed, seed_from = seed_of(tier, seed)
    share = split_failure_probability(failure_probability, *counts)
    drawn = tier == "probabilistic"
    rules = [node.rule for node in graph.nodes if isinstance(node, Activation)]
    options = {
        "mode": mode,
        "tier": tier,
        "failure_probability": share if drawn else 0.5,
        "arithmetics": arithmetics,
        "budget": float(budget),
    }
    facts = {
        "tier": tier,
        "failure_probability": failure_probability if drawn else 0.0,
        "seed": seed,
        "seed_from": seed_from,
        "arithmetic": rounding.least_precise(arithmetics),
        "backend": jax.default_backend() if any(isinstance(r, Rounded) for r in rules) else "",
    }
    return options, facts


def _stages_of(mode: str, steps: int | None) -> tuple[str, tuple[int, ...]]:
    """The mode of the first pass over all images, and the stages behind it."""
    if mode == AUTO:
        steps = AUTO_STEPS if steps is None else steps
        first = "local"
        stages = [0, steps]
    else:
        if mode in bounds.CONTROLS:
            raise ValueError(f"mode {mode!r} is a control to train with, and certifies nothing.")
        bounds.mode_of(mode)
        steps = 0 if steps is None else steps
        first = mode
        stages = [steps]
        if steps and not bounds.mode_of(mode).one_sided:
            raise ValueError(
                f'steps improve the slopes of modes "tight" and "tight_rows" (or "{AUTO}"), '
                f"got steps={steps} with mode {mode!r}."
            )
    if steps < 0:
        raise ValueError(f"steps must be >= 0 gradient steps, got {steps}.")
    return first, tuple(n for k, n in enumerate(stages) if n or (k == 0 and mode == AUTO))


def seed_of(tier: str, seed: int | None) -> tuple[int, str]:
    """The seed that is used, and where it is from."""
    if seed is not None:
        return checked_seed(seed), "given"
    if tier == "probabilistic":
        return drawn_seed(), "system"
    return 0, "unused"


def global_norms_of(graph: Graph) -> tuple[jax.Array, ...]:
    """Proven bounds of the linear nodes' whole norms. Compiled one by one: nets share them."""
    compiled = batches.compiled(global_norm_bound, optimize=False)
    inputs = (graph.nodes[node.inputs[0]] for node in graph.linear_nodes)
    pairs = zip(graph.linear_nodes, inputs, strict=True)
    return tuple(compiled(node.operator, jnp.zeros(before.shape)) for node, before in pairs)


def in_float64(graph: Graph) -> Graph:
    """The same function in float64; what was joined in its own type is joined anew."""

    def widened(leaf):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return leaf
        return jnp.asarray(np.asarray(leaf).astype(np.float64))

    return rejoined(jax.tree.map(widened, graph))


# ------------------------------------------------------------------------------ what it decides


def decided(
    setup: Setup, rows: np.ndarray, radii: np.ndarray, attempt: int | None = None
) -> tuple[dict[str, Any], dict[tuple[int, int], np.ndarray]]:
    """`verdicts.verdict` of images, each at its own radius, by the norms of the tier.

    Args:
        rows: positions of the images in the whole call.
        attempt: of a radius; each draws anew.

    Returns:
        The verdicts, and the slopes that some of them rest on, by row and rival.
    """
    slopes: dict[tuple[int, int], np.ndarray] = {}
    with batches.exact():
        key = setup.key if attempt is None else jax.random.fold_in(setup.key, attempt)
        shared = (setup.graph, setup.global_norms, key)
        options = {**setup.options, "keep": bool(setup.stages)}
        first = _program(setup, verdicts.certify_batch, shared, options)

        def run(columns):
            found, kept = first(columns)
            found = {name: np.array(column) for name, column in found.items()}
            if kept is not None:
                kept = kept[0], np.array(kept[1])
            _, labels, _, places = columns
            for steps in setup.stages:
                _improve(setup, found, *kept, labels, places, steps, slopes)
            return found

        columns = (setup.labels[rows], normal(radii), rows)
        found = _batched(setup, run, setup.images[rows], *columns)
    return found, slopes


def _improve(setup: Setup, found, kept, worst, labels, places, steps, slopes) -> None:
    """One stage on the images of a batch that are right and undecided.

    It starts from their regions and norms, as they were proved in the first pass, and draws
    nothing: so it takes nothing of the failure probability, however it depends on what was drawn.

    Args:
        found: verdicts of the batch, which become better.
        kept, worst: its bounds and worst-case logits, which become better too.
        labels, places: of its images, and their positions in the whole call.
        steps: gradient steps at most.
        slopes: where those are put that a positive verdict rests on, by place and rival.
    """
    undecided = np.flatnonzero(found["correct"] & ~found["ok"] & np.isfinite(found["margin"]))
    options = {"arithmetics": setup.options["arithmetics"], "steps": steps}
    shared = (setup.graph, setup.global_norms)
    run = _program(setup, verdicts.tightened_batch, shared, options)
    size = min(STAGE_BATCH, len(labels))
    for start in range(0, len(undecided), size):
        # The last few are filled up, for one shape.
        some = undecided[start : start + size]
        padded = np.resize(some, size)
        columns = (labels[padded], _rows_of(kept, padded), worst[padded])
        better = {
            name: column[: len(some)] for name, column in jax.device_get(run(columns)).items()
        }
        # Without a verdict the slopes are not kept, and so their margin is not said either.
        use = better["ok"] if steps else better["margin"] > found["margin"][some]
        worst[some[use]] = better["worst"][use]
        for name in ("ok", "margin", "allowance"):
            found[name][some[use]] = better[name][use]
        for i in np.flatnonzero(use) if steps else ():
            for rival, used in zip(better["rivals"][i], better["slopes"][i], strict=True):
                if rival >= 0:
                    slopes[int(places[some[i]]), int(rival)] = used


@jax.jit
def _rows_of(columns, rows):
    """Of each column of a batch these rows."""
    return jax.tree.map(lambda column: column[rows], columns)


def candidates(setup: Setup, rows: np.ndarray, max_radius: float) -> np.ndarray:
    """The largest radius at which each image would be certified if estimates were norms."""
    options = {name: setup.options[name] for name in ("mode", "arithmetics")}
    with batches.exact():
        shared = (setup.graph, setup.global_norms, jnp.float64(max_radius))
        run = _program(setup, verdicts.radius_batch, shared, options)
        return _batched(setup, run, setup.images[rows], setup.labels[rows])["radius"]


def unexamined(setup: Setup) -> dict[str, Any]:
    """What is reported of images that are not examined: predictions, and no claim."""

    def run(columns):
        return {"predicted": predict(setup.graph, *columns)}

    with batches.exact():
        predicted = _batched(setup, run, setup.images)["predicted"]

    count = len(setup.images)
    norms = len(setup.graph.linear) - 1
    activations = sum(isinstance(node, Activation) for node in setup.graph.nodes)
    return {
        "predicted": predicted,
        "correct": predicted == setup.labels,
        "ok": np.zeros(count, bool),
        "margin": np.full(count, -np.inf),
        "allowance": np.full(count, np.inf),
        "lipschitz": np.full(count, np.inf),
        "norms": np.full((count, norms), np.inf),
        "constant": np.zeros((count, activations)),
        "stable": np.zeros((count, activations)),
    }


def _program(setup: Setup, function, shared, options):
    compiled = batches.compiled(function, *options, optimize=setup.optimize)
    return functools.partial(compiled, shared, **options)


def _batched(setup: Setup, run, images, *columns):
    columns = (images.astype(np.float64), *columns)
    return batches.batched(run, setup.batch_size, *columns, context=batches.exact)
