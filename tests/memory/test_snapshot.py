"""Snapshots become tapes: devices and streams apart, with what there was before the history."""

import copy
import gzip
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorder import FRAMES, Recorder, snapshot
from torch.cuda._memory_viz import trace_plot

from mtp_mem._util import MiB
from mtp_mem.errors import BadInput
from mtp_mem.memory.snapshot import read, recordings
from mtp_mem.memory.tape import Tape, TapeEvent
from mtp_mem.prediction.recording import hold


def busy(recorder: Recorder, seed: int, requests: int = 120) -> Recorder:
    """Random allocations and frees, an emptied cache and memory that runs out."""
    draw, live = random.Random(seed), list[int]()
    for key in range(requests):
        kind = draw.random()
        if kind < 0.55 or not live:
            recorder.allocate(key, draw.choice([draw.randrange(1, 3000), draw.randrange(1, 60 * MiB)]))
            live.append(key)
        elif kind < 0.96:
            recorder.release(live.pop(draw.randrange(len(live))))
        elif kind < 0.98:
            recorder.empty_cache()
        else:
            recorder.run_out(10**12)
    return recorder


@settings(max_examples=30)
@given(st.booleans(), st.integers(0, 10**6), st.sampled_from([0, 1, 5, 40, 100]))
def test_a_history_from_anywhere(expandable: bool, seed: int, since: int) -> None:
    recorder = busy(Recorder(expandable=expandable), seed)
    whole, cut = snapshot(recorder), snapshot(recorder, since=since)
    (recording,) = recordings(whole)
    held = hold(recording.tape)
    assert held.difference == ""
    assert recording.begins_with_process
    assert held.totals[-1] == (recorder.requested, recorder.allocated, recorder.reserved)
    assert held.model_reserved_peak == recorder.reserved_peak
    if not any(event["action"] in ("alloc", "free_completed") for event in cut["device_traces"][0]):
        return
    (later,) = recordings(cut)
    expected = held.totals[len(recording.tape.events) - len(later.tape.events) :]
    replayed = hold(later.tape).totals
    assert [totals.requested for totals in replayed] == [totals.requested for totals in expected]
    if later.tape.events[0].kind != "alloc":  # its memory may have been got just before
        assert [totals.reserved for totals in replayed] == [totals.reserved for totals in expected]


def test_before_a_history_of_large_blocks() -> None:
    recorder = Recorder()
    for key, size in enumerate((14, 3, 4, 1)):
        recorder.allocate(key, size * MiB)
    recorder.release(0)
    recorder.allocate(4, 13 * MiB + 512)  # less than 1 MiB is left, and stays with it
    since = len(recorder.history)
    for key in (4, 2, 3):
        recorder.release(key)
    recorder.allocate(5, 14 * MiB)
    recorder.empty_cache()
    (recording,) = recordings(snapshot(recorder, since=since))
    assert hold(recording.tape).difference == ""
    assert sorted(recording.tape.blocks.values()) == [
        (MiB, MiB), (3 * MiB, 3 * MiB), (4 * MiB, 4 * MiB), (14 * MiB, 13 * MiB + 512)
    ]  # fmt: skip
    assert sorted(recording.tape.segments.values()) == [(2 * MiB, True), (14 * MiB, False), (20 * MiB, False)]
    assert recording.inferred == 1  # of the 4 MiB: what is free behind it might begin later


def test_before_a_history_of_expandable_segments_with_holes() -> None:
    recorder = Recorder(expandable=True)
    for key, size in enumerate((100, 2, 60, 2, 30)):
        recorder.allocate(key, size * MiB)
    recorder.release(0)
    recorder.release(2)
    recorder.empty_cache()
    since = len(recorder.history)
    recorder.allocate(5, 50 * MiB)  # into a hole below all that has memory when the history begins
    recorder.allocate(6, 55 * MiB)
    recorder.run_out(10**12)
    (recording,) = recordings(snapshot(recorder, since=since))
    assert len(recording.tape.segments) == 2
    assert hold(recording.tape).difference == ""


def test_devices_and_streams_are_apart() -> None:
    recorders = [
        busy(Recorder(device=device, stream=stream, base=(1 + i) << 45), i)
        for i, (device, stream) in enumerate(((0, 0), (0, 94_000_000_000), (2, 0), (2, 7)))
    ]
    parts = recordings(snapshot(*recorders))
    assert [(part.device, part.stream) for part in parts] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    for part, recorder in zip(parts, recorders, strict=True):
        held = hold(part.tape)
        assert held.difference == ""
        assert held.totals[-1] == (recorder.requested, recorder.allocated, recorder.reserved)


def test_private_pools_are_left_out_and_said() -> None:
    own, private = busy(Recorder(), 1), busy(Recorder(base=1 << 50), 2)
    whole = snapshot(own, private)
    segments = len(private.segments())
    for segment in whole["segments"][-segments:]:
        segment["segment_pool_id"] = (0, 1)
    for event in whole["device_traces"][0]:
        if event.get("addr", 0) >= 1 << 50:
            event["pool_id"] = (0, 1)
    whole["device_traces"][0] = [e for e in whole["device_traces"][0] if e in own.history or e["action"] != "oom"]
    (recording,) = recordings(whole)
    assert hold(recording.tape).difference == ""
    assert recording.left_out[0].startswith(f"{segments} segments and ")


def test_a_stream_without_a_history_is_said() -> None:
    silent = busy(Recorder(device=1, base=1 << 50), 2)
    count = len(silent.segments())
    silent.history.clear()
    (recording,) = recordings(snapshot(busy(Recorder(), 1), silent))
    assert recording.left_out == (f"device 1: a stream with {count} segments and no history",)


def test_frames_and_times() -> None:
    recorder = Recorder()
    recorder.allocate(0, 5 * MiB)
    recorder.release(0)
    (recording,) = recordings(snapshot(recorder))
    address = recording.tape.events[1].address
    assert recording.frames(1, address) == [f"{f['filename']}:{f['line']} {f['name']}" for f in FRAMES[1:]]
    assert recording.milliseconds(1) == 0.25


def test_settings() -> None:
    recorder = busy(Recorder(large_segment=32 * MiB), 3)
    (recording,) = recordings(snapshot(recorder, conf="large_segment_size_mb:32, pinned_use_background_threads:True"))
    assert recording.tape.settings == "large_segment_size_mb:32,pinned_use_background_threads:True"
    assert hold(recording.tape).difference == ""
    (recording,) = recordings(snapshot(busy(Recorder(max_split=40 * MiB), 4)))
    assert recording.tape.settings == "max_split_size_mb:40"
    assert hold(recording.tape).difference == ""
    whole = snapshot(busy(Recorder(), 5), conf="roundup_power2_divisions:[256:1,>:4],garbage_collection_threshold:0.8")
    (recording,) = recordings(whole)
    assert hold(recording.tape).not_modelled == (
        "roundup_power2_divisions:[256:1,>:4]",
        "garbage_collection_threshold:0.8",
    )
    (recording,) = recordings(snapshot(busy(Recorder(), 5), conf="expandable_segments:maybe"))
    assert hold(recording.tape).not_modelled == ("expandable_segments:maybe",)


def test_every_form_of_file(tmp_path: Path) -> None:
    whole = snapshot(busy(Recorder(), 6))
    content = pickle.dumps(whole)
    files = {
        "a.pickle": content,
        "a.pickle.gz": gzip.compress(content),
        "a.html": trace_plot(copy.deepcopy(whole)).encode(),
        "segments.html": trace_plot(copy.deepcopy(whole), plot_segments=True).encode(),
    }
    tapes = []
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        (recording,) = read(tmp_path / name)
        tapes.append(recording.tape)
    tapes[0].save(tmp_path / "a.tape.json.gz")
    (tmp_path / "a.json").write_bytes(gzip.decompress((tmp_path / "a.tape.json.gz").read_bytes()))
    tapes += [read(tmp_path / name)[0].tape for name in ("a.tape.json.gz", "a.json")]
    assert all(tape == tapes[0] for tape in tapes)


def test_a_tape_has_sizes_and_addresses_alone(tmp_path: Path) -> None:
    whole = snapshot(busy(Recorder(), 7), conf="expandable_segments:False,max_split_size_mb:99999,secret_path:/home/me")
    (recording,) = recordings(whole)
    recording.tape.save(tmp_path / "x.tape.json.gz")
    text = gzip.decompress((tmp_path / "x.tape.json.gz").read_bytes()).decode()
    document = json.loads(text)
    assert document.pop("about") == {"conf": "expandable_segments:False,max_split_size_mb:99999"}
    letters = {word for event in document.pop("events") for word in event if isinstance(word, str)}
    assert letters <= {"alloc", "free", "segment", "drop", "oom"}
    assert not [c for c in json.dumps(list(document.values())) if c.isalpha() and c not in "truefals"]
    assert "secret" not in text


def changed(**changes: Any) -> dict[str, Any]:
    return {**snapshot(busy(Recorder(), 8)), **changes}


@pytest.mark.parametrize(
    ("whole", "words"),
    [
        ([], "not a snapshot: no segments"),
        ({"segments": 3}, "not a snapshot: no segments"),
        ({"segments": []}, r"holds no history of allocations; call torch.cuda.memory._record_memory_history\(\)"),
        (changed(device_traces=[[]]), "holds no history"),
        (changed(device_traces=[3]), "device_traces is no list"),
        (changed(segments=[3]), "a row of segments is no dict"),
        (changed(segments=[{"stream": 0, "address": 1, "total_size": 9, "blocks": []}]), "drawn from a profile"),
        (changed(segments=[{"stream": 0}]), "a segment without a number 'address'"),
        (changed(segments=[]), "neither"),
        (
            changed(device_traces=[[{"action": "alloc", "stream": 0, "addr": "x", "size": 1}]]),
            "without a number 'addr'",
        ),
        (
            changed(device_traces=[[{"action": "free_completed", "stream": 0, "addr": 5, "size": 0}]]),
            "no number|not a n",
        ),
    ],
)
def test_what_is_no_snapshot(whole: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        recordings(whole)


def test_one_list_in_a_million_places_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = snapshot(busy(Recorder(), 9))
    whole["device_traces"] = whole["device_traces"] * 100_000
    monkeypatch.setattr("mtp_mem.memory.snapshot.MOST_ROWS", 10_000)
    with pytest.raises(BadInput, match="holds more than 10,000 events and blocks"):
        recordings(whole)


def test_expandable_and_other_segments_together() -> None:
    both = snapshot(busy(Recorder(), 1), busy(Recorder(expandable=True, base=1 << 60), 2))
    with pytest.raises(BadInput, match="device 0, stream 0: expandable and other segments together"):
        recordings(both)


def test_a_segment_that_is_released_where_one_still_is() -> None:
    recorder = Recorder(expandable=True)
    recorder.allocate(0, 5 * MiB)
    whole = snapshot(recorder)
    start = whole["segments"][0]["address"]
    for address in (start, start - 2 * MiB, start + 40 * MiB):
        event = {"action": "segment_unmap", "stream": 0, "addr": address, "size": 2 * MiB}
        whole["device_traces"][0].append(event)
    with pytest.raises(BadInput, match=f"stream 0: a segment was released at {start:x}, where another one is"):
        recordings(whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"events": [["alloc", 0, 5], ["alloc", 0, 5]]}, "event 1: alloc at 0, where another one is still live"),
        ({"events": [["free", 0, 5]]}, "event 0: free at 0, where none is"),
        ({"events": [["drop", 0, 5]]}, "event 0: drop at 0, where none is"),
        ({"events": [["alloc", 0, 0]]}, "event 0 at 0: not a number of bytes"),
        ({"events": [["alloc", -1, 5]]}, "event 0: not an address"),
        ({"events": [["alloc", 0, 10**30]]}, "event 0 at 0: not a number of bytes"),
        ({"events": [["buy", 0, 5]]}, "event 0: unknown kind of event; valid: alloc, free"),
        ({"events": [["alloc", 0]]}, "not a tape"),
        ({"segments": [[0, 5, True], [3, 5, True]]}, "segments overlap at 3"),
        ({"segments": [[0, 1024, True]], "blocks": [[512, 1024, 1]]}, "a block at 200 lies in no segment"),
        ({"segments": [["x", 5, True]]}, "segment: not an address"),
        ({"blocks": 3}, "not a tape"),
        ({"about": 3}, "not a tape"),
    ],
)
def test_what_is_no_tape(change: dict[str, Any], words: str) -> None:
    document = Tape(False, {}, {}, [TapeEvent("segment", 0, 2 * MiB), TapeEvent("alloc", 0, 5)]).to_json()
    assert Tape.from_json(document).events
    with pytest.raises(BadInput, match=words):
        Tape.from_json({**document, **change})
