"""Networks of PyTorch, as functions that JAX traces.

A module is run once on one example, and PyTorch writes down every operation on tensors
(``make_fx``, PyTorch 1.13 or later): its own `forward`, functional calls, hooks and
parametrisations, whatever Python does on the way. What does not depend on the example is computed
by PyTorch at once; each other operation has a rule in `torch_rules`. Then both are run on random
examples and compared.
"""

import importlib
import math
import operator
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from lipjax.bridges.program import (
    Builder,
    Constant,
    Network,
    Operand,
    Value,
    compared,
    held,
    image_shape,
)
from lipjax.bridges.torch_rules import RULES

# Parts of names of operations that draw random numbers, or do not say what they return.
RANDOM = ("rand", "bernoulli", "dropout", "normal", "multinomial", "empty", "poisson", "uniform")
# Results that share memory with their operand.
VIEWS = {
    *(
        "view",
        "_unsafe_view",
        "_reshape_alias",
        "t",
        "transpose",
        "permute",
        "squeeze",
        "unsqueeze",
        "expand",
    ),
    *("slice", "select", "split", "split_with_sizes", "chunk", "unbind", "detach", "alias"),
    *("as_strided", "narrow", "diagonal", "unfold"),
}
IN_PLACE = (
    "changes a tensor in place that is seen by another name too (a view, a parameter): write it "
    "without the underscore, or inplace=False."
)
# Constants whose shape alone comes from the example.
SHAPED = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}


def from_torch(module, input_shape: Sequence[int]) -> Network:
    """The network of any ``torch.nn.Module``: with branches, functional calls, a `forward` of its
    own.

    Its parameters become parameters of the result, by their names (transposed where PyTorch
    transposes them), buffers statistics. float64 ones become float32 where JAX has 64 bits off
    (`jax_enable_x64`): the result is then that other function. A softmax at the very end is left
    out: logits are what is certified. `Network.sequential` is a plain chain as lipjax's own layers.

    Args:
        module: on images ``(N, channels, height, width)``, vectors ``(N, features)`` or anything
            else with a batch axis in front; in eval mode, without any normalisation outside of it.
            It is run on a few examples, and not changed. Of nn.DataParallel the module inside.
        input_shape: of one example as it is given to lipjax: ``(height, width, channels)`` for
            images, whose channels are moved to the front at the entry; other numbers of axes as the
            module has them, such as ``(features,)``.

    Raises:
        TypeError: no module; an operation that is not known, by its name.
        ValueError: an example of this shape does not go through; BatchNorm or Dropout in training
            mode; parameters that are neither float32 nor float64; Python asks for a value of the
            image; other logits than the given module's.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(module, torch.nn.Module):
        kind = type(module)
        raise TypeError(f"expected a torch.nn.Module, got {kind.__module__}.{kind.__qualname__}.")
    if isinstance(module, torch.nn.DataParallel):
        module = module.module
    shape = image_shape(input_shape)
    _check_mode(torch, module)

    moved = len(shape) == 3
    inner = (shape[-1], *shape[:-1]) if moved else shape
    like = next(module.parameters(), torch.zeros(()))
    example = torch.zeros((1, *inner), dtype=like.dtype, device=like.device)
    network = _Reader(torch, module, shape, example, moved).network()

    def reference(examples):
        given = np.moveaxis(examples, -1, 1) if moved else examples
        rows = torch.from_dlpack(np.ascontiguousarray(given)).to(like)
        with torch.no_grad():
            logits = torch.cat([module(row[None]) for row in rows])
        return from_tensor(logits, "the output")

    compared(network, shape, reference)
    return network


def from_tensor(tensor, where: str) -> np.ndarray:
    """A copy of a PyTorch tensor, by DLPack: also where PyTorch was built for another NumPy.

    Raises:
        ValueError: it is neither float32 nor float64.
    """
    tensor = tensor.detach().cpu().contiguous()
    if str(tensor.dtype) not in ("torch.float32", "torch.float64"):
        raise ValueError(
            f"{where} is {str(tensor.dtype).removeprefix('torch.')}, expected float32 or float64: "
            "call .float() on the network first."
        )
    return held(np.array(np.from_dlpack(tensor)))


def _check_mode(torch, module) -> None:
    """Raises an error for layers whose logits depend on the batch or on chance, by name."""
    nn = torch.nn.modules
    for name, part in module.named_modules():
        where = f"layer {name}, {type(part).__name__},"
        for own, parameter in part.named_parameters(recurse=False):
            if parameter.dtype not in (torch.float32, torch.float64):
                from_tensor(parameter, f"{where} parameter {own}")
        if not isinstance(part, (nn.batchnorm._BatchNorm, nn.dropout._DropoutNd)):
            continue
        if part.training:
            raise ValueError(f"{where} is in training mode: call .eval() on the network first.")
        if isinstance(part, nn.batchnorm._BatchNorm) and part.running_mean is None:
            raise ValueError(
                f"{where} keeps no statistics (track_running_stats=False): its logits depend on "
                "the batch."
            )


class _Reader:
    """Reads what PyTorch wrote down of one module.

    Attributes:
        values: of the nodes: `Value`, tensors that do not depend on the example, and tuples.
        names: of tensors, by their identity, and whether they are parameters.
    """

    def __init__(self, torch, module, input_shape, example, moved: bool):
        try:
            make_fx = importlib.import_module("torch.fx.experimental.proxy_tensor").make_fx
        except ImportError as error:
            raise ImportError(
                f"from_torch needs PyTorch 1.13 or later, got {torch.__version__}."
            ) from error
        self.torch, self.input_shape = torch, input_shape
        self.names: dict[int, tuple[str, bool]] = {}
        self.kept: list[Any] = []  # so that no identity is used twice
        for name, parameter in module.named_parameters():
            self.names[id(parameter)] = (name, True)
        for name, buffer in module.named_buffers():
            self.names[id(buffer)] = (name, False)

        try:
            with torch.no_grad():
                # A function of its own: of a module some versions trace another method.
                self.traced = make_fx(lambda x: module(x))(example)
        except Exception as error:  # of whatever kind its forward raises
            raise ValueError(
                f"an example of shape {tuple(input_shape)}, for PyTorch "
                f"{tuple(example.shape)}, does not go through: {error} (Where Python asks for a "
                "value of the image, as in `if x.sum() > 0`, the module is no function that can be "
                "traced.)"
            ) from error
        dtype = np.dtype(str(example.dtype).removeprefix("torch."))
        shape = tuple(example.shape)
        self.builder = Builder(shape, held(np.zeros((), dtype)).dtype, batch_axis=True, moved=moved)
        self.values: dict[Any, Any] = {}
        self.behind = "the input"
        for node in self.traced.graph.nodes:
            if self.name(node).endswith("_"):
                self.check_written(node)
        self.traced.graph.eliminate_dead_code()

    @staticmethod
    def name(node) -> str:
        """Of PyTorch's operation, such as relu; with an underscore behind it works in place."""
        schema = getattr(node.target, "_schema", None)
        return str(schema.name if schema else node.target).removeprefix("aten::")

    def network(self) -> Network:
        position, result = 0, None
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self.builder.input
            elif node.op == "get_attr":
                tensor = self.traced
                for part in node.target.split("."):
                    tensor = getattr(tensor, part)
                self.values[node] = tensor
            elif node.op == "output":
                result = self.of(node.args[0])
            elif node.target is operator.getitem:
                self.values[node] = self.part(*map(self.of, node.args))
            else:
                position += 1
                self.values[node] = self.call(position, node)
        if not isinstance(result, Value):
            kind = type(result).__name__
            raise TypeError(
                f"the module returns a {kind}, expected one tensor of logits that depends on the "
                "images: wrap it in a module whose forward returns the logits alone."
            )
        return self.builder.network(result, self.input_shape)

    def part(self, values: Any, i: int) -> Any:
        """One of several results. Of a pooling or a normalisation only the first is known."""
        if isinstance(values, Value):
            return values if i == 0 else None
        return values[i]

    def of(self, argument: Any) -> Any:
        """An argument with values in the place of nodes."""
        if isinstance(argument, self.torch.fx.Node):
            return self.values[argument]
        if isinstance(argument, (list, tuple)):
            return [self.of(each) for each in argument]
        return argument

    def call(self, position: int, node) -> Any:
        schema, name = getattr(node.target, "_schema", None), self.name(node)
        arguments: dict[str, Any] = {}
        if schema is not None:
            arguments = {a.name: a.default_value for a in schema.arguments}
            arguments.update(zip(arguments, node.args, strict=False))
            arguments.update(node.kwargs)
            arguments = {key: self.of(each) for key, each in arguments.items()}
        weights = [w for w in self.flat(arguments.values()) if id(w) in self.names]
        if weights and self.names[id(weights[0])][1]:
            self.behind = self.names[id(weights[0])][0].rpartition(".")[0] or self.behind
        self.builder.where = f"step {position}, {name} at '{self.behind}'"

        given = any(isinstance(each, Value) for each in self.flat(arguments.values()))
        if name.endswith("_") and not given:
            self.fail(IN_PLACE)
        base = name.removesuffix("_")
        if not given or base in SHAPED:
            return self.computed(node, base)
        rule = RULES.get(base)
        if rule is None:
            self.fail(
                "is not known: no rule says what it computes. Write the layer with operations "
                "that are (linear maps, pooling, activations), or that part in JAX: "
                "lipjax.bridges.state_dict has the weights of a .pth file.",
                TypeError,
            )
        arguments.pop("out", None)
        return rule(self, **arguments)

    def flat(self, values) -> list[Any]:
        """All of them, those in lists too."""
        found: list[Any] = []
        for value in values:
            found += self.flat(value) if isinstance(value, list) else [value]
        return found

    def check_written(self, node) -> None:
        """What is changed in place may not be seen by another name."""
        target = node.args[0]
        kinds = {self.name(user) for user in target.users if user is not node}
        kinds.add(self.name(target))
        if target.target is operator.getitem:
            kinds.add(self.name(target.args[0]))
        if kinds & VIEWS:
            self.builder.where = self.name(node)
            self.fail(IN_PLACE)

    def computed(self, node, base: str) -> Any:
        """The result of what does not depend on the example, by PyTorch."""
        if any(part in base for part in RANDOM):
            self.fail("is random, or not initialised: what is certified must be a function.")
        torch = self.torch

        def tensors(argument):
            if isinstance(argument, list):
                return [tensors(each) for each in argument]
            if isinstance(argument, Value):
                return torch.zeros(argument.shape, dtype=getattr(torch, str(argument.dtype)))
            return argument

        arguments = [tensors(self.of(each)) for each in node.args]
        named = {key: tensors(self.of(each)) for key, each in node.kwargs.items()}
        with torch.no_grad():
            result = node.target(*arguments, **named)
        sources = [self.names[id(a)] for a in self.flat(arguments) if id(a) in self.names]
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, torch.Tensor) and sources and id(each) not in self.names:
                trained = any(kind for _, kind in sources)
                self.names[id(each)] = (sources[0][0], trained)
            self.kept.append(each)
        return result

    def fail(self, message: str, error: type[Exception] = ValueError) -> NoReturn:
        raise error(f"{self.builder.where}: {message}")

    def operand(self, value: Any) -> Operand | float:
        """A value, or a tensor as a constant."""
        if isinstance(value, self.torch.Tensor):
            name, trained = self.names.get(id(value), ("constant", False))
            return Constant(name, from_tensor(value, f"{self.builder.where}: {name}"), trained)
        return value

    def weight(self, value: Any) -> list[Constant]:
        """A parameter that may be absent."""
        if value is None:
            return []
        found = self.operand(value)
        if not isinstance(found, Constant):
            self.fail(
                "takes a parameter from the image: of a product of two quantities that depend on "
                "it no bound is known."
            )
        return [found]

    def value(self, value: Any) -> Value:
        if not isinstance(value, Value):
            self.fail("has a constant where something of the image should be, which is not known.")
        return value

    def add(self, kind: str, *operands, **settings) -> Value:
        return self.builder.add(kind, *map(self.operand, operands), **settings)

    def reshaped(self, value: Any, shape: Sequence[int]) -> Value:
        value = self.value(value)
        known = math.prod(n for n in shape if n != -1)
        found = tuple(math.prod(value.shape) // max(known, 1) if n == -1 else n for n in shape)
        return value if found == value.shape else self.add("reshape", value, shape=found)
