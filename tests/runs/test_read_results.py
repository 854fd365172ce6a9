"""Reading results for a report: what is damaged is named by file and line, the rest is used, nothing is written."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fixed import ENVIRONMENT, MODEL, record, records

from mtp_mem.errors import BadInput
from mtp_mem.report.charts import memory_vs_n
from mtp_mem.report.content import gpu_of
from mtp_mem.runs.read_results import groups, machine, read
from mtp_mem.runs.record import Record


def line(**changes: Any) -> str:
    return json.dumps({**record().to_json(), **changes})


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def test_equal_facts_are_one_table_and_others_are_not() -> None:
    wide = {**record().model, "dim": 2 * record().model["dim"]}
    one, same, other = (Record.from_json(json.loads(text)) for text in (line(), line(), line(model=wide)))
    assert one.model is same.model
    assert one.environment is other.environment
    assert (one, other.model["dim"]) == (record(), 2 * one.model["dim"])


def test_damaged_lines_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    whole = line()
    results = write(tmp_path / "results.jsonl", line(schema=2), whole, "[1]", "", whole[:80])
    notes: list[str] = []
    located = read([results], notes)
    assert [(one.path, one.line) for one in located] == [(results, 2)]
    assert notes == [
        f"{results}:1: skipped: schema 2; this version reads schema 1; update mtp_mem",
        f"{results}:3: skipped: not a JSON object",
        f"{results}:5: skipped: not a whole JSON object (cut off?)",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n": "4"}, "n = '4': expected a whole number"),
        ({"n": 0}, "n = 0: not a number of heads"),
        ({"step_ms": 1e-320}, "step_ms = 1e-320: expected at least 1e-09"),
        ({"environment": {**ENVIRONMENT, "variables": 5}}, "environment.variables = 5: expected a table"),
        ({"peak_requested_bytes": -1}, "peak_requested_bytes = -1"),
        ({"peak_requested_bytes": True}, "peak_requested_bytes = True"),
        ({"step_ms": float("nan")}, "holds NaN, which JSON does not have"),
        ({"step_ms": 10**400}, "holds a whole number beyond 2**63"),
        ({"losses": [1.0, float("nan")]}, "holds NaN, which JSON does not have"),
        ({"status": "fine"}, "status: unknown value 'fine'"),
        ({"bytes_at_peak": {"logits": "many"}}, "bytes_at_peak.logits = 'many': expected a whole number"),
        ({"environment": {}}, "key environment.mtp_mem is missing (expected a string)"),
        ({"environment": {**ENVIRONMENT, "cpu": 7}}, "environment.cpu = 7: expected a string"),
        ({"model": MODEL}, "key model.n_future is missing"),
        ({"model": {**MODEL, "n_future": 1, "dim": 0}}, "model.dim = 0: must be from 1 to"),
        ({"model": {**MODEL, "n_future": True}}, "model.n_future = True: expected a whole number"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    results = write(tmp_path / "results.jsonl", line(), line(case="other", **changes))
    notes: list[str] = []
    assert len(read([results], notes)) == 1
    assert len(notes) == 1
    assert notes[0].startswith(f"{results}:2: skipped: {words}")


def test_sound_records_pass() -> None:
    recorded = Path(__file__).parents[2] / "profiles" / "recorded"
    notes: list[str] = []
    located = read([recorded], notes)
    assert len(located) >= 32
    assert not [note for note in notes if "skipped" in note]
    differing = record(gradient="differs", gradient_error=float("inf"))
    assert Record.from_json(json.loads(json.dumps(differing.to_json()))) == differing


RECORDED = sorted((Path(__file__).parents[2] / "profiles" / "recorded").rglob("results.jsonl"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.parent.name)
def test_recorded_charts_are_drawn_from_recorded_figures(path: Path, tmp_path: Path) -> None:
    (records,) = groups(read([path], []), [])  # of older versions' records of a case, which are kept, the last
    gpu = gpu_of(records[0])
    memory_vs_n(records, tmp_path, gpu)
    # But for the formula, the last column, which may learn.
    drawn, kept = (
        [line.rpartition(",")[0] for line in file.read_text().splitlines()]
        for file in (tmp_path / "memory-vs-n.csv", path.with_name("memory-vs-n.csv"))
    )
    assert drawn == kept
    assert path.with_name("memory-vs-n.png").stat().st_size > 10_000


@pytest.mark.parametrize("content", ["", "\n", "not json\n", line(schema=2) + "\n"])
def test_no_usable_record(tmp_path: Path, content: str) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text(content)
    with pytest.raises(BadInput, match="no usable record") as e:
        read([results], [])
    assert str(results) in str(e.value)
    assert "\n" not in str(e.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.jsonl: cannot be read: No such file"):
        read([tmp_path / "none.jsonl"], [])
    with pytest.raises(BadInput, match=r"holds no results\.jsonl"):
        read([tmp_path], [])


def test_nothing_is_written(tmp_path: Path) -> None:
    results = write(tmp_path / "a" / "results.jsonl", line())
    before = (results.stat().st_mtime_ns, sorted(os.listdir(tmp_path / "a")))
    results.chmod(0o444)
    (tmp_path / "a").chmod(0o555)
    try:
        assert len(read([tmp_path], [])) == 1
    finally:
        (tmp_path / "a").chmod(0o755)
    assert (results.stat().st_mtime_ns, sorted(os.listdir(tmp_path / "a"))) == before


def test_machines_models_and_predictions_stand_apart(tmp_path: Path) -> None:
    there = {**ENVIRONMENT, "device": "NVIDIA H200"}
    results = write(
        tmp_path / "results.jsonl",
        *(json.dumps(r.to_json()) for r in records()),
        line(case="gpu", environment=there, backend="cuda", exactness="measured"),
        line(case="wide", model={**MODEL, "n_future": 1, "vocab_size": 16384}),
        line(case="again", step_ms=7.0),
    )
    notes: list[str] = []
    grouped = groups(read([results], notes), notes)
    assert [len(group) for group in grouped] == [16, 1, 1]
    assert [machine(group[0]) for group in grouped] == ["A CPU", "NVIDIA H200", "A CPU"]
    assert next(r.step_ms for r in grouped[0] if (r.strategy, r.n) == ("naive", 1)) == 7.0
    assert notes == [
        f"{results}:1: replaced by {results}:19: naive at n = 1",
        f"{results}: records of 2 machines, shown apart: A CPU from line 1; NVIDIA H200 from line 17",
    ]


def test_many_replaced_records_are_counted_not_listed(tmp_path: Path) -> None:
    results = write(tmp_path / "results.jsonl", *(line(case=f"run {i}") for i in range(30)))
    notes: list[str] = []
    assert [len(group) for group in groups(read([results], notes), notes)] == [1]
    assert len(notes) == 21
    assert notes[-1] == "9 more records are replaced by later ones of the same strategy and n"
