"""How long a prediction takes and how much memory: the whole command in a process of its own, import included.

CPU seconds of an 8B shape; the goals: one case 4, four n and five strategies 15, plan 20, a plan for what cannot fit 5.
"""

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("one case", ["predict", "--n", "4", "--strategies", "sequential"]),
        ("four n, five strategies", ["predict", "--n", "1,2,4,8"]),
        ("plan", ["plan", "--gpu", "h200"]),
        ("plan, nothing fits", ["plan", "--gpu", "l4"]),
    ],
)
def test_predict(benchmark, tmp_path: Path, name: str, options: list[str]) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = "llama3-8b, predicted"
    resident: list[int] = []
    seconds: list[float] = []

    def command() -> None:
        line = [sys.executable, "-m", "mtp_mem", *options, *(["--out", "out"] if options[0] == "predict" else [])]
        process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        resident.append(usage.ru_maxrss * 1024)  # Linux counts it in KiB
        seconds.append(usage.ru_utime + usage.ru_stime)

    benchmark.pedantic(command, rounds=3, warmup_rounds=0)
    benchmark.extra_info |= {"max_rss_bytes": max(resident), "cpu_seconds": statistics.median(seconds)}
    spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
    print(f"\n{name}: {statistics.median(seconds):.1f} CPU s ({spread}), max RSS {max(resident) / 2**20:.0f} MiB")
