"""The loss of one head from its hidden states: projection onto the vocabulary and cross entropy, in plain autograd.

Every head loss has one signature: (hidden (B, S, D), unembedding (V, D), targets (B, S)) -> mean cross entropy over
the valid targets, a 0-dim tensor in fp32 (fp64 for fp64 models); and `softcap` where a model caps its logits.
Projections run in the model's dtype (or autocast's), softmax and loss in fp32. No valid target: loss 0 and zero
gradients. None of them synchronises with the device.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

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


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap); the logits themselves where there is no cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def full(hidden: Tensor, unembedding: Tensor, targets: Tensor, *, softcap: float | None = None) -> Tensor:
    """All logits at once, (N, V): the reference, plain autograd.

    Peak in the loss's backward: 3 tensors (N, V) of the loss dtype (log-softmax, its gradient, the logits' gradient).
    """
    count = (targets != IGNORE).sum().clamp(min=1)
    # One expression on purpose: a name would keep the logits alive through the backward, one (N, V) more.
    return (
        F.cross_entropy(
            capped(F.linear(hidden, unembedding).flatten(0, -2).to(loss_dtype(hidden.dtype)), softcap),  # (N, V)
            targets.flatten(),
            ignore_index=IGNORE,
            reduction="sum",
        )
        / count
    )
