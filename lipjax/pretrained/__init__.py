"""Small trained networks that come with lipjax, each with a card: how it was trained and what was
certified.

    network = lipjax.load("digits-maxmin")
    lipjax.pretrained.card("digits-maxmin")["results"]

``python -m benchmarks.pretrained`` makes the files beside this one from a run. Nothing is
downloaded.
"""

import difflib
import hashlib
import json
import os
from pathlib import Path

from flax import nnx

from lipjax import storage
from lipjax.graph.program import Program

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The networks that come with lipjax."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def card(name: str) -> dict:
    """What is known of a network that comes with lipjax.

    Returns:
        ``name``; ``data``, ``input_shape`` (H, W, C), ``classes``, ``parameters``; ``command``,
        ``seed`` and ``epoch`` of its training (the file has the configuration), and the
        ``versions`` that certified it; ``sha256`` of its file; ``results``: a list of
        certifications, each with tier, failure_probability, epsilon, split, number of examples,
        seed, arithmetic, clean_accuracy, pgd_accuracy, certified_accuracy by bound, and the
        command; and a note, where there is something that one has to know of it.

    Raises:
        ValueError: no network of that name comes with lipjax.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"no network called {name!r} comes with lipjax; there are {', '.join(names())}. A file "
            "is given by its path, "
            f"ending in .safetensors.{hint}"
        )
    return json.loads((_FOLDER / f"{name}.json").read_text())


def load(name: str | os.PathLike) -> nnx.Sequential | Program:
    """A network that comes with lipjax, or a network or function that `lipjax.save` wrote.

    Args:
        name: one of `names()`, or a path that ends in ".safetensors".

    Returns:
        the network, for images ``(H, W, C)`` with pixels in [0, 1]; of a function that was stored
        by its graph one that computes the same.

    Raises:
        ValueError: no such name; a file that is not the one that the card describes, or no network
            of `lipjax.save`.
        FileNotFoundError: no such file.
    """
    if str(name).endswith(".safetensors"):
        return storage.load(name)
    return storage.load(path(str(name)))


def path(name: str) -> Path:
    """The file of a network that comes with lipjax, after its hash was compared with its card's;
    errors as of `load`."""
    known, found = card(name), _FOLDER / f"{name}.safetensors"
    if sha256(found) != known["sha256"]:
        raise ValueError(
            f"{found} is not the file that its card describes (SHA-256 differs): install lipjax "
            "again."
        )
    return found


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def listed() -> str:
    """The networks and what was certified of them, as text."""
    lines = []
    for name in names():
        known = card(name)
        shape = "x".join(map(str, known["input_shape"]))
        lines.append(
            f"{name}: {known['data']}, images {shape}, {known['classes']} classes, "
            f"{known['parameters']} parameters; "
            f"training seed {known['seed']}, epoch {known['epoch']}"
        )
        lines += ["  " + described(result) for result in known["results"]]
    return "\n".join(lines)


def described(result: dict) -> str:
    """One certification of a card, with its tier, radius, split and seed."""
    failure = (
        f", failure probability {result['failure_probability']:g}"
        if result["failure_probability"]
        else ""
    )
    certified = ", ".join(
        f"{100 * share:.1f} % by {mode}" for mode, share in result["certified_accuracy"].items()
    )
    return (
        f"epsilon {result['epsilon']:g}, {result['examples']} {result['split']} images: "
        f"clean {100 * result['clean_accuracy']:.1f} %, PGD {100 * result['pgd_accuracy']:.1f} % "
        "(an upper bound), "
        f"certified {certified} "
        f"(tier {result['tier']}{failure}, {result['arithmetic']}, seed {result['seed']})"
        + (f". {result['note']}" if "note" in result else "")
    )
