"""Linear views: against the layer itself and against the explicit matrix."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import dense_matrix, operator_of
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import lipjax
from lipjax.graph import linear
from lipjax.graph.linear import LinearOperator


def check(layer, shape):
    """apply, transpose, |W| and row norms of a layer's view against its explicit matrix."""
    layer = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), layer)
    view = operator_of(layer, shape)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape))
    zero = layer(jnp.zeros(shape))
    matrix = dense_matrix(lambda e: layer(e) - zero, shape)
    np.testing.assert_allclose(view.affine(x), layer(x), atol=1e-12)
    np.testing.assert_allclose(view(x).reshape(-1), matrix @ x.reshape(-1), atol=1e-12)
    y = jnp.asarray(np.random.default_rng(1).normal(size=zero.shape))
    np.testing.assert_allclose(
        view.transpose(x)(y).reshape(-1), matrix.T @ y.reshape(-1), atol=1e-12
    )
    np.testing.assert_allclose(
        view.absolute(jnp.abs(x)).reshape(-1), np.abs(matrix) @ np.abs(x).reshape(-1), atol=1e-12
    )
    mask = np.random.default_rng(2).uniform(size=shape) < 0.5
    rows = np.linalg.norm(matrix * mask.reshape(-1), axis=1)
    np.testing.assert_allclose(view.row_norms(jnp.asarray(mask)).reshape(-1), rows, atol=1e-12)
    small = view.materialized(x)
    np.testing.assert_allclose(small.affine(x), layer(x), atol=1e-12)
    if view.kernel_row_norms is not None:
        whole = np.linalg.norm(matrix, axis=1).reshape(zero.shape)
        assert np.all(np.broadcast_to(view.kernel_row_norms, zero.shape) >= whole - 1e-12)


@settings(max_examples=8, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    strides=st.sampled_from([1, 2, (1, 2), None]),
    padding=st.sampled_from(["SAME", "VALID", 0, 1, (1, 2), ((0, 1), (2, 0))]),
    dilation=st.sampled_from([1, (2, 1)]),
    input_dilation=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
)
def test_a_convolutions_view_equals_its_explicit_matrix(
    kernel, strides, padding, dilation, input_dilation, groups, bias
):
    # lax takes no padding by name there
    assume(not (isinstance(padding, str) and input_dilation > 1))
    with jax.enable_x64(True):
        layer = nnx.Conv(
            2,
            4,
            kernel,
            strides=strides,
            padding=padding,
            kernel_dilation=dilation,
            input_dilation=input_dilation,
            feature_group_count=groups,
            use_bias=bias,
            rngs=nnx.Rngs(0),
        )
        check(layer, (6, 5, 2))


def test_dense_and_pooling_views_equal_their_explicit_matrices(x64):
    check(nnx.Linear(5, 3, rngs=nnx.Rngs(0)), (5,))
    check(nnx.Linear(5, 3, use_bias=False, rngs=nnx.Rngs(0)), (2, 5))
    check(lipjax.AveragePool(2), (4, 6, 3))
    check(lipjax.AveragePool((3, 2), strides=1), (4, 4, 2))
    check(lipjax.Normalize((0.1, 0.2, 0.7), (0.5, 0.25, 0.3)), (4, 6, 3))
    check(lipjax.Normalize((0.1,), (0.3,)), (5,))


@pytest.mark.parametrize("layer", [lipjax.Shift(), lipjax.SpaceToDepth(2)])
def test_layers_that_only_move_numbers_are_permutations_and_traced_as_one_node(layer):
    numbers = np.arange(4 * 6 * 10, dtype=np.float32).reshape(4, 6, 10)
    moved = layer(jnp.asarray(numbers))
    np.testing.assert_array_equal(np.sort(np.ravel(moved)), np.ravel(numbers))
    np.testing.assert_array_equal(layer(jnp.stack([numbers, -numbers])), [moved, -moved])
    nodes = lipjax.trace(lambda x: layer(x).reshape(-1), numbers).nodes
    assert [type(node).__name__ for node in nodes[:2]] == ["Input", "Rearrange"]
    assert not any(node.executed for node in nodes)


def test_what_a_pixel_becomes_when_images_are_shifted_or_taken_apart():
    image = jnp.zeros((4, 4, 5)).at[1, 2].set(jnp.arange(1.0, 6.0))
    shifted = lipjax.Shift()(image)
    for channel, place in enumerate([(2, 2), (0, 2), (1, 3), (1, 1), (1, 2)]):
        assert shifted[*place, channel] == channel + 1
        assert jnp.sum(shifted[..., channel]) == channel + 1
    apart = lipjax.SpaceToDepth(2)(image)
    np.testing.assert_array_equal(apart[0, 1].reshape(2, 2, 5)[1, 0], image[1, 2])
    with pytest.raises(ValueError, match="patches of 3 do not tile images of 4 by 4"):
        lipjax.SpaceToDepth(3)(image)
    with pytest.raises(ValueError, match="fifths of the channels, got 4 of them"):
        lipjax.Shift()(image[..., :4])


@pytest.mark.parametrize("thin", [1, 99])
@pytest.mark.parametrize("how", [{}, {"strides": 2, "feature_group_count": 2}])
def test_a_float64_convolution_is_jaxs_own_in_one_product_and_in_a_loop_of_them(
    x64, monkeypatch, thin, how
):
    """Forwards, backwards and in its kernel, alone and under `vmap`."""
    monkeypatch.setattr(linear, "THIN", thin)
    layer = nnx.Conv(4, 6, (3, 2), param_dtype=jnp.float64, rngs=nnx.Rngs(0), **how)
    operator = operator_of(layer, (6, 5, 4))
    assert operator.kernel.dtype == jnp.float64
    x = jax.random.normal(jax.random.key(0), (2, 6, 5, 4), jnp.float64)

    def ours(kernel, x):
        return jax.vmap(lambda each: operator.apply(kernel, each))(x)

    def theirs(kernel, x):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (how.get("strides", 1),) * 2,
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=how.get("feature_group_count", 1),
        )

    images, back = jax.vjp(jax.jit(ours), operator.kernel, x)
    expected, expected_back = jax.vjp(theirs, operator.kernel, x)
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-12)
    weights = jnp.cos(jnp.arange(images.size, dtype=images.dtype)).reshape(images.shape)
    for found, wanted in zip(back(weights), expected_back(weights), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    loops = str(jax.make_jaxpr(ours)(operator.kernel, x)).count("scan[")
    assert loops == (1 if thin == 1 else 0)


def test_epsilon_is_a_radius_on_the_pixels_and_not_on_what_a_first_layer_makes_of_them():
    rngs, deviation = nnx.Rngs(0), np.array([0.5, 0.125])
    layer = nnx.Linear(2, 3, rngs=rngs)
    inside = nnx.Sequential(lipjax.Normalize((0.25, 0.5), deviation), layer)
    folded = nnx.Linear(2, 3, rngs=rngs)
    folded.kernel[...] = layer.kernel[...] / deviation[:, None]
    folded.bias[...] = layer.bias[...] - (jnp.asarray([0.25, 0.5]) / deviation) @ layer.kernel[...]
    x = np.random.default_rng(0).uniform(0, 1, (5, 2)).astype(np.float32)
    np.testing.assert_allclose(jax.vmap(inside)(x), jax.vmap(nnx.Sequential(folded))(x), atol=1e-5)
    for mode in ("linear", "local"):

        @jax.jit
        @functools.partial(jax.vmap, in_axes=(None, 0))
        def worst(net, x, mode=mode):
            return lipjax.worst_logits(lipjax.bound(net, x, 0.1, mode=mode, iterations=50), 1)

        apart, together = worst(inside, x), worst(nnx.Sequential(folded), x)
        if mode == "linear":  # its rows go through both layers at once
            np.testing.assert_allclose(apart, together, rtol=1e-4, atol=1e-5)
        assert np.all(apart >= together - 1e-4) and np.all(apart[:, 0] > jax.vmap(inside)(x)[:, 0])
    for mean, deviation in (((0.0,), (0.0,)), ((0.0, 1.0), (1.0,)), ((np.nan,), (1.0,)), ((), ())):
        with pytest.raises(ValueError, match="mean"):
            lipjax.Normalize(mean, deviation)


def test_a_network_with_pooling_is_bounded_and_certified_under_jit():
    rngs, x = nnx.Rngs(0), np.random.default_rng(0).uniform(0, 1, (3, 4, 4, 1)).astype(np.float32)
    net = nnx.Sequential(
        nnx.Conv(1, 2, (3, 3), rngs=rngs),
        lipjax.ReLU(),
        lipjax.AveragePool(2),
        lipjax.Flatten(),
        nnx.Linear(8, 3, rngs=rngs),
    )
    bounds = jax.jit(jax.vmap(lambda x: lipjax.bound(net, x, 0.1, mode="global", iterations=300)))(
        x
    )
    np.testing.assert_allclose(bounds.norms[1], 0.5, rtol=1e-4)  # four inputs of weight 1/4 each
    found = lipjax.certify(net, x, None, 1e-4, mode="global")
    assert (
        found.certified.all()
        and np.all(found.norms[:, 1] >= 0.5)
        and np.all(found.norms[:, 1] < 0.51)
    )


def test_float32_and_float64_views_agree():
    layer = nnx.Conv(3, 4, (3, 3), strides=2, padding="SAME", rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(7, 6, 3))
    single = operator_of(layer, x.shape).affine(jnp.asarray(x, jnp.float32))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), layer)
        double = operator_of(wide, x.shape).affine(jnp.asarray(x))
        np.testing.assert_allclose(single, double, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT", "CAUSAL"])
def test_what_a_padding_repeats_is_counted(x64, padding):
    """Copies of an entry make a difference longer: the bound is above the norm of the whole map."""
    window, shape = ((3,), (7, 2)) if padding == "CAUSAL" else ((3, 3), (5, 4, 2))
    conv = nnx.Conv(
        2, 3, window, padding=padding, use_bias=False, rngs=nnx.Rngs(0), param_dtype=jnp.float64
    )
    net = nnx.Sequential(conv, lipjax.ReLU(), jnp.ravel)
    bound = lipjax.bound(net, jnp.ones(shape), 0.1, mode="global", iterations=400)
    truth = np.linalg.norm(dense_matrix(conv, shape), 2)
    assert truth * (1 - 1e-9) <= bound.lipschitz <= 3 * truth


def test_layers_with_arithmetic_of_their_own_are_bounded_as_they_compute(x64):
    own = lambda *a, **k: 2 * jax.lax.dot_general(*a, **k)  # noqa: E731
    layer = nnx.Linear(
        3, 3, dot_general=own, use_bias=False, rngs=nnx.Rngs(0), param_dtype=jnp.float64
    )
    bound = lipjax.bound(
        nnx.Sequential(layer, lipjax.ReLU()), jnp.ones(3), 0.1, mode="global", iterations=400
    )
    np.testing.assert_allclose(
        bound.lipschitz, 2 * np.linalg.norm(np.asarray(layer.kernel[...]), 2), rtol=1e-9
    )


class Raw(nnx.Module):
    """A layer of somebody's own, on raw arrays."""

    def __init__(self, weight):
        self.weight = nnx.Param(weight)

    def __call__(self, x):
        return self.weight[...] @ x


def test_a_layer_of_ones_own_is_bounded_without_a_word(x64):
    raw = Raw(jnp.asarray(np.random.default_rng(0).normal(size=(3, 4))))
    net = nnx.Sequential(
        raw, lipjax.ReLU(), nnx.Linear(3, 2, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    )
    bound = lipjax.bound(net, jnp.ones(4), 0.1, mode="global", iterations=500)
    np.testing.assert_allclose(
        bound.lipschitz, np.linalg.norm(np.asarray(raw.weight[...]), 2), rtol=1e-9
    )


def test_from_matrix_refuses_a_wrong_shape():
    with pytest.raises(ValueError, match=r"\(6, 4\)"):
        LinearOperator.from_matrix(jnp.ones((4, 6)), (2, 2), (6,))


def test_square_roots_have_gradient_zero_at_zero():
    assert jax.grad(linear.safe_sqrt)(0.0) == 0
    assert np.all(jax.grad(linear.safe_norm)(jnp.zeros(3)) == 0)
    assert np.isnan(linear.safe_sqrt(jnp.nan))
    for value in itertools.chain([1e-20, 1.0, 4.0]):
        np.testing.assert_allclose(linear.safe_sqrt(value), value**0.5, rtol=1e-6)


def test_inputs_that_do_not_fit_are_errors_that_name_the_shape(x64):
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        LinearOperator.from_matrix(jnp.eye(2), (2,), (2,))(jnp.ones(3))
    with pytest.raises(ValueError, match=r"at least 3 axes.*\(4,\)"):
        lipjax.Flatten()(jnp.ones(4))
    with pytest.raises(ValueError, match=r"window of \(3, 3\).*\(2, 2, 1\)"):
        lipjax.AveragePool(3)(jnp.ones((2, 2, 1)))
    view = operator_of(nnx.Conv(2, 4, (3, 3), padding="VALID", rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"\(3, 3\) does not fit.*\(2, 5, 2\)"):
        view(jnp.ones((2, 5, 2)))
    with pytest.raises(ValueError, match=r"spatial axes.*\(5, 2\)"):
        view(jnp.ones((5, 2)))
    with pytest.raises(ValueError, match="takes 2 channels, got 3"):
        view(jnp.ones((5, 5, 3)))


def test_activations_refuse_what_does_not_fit():
    acts = lipjax.activations
    with pytest.raises(ValueError, match="threshold >= 0, got -1"):
        acts.ClippedReLU(3, threshold=-1)
    with pytest.raises(ValueError, match=r"even number.*\(3,\)"):
        acts.ClippedMaxMin(3)
    with pytest.raises(ValueError, match=r"even number.*\(3,\)"):
        acts.MaxMin()(jnp.ones(3))
    with pytest.raises(ValueError, match=r"\(3,\) do not fit.*\(4,\)"):
        acts.ClippedReLU(3)(jnp.ones(4))


def test_smaller_and_larger_keep_a_nan_and_have_the_gradient_of_the_one_that_is_taken():
    nan = jnp.nan
    a, b = jnp.asarray([1.0, 2.0, nan, 1.0, 3.0]), jnp.asarray([2.0, 1.0, 1.0, nan, 3.0])
    np.testing.assert_array_equal(linear.smaller(a, b), jnp.minimum(a, b))
    np.testing.assert_array_equal(linear.larger(a, b), jnp.maximum(a, b))
    to_a, to_b = jax.grad(lambda a, b: jnp.sum(linear.smaller(a, b)), argnums=(0, 1))(
        a[::2], b[::2]
    )
    assert to_a.tolist() == [1, 1, 1] and to_b.tolist() == [0, 0, 0]
    to_a, to_b = jax.grad(lambda a, b: jnp.sum(linear.larger(a, b)), argnums=(0, 1))(a[:2], b[:2])
    assert to_a.tolist() == [0, 1] and to_b.tolist() == [1, 0]
