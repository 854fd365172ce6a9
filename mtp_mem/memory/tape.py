"""A tape: what the CUDA caching allocator did for one stream of one device, as sizes and addresses and nothing else.

It holds the segments and blocks before the first event, the events, and those after the last. `memory/snapshot.py`
makes tapes from PyTorch's memory snapshots; a tape's file (`.tape.json.gz`) has no stack frames, paths or names.
"""

import bisect
import gzip
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mtp_mem._util import atomic_write
from mtp_mem.errors import BadInput

Kind = Literal["alloc", "free", "segment", "drop", "map", "unmap", "oom"]
KINDS: tuple[Kind, ...] = Kind.__args__  # type: ignore[attr-defined]
LARGEST_NUMBER = 2**62


class TapeEvent(NamedTuple):
    """One event.

    `alloc` and `free` of a block, with the bytes asked for; `segment` and `drop`: a segment got from CUDA, or given
    back; `map` and `unmap`: the same for pages of an expandable segment; `oom`: a request for `nbytes` that failed.
    """

    kind: Kind
    address: int
    nbytes: int


@dataclass(frozen=True)
class Tape:
    """One stream of one device.

    Attributes:
        expandable: whether segments are expandable.
        segments: address -> (bytes, whether of the pool for small blocks) before the first event; of expandable
            segments the ranges with memory behind them.
        blocks: address -> (bytes of the block, bytes asked for) in use before the first event.
        events: in order.
        last_segments: as `segments`, after the last event; empty where they are not known.
        last_blocks: as `blocks`, after the last event.
        settings: of the allocator, as in PYTORCH_CUDA_ALLOC_CONF.
    """

    expandable: bool
    segments: dict[int, tuple[int, bool]]
    blocks: dict[int, tuple[int, int]]
    events: list[TapeEvent]
    last_segments: dict[int, tuple[int, bool]] = field(default_factory=dict)
    last_blocks: dict[int, tuple[int, int]] = field(default_factory=dict)
    settings: str = ""

    def to_json(self) -> dict[str, Any]:
        """The tape as a JSON object, as its file holds it."""
        return {
            "about": {"conf": self.settings},
            "expandable": self.expandable,
            "segments": [[address, *row] for address, row in self.segments.items()],
            "blocks": [[address, *row] for address, row in self.blocks.items()],
            "events": self.events,
            "last_segments": [[address, *row] for address, row in self.last_segments.items()],
            "last_blocks": [[address, *row] for address, row in self.last_blocks.items()],
        }

    @staticmethod
    def from_json(document: Any) -> "Tape":
        """The tape in a JSON document.

        Raises:
            BadInput: the document has another form, or its events contradict each other.
        """
        try:
            about = document.get("about") or {}
            tape = Tape(
                document["expandable"] is True,
                {address: (nbytes, small is True) for address, nbytes, small in document["segments"]},
                {address: (nbytes, requested) for address, nbytes, requested in document["blocks"]},
                [TapeEvent(*event) for event in document["events"]],
                {address: (nbytes, small is True) for address, nbytes, small in document["last_segments"]},
                {address: (nbytes, requested) for address, nbytes, requested in document["last_blocks"]},
                plain_settings(str(about.get("conf") or "")),
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise BadInput("not a tape: expected segments, blocks and events as rows of numbers") from None
        tape.check()
        return tape

    def check(self) -> None:
        """Check that the tape can exist: numbers are numbers, nothing overlaps, no event contradicts an earlier one.

        Raises:
            BadInput: it cannot; the message says what is wrong, and where.
        """
        for segments, blocks in ((self.segments, self.blocks), (self.last_segments, self.last_blocks)):
            _check_rows(segments, "segment")
            _check_rows(blocks, "block")
            starts = sorted(segments)
            for start, (nbytes, requested) in blocks.items():
                _check_numbers(start, requested, "block")
                at = bisect.bisect_right(starts, start) - 1
                if starts and (at < 0 or start + nbytes > starts[at] + segments[starts[at]][0]):
                    raise BadInput(f"a block at {start:x} lies in no segment")
        live, segments_now = set(self.blocks), set(self.segments)
        for number, (kind, address, nbytes) in enumerate(self.events):
            if kind not in KINDS:
                raise BadInput(f"event {number}: unknown kind of event; valid: {', '.join(KINDS)}")
            _check_numbers(address, nbytes, f"event {number}")
            group = segments_now if kind in ("segment", "drop") else live
            if kind in ("alloc", "segment"):
                if address in group:
                    raise BadInput(f"event {number}: {kind} at {address:x}, where another one is still live")
                group.add(address)
            elif kind in ("free", "drop"):
                if address not in group:
                    raise BadInput(f"event {number}: {kind} at {address:x}, where none is")
                group.remove(address)

    def save(self, path: Path) -> None:
        """Write the tape, compressed; the same tape gives the same bytes."""
        content = gzip.compress(json.dumps(self.to_json(), separators=(",", ":")).encode(), 9, mtime=0)
        with atomic_write(path) as partial:
            partial.write_bytes(content)


def plain_settings(text: str) -> str:
    """Those parts of a text that are settings, such as `max_split_size_mb:128`; the rest, paths too, is dropped."""
    return ",".join(re.findall(r"[a-z_0-9]+:(?:\[[\w:>,.]*\]|[\w.]+)(?=,|$)", "".join(text[:1000].split())))


def _check_rows(rows: Mapping[int, tuple[int, Any]], what: str) -> None:
    """Raise BadInput unless each row is an address and a number of bytes, and ends before the next begins."""
    for start, (nbytes, _) in rows.items():
        _check_numbers(start, nbytes, what)
    end = 0
    for start, (nbytes, _) in sorted(rows.items()):
        if start < end:
            raise BadInput(f"{what}s overlap at {start:x}")
        end = start + nbytes


def _check_numbers(address: Any, nbytes: Any, what: str) -> None:
    if type(address) is not int or type(nbytes) is not int or not 0 <= address < LARGEST_NUMBER:
        raise BadInput(f"{what}: not an address and a number of bytes")
    if not 0 < nbytes < LARGEST_NUMBER:
        raise BadInput(f"{what} at {address:x}: not a number of bytes")
