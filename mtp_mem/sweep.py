"""Profile -> cases -> records: every strategy at every n, checked, measured and timed on the same weights and batch.

Strategies at one n share one model, and their timed steps are interleaved so that a drifting machine slows all alike.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from mtp_mem.config import GPU, ModelConfig, Profile
from mtp_mem.data import Corpus, corpus_batch
from mtp_mem.environment import environment
from mtp_mem.errors import BadInput, Missing, MtpMemError
from mtp_mem.floor import NoLogits
from mtp_mem.gradients import Gradients, compare, take
from mtp_mem.memory import cuda, fake
from mtp_mem.memory.allocator import replay
from mtp_mem.memory.cpu import track
from mtp_mem.memory.host import sampled_rss
from mtp_mem.memory.record import Record, fingerprint
from mtp_mem.memory.trace import Trace
from mtp_mem.model import MTPModel
from mtp_mem.step import TrainingStep, forward_backward, make_optimizer
from mtp_mem.strategy import Strategy, load_strategy

Progress = Callable[[str], None]
"""Told what is done next; called once per unit of work."""

REFERENCE = "naive"
WARM_UP = {"cpu": 1, "cuda": 2}  # steps before the measured one: optimizer state, lazy buffers, the allocator's cache


@dataclass(frozen=True)
class Case:
    """One strategy at one n, and the name of everything its figures depend on."""

    strategy: str
    n: int
    fingerprint: str


def cases(profile: Profile, corpus: Corpus, device: torch.device) -> list[Case]:
    """The profile's cases, n by n, strategies in the profile's order."""
    env = environment(device.type)
    machine = [env[key] for key in ("code", "torch", "cpu", "threads", "device", "variables")]

    def case(spec: str, n: int) -> Case:
        model, workload = profile.model.with_n(n), profile.workload
        parts = (spec, dataclasses.asdict(model), dataclasses.asdict(workload), profile.sweep.rounds, corpus.digest)
        return Case(spec, n, fingerprint(*parts, machine))

    return [case(spec, n) for n in profile.sweep.n for spec in profile.sweep.strategies]


def units(todo: list[Case], rounds: int) -> int:
    """How often `run` will call its progress callback."""
    return len(todo) * (2 + rounds) + len({case.n for case in todo})


def run(
    profile: Profile, corpus: Corpus, device: torch.device, todo: list[Case], progress: Progress
) -> Iterator[Record]:
    """Run the cases n by n; each n's records are yielded as they become complete."""
    strategies = {case.strategy: load_strategy(case.strategy) for case in todo}  # bad specs fail before any work
    for n in dict.fromkeys(case.n for case in todo):
        yield from _run_n(profile, corpus, device, [c for c in todo if c.n == n], strategies, progress)
        _free(device)


def _run_n(
    profile: Profile,
    corpus: Corpus,
    device: torch.device,
    todo: list[Case],
    strategies: dict[str, Strategy],
    progress: Progress,
) -> Iterator[Record]:
    config, workload = profile.model.with_n(todo[0].n), profile.workload
    bench = Bench(profile, config, corpus, device)
    found: dict[str, dict[str, Any]] = {}
    progress(f"n={config.n_future} floor: bytes")
    floor = bench.floor()
    for case in todo:
        label, strategy = f"n={case.n} {case.strategy}", strategies[case.strategy]
        facts = found[case.strategy] = {"status": "ok"}
        try:
            progress(f"{label}: gradients")
            facts |= bench.check(strategy)
            progress(f"{label}: bytes")
            facts |= bench.measure(strategy)
        except Exception as e:
            facts |= failure(e)
            bench.recover()
    seconds = bench.time(
        {spec: strategies[spec] for spec, facts in found.items() if facts["status"] == "ok"},
        lambda spec: progress(f"n={config.n_future} {spec}: timing"),
    )
    for case in todo:
        facts = found[case.strategy]
        if case.strategy in seconds:
            facts |= speed(seconds[case.strategy], workload.tokens)
        yield Record(
            case=case.fingerprint,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            backend="cuda" if device.type == "cuda" else "cpu",
            exactness="measured" if device.type == "cuda" else "tracked",
            strategy=case.strategy,
            n=case.n,
            parameters=bench.parameters,
            model=dataclasses.asdict(config),
            workload={**dataclasses.asdict(workload), "source": corpus.source, "digest": corpus.digest},
            environment=environment(device.type),
            **floor,
            **facts,
        )


class Bench:
    """One model with its optimizer and batch, on which strategies take turns."""

    def __init__(self, profile: Profile, config: ModelConfig, corpus: Corpus, device: torch.device) -> None:
        self.profile, self.device = profile, device
        with torch.random.fork_rng():
            torch.manual_seed(profile.workload.seed)
            self.model = MTPModel(config, dtype=profile.workload.dtype, device=device)
        batch = corpus_batch(corpus, config, profile.workload)
        self.batch = dataclasses.replace(batch, tokens=batch.tokens.to(device), targets=batch.targets.to(device))
        self.optimizer = make_optimizer(self.model)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        # Checks need the initial weights, and measured steps change them.
        self.initial = {name: value.to("cpu", copy=True) for name, value in self.model.state_dict().items()}
        self.reference: Gradients | None = None

    def check(self, strategy: Strategy) -> dict[str, Any]:
        """The strategy's gradients against naive's, on the initial weights and from empty `.grad`."""
        self.model.load_state_dict(self.initial)
        if self.reference is None:
            self.reference, _ = self._gradients(load_strategy(REFERENCE))
        mine, losses = self._gradients(strategy)
        verdict = compare(mine, self.reference, self.profile.workload.dtype)
        return {
            "losses": tuple(losses),
            "gradient": verdict.verdict,
            "gradient_error": verdict.error,
            "gradient_group": verdict.group,
        }

    def floor(self) -> dict[str, Any]:
        """Peaks of the step without logits; empty where even that does not fit."""
        try:
            facts = self.measure(NoLogits())
        except (torch.OutOfMemoryError, MemoryError, RuntimeError):
            self.recover()
            return {}
        return _as_floor(facts)

    def measure(self, strategy: Strategy) -> dict[str, Any]:
        """Bytes of one step: tracked on the CPU, the caching allocator's on CUDA."""
        step = self.step(strategy)
        with sampled_rss() as rss:
            for _ in range(WARM_UP[self.device.type]):
                step()
        if self.device.type == "cuda":
            peaks = cuda.measure(step)
            return {
                "steps_before": WARM_UP[self.device.type],
                "host_rss_bytes": rss.nbytes,
                "baseline_bytes": peaks.baseline,
                "peak_requested_bytes": peaks.requested,
                "peak_over_baseline_bytes": peaks.requested - peaks.baseline,
                "peak_allocated_bytes": peaks.allocated,
                "peak_reserved_bytes": peaks.reserved,
                "alloc_retries": peaks.retries,
                "nvml_process_bytes": peaks.nvml_process,
            }
        trace = track(step)
        peak = trace.peak()
        return {
            "steps_before": WARM_UP[self.device.type],
            "host_rss_bytes": rss.nbytes,
            "baseline_bytes": trace.baseline,
            "peak_requested_bytes": peak.nbytes,
            "peak_over_baseline_bytes": peak.nbytes - trace.baseline,
            "peak_phase": peak.phase,
            "peak_op": peak.op,
            "phase_peaks": trace.phase_peaks(),
            "bytes_at_peak": dict(peak.by_category),
        }

    def time(self, strategies: dict[str, Strategy], progress: Progress) -> dict[str, list[float]]:
        """Seconds of untracked steps; the strategies take turns, a different one first in each round."""
        seconds: dict[str, list[float]] = {spec: [] for spec in strategies}
        specs = list(strategies)
        for turn in range(self.profile.sweep.rounds):
            start = turn % len(specs) if specs else 0
            for spec in specs[start:] + specs[:start]:
                progress(spec)
                step = self.step(strategies[spec])
                self._synchronise()
                begin = time.perf_counter()
                step()
                self._synchronise()
                seconds[spec].append(time.perf_counter() - begin)
        return seconds

    def recover(self) -> None:
        """Drop what a failed case left behind."""
        self.optimizer.zero_grad(set_to_none=True)
        _free(self.device)

    def _gradients(self, strategy: Strategy) -> tuple[Gradients, list[float]]:
        self.optimizer.zero_grad(set_to_none=True)
        losses = forward_backward(self.model, self.batch, strategy)
        taken = take(self.model.groups())
        # To the host: on the device, naive's gradients would count in every later case's peak.
        return {name: [None if g is None else g.cpu() for g in own] for name, own in taken.items()}, losses.tolist()

    def step(self, strategy: Strategy) -> TrainingStep:
        """The training step with this strategy."""
        return TrainingStep(self.model, self.optimizer, self.batch, strategy, self.profile.workload.clip_norm)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def check_predictable(profile: Profile) -> None:
    """Refuse what the fake instrument does not model, before any work.

    Raises:
        BadInput: a dtype other than bf16.
    """
    if profile.workload.dtype != "bf16":
        raise BadInput(
            f"workload.dtype = {profile.workload.dtype!r} cannot be predicted: only bf16 runs flash attention on CUDA"
            " and is modelled; valid: bf16"
        )


def predict(profile: Profile, gpu: GPU, progress: Progress) -> Iterator[Record]:
    """Predicted records of all the profile's cases on `gpu`, n by n."""
    env = environment("cpu")
    for n in profile.sweep.n:
        config = profile.model.with_n(n)
        progress(f"n={n} floor")
        floor = _as_floor(_predicted(fake.trace_step(config, profile.workload, NoLogits(), gpu=gpu), gpu))
        for spec in profile.sweep.strategies:
            progress(f"n={n} {spec}")
            facts: dict[str, Any] = {"status": "ok"}
            try:
                trace = fake.trace_step(config, profile.workload, load_strategy(spec), gpu=gpu)
                facts |= _predicted(trace, gpu)
            except MtpMemError as e:
                facts |= {"status": "error", "error": str(e)}
            shape, workload = dataclasses.asdict(config), dataclasses.asdict(profile.workload)
            yield Record(
                case=fingerprint(spec, shape, workload, dataclasses.asdict(gpu), env["code"], env["torch"]),
                created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                backend="fake",
                exactness="predicted",
                strategy=spec,
                n=n,
                model=shape,
                workload={**workload, "source": f"for {gpu.name}"},
                environment={**env, "target": gpu.name, "target_bytes": gpu.total_bytes},
                **floor,
                **facts,
            )


def _as_floor(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "floor_requested_bytes": facts["peak_requested_bytes"],
        "floor_allocated_bytes": facts.get("peak_allocated_bytes"),
    }


def _predicted(trace: Trace, gpu: GPU) -> dict[str, Any]:
    """The allocator's figures, cuBLAS workspaces included, and the tracked ones that explain them."""
    resident = (gpu.workspace_bytes,) * fake.CUBLAS_WORKSPACES
    peak = trace.peak()
    blocks = replay(trace, expandable=gpu.expandable_segments, workspaces=resident)
    by_category: dict[str, int] = {str(category): nbytes for category, nbytes in peak.by_category.items()}
    by_category["workspace"] = by_category.get("workspace", 0) + sum(resident)
    return {
        "steps_before": fake.WARM_UP,
        "baseline_bytes": trace.baseline + sum(resident),
        "peak_requested_bytes": blocks.requested_peak,
        "peak_over_baseline_bytes": peak.nbytes - trace.baseline,
        "peak_allocated_bytes": blocks.allocated_peak,
        "peak_reserved_bytes": blocks.reserved_peak,
        "peak_phase": peak.phase,
        "peak_op": peak.op,
        "phase_peaks": {phase: nbytes + sum(resident) for phase, nbytes in trace.phase_peaks().items()},
        "bytes_at_peak": by_category,
    }


def speed(seconds: list[float], tokens: int) -> dict[str, float]:
    """Median step time with its 20/80 % band, and tokens per second at the median."""
    p20, median, p80 = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double())
    return {
        "step_ms": median.item() * 1e3,
        "step_ms_p20": p20.item() * 1e3,
        "step_ms_p80": p80.item() * 1e3,
        "tokens_per_s": tokens / median.item(),
    }


def failure(error: Exception) -> dict[str, Any]:
    """Out of memory is a result; anything else a strategy raises is one too, with its message."""
    text = f"{type(error).__name__}: {error}".split("\n")[0]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return {"status": "oom", "error": text}
    return {"status": "error", "error": text}


def resolve_device(name: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:1` or `auto` (CUDA where there is any).

    Raises:
        Missing: CUDA was asked for and is absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            built = torch.version.cuda
            why = "no CUDA device is visible" if built else f"torch {torch.__version__} is built without CUDA"
            raise Missing(f"--device {name}: {why}; valid here: cpu")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise Missing(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device)
    return device


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
