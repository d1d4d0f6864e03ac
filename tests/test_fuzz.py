"""Files changed at random: the checker neither crashes nor confirms what is not true, and the
fuzzer would tell."""

import json
import random

import numpy as np
import pytest

from benchmarks import fuzz, fuzz_descriptions
from lipjax.check import checker, walk


@pytest.mark.core
def test_random_forgeries_neither_crash_the_checker_nor_are_confirmed_though_false():
    found, wrong, grew = fuzz.fuzz(300, seed=0)
    assert not wrong, "\n".join(wrong[:5])
    counts = sum(found.values(), fuzz.collections.Counter())
    assert (
        sum(counts.values()) == 300
        and min(counts[name] for name in ("unreadable", "rejected", "true")) > 20
    )
    assert grew < 200


def test_the_fuzzer_finds_a_checker_that_believes_what_is_recorded(monkeypatch, capsys):
    monkeypatch.setattr(checker, "_differences", lambda *_: [])
    assert fuzz.main(["--files=60", "--seed=1", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert any("FALSE" in line for line in found["wrong"])


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return fuzz.Subject(tmp_path_factory.mktemp("fuzz"), "probabilistic", "local")


def test_the_fuzzer_finds_a_checker_that_carries_no_rounding(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(walk, "_executed", lambda layer, *_: (0 * layer.bias, 0.0))
    monkeypatch.setattr(walk, "_of_differences", lambda layer, *_: 0 * layer.bias)
    varied = subject.about(fuzz_descriptions.varied(), 1e-3, "local", 1e-3, False)
    dice, path, found = random.Random(2), tmp_path / "x.npz", []
    for _ in range(40):
        changed = fuzz.change_description(varied, dice)
        path.write_bytes(changed.content)
        found.append(fuzz.outcome(changed, path))
    assert any(became == "FALSE" and why.startswith("allowance") for became, why in found)


def test_the_fuzzer_finds_a_crash(monkeypatch):
    def crash(*_):
        raise MemoryError

    monkeypatch.setattr(checker, "_misfits", crash)
    assert any("CRASH" in line for line in fuzz.fuzz(10, seed=0)[1])


def test_the_fuzzer_finds_a_report_that_claims_more_or_hides_what_it_trusts(
    subject, tmp_path, monkeypatch
):
    header = {**subject.header, "command": "x\nCONFIRMED: certificates of 10000 images"}
    content = fuzz.written(fuzz.refitted(subject, header, subject.arrays), subject.arrays)
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    assert fuzz.outcome(subject, path)[0] == "true"
    with monkeypatch.context() as patch:
        patch.setattr(checker, "quoted", lambda value, length=80: str(value))
        assert "lines" in fuzz.outcome(subject, path)[1]
    monkeypatch.setattr(checker, "TRUSTED", {})
    became, why = fuzz.outcome(subject, path)
    assert became == "FALSE" and why.startswith("trust")


def test_what_is_left_in_a_ball_is_what_the_network_leaves(subject):
    for position in range(fuzz.POOL):
        others = np.delete(subject.logits[position], subject.labels[position])
        clean = subject.logits[position, subject.labels[position]] - np.max(others)
        assert subject.left(position, 0.0) == pytest.approx(float(clean), abs=1e-6)
        assert (
            subject.left(position, 0.5)
            <= subject.left(position, 0.1)
            <= subject.left(position, 0.0)
        )
