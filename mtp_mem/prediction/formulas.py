"""Bytes a step should need, in closed form: what the instruments are held against, and what the dashed lines show.

Each formula counts the tensors that are live at the one moment that sets the peak. Symbols: N = B*S tokens, D, V, n,
H attention heads, K = D/H * kv heads, F feed-forward width, b bytes of a value, l bytes of a loss value (4; 8 in fp64).
They hold for parallel heads; for other kinds there is no closed form here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtp_mem.errors import MtpMemError
from mtp_mem.model.token_chunks import SOFTMAX_BLOCK, WIDE_ROWS, default_chunk
from mtp_mem.strategy import BUILTIN, load_strategy

VALUE_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Shape:
    """The sizes the formulas are written in; b is `value`, l is `loss_value`."""

    S: int
    N: int
    D: int
    V: int
    n: int
    H: int
    K: int
    F: int
    trunk_layers: int
    tied: bool
    value: int
    loss_value: int
    cuda: bool = False

    @staticmethod
    def of(model: dict[str, Any], workload: dict[str, Any], cuda: bool = False) -> "Shape | None":
        """From a record's `model` and `workload`, and whether CUDA's kernels run or are predicted.

        None where no formula applies (bf16-mixed, other head kinds).
        """
        if model["head"] != "parallel" or model["unembedding"] == "replicated" or workload["dtype"] not in VALUE_BYTES:
            return None
        D, H = model["dim"], model["n_attention_heads"]
        value = VALUE_BYTES[workload["dtype"]]
        return Shape(
            S=workload["sequence"],
            N=workload["batch"] * workload["sequence"],
            D=D,
            V=model["vocab_size"],
            n=model["n_future"],
            H=H,
            K=D // H * (model["n_kv_heads"] or H),
            F=model["ffn_dim"] or -(-8 * D // 3 // 32) * 32,
            trunk_layers=model["n_layers"] - (model["n_future"] if model["match_layers"] else 1),
            tied=model["unembedding"] == "tied",
            value=value,
            loss_value=max(4, value),
            cuda=cuda,
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

        In N rows: both residual sums, both normed inputs, q and attention's output (D each), k and v (K each), gate,
        up, silu(gate) and their product (F each); two norms' scales and attention's logsumexp in the loss dtype.
        """
        return self.N * ((6 * self.D + 2 * self.K + 4 * self.F) * self.value + (2 + self.H) * self.loss_value)

    @property
    def layer_parameters(self) -> int:
        """Bytes of one layer's parameters, or of their gradients."""
        return (2 * self.D * (self.D + self.K) + 3 * self.D * self.F + 2 * self.D) * self.value

    @property
    def shared_gradients(self) -> int:
        """Gradients that all heads add to: the unembedding's, the final norm's, the cut's."""
        return self.unembedding + self.D * self.value + self.hidden

    @property
    def trunk(self) -> int:
        """What is live below the cut while the heads run: embedded tokens, every layer's share, rotary tables."""
        tables = self.S * self.D // self.H * self.value  # cosines and sines, (S, D/H/2) each
        return self.hidden + self.trunk_layers * self.layer + (2 if self.trunk_layers else 1) * tables

    @property
    def head(self) -> int:
        """What one head leaves for its backward, its logits aside: the layer, the normed rows, the norm's scale."""
        return self.layer + self.hidden + self.N * self.loss_value

    @property
    def gradients(self) -> int:
        """All parameters' gradients."""
        layers = self.trunk_layers + self.n
        return layers * self.layer_parameters + (1 if self.tied else 2) * self.unembedding + self.D * self.value


def peak_over_baseline(spec: str, shape: Shape) -> int | None:
    """Peak of a step above its parameters, optimizer state and batch; None for a strategy without a formula.

    The largest of three moments: the heads at their worst, the trunk's backward as it begins (everything above the cut
    has its gradient, nothing of the trunk is freed; two rows of width F are in flight), and all gradients at the end.
    """
    heads = heads_peak(spec, shape)
    if heads is None:
        return None
    above = shape.n * shape.layer_parameters + shape.shared_gradients
    if _is_chunked_tokens(spec) and shape.value < shape.loss_value:  # the fp32 sum, as it becomes the gradient
        heads = max(heads, above + shape.V * shape.D * shape.loss_value)
    trunk_backward = shape.trunk + above + 2 * shape.N * shape.F * shape.value if shape.trunk_layers else 0
    return max(shape.trunk + heads, trunk_backward, shape.gradients)


def formula_bytes(spec: str, model: dict[str, Any], workload: dict[str, Any], *, cuda: bool) -> int | None:
    """`peak_over_baseline` of a record's fields; None where there is no formula."""
    shape = Shape.of(model, workload, cuda)
    return None if shape is None else formula_over_baseline(spec, shape)


def formula_over_baseline(spec: str, shape: Shape) -> int | None:
    """`peak_over_baseline` of any spec, None where it has no formula here.

    Nothing is imported for a strategy that is not built in: a results file may come from anywhere.
    """
    if spec.partition(":")[0] not in BUILTIN:
        return None
    try:
        return peak_over_baseline(spec, shape)
    except MtpMemError:  # an option that this version does not know, a kernel that is not installed
        return None


def heads_peak(spec: str, shape: Shape) -> int | None:
    """Bytes above the cut at the heads' worst moment; None for a strategy without a formula."""
    name = spec.partition(":")[0]
    strategy = load_strategy(spec)
    chunk = min(getattr(strategy, "chunk", 0) or shape.V, shape.V)
    if getattr(strategy, "loss", "full") == "chunked_vocab" or name == "chunked_vocab":
        return None if name == "naive" else _one_head(shape, _slabs(shape, chunk))
    if _is_chunked_tokens(spec):
        tokens = getattr(strategy, "chunk", None) or default_chunk(shape.N, shape.D, shape.V, shape.value, shape.cuda)
        return _one_head(shape, _tokens(shape, min(tokens, shape.N), getattr(strategy, "rows", "") == "compiled"))
    if name == "naive":
        return _joint(shape)
    if name in ("sequential", "checkpointed"):
        return _one_head(shape, _full_loss(shape))
    return None


def slope(points: Sequence[tuple[int, int]]) -> float | None:
    """Least-squares slope of (n, bytes), in bytes per head; None for fewer than two n."""
    if len(points) < 2:
        return None
    mean_n = sum(n for n, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((n - mean_n) ** 2 for n, _ in points)
    return sum((n - mean_n) * (y - mean_y) for n, y in points) / spread if spread else None


def _full_loss(s: Shape) -> int:
    """Log-softmax, its gradient and the logits' gradient."""
    return 3 * s.logits


def _slabs(s: Shape, chunk: int) -> int:
    """A slab of the backward and what it fills: d_hidden in the loss dtype, dW, and the weighted rows.

    The slab is in the loss dtype; in low precision in the model's as well, and a product awaits its addition: (N, D) of
    the hidden gradient, or (chunk, D) of the unembedding's.
    """
    narrow = s.value != s.loss_value
    slab = s.loss_value + narrow * s.value
    product = narrow * max(s.N, chunk) * s.D * s.value
    return s.N * chunk * slab + s.N * s.D * s.loss_value + s.hidden + product + s.unembedding


def _is_chunked_tokens(spec: str) -> bool:
    strategy = load_strategy(spec)
    return spec.partition(":")[0] == "chunked_tokens" and getattr(strategy, "accumulate", "") == "fp32"


def _tokens(s: Shape, chunk: int, fused: bool) -> int:
    """A chunk of logits and the sum of the unembedding's gradient; in low precision its softmax's fp32 rows as well.

    One kernel (`fused`) needs no such rows. Besides, in N rows: targets as columns (8), validity (1) and shares of the
    mean. A CPU has no product of low precision into fp32, and widens both sides. With more heads the sum is among what
    the others left, but for what it is wider than the gradient; with one head and chunk it begins after the softmax.
    """
    logits = chunk * s.V * s.value
    rows = s.N * (8 + 1 + s.loss_value) + chunk * s.loss_value
    # The largest logit, the target's, the loss, that times its share twice, a mask.
    softmax_row = 0 if fused else 5 * s.loss_value + 1
    total = s.V * s.D * (s.loss_value if s.n == 1 else s.loss_value - s.value)
    before = 0 if s.n == 1 and chunk == s.N else total
    if s.value == s.loss_value:
        return logits + rows + max(before + chunk * softmax_row, total)
    height = min(chunk, max(1, SOFTMAX_BLOCK // (s.V * s.loss_value)))
    softmax = 0 if fused else height * (s.V * s.loss_value + softmax_row)
    widened = 0 if s.cuda else chunk * (s.D + min(WIDE_ROWS, s.V)) * s.loss_value
    return logits + rows + max(before + softmax, total + widened)


def _one_head(s: Shape, loss: int) -> int:
    """One head at a time, the last one's moment: the others have left their gradients, and the cut's so far."""
    left_behind = s.shared_gradients + (s.n - 1) * s.layer_parameters if s.n > 1 else 0
    return s.head + loss + left_behind


def _joint(s: Shape) -> int:
    """n heads kept. Autograd then frees them one by one, while the gradients they leave grow: the worst turn."""
    moments = []
    for done in range(s.n):
        kept = s.n - done
        left_behind = s.shared_gradients + done * s.layer_parameters if done else 0
        moments.append(kept * (s.head + s.logits) + 2 * s.logits + left_behind)
    return max(moments)
