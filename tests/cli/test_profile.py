"""`mtp-mem profile`: a config becomes a profile that can be run, mistakes are one line, nothing is half-written."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hf_configs import CONFIGS, PUBLISHED, changed

from mtp_mem.cli import main
from mtp_mem.config.profiles import load_profile, to_toml
from mtp_mem.model.hf import convert
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


def tiny(tmp_path: Path, name: str, **changes: Any) -> Path:
    """A config whose step is quick to predict."""
    small = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 2048,
    }
    return changed(tmp_path, name, **small | changes)


def test_as_a_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mtp_mem", "profile", "new", "--from-hf", str(CONFIGS / "llama-3-8b.json")]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "note: 8,030,261,248 parameters by the config, as many here\n")
    assert found.stdout.startswith(
        "# From the config.json of a llama by `mtp-mem profile new`: 8,030,261,248 parameters"
    )
    assert found.stdout.endswith(to_toml(convert(CONFIGS / "llama-3-8b.json", name="llama-3-8b").profile))


@pytest.mark.parametrize("name", ["llama-3-8b", "gemma-2-2b", "qwen3-8b"])
def test_what_is_written_can_be_predicted(tmp_path: Path, run: Run, name: str) -> None:
    tiny(tmp_path, name)
    options = ("-o", "tiny.toml", "--n", "1,2", "--sequence", "128", "--batch", "2", "--approximate")
    written = run("profile", "new", "--from-hf", "config.json", *options)
    assert written.returncode == 0, written.stderr
    assert written.stderr.startswith("note: ")
    predicted = run("predict", "--profile", "tiny.toml", "--strategies", "naive,sequential", "--json")
    assert predicted.returncode == 0, predicted.stderr
    records = json.loads(predicted.stdout)["records"]
    assert [r["n"] for r in records] == [1, 1, 2, 2]
    assert all(r["status"] == "ok" and r["peak_requested_bytes"] > r["baseline_bytes"] for r in records)


def test_a_prediction_with_mtp_depths(tmp_path: Path, run: Run) -> None:
    small = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "kv_lora_rank": 16, "q_lora_rank": None}
    path = tiny(tmp_path, "deepseek-v3", num_key_value_heads=4, **small)
    assert run("profile", "new", "--from-hf", path.name, "-o", "d.toml", "--approximate").returncode == 0
    predicted = run("predict", "--profile", "d.toml", "--strategies", "sequential", "--json")
    assert [r["n"] for r in json.loads(predicted.stdout)["records"]] == [1, 2]


def test_new_on_stdout_and_as_json(tmp_path: Path, run: Run) -> None:
    source = str(CONFIGS / "qwen2-7b.json")
    plain, document = (
        run("profile", "new", "--from-hf", source),
        json.loads(run("profile", "new", "--from-hf", source, "--json").stdout),
    )
    assert tomllib.loads(plain.stdout)["model"]["ffn_dim"] == 18944
    assert document["toml"] == plain.stdout
    assert document["parameters"]["config"] == PUBLISHED["qwen2-7b"]
    assert all(f"note: {text}" in plain.stderr for text in document["notes"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--from-hf", "none.json"], "none.json: cannot be read: No such file"),
        (["--from-hf", "."], ".: cannot be read: Is a directory"),
        (["--from-hf", "broken.json"], "broken.json: is not valid JSON"),
        (["--from-hf", "list.json"], "list.json: is not a Hugging Face config: expected a JSON object"),
        (["--from-hf", "latin1.json"], "latin1.json: is not valid JSON"),
        (["-o", "there.toml"], "there.toml: is there already; force replaces it"),
        (["-o", "new.txt"], "new.txt: a profile's file must end in .toml"),
        (["-o", "nowhere/new.toml"], "nowhere/new.toml: cannot be written: No such file"),
        (["--n", "1,33"], "n = 33 heads need 33 of the model's layers"),
        (["--n", "0"], "sweep.n = [0]"),
        (["--batch", "0"], "workload.batch = 0: must be at least 1"),
        (["--sequence", "0"], "workload.sequence = 0: must be at least 1"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, run: Run, args: list[str], words: str) -> None:
    changed(tmp_path, "llama-3-8b")
    (tmp_path / "broken.json").write_text('{"model_type": ')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "latin1.json").write_bytes('{"a": "ä"}'.encode("latin-1"))
    (tmp_path / "there.toml").write_text("mine")
    before = sorted(p.name for p in tmp_path.iterdir())
    source = [] if "--from-hf" in args else ["--from-hf", "config.json"]
    found = run("profile", "new", *source, *args)
    assert found.returncode == 2
    assert words in found.stderr
    assert found.stderr.count("\n") == 1
    assert found.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (tmp_path / "there.toml").read_text() == "mine"


def test_force_replaces(tmp_path: Path, run: Run) -> None:
    (tmp_path / "there.toml").write_text("mine")
    source = str(CONFIGS / "llama-3-8b.json")
    assert run("profile", "new", "--from-hf", source, "-o", "there.toml", "--force").returncode == 0
    assert load_profile(str(tmp_path / "there.toml")).model.dim == 4096


def test_check(run: Run) -> None:
    shown = run("profile", "check", "llama3-8b")
    assert shown.returncode == 0
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
        ("batch = 1", "batch = 1\ndtype = 'fp16'", "unknown value 'fp16'"),
        ("= 300", "= 67", "model.vocab_size = 67 is smaller than the 256 byte tokens"),
        ("= 300", f"= {10**18}", "no model of this shape can be made"),
    ],
)
def test_check_names_mistakes(tmp_path: Path, run: Run, before: str, after: str, words: str) -> None:
    path = tmp_path / "p.toml"
    path.write_text(CHECKED)
    good = run("profile", "check", "p.toml")
    assert (good.returncode, good.stderr) == (0, "")
    path.write_text(CHECKED.replace(before, after))
    found = run("profile", "check", "p.toml")
    assert found.returncode == 2
    assert words in found.stderr
    assert (found.stderr.count("\n"), found.stdout) == (1, "")


def test_check_says_what_does_not_run_everywhere(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "p.toml"
    text = CHECKED.replace("dim = 32", "dim = 576").replace("sequence = 8", "sequence = 8\ndtype = 'bf16'")
    path.write_text(text)
    found = run("profile", "check", "p.toml")
    assert found.returncode == 0
    assert found.stderr == "note: D / heads = 288: flash attention on CUDA takes at most 256\n"
    if "liger" not in loadable():
        path.write_text(f"{text}[sweep]\nstrategies = ['liger', 'naive']\n")
        found = run("profile", "check", "p.toml")
        assert found.returncode == 0
        assert "note: liger cannot run here: " in found.stderr
