"""Trains a network with local Lipschitz bounds; certify it afterwards.

    python train.py --config=configs/digits.py --workdir=runs/digits
    python train.py --config=configs/cifar10_maxmin.py --workdir=runs/cifar10
    python train.py --config=configs/cifar10_maxmin.py --plan --plan_device=h200

`lipjax train` is the same, and `lipjax plan` what --plan is: it says what a configuration needs,
before anything runs.

Run again with the same workdir to continue where it stopped, exactly: also after a kill at any
moment, and on another number of devices. SIGTERM saves first. On several machines start it on each
of them, with --hosts. The workdir gets config.json, metrics.jsonl (one line per epoch), curves.png
(the same as a picture, refreshed now and then) and checkpoints/ (the newest states, and the
parameters that did best on the validation split, which is held out of the training set).
"""

import contextlib
import dataclasses
import functools
import io
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import flags, logging
from flax import nnx
from jax.sharding import PartitionSpec

from lipjax import bounds, training
from lipjax.cli import common
from lipjax.cli import plan as plan_command
from lipjax.data import sets
from lipjax.formats.files import replaced
from lipjax.runtime import cpu, hosts
from lipjax.training import feeding, sharding
from lipjax.training.checkpoints import CheckpointError, Checkpoints, locked, open_workdir
from lipjax.training.metrics import (
    ROBUST,
    Curves,
    Metrics,
    Progress,
    TensorBoard,
    best_of,
    duration,
    read_metrics,
    score,
    tensorboard_writer,
)

# No more steps in one call of the device than take about so long.
SECONDS_PER_CALL = 5.0

# Fields that say where things are and not what is computed: they may differ when a run is
# continued.
VOLATILE = (
    "data.data_dir",
    "data.manual_dir",
    "data.workers",
    "data.read_ahead",
    "checkpoints.minutes",
    "devices.shard_parameters",
)

# These say what is wrong and what to do.
ERRORS = (sets.DataError, CheckpointError, training.NonFiniteError, ValueError, OSError)


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    own = {"flag_values": values}
    common.define_config(values)
    flags.DEFINE_string(
        "workdir", None, "Folder of this run; default runs/<name of the config>.", **own
    )
    flags.DEFINE_integer(
        "stop_after",
        None,
        "Stop after this epoch, to go on later; no influence on the result.",
        lower_bound=1,
        **own,
    )
    flags.DEFINE_bool(
        "tensorboard",
        False,
        "Also write the metrics to workdir/tensorboard, for TensorBoard; needs tensorboardX.",
        **own,
    )
    flags.DEFINE_bool("plan", False, "Print what the configuration needs and end.", **own)
    plan_command.define_flags(values, prefix="plan_", when="With --plan: ")
    common.define_hosts(values)


def main(options: flags.FlagValues) -> None:
    """Trains as the flags say; each station below is a function with its name."""
    hosts.join(options.hosts)
    cpu.keep_compiled()
    began = time.monotonic()
    # Orbax reports every step of every save; its errors are reported below.
    logging.set_verbosity(logging.FATAL)
    config = options.config
    training.check_config(config)
    config.lock()
    if options.plan:
        plan_command.main(options, prefix="plan_")
        return
    if options.tensorboard:
        tensorboard_writer()  # refused now and not when the folder is claimed

    # ------------------------------------------------------------------ devices, data
    mesh = training.device_mesh()
    sharding.check_batch(config.batch_size, mesh.size)
    splits = training.load_data(config)
    describe(splits, mesh)

    # ------------------------------------------------------------------ network, optimizer, state
    parts = prepare(config, splits.train, mesh)

    # ------------------------------------------------------------------ workdir
    # Not earlier: a start that fails for its data or its settings must not claim the folder.
    workdir = options.workdir or f"runs/{common.config_name(options)}"
    workdir = Path(os.path.abspath(os.path.expanduser(workdir)))
    with contextlib.ExitStack() as stack:
        claim(workdir, config, stack)
        checkpoints = stack.enter_context(Checkpoints(workdir, keep_last=config.checkpoints.keep))

        # -------------------------------------------------------------- restore or begin
        position = restore(parts, checkpoints) or begin(parts)
        recorders = open_recorders(workdir, parts, position, options.tensorboard, stack)

        # -------------------------------------------------------------- compile
        # Before the clock of the progress starts, or the time left would be far off for a while.
        feed = stack.enter_context(feeding.Feeder(splits.train, config, mesh, feeding.MAX_STEPS))
        mode = training.mode_at(config, position.epoch)
        steps = compile_steps(parts, mode, position, feed)

        # -------------------------------------------------------------- epochs
        preemption = stack.enter_context(hosts.Preemption())
        progress = stack.enter_context(open_progress(parts, position))
        last_epoch = min(config.schedule.epochs, options.stop_after or config.schedule.epochs)
        while position.epoch < last_epoch:
            started = time.monotonic()
            if training.mode_at(config, position.epoch) != mode:
                mode = training.mode_at(config, position.epoch)
                say(f"epoch {position.epoch + 1}: from here on bound.mode, {mode}")
                steps = compile_steps(parts, mode, position, feed)
                position.count = 1  # its steps take another time
            finished = train_epoch(parts, position, steps, feed, checkpoints, preemption, progress)
            if not finished:
                checkpoints.wait()
                say(f"SIGTERM: saved after step {position.step}; the same command continues there")
                return
            seconds = time.monotonic() - started
            found = {}
            if evaluation_is_due(config, position.epoch):
                with progress.once("evaluation"):
                    found = evaluate_and_select(parts, position, splits.validation, checkpoints)
            record(parts, position, recorders, found, seconds, progress)
            position.sums = dict.fromkeys(training.METRICS, 0.0)
            if position.epoch % config.checkpoints.every == 0 or position.epoch == last_epoch:
                with progress.once("checkpoint"):
                    save(parts, position, checkpoints)
        checkpoints.wait()
    conclude(parts, position, workdir, time.monotonic() - began)


# ------------------------------------------------------------------------ what a run is made of


@dataclasses.dataclass(frozen=True)
class Parts:
    """What stays the same during a run.

    Attributes:
        store: where the examples' vectors are between calls.
        rate: the learning rate at a step.
        create: the state before the first step, of a network.
        abstract, shardings: shapes of the state, and where it lies on the devices.
        steps: by mode, the function of `training.make_steps`.
    """

    config: Any
    mesh: jax.sharding.Mesh
    steps_per_epoch: int
    store: training.VectorStore
    network: nnx.Module
    rate: optax.Schedule
    create: Any
    abstract: training.State
    shardings: Any
    steps: dict[str, Any]


@dataclasses.dataclass
class Position:
    """Where a run is.

    Attributes:
        state: on the devices.
        step, epoch: so many are done.
        sums: of each figure, over the steps of the epoch so far.
        count: steps of the next call.
        saved: when the last checkpoint was written.
    """

    state: training.State
    step: int
    epoch: int
    sums: dict[str, float]
    count: int = 1
    saved: float = dataclasses.field(default_factory=time.monotonic)


@dataclasses.dataclass(frozen=True)
class Recorders:
    """What writes metrics, in the one process that does."""

    metrics: Metrics
    curves: Curves
    board: TensorBoard | None


def describe(splits: sets.Splits, mesh) -> None:
    """Says what is trained on, and on what."""
    train, validation = splits.train, splits.validation
    processes = jax.process_count()
    together = f" of {processes} processes" if processes > 1 else ""
    say(
        f"{len(train.labels)} training, {len(validation.labels)} validation images of "
        f"{train.images.shape[1:]}, {train.classes} classes; {mesh.size} "
        f"{jax.devices()[0].platform} device(s){together}"
    )


def prepare(config, train: sets.Dataset, mesh) -> Parts:
    """Network, optimizer and state of a configuration, as shapes; nothing is on the devices yet."""
    input_shape = train.images.shape[1:]
    steps_per_epoch = feeding.steps_per_epoch(config, len(train.labels))
    store = training.VectorStore(config, len(train.labels), mesh, feeding.MAX_STEPS)
    network = training.build_network(config, input_shape, train.classes)
    rate = training.learning_rate(config, steps_per_epoch)
    transform = optax.adam(rate)
    create = functools.partial(
        training.initial_state,
        transform=transform,
        config=config,
        examples=store.rows_for,
        input_shape=input_shape,
    )
    abstract = jax.eval_shape(create, network)
    return Parts(
        config=config,
        mesh=mesh,
        steps_per_epoch=steps_per_epoch,
        store=store,
        network=network,
        rate=rate,
        create=create,
        abstract=abstract,
        shardings=training.state_shardings(abstract, config, mesh),
        steps={
            mode: training.make_steps(
                training.with_mode(config, mode),
                transform,
                steps_per_epoch,
                train,
                mesh,
                abstract,
                feeding.MAX_STEPS,
            )
            for mode in training.modes_of(config)
        },
    )


# ------------------------------------------------------------------------------ workdir and state


def claim(workdir: Path, config, stack: contextlib.ExitStack) -> None:
    """Makes the workdir this run's own, until the stack is left."""
    if hosts.is_writer():
        defaults = former_defaults(config)
        open_workdir(workdir, config.to_dict(), volatile=VOLATILE, defaults=defaults)
        stack.enter_context(locked(workdir))
        with replaced(workdir / "command.txt", "w") as file:
            file.write(common.line("train", sys.argv[1:]) + "\n")
    hosts.wait("workdir")
    say(f"{workdir}: {config.model.name} on {config.data.name}, seed {config.seed}")


def former_defaults(config) -> dict[str, Any]:
    """What a run meant by the fields that were not there when it began."""
    defaults = training.default_config().to_dict()
    # Shared norms had the iterations of the others; where there are none, no number matters.
    shared = "global" in bounds.mode_of(config.bound.mode).vectors
    options = config.bound
    defaults["bound"]["shared_iterations"] = (
        options.iterations if shared else options.shared_iterations
    )
    return defaults


def restore(parts: Parts, checkpoints: Checkpoints) -> Position | None:
    """The position that the newest checkpoint holds, if there is one."""
    wanted = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        parts.abstract,
        parts.shardings,
    )
    found = checkpoints.restore_last(parts.store.whole_state(wanted))
    if found is None:
        return None
    state, meta = found
    state = parts.store.restored(state)
    say(f"continuing after epoch {meta['epoch']}, step {int(state.step)}")
    # A checkpoint of an earlier version lacks the figures that came later.
    sums = dict.fromkeys(training.METRICS, 0.0) | meta["sums"]
    return Position(state, int(state.step), meta["epoch"], sums)


def begin(parts: Parts) -> Position:
    """The position before the first step."""
    # Compiled with its shardings, so that no device ever holds more than its share of the vectors.
    create = jax.jit(parts.create, out_shardings=parts.shardings)
    # Not when a run goes on: the file of its start may be gone by then.
    network = training.first_network(parts.config, parts.network)
    state = create(jax.tree.map(np.asarray, network))
    return Position(state, 0, 0, dict.fromkeys(training.METRICS, 0.0))


def save(parts: Parts, position: Position, checkpoints: Checkpoints) -> None:
    """Saves the whole state in the background."""
    meta = {"epoch": position.epoch, "sums": position.sums}
    checkpoints.save_last(position.step, parts.store.whole_state(position.state), meta)
    position.saved = time.monotonic()


# ---------------------------------------------------------------------------------------- an epoch


def compile_steps(parts: Parts, mode: str, position: Position, feed: feeding.Feeder):
    """The compiled steps of a mode."""
    began = time.monotonic()
    with jax.default_matmul_precision(parts.config.precision.products):
        steps = parts.steps[mode].lower(position.state, *feed.shapes(), np.int32(1)).compile()
    say(f"compiled in {time.monotonic() - began:.0f} s")
    return steps


def train_epoch(parts, position, steps, feed, checkpoints, preemption, progress) -> bool:
    """Takes the steps that are left of an epoch, and saves now and then.

    Returns:
        False if a signal stopped it; the state is saved then.
    """
    end = (position.epoch + 1) * parts.steps_per_epoch
    now = min(position.count, end - position.step)
    fed = feed(position.step, now) if now else None
    while fed:
        # ------------------------------------------------ the call
        began = time.monotonic()
        state = parts.store.load(position.state, position.step, now)
        position.state, values = steps(state, *fed, np.int32(now))

        # While the devices work: what they need next.
        following = min(position.count, end - position.step - now)
        fed = feed(position.step + now, following) if following else None

        # ------------------------------------------------ what came out
        values = jax.device_get(values)
        parts.store.save(position.state, position.step, now)
        new = [{name: float(column[i]) for name, column in values.items()} for i in range(now)]
        training.check_finite(new, position.step)
        position.step += now
        for figures in new:
            position.sums = {name: position.sums[name] + v for name, v in figures.items()}
        progress.update(position.step, loss=f"{new[-1]['loss']:.3f}", epoch=position.epoch + 1)

        # ------------------------------------------------ interrupted, or time to save
        stop, minutes, seconds = hosts.maximum(
            preemption.noticed,
            (time.monotonic() - position.saved) / 60,
            time.monotonic() - began,
        )
        allowed = parts.config.checkpoints.minutes
        if stop or (allowed and minutes >= allowed):
            save(parts, position, checkpoints)
        if stop:
            return False

        # As many steps a call as take a few seconds: fewer waits, and still a sign of life.
        fitting = max(round(now * SECONDS_PER_CALL / max(seconds, 1e-3)), 1)
        position.count = min(fitting, feeding.MAX_STEPS)
        now = following
    position.epoch += 1
    return True


def evaluation_is_due(config, epoch: int) -> bool:
    """Whether the validation split is looked at after this epoch."""
    return epoch % config.evaluation.every == 0 or epoch == config.schedule.epochs


def evaluate_and_select(parts, position, validation: sets.Dataset, checkpoints) -> dict[str, float]:
    """Figures of the validation split; saves the parameters if they are the best so far."""
    found = training.evaluate(position.state.evaluated, validation, parts.config, parts.mesh)
    reached = score(found)
    if reached > float(position.state.best):
        best = feeding.put(np.asarray(reached, np.float32), parts.mesh, PartitionSpec())
        position.state = dataclasses.replace(position.state, best=best)
        parameters = nnx.to_pure_dict(nnx.state(position.state.evaluated))
        checkpoints.save_best(position.step, parameters, {"epoch": position.epoch, **found})
    return found


# --------------------------------------------------------------------------------- what is written


def open_recorders(workdir, parts, position, tensorboard: bool, stack) -> Recorders | None:
    """What writes the metrics; None in a process that does not."""
    if not hosts.is_writer():
        return None
    # A state saved at the very end of an epoch, but before its line was written, writes it: again,
    # if it is there.
    kept = position.epoch * parts.steps_per_epoch
    metrics = Metrics(workdir / "metrics.jsonl", after_step=kept)
    curves = stack.enter_context(Curves(workdir / "curves.png", metrics.path))
    board = None
    if tensorboard:
        lines = read_metrics(metrics.path)
        board = stack.enter_context(TensorBoard(workdir / "tensorboard", lines))
    return Recorders(metrics, curves, board)


def record(parts, position, recorders, found: dict, seconds: float, progress: Progress) -> None:
    """Writes the line of an epoch: means of its steps, and what its evaluation found."""
    if recorders is None:
        return
    with progress.once("line"):
        line = recorders.metrics.write(
            step=position.step,
            epoch=position.epoch,
            tier="estimate",
            seed=parts.config.seed,
            validation_epsilon=parts.config.epsilon.test,
            **{name: value / parts.steps_per_epoch for name, value in position.sums.items()},
            learning_rate=parts.rate(position.step - 1),
            **found,
            seconds=round(seconds, 3),
        )
    if recorders.curves.due:
        with progress.once("curves"):
            recorders.curves.refresh()
    if recorders.board:
        recorders.board.write(line)


def conclude(parts: Parts, position: Position, workdir: Path, seconds: float) -> None:
    """Says what training has achieved, and what comes next.

    Args:
        seconds: since this start.
    """
    if not hosts.is_writer():
        return
    epochs = parts.config.schedule.epochs
    best = best_of(read_metrics(workdir / "metrics.jsonl"))
    if best:
        say(
            f"best: epoch {best['epoch']}, {100 * best['validation_accuracy']:.1f} % of the "
            f"validation images right, {100 * best[ROBUST]:.1f} % robust at ε = "
            f"{best['validation_epsilon']:g} (an estimate, no certificate)"
        )
    picture = workdir / "curves.png"
    shown = f"; curves: {os.path.relpath(picture)}" if picture.exists() else ""
    say(f"this start took {duration(seconds)}{shown}")
    if position.epoch < epochs:
        say(
            f"stopped after epoch {position.epoch} of {epochs}, as --stop_after says: the same "
            "command with a later one, or none, goes on there"
        )
        return
    then = common.line("certify", [f"--workdir={os.path.relpath(workdir)}"])
    say(f"done: {position.epoch} epochs. Next: {then}")


def open_progress(parts: Parts, position: Position) -> Progress:
    """What tells people how far training is; silent in all processes but one."""
    total = parts.config.schedule.epochs * parts.steps_per_epoch
    stream = sys.stderr if hosts.is_writer() else io.StringIO()
    return Progress(total, "training", start=position.step, stream=stream)


def say(message: str) -> None:
    """Prints a line, in the one process that does."""
    if hosts.is_writer():
        print(message, flush=True)
