"""Small training steps that have caught wrong gradients before; `verify` runs every strategy through them.

A scenario is data: what is unusual about its model, its batch or the way it is called. `build` makes the model and the
batches; `oracle` computes what is right in fp64 by plain autograd on `model(tokens)`: no cut, no tree, no strategy.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mtp_mem.config.schema import ALL_DTYPES, Dtype, HeadKind, ModelConfig, Unembedding
from mtp_mem.data import Batch, make_batch
from mtp_mem.model.losses import IGNORE
from mtp_mem.model.mtp_model import PARAMETER_DTYPES, MTPModel
from mtp_mem.step import TrainingStep, make_optimizer
from mtp_mem.strategy import Strategy, load_strategy

CHUNK = 13  # divides neither V = 67 nor the number of tokens
DROPOUT = 0.2


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One unusual step. The defaults are the usual one."""

    name: str
    head: HeadKind = "parallel"
    unembedding: Unembedding = "shared"
    n: int = 3
    batch: int = 2
    sequence: int = 11
    vocab_size: int = 67
    kv_heads: int = 2
    weights: tuple[float, ...] | None = None
    scale: float = 1.0
    frozen: Literal["", "trunk", "unembedding", "head 2"] = ""
    ignored: Literal["tail", "nothing", "a chunk", "a head", "everything"] = "tail"
    batches: tuple[int, ...] = (0,)  # seeds; the same twice repeats a batch. Gradients accumulate over all
    prefilled: bool = False  # `.grad` holds something before the first batch
    logits: float = 1.0  # the unembedding is multiplied by this
    trunk: Literal["plain", "dropout", "checkpointed"] = "plain"
    steps: int = 0  # optimizer steps before
    chunk: int | None = CHUNK  # for strategies that have this option; None leaves theirs
    dtypes: tuple[Dtype, ...] = ALL_DTYPES

    @property
    def exact(self) -> bool:
        """Whether the order of heads alone decides the bits: one batch, no `.grad` yet (mtp_mem/model/head_tree.py)."""
        return not self.prefilled and len(self.batches) == 1

    def in_multiples_of(self, multiple: int) -> "Scenario":
        """For a kernel that takes no other sizes: vocabulary, tokens and chunk are raised where they are none."""
        if multiple == 1:
            return self

        def up(size: int, step: int = multiple) -> int:
            return -(-size // step) * step

        sequence = up(self.sequence, multiple // math.gcd(self.batch, multiple))
        chunk = None if self.chunk is None else up(self.chunk)
        return dataclasses.replace(self, vocab_size=up(self.vocab_size), sequence=sequence, chunk=chunk)

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            dim=32,
            n_layers=2,
            n_attention_heads=4,
            n_kv_heads=self.kv_heads,
            ffn_dim=48,
            n_future=self.n,
            head=self.head,
            unembedding=self.unembedding,
            match_layers=False,
        )


def _kinds() -> list[Scenario]:
    kinds: tuple[HeadKind, ...] = ("causal", "anticausal", "linear", "deepseek", "medusa")
    found = [Scenario(name=f"{kind} heads", head=kind, n=4) for kind in kinds]
    ways: tuple[Unembedding, ...] = ("tied", "replicated")
    found += [Scenario(name=f"{u} unembedding", unembedding=u) for u in ways]
    return [*found, Scenario(name="deepseek heads, tied", head="deepseek", unembedding="tied")]


SCENARIOS: tuple[Scenario, ...] = (
    *(Scenario(name=f"n = {n}", n=n) for n in (1, 2, 3, 4, 8)),
    *_kinds(),
    Scenario(name="S = 1", sequence=1),
    Scenario(name="one row, n larger than S", batch=1, sequence=3, n=4),
    Scenario(name="odd sizes", batch=3, sequence=7, vocab_size=41),
    Scenario(name="no grouped queries", kv_heads=4),
    Scenario(name="chunk of 1", chunk=1, sequence=5),
    Scenario(name="chunk divides everything", chunk=11, vocab_size=66),
    Scenario(name="chunk larger than everything", chunk=1000),
    Scenario(name="frozen trunk", frozen="trunk"),
    Scenario(name="frozen unembedding", frozen="unembedding"),
    Scenario(name="frozen head", frozen="head 2"),
    Scenario(name="frozen head in a chain", frozen="head 2", head="causal"),
    Scenario(name="no target ignored", ignored="nothing"),
    Scenario(name="a whole chunk ignored", ignored="a chunk"),
    Scenario(name="a whole head ignored", ignored="a head"),
    Scenario(name="everything ignored", ignored="everything"),
    Scenario(name="loss weights lambda / D", weights=(1.0, 0.15, 0.15)),
    Scenario(name="loss weight 0", weights=(1.0, 0.0, 0.3)),
    Scenario(name="upstream scale 0.37", scale=0.37),
    Scenario(name="upstream scale 65536", scale=65536.0),
    Scenario(name="existing .grad", prefilled=True),
    Scenario(name="existing .grad, two microbatches", prefilled=True, batches=(0, 1)),
    Scenario(name="the same batch twice", batches=(0, 0)),
    Scenario(name="logits of 1e4", logits=1e4),
    Scenario(name="dropout in the trunk", trunk="dropout"),
    Scenario(name="checkpointed trunk", trunk="checkpointed"),
    Scenario(name="after five optimizer steps", steps=5),
    Scenario(name="many chunks in bf16", batch=8, sequence=64, n=2, chunk=2, dtypes=("bf16",)),
)


class _Trunk(MTPModel):
    """The model with a trunk that is called as trainers call theirs; dropout draws alike in every dtype."""

    kind: Literal["plain", "dropout", "checkpointed"] = "plain"

    def trunk(self, tokens: Tensor) -> Tensor:
        if self.kind == "checkpointed":
            return checkpoint(super().trunk, tokens, use_reentrant=False)  # type: ignore[no-any-return]
        z = super().trunk(tokens)
        if self.kind == "dropout":
            keep = torch.rand(z.shape) >= DROPOUT  # on the host, where the oracle draws too
            z = z * keep.to(z.device) / (1 - DROPOUT)
        return z


@dataclass(frozen=True)
class Problem:
    """A scenario made real in one dtype: the model, its batches, and what `.grad` holds at first."""

    scenario: Scenario
    model: MTPModel
    batches: tuple[Batch, ...]
    gradients: dict[str, Tensor]  # before the first batch, by parameter name; empty unless prefilled


@dataclass(frozen=True)
class Outcome:
    """What a step left behind: gradients by parameter name, and the losses of the last batch (n,)."""

    gradients: dict[str, Tensor | None]
    losses: Tensor


def build(scenario: Scenario, dtype: Dtype, device: torch.device) -> Problem:
    """The same weights and tokens in every dtype, up to the dtype's rounding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        drawn = _Trunk(scenario.config, dtype="fp64")
        drawn.kind = scenario.trunk
        with torch.no_grad():
            for name, parameter in drawn.named_parameters():
                if parameter.dim() > 1:  # larger than an initialisation: softmax far from uniform
                    parameter.normal_(std=0.15 * (scenario.logits if name.startswith("unembedding") else 1.0))
        prefilled = {name: torch.randn_like(p) * 0.01 for name, p in drawn.named_parameters()}
        batches = {seed: _batch(scenario, seed) for seed in dict.fromkeys(scenario.batches)}
    model = drawn.moved(dtype, device)
    if scenario.steps:
        _train(model, batches[scenario.batches[0]], scenario.steps)
    for parameter in _frozen(model, scenario.frozen):
        parameter.requires_grad_(False)
    before = {}
    if scenario.prefilled:
        before = {name: grad.to(device, PARAMETER_DTYPES[dtype]) for name, grad in prefilled.items()}
    on_device = tuple(Batch(batches[s].tokens.to(device), batches[s].targets.to(device)) for s in scenario.batches)
    return Problem(scenario, model, on_device, before)


def run(problem: Problem, step: Callable[[MTPModel, Batch], Tensor]) -> Outcome:
    """Every batch through `step`, which accumulates into `.grad` and returns the losses (n,)."""
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
    model = problem.model.moved("fp64", torch.device("cpu"))
    exact = dataclasses.replace(
        problem,
        model=model,
        batches=tuple(Batch(b.tokens.cpu(), b.targets.cpu()) for b in problem.batches),
        gradients={name: grad.to("cpu", torch.float64) for name, grad in problem.gradients.items()},
    )
    return run(exact, lambda m, batch: plain_step(m, batch, problem.scenario.weights, problem.scenario.scale))


def plain_step(model: MTPModel, batch: Batch, weights: Sequence[float] | None, scale: float) -> Tensor:
    """scale * sum_i weights[i] * L_i by plain autograd on the logits of `model(tokens)`; returns the L_i (n,)."""
    logits = model(batch.tokens)  # (n, B, S, V)
    shares = torch.log_softmax(logits, dim=-1)
    valid = batch.targets != IGNORE  # (n, B, S)
    picked = shares.gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0]  # (n, B, S)
    sums = torch.where(valid, -picked, torch.zeros_like(picked)).sum(dim=(1, 2))  # (n,)
    losses = sums / valid.sum(dim=(1, 2)).clamp(min=1)
    upstream = torch.ones_like(losses) if weights is None else torch.tensor(weights, dtype=losses.dtype)
    (scale * upstream * losses).sum().backward()
    return losses.detach()


def with_chunk(strategy: Strategy, chunk: int | None) -> Strategy:
    """The strategy with this chunk size, if it has such an option."""
    options: tuple[dataclasses.Field[Any], ...] = (
        dataclasses.fields(strategy) if dataclasses.is_dataclass(strategy) else ()
    )
    if chunk is not None and any(option.name == "chunk" for option in options):
        return typing.cast(Strategy, dataclasses.replace(typing.cast(Any, strategy), chunk=chunk))
    return strategy


def _batch(scenario: Scenario, seed: int) -> Batch:
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
    return Batch(tokens, targets)


def _frozen(model: MTPModel, part: str) -> list[torch.nn.Parameter]:
    groups = model.groups()
    if part == "trunk":
        return [*groups["embedding"], *groups["trunk"]]
    return groups[part] if part else []


def _train(model: MTPModel, batch: Batch, steps: int) -> None:
    device = next(model.parameters()).device
    here = Batch(batch.tokens.to(device), batch.targets.to(device))
    step = TrainingStep(model, make_optimizer(model, lr=0.01), here, load_strategy("naive"))
    for _ in range(steps):
        step()
    step.optimizer.zero_grad(set_to_none=True)
