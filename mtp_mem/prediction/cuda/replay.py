"""A traced step through the model of the allocator, from the state in which a step is measured.

`compare` and `predict --check` measure like this (mtp_mem/memory/cuda.py): the model and its batch are there, the cache
is empty, steps run, `torch.cuda.empty_cache()` gives back every segment in which nothing is live, and the next step is
measured. So the first step decides in which segments the optimizer's state and the workspaces lie, and which segments
stay. The trace's step is therefore replayed twice: as the first step, and as the measured one.
"""

from collections.abc import Mapping, Sequence

from mtp_mem.memory.trace import Trace
from mtp_mem.prediction.caching_allocator import CachingAllocator
from mtp_mem.prediction.cuda.allocator_settings import AllocatorSettings


def replay(trace: Trace, settings: AllocatorSettings, workspaces: Sequence[int] = ()) -> CachingAllocator:
    """Put a trace through the allocator; the peaks are those of the measured step.

    Args:
        trace: one step. If `made_by_first_step` is known, a first step is replayed before, and the cache emptied.
        settings: of the allocator.
        workspaces: bytes of buffers that stay (cuBLAS). The first is taken by the first product of the forward passes,
            the second by the first of the backward passes; further ones, and all where no first step is known, are
            there from the start.
    """
    allocator = CachingAllocator(
        expandable=bool(settings.expandable), large_segment=settings.large_segment, max_split=settings.max_split
    )
    late, moments = [], []
    if trace.made_by_first_step is not None:
        late, moments = trace.made_by_first_step, first_products(trace)[: len(workspaces)]
    for i in range(len(moments), len(workspaces)):
        allocator.allocate(-1 - i, workspaces[i])
    for key in trace.resident[: len(trace.resident) - len(late)]:
        allocator.allocate(key, trace.storages[key].nbytes)
    _run(allocator, trace, 0, trace.start)
    if trace.made_by_first_step is not None:
        live = {*allocator.taken, *late, *range(-len(workspaces), 0)}
        phases = [trace.storages[event.key].phase for event in trace.events[trace.start :]]
        stepped = trace.start + (phases.index("optimizer") if "optimizer" in phases else len(phases))
        _run(allocator, trace, trace.start, stepped, {at: (-1 - i, workspaces[i]) for i, at in enumerate(moments)})
        for key in late:
            allocator.allocate(key, trace.storages[key].nbytes)
        _run(allocator, trace, stepped, len(trace.events))
        for key in sorted(set(allocator.taken) - live):
            allocator.release(key)
        allocator.empty_cache()
    allocator.reset_peaks()
    _run(allocator, trace, trace.start, len(trace.events))
    return allocator


def first_products(trace: Trace) -> list[int]:
    """Indices of the events before which threads take their workspaces: the forward passes', then autograd's."""
    first: dict[bool, int] = {}
    for at, in_backward in trace.products:
        if at >= trace.start:
            first.setdefault(in_backward, at)
    return [first[thread] for thread in sorted(first)]


def _run(
    allocator: CachingAllocator, trace: Trace, begin: int, end: int, also: Mapping[int, tuple[int, int]] | None = None
) -> None:
    for i in range(begin, end):
        if also and i in also:
            allocator.allocate(*also[i])
        event = trace.events[i]
        if event.kind == "alloc":
            allocator.allocate(event.key, trace.storages[event.key].nbytes)
        elif event.kind == "free":
            allocator.release(event.key)
        else:
            allocator.move(event.key, event.old)
