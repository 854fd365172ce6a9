"""What is installed: one top-level package, with the strategies and profiles inside."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_wheel_installs_nothing_but_mtp_mem(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"mtp_mem"}
    ours = {p.name for p in (ROOT / "strategies").glob("*.py")}
    assert {n.split("/")[-1] for n in names if n.startswith("mtp_mem/strategies/")} == ours
    assert {"mtp_mem/profiles/quick.toml", "mtp_mem/py.typed", "mtp_mem/memory/tracker.py"} <= set(names)
    assert {f"mtp_mem/report/assets/{name}" for name in ("page.html", "page.css", "timeline.js")} <= set(names)
    entry_points = next(n for n in names if n.endswith("entry_points.txt"))
    assert "mtp-mem = mtp_mem.cli:script" in zipfile.ZipFile(wheel).read(entry_points).decode()


BARE = """import runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder)]
sys.argv[0] = "mtp_mem"
runpy.run_module("mtp_mem", run_name="__main__")
"""


def test_a_clone_that_is_not_installed_says_so(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "mtp_mem", tmp_path / "mtp_mem")
    for command in ("list", "compare"):
        ended = subprocess.run([sys.executable, "-c", BARE, command], cwd=tmp_path, capture_output=True, text=True)
        assert ended.returncode == 3, ended.stderr
        assert ended.stderr.count("\n") == 1
        assert "pip install -e ." in ended.stderr
