"""What the peak consists of: a stacked bar for each case, by category."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.patches import Patch

from mtp_mem._util import format_bytes
from mtp_mem.report.charts.style import COLOURS, figure, foot, grid, save, shortened, subtitle, unit_for, write_rows
from mtp_mem.runs.record import Record

MOST_BARS = 24
ROOM = 0.085  # share of the axis a segment needs to hold its bytes as text
DARK = ("parameters", "trunk activations", "logits", "workspace")  # their text is white


def composition(records: Sequence[Record], out: Path, *, png: bool = True) -> list[Path]:
    """Bytes live at the peak by category, a bar for each strategy at each n; above 24 bars only the largest n.

    Args:
        records: of one profile.
        out: folder for the files.
        png: whether to write the PNG.

    Returns:
        The files written under `out`: peak-composition.png, .svg and .csv. Empty where no record says what was live.
    """
    done = [r for r in records if r.status == "ok" and r.bytes_at_peak]
    if not done:
        return []
    last = max(r.n for r in done)
    shown = done if len(done) <= MOST_BARS else [r for r in done if r.n == last]
    shown = sorted(shown, key=lambda r: r.n)
    parts = [{**dict.fromkeys(COLOURS, 0), **_known(r.bytes_at_peak or {})} for r in shown]
    order = [c for c in COLOURS if any(p[c] for p in parts)]
    top = max(sum(p.values()) for p in parts)
    unit, unit_name = unit_for(top)
    places: list[float] = []
    for before, record in zip([shown[0], *shown], shown, strict=False):
        places.append((places[-1] + (1.6 if record.n != before.n else 1)) if places else 0)
    with figure(
        10, 1.9 + 0.27 * places[-1], "What is live at the peak", subtitle(done[0]), foot(done[0]), dpi=120
    ) as drawing:
        axes = drawing.add_subplot()
        left = [0.0] * len(shown)
        for category in order:
            colour, hatch = COLOURS[category]
            widths = [p[category] / unit for p in parts]
            axes.barh(places, widths, 0.8, left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.6)
            for y, width, start, part in zip(places, widths, left, parts, strict=True):
                if width > ROOM * top / unit:
                    axes.text(
                        start + width / 2, y, format_bytes(part[category]), ha="center", va="center_baseline", size=7.5,
                        color="white" if category in DARK else "black",
                        bbox={"fc": colour, "ec": "none", "pad": 0.8} if hatch else None,
                    )  # fmt: skip
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for y, total in zip(places, left, strict=True):
            axes.text(total + 0.006 * top / unit, y, format_bytes(round(total * unit)), va="center", size=8.5)
        axes.set_yticks(places, [shortened(f"{r.strategy}  n = {r.n}") for r in shown])
        axes.set_ylim(places[-1] + 0.6, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 1.1 * top / unit)
        grid(axes, "x", f" {unit_name}")
        handles = [Patch(fc=COLOURS[c][0], hatch=COLOURS[c][1], ec="white", label=c) for c in order]
        drawing.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8.5)
        rows = [[r.n, r.strategy, *(p[c] for c in order), sum(p.values())] for r, p in zip(shown, parts, strict=True)]
        return save(drawing, out, "peak-composition", write_rows(["n", "strategy", *order, "total"], rows), png=png)


def _known(by_category: dict[str, int]) -> dict[str, int]:
    """The bytes by category; a category that this version does not know counts as other."""
    merged: dict[str, int] = {}
    for category, nbytes in by_category.items():
        name = category if category in COLOURS else "other"
        merged[name] = merged.get(name, 0) + nbytes
    return merged
