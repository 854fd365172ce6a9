"""The token-chunked loss: its bytes counted by hand, its chunk sizes, its accumulators."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from benchmarks.head_phase import HeadPhase, HeadShape
from small import build, gradients, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_mem import TrainingStep, Workload, load_strategy, make_optimizer
from mtp_mem.config.gpus import load_gpu
from mtp_mem.errors import BadInput
from mtp_mem.memory.cpu import track
from mtp_mem.memory.tracker import Tracker
from mtp_mem.model.head_tree import Heads, no_phase
from mtp_mem.prediction.simulated_step import simulate
from mtp_mem.step import forward_backward
from mtp_mem.strategies import chunked_tokens
from mtp_mem.strategies.chunked_tokens import UnembeddingGradient, default_chunk, head_loss


@pytest.mark.parametrize("chunk", [16, 96, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bytes_counted_by_hand(dtype: torch.dtype, chunk: int) -> None:
    N, V, D, c, b = 96, 2053, 64, min(chunk, 96), dtype.itemsize
    rows, weight = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype, requires_grad=True)
    targets, upstream = torch.randint(V, (N,)), torch.ones((), dtype=dtype)
    tracker = Tracker(V, D, [])
    inputs = [("rows", rows), ("weight", weight), ("targets", targets), ("upstream", upstream)]
    tracker.resident("other", inputs)
    with torch.no_grad(), tracker:
        gradient = UnembeddingGradient(weight, cuda=False)
        head_loss(rows, weight.detach(), targets, upstream, gradient, chunk=chunk, keep_rows=False)
    over = tracker.trace.peak().nbytes - tracker.trace.baseline
    counted = V * D * b + c * V * b  # the gradient, a chunk of logits
    assert 0 <= over - counted <= N * (1 + 2 * b + 2 * 8) + 4 * c * b + 16  # a few numbers a row
    assert over <= 1.01 * counted


@pytest.mark.parametrize("fit", [5, 1000])
def test_low_precision_keeps_few_rows_in_fp32(monkeypatch: pytest.MonkeyPatch, fit: int) -> None:
    # In fp32 at once: `fit` rows of logits for the softmax, 100 vocabulary entries for the product; never all.
    N, V, D, c = 96, 2053, 64, 48
    monkeypatch.setattr(chunked_tokens, "SOFTMAX_BLOCK", fit * V * 4 + 1)
    monkeypatch.setattr(chunked_tokens, "WIDE_ROWS", 100)
    rows, weight = torch.randn(N, D).bfloat16(), torch.randn(V, D).bfloat16().requires_grad_()
    tracker = Tracker(V, D, [])
    tracker.resident("other", [("rows", rows), ("weight", weight)])
    with torch.no_grad(), tracker:
        gradient = UnembeddingGradient(weight, cuda=False)
        head_loss(rows, weight.detach(), torch.randint(V, (N,)), torch.ones(()), gradient, chunk=c, keep_rows=False)
    over = tracker.trace.peak().nbytes - tracker.trace.baseline
    logits, products = V * D * 4 + c * V * 2, c * D * (2 + 4) + 100 * c * 4  # the gradient and a chunk; rows, a block
    softmax = min(fit, c) * V * 4
    assert 0 <= over - logits - max(softmax, products) <= N * (1 + 2 * 4 + 2 * 8) + 2 * c * D * 4


@pytest.mark.parametrize(("softmax_rows", "wide_rows"), [(1, 1), (5, 20), (7, 517), (1000, 1000)])
def test_blocks_of_low_precision_change_nothing(
    monkeypatch: pytest.MonkeyPatch, softmax_rows: int, wide_rows: int
) -> None:
    model, batch = build(tiny(n_future=2), "bf16")
    strategy = load_strategy("chunked_tokens:chunk=23")
    expected = gradients(model, lambda: forward_backward(model, batch, strategy))
    monkeypatch.setattr(chunked_tokens, "SOFTMAX_BLOCK", softmax_rows * 517 * 4)
    monkeypatch.setattr(chunked_tokens, "WIDE_ROWS", wide_rows)
    computed = gradients(model, lambda: forward_backward(model, batch, strategy))
    for name, right in expected.items():
        torch.testing.assert_close(computed[name], right)


def test_blocks_are_worth_a_kernel_and_small_beside_the_logits() -> None:
    rows = chunked_tokens.SOFTMAX_BLOCK // (128256 * 4)  # of Llama-3's vocabulary
    assert rows >= 32
    assert 8 * chunked_tokens.SOFTMAX_BLOCK <= chunked_tokens.CUDA_LOGITS
    assert 1024 <= chunked_tokens.WIDE_ROWS < 32000 / 4


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "mm" in str(func):
            self.products.append(str(func).removeprefix("aten."))
        if "dtype_out" in str(func):  # torch 2.11 and 2.12 cannot run it on meta tensors
            return kwargs["out"]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("cuda", "dtype", "products"),
    [
        (True, torch.bfloat16, ["mm.dtype_out", "addmm.dtype_out"]),
        (False, torch.bfloat16, ["mm.out", "addmm_.default"]),
        (True, torch.float32, ["mm.out", "addmm_.default"]),
    ],
)
def test_which_product_sums_the_unembedding_s_gradient(cuda: bool, dtype: torch.dtype, products: list[str]) -> None:
    weight = torch.empty(300, 8, dtype=dtype, device="meta", requires_grad=True)
    gradient = UnembeddingGradient(weight, cuda=cuda)
    with torch.no_grad(), Recorder() as recorder:
        for _ in range(2):
            gradient.add(torch.empty(5, 300, dtype=dtype, device="meta"), torch.empty(5, 8, dtype=dtype, device="meta"))
    assert recorder.products == products
    gradient.finish(Heads((), torch.nn.Identity(), nullcontext, no_phase, 0))
    assert weight.grad is not None
    assert weight.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_softmax_may_overwrite_its_input(dtype: torch.dtype) -> None:
    logits = 10 * torch.randn(7, 1031).to(dtype)
    expected = torch.softmax(logits, 1)
    torch.ops.aten._softmax.out(logits, 1, False, out=logits)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("chunk", [1, 3, 7, 13, 48, 53])
def test_any_chunk_gives_the_same_gradient(chunk: int) -> None:
    model, batch = build(tiny(n_future=3), "fp64")  # N = 48
    expected = gradients(model, lambda: forward_backward(model, batch, load_strategy("naive")))
    computed = gradients(model, lambda: forward_backward(model, batch, load_strategy(f"chunked_tokens:chunk={chunk}")))
    for name, right in expected.items():
        torch.testing.assert_close(computed[name], right, rtol=1e-11, atol=1e-14)


def test_bf16_sums_are_closer_to_the_truth_than_naive_s() -> None:
    model, batch = build(tiny(n_future=2), "bf16", sequence=512)
    exact, _ = build(tiny(n_future=2), "fp64", sequence=512)
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    name = "unembedding.weight"
    right = gradients(exact, lambda: forward_backward(exact, batch, load_strategy("naive")))[name]
    errors = {}
    for spec in ("naive", "chunked_tokens:chunk=32"):
        computed = gradients(model, lambda spec=spec: forward_backward(model, batch, load_strategy(spec)))[name]  # type: ignore[misc]
        errors[spec] = ((computed.double() - right).norm() / right.norm()).item()  # type: ignore[union-attr]
    assert errors["chunked_tokens:chunk=32"] < errors["naive"]


def test_heads_are_on_the_cpu_unless_told() -> None:
    model, batch = build(tiny(n_future=2), "bf16")
    own = model.heads(batch.tokens)
    heads = Heads(own.roots, own.norm, own.autocast, own.phase, own.n)
    cut = model.trunk(batch.tokens).detach().requires_grad_()
    losses = load_strategy("chunked_tokens").backward(cut, heads, batch.targets, torch.ones(2))
    assert torch.isfinite(losses).all()


def test_the_default_chunk_is_that_of_the_step_s_tokens() -> None:
    for sequence, chunk in ((300, 256), (20, 40)):  # N = 600, 40
        model, batch = build(tiny(n_layers=2, n_future=1), sequence=sequence)
        step = TrainingStep(model, make_optimizer(model), batch, load_strategy("chunked_tokens"))
        step()
        assert {s.shape for s in track(step).storages.values() if s.category == "logits"} == {(chunk, 517)}


def test_the_default_chunk_on_cuda_is_that_of_the_vocabulary() -> None:
    config = tiny(vocab_size=256000, n_layers=2, n_future=1)
    workload = Workload(batch=1, sequence=4096, dtype="bf16")
    trace = simulate(config, workload, load_strategy("chunked_tokens"), gpu=load_gpu("h200"))
    assert {s.shape[0] for s in trace.storages.values() if s.category == "logits" and s.nbytes > 2**28} == {1024}


def test_the_default_chunk() -> None:
    assert default_chunk(8192, 4096, 128256, 2, cuda=True) == 2048
    assert default_chunk(8192, 4096, 256000, 2, cuda=True) == 1024
    assert default_chunk(8192, 4096, 32000, 2, cuda=True) == 4096
    assert default_chunk(8192, 4096, 10**7, 2, cuda=True) == 512
    assert default_chunk(8192, 4096, 2**30, 2, cuda=True) == 512
    assert default_chunk(300, 4096, 32000, 2, cuda=True) == 300
    assert default_chunk(100, 512, 32000, 4, cuda=False) == 100
    assert default_chunk(2048, 512, 32000, 4, cuda=False) == 1024
    assert default_chunk(1024, 64, 8192, 4, cuda=False) == 128
    assert default_chunk(1024, 8, 8192, 4, cuda=False) == 128
    assert default_chunk(65536, 4096, 32000, 4, cuda=False) == 1024


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("chunked_tokens:chunk=0", "chunk = 0: expected a whole number of tokens, at least 1"),
        ("chunked_tokens:chunk=-3", "chunk = -3"),
        ("chunked_tokens:chunk=many", "chunk = 'many': expected a whole number"),
    ],
)
def test_bad_options(spec: str, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_strategy(spec)
    assert words in str(caught.value)


def test_a_norm_that_hands_its_input_on_is_not_overwritten() -> None:
    phase = HeadPhase(HeadShape(N=24, D=16, V=101, n=3, dtype=torch.float64))
    results = {}
    for spec in ("naive", "chunked_tokens:chunk=7"):
        phase.clear()
        heads = dataclasses.replace(phase.heads(), norm=torch.nn.Identity())
        before = phase.cut.detach().clone()
        losses = load_strategy(spec).backward(phase.cut, heads, phase.targets, phase.weights)
        assert torch.equal(phase.cut, before)
        assert phase.cut.grad is not None
        results[spec] = (losses, phase.cut.grad)
    for one, theirs in zip(*results.values(), strict=True):
        torch.testing.assert_close(one, theirs, rtol=1e-12, atol=1e-12)


def test_heads_that_read_heads_share_one_sum_of_the_unembedding() -> None:
    model, batch = build(tiny(n_future=3, head="causal"))
    handed_over = []
    model.get_parameter("unembedding.weight").register_hook(lambda gradient: handed_over.append(gradient.shape))
    forward_backward(model, batch, load_strategy("chunked_tokens"))
    assert handed_over == [(517, 64)]
