"""Reading PyTorch checkpoints without PyTorch, and without executing anything in them.

A checkpoint of PyTorch 1.6 or later is a zip file: ``data.pkl``, a pickle that refers to storages
by key, and one member of raw bytes for each storage. A pickle is a program that may call any
function by name. Here it may use the few opcodes that data needs and name the few globals in
`_GLOBALS`, each of which stands for something harmless that records its arguments; anything else is
an error before it is looked up. Arrays are made afterwards, from checked numbers.
"""

import collections
import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np


class TorchFileError(ValueError):
    """The file is no checkpoint that can be read here; the message says why."""


class _Storage(NamedTuple):
    dtype: Any  # None: bytes, whose type the tensor names
    key: str


class _Tensor(NamedTuple):
    storage: Any
    offset: Any
    size: Any
    stride: Any
    dtype: Any


class _Rebuild(NamedTuple):
    """A function of PyTorch that makes a tensor of a storage, by name. A tuple, which no pickle can
    change."""

    name: str

    def __call__(self, storage, offset=None, size=None, stride=None, *rest):
        if self.name == "_rebuild_parameter":
            return storage  # a tensor already
        return _Tensor(
            storage, offset, size, stride, rest[2] if self.name == "_rebuild_tensor_v3" else None
        )


class _Name(NamedTuple):
    """A type of storage, or of number, that a pickle names."""

    dtype: Any


_TYPES = {
    **{
        "Double": np.float64,
        "Float": np.float32,
        "Half": np.float16,
        "BFloat16": ml_dtypes.bfloat16,
        "Bool": np.bool_,
    },
    **{"Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8},
}
_DTYPES = {
    **{
        "float64": np.float64,
        "float32": np.float32,
        "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
    },
    **{
        "bool": np.bool_,
        "int64": np.int64,
        "int32": np.int32,
        "int16": np.int16,
        "int8": np.int8,
        "uint8": np.uint8,
    },
}
_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    **{
        ("torch._utils", n): _Rebuild(n)
        for n in ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
    },
    **{("torch", f"{name}Storage"): _Name(np.dtype(kind)) for name, kind in _TYPES.items()},
    **{("torch", name): _Name(np.dtype(kind)) for name, kind in _DTYPES.items()},
    ("torch.storage", "UntypedStorage"): _Name(None),
}
# What plain data in the pickle protocol of torch.save is made of; none that makes objects of other
# classes.
_OPCODES = {
    *(
        "PROTO",
        "STOP",
        "MARK",
        "POP",
        "POP_MARK",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
    ),
    *(
        "LONG1",
        "BINFLOAT",
        "BINUNICODE",
        "SHORT_BINSTRING",
        "BINSTRING",
        "SHORT_BINBYTES",
        "BINBYTES",
        "EMPTY_LIST",
    ),
    *(
        "APPEND",
        "APPENDS",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "EMPTY_DICT",
        "SETITEM",
        "SETITEMS",
    ),
    *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "REDUCE", "BUILD", "BINPERSID"),
}
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files before PyTorch 1.6 begin


def state_dict(path) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch checkpoint by name, as NumPy arrays; PyTorch itself is not needed.

    Args:
        path: a file that ``torch.save`` wrote (PyTorch 1.6 or later): a state_dict, or a dict that
            has one under "state_dict"; either may stand alone in a list. In front of every name of
            nn.DataParallel's, "module." is left out.

    Raises:
        TorchFileError: not there; no such file; damaged; a pickle that names anything but tensors,
            e.g. a whole module, or a program that is up to no good: it is never executed; the
            format before PyTorch 1.6; an entry that is no tensor.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            found = _unwrapped(path, _loaded(path, archive))
            if not isinstance(found, dict):
                raise TorchFileError(
                    f"{path} holds a {type(found).__name__}, expected the state_dict of a module."
                )
            # By dict's own methods: a pickle may hang others on an OrderedDict.
            arrays = {
                str(name): _array(path, archive, str(name), entry)
                for name, entry in dict.items(found)
            }
    except FileNotFoundError:
        raise TorchFileError(f"{path.absolute()} is not there.") from None
    # NotImplementedError is zipfile's, of a member in a way of packing that it does not know.
    except (OSError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise TorchFileError(f"{path} is {_no_zip(path)}: {error}") from error
    if arrays and all(name.startswith("module.") for name in arrays):
        return {name.removeprefix("module."): array for name, array in arrays.items()}
    return arrays


def _unwrapped(path: Path, found: Any) -> Any:
    """The state_dict inside of a dict under "state_dict", or of a list that holds nothing else."""
    if isinstance(found, dict) and isinstance(dict.get(found, "state_dict"), dict | list):
        found = dict.get(found, "state_dict")
    if isinstance(found, list) and len(found) == 1:
        (found,) = found
    if isinstance(found, list):
        raise TorchFileError(
            f"{path} holds a list of {len(found)} entries, expected one state_dict: save one file "
            "for each, torch.save(entry, path)."
        )
    return found


def _no_zip(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            start = file.read(len(_OLD))
    except OSError:
        return "not readable"
    if start == _OLD:
        return (
            "in the format before PyTorch 1.6, which is not read here (write it anew with a "
            "PyTorch that you trust it to: "
            "torch.save(torch.load(path, map_location='cpu'), new_path))"
        )
    return "damaged, cut short, or no file of torch.save"


def _loaded(path: Path, archive: zipfile.ZipFile):
    """What the pickle describes, tensors as `_Tensor`."""
    names = [
        name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")
    ]
    if len(names) != 1:
        raise TorchFileError(
            f"{path} is a zip file, but none of torch.save: expected one */data.pkl in it."
        )
    data = _member(path, archive, names[0])
    _check_opcodes(path, data)
    try:
        return _Unpickler(path, names[0].partition("/")[0], data).load()
    except TorchFileError:
        raise
    except Exception as error:  # a damaged pickle fails in many ways
        raise TorchFileError(
            f"{path}: its pickle is damaged, or is not that of tensors: {error!r}"
        ) from error


def _check_opcodes(path: Path, data: bytes) -> None:
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in _OPCODES:
                raise TorchFileError(
                    f"{path}: its pickle uses {opcode.name}, which tensors do not need; it was not "
                    "executed."
                )
            if opcode.name == "LONG_BINPUT" and int(argument or 0) > len(data):
                raise TorchFileError(
                    f"{path}: its pickle is damaged: memo {argument} of {len(data)} bytes."
                )
    except ValueError as error:
        if isinstance(error, TorchFileError):
            raise
        raise TorchFileError(f"{path}: its pickle is damaged: {error}") from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, path: Path, folder: str, data: bytes):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.path, self.folder = path, folder

    def find_class(self, module: str, name: str):
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise TorchFileError(
                f"{self.path}: its pickle names {module}.{name}, which is no part of a tensor; it "
                "was not executed. Save "
                "model.state_dict(), not the model itself, and only plain numbers beside it."
            ) from None

    def persistent_load(self, pid):
        kind, named, key, *_ = pid
        if kind != "storage" or type(named) is not _Name or not isinstance(key, str):
            raise TorchFileError(f"{self.path}: its pickle refers to {pid!r}, expected a storage.")
        return _Storage(named.dtype, f"{self.folder}/data/{key}")


def _array(path: Path, archive: zipfile.ZipFile, name: str, entry) -> np.ndarray:
    """A tensor's numbers; every number of the pickle is checked before it is used."""
    if type(entry) is not _Tensor or type(entry.storage) is not _Storage:
        raise TorchFileError(
            f"{path}: {name} is a {type(entry).__name__}, expected a tensor: a file holds a "
            "state_dict, alone or as 'state_dict'."
        )
    storage, offset, size, stride, dtype = entry
    dtype = dtype.dtype if type(dtype) is _Name else storage.dtype
    numbers: tuple[Any, ...] = (None,)
    if isinstance(size, tuple) and isinstance(stride, tuple):
        numbers = (offset, *size, *stride)
    if (
        dtype is None
        or not all(type(n) is int and n >= 0 for n in numbers)
        or len(size) != len(stride)
    ):
        raise TorchFileError(
            f"{path}: {name} has a type, size {size}, stride {stride} or offset {offset} that no "
            "tensor has."
        )
    if f"{storage.key.partition('/')[0]}/byteorder" in archive.namelist():
        order = _member(path, archive, f"{storage.key.partition('/')[0]}/byteorder")
        if order != b"little":
            raise TorchFileError(
                f"{path} was written by a machine of byte order {order!r}; this reads b'little' "
                "alone."
            )
    data = _member(path, archive, storage.key)
    held = np.frombuffer(data, np.uint8, count=len(data) // dtype.itemsize * dtype.itemsize).view(
        dtype
    )
    empty = 0 in size
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    count = 1
    for n in size:
        count *= n
    if not empty and (last >= len(held) or count > len(held)):
        raise TorchFileError(
            f"{path}: {name} of size {size}, stride {stride}, offset {offset} does not fit its "
            f"storage of {len(held)} numbers "
            "(a tensor made by expand() has to be written as tensor.contiguous())."
        )
    if empty:
        return np.zeros(size, dtype)
    steps = [step * dtype.itemsize for step in stride]
    return np.ascontiguousarray(
        np.lib.stride_tricks.as_strided(held[offset:], size, steps)
    ).reshape(size)


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise TorchFileError(f"{path} is damaged: it has no {name}.") from None
    # torch.save compresses nothing; a small file could unpack to any size
    if info.compress_type != zipfile.ZIP_STORED:
        raise TorchFileError(f"{path}: {name} is compressed, which torch.save does not do.")
    return archive.read(info)
