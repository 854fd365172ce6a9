"""The kinds of heads: what each computes, and on whose hidden states it hangs.

z is the trunk's output, h[i] the hidden states of the head with index i (0-based, i < n), all (B, S, D). Whatever the
kind, logits of head i are unembedding_i(norm(h[i])) with the model's one final norm, and h[i] at position t predicts
token t + i + 1: every kind trains on the same targets, so kinds can be compared.

| kind | h[i] | hangs on |
|---|---|---|
| parallel | Layer_i(z) | trunk |
| causal | Layer_i(h[i-1]), h[-1] = z | head i - 1 |
| anticausal | Layer_i(h[i+1]), h[n] = z | head i + 1 |
| linear | W_i z, W_i (D, D), no bias | trunk |
| medusa | `medusa_blocks` times h + SiLU(W h + b), from z | trunk |
| deepseek | Layer_0(z); then Layer_i(M_i [RMSNorm(h[i-1]); RMSNorm(Emb(token t + i))]), M_i (D, 2D) | head i - 1 |

Sources: parallel, section 2, and causal, anticausal, linear, appendix B of Gloeckle et al. 2024 (arXiv 2404.19737);
deepseek, section 2.2 of DeepSeek-AI 2024 (arXiv 2412.19437); medusa, Cai et al. 2024 (arXiv 2401.10774). Medusa itself
keeps the model's own head for token t + 1, trains its heads from t + 2 on, and starts W at zero; not so here.

deepseek: head index 0 is the main model's own: the last of its transformer layers, as in every kind at n = 1, so that
the cut lies below it. Index k >= 1 is MTP depth k. Each depth has its own two norms, projection and layer; embedding,
unembedding and final norm are the main model's. Positions without a token t + k (the last k) get the id `NO_TOKEN`.
Nothing valid depends on it: head k has a target at t only if token t + k + 1 exists, attention looks back only, and
every earlier position has its token t + k too. DeepSeek's loss is sum_k lambda / D L_k over the depths plus the main
model's: weights (1, lambda / D, ...).
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_mem.config.schema import HeadKind, ModelConfig
from mtp_mem.model.layers import Attention, Layer, RMSNorm

NO_TOKEN = 0
"""Id that a DeepSeek depth reads where the sequence has no token t + k; any valid id would do."""


class DeepSeekDepth(nn.Module):
    """MTP depth k >= 1: Layer_k(M_k [RMSNorm(h[k-1]); RMSNorm(Emb(token t + k))]), with a layer of any class."""

    def __init__(self, hidden_norm: nn.Module, token_norm: nn.Module, projection: nn.Linear, layer: nn.Module) -> None:
        super().__init__()
        self.hidden_norm, self.token_norm = hidden_norm, token_norm
        self.projection, self.layer = projection, layer

    def forward(self, x: Tensor, embedded: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's output for hidden states and embedded tokens, both (B, S, D); the rest is passed to the layer."""
        both = torch.cat([self.hidden_norm(x), self.token_norm(embedded)], dim=-1)  # (B, S, 2D)
        return self.layer(self.projection(both), *args, **kwargs)


class MedusaHead(nn.Module):
    """Residual blocks h + SiLU(W h + b), (B, S, D) -> (B, S, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in range(config.medusa_blocks))

    def forward(self, x: Tensor) -> Tensor:
        """All blocks, one after the other."""
        for block in self.blocks:
            x = x + F.silu(block(x))
        return x


def make_head(index: int, config: ModelConfig, attention: Attention) -> nn.Module:
    """The module of the head with this index."""
    match config.head:
        case "linear":
            return nn.Linear(config.dim, config.dim, bias=False)
        case "medusa":
            return MedusaHead(config)
        case "deepseek" if index > 0:
            norms = RMSNorm(config), RMSNorm(config)
            projection = nn.Linear(2 * config.dim, config.dim, bias=False)
            return DeepSeekDepth(*norms, projection, Layer(config, attention))
        case _:
            return Layer(config, attention)


def on_parent(
    module: nn.Module, index: int, tokens: Tensor, embed: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any
) -> Callable[[Tensor], Tensor]:
    """A head's module as a function of its parent's hidden states alone, for one step over `tokens` (B, S).

    Tokens are embedded when the head runs, not before: the embedding's gradient then flows back with the head's other
    gradients, in the order of the heads (see mtp_mem/model/head_tree.py).
    `embed` makes (B, S, D) of tokens; `args` and `kwargs` are what else the module is given.
    """
    if isinstance(module, DeepSeekDepth):
        return lambda parent: _tensor(module(parent, embed(tokens_ahead(tokens, index)), *args, **kwargs))
    return lambda parent: _tensor(module(parent, *args, **kwargs))


def written_out(
    kind: HeadKind,
    modules: Sequence[nn.Module],
    z: Tensor,
    tokens: Tensor,
    embed: Callable[[Tensor], Tensor],
    *args: Any,
    **kwargs: Any,
) -> list[Tensor]:
    """All heads' hidden states (B, S, D) from z, kind by kind: it shares no tree and no order with the heads of a step.

    The other arguments are as in `on_parent`.
    """

    def run(x: Tensor, module: nn.Module, *embedded: Tensor) -> Tensor:
        return _tensor(module(x, *embedded, *args, **kwargs))

    match kind:
        case "causal":
            return list(accumulate(modules, run, initial=z))[1:]
        case "anticausal":
            return list(accumulate(reversed(modules), run, initial=z))[:0:-1]
        case "deepseek":
            S = tokens.shape[1]
            embedded = embed(F.pad(tokens, (0, len(modules)), value=NO_TOKEN))  # (B, S + n, D)
            hidden = [run(z, modules[0])]
            for k in range(1, len(modules)):
                hidden.append(run(hidden[-1], modules[k], embedded[:, k : k + S]))
            return hidden
        case _:
            return [run(z, module) for module in modules]


def tokens_ahead(tokens: Tensor, k: int) -> Tensor:
    """Token t + k at every position t of `tokens` (B, S); `NO_TOKEN` where there is none."""
    k = min(k, tokens.shape[1])
    return F.pad(tokens[:, k:], (0, k), value=NO_TOKEN)  # (B, S)


def _tensor(out: Any) -> Tensor:
    """A layer's hidden states; some families return them in a tuple."""
    tensor: Tensor = out[0] if isinstance(out, tuple) else out
    return tensor
