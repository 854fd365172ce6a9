"""`mtp-mem report`: one page from results files."""

import argparse
import json
from pathlib import Path

from mtp_mem.cli.common import AddCommand, note


def add(command: AddCommand) -> None:
    """Register the command."""
    sub = command("report", run, "one page from results files: the answer, charts, tables, how to run it again")
    sub.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="results.jsonl files, or folders of them")
    sub.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="default report.html"
    )
    sub.add_argument(
        "--timeline", action="append", type=Path, default=[], metavar="JSON", help="a timeline.json from elsewhere"
    )
    sub.add_argument("--charts", type=Path, metavar="DIR", help="keep the charts here, as PNG, SVG and CSV")


def run(args: argparse.Namespace) -> int:
    """Write the page; what was skipped is said on stderr and in the page."""
    from mtp_mem.report.build import build

    report = build(args.results, args.output, args.timeline, args.charts)
    for line in report.notes:
        note(f"note: {line}")
    sections = [group.content for group in report.groups]
    if args.json:
        document = {
            "files": [str(path) for path in report.files],
            "groups": [{"title": s.title, "answer": s.answer, "command": s.command} for s in sections],
            "notes": list(report.notes),
        }
        print(json.dumps(document, indent=1))
    else:
        for s in sections:
            print(f"{s.title}\n  {s.answer}")
        print(f"report {args.output}")
    return 0
