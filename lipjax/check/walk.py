"""The checker's derivation of one example: what a ball around the input becomes, node by node, and
the margin left.

Part of `lipjax.check`; shares nothing with the bounds that it checks. METHOD 1 in mode "local" and
METHOD 3, in float64 with every rounding error turned outwards.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.sparse  # type: ignore[import-untyped]

from lipjax.check import onesided, slopes
from lipjax.check.layers import Activation, Add, Affine, Executed, Move, Node, Nonlinear
from lipjax.check.norms import TINY, Norms, U, gamma, up, up_norm

BISECTION_STEPS = 60

# Of the network as executed: unit roundoff of its operands, its sums, its results, the smallest
# result that is not flushed to zero, and the largest that is no overflow. Tensor cores truncate,
# hence one bit less for TF32 and bfloat16. A file names the least precise arithmetic of the
# network's layers; here all layers are taken to compute in it.
ARITHMETICS = {
    "float64": (0.0, 2.0**-53, 2.0**-53, 2.0**-1020, 2.0**1023),
    "float32": (0.0, 2.0**-24, 2.0**-24, 2.0**-125, 2.0**127),
    "tf32": (2.0**-10, 2.0**-22, 2.0**-24, 2.0**-125, 2.0**127),
    "bfloat16_products": (2.0**-8, 2.0**-22, 2.0**-24, 2.0**-125, 2.0**127),
    "bfloat16": (2.0**-8, 2.0**-22, 2.0**-8, 2.0**-125, 2.0**127),
}
# Entries of the product of two matrices up to which it is made.
LARGEST_PRODUCT = 2**21


@dataclasses.dataclass(frozen=True)
class Network:
    """The graph, and what does not depend on the example.

    Attributes:
        nodes: each takes values of nodes in front of it; the last one makes the logits.
        whole: per affine layer ``(lower, upper)`` bounds of its unmasked norm.
        arithmetic: in which the network is executed, a key of `ARITHMETICS`.
    """

    nodes: list[Node]
    whole: list[tuple[float, float]]
    arithmetic: str

    @functools.cached_property
    def meeting(self) -> frozenset[int]:
        """The numbers of the sums of two affine layers' values."""
        return frozenset(
            number
            for number, node in enumerate(self.nodes, 1)
            if isinstance(node.step, Add)
            and len(node.inputs) == 2
            and all(self.affine_before(taken) for taken in node.inputs)
        )

    @functools.cached_property
    def chained(self) -> frozenset[int]:
        """The numbers of the affine layers' values, but the last, whose layer takes another one's
        value, where the product of the two is not too large."""
        found = set()
        for number, node in enumerate(self.nodes[:-1], 1):
            if not isinstance(node.step, Affine) or not (
                before := self.affine_before(node.inputs[0])
            ):
                continue
            first = self.nodes[before[0] - 1].step
            assert isinstance(first, Affine)
            if first.matrix.shape[1] * node.step.matrix.shape[0] <= LARGEST_PRODUCT:
                found.add(number)
        return frozenset(found)

    def affine_before(self, number: int) -> tuple[int, list[Move]] | None:
        """The number of the affine layer's value that this one is or moves, each entry to at most
        one place, and the moves, the last one first."""
        path: list[Move] = []
        while number > 0 and isinstance(step := self.nodes[number - 1].step, Move):
            if len(step.sizes) != 1 or step.copies > 1:
                return None
            path.append(step)
            (number,) = self.nodes[number - 1].inputs
        if number > 0 and isinstance(self.nodes[number - 1].step, Affine):
            return number, path
        return None

    @functools.cached_property
    def followers(self) -> dict[int, tuple[list[Move], Nonlinear]]:
        """The activation behind each affine layer whose value nothing else takes, by the value's
        number, and the moves on the way to it, whose values nothing else takes either.

        Only there the layer's rows that cannot move an output of the activation may be left out.
        """
        takers: dict[int, list[int]] = {}
        for taker, node in enumerate(self.nodes, 1):
            for number in node.inputs:
                takers.setdefault(number, []).append(taker)
        found = {}
        for number, node in enumerate(self.nodes, 1):
            path: list[Move] = []
            at = takers.get(number, []) if isinstance(node.step, Affine) else []
            while len(at) == 1:
                step = self.nodes[at[0] - 1].step
                if isinstance(step, Nonlinear):
                    found[number] = path, step
                if not isinstance(step, Move) or len(step.sizes) != 1:
                    break
                path.append(step)
                at = takers.get(at[0], [])
        return found


@dataclasses.dataclass(frozen=True)
class Derived:
    """What was derived of one example.

    Attributes:
        logits: ``(classes,)``, as the checker computes them.
        rounding: ``(classes,)``, how far an executed logit can be from the exact one anywhere in
            the ball.
        differences: ``(classes,)``, the same of its difference to the label's.
        margin: certified iff correct and this is positive; -infinity where the derivation met NaN
            or overflow.
        taken: what was taken off the clean margin to the rival that decides.
        rival: that class.
        norms: ``(affine layers - 1, 2)``, lower and upper bounds of the masked norms.
    """

    logits: np.ndarray
    rounding: np.ndarray
    differences: np.ndarray
    margin: float
    taken: float
    rival: int
    norms: np.ndarray


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of the activation h(x') for every x' in the ball.

    Attributes:
        center: the value that the checker computed at x. It lies in the box.
        lower, upper: a box that contains h(x').
        varies: False only where h(x') is the same real number for all x' (known only to rounding:
            the box may have a width there).
        radius: ``||h(x') - center||_2`` over the coordinates that vary.
        error: per coordinate, how far the executed network's activation can be from h(x').
        distance: the same, as a distance in l2.
        operand, factor: of the maps behind each other that made it and are no products of matrices:
            bound of what they took, and of every product of their factors (`_executed`).
    """

    center: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    varies: np.ndarray
    radius: float
    error: np.ndarray
    distance: float
    operand: float = 0.0
    factor: float = 1.0

    def offset(self) -> np.ndarray:
        """How far h(x') can be from the center."""
        return up(np.maximum(self.upper - self.center, self.center - self.lower))


@dataclasses.dataclass(frozen=True)
class Walk:
    """What is known of every value on the way to the logits, by its number.

    Attributes:
        nodes: of the network.
        values: of x' itself and of each node that was passed.
        slack: of a node's own value: per output, how far it can be from where the changes of its
            inputs take the center (`transform`, `add`); of an activation how far its value at the
            center, as computed, can be from the exact one; zeros of a move, which is exact.
        kept: of an affine layer with a follower: its radius over the rows that can move an output
            of that activation; and of the moves on the way.
        moving: of an activation: bound of ``||z(x') - center||_2`` over its inputs that can move an
            output, and of what is not known of those that do not vary.
        rows: of an activation: which of its inputs can move an output that varies.
        norms: ``(lower, upper)`` of the masked norms of the affine layers that were passed, in
            order.
    """

    nodes: list[Node]
    values: list[Known] = dataclasses.field(default_factory=list)
    slack: list[np.ndarray] = dataclasses.field(default_factory=list)
    kept: dict[int, float] = dataclasses.field(default_factory=dict)
    moving: dict[int, float] = dataclasses.field(default_factory=dict)
    rows: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    norms: list[tuple[float, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Tight:
    """What mode "tight" records of one example.

    Attributes:
        margin: as recorded: where less is needed for it, less is done.
        slopes: of some rivals, all activations after each other, as whole numbers
            (`onesided.UNIT`).
    """

    margin: float
    slopes: Mapping[int, np.ndarray]


def derive(
    network: Network,
    x: np.ndarray,
    label: int,
    epsilon: float,
    norms: Norms,
    *,
    linear: bool = False,
    rows: Sequence[Callable | None] = (),
    tight: Tight | None = None,
) -> Derived:
    """Bounds the margin of class `label` on the ball ``||x' - x||_2 <= epsilon`` around one example
    x.

    `linear`: also through the slopes (`check_slopes`); the better of the two. `rows`: rules for the
    slopes by which each neuron's box is cut, too; None: errors as wide as `check_slopes` has them.
    """
    with np.errstate(all="ignore"):  # NaN and infinity are dealt with at the end
        walked = walk(network, x, epsilon, norms, rows)
        return _margin(network, walked, label, linear, tight)


def walk(
    network: Network,
    x: np.ndarray,
    epsilon: float,
    norms: Norms,
    rows_by: Sequence[Callable | None] = (),
) -> Walk:
    """Carries the ball up to the input of the last layer, in mode "local"; `rows_by`: with each
    box cut by the neuron's row, as in `derive`."""
    x = x.astype(np.float64).reshape(-1)
    ends = [
        np.nextafter(x + side * epsilon, side * np.inf) if epsilon > 0 else x for side in (-1, 1)
    ]
    none = np.zeros(x.shape)
    image = Known(x, ends[0], ends[1], np.full(x.shape, epsilon > 0), epsilon, none, 0.0)
    walked = Walk(network.nodes, [image], [none])
    for number, node in enumerate(network.nodes[:-1], 1):
        taken = [walked.values[taken] for taken in node.inputs]
        before = taken[-1]
        if isinstance(node.step, Add):
            known, slack = summed(node.step, taken, network.arithmetic)
            radius = known.radius
            if (found := _side_by_side(network, number, walked, norms)) is not None:
                radius = np.minimum(radius, up(found + up_norm(slack)))
        elif isinstance(node.step, Move):
            known = move(node.step, taken)
            slack, radius = np.zeros(known.center.shape), known.radius
            if node.inputs[0] in walked.kept and len(node.inputs) == 1:
                # What reaches an output of the activation behind comes from rows that do.
                walked.kept[number] = _spread(node.step, [walked.kept[node.inputs[0]]])
        elif isinstance(node.step, Nonlinear):
            known, rows = activate(node.step, before)
            known = dataclasses.replace(known, operand=0.0, factor=1.0)
            slack = node.step.off(known.center)
            # Lipschitz, also in what is not known of these
            still = before.offset() * ~before.varies
            radius = walked.kept.get(node.inputs[0], up(before.radius + up_norm(still[rows])))
            walked.rows[number] = rows
            walked.moving[number] = up(radius + up_norm(still))
            if (growth := node.step.growth(before)) != 1:
                radius = up(growth * radius)
            radius = radius + up_norm(slack) if np.any(slack) else radius
        else:
            whole = network.whole[len(walked.norms)]
            known, slack = transform(node.step, before, whole[1], network.arithmetic)
            if rows_by and node.inputs[0] > 0:
                known = _cut(known, node, walked, slack, rows_by)
            rows = known.varies
            if number in network.followers:
                rows = _moving_rows(*network.followers[number], known)
            lower, upper = whole
            if not (rows.all() and before.varies.all()):
                lower, upper = norms(node.step.matrix[rows][:, before.varies])
                upper = min(upper, whole[1])
            walked.norms.append((lower, upper))
            radius = up(up(upper * before.radius) + up_norm(slack[rows]))
            if number in network.chained:
                chained = _chained(network, node, walked, norms, rows, upper)
                radius = min(radius, up(chained + up_norm(slack[rows])))
            if number in network.followers:
                walked.kept[number], radius = radius, math.inf
        half_diagonal = up_norm(known.offset()[known.varies])
        # Unlike min, this keeps a NaN.
        walked.values.append(
            dataclasses.replace(known, radius=float(np.minimum(radius, half_diagonal)))
        )
        walked.slack.append(slack)
    return walked


def _side_by_side(network: Network, number: int, walked: Walk, norms: Norms) -> float | None:
    """The radius of a sum of two affine layers' values, but for its own slack, by the norm of their
    matrices side by side, the second times the factor t by which it is at most the sum of both
    radii; None of any other."""
    if number not in network.meeting:
        return None
    found = [network.affine_before(taken) for taken in network.nodes[number - 1].inputs]
    numbers, paths = zip(*(each for each in found if each is not None), strict=True)
    before = [walked.values[network.nodes[taken - 1].inputs[0]] for taken in numbers]
    first, second = (known.radius for known in before)
    a, b = (walked.norms[_place(network, taken)][1] for taken in numbers)
    if not (min(a, b, first, second) > 0 and 1e-30 < (square := a * second / (b * first)) < 1e30):
        return None
    scale = math.sqrt(square)
    matrices = []
    for taken, path, known in zip(numbers, paths, before, strict=True):
        layer = network.nodes[taken - 1].step
        assert isinstance(layer, Affine)
        matrix = layer.matrix[:, known.varies]
        for step in reversed(path):
            matrix = step.rows(matrix)
        matrices.append(matrix)
    _, upper = norms(scipy.sparse.hstack([matrices[0], matrices[1] * scale], format="csr"))
    length = up_norm(np.array([first, second / scale]))
    upper = up(upper, matrices[0].shape[0])  # also what the factor has rounded off the entries
    return float(up(up(upper * length) + sum(up_norm(walked.slack[taken]) for taken in numbers)))


def _chained(network: Network, node: Node, walked: Walk, norms: Norms, rows, norm: float) -> float:
    """The radius of an affine layer's value whose layer takes another one's, but for its own slack,
    by the norm of the product of the two matrices.

    Args:
        rows: that count.
        norm: of the layer itself, without what does not count.
    """
    found = network.affine_before(node.inputs[0])
    assert found is not None and isinstance(node.step, Affine)
    number, path = found
    layer = network.nodes[number - 1].step
    assert isinstance(layer, Affine)
    known = walked.values[network.nodes[number - 1].inputs[0]]
    inner = layer.matrix[:, known.varies]
    for step in reversed(path):
        inner = step.rows(inner)
    # The rest of what the layer takes is in its slack.
    inside = walked.values[node.inputs[0]].varies
    outer = node.step.matrix[rows][:, inside]
    inner = inner[inside]
    rounded = 2 * gamma(outer.shape[1] + 8) * up(up_norm(outer.data) * up_norm(inner.data))
    _, upper = norms(outer @ inner)
    radius = up(up(upper + rounded) * known.radius)
    return float(up(radius + up(norm * up_norm(walked.slack[number]))))


def _place(network: Network, number: int) -> int:
    """Of an affine layer among them, by its value's number."""
    return sum(isinstance(node.step, Affine) for node in network.nodes[: number - 1])


def _cut(known: Known, node: Node, walked: Walk, slack: np.ndarray, rules) -> Known:
    """The box of an affine layer's outputs, cut with what the row of each says, upwards and
    downwards."""
    assert isinstance(node.step, Affine)
    start = node.inputs[0]
    directions = node.step.matrix.toarray() * walked.values[start].varies
    ends = []
    for sign, reach in ((-1, known.center - known.lower), (1, known.upper - known.center)):
        by_row = np.full(len(slack), np.inf)
        for rule in rules:
            by_row = slopes.linear_gains(
                walked, start, sign * directions, by_row, worst_gains, rule
            )
        ends.append(
            known.center
            + sign * np.minimum(reach, up(by_row + slack) + 4 * U * np.abs(known.center))
        )
    return dataclasses.replace(known, lower=ends[0], upper=ends[1])


def _margin(
    network: Network, walked: Walk, label: int, linear: bool, tight: Tight | None
) -> Derived:
    head, (start,) = network.nodes[-1].step, network.nodes[-1].inputs
    assert isinstance(head, Affine)  # nodes_of sees to it
    known = walked.values[start]
    logits, slack = transform(head, known, network.whole[-1][1], network.arithmetic)
    rivals = np.flatnonzero(np.arange(len(logits.center)) != label)
    rows, inside = head.matrix.toarray(), known.varies
    directions = (rows[rivals] - rows[label]) * inside
    low, high = known.lower - known.center, known.upper - known.center
    gain = worst_gains(directions[:, inside], low[inside], high[inside], known.radius)
    if linear:
        gain = slopes.linear_gains(walked, start, directions, gain, worst_gains)

    off = _of_differences(head, known, (logits.lower, logits.upper), label, network.arithmetic)
    allowed = slack[rivals] + slack[label] + off[rivals]

    def margins_of(gain):
        taken = gain + allowed
        sizes = np.abs(logits.center[rivals]) + np.abs(logits.center[label]) + taken
        return taken, logits.center[label] - logits.center[rivals] - taken - 16 * U * sizes

    margin = -math.inf if tight is None else tight.margin
    for rule, of in _rules(tight, walked, rivals):
        short = ~(margins_of(gain)[1] >= margin)
        some = np.flatnonzero(short & of)
        if len(some):
            gain[some] = slopes.linear_gains(
                walked, start, directions[some], gain[some], worst_gains, rule
            )
    taken, margins = margins_of(gain)
    worst = int(np.argmin(margins))
    found = np.array(walked.norms).reshape(-1, 2)
    everything = (logits.center, logits.lower, logits.upper, allowed, gain, margins, found)
    finite = all(np.all(np.isfinite(part)) for part in everything)
    margin = float(margins[worst]) if finite else -math.inf
    return Derived(
        logits.center, logits.error, off, margin, float(taken[worst]), int(rivals[worst]), found
    )


def _rules(tight: Tight | None, walked: Walk, rivals: np.ndarray):
    """Rules for slopes, one after the other, and the rivals that each is for.

    The last is None, errors of both signs: what it says is seldom needed.
    """
    if tight is None:
        return
    for rule in onesided.RULES:
        yield rule, np.ones(len(rivals), bool)
    sizes = onesided.sizes(walked)
    for rival, given in tight.slopes.items():
        if sum(sizes) == len(given):  # else they are of something else, and prove nothing
            parts = np.split(given, np.cumsum(sizes)[:-1])
            yield onesided.from_file(parts), rivals == rival
    yield None, np.ones(len(rivals), bool)


def transform(
    layer: Affine, known: Known, whole: float, arithmetic: str
) -> tuple[Known, np.ndarray]:
    """What is known behind an affine layer, but for the radius (infinity), and the slack of its
    center.

    The slack bounds, per output, ``(W h(x') + b - center) - W D_in (h(x') - h's center)``: rounding
    of the center, and what is not known of the inputs that do not vary.

    Args:
        whole: an upper bound of ``||W||_2``.
        arithmetic: key of `ARITHMETICS`, of the network as executed.
    """
    bias, sizes = layer.bias, np.abs(layer.bias)
    loss = 2 * gamma(layer.terms + 4)
    center = layer.matrix @ known.center + bias
    fixed = np.where(known.varies, 0.0, known.offset())
    slack = (
        loss * (layer.absolute @ np.abs(known.center) + sizes)
        + up(layer.absolute @ fixed, layer.terms)
        + TINY
    )

    middle = (known.lower + known.upper) / 2
    half = up(np.maximum(known.upper - middle, middle - known.lower))
    half_image = layer.absolute @ half
    around = layer.matrix @ middle + bias
    reach = half_image + loss * (layer.absolute @ np.abs(middle) + half_image + sizes) + TINY

    inside = known.varies.astype(np.float64)
    rows = np.sqrt(up(layer.squared @ inside, layer.terms)) + layer.terms * 2.0**-500
    ball = up(up(rows) * known.radius) + slack
    # Both intervals hold, and so does the center's own value: without it, rounding could leave them
    # no common point.
    lower = np.minimum(np.maximum(around - reach, center - ball), center)
    upper = np.maximum(np.minimum(around + reach, center + ball), center)
    varies = layer.absolute @ inside > 0
    executed = _executed(layer, known, (lower, upper), whole, arithmetic)
    return Known(center, lower, upper, varies, math.inf, *executed), slack


def _executed(
    layer: Affine,
    known: Known,
    behind: tuple[np.ndarray, np.ndarray],
    whole: float,
    arithmetic: str,
) -> tuple[np.ndarray, float, float, float]:
    """How far the executed network can be behind this layer, the error carried through it and its
    own rounding, per coordinate and as a distance; and `Known.operand` and `Known.factor`.

    Args:
        behind: box of the layer's exact value.
    """
    if _is_identity(layer):
        return known.error, known.distance, known.operand, known.factor
    local, operand, factor = _rounded_off(layer, known, behind, arithmetic)
    error = up(up(_through(layer, known), layer.terms) + local)
    distance = np.minimum(up(whole * known.distance + up_norm(local)), up_norm(error))
    return error, float(distance), operand, factor


def _is_identity(layer: Affine) -> bool:
    """Does nothing stand there in the program? (Of parts the first alone may be so.)"""
    return layer.executed is not None and layer.executed.results == 0 and not layer.parts


def _through(layer: Affine, known: Known) -> np.ndarray:
    """What becomes of the error in front of a layer, per output, but for rounding here."""
    return np.minimum(layer.absolute @ known.error, layer.row_norms * known.distance)


def _of_differences(
    head: Affine, known: Known, behind: tuple[np.ndarray, np.ndarray], label: int, arithmetic: str
) -> np.ndarray:
    """How far the difference of each logit to the label's can be from the exact one: what is wrong
    in front of the last layer goes through the difference of two of its rows."""
    rows = head.matrix.toarray()
    # Of a difference of two numbers the last bit is off.
    rows = up(np.abs(rows - rows[label]))
    lengths = np.array([up_norm(row) for row in rows])
    passed = up(np.minimum(rows @ known.error, lengths * known.distance), rows.shape[1])
    if _is_identity(head):
        return passed
    local, *_ = _rounded_off(head, known, behind, arithmetic)
    return up(passed + local + local[label])


def _rounded_off(
    layer: Affine, known: Known, behind: tuple[np.ndarray, np.ndarray], arithmetic: str
) -> tuple[np.ndarray, float, float]:
    """What the executed layer itself rounds off, per output; `Known.operand` and `Known.factor`.

    The sizes are those of the executed activation, |h| + error. Results below the smallest number
    may be flushed to zero. Infinity where a sum could overflow.
    """
    nothing = np.full(len(layer.bias), np.inf), 0.0, 1.0
    size = up(np.maximum(np.abs(known.lower), np.abs(known.upper)) + known.error)
    # Of the sum that one product makes it is known how large it can be.
    reached = np.full(len(layer.bias), np.inf)
    if len(layer.parts) < 2:
        passed = up(_through(layer, known), layer.terms)
        reached = up(np.maximum(np.abs(behind[0]), np.abs(behind[1])) + passed)
    local = np.zeros(len(layer.bias))
    operand, factor = known.operand, known.factor
    for k, part in enumerate(layer.parts or (layer,)):
        *_, smallest, largest = _units(part.executed, arithmetic)
        # A compiler may multiply the factors of several maps first, also of those in front of this
        # layer. Their product may underflow, or overflow, where no value does. Only a product of
        # matrices is no factor of those before.
        if _is_product(part):
            operand, factor = 0.0, 1.0
        lost = 4 * smallest * operand
        operand = max(operand, part.terms * float(np.max(size, initial=0.0)))
        factor = max(factor, 1.0) * part.largest
        own, size = _own(part, size, reached, arithmetic)
        # What the parts before have rounded off goes through this one.
        local = up((part.absolute @ local if k else 0.0) + own + lost, part.terms)
        size = up(size + local)
        if not np.all(np.isfinite(size)) or not factor < largest:
            return nothing
    if len(layer.parts) < 2 and _is_product(layer):
        operand, factor = 0.0, 1.0
    return local, operand, factor


def _is_product(layer: Affine) -> bool:
    """Is it known to be a product of matrices?"""
    return layer.executed is not None and layer.executed.product


def _own(
    layer: Affine, size: np.ndarray, reached: np.ndarray, arithmetic: str
) -> tuple[np.ndarray, np.ndarray]:
    """What a map itself rounds off, of executed inputs of these sizes, and the sizes of its values;
    infinity where a sum could overflow.

    Operands are first rounded by u_in, then n terms are summed with u_acc, then results stored with
    u_out. Each of at most n + 1 additions errs by u_acc of its result, which is a sum of some of
    the terms: at most that of all positive ones or that of all negative ones. The larger of these
    is half of ``total`` (the sum of the terms' sizes) and of the size of the whole sum together.

    Args:
        reached: bound of the size of that sum, on these inputs.
    """
    u_in, u_acc, u_out, smallest, largest = _units(layer.executed, arithmetic)
    n, results = layer.terms, 3 if layer.executed is None else layer.executed.results
    total = up(layer.absolute @ size + np.abs(layer.bias), n)
    # (1 + u_in)^2 (1 + u_out)^results - 1, in which nothing cancels
    stored = up(math.expm1(2 * math.log1p(u_in) + results * math.log1p(u_out)))
    some = up((total + np.minimum(reached, total)) / 2)  # of the terms, added up
    sums = gamma(n + 2, u_acc) * (1 + 2 * u_acc) * up(some + stored * total)
    off = stored * total + (1 + stored) * up(u_acc * total + sums)
    flushed = (n + 2) * smallest * (1 + layer.largest + np.max(size, initial=0.0))
    local = up(up(off) + flushed)
    # A mean is added up before it is divided: so many of the largest input must not overflow
    # either.
    added = n * np.max(size, initial=0.0)
    if not max(float(np.max(total + local, initial=0.0)), float(added)) < largest:
        return np.full(len(total), np.inf), np.full(len(total), np.inf)
    return local, total


def _units(executed: Executed | None, arithmetic: str) -> tuple[float, float, float, float, float]:
    """What a step of the network rounds by, as `ARITHMETICS` has it.

    Only products of matrices depend on the device, of which the recorded arithmetic tells. All else
    computes in its own types, sums included.
    """
    if executed is None:
        return ARITHMETICS[arithmetic]
    name = arithmetic
    if "bfloat16" in executed.types:
        name = "bfloat16"
    elif not executed.product:
        name = "float32" if "float32" in executed.types else "float64"
    elif arithmetic == "bfloat16":  # whatever the device makes of its float32 products
        name = "bfloat16_products"
    u_in, u_acc, u_out, smallest, largest = ARITHMETICS[name]
    if not executed.product:
        u_in, u_acc = 0.0, u_out
    return u_in, u_acc, u_out, smallest, largest


def move(step: Move, taken: Sequence[Known]) -> Known:
    """What is known of entries in other places, where a constant is known exactly."""
    return Known(
        step(*(known.center for known in taken)),
        step(*(known.lower for known in taken)),
        step(*(known.upper for known in taken)),
        step(*(known.varies for known in taken), filled=False),
        _spread(step, [known.radius for known in taken]),
        step(*(known.error for known in taken), filled=False),
        _spread(step, [known.distance for known in taken]),
        max(known.operand for known in taken),
        max(known.factor for known in taken),
    )


def _spread(step: Move, lengths: Sequence[float]) -> float:
    """Bound of an l2 length behind a move, given those of what it moves."""
    if len(lengths) == 1 and step.copies <= 1:
        return lengths[0]
    return float(up(math.sqrt(step.copies) * up_norm(np.array(lengths))))


def _moving_rows(path: Sequence[Move], activation: Nonlinear, known: Known) -> np.ndarray:
    """Which entries can move an output of the activation behind these moves."""
    for step in path:
        known = move(step, [known])
    _, rows = activate(activation, known)
    for step in reversed(path):
        (found,) = step.back(rows[None].astype(np.float64))
        rows = found[0] > 0
    return rows


def summed(step: Add, taken: Sequence[Known], arithmetic: str) -> tuple[Known, np.ndarray]:
    """What is known of a sum, and the slack of its center (`add`)."""
    signed = zip(step.signs, taken, strict=True)
    parts = [known if sign == 1 else _negated(known) for sign, known in signed]
    u_out = _units(step.executed, arithmetic)[2]
    if step.constant is not None:
        c = step.constant
        off = np.zeros(c.shape)
        if step.roundings:
            off = up(math.expm1(step.roundings * math.log1p(u_out)) * np.abs(c))
        parts.append(Known(c, c, c, np.zeros(c.shape, bool), 0.0, off, up_norm(off)))
    known = parts[0]
    if len(parts) == 2:
        return add(known, parts[1], arithmetic, step.executed)
    none = np.zeros(known.center.shape)
    if step.executed is not None and step.executed.results == 0:
        return known, none
    # The same number in a narrower type.
    box, off, length = (known.lower, known.upper), known.error, known.distance
    error, distance = _stored(*box, off, length, step.executed, arithmetic)
    return dataclasses.replace(known, error=error, distance=distance), none


def _negated(known: Known) -> Known:
    return dataclasses.replace(known, center=-known.center, lower=-known.upper, upper=-known.lower)


def add(
    first: Known,
    second: Known,
    arithmetic: str,
    executed: Executed | None = None,
) -> tuple[Known, np.ndarray]:
    """What is known of the sum of two values, and the slack of its center: the rounding of the sum
    of the centers.

    Both depend on the same x', so that the sum of the two boxes contains the sum, and where one of
    the two varies, the other one counts with what is not known of it.
    """
    center = first.center + second.center
    slack = 2 * U * np.abs(center) + TINY
    lower = np.nextafter(first.lower + second.lower, -np.inf)
    upper = np.nextafter(first.upper + second.upper, np.inf)
    varies = first.varies | second.varies
    still = [up_norm(known.offset()[varies & ~known.varies]) for known in (first, second)]
    radius = up(first.radius + second.radius + sum(still) + up_norm(slack[varies]))

    carried, length = up(first.error + second.error), up(first.distance + second.distance)
    error, distance = _stored(lower, upper, carried, length, executed, arithmetic)
    longest = max(first.operand, second.operand), max(first.factor, second.factor)
    return Known(center, lower, upper, varies, float(radius), error, distance, *longest), slack


def _stored(lower, upper, carried, length, executed, arithmetic) -> tuple[np.ndarray, float]:
    """How far a value in this box, already off by so much, can be once it is rounded to its type.

    Infinity where it could overflow.
    """
    _, _, u_out, smallest, largest = _units(executed, arithmetic)
    size = up(np.maximum(np.abs(lower), np.abs(upper)) + carried)
    local = up(u_out * size) + 4 * smallest
    error = up(carried + local)
    distance = np.minimum(up(length + up_norm(local)), up_norm(error))
    if not np.max(size + local, initial=0.0) < largest:
        return np.full(error.shape, np.inf), math.inf
    return error, float(distance)


def activate(step: Nonlinear, known: Known) -> tuple[Known, np.ndarray]:
    """What is known behind an activation, its radius as before, and which inputs can move an output
    that varies."""
    if not isinstance(step, Activation):
        return step.activated(known)
    lower, upper = step(known.lower), step(known.upper)
    # clipping returns the very same number for both ends; a NaN counts as open
    open_ = lower != upper
    if not step.pairs:
        varies = rows = known.varies & open_
        error = known.error
    else:
        (lower_a, lower_b), (upper_a, upper_b) = step.halves(known.lower), step.halves(known.upper)
        varies_a, varies_b = step.halves(known.varies)
        open_first, open_second = step.halves(open_)
        # Where the order cannot change the pair is a permutation: each input feeds one output.
        a_leads = lower_a >= upper_b
        b_leads = ~a_leads & (lower_b >= upper_a)
        mixed = varies_a | varies_b
        first = np.where(a_leads, varies_a, np.where(b_leads, varies_b, mixed)) & open_first
        second = np.where(a_leads, varies_b, np.where(b_leads, varies_a, mixed)) & open_second
        either = first | second
        rows_a = np.where(a_leads, first, np.where(b_leads, second, either))
        rows_b = np.where(a_leads, second, np.where(b_leads, first, either))
        varies, rows = step.joined(first, second), step.joined(rows_a, rows_b)
        larger = np.maximum(*step.halves(known.error))
        error = step.joined(larger, larger)
    return Known(
        step(known.center), lower, upper, varies, known.radius, error, known.distance
    ), rows


def worst_gains(
    directions: np.ndarray, low: np.ndarray, high: np.ndarray, radius: float
) -> np.ndarray:
    """Upper bounds of ``max <d, t>`` over ``||t||_2 <= radius, low <= t <= high``, one per row d of
    `directions`.

    For every mu > 0, ``<d, t> <= max over the box of (<d, t> - mu/2 ||t||^2) + mu/2 radius^2``, and
    the maximum is at ``t = clip(d / mu, low, high)`` (METHOD 3). The smallest of this at the mu
    that bisection finds, of the ball alone and of the box alone.

    Args:
        directions: ``(rivals, n)``.
        low, high: ``(n,)``, low <= 0 <= high.
        radius: >= 0.
    """
    d, count = directions, directions.shape[1]
    if count == 0 or radius == 0:
        return np.zeros(len(d))
    radius = np.float64(radius)  # of which squares overflow to infinity
    low, high = low * (1 + 4 * U) - TINY, high * (1 + 4 * U) + TINY
    norm = np.array([up_norm(row) for row in d])
    ball = up(radius * norm)
    box = up(np.sum(np.maximum(d * low, d * high), axis=1), count)
    left = np.log(radius) - np.log(np.maximum(norm, 1e-290))  # the scale 1 / mu of the ball alone
    right = left + 40
    for _ in range(BISECTION_STEPS):
        middle = (left + right) / 2
        t = np.clip(d * np.exp(middle)[:, None], low, high)
        short = np.linalg.norm(t, axis=1) <= radius
        left, right = np.where(short, middle, left), np.where(short, right, middle)
    scale = np.exp((left + right) / 2)
    t = np.clip(d * scale[:, None], low, high)
    # The scale may be so small that what underflows counts: the room is at least a normal number,
    # and a coordinate that vanishes costs less than TINY times its d.
    room = max(radius, 2.0**-500) ** 2
    product, square = np.sum(d * t, axis=1), np.sum(np.square(t), axis=1)
    dual = product + (room - square) / (2 * scale)
    dual += 2 * gamma(count + 8) * (product + (room + square) / (2 * scale))
    dual += count * TINY * (1 + np.max(np.abs(d), axis=1))
    # The differences of rows that d holds are themselves rounded.
    return np.minimum(np.minimum(box, ball), dual) + 4 * U * ball
