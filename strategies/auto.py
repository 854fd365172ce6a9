"""Chooses by the step: simulates its bytes, and gives the logits no more than the rest of the step needs anyway.

    choice = the strategy and chunk for which the logits do not define the step's peak     # mtp_mem/prediction/auto.py
    choice.backward(...)

`compare`, `predict` and `timeline` choose before they run, and say what and why. A trainer does the same once:
`mtp_mem.prediction.auto.choose(config, workload, cuda=True).spec`. `Auto.backward` itself has no config to simulate: it
runs `chunked_tokens` with its default chunk.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mtp_mem.model.head_tree import Heads
from mtp_mem.model.losses import LOSS_OPTIONS
from mtp_mem.strategies.chunked_tokens import ChunkedTokens


@dataclass(frozen=True, kw_only=True)
class Auto:
    """Chooses strategy and chunk so that the logits never define the step's peak, and says what it chose"""

    chooses_by_step: ClassVar[bool] = True
    loss_options: ClassVar[tuple[str, ...]] = LOSS_OPTIONS

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """See `mtp_mem.strategy.Strategy.backward`."""
        return ChunkedTokens().backward(cut, heads, targets, weights)
