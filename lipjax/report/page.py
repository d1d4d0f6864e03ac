"""The page of a certification, ``report.html``: what certify.py has stored, for people.

One file that asks for nothing from anywhere: no script, no font, no style sheet, images inline, and
a content security policy that says so. Everything on it comes from the folder that certify.py
writes (summary.json, examples.npz, gallery.npz), so that `build` can make it again from there; a
number on the page is the stored one, rounded for reading, with the exact one beside it in a
``data`` element.
"""

import base64
import io
import json
import os
import shlex
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, tostring

import numpy as np

from lipjax.formats.certificate_files import statement
from lipjax.formats.files import replaced
from lipjax.report import charts
from lipjax.report.charts import element, rounded

NAME = "report.html"
SOURCES = ("summary.json", "examples.npz", "gallery.npz")
# What the page reads of the summary; one of an earlier version lacks some of it.
FIELDS = (
    *(
        "run",
        "clean_accuracy",
        "pgd_accuracy",
        "modes",
        "classes",
        "activations",
        "pgd_curve",
        "config",
        "commands",
    ),
    "files",
)
# Images of each group of the gallery.
SHOWN = 4
# Larger images are made smaller on the page, smaller ones are enlarged without smoothing.
PIXELS = 160
GROUPS = {
    "largest": "The largest certified radii",
    "smallest": "The smallest positive certified radii",
    "open": "Not certified at ε",
}
GROUPS_WITHOUT_RADII = {
    "largest": "Certified at ε with the largest margins",
    "smallest": "Certified at ε with the smallest margins",
    "open": "Not certified at ε",
}


class ReportError(ValueError):
    """The folder is no complete certification; the message says what is missing and what to do."""


# ------------------------------------------------------------------------------------ what it needs


def activation_layers(network, input_shape: Sequence[int]) -> list[dict[str, Any]]:
    """Kind and shape of each activation, in the order of `Certificate.constant`."""
    import jax
    import jax.numpy as jnp

    from lipjax.graph import Activation, trace

    graph = trace(network, jax.ShapeDtypeStruct(tuple(input_shape), jnp.float32))
    nodes = (node for node in graph.nodes if isinstance(node, Activation))
    return [{"kind": node.rule.kind, "shape": list(node.shape)} for node in nodes]


def select(
    columns: Mapping[str, np.ndarray], mode: str, modes: Sequence[str]
) -> list[tuple[str, int]]:
    """Images for the gallery, no image twice: (a key of `GROUPS`, row).

    Args:
        columns: per-image results as in examples.npz. Without "certified_radius" margins take the
            place of radii.
        mode: whose verdicts count.
        modes: all of the run.
    """
    certified, broken = columns[f"certified_{mode}"], columns["broken_by_pgd"]
    right = columns["predicted"] == columns["label"]
    if "certified_radius" in columns:
        strength = columns["certified_radius"]
    else:
        strength = np.where(certified, np.max([columns[f"margin_{m}"] for m in modes], axis=0), 0.0)
    falling = np.argsort(-strength, kind="stable")
    falling = falling[strength[falling] > 0].tolist()
    chosen = [("largest", row) for row in falling[:SHOWN]]
    chosen += [("smallest", row) for row in reversed(falling[max(SHOWN, len(falling) - SHOWN) :])]
    rest = ~certified
    rest[[row for _, row in chosen]] = False
    undecided, lost, wrong = (
        np.flatnonzero(rest & mask).tolist() for mask in (right & ~broken, right & broken, ~right)
    )
    half = SHOWN // 2
    candidates = [*undecided[:half], *lost[:half], *undecided[half:], *lost[half:], *wrong]
    return chosen + [("open", row) for row in candidates[:SHOWN]]


def gallery(
    network, images, labels, chosen: Sequence[tuple[str, int]], *, seed: int = 0, **search
) -> dict:
    """The chosen images, each with the nearest adversarial image that `attacks.smallest` finds.

    Args:
        network, images, labels: of the certification, all images.
        chosen: as `select` returns it.
        seed: of the attack's starts.
        search: steps and restarts of `attacks.smallest`.

    Returns:
        Arrays for gallery.npz, a row for each: "group", "row", "image" and "adversarial" ``(n, H,
        W, C)`` float32, "distance" (l2, float64; infinity where none was found, 0 where the image
        itself is misclassified), and "became", the class with the largest logit there but for the
        label's.
    """
    import jax

    from lipjax import attacks

    rows = np.array([row for _, row in chosen], np.int64)
    found = attacks.smallest(
        network, images[rows], labels[rows], key=jax.random.key(seed), **search
    )
    logits = np.array(jax.vmap(network)(found.adversarial))
    logits[np.arange(len(rows)), labels[rows]] = -np.inf
    return {
        "group": np.array([group for group, _ in chosen]),
        "row": rows,
        "image": np.asarray(images[rows], np.float32),
        "adversarial": found.adversarial,
        "distance": found.distance,
        "became": np.argmax(logits, axis=1),
    }


def proved_radii(columns: Mapping[str, np.ndarray], run: Mapping[str, Any]) -> np.ndarray:
    """The largest radius that is proved of each image: its certified radius, or epsilon where only
    that was tried; else 0."""
    if "certified_radius" in columns:
        return columns["certified_radius"]
    return np.where(columns[f"certified_{run['curve_mode']}"], run["epsilon"], 0.0)


# ---------------------------------------------------------------------------------- from the folder


def build(folder) -> Path:
    """Writes ``report.html`` of a folder that certify.py wrote, from its files alone, and returns
    the path.

    The same files give the same page, byte for byte.

    Raises:
        ReportError: a file is missing, damaged, of an earlier version, or of another run than the
            others.
    """
    folder = Path(folder)
    try:
        summary = json.loads((folder / SOURCES[0]).read_text())
        arrays = []
        for name in SOURCES[1:]:
            with open(folder / name, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays.append({key: file[key] for key in file.files})
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
    columns, examples = arrays
    for name, array in zip(SOURCES[1:], arrays, strict=True):
        facts = json.loads(str(array.pop("run")))
        other = [key for key, value in facts.items() if summary["run"].get(key) != value]
        if other:
            raise ReportError(
                f"{folder / name} is of another run than {SOURCES[0]} ({other[0]} differs): "
                "certify again."
            )
    path = folder / NAME
    with replaced(path) as file:  # names of files may hold what is no Unicode
        file.write(page(summary, columns, examples).encode("utf-8", "replace"))
    return path


def page(
    summary: Mapping[str, Any],
    columns: Mapping[str, np.ndarray],
    examples: Mapping[str, np.ndarray],
) -> str:
    """The page, a function of what is stored.

    Args:
        summary: content of summary.json.
        columns: arrays of examples.npz.
        examples: arrays of gallery.npz.
    """
    run = summary["run"]
    mode = run["curve_mode"]
    certified = columns[f"certified_{mode}"]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("title", f"{run['data']}, ε = {_epsilon(run)}: certification report"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        # Whatever text slipped through: the browser loads and runs nothing.
        element(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; style-src 'unsafe-inline'; img-src data:",
        ),
        element("link", rel="icon", href="data:,"),
        element("style", Path(__file__).with_name("style.css").read_text()),
    )
    body = element(
        "body",
        _header(summary, certified),
        element(
            "main",
            _verdicts(columns, certified),
            _accuracies(summary, columns),
            element("div", _curve(summary, columns), _radii(run, columns), class_="pair"),
            element("div", _lipschitz(summary, columns), _neurons(summary), class_="pair"),
            _gallery(run, columns, examples),
            _classes(summary, columns, certified),
            _commands(summary),
            _configuration(summary),
        ),
        element("footer", _FOOTER),
    )
    return (
        "<!DOCTYPE html>\n"
        + tostring(element("html", head, body, lang="en"), encoding="unicode", method="html")
        + "\n"
    )


# ------------------------------------------------------------------------------------------ numbers


def _number(value, shown: str, key: str) -> Element:
    """A stored number as people read it; `value` and `key` (which one it is) are for programs, and
    for the tests."""
    return element("data", shown, value=json.dumps(value), data_key=key)


def _percent(value: float, key: str) -> Element:
    return _number(value, f"{100 * value:.2f} %", key)


def _epsilon(run) -> str:
    """Epsilon, or what is a hair below it: it is proved up to there, too."""
    return rounded(run["epsilon"], ROUND_FLOOR, 6)


def _proof(run) -> str:
    """The tier of whatever is proved, and the probability that belongs to it."""
    if run["tier"] == "deterministic":
        return "tier deterministic"
    return f"tier probabilistic, δ = {run['failure_probability']:g}"


def _by(run) -> str:
    return f"the bound “{run['curve_mode']}”" + (" or a looser one" if run["early"] else "")


def _section(title: str, *children, class_: str = "card") -> Element:
    return element("section", element("h2", title), *children, class_=class_)


def _note(*text) -> Element:
    return element("p", *text, class_="note")


def _table(caption: str, columns: Sequence, rows: Sequence[Sequence], class_: str = "") -> Element:
    """A table whose first column names its rows, in a box that scrolls where it is too wide or
    long."""
    head = element("tr", [element("th", name, scope="col") for name in columns])
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            [cell if _is_cell(cell) else element("td", cell) for cell in row[1:]],
        )
        for row in rows
    ]
    table = element(
        "table", element("caption", caption), element("thead", head), element("tbody", body)
    )
    return element(
        "div",
        table,
        class_=f"scroll {class_}".strip(),
        tabindex="0",
        role="region",
        aria_label=caption,
    )


def _is_cell(child) -> bool:
    return isinstance(child, Element) and child.tag == "td"


# ----------------------------------------------------------------------------------------- sections


def _header(summary, certified) -> Element:
    run = summary["run"]
    count, proved = len(certified), int(np.sum(certified))
    share = _percent(
        summary["modes"][run["curve_mode"]]["certified_accuracy"],
        f"modes.{run['curve_mode']}.certified_accuracy",
    )
    images = f"{run['split']} image{'s' if count > 1 else ''} of {run['data']}"
    claim = (
        f"no change of ℓ2 norm up to {_epsilon(run)} makes the network answer anything but the "
        "right class."
    )
    if not proved:
        headline = [
            f"Nothing is proved of the {count} {images} at ε = {_epsilon(run)} (",
            share,
            " certified).",
        ]
    else:
        headline = [
            share,
            f" of {count} {images} {'are' if count > 1 else 'is'} proved safe: {claim}",
        ]
    model = summary["config"].get("model", {})
    facts = {
        "ε": f"{run['epsilon']!r} (ℓ2, pixels in [0, 1])",
        "tier": run["tier"],
        "δ": f"{run['failure_probability']:g}, of all certificates of this run together"
        if run["tier"] == "probabilistic"
        else "0: no probability of failure",
        "bound": _by(run),
        "arithmetic": f"executed in {run['arithmetic']}; proved in {run['precision']}, rounding "
        "counted",
        "data": f"{run['data']}, {run['split']} split, {count} image{'s' if count > 1 else ''}",
        "network": f"{model['name']}, epoch {run['epoch']}, trained with {run['trained_with']}"
        if model
        else f"{os.path.basename(run.get('network', 'network'))}, training not recorded",
        "seeds": f"{run['seed']} (certificates, attacks), {run['training_seed']} (training)",
    }
    return element(
        "header",
        element("p", f"lipjax · certification report · {_proof(run)}", class_="kicker"),
        element("h1", headline),
        element(
            "dl",
            [element("div", element("dt", k), element("dd", v)) for k, v in facts.items()],
            class_="facts",
        ),
        element("blockquote", statement(run)[:1].upper() + statement(run)[1:]),
        _note(
            "Decided early: an image counts as certified if this bound or a looser one of the run "
            "certifies it; each bound has its own certificate file. Lipschitz constants and "
            "neurons are of the images that each bound examined."
        )
        if run["early"]
        else None,
        element("p", element("strong", "Note on the data: "), run["note"], class_="warning")
        if run["note"]
        else None,
    )


def _verdicts(columns, certified) -> Element:
    right, broken = columns["predicted"] == columns["label"], columns["broken_by_pgd"]
    parts = {
        "proved": ("certified", "right, and proved to stay so", certified),
        "undecided": (
            "undecided",
            "right, not certified, and PGD did not break it",
            right & ~broken & ~certified,
        ),
        "attacked": (
            "broken",
            "right, and PGD found an image within ε that is not",
            right & broken,
        ),
        "wrong": ("misclassified", "wrong without any attack", ~right),
    }
    counts = {name: int(np.sum(mask)) for name, (_, _, mask) in parts.items()}
    bar = [
        element("span", class_=name, style=f"flex-grow:{count}", title=f"{parts[name][0]}: {count}")
        for name, count in counts.items()
        if count
    ]
    legend = [
        element(
            "li",
            element("span", class_=f"swatch {name}"),
            element(
                "strong", _number(counts[name], str(counts[name]), f"verdicts.{name}"), f" {title}"
            ),
            element("span", f" {words}", class_="soft"),
        )
        for name, (title, words, _) in parts.items()
    ]
    said = ", ".join(f"{counts[name]} {title}" for name, (title, _, _) in parts.items())
    return _section(
        "What became of the images",
        element(
            "div",
            bar,
            class_="stack tall",
            role="img",
            aria_label=f"Of {len(certified)} images: {said}.",
        ),
        element("ul", legend, class_="legend"),
    )


def _accuracies(summary, columns) -> Element:
    run, count = summary["run"], len(columns["label"])
    attack = f"{run['pgd_steps']} steps, {run['pgd_restarts']} restarts, ε = {_epsilon(run)}"
    rows: list[list] = [
        ["clean", _percent(summary["clean_accuracy"], "clean_accuracy"), "measured", "–"],
        [
            "under PGD",
            _percent(summary["pgd_accuracy"], "pgd_accuracy"),
            f"measured, an upper bound of the robust accuracy: {attack}",
            str(run["seed"]),
        ],
    ]
    for i, (mode, row) in enumerate(summary["modes"].items()):
        looser = " or looser" if run["early"] and i else ""
        examined = f"; {row['examined']} images examined" if row["examined"] != count else ""
        rows.append(
            [
                f"certified, {mode}{looser}",
                _percent(row["certified_accuracy"], f"modes.{mode}.certified_accuracy"),
                f"proved at ε = {_epsilon(run)}, {_proof(run)}{examined}",
                str(run["seed"]),
            ]
        )
    return _section(
        "Accuracies",
        _table(
            f"Shares of the {count} {run['split']} images, training seed {run['training_seed']}",
            ["accuracy", "share", "what it is", "seed"],
            rows,
        ),
        _note(
            "The robust accuracy lies between the certified one and that under PGD. δ is of all "
            "certificates together."
        ),
    )


def _curve(summary, columns) -> Element:
    run, title = summary["run"], "Certified accuracy against ε"
    if summary["pgd_curve"] is None:
        return _section(
            title,
            _note(
                "Radii were not computed in this run (certify.py --nocurve), so there is no curve."
            ),
        )
    radii, pgd = (
        columns["certified_radius"],
        [(float(e), float(a)) for e, a in summary["pgd_curve"]],
    )
    x, y = charts.axes((0.0, max(e for e, _ in pgd)), (0.0, 1.0))
    steps = charts.stairs(radii, np.linspace(x.low, x.high, 300))
    at = {float(e): float(np.mean((radii >= e) & (radii > 0))) for e, _ in pgd}
    marks = [
        charts.area(x, y, [*pgd], steps, "undecided"),
        charts.area(x, y, steps, [(x.low, 0.0), (x.high, 0.0)], "proved"),
        charts.line(x, y, steps, "proved"),
        charts.line(x, y, pgd, "attacked"),
        charts.dots(x, y, pgd, "attacked"),
        charts.marker(x, y, run["epsilon"], f"ε = {_epsilon(run)}"),
    ]
    description = "Accuracy against epsilon. " + " ".join(
        f"At {rounded(e, ROUND_FLOOR, 6)}: certified {100 * at[e]:.1f} %, PGD {100 * a:.1f} %."
        for e, a in pgd
    )
    rows = [
        [
            rounded(e, ROUND_FLOOR, 6),
            _percent(a, f"pgd_curve.{i}"),
            _percent(at[e], f"certified_curve.{i}"),
        ]
        for i, (e, a) in enumerate(pgd)
    ]
    return _section(
        title,
        charts.chart(
            description, x, y, "ε (ℓ2 radius, pixels in [0, 1])", "accuracy", marks, "{:.0%}".format
        ),
        element(
            "ul",
            _key("attacked", "under PGD, an upper bound"),
            _key("open", "undecided"),
            _key("proved", f"certified by {_by(run)}, {_proof(run)}"),
            class_="legend inline",
        ),
        _table(
            f"The same in numbers; {run['split']} split, seed {run['seed']}",
            ["ε", "PGD", "certified"],
            rows,
        ),
        _note(
            f"PGD at ε = {_epsilon(run)}: {run['pgd_restarts']} restarts; at the other points one "
            "restart. At ε = 0: the "
            "clean accuracy, and the share that is certified at any radius at all."
        ),
    )


def _key(name: str, text: str) -> Element:
    return element("li", element("span", class_=f"swatch {name}"), text)


def _radii(run, columns) -> Element:
    title = "Certified radii"
    if "certified_radius" not in columns:
        return _section(title, _note("Radii were not computed in this run (certify.py --nocurve)."))
    radii = columns["certified_radius"]
    positive, none = radii[radii > 0], int(np.sum(radii == 0))
    if not len(positive):
        return _section(
            title, element("p", f"No image has a positive certified radius (of {len(radii)}).")
        )
    epsilon, most = run["epsilon"], float(np.max(radii))
    # Epsilon is an edge, so that the bars behind it are what is certified at epsilon.
    width = epsilon / max(1, round(24 * epsilon / max(most, epsilon))) if epsilon else most / 24
    edges = np.arange(int(max(most, epsilon) // width) + 2) * width
    if epsilon:
        edges[round(epsilon / width)] = epsilon
    counts, _ = np.histogram(positive, edges)
    x, y = charts.axes((0.0, float(edges[-1])), (0.0, 1.08 * max(1, int(np.max(counts)))))
    names = ["proved" if left >= epsilon else "below" for left in edges[:-1]]

    def hint(left, right, count):
        return f"{count} images with a radius from {left:.3g} to {right:.3g}"

    median = float(np.median(radii))
    marks = [
        charts.bars(x, y, edges, counts, names, hint),
        charts.marker(x, y, epsilon, f"ε = {_epsilon(run)}"),
    ]
    return _section(
        title,
        charts.chart(
            f"Histogram of {len(positive)} positive certified radii, the largest "
            f"{rounded(most, ROUND_FLOOR)}; {none} images have none.",
            x,
            y,
            "certified radius (ℓ2, pixels in [0, 1])",
            "images",
            marks,
        ),
        element(
            "ul",
            _key(
                "proved",
                f"at least ε: {int(np.sum(radii >= epsilon) if epsilon else len(positive))} images",
            ),
            _key("below", f"positive, below ε: {int(np.sum(positive < epsilon))}"),
            element("li", "none at any radius: ", _number(none, str(none), "radii.none")),
            class_="legend inline",
        ),
        element(
            "p",
            "Median of all images ",
            _number(median, rounded(median), "radii.median"),
            ", largest ",
            _number(most, rounded(most, ROUND_FLOOR), "radii.largest"),
            ".",
        ),
        _note(
            f"Each radius is proved ({_proof(run)}, seed {run['seed']}, {_by(run)}); the true one "
            "may be larger, as the attacks below show."
        ),
    )


def _lipschitz(summary, columns) -> Element:
    run, title = summary["run"], "Lipschitz constants around the images"
    values = {mode: columns[f"lipschitz_{mode}"] for mode in summary["modes"]}
    values = {mode: found[np.isfinite(found)] for mode, found in values.items()}
    known = np.concatenate(list(values.values()))
    if not len(known):
        return _section(title, _note("No image was examined, so no constant is known."))
    low, high = charts.span(float(np.min(known)), float(np.max(known)))
    row_height, parts = 78, []
    height = charts.TOP + charts.BOTTOM + row_height * len(values)
    x, _ = charts.axes((low, high), (0.0, 1.0), height)
    facts = []
    for i, (mode, found) in enumerate(values.items()):
        bottom = charts.TOP + row_height * (i + 1)
        parts.append(
            element(
                "line",
                x1=f"{x.start}",
                x2=f"{x.end}",
                y1=f"{bottom}",
                y2=f"{bottom}",
                class_="axis",
            )
        )
        text = f"{mode}: none examined"
        if len(found):
            counts, edges = charts.histogram(found, low, high, 48)
            own = charts.Axis(0.0, float(np.max(counts)), bottom, bottom - row_height + 26)
            median = summary["modes"][mode]["median_lipschitz"]
            alike = bool(np.min(found) == np.max(found))
            text = f"{mode}: {'all' if alike else 'median'} {rounded(median, ROUND_CEILING)}"

            def hint(left, right, count, mode=mode):
                return f"{mode}: {count} images from {left:.4g} to {right:.4g}"

            parts += charts.bars(x, own, edges, counts, ["proved"] * len(counts), hint)
            facts.append(
                element(
                    "li",
                    f"{mode} ",
                    _number(
                        median, rounded(median, ROUND_CEILING), f"modes.{mode}.median_lipschitz"
                    ),
                )
            )
        parts.append(
            element(
                "text",
                text,
                x=f"{x.start + 4}",
                y=f"{bottom - row_height + 18}",
                class_="label halo",
            )
        )
    bottom_axis = charts.Axis(0.0, 1.0, height - charts.BOTTOM, charts.TOP)
    for value in x.ticks():
        at = f"{x(value):.2f}"
        parts.append(
            element(
                "text", f"{value:.6g}", x=at, y=f"{bottom_axis.start + 18}", class_="tick middle"
            )
        )
    parts.append(
        element(
            "text",
            "Lipschitz constant, from the input to the last hidden layer",
            x=f"{(x.start + x.end) / 2}",
            y=f"{bottom_axis.start + 39}",
            class_="label middle",
        )
    )
    said = "Histograms of Lipschitz constants, one row for each bound. " + " ".join(
        f"{mode}: median {rounded(float(np.median(found)), ROUND_CEILING)}."
        for mode, found in values.items()
        if len(found)
    )
    svg = element(
        "svg",
        element("title", said),
        parts,
        viewBox=f"0 0 {charts.WIDTH} {height}",
        role="img",
        class_="chart",
    )
    svg.set("aria-label", said)
    return _section(
        title,
        svg,
        element("ul", element("li", "Medians:"), facts, class_="legend inline"),
        _note(
            f"Proved upper bounds on the ball of radius ε = {_epsilon(run)} around each image "
            f"({_proof(run)}, seed {run['seed']}); the height of a row is its own.",
            *(_SAME_CONSTANT[mode] for mode in values if mode in _SAME_CONSTANT),
        ),
    )


_SAME_CONSTANT = {
    "bcp": " The constant of “bcp” is that of “global”: its margins are tighter, by its boxes.",
    "linear": " The constant of “linear” is that of “local”: its margins are tighter, by the "
    "slopes.",
    "rows": " The constant of “rows” is that of a walk by “local” in tighter boxes: its margins "
    "are tighter than that says.",
}


def _neurons(summary) -> Element:
    run, layers, title = summary["run"], summary["activations"], "Neurons that cannot change much"
    modes = [mode for mode in reversed(summary["modes"]) if mode != "global"]
    if not layers or not modes:
        why = (
            "The network has no activation."
            if not layers
            else "The global bound knows nothing of single neurons."
        )
        return _section(title, _note(why))
    mode = modes[0]
    bars, rows = [], []
    for i, layer in enumerate(layers):
        name = f"{i + 1} · {layer['kind']}, {'×'.join(map(str, layer['shape']))}"
        constant, stable = (
            summary["modes"][mode][f"{kind}_share"][i] for kind in ("constant", "stable")
        )
        rest = max(0.0, 1 - constant - stable)
        parts = [
            element(
                "span",
                class_=kind,
                style=f"flex-grow:{share:.6f}",
                title=f"{word}: {100 * share:.1f} %",
            )
            for kind, word, share in (
                ("proved", "constant", constant),
                ("below", "stable", stable),
                ("rest", "others", rest),
            )
            if share
        ]
        said = f"{name}: {100 * constant:.1f} % constant, {100 * stable:.1f} % stable"
        bars.append(element("p", name, class_="over"))
        bars.append(element("div", parts, class_="stack", role="img", aria_label=said))
        row: list = [str(i + 1)]
        for other in modes:
            for kind in ("constant", "stable"):
                row.append(
                    _percent(
                        summary["modes"][other][f"{kind}_share"][i],
                        f"modes.{other}.{kind}_share.{i}",
                    )
                )
        rows.append(row)
    return _section(
        title,
        element(
            "p", f"Share of each layer’s neurons, mean over the images, by the bound “{mode}”:"
        ),
        bars,
        element(
            "ul",
            _key(
                "proved", "constant on the whole ball: masked, its rows and columns leave the norms"
            ),
            _key(
                "below", "stable: varies, but crosses no kink, no threshold, and changes no order"
            ),
            _key("rest", "everything else"),
            class_="legend inline",
        ),
        _table(
            f"The same in numbers, on the ball of radius ε = {_epsilon(run)}",
            ["layer", *(f"{m}, {kind}" for m in modes for kind in ("constant", "stable"))],
            rows,
        ),
        _note(f"From boxes that are proved: {_proof(run)}, seed {run['seed']}."),
    )


def _gallery(run, columns, examples) -> Element:
    names = GROUPS if "certified_radius" in columns else GROUPS_WITHOUT_RADII
    groups, proved = examples["group"].tolist(), proved_radii(columns, run)
    rows, distances = examples["row"], examples["distance"]
    reached = [*proved[rows].tolist(), *distances[np.isfinite(distances)].tolist(), run["epsilon"]]
    scale = 1.06 * max(reached) or 1.0
    children: list = []
    for group, name in names.items():
        cards = [
            _card(run, columns, examples, i, proved, scale)
            for i, other in enumerate(groups)
            if other == group
        ]
        if cards:
            children += [element("h3", name), element("div", cards, class_="cards")]
    return _section(
        "Images, and the nearest adversarial ones that were found",
        element(
            "p",
            "The true radius of an image is the distance to the nearest image of another class. "
            "The certified radius is a lower bound (≥): nothing nearer can change the class, that "
            "is proved. The distance of the adversarial image that an attack found is an upper "
            "bound (≤). What lies between is open.",
        ),
        element(
            "ul",
            _key("proved", "proved: the class stays"),
            _key("undecided", "open"),
            _key("attacked", "an adversarial image is here"),
            element(
                "li",
                element("span", class_="swatch tick"),
                f"ε = {_epsilon(run)}, of which the badge speaks",
            ),
            class_="legend inline",
        ),
        children,
        _note(
            f"Certified: {_proof(run)}, seed {run['seed']}, {_by(run)}. Attack: gradients with "
            f"decoupled direction and norm, {run['gallery_steps']} steps, "
            f"{run['gallery_restarts']} starts, pixels kept in [0, 1], seed {run['seed']}. Pixels "
            "are shown in 8 bits; gallery.npz holds them as they are."
        ),
        class_="card wide",
    )


def _card(run, columns, examples, i, proved, scale) -> Element:
    row = int(examples["row"][i])
    index, label, predicted = (int(columns[name][row]) for name in ("index", "label", "predicted"))
    radius, distance, became = (
        float(proved[row]),
        float(examples["distance"][i]),
        int(examples["became"][i]),
    )
    image, adversarial = examples["image"][i], examples["adversarial"][i]
    found, right = np.isfinite(distance) and distance > 0, predicted == label
    certified, broken = (
        bool(columns[f"certified_{run['curve_mode']}"][row]),
        bool(columns["broken_by_pgd"][row]),
    )
    status, word = (
        ("wrong", "misclassified")
        if not right
        else ("proved", "certified")
        if certified
        else ("attacked", "broken")
        if broken
        else ("undecided", "undecided")
    )
    difference = adversarial.astype(np.float64) - image
    largest = float(np.max(np.abs(difference)))
    pictures = [_picture(image, f"{run['split']} image {index}, class {label}", "image")]
    if found:
        shown = 0.5 + difference / (2 * largest)
        pictures.append(
            _picture(adversarial, f"adversarial image, predicted as {became}", "adversarial")
        )
        words = "their difference, enlarged; middle grey where there is none"
        pictures.append(_picture(shown, words, f"difference, ±{largest:.2g}"))
    key = f"gallery.{i}"
    more = "" if "certified_radius" in columns else " (nothing larger was tried)"
    lines = [
        element(
            "li",
            "≥ ",
            _number(radius, rounded(radius, ROUND_FLOOR), f"{key}.radius"),
            f", certified{more}",
        )
        if radius or certified
        else element("li", "≥ ", _number(radius, "0", f"{key}.radius"), ", nothing is certified")
    ]
    bar = []
    if radius:
        bar.append(
            element("span", class_="proved", style=f"left:0;width:{100 * radius / scale:.2f}%")
        )
    if found:
        lines.append(
            element(
                "li",
                "≤ ",
                _number(distance, rounded(distance, ROUND_CEILING), f"{key}.distance"),
                f", there it is {became}",
            )
        )
        bar.append(
            element(
                "span",
                class_="undecided",
                style=f"left:{100 * radius / scale:.2f}%;"
                f"width:{100 * (distance - radius) / scale:.2f}%",
            )
        )
        bar.append(
            element("span", class_="attacked mark", style=f"left:{100 * distance / scale:.2f}%")
        )
    elif not right:
        lines.append(element("li", f"= 0: predicted as {predicted} without any change"))
    else:
        lines.append(element("li", "no adversarial image was found at any distance"))
    bar.append(element("span", class_="tick", style=f"left:{100 * run['epsilon'] / scale:.2f}%"))
    said = f"Proved up to {rounded(radius, ROUND_FLOOR)}" + (
        f", adversarial at {rounded(distance, ROUND_CEILING)}" if found else ""
    )
    return element(
        "article",
        element(
            "p",
            element("strong", f"#{index} · class {label}"),
            element("span", word, class_=f"badge {status}"),
            class_="title",
        ),
        element("div", pictures, class_="pictures"),
        element(
            "div", bar, class_="bracket", role="img", aria_label=f"{said}; ε is {_epsilon(run)}."
        ),
        element("ul", lines, class_="plain"),
        class_="example",
    )


def _picture(pixels: np.ndarray, words: str, caption: str) -> Element:
    """An image ``(H, W, C)`` in [0, 1] as an inline PNG; channels other than 1 or 3 are
    averaged."""
    from PIL import Image

    if pixels.shape[-1] not in (1, 3):
        pixels = np.mean(pixels, axis=-1, keepdims=True)
    bits = np.round(255 * np.clip(pixels, 0, 1)).astype(np.uint8)
    picture = Image.fromarray(bits[..., 0] if bits.shape[-1] == 1 else bits)
    picture.thumbnail((PIXELS, PIXELS))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return element("figure", element("img", src=source, alt=words), element("figcaption", caption))


def _classes(summary, columns, certified) -> Element:
    run = summary["run"]
    labels, right, stands = (
        columns["label"],
        columns["predicted"] == columns["label"],
        ~columns["broken_by_pgd"],
    )
    rows = []
    for label in np.unique(labels).tolist():
        mine = labels == label
        row: list = [
            str(label),
            _number(int(np.sum(mine)), str(int(np.sum(mine))), f"class.{label}.images"),
        ]
        for name, mask in (("clean", right), ("pgd", stands), ("certified", certified)):
            share = float(np.mean(mask[mine]))
            cell = _percent(share, f"class.{label}.{name}")
            row.append(
                element("td", cell, class_=f"meter {name}", style=f"--share:{100 * share:.2f}%")
            )
        rows.append(row)
    absent = summary["classes"] - len(rows)
    return _section(
        "Class by class",
        _table(
            f"By the images’ label; certified: {_proof(run)}, {_by(run)}, ε = {_epsilon(run)}, "
            f"seed {run['seed']}",
            ["class", "images", "clean", "PGD", "certified"],
            rows,
            "long",
        ),
        _note(f"{absent} of {summary['classes']} classes have no image among those certified.")
        if absent
        else None,
        class_="card wide",
    )


def _commands(summary) -> Element:
    run, commands = summary["run"], summary["commands"]
    train = commands["train"] or "# not recorded; the configuration below is that of the training"
    lines = [
        "# train",
        train,
        "# certify",
        commands["certify"],
        "# check the certificates with other code",
        *commands["check"],
    ]
    versions = [[name, version] for name, version in run["versions"].items()]
    files = [
        element(
            "div",
            element("dt", name),
            [
                element("dd", f"{what} ", element("code", facts[key]))
                for key, what in _HASHES.items()
            ],
        )
        for name, facts in summary["files"].items()
    ]
    return _section(
        "Reproduce and check",
        element("pre", element("code", "\n".join(lines)), tabindex="0"),
        element(
            "p",
            "The checker derives every verdict of a certificate file once more from the network "
            "and the images, and exits with 0 if it confirms them.",
        ),
        element(
            "div",
            _table(
                "Versions and device", ["of", "version"], [*versions, ["device", run["device"]]]
            ),
            class_="narrow",
        ),
        element("h3", "Certificate files"),
        element("dl", files, class_="hashes"),
        _note(
            f"Data: fingerprint {run['data_fingerprint']} of the certified split. Hashes find "
            f"damage; they are no signature. It took {run['seconds']:g} s to certify."
        ),
        class_="card wide",
    )


_HASHES = {
    "sha256": "SHA-256 of the file",
    "digest": "digest inside",
    "network": "network",
    "data": "images and labels",
}


def _configuration(summary) -> Element:
    leaves = list(_leaves(summary["config"]))
    entries = [
        element(
            "div",
            element("dt", name),
            element("dd", value if isinstance(value, str) and value else json.dumps(value)),
        )
        for name, value in leaves
    ]
    return _section(
        "Configuration of the training", element("dl", entries, class_="config"), class_="card wide"
    )


def _leaves(tree: Mapping[str, Any], prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def check_command(file, *flags: str) -> str:
    """The command that checks one certificate file of a run."""
    return shlex.join(["python", "-m", "lipjax.check", os.fspath(file), *flags])


_FOOTER = (
    "“Certified” is said of what is proved alone. Accuracies under attack are upper bounds: a "
    "stronger attack may lower them, but never below the certified one."
)
