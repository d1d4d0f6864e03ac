"""Softmax and log-softmax at the end of a function: left out, as the classes keep the order of the
logits."""

import jax

from lipjax.activations.base import Rule, register, rule


@rule()
class Softmax(Rule):
    """Strictly rises with each logit's lead, so it keeps the order of the logits, exactly."""

    @property
    def keeps_order(self) -> bool:
        return True


def _softmax(z):
    return jax.nn.softmax(z)


def _log_softmax(z):
    return jax.nn.log_softmax(z)


register(_softmax, Softmax)
register(_log_softmax, Softmax)
