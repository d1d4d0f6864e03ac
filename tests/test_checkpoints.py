"""Checkpoints that are cut, overwritten, unwritable or of another network: what is restored, and
what is said."""

import dataclasses
import errno
import gc
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_net
from flax import nnx

from lipjax import training
from lipjax.training import checkpoints
from lipjax.training.checkpoints import CheckpointError, Checkpoints, ConfigMismatch, open_workdir

# Where one read fails Orbax drops the others of that checkpoint, never awaited. They come to light
# when their threads end, maybe in another test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True, scope="module")
def dropped_reads():
    """Brings the rest to light before the next file's tests."""
    yield
    gc.collect()


def state_of(value: float):
    """A state as training has it, a network and packed vectors included, every leaf a function of
    `value`."""
    network = tiny_net("clipped_maxmin")
    graph, params = nnx.split(network)
    network = nnx.merge(graph, jax.tree.map(lambda a: a + value, params))
    return training.State(
        step=jnp.asarray(int(value), jnp.int32),
        network=network,
        optimizer={"mean": jnp.linspace(0, value, 3000).reshape(30, 100)},
        vectors={
            "local": (
                jnp.full((4, 6, 6), int(value), jnp.uint16),
                jnp.full((4, 5), value, jnp.bfloat16),
            )
        },
        best=jnp.asarray(-jnp.inf),
    )


def abstract(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def values_file(workdir, step):
    """The file that holds the values of a checkpoint: by far the largest."""
    return max(
        (workdir / "checkpoints" / step).rglob("*"),
        key=lambda path: path.is_file() and path.stat().st_size,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with states 1, 2 and 3 saved, of which two are kept, and parameters; not to be
    changed."""
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpoints(workdir) as writer:
        for value in (1, 2, 3):
            writer.save_last(10 * value, state_of(value), {"epoch": value})
        writer.save_best(
            20, nnx.to_pure_dict(nnx.state(state_of(2).network)), {"epoch": 2, "score": 0.1 + 0.2}
        )
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy of `saved` that a test may damage."""
    import shutil

    return shutil.copytree(saved, tmp_path / "run")


def test_what_was_saved_is_restored_exactly_and_only_the_newest_are_kept(workdir):
    assert sorted(path.name for path in (workdir / "checkpoints" / "last").iterdir()) == [
        "20",
        "30",
    ]
    with Checkpoints(workdir) as reader:
        found, meta = reader.restore_last(abstract(state_of(0)))
        assert_same(found, state_of(3))
        assert meta == {"epoch": 3}
        wanted = nnx.to_pure_dict(nnx.state(state_of(2).network))
        params, meta = reader.restore_best(abstract(wanted))
        assert_same(params, wanted)
        assert meta == {"epoch": 2, "score": 0.1 + 0.2}


def test_a_new_workdir_has_no_state_and_no_selected_parameters(tmp_path):
    with Checkpoints(tmp_path) as reader:
        assert reader.restore_last(abstract(state_of(0))) is None
        with pytest.raises(CheckpointError, match="no selected checkpoint yet: train first"):
            reader.restore_best({})


def test_a_truncated_newest_checkpoint_gives_way_to_the_one_before_and_to_the_next_save(
    workdir, capsys
):
    file = values_file(workdir, "last/30")
    os.truncate(file, file.stat().st_size // 2)
    with Checkpoints(workdir) as run:
        found, meta = run.restore_last(abstract(state_of(0)))
        assert_same(found, state_of(2))
        assert meta == {"epoch": 2}
        said = capsys.readouterr().err
        assert (
            str(workdir / "checkpoints" / "last" / "30") in said and "damaged and skipped" in said
        )
        # Training comes by step 30 again: the damaged checkpoint must not stand in its way.
        run.save_last(30, state_of(3), {"epoch": 3})
    with Checkpoints(workdir) as run:
        assert_same(run.restore_last(abstract(state_of(0)))[0], state_of(3))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("file", ["values", "meta/metadata", "state/_METADATA"])
def test_a_missing_file_of_the_newest_checkpoint_is_noticed(workdir, capsys, file):
    newest = workdir / "checkpoints" / "last" / "30"
    (values_file(workdir, "last/30") if file == "values" else newest / file).unlink()
    with Checkpoints(workdir) as run:
        assert run.restore_last(abstract(state_of(0)))[1] == {"epoch": 2}
    assert "damaged and skipped" in capsys.readouterr().err


def test_flipped_bits_are_noticed_wherever_they_are(workdir, capsys):
    file = values_file(workdir, "last/30")
    good = file.read_bytes()
    noticed = silent = 0
    wanted = state_of(3)
    with Checkpoints(workdir) as reader:
        for position in np.linspace(0, len(good) - 1, 40).astype(int):
            bad = bytearray(good)
            bad[position] ^= 1 << position % 8
            file.write_bytes(bad)
            try:
                found, _ = reader._restore(reader._last, 30, abstract(wanted))
            except Exception:
                noticed += 1
            else:
                assert_same(found, wanted)  # padding between the values
                silent += 1
    assert noticed > 5 * silent


def test_a_flipped_digit_of_the_epoch_is_noticed(workdir, capsys):
    file = workdir / "checkpoints" / "last" / "30" / "meta" / "metadata"
    file.write_text(
        file.read_text().replace('"epoch":3', '"epoch":7').replace('"epoch": 3', '"epoch": 7')
    )
    with Checkpoints(workdir) as run:
        assert run.restore_last(abstract(state_of(0)))[1] == {"epoch": 2}
    assert "checksum" in capsys.readouterr().err


@pytest.mark.parametrize(
    "dtype", ["float32", "uint8", "uint16", "bfloat16", "float8_e4m3fn", "int32", "float64"]
)
def test_a_flipped_bit_and_moved_entries_change_the_checksum(x64, dtype):
    bits = np.random.default_rng(0).integers(
        0, 256, 3 * 5 * jnp.dtype(dtype).itemsize, dtype=np.uint8
    )

    def checksum(raw):
        return checkpoints._checksums(
            {"leaf": jnp.asarray(raw.view(jnp.dtype(dtype)).reshape(3, 5))}, {}
        )["leaf"]

    right = checksum(bits)
    for bit in range(0, 8 * len(bits), 3):
        flipped = bits.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        assert checksum(flipped) != right
    assert checksum(np.roll(bits, jnp.dtype(dtype).itemsize)) != right


def test_when_every_state_is_damaged_the_error_lists_them(workdir):
    for step in ("20", "30"):
        os.truncate(values_file(workdir, f"last/{step}"), 10)
    with (
        Checkpoints(workdir) as run,
        pytest.raises(CheckpointError, match=r"(?s)can be read \(step 30: .*; step 20: "),
    ):
        run.restore_last(abstract(state_of(0)))


def test_damaged_selected_parameters_are_an_error_that_names_the_checkpoint(workdir):
    os.truncate(values_file(workdir, "best/20"), 10)
    wanted = abstract(nnx.to_pure_dict(nnx.state(state_of(2).network)))
    with (
        Checkpoints(workdir) as run,
        pytest.raises(CheckpointError, match="checkpoints/best/20 cannot be read"),
    ):
        run.restore_best(wanted)


@pytest.mark.parametrize("change", ["shape", "missing", "extra"])
def test_selected_parameters_of_another_architecture_are_an_error_that_names_the_parameter(
    workdir, change
):
    wanted = abstract(nnx.to_pure_dict(nnx.state(state_of(2).network)))
    kernel = wanted["layers"][0]["kernel"]
    if change == "shape":
        wanted["layers"][0]["kernel"] = jax.ShapeDtypeStruct((5, *kernel.shape[1:]), kernel.dtype)
        name = "layers.0.kernel"
    elif change == "missing":
        del wanted["layers"][0]["kernel"]
        name = "layers.0.kernel"
    else:
        wanted["layers"][0]["scale"] = jax.ShapeDtypeStruct((3,), kernel.dtype)
        name = "layers.0.scale"
    with Checkpoints(workdir) as run, pytest.raises(CheckpointError) as caught:
        run.restore_best(wanted)
    message = str(caught.value)
    assert name in message and "another network" in message


def test_a_state_of_other_shapes_is_never_restored(workdir):
    wanted = abstract(state_of(0))
    vectors = {"local": (jax.ShapeDtypeStruct((7, 6, 6), jnp.uint16), wanted.vectors["local"][1])}
    with (
        Checkpoints(workdir) as run,
        pytest.raises(
            CheckpointError,
            match=r"vectors\.local\.0 is uint16 \(4, 6, 6\), here it is uint16 \(7, 6, 6\)",
        ),
    ):
        run.restore_last(dataclasses.replace(wanted, vectors=vectors))


def test_the_same_step_is_saved_once(workdir):
    with Checkpoints(workdir) as run:
        run.save_last(30, state_of(9), {"epoch": 9})
        assert run.restore_last(abstract(state_of(0)))[1] == {"epoch": 3}


def test_a_background_save_keeps_the_values_that_were_saved_whatever_happens_to_the_buffers(
    tmp_path,
):
    change = jax.jit(lambda tree: jax.tree.map(lambda a: a * 0 - 1, tree), donate_argnums=0)
    wanted = {"large": jnp.arange(2_000_000.0), "small": jnp.arange(3)}
    state = jax.tree.map(jnp.copy, wanted)
    with Checkpoints(tmp_path) as run:
        run.save_last(1, state, {"epoch": 1})
        for _ in range(5):  # the buffers that were saved are overwritten at once
            state = change(state)
        jax.block_until_ready(state)
    with Checkpoints(tmp_path) as run:
        assert_same(run.restore_last(abstract(wanted))[0], wanted)


def test_a_workdir_that_cannot_be_written_is_an_error_that_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write to .*file"):
        open_workdir(tmp_path / "file", {})
    with pytest.raises(CheckpointError, match=r"cannot write to .*file/checkpoints"):
        Checkpoints(tmp_path / "file")


def test_a_folder_without_permission_is_an_error_that_says_so(tmp_path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(CheckpointError, match="Permission denied"):
        open_workdir(tmp_path / "run", {})


def test_a_full_disk_is_an_error_that_says_so_and_leaves_the_checkpoints_that_were_there(
    workdir, monkeypatch
):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpoints(workdir) as run:
        monkeypatch.setattr(run._last, "save", full)
        with pytest.raises(
            CheckpointError,
            match=r"step 40 .*disk is full; free space and run the same command again",
        ):
            run.save_last(40, state_of(4), {"epoch": 4})
    with Checkpoints(workdir) as run:
        assert_same(run.restore_last(abstract(state_of(0)))[0], state_of(3))


def test_an_error_of_a_background_save_is_raised_by_wait(workdir, monkeypatch):
    with pytest.raises(CheckpointError, match="disk is full"), Checkpoints(workdir) as run:
        monkeypatch.setattr(
            run._last,
            "check_for_errors",
            lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")),
        )
        run.wait()


def test_fewer_than_two_states_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 2, got 1"):
        Checkpoints(tmp_path, keep_last=1)


def test_a_workdir_of_another_configuration_is_refused_with_the_fields_that_differ(tmp_path):
    open_workdir(tmp_path, {"a": {"b": 1}, "c": (1, 2)})
    open_workdir(tmp_path, {"a": {"b": 1}, "c": [1, 2]})
    with pytest.raises(ConfigMismatch, match=r"(?s)a\.b: stored 1, now 2.*finished no epoch yet"):
        open_workdir(tmp_path, {"a": {"b": 2}, "c": [1, 2]})
    open_workdir(tmp_path, {"a": {"b": 2}, "c": [1, 2]}, volatile=("a.b",))
    with pytest.raises(ConfigMismatch, match=r"a\.d: stored '\(absent\)', now None"):
        open_workdir(tmp_path, {"a": {"b": 1, "d": None}, "c": [1, 2]})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigMismatch) as caught:
        open_workdir(tmp_path, {})
    assert "finished no epoch" not in str(caught.value)


def test_a_configuration_that_was_cut_short_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text('{"a": ')
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        open_workdir(tmp_path, {"a": 1})
