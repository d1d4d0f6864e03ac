"""The notebooks run from the first cell to the last, and are kept without outputs."""

import ast
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="notebooks are read with nbformat")
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def executed(name: str, timeout: int, **environment) -> str:
    """Runs a notebook as a reader would, in its folder and with this interpreter; returns what it
    printed."""
    nbclient = pytest.importorskip("nbclient", reason="notebooks are executed with nbclient")
    pytest.importorskip("ipykernel", reason="notebooks are executed by ipykernel")
    notebook = nbformat.read(FOLDER / name, as_version=4)
    environment = {**os.environ, "LIPJAX_NOTEBOOK_QUICK": "1", "MPLBACKEND": "agg", **environment}
    client = nbclient.NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",  # of this interpreter
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute(env=environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_valid_and_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            compile(cell.source, path.name, "exec")  # no magics: the code is Python


def test_the_larger_notebook_installs_what_the_scripts_need():
    notebook = nbformat.read(FOLDER / "larger_set.ipynb", as_version=4)
    install = next(cell.source for cell in notebook.cells if "PACKAGES +=" in cell.source)
    statements = [s for s in ast.parse(install).body if isinstance(s, ast.Assign | ast.AugAssign)]
    lists = [s.value for s in statements if "PACKAGES" in ast.unparse(s).partition("=")[0]]
    listed = {name for each in lists for name in ast.literal_eval(each)}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    needed = {re.match(r"[\w-]+", line)[0] for line in lines if re.match(r"\w", line)}
    # lipjax brings the first ones itself; Colab has TensorFlow.
    own = {"jax", "flax", "numpy", "scipy", "safetensors", "optax", "tensorflow", "tensorflow-cpu"}
    assert listed == needed - own


def test_the_digits_notebook_runs():
    said = executed("digits.ipynb", timeout=240)
    assert (
        "certified" in said and "tier probabilistic" in said and "after 20 gradient steps" in said
    )


@pytest.mark.slow
def test_the_larger_notebook_trains_resumes_certifies_and_checks_on_a_slice_of_cifar10(
    shared, tmp_path
):
    unpack = f"""
import sys; sys.path.insert(0, {str(shared / "data")!r})
import numpy as np, unpack
labels = np.load(unpack.HERE / "cifar10" / "labels.npz")
x, y = unpack.tiles(unpack.HERE / "cifar10" / "test.webp"), labels["test"]
np.savez("train.npz", x=x[:400], y=y[:400])
np.savez("test.npz", x=x[400:440], y=y[400:440])
"""
    subprocess.run([sys.executable, "-c", unpack], cwd=tmp_path, check=True, timeout=120)
    assert np.load(tmp_path / "train.npz")["x"].shape == (400, 32, 32, 3)
    data = f"npz:{tmp_path / 'train.npz'},{tmp_path / 'test.npz'}"
    workdir = tmp_path / "run"
    said = executed(
        "larger_set.ipynb", 240, LIPJAX_NOTEBOOK_DATA=data, LIPJAX_NOTEBOOK_WORKDIR=str(workdir)
    )
    assert "continuing after epoch 1" in said
    assert "certified" in said and "confirmed" in said.lower()
    assert (workdir / "certification" / "certificate.npz").is_file()
