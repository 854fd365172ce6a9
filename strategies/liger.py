"""Sequential heads with Liger-Kernel's fused linear cross entropy (Triton): token chunks, gradient in the forward pass.

    for head in heads, the last first:  liger_fused_linear_cross_entropy(rows, unembedding).backward()

`accum_dtype` sums the unembedding's gradient in fp32; its default sums in the weight's dtype and loses accuracy with
every chunk (Liger #512, #827). Memory above the cut: one chunk of logits, an unembedding gradient beside the
accumulated one. FLOPs: 1. Checked in Triton's interpreter on a CPU (tests/kernels), except for a softcap, and
on an H100 in bf16. The kernel's loss is logsumexp minus the target's logit: a large offset common to all logits costs
precision (in fp32 1 % of the loss at 2^20), and `verify` says so; its gradients stay right.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mtp_mem.model.losses import IGNORE, LOSS_OPTIONS, PLAIN, LossOptions, loss_dtype
from mtp_mem.strategies.library_kernel import LibraryKernel, kernel_arguments
from mtp_mem.strategy import KernelLimits


@dataclass(frozen=True, kw_only=True)
class Liger(LibraryKernel):
    """Sequential with Liger-Kernel's fused loss: token chunks in Triton, fp32 sums (needs CUDA and liger-kernel)"""

    module: ClassVar[str] = "liger_kernel.transformers.functional"
    package: ClassVar[str] = "liger-kernel"
    loss_options: ClassVar[tuple[str, ...]] = LOSS_OPTIONS
    interpreted: ClassVar[bool] = True
    limits: ClassVar[KernelLimits] = KernelLimits(
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        waits="the host counts its targets and looks at the upstream gradient",
    )

    def loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor, *, options: LossOptions = PLAIN) -> Tensor:
        """Mean cross entropy of one head over its valid targets, 0-dim in the loss dtype.

        Unlike the base class this takes the library's own mean, which is 0 where no target is valid: an upstream
        gradient of 1 leaves the library's gradients as they are, while those of a sum would be rounded once more.
        """
        rows, weight, flat_targets = kernel_arguments(hidden, unembedding, targets, self.limits)
        if weight.requires_grad and not rows.requires_grad:  # it looks only at the rows for a backward
            rows = rows.detach().requires_grad_()
        loss = self.library().liger_fused_linear_cross_entropy(
            rows,
            weight,
            flat_targets,
            ignore_index=IGNORE,
            lse_square_scale=options.z_loss,
            label_smoothing=options.label_smoothing,
            reduction="mean",
            softcap=options.softcap,
            accum_dtype=torch.float32,
        )
        return loss.to(loss_dtype(hidden.dtype))  # type: ignore[no-any-return]
