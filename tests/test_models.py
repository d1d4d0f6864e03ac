"""The published networks layer by layer (METHOD 6): what they compute, how they start, and what
they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ACTIVATIONS
from flax import nnx

import lipjax
from lipjax import bounds, models

# (channels, kernel, stride, padding) of the convolutions, widths of the hidden dense layers, and
# the initial thresholds
# of each activation: as METHOD 6 lists them, written out again here and not taken from the code.
PUBLISHED = {
    "conv4_dense3": dict(
        shape=(28, 28, 1),
        classes=10,
        convs=[(32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 4, 2, 1)],
        dense=[512, 512],
        relu=1.0,
        maxmin=None,
    ),
    "conv6_dense2": dict(
        shape=(32, 32, 3),
        classes=10,
        convs=[
            (32, 3, 1, 1),
            (32, 3, 1, 1),
            (32, 4, 2, 1),
            (64, 3, 1, 1),
            (64, 3, 1, 1),
            (64, 4, 2, 1),
        ],
        dense=[512],
        relu=2.0,
        maxmin=[
            (0.1, -0.1),
            (0.1, -0.15),
            (0.15, -0.15),
            (0.15, -0.15),
            (0.2, -0.2),
            (0.3, -0.3),
            (1.2, -1.2),
        ],
    ),
    "conv8_dense2": dict(
        shape=(64, 64, 3),
        classes=200,
        convs=[
            *[
                (64, 3, 1, 1),
                (64, 3, 1, 1),
                (64, 4, 2, 0),
                (128, 3, 1, 1),
                (128, 3, 1, 1),
                (128, 4, 2, 0),
            ],
            *[(256, 3, 1, 1), (256, 4, 2, 0)],
        ],
        dense=[256],
        relu=1.0,
        maxmin=[(t, -t) for t in (0.8, 1.0, 1.4, 1.4, 1.4, 1.6, 2.0, 3.0, 1.6)],
    ),
}


def positions(size, kernel, stride, padding):
    """How many positions there are at which the kernel fits, counted."""
    return len(
        [i for i in range(-padding, size + padding) if i + kernel <= size + padding][::stride]
    )


def call(module, x):
    return module(x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_the_published_layers_and_shapes(name, activation):
    wanted = PUBLISHED[name]
    network = nnx.eval_shape(
        lambda: models.build(
            name,
            activation=activation,
            classes=wanted["classes"],
            input_shape=wanted["shape"],
            rngs=nnx.Rngs(0),
        )
    )
    kind = dict(
        relu=lipjax.ReLU,
        clipped_relu=lipjax.ClippedReLU,
        maxmin=lipjax.MaxMin,
        clipped_maxmin=lipjax.ClippedMaxMin,
    )[activation]
    layers = list(network.layers)
    shape = wanted["shape"]

    def check_activation(layer):
        assert type(layer) is kind
        if activation == "clipped_relu":
            assert layer.threshold.shape == shape
        if activation == "clipped_maxmin":
            assert layer.upper.shape == layer.lower.shape == (*shape[:-1], shape[-1] // 2)

    for channels, kernel, stride, padding in wanted["convs"]:
        conv = layers.pop(0)
        assert type(conv) is nnx.Conv and conv.kernel.shape == (kernel, kernel, shape[-1], channels)
        computed = jax.eval_shape(call, conv, jax.ShapeDtypeStruct(shape, jnp.float32)).shape
        shape = (*(positions(size, kernel, stride, padding) for size in shape[:2]), channels)
        assert computed == shape
        check_activation(layers.pop(0))
    assert type(layers.pop(0)) is lipjax.Flatten
    shape = (int(np.prod(shape)),)
    for width in wanted["dense"]:
        dense = layers.pop(0)
        assert (
            type(dense) is nnx.Linear
            and dense.kernel.shape == (*shape, width)
            and dense.bias.shape == (width,)
        )
        shape = (width,)
        check_activation(layers.pop(0))
    (head,) = layers
    assert type(head) is nnx.Linear and head.kernel.shape == (*shape, wanted["classes"])
    batch = jax.ShapeDtypeStruct((5, *wanted["shape"]), jnp.float32)
    assert jax.eval_shape(call, network, batch).shape == (5, wanted["classes"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_start_with_the_published_variance_and_thresholds(name):
    wanted = PUBLISHED[name]
    arguments = dict(classes=wanted["classes"], input_shape=wanted["shape"])
    network = models.build(name, activation="clipped_relu", rngs=nnx.Rngs(0), **arguments)
    thresholds = [
        layer.threshold[...] for layer in network.layers if type(layer) is lipjax.ClippedReLU
    ]
    assert len(thresholds) == len(wanted["convs"]) + len(wanted["dense"])
    for threshold in thresholds:
        np.testing.assert_array_equal(threshold, np.float32(wanted["relu"]))
    for layer in network.layers:
        if type(layer) is nnx.Conv:
            kernel = np.asarray(layer.kernel[...], np.float64)
            height, width, _, out = kernel.shape
            variance = 2 / (height * width * out)
            # Five standard deviations of the sample's variance and mean: 2 variance^2 / n and
            # variance / n.
            assert abs(np.mean(kernel**2) / variance - 1) < 5 * np.sqrt(2 / kernel.size)
            assert abs(np.mean(kernel)) < 5 * np.sqrt(variance / kernel.size)
            # a normal's tail, not a uniform's
            assert np.max(np.abs(kernel)) > 2.5 * np.sqrt(variance)
            np.testing.assert_array_equal(layer.bias[...], 0)
        # "framework default" of the reference: uniform within 1 / sqrt(inputs)
        if type(layer) is nnx.Linear:
            reach = 1 / np.sqrt(layer.in_features)
            kernel = np.asarray(layer.kernel[...])
            assert 0.99 * reach < np.max(np.abs(kernel)) <= reach
            assert np.max(np.abs(layer.bias[...])) <= reach and np.any(layer.bias[...] != 0)
    if wanted["maxmin"]:
        network = models.build(name, activation="clipped_maxmin", rngs=nnx.Rngs(0), **arguments)
        layers = [layer for layer in network.layers if type(layer) is lipjax.ClippedMaxMin]
        for layer, (upper, lower) in zip(layers, wanted["maxmin"], strict=True):
            np.testing.assert_array_equal(layer.upper[...], np.float32(upper))
            np.testing.assert_array_equal(layer.lower[...], np.float32(lower))


@pytest.mark.parametrize("name", ["small_dense", "small_residual"])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_the_other_small_networks_have_their_layers_behind_a_normalisation(name, orthogonal):
    settings = {
        "mean": (0.2, 0.4),
        "deviation": (0.5,) * 2,
        "orthogonal": orthogonal,
        "activation": "maxmin",
    }
    network = models.build(name, classes=3, input_shape=(6, 4, 2), rngs=nnx.Rngs(0), **settings)
    first, *layers = network.layers
    assert type(first) is lipjax.Normalize
    dense, conv = (lipjax.CayleyLinear, lipjax.AOLConv) if orthogonal else (nnx.Linear, nnx.Conv)
    kinds = [lipjax.Flatten, *[dense, lipjax.MaxMin] * 2, nnx.Linear]
    if name == "small_residual":
        block = [lipjax.Residual, lipjax.MaxMin]
        kinds = [conv, lipjax.MaxMin, *block * 2, lipjax.Flatten, dense, lipjax.MaxMin, nnx.Linear]
        inside = [type(layer) for layer in layers[2].branch.layers]
        assert inside == [conv, lipjax.MaxMin, conv]
    assert [type(layer) for layer in layers] == kinds
    assert jax.eval_shape(call, network, jax.ShapeDtypeStruct((5, 6, 4, 2), jnp.float32)).shape == (
        5,
        3,
    )


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_network_of_shifts_is_of_products_and_rearrangements_and_its_bound_is_that_of_the_head(
    orthogonal,
):
    network = models.build(
        "shifted",
        classes=3,
        input_shape=(6, 4, 2),
        width=10,
        blocks=2,
        dense=8,
        orthogonal=orthogonal,
        rngs=nnx.Rngs(0),
    )
    product = lipjax.CayleyLinear if orthogonal else nnx.Linear
    block = [lipjax.Shift, product, lipjax.MaxMin]
    head = [lipjax.Flatten, product, lipjax.MaxMin, nnx.Linear]
    kinds = [lipjax.SpaceToDepth, product, lipjax.MaxMin, *block * 2, *head]
    assert [type(layer) for layer in network.layers] == kinds
    plain = lipjax.orthogonal.plain(network)
    images = np.random.default_rng(0).uniform(size=(3, 6, 4, 2)).astype(np.float32)
    nodes = lipjax.trace(plain, images[0]).nodes[1:]
    assert {type(node).__name__ for node in nodes} == {"Rearrange", "Linear", "Activation"}
    found = lipjax.certify(plain, images, None, 1e-4, tier="deterministic")
    assert found.certified.all()
    assert np.all(found.norms >= 1 - 1e-6) and np.all(found.norms < 1.0011)
    with pytest.raises(ValueError, match="patches of 4 do not tile images of 6 by 4"):
        models.build("shifted", input_shape=(6, 4, 2), patch=4, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_small_network_is_a_function_of_its_seed_and_takes_its_widths(activation):
    def make(seed):
        return models.build(
            "small_conv",
            activation=activation,
            classes=3,
            input_shape=(6, 4, 2),
            widths=(2, 4),
            dense=6,
            threshold=0.25,
            rngs=nnx.Rngs(seed),
        )

    first, again, other = (jax.tree.leaves(nnx.state(make(seed), nnx.Param)) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    network = make(0)
    convs = [layer.out_features for layer in network.layers if type(layer) is nnx.Conv]
    assert convs == [2, 2, 4, 4]
    assert network(jnp.zeros((6, 4, 2))).shape == (3,)
    if activation == "clipped_relu":
        assert float(network.layers[1].threshold[...][0, 0, 0]) == 0.25


def test_a_stem_takes_patches_apart_in_front_of_the_pairs():
    make = functools.partial(
        models.small_conv, input_shape=(30, 30, 3), widths=(2, 4), rngs=nnx.Rngs(0)
    )
    network, without = make(stem=5), make()
    convs = [layer for layer in network.layers if type(layer) is nnx.Conv]
    assert convs[0].kernel_size == (5, 5) and convs[0].strides in (5, (5, 5))
    assert [conv.out_features for conv in convs] == [2, 2, 2, 4, 4]
    assert bounds.vector_shapes(network, (30, 30, 3))[:3] == ((30, 30, 3), (6, 6, 2), (6, 6, 2))
    assert len([layer for layer in without.layers if type(layer) is nnx.Conv]) == 4
    with pytest.raises(ValueError, match="stem must be the side of a patch, or 0 for none, got -1"):
        make(stem=-1)


def test_what_cannot_be_built_is_refused_with_what_was_expected():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match=r"'conv6_dens2'.*Did you mean 'conv6_dense2'"):
        models.build("conv6_dens2", rngs=rngs)
    with pytest.raises(
        ValueError, match="one of relu, clipped_relu, maxmin, clipped_maxmin, got 'gelu'"
    ):
        models.conv4_dense3(activation="gelu", rngs=rngs)
    with pytest.raises(ValueError, match=r"\(12, 12, 3\) are too small: convolution 7 "):
        models.conv8_dense2(input_shape=(12, 12, 3), rngs=rngs)
    with pytest.raises(ValueError, match=r"\(height, width, channels\), got \(784,\)"):
        models.conv4_dense3(input_shape=(784,), rngs=rngs)
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        models.small_conv(classes=1, rngs=rngs)
    with pytest.raises(ValueError, match="even number"):
        models.small_conv(widths=(3,), activation="clipped_maxmin", rngs=rngs)
