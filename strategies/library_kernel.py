"""Base of strategies with another project's fused head loss: sequential heads, and that kernel for each head's loss.

    for head in heads, the last first:  kernel(rows, unembedding, targets).backward()

A strategy names its package and its limits, and calls the kernel in `kernel_loss`; the rest is here.
"""

import importlib
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtp_mem.errors import BadInput, Missing
from mtp_mem.model.losses import IGNORE, PLAIN, LossOptions, compute_dtype, loss_dtype
from mtp_mem.model.shape import Shape
from mtp_mem.strategies.sequential import Sequential
from mtp_mem.strategy import KernelLimits


@dataclass(frozen=True, kw_only=True)
class LibraryKernel(Sequential):
    """Base of strategies whose head loss is a library's kernel.

    Attributes:
        limits: what the kernel does not take.
        module: the module to import.
        package: the package that has it, as pip names it.
        loss_options: names of the `LossOptions` that the kernel takes.
        interpreted: whether its kernels are also right without CUDA, in Triton's interpreter (TRITON_INTERPRET=1).
    """

    limits: ClassVar[KernelLimits] = KernelLimits()
    module: ClassVar[str]
    package: ClassVar[str]
    loss_options: ClassVar[tuple[str, ...]] = ()
    interpreted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.library()

    def kernel_loss(self, rows: Tensor, unembedding: Tensor, targets: Tensor, options: LossOptions) -> Tensor:
        """The kernel's loss with its graph, 0-dim: the sum over the valid targets.

        Args:
            rows: normed hidden states (N, D) in the compute dtype.
            unembedding: (V, D) in the same dtype.
            targets: (N,) int64, IGNORE where there is none.
            options: of the loss; only those in `loss_options` are set.
        """
        raise NotImplementedError

    def loss(self, hidden: Tensor, unembedding: Tensor, targets: Tensor, *, options: LossOptions = PLAIN) -> Tensor:
        """Mean cross entropy of one head over its valid targets, 0-dim in the loss dtype.

        The libraries' own mean divides by zero where no target is valid. So this is the kernel's sum, divided by a
        count of at least 1.
        """
        rows, weight, flat_targets = kernel_arguments(hidden, unembedding, targets, self.limits)
        count = (flat_targets != IGNORE).sum().clamp(min=1)
        return self.kernel_loss(rows, weight, flat_targets, options).to(loss_dtype(hidden.dtype)) / count

    def loss_bytes(self, shape: Shape) -> None:
        """No closed form: the library decides."""

    def library(self) -> Any:
        """The library's module.

        Raises:
            Missing: it is not installed, there is no CUDA device for it, or it cannot be imported here.
        """
        strategy, package = type(self).__name__.lower(), self.package
        try:
            library = importlib.import_module(self.module)
        except ModuleNotFoundError as e:
            if (e.name or "").partition(".")[0] == self.module.partition(".")[0]:
                raise Missing(
                    f"strategy {strategy!r} needs the package {package!r}, which is not installed;"
                    " pip install 'mtp-mem[kernels]' installs all of them"
                ) from None
            raise Missing(f"strategy {strategy!r}: {package} needs {e.name!r}, which is not installed") from None
        except Exception as e:  # libraries of kernels look for their compiler and GPU when imported
            raise Missing(f"strategy {strategy!r}: {package} cannot be imported here: {e}".split("\n")[0]) from None
        if not torch.cuda.is_available() and not (self.interpreted and os.environ.get("TRITON_INTERPRET") == "1"):
            other = ", or TRITON_INTERPRET=1: Triton's interpreter, for checking it" if self.interpreted else ""
            raise Missing(f"strategy {strategy!r}: {package} needs a CUDA device{other}")
        return library


def kernel_arguments(
    hidden: Tensor, unembedding: Tensor, targets: Tensor, limits: KernelLimits
) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of a kernel: rows (N, D) and unembedding (V, D) in one dtype, targets (N,).

    Raises:
        BadInput: they exceed the limits.
    """
    dtype, flat_targets = compute_dtype(hidden), targets.flatten()
    if why := limits.refusal(dtype, N=len(flat_targets), D=hidden.shape[-1], V=unembedding.shape[0]):
        raise BadInput(f"the kernel {why}")
    return hidden.flatten(0, -2).to(dtype), unembedding.to(dtype), flat_targets
