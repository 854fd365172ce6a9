"""Is it the same gradient? Every strategy through every scenario, against an fp64 oracle and against naive.

Each part of the model (embedding, trunk, each head, norm, unembedding) and the losses are held to the rule of
mtp_mem/verification/gradient_error.py. Besides, every strategy is held to the protocol, and takes steps in a row.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtp_mem._util import Progress
from mtp_mem.config.schema import ALL_DTYPES, Dtype
from mtp_mem.errors import BadInput
from mtp_mem.model.own import groups as parts
from mtp_mem.strategy import KernelLimits, Strategy, kernel_limits, load_strategy, loadable, loss_options, loss_refusal
from mtp_mem.verification.behaviour import across_steps, protocol, raised, watched
from mtp_mem.verification.checks import Check, Verification
from mtp_mem.verification.gradient_error import Part, identical, judge
from mtp_mem.verification.problem import Outcome, Problem, build, oracle, run, step_with, with_options
from mtp_mem.verification.scenarios import REAL_SIZES, SCENARIOS, Scenario


def verify(
    strategies: Iterable[str | Strategy] | None = None,
    *,
    dtypes: Sequence[Dtype] = ALL_DTYPES,
    scenarios: Sequence[Scenario] = (*SCENARIOS, *REAL_SIZES),
    behaviour: bool = True,
    device: torch.device | str = "cpu",
    progress: Progress = lambda _: None,
    each: Callable[[Check], None] = lambda _: None,
) -> Verification:
    """Run every strategy through every scenario in every dtype.

    Args:
        strategies: spec strings or objects, by default all that can be loaded here; integer options of their dataclass
            are set to what each scenario asks for.
        dtypes: of the model; a scenario may be made for fewer.
        scenarios: see mtp_mem/verification/scenarios.py.
        behaviour: also check the protocol and steps in a row.
        device: where the strategies run; the oracle runs on the CPU.
        progress: called with each scenario and dtype as it begins.
        each: called with each check as it ends.

    Raises:
        BadInput: a strategy in `strategies` takes none of `dtypes`.
    """
    named: dict[str, Strategy] = {}
    for s in loadable() if strategies is None else strategies:
        name = s if isinstance(s, str) else type(s).__name__
        if name in named and not isinstance(s, str):
            name = f"{name} {sum(type(other).__name__ == name for other in named.values()) + 1}"
        named[name] = load_strategy(s) if isinstance(s, str) else s
    limits = {name: kernel_limits(strategy) for name, strategy in named.items()}
    unable = [name for name in named if not any(map(limits[name].takes, dtypes))]
    if unable and strategies is not None:
        raise BadInput(f"strategy {unable[0]!r} {limits[unable[0]].computes}, which is none of {', '.join(dtypes)}")
    able = {name: strategy for name, strategy in named.items() if name not in unable}
    checks = []
    with _one_thread():
        for check in _checks(able, dtypes, scenarios, behaviour, torch.device(device), progress):
            checks.append(check)
            each(check)
    remarks = [line for name in named for line in _allowances(name, limits[name], dtypes)]
    used = {option: None for scenario in scenarios for option in scenario.options.used}
    for name, strategy in able.items():
        if missing := [option for option in used if option not in loss_options(strategy)]:
            remarks.append(f"{name}: checked without {', '.join(missing)}, which its loss does not take")
    return Verification(tuple(checks), tuple(remarks))


def _checks(
    strategies: dict[str, Strategy],
    dtypes: Sequence[Dtype],
    scenarios: Sequence[Scenario],
    behaviour: bool,
    device: torch.device,
    progress: Progress,
) -> Iterator[Check]:
    """The protocol, steps in a row, then every scenario in every dtype."""
    limits = {name: kernel_limits(strategy) for name, strategy in strategies.items()}
    for name, strategy in strategies.items() if behaviour else ():
        progress(f"{name}: protocol and steps")
        usual = Scenario(name="usual").in_multiples_of(limits[name].multiple_of)
        order: tuple[Dtype, ...] = ("fp64", "fp32", "bf16", "bf16-mixed", "fp16")
        dtype = next(dtype for dtype in order if dtype in dtypes and limits[name].takes(dtype))
        yield across_steps(name, strategy, usual, dtype, device)
        yield protocol(name, strategy, usual, dtype, device)
    for scenario in scenarios:
        for dtype in (d for d in dtypes if d in scenario.dtypes):
            progress(f"{scenario.name}, {dtype}")
            able = {
                name: strategy
                for name, strategy in strategies.items()
                if limits[name].takes(dtype) and not loss_refusal(strategy, scenario.options)
            }
            for multiple in sorted({limits[name].multiple_of for name in able}):
                alike = {name: strategy for name, strategy in able.items() if limits[name].multiple_of == multiple}
                yield from verify_problem(build(scenario.in_multiples_of(multiple), dtype, device), dtype, alike)


def _allowances(name: str, limits: KernelLimits, dtypes: Sequence[Dtype]) -> Iterator[str]:
    """What the verifier leaves out of a strategy's checks or lets it do, a line each."""
    if missing := [dtype for dtype in dtypes if not limits.takes(dtype)]:
        yield f"{name}: not in {', '.join(missing)}: its kernel {limits.computes}"
    if len(missing) == len(dtypes):
        return
    if limits.multiple_of > 1:
        yield f"{name}: sizes are raised to multiples of {limits.multiple_of}"
    if limits.error_factor > 1:
        yield f"{name}: in low precision its gradients may be {limits.error_factor:g} times as far off as others'"
    if limits.waits:
        yield f"{name} waits for the device: {limits.waits}"


@contextmanager
def _one_thread() -> Iterator[None]:
    """A block on one thread: on two cores, tiny bf16 products took seven times as long on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Truth:
    """What every strategy of one problem is held against; naive's own errors are computed once, by part."""

    exact: Outcome
    naive: Outcome
    naive_errors: dict[str, float] = field(default_factory=dict)


def verify_problem(problem: Problem, dtype: Dtype, strategies: dict[str, Strategy]) -> Iterator[Check]:
    """One scenario in one dtype: the oracle and naive once, then every strategy."""
    scenario = problem.scenario
    truth = Truth(oracle(problem), run(problem, step_with(load_strategy("naive"), scenario)))
    for name, strategy in strategies.items():
        try:
            outcome = watched(problem, with_options(strategy, scenario.chunk))
        except Exception as e:
            yield Check(strategy=name, scenario=scenario.name, dtype=dtype, broken=raised(e))
            continue
        yield held_against(truth, problem, dtype, name, strategy, outcome)


def held_against(
    truth: Truth, problem: Problem, dtype: Dtype, name: str, strategy: Strategy, outcome: Outcome
) -> Check:
    """The check that judges one outcome.

    Args:
        truth: the oracle's and naive's outcome.
        problem: what was run, for its scenario and the parts of its model.
        dtype: of the model.
        name: the strategy's.
        strategy: for the limits of its kernel.
        outcome: the strategy's.
    """
    scenario = problem.scenario
    return Check(
        strategy=name,
        scenario=scenario.name,
        dtype=dtype,
        parts=tuple(_parts(problem, dtype, outcome, truth, kernel_limits(strategy))),
        identical=_identical(outcome, truth.naive),
        exact=scenario.exact and scenario.expected != "not finite",
    )


def _parts(problem: Problem, dtype: Dtype, outcome: Outcome, truth: Truth, limits: KernelLimits) -> Iterator[Part]:
    scenario, model = problem.scenario, problem.model
    names = {parameter: name for name, parameter in model.named_parameters()}
    tokens = problem.batches[0].tokens.numel()
    groups = {f"gradient of {group}": [names[p] for p in own] for group, own in parts(model).items()}
    for title, own in (*groups.items(), ("losses", [])):
        part = judge(
            title,
            _tensors(outcome, own),
            _tensors(truth.exact, own),
            dtype,
            names=own,
            naive=_tensors(truth.naive, own),
            naive_error=truth.naive_errors.get(title),
            factor=limits.error_factor if own else 1.0,
            rounding=0.0 if own else limits.loss_rounding(dtype, tokens, scenario.chunk),
            expected=scenario.expected,
        )
        if part.naive_error is not None:
            truth.naive_errors[title] = part.naive_error
        yield part


def _tensors(outcome: Outcome, names: Sequence[str]) -> list[Tensor | None]:
    """The gradients of these parameters, or the losses where none are named, on the host."""
    tensors = [outcome.gradients[name] for name in names] or [outcome.losses]
    return [None if tensor is None else tensor.cpu() for tensor in tensors]


def _identical(outcome: Outcome, naive: Outcome) -> bool:
    own, reference = ([*o.gradients.values(), o.losses] for o in (outcome, naive))
    return identical(own, reference)
