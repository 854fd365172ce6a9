"""Profiles: what ships loads, and what is wrong is named with its file, its key and what would be valid."""

from pathlib import Path

import pytest

from mtp_mem.config.profiles import builtin_profiles, load_profile
from mtp_mem.errors import BadInput

GOOD = """
[model]
vocab_size = 300
dim = 32
n_layers = 3
n_attention_heads = 2

[workload]
batch = 2
sequence = 16

[sweep]
n = [1, 2]
"""


@pytest.mark.parametrize("name", list(builtin_profiles()))
def test_shipped_profiles_load(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.description


def test_quick_has_logits_that_dominate() -> None:
    profile = load_profile("quick")
    assert profile.model.vocab_size >= 16 * profile.model.dim
    assert profile.sweep.n == (1, 2, 4, 8)
    assert profile.sweep.strategies == ("naive", "sequential", "chunked_vocab", "chunked_tokens", "checkpointed")


def test_the_byte_model_has_an_unembedding_for_each_head() -> None:
    assert load_profile("mtp-7b-bytes").model.unembedding == "replicated"


def test_defaults(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(GOOD)
    profile = load_profile(str(tmp_path / "p.toml"))
    assert profile.name == "p"
    assert profile.model.with_n(2).trunk_layers == 1
    assert profile.workload.dtype == "fp32"


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("dim = 32", 'dim = "32"', ["model.dim = '32'", "expected a whole number"]),
        ("dim = 32", "dim = true", ["model.dim = True", "expected a whole number"]),
        ("dim = 32", "", ["model.dim is missing", "expected a whole number"]),
        ("dim = 32", "dimm = 32", ["unknown key 'model.dimm'", "did you mean 'model.dim'?"]),
        ("dim = 32", "dim = ", ["not valid TOML"]),
        ("n = [1, 2]", "n = [1, 'x']", ["sweep.n[1] = 'x'", "expected a whole number"]),
        ("n = [1, 2]", "n = 2", ["sweep.n = 2", "expected a list"]),
        ("n = [1, 2]", "n = [1, 4]", ["n = 4 heads", "valid: n from 1 to 3"]),
        ("n = [1, 2]", "n = []", ["sweep.n = []"]),
        ("n = [1, 2]", "n = [1, 1]", ["distinct"]),
        ("batch = 2", "batch = 0", ["workload.batch = 0", "at least 1"]),
        ("batch = 2", 'batch = 2\ndtype = "fp8"', ["workload.dtype", "unknown value 'fp8'", "bf16-mixed"]),
        ("dim = 32", 'dim = 32\nhead = "medussa"', ["model.head", "'medussa'", "did you mean 'medusa'?"]),
        ("dim = 32", 'dim = 32\nunembedding = "own"', ["model.unembedding", "shared, tied, replicated"]),
        ("batch = 2", "batch = 2\nhead = 'causal'", ["workload.head stands in the wrong table", "belongs to [model]"]),
        ("[model]", "dtype = 'bf16'\n[model]", ["key dtype stands in the wrong table", "belongs to [workload]"]),
        ("dim = 32", "dim = 32\nrope_theta = nan", ["model.rope_theta = nan", "positive and finite"]),
        ("dim = 32", "dim = 32\nnorm_eps = -1", ["model.norm_eps = -1.0", "at least 0"]),
        ("batch = 2", "batch = 2\nclip_norm = nan", ["workload.clip_norm = nan", "must be positive"]),
        ("[model]", "[modle]", ["unknown key 'modle'", "did you mean 'model'?"]),
        ("[model]", "model = 3\n[sweeep]", ["model = 3", "expected a table"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, before: str, after: str, words: list[str]) -> None:
    path = tmp_path / "p.toml"
    path.write_text(GOOD.replace(before, after))
    with pytest.raises(BadInput) as error:
        load_profile(str(path))
    assert "\n" not in str(error.value)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_a_profile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="unknown profile 'quik'; did you mean 'quick'"):
        load_profile("quik")
    with pytest.raises(BadInput, match="No such file"):
        load_profile(str(tmp_path / "none.toml"))
