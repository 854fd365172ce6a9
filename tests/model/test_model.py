"""The model is what the paper describes: parameter-matched heads, causal, one shared unembedding."""

import copy
import math
from typing import Any

import pytest
import torch
from small import KINDS, UNEMBEDDINGS, build, small_kind, tiny

from mtp_mem import MTPModel, forward_backward, load_strategy, make_optimizer
from mtp_mem.errors import BadInput
from mtp_mem.model.layers import Attention, RMSNorm, rotate, rotation
from mtp_mem.model.mtp_model import default_attention


def test_n_moves_layers_and_keeps_the_parameters() -> None:
    counts = {n: sum(p.numel() for p in build(tiny(n_future=n))[0].parameters()) for n in (1, 2, 4, 8)}
    assert len(set(counts.values())) == 1
    added = sum(p.numel() for p in build(tiny(n_future=4, match_layers=False))[0].parameters())
    assert added > counts[4]


def test_tied_unembedding_is_the_embedding() -> None:
    model, _ = build(tiny(unembedding="tied"))
    assert model.unembedding.weight is model.embedding.weight
    assert "unembedding" not in model.groups()


@pytest.mark.parametrize("unembedding", UNEMBEDDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_groups_partition_the_parameters(kind: str, unembedding: str) -> None:
    model, _ = build(small_kind(kind, 2, unembedding=unembedding))
    groups = model.groups()
    last = {"shared": ["unembedding"], "tied": [], "replicated": ["unembedding 1", "unembedding 2"]}[unembedding]
    assert list(groups) == ["embedding", "trunk", "head 1", "head 2", "norm", *last]
    for i in range(2):
        names = {name for name, p in model.named_parameters() if any(p is q for q in groups[f"head {i + 1}"])}
        assert names == {name for name, _ in model.named_parameters() if name.startswith(f"head_layers.{i}.")}
    assert [p for g in groups.values() for p in g] == list(dict.fromkeys(p for g in groups.values() for p in g))
    assert {id(p) for g in groups.values() for p in g} == {id(p) for p in model.parameters()}


def test_causal() -> None:
    model, batch = build(tiny(n_future=2), "fp64")
    changed = batch.tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 517
    before, after = model(batch.tokens), model(changed)
    assert torch.equal(before[:, :, :-1], after[:, :, :-1])
    assert not torch.equal(before[:, :, -1], after[:, :, -1])


def test_rotation_depends_on_the_distance_only() -> None:
    cos, sin = rotation(16, 8, 10_000.0, torch.float64, torch.device("cpu"))
    q, k = torch.randn(2, 8, dtype=torch.float64)
    score = rotate(q.expand(1, 16, 1, 8), cos, sin)[0, :, 0] @ rotate(k.expand(1, 16, 1, 8), cos, sin)[0, :, 0].T
    torch.testing.assert_close(score[5, 2], score[12, 9])
    assert not torch.isclose(score[5, 2], score[5, 3])


def test_rotation_is_as_exact_as_the_model() -> None:
    # With angles in fp32 an fp64 model would be off by 1e-8, as two devices' fp32 cosines are; 1e-12 is allowed.
    tables = torch.stack(rotation(40, 8, 10_000.0, torch.float64, torch.device("cpu")))
    angles = [[s * 10_000.0 ** (-j / 4) for j in range(4)] for s in range(40)]
    right = [[[turn(angle) for angle in row] for row in angles] for turn in (math.cos, math.sin)]
    torch.testing.assert_close(tables, torch.tensor(right, dtype=torch.float64), rtol=0, atol=1e-14)


def test_rms_norm_gradients() -> None:
    norm = RMSNorm(tiny()).double()
    torch.nn.init.normal_(norm.weight)
    assert torch.autograd.gradcheck(norm, (torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True),))
    x = torch.randn(5, 64, dtype=torch.float64)
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (64,), norm.weight, norm.eps))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_future": 10}, "valid: n from 1 to 9"),
        ({"dim": 66}, "n_attention_heads = 4"),
        ({"n_kv_heads": 3}, "n_kv_heads = 3 must divide"),
        ({"vocab_size": 0}, "model.vocab_size = 0: must be at least 1"),
        ({"head": "parallell"}, "did you mean 'parallel'?"),
    ],
)
def test_shapes_that_cannot_be_built(changes: dict[str, object], words: str) -> None:
    with pytest.raises(BadInput, match=words.replace("?", r"\?")):
        tiny(**changes)


def test_a_copy_elsewhere_runs_the_attention_of_that_place() -> None:
    # As the oracle of `verify` does with a model from a CUDA device: flash attention runs nowhere else.
    model = MTPModel(tiny(n_future=2, unembedding="tied", head="deepseek"), dtype="bf16", attention="flash")
    actual = model.moved("fp64", torch.device("cpu"))
    assert (actual.norm.weight.dtype, actual.attention, model.attention) == (torch.float64, "sdpa", "flash")
    assert actual.unembedding.weight is actual.embedding.weight  # type: ignore[union-attr]
    logits = actual(torch.zeros(1, 5, dtype=torch.long))
    assert logits.dtype == torch.float64
    assert torch.isfinite(logits).all()
    assert default_attention("bf16", torch.device("cuda")) == "flash"
    assert default_attention("fp32", torch.device("cuda")) == "efficient"
    assert default_attention("fp64", torch.device("cuda")) == default_attention("bf16", torch.device("cpu")) == "sdpa"


@pytest.mark.parametrize(("dtype", "attention"), [("bf16", "flash"), ("fp32", "efficient")])
def test_a_model_that_was_made_on_cuda_runs_on_a_cpu(dtype: Any, attention: Attention) -> None:
    torch.manual_seed(0)
    model = MTPModel(tiny(n_future=2), dtype=dtype, attention=attention)
    plain = MTPModel(tiny(n_future=2), dtype=dtype)
    plain.load_state_dict(model.state_dict())
    tokens = torch.randint(517, (2, 9))
    assert torch.equal(model(tokens), plain(tokens))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", ["parallel", "deepseek"])
def test_it_can_be_cast_copied_and_saved_as_any_module(head: str, dtype: torch.dtype) -> None:
    model, batch = build(tiny(head=head, n_future=2))
    cast = copy.deepcopy(model).to(dtype)
    losses = forward_backward(cast, batch, load_strategy("sequential"))
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert {p.grad.dtype for p in cast.parameters() if p.grad is not None} == {dtype}
    right = forward_backward(model, batch, load_strategy("naive"))
    torch.testing.assert_close(losses, right, rtol=0.02, atol=0, check_dtype=False)
    again = MTPModel(model.config).to(dtype)
    again.load_state_dict(cast.state_dict())
    assert torch.equal(forward_backward(again, batch, load_strategy("sequential")), losses)


def test_an_unknown_optimizer_is_named() -> None:
    with pytest.raises(BadInput, match="unknown optimizer 'adam'; did you mean 'adamw'"):
        make_optimizer(torch.nn.Linear(2, 2), name="adam")  # type: ignore[arg-type]
