"""Other methods on the same nets, data and schedule: LMT, GloRo, BCP, orthogonal layers, and the
paper's own.

    python train.py --config=configs/baselines.py:gloro --workdir=runs/gloro
    python certify.py --workdir=runs/gloro
    python train.py --config=configs/baselines.py:bcp/cifar10_maxmin --workdir=runs/bcp_cifar10

The argument is a method of `METHODS` and, after a slash, the experiment whose other settings it
takes (digits by default). Each is the method's bound, loss and activation in this code, not its
authors' tuning: for comparisons on one footing. Measured on digits: benchmarks/README.md.
"""

import importlib
from pathlib import Path

# Tsuzuku et al. 2018; Leino et al. 2021, and with TRADES as in its code; Lee et al. 2020; Trockman
# and Kolter 2021 (dense layers; convolutions by Prach and Lampert 2022); Hu et al. 2023; Fazlyab et
# al. 2023; Prach and Lampert 2022 with the offset of Prach et al. 2024; Huang et al. 2021.
METHODS: dict[str, dict] = {
    "lmt": {"mode": "global", "loss": "lmt", "activation": "relu"},
    "gloro": {"mode": "global", "loss": "gloro", "activation": "maxmin"},
    "trades": {"mode": "global", "loss": "trades", "activation": "maxmin"},
    "bcp": {"mode": "bcp", "loss": "bcp", "activation": "relu"},
    "orthogonal": {"mode": "global", "loss": "gloro", "activation": "maxmin", "orthogonal": True},
    "emma": {"mode": "global", "loss": "emma", "activation": "maxmin"},
    "crm": {"mode": "global", "loss": "crm", "activation": "relu"},
    "offset": {"mode": "global", "loss": "offset", "activation": "maxmin", "orthogonal": True},
    "paper": {"mode": "paper", "loss": "bcp", "activation": "clipped_maxmin"},
}


def get_config(method: str = "gloro"):
    """The experiment's settings with the method's in their place; see the module's text for the
    argument."""
    method, _, experiment = method.partition("/")
    if method not in METHODS:
        raise ValueError(f"no method is called {method!r}; there are {', '.join(METHODS)}.")
    experiment = experiment or "digits"
    there = sorted(
        path.stem
        for path in Path(__file__).parent.glob("*.py")
        if path.stem not in ("__init__", "baselines")
    )
    if experiment not in there:
        raise ValueError(f"no experiment is called {experiment!r}; there are {', '.join(there)}.")
    config = importlib.import_module(f"lipjax.configs.{experiment}").get_config()
    settings = METHODS[method]
    config.bound.mode, config.bound.loss = settings["mode"], settings["loss"]
    config.model.activation = settings["activation"]
    config.model.orthogonal = settings.get("orthogonal", False)
    return config
