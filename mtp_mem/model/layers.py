"""The building blocks of every model here: the transformer layer, its norm and its rotary positions.

Llama-style: RMSNorm before each branch, rotary embeddings, grouped-query attention, SwiGLU; no biases but those of
queries, keys and values where asked for, and likewise norms of queries and keys.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from mtp_mem.config.schema import Dtype, ModelConfig

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary angles, each (S, C/2) for C channels a head; made once per step for all layers."""


PARAMETER_DTYPES: dict[Dtype, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "bf16-mixed": torch.float32,
    "fp16": torch.float16,
}

PRODUCT_DTYPES: dict[Dtype, torch.dtype] = PARAMETER_DTYPES | {"bf16-mixed": torch.bfloat16}
"""Dtype of matrix products, also under autocast: that of the rows and the unembedding in a head's loss."""


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A block that makes modules with this dtype; casting them afterwards fails where parameters have no data."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


Attention = Literal["sdpa", "flash", "efficient"]
"""How attention runs: "sdpa" is torch's choice for the device (without data: for a CPU), the others CUDA's operators.

"flash" takes low precision only, "efficient" fp32 too, but no grouped queries: keys and values are repeated for it.
"""

FLASH_CHANNELS = 256
"""The most channels C that flash attention on CUDA takes (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)."""


class Layer(nn.Module):
    """One pre-norm transformer layer, (B, S, D) -> (B, S, D)."""

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.attention_kind = attention
        D, q_dim = config.dim, config.head_channels * config.n_attention_heads
        kv_dim = config.head_channels * config.kv_heads
        self.config = config
        self.attention_norm, self.ffn_norm = RMSNorm(config), RMSNorm(config)
        self.q = nn.Linear(D, q_dim, bias=config.qkv_bias)
        self.k = nn.Linear(D, kv_dim, bias=config.qkv_bias)
        self.v = nn.Linear(D, kv_dim, bias=config.qkv_bias)
        self.o = nn.Linear(q_dim, D, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config, config.head_channels)
            self.k_norm = RMSNorm(config, config.head_channels)
        self.gate = nn.Linear(D, config.hidden_dim, bias=False)
        self.up = nn.Linear(D, config.hidden_dim, bias=False)
        self.down = nn.Linear(config.hidden_dim, D, bias=False)

    def forward(self, x: Tensor, turn: Rotation) -> Tensor:
        """Attention and feed-forward, each on a residual branch; (B, S, D) -> (B, S, D)."""
        x = x + self.attention(self.attention_norm(x), turn)
        h = self.ffn_norm(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return x

    def attention(self, x: Tensor, turn: Rotation) -> Tensor:
        """Causal self-attention with grouped queries and rotary positions; (B, S, D) -> (B, S, D)."""
        B, S, _ = x.shape
        heads, kv_heads = self.config.n_attention_heads, self.config.kv_heads
        # Rotated before they are transposed: attention's output has the layout of q, and the reshape copies nothing.
        q, k = self.q(x).view(B, S, heads, -1), self.k(x).view(B, S, kv_heads, -1)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *turn).transpose(1, 2), rotate(k, *turn).transpose(1, 2)  # (B, H or G, S, C)
        v = self.v(x).view(B, S, kv_heads, -1).transpose(1, 2)
        y = causal_attention(q, k, v, self.attention_kind)
        return self.o(y.transpose(1, 2).reshape(B, S, -1))  # type: ignore[no-any-return]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, kind: Attention, scale: float | None = None) -> Tensor:
    """Causal attention by one fused operator.

    Args:
        q: queries (B, H, S, C).
        k: keys (B, G, S, C), G dividing H.
        v: values (B, G, S, C).
        kind: which operator; of CUDA's none runs on a CPU, where a model that was made on CUDA may have been moved.
        scale: of the scores; by default 1 / sqrt(C).

    Returns:
        (B, H, S, C).
    """
    aten, repeats = torch.ops.aten, q.shape[1] // k.shape[1]
    if q.is_cpu and type(q) is Tensor:  # a fake tensor on device cpu stands for one on CUDA
        kind = "sdpa"
    if kind == "flash" and q.dtype in (torch.bfloat16, torch.float16):  # flash takes no other
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)[0]  # type: ignore[no-any-return]
    if kind != "sdpa" and q.dtype != torch.float64:
        k, v = (t.repeat_interleave(repeats, dim=1) if repeats > 1 else t for t in (k, v))
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True, scale=scale)[0]  # type: ignore[no-any-return]
    if q.is_meta:  # here torch would choose its unfused math, which no device runs
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)[0]  # type: ignore[no-any-return]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=repeats > 1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in fp32 (fp64 for fp64 input), output in x's dtype."""

    def __init__(self, config: ModelConfig, width: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width or config.dim))
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
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    frequencies = theta ** (torch.arange(0, head_dim, 2, device=device, dtype=wide) / -head_dim)
    angles = torch.outer(torch.arange(S, device=device, dtype=wide), frequencies)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (j, j + C/2) of x (B, S, H, C) by their angle; cos and sin are (S, C/2)."""
    cos, sin = cos[:, None], sin[:, None]
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
