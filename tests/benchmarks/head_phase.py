"""The head phase alone, without layers and trunk: what a strategy's loss costs, beside the products it cannot avoid.

Every head is the identity on the cut and the norm is a copy: a strategy has the three products of each head to do
(logits, hidden gradient, unembedding gradient: 6 N V D FLOPs) and whatever it adds to them. The floor is measured, not
computed: the same products, bare, on the same machine in the same run.
"""

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtp_mem.memory.tracker import Tracker
from mtp_mem.model.head_tree import Head, Heads, no_phase
from mtp_mem.model.losses import IGNORE, loss_dtype
from mtp_mem.strategy import Strategy

COPY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class HeadShape:
    """N tokens, width D, vocabulary V, n heads, one dtype on one device."""

    N: int
    D: int
    V: int
    n: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def label(self) -> str:
        """As a name of tests and stages has it."""
        return f"n{self.n}-V{self.V}"

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"N={self.N} D={self.D} V={self.V} {str(self.dtype).removeprefix('torch.')} {self.device}"

    @property
    def flops(self) -> int:
        """Three products a head."""
        return 6 * self.n * self.N * self.V * self.D

    @property
    def lower_bound(self) -> int:
        """Bytes above the inputs that nobody avoids: the unembedding's gradient and one head's hidden gradient."""
        return (self.V + self.N) * self.D * self.dtype.itemsize


SHAPES: dict[str, tuple[HeadShape, ...]] = {
    "small": (HeadShape(N=256, D=64, V=2000, n=2),),
    "cpu": tuple(HeadShape(N=2048, D=512, V=32000, n=n) for n in (1, 4)),
    "cuda": (
        *(HeadShape(N=8192, D=4096, V=128256, n=n, dtype=torch.bfloat16, device="cuda") for n in (1, 4)),
        HeadShape(N=8192, D=2304, V=256000, n=1, dtype=torch.bfloat16, device="cuda"),
    ),
}
"""What is timed: in CI, on a CPU, on a GPU."""


class HeadPhase:
    """Inputs of a head phase, and what may be run on them.

    Attributes:
        cut: (1, N, D), a leaf; every head reads it.
        unembedding: (V, D), a leaf.
        targets: (n, 1, N), every tenth ignored.
        weights: (n,), ones in the loss dtype.
    """

    def __init__(self, shape: HeadShape, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shape = shape

        def normal(*size: int, scale: float) -> Tensor:
            return (torch.randn(*size, generator=generator) * scale).to(shape.device, shape.dtype).requires_grad_()

        self.cut = normal(1, shape.N, shape.D, scale=1.0)
        self.unembedding = normal(shape.V, shape.D, scale=shape.D**-0.5)
        targets = torch.randint(shape.V, (shape.n, 1, shape.N), generator=generator)
        targets[..., ::10] = IGNORE
        self.targets = targets.to(shape.device)
        self.weights = torch.ones(shape.n, dtype=loss_dtype(shape.dtype), device=shape.device)

    def run(self, strategy: Strategy) -> Tensor:
        """Forward and backward of all heads from empty `.grad`; the n losses."""
        self.clear()
        return strategy.backward(self.cut, self.heads(), self.targets, self.weights)

    def heads(self) -> Heads:
        """n heads that hand on what they get, and a norm that copies."""
        roots = tuple(Head(i, _same, self.unembedding) for i in range(self.shape.n))
        return Heads(roots, torch.clone, contextlib.nullcontext, no_phase, self.shape.n, self.shape.device != "cpu")

    def clear(self) -> None:
        """No `.grad` anywhere."""
        self.cut.grad = self.unembedding.grad = None

    @torch.no_grad()
    def bare_products(self) -> Callable[[], None]:
        """The three products of every head on full matrices, into buffers that exist; call it to run them."""
        rows, unembedding = self.cut[0], self.unembedding
        logits = rows.new_empty(self.shape.N, self.shape.V)  # (N, V)
        d_rows, d_unembedding = torch.empty_like(rows), torch.empty_like(unembedding)
        return partial(_products, self.shape.n, rows, unembedding, logits, d_rows, d_unembedding)

    def peak_over_inputs(self, strategy: Strategy) -> int:
        """The most bytes live above the inputs: tracked on a CPU, the allocator's on CUDA.

        Inputs are the cut, the unembedding, the targets and the normed rows of one head, which a model keeps anyway.
        """
        normed = self.shape.N * self.shape.D * self.shape.dtype.itemsize
        self.run(strategy)  # lazy buffers
        self.clear()
        gc.collect()
        if self.shape.device != "cpu":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.run(strategy)
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before - normed
        tracker = Tracker(self.shape.V, self.shape.D, [("unembedding", self.unembedding)])
        inputs = (("cut", self.cut), ("targets", self.targets), ("weights", self.weights))
        tracker.resident("other", (*inputs, ("unembedding", self.unembedding)))
        heads = self.heads()
        with tracker:
            strategy.backward(self.cut, heads, self.targets, self.weights)
        trace = tracker.step_alone(0)
        return trace.peak().nbytes - trace.baseline - normed


def seconds(work: Callable[[], Any], device: str) -> float:
    """Wall-clock time of one call, the device's work included."""
    if device != "cpu":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def copy_bandwidth(device: str, rounds: int = 5) -> float:
    """Bytes read and written per second by a large copy: the median of a few."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = sorted(seconds(lambda: target.copy_(source), device) for _ in range(rounds))
    return 2 * COPY_BYTES / times[rounds // 2]


def _same(hidden: Tensor) -> Tensor:
    return hidden


@torch.no_grad()
def _products(n: int, rows: Tensor, unembedding: Tensor, logits: Tensor, d_rows: Tensor, d_unembedding: Tensor) -> None:
    for _ in range(n):
        torch.mm(rows, unembedding.T, out=logits)
        torch.mm(logits, unembedding, out=d_rows)
        torch.mm(logits.T, rows, out=d_unembedding)
