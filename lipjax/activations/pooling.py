"""Max pooling: the largest entry of each window, of any size, stride, padding and dilation.

It is Lipschitz with the root of the number of windows that an entry lies in. With d the change of
the input, the value of window w moves by at most the largest of ``|d_i|``, i in w, so its square by
at most ``sum_{i in w} d_i^2``; in the sum over the windows each d_i^2 counts once for every window
that holds i. Windows that do not overlap make it 1-Lipschitz, overlapping ones do not.

On a box only the *candidates* of a window count: entries whose upper end is above the *floor*, the
largest lower end in the window. The value is ``max(floor, its candidates)`` everywhere on the box.

One-sided errors come from a tournament: the candidates are compared two by two, the larger ones
again, and so on; each comparison is a pair as in MaxMin of which one output is dropped. If no
candidate has the floor, an entry that is constant has it, and takes part. An entry that is a
candidate in c windows stands in c tournaments, in each with weight c (`Compared`): the sum of
``d_i^2 / c`` over all of them is that of ``d_i^2``, so that the ball is the one in front even where
windows overlap.
"""

import dataclasses
import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from lipjax.activations.base import Relaxation, Rule, ratio, rule
from lipjax.activations.pieces import Compared, Entries, compared
from lipjax.graph import register_primitive
from lipjax.graph.linear import larger
from lipjax.graph.trace import Ref


@rule()
class MaxPool(Rule):
    """The maximum of each window; what pads is never the maximum.

    Attributes:
        shape: of the input.
        window, strides, dilation: one number an axis.
        padding: ``(low, high)`` an axis.
    """

    shape: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @property
    def selects(self) -> bool:
        return True

    def __call__(self, z: jax.Array) -> jax.Array:
        return jnp.max(self._taps(z, -jnp.inf), axis=0)  # (a NaN spreads)

    def places(self) -> list[np.ndarray]:
        """Of each axis ``(outputs, window)``: where the taps are, outside of the input too."""
        found = []
        for n, size, step, (low, high), apart in zip(
            self.shape, self.window, self.strides, self.padding, self.dilation, strict=True
        ):
            count = (n + low + high - (size - 1) * apart - 1) // step + 1
            starts = np.arange(max(count, 0)) * step - low
            found.append(starts[:, None] + np.arange(size) * apart)
        return found

    @property
    def lipschitz(self) -> float:
        most = 1
        for n, places in zip(self.shape, self.places(), strict=True):
            inside = places[(places >= 0) & (places < n)]
            most *= int(np.max(np.bincount(inside), initial=0))
        root = math.sqrt(most)
        return root if Fraction(root) ** 2 >= most else math.nextafter(root, math.inf)

    def lipschitz_on(self, lower, upper):
        if self.lipschitz <= 1:
            return self.lipschitz
        # Of the windows that an entry lies in, those whose value it can move.
        candidate, _ = self._candidates(lower, upper)
        counts = self._untaps(candidate.astype(lower.dtype))
        return jax.lax.stop_gradient(jnp.sqrt(jnp.max(counts)))

    def _taps(self, x: jax.Array, filling: float) -> jax.Array:
        """``(taps, *outputs)``: what each window holds, `filling` outside of the input."""
        pads = [(low, high, 0) for low, high in self.padding]
        padded = jax.lax.pad(x, jnp.asarray(filling, x.dtype), pads)
        counts = [len(places) for places in self.places()]
        rows = []
        for tap in itertools.product(*map(range, self.window)):
            start = [k * apart for k, apart in zip(tap, self.dilation, strict=True)]
            limit = [
                first + (count - 1) * step + 1
                for first, count, step in zip(start, counts, self.strides, strict=True)
            ]
            rows.append(jax.lax.slice(padded, start, limit, self.strides))
        return jnp.stack(rows)

    def _untaps(self, taps: jax.Array) -> jax.Array:
        """Of each input the sum over the windows that hold it: the transpose of `_taps`."""
        like = jax.ShapeDtypeStruct(self.shape, taps.dtype)
        return jax.linear_transpose(lambda x: self._taps(x, 0.0), like)(taps)[0]

    def _candidates(self, lower, upper):
        """Mask of the candidates, and the floor. A NaN keeps its window together."""
        low, high = self._taps(lower, -jnp.inf), self._taps(upper, -jnp.inf)
        floor = jnp.max(low, axis=0)
        lost = jnp.any(jnp.isnan(low) | jnp.isnan(high), axis=0)
        return (high > floor) | lost, floor

    def active(self, lower, upper, as_paper=False):
        if as_paper:  # the paper has no pooling
            return jnp.ones(lower.shape, bool)
        candidate, _ = self._candidates(lower, upper)
        return self._untaps(candidate.astype(lower.dtype)) > 0

    def stable(self, lower, upper):
        candidate, floor = self._candidates(lower, upper)
        reached = candidate & (self._taps(lower, -jnp.inf) >= floor)
        return (jnp.sum(candidate, axis=0) == 1) & jnp.any(reached, axis=0)

    def relaxations(self, center, lower, upper, radius, after, arithmetic):
        """With `a` the candidate that leads at the center and b the largest of all others, the
        floor among them, the value is ``a + max(t, 0)``, ``t = b - a``.

        If b is one entry or the floor alone, t is linear, and its positive part has slopes from the
        center as a ReLU has; else either a, or nothing, is taken for the value.
        """
        candidate, floor = self._candidates(lower, upper)
        low, high, z = (self._taps(end, -jnp.inf) for end in (lower, upper, center))
        order = jnp.arange(len(z)).reshape(-1, *(1 for _ in self.shape))
        first = jnp.argmax(jnp.where(candidate, z, -jnp.inf), axis=0)
        lead = candidate & (order == first)
        rest = candidate & ~lead

        still = ~jnp.any(candidate, axis=0)
        # One other candidate, and the floor is that of a candidate: only these two count.
        count = jnp.sum(rest, axis=0)
        pair = (count == 1) & jnp.any(candidate & (low >= floor), axis=0)

        def leading(x):
            return jnp.where(still, floor, jnp.max(jnp.where(lead, x, -jnp.inf), axis=0))

        def others(x):
            found = jnp.max(jnp.where(rest, x, -jnp.inf), axis=0)
            return jnp.where(pair, found, larger(found, floor))

        t = others(z) - leading(z)
        least, most = others(low) - leading(high), others(high) - leading(low)
        fixed = still | (others(high) <= leading(low))  # the leader leads on the whole box
        least, most = arithmetic.widened(least, most, 0.0)

        # Slopes of max(t, 0) from the center, where t is linear.
        alone = count == 0
        linear = alone | pair
        rising = ratio(jnp.maximum(most, 0.0), jnp.maximum(most, 0.0) - t)
        falling = ratio(t, t - jnp.minimum(least, 0.0))
        slope_low = jnp.where(t > 0, falling, 0.0)
        slope_high = jnp.where(t > 0, 1.0, rising)
        slope = jnp.where(fixed, 0.0, (slope_low + slope_high) / 2)
        width = arithmetic.slope_width((slope_high - slope_low) / 2)
        far = width * larger(most - t, t - least)

        # Otherwise: all that max(t, 0) can move, or all that the value can.
        part = jnp.maximum(t, 0.0)
        chosen = larger(jnp.maximum(most, 0.0) - part, part - jnp.maximum(least, 0.0))
        whole = larger(after.upper - after.center, after.center - after.lower)
        drop = ~linear & ~fixed & (whole <= chosen)
        reach = jnp.where(linear, far, jnp.minimum(chosen, whole))
        reach = jnp.where(fixed, 0.0, arithmetic.up(reach))
        # t moves by at most this times the change of the window's entries.
        unit = jnp.where(linear, width * jnp.where(alone, 1.0, math.sqrt(2)), math.sqrt(2))
        unit = jnp.where(fixed, 0.0, jnp.where(drop, 1.0, unit))
        weights = lead * (1 - jnp.where(linear, slope, 0.0)) + rest * jnp.where(linear, slope, 0.0)
        weights = jnp.where(drop, 0.0, weights)

        ball = arithmetic.up(jnp.max(unit) * radius * self.lipschitz_on(lower, upper), 2)
        length = jnp.minimum(arithmetic.length(reach), ball)
        return (PoolRelaxation(weights, unit, reach, length, False, self),)

    def pieces(self, center, lower, upper, arithmetic):
        count = math.prod(self.window)
        if count == 1:  # nothing is compared
            return None
        candidate, floor = self._candidates(lower, upper)
        low, high, z = (self._taps(end, -jnp.inf) for end in (lower, upper, center))
        # The floor takes part where no candidate has it: then it is one, and the first, constant.
        has_it = low >= floor
        place = jax.lax.broadcasted_iota(jnp.int32, z.shape, 0)
        first = place == jnp.argmax(has_it, axis=0)
        plays = candidate | (first & ~jnp.any(candidate & has_it, axis=0))
        counts = self._taps(self._untaps(candidate.astype(z.dtype)), 0.0)

        order = jnp.argsort(jnp.where(plays, z, -jnp.inf), axis=0)

        def ordered(x):
            return jnp.take_along_axis(x, order, axis=0)

        taken = (jnp.where(plays, x, 0.0) for x in (z, low, high))
        entries = Entries(*map(ordered, taken), ordered(jnp.where(candidate, counts, 0.0)))
        plays = ordered(plays)
        steps: list[PoolPieces] = []
        distance = 1
        while distance < count:
            # Counted from the end, where the leader at the center is.
            second = (count - 1 - place) % (2 * distance) == distance
            fields, entries = compared(entries, second & plays, 0, distance, arithmetic)
            last = 2 * distance >= count
            fields.update(order=None if steps else order, pool=self, last=last)
            steps.append(PoolPieces(**fields))
            distance *= 2
        return tuple(steps)

    def rounding(self, error):
        return jnp.max(self._taps(error, 0.0), axis=0)  # no maximum moves further than the entries

    def described(self):
        if type(self) is not MaxPool:  # what another class computes is not known
            return super().described()
        padding = [list(pair) for pair in self.padding]
        numbers = {name: list(getattr(self, name)) for name in ("window", "strides", "dilation")}
        return {"kind": "max_pool", **numbers, "padding": padding}


@rule("slope", "width", "reach", "radius")
class PoolRelaxation(Relaxation):
    """`Relaxation` of max pooling, M and e of the pooled values.

    Attributes:
        slope: ``(taps, *outputs)``, the rows of M.
        pool: the rule.
    """

    pool: MaxPool

    def transposed(self, g: jax.Array) -> jax.Array:
        return self.pool._untaps(self.slope * g)

    def error_weights(self, g: jax.Array) -> jax.Array:
        return g


@rule(
    *("center", "lower", "upper", "kinks", "rising", "falling", "free", "exact"),
    *("first", "length", "order"),
)
class PoolPieces(Compared):
    """A stage of the tournaments of all windows, on arrays ``(taps, *outputs)``.

    Attributes:
        order: of the first stage: which taps the entries are, sorted by the center.
        pool: the rule.
        last: is it the last stage? Behind it only the winner counts, the last entry.
    """

    order: jax.Array | None = dataclasses.field(kw_only=True)
    pool: MaxPool = dataclasses.field(kw_only=True)
    last: bool = dataclasses.field(kw_only=True)

    def weights(self, g: jax.Array) -> jax.Array:
        return super().weights(self._entries(g))

    def transposed(self, slope: jax.Array, g: jax.Array) -> jax.Array:
        row = super().transposed(slope, self._entries(g))
        if self.order is None:
            return row
        row = jnp.take_along_axis(row, jnp.argsort(self.order, axis=0), axis=0)
        return self.pool._untaps(row)

    def _entries(self, g: jax.Array) -> jax.Array:
        if not self.last:
            return g
        return jnp.zeros(self.center.shape, g.dtype).at[-1].set(g)


def _pooled(reader, ref: Ref, window, strides, padding, dilation, dtype):
    """A node of a MaxPool; None if a window holds nothing of its input."""
    shape = tuple(reader.shape(ref))
    numbers = [tuple(map(int, values)) for values in (window, strides, dilation)]
    pads = tuple((int(low), int(high)) for low, high in padding)
    made = MaxPool(shape, numbers[0], numbers[1], pads, numbers[2])
    found = made.places()
    for n, places in zip(shape, found, strict=True):
        if not len(places) or not np.all(np.any((places >= 0) & (places < n), axis=1)):
            return None
    out = tuple(len(places) for places in found)
    return reader.activation(made, ref, out, dtype)


@register_primitive("reduce_window_max")
def _windows(reader, equation, inputs):
    (value,), parameters = inputs, equation.params
    if not isinstance(value, Ref) or any(n != 1 for n in parameters["base_dilation"]):
        return None
    names = ("window_dimensions", "window_strides", "padding", "window_dilation")
    arguments = [parameters[name] for name in names]
    return _pooled(reader, value, *arguments, equation.outvars[0].aval.dtype)


@register_primitive("reduce_max")
def _largest(reader, equation, inputs):
    """`jnp.max` along axes: one window."""
    (value,), out = inputs, equation.outvars[0].aval
    if not isinstance(value, Ref):
        return None
    shape, axes = reader.shape(value), equation.params["axes"]
    window = [n if axis in axes else 1 for axis, n in enumerate(shape)]
    ones, none = [1] * len(shape), [(0, 0)] * len(shape)
    pooled = _pooled(reader, value, window, ones, none, ones, out.dtype)
    return (
        None
        if pooled is None
        else reader.moved([pooled], out.shape, "reshape", new_sizes=out.shape)
    )
