"""Checkpoints of a run, through Orbax: the newest states to continue from, and the best parameters
to certify.

Layout: ``workdir/config.json``, ``workdir/checkpoints/last/<step>`` (whole training states) and
``workdir/checkpoints/best/<step>`` (parameters only). Every write is complete before it gets its
name, so a kill at any moment leaves the checkpoints that were there. Of a job of several processes
each writes its shards.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lipjax.formats.files import replaced
from lipjax.runtime import hosts


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which and what to do."""


class ConfigMismatch(CheckpointError):
    """The workdir belongs to another configuration."""


class AnotherArchitecture(CheckpointError):
    """The checkpoint is of a network or a data set of other shapes."""


def open_workdir(workdir, config: dict, *, volatile: tuple[str, ...] = ()) -> Path:
    """The workdir's absolute path, created if needed, after checking that it belongs to this
    configuration.

    The first call writes ``config.json``; later ones compare with it.

    Args:
        workdir: folder of the run.
        config: JSON-able nested dict (tuples and lists are the same).
        volatile: dotted names of fields that may differ, such as where the data lies.

    Raises:
        ConfigMismatch: naming every field that differs.
        CheckpointError: the folder cannot be written.
    """
    path = Path(os.path.abspath(os.path.expanduser(workdir)))
    config = json.loads(json.dumps(config))  # as it will be read
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not (path / "config.json").exists():
            with replaced(path / "config.json", "w") as file:
                file.write(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write to {path}: {_reason(error)}.") from error

    stored = _flat(load_config(path))
    now = _flat(config)
    missing = "(absent)"
    differing = [
        f"  {name}: stored {stored.get(name, missing)!r}, now {now.get(name, missing)!r}"
        for name in sorted(stored.keys() | now.keys())
        if name not in volatile and stored.get(name, missing) != now.get(name, missing)
    ]
    if differing:
        advice = "Give another --workdir, or the same configuration to continue it."
        if not _has_results(path):
            advice += " It has finished no epoch yet: if it was a failed start, remove the folder."
        raise ConfigMismatch(
            f"{path} holds a run of another configuration:\n" + "\n".join(differing) + f"\n{advice}"
        )
    return path


@contextlib.contextmanager
def locked(workdir: Path):
    """Keeps other processes from training in this workdir, until the context or the process ends,
    however it ends.

    Raises:
        CheckpointError: another one is there, with what is known of it.
    """
    path = workdir / "lock"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise CheckpointError(
                f"{workdir} is in use by another training process ({owner}): wait for it, stop it, "
                "or give another --workdir."
            ) from None
        except OSError:
            print(
                f"{path}: this file system has no locks; do not train twice in one workdir",
                file=sys.stderr,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _has_results(path: Path) -> bool:
    """Whether a run has left a line of metrics or a checkpoint."""
    metrics = path / "metrics.jsonl"
    folders = [path / "checkpoints" / name for name in ("last", "best")]
    return (metrics.exists() and metrics.stat().st_size > 0) or any(
        f.is_dir() and any(f.iterdir()) for f in folders
    )


def load_config(workdir) -> dict:
    """The configuration that a run was started with.

    Raises:
        CheckpointError: no run there.
    """
    path = Path(workdir) / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{Path(workdir).absolute()} holds no run (no config.json): train first, lipjax train "
            f"--workdir={workdir}"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def _flat(tree, prefix="") -> dict[str, Any]:
    """The leaves of nested dicts, by their dotted names."""
    if not isinstance(tree, dict) or not tree:
        return {prefix[:-1]: tree}
    flat: dict[str, Any] = {}
    for name, inner in tree.items():
        flat |= _flat(inner, f"{prefix}{name}.")
    return flat


def _reason(error: BaseException) -> str:
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if full or "No space left" in str(error):
        return (
            "the disk is full; free space and run the same command again, the last good "
            "checkpoint is kept"
        )
    return (str(error).splitlines() or [type(error).__name__])[0]


class Checkpoints:
    """The checkpoints of one workdir; a context manager. Saves run in the background, one at a
    time.

    Args:
        workdir: folder of the run.
        keep_last: how many of the newest states to keep; at least 2, so that a damaged one has a
            predecessor.
    """

    def __init__(self, workdir, *, keep_last: int = 2):
        if keep_last < 2:
            raise ValueError(f"keep_last must be at least 2, got {keep_last}.")
        # Orbax refuses relative paths
        self.directory = Path(os.path.abspath(workdir)) / "checkpoints"
        self._last = self._manager("last", keep_last)
        self._best = self._manager("best", 1)

    def _manager(self, name, keep):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, step_prefix=None
        )
        try:
            (self.directory / name).mkdir(parents=True, exist_ok=True)
            return ocp.CheckpointManager(self.directory / name, options=options)
        except OSError as error:
            raise CheckpointError(f"cannot write to {self.directory}: {_reason(error)}.") from error

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            self.close()
        except CheckpointError:
            if kind is None:  # never hide the error that is already on its way
                raise

    def save_last(self, step: int, state, meta: dict) -> None:
        """Saves a whole state (a pytree of arrays) in the background; its arrays may be donated at
        once."""
        self._save(self._last, step, state, meta)

    def save_best(self, step: int, params, meta: dict) -> None:
        """Saves parameters; the one before is removed once this one is complete."""
        self._save(self._best, step, params, meta)

    def _save(self, manager, step, tree, meta):
        try:
            if step in manager.all_steps():
                # A run that was killed after this save and before the next state comes by here
                # again with equal content.
                return
            if jax.process_count() > 1:
                # Orbax numbers the meetings of the processes: two saves at once would meet in
                # another order in each.
                (self._last if manager is self._best else self._best).wait_until_finished()
            named = _named(tree)
            record = {**meta, "leaves": _kinds(named), "checksums": _checksums(named, meta)}
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_copied(named)), meta=ocp.args.JsonSave(record)
                ),
            )
        # Orbax raises many kinds, also those of an earlier background save
        except Exception as error:
            raise CheckpointError(
                f"saving step {step} to {manager.directory} failed: {_reason(error)}."
            ) from error

    def restore_last(self, abstract_state) -> tuple[Any, dict] | None:
        """The newest readable state and its meta, or None if there is none yet.

        A damaged one is skipped, and the message on stderr says so.

        Args:
            abstract_state: pytree of `jax.ShapeDtypeStruct`, with shardings where they matter.

        Raises:
            CheckpointError: there are checkpoints and none can be read; the newest is of another
                architecture (naming the parameter).
        """
        steps = sorted(self._last.all_steps(), reverse=True)
        problems = []
        for step in steps:
            try:
                found = self._restore(self._last, step, abstract_state)
            except AnotherArchitecture:
                raise
            except Exception as error:  # a truncated file surfaces as any of a dozen types
                problems.append(f"step {step}: {_reason(error)}")
                print(
                    f"checkpoint {self._last.directory / str(step)} is damaged and skipped: "
                    f"{_reason(error)}",
                    file=sys.stderr,
                )
                continue
            for damaged in steps[: steps.index(step)]:
                # or it would stand in the way when training comes by there again
                self._last.delete(damaged)
            return found
        if problems:
            raise CheckpointError(
                f"no checkpoint in {self._last.directory} can be read ({'; '.join(problems)}). "
                "Start again in another workdir."
            )
        return None

    def restore_best(self, abstract_params) -> tuple[Any, dict]:
        """The selected parameters and their meta.

        Raises:
            CheckpointError: none there yet, damaged, or of another architecture (naming the
                parameter).
        """
        step = self._best.latest_step()
        if step is None:
            raise CheckpointError(
                f"{self._best.directory} holds no selected checkpoint yet: train first."
            )
        try:
            params, meta = self._restore(self._best, step, abstract_params)
        except AnotherArchitecture:
            raise
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {self._best.directory / str(step)} cannot be read: {_reason(error)}."
            ) from error
        return params, meta

    def _restore(self, manager, step, abstract):
        named = _named(abstract)
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        wanted = _kinds(named)
        stored = meta.pop("leaves", wanted)
        checksums = meta.pop("checksums", {})
        for name in sorted(stored.keys() | wanted.keys()):
            if stored.get(name) != wanted.get(name):
                raise AnotherArchitecture(
                    f"checkpoint {manager.directory / str(step)} is of another network or data "
                    f"set: its {name} is {stored.get(name, 'absent')}, here it is "
                    f"{wanted.get(name, 'absent')}."
                )

        failed: Exception | None = None
        try:
            state = _read(manager, step, named)
        except Exception as error:  # a truncated file surfaces as any of a dozen types
            failed = error
        # All or none: the sums below are those of all processes together.
        if hosts.maximum(failed is not None)[0]:
            raise failed or ValueError("another process could not read it")

        for name, found in _checksums(state, meta).items():
            if checksums.get(name, found) != found:
                raise ValueError(f"{name} is not what was saved: its checksum differs")
        leaves = [state[name] for name in named]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves), meta

    def wait(self) -> None:
        """Returns when everything that was saved is on disk; raises what a background save met."""
        for manager in (self._last, self._best):
            try:
                manager.wait_until_finished()
                manager.check_for_errors()
            except Exception as error:
                raise CheckpointError(
                    f"saving to {manager.directory} failed: {_reason(error)}."
                ) from error

    def close(self) -> None:
        """Waits, then releases Orbax's threads."""
        try:
            self.wait()
        finally:
            for manager in (self._last, self._best):
                manager.close()


def _read(manager, step, named):
    """The state of a step as `named` says, read by each process for itself."""
    if jax.process_count() == 1:
        return manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(named))
        ).state
    # The manager lets the processes meet at the end, where one that could not read would never
    # come.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix="alone",
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        return reader.restore(
            manager.directory / str(step) / "state", args=ocp.args.StandardRestore(named)
        )


def _named(tree) -> dict[str, Any]:
    """The leaves by their path: Orbax cannot sort the mixed keys (numbers and words) of an
    nnx.Sequential."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _kinds(named) -> dict[str, str]:
    return {
        name: f"{np.dtype(leaf.dtype).name} {tuple(leaf.shape)}" for name, leaf in named.items()
    }


def _checksums(named, meta) -> dict[str, int]:
    """A number for each leaf, and one for `meta`. Orbax's formats check their own structure, not
    the values in it."""
    on_devices = {name: leaf for name, leaf in named.items() if isinstance(leaf, jax.Array)}
    on_host = {name: leaf for name, leaf in named.items() if name not in on_devices}
    found = jax.device_get(_sums_of_bits(on_devices))
    # What is on the host may be too much for the device.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        found |= jax.device_get(_sums_of_bits(on_host))
    sums = {name: int(value) for name, value in found.items()}
    return {**sums, "meta": zlib.crc32(json.dumps(meta, sort_keys=True).encode())}


@jax.jit
def _sums_of_bits(named):
    return {name: _sum_of_bits(leaf) for name, leaf in named.items()}


def _sum_of_bits(leaf):
    """The sum of a bijective hash of each word and its position (MurmurHash3's last steps), modulo
    2^32.

    So every change within one word is seen for certain, any other misses it with probability 2^-32.
    """
    # Of 8 bytes: one more axis, of 2.
    size = min(leaf.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(leaf, f"uint{8 * size}").astype(jnp.uint32)

    # Not by one flat index, which would need a reshape over devices.
    position = jnp.zeros((), jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position += along * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]

    words ^= position * jnp.uint32(0x9E3779B1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words = (words ^ (words >> shift)) * jnp.uint32(factor)
    return jnp.sum(words ^ (words >> 16), dtype=jnp.uint32)


_copy = jax.jit(jnp.copy)


def _copied(tree):
    """A copy whose buffers nobody donates: on CPU a background save would read them after the next
    step reused them."""
    if jax.default_backend() != "cpu":
        return tree  # the copy to the host is made before save returns
    return {
        name: _copy(leaf) if isinstance(leaf, jax.Array) else np.array(leaf)
        for name, leaf in tree.items()
    }
