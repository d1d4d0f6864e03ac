"""Layers of norm at most 1: against the SVD of their matrices, as `plain` writes them down, and in
training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import dense_matrix, operator_of
from flax import nnx

import lipjax
from lipjax import models, orthogonal, training


def singular_values(layer, shape):
    return np.linalg.svd(dense_matrix(operator_of(layer, shape), shape), compute_uv=False)


@pytest.mark.parametrize("inputs, outputs", [(7, 5), (5, 7), (6, 6), (4, 1)])
def test_every_singular_value_of_a_cayley_layer_is_one(inputs, outputs):
    layer = lipjax.CayleyLinear(inputs, outputs, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(singular_values(layer, (inputs,)), 1, rtol=1e-5)
    layer.free.kernel[...] = 30 * jax.random.normal(jax.random.key(1), (inputs, outputs))
    np.testing.assert_allclose(singular_values(layer, (inputs,)), 1, rtol=1e-3)


@pytest.mark.parametrize(
    "window, strides, padding, inputs, outputs",
    [
        ((3, 3), 1, 1, 4, 6),
        ((4, 4), 2, 1, 3, 5),
        ((3, 3), 2, 0, 2, 9),
        ((2, 5), 2, 3, 3, 2),
        ((1, 1), 1, 0, 4, 4),
    ],
)
def test_no_singular_value_of_an_aol_convolution_is_above_one(
    window, strides, padding, inputs, outputs
):
    layer = lipjax.AOLConv(
        inputs, outputs, window, strides=strides, padding=padding, rngs=nnx.Rngs(0)
    )
    start = singular_values(layer, (6, 7, inputs))
    assert np.max(start) <= 1 + 1e-5 and np.max(start) > 0.5
    for seed, factor in ((0, 1e-3), (1, 1.0), (2, 1e3)):
        noise = jax.random.normal(jax.random.key(seed), layer.free.kernel[...].shape)
        layer.free.kernel[...] = factor * noise
        assert np.max(singular_values(layer, (6, 7, inputs))) <= 1 + 1e-5
        # all taps alike: the largest norm that there is
        layer.free.kernel[...] = factor * jnp.ones_like(noise)
        values = singular_values(layer, (12, 13, inputs))
        assert 0.5 < np.max(values) <= 1 + 1e-5
    layer.free.kernel[...] = jnp.zeros_like(noise)
    assert np.all(singular_values(layer, (6, 7, inputs)) == 0)


def test_a_kernel_smaller_than_its_stride_is_refused():
    with pytest.raises(ValueError, match="at least its stride, 3"):
        lipjax.AOLConv(1, 1, (2, 2), strides=3, rngs=nnx.Rngs(0))


def test_plain_computes_the_same_and_is_certified_where_the_other_is_refused():
    rngs = nnx.Rngs(0)
    conv, dense = (
        lipjax.AOLConv(1, 4, (4, 4), strides=2, rngs=rngs),
        lipjax.CayleyLinear(16, 6, rngs=rngs),
    )
    block = lipjax.Residual(lipjax.CayleyLinear(6, 6, rngs=rngs))
    net = nnx.Sequential(
        conv, lipjax.Flatten(), dense, block, lipjax.MaxMin(), nnx.Linear(6, 3, rngs=rngs)
    )
    x = np.random.default_rng(0).uniform(0, 1, (3, 6, 6, 1)).astype(np.float32)
    plain = orthogonal.plain(nnx.Sequential(net))  # also inside another sequence
    np.testing.assert_allclose(jax.vmap(plain)(x), jax.vmap(net)(x), atol=1e-6)
    kinds = {type(layer) for _, layer in nnx.iter_graph(plain)}
    assert kinds.isdisjoint(orthogonal.KINDS)
    with pytest.raises(TypeError, match=r"computed anew at every call.*orthogonal\.plain"):
        lipjax.certify(net, x, None, 0.01)
    found = lipjax.certify(plain, x, None, 1e-4)
    assert found.certified.all() and np.all(found.norms <= 1.01)
    assert type(net.layers[0]) is lipjax.AOLConv  # not changed


def test_training_moves_the_free_parameters_and_keeps_the_norms():
    net = models.build(
        "small_dense", orthogonal=True, activation="maxmin", widths=(6, 4), rngs=nnx.Rngs(0)
    )
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (8, 8, 1)), jnp.float32)

    @jax.jit
    @jax.value_and_grad
    def loss(net):
        bound = lipjax.bound(net, x, 0.1, mode="global", iterations=30, key=jax.random.key(1))
        return lipjax.losses.bcp(bound, 3, 0.0)

    before, slope = loss(net)
    net = jax.tree.map(lambda leaf, change: leaf - 0.05 * change, net, slope)
    after, slope = loss(net)
    assert after < before and all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(slope))
    np.testing.assert_allclose(singular_values(net.layers[1], (64,)), 1, rtol=1e-5)


def test_the_selected_network_of_a_run_is_plain():
    class Run:
        def restore_best(self, abstract):
            return jax.tree.map(lambda a: np.full(a.shape, 0.1, a.dtype), abstract), {"epoch": 3}

    from lipjax.configs import digits

    config = digits.get_config()
    config.model.name, config.model.orthogonal, config.model.mean, config.model.deviation = (
        "small_dense",
        True,
        (0.5,),
        (0.2,),
    )
    network, facts = training.selected_network(Run(), config, (8, 8, 1), 10)
    kinds = [type(layer).__name__ for layer in network.layers]
    assert kinds == [
        "Normalize",
        "Flatten",
        *["Linear", "ClippedMaxMin"] * 2,
        "Linear",
    ] and facts == {"epoch": 3}
    np.testing.assert_allclose(singular_values(network.layers[2], (64,)), 1, rtol=1e-5)
