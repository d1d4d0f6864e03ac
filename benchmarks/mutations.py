"""Changes the code that proofs rest on, one operator at a time, and counts what the tests notice.

    python -m benchmarks.mutations --modules=bounds.modes --sample=20
    python -m benchmarks.mutations --budget=36000

A mutant is a copy of the checkout with one change in one module: a comparison made loose, a term or
factor dropped, an end of a box exchanged, a rounding left out. Of each line of the source one
mutant counts, drawn at random by the seed (Petrovic and Ivankovic, *State of mutation testing at
Google*, 2018: those of one line tend to live or die together); `--all` takes all. Three kinds are
left out by rule: what only trains or reports (`IDLE`), choices of which any is sound (`CHOICES`),
and twice an allowance for rounding (`UNITS`).

The tests that guard the module (`GUARDS`) run on a mutant up to the first that fails, the quickest
file first and in it the quickest test. *Killed*: one failed, or the module cannot be imported, or
the time limit ended it, which follows from the time that the unchanged code took. *Survived*: all
passed, so either the change is equivalent (`mutations_equivalent.json` says of which this was
argued, and why) or a test is missing. With `--tests=tests/test_allowances.py`, which knows most
changed terms in seconds, and then without, into the same file, the other tests run on the rest
alone.

Each result is a line of a JSON file, and a later run goes on where one stopped: a killed mutant is
done, one that survived runs again once its tests have changed. Mutants come in random order, so
that a campaign that was cut short is a fair sample of the module. Tests that fail on the unchanged
code are named and left out.
"""

import argparse
import ast
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EQUIVALENT = Path(__file__).with_name("mutations_equivalent.json")
# Seconds that a mutant has at least: Python and JAX have to start.
LEAST_LIMIT = 60
NO_TESTS = 5  # pytest's status where none was chosen
LEFT_BEHIND = (
    ".*",
    "*.egg-info",
    "__pycache__",
    "runs",
    "build",
    "dist",
    "site",
    "docs",
    "notebooks",
    "shared",
)


@dataclasses.dataclass(frozen=True)
class Guard:
    """A module, the tests that guard it, and its functions and classes, if not all, that count."""

    path: str
    tests: tuple[str, ...]
    only: tuple[str, ...] = ()


def _guard(path: str, tests: str, only: str = "") -> Guard:
    files = tuple(f"tests/test_{name}.py" for name in tests.split())
    return Guard(f"lipjax/{path}.py", files, tuple(only.split()))


GUARDS = {
    guard.path.removeprefix("lipjax/").removesuffix(".py").replace("/", "."): guard
    for guard in (
        _guard("bounds/modes", "modes regions residual"),
        _guard("bounds/margins", "allowances margins underflow relaxed rounding certificates"),
        _guard("bounds/relaxed", "allowances margins underflow relaxed residual rounding"),
        _guard("bounds/regions", "allowances regions residual underflow executed rounding relaxed"),
        _guard("bounds/walk", "allowances regions residual underflow executed rounding relaxed"),
        _guard("bounds/estimate", "regions residual"),
        _guard("bounds/two_points", "lipschitz ranges"),
        _guard("bounds/lipschitz", "lipschitz"),
        _guard("certificates/lipschitz", "lipschitz ranges"),
        _guard("certificates/ranges", "ranges"),
        _guard("activations/slopes", "lipschitz ranges"),
        _guard("activations/base", "allowances relaxed regions residual rounding"),
        _guard("activations/clip", "allowances relaxed regions residual rounding linear"),
        _guard("activations/maxmin", "allowances relaxed regions residual rounding linear"),
        _guard("rounding/outward", "allowances outward underflow rounding residual executed"),
        _guard("rounding/executed", "allowances executed underflow rounding residual"),
        _guard("activations/absolute", "allowances groupsort trace"),
        _guard("activations/pieces", "allowances tight"),
        _guard("bounds/tight", "allowances tight check_tight"),
        _guard("activations/groupsort", "allowances groupsort"),
        _guard("activations/leaky", "allowances leaky"),
        _guard("activations/pooling", "allowances pooling"),
        _guard("activations/smooth", "allowances smooth"),
        _guard("activations/softmax", "smooth"),
        _guard("graph/description", "description"),
        _guard("graph/known", "trace executed"),
        _guard("graph/match", "trace"),
        _guard("graph/rearrange", "trace"),
        _guard("graph/linear", "allowances linear underflow executed regions deterministic"),
        _guard("graph/nodes", "trace residual linear executed regions"),
        _guard("graph/trace", "trace executed residual linear regions models"),
        _guard("norms/masks", "spectral deterministic"),
        _guard("norms/power", "spectral seeds certificates"),
        _guard("norms/chebyshev", "spectral seeds certificates"),
        _guard("norms/lanczos", "deterministic spectral"),
        _guard("norms/scaled", "deterministic underflow certificates"),
        _guard("norms/closed", "deterministic underflow certificates"),
        _guard("norms/cholesky", "deterministic underflow"),
        _guard("norms/gram", "deterministic underflow certificates"),
        _guard("norms/fourier", "deterministic certificates"),
        _guard("norms/banded", "deterministic underflow certificates"),
        _guard("norms/best", "deterministic underflow certificates"),
        _guard("certificates/randomness", "seeds certificates"),
        _guard("certificates/setup", "seeds executed certificates check_tight"),
        _guard("certificates/stages", "check_tight seeds"),
        _guard(
            "certificates/verdicts", "allowances seeds executed underflow certificates check_tight"
        ),
        _guard("certificates/batches", "certificates devices"),
        _guard("certificates/checks", "executed certificates"),
        _guard("certificates/results", "seeds certificates"),
        _guard("bridges/spelled", "onnx_in"),
        _guard("certificates/prover", "seeds certificates"),
        _guard("check/norms", "allowances check_norms underflow check check_graph forgery"),
        _guard("check/walk", "allowances check_graph underflow check forgery"),
        _guard("check/nodes", "allowances description"),
        _guard("check/layers", "allowances check_graph check forgery"),
        _guard("check/slopes", "allowances check_graph check forgery"),
        _guard("check/kinds", "allowances check_kinds"),
        _guard("check/onesided", "allowances check_tight"),
        _guard(
            "check/checker",
            "forgery check check_graph fuzz",
            "check _contradictions _check_precision _misfits _differences",
        ),
    )
}

# ----------------------------------------------------------------------------- mutants

COMPARED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
COMPARED |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
COMPUTED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
}
COMPUTED |= {ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
OPPOSITES = (
    ("min", "max"),
    ("minimum", "maximum"),
    ("smaller", "larger"),
    ("floor", "ceil"),
    ("all", "any"),
)
OPPOSITES += (("argmin", "argmax"),)
CALLED = {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])}
ENDS = (
    ("lower", "upper"),
    ("low", "high"),
    ("left", "right"),
    ("least", "most"),
    ("bottom", "top"),
)
# Calls that may be left out, with one of their arguments in their place.
UNWRAPPED = {
    "up",
    "sqrt",
    "safe_sqrt",
    "abs",
    "absolute",
    "raised",
    "nextafter",
    "ceil",
    "clip",
    "clip_above",
    "relu",
}
UNWRAPPED |= {
    "square",
    "minimum",
    "maximum",
    "smaller",
    "larger",
    "min",
    "max",
    "up_norm",
    "length",
    "nan_to_num",
}
# The test of an `if` as a whole: a guard that always or never speaks.
GUARDING = "guard"
# What trains or reports: no proof rests on it.
IDLE = {"sparsity", "instability", "stable", "kind", "where", "__repr__", "hinge", "Exact"}
IDLE |= {"_line", "_place", "_unknown"}
# Of which any is sound, so that no proof rests on how they are chosen: slopes (METHOD 8), scales
# and multipliers of a dual bound (METHOD 3), numbers of iterations, estimates from below. By module
# and place ("" outside of functions), functions and variables: what is assigned to these alone is
# left out. And what only words an error.
_FREE = {
    "rounding.executed": {"arithmetics_of": "names", "_arithmetic": "strange"},
    "bounds.tight": {
        "": "HALVINGS WIDTH Choice CHOICES BOXES RETRIED UNIT ascended flattened unflattened",
        "OneSided": "limits",
        "improved.one": "first least slopes",
        "chosen": "whole tiny free share half near least most costly cheap slope",
        "best_scale": "least most pull tiny start halve _ high",
    },
    "bounds.relaxed": {"": "SCALE ROWS", "largest_product": "norm least usual"},
    "bounds.margins": {
        "": "BISECTION_STEPS WIDEST",
        "tightened": "order",
        "ascent": "norm too_short halve tiny start bracket steps left right frozen_d frozen_low"
        " frozen_high",
    },
    "bounds.walk": {"": "SMALL", "Walk._stacked_radius": "t a b"},
    "activations.pieces": {"Pieces": "extremes chord at_center", "Pieces.largest": "place"},
    "certificates.verdicts": {
        "": "SMALL_MATRIX RADIUS_ITERATIONS STEPPED radius_batch estimate_batch _shares",
        "facts_of": "constant stable",
        "tightened_batch.one": "lead goals",
    },
    "norms.lanczos": {"": "RITZ_STEPS HALVINGS norm_estimate ritz_value largest_eigenvalue"},
    "norms.chebyshev": {
        "": "INFLATION SCALE_SLACK chebyshev_steps",
        "inflated_norm_bound": "scale steps",
    },
    "norms.cholesky": {"": "INFLATIONS"},
    "norms.gram": {"": "EXPLICIT_ENTRIES VECTORISED_ENTRIES dense_cost"},
    "norms.scaled": {"": "CPU_CHUNK_ENTRIES CHUNK_ENTRIES chunked application_flops"},
    "norms.banded": {"": "masked_convolution_cost", "_Bands": "flops capacity"},
    "check.walk": {
        "": "BISECTION_STEPS _rules",
        "_side_by_side": "scale a b",
        "worst_gains": "middle left right short",
    },
    "check.onesided": {
        "": "SECTIONS GOLDEN WIDTH UNIT RULES _at",
        "by_rule.rule": "norm half middle length above below own least most still here central"
        " whole near costly cheap slopes straight chord",
        "_Parabolas.bound": "value steepest high low inner found left fresh there",
    },
    "check.norms": {
        "": "INFLATION LANCZOS_STEPS _lanczos",
        "norm_by_cholesky": "inflations top",
        "norm_by_chebyshev": "lower excess steps guess",
    },
}
CHOICES = {
    module: {
        f"{place}.{name}".removeprefix(".")
        for place, names in places.items()
        for name in names.split()
    }
    for module, places in _FREE.items()
}
# Modules of estimates: no proof rests on them, and they run only where they are named.
ESTIMATES = {"bounds.estimate", "norms.power", "norms.lanczos"}
# A number that multiplies one of these, or is added to the terms of `gamma`, is an allowance for
# rounding. Twice as much is only looser: whether it is there at all, and turned to the safe side,
# is what the other mutants of the same place ask.
UNITS = {"U", "DOUBLE", "rounding.DOUBLE", "unit", "gamma", "rounding.gamma"}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change: the bytes from `start` to `end` of a module become `after`; `turn` counts those
    that read the same."""

    module: str
    line: int
    source: str
    before: str
    after: str
    start: int
    end: int
    turn: int = 1

    @property
    def key(self) -> tuple[str, str, str]:
        more = f" #{self.turn}" if self.turn > 1 else ""
        return self.module, self.source, f"{self.before} -> {self.after}{more}"

    def applied(self, text: str) -> str:
        """The module's text with the change."""
        data = text.encode()
        return (data[: self.start] + self.after.encode() + data[self.end :]).decode()


def mutants_of(module: str, text: str, only: Sequence[str] = ()) -> list[Mutant]:
    """All mutants of a module, in the order of its text, each meaning something else."""
    data = text.encode()
    choices = CHOICES.get(module, set())
    lines = data.splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]
    found: list[Mutant] = []
    turns: dict[tuple, int] = {}
    for top in ast.parse(text).body:
        if only and getattr(top, "name", "") not in only:
            continue
        origin, limit = starts[top.lineno - 1], starts[top.end_lineno]
        seen = {ast.dump(ast.parse(data[origin:limit]))}
        looser = _allowances(top)
        for node, returns in _nodes(top, "", "", choices):
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            source = " ".join(lines[node.lineno - 1].decode().split())
            before = ast.unparse(node)
            for after in _variants(node, returns, node in looser):
                after = after if isinstance(node, ast.stmt) else f"({after})"
                changed = data[origin:start] + after.encode() + data[end:limit]
                shape = ast.dump(ast.parse(changed))
                if shape in seen:
                    continue
                seen.add(shape)
                turn = turns[source, before, after] = turns.get((source, before, after), 0) + 1
                found.append(Mutant(module, node.lineno, source, before, after, start, end, turn))
    return found


def drawn(mutants: Sequence[Mutant], seed: int) -> list[Mutant]:
    """One of each line, at random."""
    lines: dict[tuple[str, int], Mutant] = {}
    for mutant in sorted(mutants, key=lambda mutant: _digest(seed, *mutant.key)):
        lines.setdefault((mutant.module, mutant.line), mutant)
    return sorted(lines.values(), key=lambda mutant: mutant.line)


def _nodes(node: ast.AST, returns: str, within: str, choices: set[str]) -> Iterator[tuple]:
    """What computes something, each with the type that its function is said to return.

    Args:
        within: the class and function around it, "" outside of any.
        choices: what is left out, as `CHOICES` has it.
    """
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert):
        return
    if isinstance(node, ast.keyword) and node.arg == "strict":  # of zip: says what holds anyway
        return
    children = ast.iter_child_nodes(node)
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        place = f"{within}.{node.name}".removeprefix(".")
        if node.name in IDLE or place in choices:
            return
        children = iter(node.body)
        if isinstance(node, ast.FunctionDef):
            returns = ast.unparse(node.returns) if node.returns else ""
            children = iter([*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body])
        within = place
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = getattr(node, "targets", None) or [node.target]
        names = [ast.unparse(target) for target in targets]
        union = not within and isinstance(getattr(node.value, "op", None), ast.BitOr)
        if node.value is None or "__all__" in names or union:  # a union is a type
            return
        parts = [name for target in targets for name in getattr(target, "elts", [target])]
        if {f"{within}.{ast.unparse(part)}".removeprefix(".") for part in parts} <= choices:
            return
        children = iter([node.value])
    elif isinstance(node, ast.If):
        yield node.test, GUARDING
    elif isinstance(node, ast.expr | ast.AugAssign | ast.Return):
        yield node, returns
        if _number(node) is not None:
            return
    for child in children:
        yield from _nodes(child, returns, within, choices)


def _allowances(top: ast.AST) -> set[ast.AST]:
    """The numbers that are allowances for rounding, as `UNITS` has it."""
    found: set[ast.AST] = set()
    for node in ast.walk(top):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            # k * U * x is (k * U) * x
            names = {ast.unparse(getattr(side, "func", side)) for side in (node.left, node.right)}
            if names & UNITS:
                found |= {side for side in (node.left, node.right) if _number(side) is not None}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "gamma":
            terms = node.args[0]
            if isinstance(terms, ast.BinOp) and isinstance(terms.op, ast.Add):
                found |= {terms.right} if _number(terms.right) is not None else set()
    return found


def _number(node: ast.AST) -> int | float | None:
    """The value of what is written with numbers alone, such as ``2.0**-53``."""
    parts = (ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop)
    if not all(isinstance(part, parts) for part in ast.walk(node)):
        return None
    value = eval(compile(ast.Expression(node), "", "eval"), {})
    return value if type(value) in (int, float) else None


def _variants(node, returns: str, allowance: bool = False) -> Iterator[str]:
    """What may stand in the place of a node, as source; of an allowance for rounding no more."""
    text = ast.unparse
    if returns == GUARDING:
        yield from ("True", "False")
        return
    value = _number(node)
    if value is not None:
        half = value // 2 if isinstance(value, int) else value / 2
        others = [0, half] if allowance else [0, 1, value * 2, half]
        if allowance and value > 1:
            others.append(1)
        yield from (repr(type(value)(other)) for other in others if other != value)
        return
    match node:
        case ast.Constant(value=bool(value)):
            yield text(ast.Constant(not value))
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            for i, op in enumerate(ops):
                changed = [*ops[:i], COMPARED[type(op)](), *ops[i + 1 :]]
                yield text(ast.Compare(left, changed, comparators))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in COMPUTED:
            if any(isinstance(getattr(side, "value", 0), str) for side in (left, right)):
                return
            yield text(ast.BinOp(left, COMPUTED[type(op)](), right))
            yield text(left)
            yield text(ast.UnaryOp(ast.USub(), right) if isinstance(op, ast.Sub) else right)
        case ast.BoolOp(op=op, values=values):
            yield text(ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values))
            for i in range(len(values)):
                rest = values[:i] + values[i + 1 :]
                yield text(ast.BoolOp(op, rest) if len(rest) > 1 else rest[0])
        case ast.UnaryOp(operand=operand):
            yield text(operand)
        case ast.IfExp(body=body, orelse=orelse):
            yield from (text(body), text(orelse))
        case ast.AugAssign(target=target, op=op, value=value) if type(op) in COMPUTED:
            yield text(ast.AugAssign(target, COMPUTED[type(op)](), value))
            yield "pass"
        case ast.Attribute(value=value, attr="lower" | "upper" as end):
            yield text(ast.Attribute(value, "upper" if end == "lower" else "lower"))
        case ast.Tuple(elts=elements):
            for i in _exchangeable(elements):
                yield text(ast.Tuple(_exchanged(elements, i), node.ctx))
        case ast.Call(func=function, args=arguments):
            yield from _calls(node, function, arguments)
        case ast.Return(value=value) if value is not None and "tuple" not in returns:
            if "bool" in returns:
                yield from ("return True", "return False")
            elif not isinstance(value, ast.Tuple | ast.Constant | ast.Dict | ast.List):
                numbers = ("Array", "ndarray", "float", "int")
                nothing = text(value).startswith(("np.zeros", "jnp.zeros"))
                if not nothing and (not returns or any(name in returns for name in numbers)):
                    yield f"return ({text(value)}) * 0"


def _calls(node: ast.Call, function, arguments) -> Iterator[str]:
    """A call of the opposite, with arguments exchanged, or left out."""
    text = ast.unparse
    name = getattr(function, "attr", getattr(function, "id", ""))
    if name in CALLED:
        other = CALLED[name]
        plain = isinstance(function, ast.Name)
        opposite = ast.Name(other) if plain else ast.Attribute(function.value, other)
        yield text(ast.Call(opposite, arguments, node.keywords))
    if name in UNWRAPPED and not any(isinstance(a, ast.Starred) for a in arguments):
        yield from (text(argument) for argument in arguments[: 2 if name in CALLED else 1])
    swapped = [] if name in CALLED else _exchangeable(arguments)  # these are symmetric
    if name in ("where", "select") and len(arguments) == 3:
        swapped = [*swapped, 1]
    for i in swapped:
        yield text(ast.Call(function, _exchanged(arguments, i), node.keywords))


def _exchangeable(elements) -> list[int]:
    """Positions at which the two ends of the same box stand side by side."""
    found = []
    for i, (first, second) in enumerate(itertools.pairwise(elements)):
        a, b = ast.unparse(first), ast.unparse(second)
        both = [(word, other) for pair in ENDS for word, other in (pair, pair[::-1])]
        if any(word in a and a.replace(word, other) == b for word, other in both):
            found.append(i)
    return found


def _exchanged(elements, i: int) -> list:
    return [*elements[:i], elements[i + 1], elements[i], *elements[i + 2 :]]


def equivalent(entries: list[dict], mutants: Sequence[Mutant], modules: Sequence[str]) -> dict:
    """The entries of these modules by the mutant's key.

    Raises:
        ValueError: an entry that is no mutant of the code as it is.
    """
    named = [entry for entry in entries if entry["module"] in modules]
    known = {(e["module"], e["line"], e["mutation"]): e["reason"] for e in named}
    for key in known.keys() - {mutant.key for mutant in mutants}:
        raise ValueError(f"{EQUIVALENT.name}: {key} is no mutant any more. Look at it anew.")
    return known


# ----------------------------------------------------------------------------- runs


class Copy:
    """A copy of a checkout, in which mutants take the place of one module. A context."""

    def __init__(self, root: Path):
        self.root = root

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="lipjax-mutants-"))
        self.here = self.folder / "checkout"
        shutil.copytree(self.root, self.here, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
        shutil.copy(__file__, self.here / "mutations_plugin.py")
        if (self.root.parent / "shared").exists():  # real data, which some tests want
            (self.folder / "shared").symlink_to(self.root.parent / "shared")
        told = {"MUTATIONS": str(self.folder), "JAX_PLATFORMS": "cpu"}
        told |= {"PYTHONPATH": str(self.here), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-c", "import mutations_plugin; mutations_plugin.serve()"],
            cwd=self.here,
            env=os.environ | told,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *error):
        self.server.terminate()
        self.server.communicate()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, tests: Sequence[str], options: Sequence[str], plan: dict, limit: float | None):
        """``(status of pytest or None where the time was up, what the tests did, seconds)``."""
        report, plan_file = self.folder / "report.jsonl", self.folder / "plan.json"
        report.write_text("")
        plan_file.write_text(json.dumps(plan))
        began = time.monotonic()
        command = ["-q", "-p", "no:cacheprovider", *options, *tests]
        self.server.stdin.write(json.dumps([command, limit]) + "\n")
        self.server.stdin.flush()
        status = json.loads(self.server.stdout.readline())
        if status is None:  # a compiled program may be there in half
            shutil.rmtree(self.folder / "compiled", ignore_errors=True)
        took = time.monotonic() - began
        return status, [json.loads(line) for line in report.read_text().splitlines()], took

    def baseline(self, file: str, options: Sequence[str]) -> dict:
        """Of a file of tests, on the code as it is: seconds of each, and those that fail."""
        status, reports, _ = self.run([file], options, {"baseline": True}, None)
        if status not in (0, 1, NO_TESTS) or (status != NO_TESTS and not reports):
            said = (self.folder / "output.txt").read_text()
            raise RuntimeError(f"the tests of {file} do not run: {said}")
        seconds: dict[str, float] = {}
        for line in reports:
            seconds[line["test"]] = seconds.get(line["test"], 0) + line["seconds"]
        failed = sorted({line["test"] for line in reports if line["failed"]})
        return {"seconds": seconds, "failed": failed}

    def passes(self, guard: Guard, options: Sequence[str], plan: dict) -> None:
        """Does the code as it is pass here and now what mutants have to? It compiles for them, too.

        Raises:
            RuntimeError: it does not, and mutants would be killed by whatever else is wrong.
        """
        status, _, _ = self.run(guard.tests, ["-x", *options], plan, None)
        if status != 0:
            said = (self.folder / "output.txt").read_text()
            raise RuntimeError(f"the tests of {guard.path} fail without a mutant: {said}")

    def verdict(self, mutant: Mutant, guard: Guard, options: Sequence[str], plan: dict) -> dict:
        """Runs the tests on a mutant: ``result``, the test that killed it, seconds."""
        path = self.here / guard.path
        text = path.read_text()
        try:
            path.write_text(mutant.applied(text))
            # Python tells a module that has changed by size and full seconds.
            Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)
            status, reports, took = self.run(guard.tests, ["-x", *options], plan, plan["limit"])
        finally:
            path.write_text(text)
            Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)
        killers = [line["test"] for line in reports if line["failed"]]
        ended = {None: "timeout", 0: "survived"}
        result = ended.get(status, "killed" if killers else "crashed")
        return {"result": result, "by": killers[0] if killers else "", "seconds": round(took, 1)}


def serve() -> None:
    """Runs pytest with the arguments of each line of standard input, up to a limit of seconds, and
    answers with its status, or null where the time was up.

    Each in a fork of this process, which has imported what takes seconds, but nothing of lipjax.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    needed = ("jax", "flax.nnx", "hypothesis.strategies", "scipy.sparse")
    for name in needed if Path("lipjax").is_dir() else ():
        importlib.import_module(name)
    for line in sys.stdin:
        arguments, limit = json.loads(line)
        with warnings.catch_warnings(action="ignore"):  # JAX has no threads yet
            child = os.fork()
        if not child:
            os.setsid()
            with Path(os.environ["MUTATIONS"], "output.txt").open("w") as output:
                for stream in (1, 2):
                    os.dup2(output.fileno(), stream)
            status = 3
            try:
                status = pytest.main(arguments, plugins=[sys.modules[__name__]])
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(status)  # without what this process has to clean up
        try:
            status = _waited(child, limit)
        finally:  # also where this process is told to stop
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # it, and what its tests have started
        print(json.dumps(status), flush=True)


def _waited(child: int, limit: float | None) -> int | None:
    deadline = math.inf if limit is None else time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


# As a plugin of pytest, in the processes that run the tests.


@pytest.hookimpl(trylast=True)  # after the order of conftest.py
def pytest_collection_modifyitems(items):
    """The quickest file first, and in it the quickest test; without what is to be left out."""
    plan = json.loads(Path(os.environ["MUTATIONS"], "plan.json").read_text())
    seconds = plan.get("seconds", {})
    files: dict[Path, float] = {}
    items[:] = [item for item in items if item.nodeid not in plan.get("without", [])]
    for item in items:
        files[item.path] = files.get(item.path, 0) + seconds.get(item.nodeid, 0)
    items.sort(key=lambda item: (files[item.path], str(item.path), seconds.get(item.nodeid, 0)))


def pytest_sessionstart(session):
    """Most programs of a mutant are those of the code as it is: they are compiled once for all."""
    if "jax" in sys.modules:
        import jax

        folder = Path(os.environ["MUTATIONS"], "compiled")
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "lipjax" in sys.modules:
        found = Path(sys.modules["lipjax"].__file__).resolve()
        here = Path(os.environ["MUTATIONS"]).resolve()
        assert found.is_relative_to(here), f"{found} is not the mutant"


def pytest_runtest_logreport(report):
    line = {"test": report.nodeid, "seconds": report.duration, "failed": report.failed}
    with Path(os.environ["MUTATIONS"], "report.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


# ----------------------------------------------------------------------------- the campaign


def _plan(baselines: Sequence[dict], slowest: float) -> dict:
    """Of several files' baselines: seconds of each test, those to leave out, the time limit."""
    seconds = {test: took for found in baselines for test, took in found["seconds"].items()}
    without = [test for found in baselines for test in found["failed"]]
    without += [test for test, took in seconds.items() if took > slowest]
    total = sum(took for test, took in seconds.items() if test not in without)
    return {"seconds": seconds, "without": without, "limit": LEAST_LIMIT + 10 * total}


def _digest(*parts) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def _pool(root: Path, guards: dict[str, Guard], options) -> list[Mutant]:
    """The mutants of all these modules that count, in random order: the same again where some were
    argued equivalent since."""
    found: list[Mutant] = []
    for module, guard in guards.items():
        only = options.only.split(",") if options.only else guard.only
        mutants = mutants_of(module, (root / guard.path).read_text(), only)
        found += mutants if options.all else drawn(mutants, options.seed)
    # (By another draw than within a line: else lines with many mutants would come first.)
    return sorted(found, key=lambda mutant: _digest("order", options.seed, *mutant.key))


def campaign(root: Path, guards: dict[str, Guard], entries: list[dict], options) -> tuple:
    """Runs what is not known yet; a row a module, and what survived without a reason."""
    out = options.out
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    known = {(line["kind"], line["id"]): line for line in lines}
    out.parent.mkdir(parents=True, exist_ok=True)
    deadline, rows, survivors = time.monotonic() + options.budget, [], []
    pool = _pool(root, guards, options)
    passed: set[str] = set()

    def note(kind, name, facts):
        known[kind, name] = {"kind": kind, "id": name, **facts}
        with out.open("a") as file:
            file.write(json.dumps(known[kind, name]) + "\n")

    with Copy(root) as copy:
        for module, guard in guards.items():
            text = (root / guard.path).read_text()
            reasons = equivalent(entries, mutants_of(module, text, guard.only), [module])
            everything = [mutant for mutant in pool if mutant.module == module]
            extra = ["-k", options.k] if options.k else []
            files = [(root / test).read_text() for test in guard.tests]
            tests = _digest(*files, extra, options.slowest)
            sample = everything[: options.sample or None]
            if options.total:
                sample = [mutant for mutant in pool[: options.total] if mutant.module == module]
            chosen = [mutant for mutant in sample if mutant.key not in reasons]
            row = {
                "module": module,
                "mutants": len(everything),
                "equivalent": len(sample) - len(chosen),
            }
            results: list[tuple[Mutant, dict]] = []
            plan = None
            for mutant in chosen:
                which = _digest(module, mutant.applied(text))
                before = known.get(("mutant", which))
                if before and (before["result"] != "survived" or before["tests"] == tests):
                    results.append((mutant, before))
                    continue
                if time.monotonic() > deadline:
                    continue
                if plan is None:
                    baselines = []
                    for test, content in zip(guard.tests, files, strict=True):
                        name = _digest(test, content, extra)
                        if ("baseline", name) not in known:
                            note("baseline", name, copy.baseline(test, extra))
                            for failed in known["baseline", name]["failed"]:
                                print(f"left out, as it fails without a mutant: {failed}")
                        baselines.append(known["baseline", name])
                    plan = _plan(baselines, options.slowest)
                    if tests not in passed:  # modules may have the same ones
                        copy.passes(guard, extra, plan)
                        passed.add(tests)
                found = copy.verdict(mutant, guard, extra, plan)
                place = {
                    "module": module,
                    "line": mutant.line,
                    "mutation": mutant.key[2],
                    "source": mutant.source,
                }
                note("mutant", which, {**place, "tests": tests, **found})
                results.append((mutant, known["mutant", which]))
                print(
                    f"{found['result']:9} {found['seconds']:6.1f} s  {_shown(guard, mutant)}",
                    flush=True,
                )
            left = [mutant for mutant, result in results if result["result"] == "survived"]
            survivors += [(guard, mutant) for mutant in left]
            row |= {"run": len(results), "killed": len(results) - len(left), "survived": len(left)}
            row["seconds"] = sum(result["seconds"] for _, result in results)
            rows.append(row)
    return rows, survivors


def _shown(guard: Guard, mutant: Mutant) -> str:
    before, after = (" ".join(part.split()) for part in (mutant.before, mutant.after))
    return f"{guard.path}:{mutant.line}  {before}  →  {after}"


def table(rows: list[dict]) -> str:
    """Module, mutants, and what became of those that were run; hours that the rest would take."""
    head = (
        "module",
        "mutants",
        "equivalent",
        "run",
        "killed",
        "survived",
        "share killed",
        "hours left",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        share = f"{100 * row['killed'] / row['run']:.0f} %" if row["run"] else "–"
        rest = row["mutants"] - row["equivalent"] - row["run"]
        hours = f"{rest * row['seconds'] / row['run'] / 3600:.1f}" if row["run"] else "–"
        lines.append(f"| {' | '.join([*(str(row[name]) for name in head[:6]), share, hours])} |")
    return "\n".join(lines)


def share(rows: list[dict]) -> str:
    """Of a sample of all modules together: what share of all mutants is killed or argued."""
    run, argued, survived = (
        sum(row[name] for row in rows) for name in ("run", "equivalent", "survived")
    )
    low, high = (100 * end for end in wilson(run + argued - survived, run + argued))
    return (
        f"killed or argued: {run + argued - survived} of {run + argued} (argued: {argued}); of all "
        f"{sum(row['mutants'] for row in rows)}, with 95 % confidence, {low:.0f} to {high:.0f} %"
    )


def wilson(good: int, count: int) -> tuple[float, float]:
    """The interval of a share, with 95 % confidence, of a sample (Wilson 1927)."""
    z = 1.96
    middle = (good + z**2 / 2) / (count + z**2)
    half = z / (count + z**2) * math.sqrt(good * (count - good) / count + z**2 / 4)
    return middle - half, middle + half


def parser() -> argparse.ArgumentParser:
    """Of the program's arguments."""
    plain = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    add = found.add_argument
    proved = ",".join(name for name in GUARDS if name not in ESTIMATES)
    add("--modules", default=proved, help="names of GUARDS, by commas; without: of all proofs")
    add("--only", default="", help="functions or classes of them, by commas")
    add("--all", action="store_true", help="all mutants, not one of each line")
    add("--sample", type=int, default=0, help="at most so many mutants a module, drawn at random")
    add("--total", type=int, default=0, help="at most so many of all modules, drawn at random")
    add("--seed", type=int, default=0, help="of what is drawn, and of the order")
    add("--budget", type=float, default=math.inf, help="seconds after which none is begun")
    add("--tests", default="", help="files in the place of those of GUARDS, by commas")
    add("-k", default="", help="chooses among the tests, as pytest's -k")
    add("--slowest", type=float, default=math.inf, help="leave out tests of more seconds")
    add("--out", type=Path, default=ROOT / "runs" / "mutations.jsonl")
    add("--list", action="store_true", help="print the mutants, run nothing")
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))  # and cleans up
    unknown = sorted(set(options.modules.split(",")) - GUARDS.keys())
    if unknown:
        parser().error(f"unknown modules: {', '.join(unknown)}. Known are {', '.join(GUARDS)}.")
    guards = {name: GUARDS[name] for name in options.modules.split(",")}
    if options.tests:
        files = tuple(options.tests.split(","))
        guards = {name: dataclasses.replace(guard, tests=files) for name, guard in guards.items()}
    if options.list:
        pool = _pool(ROOT, guards, options)
        for mutant in sorted(pool, key=lambda mutant: (mutant.module, mutant.line)):
            print(_shown(guards[mutant.module], mutant))
        return 0
    entries = json.loads(EQUIVALENT.read_text())
    rows, survivors = campaign(ROOT, guards, entries, options)
    print(table(rows))
    if options.total and any(row["run"] for row in rows):
        print(share(rows))
    for guard, mutant in survivors:
        print(f"survived: {_shown(guard, mutant)}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
