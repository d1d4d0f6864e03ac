"""`local_lipschitz`: how fast a function can change around a point; an estimate.

The bound is that of `bounds.two_points`, its norms are power iterations.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lipjax.bounds.modes import Mode, mode_of
from lipjax.bounds.regions import check_epsilon
from lipjax.bounds.two_points import TwoPointWalk
from lipjax.graph import Graph, trace
from lipjax.norms import power
from lipjax.runtime import kept

OUTPUT_NORMS = ("l2", "linf")
LIPSCHITZ_MODES = ("local", "linear", "rows")
# Power iterations of each norm of an estimate: from random starts, as in `bound`.
ITERATIONS = 50


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["lipschitz", "per_output", "lower", "upper"],
    meta_fields=["output_norm", "mode"],
)
@dataclasses.dataclass(frozen=True)
class LipschitzEstimate:
    """What `local_lipschitz` found. A pytree. **An estimate**: no proof of anything.

    Attributes:
        lipschitz: scalar, from l2 to `output_norm`.
        per_output: ``(outputs,)``, of each output alone.
        lower, upper: ``(outputs,)``, the box of the outputs.
        output_norm, mode: as given.
    """

    lipschitz: jax.Array
    per_output: jax.Array
    lower: jax.Array
    upper: jax.Array
    output_norm: str
    mode: str

    @property
    def tier(self) -> str:
        return "estimate"

    def __repr__(self) -> str:
        return (
            f"LipschitzEstimate(tier estimate, no proof; l2 to {self.output_norm}, mode "
            f"{self.mode}:\n  lipschitz {self.lipschitz}, per output {self.per_output})"
        )


def local_lipschitz(
    f: Callable | Graph,
    x: jax.Array,
    epsilon=None,
    *,
    box=None,
    output_norm: str = "l2",
    mode: str = "linear",
    iterations: int = ITERATIONS,
    key: jax.Array | None = None,
) -> LipschitzEstimate:
    """How fast f can change around x: **an estimate** of a Lipschitz constant of the region.

    For proofs see `lipjax.certify_lipschitz`. With exact norms and no rounding, for any two points
    a and b of the region, ``|f(a) - f(b)| <= lipschitz ||a - b||_2`` in the output norm, and
    ``|f_i(a) - f_i(b)| <= per_output_i ||a - b||_2``. Norms are power iterations, from below.
    Differentiable in the parameters of f, in x and in the region; goes through `jit` and `vmap`.

    Args:
        f: a function of one example that JAX traces (`lipjax.trace`), or its graph; its value is a
            vector.
        x: the center, one example, floats. `vmap` makes many.
        epsilon: l2 radius >= 0, in the units of x; None: only the box counts.
        box: half-widths >= 0 of a box around x, a number or an array that fits x; None: only the
            ball counts. With both the region is what they share. A coordinate of half-width 0 is
            held fixed; where nothing can move the constant is 0.
        output_norm: "l2" or "linf", of the outputs.
        mode: "local": norms of masked matrices. "linear": in addition a reverse pass for each
            output. "rows": in addition one for each input of an activation, by entries of the
            Jacobian: for small networks far the tightest.
        iterations: of each norm.
        key: of the random starts. None: the same in every call, and then an error where a norm is
            differentiated (in the parameters, with smooth activations also in x): training would
            hide from them (`bound`).

    Returns:
        A `LipschitzEstimate`.

    Raises:
        TypeError: what has no bound, by name and line (`lipjax.trace`), a softmax at the end
            included; a value that is no vector; x not floating.
        ValueError: neither epsilon nor box, or one that is negative, NaN or infinite; unknown
            output norm or mode; iterations < 1.
    """
    check_region(epsilon, box)
    check_options(output_norm, mode)
    if iterations < 1:
        raise ValueError(f"iterations must be >= 1, got {iterations}.")
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating, got {x.dtype}.")

    graph = vector_graph(f, x)
    found = _found(graph, x, epsilon, box, key, mode=mode_of(mode), iterations=iterations)
    lipschitz = found[output_norm]
    return LipschitzEstimate(
        lipschitz, found["per_output"], found["lower"], found["upper"], output_norm, mode
    )


def _walked(graph: Graph, x: jax.Array, epsilon, box, key, *, mode: Mode, iterations: int):
    """The arrays of a `LipschitzEstimate` by both output norms, given the arguments of
    `local_lipschitz`."""

    def norm(k, operator, like, mask_in, mask_out):
        start_key = jax.random.fold_in(jax.random.key(0) if key is None else key, k)
        start = jax.random.normal(start_key, like.shape, like.dtype)
        sigma, _ = power.power_iteration(operator, start, iterations, mask_in, mask_out)
        return _not_trained_with(sigma) if key is None else sigma

    found = TwoPointWalk(graph, mode, norm)(x, epsilon, box)
    return {name: found[name] for name in (*OUTPUT_NORMS, "per_output", "lower", "upper")}


_found = kept.by_itself(_walked, "mode", "iterations")


@jax.custom_jvp
def _not_trained_with(sigma: jax.Array) -> jax.Array:
    """`sigma`; to differentiate it is an error."""
    return sigma


@_not_trained_with.defjvp
def _refuse(primals, tangents):
    raise ValueError(
        "lipjax.local_lipschitz was differentiated without key=: its power iterations would begin "
        "with the same vectors in every step, and a network trained so hides its norms from them. "
        "Pass key=, a fresh one in each step."
    )


def vector_graph(f: Callable | Graph, example) -> Graph:
    """The graph of a function whose value is a vector.

    Raises:
        TypeError: its value has another number of axes than one, or is a softmax.
    """
    graph = f if isinstance(f, Graph) else trace(f, example)
    check_whole(graph)
    if len(graph.shape) != 1:
        raise TypeError(
            f"the value has shape {graph.shape}: expected one axis, of outputs. Flatten it."
        )
    return graph


def check_whole(graph: Graph) -> None:
    """Raises a TypeError for a graph that is not all of its function."""
    if graph.left_out:
        raise TypeError(
            f"f ends in a {graph.left_out}, which has no bound: only the logits in front of it "
            "have. Return the logits."
        )


def check_options(output_norm: str, mode: str) -> None:
    """Raises a ValueError for an unknown norm or mode."""
    if output_norm not in OUTPUT_NORMS:
        names = ", ".join(OUTPUT_NORMS)
        raise ValueError(f"output_norm must be one of {names}, got {output_norm!r}.")
    if mode not in LIPSCHITZ_MODES:
        names = ", ".join(LIPSCHITZ_MODES)
        raise ValueError(f"mode must be one of {names}, got {mode!r}.")


def check_region(epsilon, box) -> None:
    """Raises a ValueError for a region that is none, as far as it is known here."""
    if epsilon is None and box is None:
        raise ValueError("the region is missing: give epsilon, an l2 radius, or box, half-widths.")
    if epsilon is not None:
        check_epsilon(epsilon)
    if box is None or isinstance(box, jax.core.Tracer):
        return
    if not np.all((np.asarray(box) >= 0) & np.isfinite(np.asarray(box))):
        raise ValueError(f"box must be finite half-widths >= 0, got {box}.")
