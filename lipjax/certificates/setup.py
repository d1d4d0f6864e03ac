"""What all certificates of one call share, as a plain value, and what is decided with it."""

import dataclasses
import functools
import time
from collections.abc import Iterator
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
from lipjax.certificates.results import StageRun
from lipjax.certificates.stages import Stage, affordable, planned
from lipjax.graph import Activation, Graph
from lipjax.graph.joining import rejoined
from lipjax.norms.best import WholeNorm, whole_norm

# Images at once in the stages behind the first one, which few images reach.
STAGE_BATCH = 16
# The branch of the call's draws from which a stage behind the first one draws. `certify_batch`
# splits its key into branches 0 and 1, so none of the draws are the same.
ANEW = 2


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all certificates of one call share.

    Attributes:
        images, labels: of the whole call, checked.
        examined: positions of the images to decide.
        graph: of the network, in float64.
        whole_norms: what is proven of the linear nodes' whole norms, in order.
        key: of all draws of the call.
        options: static arguments of `verdicts.certify_batch`.
        stages: the first is tried on every image, the others on those that are right and still
            undecided.
        seconds: an image may take before another stage begins; None: any time.
        batch_size: images at once.
        optimize: is there enough work for LLVM's optimizer to pay?
        facts: what a certificate says of its proof.
    """

    images: np.ndarray
    labels: np.ndarray
    examined: np.ndarray
    graph: Graph
    whole_norms: tuple[WholeNorm, ...]
    key: jax.Array
    options: dict[str, Any]
    stages: tuple[Stage, ...]
    seconds: float | None
    batch_size: int
    optimize: bool
    facts: dict[str, Any]

    @property
    def global_norms(self) -> tuple[jax.Array, ...]:
        """Proven upper bounds of the linear nodes' whole norms, in order."""
        return tuple(norm.bound for norm in self.whole_norms)


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
    seconds_per_image: float | None = None,
) -> Setup:
    """Checks the arguments of `certify` and prepares what its images share.

    Args:
        attempts: at most so many radii are tried for an image.
        steps, seconds_per_image: as in `certify`.

    Raises:
        TypeError, ValueError: as `certify`.
    """
    stages = planned(mode, steps, seconds_per_image)
    # A stage that walks anew draws its own norms, whether it comes to it or not.
    attempts += sum(bool(stage.mode) for stage in stages[1:])
    images = checked_images(images)
    graph = certifiable(network, images, tier, failure_probability, arithmetic)
    with as_executed(arithmetic):
        labels = checked_labels(graph, images, labels)
    examined = examined_rows(examine, len(images))
    options, facts = agreed(
        graph,
        (len(images), len(graph.linear) - 1 + len(bounds.joints(graph)), attempts),
        tier=tier,
        failure_probability=failure_probability,
        mode=stages[0].mode,
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
            whole_norms=whole_norms_of(graph),
            # In 64 bits, where no bit of the seed is lost, by the generator that is meant.
            key=jax.random.key(facts["seed"], impl="threefry2x32"),
            options=options,
            stages=stages,
            seconds=seconds_per_image,
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


def seed_of(tier: str, seed: int | None) -> tuple[int, str]:
    """The seed that is used, and where it is from."""
    if seed is not None:
        return checked_seed(seed), "given"
    if tier == "probabilistic":
        return drawn_seed(), "system"
    return 0, "unused"


def whole_norms_of(graph: Graph) -> tuple[WholeNorm, ...]:
    """Proven bounds of the linear nodes' whole norms. Compiled one by one: nets share them."""
    compiled = batches.compiled(whole_norm, optimize=False)
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


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images that are decided together, and what is known of them so far.

    Attributes:
        columns: images, labels, radii, and places in the whole call.
        found: verdicts, one column each, which become better in place.
        kept, worst: bounds and worst-case logits of the last walk, on which gradient steps go on.
    """

    columns: tuple[np.ndarray, ...]
    found: dict[str, np.ndarray]
    kept: Any
    worst: np.ndarray

    @property
    def undecided(self) -> np.ndarray:
        """Rows that are right, and of which there is a margin."""
        found = self.found
        return np.flatnonzero(found["correct"] & ~found["ok"] & np.isfinite(found["margin"]))

    def parts(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows a few at a time, and the same filled up, for one shape."""
        size = min(STAGE_BATCH, len(self.worst))
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            yield some, np.resize(some, size)


def decided(
    setup: Setup, rows: np.ndarray, radii: np.ndarray, attempt: int | None = None
) -> tuple[dict[str, Any], dict[tuple[int, int], np.ndarray], tuple[StageRun, ...]]:
    """`verdicts.verdict` of images, each at its own radius, by the norms of the tier.

    Args:
        rows: positions of the images in the whole call.
        attempt: of a radius; each draws anew.

    Returns:
        The verdicts, the slopes that some of them rest on, by row and rival, and what each stage
        came to, if there are several.
    """
    slopes: dict[tuple[int, int], np.ndarray] = {}
    with batches.exact():
        key = setup.key if attempt is None else jax.random.fold_in(setup.key, attempt)

        def run(columns):
            batch, seconds = _walked(setup, columns, key, setup.stages[0].mode, setup.stages[1:])
            if setup.stages[1:]:
                _in_stages(setup, batch, seconds, slopes)
            return batch.found

        columns = (setup.labels[rows], normal(radii), rows)
        found = _batched(setup, run, setup.images[rows], *columns)
    return found, slopes, _runs(setup, rows, found)


def _in_stages(setup: Setup, batch: Batch, seconds: float, slopes) -> None:
    """The stages behind the first one, each on all images of the batch that are undecided, as far
    as the time goes. `seconds`: of the first."""
    found = batch.found
    count = len(batch.worst)
    # By stage, the seconds that went into each image, and the stage that certified it, -1 for none.
    found["spent"] = np.zeros((count, len(setup.stages)))
    found["spent"][:, 0] = seconds / count
    found["by"] = np.where(found["ok"], 0, -1)
    for k, stage in enumerate(setup.stages[1:], 1):
        rows = batch.undecided
        if not len(rows):
            return
        # All that are undecided have been through the same stages.
        spent = found["spent"][rows[0]]
        costs = [
            (before.passes(setup.graph), spent[i]) for i, before in enumerate(setup.stages[:k])
        ]
        if not affordable(costs, stage.passes(setup.graph), setup.seconds):
            return
        tried = _anew if stage.mode else _improve
        found["spent"][rows, k] = tried(setup, batch, rows, stage, slopes) / len(rows)
        found["by"][rows[found["ok"][rows]]] = k


def _walked(setup: Setup, columns, key, mode: str, keep) -> tuple[Batch, float]:
    """A batch, decided by a walk in this mode, and seconds; `keep`: with what was found on it."""
    options = {**setup.options, "mode": mode, "keep": bool(keep)}
    shared = (setup.graph, setup.whole_norms, key)
    run = _program(setup, verdicts.certify_batch, shared, options)
    (found, kept), seconds = _timed(setup, run, columns)
    bound, worst = (None, np.zeros(0)) if kept is None else kept
    found = {name: np.array(column) for name, column in found.items()}
    return Batch(columns, found, bound, np.array(worst)), seconds


def _anew(setup: Setup, batch: Batch, rows: np.ndarray, stage: Stage, slopes) -> float:
    """A stage that walks anew, with draws of its own, and seconds.

    Of what it does not certify nothing is taken: the verdicts of those stay what others find too.
    """
    key = jax.random.fold_in(setup.key, ANEW)
    seconds = 0.0
    for some, padded in batch.parts(rows):
        columns = tuple(column[padded] for column in batch.columns)
        again, more = _walked(setup, columns, key, stage.mode, stage.steps)
        seconds += more
        left = again.undecided
        left = left[left < len(some)]
        if stage.steps and len(left):
            seconds += _improve(setup, again, left, stage, slopes)
        use = np.flatnonzero(again.found["ok"][: len(some)])
        for name, column in again.found.items():
            batch.found[name][some[use]] = column[use]
    return seconds


def _improve(setup: Setup, batch: Batch, rows: np.ndarray, stage: Stage, slopes) -> float:
    """A stage that starts from regions and norms as they were proved before, and seconds.

    It draws nothing: so it takes nothing of the failure probability, however it depends on what was
    drawn.

    Args:
        rows: of the batch, which are right and undecided.
        slopes: where those are put that a positive verdict rests on, by place and rival.
    """
    found = batch.found
    _, labels, _, places = batch.columns
    options = {"arithmetics": setup.options["arithmetics"], "steps": stage.steps}
    shared = (setup.graph, setup.global_norms)
    run = _program(setup, verdicts.tightened_batch, shared, options)
    seconds = 0.0
    for some, padded in batch.parts(rows):
        columns = (labels[padded], _rows_of(batch.kept, padded), batch.worst[padded])
        out, more = _timed(setup, run, columns)
        seconds += more
        better = {name: column[: len(some)] for name, column in jax.device_get(out).items()}
        # Without a verdict the slopes are not kept, and so their margin is not said either.
        use = better["ok"] if stage.steps else better["margin"] > found["margin"][some]
        batch.worst[some[use]] = better["worst"][use]
        for name in ("ok", "margin", "allowance"):
            found[name][some[use]] = better[name][use]
        for i in np.flatnonzero(use) if stage.steps else ():
            for rival, used in zip(better["rivals"][i], better["slopes"][i], strict=True):
                if rival >= 0:
                    slopes[int(places[some[i]]), int(rival)] = used
    return seconds


def _runs(setup: Setup, rows: np.ndarray, found: dict[str, Any]) -> tuple[StageRun, ...]:
    """What each stage came to, from two columns that are taken off."""
    if not setup.stages[1:]:
        return ()
    spent = found.pop("spent")
    by = found.pop("by")
    return tuple(
        StageRun(
            name=stage.name,
            passes=stage.passes(setup.graph),
            images=rows[spent[:, k] > 0],
            certified=rows[by == k],
            seconds=float(np.sum(spent[:, k])),
        )
        for k, stage in enumerate(setup.stages)
        if np.any(spent[:, k] > 0)
    )


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


def _timed(setup: Setup, run, columns):
    """What a program of `_program` returns, and the seconds it takes, compiled if it is a stage."""
    if setup.stages[1:]:
        batches.compile_for(run, columns)
    start = time.monotonic()
    found = jax.block_until_ready(run(columns))
    return found, time.monotonic() - start


def _batched(setup: Setup, run, images, *columns):
    columns = (images.astype(np.float64), *columns)
    return batches.batched(run, setup.batch_size, *columns, context=batches.exact)
