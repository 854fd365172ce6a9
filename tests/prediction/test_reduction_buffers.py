"""Buffers of reductions on CUDA: sizes that real GPUs showed, and where the source says that there are none."""

import dataclasses

import pytest
import torch

from mtp_mem.config.gpus import GPU, load_gpu
from mtp_mem.prediction.cuda.reduction_buffers import reduction_buffers
from mtp_mem.prediction.kernel_buffers import KERNELS

SEEN = [
    (4096, 1024, 108, [33554432, 32]),
    (2048, 1024, 108, [16777216, 32]),
    (1024, 1024, 108, [8388608, 32]),
    (512, 1024, 108, []),
    (2000, 512, 108, [8388608, 16]),
    (1500, 512, 108, [6291456, 16]),
    (1000, 512, 108, []),
    (2560, 512, 132, [10485760, 16]),
    (2560, 1024, 132, [20971520, 32]),
    (2560, 2048, 132, [41943040, 64]),
    (10000, 512, 132, [41156608, 16]),
    (10000, 1024, 132, [82313216, 32]),
    (10000, 2048, 132, [138412032, 64]),
]
"""(rows, columns, multiprocessors, the buffers): public memory histories of real GPUs, of `sum` over fp32 rows.

An RMSNorm's weight gradient under torch 2.6 and 2.11, of GPUs whose size does not matter here, and on an H100 a
transposed activation and transposed logits; in the last one the 132 multiprocessors are the limit.
"""


def gpu_with(multiprocessors: int) -> GPU:
    return dataclasses.replace(load_gpu("h200"), multiprocessors=multiprocessors)


@pytest.mark.parametrize(("rows", "columns", "multiprocessors", "buffers"), SEEN)
def test_sums_over_rows_as_real_gpus_showed_them(
    rows: int, columns: int, multiprocessors: int, buffers: list[int]
) -> None:
    matrix = torch.empty(rows, columns, device="meta")
    assert reduction_buffers(matrix, [0], gpu_with(multiprocessors)) == buffers


def test_the_number_of_multiprocessors_and_their_threads_limit_the_blocks() -> None:
    matrix = torch.empty(10000, 2048, device="meta")
    whole, fewer = gpu_with(132), gpu_with(66)
    narrow = dataclasses.replace(whole, threads_per_multiprocessor=1024)
    assert reduction_buffers(matrix, [0], fewer) == reduction_buffers(matrix, [0], narrow) != [138412032, 64]


def test_it_is_the_layout_that_counts() -> None:
    gpu = load_gpu("h200")
    matrix = torch.empty(4096, 1024, device="meta")
    buffers = reduction_buffers(matrix, [0], gpu)
    assert reduction_buffers(torch.empty(4, 1024, 1024, device="meta"), [0, 1], gpu) == buffers
    assert reduction_buffers(matrix.t(), [1], gpu) == buffers  # the same memory
    assert reduction_buffers(matrix, [-1], gpu) == []  # a warp sums each row, four rows to a thread block
    padded = torch.empty(4096, 1025, device="meta")[:, :1024]  # its rows do not begin where four values can be loaded
    assert reduction_buffers(padded, [0], gpu) != buffers


def test_everything_to_one_number() -> None:
    gpu = load_gpu("h200")
    wide = torch.empty(1024 * 1024, device="meta")
    assert reduction_buffers(wide, [], gpu) == [4 * 128, 4]  # 512 threads of 2048 values each, over 16 a block
    assert reduction_buffers(wide[:4096], [], gpu) == []
    assert reduction_buffers(torch.empty((), device="meta"), [], gpu) == []
    assert reduction_buffers(torch.empty(0, 8, device="meta"), [0], gpu) == []


def test_what_32_bit_indices_do_not_reach_is_reduced_in_halves() -> None:
    gpu = load_gpu("h200")
    half = reduction_buffers(torch.empty(2**17, 4096, device="meta"), [0], gpu)
    assert reduction_buffers(torch.empty(2**18, 4096, device="meta"), [0], gpu) == half


def test_a_sum_of_truth_values_copies_them_to_whole_numbers() -> None:
    gpu, valid = load_gpu("h200"), torch.empty(2, 4096, dtype=torch.bool, device="meta")
    row = KERNELS[torch.ops.aten.sum.default]
    assert row.buffers((valid,), gpu) == [8 * 2 * 4096]
    assert row.buffers((valid.to(torch.int64),), gpu) == []
