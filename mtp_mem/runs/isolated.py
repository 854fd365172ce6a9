"""One case's bytes in a process of its own: nothing an earlier case left in the allocator can bend its peak.

The parent sends the case as JSON on stdin; the child answers with one line on stdout. It begins with a mark that the
parent chose, so that nothing else that a strategy prints is taken for it. A child that dies, hangs or gives no answer
is a result, not the end of the run.
"""

import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mtp_mem.config.other_models import FactoryConfig, HuggingFaceConfig
from mtp_mem.config.schema import ModelConfig, Profile
from mtp_mem.config.toml import from_table

TIMEOUT_S = 600


def measure(
    profile: Profile,
    n: int,
    spec: str,
    device: str,
    *,
    text: Path | None = None,
    timeout_s: float = TIMEOUT_S,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """`Bench.measure` of one strategy at one n, in a fresh process.

    Args:
        profile: model and workload; its sweep is not used.
        n: number of heads.
        spec: the strategy, or "" for the floor.
        device: `cpu`, `cuda` or `cuda:N`.
        text: a UTF-8 file in place of the default text.
        timeout_s: after so long the child is killed.
        environment: variables on top of this process's, `PYTORCH_CUDA_ALLOC_CONF` say.

    Returns:
        A record's fields; `status` is "error" with the reason where the child died or ran out of time.
    """
    mark = secrets.token_hex(8)
    request = {
        "mark": mark,
        "profile": _without_none(dataclasses.asdict(profile)),
        "n": n,
        "spec": spec,
        "device": device,
        "text": None if text is None else str(text.resolve()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    try:
        child = subprocess.run(
            # -P: not what lies in the working directory, a clone say, in the place of what is installed.
            [sys.executable, "-P", "-m", "mtp_mem.runs.isolated"],
            input=json.dumps(request),
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return {"status": "error", "error": f"no answer within {timeout_s:g} s; the process was killed"}
    if child.returncode:
        return {"status": "error", "error": _last_words(child)}
    for line in child.stdout.splitlines():
        _, marked, answered = line.partition(mark)
        if marked:
            answer: dict[str, Any] = json.loads(answered)
            return answer
    return {"status": "error", "error": "the process ended without an answer"}


def main() -> None:
    """The child: run the case that stdin describes."""
    from mtp_mem.data import load_corpus
    from mtp_mem.environment import require_deterministic
    from mtp_mem.prediction.floor import NoLogits
    from mtp_mem.runs.bench import Bench, failure, resolve_device
    from mtp_mem.strategy import load_strategy

    # Ctrl-C reaches the whole group of processes; the parent decides what becomes of a half-measured case.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    request = json.load(sys.stdin)
    if request["deterministic"]:
        require_deterministic()
    profile = _profile(request["profile"])
    device: torch.device = resolve_device(request["device"])
    config = profile.model.with_n(request["n"])
    text = request["text"] and Path(request["text"])
    try:
        bench = Bench(profile, config, load_corpus(profile.workload, config.vocab_size, text), device)
        facts = bench.measure(load_strategy(request["spec"]) if request["spec"] else NoLogits())
    except (Exception, SystemExit) as e:
        facts = failure(e)
    print(f"\n{request['mark']}{json.dumps(facts)}", flush=True)


def _profile(table: dict[str, Any]) -> Profile:
    model = table["model"]
    other = HuggingFaceConfig if "architecture" in model else FactoryConfig if "factory" in model else ModelConfig
    return from_table(Profile, table | {"model": from_table(other, model)})


def _without_none(value: Any) -> Any:
    """TOML has no null: a field that is None is a field that is absent."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, (list, tuple)) else value


def _last_words(child: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in child.stderr.splitlines() if line.strip()]
    how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
    return f"the process ended with {how}: {lines[-1] if lines else 'no message'}"


if __name__ == "__main__":
    main()
