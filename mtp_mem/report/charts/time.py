"""Time per step against the number of heads, relative to naive at the same n and to naive at the smallest n.

The second panel also has the FLOPs of naive's step, relative to the smallest n: its time should grow like them where
matrix products decide it.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from mtp_mem.model.shape import Shape
from mtp_mem.prediction.formulas import step_flops
from mtp_mem.report.charts.style import (
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
    write_rows,
)
from mtp_mem.runs.record import Record

PAPER = {  # (V, D, layers) -> {n: step time relative to n = 1}
    (32000, 1024, 18): {2: 1.07, 4: 1.22},
    (32000, 1280, 27): {2: 1.05, 4: 1.13},
    (32000, 2048, 24): {2: 1.04, 4: 1.12},
    (32000, 2560, 36): {2: 1.02, 4: 1.07},
    (32000, 4096, 32): {2: 1.02, 4: 1.07},
    (32000, 5120, 40): {2: 1.04, 4: 1.09},
}
"""Gloeckle et al. 2024 (arXiv 2404.19737), table S5, for the shapes of table S14: sequential heads under FSDP."""


def paper_times(record: Record) -> dict[int, float]:
    """The paper's step times relative to n = 1 for the record's shape, n = 1 included; empty for another shape."""
    model = record.model
    if model.get("head") != "parallel" or model.get("unembedding") != "shared" or not model.get("match_layers"):
        return {}
    times = PAPER.get((model["vocab_size"], model["dim"], model["n_layers"]), {})
    return {1: 1.0, **times} if times else {}


def flops_over_first(records: Sequence[Record]) -> dict[int, float]:
    """FLOPs of naive's step relative to its smallest n, by n; empty where there is no closed form."""
    flops_by_n = {}
    for r in sorted((r for r in records if r.strategy == "naive"), key=lambda r: r.n):
        shape = Shape.of(r.model, r.workload)
        if shape is None:
            return {}
        flops_by_n[r.n] = step_flops(r.strategy, shape)
    return {n: flops / flops_by_n[min(flops_by_n)] for n, flops in flops_by_n.items()}


def time_vs_n(records: Sequence[Record], out: Path, *, png: bool = True) -> list[Path]:
    """Median step time of each strategy over naive's at the same n (left) and at the smallest n (right).

    The band of each line is the middle 60 % of its own steps over the same median of naive's.

    Args:
        records: of one profile.
        out: folder for the files.
        png: whether to write the PNG.

    Returns:
        The files written under `out`: time-vs-n.png, .svg and .csv. Empty where naive was not timed.
    """
    timed = [r for r in records if r.status == "ok" and r.step_ms]
    naive = {r.n: r.step_ms for r in timed if r.strategy == "naive" and r.step_ms}
    if not naive:
        return []
    first = min(naive)
    one = dict.fromkeys(sorted({r.n for r in timed}), naive[first])
    how = foot(timed[0], "median; the band holds the middle 60 % of the steps")
    with figure(10, 4.4, "Time of a training step", subtitle(timed[0]), how, dpi=120) as drawing:
        left, right = drawing.subplots(1, 2)
        _panel(left, timed, naive, "relative to naive at the same n")
        paper = paper_times(timed[0]) if first == 1 else {}
        flops = flops_over_first(timed)
        _panel(right, timed, one, f"relative to naive at n = {first}", paper, flops)
        columns = ("n", "strategy", "step_ms", "step_ms_p20", "step_ms_p80", "over_naive", "over_naive_at_first_n")
        rows = [
            [
                *(r.n, r.strategy, r.step_ms, r.step_ms_p20, r.step_ms_p80, _over(r, naive), _over(r, one)),
                *(round(flops[r.n], 4) if r.n in flops else None, paper.get(r.n)),
            ]
            for r in timed
        ]
        return save(
            drawing, out, "time-vs-n", write_rows([*columns, "flops_over_first_n", "paper_table_s5"], rows), png=png
        )


def _over(record: Record, reference: dict[int, float]) -> float | None:
    base = reference.get(record.n)
    return round(record.step_ms / base, 4) if base and record.step_ms else None


def _panel(
    axes: Axes,
    timed: Sequence[Record],
    reference: dict[int, float],
    title: str,
    paper: dict[int, float] | None = None,
    flops: dict[int, float] | None = None,
) -> None:
    """Draw step times over `reference` (n -> milliseconds) with their bands, the paper's as hollow diamonds, FLOPs."""
    ends, top = [], max([1.0, *(flops or {}).values()])
    if flops and len(flops) > 1:
        axes.plot(list(flops), list(flops.values()), color="#333333", linewidth=0.9, linestyle=(0, (5, 4)), zorder=4)
        ends.append(End(max(flops), flops[max(flops)], f"naive's FLOPs  {flops[max(flops)]:.2f}x", "#333333"))
    for strategy, look in styles([r.strategy for r in timed]).items():
        line = sorted((r for r in timed if r.strategy == strategy and r.n in reference), key=lambda r: r.n)
        if not line:
            continue
        x, y = [r.n for r in line], [(r.step_ms or 0) / reference[r.n] for r in line]
        low = [(r.step_ms_p20 or r.step_ms or 0) / reference[r.n] for r in line]
        high = [(r.step_ms_p80 or r.step_ms or 0) / reference[r.n] for r in line]
        axes.fill_between(x, low, high, color=look.colour, alpha=0.12, linewidth=0)
        draw_line(axes, x, y, look)
        ends.append(End(x[-1], y[-1], f"{strategy}  {y[-1]:.2f}x", look.colour))
        top = max(top, *high)
    if paper:
        last = max(paper)
        axes.plot(list(paper), list(paper.values()), "d--", color="#666666", mfc="white", markersize=7, clip_on=False)
        words = f"paper, table S5  {paper[last]:.2f}x"
        axes.annotate(words, (last, paper[last]), xytext=(0, -16), textcoords="offset points", ha="center", size=8.5)
    axes.axhline(1, color="#888888", linewidth=0.9, zorder=1)
    axes.set_ylim(0, 1.08 * top)
    heads_axis(axes, sorted({r.n for r in timed} | set(paper or {})))
    grid(axes, "y", "x")
    axes.set_title(title, loc="left", size=9, color="#444444")
    label_ends(axes, ends)
