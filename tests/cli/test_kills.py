"""A run that is killed at any moment loses nothing that was finished, and leaves nothing half-written."""

import json
import random
import time
from pathlib import Path

from forked import WAIT_S, start

from mtp_mem.runs.results_file import ResultsFile

PROFILE = """
[model]
vocab_size = 256
dim = 32
n_layers = 2
n_attention_heads = 2
[workload]
batch = 1
sequence = 16
tokenizer = "uniform"
[sweep]
n = [1, 2]
strategies = ["naive", "sequential", "chunked_tokens"]
rounds = 1
"""
KILLS = 20


def finished(results: Path) -> set[tuple[str, int]]:
    """The cases that the file has; every line of it is whole but for one that a kill cut off, and what came after."""
    if not results.exists():
        return set()
    records = []
    for line in results.read_bytes().split(b"\n"):
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return {(record["strategy"], record["n"]) for record in records}


def test_a_run_that_is_killed_at_random_moments(tmp_path: Path) -> None:
    folder, draw = tmp_path / "w", random.Random(17)
    folder.mkdir()
    (folder / "p.toml").write_text(PROFILE)
    out, command = folder / "out", ("compare", "--profile", "p.toml", "--out", "out")
    for _ in range(2):  # the first one starts the process that the others are forked from
        begun = time.monotonic()
        whole = start(folder, "compare", "--profile", "p.toml", "--out", "whole", "--fresh")
        whole.join(WAIT_S)
        assert whole.exitcode == 0
        lasts = time.monotonic() - begun
    before: set[tuple[str, int]] = set()
    killed = 0
    for turn in range(KILLS):
        process = start(folder, *command, *["--fresh"] * (turn % 4 > 0))
        process.join(draw.uniform(0, 0.9 * lasts))
        killed += process.is_alive()
        process.kill()
        process.join()
        now = finished(out / "results.jsonl")
        assert before <= now
        before = now
        for chart in out.glob("memory*.png"):
            assert chart.read_bytes().endswith(b"IEND\xaeB`\x82")
    assert killed >= KILLS // 2
    last = start(folder, *command)
    last.join(WAIT_S)
    assert last.exitcode == 0
    file = ResultsFile(out)
    assert len(file.read()) == 6
    assert not [path for path in out.iterdir() if path.name.endswith(".tmp")]
    assert {path.name for path in out.iterdir()} == {path.name for path in (folder / "whole").iterdir()}
