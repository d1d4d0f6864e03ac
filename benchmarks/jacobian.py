"""Lipschitz constants on the cells of a grid: how tight, and how long a cell takes.

    python -m benchmarks.jacobian --width=32 --cells=40

A random network of two hidden layers on the square [-1, 1]^2, cut into cells. For each cell the
largest Jacobian at sampled points is a lower bound; the table says how far above it each bound is,
for all outputs together (l2) and for single ones. Where torch and auto_LiRPA (with its Jacobian
bounds, 0.4 or later) can be imported its bounds are taken of the same cells, and the norms of the
entries' largest sizes; else that line is left out, and said to be.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

import lipjax


def network(width: int, seed: int):
    """Weights and shifts of ``2 -> width -> width -> 2``, float32."""
    rng = np.random.default_rng(seed)
    shapes = ((width, 2), (width, width), (2, width))
    weights = [rng.normal(0, 1.4 / np.sqrt(s[1]), s).astype(np.float32) for s in shapes]
    shifts = [rng.normal(0, 0.3, s[0]).astype(np.float32) for s in shapes]
    return weights, shifts


def function(weights, shifts):
    def f(x):
        for matrix, shift in zip(weights[:-1], shifts[:-1], strict=True):
            x = jax.nn.relu(matrix @ x + shift)
        return weights[-1] @ x + shifts[-1]

    return f


def sampled(f, centers, half, count: int):
    """The largest norms at random points of each cell: of the Jacobian, and of its rows."""
    rng = np.random.default_rng(1)
    points = centers[:, None] + rng.uniform(-half, half, (len(centers), count, 2))
    found = jax.jit(jax.vmap(jax.jacobian(f)))(points.reshape(-1, 2).astype(np.float32))
    found = np.asarray(found, np.float64).reshape(len(centers), count, 2, 2)
    return np.linalg.norm(found, 2, axis=(2, 3)).max(1), np.linalg.norm(found, axis=3).max(1)


def timed(run, repeats: int = 3):
    """The result and the shortest of some runs, the first left out: it compiles."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        found = run()
        seconds.append(time.perf_counter() - start)
    return found, min(seconds)


def by_lirpa(weights, shifts, centers, half):
    """auto_LiRPA's bounds of the Jacobian's entries; None where it is not installed."""
    try:
        import torch
        from auto_LiRPA import BoundedModule, BoundedTensor
        from auto_LiRPA.jacobian import JacobianOP
        from auto_LiRPA.perturbations import PerturbationLpNorm
    except ImportError:
        return None

    layers: list = []
    for matrix, shift in zip(weights, shifts, strict=True):
        layer = torch.nn.Linear(matrix.shape[1], matrix.shape[0])
        layer.weight.data, layer.bias.data = torch.tensor(matrix), torch.tensor(shift)
        layers += [layer, torch.nn.ReLU()]
    plain = torch.nn.Sequential(*layers[:-1])

    class Jacobian(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = plain

        def forward(self, x):
            return JacobianOP.apply(self.plain(x), x)

    bounded = BoundedModule(Jacobian(), torch.tensor(centers[:1]))
    ball = PerturbationLpNorm(norm=np.inf, eps=float(half))

    def one(center):
        x = BoundedTensor(torch.tensor(center[None]), ball)
        lower, upper = bounded.compute_jacobian_bounds(x)
        return torch.maximum(lower.abs(), upper.abs()).detach().numpy().reshape(2, 2)

    def run():  # one cell after the other: with many, its Jacobian is refused
        return np.stack([one(center) for center in centers])

    size, seconds = timed(run, 1)
    return np.linalg.norm(size, 2, axis=(1, 2)), np.linalg.norm(size, axis=2), seconds


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--cells", type=int, default=40, help="along each side")
    parser.add_argument("--samples", type=int, default=500, help="in each cell")
    parser.add_argument("--lirpa-cells", type=int, default=20, help="of them, for auto_LiRPA")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    weights, shifts = network(args.width, args.seed)
    f = function(weights, shifts)
    side = (np.arange(args.cells) + 0.5) / args.cells * 2 - 1
    centers = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2).astype(np.float32)
    half = 1 / args.cells
    together, each = sampled(f, centers, half, args.samples)
    print(f"{len(centers)} cells of half-width {half:g}, {args.width} neurons a layer")

    def line(name, lipschitz, per_output, seconds, cells=slice(None)):
        whole = lipschitz / together[cells]
        alone = per_output / each[cells]
        below = np.sum(whole < 1 - 1e-5) + np.sum(alone < 1 - 1e-5)
        print(
            f"{name:32} l2: median {np.median(whole):.3f}, worst {whole.max():.2f} times sampled; "
            f"one output: {np.median(alone):.3f}, {alone.max():.2f}; "
            f"{1e3 * seconds / len(whole):.3f} ms a cell; below a sample: {below}"
        )

    for mode in ("local", "linear", "rows"):

        @jax.jit
        @jax.vmap
        def estimated(x, mode=mode):
            found = lipjax.local_lipschitz(f, x, box=half, mode=mode)
            return found.lipschitz, found.per_output

        def run(estimated=estimated):
            return jax.device_get(estimated(jnp.asarray(centers)))

        (lipschitz, per_output), seconds = timed(run)
        line(f"estimate, {mode}", lipschitz, per_output, seconds)
    for tier in ("probabilistic", "deterministic"):

        def prove(tier=tier):
            return lipjax.certify_lipschitz(f, centers, box=half, mode="rows", tier=tier)

        proof, seconds = timed(prove, 1)
        line(f"proof, rows, {tier}", proof.lipschitz, proof.per_output, seconds)
    # It takes one cell at a time, so only a few, spread evenly, and the proof of the same beside.
    few = np.linspace(0, len(centers) - 1, args.lirpa_cells).astype(int)
    found = by_lirpa(weights, shifts, centers[few], half)
    if found is None:
        print("auto_LiRPA: not installed, left out")
    else:
        line("auto_LiRPA, on some cells", *found, few)
        line("proof, on the same", proof.lipschitz[few], proof.per_output[few], np.nan, few)


if __name__ == "__main__":
    main()
