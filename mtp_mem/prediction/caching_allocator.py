"""A model of PyTorch's CUDA caching allocator: the bytes it hands out and holds for a sequence of requests.

Rules of c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h (torch 2.13): sizes round up to 512 B;
requests up to 1 MiB share 2 MiB segments; larger ones share 20 MiB segments, or from 10 MiB on get a segment of their
own, rounded up to 2 MiB; the smallest free block that fits is taken, lowest address first; it is split if the rest is
at least 512 B (small, or expandable) or more than 1 MiB (large); free neighbours merge.

An expandable segment is a range of addresses for each of the two pools, into which pages of 2 or 20 MiB are mapped as
they are needed. A free block counts as large as the unmapped pages behind it let it grow, so a growing end is taken
only where nothing else fits (`get_free_block`). `empty_cache`, which the allocator also calls when memory runs out,
gives back segments that are free as a whole, and whole pages.

Not modelled: streams that share blocks, roundup_power2_divisions, garbage collection, and when memory runs out.
Held against recordings of real GPUs it was exact (docs/evidence.md).
"""

import bisect
from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

from mtp_mem._util import MiB

Fit = Literal["yes", "tight", "no"]
"""Whether a step fits; `tight`: what it allocates does, the segments it reserves with their unused parts do not."""

ROUND = 512
SMALL = MiB
SMALL_SEGMENT, LARGE_SEGMENT = 2 * MiB, 20 * MiB
OWN_SEGMENT = 10 * MiB
ADDRESSES = 1 << 56  # bytes of addresses of an expandable segment: more than any GPU has


@dataclass(slots=True, eq=False)
class Block:
    """A piece of a segment; `before` and `after` are its neighbours there."""

    address: int
    nbytes: int
    small: bool
    free: bool = True
    before: "Block | None" = None
    after: "Block | None" = None
    mapped: bool = True  # False: addresses of an expandable segment without memory behind them
    segment: int = 0  # where its expandable segment begins; pages are counted from there

    @property
    def room(self) -> int:
        """Bytes it can grow to, with the unmapped addresses behind it."""
        return self.nbytes + (self.after.nbytes if self.after is not None and not self.after.mapped else 0)


class CachingAllocator:
    """Allocates and frees by key, and keeps the totals and their peaks.

    Attributes:
        requested: sum of the sizes asked for.
        allocated: sum of the blocks handed out (`torch.cuda.memory_allocated`).
        reserved: sum of the segments (`torch.cuda.memory_reserved`).

    Args:
        expandable: the setting `expandable_segments`.
        large_segment: the setting `large_segment_size_mb`, in bytes.
        max_split: the setting `max_split_size_mb`, in bytes; None: blocks of any size are split.
    """

    def __init__(
        self, *, expandable: bool = False, large_segment: int = LARGE_SEGMENT, max_split: int | None = None
    ) -> None:
        self.expandable, self.large_segment, self.max_split = expandable, large_segment, max_split
        self.requested = self.allocated = self.reserved = 0
        self.requested_peak = self.allocated_peak = self.reserved_peak = 0
        self.taken: dict[int, tuple[Block, int]] = {}  # key -> its block, and the size asked for
        # Of the small pool (True) and of the large one, sorted:
        self.free_blocks: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}  # by (size, address)
        self.unmapped: dict[bool, list[tuple[int, Block]]] = {True: [], False: []}  # by address
        self._next_address = 0

    def allocate(self, key: int, nbytes: int) -> None:
        """Hand out a block for `nbytes`; zero bytes need none."""
        if nbytes == 0:
            return
        size = -(-nbytes // ROUND) * ROUND
        small = size <= SMALL
        block = self._fitting(size, small) or (self._expand(size, small) if self.expandable else self._new(size, small))
        rest = block.nbytes - size
        if rest >= ROUND if small or self.expandable else rest > SMALL and not self._oversized(size):
            self._list(self._split(block, size))
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
        self._list(self._merged(block))

    def move(self, key: int, old: int) -> None:
        """`key` takes over the block of `old`."""
        if old in self.taken:
            self.taken[key] = self.taken.pop(old)

    def empty_cache(self, only: Container[int] | None = None) -> dict[int, int]:
        """Give back the segments, or pages of expandable segments, in which nothing is taken.

        Args:
            only: give back only segments that begin at these addresses; expandable segments ignore this.

        Returns:
            Bytes of what was given back, by address.
        """
        given: dict[int, int] = {}
        for _, address, block in [*self.free_blocks[False], *self.free_blocks[True]]:
            if self.expandable:
                self._unmap(block, given)
            elif block.before is None and block.after is None and (only is None or address in only):
                self._unlist(block)
                given[address] = block.nbytes
        self.reserved -= sum(given.values())
        return given

    def reset_peaks(self) -> None:
        """Forget the peaks so far."""
        self.requested_peak, self.allocated_peak, self.reserved_peak = self.requested, self.allocated, self.reserved

    def page(self, small: bool) -> int:
        """Bytes of a segment that requests share, or of a page of an expandable one."""
        return SMALL_SEGMENT if small else self.large_segment

    def _oversized(self, nbytes: int) -> bool:
        return self.max_split is not None and nbytes >= self.max_split

    def _fitting(self, size: int, small: bool) -> Block | None:
        """The free block that is taken for `size`, no longer listed; None: there has to be new memory."""
        free = self.free_blocks[small]
        at = bisect.bisect_left(free, (size, -1))
        if at == len(free):
            return None
        if self.expandable:
            while at + 1 < len(free) and free[at + 1][2].room < free[at][2].room:
                at += 1
        nbytes = free[at][0]
        if self._oversized(nbytes) and (not self._oversized(size) or nbytes >= size + LARGE_SEGMENT):
            return None
        return free.pop(at)[2]

    def _place(self, nbytes: int) -> int:
        """The address of a new segment; segments do not touch."""
        address = self._next_address
        self._next_address += nbytes + LARGE_SEGMENT
        return address

    def _new(self, size: int, small: bool) -> Block:
        """A segment for `size`, as one block that is not listed."""
        segment = self.page(small) if size < OWN_SEGMENT else -(-size // SMALL_SEGMENT) * SMALL_SEGMENT
        self.reserved += segment
        return Block(self._place(segment), segment, small)

    def _expand(self, size: int, small: bool) -> Block:
        """A block of an expandable segment that has grown to `size`, not listed."""
        block = self._growable(size, small)
        if not block.mapped:
            block = self._map(block, size)
        while block.nbytes < size and block.after is not None:
            block = self._map(block.after, size - block.nbytes)
        self._unlist(block)
        return block

    def _growable(self, size: int, small: bool) -> Block:
        """The lowest free block, mapped or not, that can grow to `size`; else a new expandable segment."""
        for _, unmapped in self.unmapped[small]:
            start = unmapped.before if unmapped.before is not None and unmapped.before.free else unmapped
            if _free_from(start, size) >= size:
                return start
        address, page = self._place(ADDRESSES), self.page(small)
        new = Block(address, ADDRESSES // page * page, small, mapped=False, segment=address)
        self._list(new)
        return new

    def _map(self, block: Block, nbytes: int) -> Block:
        """Map as many pages of an unmapped block as `nbytes` need; the free block that they become part of."""
        self._unlist(block)
        page = self.page(block.small)
        nbytes = min(-(-nbytes // page) * page, block.nbytes)
        if nbytes < block.nbytes:
            self._list(self._split(block, nbytes))
        block.mapped = True
        self.reserved += nbytes
        block = self._merged(block)
        self._list(block)
        return block

    def _unmap(self, block: Block, given: dict[int, int]) -> None:
        """Take the memory from whole pages of a free block, and note them in `given`."""
        page = self.page(block.small)
        begin = -((block.segment - block.address) // page) * page + block.segment
        end = (block.address + block.nbytes - block.segment) // page * page + block.segment
        if begin >= end:
            return
        self._unlist(block)
        if block.address < begin:
            rest = self._split(block, begin - block.address)
            self._list(block)
            block = rest
        if end < block.address + block.nbytes:
            self._list(self._split(block, end - block.address))
        given[begin] = end - begin
        block.mapped = False
        block = self._merged(block)
        if block.before is not None or block.after is not None:  # else the segment itself goes
            self._list(block)

    def _split(self, block: Block, nbytes: int) -> Block:
        """Shorten a block to `nbytes`; the rest, a new block behind it, alike in all else and not listed."""
        rest = Block(
            block.address + nbytes,
            block.nbytes - nbytes,
            block.small,
            before=block,
            after=block.after,
            mapped=block.mapped,
            segment=block.segment,
        )
        if block.after is not None:
            block.after.before = rest
        block.after, block.nbytes = rest, nbytes
        return rest

    def _merged(self, block: Block) -> Block:
        """The block merged with its free neighbours, mapped or unmapped as it is; none of them is listed any more."""
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free and neighbour.mapped == block.mapped:
                self._unlist(neighbour)
                low, high = (neighbour, block) if neighbour is block.before else (block, neighbour)
                low.nbytes += high.nbytes
                low.after = high.after
                if high.after is not None:
                    high.after.before = low
                block = low
        return block

    def _list(self, block: Block) -> None:
        """Put a free block into the sorted list that it belongs to."""
        if block.mapped:
            bisect.insort(self.free_blocks[block.small], (block.nbytes, block.address, block))
        else:
            bisect.insort(self.unmapped[block.small], (block.address, block))

    def _unlist(self, block: Block) -> None:
        if block.mapped:
            free = self.free_blocks[block.small]
            free.pop(bisect.bisect_left(free, (block.nbytes, block.address)))
        else:
            unmapped = self.unmapped[block.small]
            unmapped.pop(bisect.bisect_left(unmapped, (block.address,)))


def _free_from(block: Block | None, enough: int) -> int:
    """Bytes of free addresses that begin with this block, counted no further than `enough`."""
    total = 0
    while total < enough and block is not None and block.free:
        total, block = total + block.nbytes, block.after
    return total


def fit(allocated: int, reserved: int, limit: int) -> Fit:
    """Whether these predicted peaks, in bytes, fit into `limit` bytes."""
    if allocated > limit:
        return "no"
    return "tight" if reserved > limit else "yes"
