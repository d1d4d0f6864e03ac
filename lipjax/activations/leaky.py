"""Leaky ReLU, PReLU and their like: one slope below 0 and one above, entry by entry."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipjax.activations.base import DOUBLE, FLOOR, Rule, hinge, ratio, relaxed, rule, varies
from lipjax.activations.pieces import Pieces
from lipjax.activations.slopes import Slopes
from lipjax.graph import register_primitive
from lipjax.graph.known import is_concrete
from lipjax.graph.linear import Scale, larger, smaller
from lipjax.graph.nodes import Linear, Rearrange
from lipjax.graph.trace import Ref, Test


@rule("below", "above")
class Leaky(Rule):
    """``below z`` where z < 0, ``above z`` elsewhere.

    Attributes:
        below, above: slopes, of any sign, broadcastable to z.
    """

    below: Any
    above: Any

    def __call__(self, z: jax.Array) -> jax.Array:
        below, above = self._slopes(z)
        return jnp.where(z < 0, below * z, above * z)

    def _slopes(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        below, above = (jnp.asarray(s, z.dtype) for s in (self.below, self.above))
        return jnp.broadcast_to(below, z.shape), jnp.broadcast_to(above, z.shape)

    @property
    def counts_rounding(self) -> bool:
        return True

    def interval(self, lower, upper):
        ends = self(lower), self(upper)
        kinked = (lower < 0) & (upper > 0)
        low, high = smaller(*ends), larger(*ends)
        low = jnp.where(kinked, smaller(low, jnp.zeros_like(low)), low)
        high = jnp.where(kinked, larger(high, jnp.zeros_like(high)), high)
        # A product is rounded, and may underflow, unless a factor of it is 0 or 1.
        below, above = self._slopes(lower)
        rounds = ((lower < 0) & _rounds(below)) | ((upper > 0) & _rounds(above))
        low_off, high_off = (
            jnp.where(rounds, self.evaluation_error(end), 0) for end in (low, high)
        )
        return low - low_off, high + high_off

    @property
    def lipschitz(self):
        sizes = [jnp.max(jnp.abs(jnp.asarray(s))) for s in (self.below, self.above)]
        largest = jnp.maximum(*sizes)
        return float(largest) if is_concrete(largest) else largest

    def lipschitz_on(self, lower, upper):
        low, high = self._extremes(lower, upper)
        return jnp.max(jnp.maximum(jnp.abs(low), jnp.abs(high)))

    def _extremes(self, lower, upper):
        """Smallest and largest slope on the box."""
        below, above = self._slopes(lower)
        first = jnp.where(lower >= 0, above, below)
        last = jnp.where(upper <= 0, below, above)
        return jnp.minimum(first, last), jnp.maximum(first, last)

    def evaluation_error(self, value):
        return 4 * DOUBLE * jnp.abs(value) + FLOOR

    def active(self, lower, upper, as_paper=False):
        low, high = self._extremes(lower, upper)
        return varies(lower, upper) & ~((low == 0) & (high == 0))

    def stable(self, lower, upper):
        low, high = self._extremes(lower, upper)
        return (low == 1) & (high == 1) & (upper >= lower)

    def relaxations(self, center, lower, upper, radius, after, arithmetic):
        # From z >= 0: its own slope up to the kink, then on towards that of the other side, as far
        # as the end of the box. z < 0: mirrored.
        below, above = self._slopes(center)
        positive = center >= 0
        far = jnp.where(positive, jnp.maximum(-lower, 0.0), jnp.maximum(upper, 0.0))
        own = jnp.where(positive, above, below)
        other = jnp.where(positive, below, above)
        fixed = (lower >= 0) | (upper <= 0)
        one = jnp.where(lower >= 0, above, jnp.where(upper <= 0, below, own))
        chord = own + (other - own) * ratio(far, far + jnp.abs(center))
        end = jnp.where(fixed, one, chord)
        low, high = jnp.minimum(one, end), jnp.maximum(one, end)
        size = jnp.maximum(1.0, self.lipschitz)
        off = self.evaluation_error(after.center)
        box = (center, lower, upper)
        return (relaxed(low, high, fixed, *box, 1.0, radius, arithmetic, size=size, off=off),)

    def pieces(self, center, lower, upper, arithmetic):
        none = jnp.zeros_like(center)
        slopes = self._slopes(center)
        free = self.active(lower, upper)
        return (Pieces(center, lower, upper, (none,), slopes, slopes, free, exact=none),)

    def jacobian(self, lower, upper, arithmetic):
        return (Slopes.between(*self._extremes(lower, upper), arithmetic),)

    def executed(self, error, lower, upper, arithmetics):
        # A product of an input that is off itself, rounded.
        below, above = self._slopes(lower)
        slope = jnp.maximum(jnp.abs(below), jnp.abs(above))
        rounded = jnp.maximum(*(jnp.where(_rounds(s), jnp.abs(s), 0.0) for s in (below, above)))
        size = jnp.maximum(jnp.abs(lower), jnp.abs(upper)) + error
        unit = sum(a.output for a in arithmetics)
        # A slope or an input that is subnormal may count as 0, and is multiplied by the other.
        smallest = max((a.smallest for a in arithmetics), default=0.0)
        underflow = 4 * smallest * (1 + slope + size)
        largest = min((a.largest for a in arithmetics), default=jnp.inf)
        own = unit * (1 + unit) * rounded * size
        found = (slope * error + own) * (1 + 16 * DOUBLE) + underflow
        return jnp.where(slope * size + found < largest, found, jnp.inf)

    def instability(self, lower, upper):
        return hinge(lower, upper, 0.0)

    def described(self):
        if type(self) is not Leaky:  # what another class computes is not known
            return super().described()
        return {"kind": "leaky", "below": self.below, "above": self.above}


def _rounds(slope: jax.Array) -> jax.Array:
    """Is a product with it rounded?"""
    return (slope != 0) & (jnp.abs(slope) != 1)


@register_primitive("select_n")
def _chosen(reader, equation, inputs):
    """``where(z > 0, z, a z)`` and its like: as `jax.nn.leaky_relu` and PReLU are written."""
    if len(inputs) != 3 or not isinstance(inputs[0], Test):
        return None
    test, *cases = inputs
    threshold = test.threshold
    if threshold.roundings or not is_concrete(threshold.value) or np.any(threshold.value):
        return None
    factors = [_factor(reader, case, test.node) for case in cases]
    if None in factors:
        return None
    otherwise, chosen = factors
    (below, above) = (otherwise, chosen) if test.above else (chosen, otherwise)
    roundings = max(below[1], above[1])
    out = equation.outvars[0].aval
    executed = (*below[2], *above[2])
    made = Leaky(below[0], above[0])
    return reader.activation(made, Ref(test.node), out.shape, out.dtype, roundings, executed)


def _factor(reader, value, node: int):
    """By what a value is a multiple of a node's: factor, its roundings, and what computes it."""
    if value == Ref(node):
        return 1.0, 0.0, ()
    if not isinstance(value, Ref):
        return None
    found = reader.nodes[value.node]
    like = reader.nodes[node]
    alike = (found.shape, found.dtype) == (like.shape, like.dtype)
    step = _last_step(reader, found, like) if alike else None
    if not isinstance(step, Linear) or type(step.operator.apply) is not Scale:
        return None
    if step.operator.bias is not None:
        return None
    return step.operator.kernel, step.roundings, step.executed


def _last_step(reader, found, like):
    """What makes the value `found` of the value `like`, in one step, where that is so.

    Behind a linear node a scale is joined with it: then it is the last of its parts.
    """
    if isinstance(found, Rearrange) and isinstance(like, Rearrange):
        if found.steps != like.steps or len(found.inputs) != 1 or len(like.inputs) != 1:
            return None
        # The steps do not say where they take entries from, nor what fills.
        if any(found.constants) or any(like.constants):
            return None
        (inner,), (outer,) = found.inputs, like.inputs
        step = _last_step(reader, reader.nodes[inner], reader.nodes[outer])
        # One number is the same in any place.
        single = isinstance(step, Linear) and np.size(step.operator.kernel) == 1
        return step if single else None
    if not isinstance(found, Linear):
        return None
    if not found.parts:
        return found if reader.nodes[found.inputs[0]] is like else None
    before = like.parts or (like,) if isinstance(like, Linear) else (like,)
    same = len(found.parts) == len(before) + 1
    if not same or any(a is not b for a, b in zip(found.parts, before, strict=False)):
        return None
    return found.parts[-1]
