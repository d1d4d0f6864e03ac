"""Rows propagated back through a graph: linear where the function is linear.

Let ``D`` be the change of a value from its center. An activation does ``D a = M D z + e``, M known
and the error e bounded (`activations.Relaxation`). So for a row d on any node,

    <d, D h> = <P_0^T d, D x> + sum_i <P_i^T d, e_i>,

P_i the product of all that is linear behind activation i, and

    max <d, D h> <= ||P_0^T d|| epsilon + sum_i max <P_i^T d, e_i>:

one reverse pass and no norm of anything, and the exact norm of the gradient times epsilon as
epsilon tends to 0. Rows of rivals make margins, rows of neurons make boxes.

Source: METHOD 5 (docs/method.md); the idea is LipLT's (Fazlyab et al. 2023, arXiv 2310.00116),
which takes the slopes globally, in [0, 1]; only slopes *from the center* count here.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lipjax import rounding
from lipjax.bounds.regions import Region
from lipjax.graph import Activation, Add, Graph, Linear, Rearrange
from lipjax.graph.linear import safe_norm
from lipjax.norms import closed

# The scaling that `largest_product` tries beside box and ball, as a multiple of that of the ball
# alone. Measured on an ordinarily trained net: five scales give margins 1 % smaller than this one.
SCALE = 2.5
# Rows that `row_bounds` propagates at once.
ROWS = 64


def dual(d, low, high, radius, scale, arithmetic) -> jax.Array:
    """``max <d, t>`` over ``||t|| <= radius, low <= t <= high`` from above, by duality.

    Any scale ``1 / mu > 0`` is right (METHOD 3). ``low <= 0 <= high``.
    """
    t = jnp.clip(d * scale, low, high)
    # Each term of the sums is >= 0, the difference is not: its rounding is that of its parts' sum.
    # (Squares that underflow, too: FLOOR is in the excess before that is divided by the scale,
    # which can be far smaller.)
    room = jnp.square(radius)
    used = jnp.sum(jnp.square(t))
    excess = arithmetic.up(room + used, d.size) - (room + used)
    return arithmetic.up(jnp.sum(d * t), d.size) + (room - used + 2 * excess) / (2 * scale)


def largest_product(d: jax.Array, reach: jax.Array, radius: jax.Array, arithmetic) -> jax.Array:
    """Upper bound of ``max <d, e>`` over ``|e| <= reach, ||e|| <= radius``: box, ball and a dual.

    Not the tightest, which needs a search (`margins.ascent`), but there are many of these, and they
    are differentiated in training.
    """
    norm = safe_norm(d)
    ball = arithmetic.up(radius * arithmetic.length(d))
    box = arithmetic.up(jnp.sum(jnp.abs(d) * reach), d.size)
    # It is not the best scale, so the envelope theorem does not hold: it is differentiated too.
    # Where the ball's is extreme (nothing can move, or d is 0) any does, and 1 has a gradient.
    least = jnp.finfo(d.dtype).tiny ** 0.25
    usual = (norm > least) & (radius > least * norm)
    scale = jnp.where(usual, SCALE * radius / jnp.where(usual, norm, 1.0), 1.0)
    return jnp.minimum(jnp.minimum(box, ball), dual(d, -reach, reach, radius, scale, arithmetic))


class Reverse:
    """Propagates rows from a node of a graph back to the example.

    Args:
        graph: of the function.
        view, arithmetic: of the walk.
        regions: of the nodes, up to the one that rows begin at at least.
        radii: `Bound.radii` of the linear nodes, in order.
        end: the node that rows begin at.
    """

    def __init__(
        self,
        graph: Graph,
        view: Callable,
        arithmetic: rounding.Rounding,
        regions: Sequence[Region],
        radii: Sequence[jax.Array],
        end: int,
    ):
        self.graph = graph
        self.view = view
        self.arithmetic = arithmetic
        self.regions = regions[: end + 1]
        self.end = end
        self.radius_of = dict(zip(graph.linear, radii, strict=False))
        self.relaxations = {
            i: self._relaxed(i, node)
            for i, node in enumerate(graph.nodes[: end + 1])
            if isinstance(node, Activation)
        }

    def _relaxed(self, i: int, node: Activation):
        """Slopes and errors of an activation, from the norm of the rows that move its output."""
        before = self.regions[node.inputs[0]]
        after = self.regions[i]
        radius = before.radius
        active = self._active_radius(node.inputs[0])
        if active is not None:
            radius = jnp.minimum(active, radius)
        return node.rule.relaxations(
            before.center, before.lower, before.upper, radius, after, self.arithmetic
        )

    def _active_radius(self, i: int) -> jax.Array | None:
        """Radius over the active inputs of an activation that alone reads node i."""
        node = self.graph.nodes[i]
        while isinstance(node, Rearrange) and len(node.inputs) == 1 and node.copies == 1:
            (i,) = node.inputs
            node = self.graph.nodes[i]
        return self.radius_of.get(i)

    def gain(self, d: jax.Array) -> jax.Array:
        """Upper bound of ``<d, D h>``, h the value of the node `end`; NaN if anything is.

        Args:
            d: of h's shape; each entry may be a rounded difference.
        """
        up = self.arithmetic.up
        row, spent = self.propagate(d)
        last = self.regions[self.end]
        first = self.regions[0]
        spent = up(spent + self.arithmetic.left_over(4 * rounding.DOUBLE, d, last.radius), 2)
        return up(up(first.radius * self.arithmetic.length(row)) + spent, 2)

    def propagate(self, d: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``P_0^T d``, of the example's shape, and a bound of what errors on the way can add."""
        up = self.arithmetic.up
        spent = jnp.zeros((), d.dtype)
        rows: dict[int, jax.Array] = {self.end: d}

        for i in range(self.end, 0, -1):
            if i not in rows:
                continue
            node = self.graph.nodes[i]
            parts, cost = self._through(i, node, rows.pop(i))
            spent = up(spent + cost, 2)
            for source, part in zip(node.inputs, parts, strict=True):
                if source not in rows:
                    rows[source] = part
                    continue
                rows[source] = rows[source] + part
                radius = self.regions[source].radius
                left = self.arithmetic.left_over(4 * rounding.DOUBLE, rows[source], radius)
                spent = up(spent + left, 2)

        zero = jnp.zeros(self.graph.nodes[0].shape, d.dtype)
        return rows.get(0, zero), spent

    def _through(self, i: int, node, g: jax.Array):
        """The rows in front of a node, one for each input, and what rounding and errors can add."""
        before = [self.regions[j] for j in node.inputs]
        if isinstance(node, Linear):
            return self._through_linear(node, before[0], g)
        if isinstance(node, Activation):
            return self._through_activation(i, before[0], g)
        if isinstance(node, Add):
            return self._through_add(i, node, before, g)
        assert isinstance(node, Rearrange)
        return self._through_rearrange(node, before, g)

    def _through_linear(self, node: Linear, before: Region, g: jax.Array):
        arithmetic = self.arithmetic
        operator = self.view(node.operator, before.center)
        row = operator.transpose(before.center)(g)
        if arithmetic is rounding.EXACT:
            return (row,), 0.0
        slack = arithmetic.slack(operator, before.lower, before.upper)
        terms = rounding.transposed_terms_of(operator, before.center)
        size = closed.schur_bound(operator, before.center, None, None)
        relative = 2 * rounding.gamma(terms + 8) * size
        cost = arithmetic.up(jnp.sum(jnp.abs(g) * slack), g.size)
        left = arithmetic.left_over(relative, g, before.radius)
        return (row,), arithmetic.up(cost + left, 2)

    def _through_activation(self, i: int, before: Region, g: jax.Array):
        total = jnp.zeros((), g.dtype)
        node = self.graph.nodes[i]
        assert isinstance(node, Activation)
        # Where an entry counts in L^2 places, L^2 products add up to a row that is L times longer.
        size = jnp.maximum(1.0, node.rule.lipschitz) ** 3
        for relaxation in reversed(self.relaxations[i]):
            weights = relaxation.error_weights(g)
            cost = largest_product(weights, relaxation.reach, relaxation.radius, self.arithmetic)
            total = self.arithmetic.up(total + cost, 2)
            left = self.arithmetic.left_over(8 * rounding.DOUBLE * size, g, before.radius)
            total = self.arithmetic.up(total + left, 2)
            g = relaxation.transposed(g)
        return (g,), total

    def _through_add(self, i: int, node: Add, before: Sequence[Region], g: jax.Array):
        rows = tuple(g if sign == 1 else -g for sign in node.signs)
        rounded = len(rows) > 1 or node.constant is not None
        if self.arithmetic is rounding.EXACT or not rounded:
            return rows, 0.0
        size = sum(jnp.abs(b.center) for b in before) + jnp.abs(self.regions[i].center)
        unit = 8 * rounding.DOUBLE * len(rows)
        return rows, self.arithmetic.up(unit * jnp.sum(jnp.abs(g) * size), g.size)

    def _through_rearrange(self, node: Rearrange, before: Sequence[Region], g: jax.Array):
        rows = node.transposed(g, *(b.center.shape for b in before))
        if self.arithmetic is rounding.EXACT or node.copies == 1:
            return rows, 0.0
        cost = jnp.zeros((), g.dtype)
        # Rows that meet in one entry are added up.
        unit = 2 * rounding.gamma(node.copies + 2) * node.copies
        for b in before:
            left = self.arithmetic.left_over(unit, g, b.radius)
            cost = self.arithmetic.up(cost + left, 2)
        return rows, cost


def row_bounds(reverse: Reverse, node: Linear, sign: int = 1) -> jax.Array:
    """How far each output of a linear node can move, by its own row: of the output's shape.

    One reverse pass for every output, through all nodes in front. What the rounding of its own
    center does is not in it.

    Args:
        reverse: the pass from the node's input.
        node: whose rows.
        sign: 1 upwards, -1 downwards; `Reverse` itself makes no difference.
    """
    like = reverse.regions[reverse.end].center
    transposed = reverse.view(node.operator, like).transpose(like)
    count = node.size

    def one(index):
        # Exact: every entry of the row is 0 or one entry of the kernel.
        row = transposed((jnp.arange(count) == index).astype(like.dtype).reshape(node.shape))
        return reverse.gain(sign * row)

    return jax.lax.map(one, jnp.arange(count), batch_size=ROWS).reshape(node.shape)
