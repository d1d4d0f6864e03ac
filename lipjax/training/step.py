"""What train.py is made of: schedules, the training state, one step, and the evaluation that
selects checkpoints."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lipjax import activations, bounds, losses, models, orthogonal
from lipjax.data import pipeline, records, sets
from lipjax.norms import power
from lipjax.runtime import cpu
from lipjax.training import feeding

# Types of the stored singular vectors, and the integers that hold their bits: XLA's CPU backend
# updates rows of integer arrays in place, but widens a whole array of narrow floats to do so
# (measured: 0.2 s a step instead of 0.5 ms for 1/3 of mnist_small's vectors).
VECTOR_TYPES = {"float32": None, "bfloat16": jnp.uint16, "float8_e4m3fn": jnp.uint8}

# Where the vectors of the local power iterations are kept between steps: one for each example, on
# the devices or in the host's memory (`feeding.Keeper`), one for each layer that all examples
# share, or nowhere, to begin anew at random.
STORES = ("example", "host", "layer", "none")

# JAX's names for how products of float32 are made: "default" is what the device is quick at, TF32
# on recent GPUs, bfloat16 on TPUs; "highest" is float32.
PRECISIONS = ("default", "high", "highest")

# Figures of each step.
METRICS = ("loss", "accuracy", "lipschitz_estimate", "gradient_norm", "epsilon", "kappa")

# On CPU: bytes of the largest activation of the examples that go through the network at once, and
# the least number of these; smaller parts cost more in calls than they gain.
CPU_CACHE, LEAST_AT_ONCE = 2**22, 16

# Parameters of fewer entries lie on every device whatever the configuration says.
SPLIT_ENTRIES = 2**14

# Names of losses in `lipjax.losses`.
LOSSES = ("bcp", "gloro", "trades", "lmt", "emma")


class NonFiniteError(FloatingPointError):
    """The loss or the gradient became NaN or infinite."""


# --------------------------------------------------------------------------------------- experiment


def load_data(config) -> sets.Splits:
    """The data sets that a configuration names."""
    return sets.load(
        config.data.name,
        data_dir=config.data.data_dir or None,
        manual_dir=config.data.manual_dir or None,
        validation_fraction=config.data.validation_fraction,
        train_examples=config.data.train_examples or None,
        test_examples=config.data.test_examples or None,
        image_size=config.data.get("image_size") or None,  # runs of before it was there have none
    )


def check_config(config) -> None:
    """Raises a ValueError that names the first field with a value that makes no sense, before any
    work is done.

    Data and network are checked where they are loaded and built, the optimizer's fields by
    `learning_rate`.
    """
    choices = {
        "bound.mode": tuple(bounds.MODES),
        "bound.loss": LOSSES,
        "vectors.dtype": tuple(VECTOR_TYPES),
        "vectors.store": STORES,
        "precision.power_iteration": bounds.PRODUCTS,
        "precision.products": PRECISIONS,
    }
    at_least = {
        **dict.fromkeys(
            ("batch_size", "schedule.epochs", "evaluation.every", "checkpoints.every"), 1
        ),
        **dict.fromkeys(("bound.iterations", "evaluation.iterations"), 1),
        "checkpoints.keep": 2,
        **dict.fromkeys(
            ("seed", "examples_at_once", "epsilon.train", "epsilon.test", "bound.sparsity"), 0
        ),
        **dict.fromkeys(
            ("bound.stability", "bound.trades", "bound.rivals", "checkpoints.minutes"), 0
        ),
        **dict.fromkeys(
            ("schedule.warmup", "schedule.ramp", "data.train_examples", "data.test_examples"), 0
        ),
        **dict.fromkeys(("data.image_size", "data.workers", "data.read_ahead"), 0),
    }
    for name, allowed in choices.items():
        if (value := _field(config, name)) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
    for name, least in at_least.items():
        value = _field(config, name)
        if not (least <= value < np.inf):
            raise ValueError(f"{name} must be finite and at least {least}, got {value}.")


def _field(config, name):
    return functools.reduce(getattr, name.split("."), config)


def build_network(config, input_shape, classes) -> nnx.Sequential:
    """The network that a configuration names, freshly initialised from its seed."""
    arguments = {k: v for k, v in config.model.items() if k != "name"}
    return models.build(
        config.model.name,
        input_shape=tuple(input_shape),
        classes=classes,
        rngs=nnx.Rngs(config.seed),
        **arguments,
    )


def selected_network(checkpoints, config, input_shape, classes) -> tuple[nnx.Sequential, dict]:
    """The network that training selected, as one certifies and executes it (`orthogonal.plain`),
    and what is known of it.

    Args:
        checkpoints: `lipjax.training.checkpoints.Checkpoints` of the run.
        config: the run's.
    """
    graph, state = nnx.split(build_network(config, input_shape, classes))
    # Restored by all processes onto all devices, whatever they were saved from; each process goes
    # on with its own copy.
    everywhere = NamedSharding(device_mesh(), PartitionSpec())
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
        nnx.to_pure_dict(state),
    )
    parameters, selected = checkpoints.restore_best(abstract)
    nnx.replace_by_pure_dict(state, jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), parameters))
    return orthogonal.plain(nnx.merge(graph, state)), selected


# ---------------------------------------------------------------------------------------- schedules


def ramp(step, steps_per_epoch: int, warmup: float, length: float):
    """0 during `warmup` epochs, then linear to 1 over `length` epochs, then 1. `step` may be
    traced."""
    epoch = jnp.asarray(step, jnp.float32) / steps_per_epoch
    return jnp.clip((epoch - warmup) / max(length, 1e-9), 0.0, 1.0)


def learning_rate(config, steps_per_epoch: int) -> optax.Schedule:
    """Constant until epoch `decay_start`, then exponential down to `final` at the last epoch
    (METHOD 6)."""
    rate, final = config.optimizer.learning_rate, config.optimizer.final_learning_rate
    start, epochs = config.optimizer.decay_start, config.schedule.epochs
    if not (0 < final <= rate and 0 <= start <= epochs):
        raise ValueError(
            "optimizer: expected 0 < final_learning_rate <= learning_rate and 0 <= decay_start <= "
            "schedule.epochs, got "
            f"learning_rate={rate}, final_learning_rate={final}, decay_start={start}, "
            f"epochs={epochs}."
        )

    def schedule(step):
        epoch = jnp.asarray(step, jnp.float32) / steps_per_epoch
        progress = jnp.clip((epoch - start) / max(epochs - start, 1e-9), 0.0, 1.0)
        return rate * (final / rate) ** progress

    return schedule


# ------------------------------------------------------------------------------------------ devices


def device_mesh() -> Mesh:
    """All local devices on one axis "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


# -------------------------------------------------------------------------------------------- state


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "network", "optimizer", "vectors", "best"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that training carries from step to step; what a checkpoint holds.

    Attributes:
        step: scalar int32, steps done.
        network: the nnx.Sequential (a pytree).
        optimizer: the optax state.
        vectors: power-iteration vectors as `pack_vector` stores them, a dict: "local" a tuple of
            ``(rows, *shape)`` arrays, row r of the example at r in the flattened `feeding.stripes`
            (store "host": those of one call), or "layer" a tuple of ``shape`` in its place
            (`STORES`); "global" one too.
        best: scalar, the best validation score so far.
    """

    step: jax.Array
    network: Any
    optimizer: Any
    vectors: dict[str, tuple[jax.Array, ...]]
    best: jax.Array


def initial_state(
    network: nnx.Module, transform: optax.GradientTransformation, config, examples: int, input_shape
):
    """The state before the first step; `examples` training examples of `input_shape`."""
    if config.vectors.dtype not in VECTOR_TYPES:
        raise ValueError(
            f"vectors.dtype must be one of {', '.join(VECTOR_TYPES)}, got {config.vectors.dtype!r}."
        )
    dtype = VECTOR_TYPES[config.vectors.dtype] or jnp.dtype(config.vectors.dtype)
    # Zeros: the fresh component of the first warm start makes them a cold start, for each example
    # once.
    vectors: dict[str, tuple[jax.Array, ...]] = {}
    shapes = bounds.vector_shapes(network, input_shape)
    kept = {
        "global": "global",
        "local": {"example": "local", "host": "local", "layer": "layer", "none": None}[
            config.vectors.store
        ],
    }
    for name in filter(None, (kept[name] for name in bounds.mode_of(config.bound.mode).vectors)):
        rows = (config.batch_size * -(-examples // config.batch_size),) if name == "local" else ()
        vectors[name] = tuple(jnp.zeros((*rows, *shape), dtype) for shape in shapes)
    return State(
        jnp.zeros((), jnp.int32),
        network,
        transform.init(network),
        vectors,
        jnp.asarray(-jnp.inf, jnp.float32),
    )


def pack_vector(vector: jax.Array, dtype: str) -> jax.Array:
    """A unit vector as the state stores it: scaled to entries of size 1 (float8 keeps three bits of
    mantissa and few of exponent), in `dtype`, narrow types as the integers of their bits. Zero is
    zero in all of them."""
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


def split_axis(shape: tuple[int, ...], config, devices: int) -> int | None:
    """The axis along which a parameter lies split over the devices, with
    `config.devices.shard_parameters`: its largest that divides, None for a small parameter or where
        none does."""
    if not config.devices.shard_parameters or devices == 1 or math.prod(shape) < SPLIT_ENTRIES:
        return None
    return max(
        (n for n in range(len(shape)) if shape[n] % devices == 0),
        key=lambda n: shape[n],
        default=None,
    )


def state_specs(state: State, config, devices: int) -> State:
    """Where everything is, a tree of PartitionSpec: replicated, but for the vectors of the
    examples, of which each device has those of its `feeding.stripes`, and for parameters and what
    the optimizer keeps of them where `split_axis` says so."""

    def spec(leaf):
        axis = split_axis(leaf.shape, config, devices)
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "data")

    specs = jax.tree.map(lambda _: PartitionSpec(), state)
    specs = dataclasses.replace(
        specs,
        network=jax.tree.map(spec, state.network),
        optimizer=jax.tree.map(spec, state.optimizer),
    )
    if "local" in state.vectors:
        split = (PartitionSpec("data"),) * len(state.vectors["local"])
        specs = dataclasses.replace(specs, vectors={**specs.vectors, "local": split})
    return specs


def state_shardings(state: State, config, mesh: Mesh):
    """`state_specs` on a mesh."""
    return _placed(state_specs(state, config, mesh.size), mesh)


def _placed(specs, mesh):
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda s: isinstance(s, PartitionSpec),
    )


# ----------------------------------------------------------------------------------------- the step


def example_loss(network, x, label, epsilon, kappa, vectors, config):
    """Loss of one example, and what the step reports and keeps.

    BCP and sparsity follow METHOD 3: ``kappa CE(clean) + (1 - kappa) (CE(worst) + weight *
    sparsity)``; the other losses need no kappa but for their sparsity term. Stability is weighted
    as sparsity is.
    """
    options = config.bound
    how = {
        "mode": options.mode,
        "iterations": options.iterations,
        "rivals": options.rivals or None,
        "products": config.precision.power_iteration,
    }
    bound = bounds.bound(network, x, epsilon, vectors=vectors, **how)
    if options.loss == "bcp":
        loss = losses.bcp(bound, label, kappa)
    elif options.loss == "trades":
        loss = losses.trades(bound, label, options.trades)
    elif options.loss in LOSSES:
        loss = getattr(losses, options.loss)(bound, label)
    else:
        raise ValueError(f"bound.loss must be one of {', '.join(LOSSES)}, got {options.loss!r}.")
    if options.sparsity:
        loss += (1 - kappa) * options.sparsity * losses.sparsity(bound)
    if options.stability:
        loss += (1 - kappa) * options.stability * losses.stability(bound)
    correct = jnp.argmax(bound.logits) == label
    return loss, (jax.lax.stop_gradient(bound.vectors), correct, bound.lipschitz)


def make_steps(
    config,
    transform: optax.GradientTransformation,
    steps_per_epoch: int,
    train: sets.Dataset,
    mesh: Mesh,
    state,
    most: int,
    loss: Callable = example_loss,
):
    """The jitted ``(state, images, labels, slots, kept_slots, count) -> (state, metrics)``: `count`
    training steps in one call.

    The state is donated. All randomness comes from ``fold_in(seed, step)``: a restart continues
    exactly, and how steps are spread over calls has no influence on the result. Each device works
    on its own `feeding.stripes`; only sums of gradients, metrics and common vectors travel.

    Args:
        train: says how images are stored, and whether they come augmented (`pipeline.augments`).
        most: the largest count. The program is compiled once for all counts.
        loss: of one example; arguments and results as those of `example_loss`.

    Raises:
        ValueError: as `examples_at_once`; when called, for slots of another shape.

    Args of the function, as `feeding.Feeder` gives them: `images` ``(batch * n, H, W, C)`` as
    stored and `labels` ``(batch * n,)``, n for each place of a batch; `slots` ``(most, batch)``,
    which of its n each place takes in each step; `kept_slots` of the same shape, likewise for the
    rows of the state's vectors; `count`. Metrics are arrays ``(most,)``; what is behind the first
    `count` is not used.
    """
    root = jax.random.key(config.seed)
    pack = functools.partial(pack_vector, dtype=config.vectors.dtype)
    unpack = functools.partial(unpack_vector, dtype=config.vectors.dtype)
    size = config.batch_size
    parts = size // examples_at_once(config, mesh, state)
    own = size // mesh.size  # places of a batch on one device
    augment = config.data.augment and not pipeline.augments(train)

    def total(tree):
        """The sum over all devices."""
        if mesh.size == 1:
            return tree
        # As one vector: XLA's CPU backend, with several devices in each of several processes, may
        # begin several sums in different orders, and then waits for ever.
        flat, unravel = ravel_pytree(tree)
        return unravel(jax.lax.psum(flat, "data"))

    # Parameters that lie split over the devices: those of one device behind one another travel as
    # one vector, too.
    axes = [split_axis(leaf.shape, config, mesh.size) for leaf in jax.tree.leaves(state.network)]

    def gathered(network):
        """The whole network on each device."""
        leaves, tree = jax.tree.flatten(network)
        mine = [leaf for leaf, axis in zip(leaves, axes, strict=True) if axis is not None]
        if not mine:
            return network
        flat, unravel = ravel_pytree(mine)
        parts = iter(jax.vmap(unravel)(jax.lax.all_gather(flat, "data")))
        for n, axis in enumerate(axes):
            if axis is not None:
                shape = [
                    size * (mesh.size if k == axis else 1) for k, size in enumerate(leaves[n].shape)
                ]
                leaves[n] = jnp.moveaxis(next(parts), 0, axis).reshape(shape)
        return jax.tree.unflatten(tree, leaves)

    def summed(gradient, sums):
        """Both summed over the devices, of the gradient what belongs to each device's parameters;
        and its norm."""
        leaves, tree = jax.tree.flatten(gradient)
        split = [n for n, axis in enumerate(axes) if axis is not None]
        squares = jnp.zeros(())
        if split:
            pieces = []
            for n in split:
                shape, axis = leaves[n].shape, axes[n]
                apart = leaves[n].reshape(
                    *shape[:axis], mesh.size, shape[axis] // mesh.size, *shape[axis + 1 :]
                )
                pieces.append(jnp.moveaxis(apart, axis, 0))
            flat = jnp.concatenate([piece.reshape(mesh.size, -1) for piece in pieces], axis=1)
            own_part = jax.lax.psum_scatter(flat, "data")
            _, unravel = ravel_pytree([piece[0] for piece in pieces])
            for n, leaf in zip(split, unravel(own_part), strict=True):
                leaves[n] = leaf
            squares = jnp.sum(own_part**2)
        whole = [leaf for n, leaf in enumerate(leaves) if n not in split]
        # One sum after the other (see `total`).
        whole, sums, squares = jax.lax.optimization_barrier((whole, sums, squares))
        whole, sums, squares = total((whole, sums, squares))
        norm = jnp.sqrt(squares + sum((jnp.sum(leaf**2) for leaf in whole), jnp.zeros(())))
        rest = iter(whole)
        leaves = [leaf if n in split else next(rest) for n, leaf in enumerate(leaves)]
        return jax.tree.unflatten(tree, leaves), sums, norm

    def part_of_step(network, epsilon, kappa, starts, key, carried, columns):
        """Adds one part of a batch: gradient, sums of the metrics, and the vectors after it."""
        vectors, gradient, sums = carried
        images, labels, rows = columns
        starts = dict(starts)
        if "local" in vectors:
            # One fresh direction for all examples: it has to be new in each step, not in each
            # example.
            starts["local"] = tuple(
                jax.vmap(power.refresh, in_axes=(0, None))(
                    unpack(stored[rows]), jax.random.fold_in(key, n)
                )
                for n, stored in enumerate(vectors["local"])
            )
        each_own = {name: 0 if name in vectors and name == "local" else None for name in starts}
        after = {name: 0 if name == "local" else None for name in starts}

        def loss_of(network):
            one = functools.partial(loss, network, config=config)
            each, (found, correct, lipschitz) = jax.vmap(
                one, in_axes=(0, 0, None, None, each_own), out_axes=(0, (after, 0, 0))
            )(images, labels, epsilon, kappa, starts)
            mean = jnp.sum(each) / size
            return mean, (
                found,
                jnp.stack([mean, jnp.sum(correct) / size, jnp.sum(lipschitz) / size]),
            )

        (_, (found, more)), change = jax.value_and_grad(loss_of, has_aux=True)(network)
        kept = {}
        if "layer" in vectors:  # those of the last part of the batch
            directions = tuple(map(_common_direction, found["local"], starts["local"]))
            kept["layer"] = tuple(
                pack(power.normalize(direction)) for direction in total(directions)
            )
        if "local" in vectors:
            kept["local"] = tuple(
                stored.at[rows].set(jax.vmap(pack)(vector))
                for stored, vector in zip(vectors["local"], found["local"], strict=True)
            )
        if "global" in vectors:
            kept["global"] = tuple(map(pack, found["global"]))
        return kept, jax.tree.map(jnp.add, gradient, change), sums + more

    def step(state: State, images, labels, rows):
        augment_key, fresh_key = jax.random.split(jax.random.fold_in(root, state.step))
        progress = ramp(state.step, steps_per_epoch, config.schedule.warmup, config.schedule.ramp)
        epsilon, kappa = progress * config.epsilon.train, 1 - progress
        images = images.astype(jnp.float32) / train.levels
        if augment:
            images = sets.random_crop_and_flip(
                images, augment_key, first=jax.lax.axis_index("data") * own
            )
        local_key, global_key = jax.random.split(fresh_key)
        network = gathered(state.network)
        # All parts begin with the same vectors of what the examples share.
        starts = {
            {"layer": "local"}.get(name, name): tuple(
                power.refresh(
                    unpack(v),
                    jax.random.fold_in(jax.random.fold_in(global_key, n), name == "layer"),
                )
                for n, v in enumerate(stored)
            )
            for name, stored in state.vectors.items()
            if name != "local"
        }
        if config.vectors.store == "none" and "local" in bounds.mode_of(config.bound.mode).vectors:
            shapes = bounds.vector_shapes(network, images.shape[1:])
            starts["local"] = tuple(
                jax.random.normal(jax.random.fold_in(local_key, n), shape)
                for n, shape in enumerate(shapes)
            )
        one_part = functools.partial(part_of_step, network, epsilon, kappa, starts, local_key)
        carried = (state.vectors, jax.tree.map(jnp.zeros_like, network), jnp.zeros(3))
        if parts == 1:
            carried = one_part(carried, (images, labels, rows))
        else:
            columns = jax.tree.map(
                lambda a: a.reshape(parts, own // parts, *a.shape[1:]), (images, labels, rows)
            )
            carried, _ = jax.lax.scan(
                lambda carried, columns: (one_part(carried, columns), None), carried, columns
            )
        vectors, gradient, sums = carried
        gradient, (mean, accuracy, lipschitz), norm = summed(gradient, sums)
        updates, optimizer = transform.update(gradient, state.optimizer, state.network)
        network = activations.project(optax.apply_updates(state.network, updates))
        metrics = {
            "loss": mean,
            "accuracy": accuracy,
            "lipschitz_estimate": lipschitz,
            "gradient_norm": norm,
            "epsilon": epsilon,
            "kappa": kappa,
        }
        return State(state.step + 1, network, optimizer, vectors, state.best), metrics

    def on_device(state: State, images, labels, slots, kept_slots, count):
        def rows(slots, kept):  # n rows of each place follow one another
            return jnp.arange(own) * (kept // own) + slots

        held = max((len(v) for v in state.vectors.get("local", ())), default=own)

        def one(i, carried):
            state, metrics = carried
            where = rows(slots[i], len(images))
            state, values = step(state, images[where], labels[where], rows(kept_slots[i], held))
            return state, {name: metrics[name].at[i].set(value) for name, value in values.items()}

        return jax.lax.fori_loop(
            0, count, one, (state, {name: jnp.zeros(most) for name in METRICS})
        )

    specs, split, batches = (
        state_specs(state, config, mesh.size),
        PartitionSpec("data"),
        PartitionSpec(None, "data"),
    )
    arguments = (specs, split, split, batches, batches, PartitionSpec())
    shared_out = jax.shard_map(
        cpu.for_cpu(on_device),
        mesh=mesh,
        in_specs=arguments,
        out_specs=(specs, PartitionSpec()),
        check_vma=False,
    )

    def steps(state: State, images, labels, slots, kept_slots, count):
        if slots.shape != (most, size) or kept_slots.shape != (most, size):
            raise ValueError(
                f"expected slots and kept_slots of shape {(most, size)}, got {slots.shape} and "
                f"{kept_slots.shape}."
            )
        return shared_out(state, images, labels, slots, kept_slots, count)

    where, results = _placed(arguments, mesh), _placed((specs, PartitionSpec()), mesh)
    return jax.jit(steps, donate_argnums=0, in_shardings=where, out_shardings=results)


def _common_direction(vectors: jax.Array, start: jax.Array) -> jax.Array:
    """The sum of unit vectors ``(examples, *shape)``, each turned to the side of `start`."""
    axes = tuple(range(1, vectors.ndim))
    sides = jnp.where(jnp.sum(vectors * start, axis=axes, keepdims=True) < 0, -1.0, 1.0)
    return jnp.sum(sides * vectors, axis=0)


def examples_at_once(config, mesh: Mesh, state: State) -> int:
    """How many examples of a batch go through the network at once: `config.examples_at_once`, or by
    the devices if that is 0.

    Gradients are summed over the parts of a batch, so this is of influence on memory and speed, and
    on the result by rounding only. On CPU it is so many that the largest activation stays in the
    cache, elsewhere the whole batch.

    Raises:
        ValueError: a number that does not divide the batch, or over the devices.
    """
    size, asked = config.batch_size, config.examples_at_once
    if asked:
        if size % asked or asked % mesh.size:
            raise ValueError(
                f"examples_at_once must divide batch_size ({size}) and be a multiple of the "
                f"devices ({mesh.size}), got "
                f"{asked}."
            )
        return asked
    if jax.default_backend() != "cpu":
        return size
    shapes = [
        v.shape[1:] if name == "local" else v.shape
        for name, all_ in state.vectors.items()
        for v in all_
    ]
    fitting = CPU_CACHE // (4 * max(map(math.prod, shapes), default=CPU_CACHE // 128))
    allowed = [n for n in range(mesh.size, size + 1, mesh.size) if size % n == 0]
    return max((n for n in allowed if n <= max(fitting, LEAST_AT_ONCE)), default=allowed[0])


def check_finite(metrics: list[dict], first_step: int) -> None:
    """Raises NonFiniteError naming the first step whose loss or gradient norm is not finite."""
    for offset, values in enumerate(metrics):
        for name in ("loss", "gradient_norm"):
            if not np.isfinite(values[name]):
                raise NonFiniteError(
                    f"{name} is {values[name]} at step {first_step + offset}: training stopped; "
                    "the last checkpoint is "
                    "good. Try a lower optimizer.learning_rate or a longer schedule.ramp, in "
                    "another workdir."
                )


# --------------------------------------------------------------------------------------- evaluation


@functools.partial(jax.jit, static_argnames=("mode", "iterations"))
@cpu.for_cpu
def _evaluate_batch(network, images, labels, weights, epsilon, *, mode, iterations):
    def one(x, label):
        bound = bounds.bound(network, x, epsilon, mode=mode, iterations=iterations)
        correct = jnp.argmax(bound.logits) == label
        robust = bounds.margin(bounds.worst_logits(bound, label), label) > 0
        return correct, correct & robust, bound.lipschitz

    correct, robust, lipschitz = jax.vmap(one)(images, labels)
    return (correct * weights).sum(), (robust * weights).sum(), (lipschitz * weights).sum()


def evaluate(network, dataset: sets.Dataset, config, mesh: Mesh) -> dict[str, float]:
    """Accuracy and *estimated* robust accuracy at ``config.epsilon.test``; every example exactly
    once.

    Power iteration starts afresh here and runs `config.evaluation.iterations` times: a stored
    vector that has gone wrong in training cannot flatter the selection. The starts are the same in
    each evaluation, which makes epochs comparable, and nothing is trained with them: weights cannot
    hide norms from them.
    """
    size, split, count = config.batch_size, PartitionSpec("data"), len(dataset.labels)
    positions = np.arange(-(-count // size) * size).reshape(-1, size)
    rows, totals = np.minimum(positions, count - 1), np.zeros(3)
    for images, labels, weights in zip(
        _images_of(dataset, rows, config, mesh),
        dataset.labels[rows],
        (positions < count).astype(np.float32),
        strict=True,
    ):
        batch = (images, feeding.put(labels, mesh, split), feeding.put(weights, mesh, split))
        out = _evaluate_batch(
            network,
            *batch,
            config.epsilon.test,
            mode=config.bound.mode,
            iterations=config.evaluation.iterations,
        )
        totals += np.array(jax.device_get(out))
    clean, robust, lipschitz = (totals / len(dataset.labels)).tolist()
    return {
        "validation_accuracy": clean,
        "validation_robust_accuracy_estimate": robust,
        "validation_lipschitz_estimate": lipschitz,
    }


def _images_of(dataset, rows, config, mesh) -> Iterator[jax.Array]:
    """The images at each of ``(batches, size)`` rows, floats in [0, 1], over the devices; sets on
    disk are read ahead."""
    split = PartitionSpec("data")
    if not isinstance(dataset.images, records.Images):
        for batch in rows:
            yield feeding.put(dataset.unit_images(batch), mesh, split)
        return
    mine = feeding.places(rows.shape[1], mesh)
    options = {"workers": config.data.workers, "read_ahead": config.data.read_ahead}
    with pipeline.batches(dataset, rows[:, mine], seed=0, first_step=0, **options) as batches:
        for images, _ in batches:
            whole = np.zeros((rows.shape[1], *images.shape[1:]), np.float32)
            whole[mine] = images.astype(np.float32) / np.float32(dataset.levels)
            yield feeding.put(whole, mesh, split)
