"""The model of the caching allocator: its rules one by one, and what must hold whatever is asked of it."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_mem._util import MiB
from mtp_mem.prediction.caching_allocator import ROUND, Block, CachingAllocator


def after(*sizes: int, expandable: bool = False) -> tuple[int, int]:
    allocator = CachingAllocator(expandable=expandable)
    for key, size in enumerate(sizes):
        allocator.allocate(key, size)
    check(allocator)
    return allocator.allocated, allocator.reserved


def check(allocator: CachingAllocator) -> None:
    """Bytes are conserved, blocks do not overlap, free neighbours are merged, every free block is listed."""
    blocks: list[Block] = [block for block, _ in allocator.taken.values()]
    for small, unmapped in allocator.unmapped.items():
        assert all(b.free and not b.mapped and b.small == small and b.address == a for a, b in unmapped)
        assert all(
            (b.address - b.segment) % allocator.page(small) == 0 == b.nbytes % allocator.page(small)
            for _, b in unmapped
        )
    for small, free in allocator.free_blocks.items():
        assert free == sorted(free, key=lambda entry: entry[:2])
        assert all(b.free and b.small == small and (b.nbytes, b.address) == (n, a) for n, a, b in free)
        blocks += [entry[2] for entry in free]
    assert sum(b.nbytes for b in blocks) == allocator.reserved
    assert sum(b.nbytes for b, _ in allocator.taken.values()) == allocator.allocated
    assert sum(n for _, n in allocator.taken.values()) == allocator.requested
    spans = sorted((b.address, b.address + b.nbytes) for b in blocks)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    for block in blocks:
        if block.after is not None:
            assert block.after.before is block
            assert block.address + block.nbytes == block.after.address
            assert not (block.free and block.after.free and block.mapped == block.after.mapped)


@pytest.mark.parametrize(
    ("sizes", "expandable", "allocated", "reserved"),
    [
        ((1,), False, 512, 2 * MiB),  # rounding; a small segment
        ((513,), False, 1024, 2 * MiB),
        ((0,), False, 0, 0),
        ((MiB, MiB), False, 2 * MiB, 2 * MiB),  # two share a small segment
        ((MiB + 1,), False, MiB + 512, 20 * MiB),  # large pool; the rest is split off
        ((10 * MiB,), False, 10 * MiB, 10 * MiB),  # a segment of its own
        ((21 * MiB + 1,), False, 22 * MiB, 22 * MiB),  # a rest of less than 1 MiB stays with the block
        ((19 * MiB + 1,), False, 20 * MiB, 20 * MiB),
        ((19 * MiB + 1,), True, 19 * MiB + 512, 20 * MiB),  # expandable segments split always
        ((15 * MiB, 15 * MiB), True, 30 * MiB, 40 * MiB),  # and grow where the last block is too small
    ],
)
def test_rules(sizes: tuple[int, ...], expandable: bool, allocated: int, reserved: int) -> None:
    assert after(*sizes, expandable=expandable) == (allocated, reserved)


def test_best_fit_reuse_and_move() -> None:
    allocator = CachingAllocator()
    for key, size in enumerate((40 * MiB, 30 * MiB)):
        allocator.allocate(key, size)
    allocator.release(0)
    allocator.release(1)
    allocator.allocate(2, 29 * MiB)  # the 30 MiB block fits best, and its rest of 1 MiB is not split off
    assert (allocator.requested, allocator.allocated, allocator.reserved) == (29 * MiB, 30 * MiB, 70 * MiB)
    allocator.move(3, 2)
    allocator.release(2)  # has moved: nothing
    assert allocator.allocated == 30 * MiB
    allocator.release(3)
    assert allocator.allocated == allocator.requested == 0
    check(allocator)


def test_a_block_without_a_growing_end_goes_first_and_holes_are_filled_lowest_first() -> None:
    allocator = CachingAllocator(expandable=True)
    for key, size in enumerate((100, 2, 60, 2, 30)):
        allocator.allocate(key, size * MiB)
    assert allocator.reserved == 200 * MiB
    allocator.release(0)
    allocator.release(2)
    start = allocator.taken[1][0].segment
    given = allocator.empty_cache()
    # 0 to 100, and of 102 to 162 the whole pages 120 to 160
    assert given == {start: 100 * MiB, start + 120 * MiB: 40 * MiB}
    assert (allocator.reserved, allocator.empty_cache()) == (60 * MiB, {})
    check(allocator)
    allocator.allocate(5, 50 * MiB)  # into the first hole, three pages
    assert (allocator.taken[5][0].address, allocator.reserved) == (start, 120 * MiB)
    allocator.allocate(6, 55 * MiB)  # 10 MiB are left there, and two more pages of addresses: too few; the next hole
    assert (allocator.taken[6][0].address, allocator.reserved) == (start + 102 * MiB, 160 * MiB)
    check(allocator)
    for key in (1, 3, 4, 5, 6):
        allocator.release(key)
    assert sum(allocator.empty_cache().values()) == 160 * MiB
    assert allocator.reserved == 0 == len(allocator.unmapped[False])  # the segment itself is gone
    allocator.allocate(7, 2 * MiB)
    check(allocator)


def test_whole_segments_are_given_back() -> None:
    allocator = CachingAllocator()
    for key, size in enumerate((40 * MiB, 2 * MiB, 3 * MiB, 1)):
        allocator.allocate(key, size)
    for key in (0, 1, 3):
        allocator.release(key)
    first = [address for _, address, block in allocator.free_blocks[False] if block.nbytes == 40 * MiB]
    assert allocator.empty_cache(only=()) == {}
    assert sorted(allocator.empty_cache().values()) == [2 * MiB, 40 * MiB]  # the 20 MiB one is in use
    assert first
    assert allocator.reserved == 20 * MiB
    check(allocator)


def test_settings() -> None:
    allocator = CachingAllocator(large_segment=32 * MiB)
    allocator.allocate(0, 2 * MiB)
    assert allocator.reserved == 32 * MiB
    allocator = CachingAllocator(max_split=64 * MiB)
    allocator.allocate(0, 100 * MiB)
    allocator.release(0)
    allocator.allocate(1, 2 * MiB)  # not from the large one, which is not split
    assert allocator.reserved == 120 * MiB
    allocator.allocate(2, 90 * MiB)  # within 20 MiB: whole
    assert (allocator.reserved, allocator.allocated) == (120 * MiB, 102 * MiB)
    allocator.release(2)
    allocator.allocate(3, 70 * MiB)  # not within 20 MiB: a segment of its own
    assert allocator.reserved == 190 * MiB
    check(allocator)


sizes = st.one_of(st.integers(0, 4096), st.integers(MiB - 2, MiB + 2), st.integers(MiB, 64 * MiB))


@given(st.booleans(), st.lists(st.tuples(st.sampled_from("aaafme"), sizes, st.integers(0, 10**6)), max_size=120))
def test_whatever_is_asked(expandable: bool, requests: list[tuple[str, int, int]]) -> None:
    allocator, live = CachingAllocator(expandable=expandable), []
    peaks = (0, 0, 0)
    for key, (kind, size, pick) in enumerate(requests):
        if kind == "e":
            before = allocator.reserved
            assert sum(allocator.empty_cache().values()) == before - allocator.reserved
        elif kind == "a" or not live:
            allocator.allocate(key, size)
            live.append(key)
        elif kind == "f":
            allocator.release(live.pop(pick % len(live)))
        else:
            allocator.move(key, live[pick % len(live)])
            live[pick % len(live)] = key
        check(allocator)
        assert allocator.requested <= allocator.allocated <= allocator.reserved
        now = (allocator.requested_peak, allocator.allocated_peak, allocator.reserved_peak)
        assert all(a >= b for a, b in zip(now, peaks, strict=True))
        peaks = now
        if expandable:
            assert allocator.allocated == sum(-(-n // ROUND) * ROUND for _, n in allocator.taken.values())
    for key in live:
        allocator.release(key)
    check(allocator)
    assert allocator.requested == allocator.allocated == 0
    allocator.empty_cache()
    assert allocator.reserved == 0
