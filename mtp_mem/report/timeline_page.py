"""A timeline.json as an interactive chart: one band per category, and the tensors in each band."""

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from mtp_mem._util import format_bytes
from mtp_mem.config.foreign import read_json
from mtp_mem.errors import BadInput
from mtp_mem.memory.trace import Storage, Trace
from mtp_mem.report.charts.style import COLOURS
from mtp_mem.report.charts.timeline import LARGEST, live_by_category, peak_words, phases

MOST_COLUMNS = 3000  # a longer timeline is thinned out to so many moments, the highest of each stretch
WIDTH, HEIGHT = 1000, 360  # of the drawing, in its own units


def read_timeline(path: Path) -> Trace:
    """Read a timeline.json.

    Raises:
        BadInput: the file cannot be read, or is of another form.
    """
    try:
        return Trace.from_json(read_json(path))
    except (ValueError, BadInput) as e:
        if not os.path.isfile(path):
            raise
        raise BadInput(f"{path}: no timeline.json (cut off?): {e}".split("\n")[0]) from None


def drawing(trace: Trace) -> dict[str, Any]:
    """The data of the chart: SVG paths that show without a script, and what timeline.js needs.

    Returns:
        `bands`: name, colour, hatch and SVG path, bottom first; `phases`: name and left and right end; `peak`: x, y,
        words and whether these stand left of it; `at_peak`: bytes by category; `largest`: the tensors at the peak;
        `thinned`, `moments` of `events`: what is drawn; `width` and `height`; `data`: for timeline.js.
    """
    rows, at_peak, events = live_by_category(trace), trace.peak(), trace.events[trace.start :]
    totals = [sum(row) for row in zip(*rows.values(), strict=True)]
    peak = at_peak.event - trace.start + 1
    kept = _thin(totals)
    top = 1.45 * at_peak.nbytes
    categories = [category for category in COLOURS if category in rows]

    def x(i: int) -> float:
        return WIDTH * i / len(events)

    def y(nbytes: int) -> float:
        return HEIGHT * (1 - nbytes / top)

    floor = [0] * len(kept)
    bands = []
    for category in categories:
        ceiling = [below + rows[category][i] for below, i in zip(floor, kept, strict=True)]
        right = [x(i) for i in [*kept[1:], kept[-1]]]  # what is live after an event stays until the next
        colour, hatch = COLOURS[category]
        path = f"M0 {y(floor[0]):.1f}{_steps([x(i) for i in kept], [y(v) for v in ceiling])}H{WIDTH}"
        path += _steps(right[::-1], [y(v) for v in floor[::-1]]) + "Z"
        bands.append({"name": category, "colour": colour, "hatch": bool(hatch), "path": path})
        floor = ceiling

    origins = {("", ""): 0}  # phase and operator -> number

    def origin(storage: Storage) -> int:
        return origins.setdefault((storage.phase, storage.op), len(origins))

    died = {event.old if event.kind == "move" else event.key: i
            for i, event in enumerate(events, start=1) if event.kind != "alloc"}  # fmt: skip
    tensors = []
    for i, event in enumerate(events, start=1):
        if event.kind != "free":
            storage = trace.storages[event.key]
            end = died.get(event.key, len(totals))
            tensors.append([categories.index(storage.category), storage.nbytes, origin(storage), i, end])
    origins_of_events = [0, *(origin(trace.storages[event.key]) for event in events)]
    data = {
        "width": WIDTH,
        "height": HEIGHT,
        "top": top,
        "events": kept,
        "last": len(events),
        "categories": categories,
        "rows": [[rows[category][i] for category in categories] for i in kept],
        "origins": list(origins),
        "made": [origins_of_events[i] for i in kept],
        "tensors": tensors,
    }
    return {
        "bands": bands,
        "phases": [
            {"name": name, "left": x(begin), "right": x(end)}
            for (name, begin), (_, end) in pairwise([*phases(trace), ("", len(events))])
        ],
        "peak": {
            "x": x(peak),
            "y": y(at_peak.nbytes),
            "words": peak_words(at_peak),
            "left": peak > len(totals) / 2,
        },
        "at_peak": [(category, format_bytes(nbytes)) for category, nbytes in at_peak.by_category.items()],
        "largest": [(format_bytes(s.nbytes), s.category, s.name or s.op, s.phase) for s in at_peak.live[:LARGEST]],
        "thinned": len(kept) < len(totals),
        "moments": len(kept),
        "events": len(events),
        "width": WIDTH,
        "height": HEIGHT,
        "data": data,
    }


def _steps(xs: Sequence[float], ys: Sequence[float]) -> str:
    """SVG path commands of a step function through the given points."""
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
