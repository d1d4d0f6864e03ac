"""The function as executed: how far its own arithmetic can be from the real-number function.

The arithmetic is read from the equations of the graph (`graph.Executed`), each with its types and
its precision; nothing is guessed from parameters. See `rounding.outward` for the error model.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lipjax.graph import Activation, Add, Executed, Graph, Input, Linear, Node, Rearrange
from lipjax.graph.linear import LinearOperator, Scale, Sum
from lipjax.rounding.outward import LARGEST, OUTWARD, gamma, terms_of


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How an equation computes.

    Attributes:
        name: as results carry it.
        input: relative error of converting an operand before it is multiplied.
        accumulate: unit roundoff of products and sums.
        output: unit roundoff of the result's format.
        smallest: what underflow can do to one operation, for operands of size up to 1.
        largest: numbers above it overflow.
    """

    name: str
    input: float
    accumulate: float
    output: float
    smallest: float
    largest: float


ARITHMETICS = {
    a.name: a
    for a in (
        Arithmetic("float64", 0.0, 2.0**-53, 2.0**-53, 2.0**-1020, 1e300),
        Arithmetic("float32", 0.0, 2.0**-24, 2.0**-24, 2.0**-125, 3e38),
        Arithmetic("tf32", 2.0**-10, 2.0**-22, 2.0**-24, 2.0**-125, 3e38),
        # float32 products at a TPU's default precision
        Arithmetic("bfloat16_products", 2.0**-8, 2.0**-22, 2.0**-24, 2.0**-125, 3e38),
        # products in bfloat16; partial sums in float32, as every matrix unit keeps them
        Arithmetic("bfloat16", 2.0**-8, 2.0**-22, 2.0**-8, 2.0**-125, 3e38),
    )
}
KNOWN_TYPES = ("float64", "float32", "bfloat16")
# Algorithms that a product can fix, by the arithmetic that covers them. Others are refused: they
# sum in 16 bits, multiply in 8, or take several products for one.
ALGORITHMS = {
    "F64_F64_F64": "float64",
    "F32_F32_F32": "float32",
    "TF32_TF32_F32": "tf32",
    "BF16_BF16_F32": "bfloat16_products",
}
# Units of roundoff that parameters may be off by when they are computed at each call.
FEW = 100.0


@dataclasses.dataclass(frozen=True)
class Run:
    """Scales behind each other, with sums and rearrangements between them. XLA multiplies factors
    that are constants of a program first, so their product may underflow or overflow where no value
    of the program does.

    Attributes:
        size: bound of the operands; 0 where there are none.
        factor: bound of every product of factors in a row.
    """

    size: float | jax.Array = 0.0
    factor: float | jax.Array = 1.0

    def extended(self, operator: LinearOperator, size: jax.Array) -> "Run":
        """By one map, of an operand of this size."""
        largest = terms_of(operator, size) * jnp.max(size)
        factor = jnp.maximum(self.factor, 1.0) * jnp.max(jnp.abs(operator.kernel))
        return Run(OUTWARD.up(jnp.maximum(self.size, largest)), OUTWARD.up(factor))


def arithmetics_of(graph: Graph, declared: str | None = None) -> tuple[tuple[Arithmetic, ...], ...]:
    """The arithmetic of each node: of all the equations that it stands for.

    Args:
        graph: as traced in the types in which it will be executed.
        declared: a name in `ARITHMETICS`: how products and sums of float32 (of float64, for
            "float64") will be executed; None: as this process's default device executes them.

    Raises:
        ValueError: unknown name; an equation that rounds more than was declared.
        TypeError: a type that the model does not know, or parameters that are computed anew at each
            call by more than a few roundings, those of an activation by any; with the line of the
            program.
    """
    if declared is not None and declared not in ARITHMETICS:
        names = ", ".join(ARITHMETICS)
        raise ValueError(f"arithmetic must be one of {names}, got {declared!r}.")
    for node in graph.nodes:
        if node.dtype not in KNOWN_TYPES:
            raise TypeError(
                f"{node.where}: a value of type {node.dtype}; what rounding does there is not in "
                f"the error model (known: {', '.join(KNOWN_TYPES)}). Compute in float32."
            )
        # Where no equation rounds, none counts how far the parameters are off either.
        least = FEW if isinstance(node, Linear | Add) and node.executed else 0.0
        if getattr(node, "roundings", 0.0) > least:
            if isinstance(node, Activation):
                raise TypeError(
                    f"{node.where}: the numbers of a {node.rule.kind} (its slopes or ends) are "
                    "rounded when they are computed anew at every call, or where the program "
                    "divides by them: they may be others than those that are certified. Multiply "
                    "instead of dividing, and compute numbers outside of the function."
                )
            raise TypeError(
                f"{node.where}: parameters that are computed anew at every call (by more than a "
                "few multiplications) may be rounded otherwise than those that are certified. "
                "Write them down once: lipjax.orthogonal.plain(network), or compute them outside "
                "of the function."
            )
    return tuple(
        tuple(_arithmetic(node, e, declared) for e in node.executed) for node in graph.nodes
    )


def _arithmetic(node: Node, equation: Executed, declared: str | None) -> Arithmetic:
    """Of one equation."""
    types = {*equation.operands, equation.result}
    if equation.accumulate is not None:
        types.add(equation.accumulate)
    floats = {t for t in types if "float" in t}
    if not floats <= set(KNOWN_TYPES):
        strange = ", ".join(sorted(floats - set(KNOWN_TYPES)))
        raise TypeError(
            f"{node.where}: `{equation.primitive}` in {strange}; what rounding does there is not "
            "in "
            f"the error model (known: {', '.join(KNOWN_TYPES)}). Compute in float32."
        )
    name = _own(equation, floats)
    if declared is not None and declared != name:
        if name == "float64":
            raise ValueError(
                f"{node.where}: `{equation.primitive}` computes in float64; to execute it in "
                f"{declared} its parameters would be rounded, which is not in the error model: "
                "give the network float32 parameters."
            )
        chosen = "bfloat16" in floats or (equation.precision or "").startswith("algorithm")
        if _order(declared) < _order(name) and (chosen or declared == "float64"):
            raise ValueError(
                f"{node.where}: `{equation.primitive}` computes in {name}, which rounds more than "
                f"the declared {declared}: declare {name} or give the layer another dtype."
            )
        name = declared
    found = ARITHMETICS[name]
    if equation.primitive.startswith("reduce"):
        # Plain sums are kept in their own type, also where products would be summed in a wider one.
        unit = max(found.output, found.accumulate)
        return dataclasses.replace(found, accumulate=unit)
    if not equation.product:
        return dataclasses.replace(found, input=0.0, accumulate=found.output)
    return found


def _own(equation: Executed, floats: set[str]) -> str:
    """The arithmetic of an equation on this process's default device."""
    own = "bfloat16" if "bfloat16" in floats else "float32"
    if floats == {"float64"}:
        own = "float64"
    platform = jax.default_backend()
    algorithm = equation.precision or ""
    if algorithm.startswith("algorithm"):
        algorithm = algorithm.removeprefix("algorithm ").rpartition(".")[2]
        # Numbers of float64 would first be rounded to what it multiplies.
        if algorithm not in ALGORITHMS or (own == "float64" and algorithm != "F64_F64_F64"):
            raise TypeError(
                f"`{equation.primitive}` of {own} by {algorithm}, which the error model does not "
                f"know (it knows {', '.join(ALGORITHMS)}). Give no algorithm, or a precision of "
                "jax.lax.Precision."
            )
        # On a TPU the algorithm is taken at its word only where it rounds no less than the device.
        device = "bfloat16_products" if platform == "tpu" and own != "float64" else own
        return _coarser(ALGORITHMS[algorithm], own, device)
    if own != "float32" or not equation.product or equation.primitive.startswith("reduce"):
        return own
    if platform == "tpu":
        return "bfloat16_products"
    if platform != "cpu" and equation.precision != "HIGHEST":
        return "tf32"
    return "float32"


def _order(name: str) -> int:
    """How much it rounds: each arithmetic covers those before it."""
    return list(ARITHMETICS).index(name)


def _coarser(*names: str) -> str:
    return max(names, key=_order)


def least_precise(arithmetics: Sequence[Sequence[Arithmetic]]) -> str:
    """The name of the arithmetic that rounds most."""
    found = [a for each in arithmetics for a in each]
    if not found:
        return "float32"
    return max(found, key=lambda a: (a.output, a.input, a.accumulate)).name


def shares(
    arithmetics: Sequence[Arithmetic], terms: int, roundings: float = 0.0
) -> tuple[float, float]:
    """A linear node errs by at most the first share of ``|W| |x| + |b|`` and the second of the
    largest partial sum of its terms.

    A sum of n terms makes n - 1 additions, in whatever order, and each errs by at most u of its
    result, which is a sum of some of the terms. So all of them together err by ``gamma(n)`` of the
    largest such sum M; where terms of both signs cancel, that is little more than half of the sum
    of their sizes T. The terms themselves, with what was rounded before they are added (a of them)
    or after, are off by a share of T. With ``t`` the terms and u the unit of the additions::

        |computed - exact| <= a T + (1 + a) (u T + gamma (1 + 2 u) (M + a T))

    Args:
        arithmetics: of its equations: the product first, then what is added or scaled.
        terms: of its longest inner product.
        roundings: by which its parameters may differ from what they stand for (`Linear`).
    """
    first = arithmetics[0]
    output = max(a.output for a in arithmetics)
    # By logarithms: 1 + u is 1 in the arithmetic of this computation, and would be lost.
    logarithm = 2 * math.log1p(first.input)
    # Twice: the parameters that are certified err as those of the program do.
    logarithm += (len(arithmetics) + 2 + 2 * roundings) * math.log1p(output)
    of_terms = math.expm1(logarithm * (1 + 1e-14)) * (1 + 1e-14)
    unit = first.accumulate
    added = gamma(terms + 2, unit) * (1 + 2 * unit)
    of_sizes = of_terms + (1 + of_terms) * (unit + added * of_terms)
    return of_sizes * (1 + 1e-14), (1 + of_terms) * added * (1 + 1e-14)


def partial_sum(sizes: jax.Array, total: jax.Array) -> jax.Array:
    """A bound of the sum of any of the terms of an inner product.

    It is at most the sum of the positive ones or of the negative ones, P or N; ``P + N`` is the sum
    of their sizes and ``|P - N|`` the size of their sum, so the larger is half of both together.

    Args:
        sizes: a bound of the sum of the terms' sizes.
        total: of the size of their sum.
    """
    return (sizes + jnp.minimum(sizes, total)) / 2


def forward_error(
    graph: Graph,
    boxes: Sequence[tuple[jax.Array, jax.Array]],
    arithmetics: Sequence[Sequence[Arithmetic]],
    global_norms: Sequence[jax.Array],
    view: Callable = lambda operator, like: operator,
    label: jax.Array | None = None,
) -> jax.Array:
    """How far each output of the function as executed can be from the real-number function,
    anywhere in the ball.

    Carried forward: e, a bound of ``|computed - exact|`` for each coordinate, and rho, a bound of
    its l2 norm. At a linear node, with m and m' the largest sizes of the exact values in front of
    it and behind it,

        c = min(|W| e, ||row_i(W)|| rho),    T = |W| (m + e) + |b|,    M = (T + min(T, m' + c)) / 2,
        local = shares(n) . (T, M) + underflow,
        e' = c + local,    rho' = min(||W|| rho + ||local||, ||e'||).

    Of a node with parts, local is carried from part to part, each of which adds its own by the
    sizes of its own operands, and what is lost where factors are multiplied first (`Run`). At a sum
    the errors add up, with the rounding of the sum. All coordinates count, also those that are
    constant in exact arithmetic: rounding may move them.
    Computed in float64, rounded up.

    Args:
        graph: its arrays in float64.
        boxes: ``boxes[i]`` contains the exact value of node i.
        arithmetics: as `arithmetics_of` returns them.
        global_norms: proven upper bounds of the whole norms, one per linear node.
        view: of the walk.
        label: of a function that ends in a linear node: a class, ``()``; None: see below.

    Returns:
        Of the shape of the last node, float64; infinity where a number may overflow, or is
        above `LARGEST`. With a label of each class how far its difference to the label's logit can
        be, 0 for the label: an error in front of the last node goes through the difference of two
        of its rows, which is shorter than both together.
    """
    errors: list[jax.Array] = []
    totals: list[jax.Array] = []
    runs: list[Run] = []
    norm_of = dict(zip(graph.linear, global_norms, strict=True))
    for i, node in enumerate(graph.nodes):
        sources = [errors[j] for j in node.inputs]
        lengths = [totals[j] for j in node.inputs]
        run = Run()
        if isinstance(node, Input):
            error, total = jnp.zeros(node.shape), jnp.zeros(())
        elif isinstance(node, Rearrange):
            error = node.linear(*sources)
            spread = math.sqrt(node.copies)
            length = OUTWARD.up(jnp.sqrt(sum(t**2 for t in lengths)) * spread, len(lengths))
            total = jnp.minimum(length, OUTWARD.norm(error))
            run = functools.reduce(_longer, (runs[j] for j in node.inputs))
        elif isinstance(node, Activation):
            box = boxes[node.inputs[0]]
            error = node.rule.executed(sources[0], *box, arithmetics[i])
            total = OUTWARD.norm(error)
            if node.rule.selects:  # nothing is rounded
                moved = lengths[0]
                if node.rule.lipschitz != 1:
                    moved = OUTWARD.up(moved * node.rule.lipschitz)
                total = jnp.minimum(moved, total)
        elif isinstance(node, Add):
            error, total = _sum_error(node, boxes[i], sources, lengths, arithmetics[i])
            # a x + a y may be computed as a (x + y)
            run = functools.reduce(_longer, (runs[j] for j in node.inputs))
        else:
            assert isinstance(node, Linear)
            (j,) = node.inputs
            known = boxes[j], errors[j], totals[j], runs[j]
            local, fits, run = _local_error(node, *known, boxes[i], arithmetics[i], view)
            error, total = _carried(node, errors[j], totals[j], local, norm_of[i], view)
            if label is not None and i == len(graph.nodes) - 1:
                error = _of_differences(node, errors[j], totals[j], local, label, view)
            error = jnp.where(fits, error, jnp.inf)
        runs.append(run)
        errors.append(error)
        totals.append(total)
    return errors[-1]


def _longer(first: Run, second: Run) -> Run:
    size = jnp.maximum(first.size, second.size)
    return Run(size, jnp.maximum(first.factor, second.factor))


def _local_error(node: Linear, box, error, total, run: Run, behind, arithmetics, view):
    """What a linear node itself rounds off, with all of its parts, per output; where nothing can
    overflow; and the run of scales that it is in.

    Args:
        box, error, total, run: of the value in front of it.
        behind: box of its exact value.
    """
    if not arithmetics:  # the identity that stands behind a function without a last linear node
        return jnp.zeros(node.shape), jnp.ones(node.shape, bool), run
    lower, upper = box
    operator = view(node.operator, lower)
    size = jnp.maximum(jnp.abs(lower), jnp.abs(upper)) + error
    first, *steps = node.parts or (node,)
    assert isinstance(first, Linear)
    used = len(first.executed)
    reached = None
    if not steps:
        passed = _through(operator, error, total)
        reached = OUTWARD.up(jnp.maximum(*map(jnp.abs, behind)) + passed, lower.size)
    local, magnitude, fits = _own_error(first, size, reached, arithmetics[:used], view)
    # What of one operation underflows in the largest operand of a run.
    smallest = 4 * max(a.smallest for a in arithmetics)
    largest = min(LARGEST, *(a.largest for a in arithmetics))
    if isinstance(first.operator.apply, Scale):
        local = local + smallest * run.size
    else:
        run = Run()
    if steps or isinstance(first.operator.apply, Scale | Sum):
        run = run.extended(first.operator, size)
    for part in steps:
        equations = arithmetics[used : used + len(part.executed)]
        used += len(part.executed)
        step = _as_linear(part)
        reached = OUTWARD.up(magnitude + local, lower.size)
        more, magnitude, fits_too = _own_error(step, reached, None, equations, view)
        more = more + smallest * run.size
        local = OUTWARD.up(step.operator.absolute(local) + more, lower.size)
        run = run.extended(step.operator, reached)
        fits &= fits_too
    grown = OUTWARD.up(_through(operator, error, total) + local, lower.size)
    fits &= (OUTWARD.up(magnitude + grown, lower.size) < largest) & (run.factor < largest)
    return local, fits, run


def _through(operator: LinearOperator, error, total) -> jax.Array:
    """What becomes of an error behind a linear map, per output."""
    rows = operator.row_norms(jnp.ones(error.shape, bool))
    return jnp.minimum(operator.absolute(error), rows * total)


def _carried(node: Linear, error, total, local, whole, view):
    """The error behind a linear node, per output and as a length."""
    if not node.executed:
        return error, total
    passed = _through(view(node.operator, error), error, total)
    grown = OUTWARD.up(passed + local, error.size)
    length = OUTWARD.up(whole * total + OUTWARD.norm(local), error.size)
    return grown, jnp.minimum(length, OUTWARD.norm(grown))


def _of_differences(node: Linear, error, total, local, label, view) -> jax.Array:
    """The error of each output less that of the label's."""
    transposed = view(node.operator, error).transpose(error)
    basis = jnp.eye(node.size, dtype=error.dtype).reshape(node.size, *node.shape)
    rows = jax.vmap(transposed)(basis).reshape(node.size, -1)
    rows = jnp.abs(rows - rows[label])
    lengths = jax.vmap(OUTWARD.length)(rows)
    passed = jnp.minimum(rows @ error.reshape(-1), lengths * total)
    own = local.reshape(-1)
    grown = OUTWARD.up(passed + own + own[label], error.size)
    return jnp.where(jnp.arange(node.size) == label, 0.0, grown).reshape(node.shape)


def _own_error(node: Linear, size, reached, arithmetics, view):
    """What one map rounds off, of an executed input with ``|x| <= size``.

    Args:
        reached: bound of the size of its exact value on that input, bias included; None: not known.

    Returns:
        The bound, a bound of its exact value on that input, and whether neither overflows.
    """
    operator = view(node.operator, size)
    # The program's own inner products: a view may spell them out as longer ones, with zeros.
    terms = terms_of(node.operator, size)
    magnitude = operator.absolute(size)
    if operator.bias is not None:
        magnitude = magnitude + jnp.abs(jnp.broadcast_to(operator.bias, magnitude.shape))
    smallest = max(a.smallest for a in arithmetics)
    largest_entry = jnp.max(jnp.abs(operator.kernel))
    underflow = smallest * (terms + 2) * (1 + largest_entry + jnp.max(size))
    of_sizes, of_sums = shares(arithmetics, terms, node.roundings)
    sums = partial_sum(magnitude, magnitude if reached is None else reached)
    local = of_sizes * magnitude + of_sums * sums + underflow
    largest = min(LARGEST, *(a.largest for a in arithmetics))  # of what FLOOR covers
    fits = OUTWARD.up(magnitude + local, size.size) < largest
    if isinstance(node.operator.apply, Sum):
        # A mean is added up before it is divided: the sum itself must not overflow.
        ones = dataclasses.replace(node.operator, kernel=jnp.ones_like(node.operator.kernel))
        fits &= OUTWARD.up(2 * ones.absolute(size), size.size) < largest
    return local, magnitude, fits


def _as_linear(part: Linear | Add) -> Linear:
    """A scale or shift behind a linear node, its parameters off by two roundings more: those of the
    kernel and bias that it was joined into."""
    if isinstance(part, Add):
        ones = jnp.ones((), part.constant.dtype)
        operator = LinearOperator(Scale(), ones, part.constant)
    else:
        operator = part.operator
    return Linear(
        inputs=part.inputs,
        shape=part.shape,
        dtype=part.dtype,
        executed=part.executed,
        operator=operator,
        roundings=part.roundings + 2,
    )


def _sum_error(node: Add, box, sources, lengths, arithmetics):
    past, length = sources[0], lengths[0]
    for error, other in zip(sources[1:], lengths[1:], strict=True):
        past, length = past + error, length + other
    if not arithmetics:  # a change of sign, or a widening cast: exact
        return past, length
    unit = sum(a.output for a in arithmetics) + node.roundings * arithmetics[0].output
    smallest = max(a.smallest for a in arithmetics)
    lower, upper = box
    size = jnp.maximum(jnp.abs(lower), jnp.abs(upper)) + past
    constant = jnp.zeros(())
    if node.constant is not None:
        constant = jnp.abs(jnp.broadcast_to(node.constant, node.shape))
    local = unit * (1 + unit) * (size + 2 * node.roundings * constant) + 4 * smallest
    grown = OUTWARD.up(past + local, 2)
    total = OUTWARD.up(length + OUTWARD.norm(local), 2)
    fits = OUTWARD.up(size + grown, 2) < min(LARGEST, *(a.largest for a in arithmetics))
    return jnp.where(fits, grown, jnp.inf), jnp.minimum(total, OUTWARD.norm(grown))
