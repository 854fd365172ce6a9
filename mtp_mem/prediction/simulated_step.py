"""Predict a step's CUDA bytes without a GPU: the real step on tensors without data, as CUDA's operators would run it.

The tensors live on device meta. Under autocast, which meta has not, they are fake tensors on device "cpu": on "cuda"
the first operator that needs a gradient aborts a CPU build of torch. What CUDA does differently is pinned: the
flash-attention operator, the fused optimizer, the buffers inside kernels.
"""

import contextlib
import dataclasses
import importlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.utils._pytree import tree_leaves

from mtp_mem._util import without_collections
from mtp_mem.config.gpus import GPU
from mtp_mem.config.schema import Dtype, ModelConfig, Training, Workload
from mtp_mem.data import make_batch
from mtp_mem.distributed.collectives import Collectives
from mtp_mem.errors import BadInput
from mtp_mem.memory.trace import Trace
from mtp_mem.memory.tracker import Tracker
from mtp_mem.memory.unseen import all_seen
from mtp_mem.model.build import Unfilled, make_model
from mtp_mem.model.head_tree import keep_inputs
from mtp_mem.model.layers import Attention
from mtp_mem.model.mtp_model import MTPModel, cuda_attention
from mtp_mem.model.optimizers import optimizer_state, simulated_optimizer
from mtp_mem.model.own import Model, groups, set_up
from mtp_mem.prediction.floor import NoLogits
from mtp_mem.prediction.kernel_buffers import kernels_of
from mtp_mem.prediction.meta_results import MetaResults
from mtp_mem.step import TrainingStep
from mtp_mem.step.head_loss import HeadLoss, loss_backward
from mtp_mem.strategy import Strategy, kernel_limits


class _Mode(FakeTensorMode):
    """Fake tensors; operators on real tensors alone run as usual."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)  # a family's own constants have data

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if tensors and not any(map(_without_data, tensors)):  # an unfused optimizer counts its steps on the host
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs or {})


class Simulation:
    """A model of tensors without data, with the state that its optimizer has after a step; strategies step on it.

    Args:
        config: the model's shape; its parameters are never materialised.
        workload: batch, sequence and dtype.
        training: what is recomputed, frozen, accumulated, and the optimizer.
        cuda: as CUDA would run it; else as this CPU does.
        gpu: adds the buffers of its kernels; None adds none.
    """

    def __init__(
        self,
        config: ModelConfig,
        workload: Workload,
        training: Training | None = None,
        *,
        cuda: bool = True,
        gpu: GPU | None = None,
    ) -> None:
        attention: Attention = cuda_attention(workload.dtype) if cuda else "sdpa"
        training = training or Training()
        kernels = {} if gpu is None else kernels_of(gpu)
        sharded = training.sharding in ("fsdp2", "hsdp")
        fake = _Mode() if sharded or workload.dtype == "bf16-mixed" else None
        results = MetaResults(fake)
        kind_of_tracker: Callable[..., Tracker] = Tracker
        ranks = None
        if sharded:  # FSDP2 takes a second to import
            from mtp_mem.memory.sharded_tracker import ShardedTracker
            from mtp_mem.prediction import fake_ranks

            kind_of_tracker, ranks = ShardedTracker, fake_ranks.mesh(training)
        tracker = kind_of_tracker(config.vocab_size, config.dim, [], kernels, results.run)
        self.collectives: dict[str, dict[str, int]] = {}  # of the last step traced, as a record names them
        self._tracker, self._for_cuda, self._sharded, self._stepped = tracker, cuda, sharded, False
        self._mode: AbstractContextManager[object] = fake or contextlib.nullcontext()
        device = "cpu" if fake else "meta"
        # Under FSDP2 the parameters that it gathers are in bf16, and there is no autocast.
        dtype: Dtype = "fp32" if sharded and workload.dtype == "bf16-mixed" else workload.dtype
        with without_collections(), fake or results:
            with Unfilled():  # type: ignore[no-untyped-call]
                model = make_model(config, dtype=dtype, attention=attention, device=device)
            set_up(model, training)
            if ranks is not None:
                fake_ranks.shard_as(model, workload.dtype, ranks)
            tokens = torch.empty(workload.batch, workload.sequence, dtype=torch.long, device=device)
            batch = make_batch(tokens, config.n_future)
            optimizer = simulated_optimizer(
                model, name=training.optimizer, master=training.master_weights, host=unset_fake_temporarily
            )
            hidden = _hidden_states(model, tokens) if training.part == "heads" else None
            named = dict(model.named_parameters() if hidden is None else _above_the_cut(model, config))
            leaves = named if hidden is None else {**named, "hidden states": hidden}
            if training.keeps_gradients:
                for leaf in leaves.values():
                    leaf.grad = torch.empty_like(leaf) if leaf.requires_grad else None
        tracker.watch(model.named_parameters())
        tracker.resident("parameters", named.items())
        if hidden is None:
            given = {"tokens": batch.tokens, "targets": batch.targets, **dict(model.named_buffers())}
        else:
            given = {"hidden states": hidden, "targets": batch.targets}
        tracker.resident("other", given.items())
        built = len(tracker.trace.resident)
        gradients = ((f"{name}.grad", leaf.grad) for name, leaf in leaves.items() if leaf.grad is not None)
        tracker.resident("gradients", gradients)
        if hidden is None:
            state = optimizer_state(model, optimizer)
            # What an unfused optimizer keeps on the host is not CUDA's.
            tracker.resident("optimizer", (pair for pair in state if not cuda or _without_data(pair[1])))
        if training.sharding == "ddp":
            tracker.resident("communication buffers", _buckets(model))
        tracker.trace.made_by_first_step = tracker.trace.resident[built:]
        # All micro-batches from the second on need the same bytes.
        training = dataclasses.replace(training, micro_batches=min(2, training.micro_batches))
        self._step = TrainingStep(model, optimizer, batch, NoLogits(), workload.clip_norm, training, hidden)
        if training.sharding == "ddp":
            inside = HeadLoss(model)
            self._step = dataclasses.replace(
                self._step, micro_batch=lambda _, *what, **how: loss_backward(inside, *what, **how)
            )

    @property
    def baseline(self) -> int:
        """Bytes live before a step, in tensors: parameters, optimizer state, the batch; gradients where kept."""
        return self._tracker.trace.baseline

    def floor(self) -> Trace:
        """The step without logits."""
        return self.trace(NoLogits())

    def trace(self, strategy: Strategy) -> Trace:
        """Everything that a steady training step allocates.

        Args:
            strategy: must not read values back (`.item()`, boolean indexing): there are none.

        Raises:
            BadInput: the strategy needs real data, or an operator that has no kernel for tensors without data, or it
                says that its kernel decides by the device.
            BrokenContract: it computes where the tracker does not see it.
        """
        why = kernel_limits(strategy).not_predicted
        if why and self._for_cuda:
            raise BadInput(f"{type(strategy).__name__} cannot be predicted: {why}")
        # Else the first operator imports it, and a reference cycle in there keeps all frames of that moment alive, with
        # their tensors.
        importlib.import_module("torch._dynamo")
        tracker, warmed_up = self._tracker, len(self._tracker.trace.events)
        step = dataclasses.replace(self._step, strategy=strategy)
        # What a strategy keeps from step to step is live before the next one. Ours keep nothing; `verify` sees to that.
        warm_up = not type(strategy).__module__.startswith("mtp_mem.")
        if self._sharded and not self._stepped:  # FSDP2 keeps the trunk's last buffers, of any step before
            warm_up = self._stepped = True
        try:
            with without_collections(), self._mode:
                try:
                    seen = Collectives() if self._sharded else None
                    # Outside the tracker, which looks at the frames that issue an operator.
                    with seen or contextlib.nullcontext(), tracker, all_seen():
                        if warm_up:
                            step(tracker.phase)
                            step.forget_gradients()
                        begun = len(tracker.trace.events)
                        if seen:
                            seen.forget()
                        step(tracker.phase)
                    if seen:
                        self.collectives = {"collectives": dict(seen.count), "collective_bytes": dict(seen.nbytes)}
                    alone = self._sharded and not warm_up
                    return tracker.step_alone(begun) if alone else tracker.step_since(begun, warmed_up)
                finally:
                    step.forget_gradients()
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as e:
            raise self._unpredictable(strategy, e) from None
        except RuntimeError as e:
            if "meta" not in str(e) and isinstance(self._step.model, MTPModel):
                raise
            raise self._unpredictable(strategy, e) from None

    def _unpredictable(self, strategy: Strategy, error: Exception) -> BadInput:
        """It is the strategy's operator that has no result without data, or a module's of the model."""
        culprit, operator = type(strategy).__name__, ""
        names = {id(module): name for name, module in self._step.model.named_modules() if name}
        for frame, _ in traceback.walk_tb(error.__traceback__):
            module, func = frame.f_locals.get("self"), frame.f_locals.get("func")
            if isinstance(func, torch._ops.OpOverload):
                operator = f"{func}: "
            if id(module) in names:
                culprit = f"{names[id(module)]} ({type(module).__name__})"
        why = f"it needs real data or a GPU kernel ({operator}{error})".split("\n")[0]
        return BadInput(f"{culprit} cannot be predicted: {why}")


def _without_data(tensor: torch.Tensor) -> bool:
    tensor = getattr(tensor, "_local_tensor", tensor)  # of a DTensor the shard
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def _hidden_states(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    """What the heads read where no trunk runs: (B, S, D), a leaf that needs a gradient."""
    with torch.no_grad():
        z = model.trunk(tokens)
    return keep_inputs(z.detach().requires_grad_(), getattr(z, "mtp_inputs", None))


def _above_the_cut(model: Model, config: ModelConfig) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """All parameters but those of the parts "trunk" and "embedding"; of this too where heads use it."""
    owned = groups(model)
    shared = config.unembedding == "tied" or (config.head == "deepseek" and config.n_future > 1)
    below = {id(p) for part in ("trunk", *(() if shared else ("embedding",))) for p in owned.get(part, [])}
    yield from ((name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in below)


def _buckets(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """DDP's buckets, which it makes with the model: a second copy of every gradient."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield f"{name}: bucket", torch.empty_like(parameter)


def simulate(
    config: ModelConfig,
    workload: Workload,
    strategy: Strategy,
    training: Training | None = None,
    *,
    cuda: bool = True,
    gpu: GPU | None = None,
) -> Trace:
    """One strategy's step on a model of its own; see `Simulation`."""
    return Simulation(config, workload, training, cuda=cuda, gpu=gpu).trace(strategy)
