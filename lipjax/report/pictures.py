"""The gallery: images, and the nearest adversarial ones that were found."""

import base64
import io
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from lipjax.report.charts import element, rounded
from lipjax.report.parts import (
    attacked,
    bound_of,
    epsilon_of,
    legend,
    note,
    number,
    proof_of,
    section,
    swatch,
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


def select(
    columns: Mapping[str, np.ndarray], mode: str, modes: Sequence[str]
) -> list[tuple[str, int]]:
    """Images for the gallery, no image twice: (a key of `GROUPS`, row).

    Args:
        columns: per-image results as in examples.npz. Without "certified_radius" margins take the
            place of radii; "broken_by_pgd" may be left out.
        mode: whose verdicts count.
        modes: all of the run.
    """
    certified = columns[f"certified_{mode}"]
    broken = columns["broken_by_pgd"] if attacked(columns) else np.zeros(len(certified), bool)
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
    """The largest radius that is proved of each image; 0: none.

    Its certified radius, or epsilon where only that was tried.
    """
    if "certified_radius" in columns:
        return columns["certified_radius"]
    return np.where(columns[f"certified_{run['curve_mode']}"], run["epsilon"], 0.0)


def section_of_images(run, columns, examples) -> Element:
    """The gallery: for each image what is proved of it, and what an attack, if it was run, has
    found."""
    names = GROUPS if "certified_radius" in columns else GROUPS_WITHOUT_RADII
    groups = examples["group"].tolist()
    rows = examples["row"]
    distances = examples.get("distance", np.full(len(rows), np.nan))
    proved = proved_radii(columns, run)[rows]
    known = [*proved.tolist(), *distances[np.isfinite(distances)].tolist(), run["epsilon"]]
    scale = 1.06 * max(known) or 1.0
    children: list = []
    for group, name in names.items():
        members = [i for i, other in enumerate(groups) if other == group]
        cards = [_card(run, columns, examples, i, float(proved[i]), scale) for i in members]
        if cards:
            children += [element("h3", name), element("div", cards, class_="cards")]
    title = "Images"
    words = (
        "The true radius of an image is the distance to the nearest image of another class. "
        "The certified radius is a lower bound (≥): nothing nearer can change the class, that "
        "is proved."
    )
    key = [swatch("proved", "proved: the class stays")]
    basis = f"Certified: {proof_of(run)}, seed {run['seed']}, {bound_of(run)}. "
    if attacked(columns):
        title += ", and the nearest adversarial ones that were found"
        words += (
            " The distance of the adversarial image that an attack found is an upper bound (≤). "
            "What lies between is open."
        )
        key.append(swatch("undecided", "open"))
        key.append(swatch("attacked", "an adversarial image is here"))
        basis += (
            "Attack: gradients with decoupled direction and norm, "
            f"{run['gallery_steps']} steps, {run['gallery_restarts']} starts, pixels kept in "
            f"[0, 1], seed {run['seed']}. Pixels are shown in 8 bits; gallery.npz holds them as "
            "they are."
        )
    else:
        words += " What lies beyond is open: no adversarial images were looked for."
        basis += "Pixels are shown in 8 bits."
    key.append(swatch("tick", f"ε = {epsilon_of(run)}, of which the badge speaks"))
    return section(
        title, element("p", words), legend(*key), children, note(basis), class_="card wide"
    )


def _card(run, columns, examples, i: int, radius: float, scale: float) -> Element:
    """One image of the gallery; `radius` is proved of it, and `scale` is where bars end."""
    row = int(examples["row"][i])
    searched = "distance" in examples
    distance = float(examples["distance"][i]) if searched else np.inf
    index, label, predicted = (int(columns[name][row]) for name in ("index", "label", "predicted"))
    certified = bool(columns[f"certified_{run['curve_mode']}"][row])
    found = np.isfinite(distance) and distance > 0
    if predicted != label:
        status = "wrong"
        word = "misclassified"
    elif certified:
        status = "proved"
        word = "certified"
    elif attacked(columns) and columns["broken_by_pgd"][row]:
        status = "attacked"
        word = "broken"
    else:
        status = "undecided"
        word = "undecided"

    above = None
    if found:
        shown = number(distance, rounded(distance, ROUND_CEILING), f"gallery.{i}.distance")
        above = element("li", "≤ ", shown, f", there it is {int(examples['became'][i])}")
    elif predicted != label:
        above = element("li", f"= 0: predicted as {predicted} without any change")
    elif searched:
        above = element("li", "no adversarial image was found at any distance")
    below = ", nothing is certified"
    if radius or certified:
        more = "" if "certified_radius" in columns else " (nothing larger was tried)"
        below = f", certified{more}"
    shown = number(radius, rounded(radius, ROUND_FLOOR) if radius else "0", f"gallery.{i}.radius")
    lines = [element("li", "≥ ", shown, below), above]

    said = f"Proved up to {rounded(radius, ROUND_FLOOR)}"
    if found:
        said += f", adversarial at {rounded(distance, ROUND_CEILING)}"
    said += f"; ε is {epsilon_of(run)}."
    bar = _bracket(radius, distance if found else None, run["epsilon"], scale)
    of_class = f"class {label if label >= 0 else 'not given'}"
    name = element("strong", f"#{index} · {of_class}")
    badge = element("span", word, class_=f"badge {status}")
    return element(
        "article",
        element("p", name, badge, class_="title"),
        element(
            "div", _pictures(run, examples, i, f"{index}, {of_class}", found), class_="pictures"
        ),
        element("div", bar, class_="bracket", role="img", aria_label=said),
        element("ul", lines, class_="plain"),
        class_="example",
    )


def _bracket(radius: float, distance: float | None, epsilon: float, scale: float) -> list[Element]:
    """The bar between what is proved and what an attack has found."""

    def at(value: float) -> str:
        return f"{100 * value / scale:.2f}%"

    bar = []
    if radius:
        bar.append(element("span", class_="proved", style=f"left:0;width:{at(radius)}"))
    if distance is not None:
        between = f"left:{at(radius)};width:{at(distance - radius)}"
        bar.append(element("span", class_="undecided", style=between))
        bar.append(element("span", class_="attacked mark", style=f"left:{at(distance)}"))
    return [*bar, element("span", class_="tick", style=f"left:{at(epsilon)}")]


def _pictures(run, examples, i: int, name: str, found) -> list[Element]:
    """The image, and where there is one the adversarial image and their difference."""
    image = examples["image"][i]
    pictures = [_picture(image, f"{run['split']} image {name}", "image")]
    if not found:
        return pictures
    adversarial = examples["adversarial"][i]
    difference = adversarial.astype(np.float64) - image
    largest = float(np.max(np.abs(difference)))
    grey = 0.5 + difference / (2 * largest)
    words = f"adversarial image, predicted as {int(examples['became'][i])}"
    enlarged = "their difference, enlarged; middle grey where there is none"
    return [
        *pictures,
        _picture(adversarial, words, "adversarial"),
        _picture(grey, enlarged, f"difference, ±{largest:.2g}"),
    ]


def _picture(pixels: np.ndarray, words: str, caption: str) -> Element:
    """An image ``(H, W, C)`` in [0, 1] as an inline PNG; channels but 1 or 3 are averaged."""
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
