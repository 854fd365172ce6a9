"""Head by head, forward and backward at once: the schedule of Gloeckle et al. 2024, figure 2.

    for head in heads, the last first:
        hidden = head(cut)
        loss(hidden).backward()         # this head's logits are made and freed inside this line
        hidden.backward(hidden.grad)    # adds to cut.grad, frees the head's activations

Memory above the cut: 3 tensors (N, V) of the loss dtype and one head layer's activations, whatever n is; from the
second head on, one unembedding gradient (V, D) beside the accumulated one. Where heads read heads (causal, anticausal,
deepseek) the layers of a chain all run forward first: still one head's logits, but every head layer's activations stay
until its own backward (figure S11). FLOPs: 1, no more than the joint backward.
The gradients are bit-identical to the joint backward's: see mtp_mem/model/head_tree.py.

Strategies that differ only in how one head's loss is computed subclass `Sequential` and override `loss`, or
`loss_backward` where they compute its gradient themselves.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from mtp_mem.model.head_tree import Head, Heads
from mtp_mem.model.losses import LOSS_OPTIONS, Loss, full
from mtp_mem.model.shape import Shape


@dataclass(frozen=True, kw_only=True)
class Sequential:
    """Each head forward and backward at once, last head first: one head's logits alive (the paper's schedule)"""

    flops_factor: ClassVar[Fraction] = Fraction(1)
    loss_options: ClassVar[tuple[str, ...]] = LOSS_OPTIONS
    loss: ClassVar[Loss] = staticmethod(full)

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """See `mtp_mem.strategy.Strategy.backward`."""
        losses: dict[int, Tensor] = {}
        for root in reversed(heads.roots):
            self.head_backward(heads, root, cut, targets, weights, losses)
        return torch.stack([losses[index] for index in range(heads.n)])

    # A method, not a function inside `backward`: a nested function that calls itself is a reference cycle, and would
    # keep the trunk's output and its gradient alive until the garbage collector comes.
    def head_backward(
        self, heads: Heads, head: Head, parent: Tensor, targets: Tensor, weights: Tensor, losses: dict[int, Tensor]
    ) -> None:
        """Run one head: its forward, then all of its children, its loss, and last its own backward (figures 2 and S11).

        Args:
            heads: all heads.
            head: the one to run.
            parent: hidden states (B, S, D) that it reads; its gradient is added to their `.grad`.
            targets: (n, B, S).
            weights: (n,), what each head's loss is multiplied by.
            losses: 0-dim, by head index; this head's and its children's are added.
        """
        hidden = heads.hidden(head, parent)  # (B, S, D)
        leaf = hidden.detach().requires_grad_(hidden.requires_grad)
        for child in reversed(head.children):
            self.head_backward(heads, child, leaf, targets, weights, losses)
        losses[head.index] = self.loss_backward(heads, head, leaf, targets[head.index], weights[head.index])
        heads.phase(f"{head.name} backward")
        heads.backward([hidden], [leaf.grad])

    def loss_backward(self, heads: Heads, head: Head, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """One head's loss and its backward down to the head's hidden states; frees the logits before it returns.

        Args:
            heads: all heads.
            head: the one whose loss it is.
            hidden: its hidden states (B, S, D), a leaf; its `.grad` is filled.
            targets: (B, S) int64.
            weight: 0-dim, what the loss is multiplied by.

        Returns:
            The unweighted loss, 0-dim, detached.
        """
        loss = heads.loss(head, hidden, targets, self.loss)
        heads.backward([loss], [weight])
        return loss.detach()

    def peak_bytes(self, shape: Shape) -> int | None:
        """Bytes above the cut at the heads' worst moment; None where there is no closed form."""
        loss = self.loss_bytes(shape)
        return None if loss is None else shape.one_head(loss)

    def loss_bytes(self, shape: Shape) -> int | None:
        """Bytes of `loss_backward` at its worst moment."""
        return shape.projection + shape.full_loss()
