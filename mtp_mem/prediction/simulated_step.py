"""Predict a step's CUDA bytes without a GPU: the real step on tensors without data, as CUDA's operators would run it.

Fake tensors live on device "cpu": on "cuda" the first operator that needs a gradient aborts a CPU build of torch. What
CUDA does differently is pinned: the flash-attention operator, fused AdamW, the buffers inside kernels.
"""

import contextlib
import dataclasses
import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from mtp_mem.config.schema import GPU, ModelConfig, Workload
from mtp_mem.data import make_batch
from mtp_mem.errors import BadInput
from mtp_mem.memory.trace import Trace
from mtp_mem.memory.tracker import Tracker
from mtp_mem.memory.unseen import threads_refused
from mtp_mem.model.layers import Attention
from mtp_mem.model.mtp_model import MTPModel
from mtp_mem.prediction.floor import NoLogits
from mtp_mem.prediction.kernel_buffers import KERNELS
from mtp_mem.step import TrainingStep, make_optimizer, optimizer_state
from mtp_mem.strategy import Strategy, kernel_limits

CUBLAS_WORKSPACES = 2  # one per thread that multiplies: forward, and autograd's device thread
STEPS_BEFORE = 2  # the floor's, which makes the optimizer's state, and the replay's first pass over the step itself


class _Mode(FakeTensorMode):
    """Fake tensors, with a product that torch 2.11 and 2.12 get wrong: they take its `out_dtype` for `beta`."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.addmm.dtype_out and kwargs:
            return kwargs["out"]
        return super().__torch_dispatch__(func, types, args, kwargs or {})


class Simulation:
    """A model of tensors without data, built and warmed up once; every strategy then takes a step on it.

    The warm-up is always the floor's step, so that a strategy's trace does not depend on what else is rehearsed.

    Args:
        config: the model's shape; its parameters are never materialised.
        workload: batch, sequence and dtype.
        attention: "flash" is what CUDA runs in bf16, "sdpa" what this CPU runs.
        gpu: adds the buffers of its kernels; None adds none.
    """

    def __init__(
        self, config: ModelConfig, workload: Workload, *, attention: Attention = "flash", gpu: GPU | None = None
    ) -> None:
        kernels = {} if gpu is None else KERNELS
        self._tracker = Tracker(config.vocab_size, config.dim, [], kernels, 0 if gpu is None else gpu.multiprocessors)
        self._mode = _Mode()
        self._for_cuda = attention == "flash"
        tracker = self._tracker
        with without_collections(), self._mode:
            with tracker:
                model = MTPModel(config, dtype=workload.dtype, attention=attention)
                batch = make_batch(torch.empty(workload.batch, workload.sequence, dtype=torch.long), config.n_future)
                optimizer = make_optimizer(model)
            tracker.watch(model.named_parameters())
            tracker.mark("parameters", model.named_parameters())
            tracker.mark("other", (("tokens", batch.tokens), ("targets", batch.targets)))
            self._step = TrainingStep(model, optimizer, batch, NoLogits(), workload.clip_norm)
            begun = len(tracker.trace.events)
            with tracker:
                self._step(tracker.phase)
                ended = len(tracker.trace.events)
                optimizer.zero_grad(set_to_none=True)
            tracker.mark("optimizer", optimizer_state(model, optimizer))
            tracker.begin_step()
            self._floor = tracker.trace.events[begun:ended]

    def floor(self) -> Trace:
        """The step without logits once more: the warm-up's events, less the optimizer state, which is there now."""
        trace = self._tracker.step_since(len(self._tracker.trace.events))
        trace.events += [e for e in self._floor if trace.storages[e.key].category != "optimizer"]
        return trace

    def trace(self, strategy: Strategy) -> Trace:
        """Everything a steady training step allocates, after all that the model and its warm-up did.

        Args:
            strategy: must not read values back (`.item()`, boolean indexing): there are none.

        Raises:
            BadInput: the strategy needs real data or an operator that fake tensors do not know, or it says that its
                kernel decides by the device.
        """
        why = kernel_limits(strategy).not_predicted
        if why and self._for_cuda:
            raise BadInput(f"{type(strategy).__name__} cannot be predicted: {why}")
        tracker, warmed_up = self._tracker, len(self._tracker.trace.events)
        step = dataclasses.replace(self._step, strategy=strategy)
        # What a strategy keeps from step to step is live before the next one. Ours keep nothing; `verify` sees to that.
        warm_up = not type(strategy).__module__.startswith("mtp_mem.")
        try:
            with without_collections(), self._mode:
                try:
                    with tracker, threads_refused():
                        if warm_up:
                            step(tracker.phase)
                            step.optimizer.zero_grad(set_to_none=True)
                        begun = len(tracker.trace.events)
                        step(tracker.phase)
                    return tracker.step_since(begun, warmed_up)
                finally:
                    step.optimizer.zero_grad(set_to_none=True)
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as e:
            why = f"it needs real data or a GPU kernel ({e})".split("\n")[0]
            raise BadInput(f"{type(strategy).__name__} cannot be predicted: {why}") from None


def simulate(
    config: ModelConfig,
    workload: Workload,
    strategy: Strategy,
    *,
    attention: Attention = "flash",
    gpu: GPU | None = None,
) -> Trace:
    """One strategy's step on a model of its own; see `Simulation`."""
    return Simulation(config, workload, attention=attention, gpu=gpu).trace(strategy)


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """No garbage collection: in mid-step it would free what a reference cycle still held, and it costs time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
