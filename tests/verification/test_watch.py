"""The parts of the watch one by one: what they notice, what they put back, and what they leave alone."""

from collections.abc import Callable
from dataclasses import replace

import numpy
import pytest
import torch

from mtp_mem import load_strategy
from mtp_mem.errors import BrokenContract
from mtp_mem.model.model_state import model_kept
from mtp_mem.strategy import KernelLimits
from mtp_mem.verification.behaviour import across_steps, protocol
from mtp_mem.verification.checks import Check
from mtp_mem.verification.contract import LARGER, put_back, stand_alone
from mtp_mem.verification.global_state import restored
from mtp_mem.verification.gradient_error import Part
from mtp_mem.verification.problem import build
from mtp_mem.verification.scenarios import SCENARIOS, Scenario
from mtp_mem.verification.verify import verify

USUAL, CPU = Scenario(name="usual"), torch.device("cpu")


class After:
    """naive, and something done to its losses"""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.change = change

    def backward(self, cut, heads, targets, weights):  # type: ignore[no-untyped-def]
        losses = load_strategy("naive").backward(cut, heads, targets, weights)
        return self.change(losses)


class Silent:
    """Zeros everywhere, and no head runs"""

    def backward(self, cut, heads, targets, weights):  # type: ignore[no-untyped-def]
        cut.grad = torch.zeros_like(cut)
        return torch.zeros_like(weights)


def test_state_that_only_another_batch_changes_is_seen() -> None:
    class Remembers:
        limits = KernelLimits(waits="it reads its targets")
        last: int | None = None

        def backward(self, cut, heads, targets, weights):  # type: ignore[no-untyped-def]
            batch, before = int(targets.clamp(min=0).sum()), self.last
            self.last = batch
            wrong = 1.0 if before in (None, batch) else 1.5
            return load_strategy("naive").backward(cut, heads, targets, weights * wrong)

    check = protocol("Remembers", Remembers(), USUAL, "fp32", CPU)
    assert check.broken == "keeps state: the same step again gives another gradient"


def test_a_strategy_that_runs_no_head_swallows_no_error() -> None:
    check = protocol("Silent", Silent(), USUAL, "fp32", CPU)
    assert check.broken == ""
    assert "errors get out" in [part.name for part in check.parts]


def test_steps_are_counted_from_one() -> None:
    names = [part.name for part in across_steps("naive", load_strategy("naive"), USUAL, "fp32", CPU).parts]
    assert names[:2] == ["losses of step 1", "weights after step 1"]
    assert names[10:] == [
        "losses of step 6",
        "weights after step 6",
        "earlier steps stay as they were",
        "a step keeps no memory",
    ]


@pytest.mark.parametrize(("times", "broken"), [(LARGER, False), (LARGER + 1, True)])
def test_losses_may_be_a_part_of_a_small_buffer(times: int, broken: bool) -> None:
    def in_a_buffer(losses: torch.Tensor) -> torch.Tensor:
        buffer = torch.zeros(times * len(losses))
        buffer[: len(losses)] = losses
        return buffer[: len(losses)]

    check = protocol("After", After(in_a_buffer), USUAL, "fp32", CPU)
    assert check.broken.startswith("returns losses as a part of") is broken


def test_losses_that_the_next_step_overwrites_are_named() -> None:
    buffers: list[torch.Tensor] = []

    def reused(losses: torch.Tensor) -> torch.Tensor:
        buffers[:1] = buffers[:1] or [losses.clone()]
        return buffers[0].copy_(losses)

    check = across_steps("After", After(reused), USUAL, "fp32", CPU)
    assert check.broken == "step 2 changes the losses or the .grad of the step before"


def test_the_largest_tensor_that_stays_is_named() -> None:
    kept: list[torch.Tensor] = []

    def keeps(losses: torch.Tensor) -> torch.Tensor:
        kept[:] = [torch.zeros(5), torch.ones(70), torch.zeros(6)]
        return losses

    check = across_steps("After", After(keeps), USUAL, "fp32", CPU)
    assert check.explain().endswith(
        "a step keeps no memory: 324 bytes stay after it, the largest a tensor (70,) made by ones.default"
    )


def test_gradients_do_not_share_memory() -> None:
    a, b = torch.ones(3), torch.ones(3)
    stand_alone({"a.grad": a, "b.grad": b}, {"the cut": torch.ones(3)})
    with pytest.raises(BrokenContract, match=r"leaves b\.grad in the memory of a\.grad"):
        stand_alone({"a.grad": a, "b.grad": a.view(3)}, {})
    with pytest.raises(BrokenContract, match=r"leaves a\.grad in the memory of the cut"):
        stand_alone({"a.grad": a}, {"the cut": a.view(3)})


def test_nan_is_no_change() -> None:
    weight = torch.tensor([1.0, torch.nan])
    assert put_back(weight, weight.clone())
    assert not put_back(weight, torch.tensor([2.0, torch.nan]))
    assert weight[0] == 2
    empty = torch.empty(3, 0)
    assert put_back(empty, empty.clone())


def test_numpy_s_random_state_is_put_back() -> None:
    numpy.random.seed(3)
    first = numpy.random.rand()
    numpy.random.seed(3)
    with restored() as changed:
        numpy.random.rand(1000)
    assert changed == ["NumPy's random state"]
    assert numpy.random.rand() == first


def test_autocast_is_left_as_often_as_it_was_entered() -> None:
    torch.autocast_increment_nesting()
    try:
        with restored() as changed:
            torch.autocast_increment_nesting()
        assert changed == ["how deep autocast is nested"]
        assert torch.autocast_increment_nesting() == 2
        torch.autocast_decrement_nesting()
    finally:
        torch.autocast_decrement_nesting()


def test_hooks_that_were_taken_off_are_put_back() -> None:
    model = build(USUAL, "fp32", CPU).model
    calls: list[str] = []
    model.norm.register_forward_hook(lambda *_: calls.append("module"))  # type: ignore[union-attr]
    weight = model.get_parameter("norm.weight")  # type: ignore[operator]
    weight.register_hook(lambda _: calls.append("parameter"))
    with model_kept(model) as changed:
        model.norm._forward_hooks.clear()  # type: ignore[union-attr, operator]
        weight._backward_hooks.clear()
    assert changed == ["hooks on norm.weight", "hooks of norm"]
    model.norm(torch.ones(1, 32)).sum().backward()  # type: ignore[operator]
    assert calls == ["module", "parameter"]


def test_what_overflowed_is_not_right() -> None:
    right = Part(name="losses", status="right")
    unknown = Part(name="gradient of norm", status="unchecked", problem="too large", overflows=True)
    check = Check(strategy="naive", scenario="usual", dtype="fp16", parts=(right, unknown))
    assert check.status == "unchecked"
    assert check.explain() == "naive: usual, fp16: gradient of norm: too large"
    assert replace(check, parts=(right,)).status == "right"


def test_the_worst_part_is_the_one_that_is_said() -> None:
    parts = (
        Part(name="head 1", status="right", error=0.5, allowed=1.0),
        Part(name="head 2", status="wrong", error=2.0, allowed=1.0),
        Part(name="head 3", status="wrong", error=9.0, allowed=3.0),
        Part(name="norm", status="right", error=7.0, allowed=1.0),
    )
    check = Check(strategy="mine", scenario="usual", dtype="fp32", parts=parts)
    assert check.worst is parts[2]
    assert check.explain() == "mine: usual, fp32: head 3: error 9.0e+00, allowed 3.0e+00"
    assert replace(check, parts=()).worst is None
    assert replace(check, parts=()).explain() == "mine: usual, fp32: nothing to check"


class Scaled:
    """naive, with its losses and the unembedding's gradient multiplied"""

    def __init__(self, losses: float = 1.0, gradient: float = 1.0, limits: KernelLimits | None = None) -> None:
        self.losses, self.gradient, self.limits = losses, gradient, limits or KernelLimits()

    def backward(self, cut, heads, targets, weights):  # type: ignore[no-untyped-def]
        losses = load_strategy("naive").backward(cut, heads, targets, weights)
        heads.roots[0].unembedding.grad *= self.gradient
        return losses * self.losses


def explained(strategy: Scaled) -> str:
    usual = [scenario for scenario in SCENARIOS if scenario.name == "n = 3"]
    (check,) = verify([strategy], dtypes=["bf16"], scenarios=usual, behaviour=False).checks
    return check.explain().removeprefix("Scaled: n = 3, bf16: ")


def test_low_precision_is_held_to_naive_s_own_error() -> None:
    assert explained(Scaled()) == "right"
    assert explained(Scaled(gradient=1.02)).startswith("gradient of unembedding: 1.02 times the right one")


def test_a_kernel_that_rounds_its_loss_may_round_nothing_else() -> None:
    rounds = KernelLimits(rounds_loss=True)
    assert explained(Scaled(losses=1.01)) == "losses: 1.01 times the right one"
    assert explained(Scaled(losses=1.01, limits=rounds)) == "right"
    assert explained(Scaled(gradient=1.02, limits=rounds)).startswith("gradient of unembedding: 1.02 times")
