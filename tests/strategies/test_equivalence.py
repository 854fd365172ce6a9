"""Every strategy gives naive's gradients: by bits where that is possible, within the dtype's rounding elsewhere."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from small import KINDS, UNEMBEDDINGS, build, gradients, plain_joint, small_kind, tiny

from mtp_mem import IGNORE, Batch, forward_backward, load_strategy
from mtp_mem.strategy import Strategy, loadable

NAIVE = load_strategy("naive")
INEXACT = ["chunked_vocab:chunk=100", "chunked_vocab:chunk=1000"]


def relative(a: Any, b: Any) -> float:
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    norm = b.double().norm().item()
    return (a.double() - b.double()).norm().item() / norm if norm else a.double().norm().item()


@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("spec", ["sequential", "checkpointed"])
@pytest.mark.parametrize("unembedding", ["shared", "tied"])
def test_bit_identical_to_naive(spec: str, dtype: str, n: int, unembedding: str) -> None:
    model, batch = build(tiny(n_future=n, unembedding=unembedding), dtype)
    expected = gradients(model, lambda: forward_backward(model, batch, NAIVE))
    computed = gradients(model, lambda: forward_backward(model, batch, load_strategy(spec)))
    assert [name for name in expected if not torch.equal(computed[name], expected[name])] == []


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "bf16-mixed"])
@pytest.mark.parametrize("unembedding", UNEMBEDDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_bit_identical_to_naive(kind: str, unembedding: str, dtype: str, n: int) -> None:
    model, batch = build(small_kind(kind, n, unembedding=unembedding), dtype, sequence=12)
    expected = gradients(model, lambda: forward_backward(model, batch, NAIVE))
    assert all(g is not None and torch.count_nonzero(g) for g in expected.values())
    for spec in ("sequential", "checkpointed"):
        computed = gradients(model, lambda spec=spec: forward_backward(model, batch, load_strategy(spec)))
        assert [name for name in expected if not torch.equal(computed[name], expected[name])] == [], spec


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("spec", ["sequential", "checkpointed"])
def test_a_tree_with_branches_is_bit_identical_to_naive(spec: str, dtype: str) -> None:
    # No shipped kind branches above a root: here heads 2, 3 and 4 hang on head 1, and head 5 on head 3.
    model, batch = build(small_kind("parallel", 5), dtype, sequence=12)
    own, weights = model.heads(batch.tokens), torch.ones(5)
    one, two, three, four, five = own.roots
    three = replace(three, children=(five,))
    heads = replace(own, roots=(replace(one, children=(two, three, four)),))
    cut = model.trunk(batch.tokens).detach().requires_grad_()

    def run(strategy: Strategy) -> dict[str, torch.Tensor | None]:
        cut.grad = None
        computed = gradients(model, lambda: strategy.backward(cut, heads, batch.targets, weights))
        return {**computed, "cut": cut.grad}

    expected, computed = run(NAIVE), run(load_strategy(spec))
    assert [name for name in expected if relative(computed[name], expected[name]) > 0] == []


@pytest.mark.parametrize("unembedding", UNEMBEDDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_within_rounding_of_naive(kind: str, unembedding: str) -> None:
    model, batch = build(small_kind(kind, 4, unembedding=unembedding), "fp64", sequence=12)
    expected = gradients(model, lambda: forward_backward(model, batch, NAIVE))
    for spec in ("chunked_vocab:chunk=20", "checkpointed"):
        computed = gradients(model, lambda spec=spec: forward_backward(model, batch, load_strategy(spec)))
        assert max(relative(computed[name], expected[name]) for name in expected) <= 1e-12, spec


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "bf16-mixed"])
@pytest.mark.parametrize("unembedding", UNEMBEDDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_is_free_for_every_kind(kind: str, unembedding: str, dtype: str) -> None:
    model, batch = build(small_kind(kind, 3, unembedding=unembedding), dtype, sequence=12)
    expected = gradients(model, lambda: plain_joint(model, batch))
    computed = gradients(model, lambda: forward_backward(model, batch, NAIVE))
    assert [name for name in expected if not torch.equal(computed[name], expected[name])] == []


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_the_cut_is_free(dtype: str, n: int) -> None:
    model, batch = build(tiny(n_future=n), dtype)
    expected = gradients(model, lambda: plain_joint(model, batch))
    computed = gradients(model, lambda: forward_backward(model, batch, NAIVE))
    assert [name for name in expected if not torch.equal(computed[name], expected[name])] == []


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(("dtype", "bound"), [("fp64", 1e-12), ("fp32", 1e-5), ("bf16", 2e-2), ("bf16-mixed", 2e-2)])
@pytest.mark.parametrize("spec", INEXACT)  # the others are bit-identical, above
def test_within_the_bound_of_the_dtype(spec: str, dtype: str, bound: float, n: int) -> None:
    model, batch = build(tiny(n_future=n), dtype)
    expected = gradients(model, lambda: forward_backward(model, batch, NAIVE))
    computed = gradients(model, lambda: forward_backward(model, batch, load_strategy(spec)))
    assert max(relative(computed[name], expected[name]) for name in expected) <= bound


@pytest.mark.parametrize("spec", [*loadable(), *INEXACT])
def test_weights_scale_masks_and_losses(spec: str) -> None:
    # A whole head without targets, one with ragged ones; weights and scale that are no powers of two.
    model, batch = build(tiny(n_future=3), "fp64")
    targets = batch.targets.clone()
    targets[1] = IGNORE
    targets[2, 0, ::3] = IGNORE
    batch, weights, scale = Batch(batch.tokens, targets), [0.7, 1.3, 0.1], 0.37
    logits = model(batch.tokens)
    assert logits.shape == (3, 2, 24, 517)

    def truth() -> None:
        log_p = model(batch.tokens).log_softmax(-1)
        picked = log_p.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
        valid = targets != IGNORE
        losses = -(picked * valid).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)
        (losses * torch.tensor(weights, dtype=torch.float64)).sum().mul(scale).backward()

    expected = gradients(model, truth)
    losses = torch.empty(0)

    def run() -> None:
        nonlocal losses
        losses = forward_backward(model, batch, load_strategy(spec), weights, scale)

    computed = gradients(model, run)
    assert max(relative(computed[name], expected[name]) for name in expected) <= 1e-12
    assert losses.dtype == torch.float64
    assert losses.shape == (3,)
    assert losses[1] == 0
    assert not losses.requires_grad
    assert all(torch.count_nonzero(g) == 0 for name, g in computed.items() if name.startswith("head_layers.1."))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [*loadable(), *INEXACT])
def test_accumulates_and_leaves_the_frozen_alone(spec: str, kind: str) -> None:
    model, batch = build(small_kind(kind, 3, vocab_size=517), "fp64", sequence=12)
    strategy = load_strategy(spec)
    once = gradients(model, lambda: forward_backward(model, batch, strategy))

    def twice() -> None:
        forward_backward(model, batch, strategy)
        forward_backward(model, batch, strategy)

    computed = gradients(model, twice)
    assert max(relative(computed[name], 2 * once[name]) for name in once) <= 1e-12  # type: ignore[operator]
    below = list(model.embedding.parameters()) + list(model.trunk_layers.parameters())
    frozen = [
        below,
        below + list(model.head_layers[0].parameters()),
        below + list(model.head_layers[2].parameters()),
        list(model.trunk_layers.parameters()),
        list(model.unembedding.parameters()),
        list(model.head_layers[1].parameters()),
        list(model.parameters()),
    ]
    for parameters in frozen:
        for parameter in parameters:
            parameter.requires_grad_(False)
        names = {name for name, p in model.named_parameters() if not p.requires_grad}
        computed = gradients(model, lambda: forward_backward(model, batch, strategy))
        for name in once:
            assert (computed[name] is None) == (name in names), name
            assert name in names or relative(computed[name], once[name]) <= 1e-12
        for parameter in model.parameters():
            parameter.requires_grad_(True)


@pytest.mark.parametrize("spec", [*loadable(), *INEXACT])
def test_sequence_shorter_than_the_heads_reach(spec: str) -> None:
    # S = 2 leaves heads 2 to 4 without any target.
    model, batch = build(tiny(n_future=4), "fp32", sequence=2)
    losses = forward_backward(model, batch, load_strategy(spec))
    assert losses[0] > 0
    assert losses[1:].tolist() == [0, 0, 0]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_losses_stay_finite_at_large_logits() -> None:
    model, batch = build(tiny(n_future=2), "fp32")
    with torch.no_grad():
        model.unembedding.weight.mul_(1e5)
    expected = forward_backward(model, batch, NAIVE)
    assert expected.max() > 1e4
    for spec in INEXACT:
        torch.testing.assert_close(forward_backward(model, batch, load_strategy(spec)), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("unembedding", UNEMBEDDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_gives_the_logits_that_the_strategies_train(kind: str, unembedding: str) -> None:
    model, batch = build(small_kind(kind, 3, unembedding=unembedding), "fp64", sequence=12)
    logits = model(batch.tokens)
    assert logits.shape == (3, 2, 12, 67)
    losses = forward_backward(model, batch, NAIVE)
    for i in range(3):
        expected = torch.nn.functional.cross_entropy(logits[i].flatten(0, 1), batch.targets[i].flatten())
        torch.testing.assert_close(losses[i], expected.detach(), rtol=1e-12, atol=0)
