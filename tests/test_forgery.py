"""Files that somebody forged, with every hash made to fit: what the checker confirms, it has
verified."""

import contextlib
import io
import json
import struct
import time
import warnings
import zipfile

import numpy as np
import pytest
import scipy.sparse
from flax import nnx

import lipjax
from lipjax import storage
from lipjax.check import checker, walk
from lipjax.check import norms as check_norms
from lipjax.formats import certificate_files, files
from lipjax.formats.certificate_files import CertificateFileError

RNG = 0


class Forgery:
    """A file that the checker's own derivation makes, of layers as plain data: nothing is
    compiled."""

    def __init__(
        self,
        layers,
        images,
        *,
        epsilon=0.1,
        arithmetic="float32",
        tier="probabilistic",
        mode="local",
    ):
        self.layers, self.images = layers, np.asarray(images)
        nodes = checker.nodes_of(layers, self.images.shape[1:])
        affine = [node.step for node in nodes if isinstance(node.step, checker.Affine)]
        norms = check_norms.Norms(1e-9, np.random.default_rng(RNG))
        network = walk.Network(nodes, [norms(layer.matrix) for layer in affine], arithmetic)
        slopes = {"linear": mode != "local", "rows": mode == "rows"}
        found = []
        for x in self.images:
            label = int(np.argmax(walk.derive(network, x, 0, 0.0, norms).logits))
            found.append((label, walk.derive(network, x, label, epsilon, norms, **slopes)))
        self.labels = np.array([label for label, _ in found], np.int32)
        margin = np.array([derived.margin for _, derived in found])
        recorded = np.array([derived.norms[:, 1] for _, derived in found])
        count = len(self.images)
        self.arrays = {
            "index": np.arange(count),
            "label": self.labels.copy(),
            "predicted": self.labels.copy(),
            "correct": np.ones(count, bool),
            "certified": margin > 0,
            "margin": margin,
            "allowance": np.array([2 * np.max(derived.rounding) for _, derived in found]),
            "lipschitz": 1e6 + np.prod(recorded, axis=1),
            "norms": recorded,
            "epsilon": np.full(count, epsilon),
        }
        self.header = {
            "format": certificate_files.FORMAT,
            "version": 1,
            "versions": {"lipjax": "0.0"},
            "classes": len(affine[-1].bias),
            "data_name": "noise",
            "split": "test",
            "examples": count,
            "epsilon": epsilon,
            "mode": mode,
            "tier": tier,
            "failure_probability": 1e-6 if tier == "probabilistic" else 0.0,
            "seed": 0,
            "arithmetic": arithmetic,
            "precision": "float64",
            "command": None,
        }

    def fit(self):
        """What somebody does who knows how the file is made."""
        self.header["network"] = certificate_files.network_hash(self.layers)
        self.header["data"] = certificate_files.data_hash(self.images, self.labels)
        self.header["statement"] = certificate_files.statement(self.header)
        self.header["digest"] = certificate_files.digest(self.header, self.arrays)
        return self

    def report(self):
        self.fit()
        rng = np.random.default_rng(RNG)
        return checker.check(self.layers, self.images, self.labels, self.header, self.arrays, rng)


def linear(kernel, bias=None):
    bias = None if bias is None else np.asarray(bias, np.float32)
    return {
        "kind": "linear",
        "kernel": np.asarray(kernel),
        "bias": bias,
        "dtype": None,
        "unusual": [],
    }


def small(**options):
    """Two inputs, three hidden neurons, two classes."""
    first = np.array([[1.0, -0.5, 0.25], [-1.0, 0.5, 1.0]], np.float32)
    second = np.array([[1.0, -1.0], [-0.5, 0.5], [0.25, 0.5]], np.float32)
    images = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.1]], np.float32)
    layers = [linear(first, [0.1, 0.2, 0.3]), {"kind": "relu"}, linear(second)]
    return Forgery(layers, images, **options)


def test_a_file_that_is_not_forged_is_confirmed():
    for arithmetic in ("float32", "float64"):
        for mode in ("local", "linear", "rows"):
            report = small(arithmetic=arithmetic, mode=mode).report()
            assert report.confirmed and report.certified == 3, report


# ------------------------------------------------------------------------------------------- header


@pytest.mark.core
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", "0), all certificates hold\nCONFIRMED: certificates of 10000 images ("),
        ("seed", True),
        ("seed", 2**70),
        ("data_name", "noise\nCONFIRMED: certificates of 10000 images, cifar10"),
        ("split", "test\rCONFIRMED"),
        ("split", "x" * 2000),
        ("data_name", ["noise"]),
        ("examples", 3.0),
        ("epsilon", [0.1]),
        ("epsilon", "0.1"),
        ("epsilon", 1),
        ("failure_probability", True),
        ("failure_probability", 1.0),
        ("versions", {"lipjax": "1\nCONFIRMED"}),
        ("versions", {"lipjax": 1}),
        ("versions", "1"),
        ("precision", "float64\nCONFIRMED"),
        ("arithmetic", ["float32"]),
        ("arithmetic", "float32 and every other"),
        ("mode", None),
        ("tier", "proved"),
        ("classes", True),
        ("classes", "2"),
        ("command", 3),
        ("network", "00"),
        ("version", True),
        ("version", 0),
    ],
    ids=str,
)
def test_every_header_field_is_typed_and_bounded_and_confirms_nothing_else(tmp_path, field, value):
    forgery = small()
    forgery.fit()
    forgery.header[field] = value
    with contextlib.suppress(ValueError, TypeError):  # of values of which no statement can be made
        forgery.header["statement"] = certificate_files.statement(forgery.header)
    forgery.header["digest"] = certificate_files.digest(forgery.header, forgery.arrays)
    rng = np.random.default_rng(RNG)
    report = checker.check(
        forgery.layers, forgery.images, forgery.labels, forgery.header, forgery.arrays, rng
    )
    assert not report.confirmed, report
    assert not any("CONFIRMED" in line[:9] for line in str(report).splitlines())
    certificate_files.write(tmp_path / "x.npz", forgery.header, forgery.arrays)
    with pytest.raises(CertificateFileError, match=field):
        certificate_files.load(tmp_path / "x.npz")


def test_one_image_is_not_true(tmp_path):
    forgery = small()
    forgery.images = forgery.images[:1]
    forgery.labels = forgery.labels[:1]
    forgery.arrays = {name: array[:1] for name, array in forgery.arrays.items()}
    forgery.header["examples"] = True
    certificate_files.write(tmp_path / "x.npz", forgery.fit().header, forgery.arrays)
    with pytest.raises(CertificateFileError, match="examples is True"):
        certificate_files.load(tmp_path / "x.npz")


def test_what_is_taken_on_trust_is_quoted_and_said_to_be(tmp_path):
    forgery = small()
    forgery.header |= {
        "command": "x\nCONFIRMED: all",
        "data_name": "CONFIRMED",
        "seed": 77,
        "versions": {"lipjax": "9.9"},
    }
    text = str(forgery.report()).splitlines()
    assert [line.startswith("CONFIRMED") for line in text] == [True] + [False] * (len(text) - 1)
    (trusted,) = (line for line in text if line.startswith("taken on trust"))
    for said in (
        "tier 'probabilistic'",
        "delta 1e-06",
        "seed 77",
        "mode 'local'",
        "'x\\nCONFIRMED: all'",
        "'9.9'",
    ):
        assert said in trusted
    (verified,) = (line for line in text if line.startswith("verified"))
    assert (
        "seed" not in verified
        and "epsilon = 0.1" in verified
        and "3 images marked certified" in verified
    )


def test_saving_keeps_to_the_same_table(tmp_path):
    net = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    images = np.array([[0.1, 0.9], [0.8, 0.2]], np.float32)
    certificate = lipjax.certify(net, images, None, 0.01)
    save = (tmp_path / "x.npz", certificate, net, images, certificate.predicted)
    for options, said in (
        ({"data": {"name": "a\nb"}}, "data_name"),
        ({"indices": [3, 3]}, "index"),
        ({"indices": [-1, 3]}, "index"),
    ):
        with pytest.raises(ValueError, match=said):
            certificate_files.save(*save, **options)
    assert not list(tmp_path.iterdir())
    certificate_files.save(*save, indices=[7, 3], data={"name": "a b"})
    assert certificate_files.load(tmp_path / "x.npz")[1]["index"].tolist() == [7, 3]


@pytest.mark.parametrize("index", [[0, 0, 2], [-1, 1, 2]], ids=str)
def test_repeated_or_negative_positions_are_refused(tmp_path, index):
    forgery = small()
    forgery.arrays["index"] = np.array(index)
    assert not forgery.report().confirmed
    certificate_files.write(tmp_path / "x.npz", forgery.header, forgery.arrays)
    with pytest.raises(CertificateFileError, match="index"):
        certificate_files.load(tmp_path / "x.npz")


# ---------------------------------------------------------------------------------------- the claim


@pytest.mark.core
@pytest.mark.parametrize("pixel", [1.5, -0.01, 1 + 2.0**-20])
def test_pixels_outside_0_and_1_are_not_what_the_statement_is_about(pixel):
    forgery = small()
    changed = forgery.images.copy()
    changed[0] = [pixel, 0.1]
    found = Forgery(forgery.layers, changed).report()
    assert not found.confirmed and any("[0, 1]" in problem for problem in found.problems)


def test_pixels_that_are_no_numbers_are_refused_whatever_is_claimed():
    forgery = small()
    forgery.images = forgery.images.copy()
    forgery.images[0, 0] = np.nan
    forgery.arrays["certified"][0] = False
    forgery.arrays["margin"][0] = -1.0
    assert any("NaN" in problem for problem in forgery.report().problems)


def big_logits(size):
    """Logits of this size, of which little is left between the two classes."""
    kernel = np.array([[size, size], [2.0, 0.0]])
    return Forgery([linear(kernel)], np.array([[0.5, 0.5]]), arithmetic="float64", epsilon=0.05)


@pytest.mark.core
@pytest.mark.parametrize("size", [1.0, 1e9, 1e12])
def test_the_tolerance_of_a_margin_is_not_of_the_logits_size(size):
    forgery = big_logits(size)
    margin = forgery.arrays["margin"][0]
    assert 0.5 < margin < 1 and forgery.report().confirmed
    forgery.arrays["margin"][0] = margin + max(1e-4, 200 * size * 2.0**-53)
    assert any("recorded margin" in problem for problem in forgery.report().problems)
    forgery.arrays["margin"][0] = margin + 8
    assert any("recorded margin" in problem for problem in forgery.report().problems)
    forgery.arrays["margin"][0] = margin / 2  # less is no claim that does not hold
    assert forgery.report().confirmed


@pytest.mark.core
def test_an_allowance_of_nothing_is_found_at_logits_of_any_size():
    for size in (1e6, 1e12):
        forgery = Forgery(
            [linear(np.array([[size, -size], [1.0, 0.0]], np.float32))],
            np.array([[0.5, 0.5]], np.float32),
        )
        assert forgery.report().confirmed
        forgery.arrays["allowance"][0] *= 0.4
        assert any("recorded allowance" in problem for problem in forgery.report().problems)


def test_a_margin_that_cannot_be_derived_is_not_let_pass():
    """The walk overflows, so that nothing is derived; the row is a wrong prediction, which claims a
    margin all the same."""
    forgery = small()
    forgery.layers[0] = {
        **forgery.layers[0],
        "kernel": forgery.layers[0]["kernel"] * np.float32(1e30),
    }
    forgery.layers[2] = {
        **forgery.layers[2],
        "kernel": forgery.layers[2]["kernel"] * np.float32(1e9),
    }
    forgery = Forgery(forgery.layers, forgery.images)
    assert np.all(forgery.arrays["margin"] == -np.inf) and forgery.report().confirmed
    forgery.arrays["correct"][0], forgery.labels[0] = False, 1 - forgery.labels[0]
    forgery.arrays["label"][0], forgery.arrays["margin"][0] = forgery.labels[0], 5.0
    assert any("recorded margin" in problem for problem in forgery.report().problems)
    # One that is certified on top of that, with numbers that are finite: no warning of NumPy.
    for name in ("margin", "allowance", "lipschitz", "norms"):
        forgery.arrays[name][1] = 1e38
    forgery.arrays["certified"][1] = True
    assert any("recorded as certified" in problem for problem in forgery.report().problems)


@pytest.mark.core
@pytest.mark.parametrize("mode", ["local", "linear", "rows"])
@pytest.mark.parametrize("epsilon", [1e155, 1e308])
def test_a_ball_whose_radius_squared_overflows_confirms_nothing(mode, epsilon):
    forgery = small(mode=mode)
    forgery.header["epsilon"] = epsilon
    forgery.arrays["epsilon"][:] = epsilon
    assert any("recorded as certified" in problem for problem in forgery.report().problems)
    forgery.arrays["certified"][:], forgery.arrays["correct"][:] = False, False
    forgery.arrays["predicted"] = 1 - forgery.arrays["label"]
    forgery.arrays["margin"][:] = -2.5  # says nothing of robustness, and cannot be derived either
    assert any("recorded margin -2.5" in problem for problem in forgery.report().problems)


@pytest.mark.core
@pytest.mark.parametrize("entry", [5e-324, 1e-310, 1e308])
def test_norms_of_the_smallest_and_the_largest_numbers_are_no_error(entry):
    norms = check_norms.Norms(1e-9, np.random.default_rng(0))
    lower, upper = norms(scipy.sparse.csr_array(np.full((9, 9), entry)))
    assert (
        upper >= 9 * min(entry, 1e307)
        and (upper < np.inf or entry == 1e308)
        and not np.isnan(lower)
    )


def wide(tier):
    """A layer of 1501 inputs and outputs, one more than where every norm is proved without
    chance."""
    kernel = (np.random.default_rng(0).normal(size=(1501, 1501)) / 40 + 2 * np.eye(1501)).astype(
        np.float32
    )
    head = np.zeros((1501, 2), np.float32)
    head[:9] = 1, -1
    return Forgery([linear(kernel), linear(head)], np.full((1, 1501), 0.5, np.float32), tier=tier)


def test_tier_deterministic_is_confirmed_without_chance_where_that_can_be_afforded():
    report = wide("deterministic").report()
    assert report.confirmed and report.random_norms == 0 and report.delta == 0, report
    assert str(report).splitlines()[0].startswith("CONFIRMED: ")


def test_tier_deterministic_confirmed_by_chance_says_so_in_the_first_line(monkeypatch):
    monkeypatch.setattr(check_norms, "SMALL", 0)
    monkeypatch.setattr(check_norms, "AFFORDABLE", 2)
    report = small(tier="deterministic").report()
    assert report.confirmed and report.random_norms == 0
    monkeypatch.setattr(check_norms, "AFFORDABLE", 0)
    rng = np.random.default_rng(0)
    kernel = np.abs(rng.normal(size=(40, 40))).astype(np.float32) - np.float32(0.3)
    head = rng.normal(size=(40, 3)).astype(np.float32)
    images = rng.uniform(0, 1, (2, 40)).astype(np.float32)
    report = Forgery(
        [linear(kernel), {"kind": "relu"}, linear(head)], images, tier="deterministic", epsilon=1e-3
    ).report()
    assert report.confirmed and report.random_norms > 0, report
    first = str(report).splitlines()[0]
    assert "NOT deterministically" in first and "probability >= 1 - 1e-09" in first


@pytest.mark.parametrize("side", [3, 120])
def test_norms_that_are_guessed_by_lanczos_are_proved_all_the_same(monkeypatch, side):
    monkeypatch.setattr(check_norms, "SMALL", 2)
    monkeypatch.setattr(check_norms, "LANCZOS_STEPS", 1)
    rng = np.random.default_rng(0)
    norms = check_norms.Norms(1e-9, rng, patient=True)
    for _ in range(5):
        matrix = rng.normal(size=(side, side + 5))
        lower, upper = norms(scipy.sparse.csr_array(matrix))
        truth = np.linalg.norm(matrix, 2)
        assert lower * (1 - 1e-12) <= truth <= upper <= truth * 1.01 and norms.random == 0


@pytest.mark.parametrize("claimed", [0.9999999, 5e-324])
def test_the_checkers_own_draws_do_not_depend_on_what_a_file_dares_to_claim(monkeypatch, claimed):
    monkeypatch.setattr(check_norms, "SMALL", 0)
    rng = np.random.default_rng(1)
    kernel, head = (rng.normal(size=(30, n)).astype(np.float32) for n in (30, 3))
    images = rng.uniform(0, 1, (2, 30)).astype(np.float32)
    forgery = Forgery([linear(kernel), {"kind": "relu"}, linear(head)], images, epsilon=1e-3)
    forgery.header["failure_probability"] = claimed
    report = forgery.report()
    assert report.random_norms > 0 and 1e-12 <= report.delta <= 1e-6, report


def test_the_number_of_classes_is_the_networks():
    forgery = small()
    forgery.header["classes"] = 3
    assert any("3 classes" in problem for problem in forgery.report().problems)


# -------------------------------------------------------------------------------------------- bombs


def rewritten(path, change):
    """The file's members, ``name.npy`` to bytes, changed and packed again."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def npy(shape, dtype="<f8", data=b""):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data


def text(value):
    stream = io.BytesIO()
    np.save(stream, np.array(value))
    return stream.getvalue()


@pytest.fixture
def path(tmp_path):
    forgery = small().fit()
    certificate_files.write(tmp_path / "x.npz", forgery.header, forgery.arrays)
    certificate_files.load(tmp_path / "x.npz")
    return tmp_path / "x.npz"


def refused(path, said):
    """Refused, and nothing large was unpacked on the way."""
    import tracemalloc

    tracemalloc.start()
    try:
        with pytest.raises(CertificateFileError, match=said):
            certificate_files.load(path)
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


@pytest.mark.core
def test_unknown_members_are_not_unpacked(path):
    rewritten(
        path, lambda members: members.update({"more.npy": npy((10**7,), data=bytes(8 * 10**7))})
    )
    assert path.stat().st_size < 1e6
    refused(path, "more")


@pytest.mark.core
def test_known_members_of_too_many_rows_are_not_unpacked(path):
    rewritten(
        path, lambda members: members.update({"margin.npy": npy((10**7,), data=bytes(8 * 10**7))})
    )
    refused(path, "margin is float64 of shape")


@pytest.mark.core
@pytest.mark.parametrize(
    "shape",
    [
        "(9007199254740993,)",
        "(3, 99999999999)",
        "(1000000000000000000000,)",
        "(-3,)",
        "(3.0,)",
        "[3]",
        "(3,)",
    ],
)
def test_shapes_that_are_forged_are_refused(path, shape):
    rewritten(path, lambda members: members.update({"margin.npy": npy(shape)}))
    refused(path, "margin")


@pytest.mark.core
@pytest.mark.parametrize("dtype", [">f8", "|O", "|V8", "<c8", "<f16", "<U9999999999", "|S8", "<M8"])
def test_types_that_are_forged_are_refused(path, dtype):
    rewritten(path, lambda members: members.update({"margin.npy": npy("(3,)", dtype, bytes(24))}))
    refused(path, "margin")


@pytest.mark.core
def test_an_npy_header_without_end_or_of_nested_brackets_is_refused(path):
    for content in (
        b"\x93NUMPY\1\0\xff\xff" + b"(" * 65535,
        b"\x93NUMPY\2\0\xff\xff\xff\xff" + b" " * 10**6,
        b"\x93NUMPY",
    ):
        rewritten(path, lambda members, content=content: members.update({"margin.npy": content}))
        refused(path, "margin")


@pytest.mark.core
def test_truth_values_that_are_neither_are_refused(path):
    rewritten(
        path, lambda members: members.update({"certified.npy": npy("(3,)", "|b1", b"\2\1\1")})
    )
    refused(path, "certified.*neither 0 nor 1")


@pytest.mark.core
def test_headers_that_are_nested_long_or_say_something_twice_are_refused(path):
    with np.load(path) as file:
        header = str(file["header"])
    for forged, said in (
        ("[" * 100_000 + "]" * 100_000, "nested"),
        ('{"format":' * 5000 + "1" + "}" * 5000, "nested"),
        (" " * 10**6 + header, "characters|bytes"),
        (header[:-1] + ', "epsilon": 0.2}', "'epsilon' twice"),
        (header.replace('"epsilon": 0.1', '"epsilon": NaN'), "NaN"),
        (header.replace('"epsilon": 0.1', '"epsilon": 1e999'), "1e999"),
        (header.replace('"seed": 0', '"seed": ' + "9" * 5000), "JSON|seed"),
    ):
        rewritten(path, lambda members, forged=forged: members.update({"header.npy": text(forged)}))
        refused(path, said)
    rewritten(path, lambda members: members.update({"header.npy": text([header, header])}))
    refused(path, "no text")


@pytest.mark.core
def test_a_string_without_an_end_is_refused_in_a_time_of_its_length():
    hostile = '{"' + '\\"' * 20_000
    began = time.process_time()
    with pytest.raises(files.Unreadable):
        files.parsed(hostile, len(hostile))
    assert time.process_time() - began < 1  # once of the square of that: 5 s and more


@pytest.mark.core
def test_brackets_in_strings_count_for_no_depth_and_those_behind_them_do():
    for text in ('"[[["', r'["\\", "\"[", "]"]', '{"]]]": "{{{"}'):
        assert files.parsed("[" * 29 + text + "]" * 29, 10**4)
    for text in (r'"\\"', r'"\""', '"["'):
        with pytest.raises(files.Unreadable, match="33 deep"):
            files.parsed(f"[{text}, " + "[" * 32 + "]" * 33, 10**4)


@pytest.mark.core
def test_zip_files_of_other_members_methods_and_many_names_are_refused(path):
    whole = path.read_bytes()
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")  # of a name twice
        archive.writestr("margin.npy", npy("(3,)", data=bytes(24)))
    refused(path, "same name")
    path.write_bytes(whole)
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(2000):
            archive.writestr(f"{i}.npy", b"")
    refused(path, "2011 members")
    path.write_bytes(whole)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_LZMA) as archive:
        archive.writestr("more.npy", b"")
    refused(path, "more")
    path.write_bytes(whole)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../more\nCONFIRMED", b"")
    refused(path, r"more\\nCONFIRMED")


@pytest.mark.parametrize("images", ["bomb", "shape", "type", "labels", "repeated", "pickle"])
def test_images_of_a_file_are_looked_at_before_they_are_unpacked(tmp_path, images, monkeypatch):
    monkeypatch.setattr(checker, "MOST_IMAGE_BYTES", 10**6)
    members = {
        "bomb": {
            "images.npy": npy((10**7,), data=bytes(8 * 10**7)),
            "labels.npy": npy((10**7,), "|u1", bytes(10**7)),
        },
        "shape": {"images.npy": npy((10**15, 2)), "labels.npy": npy((3,), "|u1", bytes(3))},
        "type": {
            "images.npy": npy((3, 2), "<i8", bytes(48)),
            "labels.npy": npy((3,), "|u1", bytes(3)),
        },
        "labels": {
            "images.npy": npy((3, 2), "<f4", bytes(24)),
            "labels.npy": npy((3,), "<f4", bytes(12)),
        },
        "repeated": {
            "images.npy": npy((2, 2), "<f4", bytes(16)),
            "labels.npy": npy((2,), "|u1", bytes(2)),
        },
        "pickle": {
            "images.npy": npy((3,), "|O", bytes(24)),
            "labels.npy": npy((3,), "|u1", bytes(3)),
        },
    }[images]
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(checker.CannotCheck):
        checker._from_npz(str(tmp_path / "x.npz"), np.arange(3))


def test_images_of_a_file_are_found_by_the_index(tmp_path):
    x = np.random.default_rng(0).integers(0, 255, (5, 4, 4)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(5))
    images, labels = checker._from_npz(str(tmp_path / "x.npz"), np.array([4, 1]))
    assert images.shape == (2, 4, 4, 1) and images.dtype == np.float32 and labels.tolist() == [4, 1]
    np.testing.assert_array_equal(images[0, ..., 0], x[4] / np.float32(255))


def stored(tmp_path):
    net = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    lipjax.save(net, tmp_path / "x.safetensors", input_shape=(2,))
    content = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    return tmp_path / "x.safetensors", json.loads(content[8 : 8 + length]), content[8 + length :]


def test_networks_with_descriptions_that_are_nested_long_or_ambiguous_are_refused(tmp_path):
    path, head, data = stored(tmp_path)
    text = head["__metadata__"]["lipjax"]
    for forged in (
        text.replace('"notes": {}', '"notes": {"a": ' + "[" * 50_000 + "]" * 50_000 + "}"),
        text.replace(
            '"layers": [',
            '"layers": ' + '[{"type": "Sequential", "layers": ' * 2000 + "[" + "]}" * 2000 + ", ",
        ),
        text[:-1] + ', "version": 1}',
        text.replace('"input_shape": [2]', '"input_shape": [true]'),
        text.replace('"version": 1', '"version": true'),
    ):
        assert forged != text
        head["__metadata__"]["lipjax"] = forged
        start = json.dumps(head).encode()
        path.write_bytes(len(start).to_bytes(8, "little") + start + data)
        for read in (lipjax.load, storage.description):
            with pytest.raises(storage.StorageError):
                read(path)


def test_networks_with_a_forged_or_nested_head_are_refused(tmp_path):
    path, head, data = stored(tmp_path)
    deep = ('{"a":' * 100_000 + "1" + "}" * 100_000).encode()
    huge = json.dumps(
        {
            **head,
            "layers.0.kernel": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]},
        }
    ).encode()
    for start, length in ((deep, None), (huge, None), (b"{}", 2**62), (b" " * 10**7, None)):
        path.write_bytes((length or len(start)).to_bytes(8, "little") + start + data)
        with pytest.raises(storage.StorageError):
            lipjax.load(path)
