"""Bytes of real steps of FSDP2 on two gloo ranks, tracked; rank 0 prints them.

Then, in one process, the bytes of the same steps on tensors without data, over a fake process group.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
import transformers
from distributed.ranks import on_ranks
from model.test_huggingface import TINY

from mtp_mem import ModelConfig, Training, TrainingStep, Workload, load_strategy, make_batch, make_optimizer
from mtp_mem.config.other_models import huggingface_profile
from mtp_mem.distributed.fsdp2 import shard
from mtp_mem.memory.cpu import track
from mtp_mem.memory.trace import Trace
from mtp_mem.model.build import make_model
from mtp_mem.model.own import set_up
from mtp_mem.prediction.fake_ranks import MIXED
from mtp_mem.prediction.simulated_step import Simulation

N, WORLD = 3, 2
SPECS = ("naive", "sequential", "chunked_tokens:chunk=16", "chunked_vocab:chunk=100", "checkpointed")
OWN: dict[str, Any] = {"vocab_size": 131, "dim": 64, "n_layers": 6, "n_attention_heads": 4, "n_future": N}


def configs() -> dict[str, ModelConfig]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llama.json"
        path.write_text(json.dumps(transformers.LlamaConfig(**TINY).to_dict()))
        llama = huggingface_profile(path).model.with_n(N)
    return {"own": ModelConfig(**OWN), "own, tied": ModelConfig(**OWN, unembedding="tied"), "llama": llama}


CASES: tuple[tuple[str, Any, dict[str, Any], tuple[str, ...]], ...] = (
    ("own", "fp32", {}, SPECS),
    ("own", "bf16-mixed", {}, SPECS),
    ("own, tied", "fp32", {"trunk_checkpointing": "full"}, SPECS[1:3]),
    ("own", "fp32", {"micro_batches": 2}, SPECS[1:3]),
    ("llama", "fp32", {"trunk_checkpointing": "full"}, SPECS[:3]),
)


def real(config: ModelConfig, dtype: Any, training: Training, specs: tuple[str, ...]) -> dict[str, Trace]:
    traces = {}
    for spec in specs:
        model: Any = make_model(config, dtype="fp32" if dtype == "bf16-mixed" else dtype)
        set_up(model, training)
        shard(model, mp_policy=MIXED if dtype == "bf16-mixed" else None)
        batch = make_batch(torch.randint(131, (2, 32)), N)
        step = TrainingStep(model, make_optimizer(model), batch, load_strategy(spec), training=training)
        step()
        traces[spec] = track(step)
    return traces


def simulated(config: ModelConfig, dtype: Any, training: Training, specs: tuple[str, ...]) -> dict[str, Trace]:
    simulation = Simulation(config, Workload(batch=2, sequence=32, dtype=dtype), training, cuda=False)
    return {spec: simulation.trace(load_strategy(spec)) for spec in specs}


def report(how: str, traces_of: Callable[..., dict[str, Trace]]) -> None:
    models = configs()
    for name, dtype, changes, specs in CASES:
        training = Training(sharding="fsdp2", world=WORLD, **changes)
        for spec, trace in traces_of(models[name], dtype, training, specs).items():
            peak = trace.peak()
            case = f"{name}, {dtype}, {changes}, {spec}"
            line = {"how": how, "case": case, "baseline": trace.baseline, "peak": peak.nbytes, "phase": peak.phase}
            if how == "predicted" or dist.get_rank() == 0:
                print(json.dumps(line | {"phases": trace.phase_peaks(), "parts": dict(peak.by_category)}), flush=True)


if __name__ == "__main__":
    on_ranks(WORLD, lambda: report("real", real))
    report("predicted", simulated)
