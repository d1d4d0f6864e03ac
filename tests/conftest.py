"""What the tests share: real data beside the checkout, small nets, a dense oracle."""

import gc
import os
from pathlib import Path

# Before JAX starts: eight CPU devices would slow every test down, so the sharding tests ask for them in a process of
# their own.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile much and compute little.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import hypothesis
import jax
import numpy as np
import pytest
from flax import nnx

import lipjax

# The same examples every time on one installation (hypothesis takes some constants from what is imported), as everything
# here is reproducible; no shrinking, which compiles for many minutes: a test prints what failed.
hypothesis.settings.register_profile(
    "lipjax",
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.load_profile("lipjax")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no worker is left with them alone at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_training.py", "test_devices.py"))


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Forgets compiled programs when there are many: each takes several of the 65,530 memory maps that Linux allows a process
    by default, and without a free one the compiler crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > 15_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def shared():
    """The folder of real data and golden cases beside the checkout; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here: no golden cases and no real data to test against")
    return SHARED


ACTIVATIONS = ("relu", "clipped_relu", "maxmin", "clipped_maxmin")


def make_activation(kind: str, shape, threshold: float = 0.3) -> nnx.Module:
    """One of `ACTIVATIONS`, its thresholds (+-, for MaxMin) at `threshold`."""
    return {
        "relu": lipjax.ReLU,
        "maxmin": lipjax.MaxMin,
        "clipped_relu": lambda: lipjax.ClippedReLU(shape, threshold=threshold),
        "clipped_maxmin": lambda: lipjax.ClippedMaxMin(shape, upper=threshold, lower=-threshold),
    }[kind]()


def tiny_net(activation: str, seed: int = 0, threshold: float = 0.3, scale: float = 1.0) -> nnx.Sequential:
    """6x6x2 images, two convolutions and two dense layers, random biases, small enough for explicit matrices."""
    rngs = nnx.Rngs(seed)

    def act(shape):
        return make_activation(activation, shape, threshold)

    bias = jax.nn.initializers.normal(0.3)
    net = nnx.Sequential(
        nnx.Conv(2, 4, (3, 3), padding=1, rngs=rngs, bias_init=bias),
        act((6, 6, 4)),
        nnx.Conv(4, 6, (4, 4), strides=2, padding=1, rngs=rngs, bias_init=bias),
        act((3, 3, 6)),
        lipjax.Flatten(),
        nnx.Linear(54, 12, rngs=rngs, bias_init=bias),
        act((12,)),
        nnx.Linear(12, 4, rngs=rngs, bias_init=bias),
    )
    for layer in net.layers:
        if hasattr(layer, "kernel"):
            layer.kernel[...] = layer.kernel[...] * scale
    return net


def cast64(net):
    """The same network with float64 parameters; inside `x64`."""
    return jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, jax.numpy.float64), net)


def dense_matrix(function, shape) -> np.ndarray:
    """The explicit matrix of a linear function, from its values on the unit vectors."""
    size = int(np.prod(shape))
    rows = jax.jit(jax.vmap(function))(jax.numpy.asarray(np.eye(size).reshape(size, *shape)))
    return np.asarray(rows).reshape(size, -1).T
