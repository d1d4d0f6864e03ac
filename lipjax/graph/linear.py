"""Linear maps of one example: ``x -> W x``, the transpose, ``|W|``, and the norms of the rows."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel", "bias", "kernel_row_norms"],
    meta_fields=["apply"],
)
@dataclasses.dataclass(frozen=True)
class LinearOperator:
    """One example's affine map ``x -> W x + bias``, with ``W x = apply(kernel, x)``.

    Contract: `apply` is linear in each argument, and every entry of W is zero or exactly one entry
    of `kernel`. Then ``|W| x = apply(|kernel|, x)`` and the squared row norms over a mask are
    ``apply(kernel**2, mask)``: `absolute` and `row_norms` rely on it. A map that breaks it must
        come in through `from_matrix`.

    Attributes:
        apply: ``(kernel, x) -> W x`` for one example, no bias.
        kernel: the array that the matrix is made of.
        bias: broadcastable to the output, or None.
        kernel_row_norms: norms of the rows as the paper takes them, of the whole kernel also where
            padding cuts some of it off; broadcastable to the output. None: the true row norms.
    """

    apply: Callable[[jax.Array, jax.Array], jax.Array]
    kernel: jax.Array
    bias: jax.Array | None = None
    kernel_row_norms: jax.Array | None = None

    @classmethod
    def from_matrix(
        cls,
        matrix: jax.Array,
        input_shape: Sequence[int],
        output_shape: Sequence[int],
        bias: jax.Array | None = None,
    ) -> "LinearOperator":
        """The map of an explicit matrix of shape ``(prod(output_shape), prod(input_shape))``."""
        input_shape, output_shape = tuple(input_shape), tuple(output_shape)
        if matrix.shape != (math.prod(output_shape), math.prod(input_shape)):
            raise ValueError(
                f"a matrix from {input_shape} to {output_shape} has shape "
                f"{(math.prod(output_shape), math.prod(input_shape))}, got {matrix.shape}."
            )

        return cls(Matrix(input_shape, output_shape), matrix, bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``W x``."""
        return self.apply(self.kernel, x)

    def affine(self, x: jax.Array) -> jax.Array:
        """``W x + bias``."""
        y = self(x)
        return y if self.bias is None else y + jnp.broadcast_to(self.bias, y.shape)

    def absolute(self, x: jax.Array) -> jax.Array:
        """``|W| x``, for x >= 0 the half-widths of a box."""
        return self.apply(jnp.abs(self.kernel), x)

    def transpose(self, x: jax.Array | jax.ShapeDtypeStruct) -> Callable[[jax.Array], jax.Array]:
        """``y -> W^T y`` for inputs like `x`, as JAX derives it from `apply`: right for every
        stride and padding."""
        transposed = jax.linear_transpose(self, jax.ShapeDtypeStruct(x.shape, x.dtype))
        return lambda y: transposed(y)[0]

    def materialized(self, x: jax.Array | jax.ShapeDtypeStruct) -> "LinearOperator":
        """The same map, for inputs like `x`, by its explicit matrix: quick where that is small."""
        matrix = jax.vmap(lambda column: self(column.reshape(x.shape)).reshape(-1))(
            jnp.eye(x.size, dtype=x.dtype)
        ).T
        shape = jax.eval_shape(self, jax.ShapeDtypeStruct(x.shape, x.dtype)).shape
        explicit = LinearOperator.from_matrix(matrix, x.shape, shape, self.bias)
        return dataclasses.replace(explicit, kernel_row_norms=self.kernel_row_norms)

    def row_norms(self, mask: jax.Array) -> jax.Array:
        """``||row_i(W) restricted to mask||_2``, of the output's shape; differentiable also where
        it is 0.

        Not below it but for rounding: entries whose squares would underflow are `raised`.

        Args:
            mask: boolean, of the input's shape: the inputs that vary.
        """
        squares = jnp.square(raised(self.kernel))
        return safe_sqrt(self.apply(squares, mask.astype(self.kernel.dtype)))


@dataclasses.dataclass(frozen=True)
class Matrix:
    """``(matrix, x) -> W x`` of an explicit matrix, between arrays of these shapes.

    Like the others below hashable and compared by value, so that two views of one layer are one
    static argument to `jit`.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    def __call__(self, kernel: jax.Array, x: jax.Array) -> jax.Array:
        if x.shape != self.input_shape:
            raise ValueError(f"expected an input of shape {self.input_shape}, got {x.shape}.")
        return (kernel @ x.reshape(-1)).reshape(self.output_shape)

    def terms(self, kernel_shape, input_shape, transposed: bool) -> int:
        """Entries of a row, or of a column."""
        return kernel_shape[0 if transposed else 1]


def safe_sqrt(x: jax.Array) -> jax.Array:
    """``sqrt(x)`` for x >= 0 with gradient 0 (not infinity) at 0. A NaN stays a NaN."""
    zero = x == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, x)))


def raised(x: jax.Array) -> jax.Array:
    """``|x|``, entries too small to square raised to the least that is not; 0 stays 0.

    A sum of their squares loses nothing to underflow: up to rounding it is at least the exact one.
    """
    least = float(jnp.finfo(x.dtype).tiny) ** 0.5
    size = jnp.abs(x)
    return jnp.where(size == 0, 0.0, jnp.maximum(size, least)).astype(x.dtype)


def safe_norm(x: jax.Array) -> jax.Array:
    """``||x||_2`` of all entries, with gradient 0 at 0."""
    return safe_sqrt(jnp.sum(jnp.square(x)))


def smaller(a: jax.Array, b: jax.Array) -> jax.Array:
    """``min(a, b)``, NaN where either is NaN. At a tie the gradient is that of `a`.

    To differentiate `jnp.minimum` two numbers an entry are kept, for this one bit: a third of a
    training step's memory.
    """
    return jnp.where((b < a) | jnp.isnan(b), b, a)


def larger(a: jax.Array, b: jax.Array) -> jax.Array:
    """``max(a, b)``, as `smaller`."""
    return jnp.where((b > a) | jnp.isnan(b), b, a)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """``(kernel, x) -> W x`` of a convolution of one example, channels last: what
    `LinearOperator.apply` is for nnx.Conv.

    Bounds that use the structure of a convolution find its geometry here.

    Attributes:
        strides, input_dilation, dilation: one number per spatial axis; `dilation` is the kernel's.
        padding: "SAME", "VALID", "CIRCULAR", or ``(low, high)`` per spatial axis.
        groups: the kernel has the shape ``(*window, channels_in / groups, channels_out)``.
    """

    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self, kernel: jax.Array, x: jax.Array) -> jax.Array:
        return _apply_convolution(
            self.strides, self.padding, self.input_dilation, self.dilation, self.groups, kernel, x
        )

    def terms(self, kernel_shape, input_shape, transposed: bool) -> int:
        """Entries of the kernel in the fullest row of the matrix, or in the fullest column.

        Counted axis by axis: which taps meet which inputs is a product of the axes.
        """
        *window, channels, outputs = kernel_shape
        found = outputs // self.groups if transposed else channels
        for axis, taps in enumerate(window):
            meets = self._meets(axis, taps, input_shape[axis])
            found *= int(np.max(np.sum(meets, axis=(0, 1) if transposed else (1, 2)), initial=0))
        return found

    def _meets(self, axis: int, taps: int, size: int) -> np.ndarray:
        """Along one axis: does this output's tap lie on this input? ``(outputs, taps, inputs)``."""
        stride, apart, step = (
            each[axis] for each in (self.strides, self.input_dilation, self.dilation)
        )
        dilated, extent = (size - 1) * apart + 1, (taps - 1) * step + 1
        if self.padding == "CIRCULAR":
            low, high = (extent - 1) // 2, extent // 2
        elif isinstance(self.padding, str):
            ((low, high),) = jax.lax.padtype_to_pads((dilated,), (extent,), (stride,), self.padding)
        else:
            low, high = self.padding[axis]
        outputs = (dilated + low + high - extent) // stride + 1
        place = stride * np.arange(outputs)[:, None] + step * np.arange(taps) - low
        if self.padding == "CIRCULAR":
            place = place % size
        return place[..., None] == apart * np.arange(size)


def _apply_convolution(strides, padding, input_dilation, dilation, groups, kernel, x):
    rank = len(strides)
    if x.ndim != rank + 1:
        raise ValueError(
            f"expected one example with {rank} spatial axes and channels, got shape {x.shape}."
        )
    if padding == "CIRCULAR":
        extents = [(k - 1) * d + 1 for k, d in zip(kernel.shape, dilation, strict=False)]
        for extent, size in zip(extents, x.shape, strict=False):
            if extent > size:
                raise ValueError(
                    f"circular padding of an axis of {size} with a kernel that spans {extent} puts "
                    "several kernel "
                    "entries on one input: the matrix is not the kernel's. Register it with "
                    "LinearOperator.from_matrix."
                )
        # Each input is copied to at most one place under every kernel position, so the contract
        # holds.
        x = jnp.pad(x, [*(((e - 1) // 2, e // 2) for e in extents), (0, 0)], mode="wrap")
        padding = "VALID"
    if x.dtype == jnp.float64:
        y = _convolve_by_products(strides, padding, input_dilation, dilation, groups, kernel, x)
    else:
        axes = "".join("0123456789"[i] for i in range(rank))
        y = jax.lax.conv_general_dilated(
            x[None],
            kernel,
            strides,
            padding,
            lhs_dilation=input_dilation,
            rhs_dilation=dilation,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
            feature_group_count=groups,
        )[0]
    if y.size == 0:
        raise ValueError(
            f"a kernel of {kernel.shape[:rank]} does not fit an input of shape {x.shape}."
        )
    return y


# Channels below which all taps of a convolution go into one matrix product: it compiles and runs
# faster than many thin ones. Above, that only costs memory.
THIN = 32


def _convolve_by_products(strides, padding, input_dilation, dilation, groups, kernel, x):
    """The same convolution as matrix products: one for all kernel positions, or one for each where
    channels are many.

    XLA's CPU backend has a fast convolution for float32 only; in float64, where certificates are
    computed, its generic loop is an order of magnitude slower than these products. And these are
    inner products on every device, as the error model of `rounding` wants, where a library's
    convolution may choose another algorithm.
    """
    rank = len(strides)
    sizes = [(n - 1) * d + 1 for n, d in zip(x.shape[:rank], input_dilation, strict=True)]
    extents = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:rank], dilation, strict=True)]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(sizes, extents, strides, padding)
    pads = [
        (int(low), int(high), d - 1) for (low, high), d in zip(padding, input_dilation, strict=True)
    ]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [*pads, (0, 0, 0)])
    *window, channels, outputs = kernel.shape
    if x.shape[-1] != channels * groups:
        raise ValueError(f"the kernel takes {channels * groups} channels, got {x.shape[-1]}.")
    counts = [(n - e) // s + 1 for n, e, s in zip(x.shape, extents, strides, strict=False)]
    if min(counts) < 1:
        return jnp.zeros((0,), x.dtype)
    taps = list(itertools.product(*(range(k) for k in window)))
    corners = [[t * d for t, d in zip(tap, dilation, strict=True)] + [0] for tap in taps]
    extent = [(n - 1) * s + 1 for n, s in zip(counts, strides, strict=True)] + [x.shape[-1]]

    def seen(corner):  # by a kernel position
        part = jax.lax.dynamic_slice(x, corner, extent)
        part = jax.lax.slice(part, [0] * (rank + 1), extent, [*strides, 1])
        return part.reshape(*counts, groups, channels)

    def product(part, each):
        if groups == 1:
            return jax.lax.dot_general(part[..., 0, :], each[:, 0], (((rank,), (0,)), ((), ())))
        product = jax.lax.dot_general(part, each, (((rank + 1,), (0,)), ((rank,), (1,))))
        return jnp.moveaxis(product, 0, rank).reshape(*counts, outputs)

    kernels = kernel.reshape(-1, channels, groups, outputs // groups)
    if channels < THIN:
        every = jnp.concatenate([seen(corner) for corner in corners], axis=-1)
        return product(every, kernels.reshape(-1, *kernels.shape[2:]))

    # A loop, and not a sum: XLA would add the products up again in all that reads the sum.
    def add(total, position):
        corner, each = position
        return total + product(seen(list(corner)), each), None

    begin = jnp.zeros((*counts, outputs), x.dtype)
    return jax.lax.scan(add, begin, (jnp.asarray(corners), kernels))[0]


@dataclasses.dataclass(frozen=True)
class Product:
    """``dot_general`` of an example and a kernel.

    Attributes:
        numbers: JAX's dimension numbers, of the operands in their order.
        kernel_first: is the kernel the left operand?
    """

    numbers: tuple
    kernel_first: bool = False

    def __call__(self, kernel: jax.Array, x: jax.Array) -> jax.Array:
        operands = (kernel, x) if self.kernel_first else (x, kernel)
        return jax.lax.dot_general(*operands, self.numbers)

    def one_position(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The example's shape with one entry along each axis that is neither summed over nor of the
        batch."""
        used = {axis for axes in self.numbers for axis in axes[1 if self.kernel_first else 0]}
        return tuple(size if axis in used else 1 for axis, size in enumerate(shape))


@dataclasses.dataclass(frozen=True)
class Scale:
    """``x * kernel``, entry by entry; the kernel is broadcast."""

    def __call__(self, kernel: jax.Array, x: jax.Array) -> jax.Array:
        return x * jnp.broadcast_to(kernel, x.shape)


@dataclasses.dataclass(frozen=True)
class Sum:
    """Sums of entries, over axes or windows, times one number: the kernel.

    Attributes:
        primitive, parameters: of JAX's equation.
    """

    primitive: Any
    parameters: tuple[tuple[str, Any], ...]

    def __call__(self, kernel: jax.Array, x: jax.Array) -> jax.Array:
        return kernel.astype(x.dtype) * self.primitive.bind(x, **dict(self.parameters))


@dataclasses.dataclass(frozen=True)
class Stacked:
    """``W_1 x_1 + W_2 x_2 + ..``, of flattened kernels one behind the other, and of inputs too.

    Attributes:
        parts: of each map `apply`, the shapes of its kernel and of its input.
    """

    parts: tuple[tuple[Callable, tuple[int, ...], tuple[int, ...]], ...]

    def __call__(self, kernel: jax.Array, x: jax.Array) -> jax.Array:
        shapes = zip(*((kernel_shape, shape) for _, kernel_shape, shape in self.parts), strict=True)
        cut = []
        for flat, each in zip((kernel, x), shapes, strict=True):
            ends = list(itertools.accumulate(math.prod(shape) for shape in each))
            pieces = jnp.split(flat, ends[:-1])
            cut.append([piece.reshape(shape) for piece, shape in zip(pieces, each, strict=True)])
        images = [part[0](k, v) for part, k, v in zip(self.parts, *cut, strict=True)]
        return sum(images[1:], images[0])


def stacked(operators: Sequence[LinearOperator], shapes: Sequence[tuple[int, ...]]):
    """``[W_1 W_2 ..]``, on flattened inputs of these shapes one behind the other; no bias."""
    parts = tuple(
        (operator.apply, operator.kernel.shape, tuple(shape))
        for operator, shape in zip(operators, shapes, strict=True)
    )
    kernels = [operator.kernel.reshape(-1) for operator in operators]
    return LinearOperator(Stacked(parts), jnp.concatenate(kernels))


@dataclasses.dataclass(frozen=True)
class Reshaped:
    """Another map, its result in another shape.

    Attributes:
        before, shape: of the result, as `inner` makes it and as it is given.
    """

    inner: Callable[[jax.Array, jax.Array], jax.Array]
    before: tuple[int, ...]
    shape: tuple[int, ...]

    def __call__(self, kernel: jax.Array, x: jax.Array) -> jax.Array:
        return self.inner(kernel, x).reshape(self.shape)
