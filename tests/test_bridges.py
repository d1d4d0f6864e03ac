"""Networks of other frameworks: the same logits here, or an error; and checkpoints that are up to
no good."""

import importlib.util
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, SHARED, dense_matrix, operator_of
from flax import linen, nnx
from test_regions import golden_net, jitted_bound, nhwc

import lipjax
from lipjax import bridges, storage

GOLDEN = SHARED / "golden"


@jax.jit
def jitted(network, images):
    return network(images)


def python_with_torch() -> list[str] | None:
    """An interpreter that can import both PyTorch and what lipjax needs: this one, or the system's
    of the same version."""
    if importlib.util.find_spec("torch"):
        return [sys.executable]
    question = (
        "import sys, importlib.util as u; print(sys.version_info[:2], bool(u.find_spec('torch')))"
    )
    try:
        answer = subprocess.run(
            ["/usr/bin/python3", "-c", question], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return ["/usr/bin/python3"] if answer.strip() == f"{sys.version_info[:2]} True" else None


@pytest.fixture(scope="module")
def torch_made(tmp_path_factory):
    """What tests/torch_cases.py finds and writes, once for all workers of a run: `found` and the
    `folder`."""
    python = python_with_torch()
    if python is None:
        pytest.skip(
            "no PyTorch here: pip install torch, or Debian's python3-torch for the same version of "
            "Python"
        )
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "torch"
    log = folder / "log.txt"  # comes last
    try:
        folder.mkdir()
    except FileExistsError:
        for _ in range(600):
            if log.exists():
                break
            time.sleep(1)
    else:
        paths = [str(ROOT), str(Path(np.__file__).parents[1])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
        command = [*python, str(ROOT / "tests" / "torch_cases.py"), str(folder), str(GOLDEN), "8"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        (folder / "log.part").write_text(done.stderr)
        (folder / "log.part").rename(log)
    assert (folder / "found.json").exists(), log.read_text()[-3000:]
    return SimpleNamespace(folder=folder, found=json.loads((folder / "found.json").read_text()))


# ------------------------------------------------------------------------------------------ PyTorch


def test_a_network_of_pytorch_has_the_same_logits_also_as_layers(torch_made):
    differences = torch_made.found["differences"]
    assert len(differences) == 9
    for network, (difference, has_layers) in differences.items():
        assert difference < 1e-5 and has_layers, network


def test_branches_functional_calls_hooks_and_writing_in_place_are_read(torch_made):
    assert len(torch_made.found["everything"]) == 4
    for network, difference in torch_made.found["everything"].items():
        assert difference < 1e-5, network


def test_a_residual_block_of_pytorch_is_traced_with_the_names_of_its_parameters(torch_made):
    found = torch_made.found["shortcut"]
    assert found["kinds"].count("Add") >= 1 and found["kinds"].count("Activation") == 1
    assert found["weights"]["main.1.weight"] == "Param"
    assert found["weights"]["main.2.running_var"] == "BatchStat"
    assert any("convolution at 'side'" in place for place in found["places"])


def test_a_network_of_pytorch_that_is_not_known_is_an_error_that_says_why(torch_made):
    assert len(torch_made.found["errors"]) == 12
    for expected, message in torch_made.found["errors"].items():
        assert expected in message


def test_the_golden_networks_come_through_pytorch_bit_for_bit_and_meet_the_golden_bounds(
    x64, shared, torch_made
):
    paths = sorted(GOLDEN.glob("*.npz"))
    assert len(paths) == 6
    for path in paths:
        network = storage.load(torch_made.folder / f"{path.stem}.safetensors")
        expected = golden_net(np.load(path))
        pairs = zip(jax.tree.leaves(network), jax.tree.leaves(expected), strict=True)
        assert all(a.dtype == b.dtype == jnp.float64 and np.array_equal(a, b) for a, b in pairs)
        assert [type(layer) for layer in network.layers] == [
            type(layer) for layer in expected.layers
        ]
    file = np.load(GOLDEN / "tiny_clmaxmin_scaled.npz")
    network = storage.load(torch_made.folder / "tiny_clmaxmin_scaled.safetensors")
    bound = jitted_bound(
        network,
        jnp.asarray(nhwc(file["x"].astype(np.float64)))[0],
        float(file["eps"]),
        mode="paper",
        iterations=3000,
    )
    np.testing.assert_allclose(bound.lipschitz, file["lip"][0], rtol=1e-6)
    np.testing.assert_allclose(bound.logits, file["logits"][0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "name, activation, shape",
    [
        ("4C3F", "ReLU_x", (28, 28, 1)),
        ("4C3F", "ReLU", (32, 32, 3)),
        ("6C2F", "ClampGroupSort", (32, 32, 3)),
        ("8C2F", "ReLU_x", (64, 64, 3)),
    ],
)
def test_a_checkpoint_of_the_papers_networks_has_the_same_logits(
    torch_made, name, activation, shape
):
    stem = torch_made.folder / f"{name}-{activation}-{'x'.join(map(str, shape))}"
    given = {"activation": "relu", "input_shape": shape} if activation == "ReLU" else {}
    network = bridges.from_pth(f"{stem}.pth", name, **given)
    made = lipjax.models.NETWORKS[bridges.ARCHITECTURES[name]]
    kind = {"ReLU_x": "clipped_relu", "ReLU": "relu", "ClampGroupSort": "clipped_maxmin"}[
        activation
    ]
    like = nnx.eval_shape(lambda: made(activation=kind, input_shape=shape, rngs=nnx.Rngs(0)))
    assert [type(layer) for layer in network.layers] == [type(layer) for layer in like.layers]
    assert [leaf.shape for leaf in jax.tree.leaves(network)] == [
        leaf.shape for leaf in jax.tree.leaves(like)
    ]
    file = np.load(f"{stem}.npz")
    logits = jitted(network, file["images"])
    np.testing.assert_allclose(
        logits, file["logits"], rtol=1e-4, atol=1e-5 * np.abs(file["logits"]).max()
    )


def test_a_checkpoint_that_does_not_fit_is_an_error_with_key_and_shapes(torch_made):
    path = torch_made.folder / "4C3F-ReLU-32x32x3.pth"
    with pytest.raises(
        ValueError,
        match=r"0.weight has shape \(32, 3, 3, 3\), expected \(32, 1, 3, 3\).*input_shape",
    ):
        bridges.from_pth(path, "4C3F", activation="relu")
    with pytest.raises(ValueError, match=r"13.weight has shape \(10, 512\), expected \(11, 512\)"):
        bridges.from_pth(path, "4C3F", activation="relu", input_shape=(32, 32, 3), classes=11)
    with pytest.raises(ValueError, match=r"no thresholds: say activation='relu' or"):
        bridges.from_pth(path, "4C3F", input_shape=(32, 32, 3))
    with pytest.raises(ValueError, match=r"1.threshold is missing"):
        bridges.from_pth(path, "4C3F", activation="clipped_relu", input_shape=(32, 32, 3))
    with pytest.raises(ValueError, match="'5C3F'"):
        bridges.from_pth(path, "5C3F")
    with pytest.raises(ValueError, match=r"no place for 1.threshold"):
        bridges.from_pth(torch_made.folder / "4C3F-ReLU_x-28x28x1.pth", "4C3F", activation="relu")


def test_tensors_of_every_kind_are_read_without_pytorch(torch_made):
    arrays = bridges.state_dict(torch_made.folder / "odd.pth")
    values = json.loads((torch_made.folder / "odd.json").read_text())
    listed = bridges.state_dict(torch_made.folder / "listed.pth")
    assert listed.keys() == {"x"} and listed["x"].dtype.name == "bfloat16"
    assert list(arrays) == list(values)
    for name, (dtype, value) in values.items():
        assert arrays[name].dtype.name == dtype and arrays[name].tolist() == value, name
    for name, expected in (
        ("module", r"NEWOBJ.*not executed"),
        ("old", "before PyTorch 1.6"),
        ("expanded", r"x of size \(5, 24\).*contiguous"),
        ("alone", "holds a _Tensor, expected the state_dict"),
        ("several", "holds a list of 2 entries, expected one state_dict"),
    ):
        with pytest.raises(bridges.TorchFileError, match=expected):
            bridges.state_dict(torch_made.folder / f"{name}.pth")


# ---------------------------------------------------------------------------------- files made here


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def numbers(values) -> bytes:
    return b"(" + b"".join(b"J" + int(v).to_bytes(4, "little", signed=True) for v in values) + b"t"


def tensor(key: str, array: np.ndarray, offset=0, size=None, kind="FloatStorage") -> bytes:
    """The pickle of a tensor as torch.save writes it."""
    size = array.shape if size is None else size
    stride = [min(math.prod(size[i + 1 :]), 2**31 - 1) for i in range(len(size))]
    storage_ = (
        b"("
        + text("storage")
        + b"ctorch\n"
        + kind.encode()
        + b"\n"
        + text(key)
        + text("cpu")
        + numbers([array.size])[1:-1]
    )
    rest = b"J" + int(offset).to_bytes(4, "little", signed=True) + numbers(size) + numbers(stride)
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage_
        + b"tQ"
        + rest
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def write_pth(path, entries: dict[str, bytes], arrays=(), **changed) -> Path:
    """A zip file as torch.save writes it: entries by name, each its pickle; arrays, each a storage.
    `changed`: members."""
    pickled = (
        b"\x80\x02ccollections\nOrderedDict\n)R("
        + b"".join(text(n) + p for n, p in entries.items())
        + b"u."
    )
    members = {
        "data.pkl": pickled,
        **{f"data/{k}": a.tobytes() for k, a in enumerate(arrays)},
        "version": b"3\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**members, **changed}.items():
            if data is not None:
                archive.writestr(f"archive/{name}", data)
    return path


def write_state(path, state: dict[str, np.ndarray]) -> Path:
    return write_pth(
        path,
        {name: tensor(str(k), a) for k, (name, a) in enumerate(state.items())},
        list(state.values()),
    )


def test_a_checkpoint_written_by_hand_is_read(tmp_path):
    state = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}
    found = bridges.state_dict(
        write_state(tmp_path / "a.pth", {f"module.{n}": a for n, a in state.items()})
    )
    assert found.keys() == state.keys() and all(np.array_equal(found[n], state[n]) for n in state)


class Malicious:
    """Pickled, it calls a function when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_malicious_pickle_is_never_executed(tmp_path, protocol):
    witness = tmp_path / "executed"
    code = f"__import__('os').mkdir({str(witness)!r})"
    for attack in (
        Malicious(os.mkdir, str(witness)),
        Malicious(eval, code),
        {"0.weight": Malicious(exec, code)},
    ):
        path = write_pth(tmp_path / "a.pth", {}, **{"data.pkl": pickle.dumps(attack, protocol)})
        with pytest.raises(bridges.TorchFileError, match=r"not executed"):
            bridges.state_dict(path)
        assert not witness.exists()
        pickle.loads(pickle.dumps(attack, protocol))  # the attack itself works
        assert witness.exists()
        witness.rmdir()


@pytest.mark.parametrize(
    "program",
    [
        # Names that lead further, a look inside an allowed one, objects of other classes, changes
        # of what is allowed.
        b"cbuiltins\ngetattr\n",
        b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n",
        b"ctorch\nload\n",
        b"cnumpy\nload\n",
        b"ccollections\nabc\n",
        b"ctorch._utils\n_rebuild_tensor_v2\nN}" + text("name") + text("x") + b"s\x86b",
        b"ctorch._utils\n_rebuild_tensor_v2\n}" + text("__call__") + text("x") + b"sb",
        b"ccollections\nOrderedDict\nN}" + text("get") + text("x") + b"s\x86b",
        b"ctorch\nFloatStorage\n)R",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R",
        b"(" + text("module") + b"tQ",
        text("storage") + b"Q",
        b"\x82\x01",
        b"(i__main__\nx\n",
        b"r\xff\xff\xff\x7f",
    ],
)
def test_a_pickle_of_anything_but_tensors_is_an_error(tmp_path, program):
    with pytest.raises(bridges.TorchFileError):
        bridges.state_dict(write_pth(tmp_path / "a.pth", {"x": program}))


def test_methods_hung_on_a_dict_are_not_called(tmp_path):
    array = np.ones(3, np.float32)
    hung = (
        b"}"
        + text("get")
        + b"ctorch._utils\n_rebuild_tensor_v2\ns"
        + text("items")
        + b"ccollections\nOrderedDict\nsb"
    )
    entries = (
        b"\x80\x02ccollections\nOrderedDict\n)R"
        + text("x")
        + tensor("0", array)
        + b"s"
        + hung
        + b"."
    )
    found = bridges.state_dict(write_pth(tmp_path / "a.pth", {}, [array], **{"data.pkl": entries}))
    assert found["x"].tolist() == [1, 1, 1]


def test_tensors_that_do_not_fit_their_storage_are_errors(tmp_path):
    array, path = np.arange(6, dtype=np.float32), tmp_path / "a.pth"
    for entry in (
        tensor("0", array, size=(7,)),
        tensor("0", array, offset=1),
        tensor("0", array, offset=-1),
        tensor("0", array, size=(-1, -6)),
        tensor("0", array, size=(2**31 - 1,) * 40),
        tensor("0", array, kind="DoubleStorage"),
        tensor("1", array),
        tensor("../../0", array),
        b"K\x03",
        text("weights"),
    ):
        with pytest.raises(bridges.TorchFileError):
            bridges.state_dict(write_pth(path, {"x": entry}, [array]))
    for changed, expected in (
        ({"byteorder": b"big"}, "byte order"),
        ({"data/0": None}, "has no archive/data/0"),
        ({"data.pkl": None}, "none of torch.save"),
        ({"data.pkl": b"\x80\x02}"}, "damaged"),
        ({"data.pkl": b"\xff"}, "damaged"),
        ({"data.pkl": b"\x80\x02K\x03."}, "holds a int"),
    ):
        with pytest.raises(bridges.TorchFileError, match=expected):
            bridges.state_dict(write_pth(path, {"x": tensor("0", array)}, [array], **changed))
    write_state(path, {"x": array})
    whole = path.read_bytes()
    for data in (
        whole[:-30],
        whole[:100],
        b"",
        whole.replace(array.tobytes(), array[::-1].tobytes()),
    ):
        path.write_bytes(data)
        with pytest.raises(bridges.TorchFileError, match="damaged"):
            bridges.state_dict(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(bridges.TorchFileError, match="compressed"):
        bridges.state_dict(path)
    with pytest.raises(bridges.TorchFileError, match="not there"):
        bridges.state_dict(tmp_path / "b.pth")


def published_state(seed=0) -> dict[str, np.ndarray]:
    """The state_dict of the paper's 4C3F for MNIST with ReLU_x, in its own order, with random
    numbers."""
    rng, state = np.random.default_rng(seed), {}
    convs = [(32, 1, 3, 28), (32, 32, 4, 14), (64, 32, 3, 14), (64, 64, 4, 7)]
    for k, (outputs, inputs, kernel, side) in enumerate(convs):
        state[f"{2 * k}.weight"], state[f"{2 * k}.bias"] = (
            (outputs, inputs, kernel, kernel),
            (outputs,),
        )
        state[f"{2 * k + 1}.threshold"] = (1, outputs, side, side)
    for i, (outputs, inputs) in ((9, (512, 3136)), (11, (512, 512)), (13, (10, 512))):
        state[f"{i}.weight"], state[f"{i}.bias"] = (outputs, inputs), (outputs,)
        if i < 13:
            state[f"{i + 1}.threshold"] = (1, outputs)
    return {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in state.items()}


def test_weights_of_a_checkpoint_stand_where_they_belong_and_thresholds_below_0_act_as_0(tmp_path):
    state = published_state()
    network = bridges.from_pth(write_state(tmp_path / "a.pth", state), "4C3F")
    first, activation, dense = network.layers[0], network.layers[1], network.layers[9]
    assert first.kernel[2, 1, 0, 5] == state["0.weight"][5, 0, 2, 1]
    assert activation.threshold[3, 27, 6] == max(state["1.threshold"][0, 6, 3, 27], 0)
    assert np.min(activation.threshold[...]) == 0 and np.min(state["1.threshold"]) < 0
    row, column, channel, output = 2, 5, 40, 100
    assert (
        dense.kernel[(row * 7 + column) * 64 + channel, output]
        == state["9.weight"][output, (channel * 7 + row) * 7 + column]
    )


def test_a_checkpoint_with_other_keys_or_numbers_is_an_error(tmp_path):
    path, state = tmp_path / "a.pth", published_state()
    for change, expected in (
        ({"3.threshold": None}, "3.threshold is missing"),
        ({"15.bias": np.zeros(3, np.float32)}, "no place for 15.bias"),
        (
            {"15.weight": np.zeros((3, 10), np.float32)},
            r"is no 4C3F of the paper: it has 4 convolutions and 4 dense layers, expected 4 and 3",
        ),
        ({"0.bias": np.full(32, np.nan, np.float32)}, "0.bias has NaN"),
        (
            {"1.threshold": np.zeros((28, 28, 32), np.float32)},
            r"1.threshold has shape \(28, 28, 32\), expected \(1, 32, 28, 28\)",
        ),
    ):
        write_state(
            path, {name: array for name, array in {**state, **change}.items() if array is not None}
        )
        with pytest.raises(ValueError, match=expected):
            bridges.from_pth(path, "4C3F")


def given_layers():
    return [
        nnx.Conv(2, 4, (3, 3), strides=2, padding=1, rngs=nnx.Rngs(0)),
        nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0)),
        lipjax.ReLU(),
        lipjax.Flatten(),
        nnx.Linear(36, 3, use_bias=False, rngs=nnx.Rngs(0)),
    ]


def test_a_checkpoint_of_a_given_architecture_fills_its_layers_in_order(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {
        **{"conv.weight": (4, 2, 3, 3), "conv.bias": (4,), "bn.weight": (4,), "bn.bias": (4,)},
        **{"bn.running_mean": (4,), "bn.running_var": (4,), "fc.weight": (3, 36)},
    }
    state = {name: rng.uniform(0.1, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    path = write_state(tmp_path / "a.pth", state)
    network = bridges.from_pth(path, nnx.Sequential(*given_layers()), input_shape=(6, 6, 2))
    assert [type(layer) for layer in network.layers] == [C, R, F, L]

    x = rng.uniform(0, 1, (6, 6, 2)).astype(np.float32)
    y = jax.lax.conv_general_dilated(
        jnp.moveaxis(x, -1, 0)[None], state["conv.weight"], (2, 2), ((1, 1), (1, 1))
    )[0]
    parts = (state[f"bn.{n}"][:, None, None] for n in ("running_mean", "running_var"))
    mean, variance = parts
    y = (y + state["conv.bias"][:, None, None] - mean) / np.sqrt(variance + 1e-5)
    y = y * state["bn.weight"][:, None, None] + state["bn.bias"][:, None, None]
    expected = state["fc.weight"] @ np.maximum(y, 0).reshape(-1)
    np.testing.assert_allclose(network(x), expected, rtol=1e-4)

    with pytest.raises(ValueError, match=r"fc.weight has shape \(3, 36\), expected \(3, 32\)"):
        layers = [*given_layers()[:4], nnx.Linear(32, 3, use_bias=False, rngs=nnx.Rngs(0))]
        bridges.from_pth(path, nnx.Sequential(*layers), input_shape=(6, 6, 2))
    with pytest.raises(ValueError, match=r"no place for fc.weight"):
        bridges.from_pth(path, nnx.Sequential(*given_layers()[:4]), input_shape=(6, 6, 2))
    with pytest.raises(ValueError, match=r"give its input_shape"):
        bridges.from_pth(path, nnx.Sequential(*given_layers()))


def dense(*widths):
    layers = [lipjax.Flatten()]
    for a, b in itertools.pairwise(widths):
        layers += [nnx.Linear(a, b, rngs=nnx.Rngs(0)), lipjax.ReLU()]
    return layers[:-1]


def small_convolutions(channels, flattened):
    settings = {"strides": 2, "padding": 1, "rngs": nnx.Rngs(0)}
    first, second = ((channels, 16), (16, 32))
    return [
        *(nnx.Conv(*first, (4, 4), **settings), lipjax.ReLU()),
        *(nnx.Conv(*second, (4, 4), **settings), lipjax.ReLU()),
        *dense(flattened, 100, 10),
    ]


OTHERS = {
    "mnist_mlp.pth": ((28, 28, 1), lambda: dense(784, 100, 100, 10)),
    "mnist_6_100_nat.pth": ((28, 28, 1), lambda: dense(784, *(100 for _ in range(5)), 10)),
    "mnist_convsmall.pth": ((28, 28, 1), lambda: small_convolutions(1, 1568)),
    "cifar10_cnn_a.pth": ((32, 32, 3), lambda: small_convolutions(3, 2048)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_checkpoints_of_others_are_read_into_their_architectures(shared, name):
    path = shared / "external" / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    shape, layers = OTHERS[name]
    network = bridges.from_pth(path, nnx.Sequential(*layers()), input_shape=shape)
    images = np.random.default_rng(0).uniform(0, 1, (3, *shape)).astype(np.float32)
    # As PyTorch computes it, in its own order, in NumPy's and JAX's float64.
    arrays = [a.astype(np.float64) for a in bridges.state_dict(path).values()]
    with jax.enable_x64(True):
        y = jnp.moveaxis(jnp.asarray(images, jnp.float64), -1, 1)
        for k, (weight, bias) in enumerate(zip(arrays[::2], arrays[1::2], strict=True)):
            y = y if k == 0 else jnp.maximum(y, 0)
            if weight.ndim == 4:
                y = jax.lax.conv_general_dilated(y, weight, (2, 2), ((1, 1), (1, 1)))
                y = y + bias[:, None, None]
            else:
                y = y.reshape(len(y), -1) @ weight.T + bias
    size = np.abs(y).max()
    np.testing.assert_allclose(jitted(network, images), y, rtol=1e-5, atol=1e-5 * size)
    with pytest.raises(ValueError, match="is no 4C3F of the paper"):
        bridges.from_pth(path, "4C3F")


# ------------------------------------------------------------------------------ batch normalisation


def drawn(module: nnx.Module, seed=0) -> nnx.Module:
    """Statistics, scales and biases drawn at random, scales of both signs and some of them 0; for
    use, not training."""
    rng = np.random.default_rng(seed)
    for _, part in nnx.iter_graph(module):
        if type(part) is nnx.BatchNorm:
            part.use_running_average = True
            part.mean[...] = jnp.asarray(rng.normal(0, 0.5, part.mean.shape), jnp.float32)
            part.var[...] = jnp.asarray(rng.uniform(0.3, 2, part.var.shape), jnp.float32)
            if part.use_scale:
                part.scale[...] = jnp.asarray(rng.normal(0, 1, part.scale.shape), jnp.float32)
            if part.use_bias:
                part.bias[...] = jnp.asarray(rng.normal(0, 0.5, part.bias.shape), jnp.float32)
    return module


def conv(inputs, outputs, **arguments):
    bias = jax.nn.initializers.normal(0.3)
    return nnx.Conv(
        inputs, outputs, (3, 3), bias_init=bias, rngs=nnx.Rngs(inputs + outputs), **arguments
    )


def norm(channels, **arguments):
    return nnx.BatchNorm(channels, rngs=nnx.Rngs(0), **arguments)


def linear(inputs, outputs):
    return nnx.Linear(inputs, outputs, rngs=nnx.Rngs(inputs))


# Layers on images (6, 6, 2), and the types that are left of them.
C, L, R, F, N, A = (
    nnx.Conv,
    nnx.Linear,
    lipjax.ReLU,
    lipjax.Flatten,
    lipjax.Normalize,
    lipjax.AveragePool,
)
FOLDS = {
    "behind a zero-padded convolution": (
        [conv(2, 4), norm(4), R(), F(), linear(144, 3)],
        [C, R, F, L],
    ),
    "behind a convolution of groups, no bias": (
        [
            conv(2, 4, feature_group_count=2, use_bias=False),
            norm(4, use_bias=False),
            R(),
            F(),
            linear(144, 3),
        ],
        [C, R, F, L],
    ),
    "in front of an unpadded convolution of groups": (
        [
            R(),
            norm(2, use_scale=False),
            conv(2, 4, padding="VALID", feature_group_count=2),
            F(),
            linear(64, 3),
        ],
        [R, C, F, L],
    ),
    "in front of a circular convolution": (
        [norm(2), conv(2, 4, padding="CIRCULAR"), F(), linear(144, 3)],
        [C, F, L],
    ),
    "in front of a zero-padded convolution": (
        [R(), norm(2), conv(2, 4), F(), linear(144, 3)],
        [R, N, C, F, L],
    ),
    "images normalised, zero padding": (
        [N([0.4, 0.5], [0.2, 0.3]), conv(2, 4), F(), linear(144, 3)],
        [N, C, F, L],
    ),
    "images normalised, no padding": (
        [N([0.4, 0.5], [0.2, 0.3]), conv(2, 4, padding=0), F(), linear(64, 3)],
        [C, F, L],
    ),
    "images normalised by one number": ([N([0.4], [0.2]), F(), linear(72, 3)], [F, L]),
    "through a flatten and a pool": ([R(), norm(2), A(2), F(), linear(18, 3)], [R, A, F, L]),
    "behind a pool": ([conv(2, 4), A(2), norm(4), R(), F(), linear(36, 3)], [C, A, R, F, L]),
    "two in a row": ([conv(2, 4), norm(4), norm(4), R(), F(), linear(144, 3)], [C, R, F, L]),
    "between activations": (
        [conv(2, 4), R(), norm(4), R(), F(), linear(144, 3)],
        [C, R, N, R, F, L],
    ),
    "on vectors": (
        [F(), linear(72, 6), norm(6), R(), norm(6), linear(6, 3), norm(3)],
        [F, L, R, L],
    ),
    "in a sequence": (
        [nnx.Sequential(conv(2, 4), norm(4)), R(), F(), linear(144, 3)],
        [C, R, F, L],
    ),
    "not into a residual": (
        [
            conv(2, 4),
            lipjax.Residual(norm(4), conv(4, 4), norm(4), R()),
            norm(4),
            R(),
            F(),
            linear(144, 3),
        ],
        [C, lipjax.Residual, N, R, F, L],
    ),
}


@pytest.mark.parametrize("case", FOLDS)
def test_a_folded_network_has_the_same_logits_on_the_same_pixels(case):
    layers, left = FOLDS[case]
    network = drawn(nnx.Sequential(*layers))
    folded = bridges.fold(network)
    assert [type(layer) for layer in folded.layers] == left
    images = np.random.default_rng(0).uniform(0, 1, (4, 6, 6, 2)).astype(np.float32)
    ours, theirs = (np.asarray(jitted(n, images)) for n in (folded, network))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6 * np.abs(theirs).max())
    lipjax.trace(folded, jnp.zeros((6, 6, 2)))  # every layer is known to the bounds


def test_what_is_left_of_a_normalisation_before_zero_padding_has_norm_1():
    layers, _ = FOLDS["images normalised, zero padding"]
    left = bridges.fold(nnx.Sequential(*layers)).layers[0]
    matrix = dense_matrix(lambda x: left(x) - left(jnp.zeros((6, 6, 2))), (6, 6, 2))
    np.testing.assert_allclose(matrix, np.eye(72), atol=1e-6)


def test_the_view_of_a_scale_of_any_sign_is_its_matrix():
    layer = lipjax.Normalize.of([-2.0, 0.0, 0.5], [1.0, 2.0, 3.0])
    view, mask = operator_of(layer, (2, 2, 3)), np.arange(12).reshape(2, 2, 3) % 5 != 0
    matrix = dense_matrix(lambda x: layer(x) - layer(jnp.zeros((2, 2, 3))), (2, 2, 3))
    np.testing.assert_array_equal(dense_matrix(view, (2, 2, 3)), matrix)
    np.testing.assert_array_equal(dense_matrix(view.absolute, (2, 2, 3)), np.abs(matrix))
    rows = np.linalg.norm(matrix * mask.reshape(-1), axis=1)
    np.testing.assert_allclose(view.row_norms(jnp.asarray(mask)).reshape(-1), rows, rtol=1e-6)
    for scale, shift in (([1.0], [1.0, 2.0]), ([], []), ([np.nan], [0.0]), ([1.0], [1e39])):
        with pytest.raises(ValueError, match="one finite scale and shift per channel"):
            lipjax.Normalize.of(scale, shift)


def test_a_shift_too_large_for_its_scale_stays_with_it():
    scale, shift = [1e-9, 1.0], [0.5, 0.5]
    network = nnx.Sequential(
        lipjax.Normalize.of(scale, shift), conv(2, 4), lipjax.Flatten(), linear(144, 3)
    )
    left = bridges.fold(network).layers[0]
    assert left.scale == network.layers[0].scale and left.shift == network.layers[0].shift


def test_a_batch_norm_that_cannot_be_folded_is_an_error():
    with pytest.raises(ValueError, match="layer 1, BatchNorm: expected use_running_average=True"):
        bridges.fold(nnx.Sequential(conv(2, 4), norm(4)))
    with pytest.raises(ValueError, match="axis=-1"):
        bridges.fold(nnx.Sequential(conv(2, 4), norm(4, axis=1, use_running_average=True)))
    broken = drawn(nnx.Sequential(conv(2, 4), norm(4)))
    broken.layers[1].var[...] = broken.layers[1].var[...] - 5
    with pytest.raises(ValueError, match="> 0"):
        bridges.fold(broken)
    with pytest.raises(ValueError, match="3 channels are normalised beside a layer that has 4"):
        bridges.fold(drawn(nnx.Sequential(conv(2, 4), norm(3))))
    with pytest.raises(TypeError, match="Sequential"):
        bridges.fold(conv(2, 4))


# -------------------------------------------------------------------------------------------- Linen


def linen_network() -> tuple[linen.Sequential, dict]:
    network = linen.Sequential(
        [
            linen.BatchNorm(use_running_average=True, use_scale=False),
            linen.Sequential(
                [linen.Conv(4, (3, 3), strides=2, kernel_dilation=2, name="named"), linen.relu]
            ),
            linen.BatchNorm(use_running_average=True),
            linen.Conv(4, (2, 2), padding="VALID", feature_group_count=2, use_bias=False),
            lipjax.MaxMin(),
            linen.Dropout(0.5, deterministic=True),
            lipjax.Flatten(),
            linen.Dense(3),
        ]
    )
    variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 6, 6, 2)))
    rng = np.random.default_rng(0)
    return network, jax.tree.map(
        lambda leaf: leaf + jnp.asarray(rng.uniform(0, 0.5, leaf.shape), leaf.dtype), variables
    )


def test_a_network_of_linen_has_the_same_logits():
    network, variables = linen_network()
    found = bridges.from_linen(network, variables, (6, 6, 2))
    images = np.random.default_rng(1).uniform(0, 1, (4, 6, 6, 2)).astype(np.float32)
    theirs = jax.jit(network.apply)(variables, images)
    np.testing.assert_allclose(jitted(found, images), theirs, rtol=1e-4, atol=1e-6)
    assert {type(layer) for layer in found.layers} == {lipjax.Normalize, C, R, lipjax.MaxMin, F, L}


@pytest.mark.parametrize(
    "layer, expected",
    [
        (lambda x: x.reshape(x.shape[0], -1), r"<lambda>.*lipjax\.Flatten\(\)"),
        (linen.gelu, "gelu"),
        (linen.BatchNorm(), "use_running_average=True"),
        (linen.Dropout(0.5), "deterministic=True"),
        (linen.LayerNorm(), "LayerNorm"),
        (linen.Conv(2, (3, 3), mask=jnp.ones((3, 3, 2, 2))), "mask of its own"),
    ],
)
def test_a_layer_of_linen_that_is_not_known_is_an_error(layer, expected):
    network = linen.Sequential([layer, lipjax.Flatten(), linen.Dense(3)])
    with pytest.raises((TypeError, ValueError), match=expected):
        bridges.from_linen(network, {}, (6, 6, 2))


def test_variables_of_linen_for_another_shape_are_an_error():
    network = linen.Sequential([lipjax.Flatten(), linen.Dense(3)])
    variables = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 2)))
    with pytest.raises(ValueError, match=r"\(6, 6, 2\) do not go through"):
        bridges.from_linen(network, variables, (6, 6, 2))
    with pytest.raises(TypeError, match=r"expected a flax\.linen\.Sequential, got flax\.linen"):
        bridges.from_linen(linen.Dense(3), {}, (6,))


# ------------------------------------------------------------------------------------------ Equinox


def equinox_network(mode: str):
    keys = iter(jax.random.split(jax.random.key(0), 4))

    def build():
        return eqx.nn.Sequential(
            [
                eqx.nn.Conv2d(2, 4, 3, padding=1, stride=2, groups=2, key=next(keys)),
                eqx.nn.BatchNorm(4, axis_name="batch", mode=mode),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.Sequential(
                    [
                        eqx.nn.Conv2d(4, 6, 2, padding="SAME", use_bias=False, key=next(keys)),
                        eqx.nn.Identity(),
                    ]
                ),
                eqx.nn.AvgPool2d(2, 1),
                eqx.nn.Dropout(0.5),
                eqx.nn.Lambda(jnp.ravel),
                eqx.nn.Linear(24, 3, key=next(keys)),
            ]
        )

    network, state = eqx.nn.make_with_state(build)()
    for seed in (1, 2):  # statistics of two batches, in training mode
        x = jax.random.uniform(jax.random.key(seed), (5, 2, 6, 6))
        run = jax.vmap(
            lambda x, state: network(x, state, key=jax.random.key(0)),
            in_axes=(0, None),
            axis_name="batch",
            out_axes=(0, None),
        )
        _, state = jax.jit(run)(x, state)
    return network, state


@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_a_network_of_equinox_has_the_same_logits(mode):
    network, state = equinox_network(mode)
    used = eqx.nn.inference_mode(network)
    found = bridges.from_equinox(used, (6, 6, 2), state)
    images = np.random.default_rng(1).uniform(0, 1, (4, 6, 6, 2)).astype(np.float32)
    theirs, _ = jax.jit(jax.vmap(lambda x: used(x, state)))(jnp.moveaxis(images, -1, 1))
    np.testing.assert_allclose(jitted(found, images), theirs, rtol=1e-4, atol=1e-6)
    assert [type(layer) for layer in found.layers] == [C, R, C, A, F, L]
    for given, expected in ((network, "inference mode"), (used, "needs the state")):
        with pytest.raises(ValueError, match=expected):
            bridges.from_equinox(given, (6, 6, 2), state if given is network else None)


def test_a_layer_of_equinox_that_is_not_known_is_an_error():
    key = jax.random.key(0)
    last = eqx.nn.Linear(72, 3, key=key)
    flat = eqx.nn.Lambda(jnp.ravel)
    for layers, expected in (
        (
            [eqx.nn.Lambda(lambda x: x.reshape(-1)), last],
            r"layer 0, Lambda, of .*<lambda> is not known",
        ),
        ([eqx.nn.Lambda(jax.nn.gelu), flat, last], "gelu"),
        ([eqx.nn.MaxPool2d(2), flat, last], "MaxPool2d"),
        ([eqx.nn.Dropout(0.5), flat, last], "training mode"),
        (
            [eqx.nn.Conv2d(2, 2, 3, padding=1, padding_mode="REFLECT", key=key), flat, last],
            "padding mode 'REFLECT'",
        ),
        ([eqx.nn.AvgPool2d(2, 2, padding=1), flat, last], "padding 0"),
        (
            [eqx.nn.Conv2d(3, 2, 3, key=key), flat, last],
            r"takes \(height, width, 3\), got \(6, 6, 2\)",
        ),
        ([last], "Flatten missing"),
    ):
        with pytest.raises((TypeError, ValueError), match=expected):
            bridges.from_equinox(eqx.nn.Sequential(layers), (6, 6, 2))
    with pytest.raises(TypeError, match=r"expected an equinox\.nn\.Sequential, got equinox"):
        bridges.from_equinox(last, (72,))
    with pytest.raises(ValueError, match="input_shape must be"):
        bridges.from_equinox(eqx.nn.Sequential([flat, last]), (6, 12))


def test_a_network_that_ends_in_an_activation_is_bridged_as_it_is():
    flat, last = eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(72, 3, key=jax.random.key(0))
    model = eqx.nn.Sequential([flat, last, eqx.nn.Lambda(jax.nn.relu)])
    found = bridges.from_equinox(model, (6, 6, 2))
    assert type(found.layers[-1]) is lipjax.ReLU
    image = np.random.default_rng(0).uniform(0, 1, (6, 6, 2)).astype(np.float32)
    assert np.asarray(found(image)).min() == 0 and np.asarray(found(image)).max() > 0
    graph = lipjax.trace(found, image)
    np.testing.assert_array_equal(graph(jnp.asarray(image)), found(image))


def test_frameworks_are_not_imported_with_the_bridges():
    code = (
        "import sys, lipjax.bridges, lipjax.storage; print([n for n in ('torch', 'equinox', "
        "'onnx') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got builtins\.object"):
        bridges.from_torch(object(), (3,))
