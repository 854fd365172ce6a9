"""Sequential heads, and inside each head the vocabulary in slabs: no tensor (N, V) ever exists.

    for head in heads, the last first:
        for slab of the vocabulary:  update the running maximum and sum of exponentials     # online logsumexp
        for slab of the vocabulary:  recompute its logits, add its share of d_hidden, write its d_unembedding

Memory above the cut: a slab (N, chunk), two copies of the unembedding's gradient (one head's and the sum), one head
layer's activations. FLOPs: 4/3, because the logits are computed twice. Where the loss weights are known in advance,
token chunks cost less; slabs pay off where the unembedding is loaded, or its gradient sent off, slab by slab.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mtp_mem.errors import BadInput
from mtp_mem.model.losses import IGNORE, LOSS_OPTIONS, PLAIN, LossOptions, compute_dtype, loss_dtype
from mtp_mem.model.shape import Shape
from mtp_mem.strategies.sequential import Sequential

VOCAB_CHUNK = 2048
"""Vocabulary entries per slab by default: at N = 8192 an fp32 slab is 64 MiB."""


@dataclass(frozen=True, kw_only=True)
class ChunkedVocab(Sequential):
    """Sequential, and each head's logits in slabs of the vocabulary, recomputed: one slab alive (4/3 of the FLOPs)"""

    flops_factor: ClassVar[Fraction] = Fraction(4, 3)
    loss_options: ClassVar[tuple[str, ...]] = LOSS_OPTIONS
    chunk: int = VOCAB_CHUNK  # vocabulary entries per slab

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise BadInput(f"chunk = {self.chunk}: expected a whole number of at least 1")

    def loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor, *, options: LossOptions = PLAIN) -> Tensor:
        """One head's loss by an online logsumexp; logits recomputed slab by slab in the backward.

        The normaliser of a row is only known after its last slab, which is why vocabulary chunks cannot do without
        recomputation.
        """
        rows = hidden.flatten(0, -2).to(compute_dtype(hidden))  # (N, D)
        chunk = min(self.chunk, unembedding.shape[0])
        return _VocabularySlabs.apply(rows, unembedding, targets.flatten(), chunk, options)  # type: ignore[no-any-return,no-untyped-call]

    def loss_bytes(self, shape: Shape) -> int:
        """A slab of the backward and what it fills: d_hidden in the loss dtype, dW, and the weighted rows.

        The slab is in the loss dtype; in low precision in the model's as well, and a product awaits its addition:
        (N, D) of the hidden gradient, or (chunk, D) of the unembedding's. With a frozen unembedding there is no dW, and
        nothing weighted; the normed rows are kept all the same. Under autocast a slab of the unembedding is copied.
        """
        s, narrow, trains = shape, shape.product != shape.loss_value, shape.trains("unembedding")
        chunk = min(self.chunk, s.V)
        slab = s.N * chunk * (s.loss_value + narrow * s.product)
        product = (narrow * max(s.N, chunk * trains) + s.autocast * chunk) * s.D * s.product
        gradients = s.N * s.D * s.loss_value + s.unembedding * trains
        return s.rows * (1 + trains) + slab + product + gradients


class _VocabularySlabs(torch.autograd.Function):
    """One head's loss; of the logits it saves only each row's maximum and the logsumexp above it, both (N,)."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, unembedding: Tensor, targets: Tensor, chunk: int, options: LossOptions
    ) -> Tensor:
        acc, places = loss_dtype(hidden.dtype), _Places(targets, chunk)
        top = hidden.new_full(targets.shape, -torch.inf, dtype=acc)  # (N,) running maximum
        total = hidden.new_zeros(targets.shape, dtype=acc)  # (N,) sum of exp(logit - top)
        target_logit = hidden.new_zeros(targets.shape, dtype=acc)  # (N,)
        below_top = torch.zeros_like(total) if options.label_smoothing else None  # (N,) sum of top - logit
        slabs = _Slabs(hidden, chunk, options)
        for start in range(0, unembedding.shape[0], chunk):
            slab = slabs.logits(unembedding[start : start + chunk].to(hidden.dtype))  # (N, chunk)
            inside, column = places.in_slab(start, slab.shape[1])
            target_logit += slab.gather(1, column[:, None]).squeeze(1) * inside
            new_top = torch.maximum(top, slab.amax(dim=1))
            slab.sub_(new_top[:, None])
            if below_top is not None:
                below_top += (start * (new_top - top) if start else 0) - slab.sum(dim=1)
            total = total * (top - new_top).exp() + slab.exp_().sum(dim=1)
            top = new_top
        log_total = total.log()  # (N,); logsumexp = top + log_total
        mean = None if below_top is None else below_top / unembedding.shape[0]
        losses = options.row_losses(top, log_total, target_logit, mean)  # (N,)
        valid = targets != IGNORE
        count = valid.sum().clamp(min=1)
        ctx.save_for_backward(hidden, unembedding, targets, top, log_total, valid.to(acc) / count)
        ctx.chunk, ctx.options = chunk, options  # type: ignore[attr-defined]
        return torch.where(valid, losses, 0).sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, unembedding, targets, top, log_total, row_share = ctx.saved_tensors  # type: ignore[attr-defined]
        want_hidden, want_unembedding = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        chunk: int = ctx.chunk  # type: ignore[attr-defined]
        options: LossOptions = ctx.options  # type: ignore[attr-defined]
        acc, places = top.dtype, _Places(targets, chunk)
        # Row weights go onto the (N, D) operands of the products, never onto the (N, chunk) slab.
        row = (row_share * grad)[:, None]  # (N, 1)
        weighted = (hidden * row).to(hidden.dtype) if want_unembedding else None  # (N, D)
        d_hidden = torch.zeros_like(hidden, dtype=acc) if want_hidden else None  # (N, D)
        d_unembedding = torch.empty_like(unembedding) if want_unembedding else None  # (V, D)
        slabs = _Slabs(hidden, chunk, options)
        for start in range(0, unembedding.shape[0], chunk):
            weight = unembedding[start : start + chunk].to(hidden.dtype)  # (chunk, D)
            slab = slabs.logits(weight)  # (N, chunk)
            slope = options.slope(slab)
            slab = slab.sub_(top[:, None]).sub_(log_total[:, None]).exp_()  # probabilities
            inside, column = places.in_slab(start, slab.shape[1])
            options.gradient_(slab, top, log_total, column[:, None], inside[:, None].to(acc), unembedding.shape[0])
            if slope is not None:
                slab.mul_(slope)
            slab = slabs.narrow(slab)
            if d_hidden is not None:
                if acc == hidden.dtype:
                    d_hidden.addmm_(slab, weight)
                else:
                    d_hidden += slab @ weight
            if d_unembedding is not None and weighted is not None:
                part = d_unembedding[start : start + chunk]
                if acc == hidden.dtype:
                    torch.mm(slab.T, weighted, out=part)
                else:  # under autocast the gradient is wider than the product
                    part.copy_(slab.T @ weighted)
        return None if d_hidden is None else d_hidden.mul_(row).to(hidden.dtype), d_unembedding, None, None, None


class _Slabs:
    """The buffers (N, chunk) that every slab uses again: in the compute dtype and, where it differs, the loss dtype."""

    def __init__(self, hidden: Tensor, chunk: int, options: LossOptions) -> None:
        self._hidden, self._options = hidden, options
        self._product = hidden.new_empty(hidden.shape[0], chunk)
        acc = loss_dtype(hidden.dtype)
        self._wide = None if acc == hidden.dtype else hidden.new_empty(hidden.shape[0], chunk, dtype=acc)

    def logits(self, weight: Tensor) -> Tensor:
        """Capped logits (N, C) in the loss dtype for a slab (C, D) of the unembedding; callers may overwrite them."""
        product = self._view(self._product, weight.shape[0])
        torch.mm(self._hidden, weight.T, out=product)
        wide = product if self._wide is None else self._view(self._wide, weight.shape[0]).copy_(product)
        return self._options.cap_(wide)

    def narrow(self, slab: Tensor) -> Tensor:
        """The slab in the compute dtype."""
        return slab if self._wide is None else self._view(self._product, slab.shape[1]).copy_(slab)

    def _view(self, buffer: Tensor, width: int) -> Tensor:
        if width == buffer.shape[1]:
            return buffer
        N = self._hidden.shape[0]
        return buffer.view(-1)[: N * width].view(N, width)


class _Places:
    """In which slab each target lies, and in which column of it; worked out once for all slabs."""

    def __init__(self, targets: Tensor, chunk: int) -> None:
        self._chunk = chunk
        slab = targets.div(chunk, rounding_mode="floor")
        self._slab = slab.to(torch.int32)  # (N,); below 0 where there is no target
        self._column = targets.remainder(chunk)  # (N,)

    def in_slab(self, start: int, width: int) -> tuple[Tensor, Tensor]:
        """Which targets lie in the slab that begins at `start`, and their column there (any column for the others)."""
        if width < self._chunk:  # the last slab: nothing asks for the other columns again
            self._column.clamp_(max=width - 1)
        return self._slab == start // self._chunk, self._column
