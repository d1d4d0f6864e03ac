"""The modes are data: what each is said to do, written down a second time."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lipjax
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
    "tight": (True, True, True, False, True, False, True),
    "tight_rows": (True, True, True, False, True, True, True),
}
VECTORS = {"global": ("global",), "bcp": ("global",), "paper": ("global", "local")}


def test_each_mode_does_what_is_said_of_it_and_runs_the_iterations_that_it_needs():
    assert {name: dataclasses.astuple(mode)[1:] for name, mode in MODES.items()} == {
        name: (*said, False) for name, said in SAID.items()
    }
    for name, mode in MODES.items():
        assert mode is mode_of(name) and mode.name == name
        assert mode.vectors == VECTORS.get(name, ("local",))
    # One that is added says what it does beyond the mode "local", or does just that.
    assert dataclasses.astuple(Mode("another"))[1:] == (*SAID["local"], False)


def test_the_control_without_masks_takes_whole_norms_and_certifies_nothing():
    net = nnx.Sequential(
        nnx.Linear(4, 16, rngs=nnx.Rngs(0)), lipjax.ReLU(), nnx.Linear(16, 3, rngs=nnx.Rngs(1))
    )
    whole = np.linalg.norm(np.asarray(net.layers[0].kernel[...], np.float64), 2)
    x = jnp.full((4,), 0.5)
    norms = {
        mode: float(lipjax.bound(net, x, 0.01, mode=mode).norms[0])
        for mode in ("unmasked", "local")
    }
    np.testing.assert_allclose(norms["unmasked"], whole, rtol=1e-5)
    assert norms["local"] < 0.95 * whole  # some neurons are dead there
    assert mode_of("unmasked").vectors == ("local",)
    with pytest.raises(ValueError, match="control to train with"):
        lipjax.certify(net, x[None], None, 0.1, mode="unmasked")


def test_a_mode_that_does_not_exist_is_an_error_that_names_those_that_do():
    with pytest.raises(
        ValueError, match="global, bcp, paper, local, linear, rows, tight, tight_rows, got 'locale'"
    ):
        mode_of("locale")
