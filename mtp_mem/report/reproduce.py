"""The command that reproduces a group of records."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from typing import Any

from mtp_mem.config.gpus import load_gpus
from mtp_mem.config.profiles import builtin_profiles, load_profile
from mtp_mem.config.schema import ModelConfig, Profile, Training, Workload
from mtp_mem.runs.identity import MODEL_DEFAULTS, training_facts
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
    env, facts = first.environment, training_facts(first)
    commit = f", commit {env['commit']}" if env["commit"] else ""
    lines = [f"# mtp_mem {env['mtp_mem']}{commit}, torch {env['torch']}"]
    predicted = first.exactness == "predicted"
    ranks = facts.pop("world") if facts["sharding"] != "none" and not predicted else None  # --nproc names them
    others = _model_of_another(first, facts)
    profiles = () if others else map(load_profile, builtin_profiles())
    shipped = next((profile for profile in profiles if _same(profile, first)), None)
    if others:
        lines.append(f"# {others[0]}")
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
        words += _differences(facts, shipped.training.facts(shipped.workload.dtype))
    if predicted:
        gpu = next((name for name, gpu in load_gpus().items() if gpu.name == env.get("target")), None)
        words += ["--gpu", gpu] if gpu else []
        if gpu is None:
            lines.append(f"# --gpu: {env.get('target')} is none of this version's GPUs")
    else:
        words += ["--device", first.backend]
        words += ["--nproc", _value(ranks)] if ranks else []
        if first.workload.get("tokenizer") != "uniform" and first.workload["source"] != DEFAULT_TEXT:
            lines.append(f"# add --text FILE: {first.workload['source']}")
    return "\n".join([*lines, shlex.join(words)])


def _model_of_another(record: Record, facts: dict[str, Any]) -> list[str]:
    """A user's own or a Hugging Face model: its description, then the options that select it; empty for others."""
    model, workload = record.model, record.workload
    words = ["--batch", workload["batch"], "--sequence", workload["sequence"], "--dtype", facts["precision"]]
    if "architecture" in model:
        says = f"config.json: the {model['architecture']} whose settings have the digest {model.get('settings')}"
        words = [says, "--hf", "config.json", "--kind", model["head"], *words]
    elif "factory" in model:
        words = [f"the module's source has the digest {model.get('source')}", "--model", model["factory"], *words]
    else:
        return []
    usual = Training().facts(workload["dtype"])
    return [*map(str, words), *_differences(facts, usual | {"precision": words[-1]})]


def _differences(facts: dict[str, Any], usual: dict[str, Any]) -> list[str]:
    """Options for each part of a training setup that differs from the usual one."""
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
    model, workload = {**MODEL_DEFAULTS, **record.model}, dataclasses.asdict(profile.workload)
    return all(model[k] == v for k, v in profile.model.facts().items() if k != "n_future") and all(
        record.workload.get(k, v) == v for k, v in workload.items() if k != "dtype"
    )


def _toml(record: Record) -> list[str]:
    rows = []
    for title, kind in (("model", ModelConfig), ("workload", Workload), ("training", Training)):
        table = getattr(record, title)
        names = [f.name for f in dataclasses.fields(kind) if f.name != "n_future" and table.get(f.name) is not None]
        rows += [f"[{title}]", *(f"{name} = {json.dumps(table[name])}" for name in names)]
    return rows
