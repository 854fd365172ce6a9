"""What one gradient cannot show: the protocol's other clauses, and what a strategy does from one step to the next."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtp_mem.config.schema import Dtype
from mtp_mem.errors import BrokenContract, one_line
from mtp_mem.memory.cpu import held_arrays, held_tensors
from mtp_mem.memory.tracker import Tracker
from mtp_mem.memory.unseen import eager
from mtp_mem.model.head_tree import Heads
from mtp_mem.model.model_state import model_kept
from mtp_mem.model.own import Model, moved
from mtp_mem.step import forward_backward
from mtp_mem.strategy import Strategy, kernel_limits, load_strategy
from mtp_mem.verification.checks import Check
from mtp_mem.verification.contract import Watched, counted_hooks, unchanged
from mtp_mem.verification.global_state import restored
from mtp_mem.verification.gradient_error import Part, identical, judge
from mtp_mem.verification.problem import Outcome, Problem, build, plain_step, run, step_with, with_options
from mtp_mem.verification.scenarios import Scenario

STEPS = 6
LEARNING_RATE = 0.3
SMALL = 4096
"""Bytes outside of tensors that a strategy may keep between steps: counters, times."""


def protocol(name: str, strategy: Strategy, scenario: Scenario, dtype: Dtype, device: torch.device) -> Check:
    """Check the protocol clause by clause, each in steps of its own; the first one that is broken ends the check.

    Args:
        name: the strategy's.
        strategy: the one to check.
        scenario: with one batch, in sizes that the strategy takes.
        dtype: one that the strategy takes.
        device: where it runs.
    """
    strategy = with_options(strategy, scenario.chunk)
    problem = build(replace(scenario, name="protocol"), dtype, device)
    other = build(replace(scenario, batches=(1,)), dtype, device)
    parameters = dict(problem.model.named_parameters())

    def hooks_run() -> None:
        problem.model.zero_grad(set_to_none=True)
        with restored(), counted_hooks(parameters), model_kept(problem.model) as changed:
            forward_backward(problem.model, problem.batches[0], strategy)
        if changed:
            raise BrokenContract(f"leaves {changed[0]} changed")

    def errors_get_out() -> None:
        failing = _Failing(strategy)
        try:
            with restored():
                forward_backward(problem.model, problem.batches[0], failing)
        except BrokenContract:
            raise
        except Exception:
            return
        if failing.failed:
            raise BrokenContract("swallows exceptions: a step that ran out of memory would look right")

    def keeps_no_state() -> None:
        first = watched(problem, strategy)
        watched(other, strategy)
        again = watched(problem, strategy)
        if not all(identical([again.gradients[key]], [first.gradients[key]]) for key in first.gradients):
            raise BrokenContract("keeps state: the same step again gives another gradient")

    clauses: dict[str, Callable[[], object]] = {
        "changes nothing but .grad": lambda: watched(problem, strategy, on_device=True),
        "parameters' hooks run": hooks_run,
        "keeps no state": keeps_no_state,
        "errors get out": errors_get_out,
    }
    parts = []
    for clause, check in clauses.items():
        try:
            check()
        except Exception as e:
            return Check(strategy=name, scenario="protocol", dtype=dtype, broken=raised(e))
        parts.append(Part(name=clause, status="right"))
    return Check(strategy=name, scenario="protocol", dtype=dtype, parts=tuple(parts))


def across_steps(name: str, strategy: Strategy, scenario: Scenario, dtype: Dtype, device: torch.device) -> Check:
    """Six steps of SGD, each on another batch, against the same six by plain autograd in fp64.

    Compared after every step: the losses, and the change of the weights since the first step. Besides, a step may not
    change what an earlier one returned or left in `.grad`, and after the last no memory of the strategy's may be live.

    Args:
        name: the strategy's.
        strategy: the one to check; it must not have run before.
        scenario: in sizes that the strategy takes.
        dtype: one that the strategy takes.
        device: where it runs.
    """
    scenario = replace(scenario, name=f"{STEPS} optimizer steps", batches=tuple(range(STEPS)))
    problem = build(scenario, dtype, device)
    exact, naive = moved(problem.model, "fp64", torch.device("cpu")), moved(problem.model, dtype, device)
    start = _values(exact)
    models = {"strategy": problem.model, "naive": naive, "exact": exact}
    optimizers = {key: torch.optim.SGD(model.parameters(), lr=LEARNING_RATE) for key, model in models.items()}
    tracker = Tracker(problem.model.vocab_size, problem.model.dim, [])
    tracker.resident("parameters", problem.model.named_parameters())
    tracker.resident("other", ((f"tokens {number}", batch.tokens) for number, batch in enumerate(problem.batches)))
    inner = with_options(strategy, scenario.chunk)
    tracker.resident("other", (("made with the strategy", tensor) for tensor in held_tensors(inner)))
    arrays = held_arrays(inner)
    rounding = kernel_limits(strategy).loss_rounding(dtype, problem.batches[0].tokens.numel(), scenario.chunk)
    parts: list[Part] = []
    returned: list[tuple[Tensor, Tensor]] = []  # what a step returned or left in `.grad`, and a copy
    try:
        for number, batch in enumerate(problem.batches, start=1):
            host = replace(batch, tokens=batch.tokens.cpu(), targets=batch.targets.cpu())
            guarded = Watched(inner, dict(problem.model.named_parameters()))
            for optimizer in optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            with tracker, eager():  # targets copied, so that keeping them keeps memory
                losses = forward_backward(problem.model, replace(batch, targets=batch.targets.clone()), guarded)
            right, theirs = plain_step(exact, host, None, 1.0), forward_backward(naive, batch, load_strategy("naive"))
            parts.append(judge(f"losses of step {number}", [losses], [right], dtype, naive=[theirs], rounding=rounding))
            for value, copy in returned:
                if not torch.equal(value, copy):
                    raise BrokenContract(f"step {number} changes the losses or the .grad of the step before")
            left = [losses, *(p.grad for p in problem.model.parameters() if p.grad is not None)]
            returned = [(value, value.detach().clone()) for value in left]
            for optimizer in optimizers.values():
                optimizer.step()
            own, plain, oracle = ([v - s for v, s in zip(_values(m), start, strict=True)] for m in models.values())
            parts.append(judge(f"weights after step {number}", own, oracle, dtype, naive=plain))
        del losses, left, value, copy, guarded
        returned.clear()
        optimizers["strategy"].zero_grad(set_to_none=True)
        gc.collect()
        live = tracker.trace.live_after(len(tracker.trace.events) - 1)
        kept = [storage for storage in live if not storage.name]  # what was there before the first step has a name
        kept_words = ""
        if kept:
            largest = max(kept, key=lambda storage: storage.nbytes)
            kept_words = (
                f"{sum(storage.nbytes for storage in kept):,} bytes stay after it, the largest a tensor"
                f" {largest.shape} made by {largest.op}"
            )
        elif (grown := held_arrays(inner) - arrays) > SMALL:
            kept_words = f"the strategy keeps {grown:,} bytes of arrays that are no tensors"
    except Exception as e:
        return Check(strategy=name, scenario=scenario.name, dtype=dtype, broken=raised(e))
    parts.append(Part(name="earlier steps stay as they were", status="right"))
    parts.append(Part(name="a step keeps no memory", status="wrong" if kept_words else "right", problem=kept_words))
    return Check(strategy=name, scenario=scenario.name, dtype=dtype, parts=tuple(parts))


def watched(problem: Problem, strategy: Strategy, *, on_device: bool = False) -> Outcome:
    """The problem's outcome with this strategy, held to the protocol.

    Args:
        problem: what is run.
        strategy: with its options set.
        on_device: also check for what would go wrong on a device only, see `contract.on_a_device`.

    Raises:
        BrokenContract: names the clause that is broken.
    """
    scenario, parameters = problem.scenario, dict(problem.model.named_parameters())
    may_sync = not on_device or bool(kernel_limits(strategy).waits)
    guarded = Watched(strategy, parameters, may_sync)
    with model_kept(problem.model) as changed, unchanged(parameters):
        outcome = run(problem, step_with(guarded, scenario))
    if changed:
        raise BrokenContract(f"leaves {changed[0]} changed")
    return outcome


@dataclass
class _Failing:
    """Runs the strategy inside on heads whose final norm always raises that memory has run out."""

    inner: Strategy
    failed: bool = False

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """As the strategy inside."""
        return self.inner.backward(cut, replace(heads, norm=self.norm), targets, weights)

    def norm(self, _hidden: Tensor) -> Tensor:
        self.failed = True
        raise torch.OutOfMemoryError("no room")


def raised(error: BaseException) -> str:
    """One line that names the broken clause, or the error that was raised."""
    return one_line(error) if isinstance(error, BrokenContract) else f"raised {one_line(error)}"


def _values(model: Model) -> list[Tensor]:
    return [parameter.detach().to("cpu", torch.float64, copy=True) for parameter in model.parameters()]
