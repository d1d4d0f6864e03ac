"""Training: configuration, state, the sharded step, evaluation, checkpoints, metrics, the plan."""

from lipjax.training.config import (
    FIELDS,
    LOSSES,
    STORES,
    build_network,
    check_config,
    completed,
    default_config,
    first_network,
    load_data,
)
from lipjax.training.evaluation import evaluate, selected_network
from lipjax.training.schedules import learning_rate, mode_at, modes_of, ramp, with_mode
from lipjax.training.sharding import device_mesh, split_axis
from lipjax.training.state import State, initial_state, state_shardings, state_specs
from lipjax.training.step import (
    METRICS,
    NonFiniteError,
    check_finite,
    example_loss,
    examples_at_once,
    make_steps,
)
from lipjax.training.vectors import VECTOR_TYPES, VectorStore, pack_vector, unpack_vector

__all__ = [
    "FIELDS",
    "LOSSES",
    "METRICS",
    "STORES",
    "VECTOR_TYPES",
    "NonFiniteError",
    "State",
    "VectorStore",
    "build_network",
    "check_config",
    "check_finite",
    "completed",
    "default_config",
    "device_mesh",
    "evaluate",
    "example_loss",
    "examples_at_once",
    "first_network",
    "initial_state",
    "learning_rate",
    "load_data",
    "make_steps",
    "mode_at",
    "modes_of",
    "pack_vector",
    "ramp",
    "selected_network",
    "split_axis",
    "state_shardings",
    "state_specs",
    "unpack_vector",
    "with_mode",
]
