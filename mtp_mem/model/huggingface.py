"""Any Hugging Face `...ForCausalLM` as a trunk with n heads, without code for single families.

Kinds whose heads are layers (parallel, causal, anticausal, deepseek) move the decoder's last layer above the cut, as
head 1, and the final norm with it; further heads are layers of its class. A tap stands in that layer's place: it hands
hidden states on, and keeps whatever else this family gives its layers (masks, rotary tables, positions), so that the
heads get the same. Linear and medusa heads read the normed output of the whole decoder, as Medusa does (Cai et al.
2024, section 2.1.1): head 1 is the model's own, the others D x D maps or residual blocks h + SiLU(W h + b).
"""

import copy
import dataclasses
import typing
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_mem.config.schema import Dtype, HeadKind
from mtp_mem.errors import BadInput
from mtp_mem.model.head_tree import Heads, Phase, keep_inputs, kept_inputs, no_phase
from mtp_mem.model.heads import DeepSeekDepth, on_parent, written_out
from mtp_mem.model.layers import PARAMETER_DTYPES, default_dtype
from mtp_mem.model.losses import LossOptions
from mtp_mem.model.own import ambient_autocast, draws_random_numbers, each_once, heads

KINDS: tuple[HeadKind, ...] = typing.get_args(HeadKind)
SCALES = {"logits_scaling": -1, "logit_scale": 1, "lm_head_multiplier": 1}
"""Attributes of a config by which its family multiplies (1) or divides (-1) logits; here hidden states are scaled."""
CHANGES_LOGITS = ("logits_soft_cap", "output_multiplier", "unpadded_vocab_size")
"""Attributes of a config that change logits in a way that no strategy computes."""


def from_hf(lm: nn.Module, n: int | None = None, kind: HeadKind | None = None) -> "HuggingFaceMTP":
    """A Hugging Face model as trunk and n heads. The model is changed in place: its last layer becomes head 1.

    Args:
        lm: any transformers `...ForCausalLM`, its weights loaded or not, checkpointed or not.
        n: number of heads; by default one more than the config's `num_nextn_predict_layers`.
        kind: of the heads, see mtp_mem/model/heads.py; by default deepseek where the config has
            `num_nextn_predict_layers`, else parallel.

    Raises:
        BadInput: no decoder with a stack of layers and a final norm, logits that are changed after the unembedding, an
            unknown kind, no n, or an n below 1.
    """
    depths = getattr(_config(lm), "num_nextn_predict_layers", None) or 0
    if n is None and not depths:
        raise BadInput("from_hf: n, the number of heads, is not given, and the config has no num_nextn_predict_layers")
    kind = kind or ("deepseek" if depths else "parallel")
    if kind not in KINDS:
        raise BadInput(f"from_hf: kind = {kind!r}: valid: {', '.join(KINDS)}")
    n = depths + 1 if n is None else n
    if n < 1:
        raise BadInput(f"from_hf: n = {n}: must be at least 1")
    return HuggingFaceMTP(lm, n, kind)


class Tap(nn.Module):
    """Stands in for the decoder's last layer: returns its hidden states, and keeps what else the layer was given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.given: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.passed: Tensor | None = None
        for name in ("attention_type", "layer_type", "is_sliding"):  # by which some decoders choose the mask
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Takes whatever the layer is given; returns the hidden states (B, S, D) unchanged."""
        hidden: Tensor = args[0] if args else kwargs.pop("hidden_states")
        self.given, self.passed = (args[1:], kwargs), hidden
        return hidden


class Block(nn.Module):
    """Medusa's residual block, h + SiLU(W h + b), W and b zero at first: the head begins as the model's own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return x + F.silu(self.linear(x))


class HuggingFaceMTP(nn.Module):
    """What `from_hf` makes: `trunk`, `heads`, and logits (n, B, S, V) when called.

    Attributes:
        mixed: whether forward passes run under bf16 autocast.
        for_cuda: whether it runs on CUDA or, without data, stands for a model that does.
    """

    def __init__(self, lm: nn.Module, n: int, kind: HeadKind) -> None:
        super().__init__()
        config = _config(lm)
        self.lm, self.kind = lm, kind
        self.mixed = self.for_cuda = False
        decoder, weight = _decoder(lm), _unembedding(lm)
        self.n_future, (self.vocab_size, self.dim) = n, weight.shape
        self.scale, self.softcap = _scale(lm, config), getattr(config, "final_logit_softcapping", None)
        (name, layers), D = _layers(decoder), self.dim
        with default_dtype(weight.dtype), weight.device:
            if kind not in ("linear", "medusa"):
                self._norm_name = norm = _final_norm(decoder, name, D)
                self.norm: nn.Module = getattr(decoder, norm)
                last = layers[len(layers) - 1]
                new = [_like(last, lm) for _ in range(n - 1)]
                if kind == "deepseek":
                    new = [DeepSeekDepth(nn.RMSNorm(D), nn.RMSNorm(D), nn.Linear(2 * D, D, bias=False), m) for m in new]
                self.head_layers = nn.ModuleList([last, *new])
                self._tap = [Tap(last)]  # in a list, for it is the decoder's module and not this one's
                layers[len(layers) - 1] = self._tap[0]
                setattr(decoder, norm, nn.Identity())
            else:
                self.norm, self._tap = nn.Identity(), list[Tap]()
                new = [Block(D) if kind == "medusa" else nn.Linear(D, D, bias=False) for _ in range(n - 1)]
                self.head_layers = nn.ModuleList([nn.Identity(), *new])
        for layer in self.head_layers:
            for module in layer.modules():
                if hasattr(module, "gradient_checkpointing"):  # above the cut the strategy decides what is run again
                    module.gradient_checkpointing = False  # type: ignore[assignment]

    @property
    def trunk_layers(self) -> list[nn.Module]:
        """The decoder's layers below the cut."""
        return [layer for layer in _layers(_decoder(self.lm))[1] if not isinstance(layer, Tap)]

    def trunk(self, input_ids: Tensor | None = None, **inputs: Any) -> Tensor:
        """The decoder below the cut: hidden states (B, S, D) with their graph.

        Args:
            input_ids: (B, S) int64.
            inputs: other inputs of the model: attention_mask, position_ids, inputs_embeds, ...

        Raises:
            BadInput: the decoder does more after its last layer than its final norm.
        """
        with self.autocast():
            out = _decoder(self.lm)(input_ids=input_ids, **{"use_cache": False} | inputs)
        z: Tensor = out.last_hidden_state
        given: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        for tap in self._tap:
            passed = tap.passed
            viewed = passed is not None and z._is_view() and z._base is passed and z.shape == passed.shape
            if tap.given is None or not (z is passed or viewed):
                raise BadInput(
                    f"{type(self.lm).__name__}: the decoder does more after its last layer than its final norm, so that"
                    " the layer cannot become a head; kind = 'medusa' or 'linear' reads the decoder's output instead"
                )
            given, tap.given, tap.passed = tap.given, None, None
        return keep_inputs(z, (input_ids, *given))

    def heads(self, z: Tensor, phase: Phase = no_phase) -> Heads:
        """Everything above the cut for the step in which `trunk` returned `z`."""
        tokens, args, kwargs = kept_inputs(z)
        if tokens is None and self.kind == "deepseek" and self.n_future > 1:
            raise BadInput("deepseek heads look tokens up: call trunk with input_ids, not with inputs_embeds alone")
        layers = [on_parent(m, i, tokens, self._embed, *args, **kwargs) for i, m in enumerate(self.head_layers)]
        above = heads(
            layers=layers,
            norm=self.norm if self.scale == 1 else self._scaled_norm,
            unembedding=_unembedding(self.lm),
            kind=self.kind,
            phase=phase,
            autocast=self.autocast if self.mixed else None,
            softcap=self.softcap,
            draws=self.training and draws_random_numbers([self.head_layers]),
        )
        return dataclasses.replace(above, cuda=above.cuda or self.for_cuda)

    def _scaled_norm(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden) * self.scale  # type: ignore[no-any-return]

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.lm.get_input_embeddings()(tokens)  # type: ignore[operator,no-any-return]

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Logits (n, B, S, V), written out kind by kind: it shares no tree and no order with `heads`."""
        z = self.trunk(input_ids, **inputs)
        tokens, args, kwargs = kept_inputs(z)
        unembedding = self.lm.get_output_embeddings()  # type: ignore[operator]
        with self.autocast():
            hidden = written_out(self.kind, list(self.head_layers), z, tokens, self._embed, *args, **kwargs)
            capped = LossOptions(softcap=self.softcap).capped
            return torch.stack([capped(unembedding(self._scaled_norm(h))) for h in hidden])

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which forward passes run: bf16 autocast if `mixed`, else the caller's autocast."""
        device = _unembedding(self.lm).device.type
        return torch.autocast(device, dtype=torch.bfloat16) if self.mixed else ambient_autocast(device)()

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the part of the model that owns them; a tied weight belongs to the embedding."""
        lm: Any = self.lm
        parts: dict[str, list[nn.Parameter]] = {"embedding": list(lm.get_input_embeddings().parameters()), "trunk": []}
        parts |= {f"head {i + 1}": list(layer.parameters()) for i, layer in enumerate(self.head_layers)}
        parts |= {"norm": list(self.norm.parameters()), "unembedding": list(lm.get_output_embeddings().parameters())}
        elsewhere = {parameter for own in parts.values() for parameter in own}
        parts["trunk"] = [parameter for parameter in lm.parameters() if parameter not in elsewhere]
        return each_once(parts)

    def checkpoint_trunk(self, every: int) -> None:
        """Recompute every `every`-th layer of the trunk in the backward, from the first one on.

        Raises:
            BadInput: this family cannot recompute its layers one by one.
        """
        lm: Any = self.lm
        enable = getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)
        try:
            enable({"use_reentrant": False, "preserve_rng_state": draws_random_numbers([lm])})
        except ValueError as e:
            raise BadInput(f"training.trunk_checkpointing: {e}") from None
        for i, layer in enumerate(self.trunk_layers):
            if not hasattr(layer, "gradient_checkpointing"):
                raise BadInput(f"training.trunk_checkpointing: {type(layer).__name__} has no checkpointing")
            layer.gradient_checkpointing = i % every == 0  # type: ignore[assignment]

    def to_hf(self) -> nn.Module:
        """The Hugging Face model whole again, head 1 as its last layer: to save it, or to generate with it.

        The further heads stay here, in `head_layers[1:]`; this model cannot be trained from then on.
        """
        decoder = _decoder(self.lm)
        for _ in self._tap:
            layers = _layers(decoder)[1]
            layers[len(layers) - 1] = self.head_layers[0]
            setattr(decoder, self._norm_name, self.norm)
        return self.lm

    def moved(self, dtype: Dtype, device: torch.device) -> "HuggingFaceMTP":
        """A copy in another dtype on another device; tied weights stay tied."""
        copied = copy.deepcopy(self).to(device, PARAMETER_DTYPES[dtype])
        copied.mixed = dtype == "bf16-mixed"
        return copied


def _config(lm: nn.Module) -> Any:
    config = getattr(lm, "config", None)
    if config is None or not hasattr(lm, "get_output_embeddings"):
        raise BadInput(f"from_hf: {type(lm).__name__} is no transformers model: expected a ...ForCausalLM")
    return config


def _decoder(lm: Any) -> Any:
    decoder = lm.get_decoder()
    if decoder is None or decoder is lm:
        raise BadInput(f"{type(lm).__name__} has no decoder to cut: expected a ...ForCausalLM")
    return decoder


def _unembedding(lm: Any) -> Tensor:
    module = lm.get_output_embeddings()
    if module is None:
        raise BadInput(f"{type(lm).__name__} has no unembedding (get_output_embeddings): expected a ...ForCausalLM")
    if getattr(module, "bias", None) is not None:
        raise BadInput(f"{type(lm).__name__} adds a bias to its logits, which no strategy supports")
    weight: Tensor = module.weight
    return weight


def _layers(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder's layers: its longest `ModuleList`."""
    lists = {name: child for name, child in decoder.named_children() if isinstance(child, nn.ModuleList) and len(child)}
    if not lists:
        raise BadInput(f"{type(decoder).__name__} has no list of layers to cut")
    name = max(lists, key=lambda name: len(lists[name]))
    return name, lists[name]


def _final_norm(decoder: nn.Module, layers: str, dim: int) -> str:
    """Name of the final norm: of the decoder's children after `layers`, the last whose parameters are all (D,)."""
    children = dict(decoder.named_children())
    after = list(children)[list(children).index(layers) + 1 :]
    norms = [name for name in after if {tuple(p.shape) for p in children[name].parameters()} == {(dim,)}]
    if norms:
        return norms[-1]
    raise BadInput(f"{type(decoder).__name__} has no final norm after {layers!r}; it has {', '.join(children)}")


def _scale(lm: nn.Module, config: Any) -> float:
    for name in CHANGES_LOGITS:
        if value := getattr(config, name, None):
            raise BadInput(f"{type(lm).__name__} changes its logits (config.{name} = {value}), and no strategy does")
    scale = 1.0
    for name, power in SCALES.items():
        if (value := getattr(config, name, None)) is not None:
            scale *= float(value) ** power
    return scale


def _like(layer: nn.Module, lm: Any) -> nn.Module:
    """Another layer of the same class with weights of its own, as the family initialises them."""
    # Tensors without data refer to their fake mode: `modes` says that it is copied already, so it stays the same one.
    modes = {id(mode): mode for p in layer.parameters() if (mode := getattr(p, "fake_mode", None)) is not None}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch warns of access to their data
        new = copy.deepcopy(layer, modes)
    for parameter in new.parameters():
        if hasattr(parameter, "_is_hf_initialized"):
            del parameter._is_hf_initialized
    new.apply(lm._init_weights)
    return new
