"""Charts from records. Every chart is written as PNG and SVG together with the CSV it was drawn from."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mtp_mem.advice import peak_bytes
from mtp_mem.config import GPU
from mtp_mem.environment import footer
from mtp_mem.formulas import Shape, peak_over_baseline
from mtp_mem.memory.record import Record
from mtp_mem.strategy import BUILTIN
from mtp_mem.units import GiB, KiB, MiB, show_bytes

# Okabe and Ito's colours, dark enough for lines on white; marker and dash repeat the distinction without colour.
STYLES: tuple[tuple[str, str, Any], ...] = (
    ("#000000", "o", "-"),
    ("#0072B2", "s", (0, (5, 1.5))),
    ("#D55E00", "^", (0, (1.2, 1.2))),
    ("#009E73", "D", (0, (6, 1.5, 1.2, 1.5))),
    ("#CC79A7", "v", (0, (3, 1, 1, 1, 1, 1))),
    ("#8C6D00", "P", (0, (8, 2))),
)
FORMULA: Any = {"color": "#333333", "linewidth": 0.9, "linestyle": (0, (5, 4))}
RC: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "svg.hashsalt": "mtp_mem",
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def memory_vs_n(records: Sequence[Record], out: Path, gpu: GPU | None = None) -> list[Path]:
    """Peak bytes against the number of heads, a line for each strategy.

    Args:
        records: of one profile.
        out: folder for the files.
        gpu: draw the whole peak below the line of what this GPU holds, instead of the peak over the baseline.

    Returns:
        The files written under `out`: memory-vs-n.png, .svg and .csv. None without a finished case.
    """
    done = [r for r in records if r.status == "ok" and r.peak_over_baseline_bytes is not None]
    if not done:
        return []
    ns = sorted({r.n for r in records})
    height = {r.case: (peak_bytes(r) or 0) if gpu else (r.peak_over_baseline_bytes or 0) for r in done}
    top = max(*height.values(), gpu.total_bytes if gpu else 0)
    unit, unit_name = unit_for(top)
    with mpl.rc_context(RC):
        figure = Figure(figsize=(8, 5), dpi=150, layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        ends: list[tuple[float, float, str, str]] = []
        drawn = False
        for strategy, (colour, marker, dash) in styles([r.strategy for r in records]).items():
            line = sorted((r for r in done if r.strategy == strategy), key=lambda r: r.n)
            if line:
                x, y = [r.n for r in line], [height[r.case] / unit for r in line]
                axes.plot(x, y, color=colour, marker=marker, linestyle=dash, linewidth=2, markersize=6, clip_on=False)
                ends.append((x[-1], y[-1], f"{strategy}  {show_bytes(height[line[-1].case])}", colour))
                drawn |= _draw_formula(axes, line, unit, whole=gpu is not None)
            for oom in (r for r in records if r.strategy == strategy and r.status == "oom"):
                axes.plot(oom.n, 1.0, "x", color=colour, markersize=10, mew=3, transform=axes.get_xaxis_transform())
                axes.annotate("out of memory", (oom.n, 1.0), xycoords=("data", "axes fraction"), ha="right")
        floor = _draw_floor(axes, done, unit, whole=gpu is not None)
        if floor:
            ends.append(floor)
        if drawn:
            axes.plot([], [], **FORMULA, label="closed-form formula")
            axes.legend(loc="lower left" if gpu else "upper left", frameon=False, fontsize=8.5)
        axes.set_ylim(0, 1.08 * top / unit)
        if gpu:
            axes.axhline(gpu.total_bytes / unit, color="#666666", linewidth=1.2)
            capacity = f"{gpu.name}: {show_bytes(gpu.total_bytes)}"
            axes.annotate(
                capacity, (min(ns), gpu.total_bytes / unit), xytext=(0, 4), textcoords="offset points", size=9
            )
        axes.set_xlim(min(ns) - 0.03 * (max(ns) - min(ns) + 1), max(ns))
        axes.set_xticks(ns)
        axes.set_xlabel("n, number of heads (future tokens predicted)")
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} {unit_name}"))
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        _label_ends(axes, ends)
        what = "all of it" if gpu else "on top of weights, optimizer and batch"
        title = f"{'Predicted memory' if gpu else 'Memory'} of a training step, {what}"
        figure.suptitle(title, x=0.02, ha="left", size=13)
        axes.set_title(_subtitle(done[0]), loc="left", size=9, color="#444444")
        how = {"measured": "measured", "tracked": "live tensor bytes, tracked", "predicted": "predicted, not measured"}
        exactness = how[done[0].exactness]
        figure.supxlabel(f"{exactness} · {footer(done[0].environment)}", x=0.02, ha="left", size=7.5, color="#666666")
        return save(figure, out, "memory-vs-n", lambda path: _write_csv(path, records))


def _draw_formula(axes: Any, line: Sequence[Record], unit: int, *, whole: bool) -> bool:
    """The closed form of one strategy's line, on top of it; whether there is one."""
    points = [(r.n, formula + (r.baseline_bytes or 0) * whole) for r in line if (formula := formula_bytes(r))]
    if points:
        axes.plot([n for n, _ in points], [y / unit for _, y in points], **FORMULA)
    return bool(points)


def _draw_floor(
    axes: Any, records: Sequence[Record], unit: int, *, whole: bool
) -> tuple[float, float, str, str] | None:
    """The step without logits, and the label of its end."""
    floors = {r.n: f for r in records if (f := _floor(r, whole)) is not None}
    if not floors:
        return None
    ns = sorted(floors)
    axes.plot(ns, [floors[n] / unit for n in ns], color="#777777", linewidth=1.4, linestyle=(0, (1, 2.5)))
    return ns[-1], floors[ns[-1]] / unit, f"floor: no logits  {show_bytes(floors[ns[-1]])}", "#666666"


def _floor(record: Record, whole: bool) -> int | None:
    if whole:
        return record.floor_allocated_bytes
    if record.floor_requested_bytes is None or record.baseline_bytes is None:
        return None
    return record.floor_requested_bytes - record.baseline_bytes


def formula_bytes(record: Record) -> int | None:
    """What the record's strategy should need above the baseline, in closed form."""
    shape = Shape.of(record.model, record.workload, cuda=record.backend != "cpu")
    return peak_over_baseline(record.strategy, shape) if shape else None


def styles(strategies: Sequence[str]) -> dict[str, tuple[str, str, Any]]:
    """Colour, marker and dash of each strategy: the built-in ones keep theirs whatever else is drawn."""
    order = [s for s in BUILTIN if s in strategies] + [s for s in dict.fromkeys(strategies) if s not in BUILTIN]
    fixed = list(BUILTIN)
    taken = len(fixed)
    found = {}
    for strategy in order:
        if strategy in BUILTIN:
            found[strategy] = STYLES[fixed.index(strategy) % len(STYLES)]
        else:
            found[strategy] = STYLES[taken % len(STYLES)]
            taken += 1
    return found


def unit_for(nbytes: int) -> tuple[int, str]:
    """The unit in which an axis up to `nbytes` reads best, in bytes and by name."""
    return next(((u, name) for u, name in ((GiB, "GiB"), (MiB, "MiB")) if nbytes >= 2 * u), (KiB, "KiB"))


def _subtitle(record: Record) -> str:
    model, workload = record.model, record.workload
    layers = (
        f"{model['n_layers']} layers (trunk + heads)"
        if model["match_layers"]
        else f"{model['n_layers']} layers + heads"
    )
    return (
        f"V = {model['vocab_size']:,}, D = {model['dim']:,}, {layers}, batch {workload['batch']} x"
        f" {workload['sequence']:,} tokens, {workload['dtype']}, {workload['source']}"
    )


def _label_ends(axes: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Name each line at its right end, moved apart where two lines end close together."""
    gap = axes.get_ylim()[1] * 0.052
    placed: list[float] = []
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        at = max(y, placed[-1] + gap) if placed else max(y, gap / 2)
        placed.append(at)
        axes.annotate(
            text,
            (x, y),
            xytext=(1.02, at),
            textcoords=("axes fraction", "data"),
            color=colour,
            va="center",
            size=9.5,
            annotation_clip=False,
        )


def save(figure: Figure, out: Path, name: str, write_csv: Callable[[Path], object]) -> list[Path]:
    """Write NAME.png, .svg and .csv; each is complete or absent, because it is written under another name first."""
    written = []
    for suffix in ("png", "svg", "csv"):
        path = out / f"{name}.{suffix}"
        partial = path.with_name(f".{path.name}.tmp")
        if suffix == "csv":
            write_csv(partial)
        else:
            metadata = {"Date": None} if suffix == "svg" else {"Software": None}
            figure.savefig(partial, format=suffix, metadata=metadata)
        partial.replace(path)
        written.append(path)
    return written


def _write_csv(path: Path, records: Sequence[Record]) -> None:
    columns = (
        *("n", "strategy", "status", "baseline_bytes", "peak_requested_bytes", "peak_over_baseline_bytes"),
        *("peak_allocated_bytes", "peak_reserved_bytes", "floor_requested_bytes", "floor_allocated_bytes"),
        *("peak_phase", "step_ms", "tokens_per_s", "gradient"),
    )
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow([*columns, "formula_over_baseline_bytes"])
        rows.writerows([*(getattr(r, column) for column in columns), formula_bytes(r)] for r in records)
