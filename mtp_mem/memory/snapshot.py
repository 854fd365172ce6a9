"""Reads somebody's CUDA memory snapshot into tapes: a pickle, the memory viewer's HTML page, or a tape.

PyTorch writes what the allocator holds now and, where its history was on, what it did before. What there was before
the first event follows from going backwards, so a history whose start was overwritten is as good as a whole one. One
thing is inferred: the length of a block that lived before the history and was freed in it (`memory/before_history.py`).
"""

import base64
import binascii
import bisect
import dataclasses
import itertools
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtp_mem._util import MiB
from mtp_mem.config import plain_pickle
from mtp_mem.config.foreign import LARGEST_FILE, document, read_bytes
from mtp_mem.errors import BadInput, clean_text
from mtp_mem.memory.before_history import before, whole_blocks
from mtp_mem.memory.tape import LARGEST_NUMBER, Kind, Tape, TapeEvent, plain_settings

KINDS: dict[str, Kind] = {
    "alloc": "alloc",
    "free_completed": "free",
    "segment_alloc": "segment",
    "segment_free": "drop",
    "segment_map": "map",
    "segment_unmap": "unmap",
    "oom": "oom",
}
FORMS = "a pickle of torch.cuda.memory._dump_snapshot, the memory viewer's HTML page, or a tape (.tape.json.gz)"
MOST_FRAMES = 30
MOST_ROWS = 5_000_000


@dataclass(frozen=True)
class Recording:
    """What a file says about one stream of one device.

    Attributes:
        device: its number.
        stream: its number; 0 is the default stream, the others count from 1.
        tape: what the allocator did.
        inferred: how many blocks' lengths are inferred.
        left_out: what else the file holds and the tape leaves out, in words.
    """

    device: int
    stream: int
    tape: Tape
    inferred: int = 0
    left_out: tuple[str, ...] = ()
    _event_frames: Sequence[Any] = field(default=(), repr=False)
    _block_frames: Mapping[int, Any] = field(default_factory=dict, repr=False)
    _times: Sequence[int] = field(default=(), repr=False)
    _cleaned: dict[int, list[str]] = field(default_factory=dict, repr=False)  # by the `id` of the raw frames

    @property
    def begins_with_process(self) -> bool:
        """Whether the allocator held no segment before the first event."""
        return not self.tape.segments

    def frames(self, event: int | None, address: int) -> list[str]:
        """Where a block was made, innermost first, as `file:line function`; empty where that was not recorded.

        Args:
            event: the number of the event that allocated it; None for a block that lived before the history.
            address: its address.
        """
        history = self._event_frames
        raw = self._block_frames.get(address) if event is None else history[event] if history else ()
        if id(raw) not in self._cleaned:
            self._cleaned[id(raw)] = list(_frames(raw))
        return self._cleaned[id(raw)]

    def milliseconds(self, event: int) -> float | None:
        """Milliseconds from the first event to this one; None where the snapshot has no times."""
        return (self._times[event] - self._times[0]) / 1000 if self._times else None


def read(path: Path) -> list[Recording]:
    """The recordings in a file: one for each device and stream that has a history.

    Raises:
        BadInput: the file is none of FORMS, holds no history, or its events contradict each other.
    """
    content = read_bytes(path)
    try:
        return _recordings_in(content)
    except BadInput as e:
        raise BadInput(f"{path}: {e}") from None


def _recordings_in(content: bytes) -> list[Recording]:
    if content.startswith(b"\x1f\x8b"):
        content = _unpacked(content)
    begin = content[:200].lstrip()
    if begin.startswith(b"{"):
        return [Recording(0, 0, Tape.from_json(document(content)))]
    if begin.startswith(b"<"):
        encoded = re.search(rb'"base64":\s*"([A-Za-z0-9+/=]*)"', content)
        try:
            content = base64.b64decode(encoded[1], validate=True) if encoded else b""
        except binascii.Error:
            content = b""
    if not content.startswith(b"\x80"):
        raise BadInput(f"not a snapshot; expected {FORMS}")
    return recordings(plain_pickle.loads(content))


def _unpacked(content: bytes) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)
    try:
        content = unpacker.decompress(content, LARGEST_FILE)
    except zlib.error:
        raise BadInput("not a whole gzip file (cut off?)") from None
    if not unpacker.eof:
        raise BadInput(f"a gzip file that is cut off, or holds more than {LARGEST_FILE:,} bytes")
    return content


def recordings(snapshot: Any) -> list[Recording]:
    """The recordings in a snapshot as `torch.cuda.memory._snapshot()` returns it; its content is not trusted.

    Raises:
        BadInput: the snapshot has another form, holds no history, or its events contradict each other.
    """
    if type(snapshot) is not dict or type(snapshot.get("segments")) is not list:
        raise BadInput(f"not a snapshot: no segments; expected {FORMS}")
    parts: dict[tuple[int, int], _Part] = defaultdict(_Part)
    count = itertools.count(1)
    private = _read_segments(snapshot["segments"], parts, count)
    _read_history(snapshot.get("device_traces"), parts, private, count)
    whole = {key: part for key, part in sorted(parts.items()) if part.events}
    if not whole:
        raise BadInput(
            "holds no history of allocations; call torch.cuda.memory._record_memory_history() before the steps"
        )
    silent = [f"device {device}: a stream with {len(part.segments):,} segments and no history"
              for (device, _), part in sorted(parts.items()) if part.segments and not part.events]  # fmt: skip
    settings, streams = _settings(snapshot.get("allocator_settings")), Counter[int]()
    answers = []
    for (device, stream), part in whole.items():
        streams[device] += stream != 0
        answers.append(part.recording(device, streams[device] if stream else 0, settings))
    return [dataclasses.replace(answers[0], left_out=(*answers[0].left_out, *silent)), *answers[1:]]


@dataclass
class _Part:
    """What a snapshot holds of one stream of one device, as it is read."""

    kinds: set[bool] = field(default_factory=set)  # of its segments: expandable or not
    segments: dict[int, tuple[int, bool]] = field(default_factory=dict)
    blocks: dict[int, tuple[int, int]] = field(default_factory=dict)
    block_frames: dict[int, Any] = field(default_factory=dict)
    events: list[TapeEvent] = field(default_factory=list)
    event_frames: list[Any] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    private: list[int] = field(default_factory=lambda: [0, 0])  # segments and events that are left out: private pools

    def recording(self, device: int, stream: int, settings: str) -> Recording:
        """The recording of this stream, with the state before the first event.

        Raises:
            BadInput: its events contradict each other.
        """
        where = f"device {device}, stream {stream}"
        kinds = self.kinds | {event.kind == "map" for event in self.events if event.kind in ("segment", "map")}
        if len(kinds) == 2:
            raise BadInput(
                f"{where}: expandable and other segments together, which the model of the allocator does not cover"
            )
        expandable = kinds == {True}
        try:
            segments, live = before(self.segments, self.blocks, self.events, expandable)
            blocks, inferred = whole_blocks(segments, live, self.events, expandable)
            tape = Tape(expandable, segments, blocks, self.events, self.segments, self.blocks, settings)
            tape.check()
        except BadInput as e:
            raise BadInput(f"{where}: {e}") from None
        left_out = []
        if any(self.private):
            left_out = ["{:,} segments and {:,} events of private pools (CUDA graphs, MemPool)".format(*self.private)]
        times = self.times if min(self.times) >= 0 else ()
        return Recording(device, stream, tape, inferred, tuple(left_out), self.event_frames, self.block_frames, times)


def _read_segments(segments: Any, parts: dict[tuple[int, int], _Part], count: Iterator[int]) -> list[tuple[int, int]]:
    """Note each segment and its blocks; returns (begin, end) of private pools' segments, which are left out."""
    private: list[tuple[int, int]] = []
    for segment in _rows(segments, "segments", count):
        part = parts[_number(segment, "device", "a segment", 0), _number(segment, "stream", "a segment")]
        address, nbytes = _number(segment, "address", "a segment"), _number(segment, "total_size", "a segment")
        if _private(segment.get("segment_pool_id")):
            private.append((address, address + nbytes))
            part.private[0] += 1
            continue
        pool = segment.get("segment_type")
        if pool not in ("small", "large"):
            raise BadInput("not the allocator's: a segment is neither small nor large (drawn from a profile?)")
        part.kinds.add(segment.get("is_expandable") is True)
        part.segments[address] = (nbytes, pool == "small")
        for block in _rows(segment.get("blocks"), "blocks", count):
            size = _number(block, "size", "a block")
            if block.get("state") != "inactive":
                start = _number(block, "address", "a block", address)
                part.blocks[start] = (size, _number(block, "requested_size", "a block", size))
                part.block_frames[start] = block.get("frames")
            address += size
    return sorted(private)


def _read_history(
    traces: Any, parts: dict[tuple[int, int], _Part], private: Sequence[tuple[int, int]], count: Iterator[int]
) -> None:
    """Note the events of each device's history, except those in the segments of private pools."""
    for device, history in enumerate(traces if type(traces) is list else ()):
        for entry in _rows(history, "device_traces", count):
            action = entry.get("action")
            kind = KINDS.get(action) if type(action) is str else None
            if kind is None:
                continue
            where = f"an event of kind {kind}"
            part = parts[device, _number(entry, "stream", where)]
            address = _number(entry, "addr", where, 0 if kind == "oom" else None)
            at = bisect.bisect_right(private, (address, LARGEST_NUMBER)) - 1
            if _private(entry.get("pool_id")) or (at >= 0 and private[at][0] <= address < private[at][1]):
                part.private[1] += 1
                continue
            part.events.append(TapeEvent(kind, address, _number(entry, "size", where)))
            part.event_frames.append(entry.get("frames"))
            part.times.append(_number(entry, "time_us", where, -1))


def _settings(table: Any) -> str:
    """What a snapshot says of the allocator's settings, as in PYTORCH_CUDA_ALLOC_CONF."""
    if type(table) is not dict:
        return ""
    text = table.get("PYTORCH_CUDA_ALLOC_CONF")
    settings = [plain_settings(text)] if type(text) is str and text else []
    split, collected = table.get("max_split_size"), table.get("garbage_collection_threshold")
    divisions = table.get("roundup_power2_divisions")
    rounds = type(divisions) is dict and any(type(value) is int and value > 1 for value in divisions.values())
    set_by_program = {
        "max_split_size_mb": f"{split // MiB}" if type(split) is int and 0 < split < LARGEST_NUMBER else "",
        "garbage_collection_threshold": f"{collected:.3f}" if type(collected) is float and 0 < collected <= 1 else "",
        "roundup_power2_divisions": "set" if rounds else "",
    }
    settings += [f"{name}:{value}" for name, value in set_by_program.items() if value and name not in str(settings)]
    return ",".join(settings)


def _rows(table: Any, what: str, count: Iterator[int]) -> Iterator[dict[str, Any]]:
    """The rows of a list; `count` is of all rows: in a pickle one list can stand in a million places."""
    if type(table) is not list:
        raise BadInput(f"not a snapshot: {what} is no list")
    for row in table:
        if next(count) > MOST_ROWS:
            raise BadInput(f"holds more than {MOST_ROWS:,} events and blocks")
        if type(row) is not dict:
            raise BadInput(f"not a snapshot: a row of {what} is no dict")
        yield row


def _number(row: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    value = row.get(name, default)
    if type(value) is not int or not -1 <= value < 2 * LARGEST_NUMBER:
        raise BadInput(f"not a snapshot: {where} without a number {name!r}")
    return value


def _private(pool: Any) -> bool:
    return type(pool) in (tuple, list) and list(pool[:2]) != [0, 0]


def _frames(frames: Any) -> Iterator[str]:
    """Python's frames, innermost first, at most 30; frames of all kinds where none is Python's."""
    rows = [frame for frame in frames[:1000] if type(frame) is dict] if type(frames) is list else []
    names = [(frame.get("filename"), frame.get("line"), frame.get("name")) for frame in rows]
    python = [row for row in names if type(row[0]) is str and row[0].endswith(".py")]
    for filename, line, name in (python or names)[:MOST_FRAMES]:
        if type(filename) is str and type(name) is str:
            yield clean_text(f"{filename}:{line if type(line) is int and abs(line) < 2**31 else '?'} {name}")
