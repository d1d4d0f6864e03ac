"""Files that are never half written."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def replaced(path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A new file that takes the place of `path` when the context ends without an error: the old content or the new, whatever
    happens, never a part.

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
