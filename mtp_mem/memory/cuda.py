"""Bytes of a step on a CUDA device, as PyTorch's caching allocator counts them.

No dispatch mode, no profiler: both change what is allocated, or when.
"""

import gc
from dataclasses import dataclass, replace

import torch

from mtp_mem.distributed.seam import local
from mtp_mem.environment import process_bytes
from mtp_mem.memory.tracker import between_steps
from mtp_mem.step import TrainingStep


@dataclass(frozen=True)
class CudaPeaks:
    """Peaks of one step in bytes; `allocated` is `torch.cuda.max_memory_allocated`."""

    baseline: int  # requested bytes live before the step
    unnamed: int  # the part of `baseline` in no tensor of ours: cuBLAS workspaces
    requested: int
    allocated: int
    reserved: int
    spread: int  # largest minus smallest allocated peak of the repeats
    retries: int  # times the allocator freed its cache and tried again: above 0 the peak was bent by lack of memory
    nvml_process: int | None  # of this process, by the driver; None: unknown


def measure(step: TrainingStep, repeats: int = 3) -> CudaPeaks:
    """Run the step `repeats` times and return the peaks of the run that allocates most.

    The caller has run the step before, so that lazy buffers and optimizer state exist.
    """
    runs = [_once(step) for _ in range(repeats)]
    worst = max(runs, key=lambda peaks: peaks.allocated)
    spread = worst.allocated - min(peaks.allocated for peaks in runs)
    return replace(worst, spread=spread, retries=sum(peaks.retries for peaks in runs))


def _once(step: TrainingStep) -> CudaPeaks:
    step.model.zero_grad(set_to_none=step.training.set_to_none)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    named = _tensor_bytes(step)  # before the step, which leaves gradients
    step()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    baseline = before["requested_bytes.all.current"]
    return CudaPeaks(
        baseline=baseline,
        unnamed=baseline - named,
        requested=after["requested_bytes.all.peak"],
        allocated=after["allocated_bytes.all.peak"],
        reserved=after["reserved_bytes.all.peak"],
        spread=0,
        retries=after["num_alloc_retries"] - before["num_alloc_retries"],
        nvml_process=process_bytes(),
    )


def _tensor_bytes(step: TrainingStep) -> int:
    """Bytes of the tensors that live between steps, each storage once."""
    storages = [local(tensor).untyped_storage() for _, _, tensor in between_steps(step) if tensor.is_cuda]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
