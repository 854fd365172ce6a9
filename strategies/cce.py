"""Sequential heads with Apple's Cut Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009): logits only ever on chip.

    for head in heads, the last first:  linear_cross_entropy(rows, unembedding, filter_eps=None).backward()

Without its gradient filter, which skips what is small and is an approximation (issue #14 there). It takes no fp32 rows,
and adds both gradients up block by block in the rows' own dtype. Memory above the cut: a number per row, an unembedding
gradient beside the accumulated one. FLOPs: 4/3. Checked in fp16 in Triton's interpreter on a CPU (tests/kernels); not
run on a GPU yet.
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

LIBRARY = ("cce", "cut_cross_entropy", "cut-cross-entropy")


@dataclass(frozen=True, kw_only=True)
class CCE:
    """Sequential with Cut Cross-Entropy, unfiltered: logits on chip, recomputed (needs CUDA and cut-cross-entropy)"""

    limits: ClassVar[Limits] = Limits(
        dtypes=(torch.bfloat16, torch.float16), waits="the host asks how many of its targets are valid"
    )

    def __post_init__(self) -> None:
        library(*LIBRARY)

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """See `mtp_mem.strategy.Strategy.backward`."""
        return heads.in_turn(cut, targets, weights, self.loss)

    def loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of one head over its valid targets, 0-dim in the loss dtype."""
        kernel = library(*LIBRARY)
        rows, weight, wanted, count = flat(hidden, unembedding, targets, self.limits)
        total = kernel.linear_cross_entropy(
            rows, weight, wanted, ignore_index=IGNORE, reduction="sum", filter_eps=None, impl="cce"
        )
        return total.to(loss_dtype(hidden.dtype)) / count  # type: ignore[no-any-return]
