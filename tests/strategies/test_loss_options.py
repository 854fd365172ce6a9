"""Label smoothing, z-loss, softcap: the exact gradient in every strategy that takes them, a refusal in the others."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from command_line import mtp_mem
from small import build, gradients, tiny
from torch import Tensor

from mtp_mem import IGNORE, Training, TrainingStep, Workload, head_loss, load_strategy
from mtp_mem.errors import BadInput
from mtp_mem.memory.cpu import track
from mtp_mem.model.head_tree import Head, Heads
from mtp_mem.model.losses import LOSS_OPTIONS, LossOptions, full
from mtp_mem.model.optimizers import make_optimizer
from mtp_mem.prediction.simulated_step import simulate
from mtp_mem.step import forward_backward
from mtp_mem.strategies.sequential import Sequential
from mtp_mem.strategy import BUILTIN, loss_options, strategy_class
from mtp_mem.verification.scenarios import SCENARIOS
from mtp_mem.verification.verify import verify

SMOOTHED = {"label_smoothing": 0.15, "z_loss": 0.01}
SAME_BITS = ("sequential", "checkpointed")
WITHIN_BOUND = ("chunked_vocab:chunk=100", "chunked_tokens:chunk=7", "auto")
OWN_SCENARIOS = [scenario for scenario in SCENARIOS if scenario.options.used]


class Unaware(Sequential):
    """A third party's loss of its own, from before there were options."""

    def loss_backward(self, heads: Heads, head: Head, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        loss = heads.loss(head, hidden, targets, lambda h, u, t: full(h, u, t))
        heads.backward([loss], [weight])
        return loss.detach()


class Forgetful(Unaware):
    """Says that it takes label smoothing, and its loss does not."""

    loss_options: ClassVar[tuple[str, ...]] = ("label_smoothing",)

    def loss_backward(self, heads: Heads, head: Head, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        loss = heads.loss(head, hidden, targets, lambda h, u, t, options=None: full(h, u, t))  # noqa: ARG005
        heads.backward([loss], [weight])
        return loss.detach()


@pytest.mark.parametrize(
    "options",
    [
        LossOptions(**{k: SMOOTHED.get(k, 1.5) for k in some})
        for size in (1, 2, 3)
        for some in combinations(LOSS_OPTIONS, size)
    ],
    ids=lambda options: "+".join(options.used),
)
def test_the_written_out_gradient_is_autograd_s(options: LossOptions) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(9, 31, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(31, (9,))
    z = logits if options.softcap is None else options.softcap * torch.tanh(logits / options.softcap)
    right = F.cross_entropy(z, targets, label_smoothing=options.label_smoothing, reduction="none")
    right = right + options.z_loss * z.logsumexp(1) ** 2
    (expected,) = torch.autograd.grad(right.sum(), logits)
    torch.testing.assert_close(options.total(logits, targets), right.sum())
    z = options.cap_(logits.detach().clone())
    slope, top, column = options.slope(z), z.amax(1), targets[:, None]
    log_total = (z - top[:, None]).exp().sum(1).log()
    below = (top[:, None] - z).mean(1) if options.label_smoothing else None
    losses = options.row_losses(top, log_total, z.gather(1, column)[:, 0], below)
    torch.testing.assert_close(losses, right.detach(), rtol=1e-13, atol=0)
    own = options.gradient_(z.softmax(1), top, log_total, column, torch.ones(9, 1, dtype=torch.float64), 31)
    torch.testing.assert_close(own if slope is None else own * slope, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-mixed"])
@pytest.mark.parametrize("spec", SAME_BITS)
def test_the_same_bits_as_naive(spec: str, dtype: str) -> None:
    model, batch = build(tiny(n_future=3, logit_softcap=2.0), dtype, sequence=16)
    naive, own = (
        gradients(model, lambda spec=spec: forward_backward(model, batch, load_strategy(spec), **SMOOTHED))  # type: ignore[misc]
        for spec in ("naive", spec)
    )
    assert all(torch.equal(own[name], gradient) for name, gradient in naive.items())  # type: ignore[arg-type]
    plain = gradients(model, lambda: forward_backward(model, batch, load_strategy(spec)))
    assert not any(torch.equal(own[name], gradient) for name, gradient in plain.items())  # type: ignore[arg-type]


def test_every_strategy_through_the_scenarios() -> None:
    result = verify(["naive", *SAME_BITS, *WITHIN_BOUND[:2]], dtypes=["fp64", "bf16"], scenarios=OWN_SCENARIOS)
    assert [check.explain() for check in result.failures] == []
    assert result.passed
    assert {option for scenario in OWN_SCENARIOS for option in scenario.options.used} == set(LOSS_OPTIONS)
    assert not result.remarks


def test_an_option_that_is_forgotten_is_caught() -> None:
    result = verify([Forgetful()], dtypes=["fp32"], scenarios=OWN_SCENARIOS)
    assert [check.scenario for check in result.failures] == ["label smoothing"]
    assert result.remarks == ("Forgetful: checked without z_loss, softcap, which its loss does not take",)


def test_a_loss_without_options_is_verified_without_them() -> None:
    result = verify([Unaware()], dtypes=["fp32"], scenarios=[*SCENARIOS[:1], *OWN_SCENARIOS])
    assert result.passed
    assert {check.scenario for check in result.checks} == {"6 optimizer steps", "protocol", "n = 1"}
    assert result.remarks == (
        "Unaware: checked without label_smoothing, z_loss, softcap, which its loss does not take",
    )


def test_what_each_strategy_takes() -> None:
    takes = {name: strategy_class(name).loss_options for name in BUILTIN}
    ours = ("naive", "sequential", "chunked_vocab", "chunked_tokens", "checkpointed", "auto", "liger")
    assert takes == {**dict.fromkeys(ours, LOSS_OPTIONS), "native": (), "cce": ("softcap",), "quack": ()}
    assert loss_options(Unaware()) == ()
    assert loss_options(Sequential()) == loss_options(load_strategy("chunked_tokens:chunk=3")) == LOSS_OPTIONS


@pytest.mark.parametrize("option", ["label_smoothing", "z_loss"])
def test_a_refusal_names_strategy_and_option(option: str) -> None:
    model, batch = build(tiny(n_future=2), sequence=8)
    match = f"'Unaware' has no {option} in its loss; those that have: naive, sequential, chunked_vocab, chunked_tokens"
    with pytest.raises(BadInput, match=match):
        forward_backward(model, batch, Unaware(), **{option: 0.1})
    with pytest.raises(BadInput, match=match):
        head_loss(model, model.trunk(batch.tokens), batch.targets, Unaware(), **{option: 0.1})
    forward_backward(model, batch, Unaware())


@pytest.mark.parametrize("spec", ["naive", "chunked_tokens"])
def test_as_a_loss_in_a_trainer(spec: str) -> None:
    model, batch = build(tiny(n_future=3), sequence=8)
    right = gradients(model, lambda: forward_backward(model, batch, load_strategy(spec), **SMOOTHED))
    loss, losses = head_loss(model, model.trunk(batch.tokens), batch.targets, spec, **SMOOTHED)
    loss.backward()
    assert torch.allclose(loss, losses.sum())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, right[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("spec", ["naive", "checkpointed", "chunked_vocab:chunk=300", "chunked_tokens:chunk=24"])
def test_predicted_equals_tracked(spec: str, dtype: Any) -> None:
    config, training = tiny(vocab_size=1031, n_layers=4, n_future=2), Training(**SMOOTHED)  # type: ignore[arg-type]
    model, batch = build(config, dtype, sequence=32)
    step = TrainingStep(model, make_optimizer(model), batch, load_strategy(spec), training=training)
    step()
    real, workload = track(step), Workload(batch=2, sequence=32, dtype=dtype)
    simulated = simulate(config, workload, load_strategy(spec), training, cuda=False)
    assert simulated.peak() == real.peak()
    assert simulated.phase_peaks() == real.phase_peaks()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing = 1.0: must be at least 0 and below 1"),
        ({"label_smoothing": float("nan")}, "label_smoothing = nan"),
        ({"z_loss": -1e-4}, "z_loss = -0.0001: must be at least 0 and finite"),
        ({"softcap": 0.0}, "softcap = 0.0: must be positive and finite"),
    ],
)
def test_values_out_of_range(options: dict[str, float], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        LossOptions(**options)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=words):
        tiny(logit_softcap=options["softcap"]) if "softcap" in options else Training(**options)  # type: ignore[arg-type]


def test_the_commands(tmp_path: Path) -> None:
    (tmp_path / "shape.toml").write_text(
        "[model]\nvocab_size = 97\ndim = 16\nn_layers = 3\nn_attention_heads = 2\nlogit_softcap = 3\n"
        '[workload]\nbatch = 1\nsequence = 16\ntokenizer = "uniform"\n[sweep]\nn = [2]\nrounds = 1\n'
        "[training]\nlabel_smoothing = 0.1\n"
    )
    run = ("--profile", "shape.toml", "--strategies")
    ended = mtp_mem(tmp_path, "compare", *run, "naive,chunked_tokens", "--z-loss", "1e-4", "--json")
    assert ended.returncode == 0, ended.stderr
    for record in json.loads(ended.stdout)["records"]:
        assert record["gradient"] in ("bit-identical", "within bound")
        assert (record["training"]["label_smoothing"], record["training"]["z_loss"]) == (0.1, 1e-4)
        assert record["model"]["logit_softcap"] == 3
    shown = mtp_mem(tmp_path, "compare", *run, "naive,chunked_tokens", "--z-loss", "1e-4")
    assert "trained in fp32, label smoothing 0.1, z-loss 0.0001" in " ".join(shown.stdout.split())
    for command in ("compare", "verify", "predict", "timeline"):
        asked = ("--strategy",) if command == "timeline" else ("--strategies",)
        refused = mtp_mem(tmp_path, command, *run[:2], *asked, "native", "--dtype", "fp32")
        assert refused.returncode == 2, (command, refused.stderr)
        assert "'native' has no softcap and no label_smoothing in its loss" in refused.stderr, command
    assert mtp_mem(tmp_path, "compare", *run, "naive", "--label-smoothing", "1.5").returncode == 2


def test_ignored_targets_take_no_part() -> None:
    hidden, unembedding = torch.randn(1, 6, 4, requires_grad=True), torch.randn(11, 4)
    targets = torch.tensor([[1, IGNORE, 2, IGNORE, 3, 4]])
    options = LossOptions(**SMOOTHED)  # type: ignore[arg-type]
    some = targets[0] != IGNORE
    expected = full(hidden[:, some], unembedding, targets[:, some], options=options)
    torch.testing.assert_close(full(hidden, unembedding, targets, options=options), expected)
    nothing = full(hidden, unembedding, torch.full_like(targets, IGNORE), options=options)
    nothing.backward()
    assert nothing == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()
