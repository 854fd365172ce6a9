"""What a strategy may not do besides a wrong gradient; `verify` runs every strategy under this watch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_mem.model.head_tree import Heads
from mtp_mem.model.losses import loss_dtype
from mtp_mem.strategy import Strategy


class BrokenContract(Exception):
    """A strategy does what the protocol forbids, or leaves undone what it asks for."""


@dataclass(frozen=True)
class Watched:
    """A strategy whose every call is held against the protocol; without `may_sync` also against waiting for the device.

    Raises:
        BrokenContract: from `backward`, with what is broken in words.
    """

    inner: Strategy
    may_sync: bool = True

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """As the strategy inside."""
        given = {"the targets it was given": targets, "the weights it was given": weights}
        with unchanged(given), nullcontext() if self.may_sync else no_sync():
            losses: Any = self.inner.backward(cut, heads, targets, weights)
        if not isinstance(losses, Tensor) or losses.shape != weights.shape:
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise BrokenContract(f"returns {shape}, not the n losses {tuple(weights.shape)}")
        if losses.requires_grad:
            raise BrokenContract("returns losses that are not detached")
        if losses.dtype != loss_dtype(cut.dtype):
            raise BrokenContract(f"returns losses in {losses.dtype}, not in {loss_dtype(cut.dtype)}")
        if cut.requires_grad and cut.grad is None:
            raise BrokenContract("leaves cut.grad empty")
        if not cut.requires_grad and cut.grad is not None:
            raise BrokenContract("fills cut.grad of a cut that requires none")
        return losses


@contextmanager
def unchanged(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, of these tensors only `.grad` may change; whatever else did is put back, for the next strategy's sake.

    Raises:
        BrokenContract: names the first one that changed; not where something else is raised already.
    """
    before = [(name, tensor, tensor.detach().clone(), tensor.requires_grad) for name, tensor in tensors.items()]
    changed = []
    try:
        yield
    finally:
        for name, tensor, values, trainable in before:
            if tensor.requires_grad != trainable:
                changed.append(f"leaves {name} {'frozen' if trainable else 'trainable'}, which it was not")
                tensor.requires_grad_(trainable)
            if not torch.allclose(tensor.detach(), values, 0, 0, equal_nan=True):
                changed.append(f"changes {name}")
                with torch.no_grad():
                    tensor.copy_(values)
    if changed:
        raise BrokenContract(changed[0])


@contextmanager
def no_sync() -> Iterator[None]:
    """Inside, whatever would make the host wait for the device raises, on a CPU as well.

    Raises:
        BrokenContract: names the operator or the method.
    """
    with _NoSyncOperators(), _NoSyncMethods():  # type: ignore[no-untyped-call]
        yield


class _NoSyncOperators(TorchDispatchMode):
    """Operators whose result, or its size, the host has to know."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        waits = {
            *(aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default),
            *(aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default),
            *(aten.bincount.default, aten.repeat_interleave.Tensor),
        }
        by_mask = func in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default) and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if func in waits or by_mask:
            raise BrokenContract(f"synchronises with the device ({func})")
        return func(*args, **(kwargs or {}))


class _NoSyncMethods(TorchFunctionMode):
    """Methods that copy to the host: on a CPU they run no operator that could be seen."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        methods: tuple[Callable[..., Any], ...] = (Tensor.cpu, Tensor.numpy, Tensor.tolist)
        if func in methods:
            raise BrokenContract(f"synchronises with the device (Tensor.{func.__name__})")
        return func(*args, **(kwargs or {}))
