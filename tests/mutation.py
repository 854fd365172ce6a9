"""Would the tests notice? Small bugs put into strategies, verifier and step, one at a time; not run by pytest.

    python tests/mutation.py [--only FILE] [--minutes M] [--seed SEED] [--limit SECONDS] [--json OUT]

What stands in OUT already is not run again.

A mutant (tests/mutants.py) is a copy of the package with one place changed. It is tested in a process of its own,
forked from this one: torch is imported there, nothing of the package. It is killed if a test fails; at --limit it has
timed out. Mutants are drawn with --seed, file by file in turn and more of the longer ones, so that a run that ends
after --minutes is a fair sample. Exit codes: 0 all killed; 1 some not; 2 bad input, or the unchanged package fails.

The last run, and why each of its survivors may live: tests/MUTATION.md.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mutants import Mutant, mutants

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Tests:
    """What should notice a bug in a file: strategies through `CHECKS`; if `prove`, broken strategies; test files."""

    strategies: tuple[str, ...]
    files: tuple[str, ...]
    prove: bool = False


_CONTRACT, _GRADIENTS = "verification/test_contract.py", "verification/test_gradient_error.py"
_WATCH, _CHECKS = "verification/test_watch.py", "verification/test_checks.py"
_VERIFIER = Tests((), (_GRADIENTS, _WATCH, _CHECKS, _CONTRACT), prove=True)
_STRATEGIES = (
    "strategies/test_loss_options.py",
    "strategies/test_chunked_tokens.py",
    "model/test_losses.py",
    "test_strategy.py",
    "prediction/test_formulas.py",
)
TARGETS = {
    **{f"mtp_mem/verification/{name}.py": _VERIFIER for name in ("contract", "behaviour")},
    "mtp_mem/verification/global_state.py": _VERIFIER,
    "mtp_mem/model/model_state.py": Tests((), (_WATCH, _CONTRACT, "runs/test_bench.py")),
    **{f"mtp_mem/verification/{name}.py": _VERIFIER for name in ("gradient_error", "checks")},
    "mtp_mem/verification/verify.py": Tests((), ("strategies/test_kernel_limits.py", _CHECKS, _CONTRACT), prove=True),
    "mtp_mem/verification/problem.py": Tests((), ("verification/test_problem.py", _CHECKS, _WATCH), prove=True),
    "mtp_mem/model/losses.py": Tests(("naive", "sequential"), _STRATEGIES),
    "mtp_mem/model/head_tree.py": Tests(
        ("sequential", "chunked_tokens", "checkpointed"), ("model/test_heads.py", "test_strategy.py")
    ),
    "mtp_mem/model/own.py": Tests((), ("model/test_model.py", "step/test_head_loss.py")),
    "mtp_mem/step/head_loss.py": Tests((), ("step/test_head_loss.py",)),
    "mtp_mem/step/__init__.py": Tests(("naive",), ("step/test_head_loss.py", "prediction/test_simulated_step.py")),
    **{
        f"strategies/{name}.py": Tests((name,), _STRATEGIES)
        for name in ("naive", "sequential", "chunked_tokens", "chunked_vocab", "checkpointed", "native")
    },
    "strategies/library_kernel.py": Tests(("native",), ("test_strategy.py", "prediction/test_formulas.py")),
}
"""The files that are mutated. Not the scenarios: they are data, of which many values are right."""

CHECKS = {
    "n = 3",
    "causal heads",
    "deepseek heads, tied",
    "replicated unembedding",
    "chunk larger than everything",
    "frozen unembedding",
    "a whole head ignored",
    "everything ignored",
    "one token in all",
    "loss weight 0",
    "existing .grad",
    "nothing contiguous",
    "many chunks in bf16",
    "logits with a common offset of 2^20",
    "NaN in the unembedding",
}
"""Scenarios that are run, in fp64 and bf16, besides those with options of the loss."""


def main() -> int:
    """Print killed and survived by file, then every survivor."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", action="append", choices=list(TARGETS), metavar="FILE", help=", ".join(TARGETS))
    parser.add_argument("--minutes", type=float, help="begin no mutant after so long; default: all are run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="for one mutant; default: 300")
    parser.add_argument("--json", type=Path, metavar="OUT", help="every mutant with its fate")
    args = parser.parse_args()
    stop = float("inf") if args.minutes is None else time.monotonic() + 60 * args.minutes
    of_files = {file: list(mutants((ROOT / file).read_text("utf-8"))) for file in args.only or TARGETS}
    total = sum(map(len, of_files.values()))
    _import_heavy()
    rows = json.loads(args.json.read_text("utf-8")) if args.json and args.json.exists() else []
    known, whole = Counter((row["file"], row["line"], row["change"]) for row in rows), set()
    killers: dict[str, list[str]] = {file: [] for file in of_files}  # the latest killer comes first
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _copy(folder)
        for file, mutant in _drawn(of_files, args.seed):
            if time.monotonic() > stop:
                break
            if known[file, mutant.line, mutant.change]:
                known[file, mutant.line, mutant.change] -= 1
                continue
            if (tests := TARGETS[file]) not in whole:
                fate, seconds = _run(folder, tests, [], args.limit)
                if fate != "survived":
                    words = f"{file}: the unchanged package does not pass its tests ({fate})"
                    print(f"{words}:\n{_output(folder)[-3000:]}", file=sys.stderr)
                    return 2
                whole.add(tests)
                print(f"{file}: unchanged passes in {seconds:.0f} s", file=sys.stderr)
            fate, seconds = _try(folder, file, mutant, killers[file], args.limit)
            by = next((x for x in _output(folder).splitlines() if x.startswith(("FAILED", "ERROR"))), "")
            if len(words := by.split(maxsplit=2)) > 1 and fate == "killed":
                name = words[1].partition("[")[0]
                killers[file] = [name, *(x for x in killers[file] if x != name)][:8]
            where = f"{file}:{mutant.line}: {mutant.change}"
            print(f"{len(rows) + 1}/{total} {fate}, {seconds:.1f} s: {where}", file=sys.stderr)
            row = {"file": file, "line": mutant.line, "change": mutant.change, "fate": fate}
            rows.append({**row, "seconds": round(seconds, 1), "by": by if fate == "killed" else ""})
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1), "utf-8")
    for file, of_file in of_files.items():
        fates = [row["fate"] for row in rows if row["file"] == file]
        counts = (f"  {fates.count(fate):4} {fate}" for fate in ("killed", "timed out", "survived"))
        print(f"{file:40}" + "".join(counts) + f"  of {len(of_file)}")
    survivors = [row for row in rows if row["fate"] != "killed"]
    for row in survivors:
        print(f"{row['file']}:{row['line']}: {row['change']} ({row['fate']})")
    return 1 if survivors else 0


def _drawn(of_files: dict[str, list[Mutant]], seed: int) -> Iterator[tuple[str, Mutant]]:
    """Mutants file by file in turn, each time one for every 40 that the file has."""
    draw = random.Random(seed)
    turns = {file: max(1, len(of_file) // 40) for file, of_file in of_files.items()}
    left = {file: draw.sample(of_file, len(of_file)) for file, of_file in of_files.items()}
    while any(left.values()):
        for file, of_file in left.items():
            for _ in range(min(turns[file], len(of_file))):
                yield file, of_file.pop()


def _import_heavy() -> None:
    """Import what every mutant would import again, and keep hypothesis from looking for the smallest example."""
    import hypothesis
    import pytest  # noqa: F401
    import torch.profiler
    import torch.utils.checkpoint  # noqa: F401

    hypothesis.settings.register_profile("mutation", phases=[hypothesis.Phase.generate])
    hypothesis.settings.load_profile("mutation")


def _copy(folder: Path) -> None:
    """Copy the package as it is installed, and its tests."""
    skip = shutil.ignore_patterns("__pycache__", "recorded")
    shutil.copytree(ROOT / "mtp_mem", folder / "mtp_mem", ignore=skip)
    for part in ("strategies", "profiles"):
        shutil.copytree(ROOT / part, folder / "mtp_mem" / part, ignore=skip)
    (folder / "strategies").symlink_to("mtp_mem/strategies")  # as in the clone: one test imports it by its wrong name
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", folder)


def _try(folder: Path, file: str, mutant: Mutant, killers: list[str], limit: float) -> tuple[str, float]:
    at = folder / (file if file.startswith("mtp_mem") else f"mtp_mem/{file}")
    original = at.read_text("utf-8")
    at.write_text(mutant.source, "utf-8")
    try:
        return _run(folder, TARGETS[file], killers, limit)
    finally:
        at.write_text(original, "utf-8")


def _run(folder: Path, tests: Tests, killers: list[str], limit: float) -> tuple[str, float]:
    """Test the package in `folder`; returns its fate and the seconds. The child's output goes to the file `out`."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_tested(folder, tests, killers)
    while time.monotonic() - began < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            fate = "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
            return fate, time.monotonic() - began
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timed out", time.monotonic() - began


def _be_tested(folder: Path, tests: Tests, killers: list[str]) -> None:
    """Run the suite in the forked child; does not return."""
    code = 3
    try:
        os.setsid()
        out = os.open(folder / "out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        sys.dont_write_bytecode = True  # sources change faster than their time stamps
        code = _suite(tests, killers)
    except BaseException:  # raised by a mutant
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _suite(tests: Tests, killers: list[str]) -> int:
    """Exit code: 0 where nothing fails. What killed other mutants of the file is tried first."""
    import pytest

    def failing(*names: str) -> int:
        options = ("-x", "-q", "--tb=line", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore")
        return int(pytest.main([*options, *names]))

    if tests.prove and not _proved(killers):
        return 1
    if (known := [name for name in killers if "::" in name]) and failing(*known) == pytest.ExitCode.TESTS_FAILED:
        return 1
    if tests.strategies:
        from mtp_mem.verification.scenarios import SCENARIOS
        from mtp_mem.verification.verify import verify

        chosen = [s for s in SCENARIOS if s.name in CHECKS or s.label_smoothing or s.z_loss or s.softcap]
        for check in verify(tests.strategies, dtypes=("fp64", "bf16"), scenarios=chosen).checks:
            same = check.identical or not check.exact or check.strategy not in ("sequential", "checkpointed")
            if check.status != "right" or not same:
                print(f"FAILED verify: {check.explain()}")
                return 1
    if tests.prove and not _proved(None):
        return 1
    return failing(*(f"tests/{name}" for name in tests.files))


def _proved(only: list[str] | None) -> bool:
    """Whether the broken strategies that misbehave are caught: those named in `only`, or all."""
    import torch

    from mtp_mem.verification.behaviour import across_steps, protocol
    from mtp_mem.verification.broken_conduct import ALL_BROKEN
    from mtp_mem.verification.scenarios import Scenario

    checks = {"protocol": protocol, "6 optimizer steps": across_steps}
    for broken in (cls for cls in ALL_BROKEN if cls.caught_by in checks and (only is None or cls.__name__ in only)):
        usual, name = Scenario(name="usual"), broken.__name__
        if checks[broken.caught_by](name, broken(), usual, "fp64", torch.device("cpu")).status == "right":
            print(f"FAILED {name} is not caught")
            return False
    return True


def _output(folder: Path) -> str:
    return (folder / "out").read_text("utf-8", errors="replace")


if __name__ == "__main__":
    sys.exit(main())
