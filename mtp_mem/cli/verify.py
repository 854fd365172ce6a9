"""`mtp-mem verify`: is it the same gradient, and would the verifier notice if it were not?"""

import argparse
import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import torch

from mtp_mem.cli.common import (
    AddCommand,
    console,
    deterministic_option,
    device_option,
    numbers,
    progress,
    settle_numerics,
)
from mtp_mem.cli.setup import changes_given, chosen_profile, model_options, names, ranks_option, training_options
from mtp_mem.config.schema import ALL_DTYPES, Dtype
from mtp_mem.data import load_corpus
from mtp_mem.errors import BadInput, unknown
from mtp_mem.model.own import moved, without_dropout
from mtp_mem.strategy import kernel_limits, load_strategy, loadable, refusal, require
from mtp_mem.verification.checks import Check, Verification
from mtp_mem.verification.problem import Problem
from mtp_mem.verification.scenarios import REAL_SIZES, SCENARIOS, Scenario
from mtp_mem.verification.verify import verify, verify_problem

SHOWN = 20  # failures in the terminal; --json has all


def add(command: AddCommand) -> None:
    """Register the command."""
    sub = command("verify", run, "every strategy's gradients against an fp64 oracle, in every way that has caught bugs")
    sub.add_argument("--strategies", type=names, metavar="A,B", help="default: all that are available here")
    sub.add_argument("--strategy", action="append", metavar="SPEC", help="one more: a name or package.module:Class")
    model_options(sub, None)
    sub.add_argument("--n", type=numbers, metavar="1,2,4", help="numbers of heads, instead of the profile's")
    training_options(sub)
    sub.add_argument("--prove", action="store_true", help="run the shipped broken strategies: each must be caught")
    device_option(sub)
    deterministic_option(sub)
    ranks_option(sub, "scenarios of several ranks: every strategy")


def run(args: argparse.Namespace) -> int:
    """Exit code 0: all checks passed (--prove: all bugs were caught); 1: not; 130: stopped, what it had is shown."""
    from mtp_mem.runs.bench import resolve_device

    settle_numerics(args)
    device = resolve_device(args.device)
    own = args.profile or args.hf or args.model
    if not own:
        if args.dtype and args.dtype not in ALL_DTYPES:
            raise unknown("dtype", args.dtype, ALL_DTYPES)
        used = {"--dtype", "--sharding"} if args.nproc else {"--dtype"}
        if idle := [option for option in changes_given(args) if option not in used]:
            raise BadInput(f"{idle[0]} needs --profile, --hf or --model: the scenarios set it themselves")
    if args.nproc and args.prove:
        raise BadInput("--prove runs in one process: no --nproc")
    if args.nproc and own:
        raise BadInput("--nproc runs scenarios of its own: no --profile, --hf or --model (compare --nproc takes them)")
    if args.prove:
        if own or args.strategies or args.strategy or args.dtype:
            raise BadInput("--prove has strategies and scenarios of its own: no --profile, --strategies or --dtype")
        return _prove(args, device)
    asked = list(dict.fromkeys([*(args.strategies or ()), *(args.strategy or ())])) or None  # None: all there are
    checks: list[Check] = []
    remarks: tuple[str, ...] | None = None
    with contextlib.suppress(KeyboardInterrupt):
        if own:
            remarks = _on_profile(args, asked, device, checks.append)
        elif args.nproc:
            remarks = _on_ranks(args, asked, device, checks.append)
        else:
            dtypes: tuple[Dtype, ...] = (args.dtype,) if args.dtype else ALL_DTYPES
            with progress(None) as begin:
                remarks = verify(asked, dtypes=dtypes, device=device, progress=begin, each=checks.append).remarks
    result = Verification(tuple(checks), remarks or (), complete=remarks is not None)
    _show(args, result)
    if not result.complete:
        return 130
    return 0 if result.passed else 1


def _show(args: argparse.Namespace, result: Verification) -> None:
    from mtp_mem.report import tables

    specs = list(dict.fromkeys(check.strategy for check in result.checks))
    if args.json:
        document = {"passed": result.passed, "summary": _sentence(result, specs), "remarks": result.remarks}
        print(json.dumps(document | {"checks": [_json(check) for check in result.checks]}, indent=1))
        return
    screen = console()
    screen.print(tables.verification(result, specs, screen))
    for line in result.remarks:
        screen.print(line)
    not_right = [*result.failures, *result.unchecked]
    for check in not_right[:SHOWN]:
        screen.print(check.explain())
    if len(not_right) > SHOWN:
        screen.print(f"... and {len(not_right) - SHOWN} more; --json has them all")
    screen.print(_sentence(result, specs))


def _on_profile(
    args: argparse.Namespace, asked: list[str] | None, device: torch.device, each: Callable[[Check], None]
) -> tuple[str, ...]:
    """Check the profile's own model, each check passed to `each`; returns a line for every strategy left out."""
    from mtp_mem.runs.bench import Bench

    profile = chosen_profile(args)
    if args.n:
        profile = dataclasses.replace(profile, sweep=dataclasses.replace(profile.sweep, n=args.n))
    corpus = load_corpus(profile.workload, profile.model.vocab_size)
    strategies = {spec: load_strategy(spec) for spec in asked or loadable()}
    setup = profile.model, profile.workload, profile.training
    if asked:
        require(strategies, *setup)
    cpu = torch.device("cpu")
    unable = {spec: why for spec, s in strategies.items() if (why := refusal(s, *setup))}
    able = {spec: strategy for spec, strategy in strategies.items() if spec not in unable}
    with progress(len(profile.sweep.n)) as begin:
        for n in profile.sweep.n:
            begin(f"{profile.name}, n = {n}")
            bench = Bench(profile, profile.model.with_n(n), corpus, device)
            scenario = Scenario(
                name=f"{profile.name}, n = {n}",
                n=n,
                chunk=None,
                scale=profile.training.scale(profile.workload.dtype),
                label_smoothing=profile.training.label_smoothing,
                z_loss=profile.training.z_loss,
            )
            with without_dropout(bench.model):
                problem = Problem(scenario, bench.model, moved(bench.model, "fp64", cpu), (bench.batch,), {})
                for check in verify_problem(problem, profile.workload.dtype, able):
                    each(check)
    return tuple(f"{spec} is left out: it {why}" for spec, why in unable.items())


def _on_ranks(
    args: argparse.Namespace, asked: list[str] | None, device: torch.device, each: Callable[[Check], None]
) -> tuple[str, ...]:
    """Run scenarios of several ranks, each check passed to `each`; returns a line for every strategy left out."""
    from mtp_mem.runs.ranks import Group
    from mtp_mem.verification import on_ranks

    dtype: Dtype = args.dtype or "fp32"
    if dtype not in ("fp32", "fp64"):
        raise BadInput(f"--dtype {dtype}: with --nproc fp32 or fp64: in less, sums over ranks round too")
    if args.nproc < 2:
        raise BadInput(f"--nproc {args.nproc}: expected at least 2 ranks")
    hows: tuple[on_ranks.How, ...] = (
        ("ddp", "fsdp2", "hsdp") if args.nproc % 2 == 0 and args.nproc > 2 else ("ddp", "fsdp2")
    )
    if args.sharding:
        if args.sharding not in hows:
            raise BadInput(
                f"--sharding {args.sharding}: expected {', '.join(hows)}; hsdp needs 4 ranks, 6, 8, ... in two groups"
            )
        hows = (args.sharding,)
    limits = {spec: kernel_limits(load_strategy(spec)) for spec in asked or loadable()}
    unable = {spec: f"it {own.computes}" for spec, own in limits.items() if not own.takes(dtype)}
    unable |= {spec: f"it takes multiples of {own.multiple_of}" for spec, own in limits.items() if own.multiple_of > 1}
    jobs = on_ranks.checks([spec for spec in limits if spec not in unable], hows)
    group = Group(args.nproc, device.type)
    with progress(len(jobs)) as begin:
        for job, answer in group.run(on_ranks.RankChecks(dtype, device.type), jobs, begin):
            if not isinstance(answer, Check):
                answer = Check(strategy=job.strategy, scenario=job.name, dtype=dtype, broken=answer["error"])
            each(answer)
    return tuple(f"{spec} is left out: {why}" for spec, why in unable.items())


def _prove(args: argparse.Namespace, device: torch.device) -> int:
    from mtp_mem.report import tables
    from mtp_mem.verification.broken_conduct import ALL_BROKEN as BROKEN

    caught: dict[str, list[Check]] = {}
    with progress(len(BROKEN)) as begin:
        for broken in BROKEN:
            begin(broken.__name__)
            made_for_it = [s for s in (*SCENARIOS, *REAL_SIZES) if s.name == broken.caught_by]
            result = verify([broken()], scenarios=made_for_it, behaviour=not made_for_it, device=device)
            caught[broken.__name__] = [c for c in result.failures if c.scenario == broken.caught_by]
    missed = [name for name, failures in caught.items() if not failures]
    if args.json:
        rows = [
            {
                "strategy": b.__name__,
                "bug": (b.__doc__ or "").strip(),
                "origin": b.origin,
                "caught_by": b.caught_by,
                "caught": b.__name__ not in missed,
                "failures": [_json(check) for check in caught[b.__name__]],
            }
            for b in BROKEN
        ]
        print(json.dumps({"passed": not missed, "broken": rows}, indent=1))
    else:
        screen = console()
        screen.print(tables.proof(BROKEN, caught, screen))
        said = f"NOT caught: {', '.join(missed)}." if missed else f"All {len(BROKEN)} broken strategies were caught."
        screen.print(said)
    return 1 if missed else 0


def _sentence(result: Verification, specs: list[str]) -> str:
    wrong = sorted({check.strategy for check in result.failures})
    if wrong and not result.complete:
        return f"WRONG: {', '.join(wrong)}. Stopped before the end: the others were not checked to the end."
    if wrong:
        rest = " No other is wrong." if len(wrong) < len(specs) else ""
        return f"WRONG: {', '.join(wrong)}.{rest}"
    if not result.complete:
        return f"Stopped: of {len(result.checks)} checks none failed; the others were not run."
    if not result.checks:
        return "Nothing was checked: there was nothing to run."
    if result.unchecked:
        return (
            f"NOT verified: of {len(result.checks)} checks {len(result.unchecked)} had nothing to check: every right"
            " gradient there is absent, zero or not finite, or overflows fp16."
        )
    exact = {s: [c for c in result.of(s) if c.exact] for s in specs}
    same = [s for s in specs if exact[s] and all(c.identical for c in exact[s])]
    sentence = f"Right: {len(result.checks)} checks, none failed."
    if same:
        sentence += f" Bit-identical to naive wherever the order allows it: {', '.join(same)}."
    return sentence


def _json(check: Check) -> dict[str, Any]:
    def number(value: float | None) -> float | str | None:
        return value if value is None or math.isfinite(value) else "inf"

    parts = [
        {
            "part": p.name,
            "status": p.status,
            "error": number(p.error),
            "naive_error": number(p.naive_error),
            "allowed": number(p.allowed),
            "problem": p.problem,
        }
        for p in check.parts
    ]
    return {
        "strategy": check.strategy,
        "scenario": check.scenario,
        "dtype": check.dtype,
        "status": check.status,
        "passed": check.status == "right",
        "bit_identical": check.identical,
        "broken": check.broken,
        "parts": parts,
    }
