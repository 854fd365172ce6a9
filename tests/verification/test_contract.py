"""Negative controls: whatever breaks the protocol is named with the strategy that did it, and spoils no other check."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch

from mtp_mem import load_strategy
from mtp_mem.testing import check_strategy
from mtp_mem.verification.broken_strategies import BROKEN
from mtp_mem.verification.scenarios import SCENARIOS, Scenario
from mtp_mem.verification.verify import verify

USUAL = [scenario for scenario in SCENARIOS if scenario.name == "n = 3"]

HOST: dict[str, Callable[[torch.Tensor], object]] = {
    "bool": lambda losses: bool(losses[0] > 0),
    "tolist": lambda losses: losses.tolist(),
    "numpy": lambda losses: losses.numpy(),
    "cpu": lambda losses: losses.cpu(),
    "nonzero": lambda losses: losses.nonzero(),
    "where": lambda losses: torch.where(losses > 0),
    "unique": lambda losses: losses.unique(),
    "repeat": lambda losses: losses.repeat_interleave((losses > 0).long()),
}
"""What makes the host wait for a device."""


@dataclass
class Changed:
    """naive with one thing wrong about the call itself."""

    how: str
    calls: int = field(default=0, init=False)

    def backward(self, cut, heads, targets, weights):  # type: ignore[no-untyped-def]
        losses = load_strategy("naive").backward(cut, heads, targets, weights)
        self.calls += 1
        if self.how == "shape":
            return losses[:-1]
        if self.how == "no tensor":
            return 0.5
        if self.how == "graph":
            return losses.requires_grad_()
        if self.how == "dtype":
            return losses.to(torch.float16)
        if self.how == "cut":
            cut.grad = None
        if self.how == "nothing":
            return None
        if self.how == "a list":
            return list(losses.unbind())
        if self.how == "column":
            return losses[:, None]
        if self.how == "losses doubled":
            return 2 * losses
        if self.how == "losses nan":
            return losses * torch.nan
        if self.how == "targets":
            targets.clamp_(min=0)
        if self.how == "weights":
            weights.mul_(2)
        if self.how == "parameter":
            with torch.no_grad():
                heads.roots[0].unembedding.mul_(2)
        if self.how == "data":
            heads.roots[0].unembedding.data.mul_(2)
        if self.how == "frozen":
            heads.roots[0].unembedding.requires_grad_(False)
        if self.how in HOST:
            HOST[self.how](losses)
        if self.how == "item":
            losses[0].item()
        if self.how == "mask":
            targets[targets > 0]
        if self.how == "state" and self.calls % 3 == 0 and cut.grad is not None:
            cut.grad *= 1.5
        if self.how == "raise":
            raise ValueError("a clear reason\nand more")
        if self.how == "prints":
            print("a word")
        if self.how == "frozen cut" and cut.grad is None:
            cut.grad = torch.zeros_like(cut)
        return losses


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("shape", "returns (2,), not the n losses (3,)"),
        ("no tensor", "returns float, not the n losses (3,)"),
        ("nothing", "returns NoneType, not the n losses (3,)"),
        ("a list", "returns list, not the n losses (3,)"),
        ("column", "returns (3, 1), not the n losses (3,)"),
        ("graph", "returns losses that are not detached"),
        ("dtype", "returns losses in torch.float16, not in torch.float32"),
        ("cut", "leaves cut.grad empty"),
        ("item", "synchronises with the device (aten._local_scalar_dense.default)"),
        ("mask", "synchronises with the device (aten.index.Tensor)"),
        ("bool", "synchronises with the device (aten._local_scalar_dense.default)"),
        ("tolist", "synchronises with the device (Tensor.tolist)"),
        ("numpy", "synchronises with the device (Tensor.numpy)"),
        ("cpu", "synchronises with the device (Tensor.cpu)"),
        ("nonzero", "synchronises with the device (aten.nonzero.default)"),
        ("where", "synchronises with the device (aten.nonzero.default)"),
        ("unique", "synchronises with the device (aten._unique2.default)"),
        ("repeat", "synchronises with the device (aten.repeat_interleave.Tensor)"),
        ("targets", "changes the targets it was given"),
        ("weights", "changes the weights it was given"),
        ("parameter", "changes unembedding.weight"),
        ("data", "changes unembedding.weight"),
        ("frozen", "leaves unembedding.weight frozen, which it was not"),
        ("state", "keeps state: the same step again gives another gradient"),
    ],
)
def test_a_broken_contract_is_named(how: str, words: str) -> None:
    result = verify([Changed(how)], dtypes=["fp32"], scenarios=USUAL)
    assert f"Changed: protocol, fp32: {words}" in [check.explain() for check in result.failures]


@pytest.mark.parametrize(
    ("how", "words"),
    [("losses doubled", "losses: 2 times the right one"), ("losses nan", "losses: losses is not finite")],
)
def test_wrong_losses_are_named(how: str, words: str) -> None:
    failures = verify([Changed(how)], dtypes=["fp64"], scenarios=USUAL).failures
    assert f"Changed: n = 3, fp64: {words}" in [check.explain() for check in failures]


@pytest.mark.parametrize("how", ["targets", "weights", "parameter", "data", "frozen", "raise"])
def test_one_strategy_cannot_spoil_the_next(how: str) -> None:
    result = verify([Changed(how), "sequential"], dtypes=["fp64"], scenarios=USUAL)
    assert [check.explain() for check in result.of("sequential") if check.status != "right"] == []
    assert len(result.of("sequential")) == 3


def test_two_strategies_of_one_class_are_both_checked() -> None:
    result = verify([Changed(""), Changed("cut")], dtypes=["fp64"], scenarios=USUAL)
    assert [check.status for check in result.of("Changed")] == ["right"] * 3
    assert "Changed 2: protocol, fp64: leaves cut.grad empty" in [check.explain() for check in result.failures]


@dataclass(frozen=True)
class Picky:
    """naive that refuses the scenarios' chunk"""

    chunk: int = 8

    def __post_init__(self) -> None:
        if self.chunk % 8:
            raise ValueError(f"chunk = {self.chunk}: expected a multiple of 8")

    def backward(self, cut, heads, targets, weights):  # type: ignore[no-untyped-def]
        return load_strategy("naive").backward(cut, heads, targets, weights)


@dataclass(frozen=True)
class Tiled:
    """Right at its default only, with an option of another name than chunk."""

    tile: int = 64
    rate: float = 1.0

    def backward(self, cut, heads, targets, weights):  # type: ignore[no-untyped-def]
        return load_strategy("naive").backward(cut, heads, targets, weights * (1 if self.tile == 64 else 2))


def test_integer_options_are_varied_whatever_they_are_called() -> None:
    assert verify([Picky()], dtypes=["fp64"], scenarios=USUAL).passed  # an option that refuses a size keeps its own
    result = verify([Tiled()], dtypes=["fp64"], scenarios=USUAL)
    assert [check.scenario for check in result.failures] == ["6 optimizer steps", "n = 3"]
    result = verify([Tiled()], dtypes=["fp64"], scenarios=[replace(USUAL[0], chunk=None)])
    assert [check.scenario for check in result.failures] == ["6 optimizer steps"]


def test_a_gradient_for_a_cut_that_needs_none() -> None:
    frozen = [scenario for scenario in SCENARIOS if scenario.name == "frozen trunk"]
    found = verify([Changed("frozen cut")], dtypes=["fp32"], scenarios=frozen)
    assert "fills cut.grad of a cut that requires none" in [check.broken for check in found.failures]


def test_check_strategy_says_what_is_wrong() -> None:
    check_strategy("sequential", scenarios=USUAL)
    check_strategy(load_strategy("chunked_vocab"), scenarios=USUAL)
    with pytest.raises(AssertionError) as caught:
        check_strategy(BROKEN[0](), scenarios=USUAL)
    assert "5 of 6 checks failed" in str(caught.value)
    # Embedding and trunk are equally wrong, up to rounding.
    assert re.search(
        "RetainGraph: n = 3, fp64: gradient of (embedding|trunk): 2 times the right one", str(caught.value)
    )


def test_check_strategy_says_once_what_is_broken_everywhere() -> None:
    with pytest.raises(AssertionError) as caught:
        check_strategy(Changed("raise"), scenarios=USUAL)
    first, line = str(caught.value).splitlines()
    assert first == "6 of 6 checks failed:"
    assert line.startswith("Changed: 6 optimizer steps, fp64: raised ValueError: a clear reason (test_contract.py:")
    assert line.endswith("(and 5 more alike)")
    with pytest.raises(AssertionError) as caught:
        check_strategy(Changed("bool"), scenarios=USUAL)
    assert str(caught.value).splitlines() == [
        "1 of 6 checks failed:",
        "Changed: protocol, fp64: synchronises with the device (aten._local_scalar_dense.default)",
    ]


def test_check_strategy_shows_ten_failures_and_counts_the_rest() -> None:
    with pytest.raises(AssertionError) as caught:
        check_strategy(BROKEN[0](), scenarios=[replace(USUAL[0], name=f"usual {i}") for i in range(3)])
    lines = str(caught.value).splitlines()
    assert lines[0] == "13 of 14 checks failed:"
    assert len(lines) == 12
    assert lines[-1] == "... and 3 more"


def test_nothing_to_check_is_no_success() -> None:
    alone = Scenario(name="S = 1, as a profile has it", sequence=1)
    result = verify(["naive"], dtypes=["fp32"], scenarios=[alone])
    assert [check.status for check in result.checks] == ["right", "right", "unchecked"]
    assert not result.failures
    assert not result.passed
    assert result.unchecked[0].explain() == "naive: S = 1, as a profile has it, fp32: nothing to check"
    with pytest.raises(AssertionError, match="nothing to check"):
        check_strategy("naive", dtypes=["fp32"], scenarios=[alone])
    assert not verify([], scenarios=[alone]).passed
