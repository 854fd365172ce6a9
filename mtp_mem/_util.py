"""Small helpers of every room: sizes as people read them, fingerprints, and files that are whole or not there."""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtp_mem.errors import BadInput

Progress = Callable[[str], None]
"""Told the name of each unit of work as it begins."""

KiB, MiB, GiB = 2**10, 2**20, 2**30


def format_bytes(nbytes: int) -> str:
    """Bytes in the unit that suits them, with one decimal, below ten with two."""
    for unit, name in ((GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if abs(nbytes) >= unit:
            value = nbytes / unit
            return f"{value:.{2 if abs(value) < 10 else 1}f} {name}"
    return f"{nbytes} B"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
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


def writable(folder: Path) -> Path:
    """The folder, made if it is not there.

    Raises:
        BadInput: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as e:
        raise BadInput(f"{folder}: cannot be written: {e.strerror}") from None


@contextmanager
def importing_from_here() -> Iterator[None]:
    """A block in which modules of the current folder can be imported, after what is installed.

    Only while a module is loaded that the user named: of a folder of somebody's results nothing is to run.
    """
    path = os.getcwd()
    sys.path.append(path)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.reverse()  # the last one, which is ours
            sys.path.remove(path)
            sys.path.reverse()


def fingerprint(*parts: Any) -> str:
    """A short name for a case and all that its figures depend on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
