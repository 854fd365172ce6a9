"""What commands share: options, the profile with its changes, notes on stderr, the console, the progress bar."""

import argparse
import contextlib
import dataclasses
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mtp_mem.cli.setup import chosen_profile, model_options, names, training_options
from mtp_mem.config.gpus import GPU
from mtp_mem.config.schema import Profile
from mtp_mem.environment import require_deterministic
from mtp_mem.errors import printable
from mtp_mem.runs.record import Record
from mtp_mem.strategy import load_strategy

NARROWEST = 80

AddCommand = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]
"""Adds a command: (name, function that runs it, help) -> its parser, with `--json`."""


def case_options(sub: argparse.ArgumentParser, profile: str) -> None:
    """Add the options that choose cases; `profile` is the default one."""
    model_options(sub, profile)
    sub.add_argument("--strategies", type=names, metavar="A,B", help="instead of the profile's; name[:option=value]...")
    sub.add_argument("--strategy", action="append", metavar="SPEC", help="one more: a name or package.module:Class")
    sub.add_argument("--n", type=numbers, metavar="1,2,4", help="numbers of heads, instead of the profile's")
    sub.add_argument("--out", type=Path, metavar="DIR", help="where results go; default under results/")
    training_options(sub)


def device_option(sub: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    sub.add_argument("--device", default="auto", type=_device, help="cpu, cuda or cuda:N; default: CUDA if any")


def deterministic_option(sub: argparse.ArgumentParser) -> None:
    """Add `--require-deterministic`."""
    sub.add_argument(
        "--require-deterministic",
        action="store_true",
        help="take deterministic kernels only; a case that needs another one is an error",
    )


def budget_option(sub: argparse.ArgumentParser, what: str) -> None:
    """Add `--budget-minutes`, after which no further `what`, a unit of work, is begun."""
    sub.add_argument(
        "--budget-minutes",
        type=_minutes,
        metavar="M",
        help=f"begin no further {what} after M minutes: what is finished is kept, stderr says how many cases are left,"
        " the exit code is 1, and the same command runs the others",
    )


def settle_numerics(args: argparse.Namespace) -> None:
    """Act on `--require-deterministic`; to be called before the first work on a device."""
    if args.require_deterministic:
        require_deterministic()


def profile_of(args: argparse.Namespace) -> Profile:
    """The profile with the command line's changes; raises where one of its strategies cannot be loaded."""
    profile = chosen_profile(args)
    changes = {key: value for key in ("n", "rounds") if (value := getattr(args, key, None)) is not None}
    specs = tuple(args.strategies or profile.sweep.strategies) + tuple(args.strategy or ())
    for spec in specs:
        load_strategy(spec)
    changes["strategies"] = tuple(dict.fromkeys(specs))
    return dataclasses.replace(profile, sweep=dataclasses.replace(profile.sweep, **changes))


def note(line: str) -> None:
    """Print a line for people to stderr."""
    print(printable(line), file=sys.stderr, flush=True)


def console() -> Console:
    """A console on stdout, as wide as COLUMNS says or the terminal is, 120 columns in a pipe.

    Never narrower than a table's first columns need: a terminal wraps a long line, but what rich cuts off is lost.
    """
    asked = os.environ.get("COLUMNS", "")
    usual = Console().width if sys.stdout.isatty() else 120
    width = int(asked) if re.fullmatch("0*[1-9][0-9]{0,3}", asked) else usual
    return Console(highlight=False, markup=False, emoji=False, width=max(width, NARROWEST))


def show_records(table: Table, records: list[Record], path: Path, screen: Console) -> None:
    """Print a table of records, bytes per further head, the ranks' collectives, remarks, and the files written."""
    from mtp_mem.report import tables

    screen.print(table)
    for further in (tables.slopes(records), tables.collectives(records)):
        if further:
            screen.print()
            screen.print(further)
    for line in tables.remarks(records):
        screen.print(line)
    screen.print(f"\nrecords {path}, chart {path.with_name('memory-vs-n.png')} (.svg, .csv)")


def show_assumptions(gpu: GPU) -> None:
    """Print what predictions for this GPU assume, a line each."""
    from mtp_mem.prediction.peaks import assumptions

    for line in assumptions(gpu):
        console().print(f"Assumed: {line}.")


@contextlib.contextmanager
def progress(total: int | None) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr, none in a pipe; yields the function to call with the name of each unit of work.

    `total` is the number of units; None: not known yet. Ctrl-C, a hangup or a termination signal ends the block with
    KeyboardInterrupt. The first signal is only noted, and raised when the next unit begins: an exception raised at any
    moment may be raised inside a finalizer, and Python drops it there. A second signal interrupts at once.
    """
    stopping = False

    def stop(*_: Any) -> None:
        nonlocal stopping
        if stopping:
            raise KeyboardInterrupt
        stopping = True

    # A signal that is ignored already stays ignored: under nohup a hangup ends nothing.
    heeded = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, stop) for number in heeded}
    terminal = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=terminal, disable=not terminal.is_terminal, transient=True) as bar:
            task = bar.add_task("", total=total)
            begun = 0

            def begin(what: str) -> None:
                nonlocal begun
                if stopping:
                    raise KeyboardInterrupt
                bar.update(task, description=what, completed=begun)
                begun += 1

            with contextlib.redirect_stdout(sys.stderr):  # what a strategy prints is none of our results
                yield begin
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of an argument like `1,2,4`."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers like 1,2,4,8") from None


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive number of minutes")
    return minutes


def _device(text: str) -> str:
    if not re.fullmatch("auto|cpu|cuda(:(0|[1-9][0-9]?))?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected auto, cpu, cuda or cuda:N")
    return text
