"""A predicted rank is the real one: bytes of FSDP2 on two gloo ranks, and on none."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = str(Path(__file__).parent / "bytes_of_a_rank.py")


def lines(*command: str) -> dict[str, dict[str, Any]]:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["case"]: row for row in rows}


def test_a_predicted_rank_takes_what_a_real_one_takes() -> None:
    real = lines("-m", "torch.distributed.run", "--nproc-per-node", "2", SCRIPT)
    predicted = lines(SCRIPT, "predicted")
    assert len(real) == 17
    for case, row in real.items():
        # Of a phase's own peak gloo's threads may hold a buffer for a moment longer.
        for fact in ("baseline", "peak", "phase", "parts"):
            assert predicted[case][fact] == row[fact], (case, fact)
