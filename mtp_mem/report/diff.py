"""What changed between two sets of results: pytest-benchmark's JSON or our own results.jsonl, old against new."""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mtp_mem.config.foreign import read_json
from mtp_mem.config.toml import convert
from mtp_mem.errors import BadInput
from mtp_mem.report.recommend import peak_bytes
from mtp_mem.runs.identity import key, machine, training_words
from mtp_mem.runs.read_results import read

Kind = Literal["memory", "time", "gradient"]


@dataclass(frozen=True)
class CaseFigures:
    """One case: its description, bytes, time and whether its gradient was right.

    `seconds` is the median time; `times_floor` is the time over that of the bare matrix products in the same round. A
    busy machine disturbs it less, so it is compared where both sides have it.
    """

    name: str
    nbytes: int | None
    seconds: float | None
    times_floor: float | None = None
    gradient: str | None = None


@dataclass(frozen=True)
class Results:
    """The cases of one file or folder, by what two results of one case share, and the device they were measured on."""

    path: Path
    device: str
    cases: dict[tuple[str, ...], CaseFigures]

    def without(self, other: "Results") -> list[str]:
        """Names of the cases that are missing in the other set."""
        return [figures.name for case, figures in self.cases.items() if case not in other.cases]


@dataclass(frozen=True)
class Change:
    """One figure of one case, before and after."""

    case: str
    kind: Kind
    old: float | str
    new: float | str | None
    worse: bool

    @property
    def share(self) -> float | None:
        """Relative change: new / old - 1."""
        if isinstance(self.old, str) or self.new is None or isinstance(self.new, str) or not self.old:
            return None
        return self.new / self.old - 1

    def to_json(self) -> dict[str, Any]:
        """A JSON object; a number that JSON cannot hold becomes "inf", "-inf" or "nan"."""
        table = {**dataclasses.asdict(self), "share": self.share}
        return {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in table.items()
        }


def load(path: Path, notes: list[str]) -> Results:
    """Read pytest-benchmark's JSON, our results.jsonl, or a folder with results.jsonl.

    Args:
        path: the file or folder.
        notes: what was skipped, and why, is added here.

    Raises:
        BadInput: it cannot be read, holds no case, or holds cases of several devices.
    """
    document = json_document(path, "benchmarks")
    if document is not None:
        return _benchmarks(path, document)
    records = [one.record for one in read([path], notes)]
    devices = {f"{machine(r)} ({r.exactness})" for r in records}
    if len(devices) > 1:
        raise BadInput(f"{path}: holds results of {', '.join(sorted(devices))}; compare one at a time")
    cases = {}
    for r in records:
        m, w = r.model, r.workload
        shape = f"V={m['vocab_size']} D={m['dim']} {training_words(r)} {w['batch']}x{w['sequence']}"
        cases[key(r)] = CaseFigures(
            f"{r.strategy} n={r.n} {shape}",
            peak_bytes(r),
            r.step_ms / 1e3 if r.step_ms else None,
            gradient=r.gradient if r.status == "ok" else r.status,
        )
    return Results(path, devices.pop(), cases)


def changes(old: Results, new: Results, memory: float, time: float) -> list[Change]:
    """Every figure of the old results that changed in the new ones, in the order of the new results.

    A figure of bytes or time that is gone, or is NaN now, is worse; one that was NaN before is not.

    Args:
        old: before.
        new: after, on the same device.
        memory: share by which bytes may grow.
        time: share by which times may grow.

    Raises:
        BadInput: different devices, or no case in common.
    """
    if old.device != new.device:
        raise BadInput(f"{old.path} was measured on {old.device}, {new.path} on {new.device}; not comparable")
    common = [case for case in new.cases if case in old.cases]
    if not common:
        raise BadInput(f"{old.path} and {new.path} have no case in common")
    differing = []
    for case in common:
        a, b = old.cases[case], new.cases[case]
        pairs: list[tuple[Kind, float | None, float | None, float]] = [("memory", a.nbytes, b.nbytes, memory)]
        if a.times_floor is not None and b.times_floor is not None:
            pairs.append(("time", a.times_floor, b.times_floor, time))
        else:
            pairs.append(("time", a.seconds, b.seconds, time))
        differing += [
            Change(b.name, kind, x, y, worse=not math.isnan(x) and (y is None or not y <= x * (1 + allowed)))
            for kind, x, y, allowed in pairs
            if x is not None and x != y
        ]
        if a.gradient != b.gradient and a.gradient is not None and b.gradient is not None:
            good = ("bit-identical", "within bound")
            worse = b.gradient not in good or (a.gradient == good[0] and b.gradient == good[1])
            differing.append(Change(b.name, "gradient", a.gradient, b.gradient, worse))
    return differing


def json_document(path: Path, key: str) -> dict[str, Any] | None:
    """The JSON document there, if it is one with this key (pytest-benchmark's has "benchmarks"); None otherwise.

    Raises:
        BadInput: there is no such file.
    """
    if os.path.isdir(path) or path.suffix == ".jsonl":
        return None
    try:
        document = read_json(path, nan=True)  # pytest-benchmark writes NaN, which counts as worse
    except BadInput:
        if not os.path.isfile(path):
            raise
        return None
    return document if isinstance(document, dict) and key in document else None


def _benchmarks(path: Path, document: dict[str, Any]) -> Results:
    cases: dict[tuple[str, ...], CaseFigures] = {}
    try:
        for bench in document["benchmarks"]:
            info = bench["extra_info"]
            nbytes = info.get("peak_over_inputs_bytes", info.get("max_rss_bytes"))
            name = str(bench["fullname"])
            floor = convert(float | None, info.get("times_floor"), "times_floor")
            median = convert(float, bench["stats"]["median"], "median")
            cases[(name,)] = CaseFigures(name, convert(int | None, nbytes, "bytes"), median, floor)
        facts = document["machine_info"]
        device = facts.get("mtp_mem", {}).get("device") or "unknown"
        if device == "cpu":
            device = facts["mtp_mem"]["cpu"]
    except (KeyError, TypeError, AttributeError, BadInput) as e:
        why = str(e) if isinstance(e, BadInput) else f"{type(e).__name__} {e}"
        raise BadInput(f"{path}: not a file of pytest-benchmark: {why}") from None
    if not cases:
        raise BadInput(f"{path}: holds no benchmark")
    return Results(path, device, cases)
