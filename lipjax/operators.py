"""The linear view of an affine layer: ``x -> W x``, its transpose, ``|W|`` and the norms of its rows.

Bounds never look into a layer. They ask `linear_operator` for this view, and a layer that nobody registered is a
`TypeError` that names it: never a guess, never a constant 1. Register a layer of your own in a few lines; its matrix
must be linear in one array, the kernel, each entry of the matrix being 0 or one entry of the kernel::

    @lipjax.linear_operator.register(MyLinear)
    def _(layer):
        return lipjax.LinearOperator(lambda kernel, x: kernel @ x, kernel=layer.weight, bias=layer.bias)

For any other linear map, give its explicit matrix: ``LinearOperator.from_matrix(matrix, input_shape, output_shape)``.
Registration is by *exact* type: a subclass may compute something else, so it must be registered itself.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipjax import certificate_files


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kernel", "bias", "kernel_row_norms"], meta_fields=["apply"]
)
@dataclasses.dataclass(frozen=True)
class LinearOperator:
    """One example's affine map ``x -> W x + bias``, with ``W x = apply(kernel, x)``.

    Contract: `apply` is linear in each argument, and every entry of W is zero or exactly one entry of `kernel`. Then
    ``|W| x = apply(|kernel|, x)`` and the squared row norms over a mask are ``apply(kernel**2, mask)``: `absolute` and
    `row_norms` rely on it. A map that breaks it must come in through `from_matrix`.

    Attributes:
        apply: ``(kernel, x) -> W x`` for one example, no bias.
        kernel: the array that the matrix is made of.
        bias: broadcastable to the output, or None.
        kernel_row_norms: norms of the rows as the paper takes them, of the whole kernel also where padding cuts some of
            it off; broadcastable to the output. None: the true row norms.
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

        return cls(_Hashable(functools.partial(_apply_matrix, input_shape, output_shape)), matrix, bias)

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
        """``y -> W^T y`` for inputs like `x`, as JAX derives it from `apply`: right for every stride and padding."""
        transposed = jax.linear_transpose(self, jax.ShapeDtypeStruct(x.shape, x.dtype))
        return lambda y: transposed(y)[0]

    def materialized(self, x: jax.Array | jax.ShapeDtypeStruct) -> "LinearOperator":
        """The same map, for inputs like `x`, by its explicit matrix: quick where that is small."""
        matrix = jax.vmap(lambda column: self(column.reshape(x.shape)).reshape(-1))(jnp.eye(x.size, dtype=x.dtype)).T
        shape = jax.eval_shape(self, jax.ShapeDtypeStruct(x.shape, x.dtype)).shape
        explicit = LinearOperator.from_matrix(matrix, x.shape, shape, self.bias)
        return dataclasses.replace(explicit, kernel_row_norms=self.kernel_row_norms)

    def row_norms(self, mask: jax.Array) -> jax.Array:
        """``||row_i(W) restricted to mask||_2``, of the output's shape; differentiable also where it is 0.

        Not below it but for rounding: entries whose squares would underflow are `raised`.

        Args:
            mask: boolean, of the input's shape: the inputs that vary.
        """
        squares = jnp.square(raised(self.kernel))
        return safe_sqrt(self.apply(squares, mask.astype(self.kernel.dtype)))


def _apply_matrix(input_shape, output_shape, matrix, x):
    if x.shape != input_shape:
        raise ValueError(f"expected an input of shape {input_shape}, got {x.shape}.")
    return (matrix @ x.reshape(-1)).reshape(output_shape)


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

    To differentiate `jnp.minimum` two numbers an entry are kept, for this one bit: a third of a training step's memory.
    """
    return jnp.where((b < a) | jnp.isnan(b), b, a)


def larger(a: jax.Array, b: jax.Array) -> jax.Array:
    """``max(a, b)``, as `smaller`."""
    return jnp.where((b > a) | jnp.isnan(b), b, a)


class Flatten(nnx.Module):
    """Flattens the last `ndim` axes: one example ``(H, W, C) -> (H*W*C,)`` or a batch of them, row-major."""

    def __init__(self, ndim: int = 3):
        self.ndim = ndim

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.ndim < self.ndim:
            raise ValueError(f"Flatten(ndim={self.ndim}) needs at least {self.ndim} axes, got shape {x.shape}.")
        return x.reshape(*x.shape[: x.ndim - self.ndim], math.prod(x.shape[x.ndim - self.ndim :]))


class Residual(nnx.Module):
    """``x + f(x)``, f the given layers in order, which keep the shape. Bounds go through f and through the sum.

    A ball of radius r becomes one of r plus what f makes of it, a box the sum of the boxes, and in modes "linear" and "rows" a
    row goes back through both ways at once. `regions.layers_of` writes it as `FORK`, the layers, `JOIN`.

    Args:
        layers: registered layers, activations or other Residuals; not the last affine layer of a network.

    Raises:
        ValueError: when called, if they change the shape.
    """

    def __init__(self, *layers):
        self.branch = nnx.Sequential(*layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        return joined(x, self.branch(x))


def joined(x: jax.Array, y: jax.Array) -> jax.Array:
    """Their sum.

    Raises:
        ValueError: if they differ in shape.
    """
    if x.shape != y.shape:
        raise ValueError(f"the layers of a Residual must keep the shape: {x.shape} became {y.shape}.")
    return x + y


@jax.tree_util.register_static
class _Mark:
    """A place in a list of layers; a pytree without leaves, as a layer without parameters is."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name


# Where the two ways through a Residual part, and where they are added.
FORK, JOIN = _Mark("FORK"), _Mark("JOIN")


class AveragePool(nnx.Module):
    """Mean over windows of the two axes before the channels; a linear layer of known matrix. No padding.

    Computed in float32 at least, whatever the input's type, and returned in that type: a sum of
    ones that is kept in bfloat16 ends at 256.

    Args:
        window: ``(height, width)`` or one number for both.
        strides: likewise; the window's size by default.
    """

    def __init__(self, window: int | Sequence[int], strides: int | Sequence[int] | None = None):
        self.window = (window, window) if isinstance(window, int) else tuple(window)
        strides = self.window if strides is None else strides
        self.strides = (strides, strides) if isinstance(strides, int) else tuple(strides)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = _widened(x)
        scale = jnp.asarray(1 / math.prod(self.window), wide.dtype)
        return _window_sum(self.window, self.strides, scale, wide).astype(x.dtype)


def _widened(x):
    """x in float32 at least, in which sums are kept.

    Raises:
        TypeError: x is not floating.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"expected a floating input, got {x.dtype}: divide 0..255 integers by 255.")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _window_sum(window, strides, scale, x):
    if x.ndim < 3 or x.shape[-3] < window[0] or x.shape[-2] < window[1]:
        raise ValueError(f"a pooling window of {window} does not fit an input of shape {x.shape}.")
    batch = (1,) * (x.ndim - 3)
    zero = np.zeros((), x.dtype)  # of NumPy: under `jit` a JAX constant hides that this is a sum, which has a transpose
    total = jax.lax.reduce_window(x, zero, jax.lax.add, (*batch, *window, 1), (*batch, *strides, 1), [(0, 0)] * x.ndim)
    return scale.astype(x.dtype) * total


class Normalize(nnx.Module):
    """``(x - mean) / deviation`` per channel, inside the network: epsilon stays a radius on pixels in [0, 1].

    Computed as ``x * scale + shift`` with float32 constants, so that what is certified is what is
    executed; in float32 at least, and returned in the input's type. No parameters: nothing here is
    trained.

    Args:
        mean, deviation: one number per channel, or one for all of them.

    Raises:
        ValueError: numbers that are not finite, deviations that are not positive, lengths that differ.
    """

    def __init__(self, mean: Sequence[float], deviation: Sequence[float]):
        mean, deviation = tuple(mean), tuple(deviation)
        if len(mean) != len(deviation) or not mean:
            raise ValueError(f"mean and deviation need one number per channel each, got {mean} and {deviation}.")
        if not (np.all(np.isfinite(mean)) and np.all(np.isfinite(deviation)) and min(deviation) > 0):
            raise ValueError(f"expected finite means and deviations > 0, got {mean} and {deviation}.")
        self.scale = tuple(float(np.float32(1 / d)) for d in deviation)
        self.shift = tuple(float(np.float32(-m / d)) for m, d in zip(mean, deviation, strict=True))

    @classmethod
    def of(cls, scale: Sequence[float], shift: Sequence[float]) -> "Normalize":
        """``x * scale + shift``, numbers of any sign, rounded to float32: what a BatchNorm is that has stopped learning.

        Raises:
            ValueError: numbers that float32 cannot hold, lengths that differ.
        """
        with np.errstate(over="ignore"):
            rounded = [tuple(float(np.float32(number)) for number in numbers) for numbers in (scale, shift)]
        if len(rounded[0]) != len(rounded[1]) or not rounded[0] or not np.all(np.isfinite(rounded)):
            raise ValueError(f"expected one finite scale and shift per channel, got {scale} and {shift}.")
        layer = cls(mean=(0.0,), deviation=(1.0,))
        layer.scale, layer.shift = rounded
        return layer

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = _widened(x)
        scale, shift = (jnp.asarray(numbers, wide.dtype) for numbers in (self.scale, self.shift))
        return (_scaled(scale, wide) + shift).astype(x.dtype)


def _scaled(scale, x):
    if x.shape[-1] != scale.shape[0] and scale.shape[0] != 1:
        raise ValueError(f"{scale.shape[0]} channels are normalised, got an input of shape {x.shape}.")
    return x * jax.lax.broadcast_in_dim(scale, x.shape, (x.ndim - 1,))


@functools.singledispatch
def linear_operator(layer) -> LinearOperator:
    """The linear view of an affine layer, for one example. Register your own types (see the module's text).

    Raises:
        TypeError: for a type that nobody registered.
        ValueError: for settings of a registered type that have no exact linear view.
    """
    raise TypeError(
        f"no linear view of {type(layer).__name__}: register it with lipjax.linear_operator.register, "
        "or as an activation with lipjax.activations.box_image.register."
    )


def is_affine(layer) -> bool:
    """Is this exact type registered as an affine layer?"""
    return type(layer) in linear_operator.registry and type(layer) is not object


# What the checker does not know, but the linear views and the error model do.
_KNOWN_HERE = ("mask", "preferred_element_type")


def _check_settings(layer) -> None:
    """Raises a ValueError for a layer of Flax that may compute something else than it seems to."""
    unusual = [name for name in certificate_files.unusual(layer) if name not in _KNOWN_HERE]
    if unusual:
        kind = type(layer).__name__
        raise ValueError(
            f"nnx.{kind} has a {', '.join(unusual)} of its own, so what it computes is not known: "
            f"construct it with what nnx.{kind} takes by default, or register a type of your own."
        )


@linear_operator.register(nnx.Linear)
def _(layer: nnx.Linear) -> LinearOperator:
    _check_settings(layer)
    kernel = layer.kernel[...]
    bias = None if layer.bias is None else layer.bias[...]
    return LinearOperator(_apply_dense, kernel, bias)


def _apply_dense(kernel, x):
    # The channel axis is contracted and any other axis kept, as nnx.Linear does.
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


@linear_operator.register(nnx.Conv)
def _(layer: nnx.Conv) -> LinearOperator:
    _check_settings(layer)
    rank = len(layer.kernel_size)
    kernel = layer.kernel[...] if layer.mask is None else layer.kernel[...] * layer.mask
    padding = layer.padding.upper() if isinstance(layer.padding, str) else layer.padding
    dilation = _spread(layer.kernel_dilation, rank)
    if padding == "CAUSAL":
        padding = ((dilation[0] * (layer.kernel_size[0] - 1), 0),)
    elif isinstance(padding, str):
        if padding not in ("SAME", "VALID", "CIRCULAR"):
            raise ValueError(
                f"nnx.Conv with padding={layer.padding!r} puts several kernel entries on one input, so |W| and its row "
                "norms are not those of the kernel: use SAME, VALID, CIRCULAR or numbers, or register the layer with "
                "LinearOperator.from_matrix."
            )
    else:
        pairs = (padding,) * rank if isinstance(padding, int) else tuple(padding)
        padding = tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in pairs)
    apply = Convolution(
        _spread(layer.strides, rank), padding, _spread(layer.input_dilation, rank), dilation, layer.feature_group_count
    )
    bias = None if layer.bias is None else layer.bias[...]
    squares = jnp.square(raised(kernel))
    norms = safe_sqrt(jnp.sum(squares, axis=tuple(range(kernel.ndim - 1))))
    return LinearOperator(apply, kernel, bias, norms)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """``(kernel, x) -> W x`` of a convolution of one example, channels last: what `LinearOperator.apply` is for nnx.Conv.

    Hashable, and compared by value, so that two views of one layer are one static argument to `jit`. Bounds that use
    the structure of a convolution find its geometry here.

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


class _Hashable:
    """A partial that compares by value, so that two views of one layer are one static argument to `jit`."""

    def __init__(self, partial):
        self.partial = partial
        self._key = (partial.func, partial.args)

    def __call__(self, kernel, x):
        return self.partial(kernel, x)

    def __eq__(self, other):
        return isinstance(other, _Hashable) and self._key == other._key

    def __hash__(self):
        return hash(self._key)


def _spread(value, rank: int) -> tuple[int, ...]:
    if value is None:
        return (1,) * rank
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _apply_convolution(strides, padding, input_dilation, dilation, groups, kernel, x):
    rank = len(strides)
    if x.ndim != rank + 1:
        raise ValueError(f"expected one example with {rank} spatial axes and channels, got shape {x.shape}.")
    if padding == "CIRCULAR":
        extents = [(k - 1) * d + 1 for k, d in zip(kernel.shape, dilation, strict=False)]
        for extent, size in zip(extents, x.shape, strict=False):
            if extent > size:
                raise ValueError(
                    f"circular padding of an axis of {size} with a kernel that spans {extent} puts several kernel "
                    "entries on one input: the matrix is not the kernel's. Register it with LinearOperator.from_matrix."
                )
        # Each input is copied to at most one place under every kernel position, so the contract holds.
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
        raise ValueError(f"a kernel of {kernel.shape[:rank]} does not fit an input of shape {x.shape}.")
    return y


# Channels below which all taps of a convolution go into one matrix product: it compiles and runs faster than many thin
# ones. Above, that only costs memory.
THIN = 32


def _convolve_by_products(strides, padding, input_dilation, dilation, groups, kernel, x):
    """The same convolution as matrix products: one for all kernel positions, or one for each where channels are many.

    XLA's CPU backend has a fast convolution for float32 only; in float64, where certificates are computed, its generic
    loop is an order of magnitude slower than these products. And these are inner products on every device, as the error
    model of `rounding` wants, where a library's convolution may choose another algorithm.
    """
    rank = len(strides)
    sizes = [(n - 1) * d + 1 for n, d in zip(x.shape[:rank], input_dilation, strict=True)]
    extents = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:rank], dilation, strict=True)]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(sizes, extents, strides, padding)
    pads = [(int(low), int(high), d - 1) for (low, high), d in zip(padding, input_dilation, strict=True)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [*pads, (0, 0, 0)])
    *window, channels, outputs = kernel.shape
    if x.shape[-1] != channels * groups:
        raise ValueError(f"the kernel takes {channels * groups} channels, got {x.shape[-1]}.")
    counts = [(n - e) // s + 1 for n, e, s in zip(x.shape, extents, strides, strict=False)]
    if min(counts) < 1:
        return jnp.zeros((0,), x.dtype)
    seen = []  # what each kernel position sees, (*counts, groups, channels)
    for tap in itertools.product(*(range(k) for k in window)):
        first = [t * d for t, d in zip(tap, dilation, strict=True)]
        last = [f + (n - 1) * s + 1 for f, n, s in zip(first, counts, strides, strict=True)]
        part = jax.lax.slice(x, [*first, 0], [*last, x.shape[-1]], [*strides, 1])
        seen.append(part.reshape(*counts, groups, channels))
    taps = kernel.reshape(-1, channels, groups, outputs // groups)
    if channels < THIN:
        parts, kernels = [jnp.concatenate(seen, axis=-1)], [taps.reshape(-1, *taps.shape[2:])]
    else:
        parts, kernels = seen, list(taps)
    total = jnp.zeros((*counts, outputs), x.dtype)
    for part, each in zip(parts, kernels, strict=True):
        if groups == 1:
            total += jax.lax.dot_general(part[..., 0, :], each[:, 0], (((rank,), (0,)), ((), ())))
        else:
            product = jax.lax.dot_general(part, each, (((rank + 1,), (0,)), ((rank,), (1,))))
            total += jnp.moveaxis(product, 0, rank).reshape(total.shape)
    return total


@linear_operator.register(Normalize)
def _(layer: Normalize) -> LinearOperator:
    return LinearOperator(_scaled, jnp.asarray(layer.scale), jnp.asarray(layer.shift))


@linear_operator.register(AveragePool)
def _(layer: AveragePool) -> LinearOperator:
    scale = jnp.asarray(1 / math.prod(layer.window))
    return LinearOperator(_Hashable(functools.partial(_window_sum, layer.window, layer.strides)), scale)
