"""Jobs for tests of process groups: what a rank of another process can import."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from mtp_mem._util import Progress
from mtp_mem.runs.ranks import Work


def make() -> Work:
    """Work on jobs that are named after what goes wrong in them, on rank 1 alone."""

    def work(job: str, progress: Progress) -> str:
        progress(job)
        print("noise on stdout", flush=True)
        if dist.get_rank() == 1:
            if job == "raises":
                raise ValueError("no such thing")
            if job == "out of memory":
                raise torch.OutOfMemoryError("tried to allocate 9 GiB")
            if job == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if job == "quits":
                sys.exit(0)
            if job == "hangs":
                time.sleep(60)
        total = torch.ones(())
        dist.all_reduce(total)
        return f"{job}: {int(total)} ranks"

    return work
