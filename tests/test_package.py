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

# Where people look for it.
FOLDERS = ("docs", "notebooks", "configs", "lipjax", "benchmarks", "requirements")
# What a repository of lipjax may be at; not those of others, which the documents cite.
ADDRESS = re.compile(r"https?://[\w.-]+(?:/[\w.-]+)*/lipjax\b")


def python(*arguments, **options):
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources, by way of a source distribution, without network and
    without isolation; beside it the wheel itself."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "lipjax", tree / "lipjax", ignore=shutil.ignore_patterns("__pycache__"))
    # These must not be taken for packages.
    for folder in ("tests", "benchmarks", "requirements", "configs", "docs"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree / path.name)
    # As `python -m build` does: the wheel is made of the source distribution, not of the checkout.
    build = "import setuptools.build_meta as build\nbuild.build_{}({!r})"
    python("-c", build.format("sdist", str(out)), cwd=tree)
    (path,) = out.iterdir()
    assert path.name == f"lipjax-{lipjax.__version__}.tar.gz"
    shutil.unpack_archive(path, out, filter="data")
    unpacked = out / path.name.removesuffix(".tar.gz")
    python("-c", build.format("wheel", str(out)), cwd=unpacked)
    (path,) = out.glob("*.whl")
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


def test_the_wheel_is_installed_in_a_bare_environment_with_its_command(wheel, tmp_path):
    """Its requirements are those of this interpreter: nothing is downloaded."""
    environment = tmp_path / "env"
    python("-m", "venv", "--without-pip", str(environment))
    (packages,) = environment.glob("lib/python*/site-packages")
    # Behind its own, so that lipjax is the wheel's and the rest is found.
    (packages / "others.pth").write_text(f"{Path(yaml.__file__).parents[1]}\n")
    (path,) = wheel.parent.glob("*.whl")
    options = ["--no-deps", "--no-index", "--quiet", "--no-compile", str(path)]
    interpreter = str(environment / "bin" / "python")
    python("-m", "pip", "--python", interpreter, "--disable-pip-version-check", "install", *options)

    def run(*command):
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(interpreter, "-c", "import lipjax; print(lipjax.__file__)").strip() == str(
        packages / "lipjax" / "__init__.py"
    )
    assert "digits-maxmin" in run(str(environment / "bin" / "lipjax"), "models")


def test_the_only_address_of_the_repository_is_that_of_the_project():
    """A placeholder, as long as there is none: nobody can have it (RFC 2606)."""
    urls = PROJECT["project"]["urls"]
    assert list(urls) == ["Repository"]
    (address,) = urls.values()
    files = [
        *(path for path in ROOT.iterdir() if path.is_file()),
        *(path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file()),
    ]
    texts = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in files
        if path.suffix in (".py", ".md", ".toml", ".cff", ".yml", ".ipynb", ".txt", "")
    }
    found = {name: set(ADDRESS.findall(text)) for name, text in texts.items()}
    found = {name: addresses for name, addresses in found.items() if addresses}
    assert found == {
        name: {address}
        for name in ("pyproject.toml", "notebooks/digits.ipynb", "notebooks/larger_set.ipynb")
    }
    # No line installs what somebody may have put under this name on an index.
    installs = re.compile(r"pip install [^\n`#]*(?<![\w./\"-])lipjax(?![\w/])")
    assert not [name for name, text in texts.items() if installs.search(text)]


def test_tags_are_versions_of_the_changelog():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("no git checkout")
    listing = ["git", "tag", "--list", "v*", "--format=%(refname:short) %(objectname)"]
    tags = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [line.split()[0] for line in tags.splitlines()]
    text = (ROOT / "CHANGELOG.md").read_text()
    assert [name for name in names if f"## [{name.removeprefix('v')}] - " not in text] == []
    assert all(Version(name) <= Version(lipjax.__version__) for name in names)


def test_the_policy_says_what_a_broken_certificate_is_and_how_to_report_it():
    text = (ROOT / "SECURITY.md").read_text()
    assert "## What is a broken certificate" in text and "## How to report" in text
    assert "(CONTRIBUTING.md)" in text


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
