"""`bound`: a local Lipschitz bound of one example, from power iterations; an estimate."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lipjax.bounds.modes import Mode, mode_of
from lipjax.bounds.regions import Bound, check_epsilon
from lipjax.bounds.walk import Walk
from lipjax.graph import Graph, trace
from lipjax.norms import power
from lipjax.runtime import kept

# Types that products of power iterations can be in.
PRODUCTS = ("float32", "bfloat16")
# Power iterations of `bound` by default: from random starts, and from vectors that were kept. How
# far below the norm random starts end is measured by `python -m benchmarks.starts`.
FRESH_ITERATIONS = 50
WARM_ITERATIONS = 10
# What a caller's key is folded with first; the starts of a call without a key are folded with 0 and
# 1. So nothing that one can train with, initial vectors included, starts where one evaluates.
SALTS = {"local": 2, "global": 3}


def graph_of(f: Callable | Graph, example) -> Graph:
    """The graph of a function, which a graph already is; its last node is linear."""
    graph = f if isinstance(f, Graph) else trace(f, example)
    return graph.with_head()


def vector_shapes(f: Callable | Graph, shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Shapes of the vectors of the power iterations: of the inputs of linear nodes but the last."""
    graph = graph_of(f, jax.ShapeDtypeStruct(tuple(shape), jnp.float32))
    inputs = (graph.nodes[graph.nodes[i].inputs[0]] for i in graph.linear[:-1])
    return tuple(node.shape for node in inputs)


def initial_vectors(
    f: Callable | Graph, shape: Sequence[int], mode: str = "local", key: jax.Array | None = None
):
    """Standard normal start vectors of one example, as `bound` takes them: as `Bound.vectors`.

    With a key they are those of ``bound(..., key=key)``, without one always the same: good to
    begin with where vectors are kept, easily hidden from if used in every step (see `bound`).
    """
    chosen = mode_of(mode)
    key = jax.random.key(0) if key is None else key
    shapes = vector_shapes(f, shape)

    def starts(name):
        return (jax.random.normal(_start_key(key, name, k), s) for k, s in enumerate(shapes))

    return {name: tuple(starts(name)) for name in chosen.vectors}


def _start_key(key, name, k):
    return jax.random.fold_in(jax.random.fold_in(key, SALTS[name]), k)


@jax.custom_jvp
def _not_trained_with(sigma: jax.Array) -> jax.Array:
    """`sigma`; to differentiate it is an error."""
    return sigma


@_not_trained_with.defjvp
def _refuse(primals, tangents):
    raise ValueError(
        "lipjax.bound was differentiated with neither key= nor vectors=: its power iterations "
        "would begin with the same vectors in every step, and a network trained so hides its "
        "norms from them. Pass key=, a fresh one in each step, or vectors=, the last step's "
        "Bound.vectors, best both: see the page 'Local Lipschitz as a regulariser', "
        "docs/regulariser.md. What is only watched takes jax.lax.stop_gradient(network)."
    )


def bound(
    f: Callable | Graph,
    x: jax.Array,
    epsilon,
    *,
    mode: str = "local",
    iterations: int | None = None,
    vectors=None,
    key: jax.Array | None = None,
    rivals: int | None = None,
    products: str = "float32",
    shared_iterations: int | None = None,
) -> Bound:
    """Local Lipschitz bound of one example, **an estimate**: its norms come from below.

    For certificates see `lipjax.certify`. Everything else in the bound is an upper bound: with
    exact norms, ``||h(x') - h(x)||_2`` stays within each region's radius and h(x') within its box
    for all ``||x' - x||_2 <= epsilon``. Differentiable in the parameters and in x (nothing is
    differentiated through the power iteration).

    **To train with it, pass `key`, fresh in each step, or `vectors`, kept from step to step, best
    both.** From a start that is always the same a network learns to hide its norms, so without
    either a gradient in the parameters of a norm is an error (one in x or epsilon alone is none).
    That key and vectors really change from step to step is up to you.

    Source: METHOD 1 and 2 (docs/method.md), after Huang et al., NeurIPS 2021; `mode="paper"` equals
    their code at convergence.

    Args:
        f: a function of one example that JAX traces (`lipjax.trace`), or its graph.
        x: one example, floats. `vmap` makes the batch.
        epsilon: l2 radius >= 0, in the units of x. At 0 every coordinate is constant and the norms
            are 0 (mode "global" knows no masks and is the same for all epsilon).
        mode: "global", "bcp", "paper", "local", "linear" (`lipjax.bounds.MODES`), each at most the
            one before at convergence, "rows" or "tight", both at most "local", or "tight_rows".
            "linear" and "tight" cost a reverse pass for each rival class, "rows" one more for each
            neuron, "tight_rows" two.
        iterations: power iterations per norm. 0: the norm of the image of the start vector.
            None: `WARM_ITERATIONS`, 10, with `vectors`, else `FRESH_ITERATIONS`, 50.
        vectors: start vectors, a dict as in `Bound.vectors`; None: random ones. Under `vmap` the
            "global" ones are shared: ``in_axes={"global": None, "local": 0}``.
        key: a key of `jax.random`. Alone: the random start vectors are drawn from it. With
            `vectors`: they get a fresh part from it, or they may stay where the norm is not
            (`norms.power.refresh`). Under `vmap` one key serves all examples, ``in_axes=None``: it
            has to be new in each step, not in each example, and with one for each the "global"
            norms are computed for each. None: random start vectors are the same in every call.
        rivals: modes "linear", "rows" and "tight": how many rival classes get the reverse pass;
            None: all.
        products: of the power iterations, as `norms.power.power_iteration` takes it.
        shared_iterations: of the "global" norms; None: as `iterations`. They are the same for all
            examples of a batch, so that many of them cost little.

    Returns:
        A `Bound`.

    Raises:
        TypeError: what has no bound, by name and line (`lipjax.trace`); x not floating.
        ValueError: epsilon negative, infinite or NaN; unknown mode or products; iterations < 0;
            rivals < 1; x of a shape that f refuses; differentiated in a norm's parameters with
            neither `key` nor `vectors`.
    """
    check_epsilon(epsilon)
    if iterations is None:
        iterations = FRESH_ITERATIONS if vectors is None else WARM_ITERATIONS
    if shared_iterations is None:
        shared_iterations = iterations
    if min(iterations, shared_iterations) < 0:
        raise ValueError(
            f"iterations must be >= 0, got {iterations} and {shared_iterations} shared ones."
        )
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating, with pixels in [0, 1], got {x.dtype}.")
    chosen = mode_of(mode)
    if products not in PRODUCTS:
        raise ValueError(f"products must be one of {', '.join(PRODUCTS)}, got {products!r}.")
    if rivals is not None and rivals < 1:
        raise ValueError(f"rivals must be at least 1, or None for all, got {rivals}.")

    found = _bound(
        graph_of(f, x),
        x,
        epsilon,
        vectors,
        key,
        mode=chosen,
        products=products,
        iterations=iterations,
        shared_iterations=shared_iterations,
    )
    return dataclasses.replace(found, rivals=rivals)


def _walked(
    graph: Graph,
    x: jax.Array,
    epsilon,
    vectors,
    key,
    *,
    mode: Mode,
    products: str,
    iterations: int,
    shared_iterations: int,
) -> Bound:
    """The bound, given the arguments of `bound`."""
    counts = {"local": iterations, "global": shared_iterations}
    trainable = key is not None or vectors is not None

    def start_of(name: str, k: int, like):
        if vectors is not None:
            start = vectors[name][k].astype(like.dtype)
            return start if key is None else power.refresh(start, _start_key(key, name, k))
        if key is not None:
            return jax.random.normal(_start_key(key, name, k), like.shape, like.dtype)
        fixed = jax.random.fold_in(jax.random.key(0), ("local", "global").index(name))
        return jax.random.normal(jax.random.fold_in(fixed, k), like.shape, like.dtype)

    def norm_function(name: str):
        def norm(k, operator, like, *masks):
            start = start_of(name, k, like)
            sigma, vector = power.power_iteration(operator, start, counts[name], *masks, products)
            return sigma if trainable else _not_trained_with(sigma), vector

        return norm

    return Walk(graph, mode, norm_function("local"), norm_function("global"))(x, epsilon)


_bound = kept.by_itself(_walked, "mode", "products", "iterations", "shared_iterations")
