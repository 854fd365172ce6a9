"""A chunk's row work as one compiled kernel: logits become probabilities minus the one-hot targets in place.

In low precision it needs no block of rows in fp32: a row is widened in registers. It is an operator of its own, so that
whoever watches operators (the tracker, fake tensors) sees one that makes a number, as on the device.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from mtp_mem.model.losses import loss_dtype

RowWork = Callable[[Tensor, Tensor, Tensor], Tensor]
COMPILATIONS = 64
"""Torch compiles again for each dtype and class of sizes, and by default gives up at the eighth."""


@cache
def compiled_rows() -> RowWork:
    """(logits (c, V), targets as columns (c, 1), shares of the mean (c,)) -> sum of the rows' losses, 0-dim.

    Compiled when first called with each dtype, which takes seconds and, on a CPU, a C++ compiler. Any c and V.
    """
    kernel = torch.compile(_rows, dynamic=True, fullgraph=True)

    @torch.library.custom_op("mtp_mem::softmax_minus_onehot", mutates_args=("logits",))
    def operator(logits: Tensor, column: Tensor, share: Tensor) -> Tensor:
        wanted = logits.gather(
            1, column
        )  # (c, 1), out here: torch 2.11 compiles it to after the logits are overwritten
        with torch._dynamo.config.patch(recompile_limit=COMPILATIONS):
            return kernel(logits, wanted, column, share)

    @operator.register_fake
    def _(logits: Tensor, column: Tensor, share: Tensor) -> Tensor:  # noqa: ARG001
        return share.new_empty(())

    return operator


def _rows(logits: Tensor, wanted: Tensor, column: Tensor, share: Tensor) -> Tensor:
    wide = logits.to(loss_dtype(logits.dtype))
    top = wide.amax(dim=1, keepdim=True)  # (c, 1)
    normaliser = top + (wide - top).exp().sum(dim=1, keepdim=True).log()  # (c, 1)
    losses = (normaliser - wanted)[:, 0]  # (c,)
    hit = torch.arange(logits.shape[1], device=logits.device) == column  # (c, V), never made: it is fused
    logits.copy_((wide - normaliser).exp() - hit.to(wide.dtype))
    return torch.where(share > 0, losses * share, 0.0).sum()
