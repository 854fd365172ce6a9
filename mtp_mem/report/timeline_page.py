"""A timeline.json as a picture to hover over: bands by category, and the tensors that each band consists of."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_mem._util import format_bytes
from mtp_mem.errors import BadInput
from mtp_mem.memory.trace import CATEGORIES, Storage, Trace
from mtp_mem.report.charts.style import COLOURS

MOST_COLUMNS = 3000  # a longer timeline is thinned out to this many moments; each keeps its highest one
LARGEST = 10
WIDTH, HEIGHT = 1000, 360  # of the drawing, in its own units


@dataclass(frozen=True)
class Tensor:
    """One tensor made during the step: live from event `born` up to, not including, event `died`."""

    category: int
    nbytes: int
    phase: str
    op: str
    born: int
    died: int


@dataclass(frozen=True)
class Timeline:
    """One step's live bytes."""

    path: Path
    categories: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]  # bytes live by category after each event; row 0 is before the step
    phases: tuple[str, ...]  # where the tensor of each event was made; "" in row 0
    ops: tuple[str, ...]
    tensors: tuple[Tensor, ...]

    @property
    def totals(self) -> list[int]:
        """Live bytes after each event."""
        return [sum(row) for row in self.rows]

    @property
    def peak(self) -> int:
        """The first event after which the most bytes are live."""
        totals = self.totals
        return totals.index(max(totals))

    def largest(self, at: int) -> list[Tensor]:
        """The largest tensors of the step that are live after event `at`."""
        live = [t for t in self.tensors if t.born <= at < t.died]
        return sorted(live, key=lambda t: -t.nbytes)[:LARGEST]


def read_timeline(path: Path) -> Timeline:
    """Read a timeline.json.

    Raises:
        BadInput: the file cannot be read, or is of another form.
    """
    try:
        trace = Trace.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as e:
        raise BadInput(f"{path}: cannot be read: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{path}: no timeline.json (cut off?): {e}".split("\n")[0]) from None
    return timeline_of(trace, path)


def timeline_of(trace: Trace, path: Path) -> Timeline:
    """The step of a trace, event by event; `path` is where it was read."""
    events = trace.events[trace.start :]
    live = Counter(dict.fromkeys(CATEGORIES, 0))
    for storage in trace.live_after(trace.start - 1):
        live[storage.category] += storage.nbytes
    rows, origins, died = [tuple(live.values())], [("", "")], {}
    for i, event in enumerate(events, start=1):
        storage = trace.storages[event.key]
        ended = event.key if event.kind == "free" else event.old if event.kind == "move" else None
        if ended is not None:
            died[ended] = i
            live[trace.storages[ended].category] -= trace.storages[ended].nbytes
        if event.kind != "free":
            live[storage.category] += storage.nbytes
        rows.append(tuple(live.values()))
        origins.append((storage.phase, storage.op))
    used = [c for c in range(len(CATEGORIES)) if any(row[c] for row in rows)]
    tensors = [_tensor(trace.storages[e.key], used, i, died.get(e.key, len(rows)))
               for i, e in enumerate(events, start=1) if e.kind != "free"]  # fmt: skip
    return Timeline(
        path,
        categories=tuple(CATEGORIES[c] for c in used),
        rows=tuple(tuple(row[c] for c in used) for row in rows),
        phases=tuple(phase for phase, _ in origins),
        ops=tuple(op for _, op in origins),
        tensors=tuple(tensors),
    )


def _tensor(storage: Storage, used: list[int], born: int, died: int) -> Tensor:
    category = used.index(CATEGORIES.index(storage.category))
    return Tensor(category, storage.nbytes, storage.phase, storage.op, born, died)


def drawing(timeline: Timeline) -> dict[str, Any]:
    """What the page needs to draw the bands without a script, and the data for the script.

    Returns:
        `bands`: name, colour, hatch and outline, bottom first; `phases`: name and left and right end; `peak`: x,
        y and words; `at_peak`: bytes by category; `largest`: the tensors at the peak; `data`: for timeline.js.
    """
    totals, peak = timeline.totals, timeline.peak
    kept = _thin(totals)
    top = 1.45 * max(max(totals), 1)
    order = sorted(range(len(timeline.categories)), key=lambda c: _rank(timeline.categories[c]))

    def x(i: int) -> float:
        return WIDTH * i / max(1, len(totals) - 1)

    def y(nbytes: int) -> float:
        return HEIGHT * (1 - nbytes / top)

    floor = [0] * len(kept)
    bands = []
    for c in order:
        ceiling = [below + timeline.rows[i][c] for below, i in zip(floor, kept, strict=True)]
        right = [x(i) for i in [*kept[1:], kept[-1]]]  # what is live after an event stays until the next
        name = timeline.categories[c]
        colour, hatch = COLOURS.get(name, COLOURS["other"])  # type: ignore[call-overload]
        path = f"M0 {y(floor[0]):.1f}{_steps([x(i) for i in kept], [y(v) for v in ceiling])}H{WIDTH}"
        path += _steps(right[::-1], [y(v) for v in floor[::-1]]) + "Z"
        bands.append({"name": name, "colour": colour, "hatch": bool(hatch), "path": path})
        floor = ceiling
    origins = list(dict.fromkeys(zip(timeline.phases, timeline.ops, strict=True)))
    number = {origin: i for i, origin in enumerate(origins)}
    data = {
        "width": WIDTH,
        "height": HEIGHT,
        "top": top,
        "events": kept,
        "last": len(totals) - 1,
        "categories": [timeline.categories[c] for c in order],
        "rows": [[timeline.rows[i][c] for c in order] for i in kept],
        "origins": origins,
        "made": [number[timeline.phases[i], timeline.ops[i]] for i in kept],
        "tensors": [
            [order.index(t.category), t.nbytes, number[t.phase, t.op], t.born, t.died] for t in timeline.tensors
        ],
    }
    words = f"peak {format_bytes(totals[peak])} in {timeline.phases[peak] or 'rest'}"
    return {
        "bands": bands,
        "phases": [{"name": name, "left": x(a), "right": x(b)} for name, a, b in _phases(timeline.phases, totals)],
        "peak": {"x": x(peak), "y": y(totals[peak]), "words": words, "left": peak > len(totals) / 2},
        "at_peak": [(timeline.categories[c], format_bytes(timeline.rows[peak][c])) for c in reversed(order)],
        "largest": [
            (format_bytes(t.nbytes), timeline.categories[t.category], t.op, t.phase) for t in timeline.largest(peak)
        ],
        "thinned": len(kept) < len(totals),
        "moments": len(kept),
        "events": len(totals) - 1,
        "width": WIDTH,
        "height": HEIGHT,
        "data": data,
    }


def _steps(xs: Sequence[float], ys: Sequence[float]) -> str:
    """SVG path commands of a line that changes its height only at the given places."""
    words, last = [], ""
    for x, y in zip(xs, ys, strict=True):
        if (height := f"{y:.1f}") != last:
            words.append(f"H{x:.2f}V{height}")
            last = height
    return "".join(words)


def _thin(totals: Sequence[int]) -> list[int]:
    """At most MOST_COLUMNS event numbers, of each stretch the highest, and the first and last always."""
    if len(totals) <= MOST_COLUMNS:
        return list(range(len(totals)))
    width = -(-len(totals) // (MOST_COLUMNS - 2))
    stretches = (range(i, min(i + width, len(totals))) for i in range(0, len(totals), width))
    highest = {max(stretch, key=totals.__getitem__) for stretch in stretches}
    return sorted(highest | {0, len(totals) - 1})


def _rank(category: str) -> int:
    return list(COLOURS).index(category) if category in COLOURS else len(COLOURS)


def _phases(phases: Sequence[str], totals: Sequence[int]) -> list[tuple[str, int, int]]:
    """Name, first and last event of each stretch; a fall begins none, for it names where its tensor was made."""
    reached: list[tuple[str, int]] = []
    for i in range(1, len(phases)):
        if totals[i] > totals[i - 1] and (not reached or reached[-1][0] != phases[i]):
            reached.append((phases[i], i))
    ends = [*(begin for _, begin in reached[1:]), len(phases) - 1]
    return [(name, begin, end) for (name, begin), end in zip(reached, ends, strict=True)]
