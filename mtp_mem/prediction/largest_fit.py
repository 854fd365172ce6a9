"""What fits on a GPU: for each strategy the largest batch, the largest sequence and the largest n.

A step fits where its predicted allocated peak stays within the limit: `predict`'s "yes" and "tight". What it reserves
decides between those two, but not the answer: the unused parts of segments jump by gigabytes from one sequence to the
next, so a step may reserve less than a smaller one and "the largest" would depend on where the search began.

Every answer has been predicted, and so has the next larger one, which does not fit; or it is the model's own limit.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from mtp_mem._util import Progress, format_bytes
from mtp_mem.config.gpus import GPU
from mtp_mem.config.schema import LARGEST_SIZE, MOST_MODULES, ModelConfig, Profile, Workload
from mtp_mem.errors import BadInput, Missing, contained, one_line
from mtp_mem.prediction.auto import resolve_auto
from mtp_mem.prediction.caching_allocator import Fit, fit
from mtp_mem.prediction.formulas import flops_factor, formula_peak
from mtp_mem.prediction.peaks import predicted
from mtp_mem.prediction.simulated_step import Simulation
from mtp_mem.strategy import Strategy

Axis = Literal["batch", "sequence", "n"]
AXES: tuple[Axis, ...] = ("batch", "sequence", "n")

SEQUENCE_STEP = 128
"""Sequences are searched in multiples of flash attention's tile: its backward pads to it (flash_api.cpp, mha_bwd)."""

GUESSES = 6  # probes of one search until guessing by the closed form gives way to a line, and as many until to halving
FARTHER = 16  # a guess is at most so many times as large as what is known to fit
KEPT = 6  # simulations; strategies are often asked for at the same points


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where a step is probed: B sequences of S tokens, n heads."""

    batch: int
    sequence: int
    n: int


@dataclass(frozen=True, kw_only=True)
class ProbedBytes:
    """The allocator's predicted peaks of a steady step."""

    allocated: int
    reserved: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The largest value on one axis that fits, the other two as asked; or the point nearest to fitting."""

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
        left_out: the others.
        before_a_step: bytes of weights and optimizer state alone, where they are over the limit already: there are no
            answers then, and nothing was tried.
    """

    limit: int
    base: Point
    answers: tuple[Answer, ...]
    left_out: "LeftOut"
    before_a_step: int | None = None

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


@dataclass(frozen=True)
class LeftOut:
    """Strategies that no answer is given for.

    Attributes:
        reasons: by spec.
        failed: those that raised an error of their own; the others cannot be predicted.
    """

    reasons: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    @contextmanager
    def unless_it_raises(self, spec: str) -> Iterator[None]:
        """A block that runs the strategy: what it raises is its reason."""
        try:
            with contained():
                yield
        except Exception as e:
            self.reasons[spec] = one_line(e)
            if not isinstance(e, (BadInput, Missing)):
                self.failed.append(spec)


class Prober:
    """Predicts strategies' steps at points of one profile on one GPU; a point that was predicted is remembered.

    Args:
        profile: everything but batch, sequence and n is taken from it.
        gpu: the target.
        strategies: by spec; all that will be asked for.
        progress: told of each step that is simulated.
    """

    def __init__(self, profile: Profile, gpu: GPU, strategies: Mapping[str, Strategy], progress: Progress) -> None:
        self.profile, self.gpu, self.strategies, self._progress = profile, gpu, strategies, progress
        self._simulations: dict[Point, Simulation] = {}  # the last ones
        self._answers: dict[tuple[str, Point], ProbedBytes] = {}

    def probe(self, spec: str, point: Point) -> ProbedBytes:
        """The strategy's peaks at a point, as `predict` gives them. Models of the last few points are kept.

        Raises:
            MtpMemError: the strategy cannot be predicted.
        """
        if (spec, point) not in self._answers:
            self._progress(f"{spec}: batch {point.batch}, sequence {point.sequence}, n = {point.n}")
            setup = (*self._shape(point), self.profile.training)
            strategy, _ = resolve_auto(self.strategies[spec], *setup, cuda=True, gpu=self.gpu)
            peaks = predicted(self.simulation(point).trace(strategy), self.gpu)
            self._answers[spec, point] = ProbedBytes(
                allocated=peaks["peak_allocated_bytes"], reserved=peaks["peak_reserved_bytes"]
            )
        return self._answers[spec, point]

    def simulation(self, point: Point) -> Simulation:
        """The model at a point."""
        if point not in self._simulations:
            if len(self._simulations) >= KEPT:
                del self._simulations[next(iter(self._simulations))]
            self._simulations[point] = Simulation(*self._shape(point), self.profile.training, gpu=self.gpu)
        return self._simulations[point]

    def formula(self, spec: str, point: Point) -> int | None:
        """The peak at a point in closed form, without what the allocator and kernels add; None without a formula.

        A search needs only an estimate: where the setup has no formula, this is the formula of a simpler setup.
        """
        setup, training = self._shape(point), self.profile.training
        plain = dataclasses.replace(training, frozen=(), label_smoothing=0.0, z_loss=0.0)
        exact = formula_peak(spec, *setup, training)
        return formula_peak(spec, *setup, plain) if exact is None else exact

    def _shape(self, point: Point) -> tuple[ModelConfig, Workload]:
        workload = dataclasses.replace(self.profile.workload, batch=point.batch, sequence=point.sequence)
        return self.profile.model.with_n(point.n), workload


def plan(prober: Prober, base: Point, limit: int, axes: Sequence[Axis] = AXES) -> Plan:
    """The largest value on each axis for each of the prober's strategies.

    Args:
        prober: predicts for one profile and GPU.
        base: batch, sequence and n from which each axis is varied.
        limit: bytes that the allocated peak may not exceed.
        axes: what to vary.
    """
    least = prober.simulation(Point(batch=1, sequence=1, n=1)).baseline
    if least > limit:
        return Plan(limit=limit, base=base, answers=(), left_out=LeftOut(), before_a_step=least)
    answers: dict[tuple[str, Axis], Answer] = {}
    left_out = LeftOut()
    for axis in axes:
        for spec in prober.strategies:
            if spec not in left_out.reasons:
                with left_out.unless_it_raises(spec):
                    answers[spec, axis] = _answer(prober, spec, axis, base, limit)
    kept = tuple(answers[spec, axis] for spec in prober.strategies if spec not in left_out.reasons for axis in axes)
    return Plan(limit=limit, base=base, answers=kept, left_out=left_out)


def _answer(prober: Prober, spec: str, axis: Axis, base: Point, limit: int) -> Answer:
    unit = SEQUENCE_STEP if axis == "sequence" else 1

    def at(k: int) -> Point:
        return dataclasses.replace(base, **{axis: k * unit})

    tokens = LARGEST_SIZE // unit
    most = {"batch": tokens // base.sequence, "sequence": tokens // base.batch, "n": MOST_MODULES}[axis]
    known = search(
        lambda k: prober.probe(spec, at(k)),
        lambda k: prober.formula(spec, at(k)),
        limit,
        top=prober.profile.model.largest_n if axis == "n" else None,
        start=max(1, getattr(base, axis) // unit),
        end=most,
    )
    low, high = _ends(known, limit)
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


def search(
    probe: Callable[[int], ProbedBytes],
    formula: Callable[[int], int | None],
    limit: int,
    top: int | None,
    start: int,
    end: int,
) -> dict[int, ProbedBytes]:
    """Probe until the largest k that fits and the next one, which does not, are both known.

    It begins at the answer of the closed form. Each next k is the closed form's answer under a limit that is corrected
    by the closed form's error at the last probe. Without a closed form it follows the line through two probes, and if
    that does not end, it doubles, then halves the interval.

    Args:
        probe: the peaks at k = 1, 2, ...
        formula: the allocated peak in closed form, or None.
        limit: bytes that the allocated peak may not exceed.
        top: the largest k there is, if there is one.
        start: where to begin without a closed form.
        end: the largest k to try where there is no `top`.

    Returns:
        All that was probed.
    """
    known: dict[int, ProbedBytes] = {}
    end = top or end
    # More heads may need less, for the trunk has then fewer layers: look at the end first.
    k = top or (min(start, end) if formula(1) is None else _largest(formula, limit, end))
    while True:
        known[k] = probe(k)
        low, high = _ends(known, limit)
        if low == end or high == low + 1:
            return known
        if formula(1) is not None and len(known) < GUESSES:
            off = known[k].allocated - (formula(k) or 0)
            guess = _largest(formula, limit - off, end)
            # What fits by this guess may be known already: then the next one is the question.
            k = max(low + 1, min(guess if guess not in known else guess + 1, (high or end + 1) - 1))
        else:
            if 2 <= len(known) < 2 * GUESSES:
                guess = _on_a_line(known, limit)
            else:
                guess = (low + high) // 2 if high else 2 * low
            k = max(low + 1, min(guess, (high or min(FARTHER * low, end) + 1) - 1))


def _on_a_line(known: Mapping[int, ProbedBytes], limit: int) -> int:
    """Where the straight line through the two points nearest to the limit reaches it; the first one if it is level."""
    one, other = sorted(known, key=lambda k: abs(known[k].allocated - limit))[:2]
    rise = known[other].allocated - known[one].allocated
    return one + (limit - known[one].allocated) * (other - one) // rise if rise else one


def _ends(known: Mapping[int, ProbedBytes], limit: int) -> tuple[int, int | None]:
    """The largest k that fits, 0 if none does, and the smallest known one above it."""
    low = max((k for k, figures in known.items() if figures.allocated <= limit), default=0)
    return low, min((k for k in known if k > low), default=None)


def _largest(formula: Callable[[int], int | None], limit: int, end: int) -> int:
    """The largest k from 1 to `end` whose closed form is within the limit; 1 where none is."""
    low, high = 1, 2
    while high <= end and (formula(high) or 0) <= limit:
        low, high = high, 2 * high
    high = min(high, end + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if (formula(middle) or 0) <= limit else (low, middle)
    return low


def advice(result: Plan) -> str:
    """The strategy to use and why, in one sentence; or that there is none."""
    best = result.recommended()
    if result.before_a_step is not None:
        over = format_bytes(result.before_a_step - result.limit)
        return (
            f"Nothing fits: weights and optimizer state alone take {format_bytes(result.before_a_step)},"
            f" {over} more than the limit. Take a larger GPU or a smaller model, freeze parts, or keep less state for"
            " each parameter."
        )
    if best is None:
        return "Nothing fits: take a larger GPU, or a smaller model."
    others = [answer for answer in result.of(best.axis) if answer is not best]
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
    return f"{sentence}; {format_bytes(result.left(best))} are left."
