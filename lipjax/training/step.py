"""Training steps: what happens to a batch, in the order in which its data flow.

`make_steps` compiles a call of several steps; `_take_steps` is that call on one device, `_step` one
step of it. A step takes its images, lets them through the network in parts (`_add_part`), sums the
gradients over the devices and changes the parameters.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from lipjax import activations, bounds, losses
from lipjax.data import pipeline, sets
from lipjax.runtime import cpu
from lipjax.training import sharding
from lipjax.training.config import LOSSES
from lipjax.training.schedules import ramp
from lipjax.training.state import State, state_specs
from lipjax.training.vectors import global_starts, local_starts, store_vectors

# Figures of each step.
METRICS = ("loss", "accuracy", "lipschitz_estimate", "gradient_norm", "epsilon", "kappa")

# Of the key from which rotations are drawn.
ROTATION = 7

# On CPU: bytes of the largest activation of the examples that go through the network at once, and
# the least number of these; smaller parts cost more in calls than they gain.
CPU_CACHE = 2**22
LEAST_AT_ONCE = 16


class NonFiniteError(FloatingPointError):
    """The loss or the gradient became NaN or infinite."""


# ------------------------------------------------------------------------------------ one example


def example_loss(network, x, label, epsilon, kappa, vectors, config):
    """Loss of one example, and what the step reports and keeps.

    BCP and sparsity follow docs/method.md, 3: ``kappa CE(clean) + (1 - kappa) (CE(worst) + weight *
    sparsity)``; the other losses need no kappa but for their sparsity term. Stability is weighted
    as sparsity is.

    Args:
        x: the image, ``(H, W, C)`` floats in [0, 1].
        epsilon, kappa: of this step.
        vectors: where the power iterations begin, as `bounds.bound` takes them.

    Returns:
        ``(loss, (vectors, correct, lipschitz))``.
    """
    options = config.bound
    bound = bounds.bound(
        network,
        x,
        epsilon,
        vectors=vectors,
        mode=options.mode,
        iterations=options.iterations,
        shared_iterations=1,  # the others came before: `_iterate_shared`
        rivals=options.rivals or None,
        products=config.precision.power_iteration,
    )
    loss = _loss_of_bound(bound, label, kappa, options)
    if options.sparsity:
        loss += (1 - kappa) * options.sparsity * losses.sparsity(bound)
    if options.stability:
        loss += (1 - kappa) * options.stability * losses.stability(bound)

    correct = jnp.argmax(bound.logits) == label
    return loss, (jax.lax.stop_gradient(bound.vectors), correct, bound.lipschitz)


def _loss_of_bound(bound, label, kappa, options):
    arguments = {
        "bcp": (kappa,),
        "trades": (options.trades,),
        "calibrated": (kappa, options.slope),
        "offset": (options.offset, options.temperature),
        "annealing": (options.offset, options.temperature, options.annealing),
        "crm": (options.crm, options.sharpness),
    }
    if options.loss in LOSSES:
        return getattr(losses, options.loss)(bound, label, *arguments.get(options.loss, ()))
    raise ValueError(f"bound.loss must be one of {', '.join(LOSSES)}, got {options.loss!r}.")


# ----------------------------------------------------------------------------------- the compiled


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What is the same in all steps, and known before anything is compiled.

    Attributes:
        levels: the stored value of a pixel of 1.
        augment: whether the step itself crops and flips.
        devices: how many; each has `places` of a batch.
        parts: into so many a device's places are divided.
        axes: of each parameter, `sharding.split_axis`.
        max_steps: of a call.
        loss: as `example_loss`.
    """

    config: Any
    transform: optax.GradientTransformation
    steps_per_epoch: int
    levels: float
    augment: bool
    devices: int
    places: int
    parts: int
    axes: list[int | None]
    max_steps: int
    loss: Callable


def make_steps(
    config,
    transform: optax.GradientTransformation,
    steps_per_epoch: int,
    train: sets.Dataset,
    mesh: Mesh,
    state,
    max_steps: int,
    loss: Callable = example_loss,
):
    """The jitted ``(state, images, labels, slots, vector_slots, count) -> (state, metrics)``:
    `count` training steps in one call.

    All have `bound.mode`, whatever the epoch (`schedules.with_mode`). The state is donated. All
    randomness comes from ``fold_in(seed, step)``: a restart continues exactly, and how steps are
    spread over calls has no influence on the result. Each device works on its own
    `feeding.stripes`; only sums of gradients and metrics travel.

    Args:
        train: says how images are stored, and whether they come augmented (`pipeline.augments`).
        state: its shapes.
        max_steps: the largest count. The program is compiled once for all counts.
        loss: of one example; arguments and results as those of `example_loss`.

    Raises:
        ValueError: as `examples_at_once`; when called, for slots of another shape.

    Args of the function, as `feeding.Feeder` gives them: `images` ``(batch * n, H, W, C)`` as
    stored and `labels` ``(batch * n,)``, n for each place of a batch; `slots` ``(max_steps,
    batch)``, which of its n each place takes in each step; `vector_slots` of the same shape,
    likewise for the rows of the state's vectors; `count`. Metrics are arrays ``(max_steps,)``; what
    is behind the first `count` is not used.
    """
    size = config.batch_size
    leaves = jax.tree.leaves(state.network)
    setting = _Setting(
        config=config,
        transform=transform,
        steps_per_epoch=steps_per_epoch,
        levels=train.levels,
        augment=config.data.augment and not pipeline.augments(train),
        devices=mesh.size,
        places=size // mesh.size,
        parts=size // examples_at_once(config, mesh, state),
        axes=[sharding.split_axis(leaf.shape, config, mesh.size) for leaf in leaves],
        max_steps=max_steps,
        loss=loss,
    )

    # State, images, labels, slots, vector_slots, count.
    specs = state_specs(state, config, mesh.size)
    rows = PartitionSpec("data")
    places = PartitionSpec(None, "data")
    taken = (specs, rows, rows, places, places, PartitionSpec())
    given = (specs, PartitionSpec())
    on_devices = jax.shard_map(
        cpu.for_cpu(functools.partial(_take_steps, setting)),
        mesh=mesh,
        in_specs=taken,
        out_specs=given,
        check_vma=False,
    )

    def steps(state: State, images, labels, slots, vector_slots, count):
        if slots.shape != (max_steps, size) or vector_slots.shape != (max_steps, size):
            raise ValueError(
                f"expected slots and vector_slots of shape {(max_steps, size)}, got {slots.shape} "
                f"and {vector_slots.shape}."
            )
        return on_devices(state, images, labels, slots, vector_slots, count)

    return jax.jit(
        steps,
        donate_argnums=0,
        in_shardings=sharding.on_mesh(taken, mesh),
        out_shardings=sharding.on_mesh(given, mesh),
    )


def _take_steps(setting, state: State, images, labels, slots, vector_slots, count):
    """`count` steps on one device, which has its own places of each batch."""

    def rows(slots, held):  # the rows of one place follow one another
        return jnp.arange(setting.places) * (held // setting.places) + slots

    held = max((len(v) for v in state.vectors.get("local", ())), default=setting.places)

    def one(i, carried):
        state, metrics = carried
        chosen = rows(slots[i], len(images))
        vector_rows = rows(vector_slots[i], held)
        state, values = _step(setting, state, images[chosen], labels[chosen], vector_rows)
        return state, {name: metrics[name].at[i].set(value) for name, value in values.items()}

    metrics = {name: jnp.zeros(setting.max_steps) for name in METRICS}
    return jax.lax.fori_loop(0, count, one, (state, metrics))


def _step(setting, state: State, images, labels, vector_rows):
    """One step on one device: images as stored ``(places, H, W, C)``, and where their vectors
    lie."""
    config = setting.config
    step_key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    augment_key, fresh_key = jax.random.split(step_key)

    # ---------------------------------------------------------------- schedule
    schedule = config.schedule
    progress = ramp(state.step, setting.steps_per_epoch, schedule.warmup, schedule.ramp)
    epsilon = progress * config.epsilon.train
    kappa = 1 - progress

    # ---------------------------------------------------------------- images
    images = images.astype(jnp.float32) / setting.levels
    first = jax.lax.axis_index("data") * setting.places
    if setting.augment:
        images = sets.random_crop_and_flip(images, augment_key, first=first)
    if config.data.rotation:
        # A key beside those of the split above, which keep the draws of earlier versions.
        rotation_key = jax.random.fold_in(step_key, ROTATION)
        images = sets.random_rotation(images, rotation_key, config.data.rotation, first=first)

    # ---------------------------------------------------------------- network, starting vectors
    local_key, global_key = jax.random.split(fresh_key)
    # Those of a mode that trains in other epochs stay as they are.
    names = bounds.mode_of(config.bound.mode).vectors
    own = {name: vectors for name, vectors in state.vectors.items() if name in names}
    network = sharding.gather_parameters(state.network, setting.axes, setting.devices)
    # All parts of the batch begin with the same vectors of what the examples share.
    starts = global_starts(own, global_key, config.vectors.dtype)
    starts = _iterate_shared(config, network, images[0], starts)

    # ---------------------------------------------------------------- gradient
    one_part = functools.partial(_add_part, setting, network, epsilon, kappa, starts, local_key)
    totals = (own, jax.tree.map(jnp.zeros_like, network), jnp.zeros(3))
    totals = _over_parts(one_part, totals, (images, labels, vector_rows), setting.parts)
    own, gradient, sums = totals
    vectors = {**state.vectors, **own}
    gradient, sums, norm = sharding.sum_gradients(gradient, sums, setting.axes, setting.devices)

    # ---------------------------------------------------------------- update
    updates, optimizer = setting.transform.update(gradient, state.optimizer, state.network)
    network = activations.project(optax.apply_updates(state.network, updates))
    average = _averaged(state, network, config.optimizer.average)
    loss, accuracy, lipschitz = sums
    metrics = {
        "loss": loss,
        "accuracy": accuracy,
        "lipschitz_estimate": lipschitz,
        "gradient_norm": norm,
        "epsilon": epsilon,
        "kappa": kappa,
    }
    return State(state.step + 1, network, optimizer, vectors, state.best, average), metrics


def _averaged(state: State, network, decay: float):
    """The average of the networks so far with one more: the mean of all at first, so that the
    initial weights are not in it, then one that forgets exponentially."""
    if state.average is None:
        return None
    weight = jnp.maximum(1 - decay, 1 / (state.step + 1))
    return optax.incremental_update(network, state.average, weight)


def _iterate_shared(config, network, image, starts: dict) -> dict:
    """All but the last of the iterations of the norms that all examples share: once for a step, and
    not for each part of the batch. The last one is what is differentiated.

    Whole norms do not depend on the image, and all modes that have them have the same.
    """
    count = config.bound.shared_iterations - 1
    if not starts or not count:
        return starts
    found = bounds.bound(
        network,
        image,
        0.0,
        vectors=starts,
        mode="global",
        shared_iterations=count,
        products=config.precision.power_iteration,
    )
    return {"global": jax.lax.stop_gradient(found.vectors["global"])}


def _over_parts(one_part, totals, columns, parts: int):
    """`one_part` on each part of the columns in turn."""
    if parts == 1:
        return one_part(totals, columns)
    columns = jax.tree.map(lambda a: a.reshape(parts, len(a) // parts, *a.shape[1:]), columns)
    totals, _ = jax.lax.scan(
        lambda totals, columns: (one_part(totals, columns), None), totals, columns
    )
    return totals


def _add_part(setting, network, epsilon, kappa, starts, key, totals, columns):
    """Lets one part of a batch through the network: adds its gradient and its sums of loss,
    accuracy and Lipschitz estimate, and stores its vectors."""
    vectors, gradient, sums = totals
    images, labels, vector_rows = columns
    size, dtype = setting.config.batch_size, setting.config.vectors.dtype
    starts = {**starts, **local_starts(vectors, vector_rows, key, dtype)}
    axes = {name: 0 if name == "local" else None for name in starts}

    def loss_of(network):
        one = functools.partial(setting.loss, network, config=setting.config)
        each, (found, correct, lipschitz) = jax.vmap(
            one, in_axes=(0, 0, None, None, axes), out_axes=(0, (axes, 0, 0))
        )(images, labels, epsilon, kappa, starts)
        mean = jnp.sum(each) / size
        figures = jnp.stack([mean, jnp.sum(correct) / size, jnp.sum(lipschitz) / size])
        return mean, (found, figures)

    (_, (found, figures)), change = jax.value_and_grad(loss_of, has_aux=True)(network)
    vectors = store_vectors(vectors, found, vector_rows, dtype)
    return vectors, jax.tree.map(jnp.add, gradient, change), sums + figures


# --------------------------------------------------------------------------------- around the calls


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
                f"devices ({mesh.size}), got {asked}."
            )
        return asked
    if jax.default_backend() != "cpu":
        return size

    shapes = [v.shape[1:] for v in state.vectors.get("local", ())]
    shapes += [v.shape for v in state.vectors.get("global", ())]
    largest = max(map(math.prod, shapes), default=CPU_CACHE // 128)
    fitting = max(CPU_CACHE // (4 * largest), LEAST_AT_ONCE)
    allowed = [n for n in range(mesh.size, size + 1, mesh.size) if size % n == 0]
    return max((n for n in allowed if n <= fitting), default=allowed[0])


def check_finite(metrics: list[dict], first_step: int) -> None:
    """Raises NonFiniteError naming the first step whose loss or gradient norm is not finite."""
    for offset, values in enumerate(metrics):
        for name in ("loss", "gradient_norm"):
            if not np.isfinite(values[name]):
                raise NonFiniteError(
                    f"{name} is {values[name]} at step {first_step + offset}: training stopped; "
                    "the last checkpoint is good. Try a lower optimizer.learning_rate or a longer "
                    "schedule.ramp, in another workdir."
                )
