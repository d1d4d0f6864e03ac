"""The wheel holds what it should and nothing else; its metadata, the changelog and the citation say
the same."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

import lipjax

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# What is heavy, or only for scripts, tests or one function of many. (flax itself imports absl,
# optax and rich.)
NOT_IMPORTED = {
    *(
        "array_record",
        "grain",
        "ml_collections",
        "orbax",
        "sklearn",
        "tensorflow",
        "tensorflow_datasets",
    ),
    *(
        "equinox",
        "hypothesis",
        "matplotlib",
        "onnx",
        "onnxruntime",
        "PIL",
        "scipy",
        "tensorboardX",
        "torch",
    ),
}


def python(*arguments, **options):
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources, without network and without isolation."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "lipjax", tree / "lipjax", ignore=shutil.ignore_patterns("__pycache__"))
    # These must not be taken for packages.
    for folder in ("tests", "benchmarks", "requirements", "configs", "docs"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree / path.name)
    python(
        "-c", f"import setuptools.build_meta as build\nbuild.build_wheel({str(out)!r})", cwd=tree
    )
    (path,) = out.iterdir()
    with zipfile.ZipFile(path) as archive:
        archive.extractall(out / "installed")
    return out / "installed"


def sources() -> set[str]:
    """All files that an installation has, but for what Python wrote.

    `lipjax.configs` is the folder `configs` at the top of a checkout (pyproject.toml), so the
    checkout's own lipjax/configs, which only points there, is not among them.
    """
    package = {path for path in (ROOT / "lipjax").rglob("*") if path.is_file()}
    package = {path.relative_to(ROOT) for path in package if path.suffix != ".pyc"}
    package.discard(Path("lipjax/configs/__init__.py"))
    configs = {Path("lipjax") / "configs" / path.name for path in (ROOT / "configs").glob("*.py")}
    return set(map(str, package | configs))


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    found = {str(path.relative_to(wheel)) for path in wheel.rglob("*") if path.is_file()}
    metadata = {
        name for name in found if name.startswith(f"lipjax-{lipjax.__version__}.dist-info/")
    }
    assert found - metadata == sources()
    assert {"lipjax/__init__.py", "lipjax/check/checker.py", "lipjax/py.typed"} <= found
    (licence,) = (name for name in metadata if name.endswith("/LICENSE"))
    assert (wheel / licence).read_bytes() == (ROOT / "LICENSE").read_bytes()


def listed(path) -> set[Requirement]:
    lines = (line.split(" #")[0].strip() for line in (ROOT / path).read_text().splitlines())
    return {Requirement(line) for line in lines if line and not line.startswith("#")}


def test_the_wheels_metadata_are_those_of_the_requirement_files(wheel):
    (found,) = importlib.metadata.distributions(path=[str(wheel)])
    assert found.name == "lipjax" and found.version == lipjax.__version__
    assert (
        found.metadata["Requires-Python"] == ">=3.11"
        and found.metadata["License-Expression"] == "MIT"
    )
    assert found.metadata["Author"] == "The lipjax developers"
    files = PROJECT["tool"]["setuptools"]["dynamic"]["optional-dependencies"]
    assert files["scripts"] == {"file": ["requirements.txt"]} and {
        "onnx",
        "tensorboard",
        "test",
    } <= set(files)
    assert set(found.metadata.get_all("Provides-Extra")) == set(files)
    wanted = {(None, str(Requirement(line))) for line in PROJECT["project"]["dependencies"]}
    for extra, source in files.items():
        for path in source["file"]:
            wanted |= {(extra, str(requirement)) for requirement in listed(path)}
    stated = set()
    for line in found.requires:
        text, _, extra = line.partition("extra ==")
        text = re.sub(r"(;|\sand)\s*$", "", text.strip())
        text = re.sub(r"; \((.*)\)$", r"; \1", text)  # the file's own marker
        stated.add((extra.strip().strip("\"'") or None, str(Requirement(text))))
    assert stated == wanted


def test_what_the_library_needs_is_part_of_what_the_scripts_need():
    needed = {Requirement(line) for line in PROJECT["project"]["dependencies"]}
    assert needed <= listed("requirements.txt")


def test_the_oldest_versions_that_are_tried_are_the_oldest_that_are_allowed():
    pinned = {
        found.name: str(found.specifier).removeprefix("==") for found in listed("tests/oldest.txt")
    }
    for requirement in listed("requirements.txt"):
        if requirement.marker is None or requirement.marker.evaluate(
            {"sys_platform": "linux", "platform_machine": "x86_64"}
        ):
            assert Version(pinned[requirement.name]) == Version(
                str(requirement.specifier).removeprefix(">=")
            ), requirement


def test_the_wheel_is_imported_with_nothing_but_jax_and_flax(wheel, tmp_path):
    """Neither TensorFlow nor anything else that is slow to import or need not be installed."""
    script = (
        "import sys, jax, flax.nnx\n"
        "before = set(sys.modules)\n"
        "import lipjax\n"
        "more = {name.split('.')[0] for name in set(sys.modules) - before} - "
        "set(sys.stdlib_module_names)\n"
        "print(lipjax.__file__, lipjax.__version__, *sorted(more))\n"
        "print(*{name.split('.')[0] for name in sys.modules})\n"
    )
    out = python("-c", script, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(wheel)})
    (file, version, *more), loaded = (line.split() for line in out.splitlines())
    assert Path(file) == wheel / "lipjax" / "__init__.py" and version == lipjax.__version__
    assert set(more) <= {"lipjax", "safetensors"}
    assert not set(loaded) & NOT_IMPORTED


def test_the_changelog_says_what_this_version_brought():
    text = (ROOT / "CHANGELOG.md").read_text()
    heads = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    assert heads[0] == ("Unreleased", "")
    (version, date), *earlier = heads[1:]
    assert version == lipjax.__version__ and date and all(day for _, day in earlier)
    numbers = [tuple(map(int, version.split("."))) for version, _ in heads[1:]]
    assert numbers == sorted(numbers, reverse=True) and len(set(numbers)) == len(numbers)
    part = text.split(f"## [{version}]")[1].split("\n## ")[0]
    assert re.search(r"^### (Added|Changed|Fixed|Security)\n\n- ", part, re.MULTILINE)


def test_the_citation_is_of_this_version_and_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (
        citation["cff-version"] == "1.2.0" and citation["message"] and citation["license"] == "MIT"
    )
    assert citation["version"] == lipjax.__version__
    assert (
        f"## [{lipjax.__version__}] - {citation['date-released']}"
        in (ROOT / "CHANGELOG.md").read_text()
    )
    assert citation["authors"] == [{"name": "The lipjax developers"}]
    (paper,) = citation["references"]
    assert (
        paper["title"]
        == "Training Certifiably Robust Neural Networks with Efficient Local Lipschitz Bounds"
    )
    assert [author["family-names"] for author in paper["authors"]] == [
        "Huang",
        "Zhang",
        "Shi",
        "Kolter",
        "Anandkumar",
    ]
    assert paper["year"] == 2021 and paper["identifiers"][0]["value"] == "arXiv:2111.01395"
