"""`mtp-mem regressions` and `mtp-mem chart`: both kinds of file, what got worse, what cannot be compared."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from benchmarks.head_phase_chart import draw as head_phase_charts
from fixed import ENVIRONMENT, MODEL, record

from mtp_mem.cli import main
from mtp_mem.config.gpus import load_gpu
from mtp_mem.config.schema import OptimizerName, Training
from mtp_mem.runs.record import Record

BENCH: dict[str, Any] = {
    "machine_info": {"mtp_mem": {"device": "cpu", "cpu": "A CPU", "torch": "2.13.0"}},
    "benchmarks": [
        {
            "fullname": f"tests/benchmarks/test_head_phase.py::test_head_phase[{spec}]",
            "group": "head phase, n=4 N=2048 D=512 V=32000 float32 cpu",
            "stats": {"median": ratio},
            "extra_info": {
                "strategy": spec,
                "n": 4,
                "times_floor": ratio,
                "times_floor_p20": ratio - 0.01,
                "times_floor_p80": ratio + 0.02,
                "peak_over_inputs_bytes": nbytes,
                "lower_bound_bytes": 69_730_304,
            },
        }
        for spec, ratio, nbytes in (("naive", 1.314, 1_700_000_000), ("chunked_tokens", 1.083, 203_000_000))
    ],
}


def bench(path: Path, **changes: Any) -> Path:
    changed = copy.deepcopy(BENCH)
    changed["benchmarks"][1]["extra_info"] |= changes
    path.write_text(json.dumps(changed))
    return path


def results(path: Path, *records: Record) -> Path:
    path.write_text("".join(json.dumps(r.to_json()) + "\n" for r in records))
    return path


def test_nothing_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = bench(tmp_path / "old.json")
    assert main(["regressions", str(old), str(old)]) == 0
    assert "2 cases compared, 0 figures changed, 0 got worse" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "options", "code", "words"),
    [
        ({"peak_over_inputs_bytes": 203_000_001}, [], 1, "WORSE memory"),
        ({"peak_over_inputs_bytes": 203_000_001}, ["--memory", "1%"], 0, "(+1 B)"),
        ({"peak_over_inputs_bytes": 100}, [], 0, "0 got worse"),
        ({"peak_over_inputs_bytes": None}, [], 1, "1 figures changed, 1 got worse"),
        ({"times_floor": 1.2}, [], 1, "WORSE time"),
        ({"times_floor": math.nan}, [], 1, "WORSE time"),
        ({"times_floor": 1.15}, [], 0, "+6.2%"),
        ({"times_floor": 1.15}, ["--time", "5%"], 1, "WORSE time"),
    ],
)
def test_changes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    options: list[str],
    code: int,
    words: str,
) -> None:
    old, new = bench(tmp_path / "old.json"), bench(tmp_path / "new.json", **changes)
    assert main(["regressions", str(old), str(new), *options]) == code
    assert words in capsys.readouterr().out


def test_what_was_no_number_before_does_not_get_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = bench(tmp_path / "old.json", times_floor=math.nan), bench(tmp_path / "new.json")
    for later in (new, old):
        assert main(["regressions", str(old), str(later)]) == 0
        assert "1 figures changed, 0 got worse" in capsys.readouterr().out


@pytest.mark.parametrize("figure", [math.nan, math.inf])
def test_json_has_no_number_that_json_does_not_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], figure: float
) -> None:
    old, new = bench(tmp_path / "old.json"), bench(tmp_path / "new.json", times_floor=figure)
    assert main(["regressions", str(old), str(new), "--json"]) == 1
    (change,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["changes"]
    assert (change["old"], change["new"], change["share"]) == (1.083, str(figure), str(figure))


def test_a_case_that_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = results(tmp_path / "old.jsonl", record("naive"), record("sequential"))
    more_threads = record("sequential", environment={**record().environment, "threads": 64})
    new = results(tmp_path / "new.jsonl", record("naive"), more_threads)
    assert main(["regressions", str(old), str(new)]) == 1
    out = capsys.readouterr().out
    assert "WORSE only in the old results: sequential n=1" in out
    assert "      only in the new results: sequential n=1" in out
    assert main(["regressions", str(old), str(new), "--allow-missing"]) == 0
    assert "WORSE" not in capsys.readouterr().out


def test_a_gradient_that_is_wrong_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = results(tmp_path / "old.jsonl", record("naive"), record("sequential"))
    new = results(tmp_path / "new.jsonl", record("naive"), record("sequential", gradient="differs"))
    assert main(["regressions", str(old), str(new), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert [(c["kind"], c["worse"]) for c in document["changes"]] == [("gradient", True)]
    assert document["changes"][0]["case"].startswith("sequential n=")


def test_other_machines_and_other_cases_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = bench(tmp_path / "old.json")
    other = copy.deepcopy(BENCH)
    other["machine_info"]["mtp_mem"]["cpu"] = "Another CPU"
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert main(["regressions", str(old), str(tmp_path / "other.json")]) == 2
    assert "not comparable" in capsys.readouterr().err
    first = results(tmp_path / "a.jsonl", record("naive"))
    second = results(tmp_path / "b.jsonl", record("sequential"))
    assert main(["regressions", str(first), str(second)]) == 2
    assert "no case in common" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", '{"benchmarks": [{}]}', '{"benchmarks": []}'])
def test_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    assert main(["regressions", str(path), str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_charts_of_records_and_of_benchmarks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = head_phase_charts(bench(tmp_path / "bench.json"), tmp_path / "head-phase")
    assert files[0].name == "head-phase-n-4-n-2048-d-512-v-32000-float32-cpu.png"
    assert all(path.stat().st_size > 100 for path in files)
    ours = results(tmp_path / "results.jsonl", *(record(s, n) for s in ("naive", "sequential") for n in (1, 2)))
    assert main(["chart", str(ours), "--out", str(tmp_path / "out"), "--json"]) == 0
    names = {Path(path).name for path in json.loads(capsys.readouterr().out)["files"]}
    assert "memory-vs-n.png" in names
    assert all((tmp_path / "out" / name).stat().st_size > 100 for name in names)
    assert main(["chart", str(tmp_path / "none.jsonl")]) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"largest_batch_by_n": []}', "not a whole plan: KeyError 'model'"),
        ('{"largest_batch_by_n": 3, "model": {}, "gpu": {}, "workload": 1}', "not a whole plan: TypeError"),
    ],
)
def test_a_damaged_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    assert main(["chart", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out")]) == 2
    assert f"plan.json: {words}" in capsys.readouterr().err


def test_charts_of_two_plans_stand_in_two_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every plan's file has the same name."""
    plan = {
        "profile": "p",
        "model": {"vocab_size": 300, "dim": 32},
        "workload": {"sequence": 8, "dtype": "fp32"},
        "gpu": {"name": "A GPU"},
        "headroom_percent": 5.0,
        "environment": ENVIRONMENT,
    }
    for name, batch in (("a", 3), ("b", 5)):
        rows = [{"strategy": "naive", "n": 1, "batch": batch, "fits": "yes"}]
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan.json").write_text(json.dumps(plan | {"largest_batch_by_n": rows}))
    plans = [str(tmp_path / name / "plan.json") for name in ("a", "b")]
    assert main(["chart", *plans, "--out", str(tmp_path / "out"), "--json"]) == 0
    tables = [path for path in json.loads(capsys.readouterr().out)["files"] if path.endswith(".csv")]
    assert [Path(path).read_text().split()[1] for path in tables] == ["naive,1,3", "naive,1,5"]


@pytest.mark.parametrize("other", [{}, {"vocab_size": 4096}])
def test_setups_share_a_chart_if_nothing_else_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict[str, int]
) -> None:
    optimizers: tuple[OptimizerName, ...] = ("adamw", "sgd")
    environment = {**ENVIRONMENT, "target": load_gpu("h200").name}
    predicted = [
        record(
            exactness="predicted",
            backend="fake",
            case=f"{model}-{optimizer}",
            model={**MODEL, "n_future": 1, **model},
            training=Training(optimizer=optimizer).facts("fp32"),
            environment=environment,
        )
        for model in ([{}, other] if other else [{}])
        for optimizer in optimizers
    ]
    path = results(tmp_path / "results.jsonl", *predicted)
    assert main(["chart", str(path), "--out", str(tmp_path / "out"), "--json"]) == 0
    names = {Path(path).name for path in json.loads(capsys.readouterr().out)["files"]}
    assert ("memory-of-setups.csv" in names) == (not other)
