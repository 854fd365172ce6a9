"""The allocator's model against recordings of real GPUs, allocation by allocation: MTP_MEM_TAPES names their folder.

A tape has sizes and addresses alone: segments and blocks before the first event, the events, and what there was after
the last. Each allocation must lie where the GPU put it, and each segment be made when and as large as there. The model
is told nothing but where new segments lie. Without the folder the tapes that this file makes are replayed.
"""

import bisect
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mtp_mem._util import MiB
from mtp_mem.prediction.caching_allocator import Block, CachingAllocator

FOLDER = os.environ.get("MTP_MEM_TAPES")
TAPES = sorted(Path(FOLDER).glob("*.tape.json.gz")) if FOLDER else []
Rows = dict[int, list[Any]]


class Followed(CachingAllocator):
    """The model with its segments where the GPU's are; `made` are the bytes of those that it has just made."""

    def __init__(self, *, expandable: bool) -> None:
        super().__init__(expandable=expandable)
        self.made: list[int] = []
        self.next_segment: int | None = None

    def _grow(self, size: int, small: bool) -> Block:
        before = self.reserved
        if not self.expandable:
            self._next_address = 1 << 62 if self.next_segment is None else self.next_segment
        block = super()._grow(size, small)
        self.made.append(self.reserved - before)
        return block

    def hold(self, segments: Rows, blocks: Rows) -> None:
        """These segments, with these blocks taken and the rest of them free."""
        for start, (nbytes, small) in segments.items():
            at, end, before = start, start + nbytes, None
            while at < end:
                taken = blocks.get(at)
                size = taken[0] if taken else min([a for a in blocks if at < a < end], default=end) - at
                block = Block(at, size, small, not taken, before=before)
                if before is not None:
                    before.after = block
                if taken:
                    self.taken[at] = (block, taken[1])
                    self.requested, self.allocated = self.requested + taken[1], self.allocated + size
                else:
                    bisect.insort(self.free_blocks[small], (size, at, block))
                at, before = at + size, block
            self.reserved += nbytes
        self.reset_peaks()

    def give_back(self, address: int, nbytes: int) -> None:
        """A segment that is free as a whole."""
        for pool in self.free_blocks.values():
            at = bisect.bisect_left(pool, (nbytes, address))
            if at < len(pool) and pool[at][:2] == (nbytes, address):
                del pool[at]
                self.reserved -= nbytes
                return
        raise AssertionError(f"a segment of {nbytes:,} at {address:x} that the GPU gave back is not free in the model")


def rows(table: list[list[Any]]) -> Rows:
    return {address: rest for address, *rest in table}


def follow(tape: dict[str, Any]) -> Followed:
    """Replay the tape; the first difference fails."""
    expandable = tape["expandable"]
    model = Followed(expandable=expandable)
    model.hold(rows(tape["segments"]), rows(tape["blocks"]))
    starts: dict[bool, int] = {}  # of each pool's expandable segment, whose addresses the model counts from elsewhere
    new: list[int] = []
    for number, (kind, address, nbytes) in enumerate(tape["events"]):
        if kind in ("segment", "map"):
            new.append(nbytes)
            model.next_segment = address
        elif kind == "drop":
            model.give_back(address, nbytes)
        elif kind == "free":
            model.release(address)
        elif kind == "alloc":
            model.made.clear()
            model.allocate(-1, nbytes)
            block, requested = model.taken.pop(-1)
            model.taken[address] = (block, requested)
            start = starts.setdefault(block.small, address - block.address) if expandable else 0
            assert (block.address + start, sum(model.made)) == (address, sum(new)), f"event {number}: {nbytes:,} B"
            assert expandable or model.made == new
            new, model.next_segment = [], None
        else:  # memory ran out, and pages were unmapped: what comes after is not modelled
            assert expandable
            assert kind in ("unmap", "oom")
            return model
    last = tape["last_segments"]
    if last:
        assert model.reserved == sum(nbytes for _, nbytes, _ in last)
        assert model.allocated == sum(size for _, size, _ in tape["last_blocks"])
        assert model.requested == sum(requested for _, _, requested in tape["last_blocks"])
    return model


@pytest.mark.parametrize("path", TAPES, ids=lambda path: path.name.removesuffix(".tape.json.gz"))
def test_a_recording_of_a_gpu(path: Path) -> None:
    model = follow(json.loads(gzip.decompress(path.read_bytes())))
    assert model.reserved_peak >= model.allocated_peak >= model.requested_peak > 0


def tape(expandable: bool, *events: tuple[str, int, int]) -> dict[str, Any]:
    nothing: dict[str, Any] = {"segments": [], "blocks": [], "last_segments": [], "last_blocks": []}
    return {"expandable": expandable, "events": list(events), **nothing}


GROWING_END_LAST = tape(
    True,
    *(("map", 0, 40 * MiB), ("alloc", 0, 25 * MiB), ("alloc", 25 * MiB, 2 * MiB), ("free", 0, 25 * MiB)),
    ("alloc", 0, 12 * MiB),  # 25 MiB are free inside, 13 MiB at the end, which would fit closer
    *(("map", 40 * MiB, 20 * MiB), ("alloc", 27 * MiB, 25 * MiB)),
)
SMALLEST_FIT = tape(
    False,
    *(("segment", 0, 20 * MiB), ("alloc", 0, 5 * MiB), ("alloc", 5 * MiB, 2 * MiB), ("alloc", 7 * MiB, 3 * MiB)),
    *(("alloc", 10 * MiB, 2 * MiB), ("free", 0, 5 * MiB), ("free", 7 * MiB, 3 * MiB)),
    ("alloc", 7 * MiB, 2 * MiB + 1),  # the smaller of the two holes, whole: less than 1 MiB would be left
    ("alloc", 0, 5 * MiB),
)


@pytest.mark.parametrize("made", [GROWING_END_LAST, SMALLEST_FIT])
def test_a_rule_that_was_seen_on_gpus(made: dict[str, Any]) -> None:
    follow(made)


def test_another_place_is_noticed() -> None:
    moved = tape(False, ("segment", 0, 2 * MiB), ("alloc", 0, 512), ("alloc", 1024, 512))
    with pytest.raises(AssertionError, match="event 2: 512 B"):
        follow(moved)
