"""What people read of a run: metrics files, progress, the table, the per-image files and the
picture."""

import csv
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest

from lipjax.training import metrics as reporting
from lipjax.training.metrics import Metrics, Progress, read_metrics

RUN = {
    "tier": "probabilistic",
    "failure_probability": 1e-6,
    "epsilon": 0.5,
    "data": "digits",
    "split": "test",
    "examples": 4,
    "seed": 7,
    "training_seed": 3,
    "precision": "float64",
    "arithmetic": "float32",
    "pgd_steps": 20,
    "pgd_restarts": 2,
    "curve_mode": "local",
    "note": "",
}


def summary(**run):
    row = {"certified_accuracy": 0.25, "median_lipschitz": 12.3456, "constant_share": [0.5, 0.125]}
    modes = {mode: row for mode in ("global", "paper", "local")}
    return {"run": {**RUN, **run}, "clean_accuracy": 0.975, "pgd_accuracy": 0.5, "modes": modes}


# ------------------------------------------------------------------------------------------ metrics


def test_metrics_of_undone_work_and_cut_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    Metrics(path, after_step=2).write(step=3, loss=np.float32(0.5), bad=float("nan"))
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5, "bad": None}]


def test_a_metrics_file_cut_at_any_byte_reads_as_its_complete_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    lines = [{"step": 10, "loss": 1.5, "note": "ε"}, {"step": 20, "loss": None}, {"step": 30}]
    metrics = Metrics(path, after_step=0)
    for line in lines:
        metrics.write(**line)
    whole = path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        # A line whose newline alone is missing is complete.
        assert read_metrics(path) == lines[: sum(end <= size for end in ends)]


def test_metrics_are_plain_json_whatever_kind_of_number_is_given(tmp_path):
    path = tmp_path / "metrics.jsonl"
    Metrics(path, after_step=0).write(
        whole=np.int32(3),
        jax=jnp.float32(0.25),
        infinite=-np.inf,
        flag=np.bool_(True),
        nested={"a": [np.float64("nan")]},
    )
    expected = {"whole": 3, "jax": 0.25, "infinite": None, "flag": True, "nested": {"a": [None]}}
    assert json.loads(path.read_text()) == expected


# ----------------------------------------------------------------------------------------- progress


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


def test_progress_in_a_log_is_a_quiet_line_with_an_honest_time_left(monkeypatch):
    clock, log = Clock(), io.StringIO()
    monkeypatch.setattr(reporting, "time", clock)
    with Progress(100, "training", start=40, stream=log, quiet_seconds=15) as progress:
        clock.now += 5
        progress.update(45, loss="0.5")
        assert log.getvalue() == ""
        clock.now += 15
        progress.update(50, loss="0.4")
        # 15 s for 5 steps: what came before the first sign of life does not come again, and the 40
        # steps of an earlier start say nothing. So 50 more take 150 s.
        assert log.getvalue() == "training: 50 %, 2 min 30 s left; loss 0.4\n"
        clock.now += 1
        progress.update(100, loss="0.1")
        assert log.getvalue().splitlines()[1] == "training: 100 %, 0 s left; loss 0.1"


def test_what_is_compiled_once_does_not_count_in_the_time_left(monkeypatch):
    """The first evaluation, which compiles, takes as long here as 50 steps, later ones as one."""
    clock, log = Clock(), io.StringIO()
    monkeypatch.setattr(reporting, "time", clock)
    with Progress(100, "training", stream=log, quiet_seconds=1) as progress:
        progress.update(1)
        for done, seconds in ((2, 50), (3, 1)):
            clock.now += 1
            progress.update(done)
            with progress.once("evaluation"):
                clock.now += seconds
        # 96 steps by 3 s and one evaluation for 3 steps, the first evaluation left out.
        clock.now += 1
        progress.update(4)
    assert log.getvalue().splitlines()[-1] == "training: 4 %, 2 min 8 s left"


def test_progress_on_a_terminal_is_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    with Progress(10, "certifying", stream=screen) as progress:
        progress.update(10, certified="7")
    assert (
        "certifying" in screen.getvalue()
        and "100%" in screen.getvalue()
        and "certified 7" in screen.getvalue()
    )


@pytest.mark.parametrize(
    "seconds, shown",
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599.7, "1 h 0 min"), (90061, "25 h 1 min")],
)
def test_durations_are_rounded_before_they_are_split(seconds, shown):
    assert reporting.duration(seconds) == shown


# ------------------------------------------------------------------------------------- certificates


def print_to_text(found):
    out = io.StringIO()
    reporting.print_table(found, out)
    return out.getvalue()


def test_the_table_names_tier_failure_probability_epsilon_and_seeds():
    text = print_to_text(summary(note="20 images are not exact copies"))
    for shown in (
        "digits",
        "test split",
        "4 images",
        "epsilon 0.5",
        "training seed 3",
        "97.50 %",
        "50.00 %",
        "25.00 %",
    ):
        assert shown in text
    assert "tier probabilistic" in text and "1 - 1e-06" in text and "seed 7" in text
    assert "PGD: 20 steps, 2 restarts, an upper bound" in text
    assert "note: 20 images are not exact copies" in text
    assert "note:" not in print_to_text(summary())


def test_the_summary_is_json_without_nan(tmp_path):
    found = summary()
    found["modes"]["local"] = {**found["modes"]["local"], "median_lipschitz": np.float64("inf")}
    reporting.write_summary(tmp_path / "summary.json", found)
    text = (tmp_path / "summary.json").read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    stored = json.loads(text, parse_constant=refuse)
    assert stored["modes"]["local"]["median_lipschitz"] is None and stored["run"] == RUN


def test_per_image_files_hold_the_same_values_and_say_what_they_are(tmp_path):
    columns = {
        "index": np.array([4, 0, 9]),
        "certified_local": np.array([True, False, True]),
        "certified_radius": np.array([0.1 + 0.2, 0.0, np.inf]),
    }
    reporting.write_examples(tmp_path, RUN, columns)
    stored = np.load(tmp_path / "examples.npz")
    assert json.loads(str(stored["run"])) == RUN
    with open(tmp_path / "examples.csv") as file:
        comment = file.readline()
        rows = list(csv.DictReader(file))
    for fact in (
        "tier=probabilistic",
        "failure_probability=1e-06",
        "epsilon=0.5",
        "data=digits",
        "training_seed=3",
    ):
        assert fact in comment
    assert len(rows) == 3
    for name, wanted in columns.items():
        np.testing.assert_array_equal(stored[name], wanted)
        read = [row[name] == "True" if wanted.dtype == bool else float(row[name]) for row in rows]
        np.testing.assert_array_equal(read, wanted)


def test_the_curve_is_the_share_of_radii_that_reach_epsilon_and_lies_below_pgd(
    tmp_path, monkeypatch
):
    from matplotlib.figure import Figure

    drawn = {}
    save = Figure.savefig

    def keep(figure, path, **options):
        (axes,) = figure.axes
        drawn.update({line.get_label(): np.stack(line.get_data()) for line in axes.lines})
        drawn["title"] = axes.get_title()
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    radii = np.array([0.0, 0.2, 0.2, 0.6])
    pgd = {0.0: 1.0, 0.5: 0.75, 0.8: 0.5}
    reporting.plot_curve(tmp_path / "curve.png", RUN, radii, pgd, {"global": 0.0, "local": 0.25})
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    (label,) = [name for name in drawn if name.startswith("certified, local")]
    assert "probabilistic" in label and "δ = 1e-06" in label
    epsilons, shares = drawn[label]
    assert epsilons[0] == 0 and epsilons[-1] == 0.8
    np.testing.assert_array_equal(shares, [np.mean((radii >= e) & (radii > 0)) for e in epsilons])
    np.testing.assert_array_equal(drawn["PGD (upper bound)"], [[0, 0.5, 0.8], [1, 0.75, 0.5]])
    np.testing.assert_array_equal(drawn["certified at ε, local: 25.0 %"].ravel(), [0.5, 0.25])
    assert "digits" in drawn["title"] and "training seed 3" in drawn["title"]
