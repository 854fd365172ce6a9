"""One model with its optimizer and batch on one device, on which strategies take turns: gradients, bytes, time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mtp_mem._util import Progress
from mtp_mem.config.schema import Dtype, ModelConfig, Profile
from mtp_mem.data import Batch, Corpus, corpus_batch
from mtp_mem.distributed.seam import local
from mtp_mem.errors import BadInput, BrokenContract, Missing, one_line
from mtp_mem.memory import cuda, cuda_history
from mtp_mem.memory.cpu import track
from mtp_mem.memory.rss import sampled_rss
from mtp_mem.memory.trace import Trace
from mtp_mem.model.build import make_model
from mtp_mem.model.model_state import model_kept
from mtp_mem.model.mtp_model import MTPModel
from mtp_mem.model.optimizers import make_optimizer
from mtp_mem.model.own import Model, groups, set_up, without_dropout
from mtp_mem.prediction.auto import resolve_auto
from mtp_mem.step import TrainingStep, forward_backward
from mtp_mem.strategy import Strategy, kernel_limits, load_strategy
from mtp_mem.verification.contract import put_back
from mtp_mem.verification.global_state import restored
from mtp_mem.verification.gradient_error import Comparison, Gradients, compare, take

REFERENCES = ("naive", "sequential", "chunked_tokens")
"""Strategies to hold the others' gradients against: the first that fits in memory. The first two are bit-identical."""

WARM_UP = {"cpu": 1, "cuda": 2}  # steps before the measured one: optimizer state, lazy buffers, the allocator's cache


class Bench:
    """One model with its optimizer and batch, on which strategies take turns."""

    def __init__(self, profile: Profile, config: ModelConfig, corpus: Corpus, device: torch.device) -> None:
        if profile.training.part != "step":
            raise BadInput(
                f"training.part = {profile.training.part!r}: whole steps run here; predict and timeline --gpu take it"
            )
        self.profile, self.config, self.device = profile, config, device
        self.model = self._model()
        self.batch = self._batch(corpus)
        training = profile.training
        self._scale = training.scale(profile.workload.dtype)
        self._loss: dict[str, Any] = {"label_smoothing": training.label_smoothing, "z_loss": training.z_loss}
        self.optimizer = make_optimizer(self.model, name=training.optimizer, master=training.master_weights)
        self._start = [local(parameter).detach().to("cpu", copy=True) for parameter in self.model.parameters()]
        # In host memory like the weights: on the device a second batch would be counted in every peak.
        self._tokens = [part.to("cpu", copy=True) for part in (self.batch.tokens, self.batch.targets)]
        self.reference: Gradients | None = None
        self.reference_name, self.noise = "", 0.0
        self._buckets: list[tuple[str, Tensor]] = []

    def _model(self) -> Any:
        if self.profile.training.sharding != "none":
            raise BadInput(
                f"training.sharding = {self.profile.training.sharding!r} needs ranks: give --nproc or use torchrun"
            )
        return drawn_model(self.profile, self.config, self.device)

    def _batch(self, corpus: Corpus, rank: int = 0) -> Batch:
        batch = corpus_batch(corpus, self.config, self.profile.workload, rank)
        return Batch(batch.tokens.to(self.device), batch.targets.to(self.device))

    def check(self, strategy: Strategy) -> dict[str, Any]:
        """A record's fields for the strategy's gradients against the reference's, from empty `.grad`.

        Call it before any step, as steps change weights. The reference's gradients stay in host memory: on the device
        they would leave less of it to every later case. The reference runs twice: where a kernel adds in no fixed
        order, as flash attention's backward does, its two runs may differ.
        """
        dtype = self.profile.workload.dtype
        if not self.reference_name:
            self._settle_reference()
        strategy = self.resolve_auto(strategy)[0]
        rounding = kernel_limits(strategy).loss_rounding(dtype, self.profile.workload.tokens)
        facts: dict[str, Any] = {}
        verdicts: list[Comparison] = []
        for _ in range(2):  # its first run may be right, and its second wrong
            with self.guarded():
                gradients = self._gradients(strategy)
            (losses,) = gradients["losses"]
            assert losses is not None
            facts["losses"] = tuple(losses.tolist())
            if self.reference is not None:
                verdicts.append(compare(gradients, self.reference, dtype, rounding))
            del gradients, losses
        if not verdicts:
            return facts | {"gradient": "unchecked", "gradient_reference": self.reference_name}
        verdict = max(verdicts, key=lambda verdict: (verdict.verdict == "differs", verdict.error))
        reference = self.reference_name
        if verdict.overflows:
            reference += f"'s gradient of {verdict.group} is not finite, in {dtype} at a loss scale of {self._scale:g}"
        return facts | {
            "gradient": verdict.verdict,
            "gradient_error": verdict.error,
            "gradient_group": verdict.group,
            "gradient_reference": reference,
            "gradient_noise": self.noise,
        }

    @contextmanager
    def guarded(self, *, trains: bool = False) -> Iterator[None]:
        """A block that runs one case from the same weights and batch as all; what else it changed is put back.

        Args:
            trains: the case takes optimizer steps, so that the weights may change.

        Raises:
            BrokenContract: the strategy changed what is not its own.
        """
        self._restore()
        own = isinstance(self.model, MTPModel)  # which has no dropout
        with model_kept(self.model) as of_model, restored(may_draw=trains and not own) as changed:
            yield
        changed += of_model
        parts = zip((self.batch.tokens, self.batch.targets), self._tokens, strict=True)
        if not all(torch.equal(part.cpu(), start) for part, start in parts):
            changed.append("the batch")
        if not trains and not self._restore():
            changed.append("the weights")
        if changed:
            raise BrokenContract(f"leaves {changed[0]} changed (it was put back)")

    def _restore(self) -> bool:
        """Put weights and batch back as they were at the start; returns whether the weights had not changed."""
        for tensor, start in zip((self.batch.tokens, self.batch.targets), self._tokens, strict=True):
            put_back(tensor, start)
        same = [put_back(p, start) for p, start in zip(map(local, self.model.parameters()), self._start, strict=True)]
        return all(same)

    def measure(self, strategy: Strategy) -> dict[str, Any]:
        """Bytes of one step: tracked on the CPU, the caching allocator's on CUDA."""
        with self.guarded(trains=True):
            return self._measure(strategy)

    def _measure(self, strategy: Strategy) -> dict[str, Any]:
        step, chosen = self.step(strategy), self.resolve_auto(strategy)[1]
        free(self.device)  # what building the model and restoring its weights left in the cache
        with sampled_rss() as rss:
            for _ in range(WARM_UP[self.device.type]):
                step()
        facts: dict[str, Any] = {
            "status": "ok",
            "chosen": chosen,
            "host_rss_bytes": rss.nbytes,
            "steps_before": WARM_UP[self.device.type],
        }
        if self.device.type == "cuda":
            peaks = cuda.measure(step)
            # In a step of its own, for categories and phases: recording a history must not touch the measured step.
            peak = explained(cuda_history.record(step))
            return facts | {
                **peak,
                "baseline_bytes": peaks.baseline,
                "peak_requested_bytes": peaks.requested,
                "peak_over_baseline_bytes": peaks.requested - peaks.baseline,
                "peak_allocated_bytes": peaks.allocated,
                "peak_reserved_bytes": peaks.reserved,
                "peak_spread_bytes": peaks.spread,
                "live_unnamed_bytes": peaks.unnamed,
                "alloc_retries": peaks.retries,
                "nvml_process_bytes": peaks.nvml_process,
            }
        return facts | explained(track(step, self._buckets))

    def time(self, strategies: dict[str, Strategy], progress: Progress) -> dict[str, list[float] | dict[str, Any]]:
        """Seconds of untracked steps by spec; the strategies take turns, a different one first in each round.

        A strategy that fails here, out of memory for example, runs no further, and its entry is `failure`'s.
        """
        seconds: dict[str, list[float]] = {spec: [] for spec in strategies}
        failed: dict[str, list[float] | dict[str, Any]] = {}
        specs = list(strategies)
        # On CUDA the bytes were measured in other processes: here a strategy's first step comes first, untimed.
        warm_up = int(self.device.type == "cuda")
        for turn in range(-warm_up, self.profile.sweep.rounds):
            start = turn % len(specs) if specs else 0
            for spec in specs[start:] + specs[:start]:
                if turn >= 0:
                    progress(spec)
                if spec in failed:
                    continue
                try:
                    with self.guarded(trains=True):
                        took = self._seconds(self.step(strategies[spec]))
                except Exception as e:  # not kept: its frames, and those of its cause, hold the step's tensors
                    failed[spec] = failure(e)
                if spec in failed:
                    self.recover()
                elif turn >= 0:
                    seconds[spec].append(took)
        return {**seconds, **failed}

    def _seconds(self, step: TrainingStep) -> float:
        self._synchronise()
        begin = time.perf_counter()
        step()
        self._synchronise()
        return time.perf_counter() - begin

    def recover(self) -> None:
        """Drop what a failed case left behind."""
        self.model.zero_grad(set_to_none=True)
        free(self.device)

    def _settle_reference(self) -> None:
        """Set the reference: the first that fits, in host memory; its name, or why there is none; its noise."""
        self.reference_name = "no reference fits here"
        for name in REFERENCES:
            try:
                self.reference = on_host(self._gradients(load_strategy(name)))
            except (RuntimeError, MemoryError) as e:
                if failure(e)["status"] != "oom":
                    raise
                self.recover()
            else:
                self.reference_name = name
                again = self._gradients(load_strategy(name))
                self.noise = compare(again, self.reference, self.profile.workload.dtype).error
                return

    def _gradients(self, strategy: Strategy) -> dict[str, list[Tensor | None]]:
        """Gradients of one step without dropout, by part of the model, and its losses under "losses"."""
        self.model.zero_grad(set_to_none=True)
        with without_dropout(self.model):
            losses = self._backward(strategy)
        if not isinstance(losses, Tensor) or losses.shape != (self.model.n_future,):
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise BrokenContract(f"returns {shape}, not the n losses ({self.model.n_future},)")
        return {**take(groups(self.model)), "losses": [losses]}

    def _backward(self, strategy: Strategy) -> Tensor:
        return forward_backward(self.model, self.batch, strategy, scale=self._scale, **self._loss)

    def step(self, strategy: Strategy) -> TrainingStep:
        """The training step with this strategy."""
        strategy = self.resolve_auto(strategy)[0]
        clip_norm, training = self.profile.workload.clip_norm, self.profile.training
        return TrainingStep(self.model, self.optimizer, self.batch, strategy, clip_norm, training)

    def resolve_auto(self, strategy: Strategy) -> tuple[Strategy, str | None]:
        """The strategy that runs, and what was chosen and why where it depends on the step."""
        setup = (self.config, self.profile.workload, self.profile.training)
        return resolve_auto(strategy, *setup, cuda=self.device.type == "cuda")

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def drawn_model(profile: Profile, config: ModelConfig, device: torch.device, dtype: Dtype | None = None) -> Model:
    """A model in the profile's training setup, with random weights from its seed; not sharded.

    Args:
        profile: workload and training.
        config: the model.
        device: where it is made.
        dtype: in place of the workload's.
    """
    with torch.random.fork_rng():
        torch.manual_seed(profile.workload.seed)
        model = make_model(config, dtype=dtype or profile.workload.dtype, device=device)
    set_up(model, profile.training)
    return model


def explained(trace: Trace) -> dict[str, Any]:
    """A record's fields for the peak of a trace."""
    peak = trace.peak()
    return {
        "baseline_bytes": trace.baseline,
        "peak_requested_bytes": peak.nbytes,
        "peak_over_baseline_bytes": peak.nbytes - trace.baseline,
        "peak_phase": peak.phase,
        "peak_op": peak.op,
        "phase_peaks": trace.phase_peaks(),
        "bytes_at_peak": dict(peak.by_category),
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


def failure(error: BaseException) -> dict[str, Any]:
    """A record's fields for what a strategy raised: out of memory, or any other error with its message."""
    return {"status": "oom" if out_of_memory(error) else "error", "error": one_line(error)}


def out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had too little memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def resolve_device(name: str) -> torch.device:
    """The device named `cpu`, `cuda`, `cuda:1` or `auto` (CUDA where there is any).

    Raises:
        Missing: CUDA, or the device of this number, was asked for and is absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            built = torch.version.cuda
            why = "no CUDA device is visible" if built else f"torch {torch.__version__} is built without CUDA"
            raise Missing(f"device {name}: {why}; valid here: cpu")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise Missing(f"device {name}: there are {torch.cuda.device_count()} CUDA devices")
        if device.index is not None:
            torch.cuda.set_device(device)
    return device


def on_host(gradients: Gradients) -> Gradients:
    """Gradients in host memory."""
    return {name: [None if g is None else g.cpu() for g in own] for name, own in gradients.items()}


def free(device: torch.device) -> None:
    """Empty CUDA's allocator cache, so that the next case starts without one."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
