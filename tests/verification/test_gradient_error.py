"""Comparing gradients: the verdict, the error, and that neither side is changed by it."""

import math

import pytest
import torch

from mtp_mem.verification import gradient_error
from mtp_mem.verification.gradient_error import compare, relative_error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_error_is_frobenius_relative_in_any_number_of_blocks(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    right = [torch.randn(5, 7).to(dtype), torch.randn(3).to(dtype)]
    mine = [t + 0.25 * torch.randn_like(t) for t in right]
    before = [t.clone() for t in (*right, *mine)]
    apart = math.sqrt(sum((a.double() - b.double()).square().sum().item() for a, b in zip(mine, right, strict=True)))
    whole = apart / math.sqrt(sum(b.double().square().sum().item() for b in right))
    assert relative_error([*mine], [*right]) == pytest.approx(whole)
    monkeypatch.setattr(gradient_error, "BLOCK", 4)
    assert relative_error([*mine], [*right]) == pytest.approx(whole)
    assert all(torch.equal(a, b) for a, b in zip((*right, *mine), before, strict=True))


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
    far = compare({"a": [torch.ones(4) * 1.1], "b": [torch.ones(4), None]}, right, "fp32")
    assert (far.verdict, far.group) == ("differs", "a")
    assert compare({"a": [torch.ones(4).double()], "b": [torch.ones(4), None]}, right, "fp32").verdict == "within bound"
