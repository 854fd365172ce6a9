"""What a strategy may not do besides a wrong gradient; `verify` runs every strategy under this watch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_mem.errors import BrokenContract
from mtp_mem.model.head_tree import Heads
from mtp_mem.model.losses import loss_dtype
from mtp_mem.strategy import Strategy, loss_options
from mtp_mem.verification.global_state import restored

NARROW = (torch.int8, torch.uint8, torch.int16, torch.int32)


@dataclass(frozen=True)
class Watched:
    """A strategy whose every call is held against the protocol; without `may_sync` also against waiting for the device.

    Raises:
        BrokenContract: from `backward`, with what is broken in words.
    """

    inner: Strategy
    parameters: Mapping[str, Tensor]
    may_sync: bool = True

    @property
    def loss_options(self) -> tuple[str, ...]:
        """Those of the strategy inside."""
        return loss_options(self.inner)

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """As the strategy inside."""
        given = {"the cut's values": cut, "the targets it was given": targets, "the weights it was given": weights}
        before = {name: parameter.grad for name, parameter in self.parameters.items()}
        with restored() as changed, unchanged(given), nullcontext() if self.may_sync else on_a_device():
            losses: Any = self.inner.backward(cut, heads, targets, weights)
        if changed:
            raise BrokenContract(f"leaves {changed[0]} changed")
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
        owners = {"the cut": cut, "the losses": losses, "the targets": targets, "the weights": weights}
        new: dict[str, Tensor | None] = {}
        for name, parameter in self.parameters.items():
            gradient = parameter.grad
            if gradient is not None and gradient.dtype != parameter.dtype:
                raise BrokenContract(f"leaves {name}.grad in {gradient.dtype}, not in {parameter.dtype}")
            if gradient is not before[name]:
                new[f"{name}.grad"] = gradient
        stand_alone({"cut.grad": cut.grad, **new}, {**owners, **self.parameters})
        return losses


def stand_alone(gradients: Mapping[str, Tensor | None], owners: Mapping[str, Tensor]) -> None:
    """Every gradient has memory of its own and carries no graph.

    Args:
        gradients: by name; those that were made since the step began.
        owners: other tensors, none of whose memory a gradient may lie in.

    Raises:
        BrokenContract: names the first that does not.
    """
    seen = {tensor.untyped_storage().data_ptr(): name for name, tensor in owners.items() if tensor.numel()}
    for name, gradient in gradients.items():
        if gradient is None:
            continue
        if gradient.requires_grad:
            raise BrokenContract(f"leaves a graph on {name} (create_graph)")
        storage = gradient.untyped_storage()
        if storage.data_ptr() in seen:
            raise BrokenContract(f"leaves {name} in the memory of {seen[storage.data_ptr()]}")
        seen[storage.data_ptr()] = name
        if storage.nbytes() != gradient.numel() * gradient.itemsize:
            raise BrokenContract(f"leaves {name} as a part of a larger buffer")


@contextmanager
def counted_hooks(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, every parameter that gets a gradient must have its hooks called, as under plain autograd.

    Raises:
        BrokenContract: names the first parameter whose hooks never ran.
    """
    calls = {(name, kind): 0 for name in parameters for kind in ("hook", "post-accumulate hook")}

    def counter(key: tuple[str, str]) -> Callable[[Tensor], None]:
        def count(_tensor: Tensor) -> None:
            calls[key] += 1

        return count

    handles = []
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            handles.append(parameter.register_hook(counter((name, "hook"))))
            after = counter((name, "post-accumulate hook"))
            handles.append(parameter.register_post_accumulate_grad_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for (name, kind), count in calls.items():
        if parameters[name].grad is not None and not count:
            raise BrokenContract(f"the {kind} of {name} never ran: its gradient went past autograd")


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
def on_a_device() -> Iterator[None]:
    """Inside, what would go wrong on a device at full size raises, on a CPU and at small size as well.

    That is whatever makes the host wait for the device, and offsets in 32 bits.

    Raises:
        BrokenContract: names the operator or the method.
    """
    with _Operators(), _NoSyncMethods():  # type: ignore[no-untyped-call]
        yield


class _Operators(TorchDispatchMode):
    """Operators whose result, or its size, the host has to know; and products of 32-bit integers."""

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
        out = func(*args, **(kwargs or {}))
        if func in (aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar) and out.dtype in NARROW:
            raise BrokenContract(f"multiplies integers in {out.dtype}: an offset of row times V wraps at 2**31 logits")
        return out


class _NoSyncMethods(TorchFunctionMode):
    """Methods that copy to the host: on a CPU they run no operator that could be seen."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        methods: tuple[Callable[..., Any], ...] = (Tensor.cpu, Tensor.numpy, Tensor.tolist)
        if func in methods:
            raise BrokenContract(f"synchronises with the device (Tensor.{func.__name__})")
        return func(*args, **(kwargs or {}))
