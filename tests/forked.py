"""`mtp-mem` in a process of its own that starts at once: forked from one that has imported everything already."""

import gc
import io
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from command_line import Ended

from mtp_mem._util import fork_context

CLOSED = Path("closed")
WAIT_S = 300  # seconds; what it waits for takes one on a quiet machine
IMPORTED = (
    *("torch", "torch._dynamo", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg"),
    *("mtp_mem.cli", "mtp_mem.runs.sweep", "mtp_mem.runs.isolated", "mtp_mem.report.build"),
)


@dataclass(frozen=True)
class Surroundings:
    """What a process finds: its working directory, streams (CLOSED, or a file), environment variables and limits."""

    folder: Path
    stdout: Path
    stderr: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[int, int] = field(default_factory=dict)  # resource.RLIMIT_... -> bytes
    hangup_ignored: bool = False


def start(
    folder: Path,
    *args: str,
    stdout: Path | None = None,
    stderr: Path | None = None,
    variables: Mapping[str, str] | None = None,
    limits: Mapping[int, int] | None = None,
    hangup_ignored: bool = False,
) -> BaseProcess:
    """Start the command with `folder` as the working directory; by default its streams are files beside the folder."""
    out, err = (folder.with_name(f"{folder.name}.{name}") for name in ("out", "err"))
    around = Surroundings(folder, stdout or out, stderr or err, variables or {}, limits or {}, hangup_ignored)
    process = fork_context(*IMPORTED).Process(target=_command, args=(around, args))
    process.start()
    return process


def call(function: Callable[..., Any], *args: Any) -> BaseProcess:
    """Start the function in a process of its own."""
    process = fork_context(*IMPORTED).Process(target=function, args=args)
    process.start()
    return process


def run(folder: Path, *args: str, **surroundings: Any) -> Ended:
    """Run the command; its exit code is below zero where a signal ended it, 1000 where it had to be killed."""
    process = start(folder, *args, **surroundings)
    process.join(WAIT_S)
    process.kill()
    texts = []
    for name in ("stdout", "stderr"):
        path = surroundings.get(name) or folder.with_name(f"{folder.name}.{name[3:]}")
        texts.append(path.read_text(errors="surrogateescape") if path.is_file() else "")
    return Ended(process.exitcode if process.exitcode is not None else 1000, *texts)


def _command(around: Surroundings, args: tuple[str, ...]) -> None:
    """In the new process: do what a shell and the interpreter's start do, then run the command."""
    gc.freeze()  # a collection would copy every page of what was imported
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a test run in the background
    os.chdir(around.folder)
    os.environ.update(around.variables)
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")
    for fd, name in ((1, "stdout"), (2, "stderr")):
        path: Path = getattr(around, name)
        if path == CLOSED:
            os.close(fd)
            stream = None
        else:
            opened = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if path.is_file() else 0), 0o666)
            os.dup2(opened, fd)
            os.close(opened)
            stream = io.TextIOWrapper(io.BufferedWriter(io.FileIO(fd, "w", closefd=False)), encoding, errors or None)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    for limit, nbytes in around.limits.items():
        resource.setrlimit(limit, (nbytes, nbytes))
    signal.signal(signal.SIGHUP, signal.SIG_IGN if around.hangup_ignored else signal.SIG_DFL)
    from mtp_mem.cli import main

    sys.exit(main(args))
