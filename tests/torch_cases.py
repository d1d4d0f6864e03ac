"""Run by test_bridges.py in an interpreter that has PyTorch: networks of PyTorch, and what the
bridge makes of them.

``python torch_cases.py FOLDER GOLDEN COUNT`` writes to the folder: found.json, with the largest
difference of the logits, as a share of the largest logit, of so many random networks, and the
errors of networks that have to be refused; checkpoints of the paper's networks; and the networks of
the golden cases, if that folder is there, through the bridge and `lipjax.storage`.
"""

import copy
import json
import sys
from pathlib import Path

import jax
import numpy as np
import torch
from torch import nn

from lipjax import bridges, storage


class ReLU_x(nn.Module):
    def __init__(self, shape, init):
        super().__init__()
        self.threshold = nn.Parameter(torch.full(shape, init) + 0.1 * torch.randn(shape))

    def forward(self, x):
        return torch.clamp(torch.min(x, self.threshold), min=0.0)


class ClampGroupSort(nn.Module):
    def __init__(self, shape, top, bottom):
        super().__init__()
        self.min = nn.Parameter(torch.full(shape, bottom) + 0.1 * torch.randn(shape))
        self.max = nn.Parameter(torch.full(shape, top) + 0.1 * torch.randn(shape))

    def forward(self, x):
        a, b = x.split(x.size(1) // 2, 1)
        a, b = torch.min(torch.max(a, b), self.max), torch.max(torch.min(a, b), self.min)
        return torch.cat([a, b], dim=1)


class Flatten(nn.Module):
    def forward(self, x):
        return x.reshape(x.size()[0], -1)


class Liar:
    """Another class of the same name and parameter that computes something else."""

    class ReLU_x(ReLU_x):
        def forward(self, x):
            return 2 * super().forward(x)


def settled(module):
    """In eval mode, statistics and scales of batch normalisation drawn at random, some scales
    negative."""
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(part.running_mean, 0, 0.5)
            nn.init.uniform_(part.running_var, 0.3, 2)
            if part.affine:
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias, 0, 0.5)
    return module.eval()


def random_stack(rng):
    """A random network on 6 to 9 pixels a side: convolutions, normalisations, poolings,
    activations, dense layers."""
    side, channels = (int(rng.integers(6, 10)), int(rng.integers(6, 10))), int(rng.integers(1, 4))
    shape = (*side, channels)
    layers = [nn.BatchNorm2d(channels)] if rng.random() < 0.4 else []
    x = torch.zeros(1, channels, *side)

    def add(layer):
        nonlocal x
        layers.append(layer)
        x = settled(layer)(x)

    for _ in range(int(rng.integers(1, 3))):
        groups = int(rng.choice([1, 2])) if x.shape[1] % 2 == 0 else 1
        same = rng.random() < 0.3
        add(
            nn.Conv2d(
                x.shape[1],
                2 * int(rng.integers(1, 4)),
                tuple(
                    min(int(k), n) for k, n in zip(rng.integers(1, 4, 2), x.shape[2:], strict=True)
                ),
                stride=1 if same else int(rng.integers(1, 3)),
                padding="same" if same else int(rng.integers(0, 2)),
                dilation=2 if min(x.shape[2:]) > 5 and not same and rng.random() < 0.5 else 1,
                groups=groups,
                bias=bool(rng.random() < 0.7),
            )
        )
        if rng.random() < 0.4:
            add(nn.BatchNorm2d(x.shape[1], affine=bool(rng.random() < 0.8)))
        thresholds = tuple(x.shape[1:])
        activation = int(rng.integers(5))
        if activation == 0:
            add(ReLU_x((1, *thresholds), 0.3))
        elif activation == 1:
            add(ClampGroupSort((1, thresholds[0] // 2, *thresholds[1:]), 0.3, -0.3))
        else:
            add([nn.ReLU(), nn.ReLU6(), nn.Sequential(nn.ReLU(), nn.Dropout2d())][activation - 2])
        if rng.random() < 0.4:
            add(nn.BatchNorm2d(x.shape[1]))
        if min(x.shape[2:]) > 2 and rng.random() < 0.4:
            add(nn.AvgPool2d(2, stride=int(rng.integers(1, 3))))
    if rng.random() < 0.2:
        add(nn.AdaptiveAvgPool2d(1))
    add(Flatten() if rng.random() < 0.5 else nn.Flatten())
    if rng.random() < 0.5:
        add(nn.BatchNorm1d(x.shape[1]))
    if rng.random() < 0.5:
        add(nn.ReLU())
    add(nn.Linear(x.shape[1], 6))
    if rng.random() < 0.5:
        add(nn.BatchNorm1d(6))
    add([nn.ReLU(), ReLU_x((1, 6), 0.3), ClampGroupSort((1, 3), 0.3, -0.3)][int(rng.integers(3))])
    if rng.random() < 0.5:
        add(nn.BatchNorm1d(6))
    add(nn.Linear(6, 3, bias=bool(rng.random() < 0.8)))
    return settled(nn.Sequential(*layers)), shape


def difference(module, shape):
    network = bridges.from_torch(module, shape)
    images = np.random.default_rng(1).uniform(0, 1, (8, *shape)).astype(np.float32)
    given = np.moveaxis(images, -1, 1) if len(shape) == 3 else images
    with torch.no_grad():
        theirs = np.asarray(module(torch.tensor(given.tolist())).tolist())
    return float(np.max(np.abs(np.asarray(network(images)) - theirs)) / np.max(np.abs(theirs)))


def refusals():
    """Networks that are no networks of lipjax, each with what the message has to name."""
    head = [nn.Flatten(), nn.Linear(2 * 36, 3)]
    conv = nn.Conv2d(1, 2, 3, padding=1)
    lying = Liar.ReLU_x((1, 2, 6, 6), 0.3)
    hooked = nn.Conv2d(1, 2, 3, padding=1)
    hooked.register_forward_hook(lambda *_: None)
    return {
        "layer 1, GELU,": nn.Sequential(conv, nn.GELU(), *head),
        "padding mode 'reflect'": nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), *head
        ),
        "training mode": nn.Sequential(conv, nn.BatchNorm2d(2), *head),
        "layer 0.1, Dropout, is in training mode": nn.Sequential(
            nn.Sequential(conv, nn.Dropout()), *head
        ),
        "keeps no statistics": nn.Sequential(
            conv, nn.BatchNorm2d(2, track_running_stats=False).eval(), *head
        ),
        "computes other logits": nn.Sequential(conv, lying, *head),
        "has hooks": nn.Sequential(hooked, *head),
        "float16": copy.deepcopy(nn.Sequential(conv, *head)).half(),
        "takes (height, width, 3), got (6, 6, 1)": nn.Sequential(nn.Conv2d(3, 2, 3), *head),
        "Flatten missing": nn.Sequential(conv, nn.Linear(6, 3)),
        "ceil_mode": nn.Sequential(conv, nn.AvgPool2d(2, ceil_mode=True), *head),
        "before the Flatten": nn.Sequential(
            conv, nn.Flatten(), ClampGroupSort((1, 36), 0.3, -0.3), head[1]
        ),
        "thresholds of shape (1, 2, 6)": nn.Sequential(conv, ReLU_x((1, 2, 6), 0.3), *head),
        "expected a torch.nn.Sequential, got torch.nn.modules.linear.Linear": head[1],
    }


# The networks of the paper's code: (channels, kernel, stride, padding) of the convolutions, widths
# of the dense layers.
PUBLISHED = {
    "4C3F": ([(32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 4, 2, 1)], [512, 512, 10]),
    "6C2F": (
        [(32, 3, 1, 1), (32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 3, 1, 1), (64, 4, 2, 1)],
        [512, 10],
    ),
    "8C2F": (
        [
            (64, 3, 1, 1),
            (64, 3, 1, 1),
            (64, 4, 2, 0),
            (128, 3, 1, 1),
            (128, 3, 1, 1),
            (128, 4, 2, 0),
            (256, 3, 1, 1),
        ]
        + [(256, 4, 2, 0)],
        [256, 200],
    ),
}


def published(name, activation, shape):
    """A network of the paper's code as it builds it, an nn.Sequential, with random thresholds and
    biases."""
    convs, widths = PUBLISHED[name]
    x, layers = torch.zeros(1, shape[-1], *shape[:-1]), []

    def activate():
        size = tuple(x.shape[1:])
        if activation == "ReLU_x":
            return ReLU_x((1, *size), 1.0)
        return (
            nn.ReLU()
            if activation == "ReLU"
            else ClampGroupSort((1, size[0] // 2, *size[1:]), 0.2, -0.2)
        )

    for channels, kernel, stride, padding in convs:
        layers.append(nn.Conv2d(x.shape[1], channels, kernel, stride=stride, padding=padding))
        x = layers[-1](x)
        layers.append(activate())
    layers.append(Flatten())
    x = layers[-1](x)
    for i, width in enumerate(widths):
        layers.append(nn.Linear(x.shape[1], width))
        x = layers[-1](x)
        if i < len(widths) - 1:
            layers.append(activate())
    return nn.Sequential(*layers)


def write_published(folder):
    """Checkpoints as the paper's code saves them, with the logits of two images; one as
    nn.DataParallel names it."""
    cases = [
        ("4C3F", "ReLU_x", (28, 28, 1)),
        ("4C3F", "ReLU", (32, 32, 3)),
        ("6C2F", "ClampGroupSort", (32, 32, 3)),
    ]
    for name, activation, shape in [*cases, ("8C2F", "ReLU_x", (64, 64, 3))]:
        module = published(name, activation, shape)
        state = module.state_dict()
        if name == "8C2F":
            state = {f"module.{key}": value for key, value in state.items()}
        stem = folder / f"{name}-{activation}-{'x'.join(map(str, shape))}"
        torch.save({"state_dict": state, "err": torch.tensor(0.5), "epoch": 3}, f"{stem}.pth")
        images = np.random.default_rng(2).uniform(0, 1, (2, *shape)).astype(np.float32)
        with torch.no_grad():
            logits = module(torch.tensor(np.moveaxis(images, -1, 1).tolist()))
        np.savez(f"{stem}.npz", images=images, logits=np.asarray(logits.tolist()))


def write_odd(folder):
    """Tensors of all types, transposed, strided, sharing a storage, scalars, none; with their
    values in JSON."""
    base = torch.arange(24.0)
    odd = {
        "transposed": base.view(4, 6).t(),
        "slice": base[3:9],
        "block": base.view(4, 6)[1:3, 2:5],
        "channels_last": base.view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        "parameter": nn.Parameter(torch.ones(2, 2)),
        "none": torch.zeros(0, 3),
        "num_batches_tracked": torch.tensor(7),
        "scalar": torch.tensor(1.5),
        **{
            str(t)[6:]: base.to(t)
            for t in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8)
        },
        "bool": torch.tensor([True, False]),
    }
    torch.save(odd, folder / "odd.pth")
    values = {name: [str(tensor.dtype)[6:], tensor.tolist()] for name, tensor in odd.items()}
    (folder / "odd.json").write_text(json.dumps(values))
    torch.save(base.expand(5, 24), folder / "alone.pth")
    torch.save({"x": base.expand(5, 24)}, folder / "expanded.pth")
    torch.save(nn.Linear(2, 2), folder / "module.pth")
    torch.save(
        nn.Linear(2, 2).state_dict(), folder / "old.pth", _use_new_zipfile_serialization=False
    )


def golden_module(file):
    """The network of a golden case as a module of PyTorch, in float64."""
    layers = []

    def parameter(name):
        return nn.Parameter(torch.tensor(file[name].tolist(), dtype=torch.float64))

    for entry in json.loads(str(file["meta"]))["layers"]:
        i, kind = entry["i"], entry["type"]
        if kind == "Conv2d":
            geometry = {"stride": entry["stride"], "padding": entry["padding"]}
            layers.append(nn.Conv2d(entry["in"][0], entry["cout"], entry["kernel"], **geometry))
        elif kind == "Linear":
            layers.append(nn.Linear(*file[f"w{i}"].shape[::-1]))
        elif kind == "ReLU_x":
            layers.append(ReLU_x((1,), 0.0))
            layers[-1].threshold = parameter(f"thr{i}")
        elif kind == "ClampGroupSort":
            layers.append(ClampGroupSort((1,), 0.0, 0.0))
            layers[-1].max, layers[-1].min = parameter(f"max{i}"), parameter(f"min{i}")
        else:
            layers.append({"Flatten": Flatten, "ReLU": nn.ReLU}[kind]())
        if kind in ("Conv2d", "Linear"):
            layers[-1].weight, layers[-1].bias = parameter(f"w{i}"), parameter(f"b{i}")
    return nn.Sequential(*layers)


def write_golden(folder, golden):
    with jax.enable_x64(True):
        for path in sorted(golden.glob("*.npz")):
            shape = np.load(path)["x"].shape
            network = bridges.from_torch(golden_module(np.load(path)), (*shape[2:], shape[1]))
            storage.save(
                network, folder / f"{path.stem}.safetensors", input_shape=(*shape[2:], shape[1])
            )


def main(folder, golden, count):
    torch.manual_seed(0)
    differences = {}
    for seed in range(count):
        module, shape = random_stack(np.random.default_rng(seed))
        differences[str(module)] = difference(module, shape)
    dense = [
        nn.BatchNorm1d(5),
        nn.Linear(5, 4),
        nn.ReLU(),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Linear(4, 3),
    ]
    differences["dense"] = difference(settled(nn.Sequential(*dense)), (5,))
    errors = {}
    for expected, module in refusals().items():
        try:
            bridges.from_torch(module, (6, 6, 1))
            errors[expected] = "nothing"
        except (TypeError, ValueError) as error:
            errors[expected] = str(error)
    write_published(folder)
    write_odd(folder)
    write_golden(folder, golden)
    found = {"torch": torch.__version__, "differences": differences, "errors": errors}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
