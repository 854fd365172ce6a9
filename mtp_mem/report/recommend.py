"""The recommendation: from records to the sentence that names the strategy to use."""

import marshal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from mtp_mem._util import format_bytes
from mtp_mem.config.schema import Training
from mtp_mem.prediction.formulas import formula_bytes
from mtp_mem.runs.identity import training_of
from mtp_mem.runs.record import Record

SLOWER = 1.10  # a step this much slower than naive's still counts as no slower: timings are noisy
SMALLER = 0.90  # of the recommended bytes; a strategy that needs less is worth a second sentence


def peak_bytes(record: Record) -> int | None:
    """The peak as usually reported: `torch.cuda.max_memory_allocated` on CUDA, live tensor bytes elsewhere."""
    return record.peak_allocated_bytes if record.peak_allocated_bytes is not None else record.peak_requested_bytes


@dataclass(frozen=True)
class Recommendation:
    """The candidates at the largest n, among the strategies with right gradients."""

    n: int
    naive: Record | None
    best: Record  # the least memory of those that are about as fast as naive
    least: Record  # the least memory of all


def choose(records: Sequence[Record]) -> Recommendation | None:
    """The choice at the largest n; None where no strategy ran with right gradients."""
    usable = [r for r in records if r.status == "ok" and r.gradient in ("bit-identical", "within bound")]
    if not usable:
        return None
    n = max(r.n for r in usable)
    by_strategy = {r.strategy: r for r in usable if r.n == n}
    naive = by_strategy.get("naive")
    pool = [r for r in by_strategy.values() if naive is None or _time(r) <= SLOWER * _time(naive)]
    return Recommendation(n, naive, min(pool, key=_over), min(by_strategy.values(), key=_over))


def advise(records: Sequence[Record]) -> str:
    """One or two sentences: which strategy at the largest n, what it saves, what it costs, and whether it is exact."""
    wrong = sorted({r.strategy for r in records if r.status == "ok" and r.gradient == "differs"})
    warning = f" Do not use {', '.join(wrong)}: the gradients differ." if wrong else ""
    choice = choose(records)
    if choice is None:
        return "No strategy ran with right gradients." + warning
    naive, best, least = choice.naive, choice.best, choice.least
    sentence = f"At n = {choice.n} use {best.strategy}: it needs {format_bytes(_over(best))} over the baseline"
    if naive is None:
        sentence += f", gradients {best.gradient} to those of {best.gradient_reference or 'naive'}."
    elif best is naive:
        sentence += ", and nothing as fast needs less."
    else:
        sentence += (
            f" where naive needs {format_bytes(_over(naive))} ({saving(best, naive)}),"
            f" takes {slowdown(best, naive)} naive's time, and its gradients are {_same(best)}."
        )
    if least is not best and _over(least) < SMALLER * _over(best):
        sentence += f" If that does not fit, {least.strategy} needs {format_bytes(_over(least))}"
        sentence += f" at {slowdown(least, best)} the time, gradients {_same(least)}."
    return sentence + warning


def saving(record: Record, naive: Record) -> str:
    """The change in bytes over the baseline against naive, in percent."""
    return f"{_over(record) / _over(naive) - 1:+.0%}" if _over(naive) else "-"


def slowdown(record: Record, naive: Record) -> str:
    """The record's time over naive's, as `0.56x`; `an unknown multiple of` where one was not timed."""
    if not record.step_ms or not naive.step_ms:
        return "an unknown multiple of"
    return f"{record.step_ms / naive.step_ms:.2f}x"


def _over(record: Record) -> int:
    return record.peak_over_baseline_bytes or 0


def _time(record: Record) -> float:
    return record.step_ms or 0.0


def _same(record: Record) -> str:
    if record.gradient == "bit-identical" or record.gradient_error is None:
        return record.gradient
    return f"within {record.gradient_error:.0e} of naive's"


def record_formula(record: Record) -> int | None:
    """The closed form of the record's peak over its baseline; None where there is none for its setup."""
    training = training_of(record)
    if training is None:
        return None
    return _formula(
        record.strategy, marshal.dumps([record.model, record.workload], 2), training, record.backend != "cpu"
    )


@lru_cache(maxsize=2**14)  # charts and tables each ask for every record's
def _formula(spec: str, written: bytes, training: Training, cuda: bool) -> int | None:
    model, workload = marshal.loads(written)
    return formula_bytes(spec, model, workload, training, cuda=cuda)
