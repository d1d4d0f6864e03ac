"""Networks of Equinox as networks of lipjax."""

import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipjax.bridges.chain import Chain, channels_first, finished, function_name, type_name
from lipjax.bridges.folding import PerChannel, batch_norm
from lipjax.bridges.program import held


def from_equinox(sequential, input_shape: Sequence[int], state=None) -> nnx.Sequential:
    """The network of an ``equinox.nn.Sequential`` of known layers, nested ones included.

    Known are Conv2d (padding mode ZEROS), Linear, AvgPool2d without padding, BatchNorm, Dropout and
    Identity; and Lambda of jax.nn.relu and of jnp.ravel, by identity.

    Args:
        sequential: on one image ``(channels, height, width)`` or vector, pixels in [0, 1], in
            inference mode (``equinox.nn.inference_mode``).
        input_shape: of one image as lipjax takes it, ``(height, width, channels)``; or
            ``(features,)``.
        state: the ``equinox.nn.State`` that BatchNorm keeps its statistics in; None: there is no
            BatchNorm.

    Raises:
        TypeError: no ``equinox.nn.Sequential``, or a layer or function that is not known, by name.
        ValueError: as `from_torch`; BatchNorm without a state.
    """
    equinox = sys.modules.get("equinox")
    if equinox is None or type(sequential) is not equinox.nn.Sequential:
        raise TypeError(f"expected an equinox.nn.Sequential, got {type_name(sequential)}.")
    chain = Chain(input_shape)
    _add_equinox(equinox.nn, sequential, state, chain, "")

    def reference(images):
        more = {} if state is None else {"state": state}
        logits = jax.jit(jax.vmap(lambda x: sequential(x, **more)))(channels_first(images))
        return logits if state is None else logits[0]

    return finished(chain.items, input_shape, reference)


def _add_equinox(nn, sequential, state, chain: "Chain", prefix: str) -> None:
    for i, module in enumerate(sequential.layers):
        kind = type(module)
        where = f"layer {prefix}{i}, {kind.__name__},"
        if kind is nn.Sequential:
            _add_equinox(nn, module, state, chain, f"{prefix}{i}.")
        elif kind is nn.Conv2d:
            if module.padding_mode != "ZEROS":
                raise ValueError(
                    f"{where} has padding mode {module.padding_mode!r}, expected 'ZEROS'."
                )
            bias = None if module.bias is None else held(module.bias).reshape(-1)
            settings = {
                "strides": module.stride,
                "padding": module.padding,
                "kernel_dilation": module.dilation,
            }
            chain.conv(
                where, held(module.weight), bias, feature_group_count=module.groups, **settings
            )
        elif kind is nn.Linear:
            bias = None if module.bias is None else held(module.bias).reshape(-1)
            chain.dense(where, held(module.weight), bias)
        elif kind is nn.BatchNorm:
            chain.per_channel(where, _equinox_batch_norm(module, state, where))
        elif kind is nn.AvgPool2d:
            if any(p != (0, 0) for p in module.padding) or module.use_ceil:
                raise ValueError(f"{where} needs padding 0 and use_ceil False.")
            chain.pool(where, module.kernel_size, module.stride)
        elif kind is nn.Dropout and not module.inference:
            raise ValueError(
                f"{where} is in training mode: use equinox.nn.inference_mode(network)."
            )
        elif kind in (nn.Dropout, nn.Identity):
            pass
        elif kind is nn.Lambda and module.fn is jax.nn.relu:
            chain.relu(where)
        elif kind is nn.Lambda and module.fn is jnp.ravel:
            chain.flatten()
        else:
            what = function_name(module.fn) if kind is nn.Lambda else kind.__module__
            raise TypeError(
                f"{where} of {what} is not known. Known are Sequential, Conv2d, Linear, AvgPool2d, "
                "BatchNorm, Dropout, Identity, "
                "by exact type, and Lambda of jax.nn.relu or jnp.ravel themselves: of another "
                "function nothing is known."
            )


def _equinox_batch_norm(module, state, where: str) -> PerChannel:
    if state is None or not module.inference:
        raise ValueError(
            f"{where} needs the state with its statistics, and inference mode "
            "(equinox.nn.inference_mode)."
        )
    if module.mode == "ema":
        mean, variance = state.get(module.ema_state_index)
    else:
        mean, variance = state.get(module.batch_state_index)
        count = int(state.get(module.batch_counter))
        warm = 1 - float(module.momentum) ** count if count else 1.0  # its averages start at 0
        mean, variance = (np.asarray(array, np.float64) / warm for array in (mean, variance))
    return batch_norm(mean, variance, module.eps, module.weight, module.bias, where)
