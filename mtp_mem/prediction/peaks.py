"""Peaks of a step on a GPU that need not be here, from its trace and the model of the CUDA allocator."""

import dataclasses
from typing import Any

from mtp_mem._util import format_bytes
from mtp_mem.config.gpus import GPU
from mtp_mem.config.schema import Profile
from mtp_mem.errors import BadInput
from mtp_mem.memory.trace import Trace
from mtp_mem.prediction.cuda.allocator_settings import AllocatorSettings, allocator_settings
from mtp_mem.prediction.cuda.cublas import THREADS, workspaces
from mtp_mem.prediction.cuda.replay import first_products, replay


def check_predictable(profile: Profile) -> None:
    """Refuse what the fake instrument does not model, before any work.

    Raises:
        BadInput: fp64, for which CUDA has no fused attention.
    """
    if profile.workload.dtype == "fp64":
        raise BadInput(
            "workload.dtype = 'fp64' cannot be predicted: no fused attention of CUDA takes it; valid:"
            " bf16, bf16-mixed, bf16 + fp32 master, fp32, fp16"
        )


def settings_of(gpu: GPU) -> AllocatorSettings:
    """Settings of the target's allocator."""
    settings = allocator_settings(gpu.allocator)
    if settings.expandable is None:
        settings = dataclasses.replace(settings, expandable=gpu.expandable_segments)
    return settings


def assumptions(gpu: GPU) -> list[str]:
    """What every prediction for this target rests on, beside the step itself; a sentence each."""
    rule, settings = workspaces(gpu), settings_of(gpu)
    size = f"{format_bytes(rule.nbytes)} ({rule.nbytes:,} B)"
    kept = f"{THREADS} of {size}, kept from the first products on" if rule.kept else f"{size} during each product"
    stated = [f"cuBLAS workspaces: {kept} ({rule.because})"]
    if settings.not_modelled:
        stated.append(f"the allocator has settings that its model does not cover: {', '.join(settings.not_modelled)}")
    return stated


def predicted(trace: Trace, gpu: GPU, resident: tuple[int, ...] | None = None) -> dict[str, Any]:
    """A record's fields: the allocator's peaks and the tracked bytes that explain them.

    Args:
        trace: from the fake instrument.
        gpu: the target.
        resident: sizes in bytes of cuBLAS workspaces that stay allocated, and of what else is in no tensor; by default
            the workspaces that stay on the target from the step's products on.
    """
    if resident is None:
        resident = workspaces(gpu).resident(len(first_products(trace)))
    peak = trace.peak()
    blocks = replay(trace, settings_of(gpu), resident)
    by_category = dict(peak.by_category)
    by_category["workspace"] = by_category.get("workspace", 0) + sum(resident)
    return {
        "steps_before": 1,  # the replay runs the step once before, as the first one, which makes the optimizer's state
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
