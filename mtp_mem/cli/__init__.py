"""The command line: `mtp-mem COMMAND`.

Results go to stdout, progress and notes to stderr. Exit codes: 0 ok; 1 a check failed; 2 usage or bad input;
3 something needed is missing; 70 anything unexpected, with its traceback; 130 interrupted.
"""

import argparse
import atexit
import contextlib
import gc
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence

from mtp_mem._version import __version__
from mtp_mem.cli import compare, listing, plan, predict, profile, regressions, report, timeline, verify
from mtp_mem.cli.common import note
from mtp_mem.cli.streams import lost_results, standard_streams
from mtp_mem.errors import (
    BadInput,
    Missing,
    MtpMemError,
    crashed,
    one_line,
    printable,
    raised_by_a_file_of_this_folder,
)

COMMANDS = (compare, verify, predict, plan, timeline, report, regressions, profile, listing)


def script() -> int:
    """`main` as a whole process: `mtp-mem` and `python -m mtp_mem`."""
    # At its end Python looks through every object twice for cycles: with torch's objects a second, for nothing.
    atexit.register(gc.freeze)
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    Raises:
        SystemExit: the arguments are wrong (2), or help was asked for (0).
    """
    with standard_streams():
        args = make_parser().parse_args(argv)
        # Deprecation notes of the libraries we call are for us, not for the user in front of a table.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\..*")
        try:
            with _heeding_signals():
                code: int = args.run(args)
            if why := lost_results():
                raise BadInput(f"standard output: cannot be written: {why}")
            return code
        except MtpMemError as e:
            note(f"mtp-mem: {e}")
            return e.exit_code
        except KeyboardInterrupt:
            note("mtp-mem: interrupted")
            return 130
        except Exception as e:
            from mtp_mem.runs.bench import out_of_memory  # imported here: only a failure needs it

            if out_of_memory(e):
                note(f"mtp-mem: the memory here is too small: {one_line(e)}")
                return Missing.exit_code
            if getattr(args, "model", None) and raised_by_a_file_of_this_folder(e):
                note(f"mtp-mem: --model {printable(args.model)}: {one_line(e)}")
                return BadInput.exit_code
            return crashed()


@contextlib.contextmanager
def _heeding_signals() -> Iterator[None]:
    """A block that SIGHUP and SIGTERM end as Ctrl-C does, by KeyboardInterrupt: half-written files are removed."""
    main_thread = threading.current_thread() is threading.main_thread()
    usual = [n for n in (signal.SIGTERM, signal.SIGHUP) if main_thread and signal.getsignal(n) == signal.SIG_DFL]
    for number in usual:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in usual:
            signal.signal(number, signal.SIG_DFL)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="mtp-mem", description="Profile and verify head-backward strategies for multi-token prediction."
    )
    parser.add_argument("--version", action="version", version=f"mtp-mem {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], help_: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_, description=help_)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="one JSON document on stdout")
        return sub

    for module in COMMANDS:
        module.add(command)
    return parser
