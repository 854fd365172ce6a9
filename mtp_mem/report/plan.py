"""The result of `plan` as JSON and as tables: the largest step that fits, or training setups side by side."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mtp_mem._util import format_bytes
from mtp_mem.config.gpus import GPU
from mtp_mem.config.schema import Profile
from mtp_mem.environment import environment
from mtp_mem.prediction.largest_fit import AXES, Answer, Plan, advice
from mtp_mem.prediction.peaks import assumptions
from mtp_mem.prediction.setups import Tried, cheapest, setup_advice, share

TIGHT = "*"


def plan_document(
    result: Plan, batches: Sequence[Answer], profile: Profile, gpu: GPU, percent: float
) -> dict[str, Any]:
    """The plan as JSON: one list per axis, one row per strategy; bytes are integers.

    `batches` are the largest batches at several n, for the chart (empty without --out), `percent` is the headroom.
    """

    def row(answer: Answer) -> dict[str, Any]:
        figures, beyond = answer.figures, answer.next_figures
        return {
            "strategy": answer.strategy,
            **dataclasses.asdict(answer.point),
            "fits": result.fit(figures),
            "peak_allocated_bytes": figures.allocated,
            "peak_reserved_bytes": figures.reserved,
            "left_bytes": result.left(answer),
            "next": None
            if beyond is None or answer.next_point is None
            else {
                **dataclasses.asdict(answer.next_point),
                "fits": result.fit(beyond),
                "peak_allocated_bytes": beyond.allocated,
                "peak_reserved_bytes": beyond.reserved,
            },
        }

    best = result.recommended()
    return {
        **_what(profile, gpu, result.base.n, result.limit),
        "headroom_percent": percent,
        "model_limit_n": profile.model.largest_n,
        **{f"largest_{axis}": [row(answer) for answer in result.of(axis)] for axis in AXES},
        "largest_batch_by_n": [row(answer) for answer in batches],
        "before_a_step_bytes": result.before_a_step,
        "recommended": best and {"strategy": best.strategy, "axis": best.axis},
        "advice": advice(result),
        "left_out": _reasons(result.left_out.reasons),
    }


def setups_document(
    rows: Sequence[Tried], left_out: Mapping[str, str], profile: Profile, gpu: GPU, n: int, limit: int
) -> dict[str, Any]:
    """Every setup that was tried, the cheapest first, and the recommended one; bytes are integers."""
    best = cheapest(rows, limit)
    setups = [
        {
            "strategy": row.strategy,
            "training": row.training.facts(row.workload.dtype),
            "batch": row.workload.batch,
            "fits": row.fit(limit),
            "peak_allocated_bytes": row.figures.allocated,
            "peak_reserved_bytes": row.figures.reserved,
            "left_bytes": limit - row.figures.allocated,
            "flops": None if row.flops is None else round(float(row.flops), 4),
        }
        for row in rows
    ]
    alone = dataclasses.replace(profile.training, sharding="none", world=1)
    return {
        **_what(profile, gpu, n, limit),
        "setup": ", ".join([alone.precision(profile.workload.dtype), *alone.words]),
        "setups": setups,
        "recommended": None if best is None else setups[rows.index(best)],
        "advice": setup_advice(rows, limit),
        "left_out": _reasons(left_out),
    }


def plan_table(result: Plan, screen: Console) -> Table:
    """One row per strategy: per axis the largest value, the bytes left and, if wide, those by which the next misses."""
    wide = screen.width >= 110
    grid = _grid("strategy")
    for axis in AXES:
        for title in (axis, "left", "next misses")[: 3 if wide else 2]:
            grid.add_column(title, justify="right", no_wrap=True)
    rows: dict[str, list[str]] = {}
    for answer in result.answers:
        beyond = answer.next_figures
        cells = [
            f"{answer.value}{TIGHT * (result.fit(answer.figures) == 'tight')}" if answer.fits else "none",
            format_bytes(result.left(answer)),
            "-" if beyond is None else format_bytes(beyond.allocated - result.limit),
        ]
        rows.setdefault(answer.strategy, []).extend(cells[: 3 if wide else 2])
    for spec, cells in rows.items():
        grid.add_row(spec, *cells)
    return grid


def setups_table(rows: Sequence[Tried], limit: int, *, wide: bool) -> Table:
    """One row per setup and strategy, the cheapest first; `frees`: allocated bytes less than in the first row."""
    grid = _grid("setup", "strategy")
    for title in ("FLOPs", "allocated", "frees", "left", "fits") if wide else ("FLOPs", "allocated", "left", "fits"):
        grid.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        freed = [format_bytes(rows[0].figures.allocated - row.figures.allocated)] if wide else []
        grid.add_row(
            row.words,
            row.strategy,
            share(row.flops),
            format_bytes(row.figures.allocated),
            *freed,
            format_bytes(limit - row.figures.allocated),
            row.fit(limit),
        )
    return grid


def _what(profile: Profile, gpu: GPU, n: int, limit: int) -> dict[str, Any]:
    return {
        "schema": 1,
        "exactness": "predicted",
        "profile": profile.name,
        "model": profile.model.with_n(n).facts(),
        "workload": dataclasses.asdict(profile.workload),
        "training": profile.training.facts(profile.workload.dtype),
        "gpu": dataclasses.asdict(gpu),
        "limit_bytes": limit,
        "environment": environment("cpu"),
        "assumptions": assumptions(gpu),
    }


def _reasons(left_out: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"strategy": spec, "reason": reason} for spec, reason in left_out.items()]


def _grid(*words: str) -> Table:
    """A table without lines whose first columns are words."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in words:
        grid.add_column(title, overflow="fold")
    return grid
