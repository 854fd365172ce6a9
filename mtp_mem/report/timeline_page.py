"""A timeline.csv as a picture to hover over: bands by category, and the tensors that each band consists of.

The file holds live bytes by category after each event, and where the event's tensor was made. A rise is a tensor made
there; the fall of the same size, with the same origin, is its end. So tensors are read back from the file.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_mem._util import show_bytes
from mtp_mem.errors import BadInput
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
    """A read timeline.csv."""

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
    """Read a timeline.csv.

    Raises:
        BadInput: the file cannot be read, or a line is not of that form; names the line.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise BadInput(f"{path}: cannot be read as CSV: {e}") from None
    if len(table) < 2 or table[0][:3] != ["event", "phase", "op"] or table[0][-1] != "total" or len(table[0]) < 5:
        raise BadInput(f"{path}: no timeline.csv: expected event,phase,op,CATEGORY,...,total and a line for each event")
    categories = tuple(table[0][3:-1])
    rows = []
    for number, line in enumerate(table[1:], start=2):
        if len(line) != len(table[0]) or not all(cell.isdecimal() for cell in line[3:]):
            raise BadInput(f"{path}:{number}: not {len(categories) + 4} fields with whole bytes (cut off?)")
        rows.append(tuple(map(int, line[3:-1])))
    phases, ops = tuple(line[1] for line in table[1:]), tuple(line[2] for line in table[1:])
    return Timeline(path, categories, tuple(rows), phases, ops, _tensors(rows, phases, ops))


def _tensors(rows: Sequence[Sequence[int]], phases: Sequence[str], ops: Sequence[str]) -> tuple[Tensor, ...]:
    """The tensors behind the changes; those that were live before the step are not among them."""
    made: list[Tensor] = []
    live: dict[tuple[int, int], list[Tensor]] = {}
    for i in range(1, len(rows)):
        for category, (before, after) in enumerate(zip(rows[i - 1], rows[i], strict=True)):
            if after > before:
                tensor = Tensor(category, after - before, phases[i], ops[i], i, len(rows))
                live.setdefault((category, tensor.nbytes), []).append(tensor)
            elif after < before:
                same = live.get((category, before - after), [])
                origin = (phases[i], ops[i])
                # A block that changes its category has its new origin here, so that none of these may match.
                freed = next((t for t in reversed(same) if (t.phase, t.op) == origin), same[-1] if same else None)
                if freed:
                    same.remove(freed)
                    made.append(Tensor(category, freed.nbytes, freed.phase, freed.op, freed.born, i))
    made += [tensor for same in live.values() for tensor in same]
    return tuple(sorted(made, key=lambda t: (t.born, t.category)))


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
    words = f"peak {show_bytes(totals[peak])} in {timeline.phases[peak] or 'rest'}"
    return {
        "bands": bands,
        "phases": [{"name": name, "left": x(a), "right": x(b)} for name, a, b in _phases(timeline.phases, totals)],
        "peak": {"x": x(peak), "y": y(totals[peak]), "words": words, "left": peak > len(totals) / 2},
        "at_peak": [(timeline.categories[c], show_bytes(timeline.rows[peak][c])) for c in reversed(order)],
        "largest": [
            (show_bytes(t.nbytes), timeline.categories[t.category], t.op, t.phase) for t in timeline.largest(peak)
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
