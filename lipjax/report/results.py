"""Sections of the page: the headline, what became of the images, accuracies, classes."""

import os
from xml.etree.ElementTree import Element

import numpy as np

from lipjax.formats.certificate_files import statement
from lipjax.report.charts import element
from lipjax.report.parts import (
    attacked,
    bound_of,
    epsilon_of,
    images_of,
    note,
    number,
    percent,
    proof_of,
    section,
    stack,
    swatch,
    table,
)

# What a page says of a seed that belongs to certificates alone.
_SEEDS_FROM = {
    "system": "certificates, from the operating system",
    "given": "certificates, given",
    "unused": "unused: nothing was drawn",
}


def header(summary, certified: np.ndarray) -> Element:
    """What is proved in one sentence, the facts behind it, and the statement of the certificate."""
    run = summary["run"]
    title = f"{run['title']} · " if run.get("title") else ""
    facts = [
        element("div", element("dt", name), element("dd", text))
        for name, text in _facts(summary, len(certified)).items()
    ]
    said = statement(run)
    early = note(
        "Decided early: an image counts as certified if this bound or a looser one of the run "
        "certifies it; each bound has its own certificate file. Lipschitz constants and neurons "
        "are of the images that each bound examined."
    )
    warning = element("strong", "Note on the data: ")
    return element(
        "header",
        element("p", f"{title}lipjax · certification report · {proof_of(run)}", class_="kicker"),
        element("h1", _headline(summary, certified)),
        element("dl", facts, class_="facts"),
        element("blockquote", said[:1].upper() + said[1:]),
        early if run["early"] else None,
        element("p", warning, run["note"], class_="warning") if run["note"] else None,
    )


def _headline(summary, certified: np.ndarray) -> list:
    run = summary["run"]
    count = len(certified)
    mode = run["curve_mode"]
    epsilon = epsilon_of(run)
    accuracy = summary["modes"][mode]["certified_accuracy"]
    share = percent(accuracy, f"modes.{mode}.certified_accuracy")
    images = images_of(run, count)
    if not np.any(certified):
        return [
            f"Nothing is proved of the {images} at ε = {epsilon} (",
            share,
            " certified).",
        ]
    return [
        share,
        f" of {images} {'are' if count > 1 else 'is'} proved safe: no change of ℓ2 norm up "
        f"to {epsilon} makes the network answer anything but the right class.",
    ]


def _facts(summary, count: int) -> dict[str, str]:
    run = summary["run"]
    delta = "0: no probability of failure"
    if run["tier"] == "probabilistic":
        delta = f"{run['failure_probability']:g}, of all certificates of this run together"
    model = summary["config"].get("model", {})
    name = os.path.basename(run.get("network", "network"))
    network = f"{name}, training not recorded" if name else "not given to this page"
    if model:
        network = f"{model['name']}, epoch {run['epoch']}, trained with {run['trained_with']}"
    seeds = f"{run['seed']} ({_SEEDS_FROM.get(run.get('seed_from'), 'certificates')})"
    if "training_seed" in run:
        seeds = f"{run['seed']} (certificates, attacks), {run['training_seed']} (training)"
    data = f"{run['data'] or 'not named'}, {run['split']} split"
    return {
        "ε": f"{run['epsilon']!r} (ℓ2, pixels in [0, 1])",
        "tier": run["tier"],
        "δ": delta,
        "bound": bound_of(run),
        "arithmetic": f"executed in {run['arithmetic']}; proved in {run['precision']}, rounding "
        "counted",
        "data": f"{data}, {count} image{'s' if count > 1 else ''}",
        "network": network,
        "seeds": seeds,
    }


def verdicts(columns, certified: np.ndarray) -> Element:
    """How many images are certified, undecided, broken by PGD if it was run, misclassified."""
    right = columns["predicted"] == columns["label"]
    open_ = right & ~certified
    parts = [("proved", "certified", "right, and proved to stay so", certified)]
    if attacked(columns):
        broken = columns["broken_by_pgd"]
        words = "right, not certified, and PGD did not break it"
        parts.append(("undecided", "undecided", words, open_ & ~broken))
        words = "right, and PGD found an image within ε that is not"
        parts.append(("attacked", "broken", words, right & broken))
    else:
        words = "right, not certified; no attack was run"
        parts.append(("undecided", "undecided", words, open_))
    parts.append(("wrong", "misclassified", "wrong without any attack", ~right))

    counts = [int(np.sum(mask)) for *_, mask in parts]
    bar = []
    entries = []
    for (name, title, words, _), count in zip(parts, counts, strict=True):
        if count:
            bar.append((name, str(count), f"{title}: {count}"))
        shown = number(count, str(count), f"verdicts.{name}")
        soft = element("span", f" {words}", class_="soft")
        entries.append(swatch(name, element("strong", shown, f" {title}"), soft))
    said = ", ".join(f"{n} {title}" for n, (_, title, *_) in zip(counts, parts, strict=True))
    return section(
        "What became of the images",
        stack(bar, f"Of {len(certified)} images: {said}.", "stack tall"),
        element("ul", entries, class_="legend"),
    )


def accuracies(summary, columns) -> Element:
    """Clean, under PGD if it was run, and certified by each bound."""
    run = summary["run"]
    count = len(columns["label"])
    seed = str(summary["run"]["seed"])
    clean = percent(summary["clean_accuracy"], "clean_accuracy")
    rows: list[list] = [["clean", clean, "measured", "–"]]
    if attacked(columns):
        attack = f"{run['pgd_steps']} steps, {run['pgd_restarts']} restarts, ε = {epsilon_of(run)}"
        upper = f"measured, an upper bound of the robust accuracy: {attack}"
        rows.append(["under PGD", percent(summary["pgd_accuracy"], "pgd_accuracy"), upper, seed])
        between = (
            "The robust accuracy lies between the certified one and that under PGD. δ is of all "
            "certificates together."
        )
    else:
        rows.append(["under attack", "–", "not known: no attack was run", "–"])
        between = (
            "The robust accuracy lies between the certified one and the clean one; an attack would "
            "show how far below the clean one. δ is of all certificates together."
        )
    for i, (mode, row) in enumerate(summary["modes"].items()):
        looser = " or looser" if run["early"] and i else ""
        share = percent(row["certified_accuracy"], f"modes.{mode}.certified_accuracy")
        proof = f"proved at ε = {epsilon_of(run)}, {proof_of(run)}"
        if row["examined"] != count:
            proof += f"; {row['examined']} images examined"
        rows.append([f"certified, {mode}{looser}", share, proof, seed])
    trained = f", training seed {run['training_seed']}" if "training_seed" in run else ""
    return section(
        "Accuracies",
        table(
            f"Shares of the {count} {run['split']} images{trained}",
            ["accuracy", "share", "what it is", "seed"],
            rows,
        ),
        note(between),
    )


def stages(summary) -> list[Element]:
    """What each stage of a bound came to that decides images by several; of an earlier version's
    summary nothing."""
    found = {mode: row["stages"] for mode, row in summary["modes"].items() if row.get("stages")}
    return [_stages(summary["run"], mode, runs) for mode, runs in found.items()]


def _stages(run, mode: str, runs: list[dict]) -> Element:
    rows = []
    for i, stage in enumerate(runs):
        key = f"modes.{mode}.stages.{i}"
        names = ("images", "certified", "passes")
        cells = [number(stage[name], str(stage[name]), f"{key}.{name}") for name in names]
        seconds = number(stage["seconds"], f"{stage['seconds']:.3g}", f"{key}.seconds")
        rows.append([stage["name"], *cells, seconds])
    return section(
        f"Stage by stage: “{mode}”",
        table(
            f"Each stage is tried on what those before left open; {proof_of(run)}",
            ["stage", "images", "certified", "passes an image, at most", "seconds of all"],
            rows,
        ),
        note(
            "A pass carries one row back through the network; “steps” are gradient steps on "
            "slopes. Seconds are that machine’s, without compiling."
        ),
    )


def classes(summary, columns, certified: np.ndarray) -> Element:
    """The accuracies, class by class."""
    run = summary["run"]
    title = "Class by class"
    labels = columns["label"]
    if np.any(labels < 0):
        return section(title, note("The labels of what was predicted wrong were not given."))
    masks = {"clean": columns["predicted"] == labels}
    if attacked(columns):
        masks["pgd"] = ~columns["broken_by_pgd"]
    masks["certified"] = certified
    rows = []
    for label in np.unique(labels).tolist():
        mine = labels == label
        count = int(np.sum(mine))
        row: list = [str(label), number(count, str(count), f"class.{label}.images")]
        for name, mask in masks.items():
            share = float(np.mean(mask[mine]))
            shown = percent(share, f"class.{label}.{name}")
            style = f"--share:{100 * share:.2f}%"
            row.append(element("td", shown, class_=f"meter {name}", style=style))
        rows.append(row)
    total = summary["classes"]
    absent = total - len(rows) if total else 0
    remark = note(f"{absent} of {total} classes have no image among those certified.")
    return section(
        title,
        table(
            f"By the images’ label; certified: {proof_of(run)}, {bound_of(run)}, "
            f"ε = {epsilon_of(run)}, seed {run['seed']}",
            ["class", "images", *("PGD" if name == "pgd" else name for name in masks)],
            rows,
            "long",
        ),
        remark if absent else None,
        class_="card wide",
    )
