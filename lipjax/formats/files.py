"""Files that are never half written, and files of unknown origin, whose sizes are looked at before
anything is unpacked."""

import contextlib
import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

# Objects and lists that JSON of unknown origin may hold in each other.
DEPTH = 32
# Members of an npz file, and bytes of the list of them.
MEMBERS = 1000
DIRECTORY = 2**20

# What `numpy.save` writes in front of an array, and nothing else.
_NPY = re.compile(
    rb"\{'descr': '([<>|][a-zA-Z][0-9]{1,10})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,15}(?:, ?[0-9]{1,15})*)?),?\), ?\} *\n"
)
# What zipfile and zlib raise of a damaged or forged file.
_DAMAGE = (
    *(OSError, ValueError, EOFError, LookupError, RuntimeError, OverflowError, struct.error),
    *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error),
)


class Unreadable(ValueError):
    """A file, or a text in it, is damaged, forged, or of another kind; the message says how."""


@contextlib.contextmanager
def replaced(path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A new file that takes the place of `path` when the context ends without an error: the old
    content or the new, whatever happens, never a part.

    Args:
        path: the file; ``path.tmp`` beside it is written first.
        mode: "wb" or "w" (UTF-8).
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# --------------------------------------------------------------------------------------------- JSON


def parsed(text: str, length: int) -> Any:
    """What a JSON text of unknown origin says.

    Args:
        length: characters that it may have.

    Raises:
        Unreadable: longer, no JSON, nested deeper than `DEPTH`, a name twice in one object, a
            number that is not finite.
    """
    if len(text) > length:
        raise Unreadable(f"{len(text)} characters of JSON, expected at most {length}.")
    depth = deepest = 0
    # A string without an end goes to the end of the text: looked for again behind each of its
    # quotes, it would take a time of the square of the length.
    for bracket in re.findall(r"[][{}]", re.sub(r'"(?:[^"\\]|\\.)*+"?', "", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > DEPTH:
        raise Unreadable(f"JSON that is nested {deepest} deep, expected at most {DEPTH}.")
    try:
        return json.loads(
            text, parse_constant=_no_number, parse_float=_number, object_pairs_hook=_once
        )
    except ValueError as error:
        raise error if isinstance(error, Unreadable) else Unreadable(f"no JSON: {error}") from error


def _no_number(text: str):
    raise Unreadable(f"{text} is no finite number.")


def _number(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text[:20])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise Unreadable(f"JSON with the name {quoted(name)} twice in one object.")
        found[name] = value
    return found


def quoted(value, length: int = 80) -> str:
    """A value of unknown origin on one line of ASCII: as Python writes it, cut where it is
    longer."""
    text = ascii(value)
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"


# ---------------------------------------------------------------------------------------------- npz


class Member(NamedTuple):
    """An array in an npz file, not read yet: its type as NumPy writes it ("<f8"), and where its
    bytes begin."""

    dtype: str
    shape: tuple[int, ...]
    fortran: bool
    offset: int
    size: int


class Npz:
    """An npz file of unknown origin. What its arrays are is known before one of them is unpacked.

    Args:
        file: opened to be read, in binary; it stays open as long as arrays are read.

    Raises:
        Unreadable: no npz file, damaged, or with more than `MEMBERS` members.
    """

    def __init__(self, file: IO[bytes]):
        _expect_directory(file)
        with _damage():
            self._archive = zipfile.ZipFile(file)
        infos = self._archive.infolist()
        self._infos = {info.filename.removesuffix(".npy"): info for info in infos}
        if len(self._infos) != len(infos):
            raise Unreadable("two members have the same name.")
        for name, info in self._infos.items():
            plain = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if not info.filename.endswith(".npy") or not plain or info.flag_bits & 1:
                raise Unreadable(f"{quoted(name)} is no member that numpy.savez writes.")

    @property
    def names(self) -> list[str]:
        return list(self._infos)

    def member(self, name: str) -> Member:
        """What an array is; only the first bytes are unpacked.

        Raises:
            Unreadable: no array, or its size is not what type and shape say.
        """
        info = self._infos[name]
        with _damage(), self._archive.open(info) as stream:
            start = stream.read(12)
            longer = start[6:7] != b"\x01"
            count = int.from_bytes(start[8:12] if longer else start[8:10], "little")
            offset = (12 if longer else 10) + count
            text = start[12 if longer else 10 :] + stream.read(
                max(min(count, 2**12) - (0 if longer else 2), 0)
            )
        match = _NPY.fullmatch(text)
        if start[:6] != b"\x93NUMPY" or start[6:8] not in (b"\x01\0", b"\x02\0") or not match:
            raise Unreadable(
                f"{quoted(name)} is no array of numbers or text that numpy.save wrote."
            )
        try:
            itemsize = np.dtype(match[1].decode()).itemsize
        except (TypeError, ValueError) as error:
            raise Unreadable(
                f"{quoted(name)} is of an unknown type, {match[1].decode()}."
            ) from error
        shape = tuple(int(n) for n in match[3].replace(b" ", b"").split(b",") if n)
        size = info.file_size - offset
        if len(shape) > 32 or math.prod(shape) * itemsize != size:
            raise Unreadable(f"{quoted(name)} of shape {shape} does not fit its {size} bytes.")
        return Member(match[1].decode(), shape, match[2] == b"True", offset, size)

    def read(self, name: str, size: int) -> np.ndarray:
        """An array of numbers or text, of at most so many bytes.

        Raises:
            Unreadable: it has more bytes, is damaged, or holds Python objects.
        """
        member = self.member(name)
        if member.size > size:
            raise Unreadable(f"{quoted(name)} has {member.size} bytes, expected at most {size}.")
        dtype = np.dtype(member.dtype)
        if dtype.kind not in "biufU" or dtype.itemsize == 0:
            raise Unreadable(f"{quoted(name)} is of type {member.dtype}, which is not read.")
        with _damage(), self._archive.open(self._infos[name]) as stream:
            stream.read(member.offset)
            data = stream.read(member.size + 1)
        if len(data) != member.size:
            raise Unreadable(f"{quoted(name)} has {len(data)} bytes, expected {member.size}.")
        if dtype.kind == "b" and data.strip(b"\0\1"):
            raise Unreadable(f"{quoted(name)} has truth values that are neither 0 nor 1.")
        order = "F" if member.fortran else "C"
        entries = np.frombuffer(data, dtype)
        return entries.reshape(member.shape, order=order).copy()  # type: ignore[call-overload]


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise Unreadable(str(error) or type(error).__name__) from error


def _expect_directory(file: IO[bytes]) -> None:
    """Looks at how many members a zip file says that it has, before all of them are read."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 98, 0))
    last = file.read(98)
    file.seek(0)
    if last[-22:-18] != b"PK\5\6":
        raise Unreadable("it is no npz file, or has no end")
    sizes = [struct.unpack("<HI", last[-12:-6])]
    if (
        last[-42:-38] == b"PK\6\7" and len(last) == 98
    ):  # of more than 4 GiB: a record with longer numbers stands in front
        sizes.append(struct.unpack("<8xQQ", last[24:48]))
    for count, length in sizes:
        if count > MEMBERS or length > DIRECTORY:
            raise Unreadable(f"it has {count} members, expected at most {MEMBERS}")
