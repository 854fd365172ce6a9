"""The largest batch that fits against the number of heads."""

from collections.abc import Sequence
from pathlib import Path

from mtp_mem.report.charts.style import End, draw_line, figure, grid, heads_axis, label_ends, save, styles, write_rows


def largest_batch(rows: Sequence[tuple[str, int, int]], out: Path, *, under: str = "", foot: str = "") -> list[Path]:
    """The largest batch that fits against the number of heads, a line for each strategy.

    Args:
        rows: (strategy, n, sequences in the batch), 0 where not even one fits; as `mtp-mem plan` finds them.
        out: folder for the files.
        under: the line below the title: the model and the GPU.
        foot: how the figures were obtained, and on what.

    Returns:
        The files written under `out`: largest-batch.png, .svg and .csv. Empty without a row.
    """
    if not rows:
        return []
    with figure(8, 5, "Largest batch that fits", under, foot) as drawing:
        axes = drawing.add_subplot()
        axes.set_ylim(0, max(1, 1.08 * max(batch for _, _, batch in rows)))
        heads_axis(axes, sorted({n for _, n, _ in rows}))
        grid(axes, "y", whole=True)
        axes.set_ylabel("sequences")
        ends = []
        for strategy, look in styles([strategy for strategy, _, _ in rows]).items():
            line = sorted((n, batch) for name, n, batch in rows if name == strategy)
            x, y = [n for n, _ in line], [batch for _, batch in line]
            draw_line(axes, x, y, look)
            none = [n for n, batch in line if not batch]
            if none:
                axes.plot(
                    none, [0] * len(none), "x", color=look.colour, markersize=11, mew=2.5, clip_on=False, zorder=4
                )
            ends.append(End(x[-1], y[-1], f"{strategy}  {y[-1] or 'does not fit'}", look.colour))
        label_ends(axes, ends)
        return save(drawing, out, "largest-batch", write_rows(["strategy", "n", "batch"], sorted(rows)))
