"""Profiles from Hugging Face configs: the right shape, every difference named with its size, nothing half-written."""

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hf_configs import CONFIGS, NAMES, PUBLISHED, changed

from mtp_mem.config.profiles import load_profile, to_toml, write_new
from mtp_mem.config.schema import Profile
from mtp_mem.config.toml import from_table
from mtp_mem.errors import BadInput
from mtp_mem.model.hf import FAMILIES, Conversion, convert
from mtp_mem.model.parameters import parameters

WEIGHTY = {"deepseek-v3", "gemma-2-2b", "qwen3-0.6b"}


def made(name: str, **options: Any) -> Conversion:
    return convert(CONFIGS / f"{name}.json", name=name, **{"approximate": name in WEIGHTY} | options)


def texts(path: Path, **options: Any) -> str:
    found = convert(path, name="x", approximate=True, **options).differences
    return "\n".join(difference.text for difference in found)


def test_every_family_has_a_config() -> None:
    assert {json.loads((CONFIGS / f"{name}.json").read_text())["model_type"] for name in NAMES} == set(FAMILIES)
    assert set(PUBLISHED) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_and_what_is_named_add_up_to_the_published_parameters(name: str) -> None:
    found = made(name)
    written = sum(parameters(found.profile.model).values())
    assert written + sum(difference.parameters for difference in found.differences) == PUBLISHED[name]
    assert (found.parameters, found.written) == (PUBLISHED[name], written)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    found = made(name)
    path = tmp_path / f"{name}.toml"
    write_new(path, to_toml(found.profile, [difference.text for difference in found.differences]))
    assert load_profile(str(path)) == found.profile
    comments = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    for difference in found.differences:
        assert difference.text in comments
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_llama_is_the_shipped_profile() -> None:
    found, shipped = made("llama-3-8b", sequence=8192).profile, load_profile("llama3-8b")
    assert found.model.rope_theta == 500_000  # the shipped one has the default: no byte depends on it
    # The shipped one also runs chunked_tokens.
    found = dataclasses.replace(found, sweep=dataclasses.replace(found.sweep, strategies=shipped.sweep.strategies))
    assert (found.workload, found.sweep) == (shipped.workload, shipped.sweep)
    assert (
        to_toml(found).replace("rope_theta = 500000.0\n", "").split("[model]")[1]
        == (to_toml(shipped).split("[model]")[1])
    )
    assert made("llama-3-8b").differences == ()


def test_tied_and_shared() -> None:
    unembeddings = {name: made(name).profile.model.unembedding for name in NAMES}
    assert {name for name, kind in unembeddings.items() if kind == "tied"} == {"gemma-2b", "gemma-2-2b", "qwen3-0.6b"}
    assert set(unembeddings.values()) == {"tied", "shared"}


def test_mtp_depths_become_heads(tmp_path: Path) -> None:
    found = made("deepseek-v3").profile
    assert (found.model.head, found.model.match_layers, found.sweep.n) == ("deepseek", False, (1, 2))
    assert found.model.with_n(2).trunk_layers == 60  # head 1 is the main model's last layer
    assert found.model.ffn_dim == 9 * 2048
    path = changed(tmp_path, "deepseek-v3", num_nextn_predict_layers=0)
    plain = convert(path, name="x", approximate=True).profile
    assert (plain.model.head, plain.model.match_layers, plain.sweep.n) == ("parallel", True, (1, 2, 4, 8))


def test_step_and_heads_asked_for(tmp_path: Path) -> None:
    assert made("llama-3-8b").profile.workload.sequence == 4096
    asked = made("llama-3-8b", n=(1, 32), batch=2, sequence=16384)
    assert (asked.profile.sweep.n, asked.profile.workload.batch) == ((1, 32), 2)
    assert "max_position_embeddings = 8192: S = 16384 goes beyond it" in asked.differences[0].text
    short = convert(changed(tmp_path, "llama-3-8b", max_position_embeddings=512, num_hidden_layers=3), name="x").profile
    assert (short.workload.sequence, short.sweep.n) == (512, (1, 2))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama-3-8b", {"attention_bias": True}, "q, k, v and o have biases there and none here: 10240 parameters"),
        ("llama-3-8b", {"mlp_bias": True}, "gate, up and down have biases there and none here: 32768 parameters"),
        ("llama-3-8b", {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling = 'llama3'"),
        ("llama-3-8b", {"rope_theta": ..., "rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn"}}, "'yarn'"),
        ("llama-3-8b", {"hidden_act": "gelu"}, "gate of 'gelu': it is SiLU here; the bytes are the same"),
        ("llama-3-8b", {"torch_dtype": "float16"}, 'torch_dtype = "float16"'),
        ("llama-3-8b", {"attention_dropout": 0.1}, "attention_dropout = 0.1: no dropout here"),
        ("llama-3-8b", {"tie_word_embeddings": ..., "residual_scale\n": 2}, "not looked at: 'residual_scale\\n'"),
        ("mistral-7b-v0.1", {"sliding_window": ...}, "as transformers has it: sliding_window = 4096"),
        ("qwen2-7b", {"use_sliding_window": True}, "sliding_window = 131072"),
        ("qwen2-7b", {}, "q, k and v have biases there and none here: 4608 parameters a layer"),
        ("qwen3-8b", {}, "256 parameters a layer, and 40.6 MiB"),
        ("gemma-2b", {"tie_word_embeddings": ...}, "as transformers has it: tie_word_embeddings = true"),
        ("gemma-2-2b", {}, "final_logit_softcapping = 30.0"),
        ("gemma-2-2b", {"final_logit_softcapping": ...}, "final_logit_softcapping = 30.0"),
        ("gemma-2-2b", {}, "attn_logit_softcapping = 50.0"),
        ("gemma-2-2b", {}, "sliding_window = 4096"),
        ("gemma-2-2b", {}, "the 16 heads here have D / H = 144 channels"),  # 288 are too many for flash attention
        ("deepseek-v3", {"attention_bias": True}, "the projections to low rank and o have biases"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ("deepseek-v3", {}, "n_routed_experts = 256"),
        ("deepseek-v3", {}, "quantization_config"),
    ],
)
def test_what_differs_is_named(tmp_path: Path, name: str, changes: dict[str, Any], words: str) -> None:
    assert words in texts(changed(tmp_path, name, **changes))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral-7b-v0.1", {"sliding_window": None}),
        ("qwen2-7b", {"use_sliding_window": False}),
        ("gemma-2-2b", {"final_logit_softcapping": None, "attn_logit_softcapping": None, "sliding_window": None}),
    ],
)
def test_what_a_config_switches_off_is_not_named(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    found = texts(changed(tmp_path, name, **changes))
    assert "softcapping" not in found
    assert "sliding_window" not in found


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("qwen3-0.6b", {}, ["head_dim = 128"]),
        ("gemma-2-2b", {"head_dim": 288}, ["final_logit_softcapping", "1.95 GiB"]),
        ("deepseek-v3", {}, ["kv_lora_rank = 512", "n_routed_experts = 256"]),
        ("llama-3-8b", {"hidden_act": "relu"}, ["gate of 'relu'"]),
        ("gemma-2b", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
    ],
)
def test_another_model_is_refused(tmp_path: Path, name: str, changes: dict[str, Any], words: list[str]) -> None:
    path = changed(tmp_path, name, **changes)
    with pytest.raises(BadInput) as error:
        convert(path, name="x")
    for word in [str(path), "approximate", *words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert convert(path, name="x", approximate=True).profile.description.endswith("approximated")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_type": "mixtral"},
            "unknown model_type 'mixtral'; did you mean 'mistral'? Valid: llama, mistral, qwen2",
        ),
        ({"model_type": ...}, "key model_type is missing (expected one of llama, mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "has no logits; expected LlamaForCausalLM"),
        ({"architectures": [1]}, "expected a list of strings"),
        ({"vocab_size": ...}, "key vocab_size is missing (expected a whole number)"),
        ({"max_position_embeddings": ...}, "key max_position_embeddings is missing"),
        ({"hidden_size": "4096"}, 'hidden_size = "4096": expected a whole number'),
        ({"hidden_size": 4096.0}, "hidden_size = 4096.0: expected a whole number"),
        ({"num_hidden_layers": None}, "num_hidden_layers = null: expected a whole number of at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0: expected a whole number of at least 1"),
        ({"num_hidden_layers": True}, "num_hidden_layers = true: expected a whole number"),
        ({"head_dim": -1}, "head_dim = -1: expected a whole number of at least 0"),
        ({"tie_word_embeddings": "no"}, 'tie_word_embeddings = "no": expected true or false'),
        ({"rope_theta": float("inf")}, "rope_theta = inf: must be positive and finite"),
        ({"rope_scaling": [1]}, "rope_scaling = [1]: expected a JSON object"),
        ({"num_attention_heads": 33}, "must be an even multiple of n_attention_heads = 33"),
        ({"vocab_size": 10**30}, "no model of this shape can be made"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = changed(tmp_path, "llama-3-8b", **changes)
    with pytest.raises(BadInput) as error:
        convert(path, name="x")
    assert str(error.value).startswith(f"{path}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_profile_of_any_text_is_toml() -> None:
    profile = load_profile("quick")
    table = {"name": "odd", "description": 'a "b" \\ \n \x7f \U0001f600', "model": {}, "workload": {}}
    table["model"] = {"vocab_size": 67, "dim": 32, "n_layers": 4, "n_attention_heads": 2, "match_layers": False}
    table["workload"] = {"batch": profile.workload.batch, "sequence": 8}
    odd = from_table(Profile, table)
    assert from_table(Profile, {"name": "odd", **tomllib.loads(to_toml(odd, ["one\ntwo"]))}) == odd
