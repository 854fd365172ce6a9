"""The loss of one head from its hidden states: projection onto the vocabulary and cross entropy, in plain autograd.

Every head loss has one signature: (hidden (B, S, D), unembedding (V, D), targets (B, S)) -> mean cross entropy over
the valid targets, a 0-dim tensor in fp32 (fp64 for fp64 models). Where the loss has further terms, it takes them as
`options`, a `LossOptions`: that class alone defines them, for autograd and for losses that compute their own gradient.
Projections run in the model's dtype (or autocast's), softmax and loss in fp32. No valid target: loss 0 and zero
gradients. No loss makes the host wait for the device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_mem.errors import BadInput

IGNORE = -100
"""Target value of positions that have no target; torch's own default for `ignore_index`."""

Loss = Callable[..., Tensor]


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that products with this tensor run in: autocast's where it is on, else the tensor's own."""
    kind = tensor.device.type
    # There is no autocast for tensors without data, and to ask for it is an error.
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else tensor.dtype


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of softmax and loss for a model of this dtype: fp64 stays fp64, all else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What a head's loss has besides the cross entropy of its logits; by default nothing.

    For a row of V logits x with target t, with the capped logits z = c tanh(x / c) and s = logsumexp(z):

        loss     = s - (1 - e) z_t - e mean(z) + k s^2
        dloss/dz = (1 + 2 k s) softmax(z) - (1 - e) onehot(t) - e / V
        dz/dx    = 1 - (z / c)^2

    Attributes:
        softcap: c (Gemma 2, section 2), or None: z = x.
        label_smoothing: e (Szegedy et al. 2016, section 7).
        z_loss: k (Chowdhery et al. 2022, section 5).

    Raises:
        BadInput: a value outside its range.
    """

    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise BadInput(f"softcap = {self.softcap}: must be positive and finite")
        if not 0 <= self.label_smoothing < 1:
            raise BadInput(f"label_smoothing = {self.label_smoothing}: must be at least 0 and below 1")
        if not 0 <= self.z_loss < math.inf:
            raise BadInput(f"z_loss = {self.z_loss}: must be at least 0 and finite")

    @property
    def used(self) -> tuple[str, ...]:
        """Names of the options that are set, so that they change the loss."""
        return tuple(name for name in LOSS_OPTIONS if getattr(self, name))

    def capped(self, logits: Tensor) -> Tensor:
        """The capped logits z, with their graph."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def total(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The sum of the valid rows' losses by plain autograd, 0-dim; logits (N, V) in the loss dtype, targets (N,)."""
        logits = self.capped(logits)
        loss = F.cross_entropy(
            logits, targets, ignore_index=IGNORE, reduction="sum", label_smoothing=self.label_smoothing
        )
        if self.z_loss:  # written out: torch.logsumexp allocates a tensor (N, V) that no instrument sees
            top = logits.detach().amax(dim=1)  # (N,)
            s = (logits - top[:, None]).exp().sum(dim=1).log() + top
            loss = loss + self.z_loss * torch.where(targets != IGNORE, s, 0).square().sum()
        return loss

    def cap_(self, logits: Tensor) -> Tensor:
        """Overwrite the logits with z."""
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, capped: Tensor) -> Tensor | None:
        """dz/dx, computed from z; None where it is 1 everywhere."""
        return None if self.softcap is None else (capped / self.softcap).square_().neg_().add_(1)

    def row_losses(self, top: Tensor, log_total: Tensor, target: Tensor, below_top: Tensor | None) -> Tensor:
        """Each row's loss (rows,), summed in an order in which an offset common to all its logits costs no precision.

        Args:
            top: each row's largest z, (rows,) as all arguments are.
            log_total: logsumexp(z - top).
            target: z_t.
            below_top: mean(top - z); only label smoothing needs it.
        """
        losses = (top - target) + log_total
        if below_top is not None:
            losses += self.label_smoothing * ((target - top) + below_top)
        if self.z_loss:
            losses += self.z_loss * (top + log_total).square_()
        return losses

    def gradient_(
        self, probabilities: Tensor, top: Tensor, log_total: Tensor, column: Tensor, onehot: Tensor, classes: int
    ) -> Tensor:
        """Overwrite the probabilities with dloss/dz; they cover the whole vocabulary or a slab of it.

        Args:
            probabilities: softmax(z), (rows, C) for C vocabulary entries.
            top: see `row_losses`.
            log_total: see `row_losses`.
            column: (rows, 1) int64, the target's column in the slab.
            onehot: (rows, 1), 1 where the target lies in the slab, else 0; overwritten.
            classes: V.
        """
        if self.z_loss:
            probabilities *= (1 + 2 * self.z_loss * (top + log_total))[:, None]
        if self.label_smoothing:
            probabilities -= self.label_smoothing / classes
            onehot *= 1 - self.label_smoothing
        return probabilities.scatter_add_(1, column, onehot.neg_())


LOSS_OPTIONS = tuple(LossOptions.__dataclass_fields__)
"""Names of the options."""

PLAIN = LossOptions()


def full(hidden: Tensor, unembedding: Tensor, targets: Tensor, *, options: LossOptions = PLAIN) -> Tensor:
    """One head's loss from all logits (N, V) at once, by plain autograd: the reference.

    Peak in the loss's backward: 3 tensors (N, V) of the loss dtype (log-softmax, its gradient, the logits' gradient).
    """
    count = (targets != IGNORE).sum().clamp(min=1)
    # One expression on purpose: a name would keep the logits alive through the backward, one (N, V) more.
    return (
        options.total(
            F.linear(hidden, unembedding).flatten(0, -2).to(loss_dtype(hidden.dtype)),  # (N, V)
            targets.flatten(),
        )
        / count
    )
