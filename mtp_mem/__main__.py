"""`python -m mtp_mem`: the command line; in a clone that is not installed, one line that says so."""

import importlib.util
import os
import sys

NOT_INSTALLED = (
    "mtp-mem: mtp_mem runs from a clone without being installed; `pip install -e .` in the clone installs it"
)


def run() -> int:
    """Run the command line; returns its exit code, 3 where the installation is not complete."""
    # `python -m` puts the current folder first in sys.path: a module there must not stand in for an installed one.
    sys.path[:] = [path for path in sys.path if path not in ("", os.getcwd())]
    try:
        whole = importlib.util.find_spec("mtp_mem.strategies") is not None
        from mtp_mem.cli import script
    except ModuleNotFoundError:
        whole = False
    if not whole:
        print(NOT_INSTALLED, file=sys.stderr)
        return 3
    return script()


if __name__ == "__main__":
    sys.exit(run())
