"""`mtp-mem gpu`: everything a GPU machine can tell, in one command."""

import argparse
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mtp_mem.cli.common import AddCommand, console, deterministic_option, note
from mtp_mem.errors import BadInput

if TYPE_CHECKING:
    from mtp_mem.config.schema import GPU
    from mtp_mem.gpu_run import Plan

RUN_ANYWHERE = "h200"  # what --dry-run plans for where there is no device


def add(command: AddCommand) -> None:
    """Register the command."""
    sub = command("gpu", run, "one command for a GPU machine: measure, verify, check predictions, report")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="where everything goes; run again to go on")
    size = sub.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small shapes, few cases")
    size.add_argument("--full", action="store_true", help="two real shapes, n = 1, 2, 4, 8 (the default)")
    sub.add_argument(
        "--budget-minutes", type=_minutes, default=45.0, metavar="M", help="stop after so long; default 45"
    )
    sub.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu runs the same path without a GPU")
    deterministic_option(sub)
    sub.add_argument("--dry-run", action="store_true", help="print the plan with minutes and bytes, and run nothing")
    sub.add_argument("--gpu", metavar="NAME", help="--dry-run for this one (see list) instead of the device here")


def run(args: argparse.Namespace) -> int:
    """Run the plan; 1 if a stage failed or ran out of time."""
    from mtp_mem import gpu_run

    target = _target(args)
    here = Path("tests/benchmarks")
    tests = here if (here / "test_head_phase.py").is_file() else None
    plan = gpu_run.plan(target, args.out, quick=args.quick, tests=tests, deterministic=args.require_deterministic)
    if tests is None:
        note("no tests/benchmarks here: the head phase is left out (run from a clone to include it)")
    if args.dry_run:
        _show_plan(plan, target, args.budget_minutes, as_json=args.json)
        return 0
    for line in _refusals(plan, target):
        note(line)
    outcomes = []
    with _termination_interrupts():
        for outcome in gpu_run.run(
            plan.stages, args.out, 60 * args.budget_minutes, lambda s: note(f"{s.name}: {s.why} ...")
        ):
            outcomes.append(outcome)
            note(f"{outcome.stage}: {outcome.status} ({outcome.seconds:.0f} s)")
    if args.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    else:
        for outcome in outcomes:
            print(f"{outcome.stage:22} {outcome.status:15} {outcome.seconds:6.0f} s")
        print(f"everything is in {args.out}; the page is {args.out / 'report.html'}\n")
        _show_findings(args.out)
    return 0 if all(o.status in ("ok", "done before") and o.code == 0 for o in outcomes) else 1


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Inside, a termination signal is a Ctrl-C: the stage at hand is told to stop, and does not go on alone."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _target(args: argparse.Namespace) -> "GPU | None":
    """The GPU to plan for; None for the CPU.

    Raises:
        BadInput: --gpu without --dry-run, or with --device cpu.
        Missing: no CUDA device, and not a dry run.
    """
    import torch

    from mtp_mem.config.schema import load_gpu
    from mtp_mem.runs.bench import resolve_device
    from mtp_mem.runs.check_prediction import device_here

    if args.gpu and (args.device == "cpu" or not args.dry_run):
        raise BadInput(f"--gpu {args.gpu}: only says what --dry-run plans for; what is measured is the device here")
    if not args.dry_run:
        resolve_device(args.device)
    if args.device == "cpu":
        return None
    if args.gpu or not torch.cuda.is_available():
        return load_gpu(args.gpu or RUN_ANYWHERE)
    return device_here()


def _show_plan(plan: "Plan", target: "GPU | None", budget: float, *, as_json: bool) -> None:
    from mtp_mem._util import show_bytes

    if as_json:
        refused = [{"profile": profile, **asdict(case)} for profile, case in plan.refused]
        print(json.dumps({"stages": [asdict(stage) for stage in plan.stages], "refused": refused}, indent=1))
        return
    print(f"Plan for {target.name if target else 'the CPU here'}; nothing is run. Minutes and bytes are estimates.")
    for stage in plan.stages:
        print(f"{stage.minutes:5.1f} min  {stage.name}: {stage.why}\n           python -m {' '.join(stage.command)}")
        for case in stage.cases:
            nbytes = "unknown" if case.peak_bytes is None else show_bytes(case.peak_bytes)
            minutes = "  ?" if case.seconds is None else f"{case.seconds / 60:3.1f}"
            print(f"           {minutes} min {nbytes:>10}  n={case.n} {case.strategy}")
    for line in _refusals(plan, target):
        print(line)
    print(f"{sum(stage.minutes for stage in plan.stages):5.1f} min in all; budget {budget:g} min")


def _refusals(plan: "Plan", target: "GPU | None") -> list[str]:
    from mtp_mem._util import show_bytes
    from mtp_mem.prediction.estimate import capacity

    room = show_bytes(capacity(target))
    return [
        f"refused: {profile} n={case.n} {case.strategy} needs {show_bytes(case.peak_bytes or 0)}, there are {room}"
        for profile, case in plan.refused
    ]


def _show_findings(out: Path) -> None:
    """The short table, last: what the comparisons found, and what the verifications say."""
    from mtp_mem.report import tables
    from mtp_mem.report.recommend import advise
    from mtp_mem.runs.read_results import groups, machine, read

    screen = console()
    try:
        found = groups(read([out], []), [])
    except BadInput as e:
        screen.print(str(e), markup=False)
        return
    for records in found:
        model = records[0].model
        screen.print(f"V = {model['vocab_size']:,}, D = {model['dim']:,}, on {machine(records[0])}", markup=False)
        screen.print(tables.comparison(records, screen))
        for line in (*tables.remarks(records), advise(records)):
            screen.print(line, markup=False)
        screen.print()
    for path in sorted(out.glob("verify-*.out")):
        try:
            screen.print(f"{path.stem}: {json.loads(path.read_text())['summary']}", markup=False)
        except (ValueError, KeyError):
            screen.print(f"{path.stem}: not finished", markup=False)


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1440:
        raise argparse.ArgumentTypeError(f"{text!r}: expected minutes, more than 0 and at most 1440")
    return value
