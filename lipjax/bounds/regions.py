"""What is known of a node of a graph while the example moves in a ball: regions, and bounds made of
them."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from lipjax import activations, rounding
from lipjax.graph import Graph
from lipjax.graph.linear import larger


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["center", "radius", "lower", "upper"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Region:
    """Where a value h(x') can be for every x' within epsilon of x: in a ball and in a box.

    Attributes:
        center: h(x), of the value's shape.
        radius: scalar, ``||h(x') - h(x)||_2 <= radius``.
        lower, upper: ``lower <= h(x') <= upper``, of the value's shape.
    """

    center: jax.Array
    radius: jax.Array
    lower: jax.Array
    upper: jax.Array

    @property
    def varies(self) -> jax.Array:
        """Mask of the coordinates that can change (a NaN counts as varying)."""
        return activations.varies(self.lower, self.upper)

    @property
    def magnitude(self) -> jax.Array:
        """``max(|lower|, |upper|)``."""
        return jnp.maximum(jnp.abs(self.lower), jnp.abs(self.upper))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["graph", "lipschitz", "norms", "radii", "regions", "vectors"],
    meta_fields=["mode", "rivals"],
)
@dataclasses.dataclass(frozen=True)
class Bound:
    """What `bound` knows of one example. A pytree: it goes through `jit`, `vmap` and `grad`.

    Attributes:
        graph: of the function, its parameters included.
        lipschitz: scalar, Lipschitz constant on the ball around x, from the example to the input
            of the last linear node: the product of `norms` in a sequence, times the constants of
            activations above 1 and the root of the copies where padding copies entries; sums where
            nodes add.
        norms: one scalar per linear node but the last.
        radii: of each of those how far its value can be from the center, but for what moves no
            output of the activation behind.
        regions: ``regions[i]`` is what is known of node i of the graph.
        vectors: last vectors of the power iterations, to start the next from. A dict with "local"
            (per example) and "global" (shared by all), where the mode has them (`Mode.vectors`);
            each a tuple of arrays, one per linear node but the last.
        mode: its name.
        rivals: as given to `bound`.
    """

    graph: Graph
    lipschitz: jax.Array
    norms: tuple[jax.Array, ...]
    radii: tuple[jax.Array, ...]
    regions: tuple[Region, ...]
    vectors: Any
    mode: str
    rivals: int | None = None

    @property
    def logits(self) -> jax.Array:
        """The value at x."""
        return self.regions[-1].center

    @property
    def input(self) -> Region:
        """The ball around x."""
        return self.regions[0]

    @property
    def penultimate(self) -> Region:
        """What is known of the input of the last linear node."""
        return self.regions[self.graph.nodes[-1].inputs[0]]


def check_epsilon(epsilon) -> None:
    """Raises a ValueError for a radius that is known here and negative, NaN or infinite."""
    if isinstance(epsilon, jax.core.Tracer):
        return
    if not (float(epsilon) >= 0 and math.isfinite(float(epsilon))):
        raise ValueError(
            f"epsilon must be finite and >= 0 (an l2 radius on pixels in [0, 1]), got {epsilon}."
        )


def ball_region(center: jax.Array, radius: jax.Array, arithmetic: rounding.Rounding) -> Region:
    """A ball, and the box around it."""
    # Nothing varies in a ball of radius 0: there the two ends must stay equal.
    lower, upper = arithmetic.widened(center - radius, center + radius, 0.0)
    still = radius == 0
    lower = jnp.where(still, center, lower)
    upper = jnp.where(still, center, upper)
    return Region(center, radius, lower, upper)


def half_diagonal(region: Region, arithmetic: rounding.Rounding) -> jax.Array:
    """The distance from the center to the farthest corner of the box."""
    return arithmetic.length(larger(region.upper - region.center, region.center - region.lower))
