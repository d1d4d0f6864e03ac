"""The checker's activations, kind by kind: each rule against values on samples of boxes, mutants of
them that are caught, and certificates of the tool that are confirmed and do not break."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lipjax
from lipjax import activations
from lipjax.activations import smooth
from lipjax.check import checker, kinds, nodes
from lipjax.check.layers import CannotCheck
from lipjax.check.walk import Known, worst_gains
from lipjax.formats import certificate_files

SHAPE = (2, 4)
SIZE = math.prod(SHAPE)


def read(kind, **entries):
    """The checker's step of a described activation of an input of `SHAPE`."""
    common = {"inputs": [0], "dtype": "float32", "executed": [], "roundings": 0.0}
    entries = {k: np.asarray(v) if k in kinds.PARAMETERS else v for k, v in entries.items()}
    node = {"kind": kind, "shape": list(SHAPE), **common, **entries}
    before = [{"kind": "input", "shape": list(SHAPE), **common, "inputs": []}]
    nodes._check_form(kind, 1, node)
    executed = nodes._executed(kind, node, before)
    return nodes.READERS[kind](kind, node, before, executed)


def windows(*window, stride=None, pad=0):
    return {
        "window": list(window),
        "strides": list(window) if stride is None else [stride] * 2,
        "padding": [[pad, pad]] * 2,
        "dilation": [1, 1],
    }


STEPS = {
    "abs": lambda: read("abs"),
    "sort": lambda: read("sort", axis=1),
    "sort by columns": lambda: read("sort", axis=0),
    "leaky": lambda: read("leaky", below=np.float32(0.1), above=np.float32(1)),
    **{
        kind: functools.partial(read, kind, executed=[[kind, ["float32"], "float32", None, None]])
        for kind in (*kinds.PLAIN, *kinds.GATED)
    },
    "elu": lambda: read(
        "elu",
        executed=[["elu", ["float32"], "float32", None, None]],
        alpha=np.array([1.0, 0.3, -0.5, 2.0], np.float32),
    ),
    "max_pool": lambda: read("max_pool", shape=[2, 2], **windows(1, 2)),
    "max_pool, overlapping": lambda: read("max_pool", shape=[1, 3], **windows(2, 2, stride=1)),
    "max_pool, padded": lambda: read("max_pool", shape=[3, 4], **windows(2, 3, stride=1, pad=1)),
    "leaky, other slopes": lambda: read(
        "leaky",
        below=np.array([-0.5, 0.0, 1.0, 3.0], np.float32),
        above=np.array([[1.0], [-2.0]], np.float32),
    ),
}


def box(seed, width=1.0):
    """A center in a box, of which ends touch 0 or coincide, and a mask of what varies.

    Of some entries that do not vary it is not known which number of the box they are.
    """
    rng = np.random.default_rng(seed)
    center = np.round(rng.normal(size=SIZE), 1)
    below, above = (rng.uniform(0, width, SIZE) * rng.integers(0, 2, SIZE) for _ in range(2))
    lower, upper = center - below, center + above
    lower = np.where(rng.uniform(size=SIZE) < 0.1, np.minimum(center, 0), lower)
    upper = np.where(rng.uniform(size=SIZE) < 0.1, np.maximum(center, 0), upper)
    return center, lower, upper, (lower < upper) & (rng.uniform(size=SIZE) < 0.7)


def points(center, lower, upper, seed):
    rng = np.random.default_rng(seed)
    yield center
    for _ in range(12):
        yield np.where(rng.integers(0, 2, SIZE), lower, upper)
    for _ in range(8):
        yield np.clip(np.broadcast_to(rng.normal(), SIZE), lower, upper)
    yield np.clip(np.zeros(SIZE), lower, upper)
    for _ in range(8):
        yield lower + rng.uniform(size=SIZE) * (upper - lower)


def violations(step, seed, width=1.0) -> int:
    """How many of a step's guarantees are broken on points of a box."""
    center, lower, upper, varies = box(seed, width)
    rng, broken = np.random.default_rng(seed + 1), 0
    error = 1e-6 * rng.uniform(size=SIZE)
    radius = float(np.linalg.norm(np.maximum(center - lower, upper - center)))
    constant = np.where(rng.integers(0, 2, SIZE), lower, upper)
    known = Known(center, lower, upper, varies, radius, error, float(np.linalg.norm(error)))
    found, rows = step.activated(known)
    steps = step.pieces(known, radius)
    directions = rng.normal(size=(3, found.center.size))
    costs, carried = np.zeros(3), directions
    for piece in reversed(steps):
        costs += worst_gains(piece.along(carried), -piece.reach, piece.reach, piece.radius)
        carried = piece.back(carried)
    growth = step.growth(known)
    still = step(np.where(varies, center, constant))
    for z in points(center, lower, upper, seed):
        z = np.where(varies, z, constant)
        value = step(z)
        away = np.linalg.norm((value - step(center))[found.varies])
        broken += away > growth * np.linalg.norm((z - center)[rows]) + 1e-12
        broken += np.sum(value < found.lower) + np.sum(value > found.upper)
        broken += np.sum(~found.varies & (np.abs(value - still) > 1e-12))
        # An input that moves nothing: the others say it all.
        others = step(np.where(rows, z, center))
        broken += np.sum(found.varies & (np.abs(value - others) > 1e-12))
        gained = directions @ (value - step(center)) - carried @ (z - center)
        broken += np.sum(gained > costs + 1e-12)
        moved = step(z + error * rng.choice([-1, 1], SIZE)) - value
        broken += np.sum(np.abs(moved) > found.error + 1e-15)
        broken += np.linalg.norm(moved) > found.distance + 1e-15
    return int(broken)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("width", [0.05, 0.5, 3.0])
def test_what_the_checker_says_of_a_kind_holds_on_samples(name, width):
    assert sum(violations(STEPS[name](), seed, width) for seed in range(60)) == 0


class NarrowAbsolute(kinds.Absolute):
    """Forgets that the value is 0 inside of a box over 0."""

    def activated(self, known):
        found, rows = super().activated(known)
        ends = np.abs(known.lower), np.abs(known.upper)
        return dataclasses.replace(found, lower=np.minimum(*ends)), rows


class OneSlope(kinds.Absolute):
    """Takes the box for one side of the kink."""

    def pieces(self, known, moving):
        end = np.where(known.center >= 0, np.maximum(known.lower, 0), known.lower)
        return super().pieces(dataclasses.replace(known, lower=end), moving)


class SmallEnds(kinds.Leaky):
    """Forgets the kink where both slopes rise from it."""

    def activated(self, known):
        found, rows = super().activated(known)
        ends = self(known.lower), self(known.upper)
        return dataclasses.replace(found, lower=np.minimum(*ends) - 1e-12), rows


class NoGrowth(kinds.Leaky):
    """Says of an error of the input that no slope multiplies it."""

    def activated(self, known):
        found, rows = super().activated(known)
        return dataclasses.replace(found, error=known.error), rows


class SlopeOfTheCenter(kinds.Leaky):
    """Takes the slope at the center for all that there are."""

    def pieces(self, known, moving):
        tight = dataclasses.replace(known, lower=known.center, upper=known.center)
        return super().pieces(tight, moving)


class ShortReach(kinds.Sort):
    """Says half of the errors."""

    def pieces(self, known, moving):
        (piece,) = super().pieces(known, moving)
        return [dataclasses.replace(piece, reach=piece.reach / 2, radius=piece.radius / 2)]


class OwnBlocks(kinds.Sort):
    """Takes the order of the centers for that of the box."""

    def _blocks(self, known):
        number, single, first, order = super()._blocks(known)
        return number, np.ones_like(single), np.zeros_like(first), order


class OwnErrors(kinds.Sort):
    """Says of each sorted entry the error of the one that stood there."""

    def activated(self, known):
        found, rows = super().activated(known)
        return dataclasses.replace(found, error=known.error), rows


class OwnRows(kinds.Sort):
    """Forgets what shares a block with an input that varies, itself the same for every image."""

    def activated(self, known):
        found, _ = super().activated(known)
        return found, known.varies


class OwnTaps(kinds.MaxPool):
    """The same of windows."""

    def activated(self, known):
        found, rows = super().activated(known)
        return found, rows & known.varies


class SomeWindows(kinds.MaxPool):
    """Says that each entry lies in one window."""

    def _most(self, mask):
        return min(super()._most(mask), 1.0)


class OnlyTheLeader(kinds.MaxPool):
    """Takes the leader at the center for the value of the whole box."""

    def pieces(self, known, moving):
        (piece,) = super().pieces(known, moving)
        return [dataclasses.replace(piece, reach=0 * piece.reach, radius=0.0)]


class HighFloor(kinds.MaxPool):
    """Leaves out the candidates that lead nowhere but at the ends of the box."""

    def _candidates(self, known):
        candidate, floor = super()._candidates(known)
        return candidate & (self._held(known.center) > floor[:, None]), floor


class NoTurns(kinds.Smooth):
    """Takes the slopes at the ends for the extreme ones."""

    def _slopes(self, known):
        ends = self._slope(known.lower), self._slope(known.upper)
        return np.minimum(*ends), np.maximum(*ends)


class NoRounding(kinds.Smooth):
    """Says that an executed value is off by nothing of its own, and inputs by less."""

    def activated(self, known):
        found, rows = super().activated(known)
        return dataclasses.replace(found, error=0.2 * known.error), rows


WRONG = {
    "tanh": (NoTurns, NoRounding),
    "max_pool, padded": (SomeWindows, OnlyTheLeader, HighFloor, OwnTaps),
    "abs": (NarrowAbsolute, OneSlope),
    "sort": (ShortReach, OwnBlocks, OwnErrors, OwnRows),
    "leaky, other slopes": (SmallEnds, NoGrowth, SlopeOfTheCenter),
}


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, wrong) for name, found in WRONG.items() for wrong in found]
)
def test_a_rule_of_the_checker_that_is_wrong_on_purpose_is_caught(name, wrong):
    step = wrong(**vars(STEPS[name]()))
    assert sum(violations(step, seed, 2.0) for seed in range(40)) > 0


@pytest.mark.parametrize("kind", ["elu", "sigmoid", "tanh", "softplus", *kinds.GATED])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_rounding_of_a_smooth_kind_is_what_was_measured_and_nothing_is_said_beyond(kind, dtype):
    """By the tool's own table of units and scales, which tests/test_smooth.py measures."""
    center = np.array([-3.0, -1e-3, 0.0, 0.5, 2.0, 40.0, 0.9e18, 1.1e18])
    found, _ = dataclasses.replace(STEPS[kind](), dtype=dtype).activated(
        Known(center, center, center, np.zeros(SIZE, bool), 0.0, np.zeros(SIZE), 0.0)
    )
    size = np.abs(center)
    scale = 2.0 if kind == "elu" else smooth.CURVES[kind].scale(size)  # the largest alpha
    least = smooth.EXECUTED * {"float32": 2.0**-24, "float64": 2.0**-53}[dtype] * scale
    assert np.all(found.error >= least) and np.isinf(found.error).tolist() == [False] * 7 + [True]
    assert np.all(found.error[:-1] <= (1.001 * least + np.zeros(SIZE) + 1e-36)[:-1])


@pytest.mark.parametrize("kind", [*kinds.PLAIN, *kinds.GATED])
def test_slopes_at_a_point_have_room_for_their_own_rounding(kind):
    z = np.linspace(-3, 3, SIZE)
    known = Known(z, z, z, np.zeros(SIZE, bool), 0.0, np.zeros(SIZE), 0.0)
    low, high = STEPS[kind]()._slopes(known)
    assert np.all(high - low >= 2.0**-43)


def test_an_end_that_is_not_known_spreads_over_its_group():
    center, lower, upper, varies = box(0)
    upper[1] = np.nan
    known = Known(center, lower, upper, varies, 1.0, np.zeros(SIZE), 0.0)
    found, _ = STEPS["sort"]().activated(known)
    assert np.isnan(found.lower[:4]).all() and not np.isnan(found.lower[4:]).any()
    assert found.varies[:4].all()
    assert np.isnan(STEPS["abs"]().activated(known)[0].upper[1])


GELU, MUL = ([name, ["float32"], "float32", None, None] for name in ("gelu", "mul"))
SLOPES = {"below": np.float32(0.1), "above": np.float32(1)}


@pytest.mark.parametrize(
    ("kind", "entries", "said"),
    [
        ("sort", {"axis": 2}, "axis 2"),
        ("sort", {"axis": 1.0}, "axis 1.0"),
        ("sort", {"axis": -1}, "axis -1"),
        ("sort", {"shape": [2, 0], "axis": 1}, "which this checker cannot take"),
        ("sort", {}, "missing"),
        ("abs", {"shape": [8]}, "cannot take"),
        ("abs", {"axis": 0}, "unknown: axis"),
        ("max_pool", {"shape": [2, 1], **windows(1, 2)}, "makes the shape"),
        ("max_pool", {"shape": [4, 6], **windows(1, 1, pad=1)}, "holds nothing"),
        ("max_pool", {"shape": [2, 2], **windows(1, 2, stride=0)}, "which are none"),
        ("max_pool", {"shape": [2, 2], **windows(1)}, "other axes"),
        (
            *("max_pool", {"shape": [2, 2], **windows(1, 2), "padding": [[0, 0, 0], [0, 0]]}),
            "which are none",
        ),
        (
            *("max_pool", {"shape": [2, 2], **windows(1, 2), "padding": [[10**30, -(10**30)]] * 2}),
            "which are none",
        ),
        ("gelu", {}, "no arithmetic"),
        ("gelu", {"executed": [["tanh", ["float32"], "float32", None, None]]}, "'tanh'"),
        (
            "gelu",
            {"executed": [["gelu", ["bfloat16", "float32"], "float32", None, None]]},
            "executed in bfloat16, float32",
        ),
        ("gelu", {"executed": [GELU, ["mul", *GELU[1:]]]}, "more than one equation"),
        ("leaky", {"below": np.float32(0.1), "above": np.zeros(3, np.float32)}, "do not fit"),
        ("leaky", {**SLOPES, "executed": [MUL] * 3}, "other equations"),
        ("leaky", {**SLOPES, "executed": [["mul", ["float32", "bfloat16"], *MUL[2:]]]}, "other eq"),
    ],
)
def test_descriptions_of_a_kind_that_do_not_fit_are_refused(kind, entries, said):
    with pytest.raises(CannotCheck, match=said):
        read(kind, **entries)


def test_a_sort_of_groups_that_would_be_compared_each_with_each_is_refused():
    shape = [1, 2**15]
    node = {"kind": "sort", "shape": shape, "axis": 1, "executed": [], "dtype": "float32"}
    with pytest.raises(CannotCheck, match="too much"):
        nodes.READERS["sort"]("sort", node, [{"shape": shape}], None)


# ------------------------------------------------------------------------- certificates of the tool


class Net(nnx.Module):
    """5 inputs, an activation twice, 3 classes."""

    def __init__(self, *activations):
        rngs, bias = nnx.Rngs(0), jax.nn.initializers.normal(0.3)
        self.activations = activations
        self.first = nnx.Linear(5, 8, rngs=rngs, bias_init=bias)
        self.second = nnx.Linear(8, 8, rngs=rngs, bias_init=bias)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        first, second = self.activations
        return self.head(second(2 * self.second(first(3 * self.first(x)))))


pooled = functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(1, 1))
fours = functools.partial(activations.groupsort, size=4)
FUNCTIONS = {
    "abs and sort": (jnp.abs, jnp.sort),
    "groups of four": (fours, fours),
    "max pooling and leaky": (
        lambda x: pooled(x.reshape(4, 2, 1)).reshape(-1)[jnp.arange(8) % 3],
        lambda x: jnp.where(x > 0, x, 0.2 * x),
    ),
    "gelu and tanh": (jax.nn.gelu, jnp.tanh),
    "silu and softplus": (jax.nn.silu, jax.nn.softplus),
    "exact gelu and elu": (functools.partial(jax.nn.gelu, approximate=False), jax.nn.elu),
    "sigmoid and softsign": (jax.nn.sigmoid, jax.nn.soft_sign),
    "hard swish and sigmoid": (jax.nn.hard_swish, jax.nn.sigmoid),
}
SMOOTH = tuple(FUNCTIONS)[3:]


@functools.cache
def certified(name, mode):
    f = Net(*FUNCTIONS[name])
    images = np.random.default_rng(5).uniform(0, 1, (6, 5)).astype(np.float32)
    certificate = lipjax.certify(f, images, None, 0.02, tier="deterministic", mode=mode)
    return f, images, certificate


@pytest.mark.parametrize("mode", ["local", "rows"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_certificates_of_a_kind_are_confirmed_and_do_not_break(tmp_path, name, mode):
    f, images, certificate = certified(name, mode)
    labels = certificate.predicted
    certificate_files.save(tmp_path / "x.npz", certificate, f, images, labels)
    header, arrays = certificate_files.load(tmp_path / "x.npz")
    described = checker.describe(f, images[0], arithmetic=header["arithmetic"])
    rng = np.random.default_rng(0)
    report = checker.check(described, images, labels, header, arrays, rng)
    assert report.confirmed and report.certified >= 3, report
    # How XLA rounds them was measured on CPUs: whoever reads it has to be told.
    smooth = certificate_files.measured(described)
    assert smooth == (name in SMOOTH)
    for text in (certificate.statement, header["statement"], str(report)):
        assert ("on a CPU, by XLA" in text) == smooth
    silent = {key: value for key, value in header.items() if key != "backend"}
    problems = checker._contradictions(described, images, labels, silent, arrays)
    assert any("on a CPU, by XLA" in problem for problem in problems) == smooth
    margins = certificate.margin
    assert np.all(report.margin >= margins - 1e-9 * np.abs(margins))
    assert np.all(report.margin <= margins + 0.05 * np.abs(margins) + 0.05)
    rows = certificate.certified
    attack = lipjax.attacks.pgd(f, images[rows], labels[rows], 0.02, restarts=3, clip=None)
    assert not attack.broken.any()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_margin_of_a_kind_that_is_forged_is_rejected(tmp_path, name):
    f, images, certificate = certified(name, "rows")
    labels = certificate.predicted
    certificate_files.save(tmp_path / "x.npz", certificate, f, images, labels)
    header, arrays = certificate_files.load(tmp_path / "x.npz")
    forged = arrays["margin"] + 0.05 * np.abs(arrays["margin"]) + 0.05
    arrays["margin"] = np.where(arrays["certified"], forged, arrays["margin"])
    header["digest"] = certificate_files.digest(header, arrays)
    described = checker.describe(f, images[0], arithmetic=header["arithmetic"])
    rng = np.random.default_rng(0)
    report = checker.check(described, images, labels, header, arrays, rng)
    assert any("recorded margin" in problem for problem in report.problems), report
