"""Trains a network with local Lipschitz bounds; certify it afterwards with certify.py.

    python train.py --config=configs/digits.py --workdir=runs/digits
    python train.py --config=configs/cifar10_maxmin.py --workdir=runs/cifar10 --config.optimizer.learning_rate=5e-4
    python train.py --config=configs/cifar10_maxmin.py --plan --plan_device=h200  # what it needs, before anything runs

Run again with the same workdir to continue where it stopped, exactly: also after a kill at any moment. The workdir
gets config.json, metrics.jsonl (one line per epoch) and checkpoints/ (the newest states, and the parameters that did
best on the validation split, which is held out of the training set).
"""

import dataclasses
import functools
import os
import time

import jax
import numpy as np
import optax
from absl import app, flags, logging
from flax import nnx
from ml_collections import config_flags

from lipjax import data, lowering, plan, training
from lipjax.checkpoints import CheckpointError, Checkpoints, open_workdir
from lipjax.reporting import Metrics, Progress

_CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py", "Experiment: a file with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run; default runs/<name of the config>.")
_EPOCHS = flags.DEFINE_integer(
    "stop_after", None, "Stop after this epoch, to go on later; no influence on the result.", lower_bound=1
)
_PLAN = flags.DEFINE_bool("plan", False, "Print what the configuration needs (lipjax/plan.py) and end.")
_PLAN_DEVICE = flags.DEFINE_string(
    "plan_device", None, "With --plan: h100, h200, a100, v4, v5e, v5p, cpu; default: this."
)
_PLAN_DEVICES = flags.DEFINE_integer("plan_devices", None, "With --plan: how many; default: those here.", lower_bound=1)
_PLAN_EXAMPLES = flags.DEFINE_integer("plan_examples", None, "With --plan: size of the training set.", lower_bound=2)
_PLAN_SHAPE = flags.DEFINE_list("plan_shape", None, "With --plan: height,width,channels of the images.")
_PLAN_CLASSES = flags.DEFINE_integer("plan_classes", None, "With --plan.", lower_bound=2)
_PLAN_COMPILE = flags.DEFINE_bool(
    "plan_compile", False, "With --plan, for these devices: ask XLA for temporary memory."
)

# At most so many steps in one call of the device, and no more than take about so long.
STEPS_PER_CALL, SECONDS_PER_CALL = 32, 5.0

# Fields that say where things are and not what is computed: they may differ when a run is continued.
VOLATILE = ("data.data_dir", "data.manual_dir")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags look like --config.seed=1")
    lowering.keep_compiled()
    logging.set_verbosity(logging.FATAL)  # Orbax reports every step of every save; its errors are reported below
    config = _CONFIG.value
    training.check_config(config)
    config.lock()
    if _PLAN.value:
        sizes = plan.sizes_of(config, _PLAN_EXAMPLES.value, _PLAN_SHAPE.value, _PLAN_CLASSES.value)
        print(plan.planned(config, sizes, _PLAN_DEVICES.value, _PLAN_DEVICE.value, compile_step=_PLAN_COMPILE.value))
        return

    # ------------------------------------------------------------------ devices
    mesh = training.device_mesh()
    if config.batch_size % mesh.size:
        raise ValueError(
            f"batch_size {config.batch_size} does not divide over {mesh.size} devices: give a multiple, "
            f"--config.batch_size={-(-config.batch_size // mesh.size) * mesh.size}."
        )

    # ------------------------------------------------------------------ data
    splits = training.load_data(config)
    train = splits.train
    input_shape = train.images.shape[1:]
    steps_per_epoch = len(training.epoch_order(config.seed, 0, len(train.labels), config.batch_size))
    print(
        f"{len(train.labels)} training, {len(splits.validation.labels)} validation images of {input_shape}, "
        f"{train.classes} classes; {mesh.size} {jax.devices()[0].platform} device(s)",
        flush=True,
    )

    # ------------------------------------------------------------------ network, optimizer, state
    network = training.build_network(config, input_shape, train.classes)
    transform = optax.adam(training.learning_rate(config, steps_per_epoch))
    create = functools.partial(
        training.initial_state,
        transform=transform,
        config=config,
        examples=len(train.labels),
        input_shape=input_shape,
    )
    abstract = jax.eval_shape(create, network)
    shardings = training.state_shardings(abstract, mesh)
    steps = training.make_steps(config, transform, steps_per_epoch, train.levels, mesh, abstract, STEPS_PER_CALL)

    # ------------------------------------------------------------------ workdir
    # Not earlier: a start that fails for its data or its settings must not claim the folder.
    name = os.path.splitext(os.path.basename(config_flags.get_config_filename(flags.FLAGS["config"])))[0]
    workdir = open_workdir(_WORKDIR.value or f"runs/{name}", config.to_dict(), volatile=VOLATILE)
    print(f"{workdir}: {config.model.name} on {config.data.name}, seed {config.seed}", flush=True)

    # ------------------------------------------------------------------ restore
    with Checkpoints(workdir, keep_last=config.checkpoints.keep) as checkpoints:
        wanted = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
        restored = checkpoints.restore_last(wanted)
        if restored is None:
            # Compiled with its shardings, so that no device ever holds more than its share of the vectors.
            state, epoch = jax.jit(create, out_shardings=shardings)(network), 0
        else:
            state, epoch = restored[0], restored[1]["epoch"]
            print(f"continuing after epoch {epoch}", flush=True)
        metrics = Metrics(workdir / "metrics.jsonl", after_step=int(state.step))

        # -------------------------------------------------------------- loop
        feed = training.feeder(train, mesh, STEPS_PER_CALL)
        last_epoch = min(config.schedule.epochs, _EPOCHS.value or config.schedule.epochs)
        # Compiled before the clock of the progress starts, or the time left would be far off for a while.
        began = time.monotonic()
        steps = steps.lower(state, *feed(np.zeros((1, config.batch_size), np.int32)), np.int32(1)).compile()
        print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
        count = 1
        with Progress(config.schedule.epochs * steps_per_epoch, "training", start=int(state.step)) as progress:
            while epoch < last_epoch:
                first_step, started, done = epoch * steps_per_epoch, time.monotonic(), []
                order = training.epoch_order(config.seed, epoch, len(train.labels), config.batch_size)
                while len(done) < len(order):
                    rows, began = order[len(done) : len(done) + count], time.monotonic()
                    state, values = steps(state, *feed(rows), np.int32(len(rows)))
                    values = jax.device_get(values)
                    new = [{name: column[i] for name, column in values.items()} for i in range(len(rows))]
                    training.check_finite(new, first_step + len(done))
                    done += new
                    progress.update(first_step + len(done), loss=f"{done[-1]['loss']:.3f}", epoch=epoch + 1)
                    # As many steps a call as take a few seconds: fewer waits, and still a sign of life.
                    count = round(len(rows) * SECONDS_PER_CALL / max(time.monotonic() - began, 1e-3))
                    count = min(max(count, 1), STEPS_PER_CALL)
                epoch += 1
                seconds = time.monotonic() - started

                # ------------------------------------------------------ evaluate, select, save
                if epoch % config.evaluation.every == 0 or epoch == config.schedule.epochs:
                    found = training.evaluate(state.network, splits.validation, config, mesh)
                    # Clean accuracy only breaks ties: it weighs less than one validation example.
                    score = found["validation_robust_accuracy_estimate"] + 1e-6 * found["validation_accuracy"]
                    if score > float(state.best):
                        state = dataclasses.replace(
                            state, best=jax.device_put(jax.numpy.float32(score), shardings.best)
                        )
                        checkpoints.save_best(
                            first_step + len(order),
                            nnx.to_pure_dict(nnx.state(state.network)),
                            {"epoch": epoch, **found},
                        )
                else:
                    found = {}
                mean = {key: sum(float(p[key]) for p in done) / len(done) for key in done[0]}
                metrics.write(
                    step=first_step + len(order),
                    epoch=epoch,
                    tier="estimate",
                    seed=config.seed,
                    validation_epsilon=config.epsilon.test,
                    **mean,
                    **found,
                    seconds=round(seconds, 3),
                )
                if epoch % config.checkpoints.every == 0 or epoch == last_epoch:
                    checkpoints.save_last(first_step + len(order), state, {"epoch": epoch})
        checkpoints.wait()
    print(f"done: {epoch} epochs. Next: python certify.py --workdir={os.path.relpath(workdir)}", flush=True)


def parse_flags(argv):
    """absl's parser; of a misspelt field ml_collections says in an AttributeError which one may be meant."""
    try:
        return app.parse_flags_with_usage(argv)
    except AttributeError as error:
        reason = error
        while isinstance(reason.args[0], Exception):
            reason = reason.args[0]
        raise SystemExit(f"train.py: the configuration has no such field: {reason.args[0]}") from None


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=parse_flags)
    except (data.DataError, CheckpointError, training.NonFiniteError, ValueError, OSError) as error:
        # These say what is wrong and what to do; a traceback would only hide it.
        raise SystemExit(f"train.py: {error}") from None
