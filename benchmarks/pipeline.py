"""Images a second that the input pipeline decodes, augments and delivers, beside what a training
step consumes.

    python -m benchmarks.pipeline [--records=<folder of python -m lipjax.data.records>]
                                  [--workers=0,1,2] [--rounds=5]

Without --records it makes synthetic 64x64 JPEGs in a temporary folder. One JSON line: medians over
the rounds, and the seconds until the first batch, which include the start of the workers.
"decoded": `Images` indexed in this process; "augmented": random resized crops and flips, in this
process; "delivered": both by `pipeline.batches`, from its first batch on, with nothing else to do.
Rounds go through all of them in turn.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from lipjax.data import pipeline, records, sets

# Seconds a training step of 8C2F takes on two CPU cores, TinyImageNet's shape: by batch size
# (benchmarks/README.md).
STEP = {64: 6.8, 128: 14.0}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=Path)
    parser.add_argument("--image_size", type=int, default=64, help="of the augmented images")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.records or synthetic(Path(temporary))
        plain, resized = (
            sets.load(f"records:{folder}", image_size=size).train
            for size in (None, options.image_size)
        )
        found = measure(plain, resized, options)
        shape, encoded = (
            plain.images.shape,
            sum(os.path.getsize(path) for path, *_ in plain.images.source.shards),
        )
    report = {
        "images": "synthetic" if options.records is None else options.records.name,
        "shape": shape[1:],
        "examples": shape[0],
        "bytes_an_image": round(encoded / len(plain.images.source)),
        "batch": options.batch,
        "steps": options.steps,
        "rounds": options.rounds,
        **{
            name: {key: round(statistics.median(values), 2) for key, values in rates.items()}
            for name, rates in found
        },
        "consumed": {
            f"batch {batch}": round(batch / seconds, 1) for batch, seconds in STEP.items()
        },
    }
    print(json.dumps(report), flush=True)


def measure(plain, resized, options):
    """``(name, {what: values of the rounds})``, images a second or seconds."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(plain.labels), (options.steps, options.batch))
    some = rows[: max(1, options.steps // 4)]
    own: dict[str, list[float]] = {"decoded": [], "augmented": []}
    rates: dict[str, list[float]] = {}
    first: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        began = time.perf_counter()
        for batch in some:
            plain.images[batch]
        own["decoded"].append(some.size / (time.perf_counter() - began))
        how = {"seed": 0, "first_step": 0}
        with pipeline.batches(resized, some, augment=True, read_ahead=0, **how) as batches:
            began = time.perf_counter()
            for _ in some:
                next(batches)
            own["augmented"].append(some.size / (time.perf_counter() - began))
        for workers in map(int, options.workers.split(",")):
            for what, dataset in (("decoded", plain), ("augmented", resized)):
                key = f"{what}, {workers} workers"
                began = time.perf_counter()
                with pipeline.batches(
                    dataset, rows, workers=workers, augment=dataset is resized, **how
                ) as batches:
                    next(batches)
                    first.setdefault(key, []).append(time.perf_counter() - began)
                    began = time.perf_counter()
                    for _ in range(options.steps - 1):
                        next(batches)
                    delivered = (options.steps - 1) * options.batch
                    rates.setdefault(key, []).append(delivered / (time.perf_counter() - began))
    return ("in_this_process", own), ("delivered", rates), ("seconds_to_the_first_batch", first)


def synthetic(folder: Path, examples: int = 4000) -> Path:
    """Records of smooth random 64x64 JPEGs of ten classes."""
    rng = np.random.default_rng(0)
    root = folder / "images"
    lines = []
    for i in range(examples + 20):
        name = f"{i}.JPEG"
        path = (
            root / "train" / f"c{i % 10}" / "images" / name
            if i < examples
            else root / "val" / "images" / name
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).save(
            path, format="JPEG", quality=75
        )
        if i >= examples:
            lines.append(f"{name}\tc{i % 10}\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    records.convert(root, folder / "records")
    return folder / "records"


if __name__ == "__main__":
    main()
