"""A traced step through the model of the allocator, from the state in which a step is measured.

`compare` and `predict --check` measure like this (mtp_mem/memory/cuda.py): the model and its batch are there, the cache
is empty, steps run, `torch.cuda.empty_cache()` gives back every segment in which nothing is live, and the next step is
measured. So the first step decides in which segments the optimizer's state and the workspaces lie, and what of the
segments stays; the trace's own step is put through twice.
"""

from collections.abc import Mapping, Sequence

from mtp_mem.memory.trace import Trace
from mtp_mem.prediction.caching_allocator import CachingAllocator
from mtp_mem.prediction.cuda.allocator_settings import AllocatorSettings


def replay(trace: Trace, settings: AllocatorSettings, workspaces: Sequence[int] = ()) -> CachingAllocator:
    """Put a trace through the allocator; the peaks are those of the measured step.

    Args:
        trace: one step. Where it says what the first step makes, that step comes before, and the cache is emptied.
        settings: of the allocator.
        workspaces: sizes of buffers that stay (cuBLAS). The first is taken by the first product of the forward passes,
            the second by the first of the backward passes; further ones, and all where no first step is known, are
            there from the start.
    """
    allocator = CachingAllocator(
        expandable=bool(settings.expandable), large_segment=settings.large_segment, max_split=settings.max_split
    )
    keys = {-1 - i: nbytes for i, nbytes in enumerate(workspaces)}
    taken_at = _first_products(trace, keys) if trace.made_by_first_step is not None else {}
    late = trace.made_by_first_step or []
    for key in keys.keys() - {key for made in taken_at.values() for key in made}:
        allocator.allocate(key, keys[key])
    for key in trace.resident[: len(trace.resident) - len(late)]:
        allocator.allocate(key, trace.storages[key].nbytes)
    _run(allocator, trace, 0, trace.start)
    if trace.made_by_first_step is not None:
        live = {*allocator.taken, *late, *keys}
        phases = [trace.storages[event.key].phase for event in trace.events[trace.start :]]
        stepped = trace.start + (phases.index("optimizer") if "optimizer" in phases else len(phases))
        _run(allocator, trace, trace.start, stepped, {at: {k: keys[k] for k in made} for at, made in taken_at.items()})
        for key in late:
            allocator.allocate(key, trace.storages[key].nbytes)
        _run(allocator, trace, stepped, len(trace.events))
        for key in sorted(set(allocator.taken) - live):
            allocator.release(key)
        allocator.empty_cache()
    allocator.reset_peaks()
    _run(allocator, trace, trace.start, len(trace.events))
    return allocator


def _first_products(trace: Trace, keys: Mapping[int, int]) -> dict[int, list[int]]:
    """Event -> the workspaces that are taken before it."""
    taken_at: dict[int, list[int]] = {}
    for key, in_backward in zip(sorted(keys, reverse=True), (False, True), strict=False):
        at = next((at for at, backward in trace.products if backward == in_backward and at >= trace.start), None)
        if at is not None:
            taken_at.setdefault(at, []).append(key)
    return taken_at


def _run(
    allocator: CachingAllocator,
    trace: Trace,
    begin: int,
    end: int,
    taken_at: Mapping[int, Mapping[int, int]] | None = None,
) -> None:
    for i in range(begin, end):
        for key, nbytes in (taken_at or {}).get(i, {}).items():
            allocator.allocate(key, nbytes)
        event = trace.events[i]
        if event.kind == "alloc":
            allocator.allocate(event.key, trace.storages[event.key].nbytes)
        elif event.kind == "free":
            allocator.release(event.key)
        else:
            allocator.move(event.key, event.old)
