"""Sequential heads with quack's chunked linear cross entropy (CuTe): token chunks, gradient in the forward pass.

    for head in heads, the last first:  chunked_linear_cross_entropy(rows, unembedding).backward()

The kernel sums the unembedding's gradient in fp32. V, D and the number of tokens must be multiples of 8; fp32 rows
would be multiplied in tf32 and are refused. Memory above the cut: one chunk of logits, an unembedding gradient beside
the accumulated one. FLOPs: 1. Not run yet: it needs a CUDA device.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mtp_mem.errors import BadInput
from mtp_mem.model.losses import IGNORE, LossOptions
from mtp_mem.strategies.library_kernel import LibraryKernel
from mtp_mem.strategy import KernelLimits


@dataclass(frozen=True, kw_only=True)
class Quack(LibraryKernel):
    """Sequential with quack's chunked loss: token chunks in CuTe, fp32 sums (needs CUDA and quack-kernels)"""

    module: ClassVar[str] = "quack.linear_cross_entropy"
    package: ClassVar[str] = "quack-kernels"
    limits: ClassVar[KernelLimits] = KernelLimits(dtypes=(torch.bfloat16, torch.float16), multiple_of=8)
    chunk: int = 4096  # tokens

    def __post_init__(self) -> None:
        if self.chunk < 8 or self.chunk % 8:
            raise BadInput(f"chunk = {self.chunk}: expected a multiple of 8, at least 8")
        self.library()

    def kernel_loss(self, rows: Tensor, unembedding: Tensor, targets: Tensor, _: LossOptions) -> Tensor:
        """See `LibraryKernel.kernel_loss`."""
        return self.library().chunked_linear_cross_entropy(  # type: ignore[no-any-return]
            rows, unembedding, targets, chunk_size=self.chunk, ignore_index=IGNORE, reduction="sum"
        )
