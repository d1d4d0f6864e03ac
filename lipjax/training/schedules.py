"""What changes with the epoch: the bound, the weight of robustness, and the learning rate."""

import jax.numpy as jnp
import optax


def mode_at(config, epoch: int) -> str:
    """The mode that trains in an epoch, counted from 0: `bound.first` in the first
    `schedule.first` epochs, then `bound.mode`."""
    return config.bound.first if epoch < config.schedule.first else config.bound.mode


def modes_of(config) -> list[str]:
    """The modes that train, each once, in their order."""
    return list(dict.fromkeys(mode_at(config, epoch) for epoch in range(config.schedule.epochs)))


def with_mode(config, mode: str):
    """The configuration with another `bound.mode`."""
    changed = config.copy_and_resolve_references()
    changed.bound.mode = mode
    return changed


def ramp(step, steps_per_epoch: int, warmup: float, length: float):
    """0 during `warmup` epochs, then linear to 1 over `length` epochs, then 1.

    `step` may be traced.
    """
    epoch = jnp.asarray(step, jnp.float32) / steps_per_epoch
    return jnp.clip((epoch - warmup) / max(length, 1e-9), 0.0, 1.0)


def learning_rate(config, steps_per_epoch: int) -> optax.Schedule:
    """Rises linearly over the first `optimizer.rise` epochs, is constant until epoch `decay_start`,
    then falls to `final_learning_rate` at the last epoch: exponentially (docs/method.md, 6) or on
    half a cosine.

    With a rise, a `decay_start` at its end and the cosine it is the one-cycle policy (Smith and
    Topin, 2019, arXiv 1708.07120).

    Raises:
        ValueError: rates or epochs out of order, with their values.
    """
    optimizer, epochs = config.optimizer, config.schedule.epochs
    rate, final = optimizer.learning_rate, optimizer.final_learning_rate
    rise, start = optimizer.rise, optimizer.decay_start
    if not (0 < final <= rate and 0 <= rise <= start <= epochs):
        raise ValueError(
            "optimizer: expected 0 < final_learning_rate <= learning_rate and 0 <= rise <= "
            f"decay_start <= schedule.epochs, got learning_rate={rate}, "
            f"final_learning_rate={final}, rise={rise}, decay_start={start}, epochs={epochs}."
        )

    def schedule(step):
        epoch = jnp.asarray(step, jnp.float32) / steps_per_epoch
        progress = jnp.clip((epoch - start) / max(epochs - start, 1e-9), 0.0, 1.0)
        if optimizer.decay == "cosine":
            fallen = final + (rate - final) * (1 + jnp.cos(jnp.pi * progress)) / 2
        else:
            fallen = rate * (final / rate) ** progress
        # The first step is none of rate 0.
        risen = (step + 1) / max(rise * steps_per_epoch, 1.0)
        return fallen * jnp.minimum(risen, 1.0)

    return schedule
