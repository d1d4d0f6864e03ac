"""The checker on networks that part and add up again: Residuals, and graphs in general, against
exact arithmetic and samples."""

import functools
import operator
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_activation
from flax import nnx

import lipjax
from lipjax.check import checker, onesided, walk
from lipjax.check import layers as check_layers
from lipjax.check import norms as check_norms
from lipjax.check.layers import Activation, Add, Affine, Node
from lipjax.formats import certificate_files

EPSILON = 0.05
COUNT = 6


def residual_net(kind="clipped_relu", seed=0):
    """6 inputs; a block behind an activation with one inside the other, one behind an affine layer,
    3 classes."""
    rngs, bias = nnx.Rngs(seed), jax.nn.initializers.normal(0.3)

    def dense(n, m):
        return nnx.Linear(n, m, rngs=rngs, bias_init=bias)

    return nnx.Sequential(
        dense(6, 8),
        make_activation(kind, 8, 0.8),
        lipjax.Residual(
            dense(8, 8),
            make_activation(kind, 8, 0.8),
            lipjax.Residual(make_activation(kind, 8, 0.8), dense(8, 8)),
        ),
        dense(8, 8),
        lipjax.Residual(make_activation(kind, 8, 0.8)),
        dense(8, 3),
    )


def images(count=COUNT):
    return np.random.default_rng(0).uniform(0, 1, (count, 6)).astype(np.float32)


def smaller_net(kind):
    """What is compiled here: a block in a block, and one behind an affine layer."""
    rngs, bias = nnx.Rngs(3), jax.nn.initializers.normal(0.3)

    def dense(n, m):
        return nnx.Linear(n, m, rngs=rngs, bias_init=bias)

    act = functools.partial(make_activation, kind, 6, 0.8)
    return nnx.Sequential(
        dense(6, 6), lipjax.Residual(act(), lipjax.Residual(dense(6, 6), act())), dense(6, 3)
    )


@functools.cache
def certified(tier, mode, kind="clipped_relu"):
    net, x = smaller_net(kind), images()
    labels = np.argmax(np.asarray(jax.vmap(net)(x)), axis=-1).astype(np.int32)
    labels[0] = (labels[0] + 1) % 3
    return net, x, labels, lipjax.certify(net, x, labels, EPSILON, tier=tier, mode=mode)


def file_of(tmp_path, *which):
    net, x, labels, certificate = certified(*which)
    certificate_files.save(tmp_path / "x.npz", certificate, net, x, labels)
    described = certificate_files.describe(net, x[0])
    return described, x, labels, *certificate_files.load(tmp_path / "x.npz")


def rehashed(layers, x, labels, header, arrays):
    header["statement"] = certificate_files.statement(header)
    header["digest"] = certificate_files.digest(header, arrays)
    return checker.check(layers, x, labels, header, arrays, np.random.default_rng(0))


WHICH = [
    ("probabilistic", "local"),
    ("deterministic", "local"),
    ("probabilistic", "linear"),
    ("deterministic", "rows", "clipped_maxmin"),
]


@pytest.mark.parametrize("which", WHICH, ids=lambda which: "-".join(which))
def test_certificates_of_residuals_are_confirmed(tmp_path, which):
    file = file_of(tmp_path, *which)
    report, certificate = rehashed(*file), certified(*which)[-1]
    assert report.confirmed and report.certified >= 2, report
    assert np.all(report.margin >= certificate.margin)
    assert np.all(report.margin <= certificate.margin + 0.05 * np.abs(certificate.margin) + 0.02)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda arrays: arrays["margin"].__iadd__(0.02), "recorded margin"),
        (lambda arrays: arrays["norms"][:, 1].__imul__(0.7), "recorded norm 1"),
        (lambda arrays: arrays["allowance"].__imul__(0.5), "recorded allowance"),
        (lambda arrays: arrays["lipschitz"].__imul__(0.8), "lipschitz is below"),
        (lambda arrays: arrays["epsilon"].__imul__(3), "recorded as certified"),
    ],
    ids=["margin", "norm", "allowance", "lipschitz", "epsilon"],
)
def test_a_forged_certificate_of_a_residual_is_rejected(tmp_path, edit, said):
    layers, x, labels, header, arrays = file_of(tmp_path, *WHICH[0])
    edit(arrays)
    header["epsilon"] = float(arrays["epsilon"][0])
    report = rehashed(layers, x, labels, header, arrays)
    assert any(said in problem for problem in report.problems), report


def test_where_a_branch_begins_and_ends_is_in_the_networks_hash(tmp_path):
    nodes, x, labels, header, arrays = file_of(tmp_path, *WHICH[0])
    join = [node["kind"] for node in nodes].index("add")
    changed = [dict(node) for node in nodes]
    changed[join]["inputs"] = [join - 1, join - 1]
    report = rehashed(changed, x, labels, header, arrays)
    assert any("about the network" in problem for problem in report.problems)


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (["fork"], "no join"),
        (["join"], "no fork"),
        (["fork", "join", "join"], "no fork"),
        (["fork", "widen", "join"], "same"),
    ],
)
def test_branches_without_an_end_or_of_another_shape_are_refused(kinds, said):
    def dense(n, m):
        return {
            "kind": "linear",
            "kernel": np.ones((n, m)),
            "bias": None,
            "dtype": None,
            "unusual": [],
        }

    layers = [dense(2, 3) if kind == "widen" else {"kind": kind} for kind in kinds]
    with pytest.raises(checker.CannotCheck, match=said):
        check_layers.nodes_of([*layers, dense(2, 2)], (2,))


def test_a_residual_of_an_older_file_is_a_branch_of_its_own_layers():
    dense = {"type": "Linear", "dtype": None, "precision": None}
    stored = [
        {"type": "Sequential", "layers": [{"type": "ReLU"}]},
        {"type": "Residual", "layers": [dense, {"type": "MaxMin"}]},
        dense,
    ]
    first, last = np.eye(2), np.ones((2, 3))
    arrays = {"layers.1.branch.layers.0.kernel": first, "layers.2.kernel": last}
    found = check_layers.of_stored(stored, arrays)
    kinds = ["relu", "fork", "linear", "maxmin", "join", "linear"]
    assert [layer["kind"] for layer in found] == kinds
    assert found[2]["kernel"] is first and found[-1]["kernel"] is last


@pytest.mark.parametrize("window", [(3, 1), (1, 4)])
def test_a_pool_that_is_larger_than_what_it_takes_is_refused(window):
    pool = {"kind": "average_pool", "window": window, "strides": (1, 1)}
    with pytest.raises(checker.CannotCheck, match="cannot take"):
        check_layers.nodes_of([pool], (2, 3, 1))


# ----------------------------------------------------------------------------------------- the walk


def affine(rng, n, m, scale=1.0):
    return check_layers._affine(
        scale * rng.normal(size=(m, n)) / np.sqrt(n), rng.normal(size=m) / 3, (m,)
    )


def relu(n, top=np.inf):
    return Activation(False, (n,), np.full(n, top), np.array(0.0))


def maxmin(n, bound=np.inf):
    return Activation(True, (n,), np.full(n // 2, bound), np.full(n // 2, -bound))


def graph(seed=0):
    """Values that are taken twice or thrice, sums of sums, an affine layer with two takers, a value
    added to itself."""
    rng = np.random.default_rng(seed)
    return [
        Node(affine(rng, 4, 6), (0,)),  # 1: to two activations, so no row may be left out
        Node(relu(6, 0.4), (1,)),  # 2
        Node(maxmin(6, 0.3), (1,)),  # 3
        Node(Add(), (2, 3)),  # 4
        Node(affine(rng, 6, 6), (4,)),  # 5
        Node(maxmin(6), (5,)),  # 6
        Node(Add(), (4, 6)),  # 7
        Node(Add(), (7, 7)),  # 8
        Node(affine(rng, 4, 6), (0,)),  # 9: past everything
        Node(Add(), (9, 8)),  # 10
        Node(relu(6, 1.5), (10,)),  # 11
        Node(affine(rng, 6, 3), (11,)),
    ]


def stuck(seed=0):
    """Sums of what varies and what is clipped, and so the same for every image, but known to
    rounding only."""
    rng = np.random.default_rng(seed)
    blocks = np.kron(np.eye(2), np.ones((3, 3))) * rng.normal(size=(6, 6)) * 1e3
    biases = np.array([9.0, 9.0, 9.0, 0.5, 0.5, 0.5])
    first = check_layers._affine(rng.normal(size=(6, 4)) / 4, biases, (6,))
    return [
        Node(first, (0,)),
        Node(relu(6, 3.0 + rng.uniform()), (1,)),  # the first three are clipped
        # the first three do not vary
        Node(check_layers._affine(blocks, rng.normal(size=6), (6,)), (2,)),
        Node(affine(rng, 4, 6), (0,)),
        Node(Add(), (3, 4)),
        Node(Add(), (4, 3)),
        Node(affine(rng, 6, 3), (5,)),
    ]


def network_of(nodes, arithmetic="float32"):
    norms = check_norms.Norms(1e-9, np.random.default_rng(0))
    layers = [node.step for node in nodes if isinstance(node.step, Affine)]
    return walk.Network(nodes, [norms(layer.matrix) for layer in layers], arithmetic), norms


def run(nodes, x):
    """All values, ``(n, points)`` each; floats or Fractions."""
    values = [x]
    for node in nodes:
        z = values[node.inputs[0]]
        if isinstance(node.step, Affine):
            matrix, bias = node.step.matrix.toarray(), node.step.bias[:, None]
            if x.dtype == object:
                matrix, bias = (
                    np.vectorize(Fraction)(matrix).astype(object),
                    np.vectorize(Fraction)(bias).astype(object),
                )
            values.append(matrix @ z + bias)
        elif isinstance(node.step, Add):
            values.append(z + values[node.inputs[1]])
        else:
            values.append(np.stack([_activated(node.step, column) for column in z.T], axis=1))
    return values


def _activated(step, column):
    if column.dtype != object:
        return step(column)
    exact = np.vectorize(
        lambda number: Fraction(number) if np.isfinite(number) else number, otypes=[object]
    )
    if not step.pairs:
        return np.minimum(np.maximum(column, 0), exact(np.broadcast_to(step.top, column.shape)))
    a, b = np.split(column, 2)
    top, bottom = np.broadcast_to(step.top, a.shape), np.broadcast_to(step.bottom, a.shape)
    return np.concatenate(
        [np.minimum(np.maximum(a, b), exact(top)), np.maximum(np.minimum(a, b), exact(bottom))]
    )


def ball(x, epsilon, count=400, seed=3):
    noise = np.random.default_rng(seed).normal(size=(len(x), count))
    noise[:, : 2 * len(x)] = np.concatenate([np.eye(len(x)), -np.eye(len(x))], axis=1)
    return x[:, None] + epsilon * noise / np.linalg.norm(noise, axis=0)


def described(net):
    like = jax.ShapeDtypeStruct((6,), np.float32)
    return check_layers.nodes_of(certificate_files.describe(net, like), (6,))


def subjects():
    yield "graph", graph(), 4
    for kind in ("clipped_relu", "maxmin"):
        yield kind, described(residual_net(kind)), 6


@pytest.mark.parametrize(
    ("name", "nodes", "size"),
    list(subjects()),
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.6])
@pytest.mark.parametrize("by_rows", [(), (None,), onesided.RULES[1:]])
def test_every_value_of_a_graph_stays_in_its_region_and_every_margin_above_its_bound(
    name, nodes, size, epsilon, by_rows
):
    network, norms = network_of(nodes)
    x = np.random.default_rng(1).uniform(0, 1, size)
    walked = walk.walk(network, x, epsilon, norms, by_rows)
    *values, logits = run(nodes, ball(x, epsilon))
    assert len(values) == len(walked.values)
    for known, value in zip(walked.values, values, strict=True):
        assert np.all(known.lower[:, None] <= value + 1e-14) and np.all(
            value <= known.upper[:, None] + 1e-14
        )
        moved = np.linalg.norm((value - known.center[:, None])[known.varies], axis=0)
        assert np.all(moved <= known.radius * (1 + 1e-12) + 1e-14)
        assert (
            np.all(np.ptp(value[~known.varies], axis=1) <= 1e-14)
            if not known.varies.all()
            else True
        )
    for label in range(len(logits)):
        local = walk.derive(network, x, label, epsilon, norms)
        linear = walk.derive(network, x, label, epsilon, norms, linear=True, rows=by_rows)
        # What the executed network's rounding can do to the difference of the two logits.
        lost = linear.differences
        real = np.delete(np.min(logits[label] - logits, axis=1) - lost, label)
        assert local.margin <= linear.margin + 1e-9 and linear.margin <= np.min(real)
        if epsilon == 0:
            assert linear.margin >= np.min(real) - 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_on_a_small_ball_the_slopes_of_a_graph_are_its_gradient(seed):
    """Rows go back through both ways of every sum: as epsilon tends to 0, to the norm of the
    gradient and no more."""
    nodes, epsilon = graph(seed), 1e-6
    network, norms = network_of(nodes, "float64")
    x = np.random.default_rng(seed).uniform(0, 1, 4)
    derived = walk.derive(network, x, 0, epsilon, norms, linear=True)
    steps = 1e-8 * np.concatenate([np.eye(4), -np.eye(4)], axis=1)
    logits = run(nodes, x[:, None] + steps)[-1]
    jacobian = (logits[:, :4] - logits[:, 4:]) / 2e-8
    gradient = np.linalg.norm(jacobian[derived.rival] - jacobian[0])
    assert derived.taken == pytest.approx(epsilon * gradient, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 2.0**-60, 2.0**-40])
def test_exact_values_lie_in_their_regions_where_only_rounding_is_left(epsilon):
    """In rationals, where a box is hardly wider than the checker's own rounding: a term left out
    shows here."""
    for seed in range(12):
        nodes = graph(seed) if seed % 2 else stuck(seed)
        network, norms = network_of(nodes)
        x = np.random.default_rng(seed).uniform(0, 1, 4)
        walked = walk.walk(network, x, epsilon, norms)
        for side in (-1, 0, 1):
            moved = np.array(
                [
                    Fraction(float(n)) + (side * Fraction(epsilon) if i == seed % 4 else 0)
                    for i, n in enumerate(x)
                ]
            )
            exact = run(nodes, moved[:, None].astype(object))
            for known, value in zip(walked.values, exact[:-1], strict=True):
                value = value[:, 0]
                assert all(map(operator.le, map(Fraction, known.lower.tolist()), value))
                assert all(map(operator.le, value, map(Fraction, known.upper.tolist())))
                away = (value - np.array([Fraction(n) for n in known.center.tolist()]))[
                    known.varies
                ]
                assert sum(away**2) <= Fraction(known.radius) ** 2


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_the_executed_residual_stays_within_the_allowance_for_its_rounding(name):
    net = residual_net("maxmin", seed=4)
    executed = jax.tree.map(lambda leaf: jnp.asarray(leaf, name), net)
    nodes = described(executed)
    network, norms = network_of(nodes, name)
    for x in images(4):
        x = jnp.asarray(x, name)
        held = np.asarray(x, np.float64)
        derived = walk.derive(network, held, 0, 0.05, norms)
        exact = run(nodes, np.array([Fraction(float(n)) for n in held], object)[:, None])[-1][:, 0]
        away = np.abs(np.asarray(executed(x), np.float64) - exact.astype(np.float64))
        assert np.all(away <= derived.rounding) and np.any(away > 1e-4 * derived.rounding)


def test_the_rounding_of_a_sum_is_in_the_allowance():
    """The sum of two numbers that rounding takes apart, in exact arithmetic: nothing else
    rounds."""
    identity = check_layers._affine(np.eye(2), np.zeros(2), (2,))
    nodes = [Node(identity, (0,)), Node(Add(), (0, 1)), Node(identity, (2,))]
    known = walk.walk(network_of(nodes)[0], np.array([0.1, 0.9]), 0.0, network_of(nodes)[1]).values
    local = known[2].error - known[1].error
    assert np.all(local >= 2.0**-24 * np.array([0.2, 1.8])) and np.all(
        local <= 2.0**-23 * np.array([0.2, 1.8])
    )
    assert known[2].distance >= known[1].distance + np.linalg.norm(
        2.0**-24 * np.array([0.2, 1.8])
    ) * (1 - 1e-6)


def test_the_rounding_of_a_sum_is_that_of_the_larger_end_of_its_box():
    for lower, upper in ((-8.0, 1e-3), (-1e-3, 8.0)):
        ends = np.array([lower]), np.array([upper])
        error, distance = walk._stored(*ends, np.zeros(1), 0.0, None, "float32")
        assert error[0] >= 2.0**-24 * 8 and distance >= 2.0**-24 * 8 * (1 - 1e-6)


def cancelling(seed, depth=3, scale=30.0):
    """Affine layers with activations that are open everywhere, or sums, of weights that cancel.

    The logits are little but rounding, and for every second seed so is what a layer in the middle
    makes.
    """
    rng, nodes = np.random.default_rng(seed), []
    x = np.random.default_rng(seed).uniform(0, 1, 5)[:, None]

    def orthogonal(rows):
        h = run(nodes, x)[-1][:, 0]
        rows = rows - np.outer(rows @ h, h) / max(h @ h, 1e-9)
        nodes.append(Node(check_layers._affine(rows, None, (len(rows),)), (len(nodes),)))

    for k in range(depth):
        if k == 1 and seed % 2:
            orthogonal(1e6 * rng.normal(size=(5, 5)))
        else:
            nodes.append(Node(affine(rng, 5, 5, scale if k % 2 else 1 / scale), (len(nodes),)))
        if seed % 3 == 1:
            nodes.append(Node(relu(5, 50.0), (len(nodes),)))
        if seed % 3 == 2 and k:
            nodes.append(Node(Add(), (len(nodes) - 1, len(nodes))))
    orthogonal(rng.normal(size=(3, 5)) * np.array([1.0, 1e3, 1e6])[rng.permutation(3)][:, None])
    return nodes


@pytest.mark.core
@pytest.mark.parametrize("mode", ["local", "linear", "rows", "tight_rows"])
def test_no_margin_is_above_the_exact_one_where_only_the_checkers_own_rounding_is_left(
    mode, monkeypatch
):
    """A network executed without any rounding, in rationals: in the worst direction no term of the
    checker's may be left out."""
    monkeypatch.setitem(walk.ARITHMETICS, "exact", (0.0, 0.0, 0.0, 0.0, 1e300))
    slopes = {"linear": mode != "local", "rows": checker.ROWS.get(mode, ())}
    least = np.inf
    for seed in range(24):
        nodes = cancelling(seed)
        network, norms = network_of(nodes, "exact")
        x = np.random.default_rng(seed).uniform(0, 1, 5)
        exact_x = np.array([Fraction(float(n)) for n in x], object)[:, None]
        for epsilon in (0.0, 2.0**-60, 2.0**-30):
            for label in range(3):
                derived = walk.derive(network, x, label, epsilon, norms, **slopes)
                logits = run(nodes, x[:, None] + 1e-7 * np.eye(5))[-1] - run(nodes, x[:, None])[-1]
                for rival in set(range(3)) - {label}:
                    d = logits[rival] - logits[label]
                    d = d / max(np.linalg.norm(d), 1e-300) * (1 - 1e-12) * epsilon
                    moved = exact_x + np.array([Fraction(float(n)) for n in d], object)[:, None]
                    exact = run(nodes, moved)[-1][:, 0]
                    assert Fraction(derived.margin) <= exact[label] - exact[rival]
                    least = min(
                        least, float(exact[label] - exact[rival] - Fraction(derived.margin))
                    )
    assert 0 <= least < 1e-12


def test_what_hardware_flushes_to_zero_is_in_the_allowance():
    """Products below the smallest number of float32, that a later layer makes large again; also in
    a sum."""
    tiny = 2.0**-80
    small = check_layers._affine(np.full((2, 3), tiny), None, (2,))
    again = check_layers._affine(np.array([[2.0**120, 0.0], [0.0, 2.0**120]]), None, (2,))
    x = np.full(3, tiny)
    for nodes in (
        [Node(small, (0,)), Node(again, (1,))],
        [Node(small, (0,)), Node(small, (0,)), Node(Add(), (1, 2)), Node(again, (3,))],
    ):
        network, norms = network_of(nodes)
        exact = run(nodes, x[:, None])[-1][:, 0]  # the executed network may give 0
        assert np.all(exact > 0)
        assert np.all(walk.derive(network, x, 0, 0.0, norms).rounding >= exact)


def test_the_sum_of_a_residual_pays_for_its_own_flushing():
    identity = check_layers._affine(np.eye(2), None, (2,))
    nodes = [Node(Add(), (0, 0)), Node(identity, (1,))]
    network, norms = network_of(nodes)
    known = walk.walk(network, np.full(2, 2.0**-128), 0.0, norms).values[1]
    assert np.all(known.error >= 2.0**-127) and known.distance >= 2.0**-127


def test_a_sum_that_may_overflow_has_an_infinite_allowance():
    identity = check_layers._affine(np.eye(2), None, (2,))
    nodes = [Node(identity, (0,)), Node(Add(), (1, 1)), Node(identity, (2,))]
    network, norms = network_of(nodes)
    known = walk.walk(network, np.full(2, 2.0**126.5), 0.0, norms).values
    assert np.all(np.isfinite(known[1].error)) and np.all(np.isinf(known[2].error))


@pytest.mark.parametrize("factor", [1e150, np.nan])
def test_where_a_number_overflows_or_is_none_no_margin_is_derived(factor):
    layers = [check_layers._affine(np.diag([factor, 1.0]), None, (2,)) for _ in range(3)]
    nodes = [Node(layer, (k,)) for k, layer in enumerate(layers)]
    network = walk.Network(nodes, [(factor, factor)] * 3, "float64")
    for label in (0, 1):
        derived = walk.derive(network, np.ones(2), label, 0.0, lambda _: (factor, factor))
        assert derived.margin == -np.inf


def test_where_one_of_two_values_does_not_vary_its_sum_counts_what_is_not_known_of_it():
    def known(center, width, varies):
        center = np.array(center)
        return walk.Known(
            center,
            center - width,
            center + width,
            np.array(varies),
            float(np.linalg.norm(np.array(width)[np.array(varies)])),
            np.zeros(2),
            0.0,
        )

    first = known([0.25, 0.5], [0.125, 0.0625], [True, False])
    second = known([1.0, 2.0], [0.5, 0.25], [False, True])
    for pair in ((first, second), (second, first)):
        total, _ = walk.add(*pair, "float32")
        assert total.varies.all()
        assert total.radius >= np.linalg.norm([0.625, 0.3125])  # both at their far ends


def test_a_factor_that_is_none_makes_no_norm_smaller(monkeypatch):
    """Of the Cholesky factor nothing is assumed: what it leaves over is counted."""
    true = np.linalg.cholesky
    monkeypatch.setattr(
        np.linalg, "cholesky", lambda matrix: 0.5 * true(matrix + np.eye(len(matrix)))
    )
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda matrix: np.array([0.3]))  # far below
    matrix = np.random.default_rng(0).normal(size=(12, 20)) / 8
    sparse = check_layers._affine(matrix, None, (12,)).matrix
    _, upper = check_norms.norm_by_cholesky(sparse, np.random.default_rng(0))
    # not the way out of no factor
    assert np.linalg.norm(matrix, 2) <= upper < np.linalg.norm(matrix)


# --------------------------------------------------------------- descriptions, written by hand


def node(kind, inputs, shape, *executed, **own):
    """A described node, in float32."""
    equations = [[name, ["float32"], "float32", None, None] for name in executed]
    common = {"dtype": "float32", "executed": equations, "roundings": 0.0}
    return {"kind": kind, "inputs": inputs, "shape": shape, **common, **own}


def example(*shape):
    return node("input", [], list(shape))


def product(kernel, taken=0):
    kernel = np.asarray(kernel, np.float32)
    own = {"kernel": kernel, "bias": None, "numbers": [[[0], [0]], [[], []]], "kernel_first": False}
    return node("product", [taken], [kernel.shape[1]], "dot_general", **own)


def scale(factor, taken, *executed, joined=False):
    kernel = np.array(factor, np.float32)
    return node("scale", [taken], [2], *executed, kernel=kernel, bias=None, joined=joined)


def convolution(kernel, shape, **changed):
    own = {"strides": [1, 1], "padding": [[0, 0]] * 2, "dilation": [1, 1], "input_dilation": [1, 1]}
    own |= {"kernel": np.asarray(kernel, np.float32), "bias": None, "groups": 1, **changed}
    return node("conv", [0], shape, "conv_general_dilated", **own)


def as_read(*described):
    return check_layers.nodes_of(described, tuple(described[0]["shape"]))


def test_what_is_joined_with_an_identity_carries_and_adds_rounding():
    nodes = as_read(
        example(2),
        product(np.eye(2)),
        scale(1, 1),  # executes nothing
        scale(1e6, 2, "mul", joined=True),
        product(np.eye(2), 3),
    )
    network, norms = network_of(nodes)
    first, second = walk.walk(network, np.full(2, 0.3), 0.0, norms).values[1:]
    assert np.all(first.error > 0) and first.distance > 0
    assert np.all(second.error >= 1e6 * first.error + 2.0**-25 * 3e5)
    assert second.distance >= 1e6 * first.distance


GIANT = [[2**20, 2**20]] * 2
HEAD = product(np.ones((2, 3)), 1)


@pytest.mark.parametrize(
    ("described", "said"),
    [
        # What would take more memory than there is, in places that the number of entries of the
        # result does not tell.
        ([example(2**30, 0), product(np.ones((0, 2)))], "which this checker cannot take"),
        (
            [example(1, 1, 1), convolution(np.ones((1, 1, 1, 0)), [1, 1, 1], padding=GIANT)],
            "no ker",
        ),
        (
            [
                example(4, 4, 1),
                convolution(np.ones((1, 1, 1, 1)), [4, 4, 1], input_dilation=[2**20] * 2),
            ],
            "entries",
        ),
        # Joined with a node that is neither a scale nor a shift.
        (
            [
                example(2),
                product(np.eye(2)),
                node(*("add", [1], [2], "convert_element_type"), signs=[1], constant=None)
                | {"joined": True},
                {**HEAD, "inputs": [2]},
            ],
            "no scale or shift",
        ),
        # Slopes of a file are of the activations that lead to the logits.
        (
            [
                example(2),
                product(np.eye(2)),
                node("clip", [1], [2], bottom=np.array(0, np.float32), top=None),
                HEAD,
            ],
            "node 2 leads nowhere",
        ),
    ],
    ids=["empty value", "empty kernel", "dilated", "joined", "unread"],
)
def test_descriptions_written_to_exhaust_or_confuse_the_checker_are_refused(described, said):
    with pytest.raises(checker.CannotCheck, match=said):
        as_read(*described)


def test_what_a_function_computes_and_does_not_use_is_in_no_description():
    weights = np.eye(2, dtype=np.float32)

    def f(x):
        jax.nn.relu(3 * (x @ weights))
        return x @ weights

    described = checker.describe(f, np.zeros(2, np.float32))
    assert len(as_read(*described)) == 1 and len(described) == 2
