"""The absolute value, entry by entry."""

import jax
import jax.numpy as jnp
from flax import nnx

from lipjax.activations.base import Rule, hinge, ratio, relaxed, rule, varies
from lipjax.activations.pieces import Pieces
from lipjax.activations.slopes import Slopes
from lipjax.graph import register_primitive
from lipjax.graph.linear import larger, smaller
from lipjax.graph.trace import Ref


class Absolute(nnx.Module):
    """``|z|``: what `jnp.abs` is, as a module. Never constant on a box that varies."""

    def __call__(self, z: jax.Array) -> jax.Array:
        return jnp.abs(z)


@rule()
class AbsoluteValue(Rule):
    """``|z|``."""

    @property
    def kind(self) -> str:
        return "Absolute"

    @property
    def selects(self) -> bool:
        return True

    def __call__(self, z: jax.Array) -> jax.Array:
        return jnp.abs(z)

    def interval(self, lower, upper):
        first = jnp.abs(lower)
        second = jnp.abs(upper)
        turns = (lower <= 0) & (upper >= 0)
        return jnp.where(turns, 0.0, smaller(first, second)), larger(first, second)

    def active(self, lower, upper, as_paper=False):
        if as_paper:  # the paper has no absolute values
            return jnp.ones(lower.shape, bool)
        return varies(lower, upper)

    def stable(self, lower, upper):
        return (lower >= 0) & (upper >= lower)

    def relaxations(self, center, lower, upper, radius, after, arithmetic):
        # From z >= 0: slope 1 up to the kink, then falling to that of the far end. z < 0: mirrored.
        positive = center >= 0
        far = jnp.where(positive, jnp.maximum(-lower, 0.0), jnp.maximum(upper, 0.0))
        size = jnp.abs(center)
        sign = jnp.where(positive, 1.0, -1.0)
        fixed = (lower >= 0) | (upper <= 0)
        # Where the box only touches the kink from the other side, its own sign counts.
        one = jnp.where(lower >= 0, 1.0, jnp.where(upper <= 0, -1.0, sign))
        other = jnp.where(fixed, one, sign * ratio(size - far, size + far))
        low = jnp.minimum(one, other)
        high = jnp.maximum(one, other)
        return (relaxed(low, high, fixed, center, lower, upper, 1.0, radius, arithmetic),)

    def pieces(self, center, lower, upper, arithmetic):
        none = jnp.zeros_like(center)
        slopes = (-1.0, 1.0)
        return (Pieces(center, lower, upper, (none,), slopes, slopes, varies(lower, upper), none),)

    def jacobian(self, lower, upper, arithmetic):
        low = jnp.where(lower >= 0, jnp.ones_like(lower), -1.0)
        high = jnp.where(upper <= 0, -jnp.ones_like(lower), 1.0)
        # A box that is the single point 0 is both: nothing moves.
        return (Slopes.between(jnp.minimum(low, high), jnp.maximum(low, high), arithmetic),)

    def rounding(self, error):
        return error  # a sign is no rounding, and no output moves further than its input

    def instability(self, lower, upper):
        return hinge(lower, upper, 0.0)

    def described(self):
        return {"kind": "abs"} if type(self) is AbsoluteValue else super().described()


@register_primitive("abs")
def _absolute(reader, equation, inputs):
    (value,) = inputs
    if not isinstance(value, Ref):
        return None
    out = equation.outvars[0].aval
    return reader.activation(AbsoluteValue(), value, out.shape, out.dtype)
