"""Wrong strategies, part two: most have right gradients at small size in a first step, and are wrong otherwise.

Most are of the kind of a published bug, as in broken_strategies.py; the issue numbers are the named projects'.
"""

import sys
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mtp_mem.model.head_tree import Head, Heads
from mtp_mem.model.losses import IGNORE, full, loss_dtype
from mtp_mem.strategies.sequential import Sequential
from mtp_mem.verification.broken_strategies import Broken


class _OwnLoss(Sequential, Broken):
    """Sequential with another head loss."""

    def loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        """The loss with the bug."""
        raise NotImplementedError

    def loss_backward(self, heads: Heads, head: Head, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """See `Sequential.loss_backward`."""
        loss = heads.loss(head, hidden, targets, self.loss)
        heads.backward([loss], [weight])
        return loss.detach()


def _logits(hidden: Tensor, unembedding: Tensor) -> Tensor:
    return F.linear(hidden, unembedding).flatten(0, -2).to(loss_dtype(hidden.dtype))  # (N, V)


def _mean(each: Tensor, targets: Tensor) -> Tensor:
    valid = targets.flatten() != IGNORE
    return torch.where(valid, each, 0).sum() / valid.sum().clamp(min=1)


def _picked(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(1, targets.flatten().clamp(min=0)[:, None])[:, 0]


class _After(Sequential, Broken):
    """Sequential, and something done to what it leaves."""

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """The bug; returns the losses."""
        raise NotImplementedError

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """As Sequential, with the bug."""
        return self.after(cut, heads, super().backward(cut, heads, targets, weights))


class CutOverwritten(_After):
    """The storage of the trunk's output is used again for its gradient"""

    origin = "Liger #272, #343; unsloth #5002; Megatron-LM PR #1594"
    caught_by = "protocol"

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Writes into the cut."""
        if cut.grad is not None:
            cut.data.copy_(cut.grad)
        return losses


class NaNHidden(_After):
    """What is not finite becomes zero: loss scaling and anomaly checks see nothing"""

    origin = "no report known to us: nan_to_num on gradients"
    caught_by = "NaN in the unembedding"

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Replaces NaN and infinities by zero."""
        for tensor in (cut.grad, heads.roots[0].unembedding.grad):
            if tensor is not None:
                tensor.nan_to_num_(0, 0, 0)
        return losses.nan_to_num(0, 0, 0)


class LossesReused(_After):
    """The returned losses are one buffer, written again in every step"""

    origin = "no report known to us: what a preallocated output does"
    caught_by = "6 optimizer steps"

    def __init__(self) -> None:
        self.losses: dict[torch.Size, Tensor] = {}

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Copies into the buffer."""
        return self.losses.setdefault(losses.shape, losses.clone()).copy_(losses)


class GradientInALargerBuffer(_After):
    """A gradient lies in a buffer beside something else: an in-place operator on one changes the other"""

    origin = "no report known to us: what a flat gradient buffer does"
    caught_by = "protocol"

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Moves the unembedding's gradient into a larger buffer."""
        weight = heads.roots[0].unembedding
        if weight.grad is not None:
            weight.grad = torch.cat([weight.grad.flatten(), weight.grad.new_zeros(1)])[:-1].view_as(weight)
        return losses


class GradModeLeftOff(_After):
    """Gradients are switched off and left so"""

    origin = "no report known to us"
    caught_by = "protocol"

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Switches grad mode off."""
        torch.set_grad_enabled(False)
        return losses


class PrecisionSwitched(_After):
    """fp32 products are switched to a lower precision, for everything that follows"""

    origin = "no report known to us: set_float32_matmul_precision inside a kernel's wrapper"
    caught_by = "protocol"

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Lowers the precision of fp32 products."""
        torch.set_float32_matmul_precision("medium")
        return losses


class RandomStateSeeded(_After):
    """The global generator is seeded in every step: dropout draws the same mask for ever"""

    origin = "no report known to us"
    caught_by = "protocol"

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Seeds the global generator."""
        torch.manual_seed(0)
        return losses


class ProcessEnded(_After):
    """It quits the process with exit code 0"""

    origin = "no report known to us"
    caught_by = "protocol"

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Quits the process."""
        sys.exit(0)


class LogitsKept(_OwnLoss):
    """The last step's logits stay alive until the next step"""

    origin = "fms-fsdp #152; open-instruct #777"
    caught_by = "6 optimizer steps"

    def loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        """Keeps the logits in an attribute."""
        self.kept = F.linear(hidden, unembedding).detach()
        return full(hidden, unembedding, targets)


class GraphLeft(Broken):
    """backward with create_graph: `.grad` carries a graph, a cycle that is never freed"""

    origin = "torch's own warning about create_graph"
    caught_by = "protocol"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """One joint backward that can be differentiated again."""
        pending, losses = [(root, cut) for root in heads.roots], {}
        while pending:
            head, parent = pending.pop()
            hidden = heads.hidden(head, parent)
            losses[head.index] = heads.loss(head, hidden, targets[head.index], full)
            pending += [(child, hidden) for child in head.children]
        joint = torch.stack([losses[index] for index in range(heads.n)])
        if joint.requires_grad:
            joint.backward(weights, create_graph=True)
        return joint.detach()


class HooksSkipped(Sequential, Broken):
    """The unembedding's gradient is written to `.grad` past autograd: hooks on the parameter never run"""

    origin = "this project, chunked_tokens until November 2026"
    caught_by = "protocol"

    def loss_backward(self, heads: Heads, head: Head, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """Backward to a detached copy, whose gradient is added to `.grad` by hand."""
        shared = head.unembedding
        alone = shared.detach().requires_grad_(shared.requires_grad)
        normed = heads.normed(head, hidden)
        with heads.autocast():
            loss = full(normed, alone, targets)
        heads.backward([loss], [weight])
        if alone.grad is not None:
            shared.grad = alone.grad if shared.grad is None else shared.grad + alone.grad
        return loss.detach()


class StaleWeight(_OwnLoss):
    """A copy of the weight is made once and never renewed"""

    origin = "NeMo Automodel #3606; Primus #983"
    caught_by = "6 optimizer steps"

    def __init__(self) -> None:
        self.copies = WeakTensorKeyDictionary()

    def loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        """The loss of the copy's values, with the weight's gradient."""
        if unembedding not in self.copies:
            self.copies[unembedding] = unembedding.detach().clone()
        return full(hidden, unembedding + (self.copies[unembedding] - unembedding).detach(), targets)


class OneChunkOnly(Sequential, Broken):
    """Right as long as one chunk of 1024 tokens holds everything: the second forgets the first"""

    origin = "mlstm_kernels PR #10"
    caught_by = "N = 4,102"
    CHUNK: ClassVar[int] = 1024

    def loss_backward(self, heads: Heads, head: Head, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """A backward for each chunk."""
        normed = heads.normed(head, hidden).flatten(0, -2)  # (N, D)
        leaf, labels = normed.detach().requires_grad_(normed.requires_grad), targets.flatten()
        shared, total = head.unembedding, weight.new_zeros(())
        before = None if shared.grad is None else shared.grad.clone()
        for start in range(0, len(labels), self.CHUNK):
            if start and shared.requires_grad:
                shared.grad = None if before is None else before.clone()
            with heads.autocast():
                logits = _logits(leaf[start : start + self.CHUNK], shared)
                each = F.cross_entropy(logits, labels[start : start + self.CHUNK], ignore_index=IGNORE, reduction="sum")
                loss = each / (labels != IGNORE).sum().clamp(min=1)
            heads.backward([loss], [weight])
            total += loss.detach()
        heads.backward([normed], [leaf.grad])
        return total


class FastPathWrong(_OwnLoss):
    """Plain torch under 600 rows; the path for more is wrong by a factor of two"""

    origin = "wrappers of kernels, which fall back when small or on a CPU"
    caught_by = "N = 4,102"

    def loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        """Doubled from 600 targets on."""
        return full(hidden, unembedding, targets) * (1 if targets.numel() < 600 else 2)


class SmallGradientsDropped(_OwnLoss):
    """Softmax entries under 2^-12 are dropped from the gradient: at a real vocabulary almost all of them"""

    origin = "ml-cross-entropy #14"
    caught_by = "V = 33,001, as initialised"

    def loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        """The dropped entries are detached."""
        logits = _logits(hidden, unembedding)
        large = logits.detach().softmax(1) >= 2.0**-12
        kept = torch.where(large, logits, logits.detach())
        return _mean(kept.logsumexp(1) - _picked(logits, targets), targets)


class NarrowOffsets(_OwnLoss):
    """Offsets of row times V in 32 bits, which wrap from 2^31 logits on"""

    origin = "pytorch #85786, #111484; flash-attention #714"
    caught_by = "protocol"

    def loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        """Picks the target's logit by a flat offset in 32 bits."""
        logits, labels = _logits(hidden, unembedding), targets.flatten().clamp(min=0)
        rows = torch.arange(len(labels), device=labels.device, dtype=torch.int32)
        picked = logits.reshape(-1)[(rows * logits.shape[1] + labels.to(torch.int32)).long() % logits.numel()]
        return _mean(logits.logsumexp(1) - picked, targets)


class OffsetLosesDigits(_OwnLoss):
    """logsumexp minus the target's logit: a large offset that all logits share takes the digits"""

    origin = "mlx #4188; optax #1792; pytorch PR #195829; this project's chunks until November 2026"
    caught_by = "logits with a common offset of 2^20"

    def loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        """A difference of two large numbers."""
        logits = _logits(hidden, unembedding)
        return _mean(logits.logsumexp(1) - _picked(logits, targets), targets)


class MeanOfMeans(_OwnLoss):
    """A mean for each sequence, then their mean: tokens of short sequences count more"""

    origin = "mlx-lm #1413, #1544; torchtune #1875"
    caught_by = "most of one sequence ignored"

    def loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        """Sequence by sequence."""
        means = [full(hidden[b : b + 1], unembedding, targets[b : b + 1]) for b in range(hidden.shape[0])]
        return torch.stack(means).mean()


class LastIdDropped(_OwnLoss):
    """The last id of the vocabulary is taken for a sentinel"""

    origin = "ml-cross-entropy #59"
    caught_by = "first, last and undrawn id as targets"

    def loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        """Ignores the last id."""
        return full(hidden, unembedding, torch.where(targets == unembedding.shape[0] - 1, IGNORE, targets))


BROKEN_BEHAVIOUR: tuple[type[Broken], ...] = (
    CutOverwritten,
    NaNHidden,
    LossesReused,
    GradientInALargerBuffer,
    GradModeLeftOff,
    PrecisionSwitched,
    RandomStateSeeded,
    ProcessEnded,
    LogitsKept,
    GraphLeft,
    HooksSkipped,
    StaleWeight,
    OneChunkOnly,
    FastPathWrong,
    SmallGradientsDropped,
    NarrowOffsets,
    OffsetLosesDigits,
    MeanOfMeans,
    LastIdDropped,
)
