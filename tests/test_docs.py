"""The documents say what is true: the site builds without a warning, its links resolve, its code
runs, its commands parse."""

import contextlib
import html.parser
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import urllib.parse
from pathlib import Path

import pytest
from conftest import ROOT

import lipjax

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)``` *$",
    re.MULTILINE | re.DOTALL,
)
# What README.md takes for granted: images, labels, and somebody's weights.
README = """
import jax.numpy as jnp
import numpy as np
images = np.random.default_rng(0).uniform(size=(2, 8, 8, 1)).astype(np.float32)
labels = np.arange(2)
x = images[0]
shapes = ((32, 64), (10, 32))
weights = [np.random.default_rng(0).normal(0, 0.1, s).astype(np.float32) for s in shapes]
shift = np.full(32, -0.1, np.float32)
"""
PROGRAMS = {"train.py": "train", "certify.py": "certify"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fences(page: Path) -> list[tuple[int, str, str]]:
    """Number of the first line, language and attributes, and text of each fenced block."""
    text = page.read_text()
    found = FENCE.finditer(text)
    return [
        (text[: m.start("code")].count("\n"), m["info"].strip(), textwrap.dedent(m["code"]))
        for m in found
    ]


# ----------------------------------------------------------------------------------------- the site


class Page(html.parser.HTMLParser):
    """Anchors of a page and everything that it refers to: (tag, attribute, address)."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.references = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value)
            if name in ("href", "src", "data", "poster") and value:
                self.references.append((tag, name, value))
            if name == "srcset" and value:
                self.references += [(tag, name, part.split()[0]) for part in value.split(",")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site: its folder, and its pages by path."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(
            package, reason="the site is built with what docs/requirements.txt lists"
        )
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        f"--site-dir={folder}",
    ]
    nowhere = dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"
    )
    environment = {**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr, done.stdout + done.stderr
    # 404.html is shown at any address, so its own are absolute.
    found = {
        path: Page(path.read_text()) for path in folder.rglob("*.html") if path.name != "404.html"
    }
    return folder, found


def test_every_link_anchor_and_image_of_the_site_resolves_and_nothing_is_loaded_from_elsewhere(
    site,
):
    folder, pages = site
    assert len(pages) == len(list(DOCS.rglob("*.md")))
    broken, external = [], set()
    for path, page in pages.items():
        for tag, attribute, address in page.references:
            parts = urllib.parse.urlsplit(address)
            if parts.scheme == "data":
                continue
            if parts.scheme or parts.netloc:
                external.add((tag, attribute, address))
                continue
            target = (
                (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            )
            target = target / "index.html" if target.is_dir() else target
            anchor = urllib.parse.unquote(parts.fragment)
            missing = not target.is_file() or not target.is_relative_to(folder.resolve())
            if missing or (
                anchor and target.suffix == ".html" and anchor not in pages[target].anchors
            ):
                broken.append(f"{path.relative_to(folder)}: {address}")
    assert not broken, "\n".join(broken)
    print("not fetched:", *sorted(address for _, _, address in external), sep="\n")
    # A reader may follow a link to another host; a page may not load anything from one.
    assert all(reference[:2] == ("a", "href") for reference in external), external
    for sheet in folder.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", sheet.read_text()), sheet


def test_the_reference_has_every_public_module_and_name(site):
    _, pages = site
    anchors = set().union(*(page.anchors for page in pages.values()))
    package = ROOT / "lipjax"
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in package.rglob("*.py")
        if not path.name.startswith("_") and path.parent.name not in ("commands", "configs")
    }
    missing = {module for module in modules if module not in anchors}
    for name in lipjax.__all__:
        value = getattr(lipjax, name)
        where = getattr(value, "__module__", None)
        documented = f"{where}.{value.__qualname__}" if where else value.__name__
        missing |= {documented} - anchors
    assert not missing, f"add ::: lines to docs/reference: {sorted(missing)}"


def test_the_figures_are_those_that_the_script_draws():
    drawn = set(re.findall(r'save\(figure, "(\w+)"\)', (DOCS / "figures.py").read_text()))
    assert drawn == {path.stem for path in (DOCS / "images").glob("*.svg")}
    text = "".join(page.read_text() for page in PAGES)
    for name in drawn:
        assert f"images/{name}.svg" in text, name


# --------------------------------------------------------------------------------------------- code


def test_no_python_block_escapes_the_tests():
    for page in PAGES:
        for line, info, code in fences(page):
            language, _, attributes = info.partition(" ")
            assert language not in ("py", "python3", "pycon", "ipython"), (
                f"{name_of(page)}:{line}: fence it as python"
            )
            if language == "python" and "no-run" in attributes:
                assert code.startswith("# ") and len(code.splitlines()[0]) > 10, (
                    f"{name_of(page)}:{line}: say why"
                )


WITH_CODE = [
    page for page in PAGES if any(info.startswith("python") for _, info, _ in fences(page))
]


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_code_of_a_page_runs_and_prints_its_tables(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "page"}
    if page.name == "README.md":
        exec(README, space)
    ran = 0
    for line, info, code in fences(page):
        language, _, attributes = info.partition(" ")
        if language != "python" or "no-run" in attributes:
            continue
        if code.startswith("# needs torch") and importlib.util.find_spec("torch") is None:
            continue
        # Empty lines in front, so that a traceback has the page's line numbers.
        exec(compile("\n" * line + code, name_of(page), "exec"), space)
        ran += 1
    said = capsys.readouterr().out
    for line, info, text in fences(page):
        if info == "text" and text.startswith("   node"):
            width = text.index("where")  # where a line of the program is depends on its file
            for row in text.splitlines():
                assert row[:width].rstrip() in said, f"{name_of(page)}:{line}: {row}"
    if not ran:
        pytest.skip("every block needs torch, which is not installed")


# ----------------------------------------------------------------------------------------- commands


def shell_lines(text: str) -> list[str]:
    """Lines of commands: in fences without a language or of a shell, in indented blocks, and in
    `code` within a sentence."""
    blocks = []

    def taken(match):
        code = textwrap.dedent(match["code"])
        if match["info"].strip() in ("", "sh", "bash", "shell"):
            blocks.append(code)
        if match["info"].strip() == "console":  # what was typed, and what came
            blocks.append("\n".join(line for line in code.splitlines() if line.startswith("$ ")))
        return ""

    rest = FENCE.sub(taken, text)
    blocks += [
        line
        for line in re.findall(r"`([^`\n]+)`", rest)
        if re.match(r"(python |lipjax |make )", line)
    ]
    blocks += [
        textwrap.dedent(block) for block in re.findall(r"(?:^ {4}.*\n)+", rest, re.MULTILINE)
    ]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def commands_of(text: str) -> list[list[str]]:
    """The words of each command of this project in a text, from the program's name on, without what
    is elided ("…", "...")."""
    found = []
    for line in shell_lines(text):
        try:
            words = shlex.split(line.removeprefix("$ "), comments=True)
        except ValueError:
            continue  # an apostrophe: a sentence
        nested = [word for word in words if " " in word and "train.py" in word]
        if nested:  # a command in quotes, for another machine
            words = shlex.split(nested[0])
        parts, part = [], []
        for word in [*words, "&&"]:
            word = re.sub(r"^<\((.*)", r"\1", word).rstrip(")")  # source <(...)
            if word in ("&&", ";", "|", ">"):
                parts, part = [*parts, part], []
            elif not re.search(r"…|\.\.\.|^[A-Z_]+=|^<", word):
                part.append(word)
        for part in parts:
            places = [
                i for i, word in enumerate(part) if word in ("python", "python3", "lipjax", "make")
            ]
            # "make" and "lipjax" are words of sentences too: only at the beginning of a line.
            if places and (
                part[places[0]].startswith("python") or places[0] == 0 or part[0] == "source"
            ):
                found.append(part[places[0] :])
    return found


def complaint_about(words: list[str]) -> str | None:
    """What is wrong with a command, without running it; None if nothing is. In a process of its
    own: flags are global."""
    from lipjax.check import checker
    from lipjax.cli import common, entry

    common.run = lambda command: common.parsed(["program", *sys.argv[1:]], command)
    parsers = {
        "check": checker.parser,
        "report": entry._report_parser,
        "data": entry._data_parser,
        "export": entry._export_parser,
        **{name: entry.whole_parser for name in ("models", "completion")},
    }

    def lipjax_command(name, rest):
        if not rest and not name.startswith("-"):  # only spoken of
            return None if name in entry.COMMANDS else f"no command {name}"
        if name in parsers and "--help" not in rest:
            parser = parsers[name]()
            parser.parse_args([name, *rest] if name in ("models", "completion") else rest)
            return None
        return None if entry.main([name, *rest]) == 0 else "refused"

    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return next(
            (f"no target {word}" for word in rest if "=" not in word and word not in targets), None
        )
    if program == "lipjax":
        return lipjax_command(*([rest[0], rest[1:]] if rest else ["--help", []]))
    if rest and rest[0] in PROGRAMS:
        return lipjax_command(PROGRAMS[rest[0]], rest[1:])
    if rest[:1] == ["-m"]:
        name, rest = rest[1], rest[2:]
        if name == "lipjax.runtime.hosts":
            return complaint_about(["python", *rest[1:]]) if rest else None
        if name == "lipjax.check":
            return lipjax_command("check", rest) if rest else None
        path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        if name.partition(".")[0] not in ("lipjax", "benchmarks"):
            return None
        if not path.is_file():
            return f"no module {name}"
        own = rest[: rest.index("--")] if "--" in rest else rest
        flags = [word.removeprefix("--").partition("=")[0] for word in own if word.startswith("--")]
        return next(
            (
                f"no flag --{flag}"
                for flag in flags
                if not re.search(rf'"(--)?{flag}"', path.read_text())
            ),
            None,
        )
    script = next((word for word in rest if word.endswith(".py")), None)
    return None if script is None or (ROOT / script).is_file() else f"no script {script}"


WRONG = [
    ["python", "train.py", "--config=configs/digit.py"],
    ["python", "train.py", "--config=configs/digits.py", "--config.optimizer.learning_rat=1"],
    ["python", "certify.py", "--modes=local", "--epsilonn=1"],
    ["python", "-m", "lipjax.nothing"],
    ["python", "-m", "benchmarks.step", "--nothing"],
    ["make", "nothing"],
    ["lipjax", "nothing"],
    ["lipjax", "data", "list", "--nothing"],
]


def test_every_command_line_in_the_documents_parses_and_a_wrong_one_would_not():
    found = [
        (tuple(words), name_of(page)) for page in PAGES for words in commands_of(page.read_text())
    ]
    wanted = [(page, list(words)) for words, page in dict(found).items()]  # each once
    asked = json.dumps([words for _, words in wanted] + WRONG)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import test_docs; test_docs.answer()"]
    done = subprocess.run(
        command, input=asked, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    complaints = json.loads(done.stdout)
    assert all(complaints[len(wanted) :]), complaints[len(wanted) :]
    wrong = [
        f"{page}: {shlex.join(words)}: {why}"
        for (page, words), why in zip(wanted, complaints, strict=False)
        if why
    ]
    assert not wrong, "\n".join(wrong)
    seen = {tuple(words[:2]) for _, words in wanted}
    # so that the search above finds what there is
    assert {("python", "train.py"), ("python", "certify.py")} <= seen


def answer() -> None:
    """Complaints about the commands on stdin, as JSON. Each in a fork of this process, which has
    imported what takes long."""
    for module in (
        "check.checker",
        "cli.certify",
        "cli.entry",
        "cli.plan",
        "cli.train",
        "data.records",
        "report",
    ):
        importlib.import_module(f"lipjax.{module}")
    answers = []
    for words in json.load(sys.stdin):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            said, found = io.StringIO(), None
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                try:
                    found = complaint_about(words)
                except SystemExit as end:
                    found = (said.getvalue().strip() or "refused") if end.code else None
                except Exception as error:
                    found = repr(error)
            os.write(write, json.dumps(found and found[:2000]).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            answers.append(json.loads(pipe.read()))
        os.waitpid(child, 0)
    print(json.dumps(answers))


def test_the_picture_of_the_readme_fits_a_screen():
    (path, width) = re.findall(r'<img src="([^"]+)"[^>]* width="(\d+)">', PAGES[0].read_text())[0]
    header = (ROOT / path).read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    across, down = (int.from_bytes(header[start : start + 4]) for start in (16, 20))
    assert down * int(width) / across < 700
