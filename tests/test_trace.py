"""What `lipjax.trace` reads: one network however it is written, its arithmetic as executed, and a
clear error for what has no bound."""

import dataclasses
import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import outward_bound
from flax import linen, nnx
from jax import lax

import lipjax
from lipjax import activations, rounding
from lipjax.graph import Activation, Add, Linear, Rearrange, TraceError, trace

IMAGE = jax.ShapeDtypeStruct((4, 4, 1), jnp.float32)
IMAGES = jax.ShapeDtypeStruct((4, 3, 3, 2), jnp.float32)
VECTOR = jax.ShapeDtypeStruct((4,), jnp.float32)


def weights(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2, jnp.float32)


W = weights(4, 4)


# ------------------------------------------------------------- one network, written in many ways

CONV, CONV_BIAS = weights(3, 3, 1, 2), weights(2, seed=1)
FIRST, FIRST_BIAS = weights(32, 5, seed=2), weights(5, seed=3)
STACK, STACK_BIAS = weights(2, 5, 5, seed=4), weights(2, 5, seed=5)
HEAD, HEAD_BIAS = weights(5, 3, seed=6), weights(3, seed=7)
PARAMS = (CONV, CONV_BIAS, FIRST, FIRST_BIAS, STACK, STACK_BIAS, HEAD, HEAD_BIAS)


def convolution(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)


def affine(h, w, b):
    return h @ w + b


def plain(x, params=PARAMS, relu=jax.nn.relu, dense=affine):
    conv, conv_bias, first, first_bias, stack, stack_bias, head, head_bias = params
    h = relu(convolution(x[None], conv)[0] + conv_bias).reshape(-1)
    h = relu(dense(h, first, first_bias))
    for w, b in zip(stack, stack_bias, strict=True):
        h = relu(dense(h, w, b))
    return dense(h, head, head_bias)


def nnx_layers():
    rngs = nnx.Rngs(0)
    layers = [
        nnx.Conv(1, 2, (3, 3), rngs=rngs),
        *(nnx.Linear(n, m, rngs=rngs) for n, m in ((32, 5), (5, 5), (5, 5), (5, 3))),
    ]
    kernels = (CONV, FIRST, *STACK, HEAD)
    biases = (CONV_BIAS, FIRST_BIAS, *STACK_BIAS, HEAD_BIAS)
    for layer, kernel, bias in zip(layers, kernels, biases, strict=True):
        layer.kernel[...] = kernel
        layer.bias[...] = bias
    return layers


def sequential(flatten, relu=jax.nn.relu, behind=lambda shape: ()):
    """The layers in a row; `behind` gives what stands in front of the second and third."""
    conv, first, second, third, head = nnx_layers()
    hidden = (relu, *behind(5), second, relu, third, relu, head)
    return nnx.Sequential(conv, relu, flatten, first, *hidden)


class Own(nnx.Module):
    def __init__(self):
        self.layers = nnx.List(nnx_layers())

    def __call__(self, x):
        conv, *hidden, head = self.layers
        h = jax.nn.relu(conv(x)).reshape(-1)
        for layer in hidden:
            h = jax.nn.relu(layer(h))
        return head(h)


class Jitted(Own):
    @nnx.jit
    def __call__(self, x):
        return super().__call__(x)


class Rematerialised(Own):
    @nnx.remat
    def __call__(self, x):
        return super().__call__(x)


class InLinen(linen.Module):
    @linen.compact
    def __call__(self, x):
        h = linen.relu(linen.Conv(2, (3, 3), name="conv")(x)).reshape(-1)
        for k in range(3):
            h = linen.relu(linen.Dense(5, name=f"dense{k}")(h))
        return linen.Dense(3, name="head")(h)


def in_linen():
    def layer(kernel, bias):
        return {"kernel": kernel, "bias": bias}

    hidden = zip((FIRST, *STACK), (FIRST_BIAS, *STACK_BIAS), strict=True)
    params = {f"dense{k}": layer(*pair) for k, pair in enumerate(hidden)}
    params |= {"conv": layer(CONV, CONV_BIAS), "head": layer(HEAD, HEAD_BIAS)}
    return InLinen().bind({"params": params})


def in_equinox():
    """Channels first: the kernels are transposed, and so is what the first dense layer reads."""
    key = jax.random.key(0)
    conv = eqx.nn.Conv2d(1, 2, 3, padding=1, key=key)
    first = FIRST.reshape(4, 4, 2, 5).transpose(2, 0, 1, 3).reshape(32, 5)
    kernels = (first, *STACK, HEAD)
    biases = (FIRST_BIAS, *STACK_BIAS, HEAD_BIAS)
    dense = [eqx.nn.Linear(k.shape[0], k.shape[1], key=key) for k in kernels]
    held = [conv.weight, conv.bias]
    new = [CONV.transpose(3, 2, 0, 1), CONV_BIAS.reshape(2, 1, 1)]
    conv = eqx.tree_at(lambda c: [c.weight, c.bias], conv, new)
    assert [a.shape for a in held] == [a.shape for a in new]
    dense = [
        eqx.tree_at(lambda d: [d.weight, d.bias], d, [k.T, b])
        for d, k, b in zip(dense, kernels, biases, strict=True)
    ]
    relu = eqx.nn.Lambda(jax.nn.relu)
    first, second, third, head = dense
    net = eqx.nn.Sequential(
        [conv, relu, eqx.nn.Lambda(jnp.ravel), first, relu, second, relu, third, relu, head]
    )
    return lambda x: net(jnp.transpose(x, (2, 0, 1)))


def by_scan(x):
    h = jax.nn.relu(convolution(x[None], CONV) + CONV_BIAS).reshape(-1)
    h = jax.nn.relu(h @ FIRST + FIRST_BIAS)

    def layer(h, parameters):
        w, b = parameters
        return jax.nn.relu(h @ w + b), None

    h, _ = lax.scan(layer, h, (STACK, STACK_BIAS))
    return h @ HEAD + HEAD_BIAS


def batch_of_one(x):
    h = jax.nn.relu(convolution(x, CONV) + CONV_BIAS).reshape(x.shape[0], -1)
    h = jax.nn.relu(h @ FIRST + FIRST_BIAS)
    for w, b in zip(STACK, STACK_BIAS, strict=True):
        h = jax.nn.relu(h @ w + b)
    return h @ HEAD + HEAD_BIAS


def by_einsum(h, w, b):
    return jnp.einsum("n,nm->m", h, w) + b


def by_vmap(h, w, b):
    return jax.vmap(lambda column, offset: jnp.dot(h, column) + offset, (1, 0))(w, b)


def normalised(shape):
    layer = nnx.BatchNorm(shape, epsilon=0.0, rngs=nnx.Rngs(0))
    layer.eval()
    return (layer,)


def dropped(shape):
    return (nnx.Dropout(0.5, deterministic=True, rngs=nnx.Rngs(0)),)


def flat(x):
    return x.reshape(-1)


WAYS = {
    "sequential": lambda: sequential(lipjax.Flatten()),
    "own module": Own,
    "lambdas inside": lambda: sequential(flat, relu=lambda z: jax.nn.relu(z)),
    "functional": lambda: plain,
    "linen": in_linen,
    "equinox, channels first": in_equinox,
    "parameters in a tuple": lambda: functools.partial(plain, params=PARAMS),
    "closure": lambda: lambda x: plain(x, PARAMS),
    "jax.jit": lambda: jax.jit(plain),
    "nnx.jit": Jitted,
    "jax.checkpoint": lambda: jax.checkpoint(plain),
    "nnx.remat": Rematerialised,
    "dropout in inference": lambda: sequential(flat, behind=dropped),
    "batch normalisation in inference": lambda: sequential(flat, behind=normalised),
    "maximum": lambda: functools.partial(plain, relu=lambda z: jnp.maximum(z, 0)),
    "clip": lambda: functools.partial(plain, relu=lambda z: jnp.clip(z, 0)),
    "where": lambda: functools.partial(plain, relu=lambda z: jnp.where(z > 0, z, 0)),
    "lax.max": lambda: functools.partial(plain, relu=lambda z: lax.max(z, 0.0)),
    "jitted inside": lambda: functools.partial(plain, relu=jax.jit(jax.jit(jax.nn.relu))),
    "batch axis of one": lambda: batch_of_one,
    "einsum": lambda: functools.partial(plain, dense=by_einsum),
    "scan": lambda: by_scan,
    "vmap": lambda: functools.partial(plain, dense=by_vmap),
}


@jax.jit
def found(graph, x):
    bound = lipjax.bound(graph, x, 0.3, mode="linear", iterations=200)
    local = dataclasses.replace(bound, mode="local")
    return bound.lipschitz, lipjax.worst_logits(local, 0), lipjax.worst_logits(bound, 0)


def without_lines(graph):
    """The same, so that equal graphs are compiled once."""
    nodes = tuple(dataclasses.replace(node, where="") for node in graph.nodes)
    return dataclasses.replace(graph, nodes=nodes)


@functools.cache
def expected():
    x = weights(4, 4, 1, seed=9)
    return x, plain(x), found(without_lines(trace(plain, IMAGE)), x)


@pytest.mark.parametrize("way", WAYS)
def test_one_network_has_one_value_and_one_bound_however_it_is_written(way):
    f = WAYS[way]()
    x, logits, bounds = expected()
    graph = trace(f, IMAGE)
    np.testing.assert_allclose(graph(x), logits, rtol=1e-5, atol=1e-5)
    assert graph.batched == (way == "batch axis of one")
    assert [n.rule.kind for n in graph.nodes if isinstance(n, Activation)] == ["ReLU"] * 4
    for mine, theirs in zip(found(without_lines(graph), x), bounds, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=1e-4)


# ------------------------------------------------------------------------------------ clear errors


def branches(x):
    return lax.cond(x[0] > 0, lambda x: x, lambda x: -x, x)


def python_branch(x):
    return x if x[0] > 0 else -x


def loops(x):
    return lax.while_loop(lambda s: s[0] < 3, lambda s: s + x, x)


ERRORS = {
    "an unknown primitive": (lambda x: jnp.sin(x @ W), r"test_trace.py:\d+.*`sin`.*register"),
    "a product of two": (lambda x: (x @ W) * x, r"test_trace.py:\d+.*`mul` of two quantities"),
    "a loop without end": (loops, r"test_trace.py:\d+ \(loops\).*`while`"),
    "a comparison as a number": (
        lambda x: (x > 0).astype(jnp.float32) * x,
        r"test_trace.py:\d+.*comparison .*mask or a branch",
    ),
    "a comparison as the value": (lambda x: x > 0, r"comparison .*mask or a branch"),
    "a comparison that chooses another": (
        lambda x: jnp.where(x > 0, 2 * x, x + 1),
        r"test_trace.py:\d+.*comparison",
    ),
    "a comparison of two": (lambda x: jnp.where(x > x @ W, x, 0), r"test_trace.py:\d+.*`gt`"),
    "a branch on the example": (branches, r"test_trace.py:\d+ \(branches\).*branch"),
    "a branch in Python": (python_branch, r"test_trace.py:\d+ \(python_branch\): Python asks"),
    "a constant": (lambda x: jnp.ones(3), "does not depend on the example"),
    "sorting by keys": (jnp.argsort, "`sort`"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_has_no_bound_is_an_error_with_the_line_and_what_to_do(case):
    f, message = ERRORS[case]
    with pytest.raises(TraceError, match=message):
        trace(f, VECTOR, batched=False)


def test_networks_in_training_mode_are_refused_and_named():
    rngs = nnx.Rngs(0)
    layer = nnx.BatchNorm(4, rngs=rngs)
    with pytest.raises(TraceError, match=r"BatchNorm in training mode.*network\.eval\(\)"):
        trace(layer, VECTOR)
    with pytest.raises(TraceError, match=r"training mode.*network\.eval\(\)"):
        trace(lambda x: layer(x), VECTOR)
    with pytest.raises(TraceError, match=r"Dropout that is on.*random"):
        trace(nnx.Dropout(0.5, rngs=rngs), VECTOR)
    with pytest.raises(TraceError, match=r"LayerNorm.__call__.*`square`"):
        trace(nnx.LayerNorm(4, rngs=rngs), VECTOR)


def test_examples_are_floats_and_results_one_array():
    with pytest.raises(TypeError, match=r"floating, got int32"):
        trace(lambda x: x, jax.ShapeDtypeStruct((4,), jnp.int32))
    with pytest.raises(TypeError, match=r"one array"):
        trace(lambda x: (x, x), VECTOR)
    with pytest.raises(ValueError, match=r"one example of shape \(4,\).*\n.*batch of one"):
        trace(nnx.Linear(5, 3, rngs=nnx.Rngs(0)), VECTOR)
    with pytest.raises(ValueError, match=r"batch of 4.*one example"):
        trace(lambda x: convolution(x, weights(1, 1, 2, 2)), IMAGES, batched=False)
    with pytest.raises(TraceError, match=r"loop of 300 rounds"):
        trace(lambda x: lax.scan(lambda h, _: (h * 0.5, None), x, length=300)[0], VECTOR)
    with pytest.raises(TraceError, match=r"loop of 0 rounds"):
        trace(lambda x: lax.scan(lambda h, w: (h @ w, h), x, jnp.zeros((0, 4, 4)))[0], VECTOR)


def test_what_the_next_call_may_do_otherwise_is_not_certified():
    """Random numbers and rounded decisions that do not depend on the example."""

    def chance():
        return jax.random.uniform(jax.random.key(0))

    def cropped(x):
        return (
            lax.dynamic_slice(x, (jax.random.randint(jax.random.key(0), (), 0, 2),), (2,)) @ W[:2]
        )

    with pytest.raises(TraceError, match=r"test_trace.py:\d+.*random"):
        trace(lambda x: lax.cond(chance() < 0.5, lambda x: x @ W, lambda x: x, x), VECTOR)
    noisy = (
        cropped,
        lambda x: x[jax.random.permutation(jax.random.key(0), 4)] @ W,
        lambda x: (x * chance()) @ W,
        lambda x: x @ W + chance(),
        lambda x: jnp.maximum(x @ W, chance()),
        lambda x: jnp.pad(x, 1, constant_values=chance()),
    )
    for f in noisy:
        with pytest.raises(TypeError, match=r"test_trace.py:\d+.*computed anew at every call"):
            rounding.arithmetics_of(trace(f, VECTOR))
    # What is exact is no chance: positions and branches by integers and parameters.
    exact = (
        lambda x: x[jnp.arange(3) + 1] @ W[:3],
        lambda x: x[jnp.where(W[0] > 0, 1, 0)] @ W,
        lambda x: lax.cond(W[0, 0] > 0, lambda x: x @ W, lambda x: x @ W.T, x),
        lambda x: jnp.maximum(x @ W, jnp.maximum(W[0], 0)),
    )
    for f in exact:
        rounding.arithmetics_of(trace(f, VECTOR))


class Counts(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        self.calls = nnx.Variable(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        return self.layer(x) * self.calls[...]


class Watched(Jitted):
    def __call__(self, x):
        self.seen = nnx.Intermediate(x)
        return super().__call__(x)


def test_a_network_that_changes_itself_is_refused():
    with pytest.raises(TraceError, match=r"changes its own state.*calls.*network\.eval"):
        trace(Counts(), VECTOR)
    # What is only written down, or put in its place unchanged, is no change.
    net = Watched()
    for like in (IMAGE, jax.ShapeDtypeStruct((4, 4, 1), jnp.float32)):
        assert len(trace(net, like).linear) == 5
    assert jax.jit(lambda net, x: trace(net, x)(x))(net, weights(4, 4, 1)).shape == (3,)


# ---------------------------------------------------------------- the arithmetic, from equations


def test_a_sum_that_is_scaled_twice_is_scaled_twice():
    x = weights(4, seed=3)
    for f in (
        lambda x: (jnp.sum(x.reshape(2, 2), 0) / 3) * 5,
        lambda x: (jnp.mean(x.reshape(2, 2), 1) * 3) / 7,
    ):
        graph = trace(f, VECTOR)
        np.testing.assert_allclose(graph(x), f(x), rtol=1e-6)
        (node,) = (graph.nodes[i] for i in graph.linear)
        assert len(node.executed) >= 3 and 1 <= node.roundings <= 5
    (pooled,) = (
        n
        for n in trace(lambda x: jnp.sum(x.reshape(2, 2), 0) / 8, VECTOR).nodes
        if isinstance(n, Linear)
    )
    assert pooled.roundings == 0


def names(f, example=VECTOR):
    """The arithmetics that a graph is executed in, node by node."""
    graph = trace(f, example)
    return [{a.name for a in each} for each in rounding.arithmetics_of(graph) if each]


class Narrow(nnx.Linear):
    """A subclass that computes otherwise than its class."""

    def __call__(self, x):
        return super().__call__(x.astype(jnp.bfloat16)).astype(jnp.float32)


def narrowing(arguments, *, dtype=None, **rest):
    return tuple(None if a is None else jnp.asarray(a, jnp.bfloat16) for a in arguments)


def test_arithmetic_inside_of_layers_is_seen():
    rngs = nnx.Rngs(0)
    layer = nnx.Linear(4, 3, rngs=rngs)
    half = jnp.bfloat16
    assert names(layer) == [{"float32"}]
    assert names(lambda x: layer(x.astype(half))) == [{"bfloat16"}, {"float32"}]
    assert names(Narrow(4, 3, rngs=rngs)) == [{"bfloat16"}, {"float32"}]
    assert names(Narrow(4, 3, dtype=half, rngs=rngs)) == [{"bfloat16"}, {"bfloat16"}]
    own = nnx.Linear(4, 3, promote_dtype=narrowing, rngs=rngs)
    assert names(own) == [{"bfloat16"}, {"bfloat16"}]
    wide = functools.partial(jnp.dot, b=W.astype(half), preferred_element_type=jnp.float32)
    assert names(lambda x: wide(x.astype(half))) == [{"bfloat16"}, {"bfloat16"}]
    graph = trace(lambda x: wide(x.astype(half)), VECTOR)
    assert (
        graph.nodes[-1].executed[0].accumulate == "float32" and graph.nodes[-1].dtype == "float32"
    )
    pool = trace(lambda x: lax.reduce_sum(x.astype(half), (0, 1)), IMAGE, batched=False)
    assert pool.nodes[-1].executed[0].operands == ("bfloat16",)
    (window, *_) = rounding.arithmetics_of(pool)[-1]
    assert window.name == "bfloat16" and window.accumulate == 2.0**-8

    high = trace(nnx.Linear(4, 3, precision="highest", rngs=rngs), VECTOR)
    assert [e.precision for e in high.nodes[-1].executed] == ["HIGHEST", None]
    layer.use_bias = False
    layer.bias = None
    assert len(trace(layer, VECTOR).nodes[-1].executed) == 1


@pytest.mark.parametrize("operands", [jnp.float32, jnp.bfloat16])
def test_a_product_by_an_algorithm_that_adds_up_in_bfloat16_is_refused(operands):
    """Also where the operands are of that type themselves, whose products are summed in float32."""
    preset = lax.DotAlgorithmPreset.BF16_BF16_BF16

    def f(x):
        return lax.dot(x.astype(operands), W.astype(operands), precision=preset)

    with pytest.raises(TypeError, match=r"BF16_BF16_BF16, which the error model does not know"):
        names(f)


def test_other_types_are_refused_with_the_line():
    for f in (
        lambda x: (x.astype(jnp.float16) @ W.astype(jnp.float16)).astype(jnp.float32),
        lambda x: x.astype(jnp.float16).astype(jnp.float32) @ W,
    ):
        with pytest.raises(TypeError, match=r"test_trace.py:\d+.*float16"):
            names(f)


def roundings(f):
    graph = trace(f, VECTOR)
    return max(getattr(node, "roundings", 0.0) for node in graph.nodes)


def test_roundings_of_parameters_that_are_computed_are_counted():
    rngs = nnx.Rngs(0)
    layer = nnx.Linear(4, 4, rngs=rngs)
    layer.eval()
    assert roundings(layer) == 0
    assert roundings(lambda x: x @ (W.T.reshape(2, 8).reshape(4, 4) * 1.5)) == 1
    assert roundings(lambda x: x @ jax.jit(lambda w: jnp.abs(w).T)(W)) == 0
    norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
    assert 0 < roundings(norm) < 10
    rounding.arithmetics_of(trace(norm, VECTOR))

    solved = trace(lambda x: x @ jnp.linalg.solve(W + 4 * jnp.eye(4), W), VECTOR)
    assert solved.nodes[-1].roundings == math.inf
    with pytest.raises(TypeError, match=r"test_trace.py:\d+.*computed anew"):
        rounding.arithmetics_of(solved)


def test_a_cast_that_a_compiler_may_drop_is_counted():
    """XLA may keep the digits of ``float32 -> bfloat16 -> float32``."""
    assert roundings(lambda x: x.astype(jnp.bfloat16) @ W.astype(jnp.bfloat16)) == 1
    with pytest.raises(TypeError, match="computed anew"):
        names(lambda x: x @ W.astype(jnp.bfloat16).astype(jnp.float32))
    held = W.astype(jnp.bfloat16)  # stored so: widening it is exact
    assert names(lambda x: x @ held.astype(jnp.float32)) == [{"float32"}]


def test_a_threshold_that_is_compared_and_one_that_is_chosen_are_both_exact():
    held = jnp.sqrt(W[0] ** 2 + 1)

    def jumps(x):
        return jnp.where(x > jnp.sqrt(W[0] ** 2 + 1), x, held)

    with pytest.raises(TypeError, match="computed anew"):
        rounding.arithmetics_of(trace(jumps, VECTOR))


# ---------------------------------------------------------- composites, by what they compute


def kinds(f):
    return [n.rule.kind for n in trace(f, VECTOR).nodes if isinstance(n, Activation)]


def test_a_function_that_is_only_called_relu_is_none():
    @jax.jit
    def relu(z):
        return jnp.maximum(z, 0.1 * z)

    @jax.jit
    def maxmin(z):
        a, b = jnp.split(z, 2)
        return jnp.concatenate([jnp.maximum(a, b), jnp.maximum(a, -b)])

    assert kinds(relu) != ["ReLU"]
    x = weights(4, seed=5)
    for f in (relu, maxmin):
        np.testing.assert_allclose(trace(f, VECTOR)(x), f(x), rtol=1e-6)


def test_relu_is_known_inside_of_any_calls():
    nested = jax.jit(jax.checkpoint(jax.jit(lambda z: jax.vmap(jax.jit(jax.nn.relu))(z))))
    assert kinds(nested) == ["ReLU"]


def scaled(constant):
    """A rule of a function that halves, and a function with a constant in its closure."""

    @jax.jit
    def reference(z):
        return jnp.sin(z) * constant

    @activations.rule()
    class Made(activations.Rule):
        def __call__(self, z):
            return reference(z)

    return reference, Made


def test_the_newest_rule_of_a_jaxpr_counts():
    (first, one), (second, two) = scaled(0.5), scaled(0.5)
    activations.register(first, one)
    activations.register(second, two)
    for f in (first, second):
        (node,) = (n for n in trace(f, VECTOR).nodes if isinstance(n, Activation))
        assert type(node.rule) is two
    activations.register(first, one)
    (node,) = (n for n in trace(second, VECTOR).nodes if isinstance(n, Activation))
    assert type(node.rule) is one


def test_a_reference_that_cannot_be_traced_for_a_call_is_none_of_it():
    def of_five_axes(z):
        assert z.ndim == 5, "another shape"
        return jnp.sin(z)

    activations.register(of_five_axes, scaled(0.5)[1])
    assert kinds(jax.nn.relu) == ["ReLU"]


def test_what_cannot_be_told_from_a_call_is_refused_when_it_is_registered():
    reference, made = scaled(0.25)
    with pytest.raises(TypeError, match="cannot be registered: expected a function"):
        activations.register(lambda *arrays: reference(arrays[0]), made)
    with pytest.raises(TypeError, match="cannot be registered: expected a function"):
        activations.register(dict, made)
    # Of a partial the parameters are known.
    part = functools.partial(lambda z, factor: jnp.sin(z) * factor, factor=0.125)
    activations.register(part, made)
    (node,) = (n for n in trace(jax.jit(part), VECTOR).nodes if isinstance(n, Activation))
    assert type(node.rule) is made


def test_functions_with_other_arrays_inside_are_others():
    """JAX prints a jaxpr without the arrays that it holds."""
    reference, made = scaled(jnp.arange(4.0))
    other, _ = scaled(jnp.arange(4.0) + 1)
    nested = jax.jit(lambda z: reference(z))
    activations.register(reference, made)
    activations.register(nested, made)
    for f in (other, jax.jit(lambda z: other(z))):
        with pytest.raises(TraceError, match="sin"):
            trace(f, VECTOR)


# ------------------------------------------------------------------------------- rearrangements


def positions(indices):
    return lambda x: x[jnp.asarray(indices)]


REARRANGED = {  # and in how many places the most frequent entry ends
    "broadcast": (lambda x: jnp.broadcast_to(x, (3, 4)).reshape(-1), 3),
    "tile": (lambda x: jnp.tile(x, 3), 3),
    "repeat": (lambda x: jnp.repeat(x, 2), 2),
    "gather": (positions([0, 0, 3, 0]), 3),
    "permutation": (positions([2, 0, 3, 1]), 1),
    "wrap": (lambda x: jnp.pad(x, 2, mode="wrap"), 2),
    "reflect": (lambda x: jnp.pad(x, 2, mode="reflect"), 3),
    "edge": (lambda x: jnp.pad(x, (0, 3), mode="edge"), 4),
    "wrap of two axes": (lambda x: jnp.pad(x.reshape(2, 2), 1, mode="wrap").reshape(-1), 4),
    "parts": (lambda x: jnp.concatenate([x[1:], x, x[:1], x[2:]]), 3),
    "zeros between": (lambda x: lax.pad(x, 0.0, [(1, 1, 1)]), 1),
    "unstack": (lambda x: jnp.stack(jnp.unstack(x.reshape(2, 2), axis=1)).reshape(-1), 1),
    "stack": (lambda x: jnp.stack([x, x[::-1]]).reshape(-1), 2),
}


@pytest.mark.parametrize("case", REARRANGED)
def test_radii_behind_copies_are_sound_and_tight(x64, case):
    f, copies = REARRANGED[case]
    graph = trace(f, jax.ShapeDtypeStruct((4,), jnp.float64))
    (node,) = (n for n in graph.nodes if isinstance(n, Rearrange))
    assert node.copies == copies
    x, epsilon = np.arange(4.0), 0.3
    np.testing.assert_array_equal(graph(jnp.asarray(x)), f(jnp.asarray(x)))
    matrix = np.asarray(jax.jacobian(f)(jnp.asarray(x)))
    exact = np.linalg.norm(matrix, 2) * epsilon
    region = outward_bound(graph.with_head(), x, epsilon, "local").penultimate
    assert exact <= region.radius <= exact * (1 + 1e-9)
    lower, upper = f(jnp.asarray(x - epsilon)), f(jnp.asarray(x + epsilon))
    assert np.all(region.lower <= lower) and np.all(upper <= region.upper)


def test_a_row_through_copies_is_the_gradient(x64):
    f = REARRANGED["wrap of two axes"][0]
    head = jnp.asarray(weights(16, 2, seed=8), jnp.float64)
    x, epsilon = jnp.arange(4.0), 0.2
    bound = lipjax.bound(lambda x: f(x) @ head, x, epsilon, mode="linear")
    gain = (lipjax.worst_logits(bound, 0) - bound.logits)[1]
    gradient = jax.grad(lambda x: f(x) @ (head[:, 1] - head[:, 0]))(x)
    np.testing.assert_allclose(gain, epsilon * np.linalg.norm(gradient), rtol=1e-9)


@pytest.mark.parametrize("pad", ["wrap", "reflect"])
def test_positions_are_no_numbers_that_a_certificate_would_cast(pad):
    head = weights(8, 3, seed=8)
    x = np.abs(weights(2, 4, seed=9))

    def f(x):
        return jnp.pad(x, 2, mode=pad)[jnp.arange(8)] @ head

    found = lipjax.certify(f, x, None, 1e-3, tier="deterministic")
    np.testing.assert_array_equal(found.predicted, np.argmax(jax.vmap(f)(x), axis=1))
    assert found.certified.all()
    assert len(jax.tree.leaves(trace(f, VECTOR))) == 1


def one_node(f):
    """The kinds of nodes behind the example."""
    return [type(node) for node in trace(f, VECTOR).nodes[1:]]


def test_parts_of_a_node_put_together_are_the_node():
    assert one_node(lambda x: jnp.concatenate([x[:1], x[1:3], x[3:]]) @ W) == [Linear]
    assert one_node(lambda x: jnp.concatenate(jnp.split(x, 4)) @ W) == [Linear]
    assert one_node(lambda x: jnp.stack([x[:2], x[2:]]).reshape(-1) @ W) == [Linear]
    assert one_node(lambda x: x.reshape(2, 2).T.T.reshape(-1) @ W) == [Linear]
    assert one_node(lambda x: jnp.concatenate([x[2:], x[:2]]) @ W) == [Rearrange, Linear]


def test_scales_and_shifts_behind_what_constants_say_are_nodes_of_their_own():
    x, three = weights(4, seed=12), jnp.asarray([2.0, 1.0, 3.0])
    for f, kinds in (
        (lambda x: (x @ W)[jnp.asarray([0, 2, 1])] * three, [Linear, Rearrange, Linear]),
        (lambda x: (x @ W)[jnp.asarray([0, 2, 1])] + three, [Linear, Rearrange, Add]),
        (lambda x: lax.pad(x[:1], 5.0, [(1, 1, 0)]) * three, [Rearrange, Linear]),
    ):
        assert one_node(f) == kinds
        np.testing.assert_allclose(trace(f, VECTOR)(x), f(x), rtol=1e-6)


def by_hand(x):
    a, b = x[:2], x[2:]
    return jnp.concatenate([jnp.maximum(a, b), jnp.minimum(a, b)])


def test_maxmin_by_hand_is_one_node_without_copies():
    def other_way(x):
        return jnp.concatenate([jnp.maximum(*jnp.split(x, 2)), jnp.minimum(x[2:], x[:2])])

    def last_axis(x):
        a, b = jnp.split(x.reshape(2, 2), 2, axis=-1)
        return jnp.concatenate([lax.max(a, b), lax.min(a, b)], axis=-1)

    x = weights(4, seed=11)
    for f in (by_hand, other_way, activations.maxmin):
        graph = trace(lambda x, f=f: f(x @ W), VECTOR)
        assert [type(node) for node in graph.nodes[1:]] == [Linear, Activation]
        np.testing.assert_allclose(graph(x), activations.maxmin(x @ W), rtol=1e-6)
    assert one_node(lambda x: last_axis(x).reshape(-1)).count(Activation) == 1


def test_equal_rearrangements_are_made_once():
    def f(x):
        return (x[:2] * 2 + x[:2]) @ W[:2]

    assert one_node(f).count(Rearrange) == 1
    assert one_node(lambda x: (x[:2] + x[2:]) @ W[:2]).count(Rearrange) == 2
    filled = lambda x: lax.pad(x, 0.0, [(1, 0, 0)]) + lax.pad(x, 1.0, [(1, 0, 0)])  # noqa: E731
    assert one_node(filled).count(Rearrange) == 2


def test_positions_may_be_computed_inside_of_jit():
    x = jnp.arange(4.0)
    graph = jax.jit(lambda x: trace(lambda x: x[jnp.arange(3)[::-1] + 1], x))(x)
    np.testing.assert_array_equal(graph(x), [3.0, 2.0, 1.0])


# ------------------------------------------------------------------------------------- printing


def test_the_table_says_what_is_computed_where_and_how_it_is_bounded():
    text = str(trace(lambda x: jax.nn.relu(jnp.pad(x @ W, 1, mode="wrap"))[:3], VECTOR))
    lines = text.splitlines()
    for word in ("node", "reads", "shape", "computed in", "parameters", "bounded by", "where"):
        assert word in lines[0]
    assert "norm of W" in text and "exact, 2 copies" in text
    assert "1-Lipschitz, box, slopes" in text and "16 parameters" in lines[-1]
    assert all("test_trace.py" in line for line in lines[3:-1])


@pytest.mark.parametrize("way", ["sequential", "equinox, channels first", "linen"])
def test_lines_of_libraries_are_not_shown_as_the_users(way):
    text = str(trace(WAYS[way](), IMAGE))
    assert "site-packages" not in text and "ufunc" not in text
    assert "Conv.__call__" in text or "test_trace.py" in text


def test_sums_and_casts_are_in_the_table():
    text = str(trace(lambda x: (x.astype(jnp.bfloat16) + 1).astype(jnp.float32) + x, VECTOR))
    assert "Cast" in text and "sum of bounds" in text and "bfloat16" in text
    assert any(isinstance(node, Add) for node in trace(lambda x: x + x, VECTOR).nodes)


def test_a_line_that_was_typed_at_a_prompt_is_named():
    typed: dict = {}
    exec(compile("def f(x):\n    return x * 2.0\n", "<stdin>", "exec"), typed)
    assert trace(typed["f"], jnp.zeros(3)).nodes[1].where == "<stdin>:2 (f)"
