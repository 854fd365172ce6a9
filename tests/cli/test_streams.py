"""Standard streams as they come: right output, or a quiet end; nothing but the document in the document."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from forked import CLOSED, run

FULL = Path("/dev/full")
PROFILE = """
description = "ΔÄ, a tiny one"
[model]
vocab_size = 300
dim = 1024
n_layers = 2
n_attention_heads = 2
[workload]
batch = 1
sequence = 8
dtype = "bf16"
tokenizer = "uniform"
[sweep]
n = [1]
rounds = 1
"""


def test_a_pipe_that_closes_and_streams_that_are_closed(tmp_path: Path) -> None:
    """The interpreter's own end, which flushes once more and complains, is part of it."""
    script = """
        "$1" -m mtp_mem list | head -1; echo "${PIPESTATUS[0]}"
        "$1" -m mtp_mem list --json >&- 2>&-; echo "$?"
        "$1" -m mtp_mem profile check none 2>/dev/full; echo "$?"
    """
    ended = subprocess.run(["bash", "-c", script, "-", sys.executable], cwd=tmp_path, capture_output=True, text=True)
    assert ended.stdout.split() == ["Strategies", "0", "0", "2"]
    assert ended.stderr == ""


def test_notes_have_no_stream_to_go_to(tmp_path: Path) -> None:
    """A closed stderr is None to Python, and what is printed to None goes to stdout."""
    (tmp_path / "p.toml").write_text(PROFILE)
    for stderr in (CLOSED, FULL, tmp_path / "err"):
        ended = run(tmp_path, "profile", "check", "p.toml", "--json", stderr=stderr)
        assert ended.returncode == 0
        assert "flash attention on CUDA takes at most" in json.loads(ended.stdout)["notes"][0]
    assert ended.stderr.startswith("note: ")


def test_results_that_could_not_be_written_are_no_success(tmp_path: Path) -> None:
    for args in (["list"], ["list", "--json"], ["env"]):
        ended = run(tmp_path, *args, stdout=FULL)
        assert (ended.returncode, ended.stderr) == (
            2,
            "mtp-mem: standard output: cannot be written: No space left on device\n",
        )
    assert run(tmp_path, "list", stdout=CLOSED).returncode == 0  # nobody wants it
    assert run(tmp_path, "list", stdout=FULL, stderr=CLOSED).returncode == 2
    assert run(tmp_path, "profile", "check", "none", stderr=FULL).returncode == 2


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}])
def test_an_encoding_without_our_characters(tmp_path: Path, variables: dict[str, str]) -> None:
    (tmp_path / "p.toml").write_text(PROFILE)
    ended = run(tmp_path, "profile", "check", "p.toml", variables=variables)
    assert ended.returncode == 0
    assert "\\u0394" in ended.stdout
    ended = run(tmp_path, "profile", "check", os.fsdecode(b"\xff.toml"))
    assert (ended.returncode, ended.stderr) == (2, "mtp-mem: \ufffd.toml: cannot be read: No such file or directory\n")


@pytest.mark.parametrize("columns", ["0", "20", "-5", "x", "9" * 5000, ""])
def test_a_width_that_no_table_has(tmp_path: Path, columns: str) -> None:
    ended = run(tmp_path, "list", variables={"COLUMNS": columns, "TERM": "dumb", "NO_COLOR": "1"})
    assert ended.returncode == 0
    assert "…" not in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) == (80 if columns == "20" else 120)
    assert " ".join(ended.stdout.split()).count("head's logits alive (the paper's schedule)") == 1
    assert not re.search("\x1b", ended.stdout)


PRINTS = """
import os, sys
from mtp_mem.strategies.sequential import Sequential

class Talks(Sequential):
    def backward(self, *args):
        os.write(1, b"one way\\n")
        print("another", file=sys.__stdout__, flush=True)
        os.system("echo a third")
        return super().backward(*args)
"""


def test_what_a_strategy_prints_is_no_part_of_the_document(tmp_path: Path) -> None:
    (tmp_path / "prints.py").write_text(PRINTS)
    (tmp_path / "p.toml").write_text(PROFILE)
    ended = run(tmp_path, "timeline", "--profile", "p.toml", "--strategy", "prints:Talks", "--json")
    assert json.loads(ended.stdout)["strategy"] == "prints:Talks"
    for words in ("one way", "another", "a third"):
        assert words in ended.stderr
