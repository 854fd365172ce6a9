"""The command that reproduces a group of records."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from typing import Any

from mtp_mem.config.gpus import load_gpus
from mtp_mem.config.profiles import builtin_profiles, load_profile
from mtp_mem.config.schema import ModelConfig, Profile, Training, Workload
from mtp_mem.runs.identity import training_facts
from mtp_mem.runs.record import Record

DEFAULT_TEXT = "CPython's pydoc_data.topics"


def command(records: Sequence[Record]) -> str:
    """The shell lines; a profile that is not a shipped one is written out first, comments name what a record lacks.

    Args:
        records: of one group (mtp_mem/runs/read_results.py).
    """
    first = records[0]
    ns = list(dict.fromkeys(r.n for r in records))
    specs = list(dict.fromkeys(r.strategy for r in records))
    env = first.environment
    commit = f", commit {env['commit']}" if env["commit"] else ""
    lines = [f"# mtp_mem {env['mtp_mem']}{commit}, torch {env['torch']}"]
    predicted = first.exactness == "predicted"
    shipped = next((p for name in builtin_profiles() if _same(p := load_profile(name), first)), None)
    others = _model_of_another(first)
    if others:
        lines.append(f"# {_line(others[0])}")
    elif shipped is None:
        lines += ["cat > profile.toml <<'END'", *_toml(first), "END"]
    words = ["mtp-mem", "predict" if predicted else "compare"]
    words += others[1:] or ["--profile", shipped.name if shipped else "profile.toml"]
    if shipped is None or tuple(ns) != shipped.sweep.n:
        words += ["--n", ",".join(map(str, ns))]
    if shipped is None or tuple(specs) != shipped.sweep.strategies:
        listed = [s for s in specs if "," not in s]
        words += ["--strategies", ",".join(listed)] if listed else []
        words += [word for s in specs if "," in s for word in ("--strategy", s)]
    if shipped is not None:
        words += _setup(first, shipped)
    if predicted:
        gpu = next((name for name, gpu in load_gpus().items() if gpu.name == env.get("target")), None)
        words += ["--gpu", gpu] if gpu else []
        if gpu is None:
            lines.append(f"# --gpu: {_line(env.get('target'))} is none of this version's GPUs")
    else:
        words += ["--device", first.backend]
        words = _on_ranks(words, training_facts(first))
        if first.workload.get("tokenizer") != "uniform" and first.workload["source"] != DEFAULT_TEXT:
            lines.append(f"# add --text FILE: {_line(first.workload['source'])}")
    return "\n".join([*lines, shlex.join(words)])


def _on_ranks(words: list[str], facts: dict[str, Any]) -> list[str]:
    """The command with the ranks that a sharded step runs on."""
    if facts["sharding"] == "none":
        return words
    if "--world" in words:
        place = words.index("--world")
        words = words[:place] + words[place + 2 :]
    return [*words, "--nproc", _value(facts["world"])]


def _model_of_another(record: Record) -> list[str]:
    """A user's own or a Hugging Face model: its description, then the options that select it; empty for others."""
    model, workload = record.model, record.workload
    words = ["--batch", workload["batch"], "--sequence", workload["sequence"]]
    words += ["--dtype", training_facts(record)["precision"]]
    if "architecture" in model:
        says = f"config.json: the {model['architecture']} whose settings have the digest {model.get('settings')}"
        words = [says, "--hf", "config.json", "--kind", model["head"], *words]
    elif "factory" in model:
        words = [f"the module's source has the digest {model.get('source')}", "--model", model["factory"], *words]
    else:
        return []
    usual = Training().facts(workload["dtype"])
    return [*map(str, words), *_differences(training_facts(record), usual | {"precision": words[-1]})]


def _setup(record: Record, profile: Profile) -> list[str]:
    """Options for each part of the record's training setup that differs from the profile's."""
    return _differences(training_facts(record), profile.training.facts(profile.workload.dtype))


def _differences(facts: dict[str, Any], usual: dict[str, Any]) -> list[str]:
    words = []
    for name, value in facts.items():
        if name in usual and name != "master_weights" and _value(value) != _value(usual[name]):
            words += [f"--{name.replace('_', '-')}", _value(value)]
    return words


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _same(profile: Profile, record: Record) -> bool:
    """Whether the record could come from this profile, at any n, with any strategy and dtype."""
    model, workload = profile.model.facts(), dataclasses.asdict(profile.workload)
    defaults = {f.name: f.default for f in dataclasses.fields(ModelConfig)}  # a record may be older than a field
    return all(record.model.get(k, defaults[k]) == v for k, v in model.items() if k != "n_future") and all(
        record.workload.get(k, v) == v for k, v in workload.items() if k != "dtype"
    )


def _toml(record: Record) -> list[str]:
    model = {f.name: record.model.get(f.name) for f in dataclasses.fields(ModelConfig) if f.name != "n_future"}
    workload = {f.name: record.workload.get(f.name) for f in dataclasses.fields(Workload)}
    training = {f.name: record.training.get(f.name) for f in dataclasses.fields(Training)}
    rows = []
    for title, table in (("model", model), ("workload", workload), ("training", training)):
        rows += [f"[{title}]", *(f"{k} = {json.dumps(v)}" for k, v in table.items() if v is not None)]
    return rows


def _line(value: Any) -> str:
    return " ".join(str(value).split())
