"""Networks in files: ``save(f, file)`` and ``load(file)``.

An nnx.Sequential of the layers in `KINDS` is stored by its layers: `load` builds it anew, to be
trained on, and its arrays have the names of Flax (``layers.0.kernel``), so any tool that reads
safetensors can use them. Any other function is stored by its graph, with the weights that it has
now: `load` gives a function that computes the same equations. The files are described in
`lipjax.formats.network_files`. Nothing in a file is executed, and only known layers and nodes are
built.

Parameters that are computed anew at every call, as those of `lipjax.orthogonal`, are not stored:
they may differ in their last bits wherever they run. `lipjax.orthogonal.plain` writes the kernels
down; that network is the one to store and to certify.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipjax import bounds
from lipjax.activations import ClippedMaxMin, ClippedReLU, MaxMin, ReLU
from lipjax.activations.maxmin import clipped_maxmin as clipped_maxmin_of
from lipjax.activations.maxmin import maxmin
from lipjax.formats import certificate_files, network_files
from lipjax.formats.network_files import StorageError
from lipjax.graph import trace
from lipjax.graph.description import described
from lipjax.graph.program import KNOWN, Program
from lipjax.layers import AveragePool, Flatten, Normalize, Residual

# What parameters can be: the types that the error model of `rounding` knows.
DTYPES = ("float32", "float64", "bfloat16")
# What building a network from a description that fits none may raise.
_NO_NETWORK = (
    *(TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
    MemoryError,
)


# ----------------------------------------------------------------------------------- write and read


def save(
    f: Callable,
    path,
    *,
    input_shape: Sequence[int] | None = None,
    example=None,
    notes: Mapping[str, Any] | None = None,
    narrow: bool = False,
) -> None:
    """Writes a network or a function to one safetensors file; a kill leaves the old file or the
    new, never a part.

    Args:
        f: an nnx.Sequential of the layers in `KINDS`, nested sequences and Residuals included, that
            ends in logits; or any other function that `lipjax.trace` takes, with one axis of
            results.
        path: the file, by custom ``*.safetensors``.
        input_shape: of one image, ``(height, width, channels)``, or of what else f takes, float32.
        example: in its place one example, or its shape and type.
        notes: what JSON can hold, e.g. how the network was trained; `description` returns it.
        narrow: of an nnx.Sequential alone, round float32 parameters to float16, which halves the
            file. `load` widens them: it returns another network than this one, which computes in
            float32. Certify that one.

    Raises:
        TypeError: neither shape nor example; an operation without a bound or a plain description;
            parameters that are computed anew at every call; notes that JSON cannot hold.
        ValueError: settings that are not stored; parameters that are not finite or of another type
            than `DTYPES`; an input that f does not take; `narrow` of another function, or of
            parameters that are too large for float16.
        OSError: the file cannot be written.
    """
    if example is None:
        if input_shape is None:
            raise TypeError("save needs the shape of one input, input_shape=, or an example=.")
        example = jax.ShapeDtypeStruct(_positive(input_shape), jnp.float32)
    shape = tuple(example.shape)
    arrays: dict[str, np.ndarray]
    if type(f) is nnx.Sequential and _are_known(f):
        parts, arrays = layers_of(f)
        _check_shape(f, shape)
        version = 1
    else:
        if narrow:
            raise ValueError(
                "narrow=True is for an nnx.Sequential of lipjax's layers; this function is stored "
                "by its graph, whose constants belong to it bit for bit."
            )
        parts, arrays = network_files.split(_nodes(f, example))
        version = 2
    for name, array in arrays.items():
        if problem := _problem(name, array):
            raise ValueError(f"{name} {problem}.")
    if narrow:
        arrays = {name: _narrowed(name, array) for name, array in arrays.items()}
    network_files.write(path, parts, arrays, version=version, input_shape=shape, notes=notes)


def load(path) -> nnx.Sequential | Program:
    """What `save` wrote.

    Returns:
        A network that was stored by its layers: the same layers with the same settings, every
        parameter bit for bit, or, if stored narrow, as rounded. Any other function: one that takes
        an example, or a batch on the first axis, and whose graph is the stored one.

    Raises:
        StorageError: not there, no such file, damaged, of a newer version, with layers, nodes or
            settings that this version does not know, or with float64 parameters where JAX has no 64
            bits.
    """
    path = Path(path)
    header, arrays = network_files.read(path)
    if header["version"] == 1:  # no parameter is float16 but for those that were stored narrow
        arrays = {
            name: array.astype(np.float32) if array.dtype == np.float16 else array
            for name, array in arrays.items()
        }
    wide = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    for name, array in arrays.items():
        if problem := _problem(name, array):
            raise StorageError(f"{path}: {name} {problem}.")
        if array.dtype == np.float64 and not wide:
            raise StorageError(
                f"{path}: {name} is float64, which needs jax.config.update('jax_enable_x64', "
                "True), or JAX_ENABLE_X64=1."
            )
    left = dict(arrays)
    try:
        if header["version"] == 2:
            program = _program(network_files.joined(header["nodes"], arrays))
            if program.input_shape != tuple(header["input_shape"]):
                raise ValueError(f"it takes inputs of shape {program.input_shape}.")
            return program
        network = _built(header["layers"], "layers", left)
        _check_shape(network, _positive(header["input_shape"]))
    except _NO_NETWORK as error:
        raise StorageError(
            f"{path}: no network can be built from the description: {error}"
        ) from error
    if left:
        raise StorageError(f"{path}: no layer takes {', '.join(sorted(left))}.")
    return network


def description(path) -> dict[str, Any]:
    """What a file says of its network, without reading arrays: "input_shape", "notes", "layers" (or
    "nodes") and the "versions" it was written with. `load` verifies it.

    Raises:
        StorageError: not there, no file that `save` wrote, its head damaged, or of a newer version.
    """
    header, _ = network_files.read(path, arrays=False)
    found = {k: v for k, v in header.items() if k not in ("format", "version", "digest")}
    return {**found, "input_shape": tuple(found["input_shape"])}


def _narrowed(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype != np.float32:
        return array
    largest = np.max(np.abs(array), initial=0.0)
    if largest > np.finfo(np.float16).max:
        raise ValueError(f"{name} has an entry of size {largest:g}, too large for narrow=True.")
    return array.astype(np.float16)


def _positive(input_shape) -> tuple[int, ...]:
    shape = tuple(input_shape)
    if not shape or not all(isinstance(n, (int, np.integer)) and n > 0 for n in shape):
        raise ValueError(
            "input_shape must be positive numbers, (height, width, channels) for images, got "
            f"{input_shape}."
        )
    return tuple(int(n) for n in shape)


def _check_shape(network, shape: tuple[int, ...]) -> None:
    """Does the network make one axis of logits from it?"""
    try:
        bounds.graph_of(network, jax.ShapeDtypeStruct(shape, jnp.float32))
        logits = jax.eval_shape(lambda x: network(x), jax.ShapeDtypeStruct(shape, jnp.float32))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"an input of shape {shape} does not go through the network: {error}"
        ) from error
    if logits.ndim != 1:
        raise ValueError(
            f"the logits must have one axis, got shape {logits.shape}: a lipjax.Flatten is missing."
        )


def _problem(name: str, array: np.ndarray) -> str | None:
    """What keeps it from being a stored parameter, or stored positions."""
    if name.startswith("nodes.") and name.endswith(".index") and array.dtype == np.int64:
        return None
    if array.dtype.name not in DTYPES:
        return f"is {array.dtype.name}, expected one of {', '.join(DTYPES)}"
    if not np.all(np.isfinite(array.astype(np.float64))):
        return "has NaN or infinite entries"
    return None


# ---------------------------------------------------------------------------------------- functions


def _clip(x, node):
    if node["bottom"] is not None:
        x = jnp.maximum(x, node["bottom"])
    return x if node["top"] is None else jnp.minimum(x, node["top"])


def _maxmin(x, node):
    if node["top"] is None and node["bottom"] is None:
        return maxmin(x)
    return clipped_maxmin_of(x, node["top"], node["bottom"])


ACTIVATIONS: dict[str, Callable] = {"clip": _clip, "maxmin": _maxmin}


def _nodes(f: Callable, example) -> list[dict[str, Any]]:
    """The graph of what `load` will give: f with its weights written down.

    Some of what f does may be written otherwise in it, such as a division as a product.
    """
    graph = trace(f, example)
    for node in graph.nodes:
        if math.isinf(getattr(node, "roundings", 0.0)):
            raise TypeError(
                f"{node.where}: parameters that are computed anew at every call may differ from "
                "those that are stored: save lipjax.orthogonal.plain(network), the one to certify "
                "and to run, or compute them outside of the function."
            )
    written = described(graph.with_head())
    for kind in (part["kind"] for part in written):
        if kind not in KNOWN and kind not in ACTIVATIONS:
            known = ", ".join((*KNOWN, *ACTIVATIONS))
            raise TypeError(f"a node of kind {kind!r} is not stored; known are {known}.")
    found = _retraced(written)
    _program(found)
    return found


def _retraced(nodes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    like = jax.ShapeDtypeStruct(tuple(nodes[0]["shape"]), jnp.dtype(nodes[0]["dtype"]))
    return described(trace(Program(nodes, ACTIVATIONS), like, batched=False).with_head())


def _program(nodes: Sequence[Mapping[str, Any]]) -> Program:
    """The function of a description, once it is known that JAX traces it to that one."""
    again = _retraced(nodes)
    if certificate_files.network_hash(again) != certificate_files.network_hash(nodes):
        raise ValueError("the nodes are not those that this version of JAX traces of them.")
    return Program(nodes, ACTIVATIONS)


# ------------------------------------------------------------------------------------------- layers


def convolution(kernel, bias, **settings) -> nnx.Conv:
    """An nnx.Conv with these parameters, arrays as Flax has them; bias may be None. `settings` as
    nnx.Conv takes them."""
    groups = settings.get("feature_group_count", 1)
    *window, inputs, outputs = kernel.shape
    size = {"in_features": inputs * groups, "out_features": outputs, "kernel_size": tuple(window)}
    return nnx.Conv(**size, **_given(kernel, bias), **settings)


def dense(kernel, bias, **settings) -> nnx.Linear:
    """The same for nnx.Linear."""
    inputs, outputs = kernel.shape
    return nnx.Linear(inputs, outputs, **_given(kernel, bias), **settings)


def _given(kernel, bias) -> dict[str, Any]:
    """Arguments with which a Flax layer starts from these arrays."""
    if bias is not None and bias.shape != kernel.shape[-1:]:
        raise ValueError(
            f"a bias of shape {bias.shape} does not fit a kernel of shape {kernel.shape}."
        )
    return {
        "use_bias": bias is not None,
        "param_dtype": getattr(jnp, kernel.dtype.name),
        "kernel_init": lambda key, shape, dtype: jnp.asarray(kernel),
        "bias_init": lambda key, shape, dtype: jnp.asarray(bias),
        "rngs": nnx.Rngs(0),
    }


def clipped_relu(threshold) -> ClippedReLU:
    """A ClippedReLU with these thresholds."""
    layer = ClippedReLU(())
    layer.threshold = nnx.Param(jnp.asarray(threshold))
    return layer


def clipped_maxmin(upper, lower) -> ClippedMaxMin:
    """A ClippedMaxMin with these thresholds.

    Raises:
        ValueError: they differ in shape.
    """
    if upper.shape != lower.shape:
        raise ValueError(
            f"the upper and lower thresholds of a MaxMin differ in shape: {upper.shape}, "
            f"{lower.shape}."
        )
    layer = ClippedMaxMin(2)
    layer.upper, layer.lower = nnx.Param(jnp.asarray(upper)), nnx.Param(jnp.asarray(lower))
    return layer


class Kind(NamedTuple):
    """How a type of layer is stored: its settings as JSON values, its arrays by name, and how it is
    built from both."""

    type: type
    settings: Callable[[Any], dict[str, Any]]
    arrays: Callable[[Any], dict[str, Any]]
    build: Callable[..., Any]


# What an affine layer's constructor takes beside its sizes and parameters, by its own names.
SETTINGS: dict[type, tuple[str, ...]] = {
    nnx.Linear: ("dtype", "precision"),
    nnx.Conv: (
        "strides",
        "padding",
        "input_dilation",
        "kernel_dilation",
        "feature_group_count",
        "dtype",
        "precision",
    ),
}


# Arguments and attributes of an affine layer that are stored, or that `unusual` compares with the
# parameters, and those that have no influence on what it computes.
_UNDERSTOOD = (
    *("self", "rngs", "in_features", "out_features", "use_bias", "kernel_size", "strides"),
    *("padding", "input_dilation", "kernel_dilation", "feature_group_count", "dtype"),
    *("param_dtype", "precision", "kernel_init", "bias_init", "kernel_metadata", "bias_metadata"),
    *("kernel", "bias", "kernel_shape", "_pytree__state", "_pytree__nodes"),
)
_ABSENT = object()


def unusual(layer: nnx.Linear | nnx.Conv) -> list[str]:
    """What may make it compute something else than its parameters and `SETTINGS` say.

    Returns:
        Names of attributes: those that nothing here knows (of a later Flax, or set by hand), those
        known ones that are not as the constructor sets them by default, and those that contradict
        the parameters.
    """
    arguments = inspect.signature(type(layer).__init__).parameters
    defaults = {name: argument.default for name, argument in arguments.items()}
    found = [
        name
        for name in dict.fromkeys((*defaults, *vars(layer)))
        if name not in _UNDERSTOOD and getattr(layer, name, None) is not defaults.get(name, _ABSENT)
    ]
    # Flax's Conv looks at use_bias alone, its Linear at both.
    if layer.use_bias not in (True, False) or layer.use_bias != (layer.bias is not None):
        found.append("use_bias")
    kernel = layer.kernel[...]
    window = tuple(kernel.shape[:-2])
    if getattr(layer, "kernel_size", window) != window:
        found.append("kernel_size")
    if getattr(layer, "kernel_shape", kernel.shape) != tuple(kernel.shape):
        found.append("kernel_shape")
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        found.append("kernel")
    return found


def _nothing(layer) -> dict[str, Any]:
    return {}


def _settings(*names: str) -> Callable[[Any], dict[str, Any]]:
    return lambda layer: {name: _plain(name, getattr(layer, name)) for name in names}


def _arrays(*names: str) -> Callable[[Any], dict[str, Any]]:
    return lambda layer: {
        name: getattr(layer, name)[...] for name in names if getattr(layer, name) is not None
    }


def _plain(name: str, value):
    """A setting as JSON has it; a type and a precision by name."""
    if name == "dtype" and value is not None:
        return _known_dtype(np.dtype(value).name)
    if name == "precision" and isinstance(value, jax.lax.Precision):
        return value.name
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(name, entry) for entry in value]
    raise ValueError(f"{name} = {value!r} is a setting that is not stored.")


def _known_dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"a layer computes in {name}; known are {', '.join(DTYPES)}.")
    return name


def _settled(name: str, value):
    """A setting as a layer takes it."""
    if name == "precision" and isinstance(value, str) and value in jax.lax.Precision.__members__:
        return jax.lax.Precision[value]
    if name == "dtype" and value is not None:
        return getattr(jnp, _known_dtype(value))
    return tuple(_settled(name, entry) for entry in value) if isinstance(value, list) else value


def _affine(make):
    return lambda kernel, bias=None, **settings: make(kernel, bias, **settings)


# Names that a description may use; each stands for this exact type and no subclass.
KINDS = {
    "Conv": Kind(
        nnx.Conv, _settings(*SETTINGS[nnx.Conv]), _arrays("kernel", "bias"), _affine(convolution)
    ),
    "Linear": Kind(
        nnx.Linear, _settings(*SETTINGS[nnx.Linear]), _arrays("kernel", "bias"), _affine(dense)
    ),
    "AveragePool": Kind(AveragePool, _settings("window", "strides"), _nothing, AveragePool),
    "Normalize": Kind(Normalize, _settings("scale", "shift"), _nothing, Normalize.of),
    "Flatten": Kind(Flatten, _settings("ndim"), _nothing, Flatten),
    "ReLU": Kind(ReLU, _nothing, _nothing, ReLU),
    "ClippedReLU": Kind(ClippedReLU, _nothing, _arrays("threshold"), clipped_relu),
    "MaxMin": Kind(MaxMin, _nothing, _nothing, MaxMin),
    "ClippedMaxMin": Kind(ClippedMaxMin, _nothing, _arrays("upper", "lower"), clipped_maxmin),
}
_NAMES = {kind.type: name for name, kind in KINDS.items()}


def _are_known(network: nnx.Sequential) -> bool:
    """Are all its layers in `KINDS`, by exact type?"""
    layers = [layer.branch if type(layer) is Residual else layer for layer in network.layers]
    return all(
        _are_known(layer) if type(layer) is nnx.Sequential else type(layer) in _NAMES
        for layer in layers
    )


def layers_of(network: nnx.Sequential) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The layers of an nnx.Sequential with their settings as JSON values, and their arrays by the
    names of Flax: what a file holds of a network.

    Raises:
        TypeError, ValueError: as `save`.
    """
    if type(network) is not nnx.Sequential:
        kind = f"{type(network).__module__}.{type(network).__qualname__}"
        raise TypeError(
            f"expected a flax.nnx.Sequential, got {kind}: of others there is no description."
        )
    arrays: dict[str, np.ndarray] = {}
    return _described(network, "layers", arrays), arrays


def _described(network, prefix: str, arrays: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """`layers_of`, recursively; arrays go into `arrays`."""
    layers: list[dict[str, Any]] = []
    for i, layer in enumerate(network.layers):
        where = f"{prefix}.{i}"
        if type(layer) is nnx.Sequential:
            layers.append(
                {"type": "Sequential", "layers": _described(layer, f"{where}.layers", arrays)}
            )
            continue
        if type(layer) is Residual:
            layers.append(
                {
                    "type": "Residual",
                    "layers": _described(layer.branch, f"{where}.branch.layers", arrays),
                }
            )
            continue
        if type(layer) not in _NAMES:
            # a function by its own name
            kind = layer if hasattr(layer, "__qualname__") else type(layer)
            raise TypeError(
                f"{where}, {kind.__module__}.{kind.__qualname__}, is not stored: known are "
                f"{', '.join(KINDS)}, "
                "Sequential and Residual, by exact type."
            )
        if type(layer) in SETTINGS and (strange := unusual(layer)):
            raise ValueError(
                f"{where}, {type(layer).__name__}, has a {', '.join(strange)} of its own, which is "
                "not stored."
            )
        kind = KINDS[_NAMES[type(layer)]]
        for name, value in kind.arrays(layer).items():
            arrays[f"{where}.{name}"] = np.asarray(value)
        layers.append({"type": _NAMES[type(layer)], **kind.settings(layer)})
    return layers


def _built(
    layers: Sequence[Mapping[str, Any]], prefix: str, arrays: dict[str, np.ndarray]
) -> nnx.Sequential:
    """The inverse of `_described`; takes what it uses out of `arrays`."""
    found: list[Any] = []
    for i, layer in enumerate(layers):
        where = f"{prefix}.{i}"
        settings = {
            name: _settled(name, value)
            for name, value in layer.items()
            if name not in ("type", "layers")
        }
        match layer["type"]:
            case "Sequential":
                found.append(_built(layer["layers"], f"{where}.layers", arrays))
            case "Residual":
                found.append(
                    Residual(*_built(layer["layers"], f"{where}.branch.layers", arrays).layers)
                )
            case name if name in KINDS:
                own = {
                    key.removeprefix(where + "."): arrays.pop(key)
                    for key in list(arrays)
                    if key.rpartition(".")[0] == where
                }
                try:
                    found.append(KINDS[name].build(**own, **settings))
                except TypeError as error:
                    raise TypeError(f"{where}, {name}: {error}") from error
            case name:
                raise ValueError(
                    f"{where} is a {name!r}; known are {', '.join(KINDS)}, Sequential and Residual."
                )
    return nnx.Sequential(*found)
