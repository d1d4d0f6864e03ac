"""What the commands share: names of configurations, flags, errors.

A command is a module with `define_flags(values)`, `main(options)`, where `options` are the parsed
flags, and `ERRORS`, the exceptions whose text says by itself what is wrong and what to do.
Exit codes are in `lipjax.cli.entry.EXIT_CODES`.
"""

import difflib
import errno
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from absl import flags, logging
from ml_collections import config_flags

import lipjax.configs
from lipjax.runtime import hosts

CONFIGS = Path(lipjax.configs.__path__[-1])
DEFAULT_CONFIG = "digits"


class UsageError(ValueError):
    """The command line is wrong; the message says how it should be."""


def experiments() -> list[str]:
    """The names of the configurations that come with lipjax."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "__init__")


def configuration(value: str) -> str:
    """The file, and the argument after a colon, that ``--config=value`` means.

    Args:
        value: a file with get_config(), or the name of one that comes with lipjax ("digits",
            "configs/digits.py"), with or without ":argument".

    Raises:
        UsageError: neither.
    """
    name, colon, argument = value.partition(":")
    if Path(name).is_file():
        return value
    stem = name.removeprefix("configs/").removesuffix(".py")
    if stem in experiments():
        return f"{CONFIGS / stem}.py{colon}{argument}"
    close = difflib.get_close_matches(stem, experiments(), n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise UsageError(
        f"--config={value}: there is no such file, and no configuration of that name comes with "
        f"lipjax; there are {', '.join(experiments())}.{hint}"
    )


# ------------------------------------------------------------------------------------------ flags


def define_config(values: flags.FlagValues) -> None:
    """The flag --config, and those of its fields."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Experiment: a file with get_config(), or the name of one of lipjax's own: "
        f"{', '.join(experiments())}. Default: {DEFAULT_CONFIG}. Any of its fields is a flag too: "
        "--config.optimizer.learning_rate=5e-4.",
        flag_values=values,
    )


def define_hosts(values: flags.FlagValues) -> None:
    """The flag --hosts."""
    flags.DEFINE_string(
        "hosts",
        os.environ.get("LIPJAX_HOSTS", ""),
        f"For several processes as one: {hosts.EXAMPLE}; or LIPJAX_HOSTS.",
        flag_values=values,
    )


def config_name(options: flags.FlagValues) -> str:
    """The name of the file that --config means, without folder and ending."""
    return Path(config_flags.get_config_filename(options["config"])).stem


def flags_of(command: ModuleType) -> flags.FlagValues:
    """The command's flags, not parsed."""
    values = flags.FlagValues()
    command.define_flags(values)
    return values


def parsed(argv: list[str], command: ModuleType) -> flags.FlagValues:
    """The command's flags as a command line gives them; `argv` begins with the program's name.

    Raises:
        SystemExit: 0 after --help, 2 where the command line is wrong.
    """
    values = flags_of(command)
    if any(argument in ("--help", "-help", "-h", "--helpshort") for argument in argv[1:]):
        print(helptext(command, values))
        raise SystemExit(0)
    try:
        left = values(_with_config(argv) if "config" in values else argv)
        if len(left) == 1:
            return values
        message = (
            f"unexpected arguments {' '.join(left[1:])}; flags look like --workdir=runs/digits."
        )
    except flags.UnrecognizedFlagError as error:
        message = f"{error}{_fields_called(error.flagname) if 'config' in values else ''}"
    except (flags.Error, UsageError) as error:
        message = str(error)
        if "Traceback" in message:  # of get_config(): what it says itself is in the last line
            message = message.strip().splitlines()[-1].partition(": ")[2]
    # ml_collections: a misspelt field or group, and which one may be meant
    except (AttributeError, KeyError) as error:
        reason: BaseException = error
        while isinstance(reason.args[0], Exception):
            reason = reason.args[0]
        message = f"the configuration has no such field: {reason.args[0]}"
    print(f"{argv[0]}: {message}\n{argv[0]} --help lists the flags.", file=sys.stderr)
    raise SystemExit(2)


def _fields_called(name: str) -> str:
    """A hint at the configuration's fields of that name, or of the group of that name."""
    from lipjax import training

    found = [f"--config.{field}" for field in training.FIELDS if name in field.split(".")]
    return f" Did you mean {' or '.join(found)}?" if found else ""


def _with_config(argv: list[str]) -> list[str]:
    """The command line with the configuration's name replaced by its file."""
    given = [argv[0]]
    for argument in argv[1:]:
        if given[-1] in ("--config", "-config"):  # its value is an argument of its own
            given[-1] += "=" + argument
        else:
            given.append(argument)

    places = [i for i, word in enumerate(given) if word.lstrip("-").startswith("config=")]
    if not places:
        given.insert(1, f"--config={DEFAULT_CONFIG}")
        places = [1]
    given[places[0]] = "--config=" + configuration(given[places[0]].partition("=")[2])
    return given


def helptext(command: ModuleType, values: flags.FlagValues) -> str:
    """The text of ``--help``: what the command says of itself, then its flags."""
    lines = values.get_help(include_special_flags=False).splitlines()
    described = "\n".join(line for line in lines if line.startswith(" "))
    return f"{command.__doc__}\nflags:\n{described}"


# ---------------------------------------------------------------------------------------- running


def run(command: ModuleType) -> None:
    """Parses the flags in ``sys.argv``, runs the command and ends the process where it fails, by
    `lipjax.cli.entry.EXIT_CODES`.

    Raises:
        SystemExit: on --help, a wrong command line, or what `command.ERRORS` names.
    """
    import jax

    name = program()
    steady_streams()
    options = parsed([name, *sys.argv[1:]], command)
    logging.use_absl_handler()
    try:
        command.main(options)
    except command.ERRORS as error:
        hosts.give_up(f"{name}: {error}")
    except ImportError as error:
        if error.name is not None:  # else one of lipjax's own, which says what to install
            raise
        hosts.give_up(f"{name}: {error}")
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).splitlines()[0]
        hosts.give_up(f"{name}: another process is gone, or a device failed: {reason}")


class Steady:
    """A text stream whose reader may go away, as `head` does, or whose disk may be full: what
    cannot be written is dropped from then on, and work goes on."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self):
        # What is left in buffers goes there too, also at the end of the program.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def steady_streams() -> None:
    """Makes stdout and stderr streams that never end the program: closed ones lead nowhere, readers
    may go away, and characters that the locale lacks are written as escapes."""
    # Else the next file that is opened would be what libraries believe to be stdout.
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, Steady):
            continue
        if stream is None:
            stream = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Steady(stream))


def writable(folder: Path, size: int = 2**22) -> None:
    """Makes a folder, and makes sure that so many bytes can be written to it.

    Raises:
        ValueError: they cannot, with the reason and what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            # Not a hole: these take their room on the disk.
            file.write(os.urandom(size))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full"
        raise ValueError(
            f"cannot write to {folder.absolute()}: {reason}. Give another folder with --out=."
        ) from error


def program() -> str:
    """What was called: "train.py" or "lipjax train"."""
    return os.path.basename(sys.argv[0])


def line(name: str, arguments: Sequence[str]) -> str:
    """How a command is called as this one was: ``python NAME.py ...`` or ``lipjax NAME ...``,
    quoted for a shell."""
    first = ["python", f"{name}.py"] if program().endswith(".py") else ["lipjax", name]
    return shlex.join([*first, *arguments])
