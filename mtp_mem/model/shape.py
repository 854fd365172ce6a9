"""The sizes of a step in closed form: what a layer saves, what a head leaves, how large the gradients are.

Symbols: N = B*S tokens, D, V, n, H attention heads of C channels (D/H unless given), A = C H, G heads of keys and
values, K = C G, F feed-forward width, b bytes of a value, l bytes of a loss value (4; 8 in fp64). They hold for
parallel heads; for other kinds there is no closed form here.
"""

from dataclasses import dataclass, field
from typing import Any

from mtp_mem.config.schema import Training

VALUE_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Shape:
    """The sizes that closed forms of bytes and FLOPs are written in; b is `value`, l is `loss_value`."""

    S: int
    N: int
    D: int
    V: int
    n: int
    H: int
    G: int
    C: int
    A: int
    K: int
    F: int
    trunk_layers: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    value: int
    loss_value: int
    cuda: bool = False
    training: Training = field(default_factory=Training)

    @staticmethod
    def of(
        model: dict[str, Any], workload: dict[str, Any], cuda: bool = False, training: Training | None = None
    ) -> "Shape | None":
        """From a record's `model` and `workload`, its setup, and whether CUDA's kernels run or are predicted.

        None where no formula applies: a model that is not this package's, bf16-mixed, other head kinds, parts
        frozen other than the trunk, gradients that are kept, a loss with options, the heads alone.
        """
        training = training or Training()
        if "architecture" in model or "factory" in model:
            return None
        if model["head"] != "parallel" or model["unembedding"] == "replicated" or workload["dtype"] not in VALUE_BYTES:
            return None
        if training.sharding != "none" or training.part != "step":
            return None
        tied = model["unembedding"] == "tied"
        if training.frozen_parts not in ((), ("trunk",)) or (training.frozen_parts and tied):
            return None
        if not training.set_to_none or training.label_smoothing or training.z_loss or model.get("logit_softcap"):
            return None
        D, H = model["dim"], model["n_attention_heads"]
        value, G, C = VALUE_BYTES[workload["dtype"]], model["n_kv_heads"] or H, model.get("head_dim") or D // H
        return Shape(
            S=workload["sequence"],
            N=workload["batch"] * workload["sequence"],
            D=D,
            V=model["vocab_size"],
            n=model["n_future"],
            H=H,
            G=G,
            C=C,
            A=C * H,
            K=C * G,
            F=model["ffn_dim"] or -(-8 * D // 3 // 32) * 32,
            trunk_layers=model["n_layers"] - (model["n_future"] if model["match_layers"] else 1),
            tied=tied,
            qkv_bias=bool(model.get("qkv_bias")),
            qk_norm=bool(model.get("qk_norm")),
            value=value,
            loss_value=max(4, value),
            cuda=cuda,
            training=training,
        )

    @property
    def logits(self) -> int:
        """One tensor (N, V) of the loss dtype."""
        return self.N * self.V * self.loss_value

    @property
    def hidden(self) -> int:
        """One tensor (N, D)."""
        return self.N * self.D * self.value

    @property
    def unembedding(self) -> int:
        """One tensor (V, D): the unembedding, or its gradient."""
        return self.V * self.D * self.value

    @property
    def layer(self) -> int:
        """What one layer saves for its backward.

        In N rows: both residual sums and both normed inputs (D each), q and attention's output (A each), k and v
        (K each), gate, up, silu(gate) and their product (F each); two norms' scales and attention's logsumexp in the
        loss dtype. CUDA's attention in fp32 keeps k and v repeated, A each. Norms of q and k keep both as they were
        before, and a scale for each of their heads.
        """
        kept = self.A if self.cuda and self.value == VALUE_BYTES["fp32"] else self.K
        widths, scales = 4 * self.D + 2 * self.A + 2 * kept + 4 * self.F, 2 + self.H
        if self.qk_norm:
            widths, scales = widths + self.A + self.K, scales + self.H + self.G
        return self.N * (widths * self.value + scales * self.loss_value)

    @property
    def layer_parameters(self) -> int:
        """Bytes of one layer's parameters, or of their gradients."""
        biases = (self.A + 2 * self.K) * self.qkv_bias + 2 * self.C * self.qk_norm
        return (2 * self.D * (self.A + self.K) + 3 * self.D * self.F + 2 * self.D + biases) * self.value

    @property
    def shared_gradients(self) -> int:
        """Gradients that all heads add to: the unembedding's, the final norm's, the cut's."""
        return self.unembedding + self.D * self.value + self.hidden * (not self.frozen)

    def left_behind(self, heads: int) -> int:
        """Gradients that are live after so many heads' backward; from the second micro-batch on all are at once."""
        if self.training.micro_batches > 1:
            return self.gradients + self.hidden * (heads > 0 and not self.frozen)
        return self.shared_gradients + heads * self.layer_parameters if heads else 0

    @property
    def frozen(self) -> bool:
        """Whether the trunk is: it keeps nothing but its output, and the cut has no gradient."""
        return bool(self.training.frozen_parts)

    @property
    def trunk(self) -> int:
        """What is live below the cut while the heads run: embedded tokens, every layer's share, rotary tables."""
        return self.below + sum(self.kept)

    @property
    def kept(self) -> list[int]:
        """What each trunk layer keeps: all it saves, or where it is checkpointed its output alone."""
        every = self.training.checkpoint_every
        if self.frozen:
            return []
        return [self.hidden if every and i % every == 0 else self.layer for i in range(self.trunk_layers)]

    @property
    def below(self) -> int:
        """What is live below every trunk layer: embedded tokens; cosines and sines, (S, C/2) each, of both passes."""
        return self.hidden + (2 if self.trunk_layers and not self.frozen else 1) * self.S * self.C * self.value

    @property
    def head(self) -> int:
        """What one head leaves for its backward, its logits aside: the layer, the normed rows, the norm's scale."""
        return self.layer + self.hidden + self.N * self.loss_value

    def one_head(self, loss: int) -> int:
        """Bytes above the cut with one head at a time, at the last one's moment.

        The others have left their gradients, and the cut's so far.

        Args:
            loss: bytes that the head's loss takes.
        """
        return self.head + loss + self.left_behind(self.n - 1)

    @property
    def gradients(self) -> int:
        """All parameters' gradients."""
        layers = self.n + self.trunk_layers * (not self.frozen)
        tables = 1 if self.tied or self.frozen else 2
        return layers * self.layer_parameters + tables * self.unembedding + self.D * self.value
