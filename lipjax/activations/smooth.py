"""Smooth activations: sigmoid, tanh, softplus, softsign, GELU in both forms, SiLU, hard swish, ELU,
entry by entry.

Everything follows from where a function and its derivative turn. Between turns both are monotone,
so their extremes on an interval are at its ends and at the turns inside. (ELU has a kink instead.)
Where a derivative jumps, as that of hard swish at -3 and 3, both its values there count.

GELU, SiLU and hard swish are ``f(z) = z g(z)`` with a gate ``g(-z) = 1 - g(z)``, so
``f'(-z) = 1 - f'(z)``, and f' turns once for z > 0, at x0, where it is largest. Hard swish is
``z (z + 3) / 6`` on [-3, 3]: x0 = 3, where f' is 3/2 on the left. Of the others f'' is, up to
positive factors,

    GELU          2 - z^2,
    SiLU          2 - z tanh(z / 2),
    GELU (tanh)   (1 + 2 w) / (1 + w)^2 - c z tanh(q),   w = 3 a z^2, q = c (z + a z^3),

each of which falls from a positive number for z > 0: one zero. On a bracket ``[s, t]`` of it
``f'(x0) = g(x0) + x0 g'(x0) <= g(t) + t g'(s)``, as g rises and g' falls there, which proves the
numbers below, rounded up; f' has its only zero in ``[-x0, 0]``, where f is least, by
``f >= s g(t)`` on a bracket of that. `tests/test_smooth.py` does both in decimal arithmetic.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lipjax.activations.base import DOUBLE, Rule, register, relaxed, rule, varies
from lipjax.activations.pieces import Pieces
from lipjax.activations.slopes import Slopes
from lipjax.graph import register_primitive
from lipjax.graph.known import is_concrete
from lipjax.graph.linear import larger, smaller
from lipjax.graph.trace import Ref

# What a slope, computed in float64 from functions that are off by a few units, is off at most.
SLOPE_ERROR = 2.0**-44
# Units of roundoff that an executed function is off at most, relative to `Curve.scale`. XLA on CPUs
# was measured to be off by less than 8 (most is tanh in float64, by 7); `tests/test_smooth.py`
# measures it again, and fails at half of what is counted.
EXECUTED = 16
# Backends on which that was measured, and types.
MEASURED = ("cpu",)
TYPES = ("float32", "float64")
# Beyond this size of the input nothing was measured.
LARGEST_INPUT = 1e18
# Slopes are at their limits beyond it, to far less than `SLOPE_ERROR`.
FAR = 40.0


@dataclasses.dataclass(frozen=True)
class Turn:
    """Between `first` and `last` a function turns, nowhere beyond the number `extreme`."""

    first: float
    last: float
    extreme: float


@dataclasses.dataclass(frozen=True)
class Curve:
    """A smooth function.

    Attributes:
        value, slope: it and its derivative.
        value_turns, slope_turns: where they turn.
        lipschitz: the largest slope in size, rounded up.
        scale: of the size of the input, to that of the rounding when it is executed.
    """

    value: Callable
    slope: Callable
    value_turns: tuple[Turn, ...]
    slope_turns: tuple[Turn, ...]
    lipschitz: float
    scale: Callable


def _gated(gate: Callable, gate_slope: Callable, turn: Turn, least: Turn) -> Curve:
    """``z gate(z)``, its derivative largest at `turn`, itself least at `least`."""

    def slope(z):
        z = jnp.clip(z, -FAR, FAR)
        return gate(z) + z * gate_slope(z)

    mirrored = Turn(-turn.last, -turn.first, 1 - turn.extreme)
    turns = (mirrored, turn)
    return Curve(lambda z: z * gate(z), slope, (least,), turns, turn.extreme, lambda size: size)


def _normal(z):
    """The distribution function of a standard normal variable, and its density."""
    return jax.lax.erfc(-z * math.sqrt(0.5)) / 2


def _density(z):
    return jnp.exp(-jnp.square(z) / 2) / math.sqrt(2 * math.pi)


def _bent(z):
    """Twice what the tanh form of GELU takes tanh of: ``(1 + tanh(q)) / 2 = sigmoid(2 q)``."""
    return 2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z)


def _bent_slope(z):
    return 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z * z)


def _sigmoid_slope(z):
    return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)


CURVES = {
    "sigmoid": Curve(
        jax.nn.sigmoid, _sigmoid_slope, (), (Turn(0.0, 0.0, 0.25),), 0.25, lambda size: 1.0
    ),
    "tanh": Curve(
        jnp.tanh,
        lambda z: 4 * _sigmoid_slope(2 * z),
        (),
        (Turn(0.0, 0.0, 1.0),),
        1.0,
        lambda size: 1.0,
    ),
    "softplus": Curve(jax.nn.softplus, jax.nn.sigmoid, (), (), 1.0, lambda size: 1 + size),
    "softsign": Curve(
        lambda z: z / (1 + jnp.abs(z)),
        lambda z: 1 / jnp.square(1 + jnp.abs(z)),
        (),
        (Turn(0.0, 0.0, 1.0),),
        1.0,
        lambda size: 1.0,
    ),
    "hard_swish": _gated(
        lambda z: jnp.clip(z + 3, 0.0, 6.0) / 6,
        lambda z: jnp.where(jnp.abs(z) <= 3, 1 / 6, 0.0),
        Turn(3.0, 3.0, 1.5),
        Turn(-1.5, -1.5, -0.375),
    ),
    "gelu": _gated(
        _normal,
        _density,
        Turn(1.414213562372, 1.414213562374, 1.128904145186),
        Turn(-0.751791524695, -0.751791524693, -0.169971207481),
    ),
    "gelu_tanh": _gated(
        lambda z: jax.nn.sigmoid(_bent(z)),
        lambda z: _sigmoid_slope(_bent(z)) * _bent_slope(z),
        Turn(1.418504008790, 1.418504008792, 1.128993068660),
        Turn(-0.752461422072, -0.752461422070, -0.170040750572),
    ),
    "silu": _gated(
        jax.nn.sigmoid,
        _sigmoid_slope,
        Turn(2.399357280514, 2.399357280516, 1.099839320130),
        Turn(-1.278464542762, -1.278464542760, -0.278464542762),
    ),
}


def _extent(function, turns, lower, upper):
    """Smallest and largest value on an interval of a function that is monotone between turns."""
    ends = function(lower), function(upper)
    low, high = smaller(*ends), larger(*ends)
    for turn in turns:
        inside = (lower <= turn.last) & (upper >= turn.first)
        low = jnp.where(inside, jnp.minimum(low, turn.extreme), low)
        high = jnp.where(inside, jnp.maximum(high, turn.extreme), high)
    return low, high


class Rounded(Rule):
    """What smooth kinds have in common: slopes on an interval, and values that are rounded.

    A kind has `slopes` and `scale`.
    """

    def slopes(self, lower: jax.Array, upper: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Smallest and largest slope on the box, outwards."""
        raise NotImplementedError(f"{type(self).__name__} has no slopes.")

    def scale(self, size: jax.Array) -> Any:
        """Of what an executed value is off by `EXECUTED` units of roundoff at most."""
        raise NotImplementedError(f"{type(self).__name__} has no scale.")

    @property
    def counts_rounding(self) -> bool:
        return True

    def evaluation_error(self, value):
        return 64 * DOUBLE * (1 + jnp.abs(value))

    def lipschitz_on(self, lower, upper):
        low, high = self.slopes(lower, upper)
        return jnp.max(jnp.maximum(jnp.abs(low), jnp.abs(high)))

    def active(self, lower, upper, as_paper=False):
        return varies(lower, upper)

    def relaxations(self, center, lower, upper, radius, after, arithmetic):
        low, high = self.slopes(lower, upper)
        size = jnp.maximum(1.0, self.lipschitz)
        off = self.evaluation_error(after.center)
        box = (center, lower, upper)
        return (relaxed(low, high, False, *box, 1.0, radius, arithmetic, size=size, off=off),)

    def pieces(self, center, lower, upper, arithmetic):
        # On each side of the center chords have slopes of that side alone.
        left, right = self.slopes(lower, center), self.slopes(center, upper)
        rising, falling = (left[0], right[1]), (left[1], right[0])
        free, none = varies(lower, upper), jnp.zeros_like(center)
        return (Pieces(center, lower, upper, (center,), rising, falling, free, none),)

    def jacobian(self, lower, upper, arithmetic):
        return (Slopes.between(*self.slopes(lower, upper), arithmetic),)

    def executed(self, error, lower, upper, arithmetics):
        names = sorted({a.name for a in arithmetics})
        platform = jax.default_backend()
        if len(names) != 1 or names[0] not in TYPES or platform not in MEASURED:
            raise TypeError(
                f"{self.kind}, executed in {', '.join(names) or 'unknown arithmetic'} on "
                f"{platform}: how far XLA's is off was measured in {' and '.join(TYPES)} on "
                f"{', '.join(MEASURED)} alone. Certify it there, or take an activation that only "
                "selects, such as ReLU."
            )
        (arithmetic,) = arithmetics
        size = jnp.maximum(jnp.abs(lower), jnp.abs(upper)) + error
        # What underflows, an input or a factor, may count as 0.
        underflow = 4 * arithmetic.smallest * (1 + self.lipschitz)
        own = EXECUTED * arithmetic.output * self.scale(size) + underflow
        found = (self.lipschitz * error + own) * (1 + 16 * DOUBLE)
        return jnp.where(size < LARGEST_INPUT, found, jnp.inf)


@rule()
class Smooth(Rounded):
    """One of `CURVES`, by name."""

    name: str

    @property
    def kind(self) -> str:
        return self.name

    @property
    def curve(self) -> Curve:
        return CURVES[self.name]

    def __call__(self, z: jax.Array) -> jax.Array:
        return self.curve.value(z)

    @property
    def lipschitz(self) -> float:
        return self.curve.lipschitz

    def interval(self, lower, upper):
        low, high = _extent(self.curve.value, self.curve.value_turns, lower, upper)
        return low - self.evaluation_error(low), high + self.evaluation_error(high)

    def slopes(self, lower, upper):
        low, high = _extent(self.curve.slope, self.curve.slope_turns, lower, upper)
        return low - SLOPE_ERROR, high + SLOPE_ERROR

    def scale(self, size):
        return self.curve.scale(size)

    def described(self):
        if type(self) is not Smooth:  # what another class computes is not known
            return super().described()
        return {"kind": self.name}


@rule("alpha")
class Elu(Rounded):
    """z where z > 0, ``alpha (exp(z) - 1)`` elsewhere."""

    alpha: Any

    @property
    def kind(self) -> str:
        return "elu"

    def __call__(self, z: jax.Array) -> jax.Array:
        alpha = jnp.asarray(self.alpha, z.dtype)
        return jnp.where(z > 0, z, alpha * jnp.expm1(jnp.minimum(z, 0.0)))

    @property
    def lipschitz(self):
        size = jnp.maximum(1.0, jnp.max(jnp.abs(jnp.asarray(self.alpha))))
        return float(size) if is_concrete(size) else size

    def interval(self, lower, upper):
        ends = self(lower), self(upper)
        low, high = smaller(*ends), larger(*ends)
        kinked = (lower < 0) & (upper > 0)  # with alpha < 0 it falls to 0 and rises again
        low, high = (
            jnp.where(kinked, f(x, 0.0), x) for f, x in ((jnp.minimum, low), (jnp.maximum, high))
        )
        return low - self.evaluation_error(low), high + self.evaluation_error(high)

    def evaluation_error(self, value):
        return self.lipschitz * super().evaluation_error(value)

    def slopes(self, lower, upper):
        alpha = jnp.asarray(self.alpha, lower.dtype)

        def below(z):
            return alpha * jnp.exp(jnp.minimum(z, 0.0))

        # Below 0 the slope is monotone, and next to 0 it is alpha.
        first = jnp.where(lower < 0, below(lower), 1.0)
        last = jnp.where(lower < 0, below(upper), 1.0)
        beyond = jnp.where(upper > 0, 1.0, last)
        low, high = smaller(smaller(first, last), beyond), larger(larger(first, last), beyond)
        off = SLOPE_ERROR * self.lipschitz
        return low - off, high + off

    def scale(self, size):
        return self.lipschitz

    def described(self):
        if type(self) is not Elu:  # what another class computes is not known
            return super().described()
        return {"kind": "elu", "alpha": self.alpha}


def _gelu(z):
    return jax.nn.gelu(z, approximate=False)


def _gelu_tanh(z):
    return jax.nn.gelu(z, approximate=True)


def _silu(z):
    return jax.nn.silu(z)


def _softplus(z):
    return jax.nn.softplus(z)


def _softsign(z):
    return jax.nn.soft_sign(z)


def _hard_swish(z):
    return jax.nn.hard_swish(z)


def _elu(z):
    return jax.nn.elu(z)


def _elu_of(z, alpha):
    return jax.nn.elu(z, alpha)


register(_gelu, lambda: Smooth("gelu"))
register(_gelu_tanh, lambda: Smooth("gelu_tanh"))
register(_silu, lambda: Smooth("silu"))
register(_softplus, lambda: Smooth("softplus"))
register(_softsign, lambda: Smooth("softsign"))
register(_hard_swish, lambda: Smooth("hard_swish"))
register(_elu, lambda: Elu(1.0))
register(_elu_of, Elu)


@register_primitive("tanh", "logistic")
def _alone(reader, equation, inputs):
    (value,) = inputs
    if not isinstance(value, Ref):
        return None
    name = {"tanh": "tanh", "logistic": "sigmoid"}[equation.primitive.name]
    return reader.composite(Smooth(name), value, equation.outvars[0].aval, [equation])
