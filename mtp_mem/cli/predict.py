"""`mtp-mem predict`: peaks on GPUs that need not be here."""

import argparse
import json
from functools import partial
from pathlib import Path

from mtp_mem._util import format_bytes, without_collections
from mtp_mem.cli.common import (
    AddCommand,
    budget_option,
    case_options,
    console,
    note,
    profile_of,
    progress,
    show_assumptions,
    show_records,
)
from mtp_mem.cli.setup import changes_given, gpu_of, gpu_options, part_option
from mtp_mem.config.gpus import GPU
from mtp_mem.errors import BadInput
from mtp_mem.runs.record import Record
from mtp_mem.strategy import load_strategy, require

PROFILE = "llama3-8b"


def add(command: AddCommand) -> None:
    """Register the command."""
    sub = command("predict", run, "peaks on GPUs that need not be here: the step on tensors without data")
    case_options(sub, PROFILE)
    part_option(sub)
    gpu_options(sub, several=True)
    sub.add_argument(
        "--check",
        action="store_true",
        help="hold predictions of fixed shapes against the CUDA device here; without one they are printed (for --gpu,"
        " default h200). Resumes in --out; exit code 1 if a byte requested or 1 %% of the bytes allocated differ",
    )
    sub.add_argument("--quick", action="store_true", help="--check the narrow shape under the default allocator only")
    budget_option(sub, "case of --check")


def run(args: argparse.Namespace) -> int:
    """Predict the profile's peaks on GPUs that need not be here, one after the other."""
    if args.check:
        return _check(args)
    if args.quick or args.budget_minutes:
        raise BadInput("--quick and --budget-minutes are options of --check")
    with without_collections():  # saves half a second of six
        return _predict(args)


def _check(args: argparse.Namespace) -> int:
    from mtp_mem.runs import check_prediction

    cases = {name: getattr(args, name) for name in ("profile", "hf", "model", "strategies", "strategy")}
    if given := [*(f"--{name}" for name, value in cases.items() if value), *changes_given(args)]:
        raise BadInput(f"--check has its own cases: no {', '.join(given)}")
    if args.gpu and len(args.gpu) > 1:
        raise BadInput(f"--gpu {','.join(args.gpu)}: --check predicts for one GPU")
    document, right = check_prediction.run(
        args.gpu[0] if args.gpu else "h200",
        quick=args.quick,
        out=args.out or Path("results") / "check",
        budget_s=args.budget_minutes and 60 * args.budget_minutes,
        show=note if args.json else partial(print, flush=True),
    )
    if args.json:
        print(json.dumps(document, indent=1))
    return 0 if right else 1


def _predict(args: argparse.Namespace) -> int:
    from mtp_mem.prediction import peaks
    from mtp_mem.report import charts
    from mtp_mem.runs.predicted import predict
    from mtp_mem.runs.results_file import ResultsFile

    profile = profile_of(args)
    names = args.gpu or profile.gpus
    gpus = {gpu_folder(name): gpu_of(name, args) for name in names}
    if len(gpus) < len(names):
        raise BadInput(f"--gpu {','.join(names)}: two of these would share a folder; name each once")
    peaks.check_predictable(profile)
    strategies = {spec: load_strategy(spec) for spec in profile.sweep.strategies}
    require(strategies, profile.model, profile.workload, profile.training)
    alone = args.out if len(gpus) == 1 else None
    folder = args.out or Path("results")
    files = {name: ResultsFile(alone or folder / f"predict-{profile.name}-{name}") for name in gpus}
    for line in dict.fromkeys(line for file in files.values() for line in file.notes):
        note(f"note: {line}")
    records_by_gpu: dict[str, list[Record]] = {name: [] for name in gpus}
    with progress(len(gpus) * len(profile.sweep.n) * (1 + len(profile.sweep.strategies))) as begin:
        for name, gpu in gpus.items():
            for record in predict(profile, gpu, begin):
                files[name].append(record)
                records_by_gpu[name].append(record)
    for name, file in files.items():
        file.replace(records_by_gpu[name])
    written: list[Path] = []
    for name, gpu in gpus.items():
        written += [files[name].path, *charts.memory_vs_n(records_by_gpu[name], files[name].path.parent, gpu)]
        if not args.json:
            _show(records_by_gpu[name], files[name].path, gpu)
    records = [record for one in records_by_gpu.values() for record in one]
    if args.json:
        paths = [str(path) for path in written]
        document = {"schema": records[0].schema, "records": [r.to_json() for r in records], "files": paths}
        print(json.dumps(document, indent=1))
    return 1 if any(record.status == "error" for record in records) else 0


def gpu_folder(name: str) -> str:
    """The GPU's part of a results folder's name: `NAME` or `FILE.toml:NAME` without the file, in lower case."""
    return name.rpartition(":")[2].lower()


def _show(records: list[Record], path: Path, gpu: GPU) -> None:
    from mtp_mem.report import tables

    screen = console()
    show_records(tables.prediction(records, screen, gpu), records, path, screen)
    screen.print(
        f"Predicted for {gpu.name} ({format_bytes(gpu.total_bytes)}), not measured on one; CUDA context and"
        " libraries come on top."
    )
    show_assumptions(gpu)
    screen.print()
