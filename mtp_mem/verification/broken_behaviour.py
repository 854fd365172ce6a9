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
from mtp_mem.model.losses import IGNORE, full
from mtp_mem.verification.broken_strategies import Broken, flat_logits, masked_mean, target_logits


class CutOverwritten(Broken):
    """The storage of the trunk's output is used again for its gradient"""

    origin = "Liger #272, #343; unsloth #5002; Megatron-LM PR #1594"
    caught_by = "protocol"

    def _after(self, cut: Tensor, heads: Heads, losses: Tensor) -> None:
        if cut.grad is not None:
            cut.data.copy_(cut.grad)


class NaNHidden(Broken):
    """What is not finite becomes zero: loss scaling and anomaly checks see nothing"""

    origin = "no report known to us: nan_to_num on gradients"
    caught_by = "NaN in the unembedding"

    def _after(self, cut: Tensor, heads: Heads, losses: Tensor) -> None:
        for tensor in (cut.grad, heads.roots[0].unembedding.grad, losses):
            if tensor is not None:
                tensor.nan_to_num_(0, 0, 0)


class LossesReused(Broken):
    """The returned losses are one buffer, written again in every step"""

    origin = "no report known to us: what a preallocated output does"
    caught_by = "6 optimizer steps"

    def __init__(self) -> None:
        self.losses: dict[torch.Size, Tensor] = {}

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Returns the buffer."""
        losses = super().backward(cut, heads, targets, weights)
        return self.losses.setdefault(losses.shape, losses.clone()).copy_(losses)


class GradientInALargerBuffer(Broken):
    """A gradient lies in a buffer beside something else: an in-place operator on one changes the other"""

    origin = "no report known to us: what a flat gradient buffer does"
    caught_by = "protocol"

    def _after(self, cut: Tensor, heads: Heads, losses: Tensor) -> None:
        weight = heads.roots[0].unembedding
        if weight.grad is not None:
            weight.grad = torch.cat([weight.grad.flatten(), weight.grad.new_zeros(1)])[:-1].view_as(weight)


class GradModeLeftOff(Broken):
    """Gradients are switched off and left so"""

    caught_by = "protocol"

    def _after(self, cut: Tensor, heads: Heads, losses: Tensor) -> None:
        torch.set_grad_enabled(False)


class PrecisionSwitched(Broken):
    """fp32 products are switched to a lower precision, for everything that follows"""

    origin = "no report known to us: set_float32_matmul_precision inside a kernel's wrapper"
    caught_by = "protocol"

    def _after(self, cut: Tensor, heads: Heads, losses: Tensor) -> None:
        torch.set_float32_matmul_precision("medium")


class RandomStateSeeded(Broken):
    """The global generator is seeded in every step: dropout draws the same mask for ever"""

    caught_by = "protocol"

    def _after(self, cut: Tensor, heads: Heads, losses: Tensor) -> None:
        torch.manual_seed(0)


class ProcessEnded(Broken):
    """It quits the process with exit code 0"""

    caught_by = "protocol"

    def _after(self, cut: Tensor, heads: Heads, losses: Tensor) -> None:
        sys.exit(0)


class LogitsKept(Broken):
    """The last step's logits stay alive until the next step"""

    origin = "fms-fsdp #152; open-instruct #777"
    caught_by = "6 optimizer steps"

    def _loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
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


class HooksSkipped(Broken):
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


class StaleWeight(Broken):
    """A copy of the weight is made once and never renewed"""

    origin = "NeMo Automodel #3606; Primus #983"
    caught_by = "6 optimizer steps"

    def __init__(self) -> None:
        self.copies = WeakTensorKeyDictionary()

    def _loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        if unembedding not in self.copies:
            self.copies[unembedding] = unembedding.detach().clone()
        return full(hidden, unembedding + (self.copies[unembedding] - unembedding).detach(), targets)


class OneChunkOnly(Broken):
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
                logits = flat_logits(leaf[start : start + self.CHUNK], shared)
                each = F.cross_entropy(logits, labels[start : start + self.CHUNK], ignore_index=IGNORE, reduction="sum")
                loss = each / (labels != IGNORE).sum().clamp(min=1)
            heads.backward([loss], [weight])
            total += loss.detach()
        heads.backward([normed], [leaf.grad])
        return total


class FastPathWrong(Broken):
    """Plain torch under 600 rows; the path for more is wrong by a factor of two"""

    origin = "wrappers of kernels, which fall back when small or on a CPU"
    caught_by = "N = 4,102"

    def _loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        return full(hidden, unembedding, targets) * (1 if targets.numel() < 600 else 2)


class SmallGradientsDropped(Broken):
    """Softmax entries under 2^-12 are dropped from the gradient: at a real vocabulary almost all of them"""

    origin = "ml-cross-entropy #14"
    caught_by = "V = 33,001, as initialised"

    def _loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        logits = flat_logits(hidden, unembedding)
        large = logits.detach().softmax(1) >= 2.0**-12
        kept = torch.where(large, logits, logits.detach())
        return masked_mean(kept.logsumexp(1) - target_logits(logits, targets), targets)


class NarrowOffsets(Broken):
    """Offsets of row times V in 32 bits, which wrap from 2^31 logits on"""

    origin = "pytorch #85786, #111484; flash-attention #714"
    caught_by = "protocol"

    def _loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        logits, labels = flat_logits(hidden, unembedding), targets.flatten().clamp(min=0)
        rows = torch.arange(len(labels), device=labels.device, dtype=torch.int32)
        picked = logits.reshape(-1)[(rows * logits.shape[1] + labels.to(torch.int32)).long() % logits.numel()]
        return masked_mean(logits.logsumexp(1) - picked, targets)


class OffsetLosesDigits(Broken):
    """logsumexp minus the target's logit: a large offset that all logits share takes the digits"""

    origin = "mlx #4188; optax #1792; pytorch PR #195829; this project's chunks until November 2026"
    caught_by = "logits with a common offset of 2^20"

    def _loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        logits = flat_logits(hidden, unembedding)
        return masked_mean(logits.logsumexp(1) - target_logits(logits, targets), targets)


class MeanOfMeans(Broken):
    """A mean for each sequence, then their mean: tokens of short sequences count more"""

    origin = "mlx-lm #1413, #1544; torchtune #1875"
    caught_by = "most of one sequence ignored"

    def _loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        means = [full(hidden[b : b + 1], unembedding, targets[b : b + 1]) for b in range(hidden.shape[0])]
        return torch.stack(means).mean()


class LastIdDropped(Broken):
    """The last id of the vocabulary is taken for a sentinel"""

    origin = "ml-cross-entropy #59"
    caught_by = "first, last and undrawn id as targets"

    def _loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        return full(hidden, unembedding, torch.where(targets == unembedding.shape[0] - 1, IGNORE, targets))
