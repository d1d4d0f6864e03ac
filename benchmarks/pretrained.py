"""Makes the files of a network that comes with lipjax from a run:
`lipjax/pretrained/NAME.safetensors`, .json and .html.

    python train.py --config=digits --workdir=runs/digits && python certify.py --workdir=runs/digits
    python -m benchmarks.pretrained digits-maxmin --workdir=runs/digits

The card takes its figures from the summaries of the run's certifications, and the page from the
first of them: the run's `certification`, or the folders given by --certifications (move that folder
    away before certifying at another radius).
"""

import argparse
import json
import shutil
from pathlib import Path

import jax
import numpy as np

from lipjax import pretrained, storage
from lipjax.cli import networks

FACTS = (
    "tier",
    "failure_probability",
    "arithmetic",
    "epsilon",
    "split",
    "examples",
    "seed",
    "pgd_steps",
    "pgd_restarts",
    "command",
)


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the network")
    parser.add_argument("--workdir", type=Path, required=True, help="a certified run of train.py")
    parser.add_argument("--command", required=True, help="the command of its training")
    parser.add_argument(
        "--certifications", nargs="*", type=Path, help="folders; default: that of the run"
    )
    options = parser.parse_args()

    run = networks.of_run(options.workdir)
    # where they were says nothing elsewhere
    run.config["data"] |= {"data_dir": "", "manual_dir": ""}
    shape = run.test.images.shape[1:]
    certifications = options.certifications or [options.workdir / "certification"]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in certifications]
    folder = Path(pretrained.__file__).parent
    path = folder / f"{options.name}.safetensors"
    storage.save(run.network, path, input_shape=shape, notes=networks.notes(run))
    card = {
        "name": options.name,
        "data": run.test.name,
        "input_shape": list(shape),
        "classes": run.test.classes,
        "parameters": sum(int(np.size(leaf)) for leaf in jax.tree.leaves(run.network)),
        "command": options.command,
        "seed": run.facts["training_seed"],
        "epoch": run.facts["epoch"],
        "versions": summaries[0]["run"]["versions"],
        "sha256": pretrained.sha256(path),
        "results": [
            {name: summary["run"][name] for name in FACTS}
            | {
                "clean_accuracy": summary["clean_accuracy"],
                "pgd_accuracy": summary["pgd_accuracy"],
                "certified_accuracy": {
                    mode: row["certified_accuracy"] for mode, row in summary["modes"].items()
                },
            }
            for summary in summaries
        ],
    }
    (folder / f"{options.name}.json").write_text(json.dumps(card, indent=2) + "\n")
    shutil.copyfile(certifications[0] / "report.html", folder / f"{options.name}.html")
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
