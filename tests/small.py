"""Small models and batches for all tests, and the plain joint step that everything is held against."""

from collections.abc import Callable
from typing import Any

import torch

from mtp_mem import Batch, ModelConfig, MTPModel, make_batch
from mtp_mem.heads import Head, Phase, no_phase
from mtp_mem.losses import full, loss_dtype


def tiny(**changes: Any) -> ModelConfig:
    """A model of odd sizes: V = 517 is no multiple of any chunk, queries are grouped, n goes up to 9."""
    shape: dict[str, Any] = {"vocab_size": 517, "dim": 64, "n_layers": 9, "n_attention_heads": 4, "n_kv_heads": 2}
    return ModelConfig(**(shape | changes))


def build(config: ModelConfig, dtype: Any = "fp32", *, sequence: int = 24, seed: int = 0) -> tuple[MTPModel, Batch]:
    torch.manual_seed(seed)
    model = MTPModel(config, dtype=dtype)
    return model, make_batch(torch.randint(config.vocab_size, (2, sequence)), config.n_future)


def gradients(model: MTPModel, run: Callable[[], object]) -> dict[str, torch.Tensor | None]:
    """Gradients by parameter name that `run` leaves behind, from empty `.grad`."""
    model.zero_grad(set_to_none=True)
    run()
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def plain_joint(model: MTPModel, batch: Batch, phase: Phase = no_phase) -> None:
    """The textbook step, without a cut and without any strategy: all heads' losses, one backward to the embedding."""
    weights = torch.ones(model.config.n_future, dtype=loss_dtype(model.norm.weight.dtype))

    def loss(head: Head, z: torch.Tensor) -> torch.Tensor:
        with model.autocast():
            hidden = head.layer(z.view_as(z))
            return full(model.norm(hidden.view_as(hidden)), model.unembedding.weight, batch.targets[head.index])

    phase("trunk forward")
    z = model.trunk(batch.tokens)
    losses = [loss(head, z) for head in model.heads(batch.tokens).roots]
    del z
    phase("heads backward")
    torch.autograd.backward(losses, weights.unbind())
