"""`mtp-mem snapshot`: recordings of a simulated step in PyTorch's own format, answered; strangers' files, refused."""

import base64
import gzip
import json
import os
import pickle
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from command_line import mtp_mem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorder import Recorder, snapshot
from small import tiny
from torch.cuda._memory_viz import trace_plot

from mtp_mem import Workload, load_strategy
from mtp_mem._util import MiB
from mtp_mem.config.gpus import load_gpu
from mtp_mem.memory.snapshot import recordings
from mtp_mem.prediction.simulated_step import simulate
from mtp_mem.report.recording import logits_rows
from mtp_mem.report.timeline_page import drawing, read_timeline

TAPES = sorted(Path(folder).glob("*.tape.json.gz")) if (folder := os.environ.get("MTP_MEM_TAPES")) else []
VOCAB, TOKENS = 8209, 256


@cache
def pickled(expandable: bool = False) -> bytes:
    """The pickle of a predicted training step that an allocator of ours ran."""
    config = tiny(vocab_size=VOCAB, n_future=3)
    workload = Workload(batch=2, sequence=TOKENS // 2, dtype="bf16")
    trace = simulate(config, workload, load_strategy("naive"), gpu=load_gpu("h200"))
    recorder = Recorder(expandable=expandable)
    for key in trace.resident:
        recorder.allocate(key, trace.storages[key].nbytes)
    for event in trace.events:
        if event.kind == "alloc":
            recorder.allocate(event.key, trace.storages[event.key].nbytes)
        elif event.kind == "free":
            recorder.release(event.key)
        else:
            recorder.move(event.key, event.old)
    return pickle.dumps(snapshot(recorder, conf="expandable_segments:True" if expandable else ""))


def document(folder: Path, *args: str) -> tuple[int, dict[str, Any]]:
    ended = mtp_mem(folder, "snapshot", *args, "--json")
    return ended.returncode, json.loads(ended.stdout, parse_constant=pytest.fail)


@pytest.mark.parametrize("expandable", [False, True])
def test_a_training_step(tmp_path: Path, expandable: bool) -> None:
    (tmp_path / "step.pickle").write_bytes(pickled(expandable))
    code, answer = document(
        tmp_path, "step.pickle", "--vocab", str(VOCAB), "--out", "drawn", "--tape", "x.tape.json.gz"
    )
    assert code == 0
    (one,) = answer["snapshots"][0]["recordings"]
    assert one["exact"]
    assert one["begins_with_process"]
    assert one["expandable_segments"] is expandable
    peak = one["peaks"]["requested"]
    assert peak["requested_bytes"] <= peak["allocated_bytes"] <= peak["reserved_bytes"] == one["peak_reserved_bytes"]
    assert peak["where"] == "train.py:7 step (functional.py:2000 linear)"
    assert one["peak_requested_bytes"] == peak["requested_bytes"]
    assert peak["ms"] == peak["event"] / 4 or peak["ms"] > 0
    logits = [b for b in one["largest_at_peak"] if b["logits"]]
    assert logits[0]["nbytes"] == TOKENS * VOCAB * 4  # three heads' in fp32, and a gradient
    assert logits[0]["logits"] == f"{TOKENS} fp32, {2 * TOKENS} bf16"
    assert not logits[0]["stays"]
    assert logits[1]["nbytes"] == 64 * VOCAB * 2  # unembeddings, gradients and optimizer states look alike
    assert logits[1]["stays"]
    assert one["logits_sized_bytes_at_peak"] == 5 * TOKENS * VOCAB * 4
    assert logits[0]["where"] == "train.py:7 step (functional.py:2000 linear)"
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == [
        f"timeline.{suffix}" for suffix in ("csv", "json", "png", "svg")
    ]
    code, tape = document(tmp_path, "x.tape.json.gz")
    assert code == 0
    (other,) = tape["snapshots"][0]["recordings"]
    assert {of: {**p, "ms": None, "where": ""} for of, p in one["peaks"].items()} == other["peaks"]
    assert "train.py" not in gzip.decompress((tmp_path / "x.tape.json.gz").read_bytes()).decode()
    report = mtp_mem(tmp_path, "report", str(tmp_path / "nothing"), "--timeline", "drawn/timeline.json", "-o", "r.html")
    assert "Traceback" not in report.stderr


def test_a_history_of_frees_alone_is_drawn(tmp_path: Path) -> None:
    recorder = Recorder()
    for key in range(3):
        recorder.allocate(key, 5 * MiB)
    since = len(recorder.history)
    recorder.release(1)
    (tmp_path / "frees.pickle").write_bytes(pickle.dumps(snapshot(recorder, since=since)))
    code, answer = document(tmp_path, "frees.pickle", "--out", "drawn")
    assert code == 1
    assert "nothing was allocated" in answer["snapshots"][0]["recordings"][0]["difference"]
    assert drawing(read_timeline(tmp_path / "drawn" / "timeline.json"))["phases"] == []


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit(tmp_path: Path, columns: int) -> None:
    for name in ("step.pickle", "again.pickle"):
        (tmp_path / name).write_bytes(pickled())
    ended = mtp_mem(tmp_path, "snapshot", "step.pickle", "again.pickle", "--vocab", str(VOCAB), columns=columns)
    assert ended.returncode == 0
    assert max(map(len, ended.stdout.splitlines())) <= columns
    assert "step.pickle: EXACT\n  default segments: each of" in ended.stdout
    assert re.search(r"again.pickle +exact +\d+", ended.stdout)


def test_the_worst_file_gives_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "good.pickle").write_bytes(pickled())
    whole = pickle.loads(pickled())
    moved = next(event for event in whole["device_traces"][0] if event["action"] == "segment_alloc")
    moved["size"] += 2 * MiB
    next(s for s in whole["segments"] if s["address"] == moved["addr"])["total_size"] += 2 * MiB
    (tmp_path / "different.pickle").write_bytes(pickle.dumps(whole))
    (tmp_path / "none.txt").write_text("hello")
    ended = mtp_mem(tmp_path, "snapshot", "good.pickle", "different.pickle")
    assert ended.returncode == 1
    assert "different.pickle: DIFFERENT" in ended.stdout
    assert re.search(r"the first difference:\n  event \d+, alloc of [\d,]+ B: the model got [\d,]+ B", ended.stdout)
    code, answer = document(tmp_path, "none.txt", "missing", "different.pickle", "good.pickle", ".")
    assert code == 2
    assert [len(one["recordings"]) for one in answer["snapshots"]] == [0, 0, 1, 1, 0]
    assert "not a snapshot; expected a pickle of torch.cuda.memory._dump_snapshot" in answer["snapshots"][0]["error"]


@pytest.mark.skipif(not TAPES, reason="MTP_MEM_TAPES names no folder of recordings")
def test_every_recording_is_exact(tmp_path: Path) -> None:
    ended = mtp_mem(tmp_path, "snapshot", *map(str, TAPES))
    assert ended.returncode == 0
    assert ended.stdout.count(": EXACT\n") == len(TAPES)
    assert max(map(len, ended.stdout.splitlines())) <= 120


def test_logits_by_size() -> None:
    assert logits_rows(4 * 50257 * 100, 50257) == "100 fp32, 200 bf16"
    assert logits_rows(2 * 50257 * 101, 50257) == "101 bf16"
    assert logits_rows(2 * 50257 * 101 + 2, 50257) == ""
    assert logits_rows(2 * 50257, 50257) == ""  # one row
    assert logits_rows(4 * 7 * 100, 7) == ""  # small


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch RAN",)


@pytest.mark.parametrize("form", ["pickle", "html", "gz"])
def test_a_hostile_file_is_refused_in_one_line_and_nothing_runs(tmp_path: Path, form: str) -> None:
    whole = pickle.loads(pickled())
    whole["segments"][0]["frames"] = Evil()
    content = pickle.dumps(whole)
    if form == "html":
        content = trace_plot(whole).encode()
    elif form == "gz":
        content = gzip.compress(content)
    (tmp_path / "evil").write_bytes(content)
    ended = mtp_mem(tmp_path, "snapshot", "evil")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(r"mtp-mem: evil: holds more than plain data \(\w+ at byte \d+\).*\n", ended.stderr)
    assert not (tmp_path / "RAN").exists()


def test_a_gzip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtp_mem.memory.snapshot.LARGEST_FILE", 10**6)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b"\x80" + b"\0" * 10**8))
    ended = mtp_mem(tmp_path, "snapshot", "bomb.gz")
    assert ended.returncode == 2
    assert "holds more than 1,000,000 bytes" in ended.stderr


def answered_or_refused(folder: Path, content: bytes) -> None:
    (folder / "file").write_bytes(content)
    ended = mtp_mem(folder, "snapshot", "file", "--vocab", "8209")
    assert ended.returncode in (0, 1, 2)
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("\n") == (ended.returncode == 2)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", ended.stdout + ended.stderr)


FIXTURE = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from(
        [0, 1, 512, 2 * MiB, "alloc", "\x1b[2J", "[red]x[/red]", (0, 0), [], {}, [[]], float("nan"), "=1+1"]
    ),
    st.text(max_size=20),
)


@settings(max_examples=25, **FIXTURE)
@given(st.data(), ANYTHING)
def test_a_snapshot_with_one_field_of_anything(tmp_path: Path, data: st.DataObject, value: Any) -> None:
    whole = pickle.loads(pickled())
    place: Any = whole
    while True:
        key = data.draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.integers(0, 5)) == 0:
            break
        place = place[key]
    place[key] = value
    answered_or_refused(tmp_path, pickle.dumps(whole))


@settings(max_examples=25, **FIXTURE)
@given(st.data(), st.sampled_from(["pickle", "html", "tape", "json"]))
def test_a_file_with_a_few_other_bytes(tmp_path: Path, data: st.DataObject, form: str) -> None:
    content = bytearray(forms()[form])
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    answered_or_refused(tmp_path, bytes(content[:cut]))


@settings(max_examples=25, **FIXTURE)
@given(st.data(), ANYTHING)
def test_a_tape_with_one_number_of_anything(tmp_path: Path, data: st.DataObject, value: Any) -> None:
    tape = json.loads(forms()["json"])
    name = data.draw(st.sampled_from(["expandable", "events", "last_segments", "last_blocks", "about"]))
    if isinstance(tape[name], list) and data.draw(st.booleans()):
        row = data.draw(st.sampled_from(tape[name]))
        row[data.draw(st.integers(0, len(row) - 1))] = value
    else:
        tape[name] = value
    answered_or_refused(tmp_path, json.dumps(tape).encode())


@cache
def forms() -> dict[str, bytes]:
    (recording,) = recordings(pickle.loads(pickled()))
    text = json.dumps(recording.tape.to_json()).encode()
    html = trace_plot(pickle.loads(pickled())).encode()
    assert base64.b64encode(pickled())[:100] in html
    return {"pickle": pickled(), "html": html, "tape": gzip.compress(text), "json": text}
