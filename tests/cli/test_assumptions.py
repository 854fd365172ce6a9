"""What a prediction says of the cuBLAS workspaces and the allocator that it assumes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtp_mem.cli import main
from mtp_mem.config.gpus import load_gpu
from mtp_mem.environment import environment
from mtp_mem.prediction.cuda.cublas import workspaces
from mtp_mem.prediction.peaks import assumptions

SHAPE = """
[model]
vocab_size = 1000
dim = 64
n_layers = 3
n_attention_heads = 4
[workload]
batch = 1
sequence = 128
dtype = "bf16"
tokenizer = "uniform"
[sweep]
n = [1]
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(SHAPE)
    environment.cache_clear()
    yield ["--profile", "small.toml", "--gpu", "h100-80gb", "--n", "1", "--strategies", "naive"]
    environment.cache_clear()  # which keeps what it has seen of the variables


def document(capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    assert main([*args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_command_that_predicts_says_it(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (record,) = document(capsys, "predict", *small)["records"]
    (stated,) = record["environment"]["assumptions"]
    assert stated == assumptions(load_gpu("h100-80gb"))[0]
    assert "33,554,432 B" in stated
    assert document(capsys, "timeline", *small[:-2], "--strategy", "naive")["assumptions"] == [stated]
    assert document(capsys, "plan", *small, "--vary", "micro_batches")["assumptions"] == [stated]
    assert main(["predict", *small]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"Assumed: {stated}." in text


def test_settings_of_the_allocator_are_followed_or_named(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small[3] = "l4"  # whose workspaces are small enough for a segment that is shared
    (plain,) = document(capsys, "predict", *small)["records"]
    settings = "large_segment_size_mb:64,roundup_power2_divisions:4"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", settings)
    environment.cache_clear()
    (record,) = document(capsys, "predict", *small)["records"]
    assert record["peak_requested_bytes"] == plain["peak_requested_bytes"]
    assert record["peak_reserved_bytes"] > plain["peak_reserved_bytes"]
    named = "the allocator has settings that its model does not cover: roundup_power2_divisions:4"
    assert record["environment"]["assumptions"][1:] == [named]
    assert record["environment"]["target"] == f"NVIDIA L4, {settings}"
    assert record["environment"]["variables"]["PYTORCH_CUDA_ALLOC_CONF"] == settings
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "large_segment_size_mb:many")
    assert main(["predict", *small]) == 2
    error = capsys.readouterr().err
    assert "PYTORCH_ALLOC_CONF = 'large_segment_size_mb:many'" in error
    assert "expected a whole number of MiB" in error


def test_the_heads_alone(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (whole,) = document(capsys, "predict", *small)["records"]
    (heads,) = document(capsys, "predict", *small, "--part", "heads")["records"]
    assert heads["training"] == whole["training"] | {"part": "heads"}
    assert heads["case"] != whole["case"]
    # A layer, a norm and the unembedding in bf16, hidden states, targets; and workspaces.
    above = (4 * 64 * 64 + 3 * 64 * 192 + 3 * 64 + 1000 * 64 + 128 * 64) * 2 + 8 * 128
    assert heads["baseline_bytes"] == above + sum(workspaces(load_gpu("h100-80gb")).resident())
    assert main(["predict", *small, "--part", "heads"]) == 0
    assert "trained in bf16, the heads alone" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["predict", "--part", "trunk"], "training.part: unknown value 'trunk'"),
        (["timeline", "--part", "heads"], "training.part = 'heads': whole steps run here"),
    ],
)
def test_bad_parts(command: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    assert words in capsys.readouterr().err


def test_a_profile_of_the_heads_alone_is_not_run(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.toml").write_text(SHAPE + '[training]\npart = "heads"\n')
    for command in ("plan", "compare"):
        args = small if command == "plan" else [*small[:2], "--n", "1"]
        assert main([command, *args]) == 2
        assert "training.part = 'heads'" in capsys.readouterr().err
