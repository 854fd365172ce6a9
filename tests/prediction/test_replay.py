"""The state from which a step is replayed: the cache emptied, workspaces where the first products took them."""

from mtp_mem._util import MiB
from mtp_mem.memory.trace import Event, Storage, Trace
from mtp_mem.prediction.cuda.allocator_settings import AllocatorSettings
from mtp_mem.prediction.cuda.replay import replay


def step(*events: tuple[str, int], sizes: dict[int, int], resident: list[int], **known: object) -> Trace:
    storages = {key: Storage(nbytes, "other", "trunk forward", "", (), "") for key, nbytes in sizes.items()}
    return Trace(storages, resident, [Event(kind, key) for kind, key in events], **known)  # type: ignore[arg-type]


def test_what_the_first_step_cached_is_given_back_before_the_measured_one() -> None:
    events = [("alloc", 1), ("free", 1), ("alloc", 2), ("free", 2), ("alloc", 3), ("free", 3)]
    sizes = {0: 16 * MiB, 1: 40 * MiB, 2: 30 * MiB, 3: 50 * MiB}
    trace = step(*events, sizes=sizes, resident=[0], made_by_first_step=[])
    # The second of three tensors lies in the first's segment, the third needs one of its own.
    assert replay(trace, AllocatorSettings()).reserved_peak == (16 + 40 + 50) * MiB
    # A second step with the first one's cache would do with the same; one that begins without it, at its larger tensor:
    trace.events = trace.events[2:]
    assert replay(trace, AllocatorSettings()).reserved_peak == (16 + 30 + 50) * MiB


def test_a_workspace_lies_where_the_first_product_of_its_thread_found_room() -> None:
    events = [("alloc", 1), ("free", 1), ("alloc", 2), ("free", 2)]
    trace = step(*events, sizes={1: 60 * MiB, 2: 60 * MiB}, resident=[], made_by_first_step=[])
    assert (
        replay(trace, AllocatorSettings(), (32 * MiB, 32 * MiB)).reserved_peak == 124 * MiB
    )  # no products: from the start
    trace.products = [(2, False), (3, True)]
    allocator = replay(trace, AllocatorSettings(), (32 * MiB, 32 * MiB))
    # The forward thread's is cut from the segment that the first tensor has left, so that the measured step's first
    # tensor needs a new one; the backward thread's lies in a segment of its own.
    assert allocator.requested_peak == 124 * MiB
    assert allocator.reserved_peak == (60 + 32 + 60) * MiB


def test_settings_reach_the_model() -> None:
    events = [("alloc", 1), ("free", 1)]
    trace = step(*events, sizes={1: 5 * MiB}, resident=[], made_by_first_step=[])
    assert replay(trace, AllocatorSettings()).reserved_peak == 20 * MiB
    assert replay(trace, AllocatorSettings(large_segment=64 * MiB)).reserved_peak == 64 * MiB
