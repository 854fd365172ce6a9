"""Bytes of a step on the CPU: the live tensor bytes of the real step, tracked."""

import gc
import sys

from mtp_mem.memory.held import held_tensors
from mtp_mem.memory.trace import Trace
from mtp_mem.memory.tracker import Named, Tracker
from mtp_mem.memory.unseen import all_seen
from mtp_mem.model.optimizers import optimizer_state
from mtp_mem.model.own import Model
from mtp_mem.step import TrainingStep


def track(step: TrainingStep, buckets: Named = ()) -> Trace:
    """Run the step twice under the tracker, and trace the second: what the first one leaves counts as live before it.

    Run it before, untracked: the first step has no optimizer state yet.

    Args:
        step: on the CPU.
        buckets: DDP's, by name.

    Raises:
        BrokenContract: the strategy computes where the tracker does not see it.
    """
    model, optimizer, batch = step.model, step.optimizer, step.batch
    freed = step.training.set_to_none
    model.zero_grad(set_to_none=freed)
    parameters = list(model.named_parameters())
    tracker = _tracker_for(model)(model.vocab_size, model.dim, parameters)
    tracker.resident("parameters", parameters)
    tracker.resident("gradients", ((f"{name}.grad", p.grad) for name, p in parameters if p.grad is not None))
    tracker.resident("optimizer", optimizer_state(model, optimizer))
    tracker.resident("other", (("tokens", batch.tokens), ("targets", batch.targets), *model.named_buffers()))
    tracker.resident("communication buffers", buckets)
    tracker.resident("other", (("kept by the strategy", tensor) for tensor in held_tensors(step.strategy)))
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()  # a collection in mid-step would free what a reference cycle still held
    try:
        with tracker, all_seen():
            step(tracker.phase)
            model.zero_grad(set_to_none=freed)
            gc.collect()
            tracker.begin_step()
            step(tracker.phase)
    finally:
        if enabled:
            gc.enable()
    return tracker.finish().step()


def _tracker_for(model: Model) -> type[Tracker]:
    """The one that knows FSDP2 where the model is sharded; importing that takes a second."""
    if "torch.distributed.fsdp" not in sys.modules:
        return Tracker
    from torch.distributed.fsdp import FSDPModule

    from mtp_mem.memory.sharded_tracker import ShardedTracker

    return ShardedTracker if isinstance(model, FSDPModule) else Tracker
