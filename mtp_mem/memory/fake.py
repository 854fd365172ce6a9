"""Predict a step's CUDA bytes without a GPU: the real step on tensors without data, as CUDA's operators would run it.

Fake tensors live on device "cpu": on "cuda" the first operator that needs a gradient aborts a CPU build of torch. What
CUDA does differently is pinned: the flash-attention operator, fused AdamW, the buffers inside kernels.
"""

import gc

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from mtp_mem.config import GPU, ModelConfig, Workload
from mtp_mem.data import make_batch
from mtp_mem.errors import BadInput
from mtp_mem.layers import Attention
from mtp_mem.memory.kernels import KERNELS
from mtp_mem.memory.trace import Trace
from mtp_mem.memory.tracker import Tracker
from mtp_mem.model import MTPModel
from mtp_mem.step import TrainingStep, make_optimizer, optimizer_state
from mtp_mem.strategy import Strategy

WARM_UP = 1  # the first step has no optimizer state yet
CUBLAS_WORKSPACES = 2  # one per thread that multiplies: forward, and autograd's device thread


def trace_step(
    config: ModelConfig,
    workload: Workload,
    strategy: Strategy,
    *,
    attention: Attention = "flash",
    gpu: GPU | None = None,
) -> Trace:
    """Everything a steady training step allocates, from the construction of the model on.

    Args:
        config: the model's shape; its parameters are never materialised.
        workload: batch, sequence and dtype.
        strategy: must not read values back (`.item()`, boolean indexing): there are none.
        attention: "flash" is what CUDA runs in bf16, "sdpa" what this CPU runs.
        gpu: adds the buffers of its kernels; None adds none.

    Raises:
        BadInput: the strategy needs real data, or an operator that fake tensors do not know.
    """
    kernels = {} if gpu is None else {row.operator: row.buffers for row in KERNELS}
    tracker = Tracker(config.vocab_size, config.dim, [], kernels, 0 if gpu is None else gpu.multiprocessors)
    enabled = gc.isenabled()
    gc.disable()  # a collection in mid-step would free what a reference cycle still held
    try:
        with FakeTensorMode():
            with tracker:
                model = MTPModel(config, dtype=workload.dtype, attention=attention)
                batch = make_batch(torch.empty(workload.batch, workload.sequence, dtype=torch.long), config.n_future)
                optimizer = make_optimizer(model)
            tracker.watch(model.named_parameters())
            tracker.mark("parameters", model.named_parameters())
            tracker.mark("other", (("tokens", batch.tokens), ("targets", batch.targets)))
            step = TrainingStep(model, optimizer, batch, strategy, workload.clip_norm)
            for _ in range(WARM_UP):
                with tracker:
                    step(tracker.phase)
                    optimizer.zero_grad(set_to_none=True)
            tracker.mark("optimizer", optimizer_state(model, optimizer))
            tracker.begin_step()
            with tracker:
                step(tracker.phase)
            return tracker.finish()
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as e:
        name = type(strategy).__name__
        raise BadInput(f"{name} cannot be predicted: it needs real data or a GPU kernel ({e})".split("\n")[0]) from None
    finally:
        if enabled:
            gc.enable()
