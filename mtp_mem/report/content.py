"""The text of a report on one group of records: recommendation, tables, gradients and machine."""

from collections.abc import Sequence
from dataclasses import dataclass

from mtp_mem._util import format_bytes
from mtp_mem.config.gpus import GPU, load_gpus
from mtp_mem.report import tables
from mtp_mem.report.charts.style import HOW
from mtp_mem.report.recommend import advise, choose, peak_bytes, saving, slowdown
from mtp_mem.report.reproduce import command
from mtp_mem.runs.identity import machine, training_words
from mtp_mem.runs.read_results import code_versions
from mtp_mem.runs.record import Record

HIDDEN = ("code", "torch_git", "variables")


@dataclass(frozen=True)
class Grid:
    """A table: titles, rows of as many cells, and which columns hold words (aligned left)."""

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[bool, ...]


@dataclass(frozen=True)
class Section:
    """The text and tables of one group, without its charts."""

    title: str
    how: str
    answer: str
    figures: tuple[tuple[str, str], ...]  # the numbers behind the recommendation: (name, value)
    cases: Grid
    slopes: Grid | None
    gradients: str
    remarks: tuple[str, ...]
    machine: Grid
    command: str


def gpu_of(record: Record) -> GPU | None:
    """The GPU that a record predicts for, if this version knows it."""
    return next((g for g in load_gpus().values() if g.name == record.environment.get("target")), None)


def _threads(record: Record) -> str:
    """The number of threads of a CPU measurement, in words."""
    threads = record.environment.get("threads")
    return f", {threads} thread{'s' * (threads != 1)}" if record.backend == "cpu" and isinstance(threads, int) else ""


def section(records: Sequence[Record]) -> Section:
    """The content of one group's section.

    Args:
        records: of one group (mtp_mem/runs/read_results.py); at least one.
    """
    first = records[0]
    model, workload = first.model, first.workload
    title = (
        f"V = {model['vocab_size']:,}, D = {model['dim']:,}, {model['n_layers']} layers,"
        f" {workload['batch']} x {workload['sequence']:,} tokens, {training_words(first)}, on {machine(first)}"
        f"{_threads(first)}"
    )
    answer, figures = _predicted(records) if first.exactness == "predicted" else _measured(records)
    slopes = tables.slope_rows(records)
    versions = code_versions(records)
    return Section(
        title=title,
        how=HOW[first.exactness] + (f", by {len(versions)} versions of the code" if len(versions) > 1 else ""),
        answer=answer,
        figures=figures,
        cases=_cases(records),
        slopes=Grid(tables.SLOPE_TITLES, tuple(slopes), (True, *[False] * 3)) if slopes else None,
        gradients=_verdict(records),
        remarks=tuple(tables.remarks(records)),
        machine=_machine(records),
        command=command(records),
    )


def _measured(records: Sequence[Record]) -> tuple[str, tuple[tuple[str, str], ...]]:
    sentence, choice = advise(records), choose(records)
    if choice is None:
        return sentence, ()
    best, naive = choice.best, choice.naive
    figures = [(f"use at n = {choice.n}", best.strategy)]
    if naive is not None and naive is not best:
        saved = (naive.peak_over_baseline_bytes or 0) - (best.peak_over_baseline_bytes or 0)
        figures.append(("saves against naive", f"{format_bytes(saved)} ({saving(best, naive)})"))
        if best.step_ms and naive.step_ms:
            figures.append(("time of a step, to naive's", slowdown(best, naive)))
    figures.append(("gradients", best.gradient))
    return sentence, tuple(figures)


def _predicted(records: Sequence[Record]) -> tuple[str, tuple[tuple[str, str], ...]]:
    done = [r for r in records if r.status == "ok" and peak_bytes(r) is not None]
    if not done:
        return "No case could be predicted.", ()
    n = max(r.n for r in done)
    peaks = {r.strategy: peak_bytes(r) or 0 for r in done if r.n == n}
    best = min(peaks, key=lambda name: peaks[name])
    sentence = f"At n = {n}, {best} is predicted to need {format_bytes(peaks[best])} in all"
    figures = [(f"least memory at n = {n}", best)]
    if "naive" in peaks and best != "naive":
        saved = peaks["naive"] - peaks[best]
        percent = f"{-saved / peaks['naive']:+.0%}" if peaks["naive"] else "-"
        sentence += f" where naive needs {format_bytes(peaks['naive'])} ({percent})"
        figures.append(("saves against naive", f"{format_bytes(saved)} ({percent})"))
    gpu = gpu_of(records[0])
    if gpu:
        fitting = [name for name, nbytes in peaks.items() if nbytes <= gpu.total_bytes]
        sentence += f"; of {format_bytes(gpu.total_bytes)} on {gpu.name}, "
        sentence += "every strategy fits" if len(fitting) == len(peaks) else f"{', '.join(fitting) or 'none'} fits"
        figures.append((f"fit {gpu.name}", f"{len(fitting)} of {len(peaks)} strategies"))
    return f"{sentence}. Time and gradients were not predicted.", (*figures, ("time, gradients", "not predicted"))


def _cases(records: Sequence[Record]) -> Grid:
    """The columns of `compare`'s table that are not empty."""
    records = sorted(records, key=lambda r: r.n)  # stable: strategies keep their order
    naive = {r.n: r for r in records if r.strategy == "naive"}
    cells = [[c.cell(r, naive.get(r.n)) for c in tables.COLUMNS] for r in records]
    used = [i for i in range(len(tables.COLUMNS)) if any(row[i] != "-" for row in cells)]
    return Grid(
        tuple(tables.COLUMNS[i].title.strip() for i in used),
        tuple(tuple(row[i] for i in used) for row in cells),
        tuple(tables.COLUMNS[i].left for i in used),
    )


def _verdict(records: Sequence[Record]) -> str:
    """How many gradients were checked, against which reference, and the largest error."""
    done = [r for r in records if r.status == "ok"]
    checked = [r for r in done if r.gradient != "unchecked"]
    if not checked:
        return "The gradients were not checked here; mtp-mem verify holds every strategy against an fp64 oracle."
    words = [
        f"{verdict} {count}"
        for verdict in ("bit-identical", "within bound", "differs")
        if (count := sum(r.gradient == verdict for r in checked))
    ]
    against = ", ".join(dict.fromkeys(r.gradient_reference or "naive" for r in checked))
    text = f"Of {len(done)} cases {len(checked)} were held against {against}: {', '.join(words)}."
    worst = max(checked, key=lambda r: r.gradient_error or 0.0)
    if worst.gradient_error:
        text += f" The largest error is {worst.gradient_error:.0e} ({worst.strategy}, n = {worst.n}"
        text += f", {worst.gradient_group})." if worst.gradient_group else ")."
    return text


def _machine(records: Sequence[Record]) -> Grid:
    """The environment, one row per fact; several values where the records differ."""
    seen: dict[str, dict[str, None]] = {}
    for record in records:
        facts = {**record.environment, **dict(record.environment.get("variables") or {})}
        for name, value in facts.items():
            if name not in HIDDEN and value is not None:
                text = format_bytes(value) if name.endswith("_bytes") and isinstance(value, int) else str(value)
                seen.setdefault(name, {})[text] = None
    dates = sorted(r.created_at for r in records)
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    rows = [("recorded", span), *((name, ", ".join(values)) for name, values in seen.items())]
    return Grid(("what", "value"), tuple(rows), (True, True))
