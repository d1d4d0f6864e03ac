"""What is known of every node of a graph while the example moves in a ball: regions, and the walk
that finds them."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lipjax import activations, rounding
from lipjax.bounds.modes import Mode
from lipjax.graph import Activation, Add, Graph, Input, Linear, Rearrange
from lipjax.graph.linear import LinearOperator, larger, safe_norm, smaller


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
    data_fields=["graph", "lipschitz", "norms", "regions", "vectors"],
    meta_fields=["mode", "rivals"],
)
@dataclasses.dataclass(frozen=True)
class Bound:
    """What `bound` knows of one example. A pytree: it goes through `jit`, `vmap` and `grad`.

    Attributes:
        graph: of the function, its parameters included.
        lipschitz: scalar, Lipschitz constant on the ball around x, from the example to the input
            of the last linear node: the product of `norms` in a sequence, sums where nodes add.
        norms: one scalar per linear node but the last.
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


# norm(k, operator, like, mask_in, mask_out) -> (sigma, vector); k counts the linear nodes. Masks
# are None for a whole norm. The walk is the same for estimates and certificates; only this differs.
NormFunction = Callable[..., tuple[jax.Array, Any]]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["region", "lipschitz", "whole_radius", "masked_radius"],
    meta_fields=["is_ball"],
)
@dataclasses.dataclass(frozen=True)
class Known:
    """What the walk carries of a node.

    Attributes:
        region: of its value.
        lipschitz: from the example to it.
        whole_radius: its radius by the whole norms, for boxes "as in the paper".
        masked_radius: radius that holds once the activation behind is passed, whose dead rows it
            leaves out; None where it has no such.
        is_ball: is it the ball of the example, perhaps in another shape?
    """

    region: Region
    lipschitz: jax.Array
    whole_radius: jax.Array
    masked_radius: jax.Array | None = None
    is_ball: bool = False


@dataclasses.dataclass(frozen=True)
class Walk:
    """How to carry regions through a graph; sound iff the norm functions bound from above.

    With `rounding.OUTWARD`, in float64, this includes the rounding of the walk itself: every exact
    value lies in its box, and within its radius of the center *as computed*. A constant coordinate
    stays exactly constant: its two ends, the center and the exact value are the same number.

    Attributes:
        graph: its last node is Linear.
        mode: which bound.
        local_norm, global_norm: of a linear node.
        view: ``(operator, like) -> operator``, the same map in the form that computes best.
        arithmetic: `rounding.EXACT` or `rounding.OUTWARD`.
    """

    graph: Graph
    mode: Mode
    local_norm: NormFunction
    global_norm: NormFunction
    view: Callable = lambda operator, like: operator
    arithmetic: rounding.Rounding = rounding.EXACT

    def __call__(self, x: jax.Array, epsilon: jax.Array) -> Bound:
        """The bound of one example x on the ball of this radius."""
        epsilon = jnp.asarray(epsilon, x.dtype)
        known: list[Known] = []
        norms: list[jax.Array] = []
        vectors: dict[str, list] = {"global": [], "local": []}
        for i, node in enumerate(self.graph.nodes):
            before = [known[j] for j in node.inputs]
            if isinstance(node, Input):
                ball = _ball(x, epsilon, self.arithmetic)
                known.append(Known(ball, jnp.ones((), x.dtype), epsilon, is_ball=True))
            elif isinstance(node, Rearrange):
                known.append(self.rearranged(node, before))
            elif isinstance(node, Add):
                known.append(self.added(node, before))
            elif isinstance(node, Activation):
                known.append(self.activated(node, *before))
            else:
                assert isinstance(node, Linear)
                found = self.transformed(i, node, before[0], known, norms, vectors)
                known.append(found)
        kept = {name: tuple(vectors[name]) for name in self.mode.vectors}
        regions = tuple(k.region for k in known)
        head = self.graph.nodes[-1].inputs[0]
        return Bound(self.graph, known[head].lipschitz, tuple(norms), regions, kept, self.mode.name)

    # -------------------------------------------------------------------------------- one node

    def rearranged(self, node: Rearrange, before: Sequence[Known]) -> Known:
        up = self.arithmetic.up
        parts = [k.region for k in before]
        spread = 1.0 if node.copies == 1 else math.sqrt(node.copies)

        def together(values):
            """The l2 norm of what each input contributes."""
            total = values[0] if len(values) == 1 else safe_norm(jnp.stack(values))
            exact = len(values) == 1 and node.copies == 1
            return total if exact else up(total * spread, len(values))

        region = Region(
            node(*(p.center for p in parts)),
            together([p.radius for p in parts]),
            node(*(p.lower for p in parts)),
            node(*(p.upper for p in parts)),
        )
        masked = None
        if len(before) == 1 and before[0].masked_radius is not None:
            masked = together([before[0].masked_radius])
        return Known(
            region,
            together([k.lipschitz for k in before]),
            together([k.whole_radius for k in before]),
            masked,
            is_ball=node.pure and before[0].is_ball,
        )

    def added(self, node: Add, before: Sequence[Known]) -> Known:
        arithmetic, parts = self.arithmetic, [k.region for k in before]
        up, terms = arithmetic.up, len(parts)
        center = _signed_sum(node, [p.center for p in parts])
        if terms == 1 and node.constant is None and node.signs == (1,):
            return before[0]  # a cast: the same real number
        # Adding the constant rounds nothing that the sums of the slack do not cover.
        moved = arithmetic.norm(4 * rounding.DOUBLE * _magnitude(node, [p.center for p in parts]))
        radius = up(sum(p.radius for p in parts[1:]) + parts[0].radius + moved, terms + 1)
        whole = up(
            sum(k.whole_radius for k in before[1:]) + before[0].whole_radius + moved, terms + 1
        )
        lipschitz = before[0].lipschitz
        if terms > 1:
            lipschitz = up(sum(k.lipschitz for k in before[1:]) + lipschitz, terms)
        if not self.mode.boxes:
            return Known(_ball(center, radius, arithmetic), lipschitz, whole)
        pairs = zip(node.signs, parts, strict=True)
        ends = [(p.lower, p.upper) if sign == 1 else (p.upper, p.lower) for sign, p in pairs]
        plain = dataclasses.replace(node, signs=(1,) * terms)
        lower = _signed_sum(
            plain, [e[0] if s == 1 else -e[0] for s, e in zip(node.signs, ends, strict=True)]
        )
        upper = _signed_sum(
            plain, [e[1] if s == 1 else -e[1] for s, e in zip(node.signs, ends, strict=True)]
        )
        if terms == 1 and node.constant is None:
            return dataclasses.replace(
                before[0], region=Region(center, parts[0].radius, lower, upper), is_ball=False
            )
        slack = 4 * rounding.DOUBLE * _magnitude(node, [p.magnitude for p in parts])
        lower, upper = arithmetic.widened(lower, upper, slack if terms > 2 else 0.0)
        lower, upper = smaller(lower, center), larger(upper, center)
        region = Region(center, radius, lower, upper)
        if self.mode.local:
            least = jnp.minimum(radius, _half_diagonal(region, arithmetic))
            region = dataclasses.replace(region, radius=least)
        return Known(region, lipschitz, whole)

    def activated(self, node: Activation, before: Known) -> Known:
        arithmetic, region, rule = self.arithmetic, before.region, node.rule
        center = rule(region.center)
        radius = region.radius if before.masked_radius is None else before.masked_radius
        lipschitz, whole = before.lipschitz, before.whole_radius
        constant = rule.lipschitz
        local = constant
        if self.mode.local:
            local = rule.lipschitz_on(region.lower, region.upper)
        if not _is_one(local):
            radius = arithmetic.up(radius * local)
        if not _is_one(constant):
            lipschitz = arithmetic.up(lipschitz * constant)
            whole = arithmetic.up(whole * constant)
        if not rule.selects:  # the center is rounded
            moved = arithmetic.norm(rule.evaluation_error(center))
            radius = arithmetic.up(radius + moved)
            whole = arithmetic.up(whole + moved)
        if not self.mode.boxes:
            return Known(_ball(center, radius, arithmetic), lipschitz, whole)
        after = Region(center, radius, *rule.interval(region.lower, region.upper))
        if self.mode.local:
            least = jnp.minimum(radius, _half_diagonal(after, arithmetic))
            after = dataclasses.replace(after, radius=least)
        return Known(after, lipschitz, whole)

    def transformed(self, i, node: Linear, before: Known, known, norms, vectors) -> Known:
        arithmetic, mode, region = self.arithmetic, self.mode, before.region
        up, k, last = arithmetic.up, len(norms), i == len(self.graph.nodes) - 1
        operator = self.view(node.operator, region.center)
        center = operator.affine(region.center)
        slack = arithmetic.slack(operator, region.lower, region.upper)
        moved = arithmetic.norm(slack)  # how far the computed center can be from the exact one

        def whole_norm():
            sigma, vector = self.global_norm(k, operator, region.center, None, None)
            vectors["global"].append(vector)
            return sigma

        if not mode.boxes:
            if last:
                terms = region.center.size + center.size
                sigma = up(safe_frobenius(operator, region.center), terms)
                lipschitz = before.lipschitz
            else:
                sigma = whole_norm()
                norms.append(sigma)
                lipschitz = up(before.lipschitz * sigma)
            radius = up(sigma * region.radius + moved)
            return Known(_ball(center, radius, arithmetic), lipschitz, radius)

        own = None
        if mode.relaxed_boxes and norms and not last:
            from lipjax.bounds import relaxed

            own = relaxed.row_bounds(self, known, norms, node, operator)
        ball = region.radius if mode.local else before.whole_radius
        box = self.box(operator, before, center, ball, slack, own)
        if last:
            return Known(box, before.lipschitz, before.whole_radius)

        behind = activation_behind(self.graph, i)
        mask_out = self.active_rows(behind, box)
        whole = before.whole_radius
        if not mode.local:
            sigma = whole_norm()
            whole = up(sigma * before.whole_radius + moved)
        if mode.masked:
            sigma, vector = self.local_norm(k, operator, region.center, region.varies, mask_out)
            vectors["local"].append(vector)
        norms.append(sigma)
        radius = up(sigma * region.radius + moved)
        lipschitz = up(before.lipschitz * sigma)
        if behind is not None:
            return Known(box, lipschitz, whole, masked_radius=radius)
        least = jnp.minimum(radius, box.radius) if mode.local else radius
        return Known(dataclasses.replace(box, radius=least), lipschitz, whole)

    def box(
        self, operator: LinearOperator, before: Known, center, ball_radius, slack, own
    ) -> Region:
        """Interval arithmetic, cut with the ball of the inputs that vary, and with `own`, how far
        each output can move, if given; always contains the center itself."""
        arithmetic, region, like = self.arithmetic, before.region, before.region.center
        if before.is_ball:
            # The ball of the example is the same around every center.
            moves = ~(region.radius == 0)
            half_width_in = jnp.full(like.shape, region.radius)
            varies = jnp.full(like.shape, moves)
            middle, half_width = center, operator.absolute(half_width_in)
        else:
            middle_in, half_width_in = arithmetic.around(region.lower, region.upper)
            middle, half_width = operator.affine(middle_in), operator.absolute(half_width_in)
            varies = region.varies
        if self.mode.as_paper and operator.kernel_row_norms is not None:
            row_norms = operator.kernel_row_norms
        else:
            row_norms = operator.row_norms(
                varies if self.mode.local else jnp.ones(like.shape, bool)
            )
        terms = like.size + operator.kernel.size
        reach = arithmetic.up(ball_radius * jnp.broadcast_to(row_norms, center.shape), terms)
        if own is not None:
            reach = jnp.minimum(reach, own)
        lower = larger(middle - half_width, center - reach)
        upper = smaller(middle + half_width, center + reach)
        lower, upper = arithmetic.widened(lower, upper, slack)
        # Without these, rounding could leave the two intervals without a common point.
        lower, upper = smaller(lower, center), larger(upper, center)
        found = Region(center, ball_radius, lower, upper)
        return dataclasses.replace(found, radius=_half_diagonal(found, arithmetic))

    def active_rows(self, behind, region: Region) -> jax.Array | None:
        """Rows of a linear node that can move the output of the activation behind it."""
        if behind is None:
            return None
        path, activation = behind
        lower, upper = region.lower, region.upper
        for node in path:
            lower, upper = node(lower), node(upper)
        mask = activation.rule.active(lower, upper, as_paper=self.mode.as_paper)
        for node in reversed(path):
            mask = node.reached(mask, self.graph.nodes[node.inputs[0]].shape)
        return mask


def activation_behind(graph: Graph, i: int) -> tuple[list[Rearrange], Activation] | None:
    """The activation that alone reads node i, and the rearrangements on the way to it."""
    path: list[Rearrange] = []
    while True:
        readers = list(graph.readers(i))
        if len(readers) != 1:
            return None
        (i,) = readers
        node = graph.nodes[i]
        if isinstance(node, Activation):
            return path, node
        if not isinstance(node, Rearrange) or len(node.inputs) != 1:
            return None
        path.append(node)


def _ball(center, radius, arithmetic) -> Region:
    # Nothing varies in a ball of radius 0: there the two ends must stay equal.
    lower, upper = arithmetic.widened(center - radius, center + radius, 0.0)
    still = radius == 0
    return Region(center, radius, jnp.where(still, center, lower), jnp.where(still, center, upper))


def _is_one(constant) -> bool:
    return isinstance(constant, float) and constant == 1.0


def _signed_sum(node: Add, values) -> jax.Array:
    total = values[0] if node.signs[0] == 1 else -values[0]
    for sign, value in zip(node.signs[1:], values[1:], strict=True):
        total = total + value if sign == 1 else total - value
    if node.constant is None:
        return total
    return total + jnp.broadcast_to(node.constant, total.shape).astype(total.dtype)


def _magnitude(node: Add, values) -> jax.Array:
    total = sum(jnp.abs(value) for value in values[1:]) + jnp.abs(values[0])
    if node.constant is None:
        return total
    return total + jnp.abs(jnp.broadcast_to(node.constant, total.shape).astype(total.dtype))


def safe_frobenius(operator: LinearOperator, like: jax.Array) -> jax.Array:
    """``||W||_F``: a sound norm without iteration, where nothing tighter is needed."""
    return safe_norm(operator.row_norms(jnp.ones(like.shape, bool)))


def _half_diagonal(region: Region, arithmetic) -> jax.Array:
    """The distance from the center to the farthest corner of the box."""
    return arithmetic.length(larger(region.upper - region.center, region.center - region.lower))
