"""The token-chunked loss: its bytes counted by hand, its chunk sizes, its accumulators."""

import pytest
import torch
from small import build, gradients, tiny

from mtp_mem import load_strategy
from mtp_mem.errors import BadInput
from mtp_mem.memory.tracker import Tracker
from mtp_mem.step import forward_backward
from mtp_mem.token_chunks import UnembeddingGradient, default_chunk, head_loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bytes_counted_by_hand(dtype: torch.dtype) -> None:
    N, V, D, c, b = 96, 2053, 64, 16, dtype.itemsize
    rows, weight = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype, requires_grad=True)
    targets, upstream = torch.randint(V, (N,)), torch.ones((), dtype=dtype)
    tracker = Tracker(V, D, [])
    inputs = [("rows", rows), ("weight", weight), ("targets", targets), ("upstream", upstream)]
    tracker.resident("other", inputs)
    with torch.no_grad(), tracker:
        gradient = UnembeddingGradient(weight, "fp32", cuda=False)
        head_loss(rows, weight.detach(), targets, upstream, gradient, chunk=c, keep_rows=False)
    over = tracker.trace.peak().nbytes - tracker.trace.baseline
    counted = V * D * b + c * V * b + c * D * b  # the gradient, a chunk of logits, the chunk's rows scaled
    assert 0 <= over - counted <= N * (1 + 2 * b + 2 * 8) + c * D * b  # a few numbers a row; scaling makes two of them
    assert over <= 1.01 * (V * D * b + c * V * b) + 2 * c * D * b


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log_softmax_may_overwrite_its_input(dtype: torch.dtype) -> None:
    logits = 1e4 * torch.randn(7, 1031).to(dtype)
    expected = torch.log_softmax(logits, 1)
    torch.ops.aten._log_softmax.out(logits, 1, False, out=logits)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("chunk", [1, 3, 7, 13, 48, 53])
def test_any_chunk_gives_the_same_gradient(chunk: int) -> None:
    model, batch = build(tiny(n_future=3), "fp64")  # N = 48
    expected = gradients(model, lambda: forward_backward(model, batch, load_strategy("naive")))
    found = gradients(model, lambda: forward_backward(model, batch, load_strategy(f"chunked_tokens:chunk={chunk}")))
    for name, right in expected.items():
        torch.testing.assert_close(found[name], right, rtol=1e-11, atol=1e-14)


def test_bf16_sums_are_closer_to_the_truth_than_naive_s() -> None:
    model, batch = build(tiny(n_future=2), "bf16", sequence=512)
    exact, _ = build(tiny(n_future=2), "fp64", sequence=512)
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    name = "unembedding.weight"
    right = gradients(exact, lambda: forward_backward(exact, batch, load_strategy("naive")))[name]
    errors = {}
    for spec in ("naive", "chunked_tokens:chunk=32"):
        found = gradients(model, lambda spec=spec: forward_backward(model, batch, load_strategy(spec)))[name]  # type: ignore[misc]
        errors[spec] = ((found.double() - right).norm() / right.norm()).item()  # type: ignore[union-attr]
    assert errors["chunked_tokens:chunk=32"] < errors["naive"]


def test_main_grad_takes_the_gradient_and_leaves_grad_alone() -> None:
    model, batch = build(tiny(n_future=2), "bf16")
    weight = model.unembedding.weight  # type: ignore[union-attr]
    strategy = load_strategy("chunked_tokens:accumulate=main_grad:chunk=13")
    with pytest.raises(BadInput, match=r"no tensor `main_grad`; expected \(517, 64\) torch.float32"):
        forward_backward(model, batch, strategy)
    weight.main_grad = torch.zeros(517, 65)  # type: ignore[union-attr]
    with pytest.raises(BadInput, match=r"`main_grad` is \(517, 65\) torch.float32 on cpu; expected \(517, 64\)"):
        forward_backward(model, batch, strategy)
    model.zero_grad(set_to_none=True)
    weight.main_grad = torch.zeros(517, 64)  # type: ignore[union-attr]
    forward_backward(model, batch, strategy)
    assert weight.grad is None
    model.zero_grad(set_to_none=True)
    forward_backward(model, batch, load_strategy("chunked_tokens:chunk=13"))
    assert torch.equal(weight.main_grad.bfloat16(), weight.grad)  # type: ignore[union-attr, arg-type, operator]


def test_the_default_chunk() -> None:
    assert default_chunk(8192, 128256, 2, cuda=True) == 2048
    assert default_chunk(8192, 256000, 2, cuda=True) == 1024
    assert default_chunk(8192, 32000, 2, cuda=True) == 4096
    assert default_chunk(8192, 10**7, 2, cuda=True) == 512
    assert default_chunk(100, 32000, 4, cuda=False) == 100
    assert default_chunk(8192, 32000, 4, cuda=False) == 512


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("chunked_tokens:chunk=0", "chunk = 0: expected a whole number of tokens, at least 1"),
        ("chunked_tokens:chunk=-3", "chunk = -3"),
        ("chunked_tokens:chunk=many", "chunk = 'many': expected a whole number"),
        ("chunked_tokens:accumulate=fp16", "unknown value 'fp16'"),
    ],
)
def test_bad_options(spec: str, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_strategy(spec)
    assert words in str(caught.value)
