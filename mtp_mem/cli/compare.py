"""`mtp-mem compare`: bytes, time and gradients of strategies against the number of heads."""

import argparse
import gc
import importlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mtp_mem.cli.common import (
    AddCommand,
    budget_option,
    case_options,
    console,
    deterministic_option,
    device_option,
    note,
    profile_of,
    progress,
    settle_numerics,
    show_records,
)
from mtp_mem.cli.setup import ranks_option
from mtp_mem.data import load_corpus
from mtp_mem.errors import BadInput

if TYPE_CHECKING:
    from mtp_mem.runs.ranks import Joined


def add(command: AddCommand) -> None:
    """Register the command."""
    sub = command("compare", run, "bytes, time and gradients of strategies against the number of heads")
    case_options(sub, "quick")
    sub.add_argument("--rounds", type=int, help="timed steps per case, instead of the profile's")
    sub.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 text; default: CPython's help topics")
    device_option(sub)
    deterministic_option(sub)
    budget_option(sub, "n")
    ranks_option(sub, "every case")
    sub.add_argument("--fresh", action="store_true", help="run every case again, also those in --out")


def run(args: argparse.Namespace) -> int:
    """Run the profile's cases that are still missing, then show them all."""
    # Imported here, so that other commands need not wait for matplotlib.
    from mtp_mem.report import charts, recommend, tables
    from mtp_mem.runs import bench, sweep
    from mtp_mem.runs.results_file import ResultsFile

    settle_numerics(args)
    device = bench.resolve_device(args.device)
    joined = _join(args, device.type)
    profile = profile_of(args)
    if profile.training.sharding != "none" and not args.nproc:
        raise BadInput(f"training.sharding = {profile.training.sharding!r}: how many ranks? --nproc N, or torchrun")
    corpus = load_corpus(profile.workload, profile.model.vocab_size, args.text)
    if joined is not None and joined.rank:
        for _ in sweep.run(profile, corpus, device, joined.agreed([]), lambda _: None, joined=joined):
            pass
        return 0
    if corpus.note:
        note(f"note: {corpus.note}")
    out = args.out or Path("results") / profile.name
    results = ResultsFile(out)

    wanted = sweep.cases(profile, corpus, device)
    records_by_case = {record.case: record for record in results.read() if not args.fresh}
    for line in results.notes:
        note(f"note: {line}")
    todo = [case for case in wanted if case.id not in records_by_case or records_by_case[case.id].status != "ok"]
    if len(todo) < len(wanted):
        note(
            f"{len(wanted) - len(todo)} of {len(wanted)} cases are in {results.path} already (--fresh runs them again)"
        )
    if joined is not None:
        todo = joined.agreed(todo)
    elif todo:
        _freeze_modules()
    interrupted, left = False, {case.id for case in todo}
    budget_s = None if args.budget_minutes is None else 60 * args.budget_minutes
    try:
        with progress(sweep.units(todo, profile.sweep.rounds)) as begin:
            for record in sweep.run(profile, corpus, device, todo, begin, budget_s, joined):
                results.append(record)
                records_by_case[record.case] = record
                left.discard(record.case)
    except KeyboardInterrupt:
        interrupted = True
    if interrupted or left:
        finished = len(wanted) - len(left)
        why = "stopped" if interrupted else f"the budget of {args.budget_minutes:g} min is spent"
        again = "with --fresh the same command begins again" if args.fresh else "the same command runs the others"
        note(f"{why}: {finished} of {len(wanted)} cases are in {results.path}; {again}")
        return 130 if interrupted else 1
    records = [records_by_case[case.id] for case in wanted]
    if args.fresh:
        results.replace(records)
    files = [*charts.memory_vs_n(records, out), *charts.collectives(records, out)]
    sentence = recommend.advise(records)
    if args.json:
        document = {
            "schema": records[0].schema,
            "records": [record.to_json() for record in records],
            "advice": sentence,
            "files": [str(path) for path in (results.path, *files)],
        }
        print(json.dumps(document, indent=1))
        if line := tables.disturbance(records):
            note(line)
    else:
        screen = console()
        show_records(tables.comparison(records, screen), records, results.path, screen)
        screen.print(sentence)
    wrong = any(record.status == "error" or record.gradient == "differs" for record in records)
    ran = [record for record in records if record.status == "ok"]
    unchecked = [record for record in ran if record.gradient == "unchecked"]
    if unchecked:
        note(f"{len(unchecked)} of {len(ran)} cases have no checked gradient: {unchecked[0].gradient_reference}")
    return 1 if wrong or unchecked or not ran else 0


def _freeze_modules() -> None:
    """Take imported modules out of garbage collection: each case's trace collects twice, over 400,000 objects."""
    importlib.import_module("torch._dynamo")  # otherwise the first optimizer imports it, too late
    gc.collect()
    gc.freeze()


def _join(args: argparse.Namespace, device_type: str) -> "Joined | None":
    """Under torchrun: join its process group, set `args.nproc` and return this process's rank; None elsewhere."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    from mtp_mem.runs.ranks import Joined

    if args.nproc:
        raise BadInput("--nproc under torchrun, which has its own --nproc-per-node: leave one of them out")
    if args.budget_minutes:
        raise BadInput("--budget-minutes under torchrun: the ranks cannot agree on when the minutes are spent")
    joined = Joined.by_environment(device_type)
    args.nproc = joined.world
    return joined
