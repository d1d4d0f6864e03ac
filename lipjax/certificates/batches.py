"""Compiled programs on batches of images, on every device of this process."""

import concurrent.futures
import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

# Pixels in all images up to which compiling without LLVM's optimizer is the quicker way (two CPU
# cores: 1500 digits or 130 MNIST images).
FEW_PIXELS = 100_000


@functools.cache
def compiled(function, *static: str, optimize: bool = True):
    """`function` under `jit`.

    On CPU, LLVM's optimizer takes most of the time and gains little if there is little work.
    """
    level = 1 if optimize else 0
    options = {"xla_backend_optimization_level": level} if jax.default_backend() == "cpu" else None
    return jax.jit(function, static_argnames=static, compiler_options=options)


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

    def results(of):
        return [jax.device_get(run(tuple(column[rows] for column in columns))) for rows in of]

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
