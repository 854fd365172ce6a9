"""The sizes of a step in closed form: what a layer saves, what a head leaves, how large the gradients are.

Symbols: N = B*S tokens, D, V, n, H attention heads of C channels (D/H unless given), A = C H, G heads of keys and
values, K = C G, F feed-forward width, b bytes of a parameter's value, p of a product's (2 under autocast, else b), l
of a loss value (4; 8 in fp64). They hold for parallel heads; for other kinds there is no closed form here.
"""

from dataclasses import dataclass
from typing import Any

import torch

from mtp_mem.config.schema import Training
from mtp_mem.model.layers import PARAMETER_DTYPES, PRODUCT_DTYPES

PARTS = ("embedding", "trunk layers", "heads", "norm", "unembedding")
"""Of a model, by what trains together."""


@dataclass(frozen=True)
class Shape:
    """The sizes that closed forms of bytes and FLOPs are written in; b is `value`, p `product`, l `loss_value`."""

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
    product: int
    loss_value: int
    cuda: bool
    training: Training
    frozen: frozenset[str]  # of PARTS but "heads"; a tied unembedding is as its embedding
    head_trains: tuple[bool, ...]  # by the head's index, n of them

    @staticmethod
    def of(
        model: dict[str, Any], workload: dict[str, Any], cuda: bool = False, training: Training | None = None
    ) -> "Shape | None":
        """From a record's `model` and `workload`, its setup, and whether CUDA's kernels run or are predicted.

        None where no formula applies: a model that is not this package's, other head kinds, a loss with options, the
        heads alone, several ranks, an unembedding that trains on rows of a head in which nothing else does,
        nothing that trains at all.
        """
        training, dtype, tied = training or Training(), workload["dtype"], model["unembedding"] == "tied"
        if "architecture" in model or "factory" in model or model["head"] != "parallel":
            return None
        if model["unembedding"] == "replicated" or dtype not in PARAMETER_DTYPES:
            return None
        if training.sharding != "none" or training.part != "step":
            return None
        if training.label_smoothing or training.z_loss or model.get("logit_softcap"):
            return None
        frozen = frozen_of(training, tied)
        head_trains = tuple(not frozen & {"heads", f"head {i + 1}"} for i in range(model["n_future"]))
        if frozen >= {"embedding", "trunk layers", "norm"}:
            needed = all(head_trains) if "unembedding" not in frozen else any(head_trains)
            if not needed:
                return None
        D, H, value = model["dim"], model["n_attention_heads"], PARAMETER_DTYPES[dtype].itemsize
        G, C = model["n_kv_heads"] or H, model.get("head_dim") or D // H
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
            product=PRODUCT_DTYPES[dtype].itemsize,
            loss_value=max(4, value),
            cuda=cuda,
            training=training,
            frozen=frozen,
            head_trains=head_trains,
        )

    @property
    def logits(self) -> int:
        """One tensor (N, V) of the loss dtype."""
        return self.N * self.V * self.loss_value

    @property
    def hidden(self) -> int:
        """One tensor (N, D), as layers hand it on."""
        return self.N * self.D * self.value

    @property
    def rows(self) -> int:
        """One tensor (N, D), as products take it."""
        return self.N * self.D * self.product

    @property
    def autocast(self) -> bool:
        """Whether products take copies of weights and rows in low precision, each its own copy of the rows."""
        return self.product != self.value

    @property
    def unembedding(self) -> int:
        """One tensor (V, D): the unembedding, or its gradient."""
        return self.V * self.D * self.value

    def layer(self, trains: bool) -> int:
        """What one layer saves for its backward, the trunk's or a head's; by whether the layer trains.

        In N rows: both residual sums and both normed inputs (D each), q and attention's output (A each), k and v
        (K each), gate, up, silu(gate) and their product (F each); two norms' scales and attention's logsumexp in the
        loss dtype. CUDA's attention in fp32 keeps k and v repeated, A each. Norms of q and k keep both as they were
        before, and a scale for each of their heads. What only a weight's gradient asks for a frozen layer does not
        save: the normed inputs, the product. Under autocast each of the five products of normed inputs has its own
        copy of them, and of its weight as every product has.
        """
        kept = self.A if self.cuda and self.product == torch.float32.itemsize else self.K
        widths, scales = 2 * self.A + 2 * kept + 3 * self.F, 2 + self.H
        if trains:
            widths += (5 if self.autocast else 2) * self.D + self.F
        if self.qk_norm:
            widths, scales = widths + self.A + self.K, scales + self.H + self.G
        saved = self.N * (2 * self.D * self.value + widths * self.product + scales * self.loss_value)
        return saved + self.autocast * self.layer_weights * self.product

    @property
    def layer_weights(self) -> int:
        """Values in one layer's matrices."""
        return 2 * self.D * (self.A + self.K) + 3 * self.D * self.F

    @property
    def layer_parameters(self) -> int:
        """Bytes of one layer's parameters, or of their gradients."""
        biases = (self.A + 2 * self.K) * self.qkv_bias + 2 * self.C * self.qk_norm
        return (self.layer_weights + 2 * self.D + biases) * self.value

    def trains(self, part: str) -> bool:
        """Whether a part of PARTS has gradients, one of the heads aside: `head_trains`."""
        return part not in self.frozen

    @property
    def cut_gradient(self) -> int:
        """The gradient (N, D) of the trunk's output, which there is if anything below it trains."""
        return self.hidden * (self.trains("embedding") or self.trains("trunk layers"))

    @property
    def accumulates(self) -> bool:
        """Whether every gradient is there from the beginning and is added to."""
        return self.training.micro_batches > 1 or self.training.keeps_gradients

    def left_behind(self, heads: int, joint: bool = False) -> int:
        """Gradients that are live after so many heads' backward; all of them where they are added to.

        All heads add to the unembedding's, the final norm's and the cut's. In one joint backward autograd sums those
        before it adds them to what is there.
        """
        if not heads:
            return self.gradients * self.accumulates
        if self.accumulates:
            return self.gradients + self.cut_gradient + self.shared_gradients * joint
        return self.shared_gradients + self.cut_gradient + sum(self.head_trains[-heads:]) * self.layer_parameters

    @property
    def shared_gradients(self) -> int:
        """The unembedding's and the final norm's."""
        return self.unembedding * self.trains("unembedding") + self.norm * self.trains("norm")

    @property
    def norm(self) -> int:
        """The final norm's weight (D,), or its gradient."""
        return self.D * self.value

    @property
    def trunk(self) -> int:
        """What is live below the cut while the heads run: embedded tokens, every layer's share, rotary tables."""
        return self.below + sum(self.kept)

    @property
    def kept(self) -> list[int]:
        """What each trunk layer keeps: all it saves, or where it is checkpointed its output alone."""
        every = self.training.checkpoint_every
        if not self.cut_gradient:
            return []
        layer = self.layer(self.trains("trunk layers"))
        return [self.hidden if every and i % every == 0 else layer for i in range(self.trunk_layers)]

    @property
    def below(self) -> int:
        """What is live below every trunk layer: embedded tokens; cosines and sines, (S, C/2) each, of both passes."""
        return self.hidden + (2 if self.trunk_layers and self.cut_gradient else 1) * self.S * self.C * self.product

    def flows(self, index: int) -> bool:
        """Whether a gradient reaches the hidden states of the head with this index."""
        return self.cut_gradient > 0 or self.head_trains[index]

    @property
    def turns(self) -> list[int]:
        """Indices of the heads that have a backward, in the order in which they run it: the last one first."""
        shared = self.trains("norm") or self.trains("unembedding")
        return [index for index in reversed(range(self.n)) if shared or self.flows(index)]

    def head(self, index: int) -> int:
        """What one head leaves for its backward, its loss aside: the layer, the final norm's scale.

        If nothing trains up to its hidden states, these and the scale are kept for the norm's own gradient alone.
        """
        scale = self.N * self.loss_value
        if self.flows(index):
            return self.layer(self.head_trains[index]) + scale
        return (self.hidden + scale) * self.trains("norm")

    @property
    def projection(self) -> int:
        """What the product with the unembedding saves: normed rows, for its gradient, and autocast's copy of it."""
        return self.rows * self.trains("unembedding") + self.autocast * self.V * self.D * self.product

    def full_loss(self, summed: bool = False) -> int:
        """What a head's loss with all its logits takes in its backward, at the worst of four moments.

        Log-softmax, its gradient and the logits' gradient. Or, where tokens are few: the logits' gradient as products
        take it and what comes of it, the rows' gradient and the unembedding's; then without what the product saved,
        this one and under autocast its wide copy, else this one and its sum with another head's.

        Args:
            summed: autograd itself adds this head's gradient of the unembedding to another's, as in a joint backward.
        """
        values = self.V * self.D * self.trains("unembedding")
        products, table = self.rows + values * self.product, values * self.value
        widened = products + self.autocast * table - self.projection
        added = self.rows + 2 * table * (summed and not self.autocast) - self.projection
        return max(3 * self.logits, self.N * self.V * self.product + products, widened, added)

    def one_head(self, loss: int, joint: bool = False, kept: int = 0) -> int:
        """Bytes above the cut with one head at a time: in the worst one's loss, or in its layer's backward.

        The heads before it have left their gradients, and the cut's so far.

        Args:
            loss: bytes that the head's loss takes.
            joint: all heads' backward is one call.
            kept: bytes of the loss that the layer's backward finds still there.
        """
        moments = []
        for index in self.turns:
            trains, others = self.head_trains[index], self.left_behind(self.n - 1 - index, joint)
            moments.append(self.head(index) + loss + others)
            if not self.flows(index):
                moments.append(self.forward_alone + others)
            else:
                layer = self.layer(trains) + self.hidden + self.in_flight(trains) + kept
                moments.append(layer + max(others, self.shared_gradients))
        return max(moments)

    @property
    def forward_alone(self) -> int:
        """What a layer's forward pass takes if nothing is saved: silu(gate), up, their product, two tensors (N, D)."""
        return 3 * self.N * self.F * self.product + 2 * self.hidden

    def in_flight(self, trains: bool) -> int:
        """What a layer's backward has beside all that the layer saved, early on, at the gradients of gate and up.

        Three tensors (N, F), in the place of the one that the last product saved, and that product's weight's gradient.
        """
        new = self.D * self.F * self.value * (trains and not self.accumulates)
        saved = self.N * self.F * self.product * trains
        return 3 * self.N * self.F * self.product - saved + new - self.autocast * self.D * self.F * self.product

    @property
    def gradients(self) -> int:
        """All parameters' gradients."""
        layers = sum(self.head_trains) + self.trunk_layers * self.trains("trunk layers")
        tables = self.trains("embedding") + (self.trains("unembedding") and not self.tied)
        return layers * self.layer_parameters + tables * self.unembedding + self.norm * self.trains("norm")


def frozen_of(training: Training, tied: bool) -> frozenset[str]:
    """What a setup freezes: PARTS, and single heads by name."""
    several = {"trunk": PARTS[:2], "all but heads": tuple(part for part in PARTS if part != "heads")}
    frozen = {part for name in training.frozen_parts for part in several.get(name, (name,))}
    if tied:  # one parameter, which the name "unembedding" alone does not freeze
        frozen = frozen - {"unembedding"} | ({"unembedding"} if "embedding" in frozen else set())
    return frozenset(frozen)
