"""Peaks on a GPU that need not be here: profile -> cases -> records, by fake tensors and the allocator's model."""

import dataclasses
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal

from mtp_mem.config.schema import GPU, Profile
from mtp_mem.environment import environment
from mtp_mem.errors import BadInput, MtpMemError
from mtp_mem.memory.trace import Trace
from mtp_mem.prediction import simulated_step
from mtp_mem.prediction.auto import settled
from mtp_mem.prediction.caching_allocator import replay
from mtp_mem.runs.bench import Progress
from mtp_mem.runs.record import Record, as_floor, fingerprint
from mtp_mem.strategy import load_strategy

Verdict = Literal["yes", "tight", "no"]
"""Whether a step fits; `tight`: what it allocates does, the segments it reserves with their unused parts do not."""


def check_predictable(profile: Profile) -> None:
    """Refuse what the fake instrument does not model, before any work.

    Raises:
        BadInput: a dtype other than bf16.
    """
    if profile.workload.dtype != "bf16":
        raise BadInput(
            f"workload.dtype = {profile.workload.dtype!r} cannot be predicted: only bf16 runs flash attention on CUDA"
            " and is modelled; valid: bf16"
        )


def verdict(allocated: int, reserved: int, limit: int) -> Verdict:
    """Do these predicted peaks fit into `limit` bytes?"""
    if allocated > limit:
        return "no"
    return "tight" if reserved > limit else "yes"


def predict(profile: Profile, gpu: GPU, progress: Progress) -> Iterator[Record]:
    """Predicted records of all the profile's cases on `gpu`, n by n."""
    env = environment("cpu")
    with simulated_step.without_collections():
        for n in profile.sweep.n:
            config = profile.model.with_n(n)
            progress(f"n={n} floor")
            rehearsal = simulated_step.Rehearsal(config, profile.workload, gpu=gpu)
            floor = as_floor(predicted(rehearsal.floor(), gpu))
            for spec in profile.sweep.strategies:
                progress(f"n={n} {spec}")
                facts: dict[str, Any] = {"status": "ok"}
                try:
                    strategy, chosen = settled(load_strategy(spec), config, profile.workload, cuda=True, gpu=gpu)
                    facts |= {"chosen": chosen, **predicted(rehearsal.trace(strategy), gpu)}
                except MtpMemError as e:
                    facts |= {"status": "error", "error": str(e)}
                shape, workload = dataclasses.asdict(config), dataclasses.asdict(profile.workload)
                yield Record(
                    case=fingerprint(spec, shape, workload, dataclasses.asdict(gpu), env["code"], env["torch"]),
                    created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                    backend="fake",
                    exactness="predicted",
                    strategy=spec,
                    n=n,
                    model=shape,
                    workload={**workload, "source": f"for {gpu.name}"},
                    environment={**env, "target": gpu.name, "target_bytes": gpu.total_bytes},
                    **floor,
                    **facts,
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
