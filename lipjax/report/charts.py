"""HTML elements and small SVG charts for `lipjax.report`: no script, no fixed colours, text as
text.

Pages are trees of `xml.etree` elements, so whatever text comes from outside is escaped where the
tree is written, and what is written is well-formed. Charts are drawn here and not by Matplotlib,
whose SVG has fixed colours and sizes: these follow the page's style sheet (light, dark, print) and
its width.
"""

import dataclasses
import decimal
import math
from collections.abc import Callable, Sequence
from xml.etree.ElementTree import Element

import numpy as np

WIDTH = 460
HEIGHT = 300
# Room around the plane of a chart: left, right, top, bottom.
LEFT = 54
RIGHT = 14
TOP = 14
BOTTOM = 48


def element(name: str, /, *children, **attributes) -> Element:
    """An element. Children are elements, texts, None (left out) or lists of these; ``class_`` and
    ``aria_label`` become ``class`` and ``aria-label``; an attribute of None is left out."""
    found = Element(
        name,
        {k.strip("_").replace("_", "-"): str(v) for k, v in attributes.items() if v is not None},
    )
    _append(found, children)
    return found


def _append(parent: Element, children) -> None:
    for child in children:
        if child is None:
            continue
        if isinstance(child, (list, tuple)):
            _append(parent, child)
        elif isinstance(child, Element):
            parent.append(child)
        elif len(parent):
            parent[-1].tail = (parent[-1].tail or "") + str(child)
        else:
            parent.text = (parent.text or "") + str(child)


@dataclasses.dataclass(frozen=True)
class Axis:
    """Where values lie on a chart: `low` at pixel `start`, `high` at pixel `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values in the range, at most `count` steps of one size."""
        # (Matplotlib has this too, but the page is also made where that is not installed.)
        apart = (self.high - self.low) / count
        unit = 10.0 ** math.floor(math.log10(apart))
        step = unit * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * unit >= apart)
        slack = 1e-9
        first = math.ceil(self.low / step - slack)
        last = math.floor(self.high / step + slack)
        return [number * step for number in range(first, last + 1)]


def axes(
    x: tuple[float, float], y: tuple[float, float], height: float = HEIGHT
) -> tuple[Axis, Axis]:
    """The two axes of a chart over these ranges, each of positive length."""
    return Axis(*x, LEFT, WIDTH - RIGHT), Axis(*y, height - BOTTOM, TOP)


def chart(
    description: str,
    x: Axis,
    y: Axis,
    x_label: str,
    y_label: str,
    marks,
    show_y: Callable = "{:g}".format,
):
    """A chart with ticks and labels around `marks`; `description` is what a screen reader says of
    it."""
    bottom = y.start
    top = y.end
    parts = [element("title", description)]
    for value in y.ticks():
        parts.append(_line(x.start, y(value), x.end, y(value), "grid"))
        parts.append(_text(x.start - 7, y(value) + 4, show_y(value), "tick end"))
    for value in x.ticks():
        parts.append(_line(x(value), bottom, x(value), bottom + 5, "axis"))
        parts.append(_text(x(value), bottom + 18, f"{value:.6g}", "tick middle"))
    middle = (bottom + top) / 2
    parts += [
        *marks,
        _line(x.start, bottom, x.end, bottom, "axis"),
        _text((x.start + x.end) / 2, bottom + 39, x_label, "label middle"),
        element(
            "text",
            y_label,
            class_="label middle",
            transform=f"translate(13 {middle:.1f}) rotate(-90)",
        ),
    ]
    size = f"0 0 {WIDTH} {bottom + BOTTOM:g}"
    return element("svg", parts, viewBox=size, role="img", aria_label=description, class_="chart")


def line(x: Axis, y: Axis, points: Sequence[tuple[float, float]], name: str) -> Element:
    """A line through points; `name` is its class in the style sheet."""
    return element("path", d=_path(x, y, points), class_=f"line {name}")


def area(x: Axis, y: Axis, upper: Sequence[tuple], lower: Sequence[tuple], name: str) -> Element:
    """What lies between two lines."""
    return element("path", d=_path(x, y, [*upper, *reversed(lower)]) + "Z", class_=f"area {name}")


def dots(x: Axis, y: Axis, points: Sequence[tuple[float, float]], name: str) -> list[Element]:
    """A circle at each point."""
    return [
        element("circle", cx=f"{x(a):.2f}", cy=f"{y(b):.2f}", r="4", class_=f"dot {name}")
        for a, b in points
    ]


def bars(
    x: Axis, y: Axis, edges: np.ndarray, counts: np.ndarray, names: Sequence[str], hint: Callable
) -> list[Element]:
    """Bars of a histogram; ``hint(left, right, count)`` is said of each."""
    found = []
    for left, right, count, name in zip(
        edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), names, strict=True
    ):
        if count:
            a = x(left)
            b = x(right)
            top = y(count)
            inset = min(0.75, (b - a) / 8)
            box = {"x": f"{a + inset:.2f}", "width": f"{b - a - 2 * inset:.2f}"}
            box |= {"y": f"{top:.2f}", "height": f"{y.start - top:.2f}"}
            found.append(
                element(
                    "rect", element("title", hint(left, right, count)), class_=f"bar {name}", **box
                )
            )
    return found


def marker(x: Axis, y: Axis, value: float, text: str) -> list[Element]:
    """A vertical dotted line at a value of x, with its name at the top, on the side where there is
    room."""
    at = x(value)
    right = at < (x.start + x.end) / 2
    label = _text(
        at + (5 if right else -5), y.end + 10, text, "label halo" + ("" if right else " end")
    )
    return [_line(at, y.start, at, y.end, "marker"), label]


def stairs(values: np.ndarray, grid: np.ndarray) -> list[tuple[float, float]]:
    """(g, share of the values that are positive and at least g) for each g of a grid."""
    return [(float(g), float(np.mean((values >= g) & (values > 0)))) for g in grid]


def span(low: float, high: float, least: float = 0.05) -> tuple[float, float]:
    """A range around [low, high] with a little room, of positive length also where the two are the
    same."""
    room = max(
        0.04 * (high - low),
        least * max(abs(high), abs(low)) if high - low < 1e-3 * abs(high) else 0.0,
    )
    room = room or 1.0 * (low == high)
    return low - room, high + room


def histogram(
    values: np.ndarray, low: float, high: float, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Counts and edges of `count` equal bins over [low, high]; every finite value inside is counted
    once."""
    counts, edges = np.histogram(values[np.isfinite(values)], np.linspace(low, high, count + 1))
    return counts, edges


def rounded(value: float, toward: str = decimal.ROUND_HALF_EVEN, digits: int = 4) -> str:
    """A number with so many significant digits (at most six), as people read it.

    Args:
        toward: ROUND_FLOOR for what is proved from below, ROUND_CEILING for upper bounds: what is
            shown holds too.
    """
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞" if value < 0 else "not a number"
    shown = decimal.Context(prec=digits, rounding=toward).create_decimal(repr(float(value)))
    return f"{float(shown):g}".replace("-", "−")


def _path(x: Axis, y: Axis, points) -> str:
    return "M" + "L".join(f"{x(a):.2f} {y(b):.2f}" for a, b in points)


def _line(x1, y1, x2, y2, name) -> Element:
    return element(
        "line", x1=f"{x1:.2f}", y1=f"{y1:.2f}", x2=f"{x2:.2f}", y2=f"{y2:.2f}", class_=name
    )


def _text(x, y, text, name) -> Element:
    return element("text", text, x=f"{x:.2f}", y=f"{y:.2f}", class_=name)
