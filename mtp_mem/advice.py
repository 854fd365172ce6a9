"""From records to the sentence that tells people what to use."""

from collections.abc import Sequence

from mtp_mem.memory.record import Record
from mtp_mem.units import show_bytes

SLOWER = 1.10  # a step this much slower than naive's still counts as no slower: timings are noisy
SMALLER = 0.90  # worth a second sentence


def peak_bytes(record: Record) -> int | None:
    """The peak people compare: `torch.cuda.max_memory_allocated` on CUDA, live tensor bytes elsewhere."""
    return record.peak_allocated_bytes if record.peak_allocated_bytes is not None else record.peak_requested_bytes


def advise(records: Sequence[Record]) -> str:
    """One or two sentences: which strategy at the largest n, what it saves, what it costs, and whether it is exact."""
    usable = [r for r in records if r.status == "ok" and r.gradient in ("bit-identical", "within bound")]
    wrong = sorted({r.strategy for r in records if r.status == "ok" and r.gradient == "differs"})
    warning = f" Do not use {', '.join(wrong)}: the gradients differ." if wrong else ""
    if not usable:
        return "No strategy ran with right gradients." + warning
    n = max(r.n for r in usable)
    here = {r.strategy: r for r in usable if r.n == n}
    naive = here.get("naive")
    pool = [r for r in here.values() if naive is None or _time(r) <= SLOWER * _time(naive)]
    best = min(pool, key=_over)
    least = min(here.values(), key=_over)
    sentence = f"At n = {n} use {best.strategy}: it needs {show_bytes(_over(best))} over the baseline"
    if naive is None:
        sentence += f", gradients {best.gradient} to naive's."
    elif best is naive:
        sentence += ", and nothing as fast needs less."
    else:
        sentence += (
            f" where naive needs {show_bytes(_over(naive))} ({_over(best) / _over(naive) - 1:+.0%}),"
            f" takes {_time(best) / _time(naive):.2f}x naive's time, and its gradients are {_same(best)}."
        )
    if least is not best and _over(least) < SMALLER * _over(best):
        sentence += f" If that does not fit, {least.strategy} needs {show_bytes(_over(least))}"
        sentence += f" at {_time(least) / _time(best):.2f}x the time, gradients {_same(least)}."
    return sentence + warning


def _over(record: Record) -> int:
    return record.peak_over_baseline_bytes or 0


def _time(record: Record) -> float:
    return record.step_ms or 0.0


def _same(record: Record) -> str:
    if record.gradient == "bit-identical":
        return "bit-identical"
    return f"within {record.gradient_error:.0e} of naive's"
