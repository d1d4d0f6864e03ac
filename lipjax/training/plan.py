"""What a configuration needs, before anything runs: memory, operations, bytes between devices,
time; and whether it fits.

    python train.py --config=configs/cifar10_maxmin.py --plan --plan_device=h200 --plan_devices=8

Exact: parameters, gradients, optimizer state, power-iteration vectors and images, from the shapes
of what training itself creates (`jax.eval_shape`); the products counted by `counted`; the
gradients' bytes between devices, if they are summed on a
ring. A model: the temporary memory of a step (`temporary_bytes`, fitted to what XLA's CPU backend
reports) and all times (data sheets' peaks and `Device.share`). `Plan` says of every figure which it
is.
"""

import dataclasses
import functools
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh
from rich.console import Console
from rich.table import Table

from lipjax import bounds, training
from lipjax.data import sets
from lipjax.training import feeding

# The share of the floor (operations at the peak rate) that a step of 6C2F reached on two CPU cores:
# benchmarks/README.md.
MEASURED_SHARE = 0.36

# ------------------------------------------------------------------------------------------ devices


@dataclasses.dataclass(frozen=True)
class Device:
    """One device, by its data sheet.

    Attributes:
        name, platform: e.g. "NVIDIA H200", "gpu".
        memory: bytes.
        usable: share of the memory that JAX takes for arrays by default.
        bandwidth: of the memory, bytes a second; None: not known.
        peak: operations a second by arithmetic ("float32", "tf32", "bfloat16"), dense; what is not
            published is left out.
        arithmetic: a key of `peak`, what JAX takes for float32 products by default.
        link: bytes a second to the other devices, each way; None: not known.
        host_link: bytes a second to the host's memory, each way; None: not published.
        per_host, host_memory: devices of one host; its bytes, None where that is up to the machine.
        share: of the floor that a step reaches; `share_is` "measured" or "assumed".
        source: publisher and document.
    """

    name: str
    platform: str
    memory: int
    usable: float
    bandwidth: float | None
    peak: Mapping[str, float]
    arithmetic: str
    link: float | None
    host_link: float | None
    per_host: int
    host_memory: int | None
    share_is: str
    source: str
    share: float = MEASURED_SHARE


def _nvidia(name, memory, bandwidth, peak, link, host_link, source) -> Device:
    # 0.75: JAX documentation, "GPU memory allocation" (XLA_PYTHON_CLIENT_MEM_FRACTION). TF32 on
    # these GPUs and bfloat16 on TPUs is what float32 products are by default: JAX documentation,
    # "Matmul precision". NVLink is given as the sum of both ways.
    return Device(
        name,
        "gpu",
        memory,
        0.75,
        bandwidth,
        peak,
        "tf32",
        link / 2,
        host_link / 2,
        8,
        None,
        "assumed",
        source,
    )


def _tpu(name, memory, bandwidth, peak, link, per_host, host_memory, source) -> Device:
    # No rate in float32 is published.
    peak = {"bfloat16": peak}
    return Device(
        name,
        "tpu",
        memory,
        1.0,
        bandwidth,
        peak,
        "bfloat16",
        link,
        None,
        per_host,
        host_memory,
        "assumed",
        source,
    )


GB, GIB = 10**9, 2**30

# Of the NVIDIA data sheets' rates of tensor cores those of H100 and H200 are "with sparsity": half
# of them is dense.
DEVICES = {
    # NVIDIA, "NVIDIA H100 Tensor Core GPU", data sheet, column H100 SXM: 67 TFlop/s float32, 989
    # TF32 and 1979 bfloat16 with sparsity, 80 GB, 3.35 TB/s, NVLink 900 GB/s, PCIe Gen5 128 GB/s.
    "h100": _nvidia(
        "NVIDIA H100 SXM",
        80 * GB,
        3.35e12,
        {"float32": 67e12, "tf32": 989e12 / 2, "bfloat16": 1979e12 / 2},
        900e9,
        128e9,
        "NVIDIA, H100 Tensor Core GPU data sheet",
    ),
    # NVIDIA, "NVIDIA H200 Tensor Core GPU", data sheet, column H200 SXM: rates and links of the
    # H100, 141 GB, 4.8 TB/s.
    "h200": _nvidia(
        "NVIDIA H200 SXM",
        141 * GB,
        4.8e12,
        {"float32": 67e12, "tf32": 989e12 / 2, "bfloat16": 1979e12 / 2},
        900e9,
        128e9,
        "NVIDIA, H200 Tensor Core GPU data sheet",
    ),
    # NVIDIA, "NVIDIA A100 Tensor Core GPU", data sheet, column A100 80GB SXM: 19.5 TFlop/s float32,
    # 156 TF32 and 312 bfloat16 (dense), 2039 GB/s, NVLink 600 GB/s, PCIe Gen4 64 GB/s.
    "a100": _nvidia(
        "NVIDIA A100 SXM 80GB",
        80 * GB,
        2.039e12,
        {"float32": 19.5e12, "tf32": 156e12, "bfloat16": 312e12},
        600e9,
        64e9,
        "NVIDIA, A100 Tensor Core GPU data sheet",
    ),
    # Google Cloud, "TPU v4": 275 TFlop/s bfloat16, 32 GiB, 1200 GB/s; all-reduce bandwidth 1.1 PB/s
    # of a pod of 4096 chips.
    "v4": _tpu(
        "TPU v4",
        32 * GIB,
        1.2e12,
        275e12,
        1.1e15 / 4096,
        4,
        None,
        "Google Cloud documentation, TPU v4",
    ),
    # Google Cloud, "TPU v5e": 197 TFlop/s bfloat16, 16 GB, 819 GB/s, 400 GB/s between chips in both
    # ways together (and all-reduce bandwidth 51.2 TB/s of a pod of 256), 8 chips and 512 GiB a
    # host.
    "v5e": _tpu(
        "TPU v5e",
        16 * GB,
        819e9,
        197e12,
        200e9,
        8,
        512 * GIB,
        "Google Cloud documentation, TPU v5e",
    ),
    # Google Cloud, "TPU v5p": 459 TFlop/s bfloat16, 95 GiB, 2765 GB/s, 1200 GB/s between chips in
    # both ways together, 4 chips and 448 GB a host.
    "v5p": _tpu(
        "TPU v5p",
        95 * GIB,
        2.765e12,
        459e12,
        600e9,
        4,
        448 * GB,
        "Google Cloud documentation, TPU v5p",
    ),
}


def device_of(name: str, devices: int = 1) -> Device:
    """The device of that name in `DEVICES`, or "cpu": one of `devices` that share two cores and
    this machine's memory.

    Raises:
        ValueError: an unknown name, with the known ones.
    """
    if name == "cpu":
        try:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (ValueError, OSError, AttributeError) as error:
            raise ValueError(
                "this system does not tell its memory: plan for another device, or give `plan` a "
                "`Device`."
            ) from error
        # 450 GFlop/s: measured, products of matrices on two cores (benchmarks/README.md).
        return Device(
            name="CPU, two cores as measured",
            platform="cpu",
            memory=memory // devices,
            usable=1.0,
            bandwidth=None,
            peak={"float32": 450e9 / devices},
            arithmetic="float32",
            link=None,
            host_link=None,
            per_host=devices,
            host_memory=memory,
            share_is="measured",
            source="measured (benchmarks/README.md)",
        )
    if name not in DEVICES:
        raise ValueError(f"no device is called {name!r}; there are {', '.join(DEVICES)}, cpu.")
    return DEVICES[name]


def device_here() -> str:
    """The name, for `device_of`, of the devices that JAX sees.

    Raises:
        ValueError: a kind that has no data sheet here, with the known names.
    """
    first = jax.devices()[0]
    kinds = {
        "H100": "h100",
        "H200": "h200",
        "A100": "a100",
        "v5 lite": "v5e",
        "v5e": "v5e",
        "v5": "v5p",
        "v4": "v4",
    }
    if first.platform == "cpu":
        return "cpu"
    for part, name in kinds.items():
        if part in first.device_kind:
            return name
    raise ValueError(
        f"no data sheet of {first.device_kind!r} is here: say with --plan_device which of "
        f"{', '.join(DEVICES)}, cpu comes "
        "nearest."
    )


# ---------------------------------------------------------------------------------------- data sets


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a plan has to know of a data set: `examples` to train on, of `input_shape` and `pixels`
    (a dtype) as stored."""

    input_shape: tuple[int, ...]
    classes: int
    examples: int
    pixels: str = "uint8"


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
        ValueError: a shape that is not three positive numbers, fewer than 2 examples or classes.
        data.DataError: as `data.load`, of a set that is not known by its name.
    """
    if shape is not None and not all(str(n).strip().isdigit() for n in shape):
        raise ValueError(
            "a shape is height,width,channels, for instance 224,224,3; got "
            f"{','.join(map(str, shape))}."
        )
    asked = tuple(map(int, shape or ()))
    found = KNOWN.get(config.data.name)
    if found is None and asked and classes and examples:
        found = Sizes(asked, classes, examples)
    elif found is None:
        train = training.load_data(config).train
        shape_there, dtype = tuple(train.images.shape[1:]), train.images.dtype.name
        there = Sizes(asked or shape_there, classes or train.classes, len(train.labels), dtype)
        if examples is None:  # validation images are held out of what was loaded
            return _checked(there)
        found = there
    elif side := config.data.get("image_size", 0):  # what images are resized to
        found = dataclasses.replace(found, input_shape=(side, side, found.input_shape[-1]))
    kept = _kept(config, examples or found.examples)
    return _checked(Sizes(asked or found.input_shape, classes or found.classes, kept, found.pixels))


def _kept(config, examples):
    kept = examples - max(1, round(examples * config.data.validation_fraction))
    return min(kept, config.data.train_examples or kept)


def _checked(sizes: Sizes) -> Sizes:
    if len(sizes.input_shape) != 3 or min(sizes.input_shape) < 1:
        raise ValueError(
            f"a shape is height,width,channels, for instance 224,224,3; got {sizes.input_shape}."
        )
    if sizes.examples < 1 or sizes.classes < 2:
        raise ValueError(
            f"expected at least 2 training examples and 2 classes, got {sizes.examples} "
            "(validation held out) and "
            f"{sizes.classes}."
        )
    return sizes


# --------------------------------------------------------------------------------------- operations


def products(mode: str, iterations: int, first: bool) -> int:
    """How often a step multiplies with the matrix of one affine layer, forwards, backwards or for
    its gradient, an example.

    The plain step: forwards, backwards (not to the image), gradient. A bound adds, each with its
    gradient: middle and half-width of the box, the row norms (only a kernel gradient: masks have
        none), and the power iteration, without one
    but for the last half. In front of the first layer the box is the same for all examples and
    costs nothing.
    """
    plain = 2 if first else 3
    box = 0 if first else 6
    row_norms = 0 if first else 2
    power = 2 * iterations + 1
    return plain + {
        "plain": 0,
        "global": 0,
        "bcp": box,
        "paper": box + power,
        **dict.fromkeys(("local", "linear", "rows"), box + row_norms + power),
    }.get(mode, 0)


def counted(network, shape, mode: str, iterations: int) -> float:
    """Floating-point operations of one example in the products of one step, the last layer counted
    as in the plain step.

    Of modes "linear" and "rows" without their reverse passes.
    """
    graph = bounds.graph_of(network, jax.ShapeDtypeStruct(shape, jnp.float32))
    nodes, total = graph.linear_nodes, 0.0
    for node in nodes:
        what = "plain" if node is nodes[-1] else mode
        entries = 2 * node.size * node.operator.kernel.size / node.shape[-1]
        total += products(what, iterations, node is nodes[0]) * entries
    return total


def affine_outputs(network, shape) -> list[int]:
    """Entries of each affine layer's output, of one example."""
    graph = bounds.graph_of(network, jax.ShapeDtypeStruct(shape, jnp.float32))
    return [node.size for node in graph.linear_nodes]


# --------------------------------------------------------------------------------- temporary memory

# Floats of temporary memory for each entry of the affine layers' outputs and each example that goes
# through the network at once, fitted to what XLA's CPU backend reports of the compiled step
# (benchmarks/README.md, "What a configuration needs").
FLOATS_PER_ENTRY = {
    "global": 3.5,
    "bcp": 11.0,
    "paper": 13.5,
    "local": 17.0,
    "linear": 51.0,
    "rows": 51.0,
}

# In modes "linear" and "rows", more for each rival class. The reverse passes of "rows" for every
# neuron are not in it.
FLOATS_PER_RIVAL = 16.0

# For each class and entry of the penultimate activation, the rows of the margins.
FLOATS_PER_MARGIN = 7.6

# Copies of the parameters beside the gradient; with norms of single examples more where the batch
# goes through in parts, and where gradients are summed over devices.
PARAMETER_COPIES, IN_PARTS, OVER_DEVICES = 0.5, 3.5, 2.5

# By how much a step may exceed the model and the plan still fit. Of 31 steps compiled, the worst
# exceeded it by 25 %.
ERROR = 0.3


def temporary_bytes(
    mode: str,
    rivals: int,
    entries: int,
    margins: int,
    image: int,
    parameters: int,
    batch: int,
    at_once: int,
    devices: int,
) -> float:
    """A model of the temporary memory of one step on one device, gradient apart.

    Args:
        rivals: classes with a reverse pass of their own (modes "linear" and "rows").
        entries: of all affine layers' outputs, one example's (`affine_outputs`).
        margins: classes times entries of the penultimate activation.
        image: entries of one image.
        parameters: their bytes.
        batch, at_once: examples of a step on the device, and of them in the network at once.
        devices: all of them.
    """
    floats = FLOATS_PER_ENTRY[mode] + (
        FLOATS_PER_RIVAL * rivals if mode in ("linear", "rows") else 0
    )
    one = floats * entries + FLOATS_PER_MARGIN * margins
    copies = PARAMETER_COPIES
    if "local" in bounds.mode_of(mode).vectors:
        copies += IN_PARTS * (at_once < batch) + OVER_DEVICES * (devices > 1)
    return 4 * (at_once * one + batch * image) + copies * parameters


def compiled_step(config, sizes: Sizes):
    """The real step compiled for the devices here, of which ``memory_analysis()`` tells the bytes
    on each of them.

    It takes from seconds to minutes and allocates none of the state.
    """
    mesh = training.device_mesh()
    steps_per_epoch, rows = _steps_and_rows(config, sizes)
    transform = _transform(config, steps_per_epoch)
    state = _abstract_state(_abstract_network(config, sizes), config, sizes, rows, transform)
    one = np.zeros((1, *sizes.input_shape), sizes.pixels)
    train = sets.Dataset(
        "plan", "train", one, np.zeros(1, np.int32), 255.0, sizes.classes, np.zeros(1, np.int32)
    )
    steps = training.make_steps(
        config, transform, steps_per_epoch, train, mesh, state, feeding.CALL
    )
    resident = sizes.examples * _image_bytes(sizes) // mesh.size <= feeding.RESIDENT_BYTES
    there = rows if resident else feeding.CALL * config.batch_size
    images = jax.ShapeDtypeStruct((there, *sizes.input_shape), jnp.dtype(sizes.pixels))
    labels = jax.ShapeDtypeStruct((there,), jnp.int32)
    slots = jax.ShapeDtypeStruct((feeding.CALL, config.batch_size), jnp.int32)
    return steps.lower(
        state, images, labels, slots, slots, jax.ShapeDtypeStruct((), jnp.int32)
    ).compile()


# ----------------------------------------------------------------------------------------- the plan


@dataclasses.dataclass(frozen=True)
class Part:
    """Bytes of one thing: on each device, and on all together. `exact`, or a model."""

    name: str
    per_device: int
    total: int
    exact: bool
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Option:
    """What another setting would need.

    Attributes:
        settings: fields of the configuration, or "devices", and their values.
        vectors: bytes of the vectors on each device.
        per_device: bytes of everything on each device, an estimate.
        on_hosts: bytes of vectors in the memory of all hosts together.
        fits: as `Plan.fits`.
    """

    settings: Mapping[str, Any]
    vectors: int
    per_device: int
    on_hosts: int
    fits: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found. Bytes, operations and seconds; the last are estimates, parts say of
    themselves which they are.

    Attributes:
        network, data_set, mode, store, dtype: of the configuration.
        device, devices, hosts: what it is planned for.
        sizes, rows: of the data; rows are `batch_size` stripes of ``ceil(examples / batch_size)``,
            padded ones included.
        batch_size, examples_at_once, steps_per_epoch, steps: of the training.
        parameters: how many.
        parts: what is on the devices.
        host_parts: what is in the memory of the hosts: `per_device` is that of one host here.
        checkpoint: bytes of one on disk.
        operations: of one step on all devices, products of matrices (`counted`).
        interconnect: bytes that each device sends in a step.
        floor_seconds: of a step, by arithmetic: operations or traffic at the data sheet's rates,
            whichever takes longer.
        step_seconds: floor / `device.share`, and the exchange between devices and with the host;
            None: something in it is not known.
        unknown: what the estimates of time leave out.
        fits: parts, with `ERROR` of the temporary memory on top, are at most the memory that JAX
            takes.
        options: every store and dtype of the vectors.
        suggestions: changes that make it fit, if it does not; empty too if none was found.
    """

    network: str
    data_set: str
    mode: str
    store: str
    dtype: str
    device: Device
    devices: int
    hosts: int
    sizes: Sizes
    rows: int
    batch_size: int
    examples_at_once: int
    steps_per_epoch: int
    steps: int
    parameters: int
    parts: tuple[Part, ...]
    host_parts: tuple[Part, ...]
    checkpoint: int
    operations: float
    interconnect: int
    floor_seconds: Mapping[str, float]
    step_seconds: Mapping[str, float]
    unknown: tuple[str, ...]
    fits: bool
    options: tuple[Option, ...]
    suggestions: tuple[Option, ...]

    @property
    def per_device(self) -> int:
        """Bytes of all parts on each device, an estimate."""
        return sum(part.per_device for part in self.parts)

    @property
    def epoch_seconds(self) -> float:
        """Of one epoch's steps by the device's default arithmetic, an estimate; evaluation and
        checkpoints apart."""
        return self.steps_per_epoch * self.step_seconds[self.device.arithmetic]

    def part(self, name: str) -> Part:
        """The part of that name."""
        return next(part for part in self.parts if part.name == name)

    def as_dict(self) -> dict:
        """All fields and properties, of what JSON knows."""
        found = dataclasses.asdict(self)
        return {**found, "per_device": self.per_device, "epoch_seconds": self.epoch_seconds}

    def __str__(self) -> str:
        return _text(self)


def plan(
    config,
    input_shape: Sequence[int],
    classes: int,
    examples: int,
    devices: int,
    device: str | Device = "cpu",
    *,
    pixels: str = "uint8",
    temporary: int | None = None,
) -> Plan:
    """What training needs with this configuration on so many devices. Nothing is allocated and
    nothing compiled.

    The training set is arranged in `batch_size` stripes of ``ceil(examples / batch_size)`` rows;
    images, labels and vectors of the store "example" are such rows, split evenly over the devices;
    parameters and optimizer state are on each of them.

    Args:
        config: an experiment; `vectors.store` may be any of `training.STORES`.
        input_shape: ``(height, width, channels)``.
        examples: to train on, validation images held out.
        device: a name for `device_of`, or any `Device`.
        pixels: dtype of the images as stored.
        temporary: bytes of a step's temporary memory on one device, gradient included
            (`compiled_step`), in place of the model's.

    Raises:
        ValueError: an unknown device, with the known ones; a batch or a part of it that does not
            divide over the devices; fewer examples than a batch; what the network's own function or
            the optimizer's schedule refuses.
    """
    sizes = _checked(Sizes(tuple(input_shape), classes, examples, pixels))
    device = device_of(device, devices) if isinstance(device, str) else device
    if config.vectors.store not in training.STORES:
        raise ValueError(
            f"vectors.store must be one of {', '.join(training.STORES)}, got "
            f"{config.vectors.store!r}."
        )
    if devices < 1 or config.batch_size % devices:
        raise ValueError(
            f"batch_size {config.batch_size} does not divide over {devices} devices: give a "
            "multiple, "
            f"--config.batch_size={-(-config.batch_size // max(devices, 1)) * max(devices, 1)}."
        )
    memory = _Memory(config, sizes, device, temporary)
    store, dtype = config.vectors.store, config.vectors.dtype
    at_once = _at_once(config, memory.state(store, dtype), device, devices)
    parts = memory.parts(store, dtype, devices, at_once)
    hosts = -(-devices // device.per_host)
    image_set, note = _images_in_memory(config, sizes)
    host_parts = [Part("training images", image_set, hosts * image_set, True, note)]
    if store == "host" and (rows := memory.all_vectors(dtype)):
        host_parts.append(Part("vectors", -(-rows // hosts), rows, True, "split over the hosts"))
    operations = config.batch_size * memory.operations
    parameters = _bytes(memory.network)
    interconnect = round(2 * (devices - 1) / devices * parameters)
    traffic = memory.traffic(store, dtype, devices, at_once)
    floor, seconds, unknown = {}, {}, []
    exchange = 0.0
    if devices > 1 and device.link is None:
        unknown.append("the gradients' way between devices")
    # a TPU's links reach over all hosts of its slice
    elif devices > 1 and hosts > 1 and device.platform != "tpu":
        unknown.append("the network between hosts")
    elif device.link:
        exchange += interconnect / device.link
    swapped = memory.swapped(store, dtype, devices)
    if device.host_link:
        exchange += swapped / device.host_link
    elif swapped:
        unknown.append("the vectors' way between host and device")
    if config.bound.mode in ("linear", "rows"):
        unknown.append(f"the reverse passes of mode {config.bound.mode!r}")
    if device.bandwidth is None:
        unknown.append("the traffic with memory")
    for arithmetic, rate in device.peak.items():
        floor[arithmetic] = max(
            operations / devices / rate, traffic / device.bandwidth if device.bandwidth else 0.0
        )
        seconds[arithmetic] = floor[arithmetic] / device.share + exchange
    if not memory.images(devices)[1]:
        rate = config.batch_size / seconds[device.arithmetic]
        unknown.append(f"reading and decoding images, {rate:,.0f} a second at this speed")
    fits = memory.fits(parts, store, dtype, hosts)
    return Plan(
        network=config.model.name,
        data_set=config.data.name,
        mode=config.bound.mode,
        store=store,
        dtype=dtype,
        device=device,
        devices=devices,
        hosts=hosts,
        sizes=sizes,
        rows=memory.rows,
        batch_size=config.batch_size,
        examples_at_once=at_once,
        steps_per_epoch=memory.steps_per_epoch,
        steps=memory.steps_per_epoch * config.schedule.epochs,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(memory.network)),
        parts=parts,
        host_parts=tuple(host_parts),
        checkpoint=parameters
        + _bytes(memory.optimizer)
        + memory.shared_bytes(store, dtype)
        + (memory.all_vectors(dtype) if store in ("example", "host") else 0),
        operations=operations,
        interconnect=interconnect,
        floor_seconds=floor,
        step_seconds=seconds,
        unknown=tuple(unknown),
        fits=fits,
        options=tuple(memory.options(devices, at_once)),
        suggestions=() if fits else tuple(memory.suggestions(store, dtype, devices, at_once)),
    )


def planned(
    config,
    sizes: Sizes,
    devices: int | None = None,
    device: str | None = None,
    *,
    compile_step: bool = False,
):
    """`plan` as ``train.py --plan`` asks for it: for the devices here unless said otherwise.

    Raises:
        ValueError: as `plan` and `device_here`; `compile_step`, which asks XLA for the temporary
            memory (`compiled_step`), for other devices than those here.
    """
    devices = devices or jax.device_count()
    device = device or device_here()
    temporary = None
    if compile_step:
        if devices != jax.device_count() or device != device_here():
            raise ValueError(
                f"--plan_compile asks this machine's compiler, for {jax.device_count()} x "
                f"{device_here()}, not for "
                f"{devices} x {device}: leave it out."
            )
        temporary = compiled_step(config, sizes).memory_analysis().temp_size_in_bytes
    shape = (sizes.input_shape, sizes.classes, sizes.examples)
    return plan(config, *shape, devices, device, pixels=sizes.pixels, temporary=temporary)


class _Memory:
    """What is needed where, of one configuration, for any store, dtype and number of devices."""

    def __init__(self, config, sizes, device, temporary):
        self.config, self.sizes, self.device, self.temporary = config, sizes, device, temporary
        self.steps_per_epoch, self.rows = _steps_and_rows(config, sizes)
        self.network = _abstract_network(config, sizes)
        shape, mode, iterations = sizes.input_shape, config.bound.mode, config.bound.iterations
        self.operations = _of_shapes(
            lambda network: counted(network, shape, mode, iterations), self.network
        )
        self.outputs = _of_shapes(lambda network: affine_outputs(network, shape), self.network)
        self.optimizer = jax.eval_shape(_transform(config, self.steps_per_epoch).init, self.network)
        # The same functions are asked for every option; without an optimizer, which takes as long
        # as all else.
        self._states = functools.cache(
            lambda store, dtype: _abstract_state(
                self.network,
                _with_vectors(config, store, dtype),
                sizes,
                self.rows,
                optax.identity(),
            )
        )

    def state(self, store, dtype):
        """The state, optimizer apart; with a row for each example where these are in the host's
        memory."""
        return self._states("example" if store == "host" else store, dtype)

    def shared_bytes(self, store, dtype):
        """Vectors that every device has."""
        return sum(
            _bytes(v) for name, v in self.state(store, dtype).vectors.items() if name != "local"
        )

    def all_vectors(self, dtype):
        """Vectors of all rows."""
        return _bytes(self.state("example", dtype).vectors.get("local", ()))

    def held(self, tree, devices):
        """Bytes of parameters, or of what the optimizer keeps of them, on each device."""
        return sum(
            leaf.size
            * leaf.dtype.itemsize
            // (1 if training.split_axis(leaf.shape, self.config, devices) is None else devices)
            for leaf in jax.tree.leaves(tree)
        )

    def vector_bytes(self, store, dtype, devices):
        """On each device."""
        shared, own = self.shared_bytes(store, dtype), 0
        if store in ("example", "host"):
            rows = self.rows if store == "example" else feeding.CALL * self.config.batch_size
            own = self.all_vectors(dtype) // self.rows * rows // devices
        return shared + own

    def swapped(self, store, dtype, devices):
        """Bytes that a step moves between each device and its host, each way."""
        if store != "host":
            return 0
        return self.all_vectors(dtype) // self.rows * self.config.batch_size // devices

    def images(self, devices):
        """On each device, and whether those are all of the training set."""
        one = _image_bytes(self.sizes) + 4  # and its label
        resident = (
            self.sizes.examples * _image_bytes(self.sizes) // devices <= feeding.RESIDENT_BYTES
        )
        # Those of the next call travel while one runs.
        return (
            self.rows if resident else 2 * feeding.CALL * self.config.batch_size
        ) * one // devices, resident

    def temporary_of(self, devices, at_once):
        """The step's temporary memory on each device, gradient apart."""
        parameters = _bytes(self.network)
        if self.temporary is not None:
            return max(self.temporary - parameters, 0)
        config = self.config
        rivals = min(config.bound.rivals or self.sizes.classes, self.sizes.classes - 1)
        return round(
            temporary_bytes(
                config.bound.mode,
                rivals,
                sum(self.outputs),
                self.sizes.classes * self.outputs[-2] if len(self.outputs) > 1 else 0,
                math.prod(self.sizes.input_shape),
                parameters,
                config.batch_size // devices,
                at_once // devices,
                devices,
            )
        )

    def parts(self, store, dtype, devices, at_once):
        """Everything on the devices."""
        parameters = _bytes(self.network)
        vectors, shared = self.vector_bytes(store, dtype, devices), self.shared_bytes(store, dtype)
        here, moments = self.held(self.network, devices), self.held(self.optimizer, devices)
        alike = here == parameters
        on_each = (
            "on every device" if alike else "split over the devices, and gathered in each step"
        )
        here += 0 if alike else parameters
        images, resident = self.images(devices)
        temporary = self.temporary_of(devices, at_once)
        measured = self.temporary is not None
        model = "a model, fitted to XLA on CPU"
        if self.config.bound.mode == "rows":
            model += "; without the reverse passes of each neuron: more"
        where = {
            "example": "one row for each training example, split over the devices",
            "host": f"those of {feeding.CALL} steps; all others in the hosts' memory",
            "layer": "one for each layer",
            "none": "none are kept",
        }[store]
        if "local" not in bounds.mode_of(self.config.bound.mode).vectors:
            where = f"mode {self.config.bound.mode!r} has none of single examples"
        return (
            Part("parameters", here, devices * here, True, f"float32, {on_each}"),
            Part("gradients", parameters, devices * parameters, True, "float32, on every device"),
            Part(
                "optimizer state",
                moments,
                devices * moments,
                True,
                f"Adam's two moments{'' if alike else ', likewise'}",
            ),
            Part(
                "vectors",
                vectors,
                devices * (vectors - shared) + devices * shared,
                True,
                f"{dtype}, {where}",
            ),
            Part(
                "training images",
                images,
                devices * images,
                True,
                "all of them, with labels"
                if resident
                else f"those of {2 * feeding.CALL} steps, of a large set",
            ),
            Part(
                "temporary",
                temporary,
                devices * temporary,
                measured,
                "XLA's own figure for the devices here" if measured else model,
            ),
        )

    def fits(self, parts, store, dtype, hosts):
        """Whether the parts do, and what is in the memory of each host, where that is known."""
        needed = sum(part.per_device * (1 if part.exact else 1 + ERROR) for part in parts)
        if needed > self.device.usable * self.device.memory:
            return False
        if store != "host" or self.device.host_memory is None:
            return True
        images, _ = _images_in_memory(self.config, self.sizes)
        # On a CPU the devices' memory is the host's.
        beside = sum(part.total for part in parts) if self.device.platform == "cpu" else 0
        return images + self.all_vectors(dtype) / hosts + beside <= self.device.host_memory

    def option(self, store, dtype, devices, at_once, settings):
        """What these would need."""
        parts = self.parts(store, dtype, devices, at_once)
        return Option(
            settings,
            next(part.per_device for part in parts if part.name == "vectors"),
            sum(part.per_device for part in parts),
            self.all_vectors(dtype) if store == "host" else 0,
            self.fits(parts, store, dtype, -(-devices // self.device.per_host)),
        )

    def options(self, devices, at_once):
        """Every store and dtype."""
        if "local" in bounds.mode_of(self.config.bound.mode).vectors:
            for store in training.STORES:
                for dtype in training.VECTOR_TYPES:
                    settings = {"vectors.store": store, "vectors.dtype": dtype}
                    yield self.option(store, dtype, devices, at_once, settings)

    def suggestions(self, store, dtype, devices, at_once):
        """What fits, of: one setting changed, then vectors and parts of the batch together; the
        mildest change of each kind."""
        local = "local" in bounds.mode_of(self.config.bound.mode).vectors
        # From the mildest to the one that costs most accuracy.
        stores = [name for name in training.STORES if name != store] if local else []
        narrower = (
            [name for name in training.VECTOR_TYPES if _width(name) < _width(dtype)]
            if local
            else []
        )
        size = self.config.batch_size
        smaller = (
            [n for n in range(at_once - devices, 0, -devices) if size % n == 0]
            if self.temporary is None
            else []
        )
        more = (
            [n for n in range(devices + 1, size + 1) if size % n == 0]
            if self.device.platform != "cpu"
            else []
        )
        dtypes = [{"vectors.dtype": name} for name in narrower]
        kinds: list[list[dict[str, Any]]] = [
            dtypes,
            [{"vectors.store": name} for name in stores],
            [{"examples_at_once": n} for n in smaller],
            [{"devices": n} for n in more] if self.temporary is None else [],
        ]
        found = [self._first(kind, store, dtype, devices, at_once) for kind in kinds]
        if not any(found):
            both = [
                {**a, **b}
                for a in [{"vectors.store": n} for n in stores] + [{}]
                for b in (dtypes or [{}])
            ]
            found = [
                self._first(both, store, dtype, devices, at_once),
                self._first(
                    [{**a, "examples_at_once": n} for a in both for n in smaller],
                    store,
                    dtype,
                    devices,
                    at_once,
                ),
                self._first(
                    [{**a, "devices": n} for a in both[::-1] for n in more],
                    store,
                    dtype,
                    devices,
                    at_once,
                ),
            ]
        return [option for option in found if option]

    def _first(self, choices, store, dtype, devices, at_once):
        for settings in choices:
            count, together = (
                settings.get("devices", devices),
                settings.get("examples_at_once", at_once),
            )
            if together % count:
                continue
            chosen = (settings.get("vectors.store", store), settings.get("vectors.dtype", dtype))
            option = self.option(*chosen, count, together, settings)
            if option.fits:
                return option
        return None

    def traffic(self, store, dtype, devices, at_once):
        """A model of the bytes that a step moves between each device's units and its memory."""
        parameters = _bytes(self.network)
        vectors = self.all_vectors(dtype) // self.rows * self.config.batch_size // devices
        parts = self.config.batch_size // at_once
        # Temporary memory and vectors written and read once; parameters, gradients and both moments
        # likewise.
        return (
            2 * parts * self.temporary_of(devices, at_once)
            + (2 * vectors if store in ("example", "host") else 0)
            + 8 * parameters
        )


def _steps_and_rows(config, sizes):
    steps = feeding.steps_per_epoch(config, sizes.examples)
    return steps, -(-sizes.examples // config.batch_size) * config.batch_size


def _transform(config, steps_per_epoch):
    return optax.adam(training.learning_rate(config, steps_per_epoch))  # as train.py


def _abstract_network(config, sizes):
    return jax.eval_shape(lambda: training.build_network(config, sizes.input_shape, sizes.classes))


def _abstract_state(network, config, sizes, rows, transform):
    create = functools.partial(
        training.initial_state,
        transform=transform,
        config=config,
        examples=rows,
        input_shape=sizes.input_shape,
    )
    return jax.eval_shape(create, network)


def _with_vectors(config, store, dtype):
    config = config.copy_and_resolve_references()
    config.vectors.store, config.vectors.dtype = store, dtype
    return config


def _of_shapes(function, network):
    """`function` of a network without values, where it only looks at shapes."""
    found: list = []
    jax.eval_shape(lambda network: found.append(function(network)), network)
    return found[0]


def _at_once(config, state, device, devices):
    mesh = AbstractMesh((devices,), ("data",))
    if config.examples_at_once == 0 and device.platform != "cpu":
        return config.batch_size
    return training.examples_at_once(config, mesh, state)


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _width(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize


def _image_bytes(sizes) -> int:
    return math.prod(sizes.input_shape) * np.dtype(sizes.pixels).itemsize


def _images_in_memory(config, sizes) -> tuple[int, str]:
    size = sizes.examples * _image_bytes(sizes)
    if size > sets.IN_MEMORY_BYTES and not config.data.name.startswith(("npz:", "folder:")):
        return 0, "they stay on disk"
    return size, "each host has all of them"


# --------------------------------------------------------------------------------------- for people


def size_text(count: float) -> str:
    """Bytes with a decimal unit, three digits: "20.5 GB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.3g} {unit}" if count < 999.5 else f"{count:,.0f} {unit}"
        count /= 1000
    raise AssertionError


def duration_text(seconds: float) -> str:
    """Seconds with a unit, two digits: "4.2 ms", "3.1 h"."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if seconds >= length:
            return f"{seconds / length:.{0 if seconds / length >= 10 else 1}f} {unit}"
    return f"{seconds * 1e6:.0f} µs"


def _text(plan: Plan) -> str:
    device, sizes = plan.device, plan.sizes
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(
        f"{plan.network} on {plan.data_set}: {sizes.examples:,} training images "
        f"{sizes.input_shape}, {sizes.classes} classes, "
        f"mode {plan.mode}; {plan.devices} x {device.name} on {plan.hosts} host(s)."
    )
    console.print(
        f"{plan.parameters:,} parameters; batch {plan.batch_size}, "
        f"{plan.batch_size // plan.devices} a device, "
        f"{plan.examples_at_once // plan.devices} at once; {plan.steps_per_epoch:,} steps an "
        f"epoch, {plan.steps:,} in all."
    )
    table = Table("memory", "", "each device", "all", "", title_justify="left")
    for part in plan.parts:
        known = "exact" if part.exact else "estimate"
        table.add_row(
            part.name, known, size_text(part.per_device), size_text(part.total), part.note
        )
    total = sum(part.total for part in plan.parts)
    limit = f"of {size_text(device.memory)}" + (
        f", {device.usable:.0%} used by default" if device.usable < 1 else ""
    )
    known = "exact" if all(part.exact for part in plan.parts) else "estimate"
    table.add_row(
        "together", known, size_text(plan.per_device), size_text(total), limit, style="bold"
    )
    for part in plan.host_parts:
        memory = (
            "" if device.host_memory is None else f" (of {size_text(device.host_memory)} a host)"
        )
        each = f"{size_text(part.per_device)} a host"
        table.add_row(
            f"host: {part.name}", "exact", each, size_text(part.total), part.note + memory
        )
    table.add_row(
        "a checkpoint on disk", "exact", "", size_text(plan.checkpoint), "before compression"
    )
    console.print(table)
    if plan.fits:
        console.print("It fits, by this estimate.")
    else:
        console.print(
            "It does NOT fit."
            + (" These would:" if plan.suggestions else " No change of these settings fits.")
        )
    for option in plan.suggestions:
        flags = (
            f"--plan_devices={v}" if k == "devices" else f"--config.{k}={v}"
            for k, v in option.settings.items()
        )
        hosts = f", {size_text(option.on_hosts)} on the hosts" if option.on_hosts else ""
        console.print(f"  {' '.join(flags)}: {size_text(option.per_device)} a device{hosts}")
    if plan.options:
        table = Table(
            "vectors.store",
            "vectors.dtype",
            "vectors, each device",
            "everything",
            "on all hosts",
            "fits",
        )
        for option in plan.options:
            store, dtype = option.settings["vectors.store"], option.settings["vectors.dtype"]
            here = " <" if (store, dtype) == (plan.store, plan.dtype) else ""
            hosts = size_text(option.on_hosts) if option.on_hosts else ""
            full = option.per_device / (device.usable * device.memory)
            fits = ("no" if not option.fits else "barely" if full > 0.9 else "yes") + here
            table.add_row(
                store, dtype, size_text(option.vectors), size_text(option.per_device), hosts, fits
            )
        console.print(table)
    share = (
        "measured on 6C2F"
        if device.share_is == "measured"
        else "assumed: none was measured on such a device"
    )
    times = ", ".join(
        f"{duration_text(seconds)} in {name}"
        + (" (JAX's default there)" if name == device.arithmetic else "")
        for name, seconds in plan.step_seconds.items()
    )
    console.print(
        f"Operations a step, counted: {plan.operations:.3g}, {plan.operations / plan.devices:.3g} "
        "a device."
    )
    console.print(
        f"Gradients between devices: {size_text(plan.interconnect)} sent by each in a step (a "
        "ring's all-reduce)."
    )
    console.print(
        f"A step, estimated: {times}; by the floor over a share of {device.share:.0%} ({share}). "
        "Nets of few "
        "channels take longer: two to five times on CPU."
    )
    epochs = plan.steps // plan.steps_per_epoch
    console.print(
        f"An epoch, estimated: {duration_text(plan.epoch_seconds)}; all {epochs}: "
        f"{duration_text(plan.epoch_seconds * epochs)}. Evaluation, checkpoints and waiting for "
        "images come on top."
    )
    for what in plan.unknown:
        console.print(f"Not in the estimate of time: {what}.")
    console.print(f"Rates and memory: {device.source}.")
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]
