"""Is it the same gradient? One rule for `verify`, which has an fp64 oracle, and for `compare`, which has naive's alone.

A part of the model is right, wrong, or has nothing to check: where the right gradient is absent, zero or not finite
there is no relative error, and to agree with it proves nothing. A strategy must agree with it all the same.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mtp_mem.config.schema import Dtype

Status = Literal["right", "wrong", "unchecked"]
Verdict = Literal["bit-identical", "within bound", "differs", "unchecked"]
Reference = Literal["numbers", "zero", "not finite"]
"""What a right gradient may consist of."""

Gradients = Mapping[str, Sequence[Tensor | None]]
"""By part of the model: embedding, trunk, head 1..n, norm, unembedding (or unembedding 1..n); and the losses."""

NOISE = 1e-12
"""Times the largest value in a part: a tensor below this is zero except for rounding (queries at S = 1, say)."""
BLOCK = 2**24  # elements that are compared at once: fp64 copies of whole gradients would not fit beside a large model


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of the model's gradient, the losses, or one clause of the protocol.

    Attributes:
        name: of the part.
        status: right, wrong or unchecked.
        error: relative to the reference (Frobenius norm); infinite where the tensors cannot be compared.
        allowed: the largest error that is right.
        naive_error: naive's own against the same reference, where that is an fp64 oracle.
        problem: what is wrong, or why there is nothing to check, in words; empty where the numbers say it.
        overflows: whether it overflows in fp16 as naive's does, and the oracle's does not: nothing is known of it then.
    """

    name: str
    status: Status
    error: float = 0.0
    allowed: float = 0.0
    naive_error: float | None = None
    problem: str = ""
    overflows: bool = False


@dataclass(frozen=True)
class Comparison:
    """The outcome: a verdict, the largest relative error over the parts, and the part that has it (or differs).

    `overflows`: in that part the reference itself is not finite, so that nothing can be held against it.
    """

    verdict: Verdict
    error: float
    group: str
    overflows: bool = False


def take(groups: dict[str, list[nn.Parameter]]) -> dict[str, list[Tensor | None]]:
    """Take the gradients off the parameters, leaving `.grad` empty."""
    taken: dict[str, list[Tensor | None]] = {name: [p.grad for p in own] for name, own in groups.items()}
    for parameters in groups.values():
        for parameter in parameters:
            parameter.grad = None
    return taken


def allowed(dtype: Dtype, naive_error: float | None = None) -> float:
    """The largest relative error of a right gradient.

    Args:
        dtype: of the model.
        naive_error: naive's own error, where the reference is an oracle in fp64: in low precision naive is inexact
            too, and a right gradient may be about twice as far from the oracle. None: the reference is a run in the
            same dtype. Summing in another order costs a few units of the last place; bf16 has 8 significant bits, so 4
            units are 4 * 2**-7 (right strategies differed by up to 1.7e-2); fp16 has 11.
    """
    if dtype == "fp64":
        return 1e-12
    if dtype == "fp32":
        return 1e-5
    if naive_error is None or not math.isfinite(naive_error):
        return 4 * (2**-10 if dtype == "fp16" else 2**-7)
    return 2 * naive_error + 1e-4


def judge(
    name: str,
    candidate: Sequence[Tensor | None],
    reference: Sequence[Tensor | None],
    dtype: Dtype,
    *,
    names: Sequence[str] = (),
    naive: Sequence[Tensor | None] | None = None,
    naive_error: float | None = None,
    factor: float = 1.0,
    rounding: float = 0.0,
    expected: Reference = "numbers",
) -> Part:
    """Hold one part's tensors against the right ones.

    Args:
        name: of the part.
        candidate: the strategy's tensors; None where it left none.
        reference: the right tensors; None where there must be none.
        dtype: of the model.
        names: of the tensors, for `problem`; by default the part's name.
        naive: naive's tensors in the model's dtype, where the reference is an oracle in fp64.
        naive_error: naive's `relative_error`, where it is known already.
        factor: multiplies the allowed error in low precision.
        rounding: error that is allowed on top.
        expected: "zero" or "not finite" where the scenario makes the reference so on purpose: to agree with it is
            right then, not unchecked.
    """
    if naive_error is None and naive is not None:
        naive_error = relative_error(naive, reference)
    bound = allowed(dtype, naive_error) * (1.0 if dtype in ("fp64", "fp32") else factor) + rounding

    def part(status: Status, problem: str, error: float = math.inf) -> Part:
        if status == "unchecked" or (status == "right" and problem):
            error = 0.0
        return Part(name=name, status=status, error=error, allowed=bound, naive_error=naive_error, problem=problem)

    pairs: list[tuple[Tensor, Tensor]] = []
    overflows = ""
    largest: list[tuple[float, float]] = []
    peaks = [_largest(tensors) for tensors in (candidate, reference, naive or reference)]
    rows = zip(names or [name] * len(reference), candidate, reference, *peaks, strict=True)
    for tensor, own, right, own_peak, right_peak, plain_peak in rows:
        if own is None and right is None:
            continue
        if own is None:
            return part("wrong", f"{tensor} has no gradient")
        if right is None:
            return part("wrong", f"{tensor} is frozen and has a gradient")
        if own.shape != right.shape:
            return part("wrong", f"{tensor} has shape {tuple(own.shape)}, expected {tuple(right.shape)}")
        if math.isfinite(right_peak):
            if not math.isfinite(own_peak):
                if dtype != "fp16" or naive is None or math.isfinite(plain_peak):
                    return part("wrong", f"{tensor} is not finite")
                overflows = overflows or tensor
            if plain_peak and not own_peak and right_peak > NOISE * max(peaks[1]):
                return part("wrong", f"{tensor} is zero, where the right one is not")
        elif math.isfinite(own_peak):
            return part("wrong", f"{tensor} is finite, where the right one is not")
        pairs.append((own, right))
        largest.append((own_peak, right_peak))
    if not pairs:
        return part("unchecked", "frozen")
    if overflows:
        known = expected == "not finite"
        words = f"{overflows} overflows fp16, as naive's does: the loss scale is too large"
        return dataclasses.replace(part("right" if known else "unchecked", words), overflows=not known)
    if not all(math.isfinite(right_peak) for _, right_peak in largest):
        return part("right" if expected == "not finite" else "unchecked", "not finite, as the right one is")
    if not any(right_peak for _, right_peak in largest):
        if any(own_peak for own_peak, _ in largest):
            return part("wrong", "is not zero, where the right one is")
        return part("right" if expected == "zero" else "unchecked", "zero, as the right one is")
    error = relative_error(candidate, reference)
    if error <= bound:
        return part("right", "", error)
    return part("wrong", _as_a_multiple(pairs), error)


def compare(candidate: Gradients, reference: Gradients, dtype: Dtype, loss_rounding: float = 0.0) -> Comparison:
    """Compare gradients and losses of one model on the same weights and batch, both in the model's dtype.

    Args:
        candidate: the strategy's; the comparison runs on their device.
        reference: those they must equal.
        dtype: of the model.
        loss_rounding: relative error that a loss may have because the strategy's kernel rounds it.
    """
    parts = [
        judge(name, candidate[name], own, dtype, rounding=loss_rounding * (name == "losses"))
        for name, own in reference.items()
    ]
    worst = max(parts, key=lambda part: (part.status == "wrong", part.error))
    if worst.status == "wrong":
        return Comparison("differs", worst.error, worst.name)
    for name, own in reference.items():
        if dtype == "fp16" and not all(map(math.isfinite, _largest(own))):
            return Comparison("unchecked", 0.0, name, overflows=True)
    if all(part.status == "unchecked" for part in parts):
        return Comparison("unchecked", 0.0, worst.name)
    same = all(identical(candidate[part.name], reference[part.name]) for part in parts if part.status == "right")
    return Comparison("bit-identical" if same else "within bound", worst.error, worst.name)


def identical(candidate: Sequence[Tensor | None], reference: Sequence[Tensor | None]) -> bool:
    """Whether all tensors are equal, bit for bit and in dtype; one with a value that is not finite equals nothing."""
    for a, b in zip(candidate, reference, strict=True):
        if a is None and b is None:
            continue
        if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b.to(a.device)):
            return False
    return all(map(math.isfinite, _largest(candidate)))


def _largest(tensors: Sequence[Tensor | None]) -> list[float]:
    """Of each tensor the largest absolute value, NaN where it holds one; 0 where there is no tensor or no value."""
    present = [tensor for tensor in tensors if tensor is not None and tensor.numel()]
    peaks = iter(torch.stack(list(torch._foreach_norm(present, math.inf))).tolist() if present else ())
    return [next(peaks) if tensor is not None and tensor.numel() else 0.0 for tensor in tensors]


def relative_error(candidate: Sequence[Tensor | None], reference: Sequence[Tensor | None]) -> float:
    """||candidate - reference|| / ||reference|| over a group of tensors, in fp64, on the candidate's device.

    Infinite where one of the two has no gradient and the other has, or where anything is not finite.
    """
    difference = norm = 0.0
    present: list[tuple[Tensor, Tensor]] = []
    for a, b in zip(candidate, reference, strict=True):
        if (a is None) != (b is None) or (a is not None and b is not None and a.shape != b.shape):
            return math.inf
        if a is not None and b is not None:
            present.append((a.flatten(), b.flatten()))
    if present and sum(a.numel() for a, _ in present) <= BLOCK:
        present = [(torch.cat([a for a, _ in present]), torch.cat([b for _, b in present]))]
    for a, b in present:
        for x, y in zip(a.split(BLOCK), b.split(BLOCK), strict=True):
            wide = y.to(a.device).double()
            norm += wide.square().sum().item()
            difference += (wide - x).square_().sum().item()
    if not math.isfinite(difference + norm):
        return math.inf
    if norm == 0:
        return 0.0 if difference == 0 else math.inf
    return math.sqrt(difference / norm)


def _as_a_multiple(pairs: Sequence[tuple[Tensor, Tensor]]) -> str:
    """Which multiple of the right gradient the wrong one (first of each pair) is, in words; empty if it is none."""
    product = norm = 0.0
    for own, right in pairs:
        wide = right.to(own.device).double()
        product += (wide * own).sum().item()
        norm += wide.square().sum().item()
    factor = product / norm
    multiple = [factor * right.double() for _, right in pairs]
    if abs(factor - 1) > 0.01 and relative_error([own for own, _ in pairs], multiple) < 0.01:
        return f"{factor:.3g} times the right one"
    return ""
