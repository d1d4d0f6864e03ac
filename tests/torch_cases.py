"""Run by test_bridges.py in an interpreter that has PyTorch: networks of PyTorch, and what the bridge makes of them.

Prints one JSON object: for each case the largest difference of the logits as a share of the largest logit, or the error.
"""

import copy
import json
import sys

import numpy as np
import torch
from torch import nn

from lipjax import bridges


class ReLU_x(nn.Module):  # noqa: N801 - its name in the paper's code, by which the bridge knows it
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

    class ReLU_x(ReLU_x):  # noqa: N801
        def forward(self, x):
            return 2 * super().forward(x)


def settled(module):
    """In eval mode, statistics and scales of batch normalisation drawn at random, some scales negative."""
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(part.running_mean, 0, 0.5)
            nn.init.uniform_(part.running_var, 0.3, 2)
            if part.affine:
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias, 0, 0.5)
    return module.eval()


def random_stack(rng):
    """A random network on 6 to 9 pixels a side: convolutions, normalisations, poolings, activations, dense layers."""
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
                tuple(rng.integers(1, 4, 2).tolist()),
                stride=1 if same else int(rng.integers(1, 3)),
                padding="same" if same else int(rng.integers(0, 2)),
                dilation=1 if same else int(rng.integers(1, 3)),
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
        "padding mode 'reflect'": nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), *head),
        "training mode": nn.Sequential(conv, nn.BatchNorm2d(2), *head),
        "layer 0.1, Dropout, is in training mode": nn.Sequential(nn.Sequential(conv, nn.Dropout()), *head),
        "keeps no statistics": nn.Sequential(conv, nn.BatchNorm2d(2, track_running_stats=False).eval(), *head),
        "computes other logits": nn.Sequential(conv, lying, *head),
        "has hooks": nn.Sequential(hooked, *head),
        "float16": copy.deepcopy(nn.Sequential(conv, *head)).half(),
        "takes (height, width, 3), got (6, 6, 1)": nn.Sequential(nn.Conv2d(3, 2, 3), *head),
        "Flatten missing": nn.Sequential(conv, nn.Linear(6, 3)),
        "end in an affine layer": nn.Sequential(conv, *head, nn.ReLU()),
        "ceil_mode": nn.Sequential(conv, nn.AvgPool2d(2, ceil_mode=True), *head),
        "before the Flatten": nn.Sequential(conv, nn.Flatten(), ClampGroupSort((1, 36), 0.3, -0.3), head[1]),
        "thresholds of shape (1, 2, 6)": nn.Sequential(conv, ReLU_x((1, 2, 6), 0.3), *head),
        "expected a torch.nn.Sequential, got torch.nn.modules.linear.Linear": head[1],
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    differences = {}
    for seed in range(int(sys.argv[1])):
        module, shape = random_stack(np.random.default_rng(seed))
        differences[str(module)] = difference(module, shape)
    dense = settled(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)))
    differences["dense"] = difference(dense, (5,))
    differences["sequence"] = difference(nn.Sequential(nn.Linear(5, 3)), (5,))
    errors = {}
    for expected, module in refusals().items():
        try:
            bridges.from_torch(module, (6, 6, 1))
            errors[expected] = "nothing"
        except (TypeError, ValueError) as error:
            errors[expected] = str(error)
    print(json.dumps({"torch": torch.__version__, "differences": differences, "errors": errors}))
