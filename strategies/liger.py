"""Sequential heads with Liger-Kernel's fused linear cross entropy (Triton): token chunks, gradient in the forward pass.

    for head in heads, the last first:  liger_fused_linear_cross_entropy(rows, unembedding).backward()

`accum_dtype` sums the unembedding's gradient in fp32; its default sums in the weight's dtype and loses accuracy with
every chunk (Liger #512, #827). Memory above the cut: one chunk of logits, an unembedding gradient beside the
accumulated one. FLOPs: 1. Checked in Triton's interpreter on a CPU (tests/kernels); not run on a GPU yet.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mtp_mem.data import IGNORE
from mtp_mem.limits import Limits
from mtp_mem.model.head_tree import Heads
from mtp_mem.model.losses import loss_dtype
from mtp_mem.strategies.library_kernel import flat, library

LIBRARY = ("liger", "liger_kernel.transformers.functional", "liger-kernel")


@dataclass(frozen=True, kw_only=True)
class Liger:
    """Sequential with Liger-Kernel's fused loss: token chunks in Triton, fp32 sums (needs CUDA and liger-kernel)"""

    limits: ClassVar[Limits] = Limits(
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        waits="the host counts its targets and looks at the upstream gradient",
    )

    def __post_init__(self) -> None:
        library(*LIBRARY, interpreted=True)

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """See `mtp_mem.strategy.Strategy.backward`."""
        return heads.in_turn(cut, targets, weights, self.loss)

    def loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of one head over its valid targets, 0-dim in the loss dtype."""
        kernel = library(*LIBRARY, interpreted=True)
        rows, weight, wanted, _ = flat(hidden, unembedding, targets, self.limits)
        # The mean, for which an upstream gradient of 1 leaves Liger's gradients as they are: a sum's would be rounded
        # once more. Where no target is valid, this library's mean is 0.
        loss = kernel.liger_fused_linear_cross_entropy(
            rows, weight, wanted, ignore_index=IGNORE, reduction="mean", accum_dtype=torch.float32
        )
        return loss.to(loss_dtype(hidden.dtype))  # type: ignore[no-any-return]
