"""Everything a GPU machine can tell, in one run: ordered by value, resumable, each stage a process with a time limit.

A stage is a command of this package. What it printed and how it ended is kept in the output folder as it ends, so a run
that is cut short has everything up to there, and the same call goes on with what is missing.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtp_mem.memory.record import writable

OWN = "naive,sequential,chunked_vocab,chunked_tokens,checkpointed"
DONE = (0, 1)  # 1: the stage ran, and says that a check failed


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: also of its files.
        command: after `python -m`.
        minutes: what it is expected to take, and a third of what it may.
        why: what it is for, a clause.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    why: str

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


def stages(device: str, out: Path, *, quick: bool, tests: Path | None) -> list[Stage]:
    """The plan, most valuable first.

    Args:
        device: `cuda`, or `cpu` for the stand-in that runs the same path.
        out: where results go.
        quick: small shapes and few cases.
        tests: the folder of the benchmark suite, if there is one.
    """
    cuda = device != "cpu"
    profiles = ["quick"] if quick or not cuda else ["mtp-1.3b", "llama3-8b"]
    fewer = ["--n", "1,2", "--rounds", "1", "--strategies", "naive,sequential,chunked_tokens"] if quick else []
    made = [Stage("environment", ("mtp_mem", "env", "--json"), 0.3, "machine, driver, clocks, other processes")]
    for profile in profiles:
        compare = ("mtp_mem", "compare", "--profile", profile, "--device", device, *fewer)
        where = ("--out", str(out / f"compare-{profile}"))
        made.append(Stage(f"compare-{profile}", compare + where, 1 if quick else 6, "bytes, time, gradients of a step"))
    for dtype in ("fp32",) if quick else ("fp32", "bf16"):
        verify = ("mtp_mem", "verify", "--profile", "quick", "--dtype", dtype, "--device", device, "--json")
        own = ("--strategies", OWN) if quick else ()
        made.append(Stage(f"verify-{dtype}", (*verify, *own), 1, "gradients against the fp64 oracle, on this device"))
    check = ("mtp_mem.memory.check", "--out", str(out), *(["--quick"] if quick else []))
    made.append(Stage("check", check, 1 if quick else 5, "predicted bytes against measured ones"))
    for spec in ("sequential",) if quick else ("naive", "sequential"):
        timeline = ("mtp_mem", "timeline", "--profile", "quick", "--strategy", spec, "--n", "4", "--device", device)
        where = ("--out", str(out / f"timeline-{spec}"))
        made.append(Stage(f"timeline-{spec}", timeline + where, 0.5, "what is live during one step"))
    if tests is not None:
        size = "small" if quick else ("cuda" if cuda else "cpu")
        suite = ("pytest", str(tests / "test_head_phase.py"), "-q", "-k", size, "-p", "no:cacheprovider")
        found = (*suite, f"--benchmark-json={out / 'benchmark.json'}")
        made.append(Stage("benchmark", found, 1 if quick else 8, "the head phase beside installed kernels"))
    made.append(Stage("report", ("mtp_mem", "report", str(out), "-o", str(out / "report.html")), 0.5, "one page"))
    return made


def run(plan: Sequence[Stage], out: Path, budget_s: float, begin: Callable[[Stage], None]) -> Iterator[Outcome]:
    """The stages in turn until the budget ends; the last one, the report, always gets its turn.

    Args:
        plan: from `stages`.
        out: a folder; NAME.log, NAME.out and stages.json are written there.
        budget_s: seconds for all stages together.
        begin: told each stage before it runs.
    """
    writable(out)
    before = _read(out / "stages.json")
    started = time.monotonic()
    for stage in plan:
        old = before.get(stage.name)
        if stage is not plan[-1] and old and old["command"] == list(stage.command) and old["code"] in DONE:
            yield Outcome(stage.name, "done before", old["seconds"], old["code"])
            continue
        left = budget_s - (time.monotonic() - started)
        if left <= 0 and stage is not plan[-1]:
            yield Outcome(stage.name, "no budget left")
            continue
        begin(stage)
        outcome = _run_one(stage, out, stage.limit_s if stage is plan[-1] else min(stage.limit_s, left))
        before[stage.name] = {**asdict(outcome), "command": list(stage.command)}
        partial = out / ".stages.json.tmp"
        partial.write_text(json.dumps(before, indent=1) + "\n")
        partial.replace(out / "stages.json")
        yield outcome


def _run_one(stage: Stage, out: Path, limit_s: float) -> Outcome:
    begun = time.monotonic()
    with (out / f"{stage.name}.out").open("w") as stdout, (out / f"{stage.name}.log").open("w") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", *stage.command],
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, "COLUMNS": "120"},
        )
        try:
            code: int | None = child.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            child.terminate()  # commands finish the unit at hand and keep what they have
            try:
                child.wait(timeout=20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            code = None
        except BaseException:
            child.terminate()
            child.wait()
            raise
    status = {0: "ok", 1: "check failed", None: "out of time"}.get(code, "failed")
    return Outcome(stage.name, status, round(time.monotonic() - begun, 1), code)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
