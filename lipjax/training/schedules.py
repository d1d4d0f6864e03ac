"""What changes with the epoch: the weight of robustness, and the learning rate."""

import jax.numpy as jnp
import optax


def ramp(step, steps_per_epoch: int, warmup: float, length: float):
    """0 during `warmup` epochs, then linear to 1 over `length` epochs, then 1.

    `step` may be traced.
    """
    epoch = jnp.asarray(step, jnp.float32) / steps_per_epoch
    return jnp.clip((epoch - warmup) / max(length, 1e-9), 0.0, 1.0)


def learning_rate(config, steps_per_epoch: int) -> optax.Schedule:
    """Constant until epoch `decay_start`, then exponential down to `final_learning_rate` at the
    last epoch (docs/method.md, 6).

    Raises:
        ValueError: rates or epochs out of order, with their values.
    """
    rate = config.optimizer.learning_rate
    final = config.optimizer.final_learning_rate
    start = config.optimizer.decay_start
    epochs = config.schedule.epochs
    if not (0 < final <= rate and 0 <= start <= epochs):
        raise ValueError(
            "optimizer: expected 0 < final_learning_rate <= learning_rate and 0 <= decay_start <= "
            f"schedule.epochs, got learning_rate={rate}, final_learning_rate={final}, "
            f"decay_start={start}, epochs={epochs}."
        )

    def schedule(step):
        epoch = jnp.asarray(step, jnp.float32) / steps_per_epoch
        progress = jnp.clip((epoch - start) / max(epochs - start, 1e-9), 0.0, 1.0)
        return rate * (final / rate) ** progress

    return schedule
