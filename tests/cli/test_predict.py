"""`mtp-mem predict` as a user runs it."""

import json
from pathlib import Path

import pytest
from command_line import mtp_mem

SHAPE = """
[model]
vocab_size = 32000
dim = 512
n_layers = 6
n_attention_heads = 8
n_kv_heads = 2
[workload]
batch = 1
sequence = 4096
dtype = "bf16"
tokenizer = "uniform"
[sweep]
n = [1, 4]
"""


SMALL = ("--profile", "shape.toml", "--gpu", "l4", "--n", "4", "--strategies", "naive,sequential")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    (folder / "shape.toml").write_text(SHAPE)
    (folder / "no-workload.toml").write_text(SHAPE.replace("[workload]", "[sweep.x]").split("[sweep.x]")[0])
    return folder


def test_predict(folder: Path) -> None:
    done = mtp_mem(folder, "predict", "--profile", "shape.toml", "--gpu", "L4", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert [(r["n"], r["strategy"]) for r in document["records"][:2]] == [(1, "naive"), (1, "sequential")]
    for record in document["records"]:
        assert (record["backend"], record["exactness"], record["status"]) == ("fake", "predicted", "ok")
        assert sum(record["bytes_at_peak"].values()) == record["peak_requested_bytes"]
        assert record["peak_requested_bytes"] <= record["peak_allocated_bytes"] <= record["peak_reserved_bytes"]
        assert record["tokens_per_s"] is None
    peaks = {(r["strategy"], r["n"]): r["peak_requested_bytes"] for r in document["records"]}
    assert peaks["naive", 4] - peaks["naive", 1] >= 3 * 4096 * 32000 * 4
    assert peaks["sequential", 4] <= peaks["sequential", 1] + 2 * 32000 * 512 * 2
    assert all(Path(folder / path).exists() for path in document["files"])


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits(folder: Path, columns: int) -> None:
    done = mtp_mem(
        folder,
        "predict",
        "--profile",
        "shape.toml",
        "--gpu",
        "l4",
        "--n",
        "4",
        "--strategies",
        "naive,sequential",
        columns=columns,
    )
    assert max(map(len, done.stdout.splitlines())) <= columns
    assert "…" not in done.stdout
    assert all(word in done.stdout for word in ("allocated", "fits", "not measured"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--gpu", "h300"], "unknown GPU 'h300'; did you mean 'h200'? Valid: a100-40gb"),
        (["--profile", "shape.toml", "--dtype", "fp64"], "cannot be predicted: no fused attention"),
        (["--profile", "no-workload.toml"], "key workload is missing (expected a table)"),
        (["--profile", "shape.toml", "--n", "9"], "valid: n from 1 to 6"),
    ],
)
def test_bad_input_is_one_line(folder: Path, args: list[str], words: str) -> None:
    done = mtp_mem(folder, "predict", *args)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
