"""`mtp-mem plan`: the largest batch, sequence and n that fit on a GPU that need not be here."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING

from mtp_mem._util import format_bytes, without_collections, writable, write_json
from mtp_mem.cli.common import AddCommand, console, progress, show_assumptions
from mtp_mem.cli.setup import chosen_profile, gpu_of, gpu_options, model_options, names, training_options
from mtp_mem.config.gpus import GPU
from mtp_mem.config.schema import MOST_MODULES, Profile
from mtp_mem.errors import BadInput, BrokenContract, Missing, MtpMemError
from mtp_mem.strategy import Strategy, load_present

if TYPE_CHECKING:
    from mtp_mem.prediction.largest_fit import Answer, Plan

LARGEST_HEADROOM = 90  # per cent; beyond that no model is left to plan for


def add(command: AddCommand) -> None:
    """Register the command."""
    sub = command("plan", run, "the largest batch, sequence and n that fit on a GPU that need not be here")
    model_options(sub, "llama3-8b")
    gpu_options(sub, several=False)
    sub.add_argument(
        "--headroom", default="5%", help="share of the GPU to leave for the CUDA context and libraries; default 5%%"
    )
    sub.add_argument("--strategies", type=names, metavar="A,B", help="instead of the profile's; name[:option=value]...")
    sub.add_argument("--strategy", action="append", metavar="SPEC", help="one more: a name or package.module:Class")
    sub.add_argument("--n", help="number of heads while batch and sequence vary; default the profile's largest")
    sub.add_argument(
        "--vary",
        type=names,
        metavar="A,B",
        help="try training setups instead, at the profile's batch, sequence and n: trunk_checkpointing, micro_batches,"
        " optimizer, world (GPUs under FSDP2); the cheapest that fits is named",
    )
    training_options(sub)
    sub.add_argument("--out", type=Path, metavar="DIR", help="keep the plan there, and a chart of the batch by n")


def run(args: argparse.Namespace) -> int:
    """Show how much of the profile fits on the GPU, strategy by strategy."""
    with without_collections():
        return _plan(args)


def _plan(args: argparse.Namespace) -> int:
    from mtp_mem.prediction.largest_fit import LeftOut, Point, Prober, plan
    from mtp_mem.prediction.peaks import check_predictable
    from mtp_mem.report.plan import plan_document

    profile, percent = chosen_profile(args), headroom(args.headroom)
    gpu = gpu_of(profile.gpus[0] if args.gpu is None else args.gpu, args)
    limit = int(gpu.total_bytes * (1 - percent / 100))
    check_predictable(profile)
    if profile.training.part != "step":
        raise BadInput(f"training.part = {profile.training.part!r}: plan fits whole steps; expected step")
    workload = profile.workload
    base = Point(batch=workload.batch, sequence=workload.sequence, n=one_n(args.n, profile))
    profile.model.with_n(base.n)  # raises where the model has too few layers
    strategies, left_out = load_present([*(args.strategies or profile.sweep.strategies), *(args.strategy or ())])
    if not strategies:
        raise Missing("no strategy can be predicted here: " + "; ".join(left_out.values()))
    if args.vary:
        return plan_setups(args, profile, gpu, base.n, strategies, left_out, limit)
    out = writable(args.out) if args.out else None
    batches: list[Answer] = []
    with progress(None) as begin:
        prober = Prober(profile, gpu, strategies, begin)
        result = plan(prober, base, limit)
        for n in profile.sweep.n if out else ():
            batches += plan(prober, dataclasses.replace(base, n=n), limit, ["batch"]).answers
    unable = result.left_out
    result = dataclasses.replace(result, left_out=LeftOut({**left_out, **unable.reasons}, unable.failed))
    if not result.answers and result.before_a_step is None:
        raise nothing(bool(unable.failed), result.left_out.reasons)
    content = plan_document(result, batches, profile, gpu, float(percent))
    files = []
    if out:
        from mtp_mem.report.draw_files import plan_chart

        write_json(out / "plan.json", content)
        files = [out / "plan.json", *plan_chart(content, out)]
    if args.json:
        print(json.dumps({**content, "files": [str(path) for path in files]}, indent=1))
    else:
        show(result, profile, gpu, float(percent))
        show_files(files)
    return 1 if unable.failed else 0


def plan_setups(
    args: argparse.Namespace,
    profile: Profile,
    gpu: GPU,
    n: int,
    strategies: dict[str, Strategy],
    left_out: dict[str, str],
    limit: int,
) -> int:
    """Show training setups side by side, and the cheapest whose allocated peak is within `limit` bytes."""
    from mtp_mem.prediction.setups import setup_advice, try_setups
    from mtp_mem.report.plan import setups_document, setups_table

    with progress(None) as begin:
        rows, unable = try_setups(profile, gpu, n, strategies, args.vary, begin)
    left_out = {**left_out, **unable.reasons}
    if not rows:
        raise nothing(bool(unable.failed), left_out)
    code = 1 if unable.failed else 0
    content = setups_document(rows, left_out, profile, gpu, n, limit)
    files = []
    if args.out:
        from mtp_mem.report.draw_files import ranks_chart

        out = writable(args.out)
        write_json(out / "plan-setups.json", content)
        files = [out / "plan-setups.json", *ranks_chart(content, out)]
    if args.json:
        print(json.dumps({**content, "files": [str(path) for path in files]}, indent=1))
        return code
    screen, sequences = console(), profile.workload.batch * profile.training.micro_batches
    screen.print(
        f"{profile.name}, n = {n}, {sequences} x {profile.workload.sequence} tokens a step, on {gpu.name}:"
        f" a step may allocate {format_bytes(limit)}.\n"
    )
    screen.print(setups_table(rows, limit, wide=screen.width >= 110))
    screen.print()
    for spec, reason in left_out.items():
        screen.print(f"{spec} is left out: {reason}")
    screen.print(setup_advice(rows, limit))
    screen.print(f"Predicted for {gpu.name}, not measured on one. FLOPs are the products' alone.")
    show_assumptions(gpu)
    show_files(files)
    return code


def show_files(files: Sequence[Path]) -> None:
    """Print where the plan was kept, and its chart if there was something to draw."""
    if files:
        print(f"plan {files[0]}{f', chart {files[1]} (.svg, .csv)' if files[1:] else ''}")


def nothing(failed: bool, left_out: Mapping[str, str]) -> MtpMemError:
    """The error where no strategy is left to plan with; `failed`: one of them raised an error of its own."""
    return (BrokenContract if failed else BadInput)("no strategy can be predicted: " + "; ".join(left_out.values()))


def headroom(text: str) -> Decimal:
    """`5%` or `5` as a number of per cent.

    Raises:
        BadInput: no number, or none from 0 to 90.
    """
    try:  # a fraction of 1e999999999 would take hours and gigabytes
        value = Decimal(text.strip().removesuffix("%"))
        if 0 <= value <= LARGEST_HEADROOM:
            return value
    except InvalidOperation:  # no number, or nan
        pass
    raise BadInput(f"--headroom {text}: expected a percentage from 0% to {LARGEST_HEADROOM}%, like 5%")


def one_n(text: str | None, profile: Profile) -> int:
    """The number of heads at which batch and sequence vary, by default the profile's largest.

    Raises:
        BadInput: no number, or several.
    """
    if text is None:
        return max(profile.sweep.n)
    try:
        return int(text)
    except ValueError:
        raise BadInput(f"--n {text}: expected one number of heads, like 4") from None


def show(result: "Plan", profile: Profile, gpu: GPU, percent: float) -> None:
    """Print the plan; `percent` is the headroom."""
    from mtp_mem.prediction.largest_fit import AXES, advice
    from mtp_mem.report.plan import TIGHT, plan_table

    screen, base = console(), result.base
    screen.print(
        f"{profile.name} on {gpu.name}: a step may allocate {format_bytes(result.limit)}"
        f" of {format_bytes(gpu.total_bytes)}, headroom {percent:g}%."
        f" A column varies one of batch {base.batch}, sequence {base.sequence}, n = {base.n}.\n"
    )
    if result.answers:
        screen.print(plan_table(result, screen))
        screen.print()
    for axis in AXES:
        if misses := [answer for answer in result.of(axis) if not answer.fits]:
            over = ", ".join(f"{a.strategy} is {format_bytes(-result.left(a))} over at {a.value}" for a in misses)
            screen.print(f"No {axis} fits: {over}.")
    if any(answer.fits and answer.next_point is None for answer in result.of("n")):
        largest = profile.model.largest_n
        why = "every layer is a head, the model's own limit" if largest else "more heads are not tried"
        screen.print(f"n = {largest or MOST_MODULES}: {why}.")
    if any(result.fit(answer.figures) == "tight" for answer in result.answers):
        screen.print(
            f"{TIGHT} tight: with the unused parts of its segments it reserves more than that, and the allocator may"
            " have to give segments back and try again."
        )
    for spec, reason in result.left_out.reasons.items():
        screen.print(f"{spec} is left out: {reason}")
    screen.print(advice(result))
    screen.print(
        f"Predicted for {gpu.name}, not measured on one. The CUDA context and libraries come on top: the headroom is"
        " for them. No time is predicted."
    )
    show_assumptions(gpu)
