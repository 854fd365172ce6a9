"""A model of PyTorch's CUDA caching allocator: the bytes it hands out and holds for a sequence of requests.

Rules of c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h (torch 2.13): sizes round up to 512 B;
requests up to 1 MiB share 2 MiB segments; larger ones share 20 MiB segments, or from 10 MiB on get a segment of their
own, rounded up to 2 MiB; the smallest free block that fits is taken, lowest address first; it is split if the rest is
at least 512 B (small, or expandable) or more than 1 MiB (large); free neighbours merge. With expandable segments each
of the two pools is one segment that grows, and its free end is taken only where nothing else fits (`get_free_block`).

Not modelled: several streams, max_split_size, roundup_power2_divisions, garbage collection, retries, empty_cache.
Held against recordings of real GPUs it was exact (docs/evidence.md).
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mtp_mem._util import MiB
from mtp_mem.memory.trace import Event, Trace

Fit = Literal["yes", "tight", "no"]
"""Whether a step fits; `tight`: what it allocates does, the segments it reserves with their unused parts do not."""

ROUND = 512
SMALL = MiB
SMALL_SEGMENT, LARGE_SEGMENT = 2 * MiB, 20 * MiB
OWN_SEGMENT = 10 * MiB


@dataclass(slots=True, eq=False)
class Block:
    """A piece of a segment; `before` and `after` are its neighbours there."""

    address: int
    nbytes: int
    small: bool
    free: bool = True
    before: "Block | None" = None
    after: "Block | None" = None


class CachingAllocator:
    """Allocates and frees by key, and keeps the totals and their peaks.

    Attributes:
        requested: sum of the sizes asked for.
        allocated: sum of the blocks handed out (`torch.cuda.memory_allocated`).
        reserved: sum of the segments (`torch.cuda.memory_reserved`).
    """

    def __init__(self, *, expandable: bool = False) -> None:
        self.expandable = expandable
        self.requested = self.allocated = self.reserved = 0
        self.requested_peak = self.allocated_peak = self.reserved_peak = 0
        self.taken: dict[int, tuple[Block, int]] = {}  # key -> its block, and the size asked for
        self.free_blocks: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}  # by (size, address)
        self._tails: dict[bool, Block] = {}  # last block of each pool's expandable segment
        self._next_address = 0

    def allocate(self, key: int, nbytes: int) -> None:
        """Hand out a block for `nbytes`; zero bytes need none."""
        if nbytes == 0:
            return
        size = -(-nbytes // ROUND) * ROUND
        small = size <= SMALL
        free = self.free_blocks[small]
        at = bisect.bisect_left(free, (size, -1))
        if at + 1 < len(free) and free[at][2] is self._tails.get(small):
            at += 1  # the growing end counts as large as it can grow, so whatever else fits is smaller
        block = free.pop(at)[2] if at < len(free) else self._grow(size, small)
        rest = block.nbytes - size
        if rest >= ROUND if small or self.expandable else rest > SMALL:
            self._split(block, size)
        block.free = False
        self.taken[key] = (block, nbytes)
        self.requested += nbytes
        self.allocated += block.nbytes
        self.requested_peak = max(self.requested_peak, self.requested)
        self.allocated_peak = max(self.allocated_peak, self.allocated)
        self.reserved_peak = max(self.reserved_peak, self.reserved)

    def release(self, key: int) -> None:
        """Take a block back and merge it with free neighbours."""
        if key not in self.taken:
            return
        block, nbytes = self.taken.pop(key)
        self.requested -= nbytes
        self.allocated -= block.nbytes
        block.free = True
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                self._unlist(neighbour)
                block = self._merge(*sorted((neighbour, block), key=lambda b: b.address))
        bisect.insort(self.free_blocks[block.small], (block.nbytes, block.address, block))

    def move(self, key: int, old: int) -> None:
        """`key` takes over the block of `old`."""
        if old in self.taken:
            self.taken[key] = self.taken.pop(old)

    def reset_peaks(self) -> None:
        """Forget the peaks so far."""
        self.requested_peak, self.allocated_peak, self.reserved_peak = self.requested, self.allocated, self.reserved

    def _grow(self, size: int, small: bool) -> Block:
        if self.expandable:
            return self._expand(size, small)
        if small:
            segment = SMALL_SEGMENT
        else:
            segment = LARGE_SEGMENT if size < OWN_SEGMENT else -(-size // SMALL_SEGMENT) * SMALL_SEGMENT
        block = Block(self._next_address, segment, small)
        self._next_address += segment + LARGE_SEGMENT  # segments do not touch
        self.reserved += segment
        return block

    def _expand(self, size: int, small: bool) -> Block:
        tail = self._tails.get(small)
        at_hand = tail.nbytes if tail is not None and tail.free else 0
        page = SMALL_SEGMENT if small else LARGE_SEGMENT
        more = -(-(size - at_hand) // page) * page
        self.reserved += more
        if tail is not None and tail.free:
            self._unlist(tail)
            tail.nbytes += more
            return tail
        address = tail.address + tail.nbytes if tail is not None else (0 if small else 1 << 60)
        block = Block(address, more, small, before=tail)
        if tail is not None:
            tail.after = block
        self._tails[small] = block
        return block

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.address + size, block.nbytes - size, block.small, before=block, after=block.after)
        if block.after is not None:
            block.after.before = rest
        block.after, block.nbytes = rest, size
        if self._tails.get(block.small) is block:
            self._tails[block.small] = rest
        bisect.insort(self.free_blocks[block.small], (rest.nbytes, rest.address, rest))

    def _merge(self, low: Block, high: Block) -> Block:
        low.nbytes += high.nbytes
        low.after = high.after
        if high.after is not None:
            high.after.before = low
        if self._tails.get(low.small) is high:
            self._tails[low.small] = low
        return low

    def _unlist(self, block: Block) -> None:
        free = self.free_blocks[block.small]
        free.pop(bisect.bisect_left(free, (block.nbytes, block.address)))


def replay(trace: Trace, *, expandable: bool, workspaces: tuple[int, ...] = ()) -> CachingAllocator:
    """Put a trace through the allocator; the peaks are those of the measured step.

    Args:
        trace: one step. Where it says what the first step makes, that step comes before: a steady step finds the
            blocks that an earlier one left behind, and the optimizer's state lies among them.
        expandable: `expandable_segments:True`.
        workspaces: sizes of buffers that stay (cuBLAS), allocated when the model is built.
    """
    allocator = CachingAllocator(expandable=expandable)
    for i, nbytes in enumerate(workspaces):
        allocator.allocate(-1 - i, nbytes)
    late = trace.made_by_first_step or []
    for key in trace.resident[: len(trace.resident) - len(late)]:
        allocator.allocate(key, trace.storages[key].nbytes)
    before, step = trace.events[: trace.start], trace.events[trace.start :]
    _run(allocator, trace, before)
    if trace.made_by_first_step is not None:
        live = {*allocator.taken, *late}
        phases = [trace.storages[event.key].phase for event in step]
        stepped = phases.index("optimizer") if "optimizer" in phases else len(step)
        _run(allocator, trace, step[:stepped])
        for key in late:
            allocator.allocate(key, trace.storages[key].nbytes)
        _run(allocator, trace, step[stepped:])
        for key in sorted(set(allocator.taken) - live):
            allocator.release(key)
    allocator.reset_peaks()
    _run(allocator, trace, step)
    return allocator


def _run(allocator: CachingAllocator, trace: Trace, events: Sequence[Event]) -> None:
    for event in events:
        if event.kind == "alloc":
            allocator.allocate(event.key, trace.storages[event.key].nbytes)
        elif event.kind == "free":
            allocator.release(event.key)
        else:
            allocator.move(event.key, event.old)


def fit(allocated: int, reserved: int, limit: int) -> Fit:
    """Do these predicted peaks fit into `limit` bytes?"""
    if allocated > limit:
        return "no"
    return "tight" if reserved > limit else "yes"
