"""`mtp-mem profile check`: what a profile is, and mistakes in one line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mtp_mem.cli import main
from mtp_mem.strategy import loadable

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in an empty folder, in this process: starting one takes longer than most commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*args: str) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        code = main(args)
        return subprocess.CompletedProcess(args, code, *capsys.readouterr())

    return call


def test_check(run: Run) -> None:
    shown = run("profile", "check", "llama3-8b")
    assert (shown.returncode, shown.stderr) == (0, "")
    for words in ("8,030,261,248", "1,050,673,152 a head (N V), 3.91 GiB", "15.0 GiB", "possible n  1 to 32"):
        assert words in shown.stdout
    for args in (("profile", "--json", "check", "mtp-7b-bytes"), ("profile", "check", "mtp-7b-bytes", "--json")):
        document = json.loads(run(*args).stdout)
        rows = document["cases"]
        assert [row["n"] for row in rows] == [1, 8, 16, 32]
        assert rows[1]["parameters"] - rows[0]["parameters"] == 7 * 256 * 4096  # replicated unembeddings
        assert all(row["weight_bytes"] == 2 * row["parameters"] == 2 * sum(row["parts"].values()) for row in rows)
        assert document["logits"] == {"shape": [8192, 256], "values": 8192 * 256, "bytes": 8192 * 256 * 4}
        assert document["largest_n"] == 32


CHECKED = """
[model]
vocab_size = 300
dim = 32
n_layers = 8
n_attention_heads = 2
[workload]
batch = 1
sequence = 8
"""


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("batch = 1", "batch = 1\nhidden = 3", "unknown key 'workload.hidden'"),
        ("batch = 1", "btach = 1", "unknown key 'workload.btach'; did you mean 'workload.batch'?"),
        ("sequence = 8", "sequence = 8\n[sweep]\nstrategies = ['sequental']", "did you mean 'sequential'?"),
        ("batch = 1", "batch = 1\ndtype = 'fp8'", "unknown value 'fp8'"),
        ("= 300", "= 67", "model.vocab_size = 67 is smaller than the 256 byte tokens"),
        ("= 300", f"= {10**18}", "no machine has a model with more than"),
    ],
)
def test_check_names_mistakes(tmp_path: Path, run: Run, before: str, after: str, words: str) -> None:
    path = tmp_path / "p.toml"
    path.write_text(CHECKED)
    good = run("profile", "check", "p.toml")
    assert (good.returncode, good.stderr) == (0, "")
    path.write_text(CHECKED.replace(before, after))
    done = run("profile", "check", "p.toml")
    assert done.returncode == 2
    assert words in done.stderr
    assert (done.stderr.count("\n"), done.stdout) == (1, "")


def test_check_says_what_does_not_run_everywhere(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "p.toml"
    text = CHECKED.replace("dim = 32", "dim = 576").replace("sequence = 8", "sequence = 8\ndtype = 'bf16'")
    path.write_text(text)
    done = run("profile", "check", "p.toml")
    assert done.returncode == 0
    assert done.stderr == "note: D / heads = 288: flash attention on CUDA takes at most 256\n"
    if "liger" not in loadable():
        path.write_text(f"{text}[sweep]\nstrategies = ['liger', 'naive']\n")
        done = run("profile", "check", "p.toml")
        assert done.returncode == 0
        assert "note: liger cannot run here: " in done.stderr
