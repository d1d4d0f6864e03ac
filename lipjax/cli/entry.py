"""The command `lipjax`: everything that the scripts and modules do, under one name.

    lipjax train --config=digits --workdir=runs/digits
    lipjax certify --workdir=runs/digits
    lipjax check runs/digits/certification/certificate.npz --workdir=runs/digits
    lipjax report runs/digits
    lipjax plan --config=cifar10_maxmin --device=h200 --devices=8
    lipjax data info digits
    lipjax export runs/digits --out=digits.onnx
    lipjax models
    source <(lipjax completion bash)

`lipjax <command> --help` says more. The commands need what requirements.txt lists: in a checkout,
pip install ".[scripts]".
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import lipjax

COMMANDS = {
    "train": "train a network with local Lipschitz bounds (train.py)",
    "certify": "prove which predictions of a run cannot change (certify.py)",
    "check": "derive the verdicts of a certificate file once more, with other code",
    "report": "make the page of a certification once more from its files",
    "plan": "print what a configuration needs, before anything runs",
    "data": "list, describe or prepare data sets",
    "export": "write a network as safetensors or ONNX",
    "models": "list the trained networks that come with lipjax",
    "completion": "print a script that completes commands and flags in a shell",
}

EXIT_CODES = {
    0: "done; for check: every verdict that was examined is confirmed",
    1: "refused or failed, with a message; for check: a verdict is rejected",
    2: "the command line is wrong; for check: the file cannot be checked",
    130: "stopped by Ctrl-C",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code, by `EXIT_CODES`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments:
        print(_help(), file=sys.stderr)
        return 2
    name, rest = arguments[0], arguments[1:]
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name in ("-V", "--version"):
        print(f"lipjax {lipjax.__version__}")
        return 0
    if name not in COMMANDS:
        print(
            f"lipjax: no command is called {name!r}; there are {', '.join(COMMANDS)}.",
            file=sys.stderr,
        )
        return 2
    try:
        return _RUN[name](rest)
    except ImportError as error:
        if error.name is None:  # one of lipjax's own, which says what to install
            return _fail(name, str(error))
        if error.name.partition(".")[0] == "lipjax":
            raise
        return _fail(
            name, f'{error.name} is not installed: pip install ".[scripts]" in a checkout.'
        )
    except KeyboardInterrupt:
        print(f"lipjax {name}: stopped", file=sys.stderr)
        return 130


def _help() -> str:
    lines = [f"  {name:11} {text}" for name, text in COMMANDS.items()]
    codes = [f"  {code:<11} {text}" for code, text in EXIT_CODES.items()]
    return "\n".join([str(__doc__), "commands:", *lines, "", "exit codes:", *codes])


def _fail(name: str, message: str, code: int = 1) -> int:
    print(f"lipjax {name}: {message}", file=sys.stderr)
    return code


# --------------------------------------------------------------------------- with absl's flags


def _command(name: str, arguments: list[str]) -> int:
    """Runs `lipjax.cli.NAME`; it ends the process itself where it fails."""
    from lipjax.cli import common

    module = import_module(f"lipjax.cli.{name}")
    # Commands write their command line beside their results.
    sys.argv = [f"lipjax {name}", *arguments]
    common.run(module)
    return 0


def _train(arguments: list[str]) -> int:
    return _command("train", arguments)


def _certify(arguments: list[str]) -> int:
    return _command("certify", arguments)


def _plan(arguments: list[str]) -> int:
    return _command("plan", arguments)


# --------------------------------------------------------------------------------------- the others


def _check(arguments: list[str]) -> int:
    from lipjax.check import checker

    return checker.main(arguments, program="lipjax check")


def _report(arguments: list[str]) -> int:
    from lipjax import report

    options = _report_parser().parse_args(arguments)
    folder = Path(options.workdir)
    folder = folder / "certification" if (folder / "certification").is_dir() else folder
    try:
        print(report.build(folder))
    except (ValueError, OSError) as error:
        return _fail("report", str(error))
    return 0


def _report_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lipjax report",
        description="Makes report.html of a certification once more, from the files beside it.",
        epilog="example: lipjax report runs/digits",
    )
    parser.add_argument("workdir", help="a run that was certified, or its folder certification")
    return parser


def _data(arguments: list[str]) -> int:
    from lipjax.data import records, sets

    options = _data_parser().parse_args(arguments)
    try:
        if options.action == "list":
            print(sets.listed(options.data_dir))
        elif options.action == "info":
            splits = sets.load(
                options.name,
                data_dir=options.data_dir,
                manual_dir=options.manual_dir,
                image_size=options.image_size,
            )
            print(sets.described(splits))
        else:
            given = {
                "--out": options.out,
                "--data_dir": options.data_dir,
                "--manual_dir": options.manual_dir,
            }
            records.main(
                [
                    options.name,
                    *(f"{flag}={value}" for flag, value in given.items() if value is not None),
                ]
            )
    except (sets.DataError, OSError) as error:
        return _fail("data", str(error))
    return 0


def _data_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lipjax data",
        description="Data sets by the names that --config.data.name takes.",
        epilog="examples: lipjax data list; lipjax data info npz:train.npz,test.npz; lipjax data "
        "prepare mnist; "
        "lipjax data prepare folder:tiny-imagenet-200 --out=tiny",
    )
    actions = parser.add_subparsers(dest="action", required=True)
    listing = actions.add_parser("list", help="the kinds of names, and the sets that are here")
    info = actions.add_parser("info", help="sizes, classes, value range and fingerprint of a set")
    prepare = actions.add_parser(
        "prepare", help="prepare a TFDS set, or convert a folder to records"
    )
    for action in (info, prepare):
        action.add_argument("name", help="digits, a TFDS name, npz:…, folder:…, records:…")
        action.add_argument(
            "--manual_dir", help="a folder that holds a TFDS set's original archives"
        )
    for action in (listing, info, prepare):
        action.add_argument("--data_dir", help="where TFDS keeps its sets")
    info.add_argument("--image_size", type=int, help="for sets of images of several sizes")
    prepare.add_argument("--out", help="the new folder of records")
    return parser


def _export(arguments: list[str]) -> int:
    from lipjax import storage
    from lipjax.bridges import onnx_out
    from lipjax.cli import networks

    options = _export_parser().parse_args(arguments)
    out = Path(options.out)
    if out.suffix not in (".safetensors", ".onnx"):
        return _fail("export", f"--out={out}: the name must end in .safetensors or .onnx.", code=2)
    try:
        if Path(options.source).is_dir():
            run = networks.of_run(options.source)
            network, input_shape = run.network, run.test.images.shape[1:]
            notes = networks.notes(run)
        else:
            network, input_shape, notes = networks.opened(options.source)
        if out.suffix == ".onnx":
            onnx_out.to_onnx(network, out, input_shape=input_shape)
        else:
            storage.save(network, out, input_shape=input_shape, notes=notes)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return _fail("export", str(error))
    print(f"{out}: images of {input_shape} with pixels in [0, 1] -> logits")
    return 0


def _export_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lipjax export",
        description="Writes a network, with its selected parameters, for other programs.",
        epilog="example: lipjax export runs/digits --out=digits.onnx",
    )
    parser.add_argument(
        "source",
        help="a run, a .safetensors or .onnx file, or the name of a network of `lipjax models`",
    )
    parser.add_argument(
        "--out", required=True, help="the file: .safetensors (plain arrays by name) or .onnx"
    )
    return parser


def _models(arguments: list[str]) -> int:
    from lipjax import pretrained

    argparse.ArgumentParser(
        prog="lipjax models",
        description="Lists the trained networks that come with lipjax.",
        epilog='in Python: lipjax.load("digits-maxmin")',
    ).parse_args(arguments)
    print(pretrained.listed())
    return 0


# --------------------------------------------------------------------------------------- completion


def _completion(arguments: list[str]) -> int:
    import shtab

    parser = argparse.ArgumentParser(
        prog="lipjax completion",
        description="Prints a script that completes commands and flags in a shell.",
        epilog="bash: source <(lipjax completion bash); zsh: lipjax completion zsh > "
        "~/.zfunc/_lipjax; fish: lipjax completion fish > ~/.config/fish/completions/lipjax.fish",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    print(shtab.complete(whole_parser(), parser.parse_args(arguments).shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """All commands with all their flags: what completion knows. The commands parse their flags
    themselves."""
    from lipjax.check import checker

    parser = argparse.ArgumentParser(prog="lipjax")
    parser.add_argument("--version", action="store_true", help="print the version")
    subparsers = parser.add_subparsers()
    parents: dict[str, argparse.ArgumentParser] = {
        "check": checker.parser(),
        "report": _report_parser(),
        "data": _data_parser(),
        "export": _export_parser(),
    }
    for name, text in COMMANDS.items():
        parent = [parents[name]] if name in parents else []
        command = subparsers.add_parser(name, help=text, parents=parent, add_help=not parent)
        if name in ("train", "plan", "certify"):
            _add_flags(command, name)
        if name == "completion":
            command.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def _add_flags(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds the absl flags of a command, and the fields of a configuration where it takes one."""
    import shtab

    from lipjax import training
    from lipjax.cli import common

    values = common.flags_of(import_module(f"lipjax.cli.{name}"))
    for flag in values:
        text = (values[flag].help or "").replace("%", "%%")
        option = parser.add_argument(f"--{flag}", help=text)
        if flag == "config":
            option.choices = common.experiments()
        if flag == "workdir":
            option.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    if "config" in values:
        for field, described in training.FIELDS.items():
            parser.add_argument(f"--config.{field}", help=described.meaning.replace("%", "%%"))


_RUN: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "certify": _certify,
    "check": _check,
    "report": _report,
    "plan": _plan,
    "data": _data,
    "export": _export,
    "models": _models,
    "completion": _completion,
}
