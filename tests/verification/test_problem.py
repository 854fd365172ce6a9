"""A scenario does what its fields say: otherwise a check would pass on an ordinary step under an unusual name."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mtp_mem import load_strategy
from mtp_mem.errors import BadInput
from mtp_mem.model.losses import IGNORE
from mtp_mem.verification.problem import DROPOUT, Problem, build, oracle, plain_step, run, step_with, with_options
from mtp_mem.verification.scenarios import CHUNK, Scenario

CPU = torch.device("cpu")


def problem(dtype: Any = "fp32", **fields: Any) -> Problem:
    return build(Scenario(name="a test", **fields), dtype, CPU)


def targets(**fields: Any) -> torch.Tensor:
    return problem(**fields).batches[0].targets  # (n, B, S)


def test_which_targets_are_ignored() -> None:
    usual = targets()
    assert (usual == IGNORE).sum() == 2 * (1 + 2 + 3)  # head i has none for the last i + 1 tokens of both rows
    nothing = targets(ignored="nothing")
    assert nothing.min() >= 0
    assert torch.equal(nothing[usual != IGNORE], usual[usual != IGNORE])
    kept = {
        "a chunk": torch.ones(22, dtype=torch.bool),
        "a head": torch.ones(3, dtype=torch.bool),
        "most of one sequence": torch.ones(2, 11, dtype=torch.bool),
    }
    kept["a chunk"][CHUNK : 2 * CHUNK] = False
    kept["a head"][1] = False
    kept["most of one sequence"][0, 2:] = False
    for ignored, rows in kept.items():
        shape = {"a chunk": (1, 2, 11), "a head": (3, 1, 1), "most of one sequence": (1, 2, 11)}[ignored]
        expected = torch.where(rows.view(shape), usual, IGNORE)
        assert torch.equal(targets(ignored=ignored), expected), ignored
    assert (targets(ignored="everything") == IGNORE).all()


def test_targets_at_the_edges_and_one_that_no_token_has() -> None:
    plain, edges = problem(vocab_size=5).batches[0], problem(vocab_size=5, edge_targets=True).batches[0]
    assert (plain.tokens == 3).any()
    assert not (edges.tokens == 3).any()
    assert torch.equal(edges.tokens, torch.where(plain.tokens == 3, 1, plain.tokens))
    assert (edges.targets[:, 0, :3] == torch.tensor([0, 4, 3])).all()
    assert not (edges.targets[:, 0, 3:] == 3).any()
    assert not (edges.targets[:, 1] == 3).any()


def test_batches_are_of_the_seeds() -> None:
    three = problem(batches=(0, 1, 0)).batches
    assert torch.equal(three[0].tokens, three[2].tokens)
    assert not torch.equal(three[0].tokens, three[1].tokens)
    numbers = iter(range(3))
    assert run(problem(batches=(0, 1, 0)), lambda *_: torch.full((3,), next(numbers))).losses.tolist() == [2, 2, 2]


def test_the_same_weights_in_every_dtype() -> None:
    exact, low = problem("fp64", logits=3.0), problem("bf16", logits=3.0)
    for (name, right), (_, rounded) in zip(exact.model.named_parameters(), low.model.named_parameters(), strict=True):
        assert torch.equal(right.to(torch.bfloat16), rounded), name
        if right.dim() == 1:
            assert (right == 1).all(), name
        else:
            std = 0.15 * (3 if name.startswith("unembedding") else 1)
            assert 0.9 * std < right.std() < 1.1 * std, name


def test_trunks() -> None:
    plain = problem("fp64").model
    tokens = problem("fp64").batches[0].tokens
    z = plain.trunk(tokens)
    checkpointed = problem("fp64", trunk="checkpointed").model.trunk(tokens)
    assert torch.equal(checkpointed, z)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        problem("fp64", trunk="checkpointed").model.trunk(tokens)
    assert [tensor.dtype for tensor in saved] == [torch.int64]  # the checkpoint keeps its input, the tokens, alone
    transposed = problem("fp64", trunk="transposed")
    z_transposed = transposed.model.trunk(tokens)
    assert torch.equal(z_transposed, z)
    assert not z_transposed.is_contiguous()
    assert not transposed.batches[0].targets.is_contiguous()
    assert torch.equal(transposed.batches[0].targets, problem("fp64").batches[0].targets)


def test_dropout_draws_the_same_mask_in_every_dtype() -> None:
    masks = []
    for dtype in ("fp64", "bf16"):
        dropped, plain = problem(dtype, trunk="dropout", batch=8), problem(dtype, batch=8)
        tokens = plain.batches[0].tokens
        torch.manual_seed(5)
        z, whole = dropped.model.trunk(tokens), plain.model.trunk(tokens)
        masks.append(z != 0)
        torch.testing.assert_close(z, torch.where(masks[-1], whole / (1 - DROPOUT), 0))
    assert torch.equal(*masks)
    assert 0.7 < masks[0].double().mean() < 0.9


def test_every_run_draws_the_same_dropout() -> None:
    dropped = problem("fp64", trunk="dropout")
    step = step_with(load_strategy("naive"), dropped.scenario)
    before = torch.get_rng_state()
    first, second = run(dropped, step), run(dropped, step)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.losses, second.losses)
    assert torch.equal(first.losses, oracle(dropped).losses) or torch.allclose(first.losses, oracle(dropped).losses)


def test_steps_before_the_step() -> None:
    fresh, stepped, further = problem(), problem(steps=1), problem(steps=3)
    for (name, start), once, later in zip(
        fresh.model.named_parameters(), stepped.model.parameters(), further.model.parameters(), strict=True
    ):
        assert once.grad is None, name
        assert not torch.equal(start, once), name
        assert 1e-3 < (once - start).abs().max() < 0.02, name  # a step of AdamW goes as far as the learning rate, 0.01
        assert (later - start).abs().max() > (once - start).abs().max(), name


def test_one_value_that_is_no_number() -> None:
    weight = problem(not_a_number="unembedding.weight").model.get_parameter("unembedding.weight")
    assert weight.isnan().sum() == 1
    assert weight.flatten()[5].isnan()
    assert not any(p.isnan().any() for p in problem().model.parameters())


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_an_offset_that_all_logits_share(dtype: Any) -> None:
    shifted = problem(dtype, offset=2.0**20, head="causal", unembedding="replicated")
    model, batch = shifted.model, shifted.batches[0]
    assert (model(batch.tokens) == 2.0**20).all()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"unembedding.{i}.weight" for i in range(3)}
    assert problem("fp64", offset=1.0).model.norm.weight.tolist() == [1, 1, *[0] * 30]


def test_gradients_that_are_there_before() -> None:
    prefilled = problem("bf16", prefilled=True)
    names = [name for name, _ in prefilled.model.named_parameters()]
    assert list(prefilled.gradients) == names
    assert not problem().gradients
    seen = {}

    def look(model: Any, _batch: Any) -> torch.Tensor:
        seen.update({name: p.grad for name, p in model.named_parameters()})
        return torch.zeros(3)

    outcome = run(prefilled, look)
    for name in names:
        assert seen[name] is not None
        assert seen[name].dtype == torch.bfloat16
        assert torch.equal(seen[name], prefilled.gradients[name])
        assert seen[name] is not prefilled.gradients[name]  # what a step adds must not reach the next run
        assert 0.005 < prefilled.gradients[name].float().std() < 0.02
        assert outcome.gradients[name] is seen[name]
    assert all(p.grad is None for p in prefilled.model.parameters())


def test_what_is_frozen() -> None:
    def trained(*frozen: str) -> set[str]:
        parameters = problem(frozen=frozen).model.named_parameters()
        return {name.partition(".")[0] for name, p in parameters if p.requires_grad}

    everything = {"embedding", "trunk_layers", "head_layers", "norm", "unembedding"}
    assert trained() == everything
    assert trained("norm", "embedding") == everything - {"norm", "embedding"}
    assert trained("all but", "head 1", "head 2", "head 3") == {"head_layers"}


def test_the_oracle_is_plain_autograd_on_the_rounded_weights() -> None:
    low = problem("bf16", weights=(1.0, 0.3, 2.0), scale=3.0, label_smoothing=0.2, z_loss=1e-2, frozen=("norm",))
    answer = oracle(low)
    exact = problem("fp64").model
    exact.load_state_dict({name: value.double() for name, value in low.model.state_dict().items()})
    batch, weights = low.batches[0], torch.tensor([1.0, 0.3, 2.0], dtype=torch.float64)
    logits = exact(batch.tokens)  # (n, B, S, V)
    losses = torch.stack(
        [
            F.cross_entropy(z.flatten(0, 1), t.flatten(), ignore_index=IGNORE, label_smoothing=0.2)
            + 1e-2 * z.logsumexp(-1)[t != IGNORE].square().mean()
            for z, t in zip(logits, batch.targets, strict=True)
        ]
    )
    (3.0 * weights * losses).sum().backward()
    torch.testing.assert_close(answer.losses, losses.detach(), rtol=1e-12, atol=0)
    for name, parameter in exact.named_parameters():
        if name == "norm.weight":
            assert answer.gradients[name] is None
        else:
            torch.testing.assert_close(answer.gradients[name], parameter.grad, rtol=1e-9, atol=1e-14)


def test_a_strategy_s_step_has_all_of_the_scenario() -> None:
    fields = {"weights": (1.0, 0.3, 2.0), "scale": 3.0, "label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 2.0}
    exact = problem("fp64", **fields)
    right, outcome = oracle(exact), run(exact, step_with(load_strategy("naive"), exact.scenario))
    torch.testing.assert_close(outcome.losses, right.losses, rtol=1e-12, atol=0)
    for name, gradient in right.gradients.items():
        torch.testing.assert_close(outcome.gradients[name], gradient, rtol=1e-9, atol=1e-14)


def test_no_valid_target_is_a_loss_of_zero() -> None:
    nothing = problem("fp64", ignored="everything")
    losses = plain_step(nothing.model, nothing.batches[0], None, 1.0)
    assert losses.tolist() == [0, 0, 0]


@dataclass(frozen=True)
class Options:
    """Integer options, and others"""

    block: int = 7
    tile: int | None = None
    share: float = 0.5
    name: str = "x"
    derived: int = field(init=False, default=3)
    even: int = 2

    def __post_init__(self) -> None:
        if self.even % 2:
            raise BadInput("even")

    def backward(self, *_: Any) -> torch.Tensor:
        raise NotImplementedError


def test_integer_options_are_set_and_no_others() -> None:
    assert with_options(Options(), None) == Options()
    assert with_options(Options(), 13) == Options(block=13, tile=13)
    assert with_options(Options(), 4) == Options(block=4, tile=4, even=4)
    assert dataclasses.asdict(with_options(Options(), 4))["derived"] == 3  # type: ignore[call-overload]
