"""The file of records: one JSON object a line, appended as each case ends, and replaced by newer ones only.

Two runs may write one file: each change is made under a lock, a line is whole or not there, the second run is told.
"""

import contextlib
import json
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

from mtp_mem._util import atomic_write, held, writable, writing
from mtp_mem.config.foreign import document, read_bytes
from mtp_mem.errors import BadInput
from mtp_mem.runs.identity import key
from mtp_mem.runs.record import Record

PATIENCE_S = 10
"""Seconds to wait for a lock that is held for milliseconds; a process that holds it longer has been stopped."""
NAMED = 20
"""Damaged lines of a file, or replaced records, that are named one by one; more are counted."""


def read_lines(path: Path, notes: list[str]) -> Iterator[tuple[int, Record]]:
    """Each record of a results file with the number of its line; other lines are skipped, and named in `notes`.

    Raises:
        BadInput: the file cannot be read.
    """
    skipped = 0
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            table = document(line)
            if not isinstance(table, dict):
                raise BadInput("not a JSON object")
            yield number, Record.from_json(table)
        except BadInput as e:
            skipped += 1
            if skipped <= NAMED:
                notes.append(f"{path}:{number}: skipped: {e}")
    if skipped > NAMED:
        notes.append(f"{path}: {skipped - NAMED} more lines are no records")


class ResultsFile:
    """A `results.jsonl` in the folder `out`; `notes` says what was skipped in reading it, and who else writes there.

    Raises:
        BadInput: the folder cannot be made or written.
    """

    def __init__(self, out: Path) -> None:
        self.path = writable(out) / "results.jsonl"
        self.notes: list[str] = []
        with writing(out):
            presence = os.open(out, os.O_RDONLY)
            weakref.finalize(self, os.close, presence)
            with self._alone():
                pass
        if not held(presence):
            self.notes.append(
                f"another run writes to {out} now: the records of both are kept, but each disturbs the other's times"
            )

    def read(self) -> list[Record]:
        """All records that can be read, oldest first; of records of one case only the last."""
        records: dict[str, Record] = {}
        for _, record in read_lines(self.path, self.notes):
            records[record.case] = record
        return list(records.values())

    def append(self, record: Record) -> None:
        """Write one record so that a kill at any moment loses no earlier one.

        Raises:
            BadInput: it cannot be written, without space for example; the file is then unchanged.
        """
        line = json.dumps(record.to_json(), allow_nan=False).encode() + b"\n"
        with writing(self.path), self._alone() as file:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":  # a kill cut the last line off: leave it, start a new one
                line = b"\n" + line
            try:
                while line:
                    line = line[os.write(file, line) :]
                os.fsync(file)
            except OSError:
                os.ftruncate(file, size)
                raise

    def replace(self, records: Sequence[Record]) -> None:
        """Drop all earlier records of the cases of these records, which have been appended already.

        Records of other versions of the code go too. All other lines stay, also those that cannot be read.

        Raises:
            BadInput: the file cannot be rewritten; it is then unchanged.
        """
        with writing(self.path), self._alone():
            last: dict[tuple[str, ...], int] = {}
            dropped = set()
            replaced = {key(record) for record in records}
            for number, record in read_lines(self.path, []):
                if (case := key(record)) in replaced:
                    dropped.add(last.get(case, 0))
                    last[case] = number
            if not dropped - {0}:
                return
            lines = [line + b"\n" for line in read_bytes(self.path).removesuffix(b"\n").split(b"\n")]
            with atomic_write(self.path) as partial:
                partial.write_bytes(b"".join(line for number, line in enumerate(lines, 1) if number not in dropped))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[int]:
        """The file, open to append, with a lock that every other writer waits for."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                held(file, PATIENCE_S)
                if _is_at(file, self.path):  # another run may just have replaced it
                    yield file
                    return
            finally:
                os.close(file)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
