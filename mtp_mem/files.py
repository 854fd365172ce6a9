"""Files that are whole or not there, at whatever moment the process ends."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives another name beside `path` to write to; what is there takes the place of `path` at the end of the block.

    Raises:
        OSError: it cannot take the place. Nothing is left behind then, nor where the block raises.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
