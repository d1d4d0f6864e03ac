"""Runs train.py and certify.py, at the top of a checkout or installed: their flags, errors and exit
codes.

``lipjax/cli/train.py`` and ``certify.py`` are links to those two scripts and ``lipjax/configs`` is
one to ``configs``, so that an installation has what a checkout has. Exit codes are in `EXIT_CODES`.
"""

import difflib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from absl import app, flags

import lipjax.configs

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
    meant = difflib.get_close_matches(stem, experiments(), n=1)
    raise UsageError(
        f"--config={value}: there is no such file, and no configuration of that name comes with "
        "lipjax; there are "
        f"{', '.join(experiments())}." + (f" Did you mean {meant[0]}?" if meant else "")
    )


def run(main: Callable[[Sequence[str]], None], errors: tuple[type[Exception], ...]):
    """Parses the flags in ``sys.argv``, calls `main` and ends the process, by `EXIT_CODES`.

    Args:
        main: of train.py or certify.py.
        errors: what says by itself what is wrong and what to do; a traceback would only hide it.

    Raises:
        SystemExit: always.
    """
    import jax

    from lipjax.runtime import hosts

    program = os.path.basename(sys.argv[0])
    try:
        app.run(
            main,
            argv=[program, *sys.argv[1:]],
            flags_parser=lambda argv: _parsed(argv, sys.modules[main.__module__]),
        )
    except errors as error:
        hosts.give_up(f"{program}: {error}")
    except KeyboardInterrupt:
        print(f"{program}: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        hosts.give_up(
            f"{program}: another process is gone, or a device failed: {str(error).splitlines()[0]}"
        )


def line(name: str, arguments: Sequence[str]) -> str:
    """How a script is called as this one was: ``python NAME.py ...`` or ``lipjax NAME ...``, quoted
    for a shell."""
    script = os.path.basename(sys.argv[0]).endswith(".py")
    return shlex.join([*(["python", f"{name}.py"] if script else ["lipjax", name]), *arguments])


def _parsed(argv: list[str], module: ModuleType) -> list[str]:
    """What is left of the command line after its flags."""
    if any(argument in ("--help", "-help", "-h", "--helpshort") for argument in argv[1:]):
        print(helptext(argv[0], module))
        raise SystemExit(0)
    try:
        left = flags.FLAGS(_with_config(argv))
        if len(left) == 1:
            return left
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
    """The command line with the configuration's name, if it takes one, replaced by its file."""
    if "config" not in flags.FLAGS:
        return argv
    given = [argv[0]]
    for argument in argv[1:]:
        if given[-1] in ("--config", "-config"):  # its value is an argument of its own
            given[-1] += "=" + argument
        else:
            given.append(argument)
    place = next(
        (i for i, argument in enumerate(given) if argument.lstrip("-").startswith("config=")), None
    )
    if place is None:
        given.insert(1, f"--config={DEFAULT_CONFIG}")
        place = 1
    given[place] = "--config=" + configuration(given[place].partition("=")[2])
    return given


def helptext(program: str, module: ModuleType) -> str:
    """The text of ``--help``: what the module says of itself, then its flags."""
    described = flags.FLAGS.module_help(module).replace(f"{module.__name__}:", "")
    return f"{module.__doc__}\nflags:\n{described}"
