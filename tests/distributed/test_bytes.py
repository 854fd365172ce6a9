"""A predicted rank is the real one: bytes of FSDP2 on two gloo ranks, and on none."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = str(Path(__file__).parent / "bytes_of_a_rank.py")


def test_a_predicted_rank_takes_what_a_real_one_takes() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    real, predicted = ({row["case"]: row for row in rows if row["how"] == how} for how in ("real", "predicted"))
    assert len(real) == 17
    for case, row in real.items():
        # Of a phase's own peak gloo's threads may hold a buffer for a moment longer.
        for fact in ("baseline", "peak", "phase", "parts"):
            assert predicted[case][fact] == row[fact], (case, fact)
