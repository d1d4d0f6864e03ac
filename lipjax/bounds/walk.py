"""The walk that carries balls and boxes from node to node: one function for each kind of node."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lipjax import rounding
from lipjax.bounds import relaxed, tight
from lipjax.bounds.modes import Mode
from lipjax.bounds.regions import Bound, Region, ball_region, half_diagonal
from lipjax.graph import Activation, Add, Graph, Input, Linear, Rearrange
from lipjax.graph.linear import LinearOperator, larger, safe_norm, smaller, stacked
from lipjax.graph.nodes import moved

# Keeps a factor away from 0 and infinity.
SMALL = 1e-30

# norm(k, operator, like, mask_in, mask_out) -> (sigma, vector); k counts the linear nodes. Masks
# are None for a whole norm. The walk is the same for estimates and certificates; only this differs.
NormFunction = Callable[..., tuple[jax.Array, Any]]
# Entries of the product of two linear maps up to which it is made.
LARGEST_PRODUCT = 2**21


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


@dataclasses.dataclass
class Found:
    """What a walk has found so far.

    Attributes:
        known: of each node.
        norms, radii: of the linear nodes, as in `Bound`.
        vectors: last vectors of their power iterations, by kind (`Mode.vectors`).
    """

    known: list[Known] = dataclasses.field(default_factory=list)
    norms: list[jax.Array] = dataclasses.field(default_factory=list)
    radii: list[jax.Array] = dataclasses.field(default_factory=list)
    vectors: dict[str, list] = dataclasses.field(
        default_factory=lambda: {"global": [], "local": []}
    )


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
        joint_norm: of two maps as one, side by side at a sum or one after the other; k counts
            `joints`. None: there the radii are added, or the norms multiplied.
        view: ``(operator, like) -> operator``, the same map in the form that computes best.
        arithmetic: `rounding.EXACT` or `rounding.OUTWARD`.
    """

    graph: Graph
    mode: Mode
    local_norm: NormFunction
    global_norm: NormFunction
    view: Callable = lambda operator, like: operator
    arithmetic: rounding.Rounding = rounding.EXACT
    joint_norm: NormFunction | None = None

    def __call__(self, x: jax.Array, epsilon: jax.Array) -> Bound:
        """The bound of one example x on the ball of this radius."""
        epsilon = jnp.asarray(epsilon, x.dtype)
        found = Found()
        for i, node in enumerate(self.graph.nodes):
            if isinstance(node, Input):
                ball = ball_region(x, epsilon, self.arithmetic)
                after = Known(ball, jnp.ones((), x.dtype), epsilon, is_ball=True)
            else:
                after = self.propagate(i, [found.known[j] for j in node.inputs], found)
            found.known.append(after)

        head = self.graph.nodes[-1].inputs[0]
        return Bound(
            graph=self.graph,
            lipschitz=found.known[head].lipschitz,
            norms=tuple(found.norms),
            radii=tuple(found.radii),
            regions=tuple(known.region for known in found.known),
            vectors={name: tuple(found.vectors[name]) for name in self.mode.vectors},
            mode=self.mode.name,
        )

    def propagate(self, i: int, before: Sequence[Known], found: Found) -> Known:
        """What is known of node i, from what is known of its inputs."""
        node = self.graph.nodes[i]
        if isinstance(node, Rearrange):
            return self._through_rearrange(node, before)
        if isinstance(node, Add):
            return self._through_add(i, node, before, found)
        if isinstance(node, Activation):
            return self._through_activation(node, before[0])
        assert isinstance(node, Linear)
        return self._through_linear(i, node, before[0], found)

    def _capped(self, region: Region) -> Region:
        """In local modes no radius is above half the diagonal of the box."""
        if not self.mode.local:
            return region
        least = jnp.minimum(region.radius, half_diagonal(region, self.arithmetic))
        return dataclasses.replace(region, radius=least)

    # ------------------------------------------------------------------------------ rearrangements

    def _through_rearrange(self, node: Rearrange, before: Sequence[Known]) -> Known:
        up = self.arithmetic.up
        exact = len(before) == 1 and node.copies == 1
        spread = 1.0 if node.copies == 1 else math.sqrt(node.copies)

        def together(values):
            """The l2 norm of what each input contributes."""
            total = values[0] if len(values) == 1 else safe_norm(jnp.stack(values))
            return total if exact else up(total * spread, len(values))

        parts = [known.region for known in before]
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
            together([known.lipschitz for known in before]),
            together([known.whole_radius for known in before]),
            masked,
            is_ball=node.pure and before[0].is_ball,
        )

    # --------------------------------------------------------------------------------------- sums

    def _through_add(self, i: int, node: Add, before: Sequence[Known], found: Found) -> Known:
        arithmetic = self.arithmetic
        up = self.arithmetic.up
        terms = len(before)
        parts = [known.region for known in before]
        centers = [p.center for p in parts]
        if terms == 1 and node.constant is None and node.signs == (1,):
            return before[0]  # a cast: the same real number

        center = _total(node, _signed(node, centers))
        # Adding the constant rounds nothing that the sums of the slack do not cover.
        moved = arithmetic.norm(4 * rounding.DOUBLE * _magnitude(node, centers))
        radius = up(_sum([p.radius for p in parts]) + moved, terms + 1)
        place = self._joint(i)
        if place is not None:
            together = self._stacked_radius(place, node, found)
            radius = jnp.minimum(radius, up(together + moved, terms + 1))
        whole = up(_sum([known.whole_radius for known in before]) + moved, terms + 1)
        lipschitz = before[0].lipschitz
        if terms > 1:
            lipschitz = up(_sum([known.lipschitz for known in before]), terms)
        if not self.mode.boxes:
            return Known(ball_region(center, radius, arithmetic), lipschitz, whole)

        # A minus exchanges the ends.
        ends = list(zip(node.signs, parts, strict=True))
        lower = _total(node, [p.lower if sign == 1 else -p.upper for sign, p in ends])
        upper = _total(node, [p.upper if sign == 1 else -p.lower for sign, p in ends])
        if terms == 1 and node.constant is None:
            region = Region(center, parts[0].radius, lower, upper)
            return dataclasses.replace(before[0], region=region, is_ball=False)

        slack = 4 * rounding.DOUBLE * _magnitude(node, [p.magnitude for p in parts])
        lower, upper = arithmetic.widened(lower, upper, slack if terms > 2 else 0.0)
        lower = smaller(lower, center)
        upper = larger(upper, center)
        return Known(self._capped(Region(center, radius, lower, upper)), lipschitz, whole)

    def _stacked_radius(self, k: int, node: Add, found: Found) -> jax.Array:
        """Bound of how far ``W_1 h_1 + W_2 h_2`` can be from the sum of its computed parts, by the
        norm of ``[W_1, t W_2]``; a scalar (METHOD 1).

        The two changes are seldom in the worst directions of both. Any t is sound; by this one it
        is never more than the radii added up, but for rounding.
        """
        assert self.joint_norm is not None
        up = self.arithmetic.up
        maps = [behind for j in node.inputs if (behind := linear_before(self.graph, j))]
        inputs = []
        operators = []
        off = []
        for j, path in maps:
            layer = self.graph.nodes[j]
            assert isinstance(layer, Linear)
            region = found.known[layer.inputs[0]].region
            inputs.append(region)
            # Not as the matrix: each example's factor would make one of its own.
            operators.append(functools.reduce(moved, path, layer.operator))
            # How far its center, which was computed by the view, is from the exact one.
            computed = self.view(layer.operator, region.center)
            slack = self.arithmetic.slack(computed, region.lower, region.upper)
            off.append(self.arithmetic.norm(slack))
        first, second = (region.radius for region in inputs)
        a, b = (found.norms[self.graph.linear.index(j)] for j, _ in maps)
        t = jnp.clip(jnp.sqrt((a * second + SMALL) / (b * first + SMALL)), SMALL, 1 / SMALL)
        operators[1] = dataclasses.replace(operators[1], kernel=operators[1].kernel * t)
        operator = stacked(operators, [region.center.shape for region in inputs])
        varies = jnp.concatenate([region.varies.reshape(-1) for region in inputs])
        like = jnp.zeros(varies.shape, first.dtype)
        sigma, _ = self.joint_norm(k, operator, like, varies, None)
        length = up(safe_norm(jnp.stack([first, second / t])), 2)
        # That t rounds the entries counts less than a sum of so many terms.
        sigma = up(sigma, math.prod(node.shape))
        return up(sigma * length + off[0] + off[1], 4)

    # -------------------------------------------------------------------------------- activations

    def _through_activation(self, node: Activation, before: Known) -> Known:
        arithmetic = self.arithmetic
        region = before.region
        rule = node.rule
        center = rule(region.center)
        radius = region.radius if before.masked_radius is None else before.masked_radius
        lipschitz = before.lipschitz
        whole = before.whole_radius

        constant = rule.lipschitz
        local = rule.lipschitz_on(region.lower, region.upper) if self.mode.local else constant
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
            return Known(ball_region(center, radius, arithmetic), lipschitz, whole)
        after = Region(center, radius, *rule.box(region.lower, region.upper, arithmetic))
        return Known(self._capped(after), lipschitz, whole)

    # ------------------------------------------------------------------------------- linear nodes

    def _through_linear(self, i: int, node: Linear, before: Known, found: Found) -> Known:
        arithmetic = self.arithmetic
        mode = self.mode
        region = before.region
        up = arithmetic.up
        last = i == len(self.graph.nodes) - 1
        operator = self.view(node.operator, region.center)
        center = operator.affine(region.center)
        slack = arithmetic.slack(operator, region.lower, region.upper)
        moved = arithmetic.norm(slack)  # how far the computed center can be from the exact one
        if not mode.boxes:
            return self._ball_through_linear(operator, before, center, moved, last, found)

        own = None
        if mode.relaxed_boxes and found.norms and not last:
            own = self._by_rows(node, found)
        ball_radius = region.radius if mode.local else before.whole_radius
        box = self._box(operator, before, center, ball_radius, slack, own)
        if last:
            return Known(box, before.lipschitz, before.whole_radius)

        behind = activation_behind(self.graph, i)
        whole = before.whole_radius
        if not mode.local:
            sigma = self._whole_norm(operator, region.center, found)
            whole = up(sigma * before.whole_radius + moved)
        active = None
        if mode.masked:
            active = None if mode.masks_off else self._active_rows(behind, box)
            varies = None if mode.masks_off else region.varies
            place = len(found.norms)
            sigma, vector = self.local_norm(place, operator, region.center, varies, active)
            found.vectors["local"].append(vector)
        found.norms.append(sigma)

        radius = up(sigma * region.radius + moved)
        if (joint := self._joint(i)) is not None:
            radius = jnp.minimum(radius, up(self._chained_radius(joint, i, active, found) + moved))
        found.radii.append(radius)
        lipschitz = up(before.lipschitz * sigma)
        if behind is not None:
            return Known(box, lipschitz, whole, masked_radius=radius)
        least = jnp.minimum(radius, box.radius) if mode.local else radius
        return Known(dataclasses.replace(box, radius=least), lipschitz, whole)

    def _chained_radius(self, k: int, i: int, active, found: Found) -> jax.Array:
        """Bound of how far ``W_2 h`` can be from that of the computed h, where h is the value of
        another linear node, by the norm of the product of the two; a scalar (METHOD 1).

        Args:
            k: among `joints`.
            i: the second node; its norm is known.
            active: its rows that count, or None.
            found: so far.
        """
        assert self.joint_norm is not None
        up = self.arithmetic.up
        node = self.graph.nodes[i]
        before = linear_before(self.graph, node.inputs[0])
        assert before is not None and isinstance(node, Linear)
        j, path = before
        first = self.graph.nodes[j]
        assert isinstance(first, Linear)
        region = found.known[first.inputs[0]].region
        operator, off = product(
            functools.reduce(moved, path, first.operator),
            node.operator,
            region.center,
            self.arithmetic,
        )
        sigma, _ = self.joint_norm(k, operator, region.center, region.varies, active)
        # How far the center of the first, which was computed by the view, is from the exact one.
        computed = self.view(first.operator, region.center)
        slack = self.arithmetic.norm(self.arithmetic.slack(computed, region.lower, region.upper))
        return up(up(sigma + off) * region.radius + up(found.norms[-1] * slack), 3)

    def _joint(self, i: int) -> int | None:
        """The place of node i among `joints`, where their norms are asked for."""
        if self.joint_norm is None or not self.mode.local:
            return None
        places = joints(self.graph)
        return places.index(i) if i in places else None

    def _ball_through_linear(
        self, operator: LinearOperator, before: Known, center, moved, last: bool, found: Found
    ) -> Known:
        """Of modes without boxes: the ball by the whole norm."""
        up = self.arithmetic.up
        like = before.region.center
        if last:
            sigma = up(safe_frobenius(operator, like), like.size + center.size)
            lipschitz = before.lipschitz
        else:
            sigma = self._whole_norm(operator, like, found)
            found.norms.append(sigma)
            lipschitz = up(before.lipschitz * sigma)
        radius = up(sigma * before.region.radius + moved)
        found.radii.append(radius)
        return Known(ball_region(center, radius, self.arithmetic), lipschitz, radius)

    def _whole_norm(self, operator: LinearOperator, like: jax.Array, found: Found) -> jax.Array:
        sigma, vector = self.global_norm(len(found.norms), operator, like, None, None)
        found.vectors["global"].append(vector)
        return sigma

    def _by_rows(self, node: Linear, found: Found) -> tuple[jax.Array, jax.Array]:
        """How far each output of a linear node can move down and up, by reverse passes of its
        row."""
        (end,) = node.inputs
        regions = [known.region for known in found.known]
        shared = (self.graph, self.view, self.arithmetic, regions, found.radii, end)
        if not self.mode.one_sided:
            reach = relaxed.row_bounds(relaxed.Reverse(*shared), node)
            return reach, reach
        reverse = tight.OneSided(*shared, by=tight.BOXES)
        return relaxed.row_bounds(reverse, node, -1), relaxed.row_bounds(reverse, node)

    def _box(
        self, operator: LinearOperator, before: Known, center, ball_radius, slack, own
    ) -> Region:
        """The box of a linear node's value, which always contains the center itself.

        Interval arithmetic, cut with the ball of the inputs that vary, and with `own`, how far each
        output can move down and up, if given.
        """
        arithmetic = self.arithmetic
        region = before.region
        like = before.region.center
        if before.is_ball:
            # The ball of the example is the same around every center.
            varies = jnp.full(like.shape, ~(region.radius == 0))
            middle = center
            half_width = operator.absolute(jnp.full(like.shape, region.radius))
        else:
            varies = region.varies
            middle_in, half_width_in = arithmetic.around(region.lower, region.upper)
            middle = operator.affine(middle_in)
            half_width = operator.absolute(half_width_in)

        if self.mode.as_paper and operator.kernel_row_norms is not None:
            row_norms = operator.kernel_row_norms
        else:
            masked = self.mode.local and not self.mode.masks_off
            counted = varies if masked else jnp.ones(like.shape, bool)
            row_norms = operator.row_norms(counted)
        terms = like.size + operator.kernel.size
        by_ball = arithmetic.up(ball_radius * jnp.broadcast_to(row_norms, center.shape), terms)
        down, up = (by_ball, by_ball) if own is None else (jnp.minimum(by_ball, o) for o in own)

        lower = larger(middle - half_width, center - down)
        upper = smaller(middle + half_width, center + up)
        lower, upper = arithmetic.widened(lower, upper, slack)
        # Without these, rounding could leave the two intervals without a common point.
        lower = smaller(lower, center)
        upper = larger(upper, center)
        box = Region(center, ball_radius, lower, upper)
        return dataclasses.replace(box, radius=half_diagonal(box, arithmetic))

    def _active_rows(self, behind, region: Region) -> jax.Array | None:
        """Rows of a linear node that can move the output of the activation behind it."""
        if behind is None:
            return None
        path, activation = behind
        lower = region.lower
        upper = region.upper
        for node in path:
            lower = node(lower)
            upper = node(upper)
        mask = activation.rule.active(lower, upper, as_paper=self.mode.as_paper)
        for node in reversed(path):
            mask = node.reached(mask, self.graph.nodes[node.inputs[0]].shape)
        return mask


def _is_one(constant) -> bool:
    return isinstance(constant, float) and constant == 1.0


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


def joints(graph: Graph) -> tuple[int, ...]:
    """Positions of the nodes where the norm of two linear maps as one is of use: `stacks`, then
    `chains`."""
    return stacks(graph) + chains(graph)


def chains(graph: Graph) -> tuple[int, ...]:
    """Positions of the Linear nodes, but the last, of another one's value, perhaps rearranged, if
    the product is not too large a matrix."""
    found = []
    for i in graph.linear[:-1]:
        before = linear_before(graph, graph.nodes[i].inputs[0])
        if before is None:
            continue
        source = graph.nodes[graph.nodes[before[0]].inputs[0]]
        if source.size * graph.nodes[i].size <= LARGEST_PRODUCT:
            found.append(i)
    return tuple(found)


def joined_sizes(graph: Graph) -> list[int]:
    """The sizes of what the maps of `joints` take."""

    def source(i: int) -> int:
        before = linear_before(graph, i)
        assert before is not None
        return graph.nodes[graph.nodes[before[0]].inputs[0]].size

    return [sum(source(j) for j in graph.nodes[i].inputs) for i in joints(graph)]


def product(
    first: LinearOperator, second: LinearOperator, like: jax.Array, arithmetic
) -> tuple[LinearOperator, jax.Array]:
    """``W_2 W_1`` as an explicit matrix, and a bound of the norm of what its rounding changed.

    Args:
        first, second: the maps.
        like: an input of the first.
        arithmetic: of the bound.
    """
    middle = jax.eval_shape(first, like)

    def composed(column):
        return second(first(column.reshape(like.shape)))

    columns = jax.vmap(composed)(jnp.eye(like.size, dtype=like.dtype))
    shape = columns.shape[1:]
    operator = LinearOperator.from_matrix(columns.reshape(like.size, -1).T, like.shape, shape)
    if arithmetic is rounding.EXACT:
        return operator, jnp.zeros((), like.dtype)
    # Columns of the first are entries of its kernel: only the second's sums round.
    sizes = [
        arithmetic.up(safe_frobenius(each, x), x.size + each.kernel.size)
        for each, x in ((first, like), (second, middle))
    ]
    return operator, arithmetic.up(rounding.gamma(middle.size + 16) * sizes[0] * sizes[1], 3)


def stacks(graph: Graph) -> tuple[int, ...]:
    """Positions of the sums of two Linear nodes' values, perhaps rearranged."""
    return tuple(
        i
        for i, node in enumerate(graph.nodes)
        if isinstance(node, Add)
        and len(node.inputs) == 2
        and all(linear_before(graph, j) for j in node.inputs)
    )


def linear_before(graph: Graph, i: int) -> tuple[int, list[Rearrange]] | None:
    """The Linear node that node i is or rearranges, each entry at most once, and the way there."""
    path: list[Rearrange] = []
    node = graph.nodes[i]
    while isinstance(node, Rearrange) and len(node.inputs) == 1 and node.copies == 1:
        path.insert(0, node)
        (i,) = node.inputs
        node = graph.nodes[i]
    return (i, path) if isinstance(node, Linear) else None


def _sum(values: Sequence[jax.Array]) -> jax.Array:
    return sum(values[1:]) + values[0]


def _signed(node: Add, values: Sequence[jax.Array]) -> list[jax.Array]:
    """Each value with the sign that the node gives it."""
    return [value if sign == 1 else -value for sign, value in zip(node.signs, values, strict=True)]


def _total(node: Add, values: Sequence[jax.Array]) -> jax.Array:
    """The sum of values that have their signs, and of the constant."""
    total = functools.reduce(jnp.add, values)
    if node.constant is None:
        return total
    return total + jnp.broadcast_to(node.constant, total.shape).astype(total.dtype)


def _magnitude(node: Add, values: Sequence[jax.Array]) -> jax.Array:
    """The sum of all sizes: what the rounding of the sum is a share of."""
    total = _sum([jnp.abs(value) for value in values])
    if node.constant is None:
        return total
    return total + jnp.abs(jnp.broadcast_to(node.constant, total.shape).astype(total.dtype))


def safe_frobenius(operator: LinearOperator, like: jax.Array) -> jax.Array:
    """``||W||_F``: a sound norm without iteration, where nothing tighter is needed."""
    return safe_norm(operator.row_norms(jnp.ones(like.shape, bool)))
