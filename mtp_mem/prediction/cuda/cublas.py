"""cuBLAS workspaces: how large they are and how long they live, by compute capability and torch's version.

PyTorch takes them from the caching allocator (aten/src/ATen/cuda/CublasHandlePool.cpp):

| torch | bytes | live |
|---|---|---|
| 2.11 | 32 MiB at capability 9, else 8,519,680 | kept for each thread and stream from its first product on |
| 2.12 to 2.14 | 32 MiB at 9, 10, 12, and from 2.14 at 11 (pull requests 175344, 189312) | the same |
| 2.15 on | the same | during each product; kept as before where TORCH_CUBLAS_WORKSPACE_CACHE=1 (194311) |

A training step runs products in two threads, forward and autograd's own, so two are kept. Public memory histories
showed 33,554,432 B at capability 9.0 and 8,519,680 B below it, two of them after a step. The changes of 2.12, 2.14 and
2.15 have not been seen on a GPU; the versions follow from the pull requests' dates, and 2.15 from its manual.
"""

import os
import re
from dataclasses import dataclass
from typing import Any

import torch

from mtp_mem._util import MiB
from mtp_mem.config.gpus import GPU

LARGE, SMALL = 32 * MiB, 8_519_680
THREADS = 2
"""Threads that run products in a training step: the forward passes' one, and autograd's for the device."""
WITH_BIAS = MiB
"""Workspace bytes of a product with a bias vector from 2.15 on, by cuBLASLt (CUBLASLT_WORKSPACE_SIZE)."""
SIZE_VARIABLE, CACHE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG", "TORCH_CUBLAS_WORKSPACE_CACHE"


@dataclass(frozen=True)
class Workspaces:
    """The cuBLAS workspaces of one target.

    Attributes:
        nbytes: bytes of one workspace.
        kept: whether each thread keeps its own; else each product takes one and gives it back.
        because: what both follow from.
    """

    nbytes: int
    kept: bool
    because: str

    def resident(self, threads: int = THREADS) -> tuple[int, ...]:
        """Bytes of each workspace that is live between steps in which so many threads run products."""
        return (self.nbytes,) * threads if self.kept else ()


def workspaces(gpu: GPU, torch_version: str = torch.__version__) -> Workspaces:
    """The rule for a target: what its entry says, else what `torch_version` does (default: the installed one)."""
    version = tuple(int(part) for part in re.findall(r"\d+", torch_version)[:2])
    reasons = [f"torch {torch_version}"]
    config = re.findall(r":(\d+):(\d+)", os.environ.get(SIZE_VARIABLE, ""))
    if gpu.workspace_bytes is not None:
        nbytes = gpu.workspace_bytes
        reasons.append("size as the GPU's entry says")
    elif config:
        nbytes = sum(int(kib) * int(count) for kib, count in config) << 10
        reasons.append(f"{SIZE_VARIABLE}={os.environ[SIZE_VARIABLE]}")
    else:
        major = int(gpu.capability.partition(".")[0])
        since = {9: (0, 0), 10: (2, 12), 11: (2, 14), 12: (2, 12)}
        nbytes = LARGE if major in since and version >= since[major] else SMALL
        reasons.append(f"compute capability {gpu.capability}")
    kept = gpu.workspaces_kept
    if kept is None:
        kept = version < (2, 15) or os.environ.get(CACHE_VARIABLE) == "1"
    return Workspaces(nbytes, kept, ", ".join(reasons))


def product_buffers(args: tuple[Any, ...], nbytes: int) -> list[int]:
    """Bytes of the buffers that a product takes where workspaces are not kept."""
    bias = isinstance(args[0], torch.Tensor) and args[0].dim() == 1
    return [WITH_BIAS if bias else nbytes]
