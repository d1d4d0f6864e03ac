"""The vectors of the power iterations between steps: how they are packed, where they begin, and
where they lie.

Each training example has a vector for each affine layer, so that a step's few iterations go on
where those of the epoch before ended. They are by far the largest part of the state.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lipjax import bounds
from lipjax.norms import power
from lipjax.training import feeding, schedules

# Types of the stored singular vectors, and the integers that hold their bits: XLA's CPU backend
# updates rows of integer arrays in place, but widens a whole array of narrow floats to do so
# (measured: 0.2 s a step instead of 0.5 ms for 1/3 of mnist_small's vectors).
VECTOR_TYPES = {"float32": None, "bfloat16": jnp.uint16, "float8_e4m3fn": jnp.uint8}


# --------------------------------------------------------------------------------------- packing


def pack_vector(vector: jax.Array, dtype: str) -> jax.Array:
    """A unit vector as the state stores it.

    It is scaled to entries of size 1 (float8 keeps three bits of mantissa and few of exponent) and
    rounded to `dtype`; narrow types are stored as the integers of their bits. Zero is zero in all
    of them.
    """
    # float8 has no infinity and turns what is too large into NaN: a vector with all its weight on a
    # few of many entries.
    largest = float(jnp.finfo(dtype).max)
    scaled = jnp.clip(vector * np.sqrt(vector.size), -largest, largest).astype(dtype)
    bits = VECTOR_TYPES[dtype]
    return scaled if bits is None else jax.lax.bitcast_convert_type(scaled, bits)


def unpack_vector(stored: jax.Array, dtype: str) -> jax.Array:
    """The float32 vector, of any scale, that `pack_vector` stored."""
    if VECTOR_TYPES[dtype] is not None:
        stored = jax.lax.bitcast_convert_type(stored, jnp.dtype(dtype))
    return stored.astype(jnp.float32)


def names_of(config) -> list[str]:
    """The names of the vectors that training needs, in whichever of its modes."""
    modes = map(bounds.mode_of, schedules.modes_of(config))
    return list(dict.fromkeys(name for mode in modes for name in mode.vectors))


def initial_vectors(network, config, examples: int, input_shape) -> dict[str, tuple]:
    """The packed vectors before the first step, all zero.

    The fresh component of the first warm start makes them a cold start, for each example once.

    Returns:
        by the names of `names_of`: "local" a tuple of ``(rows, *shape)`` for `examples` in whole
        batches, "global" one of ``shape``, an array for each affine layer.
    """
    dtype = VECTOR_TYPES[config.vectors.dtype] or jnp.dtype(config.vectors.dtype)
    shapes = bounds.vector_shapes(network, input_shape)
    rows = config.batch_size * -(-examples // config.batch_size)
    leading = {"local": (rows,), "global": ()}
    return {
        name: tuple(jnp.zeros((*leading[name], *shape), dtype) for shape in shapes)
        for name in names_of(config)
    }


# ------------------------------------------------------------------------------------ in a step


def global_starts(stored: dict, key: jax.Array, dtype: str) -> dict[str, tuple]:
    """Where the iterations of the examples' common norms begin; {} in a mode without them."""
    if "global" not in stored:
        return {}
    # The 0 keeps the draws of runs that were started with earlier versions.
    keys = [jax.random.fold_in(jax.random.fold_in(key, n), 0) for n in range(len(stored["global"]))]
    starts = [
        power.refresh(unpack_vector(vector, dtype), key)
        for vector, key in zip(stored["global"], keys, strict=True)
    ]
    return {"global": tuple(starts)}


def local_starts(stored: dict, rows: jax.Array, key: jax.Array, dtype: str) -> dict[str, tuple]:
    """Where those of the examples at `rows` begin, ``(rows, *shape)``; {} in a mode without."""
    if "local" not in stored:
        return {}
    # One fresh direction for all examples: it has to be new in each step, not in each example.
    refresh = jax.vmap(power.refresh, in_axes=(0, None))
    starts = [
        refresh(unpack_vector(vectors[rows], dtype), jax.random.fold_in(key, n))
        for n, vectors in enumerate(stored["local"])
    ]
    return {"local": tuple(starts)}


def store_vectors(stored: dict, found: dict, rows: jax.Array, dtype: str) -> dict[str, tuple]:
    """`stored` with the vectors that the iterations ended with, those of examples at `rows`."""

    def pack(vector):
        return pack_vector(vector, dtype)

    new = {}
    if "local" in stored:
        pairs = zip(stored["local"], found["local"], strict=True)
        new["local"] = tuple(old.at[rows].set(jax.vmap(pack)(vectors)) for old, vectors in pairs)
    if "global" in stored:
        new["global"] = tuple(map(pack, found["global"]))
    return new


# ---------------------------------------------------------------------------- in the host's memory


class VectorStore:
    """Where the vectors of the examples are between calls of the function of `make_steps`.

    With `vectors.store` "host" they lie in this process's memory, packed, and each call's rows
    travel to the devices and back. Else they are part of the state on the devices, and every method
    returns the state as it is.

    Args:
        examples: training examples.
        max_steps: steps of a call, at most.

    Attributes:
        rows_for: for how many examples the state on the devices has room: the argument of
            `initial_state`.

    Raises:
        ValueError: store "host" with several processes.
    """

    def __init__(self, config, examples: int, mesh: Mesh, max_steps: int):
        local = "local" in names_of(config)
        self.host = config.vectors.store == "host" and local
        if self.host and jax.process_count() > 1:
            raise ValueError(
                "vectors.store 'host' is for one process: with several give 'example', which "
                "splits the vectors over all devices, and a narrow vectors.dtype."
            )
        self.seed = config.seed
        self.examples = examples
        self.size = config.batch_size
        self.slots = -(-examples // self.size)
        self.mesh = mesh
        self.max_steps = max_steps
        self.rows_for = max_steps * self.size if self.host else examples
        self._kept: list[np.ndarray] = []

    def whole_state(self, state):
        """The state with the vectors of all examples, as a checkpoint holds it.

        `state` may consist of `jax.ShapeDtypeStruct`.
        """
        if not self.host:
            return state
        if not self._kept:
            rows = self.size * self.slots
            self._kept = [np.zeros((rows, *v.shape[1:]), v.dtype) for v in state.vectors["local"]]
        kept: Any = tuple(self._kept)
        return dataclasses.replace(state, vectors={**state.vectors, "local": kept})

    def restored(self, state):
        """The state on the devices, of a `whole_state` that was read from a checkpoint."""
        if not self.host:
            return state
        self._kept = [np.array(vectors) for vectors in state.vectors["local"]]
        room = [np.zeros((self.rows_for, *v.shape[1:]), v.dtype) for v in self._kept]
        return self._with(state, room)

    def load(self, state, step: int, count: int):
        """Before a call: the state with the vectors of the `count` steps from `step` on."""
        if not self.host:
            return state
        self.whole_state(state)
        rows = self._rows(step, count)
        loaded = []
        for kept in self._kept:
            part = np.zeros((self.size, self.max_steps, *kept.shape[1:]), kept.dtype)
            part[:, :count] = kept[rows]
            loaded.append(part.reshape(self.rows_for, *kept.shape[1:]))
        return self._with(state, loaded)

    def save(self, state, step: int, count: int) -> None:
        """After the call: keeps the vectors of its steps."""
        if not self.host:
            return
        rows = self._rows(step, count)
        for kept, vectors in zip(self._kept, state.vectors["local"], strict=True):
            part = np.asarray(vectors).reshape(self.size, self.max_steps, *kept.shape[1:])
            kept[rows] = part[:, :count]

    def _rows(self, step, count):
        """Rows of the vectors of the examples of these steps, ``(batch_size, count)``."""
        epoch, first = divmod(step, self.examples // self.size)
        order = feeding.epoch_order(self.seed, epoch, self.examples, self.size)
        return np.arange(self.size)[:, None] * self.slots + order[first : first + count].T

    def _with(self, state, vectors):
        placed = tuple(feeding.put(v, self.mesh, PartitionSpec("data")) for v in vectors)
        return dataclasses.replace(state, vectors={**state.vectors, "local": placed})
