"""Tokens per second against memory at one n: which strategies nothing beats in both."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from mtp_mem.errors import MtpMemError
from mtp_mem.report.charts.style import figure, foot, grid, save, shortened, styles, subtitle, unit_for, write_rows
from mtp_mem.runs.record import Record
from mtp_mem.strategy import BUILTIN, load_strategy

Point = tuple[float, float]

# Where a label may stand beside its point, the best place first: offset in points, horizontal and vertical alignment.
PLACES = (
    *((9, 0, "left", "center"), (-9, 0, "right", "center"), (0, 9, "center", "bottom"), (0, -9, "center", "top")),
    *((8, 8, "left", "bottom"), (8, -8, "left", "top"), (-8, 8, "right", "bottom"), (-8, -8, "right", "top")),
    *((9, 20, "left", "bottom"), (9, -20, "left", "top"), (-9, 20, "right", "bottom"), (-9, -20, "right", "top")),
    *((9, 34, "left", "bottom"), (9, -34, "left", "top"), (-9, 34, "right", "bottom"), (-9, -34, "right", "top")),
)


def pareto(points: Sequence[Point]) -> list[int]:
    """Indices of the points (memory, speed) to which no other is equal or better in both, by rising memory.

    Of equal points the first counts.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def throughput_vs_memory(records: Sequence[Record], out: Path, n: int | None = None, *, png: bool = True) -> list[Path]:
    """Tokens per second against peak bytes over the baseline, with the Pareto front; chunk sizes join into a path.

    Args:
        records: of one profile.
        out: folder for the files.
        n: the number of heads; default the largest that was timed.
        png: whether to write the PNG.

    Returns:
        The files written under `out`: throughput-vs-memory.png, .svg and .csv. Empty without two timed cases at n.
    """
    timed = [r for r in records if r.status == "ok" and r.tokens_per_s and r.peak_over_baseline_bytes is not None]
    n = n or max((r.n for r in timed), default=0)
    shown = [r for r in timed if r.n == n]
    if len(shown) < 2:
        return []
    unit, unit_name = unit_for(max(r.peak_over_baseline_bytes or 0 for r in shown))
    points = [((r.peak_over_baseline_bytes or 0) / unit, r.tokens_per_s or 0.0) for r in shown]
    front = pareto(points)
    title = f"Throughput against memory at n = {n}: up and to the left is better"
    with figure(8, 5, title, subtitle(shown[0]), foot(shown[0])) as drawing:
        axes = drawing.add_subplot()
        axes.set_xlim(0, 1.1 * max(x for x, _ in points))
        axes.set_ylim(0, 1.12 * max(y for _, y in points))
        axes.set_xlabel("peak on top of weights, optimizer and batch")
        axes.set_ylabel("tokens per second")
        grid(axes, "x", f" {unit_name}")
        grid(axes, "y")
        x, y = [points[i][0] for i in front], [points[i][1] for i in front]
        x, y = [*x, axes.get_xlim()[1]], [*y, y[-1]]
        axes.step(x, y, where="post", color="#999999", linewidth=1, zorder=1)
        corners = [(a, b) for i in range(len(y)) for a, b in ((x[i], y[max(0, i - 1)]), (x[i], y[i]))]
        lines = list(itertools.pairwise(corners))
        axes.annotate("Pareto front", (x[-1], y[-1]), xytext=(0, 3), textcoords="offset points", ha="right", size=8.5)
        families = [family(r.strategy) for r in shown]
        for name, (colour, marker, dash) in styles(families).items():
            own = [points[i] for i, f in enumerate(families) if f == name]
            axes.plot(*zip(*own, strict=True), color=colour, marker=marker, linestyle="", markersize=8, zorder=3)
            chunks = {c: points[i] for i, r in enumerate(shown) if families[i] == name and (c := chunk_of(r.strategy))}
            path = [chunks[c] for c in sorted(chunks)]
            if len(path) > 1:
                axes.plot(*zip(*path, strict=True), color=colour, linestyle=dash, linewidth=1.4, zorder=2)
                lines += itertools.pairwise(path)
        labels = [shortened(_label(r.strategy, families)) for r in shown]
        colours = [styles(families)[name][0] for name in families]
        _label_points(axes, points, labels, colours, lines)
        columns = ("n", "strategy", "peak_over_baseline_bytes", "tokens_per_s", "pareto")
        rows = [
            [r.n, r.strategy, r.peak_over_baseline_bytes, r.tokens_per_s, int(i in front)] for i, r in enumerate(shown)
        ]
        return save(drawing, out, "throughput-vs-memory", write_rows(columns, rows), png=png)


def family(spec: str) -> str:
    """The strategy of a spec without its options; `package.module:Class` stays whole."""
    name = spec.partition(":")[0]
    return name if name in BUILTIN else ":".join(part for part in spec.split(":") if "=" not in part)


def chunk_of(spec: str) -> int | None:
    """The chunk size of a built-in strategy's spec, its default included; None where there is none."""
    if spec.partition(":")[0] not in BUILTIN:  # a results file may come from anywhere: import nothing for it
        return None
    try:
        chunk = getattr(load_strategy(spec), "chunk", None)
    except MtpMemError:
        return None
    return chunk if isinstance(chunk, int) else None


def _label(spec: str, families: Sequence[str]) -> str:
    """The spec, or its options alone if it has any and its strategy is in `families` more than once."""
    name = family(spec)
    return spec if families.count(name) < 2 or spec == name else spec[len(name) + 1 :]


def _label_points(
    axes: Axes,
    points: Sequence[Point],
    labels: Sequence[str],
    colours: Sequence[str],
    lines: Sequence[tuple[Point, Point]],
) -> None:
    """Write each label at the first of PLACES where it touches nothing inside the axes, or where it overlaps least."""
    drawing = axes.figure
    drawing.draw_without_rendering()  # type: ignore[union-attr]
    drawing.set_layout_engine("none")  # type: ignore[union-attr]
    scale = drawing.dpi / 72
    at = [axes.transData.transform(point) for point in points]
    boxes = [(x - 6 * scale, y - 6 * scale, x + 6 * scale, y + 6 * scale) for x, y in at]
    boxes += [box for a, b in lines for box in _along(axes.transData.transform(a), axes.transData.transform(b))]
    taken = np.array(boxes)  # (boxes, 4): left, bottom, right, top
    frame, renderer = axes.get_window_extent(), FigureCanvasAgg(drawing).get_renderer()  # type: ignore[arg-type, no-untyped-call]
    for point, text, colour in zip(points, labels, colours, strict=True):
        tried: list[tuple[float, int, Annotation, Bbox]] = []
        for dx, dy, ha, va in PLACES:
            arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.6} if abs(dy) > 9 else None
            label = axes.annotate(
                text, point, xytext=(dx, dy), textcoords="offset points", ha=ha, va=va, color=colour, size=9.5,
                arrowprops=arrow,
            )  # fmt: skip
            box = label.get_window_extent(renderer)
            overlap = float(_common(box, taken).sum())
            outside = box.width * box.height - float(_common(box, np.array([frame.extents]))[0])
            tried.append((overlap + outside, len(tried), label, box))
            if tried[-1][0] == 0:
                break
        best = min(tried, key=lambda t: t[:2])
        for _, i, label, _ in tried:
            if i != best[1]:
                label.remove()
        taken = np.vstack([taken, best[3].extents])


def _along(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[float, float, float, float]]:
    """Boxes of four pixels along the line from a to b, in display coordinates."""
    steps = max(2, int(np.hypot(*(b - a)) / 6))
    for x, y in np.linspace(a, b, steps):
        yield x - 2, y - 2, x + 2, y + 2


def _common(box: Bbox, others: np.ndarray) -> np.ndarray:
    """The area that the box has in common with each of the others (boxes, 4)."""
    low, high = np.maximum(box.extents[:2], others[:, :2]), np.minimum(box.extents[2:], others[:, 2:])
    return np.clip(high - low, 0, None).prod(axis=1)  # type: ignore[no-any-return]
