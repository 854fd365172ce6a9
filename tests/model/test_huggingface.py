"""Hugging Face models with heads: the same gradient, the same bytes, the class's own parameters, or one clear line."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small import gradients
from torch import Tensor

from mtp_mem import Training, TrainingStep, forward_backward, from_hf, load_strategy, make_batch, make_optimizer
from mtp_mem.config.gpus import load_gpu
from mtp_mem.config.other_models import huggingface_profile
from mtp_mem.config.profiles import load_profile
from mtp_mem.errors import BadInput
from mtp_mem.memory.cpu import track
from mtp_mem.model.build import make_model, parameters
from mtp_mem.model.head_tree import Head
from mtp_mem.model.huggingface import KINDS, HuggingFaceMTP
from mtp_mem.model.losses import full
from mtp_mem.model.own import set_up
from mtp_mem.prediction.peaks import predicted
from mtp_mem.prediction.simulated_step import Simulation, simulate
from mtp_mem.verification.problem import plain_step

CONFIGS = Path(__file__).parents[1] / "hf"
TINY: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES: dict[str, type[Any]] = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma2": transformers.Gemma2Config,
    "granite": transformers.GraniteConfig,
    "phi3": transformers.Phi3Config,
    "olmo2": transformers.Olmo2Config,
}
SAME_ORDER = ("naive", "sequential", "checkpointed")
CHUNKED = ("chunked_vocab:chunk=13", "chunked_tokens:chunk=7")
N = 3

PUBLISHED = {
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-nemo-12b": 12_247_782_400,
    "qwen2-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
}
REFUSED = {
    "phi-2": "PhiForCausalLM adds a bias to its logits",
    "mimo-7b": "model_type 'mimo' is unknown to transformers",
}


def language_model(family: str, *, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = FAMILIES[family](**TINY | changes)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def plain_joint(model: HuggingFaceMTP, ids: Tensor, targets: Tensor) -> list[Tensor]:
    """The textbook step: every head's loss with its graph, then one `backward()` of their sum; no strategy."""
    z = model.trunk(ids)
    heads, losses = model.heads(z), dict[int, Tensor]()
    pending: list[tuple[Head, Tensor]] = [(root, z) for root in reversed(heads.roots)]
    while pending:
        head, parent = pending.pop()
        hidden = head.layer(parent.view_as(parent))
        normed = heads.norm(hidden.view_as(hidden))
        losses[head.index] = full(normed, head.unembedding, targets[head.index], options=heads.options)
        pending += [(child, hidden) for child in reversed(head.children)]
    every = [losses[i] for i in range(heads.n)]
    torch.autograd.backward(every)
    return every


def error(own: dict[str, Tensor | None], right: dict[str, Tensor | None]) -> float:
    """The largest relative error of a parameter's gradient; both must have gradients of the same parameters."""
    assert {name for name, g in own.items() if g is None} == {name for name, g in right.items() if g is None}
    pairs = [(own[name], g) for name, g in right.items() if g is not None]
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs if a is not None)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_strategy_has_the_gradient_of_one_plain_backward(family: str, tied: bool, checkpointed: bool) -> None:
    kind = KINDS[list(FAMILIES).index(family) % len(KINDS)] if tied else "parallel"
    model = from_hf(language_model(family, tie_word_embeddings=tied), N, kind).train()
    if checkpointed:
        model.checkpoint_trunk(1)
    batch = make_batch(torch.randint(1, 131, (2, 17)), N)
    right = gradients(model, lambda: plain_joint(model, batch.tokens, batch.targets))
    for spec in SAME_ORDER:
        own = gradients(model, lambda spec=spec: forward_backward(model, batch, load_strategy(spec)))  # type: ignore[misc]
        assert error(own, right) == 0, spec
    written_out = gradients(model, lambda: plain_step(model, batch, None, 1.0))  # no tree, no junctions
    knows_a_cap = family != "gemma2"
    for spec in (*CHUNKED, "auto", *(["native"] if knows_a_cap else [])):
        own = gradients(model, lambda spec=spec: forward_backward(model, batch, load_strategy(spec)))  # type: ignore[misc]
        assert error(own, written_out) < 5e-6, spec
    if not knows_a_cap:
        with pytest.raises(BadInput, match="strategy 'native' has no softcap in its loss; those that have: naive, "):
            forward_backward(model, batch, load_strategy("native"))
    assert error(right, written_out) < 5e-6


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_low_precision(kind: Any) -> None:
    model = from_hf(language_model("llama"), N, kind).train().bfloat16()
    batch = make_batch(torch.randint(1, 131, (2, 17)), N)
    right = gradients(model, lambda: plain_joint(model, batch.tokens, batch.targets))
    for spec in SAME_ORDER:
        own = gradients(model, lambda spec=spec: forward_backward(model, batch, load_strategy(spec)))  # type: ignore[misc]
        assert error(own, right) == 0, spec


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["parallel", "deepseek", "medusa"])
def test_head_1_is_the_model_s_own(family: str, kind: Any) -> None:
    lm = language_model(family).eval()
    ids = torch.randint(1, 131, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # padding on the left, which every layer has to be told of
    own, padded = lm(ids).logits, lm(ids, attention_mask=mask).logits
    model = from_hf(lm, N, kind).eval()
    assert torch.equal(model(ids)[0], own)
    assert torch.equal(model(ids, attention_mask=mask)[0], padded)
    assert not torch.equal(own[0], padded[0])


@pytest.mark.parametrize("kind", ["causal", "linear"])
def test_the_model_can_be_had_back(kind: Any) -> None:
    lm = language_model("gemma2").eval()
    ids, names = torch.randint(1, 131, (1, 9)), [name for name, _ in lm.named_parameters()]
    before = lm(ids).logits
    back = from_hf(lm, N, kind).to_hf()
    assert [name for name, _ in back.named_parameters()] == names
    assert torch.equal(back(ids).logits, before)


def test_further_heads_have_weights_of_their_own() -> None:
    model = from_hf(language_model("llama"), N)
    first, second, third = (next(layer.parameters()) for layer in model.head_layers)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert sum(p.numel() for own in model.groups().values() for p in own) == sum(p.numel() for p in model.parameters())


def test_depths_of_the_config_are_n_and_kind() -> None:
    lm = language_model("qwen2")
    lm.config.num_nextn_predict_layers = 2
    model = from_hf(lm)
    assert (model.n_future, model.kind) == (3, "deepseek")


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, dtype) for family in FAMILIES for dtype in ("fp32", "bf16")), ("gemma2", "bf16-mixed")],
)
def test_predicted_bytes_equal_tracked_ones(tmp_path: Path, family: str, dtype: Any) -> None:
    checkpointing = "full" if dtype == "fp32" else "none"
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES[family](**TINY).to_dict(), default=str))
    profile = huggingface_profile(tmp_path, "deepseek" if dtype == "bf16" else None)
    workload = dataclasses.replace(profile.workload, batch=2, sequence=32, dtype=dtype)
    config, training = profile.model.with_n(N), Training(trunk_checkpointing=checkpointing)
    model = make_model(config, dtype=dtype)
    set_up(model, training)
    optimizer, batch = make_optimizer(model), make_batch(torch.randint(131, (2, 32)), N)
    simulation = Simulation(config, workload, training, cuda=False)
    half = int(dtype == "bf16")  # every family meets every strategy, in one of the two dtypes
    for spec in (*SAME_ORDER, *CHUNKED)[half::2]:
        step = TrainingStep(model, optimizer, batch, load_strategy(spec), training=training)
        step()
        real, simulated = track(step), simulation.trace(load_strategy(spec))
        assert simulated.baseline == real.baseline
        assert simulated.peak().nbytes == real.peak().nbytes, spec
        assert simulated.phase_peaks() == real.phase_peaks(), spec


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.json")))
def test_a_real_config_is_the_class_s_own_model_or_refused_by_name(name: str) -> None:
    path = CONFIGS / f"{name}.json"
    if name in REFUSED:
        with pytest.raises(BadInput, match=REFUSED[name]):
            parameters(huggingface_profile(path).model.with_n(1))
        return
    profile = huggingface_profile(path)
    settings = json.loads(profile.model.settings)  # type: ignore[attr-defined]
    with torch.device("meta"):
        config = transformers.CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
        own = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    assert sum(parameters(profile.model.with_n(1)).values()) == own == PUBLISHED.get(name, own)
    documented = (CONFIGS.parents[1] / "docs/own-trainer.md").read_text()
    assert f"| {name} | {json.loads(path.read_text())['model_type']} | {own:,} | as the class" in documented
    if name == "qwen3-next-80b":  # its linear attention is a loop in Python without a GPU: 10 seconds
        return
    workload = dataclasses.replace(profile.workload, sequence=256, dtype="bf16")
    trace = simulate(profile.model.with_n(2), workload, load_strategy("sequential"), gpu=load_gpu("h200"))
    assert predicted(trace, load_gpu("h200"))["peak_allocated_bytes"] > trace.baseline > 4 * own


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bert-base", "is the config of a BertForMaskedLM"),
        ("vit", "is the config of a ViTForImageClassification"),
        ("t5-small", "an encoder with a decoder"),
        ("adapter", "is an adapter's config.*base model 'meta-llama/Llama-3.1-8B'"),
    ],
)
def test_what_is_no_decoder(name: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        huggingface_profile(CONFIGS / "refused" / f"{name}.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "not a JSON list"),
        ('{"model_type": ', "not a whole JSON object"),
        ("{}", "has no model_type"),
        ('{"model_type": "llama", "num_hidden_layers": 1000000000000}', "num_hidden_layers = 1000000000000: no mach"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "cannot read it|must be"),
        ('{"model_type": "llama", "intermediate_size": -5}', "model.ffn_dim = -5: must be at least 1"),
        ('{"model_type": "blt"}', "'BltConfig' object has no attribute 'hidden_size'"),
    ],
)
def test_what_is_no_config(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadInput, match=words):
        huggingface_profile(tmp_path)


def test_data_dependent_routing_is_refused_by_operator_and_module(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    (tmp_path / "config.json").write_text(json.dumps(transformers.Qwen3MoeConfig(**TINY, **experts).to_dict()))
    profile = huggingface_profile(tmp_path)
    workload = dataclasses.replace(profile.workload, sequence=32, dtype="fp32")
    with pytest.raises(BadInput, match=r"mlp.experts \(Qwen3MoeExperts\) cannot be predicted: .*grouped_mm"):
        simulate(profile.model.with_n(2), workload, load_strategy("naive"))


def test_a_profile_may_name_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(transformers.LlamaConfig(**TINY).to_dict()))
    path = tmp_path / "mine.toml"
    path.write_text('hf = "config.json"\n[model]\nhead = "causal"\n[workload]\nsequence = 32\n[sweep]\nn = [1, 3]\n')
    profile = load_profile(str(path))
    assert (profile.name, profile.model.head, profile.model.dim, profile.workload.sequence) == (
        "mine",
        "causal",
        64,
        32,
    )
    assert profile.sweep.n == (1, 3)
    path.write_text('hf = "config.json"\n[model]\ndim = 3\n')
    with pytest.raises(BadInput, match="beside hf: the config describes the model"):
        load_profile(str(path))


def test_bad_arguments() -> None:
    with pytest.raises(BadInput, match="n, the number of heads, is not given"):
        from_hf(language_model("llama"))
    with pytest.raises(BadInput, match="kind = 'twisted': valid: parallel"):
        from_hf(language_model("llama"), 2, "twisted")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="n = 0: must be at least 1"):
        from_hf(language_model("llama"), 0)
    with pytest.raises(BadInput, match="Linear is no transformers model"):
        from_hf(torch.nn.Linear(2, 2), 2)
    model = from_hf(language_model("llama"), 2)
    z = model.trunk(torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(BadInput, match="not the tensor that this step's trunk"):
        model.heads(z * 1)
