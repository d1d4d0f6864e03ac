"""Networks of Flax Linen as networks of lipjax."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from lipjax import storage
from lipjax.activations import ReLU
from lipjax.bridges.chain import finished, function_name, type_name
from lipjax.bridges.folding import batch_norm
from lipjax.bridges.program import held


def from_linen(
    sequential, variables: Mapping[str, Any], input_shape: Sequence[int]
) -> nnx.Sequential:
    """The network of a ``flax.linen.Sequential`` of known layers, nested ones included, with these
    variables.

    Known are Conv, Dense, BatchNorm with use_running_average=True, Dropout with deterministic=True,
    the functions nn.relu and jax.nn.relu by identity, and lipjax's own layers, which are callables
    as Linen wants them: use `lipjax.Flatten()` and `lipjax.AveragePool` for what Linen has as
        functions alone.

    Args:
        sequential: on images ``(N, height, width, channels)`` or vectors, pixels in [0, 1].
        variables: as its ``init`` returned them: "params" and, with BatchNorm, "batch_stats".
        input_shape: of one image, ``(height, width, channels)``; or ``(features,)``.

    Raises:
        TypeError: no ``flax.linen.Sequential``, or a layer or function that is not known, by name.
        ValueError: as `from_torch`.
    """
    from flax import linen

    if type(sequential) is not linen.Sequential:
        raise TypeError(f"expected a flax.linen.Sequential, got {type_name(sequential)}.")
    items: list[Any] = []
    _add_linen(linen, sequential.bind(variables), items, "")
    return finished(items, input_shape, lambda images: jax.jit(sequential.apply)(variables, images))


def _add_linen(linen, bound, items: list[Any], prefix: str) -> None:
    known = {kind.type for kind in storage.KINDS.values()} - {nnx.Conv, nnx.Linear}
    for i, module in enumerate(bound.layers):
        kind = type(module)
        where = f"layer {prefix}{i}, {kind.__name__},"
        if kind is linen.Sequential:
            _add_linen(linen, module, items, f"{prefix}{i}.")
        elif kind is linen.Conv:
            _expect_usual(
                where,
                module,
                ("mask", "conv_general_dilated", "conv_general_dilated_cls", "promote_dtype"),
            )
            settings = {name: getattr(module, name) for name in storage.SETTINGS[nnx.Conv]}
            items.append(storage.convolution(*_linen_parameters(module), **settings))
        elif kind is linen.Dense:
            _expect_usual(where, module, ("dot_general", "dot_general_cls", "promote_dtype"))
            settings = {name: getattr(module, name) for name in storage.SETTINGS[nnx.Linear]}
            items.append(storage.dense(*_linen_parameters(module), **settings))
        elif kind is linen.BatchNorm:
            if module.use_running_average is not True or module.axis != -1:
                raise ValueError(
                    f"{where} needs use_running_average=True and axis=-1, as fields of the module."
                )
            mean, variance = (module.variables["batch_stats"][name] for name in ("mean", "var"))
            own = module.variables.get("params", {})
            items.append(
                batch_norm(mean, variance, module.epsilon, own.get("scale"), own.get("bias"), where)
            )
        elif kind is linen.Dropout:
            if module.deterministic is not True:
                raise ValueError(f"{where} needs deterministic=True, as a field of the module.")
        elif module is jax.nn.relu:
            items.append(ReLU())
        elif kind in known:
            items.append(module)
        else:
            raise TypeError(
                f"layer {prefix}{i}, {function_name(module)}, is not known. Known are Sequential, "
                "Conv, Dense, BatchNorm and "
                "Dropout by exact type, nn.relu itself, and lipjax's layers. A lambda says nothing "
                "of what it computes: for "
                "x.reshape(...) put lipjax.Flatten() there, for nn.avg_pool lipjax.AveragePool."
            )


def _linen_parameters(module) -> tuple[np.ndarray, np.ndarray | None]:
    own = module.variables["params"]
    return held(own["kernel"]), held(own["bias"]) if "bias" in own else None


def _expect_usual(where: str, module, fields: Sequence[str]) -> None:
    for name in fields:
        if getattr(module, name) is not getattr(type(module), name):
            raise ValueError(f"{where} has a {name} of its own, so its matrix is not known.")
