"""From results files to a report: read, group, draw, write."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_mem._util import atomic_write, format_bytes, scratch_folder, without_collections, writable
from mtp_mem.errors import BadInput, printable
from mtp_mem.report import charts
from mtp_mem.report.content import gpu_of, section
from mtp_mem.report.page import Chart, Group, to_html
from mtp_mem.report.recommend import peak_bytes
from mtp_mem.report.timeline_page import drawing, read_timeline
from mtp_mem.runs.identity import CONDITIONS, machine, setting, training_words
from mtp_mem.runs.read_results import Located, files_of, groups, read
from mtp_mem.runs.record import Record


@dataclass(frozen=True)
class Report:
    """What was written, and what could not be used."""

    files: tuple[Path, ...]
    groups: tuple[Group, ...]
    notes: tuple[str, ...]


def build(
    results: Sequence[Path],
    out: Path,
    timelines: Sequence[Path] = (),
    charts_folder: Path | None = None,
) -> Report:
    """Write the report `out`, and its charts as PNG, SVG and CSV under `charts_folder`.

    Args:
        results: results files, or folders that hold some.
        out: the page; replaced if it is there, whole or not at all.
        timelines: timeline.json files besides those that lie in the folders of the results.
        charts_folder: where the charts stay; without it they are in the page only.

    Raises:
        BadInput: a path cannot be read or written, no usable record, `out` is one of the results.
    """
    notes: list[str] = []
    with without_collections():  # records hold no cycles, and there may be many
        located = read(results, notes)
        apart = groups(located, notes)
    if os.path.isdir(out):
        raise BadInput(f"{out}: is a folder")
    if os.path.realpath(out) in {os.path.realpath(path) for path in (*files_of(results), *timelines)}:
        raise BadInput(f"{out}: is one of the files to read")
    pictures = []
    for path in _timelines(results, located, timelines):
        try:
            pictures.append({"path": printable(str(path)), **drawing(read_timeline(path))})
        except BadInput as e:
            if path in timelines:
                raise
            notes.append(f"skipped: {e}")
    for group in apart:
        if (count := len({r.strategy for r in group})) > MOST_STRATEGIES:
            notes.append(
                f"charts show {MOST_STRATEGIES} of {count} strategies, naive and those that need least; tables show all"
            )
    writable(out.parent)
    png = charts_folder is not None  # the page itself holds the SVG
    with scratch_folder() if charts_folder is None else nullcontext(writable(charts_folder)) as folder:
        folders = [folder / f"group-{i}" for i in range(1, len(apart) + 1)] if len(apart) > 1 else [folder]
        sections = tuple(Group(section(g), _draw(g, writable(at), png)) for g, at in zip(apart, folders, strict=True))
        panels = _panels(apart, folder, png)
        text = to_html(sections, panels, pictures, [printable(line) for line in notes])
        drawn = [chart for group in sections for chart in group.charts] + ([panels] if panels else [])
        kept = (
            [c.svg.with_suffix(suffix) for c in drawn for suffix in (".png", ".svg", ".csv")] if charts_folder else []
        )
    with atomic_write(out) as partial:
        partial.write_text(text, encoding="utf-8")
    return Report((out, *(kept if charts_folder else ())), sections, tuple(notes))


def _timelines(results: Sequence[Path], located: Sequence[Located], given: Sequence[Path]) -> list[Path]:
    """The timelines given, those beside a results file that is used, and those anywhere in the given folders."""
    used = dict.fromkeys(one.path for one in located)
    beside = [path for one in used if (path := one.with_name("timeline.json")).is_file()]
    below = [path for folder in results if os.path.isdir(folder) for path in sorted(folder.rglob("timeline.json"))]
    return list(dict.fromkeys([*given, *beside, *below]))


MOST_STRATEGIES = 24
"""The most strategies in one chart: no more can be told apart, or named beside their lines."""


def telling(records: Sequence[Record]) -> list[Record]:
    """The records that charts show: of more than 24 strategies naive and those that need least at their largest n."""
    last = {r.strategy: r for r in sorted(records, key=lambda r: r.n)}
    order = sorted(last.values(), key=lambda r: (r.strategy != "naive", r.status != "ok", peak_bytes(r) or 0))
    shown = {r.strategy for r in order[:MOST_STRATEGIES]}
    return [r for r in records if r.strategy in shown]


def _draw(every: Sequence[Record], out: Path, png: bool) -> tuple[Chart, ...]:
    """The charts of one group that its records allow, in the folder `out`."""
    records = telling(every)
    gpu = gpu_of(records[0]) if records[0].exactness == "predicted" else None
    drawn = (
        (
            charts.memory_vs_n(records, out, gpu, png=png),
            f"Peak memory against the number of heads. {_ends(records, whole=gpu is not None)}",
        ),
        (charts.composition(records, out, png=png), "What the peak of each case consists of, by category."),
        (
            charts.throughput_vs_memory(records, out, png=png),
            "Tokens per second against memory, with the Pareto front.",
        ),
        (
            charts.time_vs_n(records, out, png=png),
            "Time of a step relative to naive, at the same n and at the smallest n.",
        ),
        (
            charts.collectives(records, out, png=png),
            "How often the ranks wait for each other in a step, and the bytes moved.",
        ),
    )
    return tuple(Chart(svg=files[-2], alt=alt) for files, alt in drawn if files)


def draw_group(records: Sequence[Record], out: Path) -> list[Path]:
    """The SVGs of one group's charts; PNG and CSV lie beside them."""
    return [chart.svg for chart in _draw(records, out, True)]


def _ends(records: Sequence[Record], *, whole: bool) -> str:
    """The chart's values at the largest n as text for screen readers: `whole` peaks, or peaks over the baseline."""
    n = max(r.n for r in records)
    last = [r for r in records if r.n == n and r.status == "ok"]
    peaks = [(r.strategy, peak_bytes(r) if whole else r.peak_over_baseline_bytes) for r in last]
    words = ", ".join(f"{strategy} {format_bytes(nbytes)}" for strategy, nbytes in peaks if nbytes is not None)
    return f"{'In all' if whole else 'Over the baseline'} at n = {n}: {words}." if words else ""


def _panels(apart: Sequence[Sequence[Record]], folder: Path, png: bool) -> Chart | None:
    """All groups side by side, each panel titled by the facts in which the groups differ."""
    facts = [_facts(group[0]) for group in apart]
    names = dict.fromkeys(name for fact in facts for name in fact)
    differing = [name for name in names if len({fact.get(name) for fact in facts}) > 1]
    titles = [", ".join(fact[name] for name in differing if name in fact) for fact in facts]
    named = {
        title or f"group {i}": telling(group) for i, (title, group) in enumerate(zip(titles, apart, strict=True), 1)
    }
    files = charts.memory_small_multiples(named, folder, png=png)
    alt = "Memory over the baseline against the number of heads, a panel for each group."
    return Chart(svg=files[-2], alt=alt) if files else None


def _facts(record: Record) -> dict[str, Any]:
    model, workload = record.model, record.workload
    return {
        "V": f"V = {model['vocab_size']:,}",
        "D": f"D = {model['dim']:,}",
        "layers": f"{model['n_layers']} layers",
        "head": f"{model['head']} heads",
        "unembedding": f"{model['unembedding']} unembedding",
        "tokens": f"{workload['batch']} x {workload['sequence']:,} tokens",
        "training": training_words(record),
        "machine": machine(record),
        **{name: f"{name} {value}" for name, value in setting(record).items() if name in CONDITIONS},
    }
