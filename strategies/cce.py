"""Sequential heads with Apple's Cut Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009): logits stay on chip.

    for head in heads, the last first:  linear_cross_entropy(rows, unembedding, filter_eps=None).backward()

The kernel's gradient filter is off: it skips small values, which is an approximation (ml-cross-entropy #14). The kernel
takes no fp32 rows, and sums the gradients of rows and unembedding block by block in the rows' dtype. Memory above the
cut: a number per row, an unembedding gradient beside the accumulated one. FLOPs: 4/3. Checked in fp16 in Triton's
interpreter on a CPU (tests/kernels). On an H100 in bf16 `verify` finds its gradients too far off (docs/evidence.md).
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from mtp_mem.model.losses import IGNORE, LossOptions
from mtp_mem.strategies.library_kernel import LibraryKernel
from mtp_mem.strategy import KernelLimits


@dataclass(frozen=True, kw_only=True)
class CCE(LibraryKernel):
    """Sequential with Cut Cross-Entropy, unfiltered: logits on chip, recomputed (needs CUDA and cut-cross-entropy)"""

    flops_factor: ClassVar[Fraction] = Fraction(4, 3)
    module: ClassVar[str] = "cut_cross_entropy"
    package: ClassVar[str] = "cut-cross-entropy"
    loss_options: ClassVar[tuple[str, ...]] = ("softcap",)
    limits: ClassVar[KernelLimits] = KernelLimits(
        dtypes=(torch.bfloat16, torch.float16), waits="the host asks how many of its targets are valid"
    )

    def kernel_loss(self, rows: Tensor, unembedding: Tensor, targets: Tensor, options: LossOptions) -> Tensor:
        """See `LibraryKernel.kernel_loss`."""
        return self.library().linear_cross_entropy(  # type: ignore[no-any-return]
            rows,
            unembedding,
            targets,
            ignore_index=IGNORE,
            softcap=options.softcap,
            reduction="sum",
            filter_eps=None,
            impl="cce",
        )
