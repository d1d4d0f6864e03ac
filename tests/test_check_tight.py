"""Certificates of mode "tight": their stages, the slopes that files keep, and the checker's own
derivation of one-sided errors."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_activation
from flax import nnx

import lipjax
from lipjax import bounds, rounding
from lipjax.bounds import relaxed, tight
from lipjax.certificates import batches, setup, stages, verdicts
from lipjax.check import checker, norms, onesided, walk
from lipjax.check.kinds import Leaky, MaxPool, Smooth, Sort, sorting
from lipjax.check.layers import Activation, Affine, nodes_of
from lipjax.formats import certificate_files
from lipjax.norms.best import WholeNorm

COUNT = 24
INPUTS = 10
STEPS = 15
# Of pairs: few images need slopes of their own.
MORE_STEPS = 40
KINDS = ("relu", "clipped_maxmin")
FUNCTIONS = {
    "leaky": lambda z: jax.nn.leaky_relu(z, 0.2),
    "tanh": jnp.tanh,
    "sort": lambda z: lipjax.activations.groupsort(z, 4),
    # The windows overlap: most entries are in three of them.
    "pool": lambda z: jax.lax.reduce_window(z, -jnp.inf, jax.lax.max, (3,), (1,), "SAME"),
}


def net_of(kind, seed=1):
    """10 inputs, three hidden layers, 4 classes."""
    rngs = nnx.Rngs(seed)
    bias = jax.nn.initializers.normal(0.3)
    act = functools.partial(make_activation, kind, 12, 0.6)
    if kind in FUNCTIONS:
        act = functools.partial(FUNCTIONS.get, kind)

    def dense(n, m):
        return nnx.Linear(n, m, rngs=rngs, bias_init=bias)

    # Stages of comparators take long to compile: one of these, and other kinds behind it.
    rest = lipjax.ReLU if kind in ("sort", "pool") else act
    return nnx.Sequential(
        dense(INPUTS, 12), act(), dense(12, 12), rest(), dense(12, 12), rest(), dense(12, 4)
    )


@functools.cache
def subject(kind):
    """Network, images, labels (one wrong), and a radius at which stages differ."""
    net = net_of(kind)
    x = np.random.default_rng(0).uniform(0, 1, (COUNT, INPUTS)).astype(np.float32)
    logits = np.asarray(jax.vmap(net)(x))
    labels = np.argmax(logits, axis=-1).astype(np.int32)
    labels[0] = (labels[0] + 1) % 4
    return (
        net,
        x,
        labels,
        {"clipped_maxmin": 0.1, "clipped_relu": 0.3, "tanh": 0.04, "pool": 0.18}.get(kind, 0.22),
    )


@functools.cache
def certified(kind, tier, mode, steps=None, seconds=None):
    net, x, labels, epsilon = subject(kind)
    options = {"steps": steps, "seconds_per_image": seconds}
    return lipjax.certify(net, x, labels, epsilon, tier=tier, mode=mode, seed=3, **options)


def file_of(tmp_path, kind, *which):
    net, x, labels, _ = subject(kind)
    path = tmp_path / "tight.npz"
    certificate_files.save(path, certified(kind, *which), net, x, labels)
    return certificate_files.describe(net, x[0]), x, labels, *certificate_files.load(path)


def checked(layers, x, labels, header, arrays):
    header["statement"] = certificate_files.statement(header)
    header["digest"] = certificate_files.digest(header, arrays)
    return checker.check(layers, x, labels, header, arrays, np.random.default_rng(0))


@pytest.mark.parametrize(
    "kind, steps",
    [("relu", STEPS), pytest.param("clipped_maxmin", MORE_STEPS, marks=pytest.mark.slow)],
)
def test_each_stage_decides_at_least_what_those_before_do(kind, steps):
    local = certified(kind, "deterministic", "local")
    tight = certified(kind, "deterministic", "tight")
    auto = certified(kind, "deterministic", "auto", steps)
    assert auto.mode == tight.mode == "tight" and not len(tight.slopes)
    np.testing.assert_array_equal(auto.norms, local.norms)
    assert np.all(tight.margin >= local.margin - 1e-12)
    # What local decides stays as it is; the rest is as good as in mode "tight".
    np.testing.assert_array_equal(auto.margin[local.certified], local.margin[local.certified])
    rest = ~local.certified & auto.correct
    assert np.all(auto.margin[rest] >= tight.margin[rest] - 1e-9)
    assert not auto.certified[0] and not auto.correct[0]
    counts = [np.sum(c.certified) for c in (local, tight, auto)]
    assert counts[0] < counts[1] < counts[2] < COUNT, counts
    # Slopes are kept for the images that they decide, and for no others.
    by_steps = np.unique(auto.slopes_of[:, 0])
    np.testing.assert_array_equal(by_steps, np.flatnonzero(auto.certified & ~tight.certified))
    # And so it is said.
    before = np.zeros(COUNT, bool)
    for run, mode in zip(auto.stages, (local, tight, auto), strict=True):
        left = auto.correct & ~before if np.any(before) else ~before
        np.testing.assert_array_equal(run.images, np.flatnonzero(left))
        np.testing.assert_array_equal(run.certified, np.flatnonzero(left & mode.certified))
        assert run.seconds > 0
        before |= mode.certified
    assert [run.name for run in auto.stages] == ["local", "tight", "steps"]
    assert f"local {counts[0]} of {COUNT}, tight " in auto.summary()


def test_with_all_the_time_tight_rows_decides_what_is_left_and_changes_nothing_else():
    auto = certified(*WHICH[1])
    dearer = certified(*WHICH[-1])
    assert (auto.mode, dearer.mode) == ("tight", "tight_rows")
    last = dearer.stages[-1]
    assert last.name == "tight_rows" and len(last.certified)
    np.testing.assert_array_equal(last.images, np.flatnonzero(auto.correct & ~auto.certified))
    np.testing.assert_array_equal(
        last.certified, np.flatnonzero(dearer.certified & ~auto.certified)
    )
    # (The bounds of the first stage have another share of the failure probability.)
    rest = np.setdiff1d(np.arange(COUNT), last.certified)
    np.testing.assert_allclose(dearer.margin[rest], auto.margin[rest], atol=0.02)
    # Norms of smaller masks, but for their draws.
    shares = dearer.norms[last.certified] / auto.norms[last.certified]
    assert np.all(shares < 1.01) and np.min(shares) < 0.95


def test_without_time_the_first_stage_alone_decides():
    local = certified("relu", "deterministic", "local")
    none = certified("relu", "deterministic", "auto", STEPS, 1e-9)
    assert [run.name for run in none.stages] == ["local"]
    np.testing.assert_array_equal(none.certified, local.certified)
    np.testing.assert_array_equal(none.margin, local.margin)


@pytest.mark.parametrize(
    "costs, passes, seconds, allowed",
    [
        ([(0, 5.0)], 10, None, True),
        ([(0, 5.0)], 10, 5.0, True),
        ([(0, 5.0)], 10, 4.9, False),
        # Of 8 passes each took 0.5 s: 10 more take 5.
        ([(0, 1.0), (8, 4.0)], 10, 10.0, True),
        ([(0, 1.0), (8, 4.0)], 10, 9.9, False),
        ([(0, 1.0), (8, 4.0), (8, 2.0)], 16, 13.0, True),
        ([(0, 1.0), (8, 4.0), (8, 2.0)], 16, 12.9, False),
        ([(0, 1.0), (8, 4.0)], 10, np.inf, True),
    ],
)
def test_a_stage_begins_only_where_it_is_expected_to_end_in_time(costs, passes, seconds, allowed):
    assert stages.affordable(costs, passes, seconds) is allowed


@pytest.mark.parametrize(
    "mode, steps, seconds, said",
    [
        ("tight", 0, 1.0, "seconds_per_image limits the stages of mode"),
        ("auto", 0, 0.0, "must be > 0, or None, got 0.0"),
        ("auto", 0, float("nan"), "must be > 0, or None, got nan"),
        ("local", 3, None, "steps improve the slopes"),
        ("auto", -1, None, "steps must be >= 0"),
    ],
)
def test_stages_that_make_no_sense_are_errors(mode, steps, seconds, said):
    with pytest.raises(ValueError, match=said):
        stages.planned(mode, steps, seconds)


def test_passes_are_counted_as_they_are_made(monkeypatch, x64):
    """Two hidden layers of 3 and 2, 5 classes: every row that is to be carried back says so, and is
    left there."""
    seen = []

    def counted(self, d):
        jax.debug.callback(lambda _: seen.append(1), d)
        return 1e3 + 0 * jnp.sum(d)

    monkeypatch.setattr(relaxed.Reverse, "gain", counted)
    monkeypatch.setattr(verdicts.best, "norm_bound", lambda *_, **__: jnp.asarray(9.0))
    monkeypatch.setattr(verdicts, "allowances", lambda *_: (jnp.full(5, 1e-9),) * 2)
    rngs = nnx.Rngs(0)
    sizes = (2, 3, 2, 5)
    layers = [nnx.Linear(n, m, rngs=rngs) for n, m in itertools.pairwise(sizes)]
    net = nnx.Sequential(layers[0], lipjax.ReLU(), layers[1], lipjax.ReLU(), layers[2])
    graph = setup.in_float64(bounds.graph_of(net, jnp.zeros(2, jnp.float32)))
    whole = WholeNorm(jnp.asarray(9.0), jnp.ones((), bool))
    shared = (graph, (whole,) * 3, jax.random.key(0))
    columns = (jnp.full((1, 2), 0.5), jnp.zeros(1, int), jnp.ones(1), jnp.zeros(1, int))
    options = {"tier": "deterministic", "failure_probability": 0.5, "arithmetics": ()}

    for mode in ("rows", "tight", "tight_rows"):
        seen.clear()
        _, kept = verdicts.certify_batch(
            shared, columns, mode=mode, budget=0.0, keep=True, **options
        )
        jax.effects_barrier()
        assert len(seen) == stages.Stage(mode).passes(graph), mode

    seen.clear()
    bound, worst = kept
    verdicts.tightened_batch(
        (graph, (whole.bound,) * 3), (columns[1], bound, worst + 1e3), arithmetics=(), steps=2
    )
    jax.effects_barrier()
    # Of a gradient step the value's pass says so.
    gradients = 2 * verdicts.STEPPED * stages.GRADIENT
    assert len(seen) == stages.Stage("steps", steps=2).passes(graph) - gradients


def test_what_is_compiled_before_the_clock_runs_is_not_compiled_again(caplog):
    run = functools.partial(batches.compiled(_added, "twice", optimize=False), 1.0, twice=True)
    with jax.log_compiles():
        for call, compilations in ((batches.compile_for, 1), (lambda run, x: run(x), 0)):
            caplog.clear()
            call(run, np.arange(3.0))
            assert sum("XLA compilation" in text for text in caplog.messages) == compilations


def _added(shared, x, *, twice):
    return shared + x + x if twice else shared + x


WHICH = [
    ("relu", "deterministic", "tight"),
    ("relu", "probabilistic", "auto", STEPS),
    ("clipped_maxmin", "deterministic", "auto", MORE_STEPS),
    ("clipped_maxmin", "probabilistic", "tight"),
    ("leaky", "deterministic", "tight"),
    ("tanh", "probabilistic", "tight"),
    ("clipped_relu", "probabilistic", "tight_rows", STEPS),
    ("sort", "deterministic", "auto", STEPS),
    ("relu", "probabilistic", "auto", STEPS, np.inf),
]
POOL = pytest.param(("pool", "deterministic", "auto", STEPS), marks=pytest.mark.slow)
DEAR = [
    POOL,
    pytest.param(("sort", "probabilistic", "tight_rows"), marks=pytest.mark.slow),
    pytest.param(("pool", "deterministic", "tight_rows"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("which", [*WHICH, *DEAR], ids=lambda which: "-".join(map(str, which)))
def test_certificates_of_mode_tight_are_confirmed(tmp_path, which, monkeypatch):
    asked = []

    class Counted(norms.Norms):
        def __call__(self, matrix):
            asked.append(self.delta)
            return super().__call__(matrix)

    monkeypatch.setattr(checker, "Norms", Counted)
    file = file_of(tmp_path, *which)
    report, certificate = checked(*file), certified(*which)
    # Whatever walks a row takes, the shares of the checker's own draws are within what it says.
    assert sum(asked) <= checker.LARGEST_DELTA
    assert report.confirmed, report
    assert report.certified == np.sum(certificate.certified) > 0
    assert (len(which) > 3) == (len(file[-1]["slopes"]) > 0)


def test_a_margin_by_smaller_boxes_than_rows_prove_is_rejected(tmp_path, monkeypatch):
    """Where the checker does not know what cuts the boxes, it derives less than is recorded."""
    file = file_of(tmp_path, *WHICH[-1])
    monkeypatch.setattr(checker, "ROWS", {})
    report = checked(*file)
    assert any("recorded as certified" in problem for problem in report.problems), report


@pytest.mark.parametrize("kind", [*KINDS, "sort", "pool"])
def test_no_attack_is_below_a_margin_and_no_certified_image_is_broken(kind):
    net, x, labels, epsilon = subject(kind)
    certificate = certified(kind, "deterministic", "auto", STEPS)
    rng = np.random.default_rng(5)

    @jax.jit
    def margin(x, label):
        logits = net(x)
        return logits[label] - jnp.max(jnp.where(jnp.arange(4) == label, -jnp.inf, logits))

    ascend = jax.jit(jax.vmap(jax.grad(margin)))
    for _ in range(4):
        step = rng.normal(size=x.shape)
        for _ in range(25):
            length = np.linalg.norm(step, axis=1, keepdims=True)
            step = step * epsilon / np.maximum(length, 1e-12)
            found = np.asarray(jax.vmap(margin)(x + step, labels))
            assert np.all(found[certificate.correct] >= certificate.margin[certificate.correct])
            assert np.all(found[certificate.certified] > 0)
            gradient = np.asarray(ascend(x + step, labels))
            size = np.linalg.norm(gradient, axis=1, keepdims=True)
            step = step - 0.3 * epsilon * gradient / np.maximum(size, 1e-12)


@pytest.mark.parametrize("which", [WHICH[1], WHICH[-2], POOL], ids=lambda which: which[0])
def test_a_margin_that_is_too_large_is_rejected_and_so_is_one_whose_slopes_are_gone(
    tmp_path, which
):
    file = file_of(tmp_path, *which)
    *rest, header, arrays = file
    (row, _), *_ = arrays["slopes_of"]
    with_more = {**arrays, "margin": arrays["margin"].copy()}
    with_more["margin"][row] += 0.02
    report = checked(*rest, dict(header), with_more)
    assert any(f"row {row}" in problem and "margin" in problem for problem in report.problems)

    without = {**arrays, **certificate_files.NO_SLOPES}
    report = checked(*rest, {**header, "slopes": 0}, without)
    assert any("recorded as certified" in problem for problem in report.problems), report


def test_a_margin_that_is_too_large_for_the_smaller_boxes_is_rejected(tmp_path):
    """Of the images that the last stage decided: of others these boxes may prove far more."""
    *rest, header, arrays = file_of(tmp_path, *WHICH[-1])
    rows = certified(*WHICH[-1]).stages[-1].certified
    with_more = {**arrays, "margin": arrays["margin"].copy()}
    with_more["margin"][rows] += 0.2
    report = checked(*rest, header, with_more)
    for row in rows:
        assert any(f"row {row})" in problem and "margin" in problem for problem in report.problems)


def test_a_file_of_slopes_that_fit_nothing_is_refused(tmp_path):
    *_, header, arrays = file_of(tmp_path, *WHICH[1])
    assert not certificate_files.faults(header, arrays)
    twice = np.concatenate([arrays["slopes_of"][:1]] * len(arrays["slopes_of"]))
    for name, value in (
        ("slopes_of", twice if len(twice) > 1 else -twice - 1),
        ("slopes_of", arrays["slopes_of"] + COUNT),
        ("slopes_of", arrays["slopes_of"][:, :1]),
        ("slopes", arrays["slopes"][1:]),
        ("slopes", arrays["slopes"].astype(np.float64)),
    ):
        assert certificate_files.faults(header, {**arrays, name: value})


def test_files_of_earlier_versions_have_no_slopes_and_are_confirmed(tmp_path):
    *rest, header, arrays = file_of(tmp_path, "relu", "deterministic", "local")
    header["version"] = 2
    del header["slopes"]
    old = {name: array for name, array in arrays.items() if name in certificate_files.ARRAYS}
    assert checked(*rest, header, old).confirmed


# ------------------------------------------------------------------------- the checker's derivation


@pytest.mark.parametrize("kind", [*KINDS, "sort", "pool"])
def test_any_slopes_give_the_checker_margins_that_hold(kind, monkeypatch):
    net, x, labels, epsilon = subject(kind)
    nodes = nodes_of(certificate_files.describe(net, x[0]), x.shape[1:])
    bounds = norms.Norms(1e-9, np.random.default_rng(0), patient=True)
    whole = [bounds(node.step.matrix) for node in nodes if isinstance(node.step, Affine)]
    network = walk.Network(nodes, whole, "float32")
    rng = np.random.default_rng(2)
    usual = onesided.RULES[0]

    def disturbed(by, step, w, radius):
        found = usual(step, w, radius)
        return np.where(step.counts, found + by * rng.normal(size=found.shape), step.fixed)

    better = 0
    for row in range(1, 9):
        steps = rng.normal(size=(4000, INPUTS))
        steps *= epsilon / np.linalg.norm(steps, axis=1, keepdims=True)
        logits = np.asarray(jax.vmap(net)(jnp.asarray(x[row] + steps, jnp.float32)))
        others = np.delete(logits, labels[row], axis=1)
        least = np.min(logits[:, labels[row]] - np.max(others, axis=1))
        local = walk.derive(network, x[row], int(labels[row]), epsilon, bounds).margin
        for by in (0.02, 0.1, 0.3, 1.0):
            monkeypatch.setattr(onesided, "RULES", (functools.partial(disturbed, by),))
            tight = walk.Tight(np.inf, {})
            found = walk.derive(network, x[row], int(labels[row]), epsilon, bounds, tight=tight)
            assert local <= found.margin <= least
            better += found.margin > local + 1e-6
    assert better >= 8  # the slopes have been used


CHECKED = ("relu", "clipped_relu", "maxmin", "clipped_maxmin", "leaky", "tanh", "gelu", "elu")
COMPARED = {
    "sort": Sort(np.arange(8).reshape(2, 4)),
    "sort of eight": Sort(np.array([[3, 1, 4, 0, 5, 2, 6, 7]])),
    "pool": MaxPool(np.arange(8).reshape(2, 4), 8),
    # (8 stands for what pads.)
    "overlapping pool": MaxPool(
        np.array([[8, 0, 1, 2], [1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8]]), 8
    ),
}


@pytest.mark.parametrize("kind", [*CHECKED, *COMPARED])
def test_no_error_in_ball_and_box_is_above_the_checkers_cost(kind):
    pairs = kind.endswith("maxmin")
    top = 0.4 if kind.startswith("clipped") else np.inf
    bottom = -top if pairs else 0.0
    activation = Activation(pairs, (8,), np.asarray(top), np.asarray(bottom))
    if kind == "leaky":
        activation = Leaky(np.full(8, -0.3), np.linspace(0.2, 2, 8), "float32")
    elif kind in ("tanh", "gelu", "elu"):
        activation = Smooth(kind, "float32", np.full(8, 0.7))
    activation = COMPARED.get(kind, activation)
    rng = np.random.default_rng(4)
    near = 0
    for number in range(60):
        z = rng.choice([-0.6, -0.4, -0.1, 0.0, 0.2, 0.4, 0.9], 8)
        lower, upper = z - rng.uniform(0, 0.6, 8), z + rng.uniform(0, 0.6, 8)
        if kind in COMPARED:  # constants count for less in a comparator
            still = rng.uniform(size=8) < 0.2
            lower, upper = np.where(still, z, lower), np.where(still, z, upper)
        known = walk.Known(z, lower, upper, lower < upper, 9.0, np.zeros(8), 0.0)
        after, rows = walk.activate(activation, known)
        steps = onesided.steps_of(activation, known, after, rows)
        radius = rng.uniform(0.05, 1.0)
        moves = rng.normal(size=(3000, 8))
        moves *= radius * rng.uniform(0, 1.3, (3000, 1)) / np.linalg.norm(moves, axis=1)[:, None]
        # Single entries move all of their windows, groups of entries all at once.
        moves[:16] = radius * np.concatenate([np.eye(8), -np.eye(8)])
        moves[16:1016] = radius / np.sqrt(8) * rng.integers(-1, 2, (1000, 8))
        points = np.clip(z + moves, lower, upper)
        points = points[np.linalg.norm((points - z)[:, rows], axis=1) <= radius]
        # All steps together: what the row says of the value is what it says of the input, and cost.
        g = rng.normal(size=(1, len(after.center))) * after.varies
        g = np.abs(g) if kind in COMPARED and number % 2 else g
        change = np.array([activation(p) for p in points]) - activation(z)
        row, spent = g, 0.0
        for step in reversed(steps):
            w = step.met(row)
            slopes = rng.uniform(-1, 1.2, w.shape)
            slopes = np.where(step.counts, slopes, step.fixed)
            spent = spent + step.cost(w, slopes, radius)
            row = step.back(row, slopes)
        errors = change @ g[0] - (points - z) @ row[0]
        assert np.max(errors) <= spent[0] + 1e-12
        near += np.max(errors) > 0.5 * spent[0]
    # (In six stages a random point is far from the worst of each.)
    assert near > (2 if kind == "sort of eight" else 20)


@pytest.mark.parametrize("size", [2, 3, 6, 11])
def test_the_comparators_of_the_checker_sort_whatever_a_block_holds(size):
    """By the 0-1 principle (Knuth, TAOCP 3, 5.3.4): what sorts zeros and ones sorts all."""
    for held in range(1, size + 1):
        z = np.array(list(itertools.product([0, 1], repeat=held)))
        for distance, starts in sorting(size):
            for i in (i for i in starts if i + distance < held):
                z[:, [i, i + distance]] = np.sort(z[:, [i, i + distance]], axis=1)
        assert np.all(np.diff(z, axis=1) >= 0)


@pytest.mark.parametrize("kind", ["relu", "clipped_relu", "abs"])
def test_the_second_choice_takes_crowns_slopes_here_and_in_the_checker(kind):
    """Slopes by hand, after Zhang et al., NeurIPS 2018 (arXiv 1811.00866), adaptive for ReLU."""
    function = {
        "relu": lambda t: np.maximum(t, 0),
        "clipped_relu": lambda t: np.clip(t, 0, 0.4),
        "abs": np.abs,
    }[kind]
    slopes_of = {"relu": (0.0, 1.0), "clipped_relu": (0.0, 1.0), "abs": (-1.0, 1.0)}[kind]
    kinks = {"relu": [0.0], "clipped_relu": [0.0, 0.4], "abs": [0.0]}[kind]
    rng = np.random.default_rng(8)
    z = rng.uniform(-0.6, 0.9, 200)
    lower, upper = z - rng.uniform(0.01, 0.6, 200), z + rng.uniform(0.01, 0.6, 200)
    w = rng.normal(size=200)

    expected = []
    for a, b, weight, center in zip(lower, upper, w, z, strict=True):
        chord = (function(b) - function(a)) / (b - a)
        if not any(a < kink < b for kink in kinks):
            expected.append(chord)
            continue
        bend = (function(b) - function(center)) / (b - center)
        bend -= (function(center) - function(a)) / (center - a)
        nearer = slopes_of[1] if 2 * chord > sum(slopes_of) else slopes_of[0]
        expected.append(chord if weight * bend >= 0 else nearer)

    with jax.enable_x64(True):
        act = {"relu": jax.nn.relu, "abs": jnp.abs}.get(kind) or (lambda t: jnp.clip(t, 0, 0.4))
        graph = lipjax.trace(act, jax.ShapeDtypeStruct((200,), jnp.float64))
        ends = map(jnp.asarray, (z, lower, upper))
        (pieces,) = graph.nodes[-1].rule.pieces(*ends, rounding.EXACT)
        found = tight.chosen(pieces, jnp.asarray(w), jnp.asarray(0.3), tight.CHOICES[1])
    np.testing.assert_allclose(found, expected, atol=1e-9)

    known = walk.Known(z, lower, upper, lower < upper, 9.0, np.zeros(200), 0.0)
    layer = Activation(False, (200,), np.asarray({"clipped_relu": 0.4}.get(kind, np.inf)), 0.0)
    if kind == "abs":
        layer = Leaky(np.full(200, -1.0), np.ones(200), "float32")
    after, rows = walk.activate(layer, known)
    (step,) = onesided.steps_of(layer, known, after, rows)
    np.testing.assert_allclose(onesided.RULES[1](step, w[None], 0.3)[0], expected, atol=1e-9)
