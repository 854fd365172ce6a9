"""Ranks as children of one process that has imported everything: `torchrun` imports torch in every rank again.

The process that forks has run no backward pass and started no thread, so that forking it is safe.
"""

import gc
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

for name in ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "transformers"):
    __import__(name)  # what the ranks would import, each for itself
gc.collect()
gc.freeze()  # imported modules are no garbage: each trace collects twice


def on_ranks(world: int, body: Callable[[], None]) -> None:
    """Run `body` on so many gloo ranks; ends this process with exit code 1 where one of them fails."""
    sys.stdout.flush()
    with tempfile.TemporaryDirectory() as folder:
        children = [child for rank in range(world) if (child := _start(rank, world, Path(folder), body))]
        failed = [child for child in children if os.waitpid(child, 0)[1]]
    if failed:
        sys.exit(1)


def _start(rank: int, world: int, folder: Path, body: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        body()
        sys.stdout.flush()
        dist.barrier()
        dist.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)
