"""Row work as one compiled kernel: the same numbers, no fp32 block of logits, and one operator to whoever watches."""

import dataclasses
import shutil

import pytest
import torch
from small import tiny
from torch.profiler import ProfilerActivity, profile

from mtp_mem import ModelConfig, Workload, load_strategy, verify
from mtp_mem.model.compiled_rows import compiled_rows
from mtp_mem.model.token_chunks import _softmax_minus_onehot
from mtp_mem.prediction.formulas import Shape, peak_over_baseline
from mtp_mem.prediction.simulated_step import trace_step
from mtp_mem.verification.scenarios import SCENARIOS

needs_a_compiler = pytest.mark.skipif(
    not (torch.cuda.is_available() or shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"
)
SPEC = "chunked_tokens:rows=compiled"


@needs_a_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_numbers_in_place_and_nothing_as_wide_as_the_logits(dtype: torch.dtype) -> None:
    share = torch.rand(48) * (torch.arange(48) % 5 > 0)
    column = torch.randint(4099, (48, 1))
    mine = (20 * torch.randn(48, 4099)).to(dtype)
    theirs = mine.clone()
    total = compiled_rows()(mine, column, share)
    torch.testing.assert_close(total, _softmax_minus_onehot(theirs, column, share))
    torch.testing.assert_close(mine, theirs, rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        compiled_rows()(mine, column, share)
    largest = max((event.self_cpu_memory_usage for event in found.key_averages()), default=0)
    assert largest < mine.nbytes / 8


@needs_a_compiler
def test_it_passes_the_verifier() -> None:
    names = ("n = 3", "a whole head ignored", "logits of 1e4", "frozen unembedding", "chunk of 1")
    found = verify([SPEC], dtypes=["fp32", "bf16"], scenarios=[s for s in SCENARIOS if s.name in names])
    assert len(found.checks) == 2 * len(names)
    assert [check.explain() for check in found.failures] == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_its_bytes_are_predicted_without_compiling(dtype: str) -> None:
    config: ModelConfig = tiny(vocab_size=4099, n_layers=6, n_future=2)
    workload = Workload(batch=4, sequence=128, dtype=dtype)  # type: ignore[arg-type]
    peaks = {}
    for spec in (f"{SPEC}:chunk=128", "chunked_tokens:chunk=128"):
        trace = trace_step(config, workload, load_strategy(spec))
        shape = Shape.of(dataclasses.asdict(config), dataclasses.asdict(workload), cuda=True)
        assert shape is not None
        formula = peak_over_baseline(spec, shape)
        assert formula is not None
        peaks[spec] = trace.peak().nbytes - trace.baseline
        assert 0 <= peaks[spec] - formula <= 32 * 2 + 32 + 32 * 128
    fused, eager = peaks.values()
    assert eager - fused >= (128 * 4099 * 4 if dtype == "bf16" else 0)
