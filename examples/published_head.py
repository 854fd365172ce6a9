"""Published benchmarks of a head and its loss, as models and losses for `mtp-mem predict --part heads`.

They have an unembedding and a loss, and no trunk, no norm and no optimizer. Liger-Kernel keeps gradients from step to
step and computes the loss in the logits' own dtype, where every strategy of mtp_mem takes fp32; cut-cross-entropy caps
the logits in their own dtype. docs/evidence.md has the command lines, the published figures and their sources.
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
    """For `--model`: `head_4096x128256` is an unembedding alone, `logits_32768` cross entropy of so many logits."""
    match = re.fullmatch(r"head_(\d+)x(\d+)|logits_(\d+)", name)
    if match is None:
        raise AttributeError(name)
    dim, rows, logits = (int(digits or 0) for digits in match.groups())
    return lambda _n: Benchmark(dim or logits, rows, unused=0)


def cross_entropy(hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets, 0-dim fp32; no product where there is no unembedding."""
    logits = partial(F.linear, weight=unembedding) if len(unembedding) else nn.Identity()
    return F.cross_entropy(logits(hidden).flatten(0, -2), targets.flatten()).float()


def capped_cross_entropy(hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets, 0-dim fp32."""
    capped = 30 * torch.tanh(F.linear(hidden, unembedding) / 30)
    return F.cross_entropy(capped.flatten(0, -2).float(), targets.flatten())


class InItsOwnDtype(Sequential):
    """Sequential, with the cross entropy in the dtype of the logits."""

    loss_fn = staticmethod(cross_entropy)

    def loss_backward(self, heads: Heads, head: Head, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """See `Sequential`."""
        loss = heads.loss(head, hidden, targets, self.loss_fn)
        heads.backward([loss], [weight])
        return loss.detach()


class CappedInItsOwnDtype(InItsOwnDtype):
    """Sequential, with logits capped as in Gemma 2 in their own dtype, and the cross entropy in fp32."""

    loss_fn = staticmethod(capped_cross_entropy)
