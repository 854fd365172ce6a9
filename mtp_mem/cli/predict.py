"""`mtp-mem predict`: peaks on GPUs that need not be here."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mtp_mem.cli.common import AddCommand, case_options, console, names, profile_of, progress

if TYPE_CHECKING:
    from mtp_mem.config.schema import GPU
    from mtp_mem.runs.record import Record


def add(command: AddCommand) -> None:
    """Register the command."""
    sub = command("predict", run, "peaks on GPUs that need not be here: the step on tensors without data")
    case_options(sub, "llama3-8b", "bf16")
    sub.add_argument("--gpu", type=names, metavar="A,B", help="GPUs of gpus.toml (see list), instead of the profile's")


def run(args: argparse.Namespace) -> int:
    """The profile's peaks on GPUs that need not be here, one after the other."""
    from mtp_mem.prediction.simulated_step import without_collections

    with without_collections():  # half a second of six
        return _predict(args)


def _predict(args: argparse.Namespace) -> int:
    from mtp_mem.config.schema import load_gpu
    from mtp_mem.prediction import peaks
    from mtp_mem.report import charts
    from mtp_mem.runs.record import ResultsFile

    profile = profile_of(args)
    gpus = {name.lower(): load_gpu(name) for name in args.gpu or profile.gpus}
    peaks.check_predictable(profile)
    alone = args.out if len(gpus) == 1 else None
    folder = args.out or Path("results")
    files = {name: ResultsFile(alone or folder / f"predict-{profile.name}-{name}", fresh=True) for name in gpus}
    found: dict[str, list[Record]] = {name: [] for name in gpus}
    with progress(len(gpus) * len(profile.sweep.n) * (1 + len(profile.sweep.strategies))) as begin:
        for name, gpu in gpus.items():
            for record in predict(profile, gpu, begin):
                files[name].append(record)
                found[name].append(record)
    written: list[Path] = []
    for name, gpu in gpus.items():
        written += [files[name].path, *charts.memory_vs_n(found[name], files[name].path.parent, gpu)]
        if not args.json:
            _show(found[name], files[name].path, gpu)
    records = [record for one in found.values() for record in one]
    if args.json:
        paths = [str(path) for path in written]
        document = {"schema": records[0].schema, "records": [r.to_json() for r in records], "files": paths}
        print(json.dumps(document, indent=1))
    return 1 if any(record.status == "error" for record in records) else 0


def _show(records: "list[Record]", path: Path, gpu: "GPU") -> None:
    from mtp_mem._util import show_bytes
    from mtp_mem.report import tables

    screen = console()
    screen.print(tables.prediction(records, screen, gpu))
    if slopes := tables.slopes(records):
        screen.print()
        screen.print(slopes)
    for line in tables.remarks(records):
        screen.print(line, markup=False)
    screen.print(f"\nrecords {path}, chart {path.with_name('memory-vs-n.png')} (.svg, .csv)", markup=False)
    screen.print(
        f"Predicted for {gpu.name} ({show_bytes(gpu.total_bytes)}), not measured on one; CUDA context and"
        " libraries come on top.\n",
        markup=False,
    )
