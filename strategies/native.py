"""Sequential heads with PyTorch's own `linear_cross_entropy` (from torch 2.13 on): token chunks, gradient in forward.

    for head in heads, the last first:  F.linear_cross_entropy(rows, unembedding, options=...).backward()

`policy` decides how sums are accumulated; "auto" is PyTorch's choice by device and dtype (2.14 has no "balanced").
Memory above the cut: one chunk of logits, an unembedding gradient beside the accumulated one. FLOPs: 1. The returned
loss is as precise as the model's dtype: in bf16 its value is rounded to 8 bits (`rounds_loss`), which the gradients do
not see. Small chunks make that worse: in bf16 on a CPU, in chunks of 2 tokens out of 512, losses were 9 % off, and the
unembedding's gradient was 2.8 times as far from the oracle as naive's, under every policy (`error_factor`). The
operator has no softcap and no z-loss. With label smoothing it makes all logits at once, so that is refused as well.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_mem.errors import BadInput, Missing
from mtp_mem.model.losses import IGNORE, LossOptions
from mtp_mem.strategies.library_kernel import LibraryKernel
from mtp_mem.strategy import KernelLimits


@dataclass(frozen=True, kw_only=True)
class Native(LibraryKernel):
    """Sequential with torch's own linear_cross_entropy: token chunks, a library's kernel (needs torch 2.13)"""

    tokens: int | None = None  # per chunk; None: PyTorch's choice
    policy: Literal["auto", "accurate", "balanced", "compact"] = "auto"
    limits: ClassVar[KernelLimits] = KernelLimits(
        rounds_loss=True,
        error_factor=2.0,
        not_predicted="torch chooses chunk and sums by device inside its operator, and there is no CUDA device here",
    )

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise BadInput(f"tokens = {self.tokens}: expected a whole number of tokens, at least 1")
        if not hasattr(F, "linear_cross_entropy"):
            raise Missing(f"strategy 'native' needs torch 2.13 or newer; here is torch {torch.__version__}")
        try:
            torch.nn.LinearCrossEntropyOptions(batch_chunk_size=self.tokens, acc_policy=self.policy)
        except ValueError as e:  # "balanced" is gone from torch 2.14 on
            raise BadInput(f"policy = {self.policy!r}: torch {torch.__version__} says: {e}") from None

    def kernel_loss(self, rows: Tensor, unembedding: Tensor, targets: Tensor, _: LossOptions) -> Tensor:
        """See `LibraryKernel.kernel_loss`."""
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=self.tokens, acc_policy=self.policy)
        return F.linear_cross_entropy(rows, unembedding, targets, reduction="sum", ignore_index=IGNORE, options=options)
