"""Wrong strategies, part three: bugs beside the gradient, and at sizes and layouts that few try.

Origins as in broken_behaviour.py, where one is known.
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_mem.model.head_tree import Head, Heads
from mtp_mem.model.losses import IGNORE, full
from mtp_mem.verification import broken_behaviour  # noqa: F401  its strategies are among ALL_BROKEN
from mtp_mem.verification.broken_strategies import Broken


class NegativeWeightDropped(Broken):
    """A negative loss weight, which unlearns, counts as zero"""

    caught_by = "negative loss weight, scale 2^40"

    def _weights(self, cut: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return weights.clamp(min=0)


class GradientsClamped(Broken):
    """Gradients are clamped to the range of fp16, in silence"""

    origin = "no report known to us: clamps of overflowing activations, as in transformers"
    caught_by = "negative loss weight, scale 2^40"

    def _after(self, cut: Tensor, heads: Heads, losses: Tensor) -> None:
        for gradient in (cut.grad, heads.roots[0].unembedding.grad):
            if gradient is not None:
                gradient.clamp_(-65504, 65504)


class LongRunsWrong(Broken):
    """Right up to 8192 tokens"""

    origin = "wrappers of kernels whose largest block is 8192"
    caught_by = "N = 8,206"

    def _weights(self, cut: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return weights * 2 if targets[0].numel() > 8192 else weights


class WideHeadsWrong(Broken):
    """Right up to a width of 256"""

    origin = "kernels whose largest width is 256"
    caught_by = "D = 320"

    def _weights(self, cut: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return weights * 2 if cut.shape[-1] > 256 else weights


class NarrowTargets(Broken):
    """Targets are kept in 16 bits: ids from 65,536 on wrap"""

    caught_by = "V = 65,601"

    def _loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        return full(hidden, unembedding, torch.where(targets == IGNORE, targets, targets & 0xFFFF))


class OneRowSqueezed(Broken):
    """`squeeze()` takes the dimension of the tokens away where there is one token"""

    origin = "no report known to us: what squeeze() without a dimension does"
    caught_by = "one token in all"

    def _loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden, unembedding).squeeze()
        loss = full(hidden, unembedding, targets)
        return loss / logits.shape[0] if logits.dim() == 1 else loss


class OneTokenRows(Broken):
    """Sequences of one token are taken to have no targets"""

    caught_by = "one token a row"

    def _weights(self, cut: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return weights * (targets.shape[-1] > 1)


class StridesIgnored(Broken):
    """The trunk's output is read as if it were contiguous, as a kernel with a bare pointer does"""

    origin = "no report known to us: kernels without a check of strides"
    caught_by = "nothing contiguous"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Sequential on the cut's memory with contiguous strides."""
        B, S, D = cut.shape
        packed = cut.detach().as_strided((B, S, D), (S * D, D, 1)).requires_grad_(cut.requires_grad)
        losses = super().backward(packed, heads, targets, weights)
        heads.backward([cut.view_as(cut)], [packed.grad])
        return losses


class GradReplaced(Broken):
    """`.grad` becomes another tensor with the right sum: who holds the old one, a flat buffer say, sees nothing"""

    caught_by = "existing .grad"

    def _after(self, cut: Tensor, heads: Heads, losses: Tensor) -> None:
        weight = heads.roots[0].unembedding
        weight.grad = None if weight.grad is None else weight.grad.clone()


class HooksFaked(Broken):
    """Hooks run on a gradient of zero, and the real one is added to `.grad` behind their back"""

    caught_by = "protocol"

    def loss_backward(self, heads: Heads, head: Head, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """Backward to a detached copy, while the parameter gets a gradient of zero."""
        shared = head.unembedding
        alone = shared.detach().requires_grad_(shared.requires_grad)
        normed = heads.normed(head, hidden)
        with heads.autocast():
            loss = full(normed, alone, targets)
        heads.backward([loss, (0 * shared).sum()], [weight, None])
        if shared.grad is not None and alone.grad is not None:
            shared.grad += alone.grad
        return loss.detach()


class HooksLeft(Broken):
    """Every step leaves one more hook on the unembedding"""

    caught_by = "protocol"

    def _after(self, cut: Tensor, heads: Heads, losses: Tensor) -> None:
        if heads.roots[0].unembedding.requires_grad:
            heads.roots[0].unembedding.register_hook(lambda gradient: gradient)


class LossesInALargerBuffer(Broken):
    """The returned losses are a part of a buffer as large as the logits, which lives as long as they are held"""

    caught_by = "6 optimizer steps"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Returns the losses in a buffer of N * V values."""
        losses = super().backward(cut, heads, targets, weights)
        buffer = losses.new_zeros(cut.numel() // cut.shape[-1] * heads.roots[0].unembedding.shape[0])
        buffer[: heads.n] = losses
        return buffer[: heads.n]


class TargetsKept(Broken):
    """The step's targets stay alive until the next step"""

    caught_by = "6 optimizer steps"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Keeps the targets in an attribute."""
        self.kept = targets
        return super().backward(cut, heads, targets, weights)


class ArraysKept(Broken):
    """A buffer outside of torch, as large as the logits, stays alive"""

    caught_by = "6 optimizer steps"

    def _after(self, cut: Tensor, heads: Heads, losses: Tensor) -> None:
        self.kept = bytearray(4 * cut.numel() // cut.shape[-1] * heads.roots[0].unembedding.shape[0])


class ParametersChanged(Broken):
    """It takes a step on the unembedding itself"""

    origin = "no report known to us: optimizers fused into the backward pass"
    caught_by = "protocol"

    def _after(self, cut: Tensor, heads: Heads, losses: Tensor) -> None:
        with torch.no_grad():
            heads.roots[0].unembedding.mul_(1 - 1e-3)


class TargetsChanged(Broken):
    """Targets that are ignored become zero, in the caller's tensor"""

    origin = "no report known to us: padding for a kernel, in place"
    caught_by = "protocol"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Right, but overwrites the targets."""
        losses = super().backward(cut, heads, targets, weights)
        targets.clamp_(min=0)
        return losses


class WeightsChanged(Broken):
    """The loss weights are divided by their sum, in the caller's tensor"""

    caught_by = "protocol"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Right, but overwrites the weights."""
        losses = super().backward(cut, heads, targets, weights)
        weights.div_(weights.sum())
        return losses


class GradientsShared(Broken):
    """Unembeddings of one shape have one tensor as `.grad`: who scales one scales the others"""

    caught_by = "replicated unembedding"

    def _after(self, cut: Tensor, heads: Heads, losses: Tensor) -> None:
        for root in heads.roots[1:]:
            root.unembedding.grad = heads.roots[0].unembedding.grad


class DefaultDtypeChanged(Broken):
    """The default dtype is set and left so: every tensor that is made later has another one"""

    caught_by = "protocol"

    def _after(self, cut: Tensor, heads: Heads, losses: Tensor) -> None:
        torch.set_default_dtype(torch.bfloat16)


class DeterminismChanged(Broken):
    """Deterministic algorithms are switched on and left so: every later step is slower"""

    caught_by = "protocol"

    def _after(self, cut: Tensor, heads: Heads, losses: Tensor) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)


class DeviceAwaited(Broken):
    """The host asks for a loss's value, and waits for the device in every step"""

    origin = "no report known to us: a check for NaN"
    caught_by = "protocol"

    def _after(self, cut: Tensor, heads: Heads, losses: Tensor) -> None:
        if losses[0].isnan():
            losses.zero_()


class FunctionsReplaced(Broken):
    """torch's own cross entropy is replaced by another one, for everybody"""

    origin = "libraries that patch torch.nn.functional"
    caught_by = "protocol"

    def _after(self, cut: Tensor, heads: Heads, losses: Tensor) -> None:
        original: Any = F.cross_entropy
        F.cross_entropy = lambda *args, **kwargs: 2 * original(*args, **kwargs)


class PrecisionOfOneDNN(Broken):
    """fp32 products on the CPU are switched to bf16, by the newer of torch's two switches, for all that follows"""

    caught_by = "protocol"

    def _after(self, cut: Tensor, heads: Heads, losses: Tensor) -> None:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]


class AutocastLeftOn(Broken):
    """autocast is entered and never left"""

    caught_by = "protocol"

    def _after(self, cut: Tensor, heads: Heads, losses: Tensor) -> None:
        torch.autocast("cpu", dtype=torch.bfloat16).__enter__()


class ErrorsSwallowed(Broken):
    """Every exception inside is swallowed, out of memory too: the step looks as if it had been taken"""

    caught_by = "protocol"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Returns zeros where there is an error."""
        try:
            return super().backward(cut, heads, targets, weights)
        except Exception:
            cut.grad = torch.zeros_like(cut) if cut.requires_grad else None
            return torch.zeros_like(weights)


class ProcessEndedAtOnce(Broken):
    """It ends the process with exit code 0 and runs no handler"""

    caught_by = "protocol"

    def _after(self, cut: Tensor, heads: Heads, losses: Tensor) -> None:
        os._exit(0)


ALL_BROKEN: tuple[type[Broken], ...] = tuple(Broken.__subclasses__())
"""The broken strategies of all three parts, as they stand in the files."""
