"""Steps on two gloo ranks: gradients, bytes and collectives; a predicted rank takes what the real one takes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model.test_huggingface import TINY

from mtp_mem.config.other_models import huggingface_profile
from mtp_mem.config.schema import ModelConfig, Profile, Sweep, Training, Workload
from mtp_mem.data import load_corpus
from mtp_mem.prediction.simulated_step import Simulation
from mtp_mem.runs import sweep
from mtp_mem.runs.record import Record
from mtp_mem.strategy import load_strategy

N, WORLD = 3, 2
SPECS = ("naive", "sequential", "chunked_tokens:chunk=16", "chunked_vocab:chunk=100", "checkpointed")
OWN: dict[str, Any] = {"vocab_size": 257, "dim": 64, "n_layers": 6, "n_attention_heads": 4, "n_future": N}


def llama(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    path.write_text(json.dumps(transformers.LlamaConfig(**(TINY | {"vocab_size": 257})).to_dict()))
    return huggingface_profile(path).model.with_n(N)


CASES: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "fsdp2": ("own", "fp32", {}, SPECS),
    "fsdp2, bf16 products": ("own", "bf16-mixed", {}, SPECS[1:3]),
    "fsdp2, tied, two micro-batches": ("tied", "fp32", {"micro_batches": 2}, SPECS[1:3]),
    "fsdp2, Hugging Face, checkpointed trunk": ("llama", "fp32", {"trunk_checkpointing": "full"}, SPECS[:2]),
    "ddp, two micro-batches": ("own", "fp32", {"sharding": "ddp", "micro_batches": 2}, SPECS[:3]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_predicted_rank_takes_what_a_real_one_takes(case: str, tmp_path: Path) -> None:
    model, dtype, setup, specs = CASES[case]
    config = llama(tmp_path) if model == "llama" else ModelConfig(**OWN)
    if model == "tied":
        config = dataclasses.replace(config, unembedding="tied")
    workload = Workload(batch=2, sequence=32, dtype=dtype, tokenizer="bytes")  # type: ignore[arg-type]
    training = Training(**{"sharding": "fsdp2", "world": WORLD} | setup)
    profile = Profile(
        name="ranks",
        model=config,
        workload=workload,
        sweep=Sweep(n=(N,), strategies=specs, rounds=1),
        training=training,
    )
    records = run(profile)
    simulation = Simulation(config, workload, training, cuda=False)
    floor = simulation.floor().peak().nbytes
    for spec in specs:
        record, predicted = records[spec], simulation.trace(load_strategy(spec))
        peak = predicted.peak()
        assert record.status == "ok", record.error
        assert record.gradient in ("bit-identical", "within bound"), (record.gradient_group, record.gradient_error)
        assert record.gradient_reference == "naive in one process, the mean of 2 batches"
        assert (record.baseline_bytes, record.peak_requested_bytes) == (predicted.baseline, peak.nbytes), spec
        assert record.bytes_at_peak == dict(peak.by_category), spec
        assert record.floor_requested_bytes == floor
        if training.sharding == "fsdp2":
            seen = {"collectives": record.collectives, "collective_bytes": record.collective_bytes}
            assert seen == simulation.collectives
            assert record.collectives == records["sequential"].collectives
        else:
            assert set(record.collectives or {}) == {"all-reduce"}
    if dtype == "fp32" and training.micro_batches == 1:
        assert {records[spec].gradient for spec in specs if ":" not in spec} == {"bit-identical"}


def run(profile: Profile) -> dict[str, Record]:
    corpus, device = load_corpus(profile.workload, profile.model.vocab_size), torch.device("cpu")
    todo = sweep.cases(profile, corpus, device)
    return {record.strategy: record for record in sweep.run(profile, corpus, device, todo, lambda _: None)}
