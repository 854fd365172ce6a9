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
from mtp_mem.strategies.sequential import Sequential
from mtp_mem.verification.broken_behaviour import BROKEN_BEHAVIOUR, _After, _OwnLoss
from mtp_mem.verification.broken_strategies import BROKEN, Broken

UNKNOWN = "no report known to us"


class _OtherWeights(Sequential, Broken):
    """Sequential with other loss weights."""

    origin = UNKNOWN

    def weights(self, cut: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """The bug; returns the weights to use."""
        raise NotImplementedError

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """As Sequential, with the bug."""
        return super().backward(cut, heads, targets, self.weights(cut, targets, weights))


class NegativeWeightDropped(_OtherWeights):
    """A negative loss weight, which unlearns, counts as zero"""

    caught_by = "negative loss weight, scale 2^40"

    def weights(self, cut: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Negative weights become zero."""
        return weights.clamp(min=0)


class GradientsClamped(_After):
    """Gradients are clamped to the range of fp16, in silence"""

    origin = "no report known to us: clamps of overflowing activations, as in transformers"
    caught_by = "negative loss weight, scale 2^40"

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Clamps two gradients."""
        for gradient in (cut.grad, heads.roots[0].unembedding.grad):
            if gradient is not None:
                gradient.clamp_(-65504, 65504)
        return losses


class LongRunsWrong(_OtherWeights):
    """Right up to 8192 tokens"""

    origin = "wrappers of kernels whose largest block is 8192"
    caught_by = "N = 8,206"

    def weights(self, cut: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Doubled beyond 8192 tokens."""
        return weights * 2 if targets[0].numel() > 8192 else weights


class WideHeadsWrong(_OtherWeights):
    """Right up to a width of 256"""

    origin = "kernels whose largest width is 256"
    caught_by = "D = 320"

    def weights(self, cut: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Doubled beyond a width of 256."""
        return weights * 2 if cut.shape[-1] > 256 else weights


class NarrowTargets(_OwnLoss):
    """Targets are kept in 16 bits: ids from 65,536 on wrap"""

    origin = UNKNOWN
    caught_by = "V = 65,601"

    def loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        """Keeps the lower 16 bits of every id."""
        return full(hidden, unembedding, torch.where(targets == IGNORE, targets, targets & 0xFFFF))


class OneRowSqueezed(_OwnLoss):
    """`squeeze()` takes the dimension of the tokens away where there is one token"""

    origin = "no report known to us: what squeeze() without a dimension does"
    caught_by = "one token in all"

    def loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        """Divides the loss of a single token by V."""
        logits = F.linear(hidden, unembedding).squeeze()
        loss = full(hidden, unembedding, targets)
        return loss / logits.shape[0] if logits.dim() == 1 else loss


class OneTokenRows(_OtherWeights):
    """Sequences of one token are taken to have no targets"""

    origin = UNKNOWN
    caught_by = "one token a row"

    def weights(self, cut: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Zero for sequences of one token."""
        return weights * (targets.shape[-1] > 1)


class StridesIgnored(Sequential, Broken):
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


class GradReplaced(_After):
    """`.grad` becomes another tensor with the right sum: who holds the old one, a flat buffer say, sees nothing"""

    origin = UNKNOWN
    caught_by = "existing .grad"

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Replaces the unembedding's `.grad` by a copy."""
        weight = heads.roots[0].unembedding
        weight.grad = None if weight.grad is None else weight.grad.clone()
        return losses


class HooksFaked(Sequential, Broken):
    """Hooks run on a gradient of zero, and the real one is added to `.grad` behind their back"""

    origin = UNKNOWN
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


class HooksLeft(_After):
    """Every step leaves one more hook on the unembedding"""

    origin = UNKNOWN
    caught_by = "protocol"

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Registers a hook that is never removed."""
        if heads.roots[0].unembedding.requires_grad:
            heads.roots[0].unembedding.register_hook(lambda gradient: gradient)
        return losses


class LossesInALargerBuffer(_After):
    """The returned losses are a part of a buffer as large as the logits, which lives as long as they are held"""

    origin = UNKNOWN
    caught_by = "6 optimizer steps"

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Returns the losses in a buffer of N * V values."""
        buffer = losses.new_zeros(cut.numel() // cut.shape[-1] * heads.roots[0].unembedding.shape[0])
        buffer[: heads.n] = losses
        return buffer[: heads.n]


class TargetsKept(_After):
    """The step's targets stay alive until the next step"""

    origin = UNKNOWN
    caught_by = "6 optimizer steps"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Keeps the targets in an attribute."""
        self.kept = targets
        return Sequential().backward(cut, heads, targets, weights)


class ArraysKept(_After):
    """A buffer outside of torch, as large as the logits, stays alive"""

    origin = UNKNOWN
    caught_by = "6 optimizer steps"

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Keeps 4 * N * V bytes in an attribute."""
        self.kept = bytearray(4 * cut.numel() // cut.shape[-1] * heads.roots[0].unembedding.shape[0])
        return losses


class ParametersChanged(_After):
    """It takes a step on the unembedding itself"""

    origin = "no report known to us: optimizers fused into the backward pass"
    caught_by = "protocol"

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Decays the unembedding in place."""
        with torch.no_grad():
            heads.roots[0].unembedding.mul_(1 - 1e-3)
        return losses


class TargetsChanged(Sequential, Broken):
    """Targets that are ignored become zero, in the caller's tensor"""

    origin = "no report known to us: padding for a kernel, in place"
    caught_by = "protocol"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Right, but overwrites the targets."""
        losses = super().backward(cut, heads, targets, weights)
        targets.clamp_(min=0)
        return losses


class WeightsChanged(Sequential, Broken):
    """The loss weights are divided by their sum, in the caller's tensor"""

    origin = UNKNOWN
    caught_by = "protocol"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Right, but overwrites the weights."""
        losses = super().backward(cut, heads, targets, weights)
        weights.div_(weights.sum())
        return losses


class GradientsShared(_After):
    """Unembeddings of one shape have one tensor as `.grad`: who scales one scales the others"""

    origin = UNKNOWN
    caught_by = "replicated unembedding"

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Every head's unembedding gets the first one's `.grad`."""
        for root in heads.roots[1:]:
            root.unembedding.grad = heads.roots[0].unembedding.grad
        return losses


class DefaultDtypeChanged(_After):
    """The default dtype is set and left so: every tensor that is made later has another one"""

    origin = UNKNOWN
    caught_by = "protocol"

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Sets the default dtype to bf16."""
        torch.set_default_dtype(torch.bfloat16)
        return losses


class DeterminismChanged(_After):
    """Deterministic algorithms are switched on and left so: every later step is slower"""

    origin = UNKNOWN
    caught_by = "protocol"

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Switches deterministic algorithms on."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        return losses


class DeviceAwaited(_After):
    """The host asks for a loss's value, and waits for the device in every step"""

    origin = "no report known to us: a check for NaN"
    caught_by = "protocol"

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Reads a loss on the host."""
        return losses if losses[0].item() < 1e9 else losses.zero_()


class FunctionsReplaced(_After):
    """torch's own cross entropy is replaced by another one, for everybody"""

    origin = "libraries that patch torch.nn.functional"
    caught_by = "protocol"

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Replaces cross entropy by twice its value."""
        original: Any = F.cross_entropy
        F.cross_entropy = lambda *args, **kwargs: 2 * original(*args, **kwargs)
        return losses


class PrecisionOfOneDNN(_After):
    """fp32 products on the CPU are switched to bf16, by the newer of torch's two switches, for all that follows"""

    origin = UNKNOWN
    caught_by = "protocol"

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Switches oneDNN's products to bf16."""
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
        return losses


class AutocastLeftOn(_After):
    """autocast is entered and never left"""

    origin = UNKNOWN
    caught_by = "protocol"

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Enters autocast."""
        torch.autocast("cpu", dtype=torch.bfloat16).__enter__()
        return losses


class ErrorsSwallowed(Sequential, Broken):
    """Every exception inside is swallowed, out of memory too: the step looks as if it had been taken"""

    origin = UNKNOWN
    caught_by = "protocol"

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Returns zeros where there is an error."""
        try:
            return super().backward(cut, heads, targets, weights)
        except Exception:
            cut.grad = torch.zeros_like(cut) if cut.requires_grad else None
            return torch.zeros_like(weights)


class ProcessEndedAtOnce(_After):
    """It ends the process with exit code 0 and runs no handler"""

    origin = UNKNOWN
    caught_by = "protocol"

    def after(self, cut: Tensor, heads: Heads, losses: Tensor) -> Tensor:
        """Ends the process by `os._exit`."""
        os._exit(0)


BROKEN_CONDUCT: tuple[type[Broken], ...] = (
    NegativeWeightDropped,
    GradientsClamped,
    LongRunsWrong,
    WideHeadsWrong,
    NarrowTargets,
    OneRowSqueezed,
    OneTokenRows,
    StridesIgnored,
    GradReplaced,
    HooksFaked,
    HooksLeft,
    LossesInALargerBuffer,
    TargetsKept,
    ArraysKept,
    ParametersChanged,
    TargetsChanged,
    WeightsChanged,
    GradientsShared,
    DefaultDtypeChanged,
    DeterminismChanged,
    DeviceAwaited,
    FunctionsReplaced,
    PrecisionOfOneDNN,
    AutocastLeftOn,
    ErrorsSwallowed,
    ProcessEndedAtOnce,
)
ALL_BROKEN: tuple[type[Broken], ...] = (*BROKEN, *BROKEN_BEHAVIOUR, *BROKEN_CONDUCT)
"""The broken strategies of all three parts."""
