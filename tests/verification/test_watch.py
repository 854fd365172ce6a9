"""The parts of the watch one by one: what they notice, what they put back, and what they leave alone."""

import sys
from collections.abc import Callable

import numpy
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_mem import load_strategy
from mtp_mem.errors import BrokenContract
from mtp_mem.model.model_state import model_kept
from mtp_mem.strategy import KernelLimits
from mtp_mem.verification.behaviour import across_steps, protocol
from mtp_mem.verification.broken_behaviour import HooksSkipped
from mtp_mem.verification.contract import LARGER, counted_hooks, put_back, stand_alone, unchanged
from mtp_mem.verification.global_state import _equal, restored
from mtp_mem.verification.problem import build
from mtp_mem.verification.scenarios import SCENARIOS, Scenario
from mtp_mem.verification.verify import verify

USUAL, CPU = Scenario(name="usual"), torch.device("cpu")
EXISTING = next(scenario for scenario in SCENARIOS if scenario.name == "existing .grad")


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


def test_an_error_inside_does_not_end_the_process() -> None:
    class Leaves:
        def backward(self, *args):  # type: ignore[no-untyped-def]
            try:
                return load_strategy("naive").backward(*args)
            except torch.OutOfMemoryError:
                sys.exit(1)

    assert protocol("Leaves", Leaves(), USUAL, "fp32", CPU).broken.startswith("quits the process: SystemExit(1)")


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
    with pytest.raises(BrokenContract, match=r"leaves b\.grad sharing memory with a\.grad"):
        stand_alone({"a.grad": a, "b.grad": a.view(3)}, {})
    with pytest.raises(BrokenContract, match=r"leaves a\.grad sharing memory with the cut"):
        stand_alone({"a.grad": a}, {"the cut": a.view(3)})
    stand_alone({"a.grad": torch.empty(0), "b.grad": torch.empty(0, 3)}, {})  # memory that none has is not shared


def test_nan_is_no_change() -> None:
    weight = torch.tensor([1.0, torch.nan])
    assert put_back(weight, weight.clone())
    assert not put_back(weight, torch.tensor([2.0, torch.nan]))
    assert weight[0] == 2
    weight.untyped_storage().resize_(4)  # its last value is gone
    assert not put_back(weight, torch.tensor([2.0, 3.0]))
    assert weight.tolist() == [2.0, 3.0]
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
        model.norm.eval()  # type: ignore[union-attr, operator]
    assert changed == ["hooks on norm.weight", "training mode of norm", "hooks of norm"]
    assert model.norm.training  # type: ignore[union-attr]
    model.norm(torch.ones(1, 32)).sum().backward()  # type: ignore[operator]
    assert calls == ["module", "parameter"]


def test_hooks_on_what_autograd_saves_are_taken_off() -> None:
    packed: list[torch.Tensor] = []
    with restored() as changed:
        saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x).__enter__()
    assert changed == ["hooks on what autograd saves"]
    torch.ones(2, requires_grad=True).exp()
    assert packed == []


def test_hooks_that_count_go_and_name_what_they_never_saw() -> None:
    weight = torch.ones(3, requires_grad=True)
    with counted_hooks({"w": weight}):
        weight.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.5] * 3
    weight.grad = None
    weight.sum().backward()
    assert weight.grad.tolist() == [1.0] * 3
    weight.grad = None
    with pytest.raises(BrokenContract, match="the hook of w never ran"), counted_hooks({"w": weight}):
        weight.grad = torch.ones(3)
    assert protocol("HooksSkipped", HooksSkipped(), USUAL, "fp32", CPU).broken.startswith("the hook of unembedding")


def test_whether_a_tensor_trains_is_put_back() -> None:
    cut = torch.ones(2, requires_grad=True)
    with pytest.raises(BrokenContract, match="leaves cut frozen, which it was not"), unchanged({"cut": cut}):
        cut.requires_grad_(False)
    assert cut.requires_grad


def test_a_gradient_that_the_next_step_overwrites_is_named() -> None:
    class Zeroes:
        before: torch.Tensor | None = None

        def backward(self, cut, heads, targets, weights):  # type: ignore[no-untyped-def]
            if self.before is not None:
                self.before.zero_()
            losses = load_strategy("naive").backward(cut, heads, targets, weights)
            self.before = heads.roots[0].unembedding.grad
            return losses

    check = across_steps("Zeroes", Zeroes(), USUAL, "fp32", CPU)
    assert check.broken == "step 2 changes the losses or the .grad of the step before"


def test_a_reference_cycle_keeps_no_memory() -> None:
    def cycles(losses: torch.Tensor) -> torch.Tensor:
        cycle: list[object] = [torch.ones(70)]
        cycle.append(cycle)
        return losses

    assert across_steps("After", After(cycles), USUAL, "fp32", CPU).status == "right"


def test_a_gradient_written_by_hand_runs_no_post_accumulate_hook() -> None:
    weight = torch.ones(3, requires_grad=True)
    with pytest.raises(BrokenContract, match="the post-accumulate hook of w never ran"), counted_hooks({"w": weight}):
        (weight.grad,) = torch.autograd.grad((2 * weight).sum(), weight)


def test_what_a_hook_returns_must_reach_the_gradient() -> None:
    weight = torch.ones(3, requires_grad=True)

    def step() -> None:
        weight.sum().backward()
        assert weight.grad is not None
        weight.grad *= 2  # as if the hook had not halved it

    with pytest.raises(BrokenContract, match="the hook of w saw another gradient"), counted_hooks({"w": weight}):
        step()


@pytest.mark.parametrize("how", ["a view of it", "other memory"])
def test_a_gradient_that_is_there_is_added_to_in_its_place(how: str) -> None:
    class Moves:
        def backward(self, cut, heads, targets, weights):  # type: ignore[no-untyped-def]
            losses = load_strategy("naive").backward(cut, heads, targets, weights)
            unembedding = heads.roots[0].unembedding
            if how == "a view of it":
                unembedding.grad = unembedding.grad.view_as(unembedding)
            else:
                unembedding.grad.data = unembedding.grad.data.clone()
            return losses

    (check,) = verify([Moves()], dtypes=["fp32"], scenarios=[EXISTING], behaviour=False).checks
    assert check.broken == "leaves another tensor in unembedding.weight.grad, instead of adding to what is there"


def test_an_index_of_numbers_waits_for_no_device() -> None:
    def indexed(losses: torch.Tensor) -> torch.Tensor:
        columns = torch.ones(2, 4)[:, torch.arange(3)]  # (2, 3), its first index None
        return losses + 0 * columns[0, 0]

    assert protocol("After", After(indexed), USUAL, "fp32", CPU).broken == ""


def test_modes_that_were_entered_are_left_and_others_stay() -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return func(*args, **(kwargs or {}))

    with Mode():  # type: ignore[no-untyped-call]
        depth = torch._C._len_torch_dispatch_stack()
        with restored() as changed:
            Mode().__enter__()  # type: ignore[no-untyped-call]
        assert changed == ["modes that see every operator"]
        assert torch._C._len_torch_dispatch_stack() == depth


def test_hooks_that_were_there_on_what_autograd_saves_stay() -> None:
    packed: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        with restored() as changed:
            saved_tensors_hooks(lambda x: x, lambda x: x).__enter__()
        assert changed == ["hooks on what autograd saves"]
        torch.ones(2, requires_grad=True).exp()
    assert len(packed) == 1


def test_warnings_alone_are_put_back_too() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with restored() as changed:
            torch.use_deterministic_algorithms(False)
        assert changed == ["deterministic algorithms"]
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_lists_of_states_are_compared_one_by_one() -> None:
    one, other = torch.tensor([1, 2]), torch.tensor([1, 3])
    assert _equal([one, other], [one.clone(), other.clone()])
    assert not _equal([one, other], [one, one])
    assert not _equal([one], [one, other])
