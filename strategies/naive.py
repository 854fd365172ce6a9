"""All heads forward, then one joint backward: what `sum(losses).backward()` does.

    for head in heads:  losses[head] = loss(head(cut))      # every head's logits stay alive
    backward(sum(weights * losses))

Memory above the cut: (n + 2) tensors (N, V) of the loss dtype, and n head layers' activations.
FLOPs: 1, the unit of the others (three products per head). Where V is much larger than D and n is more than one, every
other strategy needs less memory.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from mtp_mem.model.head_tree import Head, Heads
from mtp_mem.model.losses import LOSS_OPTIONS, full
from mtp_mem.model.shape import Shape


@dataclass(frozen=True, kw_only=True)
class Naive:
    """One joint backward over all heads: n heads' logits alive at once (the baseline)"""

    flops_factor: ClassVar[Fraction] = Fraction(1)
    loss_options: ClassVar[tuple[str, ...]] = LOSS_OPTIONS

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """See `mtp_mem.strategy.Strategy.backward`."""
        losses: dict[int, Tensor] = {}
        for root in heads.roots:
            self.head_forward(heads, root, cut, targets, losses)
        joint = [losses[index] for index in range(heads.n)]
        heads.phase("heads backward")
        heads.backward(joint, weights.unbind())
        return torch.stack(joint).detach()

    def head_forward(
        self, heads: Heads, head: Head, parent: Tensor, targets: Tensor, losses: dict[int, Tensor]
    ) -> None:
        """Run one head and its loss, their graph kept, then its children: parents before children.

        Args:
            heads: all heads.
            head: the one to run.
            parent: hidden states (B, S, D) that it reads.
            targets: (n, B, S).
            losses: 0-dim, by head index; this head's and its children's are added.
        """
        hidden, losses[head.index] = self.hidden_and_loss(heads, head, parent, targets[head.index])
        for child in head.children:
            self.head_forward(heads, child, hidden, targets, losses)

    def hidden_and_loss(self, heads: Heads, head: Head, parent: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The head's hidden states (B, S, D) and its 0-dim loss for targets (B, S), from its parent's hidden states."""
        hidden = heads.hidden(head, parent)
        return hidden, heads.loss(head, hidden, targets, full)

    def peak_bytes(self, shape: Shape) -> int:
        """Bytes above the cut at the heads' worst moment.

        n heads are kept. Autograd then frees them one by one, while the gradients they leave grow: the worst turn.
        """
        moments, turns = [], shape.turns
        for finished, index in enumerate(turns):
            kept = sum(shape.head(waiting) + shape.projection for waiting in turns[finished:])
            logits = (len(turns) - finished - 1) * shape.logits + shape.full_loss(summed=finished > 0)
            moments.append(kept + logits + shape.left_behind(shape.n - 1 - index, joint=True))
        return max(moments)
