"""What the machine refuses: one line and exit code 2, or data; what was there before is as it was."""

import json
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from command_line import mtp_mem
from fixed import record
from forked import WAIT_S, run, start

from mtp_mem.errors import BadInput
from mtp_mem.memory.host import bounded_memory, host_bytes
from mtp_mem.runs.results_file import ResultsFile

PROFILE = """
[model]
vocab_size = {V}
dim = 32
n_layers = 4
n_attention_heads = 2
[workload]
batch = 1
sequence = {S}
tokenizer = "uniform"
[sweep]
n = [1, 2]
strategies = ["naive", "sequential", "chunked_vocab"]
rounds = 1
"""


def profile(folder: Path, V: int = 300, S: int = 16) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "p.toml").write_text(PROFILE.format(V=V, S=S))
    return folder


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


COMMANDS = {
    "compare": ["--profile", "p.toml"],
    "predict": ["--profile", "p.toml", "--n", "1", "--gpu", "t4"],
    "plan": ["--profile", "p.toml", "--n", "1", "--strategies", "naive"],
    "timeline": ["--profile", "p.toml", "--n", "1"],
    "chart": ["r/results.jsonl"],
    "report": ["r/results.jsonl", "--charts"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_cannot_be_written(tmp_path: Path, command: str) -> None:
    folder = profile(tmp_path / "w")
    ResultsFile(folder / "r").append(record())
    (folder / "file").write_text("kept")
    out = [] if command == "report" else ["--out"]
    for where, why in (("file", "File exists"), ("file/x", "Not a directory"), ("x" * 300, "File name too long")):
        ended = mtp_mem(folder, command, *COMMANDS[command], *out, where)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr == f"mtp-mem: {where}: cannot be written: {why}\n"
    assert (folder / "file").read_text() == "kept"
    assert sorted(p.name for p in folder.iterdir()) == ["file", "p.toml", "r"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk(tmp_path: Path, command: str) -> None:
    """As a disk is full: the first bytes of a file are written, then no more."""
    folder = profile(tmp_path / "w")
    ResultsFile(folder / "r").append(record())
    out = [] if command == "report" else ["--out"]
    ended = run(folder, command, *COMMANDS[command], *out, "out", limits={resource.RLIMIT_FSIZE: 700})
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.endswith(": cannot be written: File too large\n")
    assert ended.stderr.count("\n") == 1
    assert not [
        path for path in folder.rglob("*") if path.is_file() and path.parent.name == "out" and path.stat().st_size
    ]


def test_a_page_in_the_place_of_something_else(tmp_path: Path) -> None:
    ResultsFile(tmp_path / "r").append(record())
    (tmp_path / "bad.jsonl").write_text("{}\n")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "real").mkdir()
    (tmp_path / "real/page.html").write_text("old")
    (tmp_path / "page.html").symlink_to("real/page.html")
    for where, why in (
        ("pipe", "cannot be written: not a regular file"),
        ("/dev/null", "cannot be written: not a regular file"),
        ("r", "is a folder"),
        ("r/results.jsonl", "is one of the files to read"),
        ("bad.jsonl", "is one of the files to read"),
        ("x" * 300, "cannot be written: File name too long"),
    ):
        ended = mtp_mem(tmp_path, "report", "r/results.jsonl", "bad.jsonl", "-o", where)
        assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"mtp-mem: {where}: {why}\n")
    assert mtp_mem(tmp_path, "report", "r", "-o", "page.html").returncode == 0
    assert (tmp_path / "page.html").is_symlink()
    assert (tmp_path / "real/page.html").read_text().startswith("<!DOCTYPE")
    assert mtp_mem(tmp_path, "report", "pipe", "-o", "x.html").stderr == "mtp-mem: pipe: not a regular file\n"


def test_a_record_that_does_not_fit_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path)
    file.append(record())
    before = file.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
    try:
        with pytest.raises(BadInput, match=r"results\.jsonl: cannot be written: File too large"):
            file.append(record(n=2))
        file.replace([record(n=2)])  # nothing to drop, nothing to write
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.path.read_bytes() == before
    file.append(record(n=2))
    assert len(lines(file.path)) == 2


def write(folder: Path, name: str) -> None:
    file = ResultsFile(folder)
    for i in range(40):
        file.append(record(case=f"{name}-{i}", strategy=f"{name}{i}"))
        if i % 10 == 0:
            again = record(case=f"{name}-{i}-again", strategy=f"{name}{i}")
            file.append(again)
            file.replace([again])


def test_writers_of_one_file_lose_no_record(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(partial(write, tmp_path), "abc")) == [None] * 3
    file = ResultsFile(tmp_path)
    assert sorted(one.case for one in file.read()) == sorted(
        f"{name}-{i}{'-again' * (i % 10 == 0)}" for name in "abc" for i in range(40)
    )
    assert file.notes == []


def test_two_runs_into_one_folder(tmp_path: Path) -> None:
    folder = profile(tmp_path / "w")
    errors = [tmp_path / "first", tmp_path / "second"]
    runs = [start(folder, "compare", "--profile", "p.toml", "--out", "out", stderr=error) for error in errors]
    for one in runs:
        one.join(WAIT_S)
        assert one.exitcode == 0
    rows = lines(folder / "out/results.jsonl")
    assert {(row["strategy"], row["n"]) for row in rows} == {
        (s, n) for s in ("naive", "sequential", "chunked_vocab") for n in (1, 2)
    }
    messages = [error.read_text().count("another run writes to out now") for error in errors]
    assert sorted(messages) == [0, 1]


def test_losses_that_are_no_numbers(tmp_path: Path) -> None:
    odd = record(losses=(1.0, float("nan"), float("-inf"), -1e-9))
    file = ResultsFile(tmp_path)
    file.append(odd)
    assert lines(file.path)[0]["losses"] == [1.0, "nan", "-inf", -1e-9]
    (back,) = file.read()
    assert file.notes == []
    assert repr(back.losses) == repr(odd.losses)


def test_a_model_larger_than_memory_is_data(tmp_path: Path) -> None:
    ended = run(
        profile(tmp_path / "w", V=30_000_000), "compare", "--profile", "p.toml", "--out", "out",
        limits={resource.RLIMIT_AS: 6_500_000_000},
    )  # fmt: skip
    assert ended.returncode == 1
    rows = lines(tmp_path / "w/out/results.jsonl")
    assert [row["status"] for row in rows] == ["oom"] * 6
    assert "by closed form, the machine has 6.05 GiB" in str(rows[0]["error"])


def test_a_strategy_fits_where_the_reference_does_not(tmp_path: Path) -> None:
    ended = run(
        profile(tmp_path / "w", V=65_536, S=1024), "compare", "--profile", "p.toml", "--n", "1", "--out", "out",
        limits={resource.RLIMIT_DATA: 600 * 2**20},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    rows = {row["strategy"]: row for row in lines(tmp_path / "w/out/results.jsonl")}
    assert rows["naive"]["status"] == "oom"
    assert rows["chunked_vocab"]["status"] == "ok"
    assert rows["chunked_vocab"]["step_ms"]
    assert (rows["chunked_vocab"]["gradient_reference"], rows["chunked_vocab"]["gradient"]) == (
        "chunked_tokens",
        "within bound",
    )


def test_memory_ends_in_an_error_that_can_be_caught() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with bounded_memory(), pytest.raises(MemoryError):
        bytearray(2 * host_bytes())
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
