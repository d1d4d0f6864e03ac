"""The configuration of a run: its fields, their defaults, meaning and limits, and what it names.

`FIELDS` is the only place where a field is described. An experiment (configs/) is
`default_config()` with some fields changed; `check_config` refuses values that make no sense.
"""

import dataclasses
import math
from typing import Any

import jax
import ml_collections
from flax import nnx

from lipjax import bounds, models, storage
from lipjax.data import sets
from lipjax.training.vectors import VECTOR_TYPES

# Names of losses in `lipjax.losses`.
LOSSES = (
    "bcp",
    "gloro",
    "trades",
    "lmt",
    "emma",
    "calibrated",
    "offset",
    "annealing",
    "crm",
)

# Shapes of the fall of the learning rate.
DECAYS = ("exponential", "cosine")

# Where the vectors of the local power iterations are kept between steps: on the devices, or in the
# host's memory (`vectors.VectorStore`).
STORES = ("example", "host")

# What runs of before version 0.3 could say, and no longer: measured, and much worse.
FORMER_STORES = ("layer", "none")

# JAX's names for how products of float32 are made: "default" is what the device is quick at, TF32
# on recent GPUs, bfloat16 on TPUs; "highest" is float32.
PRECISIONS = ("default", "high", "highest")


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a configuration.

    Attributes:
        default: its value unless an experiment says otherwise.
        meaning: for people; "" where the name says it.
        least: the smallest number that makes sense; None: no limit is checked here.
        choices: the only values that make sense; (): any.
    """

    default: Any
    meaning: str = ""
    least: float | None = None
    choices: tuple[str, ...] = ()


FIELDS: dict[str, Field] = {
    "seed": Field(0, "of everything that is random", least=0),
    "start": Field(
        "", "a file of lipjax.save whose weights training begins with; empty: fresh ones"
    ),
    "batch_size": Field(64, "examples of a step, on all devices together", least=1),
    "examples_at_once": Field(0, "of a batch, to save memory; 0: by the devices", least=0),
    # ---------------------------------------------------------------- data
    "data.name": Field("digits", "or npz:TRAIN,TEST, folder:PATH, records:PATH, or a TFDS name"),
    "data.data_dir": Field("", "where TFDS keeps prepared sets; empty: its default"),
    "data.manual_dir": Field("", "a folder that already holds a TFDS set's original archives"),
    "data.validation_fraction": Field(0.1, "of the training set, to select the best checkpoint"),
    "data.train_examples": Field(0, "training examples to take; 0: all", least=0),
    "data.test_examples": Field(0, "test examples to take; 0: all", least=0),
    "data.image_size": Field(0, "resize and crop encoded images to it; 0: as stored", least=0),
    "data.augment": Field(
        False,
        "random crops (padding 4) and flips; with an image_size random resized crops and flips",
    ),
    "data.rotation": Field(
        0.0, "degrees by which an image is turned at most, either way, on the devices", least=0
    ),
    "data.workers": Field(
        0, "processes that decode sets which stay on disk; 0: a thread of this one", least=0
    ),
    "data.read_ahead": Field(2, "batches decoded before they are needed", least=0),
    # ---------------------------------------------------------------- network
    # `lipjax.models.build` takes these and others by the network's name, and checks them.
    "model.name": Field("small_conv", "of lipjax.models"),
    "model.activation": Field("clipped_maxmin", "of lipjax.models"),
    "model.mean": Field((), "of the pixels, per channel: a first layer that normalises them"),
    "model.deviation": Field((), "likewise"),
    "model.orthogonal": Field(False, "layers of norm at most 1 by construction"),
    "model.threshold": Field(1.0, "initial ReLU thresholds, and +- MaxMin thresholds"),
    # ---------------------------------------------------------------- l2 radii, pixels in [0, 1]
    "epsilon.train": Field(0.55, "the radius that training ends with", least=0),
    "epsilon.test": Field(0.5, "the radius of evaluations and certificates", least=0),
    # ---------------------------------------------------------------- schedule, in epochs
    "schedule.epochs": Field(100, least=1),
    "schedule.first": Field(0, "epochs that train with bound.first, before bound.mode", least=0),
    "schedule.warmup": Field(0.0, "epochs with an epsilon of 0", least=0),
    "schedule.ramp": Field(
        40.0, "epochs in which epsilon rises to epsilon.train and kappa falls to 0", least=0
    ),
    # ---------------------------------------------------------------- Adam
    "optimizer.learning_rate": Field(5e-3),
    "optimizer.final_learning_rate": Field(1e-5, "at the last epoch"),
    "optimizer.rise": Field(0.0, "epochs in which the learning rate rises from 0", least=0),
    "optimizer.decay_start": Field(50.0, "epoch from which the learning rate falls"),
    "optimizer.decay": Field("exponential", 'how it falls, or "cosine"', choices=DECAYS),
    "optimizer.average": Field(
        0.0,
        "decay in a step of the running average of the weights, which is evaluated, selected and "
        "certified; 0: the weights themselves",
        least=0,
    ),
    # ---------------------------------------------------------------- bound and loss
    "bound.mode": Field(
        "local",
        'or "tight_rows", "tight", "rows", "linear", "paper", "bcp", "global"; control: "unmasked"',
        choices=(*bounds.MODES, *bounds.CONTROLS),
    ),
    "bound.first": Field(
        "global",
        "mode of the first schedule.first epochs; evaluations have bound.mode throughout",
        choices=(*bounds.MODES, *bounds.CONTROLS),
    ),
    "bound.iterations": Field(2, "warm-started power iterations per step", least=1),
    "bound.shared_iterations": Field(
        50, 'of whole norms, which all examples share: modes "global", "bcp", "paper"', least=1
    ),
    "bound.loss": Field(
        "bcp",
        'or "gloro", "trades", "lmt", "emma", "calibrated", "offset", "annealing", "crm"',
        choices=LOSSES,
    ),
    "bound.slope": Field(4.0, 'loss "calibrated": logits that a distance of epsilon is', least=0),
    "bound.trades": Field(1.0, 'loss "trades": weight of the term for robustness', least=0),
    "bound.offset": Field(
        2.0, 'losses "offset", "annealing": epsilons that the margin is to be worth', least=0
    ),
    "bound.temperature": Field(
        0.25, 'likewise, in units of distance; published for "annealing" is 0.75', least=1e-6
    ),
    "bound.annealing": Field(5.0, 'loss "annealing": power of what the label lacks', least=0),
    "bound.crm": Field(15.0, 'loss "crm": weight of the term for radii', least=0),
    "bound.sharpness": Field(5.0, "likewise: of its soft minimum, in 1 / distance", least=1e-6),
    "bound.sparsity": Field(0.0, "weight of the sparsity loss", least=0),
    "bound.stability": Field(0.0, 'weight of the stability loss, for mode "linear"', least=0),
    "bound.rivals": Field(
        0, 'mode "linear": rival classes that get the tighter bound in training; 0: all', least=0
    ),
    # ---------------------------------------------------------------- power iterations
    "vectors.store": Field(
        "example",
        'where the vectors are, one per example: on the devices, or, slower, "host"',
        choices=STORES,
    ),
    "vectors.dtype": Field(
        "float32", 'of the vectors; or "bfloat16", "float8_e4m3fn"', choices=tuple(VECTOR_TYPES)
    ),
    # ---------------------------------------------------------------- devices
    "devices.shard_parameters": Field(
        False, "large parameters, and what Adam keeps of them, split over the devices"
    ),
    # Of training alone: certificates are computed in float64 whatever is said here.
    "precision.products": Field(
        "default",
        'of float32: as the device is quick at (TF32 on GPUs), or "high", "highest" (float32)',
        choices=PRECISIONS,
    ),
    "precision.power_iteration": Field(
        "float32",
        'or "bfloat16", for GPUs and TPUs; slower on CPUs',
        choices=tuple(bounds.PRODUCTS),
    ),
    # ---------------------------------------------------------------- evaluation, checkpoints
    "evaluation.every": Field(5, "epochs from one evaluation to the next", least=1),
    "evaluation.iterations": Field(20, "power iterations, from a fresh start", least=1),
    "checkpoints.every": Field(10, "epochs from one checkpoint to the next", least=1),
    "checkpoints.minutes": Field(
        15.0, "and when so much time has passed; 0: at the end of epochs only", least=0
    ),
    "checkpoints.keep": Field(2, "how many of the newest states", least=2),
}


def default_config() -> ml_collections.ConfigDict:
    """A configuration in which every field has its default."""
    config = ml_collections.ConfigDict()
    for name, field in FIELDS.items():
        *groups, last = name.split(".")
        inner = config
        for group in groups:
            if group not in inner:
                inner[group] = ml_collections.ConfigDict()
            inner = inner[group]
        inner[last] = field.default
    return config


def completed(stored: dict) -> ml_collections.ConfigDict:
    """The configuration that a run stored; a field that it lacks, since an earlier version wrote
    it, has its default.

    But for the fields of the network: what one lacks is another network's, or has the default of
    `models.build`.
    """

    def merged(default: dict, given: dict) -> dict:
        both = default | given
        for name in default.keys() & given.keys():
            if isinstance(default[name], dict) and isinstance(given[name], dict):
                both[name] = merged(default[name], given[name])
        return both

    defaults = default_config().to_dict()
    if "model" in stored:
        del defaults["model"]
    return ml_collections.ConfigDict(merged(defaults, stored))


def check_config(config) -> None:
    """Checks every field that has limits, before any work is done.

    Data and network are checked where they are loaded and built, but for the network's name; the
    optimizer's fields by `learning_rate`.

    Raises:
        ValueError: names the first field that is missing, or whose value makes no sense.
    """
    for name, field in FIELDS.items():
        if field.choices or field.least is not None:
            _check(name, field, _value(config, name))
    average = config.optimizer.average
    if not average < 1:
        raise ValueError(f"optimizer.average must be below 1, such as 0.999, got {average}.")
    first, epochs = config.schedule.first, config.schedule.epochs
    if not first < epochs:
        raise ValueError(
            f"schedule.first must be below schedule.epochs, {epochs}, got {first}: for one mode in "
            "all epochs give it as bound.mode, and 0 here."
        )
    network = _value(config, "model.name")
    if network not in models.NETWORKS:
        models.build(network)  # says which there are


def _value(config, name: str):
    value = config
    for part in name.split("."):
        if part not in value:
            raise ValueError(
                f"the configuration has no {name}: begin with lipjax.training.default_config()."
            )
        value = value[part]
    return value


def _check(name: str, field: Field, value) -> None:
    if name == "vectors.store" and value in FORMER_STORES:
        raise ValueError(
            f"vectors.store {value!r} is no more: networks trained with it certified much less "
            '(docs/scaling.md, Memory). Give "example", or "host" and a narrow vectors.dtype '
            "where the vectors do not fit on the devices."
        )
    if field.choices and value not in field.choices:
        raise ValueError(f"{name} must be one of {', '.join(field.choices)}, got {value!r}.")
    # Not the other way round: NaN fails every comparison.
    if field.least is not None and not (field.least <= value < math.inf):
        raise ValueError(f"{name} must be finite and at least {field.least}, got {value}.")


# ------------------------------------------------------------------------------- what it names


def load_data(config) -> sets.Splits:
    """The data sets that a configuration names.

    Raises:
        data.DataError: as `data.load`.
    """
    return sets.load(
        config.data.name,
        data_dir=config.data.data_dir or None,
        manual_dir=config.data.manual_dir or None,
        validation_fraction=config.data.validation_fraction,
        train_examples=config.data.train_examples or None,
        test_examples=config.data.test_examples or None,
        image_size=config.data.get("image_size") or None,  # runs of before it was there have none
    )


def first_network(config, network: nnx.Module) -> nnx.Module:
    """The network that training begins with: `network`, as `build_network` returns it, or one like
    it with the weights of the file that `config.start` names.

    Raises:
        ValueError: a file of another network, with the first parameter that differs.
        storage.StorageError: as `lipjax.load`.
    """
    if not config.start:
        return network
    wanted, structure = jax.tree_util.tree_flatten_with_path(network)
    here = {jax.tree_util.keystr(path): leaf for path, leaf in wanted}
    loaded = jax.tree_util.tree_leaves_with_path(storage.load(config.start))
    there = {jax.tree_util.keystr(path): leaf for path, leaf in loaded}
    for name in sorted({*here, *there}):
        shapes = [found[name].shape if name in found else None for found in (there, here)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"start: {config.start} holds another network than the {config.model.name} of this "
                f"configuration: {name} is {shapes[0]} there and {shapes[1]} here (None: there is "
                "none). Give the model.* fields with which it was trained."
            )
    return jax.tree.unflatten(structure, [there[name] for name in here])


def build_network(config, input_shape, classes: int) -> nnx.Sequential:
    """The network that a configuration names, freshly initialised from its seed.

    Raises:
        ValueError: as `models.build`.
    """
    arguments = dict(config.model.items())
    name = arguments.pop("name")
    return models.build(
        name,
        input_shape=tuple(input_shape),
        classes=classes,
        rngs=nnx.Rngs(config.seed),
        **arguments,
    )
