"""`mtp-mem report` and `mtp-mem chart`: a page, or charts alone, from results that are there."""

import argparse
import json
from pathlib import Path

from mtp_mem.cli.common import AddCommand, note


def add(command: AddCommand) -> None:
    """Register the commands."""
    sub = command("report", report, "one page from results files: the answer, charts, tables, how to run it again")
    sub.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="results.jsonl files, or folders of them")
    sub.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="default report.html"
    )
    sub.add_argument(
        "--timeline", action="append", type=Path, default=[], metavar="JSON", help="a timeline.json from elsewhere"
    )
    sub.add_argument("--charts", type=Path, metavar="DIR", help="keep the charts here, as PNG, SVG and CSV")
    sub = command("chart", chart, "charts from results.jsonl or what plan keeps")
    sub.add_argument("results", nargs="+", type=Path, metavar="FILE", help="files, or folders with results.jsonl")
    sub.add_argument("--out", type=Path, default=Path("charts"), metavar="DIR", help="where they go; default charts/")


def report(args: argparse.Namespace) -> int:
    """Write the page; what was skipped is said on stderr and in the page."""
    from mtp_mem.report.build import build

    page = build(args.results, args.output, args.timeline, args.charts)
    for line in page.notes:
        note(f"note: {line}")
    sections = [group.content for group in page.groups]
    if args.json:
        document = {
            "files": [str(path) for path in page.files],
            "groups": [{"title": s.title, "answer": s.answer, "command": s.command} for s in sections],
            "notes": list(page.notes),
        }
        print(json.dumps(document, indent=1))
    else:
        for s in sections:
            print(f"{s.title}\n  {s.answer}")
        print(f"report {args.output}")
    return 0


def chart(args: argparse.Namespace) -> int:
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
