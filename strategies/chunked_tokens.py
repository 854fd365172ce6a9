"""Sequential heads, and inside each head chunks of tokens whose gradients are computed with their loss.

    for head in heads, the last first:
        rows = norm(head(cut))
        for chunk of rows:
            logits = rows[chunk] @ unembedding.T            # one buffer, used again
            logits = softmax(logits) - onehot(targets)      # in place
            d_unembedding += logits.T @ rows[chunk]         # one accumulator for all heads
            rows[chunk] = logits @ unembedding              # the rows become their gradient
        norm.backward(rows), head.backward

Memory above the cut: one chunk of logits (chunk, V), the unembedding's gradient (fp32 for low precision), one head's
activations. FLOPs: 1, three products per head, and none twice. It needs the loss weights before the backward, which
every trainer has; the arithmetic is in mtp_mem/model/token_chunks.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_mem.errors import BadInput
from mtp_mem.model.head_tree import Head, Heads
from mtp_mem.model.token_chunks import Accumulate, RowKernel, UnembeddingGradient, default_chunk, head_loss


@dataclass(frozen=True, kw_only=True)
class ChunkedTokens:
    """Sequential, and each head's logits in chunks of tokens with their gradients: one chunk alive (no FLOP more)"""

    chunk: int | None = None  # tokens; None: by shape and device, see default_chunk
    accumulate: Accumulate = "fp32"
    rows: RowKernel = "eager"  # "compiled": softmax and targets as one kernel by torch.compile

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise BadInput(f"chunk = {self.chunk}: expected a whole number of tokens, at least 1")

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """See `mtp_mem.strategy.Strategy.backward`."""
        sums: dict[Tensor, UnembeddingGradient] = {}
        uses = heads.unembedding_uses()

        def loss_backward(head: Head, hidden: Tensor) -> Tensor:
            for done in [u for u in sums if not uses[u]]:  # replicated unembeddings: one accumulator at a time
                sums.pop(done).finish()
            unembedding = head.unembedding
            normed = heads.normed(head, hidden)  # (B, S, D)
            with torch.no_grad():
                dtype = heads.compute_dtype(normed)
                rows = normed.detach().flatten(0, -2).to(dtype)  # (N, D); `normed` itself where dtypes agree
                if normed._is_view():  # a norm that hands its input on: the cut itself must not be overwritten
                    rows = rows.clone()
                if unembedding.requires_grad and unembedding not in sums:
                    sums[unembedding] = UnembeddingGradient(unembedding, self.accumulate, heads.cuda)
                N, (V, D) = rows.shape[0], unembedding.shape
                loss = head_loss(
                    rows,
                    unembedding.detach().to(dtype),
                    targets[head.index].flatten(),
                    weights[head.index],
                    sums.get(unembedding),
                    chunk=self.chunk or default_chunk(N, D, V, dtype.itemsize, heads.cuda),
                    keep_rows=not normed.requires_grad,
                    kernel=self.rows,
                )
            uses[unembedding] -= 1
            heads.backward([normed], [rows.view_as(normed).to(normed.dtype)])
            return loss

        losses = heads.sequential(cut, loss_backward)
        for last in sums.values():  # after the head's activations are gone: the sum and its copy are both large
            last.finish()
        return losses
