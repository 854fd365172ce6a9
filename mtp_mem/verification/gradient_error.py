"""Are these the same gradients? Compared part by part of the model, by bits and by Frobenius-relative error."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mtp_mem.config.schema import Dtype

Verdict = Literal["bit-identical", "within bound", "differs", "unchecked"]
Gradients = dict[str, list[Tensor | None]]
"""Gradients by part of the model: embedding, trunk, head 1..n, norm, unembedding (or unembedding 1..n)."""

BOUNDS: dict[Dtype, float] = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 4 * 2**-7, "bf16-mixed": 4 * 2**-7}
"""Largest Frobenius-relative difference of two right gradients, per dtype. Summing in another order costs a few units
of the last place; bf16 has 8 significant bits, so 4 units are 4 * 2**-7. The bf16 bound was set after seeing right
strategies differ by up to 1.7e-2: it tells a broken gradient, not a slightly worse one."""

BLOCK = 2**24  # elements that are compared at once: fp64 copies of whole gradients would not fit beside a large model


@dataclass(frozen=True)
class Comparison:
    """The outcome: a verdict, the largest relative error over the parts, and the part that has it (or differs)."""

    verdict: Verdict
    error: float
    group: str


def take(groups: dict[str, list[nn.Parameter]]) -> Gradients:
    """Take the gradients off the parameters, leaving `.grad` empty."""
    taken: Gradients = {name: [p.grad for p in parameters] for name, parameters in groups.items()}
    for parameters in groups.values():
        for parameter in parameters:
            parameter.grad = None
    return taken


def compare(candidate: Gradients, reference: Gradients, dtype: Dtype) -> Comparison:
    """Compare two sets of gradients of the same model on the same weights and batch, on the candidate's device."""
    if all(_equal(candidate[name], reference[name]) for name in reference):
        return Comparison("bit-identical", 0.0, next(iter(reference)))
    errors = {name: relative_error(candidate[name], reference[name]) for name in reference}
    worst = max(errors, key=errors.__getitem__)
    return Comparison("within bound" if errors[worst] <= BOUNDS[dtype] else "differs", errors[worst], worst)


def relative_error(candidate: list[Tensor | None], reference: list[Tensor | None]) -> float:
    """||candidate - reference|| / ||reference|| over a group of tensors, in fp64, on the candidate's device.

    Infinite where one of the two has no gradient and the other has, or where anything is not finite.
    """
    difference = norm = 0.0
    for a, b in zip(candidate, reference, strict=True):
        if a is None and b is None:
            continue
        if a is None or b is None or a.shape != b.shape:
            return math.inf
        for x, y in zip(a.flatten().split(BLOCK), b.flatten().split(BLOCK), strict=True):
            wide = y.to(a.device).double()
            norm += wide.square().sum().item()
            difference += (wide - x).square_().sum().item()
    if not math.isfinite(difference + norm):
        return math.inf
    if norm == 0:
        return 0.0 if difference == 0 else math.inf
    return math.sqrt(difference / norm)


def _equal(candidate: list[Tensor | None], reference: list[Tensor | None]) -> bool:
    return all(
        a is b or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b.to(a.device)))
        for a, b in zip(candidate, reference, strict=True)
    )
