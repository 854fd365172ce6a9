"""The one multi-token-prediction model: a decoder trunk, n head layers on top of it, one norm, one unembedding.

Llama-style layers: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU, no biases. Gloeckle et al. 2024,
section 2: P(x_{t+i} | x_{<=t}) = softmax(unembedding(norm(head_i(trunk(x))))), each head one transformer layer.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from mtp_mem.config import Dtype, ModelConfig
from mtp_mem.heads import Head, Heads, Phase, no_phase

PARAMETER_DTYPES: dict[Dtype, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "bf16-mixed": torch.float32,
}

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary angles, each (S, D/H/2), computed once per step and shared by all layers."""


class Factory(TypedDict):
    """Where and as what parameters are made."""

    device: torch.device
    dtype: torch.dtype


Attention = Literal["sdpa", "flash"]
"""How attention runs: torch's choice for the device, or the flash-attention operator by name."""


class MTPModel(nn.Module):
    """tokens (B, S) -> logits (n, B, S, V).

    Args:
        config: the model's shape.
        dtype: of parameters and matmuls; "bf16-mixed" keeps fp32 parameters and runs forward passes under autocast.
        device: where the parameters are made.
        attention: see `Attention`. By default flash on CUDA in bf16, so that a prediction can count on it, and torch's
            choice elsewhere.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: Dtype = "fp32",
        device: torch.device | str = "cpu",
        attention: Attention | None = None,
    ) -> None:
        super().__init__()
        if attention is None:
            attention = "flash" if torch.device(device).type == "cuda" and dtype.startswith("bf16") else "sdpa"
        self.config, self.dtype = config, dtype
        make: Factory = {"device": torch.device(device), "dtype": PARAMETER_DTYPES[dtype]}
        self.embedding = nn.Embedding(config.vocab_size, config.dim, **make)
        self.trunk_layers = nn.ModuleList(Layer(config, make, attention) for _ in range(config.trunk_layers))
        self.head_layers = nn.ModuleList(Layer(config, make, attention) for _ in range(config.n_future))
        self.norm = RMSNorm(config, make)
        self.unembedding = nn.Linear(config.dim, config.vocab_size, bias=False, **make)
        if config.unembedding == "tied":
            self.unembedding.weight = self.embedding.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def trunk(self, tokens: Tensor) -> Tensor:
        """Tokens (B, S) -> hidden states (B, S, D), before any head and before the final norm."""
        with self.autocast():
            turn = self.rotation(tokens)
            x: Tensor = self.embedding(tokens)
            for layer in self.trunk_layers:
                x = layer(x, turn)
            return x

    def heads(self, tokens: Tensor, phase: Phase = no_phase) -> Heads:
        """The heads of one step over `tokens` (B, S) as a tree, for a strategy."""
        turn = self.rotation(tokens)
        layers = [partial(layer, turn=turn) for layer in self.head_layers]
        roots = tuple(Head(i, layer, self.unembedding.weight) for i, layer in enumerate(layers))
        return Heads(roots, self.norm, self.autocast, phase, self.config.n_future)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (n, B, S, V) of all heads."""
        z, turn = self.trunk(tokens), self.rotation(tokens)
        with self.autocast():
            return torch.stack([self.unembedding(self.norm(layer(z, turn))) for layer in self.head_layers])

    def rotation(self, tokens: Tensor) -> Rotation:
        """Rotary tables for the positions of `tokens` (B, S), in the dtype of queries and keys."""
        config = self.config
        dtype = torch.bfloat16 if self.dtype == "bf16-mixed" else PARAMETER_DTYPES[self.dtype]
        return rotation(
            tokens.shape[1], config.dim // config.n_attention_heads, config.rope_theta, dtype, tokens.device
        )

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which forward passes run: bf16 autocast for "bf16-mixed", else nothing."""
        if self.dtype == "bf16-mixed":
            return torch.autocast(self.embedding.weight.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the part of the model that owns them; a tied weight belongs to the embedding."""
        parts: dict[str, nn.Module] = {"embedding": self.embedding, "trunk": self.trunk_layers}
        parts |= {f"head {i + 1}": layer for i, layer in enumerate(self.head_layers)}
        parts |= {"norm": self.norm, "unembedding": self.unembedding}
        seen: set[nn.Parameter] = set()

        def new(module: nn.Module) -> Iterator[nn.Parameter]:
            for parameter in module.parameters():
                if parameter not in seen:
                    seen.add(parameter)
                    yield parameter

        return {name: own for name, module in parts.items() if (own := list(new(module)))}


class Layer(nn.Module):
    """One pre-norm transformer layer, (B, S, D) -> (B, S, D)."""

    def __init__(self, config: ModelConfig, make: Factory, attention: Attention) -> None:
        super().__init__()
        self.attention_kind = attention
        D, kv_dim = config.dim, config.dim // config.n_attention_heads * config.kv_heads
        self.config = config
        self.attention_norm, self.ffn_norm = RMSNorm(config, make), RMSNorm(config, make)
        self.q = nn.Linear(D, D, bias=False, **make)
        self.k = nn.Linear(D, kv_dim, bias=False, **make)
        self.v = nn.Linear(D, kv_dim, bias=False, **make)
        self.o = nn.Linear(D, D, bias=False, **make)
        self.gate = nn.Linear(D, config.hidden_dim, bias=False, **make)
        self.up = nn.Linear(D, config.hidden_dim, bias=False, **make)
        self.down = nn.Linear(config.hidden_dim, D, bias=False, **make)

    def forward(self, x: Tensor, turn: Rotation) -> Tensor:
        """Attention and feed-forward, each on a residual branch."""
        x = x + self.attention(self.attention_norm(x), turn)
        h = self.ffn_norm(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return x

    def attention(self, x: Tensor, turn: Rotation) -> Tensor:
        """Causal self-attention with grouped queries and rotary position embeddings."""
        B, S, D = x.shape
        heads, kv_heads = self.config.n_attention_heads, self.config.kv_heads
        # Turned before they are transposed: attention's output takes the layout of q, and then needs no copy below.
        q = rotate(self.q(x).view(B, S, heads, -1), *turn).transpose(1, 2)  # (B, H, S, D/H)
        k = rotate(self.k(x).view(B, S, kv_heads, -1), *turn).transpose(1, 2)
        v = self.v(x).view(B, S, kv_heads, -1).transpose(1, 2)
        if self.attention_kind == "flash":
            y = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
        return self.o(y.transpose(1, 2).reshape(B, S, D))  # type: ignore[no-any-return]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in fp32 (fp64 for fp64 input), output in x's dtype."""

    def __init__(self, config: ModelConfig, make: Factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.dim, **make))
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return,no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """Saves x and one number per row, on every device alike.

    `F.rms_norm` is one kernel on CUDA and a chain of operators on CPU that saves several times as much: bytes tracked
    on a CPU would say little about a GPU.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        scale = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        normed = x.to(scale.dtype) * scale  # (..., D)
        d_weight = (grad * normed).flatten(0, -2).sum(dim=0).to(weight.dtype)  # (D,)
        d_normed = grad.to(scale.dtype) * weight  # (..., D)
        along = (d_normed * normed).mean(dim=-1, keepdim=True)  # (..., 1)
        return ((d_normed - normed * along) * scale).to(x.dtype), d_weight, None


def rotation(S: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Rotation:
    """Cosines and sines of the rotary angles, each (S, head_dim / 2) (Su et al. 2021, section 3.4.2)."""
    frequencies = theta ** (torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / -head_dim)
    angles = torch.outer(torch.arange(S, device=device, dtype=torch.float32), frequencies)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (j, j + half) of x (B, S, H, D/H) by their angle; cos and sin are (S, D/H/2)."""
    cos, sin = cos[:, None], sin[:, None]
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
