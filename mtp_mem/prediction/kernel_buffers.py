"""Buffers that CUDA kernels take from the caching allocator inside one operator, where no dispatch mode sees them.

`mtp-mem predict --check` holds each row against a CUDA device.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from mtp_mem.config.gpus import GPU
from mtp_mem.memory.trace import Buffers
from mtp_mem.memory.tracker import PRODUCTS
from mtp_mem.prediction.cuda.cublas import product_buffers, workspaces
from mtp_mem.prediction.cuda.reduction_buffers import reduction_buffers

_aten = torch.ops.aten


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def flash_forward(args: tuple[Any, ...], gpu: GPU) -> list[int]:
    """flash_api.cpp, set_params_splitkv: a grid too small for the GPU is split over the keys, partial results in fp32.

    The number of splits is the smallest whose waves are at least 85 % as full as the fullest of all candidates.
    """
    query, key = args[0], args[1]
    B, H, S, head_dim = query.shape
    block = 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64
    key_blocks, tiles = -(-key.shape[2] // block), B * H * -(-S // 64)
    slots = 2 * gpu.multiprocessors
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


def flash_backward(args: tuple[Any, ...], _gpu: GPU) -> list[int]:
    """flash_api.cpp, mha_bwd: fp32 softmax sums and query-gradient accumulator; expanded dk, dv for grouped queries.

    Before it, attention_backward.cu copies the output and its gradient where they do not lie token by token.
    Deterministic algorithms multiply the accumulator by the number of splits; that is not modelled.
    """
    query, key = args[1], args[2]
    B, H, S, head_dim = query.shape
    rows = B * H * _up(S, 128)
    buffers = [4 * rows, 4 * rows * _up(head_dim, 32 if head_dim <= 128 else 64)]
    if key.shape[1] != H:
        buffers += [query.element_size() * B * key.shape[2] * H * head_dim] * 2
    return buffers + [t.nbytes for t in (args[0], args[4]) if not t.transpose(1, 2).is_contiguous()]


def efficient_backward(args: tuple[Any, ...], _gpu: GPU) -> list[int]:
    """attention_backward.cu and kernel_backward.h: in fp32 output times gradient, elementwise, and its row sums twice.

    Then, in place of the product and one of the sums, the accumulator of the query's gradient in tiles of 64 by 64 with
    a lock each.
    """
    output = args[5]
    B, H, S, head_dim = output.shape
    rows = 4 * B * H * S
    tiles = B * H * -(-S // 64) * -(-head_dim // 64) * (16 + 4 * 64 * 64)
    return [rows, rows, rows * head_dim] if rows + rows * head_dim >= tiles else [rows, tiles]


def embedding_backward(args: tuple[Any, ...], _gpu: GPU) -> list[int]:
    """Embedding.cu, EmbeddingBackwardKernel.cu: more than 3072 indices are sorted and summed in fp32 partial rows.

    Two numbers of segments are counted on the device.
    """
    gradient, indices, V = args[0], args[1].numel(), args[2]
    if indices <= 3072:
        return []
    segments = min(indices, V)
    partial_rows = indices // 10 + segments
    return [8, 8] + [8 * indices] * 3 + [8 * segments] * 2 + [8 * partial_rows, 4 * partial_rows * gradient.shape[-1]]


def foreach_norm(args: tuple[Any, ...], _gpu: GPU) -> list[int]:
    """ForeachReduceOp.cu: one fp32 partial for each tensor and each 65536 elements of the largest tensor."""
    tensors = args[0]
    return [4 * len(tensors) * -(-max(t.numel() for t in tensors) // 65536)]


def sum_over(args: tuple[Any, ...], gpu: GPU) -> list[int]:
    """ReduceSumProdKernel.cu: sums over some dimensions, or all; integers are copied to int64 first."""
    tensor, dims = args[0], args[1] if len(args) > 1 and args[1] else ()
    if tensor.is_floating_point():
        return reduction_buffers(tensor, dims, gpu, vector=8 if tensor.element_size() == 2 else 4)
    copied = [] if tensor.dtype == torch.int64 else [8 * tensor.numel()]
    return copied + reduction_buffers(tensor, dims, gpu, partial=8)


def reduce_over(args: tuple[Any, ...], gpu: GPU) -> list[int]:
    """ReduceMomentKernel.cu, ReduceMaxValuesKernel.cu: means and maxima over some dimensions, in fp32."""
    return reduction_buffers(args[0], args[1] if len(args) > 1 and args[1] else (), gpu)


def vector_norm(args: tuple[Any, ...], gpu: GPU) -> list[int]:
    """ReduceNormKernel.cu: the norm of all elements, or over some dimensions."""
    return reduction_buffers(args[0], args[2] if len(args) > 2 and args[2] else (), gpu)


class Kernel(NamedTuple):
    """A row of the table.

    Attributes:
        buffers: (the operator's arguments, the target) -> sizes in bytes, live at once until the operator ends. Its
            docstring names the source, in PyTorch 2.13.
        seen: on which GPUs these sizes were seen; empty: nowhere, they are read from the source alone.
    """

    buffers: Callable[[tuple[Any, ...], GPU], list[int]]
    seen: str = ""


KERNELS: dict[Any, Kernel] = {
    _aten._scaled_dot_product_flash_attention.default: Kernel(flash_forward, "an H100"),
    _aten._scaled_dot_product_flash_attention_backward.default: Kernel(flash_backward, "an H100"),
    _aten._scaled_dot_product_efficient_attention_backward.default: Kernel(efficient_backward, "an H100"),
    _aten.embedding_dense_backward.default: Kernel(
        embedding_backward, "an H100; how 16 published peaks of an A100 grow with V"
    ),
    _aten._foreach_norm.Scalar: Kernel(foreach_norm, "an H100"),
    _aten.sum.dim_IntList: Kernel(sum_over, "an H100; sums over rows: 13 sizes in public histories of real GPUs"),
    _aten.sum.default: Kernel(sum_over, "an H100"),
    _aten.mean.dim: Kernel(reduce_over, "an H100"),
    _aten.amax.default: Kernel(reduce_over, "an H100"),
    _aten.linalg_vector_norm.default: Kernel(vector_norm, "an H100"),
}
"""The buffers inside an operator's kernel, by ATen overload."""


def kernels_of(gpu: GPU) -> dict[Any, Buffers]:
    """The table for one GPU, as `Tracker` takes it; with cuBLAS workspaces, where each product takes its own."""
    table: dict[Any, Buffers] = {operator: partial(_sizes, kernel, gpu) for operator, kernel in KERNELS.items()}
    rule = workspaces(gpu)
    if not rule.kept:
        of_product = partial(product_buffers, nbytes=rule.nbytes)
        for packet in (getattr(_aten, name) for name in PRODUCTS):
            table |= {getattr(packet, overload): of_product for overload in packet.overloads()}
    return table


def _sizes(kernel: Kernel, gpu: GPU, args: tuple[Any, ...]) -> list[int]:
    return kernel.buffers(args, gpu)
