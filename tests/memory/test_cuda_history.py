"""The allocator's history becomes the tracker's trace: tried with a real step's events, told as CUDA tells them."""

from typing import Any

import pytest
from small import build, tiny

from mtp_mem import TrainingStep, load_strategy, make_optimizer
from mtp_mem.memory.cpu import track
from mtp_mem.memory.cuda_history import Sizes, resident_blocks, trace_of
from mtp_mem.memory.trace import Trace


def as_history(trace: Trace) -> dict[str, Any]:
    """A tracked step in the shape of torch.cuda's snapshot; addresses are handed out again once they are free."""
    free: list[int] = []
    at: dict[int, int] = {}
    top = 512

    def place(key: int) -> int:
        nonlocal top
        address = free.pop() if free else top
        top = max(top, address + 512)
        at[key] = address
        return address

    resident = [(place(key), trace.storages[key].nbytes) for key in trace.resident]
    named = {at[key]: (trace.storages[key].category, trace.storages[key].name) for key in trace.resident}
    history: list[dict[str, Any]] = []
    marks: list[tuple[int, str]] = []
    count = 0
    for event in trace.events:
        storage = trace.storages[event.key]
        if event.kind == "alloc":
            if not marks or marks[-1][1] != storage.phase:
                marks.append((count, storage.phase))
            count += 1
            frames = [{"filename": "torch/x.py", "line": 1, "name": "x"}]
            frames.append({"filename": f"mtp_mem/{storage.op}.py", "line": 7, "name": "f"})
            history.append({"action": "alloc", "addr": place(event.key), "size": storage.nbytes, "frames": frames})
        elif event.kind == "free":
            address = at.pop(event.key)
            history.append({"action": "free_requested", "addr": address, "size": storage.nbytes})
            history.append({"action": "free_completed", "addr": address, "size": storage.nbytes})
            free.append(address)
        else:
            at[event.key] = at.pop(event.old)
    gradients = {at[key]: s.name for key, s in trace.storages.items() if s.name.endswith(".grad") and key in at}
    return {"history": history, "resident": resident, "names": named, "gradients": gradients, "marks": marks}


@pytest.mark.parametrize("spec", ["naive", "sequential", "checkpointed", "chunked_vocab:chunk=1000"])
def test_the_same_trace(spec: str) -> None:
    model, batch = build(
        tiny(vocab_size=4099, n_layers=5, n_future=3), sequence=75
    )  # N = 150: no two tensors of one size
    step = TrainingStep(model, make_optimizer(model), batch, load_strategy(spec))
    step()
    real = track(step)
    sizes = Sizes(batch.tokens.numel(), 4099, 64, frozenset(p.nbytes for p in model.parameters()))
    rebuilt = trace_of(**as_history(real), sizes=sizes)
    assert rebuilt.baseline == real.baseline
    assert rebuilt.peak().nbytes == real.peak().nbytes
    assert rebuilt.peak().phase == real.peak().phase
    assert rebuilt.phase_peaks() == real.phase_peaks()
    own, theirs = rebuilt.peak().by_category, real.peak().by_category
    for category in ("parameters", "optimizer", "logits", "trunk activations"):
        assert own[category] == theirs[category]  # type: ignore[index]
    # A sum that moved into another's block: the allocator sees one block, and so knows what becomes of it.
    assert {s.name for s in rebuilt.peak().live} >= {s.name for s in real.peak().live}


def test_where_a_block_was_made_and_what_is_in_no_name() -> None:
    history = [
        {"action": "segment_alloc", "addr": 0, "size": 2048},
        {
            "action": "alloc",
            "addr": 512,
            "size": 100,
            "frames": [{"filename": "/a/mtp_mem/x.py", "line": 3, "name": "f"}],
        },
        {"action": "alloc", "addr": 1024, "size": 8, "frames": []},
        {"action": "free_completed", "addr": 4096, "size": 8},
    ]
    segments = [
        {
            "address": 64,
            "blocks": [
                {"size": 512, "requested_size": 500, "state": "active_allocated"},
                {"size": 512, "state": "inactive"},
                {"size": 512, "requested_size": 7, "state": "active_allocated"},
            ],
        }
    ]
    assert resident_blocks(segments) == [(64, 500), (1088, 7)]
    trace = trace_of(
        history, resident_blocks(segments), {64: ("parameters", "w")}, {}, [(0, "trunk forward"), (1, "clip")],
        Sizes(4, 10, 2, frozenset()),
    )  # fmt: skip
    assert [(s.category, s.op, s.name) for s in trace.storages.values()] == [
        ("parameters", "", "w"),
        ("workspace", "", ""),
        ("trunk activations", "x.py:3 f", ""),
        ("other", "", ""),
    ]
    assert len(trace.events) == 2
