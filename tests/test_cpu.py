"""What `for_cpu` rewrites stays the same function: every convolution's gradients, in loops and
under rematerialisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import lipjax
from lipjax.runtime import cpu


def primitives(function, *arguments) -> list:
    """Every equation of the function, those of its loops and branches included."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for inner in cpu.jaxprs_in(tuple(equation.params.values())):
                yield from walk(inner)

    return list(walk(jax.make_jaxpr(function)(*arguments).jaxpr))


def agree(function, *arguments):
    """The same results, up to rounding, with and without rewriting."""
    plain, rewritten = jax.jit(function)(*arguments), jax.jit(lipjax.for_cpu(function))(*arguments)
    assert jax.tree.structure(plain) == jax.tree.structure(rewritten)
    for expected, found in zip(jax.tree.leaves(plain), jax.tree.leaves(rewritten), strict=True):
        assert expected.shape == found.shape and expected.dtype == found.dtype
        scale = float(np.max(np.abs(expected), initial=1e-3))
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * scale)


def images(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


geometries = st.tuples(
    st.integers(5, 8),  # height; the width is one more
    # channels: thin images are one product, others a loop over the kernel
    st.sampled_from([1, 3, 40]),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),  # kernel
    st.tuples(st.integers(1, 3), st.integers(1, 3)),  # strides
    st.tuples(st.integers(0, 2), st.integers(0, 2)),  # padding, low and high
    st.integers(1, 2),  # dilation of the kernel
    st.integers(1, 2),  # dilation of the images
)


@settings(max_examples=60)
@given(geometries)
def test_gradients_of_any_convolution_and_of_its_transpose_stay_what_they_are(geometry):
    height, channels, kernel, strides, pad, spread, apart = geometry
    assume(max((k - 1) * spread + 1 for k in kernel) <= (height - 1) * apart + 1 + sum(pad))
    x = images(0, 2, height, height + 1, channels)
    w = images(1, *kernel, channels, 4)

    def convolution(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            strides,
            (pad, pad),
            lhs_dilation=(apart, apart),
            rhs_dilation=(spread, spread),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def gradients(x, w):
        y, back = jax.vjp(convolution, x, w)
        v = jnp.sin(y)

        def transposed(w):  # as a power iteration differentiates it
            return jnp.sum(
                jnp.cos(jax.linear_transpose(functools.partial(convolution, w=w), x)(v)[0])
            )

        return back(v), jax.grad(transposed)(w)

    agree(gradients, x, w)


def test_other_ranks_groups_and_types_stay_as_they_are(x64):
    line, kernel = images(0, 3, 12, 6), images(1, 4, 6, 8)

    def one_axis(x, w):
        out = jax.lax.conv_general_dilated(
            x, w, (2,), ((1, 1),), dimension_numbers=("NHC", "HIO", "NHC")
        )
        return jnp.sum(jnp.sin(out))

    agree(jax.grad(one_axis, argnums=(0, 1)), line, kernel)

    def grouped(x, w):
        out = jax.lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )
        return jnp.sum(jnp.sin(out))

    agree(jax.grad(grouped, argnums=(0, 1)), images(2, 2, 7, 7, 6), images(3, 3, 3, 3, 4))
    double = jax.grad(one_axis, argnums=(0, 1))
    arguments = line.astype(jnp.float64), kernel.astype(jnp.float64)
    names = [e.primitive.name for e in primitives(double, *arguments)]
    assert [e.primitive.name for e in primitives(lipjax.for_cpu(double), *arguments)].count(
        "conv_general_dilated"
    ) == names.count("conv_general_dilated")


def test_loops_branches_rematerialisation_and_sums_are_gone_through():
    w, x = images(0, 3, 3, 8, 8), images(1, 4, 6, 6, 8)

    def convolution(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def block(w, x):
        return jnp.tanh(convolution(jax.nn.relu(x), w) * 0.3)

    def loss(w, x):
        y = jax.lax.scan(lambda x, _: (block(w, x), None), x, length=3)[0]
        y = jax.lax.cond(jnp.sum(y) > 0, lambda y: convolution(y, w), lambda y: y, y)
        return jnp.sum(jnp.square(jnp.sum(y, axis=0)))

    def descend(w, x):
        return jax.lax.fori_loop(0, 3, lambda _, w: w - 1e-3 * jax.grad(loss)(w, x), w)

    agree(descend, w, x)
    # No convolution over the examples is left, at whatever depth: those are what is slow.
    found = [
        e
        for e in primitives(lipjax.for_cpu(descend), w, x)
        if e.primitive.name == "conv_general_dilated"
    ]
    assert found and all(tuple(e.params["dimension_numbers"][0]) == (0, 3, 1, 2) for e in found)
    before = [e for e in primitives(descend, w, x) if e.primitive.name == "conv_general_dilated"]
    assert any(tuple(e.params["dimension_numbers"][0]) == (3, 0, 1, 2) for e in before)


def test_a_nan_is_not_lost_on_the_way():
    x = jnp.asarray([jnp.nan, 1.0])

    def spread_and_sum(x):
        return jnp.sum(jnp.broadcast_to(x[:, None], (2, 1024)) * 2, axis=0)

    assert np.all(np.isnan(jax.jit(lipjax.for_cpu(spread_and_sum))(x)))


@pytest.mark.parametrize(
    "activation, mode",
    [("clipped_relu", "local"), ("clipped_maxmin", "local"), ("clipped_relu", "linear")],
)
def test_a_bound_and_its_gradient_are_the_same(activation, mode):
    network = lipjax.models.small_conv(
        activation=activation, widths=(8,), dense=8, threshold=0.3, rngs=nnx.Rngs(0)
    )
    x = jnp.abs(images(0, 4, 8, 8, 1))

    def loss(network, x):
        def one(x):
            how = {"mode": mode, "iterations": 40, "key": jax.random.key(1)}
            bound = lipjax.bound(network, x, 0.2, **how)
            return jnp.sum(lipjax.worst_logits(bound, 1)) + bound.lipschitz

        return jnp.mean(jax.vmap(one)(x))

    agree(jax.value_and_grad(loss), network, x)


def test_equations_with_named_tuples_in_their_parameters_are_rewritten_too():
    """As `jnp.linalg.solve` has, and with it `lipjax.CayleyLinear`, beside a convolution that is
    rewritten."""
    kernel, layer = images(0, 3, 3, 2, 4), lipjax.CayleyLinear(16, 8, rngs=nnx.Rngs(0))

    def value(kernel, x, layer):
        out = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(jnp.tanh(jax.vmap(layer)(out.mean(axis=(1, 2, 3))[:, None] * jnp.ones(16))))

    agree(jax.grad(value, argnums=(0, 2)), kernel, images(1, 2, 5, 5, 2), layer)
