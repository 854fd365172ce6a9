"""Small helpers of every package: sizes for display, fingerprints, and files that are written whole or not at all."""

import contextlib
import fcntl
import gc
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
"""A callback that gets the name of each unit of work as it begins."""

KiB, MiB, GiB = 2**10, 2**20, 2**30


@contextmanager
def without_collections() -> Iterator[None]:
    """A block without garbage collection, which costs time, and in a step would free what a reference cycle holds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def format_bytes(nbytes: int) -> str:
    """Bytes in the largest unit (GiB, MiB, KiB, B) that fits, with one decimal, below ten with two; B without."""
    for unit, name in ((GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if abs(nbytes) >= unit:
            value = nbytes / unit
            return f"{value:.{2 if abs(value) < 10 else 1}f} {name}"
    return f"{nbytes} B"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block that writes `path`; an OSError in it becomes an error of one line that names `path`.

    Raises:
        BadInput: in the place of an OSError, with its reason.
    """
    try:
        yield
    except OSError as e:
        raise BadInput(f"{path}: cannot be written: {e.strerror or e}") from None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` to write to; at the end of the block that file replaces `path`.

    Raises:
        BadInput: `path` cannot be written, or is a device or a folder. No temporary file is left then, nor where the
            block raises; the next write to `path` removes one that a killed process left.
    """
    with writing(path):
        if os.path.lexists(path) and not os.path.isfile(path):
            raise BadInput(f"{path}: cannot be written: not a regular file")
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


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document to `path`, whole or not at all; raises as `atomic_write` does."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(document, indent=1) + "\n")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yields a folder for temporary files, removed after the block; the next call removes one of a killed process.

    Raises:
        BadInput: the folder cannot be made, or the block raises an OSError.
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
    """Lock an open file or folder until it is closed; False where another process still has it after `wait_s` seconds.

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
    """Remove this user's temporary files and folders whose process has ended, and that no machine has locked."""
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
    """This process's umask, which can be read only by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def writable(folder: Path) -> Path:
    """The folder, made if it is not there, after a test that files can be written in it.

    Raises:
        BadInput: it cannot be made or written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder


@contextmanager
def importing_from_here() -> Iterator[None]:
    """A block in which modules of the current folder can be imported; installed ones come first.

    Only for loading a module that the user named: a folder of somebody's results may hold code, which must not run.
    What it prints goes to stderr.
    """
    path = os.getcwd()
    sys.path.append(path)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.reverse()  # `remove` takes the first: the last is ours
            sys.path.remove(path)
            sys.path.reverse()


def fingerprint(*parts: Any) -> str:
    """16 hex digits that name these parts: a case and all that its figures depend on, say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fork_context(*preload: str) -> ForkServerContext:
    """A multiprocessing context whose processes are forked from a server that has imported the modules `preload`.

    The first call in a process starts the server and decides which modules. PYTHONSAFEPATH keeps a clone in the current
    folder from standing in for the installed ones.
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
