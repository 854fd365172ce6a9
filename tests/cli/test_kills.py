"""A run that is killed at any moment loses nothing that was finished, and leaves nothing half-written."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
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
KILLS = 12


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


@pytest.mark.slow
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
        process.join(draw.uniform(0, 0.7 * lasts))
        killed += process.is_alive()
        process.kill()
        process.join()
        now = finished(out / "results.jsonl")
        assert before <= now
        before = now
        for chart in out.glob("memory*.png"):
            assert chart.read_bytes().endswith(b"IEND\xaeB`\x82")
    assert killed >= KILLS // 4  # the first run, which `lasts` is of, may have been a slow one
    last = start(folder, *command)
    last.join(WAIT_S)
    assert last.exitcode == 0
    file = ResultsFile(out)
    assert len(file.read()) == 6
    assert not [path for path in out.iterdir() if path.name.endswith(".tmp")]
    assert {path.name for path in out.iterdir()} == {path.name for path in (folder / "whole").iterdir()}


@pytest.mark.parametrize("ignored", [False, True])
def test_a_hangup_ends_a_run_in_order_unless_it_is_ignored(tmp_path: Path, ignored: bool) -> None:
    """The shell that began it has gone; under nohup it goes on."""
    folder = tmp_path / "w"
    folder.mkdir()
    (folder / "p.toml").write_text(PROFILE.replace("rounds = 1", "rounds = 20"))
    process = start(folder, "compare", "--profile", "p.toml", "--out", "out", hangup_ignored=ignored)
    results = folder / "out/results.jsonl"
    deadline = time.monotonic() + WAIT_S
    while not results.exists() or not results.read_bytes():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid or 0, signal.SIGHUP)
    process.join(WAIT_S)
    said = folder.with_name("w.err").read_text()
    assert process.exitcode == (0 if ignored else 130)
    assert ("stopped: 3 of 6 cases are in out/results.jsonl; the same command runs the others" in said) != ignored
