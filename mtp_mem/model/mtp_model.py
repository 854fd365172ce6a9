"""This package's own multi-token-prediction model: a decoder trunk, n heads on top of it, one norm, unembeddings.

Gloeckle et al. 2024, section 2: P(x_{t+i} | x_{<=t}) = softmax(unembedding(norm(head_i(trunk(x))))), each head one
transformer layer. The other kinds of heads: mtp_mem/model/heads.py.
"""

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtp_mem.config.schema import Dtype, ModelConfig
from mtp_mem.model.head_tree import Heads, Phase, keep_inputs, kept_inputs, no_phase, tree
from mtp_mem.model.heads import make_head, on_parent, written_out
from mtp_mem.model.layers import PARAMETER_DTYPES, Attention, Layer, RMSNorm, Rotation, default_dtype, rotation
from mtp_mem.model.losses import LossOptions
from mtp_mem.model.own import each_once


def default_attention(dtype: Dtype, device: torch.device) -> Attention:
    """On CUDA the operator of `cuda_attention`, so that a prediction can rely on it; elsewhere torch's choice."""
    return cuda_attention(dtype) if device.type == "cuda" else "sdpa"


def cuda_attention(dtype: Dtype) -> Attention:
    """The attention on CUDA: memory-efficient in fp32, flash in low precision, torch's choice in fp64."""
    return "sdpa" if dtype == "fp64" else "efficient" if dtype == "fp32" else "flash"


class MTPModel(nn.Module):
    """tokens (B, S) -> logits (n, B, S, V).

    Args:
        config: the model's shape.
        dtype: of parameters and matmuls; "bf16-mixed" keeps fp32 parameters and runs forward passes under autocast.
        device: where the parameters are made.
        attention: see `Attention`; by default `default_attention`.
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
        self.config, self.mixed = config, dtype == "bf16-mixed"
        self.n_future, self.vocab_size, self.dim = config.n_future, config.vocab_size, config.dim
        self.checkpoint_every = 0
        self.attention = attention or default_attention(dtype, torch.device(device))
        with default_dtype(PARAMETER_DTYPES[dtype]), torch.device(device):
            self.embedding = nn.Embedding(config.vocab_size, config.dim)
            self.trunk_layers = nn.ModuleList(Layer(config, self.attention) for _ in range(config.trunk_layers))
            self.head_layers = nn.ModuleList(make_head(i, config, self.attention) for i in range(config.n_future))
            self.norm = RMSNorm(config)
            replicated = config.unembedding == "replicated"
            count = config.n_future if replicated else 1
            tables = [nn.Linear(config.dim, config.vocab_size, bias=False) for _ in range(count)]  # each (V, D)
            self.unembedding: nn.Linear | nn.ModuleList = nn.ModuleList(tables) if replicated else tables[0]
        if config.unembedding == "tied":
            self.unembedding.weight = self.embedding.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def checkpoint_trunk(self, every: int) -> None:
        """Recompute every `every`-th layer of the trunk in the backward, from the first one on; 0: none."""
        self.checkpoint_every = every

    def moved(self, dtype: Dtype, device: torch.device) -> "MTPModel":
        """A copy in another dtype on another device, with the attention that runs there; tied weights stay tied."""
        copied = copy.deepcopy(self).to(device, PARAMETER_DTYPES[dtype])
        copied.mixed, copied.attention = dtype == "bf16-mixed", default_attention(dtype, device)
        for module in copied.modules():
            if isinstance(module, Layer):
                module.attention_kind = copied.attention
        return copied

    def trunk(self, tokens: Tensor) -> Tensor:
        """Tokens (B, S) -> hidden states (B, S, D), before any head and before the final norm."""
        with self.autocast():
            turn = self.rotation(tokens)
            x: Tensor = self.embedding(tokens)
            for i, layer in enumerate(self.trunk_layers):
                if self.checkpoint_every and i % self.checkpoint_every == 0 and torch.is_grad_enabled():
                    x = checkpoint(layer, x, turn, use_reentrant=False, preserve_rng_state=False)  # no dropout
                else:
                    x = layer(x, turn)
            return keep_inputs(x, tokens)

    def heads(self, z: Tensor, phase: Phase = no_phase) -> Heads:
        """The heads of one step as a tree, for a strategy.

        Args:
            z: what `trunk` returned in this step; or the step's tokens (B, S).
            phase: called with the name of each phase as it begins.
        """
        tokens = kept_inputs(z) if z.is_floating_point() else z
        given = self._given(tokens)
        layers = [on_parent(head, i, tokens, self.embedding, *given) for i, head in enumerate(self.head_layers)]
        weights = [unembedding.weight for unembedding in self.unembeddings()]
        roots = tuple(tree(self.config.head, layers, weights))
        # "flash" and "efficient" run on CUDA alone: a model without data that has one of them is predicted for CUDA.
        on_cuda = self.attention != "sdpa" or tokens.is_cuda
        options = LossOptions(softcap=self.config.logit_softcap)
        return Heads(roots, self.norm, self.autocast, phase, self.config.n_future, on_cuda, options=options)

    def unembeddings(self) -> list[nn.Linear]:
        """Each head's unembedding (V, D), in the order of the heads; the same one n times unless replicated."""
        if isinstance(self.unembedding, nn.Linear):
            return [self.unembedding] * self.config.n_future
        return [module for module in self.unembedding if isinstance(module, nn.Linear)]

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (n, B, S, V) of all heads, written out kind by kind: it shares no tree and no order with `heads`."""
        z, given = self.trunk(tokens), self._given(tokens)
        with self.autocast():
            hidden = written_out(self.config.head, list(self.head_layers), z, tokens, self.embedding, *given)
            capped = LossOptions(softcap=self.config.logit_softcap).capped
            return torch.stack([capped(u(self.norm(h))) for h, u in zip(hidden, self.unembeddings(), strict=True)])

    def _given(self, tokens: Tensor) -> tuple[Rotation, ...]:
        """What a head's layer is given beside hidden states; a head that is no layer is given nothing."""
        turn = self.rotation(tokens)
        return (turn,) if self.config.heads_are_layers else ()

    def rotation(self, tokens: Tensor) -> Rotation:
        """Rotary tables for the positions of `tokens` (B, S), in the dtype of queries and keys."""
        config = self.config
        # Read from a parameter each time: `.to(torch.bfloat16)`, `.double()` and the like change the dtype.
        dtype = torch.bfloat16 if self.mixed else self.embedding.weight.dtype
        return rotation(tokens.shape[1], config.head_channels, config.rope_theta, dtype, tokens.device)

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which forward passes run: bf16 autocast for "bf16-mixed", else nothing."""
        if self.mixed:
            return torch.autocast(self.embedding.weight.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the part of the model that owns them; a tied weight belongs to the embedding."""
        parts: dict[str, nn.Module] = {"embedding": self.embedding, "trunk": self.trunk_layers}
        parts |= {f"head {i + 1}": layer for i, layer in enumerate(self.head_layers)}
        parts |= {"norm": self.norm}
        if isinstance(self.unembedding, nn.ModuleList):
            parts |= {f"unembedding {i + 1}": module for i, module in enumerate(self.unembedding)}
        else:
            parts |= {"unembedding": self.unembedding}
        return each_once({name: module.parameters() for name, module in parts.items()})
