"""What a case is: everything that its figures depend on, for resuming, for tables and for `regressions` alike.

A setting is what records must share to stand in one table; a case is a setting, a strategy at one n, and the code.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import marshal
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from mtp_mem._util import fingerprint
from mtp_mem.config.schema import Dtype, ModelConfig, Training
from mtp_mem.config.toml import from_table
from mtp_mem.errors import BadInput
from mtp_mem.runs.record import Record

CONDITIONS: dict[str, Any] = {
    "threads": None,
    "variables": {},
    "matmul_precision": "highest",
    "tf32": False,
    "bf16_reduced_precision_reduction": True,
    "deterministic": False,
}
"""Facts of the environment that measured figures depend on, with their values for records older than the fact."""
MODEL_DEFAULTS = {
    field.name: field.default for field in dataclasses.fields(ModelConfig) if field.default is not dataclasses.MISSING
}
"""Values of the model's fields for records older than the field."""
CODE = ("code", "torch", "cuda", "cudnn", "driver", "cpu", "device", "target", "target_bytes")
"""Facts of the environment about code and machine."""


def implementation(strategy: object) -> str:
    """What tells this strategy's code from another version of it; empty for ours, whose code every record names.

    A strategy of a library's kernel has the library's version, one from elsewhere a digest of its module, or of all
    modules of its package.
    """
    if package := getattr(strategy, "package", ""):
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{package} of unknown version"
    module = type(strategy).__module__
    if module.startswith("mtp_mem."):
        return ""
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
    except ValueError:  # a module without a file, an interactive session's say
        spec = None
    roots = [Path(root) for root in (spec and spec.submodule_search_locations) or ()]
    files = [path for root in roots for path in sorted(root.rglob("*.py"))]
    if not files and spec and spec.origin:
        files = [Path(spec.origin)]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"source {digest.hexdigest()[:12]}"


def case_id(
    strategy: str,
    implementation: str,
    model: dict[str, Any],
    workload: dict[str, Any],
    training: dict[str, Any],
    environment: dict[str, Any],
    rounds: int | None = None,
) -> str:
    """The name of a case: a fingerprint of all that its figures depend on.

    Args:
        strategy: the spec.
        implementation: see `implementation`.
        model: the record's model, with its n.
        workload: the record's workload, with the digest of its text.
        training: the record's training setup.
        environment: the record's environment.
        rounds: timed steps, where there are any.
    """
    facts = {key: environment.get(key) for key in (*CONDITIONS, *CODE)}
    return fingerprint(strategy, implementation, model, workload, training, facts, rounds)


def machine(record: Record) -> str:
    """The machine of the figures: the device, the GPU predicted for, or the CPU."""
    env = record.environment
    target = env.get("target")
    if record.exactness == "predicted" and isinstance(target, str):
        return target
    return str(env["cpu"] if env["device"] == "cpu" else env["device"])


def setting(record: Record) -> dict[str, str]:
    """What records must share to stand in one table, as name and value: all but the strategy, n, and the code."""
    model = {**MODEL_DEFAULTS, **record.model}
    measured = record.exactness != "predicted"
    conditions = {key: record.environment.get(key, usual) for key, usual in CONDITIONS.items()} if measured else {}
    return {
        "machine": machine(record),
        "backend": record.backend,
        **{f"model.{key}": _text(value) for key, value in model.items() if key != "n_future"},
        **{f"workload.{key}": _text(value) for key, value in record.workload.items()},
        **{f"training.{key}": _text(value) for key, value in training_facts(record).items()},
        **{key: _text(value) for key, value in conditions.items()},
    }


def training_facts(record: Record) -> dict[str, Any]:
    """The record's training setup; of a record that is older than the field, the default one."""
    return {**_usual(record.workload["dtype"]), **record.training}


@cache
def _usual(dtype: Dtype) -> dict[str, Any]:
    return Training().facts(dtype)


def training_of(record: Record) -> Training | None:
    """The record's training setup; None where this version does not know it."""
    return _training(record.workload["dtype"], marshal.dumps(record.training, 2))


@lru_cache  # a report asks for each record's several times, and few setups stand in one
def _training(dtype: Dtype, written: bytes) -> Training | None:
    facts = {**_usual(dtype), **marshal.loads(written)}
    try:
        return from_table(Training, {field.name: facts[field.name] for field in dataclasses.fields(Training)})
    except BadInput:
        return None


def training_words(record: Record) -> str:
    """The training setup for people: precision, and what differs from the defaults."""
    training = training_of(record)
    words = ("another version's setup",) if training is None else training.words
    return ", ".join([_text(training_facts(record)["precision"]), *words])


def key(record: Record) -> tuple[str, ...]:
    """Equal for two records of one case, whatever versions of the code they were made with."""
    return (*(f"{name}={value}" for name, value in sorted(setting(record).items())), record.strategy, str(record.n))


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={value[key]}" for key in sorted(value, key=str))
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
