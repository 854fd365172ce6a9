"""Sequential heads with Liger-Kernel's fused linear cross entropy (Triton): token chunks, gradient in the forward pass.

    for head in heads, the last first:  liger_fused_linear_cross_entropy(rows, unembedding).backward()

`accum_dtype` sums the unembedding's gradient in fp32; its default sums in the weight's dtype and loses accuracy with
every chunk (Liger #512, #827). Memory above the cut: one chunk of logits, an unembedding gradient beside the
accumulated one. FLOPs: 1. Not run yet: it needs a CUDA device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_mem.data import IGNORE
from mtp_mem.heads import Heads
from mtp_mem.kernels_here import flat, library
from mtp_mem.losses import loss_dtype


@dataclass(frozen=True, kw_only=True)
class Liger:
    """Sequential with Liger-Kernel's fused loss: token chunks in Triton, fp32 sums (needs CUDA and liger-kernel)"""

    def __post_init__(self) -> None:
        library("liger", "liger_kernel.transformers.functional", "liger-kernel")

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """See `mtp_mem.strategy.Strategy.backward`."""
        return heads.in_turn(cut, targets, weights, self.loss)

    def loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of one head over its valid targets, 0-dim in the loss dtype."""
        kernel = library("liger", "liger_kernel.transformers.functional", "liger-kernel")
        rows, weight, wanted, count = flat(hidden, unembedding, targets)
        total = kernel.liger_fused_linear_cross_entropy(
            rows, weight, wanted, ignore_index=IGNORE, reduction="sum", accum_dtype=torch.float32
        )
        return total.to(loss_dtype(hidden.dtype)) / count  # type: ignore[no-any-return]
