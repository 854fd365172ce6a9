"""Refuses work that no dispatch mode sees, so that a part of a step's bytes is never shown as all of them.

A dispatch mode belongs to one thread, and torch.compile runs other operators than the source shows.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch

from mtp_mem.errors import BrokenContract

_COMPILED = ("compile_wrapper", "eval_frame.py")
_OURS = ("rich.", "tqdm.", "execnet.")  # progress bars and test runners keep threads that compute nothing
_IDLE_NS = 100_000


@contextmanager
def all_seen() -> Iterator[None]:
    """A block in which no other Python thread may compute, and torch.compile's code runs as its source shows.

    `refuse_compiled` then finds code that was meant to be compiled.

    Raises:
        BrokenContract: a thread that was started in the block used torch, or an older one used over 0.1 ms of CPU.
    """
    users: list[str] = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        module = str(frame.f_globals.get("__name__", ""))
        owner = getattr(argument, "__self__", None) if event == "c_call" else None
        if not users and (module.startswith("torch.") or str(type(owner).__module__).startswith("torch")):
            users.append(threading.current_thread().name)

    before = {thread: _used_ns(thread) for thread in _others()}
    previous = threading.getprofile()
    threading.setprofile(profile)
    try:
        with eager():
            yield
    finally:
        threading.setprofile(previous)
    users += [thread.name for thread, used_ns in before.items() if _used_ns(thread) - used_ns > _IDLE_NS]
    if users:
        raise BrokenContract(
            f"computes in a thread of its own ({users[0]}), where tensors are not counted without a GPU;"
            " compare on a CUDA device counts them"
        )


def eager() -> AbstractContextManager[Any]:
    """A block in which compiled code runs as its source shows; else torch.compile compiles dispatch modes too."""
    # Importing dynamo takes seconds; before anything imports it, nothing is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def refuse_compiled() -> None:
    """Raise if torch.compile called this code; called for an operator's output, deep in a step.

    Raises:
        BrokenContract: torch.compile's wrapper is among the callers of the operator.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == _COMPILED[0] and frame.f_code.co_filename.endswith(_COMPILED[1]):
            raise BrokenContract(
                "runs code of torch.compile, which a trace of operators does not see as it is; compare on a CUDA"
                " device counts its bytes"
            )
        frame = frame.f_back


def _others() -> list[threading.Thread]:
    return [
        thread
        for thread in threading.enumerate()
        if thread is not threading.current_thread() and not type(thread).__module__.startswith(_OURS)
    ]


def _used_ns(thread: threading.Thread) -> int:
    """CPU time of a thread in nanoseconds, 0 where the thread has ended or the system does not tell."""
    if thread.ident is None or not thread.is_alive() or not hasattr(time, "pthread_getcpuclockid"):
        return 0
    try:
        return time.clock_gettime_ns(time.pthread_getcpuclockid(thread.ident))
    except OSError:
        return 0
