"""What the commands share: names of configurations, flags, errors and exit codes.

A command is a module with `define_flags(values)`, `main(options)`, where `options` are the parsed
flags, and `ERRORS`, the exceptions whose text says by itself what is wrong and what to do.
Exit codes are in `EXIT_CODES`.
"""

import difflib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from absl import flags, logging
from ml_collections import config_flags

import lipjax.configs
from lipjax.runtime import hosts

CONFIGS = Path(lipjax.configs.__path__[-1])
DEFAULT_CONFIG = "digits"

EXIT_CODES = {
    0: "done; for check: every verdict that was examined is confirmed",
    1: "refused or failed, with a message; for check: a verdict is rejected",
    2: "the command line is wrong; for check: the file cannot be checked",
    130: "stopped by Ctrl-C",
}


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
    `EXIT_CODES`.

    Raises:
        SystemExit: on --help, a wrong command line, or what `command.ERRORS` names.
    """
    import jax

    name = program()
    options = parsed([name, *sys.argv[1:]], command)
    logging.use_absl_handler()
    try:
        command.main(options)
    except command.ERRORS as error:
        hosts.give_up(f"{name}: {error}")
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).splitlines()[0]
        hosts.give_up(f"{name}: another process is gone, or a device failed: {reason}")


def program() -> str:
    """What was called: "train.py" or "lipjax train"."""
    return os.path.basename(sys.argv[0])


def line(name: str, arguments: Sequence[str]) -> str:
    """How a command is called as this one was: ``python NAME.py ...`` or ``lipjax NAME ...``,
    quoted for a shell."""
    first = ["python", f"{name}.py"] if program().endswith(".py") else ["lipjax", name]
    return shlex.join([*first, *arguments])
