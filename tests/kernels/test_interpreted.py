"""Other projects' Triton kernels as the strategies call them, on a CPU in Triton's interpreter: `tox -e kernels`.

The interpreter has no bf16 products, no `log1p` and no `tanh`, so that no softcap is checked here. Liger leaves its
products to torch and goes through the whole verifier; Cut Cross-Entropy is given fp16 rows, and its `log1p` is written
out.
"""

import os

import pytest
import torch
from torch import Tensor

from mtp_mem.config.schema import Dtype
from mtp_mem.model.losses import IGNORE, Loss, full
from mtp_mem.strategies.cce import CCE
from mtp_mem.strategies.liger import Liger
from mtp_mem.strategy import KernelLimits
from mtp_mem.verification.gradient_error import relative_error
from mtp_mem.verification.scenarios import SCENARIOS
from mtp_mem.verification.verify import verify

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
N, D, V = 300, 40, 301  # more than one block of each, and a rest


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-mixed"])
def test_liger_is_right(dtype: Dtype) -> None:
    # A softcap's tanh is CUDA's own; of an offset that all logits share the kernel's loss loses the digits.
    some = [scenario for scenario in SCENARIOS if scenario.softcap is None and not scenario.offset]
    verification = verify(["liger"], dtypes=[dtype], scenarios=some)
    assert [check.explain() for check in verification.failures] == []
    assert len(verification.checks) == 2 + sum(dtype in scenario.dtypes for scenario in some)
    assert verification.remarks == (
        "liger waits for the device: the host counts its targets and looks at the upstream gradient",
    )


def test_liger_does_wait() -> None:
    class Silent(Liger):
        limits = KernelLimits()

    verification = verify([Silent()], dtypes=["fp32"], scenarios=SCENARIOS[:1])
    assert [check.broken for check in verification.failures] == [
        "synchronises with the device (aten._local_scalar_dense.default)"
    ]


def log1p(x):  # type: ignore[no-untyped-def]
    return tl.log(1 + x)


@pytest.fixture
def cce(monkeypatch: pytest.MonkeyPatch) -> CCE:
    from cut_cross_entropy import tl_utils

    monkeypatch.setattr(tl_utils, "tl_log1p", triton.jit(log1p))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # the strategy asks; its kernels do not
    return CCE()


@pytest.mark.parametrize("frozen", ["", "hidden", "unembedding"])
@pytest.mark.parametrize("ignored", [0, N // 3, N])
def test_cut_cross_entropy_is_right(cce: CCE, ignored: int, frozen: str) -> None:
    targets = torch.randint(V, (1, N), generator=torch.Generator().manual_seed(3))
    targets[:, torch.randperm(N, generator=torch.Generator().manual_seed(4))[:ignored]] = IGNORE
    own, right = outcome(cce.loss, torch.float16, targets, frozen), outcome(full, torch.float64, targets, frozen)
    for name, theirs in right.items():
        assert relative_error([own[name]], [theirs]) < 2e-3, name


def outcome(loss: Loss, dtype: torch.dtype, targets: Tensor, frozen: str) -> dict[str, Tensor | None]:
    """The loss and what 0.37 times it leaves in `.grad`; the same inputs in every dtype, but for their rounding."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(1, N, D, generator=generator).half().to(dtype).requires_grad_(frozen != "hidden")
    weight = (torch.randn(V, D, generator=generator) / 4).half().to(dtype).requires_grad_(frozen != "unembedding")
    computed = loss(hidden, weight, targets)
    (0.37 * 256 * computed).backward()  # small gradients would be subnormal in fp16
    return {"loss": computed.detach().double(), "hidden": hidden.grad, "unembedding": weight.grad}
