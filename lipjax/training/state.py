"""The state that training carries from step to step, and where it lies on the devices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from lipjax.training.sharding import on_mesh, split_axis
from lipjax.training.vectors import initial_vectors


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "network", "optimizer", "vectors", "best", "average"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that training carries from step to step; what a checkpoint holds.

    Attributes:
        step: scalar int32, steps done.
        network: the nnx.Sequential (a pytree).
        optimizer: the optax state.
        vectors: power-iteration vectors as `pack_vector` stores them, a dict: "local" a tuple of
            ``(rows, *shape)`` arrays, row r of the example at r in the flattened `feeding.stripes`
            (store "host": those of one call); "global" a tuple of arrays ``shape``.
        best: scalar, the best validation score so far.
        average: with `optimizer.average`, the running average of the networks of all steps; else
            None, which is no leaf, so that checkpoints of before it was there are the same.
    """

    step: jax.Array
    network: Any
    optimizer: Any
    vectors: dict[str, tuple[jax.Array, ...]]
    best: jax.Array
    average: Any = None

    @property
    def evaluated(self) -> Any:
        """The network that is evaluated, selected and certified. Its norms are its own: evaluations
        and certificates compute them afresh, from none of `vectors`."""
        return self.network if self.average is None else self.average


def initial_state(
    network: nnx.Module, transform: optax.GradientTransformation, config, examples: int, input_shape
) -> State:
    """The state before the first step; `examples` training examples of `input_shape`."""
    return State(
        step=jnp.zeros((), jnp.int32),
        network=network,
        optimizer=transform.init(network),
        vectors=initial_vectors(network, config, examples, input_shape),
        best=jnp.asarray(-jnp.inf, jnp.float32),
        # A copy: the state is donated, and no buffer can be twice.
        average=jax.tree.map(jnp.copy, network) if config.optimizer.average else None,
    )


def state_specs(state: State, config, devices: int) -> State:
    """Where everything is, a tree of PartitionSpec.

    All is on every device but for the vectors of the examples, of which each device has those of
    its `feeding.stripes`, and for parameters and what the optimizer keeps of them where
    `split_axis` says so.
    """

    def spec_of(leaf):
        axis = split_axis(leaf.shape, config, devices)
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "data")

    def spec_of_vectors(name, vectors):
        spec = PartitionSpec("data") if name == "local" else PartitionSpec()
        return (spec,) * len(vectors)

    specs = jax.tree.map(lambda _: PartitionSpec(), state)
    return dataclasses.replace(
        specs,
        network=jax.tree.map(spec_of, state.network),
        optimizer=jax.tree.map(spec_of, state.optimizer),
        vectors={name: spec_of_vectors(name, v) for name, v in state.vectors.items()},
        average=jax.tree.map(spec_of, state.average),
    )


def state_shardings(state: State, config, mesh: Mesh):
    """`state_specs` on a mesh."""
    return on_mesh(state_specs(state, config, mesh.size), mesh)
