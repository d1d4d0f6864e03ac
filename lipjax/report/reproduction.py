"""Sections of the page: how to do it again and to check it, and the configuration."""

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from typing import Any
from xml.etree.ElementTree import Element

from lipjax.report.charts import element
from lipjax.report.parts import note, section, table

HASHES = {
    "sha256": "SHA-256 of the file",
    "digest": "digest inside",
    "network": "network",
    "data": "images and labels",
}


def commands(summary) -> Element:
    """Commands, versions and hashes."""
    if summary["commands"] is None:
        return _in_python(summary)
    run = summary["run"]
    told = summary["commands"]
    train = told["train"] or "# not recorded; the configuration below is that of the training"
    check = ["# check the certificates with other code", *told["check"]]
    lines = ["# train", train, "# certify", told["certify"], *check]
    return section(
        "Reproduce and check",
        element("pre", element("code", "\n".join(lines)), tabindex="0"),
        element(
            "p",
            "The checker derives every verdict of a certificate file once more from the network "
            "and the images, and exits with 0 if it confirms them.",
        ),
        _versions(run, "Versions and device"),
        element("h3", "Certificate files"),
        _hashes(summary),
        note(
            f"Data: fingerprint {run['data_fingerprint']} of the certified split. Hashes find "
            f"damage; they are no signature. It took {run['seconds']:g} s to certify."
        ),
        class_="card wide",
    )


def _in_python(summary) -> Element:
    """The same of a certificate that was made in Python, and is in no file."""
    hashed = summary["files"]
    return section(
        "Check it",
        element(
            "p",
            "This page is of a certificate in memory: certificate.save(…) writes the file from "
            "which `lipjax check`, or lipjax.check in Python, derives every verdict once more with "
            "other code.",
        ),
        _versions(summary["run"], "Versions and device where this page was made"),
        element("h3", "Hashes") if hashed else None,
        _hashes(summary) if hashed else None,
        note(
            "They are those that a certificate file of the same network and images has; they are "
            "no signature."
            if hashed
            else "Without the network and the images there are no hashes of them."
        ),
        class_="card wide",
    )


def _versions(run, caption: str) -> Element:
    versions = [*map(list, run["versions"].items()), ["device", run["device"]]]
    return element("div", table(caption, ["of", "version"], versions), class_="narrow")


def _hashes(summary) -> Element:
    """Of each file, the hashes that are known."""
    entries = []
    for name, facts in summary["files"].items():
        known = [(of, facts[key]) for key, of in HASHES.items() if key in facts]
        lines = [element("dd", f"{of} ", element("code", value)) for of, value in known]
        entries.append(_defined(name, *lines))
    return element("dl", entries, class_="hashes")


def configuration(summary) -> Element | None:
    """Every field of the training's configuration; None where none is known."""
    if not summary["config"]:
        return None
    entries = []
    for name, value in _leaves(summary["config"]):
        shown = value if isinstance(value, str) and value else json.dumps(value)
        entries.append(_defined(name, element("dd", shown)))
    title = "Configuration of the training"
    return section(title, element("dl", entries, class_="config"), class_="card wide")


def _defined(name: str, *definitions: Element) -> Element:
    return element("div", element("dt", name), *definitions)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def check_command(file, *flags: str) -> str:
    """The command that checks one certificate file of a run."""
    return shlex.join(["python", "-m", "lipjax.check", os.fspath(file), *flags])
