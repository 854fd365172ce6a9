"""Which collectives a step runs, and how many bytes each rank hands to them."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAMES = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "broadcast_": "broadcast",
}
"""A process group's operators -> the usual name of the collective."""


class Collectives(TorchDispatchMode):
    """Counts collectives while it is active.

    Attributes:
        count: by kind, how many ran.
        nbytes: bytes by kind, the sum of each one's largest tensor: gathered parameters, gradients to reduce.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()

    def forget(self) -> None:
        """Count from zero."""
        self.count.clear()
        self.nbytes.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            operator = func._schema.name.split("::")[1]
            if operator in NAMES:
                tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
                self.count[NAMES[operator]] += 1
                self.nbytes[NAMES[operator]] += max(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))
