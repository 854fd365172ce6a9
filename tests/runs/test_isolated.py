"""A case's bytes in a process of its own: the same bytes as here, and a child that fails is a result."""

import torch

from mtp_mem import ModelConfig, Workload, load_strategy
from mtp_mem.config.schema import Profile, Sweep
from mtp_mem.data import load_corpus
from mtp_mem.runs.bench import Bench
from mtp_mem.runs.isolated import measure

PROFILE = Profile(
    name="small",
    model=ModelConfig(vocab_size=300, dim=32, n_layers=4, n_attention_heads=2),
    workload=Workload(batch=2, sequence=32, tokenizer="bytes"),
    sweep=Sweep(n=(2,)),
)


def test_the_same_bytes_as_in_this_process() -> None:
    config = PROFILE.model.with_n(2)
    here = Bench(PROFILE, config, load_corpus(PROFILE.workload, 300), torch.device("cpu"))
    expected = here.measure(load_strategy("sequential"))
    found = measure(PROFILE, 2, "sequential", "cpu")
    assert found.pop("host_rss_bytes") > 0
    expected.pop("host_rss_bytes")
    assert found == expected


def test_the_floor() -> None:
    found = measure(PROFILE, 2, "", "cpu")
    assert found["status"] == "ok"
    assert "logits" not in found["bytes_at_peak"]


def test_a_strategy_that_raises() -> None:
    found = measure(PROFILE, 2, "no_such_module_here:Nothing", "cpu")
    assert found["status"] == "error"
    assert "no module 'no_such_module_here'" in found["error"]


def test_a_child_that_hangs_is_killed() -> None:
    found = measure(PROFILE, 2, "sequential", "cpu", timeout_s=0.2)
    assert found == {"status": "error", "error": "no answer within 0.2 s; the process was killed"}


def test_a_child_that_dies() -> None:
    found = measure(PROFILE, 2, "sequential", "cpu", environment={"PYTHONPATH": "", "PYTHONHOME": "/nowhere"})
    assert found["status"] == "error"
    assert found["error"].startswith("the process ended with exit code 1: ")
