"""Peaks of a step on a GPU that need not be here, from its trace and the model of the CUDA allocator."""

from typing import Any

from mtp_mem.config.schema import GPU, Profile
from mtp_mem.errors import BadInput
from mtp_mem.memory.trace import Trace
from mtp_mem.prediction import simulated_step
from mtp_mem.prediction.caching_allocator import replay


def check_predictable(profile: Profile) -> None:
    """Refuse what the fake instrument does not model, before any work.

    Raises:
        BadInput: fp64, whose attention on CUDA is a chain of operators.
    """
    if profile.workload.dtype == "fp64":
        raise BadInput(
            "workload.dtype = 'fp64' cannot be predicted: no fused attention of CUDA takes it; valid:"
            " bf16, bf16-mixed, bf16 + fp32 master, fp32"
        )


def predicted(trace: Trace, gpu: GPU, workspaces: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The allocator's figures and the tracked ones that explain them.

    Args:
        trace: from the fake instrument.
        gpu: the target.
        workspaces: cuBLAS workspaces that stay allocated; by default as many of the GPU's size as a step makes.
    """
    resident = (gpu.workspace_bytes,) * simulated_step.CUBLAS_WORKSPACES if workspaces is None else workspaces
    peak = trace.peak()
    blocks = replay(trace, expandable=gpu.expandable_segments, workspaces=resident)
    by_category: dict[str, int] = {str(category): nbytes for category, nbytes in peak.by_category.items()}
    by_category["workspace"] = by_category.get("workspace", 0) + sum(resident)
    return {
        "steps_before": simulated_step.STEPS_BEFORE,
        "baseline_bytes": trace.baseline + sum(resident),
        "peak_requested_bytes": blocks.requested_peak,
        "peak_over_baseline_bytes": peak.nbytes - trace.baseline,
        "peak_allocated_bytes": blocks.allocated_peak,
        "peak_reserved_bytes": blocks.reserved_peak,
        "peak_phase": peak.phase,
        "peak_op": peak.op,
        "phase_peaks": {phase: nbytes + sum(resident) for phase, nbytes in trace.phase_peaks().items()},
        "bytes_at_peak": by_category,
    }
