"""Small models and batches for all tests, and the plain joint step that everything is held against."""

import typing
from collections.abc import Callable
from typing import Any

import torch

from mtp_mem import Batch, ModelConfig, MTPModel, make_batch
from mtp_mem.config.schema import HeadKind, Unembedding
from mtp_mem.model.head_tree import Head, Phase, no_phase
from mtp_mem.model.losses import full, loss_dtype

KINDS: tuple[str, ...] = typing.get_args(HeadKind)
UNEMBEDDINGS: tuple[str, ...] = typing.get_args(Unembedding)


def tiny(**changes: Any) -> ModelConfig:
    """A model of odd sizes: V = 517 is no multiple of any chunk, queries are grouped, n goes up to 9."""
    shape: dict[str, Any] = {"vocab_size": 517, "dim": 64, "n_layers": 9, "n_attention_heads": 4, "n_kv_heads": 2}
    return ModelConfig(**(shape | changes))


def small_kind(head: str, n: int, **changes: Any) -> ModelConfig:
    """A model that is cheap at every n: one trunk layer (two where heads are no layers) and n heads."""
    shape: dict[str, Any] = {"vocab_size": 67, "dim": 32, "n_attention_heads": 2, "n_kv_heads": 1, "ffn_dim": 48}
    return ModelConfig(**(shape | {"n_layers": 2, "match_layers": False, "head": head, "n_future": n} | changes))


def build(config: ModelConfig, dtype: Any = "fp32", *, sequence: int = 24, seed: int = 0) -> tuple[MTPModel, Batch]:
    torch.manual_seed(seed)
    model = MTPModel(config, dtype=dtype)
    return model, make_batch(torch.randint(config.vocab_size, (2, sequence)), config.n_future)


def gradients(model: MTPModel, run: Callable[[], object]) -> dict[str, torch.Tensor | None]:
    """Gradients by parameter name that `run` leaves behind, from empty `.grad`."""
    model.zero_grad(set_to_none=True)
    run()
    copies = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return copies


def plain_joint(model: MTPModel, batch: Batch, phase: Phase = no_phase) -> None:
    """The textbook step, without a cut and without any strategy: all heads' losses, one backward to the embedding."""
    weights = torch.ones(model.config.n_future, dtype=loss_dtype(model.norm.weight.dtype))
    losses = _plain_losses(model, batch, phase)
    phase("heads backward")
    torch.autograd.backward(losses, weights.unbind())


def _plain_losses(model: MTPModel, batch: Batch, phase: Phase) -> list[torch.Tensor]:
    """Every head's loss with its graph, parents before children; hidden states are held by the graph alone."""
    phase("trunk forward")
    z = model.trunk(batch.tokens)
    losses: dict[int, torch.Tensor] = {}
    pending: list[tuple[Head, torch.Tensor]] = [(root, z) for root in reversed(model.heads(batch.tokens).roots)]
    while pending:
        head, parent = pending.pop()
        with model.autocast():
            hidden = head.layer(parent.view_as(parent))
            normed = model.norm(hidden.view_as(hidden))
            losses[head.index] = full(normed, head.unembedding, batch.targets[head.index])
        pending += [(child, hidden) for child in reversed(head.children)]
    return [losses[i] for i in range(model.config.n_future)]
