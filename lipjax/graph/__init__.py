"""What a function does to one example, as JAX traces it: ``trace(f, example) -> Graph``."""

from lipjax.graph.nodes import Activation, Add, Executed, Graph, Input, Linear, Node, Rearrange
from lipjax.graph.trace import TraceError, register_composite, register_primitive, trace

__all__ = [
    "Activation",
    "Add",
    "Executed",
    "Graph",
    "Input",
    "Linear",
    "Node",
    "Rearrange",
    "TraceError",
    "register_composite",
    "register_primitive",
    "trace",
]
