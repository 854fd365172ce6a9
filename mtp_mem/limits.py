"""What a strategy's kernel cannot do, and what of the protocol it does not keep; plain torch has no such limits."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mtp_mem.config.schema import Dtype, ModelConfig, Workload
from mtp_mem.errors import BadInput
from mtp_mem.model.mtp_model import PRODUCT_DTYPES


@dataclass(frozen=True, kw_only=True)
class Limits:
    """A strategy's class says them as `limits = Limits(...)`.

    Attributes:
        dtypes: of the rows that its kernel takes and computes exactly enough; empty: all.
        multiple_of: what the tokens N, the width D and the vocabulary V must be multiples of.
        waits: where the host waits for the device, a clause; empty: nowhere.
        rounds_loss: it returns the loss's value in the model's dtype; `verify` allows for that in losses, never in a
            gradient.
        not_predicted: why its bytes on CUDA cannot be found out elsewhere; empty: they can.
    """

    dtypes: tuple[torch.dtype, ...] = ()
    multiple_of: int = 1
    waits: str = ""
    rounds_loss: bool = False
    not_predicted: str = ""

    @property
    def computes(self) -> str:
        """In which dtypes, a clause."""
        return f"computes in {', '.join(map(_name, self.dtypes))}"

    def takes(self, dtype: Dtype) -> bool:
        """Whether it runs in a model of this dtype."""
        return not self.dtypes or PRODUCT_DTYPES[dtype] in self.dtypes

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
    dtype, tokens = PRODUCT_DTYPES[workload.dtype], workload.tokens
    return limits_of(strategy).refusal(dtype, N=tokens, D=config.dim, V=config.vocab_size)


def require(strategies: Mapping[str, object], config: ModelConfig, workload: Workload) -> None:
    """Every strategy, by its spec, can run this model and workload.

    Raises:
        BadInput: names the first one that cannot, and why.
    """
    for spec, strategy in strategies.items():
        if why := refusal(strategy, config, workload):
            raise BadInput(f"strategy {spec!r} {why}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
