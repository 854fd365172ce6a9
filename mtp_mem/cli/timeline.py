"""`mtp-mem timeline` and `snapshot`: what is live in one training step, and in somebody's recording of a GPU."""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mtp_mem._util import format_bytes, writable
from mtp_mem.cli.common import AddCommand, console, device_option, note
from mtp_mem.cli.setup import chosen_profile, count, gpu_of, gpu_options, model_options, part_option, training_options
from mtp_mem.data import load_corpus
from mtp_mem.environment import environment, footer
from mtp_mem.errors import BadInput, BrokenContract, Missing, contained, one_line
from mtp_mem.strategy import load_strategy


def add(command: AddCommand) -> None:
    """Register the commands."""
    sub = command("timeline", run, "one step's live bytes by category, and what its peak consists of")
    model_options(sub, "quick")
    sub.add_argument("--strategy", default="sequential", metavar="SPEC", help="default sequential")
    sub.add_argument("--n", type=count, help="number of heads; default the profile's largest")
    part_option(sub)
    gpu_options(sub, several=False)
    device_option(sub)
    sub.add_argument("--out", type=Path, metavar="DIR", help="where the files go; default under results/")
    training_options(sub)
    sub = command(
        "snapshot",
        replay,
        "what a CUDA memory snapshot's peaks consist of, and whether our model of the allocator does the same;"
        " exit 0 exact, 1 different, 2 not a snapshot",
    )
    what = "torch.cuda.memory._dump_snapshot's pickle, the memory viewer's HTML page, or a .tape.json.gz"
    sub.add_argument("files", nargs="+", type=Path, metavar="FILE", help=what)
    sub.add_argument("--vocab", type=count, metavar="V", help="name the blocks that are whole rows of V values")
    sub.add_argument("--out", type=Path, metavar="DIR", help="draw a timeline of each recording into this folder")
    sub.add_argument(
        "--tape", type=Path, metavar="OUT", help="write sizes and addresses alone, to share: a .tape.json.gz"
    )


def run(args: argparse.Namespace) -> int:
    """Show one step's live bytes, tracked here or predicted for a GPU."""
    from mtp_mem.memory import cpu, cuda_history
    from mtp_mem.prediction import peaks, simulated_step
    from mtp_mem.prediction.auto import resolve_auto
    from mtp_mem.report.charts import timeline as chart
    from mtp_mem.runs import bench

    profile, strategy = chosen_profile(args), load_strategy(args.strategy)
    config = profile.model.with_n(args.n or max(profile.sweep.n))
    out = writable(args.out or Path("results") / f"timeline-{profile.name}")
    device = torch.device("cpu")
    assumed: list[str] = []
    if args.gpu is not None or args.gpu_memory is not None:
        gpu = gpu_of(profile.gpus[0] if args.gpu is None else args.gpu, args)
        peaks.check_predictable(profile)
        strategy, _ = resolve_auto(strategy, config, profile.workload, profile.training, cuda=True, gpu=gpu)
        with _blamed(args.strategy, strategy):
            trace = simulated_step.simulate(config, profile.workload, strategy, profile.training, gpu=gpu)
        how, assumed = f"predicted for {gpu.name}", peaks.assumptions(gpu)
    else:
        device = bench.resolve_device(args.device)
        corpus = load_corpus(profile.workload, config.vocab_size)
        step = bench.Bench(profile, config, corpus, device).step(strategy)
        with _blamed(args.strategy, strategy):
            for _ in range(bench.WARM_UP[device.type]):
                step()
            on_cuda = device.type == "cuda"
            trace = cuda_history.record(step, out / "snapshot.pickle") if on_cuda else cpu.track(step)
        how = "allocated blocks, by the allocator's history" if on_cuda else "live tensor bytes, tracked"
    title = f"{args.strategy}, n = {config.n_future}, {profile.name}: what is live during one training step"
    files = chart.draw(trace, out, title, f"{how} · {footer(environment(device.type))}")
    peak = trace.peak()
    document = {
        "strategy": args.strategy,
        "n": config.n_future,
        "baseline_bytes": trace.baseline,
        "peak_requested_bytes": peak.nbytes,
        "peak_phase": peak.phase,
        "peak_op": peak.op,
        "bytes_at_peak": peak.by_category,
        "largest": [dataclasses.asdict(storage) for storage in peak.live[: chart.LARGEST]],
        "assumptions": assumed,
        "files": [str(path) for path in files],
    }
    if args.json:
        print(json.dumps(document, indent=1))
    else:
        operator = f" ({peak.op})" if peak.op else ""  # autograd's own thread has no frame of ours
        print(f"peak {format_bytes(peak.nbytes)} in {peak.phase}{operator}, {how}:")
        for category, nbytes in peak.by_category.items():
            print(f"  {format_bytes(nbytes):>10}  {category}")
        for line in assumed:
            print(f"Assumed: {line}.")
        print(f"chart {files[0]} (.svg, .csv, .json)")
    return 0


def replay(args: argparse.Namespace) -> int:
    """Replay each snapshot in the model of the allocator, and show its peaks; returns the worst file's exit code."""
    from mtp_mem.memory import snapshot
    from mtp_mem.prediction.recording import hold
    from mtp_mem.report import recording as report

    code, documents, rows = 0, [], []
    out = None if args.out is None else writable(args.out)
    tapes = None if args.tape is None else writable(args.tape.parent)
    screen = console()
    for path in args.files:
        parts: list[dict[str, Any]] = []
        documents.append({"file": str(path), "error": None, "recordings": parts})
        try:
            recordings = snapshot.read(path)
        except BadInput as e:
            note(f"mtp-mem: {e}")
            documents[-1]["error"] = str(e)
            code = 2
            continue
        for recording in recordings:
            held = hold(recording.tape)
            code = max(code, int(not held.exact))
            blocks = report.at_peak(recording, held, args.vocab)
            rows.append((path.name, recording, held))
            files = []
            several = len(args.files) > 1 or len(recordings) > 1
            if out is not None:
                folder = out / f"{len(rows)}-{path.name.partition('.')[0]}" if several else out
                files = report.draw(path.name, recording, held, writable(folder), args.vocab)
            if tapes is not None:
                stem = args.tape.name.removesuffix(".gz").removesuffix(".json").removesuffix(".tape")
                name = f"{stem}-{len(rows)}.tape.json.gz" if several else args.tape.name
                recording.tape.save(tapes / name)
                files.append(tapes / name)
            facts = report.facts(recording, held, blocks, args.vocab)
            parts.append({**facts, "files": [str(file) for file in files]})
            if not args.json:
                report.show(screen, path.name, recording, held, blocks, args.vocab)
                for file in files:
                    if file.suffix in (".png", ".gz"):
                        screen.print(f"  {file}")
    if args.json:
        print(json.dumps({"snapshots": documents}, indent=1, allow_nan=False))
    elif len(rows) > 1:
        screen.print(report.summary(rows))
    return code


@contextlib.contextmanager
def _blamed(spec: str, strategy: object) -> Iterator[None]:
    """A block in which an exception of a strategy that is not ours becomes an error of one line, not a crash.

    Raises:
        BrokenContract: names the strategy, what it raised, and where.
    """
    try:
        with contained():
            yield
    except (BadInput, Missing):
        raise
    except Exception as e:
        if type(strategy).__module__.startswith("mtp_mem."):
            raise
        raise BrokenContract(f"strategy {spec!r}: {one_line(e)}") from None
