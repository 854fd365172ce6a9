"""`mtp-mem chart`: draws from results that are there."""

import argparse
import json
from pathlib import Path

from mtp_mem.cli.common import AddCommand, note


def add(command: AddCommand) -> None:
    """Register the command."""
    sub = command("chart", run, "charts from results.jsonl or pytest-benchmark JSON")
    sub.add_argument("results", nargs="+", type=Path, metavar="FILE", help="files, or folders with results.jsonl")
    sub.add_argument("--out", type=Path, default=Path("charts"), metavar="DIR", help="where they go; default charts/")


def run(args: argparse.Namespace) -> int:
    """Draw every chart that the results have figures for; what was skipped is said on stderr."""
    from mtp_mem.report.draw_files import draw

    notes: list[str] = []
    files = draw(args.results, args.out, notes)
    for line in notes:
        note(f"note: {line}")
    if args.json:
        print(json.dumps({"files": [str(path) for path in files], "notes": notes}, indent=1))
    else:
        for path in files:
            print(path)
    return 0
