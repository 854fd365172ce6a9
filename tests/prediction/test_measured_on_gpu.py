"""Predictions against what an H100 measured, to the byte: `profiles/recorded/h100-80gb/peaks.json`.

Each case there ran in a process of its own. Bytes requested do not depend on the kind of segments. Bytes allocated are
exact under expandable ones; under the default kind they depend on how blocks were split before.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtp_mem.config.gpus import GPU
from mtp_mem.config.schema import ModelConfig, Training, Workload
from mtp_mem.config.toml import from_table
from mtp_mem.prediction.kernel_buffers import KERNELS
from mtp_mem.prediction.peaks import predicted
from mtp_mem.prediction.simulated_step import simulate
from mtp_mem.runs.check_prediction import check_kernels, kernel_cases
from mtp_mem.strategy import load_strategy

RECORDED = json.loads((Path(__file__).parents[2] / "profiles/recorded/h100-80gb/peaks.json").read_text())
GPU_THERE = from_table(GPU, {key: value for key, value in RECORDED["gpu"].items() if value is not None})
KERNELS_OF_OTHERS = ("liger", "cce")  # not predicted: they need a GPU to run


def _label(case: dict[str, Any]) -> str:
    changed = [f"{key}={value}" for part in ("workload", "training") for key, value in case[part].items()]
    return "-".join([str(case["model"]["dim"]), f"n{case['n']}", case["strategy"], case["allocator"], *changed])


CASES = [case for case in RECORDED["cases"] if case["strategy"] not in KERNELS_OF_OTHERS]


@pytest.mark.parametrize("case", CASES, ids=_label)
def test_a_whole_step(case: dict[str, Any]) -> None:
    expandable = case["allocator"] == "expandable"
    gpu = replace(GPU_THERE, expandable_segments=expandable)
    config = from_table(ModelConfig, case["model"]).with_n(case["n"])
    workload, training = from_table(Workload, case["workload"]), from_table(Training, case["training"])
    peaks = predicted(simulate(config, workload, load_strategy(case["strategy"]), training, gpu=gpu), gpu)
    measured = case["measured"]
    assert peaks["peak_requested_bytes"] == measured["requested"]
    slack = 0 if expandable else measured["allocated"] // 100
    assert abs(peaks["peak_allocated_bytes"] - measured["allocated"]) <= slack


def test_each_kernel_alone() -> None:
    table = {name: nbytes for name, _, nbytes, _ in check_kernels("cpu", GPU_THERE)}
    assert table == {row["kernel"]: row["measured"] for row in RECORDED["kernels"]}


def test_only_what_was_measured_says_so() -> None:
    measured = {row["kernel"] for row in RECORDED["kernels"]}
    operators = {operator for name, operator, _ in kernel_cases("cpu") if name in measured}
    assert {operator for operator, kernel in KERNELS.items() if "an H100" in kernel.seen} == operators
