"""What the figures were measured on: machine, libraries, code."""

import hashlib
import importlib
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

import mtp_mem

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG", "OMP_NUM_THREADS")


@cache
def environment(device_type: str) -> dict[str, Any]:
    """Everything about this machine that a figure depends on; bytes are integers."""
    found: dict[str, Any] = {
        "mtp_mem": mtp_mem.__version__,
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
        from mtp_mem.memory import nvml

        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {
            "device": properties.name,
            "device_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **nvml.device_facts(),
        }
    return found


def footer(env: dict[str, Any]) -> str:
    """One line for the foot of a chart."""
    device = env["cpu"] if env["device"] == "cpu" else env["device"]
    commit = f" · commit {env['commit']}" if env["commit"] else ""
    return f"{device} · torch {env['torch']} · mtp_mem {env['mtp_mem']}{commit}"


@cache
def code_digest() -> str:
    """Identifies this version of mtp_mem's code, so that results of another version are not mistaken for its own."""
    # By name: the folder becomes mtp_mem.strategies only in an installation, and type checkers read the clone.
    strategies = Path(str(importlib.import_module("mtp_mem.strategies").__file__)).parent
    root = Path(mtp_mem.__file__).parent
    files = {f"mtp_mem/{path.relative_to(root)}": path for path in root.rglob("*.py")}
    files |= {f"mtp_mem/strategies/{path.relative_to(strategies)}": path for path in strategies.rglob("*.py")}
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name].read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _commit() -> str | None:
    """The commit of the clone that this code runs from, "+" if the tree is dirty; None outside a clone."""
    root = Path(mtp_mem.__file__).parent.parent
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


CUBLAS_CONFIG = ":4096:8"
"""Workspaces with which cuBLAS promises the same bits again (its documentation, "Results reproducibility")."""


def require_deterministic() -> None:
    """From here on torch takes deterministic kernels only, and raises where an operator has none.

    Call it before the first work on a CUDA device: cuBLAS reads its variable once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_CONFIG)
    torch.use_deterministic_algorithms(True)


def numerics() -> dict[str, Any]:
    """The settings in force, as every record keeps them; `tf32` says whether fp32 products may lose 13 bits."""
    products = torch.backends.cuda.matmul
    return {
        "matmul_precision": torch.get_float32_matmul_precision(),
        "tf32": products.allow_tf32,
        "bf16_reduced_precision_reduction": products.allow_bf16_reduced_precision_reduction,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
