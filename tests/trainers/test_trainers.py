"""In people's trainers: the weights of one joint backward, and the bytes that were predicted."""

import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_mem import IGNORE, MTPForCausalLM, future_targets, load_strategy
from mtp_mem.config.other_models import huggingface_profile
from mtp_mem.memory.tracker import Tracker
from mtp_mem.prediction.simulated_step import Simulation

transformers = pytest.importorskip("transformers")
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))
from common import HEADS, rows, tiny_llama  # noqa: E402

ELSEWHERE = {"common", "fsdp2_torchrun", "published_head"}  # shared, under torchrun below, and one that trains nothing
NEEDS = {"accelerate_loop": "accelerate", "hf_trainer": "accelerate", "lightning_module": "lightning", "lora": "peft"}


@pytest.mark.parametrize("name", sorted({p.stem for p in EXAMPLES.glob("*.py")} - ELSEWHERE))
def test_an_example_ends_with_the_weights_of_one_joint_backward(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert "against one joint backward: identical to the last bit" in capsys.readouterr().out


def test_the_example_under_torchrun() -> None:
    script = str(EXAMPLES / "fsdp2_torchrun.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "against one joint backward: identical to the last bit" in done.stdout


class Plain(MTPForCausalLM):
    """What a user would write without this package: the sum of the heads' cross entropies, plain autograd."""

    def forward(self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Any = None, **inputs: Any) -> Any:  # type: ignore[override]
        logits, targets = self.model(input_ids, **inputs), future_targets(labels, HEADS)
        loss: Any = 0.0
        for own, target in zip(logits, targets, strict=True):
            count = (target != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
            total = F.cross_entropy(own.flatten(0, -2), target.flatten(), ignore_index=IGNORE, reduction="sum")
            loss = loss + total / count
        return {"loss": loss}


def trained(model: nn.Module, folder: Path, cls: Any = None, **options: Any) -> Any:
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        str(folder),
        **{"max_steps": 3, "gradient_accumulation_steps": 2} | options,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = (cls or transformers.Trainer)(model=model, args=arguments, train_dataset=rows(24))
    trainer.train()
    return trainer


@pytest.mark.parametrize("spec", ["naive", "sequential", "checkpointed", "chunked_tokens:chunk=7", "chunked_vocab"])
def test_the_hugging_face_trainer_against_plain_autograd(tmp_path: Path, spec: str) -> None:
    """Three steps of AdamW, accumulated over two batches, normalised by the trainer's own count of items."""
    plain = trained(Plain(tiny_llama(), HEADS), tmp_path).model
    own = trained(MTPForCausalLM(tiny_llama(), HEADS, spec), tmp_path).model
    # AdamW's first steps divide a gradient by its own size: rounding in a tiny one moves a weight by up to the rate.
    different = [
        ((a - b).abs() > 1e-5).float().mean().item() for a, b in zip(own.parameters(), plain.parameters(), strict=True)
    ]
    assert max(different) < 0.02


class Tracked(transformers.Trainer if hasattr(transformers, "Trainer") else object):  # type: ignore[misc]
    """The trainer with its steps under the tracker."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the trainer's, tracked; `peak_bytes` is that of the last one over what was live before."""
        model = self.model.model
        tracker = Tracker(model.vocab_size, model.dim, model.named_parameters())
        with tracker:
            loss: Tensor = super().training_step(*args, **kwargs)
        self.peak_bytes = tracker.trace.peak().nbytes
        return loss


def test_the_peak_in_the_trainer_falls_by_what_is_predicted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_llama().config
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    profile = huggingface_profile(tmp_path)
    workload = dataclasses.replace(profile.workload, batch=2, sequence=48, dtype="fp32")
    simulation = Simulation(profile.model.with_n(HEADS), workload, cuda=False)
    specs = ("naive", "sequential", "chunked_tokens:chunk=16", "checkpointed")
    predicted, measured = {}, {}
    for spec in specs:
        phases = simulation.trace(load_strategy(spec)).phase_peaks()
        predicted[spec] = max(nbytes for phase, nbytes in phases.items() if phase.startswith("head"))
        model = MTPForCausalLM(tiny_llama(), HEADS, spec)
        measured[spec] = trained(model, tmp_path, Tracked, max_steps=1, gradient_accumulation_steps=1).peak_bytes
    saved = {spec: predicted["naive"] - predicted[spec] for spec in specs}
    assert {spec: measured["naive"] - measured[spec] for spec in specs} == saved
    assert saved["sequential"] > 0
