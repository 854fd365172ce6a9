"""Reads results files without writing to them: damaged lines are skipped and named."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mtp_mem.errors import BadInput
from mtp_mem.runs.identity import machine, setting
from mtp_mem.runs.record import Record
from mtp_mem.runs.results_file import NAMED, read_lines

SAID = 3
"""Notes that the error for files without a single usable record names in its one line."""


@dataclass(frozen=True)
class Located:
    """A record with its file and line."""

    record: Record
    path: Path
    line: int


def read(paths: Sequence[Path], notes: list[str]) -> list[Located]:
    """The records of results files, or of all `results.jsonl` below a folder; of records of one case only the last.

    Args:
        paths: files and folders.
        notes: what was skipped, and why, is added here, naming file and line.

    Raises:
        BadInput: a path that is not there or cannot be read, a folder without results, no usable record at all.
    """
    files = files_of(paths)
    located: dict[str, Located] = {}
    for file in files:
        usable = 0
        for line, record in read_lines(file, notes):
            located.pop(record.case, None)
            located[record.case] = Located(record, file, line)
            usable += 1
        if not usable:
            notes.append(f"{file}: {'no usable record' if os.path.getsize(file) else 'empty'}")
    if not located:
        more = [f"and {len(notes) - SAID} more"] if len(notes) > SAID else []
        raise BadInput("; ".join([*notes[:SAID], *more, "nothing to report: no usable record"]))
    return list(located.values())


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The given files, and the results files below the given folders, each once.

    Raises:
        BadInput: a folder without results.
    """
    return list(dict.fromkeys(file for path in paths for file in _files(path)))


def _files(path: Path) -> list[Path]:
    if not os.path.isdir(path):
        return [path]
    files = sorted(path.rglob("results.jsonl"))
    if not files:
        raise BadInput(f"{path}: holds no results.jsonl")
    return files


def groups(located: Sequence[Located], notes: list[str]) -> list[list[Record]]:
    """Records that may stand in one table: one setting (mtp_mem/runs/identity.py).

    Of several records of one strategy and n (from two versions of the code, say) the last is kept; `notes` names the
    others, and files that mix machines.
    """
    kept: dict[tuple[tuple[str, str], ...], dict[tuple[str, int], Located]] = {}
    settings: dict[str, tuple[tuple[str, str], ...]] = {}  # by the facts they follow from, which many records share
    replaced: list[str] = []
    for one in located:
        record = one.record
        facts = (record.backend, record.exactness, record.model, record.workload, record.training, record.environment)
        if (written := repr(facts)) not in settings:
            settings[written] = tuple(sorted(setting(record).items()))
        cases = kept.setdefault(settings[written], {})
        before = cases.pop((record.strategy, record.n), None)
        if before:
            replaced.append(
                f"{before.path}:{before.line}: replaced by {one.path}:{one.line}: {record.strategy} at n = {record.n}"
            )
        cases[record.strategy, record.n] = one
    notes += replaced[:NAMED]
    if len(replaced) > NAMED:
        notes.append(f"{len(replaced) - NAMED} more records are replaced by later ones of the same strategy and n")
    for path in dict.fromkeys(one.path for one in located):
        lines: dict[str, list[int]] = {}
        for one in located:
            if one.path == path:
                lines.setdefault(machine(one.record), []).append(one.line)
        if len(lines) > 1:
            where = "; ".join(f"{name} from line {min(numbers)}" for name, numbers in lines.items())
            notes.append(f"{path}: records of {len(lines)} machines, shown apart: {where}")
    return [[one.record for one in cases.values()] for cases in kept.values()]


def code_versions(records: Sequence[Record]) -> list[str]:
    """The versions of mtp_mem's code that a group was made with."""
    return list(dict.fromkeys(str(r.environment.get("code") or r.environment["mtp_mem"]) for r in records))
