"""The record of one case: what was run, where, and what came out."""

import dataclasses
import marshal
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal

from mtp_mem.config.schema import LARGEST_SIZE, MOST_MODULES, ModelConfig
from mtp_mem.config.toml import convert, describe, from_table, short
from mtp_mem.errors import BadInput
from mtp_mem.verification.gradient_error import Verdict

SCHEMA = 1
"""Fields are added, never renamed, within a schema version."""

Backend = Literal["cuda", "cpu", "fake"]
Exactness = Literal["measured", "tracked", "predicted"]
EXACTNESS: dict[Backend, Exactness] = {"cuda": "measured", "cpu": "tracked", "fake": "predicted"}

LARGEST = 2**63
TIMES, LEAST = ("step_ms", "step_ms_p20", "step_ms_p80", "tokens_per_s"), 1e-9
ERRORS = ("gradient_error", "gradient_noise")
NOT_FINITE = ("inf", "-inf", "nan")

MODULES = ("n_layers", "n_future", "medusa_blocks")
SIZES = ("vocab_size", "dim", "n_attention_heads", "n_kv_heads", "ffn_dim", "head_dim", "batch", "sequence")
Hints = dict[str, Any]
FIELDS: dict[str, tuple[Hints, Hints]] = {
    "model": (
        {"vocab_size": int, "dim": int, "n_layers": int, "n_attention_heads": int, "n_kv_heads": int | None}
        | {"ffn_dim": int | None, "n_future": int, "head": str, "unembedding": str, "match_layers": bool},
        {"medusa_blocks": int, "head_dim": int | None, "rope_theta": float, "norm_eps": float}
        | {"qkv_bias": bool, "qk_norm": bool, "architecture": str, "settings": str, "factory": str, "source": str},
    ),
    "workload": (
        {"batch": int, "sequence": int, "dtype": str, "source": str},
        {"tokenizer": str, "seed": int, "clip_norm": float, "digest": str},
    ),
    "environment": (
        {"mtp_mem": str, "torch": str, "device": str, "cpu": str, "commit": str | None},
        {"code": str, "target": str, "target_bytes": int, "threads": int, "variables": dict[str, str]},
    ),
}
"""Keys and types of a record's nested fields: those that every record has, and those that not every record has."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One case: a strategy at one n under one instrument. Bytes are integers; a figure that does not exist is None."""

    schema: int = SCHEMA
    case: str  # identifies the case and everything its figures depend on
    created_at: str
    backend: Backend
    exactness: Exactness
    strategy: str
    implementation: str = ""  # version of its kernel's library, or digest of its source where it is not ours
    n: int
    status: Literal["ok", "oom", "error"]
    chosen: str | None = None  # of a strategy such as `auto`: what it chose, and why
    error: str | None = None
    baseline_bytes: int | None = None
    peak_requested_bytes: int | None = None
    peak_over_baseline_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_phase: str | None = None
    peak_op: str | None = None
    phase_peaks: dict[str, int] | None = None
    floor_requested_bytes: int | None = None  # peak of the same step without any logits (mtp_mem/prediction/floor.py)
    floor_allocated_bytes: int | None = None
    steps_before: int | None = None  # steps run before the measured one: the first has no optimizer state yet
    bytes_at_peak: dict[str, int] | None = None
    peak_spread_bytes: int | None = None  # largest minus smallest allocated peak of the repeats
    live_unnamed_bytes: int | None = None  # live before the step in no tensor of ours: cuBLAS workspaces
    alloc_retries: int | None = None
    nvml_process_bytes: int | None = None
    host_rss_bytes: int | None = None
    largest_rank: int | None = None  # of several ranks the one whose bytes these are
    collectives: dict[str, int] | None = None  # number in one step, by kind
    collective_bytes: dict[str, int] | None = None  # in one step, by kind: gathered parameters, gradients to reduce
    tokens_per_s: float | None = None
    step_ms: float | None = None
    step_ms_p20: float | None = None
    step_ms_p80: float | None = None
    others_cpu: float | None = None  # share of the machine's CPU time that others took while steps were timed
    disturbed: bool | None = None  # whether that, or the spread of the steps, makes the times unreliable
    gradient: Verdict = "unchecked"
    gradient_error: float | None = None  # relative, the largest of the model's parts
    gradient_group: str | None = None  # the part that has it
    gradient_reference: str | None = None  # whose gradients these were held against
    gradient_noise: float | None = None  # error of the reference's second run against its first
    losses: tuple[float, ...] | None = None
    parameters: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    workload: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON object; a number that JSON cannot hold (an infinite error or loss) becomes "inf", "-inf" or "nan"."""
        table = dataclasses.asdict(self)
        table |= {key: _spelt(table[key]) for key in ERRORS}
        return table | {"losses": self.losses and [_spelt(loss) for loss in self.losses]}

    @staticmethod
    def from_json(table: dict[str, Any]) -> "Record":
        """The record of a JSON object; fields that this version does not know are dropped.

        Raises:
            BadInput: another schema version, a field whose type or value no record has, or no record at all.
        """
        schema = table.get("schema")
        if schema != SCHEMA:
            newer = "; update mtp_mem" if isinstance(schema, int) and schema > SCHEMA else ""
            raise BadInput(f"schema {schema!r}; this version reads schema {SCHEMA}{newer}")
        known = {name: table[name] for name in Record.__dataclass_fields__ if name in table}
        known |= {key: math.inf for key in ERRORS if known.get(key) == "inf"}
        if isinstance(losses := known.get("losses"), list):
            known["losses"] = [float(loss) if loss in NOT_FINITE else loss for loss in losses]
        for group in FIELDS:
            if isinstance(facts := known.get(group, {}), dict):
                known[group] = _checked(group, marshal.dumps(facts, 2))
        record = from_table(Record, known)
        for name, value in known.items():
            largest = math.inf if name in ERRORS else LARGEST
            if isinstance(value, (int, float)) and not 0 <= value <= largest:
                raise BadInput(f"{name} = {short(value)}: expected a number from 0 to 2**63")
        for name in TIMES:
            if (value := known.get(name)) is not None and value < LEAST:
                raise BadInput(f"{name} = {value}: expected at least {LEAST}")
        if not 1 <= record.n <= MOST_MODULES:
            raise BadInput(f"n = {record.n}: not a number of heads")
        return record


@lru_cache(maxsize=1024)
def _checked(group: str, written: bytes) -> dict[str, Any]:
    """Nested fields as `marshal` writes them: one table for all records that have the same, checked once.

    Raises:
        BadInput: a field is missing, or has a type or value that no record has.
    """
    facts: dict[str, Any] = marshal.loads(written)
    needed, other = FIELDS[group]
    for key, hint in needed.items():
        if key not in facts:
            raise BadInput(f"key {group}.{key} is missing (expected {describe(hint)})")
    for key, hint in {**needed, **other}.items():
        value = convert(hint, facts[key], f"{group}.{key}") if key in facts else None
        largest = MOST_MODULES if key in MODULES else LARGEST_SIZE
        if type(value) is int and key in (*MODULES, *SIZES) and not 1 <= value <= largest:
            raise BadInput(f"{group}.{key} = {value}: must be from 1 to {largest}")
    return facts


def _spelt(number: float | None) -> float | str | None:
    """The number, or its name where JSON has none for it."""
    return number if number is None or math.isfinite(number) else str(number)


def new_record(
    case: str,
    strategy: str,
    implementation: str,
    config: ModelConfig,
    workload: dict[str, Any],
    *,
    training: dict[str, Any],
    backend: Backend,
    environment: dict[str, Any],
    parameters: int,
    floor: dict[str, Any],
    facts: dict[str, Any],
) -> Record:
    """The record of a case that has just ended.

    Args:
        case: names everything the figures depend on (mtp_mem/runs/identity.py).
        strategy: the spec.
        implementation: which version of its code, where it is not ours.
        config: the model, with its n.
        workload: batch, sequence, dtype, and where the tokens came from.
        training: the training setup (`Training.facts`).
        backend: the instrument.
        environment: machine and versions.
        parameters: their number in the model.
        floor: the record's fields for the step without logits.
        facts: the record's fields for this case; `status` is one of them.
    """
    return Record(
        case=case,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        backend=backend,
        exactness=EXACTNESS[backend],
        strategy=strategy,
        implementation=implementation,
        n=config.n_future,
        parameters=parameters,
        model=config.facts(),
        workload=workload,
        training=training,
        environment=environment,
        floor_requested_bytes=floor.get("peak_requested_bytes"),
        floor_allocated_bytes=floor.get("peak_allocated_bytes"),
        **facts,
    )
