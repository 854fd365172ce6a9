"""The heads of one training step as a tree, and the two orders in which a strategy may run them.

Parallel heads hang on the trunk's output; a head that reads another head hangs on that one. Two rules make the
sequential order bit-identical to the joint backward (a third, an empty `.grad`, is the caller's):

1. Every head, and every head's loss, enters through a doorway, `parent.view_as(parent)`. Autograd sums whatever flows
   back into the doorway before it joins the parent's other gradients, so the sums associate alike in every order.
2. The joint order visits parents before children, the sequential one visits children last first. Autograd runs a joint
   backward in the reverse of the forward, which is then the sequential order.

Parameters that several heads share (norm, unembedding, the embedding that deepseek heads look up) are used inside each
head's own forward pass, so their gradients arrive head by head in that same order; the trunk's share comes last.

Heads are counted from 1 in names ("head 1" predicts the next token) and from 0 in indices.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_mem.model.losses import Loss

Losses = dict[int, Tensor]
Phase = Callable[[str], None]
"""Told the name of each phase as it begins."""


def no_phase(_name: str) -> None:
    """The `Phase` that does nothing."""


@dataclass(frozen=True, eq=False)
class Head:
    """A node of the tree.

    Attributes:
        index: 0-based; the head predicts token t + index + 1.
        layer: its parent's hidden states (B, S, D) -> its own (B, S, D).
        unembedding: (V, D); the same tensor in every head unless unembeddings are replicated.
        children: heads that read this head's hidden states.
    """

    index: int
    layer: Callable[[Tensor], Tensor]
    unembedding: Tensor
    children: tuple["Head", ...] = ()

    @property
    def name(self) -> str:
        """The head's name in phases and tables."""
        return f"head {self.index + 1}"


@dataclass(frozen=True, eq=False)
class Heads:
    """What a strategy gets to see of the model: everything above the cut.

    Attributes:
        roots: heads that hang on the trunk.
        norm: the final norm, hidden states (B, S, D) -> (B, S, D).
        autocast: context manager in which forward passes run (bf16-mixed), or a null context.
        phase: told the name of each phase as it begins.
        n: number of heads.
        cuda: whether CUDA's kernels run, or are predicted.
    """

    roots: tuple[Head, ...]
    norm: Callable[[Tensor], Tensor]
    autocast: Callable[[], AbstractContextManager[object]]
    phase: Phase
    n: int
    cuda: bool = False

    def hidden(self, head: Head, parent: Tensor) -> Tensor:
        """The head's hidden states (B, S, D) from its parent's."""
        self.phase(f"{head.name} forward")
        with self.autocast():
            return head.layer(parent.view_as(parent))

    def normed(self, head: Head, hidden: Tensor) -> Tensor:
        """The head's hidden states (B, S, D) after the final norm, entered through its loss's doorway."""
        self.phase(f"{head.name} loss")
        with self.autocast():
            return self.norm(hidden.view_as(hidden))

    def compute_dtype(self, hidden: Tensor) -> torch.dtype:
        """The dtype that products with these hidden states run in: autocast's, or their own."""
        kind = hidden.device.type
        with self.autocast():
            return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype

    def unembedding_uses(self) -> dict[Tensor, int]:
        """How many heads use each unembedding."""
        uses: dict[Tensor, int] = {}
        pending = list(self.roots)
        while pending:
            head = pending.pop()
            uses[head.unembedding] = uses.get(head.unembedding, 0) + 1
            pending += head.children
        return uses

    def loss(self, head: Head, hidden: Tensor, targets: Tensor, loss: Loss) -> Tensor:
        """The head's loss, 0-dim, from its hidden states and its targets (B, S)."""
        self.phase(f"{head.name} loss")
        with self.autocast():
            return loss(self.norm(hidden.view_as(hidden)), head.unembedding, targets)

    def hidden_and_loss(self, head: Head, parent: Tensor, targets: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """The head's hidden states and loss in one go, for a joint order."""
        hidden = self.hidden(head, parent)
        return hidden, self.loss(head, hidden, targets, loss)

    def backward(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """The only place where a gradient flows above the cut; skips tensors with nothing trainable below them."""
        pairs = [(t, g) for t, g in zip(tensors, gradients, strict=True) if t.requires_grad]
        if pairs:
            torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])

    def joint(self, cut: Tensor, visit: Callable[[Head, Tensor], tuple[Tensor, Tensor]]) -> list[Tensor]:
        """All heads forward, parents before children.

        Args:
            cut: the trunk's output (B, S, D), a leaf.
            visit: (head, its parent's hidden states) -> (its hidden states, its loss), graph kept.

        Returns:
            The n losses, in the order of the heads.
        """
        losses: Losses = {}
        for root in self.roots:
            self._joint(root, cut, visit, losses)
        return [losses[i] for i in range(self.n)]

    def sequential(self, cut: Tensor, loss_backward: Callable[[Head, Tensor], Tensor]) -> Tensor:
        """Head by head, forward and backward at once, children last first (Gloeckle et al. 2024, figures 2 and S11).

        Args:
            cut: the trunk's output (B, S, D), a leaf; its `.grad` is filled if it requires one.
            loss_backward: (head, its hidden states, a leaf) -> its loss, detached. Fills the leaf's `.grad`; whatever
                it needs for that, above all the head's logits, dies before the next head starts.

        Returns:
            The n losses, detached.
        """
        losses: Losses = {}
        for root in reversed(self.roots):
            self._sequential(root, cut, loss_backward, losses)
        return torch.stack([losses[i] for i in range(self.n)])

    def in_turn(self, cut: Tensor, targets: Tensor, weights: Tensor, loss: Loss) -> Tensor:
        """`sequential` with a loss that autograd differentiates: what strategies with another kernel share.

        Args:
            cut: as for `sequential`.
            targets: (n, B, S).
            weights: (n,), what each head's loss is multiplied by.
            loss: (normed hidden states (B, S, D), unembedding (V, D), targets (B, S)) -> mean loss, 0-dim.

        Returns:
            The n losses, detached.
        """

        def loss_backward(head: Head, hidden: Tensor) -> Tensor:
            found = self.loss(head, hidden, targets[head.index], loss)
            self.backward([found], [weights[head.index]])
            return found.detach()

        return self.sequential(cut, loss_backward)

    # Methods, not functions inside the two above: a nested function that calls itself is a reference cycle, and would
    # keep the trunk's output and its gradient alive until the garbage collector comes.

    def _joint(
        self, head: Head, parent: Tensor, visit: Callable[[Head, Tensor], tuple[Tensor, Tensor]], losses: Losses
    ) -> None:
        hidden, losses[head.index] = visit(head, parent)
        for child in head.children:
            self._joint(child, hidden, visit, losses)

    def _sequential(
        self, head: Head, parent: Tensor, loss_backward: Callable[[Head, Tensor], Tensor], losses: Losses
    ) -> None:
        hidden = self.hidden(head, parent)
        leaf = hidden.detach().requires_grad_(hidden.requires_grad)
        for child in reversed(head.children):
            self._sequential(child, leaf, loss_backward, losses)
        losses[head.index] = loss_backward(head, leaf)
        self.phase(f"{head.name} backward")
        self.backward([hidden], [leaf.grad])
