"""The file of records: one JSON object a line, appended as each case ends, and replaced by newer ones only."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from mtp_mem._util import atomic_write, writable
from mtp_mem.config.foreign import document
from mtp_mem.errors import BadInput
from mtp_mem.runs.identity import key
from mtp_mem.runs.record import Record


def read_lines(path: Path, notes: list[str]) -> Iterator[tuple[int, Record]]:
    """Each record of a results file with the number of its line; lines that are none are skipped, and named in `notes`.

    Raises:
        OSError: the file cannot be read.
    """
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            table = document(line)
            if not isinstance(table, dict):
                raise BadInput("not a JSON object")
            yield number, Record.from_json(table)
        except BadInput as e:
            notes.append(f"{path}:{number}: skipped: {e}")


class ResultsFile:
    """A `results.jsonl` in the folder `out`: reading it skips what is damaged, and says so in `notes`.

    Raises:
        BadInput: the folder cannot be made or written.
    """

    def __init__(self, out: Path) -> None:
        self.path = writable(out) / "results.jsonl"
        self.notes: list[str] = []
        try:
            with self.path.open("ab"):
                pass
        except OSError as e:
            raise BadInput(f"{out}: cannot be written: {e.strerror}") from None

    def read(self) -> list[Record]:
        """All records that can be read, oldest first; of records of one case only the last."""
        records: dict[str, Record] = {}
        self.notes = []
        for _, record in read_lines(self.path, self.notes):
            records[record.case] = record
        return list(records.values())

    def append(self, record: Record) -> None:
        """Write one record so that a kill at any moment loses no earlier one."""
        line = json.dumps(record.to_json()).encode() + b"\n"
        with self.path.open("rb+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a kill cut the last line off: leave it, and start a new one
                    line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def replace(self, records: Sequence[Record]) -> None:
        """Drop what these records, which were appended, take the place of: earlier ones of the same cases.

        Those of other versions of the code too. All other lines stay, also those that cannot be read.

        Raises:
            BadInput: the file cannot be written again; it is as it was then.
        """
        last: dict[tuple[str, ...], int] = {}
        dropped = set()
        replaced = {key(record) for record in records}
        for number, record in read_lines(self.path, []):
            if (case := key(record)) in replaced:
                dropped.add(last.get(case, 0))
                last[case] = number
        if not dropped - {0}:
            return
        lines = [line + b"\n" for line in self.path.read_bytes().removesuffix(b"\n").split(b"\n")]
        try:
            with atomic_write(self.path) as partial:
                partial.write_bytes(b"".join(line for number, line in enumerate(lines, 1) if number not in dropped))
        except OSError as e:
            raise BadInput(f"{self.path}: cannot be written: {e.strerror}") from None
