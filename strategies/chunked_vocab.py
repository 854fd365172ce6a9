"""Sequential heads, and inside each head the vocabulary in slabs: no tensor (N, V) ever exists.

    for head in heads, the last first:
        for slab of the vocabulary:  update the running maximum and sum of exponentials     # online logsumexp
        for slab of the vocabulary:  recompute its logits, add its share of d_hidden, write its d_unembedding

Memory above the cut: a slab (N, chunk), two copies of the unembedding's gradient, one head layer's activations.
FLOPs: 4/3, because the logits are computed twice. It loses to token chunks where the loss weights are known in advance,
and pays off where the unembedding arrives or leaves slab by slab. The two passes are in mtp_mem/model/losses.py.
"""

from dataclasses import dataclass

from torch import Tensor

from mtp_mem.model.head_tree import Heads
from mtp_mem.model.losses import VOCAB_CHUNK, named


@dataclass(frozen=True, kw_only=True)
class ChunkedVocab:
    """Sequential, and each head's logits in slabs of the vocabulary, recomputed: one slab alive (4/3 of the FLOPs)"""

    chunk: int = VOCAB_CHUNK

    def __post_init__(self) -> None:
        named("chunked_vocab", self.chunk)

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """See `mtp_mem.strategy.Strategy.backward`."""
        return heads.in_turn(cut, targets, weights, named("chunked_vocab", self.chunk))
