"""What mode "auto" tries on an image, one stage after the other, and how many rows each of them
carries back through the network.

Stages that start from regions known before draw nothing. "tight_rows" walks anew, with draws of its
own, for which the failure probability is split further (`setup.set_up`).
"""

import dataclasses
import math

from lipjax import bounds
from lipjax.bounds import tight
from lipjax.certificates import verdicts
from lipjax.graph import Graph

# The mode that decides each image by the cheapest bound that does, and its gradient steps.
AUTO = "auto"
AUTO_STEPS = 20
# Its last stage, which a budget of time allows.
DEAREST = "tight_rows"
# A gradient, beside the value: in passes.
GRADIENT = 2


@dataclasses.dataclass(frozen=True)
class Stage:
    """One way to decide an image.

    Attributes:
        name: that of the bound, or "steps": gradient steps on the slopes of the one before.
        mode: the bound that is computed anew; "": the regions are those of the stage before.
        steps: gradient steps at most.
    """

    name: str
    mode: str = ""
    steps: int = 0

    def passes(self, graph: Graph) -> int:
        """Rows that are carried back through the network for an image, at most; a gradient counts
        as `GRADIENT` more."""
        (classes,) = graph.shape
        count = 0
        if self.name != "steps":
            of = bounds.mode_of(self.name)
            choices = of.relaxed_margins + of.one_sided
            if of.one_sided:
                # All rivals at once include a row of zeros, for the label.
                few = min(tight.RETRIED, classes - 1)
                again = len(tight.CHOICES) - 1
                count += again * (few if few < classes - 1 else classes)
            count += choices * classes
            if of.relaxed_boxes:
                # Upwards and downwards, but for the first, in front of which nothing is bent.
                sides = 2 if of.one_sided else 1
                count += sides * sum(node.size for node in graph.linear_nodes[1:-1])
        if self.steps:
            # The pass that begins, one and its gradient at each step, and one rounded outwards.
            each = 2 + self.steps * (1 + GRADIENT)
            count += min(verdicts.STEPPED, classes - 1) * each
        return count


def planned(mode: str, steps: int | None, seconds: float | None) -> tuple[Stage, ...]:
    """The stages of a mode, the cheapest first; the first one is tried on every image.

    Args:
        mode, steps: as in `certify`.
        seconds: its `seconds_per_image`.

    Raises:
        ValueError: as `certify` says of them.
    """
    if mode != AUTO:
        if mode in bounds.CONTROLS:
            raise ValueError(f"mode {mode!r} is a control to train with, and certifies nothing.")
        if steps and not bounds.mode_of(mode).one_sided:
            raise ValueError(
                f'steps improve the slopes of modes "tight" and "tight_rows" (or "{AUTO}"), '
                f"got steps={steps} with mode {mode!r}."
            )
        if seconds is not None:
            raise ValueError(
                f'seconds_per_image limits the stages of mode "{AUTO}", '
                f"got {seconds} with mode {mode!r}."
            )
        bounds.mode_of(mode)
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds_per_image must be > 0, or None, got {seconds}.")
    if steps is None:
        steps = AUTO_STEPS if mode == AUTO else 0
    if steps < 0:
        raise ValueError(f"steps must be >= 0 gradient steps, got {steps}.")

    improved = (Stage("steps", steps=steps),) if steps else ()
    if mode != AUTO:
        return Stage(mode, mode), *improved
    found = Stage("local", "local"), Stage("tight"), *improved
    if seconds is None:
        return found
    return *found, Stage(DEAREST, DEAREST, steps)


def affordable(costs: list[tuple[int, float]], next_passes: int, seconds: float | None) -> bool:
    """May the next stage begin?

    Args:
        costs: of the stages before, passes and seconds an image.
        next_passes: of the next one.
        seconds: an image may take; None: any time.

    Returns:
        whether what was spent, and what the next stage's passes take if each takes as long as those
        before, is within the limit. Before a pass was measured only the former counts.
    """
    if seconds is None:
        return True
    passes = sum(count for count, _ in costs)
    expected = 0.0
    if passes:
        measured = math.fsum(spent for count, spent in costs if count)
        expected = next_passes * measured / passes
    return math.fsum(spent for _, spent in costs) + expected <= seconds
