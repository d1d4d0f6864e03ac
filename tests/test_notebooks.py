"""The notebooks run from the first cell to the last; that of digits is kept with its outputs.

`PYTHONPATH=. python tests/test_notebooks.py` runs it as a reader would and stores what it shows.
"""

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
STORED = FOLDER / "digits.ipynb"
QUICK = {"LIPJAX_NOTEBOOK_QUICK": "1", "MPLBACKEND": "agg"}


def executed(name: str, timeout: int, **environment):
    """The notebook, run as a reader would, in its folder and with this interpreter."""
    nbclient = pytest.importorskip("nbclient", reason="notebooks are executed with nbclient")
    pytest.importorskip("ipykernel", reason="notebooks are executed by ipykernel")
    notebook = nbformat.read(FOLDER / name, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",  # of this interpreter
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute(env={**os.environ, **environment})
    return notebook


def printed(notebook) -> str:
    """What all cells wrote."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_valid_python(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            compile(cell.source, path.name, "exec")  # no magics: the code is Python


def test_the_notebook_of_digits_shows_what_it_showed_and_no_path():
    notebook = nbformat.read(STORED, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 4
    said = printed(notebook)
    assert "360 images" in said  # not the quick run of the tests
    assert "after 20 gradient steps" in said
    assert not re.search(r"(^|[\s'\"(])[/~]\w", said)  # of the machine that it ran on
    assert STORED.stat().st_size < 300_000


def test_the_larger_notebook_is_kept_without_outputs_as_it_says():
    notebook = nbformat.read(FOLDER / "larger_set.ipynb", as_version=4)
    assert "kept without outputs" in notebook.cells[0].source
    for cell in notebook.cells:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None


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
    said = printed(executed("digits.ipynb", timeout=240, **QUICK))
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
    places = {"LIPJAX_NOTEBOOK_DATA": data, "LIPJAX_NOTEBOOK_WORKDIR": str(workdir)}
    said = printed(executed("larger_set.ipynb", 240, **QUICK, **places))
    assert "continuing after epoch 1" in said
    assert "certified" in said and "confirmed" in said.lower()
    assert (workdir / "certification" / "certificate.npz").is_file()


if __name__ == "__main__":
    shown = executed(STORED.name, timeout=600)
    shown.metadata.language_info = {"name": "python"}
    for number, cell in enumerate(shown.cells):
        cell.id = f"cell-{number:02}"
        cell.metadata = {}  # times of each cell
    nbformat.write(shown, STORED)
