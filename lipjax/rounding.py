"""The error model of floating-point arithmetic: what rounding can do to a network as executed, and to its bounds.

**Model** (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed. 2002, sections 2.2 and 3.1). An operation
returns the exact result times ``1 + d``, ``|d| <= u``. An inner product of n terms, summed in any order, with or
without fused multiply-adds, errs by at most ``gamma(n) sum |a_i b_i|``, ``gamma(n) = n u / (1 - n u)``. Results that
underflow may be flushed to zero, as may subnormal operands. Not covered: products that are no inner products (Winograd
or Fourier convolutions, Strassen), and faults of the hardware.

Where the operands are first rounded to a narrower format (TF32, bfloat16) that adds a factor ``(1 + u_in)^2``, and the
format of the result another ``1 + u_out``. Tensor cores truncate and keep few guard bits (Fasi, Higham, Mikaitis and
Pranesh, *Numerical behavior of NVIDIA tensor cores*, 2021), so their accumulation is counted with ``u_acc = 2^-22`` and
the conversion to TF32, which some do by truncation, with ``u_in = 2^-10``.

Two things are made of it. `OUTWARD` turns every rounding error of a bound, computed in float64, to the safe side;
`EXACT` does nothing and serves estimates, which are differentiated. `forward_error` bounds how far the logits of the
network *as executed*, in its own arithmetic, can be from those of the real-number function, for every input of a ball.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lipjax import activations, operators

DOUBLE = 2.0**-53
# What underflow can do to one bound in float64: what is lost is below 2^-1022 a term, is multiplied by
# at most one more number, of up to `LARGEST`, and there are millions of terms. It does not cover a square
# root, a division or a second factor behind an underflow: what is squared for a root is
# `operators.raised` first, so that there is none.
FLOOR = 1e-150
# Bounds with a number above this are given up: below it nothing overflows, and FLOOR covers all that underflows.
LARGEST = 1e100
# Stands for a share of something that may have underflowed itself.
LEAST_SHARE = 2.0**-1000


def gamma(n, unit: float = DOUBLE) -> float:
    """``n u / (1 - n u)``: relative error of an inner product of n terms; infinity where the model says nothing."""
    return n * unit / (1 - n * unit) if n * unit < 1 else math.inf


# ------------------------------------------------------------------------------------------- rounding of the bounds


class Exact:
    """Bounds as if arithmetic were exact: for estimates."""

    def up(self, x: jax.Array, terms: int = 1) -> jax.Array:
        return x

    def around(self, lower: jax.Array, upper: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (lower + upper) / 2, (upper - lower) / 2

    def widened(self, lower: jax.Array, upper: jax.Array, slack) -> tuple[jax.Array, jax.Array]:
        return lower, upper

    def slack(self, operator: operators.LinearOperator, lower: jax.Array, upper: jax.Array):
        return 0.0

    def norm(self, slack) -> jax.Array | float:
        return 0.0

    def length(self, x: jax.Array) -> jax.Array:
        return operators.safe_norm(x)

    def slope_width(self, width: jax.Array) -> jax.Array:
        return width

    def left_over(self, relative, g: jax.Array, length) -> jax.Array | float:
        return 0.0


class Outward:
    """Bounds in float64, every rounding error turned to the safe side; see the module's text for the model."""

    def up(self, x: jax.Array, terms: int = 1) -> jax.Array:
        """At least the exact value of what was computed as x >= 0 by sums of `terms` products of numbers >= 0, with up
        to eight further multiplications, divisions or square roots.

        Also where products underflowed (see FLOOR), and therefore never 0: a 0 may be all that underflow
        has left.
        """
        return x * (1 + 2 * gamma(terms + 8)) + FLOOR

    def around(self, lower: jax.Array, upper: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Middle and half-width whose interval contains ``[lower, upper]``."""
        middle, half_width = (lower + upper) / 2, (upper - lower) / 2
        return middle, self.up(half_width) + 4 * DOUBLE * jnp.abs(middle)

    def widened(self, lower: jax.Array, upper: jax.Array, slack) -> tuple[jax.Array, jax.Array]:
        """The box widened by `slack` and by the rounding of doing so; 0 and 0 stay, as a sum or
        difference that is 0 was not rounded."""
        exact = (slack == 0) & (lower == 0) & (upper == 0)
        margin = self.up(slack + 4 * DOUBLE * jnp.maximum(jnp.abs(lower), jnp.abs(upper)))
        margin = jnp.where(exact, 0.0, margin)
        return lower - margin, upper + margin

    def slack(self, operator: operators.LinearOperator, lower: jax.Array, upper: jax.Array) -> jax.Array:
        """At least the rounding error, entry by entry, of each of ``W x + b``, ``|W| x`` and two sums of them, for every
        x of size at most that of the box.

        Each errs by at most ``gamma(n + 2) (|W| |x| + |b|)``; a factor 8 covers their sum and this computation's own.
        """
        magnitude = operator.absolute(jnp.maximum(jnp.abs(lower), jnp.abs(upper)))
        if operator.bias is not None:
            magnitude = magnitude + jnp.abs(jnp.broadcast_to(operator.bias, magnitude.shape))
        return 8 * gamma(terms_of(operator, lower) + 8) * magnitude + FLOOR

    def norm(self, slack: jax.Array) -> jax.Array:
        """Its l2 norm, rounded up."""
        return self.length(slack)

    def length(self, x: jax.Array) -> jax.Array:
        """``||x||_2`` rounded up; 0 only for 0."""
        size = self.up(operators.safe_norm(operators.raised(x)), x.size)
        return jnp.where(jnp.all(x == 0), 0.0, size)  # a NaN is no 0

    def slope_width(self, width: jax.Array) -> jax.Array:
        """Half the distance of two slopes in [-1, 1], each computed as a ratio of two rounded differences, rounded up."""
        return width + 32 * DOUBLE

    def left_over(self, relative, g: jax.Array, length: jax.Array) -> jax.Array:
        """At least ``|<f, v>|`` for every ``||v|| <= length`` and ``||f|| <= relative ||g||``: for what is left over when a
        row computed from g, `relative` of it wrong, takes the place of the exact one."""
        # In this order: where the inner product underflows, the exact one is far below FLOOR.
        return self.up(jnp.maximum(relative, LEAST_SHARE) * (self.length(g) * length))


EXACT, OUTWARD = Exact(), Outward()
Rounding = Exact | Outward


def terms_of(operator: operators.LinearOperator, like: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Entries of the kernel in the fullest row of W, for inputs like `like`: the terms of one inner product. Static."""
    return _count(operator, like, transposed=False)


def transposed_terms_of(operator: operators.LinearOperator, like: jax.Array | jax.ShapeDtypeStruct) -> int:
    """The same for the fullest column: the terms of one inner product of the transposed map."""
    return _count(operator, like, transposed=True)


def _count(operator, like, transposed) -> int:
    # Counted by running the map on ones, outside of any trace; float32 counts exactly up to 2^24.
    with jax.ensure_compile_time_eval():
        kernel = jnp.ones(operator.kernel.shape, jnp.float32)
        x = jax.ShapeDtypeStruct(like.shape, jnp.float32)

        def apply(x):
            return operator.apply(kernel, x)

        if transposed:
            image = jax.eval_shape(apply, x)
            counts = jax.linear_transpose(apply, x)(jnp.ones(image.shape, jnp.float32))[0]
        else:
            counts = apply(jnp.ones(x.shape, jnp.float32))
        return math.ceil(float(jnp.max(counts)))


# ------------------------------------------------------------------------------------------- the network as executed


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How a layer computes.

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

    def relative(self, terms: int) -> float:
        """An affine layer with inner products of so many terms errs by at most this share of ``|W| |x| + |b|``."""
        # By logarithms: 1 + u is 1 in the arithmetic of this computation, and would be lost.
        logarithm = 2 * math.log1p(self.input) + 3 * math.log1p(self.output)
        logarithm += math.log1p(gamma(terms + 2, self.accumulate))
        return math.expm1(logarithm * (1 + 1e-14)) * (1 + 1e-14)


ARITHMETICS = {
    a.name: a
    for a in (
        Arithmetic("float64", 0.0, 2.0**-53, 2.0**-53, 2.0**-1020, 1e300),
        Arithmetic("float32", 0.0, 2.0**-24, 2.0**-24, 2.0**-125, 3e38),
        Arithmetic("tf32", 2.0**-10, 2.0**-22, 2.0**-24, 2.0**-125, 3e38),
        # float32 products at a TPU's default precision
        Arithmetic("bfloat16_products", 2.0**-8, 2.0**-22, 2.0**-24, 2.0**-125, 3e38),
        # layers that compute in bfloat16; partial sums in float32, as every matrix unit keeps them
        Arithmetic("bfloat16", 2.0**-8, 2.0**-22, 2.0**-8, 2.0**-125, 3e38),
    )
}


# Algorithms that a layer's or JAX's matmul precision can fix, by the arithmetic that covers them.
# Others are refused: they sum in 16 bits, multiply in 8, or take several products for one.
ALGORITHMS = {
    "F64_F64_F64": "float64",
    "F32_F32_F32": "float32",
    "TF32_TF32_F32": "tf32",
    "BF16_BF16_F32": "bfloat16_products",
}


def arithmetics_of(
    layers: Sequence, declared: str | None = None, traced: Sequence | None = None
) -> tuple[Arithmetic, ...]:
    """The arithmetic of each affine layer, in order.

    Args:
        layers: as `regions.layers_of` returns them.
        declared: a name in `ARITHMETICS`, for all layers; None: as this process's default device executes them, from
            each layer's dtype and precision, JAX's default matmul precision, and `traced`.
        traced: of each layer, what `executed.trace` found: the types and precisions it computes in.
            None: they are guessed from its parameters and settings, and a layer without them is
            taken for float32. No certificate rests on a guess.

    Raises:
        ValueError: unknown name; a layer that computes in a dtype or by an algorithm that the model
            does not know, or in a narrower one than was declared; thresholds that would be rounded.
    """
    if declared is not None and declared not in ARITHMETICS:
        raise ValueError(f"arithmetic must be one of {', '.join(ARITHMETICS)}, got {declared!r}.")
    wide = declared == "float64"
    if declared is None:
        wide = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    found = []
    for i, layer in enumerate(layers):
        if not operators.is_affine(layer):
            if not wide and _dtypes_of(layer) & {jnp.dtype(jnp.float64)}:
                raise ValueError(
                    f"layer {i}, {type(layer).__name__}, has float64 thresholds, which "
                    f"{declared or 'float32'} arithmetic would round: give the network float32 "
                    "parameters."
                )
            continue
        seen = None if traced is None else traced[i]
        fixed = _fixed(i, layer, seen)
        if declared is None:
            own = coarsest((fixed, _of_device(i, layer, wide, seen)))
        elif coarsest((declared, fixed)) == declared:
            own = declared
        else:
            raise ValueError(
                f"layer {i}, {type(layer).__name__}, computes in {fixed}, which rounds more than "
                f"the declared {declared}: declare {fixed} or give it another dtype or precision."
            )
        found.append(ARITHMETICS[own])
    return tuple(found)


def coarsest(names) -> str:
    """Of names in `ARITHMETICS` the one that rounds most: each covers those before it."""
    return max(names, key=list(ARITHMETICS).index)


def _dtypes_of(layer) -> set:
    """Of the layer's floating parameters."""
    return {jnp.dtype(leaf.dtype) for leaf in jax.tree.leaves(layer) if jnp.issubdtype(leaf.dtype, jnp.floating)}


def _fixed(i: int, layer, traced) -> str:
    """What the layer computes in by its own settings, wherever it runs."""
    chosen, computes = _chosen(layer), set() if traced is None else traced.types
    used = {dtype.name for dtype in _dtypes_of(layer)} | chosen | computes
    strange = used - {"float64", "float32", "bfloat16"}
    if strange:
        raise ValueError(
            f"layer {i}, {type(layer).__name__}, uses {', '.join(sorted(strange))}: what rounding "
            "does there is not in the error model (float32, float64 and bfloat16 are). Give the "
            "layer dtype float32."
        )
    found = _algorithms(i, layer, _precisions(layer, traced))
    if "bfloat16" in used:
        found.append("bfloat16")
    elif "float32" in chosen | computes:
        found.append("float32")
    return coarsest(found)


def _of_device(i: int, layer, wide: bool, traced) -> str:
    """What this process's default device and settings make of it; `wide`: JAX has 64 bits."""
    default = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    own = _precisions(layer, traced)
    precisions = [default if precision is None else precision for precision in own]
    found = _algorithms(i, layer, precisions)
    computes = {dtype.name for dtype in _dtypes_of(layer)} if traced is None else traced.types
    platform = jax.default_backend()
    if platform == "tpu":
        found.append("bfloat16_products")
    elif not wide or _chosen(layer) or computes != {"float64"}:
        found.append("float32" if platform == "cpu" or all(map(_full, precisions)) else "tf32")
    return coarsest(found)


def _chosen(layer) -> set[str]:
    settings = (getattr(layer, name, None) for name in ("dtype", "preferred_element_type"))
    return {jnp.dtype(setting).name for setting in settings if setting is not None}


def _precisions(layer, traced) -> set:
    own = getattr(layer, "precision", None)
    seen = set() if traced is None else traced.precisions
    return {tuple(own) if type(own) is list else own} | seen


def _full(precision) -> bool:
    """Does this matmul precision keep float32 products on a GPU?"""
    parts = precision if isinstance(precision, (list, tuple)) else [precision]
    full = ("highest", "float32", "precision.highest", "f32_f32_f32")
    return all(str(part).lower() in full for part in parts)


def _algorithms(i: int, layer, precisions) -> list[str]:
    """The arithmetics that matmul precisions fix; float64 where they leave that to the device."""
    named, found = jax.lax.DotAlgorithmPreset.__members__, ["float64"]
    for precision in precisions:
        name = str(precision)
        if name == "DEFAULT" or not (name in named or isinstance(precision, jax.lax.DotAlgorithm)):
            continue
        if name not in ALGORITHMS:
            raise ValueError(
                f"layer {i}, {type(layer).__name__}, computes its products by the algorithm "
                f"{name}, whose rounding is not in the error model ({', '.join(ALGORITHMS)} are): "
                "choose one of them, or precision='highest'."
            )
        found.append(ALGORITHMS[name])
    return found


def least_precise(arithmetics: Sequence[Arithmetic]) -> str:
    """The name of the arithmetic that rounds most."""
    return coarsest(arithmetic.name for arithmetic in arithmetics)


def forward_error(
    layers: Sequence,
    boxes: Sequence[tuple[jax.Array, jax.Array]],
    arithmetics: Sequence[Arithmetic],
    global_norms: Sequence[jax.Array],
    view: Callable = lambda layer, like: operators.linear_operator(layer),
) -> jax.Array:
    """How far each logit of the network as executed can be from the real-number function, anywhere in the ball.

    Carried forward: e, a bound of ``|computed - exact|`` for each coordinate, and rho, a bound of its l2 norm. At an
    affine layer, with ``m = max(|lower|, |upper|)`` of the exact activation in front,

        local = relative(n) (|W| (m + e) + |b|) + underflow,    e' = min(|W| e, ||row_i(W)|| rho) + local,
        rho' = min(||W|| rho + ||local||, ||e'||).

    At the sum of a Residual both errors add up, with the rounding of the sum in the layers' coarsest format. All coordinates
    count, also those that are constant in exact arithmetic: rounding may move them. An activation never makes the error
    larger (`activations.error_image`). Computed in float64, rounded up.

    Args:
        layers: as `regions.layers_of` returns them.
        boxes: ``boxes[i]`` contains the exact input of layer i, one more for the logits.
        arithmetics: one per affine layer.
        global_norms: proven upper bounds of the unmasked norms, one per affine layer.
        view: layer and example to linear view.

    Returns:
        ``(classes,)``, float64; infinity where a number may overflow, or is above `LARGEST`.
    """
    error = jnp.zeros(boxes[0][0].shape)
    total = jnp.zeros(())
    k = 0
    forks = []
    unit = max(arithmetic.output for arithmetic in arithmetics)
    for i, layer in enumerate(layers):
        lower, upper = boxes[i]
        if layer is operators.FORK:
            forks.append((error, total))
        elif layer is operators.JOIN:
            past, past_total = forks.pop()
            size = jnp.maximum(*map(jnp.abs, boxes[i + 1])) + past + error
            local = unit * size + 4 * max(arithmetic.smallest for arithmetic in arithmetics)
            grown = OUTWARD.up(past + error + local, 2)
            total = jnp.minimum(OUTWARD.up(past_total + total + OUTWARD.norm(local), 2), OUTWARD.norm(grown))
            largest = min(arithmetic.largest for arithmetic in arithmetics)
            error = jnp.where(OUTWARD.up(size + grown, 2) < largest, grown, jnp.inf)
        elif type(layer) is operators.Flatten:
            error = layer(error)
        elif activations.is_activation(layer):
            error = activations.error_image(layer, error)
        else:
            operator, arithmetic = view(layer, lower), arithmetics[k]
            size = jnp.maximum(jnp.abs(lower), jnp.abs(upper)) + error
            # The layer's own inner products: a view may spell them out as longer ones, padded with zeros.
            terms = terms_of(operators.linear_operator(layer), lower)
            magnitude = operator.absolute(size)
            bias = None if operator.bias is None else jnp.abs(jnp.broadcast_to(operator.bias, magnitude.shape))
            magnitude = magnitude if bias is None else magnitude + bias
            underflow = arithmetic.smallest * (terms + 2) * (1 + jnp.max(jnp.abs(operator.kernel)) + jnp.max(size))
            local = arithmetic.relative(terms) * magnitude + underflow
            rows = operator.row_norms(jnp.ones(lower.shape, bool))
            grown = OUTWARD.up(jnp.minimum(operator.absolute(error), rows * total) + local, lower.size)
            total = jnp.minimum(
                OUTWARD.up(global_norms[k] * total + OUTWARD.norm(local), lower.size), OUTWARD.norm(grown)
            )
            largest = min(arithmetic.largest, LARGEST)  # of what FLOOR covers
            error = jnp.where(OUTWARD.up(magnitude + grown, lower.size) < largest, grown, jnp.inf)
            k += 1
    return error
