"""Small training steps that have caught wrong gradients before; `verify` runs every strategy through them.

A scenario is data: what is unusual about its model, its batch or the way it is called. `build` makes the model and the
batches; `oracle` computes what is right in fp64 by plain autograd on `model(tokens)`: no cut, no tree, no strategy.
"""

import contextlib
import dataclasses
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mtp_mem.config.schema import USUAL_DTYPES, Dtype, HeadKind, ModelConfig, Unembedding
from mtp_mem.data import Batch, make_batch
from mtp_mem.errors import BadInput
from mtp_mem.model.head_tree import keep_inputs
from mtp_mem.model.layers import PARAMETER_DTYPES
from mtp_mem.model.losses import IGNORE, LossOptions
from mtp_mem.model.mtp_model import MTPModel
from mtp_mem.model.optimizers import make_optimizer
from mtp_mem.model.own import Model, plain_logits
from mtp_mem.step import TrainingStep, forward_backward
from mtp_mem.strategy import Strategy, load_strategy
from mtp_mem.verification.gradient_error import Reference

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
    dim: int = 32
    kv_heads: int = 2
    weights: tuple[float, ...] | None = None
    scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    frozen: tuple[str, ...] = ()  # parts of the model, or "all but" and the parts that train
    ignored: Literal["tail", "nothing", "a chunk", "a head", "everything", "most of one sequence"] = "tail"
    edge_targets: bool = False  # the first and the last id, and one that no token has, are targets
    batches: tuple[int, ...] = (0,)  # seeds; the same twice repeats a batch. Gradients accumulate over all
    prefilled: bool = False  # `.grad` holds something before the first batch
    std: float = 0.15  # of the weights: larger than an initialisation, so that softmax is far from uniform
    logits: float = 1.0  # the unembedding is multiplied by this
    offset: float = 0.0  # all logits are this number, and nothing but the unembedding trains
    not_a_number: str = ""  # the parameter that holds one NaN
    trunk: Literal["plain", "dropout", "checkpointed", "transposed"] = "plain"  # transposed: nothing is contiguous
    steps: int = 0  # optimizer steps before
    chunk: int | None = CHUNK  # for every integer option of a strategy; None leaves its defaults
    dtypes: tuple[Dtype, ...] = USUAL_DTYPES
    expected: Reference = "numbers"  # what every gradient and loss consists of

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
            dim=self.dim,
            n_layers=2,
            n_attention_heads=4,
            n_kv_heads=self.kv_heads,
            ffn_dim=48,
            n_future=self.n,
            head=self.head,
            unembedding=self.unembedding,
            match_layers=False,
            logit_softcap=self.softcap,
        )

    @property
    def options(self) -> LossOptions:
        """Of the loss."""
        return LossOptions(softcap=self.softcap, label_smoothing=self.label_smoothing, z_loss=self.z_loss)


def _kinds() -> list[Scenario]:
    kinds: tuple[HeadKind, ...] = ("causal", "anticausal", "linear", "deepseek", "medusa")
    scenarios = [Scenario(name=f"{kind} heads", head=kind, n=4) for kind in kinds]
    ways: tuple[Unembedding, ...] = ("tied", "replicated")
    scenarios += [Scenario(name=f"{u} unembedding", unembedding=u) for u in ways]
    return [*scenarios, Scenario(name="deepseek heads, tied", head="deepseek", unembedding="tied")]


SCENARIOS: tuple[Scenario, ...] = (
    *(Scenario(name=f"n = {n}", n=n) for n in (1, 2, 3, 4, 8)),
    *_kinds(),
    Scenario(name="S = 1", sequence=1, expected="zero"),
    Scenario(name="one token a row", sequence=1, ignored="nothing"),
    Scenario(name="one token in all", batch=1, sequence=1, ignored="nothing"),
    Scenario(name="one row, n larger than S", batch=1, sequence=3, n=4),
    Scenario(name="odd sizes", batch=3, sequence=7, vocab_size=41),
    Scenario(name="no grouped queries", kv_heads=4),
    Scenario(name="chunk of 1", chunk=1, sequence=5),
    Scenario(name="chunk divides everything", chunk=11, vocab_size=66),
    Scenario(name="chunk larger than everything", chunk=1000),
    Scenario(name="frozen trunk", frozen=("embedding", "trunk")),
    Scenario(name="frozen embedding", frozen=("embedding",)),
    Scenario(name="frozen trunk layers", frozen=("trunk",)),
    Scenario(name="frozen unembedding", frozen=("unembedding",)),
    Scenario(name="frozen norm", frozen=("norm",)),
    Scenario(name="frozen head", frozen=("head 2",)),
    Scenario(name="frozen head in a chain", frozen=("head 2",), head="causal"),
    Scenario(name="everything frozen but the heads", frozen=("all but", "head 1", "head 2", "head 3")),
    Scenario(name="no target ignored", ignored="nothing"),
    Scenario(name="a whole chunk ignored", ignored="a chunk"),
    Scenario(name="a whole head ignored", ignored="a head"),
    Scenario(name="everything ignored", ignored="everything", expected="zero"),
    Scenario(name="most of one sequence ignored", ignored="most of one sequence"),
    Scenario(name="first, last and undrawn id as targets", edge_targets=True),
    Scenario(name="loss weights lambda / D", weights=(1.0, 0.15, 0.15)),
    Scenario(name="loss weight 0", weights=(1.0, 0.0, 0.3)),
    Scenario(name="negative loss weight, scale 2^40", weights=(1.0, -0.5, 0.3), scale=2.0**40),
    Scenario(name="upstream scale 0.37", scale=0.37),
    Scenario(name="upstream scale 65536", scale=65536.0),
    Scenario(name="existing .grad", prefilled=True),
    Scenario(name="existing .grad, two microbatches", prefilled=True, batches=(0, 1)),
    Scenario(name="the same batch twice", batches=(0, 0)),
    Scenario(name="label smoothing", label_smoothing=0.1),
    Scenario(name="z-loss", z_loss=0.01),
    Scenario(name="label smoothing, z-loss and a softcap", label_smoothing=0.2, z_loss=0.02, softcap=1.5),
    Scenario(name="logits of 1e4", logits=1e4),
    Scenario(name="dropout in the trunk", trunk="dropout"),
    Scenario(name="checkpointed trunk", trunk="checkpointed"),
    Scenario(name="nothing contiguous", trunk="transposed"),
    Scenario(name="after five optimizer steps", steps=5),
    Scenario(name="many chunks in bf16", batch=8, sequence=64, n=2, chunk=2, dtypes=("bf16",)),
    Scenario(name="fp16 with a loss scale of 1024", scale=1024.0, dtypes=("fp16",)),
    Scenario(
        name="fp16, causal heads, label smoothing", head="causal", label_smoothing=0.1, scale=1024.0, dtypes=("fp16",)
    ),
    Scenario(name="fp16, tied, existing .grad", unembedding="tied", prefilled=True, scale=256.0, dtypes=("fp16",)),
    Scenario(name="many chunks in fp16", batch=8, sequence=64, n=2, chunk=2, scale=1024.0, dtypes=("fp16",)),
    Scenario(name="fp16 that overflows", scale=2.0**22, dtypes=("fp16",), expected="not finite"),
    # Not in bf16-mixed: there naive's gradient is exact by luck, and one of two rounded products is no error.
    Scenario(name="logits with a common offset of 2^20", offset=2.0**20, dtypes=("fp64", "fp32", "bf16")),
    Scenario(name="logits with a common offset of 2^27", offset=2.0**27, dtypes=("fp64", "fp32", "bf16")),
    Scenario(name="NaN in the unembedding", not_a_number="unembedding.weight", expected="not finite"),
    Scenario(name="NaN in the norm", not_a_number="norm.weight", expected="not finite"),
)

REAL_SIZES: tuple[Scenario, ...] = (
    Scenario(name="N = 4,102", batch=293, sequence=14, n=2, vocab_size=521, dim=64, chunk=None, dtypes=("fp32",)),
    Scenario(name="V = 33,001", sequence=24, n=2, vocab_size=33001, dim=128, chunk=None, dtypes=("fp32",)),
    Scenario(name="V = 33,001, as initialised", n=2, vocab_size=33001, std=0.02, chunk=None, dtypes=("fp32",)),
    Scenario(name="D = 192", sequence=150, n=2, vocab_size=4111, dim=192, std=0.05, chunk=None, dtypes=("fp32",)),
    Scenario(name="N = 8,206", batch=586, sequence=14, n=1, chunk=None, dtypes=("fp32",)),
    Scenario(name="V = 65,601", n=1, vocab_size=65601, edge_targets=True, chunk=None, dtypes=("fp32",)),
    Scenario(name="D = 320", n=2, dim=320, std=0.05, chunk=None, dtypes=("fp32",)),
)
"""Sizes that cross what kernels and chunk loops take for granted, at a strategy's default options.

More than 4096 and 8192 tokens and no power of two, more than 2^15 and 2^16 vocabulary entries with a partial last slab,
widths of 64, 128, 192 and 320, and fewer tokens than any default chunk.
"""


class _Trunk(MTPModel):
    """The model with a trunk that is called as trainers call theirs; dropout draws alike in every dtype."""

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
    """The same weights and tokens in every dtype, up to the dtype's rounding."""
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
        batches = {seed: _batch(scenario, seed) for seed in dict.fromkeys(scenario.batches)}
    model = drawn.moved(dtype, device)
    if scenario.steps:
        _train(model, batches[scenario.batches[0]], scenario.steps)
    if scenario.not_a_number:
        with torch.no_grad():
            model.get_parameter(scenario.not_a_number).view(-1)[5] = torch.nan
    for parameter in _frozen(model, scenario):
        parameter.requires_grad_(False)
    before = {}
    if scenario.prefilled:
        before = {name: grad.to(device, PARAMETER_DTYPES[dtype]) for name, grad in prefilled.items()}
    on_device = tuple(Batch(batches[s].tokens.to(device), batches[s].targets.to(device)) for s in scenario.batches)
    return Problem(scenario, model, drawn, on_device, before)


def run(problem: Problem, step: Callable[[Model, Batch], Tensor]) -> Outcome:
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
    """What `run` is given to run the scenario with a strategy."""
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
    """scale * sum_i weights[i] * L_i by plain autograd on the logits of `model(tokens)`; returns the L_i (n,)."""
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

    Chunks, blocks, tiles and the like, whatever they are called: a right strategy is right at every size. An option
    that refuses the size keeps its default.
    """
    if size is None or not dataclasses.is_dataclass(strategy):
        return strategy
    hints = typing.get_type_hints(type(strategy))
    for option in dataclasses.fields(strategy):
        if option.init and hints[option.name] in (int, int | None):
            with contextlib.suppress(BadInput, ValueError):
                strategy = dataclasses.replace(typing.cast(Any, strategy), **{option.name: size})
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
    elif scenario.ignored == "most of one sequence":
        targets[:, 0, 2:] = IGNORE
    if scenario.edge_targets:
        tokens[tokens == scenario.vocab_size - 2] = 1
        targets[targets == scenario.vocab_size - 2] = 1
        targets[:, 0, :3] = torch.tensor([0, scenario.vocab_size - 1, scenario.vocab_size - 2])
    if scenario.trunk == "transposed":
        targets = targets.transpose(1, 2).contiguous().transpose(1, 2)
    return Batch(tokens, targets)


def _frozen(model: MTPModel, scenario: Scenario) -> list[torch.nn.Parameter]:
    groups = model.groups()
    if scenario.frozen[:1] == ("all but",):
        return [p for name, own in groups.items() if name not in scenario.frozen for p in own]
    return [p for name in scenario.frozen for p in groups[name]]


class _Constant(torch.nn.Module):
    """Instead of a norm: hidden states (B, S, D) -> (1, 1, 0, ..., 0) at every place."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(dim, dtype=torch.float64))
        with torch.no_grad():
            self.weight[:2] = 1

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.to(x.dtype).expand_as(x)


def _offset(model: MTPModel, offset: float) -> None:
    """Make every logit `offset` exactly: losses are log(V), and the second column of dW is that of p = 1 / V."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.norm = _Constant(model.dim)  # type: ignore[assignment]
    model.norm.weight.requires_grad_(False)
    with torch.no_grad():
        for unembedding in model.unembeddings():
            unembedding.weight.zero_()
            unembedding.weight[:, 0] = offset
            unembedding.weight.requires_grad_(True)


def _train(model: MTPModel, batch: Batch, steps: int) -> None:
    device = next(model.parameters()).device
    on_device = Batch(batch.tokens.to(device), batch.targets.to(device))
    step = TrainingStep(model, make_optimizer(model, lr=0.01), on_device, load_strategy("naive"))
    for _ in range(steps):
        step()
    step.model.zero_grad(set_to_none=True)
