"""What the sections of the page are made of: numbers, tables, legends, notes."""

import json
from collections.abc import Iterable, Sequence
from decimal import ROUND_FLOOR
from xml.etree.ElementTree import Element

from lipjax.report.charts import element, rounded


def number(value, shown: str, key: str) -> Element:
    """A stored number as people read it; `value` and `key` (which one it is) are for programs."""
    return element("data", shown, value=json.dumps(value), data_key=key)


def percent(value: float, key: str) -> Element:
    """A share, as `number`."""
    return number(value, f"{100 * value:.2f} %", key)


def epsilon_of(run) -> str:
    """Epsilon, or what is a hair below it: it is proved up to there, too."""
    return rounded(run["epsilon"], ROUND_FLOOR, 6)


def proof_of(run) -> str:
    """The tier of whatever is proved, and the probability that belongs to it."""
    if run["tier"] == "deterministic":
        return "tier deterministic"
    return f"tier probabilistic, δ = {run['failure_probability']:g}"


def bound_of(run) -> str:
    """By which bound verdicts and radii are."""
    return f"the bound “{run['curve_mode']}”" + (" or a looser one" if run["early"] else "")


def attacked(columns) -> bool:
    """Whether an attack was run; a certificate alone says nothing of one."""
    return "broken_by_pgd" in columns


def images_of(run, count: int) -> str:
    """The images in words: "360 test images of digits", "8 given images"."""
    name = f" of {run['data']}" if run["data"] else ""
    return f"{count} {run['split']} image{'s' if count > 1 else ''}{name}"


def section(title: str, *children, class_: str = "card") -> Element:
    """A card of the page."""
    return element("section", element("h2", title), *children, class_=class_)


def note(*text) -> Element:
    """A remark in small print."""
    return element("p", *text, class_="note")


def swatch(name: str, *text) -> Element:
    """An entry of a legend: the colour of that name, and what it means."""
    return element("li", element("span", class_=f"swatch {name}"), *text)


def legend(*entries) -> Element:
    """Entries beside each other."""
    return element("ul", *entries, class_="legend inline")


def stack(shares: Iterable[tuple[str, str, str]], said: str, class_: str = "stack") -> Element:
    """A bar of several parts: name of the colour, size, and what it says of each."""
    parts = [
        element("span", class_=name, style=f"flex-grow:{size}", title=title)
        for name, size, title in shares
    ]
    return element("div", parts, class_=class_, role="img", aria_label=said)


def table(caption: str, columns: Sequence, rows: Sequence[Sequence], class_: str = "") -> Element:
    """A table whose first column names its rows; it scrolls where it is too wide or long."""

    def cell(child):
        made = isinstance(child, Element) and child.tag == "td"
        return child if made else element("td", child)

    head = element("tr", [element("th", name, scope="col") for name in columns])
    body = [
        element("tr", element("th", first, scope="row"), [cell(child) for child in rest])
        for first, *rest in rows
    ]
    whole = element(
        "table", element("caption", caption), element("thead", head), element("tbody", body)
    )
    box = {"tabindex": "0", "role": "region", "aria_label": caption}
    return element("div", whole, class_=f"scroll {class_}".strip(), **box)
