"""Training setups side by side (`plan --vary`): as JSON, and as a table."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from mtp_mem._util import format_bytes
from mtp_mem.config.schema import GPU, Profile
from mtp_mem.environment import environment
from mtp_mem.prediction.setups import Tried, cheapest, setup_advice


def document(rows: Sequence[Tried], profile: Profile, gpu: GPU, n: int, limit: int) -> dict[str, Any]:
    """All that was tried, the cheapest first, and the one to use; bytes are integers."""
    best = cheapest(rows, limit)
    setups = [
        {
            "strategy": row.strategy,
            "training": row.training.facts(row.workload.dtype),
            "batch": row.workload.batch,
            "fits": row.fit(limit),
            "peak_allocated_bytes": row.allocated,
            "peak_reserved_bytes": row.reserved,
            "left_bytes": limit - row.allocated,
            "flops": None if row.flops is None else round(float(row.flops), 4),
        }
        for row in rows
    ]
    return {
        "schema": 1,
        "exactness": "predicted",
        "profile": profile.name,
        "model": dataclasses.asdict(profile.model.with_n(n)),
        "workload": dataclasses.asdict(profile.workload),
        "gpu": dataclasses.asdict(gpu),
        "limit_bytes": limit,
        "setups": setups,
        "recommended": None if best is None else setups[rows.index(best)],
        "advice": setup_advice(rows, limit),
        "environment": environment("cpu"),
    }


def table(rows: Sequence[Tried], limit: int, *, wide: bool) -> Table:
    """A row for each setup and strategy, the cheapest first; `frees` is against the first row."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    grid.add_column("setup", overflow="fold")
    grid.add_column("strategy", overflow="fold")
    for title in ("FLOPs", "allocated", "frees", "left", "fits") if wide else ("FLOPs", "allocated", "left", "fits"):
        grid.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        freed = [format_bytes(rows[0].allocated - row.allocated)] if wide else []
        grid.add_row(
            row.words,
            row.strategy,
            "?" if row.flops is None else f"{float(row.flops - 1):+.0%}",
            format_bytes(row.allocated),
            *freed,
            format_bytes(limit - row.allocated),
            row.fit(limit),
        )
    return grid
