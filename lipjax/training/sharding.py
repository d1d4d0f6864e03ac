"""What lies where on the devices, and what travels between them.

There is one mesh axis, "data". A batch is split along it; parameters lie on every device, or large
ones split (`split_axis`). Everything that travels in a step is a sum over the devices, or the
gathering of split parameters.
"""

import math

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Parameters of fewer entries lie on every device whatever the configuration says.
SPLIT_ENTRIES = 2**14


def device_mesh() -> Mesh:
    """All devices, those of other processes too, on one axis "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def check_batch(batch_size: int, devices: int) -> None:
    """Raises a ValueError where a batch does not divide over the devices, with one that does."""
    if devices < 1 or batch_size % devices:
        fitting = -(-batch_size // max(devices, 1)) * max(devices, 1)
        raise ValueError(
            f"batch_size {batch_size} does not divide over {devices} devices: give a multiple, "
            f"--config.batch_size={fitting}."
        )


def split_axis(shape: tuple[int, ...], config, devices: int) -> int | None:
    """The axis along which a parameter lies split over the devices.

    With `config.devices.shard_parameters` it is the largest axis that divides; None for a small
    parameter, or where no axis divides.
    """
    if not config.devices.shard_parameters or devices == 1 or math.prod(shape) < SPLIT_ENTRIES:
        return None
    dividing = [axis for axis in range(len(shape)) if shape[axis] % devices == 0]
    return max(dividing, key=lambda axis: shape[axis], default=None)


def on_mesh(specs, mesh: Mesh):
    """A tree of PartitionSpec as one of shardings."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda spec: isinstance(spec, PartitionSpec),
    )


# ---------------------------------------------------------------------- inside a step, on a device


def gather_parameters(network, axes: list[int | None], devices: int):
    """The whole network on each device.

    Args:
        network: of each device its own part.
        axes: of each leaf, `split_axis`.
    """
    leaves, tree = jax.tree.flatten(network)
    split = [(n, axis) for n, axis in enumerate(axes) if axis is not None]
    if not split:
        return network

    # Those of one device behind one another travel as one vector (see `sum_over_devices`).
    flat, unravel = ravel_pytree([leaves[n] for n, _ in split])
    gathered = jax.vmap(unravel)(jax.lax.all_gather(flat, "data"))

    for (n, axis), parts in zip(split, gathered, strict=True):
        shape = list(leaves[n].shape)
        shape[axis] *= devices
        leaves[n] = jnp.moveaxis(parts, 0, axis).reshape(shape)
    return jax.tree.unflatten(tree, leaves)


def sum_over_devices(tree, devices: int):
    """The sum of each leaf over all devices, on each of them."""
    if devices == 1:
        return tree
    # As one vector: XLA's CPU backend, with several devices in each of several processes, may
    # begin several sums in different orders, and then waits for ever.
    flat, unravel = ravel_pytree(tree)
    return unravel(jax.lax.psum(flat, "data"))


def sum_gradients(gradient, sums, axes: list[int | None], devices: int):
    """Gradient and metrics summed over the devices, and the gradient's norm.

    Of split parameters each device gets the gradient of its own part alone.

    Args:
        gradient: of the whole network, from the examples of this device.
        sums: any other arrays to be summed.
        axes: of each leaf of the gradient, `split_axis`.

    Returns:
        ``(gradient, sums, norm)``.
    """
    leaves, tree = jax.tree.flatten(gradient)
    split = [n for n, axis in enumerate(axes) if axis is not None]
    squares = jnp.zeros(())
    if split:
        own, squares = _sum_own_parts([(leaves[n], axes[n]) for n in split], devices)
        for n, leaf in zip(split, own, strict=True):
            leaves[n] = leaf

    # One sum after the other (see `sum_over_devices`).
    whole = [leaf for n, leaf in enumerate(leaves) if n not in split]
    whole, sums, squares = jax.lax.optimization_barrier((whole, sums, squares))
    whole, sums, squares = sum_over_devices((whole, sums, squares), devices)

    norm = jnp.sqrt(squares + sum((jnp.sum(leaf**2) for leaf in whole), jnp.zeros(())))
    rest = iter(whole)
    leaves = [leaf if n in split else next(rest) for n, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, leaves), sums, norm


def _sum_own_parts(leaves, devices: int):
    """Of pairs ``(array, axis)`` each device's part along the axis, summed over the devices; and
    the sum of their squares."""
    pieces = []
    for leaf, axis in leaves:
        before, length, after = leaf.shape[:axis], leaf.shape[axis], leaf.shape[axis + 1 :]
        apart = leaf.reshape(*before, devices, length // devices, *after)
        pieces.append(jnp.moveaxis(apart, axis, 0))

    flat = jnp.concatenate([piece.reshape(devices, -1) for piece in pieces], axis=1)
    own = jax.lax.psum_scatter(flat, "data")
    _, unravel = ravel_pytree([piece[0] for piece in pieces])
    return unravel(own), jnp.sum(own**2)
