"""The command `lipjax`, as a user meets it: help, exit codes, errors that say what to do,
completion."""

import subprocess
import sys
import types

import pytest
from absl import flags
from conftest import ROOT, run_lipjax

import lipjax.cli
from lipjax import __version__, bridges
from lipjax.cli import certify, common, entry, train

# ml_collections imports configurations by a method that Python means to remove.
old_import = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method:DeprecationWarning")


def test_help_names_every_command_and_every_exit_code(capsys):
    assert entry.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in entry.COMMANDS:
        assert f"\n  {name} " in text and f"lipjax {name}" in text
    for code, meaning in entry.EXIT_CODES.items():
        assert str(code) in text and meaning in text
    assert set(entry._RUN) == set(entry.COMMANDS)
    assert entry.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lipjax {__version__}\n"


def test_help_needs_nothing_but_the_library_and_other_commands_say_what_is_missing(
    capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "ml_collections", None)  # importing it raises
    monkeypatch.delitem(sys.modules, "lipjax.cli.common")
    monkeypatch.delattr(lipjax.cli, "common")
    assert entry.main(["--help"]) == 0
    assert "exit codes:" in capsys.readouterr().out
    assert entry.main(["train", "--help"]) == 1
    said = capsys.readouterr().err
    assert "ml_collections is not installed" in said and 'pip install ".[scripts]"' in said


@pytest.mark.parametrize("arguments", [[], ["trian"], ["Train"]])
def test_a_wrong_command_is_exit_code_2_and_lists_the_right_ones(arguments, capsys):
    assert entry.main(arguments) == 2
    text = capsys.readouterr().err
    assert all(name in text for name in entry.COMMANDS)


@pytest.mark.parametrize("name", ["train", "certify", "plan"])
def test_help_of_a_command_with_flags_lists_them(name, capsys):
    with pytest.raises(SystemExit) as ended:
        entry.main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    listed = {"train": "--stop_after:", "certify": "--modes:", "plan": "--devices:"}
    assert f"lipjax {name}" in text and listed[name] in text


@pytest.mark.parametrize("name", ["check", "report", "data", "export", "models", "completion"])
def test_help_of_a_command_says_how_it_is_used(name, capsys):
    with pytest.raises(SystemExit) as ended:
        entry.main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: lipjax {name}" in capsys.readouterr().out


def test_a_configuration_is_a_file_or_a_name_with_an_argument():
    assert common.configuration("digits").endswith("configs/digits.py")
    assert common.configuration("configs/digits.py") in (
        "configs/digits.py",
        common.configuration("digits"),
    )
    assert common.configuration("baselines:gloro").endswith("baselines.py:gloro")
    assert common.configuration(str(ROOT / "configs" / "mnist.py")) == str(
        ROOT / "configs" / "mnist.py"
    )
    with pytest.raises(common.UsageError, match=r"digts.*Did you mean digits\?"):
        common.configuration("digts")


WRONG = {
    ("--config=digts",): "Did you mean digits?",
    ("--config=digits", "--config.sed=3"): 'Did you mean "seed"',
    ("--config=digits", "--config.optimiser.learning_rate=1"): 'Did you mean "optimizer"',
    ("--config=digits", "--config.seed=a"): "--config.seed=a",
    ("--config=baselines:foo",): "no method is called 'foo'",
    ("--confg=digits",): "Did you mean: config",
    ("digits",): "unexpected arguments digits",
}


@old_import
@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_wrong_command_line_of_train_is_exit_code_2_and_says_what_is_meant(
    arguments, capsys, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["lipjax train", *arguments])
    with pytest.raises(SystemExit) as ended:
        common.parsed(sys.argv, train)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert WRONG[arguments] in said and "lipjax train --help" in said


def test_no_flag_is_defined_by_an_import():
    """Commands define theirs when they are called: two of them fit into one process."""
    assert not {"workdir", "config", "modes", "plan"} & set(flags.FLAGS)
    for command in (train, certify, train):
        assert "workdir" in common.flags_of(command)


@old_import
def test_every_field_of_a_configuration_is_a_flag_with_its_value(monkeypatch):
    given = ["lipjax train", "--config=mnist_small", "--config.bound.iterations=7"]
    monkeypatch.setattr(sys, "argv", given)
    options = common.parsed(given, train)
    assert options.config.bound.iterations == 7 and options.config.data.name == "mnist"
    assert common.config_name(options) == "mnist_small"


def test_train_runs_through_the_command_and_its_errors_are_exit_code_1(tmp_path):
    text = run_lipjax(
        "train", "--config=digits", "--config.batch_size=0", f"--workdir={tmp_path}", code=1
    )
    assert "lipjax train: batch_size must be" in text


def test_plan_takes_short_names_of_its_flags():
    text = run_lipjax("plan", "--config=digits", "--device=h200", "--devices=8")
    assert "H200" in text


def test_a_package_that_is_missing_is_named_with_what_installs_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert entry.main(["export", "digits-maxmin", "--out=net.onnx"]) == 1
    assert (
        "pip install" in (text := capsys.readouterr().err)
        and "onnx" in text
        and text.startswith("lipjax export: ")
    )
    command = types.SimpleNamespace(
        define_flags=lambda values: None,
        main=lambda options: bridges.from_onnx("net.onnx"),
        ERRORS=(),
    )
    monkeypatch.setattr(sys, "argv", ["certify.py"])
    with pytest.raises(SystemExit, match=r"^certify.py: from_onnx needs the package onnx"):
        common.run(command)  # as the script does
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert entry.main(["completion", "bash"]) == 1
    assert 'shtab is not installed: pip install ".[scripts]"' in capsys.readouterr().err
    assert entry.main(["export", "digits-maxmin", "--out=net.txt"]) == 2
    assert "must end in .safetensors or .onnx" in capsys.readouterr().err


def test_data_info_describes_all_splits_and_the_range(capsys):
    assert entry.main(["data", "info", "digits"]) == 0
    text = capsys.readouterr().out
    for said in (
        "1293 images",
        "144 images",
        "360 images",
        "(8, 8, 1)",
        "10 classes",
        "16 means 1.0",
    ):
        assert said in text


def test_data_names_what_is_missing(capsys):
    assert entry.main(["data", "info", "npz:nowhere.npz,else.npz"]) == 1
    assert "lipjax data: " in (text := capsys.readouterr().err) and "nowhere.npz" in text


def test_data_list_shows_prepared_sets(tmp_path, capsys):
    folder = tmp_path / "birds" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    assert entry.main(["data", "list", f"--data_dir={tmp_path}"]) == 0
    # TFDS files of another format cannot be read by position
    assert "none" in capsys.readouterr().out
    (folder / "birds-train.array_record-00000-of-00001").write_bytes(b"")
    assert entry.main(["data", "list", f"--data_dir={tmp_path}"]) == 0
    assert "birds" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_flags_and_fields(shell, capsys, completions):
    text = completions[shell]
    for known in (
        "certify",
        "workdir",
        "pgd_restarts",
        "config.optimizer.learning_rate",
        "failure_probability",
    ):
        assert known in text


@pytest.fixture(scope="module")
def completions():
    """The scripts of all shells."""
    shtab = pytest.importorskip("shtab", reason="completion is made by shtab")
    parser = entry.whole_parser()
    return {shell: shtab.complete(parser, shell) for shell in ("bash", "zsh", "fish")}


def test_bash_accepts_and_uses_the_completion(tmp_path, completions):
    script = tmp_path / "lipjax.bash"
    script.write_text(completions["bash"])
    ask = (
        f"source {script}; COMP_WORDS=(lipjax cert); COMP_CWORD=1; _shtab_lipjax; echo "
        f"${{COMPREPLY[@]}}"
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["certify"]
