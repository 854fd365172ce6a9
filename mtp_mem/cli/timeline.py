"""`mtp-mem timeline`: one step's live bytes by category, and what its peak consists of."""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from mtp_mem.cli.common import AddCommand, device_option
from mtp_mem.cli.setup import chosen_profile, count, gpu_of, gpu_options, model_options, part_option, training_options
from mtp_mem.errors import BrokenContract, MtpMemError, one_line


def add(command: AddCommand) -> None:
    """Register the command."""
    sub = command("timeline", run, "one step's live bytes by category, and what its peak consists of")
    model_options(sub, "quick")
    sub.add_argument("--strategy", default="sequential", metavar="SPEC", help="default sequential")
    sub.add_argument("--n", type=count, help="number of heads; default the profile's largest")
    part_option(sub)
    gpu_options(sub, several=False)
    device_option(sub)
    sub.add_argument("--out", type=Path, metavar="DIR", help="where the files go; default under results/")
    training_options(sub)


def run(args: argparse.Namespace) -> int:
    """One step's live bytes, tracked here or predicted for a GPU."""
    import torch

    from mtp_mem._util import format_bytes, writable
    from mtp_mem.environment import environment, footer
    from mtp_mem.memory import cpu, cuda_history
    from mtp_mem.prediction import peaks, simulated_step
    from mtp_mem.prediction.auto import resolve_auto
    from mtp_mem.report.charts import timeline as chart
    from mtp_mem.runs import bench
    from mtp_mem.strategy import load_strategy

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
        from mtp_mem.data import load_corpus

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
        print(f"peak {format_bytes(peak.nbytes)} in {peak.phase} ({peak.op}), {how}:")
        for category, nbytes in peak.by_category.items():
            print(f"  {format_bytes(nbytes):>10}  {category}")
        print(f"chart {files[0]} (.svg, .csv, .json)")
    return 0


@contextlib.contextmanager
def _blamed(spec: str, strategy: object) -> Iterator[None]:
    """What a strategy from elsewhere raises in here is an error of its own, in one line, and not a crash of ours.

    Raises:
        BrokenContract: names the strategy, what it raised, and where.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except MtpMemError:
        raise
    except (Exception, SystemExit) as e:
        if type(strategy).__module__.startswith("mtp_mem."):
            raise
        raise BrokenContract(f"strategy {spec!r}: {one_line(e)}") from None
