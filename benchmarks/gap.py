"""How far each bound is from what an attack finds: of the Lipschitz constant around an image, and
of the margins.

    python -m benchmarks.gap --workdirs=runs/digits,runs/other [--examples=100] [--shares=0.1,0.3,1]

Of runs of train.py, on test images, at epsilon = each share of the run's epsilon.test. All norms
are *estimates* (power iteration, from below), so a ratio may be understated by what they lack; all
of the attack's values are lower bounds. Medians over the images:

- *Lipschitz, global / local*: bound from the input to the penultimate activation, over the largest
  norm of its Jacobian found in the ball by gradient ascent (`lower bound`). ("bcp" has the constant
  of "global", "linear" that of "local".)
- *linear part*: norm of P_0 (`lipjax.bounds.relaxed`, mode "local"), the network with every
  activation replaced by its mean slope, over the product of the layers' norms: no norm of products
  of layers, plus what the activations' errors add, is smaller.
- *margin, by bound*: how far the bound lets a rival gain on the label, over the largest gain found
  by projected gradient ascent from the center and random starts; mean over the rivals. 1 would be a
  bound that nothing can improve.
"""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import lipjax
from lipjax import bounds, training
from lipjax.graph.linear import LinearOperator
from lipjax.norms import power
from lipjax.training.checkpoints import Checkpoints, load_config

STEPS, STARTS, ITERATIONS = 40, 4, 60


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdirs", required=True, help="runs of train.py, separated by commas")
    parser.add_argument("--examples", type=int, default=100, help="test images of each")
    parser.add_argument("--shares", default="0.1,0.3,1", help="of the run's epsilon.test")
    parser.add_argument("--seed", type=int, default=0, help="of the attack's starts")
    options = parser.parse_args(arguments)
    head = ["run", "trained with", "ε", "lower bound"]
    head += (
        [f"Lipschitz, {mode}" for mode in ("global", "local")]
        + ["linear part"]
        + [f"margin, {mode}" for mode in bounds.MODES]
    )
    print(f"{options.examples} test images, estimates, seed {options.seed}\n")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for workdir in options.workdirs.split(","):
        config = ConfigDict(load_config(workdir))
        test = training.load_data(config).test
        with Checkpoints(workdir) as checkpoints:
            network, _ = training.selected_network(
                checkpoints, config, test.images.shape[1:], test.classes
            )
        images, labels = (
            test.unit_images(slice(0, options.examples)),
            test.labels[: options.examples],
        )
        for share in map(float, options.shares.split(",")):
            epsilon = share * config.epsilon.test
            row = gaps(network, images, labels, epsilon, jax.random.key(options.seed))
            cells = [
                workdir,
                config.bound.mode,
                f"{epsilon:.3g}",
                *(f"{value:.2f}" for value in row.values()),
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


def gaps(network, images, labels, epsilon: float, key) -> dict[str, float]:
    """Medians over the images, by column of the table."""
    keys = jax.random.split(key, len(labels))
    columns = {"lower bound": _lower_bounds(network, images, epsilon, keys)}
    found = _found_gains(network, images, labels, epsilon, keys)
    margins = {}
    for mode in bounds.MODES:
        lipschitz, gains, linear_part = _bounds(network, images, labels, epsilon, mode=mode)
        if mode == "local":
            product = {"linear part": linear_part / lipschitz}
        if mode in ("global", "local"):
            columns[f"Lipschitz, {mode}"] = lipschitz / columns["lower bound"]
        margins[f"margin, {mode}"] = np.sum(gains, axis=1) / np.sum(found, axis=1)
    return {
        name: float(np.median(values)) for name, values in (columns | product | margins).items()
    }


@functools.partial(jax.jit, static_argnames="mode")
def _bounds(network, images, labels, epsilon, *, mode):
    """Lipschitz bounds ``(N,)``, what each rival can gain on the label, ``(N, classes)``, and the
    norms of P_0, ``(N,)``."""

    def one(x, label):
        bound = lipjax.bound(network, x, epsilon, mode=mode, iterations=ITERATIONS)
        like = bound.penultimate.center
        reverse = bounds.margins.reverse_of(bound)
        # The map whose matrix is P_0^T; its norm is that of P_0.
        back = LinearOperator(lambda _, d: reverse.propagate(d)[0], jnp.ones(()))
        start = jax.random.normal(jax.random.key(0), like.shape)
        linear_part, _ = power.power_iteration(back, start, ITERATIONS)
        return bound.lipschitz, lipjax.worst_logits(bound, label) - bound.logits, linear_part

    return jax.vmap(one)(images, labels)


def _on_ball(step, epsilon):
    return step * jnp.minimum(1.0, epsilon / jnp.maximum(jnp.linalg.norm(step), 1e-30))


def _ascend(objective, x, key, epsilon, starts: int):
    """The largest value of `objective` met by projected ascent from x and from random points of the
    ball."""
    noise = jax.random.normal(key, (starts, *x.shape)).at[0].set(0)

    def climb(start):
        def step(_, carry):
            offset, best = carry
            value, slope = jax.value_and_grad(objective)(x + offset)
            slope = slope / jnp.maximum(jnp.linalg.norm(slope), 1e-30)
            return _on_ball(offset + epsilon / 4 * slope, epsilon), jnp.maximum(best, value)

        offset, best = jax.lax.fori_loop(0, STEPS, step, (_on_ball(start, epsilon), -jnp.inf))
        return jnp.maximum(best, objective(x + offset))

    return jnp.max(jax.vmap(climb)(noise * epsilon))


@jax.jit
def _found_gains(network, images, labels, epsilon, keys):
    """The largest gain of each rival on the label that ascent finds; ``(N, classes)``, 0 for the
    label."""

    def one(arguments):
        x, label, key = arguments
        clean = network(x)

        def gain(rival):
            lead = clean[rival] - clean[label]
            found = (
                _ascend(lambda z: network(z)[rival] - network(z)[label], x, key, epsilon, STARTS)
                - lead
            )
            return jnp.where(rival == label, 0.0, jnp.maximum(found, 0.0))

        return jax.vmap(gain)(jnp.arange(len(clean)))

    return jax.lax.map(one, (images, labels, keys))


@jax.jit
def _lower_bounds(network, images, epsilon, keys):
    """The largest ``||J(x')||`` met in the ball, J the Jacobian of the penultimate activation;
    ``(N,)``."""
    graph = bounds.graph_of(network, images[0])
    features = dataclasses.replace(graph, nodes=graph.nodes[:-1])

    def one(arguments):
        x, key = arguments

        def norm(z):  # by power iteration; its vectors held fixed, as everywhere
            def turn(_, u):
                v = jax.jvp(features, (z,), (u,))[1]
                w = jax.vjp(features, z)[1](v)[0]
                return w / jnp.maximum(jnp.linalg.norm(w), 1e-30)

            u = jax.lax.stop_gradient(
                jax.lax.fori_loop(0, 10, turn, jax.random.normal(key, x.shape))
            )
            return jnp.linalg.norm(jax.jvp(features, (z,), (u / jnp.linalg.norm(u),))[1])

        # The slope of a piecewise linear function is constant between its kinks: ascent sees
        # nothing there, chance does.
        places = jax.random.normal(key, (4 * STARTS, *x.shape))
        return jnp.maximum(
            _ascend(norm, x, key, epsilon, 1),
            jnp.max(jax.vmap(lambda s: norm(x + _on_ball(epsilon * s, epsilon)))(places)),
        )

    return jax.lax.map(one, (images, keys))


if __name__ == "__main__":
    main()
