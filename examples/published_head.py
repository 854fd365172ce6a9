"""Two published benchmarks as models and losses for `mtp-mem predict --part heads`: peaks that an A100 showed.

Liger-Kernel measures a plain unembedding with cross entropy, and cross entropy alone, on an A100 with 80 GB
(benchmark/data/all_benchmark_data.csv of linkedin/Liger-Kernel, provider "huggingface"). There is no trunk, no norm and
no optimizer, gradients stay from step to step, and the loss is computed in the logits' own dtype, where every strategy
of mtp_mem takes fp32. docs/evidence.md has the command lines and what they give.
"""

import re
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtp_mem
from mtp_mem.model.head_tree import Head, Heads, Phase
from mtp_mem.strategies.sequential import Sequential

D, V = 4096, 128256


class Benchmark(nn.Module):
    """One head on hidden states that come from elsewhere.

    Args:
        dim: D.
        rows: V of the unembedding; 0: hidden states are the logits, and there is no unembedding.
        unused: how many more unembeddings lie beside it: the benchmark keeps one of another provider.
    """

    n_future = 1

    def __init__(self, dim: int, rows: int, unused: int) -> None:
        super().__init__()
        self.dim, self.vocab_size = dim, rows or dim
        self.unembedding = nn.Parameter(torch.empty(rows, dim))
        self.unused = nn.ParameterList(nn.Parameter(torch.empty(rows, dim), requires_grad=False) for _ in range(unused))

    def trunk(self, tokens: Tensor) -> Tensor:
        """(B, S) -> (B, S, D)."""
        return torch.empty(*tokens.shape, self.dim, dtype=self.unembedding.dtype, device=tokens.device)

    def heads(self, _z: Tensor, phase: Phase = mtp_mem.no_phase) -> Heads:
        """The unembedding alone."""
        return mtp_mem.heads(layers=[nn.Identity()], norm=nn.Identity(), unembedding=self.unembedding, phase=phase)


def linear_head(_n: int) -> Benchmark:
    """For `--model`; one head, whatever n is."""
    return Benchmark(D, V, unused=1)


def __getattr__(name: str) -> Callable[[int], Benchmark]:
    """`logits_32768`: cross entropy alone of 32768 logits, for `--model`."""
    match = re.fullmatch(r"logits_([1-9]\d*)", name)
    if match is None:
        raise AttributeError(name)
    return lambda _n: Benchmark(int(match[1]), 0, unused=0)


class InItsOwnDtype(Sequential):
    """Sequential, with the cross entropy in the dtype of the logits."""

    def loss_backward(self, heads: Heads, head: Head, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """See `Sequential`."""
        loss = heads.loss(head, hidden, targets, cross_entropy)
        heads.backward([loss], [weight])
        return loss.detach()


def cross_entropy(hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets, 0-dim fp32; no product where there is no unembedding."""
    logits = partial(F.linear, weight=unembedding) if len(unembedding) else nn.Identity()
    return F.cross_entropy(logits(hidden).flatten(0, -2), targets.flatten()).float()
