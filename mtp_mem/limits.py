"""What a strategy's kernel cannot do, and what of the protocol it does not keep; plain torch has no such limits."""

from dataclasses import dataclass

import torch

from mtp_mem.config import Dtype, ModelConfig, Workload

PRODUCTS: dict[Dtype, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "bf16-mixed": torch.bfloat16,
}
"""What the matrix products are in, and so the rows and the unembedding that a kernel is given."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """A strategy's class says them as `limits = Limits(...)`.

    Attributes:
        dtypes: of the rows that its kernel takes and computes exactly enough; empty: all.
        multiple_of: what the tokens N, the width D and the vocabulary V must be multiples of.
        waits: where the host waits for the device, a clause; empty: nowhere.
    """

    dtypes: tuple[torch.dtype, ...] = ()
    multiple_of: int = 1
    waits: str = ""

    @property
    def computes(self) -> str:
        """In which dtypes, a clause."""
        return f"computes in {', '.join(map(_name, self.dtypes))}"

    def takes(self, dtype: Dtype) -> bool:
        """Whether it runs in a model of this dtype."""
        return not self.dtypes or PRODUCTS[dtype] in self.dtypes

    def refusal(self, dtype: torch.dtype, *, N: int, D: int, V: int) -> str:
        """Why rows (N, D) of this dtype and an unembedding (V, D) cannot be run, a clause; empty where they can."""
        if self.dtypes and dtype not in self.dtypes:
            return f"{self.computes}, not in {_name(dtype)}"
        odd = [f"{name} = {size}" for name, size in (("N", N), ("D", D), ("V", V)) if size % self.multiple_of]
        return f"needs multiples of {self.multiple_of}, not {', '.join(odd)}" if odd else ""


def limits_of(strategy: object) -> Limits:
    """What its class says, or none."""
    found = getattr(strategy, "limits", Limits())
    return found if isinstance(found, Limits) else Limits()


def refusal(strategy: object, config: ModelConfig, workload: Workload) -> str:
    """Why the strategy cannot run this model and workload, a clause; empty where it can."""
    dtype, tokens = PRODUCTS[workload.dtype], workload.tokens
    return limits_of(strategy).refusal(dtype, N=tokens, D=config.dim, V=config.vocab_size)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
