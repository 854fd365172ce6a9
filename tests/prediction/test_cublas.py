"""cuBLAS workspaces by capability and torch's version, and what a prediction says of them."""

import dataclasses
import os

import pytest
import torch

from mtp_mem.config.gpus import GPU, load_gpu
from mtp_mem.errors import BadInput
from mtp_mem.prediction.cuda.cublas import workspaces
from mtp_mem.prediction.kernel_buffers import kernels_of
from mtp_mem.prediction.peaks import assumptions

MIB_32, BEFORE = 33_554_432, 8_519_680


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "TORCH_CUBLAS_WORKSPACE_CACHE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("gpu", "version", "nbytes", "kept"),
    [
        ("h200", "2.11.0", MIB_32, True),  # seen on GPUs: 9.0, and before it
        ("a100-80gb", "2.13.0+cu130", BEFORE, True),
        ("t4", "2.13.0", BEFORE, True),
        ("b200", "2.11.0", BEFORE, True),
        ("b200", "2.12.1", MIB_32, True),
        ("rtx5090", "2.13.0", MIB_32, True),
        ("h200", "2.14.1", MIB_32, True),
        ("h200", "2.15.0a0+git1234", MIB_32, False),
        ("a100-80gb", "2.15.0", BEFORE, False),
    ],
)
def test_by_capability_and_version(gpu: str, version: str, nbytes: int, kept: bool) -> None:
    rule = workspaces(load_gpu(gpu), version)
    assert (rule.nbytes, rule.kept, rule.resident()) == (nbytes, kept, (nbytes, nbytes) if kept else ())


def test_what_the_environment_and_the_gpu_s_entry_say(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = load_gpu("a100-80gb")
    monkeypatch.setitem(os.environ, "TORCH_CUBLAS_WORKSPACE_CACHE", "1")
    assert workspaces(gpu, "2.15.0").kept
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    assert workspaces(gpu).nbytes == BEFORE
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert workspaces(gpu).nbytes == MIB_32
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in assumptions(gpu)[0]
    own = dataclasses.replace(gpu, workspace_bytes=1024, workspaces_kept=False)
    assert (workspaces(own).nbytes, workspaces(own).kept) == (1024, False)
    with pytest.raises(BadInput, match="capability is missing"):
        GPU(name="", total_bytes=1, multiprocessors=1, source="")
    with pytest.raises(BadInput, match="capability = 'ninety'"):
        dataclasses.replace(gpu, capability="ninety")


def test_workspaces_that_are_not_kept_live_during_each_product() -> None:
    gpu = dataclasses.replace(load_gpu("a100-80gb"), workspaces_kept=False)
    table, aten = kernels_of(gpu), torch.ops.aten
    x, w = torch.empty(8, 8, device="meta"), torch.empty(8, 8, device="meta")
    assert table[aten.mm.default]((x, w)) == table[aten.addmm.out]((x, x, w)) == [BEFORE]
    assert table[aten.addmm.default]((x[0], x, w)) == [2**20]  # with a bias, by cuBLASLt
    assert aten.mm.default not in kernels_of(load_gpu("a100-80gb")) or torch.__version__ >= "2.15"
    assert "8.12 MiB (8,519,680 B) during each product" in assumptions(gpu)[0]
