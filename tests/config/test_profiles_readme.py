"""profiles/README.md says what config.py accepts: every key, in order, with its type, default and valid values."""

import dataclasses
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

import pytest

from mtp_mem.config.gpus import GPU
from mtp_mem.config.profiles import load_profile
from mtp_mem.config.schema import ModelConfig, Profile, Sweep, Training, Workload

TEXT = (Path(__file__).parents[2] / "profiles/README.md").read_text()
TABLES: dict[str, type[Any]] = {
    "At the top": Profile,
    "`[model]`": ModelConfig,
    "`[workload]`": Workload,
    "`[training]`": Training,
    "`[sweep]`": Sweep,
    "GPUs: `[name]` in gpus.toml": GPU,
}
TYPES = {
    int: "whole number",
    float: "number",
    str: "string",
    bool: "true or false",
    tuple[int, ...]: "list of whole numbers",
    tuple[str, ...]: "list of strings",
}
IN_WORDS = {
    "name": "the file's name",
    "sweep": "its defaults",
    "training": "its defaults",
    "n_kv_heads": "`n_attention_heads`",
    "head_dim": "D / `n_attention_heads`",
    "logit_softcap": "none",
    "loss_scale": "1, in fp16 1024",
    "ffn_dim": "8/3 D, rounded up to 32",
}
"""Defaults that are no value."""


def rows(heading: str) -> dict[str, list[str]]:
    """key -> [type, default, valid, meaning] of the first table below a heading."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == 5 for row in cells)
    table = {row[0].strip("`"): row[1:] for row in cells}
    assert len(table) == len(cells)
    return table


def kind(hint: Any) -> str:
    if typing.get_origin(hint) in (types.UnionType, typing.Union) and type(None) not in typing.get_args(hint):
        return " or ".join(sorted(set(map(kind, typing.get_args(hint))), key=lambda word: (word != "string", word)))
    if type(None) in typing.get_args(hint):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return "string"
    return "table" if dataclasses.is_dataclass(hint) else TYPES[hint]


def default(cls: type[Any], field: dataclasses.Field[Any]) -> str:
    if (cls, field.name) == (GPU, "workspace_bytes"):
        return "by `capability` and torch's version"
    if (cls, field.name) == (GPU, "workspaces_kept"):
        return "by torch's version"
    if field.name in IN_WORDS and cls is not GPU:
        return IN_WORDS[field.name]
    if field.default is dataclasses.MISSING:
        return "needed"
    return f"`{json.dumps(field.default)}`"


@pytest.mark.parametrize("heading", TABLES)
def test_the_keys_are_the_fields(heading: str) -> None:
    assert list(rows(heading)) == [field.name for field in dataclasses.fields(TABLES[heading])]


@pytest.mark.parametrize("heading", TABLES)
def test_types_defaults_and_valid_values(heading: str) -> None:
    cls, documented = TABLES[heading], rows(heading)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        type_, default_, valid, meaning = documented[field.name]
        assert type_ == kind(hints[field.name]), field.name
        assert default_ == default(cls, field), field.name
        assert meaning, field.name
        if typing.get_origin(hints[field.name]) is typing.Literal:
            assert tuple(re.findall("`(.+?)`", valid)) == typing.get_args(hints[field.name]), field.name


def test_every_section_is_held_against_something() -> None:
    headings = set(re.findall(r"^## (.+)$", TEXT, re.MULTILINE))
    assert headings == {*TABLES, "From a Hugging Face `config.json`"}


def test_the_example_is_a_profile(tmp_path: Path) -> None:
    example = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    assert len(example) == 1
    (tmp_path / "example.toml").write_text(example[0])
    needed = {key for table in ("`[model]`", "`[workload]`") for key, row in rows(table).items() if row[1] == "needed"}
    assert set(re.findall(r"^(\w+) =", example[0], re.MULTILINE)) == needed
    assert load_profile(str(tmp_path / "example.toml")).sweep == Sweep()
