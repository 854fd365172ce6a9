"""Sequential heads with quack's chunked linear cross entropy (CuTe): token chunks, gradient in the forward pass.

    for head in heads, the last first:  chunked_linear_cross_entropy(rows, unembedding).backward()

Sums the unembedding's gradient in fp32. V, D and the number of tokens must be multiples of 8; fp32 rows would be
multiplied in tf32 and are not taken. Memory above the cut: one chunk of logits, an unembedding gradient beside the
accumulated one. FLOPs: 1. Not run yet: it needs a CUDA device.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mtp_mem.data import IGNORE
from mtp_mem.errors import BadInput
from mtp_mem.limits import Limits
from mtp_mem.model.head_tree import Heads
from mtp_mem.model.losses import loss_dtype
from mtp_mem.strategies.library_kernel import flat, library

LIBRARY = ("quack", "quack.linear_cross_entropy", "quack-kernels")


@dataclass(frozen=True, kw_only=True)
class Quack:
    """Sequential with quack's chunked loss: token chunks in CuTe, fp32 sums (needs CUDA and quack-kernels)"""

    chunk: int = 4096  # tokens

    limits: ClassVar[Limits] = Limits(dtypes=(torch.bfloat16, torch.float16), multiple_of=8)

    def __post_init__(self) -> None:
        if self.chunk < 8 or self.chunk % 8:
            raise BadInput(f"chunk = {self.chunk}: expected a multiple of 8, at least 8")
        library(*LIBRARY)

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """See `mtp_mem.strategy.Strategy.backward`."""
        return heads.in_turn(cut, targets, weights, self.loss)

    def loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of one head over its valid targets, 0-dim in the loss dtype."""
        kernel = library(*LIBRARY)
        rows, weight, wanted, count = flat(hidden, unembedding, targets, self.limits)
        total = kernel.chunked_linear_cross_entropy(
            rows, weight, wanted, chunk_size=self.chunk, ignore_index=IGNORE, reduction="sum"
        )
        return total.to(loss_dtype(hidden.dtype)) / count  # type: ignore[no-any-return]
