"""Bytes of a step on a CUDA device, as PyTorch's caching allocator counts them.

No dispatch mode and no profiler: both change what is allocated, or when.
"""

import gc
from dataclasses import dataclass

import torch

from mtp_mem.memory import nvml
from mtp_mem.step import TrainingStep


@dataclass(frozen=True)
class CudaPeaks:
    """`allocated` is `torch.cuda.max_memory_allocated`; all integers are bytes."""

    baseline: int  # requested bytes live before the step
    requested: int
    allocated: int
    reserved: int
    retries: int  # times the allocator freed its cache and tried again: above 0 the peak was bent by lack of memory
    nvml_process: int | None


def measure(step: TrainingStep) -> CudaPeaks:
    """Run the step once and read the allocator's peaks. Run it before: lazy buffers, optimizer state."""
    step.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    step()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    return CudaPeaks(
        baseline=before["requested_bytes.all.current"],
        requested=after["requested_bytes.all.peak"],
        allocated=after["allocated_bytes.all.peak"],
        reserved=after["reserved_bytes.all.peak"],
        retries=after["num_alloc_retries"] - before["num_alloc_retries"],
        nvml_process=nvml.process_bytes(),
    )
