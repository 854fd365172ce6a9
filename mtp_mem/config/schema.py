"""What to run, as validated dataclasses: model, workload, training and sweep.

Symbols used throughout: B sequences of S tokens (N = B*S), D model width, V vocabulary, n future tokens (heads).
"""

import dataclasses
import math
import re
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from mtp_mem.config.toml import short
from mtp_mem.errors import BadInput, unknown

HeadKind = Literal["parallel", "causal", "anticausal", "linear", "deepseek", "medusa"]
Unembedding = Literal["shared", "tied", "replicated"]
Dtype = Literal["fp64", "fp32", "bf16", "bf16-mixed", "fp16"]
ALL_DTYPES: tuple[Dtype, ...] = typing.get_args(Dtype)
Tokenizer = Literal["bytes", "bpe", "uniform"]
OptimizerName = Literal["adamw", "adamw-foreach", "adamw-loop", "adamw-8bit", "sgd"]
MOST_MODULES, LARGEST_SIZE, MOST_ROUNDS = 2_000, 2**31, 10**6
"""The most layers, heads or blocks, the largest size, and the most rounds; more is refused before anything is built."""
Sharding = Literal["none", "ddp", "fsdp2", "hsdp"]
Part = Literal["step", "heads"]
NODE, MOST_RANKS = 8, 2**16
"""GPUs of a node, over which HSDP shards, and the most ranks that are accepted."""
USUAL_DTYPES: tuple[Dtype, ...] = ("fp64", "fp32", "bf16", "bf16-mixed")
"""Dtypes whose range holds any gradient; fp16 ends at 65504, and needs a loss scale to keep small gradients."""
FP16_SCALE = 1024.0  # the default loss scale in fp16
MASTER = "bf16 + fp32 master"
PRECISIONS = (*ALL_DTYPES, MASTER)
"""Values of `--precision`: a workload's dtypes, and bf16 parameters of which the optimizer steps fp32 copies."""
FROZEN_PARTS = ("trunk", "all but heads", "embedding", "trunk layers", "heads", "norm", "unembedding")
"""What a training setup may freeze, besides single parts like "head 2" and "unembedding 2"."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the multi-token-prediction model (Gloeckle et al. 2024, section 2 and appendix M).

    `n_layers` counts trunk and head layers together, as the paper does: a larger `n_future` moves layers from the
    trunk into the heads, so models of different n have the same number of parameters. With `match_layers=False` the
    trunk keeps `n_layers - 1` layers and every further head adds one (the paper's "+3" row, table S4).

    That holds for parallel, causal, anticausal and deepseek heads, which are transformer layers; a deepseek head from
    the second on adds its projection and two norms (2 D^2 + 2 D), and DeepSeek's own count is `match_layers=False`:
    the model keeps all its layers. Linear and medusa heads are no layers: the trunk keeps all `n_layers`, n may be
    larger than `n_layers`, every head adds D^2 or `medusa_blocks` (D^2 + D) parameters, the first one included, and
    `match_layers` changes nothing. Replicated unembeddings add V D for every head after the first.

    What each kind computes: mtp_mem/model/heads.py.
    """

    vocab_size: int
    dim: int
    n_layers: int
    n_attention_heads: int
    n_kv_heads: int | None = None  # None: as many as attention heads
    ffn_dim: int | None = None  # None: 8/3 of dim, rounded up to a multiple of 32
    n_future: int = 1
    head: HeadKind = "parallel"
    medusa_blocks: int = 1  # residual blocks of a medusa head
    unembedding: Unembedding = "shared"  # "tied": the embedding's own weight; "replicated": one for each head
    match_layers: bool = True
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    head_dim: int | None = None  # channels of an attention head; None: dim / n_attention_heads
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every head's queries and keys, before the rotary embedding
    logit_softcap: float | None = None  # c of c tanh(logits / c); None: logits as they are

    def __post_init__(self) -> None:
        self.check_sizes()
        if not 0 < self.rope_theta < math.inf:
            raise BadInput(f"model.rope_theta = {self.rope_theta}: must be positive and finite")
        if not 0 <= self.norm_eps < math.inf:
            raise BadInput(f"model.norm_eps = {self.norm_eps}: must be at least 0 and finite")
        if self.logit_softcap is not None and not 0 < self.logit_softcap < math.inf:
            raise BadInput(f"model.logit_softcap = {self.logit_softcap}: must be positive and finite")
        _one_of("model.head", self.head, HeadKind)
        _one_of("model.unembedding", self.unembedding, Unembedding)
        if self.head_dim is None and (self.dim % self.n_attention_heads or self.dim // self.n_attention_heads % 2):
            raise BadInput(
                f"model.dim = {self.dim} must be an even multiple of n_attention_heads = {self.n_attention_heads}"
                " (rotary embeddings turn pairs of channels), or give model.head_dim"
            )
        if self.head_dim is not None and self.head_dim % 2:
            raise BadInput(f"model.head_dim = {self.head_dim}: must be even (rotary embeddings turn pairs of channels)")
        if self.n_attention_heads % self.kv_heads:
            raise BadInput(
                f"model.n_kv_heads = {self.kv_heads} must divide n_attention_heads = {self.n_attention_heads}"
            )
        if self.largest_n is not None and self.n_future > self.largest_n:
            raise BadInput(
                f"n = {self.n_future} heads need {self.n_future} of the model's layers, but n_layers = {self.n_layers}"
                f" (trunk and heads together); valid: n from 1 to {self.n_layers}, or match_layers = false"
            )

    def check_sizes(self) -> None:
        """Raises BadInput for sizes below one, or that no model has."""
        optional = [name for name in ("n_kv_heads", "ffn_dim", "head_dim") if getattr(self, name) is not None]
        for name in ("vocab_size", "dim", "n_layers", "n_attention_heads", "n_future", "medusa_blocks", *optional):
            value = getattr(self, name)
            if value < 1:
                raise BadInput(f"model.{name} = {value}: must be at least 1")
            most = MOST_MODULES if name in ("n_layers", "n_future", "medusa_blocks") else LARGEST_SIZE
            if value > most:
                raise BadInput(f"model.{name} = {value}: no machine has a model with more than {most}")

    def facts(self) -> dict[str, Any]:
        """The fields as a record keeps them."""
        return dataclasses.asdict(self)

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads (grouped-query attention)."""
        return self.n_kv_heads or self.n_attention_heads

    @property
    def head_channels(self) -> int:
        """Channels of one attention head."""
        return self.head_dim or self.dim // self.n_attention_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the SwiGLU feed-forward layer."""
        return self.ffn_dim or -(-8 * self.dim // 3 // 32) * 32

    @property
    def heads_are_layers(self) -> bool:
        """Whether a head is a transformer layer, so that `n_layers` counts it."""
        return self.head not in ("linear", "medusa")

    @property
    def trunk_layers(self) -> int:
        """Layers of the trunk: all but one per head, or all but one without `match_layers`, if heads are layers."""
        if not self.heads_are_layers:
            return self.n_layers
        return self.n_layers - (self.n_future if self.match_layers else 1)

    @property
    def largest_n(self) -> int | None:
        """The most heads that the layers allow; None where a further head takes no layer from the trunk."""
        return self.n_layers if self.heads_are_layers and self.match_layers else None

    def with_n(self, n: int) -> "ModelConfig":
        """The same model with n heads."""
        return dataclasses.replace(self, n_future=n)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step's input and numerics."""

    batch: int  # B, sequences
    sequence: int  # S, tokens per sequence
    dtype: Dtype = "fp32"
    tokenizer: Tokenizer = "bpe"
    seed: int = 0
    clip_norm: float = 1.0  # largest norm of all gradients together

    def __post_init__(self) -> None:
        for name in ("batch", "sequence"):
            if getattr(self, name) < 1:
                raise BadInput(f"workload.{name} = {getattr(self, name)}: must be at least 1")
        if self.tokens > LARGEST_SIZE:
            raise BadInput(
                f"workload: {short(self.batch)} x {short(self.sequence)} tokens: no machine takes more than"
                f" {LARGEST_SIZE} in a step"
            )
        if not 0 <= self.seed < 2**63:
            raise BadInput(f"workload.seed = {short(self.seed)}: must be from 0 to 2**63 - 1")
        if not 0 < self.clip_norm < math.inf:  # nan is not
            raise BadInput(f"workload.clip_norm = {self.clip_norm}: must be positive and finite")
        _one_of("workload.dtype", self.dtype, Dtype)
        _one_of("workload.tokenizer", self.tokenizer, Tokenizer)

    @property
    def tokens(self) -> int:
        """N = B * S."""
        return self.batch * self.sequence


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the model is trained, beside its dtype: recomputation, accumulation, frozen parts, optimizer and ranks.

    Attributes:
        trunk_checkpointing: "none"; "full": every trunk layer keeps its input alone and is run again in the backward;
            k: every k-th layer does so.
        optimizer: see mtp_mem/model/optimizers.py.
        master_weights: the optimizer steps fp32 copies of the bf16 parameters (precision "bf16 + fp32 master").
        micro_batches: forward and backward passes whose gradients one optimizer step sums; each of batch B.
        frozen: parts without a gradient, a list or a text with commas. "trunk": all below the cut, the embedding too;
            "all but heads": only the heads' own layers are trained.
        set_to_none: whether gradients are freed between steps, or set to zero.
        label_smoothing, z_loss: e and k of every head's loss, see `mtp_mem.model.losses.LossOptions`.
        loss_scale: static; the loss is multiplied by it, and gradients are divided by it before they are clipped. None:
            1, and 1024 in fp16. A step whose gradients overflow is not skipped.
        sharding: over the ranks of a process group: "ddp" replicates all, "fsdp2" shards all, "hsdp" shards over a
            node's 8 ranks and replicates over nodes.
        world: number of ranks; each has a batch of its own.
        part: "step"; "heads": what is above the cut alone, on hidden states that are given, without clipping and
            optimizer. Only predicted.
    """

    trunk_checkpointing: Literal["none", "full"] | int = "none"
    optimizer: OptimizerName = "adamw"
    master_weights: bool = False
    micro_batches: int = 1
    frozen: str | tuple[str, ...] = ()
    set_to_none: bool = True
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    loss_scale: float | None = None
    sharding: Sharding = "none"
    world: int = 1
    part: Part = "step"

    def __post_init__(self) -> None:
        _one_of("training.sharding", self.sharding, Sharding)
        _one_of("training.part", self.part, Part)
        if self.part == "heads" and self.sharding != "none":
            raise BadInput(f"training.part = 'heads' with sharding {self.sharding!r}: expected none")
        if not 1 <= self.world <= MOST_RANKS or (self.sharding == "none" and self.world > 1):
            raise BadInput(
                f"training.world = {self.world} with sharding {self.sharding!r}: expected 1 without sharding, else 1 to"
                f" {MOST_RANKS} ranks"
            )
        if self.sharding == "hsdp" and self.world % NODE:
            raise BadInput(
                f"training.world = {self.world}: hsdp shards over {NODE} ranks; expected a multiple of {NODE}"
            )
        k = self.trunk_checkpointing
        if not (k in ("none", "full") or (type(k) is int and k >= 1)):
            raise BadInput(
                f"training.trunk_checkpointing = {k!r}: expected none, full, or k of at least 1 for every k-th layer"
            )
        if not 1 <= self.micro_batches <= LARGEST_SIZE:
            raise BadInput(f"training.micro_batches = {short(self.micro_batches)}: must be from 1 to {LARGEST_SIZE}")
        if not 0 <= self.label_smoothing < 1:
            raise BadInput(f"training.label_smoothing = {self.label_smoothing}: must be at least 0 and below 1")
        if self.loss_scale is not None and not 0 < self.loss_scale < math.inf:
            raise BadInput(f"training.loss_scale = {self.loss_scale}: must be positive and finite")
        if not 0 <= self.z_loss < math.inf:
            raise BadInput(f"training.z_loss = {self.z_loss}: must be at least 0 and finite")
        _one_of("training.optimizer", self.optimizer, OptimizerName)
        if isinstance(self.frozen, str) and not self.frozen_parts:
            raise BadInput(f"training.frozen = {self.frozen!r}: names no part; valid: {', '.join(FROZEN_PARTS)}")
        for part in self.frozen_parts:
            if part not in FROZEN_PARTS and not re.fullmatch(r"(head|unembedding) [1-9]\d*", part):
                raise unknown("part", part, [*FROZEN_PARTS, "head 1", "head 2, ..."], "training.frozen")

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        """`frozen` as a sorted tuple."""
        parts = self.frozen.split(",") if isinstance(self.frozen, str) else self.frozen
        return tuple(sorted({part.strip() for part in parts if part.strip()}))

    @property
    def keeps_gradients(self) -> bool:
        """Whether parameters have gradients between steps; an optimizer that steps fp32 copies takes them all."""
        return not self.set_to_none and (not self.master_weights or self.part == "heads")

    @property
    def checkpoint_every(self) -> int:
        """k, where every k-th trunk layer is recomputed; 0: none is."""
        if isinstance(self.trunk_checkpointing, int):
            return self.trunk_checkpointing
        return int(self.trunk_checkpointing == "full")

    def facts(self, dtype: Dtype) -> dict[str, Any]:
        """The setup as a record keeps it: equal setups have equal facts, however they were written."""
        every = self.checkpoint_every
        alike = {"trunk_checkpointing": ("none", "full")[every] if every < 2 else every, "frozen": [*self.frozen_parts]}
        return {"precision": self.precision(dtype), **dataclasses.asdict(self), **alike}

    @property
    def trunk_words(self) -> str:
        """What becomes of the trunk's activations, for people."""
        every = self.checkpoint_every
        return ("all kept", "checkpointed trunk")[every] if every < 2 else f"1 of {every} layers checkpointed"

    @property
    def words(self) -> tuple[str, ...]:
        """What differs from the usual setup, for people."""
        words = {
            self.trunk_words: self.checkpoint_every > 0,
            self.optimizer: self.optimizer != "adamw",
            f"{self.micro_batches} micro-batches": self.micro_batches > 1,
            f"frozen: {', '.join(self.frozen_parts)}": bool(self.frozen_parts),
            "gradients kept between steps": not self.set_to_none,
            f"label smoothing {self.label_smoothing:g}": self.label_smoothing > 0,
            f"z-loss {self.z_loss:g}": self.z_loss > 0,
            f"loss scale {self.loss_scale or 1:g}": self.loss_scale is not None,
            f"{self.sharding} over {self.world} ranks": self.sharding != "none",
            "the heads alone": self.part == "heads",
        }
        return tuple(text for text, said in words.items() if said)

    def scale(self, dtype: Dtype) -> float:
        """What the loss is multiplied by in a model of this dtype."""
        return self.loss_scale or (FP16_SCALE if dtype == "fp16" else 1.0)

    def precision(self, dtype: Dtype) -> str:
        """The name of the workload's dtype and `master_weights` together; one of PRECISIONS."""
        return MASTER if self.master_weights else dtype


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What to vary, and how often to time it."""

    n: tuple[int, ...] = (1, 2, 4, 8)
    strategies: tuple[str, ...] = ("naive", "sequential", "chunked_vocab", "chunked_tokens", "checkpointed")
    rounds: int = 5  # timed steps per case, interleaved over the strategies

    def __post_init__(self) -> None:
        if not self.n or min(self.n) < 1 or len(set(self.n)) != len(self.n):
            raise BadInput(f"sweep.n = {list(self.n)}: needs distinct numbers of heads, each at least 1")
        if not self.strategies or len(set(self.strategies)) != len(self.strategies):
            raise BadInput(f"sweep.strategies = {list(self.strategies)}: needs distinct strategies, at least one")
        if not 1 <= self.rounds <= MOST_ROUNDS:
            raise BadInput(f"sweep.rounds = {short(self.rounds)}: must be from 1 to {MOST_ROUNDS}")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A named run: model, workload, sweep, and the GPUs it is planned for."""

    name: str
    model: ModelConfig
    workload: Workload
    description: str = ""
    gpus: tuple[str, ...] = ("h200",)  # names in gpus.toml
    sweep: Sweep = field(default_factory=Sweep)
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[^\W_][^/\\\x00-\x1f\x7f\ufffd]{0,99}", self.name):
            raise BadInput(
                f"name = {short(self.name)}: results go to a folder of this name; expected 1 to 100 characters, a"
                " letter or digit first, no slash and no control character"
            )
        if self.training.master_weights and self.workload.dtype != "bf16":
            raise BadInput(f"training.master_weights with dtype {self.workload.dtype}: only bf16 has fp32 copies")
        if not self.gpus or len(set(self.gpus)) != len(self.gpus):
            raise BadInput(f"gpus = {list(self.gpus)}: needs distinct GPUs, at least one")
        for n in self.sweep.n:
            self.model.with_n(n)  # raises where the model has too few layers


def _one_of(where: str, value: str, literal: Any) -> None:
    if value not in typing.get_args(literal):
        raise unknown("value", value, typing.get_args(literal), where)
