"""A Hugging Face `config.json` as a profile: the shape is taken over, what the model here does not have is named."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from mtp_mem.config.schema import ModelConfig, Profile, Sweep, Workload
from mtp_mem.errors import BadInput, unknown
from mtp_mem.model.hf_differences import Difference, Family, active_width, attention_heads, differences
from mtp_mem.model.hf_keys import Keys
from mtp_mem.model.layers import FLASH_CHANNELS
from mtp_mem.model.parameters import parameters

FAMILIES = {
    "llama": Family(architecture="LlamaForCausalLM"),
    "mistral": Family(architecture="MistralForCausalLM", kv_heads=8, window=4096),
    "qwen2": Family(architecture="Qwen2ForCausalLM", biases=True, window=4096, window_switch=True),
    "qwen3": Family(architecture="Qwen3ForCausalLM", head_dim=128, qk_norms=True, window=4096, window_switch=True),
    "gemma": Family(architecture="GemmaForCausalLM", tied=True, kv_heads=16, head_dim=256, gemma=True),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        tied=True,
        kv_heads=4,
        head_dim=256,
        gemma=True,
        post_norms=True,
        window=4096,
        logits_cap=30.0,
        scores_cap=50.0,
    ),
    "deepseek_v3": Family(architecture="DeepseekV3ForCausalLM", deepseek=True),
}
"""What can be read, by `model_type`."""

HEADS, CONTEXT = (1, 2, 4, 8), 4096
"""n and S where nothing is asked for; both are cut to what the model allows."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A profile made from a config.

    Attributes:
        profile: loads as it stands.
        model_type: the config's.
        differences: everything in which the config's model is another, the weighty ones first.
        parameters: of the config's model, without MTP depths.
        written: of the profile's model at n = 1.
    """

    profile: Profile
    model_type: str
    differences: tuple[Difference, ...]
    parameters: int
    written: int


def convert(
    path: Path,
    *,
    name: str,
    n: tuple[int, ...] | None = None,
    batch: int = 1,
    sequence: int | None = None,
    approximate: bool = False,
) -> Conversion:
    """The profile of the model that the `config.json` at `path` describes.

    Args:
        path: the config.
        name: the profile's.
        n: numbers of heads; by default 1, 2, 4, 8, or for a model with MTP depths 1 and what it was trained with.
        batch: B.
        sequence: S; by default 4096, or less where the model's context is shorter.
        approximate: take the nearest model also where the difference is weighty.

    Raises:
        BadInput: no such file, no JSON, no config of a known model_type, a key missing or of the wrong type, or a
            weighty difference without `approximate`.
    """
    asked = Workload(batch=batch, sequence=CONTEXT if sequence is None else sequence, dtype="bf16", tokenizer="uniform")
    sweep = Sweep(n=n) if n else None
    try:
        keys = Keys.load(path)
        if sequence is None and (context := keys.size("max_position_embeddings")) < CONTEXT:
            asked = dataclasses.replace(asked, sequence=context)
        return _convert(keys, name, asked, sweep, approximate)
    except BadInput as e:
        raise BadInput(f"{path}: {e}") from None


def _convert(keys: Keys, name: str, workload: Workload, sweep: Sweep | None, approximate: bool) -> Conversion:
    model_type, family = _family(keys)
    model = _model(keys, family)
    depths = keys.whole("num_nextn_predict_layers") or 0 if family.deepseek else 0
    possible = (1, 1 + depths) if depths else tuple(k for k in HEADS if k <= model.n_layers)
    model_differences = differences(keys, family, model, workload)
    if not approximate and (weighty := [d.text for d in model_differences if d.weighty]):
        raise BadInput(
            f"not what the model here can be: {'; '.join(weighty)}. An approximate"
            " conversion gives the nearest profile, with these words in it"
        )
    written = sum(parameters(model).values())
    whole = written + sum(d.parameters for d in model_differences)
    profile = Profile(
        name=name,
        description=f"{model_type}, {whole / 1e9:.2f} billion parameters, from its Hugging Face config.json"
        + (", approximated" if any(d.weighty for d in model_differences) else ""),
        model=model,
        workload=workload,
        sweep=sweep or Sweep(n=possible),
    )
    return Conversion(
        profile=profile, model_type=model_type, differences=tuple(model_differences), parameters=whole, written=written
    )


def _family(keys: Keys) -> tuple[str, Family]:
    model_type = keys.text("model_type")
    if not model_type:
        raise BadInput(f"key model_type is missing (expected one of {', '.join(FAMILIES)})")
    if model_type not in FAMILIES:
        raise unknown("model_type", model_type, FAMILIES)
    family = FAMILIES[model_type]
    if (classes := keys.texts("architectures")) and family.architecture not in classes:
        raise BadInput(f"{keys.show('architectures')}: has no logits; expected {family.architecture}")
    return model_type, family


def _model(keys: Keys, family: Family) -> ModelConfig:
    heads, kv_heads = attention_heads(keys, family)
    dim, split = keys.size("hidden_size"), 1
    while dim // (heads * split) > FLASH_CHANNELS:  # twice the heads of half the channels: the same matrices
        split *= 2
    theta = keys.number("rope_theta")
    if theta is None:
        theta = keys.table("rope_parameters").number("rope_theta")
    epsilon = keys.number("rms_norm_eps")
    depths = family.deepseek and keys.whole("num_nextn_predict_layers")
    return ModelConfig(
        vocab_size=keys.size("vocab_size"),
        dim=dim,
        n_layers=keys.size("num_hidden_layers"),
        n_attention_heads=heads * split,
        n_kv_heads=kv_heads * split,
        ffn_dim=active_width(keys) if family.deepseek else keys.size("intermediate_size"),
        head="deepseek" if depths else "parallel",
        match_layers=not depths,
        unembedding="tied" if keys.flag("tie_word_embeddings", family.tied) else "shared",
        rope_theta=10_000.0 if theta is None else theta,
        norm_eps=1e-6 if epsilon is None else epsilon,
    )
