"""Tables for the terminal; where the screen is too narrow, the least important columns are dropped first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from mtp_mem._util import format_bytes
from mtp_mem.config.gpus import GPU
from mtp_mem.config.schema import ALL_DTYPES
from mtp_mem.memory.trace import Category
from mtp_mem.prediction.caching_allocator import fit
from mtp_mem.prediction.formulas import slope
from mtp_mem.report.recommend import peak_bytes, record_formula
from mtp_mem.runs.identity import training_of, training_words
from mtp_mem.runs.record import Record
from mtp_mem.verification.broken_strategies import Broken
from mtp_mem.verification.checks import Check, Verification


@dataclass(frozen=True)
class Column:
    """A column: title, the function that computes a cell from a record and naive's at the same n, and its rank."""

    title: str
    cell: Callable[[Record, Record | None], str]
    rank: int  # the higher, the sooner it is dropped
    left: bool = False


def _bytes(nbytes: int | None) -> str:
    return "-" if nbytes is None else format_bytes(nbytes)


def _ratio(value: float | None, naive: float | None) -> str:
    return "-" if value is None or not naive else f"{value / naive:.2f}x"


def _gradients(record: Record) -> str:
    if record.status != "ok":
        return record.status
    if record.gradient == "bit-identical" or record.gradient_error is None:
        return record.gradient
    return f"{record.gradient} {record.gradient_error:.0e}"


DISTURBED = "~"  # marks a time that other processes disturbed

COLUMNS = (
    Column("n", lambda r, _: str(r.n), 0),
    Column("strategy", lambda r, _: r.strategy, 0, left=True),
    Column("baseline", lambda r, _: _bytes(r.baseline_bytes), 6),
    Column("peak", lambda r, _: _bytes(peak_bytes(r)), 2),
    Column("reserved", lambda r, _: _bytes(r.peak_reserved_bytes), 7),
    Column("driver", lambda r, _: _bytes(r.nvml_process_bytes), 8),
    Column("over base", lambda r, _: _bytes(r.peak_over_baseline_bytes), 0),
    Column("/naive", lambda r, b: _ratio(r.peak_over_baseline_bytes, b.peak_over_baseline_bytes if b else None), 1),
    Column("peak in", lambda r, _: r.peak_phase or "-", 3, left=True),
    Column("RSS", lambda r, _: _bytes(r.host_rss_bytes), 9),
    Column("tokens/s", lambda r, _: "-" if r.tokens_per_s is None else f"{r.tokens_per_s:,.0f}", 4),
    Column("step ms", lambda r, _: "-" if r.step_ms is None else f"{r.step_ms:.0f}{DISTURBED * bool(r.disturbed)}", 2),
    Column(
        "20-80 %",
        lambda r, _: "-" if r.step_ms_p20 is None else f"{r.step_ms_p20:.0f}-{r.step_ms_p80:.0f}",
        5,
    ),
    Column("/naive ", lambda r, b: _ratio(r.step_ms, b.step_ms if b else None), 1),
    Column("gradients", lambda r, _: _gradients(r), 0, left=True),
)


def prediction(records: Sequence[Record], console: Console, gpu: GPU) -> Table:
    """One row per predicted record: the allocator's peaks, whether they fit the GPU, and the bytes at the peak."""

    def part(*categories: Category) -> Callable[[Record, Record | None], str]:
        return lambda r, _: _bytes(sum((r.bytes_at_peak or {}).get(c, 0) for c in categories))

    sharded = any(r.training.get("sharding", "none") != "none" for r in records)
    between_ranks = Column("gathered", part("gathered parameters", "communication buffers"), 3)
    columns = (
        *COLUMNS[:2],
        Column("requested", lambda r, _: _bytes(r.peak_requested_bytes), 9),
        Column("allocated", lambda r, _: _bytes(r.peak_allocated_bytes), 0),
        Column("reserved", lambda r, _: _bytes(r.peak_reserved_bytes), 1),
        Column("fits", lambda r, _: fits(r, gpu) if r.status == "ok" else r.status, 0, left=True),
        Column("peak in", lambda r, _: r.peak_phase or "-", 3, left=True),
        Column("logits", part("logits"), 2),
        Column("activations", part("trunk activations", "head activations", "hidden-state gradients"), 4),
        Column("weights", part("parameters"), 6),
        Column("gradients", part("gradients"), 5),
        Column("optimizer", part("optimizer"), 7),
        *([between_ranks] if sharded else []),
    )
    return _fitting(columns, records, console)


def verification(result: Verification, specs: Sequence[str], console: Console) -> Table:
    """One row per strategy: checks passed, bit-identity, and the largest error in each dtype beside naive's."""
    dtypes = [d for d in ALL_DTYPES if any(check.dtype == d and check.parts for check in result.checks)]
    dtypes = dtypes[: 5 if console.width >= 118 else 4 if console.width >= 100 else 3]
    titles = ["strategy", "passed", "bit-identical", *(f"{d} (naive's)" for d in dtypes)]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title, justify="left" if title == "strategy" else "right", no_wrap=True)
    for spec in specs:
        checks = result.of(spec)
        exact = [check for check in checks if check.exact and check.parts]
        cells = [spec, f"{sum(c.status == 'right' for c in checks)}/{len(checks)}"]
        cells.append(f"{sum(c.identical for c in exact)}/{len(exact)}")
        for dtype in dtypes:
            parts = [part for check in checks if check.dtype == dtype for part in check.parts]
            errors = [(part.error, part.naive_error) for part in parts if part.naive_error is not None]
            cells.append("-" if not errors else "{:.0e} ({:.0e})".format(*max(errors)))
        table.add_row(*cells[: len(table.columns)])
    return table


def proof(broken: Sequence[type[Broken]], caught: Mapping[str, Sequence[Check]], console: Console) -> Table:
    """One row per broken strategy: its bug, where the bug was reported, and the verifier's message."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    wide = console.width >= 110
    table.add_column("broken strategy", ratio=3)
    if wide:
        table.add_column("reported in", ratio=3)
    table.add_column("caught", ratio=1, no_wrap=True, justify="right")
    table.add_column("it says", ratio=4)
    table.expand = True
    for cls in broken:
        failures = caught[cls.__name__]
        said = next((check for check in failures if check.scenario == cls.caught_by), None)
        origin = [cls.origin] if wide else []
        words = "NOT CAUGHT" if said is None else said.explain().partition(": ")[2]
        table.add_row(f"{cls.__name__}: {(cls.__doc__ or '').strip()}", *origin, f"{len(failures)}x", words)
    return table


def fits(record: Record, gpu: GPU) -> str:
    """`yes`; `tight` where only the cached, unused part of the segments is too much; `no`."""
    return fit(record.peak_allocated_bytes or 0, record.peak_reserved_bytes or 0, gpu.total_bytes)


def comparison(records: Sequence[Record], console: Console) -> Table:
    """One row per record, grouped by n, in as many columns as fit the console."""
    return _fitting(COLUMNS, records, console)


def collectives(records: Sequence[Record]) -> Table | None:
    """A step's collectives of each kind and their bytes; None where no record has any.

    Strategies with the same figures at one n share a row.
    """
    rows: dict[tuple[str, ...], list[Record]] = {}
    kinds = list(dict.fromkeys(kind for record in records for kind in record.collectives or ()))
    for record in records:
        if record.collectives is not None:
            counts, nbytes = record.collectives, record.collective_bytes or {}
            row = [f"{counts[k]} ({format_bytes(nbytes.get(k, 0))})" if k in counts else "-" for k in kinds]
            rows.setdefault((str(record.n), *row), []).append(record)
    if not rows:
        return None
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("n", justify="right")
    for kind in kinds:
        table.add_column(kind, justify="right", no_wrap=True)
    table.add_column("a step, with", overflow="fold")
    for cells, alike in rows.items():
        table.add_row(*cells, ", ".join(record.strategy for record in alike))
    return table


def remarks(records: Sequence[Record]) -> list[str]:
    """What the columns cannot say: noise, unusual setups, what was chosen and why, what failed, unreliable peaks."""
    noise = {r.n: (r.gradient_reference, r.gradient_noise) for r in records if r.gradient_noise}
    lines = [
        f"n = {n}: {name} run twice differs from itself by {error:.0e}: a kernel adds in no fixed order, so"
        " nothing can be bit-identical unless deterministic kernels are required"
        for n, (name, error) in noise.items()
    ]
    setups = {training_words(r): training_of(r) for r in records}
    lines += [f"trained in {words}" for words, training in setups.items() if training is None or training.words]
    for r in records:
        words = [r.chosen] if r.chosen else []
        if r.status != "ok" or r.error:
            words.append(f"{r.status}: {r.error or 'no reason recorded'}")
        if r.alloc_retries:
            words.append(f"the allocator ran out {r.alloc_retries} times and freed its cache, which changes the peak")
        if r.peak_spread_bytes:
            words.append(f"three repeats of the step differ by {format_bytes(r.peak_spread_bytes)} in their peaks")
        lines += [f"{r.strategy}, n = {r.n}: {text}" for text in words]
    return [*lines, *filter(None, [disturbance(records)])]


def disturbance(records: Sequence[Record]) -> str:
    """A sentence about times that other processes disturbed; empty where there are none."""
    noisy = [r for r in records if r.disturbed]
    if not noisy:
        return ""
    others = max(r.others_cpu or 0.0 for r in noisy)
    spread = max(((r.step_ms_p80 or 0.0) - (r.step_ms_p20 or 0.0)) / (r.step_ms or 1.0) for r in noisy)
    return (
        f"{DISTURBED} The times of {len(noisy)} of {len(records)} cases were disturbed: other processes took up to"
        f" {others:.0%} of the machine's CPU time, equal steps spread by up to {spread:.0%}. --fresh measures again."
    )


SLOPE_TITLES = ("bytes per further head", "fitted", "by formula", "formula is off by")


def slopes(records: Sequence[Record]) -> Table | None:
    """Bytes per additional head, fitted to the measurement and to the formula; None with a single n."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", title_justify="left")
    for title in SLOPE_TITLES:
        table.add_column(title, justify="left" if table.columns == [] else "right", no_wrap=True)
    for row in slope_rows(records):
        table.add_row(*row)
    return table if table.row_count else None


def slope_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """The rows of `slopes`, a cell for each of SLOPE_TITLES."""
    points_by_strategy: dict[str, list[tuple[int, int, int | None]]] = {}
    for r in records:
        if r.status == "ok" and r.peak_over_baseline_bytes is not None:
            formula = record_formula(r)
            points_by_strategy.setdefault(r.strategy, []).append((r.n, r.peak_over_baseline_bytes, formula))
    rows = []
    for strategy, points in points_by_strategy.items():
        fitted = slope([(n, nbytes) for n, nbytes, _ in points])
        known = [(n, nbytes, formula) for n, nbytes, formula in points if formula is not None]
        predicted = slope([(n, formula) for n, _, formula in known])
        off = max((formula / nbytes - 1 for _, nbytes, formula in known if nbytes), key=abs, default=None)
        if fitted is not None:
            cells = ("-" if value is None else format_bytes(round(value)) for value in (fitted, predicted))
            rows.append((strategy, *cells, "-" if off is None else f"{off:+.2%}"))
    return rows


def _fitting(columns: Sequence[Column], records: Sequence[Record], console: Console) -> Table:
    shown = [c for c in columns if any(c.cell(r, None) != "-" for r in records) or "/naive" in c.title]
    while True:
        table = _table(shown, records)
        unbounded = console.options.update(max_width=10_000)
        if Measurement.get(console, unbounded, table).maximum <= console.width or len(shown) <= 3:
            return table
        shown.remove(max(shown, key=lambda c: c.rank))


def _table(columns: Sequence[Column], records: Sequence[Record]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column.title, justify="left" if column.left else "right", no_wrap=True)
    naive = {r.n: r for r in records if r.strategy == "naive"}
    for i, record in enumerate(records):
        last_of_n = i + 1 < len(records) and records[i + 1].n != record.n
        table.add_row(*(c.cell(record, naive.get(record.n)) for c in columns), end_section=last_of_n)
        if last_of_n:
            table.add_row()
    return table
