"""What the allocator held before a history of its events: worked out backwards from what it held after them."""

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

from mtp_mem._util import MiB
from mtp_mem.errors import BadInput
from mtp_mem.memory.tape import TapeEvent

Rows = Mapping[int, tuple[int, bool]]  # segments: address -> (bytes, whether of the small pool)


def before(
    segments_after: Rows, blocks_after: Mapping[int, tuple[int, int]], events: Sequence[TapeEvent], expandable: bool
) -> tuple[dict[int, tuple[int, bool]], dict[int, tuple[int | None, int]]]:
    """Segments and blocks before the first event.

    A block is address -> (bytes, bytes asked for); bytes are None (not known) if it was freed since.

    Raises:
        BadInput: the events do not lead to the segments and blocks after them.
    """
    pools = sorted({address: nbytes <= MiB for kind, address, nbytes in events if kind in ("alloc", "free")}.items())
    segments = _Ranges(segments_after, pools)
    live: dict[int, tuple[int | None, int]] = dict(blocks_after)
    for kind, address, nbytes in reversed(events):
        if kind == "alloc":
            if live.pop(address, None) is None:
                raise BadInput(f"a block was allocated at {address:x} that was neither freed nor live at the end")
        elif kind == "free":
            if address in live:
                raise BadInput(f"a block was freed at {address:x}, where another one is still live")
            live[address] = (None, nbytes)
        elif kind in ("segment", "map"):
            segments.remove(address, nbytes)
        elif kind in ("drop", "unmap"):
            segments.add(address, nbytes, join=expandable)
    return segments.rows, live


class _Ranges:
    """Ranges of addresses that have memory, each of the small or the large pool."""

    def __init__(self, rows: Rows, pools: Sequence[tuple[int, bool]]) -> None:
        """`pools`: (address, whether of the small pool) of blocks, sorted."""
        self.rows, self.starts, self.pools = dict(rows), sorted(rows), pools

    def remove(self, address: int, nbytes: int) -> None:
        """Take a piece out of the range that it lies in."""
        at = bisect.bisect_right(self.starts, address) - 1
        start = self.starts[at] if at >= 0 else 0
        length, small = self.rows.get(start, (0, False))
        if address + nbytes > start + length:
            raise BadInput(f"a segment was allocated at {address:x} that was neither released nor there at the end")
        del self.starts[at], self.rows[start]
        for begin, end in ((start, address), (address + nbytes, start + length)):
            if begin < end:
                self._put(begin, end - begin, small)

    def add(self, address: int, nbytes: int, *, join: bool) -> None:
        """Put a range in; with `join` it grows into what it touches.

        With `join` its pool is that of a block that lies there at some time; else small if only small ranges have its
        size; else the nearest range's. Without `join` its size alone decides.
        """
        at = bisect.bisect_left(self.starts, address)
        near = self.starts[max(at - 1, 0) : at + 1]
        if any(start < address + nbytes and address < start + self.rows[start][0] for start in near):
            raise BadInput(f"a segment was released at {address:x}, where another one is still there")
        small = nbytes % (20 * MiB) > 0 if join else nbytes == 2 * MiB  # sizes that only the small pool has
        if join:
            first = bisect.bisect_left(self.pools, (address,))
            block = self.pools[first : first + 1]
            if block and block[0][0] < address + nbytes:
                small = block[0][1]
            elif near and not small:
                small = self.rows[min(near, key=lambda start: abs(start - address))][1]
            for start in near:
                length, _ = self.rows[start]
                if start + length == address or address + nbytes == start:
                    self.starts.remove(start)
                    del self.rows[start]
                    address, nbytes = min(start, address), nbytes + length
        self._put(address, nbytes, small)

    def _put(self, address: int, nbytes: int, small: bool) -> None:
        bisect.insort(self.starts, address)
        self.rows[address] = (nbytes, small)


def whole_blocks(
    segments: Mapping[int, tuple[int, bool]],
    live: Mapping[int, tuple[int | None, int]],
    events: Sequence[TapeEvent],
    expandable: bool,
) -> tuple[dict[int, tuple[int, int]], int]:
    """The blocks with their lengths in bytes, and the number of lengths that nothing confirms.

    A block is as long as its request rounded up to 512 B. In a large segment it may be up to 1 MiB longer, because such
    a rest is not split off. It then ends where the next block begins, or the first one that is put behind it later.
    """
    starts, addresses, ends = sorted(segments), sorted(live), _next_ends(live, events)
    blocks, inferred = {}, 0
    for i, (address, (size, requested)) in enumerate(sorted(live.items())):
        if size is None:
            size = -(-requested // 512) * 512
            start = starts[max(bisect.bisect_right(starts, address) - 1, 0)] if starts else 0
            length, small = segments.get(start, (0, False))
            if not expandable and not small:
                end = min([start + length, *addresses[i + 1 : i + 2]])
                gap = end - address - size
                seen = ends.get(address, 0) - address - size
                if 0 < gap <= MiB:
                    size += gap
                elif 0 <= seen <= MiB:
                    size += seen
                elif gap:
                    inferred += 1
        blocks[address] = (size, requested)
    return blocks, inferred


def _next_ends(live: Mapping[int, Any], events: Sequence[TapeEvent]) -> dict[int, int]:
    """By address of a block from before the history: where the first block begins that is later put next behind it."""
    now, first, ends = sorted(live), set(live), dict[int, int]()
    for kind, address, _ in events:
        at = bisect.bisect_left(now, address)
        if kind == "free":
            now.pop(at)
            first.discard(address)
        elif kind == "alloc":
            if at and now[at - 1] in first:
                ends.setdefault(now[at - 1], address)
            now.insert(at, address)
    return ends
