"""A strategy in a user's own trainer: a loss whose `backward()` needs nothing special.

    z = model.trunk(input_ids=ids, attention_mask=mask)          # (B, S, D), with its graph
    loss, losses = mtp_mem.head_loss(model, z, targets, strategy="sequential")
    loss.backward()

The strategy runs in the forward pass of an autograd node, on shadows of the model's parameters: detached leaves that
share their storage. It fills the shadows' `.grad`, never the user's; the node's backward returns these gradients, times
the upstream gradient, to autograd. So no hook fires early, gradients are accumulated, reduced, scaled and clipped as
they always are, and every parameter gets its gradient once.

Memory on top of `forward_backward`'s: none where `.grad` is empty, because autograd takes over the shadows' gradients;
one copy of the heads' gradients where gradients are accumulated.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.func import functional_call

from mtp_mem.config.schema import HeadKind
from mtp_mem.data import IGNORE, Batch, future_targets
from mtp_mem.model.head_tree import Phase, no_phase
from mtp_mem.model.own import Model
from mtp_mem.step import upstream_gradients
from mtp_mem.strategy import Strategy, load_strategy, require_loss


def head_loss(
    model: Model,
    z: Tensor,
    targets: Tensor,
    strategy: str | Strategy = "sequential",
    weights: Sequence[float] | Tensor | None = None,
    num_items: int | Tensor | None = None,
    scale: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    phase: Phase = no_phase,
) -> tuple[Tensor, Tensor]:
    """The weighted loss of all heads, to call `backward()` on, and each head's own loss.

    Args:
        model: `MTPModel`, what `from_hf` made, or your own (mtp_mem/model/own.py).
        z: what `model.trunk(...)` returned in this step (B, S, D).
        targets: (n, B, S) int64, IGNORE where there is no target; `future_targets(labels, n)` makes them.
        strategy: a spec, or a strategy.
        weights: n loss weights; ones by default.
        num_items: a number or (n,). In the weighted loss head i's summed loss is divided by this, not by head i's own
            number of targets: what the Hugging Face Trainer calls `num_items_in_batch`.
        scale: the upstream gradient to expect, for example a `GradScaler`'s `get_scale()`. The heads' backward runs at
            this scale, which keeps fp16 from underflow; with another upstream gradient results differ by rounding.
        label_smoothing: of every head's loss; see `mtp_mem.model.losses.LossOptions`.
        z_loss: likewise.
        phase: called with the name of each phase of the heads as it begins.

    Returns:
        sum_i weights[i] * L_i, 0-dim, with its graph; and the n means L_i, (n,), detached; both in the loss dtype.

    Raises:
        BadInput: targets or weights of the wrong shape, a z that is not the trunk's, an unknown strategy, or one that
            does not take these options of the loss.
    """
    upstream = upstream_gradients(targets, (model.n_future, *z.shape[:-1]), weights, z)
    if num_items is not None:
        upstream = upstream * (targets != IGNORE).flatten(1).sum(1) / num_items
    names, parameters = zip(*model.named_parameters(), strict=True)
    chosen = load_strategy(strategy) if isinstance(strategy, str) else strategy

    def run(cut: Tensor, scaled: Tensor) -> Tensor:
        heads = model.heads(z, phase).with_loss(label_smoothing=label_smoothing, z_loss=z_loss)
        require_loss(chosen, heads.options)
        return chosen.backward(cut, heads, targets, scaled)

    train = torch.is_grad_enabled()
    loss, losses = _HeadLoss.apply(z, _Above(model, run), names, train, upstream, scale, *parameters)  # type: ignore[no-untyped-call]
    return loss, losses


class MTPForCausalLM(nn.Module):
    """A Hugging Face model with n heads whose forward returns the loss, as some trainers expect.

    Args:
        lm: any transformers `...ForCausalLM`; passed to `from_hf`.
        n: number of heads; see `from_hf`.
        strategy: a spec, or a strategy.
        kind: of heads; see `from_hf`.
        weights: n loss weights; ones by default.
        label_smoothing: see `head_loss`.
        z_loss: see `head_loss`.
    """

    def __init__(
        self,
        lm: nn.Module,
        n: int | None = None,
        strategy: str | Strategy = "sequential",
        kind: HeadKind | None = None,
        weights: Sequence[float] | None = None,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        from mtp_mem.model.huggingface import from_hf

        super().__init__()
        self.model = from_hf(lm, n, kind)
        self.strategy = load_strategy(strategy) if isinstance(strategy, str) else strategy
        self.weights = weights
        self.loss: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        self.config = lm.config  # trainers read it

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """The loss of all heads; without labels the logits.

        Args:
            input_ids: (B, S) int64.
            labels: (B, S) int64, as transformers takes them: `input_ids` with IGNORE where there is nothing to learn.
            num_items_in_batch: `num_items` of `head_loss`; trainers that accumulate pass it.
            inputs: other inputs of the model: attention_mask, position_ids, ...

        Returns:
            loss (0-dim) and losses (n,), or logits (n, B, S, V).
        """
        if labels is None:
            return {"logits": self.model(input_ids, **inputs)}
        z = self.model.trunk(input_ids, **inputs)  # (B, S, D)
        targets = future_targets(labels, self.model.n_future)
        loss, losses = head_loss(self.model, z, targets, self.strategy, self.weights, num_items_in_batch, **self.loss)
        return {"loss": loss, "losses": losses}

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Switch on the trunk's activation checkpointing, as trainers do by this name."""
        self.model.lm.gradient_checkpointing_enable(*args, **kwargs)  # type: ignore[operator]

    def gradient_checkpointing_disable(self) -> None:
        """Switch off the trunk's activation checkpointing."""
        self.model.lm.gradient_checkpointing_disable()  # type: ignore[operator]


class HeadLoss(nn.Module):
    """A model as a module whose forward returns the loss of all heads, so that DDP can wrap it.

    Args:
        model: see `head_loss`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, batch: Batch, strategy: Strategy, scale: float = 1.0, phase: Phase = no_phase, **loss: Any
    ) -> tuple[Tensor, Tensor]:
        """scale * sum_i weights[i] * L_i, 0-dim, with its graph; and L_i (n,), detached. `loss`: for `head_loss`."""
        phase("trunk forward")
        z = self.model.trunk(batch.tokens)  # (B, S, D)
        value, losses = head_loss(self.model, z, batch.targets, strategy, scale=scale, phase=phase, **loss)
        return value * scale, losses


def loss_backward(
    module: nn.Module,
    batch: Batch,
    strategy: Strategy,
    *,
    scale: float = 1.0,
    phase: Phase = no_phase,
    sync: bool = True,
    **loss: Any,
) -> Tensor:
    """One forward and backward pass by `head_loss`, with the gradients of `forward_backward`.

    Args:
        module: a `HeadLoss`, or one inside DDP.
        batch: tokens (B, S) and targets (n, B, S).
        strategy: how the heads' forward and backward passes are ordered.
        scale: multiplies the whole loss.
        phase: called with the name of each phase as it begins.
        sync: whether DDP averages the gradients: False for all but the last micro-batch.
        loss: other arguments of `head_loss`: weights, label_smoothing, z_loss.

    Returns:
        The n losses (n,), detached.
    """
    with contextlib.nullcontext() if sync or isinstance(module, HeadLoss) else module.no_sync():  # type: ignore[operator]
        value, losses = module(batch, strategy, scale, phase, **loss)
        phase("trunk backward")
        value.backward()
    return losses  # type: ignore[no-any-return]


class _Above(nn.Module):
    """A module around the model whose call runs the strategy: `functional_call` swaps in the shadows for it."""

    def __init__(self, model: Model, run: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, cut: Tensor, upstream: Tensor) -> Tensor:
        return self.run(cut, upstream)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        z: Tensor,
        above: _Above,
        names: Sequence[str],
        train: bool,
        upstream: Tensor,
        scale: float | Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        cut = z.detach().requires_grad_(train and z.requires_grad)
        shadows = [p.detach().requires_grad_(train and p.requires_grad) for p in parameters]
        shadowed = {f"model.{name}": shadow for name, shadow in zip(names, shadows, strict=True)}
        arguments = (cut, upstream * scale)
        with torch.set_grad_enabled(train):
            losses: Tensor = functional_call(above, shadowed, arguments)
        ctx.gradients = [cut.grad, *(shadow.grad for shadow in shadows)]  # type: ignore[attr-defined]
        ctx.scale = scale  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(losses)
        return (losses * upstream).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] | None = ctx.gradients  # type: ignore[attr-defined]
        if gradients is None:
            raise RuntimeError("head_loss: backward a second time, but the first one used up the heads' gradients")
        ctx.gradients = None  # type: ignore[attr-defined]
        factor = grad / ctx.scale  # type: ignore[attr-defined]
        z, *parameters = [None if g is None else g.mul_(factor) for g in gradients]
        return z, None, None, None, None, None, *parameters
