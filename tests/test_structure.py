"""The structure that the documents describe: imports run downwards, names in them are there."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "lipjax"

# From the bottom to the top: each may import what stands before it, and itself.
ORDER = (
    *("formats", "runtime", "graph", "activations", "layers", "rounding", "norms", "bounds"),
    *("losses", "attacks", "certificates", "orthogonal", "models", "storage", "pretrained"),
    *("bridges", "data", "training", "report", "configs", "cli"),
)
# Stands beside the order: it repeats what it checks, and shares no more than the files.
CHECKER = ("check", "formats")


def imported(path: Path) -> set[str]:
    """Modules of lipjax that a file imports when it is imported, by the name behind `lipjax.`"""
    found = set()
    tree = ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "lipjax":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lipjax."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("lipjax.")}
    return found


def sources(name: str) -> list[Path]:
    single = PACKAGE / f"{name}.py"
    return [single] if single.exists() else sorted((PACKAGE / name).glob("*.py"))


def test_every_module_has_a_place_in_the_order():
    found = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    assert found - {"py"} == {*ORDER, *CHECKER}


@pytest.mark.parametrize("name", ORDER)
def test_imports_run_downwards_only(name):
    below = {*ORDER[: ORDER.index(name) + 1]}
    for path in sources(name):
        above = imported(path) - below
        assert not above, f"{path.relative_to(ROOT)} imports {', '.join(sorted(above))}"


def test_the_checker_imports_nothing_but_itself_and_the_files():
    for path in sources("check"):
        above = imported(path) - {*CHECKER}
        assert not above, f"{path.relative_to(ROOT)} imports {', '.join(sorted(above))}"


def test_every_file_that_the_readme_places_is_there():
    text = (ROOT / "README.md").read_text()
    section = text[text.index("## Where things are") :]
    tree = section.split("```")[1].strip().splitlines()
    # What stands in front of a line's description: one or more names.
    placed = {name.rstrip("/") for row in tree for name in row.strip().split("   ")[0].split()}
    inside = {f"{name}.py" if (PACKAGE / f"{name}.py").exists() else name for name in ORDER}
    outside = {"train.py", "certify.py", "lipjax", "tests", "benchmarks", "docs", "notebooks"}
    assert placed == {*inside, *outside, "check"}


def test_the_stations_of_an_image_on_its_way_to_a_verdict_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## From an image to its verdict") :].split("\n## ")[0]
    stations = re.findall(r"^\d\. `([\w.]+)`", section, flags=re.M)
    assert 5 <= len(stations) <= 7
    for station in stations:
        module, _, name = station.rpartition(".")
        assert callable(getattr(importlib.import_module(f"lipjax.{module}"), name)), station
