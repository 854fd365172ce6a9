"""What a comparison will take, before it is run: bytes and minutes of each case, and whether it can fit at all.

By closed forms alone, so that it costs nothing: the bytes are within a per cent of `mtp-mem predict`'s, the minutes are
for planning a budget and no more.
"""

import dataclasses
from dataclasses import dataclass

import psutil

from mtp_mem._util import GiB
from mtp_mem.config.schema import GPU, ModelConfig, Profile, Workload
from mtp_mem.model.parameters import parameters, weight_bytes
from mtp_mem.model.shape import Shape
from mtp_mem.prediction.formulas import formula_over_baseline, step_flops

CONTEXT = GiB
"""Left on a GPU for the CUDA context and libraries."""
UTILISATION = 0.4  # of a GPU's peak, for a whole step
CPU_FLOPS = 5e10  # per second: two cores in fp32, as seen in profiles/recorded/cpu-2-cores
START_S = {True: 20.0, False: 1.0}  # a process, its CUDA context and model; by whether there is a GPU
STEPS = {True: 7, False: 4}  # besides the timed ones: warm-up, measurement with its repeats, history, gradient check


@dataclass(frozen=True)
class Estimate:
    """One case: `peak_bytes` and `seconds` are None where no closed form holds, and then it counts as fitting."""

    n: int
    strategy: str
    peak_bytes: int | None
    seconds: float | None
    fits: bool


def capacity(gpu: GPU | None) -> int:
    """Bytes that a case may take on the GPU, or without one in this machine's memory now."""
    return int(psutil.virtual_memory().available) if gpu is None else gpu.total_bytes - CONTEXT


def estimate(profile: Profile, gpu: GPU | None) -> list[Estimate]:
    """The profile's cases, n by n, strategies in the profile's order.

    Args:
        profile: its `sweep` names the cases.
        gpu: where they will run; None: on this machine's CPU.
    """
    found = []
    for n in profile.sweep.n:
        config, workload = profile.model.with_n(n), profile.workload
        shape = Shape.of(dataclasses.asdict(config), dataclasses.asdict(workload), cuda=gpu is not None)
        before = baseline(config, workload)
        for spec in profile.sweep.strategies:
            over = None if shape is None else formula_over_baseline(spec, shape)
            peak = None if over is None else before + over
            seconds = None
            if shape is not None:
                speed = CPU_FLOPS if gpu is None else UTILISATION * gpu.flops
                steps = STEPS[gpu is not None] + profile.sweep.rounds
                seconds = START_S[gpu is not None] + steps * step_flops(spec, shape) / speed
            found.append(Estimate(n, spec, peak, seconds, peak is None or peak <= capacity(gpu)))
    return found


def baseline(config: ModelConfig, workload: Workload) -> int:
    """Bytes live before a step: parameters, AdamW's two moments of each, tokens and n rows of targets."""
    weights = weight_bytes(sum(parameters(config).values()), workload.dtype)
    return 3 * weights + 8 * (1 + config.n_future) * workload.tokens
