"""Which line of the user's program an equation comes from: for messages, nothing rests on it."""

import os
import sysconfig
import traceback
from collections.abc import Iterator

import flax
import jax

# Code that is between the user's line and the equation: what is installed, and lipjax itself.
_JAX = os.path.dirname(jax.__file__) + os.sep
_INSTALLED = ("stdlib", "platstdlib", "purelib", "platlib")
_LIBRARIES = tuple(
    {
        _JAX,
        os.path.dirname(flax.__file__) + os.sep,
        *(sysconfig.get_path(name) + os.sep for name in _INSTALLED),
        os.path.dirname(os.path.dirname(__file__)) + os.sep,
    }
)
# Code that is in no file. What is typed at a prompt, "<stdin>", is the user's.
_GENERATED = ("<string>", "<frozen", "<__")
# Where JAX begins to trace a function. What is further out called it, perhaps some time ago: JAX
# keeps the bodies of calls.
_BEGIN = "trace_to_jaxpr"


def line_of(equation, outside: str) -> str:
    """The innermost line of the user's program, as ``file:line (function)``.

    Args:
        equation: of a jaxpr.
        outside: the line of the call that it is the body of, or an empty string.

    Returns:
        Where there is no such line: `outside`, and without that the module of a library. Behind
        it stands the name of the operation in the file that the network came from, if there is one.
    """
    line, scope = _line(equation, outside), _scope(equation)
    if not scope:
        return line
    return f"{line}, {scope}" if ":" in line else scope


def _scope(equation) -> str:
    """The innermost `jax.named_scope` that is written for people, in words: it has a space."""
    stack = getattr(equation.source_info.name_stack, "stack", ())
    names = [entry.name for entry in stack if " " in entry.name]
    return names[-1] if names else ""


def _line(equation, outside: str) -> str:
    module = ""
    for frame in _frames(equation):
        if not frame.file_name.startswith(_LIBRARIES):
            return _place(frame)
        if frame.function_name.endswith("__call__") and not frame.file_name.startswith(_JAX):
            module = module or frame.function_name
    return outside or module


def line_of_error(error: BaseException) -> str:
    """The innermost line of the user's program that an error went through; empty: none."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        name = frame.f_code.co_filename
        if not name.startswith((*_LIBRARIES, *_GENERATED)):
            return _shortest(name, line, frame.f_code.co_qualname)
    return ""


def is_in(equation, function: str) -> bool:
    """Was the equation made inside of a function of that name?"""
    return any(frame.function_name.endswith(function) for frame in _frames(equation))


def _frames(equation) -> Iterator:
    """From the inside out, to where the tracing of the function began."""
    found = equation.source_info.traceback
    for frame in found.frames if found is not None else ():
        if frame.function_name.startswith(_BEGIN):
            return
        if not frame.file_name.startswith(_GENERATED):
            yield frame


def _place(frame) -> str:
    return _shortest(frame.file_name, frame.line_num, frame.function_name)


def _shortest(name: str, line: int, function: str) -> str:
    path = os.path.relpath(name)
    if path.startswith(".." + os.sep + ".."):
        path = name
    return f"{path}:{line} ({function})"
