"""The model of the caching allocator against a recording of a real one: the same decisions, event by event.

For each allocation on the tape the model must choose the address that the GPU chose, get new memory exactly when the
GPU did, as much and where it did, and give back the same. It is told nothing but the addresses of new segments, and
when memory was given back. After the first difference it goes on by itself, and its totals stand beside the GPU's.
"""

import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mtp_mem.errors import BadInput
from mtp_mem.memory.tape import Kind, Tape
from mtp_mem.prediction.caching_allocator import ADDRESSES, SMALL_SEGMENT, Block, CachingAllocator
from mtp_mem.prediction.cuda.allocator_settings import AllocatorSettings, allocator_settings

ONE_SEGMENT = 2**40  # bytes; expandable segments that have memory at the same time are farther apart
GOT: tuple[Kind, ...] = ("segment", "map")
GAVE: tuple[Kind, ...] = ("drop", "unmap")


class Totals(NamedTuple):
    """Bytes asked for, in blocks, and in segments."""

    requested: int
    allocated: int
    reserved: int


@dataclass(frozen=True)
class Held:
    """How the model did on a tape.

    Attributes:
        difference: the first difference, in words; empty: none.
        at: the number of its event; the count of events if it is in the state after the last one.
        totals: before the first event and after each; requested and reserved are the GPU's, allocated is the model's.
            New memory counts from the allocation on that it was got for.
        model_reserved_peak: peak of the model's own reserved bytes.
        other_reserved_peak: what segments of the other kind (expandable or not) would have reserved.
        counts: events of each kind.
        not_modelled: settings of the allocator that may move blocks, and that the model does not have.
    """

    difference: str
    at: int
    totals: list[Totals]
    model_reserved_peak: int
    other_reserved_peak: int
    counts: Counter[Kind]
    not_modelled: tuple[str, ...]

    @property
    def unused(self) -> int:
        """Peak reserved less peak allocated: what another placement of the same blocks could save at most."""
        return max(totals.reserved for totals in self.totals) - max(totals.allocated for totals in self.totals)

    @property
    def exact(self) -> bool:
        """Nothing differs."""
        return not self.difference

    def peak(self, of: str) -> int:
        """The first moment (0: before the first event) of the highest `requested`, `allocated` or `reserved`."""
        values = [getattr(totals, of) for totals in self.totals]
        return values.index(max(values))


class Followed(CachingAllocator):
    """The model with new segments where the GPU's are; `got` lists its new memory, (address, bytes), until cleared."""

    def __init__(self, tape: Tape, settings: AllocatorSettings) -> None:
        super().__init__(expandable=tape.expandable, large_segment=settings.large_segment, max_split=settings.max_split)
        self.got: list[tuple[int, int]] = []
        self.next_segment: int | None = None
        self._next_address = 1 << 62  # where no GPU has memory
        self._begin_with(tape)
        self.reset_peaks()

    def _begin_with(self, tape: Tape) -> None:
        """Start from the tape's segments, with its blocks taken and the rest of them free."""
        addresses, last = sorted(tape.blocks), dict[bool, Block]()
        for start, (nbytes, small) in sorted(tape.segments.items()):
            before = last.get(small) if self.expandable else None
            segment = start if before is None else before.segment
            if self.expandable:  # addresses without memory below this range, of the same segment
                end = _lowest_page(tape, start, small) if before is None else before.address + before.nbytes
                segment = end if before is None else segment
                before = self._append(before, Block(end, start - end, small, mapped=False, segment=segment))
            for address, size, requested in _pieces(tape, addresses, start, start + nbytes):
                block = Block(address, size, small, not requested, segment=segment)
                if requested:
                    self.taken[address] = (block, requested)
                    self.requested, self.allocated = self.requested + requested, self.allocated + size
                before = self._append(before, block)
            self.reserved += nbytes
            if before is not None:
                last[small] = before
        for block in last.values() if self.expandable else ():
            end, page = block.address + block.nbytes, self.page(block.small)
            self._append(block, Block(end, ADDRESSES // page * page, block.small, mapped=False, segment=block.segment))

    def _append(self, before: Block | None, block: Block) -> Block | None:
        if block.nbytes == 0:
            return before
        if before is not None:
            before.after, block.before = block, before
        if block.free:
            self._list(block)
        return block

    def _place(self, nbytes: int) -> int:
        return super()._place(nbytes) if self.next_segment is None else self.next_segment

    def _new(self, size: int, small: bool) -> Block:
        block = super()._new(size, small)
        self.got.append((block.address, block.nbytes))
        return block

    def _map(self, block: Block, nbytes: int) -> Block:
        address, before = block.address, self.reserved
        block = super()._map(block, nbytes)
        self.got.append((address, self.reserved - before))
        return block


def hold(tape: Tape) -> Held:
    """Replay a tape in the model.

    Args:
        tape: one that `Tape.check` accepts.
    """
    try:
        settings = allocator_settings(tape.settings)
    except BadInput:  # a value that we do not know
        settings = AllocatorSettings(not_modelled=(tape.settings,))
    model = Followed(tape, settings)
    totals = [Totals(model.requested, model.allocated, model.reserved)]
    reserved = model.reserved
    difference, at = "", 0
    got: list[tuple[int, int]] = []  # (address, bytes) that the GPU got for the next allocation
    for number, (kind, address, nbytes) in enumerate(tape.events):
        said = ""
        if kind in GOT:
            got.append((address, nbytes))
        elif kind in GAVE:
            reserved -= nbytes
            if number == 0 or tape.events[number - 1].kind not in GAVE:
                said = _give_back(model, tape, number)
        elif kind == "free":
            model.release(address)
        elif kind == "alloc":
            reserved += sum(size for _, size in got)
            model.next_segment = got[0][0] if got and not difference else None
            model.allocate(address, nbytes)
            block = model.taken[address][0]
            if model.got != got:
                said = f"the model got {_memory(model.got)}, the GPU {_memory(got)}"
            elif block.address != address:
                said = f"the model put it at {block.address:x}, the GPU at {address:x}"
            model.got.clear()
            got.clear()
        elif got:  # out of memory, in the middle of getting some
            said = "the GPU mapped memory for a request that then failed, which is not modelled"
            reserved += sum(size for _, size in got)
            got.clear()
        elif number and tape.events[number - 1].kind not in GAVE:  # out of memory, and the GPU gave nothing back
            said = _give_back(model, tape, number)
        if said and not difference:
            difference, at = f"event {number}, {kind} of {nbytes:,} B: {said}", number
        totals.append(Totals(model.requested, model.allocated, reserved))
    counts = Counter(event.kind for event in tape.events)
    if not difference:
        difference = _end(model, tape) if counts["alloc"] else "nothing was allocated, and so nothing was checked"
        at = len(tape.events)
    return Held(difference, at, totals, model.reserved_peak, _other_kind(tape, settings), counts, settings.not_modelled)


def _give_back(model: Followed, tape: Tape, number: int) -> str:
    """Give back what the model would, and say how that differs from what the GPU gave back from this event on."""
    recorded: dict[int, int] = {}
    for kind, address, nbytes in tape.events[number:]:
        if kind not in GAVE:
            break
        recorded[address] = nbytes
    partly = "garbage_collection_threshold" in tape.settings or model.max_split is not None
    given = model.empty_cache(only=recorded if partly else None)
    if given == recorded:
        return ""
    return f"the model gives back {_memory(list(given.items()))}, the GPU {_memory(list(recorded.items()))}"


def _end(model: Followed, tape: Tape) -> str:
    """How the model's last state differs from the recorded one."""
    if not tape.last_segments:
        return ""
    reserved = sum(nbytes for nbytes, _ in tape.last_segments.values())
    if model.reserved != reserved:
        return f"after the last event: the model holds {model.reserved:,} B of segments, the GPU {reserved:,} B"
    blocks = {address: (block.nbytes, requested) for address, (block, requested) in model.taken.items()}
    other = sorted(
        address for address in {*blocks, *tape.last_blocks} if blocks.get(address) != tape.last_blocks.get(address)
    )
    if not other:
        return ""
    first = other[0]
    model_has, gpu_has = (f"{rows[first][0]:,} B" if first in rows else "none" for rows in (blocks, tape.last_blocks))
    return (
        f"after the last event: {len(other)} blocks differ, the first at {first:x}: the model has {model_has}, the GPU"
        f" {gpu_has}"
    )


def _other_kind(tape: Tape, settings: AllocatorSettings) -> int:
    """Peak bytes reserved by segments of the other kind; blocks from before the tape come first, by address."""
    model = CachingAllocator(
        expandable=not tape.expandable, large_segment=settings.large_segment, max_split=settings.max_split
    )
    for address, (_, requested) in sorted(tape.blocks.items()):
        model.allocate(address, requested)
    model.reset_peaks()
    last: Kind = "alloc"
    for kind, address, nbytes in tape.events:
        if kind == "alloc":
            model.allocate(address, nbytes)
        elif kind == "free":
            model.release(address)
        elif kind in GAVE and last not in GAVE:
            model.empty_cache()
        last = kind
    return model.reserved_peak


def _pieces(tape: Tape, addresses: Sequence[int], start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(address, bytes, bytes asked for or 0 where it is free) of each piece of a segment."""
    for address in addresses[bisect.bisect_left(addresses, start) : bisect.bisect_left(addresses, end)]:
        if start < address:
            yield start, address - start, 0
        size, requested = tape.blocks[address]
        yield address, size, requested
        start = address + size
    if start < end:
        yield start, end - start, 0


def _lowest_page(tape: Tape, start: int, small: bool) -> int:
    """Where the expandable segment that has memory from `start` on begins, as far as the events show."""
    lower = (
        address
        for kind, address, nbytes in tape.events
        if kind == "map" and start - ONE_SEGMENT < address < start and (nbytes == SMALL_SEGMENT) == small
    )
    return min(lower, default=start)


def _memory(parts: Sequence[tuple[int, int]]) -> str:
    if not parts:
        return "no memory"
    where = f"in {len(parts)} pieces" if len(parts) > 1 else f"at {parts[0][0]:x}"
    return f"{sum(nbytes for _, nbytes in parts):,} B {where}"
