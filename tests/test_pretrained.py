"""Networks that come with lipjax are what their cards say, and a network from a file is certified
and checked as a run is."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run_lipjax

import lipjax
from lipjax import pretrained, storage
from lipjax.cli import entry, networks
from lipjax.data import sets


@pytest.mark.parametrize("name", pretrained.names())
def test_a_card_says_all_that_a_figure_needs(name):
    card = pretrained.card(name)
    network = lipjax.load(name)
    shape = tuple(card["input_shape"])
    assert storage.description(pretrained.path(name))["input_shape"] == shape
    assert network(np.zeros((1, *shape), np.float32)).shape == (1, card["classes"])
    assert (
        card["command"].startswith("python train.py")
        and isinstance(card["seed"], int)
        and card["epoch"] > 0
    )
    for result in card["results"]:
        for fact in ("tier", "epsilon", "split", "seed", "examples", "arithmetic", "command"):
            assert result[fact] is not None, fact
        assert result["tier"] in ("probabilistic", "deterministic")
        shares = result["certified_accuracy"].values()
        assert all(
            0 < share <= result["pgd_accuracy"] <= result["clean_accuracy"] <= 1 for share in shares
        )
        said = pretrained.described(result)
        assert (
            f"epsilon {result['epsilon']:g}" in said
            and f"tier {result['tier']}" in said
            and "seed" in said
        )
        # With that seed of 0.2.0, which was public, a certificate is one for a friendly network.
        assert result["seed"] != 0 or "seed, 0, which was public" in said
    assert name in pretrained.listed()
    page = (pretrained._FOLDER / f"{name}.html").read_text()
    assert f"{100 * card['results'][0]['clean_accuracy']:.2f} %" in page and len(page) < 300_000


def test_the_shipped_digits_network_is_as_accurate_and_as_certified_as_its_card_says():
    card, network = pretrained.card("digits-maxmin"), lipjax.load("digits-maxmin")
    test = sets.load("digits").test
    images = test.unit_images(slice(None))
    (result,) = card["results"]
    correct = np.argmax(network(images), axis=-1) == test.labels
    assert np.mean(correct) == pytest.approx(result["clean_accuracy"], abs=1e-12)
    found = lipjax.certify(
        network, images, test.labels, result["epsilon"], mode="global", arithmetic="float32"
    )
    # Other draws than the card's, whose norms are within a percent: a few images may be decided
    # differently.
    assert np.mean(found.certified) == pytest.approx(
        result["certified_accuracy"]["global"], abs=0.01
    )


def test_a_changed_file_of_a_shipped_network_is_refused(monkeypatch, tmp_path):
    for suffix in ("json", "safetensors"):
        (tmp_path / f"digits-maxmin.{suffix}").write_bytes(
            (pretrained._FOLDER / f"digits-maxmin.{suffix}").read_bytes()
        )
    monkeypatch.setattr(pretrained, "_FOLDER", tmp_path)
    lipjax.load("digits-maxmin")
    content = bytearray((tmp_path / "digits-maxmin.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "digits-maxmin.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="not the file that its card describes"):
        lipjax.load("digits-maxmin")


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(ValueError, match=r"digits-maxmn.*Did you mean 'digits-maxmin'"):
        lipjax.load("digits-maxmn")
    with pytest.raises(ValueError, match=r"nowhere\.safetensors"):
        lipjax.load("nowhere.safetensors")


def test_importing_and_loading_touch_no_network():
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise RuntimeError('a connection was tried')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import lipjax; lipjax.load('digits-maxmin')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_a_network_and_data_that_do_not_fit_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    for classes, shape in ((3, (8, 8, 1)), (10, (9, 9, 1))):
        arrays = {"images": rng.random((6, *shape), np.float32), "labels": np.arange(6) % classes}
        np.savez(
            tmp_path / "train.npz", images=rng.random((30, *shape)), labels=np.arange(30) % classes
        )
        np.savez(tmp_path / "test.npz", **arrays)
        said = "10 logits" if shape == (8, 8, 1) else r"\(8, 8, 1\).*\(9, 9, 1\)"
        with pytest.raises(ValueError, match=said):
            networks.of_network("digits-maxmin", f"npz:{tmp_path}/train.npz,{tmp_path}/test.npz")


def test_a_file_is_certified_and_checked_without_a_run(tmp_path, capsys):
    file, folder = tmp_path / "own.safetensors", tmp_path / "run"
    assert entry.main(["export", "digits-maxmin", f"--out={file}"]) == 0
    source = [f"--network={file}", "--data=digits"]
    quick = [
        "--examples=12",
        "--modes=global",
        "--nocurve",
        "--pgd_steps=5",
        "--pgd_restarts=1",
        f"--workdir={folder}",
    ]
    assert "--network needs --epsilon" in run_lipjax("certify", *source, *quick, code=1)
    assert "divide one that is meant for pixels in [0, 255]" in run_lipjax(
        "certify", *source, *quick, "--epsilon=40", code=1
    )
    said = run_lipjax("certify", *source, *quick, "--epsilon=0.25")
    assert "epsilon 0.25" in said and "training seed 0" in said
    summary = json.loads((folder / "certification" / "summary.json").read_text())
    assert (
        summary["run"]["data"] == "digits"
        and summary["run"]["trained_with"] == "mode local, loss bcp"
    )
    assert summary["modes"]["global"]["certified_accuracy"] > 0.5
    assert f"--network={file}" in summary["commands"]["check"][0]
    capsys.readouterr()
    certificate = str(folder / "certification" / "certificate.npz")
    assert entry.main(["check", certificate, f"--network={file}"]) == 0
    assert "CONFIRMED" in capsys.readouterr().out
    assert entry.main(["report", str(folder)]) == 0
