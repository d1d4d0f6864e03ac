"""What the tests share: real data beside the checkout, small nets, dense and exact oracles."""

import gc
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

# Before JAX starts: eight CPU devices would slow every test down, so the sharding tests ask for
# them in a process of their own.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile much and compute little. XLA's older way to emit fused loops takes half as long
# to compile; from 0.11 on there is none, and the flag would be an error.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import hypothesis
import jax
import numpy as np
import pytest
from flax import nnx

import lipjax
from lipjax import bounds, rounding
from lipjax.graph import trace

# The same examples every time on one installation (hypothesis takes some constants from what is
# imported), as everything here is reproducible; no shrinking, which compiles for many minutes: a
# test prints what failed.
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


def pytest_configure(config):
    """What was compiled once need not be again, neither by a test nor by the processes that it
    starts.

    A folder for each of xdist's workers, since JAX writes an entry while another process may read
    it.
    """
    folder = tempfile.mkdtemp(prefix="lipjax-compiled-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    if os.environ["JAX_PLATFORMS"] != "cpu":
        # GPUs and TPUs round products of float32 to fewer bits, which tests of float32 are not for.
        settings["jax_default_matmul_precision"] = "highest"
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


LONGEST = ("training", "hosts", "certificates", "plan", "relaxed", "attacks", "devices", "cpu")


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left with one of them alone at the end."""
    rank = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def own_activations(monkeypatch):
    """What a test registers is known to that test only."""
    reader = sys.modules["lipjax.graph.trace"]  # (the package calls a function so)
    monkeypatch.setattr(reader, "_COMPOSITES", list(reader._COMPOSITES))


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Forgets compiled programs when there are many: each takes several of the 65,530 memory maps
    that Linux allows a process by default, and without a free one the compiler crashes."""
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


def tiny_net(
    activation: str, seed: int = 0, threshold: float = 0.3, scale: float = 1.0
) -> nnx.Sequential:
    """6x6x2 images, two convolutions and two dense layers, random biases, small enough for explicit
    matrices."""
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


def rational(array) -> np.ndarray:
    """The same numbers, exactly."""
    return np.vectorize(lambda v: Fraction(float(v)), otypes=[object])(
        np.asarray(array, np.float64)
    )


def exact_layers(net, x) -> list[np.ndarray]:
    """The activations behind each layer at x (an object array of Fractions), in exact
    arithmetic."""
    found = []
    for layer in net.layers:
        if type(layer) is nnx.Linear:
            x = rational(layer.kernel[...]).T @ x + rational(layer.bias[...])
        elif type(layer) is lipjax.Residual:
            x = x + exact_layers(layer.branch, x)[-1]
        elif type(layer) is lipjax.ReLU:
            x = np.maximum(x, 0)
        elif type(layer) is lipjax.ClippedReLU:
            x = np.minimum(np.maximum(x, 0), rational(layer.threshold[...]))
        else:
            a, b = np.split(x, 2)
            top, bottom = np.maximum(a, b), np.minimum(a, b)
            if type(layer) is lipjax.ClippedMaxMin:
                top = np.minimum(top, rational(layer.upper[...]))
                bottom = np.maximum(bottom, rational(layer.lower[...]))
            x = np.concatenate([top, bottom])
        found.append(x)
    return found


def proven_norm(k, operator, like, mask_in, mask_out):
    """A norm function of a walk: SVD of the explicit masked matrix, plus far more than its
    rounding."""
    matrix = dense_matrix(operator, like.shape)
    if mask_in is not None:
        matrix = matrix * np.asarray(mask_in).reshape(-1)
    if mask_out is not None:
        matrix = matrix * np.asarray(mask_out).reshape(-1, 1)
    return jax.numpy.asarray(np.linalg.norm(matrix, 2) * (1 + 1e-12)), None


def operator_of(layer, shape=None):
    """The linear map of one layer, for an example of this shape (8 along each axis of space)."""
    if shape is None and isinstance(layer, nnx.Conv):
        shape = (*(8 for _ in layer.kernel_size), layer.in_features)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(layer)] or [jax.numpy.zeros(()).dtype]
    like = jax.ShapeDtypeStruct(shape or (layer.in_features,), dtypes[0])
    graph = trace(layer, like, batched=False)
    (found,) = (graph.nodes[i] for i in graph.linear)
    return found.operator


def proven_norms(graph) -> list:
    """`proven_norm` of each linear node, whole."""
    nodes = [graph.nodes[i] for i in graph.linear]
    likes = [jax.ShapeDtypeStruct(graph.nodes[n.inputs[0]].shape, jax.numpy.float64) for n in nodes]
    return [
        proven_norm(0, n.operator, like, None, None)[0]
        for n, like in zip(nodes, likes, strict=True)
    ]


def outward_bound(graph, x, epsilon, mode, arithmetic=rounding.OUTWARD):
    """The bound of a graph in float64 by proven norms, rounded outwards unless said otherwise."""
    norms = (proven_norm, proven_norm)
    walk = bounds.Walk(
        graph, bounds.mode_of(mode), *norms, arithmetic=arithmetic, joint_norm=proven_norm
    )
    return walk(jax.numpy.asarray(x, jax.numpy.float64), epsilon)


def largest_by_bisection(d, radius, low, high):
    """max <d, t> over ball and box by bisection on the multiplier in NumPy, with the box's corner
    where that fits."""
    corner = np.where(d > 0, high, np.where(d < 0, low, 0))
    if np.linalg.norm(corner) <= radius:
        return float(d @ corner)
    left, right = -60.0, 60.0
    for _ in range(200):
        middle = (left + right) / 2
        t = np.clip(d * np.exp(middle), low, high)
        left, right = (middle, right) if np.linalg.norm(t) <= radius else (left, middle)
    return float(d @ np.clip(d * np.exp(left), low, high))


def run_lipjax(*arguments, code=0) -> str:
    """The command `lipjax` in a process of its own; what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "lipjax.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout + done.stderr
