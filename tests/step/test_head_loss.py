"""`head_loss` is an ordinary loss: the gradient of one plain backward, whatever a trainer does around it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from model.test_huggingface import error, language_model, plain_joint
from small import build, gradients, small_kind
from torch import Tensor, nn

import mtp_mem
from mtp_mem import Batch, MTPForCausalLM, forward_backward, from_hf, future_targets, head_loss, load_strategy
from mtp_mem.errors import BadInput
from mtp_mem.model.huggingface import HuggingFaceMTP
from mtp_mem.model.own import draws_random_numbers
from mtp_mem.verification.problem import plain_step

N = 3
SPECS = ("naive", "sequential", "checkpointed")


def ids_and_targets(n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 131, (2, 17), generator=generator)
    labels = ids.clone()
    labels[0, :6] = mtp_mem.IGNORE
    return ids, future_targets(labels, n)


def loss_of(model: HuggingFaceMTP, spec: str, **options: Any) -> Tensor:
    ids, targets = ids_and_targets(model.n_future)
    return head_loss(model, model.trunk(ids), targets, spec, **options)[0]


def frozen(part: str) -> Callable[[HuggingFaceMTP], None]:
    return lambda model: [parameter.requires_grad_(False) for parameter in model.groups()[part]] and None


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("kind", "tied", "change"),
    [
        ("parallel", False, lambda _: None),
        ("parallel", True, lambda _: None),
        ("deepseek", True, lambda _: None),
        ("medusa", False, frozen("trunk")),
        ("parallel", False, frozen("unembedding")),
        ("parallel", False, frozen("head 2")),
        ("causal", False, lambda model: model.bfloat16()),
        ("parallel", False, lambda model: model.checkpoint_trunk(1)),
    ],
)
def test_bits_of_one_plain_backward(kind: Any, tied: bool, change: Callable[[Any], None], spec: str) -> None:
    model = from_hf(language_model("llama", tie_word_embeddings=tied), N, kind).train()
    change(model)
    right = gradients(model, lambda: plain_joint(model, *ids_and_targets()))
    assert error(gradients(model, lambda: loss_of(model, spec).backward()), right) == 0


@pytest.mark.parametrize("spec", [*SPECS, "chunked_tokens:chunk=7", "chunked_vocab:chunk=13"])
def test_what_trainers_do_around_it(spec: str) -> None:
    model = from_hf(language_model("qwen2"), N).train()
    ids, targets = ids_and_targets()
    right = gradients(model, lambda: forward_backward(model, Batch(ids, targets), load_strategy(spec)))

    def divided_and_accumulated() -> None:
        for _ in range(2):
            (loss_of(model, spec) / 2).backward()

    # Half of a gradient twice is the gradient: both are exact in binary.
    assert error(gradients(model, divided_and_accumulated), right) == 0
    expected = gradients(model, lambda: (loss_of(model, spec, scale=0.25) * 0.25).backward())
    assert error(expected, gradients(model, lambda: loss_of(model, spec).mul(0.25).backward())) < 1e-6
    odd = gradients(model, lambda: (loss_of(model, spec) * 0.37).backward())
    assert error(odd, {name: None if g is None else 0.37 * g for name, g in right.items()}) < 1e-6


def test_num_items_and_weights() -> None:
    model = from_hf(language_model("llama"), N).train()
    ids, targets = ids_and_targets()
    counts = (targets != mtp_mem.IGNORE).flatten(1).sum(1)
    loss, losses = head_loss(model, model.trunk(ids), targets, "sequential", [1.0, 0.3, 0.1], num_items=40)
    plain = plain_joint(model, ids, targets)
    assert torch.equal(losses, torch.stack(plain).detach())
    wanted = sum(w * c / 40 * part for w, c, part in zip((1.0, 0.3, 0.1), counts, losses, strict=True))
    torch.testing.assert_close(loss, wanted)


def test_hooks_fire_once_and_not_before_backward() -> None:
    model = from_hf(language_model("llama"), N).train()
    fired: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))  # type: ignore[misc]
    loss = loss_of(model, "chunked_tokens:chunk=7")
    assert not fired
    assert all(parameter.grad is None for parameter in model.parameters())
    loss.backward()
    assert sorted(fired) == sorted(name for name, _ in model.named_parameters())


def test_fp16_needs_the_scale_announced() -> None:
    model = from_hf(language_model("llama"), N).train()
    right = gradients(model, lambda: plain_joint(model, *ids_and_targets()))
    model.half()
    scale = 2.0**14

    def run(announced: float) -> float:
        # So small a weight that the gradient of a hidden state is below fp16's smallest number.
        loss = lambda: loss_of(model, "naive", weights=[1e-3] * N, scale=announced)  # noqa: E731
        scaled = gradients(model, lambda: (loss() * scale).backward())
        return error({k: None if g is None else g.float() / scale * 1e3 for k, g in scaled.items()}, right)

    assert run(scale) < 0.02
    assert run(1.0) > 0.1


def test_without_a_graph_it_is_the_loss_alone() -> None:
    model = from_hf(language_model("llama"), N).eval()
    with torch.no_grad():
        loss = loss_of(model, "sequential")
    assert not loss.requires_grad
    torch.testing.assert_close(loss, loss_of(model, "naive").detach())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_second_backward_is_refused() -> None:
    loss = loss_of(from_hf(language_model("llama"), N), "sequential")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward a second time"):
        loss.backward()


def test_bad_arguments() -> None:
    model = from_hf(language_model("llama"), N)
    ids, targets = ids_and_targets()
    z = model.trunk(ids)
    with pytest.raises(BadInput, match=r"targets have shape \(2, 2, 17\), expected \(n, B, S\) = \(3, 2, 17\)"):
        head_loss(model, z, targets[:2])
    with pytest.raises(BadInput, match=r"weights have shape \(2,\), expected \(3,\)"):
        head_loss(model, z, targets, weights=[1.0, 2.0])
    with pytest.raises(BadInput, match="not the tensor that this step's trunk"):
        head_loss(model, z + 0, targets)
    with pytest.raises(BadInput, match="did you mean 'sequential'"):
        head_loss(model, z, targets, "sequental")


@pytest.mark.parametrize("kind", ["parallel", "deepseek", "medusa"])
def test_the_harness_s_own_model(kind: str) -> None:
    model, batch = build(small_kind(kind, N))
    right = gradients(model, lambda: forward_backward(model, batch, load_strategy("sequential")))
    own = gradients(model, lambda: head_loss(model, model.trunk(batch.tokens), batch.targets)[0].backward())
    assert error(own, right) == 0


def test_autocast_around_it() -> None:
    """Under a trainer's autocast all have the bits of a backward without autocast's cache, which would sum in bf16."""
    model = from_hf(language_model("llama"), N).train()

    def under_autocast(spec: str) -> Callable[[], object]:
        def run() -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, spec)
            loss.backward()

        return run

    def joint() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            plain_joint(model, *ids_and_targets())

    right = gradients(model, joint)
    for spec in SPECS:
        assert error(gradients(model, under_autocast(spec)), right) == 0, spec


class Mine(nn.Module):
    """A model of a user's own."""

    n_future, vocab_size, dim = N, 131, 32

    def __init__(self, kind: Any = "parallel") -> None:
        super().__init__()
        self.kind = kind
        self.head: Callable[[nn.Module], Any] = lambda layer: layer
        self.embedding = nn.Embedding(131, 32)
        self.body = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.mtp = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(N))
        self.norm = nn.LayerNorm(32)
        self.lm_head = nn.Linear(32, 131, bias=False)

    def trunk(self, tokens: Tensor) -> Tensor:
        z: Tensor = self.body(self.embedding(tokens))
        return z

    def heads(self, _z: Tensor, phase: Any = mtp_mem.no_phase) -> Any:
        return mtp_mem.heads(
            layers=[self.head(layer) for layer in self.mtp],
            norm=self.norm,
            unembedding=self.lm_head,
            kind=self.kind,
            phase=phase,
        )


@pytest.mark.parametrize("kind", ["parallel", "causal", "anticausal"])
def test_a_model_of_the_user_s_own(kind: str) -> None:
    torch.manual_seed(0)
    model = Mine(kind)
    ids, targets = ids_and_targets()
    plain = gradients(model, lambda: plain_step(model, Batch(ids, targets), None, 1.0))  # type: ignore[arg-type]
    right = gradients(model, lambda: forward_backward(model, Batch(ids, targets), load_strategy("naive")))  # type: ignore[arg-type]
    assert error(right, plain) < 1e-6
    for spec in SPECS:
        own = gradients(model, lambda spec=spec: head_loss(model, model.trunk(ids), targets, spec)[0].backward())  # type: ignore[misc]
        assert error(own, right) == 0


def test_heads_from_modules_names_what_is_wrong() -> None:
    norm, layer = nn.LayerNorm(8), nn.Linear(8, 8)
    with pytest.raises(BadInput, match="adds a bias"):
        mtp_mem.heads(layers=[layer], norm=norm, unembedding=nn.Linear(8, 5))
    with pytest.raises(BadInput, match="2 unembeddings for 1 layers"):
        mtp_mem.heads(layers=[layer], norm=norm, unembedding=[nn.Linear(8, 5, bias=False)] * 2)
    with pytest.raises(BadInput, match="no layers"):
        mtp_mem.heads(layers=[], norm=norm, unembedding=nn.Linear(8, 5, bias=False))
    with pytest.raises(BadInput, match="unknown kind 'serial'"):
        mtp_mem.heads(layers=[layer], norm=norm, unembedding=layer.weight, kind="serial")  # type: ignore[arg-type]


class Drops(nn.Module):
    """A layer that drops by a function, at a rate of its own."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.hidden_dropout = rate

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.hidden_dropout)


@pytest.mark.parametrize(
    "dropping",
    [
        lambda layer: nn.Sequential(layer, nn.Dropout(0.5)),
        lambda layer: nn.Sequential(layer, Drops(0.5)),
        lambda layer: partial(nn.Sequential(layer, nn.Dropout(0.5))),
        lambda layer: lambda x: nn.functional.dropout(layer(x), 0.5),
    ],
    ids=["module", "rate", "partial", "function"],
)
def test_dropout_in_a_head_is_drawn_again_alike(dropping: Any) -> None:
    torch.manual_seed(0)
    model = Mine()
    model.head = dropping
    ids, targets = ids_and_targets()

    def run(spec: str) -> dict[str, Tensor | None]:
        torch.manual_seed(5)
        return gradients(model, lambda: forward_backward(model, Batch(ids, targets), load_strategy(spec)))  # type: ignore[arg-type]

    assert error(run("checkpointed"), run("naive")) == 0


def test_a_layer_says_by_its_rates_that_it_draws() -> None:
    attention = [nn.MultiheadAttention(8, 2, dropout=rate) for rate in (0.0, 0.1)]
    layers = [nn.Linear(8, 8), Drops(0.0), nn.Dropout(0.0), attention[0]]
    assert not draws_random_numbers([*layers, *(partial(layer, mask=None) for layer in layers)])
    for layer in (Drops(0.1), nn.Dropout(0.1), attention[1]):
        assert draws_random_numbers([nn.Sequential(layer)])
        assert draws_random_numbers([partial(layer, mask=None)])


def test_a_module_that_returns_the_loss() -> None:
    ids, _ = ids_and_targets()
    model = MTPForCausalLM(language_model("llama"), N, "sequential", weights=[1.0, 0.5, 0.5])
    out = model(input_ids=ids, labels=ids)
    assert set(out) == {"loss", "losses"}
    torch.testing.assert_close(out["loss"], (out["losses"] * torch.tensor([1.0, 0.5, 0.5])).sum())
    out["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model(input_ids=ids)["logits"].shape == (N, 2, 17, 131)
