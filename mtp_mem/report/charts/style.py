"""What all charts share: colours, markers and dashes, axes in bytes, labels that keep apart, whole files."""

import csv
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mtp_mem._util import GiB, KiB, MiB, atomic_write
from mtp_mem.environment import footer
from mtp_mem.memory.trace import Category
from mtp_mem.runs.identity import training_words
from mtp_mem.runs.record import Record
from mtp_mem.strategy import BUILTIN

# Okabe and Ito's colours, dark enough for lines on white; marker and dash repeat the distinction without colour.
STYLES: tuple[tuple[str, str, Any], ...] = (
    ("#000000", "o", "-"),
    ("#0072B2", "s", (0, (5, 1.5))),
    ("#D55E00", "^", (0, (1.2, 1.2))),
    ("#009E73", "D", (0, (6, 1.5, 1.2, 1.5))),
    ("#CC79A7", "v", (0, (3, 1, 1, 1, 1, 1))),
    ("#8C6D00", "P", (0, (8, 2))),
)
MORE_MARKERS = (("X", "<", ">", "p", "h", "*"), ("d", "8", "1", "2", "3", "4"))
"""Markers of strategies that have to share a colour with an earlier one; their dash is the next colour's."""
MOST_MARKERS = 24  # to twice as many on one line

# Light to dark and hatched in turn, so that neighbouring bands differ without colour too.
COLOURS: dict[Category, tuple[str, str]] = {
    "parameters": ("#444444", ""),
    "live before the history": ("#444444", ""),
    "optimizer": ("#999999", ""),
    "other": ("#cccccc", ""),
    "gradients": ("#CC79A7", "//"),
    "trunk activations": ("#0072B2", ""),
    "head activations": ("#56B4E9", "\\\\"),
    "hidden-state gradients": ("#F0E442", ""),
    "logits": ("#D55E00", ""),
    "gathered parameters": ("#8C6D00", "\\\\"),
    "communication buffers": ("#E69F00", "//"),
    "workspace": ("#009E73", "xx"),
}
RC: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "svg.hashsalt": "mtp_mem",
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}
HOW = {"measured": "measured", "tracked": "live tensor bytes, tracked", "predicted": "predicted, not measured"}


@dataclass(frozen=True)
class End:
    """A line's right end in data coordinates, and the words beside it."""

    x: float
    y: float
    text: str
    colour: str


class Look(NamedTuple):
    """How a strategy is told from the others."""

    colour: str
    marker: str
    dash: Any


def styles(strategies: Sequence[str]) -> dict[str, Look]:
    """The look of each strategy: the built-in ones keep theirs whatever else is drawn."""
    order = [s for s in BUILTIN if s in strategies] + [s for s in dict.fromkeys(strategies) if s not in BUILTIN]
    fixed = list(BUILTIN)
    taken = len(fixed)
    looks = {}
    for strategy in order:
        if strategy in BUILTIN:
            looks[strategy] = _style(fixed.index(strategy))
        else:
            looks[strategy] = _style(taken)
            taken += 1
    return looks


def _style(place: int) -> Look:
    rounds, i = divmod(place, len(STYLES))
    colour, marker, _ = STYLES[i]
    return Look(colour, MORE_MARKERS[(rounds - 1) % 2][i] if rounds else marker, STYLES[(i + rounds) % len(STYLES)][2])


@contextmanager
def settings() -> Iterator[None]:
    """A block with matplotlib's settings for our charts, and without its warnings of glyphs that the font lacks."""
    with mpl.rc_context(RC), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@contextmanager
def figure(width: float, height: float, title: str, under: str, foot: str, dpi: int = 150) -> Iterator[Figure]:
    """A white figure of `width` x `height` inches: the title, a line `under` it, and `foot` at the bottom."""
    with settings():
        drawing = Figure(figsize=(width, height), dpi=dpi, layout="constrained", facecolor="white")
        drawing.suptitle(f"{title}\n", x=0.02, ha="left", size=13)  # the empty second line keeps room for `under`
        drawing.text(0.02, 0.98 - 18 / (72 * height), under, va="top", size=9, color="#444444")
        drawing.supxlabel(foot, x=0.02, ha="left", size=7.5, color="#666666")
        yield drawing


def foot(record: Record, how: str = "") -> str:
    """How the figures were obtained (by default, how the record's bytes were), and on what."""
    return f"{how or HOW[record.exactness]} · {footer(record.environment)}"


def subtitle(record: Record, *, setup: bool = True) -> str:
    """The model and the batch in a line, and how it is trained."""
    model, workload = record.model, record.workload
    layers = (
        f"{model['n_layers']} layers (trunk + heads)"
        if model["match_layers"]
        else f"{model['n_layers']} layers + heads"
    )
    how = training_words(record) if setup else workload["dtype"]
    return (
        f"V = {model['vocab_size']:,}, D = {model['dim']:,}, {layers}, batch {workload['batch']} x"
        f" {workload['sequence']:,} tokens, {how}, {workload['source']}"
    )


def unit_for(nbytes: int) -> tuple[int, str]:
    """The unit in which an axis up to `nbytes` reads best, in bytes and by name."""
    return next(((u, name) for u, name in ((GiB, "GiB"), (MiB, "MiB")) if nbytes >= 2 * u), (KiB, "KiB"))


def heads_axis(axes: Axes, ns: Sequence[int]) -> None:
    """The number of heads along x, ticks only at n there are and far enough apart, y from 0 with light lines."""
    axes.set_xlim(min(ns) - 0.03 * (max(ns) - min(ns) + 1), max(ns))
    axes.set_xticks(_apart(ns))
    axes.set_xlabel("n, number of heads (future tokens predicted)")
    axes.set_ylim(bottom=0)
    grid(axes, "y")


def _apart(ns: Sequence[int]) -> list[int]:
    """Of these n the largest, and downwards each that has room for its label: a 36th of the axis for each digit."""
    ticks: list[int] = []
    room = (max(ns) - min(ns)) * len(str(max(ns))) / 36
    for n in sorted(ns, reverse=True):
        if not ticks or ticks[-1] - n >= room:
            ticks.append(n)
    return ticks[::-1]


def draw_line(axes: Axes, x: Sequence[float], y: Sequence[float], look: Look) -> None:
    """A strategy's line; of many points as many get a marker as stand apart."""
    every = max(1, len(x) // MOST_MARKERS)
    how = {"color": look.colour, "marker": look.marker, "linestyle": look.dash, "markevery": every}
    axes.plot(x, y, **how, linewidth=2, markersize=6, clip_on=False)


def grid(axes: Axes, which: Literal["x", "y"], unit: str = "", *, whole: bool = False) -> None:
    """Light lines behind the data at no more than seven ticks, `unit` after each number, only `whole` ones if asked."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_locator(MaxNLocator(6, integer=whole))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}{unit}"))
    axes.grid(axis=which, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def shortened(text: str, most: int = 56) -> str:
    """A label of at most so many characters, which leaves room for the chart: of a longer one the middle is cut out."""
    return text if len(text) <= most else f"{text[: most - 20]} … {text[-17:]}"


def label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Name each line at its right end; names that would touch are moved apart, within the axes' height."""
    height = axes.get_position().height * axes.figure.get_figheight() * 72  # type: ignore[union-attr]
    low, top = axes.get_ylim()
    gap = (top - low) * 13.5 / height
    placed: list[float] = []
    order = sorted(ends, key=lambda end: end.y)
    for end in order:
        placed.append(max(end.y, placed[-1] + gap) if placed else max(end.y, low + gap / 2))
    ceiling = top
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    for end, at in zip(order, placed, strict=True):
        axes.annotate(
            shortened(end.text),
            (1, at),
            xycoords=axes.get_yaxis_transform(),
            xytext=(9, 0),
            textcoords="offset points",
            color=end.colour,
            va="center",
            size=9.5,
            annotation_clip=False,
        )
        if end.x < axes.get_xlim()[1]:  # the line ends before the others: lead the eye to its name
            x, y = [end.x, axes.get_xlim()[1]], [end.y, at]
            axes.plot(x, y, color=end.colour, linewidth=0.7, alpha=0.6, clip_on=False)


def save(figure: Figure, out: Path, name: str, write_csv: Callable[[Path], object], *, png: bool = True) -> list[Path]:
    """Write NAME.svg and .csv, and .png unless it would be thrown away; each is complete or absent.

    For that it is written under another name first.
    """
    written = []
    for suffix in (*["png"] * png, "svg", "csv"):
        path = out / f"{name}.{suffix}"
        with atomic_write(path) as partial:
            if suffix == "csv":
                write_csv(partial)
            else:
                metadata = {"Date": None} if suffix == "svg" else {"Software": None}
                figure.savefig(partial, format=suffix, metadata=metadata)
        written.append(path)
    return written


def write_rows(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Callable[[Path], None]:
    """The function for `save` that writes these rows as CSV; None becomes an empty field."""

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(columns)
            table.writerows([[cell(value) for value in row] for row in rows])

    return write


def cell(value: Any) -> Any:
    """The value for a CSV; a text that a spreadsheet would take for a formula gets a quote in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value
