"""`mtp-mem gpu` on its CPU stand-in: the plan, the budget, going on where a run ended."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from mtp_mem.cli import main
from mtp_mem.gpu_run import Outcome, Stage, run, stages


def done(plan: list[Stage], out: Path, budget_s: float = 60) -> dict[str, Outcome]:
    return {o.stage: o for o in run(plan, out, budget_s, lambda _: None)}


def test_the_plan_measures_first_and_reports_last(tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        plan = stages(device, tmp_path, quick=device == "cpu", tests=Path("tests/benchmarks"))
        names = [stage.name for stage in plan]
        assert names[0] == "environment"
        assert names[1].startswith("compare-")
        assert names[-1] == "report"
        assert len(set(names)) == len(names)
    full = [stage.name for stage in plan]
    assert {"compare-mtp-1.3b", "compare-llama3-8b", "verify-fp32", "verify-bf16", "check", "benchmark"} <= set(full)
    assert "benchmark" not in [s.name for s in stages("cpu", tmp_path, quick=True, tests=None)]


def test_what_ended_is_kept_and_not_run_again(tmp_path: Path) -> None:
    plan = [
        Stage("lists", ("mtp_mem", "list", "--json"), 1, ""),
        Stage("fails", ("mtp_mem", "compare", "--profile", "nothing"), 1, ""),
        Stage("hangs", ("timeit", "-n", "1", "-r", "1", "-s", "import time", "time.sleep(60)"), 1 / 180, ""),
        Stage("last", ("mtp_mem", "--version"), 1, ""),
    ]
    first = done(plan, tmp_path)
    assert [o.status for o in first.values()] == ["ok", "failed", "out of time", "ok"]
    assert "naive" in json.loads((tmp_path / "lists.out").read_text())["strategies"]
    assert "unknown profile 'nothing'" in (tmp_path / "fails.log").read_text()
    again = done(plan, tmp_path)
    assert [o.status for o in again.values()] == ["done before", "failed", "out of time", "ok"]
    changed = [dataclasses.replace(plan[0], command=("mtp_mem", "list")), plan[-1]]
    assert done(changed, tmp_path)["lists"].status == "ok"


def test_the_report_gets_its_turn_when_the_budget_ends(tmp_path: Path) -> None:
    plan = [Stage("lists", ("mtp_mem", "list"), 1, ""), Stage("last", ("mtp_mem", "--version"), 1, "")]
    assert [o.status for o in done(plan, tmp_path, budget_s=0).values()] == ["no budget left", "ok"]
    (tmp_path / "stages.json").write_text("{damaged")
    assert done(plan, tmp_path)["lists"].status == "ok"


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["gpu", "--out", str(out), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "environment"
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--out", str(tmp_path)]) == 3
    assert "valid here: cpu" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["gpu", "--out", str(tmp_path), "--budget-minutes", "0"])
