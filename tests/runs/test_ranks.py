"""A group of ranks: every job is answered, whatever becomes of a rank."""

import time

import pytest
import rank_jobs

from mtp_mem.errors import Missing
from mtp_mem.runs.ranks import Group


def test_a_rank_that_fails_costs_its_own_job_alone(capfd: pytest.CaptureFixture[str]) -> None:
    doing: list[str] = []
    jobs = ["first", "raises", "killed", "out of memory", "quits", "last"]
    answers = dict(Group(2).run(rank_jobs.make, jobs, doing.append))
    assert list(answers) == jobs
    # The rank that is killed may be so before rank 0, still joining, can say what is being done.
    assert [job for job in doing if job in jobs and job != "killed"] == [job for job in jobs if job != "killed"]
    assert (answers["first"], answers["last"]) == ("first: 2 ranks", "last: 2 ranks")
    assert answers["raises"]["error"].startswith("rank 1: ValueError: no such thing (rank_jobs.py:")
    assert answers["killed"] == {"status": "error", "error": "rank 1 ended with signal 9 (SIGKILL)"}
    assert answers["out of memory"]["status"] == "oom"
    assert answers["out of memory"]["error"].startswith("rank 1: OutOfMemoryError: tried to allocate 9 GiB")
    assert answers["quits"]["error"].startswith("rank 1: quits the process: SystemExit(0)")
    assert "noise" not in capfd.readouterr().out


def test_a_rank_that_hangs_is_ended() -> None:
    begun = time.monotonic()
    ((_, answer),) = Group(2, timeout_s=4).run(rank_jobs.make, ["hangs"])
    assert answer == {"status": "error", "error": "no rank answered within 4 s; all were ended"}
    assert time.monotonic() - begun < 40


def test_ranks_on_cuda_need_a_device_each() -> None:
    with pytest.raises(Missing, match=r"2 ranks on CUDA need 2 devices, there are 0"):
        Group(2, "cuda")
