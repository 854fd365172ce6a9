"""Kernels of other projects: are they here, and can they run?"""

import importlib
import os
from typing import Any

import torch
from torch import Tensor

from mtp_mem.data import IGNORE
from mtp_mem.errors import BadInput, Missing
from mtp_mem.limits import Limits


def library(strategy: str, module: str, package: str, *, interpreted: bool = False) -> Any:
    """Import a library's module for a strategy.

    Args:
        strategy: its name, for messages.
        module: to import.
        package: that has it.
        interpreted: its kernels are also right in Triton's interpreter, which TRITON_INTERPRET=1 asks for.

    Raises:
        Missing: it is not installed, there is no CUDA device for it, or it cannot be imported here.
    """
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] == module.partition(".")[0]:
            raise Missing(
                f"strategy {strategy!r} needs the package {package!r}, which is not installed;"
                " pip install 'mtp-mem[kernels]' installs all of them"
            ) from None
        raise Missing(f"strategy {strategy!r}: {package} needs {e.name!r}, which is not installed") from None
    except Exception as e:  # libraries of kernels look for their compiler and GPU when imported
        raise Missing(f"strategy {strategy!r}: {package} cannot be imported here: {e}".split("\n")[0]) from None
    if not torch.cuda.is_available() and not (interpreted and os.environ.get("TRITON_INTERPRET") == "1"):
        other = ", or TRITON_INTERPRET=1: Triton's interpreter, for checking it" if interpreted else ""
        raise Missing(f"strategy {strategy!r}: {package} needs a CUDA device{other}")
    return found


def flat(hidden: Tensor, unembedding: Tensor, targets: Tensor, limits: Limits) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the libraries take: rows (N, D) and unembedding (V, D) in one dtype, targets (N,), count of valid ones.

    The count is at least 1. The libraries' own mean divides by zero where no target is valid, so losses here are sums
    over this count.

    Raises:
        BadInput: they exceed the limits.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    wanted = targets.flatten()
    if why := limits.refusal(dtype, N=len(wanted), D=hidden.shape[-1], V=unembedding.shape[0]):
        raise BadInput(f"the kernel {why}")
    count = (wanted != IGNORE).sum().clamp(min=1)
    return hidden.flatten(0, -2).to(dtype), unembedding.to(dtype), wanted, count
