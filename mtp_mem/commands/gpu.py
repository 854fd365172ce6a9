"""`mtp-mem gpu`: everything a GPU machine can tell, in one command."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from mtp_mem.commands.common import AddCommand, note


def add(command: AddCommand) -> None:
    """Register the command."""
    sub = command("gpu", run, "one command for a GPU machine: measure, verify, check predictions, report")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="where everything goes; run again to go on")
    size = sub.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small shapes, few cases")
    size.add_argument("--full", action="store_true", help="two real shapes, n = 1, 2, 4, 8 (the default)")
    sub.add_argument(
        "--budget-minutes", type=_minutes, default=25.0, metavar="M", help="stop after so long; default 25"
    )
    sub.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu runs the same path without a GPU")
    sub.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")


def run(args: argparse.Namespace) -> int:
    """Run the plan; 1 if a stage failed or ran out of time."""
    from mtp_mem import gpu_run
    from mtp_mem.bench import resolve_device

    if not args.dry_run:
        resolve_device(args.device)
    here = Path("tests/benchmarks")
    tests = here if (here / "test_head_phase.py").is_file() else None
    plan = gpu_run.stages(args.device, args.out, quick=args.quick, tests=tests)
    if tests is None:
        note("no tests/benchmarks here: the head phase is left out (run from a clone to include it)")
    if args.dry_run:
        if args.json:
            print(json.dumps([asdict(stage) for stage in plan], indent=1))
            return 0
        for stage in plan:
            print(
                f"{stage.minutes:5.1f} min  {stage.name}: {stage.why}\n           python -m {' '.join(stage.command)}"
            )
        print(f"{sum(stage.minutes for stage in plan):5.1f} min in all, estimated; budget {args.budget_minutes:g} min")
        return 0
    outcomes = []
    for outcome in gpu_run.run(plan, args.out, 60 * args.budget_minutes, lambda s: note(f"{s.name}: {s.why} ...")):
        outcomes.append(outcome)
        note(f"{outcome.stage}: {outcome.status} ({outcome.seconds:.0f} s)")
    if args.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    else:
        for outcome in outcomes:
            print(f"{outcome.stage:22} {outcome.status:15} {outcome.seconds:6.0f} s")
        print(f"everything is in {args.out}; the page is {args.out / 'report.html'}")
    return 0 if all(o.status in ("ok", "done before") and o.code == 0 for o in outcomes) else 1


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1440:
        raise argparse.ArgumentTypeError(f"{text!r}: expected minutes, more than 0 and at most 1440")
    return value
