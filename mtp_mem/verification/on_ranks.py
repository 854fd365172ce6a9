"""The same gradient on several ranks? Strategies under DDP, FSDP2 and HSDP, against plain autograd in one process.

The right gradient is the mean over ranks of the fp64 oracle's, each on its rank's batch; or, where losses are divided
by all ranks' targets, the oracle's on all batches as one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from mtp_mem._util import Progress
from mtp_mem.config.schema import Dtype
from mtp_mem.data import IGNORE, Batch
from mtp_mem.distributed.ddp import mean_items
from mtp_mem.distributed.fsdp2 import shard
from mtp_mem.distributed.seam import whole
from mtp_mem.step import forward_backward
from mtp_mem.step.head_loss import HeadLoss, loss_backward
from mtp_mem.strategy import Strategy, load_strategy
from mtp_mem.verification.checks import Check
from mtp_mem.verification.problem import Outcome, Problem, build, oracle, run, step_with, with_options
from mtp_mem.verification.scenarios import Scenario
from mtp_mem.verification.verify import Truth, held_against

How = Literal["ddp", "fsdp2", "hsdp"]


@dataclass(frozen=True, kw_only=True)
class RankScenario(Scenario):
    """A step of several ranks, each with its own batches."""

    uneven: bool = False  # all ranks but the first have few targets, and one head has none there
    over_all: bool = False  # losses are divided by all ranks' targets, not by each rank's own
    stays_whole: bool = False  # FSDP2 keeps the trunk's parameters gathered between forward and backward pass


RANK_SCENARIOS: tuple[RankScenario, ...] = (
    RankScenario(name="usual"),
    RankScenario(name="tied unembedding", unembedding="tied"),
    RankScenario(name="deepseek heads, tied", head="deepseek", unembedding="tied"),
    RankScenario(name="causal heads", head="causal"),
    RankScenario(name="frozen trunk", frozen=("embedding", "trunk")),
    RankScenario(name="frozen norm", frozen=("norm",)),
    RankScenario(name="frozen unembedding", frozen=("unembedding",)),
    RankScenario(name="everything frozen but the heads", frozen=("all but", "head 1", "head 2", "head 3")),
    RankScenario(name="loss weights, scale 0.37", weights=(1.0, 0.0, 0.3), scale=0.37),
    RankScenario(name="two micro-batches", batches=(0, 1)),
    RankScenario(name="checkpointed trunk", trunk="checkpointed"),
    RankScenario(name="trunk stays whole", stays_whole=True),
    RankScenario(name="uneven targets", uneven=True),
    RankScenario(name="uneven targets, mean over all ranks", uneven=True, over_all=True),
)


@dataclass(frozen=True)
class RankCheck:
    """One check to run: a strategy, by its spec, in a scenario, under DDP, FSDP2 or HSDP."""

    strategy: str
    scenario: RankScenario
    how: How

    @property
    def name(self) -> str:
        """The name of the scenario, with how it is sharded."""
        return f"{self.how}: {self.scenario.name}"


@dataclass(frozen=True)
class RankChecks:
    """Makes the function that a rank calls with each `RankCheck`; its answer is a `Check`.

    Attributes:
        dtype: of the models; fp32 or fp64.
        device_type: "cpu" or "cuda".
    """

    dtype: Dtype = "fp32"
    device_type: str = "cpu"
    _truths: dict[str, Truth] = field(default_factory=dict)

    def __call__(self) -> Callable[[RankCheck, Progress], Check]:
        """The function; called on a rank that has joined its process group."""
        return self._check

    def _check(self, check: RankCheck, progress: Progress) -> Check:
        progress(f"{check.strategy}, {check.name}")
        scenario, strategy = check.scenario, load_strategy(check.strategy)
        if scenario.name not in self._truths:
            self._truths[scenario.name] = self._truth(scenario)
        problem = self._problem(scenario, dist.get_rank())
        outcome = _sharded(problem, with_options(strategy, scenario.chunk), check.how)
        verdict = held_against(
            self._truths[scenario.name], self._problem(scenario, 0), self.dtype, check.strategy, strategy, outcome
        )
        # The sum of two ranks does not depend on their order; a sum of more does, in its last bits.
        exact = verdict.exact and not scenario.over_all and dist.get_world_size() == 2
        return dataclasses.replace(verdict, scenario=check.name, exact=exact)

    def _problem(self, scenario: RankScenario, rank: int) -> Problem:
        own = dataclasses.replace(scenario, batches=tuple(seed + 100 * rank for seed in scenario.batches))
        device = torch.device(self.device_type)
        problem = build(own, self.dtype, device)
        if scenario.uneven and rank:
            for batch in problem.batches:
                batch.targets[:, :, :7] = IGNORE
                batch.targets[1] = IGNORE
        return problem

    def _truth(self, scenario: RankScenario) -> Truth:
        problems = [self._problem(scenario, rank) for rank in range(dist.get_world_size())]
        if scenario.over_all:
            batches = [problem.batches[0] for problem in problems]
            targets = torch.cat([batch.targets for batch in batches], dim=1)  # (n, world B, S)
            everything = Batch(torch.cat([batch.tokens for batch in batches]), targets)
            problems = [dataclasses.replace(problems[0], batches=(everything,))]
        naive = step_with(load_strategy("naive"), scenario)
        return Truth(_mean(list(map(oracle, problems))), _mean([run(problem, naive) for problem in problems]))


def checks(specs: Sequence[str], hows: Sequence[How]) -> list[RankCheck]:
    """Every strategy in every scenario, sharded in each of these ways."""
    ways = [(scenario, how) for scenario in RANK_SCENARIOS for how in hows if how != "ddp" or not scenario.stays_whole]
    return [RankCheck(spec, scenario, how) for scenario, how in ways for spec in specs]


def _sharded(problem: Problem, strategy: Strategy, how: How) -> Outcome:
    """The gradients averaged over ranks, each gathered whole, and the losses over all ranks (n,)."""
    scenario: Any = problem.scenario
    model: Any = problem.model
    world = dist.get_world_size()
    if how == "ddp":
        ddp = DistributedDataParallel(HeadLoss(model))
    else:
        kind = problem.batches[0].tokens.device.type
        shape = (2, world // 2) if how == "hsdp" else (world,)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        shard(model, mesh=mesh, reshard_after_forward=not scenario.stays_whole)
    last = len(problem.batches) - 1
    shares: Tensor | None = None  # (n,): weights that turn a rank's mean into one over all ranks' targets
    if scenario.over_all:
        targets = problem.batches[0].targets
        shares = (targets != IGNORE).flatten(1).sum(1) / mean_items(targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for i, batch in enumerate(problem.batches):
            weights = scenario.weights if shares is None else shares
            options: dict[str, Any] = {"scale": scenario.scale, "sync": i == last, "weights": weights}
            if how == "ddp":
                losses = loss_backward(ddp, batch, strategy, **options)
            else:
                losses = forward_backward(model, batch, strategy, **options)
    gradients = {name: None if p.grad is None else whole(p.grad) for name, p in model.named_parameters()}
    mean = (losses if shares is None else losses * shares) / world
    dist.all_reduce(mean)
    return Outcome(gradients, mean)


def _mean(outcomes: Sequence[Outcome]) -> Outcome:
    """The mean over ranks of gradients and losses; a gradient that is absent on one rank is absent on all."""
    gradients: dict[str, Tensor | None] = {}
    for name in outcomes[0].gradients:
        present = [own for outcome in outcomes if (own := outcome.gradients[name]) is not None]
        gradients[name] = torch.stack(present).sum(0) / len(outcomes) if present else None
    return Outcome(gradients, torch.stack([outcome.losses for outcome in outcomes]).sum(0) / len(outcomes))
