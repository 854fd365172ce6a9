"""A recording of an allocator that was replayed: what its peaks consist of, as data, as tables and as a timeline."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtp_mem._util import MiB, format_bytes
from mtp_mem._version import __version__
from mtp_mem.memory.snapshot import Recording
from mtp_mem.memory.tape import Tape
from mtp_mem.memory.trace import Category, Event, Storage, Trace
from mtp_mem.prediction.recording import Held
from mtp_mem.report.charts import timeline

LARGEST = 10
PEAKS = ("requested", "allocated", "reserved")
BEFORE = "before the history"


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Live blocks of one size from one place.

    Attributes:
        count: how many there are.
        nbytes: bytes that each was asked for.
        frames: where they were made, innermost first.
        event: number of the first one's allocation; None: before the history.
        logits: how many whole rows of V values a block can be, in words; empty: none, or nobody gave V.
        stays: a block of this size outlives the history, so that it may be a weight or a gradient instead.
    """

    count: int
    nbytes: int
    frames: tuple[str, ...]
    event: int | None
    logits: str
    stays: bool

    @property
    def nbytes_together(self) -> int:
        """Bytes of all of them."""
        return self.count * self.nbytes

    @property
    def where(self) -> str:
        """Where they were made, in words."""
        return where_made(self.frames, self.event)


def where_made(frames: Sequence[str], event: int | None) -> str:
    """The innermost frame outside of libraries, and the innermost of all; the event's number where there is none."""
    if not frames:
        return BEFORE if event is None else f"event {event:,}"
    own = next((f for f in frames if not re.search(r"[/\\](torch|site-packages|dist-packages)[/\\]", f)), None)
    inner = _short(frames[0])
    return inner if own is None or _short(own) == inner else f"{_short(own)} ({inner})"


def logits_rows(nbytes: int, vocab: int) -> str:
    """How many whole rows of V values a block of `nbytes` can be, in words; empty: none.

    R rows of V values take 4 R V bytes in fp32 and 2 R V in bf16 or fp16, and the allocator knows to the byte what was
    asked for. So a block can be logits if its size is a multiple of 2 V (of 4 V: in either dtype), from 2 rows and
    1 MiB on. An unembedding of D rows, its gradient and its optimizer states look alike: see `sizes_that_stay`.
    """
    rows = nbytes // (2 * vocab)
    if nbytes % (2 * vocab) or rows < 2 or nbytes < MiB:
        return ""
    return f"{rows:,} bf16" if rows % 2 else f"{rows // 2:,} fp32, {rows:,} bf16"


def live_at(tape: Tape, moment: int) -> dict[int, tuple[int | None, int]]:
    """What is live after so many events: address -> (number of its allocation, None: before the history; bytes)."""
    live: dict[int, tuple[int | None, int]] = {address: (None, nbytes) for address, (_, nbytes) in tape.blocks.items()}
    for number, (kind, address, nbytes) in enumerate(tape.events[:moment]):
        if kind == "alloc":
            live[address] = (number, nbytes)
        elif kind == "free":
            del live[address]
    return live


def sizes_that_stay(tape: Tape) -> frozenset[int]:
    """Sizes of blocks that outlive the history, as weights do and logits do not; none where memory ran out."""
    if any(event.kind == "oom" for event in tape.events):
        return frozenset()
    return frozenset(nbytes for _, nbytes in live_at(tape, len(tape.events)).values())


def at_peak(recording: Recording, held: Held, vocab: int | None) -> list[Blocks]:
    """What is live when most bytes are requested, grouped by size and place; the most bytes together first."""
    tape = recording.tape
    groups: dict[tuple[int, tuple[str, ...], bool], list[int | None]] = defaultdict(list)
    for address, (event, nbytes) in live_at(tape, held.peak("requested")).items():
        groups[nbytes, tuple(recording.frames(event, address)), event is None].append(event)
    stay = sizes_that_stay(tape)
    rows = [
        Blocks(len(events), nbytes, frames, events[0], logits_rows(nbytes, vocab) if vocab else "", nbytes in stay)
        for (nbytes, frames, _), events in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.nbytes_together)


def reached_in(recording: Recording, moment: int) -> str:
    """Where the allocation was made that leads to a moment of `Held.totals`; empty where that was not recorded."""
    if not moment:
        return ""
    frames = recording.frames(moment - 1, recording.tape.events[moment - 1].address)
    return where_made(frames, moment - 1) if frames else ""


def facts(recording: Recording, held: Held, blocks: list[Blocks], vocab: int | None) -> dict[str, Any]:
    """All that is known of a recording, for JSON."""
    tape = recording.tape
    moments = {}
    for of in PEAKS:
        moment = held.peak(of)
        moments[of] = {
            "event": moment - 1 if moment else None,
            "ms": recording.milliseconds(moment - 1) if moment else None,
            "where": reached_in(recording, moment),
            **{f"{name}_bytes": nbytes for name, nbytes in held.totals[moment]._asdict().items()},
        }
    return {
        "device": recording.device,
        "stream": recording.stream,
        "exact": held.exact,
        "difference": held.difference or None,
        "difference_at_event": None if held.exact else held.at,
        "begins_with_process": recording.begins_with_process,
        "inferred_blocks": recording.inferred,
        "left_out": list(recording.left_out),
        "expandable_segments": tape.expandable,
        "settings": tape.settings,
        "not_modelled": list(held.not_modelled),
        "events": dict(held.counts),
        **{f"peak_{of}_bytes": moments[of][f"{of}_bytes"] for of in PEAKS},
        "peaks": moments,
        "model_peak_reserved_bytes": held.model_reserved_peak,
        "unused_bytes": held.unused,
        "with_other_segments": {
            "expandable_segments": not tape.expandable,
            "peak_reserved_bytes": held.other_reserved_peak,
        },
        "vocab": vocab,
        "logits_sized_bytes_at_peak": _logits(blocks, stays=False) if vocab else None,
        "logits_or_weights_bytes_at_peak": _logits(blocks, stays=True) if vocab else None,
        "largest_at_peak": [
            {**dataclasses.asdict(b), "where": b.where, "nbytes_together": b.nbytes_together} for b in blocks[:LARGEST]
        ],
    }


def show(screen: Console, name: str, recording: Recording, held: Held, blocks: list[Blocks], vocab: int | None) -> None:
    """Print whether the replay is exact, the peaks, and what is live when most bytes are requested."""
    tape, counts = recording.tape, held.counts
    kind = "expandable segments" if tape.expandable else "default segments"
    got, gave = counts["segment"] + counts["map"], counts["drop"] + counts["unmap"]
    lines = [f"{title(name, recording)}: {'EXACT' if held.exact else 'DIFFERENT'}"]
    if held.exact:
        lines.append(f"  {kind}: each of {counts['alloc']:,} allocations lies where the GPU put it;")
        lines.append(f"  segments were allocated {got:,} times and released {gave:,} times, as on the GPU")
    else:
        lines += [f"  {kind}; the first difference:", f"  {held.difference}"]
        if not recording.begins_with_process:
            lines.append("  the state before the history is inferred, which may be the reason")
    if held.not_modelled:
        lines.append(f"  not modelled: {', '.join(held.not_modelled)}")
    lines += [f"  left out: {text}" for text in recording.left_out]
    if counts["oom"]:
        number, event = next((i, event) for i, event in enumerate(tape.events) if event.kind == "oom")
        lines.append(
            f"  out of memory {counts['oom']} times, first at event {number:,} for {format_bytes(event.nbytes)}"
        )
    screen.print(*lines, sep="\n")
    screen.print(_peaks(recording, held))
    if where := reached_in(recording, held.peak("requested")):
        screen.print(f"  most bytes are requested in {where}")
    peak = held.totals[held.peak("reserved")]
    other = held.other_reserved_peak
    word = "default segments" if tape.expandable else "expandable_segments:True"
    change = f"{'-' if other < peak.reserved else '+'}{format_bytes(abs(other - peak.reserved))}"
    lines = [
        f"  peak reserved less peak allocated: {format_bytes(held.unused)} ({held.unused / max(peak.reserved, 1):.1%})",
        f"  {word} would have reserved {format_bytes(other)} ({change})",
    ]
    if not recording.begins_with_process:
        lines[-1] += ","
        lines.append("  if the blocks from before the history lay side by side")
    if held.model_reserved_peak != peak.reserved:
        lines.append(f"  the allocator's model alone would reserve {format_bytes(held.model_reserved_peak)}")
    if vocab:
        lines.append(f"  logits-sized at the peak (whole rows of V): {format_bytes(_logits(blocks, stays=False))}")
        if alike := _logits(blocks, stays=True):
            lines.append(f"  whole rows of V too, but of a size that stays live, as weights do: {format_bytes(alike)}")
    screen.print(*lines, sep="\n")
    screen.print(_largest(blocks, vocab))
    screen.print()


def summary(rows: list[tuple[str, Recording, Held]]) -> Table:
    """A row for each recording: reserved peak, the same less allocated peak, reserved peak with the other segments."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("recording", overflow="fold")
    table.add_column("")
    for column in ("allocations", "reserved", "unused", "other kind"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, recording, held in rows:
        peak = held.totals[held.peak("reserved")]
        sizes = (format_bytes(n) for n in (peak.reserved, held.unused, held.other_reserved_peak))
        word = "exact" if held.exact else "DIFFERENT"
        table.add_row(title(name, recording), word, f"{held.counts['alloc']:,}", *sizes)
    return table


def title(name: str, recording: Recording) -> str:
    """The file's name, and the device and stream where they are not the first."""
    part = f", device {recording.device}, stream {recording.stream}" if recording.device or recording.stream else ""
    return f"{name}{part}"


def draw(name: str, recording: Recording, held: Held, out: Path, vocab: int | None) -> list[Path]:
    """The timeline of a recording, as files under `out`; none where nothing was allocated or freed."""
    trace, reserved, stay = Trace(), [held.totals[0].reserved], sizes_that_stay(recording.tape)
    at: dict[int, int] = {}  # address -> key of the storage that is live there

    def begin(event: int | None, address: int, nbytes: int) -> int:
        is_logits = vocab is not None and nbytes not in stay and bool(logits_rows(nbytes, vocab))
        category: Category = "logits" if is_logits else "live before the history" if event is None else "other"
        frames = recording.frames(event, address)
        at[address] = key = len(trace.storages)
        op = frames[0] if frames else ""
        trace.storages[key] = Storage(nbytes, category, "", op, (nbytes,), "bytes", where_made(frames, event))
        return key

    for address, (_, nbytes) in recording.tape.blocks.items():
        trace.resident.append(begin(None, address, nbytes))
    for number, (kind, address, nbytes) in enumerate(recording.tape.events):
        if kind == "alloc":
            trace.events.append(Event("alloc", begin(number, address, nbytes)))
        elif kind == "free":
            trace.events.append(Event("free", at.pop(address)))
        else:
            continue
        reserved.append(held.totals[number + 1].reserved)
    if not trace.events:
        return []
    verdict = "replayed exactly" if held.exact else f"replayed exactly up to event {held.at:,}"
    footer = f"read from a recording, not measured here; {verdict} · mtp_mem {__version__}"
    words = f"{title(name, recording)}: what is live, and what the allocator holds"
    return timeline.draw(trace, out, words, footer, over="the history", reserved=reserved)


def _peaks(recording: Recording, held: Held) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("  peak of")
    timed = recording.milliseconds(0) is not None
    for column in ("at event", *(["after ms"] if timed else []), *PEAKS):
        table.add_column(column, justify="right", no_wrap=True)
    for of in PEAKS:
        moment = held.peak(of)
        when = recording.milliseconds(moment - 1) if moment else None
        time = ["-" if when is None else f"{when:,.1f}"] if timed else []
        sizes = (format_bytes(nbytes) for nbytes in held.totals[moment])
        table.add_row(f"  {of}", f"{moment - 1:,}" if moment else "before", *time, *sizes)
    return table


def _largest(blocks: list[Blocks], vocab: int | None) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("  at the peak", "each", "together"):
        table.add_column(column, justify="right", no_wrap=True)
    if vocab:
        table.add_column("rows of V", no_wrap=True)
    table.add_column("made by")  # the one that is cut where the screen is narrow
    for b in blocks[:LARGEST]:
        logits = f"{b.logits}{'; stays' if b.stays else ''}" if b.logits else ""
        row = [f"{b.count:,} x", format_bytes(b.nbytes), format_bytes(b.nbytes_together), *([logits] if vocab else [])]
        table.add_row(*row, Text(b.where, no_wrap=True, overflow="ellipsis"))
    return table


def _logits(blocks: list[Blocks], *, stays: bool) -> int:
    return sum(b.nbytes_together for b in blocks if b.logits and b.stays == stays)


def _short(frame: str) -> str:
    """The frame without the folders of its file."""
    path, colon, rest = frame.rpartition(":")
    return re.split(r"[/\\]", path)[-1] + colon + rest
