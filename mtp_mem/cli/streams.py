"""Standard streams in any state: closed, full, without a reader, or in an encoding that lacks a character.

Results alone reach stdout: while a command runs, whatever else writes to file descriptor 1 (a strategy, a library, a
process that they start) lands on stderr. Output that has no reader is dropped; results that could not be written are
an error.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Stream(io.TextIOWrapper):
    """Text to a file descriptor that never raises: `error` is what happened to the first write that failed."""

    error: OSError | None = None

    @staticmethod
    def on(fd: int, like: TextIO | None) -> "Stream":
        """A stream that writes to `fd` as `like` does, and escapes what its encoding lacks."""
        return Stream(
            io.BufferedWriter(io.FileIO(fd, "w", closefd=False)),
            encoding=getattr(like, "encoding", None) or "utf-8",
            errors="backslashreplace",
            line_buffering=bool(getattr(like, "line_buffering", True)),
        )

    def write(self, text: str) -> int:
        """Write the text; once a write has failed, drop it."""
        try:
            return super().write(text)
        except OSError as e:
            self._drop(e)
            return len(text)

    def flush(self) -> None:
        """Write out the buffer."""
        try:
            super().flush()
        except OSError as e:
            self._drop(e)

    @property
    def lost(self) -> str:
        """Why something was not written; empty where all was, or where the reader has gone (`| head`, say)."""
        return "" if self.error is None or self.error.errno == errno.EPIPE else str(self.error.strerror)

    def _drop(self, error: OSError) -> None:
        """Send the rest to /dev/null: the interpreter would try to write it again at exit, and complain."""
        self.error = self.error or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        super().flush()


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """A block in which stdout and stderr can be written, whatever they are, and only results reach stdout.

    Where other objects stand in their place already, as in tests, nothing is changed.
    """
    if sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__:
        yield
        return
    _open_closed()
    before = sys.stdout, sys.stderr
    _flush(*before)
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout, sys.stderr = Stream.on(results, before[0]), Stream.on(2, before[1])
    try:
        yield
    finally:
        _flush(sys.stdout, sys.stderr, *before)
        os.dup2(results, 1)
        os.close(results)
        sys.stdout, sys.stderr = before


def lost_results() -> str:
    """Why what was printed to stdout could not all be written; empty where it was."""
    _flush(sys.stdout)
    return sys.stdout.lost if isinstance(sys.stdout, Stream) else ""


def _open_closed() -> None:
    """Open closed standard streams on /dev/null: the next file opened would take their number, and their output."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is fd


def _flush(*streams: Any) -> None:
    for stream in streams:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
