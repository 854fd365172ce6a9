"""Live tensor bytes of a real step on the CPU, tracked; and what its strategy holds between steps."""

import functools
import gc
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from torch import Tensor

from mtp_mem.distributed.seam import is_sharded
from mtp_mem.memory.trace import Trace
from mtp_mem.memory.tracker import Named, Tracker, between_steps
from mtp_mem.memory.unseen import all_seen
from mtp_mem.model.own import Model
from mtp_mem.step import TrainingStep

LEAVES = (type, ModuleType, BuiltinFunctionType, CodeType, FrameType, str, int, float, complex, bool, type(None))
MOST = 100_000
"""Objects of a strategy that are looked at; of a strategy that holds more, the rest is not counted."""


def track(step: TrainingStep, buckets: Named = ()) -> Trace:
    """Run the step twice under the tracker, and trace the second: what the first one leaves counts as live before it.

    The caller has run the step once before, untracked: only then does the optimizer have its state.

    Args:
        step: a step on the CPU.
        buckets: DDP's gradient buckets, by name.

    Raises:
        BrokenContract: the strategy computes where the tracker does not see it.
    """
    model = step.model
    freed = step.training.set_to_none
    model.zero_grad(set_to_none=freed)
    tracker = _tracker_for(model)(model.vocab_size, model.dim, model.named_parameters())
    for category, name, tensor in between_steps(step):
        tracker.resident(category, [(name, tensor)])
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
            begun = len(tracker.trace.events)
            step(tracker.phase)
    finally:
        if enabled:
            gc.enable()
    return tracker.step_alone(begun)


def _tracker_for(model: Model) -> type[Tracker]:
    """The tracker class: the one that knows FSDP2 if the model is sharded; importing that one takes a second."""
    if not is_sharded(model):
        return Tracker
    from mtp_mem.memory.sharded_tracker import ShardedTracker

    return ShardedTracker


def held_tensors(strategy: object) -> list[Tensor]:
    """Tensors that the strategy holds in attributes, containers or closures, with their gradients."""
    tensors = [value for value in _reachable(strategy) if isinstance(value, Tensor)]
    return tensors + [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]


def held_arrays(strategy: object) -> int:
    """Bytes that the strategy holds in NumPy's arrays, Python's arrays and byte strings."""
    sizes = {}
    for value in _reachable(strategy):
        if not isinstance(value, Tensor):
            try:
                sizes[id(value)] = memoryview(value).nbytes
            except (TypeError, ValueError, BufferError):  # has no buffer
                continue
    return sum(sizes.values())


def _reachable(root: object) -> Iterator[Any]:
    """Every object that `root` holds, once, except classes, modules and functions' globals, which are not its own."""
    pending, seen = [root], {id(root)}
    while pending and len(seen) < MOST:
        value = pending.pop()
        yield value
        if isinstance(value, FunctionType):
            inside: list[Any] = [value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value)]
        elif isinstance(value, functools.partial):
            inside = [value.func, value.args, value.keywords]
        elif isinstance(value, Tensor):
            inside = [vars(value)]
        elif isinstance(value, dict) and "__builtins__" in value:
            continue
        else:
            inside = gc.get_referents(value)
        for one in inside:
            if id(one) not in seen and not isinstance(one, LEAVES):
                seen.add(id(one))
                pending.append(one)
