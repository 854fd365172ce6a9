"""The command as a user runs it, with its exit codes, files and one-line errors; a few times in its own process."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import pytest
from command_line import Ended, mtp_mem

from mtp_mem.cli import main

PROFILE = """
description = "small"
[model]
vocab_size = 2048
dim = 32
n_layers = 4
n_attention_heads = 2
[workload]
batch = 2
sequence = 64
[sweep]
n = [1, 3]
strategies = ["naive", "sequential", "chunked_vocab", "checkpointed"]
rounds = 2
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "small.toml").write_text(PROFILE)
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def compared(work: Path) -> Ended:
    """In a process of its own, as a user starts it."""
    command = [sys.executable, "-m", "mtp_mem", "compare", "--profile", "small.toml"]
    ended = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=300)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def test_compare(work: Path, compared: Ended) -> None:
    assert compared.returncode == 0, compared.stderr
    assert compared.stderr == ""  # no progress bar in a pipe, no warnings
    out = work / "results" / "small"
    assert sorted(p.name for p in out.iterdir()) == [
        "memory-vs-n.csv",
        "memory-vs-n.png",
        "memory-vs-n.svg",
        "results.jsonl",
    ]
    records = lines(out / "results.jsonl")
    assert [(r["strategy"], r["n"]) for r in records] == [
        (s, n) for n in (1, 3) for s in ("naive", "sequential", "chunked_vocab", "checkpointed")
    ]
    for record in records:
        assert record["status"] == "ok"
        assert record["backend"] == "cpu"
        assert record["exactness"] == "tracked"
        assert record["peak_reserved_bytes"] is None
        assert sum(record["bytes_at_peak"].values()) == record["peak_requested_bytes"]
        assert record["peak_requested_bytes"] - record["baseline_bytes"] == record["peak_over_baseline_bytes"] > 0
        assert record["tokens_per_s"] > 0
        assert record["step_ms_p20"] <= record["step_ms"] <= record["step_ms_p80"]
        assert record["host_rss_bytes"] > record["peak_over_baseline_bytes"]
        assert record["environment"]["torch"]
    verdicts = {r["strategy"]: r["gradient"] for r in records if r["n"] == 3}
    assert verdicts == {
        **dict.fromkeys(("naive", "sequential", "checkpointed"), "bit-identical"),
        "chunked_vocab": "within bound",
    }
    rows = list(csv.DictReader((out / "memory-vs-n.csv").open()))
    assert [int(r["peak_over_baseline_bytes"]) for r in rows] == [r["peak_over_baseline_bytes"] for r in records]
    svg = (out / "memory-vs-n.svg").read_text()
    assert all(name in svg for name in verdicts)
    last = compared.stdout.split("\n\n")[-1]
    assert "At n = 3 use" in last.replace("\n", " ")


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits(work: Path, compared: Ended, columns: int) -> None:
    out = mtp_mem(work, "compare", "--profile", "small.toml", columns=columns).stdout
    assert max(map(len, out.splitlines())) <= columns
    assert "…" not in out
    for column in ("n", "strategy", "over base", "/naive", "step ms", "gradients"):
        assert column in out.splitlines()[0]


def test_json_is_one_document_and_nothing_is_run_twice(work: Path, compared: Ended) -> None:
    before = (work / "results/small/results.jsonl").read_bytes()
    again = mtp_mem(work, "compare", "--profile", "small.toml", "--json")
    document = json.loads(again.stdout)
    assert len(document["records"]) == 8
    assert document["advice"].startswith("At n = 3 use")
    assert "8 of 8 cases are in" in again.stderr
    assert (work / "results/small/results.jsonl").read_bytes() == before


def test_a_damaged_line_is_named_and_its_case_run_again(work: Path, compared: Ended) -> None:
    whole = (work / "results/small/results.jsonl").read_text().splitlines()
    out = work / "damaged"
    out.mkdir()
    newer = json.dumps({**json.loads(whole[0]), "schema": 99})
    (out / "results.jsonl").write_text("\n".join([newer, *whole[1:7], whole[7][:100]]))
    done = mtp_mem(work, "compare", "--profile", "small.toml", "--out", "damaged")
    assert done.returncode == 0
    assert "results.jsonl:1: skipped: schema 99; this version reads schema 1" in done.stderr
    assert "results.jsonl:8: skipped: not a whole JSON object" in done.stderr
    assert "6 of 8 cases are in" in done.stderr
    kept = (out / "results.jsonl").read_text().splitlines()
    assert kept[:7] == [newer, *whole[1:7]]  # what could not be read is left alone
    assert [json.loads(line)["strategy"] for line in kept[8:]] == ["naive", "checkpointed"]


def test_an_interrupted_run_continues(work: Path) -> None:
    results = work / "interrupted" / "results.jsonl"
    options = ("--n", "1,2,3,4", "--strategies", "sequential,checkpointed", "--rounds", "1", "--out", "interrupted")
    args = ("compare", "--profile", "small.toml", *options)
    finished = ""
    for done, how in ((2, signal.SIGINT), (4, signal.SIGTERM), (6, signal.SIGKILL)):  # lines: two at each n
        running = forked.start(work, *args)
        deadline = time.monotonic() + 120
        while not results.exists() or results.read_text().count("\n") < done:
            assert running.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(running.pid or 0, how)
        running.join(60)
        if how == signal.SIGKILL:
            assert running.exitcode == -how
        else:
            err = work.with_name(f"{work.name}.err").read_text()
            assert running.exitcode == 130
            assert "the same command runs the others" in err
            assert "Traceback" not in err
        assert results.read_text().startswith(finished)
        finished = results.read_text()
        assert finished.count("\n") == done
    again = mtp_mem(work, *args)
    assert again.returncode == 0
    assert "6 of 8 cases are in" in again.stderr
    assert results.read_text().startswith(finished)
    assert [(r["strategy"], r["n"]) for r in lines(results)] == [
        (strategy, n) for n in (1, 2, 3, 4) for strategy in ("sequential", "checkpointed")
    ]


def test_fresh_starts_over(work: Path) -> None:
    args = ("compare", "--profile", "small.toml", "--n", "1", "--strategies", "sequential", "--out", "fresh")
    assert mtp_mem(work, *args).returncode == 0
    first = lines(work / "fresh/results.jsonl")
    assert mtp_mem(work, *args, "--fresh").returncode == 0
    second = lines(work / "fresh/results.jsonl")
    assert len(first) == len(second) == 1
    assert first != second
    assert second[0]["gradient"] == "bit-identical"  # checked against naive although naive was not asked for


THIRD_PARTY = """
from dataclasses import dataclass

import torch
from mtp_mem.model.losses import full
from mtp_mem.strategies.sequential import Sequential

print("theirs is loaded")

class Forward:
    '''Sequential with the first head first.'''
    def __init__(self):
        print("Forward is made")

    def backward(self, cut, heads, targets, weights):
        losses = []
        for head in heads.roots:
            loss = heads.loss(head, heads.hidden(head, cut), targets[head.index], full)
            heads.backward([loss], [weights[head.index]])
            losses.append(loss.detach())
        return torch.stack(losses)

class Doubled(Forward):
    '''Wrong on purpose.'''
    def backward(self, cut, heads, targets, weights):
        return super().backward(cut, heads, targets, 2 * weights)

@dataclass(frozen=True, kw_only=True)
class Rocket(Sequential):
    '''Sequential under a name that is also an emoji's.'''
    word: str = ""

class Broken:
    '''Raises.'''
    def backward(self, cut, heads, targets, weights):
        raise ValueError("not today")

class Greedy:
    '''Asks for more memory than there is.'''
    def backward(self, cut, heads, targets, weights):
        return torch.empty(2**60)
"""


def test_third_party_strategies(work: Path) -> None:
    (work / "theirs.py").write_text(THIRD_PARTY)
    args = ("compare", "--profile", "small.toml", "--n", "3", "--strategies", "naive", "--out", "theirs", "--json")
    right = mtp_mem(work, *args, "--strategy", "theirs:Forward", "--strategy", "theirs:Greedy")
    assert right.returncode == 0, right.stderr
    wrong = mtp_mem(work, *args, "--strategy", "theirs:Doubled", "--strategy", "theirs:Broken")
    assert wrong.returncode == 1, wrong.stderr
    records = {r["strategy"]: r for ended in (right, wrong) for r in json.loads(ended.stdout)["records"]}
    assert {name: (r["status"], r["gradient"]) for name, r in records.items()} == {
        "naive": ("ok", "bit-identical"),
        "theirs:Forward": ("ok", "within bound"),
        "theirs:Greedy": ("oom", "unchecked"),
        "theirs:Doubled": ("ok", "differs"),
        "theirs:Broken": ("error", "unchecked"),
    }
    assert "ValueError: not today" in records["theirs:Broken"]["error"]


def test_a_spec_is_printed_as_it_is(work: Path) -> None:
    """It is neither the terminal library's markup nor one of its emoji."""
    (work / "theirs.py").write_text(THIRD_PARTY)
    specs = ("theirs:Rocket:word=x", "theirs:Rocket:word=[red]")
    args = ("--profile", "small.toml", "--n", "1", "--strategies", ",".join(("naive", *specs)))
    for command in ("compare", "predict", "plan", "verify"):
        printed = mtp_mem(work, command, *args).stdout
        assert all(spec in printed for spec in specs), printed


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--strategies", "sequental"], 2, "unknown strategy 'sequental'; did you mean 'sequential'?"),
        (["--strategies", "chunked_vocab:chunk=0"], 2, "chunk = 0: expected a whole number of at least 1"),
        (["--strategies", "chunked_vocab:size=1"], 2, "unknown option 'size'"),
        (["--strategy", "nowhere:Class"], 2, "no module 'nowhere'"),
        (["--profile", "quik"], 2, "unknown profile 'quik'; did you mean 'quick'?"),
        (["--profile", "none.toml"], 2, "none.toml: cannot be read"),
        (["--profile", "broken.toml"], 2, "broken.toml: is not valid TOML"),
        (["--n", "1,5"], 2, "n = 5 heads"),
        (["--n", "0"], 2, "sweep.n = [0]"),
        (["--n", "two"], 2, "expected whole numbers"),
        (["--dtype", "fp8"], 2, "unknown value 'fp8'"),
        (["--rounds", "0"], 2, "sweep.rounds = 0"),
        (["--text", "none.txt"], 2, "none.txt: cannot be read"),
        (["--text", "latin1.txt"], 2, "latin1.txt: not UTF-8"),
        (["--text", "short.txt"], 2, "short.txt: too short"),
        (["--device", "tpu"], 2, "expected auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:"], 2, "'cuda:': expected auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99999999999999999999"], 2, "expected auto, cpu, cuda or cuda:N"),
        (["--out", "/proc/nowhere"], 2, "/proc/nowhere: cannot be written"),
        (["--out", "small.toml"], 2, "small.toml: cannot be written"),
    ],
)
def test_bad_input_is_one_line(work: Path, args: list[str], code: int, words: str) -> None:
    (work / "broken.toml").write_text("[model\n")
    (work / "bytes.toml").write_text(PROFILE.replace("sequence = 64", 'sequence = 64\ntokenizer = "bytes"'))
    (work / "short.txt").write_text("short")
    (work / "latin1.txt").write_bytes("gärten".encode("latin-1"))
    before = sorted(p.name for p in work.iterdir())
    profile = "bytes.toml" if "--text" in args else "small.toml"
    done = mtp_mem(work, "compare", *(["--profile", profile] if "--profile" not in args else []), *args)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 or "usage:" in done.stderr
    assert sorted(p.name for p in work.iterdir() if p.name != "results") == [n for n in before if n != "results"]


def test_cuda_asked_for_and_absent(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = mtp_mem(work, "compare", "--profile", "small.toml", "--device", "cuda")
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "device cuda" in done.stderr


def test_list_and_env(work: Path) -> None:
    listed = mtp_mem(work, "list")
    assert listed.returncode == 0
    assert all(name in listed.stdout for name in ("naive", "sequential", "chunked_vocab", "checkpointed", "quick"))
    assert json.loads(mtp_mem(work, "list", "--json").stdout)["strategies"]["sequential"].startswith("Each head")
    document = json.loads(mtp_mem(work, "env", "--json").stdout)
    assert document["device"]
    assert document["host_bytes"] > 2**30


def test_anything_unexpected_is_not_a_failed_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("mtp_mem.cli.listing.environment", broken)
    assert main(["env"]) == 70
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [80, 120])
def test_the_list_fits_the_terminal(work: Path, columns: int) -> None:
    listed = mtp_mem(work, "list", columns=columns).stdout
    assert max(map(len, listed.splitlines())) <= columns
    assert " ".join(listed.split()).count("the paper's schedule") == 1  # wrapped, not cut


def test_the_console_script_is_the_module(work: Path) -> None:
    script = Path(sys.executable).with_name("mtp-mem")
    said = subprocess.run([script, "list", "--json"], capture_output=True, text=True, check=True).stdout
    assert said == mtp_mem(work, "list", "--json").stdout
