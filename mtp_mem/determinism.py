"""What decides the bits of a result besides the order of sums: which kernels torch may take, and at what precision."""

import os
from typing import Any

import torch

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
