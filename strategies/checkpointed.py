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

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mtp_mem.model.head_tree import Head, Heads
from mtp_mem.model.shape import Shape
from mtp_mem.strategies.naive import Naive


@dataclass(frozen=True, kw_only=True)
class Checkpointed(Naive):
    """One joint backward that recomputes each head with its loss: one head's logits alive (4/3 of the head's FLOPs)"""

    flops_factor: ClassVar[Fraction] = Fraction(4, 3)
    recomputes_layers: ClassVar[bool] = True

    def hidden_and_loss(self, heads: Heads, head: Head, parent: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See `Naive.hidden_and_loss`; here the backward computes both again."""
        return checkpoint(  # type: ignore[no-any-return]
            super().hidden_and_loss,
            heads,
            head,
            parent,
            targets,
            use_reentrant=False,
            preserve_rng_state=heads.draws,
        )

    def peak_bytes(self, shape: Shape) -> int:
        """Bytes above the cut at the heads' worst moment: one head with its full loss, as it is recomputed."""
        loss = shape.projection + shape.full_loss(summed=len(shape.turns) > 1)
        return shape.one_head(loss, joint=True)
