"""Peak memory against the number of heads: one chart, or one panel for each shape or backend."""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from mtp_mem._util import format_bytes
from mtp_mem.config.gpus import GPU
from mtp_mem.report.charts.style import (
    HOW,
    End,
    draw_line,
    figure,
    foot,
    grid,
    heads_axis,
    label_ends,
    save,
    styles,
    subtitle,
    unit_for,
    write_rows,
)
from mtp_mem.report.recommend import peak_bytes, record_formula
from mtp_mem.runs.identity import training_words
from mtp_mem.runs.record import Record

FORMULA: Any = {"color": "#333333", "linewidth": 0.9, "linestyle": (0, (5, 4))}
SAME_SCALE = 8  # panels share a scale while the highest is at most this many times the lowest
COLUMNS = (
    *("n", "strategy", "status", "baseline_bytes", "peak_requested_bytes", "peak_over_baseline_bytes"),
    *("peak_allocated_bytes", "peak_reserved_bytes", "floor_requested_bytes", "floor_allocated_bytes"),
    *("peak_phase", "step_ms", "tokens_per_s", "gradient"),
)


def memory_vs_n(records: Sequence[Record], out: Path, gpu: GPU | None = None, *, png: bool = True) -> list[Path]:
    """Peak bytes against the number of heads, a line for each strategy.

    Args:
        records: of one profile.
        out: folder for the files.
        gpu: draw the whole peak below the line of what this GPU holds, instead of the peak over the baseline.
        png: whether to write the PNG.

    Returns:
        The files written under `out`: memory-vs-n.png, .svg and .csv. Empty without a finished case.
    """
    what = "all of it" if gpu else "on top of weights, optimizer and batch"
    title = f"{'Predicted memory' if gpu else 'Memory'} of a training step, {what}"
    return _lines_against_n(records, out, gpu, "memory-vs-n", title, png)


def memory_of_setups(setups: Mapping[str, Sequence[Record]], out: Path, gpu: GPU) -> list[Path]:
    """The whole peak below the line of what the GPU holds: a line for each strategy in each training setup.

    Args:
        setups: words that tell a setup from the others -> its records; all of one model, step and GPU.
        out: folder for the files.
        gpu: the target.

    Returns:
        The files written under `out`: memory-of-setups.png, .svg and .csv. Empty without a finished case.
    """
    lines = [
        dataclasses.replace(r, strategy=f"{r.strategy}, {words}", floor_allocated_bytes=None)
        for words, records in setups.items()
        for r in records
    ]
    return _lines_against_n(lines, out, gpu, "memory-of-setups", "Predicted memory of a training step, by setup", True)


def memory_small_multiples(panels: Mapping[str, Sequence[Record]], out: Path, *, png: bool = True) -> list[Path]:
    """Lines as in `memory_vs_n`, over the baseline: a panel for each vocabulary, GPU, backend or whatever differs.

    Args:
        panels: title of a panel -> its records; panels without a finished case are left out.
        out: folder for the files.
        png: whether to write the PNG.

    Returns:
        The files written under `out`: memory-vs-n-panels.png, .svg and .csv. Empty with fewer than two panels.
    """
    panels = {title: records for title, records in panels.items() if _done(records)}
    if len(panels) < 2:
        return []
    tops = {title: max(_height(r, None) for r in _done(records)) for title, records in panels.items()}
    shared = max(tops.values()) <= SAME_SCALE * max(1, min(tops.values()))
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    title = "Memory of a training step on top of weights, optimizer and batch"
    scale = "All panels have one scale" if shared else "Each panel has a scale of its own"
    machines = dict.fromkeys(foot(_done(records)[0]) for records in panels.values())
    with figure(10, 0.9 + 3.3 * lines, title, scale, "\n".join(machines), dpi=120) as drawing:
        grids = drawing.subplots(lines, columns, squeeze=False).flat
        for axes, (name, records) in zip(grids, panels.items(), strict=False):
            top = max(tops.values()) if shared else tops[name]
            unit, unit_name = unit_for(top)
            axes.set_ylim(0, 1.08 * top / unit)
            heads_axis(axes, sorted({r.n for r in records}))
            grid(axes, "y", f" {unit_name}")
            label_ends(axes, _lines(axes, records, unit, None))
            words = textwrap.fill(f"{name}, {HOW[_done(records)[0].exactness]}", 56)
            axes.set_title(words, loc="left", size=9)
        for axes in list(grids)[len(panels) :]:
            axes.set_visible(False)
        rows = [[name, *(getattr(r, c) for c in COLUMNS)] for name, records in panels.items() for r in records]
        return save(drawing, out, "memory-vs-n-panels", write_rows(["panel", *COLUMNS], rows), png=png)


def _lines_against_n(
    records: Sequence[Record], out: Path, gpu: GPU | None, name: str, title: str, png: bool
) -> list[Path]:
    """One chart of `_lines` as NAME.png, .svg and .csv; no files without a finished case."""
    done = _done(records)
    if not done:
        return []
    top = max(*(_height(r, gpu) for r in done), gpu.total_bytes if gpu else 0)
    unit, unit_name = unit_for(top)
    one_setup = len({training_words(r) for r in done}) == 1
    with figure(8, 5, title, subtitle(done[0], setup=one_setup), foot(done[0])) as drawing:
        axes = drawing.add_subplot()
        axes.set_ylim(0, 1.08 * top / unit)
        heads_axis(axes, sorted({r.n for r in records}))
        grid(axes, "y", f" {unit_name}")
        label_ends(axes, _lines(axes, records, unit, gpu))
        if any(line.get_label() == FORMULA_LABEL for line in axes.lines):
            axes.legend(loc="lower left" if gpu else "best", frameon=False, fontsize=8.5)
        rows = [[*(getattr(r, column) for column in COLUMNS), record_formula(r)] for r in records]
        return save(drawing, out, name, write_rows([*COLUMNS, "formula_over_baseline_bytes"], rows), png=png)


FORMULA_LABEL = "closed-form formula"


def _done(records: Sequence[Record]) -> list[Record]:
    return [r for r in records if r.status == "ok" and r.peak_over_baseline_bytes is not None]


def _height(record: Record, gpu: GPU | None) -> int:
    return (peak_bytes(record) if gpu else record.peak_over_baseline_bytes) or 0


def _lines(axes: Axes, records: Sequence[Record], unit: int, gpu: GPU | None) -> list[End]:
    """Draw each strategy's line and closed form, crosses where memory ran out, floor and capacity; returns the ends."""
    done = _done(records)
    low, top = axes.get_ylim()
    ends = []
    labelled = failed = 0
    for strategy, look in styles([r.strategy for r in records]).items():
        line = sorted((r for r in done if r.strategy == strategy), key=lambda r: r.n)
        ooms = sorted(r.n for r in records if r.strategy == strategy and r.status == "oom")
        if line:
            x, y = [r.n for r in line], [_height(r, gpu) / unit for r in line]
            draw_line(axes, x, y, look)
            labelled += _draw_formula(axes, line, unit, whole=gpu is not None, label=not labelled)
            if not ooms or ooms[-1] < x[-1]:
                ends.append(End(x[-1], y[-1], f"{strategy}  {format_bytes(_height(line[-1], gpu))}", look.colour))
        if ooms:
            at = top - failed * 0.055 * (top - low)
            axes.plot(ooms, [at] * len(ooms), "x", color=look.colour, markersize=9, mew=2.5, clip_on=False)
            ends.append(End(ooms[-1], at, f"{strategy}  out of memory", look.colour))
            failed += 1
    floors = {r.n: f for r in done if (f := _floor(r, gpu is not None)) is not None}
    if floors:
        ns = sorted(floors)
        axes.plot(ns, [floors[n] / unit for n in ns], color="#777777", linewidth=1.4, linestyle=(0, (1, 2.5)))
        ends.append(End(ns[-1], floors[ns[-1]] / unit, f"floor: no logits  {format_bytes(floors[ns[-1]])}", "#666666"))
    if gpu:
        axes.axhline(gpu.total_bytes / unit, color="#666666", linewidth=1.2)
        where = (min(r.n for r in records), gpu.total_bytes / unit)
        capacity = f"{gpu.name}: {format_bytes(gpu.total_bytes)}"
        axes.annotate(capacity, where, xytext=(0, 4), textcoords="offset points", size=9)
    return ends


def _draw_formula(axes: Axes, line: Sequence[Record], unit: int, *, whole: bool, label: bool) -> bool:
    """Draw the closed form of one strategy's line on top of it; returns whether there is one."""
    points = [(r.n, formula + (r.baseline_bytes or 0) * whole) for r in line if (formula := record_formula(r))]
    if points:
        name = FORMULA_LABEL if label else None
        axes.plot([n for n, _ in points], [y / unit for _, y in points], **FORMULA, label=name)
    return bool(points)


def _floor(record: Record, whole: bool) -> int | None:
    if whole:
        return record.floor_allocated_bytes
    if record.floor_requested_bytes is None or record.baseline_bytes is None:
        return None
    return record.floor_requested_bytes - record.baseline_bytes
