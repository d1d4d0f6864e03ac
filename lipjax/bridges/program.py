"""A network that was read from elsewhere: a list of operations with their weights, as a function
that JAX traces.

What reads a format (`onnx_in`, `torch`) names the operations to a `Builder`, which works out every
shape on the way, so that an error names the operation; `Builder.network` is the `Network`. It is
computed in the order of axes in which it came, one example at a time.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipjax.bridges.operations import OPERATIONS

# The value that is the example itself.
INPUT = 0
# Largest difference of the logits, as a share of the largest logit, on the random examples of
# `compared`.
TOLERANCE = 1e-3
EXAMPLES = 4


@dataclasses.dataclass(frozen=True)
class Value:
    """Something that is computed: by which step, and its shape."""

    number: int
    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """An array that does not depend on the example.

    Attributes:
        name: as in the file.
        array: its numbers.
        trained: is it a parameter? Statistics and buffers are not.
    """

    name: str
    array: np.ndarray
    trained: bool = True


Operand = Value | Constant


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One operation: ``OPERATIONS[kind](*operands, **settings)``.

    Attributes:
        where: what a message calls it.
        operands: numbers of values (int), names of weights (str), or plain numbers (float).
        result: the number of its value.
    """

    kind: str
    where: str
    operands: tuple[int | str | float, ...]
    settings: dict[str, Any]
    result: int


class Network(nnx.Module):
    """A network read from a file or another framework, on one example or on a batch of them.

    Its weights are parameters (nnx.Param, by their names in the file): `jax.grad` and
    `lipjax.bound` reach them. Statistics of batch normalisation and buffers are nnx.BatchStat.

    Attributes:
        input_shape: of one example: images ``(height, width, channels)``, vectors ``(features,)``.
        weights: by name.
        left_out: the softmax at the end, if there was one: what this network gives are its logits.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        moved: bool,
        batch_axis: bool,
        steps: Sequence[Step],
        weights: dict[str, Constant],
        last: int,
        left_out: Step | None = None,
    ):
        self.input_shape = tuple(input_shape)
        self.left_out = None if left_out is None else left_out.where
        self._ending = left_out
        self.steps = tuple(steps)
        self._moved, self._batch_axis, self._last = moved, batch_axis, last
        self.weights = nnx.Dict(
            {
                name: (nnx.Param if each.trained else nnx.BatchStat)(jnp.asarray(each.array))
                for name, each in weights.items()
            }
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of one example of `input_shape`, or of a batch ``(N, *input_shape)``.

        It computes in the widest of its own type and that of `x`.

        Raises:
            ValueError: another shape.
            TypeError: whole numbers.
        """
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"expected floating numbers in [0, 1], got {x.dtype}.")
        if x.shape == self.input_shape:
            return self._one(x)
        if x.shape[1:] == self.input_shape:
            return jax.vmap(self._one)(x)
        raise ValueError(
            f"the network takes one example of shape {self.input_shape}, or a batch of them, got "
            f"{x.shape}."
            + (" Images have their channels last." if len(self.input_shape) == 3 else "")
        )

    def _one(self, x: jax.Array) -> jax.Array:
        weights = {name: variable[...] for name, variable in self.weights.items()}
        dtype = jnp.result_type(x, *weights.values())
        values: dict[Any, Any] = {name: array.astype(dtype) for name, array in weights.items()}
        values[INPUT] = from_example(x.astype(dtype), self._moved, self._batch_axis)
        for step in self.steps:
            operands = [o if isinstance(o, float) else values[o] for o in step.operands]
            # The name stands in `print(lipjax.trace(network, x))`, and in errors.
            with jax.named_scope(step.where):
                values[step.result] = OPERATIONS[step.kind](*operands, **step.settings)
        result = values[self._last]
        return result[0] if self._batch_axis else result

    def ended(self, logits: jax.Array) -> jax.Array:
        """What the original makes of its logits: the softmax that was left out, or nothing."""
        if self._ending is None:
            return logits
        return OPERATIONS[self._ending.kind](logits, axis=-1)

    def sequential(self) -> nnx.Sequential:
        """The same network of layers that lipjax has, channels last, batch normalisation folded.

        That is the form that `lipjax.save` writes. It computes other last bits, so certify the one
        that you run.

        Raises:
            TypeError: an operation without such a layer, or branches, by name.
            ValueError: as `from_equinox`.
        """
        from lipjax.bridges.chain import sequential

        return sequential(self)


def from_example(x: jax.Array, moved: bool, batch_axis: bool) -> jax.Array:
    """One example as the operations take it: with an axis in front, channels to the front."""
    if moved:
        x = jnp.moveaxis(x, -1, 0)
    return x[None] if batch_axis else x


class Builder:
    """Collects operations.

    Args:
        shape: of the input as the operations take it, the batch axis (of one) included.
        batch_axis: has it one?
        moved: do examples have their channels last?
    """

    def __init__(self, shape: Sequence[int], dtype, *, batch_axis: bool, moved: bool):
        self.batch_axis, self.moved = batch_axis, moved
        self.input = Value(INPUT, tuple(shape), np.dtype(dtype))
        self.steps: dict[int, Step] = {}
        self.values = {INPUT: self.input}
        self.weights: dict[str, Constant] = {}
        self.where = "the input"

    def fail(self, message: str, error: type[Exception] = ValueError) -> NoReturn:
        """Raises an error that names the operation that is read now."""
        raise error(f"{self.where}: {message}")

    def add(self, kind: str, *operands: Operand | float, **settings) -> Value:
        """One more operation.

        Raises:
            ValueError: operands that do not fit.
        """
        if kind in ("mul", "div"):
            from lipjax.bridges.spelled import recognised

            found = recognised(self, kind, operands)
            if found is not None:
                return found
        likes = [
            jax.ShapeDtypeStruct(o.shape, o.dtype)
            if isinstance(o, Value)
            else held(o.array)
            if isinstance(o, Constant)
            else o
            for o in operands
        ]
        try:
            found = jax.eval_shape(lambda *a: OPERATIONS[kind](*a, **settings), *likes)
        except (TypeError, ValueError) as error:
            shapes = ", ".join(str(getattr(like, "shape", like)) for like in likes)
            self.fail(f"its operands, of shapes {shapes}, do not fit: {error}")
        result = len(self.steps) + 1
        named = tuple(map(self._named, operands))
        self.steps[result] = Step(kind, self.where, named, settings, result)
        self.values[result] = Value(result, tuple(found.shape), np.dtype(found.dtype))
        return self.values[result]

    def _named(self, operand: Operand | float) -> int | str | float:
        if isinstance(operand, Value):
            return operand.number
        if not isinstance(operand, Constant):
            return float(operand)
        array = held(operand.array)
        if array.ndim == 0:
            return float(array)
        if array.dtype not in (np.float32, np.float64):
            self.fail(
                f"{operand.name} is {array.dtype}, expected float32 or float64: write the network "
                "with parameters of these types (.float() in PyTorch)."
            )
        name = operand.name
        while name in self.weights and not _same(self.weights[name].array, array):
            name += "'"
        self.weights.setdefault(name, Constant(name, array, operand.trained))
        return name

    def step_of(self, value: Operand) -> Step | None:
        """The operation that a value comes from."""
        return self.steps.get(value.number) if isinstance(value, Value) else None

    def convolution(self, x: Operand, *parameters: Operand, padding, **settings) -> Value:
        """A convolution; zeros that were put around its images before are its own padding."""
        step = self.step_of(x)
        if step is not None and step.kind == "pad":
            own = step.settings
            around = own["widths"][2:]
            zeros = own["mode"] == "constant" and own.get("value", 0.0) == 0
            if zeros and own["widths"][:2] == ((0, 0), (0, 0)) and np.min(around) >= 0:
                x = self.values[step.operands[0]]  # type: ignore[index]
                pairs = zip(padding, around, strict=True)
                padding = tuple((a + c, b + d) for (a, b), (c, d) in pairs)
        return self.add("convolution", x, *parameters, padding=padding, **settings)

    def relu(self, x: Operand) -> Value:
        """``max(x, 0)``.

        Behind a minimum with an array it is written as a clipped ReLU, which has a tighter bound:
        ``max(min(x, t), 0) = min(max(x, 0), max(t, 0))``.
        """
        step = self.step_of(x)
        if step is None or step.kind != "minimum" or not isinstance(step.operands[1], str):
            return self.add("relu", x)
        threshold = self.add("maximum", self.weights[step.operands[1]], 0.0)
        before = self.values[step.operands[0]]  # type: ignore[index]
        return self.add("minimum", self.add("relu", before), threshold)

    def concatenate(self, parts: Sequence[Operand], axis: int) -> Value:
        """Parts along an axis; those of a MaxMin, clipped or not, are written as one."""
        found = self._pair(parts, axis) if len(parts) == 2 else None
        return self.add("concatenate", *parts, axis=axis) if found is None else found

    def _pair(self, parts: Sequence[Operand], axis: int) -> Value | None:
        """``max(a, b)`` and ``min(a, b)`` of the halves of one value, as one operation; or None."""
        thresholds, halves = [], []
        for part, kind, cut in zip(
            parts, ("maximum", "minimum"), ("minimum", "maximum"), strict=True
        ):
            step = self.step_of(part)
            if step is not None and step.kind == cut and isinstance(step.operands[1], str):
                thresholds.append(self.weights[step.operands[1]])
                step = self.steps.get(step.operands[0])  # type: ignore[arg-type]
            if step is None or step.kind != kind:
                return None
            halves.append([self.steps.get(o) for o in step.operands])  # type: ignore[arg-type]
        found = self._halves(halves[0], axis)
        if found is None or found != self._halves(halves[1], axis) or len(thresholds) == 1:
            return None
        if any(t.array.ndim != len(found.shape) or len(t.array) != 1 for t in thresholds):
            return None
        return self.add("paired", found, *thresholds, axis=axis)

    def _halves(self, steps: Sequence[Step | None], axis: int) -> Value | None:
        """The value of which these two steps are the halves along an axis, in either order."""
        slices = [step for step in steps if step is not None and step.kind == "slice"]
        if len(slices) != 2 or slices[0].operands != slices[1].operands:
            return None
        value = self.values[slices[0].operands[0]]  # type: ignore[index]
        half, odd = divmod(value.shape[axis], 2)
        wanted = [
            {"axis": axis, "start": start, "stop": start + half, "step": 1} for start in (0, half)
        ]
        own = sorted((step.settings for step in slices), key=lambda each: each["start"])
        return value if own == wanted and not odd else None

    def network(self, result: Operand, input_shape: Sequence[int]) -> Network:
        """The network of what the result needs, without a softmax at the end."""
        if not isinstance(result, Value):
            raise ValueError("the output does not depend on the input.")
        last, left_out = result.number, None
        step = self.steps.get(last)
        over_classes = step is not None and step.settings.get("axis") == len(result.shape) - 1
        if step is not None and step.kind in ("softmax", "log_softmax") and over_classes:
            (last,) = step.operands  # type: ignore[assignment]
            left_out = step

        needed: set[Any] = {last}
        for step in reversed(self.steps.values()):
            if step.result in needed:
                # (The number 2.0 is not the value of step 2.)
                needed.update(o for o in step.operands if not isinstance(o, float))
        if INPUT not in needed:
            raise ValueError("the output does not depend on the input.")
        steps = [step for step in self.steps.values() if step.result in needed]
        weights = {name: each for name, each in self.weights.items() if name in needed}
        moved, batch_axis = self.moved, self.batch_axis
        return Network(input_shape, moved, batch_axis, steps, weights, last, left_out)


def held(array) -> np.ndarray:
    """As NumPy array of a type that JAX holds now: float64 becomes float32 where it has no 64
    bits."""
    array = np.asarray(array)
    wide = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    narrow = array.dtype == np.float64 and not wide
    return array.astype(np.float32) if narrow else array


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    return first.shape == second.shape and np.array_equal(first, second, equal_nan=True)


def compared(network, input_shape: Sequence[int], reference: Callable[[np.ndarray], Any]) -> None:
    """Runs both on a few random examples, with the softmax that was left out, if one was.

    Raises:
        ValueError: other logits, or another shape of them.
    """
    shape = (EXAMPLES, *input_shape)
    examples = np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)
    try:
        ours = jax.jit(lambda network, x: network(x))(network, examples)
        ours = np.asarray(network.ended(ours) if isinstance(network, Network) else ours)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"images of shape {tuple(input_shape)} do not go through: {error}"
        ) from error
    if ours.ndim != 2:
        raise ValueError(
            f"the logits must have one axis, got shape {ours.shape[1:]}: a Flatten is missing."
        )
    theirs = np.asarray(reference(examples))
    size = np.max(np.abs(theirs), initial=0.0)
    alike = theirs.shape == ours.shape
    if alike and np.max(np.abs(ours - theirs)) <= TOLERANCE * size + 1e-6:
        return
    difference = np.max(np.abs(ours - theirs)) if alike else f"shape {theirs.shape}"
    raise ValueError(
        f"the network that was built computes other logits, of shape {ours.shape}, than the given "
        f"one on {EXAMPLES} random images: they differ by {difference}, the largest is {size}. A "
        "layer computes something else than its type and parameters say, or numbers are not finite."
    )


def image_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Checks the shape of one example."""
    found = tuple(int(n) for n in shape)
    if not found or min(found) < 1:
        raise ValueError(
            f"input_shape must be (height, width, channels) or (features,), got {shape}."
        )
    return found
