"""Everything a GPU machine can tell, in one run: ordered by value, resumable, each stage a process with a time limit.

A stage is a command of this package. What it printed and how it ended is kept in the output folder as it ends, so a run
that is cut short has everything up to there, and the same call goes on with what is missing.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_mem._util import whole, writable
from mtp_mem.config.schema import GPU, Profile, Sweep, load_profile
from mtp_mem.environment import code_digest
from mtp_mem.head_phase import SHAPES
from mtp_mem.prediction.estimate import Estimate, estimate

OWN = "naive,sequential,chunked_vocab,chunked_tokens,checkpointed"
BITWISE = "naive,sequential,checkpointed"
PAPER = "mtp-1.3b"  # its step times stand beside the paper's
LARGE_VOCABULARY = ("llama3-8b", "llama3.2-1b")  # the first of which every case fits, or else the last
GRACE_S = 60  # for a stage that is told to stop: commands finish the case at hand


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: also of its files.
        command: after `python -m`.
        minutes: what it is expected to take, and a third of what it may.
        why: what it is for, a clause.
        cases: of a comparison: what each is expected to take.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    why: str
    cases: tuple[Estimate, ...] = ()

    @property
    def limit_s(self) -> float:
        """After so long it is stopped."""
        return 180 * self.minutes


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: "ok", "check failed", "failed", "out of time", "no budget left" or "done before"."""

    stage: str
    status: str
    seconds: float = 0.0
    code: int | None = None


@dataclass(frozen=True)
class Plan:
    """The stages, most valuable first, and the cases that cannot fit and are therefore in none: (profile, case)."""

    stages: tuple[Stage, ...]
    refused: tuple[tuple[str, Estimate], ...]


def plan(gpu: GPU | None, out: Path, *, quick: bool, tests: Path | None, deterministic: bool = False) -> Plan:
    """What to run.

    Args:
        gpu: the CUDA device; None for the stand-in on a CPU that runs the same path.
        out: where results go.
        quick: small shapes and few cases.
        tests: the folder of the benchmark suite, if there is one.
        deterministic: comparisons and verifications take deterministic kernels only.
    """
    on = ("--device", "cpu" if gpu is None else "cuda")
    how = (*on, "--require-deterministic") if deterministic else on
    small = quick or gpu is None
    made = [Stage("environment", ("mtp_mem", "env", "--json"), 0.3, "machine, driver, clocks, other processes")]
    refused: list[tuple[str, Estimate]] = []

    def measure(profile: Profile) -> None:
        if quick:
            sweep = Sweep(n=(1, 2), strategies=("naive", "sequential", "chunked_tokens"), rounds=1)
            profile = dataclasses.replace(profile, sweep=sweep)
        cases = estimate(profile, gpu)
        made.extend(comparisons(profile, cases, out, how))
        refused.extend((profile.name, case) for case in cases if not case.fits)

    measure(load_profile("quick" if small else PAPER))
    for dtype in ("fp32",) if quick else ("fp32", "bf16"):
        verify = ("mtp_mem", "verify", "--json", "--dtype", dtype, *how, "--strategies", OWN)
        made.append(Stage(f"verify-{dtype}", verify, 2, "gradients against the fp64 oracle, on this device"))
    for spec in ("sequential",) if quick else ("naive", "sequential"):
        timeline = ("mtp_mem", "timeline", "--profile", "quick", "--strategy", spec, "--n", "4", *on)
        where = ("--out", str(out / f"timeline-{spec}"))
        made.append(Stage(f"timeline-{spec}", timeline + where, 0.5, "what is live during one step"))
    check = ("mtp_mem.runs.check_prediction", "--out", str(out), *(["--quick"] if quick else []))
    made.append(Stage("check", check, 1 if quick else 5, "predicted bytes against measured ones"))
    if not small:
        measure(_large_vocabulary(gpu))
        rest = ("mtp_mem", "verify", "--json", "--profile", "quick", "--dtype", "bf16", *how)
        made.append(Stage("verify-kernels", rest, 1, "the same for whatever kernel is installed, on a model's shape"))
        bits = ("mtp_mem", "verify", "--json", *on, "--require-deterministic", "--strategies", BITWISE)
        made.append(Stage("verify-bits", bits, 2, "which are bit-identical with deterministic kernels"))
    size = "small" if quick else ("cpu" if gpu is None else "cuda")
    for shape in SHAPES[size] if tests else ():
        suite = ("pytest", f"{tests}/test_head_phase.py", "-q", "-k", f"{size}-{shape.label}")
        name = f"benchmark-{shape.label}"
        found = (*suite, "-p", "no:cacheprovider", f"--benchmark-json={out / name}.json")
        made.append(Stage(name, found, 1 if quick else 3, "the head phase beside installed kernels"))
    report = ("mtp_mem", "report", str(out), "-o", str(out / "report.html"), "--charts", str(out / "charts"))
    made.append(Stage("report", report, 0.5, "one page"))
    return Plan(tuple(made), tuple(refused))


def comparisons(profile: Profile, cases: Sequence[Estimate], out: Path, how: Sequence[str]) -> list[Stage]:
    """A stage for each set of strategies that fit, with the n at which they do.

    Args:
        profile: a shipped one, with the sweep to run.
        cases: what its cases take, and whether they fit.
        out: results go to a folder in it.
        how: options of every comparison.
    """
    fitting: dict[tuple[str, ...], list[int]] = {}
    for n in profile.sweep.n:
        specs = tuple(case.strategy for case in cases if case.n == n and case.fits)
        if specs:
            fitting.setdefault(specs, []).append(n)
    found = []
    for specs, ns in fitting.items():
        numbers, here = ",".join(map(str, ns)), tuple(case for case in cases if case.n in ns and case.fits)
        command = ("mtp_mem", "compare", "--profile", profile.name, "--n", numbers, "--strategies", ",".join(specs))
        options = ("--rounds", str(profile.sweep.rounds), *how, "--out", str(out / f"compare-{profile.name}"))
        name = f"compare-{profile.name}" + (f"-n{numbers}" if len(fitting) > 1 else "")
        minutes = round(max(1.0, sum(case.seconds or 0.0 for case in here) / 60), 1)
        found.append(Stage(name, (*command, *options), minutes, "bytes, time, gradients of a step", here))
    return found


def _large_vocabulary(gpu: GPU | None) -> Profile:
    *larger, last = map(load_profile, LARGE_VOCABULARY)
    return next((profile for profile in larger if all(case.fits for case in estimate(profile, gpu))), last)


def run(stages: Sequence[Stage], out: Path, budget_s: float, begin: Callable[[Stage], None]) -> Iterator[Outcome]:
    """The stages in turn until the budget ends; the last one, the report, always gets its turn.

    Args:
        stages: of a plan.
        out: a folder; NAME.log, NAME.out and stages.json are written there.
        budget_s: seconds for all stages together.
        begin: told each stage before it runs.
    """
    writable(out)
    before, code = _read(out / "stages.json"), code_digest()
    started = time.monotonic()
    for stage in stages:
        old = before.get(stage.name)
        if stage is not stages[-1] and old and _done(stage, old, code):
            yield Outcome(stage.name, "done before", old["seconds"], old["code"])
            continue
        left = budget_s - (time.monotonic() - started)
        if left <= 0 and stage is not stages[-1]:
            yield Outcome(stage.name, "no budget left")
            continue
        begin(stage)
        outcome = _run_one(stage, out, stage.limit_s if stage is stages[-1] else min(stage.limit_s, left))
        before[stage.name] = {**dataclasses.asdict(outcome), "command": list(stage.command), "by": code}
        with whole(out / "stages.json") as partial:
            partial.write_text(json.dumps(before, indent=1) + "\n")
        yield outcome


def _done(stage: Stage, old: dict[str, Any], code: str) -> bool:
    """Whether it ended well before; or with a failed check, which the same code would only find again."""
    same = old["command"] == list(stage.command)
    return same and (old["code"] == 0 or (old["code"] == 1 and old.get("by") == code))


def _run_one(stage: Stage, out: Path, limit_s: float) -> Outcome:
    begun = time.monotonic()
    with (out / f"{stage.name}.out").open("w") as stdout, (out / f"{stage.name}.log").open("w") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", *stage.command],
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, "COLUMNS": "120"},
            start_new_session=True,  # so that its own children can be stopped with it
        )
        try:
            code: int | None = child.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _stop(child)
    status = {0: "ok", 1: "check failed", None: "out of time"}.get(code, "failed")
    return Outcome(stage.name, status, round(time.monotonic() - begun, 1), code)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End the process with what it started: a measurement that went on would take its memory from the next stage."""
    child.terminate()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=GRACE_S)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
