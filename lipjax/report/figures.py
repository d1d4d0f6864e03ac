"""Sections of the page with charts: accuracy against epsilon, radii, constants, neurons."""

import math
from decimal import ROUND_CEILING, ROUND_FLOOR
from xml.etree.ElementTree import Element

import numpy as np

from lipjax.report import charts
from lipjax.report.charts import element, rounded
from lipjax.report.parts import (
    attacked,
    bound_of,
    epsilon_of,
    legend,
    note,
    number,
    percent,
    proof_of,
    section,
    stack,
    swatch,
    table,
)

SAME_CONSTANT = {
    "bcp": " The constant of “bcp” is that of “global”: its margins are tighter, by its boxes.",
    "linear": " The constant of “linear” is that of “local”: its margins are tighter, by the "
    "slopes.",
    "tight": " The constant of “tight” is that of “local”: its margins are tighter, by the "
    "errors' signs.",
    "tight_rows": " The constant of “tight_rows” is that of a walk by “local” in tighter boxes: "
    "its margins are tighter than that says.",
    "rows": " The constant of “rows” is that of a walk by “local” in tighter boxes: its margins "
    "are tighter than that says.",
}
# Pixels of one bound's row in the chart of Lipschitz constants.
ROW_HEIGHT = 78


def curve(summary, columns) -> Element:
    """Certified accuracy against epsilon, and that under PGD."""
    run = summary["run"]
    title = "Certified accuracy against ε"
    if summary["pgd_curve"] is None:
        text = "Radii were not computed in this run (certify.py --nocurve), so there is no curve."
        return section(title, note(text))

    radii = columns["certified_radius"]
    pgd = [(float(e), float(a)) for e, a in summary["pgd_curve"]]
    at = {e: float(np.mean((radii >= e) & (radii > 0))) for e, _ in pgd}
    x, y = charts.axes((0.0, max(e for e, _ in pgd)), (0.0, 1.0))
    steps = charts.stairs(radii, np.linspace(x.low, x.high, 300))
    marks = [
        charts.area(x, y, pgd, steps, "undecided"),
        charts.area(x, y, steps, [(x.low, 0.0), (x.high, 0.0)], "proved"),
        charts.line(x, y, steps, "proved"),
        charts.line(x, y, pgd, "attacked"),
        charts.dots(x, y, pgd, "attacked"),
        charts.marker(x, y, run["epsilon"], f"ε = {epsilon_of(run)}"),
    ]
    said = ["Accuracy against epsilon."]
    rows = []
    for i, (e, a) in enumerate(pgd):
        shown = rounded(e, ROUND_FLOOR, 6)
        said.append(f"At {shown}: certified {100 * at[e]:.1f} %, PGD {100 * a:.1f} %.")
        rows.append([shown, percent(a, f"pgd_curve.{i}"), percent(at[e], f"certified_curve.{i}")])
    below = "ε (ℓ2 radius, pixels in [0, 1])"
    caption = f"The same in numbers; {run['split']} split, seed {run['seed']}"
    return section(
        title,
        charts.chart(" ".join(said), x, y, below, "accuracy", marks, "{:.0%}".format),
        legend(
            swatch("attacked", "under PGD, an upper bound"),
            swatch("open", "undecided"),
            swatch("proved", f"certified by {bound_of(run)}, {proof_of(run)}"),
        ),
        table(caption, ["ε", "PGD", "certified"], rows),
        note(
            f"PGD at ε = {epsilon_of(run)}: {run['pgd_restarts']} restarts; at the other points "
            "one restart. At ε = 0: the clean accuracy, and the share that is certified at any "
            "radius at all."
        ),
    )


def radii(run, columns) -> Element:
    """A histogram of the certified radii; where there are none, of the margins."""
    title = "Certified radii"
    if "certified_radius" not in columns:
        return _margins(run, columns)
    found = columns["certified_radius"]
    epsilon = run["epsilon"]
    positive = found[found > 0]
    none = int(np.sum(found == 0))
    if not len(positive):
        text = f"No image has a positive certified radius (of {len(found)})."
        return section(title, element("p", text))

    largest = float(np.max(found))
    median = float(np.median(found))
    edges = _edges(largest, epsilon)
    counts, _ = np.histogram(positive, edges)
    x, y = charts.axes((0.0, float(edges[-1])), (0.0, 1.08 * max(1, int(np.max(counts)))))
    names = ["proved" if left >= epsilon else "below" for left in edges[:-1]]

    def hint(left, right, count):
        return f"{count} images with a radius from {left:.3g} to {right:.3g}"

    marks = [
        charts.bars(x, y, edges, counts, names, hint),
        charts.marker(x, y, epsilon, f"ε = {epsilon_of(run)}"),
    ]
    shown = rounded(largest, ROUND_FLOOR)
    said = (
        f"Histogram of {len(positive)} positive certified radii, the largest {shown}; {none} "
        "images have none."
    )
    shows = ", as the attacks below show" if attacked(columns) else ""
    above = int(np.sum(found >= epsilon) if epsilon else len(positive))
    below = int(np.sum(positive < epsilon))
    return section(
        title,
        charts.chart(said, x, y, "certified radius (ℓ2, pixels in [0, 1])", "images", marks),
        legend(
            swatch("proved", f"at least ε: {above} images"),
            swatch("below", f"positive, below ε: {below}"),
            element("li", "none at any radius: ", number(none, str(none), "radii.none")),
        ),
        element(
            "p",
            "Median of all images ",
            number(median, rounded(median), "radii.median"),
            ", largest ",
            number(largest, shown, "radii.largest"),
            ".",
        ),
        note(
            f"Each radius is proved ({proof_of(run)}, seed {run['seed']}, {bound_of(run)}); the "
            f"true one may be larger{shows}."
        ),
    )


def _margins(run, columns) -> Element:
    """A histogram of the margins at epsilon, of the images that are predicted right."""
    title = f"Margins at ε = {epsilon_of(run)}"
    why = (
        "Radii were not computed in this run (certify.py --nocurve)."
        if attacked(columns)
        else "Radii are not known; lipjax.certified_radius proves them."
    )
    margins = columns[f"margin_{run['curve_mode']}"]
    right = columns["predicted"] == columns["label"]
    found = margins[right & np.isfinite(margins)]
    if not len(found):
        return section(title, note("No margin is known. ", why))

    # Zero is an edge, so that the bars behind it are what is certified.
    low = min(float(np.min(found)), 0.0)
    high = max(float(np.max(found)), 0.0)
    width = (high - low or 1.0) / 24
    edges = np.arange(math.floor(low / width), math.floor(high / width) + 2) * width
    counts, _ = np.histogram(np.clip(found, edges[0], edges[-1]), edges)
    x, y = charts.axes(
        (float(edges[0]), float(edges[-1])), (0.0, 1.08 * max(1, int(np.max(counts))))
    )
    names = ["proved" if left >= 0 else "below" for left in edges[:-1]]

    def hint(left, right, count):
        return f"{count} images with a margin from {left:.3g} to {right:.3g}"

    above = int(np.sum(found > 0))
    median = float(np.median(found))
    shown = rounded(median, ROUND_FLOOR)
    marks = [charts.bars(x, y, edges, counts, names, hint), charts.marker(x, y, 0.0, "0")]
    said = f"Histogram of {len(found)} margins, {above} above 0; their median is {shown}."
    return section(
        title,
        charts.chart(said, x, y, "margin: logit of the label minus the largest", "images", marks),
        legend(
            swatch("proved", f"above 0, certified: {above} images"),
            swatch("below", f"not certified: {len(found) - above}"),
            element("li", "Median ", number(median, shown, "margins.median")),
        ),
        note(
            "The label’s logit minus the largest that another class can have anywhere in the ball, "
            f"a proved lower bound ({proof_of(run)}, seed {run['seed']}, by “{run['curve_mode']}” "
            f"alone), of what is predicted right. {why}"
        ),
    )


def _edges(largest: float, epsilon: float) -> np.ndarray:
    """Edges of bins. Epsilon is one, so that the bars behind it are what is certified there."""
    end = max(largest, epsilon)
    bins = round(24 * epsilon / end)  # in front of epsilon
    width = epsilon / bins if bins else end / 24
    edges = np.arange(int(end // width) + 2) * width
    if epsilon and not bins:  # far below all radii: a narrow bin of its own
        return np.insert(edges, 1, epsilon)
    if epsilon:
        edges[round(epsilon / width)] = epsilon
    return edges


def lipschitz(summary, columns) -> Element:
    """Histograms of the Lipschitz constants, one row for each bound."""
    run = summary["run"]
    title = "Lipschitz constants around the images"
    values = {mode: columns[f"lipschitz_{mode}"] for mode in summary["modes"]}
    values = {mode: found[np.isfinite(found)] for mode, found in values.items()}
    known = np.concatenate(list(values.values()))
    if not len(known):
        return section(title, note("No image was examined, so no constant is known."))

    low, high = charts.span(float(np.min(known)), float(np.max(known)))
    height = charts.TOP + charts.BOTTOM + ROW_HEIGHT * len(values)
    x, y = charts.axes((low, high), (0.0, 1.0), height)
    said = ["Histograms of Lipschitz constants, one row for each bound."]
    parts = []
    facts = []
    for i, (mode, found) in enumerate(values.items()):
        stored = summary["modes"][mode]["median_lipschitz"]
        parts += _row(x, charts.TOP + ROW_HEIGHT * (i + 1), mode, found, stored)
        if len(found):
            shown = rounded(stored, ROUND_CEILING)
            fact = number(stored, shown, f"modes.{mode}.median_lipschitz")
            facts.append(element("li", f"{mode} ", fact))
            said.append(f"{mode}: median {rounded(float(np.median(found)), ROUND_CEILING)}.")
    for value in x.ticks():
        place = {"x": f"{x(value):.2f}", "y": f"{y.start + 18}"}
        parts.append(element("text", f"{value:.6g}", **place, class_="tick middle"))
    label = "Lipschitz constant, from the input to the last hidden layer"
    place = {"x": f"{(x.start + x.end) / 2}", "y": f"{y.start + 39}"}
    parts.append(element("text", label, **place, class_="label middle"))

    box = {"viewBox": f"0 0 {charts.WIDTH} {height}", "role": "img", "class_": "chart"}
    text = " ".join(said)
    return section(
        title,
        element("svg", element("title", text), parts, **box, aria_label=text),
        legend(element("li", "Medians:"), facts),
        note(
            f"Proved upper bounds on the ball of radius ε = {epsilon_of(run)} around each image "
            f"({proof_of(run)}, seed {run['seed']}); the height of a row is its own.",
            *(SAME_CONSTANT[mode] for mode in values if mode in SAME_CONSTANT),
        ),
    )


def _row(x: charts.Axis, bottom: int, mode: str, found: np.ndarray, median: float) -> list[Element]:
    """One bound's histogram, on its own scale of counts."""
    ends = {"x1": f"{x.start}", "x2": f"{x.end}", "y1": f"{bottom}", "y2": f"{bottom}"}
    parts = [element("line", **ends, class_="axis")]
    text = f"{mode}: none examined"

    def hint(left, right, count):
        return f"{mode}: {count} images from {left:.4g} to {right:.4g}"

    if len(found):
        counts, edges = charts.histogram(found, x.low, x.high, 48)
        y = charts.Axis(0.0, float(np.max(counts)), bottom, bottom - ROW_HEIGHT + 26)
        parts += charts.bars(x, y, edges, counts, ["proved"] * len(counts), hint)
        alike = bool(np.min(found) == np.max(found))
        text = f"{mode}: {'all' if alike else 'median'} {rounded(median, ROUND_CEILING)}"
    place = {"x": f"{x.start + 4}", "y": f"{bottom - ROW_HEIGHT + 18}"}
    return [*parts, element("text", text, **place, class_="label halo")]


def neurons(summary) -> Element:
    """The shares of neurons that are constant or stable, layer by layer."""
    run = summary["run"]
    layers = summary["activations"]
    title = "Neurons that cannot change much"
    modes = [mode for mode in reversed(summary["modes"]) if mode != "global"]
    if not layers:
        return section(title, note("The network has no activation."))
    if not modes:
        return section(title, note("The global bound knows nothing of single neurons."))

    kinds = ("constant", "stable")
    bars = []
    rows = []
    for i, layer in enumerate(layers):
        shape = f", {'×'.join(map(str, layer['shape']))}" if layer["shape"] else ""
        name = f"{i + 1} · {layer['kind']}{shape}"
        constant, stable = (summary["modes"][modes[0]][f"{kind}_share"][i] for kind in kinds)
        shares = (
            ("proved", "constant", constant),
            ("below", "stable", stable),
            ("rest", "others", max(0.0, 1 - constant - stable)),
        )
        bar = [(c, f"{s:.6f}", f"{word}: {100 * s:.1f} %") for c, word, s in shares if s]
        said = f"{name}: {100 * constant:.1f} % constant, {100 * stable:.1f} % stable"
        bars += [element("p", name, class_="over"), stack(bar, said)]
        cells = [
            percent(summary["modes"][mode][f"{kind}_share"][i], f"modes.{mode}.{kind}_share.{i}")
            for mode in modes
            for kind in kinds
        ]
        rows.append([str(i + 1), *cells])
    said = f"Share of each layer’s neurons, mean over the images, by the bound “{modes[0]}”:"
    constant_means = "constant on the whole ball: masked, its rows and columns leave the norms"
    stable_means = "stable: varies, but crosses no kink, no threshold, and changes no order"
    return section(
        title,
        element("p", said),
        bars,
        legend(
            swatch("proved", constant_means),
            swatch("below", stable_means),
            swatch("rest", "everything else"),
        ),
        table(
            f"The same in numbers, on the ball of radius ε = {epsilon_of(run)}",
            ["layer", *(f"{mode}, {kind}" for mode in modes for kind in kinds)],
            rows,
        ),
        note(f"From boxes that are proved: {proof_of(run)}, seed {run['seed']}."),
    )
