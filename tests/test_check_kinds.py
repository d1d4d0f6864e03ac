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
from lipjax.check import checker, kinds, nodes
from lipjax.check.layers import CannotCheck
from lipjax.check.walk import Known, worst_gains
from lipjax.formats import certificate_files

SHAPE = (2, 4)
SIZE = math.prod(SHAPE)


def read(kind, shape=SHAPE, **entries):
    """The checker's step of a described activation."""
    common = {"inputs": [0], "dtype": "float32", "executed": [], "roundings": 0.0}
    node = {"kind": kind, "shape": list(SHAPE), **common, **entries}
    before = [{"kind": "input", "shape": list(shape), **common, "inputs": []}]
    nodes._check_form(kind, 1, node)
    return nodes.READERS[kind](kind, node, before, None)


STEPS = {
    "abs": lambda: read("abs"),
    "sort": lambda: read("sort", axis=1),
    "sort by columns": lambda: read("sort", axis=0),
}


def box(seed, width=1.0):
    """A center in a box, of which ends touch 0 or coincide, and a mask of what varies."""
    rng = np.random.default_rng(seed)
    center = np.round(rng.normal(size=SIZE), 1)
    below, above = (rng.uniform(0, width, SIZE) * rng.integers(0, 2, SIZE) for _ in range(2))
    lower, upper = center - below, center + above
    lower = np.where(rng.uniform(size=SIZE) < 0.1, np.minimum(center, 0), lower)
    upper = np.where(rng.uniform(size=SIZE) < 0.1, np.maximum(center, 0), upper)
    return center, lower, upper, lower < upper


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
    known = Known(center, lower, upper, varies, radius, error, float(np.linalg.norm(error)))
    found, rows = step.activated(known)
    steps = step.pieces(known, radius)
    directions = rng.normal(size=(3, SIZE))
    costs, carried = np.zeros(3), directions
    for piece in reversed(steps):
        costs += worst_gains(piece.along(carried), -piece.reach, piece.reach, piece.radius)
        carried = piece.back(carried)
    for z in points(center, lower, upper, seed):
        value = step(z)
        broken += np.sum(value < found.lower) + np.sum(value > found.upper)
        broken += np.sum(~found.varies & (np.abs(value - step(center)) > 1e-12))
        # An input that moves nothing: the others say it all.
        still = step(np.where(rows, z, center))
        broken += np.sum(found.varies & (np.abs(value - still) > 1e-12))
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


@pytest.mark.parametrize("wrong", [NarrowAbsolute, OneSlope, ShortReach, OwnBlocks, OwnErrors])
def test_a_rule_of_the_checker_that_is_wrong_on_purpose_is_caught(wrong):
    step = wrong() if issubclass(wrong, kinds.Absolute) else wrong(STEPS["sort"]().places)
    assert sum(violations(step, seed) for seed in range(40)) > 0


def test_an_end_that_is_not_known_spreads_over_its_group():
    center, lower, upper, varies = box(0)
    upper[1] = np.nan
    known = Known(center, lower, upper, varies, 1.0, np.zeros(SIZE), 0.0)
    found, _ = STEPS["sort"]().activated(known)
    assert np.isnan(found.lower[:4]).all() and not np.isnan(found.lower[4:]).any()
    assert found.varies[:4].all()
    assert np.isnan(STEPS["abs"]().activated(known)[0].upper[1])


@pytest.mark.parametrize(
    ("kind", "entries", "said"),
    [
        ("sort", {"axis": 2}, "axis 2"),
        ("sort", {"axis": 1.0}, "axis 1.0"),
        ("sort", {}, "missing"),
        ("abs", {"shape": [8]}, "cannot take"),
        ("abs", {"axis": 0}, "unknown: axis"),
    ],
)
def test_descriptions_of_a_kind_that_do_not_fit_are_refused(kind, entries, said):
    with pytest.raises(CannotCheck, match=said):
        read(kind, **entries)


# ------------------------------------------------------------------------- certificates of the tool


class Net(nnx.Module):
    """5 inputs, an activation twice, 3 classes."""

    def __init__(self, activation):
        rngs, bias = nnx.Rngs(0), jax.nn.initializers.normal(0.3)
        self.activation = activation
        self.first = nnx.Linear(5, 8, rngs=rngs, bias_init=bias)
        self.second = nnx.Linear(8, 8, rngs=rngs, bias_init=bias)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        h = self.activation(3 * self.first(x))
        return self.head(self.activation(2 * self.second(h)))


FUNCTIONS = {
    "abs": jnp.abs,
    "groups of four": activations.GroupSort(4),
    "sort": jnp.sort,
}


@functools.cache
def certified(name, mode):
    f = Net(FUNCTIONS[name])
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
    margins = certificate.margin
    assert np.all(report.margin >= margins - 1e-9 * np.abs(margins))
    assert np.all(report.margin <= margins + 0.05 * np.abs(margins) + 0.02)
    rows = certificate.certified
    attack = lipjax.attacks.pgd(f, images[rows], labels[rows], 0.02, restarts=3, clip=None)
    assert not attack.broken.any()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_margin_of_a_kind_that_is_forged_is_rejected(tmp_path, name):
    f, images, certificate = certified(name, "linear")
    labels = certificate.predicted
    certificate_files.save(tmp_path / "x.npz", certificate, f, images, labels)
    header, arrays = certificate_files.load(tmp_path / "x.npz")
    arrays["margin"] = arrays["margin"] + 0.05 * np.abs(arrays["margin"]) + 0.02
    header["digest"] = certificate_files.digest(header, arrays)
    described = checker.describe(f, images[0], arithmetic=header["arithmetic"])
    rng = np.random.default_rng(0)
    report = checker.check(described, images, labels, header, arrays, rng)
    assert any("recorded margin" in problem for problem in report.problems), report
