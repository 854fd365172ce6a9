"""fp16 with a static loss scale: gradients are compared at that scale, overflow is named."""

import json
from pathlib import Path

import pytest
import torch
from command_line import mtp_mem
from small import build, tiny

from mtp_mem import Training, TrainingStep, Workload, load_strategy
from mtp_mem.config.gpus import load_gpu
from mtp_mem.errors import BadInput
from mtp_mem.memory.cpu import track
from mtp_mem.model.optimizers import make_optimizer
from mtp_mem.prediction.simulated_step import simulate
from mtp_mem.verification.scenarios import SCENARIOS
from mtp_mem.verification.verify import verify

SHAPE = (
    "[model]\nvocab_size = 97\ndim = 32\nn_layers = 3\nn_attention_heads = 2\n"
    '[workload]\nbatch = 2\nsequence = 16\ntokenizer = "uniform"\ndtype = "fp16"\n[sweep]\nn = [2]\nrounds = 1\n'
)
RUN = ("compare", "--profile", "shape.toml", "--strategies", "naive,sequential,chunked_tokens", "--json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shape.toml").write_text(SHAPE)
    return tmp_path


def test_compare(folder: Path) -> None:
    ended = mtp_mem(folder, *RUN)
    assert ended.returncode == 0, ended.stderr
    records = json.loads(ended.stdout)["records"]
    assert [r["gradient"] for r in records] == ["bit-identical", "bit-identical", "within bound"]
    assert all(r["training"]["precision"] == "fp16" for r in records)
    assert records[2]["gradient_error"] < 4 * 2**-10


def test_an_overflow_is_named_and_not_right(folder: Path) -> None:
    ended = mtp_mem(folder, *RUN, "--loss-scale", "1e9")
    assert ended.returncode == 1
    records = json.loads(ended.stdout)["records"]
    assert {r["gradient"] for r in records} == {"unchecked"}
    assert "3 of 3 cases have no checked gradient: naive's gradient of embedding is not finite, in fp16" in ended.stderr
    verified = mtp_mem(folder, "verify", *RUN[1:], "--loss-scale", "1e9")
    assert verified.returncode == 1
    assert "NOT verified" in json.loads(verified.stdout)["summary"]
    assert "overflows fp16, as naive's does: the loss scale is too large" in verified.stdout


def test_verify(folder: Path) -> None:
    ended = mtp_mem(folder, "verify", *RUN[1:])
    assert ended.returncode == 0, ended.stdout
    own = [scenario for scenario in SCENARIOS if scenario.dtypes == ("fp16",)]
    assert verify(["sequential", "chunked_vocab", "chunked_tokens", "checkpointed"], scenarios=own).passed


def test_a_loss_scale_changes_no_bit_of_a_step() -> None:
    weights = {}
    for scale in (None, 1024.0):
        model, batch = build(tiny(n_future=2), "fp32", sequence=16)
        training = Training(loss_scale=scale, micro_batches=2)
        TrainingStep(model, make_optimizer(model), batch, load_strategy("naive"), training=training)()
        weights[scale] = [parameter.detach().clone() for parameter in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*weights.values(), strict=True))


@pytest.mark.parametrize("spec", ["naive", "chunked_vocab:chunk=300", "chunked_tokens:chunk=24"])
def test_predicted_equals_tracked(spec: str) -> None:
    config = tiny(vocab_size=1031, n_layers=4, n_future=2)
    model, batch = build(config, "fp16", sequence=32)
    step = TrainingStep(model, make_optimizer(model), batch, load_strategy(spec))
    step()
    real, workload = track(step), Workload(batch=2, sequence=32, dtype="fp16")
    simulated = simulate(config, workload, load_strategy(spec), cuda=False)
    assert (simulated.peak().nbytes, simulated.peak().by_category) == (real.peak().nbytes, real.peak().by_category)
    assert simulated.phase_peaks() == real.phase_peaks()
    peaks = [
        simulate(config, Workload(batch=2, sequence=32, dtype=dtype), load_strategy(spec), gpu=load_gpu("h200")).peak()  # type: ignore[arg-type]
        for dtype in ("fp16", "bf16")
    ]
    assert peaks[0].nbytes == peaks[1].nbytes


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_is_positive(scale: float) -> None:
    with pytest.raises(BadInput, match=r"training\.loss_scale = .*: must be positive and finite"):
        Training(loss_scale=scale)
