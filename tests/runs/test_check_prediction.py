"""`mtp-mem predict --check`: says that there is no GPU, and judges what it would measure on one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import tiny

from mtp_mem.cli import main
from mtp_mem.config.gpus import GPU, load_gpu
from mtp_mem.config.schema import Profile, Sweep, Workload
from mtp_mem.memory.trace import Trace
from mtp_mem.prediction.cuda.cublas import workspaces
from mtp_mem.runs import check_prediction


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes of a real check take minutes to predict."""
    workload = Workload(batch=1, sequence=256, dtype="bf16", tokenizer="uniform")
    shapes = {name: (tiny(vocab_size=4099), workload) for name in check_prediction.SHAPES}
    monkeypatch.setattr(check_prediction, "SHAPES", shapes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, so it would measure")
def test_without_a_gpu_it_prints_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["predict", "--check", "--quick", "--out", str(out), "--gpu", "h100-80gb"]) == 0
    text = capsys.readouterr().out
    assert "kernel sum over 4096 rows of 1024: table 33,554,464, an H100; sums over rows: 13 sizes" in text
    assert "kernel mean along 8192 rows of 4096: table 0, an H100" in text
    assert text.startswith("No CUDA device here: nothing is measured. Predictions for NVIDIA H100")
    document = json.loads((tmp_path / "out/check.json").read_text())
    assert document["measured"] is False
    assert len(document["cases"]) == len(check_prediction.N) * len(check_prediction.STRATEGIES)
    assert all(row["predicted"]["requested"] > 0 and row["measured"] is None for row in document["cases"])
    assert {row["measured"] for row in document["kernels"]} == {None}
    seen = {row["kernel"].split(" ")[0]: bool(row["seen"]) for row in document["kernels"]}
    assert all(seen.values())


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predicted: list[str] = []
    simulate, stop_at = check_prediction.simulated_step.simulate, 3

    def counting(*args: Any, **kwargs: Any) -> Trace:
        if len(predicted) == stop_at:
            raise KeyboardInterrupt
        predicted.append("one more")
        return simulate(*args, **kwargs)

    monkeypatch.setattr(check_prediction.simulated_step, "simulate", counting)
    args = ["predict", "--check", "--quick", "--out", str(tmp_path), "--gpu", "h200"]
    assert main(args) == 130
    kept = json.loads((tmp_path / "check.json").read_text())
    assert (len(kept["cases"]), kept["kernels"]) == (3, [])
    stop_at = 100
    assert main(args) == 0
    whole = json.loads((tmp_path / "check.json").read_text())
    assert whole["cases"][:3] == kept["cases"]
    assert len(predicted) == len(whole["cases"]) == len(check_prediction.N) * len(check_prediction.STRATEGIES)
    assert whole["kernels"]
    assert main([*args[:-1], "l4"]) == 0  # another GPU's figures are no part of this one's
    assert len(predicted) == 2 * len(whole["cases"])


@pytest.mark.parametrize(
    "damage",
    [{"predicted": "many"}, {"predicted": {"requested": 1}}, {"measured": {"requested": 1}}, {"n": None}, {"more": 1}],
)
def test_damaged_cases_are_run_again(tmp_path: Path, damage: dict[str, Any]) -> None:
    args = ["predict", "--check", "--quick", "--gpu", "h200", "--out", str(tmp_path)]
    assert main(args) == 0
    whole = json.loads((tmp_path / "check.json").read_text())
    damaged = whole | {"cases": [whole["cases"][0] | damage, *whole["cases"][1:]]}
    (tmp_path / "check.json").write_text(json.dumps(damaged))
    assert main(args) == 0
    assert json.loads((tmp_path / "check.json").read_text()) == whole


def test_a_spent_budget_keeps_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["predict", "--check", "--quick", "--gpu", "h200", "--budget-minutes", "1e-9", "--out", str(tmp_path)]
    for reached in (1, 2):
        assert main(args) == 1
        words = f"{reached} of 6 cases are in {tmp_path / 'check.json'}; the same command runs the others"
        assert words in capsys.readouterr().out
        assert len(json.loads((tmp_path / "check.json").read_text())["cases"]) == reached


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--check", "--gpu", "h3000"], "unknown GPU 'h3000'"),
        (["--check", "--gpu", "h200,l4"], "--check predicts for one GPU"),
        (["--check", "--n", "3"], "--check has its own cases: no --n"),
        (["--check", "--hf", ".", "--micro-batches", "2"], "--check has its own cases: no --hf, --micro-batches"),
        (["--check", "--gpu-memory", "24GiB"], "--check has its own cases: no --gpu-memory"),
        (["--quick"], "options of --check"),
    ],
)
def test_bad_input(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available() or "h3000" not in args:
        assert main(["predict", *args]) == 2
        assert message in capsys.readouterr().err


def compare_default(profile: Profile, gpu: GPU, facts: dict[str, Any] | None) -> check_prediction.Row:
    return check_prediction.compare("narrow", "sequential", 1, "default", profile, gpu, facts)


def test_what_counts_as_right() -> None:
    gpu = load_gpu("h200")
    model, workload = check_prediction.SHAPES["narrow"]
    profile = Profile(name="narrow", model=model, workload=workload, sweep=Sweep(n=(1,)))
    alone = compare_default(profile, gpu, None)
    assert alone.measured is None
    assert not check_prediction.is_right(alone)
    # A device that shows one workspace fewer than expected: predicted with what was found, not with what was assumed.
    shown = {f"peak_{key}_bytes": alone.predicted[key] - workspaces(gpu).nbytes for key in check_prediction.FIELDS}
    facts = {
        "status": "ok",
        **shown,
        "live_unnamed_bytes": workspaces(gpu).nbytes,
        "alloc_retries": 0,
        "peak_spread_bytes": 0,
    }
    row = compare_default(profile, gpu, facts)
    assert row.difference is not None
    assert row.difference["requested"] == 0
    assert check_prediction.is_right(row)
    # One that shows none: each product takes a workspace and gives it back, and the peak is one product's.
    none_kept = compare_default(profile, gpu, facts | {"live_unnamed_bytes": 0})
    nbytes = workspaces(gpu).nbytes
    assert row.predicted["requested"] - nbytes < none_kept.predicted["requested"] <= row.predicted["requested"]
    facts["peak_requested_bytes"] += 1
    assert not check_prediction.is_right(compare_default(profile, gpu, facts))
    failed = compare_default(profile, gpu, {"status": "oom", "error": "too large"})
    assert failed.error == "too large"
    assert not check_prediction.is_right(failed)
