"""Every head recomputed as a whole: layer, norm, unembedding and loss inside one checkpoint.

    for head in heads:  losses[head] = checkpoint(head_and_loss, cut)    # keeps only its input
    backward(sum(weights * losses))                                      # recomputes one head at a time

The loss must be inside: a checkpoint around the projection alone still saves every head's log-softmax (N, V), which is
what fills the memory (a published recipe does just that and saves nothing).

Memory above the cut: 3 tensors (N, V) of the loss dtype and one head layer's activations, as with `sequential`.
FLOPs: 4/3 of every head, its layer included. It fits where only a single backward call is possible.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mtp_mem.model.head_tree import Head, Heads
from mtp_mem.model.losses import VOCAB_CHUNK, LossName, named


@dataclass(frozen=True, kw_only=True)
class Checkpointed:
    """One joint backward that recomputes each head with its loss: one head's logits alive (4/3 of the head's FLOPs)"""

    loss: LossName = "full"
    chunk: int = VOCAB_CHUNK  # of loss=chunked_vocab

    def __post_init__(self) -> None:
        named(self.loss, self.chunk)

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """See `mtp_mem.strategy.Strategy.backward`."""
        loss = named(self.loss, self.chunk)

        def visit(head: Head, parent: Tensor) -> tuple[Tensor, Tensor]:
            # Heads draw no random numbers, so there is no generator state to keep.
            hidden, head_loss = checkpoint(
                heads.hidden_and_loss,
                head,
                parent,
                targets[head.index],
                loss,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            return hidden, head_loss

        losses = heads.joint(cut, visit)
        heads.phase("heads backward")
        heads.backward(losses, weights.unbind())
        return torch.stack(losses).detach()
