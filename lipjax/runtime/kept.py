"""Keeps compiled programs on disk, so that the next process need not compile them again.

JAX can do this, and does not unless it is told where. A program of lipjax tells it for good
(`lipjax.runtime.cpu.keep_compiled`). A library must not, as JAX's settings are the whole process's:
`kept` tells it for the time of a call, and only where nobody else has. Afterwards JAX is as it was,
and whoever names a folder of his own later has that one used.
"""

import contextlib
import functools
import os
import platform
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache.compilation_cache import reset_cache

# Bytes that are kept; what is above is removed when a process begins to use the folder, oldest
# first. (JAX's own limit needs a package that is not installed with it.)
LIMIT = 2**29

# What took less to compile is not kept. (JAX's own default, a second, leaves out half of a call of
# `certify`.)
SECONDS = 0.1

# How many threads are in `kept` at the moment; the folder that it has told JAX of, and JAX's
# seconds before.
_inside = 0
_told: tuple[str, float] | None = None
_lock = threading.Lock()


def folder() -> Path | None:
    """Where programs are kept: ``lipjax`` in XDG_CACHE_HOME, or in ``~/.cache``, and in it one
    folder for each kind of processor. None where there is no home, or it cannot be written."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError:  # no home
        return None
    return _prepared(base / "lipjax")


@functools.cache
def _prepared(base: Path) -> Path | None:
    # Homes are shared, and a program may use instructions that another processor lacks.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    path = base / f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        _shrink(path)
    except OSError:  # not writable
        return None
    return path if os.access(path, os.W_OK) else None


def _shrink(path: Path) -> None:
    """Removes the oldest files until `LIMIT` is kept."""
    files = []
    for file in path.iterdir():
        # Another process may remove them too.
        with contextlib.suppress(FileNotFoundError):
            found = file.stat()
            files.append((found.st_mtime, found.st_size, file))
    size = sum(size for _, size, _ in files)
    for _, length, file in sorted(files):
        if size <= LIMIT:
            break
        file.unlink(missing_ok=True)
        size -= length


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """What JAX compiles in this context is kept in `folder`, or found there.

    Nothing is changed where JAX already has a folder (``jax_compilation_cache_dir``, in the
    environment JAX_COMPILATION_CACHE_DIR), or where its cache is off
    (JAX_ENABLE_COMPILATION_CACHE=false, which so is the way to turn this off).
    """
    global _inside
    with _lock:
        if not _inside:
            _tell()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _take_back()


def _tell() -> None:
    global _told
    config: Any = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    path = folder()
    if path is not None:
        _told = str(path), config.jax_persistent_cache_min_compile_time_secs
        config.update("jax_compilation_cache_dir", _told[0])
        config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)


def _take_back() -> None:
    global _told
    config: Any = jax.config
    if _told is None:
        return
    path, seconds = _told
    _told = None
    # Somebody may have said something else meanwhile: that stays.
    if config.jax_persistent_cache_min_compile_time_secs == SECONDS:
        config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    if config.jax_compilation_cache_dir == path:
        config.update("jax_compilation_cache_dir", None)
        # Else JAX would go on with the folder of its first program.
        reset_cache()


def quick_to_compile(level: int) -> dict[str, Any] | None:
    """Compiler options for programs that run seldom or briefly; None on other devices than CPUs.

    LLVM's optimizer, of `level` 0 to 3, takes most of the time; and XLA's older way to emit fused
    loops, which is gone from jaxlib 0.11 on, takes half as long.
    """
    if jax.default_backend() != "cpu":
        return None
    options: dict[str, Any] = {"xla_backend_optimization_level": level}
    if jax.lib.__version__.startswith("0.10."):
        options["xla_cpu_use_fusion_emitters"] = False
    return options


def by_itself(function: Callable, *static: str) -> Callable:
    """`function`, which is called on arrays, as one program, kept on disk; operation by operation
    it would be hundreds of them. Within another program it is a part of that, as it stands.

    Args:
        function: of pytrees of arrays, and by name of what is `static`, hashable.
    """

    @functools.cache
    def program():  # the device is not known before the first call
        options = quick_to_compile(level=1)
        return jax.jit(function, static_argnames=static, compiler_options=options)

    @functools.wraps(function)
    def run(*arguments, **fixed):
        # Within a program that is being traced a new array is a part of it, too.
        leaves = [*jax.tree.leaves(arguments), jnp.zeros(())]
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return function(*arguments, **fixed)
        with kept():
            return program()(*arguments, **fixed)

    return run
