"""A scenario made real in one dtype: model and batches, what a strategy does with them, and what is right.

`build` makes the model and the batches; `oracle` computes what is right in fp64 by plain autograd on `model(tokens)`:
no cut, no tree, no strategy.
"""

import contextlib
import dataclasses
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mtp_mem.config.schema import Dtype
from mtp_mem.data import Batch, make_batch
from mtp_mem.errors import BadInput
from mtp_mem.model.head_tree import keep_inputs
from mtp_mem.model.layers import PARAMETER_DTYPES
from mtp_mem.model.losses import IGNORE
from mtp_mem.model.mtp_model import MTPModel
from mtp_mem.model.optimizers import make_optimizer
from mtp_mem.model.own import Model, plain_logits
from mtp_mem.step import TrainingStep, forward_backward
from mtp_mem.strategy import Strategy, load_strategy
from mtp_mem.verification.scenarios import CHUNK, Scenario

DROPOUT = 0.2


class _Trunk(MTPModel):
    """The model with trunks as trainers have them, by `kind`; dropout draws the same mask in every dtype."""

    kind: Literal["plain", "dropout", "checkpointed", "transposed"] = "plain"

    def trunk(self, tokens: Tensor) -> Tensor:
        if self.kind == "checkpointed":
            return checkpoint(super().trunk, tokens, use_reentrant=False)  # type: ignore[no-any-return]
        z = super().trunk(tokens)
        if self.kind == "dropout":
            keep = torch.rand(z.shape) >= DROPOUT  # on the host, where the oracle draws too
            z = keep_inputs(z * keep.to(z.device) / (1 - DROPOUT), tokens)
        if self.kind == "transposed":
            z = keep_inputs(z.transpose(0, 1).contiguous().transpose(0, 1), tokens)
        return z


@dataclass(frozen=True)
class Problem:
    """A scenario made real in one dtype: the model, its batches, and what `.grad` holds at first."""

    scenario: Scenario
    model: Model
    drawn: Model  # the same on the CPU in fp64, for the oracle's use
    batches: tuple[Batch, ...]
    gradients: dict[str, Tensor]  # before the first batch, by parameter name; empty unless prefilled


@dataclass(frozen=True)
class Outcome:
    """What a step left behind: gradients by parameter name, and the losses of the last batch (n,)."""

    gradients: dict[str, Tensor | None]
    losses: Tensor


def build(scenario: Scenario, dtype: Dtype, device: torch.device) -> Problem:
    """The scenario's problem: the same weights and tokens in every dtype, up to the dtype's rounding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        drawn = _Trunk(scenario.config, dtype="fp64")
        drawn.kind = scenario.trunk
        with torch.no_grad():
            for name, parameter in drawn.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=scenario.std * (scenario.logits if name.startswith("unembedding") else 1.0))
        if scenario.offset:
            _offset(drawn, scenario.offset)
        prefilled = {name: torch.randn_like(p) * 0.01 for name, p in drawn.named_parameters() if scenario.prefilled}
    batches = tuple(_batch(scenario, seed, device) for seed in scenario.batches)
    model = drawn.moved(dtype, device)
    if scenario.steps:
        step = TrainingStep(model, make_optimizer(model, lr=0.01), batches[0], load_strategy("naive"))
        for _ in range(scenario.steps):
            step()
        model.zero_grad(set_to_none=True)
    if scenario.not_a_number:
        with torch.no_grad():
            model.get_parameter(scenario.not_a_number).view(-1)[5] = torch.nan
    for parameter in _frozen(model, scenario):
        parameter.requires_grad_(False)
    before = {name: grad.to(device, PARAMETER_DTYPES[dtype]) for name, grad in prefilled.items()}
    return Problem(scenario, model, drawn, batches, before)


def run(problem: Problem, step: Callable[[Model, Batch], Tensor]) -> Outcome:
    """Run every batch through `step`, which adds to `.grad` and returns the losses (n,)."""
    model = problem.model
    for name, parameter in model.named_parameters():
        parameter.grad = problem.gradients[name].clone() if name in problem.gradients else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)  # every run draws the same dropout
        losses = [step(model, batch) for batch in problem.batches]
    taken = {name: parameter.grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    return Outcome(taken, losses[-1])


def oracle(problem: Problem) -> Outcome:
    """The right answer in fp64: weights and `.grad` as the problem's dtype rounds them, everything after in fp64."""
    model = problem.drawn
    with torch.no_grad():
        for parameter, rounded in zip(model.parameters(), problem.model.parameters(), strict=True):
            parameter.copy_(rounded)
            parameter.requires_grad_(rounded.requires_grad)
    exact = dataclasses.replace(
        problem,
        model=model,
        batches=tuple(Batch(b.tokens.cpu(), b.targets.cpu()) for b in problem.batches),
        gradients={name: grad.to("cpu", torch.float64) for name, grad in problem.gradients.items()},
    )
    scenario = problem.scenario
    loss = (scenario.label_smoothing, scenario.z_loss)
    return run(exact, lambda m, batch: plain_step(m, batch, scenario.weights, scenario.scale, *loss))


def step_with(strategy: Strategy, scenario: Scenario) -> Callable[[Model, Batch], Tensor]:
    """The `step` that `run` needs to run the scenario with a strategy."""
    return lambda model, batch: forward_backward(
        model,
        batch,
        strategy,
        scenario.weights,
        scenario.scale,
        label_smoothing=scenario.label_smoothing,
        z_loss=scenario.z_loss,
    )


def plain_step(
    model: Model,
    batch: Batch,
    weights: Sequence[float] | None,
    scale: float,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Backward of scale * sum_i weights[i] * L_i by plain autograd on `model(tokens)`; returns L_i (n,), detached."""
    logits = plain_logits(model, batch.tokens)  # (n, B, S, V)
    shares = torch.log_softmax(logits, dim=-1)
    valid = batch.targets != IGNORE  # (n, B, S)
    picked = shares.gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0]  # (n, B, S)
    each = -(1 - label_smoothing) * picked - label_smoothing * shares.mean(dim=-1)
    each = each + z_loss * torch.logsumexp(logits, dim=-1) ** 2
    sums = torch.where(valid, each, torch.zeros_like(each)).sum(dim=(1, 2))  # (n,)
    losses = sums / valid.sum(dim=(1, 2)).clamp(min=1)
    upstream = torch.ones_like(losses) if weights is None else torch.tensor(weights, dtype=losses.dtype)
    (scale * upstream * losses).sum().backward()
    return losses.detach()


def with_options(strategy: Strategy, size: int | None) -> Strategy:
    """The strategy with every integer option of its dataclass set to `size`; None leaves its defaults.

    Such options are chunks, blocks, tiles and the like: a right strategy is right at every size. An option that refuses
    the size keeps its default.
    """
    if size is None or not dataclasses.is_dataclass(strategy):
        return strategy
    hints = typing.get_type_hints(type(strategy))
    for option in dataclasses.fields(strategy):
        if option.init and hints[option.name] in (int, int | None):
            with contextlib.suppress(BadInput, ValueError):
                strategy = dataclasses.replace(typing.cast(Any, strategy), **{option.name: size})
    return strategy


def _batch(scenario: Scenario, seed: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (scenario.batch, scenario.sequence)
    tokens = torch.randint(scenario.vocab_size, shape, generator=generator)
    batch = make_batch(tokens, scenario.n)
    targets = batch.targets
    if scenario.ignored == "nothing":
        anything = torch.randint(scenario.vocab_size, targets.shape, generator=generator)
        targets = torch.where(targets == IGNORE, anything, targets)
    elif scenario.ignored == "a chunk":
        targets.flatten(1)[:, CHUNK : 2 * CHUNK] = IGNORE
    elif scenario.ignored == "a head":
        targets[1] = IGNORE
    elif scenario.ignored == "everything":
        targets[:] = IGNORE
    elif scenario.ignored == "most of one sequence":
        targets[:, 0, 2:] = IGNORE
    if scenario.edge_targets:
        tokens[tokens == scenario.vocab_size - 2] = 1
        targets[targets == scenario.vocab_size - 2] = 1
        targets[:, 0, :3] = torch.tensor([0, scenario.vocab_size - 1, scenario.vocab_size - 2])
    if scenario.trunk == "transposed":
        targets = targets.transpose(1, 2).contiguous().transpose(1, 2)
    return Batch(tokens.to(device), targets.to(device))


def _frozen(model: MTPModel, scenario: Scenario) -> list[torch.nn.Parameter]:
    groups = model.groups()
    if scenario.frozen[:1] == ("all but",):
        return [p for name, own in groups.items() if name not in scenario.frozen for p in own]
    return [p for name in scenario.frozen for p in groups[name]]


class _Constant(torch.nn.Module):
    """Instead of a norm: hidden states (B, S, D) -> (1, 1, 0, ..., 0) at every position."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        ones = torch.ones(2, dtype=torch.float64)
        self.weight = torch.nn.Parameter(F.pad(ones, (0, dim - 2)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.to(x.dtype).expand_as(x)


def _offset(model: MTPModel, offset: float) -> None:
    """Make every logit exactly `offset`, so that each loss is log(V) and p = 1 / V; only the unembedding trains."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.norm = _Constant(model.dim)  # type: ignore[assignment]
    with torch.no_grad():
        for unembedding in model.unembeddings():
            unembedding.weight.zero_()
            unembedding.weight[:, 0] = offset
            unembedding.weight.requires_grad_(True)
