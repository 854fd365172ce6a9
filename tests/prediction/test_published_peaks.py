"""Peaks that others measured on GPUs and published: predicted from the command line, to the last digit that they show.

Most are Liger-Kernel's, measured on an A100 with 80 GB: benchmark/data/all_benchmark_data.csv of linkedin/Liger-Kernel,
rows of the plain PyTorch provider ("huggingface"), torch.cuda.max_memory_allocated in MB of 2**20 B, as float32.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mtp_mem._util import MiB
from mtp_mem.cli import main
from mtp_mem.config.gpus import load_gpu
from mtp_mem.memory.tracker import Tracker
from mtp_mem.prediction.caching_allocator import CachingAllocator
from mtp_mem.prediction.kernel_buffers import kernels_of

ROOT = Path(__file__).parents[2]
HEAD_AND_LOSS = {4096: 6092.2822265625, 8192: 9162.3134765625, 16384: 15302.3759765625, 32768: 27582.5}
"""MB by tokens: nn.Linear(4096, 128256) and cross entropy in bf16."""
LOSS_ALONE = {
    4096: 1280.1259765625,
    8192: 2560.1259765625,
    16384: 5120.1259765625,
    32768: 10240.1259765625,
    65536: 20480.125,
    131072: 40960.125,
}
"""MB by vocabulary: cross entropy of 16384 rows in fp32."""
EMBEDDING = {
    (32, 512, 768): """
        12356.537109375 12371.359375 12401.40625 12461.5 12581.6875 12773.6875 13157.6875 13925.6875""",
    (8, 2048, 4096): """
        14388.130859375 14468.154296875 14628.201171875 14948.294921875 15588.482421875 16612.482421875 18660.482421875
        22756.482421875""",
}
"""MB by (B, T, D), for V = 1024, 2048, ..., 131072: an embedding's forward and backward in fp32, beside another one."""


@pytest.fixture
def predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, int]]:
    """The record of a model of examples/published_head.py with a strategy, of ours or from there."""
    monkeypatch.chdir(ROOT)

    def predict(model: str, strategy: str, *args: str) -> dict[str, int]:
        where = "examples.published_head:"
        args = ("--strategies", (where if strategy[0].isupper() else "") + strategy, "--n", "1", *args)
        args = ("--model", where + model, "--part", "heads", "--json", "--out", str(tmp_path), *args)
        assert main(["predict", *args]) == 0
        (record,) = json.loads(capsys.readouterr().out)["records"]
        assert record["status"] == "ok", record["error"]
        facts: dict[str, int] = record
        return facts

    return predict


A100 = ("--gpu", "a100-80gb", "--set-to-none", "false")


def lost_digits(mib: float) -> int:
    """What float32 rounds a number of MiB by, at most, in bytes."""
    return round(torch.finfo(torch.float32).eps * 2.0 ** int(torch.tensor(mib).log2()) * MiB) // 2


@pytest.mark.parametrize("tokens", HEAD_AND_LOSS)
def test_a_head_and_its_loss(tokens: int, predicted: Callable[..., dict[str, int]]) -> None:
    record = predicted("linear_head", "InItsOwnDtype", *A100, "--sequence", str(tokens))
    difference = record["peak_allocated_bytes"] - HEAD_AND_LOSS[tokens] * MiB
    assert difference == {32768: 1024}.get(tokens, 0) <= lost_digits(HEAD_AND_LOSS[tokens])


@pytest.mark.parametrize("vocabulary", LOSS_ALONE)
def test_cross_entropy_alone(vocabulary: int, predicted: Callable[..., dict[str, int]]) -> None:
    shape = ("--dtype", "fp32", "--batch", "8", "--sequence", "2048")
    record = predicted(f"logits_{vocabulary}", "InItsOwnDtype", *A100, *shape)
    difference = record["peak_allocated_bytes"] - LOSS_ALONE[vocabulary] * MiB
    assert difference == (1024 if vocabulary >= 65536 else 0) <= lost_digits(LOSS_ALONE[vocabulary])


def test_gemma_s_head_with_a_cap(predicted: Callable[..., dict[str, int]]) -> None:
    """README.md of apple/ml-cross-entropy: "baseline", loss-fw-bw, 28000.0 MB over the inputs; A100, torch 2.4.1."""
    record = predicted("head_2304x256000", "CappedInItsOwnDtype", "--sequence", "8192", "--gpu", "a100-80gb")
    assert round(record["peak_over_baseline_bytes"] / MiB, 1) == 28000.0


def test_a_head_of_248320_entries(predicted: Callable[..., dict[str, int]]) -> None:
    """Pull request 6858 of huggingface/trl: "one big bf16 GEMM (reference)", 47.55 GB (of 2**30 B); H100."""
    args = ("--sequence", "16384", "--gpu", "h100-80gb", "--set-to-none", "false")
    record = predicted("head_2048x248320", "naive", *args)
    assert round(record["peak_allocated_bytes"] / 2**30, 2) == 47.55


@pytest.mark.parametrize("shape", EMBEDDING)
def test_how_an_embedding_grows_with_the_vocabulary(shape: tuple[int, int, int]) -> None:
    """The published figures are larger by one number of bytes that no vocabulary changes, and that nothing explains."""
    peaks = [embedding_peak(*shape, vocabulary=1024 << i) for i in range(8)]
    published = [float(mib) for mib in EMBEDDING[shape].split()]
    growth = [int((b - a) * MiB) for a, b in itertools.pairwise(published)]
    assert [b - a for a, b in itertools.pairwise(peaks)] == growth


def embedding_peak(B: int, T: int, D: int, vocabulary: int) -> int:
    """Bytes allocated at the peak of a step, the third."""

    def build() -> tuple[nn.Embedding, Callable[[], None]]:
        embedding, beside = nn.Embedding(vocabulary, D), nn.Embedding(vocabulary, D)
        ids = torch.randint(0, vocabulary, (B, T))

        def step() -> None:
            rows = embedding(ids)
            rows.backward(torch.randn_like(rows))

        return beside, step

    tracker, begun = Tracker(1, 1, [], kernels_of(load_gpu("a100-80gb"))), 0
    with FakeTensorMode(), tracker:
        _beside, step = build()
        for _ in range(3):
            begun = len(tracker.trace.events)
            step()
        events = tracker.trace.events[:]
        allocator = CachingAllocator()
        for i, event in enumerate(events):
            if i == begun:
                allocator.reset_peaks()
            if event.kind == "alloc":
                allocator.allocate(event.key, tracker.trace.storages[event.key].nbytes)
            elif event.kind == "free":
                allocator.release(event.key)
            else:
                allocator.move(event.key, event.old)
    return allocator.allocated_peak
