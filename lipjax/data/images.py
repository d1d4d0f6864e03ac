"""Encoded images on disk, decoded when they are indexed."""

import dataclasses
import hashlib
import io
import itertools
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from lipjax.data.errors import DataError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by channels


# Pillow's modes of more than 8 bits a channel begin with one of these; `convert` would clip them to
# white.
DEEP = ("I", "F")


class Undecodable(ValueError):
    """Bytes that are no image, or a damaged one."""


class Unsuitable(Undecodable):
    """An image whose pixels are not 8 bits a channel."""


def decode(encoded: bytes, channels: int = 3, *, as_seen: bool = False):
    """The Pillow image of `channels` channels that the bytes of a file encode.

    Palettes and CMYK become RGB by Pillow's own rules; colour profiles are not applied. Of several
    frames it is the first.

    Args:
        as_seen: as viewers show it, and people who sorted it into classes saw it: turned as EXIF
            says, and transparent pixels over white. Else both are ignored, as TFDS does.

    Raises:
        Undecodable: damaged bytes.
        Unsuitable: more than 8 bits a channel.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.mode.startswith(DEEP):
                raise Unsuitable(
                    f"its pixels are of more than 8 bits (Pillow's mode {image.mode}), expected 8: "
                    "which value is white is not written in it. Save it with 8 bits a channel, or "
                    "the whole set as floats in [0, 1] in an npz file"
                )
            if as_seen:
                image = _over_white(ImageOps.exif_transpose(image))
            return image.convert(MODES[channels])
    except Unsuitable:
        raise
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        # Pillow names the buffer by its address, which says nothing.
        raise Undecodable(
            re.sub(r" <_io\.BytesIO object at \w+>", "", str(error)) or type(error).__name__
        ) from error


def _over_white(image):
    """A Pillow image with what is transparent in it laid over white, which `convert` would show in
    whatever colour is stored there."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def pixels(image, image_size: int | None = None) -> np.ndarray:
    """A Pillow image as ``(H, W, C)`` uint8: as it is, or its central square after resizing.

    With `image_size` the shorter side becomes image_size * 256 / 224, rounded (bilinear,
    antialiased), as is usual for evaluation on ImageNet.
    """
    if image_size is not None:
        from PIL import Image

        scale = round(image_size * 256 / 224) / min(image.size)
        width, height = (max(image_size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left = (width - image_size) // 2
        top = (height - image_size) // 2
        image = image.crop((left, top, left + image_size, top + image_size))
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


@dataclasses.dataclass(frozen=True)
class Source:
    """Records of encoded images in shards.

    Attributes:
        shards: ``(path, first, count)``: so many records of the file from `first` on.
        parse: the encoded image and the label in a record, given its bytes and its position;
            picklable. It raises a ValueError for bytes that are no such record.
        digest: hash of all that is stored.
        remedy: what to do when a shard is damaged.
        reader: opens files when it reads them, in each process anew.
    """

    shards: tuple[tuple[str, int, int], ...]
    parse: Callable[[bytes, int], tuple[bytes, int]]
    digest: str
    remedy: str
    reader: Any = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        try:
            from array_record.python.array_record_data_source import ArrayRecordDataSource
        except ImportError as error:
            raise DataError(
                "records are read with array_record: pip install -r requirements.txt."
            ) from error
        # With the range in its name a file is not opened before it is read.
        paths = [f"{path}[{first}:{first + count}]" for path, first, count in self.shards]
        object.__setattr__(self, "reader", ArrayRecordDataSource(paths))

    def __len__(self):
        return sum(count for _, _, count in self.shards)

    def read(self, position: int) -> tuple[bytes, int]:
        """The encoded image and the label at `position`.

        Raises:
            DataError: a damaged record or a missing shard, with file, number of the record in it,
                and what to do.
        """
        try:
            return self.parse(self.reader[position], position)
        except (RuntimeError, ValueError, OSError) as error:
            raise self.damaged(position, error) from error

    def damaged(self, position: int, reason) -> DataError:
        """The error about the record at `position`."""
        ends = list(itertools.accumulate(count for _, _, count in self.shards))
        shard = int(np.searchsorted(ends, position, side="right"))
        path, first, count = self.shards[shard]
        number = first + position - (ends[shard] - count)
        return DataError(
            f"{path}, record {number}, is missing or damaged: {str(reason).rstrip('.')}. "
            f"{self.remedy}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """``(N, H, W, C)`` uint8 images on disk: what is indexed is read and decoded. Picklable; files
    are opened anew.

    Attributes:
        source: the records.
        rows: ``(N,)`` positions in `source`.
        stored_shape: ``(H, W, C)`` of what is stored; H and W are None where they vary.
        image_size: as `pixels` takes it.
        as_seen: as `decode` takes it.
    """

    source: Source
    rows: np.ndarray
    stored_shape: tuple[int | None, int | None, int]
    image_size: int | None = None
    as_seen: bool = False

    dtype = np.dtype(np.uint8)
    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        height, width, channels = self.stored_shape
        if self.image_size is not None:
            height = width = self.image_size
        assert height is not None and width is not None  # `images_of` refuses this
        return len(self.rows), height, width, channels

    @property
    def nbytes(self) -> int:
        """Bytes of all images, decoded."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, rows) -> "Images":
        """The images at `rows` (anything that indexes axis 0), still on disk."""
        return dataclasses.replace(self, rows=self.rows[rows])

    def __getitem__(self, rows) -> np.ndarray:
        """The images at `rows` (an int, slice, integer array or boolean mask), decoded: ``(*rows,
        H, W, C)`` uint8.

        Raises:
            DataError: as `Source.read`, and for an image that cannot be decoded.
            IndexError: as NumPy's.
        """
        positions = self.rows[rows]
        out = np.empty((*np.shape(positions), *self.shape[1:]), np.uint8)
        flat = out.reshape(-1, *self.shape[1:])
        for i, position in enumerate(np.ravel(positions)):
            array = pixels(self._decoded(int(position)), self.image_size)
            if array.shape != flat.shape[1:]:
                raise self.source.damaged(
                    int(position), f"the image is {array.shape}, not {flat.shape[1:]}"
                )
            flat[i] = array
        return out

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def picture(self, row: int):
        """The whole Pillow image at `row`, whatever the image_size; for augmentation."""
        return self._decoded(int(self.rows[row]))

    def _decoded(self, position):
        encoded, _ = self.source.read(position)
        try:
            return decode(encoded, self.stored_shape[2], as_seen=self.as_seen)
        except Undecodable as error:
            raise self.source.damaged(position, error) from error

    def identity(self) -> np.ndarray:
        """A short array that stands for the pixels in a fingerprint: other pixels, another
        array."""
        digest = hashlib.sha256(f"{self.source.digest} {self.shape}".encode())
        digest.update(np.asarray(self.rows, np.int64).tobytes())
        return np.frombuffer(digest.digest(), np.uint8)


def images_of(
    what: str, source: Source, stored_shape, image_size: int | None, *, as_seen: bool = False
) -> Images:
    """All images of a source; a DataError that names the set if they have several sizes."""
    if image_size is None and None in stored_shape:
        raise DataError(
            f"{what} has images of several sizes: give the size that they are brought to, "
            "--config.data.image_size=224 (image_size=224 of data.load)."
        )
    return Images(source, np.arange(len(source)), stored_shape, image_size, as_seen)
