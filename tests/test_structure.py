"""The structure that the documents describe: imports run downwards, names in them are there."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "lipjax"

# From the bottom to the top: each may import what stands before it, and itself.
LAYERS = {
    "files": (),
    "graph": (),
    "activations": ("graph",),
    "layers": (),
    "rounding": ("graph",),
    "spectral": ("graph", "rounding"),
    "deterministic": ("graph", "rounding", "spectral"),
    "bounds": ("graph", "activations", "rounding", "spectral", "deterministic"),
    "losses": ("graph", "bounds"),
    "certificate_files": ("files", "graph"),
    "certificates": (
        *("graph", "rounding", "spectral", "deterministic", "bounds", "certificate_files"),
        *("lowering",),
    ),
}
CHECKER = ("check", "check_layers", "check_nodes", "check_norms", "check_slopes", "check_walk")


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


@pytest.mark.parametrize("name", LAYERS)
def test_imports_run_downwards_only(name):
    paths = sources(name)
    assert paths
    for path in paths:
        above = imported(path) - {name, *LAYERS[name]}
        assert not above, f"{path.relative_to(ROOT)} imports {', '.join(sorted(above))}"


def test_the_checker_imports_nothing_but_itself_and_the_files():
    for name in CHECKER:
        above = imported(PACKAGE / f"{name}.py") - {*CHECKER, "certificate_files", "files"}
        assert not above, f"{name} imports {', '.join(sorted(above))}"


def test_every_file_that_the_readme_places_is_there():
    text = (ROOT / "README.md").read_text()
    section = text[text.index("## Where things are") :]
    names = [n for n in re.findall(r"`([\w/*.]+(?:\.py|/))`", section) if n != "lipjax/"]
    assert len(names) > 20
    for name in names:
        places = [*PACKAGE.glob(name.removeprefix("lipjax/")), *ROOT.glob(name)]
        assert places, f"README.md places {name}, which is not there"


def test_the_stations_of_an_image_on_its_way_to_a_verdict_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## From an image to its verdict") :].split("\n## ")[0]
    stations = re.findall(r"^\d\. `([\w.]+)`", section, flags=re.M)
    assert 5 <= len(stations) <= 7
    for station in stations:
        module, _, name = station.rpartition(".")
        if module == "certify":
            assert f"def {name}(" in (ROOT / "certify.py").read_text()
            continue
        assert callable(getattr(importlib.import_module(f"lipjax.{module}"), name)), station
