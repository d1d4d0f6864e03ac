"""Compiled programs on batches of images, on every device of this process."""

import concurrent.futures
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from lipjax.runtime import kept

# Pixels in all images up to which compiling without LLVM's optimizer is the quicker way (two CPU
# cores: 1500 digits or 130 MNIST images).
FEW_PIXELS = 100_000

# Called after each batch with rows that are done and all rows of the call; see `watched`.
_watcher: Callable[[int, int], None] | None = None


@contextlib.contextmanager
def watched(watcher: Callable[[int, int], None]) -> Iterator[None]:
    """Lets ``watcher(done, total)`` know of each batch, while the context lasts; of each call of
    `batched` from its first batch to its last, by one thread at a time."""
    global _watcher
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before


@functools.cache
def compiled(function, *static: str, optimize: bool = True):
    """`function` under `jit`; once compiled it is kept on disk (`lipjax.runtime.kept`).

    On CPU, LLVM's optimizer takes most of the time and gains little if there is little work.
    """
    options: dict[str, Any] | None = kept.quick_to_compile(level=0)
    if optimize and options:
        options = {"xla_backend_optimization_level": 1}
    program = jax.jit(function, static_argnames=static, compiler_options=options)

    @functools.wraps(function)
    def run(*arguments, **fixed):
        with kept.kept():
            return program(*arguments, **fixed)

    run.lower = program.lower  # type: ignore[attr-defined]
    return run


def compile_for(run: Any, *arguments) -> None:
    """Compiles a program of `compiled`, a `functools.partial` with its first arguments, so that
    its next call on arrays of these shapes only runs."""
    with kept.kept():
        run.func.lower(*run.args, *arguments, **run.keywords).compile()


def batched(run, size, *columns, context=contextlib.nullcontext) -> dict[str, Any]:
    """Runs ``run(columns)`` in batches of `size` rows; NumPy out, in order.

    The devices of this process work side by side, each in a thread. JAX's precision and types are a
    thread's own: `context` makes what they have to be there. The last batch is padded, for one
    shape.
    """
    count = len(columns[0])
    places = np.arange(-(-count // size) * size).reshape(-1, size)
    batches = list(np.minimum(places, count - 1))
    workers = devices()
    done = 0
    lock = threading.Lock()

    def results(of):
        nonlocal done
        found = []
        for rows in of:
            found.append(jax.device_get(run(tuple(column[rows] for column in columns))))
            with lock:
                done = min(done + size, count)
                if _watcher:
                    _watcher(done, count)
        return found

    def work(worker):
        # One program over all devices would be compiled once only, but hangs on CPU: jax 0.10.2,
        # two devices.
        with context(), jax.default_device(workers[worker]):
            return results(batches[worker :: len(workers)])

    if len(workers) == 1:
        parts = results(batches)
    else:
        with concurrent.futures.ThreadPoolExecutor(len(workers)) as pool:
            found = list(pool.map(work, range(len(workers))))
        parts = [found[i % len(workers)][i // len(workers)] for i in range(len(batches))]
    return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}


def devices() -> list[jax.Device]:
    """Those of this process that work on one batch together."""
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    return [chosen] if chosen else jax.local_devices()


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """IEEE float64, on the host where the accelerator has none; no TF32 or bfloat16 products."""
    host = jax.devices("cpu")[0] if jax.default_backend() == "tpu" else None
    with jax.enable_x64(True), jax.default_matmul_precision("highest"), jax.default_device(host):
        yield
