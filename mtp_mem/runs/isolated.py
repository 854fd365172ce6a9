"""One case's bytes in a process of its own: nothing an earlier case left in the allocator can bend its peak.

The parent sends the case pickled on stdin; the child answers with one line of JSON on stdout. The line begins with a
mark that the parent chose, so that nothing else that a strategy prints is taken for the answer. A child that dies,
hangs or gives no answer is a result, not the end of the run. A child and the processes that it starts end with the
parent, however the parent ends.
"""

import contextlib
import gc
import json
import os
import pickle
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from mtp_mem.config.schema import Profile
from mtp_mem.errors import clean_text

TIMEOUT_S = 600
LAST_BYTES = 2**16
"""Bytes of a dead child's stderr that are looked at: the last ones."""
DIES_WITH_PARENT = """
import ctypes, os, signal, sys
getattr(ctypes.CDLL(None), "prctl", lambda *_: 0)(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent has gone")
"""
"""A child's first lines, before the seconds that importing torch takes: PR_SET_PDEATHSIG; argv[1]: its parent's pid."""
MAIN = "from mtp_mem.runs.isolated import main; main()"


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
        profile: model, workload and training; its sweep is not used.
        n: number of heads.
        spec: the strategy, or "" for the floor.
        device: `cpu`, `cuda` or `cuda:N`.
        text: a UTF-8 file in place of the default text.
        timeout_s: seconds after which the child is killed.
        environment: variables on top of this process's, such as `PYTORCH_CUDA_ALLOC_CONF`.

    Returns:
        A record's fields; `status` is "error" with the reason where the child died or ran out of time.
    """
    request = {
        "mark": secrets.token_hex(8),
        "profile": profile,
        "n": n,
        "spec": spec,
        "device": device,
        "text": text,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    try:
        return _answered(request, timeout_s, {**os.environ, **(environment or {})})
    except OSError as e:
        return {"status": "error", "error": f"no process could be started for this case: {e.strerror or e}"}


def _answered(request: dict[str, Any], timeout_s: float, environment: dict[str, str]) -> dict[str, Any]:
    """A child's answer to the request.

    Raises:
        OSError: the machine has no room for another process, or for what it prints.
    """
    # Files, because a process that the child leaves behind would keep a pipe open.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            # -P: import what is installed, not what lies in the working directory, such as a clone.
            [sys.executable, "-P", "-c", f"{DIES_WITH_PARENT}{MAIN}", str(os.getpid())],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=errors,
            process_group=0,
        )
        try:
            child.communicate(pickle.dumps(request), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return {"status": "error", "error": f"no answer within {timeout_s:g} s; the process was killed"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - LAST_BYTES))
        if child.returncode:
            return {"status": "error", "error": _last_words(child.returncode, errors.read())}
        out.seek(0)
        for line in out:
            answer = _answer(line, request["mark"])
            if answer is not None:
                return answer
    return {"status": "error", "error": "the process ended without an answer"}


def _answer(line: bytes, mark: str) -> dict[str, Any] | None:
    """The answer in a line of the child's output; None: it is another line, or something was printed into it."""
    _, marked, answered = line.partition(mark.encode())
    try:
        answer = json.loads(answered) if marked else None
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def main() -> None:
    """The child: run the case that stdin describes."""
    from mtp_mem.data import load_corpus
    from mtp_mem.environment import require_deterministic
    from mtp_mem.prediction.floor import NoLogits
    from mtp_mem.runs.bench import Bench, failure, resolve_device
    from mtp_mem.strategy import load_strategy

    # Ctrl-C reaches the whole group of processes; the parent decides what becomes of a half-measured case.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # what was imported is no garbage, and the traced step collects
    request = pickle.load(sys.stdin.buffer)
    if request["deterministic"]:
        require_deterministic()
    profile: Profile = request["profile"]
    device: torch.device = resolve_device(request["device"])
    config = profile.model.with_n(request["n"])
    try:
        bench = Bench(profile, config, load_corpus(profile.workload, config.vocab_size, request["text"]), device)
        facts = bench.measure(load_strategy(request["spec"]) if request["spec"] else NoLogits())
    except Exception as e:
        facts = failure(e)
    print(f"\n{request['mark']}{json.dumps(facts)}", flush=True)
    os._exit(0)  # no thread or exit handler of the strategy goes on


def _last_words(code: int, said: bytes) -> str:
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"the process ended with {how}: {clean_text(lines[-1]) if lines else 'no message'}"
