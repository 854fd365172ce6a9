"""What the NVIDIA driver says of a GPU and of this process on it. Reads only; never changes a setting."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pynvml
import torch

PREFIXES = ("GPU-", "MIG-")  # NVML's names have one, torch's have none


@contextmanager
def _session() -> Iterator[Any]:
    """The NVML handle of torch's current device, found by UUID so that CUDA_VISIBLE_DEVICES and MIG do not mislead."""
    pynvml.nvmlInit()
    try:
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        handles = (_ask(pynvml.nvmlDeviceGetHandleByUUID, prefix + uuid.removeprefix(prefix)) for prefix in PREFIXES)
        yield next((handle for handle in handles if handle is not None), None)
    finally:
        pynvml.nvmlShutdown()


def device_facts() -> dict[str, Any]:
    """Driver, UUID, power limit, clocks, throttle reasons and other processes' bytes; a fact NVML lacks is None."""
    try:
        with _session() as handle:
            if handle is None:
                return {"driver": pynvml.nvmlSystemGetDriverVersion()}
            processes = _ask(pynvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
            return {
                "driver": pynvml.nvmlSystemGetDriverVersion(),
                "uuid": _ask(pynvml.nvmlDeviceGetUUID, handle),
                "mig_slice": bool(_ask(pynvml.nvmlDeviceIsMigDeviceHandle, handle)),
                "power_limit_mw": _ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle),
                "sm_clock_mhz": _ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
                "memory_clock_mhz": _ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
                "temperature_c": _ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
                "throttle_reasons": _ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle),
                "other_process_bytes": sum(p.usedGpuMemory or 0 for p in processes if p.pid != os.getpid()),
            }
    except pynvml.NVMLError:
        return {"driver": None}


def process_bytes() -> int | None:
    """Bytes the driver counts for this process now: segments and CUDA context. None where it does not tell."""
    try:
        with _session() as handle:
            processes = [] if handle is None else _ask(pynvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
            for process in processes:
                if process.pid == os.getpid():
                    return process.usedGpuMemory  # type: ignore[no-any-return]
    except pynvml.NVMLError:
        pass
    return None


def _ask(question: Any, *args: Any) -> Any:
    try:
        return question(*args)
    except pynvml.NVMLError:
        return None
