"""What a configuration needs, before anything runs: memory, operations, and a range of times.

    lipjax plan --config=cifar10_maxmin --device=h200 --devices=8

Exact, by the shapes of what training itself creates: parameters, gradients, optimizer state,
vectors, images, checkpoints, and the operations that `counted` counts. XLA's own figure, if it is
asked (`compiled_step`): the temporary memory of a step. A guess, and so a range: times.
"""

import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh
from rich.console import Console
from rich.table import Table

from lipjax import bounds
from lipjax.data import sets
from lipjax.training import config as configuration
from lipjax.training import feeding, schedules, sharding, vectors
from lipjax.training import state as states
from lipjax.training import step as stepping
from lipjax.training.data_sheets import Device, device_here, device_of

# The shares of the floor (operations or traffic at the data sheet's rates) that steps reached on
# two CPU cores: a small net for MNIST the least, 8C2F the most (benchmarks/README.md). On a GPU one
# step was measured (6C2F on an H100, 11.4 ms), on a TPU none: there these are an assumption.
SHARES = (0.07, 0.4)

# Seconds from the start of one operation on an accelerator to that of the next, and operations for
# each product of matrices: assumptions, which rule where networks are small.
LAUNCH_SECONDS = (3e-6, 10e-6)
LAUNCHES = (3, 20)

# ---------------------------------------------------------------------------------------- data sets


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a plan has to know of a data set: `examples` to train on, validation images held out,
    of `input_shape` and `pixels` (a dtype) as stored.

    Raises:
        ValueError: a shape that is not three positive numbers, no example, fewer than 2 classes.
    """

    input_shape: tuple[int, ...]
    classes: int
    examples: int
    pixels: str = "uint8"

    def __post_init__(self):
        if len(self.input_shape) != 3 or min(self.input_shape) < 1:
            raise ValueError(
                "a shape is height,width,channels, for instance 224,224,3; got "
                f"{','.join(map(str, self.input_shape))}."
            )
        if self.examples < 1 or self.classes < 2:
            raise ValueError(
                "expected at least 2 training examples and 2 classes, got "
                f"{self.examples} (validation held out) and {self.classes}."
            )


# Training sets as they are, before a validation split is held out. ImageNet's own sizes vary: the
# usual 224x224.
KNOWN = {
    "digits": Sizes((8, 8, 1), 10, 1797 - sets.DIGITS_TEST, "float32"),
    "mnist": Sizes((28, 28, 1), 10, 60_000),
    "cifar10": Sizes((32, 32, 3), 10, 50_000),
    "cifar100": Sizes((32, 32, 3), 100, 50_000),
    "folder:tiny-imagenet-200": Sizes((64, 64, 3), 200, 100_000),
    "imagenet2012": Sizes((224, 224, 3), 1000, 1_281_167),
}


def sizes_of(
    config,
    examples: int | None = None,
    shape: Sequence[int | str] | None = None,
    classes: int | None = None,
) -> Sizes:
    """`Sizes` of the configuration's data set: as given, else as `KNOWN`, else by loading it.

    Args:
        examples: of the training set, before the validation split is held out.
        shape: ``(height, width, channels)``, numbers or their texts.

    Raises:
        ValueError: as `Sizes`, and a shape that is no numbers.
        data.DataError: as `data.load`, of a set that is not known by its name.
    """
    if shape is not None and not all(str(n).strip().isdigit() for n in shape):
        raise ValueError(
            "a shape is height,width,channels, for instance 224,224,3; got "
            f"{','.join(map(str, shape))}."
        )
    given_shape = tuple(map(int, shape or ()))
    found = KNOWN.get(config.data.name)
    if found is not None and (side := config.data.get("image_size", 0)):
        found = dataclasses.replace(found, input_shape=(side, side, found.input_shape[-1]))
    elif found is None and given_shape and classes and examples:
        found = Sizes(given_shape, classes, examples)
    elif found is None:
        train = configuration.load_data(config).train
        there = tuple(train.images.shape[1:])
        found = Sizes(there, train.classes, len(train.labels), train.images.dtype.name)

    found = dataclasses.replace(
        found,
        input_shape=given_shape or found.input_shape,
        classes=classes or found.classes,
    )
    if config.data.name not in KNOWN and examples is None:
        return found  # validation images are held out of what was loaded
    whole = examples or found.examples
    kept = whole - max(1, round(whole * config.data.validation_fraction))
    return dataclasses.replace(found, examples=min(kept, config.data.train_examples or kept))


# --------------------------------------------------------------------------------------- operations


def products(mode: str, iterations: int, first: bool) -> int:
    """How often a step multiplies with the matrix of one affine layer, forwards, backwards or for
    its gradient, an example.

    The plain step: forwards, backwards (not to the image), gradient. A bound adds, each with its
    gradient: middle and half-width of the box, the row norms (only a kernel gradient: masks have
    none), and the power iteration, without one but for the last half. In front of the first layer
    the box is the same for all examples and costs nothing. Reverse passes of the modes "linear",
    "rows" and "tight" are not counted, and norms that all examples share are no example's.
    """
    plain = 2 if first else 3
    box = 0 if first else 6
    row_norms = 0 if first else 2
    power = 2 * iterations + 1
    added = {"bcp": box, "paper": box + power}
    added |= dict.fromkeys(
        ("local", "linear", "rows", "tight", "tight_rows", "unmasked"), box + row_norms + power
    )
    return plain + added.get(mode, 0)


def _layers(network, shape, mode: str, iterations: int):
    """Of each affine layer: products, operations of one product, entries that one moves."""
    graph = bounds.graph_of(network, jax.ShapeDtypeStruct(shape, jnp.float32))
    nodes = graph.linear_nodes
    for node in nodes:
        what = "plain" if node is nodes[-1] else mode  # the last layer has no norm
        count = products(what, iterations, node is nodes[0])
        operations = 2 * node.size * node.operator.kernel.size / node.shape[-1]
        yield count, operations, 2 * node.size


def counted(network, shape, mode: str, iterations: int) -> float:
    """Floating-point operations of one example in the products of one step, the last layer counted
    as in the plain step."""
    return sum(n * operations for n, operations, _ in _layers(network, shape, mode, iterations))


# ----------------------------------------------------------------------------------------- the plan


@dataclasses.dataclass(frozen=True)
class Part:
    """Bytes of one thing: on each device (or host), and on all together."""

    name: str
    each: int
    total: int
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found, in bytes, operations and seconds.

    Attributes:
        title: configuration, data and devices in words.
        device, devices: what it is planned for.
        steps_per_epoch, epochs: of the training.
        parts: what is on the devices. All are exact; without XLA's own figure a step's temporary
            memory is not among them.
        host_parts: what is in the memory of the hosts.
        checkpoint: bytes of one on disk, before compression.
        operations: of one step on all devices, products of matrices (`counted`); where the mode
            changes, the mean over the epochs.
        step_seconds: of a step, the shortest and the longest that is to be expected; likewise.
    """

    title: str
    device: Device
    devices: int
    steps_per_epoch: int
    epochs: int
    parts: tuple[Part, ...]
    host_parts: tuple[Part, ...]
    checkpoint: int
    operations: float
    step_seconds: tuple[float, float]

    @property
    def each(self) -> int:
        """Bytes of all parts on each device."""
        return sum(part.each for part in self.parts)

    @property
    def left(self) -> float:
        """Bytes that are left on each device; less than 0 where the parts do not fit."""
        return self.device.usable * self.device.memory - self.each

    @property
    def complete(self) -> bool:
        """Whether the parts are all: temporary memory is among them."""
        return any(part.name == "temporary" for part in self.parts)

    def part(self, name: str) -> Part:
        """The part of that name, on the devices or the hosts."""
        return next(part for part in (*self.parts, *self.host_parts) if part.name == name)

    def __str__(self) -> str:
        return _text(self)


def plan(
    config, sizes: Sizes, devices: int, device: Device, *, temporary: int | None = None
) -> Plan:
    """What training needs with this configuration on so many devices. Nothing is allocated and
    nothing compiled.

    The training set is arranged in `batch_size` stripes of ``ceil(examples / batch_size)`` rows;
    images, labels and vectors of the store "example" are such rows, split evenly over the devices.

    Args:
        temporary: bytes of a step's temporary memory on one device, gradient included, as
            `compiled_step` tells them.

    Raises:
        ValueError: as `check_config`; a batch or a part of it that does not divide over the
            devices; fewer examples than a batch; what the network's own function or the
            optimizer's schedule refuses.
    """
    configuration.check_config(config)
    sharding.check_batch(config.batch_size, devices)
    steps_per_epoch = feeding.steps_per_epoch(config, sizes.examples)
    mesh: Any = AbstractMesh((devices,), ("data",))
    state, store = _abstract_state(config, sizes, mesh)
    stepping.examples_at_once(config, mesh, state)  # refuses what does not divide

    hosts = -(-devices // device.per_host)
    rows = -(-sizes.examples // config.batch_size) * config.batch_size
    all_local = rows * sum(_bytes(v) // len(v) for v in state.vectors.get("local", ()))
    common = _bytes(state.vectors.get("global", ()))
    operations, seconds = _mean_time(config, sizes, state.network, devices, device)
    modes = ", then ".join(schedules.modes_of(config))
    return Plan(
        title=(
            f"{config.model.name} on {config.data.name}: {sizes.examples:,} training images "
            f"{sizes.input_shape}, {sizes.classes} classes, mode {modes}, batch "
            f"{config.batch_size}; {devices} x {device.name} on {hosts} host(s)."
        ),
        device=device,
        devices=devices,
        steps_per_epoch=steps_per_epoch,
        epochs=config.schedule.epochs,
        parts=tuple(_on_devices(config, sizes, state, rows, devices, temporary)),
        host_parts=tuple(_on_hosts(config, sizes, all_local if store.host else 0, hosts)),
        checkpoint=sum(map(_bytes, (state.network, state.average, state.optimizer)))
        + common
        + all_local,
        operations=operations,
        step_seconds=seconds,
    )


def _on_devices(config, sizes: Sizes, state, rows: int, devices: int, temporary):
    """What is in the memory of the devices."""
    parameters = _bytes(state.network)
    here = _held(state.network, config, devices)
    split = here < parameters  # then each step gathers all of them beside
    here += parameters if split else 0
    yield Part("parameters", here, devices * here, "split, and gathered" if split else "float32")
    yield Part("gradients", parameters, devices * parameters, "float32")

    moments = _held(state.optimizer, config, devices)
    yield Part("optimizer state", moments, devices * moments, "Adam's two moments")

    if state.average is not None:
        held = _held(state.average, config, devices)
        yield Part("average", held, devices * held, "of the parameters")

    vectors = _bytes(state.vectors.get("global", ()))
    vectors += _bytes(state.vectors.get("local", ())) // devices
    yield Part("vectors", vectors, devices * vectors, config.vectors.dtype)

    resident = sizes.examples * _image_bytes(sizes) // devices <= feeding.RESIDENT_BYTES
    # Of a large set the images of the next call travel while one runs.
    image_rows = rows if resident else 2 * feeding.MAX_STEPS * config.batch_size
    images = image_rows * (_image_bytes(sizes) + 4) // devices  # 4: the label
    yield Part("training images", images, devices * images, "all" if resident else "of two calls")

    if temporary is not None:
        more = max(temporary - parameters, 0)
        yield Part("temporary", more, devices * more, "XLA's figure, on the devices here")


def _on_hosts(config, sizes: Sizes, vectors: int, hosts: int):
    """What is in the memory of the hosts; `vectors` are bytes of those that are kept there."""
    images = sizes.examples * _image_bytes(sizes)
    if images > sets.IN_MEMORY_BYTES and not config.data.name.startswith(("npz:", "folder:")):
        images = 0
    yield Part("images", images, hosts * images, "" if images else "they stay on disk")
    if vectors:
        yield Part("all vectors", -(-vectors // hosts), vectors)


def _mean_time(config, sizes: Sizes, network, devices: int, device: Device):
    """`_time` of the mean step, over the epochs of each mode."""
    epochs = config.schedule.epochs
    modes = [schedules.mode_at(config, epoch) for epoch in range(epochs)]
    operations, shortest, longest = 0.0, 0.0, 0.0
    for mode in schedules.modes_of(config):
        share = modes.count(mode) / epochs
        changed = schedules.with_mode(config, mode)
        count, seconds = _time(changed, sizes, network, devices, device)
        operations += share * count
        shortest += share * seconds[0]
        longest += share * seconds[1]
    return operations, (shortest, longest)


def _time(config, sizes: Sizes, network, devices: int, device: Device):
    """Operations of a step with `bound.mode`, and its shortest and longest time."""
    mode, iterations = config.bound.mode, config.bound.iterations
    layers = _of_shapes(
        lambda network: list(_layers(network, sizes.input_shape, mode, iterations)), network
    )
    batch = config.batch_size
    operations = batch * sum(count * each for count, each, _ in layers)
    traffic = 4 * batch * sum(count * entries for count, _, entries in layers)
    launched = 0
    if device.platform != "cpu":
        launched = batch // (config.examples_at_once or batch) * sum(n for n, _, _ in layers)
    if "global" in bounds.mode_of(mode).vectors:
        # Whole norms: on each device once a step, of one example, all layers but the last.
        shared = 2 * config.bound.shared_iterations
        operations += devices * shared * sum(each for _, each, _ in layers[:-1])
        launched += shared * (len(layers) - 1) if device.platform != "cpu" else 0
    seconds = _step_seconds(device, operations / devices, traffic / devices, launched)
    return operations, seconds


def _step_seconds(device: Device, operations, traffic, launched) -> tuple[float, float]:
    """The shortest and the longest step to be expected on one device, of so many operations, bytes
    and products of matrices."""
    floor = operations / device.peak
    if device.bandwidth:
        floor = max(floor, traffic / device.bandwidth)
    worst, best = SHARES
    shortest = floor / best + launched * LAUNCHES[0] * LAUNCH_SECONDS[0]
    longest = floor / worst + launched * LAUNCHES[1] * LAUNCH_SECONDS[1]
    return shortest, longest


def planned(
    config, sizes: Sizes, devices: int | None = None, device: str | None = None, *, compiled=False
) -> Plan:
    """`plan` for the devices here unless said otherwise.

    Args:
        compiled: asks XLA for the temporary memory (`compiled_step`).

    Raises:
        ValueError: as `plan`, `device_of` and `device_here`; `compiled` for other devices than
            those here.
    """
    devices = devices or jax.device_count()
    device = device or device_here()
    temporary = None
    if compiled:
        if devices != jax.device_count() or device != device_here():
            raise ValueError(
                "only the compiler of the devices here can be asked, for "
                f"{jax.device_count()} x {device_here()}, not for {devices} x {device}: leave "
                "the flag that asks it out."
            )
        temporary = compiled_step(config, sizes).memory_analysis().temp_size_in_bytes
    return plan(config, sizes, devices, device_of(device, devices), temporary=temporary)


def compiled_step(config, sizes: Sizes):
    """The real step compiled for the devices here, of which ``memory_analysis()`` tells the bytes
    on each of them.

    It takes from seconds to minutes and allocates none of the state.
    """
    mesh = sharding.device_mesh()
    state, _ = _abstract_state(config, sizes, mesh)
    labels = np.zeros(sizes.examples, np.int32)
    # As large as the training set, and no byte of it.
    images = np.broadcast_to(np.zeros((), sizes.pixels), (sizes.examples, *sizes.input_shape))
    train = sets.Dataset("plan", "train", images, labels, 255.0, sizes.classes, labels)
    steps = stepping.make_steps(
        config,
        _transform(config, sizes),
        feeding.steps_per_epoch(config, sizes.examples),
        train,
        mesh,
        state,
        feeding.MAX_STEPS,
    )
    shapes = feeding.shapes_of_call(train, config, mesh, feeding.MAX_STEPS)
    return steps.lower(state, *shapes, jax.ShapeDtypeStruct((), jnp.int32)).compile()


def _transform(config, sizes):
    steps_per_epoch = feeding.steps_per_epoch(config, sizes.examples)
    return optax.adam(schedules.learning_rate(config, steps_per_epoch))  # as train.py


def _abstract_state(config, sizes, mesh):
    """Shapes of the state on the devices, and the store that would bring its vectors."""
    store = vectors.VectorStore(config, sizes.examples, mesh, feeding.MAX_STEPS)

    def create():
        network = configuration.build_network(config, sizes.input_shape, sizes.classes)
        transform = _transform(config, sizes)
        return states.initial_state(network, transform, config, store.rows_for, sizes.input_shape)

    return jax.eval_shape(create), store


def _held(tree, config, devices: int) -> int:
    """Bytes of parameters, or of what the optimizer keeps of them, on each device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        whole = sharding.split_axis(leaf.shape, config, devices) is None
        total += _bytes(leaf) // (1 if whole else devices)
    return total


def _of_shapes(function, network):
    """`function` of a network without values, where it only looks at shapes."""
    found: list = []
    jax.eval_shape(lambda network: found.append(function(network)), network)
    return found[0]


def _image_bytes(sizes: Sizes) -> int:
    return math.prod(sizes.input_shape) * np.dtype(sizes.pixels).itemsize


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# --------------------------------------------------------------------------------------- for people


def size_text(count: float) -> str:
    """Bytes with a decimal unit, three digits: "20.5 GB"."""
    unit = "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if count < 999.5:
            break
        count, unit = count / 1000, larger
    return f"{count:.3g} {unit}" if count < 999.5 else f"{count:,.0f} {unit}"


def duration_text(seconds: float) -> str:
    """Seconds with a unit, two digits: "4.2 ms", "3.1 h"."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if seconds >= length:
            return f"{seconds / length:.{0 if seconds / length >= 10 else 1}f} {unit}"
    return f"{seconds * 1e6:.0f} µs"


def _text(plan: Plan) -> str:
    device = plan.device
    table = Table("memory", "each device", "all", "", title_justify="left")
    for part in plan.parts:
        table.add_row(part.name, size_text(part.each), size_text(part.total), part.note)
    used = f", of which JAX takes {device.usable:.0%}" if device.usable < 1 else ""
    limit = f"of {size_text(device.memory)}{used}"
    table.add_row("together", size_text(plan.each), "", limit, style="bold")
    for part in plan.host_parts:
        each = f"{size_text(part.each)} a host"
        table.add_row(f"host: {part.name}", each, size_text(part.total), part.note)
    table.add_row("a checkpoint on disk", "", size_text(plan.checkpoint), "before compression")

    if plan.left < 0:
        verdict = f"It does NOT fit: {size_text(-plan.left)} too much on each device."
    elif plan.complete:
        verdict = f"It fits, with {size_text(plan.left)} to spare on each device."
    else:
        verdict = (
            f"The exact parts fit, and leave {size_text(plan.left)} on each device for a step's "
            "temporary memory, which grows with examples_at_once and is not estimated here."
        )

    def times(count):
        shortest, longest = (duration_text(count * seconds) for seconds in plan.step_seconds)
        return f"{shortest} to {longest}"

    all_steps = plan.epochs * plan.steps_per_epoch
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(plan.title)
    console.print(table)
    console.print(verdict)
    console.print(
        f"Time, a guess: {times(1)} a step, {times(plan.steps_per_epoch)} an epoch of "
        f"{plan.steps_per_epoch:,} steps, {times(all_steps)} for {plan.epochs} epochs."
    )
    worst, best = (f"{share:.0%}" for share in SHARES)
    console.print(
        f"From {plan.operations:.3g} operations a step at {worst} to {best} of what memory and "
        f"{device.arithmetic} allow ({device.source}), the shares that were measured on two CPU "
        "cores, and launches. On a GPU one step was measured (6C2F on an H100, within its range), "
        "on a TPU none. Not in it: the exchange between devices and with hosts, reading images, "
        'evaluations, checkpoints, and the reverse passes of the modes "linear", "rows" and '
        '"tight".'
    )
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]
