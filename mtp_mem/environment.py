"""What the figures were measured on: machine, libraries, code."""

import hashlib
import importlib
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mtp_mem._version import __version__

ALLOCATOR_VARIABLES = (
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING", "CUBLAS_WORKSPACE_CONFIG"),
    *("TORCH_CUBLAS_WORKSPACE_CACHE", "OMP_NUM_THREADS"),
)


@cache
def environment(device_type: str) -> dict[str, Any]:
    """Everything about this machine, for "cuda" with its current GPU, that a figure depends on; bytes are integers."""
    import psutil

    facts: dict[str, Any] = {
        "mtp_mem": __version__,
        "code": code_digest(),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "host_bytes": psutil.virtual_memory().total,
        "torch": torch.__version__,
        "torch_git": torch.version.git_version,
        **numerics(),
        "variables": {name: os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ},
        "device": "cpu",
    }
    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {
            "device": properties.name,
            "device_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **device_facts(),
        }
    return facts


def footer(env: dict[str, Any]) -> str:
    """One line for the foot of a chart."""
    device = env["cpu"] if env["device"] == "cpu" else env["device"]
    commit = f" · commit {env['commit']}" if env["commit"] else ""
    return f"{device} · torch {env['torch']} · mtp_mem {env['mtp_mem']}{commit}"


@cache
def code_digest() -> str:
    """Identifies this version of mtp_mem's code, so that results of another version are not mistaken for its own."""
    # Not by an import statement: mtp_mem.strategies exists only in an installation, and type checkers read the clone.
    strategies = Path(str(importlib.import_module("mtp_mem.strategies").__file__)).parent
    root = Path(__file__).parent
    files = {f"mtp_mem/{path.relative_to(root)}": path for path in root.rglob("*.py")}
    files |= {f"mtp_mem/strategies/{path.relative_to(strategies)}": path for path in strategies.rglob("*.py")}
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name].read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _commit() -> str | None:
    """The commit of the clone that this code runs from, with "+" if the tree is dirty; None outside a clone."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def require_deterministic() -> None:
    """From here on torch takes deterministic kernels only, and raises where an operator has none.

    Call it before the first work on a CUDA device: cuBLAS reads its variable once.
    """
    # Workspaces with which cuBLAS gives the same bits in every run (its documentation, "Results reproducibility").
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def numerics() -> dict[str, Any]:
    """torch's numeric settings, as every record keeps them; with `tf32` fp32 products may lose 13 mantissa bits."""
    products = torch.backends.cuda.matmul
    return {
        "matmul_precision": torch.get_float32_matmul_precision(),
        "tf32": products.allow_tf32,
        "bf16_reduced_precision_reduction": products.allow_bf16_reduced_precision_reduction,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


# What the NVIDIA driver says of a GPU and of this process on it. Reads only; never changes a setting.

NVML_PREFIXES = ("GPU-", "MIG-")  # NVML's UUIDs begin with one, torch's with none


@contextmanager
def _nvml_session() -> Iterator[Any]:
    """Yields NVML's handle of torch's current device, or None; by UUID, as CUDA_VISIBLE_DEVICES and MIG renumber."""
    import pynvml

    _ask(pynvml.nvmlInit)
    try:
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        names = (prefix + uuid.removeprefix(prefix) for prefix in NVML_PREFIXES)
        handles = (_ask(pynvml.nvmlDeviceGetHandleByUUID, name) for name in names)
        yield next((handle for handle in handles if handle is not None), None)
    finally:
        _ask(pynvml.nvmlShutdown)


def device_facts() -> dict[str, Any]:
    """Driver, UUID, power limit, clocks, temperature, throttle reasons and other processes' bytes, as NVML gives them.

    A fact that NVML lacks is None (`mig_slice`: False, `other_process_bytes`: 0); a device that it does not find has
    the driver alone.
    """
    import pynvml

    with _nvml_session() as handle:
        facts = {"driver": _ask(pynvml.nvmlSystemGetDriverVersion)}
        if handle is None:
            return facts
        return facts | {
            "uuid": _ask(pynvml.nvmlDeviceGetUUID, handle),
            "mig_slice": bool(_ask(pynvml.nvmlDeviceIsMigDeviceHandle, handle)),
            "power_limit_mw": _ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle),
            "sm_clock_mhz": _ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": _ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
            "temperature_c": _ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
            "throttle_reasons": _ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle),
            "other_process_bytes": sum(p.usedGpuMemory or 0 for p in _processes(handle) if p.pid != os.getpid()),
        }


def process_bytes() -> int | None:
    """Bytes the driver counts for this process now: segments and CUDA context. None where it does not tell."""
    with _nvml_session() as handle:
        processes = [] if handle is None else _processes(handle)
        return next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)


def _processes(handle: Any) -> list[Any]:
    import pynvml

    return _ask(pynvml.nvmlDeviceGetComputeRunningProcesses, handle) or []


def _ask(question: Any, *args: Any) -> Any:
    """NVML's answer; None where it has none: no driver, no such device, not supported."""
    import pynvml

    try:
        return question(*args)
    except pynvml.NVMLError:
        return None
