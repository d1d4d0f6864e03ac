"""The page of a certification says what is stored and nothing else, asks for nothing, and is
well-formed; curves of training."""

import decimal
import functools
import html.parser
import json
import re
import shutil
import struct
import subprocess
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ACTIVATIONS, make_activation
from flax import nnx
from PIL import Image

import lipjax
from lipjax import report, trace
from lipjax.certificates.results import StageRun
from lipjax.cli import certify
from lipjax.report import ReportError, charts
from lipjax.training import metrics as reporting

# ----------------------------------------------------------------------------------- what is stored


def certification(
    folder,
    count=40,
    *,
    classes=4,
    shape=(6, 6, 1),
    modes=("global", "paper", "local"),
    seed=0,
    **change,
):
    """Writes files of a made-up certification and returns what they hold: summary, columns,
    gallery.

    Args:
        change: "certified" a share, "curve" and "early" flags, "epsilon", "config", "commands" and
            entries of run.
    """
    rng, epsilon = np.random.default_rng(seed), change.pop("epsilon", 0.5)
    share, curve, early = (
        change.pop("certified", 0.5),
        change.pop("curve", True),
        change.pop("early", False),
    )
    config = change.pop(
        "config",
        {"seed": 3, "model": {"name": "small_conv", "widths": [4, 8]}, "data": {"name": "digits"}},
    )
    commands = {
        "train": "python train.py",
        "certify": "python certify.py",
        "check": ["python -m lipjax.check c.npz"],
    }
    commands |= change.pop("commands", {})
    label = rng.integers(0, classes, count)
    certified = np.arange(count) < round(share * count)
    radius = np.where(
        certified, epsilon * rng.uniform(1, 2, count), epsilon * rng.uniform(-0.5, 1, count)
    ).clip(0)
    broken = ~certified & (rng.random(count) < 0.5)
    wrong = ~certified & (rng.random(count) < 0.2)
    radius[wrong] = 0
    broken |= wrong
    columns = {
        "index": rng.permutation(1000)[:count],
        "label": label,
        "predicted": np.where(wrong, (label + 1) % classes, label),
        "broken_by_pgd": broken,
        **{f"certified_{mode}": certified for mode in modes},
        **{f"margin_{mode}": np.where(certified, rng.uniform(0, 1, count), -1.0) for mode in modes},
        **{f"lipschitz_{mode}": rng.uniform(2, 9, count) / (i + 1) for i, mode in enumerate(modes)},
    }
    if curve:
        columns["certified_radius"] = radius
    if early:
        columns[f"lipschitz_{modes[-1]}"][:] = np.inf
    chosen = report.select(columns, modes[-1], modes)
    rows = np.array([row for _, row in chosen], int)
    image = rng.random((len(rows), *shape)).astype(np.float32)
    distance = np.where(
        wrong[rows], 0.0, np.where(certified[rows], 2.5 * epsilon, radius[rows] + 0.1)
    )
    gallery = {
        "group": np.array([group for group, _ in chosen]),
        "row": rows,
        "image": image,
        "adversarial": np.clip(image + rng.normal(0, 0.1, image.shape), 0, 1).astype(np.float32),
        "distance": distance,
        "became": (label[rows] + 1) % classes,
    }
    run = {
        **{
            "tier": "probabilistic",
            "failure_probability": 1e-6,
            "arithmetic": "float32",
            "precision": "float64",
        },
        **{
            "epsilon": epsilon,
            "data": "digits",
            "split": "test",
            "examples": count,
            "early": early,
            "note": "",
            "seed": 7,
        },
        **{
            "training_seed": 3,
            "trained_with": "mode local, loss bcp",
            "epoch": 95,
            "curve_mode": modes[-1],
        },
        **{
            "pgd_steps": 20,
            "pgd_restarts": 2,
            "gallery_steps": 200,
            "gallery_restarts": 4,
            "data_fingerprint": "d3c0",
        },
        **{"versions": {"lipjax": "0.1.0", "python": "3.11"}, "device": "1 × cpu", **change},
    }
    points = [0.0, 0.25, epsilon, 1.5] if epsilon else [0.0, 0.25, 1.5]
    summary = {
        "run": {**run, "seconds": 12.5},
        "clean_accuracy": float(np.mean(~wrong)),
        "pgd_accuracy": float(np.mean(~broken)),
        "modes": {
            mode: {
                "certified_accuracy": float(np.mean(certified)),
                "examined": 0 if early and mode == modes[-1] else count,
                "median_lipschitz": float(np.median(columns[f"lipschitz_{mode}"])),
                "constant_share": rng.uniform(0, 0.5, 2).tolist(),
                "stable_share": rng.uniform(0, 0.5, 2).tolist(),
            }
            for mode in modes
        },
        "pgd_curve": [[p, float(np.mean(~broken)) if p else float(np.mean(~wrong))] for p in points]
        if curve
        else None,
        "classes": classes,
        "activations": [
            {"kind": "ClippedReLU", "shape": [6, 6, 4]},
            {"kind": "ClippedReLU", "shape": [12]},
        ],
        "config": config,
        "commands": commands,
        "files": {
            "certificate.npz": {
                name: name[0] * 64 for name in ("sha256", "digest", "network", "data")
            }
        },
    }
    reporting.write_summary(folder / "summary.json", summary)
    reporting.write_examples(folder, run, columns)
    reporting.write_arrays(folder / "gallery.npz", run, gallery)
    return summary, columns, gallery


class Page(html.parser.HTMLParser):
    """A page as read by the standard library's parser; refuses tags that do not match.

    Attributes:
        numbers: by key, the stored value and the text shown, of each ``data`` element.
        texts: all text in order, but for style sheets.
        tags: (name, attributes) in order.
    """

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts, self.numbers = [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == [] and text.startswith("<!DOCTYPE html>")

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "data":
            self.key = dict(attrs)["data-key"]
            self.numbers[self.key] = (json.loads(dict(attrs)["value"]), "")

    def handle_endtag(self, tag):
        assert tag == self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            return
        if self.open and self.open[-1] == "data":
            self.numbers[self.key] = (self.numbers[self.key][0], self.numbers[self.key][1] + data)
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def built(folder, *arguments, **options) -> Page:
    certification(folder, *arguments, **options)
    return Page(report.build(folder).read_text())


def asks_for_nothing(page: Page, text: str) -> None:
    loading = (
        "src",
        "href",
        "srcset",
        "poster",
        "action",
        "formaction",
        "data",
        "background",
        "xlink:href",
        "ping",
    )
    for tag, attributes in page.tags:
        assert tag not in (
            "script",
            "iframe",
            "object",
            "embed",
            "form",
            "base",
            "video",
            "audio",
            "use",
            "image",
        ), tag
        for name, value in attributes.items():
            assert not name.startswith("on") and (
                name not in loading or value.startswith("data:")
            ), (tag, name, value)
            assert "url(" not in value
    sheet = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in sheet and "@import" not in sheet and "http" not in sheet
    (policy,) = [
        a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


# ----------------------------------------------------------------------------------------- the page


def test_every_number_on_the_page_is_the_stored_one(tmp_path):
    summary, columns, gallery = certification(tmp_path)
    page = Page(report.build(tmp_path).read_text())
    label, radii = columns["label"], columns["certified_radius"]
    certified, broken = columns["certified_local"], columns["broken_by_pgd"]
    right = columns["predicted"] == label
    wanted = {
        **{name: summary[name] for name in ("clean_accuracy", "pgd_accuracy")},
        "verdicts.proved": sum(certified),
        "verdicts.undecided": sum(right & ~broken & ~certified),
        "verdicts.attacked": sum(right & broken),
        "verdicts.wrong": sum(~right),
        "radii.none": sum(r == 0 for r in radii),
        "radii.median": sorted(radii)[19] / 2 + sorted(radii)[20] / 2,
        "radii.largest": max(radii),
    }
    for mode, row in summary["modes"].items():
        wanted[f"modes.{mode}.certified_accuracy"] = row["certified_accuracy"]
        wanted[f"modes.{mode}.median_lipschitz"] = row["median_lipschitz"]
        if mode != "global":
            for kind in ("constant_share", "stable_share"):
                wanted |= {f"modes.{mode}.{kind}.{i}": share for i, share in enumerate(row[kind])}
    for i, (epsilon, accuracy) in enumerate(summary["pgd_curve"]):
        wanted[f"pgd_curve.{i}"] = accuracy
        wanted[f"certified_curve.{i}"] = sum(r > 0 and r >= epsilon for r in radii) / 40
    for i, row in enumerate(gallery["row"]):
        wanted[f"gallery.{i}.radius"] = radii[row]
        if gallery["distance"][i]:
            wanted[f"gallery.{i}.distance"] = gallery["distance"][i]
    for c in range(4):
        mine = [i for i in range(40) if label[i] == c]
        wanted[f"class.{c}.images"] = len(mine)
        for name, mask in (("clean", right), ("pgd", ~broken), ("certified", certified)):
            wanted[f"class.{c}.{name}"] = sum(mask[i] for i in mine) / len(mine)
    assert page.numbers.keys() == wanted.keys()
    for key, (value, shown) in page.numbers.items():
        assert value == pytest.approx(float(wanted[key]), rel=1e-12), key
        number = float(shown.removesuffix(" %"))
        if shown.endswith("%"):
            assert abs(number / 100 - value) <= 0.5001e-4, key
        else:
            assert number == pytest.approx(value, rel=1.1e-3), key
        # What is shown of a proved radius is proved, what is shown of an upper bound is one.
        if key.endswith((".radius", ".largest")):
            assert number <= value
        if key.endswith((".distance", ".median_lipschitz")):
            assert number >= value


def test_the_headline_names_share_data_epsilon_and_the_facts_tier_delta_arithmetic_and_seeds(
    tmp_path,
):
    page = built(tmp_path)
    assert (
        "50.00 % of 40 test images of digits are proved safe: no change of ℓ2 norm up to 0.5 makes"
        in page.text
    )
    for words in (
        "probabilistic",
        "1e-06, of all certificates",
        "float32",
        "7 (certificates, attacks), 3 (training)",
    ):
        assert words in page.text
    assert (
        "With probability >= 1 - 1e-06 over the tool's own draws (seed 7), all certificates"
        in page.text
    )
    certain = built(tmp_path, tier="deterministic", failure_probability=0.0)
    assert "0: no probability of failure" in certain.text and "δ =" not in certain.text
    nothing_larger = built(tmp_path, epsilon=0.0, curve=False, certified=1)
    assert (
        nothing_larger.numbers["gallery.0.radius"] == (0.0, "0")
        and "nothing is certified" not in nothing_larger.text
    )


def test_curve_and_histograms_draw_what_is_stored(tmp_path):
    """Read back from the SVG: heights of bars are counts, the curve's corners are shares."""
    values = np.array([0.0, 0.3, 0.3, 0.9])
    assert charts.stairs(values, np.array([0.0, 0.3, 0.31, 1.0])) == [
        (0.0, 0.75),
        (0.3, 0.75),
        (0.31, 0.25),
        (1.0, 0.0),
    ]
    _, columns, _ = certification(tmp_path)
    page = Page(report.build(tmp_path).read_text())
    bars = [a for tag, a in page.tags if tag == "rect"]
    radii = columns["certified_radius"]
    said = [
        text
        for text in page.texts
        if text.endswith(")") is False and " images with a radius from " in text
    ]
    below = sum(int(text.split()[0]) for text in said if float(text.split()[-1]) <= 0.5)
    at_least = sum(int(text.split()[0]) for text in said if float(text.split()[-3]) >= 0.5)
    assert (below, at_least) == (np.sum((radii > 0) & (radii < 0.5)), np.sum(radii >= 0.5))
    assert [a["class"] for a in bars[: len(said)]].count("bar proved") == sum(
        float(t.split()[-3]) >= 0.5 for t in said
    )
    for mode in ("global", "paper", "local"):
        counts = [
            int(t.split()[1])
            for t in page.texts
            if t.startswith(f"{mode}: ") and " images from " in t
        ]
        assert sum(counts) == 40
    assert (
        charts.rounded(1.03999, decimal.ROUND_FLOOR) == "1.039"
        and charts.rounded(1.0301, decimal.ROUND_CEILING) == "1.031"
    )
    assert (
        charts.rounded(36 / 255, decimal.ROUND_FLOOR, 6) == "0.141176"
        and charts.rounded(0.3, decimal.ROUND_FLOOR) == "0.3"
    )
    assert charts.rounded(1e-7) == "1e−07"
    for low, high, ticks in ((0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3.1, 0.2, [-3, -2, -1, 0])):
        assert charts.Axis(low, high, 0, 1).ticks() == pytest.approx(ticks)
    assert len(charts.Axis(3.0, 3.0000001, 0, 1).ticks()) in range(2, 7)
    low, high = charts.span(5.0, 5.0)
    counts, edges = charts.histogram(np.array([5.0, 5.0, np.inf]), low, high, 7)
    assert sum(counts) == 2 and edges[0] < 5 < edges[-1]


CASES = {
    "one image": dict(count=1),
    "one image, wrong": dict(count=1, certified=0, seed=7),
    "nothing certified": dict(certified=0),
    "everything certified": dict(certified=1),
    "no curve": dict(curve=False),
    "early, the last bound examined none": dict(early=True),
    "early, no curve": dict(early=True, curve=False),
    "colour": dict(shape=(5, 7, 3)),
    "two channels": dict(shape=(5, 5, 2)),
    "larger than shown": dict(shape=(200, 180, 3), count=6),
    "200 classes": dict(count=600, classes=200),
    "epsilon 0": dict(epsilon=0.0),
    "one bound": dict(modes=("global",)),
    "six bounds": dict(modes=("global", "bcp", "paper", "local", "linear", "rows")),
    "deterministic": dict(tier="deterministic", failure_probability=0.0),
    "training was not recorded": dict(commands={"train": None}),
}


@pytest.mark.parametrize("case", CASES)
def test_degenerate_certifications_give_a_sensible_page_that_asks_for_nothing(tmp_path, case):
    options = CASES[case]
    summary, columns, _ = certification(tmp_path, **options)
    text = report.build(tmp_path).read_text()
    page = Page(text)
    asks_for_nothing(page, text)
    assert not re.search(r"\b(nan|NaN|inf|None|Infinity)\b", page.text)
    share = summary["modes"][summary["run"]["curve_mode"]]["certified_accuracy"]
    assert page.numbers[f"modes.{summary['run']['curve_mode']}.certified_accuracy"][0] == share
    assert ("Nothing is proved of the" in page.text) == (share == 0)
    assert ("Radii were not computed" in page.text) == (not options.get("curve", True))
    assert ("Decided early" in page.text) == options.get("early", False)
    assert sum(key.endswith(".images") for key in page.numbers) == len(np.unique(columns["label"]))
    pictures = [a for tag, a in page.tags if tag == "img"]
    assert pictures and all(
        a["src"].startswith("data:image/png;base64,") and a["alt"] for a in pictures
    )
    if case in ("no curve", "early, no curve"):  # epsilon is the largest radius that was tried
        assert (
            page.numbers["gallery.0.radius"] == (0.5, "0.5")
            and "Certified at ε with the largest margins" in page.text
        )
    assert [k for k in page.numbers if k.startswith("verdicts.")]
    assert sum(v for k, (v, _) in page.numbers.items() if k.startswith("verdicts.")) == len(
        columns["label"]
    )


def test_text_from_outside_is_shown_and_never_becomes_markup(tmp_path):
    evil = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;</style>"
    config = {evil: evil, "model": {"name": evil}, "list": [evil]}
    commands = {"train": evil, "certify": evil, "check": [evil]}
    run = {
        "data": evil,
        "note": evil,
        "trained_with": evil,
        "device": evil,
        "data_fingerprint": evil,
    }
    plain, text = built(tmp_path), None
    page = built(tmp_path, config=config, commands=commands, versions={evil: evil}, **run)
    text = (tmp_path / report.NAME).read_text()
    asks_for_nothing(page, text)
    assert "<script" not in text and page.text.count(evil) > 12
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert {name for _, a in page.tags for name in a} == {name for _, a in plain.tags for name in a}


def test_a_page_built_again_is_the_same_and_files_of_two_runs_are_refused(tmp_path):
    certification(tmp_path)
    first = report.build(tmp_path).read_bytes()
    (tmp_path / report.NAME).unlink()
    assert report.build(tmp_path).read_bytes() == first and not list(tmp_path.glob("*.tmp"))
    old = (tmp_path / "gallery.npz").read_bytes()
    certification(tmp_path, epsilon=0.25)
    (tmp_path / "gallery.npz").write_bytes(old)
    with pytest.raises(
        ReportError, match=r"gallery\.npz is of another run than summary\.json \(epsilon differs\)"
    ):
        report.build(tmp_path)
    (tmp_path / "gallery.npz").write_bytes(old[:300])
    with pytest.raises(ReportError, match="damaged, certify again"):
        report.build(tmp_path)
    (tmp_path / "gallery.npz").unlink()
    with pytest.raises(ReportError, match=r"gallery\.npz is not there: .*certify"):
        report.build(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    del summary["files"]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    certification_of = tmp_path / "earlier"
    certification_of.mkdir()
    certification(certification_of)
    shutil.copy(tmp_path / "summary.json", certification_of)
    with pytest.raises(
        ReportError, match="has no files: an earlier version wrote it, certify again"
    ):
        report.build(certification_of)


# ------------------------------------------------------------------------- of one in memory


def in_memory(**change):
    """A made-up certificate of six images, by a network of one activation; network, images and
    labels."""
    network = nnx.Sequential(
        lipjax.Flatten(),
        nnx.Linear(12, 5, rngs=nnx.Rngs(0)),
        lipjax.ReLU(),
        nnx.Linear(5, 3, rngs=nnx.Rngs(1)),
    )
    images = np.random.default_rng(0).random((6, 4, 3, 1)).astype(np.float32)
    labels = np.array([0, 1, 2, 0, 1, 1])
    margin = np.array([0.75, 0.25, 0.5, -0.5, -np.inf, -2.0])
    fields = dict(
        certified=margin > 0,
        predicted=np.array([0, 1, 2, 0, 1, 2]),
        correct=np.array([True] * 5 + [False]),
        margin=margin,
        allowance=np.full(6, 1e-6),
        lipschitz=np.array([2.0, 3.0, 4.0, 5.0, np.inf, 7.0]),
        norms=np.ones((6, 1)),
        constant=np.array([[0.2], [0.4], [0.0], [0.2], [0.0], [0.2]]),
        stable=np.array([[0.4], [0.2], [0.6], [0.0], [0.0], [0.3]]),
        epsilon=0.25,
        mode="local",
        tier="probabilistic",
        failure_probability=1e-6,
        seed=9,
        seed_from="given",
        arithmetic="float32",
        precision="float64",
    )
    return lipjax.Certificate(**{**fields, **change}), network, images, labels


def test_the_page_of_a_certificate_in_memory_says_what_it_holds_and_what_is_not_known(tmp_path):
    certificate, network, images, labels = in_memory()
    path = tmp_path / "page.html"
    evil = "<script>alert(1)</script>"
    certificate.report(path, network, images, labels, title=evil, data={"name": "mine"})
    text = path.read_text()
    page = Page(text)
    asks_for_nothing(page, text)
    assert page.text.count(evil) == 2 and [p.name for p in tmp_path.iterdir()] == ["page.html"]

    wanted = {
        **{"verdicts.proved": 3, "verdicts.undecided": 2, "verdicts.wrong": 1},
        **{"clean_accuracy": 5 / 6, "modes.local.certified_accuracy": 3 / 6},
        **{"modes.local.median_lipschitz": 4.0, "margins.median": 0.375},
        # Of the five images that were examined.
        **{"modes.local.constant_share.0": 0.2, "modes.local.stable_share.0": 0.3},
    }
    for label, right, proved in ((0, 1, 1 / 2), (1, 2 / 3, 1 / 3), (2, 1, 1)):
        wanted[f"class.{label}.images"] = np.sum(labels == label)
        wanted |= {f"class.{label}.clean": right, f"class.{label}.certified": proved}
    for i, row in enumerate((0, 2, 1, 3, 4, 5)):
        wanted[f"gallery.{i}.radius"] = 0.25 if certificate.certified[row] else 0.0
    found = {key: value for key, (value, _) in page.numbers.items()}
    assert found == pytest.approx(wanted)

    assert "50.00 % of 6 given images of mine are proved safe" in page.text
    assert page.text.count("no attack was run") == 2 and "lipjax.certified_radius" in page.text
    assert not re.search(r"PGD|adversarial image is|\b(nan|inf|None)\b|--nocurve", page.text)
    for words in ("seed 9, given", "probabilistic", "1 · ReLU, 5", "executed in float32"):
        assert words in page.text
    files = lipjax.formats.certificate_files
    assert files.data_hash(images, labels) in text
    assert files.network_hash(files.describe(network, images[0], arithmetic="float32")) in text


def test_the_page_of_a_certificate_alone_leaves_out_what_needs_network_images_or_labels(tmp_path):
    certificate, _, images, _ = in_memory(tier="deterministic", failure_probability=0.0)
    certificate.report(tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert not [key for key in page.numbers if key.startswith(("class.", "gallery."))]
    assert page.numbers["verdicts.wrong"][0] == 1 and "not given to this page" in page.text
    assert "labels of what was predicted wrong were not given" in page.text
    certificate.report(tmp_path / "page.html", images=images)
    page = Page((tmp_path / "page.html").read_text())
    assert page.text.count("class not given") == 1 and "class -1" not in page.text
    certificate.report(tmp_path / "page.html", images=images.reshape(6, 12))  # no pictures
    assert "<img" not in (tmp_path / "page.html").read_text()


def radii_in_memory():
    """The radii of the images of `in_memory`."""
    certificate, network, images, labels = in_memory()
    fields = vars(certificate).copy()
    for name in ("certified", "constant", "stable", "epsilon", "slopes_of", "slopes", "stages"):
        del fields[name]
    radius = np.array([0.5, 0.25, 0.125, 0.0, 0.375, 0.0])
    return lipjax.CertifiedRadius(radius=radius, **fields), network, images, labels


def test_a_page_of_radii_says_what_is_certified_at_an_epsilon_and_nothing_of_other_balls(tmp_path):
    found, network, images, labels = radii_in_memory()
    path = tmp_path / "page.html"
    for number, certified in ((0.25, 3), (0.5, 1), (1e-9, 4), (0.6, 0)):
        found.report(path, network, images, labels, epsilon=number)
        page = Page(path.read_text())
        assert page.numbers["verdicts.proved"][0] == certified
        assert page.numbers["modes.local.certified_accuracy"][0] == certified / 6
        assert page.numbers["radii.none"][0] == 2 and page.numbers["radii.largest"][0] == 0.5
        assert not [key for key in page.numbers if "lipschitz" in key or "_share" in key]
        radii = sorted(v for key, (v, _) in page.numbers.items() if key.endswith(".radius"))
        assert radii == sorted(found.radius)
        assert "no attack was run" in page.text and "attacks below" not in page.text
    found.report(path, epsilon=0.25)  # without what was certified
    for of, given in ((found, {}), (found, {"epsilon": 0.0}), (in_memory()[0], {"epsilon": 0.25})):
        with pytest.raises(ValueError, match="needs epsilon > 0"):
            of.report(path, network, images, labels, **given)


def test_what_each_stage_came_to_is_on_the_page(tmp_path):
    def run(name, passes, tried, certified, seconds):
        return StageRun(
            name=name,
            passes=passes,
            images=np.arange(tried),
            certified=np.arange(certified),
            seconds=seconds,
        )

    stages = (run("local", 3, 6, 2, 0.5), run("tight", 12, 4, 1, 1.25))
    certificate, *given = in_memory(stages=stages, mode="auto")
    certificate.report(tmp_path / "page.html", *given)
    page = Page((tmp_path / "page.html").read_text())
    found = {key: v for key, (v, _) in page.numbers.items() if ".stages." in key}
    wanted = {
        f"modes.auto.stages.{i}.{name}": value
        for i, stage in enumerate(stages)
        for name, value in stage.counted().items()
        if name != "name"
    }
    assert found == wanted and found["modes.auto.stages.1.images"] == 4
    assert "Stage by stage: “auto”" in page.text and "tight" in page.text
    # summary.json has them by the same names.
    verdicts = SimpleNamespace(
        certificates={"auto": certificate},
        examined={"auto": certificate.correct},
        certified={"auto": certificate.certified},
    )
    assert certify.figures_of_mode(verdicts, "auto")["stages"] == [s.counted() for s in stages]


def test_a_page_of_another_network_images_or_labels_is_refused_and_the_old_one_stays(tmp_path):
    certificate, network, images, labels = in_memory()
    deeper = nnx.Sequential(*network.layers, lipjax.ReLU())
    (tmp_path / "page.html").write_text("old")
    for given, said in (
        ((network, images, labels[::-1]), "pass the labels that certify was given"),
        ((network, images[:5], labels), "of 6 images, got 5"),
        ((None, None, labels[:5]), r"of 6 images, got labels \(5,\)"),
        ((deeper, images, labels), "has 2 activations, and the certificate is of one with 1"),
        ((network,), "give the images too"),
    ):
        with pytest.raises(ValueError, match=said):
            certificate.report(tmp_path / "page.html", *given)
    with pytest.raises(TypeError, match=r"certified_radius returns, got a dict"):
        report.write(tmp_path / "page.html", {})
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("page.html", "old")]
    # A folder that is not there is known before anything is traced.
    with pytest.raises(OSError, match="nowhere"):
        certificate.report(tmp_path / "nowhere" / "page.html", lambda x: 1 / 0, images, labels)


# -------------------------------------------------------------------------------------- the browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Runs headless Chromium; skips where there is none."""
    program = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if program is None:
        pytest.skip("no chromium or google-chrome on PATH: the page was not opened in a browser")
    home = tmp_path_factory.mktemp("browser")
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ]
    flags += [f"--user-data-dir={home}", "--enable-logging=stderr", "--virtual-time-budget=1000"]

    def run(page, *more):
        done = subprocess.run(
            [program, *flags, *more, f"file://{page}"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return run


def test_a_browser_shows_the_page_and_has_nothing_to_complain_of(tmp_path, browser):
    certification(tmp_path)
    page, screen = report.build(tmp_path), tmp_path / "screen.png"
    _, complaints = browser(page, f"--screenshot={screen}", "--window-size=1200,1500")
    assert complaints == []
    with Image.open(screen) as picture:
        pixels = np.asarray(picture.convert("RGB"), int)
    assert pixels.shape == (1500, 1200, 3)
    for third in np.array_split(pixels, 3):  # none of them is blank
        assert len(np.unique(third.reshape(-1, 3), axis=0)) > 30
    proved, attacked = np.array([0, 104, 168]), np.array([201, 79, 0])
    for color in (proved, attacked):
        assert np.sum(np.all(np.abs(pixels - color) <= 2, axis=-1)) > 2000
    # One that tries to load something is stopped by its own policy, and the console tells.
    text = page.read_text()
    page.write_text(text.replace("</footer>", "</footer><img src='http://127.0.0.1:9/x.png'>"))
    shown, complaints = browser(page, "--dump-dom")
    assert any("Content Security Policy" in line for line in complaints)
    assert "are proved safe" in "".join(Loose(shown).texts)


class Loose(Page):
    """What a browser writes need not be what we would."""

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass


# ------------------------------------------------------------------------------- what it is made of


@functools.cache
def certified_net():
    """A small net, images, labels, a certificate and certified radii, all proofs deterministic."""
    rngs, bias = nnx.Rngs(0), jax.nn.initializers.normal(0.3)
    net = nnx.Sequential(
        lipjax.Flatten(),
        nnx.Linear(16, 6, rngs=rngs, bias_init=bias),
        lipjax.ClippedReLU(6, threshold=0.5),
        nnx.Linear(6, 3, rngs=rngs, bias_init=bias),
    )
    images = np.random.default_rng(0).random((12, 4, 4, 1)).astype(np.float32)
    labels = np.argmax(np.array(jax.vmap(net)(images)), axis=1)
    labels[0] = (labels[0] + 1) % 3
    certificate = lipjax.certify(net, images, labels, 0.2, tier="deterministic")
    radii = lipjax.certified_radius(net, images, labels, tier="deterministic").radius
    return (
        net,
        images,
        labels,
        certificate,
        np.where(certificate.certified, np.maximum(radii, 0.2), radii),
    )


def test_gallery_examples_change_the_class_at_their_distance_and_never_within_the_radius():
    net, images, labels, certificate, radii = certified_net()
    broken = ~certificate.certified & (np.arange(12) % 2 == 0)
    columns = {
        **{
            "predicted": certificate.predicted,
            "label": labels,
            "broken_by_pgd": broken,
            "certified_radius": radii,
        },
        **{"certified_local": certificate.certified, "margin_local": certificate.margin},
    }
    chosen = report.select(columns, "local", ["local"])
    found = report.gallery(net, images, labels, chosen, seed=1, steps=30, restarts=2)
    rows = [row for _, row in chosen]
    assert len(rows) == len(set(rows)) >= 2 * report.SHOWN and found["row"].tolist() == rows
    checked = 0
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(found["image"][i], images[row])
        distance = np.sqrt(np.sum((found["adversarial"][i].astype(float) - images[row]) ** 2))
        assert found["distance"][i] == pytest.approx(distance, abs=1e-12)
        logits = np.asarray(net(found["adversarial"][i]))
        if np.isfinite(found["distance"][i]):
            assert (
                logits[labels[row]]
                <= logits[found["became"][i]]
                == max(np.delete(logits, labels[row]))
            )
            assert found["distance"][i] > radii[row] or labels[row] != certificate.predicted[row]
            checked += 1
    assert checked > 6
    wrong = rows.index(0)
    assert found["distance"][wrong] == 0 and radii[0] == 0 and found["group"][wrong] == "open"


def test_the_gallery_takes_the_extremes_of_the_radii_and_no_image_twice():
    for count in (1, 2, 5, 9, 30):
        rng = np.random.default_rng(count)
        radii = rng.permutation(np.arange(count)) / count
        columns = {
            **{"predicted": np.zeros(count), "label": np.zeros(count), "certified_radius": radii},
            **{"broken_by_pgd": radii < 0.2, "certified_local": radii >= 0.5},
        }
        chosen = report.select(columns, "local", ["local"])
        groups = {group: [radii[row] for g, row in chosen if g == group] for group in report.GROUPS}
        falling = sorted(radii[radii > 0], reverse=True)
        assert len({row for _, row in chosen}) == len(chosen)
        assert groups["largest"] == falling[: report.SHOWN]
        assert groups["smallest"] == falling[report.SHOWN :][::-1][: report.SHOWN]
        assert all(radius < 0.5 for radius in groups["open"])


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_stable_neurons_are_those_that_pass_one_input_on_at_every_corner_of_the_box(kind):
    rng = np.random.default_rng(0)
    size, half = 12, 6
    layer = make_activation(kind, (size,), 0.4)
    rule = trace(layer, np.zeros(size, np.float32)).nodes[-1].rule
    seen = set()
    for _ in range(20):
        ends = np.sort(
            rng.choice([-0.8, -0.4, -0.1, 0.0, 0.2, 0.4, 0.9], (2, size)), axis=0
        ).astype(np.float32)
        found = np.asarray(rule.stable(*map(jnp.asarray, ends)))
        for j in range(size):
            inputs = [j] if "relu" in kind else [j % half, j % half + half]
            outputs, same = set(), dict.fromkeys(inputs, True)
            for corner in range(2 ** len(inputs)):
                z = ends[0].copy()
                for bit, k in enumerate(inputs):
                    z[k] = ends[corner >> bit & 1, k]
                out = float(np.asarray(layer(z))[j])
                outputs.add(out)
                same = {k: kept and out == z[k] for k, kept in same.items()}
            if len(outputs) > 1:  # else it is constant, and not counted as stable
                assert found[j] == any(same.values()), (ends[:, inputs], j)
                seen.add(bool(found[j]))
    assert seen == {True, False}


def test_shares_of_constant_and_stable_neurons_are_those_of_a_count_neuron_by_neuron():
    net, images, _, certificate, _ = certified_net()
    weights, bias = (np.asarray(a[...], float) for a in (net.layers[1].kernel, net.layers[1].bias))
    assert certificate.constant.shape == certificate.stable.shape == (12, 1)
    for i, image in enumerate(images):
        constant = stable = 0
        for j in range(6):
            z = image.reshape(-1).astype(float) @ weights[:, j] + bias[j]
            low, high = (
                z - 0.2 * np.linalg.norm(weights[:, j]),
                z + 0.2 * np.linalg.norm(weights[:, j]),
            )
            constant += high <= 0 or low >= 0.5
            stable += low >= 0 and high <= 0.5
        assert certificate.constant[i, 0] == pytest.approx(constant / 6)
        assert certificate.stable[i, 0] == pytest.approx(stable / 6)
    assert 0 < np.mean(certificate.constant) < 1 and 0 < np.mean(certificate.stable) < 1


def test_activations_are_listed_with_kind_and_shape_also_within_a_residual():
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(
        nnx.Conv(1, 4, (3, 3), padding=1, rngs=rngs),
        lipjax.Residual(nnx.Conv(4, 4, (3, 3), padding=1, rngs=rngs), lipjax.MaxMin()),
        lipjax.Flatten(),
        nnx.Linear(64, 6, rngs=rngs),
        lipjax.ReLU(),
        nnx.Linear(6, 3, rngs=rngs),
    )
    wanted = [{"kind": "MaxMin", "shape": [4, 4, 4]}, {"kind": "ReLU", "shape": [6]}]
    assert report.activation_layers(net, (4, 4, 1)) == wanted


# ------------------------------------------------------------------------------- curves of training


def line(epoch, **more):
    return {
        **{
            "step": 10 * epoch,
            "epoch": epoch,
            "tier": "estimate",
            "seed": 3,
            "validation_epsilon": 0.5,
        },
        **{
            "loss": 1 / epoch,
            "accuracy": 0.5,
            "epsilon": 0.1 * epoch,
            "kappa": 0.5,
            "learning_rate": 1e-3,
            **more,
        },
    }


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


def test_curves_take_no_more_than_their_share_of_the_time_and_are_drawn_at_the_end(
    tmp_path, monkeypatch
):
    clock, drawn = Clock(), []

    def draw(path, lines):
        drawn.append(len(lines))
        clock.now += 1

    monkeypatch.setattr(reporting, "time", clock)
    monkeypatch.setattr(reporting, "plot_metrics", draw)
    metrics = reporting.Metrics(tmp_path / "metrics.jsonl", after_step=0)
    with reporting.Curves(tmp_path / "curves.png", metrics.path, share=0.02) as curves:
        for epoch in range(1, 61):
            metrics.write(**line(epoch))
            clock.now += 10
            curves.refresh()
            assert len(drawn) <= 0.02 * (clock.now - 100)
        assert len(drawn) > 5
        metrics.write(**line(61))
    assert drawn[-1] == 61
    with reporting.Curves(tmp_path / "curves.png", metrics.path):
        pass  # nothing new but the file of an earlier start, which has no picture yet
    with pytest.raises(KeyboardInterrupt), reporting.Curves(tmp_path / "curves.png", metrics.path):
        raise KeyboardInterrupt  # ends at once
    assert drawn[-2:] == [61, 61] and drawn.count(61) == 2


def test_the_picture_has_what_the_lines_hold_and_calls_an_estimate_an_estimate(
    tmp_path, monkeypatch
):
    from matplotlib.figure import Figure

    kept, save = {}, Figure.savefig

    def keep(figure, *arguments, **options):
        for axes in figure.axes:
            kept.update(
                {
                    str(curve.get_label()): np.stack(curve.get_data()).T.tolist()
                    for curve in axes.lines
                }
            )
        kept["title"] = figure.get_suptitle()
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    evaluated = {"validation_accuracy": 0.75, "validation_robust_accuracy_estimate": 0.25}
    reporting.plot_metrics(tmp_path / "c.png", [line(1), line(2, loss=None, **evaluated), line(3)])
    assert kept.pop("title") == "after epoch 3: tier estimate, seed 3"
    (estimated,) = [label for label, points in kept.items() if points == [[2, 0.25]]]
    assert "an estimate, no certificate" in estimated and "ε = 0.5" in estimated
    assert (
        [[1, 1.0], [3, 1 / 3]] in kept.values() and [[2, 0.75]] in kept.values() and len(kept) == 7
    )
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.size == (1100, 715)
    assert not list(tmp_path.glob("*.tmp"))


def events(folder) -> list[tuple[str, int, float]]:
    """Tag, step and value of each scalar in the event files of a folder."""
    event_pb2 = pytest.importorskip(
        "tensorboardX.proto.event_pb2", reason="tensorboardX is not installed"
    )
    found = []
    for path in folder.iterdir():
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            (length,) = struct.unpack_from("<Q", raw, at)
            event = event_pb2.Event.FromString(raw[at + 12 : at + 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            at += length + 16
    return found


def test_tensorboard_has_each_step_once_also_when_a_run_is_continued(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    with reporting.TensorBoard(tmp_path, []) as board:
        for epoch in (1, 2, 3):
            board.write(line(epoch, loss=float(epoch)))
    # after a kill that undid two epochs
    with reporting.TensorBoard(tmp_path, [line(1, loss=1.0)]) as board:
        board.write(line(2, loss=5.0))
    losses = [
        (step, value) for tag, step, value in events(tmp_path) if tag == "estimate_seed_3/loss"
    ]
    assert losses == [(10, 1.0), (20, 5.0)]
    assert {tag.split("/")[0] for tag, _, _ in events(tmp_path)} == {"estimate_seed_3"}


def test_without_tensorboardx_the_flag_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(
        ValueError, match=r"needs the package tensorboardX: pip install tensorboardX"
    ):
        reporting.tensorboard_writer()
