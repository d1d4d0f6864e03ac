"""Networks in files: plain named arrays in one safetensors file, with a description from which
`load` builds the network.

The arrays are those of Flax (``layers.0.kernel``, ``layers.1.threshold``), so any tool that reads
safetensors can use them. The file's metadata holds, under "lipjax", a JSON text: format and
version, the layers with their settings, the shape of an image, the caller's notes, and a SHA-256
over all of it, which finds damage (it is no signature: it needs no key). Nothing in a file is
    executed, and only the layers listed in `KINDS` are built.

Layers of `lipjax.orthogonal` are not stored: their kernels are computed anew wherever they run, and
may differ there in their last bits. `lipjax.orthogonal.plain` writes the kernels down; that network
is the one to store and to certify.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipjax import bounds, orthogonal
from lipjax.activations import ClippedMaxMin, ClippedReLU, MaxMin, ReLU
from lipjax.formats import certificate_files
from lipjax.formats.files import Unreadable, parsed, quoted, replaced
from lipjax.layers import AveragePool, Flatten, Normalize, Residual

FORMAT = "lipjax network"
VERSION = 1
FIELDS = ("format", "version", "versions", "input_shape", "notes", "layers", "digest")
# Bytes of the list of arrays in front of them, the description with it, that are read.
HEAD_BYTES = 2**24
# What parameters can be: the types that the error model of `rounding` knows.
DTYPES = ("float32", "float64", "bfloat16")


class StorageError(ValueError):
    """The file is no network that this version can read; the message says why."""


# ----------------------------------------------------------------------------------- write and read


def save(
    network: nnx.Sequential,
    path,
    *,
    input_shape: Sequence[int],
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes a network to one safetensors file; a kill leaves the old file or the new, never a
    part.

    Args:
        network: an nnx.Sequential of the layers in `KINDS`, nested sequences and Residuals
            included, that ends in logits.
        path: the file, by custom ``*.safetensors``.
        input_shape: of one image, ``(height, width, channels)``, or of what else the first layer
            takes.
        notes: what JSON can hold, e.g. how the network was trained; `description` returns it.

    Raises:
        TypeError: a layer that is not in `KINDS`, by its exact type; notes that JSON cannot hold.
        ValueError: settings that are not stored; parameters that are not finite or of another type
            than `DTYPES`; layers that do not fit the input shape.
        OSError: the file cannot be written.
    """
    import safetensors.numpy

    layers, arrays = layers_of(network)
    shape = _checked_shape(network, input_shape)
    try:
        kept = json.loads(json.dumps(dict(notes or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"notes must be a dict of what JSON can hold, numbers finite: {error}"
        ) from error
    header: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "versions": certificate_files.versions(),
    }
    header |= {"input_shape": shape, "notes": kept, "layers": layers}
    header["digest"] = certificate_files.digest(header, arrays)
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    with replaced(path) as file:
        file.write(safetensors.numpy.save(arrays, metadata={"lipjax": text}))


def load(path) -> nnx.Sequential:
    """The network of a file that `save` wrote: the same layers with the same settings, every
    parameter bit for bit.

    Raises:
        StorageError: not there, no such file, damaged, of a newer version, with layers or settings
            that this version does not know, or with float64 parameters where JAX has no 64 bits.
    """
    path = Path(path)
    header, arrays = _read(path, arrays=True)
    if header["digest"] != certificate_files.digest(header, arrays):
        raise StorageError(
            f"{path} is damaged: its contents do not fit the digest that it was written with."
        )
    for name, array in arrays.items():
        problem = _problem(array)
        if problem:
            raise StorageError(f"{path}: {name} {problem}.")
        if array.dtype == np.float64 and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            raise StorageError(
                f"{path}: {name} is float64, which needs jax.config.update('jax_enable_x64', "
                "True), or JAX_ENABLE_X64=1."
            )
    left = dict(arrays)
    try:
        network = _built(header["layers"], "layers", left)
        _checked_shape(network, header["input_shape"])
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise StorageError(
            f"{path}: no network can be built from the description: {error}"
        ) from error
    if left:
        raise StorageError(f"{path}: no layer takes {', '.join(sorted(left))}.")
    return network


def description(path) -> dict[str, Any]:
    """What a file says of its network, without reading arrays: "input_shape", "notes", "layers" and
    the "versions" it was written with. `load` verifies it.

    Raises:
        StorageError: not there, no file that `save` wrote, its head damaged, or of a newer version.
    """
    header, _ = _read(Path(path), arrays=False)
    found = {name: header[name] for name in ("input_shape", "notes", "layers", "versions")}
    return {**found, "input_shape": tuple(found["input_shape"])}


def _read(path: Path, arrays: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    import safetensors

    if not path.is_file():
        raise StorageError(f"{path.absolute()} is not there, or no file.")
    try:
        with open(path, "rb") as start:
            length = int.from_bytes(start.read(8), "little")
        if length > HEAD_BYTES:
            raise StorageError(
                f"{path} is damaged, cut short, or no safetensors file: a list of arrays of "
                f"{length} bytes, expected at most "
                f"{HEAD_BYTES}."
            )
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            names = list(file.keys()) if arrays else []
            found = {name: np.asarray(file.get_tensor(name)) for name in names}
    except (OSError, safetensors.SafetensorError) as error:
        raise StorageError(
            f"{path} is damaged, cut short, or no safetensors file: {error}"
        ) from error
    if "lipjax" not in metadata:
        raise StorageError(
            f"{path} is a safetensors file of something else: lipjax.storage.save did not write "
            "it, so which layers its "
            "arrays belong to is not known. Build the network and set its parameters, or see "
            "lipjax.bridges."
        )
    try:
        header = parsed(metadata["lipjax"], HEAD_BYTES)
    except Unreadable as error:
        raise StorageError(f"{path}: the description is no JSON that is read: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise StorageError(f"{path}: the description does not say format {FORMAT!r}.")
    version = header.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise StorageError(
            f"{path} has format version {quoted(version)}, this lipjax reads up to {VERSION}: use "
            "a newer lipjax."
        )
    if set(header) != set(FIELDS):
        raise StorageError(
            f"{path}: expected the fields {', '.join(FIELDS)}, got "
            f"{', '.join(map(quoted, sorted(header)[:20]))}."
        )
    shape = header["input_shape"]
    if not (
        isinstance(shape, list)
        and all(type(n) is int and n > 0 for n in shape)
        and isinstance(header["layers"], list)
        and isinstance(header["notes"], dict)
    ):
        raise StorageError(
            f"{path}: input_shape (of positive numbers) and layers must be lists and notes a dict."
        )
    return header, found


def _checked_shape(network, input_shape) -> list[int]:
    """The shape as a list, if the network makes one axis of logits from it."""
    shape = list(input_shape)
    if not shape or not all(isinstance(n, (int, np.integer)) and n > 0 for n in shape):
        raise ValueError(
            "input_shape must be positive numbers, (height, width, channels) for images, got "
            f"{input_shape}."
        )
    try:
        bounds.graph_of(network, jax.ShapeDtypeStruct(tuple(shape), jnp.float32))
        logits = jax.eval_shape(
            lambda x: network(x), jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"an input of shape {tuple(shape)} does not go through the network: {error}"
        ) from error
    if logits.ndim != 1:
        raise ValueError(
            f"the logits must have one axis, got shape {logits.shape}: a lipjax.Flatten is missing."
        )
    return [int(n) for n in shape]


def _problem(array: np.ndarray) -> str | None:
    """What keeps it from being a stored parameter."""
    if array.dtype.name not in DTYPES:
        return f"is {array.dtype.name}, expected one of {', '.join(DTYPES)}"
    if not np.all(np.isfinite(array.astype(np.float64))):
        return "has NaN or infinite entries"
    return None


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
    """A ClippedMaxMin with these thresholds."""
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
        if type(layer) in orthogonal.KINDS:
            raise TypeError(
                f"{where}, {type(layer).__name__}, computes its kernel anew at every call: save "
                "lipjax.orthogonal.plain(network), the one to certify and to run."
            )
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
            array = np.asarray(value)
            if problem := _problem(array):
                raise ValueError(f"{where}.{name} {problem}.")
            arrays[f"{where}.{name}"] = array
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
