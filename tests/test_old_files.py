"""Certificate files of format versions 1 and 2, which describe a network by its layers.

The files were written by version 0.2.0.
"""

from pathlib import Path

import numpy as np
import pytest

import lipjax
from lipjax import storage
from lipjax.check import checker
from lipjax.check.layers import of_stored
from lipjax.formats import certificate_files

FILES = Path(__file__).parent / "files"
# Layers of every kind; and how the command finds what each file is about.
EVERY = [f"--network={FILES / 'layers.safetensors'}", f"--images={FILES / 'layers_images.npz'}"]
SUBJECTS = {
    "layers_v1": ["--network=digits-maxmin"],
    "layers_v2": ["--network=digits-maxmin"],
    "layers_every": EVERY,
}


@pytest.mark.parametrize("name", list(SUBJECTS))
def test_stored_files_are_confirmed(name, capsys):
    assert checker.main([str(FILES / f"{name}.npz"), *SUBJECTS[name], "--seed=0"]) == 0
    assert "CONFIRMED" in capsys.readouterr().out


def opened():
    """Of the network of every kind of layer: its layers, images, labels and file."""
    header, arrays = certificate_files.load(FILES / "layers_every.npz")
    with np.load(FILES / "layers_images.npz") as held:
        images, labels = held["images"], held["labels"]
    network = lipjax.load(FILES / "layers.safetensors")
    return of_stored(*storage.layers_of(network)), images, labels, header, arrays


def report_of(layers, images, labels, header, arrays):
    header["network"] = certificate_files.network_hash(layers)
    header["digest"] = certificate_files.digest(header, arrays)
    return checker.check(layers, images, labels, header, arrays, np.random.default_rng(0))


def test_a_forged_file_of_layers_is_rejected():
    layers, *rest = opened()
    report = report_of([*layers[:-1], {**layers[-1], "bias": -layers[-1]["bias"]}], *rest)
    assert any("(row " in problem for problem in report.problems), report
    layers, images, labels, header, arrays = opened()
    arrays["margin"] += 0.05
    report = report_of(layers, images, labels, header, arrays)
    assert any("recorded margin" in problem for problem in report.problems), report


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("linear", {"dtype": "bfloat16"}, r"layer \d+, linear, computes in bfloat16"),
        ("conv", {"precision": "BF16_BF16_F32"}, "BF16_BF16_F32"),
        ("clipped_relu", {"threshold": np.full((4, 4, 4), 0.1)}, "float64 numbers as threshold"),
    ],
)
def test_layers_that_round_more_than_the_file_says_are_refused(kind, fields, said):
    layers, *rest = opened()
    place = [layer["kind"] for layer in layers].index(kind)
    layers[place] = {**layers[place], **fields}
    with pytest.raises(checker.CannotCheck, match=said):
        report_of(layers, *rest)
