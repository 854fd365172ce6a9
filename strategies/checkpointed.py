"""Every head recomputed as a whole: layer, norm, unembedding and loss inside one checkpoint.

    for head in heads:  losses[head] = checkpoint(head_and_loss, cut)    # keeps only its input
    backward(sum(weights * losses))                                      # recomputes one head at a time

The loss must be inside: a checkpoint around the projection alone still keeps every head's log-softmax (N, V), which is
what fills the memory (a published recipe does just that, and its peak is no lower).

Memory above the cut: 3 tensors (N, V) of the loss dtype and one head layer's activations, as with `sequential`.
FLOPs: 4/3 of every head, its layer included. For trainers that allow only one backward call.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mtp_mem.model.head_tree import Head, Heads
from mtp_mem.model.losses import LOSS_OPTIONS, full
from mtp_mem.model.shape import Shape


@dataclass(frozen=True, kw_only=True)
class Checkpointed:
    """One joint backward that recomputes each head with its loss: one head's logits alive (4/3 of the head's FLOPs)"""

    flops_factor: ClassVar[Fraction] = Fraction(4, 3)
    loss_options: ClassVar[tuple[str, ...]] = LOSS_OPTIONS
    recomputes_layers: ClassVar[bool] = True

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
        """Run one head with its loss inside a checkpoint, then its children's: parents before children.

        Args:
            heads: all heads.
            head: the one to run.
            parent: hidden states (B, S, D) that it reads.
            targets: (n, B, S).
            losses: 0-dim, by head index; this head's and its children's are added.
        """
        hidden, losses[head.index] = checkpoint(
            hidden_and_loss,
            heads,
            head,
            parent,
            targets[head.index],
            use_reentrant=False,
            preserve_rng_state=heads.draws,
        )
        for child in head.children:
            self.head_forward(heads, child, hidden, targets, losses)

    def peak_bytes(self, shape: Shape) -> int:
        """Bytes above the cut at the heads' worst moment: one head with its full loss, as it is recomputed."""
        loss = shape.projection + shape.full_loss(summed=len(shape.turns) > 1)
        return shape.one_head(loss, joint=True)


def hidden_and_loss(heads: Heads, head: Head, parent: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The head's hidden states (B, S, D) and its 0-dim loss for targets (B, S): all that the checkpoint recomputes."""
    hidden = heads.hidden(head, parent)
    return hidden, heads.loss(head, hidden, targets, full)
