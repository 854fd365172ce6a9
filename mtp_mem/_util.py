"""Small helpers of every room: sizes as people read them, fingerprints, and files that are whole or not there."""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
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
def writing(path: Path) -> Iterator[None]:
    """A block that writes `path`: what the operating system refuses becomes one line that names it.

    Raises:
        BadInput: in the place of an OSError, with its reason.
    """
    try:
        yield
    except OSError as e:
        raise BadInput(f"{path}: cannot be written: {e.strerror or e}") from None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives another name beside `path` to write to; what is there takes the place of `path` at the end of the block.

    Raises:
        BadInput: it cannot be written, or is a device or a folder. Nothing is left behind then, nor where the block
            raises; what a process that was killed in here left is removed by the next one.
    """
    with writing(path):
        if os.path.lexists(path) and not os.path.isfile(path):
            raise BadInput(f"{path}: cannot be written: is no file")
        path = Path(os.path.realpath(path))
        prefix = f".mtp-mem-{fingerprint(path.name)}-"
        _remove_left(path.parent, prefix)
        handle, name = tempfile.mkstemp(".tmp", f"{prefix}{os.getpid()}-", path.parent)
        partial = Path(name)
        try:
            os.fchmod(handle, 0o666 & ~_umask())
            held(handle)
            yield partial
            partial.replace(path)
        finally:
            os.close(handle)
            with contextlib.suppress(OSError):
                partial.unlink()


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for temporary files that is gone after the block; where that is cut short, the next one removes it.

    Raises:
        BadInput: it cannot be made.
    """
    parent, prefix = Path(tempfile.gettempdir()), "mtp-mem-"
    with writing(parent):
        _remove_left(parent, prefix)
        with tempfile.TemporaryDirectory(".tmp", f"{prefix}{os.getpid()}-", ignore_cleanup_errors=True) as folder:
            handle = os.open(folder, os.O_RDONLY)
            try:
                held(handle)
                yield Path(folder)
            finally:
                os.close(handle)


def held(handle: int, wait_s: float = 0) -> bool:
    """Take a file or folder for this process alone, until it is closed; False where another one has it for so long.

    True also where the file system has no locks.
    """
    until = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.005)
        except OSError:
            return True
        else:
            return True


def _remove_left(folder: Path, prefix: str) -> None:
    """Remove our own temporary files and folders whose process has gone, and which none on another machine holds."""
    for path in folder.glob(f"{prefix}*.tmp"):
        pid = path.name.removeprefix(prefix).partition("-")[0]
        if not pid.isdecimal() or os.path.exists(f"/proc/{pid}"):
            continue
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if os.fstat(handle).st_uid == os.getuid():
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(handle)


def _umask() -> int:
    """What files of this process lack; it can be read only by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def writable(folder: Path) -> Path:
    """The folder, made if it is not there.

    Raises:
        BadInput: it cannot be made or written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder


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


def fork_context(*preload: str) -> ForkServerContext:
    """Processes that are forked from one which has imported these modules, each once.

    The first call in a process decides which modules. They are those that are installed: a clone in the current folder
    would stand in for them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before
    return context
