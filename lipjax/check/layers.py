"""The checker's layers: a graph whose affine layers are explicit sparse matrices, written from
their plain description.

Part of `lipjax.check`; shares nothing with the bounds that it checks. What it does not know it
refuses, and never guesses.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse  # type: ignore[import-untyped]

from lipjax.check.norms import up


class CannotCheck(ValueError):
    """The checker does not know something that it would have to know; the message says what."""


@dataclasses.dataclass(frozen=True)
class Executed:
    """How a step computes, where its own description says it.

    Attributes:
        types: of all that goes in, comes out, or is kept between.
        product: is it a product of matrices? On some devices its operands are converted first, and
            its sums are kept in a wider type; all else computes in its own type.
        results: how often a result is rounded to its type; 0: the step is exact.
    """

    types: frozenset[str]
    product: bool
    results: float


@dataclasses.dataclass(frozen=True)
class Affine:
    """``x -> W x + b`` on flattened arrays.

    Attributes:
        matrix, absolute, squared: W, |W| and its entries' squares, sparse, ``(outputs, inputs)``.
        bias: ``(outputs,)``.
        terms: the largest number of entries in a row, which is that of the roundings of products in
            an output.
        row_norms: ``(outputs,)``, upper bounds of the norms of the rows.
        largest: ``max |W|``.
        executed: None: in the network's arithmetic, as a layer with a bias.
        parts: what is executed, one behind the other, where that is several maps; W and b are then
            of all together. Empty: the map as it stands.
    """

    matrix: Any
    absolute: Any
    squared: Any
    bias: np.ndarray
    terms: int
    row_norms: np.ndarray
    largest: float
    executed: Executed | None = None
    parts: tuple["Affine", ...] = ()


class Nonlinear:
    """An activation: `Activation`, or one of the kinds of `lipjax.check.kinds`, each with its own
    rules.

    Attributes:
        lipschitz: constant in l2, everywhere.
    """

    lipschitz = 1.0

    def activated(self, known) -> Any:
        """What is known behind it (but for the radius), and which inputs can move an output."""
        raise NotImplementedError(f"{type(self).__name__} does not say what is known behind it.")

    def pieces(self, known, moving: float) -> list:
        """How it is relaxed (`lipjax.check.slopes.pieces`)."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is relaxed.")

    def growth(self, known) -> float:
        """Lipschitz constant where the input is what is known of it."""
        return self.lipschitz

    def rise(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """How much the value changes; rounded only as much as it and its parts are long."""
        return self(end) - self(start)  # type: ignore[operator]

    def off(self, value: np.ndarray) -> np.ndarray:
        """How far a value, computed at the center, can be from the exact one."""
        return np.zeros(value.shape)


@dataclasses.dataclass(frozen=True)
class Activation(Nonlinear):
    """An activation on flattened arrays of `shape`: clipping, or "maxmin" on the two halves of the
    last axis.

    Attributes:
        pairs: is it maxmin?
        top: values above it are cut to it; of all, or of the first of each pair. May be infinite.
        bottom: values below it are cut to it, before; of all (0 makes a ReLU), or of the second of
            each pair. May be infinite.
    """

    pairs: bool
    shape: tuple[int, ...]
    top: np.ndarray
    bottom: np.ndarray

    def halves(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z = z.reshape(self.shape)
        half = self.shape[-1] // 2
        return z[..., :half], z[..., half:]

    def joined(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.concatenate([first, second], axis=-1).reshape(-1)

    def __call__(self, z: np.ndarray) -> np.ndarray:
        if not self.pairs:
            return np.minimum(np.maximum(z.reshape(self.shape), self.bottom), self.top).reshape(-1)
        a, b = self.halves(z)
        return self.joined(
            np.minimum(np.maximum(a, b), self.top), np.maximum(np.minimum(a, b), self.bottom)
        )


@dataclasses.dataclass(frozen=True)
class Add:
    """The sum of one or two arrays, or of one and a constant.

    Attributes:
        signs: 1 or -1, one an array.
        constant: flattened, or None.
        roundings: units of roundoff that the constant may be off by when the program runs.
        executed: None: one rounding in the network's arithmetic.
    """

    signs: tuple[int, ...] = (1, 1)
    constant: np.ndarray | None = None
    roundings: float = 0.0
    executed: Executed | None = None


@dataclasses.dataclass(frozen=True)
class Move:
    """Entries of one or more arrays in other places, some several times, some not at all; exact.

    Attributes:
        index: ``(outputs,)``, positions in the arrays one behind the other; -1: a constant.
        fill: ``(outputs,)``, the constants; 0 elsewhere.
        sizes: of the arrays.
    """

    index: np.ndarray
    fill: np.ndarray
    sizes: tuple[int, ...]

    def __call__(self, *arrays: np.ndarray, filled: bool = True) -> np.ndarray:
        """The entries in their places; without `filled`, 0 (or False) in place of the constants."""
        joined = np.concatenate([*arrays, np.zeros(1, arrays[0].dtype)])
        moved = joined[self.index]
        return np.where(self.index < 0, self.fill, moved) if filled else moved

    def rows(self, matrix):
        """The rows of a sparse matrix in their places, zeros for the constants."""
        return (self._back.T @ matrix).tocsr()

    @functools.cached_property
    def copies(self) -> int:
        """In how many places the most frequent entry stands."""
        counts = np.bincount(self.index[self.index >= 0], minlength=1)
        return int(np.max(counts))

    @functools.cached_property
    def _back(self):
        places = np.flatnonzero(self.index >= 0)
        entries = (np.ones(len(places)), (self.index[places], places))
        return scipy.sparse.csr_array(entries, shape=(sum(self.sizes), len(self.index)))

    def back(self, rows: np.ndarray) -> list[np.ndarray]:
        """``(n, outputs)`` rows on the value as rows on each array: up to `copies` add up."""
        found = (self._back @ rows.T).T
        return np.split(found, np.cumsum(self.sizes)[:-1], axis=1)


@dataclasses.dataclass(frozen=True)
class Node:
    """A step of the network and the values that it takes.

    Attributes:
        inputs: numbers of values: 0 is the image, k > 0 what the k-th node makes. Each is below the
            node's own number.
    """

    step: Affine | Nonlinear | Add | Move
    inputs: tuple[int, ...]


def nodes_of(layers: Sequence[Mapping[str, Any]], shape: tuple[int, ...]) -> list[Node]:
    """The network as a graph on flattened arrays, for one example of this shape; the last node
    makes the logits.

    Args:
        layers: its nodes, as `describe` writes them, which say what they read (`check.nodes`); or
            its layers, of which files of versions 1 and 2 are. The layers between a "fork" and its
            "join" are a branch: the join adds what they make to what stood at the fork.
        shape: of one example.

    Raises:
        CannotCheck: a layer, a setting or a shape that this checker does not know.
    """
    if by_nodes(layers):
        from lipjax.check import nodes as check_nodes  # it is written in the terms of this module

        return check_nodes.read(layers, shape)
    nodes: list[Node] = []
    # the values that wait for their branch's end, and their shapes
    forks: list[tuple[int, tuple[int, ...]]] = []
    at = 0  # the value that the next layer takes

    def then(step, *others: int) -> None:
        nonlocal at
        nodes.append(Node(step, (*others, at)))
        at = len(nodes)

    for i, layer in enumerate(layers):
        name = f"layer {i}, {layer['kind']},"
        if layer.get("unusual"):
            raise CannotCheck(
                f"{name} has settings unknown to this checker: {', '.join(layer['unusual'])}."
            )
        if layer.get("dtype") not in (None, "bfloat16", "float32", "float64"):
            raise CannotCheck(
                f"{name} computes in {layer['dtype']}: expected bfloat16, float32 or float64."
            )
        for what in ("kernel", "bias", "threshold", "upper", "lower"):
            value = layer.get(what)
            if value is not None and value.dtype.name not in ("bfloat16", "float32", "float64"):
                raise CannotCheck(
                    f"{name} has a {what} of type {value.dtype}: expected bfloat16, float32 or "
                    "float64."
                )
            if value is not None and not np.all(np.isfinite(value.astype(np.float64))):
                raise CannotCheck(
                    f"{name} has a {what} with NaN or infinity: nothing can be derived from it."
                )
        match layer["kind"]:
            case "conv":
                matrix, shape = _convolution(name, layer, shape)
                then(_affine(matrix, layer["bias"], shape))
            case "linear":
                matrix, shape = _dense(name, layer, shape)
                then(_affine(matrix, layer["bias"], shape))
            case "average_pool":
                matrix, shape = _pool(name, layer, shape)
                then(_affine(matrix, None, shape, more=1))  # the rounding of 1 / (window's size)
            case "normalize":
                scale, shift = (np.asarray(layer[name], np.float64) for name in ("scale", "shift"))
                if (
                    scale.ndim != 1
                    or scale.shape != shift.shape
                    or (shape and len(scale) not in (1, shape[-1]))
                ):
                    raise CannotCheck(
                        f"{name} of {len(scale)} channels cannot take an input of shape {shape}."
                    )
                entries = np.broadcast_to(scale, shape).reshape(-1)
                then(_affine(scipy.sparse.diags_array(entries), shift, shape))
            case "flatten":
                kept = len(shape) - layer["ndim"]
                if kept < 0:
                    raise CannotCheck(
                        f"{name} flattens {layer['ndim']} axes of an input of shape {shape}."
                    )
                shape = (*shape[:kept], math.prod(shape[kept:]))
            case "fork":
                forks.append((at, shape))
            case "join":
                if not forks:
                    raise CannotCheck(f"{name} has no fork in front of it.")
                past, before = forks.pop()
                if before != shape:
                    raise CannotCheck(
                        f"{name} adds arrays of shapes {before} and {shape}: they must be the same."
                    )
                then(Add(), past)
            case "relu":
                then(Activation(False, shape, np.array(np.inf), np.array(0.0)))
            case "clipped_relu":
                top = _fitting(name, layer["threshold"], shape)
                then(Activation(False, shape, top, np.array(0.0)))
            case "maxmin" | "clipped_maxmin":
                if not shape or shape[-1] % 2:
                    raise CannotCheck(
                        f"{name} needs an even number of channels, got an input of shape {shape}."
                    )
                half = (*shape[:-1], shape[-1] // 2)
                if layer["kind"] == "maxmin":
                    top, bottom = np.array(np.inf), np.array(-np.inf)
                else:
                    top, bottom = (
                        _fitting(name, layer["upper"], half),
                        _fitting(name, layer["lower"], half),
                    )
                then(Activation(True, shape, top, bottom))
            case _:
                raise CannotCheck(
                    f"{name} is not known to this checker, so nothing can be derived of it."
                )
    if forks:
        raise CannotCheck("a branch of the network has no join at its end.")
    if not nodes or not isinstance(nodes[-1].step, Affine) or len(shape) != 1:
        raise CannotCheck("the network does not end in an affine layer with one axis of logits.")
    return nodes


def of_stored(
    stored: Sequence[Mapping[str, Any]],
    arrays: Mapping[str, np.ndarray],
    prefix: str = "layers",
) -> list[dict[str, Any]]:
    """Layers as network files hold them, as certificate files of versions 1 and 2 described them:
    their hashes are over this. One dict a layer, those of nested sequences in their place; "fork"
    and "join" stand around the layers of a Residual.

    Args:
        stored, arrays: as `lipjax.storage.layers_of` returns them.
    """
    found: list[dict[str, Any]] = []
    for i, layer in enumerate(stored):
        where, settings = f"{prefix}.{i}", dict(layer)
        kind = settings.pop("type")
        own: dict[str, Any] = {
            name: arrays[f"{where}.{name}"]
            for name in ("kernel", "bias", "threshold", "upper", "lower")
            if f"{where}.{name}" in arrays
        }
        if kind == "Sequential":
            found += of_stored(layer["layers"], arrays, f"{where}.layers")
            continue
        if kind == "Residual":
            branch = of_stored(layer["layers"], arrays, f"{where}.branch.layers")
            found += [{"kind": "fork"}, *branch, {"kind": "join"}]
            continue
        if kind in ("Linear", "Conv"):
            own = {"bias": None, **own, "dtype": settings["dtype"], "unusual": []}
            # JAX's own levels are left to the device.
            algorithm = settings["precision"]
            if algorithm not in (None, "DEFAULT", "HIGH", "HIGHEST"):
                own["precision"] = algorithm
            settings = _conv_settings(settings, own["kernel"].ndim - 2) if kind == "Conv" else {}
        found.append({"kind": STORED[kind], **own, **settings})
    return found


# Names of the layers in network files, and here.
STORED = {
    **{"Conv": "conv", "Linear": "linear", "AveragePool": "average_pool"},
    **{"Normalize": "normalize", "Flatten": "flatten", "ReLU": "relu", "MaxMin": "maxmin"},
    **{"ClippedReLU": "clipped_relu", "ClippedMaxMin": "clipped_maxmin"},
}


def _conv_settings(settings: Mapping[str, Any], rank: int) -> dict[str, Any]:
    def spread(value) -> list[int]:
        value = 1 if value is None else value
        return [value] * rank if isinstance(value, int) else list(value)

    padding = settings["padding"]
    if isinstance(padding, str):
        padding = padding.upper()
    else:
        pairs = [padding] * rank if isinstance(padding, int) else padding
        padding = [[p, p] if isinstance(p, int) else list(p) for p in pairs]
    return {
        "padding": padding,
        "strides": spread(settings["strides"]),
        "dilation": spread(settings["kernel_dilation"]),
        "input_dilation": spread(settings["input_dilation"]),
        "groups": settings["feature_group_count"],
    }


def by_nodes(layers: Sequence[Mapping[str, Any]]) -> bool:
    """Is it a description by nodes? Every dict of such a one says what it reads."""
    return any("inputs" in layer for layer in layers)


def _affine(matrix, bias, shape, more: int = 0, executed: Executed | None = None) -> Affine:
    matrix = scipy.sparse.csr_array(matrix)
    # also for the executed network: adding a zero, of the kernel or of padding, rounds nothing
    matrix.eliminate_zeros()
    terms = int(np.max(np.diff(matrix.indptr), initial=0)) + more

    def like(values):  # the index arrays, which are most of the memory, are shared
        return scipy.sparse.csr_array((values, matrix.indices, matrix.indptr), shape=matrix.shape)

    squared = like(np.square(matrix.data))
    bias = np.zeros(shape) if bias is None else np.broadcast_to(bias.astype(np.float64), shape)
    # A square may underflow; its root is below 2^-500.
    norms = up(np.sqrt(up(squared.sum(axis=1), terms))) + terms * 2.0**-500
    sizes = np.abs(matrix.data)
    largest = float(np.max(sizes, initial=0.0))
    return Affine(matrix, like(sizes), squared, bias.reshape(-1), terms, norms, largest, executed)


def _fitting(name, threshold, shape) -> np.ndarray:
    if shape[len(shape) - threshold.ndim :] != threshold.shape or threshold.ndim > len(shape):
        raise CannotCheck(
            f"{name} has thresholds of shape {threshold.shape}, which do not fit an input of "
            f"{shape}."
        )
    return threshold.astype(np.float64)


def _dense(name, layer, shape):
    """The last axis is contracted; any axes before it are kept."""
    kernel = layer["kernel"].astype(np.float64)
    if kernel.ndim != 2 or not shape or shape[-1] != kernel.shape[0]:
        raise CannotCheck(
            f"{name} with a kernel of shape {kernel.shape} cannot take an input of shape {shape}."
        )
    copies = scipy.sparse.eye_array(math.prod(shape[:-1]))
    return scipy.sparse.kron(copies, kernel.T, format="csr"), (*shape[:-1], kernel.shape[1])


def _convolution(name, layer, shape):
    kernel = layer["kernel"].astype(np.float64)
    rank, groups, padding = kernel.ndim - 2, layer["groups"], layer["padding"]
    if isinstance(padding, str) and padding not in ("SAME", "VALID"):
        raise CannotCheck(
            f"{name} has padding {padding!r}; this checker knows numbers, SAME and VALID."
        )
    if (
        len(shape) != rank + 1
        or shape[-1] != kernel.shape[-2] * groups
        or kernel.shape[-1] % groups
    ):
        raise CannotCheck(
            f"{name} with a kernel of shape {kernel.shape} and {groups} groups cannot take an "
            f"input of shape {shape}."
        )
    places = []  # per axis: outputs, and for each of its taps the input that each output reads
    for axis in range(rank):
        stride, dilation = layer["strides"][axis], layer["dilation"][axis]
        apart = layer["input_dilation"][axis]  # of a transposed convolution: zeros in between
        size = (shape[axis] - 1) * apart + 1
        extent = (kernel.shape[axis] - 1) * dilation + 1
        if padding == "SAME":
            low = max((-(-size // stride) - 1) * stride + extent - size, 0) // 2
            count = -(-size // stride)
        else:
            low, high = (0, 0) if padding == "VALID" else padding[axis]
            count = (size + low + high - extent) // stride + 1
        if count < 1:
            raise CannotCheck(
                f"{name}: a kernel of {kernel.shape[:rank]} does not fit an input of shape {shape}."
            )
        taps = range(kernel.shape[axis])
        reads = [np.arange(count) * stride - low + tap * dilation for tap in taps]
        places.append([np.where(at % apart == 0, at // apart, -1) for at in reads])
    return _gather(kernel, places, shape, groups)


def _gather(kernel, places, shape, groups: int):
    """The matrix whose row (place, channel) has ``kernel[tap, i, channel]`` at the input that the
    tap reads there."""
    rank = len(places)
    counts = tuple(len(places[axis][0]) for axis in range(rank))
    inputs, outputs = kernel.shape[-2], kernel.shape[-1] // groups  # channels of one group
    rows, columns, values = [], [], []
    for tap in itertools.product(*(range(len(axis)) for axis in places)):
        seen = np.meshgrid(*(places[axis][tap[axis]] for axis in range(rank)), indexing="ij")
        inside = np.logical_and.reduce(
            [(s >= 0) & (s < n) for s, n in zip(seen, shape, strict=False)]
        )
        if not inside.any():
            continue
        to = np.flatnonzero(inside)
        source = np.ravel_multi_index([s[inside] for s in seen], shape[:rank])
        for group in range(groups):
            block = kernel[tap][:, group * outputs : (group + 1) * outputs]
            row = (
                to[:, None, None] * kernel.shape[-1]
                + group * outputs
                + np.arange(outputs)[None, None, :]
            )
            column = (
                source[:, None, None] * shape[-1]
                + group * inputs
                + np.arange(inputs)[None, :, None]
            )
            row, column, value = np.broadcast_arrays(row, column, block[None])
            rows.append(row.ravel())
            columns.append(column.ravel())
            values.append(value.ravel())
    size = (math.prod(counts) * kernel.shape[-1], math.prod(shape))
    numbers = np.int32 if max(size) < 2**31 else np.int64
    value, row, column = (np.concatenate([[], *part]) for part in (values, rows, columns))
    matrix = scipy.sparse.coo_array(
        (value, (row.astype(numbers), column.astype(numbers))), shape=size
    )
    return matrix.tocsr(), (*counts, kernel.shape[-1])


def _pool(name, layer, shape):
    window, strides = layer["window"], layer["strides"]
    if len(shape) != 3 or shape[0] < window[0] or shape[1] < window[1]:
        raise CannotCheck(
            f"{name} with a window of {window} cannot take an input of shape {shape}."
        )
    places = [
        [np.arange((n - w) // s + 1) * s + tap for tap in range(w)]
        for n, w, s in zip(shape[:2], window, strides, strict=True)
    ]
    kernel = np.full((*window, 1, shape[-1]), 1 / math.prod(window))
    return _gather(kernel, places, shape, groups=shape[-1])
