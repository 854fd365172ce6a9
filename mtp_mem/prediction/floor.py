"""The floor under every strategy: the same training step in which no head makes any logits.

The step trains nothing: each loss is replaced by a gradient of ones. What is left is what no ordering of heads and no
chunking can save: the trunk, one head's activations at a time, every parameter's gradient, the optimizer.
"""

from typing import ClassVar

import torch
from torch import Tensor

from mtp_mem.model.head_tree import Head, Heads
from mtp_mem.model.losses import LOSS_OPTIONS
from mtp_mem.strategies.sequential import Sequential


class NoLogits(Sequential):
    """Shaped like a strategy so that the instruments can run it; its gradients are wrong, so it is not registered."""

    loss_options: ClassVar[tuple[str, ...]] = LOSS_OPTIONS

    def loss_backward(self, heads: Heads, head: Head, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG002
        """Make the unembedding's gradient (V, D), zeros, and no tensor with V columns; the loss is 0."""
        rows = heads.normed(head, hidden)  # (B, S, D)
        unembedding = head.unembedding
        if unembedding.requires_grad and unembedding.grad is None:
            unembedding.grad = torch.zeros_like(unembedding)  # (V, D)
        heads.backward([rows], [torch.ones_like(rows)])
        return weight.new_zeros(())
