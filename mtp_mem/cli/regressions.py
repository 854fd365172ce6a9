"""`mtp-mem regressions`: what changed between two results, and whether it got worse."""

import argparse
import json
from pathlib import Path

from mtp_mem._util import format_bytes
from mtp_mem.cli.common import AddCommand, console, note


def add(command: AddCommand) -> None:
    """Register the command."""
    sub = command(
        "regressions",
        run,
        "what changed between two results; exit 1 if a figure got worse or a case is gone",
    )
    what = "pytest-benchmark JSON, results.jsonl, or a folder of those"
    sub.add_argument("old", type=Path, metavar="OLD", help=what)
    sub.add_argument("new", type=Path, metavar="NEW", help="the same, later")
    sub.add_argument("--allow-missing", action="store_true", help="a case that is gone does not count as worse")
    sub.add_argument("--memory", type=_share, default=0.0, metavar="0%", help="how much bytes may grow; default 0%%")
    sub.add_argument("--time", type=_share, default=0.1, metavar="10%", help="how much times may grow; default 10%%")


def run(args: argparse.Namespace) -> int:
    """Print a line for each change; returns 1 if a figure got worse, or a case is gone and that is not allowed."""
    from mtp_mem.report.diff import changes, load

    notes: list[str] = []
    old, new = load(args.old, notes), load(args.new, notes)
    for line in notes:
        note(f"note: {line}")
    differing = changes(old, new, args.memory, args.time)
    worse = [change for change in differing if change.worse]
    missing, added = old.without(new), new.without(old)
    failed = bool(worse or (missing and not args.allow_missing))
    if args.json:
        rows = [change.to_json() for change in differing]
        document = {"changes": rows, "regressions": len(worse), "missing": missing, "added": added}
        print(json.dumps(document, indent=1, allow_nan=False))
        return int(failed)
    screen = console()
    for change in differing:
        if change.kind == "gradient":
            figures = f"{change.old} -> {change.new}"
        elif isinstance(change.old, int) and isinstance(change.new, int):
            figures = f"{format_bytes(change.old)} -> {format_bytes(change.new)} ({change.new - change.old:+,} B)"
        else:
            share = "" if change.share is None else f" ({change.share:+.1%})"
            figures = f"{change.old:.4g} -> {'none' if change.new is None else f'{change.new:.4g}'}{share}"
        mark = "WORSE" if change.worse else "     "
        screen.print(f"{mark} {change.kind:8} {change.case}: {figures}")
    for mark, word, cases in (
        ("     " if args.allow_missing else "WORSE", "only in the old results", missing),
        ("     ", "only in the new results", added),
    ):
        for case in cases:
            screen.print(f"{mark} {word}: {case}")
    common = len(new.cases) - len(added)
    gone = f", {len(missing)} gone" if missing else ""
    screen.print(f"{common} cases compared, {len(differing)} figures changed, {len(worse)} got worse{gone}")
    return int(failed)


def _share(text: str) -> float:
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a percentage like 10%")
    return value / 100
