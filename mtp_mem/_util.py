"""Small helpers of every room: sizes as people read them, and files that are whole or not there."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KiB, MiB, GiB = 2**10, 2**20, 2**30


def show_bytes(nbytes: int) -> str:
    """Bytes in the unit that suits them, with one decimal, below ten with two."""
    for unit, name in ((GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if abs(nbytes) >= unit:
            value = nbytes / unit
            return f"{value:.{2 if abs(value) < 10 else 1}f} {name}"
    return f"{nbytes} B"


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
