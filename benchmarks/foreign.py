"""Networks and images that others published, certified in several modes, beside published figures.

    python -m benchmarks.foreign                      # all networks, 200 images
    python -m benchmarks.foreign --networks=mnist_mlp --images=50 --modes=local,tight,auto
    python -m benchmarks.foreign --networks=digits-maxmin,mnist-maxmin      # that come with lipjax

It wants the files of SDP-CROWN's table (Chiu et al., ICML 2025, arXiv 2506.06665), and networks of
VNN-COMP 2021, in ``../shared/external`` beside the checkout, and says so where they are absent. For
each network, radius and mode: how many of all images are certified, the tier and its failure
probability, milliseconds an image (of the second call, which compiles nothing), and the seconds by
which the first call took longer. A mode is a name, or "tight:N" or "auto:N" with N gradient steps,
and "auto" has a time limit with --seconds_per_image. Of modes with several stages there is a line
for each stage: on how many images it was tried, how many it certified, how many rows at most it
carries back for an image (a gradient counts as two more), and its milliseconds an image.
An attack (`lipjax.attacks.pgd`) gives the other side; an image that is certified and broken would
end the program.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lipjax
from lipjax.bridges.torch_files import state_dict
from lipjax.cli import networks

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "external"
# The mean of CIFAR-10 that those networks subtract; what is left is divided by 0.225.
MEAN = np.array([125.3, 123.0, 113.9]) / 255
DEVIATION = 0.225

# What the ResNet of VNN-COMP 2021 takes instead.
RESNET_MEAN = np.array([0.4914, 0.4822, 0.4465])
RESNET_DEVIATION = np.array([0.2471, 0.2435, 0.2616])

# By network: its images, radii, tier, and the modes that are affordable there. (For the networks of
# VNN-COMP, which asks for l-infinity, there is no published l2 radius.)
MODES = ("global", "local", "linear", "tight", "tight:10", "auto", "auto:100")
CHEAP = ("global", "bcp", "paper", "local", "linear", "tight", "auto:10")
SUBJECTS = {
    "mnist_mlp": ("mnist", (1.0,), "deterministic", (*MODES, "rows")),
    "mnist_convsmall": ("mnist", (0.3,), "probabilistic", MODES),
    "cifar10_cnn_a": ("cifar", (24 / 255,), "probabilistic", MODES),
    "mnist_6_100_nat": ("mnist", (0.05, 0.1, 0.15), "deterministic", (*MODES, "rows")),
    "resnet_2b.onnx": ("cifar", (2 / 255, 8 / 255), "probabilistic", CHEAP),
    "resnet2b": ("cifar", (8 / 255,), "probabilistic", ("local", "tight")),
    "cifar10_small.onnx": ("cifar", (2 / 255, 8 / 255), "probabilistic", CHEAP),
}

# Networks that were trained with lipjax's bounds, and their data.
OWN = {
    "digits-maxmin": ("digits", (0.3, 0.5, 0.8), "deterministic", ("global", "local", "tight")),
    "mnist-maxmin": ("mnist", (1.0, 1.58, 2.0), "probabilistic", ("global", "local", "tight")),
}


def network_of(name: str) -> Callable:
    """The function of one image in [0, 1], its normalisation included."""
    if name == "cifar10_small.onnx":
        return lipjax.bridges.from_onnx(FOLDER / name)
    if name.startswith("resnet"):
        inner = lipjax.bridges.from_onnx(FOLDER / name) if name.endswith("onnx") else resnet(name)
        return lambda x: inner(
            (x - jnp.asarray(RESNET_MEAN, x.dtype)) / jnp.asarray(RESNET_DEVIATION, x.dtype)
        )
    found = state_dict(FOLDER / f"{name}.pth")
    kernels = [key for key in found if key.endswith("weight")]
    layers = [
        (jnp.asarray(found[key]), jnp.asarray(found[key.removesuffix("weight") + "bias"]))
        for key in kernels
    ]
    normalised = name.startswith("cifar10")

    def network(x):
        h = x
        if normalised:
            h = (h - jnp.asarray(MEAN, x.dtype)) / jnp.asarray(DEVIATION, x.dtype)
        for i, (kernel, bias) in enumerate(layers):
            kernel = kernel.astype(x.dtype)
            if kernel.ndim == 4:  # stride 2, padding 1; PyTorch has the kernel's axes the other way
                h = jax.lax.conv_general_dilated(
                    h[None],
                    jnp.transpose(kernel, (2, 3, 1, 0)),
                    (2, 2),
                    [(1, 1), (1, 1)],
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                )[0]
            else:
                if h.ndim == 3:
                    h = jnp.transpose(h, (2, 0, 1)).reshape(-1)
                h = h @ kernel.T
            h = h + bias.astype(x.dtype)
            if i < len(layers) - 1:
                h = jax.nn.relu(h)
        return h

    return network


def resnet(name: str) -> Callable:
    """Two residual blocks, the first with a convolution as its shortcut, from a state_dict."""
    found = {key: jnp.asarray(value) for key, value in state_dict(FOLDER / f"{name}.pth").items()}

    def convolution(x, layer: str, stride: int = 1):
        kernel = found[f"{layer}.weight"].astype(x.dtype)
        pads = [(kernel.shape[-1] // 2,) * 2] * 2
        taps = jnp.transpose(kernel, (2, 3, 1, 0))
        axes = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x[None], taps, (stride,) * 2, pads, dimension_numbers=axes)
        return y[0] + found[f"{layer}.bias"].astype(x.dtype)

    def dense(x, layer: str):
        return found[f"{layer}.weight"].astype(x.dtype) @ x + found[f"{layer}.bias"].astype(x.dtype)

    def block(x, layer: str, stride: int):
        inner = jax.nn.relu(convolution(x, f"{layer}.conv1", stride))
        beside = convolution(x, f"{layer}.shortcut.0", stride) if stride > 1 else x
        return jax.nn.relu(convolution(inner, f"{layer}.conv2") + beside)

    def network(x):
        h = jax.nn.relu(convolution(x, "conv1", 2))
        h = block(block(h, "layer1.0", 2), "layer1.1", 1)
        h = jnp.transpose(h, (2, 0, 1)).reshape(-1)  # channels first, as PyTorch flattens them
        return dense(jax.nn.relu(dense(h, "linear1")), "linear2")

    return network


def images_of(name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of the table, floats in [0, 1], and their labels."""
    with np.load(FOLDER / f"{name}_200.npz") as file:
        arrays = [file[key] for key in file.files]
    (images,) = (array for array in arrays if array.ndim == 4)
    (labels,) = (array for array in arrays if array.ndim == 1)
    return images[:count].astype(np.float32) / np.float32(255), labels[:count].astype(np.int32)


def timed(certify, count: int, again: int) -> tuple:
    """What it returns of so many images, and what of the `again` first ones in a second call, which
    compiles nothing; and seconds: an image, by the second call, and what the first took longer."""
    start = time.perf_counter()
    found = certify(count)
    first = time.perf_counter() - start
    start = time.perf_counter()
    second = certify(again)
    each = (time.perf_counter() - start) / again
    return found, second, each, max(first - each * count, 0.0)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default=",".join(SUBJECTS))
    parser.add_argument("--modes", help="default: all that are affordable for the network")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--epsilons", help="default: those of the published table")
    parser.add_argument("--failure_probability", type=float, default=1e-6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds_per_image", type=float, help="of mode auto, as `lipjax.certify` has it; or inf"
    )
    parser.add_argument("--timed", type=int, default=0, help="images of the second call; 0: all")
    parser.add_argument("--attack_steps", type=int, default=50, help="0: no attack")
    options = parser.parse_args(arguments)
    if not FOLDER.is_dir():
        print(f"{FOLDER} is not here: the networks and images of others are not part of lipjax.")
        return

    for name in options.networks.split(","):
        data, epsilons, tier, modes = (SUBJECTS | OWN)[name]
        if options.modes:
            modes = tuple(options.modes.split(","))
        if options.epsilons:
            epsilons = tuple(float(text) for text in options.epsilons.split(","))
        for epsilon in epsilons:
            if name in OWN:
                opened = networks.of_network(name, data, examples=options.images)
                images = opened.test.unit_images(slice(None))
                subject = opened.network, images, opened.test.labels
            else:
                subject = network_of(name), *images_of(data, options.images)
            run(options, name, subject, epsilon, tier, modes)


def run(options, name: str, subject, epsilon: float, tier: str, modes) -> None:
    """Prints a line for each mode."""
    network, images, labels = subject
    broken = np.zeros(len(labels), bool)
    about = {"network": name, "epsilon": round(epsilon, 6), "images": len(labels)}
    if options.attack_steps:
        attacked = network if name in OWN else jax.tree_util.Partial(network)
        steps = {"steps": options.attack_steps, "restarts": 3, "key": jax.random.key(options.seed)}
        # Pixels outside [0, 1] too: the whole ball is what is certified.
        found = lipjax.attacks.pgd(attacked, images, labels, epsilon, clip=None, **steps)
        broken = found.broken
        print(json.dumps({**about, "survive PGD": int(np.sum(~broken))}), flush=True)

    for spec in modes:
        mode, _, steps = spec.partition(":")

        count = len(labels)
        again = min(options.timed or count, count)

        def certify(count, mode=mode, steps=steps, again=again):
            return lipjax.certify(
                network,
                images[:count],
                labels[:count],
                epsilon,
                tier=tier,
                failure_probability=options.failure_probability,
                mode=mode,
                # The same in both calls, so that the second compiles nothing.
                batch_size=min(64, again),
                seed=options.seed,
                steps=int(steps) if steps else None,
                seconds_per_image=options.seconds_per_image if mode == "auto" else None,
            )

        found, second, seconds, compilation = timed(certify, count, again)
        if np.any(found.certified & broken):
            raise AssertionError(f"{name}, {spec}: certified and broken, {about}")
        line = {
            **about,
            "mode": spec,
            "seconds_per_image": options.seconds_per_image if mode == "auto" else None,
            "certified": int(np.sum(found.certified)),
            "tier": found.tier,
            "delta": found.failure_probability,
            "ms_an_image": round(1000 * seconds, 2),
            "compilation_s": round(compilation, 1),
            "median_margin": round(float(np.median(found.margin[found.correct])), 4),
        }
        print(json.dumps(line), flush=True)
        for stage in second.stages:
            line = {
                "stage": stage.name,
                "images": len(stage.images),
                "certified": len(stage.certified),
                "passes_an_image": stage.passes,
                "ms_an_image": round(1000 * stage.seconds / len(stage.images), 2),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
