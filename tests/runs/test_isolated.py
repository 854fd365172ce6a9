"""A case's bytes in a process of its own: the same bytes as here, and a child that fails is a result."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import forked
import psutil
import pytest
import torch
import transformers
from model.test_huggingface import TINY

from mtp_mem import ModelConfig, Workload, load_strategy
from mtp_mem.config.other_models import huggingface_profile
from mtp_mem.config.schema import Profile, Sweep
from mtp_mem.data import load_corpus
from mtp_mem.runs.bench import Bench
from mtp_mem.runs.isolated import measure

PROFILE = Profile(
    name="small",
    model=ModelConfig(vocab_size=300, dim=32, n_layers=4, n_attention_heads=2),
    workload=Workload(batch=2, sequence=32, tokenizer="bytes"),
    sweep=Sweep(n=(2,)),
)


def test_the_same_bytes_as_in_this_process() -> None:
    config = PROFILE.model.with_n(2)
    local = Bench(PROFILE, config, load_corpus(PROFILE.workload, 300), torch.device("cpu"))
    expected = local.measure(load_strategy("sequential"))
    measured = measure(PROFILE, 2, "sequential", "cpu")
    assert measured.pop("host_rss_bytes") > 0
    expected.pop("host_rss_bytes")
    assert measured == expected


def test_the_floor() -> None:
    measured = measure(PROFILE, 2, "", "cpu")
    assert measured["status"] == "ok"
    assert "logits" not in measured["bytes_at_peak"]


def test_a_strategy_that_raises() -> None:
    measured = measure(PROFILE, 2, "no_such_module_here:Nothing", "cpu")
    assert measured["status"] == "error"
    assert "no module 'no_such_module_here'" in measured["error"]


def test_a_child_that_hangs_is_killed() -> None:
    measured = measure(PROFILE, 2, "sequential", "cpu", timeout_s=0.2)
    assert measured == {"status": "error", "error": "no answer within 0.2 s; the process was killed"}


def test_a_child_that_dies() -> None:
    measured = measure(PROFILE, 2, "sequential", "cpu", environment={"PYTHONPATH": "", "PYTHONHOME": "/nowhere"})
    assert measured["status"] == "error"
    assert measured["error"].startswith("the process ended with exit code 1: ")


TALKS = """
import atexit, ctypes, os, subprocess, sys, time
from mtp_mem.strategies.sequential import Sequential

class Talks(Sequential):
    def backward(self, *args):
        os.write(1, b"\\xff\\xfe not text, and no line end")
        atexit.register(print, "a last word")
        atexit.register(time.sleep, 1000)
        subprocess.Popen(["sleep", "1000"])
        return super().backward(*args)

class Leaves(Sequential):
    def backward(self, *args):
        ctypes.CDLL(None)._exit(0)  # os._exit is an error that is caught

class Dies(Sequential):
    def backward(self, *args):
        sys.stderr.write("\\x1b[2J the end is near\\n")
        sys.stderr.flush()
        os.kill(os.getpid(), 9)
"""


def test_children_that_print_leave_and_die(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "talks.py").write_text(TALKS)
    monkeypatch.chdir(tmp_path)
    answer = measure(PROFILE, 2, "talks:Talks", "cpu")
    assert answer["status"] == "ok", answer
    assert not sleeping(1000)
    answer = measure(PROFILE, 2, "talks:Leaves", "cpu")
    assert answer == {"status": "error", "error": "the process ended without an answer"}
    answer = measure(PROFILE, 2, "talks:Dies", "cpu")
    assert answer == {"status": "error", "error": "the process ended with signal 9: \ufffd[2J the end is near"}


def sleeping(seconds: int) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", str(seconds)]]


@pytest.mark.parametrize("how", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL])
def test_no_child_outlives_its_parent(tmp_path: Path, how: signal.Signals) -> None:
    """The child has hardly begun: it is importing torch, and would go on for seconds."""
    parent = forked.call(measure, PROFILE, 2, "sequential", "cpu")
    deadline = time.monotonic() + 30
    while not (children := psutil.Process(parent.pid).children()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    assert children[0].is_running()
    os.kill(parent.pid or 0, how)
    parent.join()
    psutil.wait_procs(children, timeout=10)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_another_s_model_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(transformers.LlamaConfig(**TINY).to_dict()))
    profile = huggingface_profile(tmp_path)
    small = dataclasses.replace(profile.workload, batch=2, sequence=16, dtype="fp32")
    answer = measure(dataclasses.replace(profile, workload=small), 2, "sequential", "cpu")
    assert answer["status"] == "ok", answer
