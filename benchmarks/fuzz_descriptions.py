"""Descriptions of networks changed at random, and what such a network computes, in NumPy.

Part of `benchmarks.fuzz`. Values are computed from the description alone, with none of the code of
the checker or of the tool.
"""

import copy
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special  # type: ignore[import-untyped]

from lipjax.formats import certificate_files

Described = list[dict[str, Any]]
OTHERS = (
    *("leaky", "sort", "max_pool", "abs", "clip", "elu"),
    *("tanh", "gelu", "silu", "softplus", "sigmoid"),
)
# Entries of a value, times those of a window.
LARGEST = 1000


def varied(seed: int = 3) -> Described:
    """Two inputs, three classes: scales and shifts joined with what is in front, a sum of two ways,
    a leaky ReLU, sorted groups, pooling in windows that overlap, a smooth function."""
    rng = np.random.default_rng(seed)

    def weights(*shape):
        return (rng.normal(size=shape) / math.sqrt(shape[0])).astype(np.float32)

    first, second, third, head = weights(2, 8), weights(8, 8), weights(6, 6), weights(6, 3)
    center, gain, shift = weights(8), 1 + np.abs(weights(8)), weights(8)

    def f(x):
        h = (x @ first - center) * gain + shift
        h = h + jax.nn.leaky_relu(h, 0.2)
        h = jnp.sort((h @ second + shift).reshape(2, 4), axis=1)
        h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2), (1, 1), "VALID")
        return jnp.tanh(2 * (h.reshape(6) @ third)) @ head

    return certificate_files.describe(f, np.zeros(2, np.float32))


# ------------------------------------------------------------------------------ what it computes


def logits(described: Sequence[Mapping[str, Any]], points: np.ndarray) -> np.ndarray:
    """``(points, classes)``, computed in the type of the points; an error of any kind where the
    description makes no sense."""
    values: list[np.ndarray] = []
    for node in described:
        if node["kind"] == "input":
            value = points
        else:
            if math.prod([*node["shape"], *node.get("window", ())]) > LARGEST:
                raise ValueError("more than this computes")
            value = COMPUTE[node["kind"]](node, *(values[i] for i in node["inputs"]))
        values.append(value.reshape(len(points), *node["shape"]).astype(points.dtype))
    return values[-1]


def _affine(node, value):
    if node["bias"] is None:
        return value
    return value.reshape(len(value), *node["shape"]) + node["bias"].astype(value.dtype)


def _product(node, x):
    kernel = node["kernel"].astype(x.dtype)
    letters = iter("abcdefghijklmnopqrstuvwxy")
    x_axes = [next(letters) for _ in x.shape[1:]]
    kernel_axes = [next(letters) for _ in kernel.shape]
    sides = (kernel_axes, x_axes) if node["kernel_first"] else (x_axes, kernel_axes)
    contracted, shared = node["numbers"]
    for pairs in (contracted, shared):
        for one, other in zip(*pairs, strict=True):
            sides[1][other] = sides[0][one]
    summed = {sides[0][axis] for axis in contracted[0]}
    front = [sides[0][axis] for axis in shared[0]]
    free = [axis for side in sides for axis in side if axis not in summed and axis not in front]
    subscripts = f"z{''.join(x_axes)},{''.join(kernel_axes)}->z{''.join(front + free)}"
    return _affine(node, np.einsum(subscripts, x, kernel))


def _add(node, *taken):
    total = sum(sign * value for sign, value in zip(node["signs"], taken, strict=True))
    return total if node["constant"] is None else total + node["constant"].astype(total.dtype)


def _move(node, *taken):
    flat = np.concatenate([value.reshape(len(value), -1) for value in taken], axis=1)
    index = node["index"].reshape(-1)
    found = flat[:, index]
    found[:, index < 0] = node["fill"]
    return found


def _ends(node):
    bottom = -np.inf if node["bottom"] is None else node["bottom"].astype(np.float64)
    top = np.inf if node["top"] is None else node["top"].astype(np.float64)
    return bottom, top


def _clip(node, x):
    bottom, top = _ends(node)
    return np.minimum(np.maximum(x, bottom), top)


def _maxmin(node, x):
    a, b = np.split(x, 2, axis=-1)
    bottom, top = _ends(node)
    parts = np.minimum(np.maximum(a, b), top), np.maximum(np.minimum(a, b), bottom)
    return np.concatenate(parts, axis=-1)


def _max_pool(node, x):
    shape, found = x.shape[1:], np.full((len(x), *node["shape"]), -np.inf)
    for place in np.ndindex(*node["shape"]):
        for tap in itertools.product(*map(range, node["window"])):
            starts = zip(
                place, node["strides"], tap, node["dilation"], node["padding"], strict=True
            )
            at = tuple(p * stride + t * apart - pad[0] for p, stride, t, apart, pad in starts)
            if all(0 <= k < n for k, n in zip(at, shape, strict=True)):
                found[(slice(None), *place)] = np.maximum(
                    found[(slice(None), *place)], x[(slice(None), *at)]
                )
    return found


COMPUTE = {
    "product": _product,
    "scale": lambda node, x: _affine(node, x * node["kernel"].astype(x.dtype)),
    "add": _add,
    "move": _move,
    "clip": _clip,
    "maxmin": _maxmin,
    "max_pool": _max_pool,
    "abs": lambda node, x: np.abs(x),
    "sort": lambda node, x: np.sort(x, axis=1 + node["axis"]),
    "leaky": lambda node, x: (
        x * np.where(x < 0, node["below"].astype(x.dtype), node["above"].astype(x.dtype))
    ),
    "sigmoid": lambda node, x: scipy.special.expit(x),
    "tanh": lambda node, x: np.tanh(x),
    "softplus": lambda node, x: np.logaddexp(0, x),
    "gelu": lambda node, x: x * scipy.special.ndtr(x),
    "silu": lambda node, x: x * scipy.special.expit(x),
    "elu": lambda node, x: np.where(x > 0, x, node["alpha"].astype(x.dtype) * np.expm1(x)),
}

# ------------------------------------------------------------------------------------ its changes


def changed(described: Described, dice: random.Random) -> Described:
    """The same description with one change or a few."""
    found = copy.deepcopy(described)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        if len(found) > 1:
            dice.choice((_change_field,) * 4 + (_insert,) * 4 + (_remove, _exchange))(found, dice)
    return found


def _change_field(described, dice):
    node = dice.choice(described[1:])
    fields = sorted(node)
    if dice.random() < 0.6:  # what most likely makes a network of it again
        kept = [name for name in fields if isinstance(node[name], np.ndarray | bool)]
        fields = kept or fields
    field = dice.choice(fields)
    if dice.random() < 0.05:
        node.pop(field)
        return
    node[field] = _other(node[field], dice)


def _other(value, dice):
    if isinstance(value, np.ndarray):
        return _other_array(value, dice)
    if isinstance(value, list) and value:
        at, found = dice.randrange(len(value)), list(value)
        match dice.randrange(5):
            case 0:
                del found[at]
            case 1:
                found.insert(at, copy.deepcopy(found[at]))
            case _:
                found[at] = _other(found[at], dice)
        return found
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return dice.choice((value + 1, value - 1, 0, -value, 2**20, 2**31, 2**62, True, 1.0))
    if isinstance(value, float):
        return dice.choice((value + 1, 0.0, 1.0, 50.0, 1e9, -1.0, 1))
    words = ("mul", "add", "dot_general", "float32", "float64", "bfloat16", "float16", *COMPUTE)
    some = np.array(0.5, np.float32)
    return dice.choice((*words, "HIGHEST", None, some, [], {}, 0, "x" * 100, [[[1]]]))


def _other_array(value, dice):
    found = value.copy()
    if dice.random() < 0.15:
        types = ("float64", "float16", "int32", jnp.bfloat16, "bool")
        shaped = (found.reshape(-1), found[None], found[:0] if found.ndim else found, found.T)
        return dice.choice((*shaped, found.astype(dice.choice(types)), None))
    where = (
        (...,)
        if dice.random() < 0.5 or not found.size
        else np.unravel_index(dice.randrange(found.size), found.shape)
    )
    if found.dtype.kind == "i":
        found[where] = dice.choice((0, 1, -1, -2, found.size, 2**40))
        return found
    factors = (0.0, -1.0, 0.5, 2.0, 1 + 2.0**-20, 2.0**-100, 2.0**-127, 2.0**60, 2.0**120, math.nan)
    with np.errstate(all="ignore"):
        found[where] = found[where] * found.dtype.type(dice.choice(factors))
    return found


def _shifted(described, start: int, by: int):
    """Positions behind `start` counted anew."""
    for node in described:
        if isinstance(node.get("inputs"), list):
            node["inputs"] = [i + by if type(i) is int and i > start else i for i in node["inputs"]]


def _insert(described, dice):
    """A node behind another one, between it and those that read it."""
    joined = dice.random() < 0.5
    maps = [i for i, node in enumerate(described) if node.get("kind") in ("product", "scale")]
    at = dice.choice(maps) if joined and maps else dice.randrange(1, len(described))
    before = described[at]
    shape = before.get("shape")
    if not isinstance(shape, list) or not shape:
        return
    number = np.array(
        dice.choice((1.0, 1.0, 0.5, -0.25, 3.0, 1e-6, 1e6, 2.0**-127, 2.0**100)), np.float32
    )
    kind = dice.choice(("scale", "add") if joined else ("scale", *OTHERS))
    ones = [1] * len(shape)
    own: dict[str, Any] = {
        "scale": {"kernel": number, "bias": None, "joined": joined},
        "add": {"signs": [1], "constant": number, "joined": joined},
        "leaky": {"below": number, "above": np.array(1, np.float32)},
        "sort": {"axis": dice.randrange(len(shape))},
        "max_pool": {
            "window": [*ones[:-1], 3],
            "strides": ones,
            "dilation": ones,
            "padding": [*([0, 0] for _ in ones[:-1]), [1, 1]],
        },
        "clip": {"bottom": np.array(-1, np.float32), "top": number},
        "elu": {"alpha": number},
    }.get(kind, {})
    first = {"scale": "mul", "add": "add", "leaky": "mul"}.get(kind, kind)
    exact = kind in ("sort", "max_pool", "abs", "clip") or (kind == "scale" and number == 1)
    equation = [first, ["float32"], "float32", None, None]
    made = {
        "kind": kind,
        "inputs": [at],
        "shape": list(shape),
        "dtype": before.get("dtype"),
        "executed": [] if exact else [equation],
        "roundings": 0.0,
        **own,
    }
    _shifted(described, at - 1, 1)  # what read the node in front reads this one
    described.insert(at + 1, made)


def _remove(described, dice):
    at = dice.randrange(1, len(described))
    del described[at]
    if dice.random() < 0.8:
        _shifted(described, at - 1, -1)


def _exchange(described, dice):
    """Two nodes in each other's places."""
    at = dice.randrange(1, len(described))
    other = dice.randrange(1, len(described))
    described[at], described[other] = described[other], described[at]
    if dice.random() < 0.5:
        one, two = described[at], described[other]
        one["inputs"], two["inputs"] = two.get("inputs"), one.get("inputs")
