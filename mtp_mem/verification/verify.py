"""Is it the same gradient? Every strategy through every scenario, against an fp64 oracle and against naive.

The rule, for the Frobenius-relative error of each part of the model (embedding, trunk, each head, norm, unembedding)
and of the losses: fp64 1e-12; fp32 1e-5 and twice naive's own error + 1e-7; bf16 and bf16-mixed twice naive's own error
+ 1e-4. Low precision is never held against another low-precision run: both are wrong, and the question is by how much.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mtp_mem._util import Progress
from mtp_mem.config.schema import ALL_DTYPES, Dtype
from mtp_mem.data import Batch
from mtp_mem.errors import BadInput
from mtp_mem.model.mtp_model import MTPModel
from mtp_mem.step import forward_backward
from mtp_mem.strategy import KernelLimits, Strategy, kernel_limits, load_strategy, loadable
from mtp_mem.verification.checks import Check, Part, Verification
from mtp_mem.verification.contract import BrokenContract, Watched, unchanged
from mtp_mem.verification.gradient_error import relative_error
from mtp_mem.verification.scenarios import (
    SCENARIOS,
    Outcome,
    Problem,
    Scenario,
    build,
    oracle,
    run,
    with_chunk,
)

LAST_PLACE: dict[Dtype, float] = {"fp64": 2**-52, "fp32": 2**-23, "bf16": 2**-7, "bf16-mixed": 2**-7}
"""What `rounds_loss` allows a loss's value: one unit in the last place of what the kernel returns it in."""


def verify(
    strategies: Iterable[str | Strategy] | None = None,
    *,
    dtypes: Sequence[Dtype] = ALL_DTYPES,
    scenarios: Sequence[Scenario] = SCENARIOS,
    device: torch.device | str = "cpu",
    progress: Progress = lambda _: None,
    each: Callable[[Check], None] = lambda _: None,
) -> Verification:
    """Run every strategy through every scenario in every dtype.

    Args:
        strategies: spec strings or objects, by default all that can be loaded here; a `chunk` option is set to what
            each scenario asks for.
        dtypes: of the model; a scenario may be made for fewer.
        scenarios: see mtp_mem/verification/scenarios.py.
        device: where the strategies run; the oracle runs on the CPU.
        progress: told each scenario and dtype as it begins.
        each: given each check as it ends.

    Raises:
        BadInput: a strategy's limits leave nothing of `dtypes`, and it was asked for.
    """
    named: dict[str, Strategy] = {}
    for s in loadable() if strategies is None else strategies:
        name = s if isinstance(s, str) else type(s).__name__
        if name in named and not isinstance(s, str):
            name = f"{name} {sum(isinstance(other, type(s)) for other in named.values()) + 1}"
        named[name] = load_strategy(s) if isinstance(s, str) else s
    limits = {name: kernel_limits(strategy) for name, strategy in named.items()}
    unable = [name for name in named if not any(map(limits[name].takes, dtypes))]
    if unable and strategies is not None:
        raise BadInput(f"strategy {unable[0]!r} {limits[unable[0]].computes}: in none of {', '.join(dtypes)}")
    able = {name: strategy for name, strategy in named.items() if name not in unable}
    checks = []
    with _one_thread():
        for check in _checks(able, dtypes, scenarios, torch.device(device), progress):
            checks.append(check)
            each(check)
    remarks = (line for name in named for line in _allowances(name, limits[name], dtypes))
    return Verification(tuple(checks), tuple(remarks))


def _checks(
    strategies: dict[str, Strategy],
    dtypes: Sequence[Dtype],
    scenarios: Sequence[Scenario],
    device: torch.device,
    progress: Progress,
) -> Iterator[Check]:
    """Contracts that are broken, then every scenario in every dtype."""
    for name, strategy in strategies.items():
        if (check := _contract(name, strategy, device)).broken:
            yield check
    limits = {name: kernel_limits(strategy) for name, strategy in strategies.items()}
    for scenario in scenarios:
        for dtype in (d for d in dtypes if d in scenario.dtypes):
            progress(f"{scenario.name}, {dtype}")
            here = {name: strategy for name, strategy in strategies.items() if limits[name].takes(dtype)}
            for multiple in sorted({limits[name].multiple_of for name in here}):
                alike = {name: strategy for name, strategy in here.items() if limits[name].multiple_of == multiple}
                yield from verify_problem(build(scenario.in_multiples_of(multiple), dtype, device), dtype, alike)


def _allowances(name: str, limits: KernelLimits, dtypes: Sequence[Dtype]) -> Iterator[str]:
    """What the verifier leaves out of a strategy's checks or lets it do, a line each."""
    if missing := [dtype for dtype in dtypes if not limits.takes(dtype)]:
        yield f"{name}: not in {', '.join(missing)}: its kernel {limits.computes}"
    if len(missing) == len(dtypes):
        return
    if limits.multiple_of > 1:
        yield f"{name}: sizes are raised to multiples of {limits.multiple_of}"
    if limits.waits:
        yield f"{name} waits for the device: {limits.waits}"


@contextmanager
def _one_thread() -> Iterator[None]:
    """Scenarios are tiny: on two cores, two threads took seven times as long as one (bf16 products)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def verify_problem(problem: Problem, dtype: Dtype, strategies: dict[str, Strategy]) -> Iterator[Check]:
    """One scenario in one dtype: the oracle and naive once, then every strategy."""
    scenario = problem.scenario
    exact, naive = oracle(problem), run(problem, _stepper(problem, load_strategy("naive")))
    for name, strategy in strategies.items():
        try:
            found = _watched(problem, strategy)
        except Exception as e:
            yield Check(name, scenario.name, dtype, False, scenario.exact, broken=_told(e))
            continue
        rounding = LAST_PLACE[dtype] if kernel_limits(strategy).rounds_loss else 0.0
        parts = tuple(_parts(problem.model, dtype, found, naive, exact, rounding))
        yield Check(name, scenario.name, dtype, _identical(found, naive), scenario.exact, parts)


def allowed(dtype: Dtype, naive_error: float) -> float:
    """The largest error that passes, given naive's own in the same dtype."""
    if dtype == "fp64":
        return 1e-12
    if dtype == "fp32":
        return min(1e-5, 2 * naive_error + 1e-7)
    return 2 * naive_error + 1e-4


def _stepper(problem: Problem, strategy: Strategy) -> Callable[[MTPModel, Batch], Tensor]:
    weights, scale = problem.scenario.weights, problem.scenario.scale
    return lambda model, batch: forward_backward(model, batch, strategy, weights, scale)


def _parts(
    model: MTPModel, dtype: Dtype, found: Outcome, naive: Outcome, exact: Outcome, rounding: float
) -> Iterator[Part]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group, parameters in model.groups().items():
        own = [names[p] for p in parameters]
        right = [exact.gradients[name] for name in own]
        mine, theirs = ([_host(o.gradients[name]) for name in own] for o in (found, naive))
        naive_error = relative_error(theirs, right)
        bound = allowed(dtype, naive_error)
        problem = _wrong_kind(own, mine, theirs)
        error = math.inf if problem else relative_error(mine, right)
        yield Part(f"gradient of {group}", error, naive_error, bound, problem or _diagnosis(mine, right, error, bound))
    right, mine, theirs = ([_host(o.losses)] for o in (exact, found, naive))
    naive_error = relative_error(theirs, right)
    error, bound = relative_error(mine, right), allowed(dtype, naive_error) + rounding
    finite = bool(torch.isfinite(found.losses).all())
    yield Part("losses", error, naive_error, bound, "" if finite else "not finite")


def _wrong_kind(names: Sequence[str], mine: Sequence[Tensor | None], naive: Sequence[Tensor | None]) -> str:
    """What no error can say: a gradient that is missing, not asked for, of another shape, or not finite."""
    for name, a, b in zip(names, mine, naive, strict=True):
        if a is None and b is not None:
            return f"{name} has no gradient"
        if a is not None and b is None:
            return f"{name} is frozen and has a gradient"
        if a is not None and b is not None:
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"{name}: gradient is {tuple(a.shape)} {a.dtype}, expected {tuple(b.shape)} {b.dtype}"
            if not torch.isfinite(a).all():
                return f"{name}: gradient is not finite"
            if not a.any() and b.any():
                return f"{name}: gradient is zero"
    return ""


def _diagnosis(mine: Sequence[Tensor | None], right: Sequence[Tensor | None], error: float, bound: float) -> str:
    """A wrong gradient that is a multiple of the right one says by which factor."""
    if error <= bound:
        return ""
    a = torch.cat([t.flatten().double() for t in mine if t is not None] or [torch.zeros(1)])
    b = torch.cat([t.flatten().double() for t in right if t is not None] or [torch.zeros(1)])
    norm = b.square().sum()
    if norm == 0 or a.shape != b.shape:
        return ""
    factor = (a @ b / norm).item()
    off = ((a - factor * b).square().sum() / norm).sqrt().item()
    if abs(factor - 1) > 0.01 and off < 0.01 * abs(factor):
        return f"{factor:.3g} times the right one"
    return ""


def _identical(found: Outcome, naive: Outcome) -> bool:
    pairs = [(found.gradients[name], naive.gradients[name]) for name in naive.gradients]
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _host(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()


def _contract(name: str, strategy: Strategy, device: torch.device) -> Check:
    """Does it wait for the device, and does it keep anything from one step to the next?"""
    limits = kernel_limits(strategy)
    dtype: Dtype = "fp32" if limits.takes("fp32") else "bf16"
    scenario = Scenario(name="protocol").in_multiples_of(limits.multiple_of)
    problem = build(scenario, dtype, device)
    other = build(dataclasses.replace(scenario, batches=(1,)), dtype, device)
    broken = ""
    try:
        _watched(problem, strategy, may_sync=bool(limits.waits))
        first = _watched(problem, strategy)
        _watched(other, strategy)
        if not _identical(_watched(problem, strategy), first):
            broken = "keeps state: the same step again gives another gradient"
    except Exception as e:
        broken = _told(e)
    return Check(name, scenario.name, dtype, False, True, broken=broken)


def _watched(problem: Problem, strategy: Strategy, *, may_sync: bool = True) -> Outcome:
    """The problem's outcome with this strategy, held to the protocol."""
    watched = Watched(with_chunk(strategy, problem.scenario.chunk), may_sync)
    with unchanged(dict(problem.model.named_parameters())):
        return run(problem, _stepper(problem, watched))


def _told(e: Exception) -> str:
    """The broken contract, or what was raised, in one line."""
    return str(e) if isinstance(e, BrokenContract) else f"raised {type(e).__name__}: {e}".split("\n")[0]
