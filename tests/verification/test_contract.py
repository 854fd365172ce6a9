"""Negative controls: whatever breaks the protocol is named with the strategy that did it, and spoils no other check."""

import gc
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import BaseTorchFunctionMode

from mtp_mem import load_strategy
from mtp_mem.verification.behaviour import across_steps, protocol
from mtp_mem.verification.global_state import restored
from mtp_mem.verification.scenarios import SCENARIOS, Scenario
from mtp_mem.verification.verify import verify

USUAL = [scenario for scenario in SCENARIOS if scenario.name == "n = 3"]

HOST: dict[str, Callable[[torch.Tensor], object]] = {
    "bool": lambda losses: bool(losses[0] > 0),
    "tolist": lambda losses: losses.tolist(),
    "numpy": lambda losses: losses.numpy(),
    "cpu": lambda losses: losses.cpu(),
    "to cpu": lambda losses: losses.to(device="cpu"),
    "nonzero": lambda losses: losses.nonzero(),
    "where": lambda losses: torch.where(losses > 0),
    "unique": lambda losses: losses.unique(),
    "repeat": lambda losses: losses.repeat_interleave((losses > 0).long()),
}
"""What makes the host wait for a device."""


def end_by(error: BaseException) -> None:
    raise error


ENDS: dict[str, Callable[[], object]] = {
    "interrupts": lambda: end_by(KeyboardInterrupt()),
    "exits": lambda: sys.exit(0),
    "exits at once": lambda: os._exit(0),
    "closes": lambda: end_by(GeneratorExit()),
}
"""What would end the process."""

GLOBAL: dict[str, Callable[[Any], object]] = {
    "the default device": lambda torch: torch.set_default_device("meta"),
    "the precision of fp32 products": lambda torch: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "the rounding of denormals to zero": lambda torch: torch.set_flush_denormal(True),
    "flash attention": lambda torch: torch.backends.cuda.enable_flash_sdp(False),
    "the garbage collector": lambda _: gc.disable(),
    "the working directory": lambda _: os.chdir("/"),
    "autocast on cpu": lambda torch: torch.autocast("cpu").__enter__(),
    "how deep autocast is nested": lambda torch: torch.autocast_increment_nesting(),
    "functions that all strategies call": lambda torch: setattr(torch.nn.functional, "linear", torch.matmul),
    "modes that see every function": lambda _: BaseTorchFunctionMode().__enter__(),
    "hooks on what autograd saves": lambda _: saved_tensors_hooks(lambda x: x, lambda x: x).__enter__(),
}
"""What belongs to the process, and how to change it."""


@dataclass
class Changed:
    """naive with one thing wrong about the call itself."""

    how: str
    calls: int = field(default=0, init=False)

    def backward(self, cut, heads, targets, weights):  # type: ignore[no-untyped-def]
        losses = load_strategy("naive").backward(cut, heads, targets, weights)
        self.calls += 1
        if self.how == "shape":
            return losses[:-1]
        if self.how == "no tensor":
            return 0.5
        if self.how == "graph":
            return losses.requires_grad_()
        if self.how == "dtype":
            return losses.to(torch.float16)
        if self.how == "cut":
            cut.grad = None
        if self.how == "nothing":
            return None
        if self.how == "a list":
            return list(losses.unbind())
        if self.how == "column":
            return losses[:, None]
        if self.how == "losses doubled":
            return 2 * losses
        if self.how == "losses nan":
            return losses * torch.nan
        if self.how == "targets":
            targets.clamp_(min=0)
        if self.how == "weights":
            weights.mul_(2)
        if self.how == "parameter":
            with torch.no_grad():
                heads.roots[0].unembedding.mul_(2)
        if self.how == "data":
            heads.roots[0].unembedding.data.mul_(2)
        if self.how == "frozen":
            heads.roots[0].unembedding.requires_grad_(False)
        if self.how in HOST:
            HOST[self.how](losses)
        if self.how == "item":
            losses[0].item()
        if self.how == "mask":
            targets[targets > 0]
        if self.how == "state" and self.calls % 3 == 0 and cut.grad is not None:
            cut.grad *= 1.5
        if self.how == "raise":
            raise ValueError("a clear reason\nand more")
        if self.how == "prints":
            print("a word")
        if self.how == "a clone" and heads.roots[0].unembedding.grad is not None:
            heads.roots[0].unembedding.grad = heads.roots[0].unembedding.grad.clone()
        if self.how == "freed":
            cut.untyped_storage().resize_(0)
        if self.how == "other dtype":
            heads.roots[0].unembedding.data = heads.roots[0].unembedding.data.double()
            heads.roots[0].unembedding.grad = None
        if self.how == "grad dtype":
            unembedding = heads.roots[0].unembedding
            unembedding.grad.data = unembedding.grad.data.double()
        if self.how == "eval":
            heads.norm.eval()
        if self.how == "module hook":
            heads.norm.register_forward_hook(lambda *_: None)
        if self.how == "unhooks" and heads.roots[0].unembedding._backward_hooks:
            heads.roots[0].unembedding._backward_hooks.clear()
        if self.how in GLOBAL:
            GLOBAL[self.how](torch)
        if self.how == "signalled":
            signal.raise_signal(signal.SIGINT)
        if self.how in ENDS:
            ENDS[self.how]()
        if self.how == "frozen cut" and cut.grad is None:
            cut.grad = torch.zeros_like(cut)
        return losses


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("shape", "returns (2,), not the n losses (3,)"),
        ("no tensor", "returns float, not the n losses (3,)"),
        ("nothing", "returns NoneType, not the n losses (3,)"),
        ("a list", "returns list, not the n losses (3,)"),
        ("column", "returns (3, 1), not the n losses (3,)"),
        ("graph", "returns losses that are not detached"),
        ("dtype", "returns losses in torch.float16, not in torch.float32"),
        ("cut", "leaves cut.grad empty"),
        ("item", "synchronises with the device (aten._local_scalar_dense.default)"),
        ("mask", "synchronises with the device (aten.index.Tensor)"),
        ("bool", "synchronises with the device (aten._local_scalar_dense.default)"),
        ("tolist", "synchronises with the device (Tensor.tolist)"),
        ("numpy", "synchronises with the device (Tensor.numpy)"),
        ("cpu", "synchronises with the device (Tensor.cpu)"),
        ("to cpu", "synchronises with the device (Tensor.to)"),
        ("nonzero", "synchronises with the device (aten.nonzero.default)"),
        ("where", "synchronises with the device (aten.nonzero.default)"),
        ("unique", "synchronises with the device (aten._unique2.default)"),
        ("repeat", "synchronises with the device (aten.repeat_interleave.Tensor)"),
        ("targets", "changes the targets it was given"),
        ("weights", "changes the weights it was given"),
        ("parameter", "changes unembedding.weight"),
        ("data", "changes unembedding.weight"),
        ("frozen", "leaves unembedding.weight frozen, which it was not"),
        ("state", "keeps state: the same step again gives another gradient"),
        ("freed", "changes the cut's values"),
        ("other dtype", "changes unembedding.weight"),
        ("grad dtype", "leaves unembedding.weight.grad in torch.float64, not in torch.float32"),
        ("eval", "leaves training mode of norm changed"),
        ("module hook", "leaves hooks of norm changed"),
        ("unhooks", "leaves hooks on unembedding.weight changed"),
        ("interrupts", "quits the process: KeyboardInterrupt (test_contract.py:"),
        ("exits", "quits the process: SystemExit(0) (test_contract.py:"),
        ("exits at once", "quits the process: SystemExit(0) (test_contract.py:"),
        ("closes", "quits the process: GeneratorExit (test_contract.py:"),
        *((name, f"leaves {name} changed") for name in GLOBAL),
    ],
)
def test_a_broken_contract_is_named(how: str, words: str) -> None:
    check = protocol("Changed", Changed(how), Scenario(name="usual"), "fp32", torch.device("cpu"))
    assert check.status == "wrong"
    assert check.explain().startswith(f"Changed: protocol, fp32: {words}")


def test_what_a_person_interrupts_is_no_failure() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a test run in the background ignores
    try:
        with pytest.raises(KeyboardInterrupt):
            verify([Changed("signalled")], dtypes=["fp32"], scenarios=[])
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_existing_grad_stays_the_same_tensor() -> None:
    existing = [scenario for scenario in SCENARIOS if scenario.name == "existing .grad"]
    (failure,) = verify([Changed("a clone")], dtypes=["fp32"], scenarios=existing).failures
    assert failure.broken == "leaves another tensor in unembedding.weight.grad, instead of adding to what is there"


@pytest.mark.parametrize(
    ("how", "words"),
    [("losses doubled", "losses: 2 times the right one"), ("losses nan", "losses: losses is not finite")],
)
def test_wrong_losses_are_named(how: str, words: str) -> None:
    failures = verify([Changed(how)], dtypes=["fp64"], scenarios=USUAL).failures
    assert f"Changed: n = 3, fp64: {words}" in [check.explain() for check in failures]


@pytest.mark.parametrize("how", ["targets", "weights", "parameter", "data", "frozen", "raise"])
def test_one_strategy_cannot_spoil_the_next(how: str) -> None:
    result = verify([Changed(how), "sequential"], dtypes=["fp64"], scenarios=USUAL)
    assert [check.explain() for check in result.of("sequential") if check.status != "right"] == []
    assert len(result.of("sequential")) == 3


@pytest.mark.parametrize("how", ["eval", "freed", "other dtype", *GLOBAL])
def test_what_a_strategy_changed_is_put_back_before_the_next_one(how: str) -> None:
    result = verify([Changed(how), "sequential"], dtypes=["bf16-mixed"], scenarios=USUAL, behaviour=False)
    assert [check.status for check in result.checks] == ["wrong", "right"]


def test_a_setting_that_is_put_back_is_none_of_its_own_business() -> None:
    class PutsBack:
        def backward(self, *args):  # type: ignore[no-untyped-def]
            precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("medium")
            try:
                return load_strategy("sequential").backward(*args)
            finally:
                torch.set_float32_matmul_precision(precision)

    check = protocol("PutsBack", PutsBack(), Scenario(name="usual"), "fp32", torch.device("cpu"))
    assert check.status == "right", check.explain()


def test_a_setting_that_an_error_left_changed_is_put_back_before_the_next_one() -> None:
    class Unsafe:
        def backward(self, *args):  # type: ignore[no-untyped-def]
            torch.set_default_dtype(torch.float64)
            losses = load_strategy("sequential").backward(*args)
            torch.set_default_dtype(torch.float32)
            return losses

    try:
        assert verify([Unsafe()], dtypes=["fp32"], scenarios=[]).passed
        assert torch.get_default_dtype() == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_losses_of_an_earlier_step_are_no_losses() -> None:
    class Stale:
        losses: torch.Tensor | None = None

        def backward(self, *args):  # type: ignore[no-untyped-def]
            losses = load_strategy("sequential").backward(*args)
            self.losses = losses if self.losses is None else self.losses
            return self.losses.clone()

    check = across_steps("Stale", Stale(), Scenario(name="usual"), "fp32", torch.device("cpu"))
    assert "losses of step 2" in [part.name for part in check.parts if part.status == "wrong"]


def test_determinism_is_put_back_where_it_was_on() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with restored() as changed:
            torch.use_deterministic_algorithms(False)
        assert changed == ["deterministic algorithms"]
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_strategy_of_many_parts_is_not_blamed() -> None:
    class Parts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(100))
            self.calls, self.text, self.scale = {}, b"x" * 5000, lambda x: x * self.table[0]

        def backward(self, cut, heads, targets, weights):  # type: ignore[no-untyped-def]
            self.calls[len(self.calls)] = tuple(cut.shape)
            return load_strategy("sequential").backward(cut, heads, targets, self.scale(weights))

    assert verify([Parts()], dtypes=["fp32"], scenarios=[]).passed


def test_a_gradient_for_a_cut_that_needs_none() -> None:
    frozen = [scenario for scenario in SCENARIOS if scenario.name == "frozen trunk"]
    verification = verify([Changed("frozen cut")], dtypes=["fp32"], scenarios=frozen)
    assert "fills cut.grad of a cut that requires none" in [check.broken for check in verification.failures]
