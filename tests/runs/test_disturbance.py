"""A machine that is at work beside the measurement is noticed, said in one line, and the times are marked."""

import time
from pathlib import Path

import pytest
from fixed import record
from forked import call
from rich.console import Console

from mtp_mem.report.build import build
from mtp_mem.report.tables import DISTURBED, comparison, remarks
from mtp_mem.runs.disturbance import BUSY, CpuWatch, disturbed
from mtp_mem.runs.record import Record
from mtp_mem.runs.results_file import ResultsFile


def test_another_process_at_work_is_noticed() -> None:
    assert CpuWatch().others() is None  # too short to say
    worker = call(eval, "[0 for _ in iter(int, 1)]")  # for ever
    try:
        time.sleep(0.3)  # until it runs
        watch = CpuWatch()
        time.sleep(0.6)
        assert (watch.others() or 0) > BUSY
    finally:
        worker.kill()
        worker.join()


@pytest.mark.parametrize(
    ("others", "p20", "p80", "noisy"),
    [(None, 99, 101, False), (0.0, 99, 101, False), (0.3, 99, 101, True), (0.0, 80, 150, True), (None, 80, 150, True)],
)
def test_the_rule(others: float | None, p20: float, p80: float, noisy: bool) -> None:
    assert disturbed(others, 100, p20, p80) == noisy


def test_times_are_marked_in_table_report_and_record(tmp_path: Path) -> None:
    records = [record(), record("sequential", step_ms_p80=200.0, others_cpu=0.45, disturbed=True)]
    screen = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    screen.print(comparison(records, screen))
    text = screen.export_text()
    assert f" 90{DISTURBED} " in text
    assert " 100 " in text
    (line,) = remarks(records)
    assert line == (
        "~ The times of 1 of 2 cases were disturbed: other processes took up to 45% of the machine's CPU time, equal"
        " steps spread by up to 127%. --fresh measures again."
    )
    assert remarks(records[:1]) == []
    file = ResultsFile(tmp_path / "r")
    for one in records:
        file.append(one)
    assert [r.disturbed for r in file.read()] == [None, True]
    build([tmp_path / "r"], tmp_path / "page.html")
    assert "The times of 1 of 2 cases were disturbed" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert Record.from_json(records[1].to_json()) == records[1]
