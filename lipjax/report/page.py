"""The page of a certification, ``report.html``: what certify.py has stored, for people.

One file that asks for nothing from anywhere: no script, no font, no style sheet, images inline, and
a content security policy that says so. Everything on it comes from the folder that certify.py
writes (summary.json, examples.npz, gallery.npz), so that `build` can make it again from there, or
from a certificate in memory (`lipjax.report.of_certificate`), of which less is known; a number on
the page is the stored one, rounded for reading, with the exact one beside it in a ``data``
element.
"""

import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, tostring

import numpy as np

from lipjax.formats.files import replaced
from lipjax.report import figures, pictures, reproduction, results
from lipjax.report.charts import element
from lipjax.report.parts import attacked, epsilon_of

NAME = "report.html"

SOURCES = ("summary.json", "examples.npz", "gallery.npz")

# What the page reads of the summary; one of an earlier version lacks some of it.
FIELDS = (
    "run",
    "clean_accuracy",
    "pgd_accuracy",
    "modes",
    "classes",
    "activations",
    "pgd_curve",
    "config",
    "commands",
    "files",
)

_FOOTER = "“Certified” is said of what is proved alone."
_OF_ATTACKS = (
    " Accuracies under attack are upper bounds: a stronger attack may lower them, but never below "
    "the certified one."
)


class ReportError(ValueError):
    """The folder is no complete certification; the message says what is missing and what to do."""


def activation_layers(network, input_shape: Sequence[int]) -> list[dict[str, Any]]:
    """Kind and shape of each activation, in the order of `Certificate.constant`."""
    import jax
    import jax.numpy as jnp

    from lipjax.graph import Activation, trace

    graph = trace(network, jax.ShapeDtypeStruct(tuple(input_shape), jnp.float32))
    nodes = (node for node in graph.nodes if isinstance(node, Activation))
    return [{"kind": node.rule.kind, "shape": list(node.shape)} for node in nodes]


def build(folder) -> Path:
    """Writes ``report.html`` of a folder that certify.py wrote, from its files alone.

    The same files give the same page, byte for byte.

    Returns:
        The path of the page.

    Raises:
        ReportError: a file is missing, damaged, of an earlier version, or of another run than the
            others.
    """
    folder = Path(folder)
    path = folder / NAME
    text = page(*_read(folder))
    with replaced(path) as file:  # names of files may hold what is no Unicode
        file.write(text.encode("utf-8", "replace"))
    return path


def _read(folder: Path) -> tuple[dict, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Summary, columns and gallery, of one run; errors as of `build`."""
    try:
        summary = json.loads((folder / SOURCES[0]).read_text(encoding="utf-8"))
        arrays = [_arrays(folder / name) for name in SOURCES[1:]]
    except FileNotFoundError as error:
        raise ReportError(
            f"{Path(error.filename).absolute()} is not there: a report is made of "
            f"{', '.join(SOURCES)}, which certify.py writes to workdir/certification. Give that "
            "folder, or certify (again, if it was by an earlier version)."
        ) from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ReportError(
            f"{folder}: a file of the certification is damaged, certify again: {error}"
        ) from error

    missing = [name for name in FIELDS if name not in summary]
    if missing:
        raise ReportError(
            f"{folder / SOURCES[0]} has no {', '.join(missing)}: an earlier version wrote it, "
            "certify again."
        )
    for name, array in zip(SOURCES[1:], arrays, strict=True):
        facts = json.loads(str(array.pop("run")))
        other = [key for key, value in facts.items() if summary["run"].get(key) != value]
        if other:
            raise ReportError(
                f"{folder / name} is of another run than {SOURCES[0]} ({other[0]} differs): "
                "certify again."
            )
    columns, examples = arrays
    return summary, columns, examples


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def page(
    summary: Mapping[str, Any],
    columns: Mapping[str, np.ndarray],
    examples: Mapping[str, np.ndarray],
) -> str:
    """The page, a function of what is stored.

    Args:
        summary: content of summary.json; of a certificate in memory "commands" is None.
        columns: arrays of examples.npz; without "broken_by_pgd" no attack was run.
        examples: arrays of gallery.npz; then "group", "row" and "image" alone, or {}.
    """
    run = summary["run"]
    mode = run["curve_mode"]
    certified = columns[f"certified_{mode}"]
    of_data = f"{run['data']}, " if run["data"] else ""
    title = run.get("title") or f"{of_data}ε = {epsilon_of(run)}: certification report"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("title", title),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        # Whatever text slipped through: the browser loads and runs nothing.
        element(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; style-src 'unsafe-inline'; img-src data:",
        ),
        element("link", rel="icon", href="data:,"),
        element("style", Path(__file__).with_name("style.css").read_text(encoding="utf-8")),
    )
    body = element(
        "body",
        results.header(summary, certified),
        element(
            "main",
            results.verdicts(columns, certified),
            results.accuracies(summary, columns),
            *results.stages(summary),
            *_charts(summary, columns),
            pictures.section_of_images(run, columns, examples) if examples else None,
            results.classes(summary, columns, certified),
            reproduction.commands(summary),
            reproduction.configuration(summary),
        ),
        element("footer", _FOOTER, _OF_ATTACKS if attacked(columns) else None),
    )
    return (
        "<!DOCTYPE html>\n"
        + tostring(element("html", head, body, lang="en"), encoding="unicode", method="html")
        + "\n"
    )


def _charts(summary, columns) -> list[Element]:
    """The sections with charts, two beside each other."""
    radii = figures.radii(summary["run"], columns)
    if f"lipschitz_{summary['run']['curve_mode']}" not in columns:
        return [radii]  # of radii alone: what else is known is of a ball of each image's own
    constants = figures.lipschitz(summary, columns)
    neurons = figures.neurons(summary)
    if not attacked(columns):
        return [element("div", radii, constants, class_="pair"), neurons]
    return [
        element("div", figures.curve(summary, columns), radii, class_="pair"),
        element("div", constants, neurons, class_="pair"),
    ]
