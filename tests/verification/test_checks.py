"""What a check says: of its worst part, of low precision, of what is allowed for and what is left out."""

from dataclasses import replace

import torch

from mtp_mem import Verification, load_strategy, verify
from mtp_mem.config.schema import Dtype
from mtp_mem.strategy import KernelLimits
from mtp_mem.verification.behaviour import across_steps
from mtp_mem.verification.checks import Check
from mtp_mem.verification.gradient_error import Part, allowed
from mtp_mem.verification.scenarios import SCENARIOS, Scenario


def test_what_overflowed_is_not_right() -> None:
    right = Part(name="losses", status="right")
    unknown = Part(name="gradient of norm", status="unchecked", problem="too large", overflows=True)
    check = Check(strategy="naive", scenario="usual", dtype="fp16", parts=(right, unknown))
    assert check.status == "unchecked"
    assert check.explain() == "naive: usual, fp16: gradient of norm: too large"
    assert replace(check, parts=(right,)).status == "right"


def test_the_worst_part_is_the_one_that_is_said() -> None:
    parts = (
        Part(name="head 1", status="right", error=0.5, allowed=1.0),
        Part(name="head 2", status="wrong", error=2.0, allowed=0.1),
        Part(name="head 3", status="wrong", error=9.0, allowed=3.0),
        Part(name="norm", status="right", error=7.0, allowed=1.0),
    )
    check = Check(strategy="mine", scenario="usual", dtype="fp32", parts=parts)
    assert check.worst is parts[1]  # by how many times what is allowed
    assert check.explain() == "mine: usual, fp32: head 2: error 2.0e+00, allowed 1.0e-01"
    broken = Check(strategy="mine", scenario="usual", dtype="fp32", broken="raised")
    assert not broken.identical
    assert not broken.exact
    assert replace(check, parts=()).worst is None
    assert replace(check, parts=()).explain() == "mine: usual, fp32: nothing to check"


class Scaled:
    """naive, with its losses and the unembedding's gradient multiplied"""

    def __init__(self, losses: float = 1.0, gradient: float = 1.0, limits: KernelLimits | None = None) -> None:
        self.losses, self.gradient, self.limits = losses, gradient, limits or KernelLimits()

    def backward(self, cut, heads, targets, weights):  # type: ignore[no-untyped-def]
        losses = load_strategy("naive").backward(cut, heads, targets, weights)
        heads.roots[0].unembedding.grad *= self.gradient
        return losses * self.losses


def verified(strategy: Scaled, name: str = "n = 3") -> Verification:
    chosen = [scenario for scenario in SCENARIOS if scenario.name == name]
    return verify([strategy], dtypes=["bf16"], scenarios=chosen, behaviour=False)


def explained(strategy: Scaled) -> str:
    (check,) = verified(strategy).checks
    return check.explain().removeprefix("Scaled: n = 3, bf16: ")


def test_low_precision_is_held_to_naive_s_own_error() -> None:
    assert explained(Scaled()) == "right"
    assert explained(Scaled(gradient=1.02)).startswith("gradient of unembedding: 1.02 times the right one")


def test_a_kernel_that_rounds_its_loss_may_round_nothing_else() -> None:
    rounds = KernelLimits(rounds_loss=True)
    assert explained(Scaled(losses=1.01)) == "losses: 1.01 times the right one"
    assert explained(Scaled(losses=1.01, limits=rounds)) == "right"
    assert explained(Scaled(gradient=1.02, limits=rounds)).startswith("gradient of unembedding: 1.02 times")


def test_a_kernel_that_is_allowed_more_error_is_so_in_gradients() -> None:
    assert explained(Scaled(gradient=1.02, limits=KernelLimits(error_factor=6))) == "right"
    assert explained(Scaled(losses=1.01, limits=KernelLimits(error_factor=6))) == "losses: 1.01 times the right one"


def test_a_tensor_is_called_by_its_name() -> None:
    class Forgets(Scaled):
        def backward(self, cut, heads, targets, weights):  # type: ignore[no-untyped-def]
            losses = load_strategy("naive").backward(cut, heads, targets, weights)
            heads.roots[0].unembedding.grad = None
            return losses

    (check,) = verified(Forgets()).checks
    assert check.explain().endswith("gradient of unembedding: unembedding.weight has no gradient")


def test_steps_are_held_to_naive_s_own_error_too() -> None:
    def wrong(strategy: Scaled, dtype: Dtype) -> list[str]:
        check = across_steps("Scaled", strategy, Scenario(name="usual"), dtype, torch.device("cpu"))
        return [part.name for part in check.parts if part.status == "wrong"]

    rounds = KernelLimits(rounds_loss=True)
    assert wrong(Scaled(losses=1.01, limits=rounds), "bf16") == []
    assert wrong(Scaled(losses=1.02), "bf16") == [f"losses of step {step}" for step in range(1, 7)]
    # Beside the weights it is within what is allowed; beside how far they have come it is not.
    assert "weights after step 1" in wrong(Scaled(gradient=1 + 6e-5), "fp32")


def test_what_is_allowed_for_or_left_out_is_remarked() -> None:
    assert verified(Scaled()).remarks == ()
    assert verified(Scaled(limits=KernelLimits(error_factor=2))).remarks == (
        "Scaled: in low precision its gradients may be 2 times as far off as others'",
    )
    assert verified(Scaled(), "z-loss").remarks == ("Scaled: checked without z_loss, which its loss does not take",)
    assert verified(Scaled(), "z-loss").checks == ()


def test_a_check_knows_whether_bits_could_be_equal() -> None:
    (check,) = verified(Scaled()).checks
    assert (check.identical, check.exact) == (True, True)
    (check,) = verified(Scaled(), "existing .grad").checks
    assert not check.exact
    (check,) = verified(Scaled(losses=1.0001)).checks
    assert (check.status, check.identical) == ("right", False)


def test_the_number_of_threads_is_as_it_was() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        verified(Scaled())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_progress_is_told() -> None:
    words: list[str] = []
    chosen = [scenario for scenario in SCENARIOS if scenario.name == "n = 3"]
    verify(["naive"], dtypes=["fp32"], scenarios=chosen, progress=words.append)
    assert words == ["naive: protocol and steps", "n = 3, fp32"]


def test_losses_and_gradients_are_held_to_the_same_bound() -> None:
    (check,) = verified(Scaled()).checks
    assert "losses" in [part.name for part in check.parts]
    for part in check.parts:
        assert part.naive_error is not None
        assert part.allowed == allowed("bf16", part.naive_error), part.name
