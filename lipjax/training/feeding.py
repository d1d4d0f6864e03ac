"""What each training step gets: which examples, and their images.

The training set is divided into `stripes`, one for each place of a batch, and a device has those of
its places. So images and vectors never travel from device to device, each process reads what its
own devices need, and which examples meet in a batch depends on the seed alone. The position in the
data is the number of the step.
"""

import functools
import itertools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lipjax.data import pipeline, sets

# Steps in one call of the device, at most.
MAX_STEPS = 32

# Training sets are kept on the devices if each device's share is at most so large.
RESIDENT_BYTES = 2**31


# ---------------------------------------------------------------------------------------- the order


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


# Of a large set it takes a second, and readers ahead may be in the next epoch.
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


# -------------------------------------------------------------------------------------- the images


class Feeder:
    """``(step, count) -> (images, labels, slots, vector_slots)``, the arguments of the function of
    `training.make_steps` (shapes there) for `count` steps from `step` on, all of one epoch.

    Where a device's share of the training set is at most `RESIDENT_BYTES` it lies there, and only
    slots travel. Else each call takes the images of its steps, which `pipeline.batches` reads
    ahead; those that the pipeline augments too. Each process reads what its own devices need. Close
    it (or use it in a ``with``).

    Args:
        max_steps: the largest count.

    Raises:
        ValueError: a training set smaller than a batch; when called, steps of more than one epoch,
            or more than `max_steps`.
        data.DataError: when called, what `pipeline.batches` raises.
    """

    def __init__(self, train: sets.Dataset, config, mesh: Mesh, max_steps: int):
        self.train = train
        self.config = config
        self.mesh = mesh
        self.max_steps = max_steps
        self.size = config.batch_size
        self.stripes = stripes(config.seed, len(train.labels), self.size)
        self.steps_per_epoch = steps_per_epoch(config, len(train.labels))
        self._places = places(self.size, mesh)
        self._augment = config.data.augment and pipeline.augments(train)

        # What reads ahead, and the step whose batch it comes to next.
        self._batches: pipeline.Batches | None = None
        self._next = -1

        self._resident: tuple | None = None
        if resident(train, config, mesh):
            mine = np.maximum(self.stripes[self._places], 0)  # anything where there is none
            self._resident = tuple(
                self._split(stored[mine.reshape(-1)], mine.shape[1])
                for stored in (train.images, train.labels)
            )

    def __call__(self, step: int, count: int) -> tuple:
        epoch, first = divmod(step, self.steps_per_epoch)
        allowed = min(self.max_steps, self.steps_per_epoch - first)
        if not 0 < count <= allowed:
            raise ValueError(f"expected 1 to {allowed} steps from step {step} on, got {count}.")

        # What each place takes of its stripe, in each step; and of what came for this call alone.
        order = epoch_order(self.config.seed, epoch, len(self.train.labels), self.size)
        slots = np.zeros((self.max_steps, self.size), np.int32)
        slots[:count] = order[first : first + count]
        turns = np.tile(np.arange(self.max_steps, dtype=np.int32)[:, None], self.size)
        batches = PartitionSpec(None, "data")
        of_stripe = put(slots, self.mesh, batches)
        in_turn = put(turns, self.mesh, batches)

        # `VectorStore` brings the vectors of the call.
        vector_slots = in_turn if self.config.vectors.store == "host" else of_stripe
        if self._resident:
            return *self._resident, of_stripe, vector_slots
        return *self._read(step, count), in_turn, vector_slots

    def _read(self, step: int, count: int):
        """Images and labels of `count` steps, over the devices."""
        parts = list(itertools.islice(self._from(step), count))
        self._next = step + count
        parts += [parts[-1]] * (self.max_steps - count)
        for column in zip(*parts, strict=True):
            stacked = np.stack(column, axis=1)
            yield self._split(stacked.reshape(-1, *stacked.shape[2:]), self.max_steps)

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of what a call returns, to compile for before anything is read."""
        return shapes_of_call(self.train, self.config, self.mesh, self.max_steps)

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


def resident(train: sets.Dataset, config, mesh: Mesh) -> bool:
    """Whether the images of a training set lie on the devices all the time."""
    if config.data.augment and pipeline.augments(train):
        return False
    return train.images.nbytes // mesh.size <= RESIDENT_BYTES


def shapes_of_call(train: sets.Dataset, config, mesh: Mesh, max_steps: int):
    """What a `Feeder` of these arguments gives, as `jax.ShapeDtypeStruct`."""
    size = config.batch_size
    steps = -(-len(train.labels) // size) if resident(train, config, mesh) else max_steps
    slots = jax.ShapeDtypeStruct((max_steps, size), np.int32)
    return (
        jax.ShapeDtypeStruct((size * steps, *train.images.shape[1:]), train.images.dtype),
        jax.ShapeDtypeStruct((size * steps,), train.labels.dtype),
        slots,
        slots,
    )


class _Positions:
    """A sequence of each step's positions in the training set, at a process's places, from a step
    to the end of training.

    It travels to worker processes, and computes orders there.
    """

    def __init__(self, feeder: Feeder, first_step: int):
        self.stripes = feeder.stripes[feeder._places]
        self.places = feeder._places
        self.size = feeder.size
        self.seed = feeder.config.seed
        self.examples = len(feeder.train.labels)
        self.steps_per_epoch = feeder.steps_per_epoch
        self.first_step = first_step
        self.steps = feeder.config.schedule.epochs * self.steps_per_epoch

    def __len__(self):
        return self.steps - self.first_step

    def __getitem__(self, i):
        epoch, step = divmod(self.first_step + int(i), self.steps_per_epoch)
        order = epoch_order(self.seed, epoch, self.examples, self.size)[step, self.places]
        return self.stripes[np.arange(len(self.places)), order]


# ------------------------------------------------------------------------------------- the devices


def places(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The places of a batch on this process's devices, ascending."""
    split = NamedSharding(mesh, PartitionSpec("data"))
    indices = split.addressable_devices_indices_map((batch_size,)).values()
    parts = [np.arange(batch_size)[index] for index in indices]
    return np.concatenate(sorted(parts, key=lambda part: part[0]))


def put(array: np.ndarray, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """The array on the devices of a mesh.

    Every process has it whole, and sends its own devices their parts.
    """
    return jax.make_array_from_callback(
        array.shape, NamedSharding(mesh, spec), lambda index: array[index]
    )
