"""The published networks and small ones for small images: flat nnx.Sequential of convolutions,
dense layers, activations.

Inputs are NHWC (or one example, HWC). An activation follows each layer but the last. Convolution
kernels start normal with variance ``2 / (kernel_h * kernel_w * out_channels)`` and zero bias, dense
layers as the reference's framework (PyTorch) starts them: uniform within ``+-1 / sqrt(inputs)``,
weights and bias. Thresholds are those of METHOD 6, where it gives them; the others are marked
below.
"""

import difflib
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from flax import nnx

from lipjax.activations import ClippedMaxMin, ClippedReLU, MaxMin, ReLU
from lipjax.layers import Flatten, Normalize, Residual, Shift, SpaceToDepth
from lipjax.orthogonal import AOLConv, CayleyLinear

ACTIVATIONS = ("relu", "clipped_relu", "maxmin", "clipped_maxmin")


class _Conv(NamedTuple):
    channels: int
    kernel: int
    stride: int
    padding: int = 1


def conv4_dense3(
    *,
    activation: str = "clipped_relu",
    classes: int = 10,
    input_shape: Sequence[int] = (28, 28, 1),
    orthogonal: bool = False,
    rngs: nnx.Rngs,
) -> nnx.Sequential:
    """4C3F, published for MNIST with ReLU thresholds 1.0. MaxMin thresholds +-1.0 are ours."""
    convs = [_Conv(32, 3, 1), _Conv(32, 4, 2), _Conv(64, 3, 1), _Conv(64, 4, 2)]
    pairs = [(1.0, -1.0)] * 6
    return _build(
        convs, [512, 512], activation, [1.0] * 6, pairs, classes, input_shape, orthogonal, rngs
    )


def conv6_dense2(
    *,
    activation: str = "clipped_maxmin",
    classes: int = 10,
    input_shape: Sequence[int] = (32, 32, 3),
    orthogonal: bool = False,
    rngs: nnx.Rngs,
) -> nnx.Sequential:
    """6C2F, published for CIFAR-10: ReLU thresholds 2.0, MaxMin thresholds per layer."""
    convs = [
        _Conv(32, 3, 1),
        _Conv(32, 3, 1),
        _Conv(32, 4, 2),
        _Conv(64, 3, 1),
        _Conv(64, 3, 1),
        _Conv(64, 4, 2),
    ]
    pairs = [
        (0.1, -0.1),
        (0.1, -0.15),
        (0.15, -0.15),
        (0.15, -0.15),
        (0.2, -0.2),
        (0.3, -0.3),
        (1.2, -1.2),
    ]
    return _build(
        convs, [512], activation, [2.0] * 7, pairs, classes, input_shape, orthogonal, rngs
    )


def conv8_dense2(
    *,
    activation: str = "clipped_maxmin",
    classes: int = 200,
    input_shape: Sequence[int] = (64, 64, 3),
    orthogonal: bool = False,
    rngs: nnx.Rngs,
) -> nnx.Sequential:
    """8C2F, published for TinyImageNet: ReLU thresholds 1.0, MaxMin thresholds per layer."""
    convs = [
        _Conv(64, 3, 1),
        _Conv(64, 3, 1),
        _Conv(64, 4, 2, 0),
        _Conv(128, 3, 1),
        _Conv(128, 3, 1),
    ]
    convs += [_Conv(128, 4, 2, 0), _Conv(256, 3, 1), _Conv(256, 4, 2, 0)]
    pairs = [(t, -t) for t in (0.8, 1.0, 1.4, 1.4, 1.4, 1.6, 2.0, 3.0, 1.6)]
    return _build(
        convs, [256], activation, [1.0] * 9, pairs, classes, input_shape, orthogonal, rngs
    )


def small_conv(
    *,
    activation: str = "clipped_maxmin",
    classes: int = 10,
    input_shape: Sequence[int] = (8, 8, 1),
    stem: int = 0,
    widths: Sequence[int] = (16, 32),
    dense: int = 64,
    threshold: float = 1.0,
    orthogonal: bool = False,
    rngs: nnx.Rngs,
) -> nnx.Sequential:
    """A small net of our own: per width one 3x3 convolution and one 4x4 of stride 2, then one
    hidden dense layer.

    Args:
        stem: for large images: side of the patches that a first convolution, of ``widths[0]``
            channels, takes apart; 0: none.
        widths: channels of each pair of convolutions; each pair halves the image.
        dense: width of the hidden dense layer.
        threshold: ReLU thresholds, and +- MaxMin thresholds, of every layer.
        orthogonal: as `build` says.

    Raises:
        ValueError: stem < 0; what `build` says.
    """
    if stem < 0:
        raise ValueError(f"stem must be the side of a patch, or 0 for none, got {stem}.")
    convs = [_Conv(widths[0], stem, stem, 0)] if stem else []
    convs += [conv for width in widths for conv in (_Conv(width, 3, 1), _Conv(width, 4, 2))]
    count = len(convs) + 1
    pairs = [(threshold, -threshold)] * count
    return _build(
        convs,
        [dense],
        activation,
        [threshold] * count,
        pairs,
        classes,
        input_shape,
        orthogonal,
        rngs,
    )


def small_dense(
    *,
    activation: str = "clipped_relu",
    classes: int = 10,
    input_shape: Sequence[int] = (8, 8, 1),
    widths: Sequence[int] = (64, 64),
    threshold: float = 1.0,
    orthogonal: bool = False,
    rngs: nnx.Rngs,
) -> nnx.Sequential:
    """Hidden dense layers only; arguments as those of `small_conv`."""
    pairs = [(threshold, -threshold)] * len(widths)
    thresholds = [threshold] * len(widths)
    return _build([], widths, activation, thresholds, pairs, classes, input_shape, orthogonal, rngs)


def small_residual(
    *,
    activation: str = "clipped_maxmin",
    classes: int = 10,
    input_shape: Sequence[int] = (8, 8, 1),
    width: int = 16,
    blocks: int = 2,
    dense: int = 64,
    threshold: float = 1.0,
    orthogonal: bool = False,
    rngs: nnx.Rngs,
) -> nnx.Sequential:
    """A 4x4 convolution of stride 2, residual blocks of two 3x3 convolutions, one hidden dense
    layer.

    Args:
        width: channels of all convolutions.
        blocks: how many blocks; each is followed by an activation and has one inside.
        dense, threshold, orthogonal: as those of `small_conv`.
    """
    stem = _Conv(width, 4, 2)
    inside = _Conv(width, 3, 1)
    height, side, channels = input_shape
    shape = (_size(height, stem, 0, input_shape), _size(side, stem, 0, input_shape), width)
    pair = (threshold, -threshold)
    layers: list = [
        _convolution(stem, channels, orthogonal, rngs),
        _activation(activation, shape, threshold, pair),
    ]
    for _ in range(blocks):
        first, second = (_convolution(inside, width, orthogonal, rngs) for _ in range(2))
        layers.append(Residual(first, _activation(activation, shape, threshold, pair), second))
        layers.append(_activation(activation, shape, threshold, pair))
    flat = math.prod(shape)
    hidden = CayleyLinear(flat, dense, rngs=rngs) if orthogonal else _dense(flat, dense, rngs)
    layers += [
        Flatten(),
        hidden,
        _activation(activation, (dense,), threshold, pair),
        _dense(dense, classes, rngs),
    ]
    return nnx.Sequential(*layers)


def shifted(
    *,
    activation: str = "maxmin",
    classes: int = 10,
    input_shape: Sequence[int] = (8, 8, 1),
    patch: int = 2,
    width: int = 32,
    blocks: int = 4,
    dense: int = 64,
    threshold: float = 1.0,
    orthogonal: bool = False,
    rngs: nnx.Rngs,
) -> nnx.Sequential:
    """Matrix products and rearrangements only: patches, blocks of a shift and a product with each
    pixel's channels, one hidden dense layer. After LipNeXt (`lipjax.layers.Shift`), whose position
    encoding and pooling it has not.

    Args:
        patch: side of the patches that become pixels.
        width: channels of all blocks.
        blocks: how many; each is followed by an activation.
        dense, threshold, orthogonal: as those of `small_conv`.

    Raises:
        ValueError: patches that do not tile the images; what `build` says.
    """
    height, side, channels = input_shape
    if height % patch or side % patch:
        raise ValueError(f"patches of {patch} do not tile images of {height} by {side}.")
    shape = (height // patch, side // patch, width)
    pair = (threshold, -threshold)

    def product(inputs, outputs):
        if orthogonal:
            return CayleyLinear(inputs, outputs, rngs=rngs)
        return nnx.Linear(inputs, outputs, kernel_init=nnx.initializers.orthogonal(), rngs=rngs)

    layers: list = [SpaceToDepth(patch), product(patch**2 * channels, width)]
    layers.append(_activation(activation, shape, threshold, pair))
    for _ in range(blocks):
        layers += [Shift(), product(width, width)]
        layers.append(_activation(activation, shape, threshold, pair))
    layers += [Flatten(), product(math.prod(shape), dense)]
    layers += [_activation(activation, (dense,), threshold, pair), _dense(dense, classes, rngs)]
    return nnx.Sequential(*layers)


NETWORKS = {
    "conv4_dense3": conv4_dense3,
    "conv6_dense2": conv6_dense2,
    "conv8_dense2": conv8_dense2,
    "small_conv": small_conv,
    "small_dense": small_dense,
    "small_residual": small_residual,
    "shifted": shifted,
}


def build(
    name: str, *, mean: Sequence[float] = (), deviation: Sequence[float] = (), **arguments
) -> nnx.Sequential:
    """The network of that name, as configurations name it; see the functions above for the other
    arguments.

    Args:
        name: a key of `NETWORKS`.
        mean, deviation: of the pixels, per channel or one number for all; if given, the network
            begins with `lipjax.Normalize`.
        orthogonal: all layers but the last have norm at most 1 by construction
            (`lipjax.orthogonal`): train this one, certify its `lipjax.orthogonal.plain`.

    Raises:
        ValueError: unknown name, with the nearest known ones; what the network's own function
            refuses.
    """
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no network is called {name!r}; there are {', '.join(NETWORKS)}.{hint}")
    network = NETWORKS[name](**arguments)
    return (
        nnx.Sequential(Normalize(mean, deviation), *network.layers)
        if mean or deviation
        else network
    )


def _build(
    convs, dense, activation, thresholds, pairs, classes, input_shape, orthogonal, rngs
) -> nnx.Sequential:
    if classes < 2:
        raise ValueError(f"a classifier needs at least 2 classes, got {classes}.")
    input_shape = tuple(input_shape)
    if len(input_shape) != 3:
        raise ValueError(f"input_shape must be (height, width, channels), got {input_shape}.")

    def activate(shape, i):
        return _activation(activation, shape, thresholds[i], pairs[i])

    layers: list = []
    height, width, channels = input_shape
    for i, conv in enumerate(convs):
        layers.append(_convolution(conv, channels, orthogonal, rngs))
        height, width = (_size(n, conv, i, input_shape) for n in (height, width))
        channels = conv.channels
        layers.append(activate((height, width, channels), i))
    layers.append(Flatten())
    size = height * width * channels
    for i, features in enumerate(dense):
        layers.append(
            CayleyLinear(size, features, rngs=rngs) if orthogonal else _dense(size, features, rngs)
        )
        layers.append(activate((features,), len(convs) + i))
        size = features
    layers.append(_dense(size, classes, rngs))
    return nnx.Sequential(*layers)


def _activation(name, shape, threshold, pair) -> nnx.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}.")
    if name == "relu":
        return ReLU()
    if name == "clipped_relu":
        return ClippedReLU(shape, threshold=threshold)
    return MaxMin() if name == "maxmin" else ClippedMaxMin(shape, upper=pair[0], lower=pair[1])


def _size(size, conv, i, input_shape):
    out = (size + 2 * conv.padding - conv.kernel) // conv.stride + 1
    if out < 1:
        raise ValueError(
            f"images of {input_shape} are too small: convolution {i} ({conv}) would have no output."
        )
    return out


def _convolution(
    conv: _Conv, channels: int, orthogonal: bool, rngs: nnx.Rngs
) -> nnx.Conv | AOLConv:
    if orthogonal:
        window = (conv.kernel, conv.kernel)
        return AOLConv(
            channels, conv.channels, window, strides=conv.stride, padding=conv.padding, rngs=rngs
        )
    deviation = math.sqrt(2 / (conv.kernel**2 * conv.channels))
    return nnx.Conv(
        channels,
        conv.channels,
        (conv.kernel, conv.kernel),
        strides=conv.stride,
        padding=conv.padding,
        kernel_init=jax.nn.initializers.normal(deviation),
        rngs=rngs,
    )


def _dense(inputs: int, features: int, rngs: nnx.Rngs) -> nnx.Linear:
    reach = 1 / math.sqrt(inputs)

    def uniform(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -reach, reach)

    return nnx.Linear(inputs, features, kernel_init=uniform, bias_init=uniform, rngs=rngs)
