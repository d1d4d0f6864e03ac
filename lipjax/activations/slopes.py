"""How an activation's output changes between *any two points* of a box.

For u, v in the box, ``a(u) - a(v) = M (u - v)``, one M for each pair of points. Here M is split
into a known part and an error, ``M d = N d + B e``: N and B are known, and of e is known how large
each entry can be, given how much each input can change. `Rule.jacobian` says it of each kind.

(A `Relaxation` says the same of points seen from the center alone, which is less.)

All that bounds changes is an array of the input's shape with one more axis at its end: a bound of
each entry of each row of a Jacobian, or one column of norms of its rows.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lipjax.graph.linear import raised, safe_sqrt


@dataclasses.dataclass(frozen=True)
class Slopes:
    """M is diagonal: entry by entry, slopes within `width` of `middle`; e is ``(M - N) d``.

    Attributes:
        middle, width: of the input's shape. Where all slopes are 0 both are exactly 0.
    """

    middle: jax.Array
    width: jax.Array

    @classmethod
    def between(cls, low: jax.Array, high: jax.Array, arithmetic):
        """Slopes in ``[low, high]``; where the two are equal nothing is rounded."""
        middle, width = arithmetic.around(low, high)
        same = low == high
        return cls(jnp.where(same, low, middle), jnp.where(same, 0.0, width))

    @property
    def moves(self) -> jax.Array:
        """Mask over the outputs: False only where M's row is 0."""
        return ~((self.middle == 0) & (self.width == 0))

    @property
    def gain(self) -> jax.Array:
        """``||M||_2`` is at most this."""
        return jnp.max(jnp.abs(self.middle) + self.width)

    @property
    def error_gain(self) -> jax.Array:
        """``||e||_2 <= error_gain ||d||_2``."""
        return jnp.max(self.width)

    def transposed(self, g: jax.Array) -> jax.Array:
        """``N^T g``."""
        return self.middle * g

    def error_weights(self, g: jax.Array) -> jax.Array:
        """``B^T g``."""
        return g

    def reach(self, changes: jax.Array) -> jax.Array:
        """Bound of e, given one of d."""
        return self.width[..., None] * changes

    def forward(self, changes: jax.Array) -> jax.Array:
        """Bound of ``M d``, given one of d."""
        return (jnp.abs(self.middle) + self.width)[..., None] * changes


class PairSlopes(Slopes):
    """Of ``(max, min)`` of pairs of channels ``(a, b)``: M keeps ``a + b``, multiplies ``a - b``.

    The multiplier of the larger's share is a slope of ``|a - b|``, in [-1, 1]; `middle` and `width`
    are of its shape, half the channels. e lies along ``(1, -1) / sqrt(2)`` of each pair.
    """

    @property
    def moves(self) -> jax.Array:
        return jnp.ones((*self.middle.shape[:-1], 2 * self.middle.shape[-1]), bool)

    @property
    def gain(self) -> jax.Array:
        return jnp.ones((), self.middle.dtype)

    def transposed(self, g: jax.Array) -> jax.Array:
        a, b = jnp.split(g, 2, axis=-1)
        kept = (a + b) / 2
        turned = self.middle * (a - b) / 2
        return jnp.concatenate([kept + turned, kept - turned], axis=-1)

    def error_weights(self, g: jax.Array) -> jax.Array:
        a, b = jnp.split(g, 2, axis=-1)
        return (a - b) / math.sqrt(2)

    def reach(self, changes: jax.Array) -> jax.Array:
        a, b = jnp.split(changes, 2, axis=-2)
        return self.width[..., None] * (a + b) / math.sqrt(2)

    def forward(self, changes: jax.Array) -> jax.Array:
        # Each output is a mean of the two inputs' changes, with a share in [first, last] of a.
        a, b = jnp.split(changes, 2, axis=-2)
        first = jnp.clip((1 + self.middle - self.width) / 2, 0.0, 1.0)[..., None]
        last = jnp.clip((1 + self.middle + self.width) / 2, 0.0, 1.0)[..., None]

        def most(a, b):
            return jnp.maximum(first * a + (1 - first) * b, last * a + (1 - last) * b)

        return jnp.concatenate([most(a, b), most(b, a)], axis=-2)


@dataclasses.dataclass(frozen=True)
class SortSlopes(Slopes):
    """Of a sort along one axis: entries whose place is known are passed on, the others are error.

    Attributes:
        middle, width: 1 and 0 at a sorted entry that is always the same input, else 0 and 1.
        order: where such entries come from.
        axis: that is sorted.
    """

    order: jax.Array
    axis: int

    @property
    def gain(self) -> jax.Array:
        return jnp.ones((), self.middle.dtype)

    def transposed(self, g: jax.Array) -> jax.Array:
        back = jnp.argsort(self.order, axis=self.axis)
        return jnp.take_along_axis(self.middle * g, back, axis=self.axis)

    def error_weights(self, g: jax.Array) -> jax.Array:
        return self.width * g

    def reach(self, changes: jax.Array) -> jax.Array:
        # No entry of a sort changes by more than the largest change of an input.
        largest = jnp.max(changes, axis=self.axis, keepdims=True)
        return self.width[..., None] * largest

    def forward(self, changes: jax.Array) -> jax.Array:
        passed = jnp.take_along_axis(changes, self.order[..., None], axis=self.axis)
        return self.middle[..., None] * passed + self.reach(changes)


@dataclasses.dataclass(frozen=True)
class Unknown:
    """Of M is known that ``||M||_2 <= lipschitz``: all is error, and any input may move any output.

    Attributes:
        lipschitz: the constant.
        before, after: shapes of input and output.
    """

    lipschitz: float | jax.Array
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def moves(self) -> jax.Array:
        return jnp.ones(self.after, bool)

    @property
    def gain(self) -> jax.Array:
        return jnp.asarray(self.lipschitz)

    error_gain = gain

    def transposed(self, g: jax.Array) -> jax.Array:
        return jnp.zeros(self.before, g.dtype)

    def error_weights(self, g: jax.Array) -> jax.Array:
        return g

    def reach(self, changes: jax.Array) -> jax.Array:
        columns = raised(changes).reshape(-1, changes.shape[-1])
        length = safe_sqrt(jnp.sum(jnp.square(columns), axis=0))
        return jnp.broadcast_to(self.lipschitz * length, (*self.after, changes.shape[-1]))

    forward = reach
