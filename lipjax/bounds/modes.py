"""The bounds by name: which radii, masks, boxes and relaxations each uses. Nobody else compares
their names."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mode:
    """One bound, as data.

    Attributes:
        name: as users say it.
        boxes: boxes by interval arithmetic; else the boxes of the balls.
        masked: norms of the matrices without the rows and columns that cannot move anything.
        local: radii, and so boxes, grow with those masked norms; else with the whole norms.
        as_paper: rows and masks no better than those of the paper's code.
        relaxed_margins: margins also by a reverse pass through slopes.
        relaxed_boxes: boxes also by one reverse pass for each neuron.
        one_sided: margins also by reverse passes with one-sided errors, and so are the boxes of
            `relaxed_boxes`.
        masks_off: nothing leaves the matrices, though each example has norms of its own: a control,
            which tells what masks gain.
    """

    name: str
    boxes: bool = True
    masked: bool = True
    local: bool = True
    as_paper: bool = False
    relaxed_margins: bool = False
    relaxed_boxes: bool = False
    one_sided: bool = False
    masks_off: bool = False

    @property
    def vectors(self) -> tuple[str, ...]:
        """Power iterations that it runs: shared by all examples ("global"), or each its own."""
        whole = () if self.local else ("global",)
        return (*whole, "local") if self.masked else whole


MODES = {
    mode.name: mode
    for mode in (
        # The product of the layers' norms (LMT, GloRo).
        Mode("global", boxes=False, masked=False, local=False, as_paper=True),
        # The same radii, and boxes by interval arithmetic cut with them (Lee et al. 2020).
        Mode("bcp", masked=False, local=False, as_paper=True),
        # The boxes of "bcp"; local norms in the final product (Huang et al. 2021).
        Mode("paper", local=False, as_paper=True),
        # Boxes, masks and norms all from the local radius; no global norm is needed.
        Mode("local"),
        # In addition margins through slopes.
        Mode("linear", relaxed_margins=True),
        # In addition every box is cut with what the neuron's own row says.
        Mode("rows", relaxed_margins=True, relaxed_boxes=True),
        # The margins of "linear", and those by one-sided errors (METHOD 8).
        Mode("tight", relaxed_margins=True, one_sided=True),
        # And every box cut with what the neuron's own row says so, upwards and downwards.
        Mode("tight_rows", relaxed_margins=True, relaxed_boxes=True, one_sided=True),
    )
}


# To train with, for comparison; nothing is certified by them.
CONTROLS = {"unmasked": Mode("unmasked", masks_off=True)}


def mode_of(name: str) -> Mode:
    """The mode, or the control, of that name.

    Raises:
        ValueError: there is none.
    """
    if name in CONTROLS:
        return CONTROLS[name]
    if name not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {name!r}.")
    return MODES[name]
