"""Draws the figures of docs/method.md, each from a computation, and those of docs/results.md from
its tables: python -m docs.figures (a minute on two CPU cores).

Writes docs/images/*.svg. The nets of two of them are trained on scikit-learn's digits in a
temporary folder.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from matplotlib.patches import Circle, Rectangle
from ml_collections import ConfigDict

import lipjax
from benchmarks.minutes import picture
from lipjax import norms, training
from lipjax.graph.linear import LinearOperator
from lipjax.training.checkpoints import Checkpoints, load_config

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
TRUE, BALL, BOX, MASK = "#00796b", "#1565c0", "#c62828", "#bdbdbd"


def main() -> None:
    matplotlib.use("svg")
    plt.rcParams.update(
        {
            "font.size": 10,
            "svg.hashsalt": "lipjax",
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    IMAGES.mkdir(exist_ok=True)
    minutes()
    region()
    margin()
    estimate_and_proof()
    with tempfile.TemporaryDirectory() as folder:
        masks(*trained(folder, "local", 0.55, "clipped_relu"))
        modes(*trained(folder, "global", 0.0, "relu"))


def save(figure, name: str) -> None:
    figure.savefig(IMAGES / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def minutes() -> None:
    """Certified accuracy against minutes of training."""
    facts = "test images, bound local, tier probabilistic, δ = 1e-6 a run, training seed 0"
    about = f"MNIST, ε = 1.58, 10,000 {facts}, executed in float64, one core"
    figure = picture(schedules("## MNIST"), about)
    save(figure, "mnist_minutes")
    about = f"CIFAR-10, ε = 36/255, 1,000 {facts}, executed in float64 (40: float32), two cores"
    figure = picture(schedules("### CIFAR-10 on two CPU cores"), about)
    save(figure, "cifar10_minutes")


def schedules(heading: str) -> list[tuple]:
    """The rows of the table of schedules below a heading of docs/results.md, as
    `benchmarks.minutes.picture` takes them."""
    text = (ROOT / "docs" / "results.md").read_text()
    below = text.partition(f"\n{heading}\n")[2]
    table = below.partition("| epochs | minutes | clean | PGD | certified |\n")[2]
    rows = table.partition("\n\n")[0].splitlines()[1:]
    cells = [[cell.split(",")[0].split("%")[0].strip() for cell in row.split("|")] for row in rows]
    return [(label, *map(float, values)) for _, label, *values, _ in cells]


def trained(folder: str, mode: str, epsilon: float, activation: str):
    """A 64-64-64-10 net trained on digits for 30 epochs, seed 0, and the test split."""
    workdir = Path(folder) / mode
    settings = [f"bound.mode={mode}", f"epsilon.train={epsilon}", f"model.activation={activation}"]
    settings += [
        "model.name=small_dense",
        "schedule.epochs=30",
        "schedule.ramp=12.0",
        "optimizer.decay_start=15.0",
    ]
    command = [
        sys.executable,
        "train.py",
        f"--workdir={workdir}",
        *(f"--config.{setting}" for setting in settings),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    config = ConfigDict(load_config(workdir))
    test = training.load_data(config).test
    with Checkpoints(workdir) as checkpoints:
        network, _ = training.selected_network(
            checkpoints, config, test.images.shape[1:], test.classes
        )
    return network, test.unit_images(slice(None)), test.labels


def region() -> None:
    """A ball of inputs, what a matrix and a clipped ReLU make of it, and what the walk knows of
    it."""
    rng = np.random.default_rng(0)
    x, epsilon = np.array([0.6, 0.5]), 0.3
    network = nnx.Sequential(
        nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
        lipjax.ClippedReLU((2,), threshold=0.0),
        nnx.Linear(2, 2, rngs=nnx.Rngs(1)),
    )
    network.layers[0].kernel[...] = jnp.array([[1.3, 0.4], [-0.9, 1.4]])
    network.layers[0].bias[...] = jnp.array([0.0, 0.3])
    network.layers[1].threshold[...] = jnp.array([0.7, 0.55])
    bound = lipjax.bound(network, jnp.asarray(x), epsilon, iterations=200)
    angle, length = rng.uniform(0, 2 * np.pi, 160), epsilon * np.sqrt(rng.uniform(0, 1, 160))
    length[:100] = epsilon
    points = x + length[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    clouds = [points, np.asarray(jax.vmap(network.layers[0])(points))]
    clouds.append(np.asarray(network.layers[1](jnp.asarray(clouds[1]))))
    whole = float(np.linalg.norm(np.asarray(network.layers[0].kernel[...]), 2)) * epsilon

    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
    titles = ["the ball of inputs", "after W: ball, box, and both", "after the clipped ReLU"]
    known = bound.regions[:3]
    for n, (axis, title, cloud, now) in enumerate(zip(axes, titles, clouds, known, strict=True)):
        axis.plot(*cloud.T, ".", color=TRUE, markersize=2.5)
        center, radius = np.asarray(now.center), whole if n == 1 else float(now.radius)
        axis.add_patch(Circle(center, radius, fill=False, color=BALL))
        low, high = np.asarray(now.lower), np.asarray(now.upper)
        if n:
            axis.add_patch(Rectangle(low, *(high - low), fill=False, color=BOX, linewidth=1.6))
        if n == 2:
            axis.add_patch(Circle(center, whole, fill=False, color=BALL, linestyle=":"))
            for line, threshold in zip((axis.axvline, axis.axhline), (0.7, 0.55), strict=True):
                line(threshold, color=MASK, linestyle="--", linewidth=1, zorder=0)
            axis.set_xlabel(f"radius {radius:.2f}, not {whole:.2f}: one neuron is constant")
        axis.plot(*center, "k+")
        axis.set(title=title, aspect="equal")
        axis.autoscale_view()
    save(figure, "region")


def margin() -> None:
    """The largest change of a margin over a ball, a box, and both."""
    d, radius, low, high = (
        np.array([1.0, 0.75]),
        1.0,
        np.array([-0.9, -0.75]),
        np.array([1.2, 0.35]),
    )
    zero, wide = jnp.zeros(2), jnp.full(2, 10.0)
    made = [
        lipjax.Region(zero, jnp.asarray(radius), -wide, wide),
        lipjax.Region(zero, jnp.asarray(10.0), jnp.asarray(low), jnp.asarray(high)),
        lipjax.Region(zero, jnp.asarray(radius), jnp.asarray(low), jnp.asarray(high)),
    ]
    found = [float(lipjax.bounds.ascent(jnp.asarray(d), one)) for one in made]
    at = [
        radius * d / np.linalg.norm(d),
        high,
        np.array([np.sqrt(radius**2 - high[1] ** 2), high[1]]),
    ]
    figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
    axis.add_patch(Circle((0, 0), radius, fill=False, color=BALL, label="ball"))
    axis.add_patch(Rectangle(low, *(high - low), fill=False, color=BOX, label="box"))
    for name, value, point, color in zip(
        ("ball alone", "box alone", "both"), found, at, (BALL, BOX, TRUE), strict=True
    ):
        assert abs(d @ point - value) < 1e-3, (name, d @ point, value)
        along = np.array([-d[1], d[0]]) / np.linalg.norm(d)
        axis.plot(*(point + np.outer([-0.5, 0.5], along)).T, "--", color=color, linewidth=1)
        axis.plot(*point, "o", color=color, label=f"max ⟨d, t⟩, {name}: {value:.2f}")
    axis.annotate("", xy=0.55 * d, xytext=(0, 0), arrowprops={"arrowstyle": "->"})
    axis.text(*(0.3 * d + [-0.02, 0.08]), "d")
    axis.set(aspect="equal", xlim=(-1.15, 1.6), ylim=(-1.1, 1.1))
    axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    save(figure, "margin")


def estimate_and_proof() -> None:
    """A norm that hides in one direction: power iteration from below, the Chebyshev bound from
    above."""
    size, norm = 3072, 2.0
    steps_power, steps_proof = (
        [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20],
        [5, 7, 10, 14, 20, 28, 40, 56, 80, 113, 160],
    )
    with jax.enable_x64(True):
        v = jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0], size) / np.sqrt(size))
        operator = LinearOperator(Hidden(), v, None)
        like = jnp.zeros(size)
        starts = jax.random.normal(jax.random.key(0), (20, size))
        below = [
            np.asarray(
                jax.vmap(lambda s, k=k: norms.power.power_iteration(operator, s, k)[0])(starts)
            )
            for k in steps_power
        ]
        above = [
            float(
                norms.chebyshev.probabilistic_norm_bound(
                    operator,
                    *norms.chebyshev.starts(jax.random.key(k), [size]),
                    1.002 * norm,
                    k,
                    1e-9,
                    like,
                )
            )
            for k in steps_proof
        ]
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axis.axhline(norm, color="k", linewidth=1, label="the norm")
    axis.plot(
        steps_proof,
        above,
        "o-",
        color=TRUE,
        markersize=4,
        label="Chebyshev bound: fails with probability ≤ 1e-9",
    )
    axis.plot(
        steps_power,
        np.mean(below, 1),
        "o-",
        color=BOX,
        markersize=4,
        label="power iteration: an estimate, from below",
    )
    axis.fill_between(steps_power, np.min(below, 1), np.max(below, 1), color=BOX, alpha=0.2)
    axis.set(xscale="log", xlabel="products with WᵀW", ylabel="‖W‖", ylim=(0.9, 4))
    axis.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axis.legend(frameon=False)
    save(figure, "estimate_and_proof")


class Hidden:
    """``x + v <v, x>`` for v of entries +-1/sqrt(n): norm 2, and a random start has hardly any
    weight on v."""

    def __call__(self, kernel, x):
        return x + kernel * jnp.sum(jax.lax.stop_gradient(kernel) * x)


def masks(network, images, labels) -> None:
    """A weight matrix around one image: rows and columns that cannot matter, and the norm without
    them."""
    epsilon, image = 0.5, 0
    bound = jax.jit(lambda x: lipjax.bound(network, x, epsilon, iterations=200))(images[image])
    weights = np.asarray(network.layers[3].kernel[...]).T  # Flatten, Linear, activation, Linear
    inputs, outputs = np.asarray(bound.regions[3].varies), np.asarray(bound.regions[5].varies)
    masked = weights * inputs * outputs[:, None]
    order_in, order_out = np.argsort(~inputs, kind="stable"), np.argsort(~outputs, kind="stable")
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
    reach = np.abs(weights).max()
    for axis, title, shown in (
        (axes[0], f"W: norm {np.linalg.norm(weights, 2):.2f}", weights),
        (
            axes[1],
            f"rows and columns that can matter: norm {np.linalg.norm(masked, 2):.2f}",
            masked,
        ),
    ):
        shown = shown[order_out][:, order_in]
        axis.imshow(shown, cmap="RdBu", vmin=-reach, vmax=reach)
        axis.set(title=title, xlabel="inputs of the layer", ylabel="its outputs")
        axis.spines[:].set_visible(True)
    grey = np.zeros((64, 64, 4))
    gone = ~(np.arange(64) < outputs.sum())[:, None] | ~(np.arange(64) < inputs.sum())[None]
    grey[gone] = (*matplotlib.colors.to_rgb(MASK), 1)
    axes[1].imshow(grey)
    save(figure, "masks")
    print(f"masks: {inputs.sum()} of 64 inputs and {outputs.sum()} of 64 outputs vary")


def modes(network, images, labels) -> None:
    """The six bounds of the largest change of a margin, over epsilon."""
    images, labels, radii = (
        jnp.asarray(images[:40]),
        jnp.asarray(labels[:40]),
        np.geomspace(0.005, 1, 13),
    )

    def gain(x, label, epsilon, mode):
        bound = lipjax.bound(network, x, epsilon, mode=mode, iterations=50)
        rise = lipjax.worst_logits(bound, label) - bound.logits
        return jnp.max(rise) / epsilon

    def slope(x, label):
        jacobian = jax.jacobian(network)(x).reshape(10, -1)
        return jnp.max(jnp.linalg.norm(jacobian - jacobian[label], axis=1))

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for mode in lipjax.bounds.MODES:
        each = jax.jit(jax.vmap(lambda x, y, e, mode=mode: gain(x, y, e, mode), (0, 0, None)))
        axis.plot(
            radii,
            [float(jnp.median(each(images, labels, radius))) for radius in radii],
            ".-",
            label=mode,
        )
    least = float(jnp.median(jax.vmap(slope)(images, labels)))
    axis.axhline(least, color="k", linestyle=":", label="gradient at the image")
    axis.set(xscale="log", xlabel="ε", ylabel="bound of a margin's change / ε", ylim=(0, None))
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, "modes")


if __name__ == "__main__":
    main()
