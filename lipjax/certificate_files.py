"""Certificate files: the verdicts of one call of `lipjax.certify` with all that is needed to derive them once more.

`save` writes one npz: a JSON header (what the verdicts are about and rest on, in words and in hashes) and per-example
arrays. `python -m lipjax.check` reads it, the network and the data, and re-derives every verdict with other code.

**What the digest is, and is not.** The header holds a SHA-256 over the rest of the header and all arrays. It finds
damage and careless edits. It is no signature: it needs no key, so whoever edits the file can compute it again. Such an
edit is only found by re-derivation, and only where it matters: a verdict, margin, norm, epsilon or hash that does not
fit the network and the data is found; the recorded seed, failure probability, command or versions, which no
derivation leads back to, are taken on trust. If it matters who wrote a file, sign it with a tool made for that.

This module imports nothing of the bounds, so that the checker can use it and stay independent.
"""

import hashlib
import inspect
import json
import sys
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lipjax.files import replaced

FORMAT = "lipjax certificate"
VERSION = 2
# Header fields that files of an earlier version do not have, and the first one that has them.
SINCE = {"seed_from": 2}
# Where the seed of the draws comes from; in tier "deterministic", which draws nothing, a seed that
# nobody gave is "unused".
SEEDS_FROM = ("system", "given", "unused")

# Arrays of a file, one row an example: the type that is stored and the number of axes.
ARRAYS = {
    "index": (np.int64, 1),
    "label": (np.int32, 1),
    "predicted": (np.int32, 1),
    "correct": (np.bool_, 1),
    "certified": (np.bool_, 1),
    "margin": (np.float64, 1),
    "allowance": (np.float64, 1),
    "lipschitz": (np.float64, 1),
    "norms": (np.float64, 2),
    "epsilon": (np.float64, 1),
}
FIELDS = (
    *("predicted", "correct", "certified", "margin", "allowance", "lipschitz", "norms", "epsilon", "mode", "tier"),
    *("failure_probability", "seed", "seed_from", "arithmetic", "precision"),
)
HEADER = (
    *(
        "format",
        "version",
        "versions",
        "network",
        "classes",
        "data",
        "data_name",
        "split",
        "examples",
        "epsilon",
        "mode",
    ),
    *("tier", "failure_probability", "seed", "seed_from", "arithmetic", "precision", "command", "statement", "digest"),
)

# What an nnx layer is constructed with that `describe` writes down, or that has no influence on what it computes.
_UNDERSTOOD = (
    *("self", "rngs", "in_features", "out_features", "use_bias", "kernel_size", "strides", "padding", "input_dilation"),
    *("kernel_dilation", "feature_group_count", "dtype", "param_dtype", "precision", "kernel_init", "bias_init"),
    *("kernel_metadata", "bias_metadata"),
)


class CertificateFileError(ValueError):
    """The file is no certificate file that this version can read; the message says why."""


# ---------------------------------------------------------------------------------------------------- write and read


def save(
    path,
    certificate,
    network,
    images,
    labels,
    *,
    indices=None,
    data: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> None:
    """Writes a certificate and what it is about to one npz file; a kill leaves the old file or the new, never a part.

    Args:
        path: the file, by custom ``*.npz``.
        certificate: what `lipjax.certify` returned. Read by field name; `epsilon` may be a number or ``(N,)``.
        network: the nnx.Sequential that was certified, as it was given to `certify`.
        images, labels: ``(N, ...)`` and ``(N,)``, as they were given to `certify`; where the predictions themselves
            were certified (labels None there), the predictions.
        indices: ``(N,)`` positions of the images in their source split; 0 .. N - 1 if None.
        data: what the images are: "name" and "split", as strings.
        command: the command line that made the certificate.

    Raises:
        TypeError: `certificate` lacks a field of a certificate (an estimate, for one, is none).
        ValueError: shapes that do not fit each other; a tier that proves nothing; verdicts that contradict the labels.
        OSError: the file cannot be written.
    """
    fields = {name: _field(certificate, name) for name in FIELDS}
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape (N,), got {labels.shape}; for labels None save the predictions.")
    count = len(labels)
    columns = {name: fields[name] for name in ARRAYS if name in fields}
    columns |= {
        "index": np.arange(count) if indices is None else indices,
        "label": labels,
        "epsilon": np.broadcast_to(np.asarray(fields["epsilon"], np.float64), (count,)),
    }
    arrays = {name: _stored(name, columns[name], count) for name in ARRAYS}
    if len(np.asarray(images)) != count:
        raise ValueError(f"{len(np.asarray(images))} images do not fit {count} labels.")
    if not np.array_equal(arrays["correct"], arrays["predicted"] == arrays["label"]):
        raise ValueError("certificate.correct is not predicted == label: pass the labels that certify was given.")
    same = count > 0 and bool(np.all(arrays["epsilon"] == arrays["epsilon"][0]))
    data = dict(data or {})
    layers = describe(network)
    kernels = [layer["kernel"] for layer in layers if "kernel" in layer]
    header = {
        "format": FORMAT,
        "version": VERSION,
        "versions": versions(),
        "network": network_hash(layers),
        "classes": kernels[-1].shape[-1] if kernels else None,
        "data": data_hash(images, labels),
        "data_name": _text(data.pop("name", None)),
        "split": _text(data.pop("split", None)),
        "examples": count,
        "epsilon": float(arrays["epsilon"][0]) if same else None,
        "mode": str(fields["mode"]),
        "tier": str(fields["tier"]),
        "failure_probability": float(fields["failure_probability"]),
        "seed": int(fields["seed"]),
        "seed_from": str(fields["seed_from"]),
        "arithmetic": str(fields["arithmetic"]),
        "precision": str(fields["precision"]),
        "command": _text(command),
    }
    if data:
        raise ValueError(f'data takes "name" and "split", got also {", ".join(map(repr, data))}.')
    header["statement"] = statement(header)
    write(path, header, arrays)


def write(path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a header (its digest is computed here) and arrays as they are; `save` is the way to write a certificate."""
    header = {**header, "digest": digest(header, arrays)}
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    with replaced(path) as file:
        np.savez_compressed(file, header=np.array(text), **arrays)  # type: ignore[arg-type]


def load(path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header and the arrays of a certificate file, of the right types and shapes; nothing is verified yet.

    Raises:
        CertificateFileError: not there, not a certificate file, damaged, or of a newer version.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:  # np.load would leave a damaged one open
            found = np.load(file, allow_pickle=False)
            if not isinstance(found, np.lib.npyio.NpzFile):
                raise CertificateFileError(f"{path} is no npz file: expected what lipjax.certificate_files.save wrote.")
            members = {name: found[name] for name in found.files}
    except FileNotFoundError:
        raise CertificateFileError(f"{path.absolute()} is not there.") from None
    except CertificateFileError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        # NumPy takes what it does not know for a pickle and advises to load it unsafely: nobody should.
        reason = "it is no npz file" if "pickle" in str(error) else str(error)
        raise CertificateFileError(f"{path} is damaged, cut short, or no certificate file: {reason}") from error
    if "header" not in members:
        raise CertificateFileError(f"{path} is no certificate file: it has no header, but {', '.join(members)}.")
    try:
        header = json.loads(str(members.pop("header")))
    except ValueError as error:
        raise CertificateFileError(f"{path}: the header is no JSON: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CertificateFileError(f"{path} is no certificate file: its header does not say format {FORMAT!r}.")
    version = header.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise CertificateFileError(
            f"{path} has format version {version}, this lipjax reads up to {VERSION}: use a newer lipjax."
        )
    known = {name for name in HEADER if SINCE.get(name, 1) <= version}
    _expect(path, "header fields", known, set(header))
    _expect(path, "arrays", set(ARRAYS), set(members))
    if version >= 2 and header["seed_from"] not in SEEDS_FROM:
        raise CertificateFileError(
            f"{path}: seed_from is {header['seed_from']!r}, expected one of {', '.join(SEEDS_FROM)}."
        )
    arrays = {}
    for name, (dtype, axes) in ARRAYS.items():
        array = members[name]
        if array.dtype != np.dtype(dtype) or array.ndim != axes or len(array) != header["examples"]:
            raise CertificateFileError(
                f"{path}: {name} is {array.dtype} of shape {array.shape}, expected {np.dtype(dtype)} with {axes} "
                f"axes and {header['examples']} rows."
            )
        arrays[name] = array
    return header, arrays


def _expect(path, what, wanted, found):
    if wanted != found:
        raise CertificateFileError(
            f"{path}: {what} missing: {sorted(wanted - found) or 'none'}, not known: {sorted(found - wanted) or 'none'}."
        )


def _field(certificate, name):
    try:
        return getattr(certificate, name)
    except AttributeError:
        raise TypeError(
            f"{type(certificate).__name__} has no field {name!r}: expected what lipjax.certify returns (an estimate is no "
            "certificate)."
        ) from None


def _stored(name, value, count):
    dtype, axes = ARRAYS[name]
    array = np.asarray(value)
    if array.ndim != axes or len(array) != count:
        raise ValueError(f"{name} has shape {array.shape}, expected {count} rows and {axes} axes.")
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise ValueError(f"{name} is {array.dtype}, expected {np.dtype(dtype)}.")
    return array.astype(dtype)


def _text(value):
    return None if value is None else str(value)


# ---------------------------------------------------------------------------------------------------- what it says


def statement(header: Mapping[str, Any]) -> str:
    """The file's claim in one sentence, from the header's other fields.

    Raises:
        ValueError: a tier that proves nothing, or a failure probability that does not belong to the
            tier; a seed of which it is not said where it comes from.
    """
    # Files of version 1 do not say it.
    draws = {
        None: "",
        "system": ", from the operating system",
        "given": ", given: network and images are assumed to be chosen independently of it",
    }
    tier, delta = header["tier"], header["failure_probability"]
    origin = header.get("seed_from")
    if tier == "probabilistic" and origin not in draws:
        raise ValueError(
            f'the draws of a probabilistic certificate have a seed from "system" or "given", got {origin!r}.'
        )
    if tier == "probabilistic" and 0 < delta < 1:
        condition = (
            f"with probability >= 1 - {delta!r} over the tool's own draws (seed {header['seed']}{draws[origin]}), all "
            "certificates of this file hold together"
        )
    elif tier == "deterministic" and delta == 0:
        condition = "all certificates of this file hold, without any probability of failure"
    else:
        raise ValueError(
            "a certificate's tier is probabilistic with a failure probability in (0, 1), or deterministic with 0; got "
            f"tier {tier!r} with {delta!r}."
        )
    radius = "its epsilon" if header["epsilon"] is None else f"epsilon = {header['epsilon']!r}"
    return (
        f"{condition}: for each image marked certified, the network, executed in {header['arithmetic']} arithmetic by "
        f"lipjax's error model, gives every image within l2 distance {radius} of it (pixels in [0, 1]) the image's label."
    )


def versions() -> dict[str, str]:
    """Versions of what computed a certificate."""
    import flax
    import jax

    import lipjax

    return {
        "lipjax": lipjax.__version__,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "numpy": np.__version__,
    }


# ---------------------------------------------------------------------------------------------------- hashes


def digest(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 (hex) over the header without its "digest" and all arrays. No signature: see the module's text."""
    sha = hashlib.sha256()
    rest = {name: value for name, value in header.items() if name != "digest"}
    sha.update(json.dumps(rest, sort_keys=True, allow_nan=False).encode())
    for name in sorted(arrays):
        _feed(sha, name, np.asarray(arrays[name]))
    return sha.hexdigest()


def data_hash(images, labels) -> str:
    """SHA-256 (hex) over images as float32 and labels as int32. Images that float32 does not hold count as float64."""
    sha = hashlib.sha256()
    images = np.asarray(images)
    with np.errstate(over="ignore"):
        single = images.astype(np.float32)
    _feed(sha, "images", single if np.array_equal(single, images) else images.astype(np.float64))
    _feed(sha, "labels", np.asarray(labels).astype(np.int32))
    return sha.hexdigest()


def network_hash(layers: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 (hex) over the layer descriptions of `describe`, settings and every parameter's bytes."""
    sha = hashlib.sha256()
    for i, layer in enumerate(layers):
        for name in sorted(layer):
            if isinstance(layer[name], np.ndarray):
                _feed(sha, f"{i}.{name}", layer[name])
            else:
                sha.update(json.dumps([i, name, layer[name]], sort_keys=True).encode())
    return sha.hexdigest()


def _feed(sha, name: str, array: np.ndarray) -> None:
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
        array = array.astype(array.dtype.newbyteorder("<"))
    sha.update(json.dumps([name, array.dtype.name, list(array.shape)]).encode())
    sha.update(np.ascontiguousarray(array).tobytes())


# ---------------------------------------------------------------------------------------------------- the network


def describe(network) -> list[dict[str, Any]]:
    """A network as plain data: one dict per layer, nested sequences spliced in, parameters as NumPy arrays.

    "kind" is "conv", "linear", "average_pool", "normalize", "flatten", "relu", "clipped_relu", "maxmin" or "clipped_maxmin",
    by the layer's exact type; "fork" and "join" stand around the layers of a Residual. The other entries are a layer's
    parameters (kernel, bias, threshold, upper, lower), its settings (strides, padding, dilation, groups, window, ndim), the
    type it computes in ("dtype", None: that of its input and parameters), and under "unusual" what is not written down here
    and may change what it computes. A layer of any other type gets its full type name as kind and all parameters it has:
    enough for a hash, not for the checker.

    Raises:
        TypeError: the network is no nnx.Sequential.
    """
    from flax import nnx

    if type(network) is not nnx.Sequential:
        raise TypeError(f"expected a flax.nnx.Sequential, got {type(network).__module__}.{type(network).__qualname__}.")
    layers: list[dict[str, Any]] = []
    for layer in network.layers:
        if type(layer) is nnx.Sequential:
            layers += describe(layer)
        elif _name(layer) == "lipjax.operators.Residual":
            layers += [{"kind": "fork"}, *describe(layer.branch), {"kind": "join"}]  # type: ignore[attr-defined]
        else:
            layers.append(_describe_layer(layer))
    return layers


def _describe_layer(layer) -> dict[str, Any]:
    from flax import nnx

    if type(layer) is nnx.Conv:
        rank = len(layer.kernel_size)
        return {
            "kind": "conv",
            **_affine_parameters(layer),
            "strides": _spread(layer.strides, rank),
            "padding": _padding(layer.padding, rank),
            "dilation": _spread(layer.kernel_dilation, rank),
            "input_dilation": _spread(layer.input_dilation, rank),
            "groups": int(layer.feature_group_count),
        }
    if type(layer) is nnx.Linear:
        return {"kind": "linear", **_affine_parameters(layer)}
    # By name, so that nothing of the bounds is imported here.
    if hasattr(layer, "__qualname__"):
        return {"kind": f"function {layer.__module__}.{layer.__qualname__}"}
    match name := _name(layer):
        case "lipjax.activations.ReLU":
            return {"kind": "relu"}
        case "lipjax.activations.ClippedReLU":
            return {"kind": "clipped_relu", "threshold": np.asarray(layer.threshold[...])}
        case "lipjax.activations.MaxMin":
            return {"kind": "maxmin"}
        case "lipjax.activations.ClippedMaxMin":
            upper, lower = np.asarray(layer.upper[...]), np.asarray(layer.lower[...])
            return {"kind": "clipped_maxmin", "upper": upper, "lower": lower}
        case "lipjax.operators.Flatten":
            return {"kind": "flatten", "ndim": int(layer.ndim)}
        case "lipjax.operators.AveragePool":
            return {"kind": "average_pool", "window": _spread(layer.window, 2), "strides": _spread(layer.strides, 2)}
        case "lipjax.operators.Normalize":
            return {"kind": "normalize", "scale": list(layer.scale), "shift": list(layer.shift)}
    return {"kind": name, **_all_parameters(layer)}


def _name(layer) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _affine_parameters(layer) -> dict[str, Any]:
    unusual = [
        name
        for name, parameter in inspect.signature(type(layer).__init__).parameters.items()
        if name not in _UNDERSTOOD and getattr(layer, name, parameter.default) is not parameter.default
    ]
    return {
        "kernel": np.asarray(layer.kernel[...]),
        "bias": None if layer.bias is None else np.asarray(layer.bias[...]),
        "dtype": None if layer.dtype is None else np.dtype(layer.dtype).name,
        "unusual": unusual,
    }


def _all_parameters(layer) -> dict[str, Any]:
    import jax

    return {
        "parameter " + jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(layer)
        if isinstance(leaf, (jax.Array, np.ndarray))
    }


def _padding(padding, rank: int) -> str | list[list[int]]:
    if isinstance(padding, str):
        return padding.upper()
    pairs = [padding] * rank if isinstance(padding, int) else padding
    return [[int(p), int(p)] if isinstance(p, int) else [int(p[0]), int(p[1])] for p in pairs]


def _spread(value, rank: int) -> list[int]:
    if value is None:
        return [1] * rank
    return [int(value)] * rank if isinstance(value, int) else [int(v) for v in value]
