"""Limits of a kernel: refused where they are exceeded, kept to by the verifier, and said."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from command_line import mtp_mem
from torch import Tensor

from mtp_mem.config.schema import ALL_DTYPES
from mtp_mem.errors import BadInput
from mtp_mem.model.head_tree import Head, Heads
from mtp_mem.model.losses import full
from mtp_mem.strategies.cce import CCE
from mtp_mem.strategies.library_kernel import kernel_arguments
from mtp_mem.strategies.liger import Liger
from mtp_mem.strategies.quack import Quack
from mtp_mem.strategies.sequential import Sequential
from mtp_mem.strategy import KernelLimits, kernel_limits
from mtp_mem.verification.scenarios import SCENARIOS
from mtp_mem.verification.verify import verify


class InEights(Sequential):
    """Right, but only for multiples of 8 in bf16, and it waits: what a library's kernel may be like."""

    limits: ClassVar[KernelLimits] = KernelLimits(
        dtypes=(torch.bfloat16,), multiple_of=8, waits="it looks at its targets"
    )

    def loss_backward(self, heads: Heads, head: Head, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        loss = heads.loss(head, hidden, targets, self.loss)
        heads.backward([loss], [weight])
        return loss.detach()

    def loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        rows, *_ = kernel_arguments(hidden, unembedding, targets, self.limits)
        assert rows.dtype == torch.bfloat16
        assert not any(size % 8 for size in (*rows.shape, *unembedding.shape))
        targets.max().item()
        return full(hidden, unembedding, targets)


class Hidden(InEights):
    """The same without saying that it waits."""

    limits: ClassVar[KernelLimits] = KernelLimits(dtypes=(torch.bfloat16,), multiple_of=8)


def test_a_strategy_is_verified_within_its_limits() -> None:
    some = [scenario for scenario in SCENARIOS if not scenario.options.used][::9]
    verification = verify([InEights(), "sequential"], scenarios=some)
    assert [check.explain() for check in verification.failures] == []
    own = [(check.scenario, check.dtype) for check in verification.of("InEights")]
    behaviour = [("6 optimizer steps", "bf16"), ("protocol", "bf16")]
    assert own == behaviour + [(s.name, d) for s in some for d in s.dtypes if d.startswith("bf16")]
    assert len(verification.of("sequential")) == 2 + sum(len(s.dtypes) for s in some)
    assert verification.remarks == (
        "InEights: not in fp64, fp32, fp16: its kernel computes in bfloat16",
        "InEights: sizes are raised to multiples of 8",
        "InEights waits for the device: it looks at its targets",
    )


def test_waiting_that_is_not_said_breaks_the_contract() -> None:
    verification = verify([Hidden()], dtypes=["bf16"], scenarios=SCENARIOS[:1])
    assert [check.explain() for check in verification.failures] == [
        "Hidden: protocol, bf16: synchronises with the device (aten._local_scalar_dense.default)"
    ]


def test_nothing_of_what_was_asked_for_is_bad_input() -> None:
    with pytest.raises(BadInput, match="'InEights' computes in bfloat16, which is none of fp64, fp32"):
        verify([InEights()], dtypes=["fp64", "fp32"])


def test_scenarios_in_multiples() -> None:
    for scenario in SCENARIOS:
        assert scenario.in_multiples_of(1) is scenario
        eights = scenario.in_multiples_of(8)
        assert eights.vocab_size % 8 == eights.batch * eights.sequence % 8 == (eights.chunk or 8) % 8 == 0
        assert eights.vocab_size - scenario.vocab_size < 8
        assert eights.batch * (eights.sequence - scenario.sequence) < 8 * eights.batch
        assert eights.name == scenario.name


@pytest.mark.parametrize(
    ("dtype", "sizes", "words"),
    [
        (torch.float32, (8, 8, 16), "computes in bfloat16, not in float32"),
        (torch.bfloat16, (8, 16, 20), "needs multiples of 8, not V = 20"),
        (torch.bfloat16, (9, 12, 16), "needs multiples of 8, not N = 9, D = 12"),
        (torch.bfloat16, (8, 16, 24), ""),
    ],
)
def test_refusals(dtype: torch.dtype, sizes: tuple[int, int, int], words: str) -> None:
    N, D, V = sizes
    assert InEights.limits.refusal(dtype, N=N, D=D, V=V) == words
    rows, weight = torch.zeros(1, N, D, dtype=dtype), torch.zeros(V, D, dtype=dtype)
    targets = torch.zeros(1, N, dtype=torch.long)
    if words:
        with pytest.raises(BadInput, match=f"the kernel {words}"):
            kernel_arguments(rows, weight, targets, InEights.limits)
    else:
        assert kernel_arguments(rows, weight, targets, InEights.limits)[0].shape == (N, D)


def test_what_the_libraries_take() -> None:
    assert kernel_limits(Sequential()) == KernelLimits()
    takes = {cls.__name__: [d for d in ALL_DTYPES if cls.limits.takes(d)] for cls in (Liger, CCE, Quack)}
    assert takes == {
        "Liger": ["fp32", "bf16", "bf16-mixed", "fp16"],
        "CCE": ["bf16", "bf16-mixed", "fp16"],
        "Quack": ["bf16", "bf16-mixed", "fp16"],
    }


def test_the_commands_say_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(Path(__file__).read_text())
    done = mtp_mem(tmp_path, "compare", "--strategies", "naive,mine:InEights", "--n", "1")
    assert done.returncode == 2
    assert "strategy 'mine:InEights' computes in bfloat16, not in float32" in done.stderr
    done = mtp_mem(tmp_path, "verify", "--strategies", "mine:InEights", "--profile", "quick")
    assert done.returncode == 2
    assert "strategy 'mine:InEights' computes in bfloat16, not in float32" in done.stderr
    done = mtp_mem(tmp_path, "verify", "--strategies", "mine:InEights", "--dtype", "bf16-mixed")
    assert done.returncode == 0, done.stderr
    assert "mine:InEights waits for the device: it looks at its targets" in done.stdout
    assert "mine:InEights: sizes are raised to multiples of 8" in done.stdout
