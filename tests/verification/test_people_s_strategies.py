"""Somebody's own strategies through `verify` and `check_strategy`: their names, their options, what is said of them."""

import re
from dataclasses import dataclass, replace

import pytest
from verification.test_contract import USUAL, Changed

from mtp_mem import load_strategy
from mtp_mem.testing import check_strategy
from mtp_mem.verification.broken_strategies import RetainGraph
from mtp_mem.verification.scenarios import Scenario
from mtp_mem.verification.verify import verify


def test_two_strategies_of_one_class_are_both_checked() -> None:
    result = verify([Changed(""), Changed("cut")], dtypes=["fp64"], scenarios=USUAL)
    assert [check.status for check in result.of("Changed")] == ["right"] * 3
    assert "Changed 2: protocol, fp64: leaves cut.grad empty" in [check.explain() for check in result.failures]


def test_strategies_of_classes_of_one_name_are_all_checked() -> None:
    other = type("Changed", (Changed,), {})
    unrelated = type("Changed", (), {"backward": lambda _, *args: load_strategy("naive").backward(*args)})
    strategies = [Changed("cut"), unrelated(), other(""), unrelated(), Changed(""), Changed("dtype")]
    result = verify(strategies, dtypes=["fp64"], scenarios=USUAL, behaviour=False)
    assert [(check.strategy, check.status) for check in result.checks] == [
        ("Changed", "wrong"),
        *((f"Changed {number}", "right") for number in (2, 3, 4, 5)),
        ("Changed 6", "wrong"),
    ]


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


def test_check_strategy_says_what_is_wrong() -> None:
    check_strategy("sequential", scenarios=USUAL)
    check_strategy(load_strategy("chunked_vocab"), scenarios=USUAL)
    with pytest.raises(AssertionError) as caught:
        check_strategy(RetainGraph(), scenarios=USUAL)
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
        check_strategy(RetainGraph(), scenarios=[replace(USUAL[0], name=f"usual {i}") for i in range(3)])
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
