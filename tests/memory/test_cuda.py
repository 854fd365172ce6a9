"""What a CUDA device measures, where there is one: the bytes before a step are ours and cuBLAS's, and nothing else."""

import pytest
import torch
from small import tiny

from mtp_mem import Profile, Sweep, Workload
from mtp_mem.prediction.cuda.cublas import workspaces
from mtp_mem.prediction.simulated_step import Simulation
from mtp_mem.runs import isolated
from mtp_mem.runs.check_prediction import device_here


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_before_a_step_nothing_is_there_but_the_model_its_state_the_batch_and_workspaces() -> None:
    model, workload = tiny(), Workload(batch=2, sequence=512, dtype="bf16", tokenizer="uniform")
    facts = isolated.measure(Profile("tiny", model, workload, sweep=Sweep(n=(3,))), 3, "sequential", "cuda")
    gpu = device_here()
    assert facts["live_unnamed_bytes"] == sum(workspaces(gpu).resident())
    expected = Simulation(model.with_n(3), workload, gpu=gpu).baseline
    assert facts["baseline_bytes"] - facts["live_unnamed_bytes"] == expected
