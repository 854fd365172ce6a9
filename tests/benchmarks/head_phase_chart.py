"""The head phase of each strategy beside its floors: time over the bare products', bytes over the lower bound.

pytest tests/benchmarks/test_head_phase.py -k small --benchmark-json head-phase.json
python tests/benchmarks/head_phase_chart.py head-phase.json charts/
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from mtp_mem._util import format_bytes
from mtp_mem.report.charts.style import figure, save, styles, unit_for, write_rows

COLUMNS = ("strategy", "n", "times_floor", "times_floor_p20", "times_floor_p80", "peak_over_inputs_bytes")


def head_phase(rows: Sequence[Mapping[str, Any]], out: Path, *, title: str, foot: str, name: str) -> list[Path]:
    """Bars of time and of bytes, a row for each strategy, the fastest on top.

    Args:
        rows: `extra_info` of the benchmarks of one shape, see tests/benchmarks/test_head_phase.py.
        out: folder for the files.
        title: the shape.
        foot: the machine.
        name: of the files.

    Returns:
        The files written under `out`: NAME.png, .svg and .csv.
    """
    ranked = sorted(rows, key=lambda row: -row["times_floor"])
    names = [str(row["strategy"]) for row in ranked]
    looks = styles(names)
    bound = int(ranked[0]["lower_bound_bytes"])
    unit, unit_name = unit_for(max(int(row["peak_over_inputs_bytes"]) for row in ranked))
    with figure(9, 1.6 + 0.42 * len(ranked), "Head phase: time and memory of each strategy", title, foot) as drawing:
        left, right = drawing.subplots(1, 2, sharey=True)
        for y, row in enumerate(ranked):
            colour = looks[names[y]][0]
            times, nbytes = row["times_floor"], int(row["peak_over_inputs_bytes"])
            band = [[times - row["times_floor_p20"]], [row["times_floor_p80"] - times]]
            left.barh(y, times, color=colour, height=0.62, xerr=band, ecolor="#555555", capsize=2)
            right.barh(y, nbytes / unit, color=colour, height=0.62)
            _label(left, max(times, row["times_floor_p80"]), y, f"{times:.2f}x")
            _label(right, nbytes / unit, y, format_bytes(nbytes))
        _floor(left, 1.0, "time, times the bare matrix products (line)")
        _floor(right, bound / unit, f"bytes above the inputs, {unit_name}; line: lower bound {format_bytes(bound)}")
        left.set_yticks(range(len(names)), names)
        return save(drawing, out, name, write_rows(COLUMNS, [[row[column] for column in COLUMNS] for row in ranked]))


def _label(axes: Axes, x: float, y: int, text: str) -> None:
    axes.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", size=9)


def _floor(axes: Axes, at: float, label: str) -> None:
    axes.axvline(at, color="#000000", linewidth=1.2, linestyle=(0, (4, 2)))
    axes.set_xlim(0, 1.25 * axes.get_xlim()[1])
    axes.set_xlabel(label, size=9)


def draw(path: Path, out: Path) -> list[Path]:
    """A chart for each shape in the JSON of pytest-benchmark; returns the files."""
    document = json.loads(path.read_text(encoding="utf-8"))
    shapes: dict[str, list[dict[str, Any]]] = {}
    for bench in document["benchmarks"]:
        if "times_floor" in bench["extra_info"]:
            shapes.setdefault(str(bench["group"]), []).append(bench["extra_info"])
    machine = document["machine_info"]["mtp_mem"]
    foot = f"{machine['cpu'] if machine['device'] == 'cpu' else machine['device']} · torch {machine['torch']}"
    out.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for group, rows in shapes.items():
        name = re.sub(r"[^A-Za-z0-9]+", "-", group).strip("-").lower()
        files += head_phase(rows, out, title=group.partition(", ")[2], foot=f"{foot} · {path.name}", name=name)
    return files


if __name__ == "__main__":
    print(*draw(Path(sys.argv[1]), Path(sys.argv[2])), sep="\n")
