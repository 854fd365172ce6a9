"""The floor under every strategy: the same training step in which no head makes any logits.

It trains nothing: each head's loss is replaced by a gradient of ones. What is left is what no ordering of heads and no
chunking can save: the trunk, one head's activations at a time, every parameter's gradient, the optimizer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_mem.model.head_tree import Head, Heads


@dataclass(frozen=True)
class NoLogits:
    """Shaped like a strategy so that the instruments can run it; its gradients are wrong, so it is not in the list."""

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:  # noqa: ARG002
        """Sequential over the tree; the unembedding's gradient is made, and no tensor with V columns."""

        def loss_backward(head: Head, hidden: Tensor) -> Tensor:
            heads.phase(f"{head.name} loss")
            with heads.autocast():
                rows = heads.norm(hidden.view_as(hidden))  # (B, S, D)
            unembedding = head.unembedding
            if unembedding.requires_grad and unembedding.grad is None:
                unembedding.grad = torch.zeros_like(unembedding)  # (V, D)
            heads.backward([rows], [torch.ones_like(rows)])
            return weights.new_zeros(())

        return heads.sequential(cut, loss_backward)
