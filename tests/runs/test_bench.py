"""One bench: devices as torch takes them, strategies that fail while they are timed, the allocator's figures.

There is no CUDA device here. What a device would answer is put in its place, and the arguments it gets go through
torch's own checks of them.
"""

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch
from small import build, tiny
from torch.cuda._utils import _get_device_index

from mtp_mem import Profile, Sweep, TrainingStep, Workload, load_strategy, make_optimizer
from mtp_mem.data import load_corpus
from mtp_mem.environment import device_facts, process_bytes
from mtp_mem.errors import BrokenContract, Missing
from mtp_mem.memory import cuda
from mtp_mem.report.tables import DISTURBED, remarks
from mtp_mem.runs.bench import Bench, resolve_device
from mtp_mem.runs.record import Record
from mtp_mem.runs.sweep import cases, run
from mtp_mem.strategy import Strategy

PROFILE = Profile(
    name="small",
    model=tiny(),
    workload=Workload(batch=2, sequence=24, tokenizer="bytes"),
    sweep=Sweep(n=(2,), strategies=("naive", "sequential"), rounds=3),
)


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(_get_device_index(device)))
    return current


def test_devices(two_devices: list[int]) -> None:
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    assert two_devices == []
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert two_devices == [1]
    with pytest.raises(Missing, match="device cuda:2: there are 2 CUDA devices"):
        resolve_device("cuda:2")
    assert resolve_device("cpu") == torch.device("cpu")


def bench() -> Bench:
    corpus = load_corpus(PROFILE.workload, PROFILE.model.vocab_size)
    return Bench(PROFILE, PROFILE.model.with_n(2), corpus, torch.device("cpu"))


class Tired:
    """Right at first, then out of memory."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def backward(self, *args: Any) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise torch.OutOfMemoryError("no room")
        return load_strategy("sequential").backward(*args)


def test_a_strategy_that_fails_while_timed_is_out_and_the_others_go_on() -> None:
    messages: list[str] = []
    times = bench().time({"naive": load_strategy("naive"), "tired": Tired(1)}, messages.append)
    naive = times["naive"]
    assert isinstance(naive, list)
    assert len(naive) == 3
    assert isinstance(times["tired"], dict)
    assert times["tired"]["status"] == "oom"
    assert messages == ["naive", "tired", "tired", "naive", "naive", "tired"]


@pytest.mark.parametrize(("error", "status"), [(torch.OutOfMemoryError, "oom"), (ValueError, "error")])
def test_what_a_failed_step_had_made_is_gone_when_the_next_one_runs(error: type[Exception], status: str) -> None:
    created: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    class Full:
        def backward(self, cut: torch.Tensor, *_: Any) -> torch.Tensor:
            logits = torch.zeros_like(cut)
            created.append(weakref.ref(logits))
            try:
                raise torch.OutOfMemoryError("no room")
            except torch.OutOfMemoryError as e:
                raise error("no room, as a library puts it") from e

    class Looks:
        def backward(self, *args: Any) -> torch.Tensor:
            alive.extend(times() is not None for times in created)
            return load_strategy("sequential").backward(*args)

    times = bench().time({"full": Full(), "looks": Looks()}, lambda _: None)
    assert isinstance(times["full"], dict)
    assert times["full"]["status"] == status
    assert alive == [False, False, False]


class Changes:
    """Right, but it changes what belongs to all."""

    def __init__(self, what: str) -> None:
        self.what = what

    def backward(self, cut: torch.Tensor, heads: Any, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        losses = load_strategy("sequential").backward(cut, heads, targets, weights)
        with torch.no_grad():
            if self.what == "the weights":
                heads.roots[0].unembedding.mul_(0.5)
            if self.what == "the batch":
                targets[targets > 0] = 1
            if self.what == "grad mode":
                torch.set_grad_enabled(False)
            if self.what == "the process":
                raise SystemExit(0)
            if self.what == "which parameters train":
                heads.roots[0].unembedding.requires_grad_(False)
            if self.what == "dtype":
                heads.roots[0].unembedding.data = heads.roots[0].unembedding.data.double()
                heads.roots[0].unembedding.grad = None
        if self.what == "hooks":
            heads.roots[0].unembedding.register_hook(lambda gradient: 2 * gradient)
        if self.what == "interrupt":
            raise KeyboardInterrupt
        if self.what == "grad mode":
            torch.set_grad_enabled(False)
        return losses


@pytest.mark.parametrize(
    "what",
    ["the weights", "the batch", "grad mode", "the process", "which parameters train", "dtype", "hooks", "interrupt"],
)
def test_what_a_strategy_changes_is_on_its_own_row_alone(what: str) -> None:
    shared = bench()
    before = shared.check(load_strategy("sequential"))
    with pytest.raises(BrokenContract):
        shared.check(Changes(what))
    shared.recover()
    assert torch.is_grad_enabled()
    assert shared.check(load_strategy("sequential")) == before
    timed = shared.time({"changes": Changes(what), "sequential": load_strategy("sequential")}, lambda _: None)
    assert isinstance(timed["sequential"], list)
    assert isinstance(timed["changes"], dict) == (what not in ("the weights", "dtype"))  # a step changes them


def test_a_strategy_that_is_right_in_its_first_step_alone_differs() -> None:
    class First:
        calls = 0

        def backward(self, cut: torch.Tensor, heads: Any, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return load_strategy("naive").backward(cut, heads, targets, weights * self.calls)

    assert bench().check(First())["gradient"] == "differs"


class Keeps:
    """Sequential that holds the cut's copy from step to step."""

    def backward(self, cut: torch.Tensor, *args: Any) -> torch.Tensor:
        self.kept = cut.detach().clone()
        return load_strategy("sequential").backward(cut, *args)


def test_what_a_strategy_keeps_is_in_its_baseline() -> None:
    shared = bench()
    right, keeps = (shared.measure(s) for s in (load_strategy("sequential"), Keeps()))
    kept = PROFILE.workload.tokens * PROFILE.model.dim * 4
    assert keeps["baseline_bytes"] - right["baseline_bytes"] == kept


def test_what_a_strategy_kept_in_earlier_steps_is_in_its_baseline() -> None:
    class Grows(Keeps):
        kept: list[torch.Tensor]

        def __init__(self) -> None:
            self.kept = []

        def backward(self, cut: torch.Tensor, *args: Any) -> torch.Tensor:
            self.kept.append(cut.detach().clone())
            return load_strategy("sequential").backward(cut, *args)

    shared, grows = bench(), Grows()
    base = shared.measure(load_strategy("sequential"))["baseline_bytes"]
    kept = PROFILE.workload.tokens * PROFILE.model.dim * 4
    assert shared.measure(grows)["baseline_bytes"] - base == (len(grows.kept) - 1) * kept


def test_without_a_reference_bytes_and_time_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = bench()
    once = Bench._gradients

    def too_large(self: Bench, strategy: Strategy) -> dict[str, list[torch.Tensor | None]]:
        if not isinstance(strategy, Keeps):
            raise torch.OutOfMemoryError("no room")
        return once(self, strategy)

    monkeypatch.setattr(Bench, "_gradients", too_large)
    facts = shared.check(Keeps())
    assert (facts["gradient"], facts["gradient_reference"]) == ("unchecked", "no reference fits here")


def said(records: list[Record]) -> list[str]:
    """The remarks, without that on a machine that was busy in between."""
    return [line for line in remarks(records) if not line.startswith(DISTURBED)]


def test_a_reference_that_does_not_repeat_itself_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def records() -> list[Record]:
        corpus, device = load_corpus(PROFILE.workload, PROFILE.model.vocab_size), torch.device("cpu")
        return list(run(PROFILE, corpus, device, cases(PROFILE, corpus, device), lambda _: None))

    quiet = records()
    assert [r.gradient_noise for r in quiet] == [0.0, 0.0]
    assert said(quiet) == []
    once = Bench._gradients
    shift = iter(range(100))

    def drifting(self: Bench, strategy: Strategy) -> dict[str, list[torch.Tensor | None]]:
        gradients = once(self, strategy)
        with torch.no_grad():
            gradients["norm"][0] += 1e-4 * next(shift)  # as atomic additions would, which have no order
        return gradients

    monkeypatch.setattr(Bench, "_gradients", drifting)
    noisy = records()
    assert [r.gradient for r in noisy] == ["differs", "differs"]
    assert all(1e-5 < (r.gradient_noise or 0) < 1 for r in noisy)
    (line,) = said(noisy)
    assert line.startswith("n = 2: naive run twice differs from itself by ")


def test_its_record_keeps_the_bytes_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, device = load_corpus(PROFILE.workload, PROFILE.model.vocab_size), torch.device("cpu")
    step = Bench._seconds
    calls = iter(range(100))

    def sometimes(self: Bench, training: TrainingStep) -> float:
        if next(calls) == 1:
            raise torch.OutOfMemoryError("no room")
        return step(self, training)

    monkeypatch.setattr(Bench, "_seconds", sometimes)
    todo = cases(PROFILE, corpus, device)
    naive, sequential = run(PROFILE, corpus, device, todo, lambda _: None)
    assert (naive.status, naive.error) == ("ok", None)
    assert naive.step_ms
    assert (sequential.status, sequential.step_ms) == ("oom", None)
    assert sequential.peak_requested_bytes
    assert (sequential.error or "").startswith("not timed: OutOfMemoryError: no room (test_bench.py:")
    assert sequential.gradient == "bit-identical"
    assert sequential.peak_requested_bytes


def test_the_allocator_s_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(tiny(n_future=1))
    step = TrainingStep(model, make_optimizer(model), batch, load_strategy("naive"))
    # (baseline, peaks requested, allocated, reserved, retries so far) of three repeats
    repeats = [(100, 900, 1000, 2000, 0), (100, 900, 1010, 2000, 0), (100, 900, 1010, 2100, 1)]
    answers: list[dict[str, int]] = []
    retries = 0
    for baseline, requested, allocated, reserved, so_far in repeats:
        answers.append({"requested_bytes.all.current": baseline, "num_alloc_retries": retries})
        peaks = {"requested_bytes.all.peak": requested, "allocated_bytes.all.peak": allocated}
        answers.append({**peaks, "reserved_bytes.all.peak": reserved, "num_alloc_retries": so_far})
        retries = so_far
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: answers.pop(0))
    monkeypatch.setattr(cuda, "process_bytes", lambda: 5000)
    measured = cuda.measure(step)
    assert answers == []
    assert (measured.baseline, measured.requested, measured.allocated, measured.reserved) == (100, 900, 1010, 2000)
    assert (measured.spread, measured.retries, measured.nvml_process) == (10, 1, 5000)
    assert measured.unnamed == 100  # nothing of the model lies on a device here


@pytest.mark.parametrize("named", ["GPU-1234", "MIG-1234", None])
def test_the_driver_s_handle_is_found_by_uuid(monkeypatch: pytest.MonkeyPatch, named: str | None) -> None:
    class Properties:
        uuid = "1234"

    def handle(uuid: str) -> str:
        if uuid != named:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties())
    for name in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(pynvml, name, nothing)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "580.1")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", handle)
    facts = device_facts()
    assert facts["driver"] == "580.1"
    assert ("mig_slice" in facts) == (named is not None)
    assert process_bytes() is None


def test_without_a_driver_its_facts_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", absent)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    assert device_facts() == {"driver": None}
    assert process_bytes() is None
