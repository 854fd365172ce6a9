"""A rank's peak against the number of GPUs that a model is sharded over."""

from collections.abc import Sequence
from pathlib import Path

from mtp_mem._util import format_bytes
from mtp_mem.report.charts.style import End, draw_line, figure, grid, label_ends, save, styles, unit_for, write_rows


def peak_of_a_rank(
    rows: Sequence[tuple[str, int, int]], total_bytes: int, out: Path, *, gpu: str, under: str = "", foot: str = ""
) -> list[Path]:
    """Allocated peak of a rank against the number of ranks, a line for each strategy.

    Args:
        rows: (strategy, ranks, bytes).
        total_bytes: bytes that the GPU holds.
        out: folder for the files.
        gpu: its name.
        under: the line below the title: the model, the step and the setup.
        foot: how the figures were obtained, and on what.

    Returns:
        The files written under `out`: peak-of-a-rank.png, .svg and .csv. Empty with fewer than two numbers of ranks.
    """
    worlds = sorted({world for _, world, _ in rows})
    if len(worlds) < 2:
        return []
    top = max(total_bytes, *(nbytes for _, _, nbytes in rows))
    unit, unit_name = unit_for(top)
    with figure(8, 5, "Predicted memory of a rank", under, foot) as drawing:
        axes = drawing.add_subplot()
        axes.set_xscale("log", base=2)
        axes.set_xticks(worlds, [str(world) for world in worlds])
        axes.minorticks_off()
        axes.set_xlim(worlds[0] / 1.15, worlds[-1])
        axes.set_xlabel("GPUs", loc="left")
        axes.set_ylim(0, 1.08 * top / unit)
        grid(axes, "y", f" {unit_name}")
        ends = []
        for strategy, look in styles([strategy for strategy, _, _ in rows]).items():
            line = sorted((world, nbytes) for name, world, nbytes in rows if name == strategy)
            x, y = [world for world, _ in line], [nbytes / unit for _, nbytes in line]
            draw_line(axes, x, y, look)
            ends.append(End(x[-1], y[-1], f"{strategy}  {format_bytes(line[-1][1])}", look.colour))
        axes.axhline(total_bytes / unit, color="#666666", linewidth=1.2)
        where = (worlds[0], total_bytes / unit)
        capacity = f"{gpu}: {format_bytes(total_bytes)}"
        axes.annotate(capacity, where, xytext=(0, 4), textcoords="offset points", size=9)
        label_ends(axes, ends)
        return save(drawing, out, "peak-of-a-rank", write_rows(["strategy", "ranks", "bytes"], sorted(rows)))
