"""`mtp-mem` in this process, as a user in some folder would run it."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from mtp_mem.cli import main


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def mtp_mem(folder: Path, *args: str, columns: int = 120) -> Ended:
    """Run a command with `folder` as the working directory and a terminal of so many columns."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setenv("COLUMNS", str(columns))
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        loaded = set(sys.modules)
        try:
            code = main(args)
        except SystemExit as e:  # argparse's own errors
            code = int(e.code or 0)
        for name in set(sys.modules) - loaded:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(folder)):
                del sys.modules[name]  # another test may write another module of this name
    return Ended(code, out.getvalue(), err.getvalue())
