"""Makes the files of a network that comes with lipjax from a run, or renews the figures of one
that is there: `lipjax/pretrained/NAME.safetensors`, .json and .html.

    python train.py --config=digits --workdir=runs/digits
    python certify.py --workdir=runs/digits
    python -m benchmarks.pretrained digits-maxmin --workdir=runs/digits \\
        --command='python train.py --config=digits --workdir=runs/digits'

    python -m benchmarks.pretrained cifar10-maxmin --file=narrow.safetensors --data=cifar10 \\
        --command='python train.py ...' --certifications runs/narrow

    lipjax certify --network=digits-maxmin --data=digits --epsilon=0.5 --workdir=runs/again
    python -m benchmarks.pretrained digits-maxmin --certifications runs/again/certification

The card takes its figures from the summaries of the certifications, and the page from the first of
them: the run's `certification`, or the folders given by --certifications. Without a run the network
stays as it is, to the byte.
"""

import argparse
import json
import shutil
from pathlib import Path

import jax
import numpy as np

from lipjax import pretrained, storage
from lipjax.cli import networks

FOLDER = Path(pretrained.__file__).parent
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
    parser.add_argument("--workdir", type=Path, help="a certified run of train.py")
    parser.add_argument("--file", type=Path, help="in its place a file of lipjax.save, certified")
    parser.add_argument("--data", help="with --file: the name of what it was trained on")
    parser.add_argument("--command", help="with either: the command of its training")
    parser.add_argument(
        "--certifications", nargs="*", type=Path, help="folders; default: that of the run"
    )
    options = parser.parse_args()
    new = options.workdir or options.file
    if (new is None) != (options.command is None):
        parser.error("--workdir or --file and --command go together.")
    if options.workdir is None and not options.certifications:
        parser.error("give --workdir, or the --certifications of the network that is there.")

    certifications = options.certifications or [options.workdir / "certification"]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in certifications]
    path = FOLDER / f"{options.name}.safetensors"
    if new is None:
        of_network = _known(options.name, [summary["run"] for summary in summaries])
    elif options.file:
        shutil.copyfile(options.file, path)
        of_network = _described(options.name, options.data, options.command, path)
    else:
        of_network = _stored(options.name, options.workdir, options.command, path)
    card = of_network | {
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
    (FOLDER / f"{options.name}.json").write_text(json.dumps(card, indent=2) + "\n")
    shutil.copyfile(certifications[0] / "report.html", FOLDER / f"{options.name}.html")
    print(f"{path}: {path.stat().st_size} bytes")


def _known(name: str, runs: list[dict]) -> dict:
    """What the card says of a network that is there.

    Raises:
        ValueError: certifications of another network.
    """
    others = {run["network"] for run in runs} - {name}
    if others:
        raise ValueError(f"certifications of {', '.join(sorted(others))}, expected {name}.")
    return pretrained.card(name)


def _described(name: str, data: str, command: str, path: Path) -> dict:
    """What a card says of a network that a file describes."""
    said = storage.description(path)
    network = storage.load(path)
    shape = said["input_shape"]
    return {
        "name": name,
        "data": data,
        "input_shape": list(shape),
        "classes": jax.eval_shape(network, jax.ShapeDtypeStruct(shape, np.float32)).shape[-1],
        "parameters": sum(int(np.size(leaf)) for leaf in jax.tree.leaves(network)),
        "command": command,
        "seed": said["notes"]["config"]["seed"],
        "epoch": said["notes"]["epoch"],
    }


def _stored(name: str, workdir: Path, command: str, path: Path) -> dict:
    """What a card says of the network of a run, which is written to the file."""
    run = networks.of_run(workdir)
    # where they were says nothing elsewhere
    run.config["data"] |= {"data_dir": "", "manual_dir": ""}
    shape = run.test.images.shape[1:]
    storage.save(run.network, path, input_shape=shape, notes=networks.notes(run))
    return {
        "name": name,
        "data": run.test.name,
        "input_shape": list(shape),
        "classes": run.test.classes,
        "parameters": sum(int(np.size(leaf)) for leaf in jax.tree.leaves(run.network)),
        "command": command,
        "seed": run.facts["training_seed"],
        "epoch": run.facts["epoch"],
    }


if __name__ == "__main__":
    main()
