"""Work is never lost: what can fail is looked at first, what is proved is written at once, and a
reader that goes away, a full disk or a missing home ends nothing."""

import importlib
import io
import json
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

import lipjax
from lipjax import training
from lipjax.certificates import batches
from lipjax.cli import certify, common, networks, train
from lipjax.data import sets
from lipjax.formats import certificate_files
from lipjax.runtime import cpu, kept
from lipjax.training import metrics
from lipjax.training.checkpoints import ConfigMismatch, open_workdir

# ml_collections imports configurations by a method that Python means to remove.
old_import = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method:DeprecationWarning")


def options_of(*flags):
    return common.parsed(["lipjax certify", *flags], certify)


# ---------------------------------------------------------------------------------------- streams


def test_a_reader_that_goes_away_does_not_end_the_program():
    """As of `lipjax train | head -1`."""
    reading, writing = os.pipe()
    with open(writing, "w") as raw:
        stream = common.Steady(raw)
        print("first", file=stream, flush=True)
        assert os.read(reading, 100) == b"first\n"
        os.close(reading)
        for _ in range(3):
            print("more", file=stream, flush=True)
        assert stream.write("x" * 100_000) == 100_000
        assert not stream.isatty()


def test_a_full_disk_behind_stdout_does_not_end_the_program():
    with open("/dev/full", "w") as raw:
        stream = common.Steady(raw)
        print("lost", file=stream, flush=True)
        print("lost too", file=stream, flush=True)


def test_closed_streams_lead_nowhere_and_characters_that_a_locale_lacks_are_escaped(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", narrow)
    common.steady_streams()
    print("nowhere")
    print("ε = ½ \udcff", file=sys.stderr, flush=True)
    assert narrow.buffer.getvalue() == b"\\u03b5 = \\xbd \\udcff\n"
    once = sys.stderr
    common.steady_streams()
    assert sys.stderr is once
    sys.stdout.close()


def test_without_a_home_or_where_it_cannot_be_written_nothing_is_kept(monkeypatch, tmp_path):
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    changed = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: changed.append(value))

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    (tmp_path / "file").write_text("")
    for home in (no_home, lambda: tmp_path / "file"):
        monkeypatch.setattr(Path, "home", home)
        cpu.keep_compiled()
        assert changed == []
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    cpu.keep_compiled()
    assert changed[0].startswith(str(tmp_path / ".cache" / "lipjax"))
    for given, base in ((tmp_path / "xdg", tmp_path / "xdg"), ("relative", tmp_path / ".cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(given))
        cpu.keep_compiled()
        assert changed[-1].startswith(str(base / "lipjax"))


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """JAX as it is where nobody has named a folder; returns the one that lipjax uses then."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kept, "SECONDS", 0.0)
    jax.config.update("jax_compilation_cache_dir", None)
    kept.reset_cache()
    yield tmp_path / "lipjax"
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_enable_compilation_cache", True)
    kept.reset_cache()


def compile_something(number: int) -> None:
    """A program of its own for each number."""
    jax.jit(lambda x: x + number)(np.float32(1))


def programs(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*-cache"))


def test_programs_of_a_certificate_are_kept_and_jax_is_afterwards_as_it_was(no_cache, tmp_path):
    run = batches.compiled(lambda x: x * 3, optimize=False)
    with kept.kept():  # as of another thread
        run(np.float32(1))
    found = programs(no_cache)
    assert found >= 1 and jax.config.jax_compilation_cache_dir is None
    compile_something(1)
    assert programs(no_cache) == found

    # Whoever names a folder later has it used, by certificates too.
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    compile_something(2)
    with kept.kept():
        compile_something(3)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert programs(no_cache) == found and programs(tmp_path / "own") == 2


def test_nothing_is_kept_where_jax_keeps_nothing_or_there_is_no_folder(no_cache, monkeypatch):
    jax.config.update("jax_enable_compilation_cache", False)
    with kept.kept():
        compile_something(4)
    assert jax.config.jax_compilation_cache_dir is None and not no_cache.exists()

    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setattr(kept, "folder", lambda: None)
    with pytest.raises(ZeroDivisionError), kept.kept():
        compile_something(5)
        raise ZeroDivisionError
    assert jax.config.jax_compilation_cache_dir is None and kept._inside == 0


def test_no_more_is_kept_than_the_limit_the_newest_programs_of_all(monkeypatch, tmp_path):
    monkeypatch.setattr(kept, "LIMIT", 250)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    folder = kept.folder()
    for i in range(4):
        (folder / f"{i}-cache").write_bytes(bytes(100))
        os.utime(folder / f"{i}-cache", (i, i))
    kept._prepared.cache_clear()  # as another process begins
    assert kept.folder() == folder
    assert sorted(path.name for path in folder.iterdir()) == ["2-cache", "3-cache"]


def test_a_bound_by_itself_is_one_program_and_another_network_of_its_kind_compiles_nothing():
    names = []

    def listen(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    def net(seed):
        kernel = np.random.default_rng(seed).normal(size=(3, 3)).astype(np.float32)
        return lambda x: kernel[:2] @ jax.nn.relu(kernel @ x)

    x = np.ones(3, np.float32)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for of in (lipjax.bound, lipjax.local_lipschitz):
            first = float(of(net(0), x, 0.5).lipschitz)
            assert sum("_walked" in name for name in names) == 1 and len(names) < 8, names
            names.clear()
            assert float(of(net(1), x, 0.25).lipschitz) != first
            assert names == []
            # Within another program it is a part of that, and the same.
            inside = jax.jit(jax.vmap(lambda x, of=of: of(net(0), x, 0.5).lipschitz))(x[None])
            np.testing.assert_allclose(inside[0], first, rtol=1e-5)
            assert "_walked" not in "".join(names)
            names.clear()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# ------------------------------------------------------------------------ before anything is loaded


@pytest.fixture
def no_data(monkeypatch):
    """Data that nobody may load."""

    def refuse(*_, **__):
        raise AssertionError("data was loaded")

    for name in ("load", "load_test"):
        monkeypatch.setattr(sets, name, refuse)


NETWORK = ("--network=digits-maxmin", "--data=digits", "--epsilon=0.5")
REFUSED = {
    ("--modes=lokal", *NETWORK): r"modes must be some of global, .*, auto, got lokal",
    ("--steps=3", *NETWORK): r"--steps=3 belongs to modes tight, tight_rows, auto",
    (
        "--seconds_per_image=1",
        *NETWORK,
    ): r"--seconds_per_image=1\.0 must be > 0 and belongs to mode",
    ("--seconds_per_image=0", "--modes=auto", *NETWORK): "--seconds_per_image=0",
    ("--failure_probability=2", *NETWORK): r"failure_probability must lie in \(0, 1\), got 2\.0",
    ("--network=digit-maxmin", *NETWORK[1:]): r"Did you mean 'digits-maxmin'",
    ("--network=no/such.safetensors", *NETWORK[1:]): r"no/such\.safetensors is not there",
    ("--network=lipjax", *NETWORK[1:]): "is a folder: give a run as --workdir=lipjax",
    NETWORK[:2]: "--network needs --epsilon",
    NETWORK[:1] + NETWORK[2:]: "--network needs --data",
    ("--epsilon=-1", *NETWORK[:2]): "epsilon",
    ("--data=digits",): "--data and --image_size belong to --network",
}


@pytest.mark.parametrize("given", REFUSED, ids=" ".join)
def test_names_and_numbers_that_make_no_sense_are_refused_before_data_is_loaded(
    given, no_data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lipjax").mkdir()
    with pytest.raises(ValueError, match=REFUSED[given]):
        certify.main(options_of(*given))
    assert [path.name for path in tmp_path.iterdir()] == ["lipjax"]  # no folder was made


@pytest.mark.parametrize("flag", ["batch_size", "pgd_steps", "pgd_restarts", "examples"])
def test_a_number_of_nothing_is_a_wrong_command_line_that_names_the_flag(flag, capsys):
    with pytest.raises(SystemExit) as ended:
        options_of(f"--{flag}=0")
    assert ended.value.code == 2 and f"--{flag}=0" in capsys.readouterr().err


@old_import
def test_a_network_that_there_is_not_is_refused_by_train_before_data_is_loaded(
    no_data, monkeypatch
):
    flags = ["lipjax train", "--config=digits", "--config.model.name=smal_conv"]
    monkeypatch.setattr("sys.argv", flags)  # where ml_collections looks for its fields
    with pytest.raises(ValueError, match="Did you mean 'small_conv'"):
        train.main(common.parsed(flags, train))


@old_import
@pytest.mark.parametrize(
    "flag, meant", [("epsilon", "epsilon.train"), ("epochs", "schedule.epochs"), ("mode", "bound")]
)
def test_a_flag_that_is_a_field_of_the_configuration_is_pointed_at(flag, meant, capsys):
    with pytest.raises(SystemExit) as ended:
        common.parsed(["lipjax train", "--config=digits", f"--{flag}=1"], train)
    assert ended.value.code == 2
    assert f"--config.{meant}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_refused_before_data_is_loaded(no_data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*file/out: Not a directory.*--out="):
        certify.main(options_of(*NETWORK, f"--out={tmp_path}/file/out"))


def test_a_folder_without_room_is_refused(tmp_path):
    """A limit of the process takes the place of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot write to .*: File too large"):
            common.writable(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    common.writable(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_without_matplotlib_only_curve_png_is_left_out_and_that_is_said_first(
    tmp_path, monkeypatch, capsys
):
    assert certify.probe(tmp_path) and capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not certify.probe(tmp_path)
    assert "no curve.png" in capsys.readouterr().err


# --------------------------------------------------------------------------- what is proved is kept


def test_certificates_and_tables_are_on_the_disk_when_the_pictures_fail(
    tmp_path, monkeypatch, capsys
):
    """And a test file alone is enough, though it does not show every class."""
    test = sets.load("digits").test
    rows = np.flatnonzero(test.labels < 3)[:6]
    images = test.unit_images(rows)
    np.savez(tmp_path / "test.npz", images=images, labels=test.labels[rows])

    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(certify, "find_gallery", fail)
    flags = [
        *("--network=digits-maxmin", f"--data=npz:{tmp_path}/test.npz", "--epsilon=0.1"),
        *("--modes=global", "--nocurve", "--pgd_steps=1", "--pgd_restarts=1", "--seed=0"),
        f"--out={tmp_path}/out",
    ]
    with pytest.raises(OSError, match="No space left"):
        certify.main(options_of(*flags))
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        *("certificate.npz", "examples.csv", "examples.npz", "summary.json")
    ]
    certificate_files.load(out / "certificate.npz")  # whole
    summary = json.loads((out / "summary.json").read_text())
    assert summary["classes"] == 10 and summary["run"]["examples"] == 6
    assert str(out / "certificate.npz") in summary["commands"]["check"][0]
    assert "certified, tier probabilistic" in capsys.readouterr().out


def test_certificates_go_elsewhere_where_the_folder_has_become_unwritable(
    tmp_path, monkeypatch, capsys
):
    saved = []

    def save(path, *_, **__):
        if tmp_path / "full" in Path(path).parents:
            raise OSError("No space left on device")
        saved.append(path)

    monkeypatch.setattr(certify.certificate_files, "save", save)
    monkeypatch.setattr(certify.tempfile, "tempdir", str(tmp_path))
    task = SimpleNamespace(
        modes=["global"],
        options=SimpleNamespace(early=False),
        given=SimpleNamespace(
            network=None, test=SimpleNamespace(indices=np.arange(2), name="a set")
        ),
        images=None,
        labels=None,
    )
    verdicts = SimpleNamespace(certificates={"global": None})
    (tmp_path / "full").mkdir()
    folder, files = certify.write_certificates(task, verdicts, {"command": ""}, tmp_path / "full")
    assert saved == [folder / "certificate.npz"] and files == {"global": "certificate.npz"}
    assert folder.parent == tmp_path and f"the results go to {folder}" in capsys.readouterr().err


def test_certificates_that_an_attack_contradicts_are_removed(tmp_path):
    file = tmp_path / "certificate.npz"
    file.write_bytes(b"")
    certify.refuse_contradictions("local", np.array([], int), [file])
    assert file.exists()
    with pytest.raises(SystemExit, match="do not trust this run"):
        certify.refuse_contradictions("local", np.array([3]), [file])
    assert not file.exists()


# ----------------------------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def passes():
    """Two passes over ten rows, in batches of four."""
    for _ in range(2):
        found = batches.batched(lambda columns: {"x": columns[0] + 1}, 4, np.arange(10))
        np.testing.assert_array_equal(found["x"], np.arange(10) + 1)


def test_each_batch_is_told_of_and_only_while_it_is_watched():
    told = []
    with batches.watched(lambda done, total: told.append((done, total))):
        passes()
    assert told == 2 * [(4, 10), (8, 10), (10, 10)]
    passes()
    assert len(told) == 6


def test_certify_shows_progress_on_a_terminal_and_is_quiet_in_a_log(monkeypatch):
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with certify.progress("certifying, local"):
            passes()
        shown = stream.getvalue()
        if stream.isatty():
            assert "certifying, local" in shown and "100%" in shown
        else:
            assert shown == ""


@pytest.mark.parametrize(
    "asked, found, said", [(None, "tf32", True), (None, "float32", False), ("tf32", "tf32", False)]
)
def test_a_coarse_arithmetic_that_the_device_chose_is_said_with_its_price(
    asked, found, said, capsys
):
    task = SimpleNamespace(options=SimpleNamespace(arithmetic=asked))
    certify.hint_at_arithmetic(task, SimpleNamespace(arithmetic=found))
    shown = capsys.readouterr().err
    assert ("--arithmetic=float32" in shown) == said and ("tf32" in shown) == said


# ------------------------------------------------------------------------------------------ train


def test_a_run_of_a_version_that_lacked_a_field_goes_on_with_its_default(tmp_path):
    config = training.default_config().to_dict()
    earlier = json.loads(json.dumps(config))
    del earlier["precision"], earlier["bound"]["rivals"]
    # Of recipes that came later.
    del earlier["optimizer"]["average"], earlier["schedule"]["first"], earlier["bound"]["first"]
    del earlier["bound"]["offset"], earlier["bound"]["crm"], earlier["data"]["rotation"]
    (tmp_path / "config.json").write_text(json.dumps(earlier))
    open_workdir(tmp_path, config, defaults=config)
    other = json.loads(json.dumps(config))
    other["bound"]["rivals"] = 3
    with pytest.raises(ConfigMismatch, match=r"bound\.rivals: stored 0, now 3"):
        open_workdir(tmp_path, other, defaults=config)
    found = training.completed(earlier)
    training.check_config(found)
    assert found.optimizer.average == 0 and training.modes_of(found) == [found.bound.mode]
    assert found.bound.rivals == 0 and found.precision.products == "default"
    earlier["bound"]["loss"] = "gloro"
    earlier["model"]["width"] = 7
    found = training.completed(earlier)
    assert found.bound.loss == "gloro" and found.model.width == 7


def test_a_run_of_before_shared_iterations_goes_on_unless_they_change_it(tmp_path):
    """They had the number of the others; a bound without shared norms never asked for it."""
    config = training.default_config()
    stored = json.loads(json.dumps(config.to_dict()))
    del stored["bound"]["shared_iterations"]
    for mode in ("local", "global"):
        (folder := tmp_path / mode).mkdir()
        config.bound.mode = stored["bound"]["mode"] = mode
        (folder / "config.json").write_text(json.dumps(stored))
    config.bound.mode = "local"
    open_workdir(tmp_path / "local", config.to_dict(), defaults=train.former_defaults(config))
    config.bound.mode = "global"
    with pytest.raises(ConfigMismatch, match=r"bound\.shared_iterations: stored 2, now 50"):
        open_workdir(tmp_path / "global", config.to_dict(), defaults=train.former_defaults(config))
    config.bound.shared_iterations = 2
    open_workdir(tmp_path / "global", config.to_dict(), defaults=train.former_defaults(config))


@pytest.mark.parametrize("experiment", ["cifar10_maxmin", "cifar10_fast", "mnist"])
def test_the_network_of_a_stored_configuration_can_be_built(experiment):
    """These experiments take the published thresholds and delete the field of the small nets."""
    config = importlib.import_module(f"lipjax.configs.{experiment}").get_config()
    found = training.completed(json.loads(json.dumps(config.to_dict())))
    assert "threshold" not in found.model
    shape = (28, 28, 1) if experiment == "mnist" else (32, 32, 3)
    training.build_network(found, shape, 10)


def lines(*robust):
    return [
        {
            "epoch": i + 1,
            "validation_epsilon": 0.5,
            "validation_robust_accuracy_estimate": share,
            "validation_accuracy": 0.5 + 0.1 * i,
        }
        for i, share in enumerate(robust)
    ]


def test_what_is_evaluated_and_selected_is_the_average_of_the_weights(monkeypatch):
    network, average = (nnx.Linear(1, 1, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    state = training.State(0, network, None, {}, np.float32(-np.inf), average)
    seen, saved = [], []

    def evaluate(network, *_):
        seen.append(network)
        return {"validation_accuracy": 0.5, "validation_robust_accuracy_estimate": 0.25}

    monkeypatch.setattr(training, "evaluate", evaluate)
    monkeypatch.setattr(train.feeding, "put", lambda value, *_: value)
    parts = SimpleNamespace(config=training.default_config(), mesh=None)
    position = train.Position(state, step=5, epoch=5, sums={})
    checkpoints = SimpleNamespace(save_best=lambda step, found, meta: saved.append(found))
    train.evaluate_and_select(parts, position, None, checkpoints)
    assert seen == [average]
    np.testing.assert_array_equal(saved[0]["kernel"], average.kernel[...])
    assert position.state.average is average and position.state.best > 0


def test_training_goes_on_where_its_curves_cannot_be_drawn(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines(0.5)[0]) + "\n")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with metrics.Curves(tmp_path / "curves.png", tmp_path / "metrics.jsonl", share=1e9) as curves:
        curves.refresh()
    said = capsys.readouterr().err
    assert said.count("curves.png is not drawn: ") == 1 and not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("epoch, ends", [(4, "done: 4 epochs"), (3, "stopped after epoch 3 of 4")])
def test_training_ends_with_what_it_has_achieved_and_says_done_only_if_it_is(
    epoch, ends, tmp_path, capsys
):
    found = lines(0.25, 0.75, None, 0.75)[:epoch]
    text = "".join(json.dumps(line) + "\n" for line in found)
    (tmp_path / "metrics.jsonl").write_text(text)
    parts = SimpleNamespace(config=SimpleNamespace(schedule=SimpleNamespace(epochs=4)))
    (tmp_path / "curves.png").write_bytes(b"")
    train.conclude(parts, SimpleNamespace(epoch=epoch), tmp_path, 61.0)
    said = capsys.readouterr().out
    best, share = (4, "80.0 %") if epoch == 4 else (2, "60.0 %")
    assert f"best: epoch {best}, {share} of the validation images right, 75.0 % robust" in said
    assert "an estimate, no certificate" in said and "this start took 1 min 1 s" in said
    assert os.path.relpath(tmp_path / "curves.png") in said
    assert ends in said and ("done" in said) == (epoch == 4)


def test_a_network_is_certified_on_a_test_file_with_a_label_that_it_has_not_is_refused(tmp_path):
    np.savez(tmp_path / "test.npz", x=np.full((2, 8, 8), 255, np.uint8), y=np.array([1, 10]))
    with pytest.raises(sets.DataError, match="the label 10, of image 1, is none of 10 classes"):
        networks.of_network("digits-maxmin", f"npz:{tmp_path}/test.npz")
    assert lipjax.pretrained.card("digits-maxmin")["classes"] == 10
