"""All heads forward, then one joint backward: what `sum(losses).backward()` does.

    for head in heads:  losses[head] = loss(head(cut))      # every head's logits stay alive
    backward(sum(weights * losses))

Memory above the cut: (n + 2) tensors (N, V) of the loss dtype with the full loss, and n head layers' activations.
FLOPs: 1 (three products per head). It loses as soon as V is much larger than D and n is more than one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_mem.model.head_tree import Head, Heads
from mtp_mem.model.losses import VOCAB_CHUNK, LossName, named


@dataclass(frozen=True, kw_only=True)
class Naive:
    """One joint backward over all heads: n heads' logits alive at once (the baseline)"""

    loss: LossName = "full"
    chunk: int = VOCAB_CHUNK  # of loss=chunked_vocab

    def __post_init__(self) -> None:
        named(self.loss, self.chunk)

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """See `mtp_mem.strategy.Strategy.backward`."""
        loss = named(self.loss, self.chunk)

        def visit(head: Head, parent: Tensor) -> tuple[Tensor, Tensor]:
            return heads.hidden_and_loss(head, parent, targets[head.index], loss)

        losses = heads.joint(cut, visit)
        heads.phase("heads backward")
        heads.backward(losses, weights.unbind())
        return torch.stack(losses).detach()
