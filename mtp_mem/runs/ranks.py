"""Jobs that all ranks of a process group run together, each rank a process of this machine.

A rank that raises, dies or hangs would leave the others waiting in a collective. So it ends its group: the job is
answered with what happened to it, and a new group runs the jobs that are left.
"""

import contextlib
import gc
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtp_mem._util import Progress, fork_context
from mtp_mem.environment import require_deterministic
from mtp_mem.errors import Missing, MtpMemError, one_line
from mtp_mem.runs.bench import failure

TIMEOUT_S = 600
"""Seconds without a message from the ranks after which a group is ended."""

IMPORTED = ("torch.distributed.fsdp", "torch._dynamo")
"""Modules that every rank would import, for FSDP2 and for its first optimizer."""

Work = Callable[[Any, Progress], Any]
"""(job, progress callback) -> answer; called on every rank, and rank 0's answer counts."""


@dataclass(frozen=True)
class Group:
    """The ranks of a process group, processes of this machine.

    Attributes:
        world: how many.
        device_type: "cpu": gloo; "cuda": NCCL, and rank r has device r.
        timeout_s: seconds without a message from the ranks after which the group is ended.

    Raises:
        Missing: there are fewer CUDA devices than ranks.
    """

    world: int
    device_type: str = "cpu"
    timeout_s: float = TIMEOUT_S

    def __post_init__(self) -> None:
        there = torch.cuda.device_count() if self.device_type == "cuda" else self.world
        if there < self.world:
            raise Missing(
                f"{self.world} ranks on CUDA need {self.world} devices, there are {there}; --device cpu needs none"
            )

    def run(
        self, make: Callable[[], Work], jobs: Sequence[Any], progress: Progress = lambda _: None
    ) -> Iterator[tuple[Any, Any]]:
        """Each job with its answer, or with a record's fields that say how it failed, as each ends.

        Args:
            make: called once on every rank of a group, after it has joined; must be picklable, as the jobs must.
            jobs: run in this order.
            progress: told what rank 0 is doing.
        """
        left = list(jobs)
        while left:
            for answer in self._until_failure(make, tuple(left), progress):
                yield left.pop(0), answer

    def _until_failure(self, make: Callable[[], Work], jobs: tuple[Any, ...], progress: Progress) -> Iterator[Any]:
        """The answers of one group: of all jobs, or up to the one that failed, whose failure is the last."""
        context = fork_context(__name__, *IMPORTED)
        pipes: dict[Connection, int] = {}
        processes: list[Any] = []
        answered, heard = 0, time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mtp_mem-ranks-") as folder:
            try:
                for rank in range(self.world):
                    own, its = context.Pipe(duplex=False)
                    arguments = (self, rank, str(Path(folder) / "store"), its, make, jobs, _Settings.of_this_process())
                    processes.append(context.Process(target=_rank, args=arguments, daemon=True))
                    processes[-1].start()
                    its.close()
                    pipes[own] = rank
                while answered < len(jobs):
                    for kind, rank, content in _messages(pipes, timeout_s=0.5):
                        heard = time.monotonic()
                        if kind == "doing":
                            progress(content)
                        elif kind == "answer":
                            answered += 1
                            yield content
                        elif kind == "gone":
                            yield {"status": "error", "error": f"rank {rank} ended with {_how(processes[rank])}"}
                            return
                        else:
                            yield content | {"error": f"rank {rank}: {content['error']}"}
                            return
                    if time.monotonic() - heard > self.timeout_s:
                        why = f"no rank answered within {self.timeout_s:g} s; all were ended"
                        yield {"status": "error", "error": why}
                        return
            finally:
                for process in processes:
                    process.join(timeout=5 if answered == len(jobs) else 0)
                    process.kill()
                    process.join()


def _messages(pipes: dict[Connection, int], timeout_s: float) -> list[tuple[str, int, Any]]:
    """What the ranks have sent, each message with its kind and rank: answers, then what ended a group.

    A rank that is gone comes before one that failed: the others fail in its collectives.
    """
    messages: list[tuple[str, int, Any]] = []
    ready: Any = wait(list(pipes), timeout_s)
    while ready:
        for connection in ready:
            rank = pipes[connection]
            try:
                kind, content = connection.recv()
            except (EOFError, OSError):
                kind, content = "gone", None
            messages.append((kind, rank, content))
            if kind in ("gone", "done"):
                del pipes[connection]
        ends = any(kind in ("gone", "failed") for kind, *_ in messages)
        ready = wait(list(pipes), 0.2 if ends else 0)
    order = ("doing", "answer", "gone", "failed")
    return sorted((m for m in messages if m[0] != "done"), key=lambda message: order.index(message[0]))


class RankFailed(MtpMemError):
    """A rank of torchrun's cannot go on, and so none can."""

    exit_code = 1


@dataclass(frozen=True)
class Joined:
    """torchrun's process group, of which this process is a rank.

    Any failure ends the run, because torchrun then ends all ranks.
    """

    rank: int
    world: int

    @staticmethod
    def by_environment(device_type: str) -> "Joined":
        """Join the group that the environment names; on CUDA its device is LOCAL_RANK."""
        if device_type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        join(device_type)
        return Joined(dist.get_rank(), dist.get_world_size())

    def agreed(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def run(
        self, make: Callable[[], Work], jobs: Sequence[Any], progress: Progress = lambda _: None
    ) -> Iterator[tuple[Any, Any]]:
        """As `Group.run`.

        Raises:
            RankFailed: this rank's work raised. The other ranks wait until torchrun ends them.
        """
        work = make()
        for job in jobs:
            try:
                answer = work(job, progress)
            except (Exception, SystemExit) as e:
                raise RankFailed(f"rank {self.rank}, {job}: {one_line(e)}; finished cases are kept") from None
            yield job, answer
            dist.barrier()


@dataclass(frozen=True)
class _Settings:
    """Settings of the parent process that a rank takes over."""

    threads: int
    deterministic: bool
    matmul_precision: str

    @staticmethod
    def of_this_process() -> "_Settings":
        deterministic = torch.are_deterministic_algorithms_enabled()
        return _Settings(torch.get_num_threads(), deterministic, torch.get_float32_matmul_precision())

    def take(self) -> None:
        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision(self.matmul_precision)
        if self.deterministic:
            require_deterministic()


def _rank(
    group: Group,
    rank: int,
    store: str,
    connection: Connection,
    make: Callable[[], Work],
    jobs: Sequence[Any],
    settings: _Settings,
) -> None:
    """A rank's process, from its beginning to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
    threading.Thread(target=_end_with_parent, args=(Path(store).parent,), daemon=True).start()
    os.dup2(2, 1)  # stdout is for our results, not for what a strategy prints
    settings.take()
    gc.freeze()  # what was imported is no garbage, and every traced step collects

    def doing(what: str) -> None:
        if rank == 0:
            connection.send(("doing", what))

    try:
        if group.device_type == "cuda":
            torch.cuda.set_device(rank)
        where: dict[str, Any] = {"init_method": f"file://{store}", "rank": rank, "world_size": group.world}
        join(group.device_type, timeout_s=group.timeout_s, **where)
        work = make()
        for job in jobs:
            answer = work(job, doing)
            if rank == 0:
                connection.send(("answer", answer))
            dist.barrier()
    except (Exception, SystemExit) as e:
        with contextlib.suppress(OSError):
            connection.send(("failed", failure(e)))
        threading.Event().wait()  # the parent ends the group; if this rank exited, others would fail and hide its error
    connection.send(("done", None))
    dist.destroy_process_group()


def join(device_type: str, *, timeout_s: float = TIMEOUT_S, **where: Any) -> None:
    """Join the process group: gloo on CPUs, NCCL on CUDA devices, with gloo for what lies on the host.

    Args:
        device_type: "cpu" or "cuda".
        timeout_s: seconds; a collective may take 60 s longer.
        where: `init_method`, `rank` and `world_size`; without them torchrun's environment variables count.
    """
    backend = "gloo" if device_type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s + 60), **where)


def _end_with_parent(folder: Path) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        shutil.rmtree(folder, ignore_errors=True)  # which the parent could not
        os._exit(1)


def _how(process: Any) -> str:
    process.join(timeout=5)
    code = process.exitcode
    if code is None:
        return "its pipe closed"
    return f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
