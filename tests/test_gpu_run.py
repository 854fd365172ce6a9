"""`mtp-mem gpu` on its CPU stand-in: the plan, the budget, going on where a run ended."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from mtp_mem import gpu_run
from mtp_mem.cli import main
from mtp_mem.config.schema import load_gpu
from mtp_mem.gpu_run import Outcome, Stage, run
from mtp_mem.head_phase import SHAPES
from mtp_mem.strategy import loadable


def done(plan: list[Stage], out: Path, budget_s: float = 60) -> dict[str, Outcome]:
    return {o.stage: o for o in run(plan, out, budget_s, lambda _: None)}


def test_the_plan_measures_first_and_reports_last(tmp_path: Path) -> None:
    for gpu in (None, load_gpu("h200")):
        plan = gpu_run.plan(gpu, tmp_path, quick=gpu is None, tests=Path("tests/benchmarks"))
        names = [stage.name for stage in plan.stages]
        assert names[0] == "environment"
        assert names[1].startswith("compare-")
        assert names[-1] == "report"
        assert len(set(names)) == len(names)
        assert plan.refused == ()
    full = {stage.name: stage for stage in plan.stages}
    assert {"compare-mtp-1.3b", "compare-llama3-8b", "verify-fp32", "verify-bf16", "check"} <= set(full)
    assert len(full["compare-llama3-8b"].cases) == 20
    # Instruments that have to prove themselves come before a second helping of what works.
    assert list(full).index("check") < list(full).index("compare-llama3-8b")
    assert [name for name in full if name.startswith("benchmark")] == [f"benchmark-{s.label}" for s in SHAPES["cuda"]]
    without = gpu_run.plan(None, tmp_path, quick=True, tests=None).stages
    assert not any(stage.name.startswith("benchmark") for stage in without)


def test_a_benchmark_stage_is_one_test_of_each_strategy(tmp_path: Path) -> None:
    plan = gpu_run.plan(load_gpu("h200"), tmp_path, quick=False, tests=Path("tests/benchmarks"))
    chosen = []
    for stage in plan.stages:
        if stage.name.startswith("benchmark"):
            command = [sys.executable, "-P", "-m", *stage.command, "--collect-only"]
            found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
            chosen += [line for line in found.stdout.splitlines() if "::" in line]
    assert len(chosen) == len(set(chosen)) == len(SHAPES["cuda"]) * len(loadable())


def test_a_smaller_gpu_gets_a_smaller_model_and_no_case_that_cannot_fit(tmp_path: Path) -> None:
    h100 = gpu_run.plan(load_gpu("h100-80gb"), tmp_path, quick=False, tests=None)
    assert "compare-llama3.2-1b" in [stage.name for stage in h100.stages]
    assert h100.refused == ()
    l4 = gpu_run.plan(load_gpu("l4"), tmp_path, quick=False, tests=None)
    (large,) = (stage for stage in l4.stages if stage.name.startswith("compare-llama3.2-1b"))
    refused = {(case.n, case.strategy) for profile, case in l4.refused if profile == "llama3.2-1b"}
    assert refused == {(n, spec) for n in (1, 2, 4, 8) for spec in ("naive", "sequential", "checkpointed")}
    assert large.command[large.command.index("--strategies") + 1] == "chunked_vocab,chunked_tokens"
    assert {case.strategy for case in large.cases} == {"chunked_vocab", "chunked_tokens"}


def test_cases_that_fit_at_some_n_only_are_stages_of_their_own(tmp_path: Path) -> None:
    a40 = dataclasses.replace(load_gpu("l40s"), total_bytes=42 * 2**30)
    names = {s.name: s for s in gpu_run.plan(a40, tmp_path, quick=False, tests=None).stages}
    assert {"compare-llama3.2-1b-n1,2", "compare-llama3.2-1b-n4,8"} <= set(names)
    command = names["compare-llama3.2-1b-n4,8"].command
    assert "naive" not in command[command.index("--strategies") + 1].split(",")


def test_deterministic_kernels_are_asked_of_every_comparison(tmp_path: Path) -> None:
    plan = gpu_run.plan(load_gpu("h200"), tmp_path, quick=False, tests=None, deterministic=True)
    for stage in plan.stages:
        wanted = stage.name.startswith(("compare", "verify"))
        assert ("--require-deterministic" in stage.command) is wanted, stage.name


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


def test_a_failed_check_is_done_until_the_code_changes_and_a_crash_never(tmp_path: Path) -> None:
    crash = ("timeit", "-n", "1", "-r", "1", "-s", "import os", "os._exit(70)")
    failed = ("timeit", "-n", "1", "-r", "1", "-s", "import os", "os._exit(1)")
    plan = [Stage("checks", failed, 1, ""), Stage("crashes", crash, 1, ""), Stage("last", ("mtp_mem", "list"), 1, "")]
    assert [o.status for o in done(plan, tmp_path).values()] == ["check failed", "failed", "ok"]
    assert [o.status for o in done(plan, tmp_path).values()] == ["done before", "failed", "ok"]
    kept = json.loads((tmp_path / "stages.json").read_text())
    kept["checks"]["by"] = "other code"
    (tmp_path / "stages.json").write_text(json.dumps(kept))
    assert done(plan, tmp_path)["checks"].status == "check failed"


def test_what_a_stopped_stage_started_is_stopped_with_it(tmp_path: Path) -> None:
    child = "import time; time.sleep(300)"
    start = (
        f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(c.pid))"
    )
    plan = [
        Stage("starts", ("timeit", "-n", "1", "-r", "1", "-s", start, "c.wait()"), 3 / 180, ""),
        Stage("last", ("mtp_mem", "--version"), 1, ""),
    ]
    assert done(plan, tmp_path)["starts"].status == "out of time"
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(int((tmp_path / "pid").read_text())).status() == psutil.STATUS_ZOMBIE


def test_a_termination_stops_the_stage_at_hand(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mtp_mem", "gpu", "--device", "cpu", "--quick", "--out", "."]
    running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begun = time.monotonic()
    while not (tmp_path / "compare-quick/results.jsonl").exists():
        time.sleep(0.1)
        assert time.monotonic() < begun + 120
        assert running.poll() is None
    stages = psutil.Process(running.pid).children()
    assert stages
    running.terminate()
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130, said
    assert not any(stage.is_running() for stage in stages)
    assert json.loads((tmp_path / "stages.json").read_text())["environment"]["status"] == "ok"


def test_the_report_gets_its_turn_when_the_budget_ends(tmp_path: Path) -> None:
    plan = [Stage("lists", ("mtp_mem", "list"), 1, ""), Stage("last", ("mtp_mem", "--version"), 1, "")]
    assert [o.status for o in done(plan, tmp_path, budget_s=0).values()] == ["no budget left", "ok"]
    (tmp_path / "stages.json").write_text("{damaged")
    assert done(plan, tmp_path)["lists"].status == "ok"


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["gpu", "--out", str(out), "--dry-run", "--gpu", "l4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["stages"][0]["name"] == "environment"
    assert document["stages"][1]["cases"][0]["peak_bytes"] > 2**33
    assert len(document["refused"]) == 12
    assert main(["gpu", "--out", str(out), "--dry-run", "--gpu", "l4"]) == 0
    shown = capsys.readouterr().out
    assert "refused: llama3.2-1b n=8 naive needs 57.6 GiB, there are 21.0 GiB" in shown
    assert "GiB  n=4 chunked_tokens" in shown
    assert "min in all; budget 45 min" in shown
    assert not out.exists()
    assert main(["gpu", "--out", str(out), "--gpu", "l4"]) == 2
    assert "--gpu l4: only says what --dry-run plans for" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--out", str(tmp_path)]) == 3
    assert "valid here: cpu" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["gpu", "--out", str(tmp_path), "--budget-minutes", "0"])
