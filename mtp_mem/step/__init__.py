"""One training step for every strategy: the graph is cut once, at the trunk's output.

z = trunk(tokens);  cut = z.detach().requires_grad_()
losses = strategy.backward(cut, heads, targets, weights)      # the only part that differs
z.backward(cut.grad);  clip;  optimizer.step()
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtp_mem.config.schema import Training
from mtp_mem.data import Batch
from mtp_mem.distributed.seam import around_the_heads, refuse_other_parallelism, shards
from mtp_mem.errors import BadInput
from mtp_mem.model.head_tree import Phase, no_phase
from mtp_mem.model.losses import loss_dtype
from mtp_mem.model.optimizers import Optimizer
from mtp_mem.model.own import Model
from mtp_mem.strategy import Strategy, require_loss


def forward_backward(
    model: Model,
    batch: Batch,
    strategy: Strategy,
    weights: Sequence[float] | Tensor | None = None,
    scale: float = 1.0,
    phase: Phase = no_phase,
    sync: bool = True,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    hidden: Tensor | None = None,
) -> Tensor:
    """Add the gradient of scale * sum_i weights[i] * L_i to every trainable parameter's `.grad`.

    Args:
        model: `MTPModel`, what `from_hf` made, or your own (mtp_mem/model/own.py).
        batch: tokens (B, S) and targets (n, B, S).
        strategy: how the heads' forward and backward passes are ordered.
        weights: n loss weights; ones by default, the plain sum of Gloeckle et al. 2024, section 2.
        scale: multiplies the whole loss (gradient accumulation, fp16 loss scaling).
        phase: called with the name of each phase as it begins.
        sync: whether a model that is sharded by FSDP2 reduces its gradients: False for all but the last micro-batch.
        label_smoothing: of every head's loss; see `mtp_mem.model.losses.LossOptions`.
        z_loss: likewise.
        hidden: (B, S, D), a leaf to use in place of the trunk's output; nothing below the cut runs then.

    Returns:
        The unweighted losses L_i, (n,), detached: fp32, or fp64 for fp64 models.

    Raises:
        BadInput: targets or weights of the wrong shape, a strategy without these options of the loss, a model inside
            DDP or sharded by tensor parallelism.
    """
    refuse_other_parallelism(model)
    phase("trunk forward" if hidden is None else "heads forward")
    upstream = upstream_gradients(
        batch.targets, (model.n_future, *batch.tokens.shape), weights, next(model.parameters()), scale
    )
    z = model.trunk(batch.tokens) if hidden is None else hidden  # (B, S, D)
    cut = z.detach().requires_grad_(z.requires_grad) if hidden is None else hidden
    with around_the_heads(model, sync=sync, frozen_trunk=not z.requires_grad) as turn:

        def both(name: str) -> None:
            phase(name)
            turn(name)

        heads = model.heads(z, both).with_loss(label_smoothing=label_smoothing, z_loss=z_loss)
        require_loss(strategy, heads.options)
        losses = strategy.backward(cut, heads, batch.targets, upstream)
    if hidden is None and z.requires_grad:
        phase("trunk backward")
        torch.autograd.backward(z, cut.grad)
    return losses


@dataclass(frozen=True, eq=False)
class TrainingStep:
    """One training step on one batch: forward, backward, clipping, optimizer; see `__call__`.

    `micro_batch` runs one forward and backward pass: `forward_backward`, or under DDP a function with its arguments.
    """

    model: Model
    optimizer: Optimizer
    batch: Batch
    strategy: Strategy
    clip_norm: float = 1.0
    training: Training = field(default_factory=Training)
    hidden: Tensor | None = None  # (B, S, D), a leaf in place of the trunk's output: the heads alone are run
    micro_batch: Callable[..., Tensor] = forward_backward

    def __call__(self, phase: Phase = no_phase) -> Tensor:
        """Run the step; returns the last micro-batch's losses (n,), detached. Every micro-batch is the same batch."""
        self.forget_gradients()
        training, count = self.training, self.training.micro_batches
        half = next(self.model.parameters()).dtype == torch.float16
        loss_scale = training.scale("fp16" if half else "fp32")
        alone = {} if self.hidden is None else {"hidden": self.hidden}
        for i in range(count):
            losses = self.micro_batch(
                self.model,
                self.batch,
                self.strategy,
                scale=loss_scale / count,
                phase=phase,
                sync=i == count - 1,
                label_smoothing=training.label_smoothing,
                z_loss=training.z_loss,
                **alone,
            )
        if self.hidden is not None:
            return losses
        phase("clip")
        if loss_scale != 1:
            unscale(self.model.parameters(), loss_scale)
        clip_gradients(self.model.parameters(), self.clip_norm)
        phase("optimizer")
        self.optimizer.step()
        return losses

    def forget_gradients(self) -> None:
        """Free the gradients of the step before, or set them to zero, as `training.set_to_none` says."""
        self.model.zero_grad(set_to_none=self.training.set_to_none)
        if self.hidden is not None and self.hidden.grad is not None:
            if self.training.set_to_none:
                self.hidden.grad = None
            else:
                self.hidden.grad.zero_()


@torch.no_grad()
def unscale(parameters: Iterable[Tensor], loss_scale: float) -> None:
    """Divide the parameters' gradients by a loss scale, in place."""
    if gradients := [parameter.grad for parameter in parameters if parameter.grad is not None]:
        torch._foreach_mul_(gradients, 1 / loss_scale)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> None:
    """As `torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)`, but also for tensors without data.

    Args:
        parameters: whose `.grad` is scaled so that the norm of all is `max_norm` at most.
        max_norm: the largest Euclidean norm allowed.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        gradients, over_ranks = shards(gradients)
        norm = over_ranks(torch.linalg.vector_norm(torch.stack(list(torch._foreach_norm(gradients)))))
        torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))


def upstream_gradients(
    targets: Tensor, expected: tuple[int, ...], weights: Sequence[float] | Tensor | None, like: Tensor, scale: float = 1
) -> Tensor:
    """What each head's loss is multiplied by, (n,) in the loss dtype for `like` and on its device.

    Raises:
        BadInput: targets whose shape is not the expected (n, B, S), or weights that are not n.
    """
    if targets.shape != expected:
        raise BadInput(f"targets have shape {tuple(targets.shape)}, expected (n, B, S) = {expected}")
    n, dtype = expected[0], loss_dtype(like.dtype)
    if weights is None:
        return torch.full((n,), scale, dtype=dtype, device=like.device)
    upstream = torch.as_tensor(weights, dtype=dtype, device=like.device)
    if upstream.shape != (n,):
        raise BadInput(f"weights have shape {tuple(upstream.shape)}, expected ({n},), one for each head")
    return upstream * scale
