"""Every kind of head computes what its definition says, and hangs where its definition says."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import KINDS, build, gradients, small_kind, tiny
from torch import Tensor

from mtp_mem import Batch, MTPModel, forward_backward, load_strategy
from mtp_mem.errors import BadInput
from mtp_mem.strategy import loadable

S = 12


def written_out(model: MTPModel, tokens: Tensor) -> list[Tensor]:
    """Every head's hidden states (B, S, D), from the definitions and the parameters alone."""
    z, turn, heads = model.trunk(tokens), model.rotation(tokens), list(model.head_layers)
    weight = dict(model.named_parameters())
    match model.config.head:
        case "parallel":
            return [heads[0](z, turn), heads[1](z, turn), heads[2](z, turn)]
        case "causal":
            first = heads[0](z, turn)
            return [first, heads[1](first, turn), heads[2](heads[1](first, turn), turn)]
        case "anticausal":
            last = heads[2](z, turn)
            return [heads[0](heads[1](last, turn), turn), heads[1](last, turn), last]
        case "linear":
            return [torch.einsum("bsd,ed->bse", z, weight[f"head_layers.{i}.weight"]) for i in range(3)]
        case "medusa":
            hidden = []
            for i in range(3):
                h = z
                for block in range(model.config.medusa_blocks):
                    own = f"head_layers.{i}.blocks.{block}"
                    a = h @ weight[f"{own}.weight"].T + weight[f"{own}.bias"]
                    h = h + a * a.sigmoid()
                hidden.append(h)
            return hidden
        case _:  # deepseek
            hidden, eps = [heads[0](z, turn)], model.config.norm_eps
            for k in (1, 2):
                own, ahead = f"head_layers.{k}", torch.zeros_like(tokens)
                for t in range(S - k):
                    ahead[:, t] = tokens[:, t + k]
                h = F.rms_norm(hidden[-1], (32,), weight[f"{own}.hidden_norm.weight"], eps)
                e = F.rms_norm(weight["embedding.weight"][ahead], (32,), weight[f"{own}.token_norm.weight"], eps)
                left, right = weight[f"{own}.projection.weight"].split(32, dim=1)  # M = [left; right]
                hidden.append(heads[k].layer(h @ left.T + e @ right.T, turn))
            return hidden


def unembeddings(model: MTPModel) -> list[Tensor]:
    return [model.get_parameter(f"unembedding.{i}.weight") for i in range(model.config.n_future)]


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_what_the_definition_says(kind: str, blocks: int) -> None:
    model, batch = build(small_kind(kind, 3, unembedding="replicated", medusa_blocks=blocks), "fp64", sequence=S)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)  # at one they could be left out
    expected = torch.stack(
        [
            F.rms_norm(h, (32,), model.norm.weight, model.config.norm_eps) @ weight.T
            for h, weight in zip(written_out(model, batch.tokens), unembeddings(model), strict=True)
        ]
    )
    torch.testing.assert_close(model(batch.tokens), expected, rtol=1e-12, atol=1e-14)


def reached(kind: str, i: int) -> set[int]:
    """The heads whose parameters head i's loss reaches (indices, n = 4)."""
    chain = {"causal": range(i + 1), "deepseek": range(i + 1), "anticausal": range(i, 4)}
    return set(chain.get(kind, (i,)))


@pytest.mark.parametrize("spec", [*loadable(), "logits"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_s_loss_reaches_the_heads_below_it_and_no_other(kind: str, spec: str) -> None:
    model, batch = build(small_kind(kind, 4, unembedding="replicated"), "fp64", sequence=S)
    for i in range(4):
        weights = [float(j == i) for j in range(4)]

        def run(i: int = i, weights: Any = weights) -> None:
            if spec == "logits":
                F.cross_entropy(model(batch.tokens)[i].flatten(0, 1), batch.targets[i].flatten()).backward()
            else:
                forward_backward(model, batch, load_strategy(spec), weights)

        computed = gradients(model, run)

        def touched(prefix: str, computed: Any = computed) -> list[bool]:
            own = [g for name, g in computed.items() if name.startswith(prefix)]
            return [g is not None and bool(torch.count_nonzero(g)) for g in own]

        for j in range(4):
            assert set(touched(f"head_layers.{j}.")) == {j in reached(kind, i)}, (i, j)
            assert touched(f"unembedding.{j}.") == [j == i], (i, j)
        assert all(touched("trunk_layers.") + touched("embedding."))


@pytest.mark.parametrize("kind", KINDS)
def test_which_tokens_a_head_sees(kind: str) -> None:
    # Head index k sees tokens up to t; DeepSeek's depth k also those it is given, up to t + k.
    model, batch = build(small_kind(kind, 3), "fp64", sequence=S)
    at = 8
    changed = batch.tokens.clone()
    changed[:, at] = (changed[:, at] + 1) % 67
    differs = (model(batch.tokens) != model(changed)).any(dim=-1).any(dim=1)  # (n, S)
    for k in range(3):
        first = at - (k if kind == "deepseek" else 0)
        assert differs[k].tolist() == [t >= first for t in range(S)]


def test_deepseek_padding_reaches_no_valid_target() -> None:
    # The id that stands in for tokens past the end is 0: absent from the batch, it gets no gradient from a lookup.
    model, batch = build(small_kind("deepseek", 4), "fp64", sequence=S)
    tokens = batch.tokens.clamp(min=1)
    batch = Batch(tokens, torch.where(batch.targets == 0, 1, batch.targets))
    for spec in loadable():
        grad = gradients(model, lambda spec=spec: forward_backward(model, batch, load_strategy(spec)))[
            "embedding.weight"
        ]
        assert torch.count_nonzero(grad[0]) == 0  # type: ignore[index]
        assert torch.count_nonzero(grad[tokens[0, 0]]) > 0  # type: ignore[index]


def test_deepseek_at_n_1_is_the_ordinary_model() -> None:
    ordinary, batch = build(small_kind("parallel", 1), "fp64", sequence=S)
    main_only, _ = build(small_kind("deepseek", 1), "fp64", sequence=S)
    assert torch.equal(main_only(batch.tokens), ordinary(batch.tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_counted(kind: str) -> None:
    # D = 64, 9 layers. Heads that are layers come out of the trunk; linear and medusa heads stand on top of all layers.
    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    for n in (1, 4):
        for match in (True, False):
            model, _ = build(tiny(head=kind, n_future=n, match_layers=match))
            own = [count(head) for head in model.head_layers]
            if kind in ("linear", "medusa"):
                assert len(model.trunk_layers) == 9
                assert own == [64 * 64 + (64 if kind == "medusa" else 0)] * n
            else:
                assert len(model.trunk_layers) == (9 - n if match else 8)
                layer = count(model.trunk_layers[0])
                joint = 2 * 64 * 64 + 2 * 64 if kind == "deepseek" else 0  # projection and two norms, on top
                assert own == [layer] + [layer + joint] * (n - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_more_heads_than_layers(kind: str) -> None:
    if kind in ("linear", "medusa"):
        assert tiny(head=kind, n_future=12).trunk_layers == 9
    else:
        with pytest.raises(BadInput, match="valid: n from 1 to 9, or match_layers = false"):
            tiny(head=kind, n_future=12)


def test_medusa_blocks_are_checked() -> None:
    with pytest.raises(BadInput, match=r"model\.medusa_blocks = 0: must be at least 1"):
        tiny(head="medusa", medusa_blocks=0)


def test_replicated_unembeddings_are_n_and_their_own() -> None:
    model, batch = build(small_kind("parallel", 3, unembedding="replicated"), "fp64", sequence=S)
    before = model(batch.tokens)
    with torch.no_grad():
        model.get_parameter("unembedding.1.weight").zero_()
    changed = (model(batch.tokens) != before).flatten(1).any(dim=1)
    assert changed.tolist() == [False, True, False]
