"""The heads of one training step as a tree, and the few operations that every strategy is made of.

Parallel heads hang on the trunk's output; a head that reads another head hangs on that one. Two rules make the
sequential order bit-identical to the joint backward (a third, that `.grad` is empty, is up to the caller):

1. Every head, and every head's loss, reads its parent through a gradient junction, `parent.view_as(parent)`. Autograd
   sums whatever flows back into the junction before it joins the parent's other gradients, so the sums associate alike
   in every order.
2. The joint order visits parents before children, the sequential one visits children last first. Autograd runs a joint
   backward in the reverse of the forward, which is then the sequential order.

Parameters that several heads share (norm, unembedding, the embedding that deepseek heads look up) are used inside each
head's own forward pass, so their gradients arrive head by head in that same order; those from the trunk come last.

Heads are counted from 1 in names ("head 1" predicts the next token) and from 0 in indices.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtp_mem.config.schema import HeadKind
from mtp_mem.errors import BadInput
from mtp_mem.model.losses import PLAIN, Loss, LossOptions

Phase = Callable[[str], None]
"""A callback that is called with the name of each phase as it begins."""


def no_phase(_name: str) -> None:
    """The `Phase` that does nothing."""


@dataclass(frozen=True, eq=False)
class Head:
    """One head: a node of the tree.

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
        phase: called with the name of each phase as it begins.
        n: number of heads.
        cuda: whether CUDA's kernels run, or are predicted.
        draws: whether a head's forward pass draws random numbers (dropout), which a recomputation must draw again.
        options: of the loss; a loss function gets them as its argument `options` where any is set.
    """

    roots: tuple[Head, ...]
    norm: Callable[[Tensor], Tensor]
    autocast: Callable[[], AbstractContextManager[object]]
    phase: Phase
    n: int
    cuda: bool = False
    draws: bool = False
    options: LossOptions = PLAIN

    def with_loss(self, *, label_smoothing: float, z_loss: float) -> "Heads":
        """The same heads with these options of the loss; the model's own softcap stays."""
        return replace(self, options=replace(self.options, label_smoothing=label_smoothing, z_loss=z_loss))

    def hidden(self, head: Head, parent: Tensor) -> Tensor:
        """The head's hidden states (B, S, D) from its parent's."""
        self.phase(f"{head.name} forward")
        with self.autocast():
            return head.layer(parent.view_as(parent))

    def normed(self, head: Head, hidden: Tensor) -> Tensor:
        """The head's hidden states (B, S, D) after the final norm, read through the junction of its loss."""
        self.phase(f"{head.name} loss")
        with self.autocast():
            return self.norm(hidden.view_as(hidden))

    def loss(self, head: Head, hidden: Tensor, targets: Tensor, loss_fn: Loss) -> Tensor:
        """The head's loss by `loss_fn`, 0-dim, from its hidden states (B, S, D) and its targets (B, S)."""
        self.phase(f"{head.name} loss")
        if self.options.used:
            loss_fn = partial(loss_fn, options=self.options)
        with self.autocast():
            return loss_fn(self.norm(hidden.view_as(hidden)), head.unembedding, targets)

    def backward(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Backpropagate from those tensors that require a gradient: the only call that does so above the cut."""
        pairs = [(t, g) for t, g in zip(tensors, gradients, strict=True) if t.requires_grad]
        if pairs:
            torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])


def tree(kind: HeadKind, layers: Sequence[Callable[[Tensor], Tensor]], unembeddings: Sequence[Tensor]) -> list[Head]:
    """The roots of the tree: the heads that read the trunk's output, with the heads that read them."""
    n = len(layers)
    if kind in ("causal", "anticausal", "deepseek"):
        below: tuple[Head, ...] = ()
        for i in range(n) if kind == "anticausal" else reversed(range(n)):  # from the far end towards the trunk
            below = (Head(i, layers[i], unembeddings[i], below),)
        return list(below)
    return [Head(i, layers[i], unembeddings[i]) for i in range(n)]


def keep_inputs(z: Tensor, inputs: object) -> Tensor:
    """Keep on the trunk's output z what the heads of the same step need of the trunk's inputs; returns z."""
    z.mtp_inputs = inputs  # type: ignore[attr-defined]
    return z


def kept_inputs(z: Tensor) -> Any:
    """What `keep_inputs` kept on z.

    Raises:
        BadInput: z is not the tensor that the trunk returned.
    """
    try:
        return z.mtp_inputs  # type: ignore[attr-defined]
    except AttributeError:
        raise BadInput(
            "heads(z): z is not the tensor that this step's trunk(...) returned; expected that tensor itself"
        ) from None
