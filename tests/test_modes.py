"""The modes are data: what each is said to do, written down a second time."""

import dataclasses

import pytest

from lipjax.bounds.modes import MODES, Mode, mode_of

# boxes, masked norms, radii from them, as the paper, margins through slopes, boxes through slopes,
# margins by one-sided errors.
SAID = {
    "global": (False, False, False, True, False, False, False),
    "bcp": (True, False, False, True, False, False, False),
    "paper": (True, True, False, True, False, False, False),
    "local": (True, True, True, False, False, False, False),
    "linear": (True, True, True, False, True, False, False),
    "rows": (True, True, True, False, True, True, False),
    "tight": (True, True, True, False, False, False, True),
}
VECTORS = {"global": ("global",), "bcp": ("global",), "paper": ("global", "local")}


def test_each_mode_does_what_is_said_of_it_and_runs_the_iterations_that_it_needs():
    assert {name: dataclasses.astuple(mode)[1:] for name, mode in MODES.items()} == SAID
    for name, mode in MODES.items():
        assert mode is mode_of(name) and mode.name == name
        assert mode.vectors == VECTORS.get(name, ("local",))
    # One that is added says what it does beyond the mode "local", or does just that.
    assert dataclasses.astuple(Mode("another"))[1:] == SAID["local"]


def test_a_mode_that_does_not_exist_is_an_error_that_names_those_that_do():
    with pytest.raises(
        ValueError, match="global, bcp, paper, local, linear, rows, tight, got 'locale'"
    ):
        mode_of("locale")
