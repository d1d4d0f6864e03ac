"""Trains a network with local Lipschitz bounds; certify it afterwards with certify.py.

    python train.py --config=configs/digits.py --workdir=runs/digits
    python train.py --config=configs/cifar10_maxmin.py --workdir=runs/cifar10
    --config.optimizer.learning_rate=5e-4 python train.py --config=configs/cifar10_maxmin.py --plan
    --plan_device=h200  # what it needs, before anything runs

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

import jax
import numpy as np
import optax
from absl import flags, logging
from flax import nnx
from jax.sharding import PartitionSpec
from ml_collections import config_flags

from lipjax import training
from lipjax.cli import common
from lipjax.data import sets
from lipjax.formats.files import replaced
from lipjax.runtime import cpu, hosts
from lipjax.training import feeding, plan
from lipjax.training.checkpoints import CheckpointError, Checkpoints, locked, open_workdir
from lipjax.training.metrics import (
    Curves,
    Metrics,
    Progress,
    TensorBoard,
    read_metrics,
    tensorboard_writer,
)

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Experiment: a file with get_config(), or the name of one of lipjax's own: "
    f"{', '.join(common.experiments())}. "
    f"Default: {common.DEFAULT_CONFIG}. Any of its fields is a flag too: "
    "--config.optimizer.learning_rate=5e-4.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of this run; default runs/<name of the config>."
)
_EPOCHS = flags.DEFINE_integer(
    "stop_after",
    None,
    "Stop after this epoch, to go on later; no influence on the result.",
    lower_bound=1,
)
_TENSORBOARD = flags.DEFINE_bool(
    "tensorboard",
    False,
    "Also write the metrics to workdir/tensorboard, for TensorBoard; needs tensorboardX.",
)
_PLAN = flags.DEFINE_bool(
    "plan", False, "Print what the configuration needs (lipjax/training/plan.py) and end."
)
_PLAN_DEVICE = flags.DEFINE_string(
    "plan_device", None, "With --plan: h100, h200, a100, v4, v5e, v5p, cpu; default: this."
)
_PLAN_DEVICES = flags.DEFINE_integer(
    "plan_devices", None, "With --plan: how many; default: those here.", lower_bound=1
)
_PLAN_EXAMPLES = flags.DEFINE_integer(
    "plan_examples", None, "With --plan: size of the training set.", lower_bound=2
)
_PLAN_SHAPE = flags.DEFINE_list(
    "plan_shape", None, "With --plan: height,width,channels of the images."
)
_PLAN_CLASSES = flags.DEFINE_integer(
    "plan_classes", None, "With --plan: how many classes.", lower_bound=2
)
_PLAN_COMPILE = flags.DEFINE_bool(
    "plan_compile", False, "With --plan: ask XLA for temporary memory, on the devices here."
)
_HOSTS = flags.DEFINE_string(
    "hosts",
    os.environ.get("LIPJAX_HOSTS", ""),
    f"For several processes as one: {hosts.EXAMPLE}; or LIPJAX_HOSTS.",
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


def main(_):
    hosts.join(_HOSTS.value)
    cpu.keep_compiled()
    # Orbax reports every step of every save; its errors are reported below
    logging.set_verbosity(logging.FATAL)
    config = _CONFIG.value
    training.check_config(config)
    config.lock()
    if _PLAN.value:
        sizes = plan.sizes_of(config, _PLAN_EXAMPLES.value, _PLAN_SHAPE.value, _PLAN_CLASSES.value)
        print(
            plan.planned(
                config,
                sizes,
                _PLAN_DEVICES.value,
                _PLAN_DEVICE.value,
                compile_step=_PLAN_COMPILE.value,
            )
        )
        return

    if _TENSORBOARD.value:
        tensorboard_writer()  # refused now and not when the folder is claimed

    # ------------------------------------------------------------------ devices
    mesh = training.device_mesh()
    if config.batch_size % mesh.size:
        raise ValueError(
            f"batch_size {config.batch_size} does not divide over {mesh.size} devices: give a "
            "multiple, "
            f"--config.batch_size={-(-config.batch_size // mesh.size) * mesh.size}."
        )

    # ------------------------------------------------------------------ data
    splits = training.load_data(config)
    train = splits.train
    input_shape = train.images.shape[1:]
    steps_per_epoch = feeding.steps_per_epoch(config, len(train.labels))
    say(
        f"{len(train.labels)} training, {len(splits.validation.labels)} validation images of "
        f"{input_shape}, "
        f"{train.classes} classes; {mesh.size} {jax.devices()[0].platform} device(s)"
        + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else "")
    )

    # ------------------------------------------------------------------ network, optimizer, state
    keeper = feeding.Keeper(config, len(train.labels), mesh, feeding.CALL)
    network = training.build_network(config, input_shape, train.classes)
    rate = training.learning_rate(config, steps_per_epoch)
    transform = optax.adam(rate)
    create = functools.partial(
        training.initial_state,
        transform=transform,
        config=config,
        examples=keeper.rows_for,
        input_shape=input_shape,
    )
    abstract = jax.eval_shape(create, network)
    shardings = training.state_shardings(abstract, config, mesh)
    steps = training.make_steps(
        config, transform, steps_per_epoch, train, mesh, abstract, feeding.CALL
    )

    # ------------------------------------------------------------------ workdir
    # Not earlier: a start that fails for its data or its settings must not claim the folder.
    name = os.path.splitext(
        os.path.basename(config_flags.get_config_filename(flags.FLAGS["config"]))
    )[0]
    workdir = Path(os.path.abspath(os.path.expanduser(_WORKDIR.value or f"runs/{name}")))
    with contextlib.ExitStack() as stack:
        if hosts.is_writer():
            open_workdir(workdir, config.to_dict(), volatile=VOLATILE)
            stack.enter_context(locked(workdir))
            with replaced(workdir / "command.txt", "w") as file:
                file.write(common.line("train", sys.argv[1:]) + "\n")
        hosts.wait("workdir")
        say(f"{workdir}: {config.model.name} on {config.data.name}, seed {config.seed}")

        # -------------------------------------------------------------- restore
        checkpoints = stack.enter_context(Checkpoints(workdir, keep_last=config.checkpoints.keep))
        wanted = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
        )
        restored = checkpoints.restore_last(keeper.whole(wanted))
        if restored is None:
            # Compiled with its shardings, so that no device ever holds more than its share of the
            # vectors.
            state = jax.jit(create, out_shardings=shardings)(jax.tree.map(np.asarray, network))
            epoch, sums = 0, dict.fromkeys(training.METRICS, 0.0)
        else:
            state, meta = keeper.adopt(restored[0]), restored[1]
            epoch, sums = meta["epoch"], meta["sums"]
            say(f"continuing after epoch {epoch}, step {int(state.step)}")
        step = int(state.step)
        # A state saved at the very end of an epoch, but before its line was written, writes it:
        # again, if it is there.
        kept = epoch * steps_per_epoch
        metrics, board = None, None
        if hosts.is_writer():
            metrics = Metrics(workdir / "metrics.jsonl", after_step=kept)
            curves = stack.enter_context(Curves(workdir / "curves.png", metrics.path))
            if _TENSORBOARD.value:
                board = stack.enter_context(
                    TensorBoard(workdir / "tensorboard", read_metrics(metrics.path))
                )

        # -------------------------------------------------------------- loop
        feed = stack.enter_context(feeding.Feeder(train, config, mesh, feeding.CALL))
        last_epoch = min(config.schedule.epochs, _EPOCHS.value or config.schedule.epochs)
        # Compiled before the clock of the progress starts, or the time left would be far off for a
        # while.
        began = time.monotonic()
        with jax.default_matmul_precision(config.precision.products):
            steps = steps.lower(state, *feed.shapes(), np.int32(1)).compile()
        say(f"compiled in {time.monotonic() - began:.0f} s")
        preemption = stack.enter_context(hosts.Preemption())
        stream = sys.stderr if hosts.is_writer() else io.StringIO()
        progress = stack.enter_context(
            Progress(
                config.schedule.epochs * steps_per_epoch, "training", start=step, stream=stream
            )
        )
        count, saved = 1, time.monotonic()
        while epoch < last_epoch:
            started, end = time.monotonic(), (epoch + 1) * steps_per_epoch
            now = min(count, end - step)
            fed = feed(step, now) if now else None
            while fed:
                began = time.monotonic()
                state, values = steps(keeper.lend(state, step, now), *fed, np.int32(now))
                # While the devices work: what they need next.
                following = min(count, end - step - now)
                fed = feed(step + now, following) if following else None
                values = jax.device_get(values)
                keeper.take_back(state, step, now)
                new = [
                    {name: float(column[i]) for name, column in values.items()} for i in range(now)
                ]
                training.check_finite(new, step)
                step += now
                for figures in new:
                    sums = {name: sums[name] + value for name, value in figures.items()}
                progress.update(step, loss=f"{new[-1]['loss']:.3f}", epoch=epoch + 1)
                # ----------------------------------------------------- interrupted, or time to save
                minutes = (time.monotonic() - saved) / 60
                stop, minutes, seconds = hosts.most(
                    preemption.noticed, minutes, time.monotonic() - began
                )
                if stop or (config.checkpoints.minutes and minutes >= config.checkpoints.minutes):
                    checkpoints.save_last(step, keeper.whole(state), {"epoch": epoch, "sums": sums})
                    saved = time.monotonic()
                if stop:
                    checkpoints.wait()
                    say(f"SIGTERM: saved after step {step}; the same command continues there")
                    return
                # As many steps a call as take a few seconds: fewer waits, and still a sign of life.
                count = min(
                    max(round(now * SECONDS_PER_CALL / max(seconds, 1e-3)), 1), feeding.CALL
                )
                now = following
            epoch += 1
            seconds = time.monotonic() - started

            # ---------------------------------------------------------- evaluate, select, save
            if epoch % config.evaluation.every == 0 or epoch == config.schedule.epochs:
                found = training.evaluate(state.network, splits.validation, config, mesh)
                # Clean accuracy only breaks ties: it weighs less than one validation example.
                score = (
                    found["validation_robust_accuracy_estimate"]
                    + 1e-6 * found["validation_accuracy"]
                )
                if score > float(state.best):
                    best = feeding.put(np.asarray(score, np.float32), mesh, PartitionSpec())
                    state = dataclasses.replace(state, best=best)
                    checkpoints.save_best(
                        step, nnx.to_pure_dict(nnx.state(state.network)), {"epoch": epoch, **found}
                    )
            else:
                found = {}
            if metrics:
                line = metrics.write(
                    step=step,
                    epoch=epoch,
                    tier="estimate",
                    seed=config.seed,
                    validation_epsilon=config.epsilon.test,
                    **{name: value / steps_per_epoch for name, value in sums.items()},
                    learning_rate=rate(step - 1),
                    **found,
                    seconds=round(seconds, 3),
                )
                curves.refresh()
                if board:
                    board.write(line)
            sums = dict.fromkeys(training.METRICS, 0.0)
            if epoch % config.checkpoints.every == 0 or epoch == last_epoch:
                checkpoints.save_last(step, keeper.whole(state), {"epoch": epoch, "sums": sums})
                saved = time.monotonic()
        checkpoints.wait()
    then = common.line("certify", [f"--workdir={os.path.relpath(workdir)}"])
    say(f"done: {epoch} epochs. Next: {then}")


def say(message: str) -> None:
    if hosts.is_writer():
        print(message, flush=True)


# These say what is wrong and what to do.
ERRORS = (sets.DataError, CheckpointError, training.NonFiniteError, ValueError, OSError)
