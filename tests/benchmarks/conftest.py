"""What the benchmarks add to pytest-benchmark: the machine's GPU, a table with bytes, no comparison across GPUs."""

from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from mtp_mem._util import format_bytes
from mtp_mem.environment import environment


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """The environment of every record of ours."""
    machine_info["mtp_mem"] = environment("cuda" if torch.cuda.is_available() else "cpu")


def pytest_benchmark_compare_machine_info(
    config: pytest.Config, benchmarksession: Any, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> None:
    """Times and bytes of one GPU say nothing about another."""
    local = machine_info["mtp_mem"]["device"]
    there = compared_benchmark["machine_info"].get("mtp_mem", {}).get("device", "unknown")
    if local != there:
        raise pytest.UsageError(f"--benchmark-compare: measured on {there}, this machine has {local}; not comparable")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """A row for each head phase: time, bytes, and both against their floors."""
    session = getattr(config, "_benchmarksession", None)
    rows = [b for b in (session.benchmarks if session else []) if "peak_over_inputs_bytes" in b.extra_info]
    for group in dict.fromkeys(b.group for b in rows):
        table = Table(title=group, title_justify="left", box=None, pad_edge=False)
        table.add_column("strategy", no_wrap=True)
        for column in ("ms", "x floor", "20-80 %", "tokens/s", "over inputs", "x bound"):
            table.add_column(column, justify="right", no_wrap=True)
        for bench in sorted((b for b in rows if b.group == group), key=lambda b: b.extra_info["times_floor"]):
            info = bench.extra_info
            table.add_row(
                info["strategy"],
                f"{bench.stats.median * 1e3:.0f}",
                f"{info['times_floor']:.3f}",
                f"{info['times_floor_p20']:.2f}-{info['times_floor_p80']:.2f}",
                f"{info['tokens_per_s']:,.0f}",
                format_bytes(info["peak_over_inputs_bytes"]),
                f"{info['peak_over_inputs_bytes'] / info['lower_bound_bytes']:.2f}",
            )
        Console(highlight=False).print(table)
