"""How fast a function can change on a region: between *any two points* of a ball or a box.

The regions of `bounds.regions` say how far a value can be from its center. A Lipschitz constant of
the region needs more: points that are both elsewhere. For two points of a convex region each
activation changes by ``M (u - v)``, M from the slopes on the box of its input
(`activations.slopes`), so the function changes by ``J (a - b)``, and J is bounded twice:

- **forward**: ``rate`` of each node, from the norms of the masked matrices, and ``rates`` of each
  of its entries, from their rows;
- **backward**: a row d of the Jacobian is carried back as ``N_1^T .. N_k^T d``, exact but for the
  error e of each activation on the way, and ``|<g, e>|`` is bounded by what is known of the rates
  in front of it. As the region shrinks this is the norm of the gradient.

Every value also gets its box: interval arithmetic, cut by how fast it can change and how far the
region goes.

Source: METHOD 5 (docs/method.md), after LipLT (Fazlyab et al. 2023, arXiv 2310.00116), with slopes
of the region; with entries for errors it is an interval Jacobian, as of Shi et al. 2022 (arXiv
2210.07394).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lipjax import rounding
from lipjax.bounds.modes import Mode
from lipjax.bounds.relaxed import ROWS, largest_product
from lipjax.bounds.walk import activation_behind
from lipjax.graph import Activation, Add, Graph, Input, Linear, Rearrange
from lipjax.graph.linear import LinearOperator, larger, safe_sqrt, smaller
from lipjax.norms import closed


@dataclasses.dataclass(frozen=True)
class Variation:
    """What is known of a node on a region. For all points a, b of it, with h the node's value:

    Attributes:
        lower, upper: box of h(a).
        center: box, a thin one, of h at the region's center.
        rates: ``|h_i(a) - h_i(b)| <= rates_i ||a - b||_2``; exactly 0 where h_i cannot change.
        rate: ``||h(a) - h(b)||_2 <= rate ||a - b||_2``.
        masked_rate: the same of the entries that the activation behind can pass on, or None.
        entries: ``|h_i(a) - h_i(b)| <= sum_j entries_ij |a_j - b_j|``, the example's entries on the
            last axis, or None.
    """

    lower: jax.Array
    upper: jax.Array
    center: tuple[jax.Array, jax.Array]
    rates: jax.Array
    rate: jax.Array
    masked_rate: jax.Array | None = None
    entries: jax.Array | None = None

    @property
    def moves(self) -> jax.Array:
        """Mask of the entries that can change. A NaN counts as one."""
        return ~(self.rates == 0)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of an activation on its box: `slopes`, and bounds of its error e.

    Attributes:
        reach: of each entry of e, for points at distance 1.
        radius: of its l2 norm.
        entries: as `Variation.entries`, of e; or None.
        rate: as `Variation.rate`, of what goes in.
    """

    slopes: Any
    reach: jax.Array
    radius: jax.Array
    entries: jax.Array | None
    rate: jax.Array


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of the Jacobian between any two points: within ``entries`` of ``center``, both as parts
    of what is known; what multiplies them is in front.

    Attributes:
        center: ``(count, *shape of the example)``.
        entries: how far off each entry can be, of the same shape; or None.
        lengths: how far off a row can be, ``(count,)``.
        spent: what rounding adds to either, ``(count,)``.
    """

    center: jax.Array
    entries: jax.Array | None
    lengths: jax.Array
    spent: jax.Array


class TwoPointWalk:
    """Carries variations through a graph; sound iff the norm function bounds from above.

    With `rounding.OUTWARD`, in float64, this includes the rounding of the walk itself; the
    Lipschitz constants are those of the real-number function.

    Args:
        graph: its value is a vector.
        mode: its `relaxed_margins` and `relaxed_boxes` say which rows are carried back.
        norm: of a masked linear map, as `regions.NormFunction`, but a scalar alone.
        view: ``(operator, like) -> operator``, the same map in the form that computes best.
        arithmetic: `rounding.EXACT` or `rounding.OUTWARD`.
    """

    def __init__(
        self,
        graph: Graph,
        mode: Mode,
        norm: Callable[..., jax.Array],
        view: Callable = lambda operator, like: operator,
        arithmetic: rounding.Rounding = rounding.EXACT,
    ):
        self.graph, self.mode, self.norm = graph, mode, norm
        self.view, self.arithmetic = view, arithmetic

    def __call__(self, x: jax.Array, epsilon, box) -> dict[str, Any]:
        """The constants of one region: "l2", "linf" and "per_output", the outputs' box "lower" and
        "upper", and "variations", one for each node."""
        self.known: list[Variation] = []
        self.stages: dict[int, list[Stage]] = {}
        last = len(self.graph.nodes) - 1
        rows = None
        for i, node in enumerate(self.graph.nodes):
            before = [self.known[j] for j in node.inputs]
            if isinstance(node, Input):
                found = self.started(x, epsilon, box)
            elif isinstance(node, Rearrange):
                found = self.rearranged(node, before)
            elif isinstance(node, Add):
                found = self.added(node, before)
            elif isinstance(node, Activation):
                found = self.activated(i, node, *before)
            else:
                assert isinstance(node, Linear)
                found = self.transformed(i, node, *before)
            self.known.append(self.cut(found))

            activated = any(isinstance(self.graph.nodes[j], Activation) for j in self.readers(i))
            inside = self.mode.relaxed_boxes and activated
            if inside or (i == last and self.mode.relaxed_margins):
                rows = self.rows(i)
                self.known[i] = self.refined(self.known[i], rows)
        return self.result(rows)

    def readers(self, i: int) -> list[int]:
        return list(self.graph.readers(i))

    # -------------------------------------------------------------------------------- one node

    def started(self, x, epsilon, box) -> Variation:
        """The region itself. Sets its half-widths and how far it goes from the center."""
        arithmetic = self.arithmetic
        half = jnp.full(x.shape, jnp.inf, x.dtype)
        if box is not None:
            half = jnp.broadcast_to(jnp.asarray(box, x.dtype), x.shape)
        if epsilon is not None:
            half = smaller(half, jnp.broadcast_to(jnp.asarray(epsilon, x.dtype), x.shape))
        radius = arithmetic.length(half)
        if epsilon is not None:
            radius = smaller(radius, jnp.asarray(epsilon, x.dtype))
        self.half, self.radius = half, radius

        still = half == 0
        lower, upper = arithmetic.widened(x - half, x + half, 0.0)
        rates = jnp.where(still, 0.0, jnp.ones_like(x))
        lower = jnp.where(still, x, lower)
        upper = jnp.where(still, x, upper)
        return Variation(lower, upper, (x, x), rates, jnp.max(rates))

    def cut(self, found: Variation, reach: jax.Array | None = None) -> Variation:
        """The same with its box cut: nothing is further from the center than `reach`, by default
        what the rates say."""
        up = self.arithmetic.up
        if reach is None:
            reach = up(found.rates * self.radius)
        # What cannot change is where its box says: there the ends may have to stay equal.
        lower, upper = self.arithmetic.widened(found.center[0] - reach, found.center[1] + reach, 0)
        lower = jnp.where(found.moves, larger(found.lower, lower), found.lower)
        upper = jnp.where(found.moves, smaller(found.upper, upper), found.upper)
        upper = larger(upper, lower)  # where nothing is rounded outwards
        return dataclasses.replace(found, lower=lower, upper=upper)

    def refined(self, found: Variation, rows: Rows) -> Variation:
        """The same by the rows of the Jacobian of this node, one for each of its entries."""
        up, shape = self.arithmetic.up, found.rates.shape
        size = rows.center[0].size
        center = jnp.abs(rows.center).reshape(*shape, size)
        lengths = rows.lengths.reshape(shape)
        spent = rows.spent.reshape(shape)

        rates = up(self.lengths_of(center) + lengths + spent, 2)
        half = self.half.reshape(-1)
        reach = up(up(center @ half, size) + up((lengths + spent) * self.radius), 2)
        entries = None
        if rows.entries is not None:
            off = rows.entries.reshape(*shape, size)
            entries = up(center + off + spent[..., None], 2)
            rates = smaller(rates, self.lengths_of(entries))
            reach = smaller(reach, up(entries @ half, size))
        rates = jnp.where(found.moves, smaller(found.rates, rates), 0.0)
        rate = smaller(found.rate, self.arithmetic.length(rates))
        masked = found.masked_rate
        if masked is not None:
            masked = smaller(masked, rate)
        found = dataclasses.replace(
            found, rates=rates, rate=rate, masked_rate=masked, entries=entries
        )
        found = self.cut(found, reach)
        return self.cut(found)

    def lengths_of(self, rows: jax.Array) -> jax.Array:
        """The l2 norms along the last axis."""
        return jax.vmap(self.arithmetic.length)(rows.reshape(-1, rows.shape[-1])).reshape(
            rows.shape[:-1]
        )

    def rearranged(self, node: Rearrange, before: list[Variation]) -> Variation:
        def together(values):
            squares = sum(jnp.square(value) for value in values)
            if len(values) == 1 and node.copies == 1:
                return values[0]
            return self.arithmetic.up(safe_sqrt(node.copies * squares), len(values))

        rates = node.linear(*(b.rates for b in before))
        masked = None
        if len(before) == 1 and before[0].masked_rate is not None:
            masked = together([before[0].masked_rate])
        return Variation(
            node(*(b.lower for b in before)),
            node(*(b.upper for b in before)),
            (node(*(b.center[0] for b in before)), node(*(b.center[1] for b in before))),
            rates,
            smaller(together([b.rate for b in before]), self.arithmetic.length(rates)),
            masked,
        )

    def added(self, node: Add, before: list[Variation]) -> Variation:
        arithmetic, terms = self.arithmetic, len(before)

        def total(ends):
            """The sum of intervals, one for each input."""
            signed = [
                (low, high) if sign == 1 else (-high, -low)
                for sign, (low, high) in zip(node.signs, ends, strict=True)
            ]
            low = sum(low for low, _ in signed)
            high = sum(high for _, high in signed)
            if node.constant is not None:
                constant = jnp.broadcast_to(node.constant, node.shape).astype(low.dtype)
                low, high = low + constant, high + constant
            elif terms == 1:
                return low, high
            sizes = [larger(jnp.abs(low), jnp.abs(high)) for low, high in signed]
            size = sum(sizes)
            if node.constant is not None:
                size = size + jnp.abs(constant)
            return arithmetic.widened(low, high, 4 * rounding.DOUBLE * size)

        lower, upper = total([(b.lower, b.upper) for b in before])
        rates, rate = before[0].rates, before[0].rate
        if terms > 1:
            rates = arithmetic.up(sum((b.rates for b in before[1:]), before[0].rates), terms)
            still = functools.reduce(jnp.logical_or, [b.moves for b in before])
            rates = jnp.where(still, rates, 0.0)
            rate = arithmetic.up(sum((b.rate for b in before[1:]), before[0].rate), terms)
            rate = smaller(rate, arithmetic.length(rates))
        return Variation(lower, upper, total([b.center for b in before]), rates, rate)

    def transformed(self, i: int, node: Linear, before: Variation) -> Variation:
        arithmetic, up = self.arithmetic, self.arithmetic.up
        like = before.lower
        operator = self.view(node.operator, like)

        def image(lower, upper):
            middle, half_width = arithmetic.around(lower, upper)
            middle = operator.affine(middle)
            half_width = operator.absolute(half_width)
            slack = arithmetic.slack(operator, lower, upper)
            return arithmetic.widened(middle - half_width, middle + half_width, slack)

        lower, upper = image(before.lower, before.upper)
        terms = like.size + operator.kernel.size
        by_entries = up(operator.absolute(before.rates), terms)
        by_norm = up(operator.row_norms(before.moves) * before.rate, terms)
        rates = smaller(by_entries, jnp.broadcast_to(by_norm, by_entries.shape))
        rate = arithmetic.length(rates)

        # A norm is needed of the rows alone that the activation behind can pass on.
        k = self.graph.linear.index(i)
        behind = activation_behind(self.graph, i)
        mask = None
        if behind is not None:
            found = self.cut(Variation(lower, upper, image(*before.center), rates, rate))
            mask = self.active_rows(i, behind, found)
        sigma = self.norm(k, operator, like, before.moves, mask)
        whole = up(sigma * before.rate)
        if mask is None:
            rate, masked = smaller(rate, whole), None
        else:
            masked = smaller(whole, arithmetic.length(jnp.where(mask, rates, 0.0)))
        return Variation(lower, upper, image(*before.center), rates, rate, masked)

    def active_rows(self, i: int, behind, found: Variation) -> jax.Array:
        """Mask of the outputs of linear node i that can move the activation behind it."""
        path, activation = behind
        lower, upper = found.lower, found.upper
        for node in path:
            lower, upper = node(lower), node(upper)
        mask = activation.rule.active(lower, upper)
        for node in reversed(path):
            mask = node.reached(mask, self.graph.nodes[node.inputs[0]].shape)
        return mask

    def activated(self, i: int, node: Activation, before: Variation) -> Variation:
        up, rule = self.arithmetic.up, node.rule
        rates, entries = before.rates[..., None], before.entries
        rate = before.rate if before.masked_rate is None else before.masked_rate
        whole = up(rule.lipschitz * rate)
        self.stages[i] = []
        for slopes in rule.jacobian(before.lower, before.upper, self.arithmetic):
            moves = slopes.moves[..., None]
            reach = up(slopes.reach(rates)[..., 0])
            radius = smaller(up(slopes.error_gain * rate), self.arithmetic.length(reach))
            errors = None
            if entries is not None:
                errors = up(slopes.reach(entries), entries.size)
                entries = jnp.where(moves, up(slopes.forward(entries), entries.size), 0.0)
            self.stages[i].append(Stage(slopes, reach, radius, errors, rate))
            rates = jnp.where(moves, up(slopes.forward(rates), rates.size), 0.0)
            rate = up(slopes.gain * rate)
        rates = rates[..., 0]
        rate = smaller(smaller(rate, whole), self.arithmetic.length(rates))
        center = rule.box(*before.center, self.arithmetic)
        lower, upper = rule.box(before.lower, before.upper, self.arithmetic)
        return Variation(lower, upper, center, rates, rate)

    # ----------------------------------------------------------------------------------- backward

    def rows(self, end: int) -> Rows:
        """The rows of the Jacobian of a node, one for each of its entries."""
        node = self.graph.nodes[end]
        dtype = self.known[0].lower.dtype

        def one(index):
            row = (jnp.arange(node.size) == index).astype(dtype).reshape(node.shape)
            return self.carried(end, row)

        center, entries, lengths, spent = jax.lax.map(
            one, jnp.arange(node.size), batch_size=min(ROWS, node.size)
        )
        return Rows(center, entries, lengths, spent)

    def carried(self, end: int, row: jax.Array):
        """One row in front of everything, and what errors and rounding on the way can add."""
        arithmetic, up = self.arithmetic, self.arithmetic.up
        zero = jnp.zeros((), row.dtype)
        length, spent = zero, zero
        inputs = self.known[0].lower.shape
        entries: jax.Array | None = jnp.zeros(self.known[0].lower.size, row.dtype)
        rows = {end: row}
        for i in range(end, 0, -1):
            if i not in rows:
                continue
            node, g = self.graph.nodes[i], rows.pop(i)
            befores = [self.known[j] for j in node.inputs]
            if isinstance(node, Activation):
                g, error, each, left = self.through_activation(i, g)
                length, spent = up(length + error, 2), up(spent + left, 2)
                known = entries is not None and each is not None
                entries = up(entries + each, 2) if known else None
                parts: tuple = (g,)
            elif isinstance(node, Linear):
                part, left = self.through_linear(node, befores[0], g)
                parts, spent = (part,), up(spent + left, 2)
            elif isinstance(node, Add):
                parts = tuple(g if sign == 1 else -g for sign in node.signs)
            else:
                assert isinstance(node, Rearrange)
                parts = node.transposed(g, *(b.lower.shape for b in befores))
                if node.copies > 1:  # rows that meet in one entry are added up
                    unit = 2 * rounding.gamma(node.copies + 2) * node.copies
                    for b in befores:
                        spent = up(spent + arithmetic.left_over(unit, g, b.rate), 2)
            for source, part in zip(node.inputs, parts, strict=True):
                if source not in rows:
                    rows[source] = part
                    continue
                rows[source] = rows[source] + part
                rate = self.known[source].rate
                left = arithmetic.left_over(4 * rounding.DOUBLE, rows[source], rate)
                spent = up(spent + left, 2)
        center = jnp.where(self.known[0].moves, rows.get(0, jnp.zeros(inputs, row.dtype)), 0.0)
        if entries is not None:
            entries = entries.reshape(inputs)
        return center, entries, length, spent

    def through_activation(self, i: int, g: jax.Array):
        """The row in front; of the errors a length, entries or None; what rounding adds."""
        arithmetic, up = self.arithmetic, self.arithmetic.up
        length = spent = jnp.zeros((), g.dtype)
        entries: jax.Array | None = jnp.zeros((), g.dtype)
        for stage in reversed(self.stages[i]):
            weights = stage.slopes.error_weights(g)
            error = largest_product(weights, stage.reach, stage.radius, arithmetic)
            length = up(length + error, 2)
            if stage.entries is None or entries is None:
                entries = None
            else:
                each = jnp.tensordot(jnp.abs(weights), stage.entries, weights.ndim)
                entries = up(entries + up(each, weights.size), 2)
            unit = 8 * rounding.DOUBLE * (1 + stage.slopes.gain)
            spent = up(spent + arithmetic.left_over(unit, g, stage.rate), 2)
            g = stage.slopes.transposed(g)
        return g, length, entries, spent

    def through_linear(self, node: Linear, before: Variation, g: jax.Array):
        arithmetic = self.arithmetic
        operator = self.view(node.operator, before.lower)
        row = operator.transpose(before.lower)(g)
        if arithmetic is rounding.EXACT:
            return row, 0.0
        terms = rounding.transposed_terms_of(operator, before.lower)
        size = closed.schur_bound(operator, before.lower, None, None)
        return row, arithmetic.left_over(2 * rounding.gamma(terms + 8) * size, g, before.rate)

    # --------------------------------------------------------------------------------- the result

    def result(self, rows: Rows | None) -> dict[str, Any]:
        """Of the last node."""
        arithmetic, up, last = self.arithmetic, self.arithmetic.up, self.known[-1]
        rate = last.rate
        if rows is not None:
            # The norm of a sum: of the known part, and of what it can be off.
            matrix = rows.center.reshape(len(rows.center), -1)
            inputs = self.known[0].lower
            operator = LinearOperator.from_matrix(matrix, inputs.shape, last.lower.shape)
            k = len(self.graph.linear)
            sigma = self.norm(k, operator, inputs, self.known[0].moves, None)
            off = arithmetic.length(rows.lengths)
            if rows.entries is not None:
                entries = rows.entries.reshape(matrix.shape)
                by_rows = up(jnp.max(jnp.sum(entries, axis=1)), matrix.size)
                by_columns = up(jnp.max(jnp.sum(entries, axis=0)), matrix.size)
                schur = up(safe_sqrt(by_rows) * safe_sqrt(by_columns))
                off = smaller(off, smaller(arithmetic.length(entries), schur))
            rate = smaller(rate, up(sigma + off + arithmetic.length(rows.spent), 3))
        return {
            "l2": rate,
            "linf": jnp.max(smaller(last.rates, rate)),
            "per_output": smaller(last.rates, rate),
            "lower": last.lower,
            "upper": last.upper,
            "variations": tuple(self.known),
        }
