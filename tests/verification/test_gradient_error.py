"""Comparing gradients: the verdict, the error, and that neither side is changed by it."""

import math

import pytest
import torch

from mtp_mem.verification import gradient_error
from mtp_mem.verification.gradient_error import allowed, compare, identical, judge, relative_error, take


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_error_is_frobenius_relative_in_any_number_of_blocks(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    right = [torch.randn(5, 7).to(dtype), torch.randn(3).to(dtype)]
    own = [t + 0.25 * torch.randn_like(t) for t in right]
    before = [t.clone() for t in (*right, *own)]
    apart = math.sqrt(sum((a.double() - b.double()).square().sum().item() for a, b in zip(own, right, strict=True)))
    whole = apart / math.sqrt(sum(b.double().square().sum().item() for b in right))
    assert relative_error([*own], [*right]) == pytest.approx(whole)
    monkeypatch.setattr(gradient_error, "BLOCK", 4)
    assert relative_error([*own], [*right]) == pytest.approx(whole)
    assert all(torch.equal(a, b) for a, b in zip((*right, *own), before, strict=True))


def test_what_has_no_error() -> None:
    one, zero = torch.ones(3), torch.zeros(3)
    assert relative_error([None], [None]) == 0
    assert relative_error([None], [one]) == relative_error([one], [None]) == math.inf
    assert relative_error([torch.ones(2)], [one]) == math.inf
    assert relative_error([one * math.nan], [one]) == math.inf
    assert relative_error([zero], [zero]) == 0
    assert relative_error([one], [zero]) == math.inf


def test_verdicts() -> None:
    right = {"a": [torch.ones(4)], "b": [torch.ones(4), None]}
    assert compare({"a": [torch.ones(4)], "b": [torch.ones(4), None]}, right, "fp32").verdict == "bit-identical"
    near = compare({"a": [torch.ones(4)], "b": [torch.ones(4) * (1 + 1e-6), None]}, right, "fp32")
    assert (near.verdict, near.group) == ("within bound", "b")
    assert near.error == pytest.approx(1e-6, rel=0.1)
    assert not near.overflows
    far = compare({"a": [torch.ones(4) * 1.1], "b": [torch.ones(4), None]}, right, "fp32")
    assert (far.verdict, far.group) == ("differs", "a")
    assert compare({"a": [torch.ones(4).double()], "b": [torch.ones(4), None]}, right, "fp32").verdict == "within bound"


@pytest.mark.parametrize(
    "nothing",
    [[None], [torch.empty(0)], [torch.zeros(3)], [torch.full((3,), math.nan)], [torch.tensor([math.inf])]],
)
def test_nothing_to_check_is_neither_right_nor_identical(nothing: list[torch.Tensor | None]) -> None:
    part = judge("a", nothing, nothing, "fp32")
    assert (part.status, part.error) == ("unchecked", 0.0)
    alone = compare({"a": nothing}, {"a": nothing}, "fp32")
    assert (alone.verdict, alone.error) == ("unchecked", 0.0)
    both = {"a": nothing, "b": [torch.ones(2)]}
    assert compare(both, both, "fp32").verdict == "bit-identical"


def test_what_is_not_finite_equals_nothing() -> None:
    for value in (math.nan, math.inf):
        assert not identical([torch.tensor([1.0, value])], [torch.tensor([1.0, value])])
    assert identical([torch.ones(2), None, torch.empty(0)], [torch.ones(2), None, torch.empty(0)])
    assert not identical([None], [torch.ones(2)])
    assert not identical([torch.ones(2)], [None])


def test_gradients_are_taken_off() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = gradient = torch.ones(2)
    assert take({"a": [parameter]})["a"][0] is gradient
    assert parameter.grad is None


@pytest.mark.parametrize(
    ("own", "right", "words"),
    [
        ([None], [torch.ones(3)], "w has no gradient"),
        ([torch.ones(3)], [None], "w is frozen and has a gradient"),
        ([torch.ones(2)], [torch.ones(3)], "w has shape (2,), expected (3,)"),
        ([torch.tensor([1.0, math.nan])], [torch.ones(2)], "w is not finite"),
        ([torch.zeros(2)], [torch.ones(2)], "w is zero, where the right one is not"),
        ([torch.zeros(2)], [torch.tensor([math.nan, 1.0])], "w is finite, where the right one is not"),
        ([torch.ones(2)], [torch.zeros(2)], "is not zero, where the right one is"),
        ([torch.full((2,), 3.0)], [torch.ones(2)], "3 times the right one"),
    ],
)
def test_what_is_wrong_is_said(own: list[torch.Tensor | None], right: list[torch.Tensor | None], words: str) -> None:
    part = judge("gradient of a", own, right, "fp32", names=["w"])
    assert (part.status, part.problem) == ("wrong", words)


def test_a_multiple_is_one_of_all_tensors_and_not_the_right_one_itself() -> None:
    right = [torch.ones(4), torch.ones(2)]
    tripled = judge("a", [3 * t for t in right], right, "fp32", names=["v", "w"])
    assert tripled.problem == "3 times the right one"
    assert judge("a", [3 * right[0], right[1]], right, "fp32", names=["v", "w"]).problem == ""
    near = judge("a", [1.005 * torch.ones(4)], [torch.ones(4)], "fp32")
    assert (near.status, near.problem) == ("wrong", "")


def test_what_overflows_fp16_as_naive_does_is_unknown() -> None:
    one, large = [torch.ones(2)], [torch.tensor([1.0, math.inf])]
    assert judge("a", large, one, "fp16").status == "wrong"
    assert judge("a", large, one, "fp16", naive=one).status == "wrong"
    assert judge("a", large, one, "fp32", naive=large).status == "wrong"
    unknown = judge("a", large, one, "fp16", naive=large)
    assert (unknown.status, unknown.overflows) == ("unchecked", True)
    nothing = compare({"a": large}, {"a": large}, "fp16")
    assert (nothing.verdict, nothing.error, nothing.group, nothing.overflows) == ("unchecked", 0.0, "a", True)
    asked_for = judge("a", large, one, "fp16", naive=large, expected="not finite")
    assert (asked_for.status, asked_for.overflows) == ("right", False)


def test_an_expected_zero_is_right() -> None:
    zero, nan = [torch.zeros(2)], [torch.full((2,), math.nan)]
    assert judge("a", zero, zero, "fp32", expected="zero").status == "right"
    assert judge("a", nan, nan, "fp32", expected="not finite").status == "right"
    assert judge("a", nan, zero, "fp32", expected="zero").status == "wrong"


def test_a_tensor_that_is_zero_but_for_rounding_may_be_zero() -> None:
    large = torch.full((2,), 1e6)
    for tiny, status in ((1e-9, "right"), (1.0, "wrong")):
        right = [torch.full((2,), tiny), large]
        assert judge("a", [torch.zeros(2), large], right, "fp32", names=["q", "v"]).status == status


def test_the_rule() -> None:
    assert allowed("fp64") == allowed("fp64", 1.0) == 1e-12
    assert allowed("fp32") == allowed("fp32", 1.0) == 1e-5
    assert allowed("bf16", 0.01) == allowed("bf16-mixed", 0.01) == pytest.approx(0.0201)
    assert allowed("bf16") == allowed("bf16", math.inf) == 4 * 2**-7
    assert allowed("fp16") == 4 * 2**-10
    one, near = [torch.ones(4)], [torch.ones(4) * 1.05]
    held = judge("a", [torch.ones(4) * 1.01], one, "bf16", naive=[torch.ones(4) * 1.001])
    assert (held.status, held.naive_error) == ("wrong", pytest.approx(1e-3, rel=0.01))
    assert compare({"losses": one}, {"losses": one}, "fp32").verdict == "bit-identical"
    assert compare({"losses": near}, {"losses": one}, "fp32").verdict == "differs"
    assert compare({"losses": near}, {"losses": one}, "fp32", loss_rounding=0.06).verdict == "within bound"
    assert compare({"a": near}, {"a": one}, "fp32", loss_rounding=0.06).verdict == "differs"
    assert judge("a", near, one, "bf16").status == "wrong"
    assert judge("a", [torch.ones(4) * 1.02], one, "bf16").status == "right"
    assert judge("a", near, one, "bf16", factor=2).status == "right"
    assert judge("losses", near, one, "fp32", rounding=0.06).status == "right"


def test_what_a_part_says_of_itself() -> None:
    right = [torch.ones(3)]
    missing = judge("a", [None], right, "fp32")
    assert missing.error == math.inf
    assert missing.allowed == allowed("fp32", None)
    frozen = judge("a", [None], [None], "bf16", naive_error=0.25, factor=3.0, rounding=0.5)
    assert (frozen.status, frozen.problem, frozen.error) == ("unchecked", "frozen", 0.0)
    assert (frozen.allowed, frozen.naive_error) == (3 * allowed("bf16", 0.25) + 0.5, 0.25)
    zero = judge("a", [torch.zeros(2)], [torch.zeros(2)], "fp32", expected="zero")
    assert (zero.status, zero.problem, zero.error) == ("right", "zero, as the right one is", 0.0)
