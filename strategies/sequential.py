"""Head by head, forward and backward at once: the schedule of Gloeckle et al. 2024, figure 2.

    for head in heads, the last first:
        hidden = head(cut)
        loss(hidden).backward()         # this head's logits are made and die here
        hidden.backward(hidden.grad)    # adds to cut.grad, frees the head's activations

Memory above the cut: 3 tensors (N, V) of the loss dtype and one head layer's activations, whatever n is; from the
second head on, one unembedding gradient (V, D) beside the accumulated one. Where heads read heads (causal, anticausal,
deepseek) the layers of a chain all run forward first: still one head's logits, but every head layer's activations until
its turn comes (figure S11). FLOPs: 1, no more than the joint backward.
The gradients are bit-identical to the joint backward's: see mtp_mem/model/head_tree.py.
"""

from dataclasses import dataclass

from torch import Tensor

from mtp_mem.model.head_tree import Head, Heads
from mtp_mem.model.losses import VOCAB_CHUNK, LossName, named


@dataclass(frozen=True, kw_only=True)
class Sequential:
    """Each head forward and backward at once, last head first: one head's logits alive (the paper's schedule)"""

    loss: LossName = "full"
    chunk: int = VOCAB_CHUNK  # of loss=chunked_vocab

    def __post_init__(self) -> None:
        named(self.loss, self.chunk)

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """See `mtp_mem.strategy.Strategy.backward`."""
        head_loss = named(self.loss, self.chunk)

        def loss_backward(head: Head, hidden: Tensor) -> Tensor:
            loss = heads.loss(head, hidden, targets[head.index], head_loss)
            heads.backward([loss], [weights[head.index]])
            return loss.detach()

        return heads.sequential(cut, loss_backward)
