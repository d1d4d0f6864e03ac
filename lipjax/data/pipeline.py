"""Batches of large image sets, decoded and augmented ahead of the training step, in worker
processes (Grain).

The element that workers pass on is a step's whole batch, and step s is a function of ``(rows[s],
seed, s)`` alone: the position in the data is the step's number, and neither a restart nor the
number of workers changes an image.
"""

import dataclasses
import gc
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lipjax.data.dataset import Dataset
from lipjax.data.errors import DataError
from lipjax.data.images import Images, pixels

# Of a random resized crop, as usual for ImageNet: share of the image's area, width over height.
AREAS = (0.08, 1.0)
ASPECTS = (3 / 4, 4 / 3)


def augments(dataset: Dataset) -> bool:
    """Whether `batches` can augment the set (`random_resized_crop`): it is on disk and has an
    image_size.

    The others are for `data.random_crop_and_flip`, on the device.
    """
    return isinstance(dataset.images, Images) and dataset.images.image_size is not None


def batches(
    dataset: Dataset,
    rows: np.ndarray | Sequence[np.ndarray],
    *,
    seed: int,
    first_step: int,
    workers: int = 0,
    read_ahead: int = 2,
    augment: bool = False,
) -> "Batches":
    """An iterator over ``(images, labels)`` of each step: ``(batch, H, W, C)`` as stored,
    ``(batch,)`` int32.

    Work starts at once. Close it (or use it in a ``with``) when it is left before its end.

    Args:
        dataset: images in memory are taken in this process, whatever `workers` says.
        rows: ``(steps, batch)`` positions in `dataset`, or any picklable sequence of a step's
            positions.
        seed, first_step: the seed of the run and the number of the step of ``rows[0]``, for
            augmentation: an example's randomness is ``default_rng([seed, step, position])``. So
                ``rows[n:]`` with ``first_step + n`` is the rest.
        workers: processes; 0: a thread of this process.
        read_ahead: batches that are decoded before they are asked for: in all, but at least one a
            worker.
        augment: `random_resized_crop` in place of the central crop; see `augments`.

    Raises:
        ValueError: an augmentation that is not for this set; negative numbers.
        DataError: while iterating: a damaged record, with its file; a worker that died.
    """
    if augment and not augments(dataset):
        raise ValueError(
            f"{dataset.name} has no image_size: its crops and flips are made on the device "
            "(data.random_crop_and_flip), "
            "not by the pipeline. Give an image_size for random resized crops."
        )
    for name, value in (
        ("workers", workers),
        ("read_ahead", read_ahead),
        ("first_step", first_step),
        ("seed", seed),
    ):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}.")
    return Batches(
        _Steps(dataset.images, rows, seed, first_step, augment), dataset.labels, workers, read_ahead
    )


class Batches(Iterator[tuple[np.ndarray, np.ndarray]]):
    """What `batches` returns; `close` ends its workers, as the end of the iteration and every error
    do."""

    def __init__(self, steps: "_Steps", labels: np.ndarray, workers: int, read_ahead: int):
        import grain
        from absl import flags

        self._steps = steps
        self._labels = labels
        self._next = 0
        if isinstance(steps.images, np.ndarray):
            workers = 0
        threads = min(1, read_ahead) if workers == 0 else 0
        dataset = grain.MapDataset.source(steps).to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads * read_ahead)
        )
        if workers:
            # Grain reads absl flags, which have their defaults outside absl's app.run
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            ahead = max(1, math.ceil(read_ahead / workers))
            options = grain.MultiprocessingOptions(
                num_workers=workers, per_worker_buffer_size=ahead
            )
            dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
        iterator = iter(dataset)
        self._open: list[Any] = [iterator]  # empty when closed
        # Also of one that nobody closed, and at the end of the program.
        self._end = weakref.finalize(self, _close, self._open)
        # Its state names all workers, so that the next line starts, and `close` ends, each of them.
        iterator.get_state()
        iterator.start_prefetch()

    def __iter__(self) -> "Batches":
        return self

    def __len__(self) -> int:
        """Steps in all."""
        return len(self._steps)

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        if self._next == len(self):
            self.close()
            raise StopIteration
        if not self._open:
            raise ValueError(
                "the batches were closed: make new ones, from the step on that is needed."
            )
        try:
            images = next(self._open[0]).view(np.ndarray)
        except RuntimeError as error:
            self.close()
            if "exit code" not in str(error):  # Grain's word for it
                raise
            raise DataError(
                f"a worker of the input pipeline died: {error} If memory ran out, or shared memory "
                "(/dev/shm), give fewer "
                "--config.data.workers or a smaller --config.data.read_ahead."
            ) from error
        except BaseException:
            self.close()
            raise
        labels = self._labels[np.asarray(self._steps.rows[self._next])]
        self._next += 1
        return images, labels

    def close(self) -> None:
        """Ends the workers and forgets what was read ahead; may be called again."""
        self._end()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _close(iterators):
    """Closes them and lets them go: they refer to each other, and hold on to the shared memory of a
    batch."""
    while iterators:
        iterators.pop().close()
    gc.collect()


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Images of each step, as the random access that Grain reads from; it travels to the
    workers."""

    images: np.ndarray | Images
    rows: np.ndarray | Sequence[np.ndarray]
    seed: int
    first_step: int
    augment: bool

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, step):
        rows = np.asarray(self.rows[step])
        if not self.augment:
            return self.images[rows]
        size = self.images.image_size
        out = np.empty((len(rows), size, size, self.images.shape[3]), np.uint8)
        for i, row in enumerate(rows.tolist()):
            generator = np.random.default_rng([self.seed, self.first_step + step, row])
            out[i] = pixels(random_resized_crop(self.images.picture(row), generator, size))
        return out


def random_resized_crop(image, generator: np.random.Generator, size: int):
    """A random part of a Pillow image, resized to ``size x size`` (bilinear, antialiased), mirrored
    with probability 1/2.

    Its area is uniform in 8 to 100 % of the image's, its aspect log-uniform in 3/4 to 4/3, its
    place uniform. If ten such parts do not fit into the image, it is the largest central one with
    an aspect in that range.
    """
    from PIL import Image

    width, height = image.size
    for _ in range(10):
        area = width * height * generator.uniform(*AREAS)
        aspect = math.exp(generator.uniform(math.log(ASPECTS[0]), math.log(ASPECTS[1])))
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = (
                int(generator.integers(width - w + 1)),
                int(generator.integers(height - h + 1)),
            )
            break
    else:
        w = min(width, round(height * ASPECTS[1]))
        h = min(height, round(width / ASPECTS[0]))
        left = (width - w) // 2
        top = (height - h) // 2
    image = image.resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h)
    )
    if generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def _start_worker(index, count):
    """In each worker, before it unpickles the data."""
    import jax

    # The accelerator is the trainer's; nothing here computes with JAX, and if something did, it
    # would be on the CPU.
    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_PLATFORMS"] = "cpu"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the trainer ends its workers
    # A trainer that is killed cannot.
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent():
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
