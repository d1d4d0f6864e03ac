"""What the bounds ask of an activation. Everything that is known of one kind lives in its file.

To add a kind: a file with its function, its module, its `Rule`, and one `register` call; its test;
its lines in the checker. Only `interval` and `lipschitz` are needed, the rest makes it tighter.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp

from lipjax.activations.slopes import Slopes, Unknown
from lipjax.graph import register_composite
from lipjax.graph.linear import larger, smaller

# Unit roundoff of the bounds, and what underflow can take from one of their products; see
# `rounding.outward`.
DOUBLE = 2.0**-53
FLOOR = 1e-150


@dataclass_transform(frozen_default=True)
def rule(*data: str):
    """A frozen dataclass that is a pytree with these fields as children."""

    def decorate(cls):
        cls = dataclasses.dataclass(frozen=True)(cls)
        static = [field.name for field in dataclasses.fields(cls) if field.name not in data]
        jax.tree_util.register_dataclass(cls, data_fields=list(data), meta_fields=static)
        return cls

    return decorate


def register(reference: Callable, build: Callable) -> None:
    """Makes a function known as an activation, wherever a traced network calls it.

    A call counts as one of `reference` if its jaxpr equals that of `reference` at the same types;
    its name proves nothing. JAX keeps a call apart if the function is under `jax.jit`.

    Args:
        reference: ``reference(z, *parameters)``; z comes from the example, the parameters do not.
        build: ``build(*parameters)``, the `Rule`.
    """
    register_composite(reference, build)


def varies(lower: jax.Array, upper: jax.Array) -> jax.Array:
    """Mask of the entries that can change. A NaN counts as varying: it must spread, not vanish."""
    return ~(lower == upper)


class Rule:
    """An activation with its parameters. A pytree; shapes are those of one example.

    The defaults are safe for every function whose `interval` and `lipschitz` are right.
    """

    @property
    def kind(self) -> str:
        """Its name, for people."""
        return type(self).__name__

    @property
    def bounded(self) -> str:
        """The way in which it is bounded, for people."""
        own = type(self).relaxations is not Rule.relaxations
        constant = self.lipschitz
        known = not isinstance(constant, jax.core.Tracer)
        size = f"{float(constant):g}-" if known else ""
        return f"{size}Lipschitz, box{', slopes' if own else ''}"

    def __call__(self, z: jax.Array) -> jax.Array:
        """The value."""
        raise NotImplementedError(f"{type(self).__name__} has no value.")

    def interval(self, lower: jax.Array, upper: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A box that contains the value for every ``lower <= z <= upper``.

        A coordinate that is constant on the box has the very same number at both ends: masks are
        derived from that. (Right as it stands for what is monotone in every entry.) What computing
        it in float64 rounds off is no concern of it, unless the kind `counts_rounding`.
        """
        return self(lower), self(upper)

    def box(self, lower: jax.Array, upper: jax.Array, arithmetic) -> tuple[jax.Array, jax.Array]:
        """`interval`, and what computing it may round off.

        Args:
            arithmetic: turns rounding to the safe side.
        """
        found = self.interval(lower, upper)
        if self.selects or self.counts_rounding:
            return found
        slack = larger(*map(self.evaluation_error, found))
        return arithmetic.widened(*found, slack)

    @property
    def counts_rounding(self) -> bool:
        """Does `interval` itself count what it rounds off in float64?"""
        return False

    @property
    def selects(self) -> bool:
        """Does its execution only compare and select, and round nothing?

        Else no output counts as constant on a box, unless `interval` says so (`counts_rounding`).
        """
        return False

    @property
    def keeps_order(self) -> bool:
        """Is it to be left out at the end of a function, as it keeps the order of the classes?

        Of such a kind nothing else is known, and elsewhere it is refused.
        """
        return False

    @property
    def lipschitz(self) -> float | jax.Array:
        """Constant in l2, on the whole space."""
        return 1.0

    def lipschitz_on(self, lower: jax.Array, upper: jax.Array) -> float | jax.Array:
        """Constant in l2 on a box of the inputs, of the active ones."""
        return self.lipschitz

    def evaluation_error(self, value: jax.Array) -> jax.Array:
        """How far `value`, as ``self(z)`` computes it in float64, can be from the exact one."""
        if self.selects:
            return jnp.zeros_like(value)
        return 2**10 * DOUBLE * jnp.abs(value) + FLOOR

    def active(self, lower: jax.Array, upper: jax.Array, as_paper: bool = False) -> jax.Array:
        """Mask over the *inputs*: False only where that input moves no output inside the box.

        Args:
            lower, upper: box of the inputs.
            as_paper: drop no more than the paper's code drops (mode "paper").
        """
        return jnp.ones(lower.shape, bool)

    def stable(self, lower: jax.Array, upper: jax.Array) -> jax.Array:
        """Mask over the outputs: True only where an output is one and the same input on the box.

        For reports alone; no bound rests on it.
        """
        return jnp.zeros(lower.shape, bool)

    def relaxations(
        self, center: jax.Array, lower: jax.Array, upper: jax.Array, radius, after, arithmetic
    ) -> tuple["Relaxation", ...]:
        """Slopes and errors on a box, in order of application; by default all is error.

        **Guarantee**: each is what `Relaxation` says, for every z of the box with
        ``||z - center||_2 <= radius`` over the active inputs.

        Args:
            center, lower, upper: what is known of the input; the center lies in the box.
            radius: bound of ``||z - center||_2`` over the active inputs.
            after: the region of the output.
            arithmetic: turns rounding to the safe side.
        """
        reach = arithmetic.up(larger(after.upper - after.center, after.center - after.lower))
        zero = jnp.zeros_like(after.center)
        return (Relaxation(zero, zero + 1, reach, after.radius, paired=False),)

    def pieces(self, center: jax.Array, lower: jax.Array, upper: jax.Array, arithmetic):
        """The function piece by piece, in order of application; None: only `relaxations` are known.

        **Guarantee**: each is what `activations.Pieces` says, on the box; `free` only where all
        inputs of a coordinate are `active`. A kind that rounds has one step.
        """
        return None

    def executed(self, error: jax.Array, lower, upper, arithmetics) -> jax.Array:
        """`rounding`, for a kind whose rounding depends on its input and on its arithmetic.

        Args:
            error: bound of ``|computed - exact|`` of each input.
            lower, upper: box of the exact input.
            arithmetics: of the equations of the node, as `rounding.arithmetics_of` gives them.

        Raises:
            TypeError: an arithmetic of which nothing is known.
        """
        return self.rounding(error)

    def jacobian(
        self, lower: jax.Array, upper: jax.Array, arithmetic
    ) -> tuple[Slopes | Unknown, ...]:
        """How the value can change between any two points of a box (`activations.slopes`), in order
        of application; by default only `lipschitz` is known.

        What is monotone or smooth, entry by entry, gives ``(Slopes.between(low, high,
        arithmetic),)``, the range of its derivative on the box.
        """
        after = jax.eval_shape(self, lower)
        return (Unknown(self.lipschitz, lower.shape, after.shape),)

    def rounding(self, error: jax.Array) -> jax.Array:
        """Bound of ``|computed - exact|`` of each output as executed, given that of each input."""
        raise TypeError(
            f"no rounding rule for {self.kind}: what its arithmetic does is part of a certificate. "
            "Give its Rule a method `rounding`."
        )

    def sparsity(self, lower: jax.Array, upper: jax.Array) -> jax.Array:
        """The hinge that pulls neurons into their constant ranges, given their box; >= 0."""
        return jnp.zeros((), lower.dtype)

    def instability(self, lower: jax.Array, upper: jax.Array) -> jax.Array:
        """The hinge that pushes boxes off the kinks, whichever way is shorter; >= 0."""
        return jnp.zeros((), lower.dtype)

    def described(self) -> dict[str, Any]:
        """It as plain data for certificate files: "kind", by which the checker knows it, and its
        parameters, numbers and arrays.

        Raises:
            TypeError: there is none for this kind.
        """
        raise TypeError(
            f"no plain description of the activation {self.kind}: it cannot be written to a "
            "certificate file. Give its Rule a method `described`, and the checker its kind."
        )

    def then(self, following: "Rule") -> "Rule | None":
        """One rule for this one and another behind it, or None."""
        return None


@rule("slope", "width", "reach", "radius")
class Relaxation:
    """``a(z) - a(center) = M (z - center) + e`` on a box, M known and e bounded.

    Attributes:
        slope: M, elementwise; with `paired` (MaxMin) that of ``|a - b|``, one per pair of channels
            ``(a, b)``, and M keeps ``a + b`` and multiplies ``a - b``.
        width: >= 0, how far the slope from the center to any point can be from `slope`.
        reach: bound of each coordinate of e. With `paired` e lies along ``(1, -1) / sqrt(2)`` of
            each pair, and this bounds its length there.
        radius: scalar, ``||e||_2 <= radius`` over the coordinates that can still move an output.
    """

    slope: jax.Array
    width: jax.Array
    reach: jax.Array
    radius: jax.Array
    paired: bool

    def transposed(self, g: jax.Array) -> jax.Array:
        """``M^T g``; M is symmetric."""
        if not self.paired:
            return self.slope * g
        a, b = jnp.split(g, 2, axis=-1)
        kept = (a + b) / 2
        turned = self.slope * (a - b) / 2
        return jnp.concatenate([kept + turned, kept - turned], axis=-1)

    def error_weights(self, g: jax.Array) -> jax.Array:
        """What multiplies the coordinates of e in ``<g, e>``."""
        if not self.paired:
            return g
        a, b = jnp.split(g, 2, axis=-1)
        return (a - b) / math.sqrt(2)


def relaxed(
    low,
    high,
    exact,
    z,
    lower,
    upper,
    unit,
    radius,
    arithmetic,
    paired: bool = False,
    size=1.0,
    off=None,
) -> Relaxation:
    """From the smallest and largest slope to any point of the box, seen from the center z.

    Args:
        low, high: the extreme slopes.
        exact: where they are equal, and nothing is rounded.
        unit: length of the direction along which a coordinate of e lies.
        size: bound of the size of the slopes.
        off: how far the value of the center, as computed, can be from the exact one; None: exact.
    """
    slope = (low + high) / 2
    # A ratio of rounded differences errs by a few units; where all slopes agree nothing is rounded.
    width = jnp.where(exact, 0.0, arithmetic.slope_width((high - low) / (2 * size)) * size)
    reach = arithmetic.up(unit * width * larger(upper - z, z - lower))
    ball = arithmetic.up(jnp.max(width) * radius)
    if off is not None:
        reach = arithmetic.up(reach + off, 2)
        ball = arithmetic.up(ball + arithmetic.norm(off), 2)
    corner = arithmetic.length(reach)
    return Relaxation(slope, width, reach, jnp.minimum(corner, ball), paired)


def ratio(above: jax.Array, below: jax.Array) -> jax.Array:
    """``above / below``, and 0 where below is 0; its gradient is 0 there."""
    return jnp.where(below == 0, 0.0, above / jnp.where(below == 0, 1.0, below))


def hinge(low: jax.Array, high: jax.Array, kink: Any) -> jax.Array:
    """Mean of ``min(high - kink, kink - low)`` where the kink lies inside."""
    return jnp.mean(jax.nn.relu(jnp.minimum(high - kink, kink - low)))


def clip_above(z: jax.Array, threshold: jax.Array) -> jax.Array:
    """``min(z, threshold)``, the threshold broadcast over leading (batch) axes.

    Raises:
        ValueError: thresholds that do not fit the last axes of z.
    """
    if z.shape[z.ndim - threshold.ndim :] != threshold.shape:
        raise ValueError(
            f"thresholds of shape {threshold.shape} do not fit an activation of shape {z.shape}."
        )
    leading = z.shape[: z.ndim - threshold.ndim]
    return smaller(z, jax.lax.broadcast(threshold, leading))
