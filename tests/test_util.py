"""A file is whole or as it was."""

from pathlib import Path

import pytest

from mtp_mem._util import atomic_write


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
