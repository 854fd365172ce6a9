"""What fits on a GPU: for each strategy the largest batch, the largest sequence and the largest n.

A step fits where its predicted allocated peak stays within the limit: `predict`'s "yes" and "tight". What it reserves
decides between those two, but not the answer: the unused parts of segments jump by gigabytes from one sequence to the
next, so a step may reserve less than a smaller one and "the largest" would depend on where the search began.

Every answer has been probed, and so has the next larger one, which does not fit; or it is the model's own limit.
"""

import dataclasses
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mtp_mem._util import format_bytes
from mtp_mem.config.schema import ModelConfig, Profile, Workload
from mtp_mem.errors import MtpMemError
from mtp_mem.model.parameters import parameters, weight_bytes
from mtp_mem.prediction.caching_allocator import Fit, fit
from mtp_mem.prediction.formulas import flops_factor, formula_bytes
from mtp_mem.prediction.probes import Point, ProbedBytes, Prober

Axis = Literal["batch", "sequence", "n"]
AXES: tuple[Axis, ...] = ("batch", "sequence", "n")

SEQUENCE_STEP = 128
"""Sequences are searched in multiples of flash attention's tile: its backward pads to it (flash_api.cpp, mha_bwd)."""

GUESSES = 6  # probes of one search until guessing by lines gives way to halving
LEAP = 64  # the farthest guess, as a multiple of what is known
FARTHEST = 2**20  # of a hint


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The largest value on one axis that fits, the other two as asked; or by how much nothing fits."""

    strategy: str
    axis: Axis
    fits: bool
    point: Point  # the answer; where nothing fits, the probed point that needs least
    figures: ProbedBytes  # at that point
    next_point: Point | None  # the next larger one, which does not fit; None at the model's limit or if nothing fits
    next_figures: ProbedBytes | None

    @property
    def value(self) -> int:
        """The answer on its own axis."""
        value: int = getattr(self.point, self.axis)
        return value


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answers, strategy by strategy and axis by axis.

    Attributes:
        limit: bytes that the allocated peak may not exceed.
        base: the batch, sequence and n from which each axis is varied.
        answers: of the strategies that can be predicted.
        left_out: the others, each with the reason.
    """

    limit: int
    base: Point
    answers: tuple[Answer, ...]
    left_out: Mapping[str, str]

    def of(self, axis: Axis) -> list[Answer]:
        """One axis' answers."""
        return [answer for answer in self.answers if answer.axis == axis]

    def left(self, answer: Answer) -> int:
        """Bytes between the answer's allocated peak and the limit; negative if nothing fits."""
        return self.limit - answer.figures.allocated

    def fit(self, figures: ProbedBytes) -> Fit:
        """`predict`'s word for these peaks, under this limit."""
        return fit(figures.allocated, figures.reserved, self.limit)

    def recommended(self) -> Answer | None:
        """The largest batch that fits; of equal ones the one without recomputation, then the one that leaves most.

        Where no batch fits the same by sequence, then by n; None where nothing fits at all.
        """
        for axis in AXES:
            if fitting := [answer for answer in self.of(axis) if answer.fits]:
                return max(fitting, key=lambda a: (a.value, flops_factor(a.strategy) == 1, self.left(a)))
        return None


def plan(
    prober: Prober, profile: Profile, base: Point, limit: int, specs: Sequence[str], axes: Sequence[Axis] = AXES
) -> Plan:
    """Search all strategies and axes together, so that those that ask for the same point share its model.

    Args:
        prober: answers for this profile and GPU.
        profile: whose model bounds n.
        base: batch, sequence and n from which each axis is varied.
        limit: bytes that the allocated peak may not exceed.
        specs: the strategies, in the order of the answers.
        axes: what to vary.
    """
    top = profile.model.largest_n
    searches = {
        (spec, axis): search(spec, axis, base, limit, top, hint(profile, spec, axis, base, limit))
        for spec in specs
        for axis in axes
    }
    wanted = {key: next(running) for key, running in searches.items()}
    answers: dict[tuple[str, Axis], Answer] = {}
    left_out: dict[str, str] = {}
    while wanted:
        for point in dict.fromkeys(wanted.values()):
            for key in [key for key, other in wanted.items() if other == point and key[0] not in left_out]:
                figures = prober.probe(key[0], point)
                if isinstance(figures, MtpMemError):
                    left_out[key[0]] = str(figures)
                    continue
                try:
                    wanted[key] = searches[key].send(figures)
                except StopIteration as found:
                    answers[key] = found.value
                    del wanted[key]
        wanted = {key: point for key, point in wanted.items() if key[0] not in left_out}
    kept = tuple(answers[spec, axis] for spec in specs if spec not in left_out for axis in axes)
    return Plan(limit=limit, base=base, answers=kept, left_out=left_out)


def hint(profile: Profile, spec: str, axis: Axis, base: Point, limit: int) -> int | None:
    """The largest value that fits by the closed forms, in the search's units; None where there are none.

    Where a search begins, and no more than that: they leave out what the allocator and CUDA's kernels add.
    """
    unit, top = _unit(axis), profile.model.largest_n if axis == "n" else None

    def fits(k: int) -> bool | None:
        point = dataclasses.replace(base, **{axis: k * unit})
        config = profile.model.with_n(point.n)
        workload = dataclasses.replace(profile.workload, batch=point.batch, sequence=point.sequence)
        peak = formula_peak(spec, config, workload)
        return None if peak is None else peak <= limit

    if fits(1) is None:
        return None
    low, high = 0, 1
    while high < FARTHEST and (top is None or high <= top) and fits(high):
        low, high = high, 2 * high
    if top is not None:
        high = min(high, top + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return max(low, 1)


def baseline(config: ModelConfig, workload: Workload) -> int:
    """Bytes live before a step: parameters, AdamW's two moments of each, tokens and n rows of targets."""
    weights = weight_bytes(sum(parameters(config).values()), workload.dtype)
    return 3 * weights + 8 * (1 + config.n_future) * workload.tokens


def formula_peak(spec: str, config: ModelConfig, workload: Workload) -> int | None:
    """A step's peak on CUDA in closed form, without what the allocator and kernels add; None without a formula."""
    over_baseline = formula_bytes(spec, dataclasses.asdict(config), dataclasses.asdict(workload), cuda=True)
    return None if over_baseline is None else baseline(config, workload) + over_baseline


def _unit(axis: Axis) -> int:
    """The step in which an axis is searched."""
    return SEQUENCE_STEP if axis == "sequence" else 1


def search(
    spec: str, axis: Axis, base: Point, limit: int, top: int | None, first: int | None = None
) -> Generator[Point, ProbedBytes, Answer]:
    """Asks for points until the largest one that fits and the next one, which does not, have both been probed.

    Args:
        spec: the strategy, for the answer.
        axis: what varies.
        base: what the other two are, and where to begin.
        limit: bytes that the allocated peak may not exceed.
        top: the model's own limit of n, if it has one.
        first: where to begin, in units of the axis; by default at `base`.
    """
    unit = _unit(axis)
    start = first or max(1, getattr(base, axis) // unit)
    if axis != "n":
        top = None

    def at(k: int) -> Point:
        return dataclasses.replace(base, **{axis: k * unit})

    known: dict[int, ProbedBytes] = {}
    k = top or start  # more heads may need less, for the trunk has then fewer layers: look at the end first
    while True:
        known[k] = yield at(k)
        low = max((k for k, figures in known.items() if figures.allocated <= limit), default=0)
        high = min((k for k in known if k > low), default=None)
        if low == top or high == low + 1:
            break
        k = _guess(known, limit, low, high, proportional=axis == "n") if start in known else start
    best = low or min(known, key=lambda k: known[k].allocated)
    beyond = high if low else None
    return Answer(
        strategy=spec,
        axis=axis,
        fits=low > 0,
        point=at(best),
        figures=known[best],
        next_point=at(beyond) if beyond else None,
        next_figures=known[beyond] if beyond else None,
    )


def _guess(known: dict[int, ProbedBytes], limit: int, low: int, high: int | None, *, proportional: bool) -> int:
    """Where the line through the two points nearest to the limit meets it; always between `low` and `high`.

    With a single point the line starts at the bytes that are there at any batch, or at zero (`proportional`: heads).
    """
    lowest, highest = low + 1, LEAP * max(low, 1) if high is None else high - 1
    if high is not None and len(known) > GUESSES:
        return (low + high) // 2
    a, *others = sorted(known, key=lambda k: abs(known[k].allocated - limit))
    b = others[0] if others else 0
    at_b = known[b].allocated if others else 0 if proportional else known[a].fixed
    slope = (known[a].allocated - at_b) / (a - b)
    if slope <= 0:
        return lowest if low == 0 else min(2 * low, highest)
    return min(max(a + math.floor((limit - known[a].allocated) / slope), lowest), highest)


def advice(found: Plan) -> str:
    """The strategy to use and why, in one sentence; or that there is none."""
    best = found.recommended()
    if best is None:
        return "Nothing fits: take a larger GPU, or a smaller model."
    others = [answer for answer in found.of(best.axis) if answer is not best]
    equal = [answer for answer in others if answer.fits and answer.value == best.value]
    reference = next((answer for answer in others if answer.strategy == "naive"), others[0] if others else best)
    sentence = f"Use {best.strategy}: {best.axis} {best.value} fits"
    if reference not in (best, *equal):
        stops = f"stops at {reference.value}" if reference.fits else "has none"
        sentence += f" where {reference.strategy} {stops}"
    if (factor := flops_factor(best.strategy)) > 1:
        sentence += f", at {factor} of the heads' FLOPs"
    elif any(flops_factor(answer.strategy) > 1 for answer in equal):
        sentence += ", and it recomputes nothing"
    elif equal:
        sentence += f", as with {', '.join(answer.strategy for answer in equal)}, and it leaves most"
    return f"{sentence}; {format_bytes(found.left(best))} are left."
