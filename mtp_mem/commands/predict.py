"""`mtp-mem predict`: peaks on a GPU that need not be here."""

import argparse
import json
from pathlib import Path

from mtp_mem.commands.common import AddCommand, case_options, console, profile_of, progress


def add(command: AddCommand) -> None:
    """Register the command."""
    sub = command("predict", run, "peaks on a GPU that need not be here: the step on tensors without data")
    case_options(sub, "llama3-8b", "bf16")
    sub.add_argument("--gpu", default="h200", help="a GPU of profiles/gpus.toml (see list); default h200")


def run(args: argparse.Namespace) -> int:
    """The profile's peaks on a GPU that need not be here."""
    from mtp_mem import charts, prediction, tables
    from mtp_mem.config import load_gpu
    from mtp_mem.memory.record import ResultsFile
    from mtp_mem.units import show_bytes

    profile, gpu = profile_of(args), load_gpu(args.gpu)
    out = args.out or Path("results") / f"predict-{profile.name}-{args.gpu.lower()}"
    prediction.check_predictable(profile)
    results = ResultsFile(out, fresh=True)
    records = []
    with progress(len(profile.sweep.n) * (1 + len(profile.sweep.strategies))) as begin:
        for record in prediction.predict(profile, gpu, begin):
            results.append(record)
            records.append(record)
    files = charts.memory_vs_n(records, out, gpu)
    if args.json:
        paths = [str(path) for path in (results.path, *files)]
        document = {"schema": records[0].schema, "records": [r.to_json() for r in records], "files": paths}
        print(json.dumps(document, indent=1))
    else:
        screen = console()
        screen.print(tables.prediction(records, screen, gpu))
        if slopes := tables.slopes(records):
            screen.print()
            screen.print(slopes)
        for record in records:
            if record.chosen:
                screen.print(f"n={record.n} {record.strategy}: {record.chosen}", markup=False)
            if record.error:
                screen.print(f"n={record.n} {record.strategy}: {record.error}", markup=False)
        screen.print(f"\nrecords {results.path}, chart {out / 'memory-vs-n.png'} (.svg, .csv)", markup=False)
        screen.print(
            f"Predicted for {gpu.name} ({show_bytes(gpu.total_bytes)}), not measured on one; CUDA context and"
            " libraries come on top.",
            markup=False,
        )
    return 1 if any(record.status == "error" for record in records) else 0
