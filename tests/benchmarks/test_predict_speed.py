"""How long a prediction takes and how much memory: the whole command in a process of its own, import included.

Goals on two cores: a 7B shape, four n and four strategies in 60 s and 1 GiB; one case in 6 s.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOUR = "naive,sequential,chunked_vocab,checkpointed"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("one case", ["--n", "1", "--strategies", "sequential"]),
        ("four n, four strategies", ["--n", "1,2,4,8", "--strategies", FOUR]),
    ],
)
def test_predict(benchmark, tmp_path: Path, name: str, options: list[str]) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = "mtp-mem predict --profile llama3-8b"
    resident: list[int] = []

    def command() -> None:
        line = [sys.executable, "-m", "mtp_mem", "predict", *options, "--out", "out"]
        process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        resident.append(usage.ru_maxrss * 1024)  # Linux counts it in KiB

    benchmark.pedantic(command, rounds=3, warmup_rounds=0)
    benchmark.extra_info["max_rss_bytes"] = max(resident)
    print(f"\n{name}: {benchmark.stats.stats.median:.1f} s (median), max RSS {max(resident) / 2**20:.0f} MiB")
