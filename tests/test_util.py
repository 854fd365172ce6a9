"""A file is written whole or stays as it was."""

import os
import signal
import tempfile
from pathlib import Path

import pytest

from mtp_mem._util import atomic_write, scratch_folder
from mtp_mem.errors import BadInput


def cut_short(path: Path) -> None:
    with atomic_write(path) as partial:
        partial.write_text("half of the sec")
        raise KeyboardInterrupt


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    with atomic_write(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(KeyboardInterrupt):
        cut_short(path)
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["kept.json"]


def cut_down(path: Path) -> None:
    with atomic_write(path) as partial, scratch_folder() as scratch:
        partial.write_text("half")
        (scratch / "chart.png").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_leaves_is_removed_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp/mtp-mem-1-living.tmp").mkdir()
    path = tmp_path / "kept.json"
    killed = os.fork()
    if not killed:
        cut_down(path)
    os.waitpid(killed, 0)
    assert len(list(tmp_path.iterdir())) == 2
    assert len(list((tmp_path / "tmp").iterdir())) == 2
    with atomic_write(path) as partial, scratch_folder():
        partial.write_text("whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept.json", "tmp"]
    assert [p.name for p in (tmp_path / "tmp").iterdir()] == ["mtp-mem-1-living.tmp"]


@pytest.mark.parametrize("place", ["/dev/full", "/dev/null", "pipe", "."])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    before = os.lstat(place)
    with pytest.raises(BadInput, match="not a regular file"), atomic_write(Path(place)):
        pass
    assert os.path.samestat(before, os.lstat(place))
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_a_name_as_long_as_a_name_can_be(tmp_path: Path) -> None:
    for name in ("x" * 255, "ä" * 127):
        with atomic_write(tmp_path / name) as partial:
            partial.write_text("whole")
        assert (tmp_path / name).read_text() == "whole"
