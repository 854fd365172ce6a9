"""How often the ranks wait for each other: a step's collectives, by strategy."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.patches import Patch

from mtp_mem._util import format_bytes
from mtp_mem.report.charts.style import figure, foot, grid, save, shortened, subtitle, write_rows
from mtp_mem.runs.record import Record

KINDS = {
    "all-gather": ("#56B4E9", ""),
    "reduce-scatter": ("#F0E442", "//"),
    "all-reduce": ("#CC79A7", "\\\\"),
    "broadcast": ("#999999", "xx"),
}
"""Colour and hatch of each kind."""


def collectives(records: Sequence[Record], out: Path, *, png: bool = True) -> list[Path]:
    """A step's collectives of each strategy at the largest n, and the bytes that they move.

    Args:
        records: of one setting.
        out: folder for the files.
        png: whether to write the PNG.

    Returns:
        The files written under `out`: collectives.png, .svg and .csv. Empty where no record has any.
    """
    counted = [record for record in records if record.collectives]
    if not counted:
        return []
    shown = [record for record in counted if record.n == max(record.n for record in counted)]
    title = f"Collectives of a step, n = {shown[0].n}"
    order = [kind for kind in KINDS if any(kind in (record.collectives or {}) for record in shown)]
    longest = max(sum((record.collectives or {}).values()) for record in shown)
    with figure(10, 1.9 + 0.32 * len(shown), title, subtitle(shown[0]), foot(shown[0], "counted in a step")) as drawing:
        axes = drawing.add_subplot()
        for place, record in enumerate(shown):
            counts, left = record.collectives or {}, 0
            for kind in order:
                count, (colour, hatch) = counts.get(kind, 0), KINDS[kind]
                axes.barh(place, count, 0.8, left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.6)
                if count > 0.03 * longest:
                    box = {"fc": colour, "ec": "none", "pad": 0.8}
                    axes.text(left + count / 2, place, str(count), ha="center", va="center_baseline", size=8, bbox=box)
                left += count
            total = format_bytes(sum((record.collective_bytes or {}).values()))
            axes.text(left + 0.006 * longest, place, f"{left}, {total}", va="center", size=8.5)
        axes.set_yticks(range(len(shown)), [shortened(record.strategy) for record in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 1.15 * longest)
        grid(axes, "x", whole=True)
        handles = [Patch(fc=KINDS[kind][0], hatch=KINDS[kind][1], ec="white", label=kind) for kind in order]
        drawing.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8.5)
        rows = [
            [r.n, r.strategy, kind, count, (r.collective_bytes or {}).get(kind)]
            for r in counted
            for kind, count in (r.collectives or {}).items()
        ]
        return save(drawing, out, "collectives", write_rows(["n", "strategy", "kind", "count", "bytes"], rows), png=png)
