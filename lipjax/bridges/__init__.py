"""Networks of other frameworks and formats: in (Linen, Equinox, PyTorch) and out (ONNX)."""

from lipjax.bridges import onnx_out
from lipjax.bridges.networks import (
    ARCHITECTURES,
    fold,
    from_equinox,
    from_linen,
    from_pth,
    from_torch,
)
from lipjax.bridges.torch_files import TorchFileError, state_dict

__all__ = [
    "ARCHITECTURES",
    "TorchFileError",
    "fold",
    "from_equinox",
    "from_linen",
    "from_pth",
    "from_torch",
    "onnx_out",
    "state_dict",
]
