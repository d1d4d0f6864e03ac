"""Several processes that train or certify as one, on JAX's distributed runtime, and how a process
ends.

One process a machine (or TPU host), each with its own devices. All of them run the same program on
the same global arrays, and so they must decide alike: what depends on a clock or a signal goes
through `maximum` first. Process 0 alone writes logs and results; every process writes its shards of
a checkpoint.

    python -m lipjax.runtime.hosts 2 train.py --config=configs/digits.py

starts so many processes on this machine, one job: to try things, or one for each of its devices.
What it does not start itself (SLURM, Cloud TPU, a machine at a time) takes the flag --hosts or the
environment's LIPJAX_HOSTS.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

EXAMPLE = (
    "--hosts=auto, or --hosts=<host:port of process 0>,<number of processes>,<this process, from 0>"
)
# How long the others wait for a process that is silent before they give up.
SILENCE_SECONDS = 30
# How long a local job's other processes may go on when one has failed; they should end by
# themselves before.
GRACE_SECONDS = 60


def join(hosts: str) -> None:
    """Makes this process part of a job; call it before anything else of JAX. Returns when all
    processes are there.

    Args:
        hosts: "" for one process alone; "auto" where JAX finds out by itself (Cloud TPU, SLURM,
            Open MPI, Kubernetes); else "address:port of process 0,number of processes,number of
            this one".

    Raises:
        ValueError: any other text; "auto" where there is nothing to find; processes that do not
            come.
    """
    if not hosts:
        return
    arguments: dict[str, Any] = {}
    if hosts != "auto":
        address, count, number = _job(hosts)
        arguments = {"coordinator_address": address, "num_processes": count, "process_id": number}
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=SILENCE_SECONDS, **arguments)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the processes of --hosts={hosts} did not come together: {reason} ({EXAMPLE})"
        ) from error


def _job(hosts: str) -> tuple[str, int, int]:
    """Address of process 0, number of processes and number of this one, as --hosts gives them."""
    parts = hosts.split(",")
    numbers = all(part.isdecimal() for part in parts[1:])
    if len(parts) != 3 or ":" not in parts[0] or not numbers:
        raise ValueError(f"hosts must be as in {EXAMPLE}; got {hosts!r}.")
    count, number = map(int, parts[1:])
    if not 0 <= number < count:
        raise ValueError(f"hosts: process {number} is not one of 0 to {count - 1}, in {hosts!r}.")
    return parts[0], count, number


def is_writer() -> bool:
    """Whether this process writes logs and results."""
    return jax.process_index() == 0


def maximum(*values: float) -> tuple[float, ...]:
    """The largest of each value over all processes, which have to call this together."""
    if jax.process_count() == 1:
        return values
    gathered = multihost_utils.process_allgather(np.asarray(values, np.float32))
    return tuple(float(v) for v in np.max(gathered, axis=0))


def wait(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(array: np.ndarray) -> np.ndarray:
    """``(processes, *shape)``, the arrays of all processes, bit for bit; of one shape and type
    everywhere."""
    if jax.process_count() == 1:
        return array[None]
    # As bytes: JAX would make float32 of float64.
    raw = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(raw))
    return np.frombuffer(gathered.tobytes(), array.dtype).reshape(len(gathered), *array.shape)


def give_up(message: str) -> None:
    """Ends this process with `message` and exit status 1.

    With other processes at once, without the goodbye that JAX waits for: they may be waiting for
    this one elsewhere, and end when they see that it is gone.
    """
    if jax.process_count() == 1:
        raise SystemExit(message)
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


class Preemption:
    """Notices SIGTERM, with which clusters announce that they take a machine away; a context.

    Attributes:
        noticed: whether it came. A second one ends the process as usual.
    """

    def __init__(self):
        self.noticed = False

    def __enter__(self):
        self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGTERM, self._before)

    def _notice(self, *_):
        self.noticed = True
        signal.signal(signal.SIGTERM, self._before)


def launch(count: int, command: list[str]) -> int:
    """Runs a Python script as `count` local processes of one job; returns the first exit status
    that is not 0, or 0.

    Each gets one of this machine's GPUs, if there are any: of those in CUDA_VISIBLE_DEVICES, or of
    all. SIGTERM and Ctrl-C go to all of them. When one fails, the others are ended.

    Raises:
        ValueError: more processes than GPUs in CUDA_VISIBLE_DEVICES.
    """
    gpus = _gpus(count)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"

    processes = []
    for number in range(count):
        own = {
            "LIPJAX_HOSTS": f"{address},{count},{number}",
            "CUDA_VISIBLE_DEVICES": gpus[number],
        }
        processes.append(subprocess.Popen([sys.executable, *command], env={**os.environ, **own}))

    def pass_on(number, _):
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _first_failure(processes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            process.kill()


def _gpus(count: int) -> list[str]:
    """The value of CUDA_VISIBLE_DEVICES of each process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    if visible == [""]:
        return [""] * count
    if len(visible) < count:
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES names {len(visible)} GPUs ({','.join(visible)}), asked for "
            f"{count} processes."
        )
    return visible[:count]


def _first_failure(processes: list[subprocess.Popen]) -> int:
    """Waits until all have ended; the status of the first that failed, or 0."""
    failed = 0
    deadline = float("inf")
    while True:
        statuses = [process.poll() for process in processes]
        if not failed and any(statuses):
            failed = next(filter(None, statuses))
            deadline = time.monotonic() + GRACE_SECONDS
        if None not in statuses:
            return failed
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.1)


if __name__ == "__main__":
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal() or sys.argv[1] == "0":
        raise SystemExit(
            "usage: python -m lipjax.runtime.hosts <number of processes> <script> [its flags]"
        )
    try:
        status = launch(int(sys.argv[1]), sys.argv[2:])
    except ValueError as error:
        raise SystemExit(f"lipjax.runtime.hosts: {error}") from None
    # Ended by a signal: as shells count.
    raise SystemExit(status if status >= 0 else 128 - status)
