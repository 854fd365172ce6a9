"""Wrong strategies, each with one bug, mostly a published one: what the verifier must catch.

`mtp-mem verify --prove` runs them all and fails if one of them passes. Each class says what is wrong, where it was
reported, and which scenario is made for it. The issue numbers are those of the projects named.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_mem.model.head_tree import Head, Heads
from mtp_mem.model.losses import IGNORE, Loss, full, loss_dtype
from mtp_mem.strategies.sequential import Sequential
from mtp_mem.strategy import load_strategy


class Broken:
    """A strategy with a known bug."""

    origin: ClassVar[str]
    caught_by: ClassVar[str]

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """As a strategy, with a bug."""
        raise NotImplementedError


def _each_head(
    cut: Tensor,
    heads: Heads,
    targets: Tensor,
    weights: Tensor,
    loss: Loss,
    upstream: Callable[[Tensor], Tensor] = lambda w: w,
) -> Tensor:
    """The right sequential order, with the loss and the upstream gradient that a bug replaces."""

    return _EachHead(loss, upstream).backward(cut, heads, targets, weights)


class _EachHead(Sequential):
    def __init__(self, loss: Loss, upstream: Callable[[Tensor], Tensor]) -> None:
        self.loss, self.upstream = loss, upstream

    def loss_backward(self, heads: Heads, head: Head, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        loss = heads.loss(head, hidden, targets, self.loss)
        heads.backward([loss], [self.upstream(weight)])
        return loss.detach()


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

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Every weight becomes one."""
        return _each_head(cut, heads, targets, weights, full, torch.ones_like)


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
        return load_strategy("sequential").backward(cut, heads, wrong, weights)


class ShiftedTargets(Broken):
    """Every head is trained on the token one place too early: head 1 learns to copy its input"""

    origin = "FlagScale PR #337"
    caught_by = "n = 1"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Rolls the targets along the sequence."""
        return load_strategy("sequential").backward(cut, heads, targets.roll(1, dims=-1), weights)


class RolledMaskDenominator(Broken):
    """The loss is divided by all tokens, not by those that have a target"""

    origin = "Megatron-LM #2417, PR #3159"
    caught_by = "n = 3"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """The denominator counts the ignored tail."""

        def loss(hidden: Tensor, unembedding: Tensor, target: Tensor) -> Tensor:
            return full(hidden, unembedding, target) * (target != IGNORE).sum() / target.numel()

        return _each_head(cut, heads, targets, weights, loss)


class AllIgnoredIsNaN(Broken):
    """A head without a single target divides by zero"""

    origin = "Megatron-LM #3396; mcore-bridge #104"
    caught_by = "a whole head ignored"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """The count is not clamped to one."""

        def loss(hidden: Tensor, unembedding: Tensor, target: Tensor) -> Tensor:
            logits = F.linear(hidden, unembedding).flatten(0, -2).to(loss_dtype(hidden.dtype))
            each = F.cross_entropy(logits, target.flatten(), ignore_index=IGNORE, reduction="sum")
            return each / (target != IGNORE).sum()

        return _each_head(cut, heads, targets, weights, loss)


class UnembeddingDoubled(Broken):
    """The unembedding's gradient is written in the forward and returned to autograd as well"""

    origin = "mini-s: dW 2.000x"
    caught_by = "n = 3"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Adds what this step added once more."""
        own = {head.unembedding for head in _all(heads.roots)}
        before = {weight: None if weight.grad is None else weight.grad.clone() for weight in own}
        losses = load_strategy("sequential").backward(cut, heads, targets, weights)
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

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """The number of chunks is rounded down."""

        def loss(hidden: Tensor, unembedding: Tensor, target: Tensor) -> Tensor:
            count = (target != IGNORE).sum().clamp(min=1)
            rows, wanted = hidden.flatten(0, -2), target.flatten()
            total = rows.new_zeros((), dtype=loss_dtype(rows.dtype)) + 0 * rows.sum()
            for start in range(0, len(wanted) // self.chunk * self.chunk, self.chunk):
                part = slice(start, start + self.chunk)
                total = total + full(rows[part][None], unembedding, wanted[part][None]) * (
                    wanted[part] != IGNORE
                ).sum().clamp(min=1)
            return total.to(loss_dtype(rows.dtype)) / count

        return _each_head(cut, heads, targets, weights, loss)


@dataclass(frozen=True)
class OneSlabLogsumexp(Broken):
    """The normaliser is the logsumexp of the last slab of the vocabulary alone"""

    origin = "no report known to us: an online logsumexp that forgets"
    caught_by = "n = 1"
    chunk: int = 13

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Slabs overwrite the normaliser instead of joining it."""

        def loss(hidden: Tensor, unembedding: Tensor, target: Tensor) -> Tensor:
            logits = F.linear(hidden, unembedding).flatten(0, -2).to(loss_dtype(hidden.dtype))
            last = logits[:, -(logits.shape[1] % self.chunk or self.chunk) :]
            wanted = target.flatten()
            picked = logits.gather(1, wanted.clamp(min=0)[:, None])[:, 0]
            each = torch.where(wanted == IGNORE, 0, last.logsumexp(dim=1) - picked)
            return each.sum() / (wanted != IGNORE).sum().clamp(min=1)

        return _each_head(cut, heads, targets, weights, loss)


class StaleGradOverwritten(Broken):
    """`.grad` is replaced, not added to: the microbatches before are lost"""

    origin = "no report known to us: what writing W.grad in place does to accumulation"
    caught_by = "existing .grad"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """The unembedding's gradient starts from nothing."""
        for head in _all(heads.roots):
            head.unembedding.grad = None
        return load_strategy("sequential").backward(cut, heads, targets, weights)


@dataclass(frozen=True)
class LowPrecisionSums(Sequential, Broken):
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
            return load_strategy("sequential").backward(cut, heads, targets, weights)
        finally:
            for weight in frozen:
                weight.requires_grad_(False)


def _all(roots: tuple[Head, ...]) -> list[Head]:
    """Every head of the tree."""
    return [head for root in roots for head in (root, *_all(root.children))]


BROKEN: tuple[type[Broken], ...] = (
    RetainGraph,
    ScaleIgnored,
    HeadSkipped,
    LastHeadOffByOne,
    ShiftedTargets,
    RolledMaskDenominator,
    AllIgnoredIsNaN,
    UnembeddingDoubled,
    DetachedChain,
    ChunkTailDropped,
    OneSlabLogsumexp,
    StaleGradOverwritten,
    LowPrecisionSums,
    FrozenGradients,
)
