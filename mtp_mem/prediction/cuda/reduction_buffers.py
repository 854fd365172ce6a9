"""What a reduction takes on CUDA beside its result: partial sums, and counters of blocks that have written theirs.

aten/src/ATen/native/cuda/Reduce.cuh of PyTorch 2.13 (setReduceConfig, global_memory_size, semaphore_size): where few
results have many inputs each, the inputs of one result are split over thread blocks. Sums over the rows of a matrix,
an RMSNorm's weight gradient for one, do so from about a thousand rows on, and the buffer is often larger than the
matrix: it has room for the partial sums of every lane.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from mtp_mem.config.gpus import GPU

BLOCK, WARP = 512, 32
"""Threads of a block and of a warp."""
FEWEST, MOST = 16, 256
"""Inputs of one thread: blocks are added while it has at least the first, and always if it has more than the second."""
LARGEST_OFFSET = 2**31 - 1
"""Bytes that a kernel's 32-bit indices reach; a larger tensor is reduced in halves, one after the other."""

Axis = tuple[int, int]
"""Extent, and stride in elements."""


def reduction_buffers(tensor: Tensor, dims: Sequence[int], gpu: GPU, *, partial: int = 4, vector: int = 4) -> list[int]:
    """Sizes of the buffers in bytes, live until the kernel has been launched.

    A sum into bf16 that is done in halves takes one more buffer, as large as its result in fp32; that is not modelled.

    Args:
        tensor: what is reduced; only its shape, strides and dtype count.
        dims: dimensions that are reduced; empty: all.
        gpu: the target.
        partial: bytes of a partial result.
        vector: elements that a thread loads at once where the reduced dimension is contiguous.
    """
    axes = tuple(zip(tensor.shape, tensor.stride(), strict=True))
    layout = axes, tuple(dims), tensor.element_size(), int(tensor.storage_offset())
    return list(_sizes(*layout, gpu.multiprocessors, gpu.threads_per_multiprocessor, partial, vector))


@lru_cache(maxsize=4096)  # a chunk loop reduces tensors of one shape thousands of times
def _sizes(
    axes: tuple[Axis, ...],
    dims: tuple[int, ...],
    itemsize: int,
    offset: int,
    multiprocessors: int,
    threads: int,
    partial: int,
    vector: int,
) -> list[int]:
    over = {dim % len(axes) for dim in dims} if dims and axes else set(range(len(axes)))
    reduced = _merged([axis for dim, axis in enumerate(axes) if dim in over])
    kept = _merged([axis for dim, axis in enumerate(axes) if dim not in over])
    while itemsize * (1 + sum((extent - 1) * stride for extent, stride in reduced + kept)) > LARGEST_OFFSET:
        axis = max(reduced + kept, key=lambda axis: (axis[0] - 1) * axis[1])
        part = reduced if axis in reduced else kept
        part[part.index(axis)] = (-(-axis[0] // 2), axis[1])
    inputs, outputs = (math.prod(extent for extent, _ in axes) for axes in (reduced, kept))
    if not reduced or not inputs * outputs:
        return []
    along = not kept or reduced[0][1] < kept[0][1]  # threads of a row reduce one result together, else one each
    across, down = (inputs, outputs) if along else (outputs, inputs)
    columns = 1  # results of one thread
    if along and reduced[0][1] == 1 and across >= 128 and len(reduced) == 1:
        across //= vector
    elif not along and kept[0][1] == 1:
        aligned = (offset, kept[0][0], *(stride for _, stride in (reduced + kept[1:])))
        columns = next(n for n in (4, 2, 1) if all(value % n == 0 for value in aligned))
        across //= columns
    width, height = _block(across, down, BLOCK // columns)
    each = -(-inputs // width) if along else inputs  # inputs of one thread
    if each < min(FEWEST * height, MOST):
        return []
    each = -(-each // height)
    grid = outputs if along else -(-(outputs // columns) // width)
    wanted = multiprocessors * (threads // (width * height))
    if each < MOST or grid > wanted:
        return []
    blocks = max(min(-(-wanted // grid), -(-each // FEWEST)), -(-each // MOST))
    if blocks == 1:
        return []
    return [partial * outputs * blocks * (1 if along else width * columns), 4 * grid]


def _merged(axes: list[Axis]) -> list[Axis]:
    """The axes, smallest stride first; an axis that continues the one before it is merged into that one."""
    merged: list[Axis] = []
    for extent, stride in sorted((axis for axis in axes if axis[0] != 1), key=lambda axis: axis[1]):
        if merged and merged[-1][0] * merged[-1][1] == stride:
            merged[-1] = (merged[-1][0] * extent, merged[-1][1])
        else:
            merged.append((extent, stride))
    return merged


def _block(across: int, down: int, threads: int) -> tuple[int, int]:
    """Width and height of a block: powers of two that do not exceed the work in either direction."""
    widest, highest = (min(1 << (size.bit_length() - 1), threads) for size in (across, down))
    height = min(highest, threads // min(widest, WARP))
    return min(widest, threads // height), height
