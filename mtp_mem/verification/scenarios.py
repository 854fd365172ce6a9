"""Small training steps that have caught wrong gradients before; `verify` runs every strategy through them.

A scenario is data: what is unusual about its model, its batch or the way it is called. mtp_mem/verification/problem.py
makes it real.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from mtp_mem.config.schema import USUAL_DTYPES, Dtype, HeadKind, ModelConfig, Unembedding
from mtp_mem.model.losses import LossOptions
from mtp_mem.verification.gradient_error import Reference

CHUNK = 13  # divides neither V = 67 nor the number of tokens


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One unusual step. The defaults are the usual one."""

    name: str
    head: HeadKind = "parallel"
    unembedding: Unembedding = "shared"
    n: int = 3
    batch: int = 2
    sequence: int = 11
    vocab_size: int = 67
    dim: int = 32
    kv_heads: int = 2
    weights: tuple[float, ...] | None = None
    scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    frozen: tuple[str, ...] = ()  # parts of the model, or "all but" and the parts that train
    ignored: Literal["tail", "nothing", "a chunk", "a head", "everything", "most of one sequence"] = "tail"
    edge_targets: bool = False  # the first and the last id, and one that no token has, are targets
    batches: tuple[int, ...] = (0,)  # seeds; the same twice repeats a batch. Gradients accumulate over all
    prefilled: bool = False  # `.grad` holds something before the first batch
    std: float = 0.15  # of the weights: larger than an initialisation, so that softmax is far from uniform
    logits: float = 1.0  # the unembedding is multiplied by this
    offset: float = 0.0  # all logits are this number, and nothing but the unembedding trains
    not_a_number: str = ""  # the parameter that holds one NaN
    trunk: Literal["plain", "dropout", "checkpointed", "transposed"] = "plain"  # transposed: nothing is contiguous
    steps: int = 0  # optimizer steps that are taken before it
    chunk: int | None = CHUNK  # for every integer option of a strategy; None leaves its defaults
    dtypes: tuple[Dtype, ...] = USUAL_DTYPES
    expected: Reference = "numbers"  # what every gradient and loss consists of

    @property
    def exact(self) -> bool:
        """Whether the order of heads alone decides the bits: one batch, no `.grad` yet (mtp_mem/model/head_tree.py)."""
        return not self.prefilled and len(self.batches) == 1

    def in_multiples_of(self, multiple: int) -> "Scenario":
        """The scenario with vocabulary, tokens and chunk rounded up, for a kernel that takes only multiples."""
        if multiple == 1:
            return self

        def up(size: int, step: int = multiple) -> int:
            return -(-size // step) * step

        sequence = up(self.sequence, multiple // math.gcd(self.batch, multiple))
        chunk = None if self.chunk is None else up(self.chunk)
        return dataclasses.replace(self, vocab_size=up(self.vocab_size), sequence=sequence, chunk=chunk)

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            dim=self.dim,
            n_layers=2,
            n_attention_heads=4,
            n_kv_heads=self.kv_heads,
            ffn_dim=48,
            n_future=self.n,
            head=self.head,
            unembedding=self.unembedding,
            match_layers=False,
            logit_softcap=self.softcap,
        )

    @property
    def options(self) -> LossOptions:
        """Options of the loss."""
        return LossOptions(softcap=self.softcap, label_smoothing=self.label_smoothing, z_loss=self.z_loss)


SCENARIOS: tuple[Scenario, ...] = (
    *(Scenario(name=f"n = {n}", n=n) for n in (1, 2, 3, 4, 8)),
    Scenario(name="causal heads", head="causal", n=4),
    Scenario(name="anticausal heads", head="anticausal", n=4),
    Scenario(name="linear heads", head="linear", n=4),
    Scenario(name="deepseek heads", head="deepseek", n=4),
    Scenario(name="medusa heads", head="medusa", n=4),
    Scenario(name="tied unembedding", unembedding="tied"),
    Scenario(name="replicated unembedding", unembedding="replicated"),
    Scenario(name="deepseek heads, tied", head="deepseek", unembedding="tied"),
    Scenario(name="S = 1", sequence=1, expected="zero"),
    Scenario(name="one token a row", sequence=1, ignored="nothing"),
    Scenario(name="one token in all", batch=1, sequence=1, ignored="nothing"),
    Scenario(name="one row, n larger than S", batch=1, sequence=3, n=4),
    Scenario(name="odd sizes", batch=3, sequence=7, vocab_size=41),
    Scenario(name="no grouped queries", kv_heads=4),
    Scenario(name="chunk of 1", chunk=1, sequence=5),
    Scenario(name="chunk divides everything", chunk=11, vocab_size=66),
    Scenario(name="chunk larger than everything", chunk=1000),
    Scenario(name="frozen trunk", frozen=("embedding", "trunk")),
    Scenario(name="frozen embedding", frozen=("embedding",)),
    Scenario(name="frozen trunk layers", frozen=("trunk",)),
    Scenario(name="frozen unembedding", frozen=("unembedding",)),
    Scenario(name="frozen norm", frozen=("norm",)),
    Scenario(name="frozen head", frozen=("head 2",)),
    Scenario(name="frozen head in a chain", frozen=("head 2",), head="causal"),
    Scenario(name="everything frozen but the heads", frozen=("all but", "head 1", "head 2", "head 3")),
    Scenario(name="no target ignored", ignored="nothing"),
    Scenario(name="a whole chunk ignored", ignored="a chunk"),
    Scenario(name="a whole head ignored", ignored="a head"),
    Scenario(name="everything ignored", ignored="everything", expected="zero"),
    Scenario(name="most of one sequence ignored", ignored="most of one sequence"),
    Scenario(name="first, last and undrawn id as targets", edge_targets=True),
    Scenario(name="loss weights lambda / D", weights=(1.0, 0.15, 0.15)),
    Scenario(name="loss weight 0", weights=(1.0, 0.0, 0.3)),
    Scenario(name="negative loss weight, scale 2^40", weights=(1.0, -0.5, 0.3), scale=2.0**40),
    Scenario(name="upstream scale 0.37", scale=0.37),
    Scenario(name="upstream scale 65536", scale=65536.0),
    Scenario(name="existing .grad", prefilled=True),
    Scenario(name="existing .grad, two microbatches", prefilled=True, batches=(0, 1)),
    Scenario(name="the same batch twice", batches=(0, 0)),
    Scenario(name="label smoothing", label_smoothing=0.1),
    Scenario(name="z-loss", z_loss=0.01),
    Scenario(name="label smoothing, z-loss and a softcap", label_smoothing=0.2, z_loss=0.02, softcap=1.5),
    Scenario(name="logits of 1e4", logits=1e4),
    Scenario(name="dropout in the trunk", trunk="dropout"),
    Scenario(name="checkpointed trunk", trunk="checkpointed"),
    Scenario(name="nothing contiguous", trunk="transposed"),
    Scenario(name="after five optimizer steps", steps=5),
    Scenario(name="many chunks in bf16", batch=8, sequence=64, n=2, chunk=2, dtypes=("bf16",)),
    Scenario(name="fp16 with a loss scale of 1024", scale=1024.0, dtypes=("fp16",)),
    Scenario(
        name="fp16, causal heads, label smoothing", head="causal", label_smoothing=0.1, scale=1024.0, dtypes=("fp16",)
    ),
    Scenario(name="fp16, tied, existing .grad", unembedding="tied", prefilled=True, scale=256.0, dtypes=("fp16",)),
    Scenario(name="many chunks in fp16", batch=8, sequence=64, n=2, chunk=2, scale=1024.0, dtypes=("fp16",)),
    Scenario(name="fp16 that overflows", scale=2.0**22, dtypes=("fp16",), expected="not finite"),
    # Not in bf16-mixed: there naive's gradient is exact by luck, and twice its error leaves no room for rounding.
    Scenario(name="logits with a common offset of 2^20", offset=2.0**20, dtypes=("fp64", "fp32", "bf16")),
    Scenario(name="logits with a common offset of 2^27", offset=2.0**27, dtypes=("fp64", "fp32", "bf16")),
    Scenario(name="NaN in the unembedding", not_a_number="unembedding.weight", expected="not finite"),
    Scenario(name="NaN in the norm", not_a_number="norm.weight", expected="not finite"),
)

REAL_SIZES: tuple[Scenario, ...] = (
    Scenario(name="N = 4,102", batch=293, sequence=14, n=2, vocab_size=521, dim=64, chunk=None, dtypes=("fp32",)),
    Scenario(name="V = 33,001", sequence=24, n=2, vocab_size=33001, dim=128, chunk=None, dtypes=("fp32",)),
    Scenario(name="V = 33,001, as initialised", n=2, vocab_size=33001, std=0.02, chunk=None, dtypes=("fp32",)),
    Scenario(name="D = 192", sequence=150, n=2, vocab_size=4111, dim=192, std=0.05, chunk=None, dtypes=("fp32",)),
    Scenario(name="N = 8,206", batch=586, sequence=14, n=1, chunk=None, dtypes=("fp32",)),
    Scenario(name="V = 65,601", n=1, vocab_size=65601, edge_targets=True, chunk=None, dtypes=("fp32",)),
    Scenario(name="D = 320", n=2, dim=320, std=0.05, chunk=None, dtypes=("fp32",)),
)
"""Sizes beyond what kernels and chunk loops take for granted, at a strategy's default options.

More than 4096 and 8192 tokens and no power of two, more than 2^15 and 2^16 vocabulary entries with a partial last slab,
widths of 64, 128, 192 and 320, and fewer tokens than any default chunk.
"""
