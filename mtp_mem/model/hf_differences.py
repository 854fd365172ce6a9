"""In which respects a Hugging Face model differs from the model here, each with its size.

Symbols: D width, H attention heads, F feed-forward width, L layers, V vocabulary, B sequences of S tokens, N = B*S.
A difference is `weighty` if it changes the shape of a weight matrix or adds a tensor of the logits' shape (N, V): the
profile would then be another model's. The others are a bias or a norm, whose bytes are stated, or leave every tensor
as it is.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from mtp_mem._util import format_bytes
from mtp_mem.config.schema import ModelConfig, Workload
from mtp_mem.model.hf_keys import Keys

BF16, FP32 = 2, 4  # bytes of a value; of a norm's scale


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One respect in which the config's model is another than the one written.

    Attributes:
        text: names the config's key, what is done instead, and what that leaves out.
        parameters: how many more the config's model has at n = 1; negative if fewer.
        weighty: see this module's docstring.
    """

    text: str
    parameters: int = 0
    weighty: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """What transformers (version 5; its configuration and modelling classes) fixes for a `model_type`.

    Attributes:
        architecture: the class that ends in logits.
        tied, kv_heads, head_dim: where the config does not say; None: as many as heads, and D / H.
        biases: q, k and v have one whatever the config says.
        qk_norms: an RMSNorm over each head of q and of k.
        window: the sliding window where the config names none.
        window_switch: there is a window only if `use_sliding_window`.
        gemma: GELU, embeddings times sqrt(D), norms times 1 + weight.
        post_norms: two further norms a layer, behind attention and feed-forward.
        logits_cap, scores_cap: softcapping where the config names none.
        deepseek: latent attention, routed experts, MTP depths.
    """

    architecture: str
    tied: bool = False
    kv_heads: int | None = None
    head_dim: int | None = None
    biases: bool = False
    qk_norms: bool = False
    window: int | None = None
    window_switch: bool = False
    gemma: bool = False
    post_norms: bool = False
    logits_cap: float | None = None
    scores_cap: float | None = None
    deepseek: bool = False


def differences(keys: Keys, family: Family, model: ModelConfig, workload: Workload) -> list[Difference]:
    """All of them, the weighty ones first; bytes are stated for `workload`."""
    attention = _latent_attention(keys, model) if family.deepseek else _attention(keys, family, model)
    all_differences = [
        *_logits(keys, family, model, workload),
        *attention,
        *_feed_forward(keys, family, model),
        *_norms(keys, family, model, workload),
        *_scores(keys, family),
        *_numerics(keys, family, workload),
    ]
    if keys.assumed:
        named = ", ".join(keys.show(name) for name in keys.assumed)
        all_differences.append(Difference(text=f"not in the file, so as transformers has it: {named}"))
    if unread := keys.unread():
        all_differences.append(Difference(text=f"not looked at: {', '.join(map(ascii, unread))}"))
    return sorted(all_differences, key=lambda difference: not difference.weighty)


def active_width(keys: Keys) -> int:
    """Feed-forward width that one token passes through: routed and shared experts where there are any."""
    if not keys.whole("n_routed_experts"):
        return keys.size("intermediate_size")
    experts = keys.size("num_experts_per_tok") + (keys.whole("n_shared_experts") or 0)
    return experts * keys.size("moe_intermediate_size")


def attention_heads(keys: Keys, family: Family) -> tuple[int, int]:
    """The config's numbers of attention heads, and of those for keys and values."""
    heads = keys.size("num_attention_heads")
    return heads, keys.whole("num_key_value_heads", family.kv_heads) or heads


def _logits(keys: Keys, family: Family, model: ModelConfig, workload: Workload) -> Iterator[Difference]:
    if keys.number("final_logit_softcapping", family.logits_cap):
        more = format_bytes(workload.tokens * model.vocab_size * BF16)
        yield Difference(
            text=f"{keys.show('final_logit_softcapping')}: the logits here are not capped; the cap's tanh keeps one"
            f" more tensor (N, V) a head, {more} in bf16",
            weighty=True,
        )


def _attention(keys: Keys, family: Family, model: ModelConfig) -> Iterator[Difference]:
    """The width of q, k and v, and their biases."""
    D, own = model.dim, model.dim // model.n_attention_heads
    H, kv = attention_heads(keys, family)
    head_dim = keys.whole("head_dim", family.head_dim) or D // H
    if head_dim != own:
        yield Difference(
            text=f"{keys.show('head_dim')}: the {model.n_attention_heads} heads here have D / H = {own} channels each,"
            f" so q and o have {D} rows or columns, not {H * head_dim}, and k and v {own * model.kv_heads}, not"
            f" {head_dim * kv}",
            parameters=model.n_layers
            * 2
            * D
            * (head_dim * (H + kv) - own * (model.n_attention_heads + model.kv_heads)),
            weighty=True,
        )
    everywhere = keys.flag("attention_bias") and not family.biases
    if everywhere or family.biases:
        each = head_dim * (H + 2 * kv) + (D if everywhere else 0)
        yield _bias("q, k, v and o" if everywhere else "q, k and v", each, model)


def _latent_attention(keys: Keys, model: ModelConfig) -> Iterator[Difference]:
    """Multi-head latent attention: q and k, v by way of low ranks (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1)."""
    D, H, own = model.dim, keys.size("num_attention_heads"), model.dim // model.n_attention_heads
    q_rank, kv_rank = keys.whole("q_lora_rank"), keys.size("kv_lora_rank")
    nope, rope, value = (keys.size(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    keys.whole("head_dim")  # some files repeat the rotary part's here
    q = D * q_rank + q_rank + q_rank * H * (nope + rope) if q_rank else D * H * (nope + rope)
    kv = D * (kv_rank + rope) + kv_rank + kv_rank * H * (nope + value)
    yield Difference(
        text=f"{keys.show('kv_lora_rank')}: latent attention becomes ordinary attention, {model.n_attention_heads}"
        f" heads of D / H = {own} channels for q, k and v, instead of {nope} + {rope} for q and k and {value} for v by"
        " way of low ranks",
        parameters=model.n_layers * (q + kv + H * value * D - 2 * D * (D + own * model.kv_heads)),
        weighty=True,
    )
    if keys.flag("attention_bias"):
        yield _bias("the projections to low rank and o", (q_rank or 0) + kv_rank + rope + D, model)


def _feed_forward(keys: Keys, family: Family, model: ModelConfig) -> Iterator[Difference]:
    """Experts (DeepSeekMoE: dense layers first, then a router with its correction bias and experts); biases."""
    D, F, L = model.dim, model.hidden_dim, model.n_layers
    count = keys.whole("n_routed_experts") if family.deepseek else None
    if count:
        shared, width = keys.whole("n_shared_experts") or 0, keys.size("moe_intermediate_size")
        dense = min(keys.whole("first_k_dense_replace") or 0, L)
        sparse = 3 * D * width * (count + shared) + D * count + count
        yield Difference(
            text=f"{keys.show('n_routed_experts')}: every layer, a head's too, is dense and as wide as what one token"
            f" passes through, ({keys.size('num_experts_per_tok')} + {shared}) x {width} = {F}; weights, gradients and"
            " optimizer states of the other experts, the router and its buffers are left out",
            parameters=dense * 3 * D * keys.size("intermediate_size") + (L - dense) * sparse - L * 3 * D * F,
            weighty=True,
        )
        if (every := keys.whole("moe_layer_freq") or 1) != 1:
            yield Difference(text=f"moe_layer_freq = {every}: experts in every layer were counted", weighty=True)
    if keys.flag("mlp_bias"):
        yield _bias("gate, up and down", 2 * F + D, model)


def _norms(keys: Keys, family: Family, model: ModelConfig, workload: Workload) -> Iterator[Difference]:
    D, N = model.dim, workload.tokens
    if family.qk_norms:
        H, kv = attention_heads(keys, family)
        head_dim = keys.whole("head_dim", family.head_dim) or D // H
        kept = format_bytes(N * (H + kv) * (head_dim * BF16 + FP32))
        yield Difference(
            text=f"q and k are normed there and not here: {2 * head_dim} parameters a layer, and {kept} that each"
            f" layer, a head's too, would keep for the backward at N = {N}",
            parameters=model.n_layers * 2 * head_dim,
        )
    if family.post_norms:
        kept = format_bytes(2 * N * (D * BF16 + FP32))
        yield Difference(
            text=f"attention and feed-forward are normed once more there, behind: {2 * D} parameters a layer, and"
            f" {kept} that each layer, a head's too, would keep for the backward at N = {N}",
            parameters=model.n_layers * 2 * D,
        )


def _scores(keys: Keys, family: Family) -> Iterator[Difference]:
    """What changes attention's scores alone: flash attention keeps none of them."""
    if not family.window_switch or keys.flag("use_sliding_window"):
        window = keys.whole("sliding_window", family.window)
        if window:
            yield Difference(
                text=f"{keys.show('sliding_window')}: attention here sees all tokens before; the bytes are the same"
                " with flash attention, the times are not"
            )
    else:
        keys.whole("sliding_window")
    keys.texts("layer_types")  # which layers have the window
    if keys.number("attn_logit_softcapping", family.scores_cap):
        yield Difference(
            text=f"{keys.show('attn_logit_softcapping')}: scores here are not capped; the bytes are the same with a"
            " flash attention that caps inside, and more by (H, S, S) a layer without"
        )
    if keys.flag("use_bidirectional_attention"):
        yield Difference(
            text="use_bidirectional_attention = true: attention here is causal, as predicting tokens needs it",
            weighty=True,
        )
    if keys.number("attention_dropout"):
        yield Difference(text=f"{keys.show('attention_dropout')}: no dropout here; the bytes are the same")


def _numerics(keys: Keys, family: Family, workload: Workload) -> Iterator[Difference]:
    """What changes values and not which tensors there are, and what the file says of its weights."""
    own = keys.text("hidden_act") or ("gelu_pytorch_tanh" if family.gemma else "silu")
    activation = keys.text("hidden_activation") or own
    if activation not in ("silu", "swish"):
        known = activation in ("gelu", "gelu_pytorch_tanh")
        bytes_ = "the bytes are the same" if known else "whether the bytes are the same is not known here"
        yield Difference(text=f"gate of {activation!a}: it is SiLU here; {bytes_}", weighty=not known)
    if family.gemma:
        yield Difference(
            text="embeddings times sqrt(D) and norms times 1 + weight there, not here; the bytes are the same"
        )
    for name in ("rope_scaling", "rope_parameters"):
        rope = keys.table(name)
        kind = rope.text("rope_type") or rope.text("type") or "default"
        if kind != "default":
            yield Difference(text=f"{name} = {kind!a}: rotary angles here are not scaled; the bytes are the same")
        if rope.number("partial_rotary_factor") not in (None, 1):
            yield Difference(text=f"{name}: all channels are rotated here, not a part of them")
    if keys.number("partial_rotary_factor") not in (None, 1):
        yield Difference(text=f"{keys.show('partial_rotary_factor')}: all channels are rotated here")
    stored = [name for name in ("dtype", "torch_dtype") if keys.text(name) not in (None, "bfloat16")]
    for name in stored:
        yield Difference(text=f"{keys.show(name)}: weights, gradients and optimizer states here are bf16")
    if keys.table("quantization_config"):
        yield Difference(text="quantization_config: weights here are bf16, not quantized")
    context = keys.whole("max_position_embeddings")
    if context and workload.sequence > context:
        yield Difference(text=f"{keys.show('max_position_embeddings')}: S = {workload.sequence} goes beyond it")


def _bias(which: str, each: int, model: ModelConfig) -> Difference:
    return Difference(
        text=f"{which} have biases there and none here: {each} parameters a layer, and as many gradients",
        parameters=model.n_layers * each,
    )
