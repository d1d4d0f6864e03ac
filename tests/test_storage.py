"""Stored networks: what is read is what was written, bit for bit; anything else is an error."""

import json
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lipjax
from lipjax import storage
from lipjax.check import checker
from lipjax.formats import certificate_files, network_files

SHAPE = (8, 8, 2)


def every_layer() -> nnx.Sequential:
    """A network with each layer that is stored, in sequences and Residuals, with settings that are
    not the usual."""
    rngs, highest = nnx.Rngs(0), jax.lax.Precision.HIGHEST
    return nnx.Sequential(
        lipjax.Normalize([0.5, 0.4], [0.2, 0.3]),
        nnx.Sequential(
            nnx.Conv(2, 4, (3, 3), padding=((1, 1), (0, 2)), rngs=rngs),
            lipjax.ClippedMaxMin((8, 8, 4)),
        ),
        lipjax.Residual(
            nnx.Conv(4, 4, (3, 3), padding=2, kernel_dilation=2, feature_group_count=2, rngs=rngs),
            lipjax.MaxMin(),
        ),
        lipjax.AveragePool((2, 2)),
        lipjax.ReLU(),
        nnx.Conv(
            4, 4, (3, 3), strides=2, use_bias=False, precision=highest, dtype=jnp.float32, rngs=rngs
        ),
        lipjax.ClippedReLU((2, 2, 4), threshold=0.7),
        lipjax.Flatten(),
        nnx.Linear(
            16,
            3,
            param_dtype=jnp.bfloat16,
            dtype=jnp.bfloat16,
            precision=(highest, jax.lax.Precision.HIGH),
            rngs=rngs,
        ),
    )


def dense(**arguments) -> nnx.Sequential:
    return nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0), **arguments),
        lipjax.ReLU(),
        nnx.Linear(4, 2, rngs=nnx.Rngs(1)),
    )


def equal(one, other) -> bool:
    """The same layers with the same settings, parameters of the same bits."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(
        a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs
    )


def test_load_gives_the_same_network_bit_for_bit(tmp_path):
    network, path = every_layer(), tmp_path / "network.safetensors"
    kinds = (
        {type(layer) for layer in network.layers}
        | {type(layer) for layer in network.layers[1].layers}
        | {lipjax.MaxMin}
    )
    assert kinds >= {kind.type for kind in storage.KINDS.values()}
    storage.save(network, path, input_shape=SHAPE)
    found = storage.load(path)
    assert equal(found, network)
    like = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    assert certificate_files.network_hash(
        certificate_files.describe(found, like)
    ) == certificate_files.network_hash(certificate_files.describe(network, like))
    images = np.random.default_rng(0).uniform(0, 1, (3, *SHAPE)).astype(np.float32)
    assert np.array_equal(found(images), network(images))


def test_a_network_stored_narrow_comes_back_in_float32_as_rounded(tmp_path):
    network = dense()
    wide, narrow = tmp_path / "wide.safetensors", tmp_path / "narrow.safetensors"
    storage.save(network, wide, input_shape=(3,))
    storage.save(network, narrow, input_shape=(3,), narrow=True)
    assert narrow.stat().st_size < wide.stat().st_size
    found = storage.load(narrow)
    pairs = zip(jax.tree.leaves(nnx.state(found)), jax.tree.leaves(nnx.state(network)), strict=True)
    for rounded, given in pairs:
        assert rounded.dtype == given.dtype == jnp.float32
        assert np.array_equal(rounded, np.asarray(given).astype(np.float16).astype(np.float32))
    # Once rounded, nothing is rounded again.
    storage.save(found, wide, input_shape=(3,), narrow=True)
    assert equal(storage.load(wide), found)


def test_certificates_of_a_narrow_network_are_of_the_rounded_one_and_checked_from_its_file(
    tmp_path, capsys
):
    network, path, file = dense(), tmp_path / "f.safetensors", tmp_path / "certificate.npz"
    storage.save(network, path, input_shape=(3,), narrow=True)
    found = storage.load(path)
    images = np.random.default_rng(0).uniform(0, 1, (3, 3)).astype(np.float32)
    np.savez(tmp_path / "images.npz", images=images, labels=np.argmax(found(images), axis=-1))
    for given, status in ((found, 0), (network, 1)):
        certificate = lipjax.certify(given, images, None, 1e-4, tier="deterministic")
        assert certificate.certified.any()
        certificate_files.save(file, certificate, given, images, certificate.predicted)
        arguments = [str(file), f"--images={tmp_path / 'images.npz'}", f"--network={path}"]
        assert checker.main(arguments) == status
        said = capsys.readouterr().out
        assert ("CONFIRMED" if status == 0 else "about the network") in said


def test_a_function_is_not_stored_narrow(tmp_path):
    with pytest.raises(ValueError, match=r"narrow=True is for an nnx\.Sequential"):
        storage.save(Branches(), tmp_path / "f.safetensors", input_shape=(4, 4, 2), narrow=True)
    assert not any(tmp_path.iterdir())


def test_parameters_too_large_for_a_narrow_file_are_an_error_and_write_nothing(tmp_path):
    network, path = dense(), tmp_path / "network.safetensors"
    network.layers[0].kernel[...] = network.layers[0].kernel[...].at[0, 0].set(7e4)
    with pytest.raises(ValueError, match="an entry of size 70000, too large for narrow"):
        storage.save(network, path, input_shape=(3,), narrow=True)
    assert not path.exists()


def test_a_stored_network_has_the_same_bounds(tmp_path):
    network, path, x = dense(), tmp_path / "network.safetensors", jnp.array([0.2, 0.5, 0.9])
    storage.save(network, path, input_shape=(3,))
    one, other = (lipjax.bound(n, x, 0.1) for n in (network, storage.load(path)))
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def test_the_description_says_shape_notes_and_layers_and_the_arrays_have_the_names_of_flax(
    tmp_path,
):
    import safetensors.numpy

    path, notes = (
        tmp_path / "network.safetensors",
        {"accuracy": 0.97, "split": "test", "seeds": [0, 1]},
    )
    storage.save(every_layer(), path, input_shape=SHAPE, notes=notes)
    description = storage.description(path)
    assert description["input_shape"] == SHAPE and description["notes"] == notes
    assert description["versions"]["lipjax"] == lipjax.__version__
    kinds = [layer["type"] for layer in description["layers"]]
    assert kinds == [
        "Normalize",
        "Sequential",
        "Residual",
        "AveragePool",
        "ReLU",
        "Conv",
        "ClippedReLU",
        "Flatten",
        "Linear",
    ]
    assert description["layers"][1]["layers"][0]["padding"] == [[1, 1], [0, 2]]
    arrays = safetensors.numpy.load_file(path)
    assert set(arrays) == {
        *(
            "layers.1.layers.0.kernel",
            "layers.1.layers.0.bias",
            "layers.1.layers.1.upper",
            "layers.1.layers.1.lower",
        ),
        *(
            "layers.2.branch.layers.0.kernel",
            "layers.2.branch.layers.0.bias",
            "layers.5.kernel",
            "layers.6.threshold",
        ),
        *("layers.8.kernel", "layers.8.bias"),
    }
    assert arrays["layers.5.kernel"].shape == (3, 3, 4, 4)


def test_float64_is_kept_and_needs_64_bits(tmp_path):
    path = tmp_path / "network.safetensors"
    with jax.enable_x64(True):
        network = dense(param_dtype=jnp.float64)
        storage.save(network, path, input_shape=(3,))
        assert equal(storage.load(path), network)
    with pytest.raises(
        storage.StorageError, match=r"layers.0.\w+ is float64, which needs .*jax_enable_x64"
    ):
        storage.load(path)


def test_orthogonal_layers_are_stored_written_down(tmp_path):
    path = tmp_path / "network.safetensors"
    network = nnx.Sequential(
        lipjax.CayleyLinear(3, 4, rngs=nnx.Rngs(0)),
        lipjax.MaxMin(),
        nnx.Linear(4, 2, rngs=nnx.Rngs(1)),
    )
    with pytest.raises(TypeError, match=r"lipjax\.orthogonal\.plain"):
        storage.save(network, path, input_shape=(3,))
    assert not path.exists()
    plain = lipjax.orthogonal.plain(network)
    storage.save(plain, path, input_shape=(3,))
    assert equal(storage.load(path), plain)


def with_nan() -> nnx.Sequential:
    network = dense()
    network.layers[0].kernel[...] = network.layers[0].kernel[...].at[0, 0].set(jnp.nan)
    return network


@pytest.mark.parametrize(
    "network, shape, notes, expected",
    [
        (with_nan, (3,), None, "layers.0.kernel has NaN"),
        (lambda: dense(param_dtype=jnp.float16), (3,), None, "layers.0.kernel is float16"),
        (lambda: dense(dtype=jnp.float16), (3,), None, "computes in float16"),
        (
            lambda: dense(preferred_element_type=jnp.float32),
            (3,),
            None,
            "preferred_element_type of its own",
        ),
        (dense, (4,), None, r"\(4,\) does not go through"),
        (dense, (3, 3), None, "one axis"),
        (dense, (0,), None, "positive"),
        (dense, (3,), {"accuracy": float("nan")}, "notes"),
        (dense, (3,), {"data": {1, 2}}, "notes"),
    ],
)
def test_what_is_not_stored_is_an_error_and_writes_nothing(
    tmp_path, network, shape, notes, expected
):
    with pytest.raises((TypeError, ValueError), match=expected):
        storage.save(network(), tmp_path / "network.safetensors", input_shape=shape, notes=notes)
    assert not list(tmp_path.iterdir())


def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path, network = tmp_path / "network.safetensors", dense()
    storage.save(network, path, input_shape=(3,))

    def killed(handle):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(OSError, match="no space"):
        storage.save(dense(use_bias=False), path, input_shape=(3,))
    assert equal(storage.load(path), network)
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "network.safetensors"
    storage.save(dense(), path, input_shape=(3,), notes={"a": 1})
    return path


def test_a_damaged_file_is_an_error(written):
    data = written.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]  # of the arrays
    for changed in (
        data[:-5],
        data[:4],
        b"",
        b"\x80" * 100,
        data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :],
    ):
        written.write_bytes(changed)
        with pytest.raises(storage.StorageError, match="damaged"):
            storage.load(written)
    with pytest.raises(storage.StorageError, match="not there"):
        storage.load(written.with_name("other.safetensors"))


def rewritten(path, change, arrays=None):
    """The file with another description, its digest made to fit, as someone with a plan would write
    it."""
    import safetensors.numpy

    header, found = network_files.read(path)
    found = found if arrays is None else arrays(found)
    change(header)
    header["digest"] = certificate_files.digest(header, found)
    path.write_bytes(safetensors.numpy.save(found, metadata={"lipjax": json.dumps(header)}))


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda h: h.update(version=3), "format version 3, this lipjax reads up to 2: use a newer"),
        (lambda h: h.update(version="1"), "format version '1'"),
        (lambda h: h.update(format="another"), "does not say format"),
        (lambda h: h.update(more=1), "expected the fields"),
        (lambda h: h.update(layers={}), "must be lists"),
        (lambda h: h.update(layers=[1]), "no network can be built"),
        (lambda h: h.update(input_shape=[4]), r"\(4,\) does not go through"),
        (lambda h: h.update(input_shape=[-3]), "positive"),
        (lambda h: h.update(input_shape=[2**33]), "at most 268435456 entries"),
        (lambda h: h["layers"][0].update(type="os.system"), "layers.0 is a 'os.system'; known are"),
        (lambda h: h["layers"][0].update(type="ReLU"), "layers.0, ReLU"),
        (lambda h: h["layers"][0].update(kernel_init="x"), "layers.0, Linear"),
        (lambda h: h["layers"][0].update(dtype="float16"), "float16"),
        (lambda h: h["layers"].pop(), "no layer takes layers.2.bias"),
        (
            lambda h: h["layers"].insert(1, {"type": "Normalize", "scale": [1e39], "shift": [0]}),
            "finite scale",
        ),
        (lambda h: h["layers"].__setitem__(1, {"type": "Flatten", "ndim": 3}), "Flatten"),
    ],
)
def test_a_description_that_fits_no_network_is_an_error(written, change, expected):
    rewritten(written, change)
    with pytest.raises(storage.StorageError, match=expected):
        storage.load(written)


@pytest.mark.parametrize(
    "arrays, expected",
    [
        (lambda a: {**a, "layers.7.kernel": a["layers.0.bias"]}, "no layer takes layers.7.kernel"),
        (lambda a: {n: v for n, v in a.items() if n != "layers.0.kernel"}, "layers.0, Linear"),
        (
            lambda a: {**a, "layers.0.bias": np.full(4, np.inf, np.float32)},
            "layers.0.bias has NaN or infinite",
        ),
        (lambda a: {**a, "layers.0.bias": np.zeros(5, np.float32)}, r"bias of shape \(5,\)"),
        (lambda a: {**a, "layers.0.kernel": a["layers.0.kernel"].astype(np.int16)}, "int16"),
        (lambda a: {**a, "layers.1.slope": np.zeros(4, np.float32)}, "layers.1, ReLU"),
    ],
)
def test_arrays_that_fit_no_network_are_an_error(written, arrays, expected):
    rewritten(written, lambda header: None, arrays)
    with pytest.raises(storage.StorageError, match=expected):
        storage.load(written)


def test_a_file_of_something_else_is_an_error(tmp_path):
    import safetensors.numpy

    path = tmp_path / "other.safetensors"
    for metadata, expected in (
        (None, "something else"),
        ({"lipjax": "{"}, "no JSON"),
        ({"lipjax": '{"format": NaN}'}, "NaN is no finite number"),
    ):
        safetensors.numpy.save_file({"kernel": np.zeros(3)}, path, metadata=metadata)
        for read in (storage.load, storage.description):
            with pytest.raises(storage.StorageError, match=expected):
                read(path)


@pytest.mark.parametrize(("name", "size"), [("F8_E4M3", 4), ("F8_E5M2", 4), ("F4", 2)])
def test_arrays_of_types_that_numpy_does_not_have_are_an_error(written, name, size):
    content = written.read_bytes()
    length = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + length])
    array = {"dtype": name, "shape": [4], "data_offsets": [0, size]}
    forged = {"__metadata__": head["__metadata__"], "layers.0.bias": array}
    start = json.dumps(forged).encode()
    written.write_bytes(len(start).to_bytes(8, "little") + start + bytes(size))
    with pytest.raises(storage.StorageError, match="damaged"):
        storage.load(written)


def test_a_network_that_takes_more_memory_than_there_is_is_an_error(written, monkeypatch):
    def exhausted(*_, **__):
        raise MemoryError("no memory")

    monkeypatch.setitem(storage.KINDS, "Linear", storage.KINDS["Linear"]._replace(build=exhausted))
    with pytest.raises(storage.StorageError, match="no memory"):
        storage.load(written)
    storage.save(lambda x: jnp.maximum(x, 0) @ jnp.ones((3, 2)), written, input_shape=(3,))
    rewritten(written, lambda header: header["nodes"][1].update(shape=[2**16, 2**16]))
    with pytest.raises(storage.StorageError, match="at most 268435456 entries"):
        storage.load(written)


# ---------------------------------------------------------------------------------------- functions


class Branches(nnx.Module):
    """A `__call__` of its own: a strided block beside a sum, pooling, BatchNorm, MaxMin."""

    def __init__(self):
        rngs, bias = nnx.Rngs(3), jax.nn.initializers.normal(0.2)
        self.first = nnx.Conv(2, 4, (3, 3), strides=2, bias_init=bias, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.norm.var[...] = jnp.array([0.5, 1.5, 2.0, 1.0])
        self.head = nnx.Linear(16, 3, bias_init=bias, rngs=rngs)

    def __call__(self, x):
        h = lipjax.activations.maxmin(self.norm(self.first(x)))
        pooled = nnx.avg_pool(h, (3, 3), padding="SAME")
        h = nnx.relu(pooled - 0.2) + lipjax.activations.clipped_relu(h, jnp.full(4, 0.3))
        return self.head(h.reshape(*h.shape[:-3], -1))


class OnBatches(Branches):
    """The same, of a batch alone."""

    def __call__(self, x):
        assert x.ndim == 4
        return super().__call__(x)


def moved(x):
    """Copies, padding, constants, a division, casts."""
    weights = np.random.default_rng(1).normal(size=(9, 6)).astype(np.float32)
    wide = jnp.concatenate([x[::-1], jnp.pad(0.5 - x, (1, 2), constant_values=0.25), -x / 3])
    h = jnp.clip(wide.astype(jnp.bfloat16).astype(jnp.float32) @ weights, -0.3, 0.5)
    h = jnp.concatenate([h, jnp.asarray([0.5, -1.0], jnp.float32)])
    return jnp.maximum(h[:4], h[4:]) @ weights[:4, :3]


FUNCTIONS = {
    "branches": (Branches, (4, 4, 2)),
    "batch": (OnBatches, (4, 4, 2)),
    "moved": (None, (2,)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_stored_function_has_the_values_the_graph_and_the_margins_of_the_given_one(
    tmp_path, name
):
    make, shape = FUNCTIONS[name]
    f, path = moved if make is None else make(), tmp_path / "f.safetensors"
    images = np.random.default_rng(0).uniform(0, 1, (3, *shape)).astype(np.float32)
    storage.save(f, path, example=images[0], notes={"a": 1})
    found = lipjax.load(path)
    assert storage.description(path)["input_shape"] == shape
    one = (lambda x: f(x[None])[0]) if name == "batch" else f
    expected = np.stack([np.asarray(one(x)) for x in images])
    np.testing.assert_array_equal(np.stack([np.asarray(found(x)) for x in images]), expected)
    np.testing.assert_allclose(found(images), expected, rtol=1e-6, atol=1e-6)
    given, again = (lipjax.certify(g, images, None, 0.01, tier="deterministic") for g in (f, found))
    assert np.all(given.margin > -np.inf)
    np.testing.assert_array_equal(again.norms, given.norms)
    # Weights that are written down are not computed anew: less may be rounded, never more.
    assert np.all(again.allowance <= given.allowance)
    left = given.margin + given.allowance
    np.testing.assert_allclose(again.margin + again.allowance, left, rtol=1e-14)
    if name == "moved":
        np.testing.assert_array_equal(again.margin, given.margin)


def test_certificates_of_a_stored_function_are_checked_from_its_file(tmp_path, capsys):
    images = np.random.default_rng(0).uniform(0, 1, (3, 4, 4, 2)).astype(np.float32)
    path, certificate_path = tmp_path / "f.safetensors", tmp_path / "certificate.npz"
    storage.save(Branches(), path, input_shape=(4, 4, 2))
    found = lipjax.load(path)
    certificate = lipjax.certify(found, images, None, 0.003, tier="deterministic")
    assert certificate.certified.any()
    labels = certificate.predicted
    certificate_files.save(certificate_path, certificate, found, images, labels)
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    arguments = [str(certificate_path), f"--images={tmp_path / 'images.npz'}"]
    assert checker.main([*arguments, f"--network={path}"]) == 0
    assert "CONFIRMED" in capsys.readouterr().out

    other = Branches()
    other.head.bias[...] += 1e-3
    storage.save(other, path, input_shape=(4, 4, 2))
    assert checker.main([*arguments, f"--network={path}"]) == 1
    assert "about the network" in capsys.readouterr().out


def test_a_stored_function_is_an_argument_under_jit_as_a_network_is_and_can_be_attacked(tmp_path):
    """As certify.py does with --network."""
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
    images = np.random.default_rng(1).uniform(size=(4, 6)).astype(np.float32)
    storage.save(lambda x: jax.nn.relu(x) @ weights, tmp_path / "f.safetensors", example=images[0])
    f = storage.load(tmp_path / "f.safetensors")
    wanted = f(images)
    np.testing.assert_array_equal(jax.jit(lambda f, x: f(x))(f, images), wanted)
    labels = np.argmax(wanted, axis=1)
    found = lipjax.attacks.pgd(f, images, labels, 2.0, steps=5)
    assert found.broken.any()


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda x: x * x, "`mul` of two quantities"),
        (lambda x: jnp.sort(x), "'sort' is not stored"),
        (nnx.Sequential(lipjax.CayleyLinear(3, 4, rngs=nnx.Rngs(0))), r"orthogonal\.plain"),
        (lambda x: x @ jnp.full((3, 2), jnp.inf), "NaN or infinite"),
        (lambda x: x.reshape(3, 1), "takes neither one example"),
    ],
)
def test_a_function_that_is_not_stored_is_an_error_and_writes_nothing(tmp_path, f, expected):
    with pytest.raises((TypeError, ValueError), match=expected):
        storage.save(f, tmp_path / "f.safetensors", input_shape=(3,))
    with pytest.raises(TypeError, match="input_shape=, or an example="):
        storage.save(f, tmp_path / "f.safetensors")
    assert not list(tmp_path.iterdir())


def edited(i, **fields):
    def change(header):
        header["nodes"][i].update(fields)

    return change


@pytest.mark.parametrize(
    "change",
    [
        edited(1, kind="os.system"),
        edited(1, inputs=[7]),
        edited(1, roundings=3.0),
        edited(1, executed=[["dot_general", ["bfloat16", "float32"], "float32", None, None]]),
        edited(0, shape=[4]),
        lambda header: header.update(input_shape=[4]),
        edited(1, numbers=[[[5], [0]], [[], []]]),
        lambda header: header["nodes"].pop(),
        lambda header: header["nodes"].append(None),
    ],
)
def test_nodes_that_are_not_what_they_compute_are_an_error(tmp_path, change):
    path = tmp_path / "f.safetensors"
    storage.save(lambda x: nnx.relu(x @ jnp.eye(3)) @ jnp.ones((3, 2)), path, input_shape=(3,))
    rewritten(path, change)
    with pytest.raises(storage.StorageError):
        storage.load(path)
