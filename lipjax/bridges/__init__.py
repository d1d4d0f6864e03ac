"""Networks of other frameworks and formats: in (ONNX, PyTorch, Linen, Equinox) and out (ONNX).

Each function returns a network that computes the same logits up to rounding. What is certified is
the network that is returned, as lipjax executes it, not the one that it came from. No framework is
imported here. Parameters become float32, or stay float64 where JAX has 64 bits.
"""

from lipjax.bridges import onnx_out
from lipjax.bridges.equinox import from_equinox
from lipjax.bridges.folding import fold
from lipjax.bridges.linen import from_linen
from lipjax.bridges.onnx_in import from_onnx
from lipjax.bridges.program import Network
from lipjax.bridges.pth import ARCHITECTURES, from_pth
from lipjax.bridges.torch import from_torch
from lipjax.bridges.torch_files import TorchFileError, state_dict

__all__ = [
    "ARCHITECTURES",
    "Network",
    "TorchFileError",
    "fold",
    "from_equinox",
    "from_linen",
    "from_onnx",
    "from_pth",
    "from_torch",
    "onnx_out",
    "state_dict",
]
