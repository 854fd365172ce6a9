"""The predicted bytes are the tracked bytes: the same step without data allocates the same, byte for byte."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import KINDS, build, tiny

from mtp_mem import TrainingStep, Workload, load_strategy, make_optimizer
from mtp_mem.config.gpus import load_gpu, load_gpus
from mtp_mem.errors import BadInput
from mtp_mem.memory.cpu import track
from mtp_mem.prediction import kernel_buffers
from mtp_mem.prediction.cuda.allocator_settings import AllocatorSettings
from mtp_mem.prediction.cuda.cublas import workspaces
from mtp_mem.prediction.cuda.replay import replay
from mtp_mem.prediction.floor import NoLogits
from mtp_mem.prediction.peaks import predicted
from mtp_mem.prediction.simulated_step import Simulation, simulate

SPECS = ["naive", "sequential", "chunked_vocab:chunk=1000", "checkpointed", "chunked_tokens:chunk=40"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("spec", SPECS)
def test_predicted_equals_tracked(spec: str, n: int, dtype: str) -> None:
    # test_tracker.py holds the tracked peak against the allocator's own events, so this chain ends at the allocator.
    config = tiny(vocab_size=4099, n_layers=5, n_future=n)
    model, batch = build(config, dtype, sequence=64)
    step = TrainingStep(model, make_optimizer(model), batch, load_strategy(spec))
    step()
    real = track(step)
    workload = Workload(batch=2, sequence=64, dtype=dtype)  # type: ignore[arg-type]
    fake = simulate(config, workload, load_strategy(spec), cuda=False)
    assert fake.baseline == real.baseline
    simulated, expected = fake.peak(), real.peak()
    assert (simulated.nbytes, simulated.phase, simulated.op) == (expected.nbytes, expected.phase, expected.op)
    assert simulated.by_category == expected.by_category
    assert fake.phase_peaks() == real.phase_peaks()


@pytest.mark.parametrize("unembedding", ["shared", "replicated"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", ["naive", "sequential"])
def test_predicted_equals_tracked_for_every_kind(spec: str, kind: str, unembedding: str) -> None:
    config = tiny(vocab_size=4099, n_layers=4, n_future=3, head=kind, unembedding=unembedding)
    model, batch = build(config, sequence=64)
    step = TrainingStep(model, make_optimizer(model), batch, load_strategy(spec))
    step()
    real = track(step)
    fake = simulate(config, Workload(batch=2, sequence=64), load_strategy(spec), cuda=False)
    assert fake.baseline == real.baseline
    simulated, expected = fake.peak(), real.peak()
    assert (simulated.nbytes, simulated.phase, simulated.op) == (expected.nbytes, expected.phase, expected.op)
    assert simulated.by_category == expected.by_category
    assert fake.phase_peaks() == real.phase_peaks()
    # Log-softmaxes of all live heads and two gradients (N, V), whatever the heads are.
    assert simulated.by_category["logits"] == (3 + 2 if spec == "naive" else 3) * 2 * 64 * 4099 * 4


def test_naive_holds_the_logits_that_can_be_counted_by_hand() -> None:
    config, n = tiny(vocab_size=32000, n_layers=5), 4
    workload = Workload(batch=2, sequence=512, dtype="bf16")
    logits = 1024 * 32000 * 4  # one fp32 tensor (N, V)
    naive = simulate(config.with_n(n), workload, load_strategy("naive"), gpu=load_gpu("h200")).peak()
    assert naive.by_category["logits"] == (n + 2) * logits  # n log-softmaxes, two gradients
    sequential = simulate(config.with_n(n), workload, load_strategy("sequential"), gpu=load_gpu("h200")).peak()
    assert sequential.by_category["logits"] == 3 * logits


@pytest.mark.parametrize("spec", SPECS)
def test_the_allocator_s_view_of_a_predicted_step(spec: str) -> None:
    gpu = load_gpu("h200")
    config = tiny(vocab_size=4099, n_layers=5, n_future=3)
    trace = simulate(config, Workload(batch=2, sequence=64, dtype="bf16"), load_strategy(spec), gpu=gpu)
    nbytes = workspaces(gpu).nbytes
    default, expandable = (replay(trace, AllocatorSettings(expandable=e), (nbytes,)) for e in (False, True))
    assert default.requested_peak == expandable.requested_peak == trace.peak().nbytes + nbytes
    assert default.requested_peak <= expandable.allocated_peak <= default.allocated_peak <= default.reserved_peak


def test_buffers_inside_kernels() -> None:
    gpu = load_gpu("h200")
    q = torch.empty(1, 32, 8192, 128, dtype=torch.bfloat16, device="meta")
    small = torch.empty(1, 8, 1024, 64, dtype=torch.bfloat16, device="meta")
    kv = torch.empty(1, 8, 8192, 128, dtype=torch.bfloat16, device="meta")
    rows, indices = torch.empty(8192, 4096, device="meta"), torch.empty(8192, device="meta")
    by_token = torch.empty(1, 8192, 32, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    backward = kernel_buffers.flash_backward((by_token, q, q, q, by_token), gpu)
    assert sum(backward) == 129 * 2**20  # 32 * 8192 * (128 + 1) * 4
    assert kernel_buffers.flash_backward((q, q, q, q, q), gpu) == [*backward, q.nbytes, q.nbytes]
    assert kernel_buffers.flash_backward((by_token, q, kv, kv, by_token), gpu)[2:] == [2 * 8192 * 32 * 128] * 2
    assert kernel_buffers.flash_forward((q, q, q, 0.0), gpu) == []
    assert sum(kernel_buffers.flash_forward((small, small, small, 0.0), gpu)) == 2 * 8 * 1024 * (64 + 1) * 4
    assert kernel_buffers.embedding_backward((rows, indices[:3072], 128256), gpu) == []
    assert kernel_buffers.embedding_backward((rows, indices, 128256), gpu)[-1] == (819 + 8192) * 4096 * 4
    assert kernel_buffers.foreach_norm(([rows, indices],), gpu) == [4 * 2 * 512]


class ReadsBack:
    def backward(self, cut, heads, targets, weights):  # type: ignore[no-untyped-def]
        return load_strategy("naive").backward(cut, heads, targets, weights) * weights[0].item()


def test_a_strategy_that_reads_values_back_is_refused() -> None:
    with pytest.raises(BadInput, match="ReadsBack cannot be predicted: it needs real data or a GPU kernel"):
        simulate(tiny(), Workload(batch=1, sequence=8, dtype="bf16"), ReadsBack())


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="torch before 2.13")
def test_a_kernel_that_decides_by_the_device_is_predicted_for_this_one_only() -> None:
    config, workload = tiny(n_future=2), Workload(batch=2, sequence=24)
    with pytest.raises(BadInput, match="Native cannot be predicted: torch chooses chunk and sums by device"):
        simulate(config, dataclasses.replace(workload, dtype="bf16"), load_strategy("native"))
    model, batch = build(config)
    step = TrainingStep(model, make_optimizer(model), batch, load_strategy("native"))
    step()
    local = simulate(config, workload, load_strategy("native"), cuda=False).peak()
    assert local.nbytes == track(step).peak().nbytes


def test_never_touches_the_device_cuda(tmp_path: Path) -> None:
    # On a CPU build of torch a fake CUDA tensor aborts the process in its first backward: hence a process of its own.
    code = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            assert not (isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda"), func
            assert not (isinstance(leaf, torch.device) and leaf.type == "cuda"), func
        return out
from mtp_mem import ModelConfig, Workload, load_strategy
from mtp_mem.config.gpus import load_gpu
from mtp_mem.prediction.simulated_step import simulate
config = ModelConfig(vocab_size=300, dim=32, n_layers=3, n_attention_heads=2, n_future=2)
with Watch():
    simulate(config, Workload(batch=1, sequence=16, dtype="bf16"), load_strategy("naive"), gpu=load_gpu("h200"))
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "alive\n", done.stderr


def test_every_gpu_says_where_its_figures_come_from() -> None:
    for name, gpu in load_gpus().items():
        assert gpu.source, name
        assert 14 * 2**30 < gpu.total_bytes < 300 * 2**30
        assert workspaces(gpu).nbytes % 512 == 0


def test_a_trace_does_not_depend_on_what_else_is_rehearsed() -> None:
    config, workload, gpu = tiny(n_future=3, n_layers=5), Workload(batch=2, sequence=64, dtype="bf16"), load_gpu("h200")
    simulation = Simulation(config, workload, gpu=gpu)
    assert predicted(simulation.floor(), gpu) == predicted(simulation.trace(NoLogits()), gpu)
    with pytest.raises(BadInput):
        simulation.trace(ReadsBack())  # half a step, which must leave nothing behind
    for spec in ("naive", "chunked_vocab:chunk=100", "sequential"):
        alone = simulate(config, workload, load_strategy(spec), gpu=gpu)
        assert predicted(simulation.trace(load_strategy(spec)), gpu) == predicted(alone, gpu)


def test_the_first_step_of_a_process_is_as_the_second(tmp_path: Path) -> None:
    code = """
from mtp_mem import ModelConfig, Workload
from mtp_mem.prediction.simulated_step import Simulation

config = ModelConfig(vocab_size=64, dim=64, n_layers=2, n_attention_heads=2)
simulation = Simulation(config, Workload(batch=1, sequence=256))
first, second = (simulation.floor().peak().nbytes for _ in range(2))
assert first == second, first - second
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
