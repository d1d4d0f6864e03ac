"""Certificate files and their checker: what the tool proves is confirmed, what somebody edits is
found."""

import ast
import dataclasses
import functools
import os
import pickle
import subprocess
import sys
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import scipy.stats
from conftest import ACTIVATIONS, ROOT, dense_matrix, tiny_net
from flax import nnx

import lipjax
from lipjax import storage
from lipjax.check import checker, walk
from lipjax.check import layers as check_layers
from lipjax.check import norms as check_norms
from lipjax.formats import certificate_files

COUNT = 8
EPSILON = 0.06


def batch(count=COUNT):
    """Images of different brightness, so that a network tells them apart."""
    rng = np.random.default_rng(0)
    noise = rng.uniform(0, 1, (count, 1, 1, 2)) + rng.uniform(-0.3, 0.3, (count, 6, 6, 2))
    return np.clip(noise, 0, 1).astype(np.float32)


def every_net():
    """6x6x2 images, all four activations and few layers: compiling the tool for it is most of this
    file's time."""
    rngs, bias = nnx.Rngs(11), jax.nn.initializers.normal(0.1)
    return nnx.Sequential(
        nnx.Conv(2, 4, (3, 3), strides=2, padding=1, rngs=rngs, bias_init=bias),
        lipjax.MaxMin(),
        lipjax.ClippedReLU((3, 3, 4), threshold=0.5),
        lipjax.Flatten(),
        nnx.Linear(36, 12, rngs=rngs, bias_init=bias),
        lipjax.ClippedMaxMin(12, upper=0.4, lower=-0.4),
        lipjax.ReLU(),
        nnx.Linear(12, 4, rngs=rngs, bias_init=bias),
    )


@functools.cache
def certified(tier="probabilistic", mode="local", epsilon=EPSILON):
    """A network, images, their labels (some of them wrong) and the certificate."""
    net, images = every_net(), batch()
    labels = np.argmax(np.asarray(jax.vmap(net)(images)), axis=-1).astype(np.int32)
    labels[:2] = (labels[:2] + 1) % 4
    return (
        net,
        images,
        labels,
        lipjax.certify(net, images, labels, epsilon, tier=tier, mode=mode, seed=0),
    )


class File:
    """A certificate file's content with its network and data, to be tampered with."""

    def __init__(self, folder, **which):
        net, self.images, self.labels, certificate = certified(**which)
        self.path = folder / "certificate.npz"
        certificate_files.save(
            self.path,
            certificate,
            net,
            self.images,
            self.labels,
            data={"name": "noise", "split": "test"},
        )
        self.layers = certificate_files.describe(net, self.images[0])
        self.header, self.arrays = certificate_files.load(self.path)

    def check(self, **options):
        rng = np.random.default_rng(0)
        return checker.check(
            self.layers, self.images, self.labels, self.header, self.arrays, rng, **options
        )

    def rehash(self):
        """What somebody does who knows how the file is made."""
        self.header["network"] = certificate_files.network_hash(self.layers)
        self.header["data"] = certificate_files.data_hash(self.images, self.labels)
        self.header["statement"] = certificate_files.statement(self.header)
        self.header["digest"] = certificate_files.digest(self.header, self.arrays)


@pytest.fixture
def file(tmp_path):
    return File(tmp_path)


# ---------------------------------------------------------------------------------------- confirmed


GLOBAL = {"tier": "deterministic", "mode": "global", "epsilon": 0.02}
LINEAR = {"tier": "deterministic", "mode": "linear"}
ROWS = {"tier": "deterministic", "mode": "rows"}


@pytest.mark.parametrize(
    "which", [pytest.param({}, marks=pytest.mark.core), GLOBAL, LINEAR, ROWS], ids=str
)
def test_certificates_of_the_tool_are_confirmed(tmp_path, which):
    file = File(tmp_path, **which)
    report = file.check()
    assert report.confirmed, report
    assert np.array_equal(report.checked, np.arange(COUNT)) and report.random_norms == 0
    certificate = certified(**which)[-1]
    assert report.certified == certificate.certified.sum() > 0
    assert report.derived >= report.certified and np.all(report.margin >= certificate.margin)
    # as tight as the tool, but for what the tool's norms are inflated by
    if certificate.mode != "global":
        assert np.all(report.margin <= certificate.margin + 0.02)
    for fact in (
        certificate.tier,
        repr(certificate.failure_probability),
        f"epsilon = {certificate.epsilon!r}",
        "split 'test'",
        "8 of 8",
    ):
        assert fact in str(report)


@pytest.mark.parametrize("which, looser", [(LINEAR, {}), (ROWS, LINEAR)], ids=["linear", "rows"])
def test_certificates_of_modes_linear_and_rows_rest_on_more_than_those_before(
    tmp_path, which, looser
):
    file, before = File(tmp_path, **which), certified(**looser)[-1]
    assert np.all(file.arrays["margin"] >= before.margin - 1e-9)
    assert np.any(file.arrays["margin"] > before.margin + 0.01)
    file.header["mode"] = before.mode
    file.rehash()
    assert any("recorded margin" in problem for problem in file.check().problems)
    file.header["mode"] = which["mode"]
    file.arrays["margin"] += 0.02
    file.rehash()
    assert any("recorded margin" in problem for problem in file.check().problems)


def test_all_kinds_of_rows_are_among_the_confirmed_ones(file):
    """Rows 0 and 1 are wrong, 4 is right and open, the others are certified: the tests below rely
    on it."""
    assert file.arrays["correct"].tolist() == [False] * 2 + [True] * 6
    assert np.flatnonzero(file.arrays["certified"]).tolist() == [2, 3, 5, 6, 7]
    assert len(set(file.arrays["predicted"])) > 1


def test_epsilon_zero_is_confirmed(tmp_path):
    file = File(tmp_path, epsilon=0.0)
    report = file.check()
    assert report.confirmed and report.certified == COUNT - 2, report


def test_radii_are_saved_and_confirmed_each_at_its_own_epsilon(tmp_path):
    net = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(2)), lipjax.MaxMin(), nnx.Linear(4, 3, rngs=nnx.Rngs(3))
    )
    images = np.random.default_rng(0).uniform(0, 1, (6, 3)).astype(np.float32)
    labels = np.argmax(np.asarray(jax.vmap(net)(images)), axis=-1).astype(np.int32)
    labels[0] = (labels[0] + 1) % 3
    radii = lipjax.certified_radius(net, images, labels, tier="deterministic")
    assert radii.radius[0] == 0 and np.all(radii.radius[1:] > 0)
    certificate_files.save(tmp_path / "radii.npz", radii, net, images, labels)
    header, arrays = certificate_files.load(tmp_path / "radii.npz")
    layers = certificate_files.describe(net, images[0])

    def report():
        header["digest"] = certificate_files.digest(header, arrays)
        return checker.check(layers, images, labels, header, arrays, np.random.default_rng(0))

    assert header["epsilon"] is None and np.array_equal(arrays["epsilon"], radii.radius)
    assert report().confirmed, report()
    assert report().certified == 5
    arrays["epsilon"][1] *= 1.5
    assert "recorded as certified" in str(report())


def test_some_rows_only_are_checked_on_request(file):
    report = file.check(examples=3)
    assert report.confirmed and len(report.checked) == 3 and "3 of 8" in str(report)
    assert "as far as 3" in str(report)
    for examples in (0, COUNT + 1):
        with pytest.raises(ValueError, match=rf"1\.\.{COUNT}.*{examples}"):
            file.check(examples=examples)


def test_norms_by_chance_confirm_too_and_are_accounted_for(file, monkeypatch):
    monkeypatch.setattr(check_norms, "SMALL", 0)
    report = file.check()
    assert report.confirmed and report.random_norms > COUNT and report.delta == 1e-6, report
    assert "1e-06 in all" in str(report)


# ---------------------------------------------------------------------------------------- tampering


def edit_verdict(file):
    file.arrays["certified"][4] = True


def edit_margin(file):
    file.arrays["margin"][3] += 0.1


def edit_epsilon(file):
    file.header["epsilon"] *= 1.5
    file.arrays["epsilon"][:] *= 1.5


def edit_epsilon_of_one_row(file):
    file.header["epsilon"] = None
    file.arrays["epsilon"][5] *= 1.5


def edit_norm(file):
    file.arrays["norms"][5, 1] *= 0.8
    file.arrays["lipschitz"][5] *= 0.8


def edit_allowance(file):
    file.arrays["allowance"][5] /= 2


def edit_weight(file):
    kernel = file.layers[1]["kernel"].copy()
    kernel[1, 1] *= 1.3
    file.layers[1]["kernel"] = kernel


def edit_setting(file):
    file.layers[1] = {**file.layers[1], "padding": [[2, 0], [2, 0]]}


def edit_labels(file):
    file.labels = file.labels.copy()
    file.labels[6] = (file.labels[6] + 1) % 4
    for name in ("label", "predicted"):
        file.arrays[name][6] = file.labels[6]


def edit_images(file):
    file.images = file.images.copy()
    file.images[2] = file.images[3]


def edit_arithmetic(file):
    file.header["arithmetic"] = "tf32"


# Each with a part of what the report says once all hashes have been made to fit again.
EDITS = {
    edit_verdict: "certified without correct",
    edit_margin: "recorded margin",
    edit_epsilon: "recorded margin",
    edit_epsilon_of_one_row: "(row 5)",
    edit_norm: "recorded norm 1",
    edit_allowance: "recorded allowance",
    edit_weight: "(row ",
    edit_setting: "(row ",
    edit_labels: "recorded prediction",
    edit_images: "(row 2): recorded prediction",
    edit_arithmetic: "recorded allowance",
}


@pytest.mark.parametrize("edit", list(EDITS), ids=lambda edit: edit.__name__)
def test_a_naive_edit_is_found_by_a_hash(file, edit):
    edit(file)
    report = file.check()
    found = " ".join(report.problems)
    assert not report.confirmed and len(report.checked) == 0
    assert "digest" in found or "about the network" in found or "about the data" in found


@pytest.mark.core
@pytest.mark.parametrize(
    ("edit", "said"), list(EDITS.items()), ids=lambda x: getattr(x, "__name__", "")
)
def test_an_edit_with_all_hashes_made_to_fit_is_found_by_derivation(file, edit, said):
    edit(file)
    file.rehash()
    report = file.check()
    assert not report.confirmed and any(said in problem for problem in report.problems), report
    assert "REJECTED" in str(report)


def test_a_verdict_of_an_image_that_is_not_robust_is_never_derived(file):
    """The most that can be forged: verdict, margin, norms and allowance all agree with each
    other."""
    file.arrays["certified"][4] = True
    file.arrays["margin"][4] = 1e-12
    file.rehash()
    report = file.check()
    assert len(report.problems) == 2 and all("(row 4)" in problem for problem in report.problems), (
        report
    )
    assert "recorded as certified with margin 1e-12, derived margin -0.0" in report.problems[0]
    assert report.derived == report.certified - 1


def test_changes_that_no_derivation_leads_back_to_are_found_by_the_digest_alone(file):
    """What the file's docstring says of its limits, so that nobody believes more."""
    file.header["failure_probability"] = 1e-9
    assert any("digest" in problem for problem in file.check().problems)
    file.header["digest"] = certificate_files.digest(file.header, file.arrays)
    assert any("statement" in problem for problem in file.check().problems)
    file.rehash()
    assert file.check().confirmed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tier": "deterministic"}, "tier"),
        ({"tier": "estimate"}, "tier"),
        ({"failure_probability": 0.0}, "tier"),
        ({"mode": "none"}, "mode"),
        ({"epsilon": 0.01}, "epsilon"),
    ],
    ids=str,
)
def test_a_header_that_contradicts_itself_is_rejected(file, change, said):
    file.header |= change
    file.header["digest"] = certificate_files.digest(file.header, file.arrays)
    assert any(said in problem for problem in file.check().problems)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("correct", False, "correct is not"),
        ("certified", False, "not certified, although"),
        ("margin", np.nan, "certified without"),
        ("margin", -1.0, "certified without"),
        ("epsilon", np.nan, "negative, infinite or NaN"),
        ("lipschitz", 0.0, "lipschitz"),
        ("label", 1000, "labels differ"),
    ],
)
def test_rows_that_contradict_themselves_are_rejected(file, name, value, said):
    file.arrays[name][5] = value
    file.rehash()
    assert any(said in problem and "rows 5" in problem for problem in file.check().problems)


def test_a_file_of_another_network_or_another_number_of_norms_is_rejected(file):
    file.arrays["norms"] = file.arrays["norms"][:, :1]
    file.arrays["lipschitz"][:] = 1e9
    file.rehash()
    assert any("1 norms" in problem for problem in file.check().problems)
    file.arrays["predicted"][0] = 9
    file.rehash()
    assert any("outside 0..3" in problem for problem in file.check().problems)


# -------------------------------------------------------------------------------------------- files


@pytest.mark.core
def test_a_file_returns_what_was_saved(file):
    net, images, labels, certificate = certified()
    for name in ("predicted", "correct", "certified", "margin", "allowance", "lipschitz", "norms"):
        assert np.array_equal(file.arrays[name], getattr(certificate, name)), name
    assert np.array_equal(file.arrays["label"], labels) and np.array_equal(
        file.arrays["index"], np.arange(COUNT)
    )
    assert np.all(file.arrays["epsilon"] == EPSILON)
    for name in (
        "epsilon",
        "mode",
        "tier",
        "failure_probability",
        "seed",
        "seed_from",
        "arithmetic",
        "precision",
    ):
        assert file.header[name] == getattr(certificate, name), name
    assert file.header["versions"]["jax"] == jax.__version__
    assert "1e-06" in file.header["statement"] and "float32" in file.header["statement"]
    again = file.path.with_name("again.npz")
    certificate_files.save(
        again, certificate, net, images, labels, data={"name": "noise", "split": "test"}
    )
    assert again.read_bytes() == file.path.read_bytes()
    assert sorted(file.path.parent.iterdir()) == [again, file.path]  # no temporary file stays


def test_saving_what_is_no_certificate_of_these_images_is_an_error(tmp_path):
    net, images, labels, certificate = certified()
    path = tmp_path / "x.npz"
    fields = {
        field.name: getattr(certificate, field.name, None)
        for field in dataclasses.fields(lipjax.Estimate)
    }
    with pytest.raises(TypeError, match="Estimate has no field"):
        certificate_files.save(path, lipjax.Estimate(**fields), net, images, labels)
    with pytest.raises(ValueError, match="labels"):
        certificate_files.save(path, certificate, net, images, (labels + 1) % 4)
    with pytest.raises(ValueError, match="7 images"):
        certificate_files.save(path, certificate, net, images[:7], labels)
    with pytest.raises(ValueError, match=r"\(7,\)|7 rows"):
        certificate_files.save(path, certificate, net, images[:7], labels[:7])
    with pytest.raises(ValueError, match="'estimate'"):
        certificate_files.save(
            path, dataclasses.replace(certificate, tier="estimate"), net, images, labels
        )
    with pytest.raises(ValueError, match="'author'"):
        certificate_files.save(path, certificate, net, images, labels, data={"author": "x"})
    with pytest.raises(ValueError, match=r"\(8, 1\).*predictions"):
        certificate_files.save(path, certificate, net, images, labels[:, None])
    with pytest.raises(ValueError, match="margin is complex128"):
        certificate_files.save(
            path,
            dataclasses.replace(certificate, margin=certificate.margin * 1j),
            net,
            images,
            labels,
        )
    with pytest.raises(TypeError, match="expected one axis"):
        certificate_files.save(
            path, certificate, nnx.Linear(2, 2, rngs=nnx.Rngs(0)), images, labels
        )
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    net, images, labels, certificate = certified()
    path = tmp_path / "certificate.npz"
    certificate_files.save(path, certificate, net, images, labels)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        certificate_files.save(path, certificate, net, images, labels)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [
        "certificate.npz"
    ]


def test_files_that_cannot_be_read_are_errors_that_say_why(file, tmp_path):
    whole = file.path.read_bytes()

    def refused(content, said):
        path = tmp_path / "other.npz"
        path.write_bytes(content)
        with pytest.raises(certificate_files.CertificateFileError, match=said):
            certificate_files.load(path)

    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        refused(whole[:length], "damaged, cut short, or no certificate")
    refused(whole[:300] + bytes([whole[300] ^ 255]) + whole[301:], "damaged")
    refused(b"index,label\n0,1\n", "damaged, cut short, or no certificate")
    with pytest.raises(certificate_files.CertificateFileError, match="not there"):
        certificate_files.load(tmp_path / "nothing.npz")
    np.savez(tmp_path / "x.npz", images=np.zeros(3))
    refused((tmp_path / "x.npz").read_bytes(), "no header")
    np.save(tmp_path / "x.npy", np.zeros(3))
    refused((tmp_path / "x.npy").read_bytes(), "no npz")
    np.savez(tmp_path / "x.npz", header=np.array("{"))
    refused((tmp_path / "x.npz").read_bytes(), "no JSON")
    for change, said in (
        ({"version": 4}, "version 4.*newer lipjax"),
        ({"format": "x"}, "format"),
        ({"more": 1}, "more"),
        ({"seed_from": "luck"}, "seed_from is 'luck'"),
    ):
        certificate_files.write(tmp_path / "x.npz", {**file.header, **change}, file.arrays)
        refused((tmp_path / "x.npz").read_bytes(), said)
    for name, array in (
        ("margin", np.zeros(COUNT, np.float32)),
        ("norms", np.zeros(COUNT)),
        ("label", np.zeros(3, np.int32)),
    ):
        certificate_files.write(tmp_path / "x.npz", file.header, {**file.arrays, name: array})
        refused((tmp_path / "x.npz").read_bytes(), name)


# -------------------------------------------------------------------------------------- the command


def test_the_commands_exit_codes(file, monkeypatch, capsys):
    monkeypatch.setattr(checker, "load_subject", lambda *_: (file.layers, file.images, file.labels))
    arguments = [str(file.path), "--workdir=somewhere", "--seed=0"]
    assert checker.main(arguments) == 0
    out = capsys.readouterr().out
    assert (
        "CONFIRMED" in out and "delta 1e-06" in out and "epsilon = 0.06" in out and "seed 0" in out
    )
    assert checker.main([*arguments, "--examples=2"]) == 0
    assert "2 of 8" in capsys.readouterr().out

    edit_margin(file)
    certificate_files.write(file.path, file.header, file.arrays)
    assert checker.main(arguments) == 1
    assert "REJECTED" in (out := capsys.readouterr().out) and "(row 3): recorded margin" in out

    file.layers[3] = {"kind": "somebody.Swish"}
    file.rehash()
    certificate_files.write(file.path, file.header, file.arrays)
    assert checker.main(arguments) == 2
    assert "node 3, 'somebody.Swish', is not known" in capsys.readouterr().err
    file.path.write_bytes(file.path.read_bytes()[:500])
    assert checker.main(arguments) == 2
    assert "cut short" in capsys.readouterr().err


def test_a_run_that_cannot_be_read_is_no_rejection(file, tmp_path, capsys):
    assert checker.main([str(file.path), f"--workdir={tmp_path / 'none'}"]) == 2
    assert "holds no run" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding": "VALID", "strides": 2},
        {"padding": "same", "strides": (2, 3)},
        {"padding": 1, "use_bias": False},
        {"padding": (1, 2), "kernel_dilation": 2},
        {"padding": ((0, 3), (2, 0)), "strides": 3},
        {"padding": "SAME", "kernel_dilation": (1, 2), "strides": (1, 2)},
        {"padding": 2, "feature_group_count": 2, "strides": 2},
    ],
    ids=str,
)
def test_a_convolutions_matrix_equals_the_layer(x64, settings):
    bias = jax.nn.initializers.normal(1.0)
    layer = nnx.Conv(
        4, 6, (4, 3), param_dtype=jnp.float64, bias_init=bias, rngs=nnx.Rngs(0), **settings
    )
    equals(layer, (7, 6, 4))


def test_dense_pooling_and_other_ranks_have_the_matrix_of_the_layer(x64):
    equals(nnx.Linear(5, 3, param_dtype=jnp.float64, rngs=nnx.Rngs(0)), (5,))
    equals(nnx.Linear(5, 3, param_dtype=jnp.float64, use_bias=False, rngs=nnx.Rngs(0)), (2, 4, 5))
    equals(lipjax.AveragePool(2), (4, 6, 3))
    equals(lipjax.AveragePool((3, 2), strides=(1, 2)), (5, 5, 2))
    equals(lipjax.Normalize((0.1, 0.7), (0.5, 0.3)), (3, 4, 2))
    equals(lipjax.Normalize((0.1,), (0.3,)), (3, 4, 2))
    equals(
        nnx.Conv(2, 3, (3,), padding="SAME", strides=2, param_dtype=jnp.float64, rngs=nnx.Rngs(0)),
        (7, 2),
    )
    equals(
        nnx.Conv(1, 2, (2, 2, 2), padding=1, param_dtype=jnp.float64, rngs=nnx.Rngs(0)),
        (2, 3, 2, 1),
    )


def by_layers(*layers):
    """As files of versions 1 and 2 describe a network."""
    return check_layers.of_stored(*storage.layers_of(nnx.Sequential(*layers)))


def equals(layer, shape):
    out = jax.eval_shape(layer, jax.ShapeDtypeStruct(shape, jnp.float64)).shape
    head = {"kind": "flatten", "ndim": len(out)}
    description = by_layers(layer)
    affine = check_layers.nodes_of([*description, head, identity(int(np.prod(out)))], shape)[0].step
    offset = layer(jnp.zeros(shape))
    matrix = dense_matrix(lambda e: layer(e) - offset, shape)
    np.testing.assert_allclose(affine.matrix.toarray(), matrix, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(affine.bias, np.asarray(offset).reshape(-1), rtol=1e-14)
    assert affine.terms - np.max(np.sum(matrix != 0, axis=1)) == isinstance(
        layer, lipjax.AveragePool
    )
    np.testing.assert_array_equal(affine.absolute.toarray(), np.abs(affine.matrix.toarray()))
    np.testing.assert_array_equal(affine.squared.toarray(), np.square(affine.matrix.toarray()))
    assert np.all(affine.row_norms >= np.linalg.norm(matrix, axis=1) * (1 - 1e-14))


def identity(size):
    return {"kind": "linear", "kernel": np.eye(size), "bias": None, "dtype": None, "unusual": []}


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (lambda r: [nnx.Conv(2, 3, (3, 3), padding="CIRCULAR", rngs=r)], "CIRCULAR"),
        (lambda r: [nnx.Conv(2, 3, (3, 3), padding="REFLECT", rngs=r)], "REFLECT"),
        (
            lambda r: [nnx.Conv(2, 3, (3, 3), padding=1, input_dilation=2, rngs=r)],
            "does not end in an affine layer",
        ),
        (lambda r: [nnx.Conv(3, 3, (3, 3), rngs=r)], "cannot take"),
        (lambda r: [nnx.Conv(2, 3, (9, 9), padding=0, rngs=r)], "does not fit"),
        (lambda r: [lipjax.AveragePool(7)], "cannot take"),
        (lambda r: [lipjax.Normalize((0.0,) * 3, (1.0,) * 3)], "cannot take"),
        (lambda r: [nnx.Linear(3, 3, rngs=r)], "cannot take"),
        (lambda r: [lipjax.Flatten(4)], "flattens 4"),
        (lambda r: [lipjax.ClippedReLU((3, 3))], "thresholds"),
        (lambda r: [nnx.Conv(2, 3, (3, 3), rngs=r), lipjax.MaxMin()], "even"),
        (lambda r: [lipjax.ReLU()], "does not end in an affine layer"),
        (lambda r: [nnx.Linear(2, 2, rngs=r)], "one axis of logits"),
    ],
)
def test_what_the_checker_does_not_know_it_refuses(layers, said):
    with pytest.raises(checker.CannotCheck, match=said):
        check_layers.nodes_of(by_layers(*layers(nnx.Rngs(0))), (6, 6, 2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "somebody.Swish"}, "somebody.Swish, is not known"),
        ({"unusual": ["dot_general"]}, "dot_general"),
        ({"dtype": "float16"}, "computes in float16"),
        ({"kernel": np.eye(2, dtype=np.float16)}, "kernel of type float16"),
        ({"kernel": np.array([[1.0, np.nan], [0.0, 1.0]])}, "NaN"),
    ],
)
def test_layers_that_the_checker_does_not_know_are_refused(change, said):
    with pytest.raises(checker.CannotCheck, match=said):
        check_layers.nodes_of([{**identity(2), **change}], (2,))


def test_a_network_with_nan_is_refused(file):
    file.layers[1]["kernel"] = np.full_like(file.layers[1]["kernel"], np.nan)
    file.rehash()
    with pytest.raises(checker.CannotCheck, match=r"node 1, 'conv', has kernel with NaN"):
        file.check()


# -------------------------------------------------------------------------------------------- norms


def test_norms_are_not_below_the_exact_norm_of_matrices_that_have_one():
    """Rank-one integer matrices, whose norms are known exactly: ``||u v^T||^2 = ||u||^2 ||v||^2``,
    in rationals."""
    rng = np.random.default_rng(0)
    for rows, columns in ((1, 1), (1, 7), (7, 1), (5, 40), (40, 5), (60, 60)):
        u, v = rng.integers(-9, 10, rows), rng.integers(-9, 10, columns)
        u[0], v[0] = 3, 5
        exact = Fraction(int(u @ u) * int(v @ v))
        for scale in (Fraction(1), Fraction(2) ** -100, Fraction(2) ** 100):
            matrix = scipy.sparse.csr_array(np.outer(u, v) * float(scale))
            for bound in (check_norms.Norms(1e-9, rng), chance(rng)):
                lower, upper = bound(matrix)
                assert Fraction(upper) ** 2 >= exact * scale**2
                assert Fraction(lower) ** 2 <= exact * scale**2 * (1 + Fraction(1, 10**12))
                assert upper <= lower * (
                    1 + (2e-9 if isinstance(bound, check_norms.Norms) else 3e-3)
                )


def chance(rng, delta=1e-9):
    """The randomised bound also where the matrix is small."""

    def bound(matrix):
        exponent = np.frexp(np.max(np.abs(matrix.data)))[1]
        lower, upper, _ = check_norms.norm_by_chebyshev(matrix * 2.0**-exponent, delta, rng)
        return lower * 2.0**exponent, upper * 2.0**exponent

    return bound


def matrices():
    rng = np.random.default_rng(1)
    yield "dense", rng.normal(size=(80, 120))
    yield "sparse", scipy.sparse.random_array((150, 90), density=0.05, rng=rng).toarray()
    yield "no gap", np.linalg.qr(rng.normal(size=(60, 60)))[0]
    yield "half a per mille apart", np.diag(np.linspace(0.9, 1, 200))
    v = rng.choice([-1.0, 1.0], 300) / np.sqrt(300)
    yield "hidden direction", np.eye(300) + 0.01 * np.outer(v, v)
    yield "one entry", np.eye(1, 50)
    yield "far smaller entries", np.diag([1.0, 1e-200, 1e-310])


@pytest.mark.parametrize(
    ("name", "matrix"), list(matrices()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_norms_are_not_below_the_singular_value_and_close(name, matrix):
    truth = np.linalg.svd(matrix, compute_uv=False)[0]
    sparse = scipy.sparse.csr_array(matrix)
    for orientation in (sparse, sparse.T):
        lower, upper = check_norms.Norms(1e-9, np.random.default_rng(0))(orientation)
        assert truth * (1 - 1e-14) <= upper <= truth * (1 + 2e-9)
        assert lower == pytest.approx(truth, rel=1e-9)
        for seed in range(5):
            lower, upper = chance(np.random.default_rng(seed))(orientation)
            assert truth * (1 - 1e-14) <= upper <= truth * 1.002
            assert truth * 0.995 <= lower <= truth * (1 + 1e-12)


def test_a_guess_far_too_small_makes_the_randomised_bound_no_smaller(monkeypatch):
    """One step of Lanczos sees the identity only; the truth is 1.5 in one direction of 400."""
    monkeypatch.setattr(check_norms, "LANCZOS_STEPS", 1)
    v = np.random.default_rng(0).choice([-1.0, 1.0], 400) / 20
    matrix = scipy.sparse.csr_array(np.eye(400) + 0.5 * np.outer(v, v))
    for seed in range(10):
        assert chance(np.random.default_rng(seed))(matrix)[1] >= 1.5


def test_of_nothing_the_norm_is_zero():
    assert check_norms.Norms(1e-9, np.random.default_rng(0))(scipy.sparse.csr_array((3, 4))) == (
        0.0,
        0.0,
    )


@pytest.mark.parametrize("delta", [0.3, 1e-3, 1e-6, 1e-12])
def test_the_start_vector_is_below_its_threshold_with_at_most_the_probability_that_is_claimed(
    delta,
):
    t = check_norms.least_component(delta)
    assert delta / 2 <= scipy.stats.chi2.cdf(t**2, check_norms.STARTS) <= delta


# ----------------------------------------------------------------------------------------- the walk


def network_of(net, shape, arithmetic="float32"):
    dtype = np.float64 if arithmetic == "float64" else np.float32
    described = certificate_files.describe(
        net, jax.ShapeDtypeStruct(shape, dtype), arithmetic=arithmetic
    )
    return walked(described, shape, arithmetic)


def walked(described, shape, arithmetic):
    nodes = check_layers.nodes_of(described, shape)
    norms = check_norms.Norms(1e-9, np.random.default_rng(0))
    affine = [node.step for node in nodes if isinstance(node.step, check_layers.Affine)]
    return walk.Network(nodes, [norms(layer.matrix) for layer in affine], arithmetic), norms


def exact_activations(network, x):
    """What `walk` returns the regions of, in float64, and the logits."""
    values = [x.reshape(len(x), -1).T]
    for node in network.nodes:
        z = values[node.inputs[0]]
        if isinstance(node.step, check_layers.Affine):
            values.append(node.step.matrix @ z + node.step.bias[:, None])
        elif isinstance(node.step, check_layers.Add):
            values.append(z + values[node.inputs[1]])
        else:
            values.append(np.stack([node.step(column) for column in z.T], axis=1))
    return values


def inside_ball(x, epsilon, count=300):
    noise = np.random.default_rng(3).normal(size=(count, *x.shape))
    lengths = np.linalg.norm(noise.reshape(count, -1), axis=1)
    return x + noise * (epsilon * np.linspace(0, 1, count) / lengths).reshape(-1, *[1] * x.ndim)


def pooled_net():
    """Pooling directly behind a convolution, an activation in front of everything, and two
    activations in a row."""
    rngs = nnx.Rngs(3)
    return nnx.Sequential(
        lipjax.ClippedReLU((2,), threshold=0.9),
        nnx.Conv(2, 4, (3, 3), rngs=rngs),
        lipjax.AveragePool(2),
        lipjax.MaxMin(),
        lipjax.ClippedReLU((3, 3, 4), threshold=0.2),
        lipjax.Flatten(),
        nnx.Linear(36, 6, rngs=rngs),
        lipjax.ClippedMaxMin((6,), upper=0.1, lower=-0.1),
        nnx.Linear(6, 4, rngs=rngs),
    )


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "pooled"])
@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.5])
def test_every_activation_stays_in_its_region_and_every_margin_above_its_bound(activation, epsilon):
    net = pooled_net() if activation == "pooled" else tiny_net(activation, seed=7)
    network, norms = network_of(net, (6, 6, 2))
    x = batch(1)[0].astype(np.float64)
    regions = walk.walk(network, x, epsilon, norms).values
    *values, logits = exact_activations(network, inside_ball(x, epsilon))
    assert len(values) == len(regions)
    for region, value in zip(regions, values, strict=True):
        assert np.all(region.lower[:, None] <= value + 1e-15) and np.all(
            value <= region.upper[:, None] + 1e-15
        )
        moved = (value - region.center[:, None])[region.varies]
        assert np.all(np.linalg.norm(moved, axis=0) <= region.radius * (1 + 1e-12))
        still = value[~region.varies]
        assert np.all(np.ptp(still, axis=1) <= 1e-14) if still.size else True
    for label in range(4):
        derived = walk.derive(network, x, label, epsilon, norms)
        margins = logits[label] - np.max(np.delete(logits, label, axis=0), axis=0)
        assert derived.margin <= np.min(margins)
    if epsilon == 0:
        assert not any(region.varies.any() for region in regions)


@pytest.mark.parametrize("activation", ["clipped_relu", "maxmin", "clipped_maxmin"])
def test_only_rows_that_move_nothing_are_dropped(activation):
    """Pairs of every kind: of fixed order or not, clipped or not, with inputs that do not vary."""
    rng, half = np.random.default_rng(0), 400
    center = rng.uniform(-1, 1, 2 * half)
    width = rng.uniform(0, 1, 2 * half) * rng.choice([0, 0.2, 1], 2 * half)
    lower, upper = center - width, center + width
    layer = {
        "clipped_relu": lambda: lipjax.ClippedReLU(2 * half, threshold=0.5),
        "maxmin": lipjax.MaxMin,
        "clipped_maxmin": lambda: lipjax.ClippedMaxMin(2 * half, upper=0.25, lower=-0.25),
    }[activation]()
    description = by_layers(layer)
    step = check_layers.nodes_of([*description, identity(2 * half)], (2 * half,))[0].step
    nothing = np.zeros(2 * half)
    known = walk.Known(center, lower, upper, width > 0, 1.0, nothing, 0.0)
    behind, rows = walk.activate(step, known)
    # No two points of the box have outputs further apart than their inputs in these rows, pair by
    # pair.
    groups = (slice(None),) if activation == "clipped_relu" else (slice(half), slice(half, None))
    for _ in range(200):
        z, other = (
            np.clip(rng.uniform(lower - width, upper + width), lower, upper) for _ in range(2)
        )
        moved = np.square(step(z) - step(other))
        allowed = np.where(rows, np.square(z - other), 0)
        assert np.all(sum(moved[g] for g in groups) <= sum(allowed[g] for g in groups) + 1e-15)
        assert np.all(moved[~behind.varies] == 0)
    # As many are dropped as the tool drops, whose code this is not.
    with jax.enable_x64(True):
        ends = jnp.asarray(lower), jnp.asarray(upper)
        (_, node) = lipjax.trace(layer, ends[0]).nodes
        assert np.array_equal(behind.varies, lipjax.activations.varies(*node.rule.interval(*ends)))
        assert np.array_equal(rows, node.rule.active(*ends))
    assert 0 < rows.sum() < 2 * half


@pytest.mark.parametrize(
    "arithmetic", ["float64", "float32", "tf32", "bfloat16_products", "bfloat16"]
)
def test_the_allowance_for_rounding_is_that_of_a_naive_recursion(arithmetic):
    """The formulas of the error model once more, in plain dense algebra."""
    net = tiny_net("maxmin", seed=1)
    network, norms = walked(by_layers(*net.layers), (6, 6, 2), arithmetic)
    x = batch(1)[0]
    values = walk.walk(network, x, 0.1, norms).values
    derived = walk.derive(network, x, 0, 0.1, norms)
    u_in, u_acc, u_out = {
        "float64": (0, 2**-53, 2**-53),
        "float32": (0, 2**-24, 2**-24),
        "tf32": (2**-10, 2**-22, 2**-24),
        "bfloat16_products": (2**-8, 2**-22, 2**-24),
        "bfloat16": (2**-8, 2**-22, 2**-8),
    }[arithmetic]
    error, distance = np.zeros(x.size), 0.0
    affine = [
        (number, node)
        for number, node in enumerate(network.nodes, 1)
        if isinstance(node.step, check_layers.Affine)
    ]
    head, whole = network.nodes[-1].step, network.whole[-1][1]
    logits, _ = walk.transform(head, values[network.nodes[-1].inputs[0]], whole, arithmetic)
    for (number, node), terms in zip(affine, (18, 64, 54, 12), strict=True):
        layer, region = node.step, values[node.inputs[0]]
        behind = logits if layer is head else values[number]
        matrix = np.abs(layer.matrix.toarray())
        u, v, w = (Fraction(float(unit)) for unit in (u_in, u_acc, u_out))
        before, added = (1 + u) ** 2 * (1 + w) ** 3 - 1, (terms + 2) * v / (1 - (terms + 2) * v)
        size = np.maximum(np.abs(region.lower), np.abs(region.upper)) + error
        total = matrix @ size + np.abs(layer.bias)
        passed = np.minimum(matrix @ error, np.linalg.norm(matrix, axis=1) * distance)
        reached = np.maximum(np.abs(behind.lower), np.abs(behind.upper)) + passed
        some = (total + np.minimum(total, reached)) / 2
        local = float(before + (1 + before) * (v + added * (1 + 2 * v) * before)) * total
        local += float((1 + before) * added * (1 + 2 * v)) * some
        if layer is head:
            rows = np.abs(layer.matrix.toarray() - layer.matrix.toarray()[0])
            through = np.minimum(rows @ error, np.linalg.norm(rows, axis=1) * distance)
            differences = through + local + local[0]
        error = passed + local
        sigma = np.linalg.norm(layer.matrix.toarray(), 2)
        distance = min(sigma * distance + np.linalg.norm(local), np.linalg.norm(error))
        if layer is not head:
            shape = {144: (6, 6, 4), 54: (3, 3, 6), 12: (12,)}[error.size]
            a, b = np.split(error.reshape(shape), 2, axis=-1)
            error = np.concatenate([np.maximum(a, b)] * 2, axis=-1).reshape(-1)
    assert np.all(derived.rounding >= error * (1 - 1e-9))
    assert np.all(derived.rounding <= error * (1 + 1e-6))
    rivals = slice(1, None)
    assert np.all(derived.differences[rivals] >= differences[rivals] * (1 - 1e-9))
    assert np.all(derived.differences[rivals] <= differences[rivals] * (1 + 1e-6))


@pytest.mark.parametrize("steps", [0, 1, 4, walk.BISECTION_STEPS])
def test_the_worst_gain_is_the_maximum_over_ball_and_box(monkeypatch, steps):
    """Against a fine polar grid in the plane. However early bisection stops, it is never less."""
    monkeypatch.setattr(walk, "BISECTION_STEPS", steps)
    rng = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, 2001) + 1e-4  # on no axis
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    for _ in range(40):
        low, high = -rng.exponential(1, 2), rng.exponential(1, 2)
        d, radius = rng.normal(size=2) * [1, rng.choice([1, 1e-3])], rng.exponential(1)
        # Every ray's longest feasible point.
        reach = np.min(np.where(circle > 0, high, low) / circle, axis=1)
        truth = np.max((circle * np.minimum(reach, radius)[:, None]) @ d)
        found = walk.worst_gains(d[None], low, high, radius)[0]
        assert truth <= found
        assert steps < 10 or found <= truth * 1.005 + 1e-12


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
def test_the_executed_network_stays_within_the_allowance_for_its_rounding(arithmetic):
    """Weights that cancel, so that rounding is large: the allowance must hold, and say
    something."""
    net = tiny_net("clipped_maxmin", seed=2, scale=6.0)
    network, norms = network_of(net, (6, 6, 2), arithmetic)
    x = batch(1)[0]
    derived = walk.derive(network, x, 0, 0.05, norms)
    seen = inside_ball(x, 0.05).astype(np.float32)
    exact = exact_activations(network, seen.astype(np.float64))[-1]
    if arithmetic == "bfloat16":
        for layer in net.layers:
            if hasattr(layer, "dtype"):
                layer.dtype = jnp.bfloat16
    executed = np.asarray(jax.jit(jax.vmap(net))(seen)).astype(np.float64).T
    worst = np.max(np.abs(executed - exact), axis=1)
    assert np.all(worst <= derived.rounding) and np.any(worst > 1e-4 * derived.rounding)


def test_what_may_overflow_is_not_certified():
    net = tiny_net("relu", scale=1e12)  # logits of about 1e48
    network, norms = network_of(net, (6, 6, 2))
    derived = walk.derive(network, batch(1)[0], 0, 0.0, norms)
    assert derived.margin == -np.inf and np.all(np.isfinite(derived.logits))
    network, norms = network_of(net, (6, 6, 2), "float64")
    assert (
        max(walk.derive(network, batch(1)[0], label, 0.0, norms).margin for label in range(4)) > 0
    )


def test_pixels_that_are_no_numbers_certify_nothing():
    network, norms = network_of(tiny_net("clipped_relu"), (6, 6, 2))
    x = batch(1)[0]
    x[0, 0, 0] = np.nan
    assert walk.derive(network, x, 0, 0.05, norms).margin == -np.inf


# ------------------------------------------------------------------------------------- independence

MODULES = (
    *("check.__init__", "check.checker", "check.layers", "check.nodes", "check.norms"),
    *("check.kinds", "check.onesided", "check.slopes", "check.walk"),
    *("formats.certificate_files", "formats.files", "formats.network_files"),
)


def test_nothing_of_the_bounds_is_imported():
    allowed = {f"lipjax.{name}" for name in MODULES}
    allowed |= {"lipjax", "lipjax.check", "lipjax.cli", "lipjax.formats", "lipjax.storage"}
    # Where a function is turned into plain data, which the rest of the checker is given.
    description = {"lipjax.graph", "lipjax.graph.description"}
    for module in MODULES:
        for node in ast.walk(
            ast.parse((ROOT / "lipjax" / f"{module.replace('.', '/')}.py").read_text())
        ):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [
                    node.module,
                    *(
                        f"{node.module}.{alias.name}"
                        for alias in node.names
                        if node.module == "lipjax"
                    ),
                ]
            for name in names:
                known = allowed | (description if module == "formats.certificate_files" else set())
                assert not name.startswith("lipjax") or name in known, (module, name)


def test_the_core_runs_on_plain_arrays_without_jax_flax_or_the_library(file):
    content = (file.layers, file.images, file.labels, file.header, file.arrays)
    path = file.path.with_suffix(".pickle")
    path.write_bytes(pickle.dumps(content))
    program = f"""
import pickle, sys, types
import numpy as np
for name in ("jax", "jaxlib", "flax", "optax", "orbax"):
    sys.modules[name] = None  # importing it raises
package = types.ModuleType("lipjax")  # without running its __init__, which imports everything
package.__path__ = [{str(ROOT / "lipjax")!r}]
sys.modules["lipjax"] = package
from lipjax import check
with open({str(path)!r}, "rb") as file:
    report = check.check(*pickle.load(file), np.random.default_rng(0))
assert report.confirmed, report
print(*sorted(name for name in sys.modules if name.startswith("lipjax.")))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    packages = {"lipjax.check", "lipjax.formats"}
    assert set(done.stdout.split()) <= {f"lipjax.{name}" for name in MODULES} | packages


def test_a_mean_whose_sum_overflows_certifies_nothing():
    """It is added up before it is divided, and the matrix of the mean does not show that."""
    pool = {"kind": "average_pool", "window": [32, 32], "strides": [32, 32]}
    described = [pool, {"kind": "flatten", "ndim": 3}, identity(1)]
    layer = check_layers.nodes_of(described, (32, 32, 1))[0].step
    values = np.full(1024, 1e37)
    known = walk.Known(values, values, values, np.zeros(1024, bool), 0.0, np.zeros(1024), 0.0)
    error, *_ = walk._executed(layer, known, (values[:1], values[:1]), 1.0, "float32")
    assert np.all(np.isinf(error))
