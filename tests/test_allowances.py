"""What is derived of a zoo of small functions is, term by term, what it was when it was argued.

Rounding in float64 is a part in 1e16, so a test by samples does not see the term of a bound that
covers it. Here the unit roundoff is so large that each term shows, as 2^-16 in the checker's
arithmetic and as 2^-9 in the executed network's; and what follows is compared with the numbers in
`allowances.json`, a sum with uneven weights for each derived quantity. A difference is no error in
itself, but something that a proof rests on was changed: argue it (CONTRIBUTING.md), and let
`python tests/test_allowances.py` write the numbers anew.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from conftest import outward_bound, proven_norms

from lipjax import bounds, rounding
from lipjax.activations import base, leaky, smooth
from lipjax.bounds import margins, relaxed, tight
from lipjax.certificates import setup, verdicts
from lipjax.check import checker, kinds, layers, norms, onesided, slopes, walk
from lipjax.graph.linear import LinearOperator
from lipjax.rounding import executed, outward

# All that is compiled here is single operations, on few shapes.
LIBRARY = (rounding, outward, base, leaky, smooth)
KEPT = Path(__file__).with_name("allowances.json")
CHECKER = (norms, layers, slopes, onesided, kinds, walk)
EPSILONS = (0.0, 0.05, 0.4)
# Largest numbers of an executed network, of which some values are above.
LIMITS = (0.5, 1.0, 2.0, 4.0)
# Of the names of numbers that cover the rounding of a few operations in float64 itself.
FINE = "share"
# Of the executed network: operands, sums, results, what is flushed to zero, the largest number.
COARSE = {
    "float64": (0.0, 2.0**-13, 2.0**-13, 2.0**-20, 2.0**20),
    "float32": (2.0**-9, 2.0**-12, 2.0**-10, 2.0**-18, 2.0**20),
    "bfloat16": (2.0**-7, 2.0**-11, 2.0**-8, 2.0**-17, 2.0**20),
    "bfloat16_products": (2.0**-7, 2.0**-12, 2.0**-10, 2.0**-18, 2.0**20),
}


def summary(*parts) -> float:
    """One number of many, in which each counts by a weight of its own."""
    flat = [np.asarray(part, np.float64).reshape(-1) for part in parts]
    numbers = np.nan_to_num(np.concatenate([*flat, [0.0]]), nan=7.0, posinf=11.0, neginf=-13.0)
    return float(np.sum(numbers * np.cos(1.0 + np.arange(len(numbers)) ** 1.3)))


def by_field(things, fields: str) -> dict[str, float]:
    """Of each field the summary over all things."""
    return {name: summary(*(getattr(thing, name) for thing in things)) for name in fields.split()}


@pytest.fixture
def coarse(monkeypatch):
    with_large_units(monkeypatch)


def with_large_units(patch, unit: float = 2.0**-16) -> None:
    for module in CHECKER:
        for name, value in (("U", unit), ("TINY", 2.0**-24)):
            if hasattr(module, name):
                patch.setattr(module, name, value)
    for module in LIBRARY:
        for name, value in (("DOUBLE", unit), ("FLOOR", 2.0**-24), ("LEAST_SHARE", 2.0**-20)):
            if hasattr(module, name):
                patch.setattr(module, name, value)
    # Any scale is sound, and a search would be compiled.
    patch.setattr(tight, "best_scale", lambda *_: 1.5)
    patch.setattr(outward.gamma, "__defaults__", (unit,))
    patch.setattr(norms.gamma, "__defaults__", (unit,))
    patch.setattr(norms.up, "__defaults__", (16,))
    patch.setattr(walk, "ARITHMETICS", COARSE)
    patch.setattr(kinds, "UNITS", {name: COARSE[name][2:] for name in kinds.UNITS})


def network_of(name: str):
    """As the checker reads it, with its norms."""
    x = zoo.example(name)
    nodes = layers.nodes_of(checker.describe(zoo.FUNCTIONS[name], x), x.shape)
    bounds = norms.Norms(1e-6, np.random.default_rng(0))
    affine = [node.step for node in nodes if isinstance(node.step, layers.Affine)]
    return x, walk.Network(nodes, [bounds(each.matrix) for each in affine], "float32"), bounds


def of_the_checker(name: str) -> dict[str, float]:
    """Everything that the checker derives of a function, by quantity."""
    x, network, bounds = network_of(name)
    affine = [node.step for node in network.nodes if isinstance(node.step, layers.Affine)]
    found = {"whole": summary(network.whole), "meeting": summary(sorted(network.meeting))}
    found |= {f"affine {k}": v for k, v in by_field(affine, "terms largest row_norms").items()}
    with np.errstate(all="ignore"):
        count = sum(onesided.sizes(walk.walk(network, x, EPSILONS[1], bounds)))
    given = np.random.default_rng(9).integers(0, onesided.UNIT, count)
    for epsilon in EPSILONS:
        for mode, rows in {"": (), **checker.ROWS}.items():
            if mode == "rows" or (mode and epsilon != EPSILONS[1]):
                continue
            with np.errstate(all="ignore"):
                walked = walk.walk(network, x, epsilon, bounds, rows)
            found |= {
                f"{epsilon} {mode} {key}": value
                for key, value in {
                    **by_field(walked.values, "center lower upper varies radius error distance"),
                    **by_field(walked.values, "operand factor"),
                    "slack": summary(*walked.slack),
                    "norms": summary(walked.norms),
                    "kept": summary(*walked.kept.items()),
                    "moving": summary(*walked.moving.items()),
                    "rows": summary(*walked.rows.values()),
                }.items()
            }
        for mode, options in {
            "local": {},
            "linear": {"linear": True},
            "rows": {"linear": True, "rows": checker.ROWS["rows"]},
            "tight": {"tight": walk.Tight(np.inf, {})},
            "tight_rows": {"tight": walk.Tight(np.inf, {}), "rows": checker.ROWS["tight_rows"]},
            "slopes": {"tight": walk.Tight(np.inf, dict.fromkeys(range(3), given))},
        }.items():
            if mode not in ("local", "tight") and epsilon != EPSILONS[1]:
                continue
            labels = range(1 if mode == "tight_rows" else 3)
            derived = [walk.derive(network, x, k, epsilon, bounds, **options) for k in labels]
            fields = "logits rounding differences margin taken rival norms"
            for key, value in by_field(derived, fields).items():
                found[f"{epsilon} {mode} of {key}"] = value
    for limit in LIMITS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(walk, "ARITHMETICS", limited(limit))
            patch.setattr(kinds, "UNITS", {key: limited(limit)[key][2:] for key in kinds.UNITS})
            derived = [walk.derive(network, x, k, 0.05, bounds) for k in range(3)]
        for key, value in by_field(derived, "rounding differences margin").items():
            found[f"up to {limit} {key}"] = value
    return found


def limited(limit: float) -> dict[str, tuple[float, ...]]:
    """Arithmetics in which larger numbers overflow."""
    return {name: (*units[:4], limit) for name, units in COARSE.items()}


def of_the_checkers_norms(_=None) -> dict[str, float]:
    rng = np.random.default_rng(5)
    matrices = {"dense": rng.normal(size=(5, 9)), "tall": rng.normal(size=(9, 4)) * 1e-3}
    matrices["thin"] = np.where(rng.uniform(size=(12, 15)) < 0.1, rng.normal(size=(12, 15)), 0)
    found = {"least": norms.least_component(1e-6), "gamma": norms.gamma(3), "up": norms.up(2.0, 5)}
    found["up_norm"] = norms.up_norm(rng.normal(size=7))
    for name, entries in matrices.items():
        matrix = layers._affine(entries, None, (len(entries),)).matrix
        found[f"{name} cholesky"] = summary(norms.norm_by_cholesky(matrix, rng))
        found[f"{name} norm"] = summary(norms.Norms(1e-6, np.random.default_rng(0))(matrix))
        for log in (-53, -40, -34):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(norms, "U", 2.0**log)
                patch.setattr(norms.gamma, "__defaults__", (2.0**log,))
                one = norms.norm_by_chebyshev(matrix, 1e-6, np.random.default_rng(1))
                found[f"{name} chebyshev {log}"] = summary(one)
    return found


def activations() -> dict[str, Any]:
    """Of the checker, on 8 entries."""
    overlapping = np.array([[8, 0, 1, 2], [1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8]])
    ends = np.linspace(0.2, 0.9, 4)
    found: dict[str, Any] = {
        "abs": kinds.Absolute(),
        "sort": kinds.Sort(np.arange(8).reshape(4, 2).T),
        "sort of eight": kinds.Sort(np.array([[3, 1, 4, 0, 5, 2, 6, 7]])),
        "pool": kinds.MaxPool(np.arange(8).reshape(2, 4), 8),
        "overlapping pool": kinds.MaxPool(overlapping, 8),
        "leaky": kinds.Leaky(np.linspace(-0.4, 0.3, 8), np.linspace(0.2, 2, 8), "float32"),
        "cut": kinds.Leaky(np.zeros(8), np.ones(8), "bfloat16"),
        "clip": layers.Activation(False, (8,), np.linspace(0, 0.9, 8), np.array(0.0)),
        "maxmin": layers.Activation(True, (2, 4), np.array(np.inf), np.array(-np.inf)),
        "clipped maxmin": layers.Activation(True, (8,), ends, -ends),
    }
    smooth = {
        kind: kinds.Smooth(kind, "float32", np.linspace(-0.5, 1.8, 8) if kind == "elu" else None)
        for kind in (*kinds.PLAIN, *kinds.GATED, "elu")
    }
    return found | smooth


def of_the_kinds(kind: str) -> dict[str, float]:
    """All that the checker says of an activation on boxes: at its kinks and turns, on one side of
    them, points, wide ones, and some that are not known to be numbers."""
    activation = activations()[kind]
    rng = np.random.default_rng(7)
    found: dict[str, list[float]] = {}
    for number in range(8):
        z = rng.choice([-1.5, -0.75, -0.4, -0.1, 0.0, 0.2, 0.4, 1.4, 2.0], 8)
        wide = rng.choice([0.0, 0.1, 0.4, 3.0, 50.0 if number == 7 else 1.0], (2, 8))
        lower, upper = z - wide[0], z + wide[1]
        lower[0], upper[1] = min(lower[0], 0.0) * (number % 2), max(upper[1], 0.0) * (number % 3)
        z = np.clip(z, np.minimum(lower, upper), np.maximum(lower, upper))
        lower, upper = np.minimum(lower, z), np.maximum(upper, z)
        if number == 6:
            lower[3] = np.nan
        known = walk.Known(
            *(z, lower, upper, (lower != upper) & (rng.uniform(size=8) < 0.9)),
            *(float(rng.uniform(0.1, 2)), rng.uniform(0, 0.1, 8), float(rng.uniform(0.05, 0.3))),
        )
        with np.errstate(all="ignore"):
            for key, value in _said(activation, known, rng).items():
                found.setdefault(key, []).append(value)
    return {key: summary(values) for key, values in found.items()}


def _said(activation, known, rng) -> dict[str, float]:
    after, rows = walk.activate(activation, known)
    g = rng.normal(size=(3, len(after.center)))
    found = by_field([after], "center lower upper varies error distance")
    found |= {"rows": summary(rows), "growth": float(activation.growth(known))}
    found["off"] = summary(activation.off(known.center), activation.lipschitz)
    row, parts = g, []
    for piece in reversed(slopes.pieces(activation, known, 0.8)):
        parts += [piece.reach, piece.radius, piece.along(row), piece.back(row)]
        row = piece.back(row)
    found["pieces"] = summary(*parts)
    row = g
    steps = [] if np.isnan(known.lower).any() else onesided.steps_of(activation, known, after, rows)
    for k, step in enumerate(reversed(steps)):
        met = step.met(row)
        some = np.where(step.counts, rng.uniform(-0.5, 1.2, met.shape), step.fixed)
        found |= {f"{k} {key}": v for key, v in by_field([step], "points rise fall unit").items()}
        found[f"{k} counts"] = summary(step.counts, step.fixed, met)
        found[f"{k} cost"] = summary(step.cost(met, some, 0.6), step.cost(met, some, 4.0))
        row = step.back(row, some)
        found[f"{k} back"] = summary(row)
    return found


def of_older_files(_=None) -> dict[str, float]:
    """The maps of layers as files of versions 1 and 2 describe them, of every kind and setting."""
    rng = np.random.default_rng(8)

    def conv(*shape, **settings):
        usual = {"strides": (1, 1), "dilation": (1, 1), "input_dilation": (1, 1), "groups": 1}
        own = {"kind": "conv", "kernel": rng.normal(size=shape), "bias": rng.normal(size=shape[-1])}
        return {**usual, **own, "padding": "SAME", **settings}

    described = [
        {"kind": "normalize", "scale": np.array([2.0, 3.0]), "shift": np.array([0.5, -1.0])},
        conv(3, 2, 1, 4, groups=2, strides=(2, 1)),
        {"kind": "maxmin"},
        conv(2, 2, 4, 2, padding=((1, 0), (0, 2)), dilation=(2, 1)),
        {"kind": "fork"},
        {"kind": "clipped_maxmin", "upper": np.array([0.5]), "lower": np.array([-0.25])},
        conv(2, 3, 2, 2, padding="SAME"),
        {"kind": "join"},
        conv(2, 2, 2, 2, padding=((1, 1), (1, 1)), input_dilation=(2, 2)),
        {"kind": "average_pool", "window": (2, 3), "strides": (1, 2)},
        {"kind": "relu"},
        conv(1, 2, 2, 2, padding="VALID", strides=(1, 2)),
        {"kind": "flatten", "ndim": 3},
    ]
    size = _size(described)
    described += [
        {"kind": "clipped_relu", "threshold": np.array(0.75)},
        {"kind": "linear", "kernel": rng.normal(size=(size, 3)), "bias": rng.normal(size=3)},
    ]
    found = {}
    for k, node in enumerate(layers.nodes_of(described, (5, 4, 2))):
        step = node.step
        found[f"{k} reads"] = summary(node.inputs)
        if isinstance(step, layers.Affine):
            dense = step.matrix.toarray(), step.bias, step.absolute.toarray(), step.row_norms
            found[f"{k} map"] = summary(*dense, step.squared.toarray(), step.terms, step.largest)
        elif isinstance(step, layers.Activation):
            found[f"{k} ends"] = summary(step.top, step.bottom, step.shape, step.pairs)
    return found


def _size(described) -> int:
    """How many entries are left at the end."""
    for size in range(1, 200):
        head = {"kind": "linear", "kernel": np.ones((size, 2)), "bias": None}
        try:
            layers.nodes_of([*described, head], (5, 4, 2))
        except layers.CannotCheck:
            continue
        return size
    raise AssertionError("no head fits")


def of_the_outward_arithmetic(_=None) -> dict[str, float]:
    """Of `rounding.outward` and of what an inner product rounds off, each by itself."""
    rng = np.random.default_rng(6)
    found = {"gamma": outward.gamma(5), "gamma of many": min(outward.gamma(2**16), 9.0)}
    for name, arithmetic in COARSE.items():
        both = [rounding.Arithmetic(name, *arithmetic), rounding.Arithmetic("", *COARSE["float64"])]
        for k, roundings in ((1, 0.0), (2, 3.0)):
            for which, share in zip("ab", executed.shares(both[:k], 7, roundings), strict=True):
                found[f"{FINE} {which} of {name}, {k}"] = share
    with jax.enable_x64(True):
        x, y = (jnp.asarray(rng.uniform(0, 2, zoo.SIZE)) for _ in range(2))
        low, high = x - y, x + y
        matrix = LinearOperator.from_matrix(jnp.asarray(rng.normal(size=(3, 6))), (6,), (3,))
        matrix = dataclasses.replace(matrix, bias=-y[:3])
        own = rounding.OUTWARD
        found |= {
            "up": summary(own.up(x), own.up(x, 5)),
            "around": summary(*own.around(low, high)),
            "widened": summary(*own.widened(low, high, 0.0), *own.widened(0 * x, 0 * x, y)),
            "not widened": summary(*own.widened(0 * x, 0 * x, 0 * y)),
            "slack": summary(own.slack(matrix, low, high), own.norm(y)),
            "length": summary(own.length(x), own.length(0 * x)),
            "slope": summary(own.slope_width(x)),
            "left over": summary(own.left_over(0.1, x, 2.0), own.left_over(0.0, x, 2.0)),
            "dual": summary(relaxed.dual(low, -x, y, 0.5, 0.7, own)),
            "product": summary(*(relaxed.largest_product(low, x, r, own) for r in (0, 0.3, 9))),
            "partial sum": summary(executed.partial_sum(x, y)),
        }
    return found


def of_the_library(name: str) -> dict[str, float]:
    """Boxes, radii, margins and allowances for rounding, by quantity."""
    x = zoo.example(name)
    traced = bounds.graph_of(zoo.FUNCTIONS[name], jnp.asarray(x))
    arithmetics = [
        [rounding.Arithmetic(a.name, *COARSE[a.name]) for a in each]
        for each in rounding.arithmetics_of(traced)
    ]
    with jax.enable_x64(True):
        graph = setup.in_float64(traced)
        whole = proven_norms(graph)
        found = {"norms": summary(*whole)}
        for mode in ("local", "linear", "paper", "global") if name == "sums" else ("local",):
            bound = outward_bound(graph, x, 0.1, mode)
            found |= {
                f"{mode} {key}": value
                for key, value in by_field(bound.regions, "center radius lower upper").items()
            }
            found |= {f"{mode} norms": summary(*bound.radii), f"{mode} l": float(bound.lipschitz)}
            if mode != "local":
                continue
            boxes = [(region.lower, region.upper) for region in bound.regions]
            for label in (None, 1) if name != "images" else (1,):
                error = rounding.forward_error(graph, boxes, arithmetics, whole, label=label)
                found[f"error {label}"] = summary(error)
            for limit in LIMITS:
                less = [
                    [dataclasses.replace(a, largest=limit) for a in each] for each in arithmetics
                ]
                error = rounding.forward_error(graph, boxes, less, whole)
                found[f"error up to {limit}"] = summary(error)
            if name == "images":  # what follows takes long to compile
                continue
            row = margins.directions(graph, bound.penultimate, 1)[0]
            found["ascent"] = summary(margins.ascent(row, bound.penultimate, rounding.OUTWARD))
            end = graph.nodes[-1].inputs[0]
            same = (graph, verdicts.view, rounding.OUTWARD, bound.regions, bound.radii, end)
            for kind in (relaxed.Reverse, tight.OneSided):
                found[kind.__name__] = summary(*kind(*same).propagate(row), kind(*same).gain(row))
            facts = verdicts.judged(
                bound, 1, bound.logits, *verdicts.allowances(bound, 1, arithmetics, whole)
            )
            found["judged"] = summary(facts["margin"], facts["allowance"])
    return found


CASES: dict[str, Any] = {
    "checker": (of_the_checker, zoo.FUNCTIONS),
    "library": (of_the_library, zoo.FUNCTIONS),
    "norms of the checker": (of_the_checkers_norms, ("",)),
    "activation of the checker": (of_the_kinds, activations()),
    "older files": (of_older_files, ("",)),
    "outward": (of_the_outward_arithmetic, ("",)),
}


@pytest.mark.parametrize("name", zoo.FUNCTIONS)
def test_each_term_of_the_librarys_bounds_is_what_was_argued(name, coarse):
    compared(of_the_library(name), f"library, {name}")


@pytest.mark.core
def test_each_term_of_the_outward_arithmetic_is_what_was_argued(coarse):
    compared(of_the_outward_arithmetic(), "outward, ")


@pytest.mark.core
@pytest.mark.parametrize("name", ["sums", "narrow"])
def test_with_twice_the_unit_of_roundoff_no_box_is_smaller_and_no_margin_larger(name, monkeypatch):
    """So that a mutant that counts an allowance twice need not be run (`benchmarks.mutations`)."""
    before = None
    for unit in (2.0**-17, 2.0**-16):
        with_large_units(monkeypatch, unit)
        x, network, bounds = network_of(name)
        walked = walk.walk(network, x, 0.1, bounds).values
        rows = walk.derive(network, x, 0, 0.1, bounds, linear=True, rows=(None,))
        tight = walk.derive(network, x, 0, 0.1, bounds, tight=walk.Tight(np.inf, {}))
        if before is not None:
            for old, new in zip(before[0], walked, strict=True):
                assert np.all(new.lower <= old.lower) and np.all(new.upper >= old.upper)
                assert new.radius >= old.radius
            assert rows.margin < before[1].margin and tight.margin < before[2].margin
        before = walked, rows, tight


@pytest.mark.core
def test_the_checker_reads_each_layer_of_an_older_file_as_it_was_argued(coarse):
    compared(of_older_files(), "older files, ")


@pytest.mark.core
@pytest.mark.parametrize("kind", activations())
def test_each_term_of_the_checkers_activations_is_what_was_argued(kind, coarse):
    compared(of_the_kinds(kind), f"activation of the checker, {kind}")


@pytest.mark.core
def test_each_term_of_the_checkers_norms_is_what_was_argued(coarse):
    compared(of_the_checkers_norms(), "norms of the checker, ")


@pytest.mark.core
@pytest.mark.parametrize("name", zoo.FUNCTIONS)
def test_each_term_of_the_checkers_bounds_is_what_was_argued(name, coarse):
    compared(of_the_checker(name), f"checker, {name}")


def compared(found: dict[str, float], key: str) -> None:
    kept = json.loads(KEPT.read_text())[key]
    assert kept.keys() == found.keys()
    other = {}
    for name, value in found.items():
        if not alike(name, value, kept[name]):
            other[name] = kept[name], value
    assert not other, f"{key}: derived numbers (kept, found) have changed: {other}"


def alike(name: str, value: float, kept: float) -> bool:
    """Whether they differ by no more than other machines' last digits."""
    rtol, atol = (3e-15, 0.0) if name.startswith(FINE) else (1e-9, 1e-11)
    return bool(np.isclose(value, kept, rtol=rtol, atol=atol))


def test_the_units_are_those_of_the_formats():
    """Of IEEE 754 and of bfloat16; tensor cores and TPUs as `rounding.outward` has it."""
    half = {name: float(jnp.finfo(name).eps) / 2 for name in ("float64", "float32", "bfloat16")}
    assert norms.U == half["float64"] == executed.ARITHMETICS["float64"].accumulate
    least = 2 * float(jnp.finfo("float32").tiny)
    for name, (u_in, u_acc, u_out) in {
        "float64": (0.0, half["float64"], half["float64"]),
        "float32": (0.0, half["float32"], half["float32"]),
        "tf32": (2.0**-10, 2.0**-22, half["float32"]),
        "bfloat16_products": (half["bfloat16"], 2.0**-22, half["float32"]),
        "bfloat16": (half["bfloat16"], 2.0**-22, half["bfloat16"]),
    }.items():
        own = executed.ARITHMETICS[name]
        smallest = 2.0**-1020 if name == "float64" else least
        assert (own.input, own.accumulate, own.output, own.smallest) == (
            *(u_in, u_acc, u_out, smallest),
        )
        assert walk.ARITHMETICS[name][:4] == (u_in, u_acc, u_out, smallest)
        largest = float(jnp.finfo("float64" if name == "float64" else "float32").max)
        for limit in (own.largest, walk.ARITHMETICS[name][4]):
            assert limit <= largest and limit > (1e299 if name == "float64" else largest / 2.01)
        if name in kinds.UNITS:
            assert kinds.UNITS[name] == walk.ARITHMETICS[name][2:]


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        with_large_units(patch)
        numbers = {
            f"{what}, {name}": function(name)
            for what, (function, names) in CASES.items()
            for name in names
        }
    # What is alike stays as it is, so that a change shows what changed.
    before = json.loads(KEPT.read_text())
    for case, found in numbers.items():
        for name, kept in before.get(case, {}).items():
            if name in found and alike(name, found[name], kept):
                found[name] = kept
    KEPT.write_text(json.dumps(numbers, indent=0) + "\n")
    sys.stdout.write(f"{sum(map(len, numbers.values()))} numbers in {KEPT}\n")
