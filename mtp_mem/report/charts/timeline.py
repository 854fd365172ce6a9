"""One step's live bytes over its allocations: a stacked area by category, the phases, and what the peak holds."""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mtp_mem._util import atomic_write, format_bytes
from mtp_mem.memory.trace import CATEGORIES, Category, Peak, Storage, Trace
from mtp_mem.report.charts.style import COLOURS, cell, save, settings, shortened, unit_for

LARGEST = 10


def live_by_category(trace: Trace) -> dict[Category, list[int]]:
    """Live bytes of each used category, before the step (index 0) and after each of its events."""
    live = Counter[Category]()
    for storage in trace.live_after(trace.start - 1):
        live[storage.category] += storage.nbytes
    rows = {category: [live[category]] for category in CATEGORIES}
    for event in trace.events[trace.start :]:
        storage = trace.storages[event.key]
        live[storage.category] += -storage.nbytes if event.kind == "free" else storage.nbytes
        if event.kind == "move":
            old = trace.storages[event.old]
            live[old.category] -= old.nbytes
        for category, row in rows.items():
            row.append(live[category])
    return {category: row for category, row in rows.items() if any(row)}


def phases(trace: Trace) -> list[tuple[str, int]]:
    """Each phase with the index (as in `live_by_category`) of its first allocation, in order, each time it comes."""
    begun: list[tuple[str, int]] = []
    for i, event in enumerate(trace.events[trace.start :], start=1):
        phase = trace.storages[event.key].phase
        if event.kind == "alloc" and (not begun or begun[-1][0] != phase):
            begun.append((phase, i))
    return begun


def peak_words(peak: Peak) -> str:
    """How high the peak is, and in which phase, if the trace has phases."""
    return f"peak {format_bytes(peak.nbytes)}{f' in {peak.phase}' if peak.phase else ''}"


def draw(
    trace: Trace, out: Path, title: str, footer: str, *, over: str = "the step", reserved: Sequence[int] | None = None
) -> list[Path]:
    """Write timeline.png, .svg, .csv and the trace as timeline.json under `out`; returns the files.

    Args:
        trace: what to draw.
        out: a folder.
        title: above the picture.
        footer: where it comes from.
        over: what the trace is of.
        reserved: bytes that the allocator held, before the first event and after each; a line above the bands.
    """
    rows, peak = live_by_category(trace), trace.peak()
    order = [c for c in COLOURS if c in rows]
    shown = [c for c in order if any(rows[c])]
    top = max(1.3 * peak.nbytes, 1.05 * max(reserved or [0]))
    unit, unit_name = unit_for(peak.nbytes)
    at = peak.event - trace.start + 1
    with settings():
        figure = Figure(figsize=(11, 6.2), dpi=130, layout="constrained", facecolor="white")
        axes, notes = figure.subplots(1, 2, width_ratios=[2.4, 1])
        steps = np.arange(len(next(iter(rows.values()))))
        areas = axes.stackplot(
            steps, [np.array(rows[c]) / unit for c in shown], colors=[COLOURS[c][0] for c in shown], lw=0
        )
        for area, category in zip(areas, shown, strict=True):
            area.set(hatch=COLOURS[category][1], edgecolor="white", label=category, rasterized=True)
        if reserved is not None:
            axes.step(steps, np.array(reserved) / unit, where="post", color="black", lw=1.2, ls=(0, (4, 1.5)),
                      label="reserved from the GPU", rasterized=True)  # fmt: skip
        axes.plot([at], [peak.nbytes / unit], "v", color="black", markersize=9, clip_on=False)
        label = peak_words(peak)
        left = at > len(steps) / 2
        axes.annotate(
            label,
            (at, peak.nbytes / unit),
            xytext=(-9 if left else 9, 6 if reserved is None else -17),
            textcoords="offset points",
            ha="right" if left else "left",
            weight="bold",
            bbox={"fc": "white", "ec": "none", "pad": 1.5},
            zorder=5,
        )
        axes.set_ylim(0, top / unit)
        axes.set_xlim(0, len(steps) - 1)
        _mark_phases(axes, phases(trace), len(steps))
        axes.set_xlabel(f"allocations and frees of {over}, in order")
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} {unit_name}"))
        notes.axis("off")
        handles, labels = axes.get_legend_handles_labels()
        notes.legend(
            handles[::-1],
            labels[::-1],
            loc="upper left",
            frameon=False,
            title="Live bytes",
            alignment="left",
            fontsize=8.5,
            labelspacing=0.35,
        )
        text = "\n".join([f"The {LARGEST} largest at the peak:", *map(_line, peak.live[:LARGEST])])
        notes.text(0, 0, text, family="DejaVu Sans Mono", size=6.8, va="bottom", linespacing=1.5)
        figure.suptitle(shortened(title, 120), x=0.02, ha="left", size=13)
        figure.supxlabel(footer, x=0.02, ha="left", size=7.5, color="#666666")

        def write_csv(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as file:
                table = csv.writer(file, lineterminator="\n")
                table.writerow(["event", "phase", "op", *order, "total", *(["reserved"] if reserved else [])])
                for i in range(len(steps)):
                    storage = trace.storages[trace.events[trace.start + i - 1].key] if i else None
                    origin = (storage.phase, storage.op) if storage else ("", "")
                    values = [rows[c][i] for c in order]
                    table.writerow([i, *map(cell, origin), *values, sum(values), *([reserved[i]] if reserved else [])])

        files = save(figure, out, "timeline", write_csv)
    with atomic_write(out / "timeline.json") as partial:
        partial.write_text(json.dumps(trace.to_json()) + "\n", encoding="utf-8")
    return [*files, out / "timeline.json"]


def _line(storage: Storage) -> str:
    shape = "x".join(map(str, storage.shape)) or "scalar"
    origin = ", ".join(filter(None, (storage.op.partition(".")[0], storage.phase)))
    return f"{format_bytes(storage.nbytes):>10} {storage.dtype} {shape}\n{'':>10} {storage.name or origin}"


def _mark_phases(axes: mpl.axes.Axes, begun: list[tuple[str, int]], width: int) -> None:
    """A line where each phase begins, and its name where there is room for it."""
    for (name, begin), (_, end) in pairwise([*begun, ("", width)]):
        if name:
            axes.axvline(begin, color="black", lw=0.5, alpha=0.35)
        if name and end - begin > 0.022 * width:
            axes.annotate(name, ((begin + end) / 2, 0.99), xycoords=("data", "axes fraction"), rotation=90,
                          ha="center", va="top", size=7, color="#333333")  # fmt: skip
