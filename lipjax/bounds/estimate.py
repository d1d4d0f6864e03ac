"""`bound`: a local Lipschitz bound of one example, from power iterations; an estimate."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lipjax import spectral
from lipjax.bounds.modes import mode_of
from lipjax.bounds.regions import Bound, Walk, check_epsilon
from lipjax.graph import Graph, trace

# Types that products of power iterations can be in.
PRODUCTS = ("float32", "bfloat16")


def graph_of(f: Callable | Graph, example) -> Graph:
    """The graph of a function, which a graph already is; its last node is linear."""
    graph = f if isinstance(f, Graph) else trace(f, example)
    return graph.with_head()


def vector_shapes(f: Callable | Graph, shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Shapes of the vectors of the power iterations: of the inputs of linear nodes but the last."""
    graph = graph_of(f, jax.ShapeDtypeStruct(tuple(shape), jnp.float32))
    inputs = (graph.nodes[graph.nodes[i].inputs[0]] for i in graph.linear[:-1])
    return tuple(node.shape for node in inputs)


def bound(
    f: Callable | Graph,
    x: jax.Array,
    epsilon,
    *,
    mode: str = "local",
    iterations: int = 10,
    vectors=None,
    rivals: int | None = None,
    products: str = "float32",
) -> Bound:
    """Local Lipschitz bound of one example, **an estimate**: its norms come from below.

    For certificates see `lipjax.certify`. Everything else in the bound is an upper bound: with exact
    norms, ``||h(x') - h(x)||_2`` stays within each region's radius and h(x') within its box for all
    ``||x' - x||_2 <= epsilon``. Differentiable in the parameters and in x (nothing is differentiated
    through the power iteration). Source: METHOD 1 and 2 (docs/method.md), after Huang et al.,
    NeurIPS 2021; `mode="paper"` equals their code at convergence.

    Args:
        f: a function of one example that JAX traces (`lipjax.trace`), or its graph.
        x: one example, floats. `vmap` makes the batch.
        epsilon: l2 radius >= 0, in the units of x. At 0 every coordinate is constant and the norms
            are 0 (mode "global" knows no masks and is the same for all epsilon).
        mode: "global", "bcp", "paper", "local", "linear" or "rows" (`lipjax.bounds.MODES`), each at
            most the one before at convergence. "linear" costs a reverse pass for each rival class,
            "rows" one more for each neuron.
        iterations: power iterations per norm. 0: the norm of the image of the start vector.
        vectors: start vectors, a dict as in `Bound.vectors`; None: fixed random ones. Under `vmap`
            the "global" ones are shared: ``in_axes={"global": None, "local": 0}``.
        rivals: modes "linear" and "rows": how many rival classes get the reverse pass; None: all.
        products: of the power iterations, as `spectral.power_iteration` takes it.

    Returns:
        A `Bound`.

    Raises:
        TypeError: what has no bound, by name and line (`lipjax.trace`); x not floating.
        ValueError: epsilon negative, infinite or NaN; unknown mode or products; iterations < 0;
            rivals < 1; x of a shape that f refuses.
    """
    check_epsilon(epsilon)
    if iterations < 0:
        raise ValueError(f"iterations must be >= 0, got {iterations}.")
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating, with pixels in [0, 1], got {x.dtype}.")
    chosen = mode_of(mode)
    if products not in PRODUCTS:
        raise ValueError(f"products must be one of {', '.join(PRODUCTS)}, got {products!r}.")
    if rivals is not None and rivals < 1:
        raise ValueError(f"rivals must be at least 1, or None for all, got {rivals}.")

    def power(salt: int, name: str):
        def norm(k, operator, like, mask_in, mask_out):
            if vectors is None:
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), salt), k)
                start = jax.random.normal(key, like.shape, like.dtype)
            else:
                start = vectors[name][k].astype(like.dtype)
            return spectral.power_iteration(
                operator, start, iterations, mask_in, mask_out, products
            )

        return norm

    walk = Walk(graph_of(f, x), chosen, power(0, "local"), power(1, "global"))
    return dataclasses.replace(walk(x, epsilon), rivals=rivals)
