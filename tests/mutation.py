"""Would the tests notice? Small bugs put into the strategies and what they stand on, one at a time; not run by pytest.

    python tests/mutation.py [--only FILE] [--sample N] [--seed SEED] [--limit SECONDS] [--json OUT]

A mutant (tests/mutants.py) is a copy of the package with one place changed. It is tested in a process of its own,
forked from this one: torch is imported there, nothing of the package. It is killed if a test fails, or at --limit.
Survivors are printed. Exit codes: 0 all killed; 1 some survived; 2 bad input, or the unchanged package fails.

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
from pathlib import Path

from mutants import Mutant, mutants

ROOT = Path(__file__).resolve().parents[1]
RUNNABLE = ("naive", "sequential", "chunked_vocab", "chunked_tokens", "checkpointed", "native")
TARGETS: dict[str, tuple[str, ...]] = {
    **{f"strategies/{name}.py": (name,) for name in RUNNABLE},
    "strategies/library_kernel.py": ("native",),
    "mtp_mem/model/losses.py": ("chunked_vocab", "naive"),
    "mtp_mem/model/head_tree.py": ("sequential", "checkpointed", "native", "chunked_tokens"),
}
"""Every strategy that runs without a GPU and all that they share above the cut, with the strategies that run it."""
FILES = (
    "strategies/test_chunked_tokens.py",
    "model/test_losses.py",
    "test_strategy.py",
    "prediction/test_simulated_step.py",
    "prediction/test_formulas.py",
    "memory/test_tracker.py",
    "strategies/test_equivalence.py",
    "model/test_heads.py",
)
WITHOUT = ("every_kind", "never_touches", "allocator_for", "naive_grows")  # slow, and others see the same


def main() -> int:
    """Print killed and survived by file, then every survivor."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", action="append", choices=list(TARGETS), metavar="FILE", help=", ".join(TARGETS))
    parser.add_argument("--sample", type=int, metavar="N", help="so many mutants, drawn with --seed; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=180, metavar="SECONDS", help="for one mutant; default: 180")
    parser.add_argument("--json", type=Path, metavar="OUT", help="every mutant with its fate")
    args = parser.parse_args()
    made = [(file, mutant) for file in args.only or TARGETS for mutant in mutants((ROOT / file).read_text("utf-8"))]
    if args.sample and args.sample < len(made):
        made = sorted(random.Random(args.seed).sample(made, args.sample), key=lambda m: (m[0], m[1].line))
    _import_heavy()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _copy(folder)
        files = dict.fromkeys(file for file, _ in made)
        fate, seconds = _run(folder, tuple(dict.fromkeys(s for f in files for s in TARGETS[f])), 10 * args.limit)
        if fate != "survived":
            print(
                f"the unchanged package does not pass its tests ({fate}):\n{_output(folder)[-3000:]}", file=sys.stderr
            )
            return 2
        print(f"unchanged: passes in {seconds:.0f} s; {len(made)} mutants", file=sys.stderr)
        for i, (file, mutant) in enumerate(made):
            fate, seconds = _try(folder, file, mutant, args.limit)
            by = next((x for x in _output(folder).splitlines() if x.startswith(("FAILED", "ERROR"))), "")
            print(
                f"{i + 1}/{len(made)} {fate}, {seconds:.1f} s: {file}:{mutant.line}: {mutant.change}", file=sys.stderr
            )
            row = {"file": file, "line": mutant.line, "change": mutant.change, "fate": fate}
            rows.append({**row, "seconds": round(seconds, 1), "by": by if fate == "killed" else ""})
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), "utf-8")
    for file in dict.fromkeys(row["file"] for row in rows):
        fates = [row["fate"] for row in rows if row["file"] == file]
        print(f"{file:32}" + "".join(f"  {fates.count(fate):4} {fate}" for fate in ("killed", "timed out", "survived")))
    survivors = [row for row in rows if row["fate"] == "survived"]
    for row in survivors:
        print(f"{row['file']}:{row['line']}: {row['change']}")
    return 1 if survivors else 0


def _import_heavy() -> None:
    """What every mutant would import again, and hypothesis told not to look for the smallest example."""
    import hypothesis
    import pytest  # noqa: F401
    import torch.profiler
    import torch.utils.checkpoint  # noqa: F401

    hypothesis.settings.register_profile("mutation", phases=[hypothesis.Phase.generate])
    hypothesis.settings.load_profile("mutation")


def _copy(folder: Path) -> None:
    """The package as it is installed, and its tests."""
    skip = shutil.ignore_patterns("__pycache__", "recorded")
    shutil.copytree(ROOT / "mtp_mem", folder / "mtp_mem", ignore=skip)
    for part in ("strategies", "profiles"):
        shutil.copytree(ROOT / part, folder / "mtp_mem" / part, ignore=skip)
    (folder / "strategies").symlink_to("mtp_mem/strategies")  # as in the clone: one test imports it by its wrong name
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", folder)


def _try(folder: Path, file: str, mutant: Mutant, limit: float) -> tuple[str, float]:
    at = folder / (file if file.startswith("mtp_mem") else f"mtp_mem/{file}")
    original = at.read_text("utf-8")
    at.write_text(mutant.source, "utf-8")
    try:
        return _run(folder, TARGETS[file], limit)
    finally:
        at.write_text(original, "utf-8")


def _run(folder: Path, specs: tuple[str, ...], limit: float) -> tuple[str, float]:
    """Test what lies in `folder`; the fate, and seconds. The child's output goes to the file `out`."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_tested(folder, specs)
    while time.monotonic() - began < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            fate = "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
            return fate, time.monotonic() - began
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timed out", time.monotonic() - began


def _be_tested(folder: Path, specs: tuple[str, ...]) -> None:
    """In the forked child, which does not return."""
    code = 3
    try:
        os.setsid()
        out = os.open(folder / "out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        sys.dont_write_bytecode = True  # sources change faster than their time stamps
        code = _suite(specs)
    finally:
        os._exit(code)


def _suite(specs: tuple[str, ...]) -> int:
    """0 where nothing fails: the drawn cases, then `verify`, then what counts bytes and looks at details."""
    import pytest

    def run(files: tuple[str, ...], words: str) -> bool:
        paths = [f"tests/{name}" for name in files]
        return bool(
            pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-W", "ignore", *paths, "-k", words])
        )

    words = " or ".join((*specs, "test_chunked_tokens", "losses", "counted_by_hand"))
    if run(("strategies/test_properties.py",), " or ".join(f"plain_autograd[{spec}" for spec in specs)):
        return 1
    from mtp_mem.verification.verify import verify

    for check in verify(specs).checks:
        if not check.passed or (
            check.exact and not check.identical and check.strategy in ("sequential", "checkpointed")
        ):
            print(f"FAILED verify: {check.explain()}")
            return 1
    return run(FILES, f"({words}) and " + " and ".join(f"not {word}" for word in WITHOUT))


def _output(folder: Path) -> str:
    return (folder / "out").read_text("utf-8", errors="replace")


if __name__ == "__main__":
    sys.exit(main())
