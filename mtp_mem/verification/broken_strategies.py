"""Wrong strategies, each with one bug, mostly a published one: what the verifier must catch.

`mtp-mem verify --prove` runs them all and fails if one of them passes. Each class says what is wrong, where it was
reported, and which scenario is made for it. The issue numbers are those of the projects named.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_mem.model.head_tree import Head, Heads
from mtp_mem.model.losses import IGNORE, full, loss_dtype
from mtp_mem.strategies.sequential import Sequential
from mtp_mem.strategy import load_strategy


class Broken(Sequential):
    """A strategy with a known bug: Sequential, but for the method that a subclass overrides."""

    origin: ClassVar[str] = "no report known to us"
    caught_by: ClassVar[str]

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """As Sequential, with the bug."""
        losses = super().backward(cut, heads, targets, self._weights(cut, targets, weights))
        self._after(cut, heads, losses)
        return losses

    def loss_backward(self, heads: Heads, head: Head, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """As Sequential, with the bug."""
        loss = heads.loss(head, hidden, targets, self._loss)
        heads.backward([loss], [weight])
        return loss.detach()

    def _weights(self, cut: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """The loss weights (n,) to use."""
        return weights

    def _loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        """One head's loss, 0-dim."""
        return full(hidden, unembedding, targets)

    def _after(self, cut: Tensor, heads: Heads, losses: Tensor) -> None:
        """What is done at the end to what the step leaves."""


def flat_logits(hidden: Tensor, unembedding: Tensor) -> Tensor:
    """Logits (N, V) in the loss dtype."""
    return F.linear(hidden, unembedding).flatten(0, -2).to(loss_dtype(hidden.dtype))


def masked_mean(each: Tensor, targets: Tensor) -> Tensor:
    """The mean of each token's loss (N,) over those that have a target."""
    valid = targets.flatten() != IGNORE
    return torch.where(valid, each, 0).sum() / valid.sum().clamp(min=1)


def target_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """The target's logit of each token (N,)."""
    return logits.gather(1, targets.flatten().clamp(min=0)[:, None])[:, 0]


class RetainGraph(Broken):
    """A backward per head with retain_graph and no detach, then the trunk's: the cut's gradient counts twice"""

    origin = "a recipe in circulation for the paper's schedule"
    caught_by = "n = 3"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Doubles cut.grad, as z.backward(z.grad) does where the heads were never detached from z."""
        losses = load_strategy("naive").backward(cut, heads, targets, weights)
        if cut.grad is not None:
            torch.autograd.backward(cut.view_as(cut), cut.grad)
        return losses


class ScaleIgnored(Broken):
    """The upstream gradient is taken to be 1"""

    origin = "Fast-LLM and torchtitan's loss bridge; DeepSpeed tiled loss; Liger #968"
    caught_by = "upstream scale 0.37"

    def _weights(self, cut: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return torch.ones_like(weights)


class HeadSkipped(Broken):
    """One head never runs its backward"""

    origin = "Liger PR #325"
    caught_by = "n = 3"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """The first head's loss is computed and left at that."""
        losses = {}
        for root in reversed(heads.roots):
            loss = heads.loss(root, heads.hidden(root, cut), targets[root.index], full)
            if root.index > 0 or heads.n == 1:
                heads.backward([loss], [weights[root.index]])
            losses[root.index] = loss.detach()
        return torch.stack([losses.get(i, cut.new_zeros((), dtype=weights.dtype)) for i in range(heads.n)])


class LastHeadOffByOne(Broken):
    """The last head is trained on the targets of the one before it"""

    origin = "Megatron-LM #1661, #1675"
    caught_by = "n = 2"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Repeats the last but one row of targets."""
        wrong = torch.cat([targets[:-1], targets[-2:-1]]) if heads.n > 1 else targets
        return super().backward(cut, heads, wrong, weights)


class ShiftedTargets(Broken):
    """Every head is trained on the token one place too early: head 1 learns to copy its input"""

    origin = "FlagScale PR #337"
    caught_by = "n = 1"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Rolls the targets along the sequence."""
        return super().backward(cut, heads, targets.roll(1, dims=-1), weights)


class RolledMaskDenominator(Broken):
    """The loss is divided by all tokens, not by those that have a target"""

    origin = "Megatron-LM #2417, PR #3159"
    caught_by = "n = 3"

    def _loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        return full(hidden, unembedding, targets) * (targets != IGNORE).sum() / targets.numel()


class AllIgnoredIsNaN(Broken):
    """A head without a single target divides by zero"""

    origin = "Megatron-LM #3396; mcore-bridge #104"
    caught_by = "a whole head ignored"

    def _loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        logits = flat_logits(hidden, unembedding)
        each = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")
        return each / (targets != IGNORE).sum()


class UnembeddingDoubled(Broken):
    """The unembedding's gradient is written in the forward and returned to autograd as well"""

    origin = "mini-s: dW 2.000x"
    caught_by = "n = 3"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Adds what this step added once more."""
        own = {head.unembedding for head in _all(heads.roots)}
        before = {weight: None if weight.grad is None else weight.grad.clone() for weight in own}
        losses = super().backward(cut, heads, targets, weights)
        for weight, old in before.items():
            if weight.grad is not None:
                weight.grad += weight.grad if old is None else weight.grad - old
        return losses


class DetachedChain(Broken):
    """Every depth of a chain is detached from the one before: later depths do not train earlier ones"""

    origin = "AReaL #1659; slime #709; Megatron-LM #3456"
    caught_by = "causal heads"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Each head reads a detached copy of its parent's hidden states."""
        losses = {}

        def visit(head: Head, parent: Tensor) -> None:
            hidden = heads.hidden(head, parent)
            loss = heads.loss(head, hidden, targets[head.index], full)
            heads.backward([loss], [weights[head.index]])
            losses[head.index] = loss.detach()
            for child in head.children:
                visit(child, hidden.detach())

        for root in heads.roots:
            visit(root, cut)
        return torch.stack([losses[i] for i in range(heads.n)])


@dataclass(frozen=True)
class ChunkTailDropped(Broken):
    """Tokens after the last whole chunk are never seen"""

    origin = "mini-s: tail tokens dropped"
    caught_by = "n = 3"
    chunk: int = 13

    def _loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        rows, labels = hidden.flatten(0, -2), targets.flatten()
        total = rows.new_zeros((), dtype=loss_dtype(rows.dtype)) + 0 * rows.sum()
        for start in range(0, len(labels) // self.chunk * self.chunk, self.chunk):
            part = slice(start, start + self.chunk)
            count = (labels[part] != IGNORE).sum().clamp(min=1)
            total = total + full(rows[part][None], unembedding, labels[part][None]) * count
        return total / (labels != IGNORE).sum().clamp(min=1)


@dataclass(frozen=True)
class OneSlabLogsumexp(Broken):
    """The normaliser is the logsumexp of the last slab of the vocabulary alone"""

    origin = "no report known to us: an online logsumexp that forgets"
    caught_by = "n = 1"
    chunk: int = 13

    def _loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        logits = flat_logits(hidden, unembedding)
        last = logits[:, -(logits.shape[1] % self.chunk or self.chunk) :]
        return masked_mean(last.logsumexp(1) - target_logits(logits, targets), targets)


class StaleGradOverwritten(Broken):
    """`.grad` is replaced, not added to: the microbatches before are lost"""

    origin = "no report known to us: what writing W.grad in place does to accumulation"
    caught_by = "existing .grad"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """The unembedding's gradient starts from nothing."""
        for head in _all(heads.roots):
            head.unembedding.grad = None
        return super().backward(cut, heads, targets, weights)


@dataclass(frozen=True)
class LowPrecisionSums(Broken):
    """The unembedding's gradient is summed over many chunks in bf16"""

    origin = "Liger #512, #827; OLMo-core #370; axolotl #1601"
    caught_by = "many chunks in bf16"
    chunk: int = 13

    def loss_backward(self, heads: Heads, head: Head, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """A backward for each chunk of tokens, into `.grad`."""
        labels = targets.flatten()
        count = (labels != IGNORE).sum().clamp(min=1)
        rows = heads.normed(head, hidden).flatten(0, -2)  # (N, D)
        leaf = rows.detach().requires_grad_(rows.requires_grad)
        total = weight.new_zeros(())
        for start in range(0, len(labels), self.chunk):
            part = slice(start, start + self.chunk)
            with heads.autocast():
                logits = F.linear(leaf[part], head.unembedding).to(weight.dtype)
                loss = F.cross_entropy(logits, labels[part], ignore_index=IGNORE, reduction="sum") / count
            heads.backward([loss], [weight])
            total += loss.detach()
        heads.backward([rows], [leaf.grad])
        return total


class FrozenGradients(Broken):
    """Frozen parameters get gradients all the same"""

    origin = "Liger, keyed on the input's requires_grad only; verl #6432"
    caught_by = "frozen unembedding"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Gradients of the unembedding whether it asks for them or not."""
        frozen = [head.unembedding for head in _all(heads.roots) if not head.unembedding.requires_grad]
        for weight in frozen:
            weight.requires_grad_(True)
        try:
            return super().backward(cut, heads, targets, weights)
        finally:
            for weight in frozen:
                weight.requires_grad_(False)


def _all(roots: tuple[Head, ...]) -> list[Head]:
    """Every head of the tree."""
    return [head for root in roots for head in (root, *_all(root.children))]
