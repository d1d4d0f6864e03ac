"""What each training step gets: which examples, their images, and their vectors where these lie in
the host's memory.

The training set is divided into `stripes`, one for each place of a batch, and a device has those of
its places. So images and vectors never travel from device to device, each process reads what its
own devices need, and which examples meet in a batch depends on the seed alone. The position in the
data is the number of the step.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lipjax import bounds
from lipjax.data import pipeline, sets

# Steps in one call of the device, at most.
CALL = 32

# Training sets are kept on the devices if each device's share is at most so large.
RESIDENT_BYTES = 2**31


def steps_per_epoch(config, examples: int) -> int:
    """Whole batches in `examples` training examples.

    Raises:
        ValueError: not one.
    """
    if examples < config.batch_size:
        raise ValueError(
            f"batch_size {config.batch_size} is larger than the training set of {examples} "
            "examples."
        )
    return examples // config.batch_size


def stripes(seed: int, examples: int, batch_size: int) -> np.ndarray:
    """Which examples take which place in batches: ``(batch_size, slots)`` positions in the training
    set, -1 for none.

    Row j holds those that are ever the j-th of a batch. So a device that works on some places of
    each batch needs the images and vectors of their rows alone, and which examples meet does not
    depend on the number of devices.
    """
    steps, left = divmod(examples, batch_size)
    # [seed] and [seed, 0] are one seed to NumPy: this must not be that of the first epoch.
    order = np.random.default_rng([seed, 0, 1]).permutation(examples).astype(np.int32)
    table = np.full((batch_size, steps + (left > 0)), -1, np.int32)
    table[:, :steps] = order[: steps * batch_size].reshape(batch_size, steps)
    table[:left, steps:] = order[steps * batch_size :, None]
    return table


# of a large set it takes a second, and readers ahead may be in the next epoch
@functools.lru_cache(maxsize=3)
def epoch_order(seed: int, epoch: int, examples: int, batch_size: int) -> np.ndarray:
    """Slots of one epoch's batches, ``(steps, batch_size)``: the columns of `stripes`; a function
    of seed and epoch alone.

    Each example comes up at most once; where a stripe has one more than there are steps, one sits
    out that epoch.
    """
    steps, left = divmod(examples, batch_size)
    draws = np.random.default_rng([seed, epoch]).random((batch_size, steps + (left > 0)))
    draws[left:, steps:] = np.inf  # no example there
    order = np.argsort(draws, axis=1)[:, :steps].T.astype(np.int32)
    order.flags.writeable = False  # all who ask get this one
    return order


class Feeder:
    """``(step, count) -> (images, labels, slots, kept_slots)``, the arguments of the function of
    `training.make_steps` (shapes there) for `count` steps from `step` on, all of one epoch.

    Where a device's share of the training set is at most `RESIDENT_BYTES` it lies there, and only
    slots travel. Else each call takes the images of its steps, which `pipeline.batches` reads
    ahead; those that the pipeline augments too. Each process reads what its own devices need. Close
    it (or use it in a ``with``).

    Args:
        most: the largest count.

    Raises:
        ValueError: a training set smaller than a batch; when called, steps of more than one epoch,
            or more than `most`.
        data.DataError: when called, what `pipeline.batches` raises.
    """

    def __init__(self, train: sets.Dataset, config, mesh: Mesh, most: int):
        self.train, self.config, self.mesh, self.most = train, config, mesh, most
        self.stripes = stripes(config.seed, len(train.labels), config.batch_size)
        self.size = config.batch_size
        self.steps_per_epoch = steps_per_epoch(config, len(train.labels))
        self._places = places(self.size, mesh)
        self._augment = config.data.augment and pipeline.augments(train)
        self._resident: tuple | None = None
        self._batches: pipeline.Batches | None = None
        self._next = -1  # the step that they come to next
        if not self._augment and train.images.nbytes // mesh.size <= RESIDENT_BYTES:
            mine = np.maximum(self.stripes[self._places], 0)  # anything where there is none
            self._resident = tuple(
                self._split(stored[mine.reshape(-1)], mine.shape[1])
                for stored in (train.images, train.labels)
            )

    def __call__(self, step: int, count: int) -> tuple:
        epoch, first = divmod(step, self.steps_per_epoch)
        if not 0 < count <= min(self.most, self.steps_per_epoch - first):
            raise ValueError(
                f"expected 1 to {min(self.most, self.steps_per_epoch - first)} steps from step "
                f"{step} on, got {count}."
            )
        order = epoch_order(self.config.seed, epoch, len(self.train.labels), self.size)[
            first : first + count
        ]
        slots = np.zeros((self.most, self.size), np.int32)
        slots[:count] = order
        batches = PartitionSpec(None, "data")
        where = put(slots, self.mesh, batches)
        in_turn = put(
            np.tile(np.arange(self.most, dtype=np.int32)[:, None], self.size), self.mesh, batches
        )
        # `Keeper` brings those of the call
        kept = in_turn if self.config.vectors.store == "host" else where
        if self._resident:
            return *self._resident, where, kept
        parts = list(itertools.islice(self._from(step), count))
        self._next = step + count
        parts += [parts[-1]] * (self.most - count)
        images, labels = (np.stack(column, axis=1) for column in zip(*parts, strict=True))
        streamed = (
            self._split(column.reshape(-1, *column.shape[2:]), self.most)
            for column in (images, labels)
        )
        return *streamed, in_turn, kept

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of what a call returns, to compile for before anything is read."""
        rows = self.size * (self.stripes.shape[1] if self._resident else self.most)
        columns = [
            (self.train.images.shape[1:], self.train.images.dtype),
            ((), self.train.labels.dtype),
        ]
        slots = jax.ShapeDtypeStruct((self.most, self.size), np.int32)
        return (
            *(jax.ShapeDtypeStruct((rows, *shape), dtype) for shape, dtype in columns),
            slots,
            slots,
        )

    def _from(self, step):
        """Batches of this process's places from a step on."""
        if self._batches is None or self._next != step:
            self.close()
            options = self.config.data
            self._batches = pipeline.batches(
                self.train,
                _Positions(self, step),
                seed=self.config.seed,
                first_step=step,
                workers=options.workers,
                read_ahead=options.read_ahead,
                augment=self._augment,
            )
        return self._batches

    def _split(self, mine, n):
        """An array over all devices, of this process's rows: n for each of its places, one place
        after the other."""
        split = NamedSharding(self.mesh, PartitionSpec("data"))

        def part(index):
            first = np.searchsorted(self._places, (index[0].start or 0) // n) * n
            return np.ascontiguousarray(mine[first : first + n * (self.size // self.mesh.size)])

        return jax.make_array_from_callback((self.size * n, *mine.shape[1:]), split, part)

    def close(self) -> None:
        """Ends what reads ahead."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def __enter__(self) -> "Feeder":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Keeper:
    """Where the vectors of the examples are between calls of the function of `make_steps`.

    With store "host" they lie in this process's memory, packed, and each call's rows travel to the
    devices and back; else they are part of the state on the devices, and nothing here does
    anything.

    Args:
        examples: training examples.
        most: steps of a call, at most.

    Attributes:
        rows_for: for how many examples the state on the devices has room: the argument of
            `initial_state`.

    Raises:
        ValueError: store "host" with several processes.
    """

    def __init__(self, config, examples: int, mesh: Mesh, most: int):
        self.host = (
            config.vectors.store == "host" and "local" in bounds.mode_of(config.bound.mode).vectors
        )
        if self.host and jax.process_count() > 1:
            raise ValueError(
                "vectors.store 'host' is for one process: with several give 'example', which "
                "splits the vectors over all "
                "devices, and a narrow vectors.dtype."
            )
        self.seed, self.examples, self.size, self.mesh, self.most = (
            config.seed,
            examples,
            config.batch_size,
            mesh,
            most,
        )
        self.rows_for = most * self.size if self.host else examples
        self._kept: list[np.ndarray] = []

    def whole(self, state):
        """The state with the vectors of all examples, as a checkpoint holds it. Also of
        `jax.ShapeDtypeStruct`."""
        if not self.host:
            return state
        if not self._kept:
            rows = self.size * -(-self.examples // self.size)
            self._kept = [np.zeros((rows, *v.shape[1:]), v.dtype) for v in state.vectors["local"]]
        kept: Any = tuple(self._kept)
        return dataclasses.replace(state, vectors={**state.vectors, "local": kept})

    def adopt(self, state):
        """The state on the devices of a `whole` one that was restored."""
        if not self.host:
            return state
        self._kept = [np.array(v) for v in state.vectors["local"]]
        return self._with(
            state, [np.zeros((self.rows_for, *v.shape[1:]), v.dtype) for v in self._kept]
        )

    def lend(self, state, step: int, count: int):
        """Before a call: the state with the vectors of its steps."""
        if not self.host:
            return state
        self.whole(state)
        rows = self._rows(step, count)
        lent = []
        for kept in self._kept:
            part = np.zeros((self.size, self.most, *kept.shape[1:]), kept.dtype)
            part[:, :count] = kept[rows]
            lent.append(part.reshape(self.rows_for, *kept.shape[1:]))
        return self._with(state, lent)

    def take_back(self, state, step: int, count: int) -> None:
        """After the call."""
        if self.host:
            rows = self._rows(step, count)
            for kept, lent in zip(self._kept, state.vectors["local"], strict=True):
                kept[rows] = np.asarray(lent).reshape(self.size, self.most, *kept.shape[1:])[
                    :, :count
                ]

    def _rows(self, step, count):
        epoch, first = divmod(step, self.examples // self.size)
        order = epoch_order(self.seed, epoch, self.examples, self.size)[first : first + count]
        return np.arange(self.size)[:, None] * -(-self.examples // self.size) + order.T

    def _with(self, state, vectors):
        placed = tuple(put(v, self.mesh, PartitionSpec("data")) for v in vectors)
        return dataclasses.replace(state, vectors={**state.vectors, "local": placed})


class _Positions:
    """A sequence of each step's positions in the training set, at a process's places, from a step
    to the end of training.

    It travels to worker processes, and computes orders there.
    """

    def __init__(self, feeder: Feeder, first_step: int):
        self.stripes, self.first_step = feeder.stripes[feeder._places], first_step
        self.places, self.size, self.seed = feeder._places, feeder.size, feeder.config.seed
        self.examples, self.steps_per_epoch = len(feeder.train.labels), feeder.steps_per_epoch
        self.steps = feeder.config.schedule.epochs * self.steps_per_epoch

    def __len__(self):
        return self.steps - self.first_step

    def __getitem__(self, i):
        epoch, step = divmod(self.first_step + int(i), self.steps_per_epoch)
        order = epoch_order(self.seed, epoch, self.examples, self.size)[step, self.places]
        return self.stripes[np.arange(len(self.places)), order]


def places(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The places of a batch on this process's devices, ascending."""
    split = NamedSharding(mesh, PartitionSpec("data"))
    indices = split.addressable_devices_indices_map((batch_size,)).values()
    return np.concatenate(
        sorted((np.arange(batch_size)[index] for index in indices), key=lambda part: part[0])
    )


def put(array: np.ndarray, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """The array on the devices of a mesh; every process has it whole, and sends its own devices
    their parts."""
    return jax.make_array_from_callback(
        array.shape, NamedSharding(mesh, spec), lambda index: array[index]
    )
