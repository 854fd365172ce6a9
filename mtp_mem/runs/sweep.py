"""Profile -> cases -> records: every strategy at every n, checked, measured and timed on the same weights and batch.

Strategies at one n share one model, and their timed steps are interleaved so that a drifting machine slows all alike.
On CUDA the bytes come first, each case in a process of its own while this one holds nothing on the device.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mtp_mem._util import Progress, format_bytes
from mtp_mem.config.schema import ModelConfig, Profile, Training, Workload
from mtp_mem.data import Corpus
from mtp_mem.environment import environment
from mtp_mem.memory.host import bounded_memory, host_bytes
from mtp_mem.model.build import parameters, weight_bytes
from mtp_mem.prediction.floor import NoLogits
from mtp_mem.prediction.formulas import baseline, formula_peak
from mtp_mem.runs import isolated
from mtp_mem.runs.bench import Bench, failure, free, speed
from mtp_mem.runs.disturbance import CpuWatch, disturbed
from mtp_mem.runs.identity import case_id, implementation
from mtp_mem.runs.record import Record, new_record
from mtp_mem.strategy import Strategy, load_strategy, require

if TYPE_CHECKING:
    from mtp_mem.runs.ranks import Joined

Facts = dict[str, Any]
"""Fields of a record."""


@dataclass(frozen=True)
class Case:
    """One strategy at one n, and the name of everything its figures depend on."""

    strategy: str
    n: int
    id: str
    implementation: str


def cases(profile: Profile, corpus: Corpus, device: torch.device) -> list[Case]:
    """The profile's cases, n by n, strategies in the profile's order."""
    versions = {spec: implementation(load_strategy(spec)) for spec in profile.sweep.strategies}

    def case(spec: str, n: int) -> Case:
        model, workload = profile.model.with_n(n).facts(), _workload(profile, corpus)
        training = profile.training.facts(profile.workload.dtype)
        facts = (model, workload, training, environment(device.type), profile.sweep.rounds)
        return Case(spec, n, case_id(spec, versions[spec], *facts), versions[spec])

    return [case(spec, n) for n in profile.sweep.n for spec in profile.sweep.strategies]


def _workload(profile: Profile, corpus: Corpus) -> dict[str, Any]:
    """The workload as a record has it, with source and digest of its text."""
    return {**dataclasses.asdict(profile.workload), "source": corpus.source, "digest": corpus.digest}


def units(todo: list[Case], rounds: int) -> int:
    """How often `run` calls its progress callback if no case is refused or fails."""
    return len(todo) * (2 + rounds) + len({case.n for case in todo})


def run(
    profile: Profile,
    corpus: Corpus,
    device: torch.device,
    todo: list[Case],
    progress: Progress,
    budget_s: float | None = None,
    joined: "Joined | None" = None,
) -> Iterator[Record]:
    """Run the cases n by n; each n's records are yielded as they become complete.

    A case that cannot fit by the closed forms is not run: its record says "oom", and what it needs.

    Args:
        profile: model, workload and rounds.
        corpus: the text.
        device: where the cases run.
        todo: the cases to run.
        progress: called once per unit of work.
        budget_s: seconds after which no further n is begun; the first n always is, so that every call gets ahead.
        joined: torchrun's group with this process as a rank; None: a sharded setup's ranks are new processes.

    Raises:
        BadInput: a strategy cannot be loaded, or cannot run this model.
    """
    strategies = {case.strategy: load_strategy(case.strategy) for case in todo}  # bad specs fail before any work
    require(strategies, profile.model, profile.workload, profile.training)
    if profile.training.sharding != "none":
        yield from _on_ranks(profile, corpus, device, todo, progress, budget_s, joined)
        return
    started = time.monotonic()
    for n in dict.fromkeys(case.n for case in todo):
        if n != todo[0].n and budget_s is not None and time.monotonic() - started >= budget_s:
            return
        config, runnable = profile.model.with_n(n), []
        on_cuda = device.type == "cuda"
        total_bytes = torch.cuda.get_device_properties(device).total_memory if on_cuda else host_bytes()
        for case in [case for case in todo if case.n == n]:
            reason = refusal(
                case.strategy, config, profile.workload, total_bytes, profile.training, device_type=device.type
            )
            if reason is None:
                runnable.append(case)
            else:
                progress(f"n={n} {case.strategy}: refused")
                yield _record(profile, corpus, device, case, {"status": "oom", "error": reason}, floor={})
        if runnable:
            chosen = {case.strategy: strategies[case.strategy] for case in runnable}
            with nullcontext() if on_cuda else bounded_memory():
                yield from _run_n(profile, config, corpus, device, runnable, chosen, progress)
            free(device)


def _on_ranks(
    profile: Profile,
    corpus: Corpus,
    device: torch.device,
    todo: list[Case],
    progress: Progress,
    budget_s: float | None,
    joined: "Joined | None",
) -> Iterator[Record]:
    """Run the cases one by one, each on all ranks: torchrun's if this process is one, else new processes."""
    from mtp_mem.runs.rank_bench import RANK_REFERENCES, DoesNotFit, RankWork
    from mtp_mem.runs.ranks import Group

    group = joined or Group(profile.training.world, device.type)
    by_job = {(case.strategy, case.n): case for case in todo}
    jobs = [job for n in dict.fromkeys(case.n for case in todo) for job in [("", n), *(j for j in by_job if j[1] == n)]]
    floors: dict[int, Facts] = {}
    started = time.monotonic()
    for reference in RANK_REFERENCES:
        for job, facts in group.run(RankWork(profile, corpus.path, device.type, reference), jobs, progress):
            if DoesNotFit.words in facts.get("error", ""):
                break
            jobs = jobs[1:]
            if job in by_job:
                yield _record(profile, corpus, device, by_job[job], facts, floors[job[1]])
            else:
                floors[job[1]] = facts if facts["status"] == "ok" else {}
            last_of_its_n = not jobs or jobs[0][1] != job[1]
            if last_of_its_n and budget_s is not None and time.monotonic() - started >= budget_s:
                return
        if not jobs:
            return


def refusal(
    spec: str,
    config: ModelConfig,
    workload: Workload,
    total_bytes: int,
    training: Training | None = None,
    *,
    device_type: str = "cuda",
) -> str | None:
    """Why a case cannot fit on a device of `total_bytes`; None where it may, or where no closed form holds.

    On a CPU a second copy of the weights counts: steps change them, and each case starts from the same ones.
    """
    on_cuda = device_type == "cuda"
    peak = formula_peak(spec, config, workload, training, cuda=on_cuda)
    if not on_cuda:
        copy = weight_bytes(sum(parameters(config).values()), workload.dtype)
        peak = copy + (baseline(config, workload, training) if peak is None else peak)
    if peak is None or peak <= total_bytes:
        return None
    needs, has = format_bytes(peak), format_bytes(total_bytes)
    return f"refused before the run: needs {needs} by closed form, the {'device' if on_cuda else 'machine'} has {has}"


def _run_n(
    profile: Profile,
    config: ModelConfig,
    corpus: Corpus,
    device: torch.device,
    todo: list[Case],
    strategies: dict[str, Strategy],
    progress: Progress,
) -> Iterator[Record]:
    n, on_cuda = config.n_future, device.type == "cuda"
    facts: dict[str, Facts] = {spec: {} for spec in ("", *strategies)}  # "" is the floor
    if on_cuda:
        for spec in facts:
            progress(f"n={n} {spec or 'floor'}: bytes")
            facts[spec] = isolated.measure(profile, n, spec, str(device), text=corpus.path)
    try:
        bench = Bench(profile, config, corpus, device)
    except (RuntimeError, MemoryError) as e:
        if (failed := failure(e))["status"] != "oom":
            raise
        for case in todo:
            yield _record(profile, corpus, device, case, facts[case.strategy] | failed, floor={})
        return
    for spec, strategy in strategies.items():  # all of them before the first step, which changes the weights
        if "error" not in facts[spec]:
            progress(f"n={n} {spec}: gradients")
            facts[spec] |= _tried(bench, partial(bench.check, strategy))
    if not on_cuda:
        for spec in facts:
            if "error" not in facts[spec]:
                progress(f"n={n} {spec or 'floor'}: bytes")
                facts[spec] |= _tried(bench, partial(bench.measure, strategies.get(spec, NoLogits())))
    running = {spec: strategy for spec, strategy in strategies.items() if "error" not in facts[spec]}
    watch = CpuWatch()
    timed = bench.time(running, lambda spec: progress(f"n={n} {spec}: timing"))
    others = watch.others()
    for spec, seconds in timed.items():
        if isinstance(seconds, dict):
            facts[spec] |= seconds | {"error": f"not timed: {seconds['error']}"}
        else:
            times = speed(seconds, profile.workload.tokens * profile.training.micro_batches)
            noisy = disturbed(others, times["step_ms"], times["step_ms_p20"], times["step_ms_p80"])
            facts[spec] |= {**times, "others_cpu": others, "disturbed": noisy}
    for case in todo:
        yield _record(profile, corpus, device, case, facts[case.strategy], facts[""])


def _record(profile: Profile, corpus: Corpus, device: torch.device, case: Case, facts: Facts, floor: Facts) -> Record:
    config = profile.model.with_n(case.n)
    return new_record(
        case.id,
        case.strategy,
        case.implementation,
        config,
        _workload(profile, corpus),
        training=profile.training.facts(profile.workload.dtype),
        backend="cuda" if device.type == "cuda" else "cpu",
        environment=environment(device.type),
        parameters=sum(parameters(config).values()),
        floor=floor,
        facts=facts,
    )


def _tried(bench: Bench, work: Callable[[], Facts]) -> Facts:
    """The fields that the work returns, or those that say how it failed."""
    try:
        return work()
    except Exception as e:
        bench.recover()
        return failure(e)
