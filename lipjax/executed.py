"""What a network does as executed, as JAX traces it: a check of what is taken for granted.

A layer's dtype and parameters do not say in which type it computes: one without parameters computes
in that of its input, and any layer may convert what it is given. So each layer is traced on one
image of the type that the network will be given, and every operation that can round is looked at:
what the error model of `rounding` does not cover is refused. So is what would make a layer another
function than the one that is certified: a class whose ``__call__`` was replaced, parameters that
change when they are read, parameters that the executed type cannot hold.
"""

import collections
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipjax import activations, operators, rounding
from lipjax.lowering import jaxprs_in

# Types that the error model knows.
KNOWN = ("float64", "float32", "bfloat16")
_CONVERT = "convert_element_type"
# What an affine layer may do a few times in a type narrower than float32.
_SINGLE = ("dot_general", "conv_general_dilated", "add", "mul")

# Primitives that round nothing, whatever their type; conversions and sums are looked at one by one.
_EXACT = frozenset(
    (
        *("abs", "and", "argmax", "argmin", "broadcast_in_dim", "clamp", "concatenate", "copy"),
        *("dynamic_slice", "dynamic_update_slice", "eq", "expand_dims", "gather", "ge", "gt"),
        *("iota", "is_finite", "le", "lt", "max", "min", "ne", "neg", "not", "or"),
        *(
            "optimization_barrier",
            "pad",
            "reduce_max",
            "reduce_min",
            "reshape",
            "rev",
            "select_n",
            "sign",
            "slice",
            "sort",
        ),
        *("split", "squeeze", "stop_gradient", "transpose"),
    )
)

# Layers whose execution is known, and the operations in it that round, each at most once; the first
# is always there.
_ROUND: dict[type, tuple[str, ...]] = {
    nnx.Linear: ("dot_general", "add"),
    nnx.Conv: ("conv_general_dilated", "add", "mul"),
    operators.AveragePool: ("reduce_window_sum", "mul"),
    operators.Normalize: ("mul", "add"),
    operators.Flatten: (),
    activations.ReLU: (),
    activations.ClippedReLU: (),
    activations.MaxMin: (),
    activations.ClippedMaxMin: (),
}
# What their classes executed when this module was imported.
_CONTAINERS = (nnx.Sequential, operators.Residual)
_CALLS: dict[type, Any] = {kind: kind.__call__ for kind in (*_ROUND, *_CONTAINERS)}
# What reads a parameter.
_NAMES = ("__getitem__", "get_value", "__jax_array__")
_READS = {name: getattr(nnx.Variable, name) for name in _NAMES}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One that can round.

    Attributes:
        name: of JAX's primitive.
        dtype: of its result.
        accumulates: more than one rounding of that type may be in one number of the result.
    """

    name: str
    dtype: str
    accumulates: bool


@dataclasses.dataclass(frozen=True)
class Traced:
    """What was traced of one layer.

    Attributes:
        operations: those that can round.
        precisions: of its products, as JAX has them.
        output: its shape and type.
    """

    operations: tuple[Operation, ...]
    precisions: frozenset
    output: jax.ShapeDtypeStruct

    @property
    def types(self) -> set:
        """In which it rounds."""
        return {operation.dtype for operation in self.operations}


def arithmetics_of(
    network: nnx.Module, layers: Sequence, declared: str | None, shape: Sequence[int], dtype
) -> tuple[rounding.Arithmetic, ...]:
    """The arithmetic of each affine layer, in order, every layer checked as the module's text says.

    Args:
        network: with its parameters as they will be executed.
        layers: of it, as `regions.layers_of` returns them.
        declared: a name in `rounding.ARITHMETICS`, or None: as this process executes it.
        shape, dtype: of one image. Where an arithmetic is declared, images are of type float64 for
            float64 and float32 otherwise.

    Raises:
        ValueError: what the error model does not cover, by layer.
    """
    _check_reads(network)
    if declared is None:
        traced = trace(layers, shape, jax.dtypes.canonicalize_dtype(dtype))
    else:  # as another process would execute it, whatever is set here
        wide = declared == "float64"
        with jax.enable_x64(wide), jax.default_matmul_precision(None):
            traced = trace(layers, shape, np.dtype("float64" if wide else "float32"))
    found = rounding.arithmetics_of(layers, declared, traced)
    _check(layers, found, traced)
    return found


def trace(layers: Sequence, shape: Sequence[int], dtype) -> list[Traced]:
    """What each layer does to one image of this shape and type; nothing is computed.

    Raises:
        ValueError: a layer that cannot be executed on one example, by name.
    """
    x, forks, found = jax.ShapeDtypeStruct(tuple(shape), dtype), [], []
    for i, layer in enumerate(layers):
        if layer is operators.FORK:
            forks.append(x)
            found.append(Traced((), frozenset(), x))
            continue
        inputs = (forks.pop(), x) if layer is operators.JOIN else (x,)
        closed, x = _traced(layer, f"layer {i}, {_name(layer)},", inputs)
        seen = list(_equations(closed.jaxpr, False))
        operations = [found for equation in seen for found in _operations(*equation)]
        precisions = {e.params["precision"] for e, _ in seen if "precision" in e.params}
        found.append(Traced(tuple(operations), frozenset(precisions), x))
    return found


def _traced(layer, where: str, inputs):
    """The jaxpr of a layer and the shape and type of its output."""
    function = operators.joined if layer is operators.JOIN else layer
    try:
        with warnings.catch_warnings():  # float64 that becomes float32 is looked at elsewhere
            warnings.simplefilter("ignore")
            # In a function of its own: of one that it has seen JAX returns what it traced then.
            closed, out = jax.make_jaxpr(lambda *x: function(*x), return_shape=True)(*inputs)
    except Exception as error:
        raise ValueError(
            f"{where} cannot be executed on one example of shape {inputs[-1].shape} and type "
            f"{inputs[-1].dtype}: {error}"
        ) from error
    if not isinstance(out, jax.ShapeDtypeStruct) or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(f"{where} must return one floating array, got {out}.")
    return closed, out


def _equations(jaxpr, loop: bool):
    """All equations, those of called functions too, and whether they are repeated."""
    for equation in jaxpr.eqns:
        inner = list(jaxprs_in(tuple(equation.params.values())))
        again = loop or equation.primitive.name in ("scan", "while")
        if not inner or _is_sum(equation.primitive.name):
            yield equation, loop
        else:
            for part in inner:
                yield from _equations(part, again)


def _is_sum(name: str) -> bool:
    return name.startswith(("reduce", "cum", "scatter", "select_and")) and name not in _EXACT


def _operations(equation, loop: bool):
    name = equation.primitive.name
    if name in _EXACT:
        return
    before = [getattr(variable.aval, "dtype", None) for variable in equation.invars]
    after = [getattr(variable.aval, "dtype", None) for variable in equation.outvars]
    if name == _CONVERT and _holds(after[0], before[0]):
        return
    for dtype in after:
        if any(d is not None and jnp.issubdtype(d, jnp.inexact) for d in (dtype, *before)):
            shown = name if name == "reduce_precision" else str(dtype)
            yield Operation(name, shown, loop or _is_sum(name))


def _holds(wide, narrow) -> bool:
    """Is every number of the second type one of the first?"""
    floats = jnp.issubdtype(wide, jnp.floating) and jnp.issubdtype(narrow, jnp.floating)
    return floats and jnp.promote_types(wide, narrow) == wide


def _check(layers, arithmetics, traced) -> None:
    """Raises a ValueError for what the error model takes for granted and these layers do not do."""
    k, least = 0, rounding.least_precise(arithmetics)
    for i, (layer, found) in enumerate(zip(layers, traced, strict=True)):
        where = f"layer {i}, {_name(layer)},"
        names = collections.Counter(o.name for o in found.operations if o.name != _CONVERT)
        _check_kind(where, layer, names)
        # Operations in a type that keeps fewer digits than float32.
        coarse = [o for o in found.operations if o.dtype not in ("float64", "float32")]
        dtype = str(found.output.dtype)
        if operators.is_affine(layer):
            arithmetic, k = arithmetics[k], k + 1
            # (1 + u_out)^3 of the model: the products' result, a bias, and one more.
            single = [o.name for o in coarse if o.name != _CONVERT]
            sums = any(o.accumulates for o in coarse)
            if len(single) > 3 or not set(single) <= set(_SINGLE) or sums:
                raise ValueError(
                    f"{where} executes {', '.join(single)} in {coarse[0].dtype}, whose rounding is "
                    "not in the error model: compute it in float32."
                )
            _check_parameters(where, layer, arithmetic)
        elif layer is operators.JOIN:
            if dtype not in KNOWN or rounding.coarsest((least, dtype)) != least:
                raise ValueError(
                    f"{where} the sum of a Residual, is computed in {dtype}, which rounds more "
                    f"than {least}: give images of type {least}, or declare arithmetic={dtype!r}."
                )
        elif layer is not operators.FORK:
            converts = any(o.name == _CONVERT for o in found.operations)
            if coarse or converts or dtype not in KNOWN:
                types = ", ".join(sorted({dtype} | found.types))
                raise ValueError(
                    f"{where} rounds to {types}, and what that does to its outputs is not in the "
                    "error model: return a type that holds the input's numbers."
                )


def _check_kind(where: str, layer, names: collections.Counter) -> None:
    kind = type(layer)
    if kind in _CALLS and kind.__call__ is not _CALLS[kind]:
        raise ValueError(
            f"{where} has another __call__ than its class was imported with: register a type of "
            "your own, or restore it."
        )
    expected = _ROUND.get(kind)
    if expected is None:
        return
    once = all(count == 1 for count in names.values())
    if not (set(expected[:1]) <= set(names) <= set(expected) and once):
        raise ValueError(
            f"{where} executes {', '.join(names) or 'nothing'} that rounds, expected "
            f"{', '.join(expected) or 'nothing'}: what it computes is not what its type says."
        )


def _check_parameters(where: str, layer, arithmetic: rounding.Arithmetic) -> None:
    """What is certified is the function of the parameters as executed: they must be the same."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(layer):
        if arithmetic.name == "float64" or leaf.dtype != np.float64:
            continue
        if not _are_single(leaf):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"{where} has a {name} of float64 numbers that {arithmetic.name} arithmetic "
                "rounds: give the network float32 parameters, or execute and certify it where JAX "
                "has 64 bits (jax_enable_x64)."
            )
    if type(layer) is operators.Normalize and not _are_single((layer.scale, layer.shift)):
        raise ValueError(
            f"{where} has constants that are no float32 numbers: make it by its constructor or "
            "Normalize.of, which round them."
        )
    mask = getattr(layer, "mask", None) if type(layer) is nnx.Conv else None
    if mask is not None and not np.all(np.isin(np.asarray(mask), (0, 1))):
        raise ValueError(
            f"{where} has a mask with other numbers than 0 and 1, and its product with the kernel "
            "is rounded: multiply the kernel with it once."
        )


def _are_single(numbers) -> bool:
    numbers = np.asarray(numbers, np.float64)
    with np.errstate(over="ignore"):
        return np.array_equal(numbers.astype(np.float32), numbers)


def _check_reads(network) -> None:
    """Raises a ValueError for parameters that change when read, and for replaced containers."""
    for path, node in nnx.iter_graph(network):
        kind = type(node)
        if kind in _CONTAINERS and kind.__call__ is not _CALLS[kind]:
            raise ValueError(f"{kind.__name__} has another __call__ than it was imported with.")
        if not isinstance(node, nnx.Variable):
            continue
        replaced = any(getattr(kind, name) is not method for name, method in _READS.items())
        if replaced or node.get_metadata().get("on_get_value"):
            raise ValueError(
                f"parameter {'.'.join(map(str, path))}, {kind.__name__}, changes when it is read: "
                "write down the numbers that are executed as an nnx.Param."
            )


def _name(layer) -> str:
    mark = layer is operators.FORK or layer is operators.JOIN
    return repr(layer) if mark else type(layer).__name__
