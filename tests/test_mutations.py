"""The mutation program: what tests notice is killed, what they do not is reported, and its lists
fit the code."""

import ast
import json

import pytest
from conftest import ROOT

from benchmarks import mutations

# Of `larger` both branches are tested, and not the tie; of `rounded` nothing is.
MODULE = '''
"""Twice 3 < 4: not a mutant."""
def larger(a: float, b: float) -> float:
    """Also 1 + 1."""
    if a > b:
        return a
    return b
def rounded(x: float) -> float:
    if x != x:
        raise ValueError(f"{x + 1} is no number" + str(2 * 3))
    return x * 1.5
'''
TESTS = """
from tiny import larger
def test_the_first():
    assert larger(2, 1) == 2
def test_the_second():
    assert larger(1, 2) == 2
def test_that_fails_anyway():
    assert larger(1, 1) == 3
"""


@pytest.fixture
def tiny(tmp_path):
    root = tmp_path / "checkout"
    (root / "tests").mkdir(parents=True)
    (root / "tiny.py").write_text(MODULE)
    (root / "tests" / "test_tiny.py").write_text(TESTS)
    return root


def run(root, capsys, *arguments, entries=()):
    """Rows, survivors and what was printed."""
    guards = {"tiny": mutations.Guard("tiny.py", ("tests/test_tiny.py",))}
    options = mutations.parser().parse_args(
        [f"--out={root.parent / 'found.jsonl'}", "--all", *arguments]
    )
    rows, survivors = mutations.campaign(root, guards, list(entries), options)
    return rows, {mutant.key[2] for _, mutant in survivors}, capsys.readouterr().out


def test_what_tests_notice_is_killed_what_they_do_not_is_reported_and_a_run_goes_on(tiny, capsys):
    entry = {"module": "tiny", "line": "if a > b:", "mutation": "a > b -> (a >= b)"}
    entry["reason"] = "at a tie a is b"
    rows, survivors, said = run(tiny, capsys, "--only=larger", entries=[entry])
    assert rows[0] | {"seconds": 0} == {
        "module": "tiny",
        "mutants": 5,  # the guard twice, the tie, and two returned values
        "equivalent": 1,
        "run": 4,
        "killed": 4,
        "survived": 0,
        "seconds": 0,
    }
    assert not survivors and "test_that_fails_anyway" in said
    lines = [json.loads(line) for line in (tiny.parent / "found.jsonl").read_text().splitlines()]
    assert {line["by"] for line in lines if line["kind"] == "mutant"} == {
        "tests/test_tiny.py::test_the_first",
        "tests/test_tiny.py::test_the_second",
    }
    # What is known is not run again, and a module that the copy mutated is as it was.
    (again,), _, said = run(tiny, capsys, "--only=larger", entries=[entry])
    assert (again["run"], again["killed"], said) == (4, 4, "")
    assert (tiny / "tiny.py").read_text() == MODULE
    # Nothing tests the other function: any change of it survives, until an import fails.
    _, survivors, _ = run(tiny, capsys, "--only=rounded", "--sample=1")
    assert len(survivors) == 1
    imported = "from tiny import rounded\nassert rounded(2) == 3\n"
    (tiny / "tests" / "test_tiny.py").write_text(TESTS + imported)
    (row,), survivors, said = run(tiny, capsys, "--only=rounded", "--sample=1")
    assert not survivors and row["killed"] == 1 and "crashed" in said


def test_a_mutant_without_end_is_killed_by_the_time_limit(tiny, capsys, monkeypatch):
    loop = "def larger(a, b):\n    while a < b:\n        a += 1\n    return a\n"
    (tiny / "tiny.py").write_text(loop)
    monkeypatch.setattr(mutations, "LEAST_LIMIT", 2)
    _, survivors, said = run(tiny, capsys, "--only=larger", "--sample=3")
    assert "timeout" in said and "pass" not in survivors


def test_only_what_computes_is_mutated_and_each_change_means_something_else():
    found = [(m.before, m.after) for m in mutations.mutants_of("tiny", MODULE)]
    assert {("x * 1.5", "(x)"), ("1.5", "(3.0)"), ("a > b", "(False)")} <= set(found)
    for text in ("2 * 3", "x + 1", "1 + 1", "3 < 4"):
        assert not any(text in before for before, _ in found)
    text = """
__all__ = ["a" + "b"]
UNIT = 2.0**-53
def region(lower, upper, radius: "1 + 1" = 0.5):
    keep = (lower < upper) & ~(radius == 0)
    if not keep and radius:
        radius -= 1
    low, high = jnp.where(keep, lower, upper), jnp.maximum(arithmetic.up(lower), upper)
    return Region(lower, upper, max(radius, 1))
"""
    found = {(m.before, m.after) for m in mutations.mutants_of("text", text)}
    assert found >= {
        ("2.0 ** (-53)", "(2.220446049250313e-16)"),
        ("0.5", "(0.0)"),
        ("lower < upper", "(lower <= upper)"),
        ("(lower < upper) & ~(radius == 0)", "(lower < upper)"),
        ("(lower < upper) & ~(radius == 0)", "((lower < upper) | ~(radius == 0))"),
        ("~(radius == 0)", "(radius == 0)"),
        ("not keep and radius", "(False)"),
        ("not keep and radius", "(not keep or radius)"),
        ("radius -= 1", "pass"),
        ("jnp.where(keep, lower, upper)", "(jnp.where(keep, upper, lower))"),
        ("arithmetic.up(lower)", "(lower)"),
        ("Region(lower, upper, max(radius, 1))", "(Region(upper, lower, max(radius, 1)))"),
        ("max(radius, 1)", "(min(radius, 1))"),
    }
    assert not any("'a'" in before or "1 + 1" in before for before, _ in found)


def test_of_each_line_one_mutant_is_drawn_and_every_one_by_some_seed():
    everything = mutations.mutants_of("tiny", MODULE)
    seen = set()
    for seed in range(40):
        found = mutations.drawn(everything, seed)
        assert [mutant.line for mutant in found] == sorted({m.line for m in everything})
        seen |= {mutant.key for mutant in found}
    assert seen == {mutant.key for mutant in everything}


def test_choices_and_twice_an_allowance_are_no_mutants_and_half_of_it_is_one(monkeypatch):
    monkeypatch.setitem(mutations.CHOICES, "text", {"f.scale", "f.low", "f.high", "chosen"})
    text = """
def f(x):
    scale = 2 * x
    low, high = x - 1, x + 1
    both, high = x - 3, x + 3
    return x * (1 + 4 * U) + gamma(x + 8) + 16 * x
def chosen(x):
    return x + 5
"""
    found = {(m.before, m.after) for m in mutations.mutants_of("text", text)}
    changed = {before for before, _ in found}
    assert not changed & {"2", "2 * x", "x - 1", "x + 1", "x + 5", "5"}
    assert {"x - 3", "x + 3", "3"} <= changed
    assert not found & {("4", "(8)"), ("8", "(16)")}
    assert found >= {("4", "(2)"), ("4", "(0)"), ("8", "(4)"), ("8", "(0)"), ("16", "(32)")}


def test_the_choices_that_are_left_out_stand_in_the_code():
    """What was renamed would be counted again, and what takes its name left out."""
    for module, names in mutations.CHOICES.items():
        tree = ast.parse((ROOT / mutations.GUARDS[module].path).read_text())
        stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        stored |= {getattr(node, "name", "") for node in ast.walk(tree)}
        places = {part for name in names for part in name.split(".")}
        assert places <= stored, (module, places - stored)


def test_the_share_of_all_is_an_interval_around_that_of_the_sample():
    # Newcombe 1998, table I: of 81 in 263 by Wilson's, 25.5 to 36.6 %.
    low, high = mutations.wilson(81, 263)
    assert (round(low, 3), round(high, 3)) == (0.255, 0.366)
    assert mutations.wilson(20, 20)[0] < 0.9


def test_the_guards_name_files_that_exist_and_all_that_a_proof_rests_on():
    for guard in mutations.GUARDS.values():
        for path in (guard.path, *guard.tests):
            assert (ROOT / path).is_file(), path
        text = (ROOT / guard.path).read_text()
        assert all(f"def {name}(" in text or f"class {name}" in text for name in guard.only)
    guarded = {guard.path for guard in mutations.GUARDS.values()}
    for folder in ("activations", "bounds", "certificates", "norms", "rounding"):
        for path in (ROOT / "lipjax" / folder).glob("[!_]*.py"):
            assert str(path.relative_to(ROOT)) in guarded


def holding(text, lines) -> tuple[str, ...]:
    """The functions and classes that these lines are in, "" for what is outside of any."""
    found = set()
    for top in ast.parse(text).body:
        segment = ast.get_source_segment(text, top) or ""
        if lines & {" ".join(line.split()) for line in segment.splitlines()}:
            found.add(getattr(top, "name", ""))
    return tuple(sorted(found))


def test_every_entry_of_the_equivalent_ones_is_a_mutant_of_the_code_and_has_a_reason():
    entries = json.loads(mutations.EQUIVALENT.read_text())
    assert {entry["module"] for entry in entries} <= mutations.GUARDS.keys()
    for module in sorted({entry["module"] for entry in entries}):
        guard = mutations.GUARDS[module]
        text = (ROOT / guard.path).read_text()
        lines = {entry["line"] for entry in entries if entry["module"] == module}
        mutants = mutations.mutants_of(module, text, holding(text, lines))
        reasons = mutations.equivalent(entries, mutants, [module]).values()
        assert all(len(reason) > 20 for reason in reasons)
    with pytest.raises(ValueError, match="no mutant any more"):
        mutations.equivalent([dict(module="a", line="b", mutation="c", reason="d")], [], ["a"])


def test_tests_that_fail_for_another_reason_kill_nothing(tiny, capsys):
    once = "import pathlib\ndef test_once():\n    pathlib.Path('ran').touch(exist_ok=False)\n"
    (tiny / "tests" / "test_tiny.py").write_text(once)
    with pytest.raises(RuntimeError, match="fail without a mutant"):
        run(tiny, capsys, "--only=larger")
