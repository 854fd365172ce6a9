"""Sequential heads, and inside each head chunks of tokens whose gradients are computed with their loss.

    for head in heads, the last first:
        rows = norm(head(cut))
        for chunk of rows:
            logits = rows[chunk] @ unembedding.T            # one buffer, used again
            logits = softmax(logits) - onehot(targets)      # in place
            d_unembedding += logits.T @ rows[chunk]         # one accumulator for all heads
            rows[chunk] = logits @ unembedding              # the rows become their gradient
        norm.backward(rows), head.backward

A row's softmax needs that row's V logits and no others, so a chunk of tokens can be finished, gradients and all, before
its logits are overwritten by the next one's. Vocabulary chunks cannot do that: a row's normaliser (logsumexp) is known
only after the last slab. FLOPs: 1, three products per head, and none twice. It needs the loss weights before the
backward, which every trainer has.

Memory above the cut, besides one head's activations, for N rows, a chunk of c of them, b bytes a value:

    c V b                 logits, turned in place into probabilities minus the one-hot targets
    V D a                 the sum of the unembedding's gradient: in fp32 (a = 4) where the parameter has less precision
    r V 4                 low precision only: r rows of logits in fp32

Scaling (loss weight, 1 / count, masks) is applied to the (c, D) operands of the products, never to the (c, V) logits.
"""

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mtp_mem._util import MiB
from mtp_mem.errors import BadInput
from mtp_mem.model.head_tree import Head, Heads
from mtp_mem.model.losses import IGNORE, LOSS_OPTIONS, PLAIN, LossOptions, compute_dtype, loss_dtype
from mtp_mem.model.shape import Shape
from mtp_mem.strategies.sequential import Sequential

CUDA_LOGITS = 512 * MiB
CUDA_TOKENS = (512, 4096)  # the least and the most tokens in a default chunk
CPU_TOKENS = (128, 1024)
WIDE_ROWS = 4096  # vocabulary entries that `_add_product` widens to fp32 at once
SOFTMAX_BLOCK = 64 * MiB  # bytes of fp32 logits; at V = 128256 130 rows, one for each multiprocessor of an H100


@dataclass(frozen=True, kw_only=True)
class ChunkedTokens(Sequential):
    """Sequential, and each head's logits in chunks of tokens with their gradients: one chunk alive (no FLOP more)"""

    loss_options: ClassVar[tuple[str, ...]] = LOSS_OPTIONS
    chunk: int | None = None  # tokens; None: by shape and device, see default_chunk

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise BadInput(f"chunk = {self.chunk}: expected a whole number of tokens, at least 1")

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """See `mtp_mem.strategy.Strategy.backward`."""
        sums = UnembeddingSums(heads)
        losses = _Step(self.chunk, sums).backward(cut, heads, targets, weights)
        sums.finish(heads)  # after the last head's activations are gone: the sum and its copy are both large
        return losses

    def peak_bytes(self, shape: Shape) -> int:
        """Bytes above the cut at the worst moment: in a head, or as the fp32 sum becomes the gradient."""
        s = shape
        wider = s.V * s.D * (s.loss_value - s.value * (not s.accumulates)) * s.trains("unembedding")
        heads = s.one_head(self.loss_bytes(s), kept=wider)
        if s.value == s.loss_value or not wider:
            return heads
        # Where there is a gradient already, the sum and its copy are beside it.
        copy = s.unembedding if s.accumulates else 0
        return max(heads, s.left_behind(s.n) + copy + s.V * s.D * s.loss_value)

    def loss_bytes(self, shape: Shape) -> int:
        """A chunk of logits and the sum of the unembedding's gradient; in low precision its softmax's fp32 rows too.

        Besides, in N rows: targets as columns (8), validity (1) and shares of the mean. A CPU has no product of low
        precision into fp32, and widens both sides. With more heads the sum is among what the others left, but for what
        it is wider than the gradient; with one head and one chunk it begins after the softmax. With a frozen
        unembedding there is no sum. Under autocast rows and unembedding are copied.
        """
        s = shape
        chunk = min(self.chunk or default_chunk(s.N, s.D, s.V, s.product, s.cuda), s.N)
        logits = chunk * s.V * s.product + s.rows + s.autocast * (s.hidden + s.V * s.D * s.product)
        rows = s.N * (8 + 1 + s.loss_value) + chunk * s.loss_value
        softmax_row = 5 * s.loss_value + 1  # largest logit, the target's, the loss, that times its share twice, a mask
        among_others = s.n > 1 and not s.accumulates
        total = s.V * s.D * (s.loss_value - s.value * among_others) * s.trains("unembedding")
        before = 0 if s.n == 1 and chunk == s.N else total
        if s.product == s.loss_value:
            return logits + rows + max(before + chunk * softmax_row, total)
        height = min(chunk, max(1, SOFTMAX_BLOCK // (s.V * s.loss_value)))
        softmax = height * (s.V * s.loss_value + softmax_row)
        widened = 0 if s.cuda or not total else chunk * (s.D + min(WIDE_ROWS, s.V)) * s.loss_value
        return logits + rows + max(before + softmax, total + widened)


class _Step(Sequential):
    """Sequential for one step. It holds that step's `sums`, so that the strategy itself keeps nothing."""

    def __init__(self, chunk: int | None, sums: "UnembeddingSums") -> None:
        self.chunk, self.sums = chunk, sums

    def loss_backward(self, heads: Heads, head: Head, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """See `Sequential.loss_backward`."""
        gradient = self.sums.for_next_head(head.unembedding, heads)
        normed = heads.normed(head, hidden)  # (B, S, D)
        with torch.no_grad():
            with heads.autocast():
                dtype = compute_dtype(normed)
            rows = normed.detach().flatten(0, -2).to(dtype)  # (N, D); in the memory of `normed` where dtypes agree
            if normed._is_view():  # a norm that returns its input: head output and cut must not be overwritten
                rows = rows.clone()
            N, (V, D) = rows.shape[0], head.unembedding.shape
            loss = head_loss(
                rows,
                head.unembedding.detach().to(dtype),
                targets.flatten(),
                weight,
                gradient,
                chunk=self.chunk or default_chunk(N, D, V, dtype.itemsize, heads.cuda),
                keep_rows=not normed.requires_grad,
                options=heads.options,
            )
        heads.backward([normed], [rows.view_as(normed).to(normed.dtype)])
        return loss


class UnembeddingSums:
    """The sums of a step's unembedding gradients, each alive from the first to the last head that adds to it.

    Replicated unembeddings have one head each: then one sum is alive at a time.
    """

    def __init__(self, heads: Heads) -> None:
        self._cuda = heads.cuda
        self._sums: dict[Tensor, UnembeddingGradient] = {}
        self._heads_left: Counter[Tensor] = Counter()
        pending = list(heads.roots)
        while pending:
            head = pending.pop()
            self._heads_left[head.unembedding] += 1
            pending += head.children

    def for_next_head(self, unembedding: Tensor, heads: Heads) -> "UnembeddingGradient | None":
        """The sum that the unembedding's next head adds to, None if frozen. First finishes sums with no head left."""
        for complete in [weight for weight in self._sums if not self._heads_left[weight]]:
            self._sums.pop(complete).finish(heads)
        self._heads_left[unembedding] -= 1
        if unembedding.requires_grad and unembedding not in self._sums:
            self._sums[unembedding] = UnembeddingGradient(unembedding, self._cuda)
        return self._sums.get(unembedding)

    def finish(self, heads: Heads) -> None:
        """Hand the sums that are still open to autograd."""
        for gradient in self._sums.values():
            gradient.finish(heads)


class UnembeddingGradient:
    """The gradient (V, D) of one unembedding, summed over chunks and heads; in fp32 for low-precision parameters."""

    def __init__(self, parameter: Tensor, cuda: bool) -> None:
        self.parameter, self.cuda = parameter, cuda
        self.buffer: Tensor | None = None  # (V, D), from the first product on

    def add(self, slab: Tensor, rows: Tensor) -> None:
        """Add slab^T rows to the sum: slab (c, V) of dL/dlogits and rows (c, D), both in the compute dtype."""
        empty = self.buffer is None
        if self.buffer is None:  # the first product writes it, so it needs no zero fill
            self.buffer = torch.empty_like(self.parameter, dtype=loss_dtype(self.parameter.dtype))  # (V, D)
        _add_product(self.buffer, slab.T, rows, empty, self.cuda)

    def finish(self, heads: Heads) -> None:
        """Hand the sum to autograd as the parameter's gradient: it adds to `.grad`, and hooks fire."""
        if self.buffer is not None:
            heads.backward([_HandOver.apply(self.parameter, self)], [None])  # type: ignore[no-untyped-call]

    def take(self) -> Tensor:
        """The sum (V, D) in the parameter's dtype; the buffer is no longer kept here."""
        buffer, self.buffer = self.buffer, None
        assert buffer is not None
        return buffer.to(self.parameter.dtype)


class _HandOver(torch.autograd.Function):
    """A 0-dim zero whose gradient for the parameter is the sum, which autograd puts into an empty `.grad` uncopied."""

    @staticmethod
    def forward(ctx: FunctionCtx, parameter: Tensor, gradient: UnembeddingGradient) -> Tensor:
        ctx.gradient = gradient  # type: ignore[attr-defined]
        return parameter.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, _grad: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.take(), None  # type: ignore[attr-defined]


def default_chunk(N: int, D: int, V: int, value_bytes: int, cuda: bool) -> int:
    """Tokens per chunk where none are asked for: a power of two, or all tokens where they are fewer.

    CUDA: the largest whose logits, `value_bytes` each, fit 512 MiB; at least 512 (below that reading the unembedding
    again for every chunk costs more than the products) and at most 4096; it does not grow with N. CPU: the largest with
    at most twice as many logits as values that every strategy holds, the gradients of the unembedding and of the hidden
    states: c V <= 2 (V + N) D. At least 128; at most 1024, where products of chunks were as fast as whole ones
    (V = 32000, D = 512).
    """
    fits = CUDA_LOGITS // (V * value_bytes) if cuda else 2 * (V + N) * D // V
    low, high = CUDA_TOKENS if cuda else CPU_TOKENS
    return min(N, max(low, min(high, 1 << (max(1, fits).bit_length() - 1))))


def head_loss(
    rows: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    upstream: Tensor,
    gradient: UnembeddingGradient | None,
    *,
    chunk: int,
    keep_rows: bool,
    options: LossOptions = PLAIN,
) -> Tensor:
    """The mean loss of one head; overwrites `rows` with their gradient and adds to the unembedding's.

    Args:
        rows: normed hidden states (N, D) in the compute dtype; overwritten with upstream * dL/drows unless `keep_rows`.
        unembedding: (V, D) in the compute dtype.
        targets: (N,) int64, IGNORE where there is none.
        upstream: derivative of the total loss with respect to this head's loss L, 0-dim, in the loss dtype.
        gradient: sums the unembedding's gradient; None where the unembedding is frozen.
        chunk: tokens per chunk.
        keep_rows: leave `rows` as they are: nothing below needs their gradient.
        options: of the loss.

    Returns:
        The loss, 0-dim, in the loss dtype; 0 where no target is valid.
    """
    N, V = rows.shape[0], unembedding.shape[0]
    acc = loss_dtype(rows.dtype)
    valid = targets != IGNORE  # (N,)
    count = valid.sum().clamp(min=1)
    share = valid / count.to(acc)  # (N,)
    column = targets.clamp(min=0)[:, None]  # (N, 1)
    total = rows.new_zeros((), dtype=acc)
    logits = rows.new_empty(min(chunk, N), V)  # (c, V)
    for start in range(0, N, chunk):
        part = slice(start, min(start + chunk, N))
        x, weight = rows[part], (share[part] * upstream)[:, None]  # (c, D), (c, 1)
        z = logits[: x.shape[0]]
        torch.mm(x, unembedding.T, out=z)
        total += _softmax_minus_onehot(z, column[part], share[part], options)
        if gradient is not None:  # unless they are kept, the rows may be scaled in place
            gradient.add(z, (x * weight).to(x.dtype) if keep_rows else x.mul_(weight))
        if not keep_rows:
            torch.mm(z, unembedding, out=x)
            x.mul_(weight)
    return total


def _softmax_minus_onehot(z: Tensor, column: Tensor, share: Tensor, options: LossOptions) -> Tensor:
    """Logits z (c, V) become dL_row/dlogits in place; returns the sum of the rows' losses, each times its share."""
    acc = loss_dtype(z.dtype)
    if z.dtype == acc:
        return _rows(z, column, share, options)
    height = max(1, min(z.shape[0], SOFTMAX_BLOCK // (z.shape[1] * acc.itemsize)))
    wide = z.new_empty(height, z.shape[1], dtype=acc)  # (r, V)
    total = z.new_zeros((), dtype=acc)
    for start in range(0, z.shape[0], height):
        part = slice(start, min(start + height, z.shape[0]))
        block = wide[: part.stop - part.start]
        block.copy_(z[part])
        total += _rows(block, column[part], share[part], options)
        z[part] = block
    return total


def _rows(z: Tensor, column: Tensor, share: Tensor, options: LossOptions) -> Tensor:
    slope = options.slope(options.cap_(z))  # (c, V)
    # In place: torch does not document that `_softmax` may overwrite its input; tests of gradients would notice.
    top, wanted = z.amax(dim=1), z.gather(1, column)[:, 0]  # (c,), (c,)
    below_top = -z.sub_(top[:, None]).mean(dim=1) if options.label_smoothing else None  # (c,); z - top has z's softmax
    torch.ops.aten._softmax.out(z, 1, False, out=z)
    # The largest probability is at least 1 / V, so that its logarithm gives the normaliser back without underflow.
    log_total = z.amax(dim=1).log_().neg_()  # (c,)
    losses = options.row_losses(top, log_total, wanted, below_top)  # (c,)
    options.gradient_(z, top, log_total, column, torch.ones_like(column, dtype=z.dtype), z.shape[1])
    del log_total  # beside the temporaries below it would raise the peak
    if slope is not None:
        z.mul_(slope)
    return torch.where(share > 0, losses * share, 0.0).sum()


def _add_product(out: Tensor, a: Tensor, b: Tensor, empty: bool, cuda: bool) -> None:
    """out = a b where `out` is `empty`, else out += a b; the dtype of `out` may be wider than that of a and b."""
    if out.dtype == a.dtype:
        if empty:
            torch.mm(a, b, out=out)
        else:
            out.addmm_(a, b)
    elif cuda:  # one kernel from low precision into fp32: torch >= 2.8, CUDA only
        if empty:
            torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
        else:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        wide = b.to(out.dtype)
        for start in range(0, out.shape[0], WIDE_ROWS):  # an fp32 copy of all of `a` would be larger than the logits
            part = slice(start, start + WIDE_ROWS)
            _add_product(out[part], a[part].to(out.dtype), wide, empty, cuda)
