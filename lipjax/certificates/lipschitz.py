"""Proofs of how fast a function can change on a region, and of the values that it can take there.

`certify_lipschitz` is the proof beside the estimate `bounds.local_lipschitz`: norms are bounded
from above, in one of two tiers, and all that the bounds' own arithmetic rounds is turned outwards.
`certificates.ranges` proves intervals of the outputs with the same walk.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipjax import bounds, rounding
from lipjax.bounds import lipschitz
from lipjax.bounds.two_points import TwoPointWalk
from lipjax.certificates import batches, checks
from lipjax.certificates.results import Proof, said
from lipjax.certificates.setup import agreed, in_float64, whole_norms_of
from lipjax.certificates.verdicts import norm_of_tier, view
from lipjax.graph import Graph
from lipjax.norms import best, chebyshev


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class LipschitzCertificate(Proof):
    """What is proved of each of N regions. NumPy arrays; all statements of one hold together.

    For any two points a and b of region n, with f the real-number function,

        ||f(a) - f(b)|| <= lipschitz[n] ||a - b||_2          in the output norm,
        |f_i(a) - f_i(b)| <= per_output[n, i] ||a - b||_2,

    and with f as executed in `arithmetic`, by the error model of `lipjax.rounding`, the same with
    `rounding[n]` or `rounding_per_output[n, i]` added on the right. Where nothing could be proved
    the bound is infinite.

    Attributes:
        lipschitz, rounding: ``(N,)``.
        per_output, rounding_per_output: ``(N, outputs)``.
        output_norm: as given.
    """

    lipschitz: np.ndarray
    rounding: np.ndarray
    per_output: np.ndarray
    rounding_per_output: np.ndarray
    output_norm: str

    def __repr__(self) -> str:
        count, outputs = self.per_output.shape
        values = f"lipschitz {_spread(self.lipschitz)}, rounding {_spread(self.rounding)}"
        return (
            f"LipschitzCertificate({said(self)}; {count} regions, {outputs} outputs, "
            f"l2 to {self.output_norm}, mode {self.mode}:\n  {values})"
        )


def _spread(values: np.ndarray) -> str:
    if values.size == 1:
        return f"{values.item():.4g}"
    return f"{values.min():.4g} to {values.max():.4g}"


def certify_lipschitz(
    f: Callable,
    x,
    epsilon=None,
    *,
    box=None,
    output_norm: str = "l2",
    tier: str = "probabilistic",
    failure_probability: float = 1e-6,
    mode: str = "linear",
    arithmetic: str | None = None,
    budget: float = best.BUDGET,
    seed: int | None = None,
    batch_size: int = 256,
) -> LipschitzCertificate:
    """Proves, region by region, how fast f can change between any two points.

    **Guarantee**: that of `LipschitzCertificate`; in tier "probabilistic" with probability >=
    1 - failure_probability over the tool's own draws, in tier "deterministic" without any. As
    `certify`, but for any vector-valued f and any inputs: no pixels are meant.

    Args:
        f: a function of one example that JAX traces; its value is a vector.
        x: ``(N, ...)``, the regions' centers, floats.
        epsilon: l2 radius >= 0, a number or ``(N,)``; None: only the box counts.
        box: half-widths >= 0 of boxes around x, a number or what broadcasts to x; None: only the
            ball counts. With both the regions are what they share. A coordinate of half-width 0 is
            held fixed.
        output_norm, mode: as in `local_lipschitz`.
        tier, failure_probability, arithmetic, budget, seed: as in `certify`.
        batch_size: regions at once; no influence on the result.

    Raises:
        TypeError, ValueError: as `local_lipschitz`; x not a batch of finite numbers, or float64
            numbers that are no float32 ones while JAX has 64 bits off; what `certify` says of
            networks and tiers.
    """
    lipschitz.check_options(output_norm, mode)
    proof = RegionProof(
        f, x, epsilon, box, tier, failure_probability, mode, arithmetic, budget, seed
    )
    out = proof.run(batch_size)
    errors = out["executed"]
    # Two executions, each as far off as that; both sums are rounded up.
    each = np.nextafter(2 * errors, np.inf)
    together = np.max(each, axis=1)
    if output_norm == "l2":
        together = np.sqrt(np.sum(np.square(each), axis=1)) * (1 + 1e-12) + 1e-150
    return LipschitzCertificate(
        lipschitz=out[output_norm],
        rounding=together,
        per_output=out["per_output"],
        rounding_per_output=each,
        output_norm=output_norm,
        **proof.facts,
    )


# ------------------------------------------------------------------------------- what proofs share


class RegionProof:
    """Checked arguments of a proof about regions, and the way to its figures.

    Raises:
        TypeError, ValueError: as `certify_lipschitz`.
    """

    def __init__(
        self, f, x, epsilon, box, tier, failure_probability, mode, arithmetic, budget, seed
    ):
        points = _check_points(x)
        self.columns = (points.astype(np.float64), *_regions(points, epsilon, box))
        graph = checks.certifiable(f, points, tier, failure_probability, arithmetic, name="x")
        lipschitz.check_whole(graph)
        self.graph = _without_head(graph)
        # Of each region, the norms of the linear nodes and that of the rows of the outputs.
        self.options, facts = agreed(
            self.graph,
            (len(points), len(self.graph.linear) + 1, 1),
            tier=tier,
            failure_probability=failure_probability,
            mode=mode,
            arithmetic=arithmetic,
            budget=budget,
            seed=seed,
        )
        self.facts = {"mode": mode, **facts}

    def run(self, batch_size: int) -> dict[str, np.ndarray]:
        """The figures of `_prove_batch`, one row a region."""
        size = min(batch_size, len(self.columns[0]))
        with batches.exact():
            graph = in_float64(self.graph)
            key = jax.random.key(self.facts["seed"], impl="threefry2x32")
            shared = (graph, whole_norms_of(graph), key)
            compiled = batches.compiled(_prove_batch, *self.options, optimize=False)
            run = functools.partial(compiled, shared, **self.options)
            indices = np.arange(len(self.columns[0]))
            return batches.batched(run, size, *self.columns, indices, context=batches.exact)


def _prove_batch(
    shared, columns, *, mode, tier, failure_probability, arithmetics, budget
) -> dict[str, jax.Array]:
    graph, whole_norms, key = shared

    def one(x, epsilon, box, index):
        fresh = jax.random.fold_in(key, index)

        def norm(k, operator, like, *masks):
            def start():
                return chebyshev.starts(jax.random.fold_in(fresh, k), [like.size])[0]

            how = tier, failure_probability, budget, whole_norms
            return norm_of_tier(*how, k, start, operator, like, *masks)

        return _prove(graph, x, epsilon, box, mode, norm, arithmetics, whole_norms)

    return jax.vmap(one)(*columns)


def _prove(graph, x, epsilon, box, mode, norm, arithmetics, whole_norms) -> dict[str, Any]:
    """Constants, box and rounding of one region; infinite where the arithmetic broke down."""
    outward = rounding.OUTWARD
    walk = TwoPointWalk(graph, bounds.mode_of(mode), norm, view, outward)
    found = walk(x, epsilon, box)
    variations = found.pop("variations")
    boxes = [(v.lower, v.upper) for v in variations]
    largest = [norm.bound for norm in whole_norms]
    executed = rounding.forward_error(graph, boxes, arithmetics, largest, view)

    # An overflow or NaN anywhere, even one that a minimum hides later, proves nothing.
    numbers = [(v.lower, v.upper, v.center, v.rates, v.rate, v.entries) for v in variations]
    leaves = [leaf for leaf in jax.tree.leaves((numbers, graph)) if _is_float(leaf)]
    sound = jnp.array([jnp.all(jnp.abs(leaf) < rounding.LARGEST) for leaf in leaves])
    sound = jnp.all(sound) & jnp.all(jnp.isfinite(executed))
    lower = jnp.where(sound, found.pop("lower"), -jnp.inf)
    bounded = {name: jnp.where(sound, value, jnp.inf) for name, value in found.items()}
    return {**bounded, "lower": lower, "executed": jnp.where(sound, executed, jnp.inf)}


def _is_float(leaf) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _without_head(graph: Graph) -> Graph:
    """Without the identity that stands behind a function which does not end in a linear node."""
    last = graph.nodes[-1]
    if last.executed or last.where:
        return graph
    return dataclasses.replace(graph, nodes=graph.nodes[:-1])


def _check_points(x) -> np.ndarray:
    points = np.asarray(x)
    if points.ndim < 2 or len(points) == 0:
        raise ValueError(
            f"x must be a non-empty batch of centers (N, ...), got shape {points.shape}. For one "
            "region give x[None]."
        )
    if points.dtype not in (np.float32, np.float64):
        raise TypeError(f"x must be float32 or float64, got {points.dtype}.")
    if not np.all(np.isfinite(points)):
        raise ValueError("x must be finite, got NaN or infinity.")
    return points


def _regions(points: np.ndarray, epsilon, box) -> tuple[np.ndarray, np.ndarray]:
    """Radii ``(N,)``, infinite without a ball, and half-widths of the points' shape."""
    if epsilon is None and box is None:
        lipschitz.check_region(epsilon, box)
    radii = np.full(len(points), np.inf)
    if epsilon is not None:
        radii = _broadcast("epsilon", epsilon, radii.shape)
    half = np.full(points.shape, np.inf)
    if box is not None:
        half = _broadcast("box", box, points.shape)
    return radii, half


def _broadcast(name: str, value, shape) -> np.ndarray:
    value = np.asarray(value, np.float64)
    try:
        found = np.array(np.broadcast_to(value, shape))
    except ValueError:
        raise ValueError(f"{name} of shape {value.shape} does not fit {shape}.") from None
    if not np.all((found >= 0) & np.isfinite(found)):
        raise ValueError(f"{name} must be finite and >= 0, got {value}.")
    return checks.normal(found)
