"""What makes two cases one: all that their figures depend on, and nothing else."""

import json
from pathlib import Path

import pytest
from command_line import mtp_mem
from fixed import ENVIRONMENT, record

from mtp_mem import Training
from mtp_mem.runs.identity import implementation, key, setting
from mtp_mem.runs.read_results import groups, read
from mtp_mem.runs.results_file import ResultsFile
from mtp_mem.strategy import load_strategy

PROFILE = """
[model]
vocab_size = 256
dim = 32
n_layers = 2
n_attention_heads = 2
[workload]
batch = 1
sequence = 16
tokenizer = "bytes"
[sweep]
n = [1]
strategies = ["naive"]
rounds = 1
"""
OURS = "from mtp_mem.strategies.naive import Naive\nclass Mine(Naive):\n    pass\n"


@pytest.mark.parametrize(
    "changes",
    [
        {"environment": {**ENVIRONMENT, "threads": 7}},
        {"environment": {**ENVIRONMENT, "deterministic": True}},
        {"environment": {**ENVIRONMENT, "variables": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}}},
        {"workload": {**record("naive").workload, "digest": "another text"}},
        {"n": 2},
    ],
)
def test_what_makes_a_case_another_one(changes: dict[str, object]) -> None:
    assert key(record("naive", **changes)) != key(record("naive"))


def test_a_version_of_the_code_makes_no_other_case() -> None:
    newer = record("naive", environment={**ENVIRONMENT, "code": "newer", "torch": "3.0"}, implementation="source 1")
    assert key(newer) == key(record("naive"))


def test_an_older_record_lacks_what_was_usual_then() -> None:
    older = record("naive")
    newer = record(
        "naive",
        model={**older.model, "head_dim": None, "qkv_bias": False},
        training=Training().facts(older.workload["dtype"]),
        environment={**ENVIRONMENT, "deterministic": False, "tf32": False},
    )
    assert key(older) == key(newer)
    for training in (Training(micro_batches=2), Training(frozen="trunk"), Training(trunk_checkpointing="full")):
        assert key(record("naive", training=training.facts("fp32"))) != key(older)


def test_thread_counts_are_not_mixed(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path)
    file.append(record("naive", case="a"))
    file.append(record("sequential", case="b", environment={**ENVIRONMENT, "threads": 7}))
    apart = groups(read([tmp_path], []), [])
    assert [[one.strategy for one in group] for group in apart] == [["naive"], ["sequential"]]
    assert setting(apart[0][0])["threads"] != setting(apart[1][0])["threads"]


def test_ours_are_named_by_the_code_and_others_by_their_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert implementation(load_strategy("chunked_vocab")) == ""
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "packaged"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "help.py").write_text("FACTOR = 1\n")
    (package / "one.py").write_text(OURS)
    strategy = load_strategy("packaged.one:Mine")
    before = implementation(strategy)
    assert before.startswith("source ")
    assert implementation(strategy) == before
    (package / "help.py").write_text("FACTOR = 2\n")
    assert implementation(strategy) != before


def test_an_edited_strategy_is_run_again(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(PROFILE)
    (tmp_path / "edited.py").write_text(OURS)
    command = ("compare", "--profile", "small.toml", "--strategy", "edited:Mine", "--out", "out")
    assert mtp_mem(tmp_path, *command).returncode == 0
    assert "2 of 2 cases are in" in mtp_mem(tmp_path, *command).stderr
    (tmp_path / "edited.py").write_text(OURS + "    other = 1\n")
    assert "1 of 2 cases are in" in mtp_mem(tmp_path, *command).stderr


def test_a_record_is_lost_to_a_newer_one_of_its_case_only(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path)
    file.append(record("naive", case="old", environment={**ENVIRONMENT, "code": "old"}))
    with file.path.open("a") as lines:
        lines.write("{half a line\n")
    file.append(record("sequential", case="other"))
    file.append(record("naive", case="predicted", backend="fake", exactness="predicted"))
    newer = record("naive", case="new")
    file.append(newer)
    file.replace([newer])
    kept = file.path.read_text().splitlines()
    assert kept[0] == "{half a line"
    assert [json.loads(line)["case"] for line in kept[1:]] == ["other", "predicted", "new"]
    assert not list(tmp_path.glob(".*"))


def test_predicting_and_starting_over_keep_the_records_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(PROFILE)
    (tmp_path / "wide.toml").write_text(PROFILE.replace("dim = 32", "dim = 64"))
    shared = ("--profile", "small.toml", "--out", "out")
    assert mtp_mem(tmp_path, "compare", *shared).returncode == 0
    assert mtp_mem(tmp_path, "predict", "--gpu", "h200", "--dtype", "bf16", *shared).returncode == 0
    assert mtp_mem(tmp_path, "compare", "--profile", "wide.toml", "--fresh", "--out", "out").returncode == 0
    assert mtp_mem(tmp_path, "predict", "--gpu", "l4", "--dtype", "bf16", *shared).returncode == 0
    assert mtp_mem(tmp_path, "predict", "--gpu", "l4", "--dtype", "bf16", *shared).returncode == 0
    records = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [(r["backend"], r["model"]["dim"], r["environment"].get("target")) for r in records] == [
        ("cpu", 32, None),
        ("fake", 32, "NVIDIA H200"),
        ("cpu", 64, None),
        ("fake", 32, "NVIDIA L4"),
    ]
