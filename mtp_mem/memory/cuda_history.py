"""The trace of a CUDA step from the caching allocator's history: each block's lifetime, origin and category.

The history is recorded in a separate step, never in the measured one. The allocator knows sizes and addresses, not
shapes: parameters, optimizer state, batch and gradients are named by their address, and the category of every other
block is inferred from its phase and size. The allocator's counter of allocations says where in the history each phase
begins.
"""

import gc
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtp_mem.distributed.seam import local
from mtp_mem.memory.trace import Category, Event, Storage, Trace
from mtp_mem.memory.tracker import between_steps
from mtp_mem.step import TrainingStep

MAX_ENTRIES = 1_000_000
Names = Mapping[int, tuple[Category, str]]
"""Address of a storage -> what it is for, and its name."""


@dataclass(frozen=True)
class Sizes:
    """The sizes that a block's category is inferred from: N tokens, V vocabulary, D width, bytes of each parameter."""

    N: int
    V: int
    D: int
    parameters: frozenset[int]

    def category(self, nbytes: int, phase: str) -> Category:
        """The category of a block allocated in this phase: a guess, except where only one tensor has that size."""
        if phase in ("clip", "optimizer"):
            return "other"
        backward = phase.endswith("backward")
        if phase.endswith("loss") or phase == "heads backward":
            if nbytes in {self.N * self.V * width for width in (2, 4, 8)}:
                return "logits"
            if nbytes in self.parameters and nbytes > 4 * self.D:
                return "gradients"
            # A slab of the vocabulary or a chunk of the tokens; hidden states are the only other wide tensors here.
            slab = any(nbytes % (side * width) == 0 for side in (self.N, self.V) for width in (2, 4, 8))
            hidden = nbytes in {self.N * columns * width for columns in (1, self.D) for width in (1, 2, 4, 8)}
            if slab and not hidden and not backward and nbytes > self.N * 8:
                return "logits"
            return "hidden-state gradients" if backward else "head activations"
        if backward:
            return "gradients" if nbytes in self.parameters else "hidden-state gradients"
        return "trunk activations" if phase == "trunk forward" else "head activations"


def record(step: TrainingStep, snapshot: Path | None = None) -> Trace:
    """Run the step once while the allocator records its history, and return its trace.

    Run the step at least once before, so that lazily allocated buffers and the optimizer state exist.

    Args:
        step: on a CUDA device.
        snapshot: where to leave torch's own snapshot (a pickle) for its memory viewer.
    """
    model, batch = step.model, step.batch
    model.zero_grad(set_to_none=step.training.set_to_none)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    names = _by_address(step)
    before = torch.cuda.memory._snapshot()["segments"]
    marks: list[tuple[int, str]] = []
    begun = _allocations()
    torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", max_entries=MAX_ENTRIES)
    try:
        step(lambda name: marks.append((_allocations() - begun, name)))
        torch.cuda.synchronize()
        history = torch.cuda.memory._snapshot()
        if snapshot is not None:
            torch.cuda.memory._dump_snapshot(str(snapshot))
    finally:
        torch.cuda.memory._record_memory_history(None)
    N = batch.tokens.numel()
    sizes = Sizes(N, model.vocab_size, model.dim, frozenset(local(p).nbytes for p in model.parameters()))
    gradients = {address: name for address, (category, name) in _by_address(step).items() if category == "gradients"}
    events = history["device_traces"][batch.tokens.device.index]
    return trace_of(events, resident_blocks(before), names, gradients, marks, sizes)


def resident_blocks(segments: Iterable[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """(address, requested bytes) of every block in use, from a snapshot's `segments`."""
    blocks = []
    for segment in segments:
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "active_allocated":
                blocks.append((block.get("address", address), block.get("requested_size", block["size"])))
            address += block["size"]
    return blocks


def trace_of(
    history: Sequence[Mapping[str, Any]],
    resident: Sequence[tuple[int, int]],
    names: Names,
    gradients: Mapping[int, str],
    marks: Sequence[tuple[int, str]],
    sizes: Sizes,
) -> Trace:
    """The trace of a step from a snapshot's `device_traces` entry.

    Args:
        history: the allocator's events in order: dicts with `action`, `addr`, `size`, and `frames` where recorded.
        resident: (address, bytes) of the blocks in use before the step.
        names: what lives before the step, by address; what is not named is a library's workspace.
        gradients: names of the gradients that are there after the step, by address.
        marks: (number of allocations before it, name) of each phase.
        sizes: from which categories are inferred.
    """
    trace = Trace()
    at: dict[int, int] = {}  # address -> key of the block there now
    for address, nbytes in resident:
        category, name = names.get(address, ("workspace", ""))
        at[address] = len(trace.storages)
        trace.resident.append(at[address])
        trace.storages[at[address]] = Storage(nbytes, category, "before the step", "", (nbytes,), "bytes", name)
    starts = [count for count, _ in marks]
    allocations = 0
    for entry in history:
        address = entry["addr"]
        if entry["action"] == "alloc":
            turn = bisect_right(starts, allocations) - 1
            phase = marks[turn][1] if turn >= 0 else "before the step"
            allocations += 1
            at[address] = key = len(trace.storages)
            nbytes = entry["size"]
            origin = _where(entry.get("frames", ()))
            trace.storages[key] = Storage(nbytes, sizes.category(nbytes, phase), phase, origin, (nbytes,), "bytes")
            trace.events.append(Event("alloc", key))
        elif entry["action"] == "free_completed" and address in at:
            trace.events.append(Event("free", at.pop(address)))
    for address, name in gradients.items():
        if address in at:
            trace.storages[at[address]].category = "gradients"
            trace.storages[at[address]].name = name
    return trace


def _by_address(step: TrainingStep) -> dict[int, tuple[Category, str]]:
    return {
        local(tensor).untyped_storage().data_ptr(): (category, name)  # a DTensor's own storage has no memory
        for category, name, tensor in between_steps(step)
        if tensor.is_cuda
    }


def _allocations() -> int:
    """Number of blocks allocated since the process began."""
    return int(torch.cuda.memory_stats()["allocation.all.allocated"])


def _where(frames: Sequence[Mapping[str, Any]]) -> str:
    """File, line and function of the innermost frame in this package; empty for autograd's own thread."""
    for frame in frames:
        path = Path(frame["filename"])
        if "mtp_mem" in path.parts or "strategies" in path.parts:
            return f"{path.name}:{frame['line']} {frame['name']}"
    return ""
