"""A head's loss and its gradients in one pass over chunks of tokens: three products a chunk, nothing computed twice.

A row's softmax needs that row's V logits and no others, so a chunk of tokens can be finished, gradients and all, before
its logits are overwritten by the next one's. Vocabulary chunks cannot do that: a row's normaliser is known only after
the last slab. FLOPs: 6 N V D a head, no more than full logits.

Bytes above the inputs, for one head of N rows and a chunk of c of them, b bytes a value:

    c V b                 logits, turned in place into probabilities minus the one-hot targets
    V D a                 the unembedding's gradient, a bytes a value; `.grad` itself where a is its own size
    r V 4                 low precision only: r rows of logits in fp32; none with the compiled kernel

The hidden states' gradient overwrites the normed rows it was computed from. Scaling (loss weight, 1 / count, masks) is
done on sides of width D, never on the V-wide matrix.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mtp_mem._util import MiB
from mtp_mem.data import IGNORE
from mtp_mem.errors import BadInput
from mtp_mem.model.compiled_rows import compiled_rows
from mtp_mem.model.losses import loss_dtype

Accumulate = Literal["fp32", "parameter", "main_grad"]
RowKernel = Literal["eager", "compiled"]
CUDA_LOGITS = 512 * MiB
CUDA_TOKENS = (512, 4096)
CPU_TOKENS = (128, 1024)
WIDE_ROWS = 4096
SOFTMAX_BLOCK = 32 * MiB


def default_chunk(N: int, D: int, V: int, value_bytes: int, cuda: bool) -> int:
    """Tokens per chunk where none are asked for: a power of two, or all tokens where they are fewer.

    CUDA: the largest whose logits fit 512 MiB, at least 512 (below that reading the unembedding again for every chunk
    costs more than the products) and at most 4096; it does not grow with N. CPU: the largest whose logits take at most
    twice what nobody avoids, the gradients of the unembedding and of the hidden states: c V <= 2 (V + N) D. At least
    128; at most 1024, where products of chunks were as fast as whole ones (V = 32000, D = 512).
    """
    fits = CUDA_LOGITS // (V * value_bytes) if cuda else 2 * (V + N) * D // V
    low, high = CUDA_TOKENS if cuda else CPU_TOKENS
    return min(N, max(low, min(high, 1 << (max(1, fits).bit_length() - 1))))


@dataclass
class UnembeddingGradient:
    """The gradient of one unembedding (V, D), summed over chunks and heads.

    `accumulate` says where: "fp32" in a buffer of its own where the parameter has less precision, and straight into
    `.grad` where it has not; "parameter" always into `.grad`; "main_grad" into the fp32 buffer (V, D) that the caller
    keeps as the parameter's attribute `main_grad`, and then `.grad` stays as it was.

    Raises:
        BadInput: "main_grad" without such a buffer.
    """

    parameter: Tensor
    accumulate: Accumulate
    cuda: bool

    def __post_init__(self) -> None:
        self.buffer: Tensor | None = None
        self.fresh = False  # the buffer holds nothing yet
        if self.accumulate == "main_grad":
            self.buffer = _main_grad(self.parameter)

    def add(self, slab: Tensor, rows: Tensor) -> None:
        """Add slab^T rows: slab (c, V), rows (c, D), both in the compute dtype."""
        if self.buffer is None:
            self.buffer, self.fresh = self._begin()
        _add_product(self.buffer, slab.T, rows, self.fresh, self.cuda)
        self.fresh = False

    def finish(self) -> None:
        """Leave the sum in `.grad`, where it is not there already."""
        buffer, parameter = self.buffer, self.parameter
        self.buffer = None
        if buffer is None or self.accumulate == "main_grad" or buffer is parameter.grad:
            return
        if parameter.grad is None:
            parameter.grad = buffer.to(parameter.dtype)
        else:
            parameter.grad.add_(buffer)

    def _begin(self) -> tuple[Tensor, bool]:
        parameter = self.parameter
        narrow = parameter.dtype in (torch.bfloat16, torch.float16)
        if self.accumulate == "fp32" and narrow:
            return torch.empty_like(parameter, dtype=torch.float32), True  # (V, D)
        if parameter.grad is not None:
            return parameter.grad, False
        parameter.grad = torch.empty_like(parameter)  # (V, D), written by the first product: no zero fill
        return parameter.grad, True


def head_loss(
    rows: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    upstream: Tensor,
    gradient: UnembeddingGradient | None,
    *,
    chunk: int,
    keep_rows: bool,
    kernel: RowKernel = "eager",
) -> Tensor:
    """Mean cross entropy of one head; `rows` become their own gradient.

    Args:
        rows: normed hidden states (N, D) in the compute dtype; overwritten with upstream * dL/drows unless `keep_rows`.
        unembedding: (V, D) in the compute dtype.
        targets: (N,) int64, IGNORE where there is none.
        upstream: dLoss/dL, 0-dim, in the loss dtype.
        gradient: what sums the unembedding's gradient; None where it is frozen.
        chunk: tokens per chunk.
        keep_rows: leave `rows` alone: nothing below needs a gradient.
        kernel: torch's operators, or one compiled kernel (mtp_mem/model/compiled_rows.py).

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
    softmax_minus_onehot = compiled_rows() if kernel == "compiled" else _softmax_minus_onehot
    logits = rows.new_empty(min(chunk, N), V)  # (c, V)
    for start in range(0, N, chunk):
        part = slice(start, min(start + chunk, N))
        x, weight = rows[part], (share[part] * upstream)[:, None]  # (c, D), (c, 1)
        z = logits[: x.shape[0]]
        torch.mm(x, unembedding.T, out=z)
        total += softmax_minus_onehot(z, column[part], share[part])
        if gradient is not None:  # the rows are needed no more, unless they are kept
            gradient.add(z, (x * weight).to(x.dtype) if keep_rows else x.mul_(weight))
        if not keep_rows:
            torch.mm(z, unembedding, out=x)
            x.mul_(weight)
    return total


def _softmax_minus_onehot(z: Tensor, column: Tensor, share: Tensor) -> Tensor:
    """Logits z (c, V) become dL_row/dlogits in place; returns the sum of the rows' losses, each times its share."""
    acc = loss_dtype(z.dtype)
    if z.dtype == acc:
        return _rows(z, column, share)
    height = max(1, min(z.shape[0], SOFTMAX_BLOCK // (z.shape[1] * acc.itemsize)))
    wide = z.new_empty(height, z.shape[1], dtype=acc)  # (r, V)
    total = z.new_zeros((), dtype=acc)
    for start in range(0, z.shape[0], height):
        part = slice(start, min(start + height, z.shape[0]))
        block = wide[: part.stop - part.start]
        block.copy_(z[part])
        total += _rows(block, column[part], share[part])
        z[part] = block
    return total


def _rows(z: Tensor, column: Tensor, share: Tensor) -> Tensor:
    # In place: documented for neither operator, and held by tests/test_token_chunks.py on every dtype.
    top, wanted = z.amax(dim=1), z.gather(1, column)[:, 0]  # (c,), (c,)
    torch.ops.aten._softmax.out(z, 1, False, out=z)
    # The largest probability is at least 1 / V, so that its logarithm gives the normaliser back without underflow.
    losses = top - z.amax(dim=1).log() - wanted  # (c,)
    z.scatter_add_(1, column, torch.full_like(column, -1, dtype=z.dtype))
    return torch.where(share > 0, losses * share, 0.0).sum()


def _add_product(out: Tensor, a: Tensor, b: Tensor, fresh: bool, cuda: bool) -> None:
    """out = a b (fresh) or out += a b; `out` may be wider than a and b."""
    if out.dtype == a.dtype:
        if fresh:
            torch.mm(a, b, out=out)
        else:
            out.addmm_(a, b)
    elif cuda:  # one kernel that sums in fp32: torch >= 2.8, and no CPU has it
        if fresh:
            torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
        else:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        wide = b.to(out.dtype)
        for start in range(0, out.shape[0], WIDE_ROWS):  # a wide copy of all of `a` would be larger than the logits
            part = slice(start, start + WIDE_ROWS)
            _add_product(out[part], a[part].to(out.dtype), wide, fresh, cuda)


def _main_grad(parameter: Tensor) -> Tensor:
    buffer = getattr(parameter, "main_grad", None)
    shape = tuple(parameter.shape)
    if not isinstance(buffer, Tensor):
        raise BadInput(
            f"accumulate=main_grad: the unembedding has no tensor `main_grad`; expected {shape} torch.float32"
        )
    if buffer.shape != parameter.shape or buffer.dtype != torch.float32 or buffer.device != parameter.device:
        raise BadInput(
            f"accumulate=main_grad: the unembedding's `main_grad` is {tuple(buffer.shape)} {buffer.dtype} on"
            f" {buffer.device}; expected {shape} torch.float32 on {parameter.device}"
        )
    return buffer
