"""`mtp-mem timeline`: one step's live bytes by category, and what its peak consists of."""

import argparse
import dataclasses
import json
from pathlib import Path

from mtp_mem.cli.common import AddCommand, device_option


def add(command: AddCommand) -> None:
    """Register the command."""
    sub = command("timeline", run, "one step's live bytes by category, and what its peak consists of")
    sub.add_argument("--profile", default="quick", help="a shipped one (see list) or a TOML file; default quick")
    sub.add_argument("--strategy", default="sequential", metavar="SPEC", help="default sequential")
    sub.add_argument("--n", type=int, help="number of heads; default the profile's largest")
    sub.add_argument("--gpu", help="predict for this GPU instead of running a step here")
    device_option(sub)
    sub.add_argument("--out", type=Path, metavar="DIR", help="where the files go; default under results/")


def run(args: argparse.Namespace) -> int:
    """One step's live bytes, tracked here or predicted for a GPU."""
    import torch

    from mtp_mem._util import format_bytes, writable
    from mtp_mem.config.profiles import load_profile
    from mtp_mem.config.schema import load_gpu
    from mtp_mem.environment import environment, footer
    from mtp_mem.memory import cpu, cuda_history
    from mtp_mem.prediction import peaks, simulated_step
    from mtp_mem.prediction.auto import resolve_auto
    from mtp_mem.report.charts import timeline as chart
    from mtp_mem.runs import bench
    from mtp_mem.strategy import load_strategy

    profile, strategy = load_profile(args.profile), load_strategy(args.strategy)
    config = profile.model.with_n(args.n or max(profile.sweep.n))
    out = writable(args.out or Path("results") / f"timeline-{profile.name}")
    device = torch.device("cpu")
    if args.gpu:
        gpu = load_gpu(args.gpu)
        peaks.check_predictable(profile)
        strategy, _ = resolve_auto(strategy, config, profile.workload, cuda=True, gpu=gpu)
        trace, how = simulated_step.simulate(config, profile.workload, strategy, gpu=gpu), f"predicted for {gpu.name}"
    else:
        from mtp_mem.data import load_corpus

        device = bench.resolve_device(args.device)
        corpus = load_corpus(profile.workload, config.vocab_size)
        step = bench.Bench(profile, config, corpus, device).step(strategy)
        for _ in range(bench.WARM_UP[device.type]):
            step()
        if device.type == "cuda":
            trace, how = (
                cuda_history.record(step, out / "snapshot.pickle"),
                "allocated blocks, by the allocator's history",
            )
        else:
            trace, how = cpu.track(step), "live tensor bytes, tracked"
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
