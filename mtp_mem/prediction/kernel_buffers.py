"""Buffers that CUDA kernels take from the caching allocator inside one operator, where no dispatch mode sees them.

`mtp-mem predict --check` holds each row against a CUDA device.
"""

from typing import Any

import torch

from mtp_mem.memory.trace import Buffers

_aten = torch.ops.aten


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def flash_forward(args: tuple[Any, ...], multiprocessors: int) -> list[int]:
    """flash_api.cpp, set_params_splitkv: a grid too small for the GPU is split over the keys, partial results in fp32.

    The number of splits is the smallest whose waves are at least 85 % as full as the fullest of all candidates.
    """
    query, key = args[0], args[1]
    B, H, S, head_dim = query.shape
    block = 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64
    key_blocks, tiles = -(-key.shape[2] // block), B * H * -(-S // 64)
    slots = 2 * multiprocessors
    dropout = len(args) > 3 and args[3] > 0
    if dropout or tiles >= 0.8 * slots:
        return []
    fullness: dict[int, float] = {}
    for splits in range(1, min(128, slots, key_blocks) + 1):
        per_split = -(-key_blocks // splits)
        if splits == 1 or per_split != -(-key_blocks // (splits - 1)):  # others only leave splits empty
            waves = tiles * splits / slots
            fullness[splits] = waves / -(-tiles * splits // slots)
    splits = next(s for s, full in fullness.items() if full >= 0.85 * max(fullness.values()))
    if splits == 1:
        return []
    rows = splits * B * H * S
    return [4 * rows, 4 * rows * _up(head_dim, 32 if head_dim <= 128 else 64)]


def flash_backward(args: tuple[Any, ...], _multiprocessors: int) -> list[int]:
    """flash_api.cpp, mha_bwd: fp32 softmax sums and query-gradient accumulator; expanded dk, dv for grouped queries.

    Deterministic algorithms multiply the accumulator by the number of splits; that is not modelled.
    """
    query, key = args[1], args[2]
    B, H, S, head_dim = query.shape
    rows = B * H * _up(S, 128)
    buffers = [4 * rows, 4 * rows * _up(head_dim, 32 if head_dim <= 128 else 64)]
    if key.shape[1] != H:
        buffers += [query.element_size() * B * key.shape[2] * H * head_dim] * 2
    return buffers


def efficient_backward(args: tuple[Any, ...], _multiprocessors: int) -> list[int]:
    """attention_backward.cu and kernel_backward.h: in fp32 the product of output and gradient, its row sums twice.

    Then, in the product's place, the accumulator of the query's gradient in tiles of 64 by 64 with a lock each. Not
    seen on CUDA.
    """
    output = args[5]
    B, H, S, head_dim = output.shape
    rows = 4 * B * H * S
    tiles = B * H * -(-S // 64) * -(-head_dim // 64)
    return [rows, rows, max(rows * head_dim, tiles * (16 + 4 * 64 * 64))]


def embedding_backward(args: tuple[Any, ...], _multiprocessors: int) -> list[int]:
    """Embedding.cu, EmbeddingBackwardKernel.cu: more than 3072 indices are sorted and summed in fp32 partial rows."""
    gradient, indices, V = args[0], args[1].numel(), args[2]
    if indices <= 3072:
        return []
    segments = min(indices, V)
    partial_rows = indices // 10 + segments
    return [8 * indices] * 3 + [8 * segments] * 2 + [8 * partial_rows, 4 * partial_rows * gradient.shape[-1]]


def foreach_norm(args: tuple[Any, ...], _multiprocessors: int) -> list[int]:
    """ForeachReduceOp.cu: one fp32 partial for each tensor and each 65536 elements of the largest tensor."""
    tensors = args[0]
    return [4 * len(tensors) * -(-max(t.numel() for t in tensors) // 65536)]


KERNELS: dict[Any, Buffers] = {
    _aten._scaled_dot_product_flash_attention.default: flash_forward,
    _aten._scaled_dot_product_flash_attention_backward.default: flash_backward,
    _aten._scaled_dot_product_efficient_attention_backward.default: efficient_backward,
    _aten.embedding_dense_backward.default: embedding_backward,
    _aten._foreach_norm.Scalar: foreach_norm,
}
"""The buffers inside an operator's kernel, by ATen overload. Each function names its source in PyTorch 2.13."""
