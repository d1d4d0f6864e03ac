"""Run by test_bridges.py in an interpreter that has PyTorch: networks of PyTorch, and what the
bridge makes of them.

``python torch_cases.py FOLDER GOLDEN COUNT`` writes to the folder: found.json, with the largest
difference of the logits, as a share of the largest logit, of so many random networks and of others
with a forward of their own, and the errors of networks that have to be refused; checkpoints of the
paper's networks; and the networks of the golden cases, if that folder is there, through the bridge
and `lipjax.storage`.
"""

import copy
import json
import sys
from pathlib import Path

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import lipjax
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
    """The largest one of the logits, as a share of the largest logit: of the network, and of its
    layers."""
    network = bridges.from_torch(module, shape)
    images = np.random.default_rng(1).uniform(0, 1, (8, *shape)).astype(np.float32)
    given = np.moveaxis(images, -1, 1) if len(shape) == 3 else images
    with torch.no_grad():
        theirs = np.asarray(module(torch.tensor(given.tolist())).tolist())
    try:
        made = [network, network.sequential()]
    except TypeError:
        made = [network]
    found = [np.max(np.abs(np.asarray(n(images)) - theirs)) for n in made]
    return [float(np.max(found) / np.max(np.abs(theirs))), len(made) == 2]


class Everything(nn.Module):
    """Branches, functional calls, a parametrisation and buffers: all that no Sequential has."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.shortcut = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))
        self.hidden = nn.utils.weight_norm(nn.Linear(4 * 8 * 8, 10))
        self.last = nn.Linear(10, 10)
        self.grow = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2)
        self.slopes = nn.PReLU(6)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.mean_pool = nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)

    def forward(self, x):
        x = (x - self.mean) / 0.2
        y = self.norm(F.relu(self.first(x))) + self.shortcut(x) * self.scale
        a, b = y.chunk(2, 1)
        y = torch.cat([torch.max(a, b), torch.min(a, b)], 1)
        z = F.adaptive_avg_pool2d(F.gelu(y), 4).sum(dim=(1, 2, 3))
        z = z + self.pool(F.leaky_relu(y)).mean((1, 2, 3)) + self.mean_pool(y)[:, 0].mean((1, 2))
        z = z + F.adaptive_avg_pool2d(self.slopes(self.grow(y)), (3, 5)).flatten(1).sum(1)
        h = self.hidden(F.dropout(y, training=self.training).view(x.size(0), -1))
        h = h + torch.zeros_like(h) + torch.clamp(h, 0, 1) + F.hardtanh(h) + F.relu6(h)
        h = h + F.softplus(h) + F.elu(h) + F.silu(h) + 2 * torch.sigmoid(h) - F.selu(h)
        h = 1 - h + F.hardswish(h) + F.mish(h) + F.celu(h, 0.7) + F.hardsigmoid(h)
        v = F.pad(F.pad(x, (1, 2, 0, 1)), (1, 1, 1, 1), mode="replicate")
        v = torch.stack([v[:, 0], v[:, 1].flip(1)], 1)[..., ::2, 1:-1].transpose(2, 3)
        v = v.permute(0, 3, 1, 2).mean((1, 2, 3))
        return F.log_softmax(self.last(h) + (z + v)[:, None], 1)


class Shortcut(nn.Module):
    """A residual block that writes into its own tensors, as torchvision's do."""

    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.ZeroPad2d((1, 0, 0, 1)), nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)
        )
        self.side = nn.Conv2d(3, 8, 1, 2)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Linear(8, 5)

    def forward(self, x):
        y = self.main(x)
        y += self.side(x)
        return self.last(F.adaptive_avg_pool2d(self.relu(y), 1).flatten(1))


def logits_of_everything():
    """The largest difference, as a share, of networks with a forward of their own."""
    found = {}
    hooked = nn.Sequential(nn.Flatten(), nn.Linear(8 * 8 * 3, 3))
    hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
    for module in (Everything(), Shortcut(), nn.DataParallel(Shortcut()), hooked):
        inner = settled(module.module if type(module) is nn.DataParallel else module)
        network = bridges.from_torch(module, (8, 8, 3))
        images = np.random.default_rng(1).uniform(0, 1, (4, 8, 8, 3)).astype(np.float32)
        with torch.no_grad():
            theirs = inner(torch.tensor(np.moveaxis(images, -1, 1).tolist()))
        theirs = np.asarray(theirs.tolist())
        ours = np.asarray(network(images))
        if network.left_out:
            ours = np.asarray(jax.nn.log_softmax(ours))
        name = f"{type(module).__name__} {len(found)}"
        found[name] = float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
    return found


def shortcut_graph():
    """How lipjax reads a residual block: the kinds of its nodes, and its parameters' names."""
    network = bridges.from_torch(settled(Shortcut()), (8, 8, 3))
    graph = lipjax.trace(network, np.zeros((8, 8, 3), np.float32))
    kinds = [type(node).__name__ for node in graph.nodes]
    weights = {name: type(weight).__name__ for name, weight in network.weights.items()}
    return {"kinds": kinds, "weights": weights, "places": [node.where for node in graph.nodes]}


class Asks(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] if x.sum() > 0 else -x.flatten(1)[:, :3]


class Draws(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] + torch.rand(3)


class Overwrites(nn.Module):
    def forward(self, x):
        y = x * 2
        y.view(-1).mul_(3.0)
        return y.flatten(1)[:, :3]


class Sorts(nn.Module):
    def forward(self, x):
        return torch.cumsum(x.flatten(1), 1)


class Pair(nn.Module):
    def forward(self, x):
        return x.flatten(1), x


def refusals():
    """Networks that are none of lipjax's, each with what the message has to name."""
    head = [nn.Flatten(), nn.Linear(2 * 36, 3)]
    conv = nn.Conv2d(1, 2, 3, padding=1)
    return {
        "cumsum at 'the input': is not known": Sorts(),
        "layer 1, BatchNorm2d, is in training mode": nn.Sequential(conv, nn.BatchNorm2d(2), *head),
        "layer 0.1, Dropout, is in training mode": nn.Sequential(
            nn.Sequential(conv, nn.Dropout()), *head
        ),
        "keeps no statistics": nn.Sequential(
            conv, nn.BatchNorm2d(2, track_running_stats=False).eval(), *head
        ),
        "parameter weight is float16": copy.deepcopy(nn.Sequential(conv, *head)).half(),
        "shape (6, 6, 1), for PyTorch (1, 1, 6, 6), does not go": nn.Sequential(
            nn.Conv2d(3, 2, 3), *head
        ),
        "a Flatten is missing": nn.Sequential(conv, nn.Linear(6, 3)),
        "asks for a value of the image": Asks(),
        "is random": Draws(),
        "changes a tensor in place": Overwrites(),
        "returns a list": Pair(),
        "expected a torch.nn.Module, got builtins.object": object(),
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
    listed = [{"module.x": base.to(torch.bfloat16)}]
    torch.save({"acc": torch.tensor(0.9), "state_dict": listed}, folder / "listed.pth")
    torch.save([{"x": base}, {"x": base}], folder / "several.pth")
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
            module = golden_module(np.load(path))
            network = bridges.from_torch(module, (*shape[2:], shape[1])).sequential()
            storage.save(
                network, folder / f"{path.stem}.safetensors", input_shape=(*shape[2:], shape[1])
            )


def main(folder, golden, count):
    torch.manual_seed(0)
    differences = {}
    for seed in range(count):
        module, shape = random_stack(np.random.default_rng(seed))
        differences[f"{seed} {module}"] = difference(module, shape)
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
    found = {
        "torch": torch.__version__,
        "differences": differences,
        "everything": logits_of_everything(),
        "shortcut": shortcut_graph(),
        "errors": errors,
    }
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
