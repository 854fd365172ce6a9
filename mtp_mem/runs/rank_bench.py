"""A bench on every rank of a process group: sharded steps, gradients against one process, the largest rank's bytes."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from mtp_mem._util import Progress
from mtp_mem.config.schema import NODE, Dtype, ModelConfig, Profile
from mtp_mem.data import Batch, Corpus, load_corpus
from mtp_mem.distributed.collectives import Collectives
from mtp_mem.distributed.seam import whole
from mtp_mem.errors import MtpMemError
from mtp_mem.model.own import Model, groups, without_dropout
from mtp_mem.prediction.fake_ranks import shard_as
from mtp_mem.prediction.floor import NoLogits
from mtp_mem.runs.bench import REFERENCES, Bench, drawn_model, failure, free, on_host, speed
from mtp_mem.runs.ranks import Work
from mtp_mem.step import TrainingStep, forward_backward
from mtp_mem.step.head_loss import HeadLoss, loss_backward
from mtp_mem.strategy import Strategy, load_strategy
from mtp_mem.verification.gradient_error import Gradients, take

ONE_PROCESS = "one process"
RANK_REFERENCES = (ONE_PROCESS, *REFERENCES, "")
"""References for gradients: the first that fits; "" is none. One process takes all ranks' batches in turn."""

MOST_STEPS = 6
"""Tracked steps at most, until every rank's bytes have come twice."""


class DoesNotFit(MtpMemError):
    """The reference does not fit in memory: no fault of the strategy whose turn it is."""

    words = "the reference does not fit"


@dataclass(frozen=True)
class RankWork:
    """Makes a rank's function from a case (spec, n) to a record's fields; a spec of "" is the floor.

    Attributes:
        profile: model, workload, training and rounds.
        text: a UTF-8 file in place of the default text.
        device_type: "cpu" or "cuda".
        reference: one of RANK_REFERENCES.
    """

    profile: Profile
    text: Path | None
    device_type: str
    reference: str = ONE_PROCESS

    def __call__(self) -> Work:
        """The function, on a rank that has joined its group."""
        corpus = load_corpus(self.profile.workload, self.profile.model.vocab_size, self.text)
        device = torch.device(self.device_type)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        bench: RankBench | None = None

        def work(case: tuple[str, int], progress: Progress) -> dict[str, Any]:
            nonlocal bench
            spec, n = case
            if bench is None or bench.config.n_future != n:
                bench = None
                free(device)
                bench = RankBench(self.profile, self.profile.model.with_n(n), corpus, device, self.reference)
            if not spec:
                progress(f"n={n} floor: bytes")
                return bench.measure(NoLogits())
            strategy = load_strategy(spec)
            progress(f"n={n} {spec}: gradients")
            facts = bench.check(strategy)
            progress(f"n={n} {spec}: bytes")
            facts |= bench.measure(strategy)
            return facts | bench.timed(strategy, lambda: progress(f"n={n} {spec}: timing"))

        return work


class RankBench(Bench):
    """A model that is sharded over all ranks, each with a batch of its own; its methods are called on all of them."""

    def __init__(
        self, profile: Profile, config: ModelConfig, corpus: Corpus, device: torch.device, reference: str = ONE_PROCESS
    ) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._corpus, self._asked = corpus, reference
        self._ddp: DistributedDataParallel | None = None
        self._ddp_buckets: dict[int, Tensor] = {}
        super().__init__(profile, config, corpus, device)
        if profile.training.sharding == "ddp":
            self._ddp = DistributedDataParallel(HeadLoss(self.model))
            self._ddp.register_comm_hook(self._ddp_buckets, _average)
        self._backward(NoLogits())  # DDP and FSDP2 put hooks on the model in their first step
        self.model.zero_grad(set_to_none=True)

    def _model(self) -> Model:
        sharding, dtype = self.profile.training.sharding, self.profile.workload.dtype
        if sharding == "ddp":
            return drawn_model(self.profile, self.config, self.device)
        # bf16-mixed under FSDP2: fp32 shards, gathered in bf16, without autocast.
        own: Dtype = "fp32" if dtype == "bf16-mixed" else dtype
        model = drawn_model(self.profile, self.config, self.device, own)
        shape = (self.world // NODE, NODE) if sharding == "hsdp" else (self.world,)
        names = ("replicate", "shard")[-len(shape) :]
        shard_as(model, dtype, init_device_mesh(self.device.type, shape, mesh_dim_names=names))
        return model

    def _batch(self, corpus: Corpus, rank: int | None = None) -> Batch:
        return super()._batch(corpus, self.rank if rank is None else rank)

    def _settle_reference(self) -> None:
        self.reference_name = "no reference fits here"
        try:
            if self._asked == ONE_PROCESS:
                self.reference_name = f"naive in one process, the mean of {self.world} batches"
                self.reference = self._in_one_process() if self.rank == 0 else None
            elif self._asked:
                self.reference_name = f"{self._asked} on the same ranks"
                self.reference = on_host(self._gradients(load_strategy(self._asked)))
        except (RuntimeError, MemoryError) as e:
            if failure(e)["status"] == "oom":
                raise DoesNotFit(DoesNotFit.words) from None
            raise

    def _in_one_process(self) -> Gradients:
        """The mean over ranks of naive's gradients and losses, each rank's batch in turn, in host memory."""
        model, naive = drawn_model(self.profile, self.config, self.device), load_strategy("naive")
        total: dict[str, list[Tensor | None]] = {}
        for rank in range(self.world):
            batch, count = self._batch(self._corpus, rank), self.profile.training.micro_batches
            with without_dropout(model):
                for _ in range(count):
                    losses = forward_backward(model, batch, naive, scale=self._scale / count, **self._loss)
            own = on_host({**take(groups(model)), "losses": [losses]})
            total = {name: _sums(total.get(name), gradients) for name, gradients in own.items()}
        return {name: [None if g is None else g / self.world for g in gradients] for name, gradients in total.items()}

    def _gradients(self, strategy: Strategy) -> dict[str, list[Tensor | None]]:
        """Whole gradients, in host memory, and the mean of the losses over ranks."""
        gradients = super()._gradients(strategy)
        (losses,) = gradients["losses"]
        assert losses is not None
        dist.all_reduce(losses)
        gathered = {name: [None if g is None else whole(g).cpu() for g in own] for name, own in gradients.items()}
        return gathered | {"losses": [losses.cpu() / self.world]}

    def _backward(self, strategy: Strategy) -> Tensor:
        step, count = self.step(strategy), self.profile.training.micro_batches
        for i in range(count):
            last = i == count - 1
            losses = step.micro_batch(
                self.model, self.batch, step.strategy, scale=self._scale / count, sync=last, **self._loss
            )
        return losses

    def step(self, strategy: Strategy) -> TrainingStep:
        """The training step with this strategy, through DDP where that is the setup."""
        step = super().step(strategy)
        return step if self._ddp is None else dataclasses.replace(step, micro_batch=self._through_ddp)

    def _through_ddp(self, _model: Model, *what: Any, **how: Any) -> Tensor:
        assert self._ddp is not None
        return loss_backward(self._ddp, *what, **how)

    def measure(self, strategy: Strategy) -> dict[str, Any]:
        """Bytes of a step on the rank that takes most, and the collectives of a step."""
        with self.guarded(trains=True):
            step = self.step(strategy)
            step()  # the first one sets up lazily
            with Collectives() as seen:
                step()
            self._buckets = [(f"bucket {index}", buffer) for index, buffer in self._ddp_buckets.items()]
            ranks = self._steady(strategy)
        largest = max(range(self.world), key=lambda rank: (ranks[rank]["peak_requested_bytes"], -rank))
        counts = {"collectives": dict(seen.count), "collective_bytes": dict(seen.nbytes)}
        return ranks[largest] | {"largest_rank": largest} | counts

    def _steady(self, strategy: Strategy) -> list[dict[str, Any]]:
        """Each rank's facts of the step with its lowest peak and baseline, once these have come twice on every rank.

        A thread of gloo may hold a buffer a moment longer than the step does: that is no part of the step.
        """
        least: list[dict[str, Any]] = []
        repeated = [False] * self.world
        for _ in range(1 if self.device.type == "cuda" else MOST_STEPS):
            facts: list[dict[str, Any]] = [{}] * self.world
            dist.all_gather_object(facts, self._measure(strategy))
            for rank, (own, before) in enumerate(zip(facts, least or facts, strict=True)):
                now, then = ((one["peak_requested_bytes"], one["baseline_bytes"]) for one in (own, before))
                repeated[rank] = bool(least) and (now == then or (repeated[rank] and now > then))
                facts[rank] = before if now > then else own
            least = facts
            if all(repeated):
                break
        return least

    def timed(self, strategy: Strategy, progress: Any) -> dict[str, float]:
        """The record's times, by the slowest rank's seconds of each step and the tokens of all ranks."""
        seconds = []
        with self.guarded(trains=True):
            step = self.step(strategy)
            for _ in range(self.profile.sweep.rounds):
                progress()
                dist.barrier()
                seconds.append(self._seconds(step))
        slowest = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        tokens = self.profile.workload.tokens * self.profile.training.micro_batches * self.world
        return speed(slowest.tolist(), tokens)


def _average(seen: dict[int, Tensor], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Reduce a full bucket as DDP itself would, and note its buffer in `seen`."""
    seen[bucket.index()] = bucket.buffer()
    return allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]


def _sums(total: Sequence[Tensor | None] | None, more: Sequence[Tensor | None]) -> list[Tensor | None]:
    if total is None:
        return list(more)
    return [b if a is None else a if b is None else a + b for a, b in zip(total, more, strict=True)]
