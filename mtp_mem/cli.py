"""The command line: compare, predict, timeline, list, env.

Results go to stdout, progress and notes to stderr. Exit codes: 0 ok; 1 a check failed; 2 usage or bad input;
3 something needed is missing; 130 interrupted.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mtp_mem import __version__
from mtp_mem.errors import MtpMemError

if TYPE_CHECKING:
    from mtp_mem.config import Profile


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # so that `--strategy my_module:Class` finds what lies here, as `python -m` does
    args = _parser().parse_args(argv)
    # Deprecation notes of the libraries we call are for us, not for the user in front of a table.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\..*")
    try:
        code: int = args.run(args)
        return code
    except MtpMemError as e:
        _note(f"mtp-mem: {e}")
        return e.exit_code
    except KeyboardInterrupt:
        _note("mtp-mem: interrupted")
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, `| head` say; nothing is wrong here
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def compare(args: argparse.Namespace) -> int:
    """`mtp-mem compare`: run the profile's cases that are still missing, then show them all."""
    from mtp_mem import (
        advice,
        bench,
        charts,
        sweep,
        tables,
    )  # torch takes seconds to import: only for commands that need it
    from mtp_mem.data import load_corpus
    from mtp_mem.memory.record import ResultsFile

    profile = _profile(args)
    device = bench.resolve_device(args.device)
    corpus = load_corpus(profile.workload, profile.model.vocab_size, args.text)
    if corpus.note:
        _note(f"note: {corpus.note}")
    out = args.out or Path("results") / profile.name
    results = ResultsFile(out, fresh=args.fresh)

    wanted = sweep.cases(profile, corpus, device)
    found = {record.case: record for record in results.read()}
    for line in results.notes:
        _note(f"note: {line}")
    todo = [case for case in wanted if case.fingerprint not in found or found[case.fingerprint].status == "error"]
    if len(todo) < len(wanted):
        _note(
            f"{len(wanted) - len(todo)} of {len(wanted)} cases are in {results.path} already (--fresh runs them again)"
        )
    try:
        with _progress(sweep.units(todo, profile.sweep.rounds)) as progress:
            for record in sweep.run(profile, corpus, device, todo, progress):
                results.append(record)
                found[record.case] = record
    except KeyboardInterrupt:
        finished = sum(case.fingerprint in found for case in wanted)
        _note(f"stopped: {finished} of {len(wanted)} cases are in {results.path}; the same command runs the others")
        return 130
    records = [found[case.fingerprint] for case in wanted]
    files = charts.memory_vs_n(records, out)
    sentence = advice.advise(records)
    if args.json:
        document = {
            "schema": records[0].schema,
            "records": [record.to_json() for record in records],
            "advice": sentence,
            "files": [str(path) for path in (results.path, *files)],
        }
        print(json.dumps(document, indent=1))
    else:
        console = _console()
        console.print(tables.comparison(records, console))
        if slopes := tables.slopes(records):
            console.print()
            console.print(slopes)
        for record in records:
            if record.error:
                console.print(f"n={record.n} {record.strategy}: {record.status}: {record.error}", markup=False)
        console.print(f"\nrecords {results.path}, chart {out / 'memory-vs-n.png'} (.svg, .csv)", markup=False)
        console.print(sentence, markup=False)
    failed = any(record.status == "error" or record.gradient == "differs" for record in records)
    return 1 if failed else 0


def predict(args: argparse.Namespace) -> int:
    """`mtp-mem predict`: the profile's peaks on a GPU that need not be here."""
    from mtp_mem import charts, prediction, tables
    from mtp_mem.config import load_gpu
    from mtp_mem.memory.record import ResultsFile
    from mtp_mem.units import show_bytes

    profile, gpu = _profile(args), load_gpu(args.gpu)
    out = args.out or Path("results") / f"predict-{profile.name}-{args.gpu.lower()}"
    prediction.check_predictable(profile)
    results = ResultsFile(out, fresh=True)
    records = []
    with _progress(len(profile.sweep.n) * (1 + len(profile.sweep.strategies))) as progress:
        for record in prediction.predict(profile, gpu, progress):
            results.append(record)
            records.append(record)
    files = charts.memory_vs_n(records, out, gpu)
    if args.json:
        paths = [str(path) for path in (results.path, *files)]
        document = {"schema": records[0].schema, "records": [r.to_json() for r in records], "files": paths}
        print(json.dumps(document, indent=1))
    else:
        console = _console()
        console.print(tables.prediction(records, console, gpu))
        if slopes := tables.slopes(records):
            console.print()
            console.print(slopes)
        for record in records:
            if record.error:
                console.print(f"n={record.n} {record.strategy}: {record.error}", markup=False)
        console.print(f"\nrecords {results.path}, chart {out / 'memory-vs-n.png'} (.svg, .csv)", markup=False)
        console.print(
            f"Predicted for {gpu.name} ({show_bytes(gpu.total_bytes)}), not measured on one; CUDA context and"
            " libraries come on top.",
            markup=False,
        )
    return 1 if any(record.status == "error" for record in records) else 0


def timeline(args: argparse.Namespace) -> int:
    """`mtp-mem timeline`: one step's live bytes, tracked here or predicted for a GPU."""
    import torch

    from mtp_mem import bench, prediction
    from mtp_mem import timeline as chart
    from mtp_mem.config import load_gpu, load_profile
    from mtp_mem.environment import environment, footer
    from mtp_mem.memory import cpu, fake
    from mtp_mem.memory.record import writable
    from mtp_mem.strategy import load_strategy
    from mtp_mem.units import show_bytes

    profile, strategy = load_profile(args.profile), load_strategy(args.strategy)
    config = profile.model.with_n(args.n or max(profile.sweep.n))
    if args.gpu:
        gpu = load_gpu(args.gpu)
        prediction.check_predictable(profile)
        trace, how = fake.trace_step(config, profile.workload, strategy, gpu=gpu), f"predicted for {gpu.name}"
    else:
        from mtp_mem.data import load_corpus

        corpus = load_corpus(profile.workload, config.vocab_size)
        step = bench.Bench(profile, config, corpus, torch.device("cpu")).step(strategy)
        step()
        trace, how = cpu.track(step), "live tensor bytes, tracked"
    out = writable(args.out or Path("results") / f"timeline-{profile.name}")
    title = f"{args.strategy}, n = {config.n_future}, {profile.name}: what is live during one training step"
    files = chart.draw(trace, out, title, f"{how} · {footer(environment('cpu'))}")
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
        print(f"peak {show_bytes(peak.nbytes)} in {peak.phase} ({peak.op}), {how}:")
        for category, nbytes in peak.by_category.items():
            print(f"  {show_bytes(nbytes):>10}  {category}")
        print(f"chart {files[0]} (.svg, .csv)")
    return 0


def list_(args: argparse.Namespace) -> int:
    """`mtp-mem list`: strategies and profiles, a line each."""
    from mtp_mem.config import builtin_profiles, load_gpus, load_profile
    from mtp_mem.strategy import available, summary

    strategies: dict[str, str] = {}
    for name in available():
        try:
            strategies[name] = summary(name)
        except MtpMemError as e:
            strategies[name] = f"not available: {e}"
    profiles = {name: load_profile(name).description for name in builtin_profiles()}
    gpus = {name: gpu.name for name, gpu in load_gpus().items()}
    if args.json:
        print(json.dumps({"strategies": strategies, "profiles": profiles, "gpus": gpus}, indent=1))
        return 0
    for title, entries in (("Strategies", strategies), ("Profiles", profiles), ("GPUs", gpus)):
        print(title)
        width = max(map(len, entries), default=0)
        for name, line in entries.items():
            print(f"  {name:{width}}  {line}")
    return 0


def env(args: argparse.Namespace) -> int:
    """`mtp-mem env`: the machine, as every record describes it."""
    import torch

    from mtp_mem.environment import environment

    found = environment("cuda" if torch.cuda.is_available() else "cpu")
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        for key, value in found.items():
            print(f"{key:18} {value}")
    return 0


def _profile(args: argparse.Namespace) -> "Profile":
    """The profile with the command line's changes; every strategy in it can be loaded."""
    from mtp_mem.config import load_profile
    from mtp_mem.strategy import load_strategy

    profile = load_profile(args.profile)
    changes = {key: value for key in ("n", "rounds") if (value := getattr(args, key, None)) is not None}
    specs = tuple(args.strategies or profile.sweep.strategies) + tuple(args.strategy or ())
    for spec in specs:
        load_strategy(spec)
    changes["strategies"] = tuple(dict.fromkeys(specs))
    workload = dataclasses.replace(profile.workload, dtype=args.dtype) if args.dtype else profile.workload
    return dataclasses.replace(profile, sweep=dataclasses.replace(profile.sweep, **changes), workload=workload)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mtp-mem", description="Profile and verify head-backward strategies for multi-token prediction."
    )
    parser.add_argument("--version", action="version", version=f"mtp-mem {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], help_: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_, description=help_)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="one JSON document on stdout")
        return sub

    def cases(sub: argparse.ArgumentParser, profile: str, dtypes: str) -> None:
        sub.add_argument(
            "--profile", default=profile, help=f"a shipped profile (see list) or a TOML file; default {profile}"
        )
        sub.add_argument(
            "--strategies", type=_names, metavar="A,B", help="instead of the profile's; name[:option=value]..."
        )
        sub.add_argument("--strategy", action="append", metavar="SPEC", help="one more: a name or package.module:Class")
        sub.add_argument("--n", type=_numbers, metavar="1,2,4", help="numbers of heads, instead of the profile's")
        sub.add_argument("--dtype", help=f"{dtypes}, instead of the profile's")
        sub.add_argument("--out", type=Path, metavar="DIR", help="where results go; default under results/")

    sub = command("compare", compare, "bytes, time and gradients of strategies against the number of heads")
    cases(sub, "quick", "fp64, fp32, bf16 or bf16-mixed")
    sub.add_argument("--rounds", type=int, help="timed steps per case, instead of the profile's")
    sub.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 text; default: CPython's help topics")
    sub.add_argument("--device", default="auto", type=_device, help="cpu, cuda or cuda:N; default: CUDA if any")
    sub.add_argument("--fresh", action="store_true", help="forget the results in --out and start over")
    sub = command("predict", predict, "peaks on a GPU that need not be here: the step on tensors without data")
    cases(sub, "llama3-8b", "bf16")
    sub.add_argument("--gpu", default="h200", help="a GPU of profiles/gpus.toml (see list); default h200")
    sub = command("timeline", timeline, "one step's live bytes by category, and what its peak consists of")
    sub.add_argument("--profile", default="quick", help="a shipped one (see list) or a TOML file; default quick")
    sub.add_argument("--strategy", default="sequential", metavar="SPEC", help="default sequential")
    sub.add_argument("--n", type=int, help="number of heads; default the profile's largest")
    sub.add_argument("--gpu", help="predict for this GPU instead of tracking a step here")
    sub.add_argument("--out", type=Path, metavar="DIR", help="where the files go; default under results/")
    command("list", list_, "strategies and profiles, a line each")
    command("env", env, "the machine, as every record describes it")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers like 1,2,4,8") from None


def _device(text: str) -> str:
    kind, _, index = text.partition(":")
    if (kind, index) not in (("auto", ""), ("cpu", ""), ("cuda", "")) and not (kind == "cuda" and index.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected auto, cpu, cuda or cuda:N")
    return text


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _console() -> Console:
    """Stdout as wide as the terminal; a pipe gets what fits 120 columns, or COLUMNS."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return Console(highlight=False, soft_wrap=False)
    return Console(highlight=False, width=120)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr for a person, nothing in a pipe. Ctrl-C or a termination signal ends the block.

    The signal is only noted, and acted on when the next unit of work begins: an exception raised at any moment may be
    raised inside a finalizer, and Python drops it there. A second signal interrupts at once.
    """
    stopping = False

    def stop(*_: Any) -> None:
        nonlocal stopping
        if stopping:
            raise KeyboardInterrupt
        stopping = True

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
            task = bar.add_task("", total=total)
            begun = 0

            def begin(what: str) -> None:
                nonlocal begun
                if stopping:
                    raise KeyboardInterrupt
                bar.update(task, description=what, completed=begun)
                begun += 1

            yield begin
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
