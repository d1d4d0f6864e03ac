"""Smooth activations: their constants proved in decimal arithmetic, their rules on samples, how far
XLA's are off, and how they are read; a softmax at the end."""

import dataclasses
import decimal
import functools
import math
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import outward_bound
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lipjax
from lipjax import rounding
from lipjax.activations import Elu, Smooth, smooth
from lipjax.bounds import Region
from lipjax.bounds.relaxed import largest_product
from lipjax.formats import certificate_files
from lipjax.graph import Activation, TraceError, trace
from lipjax.graph.nodes import evaluate

SIZE = 8
RULES = {**{name: Smooth(name) for name in smooth.CURVES}, "elu": Elu(1.0), "elu, -0.5": Elu(-0.5)}

# --------------------------------------------------------------------- in decimal arithmetic

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640629")
A = Decimal("0.044715")


@pytest.fixture(autouse=True)
def digits():
    with decimal.localcontext(prec=60):
        yield


def normal(x):
    """The distribution function, by ``1/2 + density sum x^(2k+1) / (1 3 5 ... (2k+1))``."""
    total = term = x
    k = 1
    while abs(term) > Decimal(10) ** -58:
        term = term * x * x / (2 * k + 1)
        total += term
        k += 1
    return Decimal("0.5") + density(x) * total


def density(x):
    return (-x * x / 2).exp() / (2 * PI).sqrt()


def sigmoid(x):
    return 1 / (1 + (-x).exp()) if x > 0 else x.exp() / (1 + x.exp())


def tanh(x):
    return 2 * sigmoid(2 * x) - 1


def bent(x):
    return (2 / PI).sqrt() * (x + A * x**3)


def bent_slope(x):
    return (2 / PI).sqrt() * (1 + 3 * A * x * x)


# Gate, its derivative, and f'' but for a positive factor.
GATES = {
    "gelu": (normal, density, lambda x: 2 - x * x),
    "silu": (sigmoid, lambda x: sigmoid(x) * sigmoid(-x), lambda x: 2 - x * tanh(x / 2)),
    "gelu_tanh": (
        lambda x: sigmoid(2 * bent(x)),
        lambda x: 2 * bent_slope(x) * sigmoid(2 * bent(x)) * sigmoid(-2 * bent(x)),
        lambda x: (
            (1 + 6 * A * x * x) / (1 + 3 * A * x * x) ** 2 - (2 / PI).sqrt() * x * tanh(bent(x))
        ),
    ),
}


def exact_value(name, x):
    if name in GATES:
        return x * GATES[name][0](x)
    if name.startswith("elu"):
        return x if x > 0 else Decimal(RULES[name].alpha) * (x.exp() - 1)
    return {
        "sigmoid": sigmoid,
        "tanh": tanh,
        "softplus": lambda x: (1 + x.exp()).ln(),
        "softsign": lambda x: x / (1 + abs(x)),
        "hard_swish": lambda x: x * min(max(x + 3, Decimal(0)), Decimal(6)) / 6,
    }[name](x)


def exact_slope(name, x):
    if name in GATES:
        return GATES[name][0](x) + x * GATES[name][1](x)
    if name == "softplus":
        return sigmoid(x)
    if name == "softsign":
        return 1 / (1 + abs(x)) ** 2
    if name == "hard_swish":
        return (2 * x + 3) / 6 if abs(x) < 3 else Decimal(int(x > 0))
    return sigmoid(x) * sigmoid(-x) if name == "sigmoid" else 1 - tanh(x) ** 2


@pytest.mark.parametrize("name", GATES)
def test_where_gated_functions_turn_and_how_far_they_go_is_proved(name):
    gate, gate_slope, bends = GATES[name]
    curve = smooth.CURVES[name]
    first, last = (Decimal(repr(x)) for x in dataclasses.astuple(curve.slope_turns[1])[:2])
    assert bends(first) > 0 > bends(last)
    most = gate(last) + last * gate_slope(first)
    assert most <= Decimal(curve.slope_turns[1].extreme) < most + Decimal("1e-11")
    assert curve.lipschitz == curve.slope_turns[1].extreme
    mirror = curve.slope_turns[0]
    assert (mirror.first, mirror.last) == (-float(last), -float(first))
    assert Decimal(mirror.extreme) <= 1 - most + Decimal("1e-16")

    (turn,) = curve.value_turns
    first, last = Decimal(repr(turn.first)), Decimal(repr(turn.last))
    assert exact_slope(name, first) < 0 < exact_slope(name, last)
    least = first * gate(last)
    assert least - Decimal("1e-11") < Decimal(turn.extreme) <= least
    # f'' has the sign that the text says on a grid: one zero for x > 0.
    signs = [bends(Decimal(k) / 8) > 0 for k in range(1, 80)]
    assert signs == sorted(signs, reverse=True) and any(signs) and not all(signs)


def grid(count=160):
    rng = np.random.default_rng(0)
    far = rng.uniform(10, 20, count // 4)
    return np.concatenate(
        [rng.uniform(-9, 9, count), far, -far, rng.normal(size=8) * 1e-6, [0.0, -30.0, 30.0, -12.0]]
    )


@pytest.mark.parametrize("name", RULES)
def test_values_and_slopes_in_float64_are_off_by_less_than_the_rules_say(x64, name):
    rule, points = RULES[name], grid()
    values = np.asarray(rule(jnp.asarray(points)))
    allowed = np.asarray(rule.evaluation_error(jnp.asarray(values)))
    for x, value, room in zip(points, values, allowed, strict=True):
        assert abs(Decimal(value) - exact_value(name, Decimal(x))) <= Decimal(room) / 4
    if name in smooth.CURVES:
        for x, slope in zip(points, np.asarray(rule.curve.slope(jnp.asarray(points))), strict=True):
            off = abs(Decimal(slope) - exact_slope(name, Decimal(x)))
            assert off <= Decimal(smooth.SLOPE_ERROR) / 4


# --------------------------------------------------------------------------------- on samples


def value_of(rule):
    """In NumPy and SciPy."""
    gates = {
        "gelu": scipy.special.ndtr,
        "silu": scipy.special.expit,
        "gelu_tanh": lambda z: scipy.special.expit(
            2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
        ),
        "hard_swish": lambda z: np.minimum(np.maximum(z + 3, 0), 6) / 6,
    }
    if rule.kind in gates:
        return lambda z: z * gates[rule.kind](z)
    return {
        "sigmoid": scipy.special.expit,
        "tanh": np.tanh,
        "softplus": lambda z: np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z))),
        "softsign": lambda z: z / (1 + np.abs(z)),
        "elu": lambda z: np.where(z > 0, z, rule.alpha * np.expm1(np.minimum(z, 0))),
    }[rule.kind]


@functools.cache
def relaxed_by(rule_type, name):
    """The rule's methods on a box, compiled."""
    rule = rule_type(name)

    @jax.jit
    def found(center, lower, upper, radius):
        ends = rule.interval(lower, upper)
        after = Region(rule(center), radius, *ends)
        (relaxation,) = rule.relaxations(center, lower, upper, radius, after, rounding.OUTWARD)
        most = largest_product(
            jnp.ones(SIZE), relaxation.reach, relaxation.radius, rounding.OUTWARD
        )
        return ends, relaxation, most, rule.lipschitz_on(lower, upper)

    return rule, found


def violations(rule_type, argument, seed, width) -> int:
    """How many guarantees of the rule are broken on points of a box."""
    rule, on_box = relaxed_by(rule_type, argument)
    rng, broken, value = np.random.default_rng(seed), 0, value_of(rule)
    center = np.round(rng.normal(size=SIZE) * 2, 1)
    below, above = (rng.uniform(0, width, SIZE) * rng.integers(0, 2, SIZE) for _ in range(2))
    lower, upper = center - below, center + above
    radius = float(np.linalg.norm(np.maximum(center - lower, upper - center)))
    ends, found, most, growth = on_box(center, lower, upper, radius)
    start = value(center)
    kinks = np.array([0.0, 1.4142, -1.4142, 2.3994, -2.3994, -0.7518, -1.2785, -1.5, 3.0, -3.0])
    for k in range(16):
        z = np.where(rng.integers(0, 2, SIZE), lower, upper)
        if k % 2:
            z = np.clip(rng.choice(kinks, SIZE), lower, upper)
        moved = value(z) - start
        broken += np.any(value(z) < ends[0]) + np.any(value(z) > ends[1])
        broken += np.linalg.norm(moved) > growth * np.linalg.norm(z - center) + 1e-12
        error = moved - np.asarray(found.slope) * (z - center)
        broken += np.any(np.abs(error) > found.reach + 1e-14)
        broken += np.linalg.norm(error) > found.radius + 1e-14
        broken += np.sum(error) > most + 1e-13
    return int(broken)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), width=st.sampled_from([0.01, 0.5, 4.0]))
@pytest.mark.parametrize("name", RULES)
def test_what_the_rules_say_of_a_box_holds_on_samples(name, seed, width):
    rule = RULES[name]
    argument = rule.name if isinstance(rule, Smooth) else rule.alpha
    with jax.enable_x64(True):
        assert violations(type(rule), argument, seed, width) == 0


class NoTurns(Smooth):
    """Takes the slopes at the ends for the extreme ones."""

    def slopes(self, lower, upper):
        return smooth._extent(self.curve.slope, (), lower, upper)


class Monotone(Smooth):
    """Takes the values at the ends for the extreme ones."""

    def interval(self, lower, upper):
        low, high = smooth._extent(self.curve.value, (), lower, upper)
        return low - self.evaluation_error(low), high + self.evaluation_error(high)


class HalfReach(Smooth):
    """Says half of the error."""

    def relaxations(self, *arguments):
        (found,) = super().relaxations(*arguments)
        return (dataclasses.replace(found, reach=found.reach / 2, radius=found.radius / 2),)


class NoKink(Elu):
    """Forgets that with alpha < 0 it falls to 0 and rises again."""

    def interval(self, lower, upper):
        ends = self(lower), self(upper)
        return jnp.minimum(*ends) - 1e-12, jnp.maximum(*ends) + 1e-12


@pytest.mark.parametrize(
    ("wrong", "argument"),
    [(NoTurns, "silu"), (NoTurns, "tanh"), (Monotone, "gelu"), (HalfReach, "softplus")]
    + [(NoTurns, "hard_swish"), (NoTurns, "softsign"), (NoKink, -0.5)],
)
def test_a_rule_that_is_wrong_on_purpose_is_caught(x64, wrong, argument):
    assert sum(violations(wrong, argument, seed, 4.0) for seed in range(30)) > 0


# ------------------------------------------------------------------------------ as it is executed

FUNCTIONS = {
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "elu": jax.nn.elu,
    "softsign": jax.nn.soft_sign,
    "hard_swish": jax.nn.hard_swish,
}


def scale_of(name, size):
    return np.asarray(RULES[name].scale(size) * np.ones_like(size))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("compiled", [True, False])
def test_on_this_backend_float32_is_off_by_less_than_half_of_what_is_counted(name, compiled):
    rng = np.random.default_rng(0)
    sizes = 2.0 ** rng.uniform(-127, 59, 200_000)
    points = np.concatenate(
        [sizes * rng.choice([-1, 1], sizes.size), rng.uniform(-12, 12, 400_000)]
    )
    points = points.astype(np.float32)
    f = jax.jit(FUNCTIONS[name]) if compiled else FUNCTIONS[name]
    found = np.asarray(f(jnp.asarray(points)), np.float64)
    wide = points.astype(np.float64)
    with np.errstate(all="ignore"):
        off = np.abs(found - value_of(RULES[name])(wide))
    allowed = 2.0**-24 * smooth.EXECUTED * scale_of(name, np.abs(wide)) + 4 * 2.0**-125
    assert np.max(off / allowed) < 0.5
    assert np.max(off / allowed) > 0.02  # it is about these functions


@pytest.mark.parametrize("name", FUNCTIONS)
def test_on_this_backend_float64_is_off_by_less_than_half_of_what_is_counted(x64, name):
    points = grid(400)
    found = np.asarray(jax.jit(FUNCTIONS[name])(jnp.asarray(points)))
    allowed = 2.0**-53 * smooth.EXECUTED * scale_of(name, np.abs(points)) + 4 * 2.0**-1020
    for x, value, room in zip(points, found, allowed, strict=True):
        assert abs(Decimal(value) - exact_value(name, Decimal(x))) <= Decimal(room) / 2


def test_errors_of_the_input_are_carried_and_unknown_arithmetics_refused(x64, monkeypatch):
    single, error = (rounding.ARITHMETICS["float32"],), jnp.full(3, 1e-3)
    z = jnp.asarray([-1.0, 0.5, 2.4])
    for name in ("silu", "sigmoid", "softplus"):
        allowed = RULES[name].executed(error, z, z, single)
        assert np.all(allowed > 1e-3 * RULES[name].lipschitz) and np.all(allowed < 1.2e-3)
        moved = np.abs(value_of(RULES[name])(np.asarray(z) + 1e-3) - value_of(RULES[name])(z))
        assert np.all(moved <= allowed)
    assert np.isinf(RULES["silu"].executed(0 * z, z, 1e20 * z, single)[2])
    for name in ("bfloat16", "tf32"):
        with pytest.raises(TypeError, match=f"executed in {name}"):
            RULES["gelu"].executed(error, z, z, (rounding.ARITHMETICS[name],))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(TypeError, match="on tpu"):
        RULES["gelu"].executed(error, z, z, single)


# ---------------------------------------------------------------------------------- how it is read


def kinds(f, shape=(4,), dtype=jnp.float32):
    graph = trace(f, jax.ShapeDtypeStruct(shape, dtype))
    return [node.rule.kind for node in graph.nodes if isinstance(node, Activation)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_smooth_functions_are_read_as_jax_and_flax_write_them(name):
    f = FUNCTIONS[name]
    assert kinds(f) == [name] == kinds(jax.jit(f)) == kinds(lambda x: 2 * f(f(x) * 0 + x))[-1:]
    assert kinds(lambda x: f(2 * x[None] + 1)[0]) == [name]
    graph = trace(f, jax.ShapeDtypeStruct((4,), jnp.float32))
    (node,) = [node for node in graph.nodes if isinstance(node, Activation)]
    assert [e.operands for e in node.executed] == [("float32",)]


def test_scaled_exponential_units_are_read_inside():
    assert kinds(jax.nn.selu) == ["elu"] == kinds(lambda x: jax.nn.elu(x, 0.3))


def test_what_only_looks_like_one_is_refused():
    def almost(x):  # another constant
        return x * (0.5 * (1.0 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.05 * x**3))))

    with pytest.raises(TraceError):
        kinds(almost)
    with pytest.raises(TraceError, match="exp"):
        kinds(lambda x: x * jnp.exp(x))


def test_in_bfloat16_nothing_is_certified():
    def f(x):
        return jax.nn.gelu(x.astype(jnp.bfloat16)).astype(jnp.float32) @ jnp.ones((4, 2))

    with pytest.raises(TypeError, match="gelu_tanh, executed in bfloat16"):
        lipjax.certify(f, np.ones((1, 4), np.float32), None, 0.1, tier="deterministic")


@pytest.mark.parametrize("mode", ["global", "local", "rows"])
def test_regions_and_margins_hold_on_samples(x64, mode):
    rngs, bias = nnx.Rngs(1), jax.nn.initializers.normal(0.3)
    layers = [
        nnx.Linear(n, m, rngs=rngs, bias_init=bias) for n, m in ((5, 6), (6, 6), (6, 6), (6, 3))
    ]

    def f(x):
        h = jax.nn.gelu(3 * layers[0](x))
        h = jnp.tanh(layers[1](h)) + jax.nn.silu(2 * h)
        return layers[3](jax.nn.softplus(layers[2](h)))

    graph = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float64), trace(f, jax.ShapeDtypeStruct((5,), jnp.float32))
    )
    rng, epsilon = np.random.default_rng(2), 0.3
    x = rng.normal(size=5)
    bound = outward_bound(graph, x, epsilon, mode)
    worst = np.asarray(lipjax.worst_logits(bound, 0, rounding.OUTWARD))
    for step in (*rng.normal(size=(30, 5)), *np.asarray(jax.jacobian(graph)(jnp.asarray(x)))):
        point = jnp.asarray(x + epsilon * step / np.linalg.norm(step))
        values = []
        for node in graph.nodes:
            values.append(evaluate(node, [values[i] for i in node.inputs], point))
        for h, region in zip(values, bound.regions, strict=True):
            assert np.all(region.lower <= h + 1e-12) and np.all(h <= region.upper + 1e-12)
            assert np.linalg.norm(h - region.center) <= region.radius + 1e-12
        assert np.all((values[-1] - values[-1][0])[1:] <= (worst - worst[0])[1:] + 1e-12)


# ----------------------------------------------------------------------------- a softmax at the end


@pytest.mark.parametrize("f", [jax.nn.softmax, jax.nn.log_softmax])
@pytest.mark.parametrize("shape", [(3,), (1, 3)])
def test_a_softmax_at_the_end_is_left_out_and_said(f, shape):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)

    def logits(x):
        return (x @ weights).reshape(shape)

    batched = len(shape) > 1
    like = jax.ShapeDtypeStruct((4,), jnp.float32)
    with pytest.warns(
        UserWarning, match=r"test_smooth.py:\d+.*: the softmax at the end is left out"
    ):
        graph = trace(lambda x: f(logits(x)), like, batched=batched)
    x = jnp.asarray([0.1, 0.7, 0.3, 0.9])
    np.testing.assert_array_equal(graph(x), x @ weights)
    plain = trace(logits, like, batched=batched)
    assert len(graph.nodes) == len(plain.nodes)
    assert (graph.left_out, graph.with_head().left_out, plain.left_out) == ("softmax",) * 2 + ("",)


def test_of_a_softmax_only_the_order_of_its_logits_is_certified_and_the_statement_says_so(tmp_path):
    weights = jnp.asarray([[1.0, -1.0], [0.5, 0.0]])

    def f(x):
        return jax.nn.softmax(weights @ x)

    x = np.array([[0.9, 0.1]], np.float32)
    refused = pytest.raises(TypeError, match="Return the logits")
    for call in (
        lambda: lipjax.certify_lipschitz(f, x, 0.1),
        lambda: lipjax.certify_range(f, x, 0.1),
        lambda: lipjax.local_lipschitz(f, x[0], 0.1),
    ):
        with refused, pytest.warns(UserWarning, match="left out"):
            call()

    with pytest.warns(UserWarning, match="left out"):
        graph = trace(f, jax.ShapeDtypeStruct((2,), jnp.float32))
    found = lipjax.certify(graph, x, None, 0.01, tier="deterministic")
    assert "the network without the softmax at its end, that is by its logits" in found.statement
    certificate_files.save(tmp_path / "x.npz", found, graph, x, found.predicted)
    header, _ = certificate_files.load(tmp_path / "x.npz")
    assert header["statement"] == found.statement and header["left_out"] == "softmax"


def test_a_softmax_elsewhere_is_refused():
    like = jax.ShapeDtypeStruct((4,), jnp.float32)
    refused = pytest.raises(TraceError, match=r"test_smooth.py:\d+.*: a softmax has no bound")
    for f in (
        lambda x: 2 * jax.nn.softmax(x),
        lambda x: jax.nn.softmax(x.reshape(2, 2)).reshape(-1),
    ):
        with refused:
            trace(f, like, batched=False)
    with refused, pytest.warns(UserWarning, match="left out"):
        trace(lambda x: jax.nn.softmax(jax.nn.softmax(x)), like, batched=False)
