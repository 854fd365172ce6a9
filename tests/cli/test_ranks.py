"""`--nproc` and torchrun: a sweep on two ranks, one of which fails; finished cases are kept."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import mtp_mem

PROFILE = """
[model]
vocab_size = 257
dim = 32
n_layers = 3
n_attention_heads = 2
[workload]
batch = 1
sequence = 16
dtype = "fp32"
tokenizer = "bytes"
[sweep]
n = [2]
rounds = 1
strategies = ["naive", "outside:OnRankOne", "sequential"]
"""
OUTSIDE = '''
import torch.distributed as dist
from mtp_mem.strategies.sequential import Sequential

class OnRankOne(Sequential):
    """Raises on one rank alone."""

    def loss_backward(self, *args):
        if dist.is_initialized() and dist.get_rank() == 1:
            raise ValueError("only here")
        return super().loss_backward(*args)
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny.toml").write_text(PROFILE)
    (tmp_path / "outside.py").write_text(OUTSIDE)
    return tmp_path


def test_a_strategy_that_fails_on_one_rank_is_a_row(folder: Path) -> None:
    command = ("compare", "--profile", "tiny.toml", "--nproc", "2", "--out", "out")
    ended = mtp_mem(folder, *command, "--json")
    assert ended.returncode == 1
    records = {record["strategy"]: record for record in json.loads(ended.stdout)["records"]}
    failed = records.pop("outside:OnRankOne")
    assert (failed["status"], failed["error"]) == ("error", "rank 1: ValueError: only here (outside.py:10)")
    for record in records.values():
        assert (record["status"], record["gradient"]) == ("ok", "bit-identical")
        assert record["training"]["sharding"] == "fsdp2"
        assert record["collectives"] == {"all-gather": 8, "reduce-scatter": 6, "all-reduce": 1}
    for suffix in ("png", "svg", "csv"):
        assert (folder / "out" / f"collectives.{suffix}").stat().st_size
    shown = mtp_mem(folder, *command, "--strategies", "naive,sequential")
    assert shown.returncode == 0, shown.stderr
    assert "2 of 2 cases are in" in shown.stderr
    assert "a step, with" in shown.stdout
    assert "fsdp2 over 2 ranks" in shown.stdout


def test_under_torchrun_what_is_finished_is_kept(folder: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--")
    command = ("mtp_mem", "compare", "--profile", "tiny.toml", "--sharding", "ddp", "--out", "out")
    done = subprocess.run([*torchrun, *command], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "mtp-mem: rank 1, ('outside:OnRankOne', 2): ValueError: only here (outside.py:10)" in done.stderr
    lines = [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]
    assert [(line["strategy"], line["status"], line["gradient"]) for line in lines] == [
        ("naive", "ok", "bit-identical")
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--sharding", "ddp"), "how many ranks? --nproc N, or torchrun"),
        (("--nproc", "2", "--world", "4"), "--world 4 with 2 ranks: leave --world out"),
        (("--nproc", "2", "--sharding", "hsdp"), "hsdp shards over 8 ranks; expected a multiple of 8"),
        (("--nproc", "0"), "expected a whole number of at least 1"),
    ],
)
def test_bad_numbers_of_ranks(folder: Path, options: tuple[str, ...], words: str) -> None:
    ended = mtp_mem(folder, "compare", "--profile", "tiny.toml", *options)
    assert ended.returncode == 2
    assert words in ended.stderr
